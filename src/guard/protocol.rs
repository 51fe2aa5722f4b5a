//! What daemon and guard say to each other: one JSON object a line, over the Unix stream socket `RUN_DIR/guard.sock`.
//!
//! Every request is answered by exactly one line, in order; a connection that subscribed gets a further line at each change. Only the
//! same user and root may connect (SO_PEERCRED).
//!
//! The rule that would surprise: `Hello`, `Upgrade` and the answers to them never change their shape. A daemon of another version can
//! ask nothing else, and they are how the versions come together again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::facts::guard::{GuardFacts, Maintenance, StartId, Word};
use crate::policy::deadlines::LeaseTimes;
use crate::types::{Epoch, LeaseIdentity, LockIdentity};

/// Version of everything below but the two frozen requests. Daemon and guard work together only if theirs are equal.
pub const PROTOCOL_VERSION: u32 = 2;
/// Name of the socket in the run directory.
pub const SOCKET_NAME: &str = "guard.sock";
/// Longest line in either direction: a start order carries an environment and a command line.
pub const MESSAGE_MAX_BYTES: usize = 64 * 1024;

/// What the daemon asks. See [`crate::guard`] for who may do what when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// First on every connection. Frozen shape. Answered by [`Response::Hello`].
    Hello {
        /// [`PROTOCOL_VERSION`] of the caller.
        version: u32,
        /// The caller is the daemon: the guard watches its process and counts its ends. Any number of connections of ONE process may
        /// say so. Without it a connection may look (`facts`, `subscribe`) and say `clear`, nothing else.
        owner: bool,
    },
    /// Spawn a postmaster. Refused while any process of PostgreSQL is in the data directory, and for a writable one unless the lock is
    /// held and now < A. Answered once the process exists; if it cannot be executed, it ends with status 127 and a condition says why.
    Start(StartOrder),
    /// Take charge of a postmaster that runs already and is not the guard's child. A writable one without a lock is killed at once.
    Adopt {
        /// The data directory, canonical.
        data_dir: PathBuf,
        /// Its pid, from postmaster.pid; checked against the process table.
        pid: i32,
        /// What the daemon saw it to be.
        word: Word,
    },
    /// The daemon's word for this start. Standby to writable: asked, and acknowledged, BEFORE promote; needs the lock and now < A.
    /// Writable to standby is refused: a server that was to be promoted may come out of recovery at any time until it has ended, so
    /// that word can only be given with a new start.
    Vouch {
        /// Which start.
        start: StartId,
        /// What it is or is about to be.
        word: Word,
    },
    /// Remember the daemon's lease (also without the lock), for the next daemon.
    Lease {
        /// None forgets it.
        identity: Option<LeaseIdentity>,
    },
    /// The lock was proved by a keepalive sent at `sent`.
    ///
    /// Same identity: deadlines move only forward. Another lease under the same epoch: the EARLIER of both deadlines until the next
    /// proof, so the daemon says this before the transaction that moves the key to its new lease. A later epoch replaces everything.
    /// Once the fast stop has begun it is recorded and yet refused with [`Refusal::LadderRuns`]: PostgreSQL is going to end, and can
    /// be started again under this lock.
    Lock {
        /// Which leadership.
        identity: LockIdentity,
        /// Send time of the keepalive (or, in failsafe, of the earliest call).
        sent: BootTime,
        /// Of that lease.
        times: LeaseTimes,
    },
    /// The lock is not held any more, or about to be released. Refused while a writable PostgreSQL is not proved dead: whoever gets
    /// `done` may release (I2). Done as well when no lock, or one of another epoch, is known.
    NoLock {
        /// Which leadership.
        epoch: Epoch,
    },
    /// End PostgreSQL, rung by rung, each at its time. A lock's own ladder still applies: the earlier time wins.
    Stop(StopOrder),
    /// The facts, after a new look at the process table when no postmaster is kept.
    Facts,
    /// This connection gets [`Response::Changed`] at each change from now on. A subscriber that does not read is dropped.
    Subscribe,
    /// The daemon is about to end in good order: its end is not a crash.
    Bye {
        /// Why; logged.
        reason: ByeReason,
    },
    /// Forget the daemon's crashes.
    Clear,
    /// Maintenance mode is on, or over: see [`Maintenance`]. Said of every revision of etcd's key, also to a guard that suspends nothing:
    /// so no earlier word can come after it. Refused with [`Refusal::StaleMaintenance`] when it is the earlier one.
    Maintain(Maintenance),
    /// Replace the guard's program in place; postmaster, lock and deadlines stay. Frozen shape. Answered by the new program with
    /// [`Response::Hello`]; all other connections are closed.
    Upgrade {
        /// The new `pgherd-guard`, absolute.
        binary: PathBuf,
    },
    /// End the guard. Refused unless it is proved that no process of PostgreSQL is left.
    Shutdown,
}

