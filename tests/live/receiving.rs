//! Whom standbys receive from, and what is done when one receives nothing (SAFETY rows 10 and 56).

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use pgherd::cli::demo::documents::ClusterDocument;

use crate::rig::proxy::Network;
use crate::rig::wait::holds_throughout;
use crate::rig::world::{MustSucceed, Setup, World};

/// For what must not happen meanwhile.
const A_WHILE: Duration = Duration::from_secs(3);

fn one_number(world: &World, index: usize, question: &str) -> Option<String> {
    world.ask(index, question).ok().flatten()
}

/// Whether `standby` streams from `from`, as that one says.
fn streams_from(world: &World, standby: usize, from: usize) -> bool {
    let name = world.name(standby);
    let asked = format!("select count(*) from pg_stat_replication where application_name = '{name}' and state = 'streaming'");
    one_number(world, from, &asked).as_deref() == Some("1")
}

#[track_caller]
fn wait_streams_from(world: &World, standby: usize, from: usize, when: &str) {
    let (standby_name, from_name) = (world.name(standby), world.name(from));
    world.settle(&format!("{standby_name} streams from {from_name} {when}"), || streams_from(world, standby, from));
}

/// It streams by its own slot.
fn has_slot_in_use(world: &World, standby: usize, from: usize) -> bool {
    let asked =
        format!("select count(*) from pg_replication_slots where slot_name = '{}' and active", world.name(standby).replace('-', "_"));
    one_number(world, from, &asked).as_deref() == Some("1")
}

fn tag(world: &mut World, index: usize, name: &str, value: &str) {
    world.document.members[index].tags.insert(name.to_owned(), value.to_owned());
    world.apply().must_succeed("pgherd apply");
}

fn said(world: &World, index: usize, word: &str) -> bool {
    world.decided(index, "receives_nothing").iter().any(|said| said.contains(word))
}

/// `standby` has a table that is made on the leader now.
#[track_caller]
fn wait_gets_what_is_written(world: &World, standby: usize, table: &str) {
    world.ask(world.leader(), &format!("create table public.{table} (id int)")).unwrap();
    world.settle(&format!("{} has the table {table}", world.name(standby)), || {
        one_number(world, standby, &format!("select count(*) from pg_class where relname = '{table}'")).as_deref() == Some("1")
    });
}

#[test]
fn standbys_follow_over_a_new_timeline_without_a_restart_after_a_switchover_and_after_a_failover() {
    let world = World::up(&Setup { nodes: 4, ..Setup::default() });
    let first = world.leader();
    let [second, third, standby] = world.others(first)[..] else { panic!("four nodes") };
    let postmasters = [third, standby].map(|index| world.postmaster(index));
    world.cluster.pgherd(&["switchover", "--to", world.name(second), "--yes"]).unwrap().must_succeed("pgherd switchover");
    world.wait_whole("after the switchover");
    assert_eq!([third, standby].map(|index| world.postmaster(index)), postmasters, "nobody was restarted");
    let timeline = world.timeline();
    world.cluster.cut_power(second);
    let leader = world.wait_another_leads(second);
    for index in world.others(leader).into_iter().filter(|index| *index != second && *index != first) {
        wait_streams_from(&world, index, leader, "after the failover");
        let before = if index == third { postmasters[0] } else { postmasters[1] };
        assert_eq!(world.postmaster(index), before, "it was not restarted");
    }
    assert!(world.timeline() > timeline);
    world.cluster.start_node(second).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}

fn impatient(document: &mut ClusterDocument) {
    document.parameters.insert("wal_receiver_timeout".into(), "5s".into());
}

