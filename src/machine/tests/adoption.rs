//! A lock that a daemon takes over from the guard: how long its lease is waited for, and what may be started under it.

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::{THREE, s};
use super::fixtures::*;
use super::found::{operations, starts};
use super::reactions::worlds::{full, led_by_us, locked, ours, proved};
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::guard::{GuardFacts, PostmasterFacts, Word};
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::DatabaseState;
use crate::machine::action::{Action, LeaseOrder, OperationKind, StartAs};
use crate::machine::event::{Event, Finished, PutOutcome};
use crate::machine::state::{Demotion, Promotion, State, Then, Way};
use crate::machine::world::World;
use crate::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, Revision};

const FULL: &str = "etcdserver: mvcc: database space exceeded";

fn renewed(now: BootTime) -> Event {
    Event::Lease(LeaseEvent::Proved { lock: ours(), sent: now, until: now + times().validity() })
}

fn grants(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Lease(LeaseOrder::Grant)))
}

/// A daemon that starts beside a guard that keeps this lock.
fn takes_over(lock: LockIdentity, postmaster: PostmasterFacts, view: ClusterView) -> Checked {
    let mut checked = Checked::new(me("a"));
    let facts = GuardFacts { lock: Some(lock_facts(lock, T0)), lease: Some(lock.lease), ..guard(1, postmaster) };
    checked.handle(T0 + ms(1), Event::Guard(facts));
    checked.handle(T0 + ms(2), Event::SpecRead(1, spec(&THREE)));
    lives_on(&mut checked, T0 + ms(3), Event::View(Arc::new(view), T0 + ms(3)));
    checked
}

/// Another lease is asked for when `lock` could not be renewed for two ttl, and until then it is said what is wrong.
fn is_given_up_in_time(lock: LockIdentity, view: &ClusterView) -> Checked {
    let mut checked = takes_over(lock, nothing_runs(), view.clone());
    let mut now = T0 + s(1);
    loop {
        let mut actions = checked.handle(now, Event::Lease(LeaseEvent::Failed { why: "answers from another cluster".to_owned() }));
        actions.extend(checked.handle(now, Event::View(Arc::new(view.clone()), now)));
        actions.extend(checked.handle(now, Event::Tick));
        let said = checked.world().conditions.get("lock_not_renewed").map(|condition| condition.message.as_str());
        assert!(said.is_some_and(|said| said.contains("another cluster")), "{said:?}");
        if grants(&actions) {
            break;
        }
        now = now + s(1);
        assert!(now < T0 + s(60), "never asks for a lease");
    }
    assert!(now >= T0 + times().ttl * 2, "it could have been renewed yet: {now:?}");
    checked
}

#[test]
fn a_lock_of_an_etcd_that_was_replaced_is_not_waited_for_for_ever() {
    let lease = LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(7) };
    is_given_up_in_time(LockIdentity { lease, epoch: Epoch(100_000) }, &view(60));
}

#[test]
fn a_lock_whose_key_is_there_and_whose_lease_is_not_is_given_up_and_then_given_back() {
    let mut checked = is_given_up_in_time(ours(), &led_by_us());
    let mut now = T0 + s(60);
    let granted = Event::Lease(LeaseEvent::Granted { identity: lease(8), ttl: times().ttl, sent: now });
    let mut ordered = lives_on(&mut checked, now, granted);
    while now < T0 + s(200) && !operations(&ordered).contains(&OperationKind::Release) {
        now = now + s(1);
        ordered.extend(lives_on(&mut checked, now, Event::Tick));
    }
    assert!(operations(&ordered).contains(&OperationKind::Release), "in {}", checked.state().name());
    checked.handle(now, Event::Finished(Finished::Released(Ok(true))));
    assert!(!checked.world().conditions.contains_key("lock_not_renewed"), "it is over");
}

#[test]
fn a_lock_is_waited_for_while_etcd_is_away_and_two_ttl_from_when_it_is_back() {
    let mut checked = takes_over(ours(), nothing_runs(), led_by_us());
    let away = T0 + s(1);
    checked.handle(away, Event::EtcdUnreachable("it is away".to_owned()));
    for second in 1..200 {
        assert!(!grants(&checked.handle(away + s(second), Event::Tick)));
    }
    let back = away + s(200);
    checked.handle(back, Event::View(Arc::new(led_by_us()), back));
    assert!(!grants(&checked.handle(back + s(19), Event::Tick)));
    assert!(grants(&checked.handle(back + s(20), Event::Tick)));
}

#[test]
fn a_guard_that_was_silent_while_a_lock_was_taken_over_is_handed_the_lock_again() {
    let mut checked = takes_over(ours(), nothing_runs(), led_by_us());
    checked.handle(T0 + ms(10), Event::Lease(LeaseEvent::GuardSilent));
    let back = GuardFacts { lock: Some(lock_facts(ours(), T0)), lease: Some(ours().lease), ..guard(2, nothing_runs()) };
    let actions = checked.handle(T0 + ms(20), Event::Guard(back));
    let adopts =
        |action: &Action| matches!(action, Action::Lease(LeaseOrder::Adopt(lease, Some(lock))) if *lease == lock.lease && *lock == ours());
    assert!(actions.iter().any(adopts), "the lease's thread renews nothing before it is told to: {actions:?}");
}

