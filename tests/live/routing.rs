//! Where clients get through HAProxy when roles change. Where its checks are an hour apart, only its runtime socket can have told it.

use nix::sys::signal::Signal;

use crate::rig::haproxy::{EACH_SECOND, Haproxy, NEVER};
use crate::rig::wait::holds_throughout;
use crate::rig::world::{MustSucceed, Setup, World};

/// For what must not happen meanwhile: a few looks of a daemon at HAProxy.
const A_WHILE: std::time::Duration = std::time::Duration::from_secs(5);
const ALL: &[usize] = &[0, 1, 2];

fn told_by(told_by: &'static [usize]) -> Setup {
    Setup { haproxy: Some(Haproxy { checks: NEVER, told_by }), ..Setup::default() }
}

/// A cluster whose HAProxy has been told what there is, and its leader.
fn routed(setup: &Setup) -> (World, usize) {
    let world = World::up(setup);
    let leader = world.leader();
    world.wait_routed(leader, "after the bootstrap");
    (world, leader)
}

fn switch_over(world: &World, target: usize) {
    world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap().must_succeed("pgherd switchover");
}

/// n1 alone tells it: as the former primary, as the new one and as neither.
fn an_haproxy_on_one_host_follows_every_switchover(setup: &Setup) {
    let (world, first) = routed(setup);
    let mut former = first;
    for target in [(first + 1) % 3, (first + 2) % 3, first] {
        let mut session = world.silent_session(world.write_port());
        switch_over(&world, target);
        world.wait_routed(target, &format!("after a switchover from n{} to n{}", former + 1, target + 1));
        world.settle("the session on the former primary is cut", || session.is_cut());
        world.wait_whole("after the switchover");
        former = target;
    }
    world.finish();
}

#[test]
fn an_haproxy_is_told_of_every_switchover_by_the_daemon_of_its_host_whatever_part_that_has() {
    an_haproxy_on_one_host_follows_every_switchover(&told_by(&[0]));
}

#[test]
fn with_postgresql_17_an_haproxy_is_told_of_every_switchover_by_the_daemon_of_its_host() {
    an_haproxy_on_one_host_follows_every_switchover(&Setup { postgres_17: true, ..told_by(&[0]) });
}

#[test]
fn clients_get_to_the_new_primary_after_a_power_cut_and_to_the_former_one_for_reading_once_it_is_back() {
    for postgres_17 in [false, true] {
        let (world, former) = routed(&Setup { postgres_17, ..told_by(ALL) });
        world.cluster.cut_power(former);
        let leader = world.wait_another_leads(former);
        world.settle("clients get to the new primary", || world.through(world.write_port()) == Some(leader));
        assert_eq!(world.up_in("primary"), [leader]);
        world.cluster.start_node(former).unwrap();
        world.wait_whole("after the former primary came back");
        world.wait_routed(leader, "after the former primary came back");
        world.finish();
    }
}

#[test]
fn after_a_killed_postmaster_clients_get_to_the_primary_that_was_started_again() {
    let (world, leader) = routed(&told_by(ALL));
    let postmaster = world.postmaster(leader);
    postmaster.signal(Signal::SIGKILL);
    world.settle("another postmaster runs", || world.cluster.postmaster(leader).is_some_and(|now| now != postmaster));
    world.wait_writes(leader);
    world.wait_routed(leader, "after its restart");
    world.finish();
}

#[test]
fn sessions_on_a_former_primary_whose_host_hangs_are_cut() {
    let (world, former) = routed(&told_by(ALL));
    let mut session = world.silent_session(world.write_port());
    let mut frozen = vec![world.daemon(former), world.guard(former)];
    frozen.extend(world.cluster.postgres_processes(former));
    frozen.iter().for_each(|process| process.signal(Signal::SIGSTOP));
    let leader = world.wait_another_leads(former);
    world.settle("the session is cut, although nobody on that host can have ended it", || session.is_cut());
    world.settle("clients get to the new primary", || world.through(world.write_port()) == Some(leader));
    world.cluster.cut_power(former);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.wait_routed(leader, "after the former primary came back");
    world.finish();
}

#[test]
fn a_killed_daemon_costs_no_session_through_haproxy() {
    let (world, leader) = routed(&told_by(ALL));
    let mut session = world.silent_session(world.write_port());
    world.daemon(leader).signal(Signal::SIGKILL);
    world.cluster.start_node(leader).unwrap();
    let stays = holds_throughout(A_WHILE, || !session.is_cut() && world.up_in("primary") == [leader]);
    assert!(stays, "the session was cut, or HAProxy was told that {} takes no writes", world.name(leader));
    assert_eq!(world.through(world.write_port()), Some(leader));
    world.wait_whole("after the daemon came back");
    world.finish();
}

#[test]
fn an_haproxy_that_was_started_anew_is_told_again() {
    let (world, leader) = routed(&told_by(ALL));
    world.restart_haproxy();
    world.wait_routed(leader, "after HAProxy was started anew, which takes every server for one that works");
    world.finish();
}

#[test]
fn without_its_socket_haproxy_follows_by_its_checks_and_the_member_says_so() {
    let (world, _) = routed(&Setup { haproxy: Some(Haproxy { checks: EACH_SECOND, told_by: ALL }), ..Setup::default() });
    std::fs::remove_file(world.cluster.haproxy_socket()).unwrap();
    world.settle("every member says so", || (0..world.nodes()).all(|index| world.has_condition(index, "haproxy.sock")));
    let target = world.replica();
    switch_over(&world, target);
    world.settle("clients get to the new primary", || world.through(world.write_port()) == Some(target));
    world.restart_haproxy();
    world.settle("no member says so any more", || !(0..world.nodes()).any(|index| world.has_condition(index, "haproxy.sock")));
    world.wait_whole("after the switchover");
    world.wait_routed(target, "with the socket again");
    world.finish();
}

#[test]
fn what_haproxy_was_told_by_a_daemon_that_died_is_undone_by_its_checks() {
    let world = World::up(&Setup { haproxy: Some(Haproxy { checks: EACH_SECOND, told_by: &[0] }), ..Setup::default() });
    if world.leader() == 0 {
        switch_over(&world, 1);
        world.wait_whole("after the first switchover");
    }
    let former = world.leader();
    world.wait_routed(former, "while it is told");
    let target = if former == 1 { 2 } else { 1 };
    world.cluster.cut_power(0);
    switch_over(&world, target);
    world.settle("clients get to the new primary", || world.through(world.write_port()) == Some(target));
    world.settle("and only there", || world.up_in("primary") == [target]);
    // The last word of a daemon that was wrong when it died.
    let (wrong, right) = (world.name(former), world.name(target));
    world.runtime(&format!("set server primary/{wrong} health up;set server primary/{right} health down"));
    world.settle("the checks undo it", || world.up_in("primary") == [target]);
    world.cluster.start_node(0).unwrap();
    world.wait_whole("after the member came back");
    world.wait_routed(target, "told again");
    world.finish();
}
