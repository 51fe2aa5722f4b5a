//! Everything the machine knows, and what follows from it without a decision. Events change it in [`super::absorb`].
//!
//! Rule that surprises: nothing in here is ever "probably still so". What was not seen since the last change is absent or unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Condition, HistoryEntry, MemberKey, MemberRecord, MemberRole, StatusRecord, Versions};
use crate::facts::guard::{GuardFacts, LockFacts, PostmasterFacts, Rung, StartId, Word};
use crate::facts::postgres::{ControlFacts, DataDirectory, Probe, ProbeOutcome, SqlFacts};
use crate::policy::deadlines::{CLOCK_DRIFT_PER_MILLE, LeaseTimes};
use crate::policy::rejoin::Rejoin;
use crate::policy::slots::Remembered;
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::{Epoch, Incarnation, LeaseIdentity, LockIdentity, MemberName, Revision, TimelineId};

use super::action::{OperationKind, StopMode, Upstream};
use super::archiving::Left;
use super::bookkeeping::{Asked, Looks};
use super::event::{ForeignKey, Kept, PeersAnswer};
use super::failsafe::Failsafe;
use super::hold::LadderDue;
use super::receiving::Receiving;
use super::requests::Requests;
use super::synchrony::Synchrony;

/// How long a standby that was asked to promote is left before it is asked again.
const PROMOTE_AGAIN_MS: u64 = 2_000;

/// Why processes that are there are ended.
pub(super) const UNCLAIMED: &str = "PostgreSQL runs in the data directory, and no guard was told what it is";

/// What never changes in one run of the daemon.
#[derive(Debug, Clone)]
pub struct Me {
    /// The member's name.
    pub name: MemberName,
    /// This run.
    pub incarnation: Incarnation,
    /// Versions to report.
    pub versions: Versions,
}

/// The leader lock as far as this member is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Not ours.
    None,
    /// Won or adopted, with no proof that counts now.
    Unproved(LockIdentity),
    /// Proved, and the proof acknowledged by the guard.
    Proved {
        /// Which.
        identity: LockIdentity,
        /// E.
        until: BootTime,
        /// A.
        announce_at: BootTime,
    },
}

impl Lock {
    /// The lock's identity unless it is not ours.
    pub fn identity(&self) -> Option<LockIdentity> {
        match self {
            Lock::None => None,
            Lock::Unproved(identity) | Lock::Proved { identity, .. } => Some(*identity),
        }
    }

    /// It is proved, and the fast stop before its deadline is not due.
    pub fn is_proved_at(&self, now: BootTime) -> bool {
        matches!(self, Lock::Proved { announce_at, .. } if now < *announce_at)
    }

    /// The lock and its deadlines, if it is proved.
    pub fn proved(&self) -> Option<LockFacts> {
        match *self {
            Lock::Proved { identity, until, announce_at } => Some(LockFacts { identity, valid_until: until, announce_at }),
            Lock::None | Lock::Unproved(_) => None,
        }
    }
}

/// Whether etcd can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Etcd {
    /// Never asked.
    Unknown,
    /// The view is fresh.
    Reachable,
    /// It cannot be asked.
    Unreachable,
    /// It answers from another cluster or the past: nobody acquires.
    Suspicious,
}

/// An absence of the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vacancy {
    /// `history`'s revision: the same number for all members.
    pub id: Revision,
    /// When this member saw it first.
    pub seen: BootTime,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Backoff {
    pub(super) failures: u32,
    pub(super) not_before: BootTime,
}

/// The configuration that is known to be in the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// Spec generation.
    pub generation: u64,
    /// Whom the files say to follow.
    pub upstream: Option<Upstream>,
}

