//! What this member knows of leading without etcd, and of what it promised to others; how events change it. Decides nothing.
//!
//! A *lapse*: the lease ran out while its leader went on by promises, and etcd is back without the lock. The lock is not gone then: nobody
//! else could have taken it, and until A nobody else can, so that the leader takes it anew for the same timeline. The rule that would
//! surprise: only a primary bridges a lapse, and only until A; for everybody else, and from then on, the lock is gone.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, HistoryEntry, LeaderKey};
use crate::facts::failsafe::{Armed, PromiseAsk};
use crate::facts::guard::Word;
use crate::mutants::{Mutant, mutant};
use crate::policy::deadlines::LeaseTimes;
use crate::policy::election::VOTERS_GRACE_MS;
use crate::policy::failsafe::{self, Called, Promise};
use crate::types::{LockIdentity, Revision};

use super::Machine;
use super::action::{Action, OperationKind};
use super::state::State;
use super::world::{Lock, World};

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Failsafe {
    /// When this machine was asked first: what a run before it promised is over a ttl later.
    pub started: Option<BootTime>,
    /// What was promised.
    pub promise: Option<Promise>,
    /// The promise holds for some time yet: until shortly before its end this member takes no part in an election.
    pub keeps_still: bool,
    /// The leader key seen last, also when it is absent now.
    pub leader_seen: Option<LeaderKey>,
    /// E, when the lock goes on by promises. None = etcd proved it last.
    pub sustained: Option<BootTime>,
    /// It was said that it does.
    pub said: bool,
    /// The lock's key is gone from etcd, and the promises hold.
    pub lapsed: bool,
    /// etcd answers from an older state: the record in it is not the one that others go by.
    pub went_back: bool,
    /// What the lease's thread was told last.
    pub armed: Option<Armed>,
    /// It was told to rely on nothing, and when; it has not said yet that it does.
    pub disarming: Option<BootTime>,
    /// When it took that order.
    pub disarmed_at: BootTime,
    /// When the renewal was sent that etcd proved the lock with last, and the times of the lease that it hangs on.
    pub proof: Option<(BootTime, LeaseTimes)>,
    /// The revision at which this run wrote the key.
    pub written: Option<Revision>,
}

impl World {
    /// The lock, if it may go on although etcd does not have it: the promises of the others hold, and A has not come.
    fn outlives_its_key(&self, now: BootTime) -> bool {
        self.failsafe.sustained.is_some() && self.lock.is_proved_at(now)
    }

    /// The lock's lease or key is gone from etcd. True if that is a lapse.
    pub(super) fn lapses(&mut self, now: BootTime) -> bool {
        self.failsafe.lapsed = self.outlives_its_key(now);
        self.failsafe.lapsed
    }

    /// The leader key is ours, taken in a lapse with an answer that was lost: on our present lease.
    pub(super) fn is_taken_anew(&self, leader: &LeaderKey) -> bool {
        let ours = leader.holder == self.me.name.as_str() && self.lease.is_some_and(|lease| lease.lease == leader.lease);
        ours && self.lock.identity().is_some_and(|lock| lock.lease.lease != leader.lease && lock.epoch < leader.epoch)
    }

    /// Nobody has led since: ours is the last leadership in `history`, or the one that was taken anew on our present lease, of which the
    /// answer is not here yet. Promises say so too, but not to a clock that stood still (row 26).
    pub(super) fn led_last(&self, view: &ClusterView) -> bool {
        let ours = |entry: &HistoryEntry| {
            self.lock.identity().is_some_and(|lock| entry.is_of(lock.epoch) || entry.awaits(&self.me.name, lock.lease.lease))
                || self.lease.is_some_and(|lease| entry.awaits(&self.me.name, lease.lease))
        };
        view.history.last().is_none_or(ours)
    }

    /// etcd proved the lock: promises are not relied on any more.
    pub(super) fn proved_by_etcd(&mut self, sent: BootTime, times: Option<LeaseTimes>) {
        self.failsafe.sustained = None;
        self.failsafe.lapsed = false;
        self.failsafe.proof = times.map(|times| (sent, times));
    }

    /// The lock that was won: anew in a lapse, where the promises that hold for the one before hold on; or by an election.
    pub(super) fn won(&mut self, identity: LockIdentity) {
        self.lock = match self.lock {
            Lock::Proved { until, announce_at, .. } if self.failsafe.lapsed => Lock::Proved { identity, until, announce_at },
            _ => Lock::Unproved(identity),
        };
        self.failsafe.lapsed = false;
        self.sure_of = Some(identity.epoch);
        self.synchrony.lock_won(identity.epoch);
        self.clear("reaffirm_failed");
        self.forget_failures(OperationKind::Release);
        self.initialized_here |= self.asked.first;
    }

    /// Whether etcd, and no promise, proved the lock last.
    pub fn is_proved_by_etcd(&self) -> bool {
        matches!(self.lock, Lock::Proved { .. }) && self.failsafe.sustained.is_none()
    }
}

impl Machine {
    /// A lapse that is over, or that this state does not bridge.
    pub(super) fn lapse_ended(&mut self, now: BootTime) -> Option<String> {
        let bridged = *self.state() == State::Primary && self.world.outlives_its_key(now);
        if !self.world.failsafe.lapsed || bridged {
            return None;
        }
        self.world.lose_lock();
        Some("the lease ran out while etcd could not be asked, and the lock was not taken anew in time".to_owned())
    }

    /// A leader without etcd asks this member not to run. The promise is booked before the answer goes out.
    pub(super) fn promise(&mut self, now: BootTime, id: u64, ask: &PromiseAsk, received: BootTime) -> Action {
        let leads = matches!(self.state(), State::Demoting { .. }) || self.state().is_leading() || self.world.may_lead_or_write(now);
        let world = &mut self.world;
        let called = Called {
            me: &world.me.name,
            leads,
            acquiring: world.in_flight.contains(&OperationKind::Acquire),
            impostor: world.foreign.is_some(),
            leader_seen: world.failsafe.leader_seen.as_ref(),
            view: world.view.as_deref(),
        };
        let result = failsafe::may_promise(&called, ask).map(|ttl| {
            let before = world.failsafe.promise.take();
            let promise = failsafe::promised(before, ask, received.min(now), ttl, now);
            world.failsafe.promise = (!mutant(Mutant::PromiseNotKept)).then_some(promise);
        });
        Action::AnswerPromise { id, result }
    }
}

impl World {
    /// Holds a lock or thinks so, or its guard does; or PostgreSQL is not known to be a standby.
    fn may_lead_or_write(&self, now: BootTime) -> bool {
        let by_guard = self.guard.as_ref().is_none_or(|guard| guard.lock.is_some());
        let writes = self.sql().is_some_and(|sql| !sql.in_recovery) || matches!(self.running(), Some((_, Word::Writable)));
        self.lock != Lock::None || by_guard || writes || !self.cannot_write(now)
    }

    /// See [`Failsafe::keeps_still`].
    pub(super) fn note_promise(&mut self, now: BootTime) {
        let released = |promise: &&Promise| self.view.as_ref().is_some_and(|view| promise.is_released(view));
        let promise = self.failsafe.promise.as_ref().filter(|promise| !released(promise));
        self.failsafe.keeps_still = promise.is_some_and(|promise| now + Duration::from_millis(VOTERS_GRACE_MS) < promise.until);
    }

    /// Remembered when it goes.
    pub(super) fn note_leader(&mut self, view: &ClusterView) {
        if let Some(leader) = &view.leader {
            self.failsafe.leader_seen = Some(leader.clone());
        }
    }
}
