//! The records under `PREFIX/CLUSTER/` in etcd, and the view of all of them at one revision.
//!
//! Fields are only ever added, and unknown ones are ignored, so that daemons of two versions can share a cluster (SAFETY row 65).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::facts::copying::Copying;
use crate::facts::guard::Maintenance;
use crate::facts::lost::LostWrites;
use crate::facts::maintenance::MaintenanceRecord;
use crate::facts::requests::RequestKey;
use crate::facts::synchrony::SyncRecord;
use crate::types::{Epoch, EtcdClusterId, Incarnation, LeaseId, Lsn, MemberName, Revision, SystemId, TimelineId};

/// All keys of the cluster as of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterView {
    /// The etcd cluster that answered. None before the first answer.
    pub etcd_cluster: Option<EtcdClusterId>,
    /// The revision this view is of.
    pub revision: Revision,
    /// The spec as applied.
    pub spec: Option<SpecRecord>,
    /// Mod revision of `spec`; 0 when absent. Unlike the others it is never absent twice while somebody may run.
    pub spec_revision: Revision,
    /// The leader lock; None means that it was seen to be absent at `revision`.
    pub leader: Option<LeaderKey>,
    /// Present member keys.
    pub members: BTreeMap<MemberName, MemberKey>,
    /// The release record, if the last leader left in good order.
    pub release: Option<ReleaseRecord>,
    /// The leader's last published position.
    pub status: Option<StatusRecord>,
    /// Who may hold every acknowledged commit. None = nothing is promised, if `sync_revision` is 0; otherwise it could not be read.
    pub sync: Option<SyncRecord>,
    /// Mod revision of `sync`; 0 when absent.
    pub sync_revision: Revision,
    /// Who may lead while etcd is away. None = failsafe is not in force.
    pub failsafe: Option<FailsafeRecord>,
    /// Mod revision of `failsafe`; 0 when absent.
    pub failsafe_revision: Revision,
    /// The system identifier, or who is initializing.
    pub initialize: Option<Initialize>,
    /// Timeline history, oldest first.
    pub history: Vec<HistoryEntry>,
    /// Mod revision of `history`; 0 when absent. Every acquisition of the lock writes `history`, and only a leader does, so while the
    /// lock is absent this number names the vacancy for all members alike.
    pub history_revision: Revision,
    /// Set by pause; gone when a resume has been heard of by all who have to.
    pub maintenance: Option<MaintenanceRecord>,
    /// Mod revision of `maintenance`; 0 when absent.
    pub maintenance_revision: Revision,
    /// `maintenance/NAME`: members whose guards may have suspended the deadlines of the lock.
    pub suspended: BTreeSet<MemberName>,
    /// What operators asked for.
    pub requests: BTreeMap<String, RequestKey>,
    /// Keys that are there and could not be read, without the prefix, and why. They are absent above. Nobody may run while `history` is
    /// in here: an unreadable history is not an empty one.
    pub unreadable: BTreeMap<String, String>,
}

impl ClusterView {
    /// Whether the claim to initialize is on this lease.
    pub fn is_claimed_on(&self, lease: LeaseId) -> bool {
        matches!(&self.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease)
    }

    /// Whether `history` names this leadership by its epoch.
    pub fn has_recorded(&self, epoch: Epoch) -> bool {
        self.history.iter().any(|entry| entry.is_of(epoch))
    }

    /// The farthest WAL position that the leader is known to have written: from `status`, or from its member key. None = unknown.
    pub fn leader_position(&self) -> Option<Lsn> {
        let by_status = self.status.as_ref().map(|status| status.lsn);
        by_status.max(self.leader_member().and_then(|(_, key)| key.record.receive_lsn))
    }

    /// The member that holds the lock, and its key. None also when the holder has none.
    pub fn leader_member(&self) -> Option<(&MemberName, &MemberKey)> {
        let holder = self.leader.as_ref()?.holder.as_str();
        self.members.iter().find(|(name, _)| name.as_str() == holder)
    }
}

/// `spec`: what was applied, as typed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecRecord {
    /// Counts applies, from 1.
    pub generation: u64,
    /// The YAML document as typed.
    pub document: String,
    /// Who applied it (`user@host`).
    pub by: String,
    /// When, in wall-clock RFC 3339: for people only.
    pub at: String,
}

