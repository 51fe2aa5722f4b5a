//! For each state, worlds in which a member rests there: left alone at that moment, it stays. Each is there for what it shows of an event.
//!
//! The member is `a` of three. `b` leads unless the lock is ours; ours is always the same. Where a server may write at all, one
//! world has one that does, and where one may run, it is tried what happens if it turns out to be out of recovery: what must always win
//! has to win there.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Initialize, MemberRole};
use crate::facts::guard::{Maintenance, PostmasterFacts, Rung, StartId, Word};
use crate::facts::maintenance::{MaintenanceRecord, Phase};
use crate::facts::postgres::{DataDirectory, DatabaseState};
use crate::machine::action::{OperationKind, Upstream};
use crate::machine::event::PeersAnswer;
use crate::machine::requests::{Restart, RestartStage};
use crate::machine::state::{Demotion, HandOver, HandOverStage, Promotion, State, StateKind, Then, Way};
use crate::machine::tests::fixtures::*;
use crate::machine::world::{Etcd, InForce, Lock, Vacancy, World};
use crate::spec::cluster::ClusterSpec;
use crate::types::{Epoch, LeaseId, LockIdentity, Revision, TimelineId};

/// A member in a state.
pub(crate) struct Case {
    pub(crate) what: &'static str,
    pub(crate) state: State,
    pub(crate) world: World,
}

fn case(what: &'static str, state: State, world: World) -> Case {
    Case { what, state, world }
}

pub(crate) fn declared() -> Arc<ClusterSpec> {
    spec(&["a", "b", "c"])
}

pub(crate) fn without_us() -> Arc<ClusterSpec> {
    spec(&["b", "c"])
}

/// The lock, whenever it is ours.
pub(crate) fn ours() -> LockIdentity {
    lock(7, 300)
}

fn upstream() -> Option<Upstream> {
    Some(Upstream { member: name("b"), host: "10.0.0.9".to_owned(), port: 5432, keeps_slots: false })
}

/// `b` leads on timeline 2.
pub(crate) fn led_by_b() -> ClusterView {
    let mut view = vacant();
    view.leader = Some(leader("b", 8, 350));
    view.members.insert(name("b"), key(record(MemberRole::Primary, 2, 1_000), 8));
    view
}

/// `a` leads, on timeline 2 and under [`ours`].
pub(crate) fn led_by_us() -> ClusterView {
    let mut view = vacant();
    view.leader = Some(leader("a", 7, 300));
    view.history = vec![recorded(2, "a", 7, 300, 1, 500)];
    view.members.insert(name("a"), key(record(MemberRole::Primary, 2, 1_000), 7));
    view
}

/// Nobody leads; all three are replicas.
pub(crate) fn vacant() -> ClusterView {
    let mut view = view(400);
    view.history_revision = Revision(350);
    view.history = vec![recorded(2, "b", 8, 350, 1, 500)];
    for (member, lease) in [("a", 7), ("b", 8), ("c", 9)] {
        view.members.insert(name(member), key(record(MemberRole::Replica, 2, 1_000), lease));
    }
    view
}

/// Nothing of PostgreSQL runs and everything else is as it should be.
pub(crate) fn idle() -> World {
    let mut world = World::new(me("a"));
    world.spec = Some((1, declared()));
    world.view = Some(Arc::new(led_by_b()));
    world.view_as_of = T0;
    world.etcd = Etcd::Reachable;
    world.lease = Some(lease(7));
    world.lease_asked = true;
    world.lease_asked_at = T0;
    world.guard = Some(guard(1, nothing_runs()));
    world.written = Some((record(MemberRole::Replica, 2, 1_000), T0));
    world.looked_at = T0;
    world.in_force = Some(InForce { generation: 1, upstream: upstream() });
    world.promoted = Some(None);
    world
}

pub(crate) fn busy(mut world: World, kind: OperationKind) -> World {
    world.in_flight.insert(kind);
    world
}

