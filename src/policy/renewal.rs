//! Decides when a lease is renewed, granted, or left alone: what the lease thread knows and what it does next. Never talks to etcd.
//!
//! The rule that would surprise: a lease that has run out by our own clock is not said to be lost, and is asked for until etcd says that
//! it is gone. Whoever needs the deadline has it (E) and looks at the clock first; and because etcd gives every lease its full ttl again
//! when its leader changes, a lock that is still ours can be proved again, where a new lease would cost a whole ttl without a leader.
//!
//! Failsafe: when etcd could not be asked, a lock may go on by the promises of the others, from one proof or promise to the next without
//! a gap. Once the fast stop has begun nobody is called any more: promises would only keep the others from leading.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::failsafe::Armed;
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::policy::deadlines::LeaseTimes;
use crate::types::{LeaseIdentity, LockIdentity};

/// etcd may grant a little more than was asked for (its least ttl): no reason to get another lease.
const GRANT_SURPLUS_MAX_S: u64 = 2;
/// The peers' answers have this part of the ttl at least: what is left of R = T/6 when the renewal has taken a = T/10.
const PROMISE_BUDGET_PARTS: u32 = 15;
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

/// One round of calls, in place of a renewal that etcd did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// For which lock, and whom.
    pub armed: Armed,
    /// The promise that is asked for: T of the lease that the lock hangs on.
    pub ttl: Duration,
    /// How long all answers may take together.
    pub budget: Duration,
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
        self.lock.is_some() && self.fast_stop_is_due(now)
    }

    fn fast_stop_is_due(&self, now: BootTime) -> bool {
        now >= self.times.deadlines(self.proved).fast_stop_at
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
    /// What may go on without etcd.
    armed: Option<Armed>,
}

impl Book {
    /// Keeps nothing up yet.
    pub fn new(times: LeaseTimes) -> Self {
        Self { times, held: None, candidate: None, wanted: None, silent: false, armed: None }
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

    /// What the lock may go on with while etcd cannot be asked. None: not at all.
    ///
    /// An order that takes it away is answered: from then on no round is begun.
    pub fn arm(&mut self, armed: Option<Armed>, now: BootTime) -> Option<LeaseEvent> {
        self.armed = armed;
        self.armed.is_none().then_some(LeaseEvent::Disarmed { at: now })
    }

    /// Whom to call when a renewal came to nothing because etcd could not be asked. Only for the lock that is held, while it is proved
    /// without a gap, and before its fast stop.
    pub fn round(&self, now: BootTime) -> Option<Round> {
        let held = self.held.as_ref().filter(|_| !self.silent)?;
        let armed = self.armed.clone().filter(|armed| held.lock == Some(armed.lock))?;
        let least = held.times.ttl / PROMISE_BUDGET_PARTS;
        let unbroken = now < held.until && !held.fast_stop_is_due(now);
        unbroken.then(|| Round { armed, ttl: held.times.ttl, budget: held.next_at.since(now).max(least) })
    }

    /// All have promised, called at `sent` or later, and the guard knows. Moves the deadline, only forward, and says until when.
    pub fn sustained(&mut self, sent: BootTime) -> Option<BootTime> {
        self.renewed(sent)
    }

    /// etcd says that there is no such lease. The next one is granted when it is asked for.
    pub fn not_found(&mut self) -> Option<LeaseEvent> {
        self.forget().map(|_| LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound })
    }

    /// The proof failed. The lease itself is kept.
    pub fn lock_not_ours(&mut self) -> Option<LeaseEvent> {
        let held = self.held.as_mut()?;
        held.lock.take().map(|lock| LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(lock) })
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
        // Renewing one lease proves nothing of a lock that hangs on another.
        let lock = lock.filter(|lock| lock.lease == identity);
        // When it was renewed last is not known here; the guard has the deadline.
        self.held = Some(Held { identity, lock, times, until: BootTime(0), next_at: now, proved: now });
        self.wanted = None;
        self.silent = false;
    }

    /// Gets a new lease. One that is kept up stays, with its lock, and is said again: the order and the news of it have crossed, and a second
    /// one would be taken for a change of the ttl, while the first is renewed no more. One that was adopted and never renewed is dropped; for
    /// the one that was got beside it, of another ttl, and was told already, it makes room.
    pub fn grant(&mut self, now: BootTime) -> Option<LeaseEvent> {
        if let Some(Held { identity, times, until, .. }) = self.held
            && until > BootTime(0)
        {
            return Some(LeaseEvent::Granted { identity, ttl: times.ttl, sent: until.before(times.validity()) });
        }
        let told = self.candidate.take().filter(|candidate| now < candidate.until);
        self.forget();
        let Some(Candidate { identity, times, until }) = told else {
            self.want(now);
            return None;
        };
        let sent = until.before(times.validity());
        self.held = Some(Held { identity, lock: None, times, until, next_at: now, proved: sent });
        Some(LeaseEvent::Granted { identity, ttl: times.ttl, sent })
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
mod tests;
