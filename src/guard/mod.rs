//! The guard: a tiny process that spawns the postmaster, outlives the daemon, and alone ends PostgreSQL in time.
//!
//! What it is to PostgreSQL a container shim is to a container. It decides nothing about leadership: the daemon tells it until when a
//! lock is proved, and it makes sure that no process of PostgreSQL can write after that.
//!
//! | file | kind | what |
//! |---|---|---|
//! | state, ladder, maintenance | PURE | what it knows and grants; which rung is due; when none is |
//! | server | EDGE | the loop |
//! | requests, connection, protocol | EDGE | who may ask what, and how |
//! | child, scan, sys | EDGE | making a postmaster, finding its processes, system calls |
//! | start, upgrade, log | EDGE | setting up the process, replacing its program, lines for people |
//! | client | EDGE | the daemon's end |
//!
//! The rule that would surprise: nothing in here may name the rest of the crate but types, clock, facts and policy::deadlines. The
//! guard's binary is locked into memory, and locking costs what it weighs.

mod child;
pub mod client;
mod connection;
pub mod ladder;
mod log;
mod maintenance;
pub mod protocol;
mod requests;
pub mod scan;
mod server;
pub mod start;
pub mod state;
pub mod sys;
mod upgrade;
