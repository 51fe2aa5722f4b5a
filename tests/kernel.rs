//! The kernel, explored exhaustively (SAFETY 5, at its end): lock, lease, guard and watchdog under one daemon that may be killed, slow or
//! restarted between any two steps, a guard that may be frozen or killed, a stranger with the member's name, and an etcd that answers
//! after applying, late, or not at all, and in some worlds lies. I1, I2, I3, I4 and I12 hold in every state that can be reached.
//!
//! An exploration that has not found planted bugs has proved nothing: each mutant of the rules must be caught.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "kernel/key.rs"]
mod key;
#[path = "kernel/steps.rs"]
mod steps;
#[path = "kernel/world.rs"]
mod world;

use std::collections::{HashSet, VecDeque};

use steps::{Next, What};
use world::{Mutant, Setup, World};

/// More states than any of the worlds has: an exploration that does not end is an error of the test.
const STATES_MAX: usize = 4_000_000;

struct Explored {
    states: usize,
    /// What happened, step by step, until an invariant was broken.
    broken: Option<Vec<String>>,
    /// Steps that were seen, without their numbers.
    seen: HashSet<&'static str>,
}

fn explore(setup: &Setup) -> Explored {
    let first = World::new();
    let mut known = HashSet::from([first.key(setup)]);
    let mut came_by: Vec<(u32, What)> = vec![(0, ("the world begins", None))];
    let mut queue = VecDeque::from([(0, first)]);
    let mut seen = HashSet::new();
    while let Some((index, world)) = queue.pop_front() {
        for (what, next) in Next::of(&world, setup) {
            seen.insert(what.0);
            if let Some(violated) = &next.violated {
                return Explored { states: known.len(), broken: Some(story(&came_by, index, what, violated)), seen };
            }
            if known.insert(next.key(setup)) {
                queue.push_back((u32::try_from(came_by.len()).unwrap(), next));
                came_by.push((index, what));

                assert!(known.len() < STATES_MAX, "the world of {setup:?} has no end");
            }
        }
    }
    Explored { states: known.len(), broken: None, seen }
}

/// How it came to that.
fn story(came_by: &[(u32, What)], mut index: u32, last: What, violated: &str) -> Vec<String> {
    let line = |(what, ask): &What| ask.map_or_else(|| (*what).to_owned(), |ask| format!("{what} {ask:?}"));
    let mut story = vec![format!("BROKEN: {violated}"), line(&last)];
    while index != 0 {
        let (before, what) = &came_by[index as usize];
        story.push(line(what));
        index = *before;
    }
    story.reverse();
    story
}

/// One daemon that may be killed and slow, a stranger, a crashing postmaster.
const HONEST: Setup = Setup {
    ttl: 6,
    watchdog: false,
    stranger: true,
    late_messages: true,
    etcd_lies: false,
    planned_stops: true,
    daemon_dies: true,
    guard_fails: false,
    pauses: false,
    mutant: None,
};
/// The same without the stranger and planned stops, and etcd lies.
const LYING_ETCD: Setup = Setup { etcd_lies: true, stranger: false, late_messages: false, planned_stops: false, ..HONEST };
/// The guard is frozen or killed while its daemon runs; no watchdog.
const GUARD_FAILS: Setup = Setup { daemon_dies: false, guard_fails: true, stranger: false, late_messages: false, ..HONEST };
/// Guard and daemon both fail; the watchdog is armed.
const BOTH_FAIL: Setup = Setup { ttl: 9, watchdog: true, daemon_dies: true, planned_stops: false, ..GUARD_FAILS };
/// A person sets maintenance mode and ends it; others lead when nothing forbids it.
const PAUSED: Setup = Setup { pauses: true, planned_stops: false, late_messages: false, daemon_dies: false, ttl: 3, ..HONEST };

fn holds(setup: &Setup, must_be_seen: &[&str]) {
    let explored = explore(setup);
    println!("{} states of {setup:?}", explored.states);
    if let Some(story) = &explored.broken {
        panic!("after {} states of {setup:?}:\n  {}", explored.states, story.join("\n  "));
    }
    for what in must_be_seen {
        assert!(explored.seen.iter().any(|seen| seen.contains(what)), "`{what}` never happened in {setup:?}: {:#?}", explored.seen);
    }
}

fn is_caught(mutant: Mutant, setup: &Setup, invariant: &str) {
    let explored = explore(&Setup { mutant: Some(mutant), ..*setup });
    let story = explored.broken.unwrap_or_else(|| panic!("{mutant:?} was not caught in {} states", explored.states));
    println!("{mutant:?}, after {} states:\n  {}", explored.states, story.join("\n  "));
    let broken = story.last().unwrap();
    assert!(broken.contains(invariant), "{mutant:?} broke something else: {broken}");
}

