//! Orders that the machine gives. The shell performs a list in order and reports back as events; it decides nothing.
//!
//! Order is the safety argument: *stop writes -> see them stopped -> release the lock*, and *lock -> proof -> the guard's
//! acknowledgement -> promote*. Every [`Operation`] is idempotent: its state asks again until the result is seen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::facts::cluster::{ClusterView, FailsafeRecord, HistoryEntry, MemberRecord, ReleaseRecord, StatusRecord};
use crate::facts::failsafe::Armed;
use crate::facts::guard::{Maintenance, StartId};
use crate::facts::requests::RequestProgress;
use crate::facts::synchrony::{Names, SyncRecord};
use crate::policy::rejoin::LostRange;
use crate::policy::slots;
use crate::spec::cluster::ClusterSpec;
use crate::types::{Epoch, LeaseIdentity, LockIdentity, Lsn, MemberName, Revision, SystemId, TimelineId};

/// An order.
#[derive(Debug, Clone)]
pub enum Action {
    /// Start an operation; its end comes back as an event.
    Do(Operation),
    /// Abandon the PostgreSQL-changing operation that runs. Its child processes end; what it made so far stays beside.
    CancelJob,
    /// Tell the lease's thread.
    Lease(LeaseOrder),
    /// Tell the guard to end PostgreSQL.
    Stop(StopMode),
    /// Ask the guard to look at the process table, and to say what it sees.
    AskGuard,
    /// Tell the guard of maintenance mode. That its deadlines are suspended only after etcd has noted it ([`Operation::NoteSuspension`]).
    Maintain(Maintenance),
    /// Tell the guard that the lock is not ours any more. Only after the proof of death, or for a standby.
    ForgetLock(Epoch),
    /// Record a decision: log and `events/`.
    Record(Decision),
    /// Answer a call of a leader without etcd. What was promised is booked.
    AnswerPromise {
        /// Which call.
        id: u64,
        /// Promised, or why not.
        result: Result<(), String>,
    },
    /// Leave the process with this exit code. PostgreSQL has ended, the guard is told to end.
    Exit(u8),
    /// Leave the process; guard and PostgreSQL stay as they are.
    Leave,
}

/// What the lease's thread is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseOrder {
    /// Go on with a lease that the guard handed over.
    Adopt(LeaseIdentity, Option<LockIdentity>),
    /// Ask for a lease.
    Grant,
    /// Renew and prove at once, from now on with this lock.
    Hold(LockIdentity),
    /// The lock is not ours any more; the member key's lease goes on.
    LetGo,
    /// While etcd cannot be asked: go on with this lock if these members promise. None: rely on nobody, and say that nothing is under way.
    Failsafe(Option<Armed>),
}

/// How PostgreSQL is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// In good order, with a deadline after which it is ended hard.
    Fast {
        /// When `immediate` follows.
        patience: Duration,
    },
    /// At once: immediate stop and SIGKILL to everything.
    Kill,
}

/// Why the machine did something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Stable, for programs.
    pub kind: &'static str,
    /// A sentence.
    pub message: String,
    /// The facts it was decided on.
    pub facts: BTreeMap<String, String>,
}

impl Decision {
    /// From which state to which, if that is what was decided.
    pub fn transition(&self) -> Option<(&str, &str)> {
        let of = |key| self.facts.get(key).map(String::as_str);
        Some((of("from")?, of("to")?)).filter(|_| self.kind == "transition")
    }
}

/// Whom a standby receives from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Which member.
    pub member: MemberName,
    /// Host of its PostgreSQL.
    pub host: String,
    /// Port of its PostgreSQL.
    pub port: u16,
    /// It keeps a slot for every member.
    pub keeps_slots: bool,
}

/// What a copy takes the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// Nothing: the directory was empty when this was decided. What is in it by now was put there since, and nothing takes its place (P5).
    Empty,
    /// It may have WAL that nobody else has, such as this: it is kept whole.
    Kept(Option<LostRange>),
    /// An operator gave it up by name: it is removed once the copy is in place.
    GivenUp,
}

