//! A lease that ran out while its leader goes on by promises: what the news of the new lock, and an attempt that failed, may come as.

use std::sync::Arc;

use super::checked::Checked;
use super::fixtures::*;
use super::reactions::worlds::{leads, led_by_us, ours};
use crate::facts::cluster::{ClusterView, Continued};
use crate::machine::action::OperationKind;
use crate::machine::event::{AcquireOutcome, Event, Finished};
use crate::machine::world::{Lock, World};
use crate::types::{Epoch, LeaseId, LockIdentity, Revision};

/// `a` leads on with this lock, and takes it anew on this lease; etcd is as this view says.
fn takes_anew(lock_now: LockIdentity, on: i64, view: ClusterView) -> Checked {
    let deadlines = times().deadlines(T0);
    let mut world = World { holding: None, sure_of: Some(lock_now.epoch), recorded: Some(lock_now.epoch), ..leads() };
    world.lock = Lock::Proved { identity: lock_now, until: deadlines.valid_until, announce_at: deadlines.announce_at };
    world.lease = Some(lease(on));
    world.failsafe.sustained = Some(deadlines.valid_until);
    world.failsafe.lapsed = true;
    world.in_flight.insert(OperationKind::Acquire);
    world.view = Some(Arc::new(view));
    let mut checked = Checked::resume(world, crate::machine::state::State::Primary);
    checked.handle(T0 + ms(100), Event::Tick);
    assert_eq!(checked.state().name(), "primary");
    checked
}

/// etcd without the lock; `a` led last, and this is how its leadership was handed on before.
fn without_lock(revision: i64, continued: Option<Continued>) -> ClusterView {
    let mut view = led_by_us();
    (view.leader, view.revision) = (None, Revision(revision));
    view.history = vec![recorded(2, "a", 7, 300, 1, 500)];
    view.history[0].continued = continued;
    view
}

/// etcd's watch shows the new lock before the transaction's answer is here.
fn the_watch_is_faster(lock_now: LockIdentity, on: i64, before: &ClusterView, by: &str) -> Checked {
    let epoch = before.revision.0 + 1;
    let mut checked = takes_anew(lock_now, on, before.clone());
    let mut after = before.clone();
    (after.revision, after.history_revision) = (Revision(epoch), Revision(epoch));
    after.leader = Some(leader(by, on, epoch));
    after.history[0].continued = Some(Continued { lease: LeaseId(on), epoch: None });
    after.history[0].member = name(by);
    checked.handle(T0 + ms(110), Event::View(Arc::new(after), T0 + ms(110)));
    checked
}

#[test]
fn a_lock_that_was_taken_anew_is_ours_before_the_answer_is_here_in_every_lapse_of_a_leadership() {
    let again = Continued { lease: LeaseId(8), epoch: Some(Epoch(400)) };
    for (lock_now, on, before) in [(ours(), 8, without_lock(399, None)), (lock(8, 400), 9, without_lock(499, Some(again)))] {
        let mut checked = the_watch_is_faster(lock_now, on, &before, "a");
        assert_eq!(checked.state().name(), "primary", "nobody else has led, and its own view ended the leadership of {lock_now:?}");
        let won = lock(on, before.revision.0 + 1);
        checked.handle(T0 + ms(112), Event::Finished(Finished::Acquired(AcquireOutcome::Won(won))));
        assert_eq!((checked.state().name(), checked.world().lock.identity()), ("primary", Some(won)));
    }
}

#[test]
fn i1_a_lock_that_another_member_took_in_a_lapse_ends_the_leadership() {
    let checked = the_watch_is_faster(ours(), 8, &without_lock(399, None), "b");
    assert_ne!(checked.state().name(), "primary");
}

#[test]
fn a_document_that_is_applied_in_a_lapse_costs_another_attempt_and_not_the_leadership() {
    let mut checked = takes_anew(ours(), 8, without_lock(399, None));
    checked.handle(T0 + ms(110), Event::Finished(Finished::Acquired(AcquireOutcome::SpecMoved)));
    assert_eq!(checked.state().name(), "primary");
    let mut view = without_lock(401, None);
    view.members.insert(name("a"), key(record(crate::facts::cluster::MemberRole::Primary, 2, 1_000), 8));
    view.spec_revision = Revision(401);
    checked.handle(T0 + ms(120), Event::View(Arc::new(view), T0 + ms(120)));
    let announce_at = times().deadlines(T0).announce_at;
    checked.handle(announce_at.before(ms(1)), Event::Tick);
    assert_eq!(checked.state().name(), "primary");
    checked.handle(announce_at, Event::Tick);
    assert_ne!(checked.state().name(), "primary", "at A the lapse is over whatever failed");
}

#[test]
fn i1_an_attempt_that_was_beaten_in_a_lapse_ends_the_leadership() {
    let mut checked = takes_anew(ours(), 8, without_lock(399, None));
    checked.handle(T0 + ms(110), Event::Finished(Finished::Acquired(AcquireOutcome::Beaten)));
    assert_ne!(checked.state().name(), "primary");
}
