//! Maintenance mode in small clusters: nothing is elected, started or ended in it, and nobody leads after it before all who have to have heard.

use std::sync::Arc;
use std::time::Duration;

use super::checked::Checked;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{full, leads, led_by_b, maintained, ours, restarts, suspended};
use super::toy::Toy;
use crate::facts::guard::{Maintenance, PostmasterFacts, Rung};
use crate::facts::maintenance::Phase;
use crate::facts::postgres::DatabaseState;
use crate::facts::requests::{Ask, RequestProgress};
use crate::machine::action::{Action, OperationKind};
use crate::machine::event::Event;
use crate::machine::requests::{Requests, Restart, RestartStage};
use crate::machine::state::{HandOver, State};
use crate::machine::world::{Lock, World};
use crate::policy::rejoin::Rejoin;
use crate::types::Revision;

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// `a` leads; maintenance mode is on, and all have heard of it.
fn paused() -> Toy {
    let mut toy = Toy::working(&["a", "b", "c"]);
    let leader = toy.leader().unwrap().to_owned();
    assert_eq!(leader, "a");
    toy.etcd.maintain(Phase::On);
    toy.until("all have heard of it, and the primary's guard suspends", secs(5), |toy| {
        let heard = |member| toy.etcd.keys.members[&name(member)].record.maintenance;
        ["a", "b", "c"]
            .iter()
            .all(|member| toy.state(member) == "paused" && heard(member).is_some_and(|word| word.suspends == (*member == "a")))
    });
    toy
}

fn resume(toy: &mut Toy) {
    toy.etcd.maintain(Phase::Ending);
}

fn starts(toy: &Toy) -> u64 {
    toy.hosts.values().map(|host| host.server.starts).sum()
}

#[test]
fn row_68_a_primary_that_dies_in_maintenance_mode_is_left_dead_and_starts_in_place_when_that_is_over() {
    let mut toy = paused();
    let (now, before) = (toy.now, starts(&toy));
    toy.host("a").server.crash(now);
    toy.run(secs(60));
    assert_eq!((toy.leader(), toy.primary(), starts(&toy)), (Some("a"), None, before), "{}", toy.story());
    resume(&mut toy);
    toy.converges(secs(30));
    assert_eq!(toy.leader(), Some("a"), "nobody else was elected: the lock was kept all the while\n{}", toy.story());
    assert!(toy.etcd.keys.suspended.is_empty() && toy.etcd.keys.maintenance.is_none());
}

#[test]
fn a_primary_goes_on_in_maintenance_mode_without_etcd_and_takes_its_lock_anew_on_the_same_timeline() {
    let mut toy = paused();
    let (epoch, timelines) = (toy.etcd.keys.leader.clone().unwrap().epoch, toy.promoted.len());
    toy.host("a").connected = false;
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    toy.run(secs(60));
    assert_eq!((toy.leader(), toy.primary()), (None, Some("a")), "nobody is elected, and nobody ends it\n{}", toy.story());
    toy.host("a").connected = true;
    toy.until("it has the lock again", secs(20), |toy| toy.leader() == Some("a"));
    assert_ne!(toy.etcd.keys.leader.clone().unwrap().epoch, epoch);
    resume(&mut toy);
    toy.converges(secs(10));
    assert_eq!((toy.leader(), toy.promoted.len()), (Some("a"), timelines), "{}", toy.story());
}

#[test]
fn a_lock_that_was_taken_anew_with_an_answer_that_was_lost_is_taken_once_more_by_the_next_daemon() {
    let mut toy = paused();
    toy.host("a").connected = false;
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    toy.host("a").lost_answers.insert(OperationKind::Acquire);
    toy.host("a").connected = true;
    toy.until("it has the lock, and does not know it", secs(20), |toy| toy.leader() == Some("a"));
    toy.kill_daemon("a");
    toy.host("a").lost_answers.clear();
    toy.until("that lock has run out too", secs(30), |toy| toy.leader().is_none());
    toy.start_daemon("a");
    toy.until("it has it again", secs(30), |toy| toy.leader() == Some("a"));
    resume(&mut toy);
    toy.converges(secs(10));
    assert_eq!(toy.primary(), Some("a"));
}

#[test]
fn a_daemon_that_is_started_again_in_maintenance_mode_leaves_a_primary_without_a_lock_as_it_is() {
    let mut toy = paused();
    toy.kill_daemon("a");
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    let before = starts(&toy);
    toy.start_daemon("a");
    toy.until("it has taken the lock anew", secs(30), |toy| toy.leader() == Some("a"));
    assert_eq!((toy.primary(), starts(&toy)), (Some("a"), before), "{}", toy.story());
}