pub(crate) fn empty() -> World {
    World { data: DataDirectory::Empty, ..idle() }
}

pub(crate) fn full(state: DatabaseState) -> World {
    World { data: DataDirectory::Full(control(state, 2, 1_000)), ..idle() }
}

/// A standby runs and streams.
pub(crate) fn standby() -> World {
    World { guard: Some(guard(1, running(1, Word::Standby))), probe: Some(probe(T0, sql(true, 2, 1_000))), ..idle() }
}

/// The lock is ours, and etcd says so too.
pub(crate) fn locked(world: World, lock: Lock) -> World {
    let sure_of = lock.identity().map(|lock| lock.epoch);
    World { lock, holding: lock.identity(), sure_of, view: Some(Arc::new(led_by_us())), ..world }
}

pub(crate) fn proved() -> Lock {
    let deadlines = times().deadlines(T0);
    Lock::Proved { identity: ours(), until: deadlines.valid_until, announce_at: deadlines.announce_at }
}

/// PostgreSQL takes writes under the proved lock.
fn writes() -> World {
    let mut world = locked(standby(), proved());
    world.guard = Some(guard(1, running(1, Word::Writable)));
    world.probe = Some(probe(T0, sql(false, 2, 1_000)));
    world
}

/// Locks of no use here: they are given back.
fn useless(what: &'static str, state: State) -> Case {
    case(what, state, busy(locked(idle(), Lock::Unproved(ours())), OperationKind::Look))
}

/// All that a state is tried in.
pub(crate) fn cases(kind: StateKind) -> Vec<Case> {
    match kind {
        StateKind::Starting => starting(),
        StateKind::Undeclared => undeclared(),
        StateKind::AwaitingLeader => awaiting_leader(),
        StateKind::Initializing => initializing(),
        StateKind::Cloning => cloning(),
        StateKind::Following => following(),
        StateKind::Candidate => candidate(),
        StateKind::Rejoining => rejoining(),
        StateKind::Promoting => promoting(),
        StateKind::Primary => primary(),
        StateKind::HandingOver => handing_over(),
        StateKind::Restarting => restarting(),
        StateKind::Demoting => demoting(),
        StateKind::Paused => paused(),
        StateKind::Stopping => stopping(),
    }
}

fn starting() -> Vec<Case> {
    let mut unread = World::new(me("a"));
    unread.guard = Some(guard(1, running(1, Word::Standby)));
    let mut adopted = locked(writes(), Lock::Unproved(ours()));
    adopted.lease = None;
    adopted.adopting = Some(lease(7));
    let looks = World { written: idle().written, ..busy(idle(), OperationKind::Look) };
    vec![
        case("nothing was met yet", State::Starting, World::new(me("a"))),
        case("a standby runs and there is no spec yet", State::Starting, unread),
        case("the guard's lock is not proved yet", State::Starting, adopted),
        case("the data directory is being looked at", State::Starting, looks),
    ]
}

fn undeclared() -> Vec<Case> {
    let of = |world: World| World { spec: Some((1, without_us())), ..world };
    vec![
        case("nothing runs", State::Undeclared, World { lease: None, ..of(idle()) }),
        case("a standby runs", State::Undeclared, of(standby())),
        case("a lock is left", State::Undeclared, of(locked(idle(), Lock::Unproved(ours())))),
        case("PostgreSQL takes writes", State::Undeclared, of(writes())),
    ]
}

fn awaiting_leader() -> Vec<Case> {
    let mut not_yet = empty();
    let mut view = led_by_b();
    view.members.insert(name("b"), key(record(MemberRole::Replica, 2, 1_000), 8));
    not_yet.view = Some(Arc::new(view));
    vec![
        case("the leader is not a primary yet", State::AwaitingLeader, not_yet),
        case("the directory is being looked at", State::AwaitingLeader, busy(idle(), OperationKind::Look)),
        useless("a lock is left", State::AwaitingLeader),
    ]
}

