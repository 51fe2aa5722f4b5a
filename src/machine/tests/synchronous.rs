//! Commits that wait for standbys, by single members: what is said of them, and what a change of the names waits for.

use std::sync::Arc;

use super::checked::Checked;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{busy, leads, led_by_us, ours, standby};
use crate::facts::cluster::ClusterView;
use crate::facts::guard::StartId;
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::SqlFacts;
use crate::facts::synchrony::{FEATURE, Names, SyncRecord};
use crate::machine::action::{Action, OperationKind};
use crate::machine::event::{Event, Finished};
use crate::machine::state::State;
use crate::machine::synchrony::OfServer;
use crate::machine::world::World;
use crate::policy::synchrony::InForce;
use crate::types::{Epoch, Revision};

/// `a` leads, `b` streams from it, and no commit waits yet.
fn waits_for_nobody() -> World {
    let mut world = leads();
    let mut view = led_by_us();
    view.members.values_mut().for_each(|key| key.record.features.push(FEATURE.to_owned()));
    world.view = Some(Arc::new(view));
    world.spec = Some((1, spec_with(&["a", "b", "c"], "replication: { mode: quorum }")));
    world.probe = Some(probe(T0, SqlFacts { replicas: vec![streaming("b", 1_000)], ..sql(false, 2, 1_000) }));
    world.synchrony.server = Some(OfServer::new(StartId(1), InForce::since_start(Names::Nobody), T0));
    world
}

#[test]
fn what_a_leader_said_of_its_commits_is_over_with_its_leadership() {
    for state in [State::Following, State::Rejoining] {
        let mut world = standby();
        world.fail("durability_reduced", "too few standbys are there".to_owned());
        world.warn("closed", "clients are kept out".to_owned());
        let mut member = Checked::resume(world, state);
        member.handle(T0, Event::Tick);
        let left: Vec<&&str> = member.world().conditions.keys().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn whom_commits_wait_for_is_changed_before_a_slot_that_takes_its_time_is_made() {
    let ordered = |world: World| Checked::resume(world, State::Primary).handle(T0, Event::Tick);
    assert!(operations(&ordered(waits_for_nobody())).contains(&OperationKind::SetNames));
    let cancels = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::CancelJob));
    assert!(cancels(&ordered(busy(waits_for_nobody(), OperationKind::KeepSlots))));
    assert!(!cancels(&ordered(busy(waits_for_nobody(), OperationKind::Checkpoint))), "what somebody asked for");
}

#[test]
fn row_48_a_daemon_that_finds_a_primary_running_lets_clients_in_when_standbys_have_what_is_there() {
    let found = |flushed: u64| {
        let mut world = waits_for_nobody();
        let mut view = ClusterView::clone(world.view.as_deref().unwrap());
        let members = [name("a"), name("b"), name("c")].into();
        view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(300), members, copies: 2 });
        view.sync_revision = Revision(310);
        world.view = Some(Arc::new(view));
        (world.synchrony.server, world.in_force) = (None, None);
        let shows = SqlFacts { replicas: vec![streaming("b", flushed)], ..sql(false, 2, 1_000) };
        world.probe = Some(probe(T0, shows.clone()));
        let mut member = Checked::resume(world, State::Primary);
        let mut actions = member.handle(T0, Event::Tick);
        let later = T0 + ms(1_000);
        let proved = LeaseEvent::Proved { lock: ours(), sent: later, until: times().deadlines(later).valid_until };
        actions.extend(member.handle(later, Event::Lease(proved)));
        actions.extend(member.handle(later, Event::Finished(Finished::NamesSet(Ok(())))));
        actions.extend(member.handle(later, Event::Probed(probe(later, shows))));
        operations(&actions)
    };
    let lets_in = [OperationKind::Open, OperationKind::Configure];
    let is_let_in = |ordered: &[OperationKind]| ordered.iter().any(|kind| lets_in.contains(kind));
    assert!(is_let_in(&found(1_000)));
    let kept_out = found(900);
    assert!(!is_let_in(&kept_out), "{kept_out:?}");
}
