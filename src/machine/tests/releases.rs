//! A lock that is being given back, or may be: its successor asks nobody, so nothing begins to write under it before that is ruled out.

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::{operations, starts};
use super::reactions::worlds::{full, leads, led_by_us, locked, ours, proved, standby};
use crate::clock::BootTime;
use crate::facts::cluster::MemberRole;
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::DatabaseState;
use crate::machine::action::{Action, LeaseOrder, OperationKind, StartAs};
use crate::machine::event::{Event, Finished};
use crate::machine::state::{HandOver, HandOverStage, State};
use crate::machine::world::{Lock, World};

fn renewed(now: BootTime) -> Event {
    Event::Lease(LeaseEvent::Proved { lock: ours(), sent: now, until: now + times().validity() })
}

/// `a` is stopped and hands over to `c`, which lacks the last record; so often the release failed.
fn gives_up_after(failed_releases: u32) -> (Checked, BootTime) {
    let mut world = locked(full(DatabaseState::ShutDown), proved());
    let mut view = led_by_us();
    view.members.insert(name("c"), key(record(MemberRole::Replica, 2, 900), 9));
    world.view = Some(Arc::new(view));
    (0..failed_releases).for_each(|_| world.retry_later(T0, OperationKind::Release));
    world.sure_of = world.sure_of.filter(|_| failed_releases == 0);
    let (to, request) = (Some(name("c")), Some("1".to_owned()));
    let hand_over = HandOver { stage: HandOverStage::Wait { since: T0 }, ..HandOver::new(ours(), to, request, T0) };
    let mut checked = Checked::resume(world, State::HandingOver { hand_over });
    checked.handle(T0 + s(1), Event::Tick);
    assert_eq!(checked.state().name(), "handing_over", "it has patience");
    (checked, T0 + s(4))
}

#[test]
fn a_hand_over_that_gives_up_before_it_released_anything_starts_in_place() {
    let (mut checked, now) = gives_up_after(0);
    let proof = LeaseEvent::Proved { lock: ours(), sent: now, until: now + times().validity() };
    let mut actions = checked.handle(now, Event::Lease(proof));
    actions.extend(checked.handle(now, Event::Tick));
    assert!(starts(&actions, &StartAs::Primary), "{actions:?}");
}

/// A handover that gives up after a release whose answer was lost, proved again.
fn unsure() -> (Checked, BootTime) {
    let (mut checked, now) = gives_up_after(1);
    let mut actions = checked.handle(now, renewed(now));
    for wait in 0..8 {
        actions.extend(checked.handle(now + ms(wait * 500), renewed(now + ms(wait * 500))));
    }
    assert!(!starts(&actions, &StartAs::Primary), "{actions:?}");
    assert!(operations(&actions).contains(&OperationKind::Reaffirm), "{actions:?}");
    assert_eq!(checked.state().name(), "promoting");
    (checked, now + s(4))
}

#[test]
fn i1_after_a_release_whose_answer_was_lost_a_primary_starts_only_when_the_locks_key_was_written_again() {
    let (mut checked, now) = unsure();
    checked.handle(now, Event::Finished(Finished::Reaffirmed(Err("the answer was lost".to_owned()))));
    let again = checked.handle(now + s(1), renewed(now + s(1)));
    assert!(operations(&again).contains(&OperationKind::Reaffirm) && !starts(&again, &StartAs::Primary), "{again:?}");
    let known = checked.handle(now + s(1), Event::Finished(Finished::Reaffirmed(Ok(Some(crate::types::Revision(100))))));
    assert!(starts(&known, &StartAs::Primary), "{known:?}");
}

#[test]
fn i1_a_lock_that_could_not_be_written_again_since_it_is_gone_starts_no_primary() {
    let (mut checked, now) = unsure();
    let gone = checked.handle(now, Event::Finished(Finished::Reaffirmed(Ok(None))));
    assert!(!starts(&gone, &StartAs::Primary), "{gone:?}");
    let lost = LeaseEvent::Lost { why: crate::facts::lease::LeaseLoss::LockNotOurs(ours()) };
    let lost = checked.handle(now, Event::Lease(lost));
    assert!(!starts(&lost, &StartAs::Primary), "{lost:?}");
    assert_eq!(checked.world().lock, Lock::None);
}

