//! Moving the primary on purpose: what does not hold it up, what stands in its way, and what becomes of it when somebody dies midway
//! (SAFETY rows 50, 51, 59, 69-71). Each on PostgreSQL 15 and 17.

use pgherd::cli::demo::documents::ClusterDocument;

use crate::rig::world::{MustSucceed, Setup, World};

/// The same on the oldest and on the newest PostgreSQL that the tests have.
pub fn on_both(setup: &Setup, test: impl Fn(World)) {
    for postgres_17 in [false, true] {
        println!("PostgreSQL {}", if postgres_17 { 17 } else { 15 });
        test(World::up(&Setup { postgres_17, ..setup.clone() }));
    }
}

pub fn archives_for_ever(document: &mut ClusterDocument) {
    document.postgres.push("archive_command: sleep 600".into());
}

#[test]
fn an_archiver_that_never_ends_does_not_hold_a_switchover() {
    on_both(&Setup { document: archives_for_ever, ..Setup::default() }, |world| {
        let (target, timeline) = (world.replica(), world.timeline());
        let said = world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap();
        said.must_succeed("pgherd switchover");
        println!("{}", said.out);
        for stage in ["checkpoint", "stop", "successor", "release", "promotion"] {
            assert!(said.out.contains(stage), "each stage has its duration: {said:?}");
        }
        assert_eq!((world.leader(), world.timeline()), (target, timeline + 1));
        assert!(!world.decided_by_anybody("stop_not_waited_for").is_empty(), "or nothing was tried here");
        world.wait_writes(target);
        world.wait_whole("after the switchover");
        world.finish();
    });
}

/// Answers what `pgherd switchover --to TARGET` said, which is not to have been carried out.
fn refused(world: &World, target: usize, because: &str) {
    let (leader, timeline) = (world.leader(), world.timeline());
    for extra in ["--yes", "--dry-run"] {
        let said = world.cluster.pgherd(&["switchover", "--to", world.name(target), extra]).unwrap();
        assert_eq!(said.code, Some(4), "{said:?}");
        assert!(format!("{}{}", said.out, said.err).contains(because), "{extra}: {said:?}");
    }
    assert_eq!((world.leader(), world.timeline()), (leader, timeline), "nothing was touched");
}

#[test]
fn rows_50_and_69_a_target_whose_replay_is_paused_or_that_lags_is_refused_and_the_dry_run_says_the_same() {
    on_both(&Setup::default(), |world| {
        let target = world.replica();
        world.ask(target, "SELECT pg_wal_replay_pause()").unwrap();
        world.settle("the member says so", || world.has_condition(target, "replay is paused"));
        refused(&world, target, "replay is paused");
        world.ask(target, "SELECT pg_wal_replay_resume()").unwrap();
        world.settle("it is over", || !world.has_condition(target, "replay is paused"));
        let said = world.cluster.pgherd(&["switchover", "--dry-run"]).unwrap();
        said.must_succeed("pgherd switchover --dry-run");
        assert!(said.out.contains("would hand over to"), "{said:?}");
        world.finish();
    });
}

#[test]
fn row_59_a_transaction_that_is_left_open_does_not_hold_a_switchover_and_is_named_before() {
    on_both(&Setup::default(), |world| {
        let (leader, target) = (world.leader(), world.replica());
        let config = world.cluster.connection(world.port(leader)).unwrap();
        let open = std::thread::spawn(move || {
            let sql = "BEGIN; CREATE TEMP TABLE t (i int); SELECT pg_sleep(300)";
            crate::rig::said::ask(config, sql, std::time::Duration::from_secs(120))
        });
        world.settle("it has been open for long enough to be named", || {
            world.cluster.pgherd(&["switchover", "--dry-run"]).is_ok_and(|said| said.out.contains("would be rolled back"))
        });
        world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap().must_succeed("pgherd switchover");
        assert!(open.join().unwrap().is_err(), "it was cut off");
        assert!(world.decided_by_anybody("switchover").iter().any(|said| said.contains("would be rolled back")), "and the event names it");
        world.wait_writes(target);
        world.wait_whole("after the switchover");
        world.finish();
    });
}

#[test]
fn row_71_of_two_operators_at_once_one_wins_and_the_other_is_told_who_was_first() {
    on_both(&Setup::default(), |world| {
        let standbys = world.others(world.leader());
        let said: Vec<_> = std::thread::scope(|scope| {
            let asked: Vec<_> = standbys
                .iter()
                .map(|target| scope.spawn(|| world.cluster.pgherd(&["switchover", "--to", world.name(*target), "--yes"]).unwrap()))
                .collect();
            asked.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let done: Vec<_> = said.iter().filter(|one| one.code == Some(0)).collect();
        println!("{said:?}");
        assert!(!done.is_empty() && said.iter().all(|one| matches!(one.code, Some(0 | 4))), "{said:?}");
        world.wait_whole("after both");
        world.wait_writes(world.leader());
        world.finish();
    });
}

#[test]
fn row_70_a_primary_that_dies_in_the_middle_of_a_switchover_leaves_a_leader_and_an_answer() {
    on_both(&Setup { document: archives_for_ever, ..Setup::default() }, |world| {
        let (leader, target) = (world.leader(), world.replica());
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap());
            // The archiver holds the stop for a second: long enough to be seen, and to die in.
            world.settle("PostgreSQL is being stopped", || world.http(leader, "/primary") == Some(503));
            world.cluster.cut_power(leader);
            let said = asked.join().unwrap();
            assert!(matches!(said.code, Some(0 | 4)), "it was answered: {said:?}");
        });
        world.wait_another_leads(leader);
        world.cluster.start_node(leader).unwrap();
        world.wait_whole("after the former primary came back");
        world.finish();
    });
}

