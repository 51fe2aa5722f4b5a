//! Representatives of every kind of event, plausible in a given world: what the guard says next is about the server it keeps, a proof is
//! of the lock that is held, and an answer is to what is under way.

use std::sync::Arc;

use crate::clock::BootTime;
use crate::facts::archiving::{Archived, Unarchived};
use crate::facts::cluster::{ClusterView, Initialize, MemberRole};
use crate::facts::failsafe::PromiseAsk;
use crate::facts::guard::{GuardFacts, LastEnd, PostmasterFacts, Rung, StartId, Word};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::facts::postgres::{DataDirectory, DatabaseState, Probe, ProbeOutcome, Survey};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::machine::action::OperationKind;
use crate::machine::event::{AcquireOutcome, Configured, Event, Finished, ForeignKey, Kept, PeersAnswer, PutOutcome};
use crate::machine::tests::fixtures::*;
use crate::machine::world::{Lock, World};
use crate::policy::rejoin::Rejoin;
use crate::types::{LeaseId, LockIdentity, Revision};

use super::worlds::{declared, led_by_b, led_by_us, ours, vacant, without_us};

fn why() -> String {
    "a test".to_owned()
}

/// Everything that may happen in a world. An answer brings the operation with it that it is the answer to.
pub(super) fn happenings(world: &World) -> Vec<(World, Event)> {
    let mut all = vec![Event::Tick, Event::GuardGone, Event::StopRequested];
    all.extend([Event::EtcdUnreachable(why()), Event::EtcdSuspicious(why())]);
    all.extend([Some(why()), None].map(Event::Routed));
    all.extend(specs());
    all.extend(views(world).into_iter().map(|view| Event::View(Arc::new(view), T0)));
    all.extend(of_the_lease(world).into_iter().map(Event::Lease));
    all.extend(of_the_guard(world));
    all.extend(probes());
    let mut all: Vec<_> = all.into_iter().map(|event| (world.clone(), event)).collect();
    all.extend(calls(world));
    all.extend([world.clone(), with_a_schedule(world)].map(|world| (world, Event::WallClock(2_000))));
    all.extend(answers().into_iter().filter_map(|finished| Some((asked(world, &finished)?, Event::Finished(finished)))));
    all
}

fn specs() -> Vec<Event> {
    let hasty = spec_with(
        &["a", "b, failover_priority: 0", "c, failover_priority: 0"],
        "ha: { ttl: 10s, loop_wait: 5s, primary_start_timeout: 1s }",
    );
    vec![
        Event::SpecRead(1, declared()),
        Event::SpecRead(2, hasty),
        Event::SpecRead(3, without_us()),
        Event::SpecUnreadable(4, "spec.members: missing".to_owned()),
    ]
}

fn views(world: &World) -> Vec<ClusterView> {
    let at_a_later_revision = |view: ClusterView| ClusterView { revision: Revision(500), ..view };
    let mut promotes = led_by_b();
    promotes.members.insert(name("b"), key(record(MemberRole::Replica, 2, 1_000), 8));
    let mut asked = led_by_us();
    let record = RequestRecord { ask: Ask::Switchover { to: name("c") }, by: why(), at: String::new(), progress: RequestProgress::Created };
    asked.requests.insert("7".to_owned(), RequestKey { record, mod_revision: Revision(450) });
    let mut unborn = ClusterView { history: Vec::new(), ..vacant() };
    unborn.initialize = Some(Initialize::Claimed { by: "b".to_owned(), lease: LeaseId(8) });
    let without_spec = ClusterView { spec: None, ..led_by_b() };
    let mut views: Vec<_> = [led_by_b(), promotes, vacant(), asked, unborn, without_spec].into_iter().map(at_a_later_revision).collect();
    views.extend(world.view.as_deref().cloned());
    // Older than our lock, which it does not know of.
    views.push(ClusterView { revision: Revision(299), ..vacant() });
    views
}

/// A switchover, and a restart of this member, are scheduled for the second 2,000.
fn with_a_schedule(world: &World) -> World {
    let mut view = world.view.as_deref().cloned().unwrap_or_default();
    let ask = Ask::ScheduledSwitchover { to: name("c"), at_s: 2_000 };
    let record = RequestRecord { ask, by: why(), at: String::new(), progress: RequestProgress::Created };
    view.requests.insert("8".to_owned(), RequestKey { record, mod_revision: Revision(450) });
    let ask = Ask::Restart { on: name("a"), if_leader: None, if_pending: false, at_s: Some(2_000) };
    let record = RequestRecord { ask, by: why(), at: String::new(), progress: RequestProgress::Created };
    view.requests.insert("9".to_owned(), RequestKey { record, mod_revision: Revision(451) });
    World { view: world.view.as_ref().map(|_| Arc::new(view)), ..world.clone() }
}

