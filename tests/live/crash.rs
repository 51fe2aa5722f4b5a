//! Processes of a member die or freeze, one by one and together (SAFETY rows 1-3, 5, 6, 9, 11, 12).

use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::clock::BootTime;

use crate::rig::wait::holds_throughout;
use crate::rig::world::{Setup, World};

/// How much longer than the lock's life an outage may be on a busy machine: etcd's expiry tick, the election, the promotion, noise.
const BEYOND_TTL: Duration = Duration::from_secs(6);

fn ttl(setup: &Setup) -> Duration {
    Duration::from_secs(setup.ttl_s.into())
}

/// The outage that began after `since` was not longer than the lock lives, and some.
#[track_caller]
fn outage_is_bounded(world: &World, setup: &Setup, since: BootTime) {
    let outage = world.prober().longest_gap(since);
    println!("outage {:.3} s", outage.as_secs_f64());
    assert!(outage < ttl(setup) + BEYOND_TTL, "writes were away for {outage:?} with a ttl of {} s", setup.ttl_s);
}

#[test]
fn row_11_a_clean_stop_of_the_primarys_daemon_hands_over_and_a_start_brings_a_replica() {
    let setup = Setup::default();
    let world = World::up(&setup);
    let former = world.leader();
    let timeline = world.timeline();
    let begun = BootTime::now();
    world.stop_node(former);
    world.wait_another_leads(former);
    assert_eq!(world.timeline(), timeline + 1);
    world.settle("the new leader has recorded its election", || !world.why_elected().is_empty());
    let why = world.why_elected();
    assert!(["handed over in good order", "the last leader released the lock"].contains(&why.as_str()), "elected because {why}");
    let left = world.entered(former, "stopping");
    assert_eq!(left, ["the lock was released in good order, and the daemon is to stop"]);
    outage_is_bounded(&world, &setup, begun);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}

/// No attempt on the leader failed since, and it still leads on the same timeline.
#[track_caller]
fn nothing_was_noticed(world: &World, leader: usize, timeline: u32, since: BootTime) {
    world.wait_writes(leader);
    let refused = world.prober().refused_since(world.name(leader), since);
    assert!(refused.is_empty(), "{} writes failed, the first: {:?}", refused.len(), refused.first());
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
}

/// What ends the daemon alone, and where the next one comes before A.
#[test]
fn row_1_row_11_a_daemon_that_is_killed_or_leaves_by_sigusr2_and_is_started_again_at_once_costs_no_write_and_no_failover() {
    let world = World::up(&Setup::default());
    let (leader, timeline, postmaster) = (world.leader(), world.timeline(), world.postmaster(world.leader()));
    for signal in [Signal::SIGKILL, Signal::SIGUSR2] {
        let begun = BootTime::now();
        let daemon = world.daemon(leader);
        daemon.signal(signal);
        world.settle("the daemon is gone", || !daemon.is_alive());
        world.cluster.start_node(leader).unwrap();
        world.settle("the daemon leads again", || world.http(leader, "/primary") == Some(200));
        nothing_was_noticed(&world, leader, timeline, begun);
        assert_eq!(world.postmaster(leader), postmaster, "PostgreSQL was not touched");
        world.wait_whole(&format!("after {signal}"));
    }
    world.finish();
}

#[test]
fn row_6_a_killed_postmaster_is_started_again_in_place_on_the_same_timeline_and_so_is_a_replicas() {
    let setup = Setup::default();
    let world = World::up(&setup);
    let (leader, timeline) = (world.leader(), world.timeline());
    for index in [leader, world.replica()] {
        let postmaster = world.postmaster(index);
        let begun = BootTime::now();
        postmaster.signal(Signal::SIGKILL);
        world.settle("another postmaster runs", || world.cluster.postmaster(index).is_some_and(|now| now != postmaster));
        world.wait_writes(leader);
        assert_eq!((world.leader(), world.timeline()), (leader, timeline));
        outage_is_bounded(&world, &setup, begun);
        world.wait_whole("after the restart in place");
    }
    world.finish();
}

#[test]
fn row_2_a_killed_daemon_that_stays_away_is_fenced_and_another_leads() {
    let setup = Setup::default();
    let world = World::up(&setup);
    let former = world.leader();
    let begun = BootTime::now();
    world.daemon(former).signal(Signal::SIGKILL);
    world.wait_another_leads(former);
    outage_is_bounded(&world, &setup, begun);
    assert!(world.cluster.postgres_processes(former).is_empty(), "the guard has fenced");
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the daemon came back");
    world.finish();
}

#[test]
fn row_3_a_frozen_daemon_is_fenced_and_wakes_up_as_a_replica() {
    let setup = Setup::default();
    let world = World::up(&setup);
    let former = world.leader();
    let daemon = world.daemon(former);
    let begun = BootTime::now();
    daemon.signal(Signal::SIGSTOP);
    let leader = world.wait_another_leads(former);
    outage_is_bounded(&world, &setup, begun);
    daemon.signal(Signal::SIGCONT);
    world.wait_whole("after the daemon woke up");
    assert_eq!(world.leader(), leader, "waking up changes no leader");
    world.finish();
}

#[test]
fn a_killed_guard_of_the_primary_leaves_no_writer_and_the_cluster_recovers() {
    let world = World::up(&Setup::default());
    let leader = world.leader();
    let (guard, postmaster) = (world.guard(leader), world.postmaster(leader));
    guard.signal(Signal::SIGKILL);
    // What etcd says is that of before for a while, and looks whole.
    world.settle("another guard keeps another postmaster", || {
        let another = |now: Option<_>, before| now.is_some_and(|now| now != before);
        another(world.cluster.guard(leader), guard) && another(world.cluster.postmaster(leader), postmaster)
    });
    assert!(!postmaster.is_alive(), "two postmasters on one data directory");
    world.wait_whole("under another guard");
    world.wait_writes(world.leader());
    world.finish();
}

