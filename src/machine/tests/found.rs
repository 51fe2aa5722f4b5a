//! What simulated clusters found in the machine, each fault as small as it gets: first single members, then the toy clusters in which a
//! sequence of faults is the point.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, HistoryEntry, MemberRole};
use crate::facts::guard::{StartId, Word};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::facts::postgres::{DataDirectory, DatabaseState, Probe, SqlFacts, WalReceiverFacts};
use crate::machine::action::{Action, LeaseOrder, Old, Operation, OperationKind, StartAs, StopMode};
use crate::machine::bookkeeping::Asked;
use crate::machine::event::{Event, Finished, ForeignKey, PeersAnswer, PutOutcome};
use crate::machine::receiving::Receiving;
use crate::machine::state::{Promotion, State, Way};
use crate::machine::world::{Lock, World};
use crate::types::{Epoch, LeaseId, Revision, TimelineId};

use super::checked::Checked;
use super::cluster::{THREE, s};
use super::fixtures::*;
use super::reactions::worlds::{busy, empty, full, idle, leads, led_by_b, led_by_us, locked, ours, proved, standby, vacant, without_us};
use super::toy::Toy;

/// The operations that were ordered.
pub(super) fn operations(actions: &[Action]) -> Vec<OperationKind> {
    let ordered = |action: &Action| if let Action::Do(operation) = action { Some(operation.kind()) } else { None };
    actions.iter().filter_map(ordered).collect()
}

/// Whom the running server is told to follow.
fn told_to_follow(actions: &[Action]) -> Option<&str> {
    actions.iter().find_map(|action| match action {
        Action::Do(Operation::Configure { upstream: Some(upstream), .. }) => Some(upstream.member.as_str()),
        _ => None,
    })
}

pub(super) fn starts(actions: &[Action], wanted: &StartAs) -> bool {
    actions.iter().any(|action| matches!(action, Action::Do(Operation::Start { role, .. }) if role == wanted))
}

fn seen(view: ClusterView) -> Event {
    Event::View(Arc::new(view), T0)
}

fn finds(checked: &mut Checked, found: DataDirectory) -> Vec<Action> {
    checked.handle(T0, Event::Finished(Finished::Looked(found)))
}

/// A server in recovery that has nobody to receive from.
fn waiting(begun: BootTime, timeline: u32) -> Probe {
    let waiting = WalReceiverFacts { status: "waiting".to_owned(), sender_host: None, sender_port: None, latest_end_lsn: None };
    probe(begun, SqlFacts { walreceiver: Some(waiting), ..sql(true, timeline, 1_000) })
}

/// `c` took the lock for this timeline and is this by now.
fn led_by_c(revision: i64, role: MemberRole, before: &[HistoryEntry], timeline: u32) -> ClusterView {
    let mut view = vacant();
    (view.revision, view.history_revision) = (Revision(revision), Revision(500));
    view.leader = Some(leader("c", 9, 500));
    view.history = before.to_vec();
    view.history.push(entry(timeline, "c", 9));
    let at = if role == MemberRole::Primary { timeline } else { 2 };
    view.members.insert(name("c"), key(record(role, at, 1_000), 9));
    view
}

/// Nobody leads; the directory was found like this, and runs as a standby that waits.
fn started_alone(found: DataDirectory, timeline: u32) -> Checked {
    let mut checked = Checked::resume(busy(World { vacancy: None, ..idle() }, OperationKind::Look), State::Following);
    checked.handle(T0, seen(vacant()));
    let actions = finds(&mut checked, found);
    assert!(starts(&actions, &StartAs::Standby(None)), "{actions:?}");
    checked.handle(T0, Event::Finished(Finished::Started(Ok(StartId(1)))));
    checked.handle(T0, Event::Guard(guard(2, running(1, Word::Standby))));
    checked.handle(T0, Event::Probed(waiting(T0, timeline)));
    checked
}

