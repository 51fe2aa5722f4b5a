//! Decides when a lease is renewed, granted, or left alone: what the lease thread knows and what it does next. Never talks to etcd.
//!
//! The rule that would surprise: a lease that has run out by our own clock is not said to be lost, and is asked for until etcd says that
//! it is gone. Whoever needs the deadline has it (E) and looks at the clock first; and because etcd gives every lease its full ttl again
//! when its leader changes, a lock that is still ours can be proved again, where a new lease would cost a whole ttl without a leader.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::policy::deadlines::LeaseTimes;
use crate::types::{LeaseIdentity, LockIdentity};

/// etcd may grant a little more than was asked for (its least ttl): no reason to get another lease.
const GRANT_SURPLUS_MAX_S: u64 = 2;
/// First pause after a failed grant; it doubles up to R.
const GRANT_RETRY_MIN_MS: u64 = 100;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing until a command comes.
    Idle,
    /// Nothing until then.
    WaitUntil(BootTime),
    /// Renew, and prove the lock if there is one.
    Renew {
        /// Which lease.
        lease: LeaseIdentity,
        /// The lock to prove.
        lock: Option<LockIdentity>,
        /// a: bounds keepalive and proof together.
        budget: Duration,
        /// Only to an endpoint that has answered just before.
        hear_first: bool,
    },
    /// Get a lease.
    Grant {
        /// The ttl to ask for.
        ttl: Duration,
        /// How long that may take.
        budget: Duration,
    },
}

/// A lease that is kept up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    identity: LeaseIdentity,
    lock: Option<LockIdentity>,
    times: LeaseTimes,
    until: BootTime,
    next_at: BootTime,
    /// Send time of the last proof of the lock; before the first, when it was taken.
    proved: BootTime,
}

impl Held {
    /// The guard's fast stop has begun: what still arrives at etcd only keeps the lock from the others. Where answers are lost and
    /// requests are not, the lock would be renewed for ever with nobody leading under it (SAFETY row 18).
    fn hear_first(&self, now: BootTime) -> bool {
        self.lock.is_some() && now >= self.times.deadlines(self.proved).fast_stop_at
    }
}

/// A lease of a changed ttl, waiting for the keys to be moved to it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    identity: LeaseIdentity,
    times: LeaseTimes,
    until: BootTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    at: BootTime,
    failures: u32,
}

/// The whole state of the lease thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Book {
    /// For leases to come.
    times: LeaseTimes,
    held: Option<Held>,
    candidate: Option<Candidate>,
    wanted: Option<Wanted>,
    /// The guard does not acknowledge: nothing is renewed.
    silent: bool,
}

impl Book {
    /// Keeps nothing up yet.
    pub fn new(times: LeaseTimes) -> Self {
        Self { times, held: None, candidate: None, wanted: None, silent: false }
    }

    /// What is due.
    pub fn next(&self, now: BootTime) -> Step {
        let held = self.held.as_ref().filter(|_| !self.silent);
        if let Some(held) = held.filter(|held| held.next_at <= now) {
            let hear_first = held.hear_first(now);
            return Step::Renew { lease: held.identity, lock: held.lock, budget: held.times.renewal_budget(), hear_first };
        }
        if self.wanted.as_ref().is_some_and(|wanted| wanted.at <= now) {
            return Step::Grant { ttl: self.times.ttl, budget: self.times.renewal_budget() };
        }
        let renewal = held.map(|held| held.next_at);
        let grant = self.wanted.as_ref().map(|wanted| wanted.at);
        let stale = self.candidate.as_ref().map(|candidate| candidate.until);
        [renewal, grant, stale].into_iter().flatten().min().map_or(Step::Idle, Step::WaitUntil)
    }

    /// A new lease that nobody took up in time is replaced. To be called before anything else at each waking.
    pub fn expire(&mut self, now: BootTime) {
        if self.candidate.as_ref().is_some_and(|candidate| candidate.until <= now) {
            self.candidate = None;
            self.want(now);
        }
    }

    /// The times of the lease that is kept up: what the guard computes the deadlines with, and how long it may take to acknowledge.
    /// Never those of a lease to come: with a longer ttl than the lease has, the guard would fence after the lock is gone.
    pub fn held_times(&self) -> LeaseTimes {
        self.held.as_ref().map_or(self.times, |held| held.times)
    }

