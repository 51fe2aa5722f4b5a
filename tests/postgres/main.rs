//! The edges of `pgherd::postgres` against real servers, of every version that is at hand.
//!
//! No daemon, no guard, no etcd: each test makes its own servers in a directory of its own and ends them. PostgreSQL refuses to run as
//! root, so a test process that is root becomes the user `postgres` before anything else.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../rig/wait.rs"]
#[allow(dead_code)]
mod wait;

mod archiving;
mod cloning;
mod configuration;
mod directories;
mod half_segment;
mod harness;
mod lineage;
mod rewinding;
mod sessions;
mod synchronous;
mod tablespaces;
