//! The guard, alive, with real servers that are busy: killed, frozen, upgraded, and always judged by what is left in the process table
//! and by what was acknowledged, never by how long it took.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "guard/foreign.rs"]
mod foreign;
#[path = "guard/harness.rs"]
mod harness;
#[path = "guard/processes.rs"]
mod processes;
#[path = "rig/wait.rs"]
#[allow(dead_code)]
mod wait;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::{
    ANSWER, Busy, PATIENCE, SILENCE, World, hasty_stop, identity, lock, patient_stop, played_the_daemon, running, signal, times,
};
use nix::sys::signal::Signal;
use pgherd::clock::BootTime;
use pgherd::facts::guard::{PostmasterFacts, Rung, Word};
use pgherd::guard::client::{self, GuardClient, GuardError};
use pgherd::guard::protocol::{ByeReason, MESSAGE_MAX_BYTES, Refusal, Request, StopOrder};
use pgherd::guard::scan;
use processes::{descendants, stat};
use wait::holds_within;

const GUARD: &str = env!("CARGO_BIN_EXE_pgherd-guard");

#[track_caller]
fn refused_for(answer: Result<impl std::fmt::Debug, GuardError>, expected: Refusal) {
    match answer {
        Err(GuardError::Refused { reason, .. }) if reason == expected => {}
        other => panic!("expected a refusal for {expected:?}, got {other:?}"),
    }
}

// The postmaster.

#[test]
fn a_lock_file_whose_number_is_another_process_by_now_keeps_nobody_from_starting() {
    let world = World::new();
    let (_, postmaster) = world.primary(300);
    signal(postmaster, Signal::SIGKILL);
    world.proved_empty();
    let left = std::fs::read_to_string(world.data_dir.join("postmaster.pid")).unwrap();
    let (port, sockets) = (left.lines().nth(3).unwrap(), left.lines().nth(4).unwrap());
    let of_socket = Path::new(sockets).join(format!(".s.PGSQL.{port}.lock"));
    for path in [world.data_dir.join("postmaster.pid"), of_socket] {
        let left = std::fs::read_to_string(&path).unwrap();
        // As after a loss of power: this process is of the same user, lives, and is no PostgreSQL.
        std::fs::write(&path, left.replacen(&postmaster.to_string(), &std::process::id().to_string(), 1)).unwrap();
    }
    running(&world.order(&Request::Start(world.start_order(Word::Writable))));
    world.accepts(|| {});
}

#[test]
fn row_6_a_killed_postmaster_is_proved_dead_with_its_busy_backends_and_starts_again_under_the_same_lock() {
    let world = World::new();
    let (_, postmaster) = world.primary(300);
    let busy = Busy::start(&world);
    signal(postmaster, Signal::SIGKILL);
    let end = world.proved_empty();
    busy.nothing_was_acknowledged_after(end.at);
    assert_eq!((end.signal, end.exit_status, end.rung), (Some(9), None, None), "it ended by itself");
    running(&world.order(&Request::Start(world.start_order(Word::Writable))));
    world.accepts(|| {});
    let kept = world.sql("SELECT value FROM ledger").unwrap();
    assert!(busy.values().iter().all(|value| kept.contains(&value.to_string())), "an acknowledged row is gone");
}

#[test]
fn a_frozen_postmaster_or_backend_is_ended_by_the_ladder() {
    for freeze_postmaster in [true, false] {
        let world = World::new();
        let (_, postmaster) = world.primary(300);
        let busy = Busy::start(&world);
        signal(if freeze_postmaster { postmaster } else { busy.pid() }, Signal::SIGSTOP);
        world.order(&hasty_stop());
        let end = world.proved_empty();
        busy.nothing_was_acknowledged_after(end.at);
        assert!(end.rung >= Some(Rung::ImmediateStop), "a fast stop cannot end it: {end:?}");
    }
}

#[test]
fn a_planned_stop_of_a_busy_primary_ends_in_good_order() {
    let world = World::new();
    world.primary(300);
    let busy = Busy::start(&world);
    world.order(&patient_stop());
    let end = world.proved_empty();
    busy.nothing_was_acknowledged_after(end.at);
    assert_eq!((end.exit_status, end.signal, end.rung), (Some(0), None, Some(Rung::FastStop)));
    world.order(&Request::NoLock { epoch: identity().epoch });
}