#[test]
fn row_70_a_target_that_dies_in_the_middle_of_a_switchover_costs_no_leader() {
    on_both(&Setup { document: archives_for_ever, ..Setup::default() }, |world| {
        let (leader, target) = (world.leader(), world.replica());
        let postmaster = world.postmaster(target);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap());
            world.settle("PostgreSQL is being stopped", || world.http(leader, "/primary") == Some(503));
            world.cluster.cut_power(target);
            let said = asked.join().unwrap();
            println!("{said:?}");
            assert!(matches!(said.code, Some(0 | 4)), "it was answered: {said:?}");
        });
        world.settle("somebody takes writes", || world.others(target).into_iter().any(|index| world.http(index, "/primary") == Some(200)));
        // A power cut leaves no process behind that is dead and has its number still: PostgreSQL would take it for a postmaster.
        world.settle("nothing is left of it", || !std::path::Path::new(&format!("/proc/{}", postmaster.pid)).exists());
        world.cluster.start_node(target).unwrap();
        world.wait_whole("after the target came back");
        world.wait_writes(world.leader());
        world.finish();
    });
}

#[test]
fn row_69_a_failover_by_hand_needs_no_leader_and_a_word_that_the_loss_is_accepted() {
    on_both(&Setup { document: in_quorum, ..Setup::default() }, |world| {
        let leader = world.leader();
        let standbys = world.others(leader);
        let (to, gone) = (standbys[0], standbys[1]);
        let fail_over = |extra: &[&str]| {
            let arguments = [&["failover", "--to", world.name(to)], extra].concat();
            world.cluster.pgherd(&arguments).unwrap()
        };
        assert_eq!(fail_over(&["--accept-loss"]).code, Some(4), "somebody leads");
        world.cluster.cut_power(gone);
        world.cluster.cut_power(leader);
        world.settle("nobody leads", || world.status().leader.is_none());
        let said = fail_over(&[]);
        assert!(said.code == Some(2) && said.err.contains("--accept-loss"), "{said:?}");
        world.settle("it says why it does not lead", || world.has_condition(to, "waiting_to_lead"));
        let said = fail_over(&["--accept-loss"]);
        said.must_succeed("pgherd failover --accept-loss");
        println!("{said:?}");
        assert!(said.err.contains("bytes of WAL"), "what is lost is named: {said:?}");
        assert_eq!(world.leader(), to);
        assert!(!world.decided_by_anybody("failover_by_hand").is_empty());
        for index in [leader, gone] {
            world.cluster.start_node(index).unwrap();
        }
        world.wait_whole("after the others came back");
        world.wait_writes(to);
        world.finish();
    });
}

pub fn in_quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

#[test]
fn a_scheduled_switchover_is_shown_can_be_taken_back_and_is_carried_out_by_whoever_leads() {
    on_both(&Setup::default(), |world| {
        let (leader, target) = (world.leader(), world.replica());
        let at = |seconds: i64| (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)).to_string();
        let schedule = |seconds: i64| {
            let said = world.cluster.pgherd(&["switchover", "--to", world.name(target), "--at", &at(seconds), "--yes"]).unwrap();
            said.must_succeed("pgherd switchover --at");
        };
        schedule(3_600);
        assert!(world.cluster.pgherd(&["status"]).unwrap().out.contains("is scheduled for"));
        world.cluster.pgherd(&["switchover", "--cancel"]).unwrap().must_succeed("pgherd switchover --cancel");
        assert_eq!(world.cluster.pgherd(&["switchover", "--cancel"]).unwrap().code, Some(4), "none is left");
        // Longer than a leader waits to be told what is under way: it is to be asked when the time comes.
        schedule(8);
        world.wait_another_leads(leader);
        assert_eq!(world.leader(), target);
        world.wait_whole("after the switchover");
        world.finish();
    });
}

/// Where a file `hangs` is beside the data directory, PostgreSQL asks the archive for longer than a promotion may take.
fn may_hang_in_promotion(document: &mut ClusterDocument) {
    document.postgres.push(r#"restore_command: "test ! -e ../hangs || sleep 20; false""#.into());
    document.ha.push("primary_start_timeout: 6s".into());
}

#[test]
fn row_51_a_promotion_that_takes_too_long_keeps_the_lock_until_its_time_is_over_and_then_another_leads() {
    on_both(&Setup { document: may_hang_in_promotion, ..Setup::default() }, |world| {
        let (leader, target) = (world.leader(), world.replica());
        std::fs::write(world.cluster.data_dir(target).parent().unwrap().join("hangs"), "").unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap());
            world.settle("the target has the lock", || world.status().leader.as_deref() == Some(world.name(target)));
            // One ttl: without renewals the lock would be gone.
            let ttl = std::time::Duration::from_secs(u64::from(world.document.ttl_s));
            let kept = || world.status().leader.as_deref() == Some(world.name(target));
            assert!(crate::rig::wait::holds_throughout(ttl, kept), "it is held and renewed while PostgreSQL comes up");
            let said = asked.join().unwrap();
            println!("{said:?}");
            assert_eq!(said.code, Some(4), "the answer says that another leads: {said:?}");
        });
        let now = world.wait_another_leads(target);
        println!("{} leads after {}", world.name(now), world.name(leader));
        std::fs::remove_file(world.cluster.data_dir(target).parent().unwrap().join("hangs")).unwrap();
        world.wait_whole("after the archive answers again");
        world.finish();
    });
}
