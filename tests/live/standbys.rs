//! Standbys that do not receive, and standbys that received more than the next primary has (SAFETY rows 10 and 49).
//!
//! What nobody was told of may be anywhere or nowhere, but the same on all members in the end.

use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::said::{ask, signal_all};
use crate::rig::world::{MustSucceed, Setup, World};

/// Longer than a standby that flushes nothing counts, and longer than any step of a test before its commit's fate is sealed.
const WAITS: Duration = Duration::from_secs(10);

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
    // PostgreSQL gives a connection up after this.
    for name in ["wal_sender_timeout", "wal_receiver_timeout"] {
        document.parameters.insert(name.into(), "3s".into());
    }
}

fn sync(document: &mut ClusterDocument) {
    quorum(document);
    document.mode = "sync".into();
}

fn with_two_copies(document: &mut ClusterDocument) {
    quorum(document);
    document.replication.push("synchronous_node_count: 2".into());
}

/// The leader has no connection to this standby any more.
fn has_no_walsender(world: &World, leader: usize, standby: usize) -> bool {
    let asked = format!("select count(*) from pg_stat_replication where application_name = '{}'", world.name(standby));
    world.ask(leader, &asked).is_ok_and(|count| count.as_deref() == Some("0"))
}

#[test]
fn row_10_in_quorum_writes_go_on_while_one_of_two_standbys_is_frozen_killed_cut_off_deaf_or_stuck() {
    let world = World::up(&Setup { proxied: true, document: quorum, ..Setup::default() });
    assert_eq!(world.roles(), ["leader", "quorum_standby", "quorum_standby"]);
    let (leader, timeline) = (world.leader(), world.timeline());
    let standby = world.replica();
    for blow in ["frozen", "killed", "cut off", "deaf", "stuck"] {
        let processes = match blow {
            "frozen" => world.postgres_of(&[standby]),
            "stuck" => vec![world.walreceiver(standby).unwrap()],
            _ => Vec::new(),
        };
        match blow {
            "frozen" | "stuck" => signal_all(&processes, Signal::SIGSTOP),
            "killed" => world.cluster.cut_power(standby),
            "cut off" => world.set_whole_network(standby, Network::Silent),
            // Half open: both ends take the connection for a good one.
            _ => world.set_stream(leader, standby, Network::Silent),
        }
        let begun = BootTime::now();
        world.settle(&format!("commits do not wait for the one that is {blow} any more"), || {
            world.roles() == ["leader", "quorum_standby", "replica"]
        });
        println!("{blow}: longest pause {:.3} s", world.prober().longest_gap(begun).as_secs_f64());
        assert!(world.takes_writes(leader, begun));
        match blow {
            "frozen" => signal_all(&processes, Signal::SIGCONT),
            "killed" => drop(world.cluster.start_node(standby).unwrap()),
            "cut off" => world.set_whole_network(standby, Network::Pass),
            _ => {
                world.settle("PostgreSQL has given the connection up", || has_no_walsender(&world, leader, standby));
                world.set_stream(leader, standby, Network::Pass);
                // Dead it is PostgreSQL's to put right, as any process of its that dies.
                signal_all(&processes, Signal::SIGKILL);
            }
        }
        world.settle("they wait for both again", || world.roles() == ["leader", "quorum_standby", "quorum_standby"]);
    }
    assert_eq!((world.leader(), world.timeline()), (leader, timeline), "nothing of it is a reason to fail over");
    world.finish();
}

/// A row that the leader commits, and that one standby gets, and another not: its client waits and is told nothing.
struct Untold {
    told: JoinHandle<Result<Option<String>, String>>,
}

const ROWS: &str = "select count(*) from untold";

impl Untold {
    /// `gets` gets it, `lacks` does not, and commits wait for `lacks`.
    #[track_caller]
    fn written(world: &World, gets: usize, lacks: usize) -> Untold {
        let leader = world.leader();
        world.ask(leader, "create table untold (id int)").unwrap();
        world.settle("all have the table", || (0..world.nodes()).all(|index| world.ask(index, ROWS).is_ok()));
        world.set_stream(leader, lacks, Network::Silent);
        let config = world.cluster.connection(world.port(leader)).unwrap();
        let told = std::thread::spawn(move || ask(config, "insert into untold values (1)", WAITS));
        world.settle("one standby has it", || world.ask(gets, ROWS).is_ok_and(|count| count.as_deref() == Some("1")));
        assert_eq!(world.ask(lacks, ROWS).unwrap().as_deref(), Some("0"), "the other has not");
        Untold { told }
    }