#[test]
fn what_archive_command_left_behind_is_ended_and_not_waited_for() {
    let world = World::new();
    let mut order = world.start_order(Word::Writable);
    for setting in ["archive_mode=on", "archive_command=sleep 1000000; true"] {
        order.arguments.extend(["-c".to_owned(), setting.to_owned()]);
    }
    world.order(&lock(300));
    let (_, postmaster) = running(&world.order(&Request::Start(order)));
    world.accepts(|| {});
    world.sql("CREATE TABLE something ()").unwrap();
    world.sql("SELECT pg_switch_wal()").unwrap();
    let mut sleeper = None;
    let archives = || {
        sleeper = descendants(postmaster).into_iter().find(|(_, name)| name == "sleep").map(|(pid, _)| pid);
        sleeper.is_some()
    };
    assert!(holds_within(PATIENCE, archives), "archive_command runs");
    // A fast stop waits for the archiver, and the archiver for its command.
    world.order(&hasty_stop());
    world.proved_empty();
    assert!(holds_within(PATIENCE, || stat(sleeper.unwrap()).is_none()), "it is ended, and reaped by the guard");
}

#[test]
fn a_standby_needs_no_lock_and_no_daemon() {
    let world = World::new();
    std::fs::write(world.data_dir.join("standby.signal"), "").unwrap();
    let (start, _) = running(&world.order(&Request::Start(world.start_order(Word::Standby))));
    world.accepts(|| {});
    refused_for(world.ask(&Request::Vouch { start, word: Word::Writable }), Refusal::NoLock);
    world.order(&Request::Bye { reason: ByeReason::Leaving });
    assert_eq!(world.sql("SELECT pg_is_in_recovery()").unwrap(), ["t"]);
    assert_eq!(running(&world.look()).0, start);
}

#[test]
fn a_promotion_is_acknowledged_first_and_fenced_from_then_on() {
    let world = World::new();
    std::fs::write(world.data_dir.join("standby.signal"), "").unwrap();
    let (start, _) = running(&world.order(&Request::Start(world.start_order(Word::Standby))));
    world.accepts(|| {});
    world.order(&lock(300));
    world.order(&Request::Vouch { start, word: Word::Writable });
    refused_for(world.ask(&Request::Vouch { start, word: Word::Standby }), Refusal::OnceWritable);
    refused_for(world.ask(&Request::NoLock { epoch: identity().epoch }), Refusal::NotEmpty);
    world.sql("SELECT pg_promote(false)").unwrap();
    let is_primary = || world.sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == ["f"]);
    assert!(holds_within(PATIENCE, is_primary));
    let busy = Busy::start(&world);
    let order = StopOrder::at_once(BootTime::now());
    world.order(&Request::Stop(order));
    let end = world.proved_empty();
    busy.nothing_was_acknowledged_after(end.at);
    world.order(&Request::NoLock { epoch: identity().epoch });
    refused_for(world.ask(&lock(300)), Refusal::StaleLock);
}

#[test]
fn a_program_that_cannot_be_executed_is_said_and_leaves_nothing() {
    let world = World::new();
    let mut order = world.start_order(Word::Standby);
    order.program = "/nonexistent/postgres".into();
    world.order(&Request::Start(order));
    let end = world.proved_empty();
    assert_eq!(end.exit_status, Some(127));
    let said = holds_within(PATIENCE, || world.look().conditions.iter().any(|text| text.contains("/nonexistent/postgres")));
    assert!(said, "{:?}", world.look().conditions);
}

