//! What the guard knows, and which requests it grants. PURE: the loop carries out what is granted here.
//!
//! ```text
//!            start / adopt                     its end, then the proof
//!  Empty ------------------> Kept(word, rung) -------------------------> Empty
//!    ^  \--- a look finds strangers ---> Unclaimed --- a look finds none ---^
//! ```
//!
//! The rules that would surprise: each request is judged after the clock was looked at, so a proof that arrives after the fast stop was
//! due is too late even if the stop has not been performed yet. And a start that was once vouched for as writable never becomes a
//! standby again: a promotion that was asked for may come true at any time until the server has ended.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ladder::fence;
use super::protocol::{Refusal, StopOrder};
use crate::clock::BootTime;
use crate::facts::guard::{GuardFacts, LastEnd, LockFacts, Maintenance, PostmasterFacts, Rung, StartId, Word};
use crate::policy::deadlines::{Deadlines, LeaseTimes};
use crate::types::{Epoch, LeaseIdentity, LockIdentity};

/// So many daemon ends by signal within [`CRASH_WINDOW_MS`] are a crash loop.
pub const CRASH_LOOP_ENDS: usize = 3;
/// The window in which daemon ends are counted.
pub const CRASH_WINDOW_MS: u64 = 60_000;

/// Everything that survives an upgrade of the guard's program.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuardState {
    /// The postmaster.
    pub postmaster: Postmaster,
    /// The daemon's lease.
    pub lease: Option<LeaseIdentity>,
    /// The lock, while the daemon says that it is held.
    pub lock: Option<HeldLock>,
    /// The lock that was given up last: its late proofs are refused.
    pub given_up: Option<LockIdentity>,
    /// Starts so far.
    pub starts: u64,
    /// When daemons ended without a word, oldest first.
    pub crashes: Vec<BootTime>,
    /// See [`GuardFacts::crash_loop`].
    pub crash_loop: bool,
    /// The newest word on maintenance mode. A guard of an earlier version has none.
    #[serde(default)]
    pub maintenance: Maintenance,
}

/// A lock and until when it is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldLock {
    /// Which leadership.
    pub identity: LockIdentity,
    /// Of the latest proof.
    pub deadlines: Deadlines,
}

/// The postmaster as the guard keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Postmaster {
    /// None, and proved so.
    Empty(Option<LastEnd>),
    /// Processes that nobody told the guard about.
    Unclaimed(Vec<i32>),
    /// One, until it is proved that nothing is left of it.
    Kept(Kept),
}

impl Default for Postmaster {
    fn default() -> Self {
        Self::Empty(None)
    }
}

/// A postmaster that was started or adopted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Which start.
    pub start: StartId,
    /// Its pid; may be another process's once `end` is set.
    pub pid: i32,
    /// The daemon's word.
    pub word: Word,
    /// Not the guard's child.
    pub adopted: bool,
    /// The highest rung performed.
    pub climbed: Option<Rung>,
    /// What the daemon ordered.
    pub order: StopOrder,
    /// The deadlines that were in force when the lock's fast stop became due. From then on they are, whatever E becomes.
    pub ladder: Option<Deadlines>,
    /// The postmaster itself has ended; processes of it may be left.
    pub end: Option<LastEnd>,
}

impl GuardState {
    /// The first act after each wake-up, and the first of each request: has the lock's fast stop become due?
    pub fn check_clock(&mut self, now: BootTime) {
        let lock = self.lock.map(|lock| lock.deadlines);
        if let Postmaster::Kept(kept) = &mut self.postmaster
            && kept.ladder.is_none()
            && !self.maintenance.suspends
        {
            kept.ladder = fence(kept, lock.as_ref()).filter(|deadlines| deadlines.fast_stop_at <= now);
        }
    }

