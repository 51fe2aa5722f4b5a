//! PostgreSQL that is started again because somebody asked, or told it to stop by hand (SAFETY row 67); files that are read again. Each on
//! PostgreSQL 15 and 17.

use nix::sys::signal::Signal;
use pgherd::cli::demo::process::ProcessId;
use pgherd::clock::BootTime;

use crate::rig::world::{MustSucceed, Setup, World};
use crate::switchover::{archives_for_ever, in_quorum, on_both};

fn setting(world: &World, index: usize) -> Option<String> {
    world.ask(index, "SELECT current_setting('max_connections')").ok().flatten()
}

fn postmasters(world: &World) -> Vec<ProcessId> {
    (0..world.nodes()).map(|index| world.postmaster(index)).collect()
}

/// Every member has a parameter that waits for a restart.
fn with_a_parameter_pending(world: &mut World) {
    world.document.parameters.insert("max_connections".into(), "150".into());
    world.apply().must_succeed("pgherd apply");
    world.settle("every member says that it waits for a restart", || {
        (0..world.nodes()).all(|index| world.has_condition(index, "takes effect with the next restart"))
    });
}

fn restarted(world: &World, arguments: &[&str]) -> String {
    let said = world.cluster.pgherd(&[&["restart", "--yes"], arguments].concat()).unwrap();
    said.must_succeed("pgherd restart");
    println!("{}", said.out.trim_end());
    said.out
}

#[test]
fn a_rolling_restart_takes_the_standbys_first_and_only_the_primarys_own_interrupts_writes() {
    on_both(&Setup { document: in_quorum, ..Setup::default() }, |mut world| {
        with_a_parameter_pending(&mut world);
        let (leader, timeline) = (world.leader(), world.timeline());
        let before = postmasters(&world);
        let begun = BootTime::now();
        let out = restarted(&world, &["--pending", "--role", "replica"]);
        let names: Vec<&str> = world.others(leader).into_iter().map(|index| world.name(index)).collect();
        let told: Vec<&str> =
            out.lines().filter_map(|line| names.iter().copied().find(|name| line.contains(&format!("`{name}`")))).collect();
        assert_eq!(told, names, "one after the other: {out}");
        assert!(world.prober().refused_since(world.name(leader), begun).is_empty(), "no write was refused");
        assert_eq!(world.postmaster(leader), before[leader]);
        let begun = BootTime::now();
        restarted(&world, &["--pending"]);
        world.wait_writes(leader);
        println!("outage {:.3} s", world.prober().longest_gap(begun).as_secs_f64());
        let after = postmasters(&world);
        assert!((0..3).all(|index| before[index] != after[index]), "each was started again");
        assert_eq!((world.leader(), world.timeline()), (leader, timeline), "in place");
        assert!((0..3).all(|index| setting(&world, index).as_deref() == Some("150")));
        world.wait_whole("after the restarts");
        assert!((0..3).all(|index| !world.has_condition(index, "takes effect with the next restart")), "nothing is pending");
        assert!(world.cluster.pgherd(&["restart", "--pending", "--yes"]).unwrap().out.contains("nothing to restart"));
        world.finish();
    });
}

#[test]
fn the_primary_is_spared_by_a_switchover_where_that_is_asked_for() {
    on_both(&Setup::default(), |mut world| {
        with_a_parameter_pending(&mut world);
        let (former, timeline) = (world.leader(), world.timeline());
        restarted(&world, &["--pending", "--switchover"]);
        assert_ne!(world.leader(), former);
        assert_eq!(world.timeline(), timeline + 1);
        assert!((0..3).all(|index| setting(&world, index).as_deref() == Some("150")));
        world.wait_writes(world.leader());
        world.wait_whole("after the restarts");
        world.finish();
    });
}

#[test]
fn a_daemon_that_dies_in_the_middle_of_a_restart_leaves_a_primary_and_an_answer() {
    on_both(&Setup { document: archives_for_ever, ..Setup::default() }, |world| {
        let (leader, timeline) = (world.leader(), world.timeline());
        let postmaster = world.postmaster(leader);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| world.cluster.pgherd(&["restart", world.name(leader), "--yes"]).unwrap());
            // The archiver holds the stop for a second: long enough to be seen, and to die in.
            world.settle("PostgreSQL is being stopped", || world.http(leader, "/primary") == Some(503));
            world.daemon(leader).signal(Signal::SIGKILL);
            world.cluster.start_node(leader).unwrap();
            let said = asked.join().unwrap();
            println!("{said:?}");
            assert!(matches!(said.code, Some(0 | 4)), "it was answered: {said:?}");
        });
        world.wait_whole("after the daemon came back");
        assert_ne!(world.postmaster(leader), postmaster);
        assert!(world.timeline() >= timeline);
        world.wait_writes(world.leader());
        world.finish();
    });
}