#[test]
fn the_postmaster_gets_nothing_of_what_makes_the_guard_special() {
    let world = World::new();
    let (_, postmaster) = world.primary(300);
    let status = std::fs::read_to_string(format!("/proc/{postmaster}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:", "SigBlk:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set} in {status}");
    }
    assert_eq!(std::fs::read_to_string(format!("/proc/{postmaster}/oom_score_adj")).unwrap().trim(), "0");
    let opened: Vec<String> = std::fs::read_dir(format!("/proc/{postmaster}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    assert!(!opened.iter().any(|target| target.contains("guard.lock") || target.contains("timerfd")), "{opened:?}");
}

// The guard.

#[test]
fn a_killed_guard_takes_postgresql_with_it_and_its_daemon_notices() {
    let world = World::new();
    world.primary(300);
    let busy = Busy::start(&world);
    let (tell, noticed) = std::sync::mpsc::channel();
    world.guard.on_death(move || tell.send(()).unwrap()).unwrap();
    signal(world.guard.pid(), Signal::SIGKILL);
    noticed.recv_timeout(PATIENCE).expect("the daemon notices");
    scan::fence_by_scan(&world.data_dir, PATIENCE).unwrap();
    let proof = BootTime::now();
    world.assert_nothing_left();
    let next = GuardClient::spawn(Path::new(GUARD), &world.run_dir, &world.data_dir).unwrap();
    let facts = next.request(&Request::Facts, ANSWER).unwrap();
    assert_eq!(facts.postmaster, PostmasterFacts::ProvedEmpty { last: None });
    assert_eq!(facts.lock, None, "what the guard knew was in its memory only");
    busy.nothing_was_acknowledged_after(proof);
    next.request(&Request::Shutdown, ANSWER).unwrap();
}

#[test]
fn row_3_a_frozen_guard_is_silent_its_daemon_fences_by_scan_and_on_waking_it_does_nothing_late() {
    let world = World::new();
    world.primary(300);
    let busy = Busy::start(&world);
    signal(world.guard.pid(), Signal::SIGSTOP);
    for request in [lock(300), Request::Start(world.start_order(Word::Standby))] {
        assert!(matches!(world.guard.request(&request, SILENCE), Err(GuardError::Silent(_))));
    }
    scan::fence_by_scan(&world.data_dir, PATIENCE).unwrap();
    let proof = BootTime::now();
    world.assert_nothing_left();
    signal(world.guard.pid(), Signal::SIGCONT);
    let end = world.proved_empty();
    assert_eq!(end.start.0, 1, "what was asked while it was frozen is not done late");
    busy.nothing_was_acknowledged_after(proof);
}

#[test]
fn a_guard_that_wakes_up_past_its_deadlines_kills_before_it_listens() {
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon("a_guard_that_wakes_up_past_its_deadlines_kills_before_it_listens");
    daemon.renew(20);
    daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap();
    world.accepts(|| {});
    let busy = Busy::start(&world);
    daemon.kill();
    let lock = world.look().lock.unwrap();
    signal(world.guard.pid(), Signal::SIGSTOP);
    // Nobody is left to fence, and there is no watchdog here: what counts is what the guard does first.
    assert!(holds_within(PATIENCE, || BootTime::now() > lock.valid_until));
    signal(world.guard.pid(), Signal::SIGCONT);
    let end = world.proved_empty();
    assert_eq!(end.rung, Some(Rung::KillAll), "not rung by rung");
    assert_eq!(end.exit_status, None);
    busy.nothing_was_acknowledged_after(end.at);
}

#[test]
fn sigterm_stops_postgresql_in_good_order_and_then_the_guard_ends() {
    let world = World::new();
    world.primary(300);
    let busy = Busy::start(&world);
    let (tell, ended) = std::sync::mpsc::channel();
    world.guard.on_death(move || tell.send(()).unwrap()).unwrap();
    signal(world.guard.pid(), Signal::SIGTERM);
    ended.recv_timeout(PATIENCE).expect("the guard ends");
    let proof = BootTime::now();
    world.assert_nothing_left();
    busy.nothing_was_acknowledged_after(proof);
    assert!(GuardClient::connect(&world.run_dir, false).unwrap().is_none(), "its socket is gone");
}

#[test]
fn an_upgrade_keeps_process_postmaster_and_lock_and_the_new_program_still_fences() {
    let world = World::new();
    let (start, postmaster) = world.primary(300);
    let before = world.order(&lock(300));
    let absent = world.run_dir.join("no-such-guard");
    assert!(client::upgrade(&world.run_dir, &absent).is_err());
    let no_guard = Path::new("/bin/true");
    assert!(client::upgrade(&world.run_dir, no_guard).is_err(), "what does not say our protocol version is not let in");
    assert_eq!(running(&world.look()), (start, postmaster), "and changes nothing");
    let (tell, told) = std::sync::mpsc::channel();
    client::subscribe(&world.run_dir, move |facts| drop(tell.send(facts)), || {}).unwrap();
    client::upgrade(&world.run_dir, Path::new(GUARD)).unwrap();
    let after = world.look();
    assert_eq!((after.pid, running(&after), after.lock), (before.pid, (start, postmaster), before.lock));
    let busy = Busy::start(&world);
    refused_for(world.ask(&Request::Shutdown), Refusal::NotEmpty);
    // Another lease under the same epoch: the earlier of both deadlines counts, and nobody renews.
    let mut shorter = identity();
    shorter.lease.lease.0 += 1;
    let sent = BootTime::now();
    let lock = world.order(&Request::Lock { identity: shorter, sent, times: times(20) }).lock.unwrap();
    assert_eq!(lock.valid_until, times(20).deadlines(sent).valid_until);
    let end = world.proved_empty();
    assert!(end.rung.is_some());
    assert!(end.at < lock.valid_until, "I2: proved empty before E");
    busy.nothing_was_acknowledged_after(end.at);
    let heard = || told.try_iter().any(|facts| matches!(facts.postmaster, PostmasterFacts::ProvedEmpty { .. }));
    assert!(holds_within(PATIENCE, heard), "a subscription survives the upgrade");
}

#[test]
fn the_guard_is_small_enough_to_be_locked_into_memory() {
    let world = World::new();
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.guard.pid())).unwrap();
    let kb = |name: &str| -> u64 {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.trim().trim_end_matches(" kB").parse().unwrap()
    };
    // What is measured for the promise is what is installed; unoptimised code is half as large again.
    let most_kb = if cfg!(debug_assertions) { 6_000 } else { 4_000 };
    assert!(kb("VmRSS:") < most_kb, "{status}");
    let refused = world.look().conditions.iter().any(|text| text.contains("not locked"));
    assert!(kb("VmLck:") > 0 || refused, "neither locked nor said: {status}");
}