/// Everything the machine knows.
#[derive(Debug, Clone)]
pub struct World {
    /// Who we are.
    pub me: Me,
    /// The last good spec and its generation.
    pub spec: Option<(u64, Arc<ClusterSpec>)>,
    /// etcd's keys, last seen.
    pub view: Option<Arc<ClusterView>>,
    /// When the view was true.
    pub view_as_of: BootTime,
    /// Whether etcd can be asked.
    pub etcd: Etcd,
    /// Our lease.
    pub lease: Option<LeaseIdentity>,
    /// The lease's thread was asked for a lease or handed one, and has not said more.
    pub lease_asked: bool,
    /// When it was.
    pub lease_asked_at: BootTime,
    /// The lease's thread renews nothing, because the guard did not acknowledge: it has to be told that there is a guard again.
    pub lease_silent: bool,
    /// The guard's lease, handed to the lease's thread, which has not renewed it yet.
    pub adopting: Option<LeaseIdentity>,
    /// Since when it could have, etcd being there.
    pub adoptable_since: Option<BootTime>,
    /// The leader lock.
    pub lock: Lock,
    /// Since when the lock is ours and we only follow, although etcd can be asked.
    pub idle_lock_since: Option<BootTime>,
    /// How far the guard has to have gone in ending PostgreSQL, and by when, unless the lock is proved again.
    pub ladder_due: Option<LadderDue>,
    /// The lock that the lease's thread was told to hold.
    pub holding: Option<LockIdentity>,
    /// The timeline id reserved with a lock that was won and has not been used.
    pub reserved: Option<TimelineId>,
    /// What the guard says.
    pub guard: Option<GuardFacts>,
    /// The guard is gone; PostgreSQL's processes must be ended by scan.
    pub guard_gone: bool,
    /// A scan found nothing of PostgreSQL, and the new guard has not spoken yet.
    pub scanned_empty: bool,
    /// The last probe of the present postmaster.
    pub probe: Option<Probe>,
    /// When the present postmaster was first heard of.
    pub postmaster_since: BootTime,
    /// A start that was answered, and that the guard's facts do not show yet: an answer overtakes them.
    pub started: Option<StartId>,
    /// The data directory, read since the last postmaster ended.
    pub data: DataDirectory,
    /// Operations under way.
    pub in_flight: BTreeSet<OperationKind>,
    pub(super) backoff: BTreeMap<OperationKind, Backoff>,
    /// What is in the way.
    pub conditions: BTreeMap<&'static str, Condition>,
    /// PostgreSQL ended by itself, with an error, before it took connections: the next start uses the files that served last.
    pub files_failed: bool,
    /// What the configuration files hold.
    pub in_force: Option<InForce>,
    /// When the running server was configured last: what was asked before that may show what was before.
    pub configured_at: BootTime,
    /// The process that has gone through all the WAL that it found when it was started ([`SqlFacts::startup`]).
    pub replayed_by: Option<String>,
    /// The generation that PostgreSQL would not take.
    pub refused_generation: Option<u64>,
    /// The leadership that the way back is being judged for.
    pub planned_for: Option<Epoch>,
    /// When the data directory was looked at last.
    pub looked_at: BootTime,
    /// The leader that the files were judged to be able to follow, and when.
    pub judged: Option<(Epoch, BootTime)>,
    /// The data directory's own promotion, as last looked at. None = it was not looked at in this run of the daemon.
    pub promoted: Option<Option<(TimelineId, Epoch)>>,
    /// The last judgement on how to get back behind the leader.
    pub rejoin: Option<Rejoin>,
    /// What lies beside the data directory, as last looked at.
    pub kept: Kept,
    /// What its archiver did not get to while this member was the primary.
    pub left: Left,
    /// When the checkpoint before a planned stop was made.
    pub checkpointed: Option<BootTime>,
    /// What etcd was asked for.
    pub asked: Asked,
    /// The leadership that was given back last.
    pub released: Option<Epoch>,
    /// The leadership of which nothing can be on its way to etcd, no release and no write of `sync`: won in this run of the daemon, or its
    /// key was written again since.
    pub sure_of: Option<Epoch>,
    /// The leadership that was taken over from the guard with a server that may write: no release of it had begun, or it would not.
    pub found_writing: Option<Epoch>,
    /// What peers said.
    pub peers: Option<PeersAnswer>,
    /// Since when the lock is absent.
    pub vacancy: Option<Vacancy>,
    /// SIGTERM came.
    pub stop_requested: bool,
    /// When primaries were started in place or promoted.
    pub primary_starts: Vec<BootTime>,
    /// The member key as last written, and when.
    pub written: Option<(MemberRecord, BootTime)>,
    /// What is being written.
    pub writing: Option<MemberRecord>,
    /// The lease that it is written on.
    pub writing_on: Option<LeaseIdentity>,
    /// Since when another run's key is in the way.
    pub foreign: Option<(BootTime, ForeignKey)>,
    /// When it was found there last.
    pub foreign_seen: BootTime,
    /// `status` as last written, and when.
    pub status_written: Option<(StatusRecord, BootTime)>,
    /// The leadership whose promotion is in `history`.
    pub recorded: Option<Epoch>,
    /// The start whose roles were seen to.
    pub roles_for: Option<StartId>,
    /// How a standby receives.
    pub receiving: Receiving,
    /// Since when the present leader, in its present leadership, is seen to take writes.
    pub leader_writes_since: Option<(Epoch, BootTime)>,
    /// When promotion was asked for last.
    pub promote_asked: Option<BootTime>,
    /// What operators asked for.
    pub requests: Requests,
    /// Looks at the data directory of a server that has not ended.
    pub looks: Looks,
    /// This member gave a leadership up that came to nothing, and leaves the lock to others until then.
    pub abstains_until: Option<BootTime>,
    /// The order to leave was given.
    pub exited: bool,
    /// The last order to end a postmaster, and when it was given.
    pub stop_asked: Option<(StartId, StopMode, BootTime)>,
    /// This member ran initdb in this run, so post_init is owed.
    pub initialized_here: bool,
    /// Leading without etcd, and promises to whom does.
    pub failsafe: Failsafe,
    /// Replication slots.
    pub slots: Remembered,
    /// Who holds what is acknowledged.
    pub synchrony: Synchrony,
}