#[test]
fn i1_i2_i3_i4_hold_when_the_daemon_is_killed_slow_or_restarted_anywhere() {
    holds(&HONEST, &["leaves recovery", "stranger takes", "daemon starts", "writable", "postmaster is killed", "releases"]);
}

#[test]
fn i2_i3_i4_hold_when_etcd_loses_leases_early_and_says_yes_to_keepalives_of_dead_ones() {
    holds(&LYING_ETCD, &["EARLY", "LIES", "a person deletes", "leaves recovery"]);
}

#[test]
fn i1_i2_i3_hold_when_the_guard_is_frozen_or_killed_and_its_daemon_runs() {
    holds(&GUARD_FAILS, &["guard is frozen", "guard goes on", "guard is killed", "new guard", "leaves recovery"]);
}

#[test]
fn i1_i2_i3_i12_hold_when_guard_and_daemon_fail_together_and_the_watchdog_is_armed() {
    holds(&BOTH_FAIL, &["guard is frozen between", "guard is killed", "daemon is killed", "leaves recovery"]);
}

#[test]
fn a_deadline_counted_from_the_answer_is_caught() {
    is_caught(Mutant::DeadlineCountedFromTheAnswer, &HONEST, "I2");
}

#[test]
fn an_old_answer_credited_to_a_newer_renewal_is_caught() {
    is_caught(Mutant::OldAnswerCreditedToANewerRenewal, &HONEST, "I2");
}

#[test]
fn a_renewal_without_its_proof_is_caught() {
    is_caught(Mutant::ProofOmitted, &LYING_ETCD, "I2");
}

#[test]
fn a_lock_adopted_because_it_bears_the_right_name_is_caught() {
    is_caught(Mutant::LockAdoptedByName, &HONEST, "I1");
}

#[test]
fn a_release_before_the_proof_of_death_is_caught() {
    is_caught(Mutant::ReleaseBeforeTheProofOfDeath, &HONEST, "I1");
}

#[test]
fn a_dead_postmaster_taken_for_the_proof_of_death_is_caught() {
    is_caught(Mutant::DeathOfThePostmasterTakenForProof, &HONEST, "I1");
}

#[test]
fn a_promotion_before_the_guard_acknowledged_the_word_is_caught() {
    is_caught(Mutant::PromoteBeforeTheWordIsAcknowledged, &HONEST, "I1");
}

#[test]
fn a_promotion_of_another_start_than_the_one_vouched_for_is_caught() {
    is_caught(Mutant::PromoteWhateverRuns, &HONEST, "I3");
}

#[test]
fn a_leader_write_without_the_epoch_is_caught() {
    is_caught(Mutant::EpochNotCompared, &HONEST, "I4");
}

#[test]
fn a_daemon_that_trusts_a_silent_guard_is_caught() {
    is_caught(Mutant::DaemonTrustsASilentGuard, &GUARD_FAILS, "I2");
}

#[test]
fn a_watchdog_fed_without_the_check_is_caught() {
    is_caught(Mutant::FeedWithoutCheck, &BOTH_FAIL, "I12");
}

#[test]
fn a_watchdog_disarmed_before_the_stop_is_caught() {
    is_caught(Mutant::DisarmBeforeTheStop, &BOTH_FAIL, "I12");
}

#[test]
fn a_feed_rule_that_leaves_out_the_delayed_feed_is_caught() {
    is_caught(Mutant::FeedRuleWithOneTimeout, &BOTH_FAIL, "I12");
}

#[test]
fn i1_i2_hold_when_maintenance_mode_is_set_and_ended_at_any_moment() {
    holds(
        &PAUSED,
        &["sets maintenance", "ends maintenance", "daemon asks to suspend", "the guard hears", "all have said so", "stranger takes"],
    );
}

#[test]
fn the_end_of_maintenance_mode_that_is_acknowledged_before_the_guard_fences_again_is_caught() {
    is_caught(Mutant::AckBeforeTheGuardFencesAgain, &PAUSED, "I2");
}

#[test]
fn deadlines_suspended_by_an_old_view_are_caught() {
    is_caught(Mutant::SuspendedByAnOldView, &PAUSED, "I2");
}

#[test]
fn a_lock_taken_beside_maintenance_mode_is_caught() {
    is_caught(Mutant::LockTakenBesideMaintenance, &PAUSED, "I1");
}

#[test]
fn a_late_word_on_maintenance_mode_that_the_guard_takes_is_caught() {
    is_caught(Mutant::LateWordTakenByTheGuard, &PAUSED, "I2");
}

#[test]
fn deadlines_suspended_in_the_middle_of_a_promotion_are_caught() {
    is_caught(Mutant::SuspendedInTheMiddleOfAPromotion, &PAUSED, "I3");
}
