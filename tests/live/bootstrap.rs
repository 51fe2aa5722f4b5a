//! How a cluster begins, how a member joins and rejoins, and what is never overwritten (SAFETY rows 32, 49, 53, 64, 77; I10, I11, I14).

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::cluster::run;

use crate::rig::proxy::Network;
use crate::rig::secrets;
use crate::rig::wait::holds_throughout;
use crate::rig::world::{Setup, World};

const LIMIT: Duration = Duration::from_secs(60);

/// Database system identifier: the first eight bytes of pg_control.
fn system_id(data_dir: &Path) -> Option<[u8; 8]> {
    fs::read(data_dir.join("global/pg_control")).ok()?.get(..8)?.try_into().ok()
}

#[test]
fn three_empty_members_become_one_cluster_with_one_initdb() {
    let world = World::up(&Setup::default());
    let ids: Vec<_> = (0..world.nodes()).map(|index| system_id(&world.cluster.data_dir(index)).unwrap()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "one system identifier");
    world.finish();
}

/// The end of every live test looks for them again; here is where they do stand, and that somebody was let in by them.
#[test]
fn row_77_a_members_password_for_the_others_is_in_its_passfile_that_nobody_else_reads_and_nowhere_else() {
    let world = World::up(&Setup::default());
    let secret = fs::read_to_string(world.cluster.plan.dir.join("secrets/replication")).unwrap();
    for index in 0..world.nodes() {
        let run_dir = world.cluster.node_dir(index).join("run");
        let files = fs::read_dir(run_dir).unwrap().flatten().map(|entry| entry.path()).filter(|path| path.is_file());
        let holders: Vec<_> = files.filter(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(secret.trim()))).collect();
        let [passfile] = &holders[..] else { panic!("one file holds it: {holders:?}") };
        assert_eq!(fs::metadata(passfile).unwrap().permissions().mode() & 0o777, 0o600, "{}", passfile.display());
    }
    assert_eq!(secrets::found(&world), Vec::<String>::new());
    world.finish();
}

#[test]
fn no_initdb_is_run_beside_a_data_directory_that_is_full_and_its_data_becomes_the_clusters() {
    let world = World::lay_out(&Setup::default());
    world.foreign_initdb(1);
    let before = system_id(&world.cluster.data_dir(1));
    world.start_etcd_and_apply();
    world.start_all();
    let no_other = || (0..world.nodes()).all(|index| [None, before].contains(&system_id(&world.cluster.data_dir(index))));
    assert!(holds_throughout(Duration::from_secs(5), no_other), "no initdb while a data directory is known to be full");
    world.wait_whole("with the data that was there");
    assert_eq!(system_id(&world.cluster.data_dir(0)), before);
    assert_eq!(system_id(&world.cluster.data_dir(1)), before);
}

#[test]
fn two_data_directories_of_different_clusters_are_left_alone_and_nobody_leads() {
    let world = World::lay_out(&Setup::default());
    world.foreign_initdb(0);
    world.foreign_initdb(1);
    let ids = || (0..world.nodes()).map(|index| system_id(&world.cluster.data_dir(index))).collect::<Vec<_>>();
    let before = ids();
    world.start_etcd_and_apply();
    world.start_all();
    world.settle("a condition names the system identifiers", || world.has_condition(0, "system") || world.has_condition(1, "system"));
    let untouched = || ids() == before && (0..world.nodes()).all(|index| world.http(index, "/primary") != Some(200));
    assert!(holds_throughout(Duration::from_secs(5), untouched), "nothing is made, copied or led");
}

#[test]
fn no_initdb_is_run_before_every_declared_member_has_reported() {
    let world = World::lay_out(&Setup::default());
    world.start_etcd_and_apply();
    world.cluster.start_node(0).unwrap();
    world.cluster.start_node(1).unwrap();
    let nothing = || (0..3).all(|index| system_id(&world.cluster.data_dir(index)).is_none());
    assert!(holds_throughout(Duration::from_secs(8), nothing), "the third may have a full data directory");
    world.cluster.start_node(2).unwrap();
    world.wait_whole("once all three have reported");
}

