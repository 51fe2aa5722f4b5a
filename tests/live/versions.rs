//! The newest PostgreSQL that is supported here, and the newer line of etcd.

use nix::sys::signal::Signal;

use crate::rig::world::{MustSucceed, Setup, World};

#[test]
fn postgresql_17_and_etcd_3_5_bootstrap_switch_over_and_fail_over() {
    let world = World::up(&Setup { postgres_17: true, etcd_3_5: true, ..Setup::default() });
    let target = world.replica();
    world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap().must_succeed("pgherd switchover");
    world.wait_whole("after the switchover");
    world.wait_writes(target);
    let postmaster = world.postmaster(target);
    postmaster.signal(Signal::SIGKILL);
    world.settle("another postmaster runs", || world.cluster.postmaster(target).is_some_and(|now| now != postmaster));
    world.wait_writes(target);
    world.cluster.cut_power(target);
    world.wait_another_leads(target);
    world.cluster.start_node(target).unwrap();
    world.wait_whole("after the failover");
    world.finish();
}
