//! `pgherd reinit`: a member is copied anew under load, is killed in the middle of it, and goes on; and a data directory that is put back in
//! time (SAFETY row 27).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::cluster::run;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::cli::demo::process::ProcessId;
use pgherd::cli::demo::runtime::in_own_thread;

use crate::rig::proxy::Network;
use crate::rig::wait::{A_WHILE, holds_throughout};
use crate::rig::world::{MustSucceed, Setup, World};
use crate::switchover::on_both;

/// Slow enough to be met in the middle, and fast enough for a test.
fn slow_copies(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
    document.replication.push("basebackup: {max_rate: 10MB, checkpoint: fast}".to_owned());
}

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

/// pg_basebackup for a node, in the middle of its work.
fn copy_under_way(world: &World, index: usize) -> Option<ProcessId> {
    let begun = world.cluster.node_dir(index).join("data.pgherd/clone/base").exists();
    let living = world.cluster.household().living();
    living.into_iter().find(|found| found.name == "pg_basebackup" && !found.is_dead && begun).map(|found| found.id)
}

/// What `status -o json` says of the copy that is being made for a node.
fn copying(world: &World, index: usize) -> serde_json::Value {
    let said = world.cluster.pgherd(&["status", "-o", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&said.out).unwrap_or_default();
    let member = status["members"].as_array().and_then(|all| all.iter().find(|one| one["name"] == *world.name(index)));
    member.map(|member| member["copying"].clone()).unwrap_or_default()
}

fn inode(world: &World, index: usize) -> u64 {
    fs::metadata(world.cluster.data_dir(index)).unwrap().ino()
}

#[test]
fn a_copy_that_was_ordered_is_shown_under_load_and_goes_on_when_its_daemon_and_pg_basebackup_are_killed() {
    let world = World::up(&Setup { document: slow_copies, ..Setup::default() });
    let standby = world.replica();
    world.ask(world.leader(), "create table big as select i, repeat('x', 500) as text from generate_series(1, 200000) i").unwrap();
    let before = inode(&world, standby);
    world.cluster.pgherd(&["reinit", world.name(standby), "--yes"]).unwrap().must_succeed("pgherd reinit");
    let mut met = None;
    world.settle("the copy is under way, and how far it got is shown", || {
        met = copy_under_way(&world, standby);
        let shown = copying(&world, standby);
        met.is_some() && shown["done_bytes"].as_u64() > Some(1 << 20) && shown["total_bytes"].as_u64() > Some(100 << 20)
    });
    assert_eq!(inode(&world, standby), before, "the old directory is there until the copy is");
    let said = world.cluster.pgherd(&["status"]).unwrap().out;
    assert!(said.contains(&format!("{}: copy of ", world.name(standby))), "{said}");
    let daemon = world.daemon(standby);
    met.unwrap().signal(Signal::SIGKILL);
    daemon.signal(Signal::SIGKILL);
    world.settle("the daemon is gone", || !daemon.is_alive());
    world.cluster.start_node(standby).unwrap();
    world.settle("it has a new directory", || inode(&world, standby) != before);
    world.wait_whole("after the second daemon had gone on");
    world.wait_synchronous("again");
    world.settle("the request is answered", || world.status().conditions.iter().all(|one| one["kind"] != "request"));
    assert!(copying(&world, standby).is_null(), "nothing is being copied any more");
    // It is removed behind the swap, while PostgreSQL is started already.
    let kept = world.cluster.node_dir(standby).join("data.pgherd/kept/data");
    world.settle("what was given up by name is not kept", || !kept.exists());
    world.finish();
}

#[test]
fn on_postgresql_17_a_member_is_copied_anew_in_place_and_the_leader_is_refused() {
    let world = World::up(&Setup { postgres_17: true, document: quorum, ..Setup::default() });
    let (leader, standby) = (world.leader(), world.replica());
    let refused = world.cluster.pgherd(&["reinit", world.name(leader), "--yes", "--wait"]).unwrap();
    assert_eq!(refused.code, Some(4), "{}", refused.err);
    assert!(refused.err.contains("hand over first"), "{}", refused.err);
    let before = inode(&world, standby);
    let done = world.cluster.pgherd(&["reinit", world.name(standby), "--yes", "--wait", "--in-place", "--from-leader"]).unwrap();
    done.must_succeed("pgherd reinit --wait --in-place");
    assert!(done.out.contains("is a new copy, and streams"), "{}", done.out);
    assert!(["sync ", "empty ", "copy "].iter().all(|stage| done.out.contains(stage)), "{}", done.out);
    assert_ne!(inode(&world, standby), before);
    world.wait_whole("after the copy");
    world.wait_synchronous("again");
    world.finish();
}

/// The data directory of a node that is down, as it is now, to be put back later.
fn snapshot(world: &World, index: usize) -> PathBuf {
    let (from, to) = (world.cluster.data_dir(index), world.cluster.node_dir(index).join("snapshot"));
    copy(&from, &to);
    to
}

fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.arg("-a").arg(from).arg(to);
    run(command, Duration::from_secs(60)).unwrap().must_succeed("cp -a");
}

