//! The rig judged by worlds that are wrong on purpose, without pgherd: a checker that has never failed has proved nothing.

use nix::sys::signal::Signal;
use pgherd::clock::BootTime;

use crate::rig::checker::two_writers;
use crate::rig::world::{Setup, World};

/// Plain servers with the prober at work.
fn plain_servers(count: usize) -> World {
    let mut world = World::lay_out(&Setup::default());
    for index in 0..count {
        world.foreign_initdb(index);
        world.foreign_postgres(index);
        world.create_table(index);
    }
    world.probe_all();
    (0..count).for_each(|index| world.wait_writes(index));
    world
}

#[test]
fn two_servers_that_both_take_writes_are_found() {
    let world = plain_servers(2);
    let report = two_writers(&world.prober().acks()).expect("two writers");
    assert!(report.contains("n1") && report.contains("n2"), "{report}");
}

#[test]
fn one_server_that_is_killed_and_started_again_is_no_offence_and_its_outage_is_seen() {
    let world = plain_servers(1);
    let begun = BootTime::now();
    world.postmaster(0).signal(Signal::SIGKILL);
    world.settle("no process is left", || world.cluster.postgres_processes(0).is_empty());
    world.foreign_postgres(0);
    world.wait_writes(0);
    assert_eq!(two_writers(&world.prober().acks()), None);
    assert!(!world.prober().longest_gap(begun).is_zero());
    assert!(world.cluster.household().living().iter().any(|found| found.name == "postgres"));
}

#[test]
fn a_frozen_postmaster_does_not_keep_the_rig_from_ending_it() {
    let world = plain_servers(1);
    let all = world.cluster.postgres_processes(0);
    all.iter().for_each(|id| id.signal(Signal::SIGSTOP));
    world.cluster.household().end_all().unwrap();
    assert!(world.cluster.postgres_processes(0).is_empty());
}