#[test]
fn row_53_a_standby_that_somebody_promoted_follows_no_leader_of_its_number_before_it_is_judged() {
    let before = vacant().history;
    let mut checked = started_alone(DataDirectory::Full(control(DatabaseState::InProduction, 3, 1_000)), 3);
    let actions = checked.handle(T0 + ms(1), seen(led_by_c(501, MemberRole::Replica, &before, 3)));
    assert_eq!((told_to_follow(&actions), checked.state()), (None, &State::Following), "{actions:?}");
    let actions = checked.handle(T0 + ms(2), seen(led_by_c(502, MemberRole::Primary, &before, 3)));
    assert_eq!((told_to_follow(&actions), checked.state()), (None, &State::Rejoining), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::Stop(StopMode::Fast { .. }))), "{actions:?}");
}

#[test]
fn row_53_a_stopped_standby_that_was_noted_as_promoted_by_hand_is_judged_before_it_starts() {
    let mut found = control(DatabaseState::ShutDownInRecovery, 3, 1_000);
    for (epoch, judged) in [(Epoch::BY_HAND, true), (Epoch(7), true), (Epoch(500), false)] {
        found.promoted = Some((TimelineId(3), epoch));
        let mut view = led_by_c(501, MemberRole::Primary, &vacant().history, 3);
        view.history = vec![recorded(3, "c", 9, 500, 2, 900)];
        let mut checked = Checked::resume(busy(idle(), OperationKind::Look), State::Following);
        checked.handle(T0, seen(view));
        let actions = finds(&mut checked, DataDirectory::Full(found.clone()));
        assert_eq!(*checked.state() == State::Rejoining, judged, "{epoch}: {actions:?}");
        assert_eq!(operations(&actions).contains(&OperationKind::Start), !judged, "{epoch}: {actions:?}");
    }
    // The leader cannot be asked for its history yet: it is waited for, and not followed meanwhile.
    found.promoted = Some((TimelineId(3), Epoch::BY_HAND));
    let mut checked = Checked::resume(busy(idle(), OperationKind::Look), State::Following);
    checked.handle(T0, seen(led_by_c(501, MemberRole::Replica, &vacant().history, 3)));
    let actions = finds(&mut checked, DataDirectory::Full(found));
    assert!(starts(&actions, &StartAs::Standby(None)), "{actions:?}");
}

#[test]
fn a_former_leader_whose_promotion_is_on_record_follows_the_next_one_without_a_restart() {
    let before = led_by_us().history;
    let mut found = control(DatabaseState::ShutDown, 2, 1_000);
    found.promoted = Some((TimelineId(2), ours().epoch));
    let mut checked = Checked::resume(busy(idle(), OperationKind::Look), State::Following);
    checked.handle(T0, seen(ClusterView { history: before.clone(), ..vacant() }));
    finds(&mut checked, DataDirectory::Full(found));
    checked.handle(T0, Event::Finished(Finished::Started(Ok(StartId(1)))));
    checked.handle(T0, Event::Guard(guard(2, running(1, Word::Standby))));
    checked.handle(T0, Event::Probed(waiting(T0, 2)));
    let actions = checked.handle(T0 + ms(1), seen(led_by_c(501, MemberRole::Replica, &before, 3)));
    assert_eq!(told_to_follow(&actions), Some("c"), "{actions:?}");
    checked.handle(T0 + ms(2), seen(led_by_c(502, MemberRole::Primary, &before, 3)));
    assert_eq!(checked.state(), &State::Following);
}

#[test]
fn row_53_a_standby_that_a_new_daemon_finds_running_follows_nobody_before_its_files_were_looked_at() {
    let world = World { promoted: None, in_force: None, probe: None, receiving: Receiving::default(), ..standby() };
    for (promoted, follows) in [(None, true), (Some((TimelineId(2), Epoch(350))), true), (Some((TimelineId(2), Epoch::BY_HAND)), false)] {
        let mut checked = Checked::resume(world.clone(), State::Following);
        let actions = checked.handle(T0, Event::Probed(waiting(T0, 2)));
        assert_eq!((told_to_follow(&actions), operations(&actions).contains(&OperationKind::Look)), (None, true), "{actions:?}");
        let mut found = control(DatabaseState::InArchiveRecovery, 2, 1_000);
        found.promoted = promoted;
        let actions = finds(&mut checked, DataDirectory::Full(found));
        assert_eq!(told_to_follow(&actions), Some("b").filter(|_| follows), "{promoted:?}: {actions:?}");
        assert_eq!(*checked.state() == State::Rejoining, !follows, "{promoted:?}: {actions:?}");
    }
}