/// `leader`: the member's name as plain text, on the member's lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderKey {
    /// The value as found. A name that no member can have is kept: it is somebody's lock all the same.
    pub holder: String,
    /// The key's create revision.
    pub epoch: Epoch,
    /// The lease it hangs on; 0 when it was written without one.
    pub lease: LeaseId,
    /// When it was last written: what was judged on an earlier one, and compares it, is not carried out any more.
    pub mod_revision: Revision,
}

/// A member key and what etcd knows about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberKey {
    /// What the member says of itself.
    pub record: MemberRecord,
    /// The lease it hangs on.
    pub lease: LeaseId,
    /// When it was last written.
    pub mod_revision: Revision,
}

impl MemberKey {
    /// The member says that there is something in its data directory.
    pub fn has_data(&self) -> bool {
        self.record.data_directory == DataDirectoryReport::Full
    }

    /// The member says that its daemon knows this rule (SAFETY row 65: no rule is in force before all members say so).
    pub fn knows(&self, feature: &str) -> bool {
        self.record.features.iter().any(|known| known == feature)
    }
}

/// `members/NAME`: what a member says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Which run of the daemon wrote this.
    pub incarnation: Incarnation,
    /// What its PostgreSQL is.
    pub role: MemberRole,
    /// Patroni's word for the state: `running`, `streaming`, `starting`, `stopping`, `stopped`, `creating replica`, `crashed` …
    pub state: String,
    /// The leaf state of the member's machine: `following`, `primary` …
    pub machine_state: String,
    /// The timeline its PostgreSQL is on.
    pub timeline: Option<TimelineId>,
    /// WAL received and flushed to disk (standby), or written (primary).
    pub receive_lsn: Option<Lsn>,
    /// WAL replayed (standby).
    pub replay_lsn: Option<Lsn>,
    /// From its control file.
    pub system_id: Option<SystemId>,
    /// Whether its data directory holds anything.
    pub data_directory: DataDirectoryReport,
    /// Its final position for the present vacancy of the lock.
    pub vote: Option<Vote>,
    /// Base address of its HTTP API: `http://10.0.12.9:8008`.
    pub api_url: String,
    /// Host that others reach its PostgreSQL at.
    pub host: String,
    /// Port of its PostgreSQL.
    pub port: u16,
    /// Versions in play.
    pub versions: Versions,
    /// The spec generation it has taken up.
    pub observed_generation: u64,
    /// Rules of the cluster that its daemon knows: a rule is in force only once all members say so (SAFETY row 65).
    #[serde(default)]
    pub features: Vec<String>,
    /// Names of parameters that wait for a restart.
    #[serde(default)]
    pub pending_restart: Vec<String>,
    /// Tags that are set, Patroni's names.
    #[serde(default)]
    pub tags: BTreeMap<String, serde_json::Value>,
    /// What is in the way of the spec on this member.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// What it had written and the cluster has not, as long as it is kept on its host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost_writes: Vec<LostWrites>,
    /// How far the copy, or the rewind, has got that is being made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copying: Option<Copying>,
    /// The newest word on maintenance mode that its guard has. None = there was none, or the guard cannot be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<Maintenance>,
}

/// What a member's PostgreSQL is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    /// Out of recovery under the lock.
    Primary,
    /// In recovery.
    Replica,
    /// No data directory yet, or nothing running.
    Uninitialized,
}

/// Whether a data directory holds anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataDirectoryReport {
    /// Absent, or present with no entry in it.
    Empty,
    /// Holds something.
    Full,
    /// Could not be read.
    Unknown,
}

/// A member's last word on how far its WAL reaches, given once it saw the lock absent and has stopped receiving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// [`ClusterView::history_revision`] of the vacancy this is for.
    pub vacancy: Revision,
    /// Timeline of the position.
    pub timeline: TimelineId,
    /// The farther of received and replayed.
    pub lsn: Lsn,
}

/// Versions of what a member runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Versions {
    /// The daemon.
    pub pgherd: String,
    /// PostgreSQL's `server_version_num` (150018, 170010), of the running server or of the binaries.
    pub postgres: Option<u32>,
    /// The guard protocol the daemon speaks.
    pub guard_protocol: u32,
}

/// Something that keeps the world from being what the spec says, or that a person should know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Condition {
    /// Stable, for programs: `clone_failed`.
    pub kind: String,
    /// `info` never makes `status --check` fail; `warning` and `error` do.
    pub severity: Severity,
    /// A sentence: what is wrong, and what to do.
    pub message: String,
}