/// A cluster that does not exist yet; its right to initialize is ours, or nobody's.
fn unborn(world: World, claimed: bool) -> World {
    let mut view = ClusterView { history: Vec::new(), ..vacant() };
    view.initialize = claimed.then(|| Initialize::Claimed { by: "a".to_owned(), lease: LeaseId(7) });
    for key in view.members.values_mut() {
        key.record = empty_record();
    }
    World { view: Some(Arc::new(view)), written: Some((empty_record(), T0)), ..world }
}

fn initializing() -> Vec<Case> {
    vec![
        case("the claim is ours", State::Initializing, unborn(empty(), true)),
        case("there is no lease to claim on", State::Initializing, World { lease: None, ..unborn(empty(), false) }),
        case("initdb is done", State::Initializing, busy(unborn(full(DatabaseState::ShutDown), true), OperationKind::Acquire)),
    ]
}

fn cloning() -> Vec<Case> {
    let mut failed = empty();
    failed.retry_later(T0, OperationKind::Clone);
    vec![
        case("the copy is being made", State::Cloning, busy(idle(), OperationKind::Clone)),
        case("the last copy failed", State::Cloning, failed),
        useless("a lock is left", State::Cloning),
    ]
}

fn following() -> Vec<Case> {
    let mut idle_lock = locked(standby(), Lock::Unproved(ours()));
    idle_lock.idle_lock_since = Some(BootTime(T0.0 - Duration::from_secs(400).as_nanos() as u64));
    let mut orphan = standby();
    orphan.view = Some(Arc::new(led_by_us()));
    orphan.lease = None;
    orphan.adopting = Some(lease(7));
    vec![
        case("it streams", State::Following, standby()),
        case("the directory is being looked at", State::Following, busy(idle(), OperationKind::Look)),
        case("a lock has not been proved for long", State::Following, idle_lock),
        case("the lock hangs on the lease that is being adopted", State::Following, orphan),
    ]
}

fn candidate() -> Vec<Case> {
    let since = BootTime(T0.0 - Duration::from_secs(30).as_nanos() as u64);
    let mut runs = World { view: Some(Arc::new(vacant())), ..standby() };
    runs.vacancy = Some(Vacancy { id: Revision(350), seen: since });
    runs.peers = Some(PeersAnswer { vacancy: Revision(350), sent: T0, writable: Vec::new() });
    let asks = World { peers: None, ..busy(runs.clone(), OperationKind::AskPeers) };
    vec![
        case("its turn has come", State::Candidate, runs.clone()),
        case("there is no lease to run on", State::Candidate, World { lease: None, ..runs.clone() }),
        case("it runs", State::Candidate, World { reserved: Some(TimelineId(3)), ..busy(runs, OperationKind::Acquire) }),
        case("its peers are being asked", State::Candidate, asks),
    ]
}

/// A rewind broke off.
fn half() -> World {
    World { data: DataDirectory::HalfRewound(Box::new(half_rewound())), ..idle() }
}

fn rejoining() -> Vec<Case> {
    let mut judged = busy(full(DatabaseState::ShutDown), OperationKind::PlanRejoin);
    judged.planned_for = Some(Epoch(350));
    let mut archives = busy(full(DatabaseState::ShutDown), OperationKind::ArchiveLeft);
    archives.spec = Some((1, spec_with(&["a", "b", "c"], "postgres: { archive_command: cp %p /archive/%f }")));
    archives.left.ready = 2;
    vec![
        case("the way back is being judged", State::Rejoining, judged),
        case("the way back is to be judged", State::Rejoining, full(DatabaseState::ShutDown)),
        case("PostgreSQL is being stopped", State::Rejoining, standby()),
        case("what is left is being archived", State::Rejoining, archives),
        case("it is half rewound", State::Rejoining, half()),
        case("it is being rewound", State::Rejoining, busy(half(), OperationKind::Rewind)),
        useless("a lock is left", State::Rejoining),
    ]
}

