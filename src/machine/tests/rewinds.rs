//! A member that has diverged and is rewound: when it is not begun, what is never started, what is told. What it is judged on is
//! `policy::rejoin`'s; sequences that nobody wrote are the simulator's.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState, Probe, ProbeOutcome};
use crate::facts::synchrony::SyncRecord;
use crate::machine::action::{Action, Decision, OperationKind, StopMode, Upstream};
use crate::machine::event::{Event, Finished};
use crate::machine::state::State;
use crate::machine::world::{InForce, World};
use crate::policy::rejoin::Rejoin;
use crate::types::{Epoch, Revision, TimelineId};

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{busy, full, idle, led_by_b, standby, vacant};

/// It is judged to be rewound, behind a leader that has written since then.
fn judged(named_by_sync: bool, leader_writes: BootTime) -> (Checked, Vec<Action>) {
    let mut view = led_by_b();
    let members = if named_by_sync { vec![name("a"), name("b")] } else { vec![name("b"), name("c")] };
    view.sync = Some(SyncRecord { leader: name("b"), epoch: Epoch(350), members: members.into_iter().collect(), copies: 2 });
    view.sync_revision = Revision(360);
    let world = World {
        view: Some(Arc::new(view)),
        planned_for: Some(Epoch(350)),
        leader_writes_since: Some((Epoch(350), leader_writes)),
        ..busy(full(DatabaseState::ShutDown), OperationKind::PlanRejoin)
    };
    let mut checked = Checked::resume(world, State::Rejoining);
    let plan = Rejoin::Rewind { why: "a test".to_owned(), lost: half_rewound().lost };
    let actions = checked.handle(T0, Event::Finished(Finished::RejoinPlanned(Ok(plan))));
    (checked, actions)
}

fn begun(actions: &[Action]) -> Vec<OperationKind> {
    operations(actions).into_iter().filter(|kind| matches!(kind, OperationKind::Rewind | OperationKind::Clone)).collect()
}

#[test]
fn a_member_that_has_diverged_is_rewound() {
    assert_eq!(begun(&judged(false, T0).1), [OperationKind::Rewind]);
}

/// While it is rewound it has nothing, and the leader's loss would be the loss of what was acknowledged on the strength of both.
#[test]
fn i6_a_member_that_sync_names_is_not_rewound_and_is_copied_when_nobody_takes_its_place_in_time() {
    let (mut checked, actions) = judged(true, T0);
    assert_eq!(begun(&actions), []);
    assert!(checked.world().conditions["rejoin_waits"].message.contains("sync"));
    assert_eq!(begun(&checked.handle(T0 + s(19), Event::Tick)), []);
    let mut later = checked.handle(T0 + s(21), Event::Tick);
    later.extend(checked.handle(T0 + s(21) + Duration::from_millis(1), Event::Tick));
    assert_eq!(begun(&later), [OperationKind::Clone]);
}

#[test]
fn a_half_rewound_directory_is_not_started_and_waits_for_a_leader() {
    let half = || DataDirectory::HalfRewound(Box::new(half_rewound()));
    let world = World { view: Some(Arc::new(vacant())), data: half(), ..idle() };
    let mut checked = Checked::resume(world, State::Following);
    let actions = checked.handle(T0, Event::Tick);
    assert_eq!(checked.state(), &State::Rejoining);
    assert!(!operations(&actions).contains(&OperationKind::Start), "{actions:?}");
    assert!(checked.world().conditions.contains_key("rewind_unfinished"));
    let actions = checked.handle(T0 + s(1), Event::View(Arc::new(led_by_b()), T0 + s(1)));
    assert!(operations(&actions).contains(&OperationKind::PlanRejoin), "{actions:?}");
}

#[test]
fn what_was_lost_is_told_once_with_its_facts() {
    let mut checked = Checked::resume(busy(full(DatabaseState::ShutDown), OperationKind::Rewind), State::Rejoining);
    let told = |actions: Vec<Action>| {
        let lost = |action| {
            if let Action::Record(decision) = action { Some(decision).filter(|one: &Decision| one.kind == "lost_writes") } else { None }
        };
        actions.into_iter().filter_map(lost).collect::<Vec<_>>()
    };
    let [decision] = &told(checked.handle(T0, Event::Finished(Finished::WritesLost(Box::new(lost_writes())))))[..] else {
        panic!("told once")
    };
    assert!(decision.message.contains("3 committed transactions") && decision.message.contains("/lost/1"), "{}", decision.message);
    assert_eq!(decision.facts.get("first_commit"), lost_writes().first_commit.as_ref());
    assert!(told(checked.handle(T0 + s(1), Event::Tick)).is_empty());
}

/// Found by reading: what was copied or rewound from a leader that is gone was started again and again, and never judged, since its
/// backup_label is there until it has once begun to recover.
#[test]
fn a_copy_of_a_former_leader_is_judged_before_it_is_started_behind_the_next_one() {
    for (leads_on, judged) in [(2, false), (3, true)] {
        let DataDirectory::Full(control) = full(DatabaseState::InArchiveRecovery).data else { panic!("it is full") };
        let mut view = led_by_b();
        view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(leads_on));
        let copy = DataDirectory::Full(ControlFacts { backup_label: true, standby_signal: true, ..control });
        let world = World { view: Some(Arc::new(view)), data: copy, ..idle() };
        let mut checked = Checked::resume(world, State::Following);
        let begun = operations(&checked.handle(T0, Event::Tick));
        assert_eq!(begun.contains(&OperationKind::PlanRejoin), judged, "{begun:?}");
        assert_eq!(begun.contains(&OperationKind::Start), !judged, "{begun:?}");
    }
}

/// Found by reading: one that was rewound takes no connection before it has got all that its source had, and was told of no other source.
#[test]
fn a_standby_that_takes_no_connections_and_waits_for_wal_of_a_former_leader_is_judged_anew_behind_the_present_one() {
    let starting =
        |now| Event::Probed(Probe { begun: now, outcome: ProbeOutcome::NotYet("the database system is starting up".to_owned()) });
    for (follows, judged) in [("b", false), ("c", true)] {
        let upstream = Upstream { member: name(follows), host: "10.0.0.9".to_owned(), port: 5432, keeps_slots: false };
        let in_force = Some(InForce { generation: 1, upstream: Some(upstream) });
        let world = World { view: Some(Arc::new(led_by_b())), in_force, probe: None, postmaster_since: T0, ..standby() };
        let mut checked = Checked::resume(world, State::Following);
        let mut stopped_after = None;
        for second in 0..400 {
            let mut actions = checked.handle(T0 + s(second), Event::View(Arc::new(led_by_b()), T0 + s(second)));
            actions.extend(checked.handle(T0 + s(second), starting(T0 + s(second))));
            if actions.iter().any(|action| matches!(action, Action::Stop(StopMode::Fast { .. }))) {
                stopped_after.get_or_insert(second);
            }
        }
        assert_eq!(stopped_after.is_some_and(|second| second >= 60), judged, "{follows}: {stopped_after:?}");
        assert_eq!(checked.state() == &State::Rejoining, judged);
    }
}
