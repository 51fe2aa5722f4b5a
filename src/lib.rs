//! pgherd keeps a PostgreSQL cluster the way its spec says.
//!
//! Data flows one way: facts -> decision -> actions -> facts. See docs/ARCHITECTURE.md for the house.

pub mod cli;
pub mod clock;
pub mod daemon;
pub mod etcd;
pub mod facts;
pub mod guard;
pub mod http;
pub mod machine;
pub mod mutants;
pub mod policy;
pub mod postgres;
pub mod spec;
pub mod telemetry;
pub mod types;
