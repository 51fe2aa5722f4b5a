//! What can happen to a member. Every event carries facts, never an order on how to react: the reaction is the machine's.
//!
//! An operation that failed reports a sentence and leaves "unknown" behind; it never reports the old value.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::archiving::{Archived, Unarchived};
use crate::facts::cluster::ClusterView;
use crate::facts::copying::Bytes;
use crate::facts::failsafe::PromiseAsk;
use crate::facts::guard::{GuardFacts, StartId};
use crate::facts::lease::LeaseEvent;
use crate::facts::lost::LostWrites;
use crate::facts::postgres::{DataDirectory, HalfSegment, Probe, Survey};
use crate::policy::rejoin::Rejoin;
use crate::spec::cluster::ClusterSpec;
use crate::types::{LeaseId, LockIdentity, MemberName, Revision};

use super::action::{OperationKind, Upstream};

/// What the peers said about a vacancy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeersAnswer {
    /// Which vacancy.
    pub vacancy: Revision,
    /// When they were asked.
    pub sent: BootTime,
    /// Who is, or may be, writable.
    pub writable: Vec<MemberName>,
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Time went by.
    Tick,
    /// This host's wall clock, in seconds since 1970. For what is scheduled, and for nothing else (SAFETY row 23).
    WallClock(u64),
    /// A document was found in etcd and understood.
    SpecRead(u64, Arc<ClusterSpec>),
    /// A document was found in etcd and means nothing: the last good one stays in force.
    SpecUnreadable(u64, String),
    /// etcd's keys at a revision.
    View(Arc<ClusterView>, BootTime),
    /// etcd cannot be asked.
    EtcdUnreachable(String),
    /// etcd answers, but as another cluster or from an older state than was seen before (SAFETY row 43).
    EtcdSuspicious(String),
    /// From the lease's own thread.
    Lease(LeaseEvent),
    /// From the guard.
    Guard(GuardFacts),
    /// The guard's process ended or its socket is silent.
    GuardGone,
    /// PostgreSQL was asked.
    Probed(Probe),
    /// An operation ended.
    Finished(Finished),
    /// SIGTERM: hand over, stop, release, leave.
    StopRequested,
    /// Another member, which leads without etcd, asks this one not to run. Answered at once, by [`super::action::Action::AnswerPromise`].
    PromiseAsked {
        /// Names the call in the answer.
        id: u64,
        /// The call.
        ask: PromiseAsk,
        /// When it was received.
        received: BootTime,
    },
    /// The HAProxys of this host were looked at and told what they had wrong, or why that cannot be.
    Routed(Option<String>),
}

enumerated! {
    /// Kinds of event, for the table of reactions. What differs in kind is told apart: a lease that goes on and one that is lost have
    /// nothing in common.
    EventKind {
        /// [`Event::Tick`].
        Tick,
        /// [`Event::WallClock`].
        WallClock,
        /// [`Event::SpecRead`].
        SpecRead,
        /// [`Event::SpecUnreadable`].
        SpecUnreadable,
        /// [`Event::View`].
        View,
        /// [`Event::EtcdUnreachable`] and [`Event::EtcdSuspicious`].
        EtcdTrouble,
        /// [`LeaseEvent::Granted`], [`LeaseEvent::Renewed`], [`LeaseEvent::Moved`] and [`LeaseEvent::Disarmed`].
        LeaseKept,
        /// [`LeaseEvent::Proved`].
        LockProved,
        /// [`LeaseEvent::Sustained`].
        LockSustained,
        /// [`LeaseEvent::Failed`].
        LeaseFailed,
        /// [`LeaseEvent::Lost`].
        LeaseLost,
        /// [`LeaseEvent::GuardSilent`].
        GuardSilent,
        /// [`Event::Guard`].
        Guard,
        /// [`Event::GuardGone`].
        GuardGone,
        /// [`Event::Probed`].
        Probed,
        /// [`Event::Finished`].
        Finished,
        /// [`Event::StopRequested`].
        StopRequested,
        /// [`Event::PromiseAsked`].
        PromiseAsked,
        /// [`Event::Routed`].
        Routed,
    }
}

