//! Maintenance mode (SAFETY rows 67 and 68): nothing is fought and nobody elected, and afterwards all is judged afresh.

use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::wait::{A_WHILE, holds_throughout};
use crate::rig::world::{MustSucceed, Setup, World};

/// So many ttls something is away: any lease is over long before.
const AWAY_TTLS: u32 = 3;

fn ttl() -> Duration {
    Duration::from_secs(Setup::default().ttl_s.into())
}

#[track_caller]
fn paused(setup: &Setup) -> World {
    let world = World::up(setup);
    world.wait_writes(world.leader());
    let said = world.cluster.pgherd(&["pause", "--why", "a test", "--yes"]).unwrap();
    said.must_succeed("pgherd pause");
    assert!(said.out.contains("maintenance mode is on"), "{said:?}");
    world
}

#[track_caller]
fn resume(world: &World) {
    world.cluster.pgherd(&["resume", "--yes"]).unwrap().must_succeed("pgherd resume");
}

/// What status, HTTP and metrics say.
#[track_caller]
fn says_so(world: &World) {
    let status = world.cluster.pgherd(&["status"]).unwrap();
    assert!(status.out.contains("maintenance mode, set by") && status.out.contains("a test"), "{}", status.out);
    assert_ne!(world.cluster.pgherd(&["status", "--check"]).unwrap().code, Some(0), "a cluster in maintenance mode is not ready");
    for index in 0..world.nodes() {
        assert_eq!(world.json(index, "/patroni")["pause"], true);
        let metrics = world.get(index, "/metrics").unwrap().1;
        assert!(metrics.lines().any(|line| line.starts_with("patroni_is_paused{") && line.ends_with(" 1")), "{metrics}");
    }
}

fn a_primary_that_is_stopped_by_hand_stays_down_until_maintenance_mode_is_over(setup: &Setup) {
    let world = paused(setup);
    let (leader, timeline) = (world.leader(), world.timeline());
    says_so(&world);
    let postmaster = world.postmaster(leader);
    postmaster.signal(Signal::SIGINT);
    world.settle("PostgreSQL is down", || world.cluster.postgres_processes(leader).is_empty());
    let left_alone = || {
        world.cluster.postmaster(leader).is_none() && world.cluster.status().is_ok_and(|s| s.leader.as_deref() == Some(world.name(leader)))
    };
    assert!(holds_throughout(AWAY_TTLS * ttl(), left_alone), "it was started, or another leads");
    assert_eq!(world.timeline(), timeline);
    let refused = world.cluster.pgherd(&["switchover", "--to", world.name(world.others(leader)[0]), "--yes"]).unwrap();
    assert!(refused.code == Some(4) && refused.err.contains("pgherd resume"), "{refused:?}");
    resume(&world);
    world.wait_whole("after maintenance mode");
    world.wait_writes(leader);
    assert_eq!((world.leader(), world.timeline()), (leader, timeline), "started in place, and nobody was elected");
    world.finish();
}

#[test]
fn row_68_row_67_a_primary_that_is_stopped_by_hand_stays_down_until_maintenance_mode_is_over() {
    a_primary_that_is_stopped_by_hand_stays_down_until_maintenance_mode_is_over(&Setup::default());
}

#[test]
fn row_68_on_postgresql_17_and_etcd_3_5_as_well() {
    let newest = Setup { postgres_17: true, etcd_3_5: true, ..Setup::default() };
    a_primary_that_is_stopped_by_hand_stays_down_until_maintenance_mode_is_over(&newest);
}

#[test]
fn a_primary_without_etcd_goes_on_in_maintenance_mode_and_has_its_lock_again_on_the_same_timeline() {
    let no_failsafe = |document: &mut pgherd::cli::demo::documents::ClusterDocument| document.failsafe = Some(false);
    let world = paused(&Setup { document: no_failsafe, ..Setup::default() });
    let (leader, timeline, postmaster) = (world.leader(), world.timeline(), world.postmaster(world.leader()));
    let since = BootTime::now();
    world.set_etcd_network(leader, Network::Cut);
    world.settle("the lock has run out", || world.cluster.status().is_ok_and(|status| status.leader.is_none()));
    let goes_on = || world.http(leader, "/primary") == Some(200) && world.cluster.status().is_ok_and(|status| status.leader.is_none());
    assert!(holds_throughout(AWAY_TTLS * ttl(), goes_on), "it does not go on, or another leads");
    world.wait_writes(leader);
    world.set_etcd_network(leader, Network::Pass);
    world.settle("it has the lock again", || world.cluster.status().is_ok_and(|s| s.leader.as_deref() == Some(world.name(leader))));
    resume(&world);
    world.wait_whole("after maintenance mode");
    world.wait_writes(leader);
    assert_eq!((world.leader(), world.timeline(), world.postmaster(leader)), (leader, timeline, postmaster));
    let refused = world.prober().refused_since(world.name(leader), since);
    assert!(refused.is_empty(), "writes failed: {refused:?}");
    world.finish();
}

#[test]
fn a_daemon_that_is_stopped_in_maintenance_mode_leaves_postgresql_and_nobody_leads_before_it_is_back() {
    let world = paused(&Setup::default());
    let (leader, postmaster) = (world.leader(), world.postmaster(world.leader()));
    let since = BootTime::now();
    let daemon = world.daemon(leader);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(world.exit_code(daemon), 0);
    world.settle("the lock has run out", || world.cluster.status().is_ok_and(|status| status.leader.is_none()));
    let waits = world.cluster.pgherd(&["resume", "--yes", "--timeout", "3"]).unwrap();
    assert!(waits.code == Some(6) && waits.err.contains(world.name(leader)) && waits.err.contains("its daemon is not there"), "{waits:?}");
    assert!(holds_throughout(A_WHILE, || world.cluster.status().is_ok_and(|status| status.leader.is_none())), "another leads beside it");
    assert_eq!(world.postmaster(leader), postmaster, "PostgreSQL runs on");
    world.cluster.start_node(leader).unwrap();
    resume_is_over(&world);
    world.wait_whole("after maintenance mode");
    assert_eq!((world.leader(), world.postmaster(leader)), (leader, postmaster));
    let refused = world.prober().refused_since(world.name(leader), since);
    assert!(refused.is_empty(), "writes failed: {refused:?}");
    world.finish();
}

/// It was ended before; this waits for it.
#[track_caller]
fn resume_is_over(world: &World) {
    world.settle("maintenance mode is over", || world.cluster.pgherd(&["status"]).is_ok_and(|said| !said.out.contains("maintenance mode")));
}

#[test]
fn where_the_primarys_host_is_lost_an_operator_insists_and_another_leads() {
    let world = paused(&Setup::default());
    let (leader, timeline) = (world.leader(), world.timeline());
    world.cluster.cut_power(leader);
    world.settle("the lock has run out", || world.cluster.status().is_ok_and(|status| status.leader.is_none()));
    let waits = world.cluster.pgherd(&["resume", "--yes", "--timeout", "2"]).unwrap();
    assert!(waits.code == Some(6) && waits.err.contains(world.name(leader)), "{waits:?}");
    world.cluster.pgherd(&["resume", "--insist", "--yes"]).unwrap().must_succeed("pgherd resume --insist");
    world.wait_another_leads(leader);
    assert_eq!(world.timeline(), timeline + 1);
    world.cluster.start_node(leader).unwrap();
    world.wait_whole("when the lost host is back");
    world.finish();
}
