//! A lock that a daemon takes over from the guard: how long its lease is waited for.

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::{THREE, s};
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{full, led_by_us, ours};
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::guard::{GuardFacts, PostmasterFacts};
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::DatabaseState;
use crate::machine::action::{Action, LeaseOrder, OperationKind};
use crate::machine::event::{Event, Finished, PutOutcome};
use crate::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity};

const FULL: &str = "etcdserver: mvcc: database space exceeded";

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