impl Event {
    /// The kind of this event.
    pub fn kind(&self) -> EventKind {
        match self {
            Event::Tick => EventKind::Tick,
            Event::WallClock(_) => EventKind::WallClock,
            Event::SpecRead(..) => EventKind::SpecRead,
            Event::SpecUnreadable(..) => EventKind::SpecUnreadable,
            Event::View(..) => EventKind::View,
            Event::EtcdUnreachable(_) | Event::EtcdSuspicious(_) => EventKind::EtcdTrouble,
            Event::Lease(
                LeaseEvent::Granted { .. } | LeaseEvent::Renewed { .. } | LeaseEvent::Moved { .. } | LeaseEvent::Disarmed { .. },
            ) => EventKind::LeaseKept,
            Event::Lease(LeaseEvent::Proved { .. }) => EventKind::LockProved,
            Event::Lease(LeaseEvent::Sustained { .. }) => EventKind::LockSustained,
            Event::Lease(LeaseEvent::Failed { .. }) => EventKind::LeaseFailed,
            Event::Lease(LeaseEvent::Lost { .. }) => EventKind::LeaseLost,
            Event::Lease(LeaseEvent::GuardSilent) => EventKind::GuardSilent,
            Event::Guard(_) => EventKind::Guard,
            Event::GuardGone => EventKind::GuardGone,
            Event::Probed(_) => EventKind::Probed,
            Event::Finished(_) => EventKind::Finished,
            Event::StopRequested => EventKind::StopRequested,
            Event::PromiseAsked { .. } => EventKind::PromiseAsked,
            Event::Routed(_) => EventKind::Routed,
        }
    }
}

/// Failure as a sentence for a person.
pub type Failure = String;

