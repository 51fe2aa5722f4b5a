//! A new copy that an operator ordered: made, gone on with by the next daemon, given up with the old directory whole, never begun while it
//! is counted on. Sequences that nobody wrote are the simulator's.

use std::sync::Arc;
use std::time::Duration;

use crate::facts::cluster::ClusterView;
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::facts::synchrony::SyncRecord;
use crate::machine::action::{Action, Old, Operation, OperationKind};
use crate::machine::event::Event;
use crate::machine::requests::{Reinit, ReinitStage};
use crate::machine::state::State;
use crate::machine::world::World;
use crate::types::{Epoch, Revision, SystemId};

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{full, led_by_b};
use super::toy::Toy;

const THREE: [&str; 3] = ["a", "b", "c"];

fn reinit(on: &str, in_place: bool) -> Ask {
    Ask::Reinit { on: name(on), from_leader: false, in_place }
}

fn is_over(toy: &Toy, id: &str) -> bool {
    matches!(toy.progress(id), RequestProgress::Done { .. } | RequestProgress::Refused { .. })
}

#[test]
fn a_standby_is_copied_anew_and_the_answer_names_the_stages() {
    for in_place in [false, true] {
        let mut toy = Toy::working(&THREE);
        toy.ask("1", reinit("c", in_place));
        toy.until("the answer", s(30), |toy| is_over(toy, "1"));
        let RequestProgress::Done { message, stages } = toy.progress("1") else { panic!("{:?}", toy.progress("1")) };
        assert!(message.contains("new copy"), "{message}");
        let stages: Vec<String> = stages.iter().map(|over| over.stage.clone()).collect();
        let wanted = if in_place { "claimed stop sync empty copy start" } else { "claimed stop sync copy start" };
        assert_eq!(stages.join(" "), wanted);
        toy.converges(s(20));
        assert_eq!(toy.leader(), Some("a"));
    }
}

#[test]
fn a_daemon_that_is_killed_at_any_moment_of_it_goes_on_or_begins_again() {
    for in_place in [false, true] {
        for after_ms in (0..4_500).step_by(150) {
            let mut toy = Toy::working(&THREE);
            toy.ask("1", reinit("c", in_place));
            toy.run(ms(after_ms));
            toy.power_off("c");
            toy.run(s(2));
            toy.start_daemon("c");
            toy.until("the answer", s(60), |toy| is_over(toy, "1"));
            assert!(matches!(toy.progress("1"), RequestProgress::Done { .. }), "{:?} after {after_ms} ms", toy.progress("1"));
            toy.converges(s(20));
        }
    }
}

#[test]
fn the_leader_is_refused_and_keeps_what_it_has() {
    let mut toy = Toy::working(&THREE);
    toy.ask("1", reinit("a", true));
    toy.until("the answer", s(6), |toy| is_over(toy, "1"));
    let RequestProgress::Refused { reason } = toy.progress("1") else { panic!("{:?}", toy.progress("1")) };
    assert!(reason.contains("`a` leads"), "{reason}");
    assert_eq!(toy.state("a"), "primary");
}

#[test]
fn a_copy_that_fails_again_and_again_is_given_up_and_the_old_directory_streams_on() {
    for (kind, in_place) in [(OperationKind::Clone, false), (OperationKind::EmptyDirectory, true)] {
        let mut toy = Toy::working(&THREE);
        let before = toy.host("c").server.data.clone().unwrap();
        toy.host("c").failing.insert(kind);
        toy.ask("1", reinit("c", in_place));
        toy.until("the answer", s(60), |toy| is_over(toy, "1"));
        let RequestProgress::Refused { reason } = toy.progress("1") else { panic!("{:?}", toy.progress("1")) };
        assert!(reason.contains("failed 3 times in a row"), "{reason}");
        toy.converges(s(30));
        assert!(before.is_in_the_past_of(toy.host("c").server.data.as_ref().unwrap()));
    }
}

#[test]
fn while_nobody_leads_it_waits_and_the_member_can_be_elected_with_what_it_has() {
    let mut toy = Toy::working(&THREE);
    toy.host("c").hanging.insert(OperationKind::Clone);
    toy.ask("1", reinit("c", false));
    toy.until("it copies", s(20), |toy| toy.daemon("c").checked.world().in_flight.contains(&OperationKind::Clone));
    toy.power_off("a");
    toy.power_off("b");
    toy.host("c").hanging.clear();
    toy.until("c leads", s(60), |toy| toy.primary() == Some("c"));
    toy.until("the answer", s(10), |toy| is_over(toy, "1"));
    let RequestProgress::Refused { reason } = toy.progress("1") else { panic!("{:?}", toy.progress("1")) };
    assert!(reason.contains("leads by now"), "{reason}");
}