/// How to start a postmaster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartOrder {
    /// The `postgres` binary, absolute.
    pub program: PathBuf,
    /// Its arguments, without argv\[0\].
    pub arguments: Vec<String>,
    /// The data directory, canonical (no symbolic link in it): compared with each process's working directory as text.
    pub data_dir: PathBuf,
    /// Its whole environment: nothing is inherited.
    pub environment: BTreeMap<String, String>,
    /// What it will be.
    pub word: Word,
    /// Standard output and error are appended to this file; None = the guard's own standard error. Never a pipe that ends in the daemon.
    pub stderr: Option<PathBuf>,
}

/// When each rung is to be climbed at the latest; None = not by this order. A time in the past means now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StopOrder {
    /// SIGINT to the postmaster.
    pub fast_at: Option<BootTime>,
    /// SIGQUIT to the postmaster.
    pub immediate_at: Option<BootTime>,
    /// SIGKILL to every process.
    pub kill_at: Option<BootTime>,
}

impl StopOrder {
    /// A planned stop: fast now, immediate and kill when that takes too long.
    pub fn planned(now: BootTime, immediate_at: BootTime, kill_at: BootTime) -> Self {
        Self { fast_at: Some(now), immediate_at: Some(immediate_at), kill_at: Some(kill_at) }
    }

    /// The lock is lost: immediate stop and SIGKILL at once.
    pub fn at_once(now: BootTime) -> Self {
        Self { fast_at: None, immediate_at: Some(now), kill_at: Some(now) }
    }
}

/// Why a daemon ends in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ByeReason {
    /// SIGUSR2: guard and PostgreSQL stay.
    Leaving,
    /// SIGTERM: PostgreSQL was stopped.
    Stopping,
}

/// What the guard answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Response {
    /// To `hello` and `upgrade`. Frozen shape: another version's facts may not be readable.
    Hello {
        /// [`PROTOCOL_VERSION`] of the guard.
        version: u32,
    },
    /// Done, and the facts after it.
    Done {
        /// The whole state.
        facts: Box<GuardFacts>,
    },
    /// Not done.
    Refused {
        /// For programs.
        reason: Refusal,
        /// For people: what was expected and what to do.
        message: String,
        /// The whole state.
        facts: Box<GuardFacts>,
    },
    /// To a subscriber, unasked.
    Changed {
        /// The whole state.
        facts: Box<GuardFacts>,
    },
}

/// Why the guard refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The caller speaks another version, or has not said hello, or is not the owner.
    NotYours,
    /// Another daemon is the owner and alive.
    Owned,
    /// Three daemons ended by a signal within 60 s: none is accepted until `clear`.
    CrashLoop,
    /// A process of PostgreSQL is in the data directory, or was not proved gone.
    NotEmpty,
    /// No such start runs.
    NoSuchStart,
    /// No lock is known, or now >= A.
    NoLock,
    /// The lock is of an earlier epoch, or of another etcd cluster, than the one that is known.
    StaleLock,
    /// The fast stop has begun: the ladder runs to the proof of death.
    LadderRuns,
    /// A start that was vouched for as writable cannot become a standby.
    OnceWritable,
    /// Nothing begins to write in maintenance mode.
    Maintenance,
    /// A later word on maintenance mode is known.
    StaleMaintenance,
    /// The request makes no sense: a sentence says why.
    Invalid,
    /// The system refused: a sentence says what.
    Failed,
}
