//! The change of the synchronous set, explored exhaustively (SAFETY I5-I7): every step of `policy::synchrony` with a crash of the daemon
//! after it, walsenders that read their names late and one by one, standbys that come and go, a commit written at any moment, and a
//! failover at any moment to whoever the record allows. An acknowledged commit is never out of reach of those who may lead; and from
//! wherever that came to, the daemon brings the cluster to its goal once nothing fails any more.
//!
//! Three members go through every three goals with all of that, through some without end, and through every two with two failures of the
//! daemon. Four and five go through every two goals, of quorum and sync mode, with one failure of the daemon; of four also the leader
//! fails. What is left out makes no difference: how the standbys are numbered ([`symmetry`]), when a commit that may be acknowledged is,
//! and flushes that nobody looks at (see [`world`]).
//!
//! An exploration that has not found planted bugs has proved nothing: each [`Bug`] must be caught.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "synchrony/bits.rs"]
mod bits;
#[path = "synchrony/bugs.rs"]
mod bugs;
#[path = "synchrony/event.rs"]
mod event;
#[path = "synchrony/explore.rs"]
mod explore;
#[path = "synchrony/rules.rs"]
mod rules;
#[path = "synchrony/symmetry.rs"]
mod symmetry;
#[path = "synchrony/world.rs"]
mod world;

use bits::{ASYNC, Code, STAY, any};
use bugs::Bug;
use event::Kind;
use explore::{LOST, explore};
use world::{ANY_NUMBER, Setup};

const NOBODY: Code = any(0, 0);
const N1: u8 = 1 << 1;
const N2: u8 = 1 << 2;
const N3: u8 = 1 << 3;

/// Everything to wait for among these standbys, and to wait for nobody, and async.
fn goals(standbys: usize) -> Vec<Code> {
    let mut goals = vec![ASYNC, NOBODY];
    for members in (2..2u8 << standbys).filter(|members| members & 1 == 0) {
        goals.extend((1..=members.count_ones()).map(|count| any(count, members)));
    }
    goals
}

/// Of goals that differ only in how the standbys are numbered one: a world that begins with another begins with this by other numbers.
fn first_goals(standbys: usize) -> Vec<Code> {
    let of_the_first = |goal: &Code| (bits::members_of(*goal) | 1).wrapping_add(1).is_power_of_two();
    goals(standbys).into_iter().filter(of_the_first).collect()
}

/// A world without outages, crashes and failovers.
fn calm(standbys: usize, from: Vec<Code>, goals: Vec<Code>, changes: u8) -> Setup {
    Setup { standbys, from, goals, changes, outages: false, crashes: 0, failovers: 0, alone: false, symmetry: true, bug: None }
}

/// Explores it all; `never` is what cannot happen in it.
fn assert_nothing_is_lost(setup: &Setup, never: &[Kind]) {
    let explored = explore(setup);
    if let Some(story) = explored.broken {
        panic!("{setup:?}\n{}", story.join("\n"));
    }
    assert_eq!(explored.unseen, never, "what never happened in {setup:?}");
    println!("{} states", explored.states);
}

/// Every ordered triple of goals, each goal at any moment of what the one before is about, and with everything that may go wrong: each
/// standby is gone once and comes back, the daemon fails once, PostgreSQL crashes once and the same or another member leads.
#[test]
fn i5_by_any_three_goals_of_three_members_nothing_acknowledged_is_lost_and_nothing_wedges() {
    let setup = calm(2, first_goals(2), goals(2), 2);
    assert_nothing_is_lost(&Setup { outages: true, crashes: 1, failovers: 1, ..setup }, &[]);
}

/// A second failure meets what the first has left.
#[test]
fn i5_between_any_two_goals_of_three_members_nothing_is_lost_when_the_daemon_fails_twice() {
    let setup = calm(2, first_goals(2), goals(2), 1);
    assert_nothing_is_lost(&Setup { crashes: 2, failovers: 1, alone: true, ..setup }, &[Kind::Connects, Kind::Gone]);
}

/// The other explorations take one numbering of the standbys for as good as another; here nothing is taken for granted.
#[test]
fn i5_between_any_two_goals_of_three_members_nothing_is_lost_however_the_standbys_are_numbered() {
    let goals: Vec<Code> = goals(2).into_iter().chain([STAY]).collect();
    let setup = calm(2, goals.clone(), goals, 1);
    assert_nothing_is_lost(&Setup { outages: true, crashes: 1, failovers: 1, alone: true, symmetry: false, ..setup }, &[]);
}