/// The end of an [`super::action::Operation`].
#[derive(Debug, Clone)]
pub enum Finished {
    /// A copy or a rewind has got so far.
    GotOn(Bytes),
    /// A directory that was given up is empty.
    Emptied(Result<(), Failure>),
    /// The data directory was looked at.
    Looked(DataDirectory),
    /// What is kept beside the data directory, and what this host lacks for a rewind.
    KeptSeen(Box<Kept>),
    /// What only this member had was kept before it was taken away: told once.
    WritesLost(Box<LostWrites>),
    /// Segments that were received in part, looked at before a standby's start.
    SegmentsCompleted(Vec<HalfSegment>),
    /// The guard was asked to start a postmaster.
    Started(Result<StartId, Failure>),
    /// A postmaster was started, with the files that served before: those of this generation are not wanted by PostgreSQL.
    StartedOnOldFiles {
        /// What was aimed at.
        generation: u64,
        /// Which start.
        start: StartId,
        /// Why.
        why: Failure,
    },
    /// Configuration was brought to a generation.
    Configured {
        /// What was aimed at.
        generation: u64,
        /// Whom it follows in recovery.
        upstream: Option<Upstream>,
        /// What became of it.
        result: Result<Configured, Failure>,
    },
    /// initdb ended.
    Initialized(Result<(), Failure>),
    /// A copy of the leader was made and swapped in.
    Cloned(Result<(), Failure>),
    /// The data directory was rewound to the leader.
    Rewound(Result<(), Failure>),
    /// How to get back behind the leader was judged.
    RejoinPlanned(Result<Rejoin, Failure>),
    /// What was left to be archived was archived, or put beside.
    LeftArchived(Result<Archived, Failure>),
    /// What had been put beside was archived, or not yet.
    BesideArchived(Result<Archived, Failure>),
    /// Promotion was asked for; whether it happened is seen by the probe.
    PromotionAsked(Result<(), Failure>),
    /// Roles and post_init were seen to.
    RolesEnsured(Result<(), Failure>),
    /// A checkpoint was made.
    Checkpointed(Result<(), Failure>),
    /// The member key was written or not.
    MemberPut(PutOutcome),
    /// The race for the lock.
    Acquired(AcquireOutcome),
    /// The lock was let go.
    Released(Result<bool, Failure>),
    /// `status` was written (true) or our epoch is over (false).
    StatusWritten(Result<bool, Failure>),
    /// `history` was completed (true) or our epoch is over (false).
    PromotionRecorded(Result<bool, Failure>),
    /// The names were set and are proved to be in force.
    NamesSet(Result<(), Failure>),
    /// Clients are let in.
    Opened(Result<(), Failure>),
    /// Slots were seen to.
    SlotsKept(Result<(), Failure>),
    /// The lock's key was written again at this revision; None = it is not ours.
    Reaffirmed(Result<Option<Revision>, Failure>),
    /// `sync` was written (true), or was not what was judged on (false), as of this revision.
    SyncWritten(Result<(bool, Revision), Failure>),
    /// `failsafe` was written, or deleted, at this revision; None = our epoch is over, or it was not what was judged on.
    FailsafeWritten(Result<Option<Revision>, Failure>),
    /// It was noted in etcd (true), or maintenance mode is not what it was (false).
    SuspensionNoted(Result<bool, Failure>),
    /// `maintenance` was deleted (true), or was not what it was (false).
    MaintenanceEnded(Result<bool, Failure>),
    /// `initialize` was claimed (true) or somebody else has it (false).
    InitializeClaimed(Result<bool, Failure>),
    /// The claim was given up.
    InitializeGivenUp(Result<(), Failure>),
    /// A request's progress was written, or had changed meanwhile.
    RequestAnswered(Result<bool, Failure>),
    /// PostgreSQL was asked what is under way.
    Surveyed(Result<Survey, Failure>),
    /// The other members were asked whether they are writable.
    PeersAsked(PeersAnswer),
    /// The leader's server was asked whether it takes our connections.
    LeaderReached(Result<(), Failure>),
    /// All PostgreSQL processes were ended by the daemon itself, and a scan found none.
    FencedByScan(Result<(), Failure>),
}

impl Finished {
    /// Which operation ended. None: nobody asked for it, it was seen.
    pub fn kind(&self) -> Option<OperationKind> {
        use OperationKind as Kind;
        Some(match self {
            Finished::KeptSeen(_) | Finished::WritesLost(_) | Finished::GotOn(_) | Finished::SegmentsCompleted(_) => return None,
            Finished::Looked(_) => Kind::Look,
            Finished::Started(_) | Finished::StartedOnOldFiles { .. } => Kind::Start,
            Finished::Configured { .. } => Kind::Configure,
            Finished::Initialized(_) => Kind::Initdb,
            Finished::Cloned(_) => Kind::Clone,
            Finished::Emptied(_) => Kind::EmptyDirectory,
            Finished::Rewound(_) => Kind::Rewind,
            Finished::RejoinPlanned(_) => Kind::PlanRejoin,
            Finished::LeftArchived(_) => Kind::ArchiveLeft,
            Finished::BesideArchived(_) => Kind::ArchiveBeside,
            Finished::PromotionAsked(_) => Kind::Promote,
            Finished::NamesSet(_) => Kind::SetNames,
            Finished::Opened(_) => Kind::Open,
            Finished::SlotsKept(_) => Kind::KeepSlots,
            Finished::SyncWritten(_) => Kind::WriteSync,
            Finished::RolesEnsured(_) => Kind::EnsureRoles,
            Finished::Checkpointed(_) => Kind::Checkpoint,
            Finished::MemberPut(_) => Kind::PutMember,
            Finished::Acquired(_) => Kind::Acquire,
            Finished::Released(_) => Kind::Release,
            Finished::StatusWritten(_) => Kind::WriteStatus,
            Finished::PromotionRecorded(_) => Kind::RecordPromotion,
            Finished::Reaffirmed(_) => Kind::Reaffirm,
            Finished::FailsafeWritten(_) => Kind::WriteFailsafe,
            Finished::SuspensionNoted(_) => Kind::NoteSuspension,
            Finished::MaintenanceEnded(_) => Kind::EndMaintenance,
            Finished::InitializeClaimed(_) => Kind::ClaimInitialize,
            Finished::InitializeGivenUp(_) => Kind::GiveUpInitialize,
            Finished::RequestAnswered(_) => Kind::AnswerRequest,
            Finished::Surveyed(_) => Kind::Survey,
            Finished::PeersAsked(_) => Kind::AskPeers,
            Finished::LeaderReached(_) => Kind::ReachLeader,
            Finished::FencedByScan(_) => Kind::FenceByScan,
        })
    }