#[test]
fn an_initdb_that_is_cut_off_does_not_wedge_the_cluster() {
    let world = World::lay_out(&Setup::default());
    world.start_etcd_and_apply();
    world.start_all();
    let begun = |index: usize| world.cluster.data_dir(index).exists() || begun_beside(&world.cluster.node_dir(index));
    let mut first = None;
    world.settle("somebody has begun", || {
        first = (0..3).find(|index| begun(*index));
        first.is_some()
    });
    let first = first.unwrap();
    world.cluster.cut_power(first);
    for found in world.cluster.household().living().iter().filter(|found| found.name == "initdb") {
        found.id.signal(Signal::SIGKILL);
    }
    world.cluster.start_node(first).unwrap();
    world.wait_whole("after the cut-off initdb");
}

/// Whether something that is being made lies beside where the data directory will be.
fn begun_beside(node_dir: &Path) -> bool {
    fs::read_dir(node_dir).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("data") && entry.path().join("base").exists())
    })
}

#[test]
fn row_32_a_replica_whose_data_directory_was_removed_is_cloned_again() {
    let world = World::up(&Setup::default());
    let replica = world.replica();
    world.stop_node(replica);
    fs::remove_dir_all(world.cluster.data_dir(replica)).unwrap();
    world.cluster.start_node(replica).unwrap();
    world.wait_whole("after the clone");
    world.finish();
}

