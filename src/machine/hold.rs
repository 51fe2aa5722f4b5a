//! The lock as this member holds it: being given back, let go, lost, not proved any more. Decides nothing.

use super::action::{Action, LeaseOrder, OperationKind};
use super::world::{Lock, World};
use crate::clock::BootTime;
use crate::types::LockIdentity;

/// How far the guard has to have gone, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LadderDue {
    /// The immediate stop is given.
    pub immediate_at: BootTime,
    /// F: nothing is left.
    pub fenced_by: BootTime,
}

impl World {
    /// The lock is being given back, or was.
    pub(super) fn gives_back(&self, lock: LockIdentity) -> bool {
        self.in_flight.contains(&OperationKind::Release) || self.released == Some(lock.epoch)
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
    }

    /// The lock may still be ours; what proved it counts no more.
    pub(super) fn unprove(&mut self, identity: LockIdentity) {
        self.lock = Lock::Unproved(identity);
        self.failsafe.sustained = None;
    }
}
