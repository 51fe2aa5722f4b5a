//! Live tests: real etcd, real PostgreSQL, real daemons, and faults as they happen. One binary, since each would link everything.
//!
//! Names are promises. Every test ends in `World::finish`, which proves that there never were two writers and that the history is whole.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../rig/mod.rs"]
mod rig;

mod archiving;
mod bootstrap;
mod chaos;
mod clock;
mod crash;
mod damage;
mod demo;
mod failsafe;
mod full;
mod interrupted;
mod network;
mod operator;
mod paused;
mod receiving;
mod reinit;
mod restart;
mod rewind;
mod rig_works;
mod routing;
mod standbys;
mod switchover;
mod synchronous;
mod versions;