#[test]
fn scheduled_restarts_are_shown_can_be_taken_back_and_are_carried_out_once() {
    on_both(&Setup::default(), |world| {
        let at = |seconds: i64| (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)).to_string();
        restarted(&world, &["--at", &at(3_600)]);
        let shown = world.cluster.pgherd(&["status"]).unwrap().out;
        assert_eq!(shown.matches("a restart of `").count(), 3, "{shown}");
        world.cluster.pgherd(&["flush", "restart", "n1", "--yes"]).unwrap().must_succeed("pgherd flush restart n1");
        world.cluster.pgherd(&["flush", "restart", "--yes"]).unwrap().must_succeed("pgherd flush restart");
        assert_eq!(world.cluster.pgherd(&["flush", "restart", "--yes"]).unwrap().code, Some(4), "none is left");
        assert_eq!(world.cluster.pgherd(&["flush", "switchover", "--yes"]).unwrap().code, Some(4), "none is scheduled");
        let before = postmasters(&world);
        restarted(&world, &["--at", &at(3)]);
        world.settle("each was started again", || {
            (0..3).all(|index| world.cluster.postmaster(index).is_some_and(|now| now != before[index]))
        });
        world.wait_whole("after the restarts");
        world.settle("nothing is scheduled or under way", || {
            let shown = world.cluster.pgherd(&["status"]).unwrap().out;
            !shown.contains("a restart of `") && !shown.contains("is carrying out")
        });
        assert_eq!(world.decided_by_anybody("restart").len(), 3, "once each");
        world.wait_writes(world.leader());
        world.finish();
    });
}

#[test]
fn a_reload_puts_files_back_that_somebody_edited_and_restarts_nothing() {
    on_both(&Setup::default(), |world| {
        let before = postmasters(&world);
        let edited = world.cluster.data_dir(world.replica()).join("pg_hba.conf");
        let as_it_was = std::fs::read_to_string(&edited).unwrap();
        std::fs::write(&edited, "this is no line of pg_hba.conf\n").unwrap();
        let said = world.cluster.pgherd(&["reload", "--yes"]).unwrap();
        said.must_succeed("pgherd reload");
        println!("{}", said.out.trim_end());
        assert_eq!(said.out.matches("has taken up its files").count(), 3, "{said:?}");
        assert_eq!(std::fs::read_to_string(&edited).unwrap(), as_it_was);
        assert_eq!(postmasters(&world), before);
        world.finish();
    });
}

/// In good order at once; and with the patience to wait for clients that never go, while none gets in.
const STOPS: [Signal; 2] = [Signal::SIGINT, Signal::SIGTERM];

#[test]
fn row_67_a_postgresql_stopped_by_hand_is_started_again_in_place() {
    on_both(&Setup::default(), |world| {
        let (leader, timeline) = (world.leader(), world.timeline());
        for stop in STOPS {
            let postmaster = world.postmaster(leader);
            postmaster.signal(stop);
            world.settle("another postmaster runs", || world.cluster.postmaster(leader).is_some_and(|now| now != postmaster));
            world.wait_writes(leader);
            assert_eq!((world.leader(), world.timeline()), (leader, timeline), "{stop}");
        }
        world.finish();
    });
}

#[test]
fn row_67_a_primary_that_is_stopped_by_hand_again_and_again_makes_way_for_another() {
    on_both(&Setup::default(), |world| {
        let leader = world.leader();
        world.settle("another leads", || {
            if let Some(postmaster) = world.cluster.postmaster(leader).filter(|_| world.http(leader, "/primary") == Some(200)) {
                postmaster.signal(Signal::SIGINT);
            }
            world.others(leader).into_iter().any(|index| world.http(index, "/primary") == Some(200))
        });
        world.wait_whole("after the failover");
        world.wait_writes(world.leader());
        world.finish();
    });
}
