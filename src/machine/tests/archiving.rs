//! What a primary's archiver did not get to: when it is seen to, how long that may hold the way back, what is said. What belongs into the
//! archive is `policy::rejoin::archiving`'s.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::archiving::{Archived, Unarchived};
use crate::facts::cluster::Severity;
use crate::facts::guard::StartId;
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState, SqlFacts};
use crate::machine::action::{Action, Operation, OperationKind, StopMode};
use crate::machine::event::{Event, Finished};
use crate::machine::rules::archiving;
use crate::machine::state::State;
use crate::machine::world::World;
use crate::policy::rejoin::Rejoin;
use crate::types::Epoch;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{busy, full, idle, led_by_b, standby, vacant};

const ARCHIVE: &str = "postgres: { archive_command: cp %p /archive/%f }";

fn ready(files: usize) -> DataDirectory {
    let DataDirectory::Full(control) = full(DatabaseState::ShutDown).data else { panic!("it is full") };
    DataDirectory::Full(ControlFacts { unarchived: files, ..control })
}

fn looked(files: usize) -> Event {
    Event::Finished(Finished::Looked(ready(files)))
}

fn beside(files: usize) -> Unarchived {
    let (first, last) = ("000000010000000000000004".to_owned(), "000000010000000000000006".to_owned());
    Unarchived { files, first, last, place: "/data.pgherd/unarchived".to_owned() }
}

fn with_an_archive(world: World) -> World {
    World { spec: Some((1, spec_with(&["a", "b", "c"], ARCHIVE))), ..world }
}

/// A former primary whose way back behind `b` has been judged, and that has files to be archived.
fn judged(plan: Rejoin, with: impl Fn(World) -> World) -> (Checked, Vec<Action>) {
    let world = World { view: Some(Arc::new(led_by_b())), planned_for: Some(Epoch(350)), ..full(DatabaseState::ShutDown) };
    let mut checked = Checked::resume(with(busy(world, OperationKind::Look)), State::Rejoining);
    let actions = judged_again(&mut checked, T0, 2, &plan);
    (checked, actions)
}

fn judged_again(checked: &mut Checked, now: BootTime, files: usize, plan: &Rejoin) -> Vec<Action> {
    let actions = checked.handle(now, looked(files));
    assert!(operations(&actions).contains(&OperationKind::PlanRejoin), "{actions:?}");
    checked.handle(now, Event::Finished(Finished::RejoinPlanned(Ok(plan.clone()))))
}

fn goes_on(actions: &[Action]) -> bool {
    let on = |kind: &OperationKind| matches!(kind, OperationKind::Start | OperationKind::Rewind | OperationKind::Clone);
    operations(actions).iter().any(on)
}

fn archives(actions: &[Action]) -> bool {
    operations(actions).contains(&OperationKind::ArchiveLeft)
}

#[test]
fn row_54_what_the_archiver_did_not_get_to_is_seen_to_before_anything_can_take_it_away() {
    let (why, lost) = ("a test".to_owned(), half_rewound().lost);
    for (plan, up_to) in [
        (Rejoin::Follow, None),
        (Rejoin::Rewind { why: why.clone(), lost }, Some(lost.from)),
        (Rejoin::Clone { why: why.clone(), lost: Some(lost) }, Some(lost.from)),
        (Rejoin::Clone { why, lost: None }, None),
    ] {
        let (mut checked, actions) = judged(plan.clone(), with_an_archive);
        assert!(archives(&actions) && !goes_on(&actions), "{plan:?}: {actions:?}");
        let asked = actions.iter().find_map(|action| match action {
            Action::Do(Operation::ArchiveLeft { shared, .. }) => Some(*shared),
            _ => None,
        });
        assert_eq!(asked, Some(up_to), "{plan:?}");
        assert!(!goes_on(&checked.handle(T0 + s(5), Event::Tick)), "it waits");
        let archived = Archived { files: 2, ..Archived::default() };
        let actions = checked.handle(T0 + s(6), Event::Finished(Finished::LeftArchived(Ok(archived))));
        assert!(!goes_on(&actions), "it is looked at again: {actions:?}");
        let actions = judged_again(&mut checked, T0 + s(6), 0, &plan);
        assert!(goes_on(&actions) && !archives(&actions), "{plan:?}: {actions:?}");
    }
}

#[test]
fn without_an_archive_nothing_holds_the_way_back() {
    assert!(goes_on(&judged(Rejoin::Follow, |world| world).1));
}

