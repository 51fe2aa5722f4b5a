//! etcd: keys, fenced transactions, the lease, the watch.
//!
//! [`Etcd`] is the handle for everything but the lease, which has a thread and connections of its own ([`lease`]). Nothing in here decides
//! who leads. Every write that only a leader may make is one transaction that compares the leader key's create revision (I4); every
//! listing goes through raft, because on etcd before 3.4.42, 3.5.28 and 3.6.9 a linearizable read can be stale (etcd #20418).
//!
//! The rule that would surprise: a write whose answer was lost is not tried again. It is read back, and if that does not tell, the
//! caller gets [`EtcdError::Unknown`].

mod client;
mod error;
pub mod keys;
mod leader;
pub mod lease;
mod member;
mod operator;
mod pool;
mod settings;
mod version;
mod view;
mod watch;

pub use client::Etcd;
pub use error::{EtcdError, Suspicion};
pub use keys::Keys;
pub use leader::{AcquireRequest, Acquisition, Beaten, Fenced, Moved, Released};
pub use member::PutMember;
pub use operator::Applied;
pub use settings::{REQUEST_TIMEOUT_DEFAULT_MS, Secret, Settings, TlsFiles};
pub use version::version_condition;
pub use watch::{WatchEvent, WatchHandle, WatchTimes};
