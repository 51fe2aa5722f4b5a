//! Commits that wait for standbys: what a client saw committed is on another member, and what is in the way is said (SAFETY rows 16, 46-48).

use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::said::{ask, signal_all};
use crate::rig::wait::{A_WHILE, holds_throughout};
use crate::rig::world::{MustSucceed, Setup, World};

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

fn strict_quorum(document: &mut ClusterDocument) {
    quorum(document);
    document.replication.push("strict: true".into());
}

fn with_a_logical_slot(document: &mut ClusterDocument) {
    quorum(document);
    document.replication.push("slots: { changes: { type: logical, database: postgres, plugin: test_decoding } }".into());
    document.parameters.insert("wal_level".into(), "logical".into());
}

#[test]
fn row_16_with_strict_a_primary_that_no_standby_hears_keeps_the_lock_and_acknowledges_nothing() {
    let world = World::up(&Setup { proxied: true, document: strict_quorum, ..Setup::default() });
    let (leader, timeline) = (world.leader(), world.timeline());
    world.set_replication_network(leader, Network::Cut);
    world.settle("commits wait", || {
        let begun = BootTime::now();
        holds_throughout(Duration::from_millis(500), || !world.takes_writes(leader, begun))
    });
    let begun = BootTime::now();
    assert!(holds_throughout(A_WHILE, || !world.takes_writes(leader, begun) && world.http(leader, "/primary") == Some(200)));
    world.settle("it is said", || world.has_condition(leader, "durability_reduced"));
    world.set_replication_network(leader, Network::Pass);
    world.wait_whole("after the link came back");
    world.wait_writes(leader);
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn row_47_without_a_standby_commits_wait_for_nobody_only_once_nobody_else_may_lead() {
    let world = World::up(&Setup { document: quorum, ..Setup::default() });
    let leader = world.leader();
    let standbys = world.others(leader);
    let frozen = world.postgres_of(&standbys);
    signal_all(&frozen, Signal::SIGSTOP);
    world.settle("only the leader may lead", || world.roles() == ["leader", "replica", "replica"]);
    let begun = BootTime::now();
    world.settle("it acknowledges alone, and says so", || {
        world.takes_writes(leader, begun) && world.has_condition(leader, "durability_reduced")
    });
    // What is acknowledged now is nowhere else: the standbys come back too late for it.
    world.cluster.cut_power(leader);
    signal_all(&frozen, Signal::SIGCONT);
    world.settle("nobody holds the lock", || world.status().leader.is_none());
    assert!(holds_throughout(A_WHILE, || world.status().leader.is_none()), "a standby without those commits led");
    world.settle("why not is said", || standbys.iter().all(|index| world.has_condition(*index, "waiting_to_lead")));
    world.cluster.start_node(leader).unwrap();
    // It leads, or one that by then is seen to have all of it: what was sent to a frozen standby waits in its connection.
    world.wait_whole("after it came back");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn row_46_row_48_a_commit_whose_wait_is_cancelled_is_warned_of_and_a_primary_that_starts_again_lets_no_client_in_before_a_standby_has_it() {
    let world = World::up(&Setup { document: strict_quorum, ..Setup::default() });
    let leader = world.leader();
    world.ask(leader, "create role client login password 'client'; create table t (id int); grant all on t to client").unwrap();
    let mut client = world.cluster.connection(world.port(leader)).unwrap();
    client.user("client").password("client").options("");
    assert_eq!(ask(client.clone(), "select count(*) from t", Duration::from_secs(5)).unwrap().as_deref(), Some("0"));
    let frozen = world.postgres_of(&world.others(leader));
    signal_all(&frozen, Signal::SIGSTOP);
    // It waits for standbys that do not answer: in the WAL, and not acknowledged.
    let waiting = {
        let config = world.cluster.connection(world.port(leader)).unwrap();
        std::thread::spawn(move || ask(config, "set application_name = 'waits'; insert into t values (1)", Duration::from_secs(20)))
    };
    let cancel = "select count(*) from (select pg_cancel_backend(pid) from pg_stat_activity where application_name = 'waits' and wait_event = 'SyncRep') c";
    world.settle("the commit waits, and is cancelled", || world.ask(leader, cancel).is_ok_and(|count| count.as_deref() == Some("1")));
    assert!(waiting.join().unwrap().is_ok(), "PostgreSQL answers, with a warning");
    let postmaster = world.postmaster(leader);
    postmaster.signal(Signal::SIGKILL);
    world.settle("it is started again", || world.cluster.postmaster(leader).is_some_and(|now| now != postmaster));
    world.settle("it takes connections of ours", || world.ask(leader, "select 1").is_ok());
    let kept_out = || ask(client.clone(), "select count(*) from t", Duration::from_secs(1)).is_err();
    assert!(holds_throughout(A_WHILE, kept_out), "a client saw a commit that no standby has");
    assert_ne!(world.http(leader, "/primary"), Some(200));
    signal_all(&frozen, Signal::SIGCONT);
    world.settle("the client is let in, and sees it", || {
        ask(client.clone(), "select count(*) from t", Duration::from_secs(5)).is_ok_and(|count| count.as_deref() == Some("1"))
    });
    world.wait_whole("after the standbys came back");
    world.finish();
}

/// Its walsender never hears how far it has flushed, and nobody waits for it.
fn receive_wal(world: &World, index: usize) {
    let programs = &world.cluster.plan.programs.postgres_bin;
    let mut command = std::process::Command::new(programs.join("pg_receivewal"));
    command.args(["-h", "127.0.0.1", "-w", "-p"]).arg(world.port(index).to_string());
    command.args(["-U", &world.cluster.household().user.name, "-D"]).arg(world.cluster.node_dir(index).join("run"));
    command.env("PGPASSWORD", world.cluster.superuser_password().unwrap().trim());
    world.cluster.household().spawn("pg_receivewal", command, &world.cluster.node_log(index), true).unwrap();
    world.settle("it receives", || {
        let asked = "select count(*) from pg_stat_replication where application_name = 'pg_receivewal' and state = 'streaming'";
        world.ask(index, asked).is_ok_and(|count| count.as_deref() == Some("1"))
    });
}

#[test]
fn the_mode_changes_while_the_cluster_works_in_all_directions() {
    let mut world = World::up(&Setup::default());
    let (leader, timeline) = (world.leader(), world.timeline());
    receive_wal(&world, leader);
    for (mode, wanted) in [
        ("quorum", ["leader", "quorum_standby", "quorum_standby"]),
        ("sync", ["leader", "replica", "sync_standby"]),
        ("async", ["leader", "replica", "replica"]),
        ("sync", ["leader", "replica", "sync_standby"]),
        ("quorum", ["leader", "quorum_standby", "quorum_standby"]),
    ] {
        world.document.mode = mode.into();
        world.apply().must_succeed("pgherd apply");
        world.settle(&format!("the mode is {mode}"), || world.roles() == wanted);
        let begun = BootTime::now();
        world.settle("it takes writes", || world.takes_writes(leader, begun));
    }
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn row_57_on_postgresql_17_a_permanent_logical_slot_goes_on_after_a_failover() {
    let setup = Setup { postgres_17: true, document: with_a_logical_slot, ..Setup::default() };
    let world = World::up(&setup);
    let former = world.leader();
    let is_kept = "select count(*) from pg_replication_slots where slot_name = 'changes' and synced and not temporary";
    // PostgreSQL copies a slot to a standby once its subscriber has gone past where the standby began.
    let consume = "select count(*) from pg_logical_slot_get_changes('changes', null, null)";
    for standby in world.others(former) {
        world.settle("every standby keeps a copy of the slot", || {
            let _ = world.ask(former, consume);
            world.ask(standby, is_kept).is_ok_and(|count| count.as_deref() == Some("1"))
        });
    }
    world.ask(former, "create table public.changed (id int); insert into public.changed values (42)").unwrap();
    world.cluster.cut_power(former);
    let leader = world.wait_another_leads(former);
    let changes = "select count(*) from pg_logical_slot_peek_changes('changes', null, null) where data like '%public.changed%42%'";
    world.settle("the change is told by the new primary", || world.ask(leader, changes).is_ok_and(|count| count.as_deref() == Some("1")));
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}

#[test]
fn members_have_a_slot_on_every_member_and_a_failover_leaves_nobody_behind() {
    let world = World::up(&Setup { document: quorum, ..Setup::default() });
    for index in 0..world.nodes() {
        let slots = "select count(*) from pg_replication_slots where slot_type = 'physical'";
        world.settle("it has one for every other member", || world.ask(index, slots).is_ok_and(|count| count.as_deref() == Some("2")));
    }
    let former = world.leader();
    world.cluster.cut_power(former);
    let leader = world.wait_another_leads(former);
    world.settle("the other one streams by its slot", || {
        world.ask(leader, "select count(*) from pg_replication_slots where active").is_ok_and(|count| count.as_deref() == Some("1"))
    });
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}
