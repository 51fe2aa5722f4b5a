//! What the lease's thread says.

use std::time::Duration;

use crate::clock::BootTime;
use crate::types::{LeaseIdentity, LockIdentity};

/// Something that happened to the lease or the lock on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// A new lease.
    Granted {
        /// Which.
        identity: LeaseIdentity,
        /// As granted.
        ttl: Duration,
        /// When the request was handed to the client: the lease lives from here, or later.
        sent: BootTime,
    },
    /// Renewed, without a lock to prove.
    Renewed {
        /// When the renewal was handed to the client.
        sent: BootTime,
        /// Until when it lives at least.
        until: BootTime,
    },
    /// Renewed, the lock proved, and the proof acknowledged by the guard.
    Proved {
        /// Which lock.
        lock: LockIdentity,
        /// When the renewal was handed to the client.
        sent: BootTime,
        /// E.
        until: BootTime,
    },
    /// etcd could not be asked, every other member promised not to run, and the guard acknowledged that.
    Sustained {
        /// Which lock.
        lock: LockIdentity,
        /// When the earliest of the calls was sent, or before.
        sent: BootTime,
        /// E.
        until: BootTime,
    },
    /// Told not to go on without etcd any more: no call is sent after `at`, until it is told to again.
    Disarmed {
        /// When it took the order.
        at: BootTime,
    },
    /// An attempt gave nothing.
    Failed {
        /// A sentence.
        why: String,
    },
    /// The lease or the lock is gone.
    Lost {
        /// Which.
        why: LeaseLoss,
    },
    /// Member key and lock hang on another lease now, under the same epoch: the ttl was changed.
    Moved {
        /// The lease before.
        from: LeaseIdentity,
        /// The lease that counts.
        to: LeaseIdentity,
    },
    /// The guard did not acknowledge in time.
    GuardSilent,
}

/// What is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseLoss {
    /// The lease.
    LeaseNotFound,
    /// This lock. The news may cross the order to hold another one.
    LockNotOurs(LockIdentity),
}