#[test]
fn what_can_be_neither_archived_nor_put_beside_is_tried_twice_and_said() {
    let (mut checked, _) = judged(Rejoin::Follow, with_an_archive);
    let no_room = || Event::Finished(Finished::LeftArchived(Err("no room".to_owned())));
    let mut now = T0 + s(1);
    assert!(!goes_on(&checked.handle(now, no_room())));
    assert_eq!(checked.world().conditions["archiving_failed"].severity, Severity::Warning);
    judged_again(&mut checked, now, 2, &Rejoin::Follow);
    now = now + s(1);
    assert!(archives(&checked.handle(now, Event::Tick)), "once more");
    let told = decided(&checked.handle(now, no_room()), "archiving_failed");
    assert!(told.is_some_and(|message| message.contains("no room")));
    assert!(goes_on(&judged_again(&mut checked, now, 2, &Rejoin::Follow)), "the cluster needs its standby");
    assert_eq!(checked.world().conditions["archiving_failed"].severity, Severity::Error);
    checked.handle(now, Event::Finished(Finished::Started(Ok(StartId(2)))));
    assert!(checked.world().conditions.contains_key("archiving_failed"), "it is said for as long as it may be so");
    assert!(!archiving::is_owed(checked.world()), "nor is it stopped for it");
    let world = World { guard: Some(guard(9, nothing_runs())), started: None, ..checked.world().clone() };
    let mut checked = Checked::resume(busy(world, OperationKind::Look), State::Rejoining);
    judged_again(&mut checked, now, 2, &Rejoin::Follow);
    assert!(checked.world().in_flight.contains(&OperationKind::ArchiveLeft), "when it has ended it is tried anew");
}

fn decided(actions: &[Action], kind: &str) -> Option<String> {
    actions.iter().find_map(|action| match action {
        Action::Record(decision) if decision.kind == kind => Some(decision.message.clone()),
        _ => None,
    })
}

#[test]
fn what_was_put_beside_is_archived_from_there_again_and_again_and_is_said_until_it_is() {
    let (mut checked, _) = judged(Rejoin::Follow, with_an_archive);
    let put = Archived { files: 1, beside: Some(beside(3)), why: Some("exit status: 1: the archive is full".to_owned()) };
    let actions = checked.handle(T0, Event::Finished(Finished::LeftArchived(Ok(put.clone()))));
    assert!(decided(&actions, "wal_archived").is_some());
    let told = decided(&actions, "wal_not_archived").unwrap();
    assert!(told.contains("3 files") && told.contains("000000010000000000000004") && told.contains("the archive is full"), "{told}");
    let begun = |actions: &[Action]| operations(actions).contains(&OperationKind::ArchiveBeside);
    assert!(begun(&actions), "{actions:?}");
    let failed = Event::Finished(Finished::BesideArchived(Ok(Archived { files: 0, ..put })));
    assert!(!begun(&checked.handle(T0 + s(1), failed)) && !begun(&checked.handle(T0 + s(60), Event::Tick)));
    assert_eq!(checked.world().conditions["wal_not_archived"].severity, Severity::Warning);
    assert!(begun(&checked.handle(T0 + s(62), Event::Tick)));
    let archived = Archived { files: 3, ..Archived::default() };
    let actions = checked.handle(T0 + s(63), Event::Finished(Finished::BesideArchived(Ok(archived))));
    assert!(decided(&actions, "wal_archived").is_some() && !checked.world().conditions.contains_key("wal_not_archived"));
    assert!(!begun(&checked.handle(T0 + s(200), Event::Tick)));
}

/// Whom it will follow is not known, so nor is what belongs into the archive; and PostgreSQL takes up a leader without a stop.
#[test]
fn one_that_was_started_while_nobody_wrote_is_stopped_and_judged_before_it_follows() {
    let world = with_an_archive(World { view: Some(Arc::new(vacant())), ..busy(idle(), OperationKind::Look) });
    let mut checked = Checked::resume(world, State::Following);
    let actions = checked.handle(T0, looked(2));
    assert!(goes_on(&actions) && !archives(&actions), "in recovery at its own end: {actions:?}");
    for (files, stopped) in [(0, false), (2, true)] {
        let mut world = with_an_archive(standby());
        world.probe = Some(probe(T0, SqlFacts { walreceiver: None, ..sql(true, 2, 1_000) }));
        world.receiving.not_streaming_since = Some(T0);
        world.left.ready = files;
        let mut checked = Checked::resume(world, State::Following);
        let now = BootTime(T0.0 + 1);
        let actions = checked.handle(now, Event::View(Arc::new(led_by_b()), now));
        let stops = actions.iter().any(|action| matches!(action, Action::Stop(StopMode::Fast { .. })));
        assert_eq!((stops, checked.state() == &State::Rejoining), (stopped, stopped), "{actions:?}");
        assert!(!operations(&checked.handle(now + Duration::from_secs(1), Event::Tick)).contains(&OperationKind::Configure));
    }
}