#[test]
fn row_32_a_primary_whose_data_directory_was_removed_copies_the_next_leader_and_never_runs_initdb() {
    let world = World::up(&Setup::default());
    let (former, timeline) = (world.leader(), world.timeline());
    let data_dir = world.cluster.data_dir(former);
    let before = system_id(&data_dir);
    assert!(before.is_some());
    let was = |state| world.entered(former, state).len();
    let (initialized, copied) = (was("initializing"), was("cloning"));
    world.cluster.cut_power(former);
    fs::remove_dir_all(&data_dir).unwrap();
    // At once: the lock is still in its name.
    world.cluster.start_node(former).unwrap();
    world.settle("another leads, and the former primary streams from it", || {
        let found = system_id(&data_dir);
        assert!(found.is_none() || found == before, "it ran initdb");
        let leader = world.cluster.status().ok().and_then(|status| status.leader);
        leader.is_some_and(|name| name != world.name(former)) && found == before && world.cluster.is_whole()
    });
    assert!(world.timeline() > timeline);
    assert_eq!((was("initializing"), was("cloning")), (initialized, copied + 1), "it copied the leader");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn a_former_primary_that_diverged_rejoins_and_its_own_data_is_kept() {
    let world = World::up(&Setup { proxied: true, ..Setup::default() });
    let former = world.leader();
    // Where no more WAL can be kept nothing is rewound.
    for number in 1..=pgherd::postgres::lost::KEPT_MAX {
        let kept = world.cluster.node_dir(former).join(format!("data.pgherd/lost/{number}"));
        fs::create_dir_all(kept).unwrap();
    }
    // Nothing of what it writes from now on reaches anybody.
    world.set_replication_network(former, Network::Cut);
    world.wait_writes(former);
    world.cluster.cut_power(former);
    world.set_replication_network(former, Network::Pass);
    world.wait_another_leads(former);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the diverged member came back");
    let kept = fs::read_dir(world.cluster.node_dir(former)).unwrap().flatten().map(|entry| entry.path());
    let kept: Vec<_> = kept.filter(|path| *path != world.cluster.data_dir(former)).collect();
    assert!(kept.iter().any(|path| holds_a_control_file(path)), "the diverged data directory is kept beside: {kept:?}");
    world.finish();
}

#[test]
fn a_former_primary_that_did_not_diverge_follows_without_a_clone() {
    let world = World::up(&Setup::default());
    let former = world.leader();
    let inode = |world: &World| fs::metadata(world.cluster.data_dir(former)).unwrap().ino();
    let before = inode(&world);
    world.stop_node(former);
    world.wait_another_leads(former);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    assert_eq!(inode(&world), before, "the same data directory");
    world.finish();
}

/// Whether a data directory is in here, at most two levels down.
fn holds_a_control_file(path: &Path) -> bool {
    let inside = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    path.join("global/pg_control").exists()
        || inside(path)
            .iter()
            .any(|one| one.join("global/pg_control").exists() || inside(one).iter().any(|two| two.join("global/pg_control").exists()))
}

#[test]
fn row_64_a_member_with_another_clusters_data_is_not_touched_and_says_why() {
    let world = World::up(&Setup::default());
    let replica = world.replica();
    world.stop_node(replica);
    fs::remove_dir_all(world.cluster.data_dir(replica)).unwrap();
    world.foreign_initdb(replica);
    let foreign = system_id(&world.cluster.data_dir(replica));
    world.cluster.start_node(replica).unwrap();
    world.settle("a condition names the system identifier", || world.has_condition(replica, "system"));
    let untouched = || system_id(&world.cluster.data_dir(replica)) == foreign && world.cluster.postmaster(replica).is_none();
    assert!(holds_throughout(Duration::from_secs(4), untouched), "neither started nor overwritten");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn a_member_whose_binaries_are_of_another_major_version_is_not_started_and_says_why() {
    let world = World::up(&Setup::default());
    let replica = world.replica();
    world.stop_node(replica);
    fs::write(world.cluster.data_dir(replica).join("PG_VERSION"), "9\n").unwrap();
    world.cluster.start_node(replica).unwrap();
    world.settle("a condition names the version", || world.has_condition(replica, "version"));
    assert!(holds_throughout(Duration::from_secs(4), || world.cluster.postmaster(replica).is_none()), "it is not started");
    assert!(world.cluster.data_dir(replica).join("global/pg_control").exists(), "and not overwritten");
    world.finish();
}

/// Runs a second daemon of a member's name, on another data directory, to its end: it refuses, and touches nothing.
fn a_stranger_is_refused(world: &World, index: usize) {
    let dir = world.cluster.plan.dir.join("stranger");
    let user = &world.cluster.household().user;
    for path in [dir.clone(), dir.join("run"), dir.join("log")] {
        fs::create_dir_all(&path).unwrap();
        user.own(&path).unwrap();
    }
    let mut document = world.cluster.node_document(index);
    document.dir = dir.clone();
    document.api_listen = format!("127.0.0.1:{}", world.ports.api(9));
    fs::write(dir.join("node.yaml"), document.to_yaml()).unwrap();
    user.own(&dir.join("node.yaml")).unwrap();
    let mut command = Command::new(&world.cluster.plan.programs.pgherd);
    command.arg("run").arg("--config").arg(dir.join("node.yaml"));
    let said = run(command, LIMIT).unwrap();
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(!dir.join("data/PG_VERSION").exists(), "it touched nothing");
}

#[test]
fn row_64_a_second_daemon_of_a_replicas_name_does_not_run() {
    let world = World::up(&Setup::default());
    a_stranger_is_refused(&world, world.replica());
    world.wait_whole("all the while");
    world.finish();
}

#[test]
fn row_64_a_second_daemon_of_the_leaders_name_does_not_run_and_the_leader_goes_on() {
    let world = World::up(&Setup::default());
    let (leader, timeline) = (world.leader(), world.timeline());
    a_stranger_is_refused(&world, leader);
    world.wait_writes(leader);
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn a_member_that_is_not_declared_serves_health_and_touches_nothing() {
    let setup = Setup { nodes: 4, document: |document| drop(document.members.pop()), ..Setup::default() };
    let mut world = World::lay_out(&setup);
    world.start_etcd_and_apply();
    world.start_all();
    world.settle("the three declared are whole", || world.status().is_whole(3));
    world.start_prober();
    assert_eq!(world.http(3, "/health"), Some(503), "it answers");
    let untouched = || !world.cluster.data_dir(3).join("PG_VERSION").exists() && world.cluster.postmaster(3).is_none();
    assert!(holds_throughout(Duration::from_secs(4), untouched), "it touches nothing");
    world.document.members = world.cluster.plan.nodes.iter().map(|node| node.declared.clone()).collect();
    let said = world.apply();
    assert_eq!(said.code, Some(0), "{said:?}");
    world.wait_whole("once the fourth is declared");
    world.finish();
}