/// What a postmaster is started as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAs {
    /// In recovery. `None` = whom to follow is not known yet.
    Standby(Option<Upstream>),
    /// Out of recovery, under a proved lock.
    Primary,
}

/// What follows a change of synchronous_standby_names on a running server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterNames {
    /// Nothing: they let nobody go who waits, and who does not wait need not.
    Nothing,
    /// See that backends wait, too: a checkpoint shows that the checkpointer has read the names.
    Checkpoint,
    /// Commits may be waiting that these names let go. A walsender does that with its standby's next answer, and when all clients wait there
    /// is nothing to answer: a few bytes of WAL are written.
    Answers,
}

/// Something that takes time and can fail.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Read the data directory's state.
    Look,
    /// Install files, then ask the guard for a postmaster.
    Start {
        /// As what.
        role: StartAs,
        /// The spec to configure from.
        spec: Arc<ClusterSpec>,
        /// Its generation.
        generation: u64,
        /// The start before this one failed: use the files that served last.
        fall_back: bool,
        /// Whom commits wait for from the first one on.
        names: Names,
        /// Clients are kept out until they are let in ([`Operation::Open`]).
        closed: bool,
    },
    /// Let clients in, by the lines of pg_hba.conf that were closed, or else the spec's.
    Open {
        /// The spec.
        spec: Arc<ClusterSpec>,
    },
    /// Install files beside the running server, try them, reload.
    Configure {
        /// The spec to configure from.
        spec: Arc<ClusterSpec>,
        /// Its generation.
        generation: u64,
        /// Whom to follow while in recovery.
        upstream: Option<Upstream>,
        /// Somebody asked for it: read the secrets again too, and look for errors also where nothing changed.
        anew: bool,
    },
    /// Run initdb beside and move it in.
    Initdb {
        /// Options come from here.
        spec: Arc<ClusterSpec>,
    },
    /// Copy the leader, or a standby of it, beside and swap it in.
    Clone {
        /// From whom.
        from: Upstream,
        /// Who leads: what is copied has to be of its lineage.
        leader: Upstream,
        /// Options come from here.
        spec: Arc<ClusterSpec>,
        /// What the copy takes the place of.
        old: Old,
    },
    /// Empty a data directory that an operator gave up by name, so that there is room for a copy. Half of it is never started.
    EmptyDirectory {
        /// Who is to be copied: asked first whether it can be.
        leader: Upstream,
    },
    /// Keep the WAL that the leader does not have, then rewind to the leader, behind a marker.
    Rewind {
        /// To whom.
        from: Upstream,
        /// Options come from here.
        spec: Arc<ClusterSpec>,
        /// Why.
        why: String,
        /// What is lost by it.
        lost: LostRange,
        /// Timelines with their leaderships, as etcd says.
        history: Vec<HistoryEntry>,
    },
    /// Judge how to get back behind the leader.
    PlanRejoin {
        /// Behind whom.
        leader: Upstream,
        /// Spec, for addresses and users.
        spec: Arc<ClusterSpec>,
        /// The leader's timeline, as its member key says.
        leader_timeline: TimelineId,
        /// Timelines with their leaderships, as etcd says.
        history: Vec<HistoryEntry>,
        /// How often a rewind failed in a row.
        rewinds_failed: u32,
        /// How often PostgreSQL ended by itself in a row, as a standby.
        starts_in_vain: u32,
    },
    /// Archive what this member wrote as a primary and its archiver did not get to, as far as the leader has it too; put beside what cannot
    /// be archived in a moment.
    ArchiveLeft {
        /// Whose history says what belongs into the archive.
        leader: Upstream,
        /// The archive_command.
        spec: Arc<ClusterSpec>,
        /// How far the leader has what this member has; None = all of it.
        shared: Option<Lsn>,
    },
    /// Archive what was put beside.
    ArchiveBeside {
        /// The archive_command.
        spec: Arc<ClusterSpec>,
    },
    /// Have the guard acknowledge "writable until E", lay reserved history files, note the promotion on disk, promote.
    Promote {
        /// Under which lock.
        lock: LockIdentity,
        /// The id reserved for it.
        timeline: TimelineId,
        /// The timeline it leaves.
        parent: TimelineId,
    },
    /// See to pgherd's roles, and once to post_init.
    EnsureRoles {
        /// The spec.
        spec: Arc<ClusterSpec>,
        /// Run `bootstrap.post_init` too.
        post_init: bool,
    },
    /// CHECKPOINT, so that the stop that follows is short.
    Checkpoint,
    /// Write the member key.
    PutMember(Box<MemberRecord>),
    /// Race for the lock.
    Acquire {
        /// The view that eligibility was judged on.
        judged_on: Arc<ClusterView>,
        /// `history` with the reserved id.
        history: Vec<HistoryEntry>,
        /// The cluster's identity, if the lock is the first one.
        initialize: Option<SystemId>,
    },
    /// Delete the lock, with a record if PostgreSQL was stopped in good order.
    Release {
        /// Which leadership ends.
        epoch: Epoch,
        /// How far it got, and who is expected.
        record: Option<ReleaseRecord>,
    },
    /// Write the lock's key again as it is: a release that may still be on its way to etcd then deletes nothing.
    Reaffirm(Epoch),
    /// Set synchronous_standby_names on the running server, and see that a new session has them: then every process was told.
    SetNames {
        /// Of which postmaster.
        start: StartId,
        /// What to set.
        names: Names,
        /// The spec, for its slots.
        spec: Arc<ClusterSpec>,
        /// What follows at once.
        then: AfterNames,
    },
    /// Make, move on and drop replication slots.
    KeepSlots(Vec<slots::Change>),
    /// Write `sync` under our epoch, over what was judged on.
    WriteSync {
        /// Under which leadership.
        epoch: Epoch,
        /// The mod revision of the lock's key that was judged on: late, after it was written again, nothing is written.
        lock: Revision,
        /// The key's mod revision that was judged on; 0 = it is absent.
        judged_on: Revision,
        /// What to write; None = delete it.
        record: Option<SyncRecord>,
    },
    /// Write `status`.
    WriteStatus(StatusRecord),
    /// Complete `history` under our epoch.
    RecordPromotion {
        /// Under which leadership.
        epoch: Epoch,
        /// The whole of `history`.
        history: Vec<HistoryEntry>,
    },
    /// Write `failsafe` under our epoch, over what was judged on.
    WriteFailsafe {
        /// Under which leadership.
        epoch: Epoch,
        /// The key's mod revision that was judged on; 0 = it is absent.
        judged_on: Revision,
        /// What to write; None = delete it.
        record: Option<FailsafeRecord>,
    },
    /// Say in etcd, in maintenance mode as it was seen, that our guard may suspend the lock's deadlines (true), or that it does not any more.
    NoteSuspension {
        /// The mod revision of `maintenance` that was seen.
        revision: Revision,
        /// Which of both.
        suspends: bool,
    },
    /// Delete `maintenance` as it was seen: all who have to have heard that it is over.
    EndMaintenance {
        /// Its mod revision.
        revision: Revision,
        /// That of `leader`; 0 = nobody holds the lock.
        leader: Revision,
    },
    /// Claim the right to run initdb.
    ClaimInitialize,
    /// Give it back.
    GiveUpInitialize,
    /// Say how far a request got.
    AnswerRequest {
        /// Which.
        id: String,
        /// Compare.
        mod_revision: Revision,
        /// And swap.
        progress: RequestProgress,
    },
    /// Ask PostgreSQL what a stop would cut off.
    Survey,
    /// Ask every other declared member whether it is writable.
    AskPeers {
        /// The vacancy it is asked for.
        vacancy: Revision,
        /// Their HTTP addresses.
        peers: Vec<(MemberName, String)>,
    },
    /// Ask the leader's server whether it takes our connections.
    ReachLeader(Upstream),
    /// The guard is gone or silent: end all PostgreSQL processes ourselves, then start a new guard.
    FenceByScan,
}