fn of_the_lease(world: &World) -> Vec<LeaseEvent> {
    let until = T0 + times().validity();
    let mut events = vec![
        LeaseEvent::Granted { identity: world.lease.unwrap_or(lease(7)), ttl: times().ttl, sent: T0 },
        LeaseEvent::Granted { identity: lease(17), ttl: times().ttl, sent: T0 },
        LeaseEvent::Renewed { sent: T0, until },
        LeaseEvent::Failed { why: why() },
        LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound },
        LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(world.lock.identity().unwrap_or(lock(7, 300))) },
        LeaseEvent::GuardSilent,
    ];
    if let Some(from) = world.lease {
        events.push(LeaseEvent::Moved { from, to: lease(17) });
    }
    // Of the lock, or of one that was let go while the proof was on its way.
    let lock = world.lock.identity().or(world.lease.map(|lease| LockIdentity { lease, ..lock(0, 200) }));
    let (sent, until) = (T0 + ms(100), until + ms(100));
    events
        .extend(lock.into_iter().flat_map(|lock| [LeaseEvent::Proved { lock, sent, until }, LeaseEvent::Sustained { lock, sent, until }]));
    events
}

/// A leader without etcd calls: one that this member saw lead last, and one that it knows nothing of.
fn calls(world: &World) -> Vec<(World, Event)> {
    let caller = leader("c", 9, 200);
    let ask = PromiseAsk {
        cluster: "main".parse().unwrap(),
        to: world.me.name.clone(),
        member: name("c"),
        epoch: caller.epoch,
        lease: caller.lease,
        ttl_s: times().ttl.as_secs(),
    };
    let mut known = world.clone();
    known.failsafe.leader_seen = Some(caller);
    [known, world.clone()].map(|world| (world, Event::PromiseAsked { id: 1, ask: ask.clone(), received: T0 })).into()
}

fn of_the_guard(world: &World) -> Vec<Event> {
    let known = world.guard.clone().unwrap_or_else(|| guard(0, nothing_runs()));
    let start = world.start_and_phase().0.unwrap_or(StartId(1));
    let next = StartId(start.0 + 1);
    let ended = LastEnd { start, exit_status: Some(1), signal: None, rung: None, at: T0 };
    let postmasters = [
        nothing_runs(),
        PostmasterFacts::ProvedEmpty { last: Some(ended) },
        PostmasterFacts::ProvedEmpty { last: Some(LastEnd { exit_status: None, signal: Some(9), ..ended }) },
        PostmasterFacts::ProvedEmpty { last: Some(LastEnd { exit_status: Some(0), rung: Some(Rung::FastStop), ..ended }) },
        PostmasterFacts::Unclaimed { pids: vec![4_000] },
        running(start.0, Word::Standby),
        running(start.0, Word::Writable),
        running(next.0, Word::Standby),
        running(next.0, Word::Writable),
        PostmasterFacts::Ending { start, rung: Rung::Announce, word: Word::Standby },
        PostmasterFacts::Ending { start, rung: Rung::FastStop, word: Word::Writable },
        PostmasterFacts::Ending { start, rung: Rung::KillAll, word: Word::Writable },
    ];
    let mut events = Vec::new();
    for postmaster in postmasters {
        let facts = GuardFacts { sequence: known.sequence + 1, postmaster, ..known.clone() };
        // The same from a guard that took this one's place: it knows of no lock.
        let another = GuardFacts { sequence: 1, pid: known.pid + 1, lock: None, ..facts.clone() };
        events.extend([Event::Guard(facts), Event::Guard(another)]);
    }
    events
}

fn probes() -> Vec<Event> {
    let outcomes = [
        ProbeOutcome::Accepting(Box::new(sql(true, 2, 1_100))),
        ProbeOutcome::Accepting(Box::new(sql(false, 2, 1_100))),
        ProbeOutcome::Accepting(Box::new(sql(false, 3, 1_100))),
        ProbeOutcome::NotYet("the database system is starting up".to_owned()),
        ProbeOutcome::Unknown("no answer in time".to_owned()),
    ];
    let mut events: Vec<_> = outcomes.into_iter().map(|outcome| Event::Probed(Probe { begun: T0, outcome })).collect();
    // Of a server that is not there any more.
    events.push(Event::Probed(probe(BootTime(1), sql(false, 2, 1_100))));
    events
}

