//! The guard: a tiny process that spawns the postmaster, outlives the daemon, and alone ends PostgreSQL in time.
//!
//! What it is to PostgreSQL a container shim is to a container. It decides nothing about leadership: the daemon tells it until when a
//! lock is proved, and it makes sure that no process of PostgreSQL can write after that.
//!
//! | file | kind | what |
//! |---|---|---|
//! | protocol | | what daemon and guard say to each other |
//! | client | EDGE | the daemon's end of it |
//!
//! The rule that would surprise: nothing in here may name the rest of the crate but types, clock, facts and policy::deadlines. The
//! guard's binary is locked into memory, and locking costs what it weighs.

pub mod client;
pub mod protocol;
pub mod scan;
pub mod sys;