#[test]
fn one_guard_to_a_run_directory_and_one_daemon_to_a_guard() {
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let second = Command::new(GUARD).arg(&world.run_dir).arg(&world.data_dir).stderr(Stdio::null()).status().unwrap();
    assert!(!second.success());
    // Not said goodbye: this process is the owner still.
    let mut other = harness::Daemon::start(&world.run_dir, "one_guard_to_a_run_directory_and_one_daemon_to_a_guard");
    assert!(other.ask(Request::Facts).unwrap_err().contains("there already"));
    let looker = GuardClient::connect(&world.run_dir, false).unwrap().unwrap();
    refused_for(looker.request(&hasty_stop(), ANSWER), Refusal::NotYours);
}

#[test]
fn neither_a_subscriber_that_does_not_read_nor_an_endless_line_blocks_the_guard() {
    let world = World::new();
    let mut deaf = UnixStream::connect(world.run_dir.join("guard.sock")).unwrap();
    deaf.write_all(b"{\"request\":\"hello\",\"version\":1,\"owner\":false}\n{\"request\":\"subscribe\"}\n").unwrap();
    let mut endless = UnixStream::connect(world.run_dir.join("guard.sock")).unwrap();
    endless.set_write_timeout(Some(PATIENCE)).unwrap();
    let line = vec![b'x'; MESSAGE_MAX_BYTES * 8];
    assert!(endless.write_all(&line).is_err(), "a line without an end is hung up on");
    let before = world.look().sequence;
    for _ in 0..2_000 {
        world.order(&lock(300));
    }
    assert!(world.look().sequence > before + 1_000, "each was a change");
}

// The daemon.

#[test]
fn row_1_a_killed_daemon_that_is_back_before_a_gets_the_lock_handed_and_costs_no_outage() {
    const THIS: &str = "row_1_a_killed_daemon_that_is_back_before_a_gets_the_lock_handed_and_costs_no_outage";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon(THIS);
    daemon.renew(120);
    let running_before = running(&daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap());
    world.accepts(|| {});
    let busy = Busy::start(&world);
    daemon.kill();
    let mut next = harness::Daemon::start(&world.run_dir, THIS);
    let handed = next.ask(Request::Facts).unwrap();
    assert_eq!(handed.lock.unwrap().identity, identity());
    assert_eq!(handed.daemon_crashes, 1);
    next.renew(120);
    busy.commits_go_on();
    assert_eq!(running(&world.look()), running_before, "PostgreSQL was not touched");
}

#[test]
fn row_2_a_killed_daemon_that_does_not_come_back_is_fenced_by_the_clock() {
    const THIS: &str = "row_2_a_killed_daemon_that_does_not_come_back_is_fenced_by_the_clock";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon(THIS);
    daemon.renew(20);
    daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap();
    world.accepts(|| {});
    let busy = Busy::start(&world);
    daemon.kill();
    let lock = world.look().lock.unwrap();
    let end = world.proved_empty();
    assert!(end.rung.is_some());
    assert!(end.at < lock.valid_until, "I2: proved empty before E, {end:?}, {lock:?}");
    busy.nothing_was_acknowledged_after(end.at);
}