#[test]
fn row_53_a_daemon_that_cannot_read_the_files_of_the_server_it_found_tells_it_nothing_and_looks_again() {
    let world = World { promoted: None, in_force: None, probe: None, receiving: Receiving::default(), ..standby() };
    let mut checked = Checked::resume(world, State::Following);
    checked.handle(T0, Event::Probed(waiting(T0, 2)));
    let actions = finds(&mut checked, DataDirectory::Unknown);
    assert_eq!(told_to_follow(&actions), None, "{actions:?}");
    let later = T0 + s(2);
    let actions = checked.handle(later, Event::Probed(waiting(later, 2)));
    assert!(operations(&actions).contains(&OperationKind::Look), "{actions:?}");
}

/// Second by second, the member key of another run is in the way on this lease, or etcd cannot be asked. When the daemon leaves, and how.
fn leaves_because_of(lease_at: impl Fn(u64) -> Option<ForeignKey>) -> Option<(u64, u8)> {
    let mut checked = Checked::resume(World { written: None, ..busy(idle(), OperationKind::Look) }, State::Following);
    for second in 0..300 {
        let now = T0 + s(second);
        let told = match lease_at(second) {
            Some(_) => seen(led_by_b()),
            None => Event::EtcdUnreachable("a test".to_owned()),
        };
        let mut actions = checked.handle(now, told);
        if let Some(key) = lease_at(second).filter(|_| operations(&actions).contains(&OperationKind::PutMember)) {
            actions.extend(checked.handle(now, Event::Finished(Finished::MemberPut(PutOutcome::Foreign(key)))));
        } else if operations(&actions).contains(&OperationKind::PutMember) {
            checked.handle(now, Event::Finished(Finished::MemberPut(PutOutcome::Failed("a test".to_owned()))));
        }
        let code = actions.iter().find_map(|action| if let Action::Exit(code) = action { Some(*code) } else { None });
        if let Some(code) = code {
            return Some((second, code));
        }
    }
    None
}

/// The spec's is 10 s.
const FORMER_TTL_S: u64 = 60;

fn former(lease: i64, term: u64) -> ForeignKey {
    ForeignKey { lease: LeaseId(lease), ttl: Duration::from_secs(FORMER_TTL_S), term }
}

#[test]
fn the_key_of_a_former_run_is_waited_for_by_its_own_leases_ttl_and_not_by_the_specs() {
    assert_eq!(leaves_because_of(|_| Some(former(77, 2))), Some((FORMER_TTL_S + 4, 4)));
}

#[test]
fn the_key_of_a_former_run_is_waited_for_anew_when_its_lease_began_anew() {
    let since_40 = Some((40 + FORMER_TTL_S + 4, 4));
    assert_eq!(leaves_because_of(|second| Some(former(77, if second < 40 { 2 } else { 3 }))), since_40, "etcd has another leader");
    assert_eq!(leaves_because_of(|second| Some(former(if second < 40 { 77 } else { 78 }, 2))), since_40, "it is another run's");
}

#[test]
fn the_key_of_a_former_run_is_waited_for_anew_after_etcd_could_not_be_asked() {
    let (left, code) = leaves_because_of(|second| Some(former(77, 2)).filter(|_| !(30..40).contains(&second))).unwrap();
    assert_eq!(code, 4);
    assert!(left >= 40 + FORMER_TTL_S + 4, "it left after {left} s");
}