/// What is ordered on this event, and on the answers to that: the server was a primary, starts are refused, and etcd takes the member key
/// alone.
fn lives_on(checked: &mut Checked, now: BootTime, event: Event) -> Vec<Action> {
    let mut ordered = checked.handle(now, event);
    let mut answered = 0;
    while let Some(kind) = operations(&ordered).get(answered).copied() {
        answered += 1;
        let answer = match kind {
            OperationKind::Look => Finished::Looked(full(DatabaseState::InProduction).data),
            OperationKind::Start => Finished::Started(Err("a test".to_owned())),
            OperationKind::PutMember => Finished::MemberPut(PutOutcome::Written),
            OperationKind::Reaffirm => Finished::Reaffirmed(Err(FULL.to_owned())),
            _ => continue,
        };
        ordered.extend(checked.handle(now, Event::Finished(answer)));
    }
    ordered
}

/// The leadership was taken over, with a server that writes or with none; then nothing runs, and etcd takes no writes.
fn crashes_while_etcd_is_full(before: PostmasterFacts) -> (Checked, Vec<Action>) {
    let mut checked = takes_over(ours(), before, led_by_us());
    lives_on(&mut checked, T0 + ms(10), renewed(T0 + ms(5)));
    let facts = GuardFacts { lock: Some(lock_facts(ours(), T0)), lease: Some(ours().lease), ..guard(2, nothing_runs()) };
    let mut ordered = lives_on(&mut checked, T0 + ms(20), Event::Guard(facts));
    let mut now = T0 + ms(20);
    while now < T0 + s(8) {
        now = now + ms(500);
        ordered.extend(lives_on(&mut checked, now, renewed(now)));
    }
    (checked, ordered)
}

/// The daemon that let it write was sure of the lock, and gives back nothing as long as it does.
#[test]
fn row_44_a_primary_that_was_found_writing_is_started_again_in_place_although_etcd_takes_no_writes() {
    let (checked, ordered) = crashes_while_etcd_is_full(running(1, Word::Writable));
    assert!(starts(&ordered, &StartAs::Primary), "in {}: {ordered:?}", checked.state().name());
    let said = &checked.world().conditions["reaffirm_failed"].message;
    assert!(said.contains(FULL), "{said}");
}

#[test]
fn i1_a_lock_that_was_taken_over_with_nothing_running_starts_no_primary_before_its_key_was_written_again() {
    let (checked, ordered) = crashes_while_etcd_is_full(nothing_runs());
    assert!(!starts(&ordered, &StartAs::Primary), "{ordered:?}");
    assert!(operations(&ordered).contains(&OperationKind::Reaffirm), "in {}: {ordered:?}", checked.state().name());
}

#[test]
fn i1_a_primary_that_was_found_writing_is_not_started_again_after_a_release_of_which_nothing_is_known() {
    let mut world = World { sure_of: None, found_writing: Some(ours().epoch), ..locked(full(DatabaseState::ShutDown), proved()) };
    world.guard = Some(guard(1, nothing_runs()));
    let demotion = Demotion { why: "a test".to_owned(), then: Then::Release(ours()) };
    let mut checked = Checked::resume(world, State::Demoting { demotion });
    let released = checked.handle(T0 + ms(1), Event::Tick);
    assert!(operations(&released).contains(&OperationKind::Release), "{released:?}");
    assert_eq!(checked.world().found_writing, None);
}

#[test]
fn row_44_what_keeps_a_primary_from_being_started_is_said_and_taken_back() {
    let world = World { sure_of: None, ..locked(full(DatabaseState::InProduction), proved()) };
    let promotion = Promotion { lock: ours(), way: Way::StartInPlace, since: T0 };
    let mut checked = Checked::resume(world, State::Promoting { promotion });
    let asked = checked.handle(T0, Event::Tick);
    assert!(operations(&asked).contains(&OperationKind::Reaffirm), "{asked:?}");
    checked.handle(T0 + ms(1), Event::Finished(Finished::Reaffirmed(Err(FULL.to_owned()))));
    assert!(checked.world().conditions["reaffirm_failed"].message.contains(FULL));
    checked.handle(T0 + s(1), renewed(T0 + s(1)));
    let starts_now = checked.handle(T0 + s(1) + ms(1), Event::Finished(Finished::Reaffirmed(Ok(Some(crate::types::Revision(100))))));
    assert!(starts(&starts_now, &StartAs::Primary), "{starts_now:?}");
    assert!(!checked.world().conditions.contains_key("reaffirm_failed"));
}

#[test]
fn what_could_not_be_written_again_is_no_condition_once_the_lock_is_gone() {
    let world = World { sure_of: None, ..locked(full(DatabaseState::InProduction), proved()) };
    let promotion = Promotion { lock: ours(), way: Way::StartInPlace, since: T0 };
    let mut checked = Checked::resume(world, State::Promoting { promotion });
    checked.handle(T0, Event::Tick);
    checked.handle(T0 + ms(1), Event::Finished(Finished::Reaffirmed(Err(FULL.to_owned()))));
    let mut gone = led_by_us();
    (gone.leader, gone.revision) = (None, Revision(900));
    checked.handle(T0 + ms(2), Event::View(Arc::new(gone), T0 + ms(2)));
    assert!(!checked.world().conditions.contains_key("reaffirm_failed"));
}