/// How bad a condition is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is in danger.
    Info,
    /// Needs a look.
    Warning,
    /// The member cannot do its work.
    Error,
}

/// `release`: written in the transaction that deletes the lock, deleted by the one that takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    /// The leadership that ended.
    pub epoch: Epoch,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The shutdown checkpoint's position.
    pub lsn: Lsn,
    /// Who is expected to take over.
    pub to: Option<MemberName>,
    /// All whom `sync` names were seen to follow this leadership: none of them has WAL of an earlier timeline that nobody else has. A daemon that
    /// did not look says nothing of it.
    #[serde(default)]
    pub all_seen: bool,
}

/// `status`: the leader's last position, written under its epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusRecord {
    /// The leadership that wrote this.
    pub epoch: Epoch,
    /// The leader's timeline.
    pub timeline: TimelineId,
    /// The leader's write position.
    pub lsn: Lsn,
    /// Where the permanent slots of the spec are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, Lsn>,
    /// How far each standby that `sync` counts on was seen to have replayed: it has that on disk, and it is where a record ends. Never less
    /// than before, as long as it is counted on: one that has less was put back in time (SAFETY row 27).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub replayed: BTreeMap<MemberName, Lsn>,
    /// Cluster-wide conditions.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// `failsafe`: who may lead while it is there, written by the leader under its epoch. A member that is not in it never runs for the lock;
/// a leader goes on without etcd only while every other one in it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailsafeRecord {
    /// The life of the lease that the leader's lock hangs on, in seconds: how long a promise is good for.
    pub ttl_s: u64,
    /// The members, and where their HTTP APIs are.
    pub members: BTreeMap<MemberName, String>,
}

/// `initialize`: first a claim on a lease, then the system identifier for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Initialize {
    /// This member runs initdb; on its lease.
    Claimed {
        /// Who.
        by: String,
        /// On which lease.
        lease: LeaseId,
    },
    /// The cluster's identity.
    Done(SystemId),
    /// The value makes no sense: nobody initializes and nobody leads.
    Unreadable(String),
}

/// One entry of `history`: a timeline id that was reserved in the transaction that took the lock. An id is in here once, ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The reserved id.
    pub timeline: TimelineId,
    /// Who took the lock.
    pub member: MemberName,
    /// The lease the lock was taken on.
    pub lease: LeaseId,
    /// The leadership. None until its leader recorded it: then the id may or may not have been used.
    pub epoch: Option<Epoch>,
    /// The timeline it left. None until recorded.
    pub parent: Option<TimelineId>,
    /// Where it left it. None until recorded.
    pub switch_lsn: Option<Lsn>,
    /// Why there was an election: `switchover`, `the lock expired` …
    pub why: String,
    /// Wall-clock RFC 3339: for people only.
    pub at: String,
    /// Its leader lost its lease while etcd was away, went on by the promises of the others, and took the lock anew for the same
    /// timeline. None = it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued: Option<Continued>,
}

/// The latest leadership that went on with a timeline which an earlier one of the same member promoted. Who promoted it stays as it is:
/// that tells lineages apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continued {
    /// The lease the lock was taken on.
    pub lease: LeaseId,
    /// The leadership. None until its leader recorded it.
    pub epoch: Option<Epoch>,
}

impl HistoryEntry {
    /// Whether this leadership promoted the timeline, or went on with it, and has recorded that.
    pub fn is_of(&self, epoch: Epoch) -> bool {
        self.epoch == Some(epoch) || self.continued.is_some_and(|continued| continued.epoch == Some(epoch))
    }

    /// Whether the lock that was taken on this lease is for this timeline, as long as its leadership is not recorded.
    pub fn awaits(&self, member: &MemberName, lease: LeaseId) -> bool {
        let taken = match self.continued {
            Some(continued) => continued.epoch.is_none() && continued.lease == lease,
            None => self.epoch.is_none() && self.lease == lease,
        };
        taken && self.member == *member
    }
}

/// One decision, for `events/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// Wall-clock RFC 3339: for people only.
    pub at: String,
    /// Who decided.
    pub member: MemberName,
    /// Stable, for programs: `promoted`, `lock_lost`, `edge`.
    pub kind: String,
    /// A sentence.
    pub message: String,
    /// The facts it was decided on.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
}
