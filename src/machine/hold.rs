//! The lock as this member holds it: taken over, proved, being given back, let go, lost, not proved any more. Decides nothing.

use super::action::{Action, LeaseOrder, OperationKind};
use super::event::Failure;
use super::finished::ANSWERED_PAUSE_MS;
use super::world::{Etcd, Lock, World};
use crate::clock::BootTime;
use crate::facts::cluster::MemberRecord;
use crate::facts::guard::{PostmasterFacts, Rung, Word};
use crate::mutants::{Mutant, mutant};
use crate::types::{LockIdentity, Revision};

/// How far the guard has to have gone, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LadderDue {
    /// The immediate stop is given.
    pub immediate_at: BootTime,
    /// Everything is killed.
    pub kill_at: BootTime,
    /// F: nothing is left.
    pub fenced_by: BootTime,
}

impl World {
    /// The guard should have gone farther in ending a writable PostgreSQL, and has not: it cannot do its work, and the daemon does it by scan.
    /// A rung is missed when the next one is due: what was done at its very moment is heard of a little later.
    pub fn notice_idle_guard(&mut self, now: BootTime) {
        // What a lock that is gone was to be fenced by says nothing about the next server.
        if self.lock == Lock::None && self.nothing_can_write() {
            self.ladder_due = None;
        }
        let Some(due) = self.ladder_due.filter(|_| !self.suspends()) else { return };
        let behind = match self.guard.as_ref().map(|guard| &guard.postmaster) {
            Some(PostmasterFacts::Running { word: Word::Writable, .. }) => now >= due.immediate_at,
            Some(PostmasterFacts::Ending { word: Word::Writable, rung, .. }) => {
                now >= due.kill_at && *rung < Rung::ImmediateStop || now >= due.fenced_by
            }
            _ => false,
        };
        if behind {
            self.guard_gone = true;
        }
    }

    /// The lock was proved, or promised, from `sent` until then, and the guard knows. False: it is not ours any more.
    pub(super) fn goes_on_until(&mut self, lock: LockIdentity, sent: BootTime, until: BootTime) -> bool {
        let ours = self.lock.identity().map(|known| known.epoch) == Some(lock.epoch);
        if ours {
            // A proof that was on its way when the lease's thread let go of the lock does not make it hold it again.
            self.holding = self.holding.map(|_| lock);
            let deadlines = self.times_of(until.since(sent)).map(|times| times.deadlines(sent));
            let announce_at = deadlines.map_or(until, |deadlines| deadlines.announce_at);
            self.ladder_due =
                deadlines.map(|due| LadderDue { immediate_at: due.immediate_at, kill_at: due.kill_at, fenced_by: due.fenced_by });
            self.lock = Lock::Proved { identity: lock, until, announce_at };
        }
        ours
    }

    /// What goes to a lease of another ttl, if it may now: our member key. Without one there is nothing to move; and until `history` names
    /// our leadership by its epoch it names it by the lease that the lock was taken on. A lock that etcd has not proved yet stays where it
    /// is: the guard knows no deadline of it, and would take the new lease's for the lock's before it hangs there. Promises were given for
    /// the lock before one that is taken anew.
    pub fn key_to_move(&self) -> Option<&MemberRecord> {
        let recorded = self.lock.identity().is_none_or(|lock| self.recorded == Some(lock.epoch));
        // A lock that is being taken hangs on the lease that the member key hangs on.
        let taking = self.in_flight.contains(&OperationKind::Acquire);
        let proved = self.lock == Lock::None || self.is_proved_by_etcd();
        self.written.as_ref().map(|(record, _)| record).filter(|_| recorded && !taking && proved)
    }

    /// The lease of a lock that was taken over is waited for: another one would end the leadership. Its thread says when it is gone. But a
    /// lease can be such that it is neither renewed nor found gone, as after a move to another etcd: when etcd could have answered for two
    /// ttl, nothing is left of what the lock was proved with.
    pub(super) fn awaits_adoption(&mut self, now: BootTime) -> bool {
        if !matches!(self.lock, Lock::Unproved(_)) {
            self.clear("lock_not_renewed");
        }
        if self.adopting.is_none() || self.lock == Lock::None {
            self.adoptable_since = None;
            return false;
        }
        // It does not run out while etcd has no leader.
        if self.etcd != Etcd::Reachable {
            self.adoptable_since = None;
            return true;
        }
        let since = *self.adoptable_since.get_or_insert(now);
        self.times().is_none_or(|times| now.since(since) < times.ttl * 2)
    }

    /// The lease of a lock that was taken over could not be renewed.
    pub(super) fn note_unrenewed(&mut self, why: &str) {
        if let (Some(_), Lock::Unproved(lock)) = (self.adopting, self.lock) {
            let message = format!(
                "the lease of the lock that the guard kept, epoch {}, cannot be renewed: {why}; without that PostgreSQL may not write here. \
                 Look whether this is the etcd that the lock was taken in: after two ttl the lock is given up",
                lock.epoch
            );
            self.warn("lock_not_renewed", message);
        }
    }

    /// The lock is being given back, or was.
    pub(super) fn gives_back(&self, lock: LockIdentity) -> bool {
        let gives = self.in_flight.contains(&OperationKind::Release) || self.released == Some(lock.epoch);
        gives && !mutant(Mutant::UsedWhileGivenBack)
    }

    /// The lock's key was written again at this revision, or is not ours. What was asked for before a release began says nothing about that release.
    pub(super) fn reaffirmed(&mut self, now: BootTime, result: Result<Option<Revision>, Failure>) {
        let epoch = self.asked.reaffirming.take();
        self.ended(now, OperationKind::Reaffirm, result.is_ok());
        self.pause(now, OperationKind::Reaffirm, ANSWERED_PAUSE_MS);
        match result {
            Ok(Some(at)) => {
                self.sure_of = epoch.or(self.sure_of);
                if epoch.is_some() {
                    self.synchrony.reaffirmed(at);
                }
            }
            Ok(None) => {}
            Err(why) if epoch.is_some() && self.lock.identity().map(|lock| lock.epoch) == epoch => {
                let message = format!(
                    "the lock's key has to be written again before PostgreSQL may be brought up as a primary under it, and etcd does not \
                     take that: {why}"
                );
                return self.warn("reaffirm_failed", message);
            }
            Err(_) => return,
        }
        self.clear("reaffirm_failed");
    }

    /// No release of this leadership can be on its way, as far as a server needs it that goes on writing on the timeline it wrote on.
    pub(super) fn may_start_in_place(&self, lock: LockIdentity) -> bool {
        [self.sure_of, self.found_writing].contains(&Some(lock.epoch))
    }

    /// The lock is given back or was taken: nothing of it stays.
    pub fn let_go(&mut self, actions: &mut Vec<Action>) {
        if self.lock != Lock::None || self.holding.is_some() {
            actions.push(Action::Lease(LeaseOrder::LetGo));
        }
        self.lose_lock();
        self.reserved = None;
    }

    /// The lock is not ours.
    pub(super) fn lose_lock(&mut self) {
        self.lock = Lock::None;
        self.holding = None;
        self.failsafe.sustained = None;
        self.failsafe.lapsed = false;
        self.clear("reaffirm_failed");
        self.clear("lock_not_renewed");
        self.clear("sync_failed");
    }

    /// The lock may still be ours; what proved it counts no more.
    pub(super) fn unprove(&mut self, identity: LockIdentity) {
        self.lock = Lock::Unproved(identity);
        self.failsafe.sustained = None;
    }
}