    /// etcd said what ttl the lease was granted with. One that was adopted may be from before a change of the spec: it counts by its own
    /// ttl, and a lease of the wanted one is got.
    pub fn learn_ttl(&mut self, ttl: Duration, now: BootTime) {
        let wanted = self.times.ttl;
        let Some(held) = self.held.as_mut().filter(|held| held.times.ttl != ttl) else { return };
        // The configured margin was checked against the configured ttl, not against this one.
        held.times = LeaseTimes { watchdog: held.times.watchdog, ..LeaseTimes::new(ttl) };
        held.next_at = held.next_at.min(now + held.times.renewal_interval());
        if ttl < wanted || ttl > wanted + Duration::from_secs(GRANT_SURPLUS_MAX_S) {
            self.want(now);
        }
    }

    fn want(&mut self, now: BootTime) {
        self.wanted = Some(Wanted { at: now, failures: 0 });
    }

    /// etcd granted a lease; `sent` is from before the request.
    pub fn granted(&mut self, identity: LeaseIdentity, sent: BootTime) -> LeaseEvent {
        let (times, until) = (self.times, sent + self.times.validity());
        self.wanted = None;
        if self.held.is_some() {
            self.candidate = Some(Candidate { identity, times, until });
        } else {
            let next_at = sent + times.renewal_interval();
            self.held = Some(Held { identity, lock: None, times, until, next_at, proved: sent });
        }
        LeaseEvent::Granted { identity, ttl: times.ttl, sent }
    }

    /// It did not: tried again after a pause that grows.
    pub fn grant_failed(&mut self, now: BootTime, why: String) -> LeaseEvent {
        let longest = self.times.renewal_interval();
        if let Some(wanted) = &mut self.wanted {
            let pause = Duration::from_millis(GRANT_RETRY_MIN_MS) * 2_u32.saturating_pow(wanted.failures.min(10));
            wanted.failures += 1;
            wanted.at = now + pause.min(longest);
        }
        LeaseEvent::Failed { why }
    }

    /// Books the beginning of a renewal: the next one is due R after it, however this one ends.
    pub fn begun(&mut self, now: BootTime) {
        if let Some(held) = &mut self.held {
            held.next_at = now + held.times.renewal_interval();
        }
    }

    /// The lease was renewed by a request sent at `sent`. Moves the deadline, only forward, and says until when.
    pub fn renewed(&mut self, sent: BootTime) -> Option<BootTime> {
        let held = self.held.as_mut()?;
        held.until = held.until.max(sent + held.times.validity());
        held.proved = held.proved.max(sent);
        Some(held.until)
    }