    /// The lock was proved by a keepalive sent at `sent`. See [`super::protocol::Request::Lock`].
    ///
    /// # Errors
    /// `Invalid`, `StaleLock`; `LadderRuns` although it was recorded.
    pub fn lock(&mut self, now: BootTime, identity: LockIdentity, sent: BootTime, times: LeaseTimes) -> Result<(), Refusal> {
        self.check_clock(now);
        if sent > now || times.validate().is_err() {
            return Err(Refusal::Invalid);
        }
        if self.given_up.is_some_and(|gone| gone.lease.cluster == identity.lease.cluster && identity.epoch <= gone.epoch) {
            return Err(Refusal::StaleLock);
        }
        let new = times.deadlines(sent);
        let deadlines = match self.lock {
            None => new,
            Some(old) if old.identity == identity => {
                if new.valid_until > old.deadlines.valid_until {
                    new
                } else {
                    old.deadlines
                }
            }
            Some(old) if old.identity.lease.cluster != identity.lease.cluster || identity.epoch < old.identity.epoch => {
                return Err(Refusal::StaleLock);
            }
            Some(old) if old.identity.epoch == identity.epoch => new.earlier(&old.deadlines),
            Some(_) => new,
        };
        self.lock = Some(HeldLock { identity, deadlines });
        match &self.postmaster {
            Postmaster::Kept(Kept { ladder: Some(_), .. }) => Err(Refusal::LadderRuns),
            _ => Ok(()),
        }
    }

    /// The lock is not held any more, or is about to be released.
    ///
    /// # Errors
    /// `NotEmpty` while a process that may write is not proved dead.
    pub fn no_lock(&mut self, now: BootTime, epoch: Epoch) -> Result<(), Refusal> {
        self.check_clock(now);
        if self.may_write() {
            return Err(Refusal::NotEmpty);
        }
        if let Some(lock) = self.lock.filter(|lock| lock.identity.epoch <= epoch) {
            self.given_up = Some(lock.identity);
            self.lock = None;
        }
        Ok(())
    }

    fn lock_allows_writing(&self, now: BootTime) -> Result<(), Refusal> {
        // What begins to write is not fenced then, and its lock may have run out before it does.
        if self.maintenance.suspends {
            return Err(Refusal::Maintenance);
        }
        let held = self.lock.is_some_and(|lock| now < lock.deadlines.announce_at);
        if held { Ok(()) } else { Err(Refusal::NoLock) }
    }

    /// Whether a postmaster may be started, as far as the guard knows; the caller has looked at the process table just before.
    ///
    /// # Errors
    /// `NotEmpty`, `NoLock`.
    pub fn may_start(&mut self, now: BootTime, word: Word) -> Result<(), Refusal> {
        self.check_clock(now);
        if !matches!(self.postmaster, Postmaster::Empty(_)) {
            return Err(Refusal::NotEmpty);
        }
        match word {
            Word::Standby => Ok(()),
            Word::Writable => self.lock_allows_writing(now),
        }
    }

    /// Whether a postmaster that runs already may be taken in charge. The word needs no lock: one that writes without is killed at once.
    ///
    /// # Errors
    /// `NotEmpty` when one is kept already.
    pub fn may_adopt(&mut self, now: BootTime) -> Result<(), Refusal> {
        self.check_clock(now);
        if matches!(self.postmaster, Postmaster::Kept(_)) { Err(Refusal::NotEmpty) } else { Ok(()) }
    }

    /// It exists from now on.
    pub fn started(&mut self, pid: i32, word: Word, adopted: bool) -> StartId {
        self.starts += 1;
        let start = StartId(self.starts);
        let order = StopOrder::default();
        self.postmaster = Postmaster::Kept(Kept { start, pid, word, adopted, climbed: None, order, ladder: None, end: None });
        start
    }

    /// The daemon's word for this start.
    ///
    /// # Errors
    /// `NoSuchStart`, `LadderRuns` when it is being ended, `NoLock`, `OnceWritable`.
    pub fn vouch(&mut self, now: BootTime, start: StartId, word: Word) -> Result<(), Refusal> {
        self.check_clock(now);
        let allowed = self.lock_allows_writing(now);
        let Postmaster::Kept(kept) = &mut self.postmaster else { return Err(Refusal::NoSuchStart) };
        if kept.start != start || kept.end.is_some() {
            return Err(Refusal::NoSuchStart);
        }
        match (kept.word, word) {
            (Word::Standby, Word::Standby) | (Word::Writable, Word::Writable) => Ok(()),
            (Word::Writable, Word::Standby) => Err(Refusal::OnceWritable),
            (Word::Standby, Word::Writable) if kept.climbed.is_some() => Err(Refusal::LadderRuns),
            (Word::Standby, Word::Writable) => {
                allowed?;
                kept.word = Word::Writable;
                Ok(())
            }
        }
    }