    /// Nobody was told that it is there, and it is nowhere.
    #[track_caller]
    fn ends_nowhere(self, world: &World) {
        let told = self.told.join().unwrap();
        assert!(told.is_err(), "a client was told that the row is there: {told:?}");
        let rows = |index| world.ask(index, ROWS).unwrap();
        world.settle("it is nowhere", || (0..world.nodes()).all(|index| rows(index).as_deref() == Some("0")));
    }
}

/// It was ahead: it was rewound, or a copy of the leader took its place, once; and what it had alone is kept beside.
#[track_caller]
fn was_brought_behind(world: &World, index: usize) {
    let ways = ["rewind", "reclone"].map(|kind| (kind, world.decided(index, kind)));
    let taken: Vec<&(&str, Vec<String>)> = ways.iter().filter(|(_, said)| !said.is_empty()).collect();
    let [(kind, said)] = &taken[..] else { panic!("{}: {ways:?}", world.name(index)) };
    assert!(said.len() == 1 && said[0].contains("past"), "{}: {said:?}", world.name(index));
    let kept = world.cluster.node_dir(index).join("data.pgherd").join(if *kind == "rewind" { "lost/1" } else { "kept" });
    assert!(kept.exists(), "what {} had alone is kept in {}", world.name(index), kept.display());
}

/// Applies the document, and waits until the leader has taken it up.
#[track_caller]
fn apply(world: &World) {
    let leader = world.leader();
    let generation = || world.json(leader, "/patroni")["pgherd"]["observed_generation"].as_u64().unwrap_or(0);
    let before = generation();
    world.apply().must_succeed("pgherd apply");
    world.settle("the leader has taken it up", || generation() > before);
}

#[test]
fn row_49_with_two_copies_each_change_of_leader_keeps_every_row_and_one_that_comes_back_ahead_is_brought_behind() {
    let mut world = World::up(&Setup { proxied: true, document: with_two_copies, ..Setup::default() });
    let first = world.leader();
    world.cluster.pgherd(&["switchover", "--to", world.name(world.replica()), "--yes"]).unwrap().must_succeed("pgherd switchover");
    world.wait_whole("after the switchover");
    let former = world.leader();
    assert_ne!(first, former);
    world.settle("commits wait for both", || world.roles() == ["leader", "quorum_standby", "quorum_standby"]);

    // Commits wait for both also when one of them cannot have them.
    world.document.replication.push("strict: true".into());
    apply(&world);
    let (next, ahead) = (world.others(former)[0], world.others(former)[1]);
    let untold = Untold::written(&world, ahead, next);
    world.cluster.cut_power(former);
    world.cluster.cut_power(ahead);
    // What was on its way is lost.
    world.set_stream(former, next, Network::Cut);
    // Each acknowledged commit is on all three: alone it has them all.
    world.settle("the one behind leads", || world.http(next, "/primary") == Some(200));
    world.set_stream(former, next, Network::Pass);
    world.document.replication.pop();
    apply(&world);
    world.wait_writes(next);
    world.cluster.start_node(ahead).unwrap();
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after those ahead of it came back");
    assert_eq!(world.leader(), next);
    untold.ends_nowhere(&world);
    was_brought_behind(&world, ahead);
    was_brought_behind(&world, former);
    world.finish();
}

#[test]
fn row_10_row_49_in_sync_on_17_another_replaces_a_deaf_standby_and_one_ahead_of_the_next_primary_is_brought_behind() {
    let mut world = World::up(&Setup { proxied: true, postgres_17: true, document: sync, ..Setup::default() });
    let former = world.leader();
    let ahead = world.with_role("sync_standby").unwrap();
    let next = world.others(former).into_iter().find(|index| *index != ahead).unwrap();
    world.set_stream(former, ahead, Network::Silent);
    let begun = BootTime::now();
    world.settle("commits wait for the other", || world.with_role("sync_standby") == Some(next));
    world.wait_writes(former);
    println!("longest pause {:.3} s", world.prober().longest_gap(begun).as_secs_f64());
    world.set_stream(former, ahead, Network::Pass);
    world.wait_whole("after the connection was healed");
    assert_eq!(world.with_role("sync_standby"), Some(next), "among equals nobody is changed");

    // From now on nobody could take its place, also as a leader: one that is ahead would be the next.
    world.document.replication.push("strict: true".into());
    world.document.members[ahead].tags.insert("nofailover".into(), "true".into());
    apply(&world);
    let untold = Untold::written(&world, ahead, next);
    world.cluster.cut_power(former);
    world.set_stream(former, next, Network::Cut);
    world.settle("the one behind leads", || world.http(next, "/primary") == Some(200));
    world.set_stream(former, next, Network::Pass);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    assert_eq!(world.leader(), next);
    untold.ends_nowhere(&world);
    was_brought_behind(&world, ahead);
    was_brought_behind(&world, former);
    world.wait_writes(next);
    world.finish();
}
