//! Everything the machine knows, and how an event changes it. Decides nothing: the rules do.
//!
//! Rule that surprises: when the postmaster changes, what was known of the server and of the data directory is forgotten, so that
//! no rule acts on what was true of another start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Condition, HistoryEntry, MemberKey, MemberRecord, MemberRole, Severity, StatusRecord, Versions};
use crate::facts::guard::{GuardFacts, PostmasterFacts, Rung, StartId, Word};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::facts::postgres::{ControlFacts, DataDirectory, Probe, ProbeOutcome, SqlFacts};
use crate::policy::deadlines::LeaseTimes;
use crate::policy::rejoin::Rejoin;
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::{Epoch, Incarnation, LeaseId, LeaseIdentity, LockIdentity, MemberName, Revision, TimelineId};

use super::action::{Action, LeaseOrder, OperationKind, StopMode, Upstream};
use super::event::{AcquireOutcome, Configured, Event, Finished, PutOutcome};

/// Longest wait between two attempts of an operation that fails.
const BACKOFF_MAX_MS: u64 = 10_000;
/// Wait after the first failure; doubles with each further one.
const BACKOFF_FIRST_MS: u64 = 250;
/// An order to end PostgreSQL is given again after so long if nothing was seen of it.
const STOP_AGAIN_MS: u64 = 1_000;
/// How long a standby that was asked to promote is left before it is asked again.
const PROMOTE_AGAIN_MS: u64 = 2_000;
/// The same write is not tried again for so long after an answer that a newer view has to follow.
const ANSWERED_PAUSE_MS: u64 = 250;
/// A key of another run that is in the way is looked at again after so long.
const FOREIGN_AGAIN_MS: u64 = 1_000;
/// After a scan, a new guard is given so long to say what it sees.
const NEW_GUARD_MS: u64 = 1_000;
/// Window in which starts of the primary count as a crash loop (SAFETY row 9).
pub const CRASH_WINDOW_S: u64 = 60;
/// So many starts within the window and another member has to lead.
pub const CRASH_LIMIT: usize = 3;

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

#[derive(Debug, Clone, Copy)]
struct Backoff {
    failures: u32,
    not_before: BootTime,
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
#[derive(Debug)]
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
    /// The leader lock.
    pub lock: Lock,
    /// The lock that the lease's thread was told to hold.
    pub holding: Option<LockIdentity>,
    /// The timeline id reserved with a lock that was won and has not been used.
    pub reserved: Option<TimelineId>,
    /// What the guard says.
    pub guard: Option<GuardFacts>,
    /// The guard is gone; PostgreSQL's processes must be ended by scan.
    pub guard_gone: bool,
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
    backoff: BTreeMap<OperationKind, Backoff>,
    /// What is in the way.
    pub conditions: BTreeMap<&'static str, Condition>,
    /// What the configuration files hold.
    pub in_force: Option<InForce>,
    /// The generation that PostgreSQL would not take.
    pub refused_generation: Option<u64>,
    /// The leader that the files were judged to be able to follow, and when.
    pub judged: Option<(Epoch, BootTime)>,
    /// The last judgement on how to get back behind the leader.
    pub rejoin: Option<Rejoin>,
    /// The checkpoint before a planned stop was made.
    pub checkpointed: bool,
    /// The leadership that is being given back.
    pub releasing: Option<Epoch>,
    /// The leadership that was given back last.
    pub released: Option<Epoch>,
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
    /// Since when another incarnation's key is in the way, and the lease it hangs on.
    pub foreign: Option<(BootTime, LeaseId)>,
    /// When it was found there last.
    pub foreign_seen: BootTime,
    /// `status` as last written, and when.
    pub status_written: Option<(StatusRecord, BootTime)>,
    /// The leadership whose promotion is in `history`.
    pub recorded: Option<Epoch>,
    /// The start whose roles were seen to.
    pub roles_for: Option<StartId>,
    /// Since when a standby that should stream does not.
    pub not_streaming_since: Option<BootTime>,
    /// Since when the present leader, in its present leadership, is seen to take writes.
    pub leader_writes_since: Option<(Epoch, BootTime)>,
    /// `initialize` is claimed by us, on our lease.
    pub claimed: bool,
    /// When promotion was asked for last.
    pub promote_asked: Option<BootTime>,
    /// Requests that this member has acted on: each is tried once.
    pub tried_requests: BTreeSet<String>,
    /// This member gave a leadership up that came to nothing, and leaves the lock to others until then.
    pub abstains_until: Option<BootTime>,
    /// The order to leave was given.
    pub exited: bool,
    /// The last order to end a postmaster, and when it was given.
    pub stop_asked: Option<(StartId, StopMode, BootTime)>,
    /// This member ran initdb in this run, so post_init is owed.
    pub initialized_here: bool,
}