/// Kinds of operation: one of a kind runs at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum OperationKind {
    Look,
    Start,
    Open,
    Configure,
    Initdb,
    Clone,
    EmptyDirectory,
    Rewind,
    PlanRejoin,
    ArchiveLeft,
    ArchiveBeside,
    Promote,
    SetNames,
    KeepSlots,
    EnsureRoles,
    Checkpoint,
    PutMember,
    Acquire,
    Release,
    Reaffirm,
    WriteSync,
    WriteStatus,
    RecordPromotion,
    WriteFailsafe,
    NoteSuspension,
    EndMaintenance,
    ClaimInitialize,
    GiveUpInitialize,
    AnswerRequest,
    Survey,
    AskPeers,
    ReachLeader,
    FenceByScan,
}

impl Operation {
    /// Its kind.
    pub fn kind(&self) -> OperationKind {
        match self {
            Operation::Look => OperationKind::Look,
            Operation::Start { .. } => OperationKind::Start,
            Operation::Open { .. } => OperationKind::Open,
            Operation::Configure { .. } => OperationKind::Configure,
            Operation::Initdb { .. } => OperationKind::Initdb,
            Operation::Clone { .. } => OperationKind::Clone,
            Operation::EmptyDirectory { .. } => OperationKind::EmptyDirectory,
            Operation::Rewind { .. } => OperationKind::Rewind,
            Operation::PlanRejoin { .. } => OperationKind::PlanRejoin,
            Operation::ArchiveLeft { .. } => OperationKind::ArchiveLeft,
            Operation::ArchiveBeside { .. } => OperationKind::ArchiveBeside,
            Operation::Promote { .. } => OperationKind::Promote,
            Operation::SetNames { .. } => OperationKind::SetNames,
            Operation::KeepSlots(_) => OperationKind::KeepSlots,
            Operation::EnsureRoles { .. } => OperationKind::EnsureRoles,
            Operation::Checkpoint => OperationKind::Checkpoint,
            Operation::PutMember(_) => OperationKind::PutMember,
            Operation::Acquire { .. } => OperationKind::Acquire,
            Operation::Release { .. } => OperationKind::Release,
            Operation::Reaffirm(_) => OperationKind::Reaffirm,
            Operation::WriteSync { .. } => OperationKind::WriteSync,
            Operation::WriteStatus(_) => OperationKind::WriteStatus,
            Operation::RecordPromotion { .. } => OperationKind::RecordPromotion,
            Operation::WriteFailsafe { .. } => OperationKind::WriteFailsafe,
            Operation::NoteSuspension { .. } => OperationKind::NoteSuspension,
            Operation::EndMaintenance { .. } => OperationKind::EndMaintenance,
            Operation::ClaimInitialize => OperationKind::ClaimInitialize,
            Operation::GiveUpInitialize => OperationKind::GiveUpInitialize,
            Operation::AnswerRequest { .. } => OperationKind::AnswerRequest,
            Operation::Survey => OperationKind::Survey,
            Operation::AskPeers { .. } => OperationKind::AskPeers,
            Operation::ReachLeader(_) => OperationKind::ReachLeader,
            Operation::FenceByScan => OperationKind::FenceByScan,
        }
    }
}

impl OperationKind {
    /// Works on PostgreSQL or its files. One such operation runs at a time, as a job that can be cancelled.
    pub fn is_job(self) -> bool {
        use OperationKind::*;
        match self {
            Look | Start | Open | Configure | Initdb | Clone | EmptyDirectory | Rewind | PlanRejoin | ArchiveLeft | Promote | SetNames
            | KeepSlots | EnsureRoles | Checkpoint => true,
            PutMember | Acquire | Release | Reaffirm | WriteSync | WriteStatus | RecordPromotion | WriteFailsafe | NoteSuspension
            | EndMaintenance | ClaimInitialize | GiveUpInitialize | AnswerRequest | Survey | AskPeers | ReachLeader | ArchiveBeside
            | FenceByScan => false,
        }
    }
}
