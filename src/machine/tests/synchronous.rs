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
use crate::machine::action::{Action, AfterNames, Operation, OperationKind};
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

/// The same, and by `sync` all three members count.
fn all_count() -> World {
    let mut world = waits_for_nobody();
    let mut view = ClusterView::clone(world.view.as_deref().unwrap());
    let members = [name("a"), name("b"), name("c")].into();
    view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(300), members, copies: 2 });
    view.sync_revision = Revision(310);
    world.view = Some(Arc::new(view));
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
fn a_daemon_that_takes_over_waits_for_those_that_the_record_names_also_when_it_can_read_that_only_later() {
    let mut world = all_count();
    world.probe = Some(probe(T0, SqlFacts { synchronous_standby_names: Names::Block.to_string(), ..sql(false, 2, 1_000) }));
    world.synchrony.server = Some(OfServer::new(StartId(1), InForce::since_start(Names::Block), T0));
    let goes_on = |world: World| {
        let mut daemon = Checked::resume(World { in_flight: Default::default(), ..world }, State::Primary);
        let ordered = operations(&daemon.handle(T0, Event::Tick));
        (daemon.world().clone(), ordered)
    };
    let (found, _) = goes_on(World { sure_of: None, ..world });
    let (_, ordered) = goes_on(World { sure_of: Some(Epoch(300)), ..found });
    let gives_up = [OperationKind::WriteSync, OperationKind::SetNames];
    assert!(
        !ordered.iter().any(|kind| gives_up.contains(kind)),
        "commits wait for nobody at once, and for a copy that will be there: {ordered:?}"
    );
}

/// PostgreSQL lets commits go with a standby's next answer, and while they wait there is nothing to answer.
#[test]
fn standbys_are_made_to_answer_when_a_change_of_the_names_may_let_commits_go_and_only_then() {
    let after = |recorded: Option<SyncRecord>, before: Names| {
        let mut world = waits_for_nobody();
        let mut view = ClusterView::clone(world.view.as_deref().unwrap());
        view.sync_revision = Revision(recorded.iter().map(|_| 310).sum());
        view.sync = recorded;
        world.view = Some(Arc::new(view));
        let shows = sql(false, 2, 1_000);
        let replicas = ["b", "c"].map(|member| streaming(member, 1_000)).to_vec();
        world.probe = Some(probe(T0, SqlFacts { replicas, synchronous_standby_names: before.to_string(), ..shows }));
        world.synchrony.server = Some(OfServer::new(StartId(1), InForce::since_start(before), T0));
        let ordered = Checked::resume(world, State::Primary).handle(T0, Event::Tick);
        let orders = ordered.into_iter().filter_map(|action| match action {
            Action::Do(Operation::SetNames { names, then, .. }) => Some((names, then)),
            _ => None,
        });
        let [(names, then)] = &orders.collect::<Vec<_>>()[..] else { panic!("whom commits wait for is changed once") };
        assert_ne!(names.acks(), None, "{names}");
        *then
    };
    let taken_over = SyncRecord { leader: name("a"), epoch: Epoch(300), members: [name("a"), name("b"), name("c")].into(), copies: 2 };
    assert_eq!(after(Some(taken_over), Names::Block), AfterNames::Answers, "behind a promotion all commits wait");
    assert_eq!(after(None, Names::Nobody), AfterNames::Checkpoint, "nobody waited, and from now on everybody has to");
}

#[test]
fn row_48_a_daemon_that_finds_a_primary_running_lets_clients_in_when_standbys_have_what_is_there() {
    let found = |flushed: u64| {
        let mut world = all_count();
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