/// Whether what the guard says takes a start into account.
fn knows_of(guard: &GuardFacts, start: StartId) -> bool {
    match &guard.postmaster {
        PostmasterFacts::Running { start: known, .. } | PostmasterFacts::Ending { start: known, .. } => *known >= start,
        PostmasterFacts::ProvedEmpty { last } => last.is_some_and(|last| last.start >= start),
        PostmasterFacts::Unclaimed { .. } => false,
    }
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
            lock: Lock::None,
            holding: None,
            reserved: None,
            guard: None,
            guard_gone: false,
            probe: None,
            postmaster_since: BootTime::default(),
            started: None,
            data: DataDirectory::Unknown,
            in_flight: BTreeSet::new(),
            backoff: BTreeMap::new(),
            conditions: BTreeMap::new(),
            in_force: None,
            refused_generation: None,
            judged: None,
            rejoin: None,
            checkpointed: false,
            releasing: None,
            released: None,
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
            not_streaming_since: None,
            leader_writes_since: None,
            claimed: false,
            promote_asked: None,
            tried_requests: BTreeSet::new(),
            abstains_until: None,
            exited: false,
            stop_asked: None,
            initialized_here: false,
        }
    }

    /// Takes in an event. Returns why the lock is gone if this event took it away.
    pub fn absorb(&mut self, now: BootTime, event: Event) -> Option<String> {
        match event {
            Event::Tick => None,
            Event::SpecRead(generation, spec) => {
                self.spec = Some((generation, spec));
                self.clear("spec_unreadable");
                None
            }
            Event::SpecUnreadable(generation, why) => {
                self.warn("spec_unreadable", format!("the spec of generation {generation} means nothing, the last good one stays: {why}"));
                None
            }
            Event::View(view, as_of) => self.absorb_view(now, view, as_of),
            Event::EtcdUnreachable(why) => {
                self.etcd = Etcd::Unreachable;
                self.vacancy = None;
                self.warn("etcd_unreachable", format!("etcd cannot be asked: {why}"));
                None
            }
            Event::EtcdSuspicious(why) => {
                self.etcd = Etcd::Suspicious;
                self.vacancy = None;
                self.fail(
                    "etcd_suspicious",
                    format!("etcd answers from another cluster or an older state; nobody acquires the lock: {why}"),
                );
                None
            }
            Event::Lease(event) => self.absorb_lease(now, event),
            Event::Guard(facts) => {
                self.absorb_guard(now, facts);
                None
            }
            Event::GuardGone => {
                self.guard = None;
                self.guard_gone = true;
                self.forget_postmaster(now);
                // A new guard knows of no lock: it has to acknowledge a new proof first.
                if let Some(identity) = self.lock.identity() {
                    self.lock = Lock::Unproved(identity);
                }
                self.holding = None;
                None
            }
            Event::Probed(probe) => {
                if probe.begun >= self.postmaster_since {
                    self.absorb_probe(now, probe);
                }
                None
            }
            Event::Finished(finished) => {
                self.absorb_finished(now, finished);
                None
            }
            Event::StopRequested => {
                self.stop_requested = true;
                None
            }
        }
    }

    fn absorb_view(&mut self, now: BootTime, view: Arc<ClusterView>, as_of: BootTime) -> Option<String> {
        self.etcd = Etcd::Reachable;
        self.clear("etcd_unreachable");
        self.clear("etcd_suspicious");
        self.vacancy = match (&view.leader, self.vacancy) {
            (Some(_), _) => None,
            (None, Some(vacancy)) if vacancy.id == view.history_revision => Some(vacancy),
            (None, _) => Some(Vacancy { id: view.history_revision, seen: now }),
        };
        if view.leader.is_some() {
            self.peers = None;
        }
        let ours = self.lock.identity();
        let gone = ours.filter(|ours| {
            // A view older than our acquisition says nothing about it.
            view.revision.0 >= ours.epoch.0 && view.leader.as_ref().map(|leader| leader.epoch) != Some(ours.epoch)
        });
        self.view = Some(view);
        self.view_as_of = as_of;
        let writes = self.other_leader().filter(|(_, key)| key.record.role == MemberRole::Primary).is_some();
        let epoch = self.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.epoch).filter(|_| writes);
        self.leader_writes_since = match (epoch, self.leader_writes_since) {
            (Some(epoch), Some((known, since))) if epoch == known => Some((known, since)),
            (epoch, _) => epoch.map(|epoch| (epoch, now)),
        };
        gone?;
        self.lock = Lock::None;
        self.holding = None;
        Some("the lock's key was deleted or replaced".to_owned())
    }

    fn absorb_lease(&mut self, now: BootTime, event: LeaseEvent) -> Option<String> {
        match event {
            LeaseEvent::Granted { identity, .. } => {
                self.lease = Some(identity);
                self.lease_silent = false;
                None
            }
            LeaseEvent::Renewed { .. } => {
                self.lease = self.lease.or(self.adopting.take());
                None
            }
            LeaseEvent::Proved { lock, sent, until } => {
                self.lease = Some(lock.lease);
                // The epoch names the leadership; a changed ttl brings it another lease. A proof of a lock that was let go or taken
                // meanwhile comes too late, and proves nothing about now.
                if self.lock.identity().map(|known| known.epoch) == Some(lock.epoch) {
                    self.holding = Some(lock);
                    let announce_at = self.times().map_or(until, |times| times.deadlines(sent).announce_at);
                    self.lock = Lock::Proved { identity: lock, until, announce_at };
                }
                None
            }
            LeaseEvent::Failed { .. } => None,
            LeaseEvent::Lost { why } => {
                let had = self.lock.identity().is_some();
                if why != LeaseLoss::LockNotOurs {
                    self.lease = None;
                    self.adopting = None;
                    // Its thread gets another one by itself; if none comes, it is asked again.
                    self.lease_asked = true;
                    self.lease_asked_at = now;
                    self.written = None;
                    self.claimed = false;
                }
                self.lock = Lock::None;
                self.holding = None;
                had.then(|| match why {
                    LeaseLoss::LockNotOurs => "the lock's key is not ours any more".to_owned(),
                    _ => "the lease is gone".to_owned(),
                })
            }
            LeaseEvent::Moved { from, to } => {
                if self.lease == Some(from) {
                    self.lease = Some(to);
                }
                None
            }
            LeaseEvent::GuardSilent => {
                self.guard_gone = true;
                self.lease_silent = true;
                None
            }
        }
    }

    fn absorb_guard(&mut self, now: BootTime, facts: GuardFacts) {
        if self.guard.as_ref().is_some_and(|known| known.pid == facts.pid && known.sequence > facts.sequence) {
            return;
        }
        let was = self.start_and_phase();
        let served = self.sql().is_some();
        if let (Some(start), PostmasterFacts::ProvedEmpty { last: Some(end) }) = (was.0, &facts.postmaster)
            && end.start == start
            && end.rung.is_none()
            && !served
        {
            let how = end.exit_status.map_or_else(|| format!("signal {}", end.signal.unwrap_or(0)), |status| format!("status {status}"));
            self.failed(now, OperationKind::Start);
            self.warn("start_failed", format!("PostgreSQL ended with {how} before it took connections; see its log"));
        }
        let another = self.guard.as_ref().is_none_or(|known| known.pid != facts.pid);
        self.started = self.started.filter(|start| !another && !knows_of(&facts, *start));
        self.guard = Some(facts);
        self.guard_gone = false;
        if self.start_and_phase() != was {
            self.forget_postmaster(now);
        }
    }

    fn start_and_phase(&self) -> (Option<StartId>, bool) {
        match self.guard.as_ref().map(|guard| &guard.postmaster) {
            Some(PostmasterFacts::Running { start, .. }) => (Some(*start), true),
            Some(PostmasterFacts::Ending { start, .. }) => (Some(*start), false),
            Some(PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. }) | None => (None, false),
        }
    }

    fn forget_postmaster(&mut self, now: BootTime) {
        self.probe = None;
        self.data = DataDirectory::Unknown;
        self.postmaster_since = now;
        self.not_streaming_since = None;
    }

    fn absorb_probe(&mut self, now: BootTime, probe: Probe) {
        if matches!(probe.outcome, ProbeOutcome::Accepting(_)) {
            self.backoff.remove(&OperationKind::Start);
            self.clear("start_failed");
        }
        let streaming = match &probe.outcome {
            ProbeOutcome::Accepting(sql) => sql.walreceiver.as_ref().is_some_and(|receiver| receiver.status == "streaming"),
            ProbeOutcome::NotYet(_) | ProbeOutcome::Unknown(_) => false,
        };
        self.not_streaming_since = if streaming { None } else { self.not_streaming_since.or(Some(now)) };
        self.probe = Some(probe);
    }

    fn absorb_finished(&mut self, now: BootTime, finished: Finished) {
        use OperationKind as Kind;
        match finished {
            Finished::Looked(data) => {
                self.ended(now, Kind::Look, data != DataDirectory::Unknown);
                // A postmaster that started meanwhile has made this look old.
                if self.proved_empty() {
                    self.data = data;
                }
            }
            Finished::Started(result) => {
                if result.is_err() {
                    self.in_force = None;
                    self.data = DataDirectory::Unknown;
                }
                self.judge_start(now, result);
            }
            Finished::StartedOnOldFiles { generation, start, why } => {
                self.in_force = self.in_force.take().map(|files| InForce { generation: 0, ..files });
                self.refused_generation = Some(generation);
                self.fail(
                    "configuration_refused",
                    format!("PostgreSQL runs on the files that served before generation {generation}: {why}"),
                );
                self.judge_start(now, Ok(start));
            }
            Finished::Configured { generation, upstream, result } => self.absorb_configured(now, generation, upstream, result),
            Finished::Initialized(result) => self.judge(now, Kind::Initdb, result, "initdb_failed"),
            Finished::Cloned(result) => {
                self.rejoin = None;
                self.data = DataDirectory::Unknown;
                self.judge(now, Kind::Clone, result, "clone_failed");
            }
            Finished::RejoinPlanned(result) => {
                if matches!(result, Ok(Rejoin::Follow)) {
                    self.judged = self.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| (leader.epoch, now));
                }
                self.rejoin = result.as_ref().ok().cloned();
                self.judge(now, Kind::PlanRejoin, result, "rejoin_unclear");
            }
            Finished::PromotionAsked(result) => self.judge(now, Kind::Promote, result, "promotion_failed"),
            Finished::RolesEnsured(result) => {
                if result.is_ok() {
                    self.roles_for = self.running().map(|(start, _)| start);
                }
                self.judge(now, Kind::EnsureRoles, result, "roles_failed");
            }
            Finished::Checkpointed(result) => {
                self.checkpointed = result.is_ok();
                self.judge(now, Kind::Checkpoint, result, "checkpoint_failed");
            }
            Finished::MemberPut(outcome) => self.absorb_put(now, outcome),
            Finished::Acquired(outcome) => {
                self.ended(now, Kind::Acquire, !matches!(outcome, AcquireOutcome::Failed(_)));
                match outcome {
                    AcquireOutcome::Won(identity) => self.lock = Lock::Unproved(identity),
                    AcquireOutcome::Beaten => {
                        self.reserved = None;
                        self.pause(now, Kind::Acquire, ANSWERED_PAUSE_MS);
                    }
                    // Unknown: it may have been applied; a lock that turns out to be ours names its timeline in `history`.
                    AcquireOutcome::Failed(_) => self.reserved = None,
                }
            }
            Finished::Released(result) => {
                let epoch = self.releasing.take();
                if result.is_ok() {
                    self.released = epoch;
                } else {
                    // The lease's thread let go of it first: it has to be told to hold again what is still ours.
                    self.holding = None;
                }
                self.judge(now, Kind::Release, result, "release_failed");
            }
            Finished::StatusWritten(result) => {
                if result.is_err() {
                    self.status_written = None;
                }
                self.ended(now, Kind::WriteStatus, result.is_ok());
            }
            Finished::PromotionRecorded(result) => {
                if let (Ok(true), Some(lock)) = (&result, self.lock.identity()) {
                    self.recorded = Some(lock.epoch);
                }
                self.ended(now, Kind::RecordPromotion, matches!(result, Ok(true)));
            }
            Finished::InitializeClaimed(result) => {
                self.claimed = matches!(result, Ok(true));
                self.ended(now, Kind::ClaimInitialize, self.claimed);
                self.pause(now, Kind::ClaimInitialize, ANSWERED_PAUSE_MS);
            }
            Finished::InitializeGivenUp(result) => {
                self.claimed = self.claimed && result.is_err();
                self.ended(now, Kind::GiveUpInitialize, result.is_ok());
            }
            Finished::RequestAnswered(result) => {
                self.ended(now, Kind::AnswerRequest, result.is_ok());
                self.pause(now, Kind::AnswerRequest, ANSWERED_PAUSE_MS);
            }
            Finished::PeersAsked { vacancy, sent, writable } => {
                self.ended(now, Kind::AskPeers, true);
                self.peers = Some(PeersAnswer { vacancy, sent, writable });
            }
            Finished::FencedByScan(result) => {
                self.guard_gone = self.guard_gone && result.is_err();
                self.judge(now, Kind::FenceByScan, result, "fence_failed");
                self.pause(now, Kind::FenceByScan, NEW_GUARD_MS);
            }
        }
    }

    fn absorb_configured(
        &mut self,
        now: BootTime,
        generation: u64,
        upstream: Option<Upstream>,
        result: Result<Configured, super::event::Failure>,
    ) {
        self.ended(now, OperationKind::Configure, result.is_ok());
        match result {
            Ok(Configured::Taken) => {
                self.in_force = Some(InForce { generation, upstream });
                self.refused_generation = None;
                self.clear("configuration_refused");
                self.clear("configuration_failed");
            }
            Ok(Configured::PutBack(why)) => {
                self.refused_generation = Some(generation);
                self.fail(
                    "configuration_refused",
                    format!("PostgreSQL did not take the configuration of generation {generation}, the one before is back: {why}"),
                );
            }
            Err(why) => self.warn("configuration_failed", why),
        }
    }

    fn absorb_put(&mut self, now: BootTime, outcome: PutOutcome) {
        let record = self.writing.take();
        match outcome {
            PutOutcome::Written => {
                self.foreign = None;
                self.clear("name_taken");
                // On a lease that is gone it is gone too.
                let lasts = self.lease.is_some() && self.lease == self.writing_on;
                self.written = record.filter(|_| lasts).map(|record| (record, now));
                self.ended(now, OperationKind::PutMember, true);
            }
            PutOutcome::Foreign(lease) => {
                self.written = None;
                let since = self.foreign.map_or(now, |(since, _)| since);
                self.warn(
                    "name_taken",
                    format!("the member key of `{}` belongs to another run of the daemon; waiting for it to expire", self.me.name),
                );
                self.foreign = Some((since, lease));
                self.foreign_seen = now;
                self.ended(now, OperationKind::PutMember, true);
                self.pause(now, OperationKind::PutMember, FOREIGN_AGAIN_MS);
            }
            PutOutcome::Failed(_) => {
                // Unknown whether it was written: the next one decides.
                self.written = None;
                self.ended(now, OperationKind::PutMember, false);
            }
        }
    }

    /// Whether a server that was started is any good is seen later: its condition stays until it takes connections.
    fn judge_start(&mut self, now: BootTime, result: Result<StartId, String>) {
        self.ended(now, OperationKind::Start, result.is_ok());
        match result {
            Ok(start) => self.started = Some(start).filter(|start| !self.guard.as_ref().is_some_and(|guard| knows_of(guard, *start))),
            Err(why) => self.warn("start_failed", why),
        }
    }

    /// Books the end of an operation, with a condition if it failed.
    fn judge(&mut self, now: BootTime, kind: OperationKind, result: Result<impl Sized, String>, condition: &'static str) {
        match result {
            Ok(_) => {
                self.ended(now, kind, true);
                self.clear(condition);
            }
            Err(why) => {
                self.ended(now, kind, false);
                self.warn(condition, why);
            }
        }
    }

    fn ended(&mut self, now: BootTime, kind: OperationKind, succeeded: bool) {
        self.in_flight.remove(&kind);
        if succeeded {
            // A start has succeeded only when the server takes connections.
            if kind != OperationKind::Start {
                self.backoff.remove(&kind);
            }
            return;
        }
        self.failed(now, kind);
    }

    fn failed(&mut self, now: BootTime, kind: OperationKind) {
        let failures = self.backoff.get(&kind).map_or(0, |backoff| backoff.failures) + 1;
        let wait_ms = (BACKOFF_FIRST_MS << failures.min(10).saturating_sub(1)).min(BACKOFF_MAX_MS);
        self.backoff.insert(kind, Backoff { failures, not_before: now + Duration::from_millis(wait_ms) });
    }

    /// Whether an operation may be started: not under way, not before its back-off is over, and no other job if it is one.
    pub fn may_start(&self, now: BootTime, kind: OperationKind) -> bool {
        !self.in_flight.contains(&kind)
            && self.backoff.get(&kind).is_none_or(|backoff| now >= backoff.not_before)
            && !(kind.is_job() && self.job().is_some())
    }

    /// Puts off the next attempt of an operation, at least for so long.
    fn pause(&mut self, now: BootTime, kind: OperationKind, span_ms: u64) {
        let not_before = now + Duration::from_millis(span_ms);
        let backoff = self.backoff.entry(kind).or_insert(Backoff { failures: 0, not_before });
        backoff.not_before = backoff.not_before.max(not_before);
    }

    /// A new attempt at something begins: what failed before does not count against it.
    pub fn forget_failures(&mut self, kind: OperationKind) {
        self.backoff.remove(&kind);
    }

    /// Puts off the next attempt of an operation as if it had failed.
    pub fn retry_later(&mut self, now: BootTime, kind: OperationKind) {
        self.failed(now, kind);
    }

    /// Whether PostgreSQL's end may be ordered (again): a weaker order than the present one is not given.
    pub fn may_ask_stop(&mut self, now: BootTime, mode: StopMode) -> bool {
        let (start, running) = self.start_and_phase();
        let Some(start) = start.filter(|_| running || mode == StopMode::Kill && self.ending() != Some(Rung::KillAll)) else { return false };
        let asked_lately =
            self.stop_asked.is_some_and(|(of, how, at)| of == start && how == mode && now.since(at) < Duration::from_millis(STOP_AGAIN_MS));
        if !asked_lately {
            self.stop_asked = Some((start, mode, now));
        }
        !asked_lately
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

    /// Sets a piece of information that never makes a check fail.
    pub fn set_info(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Info, message);
    }

    /// Earliest end of a back-off that is still ahead.
    pub fn next_retry(&self, now: BootTime) -> Option<BootTime> {
        self.backoff.values().map(|backoff| backoff.not_before).filter(|at| *at > now).min()
    }

    /// How often an operation failed since it last succeeded.
    pub fn failures(&self, kind: OperationKind) -> u32 {
        self.backoff.get(&kind).map_or(0, |backoff| backoff.failures)
    }

    /// The job under way.
    pub fn job(&self) -> Option<OperationKind> {
        self.in_flight.iter().copied().find(|kind| kind.is_job())
    }

    /// Sets a warning.
    pub fn warn(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Warning, message);
    }

    /// Sets an error.
    pub fn fail(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Error, message);
    }

    fn set(&mut self, kind: &'static str, severity: Severity, message: String) {
        self.conditions.insert(kind, Condition { kind: kind.to_owned(), severity, message });
    }

    /// Takes a condition back.
    pub fn clear(&mut self, kind: &'static str) {
        self.conditions.remove(kind);
    }

    /// The spec in force.
    pub fn spec(&self) -> Option<&Arc<ClusterSpec>> {
        self.spec.as_ref().map(|(_, spec)| spec)
    }

    /// Ourselves in the spec.
    pub fn declared(&self) -> Option<&Member> {
        self.spec()?.member(&self.me.name)
    }

    /// The lock's times under the spec in force.
    pub fn times(&self) -> Option<LeaseTimes> {
        self.spec().map(|spec| LeaseTimes { ttl: spec.ha.ttl, safety_margin: spec.watchdog.safety_margin, watchdog: None })
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
        self.proved_empty() && !self.in_flight.contains(&OperationKind::Start) && !self.in_flight.contains(&OperationKind::Promote)
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
        match &self.data {
            DataDirectory::Full(control) => Some(control),
            DataDirectory::Unknown | DataDirectory::Empty | DataDirectory::Unusable(_) => None,
        }
    }

    /// The view, if etcd can be asked.
    pub fn fresh_view(&self) -> Option<&Arc<ClusterView>> {
        self.view.as_ref().filter(|_| self.etcd == Etcd::Reachable)
    }

    /// The leader's member key, if another member leads.
    pub fn other_leader(&self) -> Option<(&MemberName, &MemberKey)> {
        let view = self.view.as_ref()?;
        let holder = view.leader.as_ref()?.holder.as_str();
        view.members.iter().find(|(name, _)| name.as_str() == holder && **name != self.me.name)
    }

    /// The timeline id that our lock was taken with: the only one this leadership may write on (I9). None = not known yet.
    pub fn timeline_of(&self, lock: LockIdentity) -> Option<TimelineId> {
        let recorded = self.view.as_ref().filter(|view| view.revision.0 >= lock.epoch.0).and_then(|view| {
            let ours = |entry: &&HistoryEntry| {
                entry.epoch.map_or(entry.member == self.me.name && entry.lease == lock.lease.lease, |epoch| epoch == lock.epoch)
            };
            view.history.iter().rev().find(ours).map(|entry| entry.timeline)
        });
        self.reserved.or(recorded)
    }

    /// The timeline that PostgreSQL is on, running or stopped.
    pub fn own_timeline(&self) -> Option<TimelineId> {
        let stopped = self.control().map(|control| control.timeline.max(control.min_recovery_timeline));
        self.sql().map(|sql| sql.timeline).or(stopped)
    }

    /// Another member leads and its PostgreSQL takes writes.
    pub fn leader_writes(&self) -> bool {
        self.other_leader().is_some_and(|(_, key)| key.record.role == MemberRole::Primary)
    }

    /// The lock is given back or was taken: nothing of it stays.
    pub fn let_go(&mut self, actions: &mut Vec<Action>) {
        if self.lock != Lock::None || self.holding.is_some() {
            actions.push(Action::Lease(LeaseOrder::LetGo));
        }
        self.lock = Lock::None;
        self.holding = None;
        self.reserved = None;
    }

    /// Primaries started within the crash window.
    pub fn recent_primary_starts(&self, now: BootTime) -> usize {
        self.primary_starts.iter().filter(|at| now.since(**at) < Duration::from_secs(CRASH_WINDOW_S)).count()
    }
}