fn promoting() -> Vec<Case> {
    let since = BootTime(T0.0 - Duration::from_secs(2).as_nanos() as u64);
    let state = |way| State::Promoting { promotion: Promotion { lock: ours(), way, since } };
    let reserved = |world: World| World { reserved: Some(TimelineId(3)), ..world };
    let mut vouched = reserved(busy(locked(standby(), proved()), OperationKind::Promote));
    vouched.guard = Some(guard(1, running(1, Word::Writable)));
    let promote = Way::Promote { timeline: TimelineId(3) };
    vec![
        case("the lock is not proved yet", state(promote), reserved(locked(standby(), Lock::Unproved(ours())))),
        case("it is being promoted", state(promote), vouched),
        case(
            "it ended and the lock is not proved",
            state(Way::StartInPlace),
            locked(full(DatabaseState::InProduction), Lock::Unproved(ours())),
        ),
        case("it ended and is being looked at", state(Way::StartInPlace), busy(locked(idle(), proved()), OperationKind::Look)),
        case("a standby is in the way", state(Way::StartInPlace), locked(standby(), proved())),
    ]
}

/// A primary at work, with a standby.
pub(crate) fn leads() -> World {
    World { roles_for: Some(StartId(1)), in_force: Some(InForce { generation: 1, upstream: None }), ..writes() }
}

fn primary() -> Vec<Case> {
    let mut unrecorded = leads();
    let mut view = led_by_us();
    view.history = vec![entry(2, "a", 7)];
    unrecorded.view = Some(Arc::new(view));
    let mut alone = busy(leads(), OperationKind::EnsureRoles);
    let mut view = led_by_us();
    view.members.retain(|member, _| *member == name("a"));
    alone.view = Some(Arc::new(view));
    alone.roles_for = None;
    let alone_at_rest = World { roles_for: Some(StartId(1)), in_flight: Default::default(), ..alone.clone() };
    vec![
        case("it works", State::Primary, leads()),
        case("its promotion is not recorded", State::Primary, unrecorded),
        case("its roles are being seen to", State::Primary, World { in_force: None, ..alone }),
        case("it works alone", State::Primary, alone_at_rest),
    ]
}

fn handing_over() -> Vec<Case> {
    let state = |stage| {
        let (to, request) = (Some(name("c")), Some("1".to_owned()));
        State::HandingOver { hand_over: HandOver { stage, ..HandOver::new(ours(), to, request, T0) } }
    };
    let taken_for_a_standby = World { guard: Some(guard(1, running(1, Word::Standby))), probe: None, ..leads() };
    let mut waits = locked(full(DatabaseState::ShutDown), proved());
    let mut view = led_by_us();
    view.members.insert(name("c"), key(record(MemberRole::Replica, 2, 900), 9));
    waits.view = Some(Arc::new(view));
    vec![
        case("the checkpoint is being made", state(HandOverStage::Checkpoint), busy(leads(), OperationKind::Checkpoint)),
        case("PostgreSQL is being stopped", state(HandOverStage::Stop), leads()),
        case("it is taken for a standby", state(HandOverStage::Stop), taken_for_a_standby),
        case("the successor lacks the last record", state(HandOverStage::Wait { since: T0 }), waits),
    ]
}

/// It has begun, and got so far.
pub(crate) fn restarts(world: World, stage: RestartStage) -> World {
    let mut world = world;
    world.requests.tried.insert("1".to_owned());
    world.requests.restart = Some(Restart {
        request: Some("1".to_owned()),
        was: Some(StartId(1)),
        leads: true,
        copies: 0,
        lag: 0,
        since: T0,
        stage,
        stage_since: T0,
        stages: Vec::new(),
        end: None,
    });
    world
}

