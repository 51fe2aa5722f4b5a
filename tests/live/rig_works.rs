//! The rig judged by worlds that are wrong on purpose, without pgherd: a checker that has never failed has proved nothing.

use nix::sys::signal::Signal;
use pgherd::cli::demo::process::end_of;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use crate::rig::checker::two_writers;
use crate::rig::secrets;
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
    let postmaster = world.postmaster(0);
    postmaster.signal(Signal::SIGKILL);
    // As long as nobody has waited for it, postmaster.pid names a process that is there.
    world.settle("no process is left", || end_of(postmaster).is_some() && world.cluster.postgres_processes(0).is_empty());
    world.foreign_postgres(0);
    world.wait_writes(0);
    assert_eq!(two_writers(&world.prober().acks()), None);
    assert!(!world.prober().longest_gap(begun).is_zero());
    assert!(world.cluster.household().living().iter().any(|found| found.name == "postgres"));
}

#[test]
fn a_password_that_got_out_is_found_wherever_it_stands() {
    let world = World::lay_out(&Setup::default());
    world.start_etcd_and_apply();
    world.foreign_initdb(0);
    assert_eq!(secrets::found(&world), Vec::<String>::new());
    let read = |name: &str| std::fs::read_to_string(world.cluster.plan.dir.join("secrets").join(name)).unwrap();
    let settings = world.cluster.data_dir(0).join("postgresql.auto.conf");
    std::fs::write(&settings, format!("primary_conninfo = 'password={}'", read("replication").trim())).unwrap();
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    let told = read("superuser");
    in_own_thread(async move {
        etcd_client::Client::connect(endpoints, None).await?.put("/pgherd/live/members/n2", told, None).await?;
        Ok(())
    })
    .unwrap();
    assert_eq!(secrets::found(&world), [settings.display().to_string(), "etcd's /pgherd/live/members/n2".to_owned()]);
}

#[test]
fn a_frozen_postmaster_does_not_keep_the_rig_from_ending_it() {
    let world = plain_servers(1);
    let all = world.cluster.postgres_processes(0);
    all.iter().for_each(|id| id.signal(Signal::SIGSTOP));
    world.cluster.household().end_all().unwrap();
    assert!(world.cluster.postgres_processes(0).is_empty());
}