#[test]
fn row_10_a_walreceiver_that_is_stuck_is_started_again_and_postgresql_only_if_that_does_not_help() {
    let world = World::up(&Setup { document: impatient, ..Setup::default() });
    let (leader, timeline) = (world.leader(), world.timeline());
    let [helped, hopeless] = world.others(leader)[..] else { panic!("three nodes") };
    let postmasters = [helped, hopeless].map(|index| world.postmaster(index));
    let stopped = [helped, hopeless].map(|index| {
        let mut pid = None;
        world.settle("its walreceiver runs", || {
            pid = one_number(&world, index, "select pid from pg_stat_activity where backend_type = 'walreceiver'");
            pid.is_some()
        });
        let pid = Pid::from_raw(pid.unwrap().parse().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        pid
    });
    world.settle("that one is helped by a new walreceiver is said", || said(&world, helped, "its walreceiver is started again"));
    nix::sys::signal::kill(stopped[0], Signal::SIGCONT).unwrap();
    wait_streams_from(&world, helped, leader, "by another walreceiver");
    wait_gets_what_is_written(&world, helped, "after_the_walreceiver");
    assert_eq!(world.postmaster(helped), postmasters[0], "its PostgreSQL was not touched");
    world.settle("the other one's PostgreSQL is started again", || said(&world, hopeless, "PostgreSQL is started again"));
    world.settle("another postmaster runs", || world.cluster.postmaster(hopeless).is_some_and(|now| now != postmasters[1]));
    world.wait_whole("after both were helped");
    wait_gets_what_is_written(&world, hopeless, "after_the_restart");
    world.settle("nothing is in the way any more", || !world.has_condition(hopeless, "receives_nothing"));
    assert_eq!((world.leader(), world.timeline()), (leader, timeline), "nothing of it is a reason to fail over");
    world.finish();
}

#[test]
fn row_10_a_standby_that_cannot_reach_its_leader_says_so_and_goes_on_serving_reads() {
    let world = World::up(&Setup { proxied: true, ..Setup::default() });
    let leader = world.leader();
    let standbys = world.others(leader);
    let postmasters: Vec<_> = standbys.iter().map(|index| world.postmaster(*index)).collect();
    world.set_replication_network(leader, Network::Cut);
    world.settle("both say so", || standbys.iter().all(|index| world.has_condition(*index, "leader_unreachable")));
    let serves = || standbys.iter().all(|index| world.http(*index, "/replica") == Some(200));
    assert!(holds_throughout(A_WHILE, serves), "reads are served");
    let now: Vec<_> = standbys.iter().map(|index| world.postmaster(*index)).collect();
    assert_eq!(now, postmasters, "nothing that is done to a standby helps against that");
    world.set_replication_network(leader, Network::Pass);
    world.wait_whole("after the network healed");
    world.settle("it is said no more", || standbys.iter().all(|index| !world.has_condition(*index, "leader_unreachable")));
    world.finish();
}

#[test]
fn row_56_a_replica_of_a_replica_falls_back_to_the_leader_by_its_slot_and_returns_and_follows_over_new_timelines() {
    let mut world = World::up(&Setup::default());
    let leader = world.leader();
    let [middle, end] = world.others(leader)[..] else { panic!("three nodes") };
    let postmaster = world.postmaster(end);
    let from = world.name(middle).to_owned();
    tag(&mut world, end, "replicatefrom", &from);
    tag(&mut world, middle, "noloadbalance", "true");
    wait_streams_from(&world, end, middle, "by its tag");
    assert!(has_slot_in_use(&world, end, middle) && !streams_from(&world, end, leader));
    wait_gets_what_is_written(&world, end, "through_the_middle");
    world.settle("reads are not sent to the one with noloadbalance", || {
        world.http(middle, "/replica") == Some(503) && world.http(end, "/replica") == Some(200)
    });
    // The leader keeps what it may need any moment, and no more.
    let moved_on = format!(
        "select count(*) from pg_replication_slots where slot_name = '{}' and not active and restart_lsn > pg_current_wal_lsn() - 1048576",
        world.name(end).replace('-', "_")
    );
    world.settle("its slot on the leader is moved on", || one_number(&world, leader, &moved_on).as_deref() == Some("1"));

    world.cluster.cut_power(middle);
    wait_streams_from(&world, end, leader, "while the middle is away");
    assert!(has_slot_in_use(&world, end, leader));
    world.settle("that is said", || world.has_condition(end, "upstream_away"));
    wait_gets_what_is_written(&world, end, "past_the_middle");
    world.cluster.start_node(middle).unwrap();
    wait_streams_from(&world, end, middle, "once the middle has been back for a while");

    let timeline = world.timeline();
    world.cluster.pgherd(&["switchover", "--to", world.name(middle), "--yes"]).unwrap().must_succeed("pgherd switchover");
    world.wait_whole("after the middle was promoted");
    wait_streams_from(&world, end, middle, "over the middle's own timeline");
    assert!(world.timeline() > timeline);
    world.cluster.pgherd(&["switchover", "--to", world.name(leader), "--yes"]).unwrap().must_succeed("pgherd switchover");
    world.wait_whole("after the first leads again");
    wait_streams_from(&world, end, middle, "over a timeline that the middle got itself");
    assert_eq!(world.postmaster(end), postmaster, "it was never restarted for any of it");
    world.cluster.cut_power(middle);
    world.cluster.cut_power(leader);
    assert_eq!(world.wait_another_leads(leader), end, "it leads like any other, and has no upstream then");
    world.cluster.start_node(middle).unwrap();
    world.cluster.start_node(leader).unwrap();
    world.wait_whole("after the end of the chain leads");
    wait_streams_from(&world, middle, end, "which has no upstream now");
    world.finish();
}

#[test]
fn a_member_is_copied_from_a_standby_with_clonefrom_and_streams_on_the_leaders_timeline() {
    let mut world = World::up(&Setup::default());
    let leader = world.leader();
    let [source, copied] = world.others(leader)[..] else { panic!("three nodes") };
    tag(&mut world, source, "clonefrom", "true");
    world.stop_node(copied);
    let data = world.cluster.data_dir(copied);
    std::fs::remove_dir_all(&data).unwrap();
    world.cluster.start_node(copied).unwrap();
    world.wait_whole("after the copy");
    let label = std::fs::read_to_string(data.join("backup_label.old")).unwrap();
    assert!(label.contains("BACKUP FROM: standby"), "{label}");
    wait_gets_what_is_written(&world, copied, "after_the_copy");
    world.finish();
}

#[test]
fn a_member_with_nostream_follows_by_the_archive_and_neither_streams_nor_leads() {
    let mut world = World::lay_out(&Setup::default());
    let archive = world.cluster.node_dir(0).join("log/archive").display().to_string();
    world.document.postgres.push(format!("archive_command: 'mkdir -p {archive} && cp %p {archive}/%f'"));
    world.document.postgres.push(format!("restore_command: 'cp {archive}/%f %p'"));
    let follower = 2;
    world.document.members[follower].tags.insert("nostream".to_owned(), "true".to_owned());
    world.start_etcd_and_apply();
    world.start_all();
    let leader = world.leader();
    assert_ne!(leader, follower);
    let standby = 1 - leader;
    wait_streams_from(&world, standby, leader, "as ever");
    world.start_prober();
    world.wait_writes(leader);
    world.settle("the follower serves reads", || world.http(follower, "/replica") == Some(200));
    let gets_by_the_archive = |world: &World, leader: usize, table: &str| {
        world.ask(leader, &format!("create table public.{table} (id int)")).unwrap();
        world.settle(&format!("it has {table} by the archive"), || {
            let _ = world.ask(leader, "select pg_switch_wal()");
            one_number(world, follower, &format!("select count(*) from pg_class where relname = '{table}'")).as_deref() == Some("1")
        });
        let receivers = "select count(*) from pg_stat_activity where backend_type = 'walreceiver'";
        assert_eq!(one_number(world, follower, receivers).as_deref(), Some("0"), "it does not stream");
    };
    gets_by_the_archive(&world, leader, "before");
    let refused = world.cluster.pgherd(&["switchover", "--to", world.name(follower), "--yes"]).unwrap();
    assert_eq!(refused.code, Some(4), "{}{}", refused.out, refused.err);
    world.cluster.cut_power(leader);
    assert_eq!(world.wait_another_leads(leader), standby, "the one that streams leads");
    world.cluster.start_node(leader).unwrap();
    wait_streams_from(&world, leader, standby, "after it came back");
    gets_by_the_archive(&world, standby, "after");
    assert!(!world.has_condition(follower, "not_streaming"), "that it does not stream is as it should be");
    world.finish();
}
