//! What is known, as plain data: what etcd holds, what PostgreSQL and the guard said. Facts travel from the edges to the machine and
//! decide nothing.
//!
//! What could not be read is absent or `Unknown`, never the value it had before.

pub mod archiving;
pub mod cluster;
pub mod copying;
pub mod failsafe;
pub mod guard;
pub mod lease;
pub mod lost;
pub mod maintenance;
pub mod postgres;
pub mod requests;
pub mod routing;
pub mod synchrony;
