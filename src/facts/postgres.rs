//! What was seen of this host's PostgreSQL: the data directory at rest, and the server through SQL.

use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::types::{Epoch, Lsn, SystemId, TimelineId};

/// The data directory as last looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DataDirectory {
    /// Not looked at, or the look failed.
    #[default]
    Unknown,
    /// Absent, or there with no entry in it.
    Empty,
    /// A PostgreSQL data directory whose control file could be read and whose checksum is right.
    Full(ControlFacts),
    /// Something is in it that pgherd cannot call a data directory, or it must not be used: a sentence says what.
    Unusable(String),
    /// A rewind was begun on it and is not known to have ended: it is neither what it was nor what it is to be, and is never started.
    HalfRewound(Box<RewindAttempt>),
}

/// WAL that this member has and the leader does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRange {
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// From where.
    pub from: Lsn,
    /// To where at least; None when it could not be read.
    pub to: Option<Lsn>,
}

/// A WAL segment that a timeline begins in and that was received in part, so that PostgreSQL cannot read it up to where the timeline begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HalfSegment {
    /// The file.
    pub file: String,
    /// Its timeline.
    pub timeline: TimelineId,
    /// From where on it lacks something.
    pub missing: Lsn,
    /// Where the timeline begins.
    pub switch: Lsn,
    /// The file of the timeline before, which it is completed from.
    pub older: String,
    /// Why it is not; None = it was, or can be.
    pub obstacle: Option<String>,
}

impl HalfSegment {
    /// What is wrong with it.
    pub fn sentence(&self) -> String {
        let Self { file, timeline, missing, switch, .. } = self;
        format!(
            "the WAL segment {file}, in which timeline {timeline} begins at {switch}, was received in part: it lacks what is at {missing}"
        )
    }
}

/// The marker of a rewind under way, written before pg_rewind touches anything and removed when all of it is done (Patroni #2302).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindAttempt {
    /// Why it is rewound.
    pub why: String,
    /// What it has and the leader does not.
    pub lost: LostRange,
    /// Database system identifier.
    pub system_id: SystemId,
    /// How often pg_rewind was started on it.
    pub attempts: u32,
    /// The timeline of the leader that it is rewound to.
    pub leader_timeline: TimelineId,
    /// The leadership that promoted that timeline, if etcd's history said it.
    pub promoted_under: Option<Epoch>,
    /// The boot of this host: with the next one, what was written and not synced is gone.
    pub boot_id: String,
    /// The latest checkpoint as it was before: pg_rewind replaces the control file last.
    pub checkpoint: Lsn,
    /// Where the WAL that is lost is kept.
    pub kept: String,
    /// pg_rewind has ended well, and all that it wrote is on disk. What is left to do may be done again.
    #[serde(default)]
    pub finished: bool,
}

/// What pg_control says (server not running, or its last checkpoint).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFacts {
    /// Database system identifier.
    pub system_id: SystemId,
    /// Major version, from PG_VERSION.
    pub major_version: u32,
    /// Cluster state.
    pub state: DatabaseState,
    /// Location of the latest checkpoint record.
    pub checkpoint: Lsn,
    /// Timeline of the latest checkpoint.
    pub timeline: TimelineId,
    /// Least position recovery must reach, and its timeline; zero when not in recovery.
    pub min_recovery_end: Lsn,
    /// Timeline of `min_recovery_end`.
    pub min_recovery_timeline: TimelineId,
    /// Whether data checksums are on.
    pub data_checksums: bool,
    /// wal_log_hints at the last start.
    pub wal_log_hints: bool,
    /// Settings a standby must not be below.
    pub floor: StandbyFloor,
    /// Whether `standby.signal` is there.
    pub standby_signal: bool,
    /// Whether `backup_label` is there.
    pub backup_label: bool,
    /// The timeline that this data directory was promoted to last, and under which leadership ([`Epoch::BY_HAND`] under none). None = no
    /// promotion of it is on record.
    pub promoted: Option<(TimelineId, Epoch)>,
    /// Files of pg_wal that are marked as ready for the archive, or lost that mark.
    pub unarchived: usize,
}

/// Settings that must never be lower on a standby than on its primary (PostgreSQL manual, "Hot Standby: Administrator's Overview").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StandbyFloor {
    /// max_connections.
    pub max_connections: u32,
    /// max_worker_processes.
    pub max_worker_processes: u32,
    /// max_wal_senders.
    pub max_wal_senders: u32,
    /// max_prepared_transactions.
    pub max_prepared_transactions: u32,
    /// max_locks_per_transaction.
    pub max_locks_per_transaction: u32,
}

/// `Database cluster state` in pg_control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatabaseState {
    /// "starting up".
    StartingUp,
    /// "shut down": in good order, as a primary.
    ShutDown,
    /// "shut down in recovery".
    ShutDownInRecovery,
    /// "shutting down".
    ShuttingDown,
    /// "in crash recovery".
    InCrashRecovery,
    /// "in archive recovery": a standby, running or not stopped in good order.
    InArchiveRecovery,
    /// "in production": a primary, running or not stopped in good order.
    InProduction,
}

/// One probe of the running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// When the probe was begun: what it saw was true at or after this.
    pub begun: BootTime,
    /// What it saw.
    pub outcome: ProbeOutcome,
}

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// Connected and asked.
    Accepting(Box<SqlFacts>),
    /// The server answered that it does not take connections yet or any more (SQLSTATE 57P03).
    NotYet(String),
    /// No answer, or one that makes no sense. Nothing is known.
    Unknown(String),
}