#[test]
fn the_daemon_that_is_stopped_in_maintenance_mode_leaves_postgresql_running() {
    let mut toy = paused();
    toy.stop_daemon("a");
    toy.run(secs(60));
    assert_eq!((toy.host("a").exit, toy.primary()), (Some(0), Some("a")), "{}", toy.story());
    resume(&mut toy);
    toy.run(secs(30));
    assert!(toy.etcd.keys.maintenance.is_some(), "the guard of `a` has not heard that it is over, and nobody may lead");
    assert_eq!((toy.leader(), toy.primary()), (None, Some("a")));
    toy.start_daemon("a");
    toy.converges(secs(30));
    assert_eq!(toy.leader(), Some("a"));
}

#[test]
fn where_nobody_holds_the_lock_nobody_leads_before_every_declared_member_has_heard_of_the_end() {
    let mut toy = paused();
    toy.kill_daemon("c");
    toy.power_off("a");
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    resume(&mut toy);
    toy.run(secs(60));
    assert_eq!(toy.leader(), None, "{}", toy.story());
    toy.start_daemon("a");
    toy.run(secs(30));
    assert_eq!(toy.leader(), None, "`c` has not heard of it\n{}", toy.story());
    toy.start_daemon("c");
    toy.converges(secs(60));
}

#[test]
fn an_operator_that_insists_has_it_over_whoever_was_not_heard_and_a_guard_that_comes_back_fences() {
    let mut toy = paused();
    toy.kill_daemon("a");
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    let pause_gone = |keys: &mut crate::facts::cluster::ClusterView| {
        (keys.maintenance, keys.maintenance_revision) = (None, Revision(0));
        keys.suspended.clear();
    };
    // What `resume --insist` says has to be seen to first: nothing of PostgreSQL is left there.
    let now = toy.now;
    toy.host("a").server.crash(now);
    toy.etcd.by_hand(pause_gone);
    toy.until("another leads", secs(60), |toy| toy.leader().is_some_and(|leader| leader != "a"));
    toy.start_daemon("a");
    toy.converges(secs(60));
    assert!(!toy.host("a").server.suspends());
}

#[test]
fn a_switchover_that_maintenance_mode_overtakes_is_given_up_and_the_primary_goes_on() {
    for wait in [0, 20, 60, 100] {
        let mut toy = Toy::working(&["a", "b", "c"]);
        toy.ask("1", Ask::Switchover { to: name("b") });
        toy.until("it is being carried out", secs(5), |toy| toy.state("a") == "handing_over");
        toy.run(ms(wait));
        if toy.leader() != Some("a") {
            continue;
        }
        toy.etcd.maintain(Phase::On);
        toy.until("it is over", secs(20), |toy| !toy.progress("1").is_open());
        assert!(matches!(toy.progress("1"), RequestProgress::Refused { .. }), "{:?}\n{}", toy.progress("1"), toy.story());
        toy.until("all are in maintenance mode", secs(20), |toy| ["a", "b", "c"].iter().all(|member| toy.state(member) == "paused"));
        assert_eq!((toy.leader(), toy.primary()), (Some("a"), Some("a")), "{}", toy.story());
    }
}

#[test]
fn what_its_own_restart_has_taken_down_runs_again_before_maintenance_mode_begins_there() {
    for (member, wait) in ["a", "b"].into_iter().flat_map(|member| [0, 5, 20, 60, 100, 200].map(|wait| (member, wait))) {
        let mut toy = Toy::working(&["a", "b", "c"]);
        toy.ask("1", Ask::Restart { on: name(member), if_leader: None, if_pending: false, at_s: None });
        toy.until("it has begun", secs(5), |toy| toy.daemon(member).checked.world().requests.restart.is_some());
        toy.run(ms(wait));
        toy.etcd.maintain(Phase::On);
        toy.until("all are in maintenance mode", secs(20), |toy| ["a", "b", "c"].iter().all(|member| toy.state(member) == "paused"));
        let runs = matches!(toy.hosts[&name(member)].server.facts().unwrap().postmaster, PostmasterFacts::Running { .. });
        assert!(runs, "{member} after {wait} ms\n{}", toy.story());
        toy.until("it is answered", secs(20), |toy| !toy.progress("1").is_open());
        assert!(matches!(toy.progress("1"), RequestProgress::Done { .. }), "{:?}\n{}", toy.progress("1"), toy.story());
        assert_eq!(toy.primary(), Some("a"));
    }
}

/// The standby `a` was stopped to be started again, and maintenance mode is on.
fn down_by_its_restart() -> World {
    let world = restarts(maintained(full(DatabaseState::ShutDownInRecovery), Phase::On), RestartStage::Start);
    let restart = world.requests.restart.clone().map(|restart| Restart { leads: false, ..restart });
    World { requests: Requests { restart, ..world.requests.clone() }, ..world }
}