impl World {
    /// Knows nothing but who it is.
    pub fn new(me: Me) -> Self {
        World {
            me,
            spec: None,
            view: None,
            view_as_of: BootTime::default(),
            etcd: Etcd::Unknown,
            lease: None,
            lease_asked: false,
            lease_asked_at: BootTime::default(),
            lease_silent: false,
            adopting: None,
            adoptable_since: None,
            lock: Lock::None,
            idle_lock_since: None,
            ladder_due: None,
            holding: None,
            reserved: None,
            guard: None,
            guard_gone: false,
            scanned_empty: false,
            probe: None,
            postmaster_since: BootTime::default(),
            started: None,
            data: DataDirectory::Unknown,
            in_flight: BTreeSet::new(),
            backoff: BTreeMap::new(),
            conditions: BTreeMap::new(),
            files_failed: false,
            in_force: None,
            configured_at: BootTime::default(),
            replayed_by: None,
            refused_generation: None,
            planned_for: None,
            looked_at: BootTime::default(),
            judged: None,
            promoted: None,
            rejoin: None,
            kept: Kept::default(),
            left: Left::default(),
            checkpointed: None,
            asked: Asked::default(),
            released: None,
            sure_of: None,
            found_writing: None,
            peers: None,
            vacancy: None,
            stop_requested: false,
            primary_starts: Vec::new(),
            written: None,
            writing: None,
            writing_on: None,
            foreign: None,
            foreign_seen: BootTime::default(),
            status_written: None,
            recorded: None,
            roles_for: None,
            receiving: Receiving::default(),
            leader_writes_since: None,
            promote_asked: None,
            requests: Requests::default(),
            looks: Looks::default(),
            abstains_until: None,
            exited: false,
            stop_asked: None,
            initialized_here: false,
            failsafe: Failsafe::default(),
            slots: Remembered::default(),
            synchrony: Synchrony::default(),
        }
    }