/// How far the leader has told etcd that this node is.
fn told_of(world: &World, index: usize) -> Option<String> {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    let key = format!("/pgherd/{}/status", world.cluster.plan.cluster);
    let value = in_own_thread(async move {
        let answer = etcd_client::Client::connect(endpoints, None).await?.get(key, None).await?;
        Ok(answer.kvs().first().map(|kv| kv.value().to_vec()))
    });
    let status: serde_json::Value = serde_json::from_slice(&value.unwrap()?).unwrap();
    status["replayed"][world.name(index)].as_str().map(str::to_owned)
}

/// A commit is on the leader and on one standby; both go down, and the standby comes back as it was before. The third member never had it.
#[test]
fn row_27_a_member_whose_disk_is_put_back_in_time_is_no_witness_and_nothing_acknowledged_is_lost() {
    let world = World::up(&Setup { document: quorum, proxied: true, ..Setup::default() });
    let leader = world.leader();
    let [put_back, lagging] = world.others(leader)[..] else { panic!("three nodes") };
    world.cluster.cut_power(put_back);
    let old = snapshot(&world, put_back);
    world.cluster.start_node(put_back).unwrap();
    world.wait_whole("after the snapshot");
    world.set_stream(leader, lagging, Network::Cut);
    let role = |index: usize| world.status().member(world.name(index)).and_then(|member| member.role.clone());
    world.settle("commits wait for the one alone", || {
        role(lagging).as_deref() == Some("replica") && role(put_back).as_deref() == Some("quorum_standby")
    });
    world.wait_writes(leader);
    let before = told_of(&world, put_back);
    world.settle("the leader has told how far it is", || told_of(&world, put_back).is_some_and(|now| Some(now) != before));
    world.wait_writes(leader);

    world.cluster.cut_power(leader);
    world.cluster.cut_power(put_back);
    let data = world.cluster.data_dir(put_back);
    fs::remove_dir_all(&data).unwrap();
    copy(&old, &data);
    world.set_stream(leader, lagging, Network::Pass);
    world.cluster.start_node(put_back).unwrap();
    world.settle("it says why nobody leads", || {
        let said = world.cluster.pgherd(&["status"]).unwrap().out;
        said.contains("put back to an older state") && said.contains("nobody holds the leader lock")
    });
    assert!(holds_throughout(A_WHILE, || world.status().leader.is_none()), "one of those that lack it leads");

    world.cluster.start_node(leader).unwrap();
    world.wait_writes(leader);
    world.wait_whole("after the leader came back");
    world.wait_synchronous("again");
    assert!(!world.has_condition(put_back, "put_back"), "it has caught up");
    world.finish();
}

/// A tablespace's directory on the host of a node, which PostgreSQL may write into.
fn tablespace(world: &World, index: usize) -> PathBuf {
    let directory = world.cluster.node_dir(index).join("tablespace");
    fs::create_dir(&directory).unwrap();
    let owner = fs::metadata(world.cluster.node_dir(index).join("log")).unwrap();
    std::os::unix::fs::chown(&directory, Some(owner.uid()), Some(owner.gid())).unwrap();
    directory
}

#[test]
fn tablespaces_are_copied_to_where_a_members_node_document_says_and_a_reinit_copies_them_beside() {
    on_both(&Setup::default(), |world| {
        let leader = world.leader();
        let standbys = world.others(leader);
        standbys.iter().for_each(|standby| world.cluster.cut_power(*standby));
        let of_leader = tablespace(&world, leader);
        world.ask(leader, &format!("create tablespace far location '{}'", of_leader.display())).unwrap();
        world.ask(leader, "create table public.far tablespace far as select 1 as id").unwrap();
        for standby in &standbys {
            let here = tablespace(&world, *standby);
            let file = world.cluster.node_file(*standby);
            let map = format!("  postgres:\n    tablespace_map: {{ {}: {} }}\n", of_leader.display(), here.display());
            let document = fs::read_to_string(&file).unwrap().replacen("  postgres:\n", &map, 1);
            assert!(document.contains("tablespace_map"), "{document}");
            fs::write(&file, document).unwrap();
            fs::remove_dir_all(world.cluster.data_dir(*standby)).unwrap();
            world.cluster.start_node(*standby).unwrap();
        }
        world.wait_whole("after the first copies");
        let standby = standbys[0];
        let is_in = |number: u32| {
            let here = world.cluster.node_dir(standby).join(format!("tablespace/pgherd-{number}"));
            world.settle(&format!("it is in {}", here.display()), || {
                let link = world.ask(standby, "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'far'");
                let rows = world.ask(standby, "select count(*) from public.far");
                link == Ok(Some(here.display().to_string())) && rows == Ok(Some("1".to_owned()))
            });
        };
        is_in(1);
        world.cluster.pgherd(&["reinit", world.name(standby), "--yes", "--wait"]).unwrap().must_succeed("pgherd reinit");
        is_in(2);
        assert!(!world.cluster.node_dir(standby).join("tablespace/pgherd-1").exists(), "what was given up takes no room");
        world.wait_whole("after the second copy");
        world.finish();
    });
}
