//! This host's PostgreSQL: its files, its programs, and SQL.
//!
//! Does what it is told and reports what it saw; it decides nothing about who leads. It never starts or stops a postmaster: the guard
//! alone does that, with the argv of [`postmaster`]. Every call is bounded in time, and dropping its future ends what it started and
//! leaves the data directory as it was (P5).
//!
//! Programs run by argv with LC_ALL=C, as the user the daemon runs as, which is the owner of the data directory.

pub mod basebackup;
pub mod configure;
pub mod conninfo;
pub mod data_directory;
pub mod files;
pub mod half_segment;
pub mod history_files;
pub mod initdb;
pub mod installation;
pub mod layout;
pub mod leader;
pub mod lost;
pub mod postmaster;
pub mod probe;
pub mod program;
pub mod quote;
pub mod rewind;
pub mod roles;
pub mod slots;
pub mod sql;
pub mod survey;
pub mod swap;
pub mod tablespaces;
pub mod unarchived;
pub mod wal;

pub use basebackup::{CloneJob, clone_from};
pub use configure::{ConfigFiles, Outcome};
pub use initdb::{InitdbJob, initdb};
pub use installation::Installation;
pub use layout::{Layout, OwnPromotionFile};
pub use leader::{LeaderFacts, LeaderServer};
pub use postmaster::{PostmasterCommand, postmaster_command, set_standby};
pub use program::Watch;
pub use rewind::RewindJob;
pub use sql::{Secret, Sql, SqlError};
pub use swap::{Keep, SwapError, recover_interrupted_swap};