/// The guard dies while a release for `b` is under way, and a new one is there at once.
fn guard_dies_while_releasing() -> (Checked, BootTime) {
    let mut world = World { guard: Some(guard(1, nothing_runs())), ..locked(full(DatabaseState::ShutDown), proved()) };
    world.in_flight.insert(OperationKind::Release);
    (world.asked.releasing, world.sure_of) = (Some(ours().epoch), None);
    let (to, request) = (Some(name("b")), Some("1".to_owned()));
    let hand_over = HandOver { stage: HandOverStage::Release, ..HandOver::new(ours(), to, request, T0) };
    let mut checked = Checked::resume(world, State::HandingOver { hand_over });
    checked.handle(T0 + ms(1), Event::GuardGone);
    checked.handle(T0 + ms(20), Event::Finished(Finished::FencedByScan(Ok(()))));
    let mut another = guard(1, nothing_runs());
    another.pid += 1;
    let actions = checked.handle(T0 + ms(21), Event::Guard(another));
    let holds = actions.iter().any(|action| matches!(action, Action::Lease(LeaseOrder::Hold(_))));
    assert!(!holds, "what is being given back is not proved anew: {actions:?}");
    (checked, T0 + ms(30))
}

fn goes_on(checked: &mut Checked, now: BootTime) -> Vec<Action> {
    let mut actions = checked.handle(now, Event::Finished(Finished::Looked(full(DatabaseState::ShutDown).data)));
    actions.extend(checked.handle(now + ms(500), Event::Tick));
    actions
}

#[test]
fn i1_a_lock_that_was_given_back_while_the_guard_died_starts_no_primary() {
    let (mut checked, now) = guard_dies_while_releasing();
    let mut actions = checked.handle(now, Event::Finished(Finished::Released(Ok(true))));
    assert!(actions.iter().any(|action| matches!(action, Action::Lease(LeaseOrder::LetGo))), "{actions:?}");
    assert_eq!(checked.world().lock, Lock::None);
    actions.extend(goes_on(&mut checked, now));
    assert!(!starts(&actions, &StartAs::Primary), "{actions:?}");
}

#[test]
fn i1_a_release_of_which_nothing_is_known_after_the_guard_died_starts_no_primary_before_the_key_was_written_again() {
    let (mut checked, now) = guard_dies_while_releasing();
    checked.handle(now, Event::Finished(Finished::Released(Err("no answer".to_owned()))));
    let mut actions = checked.handle(now + ms(1), renewed(now + ms(1)));
    actions.extend(goes_on(&mut checked, now + ms(2)));
    assert!(!starts(&actions, &StartAs::Primary), "{actions:?}");
    assert!(operations(&actions).contains(&OperationKind::Reaffirm), "{actions:?}");
}

#[test]
fn i1_an_idle_lock_that_is_given_back_promotes_nobody_when_the_server_answers_in_that_moment() {
    let mut world = locked(standby(), proved());
    let mut view = led_by_us();
    view.history.push(entry(3, "a", 7));
    world.view = Some(Arc::new(view));
    world.in_flight.insert(OperationKind::Release);
    (world.asked.releasing, world.sure_of) = (Some(ours().epoch), None);
    let mut checked = Checked::resume(world, State::Following);
    let mut actions = checked.handle(T0 + ms(1), Event::Tick);
    actions.extend(checked.handle(T0 + ms(5), Event::Finished(Finished::Released(Ok(true)))));
    assert!(!operations(&actions).contains(&OperationKind::Promote), "{actions:?}");
    assert_eq!((checked.world().lock, checked.state()), (Lock::None, &State::Following));
}

#[test]
fn a_lock_that_was_taken_over_from_the_guard_is_written_again_once_and_one_that_was_won_is_not() {
    let adopted = World { sure_of: None, ..leads() };
    let mut checked = Checked::resume(adopted, State::Primary);
    let actions = checked.handle(T0, Event::Tick);
    assert!(operations(&actions).contains(&OperationKind::Reaffirm), "{actions:?}");
    checked.handle(T0, Event::Finished(Finished::Reaffirmed(Ok(Some(crate::types::Revision(100))))));
    for (mut checked, at) in [(checked, T0 + s(1)), (Checked::resume(leads(), State::Primary), T0)] {
        let actions = checked.handle(at, Event::Tick);
        assert!(!operations(&actions).contains(&OperationKind::Reaffirm), "{actions:?}");
    }
}

