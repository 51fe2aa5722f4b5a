//! What the guard says of itself and of the postmaster it keeps.

use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::types::{LeaseIdentity, LockIdentity, Revision};

/// Counts the starts of a postmaster under one guard. The daemon's word that a server is a standby holds for one start only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StartId(pub u64);

/// The guard's whole state, as it tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardFacts {
    /// Grows with every change.
    pub sequence: u64,
    /// The guard's pid.
    pub pid: i32,
    /// The postmaster and its processes.
    pub postmaster: PostmasterFacts,
    /// The daemon's lease, handed to the next daemon; also without the lock.
    pub lease: Option<LeaseIdentity>,
    /// The lock, while the daemon says it is held.
    pub lock: Option<LockFacts>,
    /// Daemon ends by signal within the last 60 s (SAFETY row 5).
    pub daemon_crashes: u32,
    /// Three daemons crashed within 60 s: a writable PostgreSQL was stopped, and no daemon is accepted until `clear`.
    #[serde(default)]
    pub crash_loop: bool,
    /// The newest word on maintenance mode.
    #[serde(default)]
    pub maintenance: Maintenance,
    /// What is less than it should be (memory not locked, OOM score not reset, a program that could not be executed): one sentence each.
    #[serde(default)]
    pub conditions: Vec<String>,
}

/// Maintenance mode as the daemon said it: while it is on, no deadline of a lock ends PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Maintenance {
    /// The revision of etcd's key that the word is of: an earlier one that comes late changes nothing.
    pub revision: Revision,
    /// Whether deadlines are suspended.
    pub suspends: bool,
}

/// The lock as the guard knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockFacts {
    /// Which leadership.
    pub identity: LockIdentity,
    /// E: until when it is proved.
    pub valid_until: BootTime,
    /// A: when the ladder begins.
    pub announce_at: BootTime,
}

/// The postmaster and every process that could still acknowledge a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PostmasterFacts {
    /// None, and proved so: no process of PostgreSQL is left in the data directory.
    ProvedEmpty {
        /// The start that ended last, and how; None when none was started under this guard.
        last: Option<LastEnd>,
    },
    /// Processes of PostgreSQL are in the data directory that the guard neither started nor was told to adopt.
    Unclaimed {
        /// As last seen.
        pids: Vec<i32>,
    },
    /// Runs.
    Running {
        /// Which start.
        start: StartId,
        /// Its pid.
        pid: i32,
        /// The daemon's word for this start.
        word: Word,
        /// Whether the guard found it instead of starting it.
        adopted: bool,
    },
    /// Is being ended, or has ended and processes of it are still there.
    Ending {
        /// Which start.
        start: StartId,
        /// How hard.
        rung: Rung,
        /// The daemon's word for this start. A guard of an earlier version does not say it.
        #[serde(default = "may_write")]
        word: Word,
    },
}

/// What is assumed of a start that nobody vouches for.
fn may_write() -> Word {
    Word::Writable
}

/// How a postmaster ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastEnd {
    /// Which start.
    pub start: StartId,
    /// Its exit status; None when it was ended by a signal or was not the guard's child.
    pub exit_status: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The highest rung the guard climbed on it; None = it ended by itself.
    pub rung: Option<Rung>,
    /// When it was proved empty.
    pub at: BootTime,
}

/// What the daemon vouches for, for one start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// It is a standby: it cannot acknowledge, and needs no deadline.
    Standby,
    /// It may write while the lock is proved: fenced by the ladder.
    Writable,
}

/// Rungs of the demotion ladder, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// Leader paths answer 503; PostgreSQL is untouched.
    Announce,
    /// SIGINT to the postmaster.
    FastStop,
    /// SIGQUIT to the postmaster.
    ImmediateStop,
    /// SIGKILL to every process.
    KillAll,
}
