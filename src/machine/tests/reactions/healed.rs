//! From wherever a member is, and whatever happened to it there: once everything else is well, it comes to rest where it belongs.
//!
//! The outside is the kindest there is: every order is carried out at once and succeeds. The toy cluster is for unkind ones.

use std::sync::Arc;

use crate::clock::BootTime;
use crate::facts::archiving::Archived;
use crate::facts::cluster::{ClusterView, Initialize};
use crate::facts::guard::{GuardFacts, LastEnd, PostmasterFacts, Rung, StartId, Word};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState, Probe, ProbeOutcome, Survey};
use crate::machine::action::{Action, LeaseOrder, Operation, StartAs};
use crate::machine::event::{AcquireOutcome, Configured, Event, Finished, PeersAnswer, PutOutcome};
use crate::machine::state::{State, StateKind};
use crate::machine::tests::checked::Checked;
use crate::machine::tests::fixtures::*;
use crate::machine::world::World;
use crate::policy::rejoin::Rejoin;
use crate::spec::cluster::ClusterSpec;
use crate::types::{LeaseIdentity, LockIdentity, Revision, TimelineId};

use super::happenings::{failure_of, happenings};
use super::worlds::{Case, cases, declared, led_by_b, led_by_us, without_us};

/// Time from one round of news to the next.
const ROUND_MS: u64 = 250;
/// Most events until a member is where it belongs: back-offs of 10 s and a minute of patience with a promotion are the longest.
const EVENTS_MAX: usize = 2_000;
/// Rounds for which it has to stay there.
const CALM_ROUNDS: usize = 8;

/// A member and the kindest of outsides.
struct Healed {
    checked: Checked,
    now: BootTime,
    spec: Arc<ClusterSpec>,
    view: ClusterView,
    guard: GuardFacts,
    data: DataDirectory,
    in_recovery: bool,
    timeline: TimelineId,
    lease: Option<LeaseIdentity>,
    lock: Option<LockIdentity>,
    answers: Vec<Finished>,
    leases: i64,
    exit: bool,
    events: usize,
}

impl Healed {
    fn new(checked: Checked, spec: Arc<ClusterSpec>) -> Self {
        let world = checked.world();
        let ours = world.lock.identity().filter(|lock| world.released != Some(lock.epoch));
        let mut view = if ours.is_some() { led_by_us() } else { led_by_b() };
        view.revision = Revision(600);
        if let (Some(lock), Some(leader)) = (ours.filter(|lock| *lock != super::worlds::ours()), &mut view.leader) {
            // Won a moment ago: its timeline is reserved and not used yet.
            leader.epoch = lock.epoch;
            view.history = vec![recorded(2, "b", 8, 350, 1, 500), entry(world.reserved.map_or(3, |reserved| reserved.0), "a", 7)];
        }
        view.initialize = Some(Initialize::Done(SYSTEM));
        let full = DataDirectory::Full(control(DatabaseState::ShutDown, 2, 1_000));
        let mut known = world.guard.clone().unwrap_or_else(|| guard(0, nothing_runs()));
        if let Some(start) = world.started {
            known.postmaster = running(start.0, Word::Standby);
        }
        Healed {
            now: T0 + ms(ROUND_MS),
            spec,
            view,
            // One that is unusable has been put right by hand, and a server runs in one that is there.
            data: match world.data.clone() {
                DataDirectory::Empty if matches!(known.postmaster, PostmasterFacts::ProvedEmpty { .. }) => DataDirectory::Empty,
                DataDirectory::Full(control) => DataDirectory::Full(control),
                DataDirectory::HalfRewound(attempt) if world.running().is_none() => DataDirectory::HalfRewound(attempt),
                DataDirectory::HalfRewound(_) | DataDirectory::Empty | DataDirectory::Unknown | DataDirectory::Unusable(_) => full,
            },
            guard: GuardFacts { sequence: known.sequence + 1, ..known },
            in_recovery: world.sql().map_or(!matches!(world.running(), Some((_, Word::Writable))), |sql| sql.in_recovery),
            timeline: world.sql().map_or(TimelineId(2), |sql| sql.timeline),
            lease: world.lease.or(world.adopting),
            lock: world.holding,
            answers: world.in_flight.iter().map(|kind| failure_of(*kind)).collect(),
            leases: 100,
            exit: world.exited,
            events: 0,
            checked,
        }
    }