/// The key is being written again when a hand-over begins; the answer comes after the release was ordered.
#[test]
fn i1_the_answer_to_a_key_that_was_written_again_before_a_release_began_rules_that_release_out_not() {
    let mut world = World { sure_of: None, guard: Some(guard(1, nothing_runs())), ..locked(full(DatabaseState::ShutDown), proved()) };
    world.in_flight.insert(OperationKind::Reaffirm);
    world.asked.reaffirming = Some(ours().epoch);
    let mut view = led_by_us();
    view.members.insert(name("c"), key(record(MemberRole::Replica, 2, 1_100), 9));
    world.view = Some(Arc::new(view.clone()));
    let (to, request) = (Some(name("c")), Some("1".to_owned()));
    let hand_over = HandOver { stage: HandOverStage::Wait { since: T0 }, ..HandOver::new(ours(), to, request, T0) };
    let mut checked = Checked::resume(world, State::HandingOver { hand_over });
    let released = checked.handle(T0 + ms(1), Event::Tick);
    assert!(operations(&released).contains(&OperationKind::Release), "{released:?}");
    checked.handle(T0 + ms(2), Event::Finished(Finished::Reaffirmed(Ok(Some(crate::types::Revision(100))))));
    // The successor is gone, and what became of the release is not known.
    view.members.remove(&name("c"));
    checked.handle(T0 + s(1), Event::View(Arc::new(view), T0 + s(1)));
    let mut ordered = checked.handle(T0 + ms(3_500), Event::Finished(Finished::Released(Err("no answer".to_owned()))));
    ordered.extend(checked.handle(T0 + ms(3_600), renewed(T0 + ms(3_600))));
    ordered.extend(checked.handle(T0 + ms(4_000), Event::Tick));
    assert!(operations(&ordered).contains(&OperationKind::Reaffirm) && !starts(&ordered, &StartAs::Primary), "{ordered:?}");
    let known = checked.handle(T0 + ms(4_010), Event::Finished(Finished::Reaffirmed(Ok(Some(crate::types::Revision(100))))));
    assert!(starts(&known, &StartAs::Primary), "{known:?}");
}

#[test]
fn a_proof_that_was_on_its_way_when_the_lock_was_let_go_does_not_keep_the_lease_from_being_held_again() {
    let (mut checked, now) = gives_up_after(0);
    let mut view = led_by_us();
    view.members.insert(name("c"), key(record(MemberRole::Replica, 2, 1_100), 9));
    let released = checked.handle(T0 + s(1), Event::View(Arc::new(view.clone()), T0 + s(1)));
    assert!(operations(&released).contains(&OperationKind::Release), "{released:?}");
    view.members.remove(&name("c"));
    checked.handle(T0 + s(2), Event::View(Arc::new(view), T0 + s(2)));
    let mut actions = checked.handle(now, Event::Finished(Finished::Released(Err("refused".to_owned()))));
    actions.extend(checked.handle(now + ms(1), renewed(now.before(ms(5)))));
    actions.extend(checked.handle(now + ms(2), Event::Tick));
    let holds = actions.iter().any(|action| matches!(action, Action::Lease(LeaseOrder::Hold(lock)) if *lock == ours()));
    assert!(holds, "its thread let go of the lock: {actions:?}");
}

/// Found by the simulator's seed 9230: nobody else may lead as long as it has the lock.
#[test]
fn l2_a_lock_whose_holder_cannot_start_postgresql_is_given_back() {
    for (failures, gives_back) in [(2, false), (3, true)] {
        let mut world = locked(full(DatabaseState::InArchiveRecovery), Lock::Unproved(ours()));
        (0..failures).for_each(|_| world.retry_later(T0, OperationKind::Start));
        let mut checked = Checked::resume(world, State::Following);
        let actions = checked.handle(T0, Event::Tick);
        assert_eq!(operations(&actions).contains(&OperationKind::Release), gives_back, "{actions:?}");
    }
}
