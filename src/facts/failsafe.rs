//! What members say to each other so that a leader can go on while etcd cannot be asked. See [`crate::policy::failsafe`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::types::{ClusterName, Epoch, LeaseId, LockIdentity, MemberName};

/// What a member key's `features` says when its daemon knows the rules of failsafe.
pub const FEATURE: &str = "failsafe";

/// A leader's call: "promise not to run for the lock for `ttl_s` from now". It names epoch and lease of the lock, which only a reader of
/// etcd knows, so that a stranger cannot keep members from running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiseAsk {
    /// The cluster.
    pub cluster: ClusterName,
    /// Who is asked: an address can have moved to another member, whose promise would be worth nothing.
    pub to: MemberName,
    /// Who asks.
    pub member: MemberName,
    /// The leadership it goes on with.
    pub epoch: Epoch,
    /// The lease that its lock hung on when etcd was last asked.
    pub lease: LeaseId,
    /// For how long, in seconds.
    pub ttl_s: u64,
}

/// What the lease's thread may go on with while etcd cannot be asked: this lock, if every one of these members promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Armed {
    /// The lock.
    pub lock: LockIdentity,
    /// All other members that may lead, with the addresses of their HTTP APIs.
    pub peers: BTreeMap<MemberName, String>,
}