    fn tell(&mut self, event: Event) {
        self.events += 1;
        for action in self.checked.handle(self.now, event) {
            self.perform(action);
        }
    }

    fn round(&mut self) {
        self.now = self.now + ms(ROUND_MS);
        for answer in std::mem::take(&mut self.answers) {
            self.tell(Event::Finished(answer));
        }
        if let PostmasterFacts::Ending { .. } = self.guard.postmaster {
            self.end();
        }
        if self.events < 20 {
            self.tell(Event::SpecRead(1, Arc::clone(&self.spec)));
        }
        self.tell(Event::Guard(self.guard.clone()));
        if let Some(event) = self.of_the_lease() {
            self.tell(Event::Lease(event));
        }
        if let PostmasterFacts::Running { .. } = self.guard.postmaster {
            let outcome = ProbeOutcome::Accepting(Box::new(sql(self.in_recovery, self.timeline.0, 1_000)));
            self.tell(Event::Probed(Probe { begun: self.now, outcome }));
        }
        self.view.revision = Revision(self.view.revision.0 + 1);
        self.tell(Event::View(Arc::new(self.view.clone()), self.now));
        self.tell(Event::Tick);
    }

    fn of_the_lease(&mut self) -> Option<LeaseEvent> {
        let (sent, until) = (self.now, self.now + times().validity());
        self.lease?;
        let Some(lock) = self.lock else { return Some(LeaseEvent::Renewed { sent, until }) };
        if self.view.leader.as_ref().map(|leader| leader.epoch) != Some(lock.epoch) {
            self.lock = None;
            return Some(LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(lock) });
        }
        self.guard.lock = Some(lock_facts(lock, sent));
        Some(LeaseEvent::Proved { lock, sent, until })
    }

    fn says(&mut self, postmaster: PostmasterFacts) {
        self.guard.sequence += 1;
        self.guard.postmaster = postmaster;
    }

    fn starts(&mut self, word: Word) -> StartId {
        let start = StartId(self.checked.world().start_and_phase().0.map_or(0, |start| start.0) + 1);
        let start = start.max(StartId(self.guard.sequence));
        self.in_recovery = word == Word::Standby;
        self.says(running(start.0, word));
        start
    }

    fn end(&mut self) {
        let start = match self.guard.postmaster {
            PostmasterFacts::Running { start, .. } | PostmasterFacts::Ending { start, .. } => start,
            PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. } => return,
        };
        let state = if self.in_recovery { DatabaseState::ShutDownInRecovery } else { DatabaseState::ShutDown };
        self.data = DataDirectory::Full(control(state, self.timeline.0, 1_000));
        let last = LastEnd { start, exit_status: Some(0), signal: None, rung: Some(Rung::FastStop), at: self.now };
        self.says(PostmasterFacts::ProvedEmpty { last: Some(last) });
    }

    /// The lock is free: `b` takes it at once.
    fn b_leads(&mut self) {
        let revision = self.view.revision;
        self.view = ClusterView { revision, ..led_by_b() };
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Do(operation) => {
                let answer = self.carry_out(operation);
                self.answers.push(answer);
            }
            Action::Lease(LeaseOrder::Grant) => {
                self.leases += 1;
                let identity = lease(self.leases);
                self.lease = Some(identity);
                self.tell(Event::Lease(LeaseEvent::Granted { identity, ttl: times().ttl, sent: self.now }));
            }
            Action::Lease(LeaseOrder::Adopt(lease, lock)) => (self.lease, self.lock) = (Some(lease), lock),
            Action::Lease(LeaseOrder::Hold(lock)) => self.lock = Some(lock),
            Action::Lease(LeaseOrder::LetGo) => self.lock = None,
            Action::Lease(LeaseOrder::Failsafe(armed)) => {
                if armed.is_none() {
                    self.tell(Event::Lease(LeaseEvent::Disarmed { at: self.now }));
                }
            }
            Action::Stop(_) => self.end(),
            Action::ForgetLock(_) => self.guard.lock = None,
            Action::AskGuard => {}
            Action::Maintain(word) => self.guard.maintenance = word,
            Action::Leave => self.exit = true,
            Action::Exit(code) => {
                assert_eq!(code, 0);
                self.exit = true;
            }
            Action::CancelJob | Action::Record(_) | Action::AnswerPromise { .. } => {}
        }
    }

    fn carry_out(&mut self, operation: Operation) -> Finished {
        match operation {
            Operation::Look => Finished::Looked(self.data.clone()),
            Operation::Start { role, .. } => {
                let word = if role == StartAs::Primary { Word::Writable } else { Word::Standby };
                Finished::Started(Ok(self.starts(word)))
            }
            Operation::Configure { generation, upstream, .. } => {
                Finished::Configured { generation, upstream, result: Ok(Configured::Taken) }
            }
            Operation::Initdb { .. } => {
                self.data = DataDirectory::Full(control(DatabaseState::ShutDown, 1, 100));
                Finished::Initialized(Ok(()))
            }
            Operation::Clone { .. } | Operation::Rewind { .. } => {
                let rewound = matches!(operation, Operation::Rewind { .. });
                let copy = control(DatabaseState::InProduction, 2, 1_000);
                self.data = DataDirectory::Full(ControlFacts { standby_signal: true, backup_label: true, ..copy });
                self.timeline = TimelineId(2);
                if rewound { Finished::Rewound(Ok(())) } else { Finished::Cloned(Ok(())) }
            }
            Operation::EmptyDirectory { .. } => {
                self.data = DataDirectory::Empty;
                Finished::Emptied(Ok(()))
            }
            Operation::PlanRejoin { .. } => {
                let is_copy = matches!(&self.data, DataDirectory::Full(control) if control.backup_label);
                let why = || "a test".to_owned();
                Finished::RejoinPlanned(Ok(match &self.data {
                    _ if is_copy => Rejoin::Follow,
                    DataDirectory::HalfRewound(attempt) => Rejoin::Rewind { why: why(), lost: attempt.lost },
                    _ => Rejoin::Clone { why: why(), lost: None },
                }))
            }
            Operation::ArchiveLeft { .. } => {
                if let DataDirectory::Full(control) = &mut self.data {
                    control.unarchived = 0;
                }
                Finished::LeftArchived(Ok(Archived { files: 1, ..Archived::default() }))
            }
            Operation::ArchiveBeside { .. } => Finished::BesideArchived(Ok(Archived { files: 1, ..Archived::default() })),
            Operation::Promote { timeline, .. } => {
                (self.in_recovery, self.timeline) = (false, timeline);
                if let PostmasterFacts::Running { start, .. } = self.guard.postmaster {
                    self.says(running(start.0, Word::Writable));
                }
                Finished::PromotionAsked(Ok(()))
            }
            Operation::Open { .. } => Finished::Opened(Ok(())),
            Operation::KeepSlots(_) => Finished::SlotsKept(Ok(())),
            Operation::SetNames { .. } => Finished::NamesSet(Ok(())),
            Operation::WriteSync { .. } => Finished::SyncWritten(Ok((false, self.view.revision))),
            Operation::EnsureRoles { .. } => Finished::RolesEnsured(Ok(())),
            Operation::WriteFailsafe { record, .. } => {
                (self.view.failsafe, self.view.failsafe_revision) = (record, self.view.revision);
                Finished::FailsafeWritten(Ok(Some(self.view.revision)))
            }
            Operation::Checkpoint => Finished::Checkpointed(Ok(())),
            Operation::PutMember(record) => {
                self.view.members.insert(name("a"), key(*record, self.lease.map_or(0, |lease| lease.lease.0)));
                Finished::MemberPut(PutOutcome::Written)
            }
            Operation::Acquire { .. } => Finished::Acquired(AcquireOutcome::Beaten),
            Operation::Release { .. } => {
                self.b_leads();
                Finished::Released(Ok(true))
            }
            Operation::Reaffirm(_) => Finished::Reaffirmed(Ok(Some(self.view.revision))),
            Operation::WriteStatus(_) => Finished::StatusWritten(Ok(true)),
            Operation::RecordPromotion { .. } => Finished::PromotionRecorded(Ok(true)),
            Operation::NoteSuspension { .. } => Finished::SuspensionNoted(Ok(true)),
            Operation::EndMaintenance { .. } => Finished::MaintenanceEnded(Ok(true)),
            Operation::ClaimInitialize => Finished::InitializeClaimed(Ok(false)),
            Operation::GiveUpInitialize => Finished::InitializeGivenUp(Ok(())),
            Operation::AnswerRequest { .. } => Finished::RequestAnswered(Ok(true)),
            Operation::Survey => Finished::Surveyed(Ok(Survey::default())),
            Operation::AskPeers { vacancy, .. } => Finished::PeersAsked(PeersAnswer { vacancy, sent: self.now, writable: Vec::new() }),
            Operation::ReachLeader(_) => Finished::LeaderReached(Ok(())),
            Operation::FenceByScan => {
                self.end();
                self.guard = GuardFacts { pid: self.guard.pid + 1, ..guard(1, nothing_runs()) };
                Finished::FencedByScan(Ok(()))
            }
        }
    }

    /// Where it belongs: out if it was told to stop, at work behind the leader or as the leader, or undeclared where it is not declared.
    fn is_well(&self) -> bool {
        let world: &World = self.checked.world();
        let at_work = |in_recovery| world.sql().is_some_and(|sql| sql.in_recovery == in_recovery) && world.job().is_none();
        let leads = self.view.leader.as_ref().is_some_and(|leader| leader.holder == "a");
        match self.checked.state() {
            _ if world.stop_requested => self.exit,
            State::Undeclared => world.declared().is_none(),
            State::Following => at_work(true) && !leads,
            State::Primary => at_work(false) && leads,
            _ => false,
        }
    }

    /// How many events it took.
    fn comes_to_rest(&mut self, story: &str) -> usize {
        let mut calm = 0;
        let mut well_after = 0;
        while calm < CALM_ROUNDS && !self.exit {
            self.round();
            calm = if self.is_well() { calm + 1 } else { 0 };
            well_after = if calm == 1 { self.events } else { well_after };
            let world = self.checked.world();
            assert!(
                self.events < EVENTS_MAX,
                "not at rest after {:?}: {:?} lock {:?} in flight {:?} conditions {:?} data {:?} guard {:?} leader {:?}\n{story:.600}",
                self.now.since(T0),
                self.checked.state(),
                world.lock,
                world.in_flight,
                world.conditions,
                world.data,
                self.guard,
                self.view.leader,
            );
        }
        well_after
    }
}

fn heals(case: &Case, world: &World, event: Event, spec: Arc<ClusterSpec>) {
    let story = format!("from {} ({}) after {event:?}", case.state.name(), case.what);
    let mut checked = Checked::resume(world.clone(), case.state.clone());
    // What the machine orders now is lost: it has to ask again.
    checked.handle(T0, event);
    let mut healed = Healed::new(checked, spec);
    healed.comes_to_rest(&story);
    let stopped = healed.checked.world().stop_requested;
    assert_eq!(healed.exit, stopped, "{story:.600}");
}

#[test]
fn l1_whatever_happened_in_whatever_state_a_member_comes_to_rest_when_all_else_is_well() {
    for case in StateKind::ALL.iter().flat_map(|state| cases(*state)) {
        for (world, event) in happenings(&case.world) {
            heals(&case, &world, event, declared());
        }
    }
}

#[test]
fn a_member_that_is_not_declared_comes_to_rest_too_when_all_else_is_well() {
    for case in StateKind::ALL.iter().flat_map(|state| cases(*state)) {
        heals(&case, &case.world, Event::Tick, without_us());
    }
}