#[test]
fn row_3_a_frozen_daemon_is_fenced_and_what_it_says_on_waking_brings_nothing_back() {
    const THIS: &str = "row_3_a_frozen_daemon_is_fenced_and_what_it_says_on_waking_brings_nothing_back";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon(THIS);
    daemon.renew(20);
    daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap();
    world.accepts(|| {});
    let busy = Busy::start(&world);
    signal(daemon.pid(), Signal::SIGSTOP);
    let end = world.proved_empty();
    busy.nothing_was_acknowledged_after(end.at);
    signal(daemon.pid(), Signal::SIGCONT);
    let facts = daemon.ask(Request::Facts).unwrap();
    assert!(matches!(facts.postmaster, PostmasterFacts::ProvedEmpty { .. }));
    assert_eq!(facts.daemon_crashes, 0, "frozen is not ended");
}

/// A daemon that gets no processor is one that is stopped and goes on: first for less than its budget, then for more.
#[test]
fn row_4_a_daemon_that_is_starved_within_its_budget_costs_nothing_and_beyond_it_is_fenced() {
    const THIS: &str = "row_4_a_daemon_that_is_starved_within_its_budget_costs_nothing_and_beyond_it_is_fenced";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon(THIS);
    daemon.renew(20);
    let running_before = running(&daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap());
    world.accepts(|| {});
    let busy = Busy::start(&world);
    signal(daemon.pid(), Signal::SIGSTOP);
    let proved = world.look().lock.unwrap().valid_until;
    let missed = BootTime::now() + times(20).renewal_interval();
    assert!(holds_within(PATIENCE, || BootTime::now() > missed), "a renewal is due");
    busy.commits_go_on();
    let starved = world.look();
    assert_eq!(starved.lock.unwrap().valid_until, proved, "nobody renewed");
    signal(daemon.pid(), Signal::SIGCONT);
    assert!(holds_within(PATIENCE, || world.look().lock.is_some_and(|lock| lock.valid_until > proved)), "it renews again");
    busy.commits_go_on();
    assert_eq!(running(&world.look()), running_before, "PostgreSQL was not touched");

    signal(daemon.pid(), Signal::SIGSTOP);
    let end = world.proved_empty();
    assert!(end.at < world.look().lock.unwrap().valid_until, "I2: proved empty before E");
    busy.nothing_was_acknowledged_after(end.at);
    signal(daemon.pid(), Signal::SIGCONT);
    let facts = daemon.ask(Request::Facts).unwrap();
    assert!(matches!(facts.postmaster, PostmasterFacts::ProvedEmpty { .. }), "what it says on waking brings nothing back");
}

#[test]
fn guard_and_daemon_killed_together_leave_no_process_that_acknowledges() {
    const THIS: &str = "guard_and_daemon_killed_together_leave_no_process_that_acknowledges";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    let mut daemon = world.daemon(THIS);
    daemon.renew(300);
    daemon.ask(Request::Start(world.start_order(Word::Writable))).unwrap();
    world.accepts(|| {});
    let busy = Busy::start(&world);
    signal(daemon.pid(), Signal::SIGSTOP);
    signal(world.guard.pid(), Signal::SIGKILL);
    daemon.kill();
    // Nobody but the kernel is left: the parent-death signal is an immediate stop, which takes the backends with it.
    world.nothing_is_left_in_the_end();
    busy.nothing_was_acknowledged_after(BootTime::now());
}

#[test]
fn row_5_a_daemon_that_keeps_crashing_is_refused_and_its_primary_is_stopped_in_good_order() {
    const THIS: &str = "row_5_a_daemon_that_keeps_crashing_is_refused_and_its_primary_is_stopped_in_good_order";
    if played_the_daemon() {
        return;
    }
    let world = World::new();
    world.primary(300);
    let busy = Busy::start(&world);
    world.resign();
    for crash in 1..=3 {
        let mut daemon = harness::Daemon::start(&world.run_dir, THIS);
        assert_eq!(daemon.ask(Request::Facts).unwrap().daemon_crashes, crash - 1);
        daemon.kill();
        assert!(holds_within(PATIENCE, || world.look().crash_loop == (crash == 3) && world.look().daemon_crashes == crash));
    }
    let end = world.proved_empty();
    assert_eq!((end.exit_status, end.rung), (Some(0), Some(Rung::FastStop)));
    busy.nothing_was_acknowledged_after(end.at);
    let mut refused = harness::Daemon::start(&world.run_dir, THIS);
    assert!(refused.ask(Request::Facts).unwrap_err().contains("--clear-crashes"));
    let looker = GuardClient::connect(&world.run_dir, false).unwrap().unwrap();
    looker.request(&Request::Clear, ANSWER).unwrap();
    let mut accepted = harness::Daemon::start(&world.run_dir, THIS);
    assert_eq!(accepted.ask(Request::Facts).unwrap().daemon_crashes, 0);
}