#[test]
fn one_that_does_not_start_or_would_have_to_be_copied_is_left_to_whoever_set_maintenance_mode() {
    let begins = |world: World, state: State, after| {
        let mut checked = Checked::resume(world, state);
        let actions = checked.handle(T0 + after, Event::Tick);
        (operations(&actions).contains(&OperationKind::Start), checked.state().name())
    };
    assert_eq!(begins(down_by_its_restart(), State::Following, ms(10)), (true, "following"));
    assert_eq!(begins(down_by_its_restart(), State::Following, secs(31)), (false, "paused"));
    let mut failed = down_by_its_restart();
    failed.retry_later(T0, OperationKind::Start);
    assert_eq!(begins(failed, State::Following, secs(5)), (false, "paused"));
    let copied = World { rejoin: Some(Rejoin::Clone { why: "a test".to_owned(), lost: None }), ..down_by_its_restart() };
    assert_eq!(begins(copied, State::Rejoining, ms(10)), (false, "paused"));
    let of_its_own = World { requests: Requests::default(), ..down_by_its_restart() };
    assert_eq!(begins(of_its_own, State::Following, ms(10)), (false, "paused"), "nobody has begun to restart it");
}

#[test]
fn a_standby_that_a_person_promotes_in_maintenance_mode_is_left_alone_and_holds_up_its_end() {
    let mut toy = paused();
    toy.promote_by_hand("b");
    toy.run(secs(20));
    assert!(!toy.host("b").server.in_recovery(), "{}", toy.story());
    resume(&mut toy);
    toy.run(secs(20));
    assert!(toy.etcd.keys.maintenance.is_some() && toy.host("b").server.promoted_by_hand, "nobody ends what a person promoted");
    let now = toy.now;
    toy.host("b").server.end(now, Rung::FastStop);
    toy.until("it is over when the person has stopped it", secs(20), |toy| toy.etcd.keys.maintenance.is_none());
    assert_eq!((toy.leader(), toy.primary()), (Some("a"), Some("a")));
}

#[test]
fn i1_a_guard_that_suspends_fences_when_another_leads_although_maintenance_mode_was_set_again() {
    let mut toy = paused();
    toy.host("a").connected = false;
    toy.until("the lock has run out", secs(30), |toy| toy.leader().is_none());
    // An operator insists, another is elected, and the next work begins. Then `a` is back.
    toy.etcd.by_hand(|keys| {
        (keys.maintenance, keys.maintenance_revision, keys.release) = (None, Revision(0), None);
        keys.suspended.clear();
    });
    let now = toy.now;
    toy.host("a").server.end(now, Rung::FastStop);
    toy.until("another leads", secs(60), |toy| toy.leader().is_some() && toy.primary() == toy.leader());
    toy.etcd.maintain(Phase::On);
    toy.run(secs(2));
    toy.host("a").connected = true;
    toy.until("its guard suspends no more", secs(10), |toy| !toy.hosts[&name("a")].server.suspends());
}

#[test]
fn i1_where_etcd_was_restored_to_before_it_the_guard_is_told_to_fence_all_the_same() {
    let world = suspended(maintained(leads(), Phase::On));
    let mut restored = led_by_b();
    restored.revision = Revision(100);
    let mut checked = Checked::resume(World { lock: Lock::None, holding: None, ..world }, State::Paused);
    let actions = checked.handle(T0 + ms(10), Event::View(Arc::new(restored), T0 + ms(10)));
    let told = actions.iter().find_map(|action| if let Action::Maintain(word) = action { Some(*word) } else { None });
    assert_eq!(told, Some(Maintenance { revision: Revision(390), suspends: false }), "{actions:?}");
}

#[test]
fn a_daemon_that_is_told_to_stop_when_maintenance_mode_has_just_been_set_hands_nothing_over() {
    for state in [State::Primary, State::HandingOver { hand_over: HandOver::new(ours(), None, None, T0) }] {
        let mut checked = Checked::resume(maintained(leads(), Phase::On), state);
        checked.handle(T0 + ms(10), Event::StopRequested);
        let actions = checked.handle(T0 + ms(20), Event::Tick);
        assert_eq!(checked.state().name(), "paused", "{actions:?}");
        assert!(!checked.world().exited && !actions.iter().any(|action| matches!(action, Action::Stop(_))), "its guard is told first");
        let mut facts = checked.world().guard.clone().unwrap();
        (facts.sequence, facts.maintenance) = (9, Maintenance { revision: Revision(390), suspends: true });
        checked.handle(T0 + ms(30), Event::Guard(facts));
        assert!(checked.world().exited);
    }
}