    /// The daemon orders a stop; earlier orders for the same rung stay if they are earlier.
    pub fn stop(&mut self, now: BootTime, order: StopOrder) {
        self.check_clock(now);
        if let Postmaster::Kept(kept) = &mut self.postmaster {
            let earlier = |old: Option<BootTime>, new: Option<BootTime>| [old, new].into_iter().flatten().min();
            kept.order = StopOrder {
                fast_at: earlier(kept.order.fast_at, order.fast_at),
                immediate_at: earlier(kept.order.immediate_at, order.immediate_at),
                kill_at: earlier(kept.order.kill_at, order.kill_at),
            };
        }
    }

    /// The loop has performed this rung.
    pub fn climbed(&mut self, rung: Rung) {
        if let Postmaster::Kept(kept) = &mut self.postmaster {
            kept.climbed = kept.climbed.max(Some(rung));
        }
    }

    /// The postmaster itself has ended.
    pub fn postmaster_ended(&mut self, now: BootTime, exit_status: Option<i32>, signal: Option<i32>) {
        if let Postmaster::Kept(kept) = &mut self.postmaster {
            kept.end.get_or_insert(LastEnd { start: kept.start, exit_status, signal, rung: kept.climbed, at: now });
        }
    }

    /// After its end, a look found no process of it. Before its end the proof is worth nothing and is ignored.
    pub fn proved_empty(&mut self, now: BootTime) {
        if let Postmaster::Kept(kept) = &self.postmaster
            && let Some(end) = kept.end
        {
            self.postmaster = Postmaster::Empty(Some(LastEnd { at: now, ..end }));
        }
    }

    /// A look at the process table while no postmaster is kept.
    pub fn looked(&mut self, pids: Vec<i32>) {
        match &self.postmaster {
            Postmaster::Kept(_) => {}
            Postmaster::Empty(_) if pids.is_empty() => {}
            _ if pids.is_empty() => self.postmaster = Postmaster::Empty(None),
            _ => self.postmaster = Postmaster::Unclaimed(pids),
        }
    }

    /// A daemon ended without a word.
    pub fn daemon_crashed(&mut self, now: BootTime) {
        self.crashes.retain(|at| now.since(*at) < Duration::from_millis(CRASH_WINDOW_MS));
        self.crashes.push(now);
        if self.crashes.len() < CRASH_LOOP_ENDS {
            return;
        }
        self.crash_loop = true;
        let writes = matches!(&self.postmaster, Postmaster::Kept(kept) if kept.word == Word::Writable);
        if writes && !self.maintenance.suspends {
            // The rest is the lock's ladder: nobody renews any more.
            self.stop(now, StopOrder { fast_at: Some(now), ..StopOrder::default() });
        }
    }

    /// An operator says that the crashes are dealt with.
    pub fn clear_crashes(&mut self) {
        self.crashes.clear();
        self.crash_loop = false;
    }

    /// Whether a process that could write may be left: everything but a proved death and a standby.
    pub fn may_write(&self) -> bool {
        match &self.postmaster {
            Postmaster::Empty(_) => false,
            Postmaster::Unclaimed(_) => true,
            Postmaster::Kept(kept) => kept.word == Word::Writable,
        }
    }

    /// Whether it is proved that no process of PostgreSQL is left.
    pub fn is_empty(&self) -> bool {
        matches!(self.postmaster, Postmaster::Empty(_))
    }