#[test]
fn a_new_lease_makes_the_member_key_due_at_once_whatever_failed_before() {
    let mut checked = Checked::resume(World { written: None, ..busy(idle(), OperationKind::Look) }, State::Following);
    for _ in 0..8 {
        checked.handle(T0, Event::Finished(Finished::MemberPut(PutOutcome::Failed("etcd is away".to_owned()))));
    }
    let later = T0 + s(5);
    let lost = checked.handle(later, Event::Lease(LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound }));
    assert!(!operations(&lost).contains(&OperationKind::PutMember), "{lost:?}");
    let granted = LeaseEvent::Granted { identity: lease(8), ttl: times().ttl, sent: later };
    let actions = checked.handle(later, Event::Lease(granted));
    assert!(operations(&actions).contains(&OperationKind::PutMember), "{actions:?}");
}

#[test]
fn a_member_that_waits_for_data_sees_when_somebody_brings_it_back() {
    let world = World { view: Some(Arc::new(vacant())), ..empty() };
    let mut checked = Checked::resume(world, State::AwaitingLeader);
    assert_eq!(operations(&checked.handle(T0, Event::Tick)).iter().filter(|kind| **kind == OperationKind::Look).count(), 0);
    let actions = checked.handle(T0 + s(5), Event::Tick);
    assert!(operations(&actions).contains(&OperationKind::Look), "{actions:?}");
    finds(&mut checked, DataDirectory::Full(control(DatabaseState::ShutDown, 2, 1_000)));
    assert_eq!(checked.state(), &State::Following);
}

#[test]
fn a_copy_into_an_empty_directory_says_that_it_was_empty_and_one_over_data_does_not() {
    let copies = |state, world: World, plan: Option<Finished>| {
        let mut checked = Checked::resume(world, state);
        let actions = checked.handle(T0, plan.map_or(Event::Tick, Event::Finished));
        actions.into_iter().find_map(|action| match action {
            Action::Do(Operation::Clone { old, .. }) => Some(old == Old::Empty),
            _ => None,
        })
    };
    assert_eq!(copies(State::Cloning, empty(), None), Some(true));
    let diverged = crate::policy::rejoin::Rejoin::Clone { why: "a test".to_owned(), lost: None };
    let judged = World { planned_for: Some(Epoch(350)), ..busy(full(DatabaseState::ShutDown), OperationKind::PlanRejoin) };
    assert_eq!(copies(State::Rejoining, judged, Some(Finished::RejoinPlanned(Ok(diverged)))), Some(false));
}

#[test]
fn i9_a_stopped_member_reports_the_timeline_that_its_wal_ends_on_so_that_nobody_takes_that_id_again() {
    let mut past_its_checkpoint = control(DatabaseState::InArchiveRecovery, 2, 1_000);
    past_its_checkpoint.min_recovery_timeline = TimelineId(3);
    let world = World { written: None, ..busy(idle(), OperationKind::Look) };
    let mut checked = Checked::resume(World { lease: None, ..world }, State::Rejoining);
    finds(&mut checked, DataDirectory::Full(past_its_checkpoint));
    let granted = LeaseEvent::Granted { identity: lease(7), ttl: times().ttl, sent: T0 };
    let reported = checked.handle(T0, Event::Lease(granted)).into_iter().find_map(|action| match action {
        Action::Do(Operation::PutMember(record)) => Some(record.timeline),
        _ => None,
    });
    assert_eq!(reported, Some(Some(TimelineId(3))));
}

