//! A former primary that wrote on by itself comes back by a rewind, and nothing that it wrote is thrown away (SAFETY rows 49 and 55).

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::cli::demo::process::ProcessId;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::world::{MustSucceed, Setup, World};

fn setup(postgres_17: bool) -> Setup {
    Setup { proxied: true, postgres_17, ..Setup::default() }
}

/// The primary writes what reaches nobody, and loses its power. Gives it; another leads.
fn diverges(world: &World, statement: &'static str) -> usize {
    let former = world.leader();
    world.set_replication_network(former, Network::Cut);
    world.wait_writes(former);
    run(world, former, statement);
    world.cluster.cut_power(former);
    world.set_replication_network(former, Network::Pass);
    world.wait_another_leads(former);
    former
}

fn run(world: &World, index: usize, statement: &'static str) {
    let connection = world.cluster.connection(world.port(index)).unwrap();
    in_own_thread(async move {
        let (client, driver) = connection.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(driver);
        Ok(client.batch_execute(statement).await?)
    })
    .unwrap();
}

/// What the cluster says that a member had written and nobody else has.
fn lost_writes(world: &World, member: usize) -> Vec<serde_json::Value> {
    let said = world.cluster.pgherd(&["get", "lost-writes", "-o", "json"]).unwrap();
    said.must_succeed("pgherd get lost-writes");
    let all: Vec<serde_json::Value> = serde_json::from_str(&said.out).unwrap();
    all.into_iter().filter(|one| one["member"] == world.name(member)).collect()
}

fn a_former_primary_is_rewound(postgres_17: bool) {
    let world = World::up(&setup(postgres_17));
    let inode = |world: &World, index: usize| fs::metadata(world.cluster.data_dir(index)).unwrap().ino();
    let before = inode(&world, world.leader());
    let former = diverges(&world, "select");
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the diverged member came back");
    assert_eq!(inode(&world, former), before, "the same data directory: no copy took its place");
    world.settle("what was lost is told", || !lost_writes(&world, former).is_empty());
    let [lost] = &lost_writes(&world, former)[..] else { panic!("it is told once: {:?}", lost_writes(&world, former)) };
    assert!(
        lost["transactions"].as_u64().is_some_and(|count| count > 0) && lost["bytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{lost}"
    );
    let kept = std::path::PathBuf::from(lost["kept"].as_str().unwrap()).join("pg_wal");
    assert!(fs::read_dir(&kept).unwrap().count() > 0, "{} holds it", kept.display());
    assert!(!world.decided_by_anybody("rewind").is_empty() && !world.decided_by_anybody("lost_writes").is_empty());
    assert!(world.has_condition(former, "get lost-writes"), "a person is told where it is");
    world.finish();
}

#[test]
fn row_49_a_former_primary_that_wrote_on_is_rewound_and_what_it_wrote_is_kept_and_told() {
    a_former_primary_is_rewound(false);
}

#[test]
fn row_49_on_postgresql_17_a_former_primary_that_wrote_on_is_rewound_too() {
    a_former_primary_is_rewound(true);
}

/// pg_rewind on a node's data directory, in the middle of its work.
fn rewind_under_way(world: &World, index: usize) -> Option<ProcessId> {
    let marked = world.cluster.node_dir(index).join("data.pgherd/rewind/marker.json").exists();
    let living = world.cluster.household().living();
    living.into_iter().find(|found| found.name == "pg_rewind" && !found.is_dead && marked).map(|found| found.id)
}

#[test]
fn row_55_a_rewind_that_is_killed_with_its_daemon_is_never_started_half_and_ends_with_the_next_daemon() {
    let world = World::up(&setup(false));
    let former = diverges(&world, "select");
    // Enough to copy that it can be met at it.
    run(&world, world.leader(), "create table big as select i, repeat('x', 500) as text from generate_series(1, 200000) i");
    world.cluster.start_node(former).unwrap();
    let mut met = None;
    world.settle("pg_rewind is at work", || {
        met = rewind_under_way(&world, former);
        met.is_some()
    });
    let daemon = world.daemon(former);
    met.unwrap().signal(Signal::SIGKILL);
    daemon.signal(Signal::SIGKILL);
    world.settle("the daemon is gone", || !daemon.is_alive());
    assert!(world.cluster.postmaster(former).is_none(), "it was not started");
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the second daemon had gone on");
    world.settle("what was lost is told", || lost_writes(&world, former).len() == 1);
    assert!(!world.cluster.node_dir(former).join("data.pgherd/rewind/marker.json").exists());
    world.finish();
}

/// How long it takes is told, and not asserted: the machine of a test is busy.
#[test]
fn a_former_primary_with_100_mb_of_diverged_wal_is_back_by_a_rewind() {
    // In async nobody leads who lacks more than so much.
    let document = |document: &mut ClusterDocument| document.ha.push("maximum_lag_on_failover: 1GB".to_owned());
    let world = World::up(&Setup { document, ..setup(false) });
    let former = diverges(&world, "create table lost as select i, repeat('x', 500) as text from generate_series(1, 200000) i");
    let begun = BootTime::now();
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the diverged member came back");
    let took = BootTime::now().since(begun);
    world.settle("what was lost is told", || lost_writes(&world, former).len() == 1);
    let bytes = lost_writes(&world, former)[0]["bytes"].as_u64().unwrap();
    println!("{} MB of diverged WAL: streaming {:.1} s after the start", bytes >> 20, took.as_secs_f64());
    assert!(bytes >= 100 << 20, "{bytes}");
    world.finish();
}