/// Every end of every operation.
fn answers() -> Vec<Finished> {
    let full = |state| Finished::Looked(DataDirectory::Full(control(state, 2, 1_000)));
    let mut all = vec![
        Finished::Looked(DataDirectory::Empty),
        full(DatabaseState::ShutDown),
        full(DatabaseState::ShutDownInRecovery),
        full(DatabaseState::InProduction),
        Finished::Looked(DataDirectory::Unusable("no control file".to_owned())),
        Finished::Looked(DataDirectory::Unknown),
        Finished::Looked(DataDirectory::HalfRewound(Box::new(half_rewound()))),
        Finished::KeptSeen(Box::new(Kept { directory: Some("/kept".to_owned()), lost: vec![lost_writes()], ..Kept::default() })),
        Finished::KeptSeen(Box::default()),
        Finished::WritesLost(Box::new(lost_writes())),
        Finished::SegmentsCompleted(Vec::new()),
        Finished::Started(Ok(StartId(2))),
        Finished::StartedOnOldFiles { generation: 1, start: StartId(2), why: why() },
        Finished::MemberPut(PutOutcome::Written),
        Finished::MemberPut(PutOutcome::Foreign(ForeignKey { lease: LeaseId(77), ttl: times().ttl, term: 2 })),
        Finished::MemberPut(PutOutcome::Failed(why())),
        Finished::Acquired(AcquireOutcome::Won(lock(7, 450))),
        Finished::Acquired(AcquireOutcome::Beaten),
        Finished::Acquired(AcquireOutcome::SpecMoved),
        Finished::Acquired(AcquireOutcome::Failed(why())),
        Finished::Surveyed(Ok(Survey::default())),
        Finished::Surveyed(Err(why())),
        Finished::PeersAsked(PeersAnswer { vacancy: Revision(350), sent: T0, writable: Vec::new() }),
        Finished::PeersAsked(PeersAnswer { vacancy: Revision(350), sent: T0, writable: vec![name("b")] }),
        Finished::RejoinPlanned(Ok(Rejoin::Clone { why: why(), lost: None })),
        Finished::RejoinPlanned(Ok(Rejoin::Rewind { why: why(), lost: half_rewound().lost })),
        Finished::RejoinPlanned(Ok(Rejoin::Wait { why: why() })),
        Finished::RejoinPlanned(Ok(Rejoin::Refuse { why: why() })),
        Finished::RejoinPlanned(Ok(Rejoin::Follow)),
        Finished::Started(Err(why())),
        Finished::RejoinPlanned(Err(why())),
    ];
    for result in [Ok(Configured::Taken), Ok(Configured::PutBack(why())), Err(why())] {
        all.push(Finished::Configured { generation: 1, upstream: None, result });
    }
    for done in [
        Finished::Initialized,
        Finished::Cloned,
        Finished::PromotionAsked,
        Finished::RolesEnsured,
        Finished::Checkpointed,
        Finished::NamesSet,
        Finished::Opened,
        Finished::SlotsKept,
    ] {
        all.extend([done(Ok(())), done(Err(why()))]);
    }
    for done in [Finished::InitializeGivenUp, Finished::FencedByScan] {
        all.extend([done(Ok(())), done(Err(why()))]);
    }
    for done in [Finished::Released, Finished::StatusWritten, Finished::PromotionRecorded, Finished::InitializeClaimed] {
        all.extend([done(Ok(true)), done(Ok(false)), done(Err(why()))]);
    }
    for done in [Finished::RequestAnswered, Finished::SuspensionNoted, Finished::MaintenanceEnded] {
        all.extend([Ok(true), Ok(false), Err(why())].map(done));
    }
    for done in [Finished::LeftArchived, Finished::BesideArchived] {
        let left = Unarchived { files: 1, first: "a".to_owned(), last: "a".to_owned(), place: "/beside".to_owned() };
        let put_beside = Archived { files: 1, beside: Some(left), why: Some(why()) };
        all.extend([Ok(Archived { files: 1, ..Archived::default() }), Ok(put_beside), Err(why())].map(done));
    }
    all.extend([Ok(()), Err(why())].map(Finished::Rewound));
    all.extend([Ok(Some(Revision(30))), Ok(None), Err(why())].map(Finished::Reaffirmed));
    all.extend([Ok((true, Revision(30))), Ok((false, Revision(30))), Err(why())].map(Finished::SyncWritten));
    all
}

/// The world in which this answer is waited for. None where it cannot be: nobody runs for a lock that is held, or gives back one that
/// PostgreSQL writes under.
fn asked(world: &World, finished: &Finished) -> Option<World> {
    let mut world = world.clone();
    let Some(kind) = finished.kind() else { return Some(world) };
    if kind.is_job() {
        world.in_flight.retain(|other| !other.is_job());
    }
    world.in_flight.insert(kind);
    match finished {
        Finished::Released(_) if world.lock == Lock::None || !world.cannot_write(T0) => return None,
        Finished::Acquired(_) if world.lock != Lock::None => return None,
        Finished::Reaffirmed(_) if world.lock == Lock::None => return None,
        Finished::Reaffirmed(_) => world.asked.reaffirming = Some(ours().epoch),
        Finished::Released(_) => {
            world.asked.releasing = Some(ours().epoch);
            world.sure_of = None;
        }
        _ => {}
    }
    Some(world)
}

/// The end of an operation that was under way and of which nothing came.
pub(super) fn failure_of(kind: OperationKind) -> Finished {
    answers().into_iter().rev().find(|finished| finished.kind() == Some(kind)).unwrap_or_else(|| panic!("no answer to {kind:?}"))
}
