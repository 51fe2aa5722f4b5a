//! Clients of a primary that was started again are kept out until standbys have what it recovered (SAFETY row 48), whichever daemon is there.

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{leads, led_by_us, ours};
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::postgres::{ReplicaFacts, SqlFacts, Survey};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::facts::synchrony::SyncRecord;
use crate::machine::action::{Action, OperationKind};
use crate::machine::event::{Event, Finished};
use crate::machine::state::State;
use crate::machine::world::{Lock, World};
use crate::types::Revision;

/// Each commit is on two of the three.
fn recorded_for_two() -> ClusterView {
    let members = ["a", "b", "c"].map(name).into();
    let record = SyncRecord { leader: name("a"), epoch: led_by_us().leader.unwrap().epoch, members, copies: 2 };
    ClusterView { sync: Some(record), sync_revision: Revision(390), ..led_by_us() }
}

/// A daemon that took a primary over, and has told it nothing yet.
fn found_running() -> Checked {
    let spec =
        spec_with(&["a", "b", "c"], "ha: { ttl: 10s, failsafe: false }\n  replication: { mode: quorum, strict: true, use_slots: false }");
    let world = World { spec: Some((1, spec)), view: Some(Arc::new(recorded_for_two())), in_force: None, probe: None, ..leads() };
    Checked::resume(world, State::Primary)
}

/// A probe that shows what `b` has flushed of 1,000 bytes, when whatever was asked for before has come to nothing.
fn shows(checked: &mut Checked, now: BootTime, flushed: u64) -> Vec<Action> {
    let standby = ReplicaFacts { sync_priority: 1, ..streaming("b", flushed) };
    let deadlines = times().deadlines(now);
    let mut world = checked.world().clone();
    world.lock = Lock::Proved { identity: ours(), until: deadlines.valid_until, announce_at: deadlines.announce_at };
    world.in_flight.clear();
    *checked = Checked::resume(world, State::Primary);
    checked.handle(now, Event::Probed(probe(now, SqlFacts { replicas: vec![standby], ..sql(false, 2, 1_000) })))
}

fn lets_clients_in(actions: &[Action]) -> bool {
    operations(actions).iter().any(|kind| matches!(kind, OperationKind::Open | OperationKind::Configure))
}

#[test]
fn row_48_the_next_daemon_does_not_let_in_whom_the_one_before_kept_out() {
    let mut checked = found_running();
    for second in 0..5 {
        let actions = shows(&mut checked, T0 + s(second), 900);
        assert!(!lets_clients_in(&actions), "{actions:?}");
    }
    assert!(checked.world().conditions["closed"].message.contains("may be kept out"));
    let actions = shows(&mut checked, T0 + s(5), 1_000);
    assert!(operations(&actions).contains(&OperationKind::Open), "{actions:?}");
    checked.handle(T0 + s(5), Event::Finished(Finished::Opened(Ok(()))));
    let actions = shows(&mut checked, T0 + s(6), 1_000);
    assert!(operations(&actions).contains(&OperationKind::Configure), "what else was waiting goes on: {actions:?}");
    assert!(!checked.world().conditions.contains_key("closed"));
}

/// Found by reading: while the lock is handed over nobody lets clients in, and a checkpoint may take longer than they are to be kept out.
#[test]
fn row_48_no_switchover_begins_while_clients_are_kept_out() {
    let mut world = found_running().world().clone();
    let mut view = recorded_for_two();
    let record =
        RequestRecord { ask: Ask::Switchover { to: name("b") }, by: String::new(), at: String::new(), progress: RequestProgress::Created };
    view.requests.insert("1".to_owned(), RequestKey { record, mod_revision: Revision(395) });
    world.view = Some(Arc::new(view));
    world.requests.survey = Some((T0 + s(100), Survey::default()));
    let mut checked = Checked::resume(world, State::Primary);
    let is_answered = |actions: &[Action]| operations(actions).contains(&OperationKind::AnswerRequest);
    for second in 0..10 {
        let actions = shows(&mut checked, T0 + s(second), 900);
        assert!(!is_answered(&actions), "{actions:?}");
    }
    shows(&mut checked, T0 + s(10), 1_000);
    checked.handle(T0 + s(10), Event::Finished(Finished::Opened(Ok(()))));
    let actions = shows(&mut checked, T0 + s(11), 1_000);
    assert!(is_answered(&actions), "{actions:?}");
}

#[test]
fn row_48_whom_nobody_can_vouch_for_is_let_in_after_30_s() {
    let mut checked = found_running();
    let opened = (0..60).find(|second| lets_clients_in(&shows(&mut checked, T0 + s(*second), 900)));
    assert_eq!(opened, Some(30));
}