/// The goals for which commits wait, one after the other without end.
#[test]
fn i5_by_any_number_of_goals_nothing_acknowledged_is_lost_and_nothing_wedges() {
    let goals = vec![any(1, N1), any(1, N2), any(1, N1 | N2), any(2, N1 | N2)];
    let setup = calm(2, goals.clone(), goals, ANY_NUMBER);
    assert_nothing_is_lost(&Setup { crashes: 1, alone: true, ..setup }, &[Kind::Connects, Kind::Gone, Kind::Leads, Kind::LeadsWithout]);
}

/// How many acknowledge grows step by step, and while it still grows.
#[test]
fn i5_however_the_number_of_four_members_that_acknowledge_grows_and_shrinks_nothing_is_lost() {
    let goals: Vec<Code> = (1..=3).map(|count| any(count, N1 | N2 | N3)).collect();
    let setup = calm(3, goals.clone(), goals, ANY_NUMBER);
    assert_nothing_is_lost(&Setup { crashes: 1, ..setup }, &[Kind::Connects, Kind::Gone, Kind::Leads, Kind::LeadsWithout]);
}

#[test]
fn i5_between_any_two_goals_of_four_members_nothing_acknowledged_is_lost_and_nothing_wedges() {
    let setup = calm(3, first_goals(3), goals(3), 1);
    assert_nothing_is_lost(&Setup { crashes: 1, failovers: 1, ..setup }, &[Kind::Connects, Kind::Gone]);
}

#[test]
fn i5_between_any_two_goals_of_five_members_nothing_acknowledged_is_lost_and_nothing_wedges() {
    let setup = calm(4, first_goals(4), goals(4), 1);
    assert_nothing_is_lost(&Setup { crashes: 1, ..setup }, &[Kind::Connects, Kind::Gone, Kind::Leads, Kind::LeadsWithout]);
}

/// Each bug, and the small world that it is caught in.
fn planted() -> Vec<Setup> {
    let (one, other, either, both) = (any(1, N1), any(1, N2), any(1, N1 | N2), any(2, N1 | N2));
    let plain = |bug: Bug, goals: &[Code]| {
        let changes = u8::try_from(goals.len() - 1).unwrap();
        Setup { bug: Some(bug), symmetry: false, ..calm(2, goals[..1].to_vec(), goals.to_vec(), changes) }
    };
    let crash = |bug: Bug, goals: &[Code]| Setup { crashes: 1, ..plain(bug, goals) };
    let failover = |bug: Bug, goals: &[Code]| Setup { failovers: 1, ..plain(bug, goals) };
    vec![
        plain(Bug::NamesFirst, &[both, one]),
        plain(Bug::ReloadIsEffect, &[either, one]),
        plain(Bug::FlushNotLookedAt, &[one]),
        plain(Bug::PositionOfBefore, &[one]),
        plain(Bug::GrowthWithoutFirst, &[either, both]),
        Setup { standbys: 3, ..plain(Bug::FirstShownAsAny, &[1, 2, 3].map(|count| any(count, N1 | N2 | N3))) },
        crash(Bug::FileBelieved, &[either, one]),
        Setup { failovers: 1, ..crash(Bug::OnlyTheRecordCounts, &[one, both, one]) },
        crash(Bug::OrderForgotten, &[one, other]),
        plain(Bug::OneTooFew, &[either]),
        failover(Bug::BehindLeads, &[either]),
        Setup { outages: true, ..plain(Bug::EmptiedToMakeRoom, &[one]) },
        failover(Bug::FormerRecordThrownAway, &[either, one]),
        plain(Bug::MixtureMiscounted, &[one, other]),
        plain(Bug::WaitingNotProved, &[one]),
        plain(Bug::AnyWaitIsProof, &[one, NOBODY, one]),
        crash(Bug::WriteLandsLate, &[one]),
        plain(Bug::NeverLooks, &[one]),
        plain(Bug::StrengthenedTooSoon, &[both, one]),
    ]
}

#[test]
fn every_planted_bug_is_caught() {
    for setup in planted() {
        let Some(bug) = setup.bug else { continue };
        let explored = explore(&setup);
        let Some(story) = explored.broken else { panic!("{bug:?} is not caught among {} states", explored.states) };
        let is_lost = story.last().unwrap().starts_with(LOST);
        assert_eq!(is_lost, !bug.is_of_progress(), "{bug:?} is caught by what it does not do: {story:?}");
        println!("{bug:?}, among {} states:\n  {}\n", explored.states, story.join("\n  "));
        let sound = explore(&Setup { bug: None, ..setup });
        assert!(sound.broken.is_none(), "what is caught is not {bug:?}: {:?}", sound.broken);
    }
}