/// Whoever leads next, it is another leadership: the former primary may be back first, behind another guard.
#[test]
fn row_3_a_frozen_guard_of_the_primary_leaves_no_second_writer() {
    let world = World::up(&Setup::default());
    let (former, timeline) = (world.leader(), world.timeline());
    let (guard, postmaster) = (world.guard(former), world.postmaster(former));
    guard.signal(Signal::SIGSTOP);
    world.settle("somebody leads on a later timeline", || world.status().timeline.is_some_and(|now| now > timeline));
    assert!(!postmaster.is_alive(), "the daemon has fenced by scan");
    guard.signal(Signal::SIGCONT);
    world.wait_whole("after the guard woke up");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn row_12_a_power_cut_of_the_primary_fails_over_and_its_return_brings_a_replica() {
    let setup = Setup { etcd_members: 3, ..Setup::default() };
    let world = World::up(&setup);
    let former = world.leader();
    let begun = BootTime::now();
    world.cluster.cut_power(former);
    let leader = world.wait_another_leads(former);
    outage_is_bounded(&world, &setup, begun);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    assert_eq!(world.leader(), leader, "the return changes no leader");
    world.finish();
}

#[test]
fn a_replica_that_loses_everything_changes_nothing_for_the_leader() {
    let world = World::up(&Setup::default());
    let (leader, timeline, replica) = (world.leader(), world.timeline(), world.replica());
    let begun = BootTime::now();
    world.cluster.cut_power(replica);
    let holds = holds_throughout(Duration::from_secs(6), || world.http(leader, "/primary") == Some(200));
    assert!(holds, "the leader goes on");
    nothing_was_noticed(&world, leader, timeline, begun);
    world.cluster.start_node(replica).unwrap();
    world.wait_whole("after the replica came back");
    world.finish();
}

#[test]
fn all_members_cut_off_at_once_and_back_again_lead_with_every_row() {
    let world = World::up(&Setup::default());
    let timeline = world.timeline();
    (0..world.nodes()).for_each(|index| world.cluster.cut_power(index));
    world.start_all();
    // The keys of before are in etcd until their leases are over, and look whole.
    world.settle("a member leads again", || (0..world.nodes()).any(|index| world.http(index, "/primary") == Some(200)));
    world.wait_whole("after all came back");
    world.wait_writes(world.leader());
    assert!(world.timeline() >= timeline);
    world.finish();
}

#[test]
fn two_full_restarts_in_good_order_keep_every_row() {
    let world = World::up(&Setup::default());
    for round in ["first", "second"] {
        let leader = world.leader();
        world.others(leader).into_iter().for_each(|index| world.stop_node(index));
        world.stop_node(leader);
        world.start_all();
        world.wait_whole(&format!("after the {round} restart"));
        world.wait_writes(world.leader());
    }
    world.finish();
}

#[test]
fn daemon_and_guard_killed_at_once_leave_no_postgresql_and_another_leads() {
    let setup = Setup::default();
    let world = World::up(&setup);
    let former = world.leader();
    let (daemon, guard) = (world.daemon(former), world.guard(former));
    let begun = BootTime::now();
    daemon.signal(Signal::SIGKILL);
    guard.signal(Signal::SIGKILL);
    world.settle("PostgreSQL has ended by its parent's death", || world.cluster.postgres_processes(former).is_empty());
    world.wait_another_leads(former);
    outage_is_bounded(&world, &setup, begun);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}

#[test]
fn row_5_a_daemon_that_crashes_three_times_stays_down_until_somebody_looks() {
    let world = World::up(&Setup::default());
    let former = world.leader();
    for _ in 0..3 {
        let daemon = world.daemon(former);
        daemon.signal(Signal::SIGKILL);
        world.settle("the daemon is gone", || !daemon.is_alive());
        world.cluster.start_node(former).unwrap();
        world.settle("the guard has met the daemon, or refused it", || {
            world.http(former, "/health").is_some() || world.cluster.daemon(former).is_none()
        });
    }
    let last = world.cluster.household().named(world.name(former)).unwrap();
    assert_eq!(world.exit_code(last), 7);
    world.wait_another_leads(former);
    assert_eq!(world.exit_code(world.cluster.start_node(former).unwrap()), 7, "and again");
    let mut command = world.cluster.node_command(former);
    command.arg("--clear-crashes");
    world.cluster.household().spawn(world.name(former), command, &world.cluster.node_log(former), false).unwrap();
    world.wait_whole("after somebody looked");
    world.finish();
}

#[test]
fn row_9_a_postmaster_that_keeps_dying_gives_the_lock_to_another() {
    let world = World::up(&Setup::default());
    let former = world.leader();
    let another_leads = || world.cluster.status().is_ok_and(|status| status.leader.is_some_and(|name| name != world.name(former)));
    world.settle("another leads after some deaths", || {
        if let Some(postmaster) = world.cluster.postmaster(former) {
            postmaster.signal(Signal::SIGKILL);
        }
        another_leads()
    });
    world.wait_whole("after the killing stopped");
    world.finish();
}

#[test]
fn the_loss_of_the_primary_and_of_etcds_leader_at_once_costs_one_failover() {
    let setup = Setup { etcd_members: 3, ..Setup::default() };
    let world = World::up(&setup);
    let former = world.leader();
    let etcd_leader = world.cluster.household().named(&world.etcd_leader()).unwrap();
    etcd_leader.signal(Signal::SIGKILL);
    world.cluster.cut_power(former);
    world.wait_another_leads(former);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("with one member of etcd less");
    world.finish();
}