    /// The end of a job that came to nothing. What it was about is unknown now.
    pub fn failed_job(kind: OperationKind, why: Failure) -> Finished {
        match kind {
            OperationKind::Start => Finished::Started(Err(why)),
            OperationKind::Configure => Finished::Configured { generation: 0, upstream: None, result: Err(why) },
            OperationKind::Initdb => Finished::Initialized(Err(why)),
            OperationKind::Clone => Finished::Cloned(Err(why)),
            OperationKind::EmptyDirectory => Finished::Emptied(Err(why)),
            OperationKind::Rewind => Finished::Rewound(Err(why)),
            OperationKind::PlanRejoin => Finished::RejoinPlanned(Err(why)),
            OperationKind::ArchiveLeft => Finished::LeftArchived(Err(why)),
            OperationKind::Promote => Finished::PromotionAsked(Err(why)),
            OperationKind::Open => Finished::Opened(Err(why)),
            OperationKind::KeepSlots => Finished::SlotsKept(Err(why)),
            OperationKind::SetNames => Finished::NamesSet(Err(why)),
            OperationKind::EnsureRoles => Finished::RolesEnsured(Err(why)),
            OperationKind::Checkpoint => Finished::Checkpointed(Err(why)),
            _ => Finished::Looked(DataDirectory::Unknown),
        }
    }
}

/// What lies beside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kept {
    /// A diverged data directory that was swapped out.
    pub directory: Option<String>,
    /// WAL that rewinds took away, oldest first.
    pub lost: Vec<LostWrites>,
    /// Of that, what this daemon has seen taken away and has not told.
    pub untold: Vec<LostWrites>,
    /// What this host lacks for a rewind.
    pub no_rewind: Option<String>,
    /// WAL that is to be archived from beside the data directory.
    pub unarchived: Option<Unarchived>,
}

/// A member key of another run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignKey {
    /// The lease it hangs on.
    pub lease: LeaseId,
    /// As that lease was granted.
    pub ttl: Duration,
    /// etcd's raft term: with another one the lease has begun anew.
    pub term: u64,
}

/// What became of an attempt to write the member key.
#[derive(Debug, Clone)]
pub enum PutOutcome {
    /// Written on our lease.
    Written,
    /// A key that is not ours is in the way.
    Foreign(ForeignKey),
    /// Not known.
    Failed(Failure),
}

/// What became of the race for the lock.
#[derive(Debug, Clone)]
pub enum AcquireOutcome {
    /// Ours.
    Won(LockIdentity),
    /// Somebody else's, or the records we judged on had changed.
    Beaten,
    /// Nobody's: the spec had changed since it was judged on, and nothing else had.
    SpecMoved,
    /// Not known; a later view tells.
    Failed(Failure),
}

/// What became of a new configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Configured {
    /// In force, or will be at the next start.
    Taken,
    /// PostgreSQL did not want it; the files that served before are back.
    PutBack(String),
}