/// PostgreSQL's word, in pg_stat_wal_receiver and pg_stat_replication, for a stream that goes on; Patroni's for a standby that has one.
pub const STREAMING: &str = "streaming";

/// What the server said over SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlFacts {
    /// `pg_is_in_recovery()`.
    pub in_recovery: bool,
    /// Current timeline: of the insert position out of recovery, of what is received or replayed in recovery.
    pub timeline: TimelineId,
    /// Out of recovery: write position. In recovery: received and flushed; zero when nothing was received since the start.
    pub receive_lsn: Lsn,
    /// In recovery: replayed. Out of recovery: the write position.
    pub replay_lsn: Lsn,
    /// In recovery: which process replays. PostgreSQL begins anew by itself, under the same postmaster, when one of its processes crashes.
    pub startup: String,
    /// In recovery: replay waits for more, having gone through all that is there.
    pub replayed_all: bool,
    /// A walreceiver is there, connected or not yet.
    pub receives: bool,
    /// Replay is paused, or asked to pause.
    pub replay_paused: bool,
    /// The walreceiver, in recovery.
    pub walreceiver: Option<WalReceiverFacts>,
    /// pg_stat_replication, out of recovery.
    pub replicas: Vec<ReplicaFacts>,
    /// The write position, asked for after pg_stat_replication; zero in recovery.
    pub written_by_then: Lsn,
    /// synchronous_standby_names, as a session that was connected reads it.
    pub synchronous_standby_names: String,
    /// Roles and databases whose synchronous_commit is below `on`: their commits wait for no standby to flush.
    pub lowered: Vec<String>,
    /// pg_replication_slots.
    pub slots: Vec<SlotFacts>,
    /// Names of parameters that wait for a restart.
    pub pending_restart: Vec<String>,
    /// Settings that are off and without which this data directory could not be rewound.
    pub no_rewind: Vec<String>,
    /// The postmaster was told to stop, by whomever: no session begins any more, and with `smart` those that are there may stay for ever.
    pub stopping: bool,
    /// `server_version_num`.
    pub server_version_num: u32,
    /// `pg_postmaster_start_time()` as text, for Patroni's status.
    pub postmaster_start_time: String,
    /// From pg_control_system().
    pub system_id: SystemId,
}

impl SqlFacts {
    /// How far this server's WAL reaches.
    pub fn end_of_wal(&self) -> Lsn {
        self.receive_lsn.max(self.replay_lsn)
    }

    /// Its walreceiver streams.
    pub fn streams(&self) -> bool {
        self.walreceiver.as_ref().is_some_and(|receiver| receiver.status == STREAMING)
    }
}

/// pg_stat_wal_receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalReceiverFacts {
    /// `streaming`, `waiting` …
    pub status: String,
    /// Host it receives from.
    pub sender_host: Option<String>,
    /// Port it receives from.
    pub sender_port: Option<u16>,
    /// The sender's last known end of WAL.
    pub latest_end_lsn: Option<Lsn>,
}

/// One row of pg_replication_slots; what a version does not have is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotFacts {
    /// Its name.
    pub name: String,
    /// Physical otherwise.
    pub logical: bool,
    /// Somebody streams by it.
    pub active: bool,
    /// It keeps WAL from there on; None = none yet, or none any more.
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// PostgreSQL made it as a copy of the primary's, and keeps it that.
    pub synced: bool,
    /// Bytes that may still be written before it is lost; None = no limit (max_slot_wal_keep_size).
    pub safe_wal_size: Option<i64>,
}

impl SlotFacts {
    /// What it was to keep is gone.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost")
    }
}

/// One row of pg_stat_replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaFacts {
    /// The standby's name.
    pub application_name: String,
    /// `streaming`, `catchup`, `backup` …
    pub state: String,
    /// Client address.
    pub client_addr: Option<String>,
    /// Sent to the standby. A walsender that sends a timeline which this server has left shows no more than where it left it.
    #[serde(default)]
    pub sent_lsn: Option<Lsn>,
    /// Flushed by the standby.
    pub flush_lsn: Option<Lsn>,
    /// Replayed by the standby.
    pub replay_lsn: Option<Lsn>,
    /// `async`, `sync`, `quorum`, `potential`: what the session that asked makes of it.
    pub sync_state: String,
    /// What the walsender itself made of synchronous_standby_names when it read them last. 0 = it releases nobody.
    #[serde(default)]
    pub sync_priority: u32,
}

impl ReplicaFacts {
    /// It streams: it has caught up, and is no copy in the making.
    pub fn streams(&self) -> bool {
        self.state == STREAMING
    }
}

/// What is under way on a primary, for whoever wants to stop it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// The longest open transactions.
    pub transactions: Vec<OpenTransaction>,
    /// Base backups that are being taken, each with who takes it.
    pub base_backups: Vec<String>,
    /// None = WAL is not archived.
    pub archiver: Option<Archiver>,
}

/// A transaction that a stop would roll back.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct OpenTransaction {
    /// Of its session.
    pub pid: i32,
    /// Of its client.
    pub application_name: String,
    /// `active`, `idle in transaction` …
    pub state: String,
    /// For how long it has been open.
    pub seconds: i64,
}

/// pg_stat_archiver, and what it has before it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Archiver {
    /// Its last attempt failed.
    pub failing: bool,
    /// Segments that wait.
    pub ready: u64,
}