fn restarting() -> Vec<Case> {
    let taken_for_a_standby = World { guard: Some(guard(1, running(1, Word::Standby))), probe: None, ..leads() };
    let checkpoint = busy(leads(), OperationKind::Checkpoint);
    vec![
        case("the checkpoint is being made", State::Restarting, restarts(checkpoint, RestartStage::Checkpoint)),
        case("PostgreSQL is being stopped", State::Restarting, restarts(leads(), RestartStage::Stop)),
        case("it is taken for a standby", State::Restarting, restarts(taken_for_a_standby, RestartStage::Stop)),
    ]
}

fn demoting() -> Vec<Case> {
    let state = |then| State::Demoting { demotion: Demotion { why: "a test".to_owned(), then } };
    let mut releases = busy(locked(idle(), Lock::Unproved(ours())), OperationKind::Release);
    releases.asked.releasing = Some(ours().epoch);
    let by_scan = World { guard: None, guard_gone: true, ..busy(idle(), OperationKind::FenceByScan) };
    let ending = PostmasterFacts::Ending { start: StartId(1), rung: Rung::KillAll, word: Word::Writable };
    vec![
        case("it takes writes without a lock", state(Then::Follow), World { lock: Lock::None, holding: None, ..writes() }),
        case("it takes writes under the lock", state(Then::StartAgain(ours())), writes()),
        case("it is being ended", state(Then::StartAgain(ours())), World { guard: Some(guard(1, ending)), ..locked(idle(), proved()) }),
        case("the lock is being given back", state(Then::Release(ours())), releases),
        case("the guard is gone", state(Then::Follow), by_scan),
    ]
}

/// Maintenance mode is on, or ending, in this view.
pub(crate) fn maintained(world: World, phase: Phase) -> World {
    let mut view = world.view.as_deref().cloned().unwrap_or_default();
    let (by, why) = ("dba".to_owned(), "a test".to_owned());
    view.maintenance = Some(MaintenanceRecord { by, why, at: String::new(), until: None, phase });
    view.maintenance_revision = Revision(390);
    World { view: Some(Arc::new(view)), ..world }
}

/// The guard has heard of it, and suspends.
pub(crate) fn suspended(mut world: World) -> World {
    world.asked.suspended = Some(Revision(390));
    if let Some(guard) = &mut world.guard {
        guard.maintenance = Maintenance { revision: Revision(390), suspends: true };
        guard.lock = Some(lock_facts(ours(), T0));
    }
    world
}

fn paused() -> Vec<Case> {
    let mut lapsed = suspended(maintained(leads(), Phase::On));
    (lapsed.lock, lapsed.holding, lapsed.lease) = (Lock::None, None, None);
    let ending = suspended(maintained(World { lock: Lock::Unproved(ours()), ..leads() }, Phase::Ending));
    let vacant = World { view: Some(Arc::new(vacant())), ..standby() };
    vec![
        case("it writes under the lock", State::Paused, suspended(maintained(leads(), Phase::On))),
        case("it writes without the lock", State::Paused, lapsed),
        case("the guard has not heard of it yet", State::Paused, maintained(World { recorded: Some(ours().epoch), ..leads() }, Phase::On)),
        case("a standby runs", State::Paused, maintained(standby(), Phase::On)),
        case("nothing runs", State::Paused, maintained(full(DatabaseState::ShutDown), Phase::On)),
        case("it ends, and the lock is not proved", State::Paused, ending),
        case("nobody leads, and it ends", State::Paused, maintained(vacant, Phase::Ending)),
    ]
}

fn stopping() -> Vec<Case> {
    let of = |world: World| World { stop_requested: true, ..world };
    let mut releases = busy(locked(idle(), Lock::Unproved(ours())), OperationKind::Release);
    releases.asked.releasing = Some(ours().epoch);
    vec![
        case("it takes writes under the lock", State::Stopping, of(writes())),
        case("a standby runs", State::Stopping, of(standby())),
        case("the lock is being given back", State::Stopping, of(releases)),
    ]
}