#[test]
fn what_hangs_on_our_lease_moves_to_another_only_once_history_names_our_leadership() {
    let mut unrecorded = led_by_us();
    unrecorded.history = vec![entry(2, "a", 7)];
    let mut checked = Checked::resume(World { view: Some(Arc::new(unrecorded)), ..leads() }, State::Primary);
    let actions = checked.handle(T0, Event::Tick);
    assert!(operations(&actions).contains(&OperationKind::RecordPromotion), "{actions:?}");
    assert_eq!(checked.world().key_to_move(), None, "history names the leadership by the lease that the lock was taken on");
    checked.handle(T0, Event::Finished(Finished::PromotionRecorded(Err("unknown".to_owned()))));
    assert_eq!(checked.world().key_to_move(), None);
    checked.handle(T0, Event::Finished(Finished::PromotionRecorded(Ok(true))));
    assert!(checked.world().key_to_move().is_some());

    let earlier = World { recorded: Some(Epoch(299)), ..checked.world().clone() };
    assert_eq!(earlier.key_to_move(), None, "an earlier leadership was recorded");
    let mut late = World { recorded: None, ..checked.world().clone() };
    late.asked.recording = Some(Epoch(299));
    let mut late = Checked::resume(World { in_flight: [OperationKind::RecordPromotion].into(), ..late }, State::Primary);
    late.handle(T0, Event::Finished(Finished::PromotionRecorded(Ok(true))));
    assert_eq!(late.world().recorded, Some(Epoch(299)), "an answer that comes late is of the leadership before");
    assert!(World { lock: Lock::None, ..earlier.clone() }.key_to_move().is_some(), "a member without a lock moves its key alone");
    assert_eq!(World { lock: Lock::None, written: None, ..earlier }.key_to_move(), None, "there is nothing to move");
}

#[test]
fn a_leadership_that_an_earlier_daemon_recorded_moves_too() {
    let mut checked = Checked::resume(leads(), State::Primary);
    checked.handle(T0, Event::Tick);
    assert!(checked.world().key_to_move().is_some());
    let unproved = World { lock: Lock::Unproved(ours()), ..checked.world().clone() };
    assert_eq!(unproved.key_to_move(), None, "a new guard would count the lock by a lease that it does not hang on (seed 6781)");
    // In the lapse of a lock that outlived its lease, this one was taken anew: the promises were for the one before, and so was the guard's
    // deadline (seed 858).
    let mut anew = checked.world().clone();
    anew.failsafe.sustained = Some(T0);
    assert_eq!(anew.key_to_move(), None, "the guard would count the lock by a lease that it does not hang on");
}

#[test]
fn a_lock_on_our_lease_that_nobody_leads_under_is_given_back_wherever_we_are() {
    let led = |world: World| World { view: Some(Arc::new(led_by_us())), ..world };
    let elsewhere = |world: World| World { spec: Some((1, without_us())), ..world };
    let looks = || led(busy(idle(), OperationKind::Look));
    let following = World { in_force: Some(crate::machine::world::InForce { generation: 1, upstream: None }), ..led(standby()) };
    let cases = [
        (State::Undeclared, elsewhere(led(idle()))),
        (State::AwaitingLeader, looks()),
        (State::Cloning, led(busy(idle(), OperationKind::Clone))),
        (State::Following, following),
        (State::Rejoining, looks()),
    ];
    for (state, world) in cases {
        assert_eq!(world.lock, Lock::None);
        let mut checked = Checked::resume(world, state.clone());
        let actions = checked.handle(T0, Event::Tick);
        assert_eq!(checked.state(), &state);
        let released = actions.iter().find_map(|action| match action {
            Action::Do(Operation::Release { epoch, record: None }) => Some(*epoch),
            _ => None,
        });
        assert_eq!(released, Some(ours().epoch), "{}: {actions:?}", state.name());
    }
}

#[test]
fn a_way_back_that_could_not_be_judged_is_looked_at_again_since_the_data_may_be_gone() {
    let world = World { planned_for: Some(Epoch(350)), ..busy(full(DatabaseState::ShutDown), OperationKind::PlanRejoin) };
    let mut checked = Checked::resume(world, State::Rejoining);
    let failed = Finished::RejoinPlanned(Err("there is no data directory".to_owned()));
    let actions = checked.handle(T0, Event::Finished(failed));
    assert_eq!(checked.world().data, DataDirectory::Unknown);
    assert!(operations(&actions).contains(&OperationKind::Look), "{actions:?}");
    finds(&mut checked, DataDirectory::Empty);
    assert_eq!(checked.state(), &State::Cloning);
}

