//! What etcd does not take, and what the disk does not give, is said for as long as it is so (SAFETY rows 34 and 44).

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::reactions::worlds::{full, led_by_b, locked, proved, standby, vacant};
use crate::facts::postgres::{DataDirectory, DatabaseState};
use crate::machine::action::{Action, Operation, Upstream};
use crate::machine::event::{AcquireOutcome, Configured, Event, Finished, PutOutcome};
use crate::machine::state::State;
use crate::machine::world::World;
use crate::types::Revision;

const FULL: &str = "etcdserver: mvcc: database space exceeded";

/// Takes in the end of an operation, and tells whether what etcd said of it is a condition.
fn says(world: &mut World, kind: &str, finished: Finished) -> bool {
    world.absorb(T0, Event::Finished(finished));
    world.conditions.get(kind).is_some_and(|condition| condition.message.contains(FULL))
}

#[test]
fn row_44_a_record_of_who_has_what_that_etcd_does_not_take_is_said_until_it_does_or_the_lock_is_gone() {
    let refused = || Finished::SyncWritten(Err(FULL.to_owned()));
    let mut world = locked(full(DatabaseState::InProduction), proved());
    assert!(says(&mut world, "sync_failed", refused()));
    assert!(!says(&mut world, "sync_failed", Finished::SyncWritten(Ok((true, Revision(401))))));
    assert!(says(&mut world, "sync_failed", refused()));
    world.absorb(T0, Event::View(Arc::new(led_by_b()), T0));
    assert!(!world.conditions.contains_key("sync_failed"));
}

#[test]
fn row_44_a_lock_that_etcd_does_not_give_is_said_until_somebody_has_it() {
    let refused = || Finished::Acquired(AcquireOutcome::Failed(FULL.to_owned()));
    let mut world = World { view: Some(Arc::new(vacant())), ..standby() };
    assert!(says(&mut world, "acquire_failed", refused()));
    assert!(!says(&mut world, "acquire_failed", Finished::Acquired(AcquireOutcome::Beaten)));
    assert!(says(&mut world, "acquire_failed", refused()));
    world.absorb(T0, Event::View(Arc::new(led_by_b()), T0));
    assert!(!world.conditions.contains_key("acquire_failed"));
}

#[test]
fn row_44_a_member_key_that_etcd_does_not_take_is_said_where_that_key_is_not_needed() {
    let mut checked = Checked::resume(World { view: Some(Arc::new(led_by_b())), ..standby() }, State::Following);
    checked.handle(T0, Event::Tick);
    checked.handle(T0 + ms(1), Event::Finished(Finished::MemberPut(PutOutcome::Failed(FULL.to_owned()))));
    assert!(checked.world().conditions["member_key_failed"].message.contains(FULL));
    let again = checked.handle(T0 + s(1), Event::Tick);
    let written = again.iter().find_map(|action| if let Action::Do(Operation::PutMember(record)) = action { Some(record) } else { None });
    let written = written.expect("it is tried again");
    assert!(written.conditions.iter().all(|condition| condition.kind != "member_key_failed"), "true until it is written: {written:?}");
    checked.handle(T0 + s(1) + ms(1), Event::Finished(Finished::MemberPut(PutOutcome::Written)));
    assert!(!checked.world().conditions.contains_key("member_key_failed"));
}

#[test]
fn row_34_a_data_directory_that_cannot_be_read_is_said_until_it_can() {
    let mut world = full(DatabaseState::ShutDown);
    let found = world.data.clone();
    world.looked(T0, DataDirectory::Unknown);
    assert!(world.conditions.contains_key("data_directory_unread"));
    world.looked(T0, found);
    assert!(!world.conditions.contains_key("data_directory_unread"));
}

/// Found by reading: the generation that was in force was taken for the one that was refused, and so that one was tried again without end.
#[test]
fn row_61_a_generation_that_postgresql_does_not_want_is_tried_once_and_named() {
    let refused = || Finished::Configured { generation: 9, upstream: led_upstream(), result: Ok(Configured::PutBack("bad".to_owned())) };
    let configures = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Do(Operation::Configure { .. })));
    let mut world = World { view: Some(Arc::new(led_by_b())), ..standby() };
    world.spec = world.spec.map(|(_, spec)| (9, spec));
    let mut checked = Checked::resume(world, State::Following);
    assert!(configures(&checked.handle(T0, Event::Tick)));
    let mut actions = checked.handle(T0 + ms(100), Event::Finished(refused()));
    for second in 1..=5 {
        actions.extend(checked.handle(T0 + s(second), Event::Probed(probe(T0 + s(second), sql(true, 2, 1_000)))));
    }
    assert!(!configures(&actions), "{actions:?}");
    let world = checked.world();
    assert_eq!((world.refused_generation, world.in_force.as_ref().map(|files| files.generation)), (Some(9), Some(1)));
    assert!(world.conditions["configuration_refused"].message.contains("generation 9"), "{:?}", world.conditions);
}

fn led_upstream() -> Option<Upstream> {
    standby().in_force.and_then(|files| files.upstream)
}