    /// The start that is kept, and whether it runs and is not being ended.
    pub(super) fn start_and_phase(&self) -> (Option<StartId>, bool) {
        match self.guard.as_ref().map(|guard| &guard.postmaster) {
            Some(PostmasterFacts::Running { start, .. }) => (Some(*start), true),
            Some(PostmasterFacts::Ending { start, .. }) => (Some(*start), false),
            Some(PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. }) | None => (None, false),
        }
    }

    /// The facts that most decisions rest on, for the log and `events/`.
    pub fn decision_facts(&self) -> BTreeMap<String, String> {
        let mut facts = BTreeMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                facts.insert(key.to_owned(), value);
            }
        };
        put("epoch", self.lock.identity().map(|lock| lock.epoch.to_string()));
        put("etcd", Some(format!("{:?}", self.etcd).to_lowercase()));
        let view = self.view.as_ref();
        put("leader", view.and_then(|view| view.leader.as_ref()).map(|leader| leader.holder.clone()));
        put("revision", view.map(|view| view.revision.to_string()));
        put("timeline", self.sql().map(|sql| sql.timeline.to_string()));
        put("lsn", self.sql().map(|sql| sql.end_of_wal().to_string()));
        facts
    }

    /// The spec in force.
    pub fn spec(&self) -> Option<&Arc<ClusterSpec>> {
        self.spec.as_ref().map(|(_, spec)| spec)
    }

    /// Ourselves in the spec.
    pub fn declared(&self) -> Option<&Member> {
        self.spec()?.member(&self.me.name)
    }

    /// The times of a lease whose proofs are good for so long: its own ttl, which may not be the spec's yet.
    pub(super) fn times_of(&self, validity: Duration) -> Option<LeaseTimes> {
        let times = self.times()?;
        let per_second_ms = u128::from(1_000 - CLOCK_DRIFT_PER_MILLE);
        let ttl = Duration::from_secs(u64::try_from((validity.as_millis() + per_second_ms / 2) / per_second_ms).unwrap_or(0));
        Some(if ttl == times.ttl { times } else { LeaseTimes::new(ttl) })
    }

    /// The lock's times under the spec in force.
    pub fn times(&self) -> Option<LeaseTimes> {
        self.spec().map(|spec| spec.lease_times())
    }

    /// The postmaster that runs, and the daemon's word for it.
    pub fn running(&self) -> Option<(StartId, Word)> {
        match &self.guard.as_ref()?.postmaster {
            PostmasterFacts::Running { start, word, .. } => Some((*start, *word)),
            PostmasterFacts::Ending { .. } | PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. } => None,
        }
    }

    /// The rung a postmaster is being ended with.
    pub fn ending(&self) -> Option<Rung> {
        match &self.guard.as_ref()?.postmaster {
            PostmasterFacts::Ending { rung, .. } => Some(*rung),
            PostmasterFacts::Running { .. } | PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. } => None,
        }
    }

    /// PostgreSQL processes are there that neither this guard nor an earlier one was told of.
    pub fn unclaimed(&self) -> bool {
        matches!(self.guard.as_ref().map(|guard| &guard.postmaster), Some(PostmasterFacts::Unclaimed { .. }))
    }

    /// Why PostgreSQL's processes have to be ended by scan: nobody else would, and nobody vouches that they do not write.
    pub fn unguarded(&self) -> Option<&'static str> {
        if self.guard_gone {
            Some("the guard is gone")
        } else if self.unclaimed() {
            Some(UNCLAIMED)
        } else {
            None
        }
    }

    /// Proved: no PostgreSQL process is left, and none was started since.
    pub fn proved_empty(&self) -> bool {
        !self.guard_gone
            && self.started.is_none()
            && matches!(self.guard.as_ref().map(|guard| &guard.postmaster), Some(PostmasterFacts::ProvedEmpty { .. }))
    }

    /// A promotion was asked for a moment ago, or is being asked for.
    pub fn promotion_asked_lately(&self, now: BootTime) -> bool {
        let lately = self.promote_asked.is_some_and(|at| now.since(at) < Duration::from_millis(PROMOTE_AGAIN_MS));
        lately || self.in_flight.contains(&OperationKind::Promote)
    }

    /// Proved empty, and nothing under way that could bring up a server, or one that writes: the only ground on which a lock is let go,
    /// a leadership is over, and the daemon leaves.
    pub fn nothing_can_write(&self) -> bool {
        let on_its_way = [OperationKind::Start, OperationKind::Promote].iter().any(|kind| self.in_flight.contains(kind));
        (self.proved_empty() || self.scanned_empty) && !on_its_way
    }

    /// Nothing can write, or the server that runs is a standby by the daemon's word and nobody is promoting it.
    pub fn cannot_write(&self, now: BootTime) -> bool {
        let standby = matches!(self.running(), Some((_, Word::Standby))) && !self.promotion_asked_lately(now);
        self.nothing_can_write() || standby
    }

    /// What the running server said, if the last probe reached it.
    pub fn sql(&self) -> Option<&SqlFacts> {
        self.running()?;
        match &self.probe.as_ref()?.outcome {
            ProbeOutcome::Accepting(sql) => Some(sql),
            ProbeOutcome::NotYet(_) | ProbeOutcome::Unknown(_) => None,
        }
    }

    /// The control file of a stopped server.
    pub fn control(&self) -> Option<&ControlFacts> {
        if let DataDirectory::Full(control) = &self.data { Some(control) } else { None }
    }

    /// The view, if etcd can be asked.
    pub fn fresh_view(&self) -> Option<&Arc<ClusterView>> {
        self.view.as_ref().filter(|_| self.etcd == Etcd::Reachable)
    }

    /// The leader's member key, if another member leads.
    pub fn other_leader(&self) -> Option<(&MemberName, &MemberKey)> {
        self.view.as_ref()?.leader_member().filter(|(name, _)| **name != self.me.name)
    }

    /// The timeline id that our lock was taken with: the only one this leadership may write on (I9). None = not known yet.
    pub fn timeline_of(&self, lock: LockIdentity) -> Option<TimelineId> {
        let recorded = self.view.as_ref().filter(|view| view.revision.0 >= lock.epoch.0).and_then(|view| {
            let ours = |entry: &&HistoryEntry| entry.is_of(lock.epoch) || entry.awaits(&self.me.name, lock.lease.lease);
            view.history.iter().rev().find(ours).map(|entry| entry.timeline)
        });
        self.reserved.or(recorded)
    }

    /// The timeline that PostgreSQL is on, running or stopped.
    pub fn own_timeline(&self) -> Option<TimelineId> {
        let stopped = self.control().map(|control| control.timeline.max(control.min_recovery_timeline));
        self.sql().map(|sql| sql.timeline).or(stopped)
    }

    /// PostgreSQL runs here under the word that it may write, and is out of recovery.
    pub fn writes(&self) -> bool {
        matches!(self.running(), Some((_, Word::Writable))) && self.sql().is_some_and(|sql| !sql.in_recovery)
    }

    /// Another member leads and its PostgreSQL takes writes.
    pub fn leader_writes(&self) -> bool {
        self.other_leader().is_some_and(|(_, key)| key.record.role == MemberRole::Primary)
    }
}
