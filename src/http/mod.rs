//! The HTTP API: what HAProxy, check_patroni, vip-manager, dashboards and the other members ask a member.
//!
//! [`snapshot`] is what is known, [`answer`] decides (pure, one table-driven test per path), [`serve`] only moves bytes. It runs on a
//! thread and a runtime of its own, so that a busy daemon still answers, and answers 503 on leader paths from A on by the clock.
//!
//! Where Patroni is known to say more than it knows (`/primary` = 200 while PostgreSQL is down: Patroni issues 2756, 3603) this is
//! stricter: see [`health`]. Nothing here changes state: calls that would are refused.

pub mod answer;
mod bodies;
pub mod health;
mod metrics;
pub mod peer;
pub mod promises;
mod query;
pub mod serve;
pub mod snapshot;
#[cfg(test)]
pub(crate) mod testing;

pub use serve::{Limits, Server, start};
pub use snapshot::{Counters, Snapshot};