    /// etcd says that there is no such lease. The next one is granted when it is asked for.
    pub fn not_found(&mut self) -> Option<LeaseEvent> {
        self.forget().map(|_| LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound })
    }

    /// The proof failed. The lease itself is kept.
    pub fn lock_not_ours(&mut self) -> Option<LeaseEvent> {
        let held = self.held.as_mut()?;
        held.lock.take().map(|_| LeaseEvent::Lost { why: LeaseLoss::LockNotOurs })
    }

    /// The guard did not acknowledge: nothing is renewed until somebody says that it is back.
    pub fn guard_silent(&mut self) -> LeaseEvent {
        self.silent = true;
        self.wanted = None;
        LeaseEvent::GuardSilent
    }

    /// Takes a lease over and renews it at once.
    pub fn adopt(&mut self, identity: LeaseIdentity, lock: Option<LockIdentity>, now: BootTime) {
        let candidate = self.candidate.take().filter(|candidate| candidate.identity == identity);
        let times = candidate.map_or(self.times, |candidate| candidate.times);
        // When it was renewed last is not known here; the guard has the deadline.
        self.held = Some(Held { identity, lock, times, until: BootTime(0), next_at: now, proved: now });
        self.wanted = None;
        self.silent = false;
    }

    /// Drops what is held and gets a new lease.
    pub fn grant(&mut self, now: BootTime) {
        self.forget();
        self.want(now);
    }

    /// Keeps nothing up any more. Answers with the lease that was.
    pub fn forget(&mut self) -> Option<LeaseIdentity> {
        let held = self.held.take();
        *self = Self::new(self.times);
        held.map(|held| held.identity)
    }

    /// A lock was taken: renew and prove at once.
    ///
    /// # Errors
    /// When it hangs on another lease than the one that is kept up.
    pub fn hold(&mut self, lock: LockIdentity, now: BootTime) -> Result<(), String> {
        match self.held.as_mut().filter(|held| held.identity == lock.lease) {
            Some(held) => {
                if held.lock != Some(lock) {
                    held.proved = now;
                }
                held.lock = Some(lock);
                held.next_at = now;
                Ok(())
            }
            None => Err(format!("lock {} hangs on a lease that is not kept up here", lock.epoch)),
        }
    }

    /// The lock is given up: from now on the lease alone is renewed.
    pub fn let_go(&mut self) {
        if let Some(held) = &mut self.held {
            held.lock = None;
        }
    }

    /// A changed ttl needs a lease of its own; anything else counts at once.
    pub fn change_times(&mut self, times: LeaseTimes, now: BootTime) {
        self.times = times;
        self.candidate = None;
        match &mut self.held {
            Some(held) if held.times.ttl == times.ttl => {
                held.times = times;
                self.wanted = None;
            }
            Some(_) => self.want(now),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, EtcdClusterId, LeaseId};

    const T_MS: u64 = 30_000;

    #[test]
    fn a_lock_whose_fast_stop_has_begun_is_renewed_only_where_etcd_was_heard() {
        let lock = LockIdentity { lease: lease(7), epoch: Epoch(9) };
        let mut book = Book::new(times(T_MS));
        book.adopt(lease(7), Some(lock), ms(0));
        book.renewed(ms(1_000));
        let hears_first = |book: &Book, at| matches!(book.next(at), Step::Renew { hear_first: true, .. });
        let fast_stop = times(T_MS).deadlines(ms(1_000)).fast_stop_at;
        assert!(!hears_first(&book, fast_stop.before(Duration::from_millis(1))));
        assert!(hears_first(&book, fast_stop));
        book.renewed(fast_stop);
        assert!(!hears_first(&book, fast_stop));
        book.let_go();
        assert!(!hears_first(&book, ms(10 * T_MS)), "the lease alone keeps nobody from leading");
    }

    fn ms(ms: u64) -> BootTime {
        BootTime(ms * 1_000_000)
    }

    fn times(ttl_ms: u64) -> LeaseTimes {
        LeaseTimes::new(Duration::from_millis(ttl_ms))
    }

    fn lease(id: i64) -> LeaseIdentity {
        LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(id) }
    }

    fn lock_on(id: i64) -> LockIdentity {
        LockIdentity { lease: lease(id), epoch: Epoch(9) }
    }

    fn kept(book: &Book) -> Option<(LeaseIdentity, Option<LockIdentity>)> {
        book.held.as_ref().map(|held| (held.identity, held.lock))
    }

    fn keeping() -> Book {
        let mut book = Book::new(times(T_MS));
        book.grant(ms(0));
        book.granted(lease(1), ms(0));
        book
    }

    #[test]
    fn a_renewal_is_due_every_r_from_its_beginning_whatever_became_of_the_last() {
        let mut book = keeping();
        assert_eq!(book.next(ms(0)), Step::WaitUntil(ms(5_000)));
        assert!(matches!(book.next(ms(5_000)), Step::Renew { lock: None, .. }));
        book.begun(ms(5_000));
        assert_eq!(book.next(ms(7_900)), Step::WaitUntil(ms(10_000)), "it failed after the budget; the grid stands");
    }

    #[test]
    fn the_deadline_counts_from_the_sending_and_not_from_an_answer_that_came_late() {
        let mut book = keeping();
        book.begun(ms(5_000));
        assert_eq!(book.renewed(ms(5_000)), Some(ms(5_000 + 29_850)), "the answer came at 7 s, and that has no part in it");
    }

    #[test]
    fn a_deadline_never_moves_back() {
        let mut book = keeping();
        book.renewed(ms(10_000));
        assert_eq!(book.renewed(ms(5_000)), Some(ms(39_850)));
    }

    #[test]
    fn a_lease_that_ran_out_by_our_clock_is_asked_for_until_etcd_says_that_it_is_gone() {
        let mut book = keeping();
        book.hold(lock_on(1), ms(0)).unwrap();
        book.begun(ms(60_000));
        book.expire(ms(65_000));
        assert!(matches!(book.next(ms(65_000)), Step::Renew { lock: Some(_), .. }));
        assert_eq!(book.not_found(), Some(LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound }));
        assert_eq!(book.next(ms(65_001)), Step::Idle, "a new one is granted when it is asked for");
    }

    #[test]
    fn a_lock_of_a_stranger_costs_the_lock_and_not_the_lease() {
        let mut book = keeping();
        book.hold(lock_on(1), ms(1)).unwrap();
        assert_eq!(book.lock_not_ours(), Some(LeaseEvent::Lost { why: LeaseLoss::LockNotOurs }));
        assert_eq!(kept(&book), Some((lease(1), None)));
    }

    #[test]
    fn grants_are_retried_with_a_pause_that_grows_up_to_r() {
        let mut book = Book::new(times(3_000));
        book.grant(ms(0));
        let mut now = 0;
        for pause in [100, 200, 400, 500, 500] {
            book.grant_failed(ms(now), "no".into());
            assert_eq!(book.next(ms(now)), Step::WaitUntil(ms(now + pause)));
            now += pause;
        }
    }

    #[test]
    fn nothing_is_renewed_while_the_guard_is_silent() {
        let mut book = keeping();
        book.hold(lock_on(1), ms(1)).unwrap();
        book.guard_silent();
        assert_eq!(book.next(ms(40_000)), Step::Idle);
        book.adopt(lease(1), None, ms(41_000));
        assert!(matches!(book.next(ms(41_000)), Step::Renew { .. }), "until the daemon says that it is back");
    }

    #[test]
    fn a_changed_ttl_keeps_the_old_lease_up_until_the_new_one_is_adopted() {
        let mut book = keeping();
        book.hold(lock_on(1), ms(1)).unwrap();
        book.begun(ms(2));
        book.change_times(times(60_000), ms(3));
        assert_eq!(book.next(ms(3)), Step::Grant { ttl: Duration::from_secs(60), budget: Duration::from_secs(6) });
        book.granted(lease(2), ms(3));
        assert_eq!(kept(&book), Some((lease(1), Some(lock_on(1)))));
        assert_eq!(book.renewed(ms(100)), Some(ms(100 + 29_850)), "by its own ttl");
        book.adopt(lease(2), Some(lock_on(2)), ms(200));
        book.begun(ms(200));
        assert_eq!(book.renewed(ms(200)), Some(ms(200 + 59_700)));
    }

    #[test]
    fn a_lock_counts_by_the_ttl_of_the_lease_it_hangs_on_and_not_by_the_one_that_is_wanted() {
        let mut book = keeping();
        book.hold(lock_on(1), ms(1)).unwrap();
        book.change_times(times(60_000), ms(3));
        assert_eq!(book.held_times().ttl, Duration::from_millis(T_MS), "the guard would fence 30 s after the lock is gone");
        book.granted(lease(2), ms(3));
        assert_eq!(book.held_times().ttl, Duration::from_millis(T_MS));
        book.adopt(lease(2), Some(lock_on(2)), ms(200));
        assert_eq!(book.held_times().ttl, Duration::from_secs(60));
    }

    #[test]
    fn an_adopted_lease_counts_by_the_ttl_that_etcd_names_and_is_replaced() {
        let mut book = Book::new(times(60_000));
        book.adopt(lease(1), Some(lock_on(1)), ms(0));
        book.begun(ms(0));
        book.learn_ttl(Duration::from_secs(10), ms(1));
        assert_eq!(book.held_times(), times(10_000));
        assert_eq!(book.renewed(ms(0)), Some(ms(9_950)));
        assert!(matches!(book.next(ms(1)), Step::Grant { ttl, .. } if ttl == Duration::from_secs(60)));
    }

    #[test]
    fn a_new_lease_that_nobody_adopts_is_replaced_before_it_runs_out() {
        let mut book = keeping();
        book.change_times(times(3_000), ms(0));
        book.granted(lease(2), ms(0));
        assert!(!matches!(book.next(ms(2_984)), Step::Grant { .. }));
        book.expire(ms(2_985));
        book.begun(ms(2_985));
        assert!(matches!(book.next(ms(2_985)), Step::Grant { .. }));
    }

    #[test]
    fn a_lock_on_another_lease_is_not_held() {
        assert!(keeping().hold(lock_on(2), ms(0)).is_err());
    }
}
