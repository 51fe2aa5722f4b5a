//! Decides which rung of the ladder is due, and when to look again. PURE: time and state come in, nothing is done here.
//!
//! Three things can end a postmaster, and the earliest wins: the lock's deadlines (only for one that may write), the daemon's stop
//! order, and its own death, after which whatever is left of it is killed.
//!
//! The rule that would surprise: an order and a lock do not know of each other. A planned stop under a lock that is renewed goes on at
//! its own pace; when the renewals stop, the lock's ladder overtakes it.

use std::time::Duration;

use super::state::{GuardState, Kept, Postmaster};
use crate::clock::BootTime;
use crate::facts::guard::{Rung, Word};
use crate::policy::deadlines::Deadlines;

/// After an orderly end of the postmaster its logging process still empties its pipe, and ends by itself: so long it is left alone.
pub const ORDERLY_END_GRACE_MS: u64 = 1_000;
/// From one SIGKILL to all, to the next look at who is left.
pub const KILL_AGAIN_MS: u64 = 20;
/// Rungs that are performed, in order. `Announce` is the daemon's, by the clock.
const PERFORMED: [Rung; 3] = [Rung::FastStop, Rung::ImmediateStop, Rung::KillAll];
/// What a writable postmaster without any lock stands under: everything is overdue.
const OVERDUE: Deadlines = Deadlines {
    announce_at: BootTime(0),
    fast_stop_at: BootTime(0),
    immediate_at: BootTime(0),
    kill_at: BootTime(0),
    fenced_by: BootTime(0),
    valid_until: BootTime(0),
};

/// What the loop has to do now, and when to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Perform this rung now. `KillAll` is asked for again and again until nobody is left.
    pub climb: Option<Rung>,
    /// The next time at which the answer may change by itself.
    pub wake_at: Option<BootTime>,
}

/// The lock's deadlines for a postmaster that may write; None for a standby, which needs none.
pub(super) fn fence(kept: &Kept, lock: Option<&Deadlines>) -> Option<Deadlines> {
    match kept.word {
        Word::Standby => None,
        Word::Writable => Some(kept.ladder.or(lock.copied()).unwrap_or(OVERDUE)),
    }
}

/// When `rung` is due for this postmaster; None = never, as things stand.
fn due(kept: &Kept, state: &GuardState, rung: Rung) -> Option<BootTime> {
    // What has begun before maintenance mode runs to its end.
    let suspended = state.maintenance.suspends && kept.ladder.is_none();
    let lock = state.lock.as_ref().map(|lock| &lock.deadlines);
    let by_lock = fence(kept, lock).filter(|_| !suspended).map(|deadlines| deadlines.rung_at(rung));
    let by_order = match rung {
        Rung::Announce => None,
        Rung::FastStop => kept.order.fast_at,
        Rung::ImmediateStop => kept.order.immediate_at,
        Rung::KillAll => kept.order.kill_at,
    };
    let by_death = kept.end.filter(|_| rung == Rung::KillAll).map(|end| {
        let orderly = end.exit_status == Some(0);
        end.at + Duration::from_millis(if orderly { ORDERLY_END_GRACE_MS } else { 0 })
    });
    [by_lock, by_order, by_death].into_iter().flatten().min()
}

/// What is due at `now`. The loop asks first after each wake-up, before it looks at anything else.
pub fn decide(now: BootTime, state: &GuardState) -> Decision {
    let Postmaster::Kept(kept) = &state.postmaster else { return Decision { climb: None, wake_at: None } };
    let due_now = |rung: &Rung| due(kept, state, *rung).is_some_and(|at| at <= now);
    if kept.climbed == Some(Rung::KillAll) || due_now(&Rung::KillAll) {
        return Decision { climb: Some(Rung::KillAll), wake_at: Some(now + Duration::from_millis(KILL_AGAIN_MS)) };
    }
    let climb = PERFORMED.into_iter().rev().find(due_now).filter(|rung| kept.climbed < Some(*rung));
    let climbed = climb.or(kept.climbed);
    let wake_at = PERFORMED.into_iter().filter(|rung| climbed < Some(*rung)).filter_map(|rung| due(kept, state, rung)).min();
    Decision { climb, wake_at }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::protocol::StopOrder;
    use crate::guard::state::tests::{T0, identity, lock_of, times, writable};

    fn decided(state: &GuardState, at: BootTime) -> Option<Rung> {
        decide(at, state).climb
    }

    #[test]
    fn each_rung_is_climbed_at_its_time_and_not_before() {
        let mut state = writable();
        let d = lock_of(&state);
        for (rung, at) in [(Rung::FastStop, d.fast_stop_at), (Rung::ImmediateStop, d.immediate_at), (Rung::KillAll, d.kill_at)] {
            let before = BootTime(at.0 - 1);
            state.check_clock(before);
            assert_eq!(decided(&state, before), None, "before {rung:?}");
            assert_eq!(decide(before, &state).wake_at, Some(at));
            state.check_clock(at);
            assert_eq!(decided(&state, at), Some(rung));
            state.climbed(rung);
        }
        assert_eq!(decided(&state, d.fenced_by), Some(Rung::KillAll), "until nobody is left");
    }

    #[test]
    fn a_guard_that_wakes_late_kills_at_once_instead_of_climbing_rung_by_rung() {
        let state = writable();
        assert_eq!(decided(&state, lock_of(&state).valid_until), Some(Rung::KillAll));
    }

    #[test]
    fn a_standby_has_no_deadline_and_a_writable_one_without_a_lock_is_overdue() {
        let mut state = GuardState::default();
        state.started(1, Word::Standby, false);
        assert_eq!(decide(BootTime(u64::MAX), &state), Decision { climb: None, wake_at: None });
        let mut state = GuardState::default();
        state.started(1, Word::Writable, true);
        assert_eq!(decided(&state, T0), Some(Rung::KillAll));
    }

    #[test]
    fn a_planned_stop_keeps_its_own_pace_until_the_lock_overtakes_it() {
        let mut state = writable();
        let d = lock_of(&state);
        state.stop(T0, StopOrder::planned(T0, T0 + Duration::from_secs(30), T0 + Duration::from_secs(60)));
        assert_eq!(decided(&state, T0), Some(Rung::FastStop));
        state.climbed(Rung::FastStop);
        assert_eq!(decide(T0, &state), Decision { climb: None, wake_at: Some(d.immediate_at) });
        let later = T0 + Duration::from_secs(2);
        assert_eq!(state.lock(later, identity(7, 1), later, times()), Ok(()), "a renewal is welcome during a planned stop");
        assert_eq!(decided(&state, d.immediate_at), None);
        assert_eq!(decided(&state, lock_of(&state).immediate_at), Some(Rung::ImmediateStop));
    }

    #[test]
    fn what_is_left_of_a_crashed_postmaster_is_killed_and_after_an_orderly_end_its_logger_has_a_moment() {
        let mut crashed = writable();
        crashed.postmaster_ended(T0, None, Some(9));
        assert_eq!(decided(&crashed, T0), Some(Rung::KillAll));
        let mut orderly = writable();
        orderly.postmaster_ended(T0, Some(0), None);
        assert_eq!(decided(&orderly, T0), None);
        assert_eq!(decided(&orderly, T0 + Duration::from_millis(ORDERLY_END_GRACE_MS)), Some(Rung::KillAll));
    }
}
