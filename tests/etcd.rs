//! Live tests of what speaks to etcd, each against a real server of both supported kinds: the distribution's 3.4 and 3.5.
//!
//! Names are promises; those of an invariant of SAFETY say which.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use pgherd::facts::cluster::StatusRecord;
use pgherd::types::{Epoch, Lsn, TimelineId};

#[path = "support/mod.rs"]
mod support;

#[path = "rig/proxy.rs"]
mod proxy;

/// What a leader of this epoch reports, for a test to which only the epoch matters.
fn status(epoch: Epoch) -> StatusRecord {
    StatusRecord {
        epoch,
        timeline: TimelineId(1),
        lsn: Lsn(1),
        slots: Default::default(),
        replayed: Default::default(),
        conditions: Vec::new(),
    }
}

/// Runs each test against both versions of etcd, with a cluster of its own: of so many members, with such arguments.
macro_rules! against_both {
    ($members:literal, $extra:expr; $($name:ident),+ $(,)?) => {
        mod etcd_of_the_distribution {
            use crate::support::etcd_server::{Version, run};
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                run(Version::Distribution, $members, $extra, super::$name).await;
            })+
        }
        mod etcd_3_5 {
            use crate::support::etcd_server::{Version, run};
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                run(Version::V3_5, $members, $extra, super::$name).await;
            })+
        }
    };
}

#[path = "etcd/access.rs"]
mod access;
#[path = "etcd/failover.rs"]
mod failover;
#[path = "etcd/failsafe.rs"]
mod failsafe;
#[path = "etcd/lease.rs"]
mod lease;
#[path = "etcd/lock.rs"]
mod lock;
#[path = "etcd/maintenance.rs"]
mod maintenance;
#[path = "etcd/operator.rs"]
mod operator;
#[path = "etcd/synchrony.rs"]
mod synchrony;
#[path = "etcd/tls.rs"]
mod tls;
#[path = "etcd/watch.rs"]
mod watch;