#[test]
fn i2_a_proof_that_comes_when_its_time_is_over_proves_nothing_whatever_else_was_lost_by_then() {
    let Lock::Proved { until, .. } = proved() else { panic!("{:?}", proved()) };
    for late in [ms(0), ms(1), s(60)] {
        let mut checked = Checked::resume(leads(), State::Primary);
        let renewed = LeaseEvent::Proved { lock: ours(), sent: T0, until };
        checked.handle(until + late, Event::Lease(renewed));
        assert_eq!(checked.world().lock, Lock::Unproved(ours()));
        assert!(matches!(checked.state(), State::Demoting { .. }), "{:?}", checked.state());
    }
}

#[test]
fn row_53_a_member_promoted_by_hand_beside_an_election_does_not_stream_over_its_own_timeline() {
    let mut toy = Toy::working(&THREE);
    for member in ["b", "c"] {
        toy.host(member).failing.insert(OperationKind::Acquire);
    }
    toy.power_off("a");
    toy.until("b sees that nobody leads", s(15), |toy| toy.daemon("b").checked.world().vacancy.is_some());
    toy.host("b").connected = false;
    toy.promote_by_hand("b");
    toy.until("it is started again as a standby", s(5), |toy| {
        let server = &toy.hosts[&name("b")].server;
        !server.promoted_by_hand && server.in_recovery() && server.accepting(toy.now)
    });
    toy.host("c").failing.clear();
    toy.until("c leads", s(60), |toy| toy.primary() == Some("c"));
    let number = |toy: &Toy, member: &str| toy.hosts[&name(member)].server.data.as_ref().unwrap().timeline();
    assert_eq!(number(&toy, "b"), number(&toy, "c"), "two timelines of one number\n{}", toy.story());
    toy.host("b").failing.clear();
    toy.host("b").connected = true;
    toy.converges(s(60));
}

#[test]
fn a_cluster_whose_data_was_all_taken_away_leads_again_when_one_directory_is_brought_back() {
    let mut toy = Toy::working(&THREE);
    let kept = THREE.map(|member| {
        toy.power_off(member);
        toy.host(member).server.data.take()
    });
    THREE.iter().for_each(|member| toy.start_daemon(member));
    toy.run(s(40));
    assert_eq!(toy.primary(), None);
    toy.host("b").server.data = kept.into_iter().nth(1).flatten();
    toy.converges(s(60));
    assert_eq!(toy.leader(), Some("b"));
}

#[test]
fn a_directory_that_is_brought_back_while_a_copy_is_made_is_followed_with_and_not_replaced() {
    let mut toy = Toy::working(&THREE);
    toy.power_off("b");
    let brought_back = toy.host("b").server.data.take();
    let end = brought_back.as_ref().map(|data| data.checkpoint);
    toy.start_daemon("b");
    toy.until("it copies", s(30), |toy| toy.state("b") == "cloning");
    toy.run(ms(100));
    toy.host("b").server.data = brought_back;
    toy.converges(s(40));
    let data = toy.hosts[&name("b")].server.data.as_ref();
    assert_eq!(data.map(|data| data.checkpoint), end, "a copy has its leader's checkpoint\n{}", toy.story());
}

/// Found by the simulator's seed 8888: a run between had got a lease of its own, and the guard knew that one and the lock's.
#[test]
fn a_daemon_that_starts_takes_over_the_lease_that_its_lock_hangs_on() {
    let mut starts = World::new(me("a"));
    starts.spec = Some((1, spec(&THREE)));
    let mut checked = Checked::resume(starts, State::Starting);
    let mut facts = guard(1, nothing_runs());
    facts.lease = Some(lease(17));
    facts.lock = Some(lock_facts(lock(7, 300), T0));
    let actions = checked.handle(T0, Event::Guard(facts));
    let adopted = actions.iter().find_map(|action| match action {
        Action::Lease(LeaseOrder::Adopt(lease, lock)) => Some((*lease, *lock)),
        _ => None,
    });
    assert_eq!(adopted, Some((lease(7), Some(lock(7, 300)))), "{actions:?}");
}