/// `a` was ordered to be copied anew from `b` and has stopped; `sync` names these.
fn stopped(named: &[&str]) -> Checked {
    let mut view = led_by_b();
    let members = named.iter().map(|member| name(member)).collect();
    view.sync = Some(SyncRecord { leader: name("b"), epoch: Epoch(350), members, copies: 2 });
    view.sync_revision = Revision(360);
    let progress = RequestProgress::Claimed { by: name("a"), stage: "stop".to_owned(), stages: Vec::new() };
    let record = RequestRecord { ask: reinit("a", true), by: "a test".to_owned(), at: String::new(), progress };
    view.requests.insert("1".to_owned(), RequestKey { record, mod_revision: Revision(370) });
    let mut world = World { view: Some(Arc::new(view)), ..full(DatabaseState::ShutDownInRecovery) };
    world.requests.reinit = Some(ordered(ReinitStage::Stop, true));
    Checked::resume(world, State::Rejoining)
}

fn ordered(stage: ReinitStage, in_place: bool) -> Reinit {
    Reinit { id: "1".to_owned(), from_leader: false, in_place, stage, since: T0, stages: Vec::new(), uncounted_since: None, given_up: None }
}

fn emptied(actions: &[Action]) -> bool {
    operations(actions).contains(&OperationKind::EmptyDirectory)
}

#[test]
fn i6_a_member_that_sync_names_keeps_its_data_and_gives_the_order_up() {
    let mut checked = stopped(&["a", "b"]);
    for second in 0..=40 {
        assert!(!emptied(&checked.handle(T0 + s(second), Event::Tick)), "after {second} s");
    }
    let given_up = checked.world().requests.reinit.as_ref().and_then(|reinit| reinit.given_up.clone());
    assert!(given_up.is_some_and(|why| why.contains("sync goes on naming `a`")));
}

#[test]
fn i6_what_was_on_its_way_to_sync_when_the_member_stopped_has_landed_before_its_data_goes() {
    let mut checked = stopped(&["b", "c"]);
    let at = T0 + s(1);
    assert!(!emptied(&checked.handle(at, Event::Tick)), "not at once");
    assert!(!emptied(&checked.handle(at + Duration::from_millis(2_500), Event::Tick)));
    assert!(emptied(&checked.handle(at + s(4), Event::Tick)));
}

#[test]
fn i6_under_the_next_leader_it_is_waited_for_once_more_while_the_directory_is_whole() {
    let mut checked = stopped(&["b", "c"]);
    let of_next = |checked: &Checked| {
        let mut view = ClusterView::clone(checked.world().view.as_ref().unwrap());
        view.leader = Some(leader("b", 8, 400));
        view.revision = Revision(500);
        view.sync = view.sync.map(|record| SyncRecord { epoch: Epoch(400), ..record });
        Arc::new(view)
    };
    checked.handle(T0 + s(1), Event::Tick);
    let at = T0 + Duration::from_millis(3_900);
    let next = of_next(&checked);
    assert!(!emptied(&checked.handle(at, Event::View(next, at))));
    assert!(!emptied(&checked.handle(at + s(2), Event::Tick)), "the next leader may be about to count on it");
    assert!(emptied(&checked.handle(at + s(4), Event::Tick)));
}

/// What cannot be started or rejoined as it is, is what an operator gives up by name most often.
#[test]
fn a_directory_that_is_unusable_half_rewound_or_of_another_cluster_can_be_given_up_too() {
    let foreign = ControlFacts { system_id: SystemId(1), ..control(DatabaseState::ShutDown, 1, 1_000) };
    let unusable = [
        DataDirectory::Unusable("a control file that is cut short".to_owned()),
        DataDirectory::HalfRewound(Box::new(half_rewound())),
        DataDirectory::Full(foreign),
    ];
    for data in unusable {
        let mut view = led_by_b();
        let progress = RequestProgress::Claimed { by: name("a"), stage: "claimed".to_owned(), stages: Vec::new() };
        let record = RequestRecord { ask: reinit("a", false), by: "a test".to_owned(), at: String::new(), progress };
        view.requests.insert("1".to_owned(), RequestKey { record, mod_revision: Revision(370) });
        let mut world = World { view: Some(Arc::new(view)), data: data.clone(), ..full(DatabaseState::ShutDown) };
        world.requests.reinit = Some(ordered(ReinitStage::Claimed, false));
        let mut checked = Checked::resume(world, State::Following);
        checked.handle(T0, Event::Tick);
        assert_eq!(checked.state(), &State::Rejoining, "{data:?}");
        checked.handle(T0 + s(1), Event::Tick);
        let actions = checked.handle(T0 + s(5), Event::Tick);
        let given_up = |action: &Action| matches!(action, Action::Do(Operation::Clone { old: Old::GivenUp, .. }));
        assert!(actions.iter().any(given_up), "{data:?}: {actions:?}");
    }
}