    /// The state as it is told; the loop adds pid, sequence and conditions.
    pub fn facts(&self, now: BootTime) -> GuardFacts {
        let postmaster = match &self.postmaster {
            Postmaster::Empty(last) => PostmasterFacts::ProvedEmpty { last: *last },
            Postmaster::Unclaimed(pids) => PostmasterFacts::Unclaimed { pids: pids.clone() },
            Postmaster::Kept(Kept { start, word, climbed: None, end: Some(_), .. }) => {
                PostmasterFacts::Ending { start: *start, rung: Rung::KillAll, word: *word }
            }
            Postmaster::Kept(Kept { start, word, climbed: Some(rung), .. }) => {
                PostmasterFacts::Ending { start: *start, rung: *rung, word: *word }
            }
            Postmaster::Kept(Kept { start, pid, word, adopted, climbed: None, end: None, .. }) => {
                PostmasterFacts::Running { start: *start, pid: *pid, word: *word, adopted: *adopted }
            }
        };
        let recent = self.crashes.iter().filter(|at| now.since(**at) < Duration::from_millis(CRASH_WINDOW_MS)).count();
        GuardFacts {
            sequence: 0,
            pid: 0,
            postmaster,
            lease: self.lease,
            lock: self.lock.map(|lock| LockFacts {
                identity: lock.identity,
                valid_until: lock.deadlines.valid_until,
                announce_at: lock.deadlines.announce_at,
            }),
            daemon_crashes: u32::try_from(recent).unwrap_or(u32::MAX),
            crash_loop: self.crash_loop,
            maintenance: self.maintenance,
            conditions: Vec::new(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::types::{EtcdClusterId, LeaseId};

    pub const T0: BootTime = BootTime(1_000_000_000_000);

    pub fn identity(epoch: i64, lease: i64) -> LockIdentity {
        LockIdentity { lease: LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(lease) }, epoch: Epoch(epoch) }
    }

    pub fn times() -> LeaseTimes {
        LeaseTimes::new(Duration::from_secs(10))
    }

    pub fn lock_of(state: &GuardState) -> Deadlines {
        state.lock.unwrap().deadlines
    }

    /// A writable postmaster under a lock proved at T0.
    pub fn writable() -> GuardState {
        let mut state = GuardState::default();
        state.lock(T0, identity(7, 1), T0, times()).unwrap();
        state.may_start(T0, Word::Writable).unwrap();
        state.started(100, Word::Writable, false);
        state
    }

    fn later(seconds: u64) -> BootTime {
        T0 + Duration::from_secs(seconds)
    }

    #[test]
    fn deadlines_of_one_lock_move_only_forward() {
        let mut state = writable();
        state.lock(later(2), identity(7, 1), later(2), times()).unwrap();
        let moved = lock_of(&state);
        assert_eq!(moved, times().deadlines(later(2)));
        state.lock(later(3), identity(7, 1), later(1), times()).unwrap();
        assert_eq!(lock_of(&state), moved, "an old answer moves nothing back");
    }

    #[test]
    fn while_the_key_may_hang_on_either_lease_the_earlier_deadline_counts() {
        let mut state = writable();
        let short = LeaseTimes::new(Duration::from_secs(4));
        state.lock(T0, identity(7, 2), T0, short).unwrap();
        assert_eq!(lock_of(&state), short.deadlines(T0));
        state.lock(later(1), identity(7, 3), later(1), LeaseTimes::new(Duration::from_secs(30))).unwrap();
        assert_eq!(lock_of(&state), short.deadlines(T0), "a longer lease counts only with its own next proof");
        state.lock(later(1), identity(7, 3), later(1), LeaseTimes::new(Duration::from_secs(30))).unwrap();
        assert!(lock_of(&state).valid_until > later(29));
    }

    #[test]
    fn a_stale_or_senseless_lock_is_refused_and_changes_nothing() {
        let mut state = writable();
        let before = state.clone();
        let mut elsewhere = identity(9, 1);
        elsewhere.lease.cluster = EtcdClusterId(2);
        assert_eq!(state.lock(T0, identity(6, 1), T0, times()), Err(Refusal::StaleLock));
        assert_eq!(state.lock(T0, elsewhere, T0, times()), Err(Refusal::StaleLock));
        assert_eq!(state.lock(T0, identity(7, 1), later(1), times()), Err(Refusal::Invalid));
        assert_eq!(state.lock(T0, identity(7, 1), T0, LeaseTimes::new(Duration::from_secs(2))), Err(Refusal::Invalid));
        assert_eq!(state, before);
    }

    #[test]
    fn a_late_proof_of_a_lock_that_was_given_up_is_refused() {
        let mut state = GuardState::default();
        state.lock(T0, identity(7, 1), T0, times()).unwrap();
        state.no_lock(T0, Epoch(7)).unwrap();
        assert_eq!(state.lock, None);
        assert_eq!(state.lock(T0, identity(7, 1), T0, times()), Err(Refusal::StaleLock));
        assert_eq!(state.lock(T0, identity(8, 1), T0, times()), Ok(()));
    }

    #[test]
    fn a_proof_after_the_announcement_takes_it_back_but_not_after_the_fast_stop_was_due() {
        let mut state = writable();
        let d = lock_of(&state);
        assert_eq!(state.clone().lock(d.announce_at, identity(7, 1), d.announce_at, times()), Ok(()));
        assert_eq!(state.lock(d.fast_stop_at, identity(7, 1), d.fast_stop_at, times()), Err(Refusal::LadderRuns));
        assert!(lock_of(&state).valid_until > d.valid_until, "recorded all the same");
        let kept_ladder = match &state.postmaster {
            Postmaster::Kept(kept) => kept.ladder,
            other => panic!("{other:?}"),
        };
        assert_eq!(kept_ladder, Some(d), "and yet the old ladder runs");
        state.postmaster_ended(d.immediate_at, Some(0), None);
        state.proved_empty(d.immediate_at);
        assert_eq!(state.may_start(d.immediate_at, Word::Writable), Ok(()), "and it starts again under the same lock");
    }

    #[test]
    fn nothing_writable_is_started_or_vouched_for_without_a_lock_or_after_the_announcement() {
        let mut state = GuardState::default();
        assert_eq!(state.may_start(T0, Word::Writable), Err(Refusal::NoLock));
        assert_eq!(state.may_start(T0, Word::Standby), Ok(()));
        let start = state.started(1, Word::Standby, false);
        assert_eq!(state.vouch(T0, start, Word::Writable), Err(Refusal::NoLock));
        state.lock(T0, identity(7, 1), T0, times()).unwrap();
        let announce_at = lock_of(&state).announce_at;
        assert_eq!(state.clone().vouch(announce_at, start, Word::Writable), Err(Refusal::NoLock));
        assert_eq!(state.vouch(T0, StartId(9), Word::Writable), Err(Refusal::NoSuchStart));
        assert_eq!(state.vouch(T0, start, Word::Writable), Ok(()));
        assert_eq!(state.vouch(T0, start, Word::Standby), Err(Refusal::OnceWritable));
    }

    #[test]
    fn the_lock_is_not_given_up_before_the_proof_of_death() {
        let mut state = writable();
        assert_eq!(state.no_lock(T0, Epoch(7)), Err(Refusal::NotEmpty));
        state.postmaster_ended(T0, None, Some(9));
        assert_eq!(state.no_lock(T0, Epoch(7)), Err(Refusal::NotEmpty), "a dead postmaster is no proof");
        state.proved_empty(T0);
        assert_eq!(state.no_lock(T0, Epoch(7)), Ok(()));
        state.looked(vec![5]);
        assert_eq!(state.no_lock(T0, Epoch(7)), Err(Refusal::NotEmpty));
    }

    #[test]
    fn a_proof_of_death_before_the_end_of_the_postmaster_is_ignored() {
        let mut state = writable();
        state.proved_empty(T0);
        assert!(!state.is_empty());
    }

    #[test]
    fn the_third_crash_within_a_minute_stops_a_writable_server_in_good_order_and_leaves_a_standby_alone() {
        for (word, stopped) in [(Word::Writable, Some(later(59))), (Word::Standby, None)] {
            let mut state = GuardState::default();
            state.lock(T0, identity(7, 1), T0, LeaseTimes::new(Duration::from_secs(300))).unwrap();
            state.started(1, word, false);
            for at in [T0, later(30), later(59)] {
                assert!(!state.crash_loop);
                state.daemon_crashed(at);
            }
            assert!(state.crash_loop);
            assert!(matches!(&state.postmaster, Postmaster::Kept(kept) if kept.order.fast_at == stopped));
        }
        let mut slow = writable();
        for at in [T0, later(30), later(60)] {
            slow.daemon_crashed(at);
        }
        assert!(!slow.crash_loop, "the first one was a minute ago");
        assert_eq!(slow.facts(later(60)).daemon_crashes, 2);
    }
}