/// Programs of another major version were found when the daemon was started again.
#[test]
fn a_running_server_whose_directory_makes_no_sense_is_left_as_it_is_and_looked_at_again_later() {
    let found = World { promoted: None, in_force: None, ..standby() };
    let mut checked = Checked::resume(found, State::Following);
    let looks = |actions: &[Action]| operations(actions).contains(&OperationKind::Look);
    assert!(looks(&checked.handle(T0, seen(led_by_b()))));
    let actions = finds(&mut checked, DataDirectory::Unusable("it is of PostgreSQL 15".to_owned()));
    assert!(actions.iter().all(|action| !matches!(action, Action::Stop(_) | Action::Do(Operation::Look))), "{actions:?}");
    assert!(checked.world().conditions.contains_key("running_unread"));
    let again = |checked: &mut Checked, seconds| looks(&checked.handle(T0 + s(seconds), Event::Tick));
    assert!(!again(&mut checked, 1));
    assert!(again(&mut checked, 6));
}

/// Found by the simulator's seed 3088: who elects the next leader knows of a promotion only when it is on record.
#[test]
fn a_promotion_is_recorded_although_the_view_of_our_lock_is_late() {
    let mut late = led_by_b();
    late.revision = Revision(299);
    let history = vec![entry(2, "a", 7)];
    let won = World { view: Some(Arc::new(late)), asked: Asked { history, ..Asked::default() }, recorded: None, ..leads() };
    let actions = Checked::resume(won, State::Primary).handle(T0, Event::Tick);
    let recorded = actions.iter().find_map(|action| match action {
        Action::Do(Operation::RecordPromotion { epoch, history }) => Some((*epoch, history.last()?.epoch)),
        _ => None,
    });
    assert_eq!(recorded, Some((ours().epoch, Some(ours().epoch))), "{actions:?}");
}

#[test]
fn l5_a_candidate_that_cannot_lead_as_it_is_asks_the_others_once_a_second_whether_they_may_write() {
    for (eligible, least, most) in [(false, 3, 5), (true, 15, 21)] {
        let mut world = World { vacancy: None, ..standby() };
        world.promoted = Some(None);
        let mut view = vacant();
        if !eligible {
            view.initialize = Some(crate::facts::cluster::Initialize::Unreadable("by hand".to_owned()));
        }
        world.view = Some(Arc::new(view.clone()));
        let mut checked = Checked::resume(world, State::Following);
        let (mut now, mut asked) = (T0, 0);
        let mut event = Event::View(Arc::new(view), now);
        while now < T0 + s(4) {
            let actions = checked.handle(now, std::mem::replace(&mut event, Event::Tick));
            for _ in operations(&actions).iter().filter(|kind| **kind == OperationKind::AskPeers) {
                asked += 1;
                // Somebody may write: it waits.
                let answer = PeersAnswer { vacancy: Revision(350), sent: now, writable: vec![name("b")] };
                checked.handle(now, Event::Finished(Finished::PeersAsked(answer)));
            }
            now = now + ms(20);
        }
        assert_eq!(checked.state().name(), "candidate");
        assert!((least..=most).contains(&asked), "eligible {eligible}: {asked} times in 4 s");
    }
}

#[test]
fn the_news_that_the_lock_before_is_lost_does_not_cost_the_one_that_was_just_won() {
    let promotion = Promotion { lock: ours(), way: Way::Promote { timeline: TimelineId(3) }, since: T0 };
    let mut checked = Checked::resume(locked(standby(), Lock::Unproved(ours())), State::Promoting { promotion });
    for (lost, kept) in [(lock(7, 233), true), (ours(), false)] {
        checked.handle(T0 + ms(1), Event::Lease(LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(lost) }));
        assert_eq!(checked.world().lock == Lock::Unproved(ours()), kept, "{lost:?}");
        assert_eq!(checked.state().name() == "promoting", kept, "{lost:?}");
    }
}
