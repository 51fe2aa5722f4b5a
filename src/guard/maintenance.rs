//! Maintenance mode as the guard has it: the daemon's word that deadlines end nothing, of a revision of etcd's key. Pure.
//!
//! What surprises: an earlier revision's word changes nothing, whenever it comes; and nothing begins to write while the word stands, since nobody
//! would fence it.

use super::protocol::Refusal;
use super::state::GuardState;
use crate::clock::BootTime;
use crate::facts::guard::Maintenance;

impl GuardState {
    /// Maintenance mode is on, or is over, as of that revision of its key. A ladder that has begun runs on; when the mode is over the
    /// deadlines of the lock count at once, as they are then: so the daemon has a proof before it says that.
    ///
    /// # Errors
    /// `StaleMaintenance` for an earlier revision than the one that is known.
    pub fn maintain(&mut self, now: BootTime, new: Maintenance) -> Result<(), Refusal> {
        self.check_clock(now);
        if new.revision < self.maintenance.revision {
            return Err(Refusal::StaleMaintenance);
        }
        self.maintenance = new;
        self.check_clock(now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::facts::guard::{Rung, Word};
    use crate::guard::ladder::decide;
    use crate::policy::deadlines::LeaseTimes;
    use crate::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, Revision};

    const T0: BootTime = BootTime(1_000_000_000_000);

    /// A primary under a lock that was proved at T0, by a lease of 10 s.
    fn primary() -> GuardState {
        let lease = LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(7) };
        let mut state = GuardState::default();
        state.looked(Vec::new());
        state.lock(T0, LockIdentity { lease, epoch: Epoch(5) }, T0, LeaseTimes::new(Duration::from_secs(10))).unwrap();
        state.may_start(T0, Word::Writable).unwrap();
        state.started(100, Word::Writable, false);
        state
    }

    fn word(revision: i64, suspends: bool) -> Maintenance {
        Maintenance { revision: Revision(revision), suspends }
    }

    fn after(seconds: u64) -> BootTime {
        T0 + Duration::from_secs(seconds)
    }

    #[test]
    fn a_lock_that_is_not_proved_ends_nothing_while_the_word_stands_and_everything_when_it_is_over() {
        let mut state = primary();
        state.maintain(T0, word(3, true)).unwrap();
        assert_eq!((decide(after(3_600), &state).climb, decide(after(3_600), &state).wake_at), (None, None));
        state.maintain(after(3_600), word(4, false)).unwrap();
        assert_eq!(decide(after(3_600), &state).climb, Some(Rung::KillAll));
    }

    #[test]
    fn a_word_of_an_earlier_revision_changes_nothing() {
        let mut state = primary();
        state.maintain(T0, word(4, false)).unwrap();
        assert_eq!(state.maintain(T0, word(3, true)), Err(Refusal::StaleMaintenance));
        assert!(decide(after(3_600), &state).climb.is_some());
    }

    #[test]
    fn what_has_begun_before_it_runs_to_its_end() {
        let mut state = primary();
        state.check_clock(after(9));
        state.maintain(after(9), word(3, true)).unwrap();
        assert!(decide(after(9), &state).climb.is_some());
    }

    #[test]
    fn nothing_begins_to_write_while_the_word_stands() {
        let mut state = GuardState::default();
        state.looked(Vec::new());
        let lease = LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(7) };
        state.lock(T0, LockIdentity { lease, epoch: Epoch(5) }, T0, LeaseTimes::new(Duration::from_secs(10))).unwrap();
        state.maintain(T0, word(3, true)).unwrap();
        assert_eq!(state.may_start(T0, Word::Writable), Err(Refusal::Maintenance));
        assert_eq!(state.may_start(T0, Word::Standby), Ok(()));
        state.maintain(T0, word(4, false)).unwrap();
        assert_eq!(state.may_start(T0, Word::Writable), Ok(()));
    }
}
