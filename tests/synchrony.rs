//! The change of the synchronous set, explored exhaustively (SAFETY I5-I7): every step of `policy::synchrony` with a crash of the daemon
//! after it, walsenders that read their names late and one by one, standbys that come and go, a commit written at any moment, and a
//! failover at any moment to whoever the record allows. An acknowledged commit is never out of reach of those who may lead.
//!
//! An exploration that has not found planted bugs has proved nothing: each [`world::Bug`] must be caught.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "synchrony/world.rs"]
mod world;

use std::collections::{HashSet, VecDeque};

use pgherd::facts::synchrony::Acks;
use pgherd::policy::synchrony::Goal;
use world::{Bug, Setup, World, member};

/// More states than any of the worlds has: an exploration that does not end is an error of the test.
const STATES_MAX: usize = 6_000_000;

struct Explored {
    states: usize,
    /// What happened, step by step, until a commit was lost.
    broken: Option<Vec<String>>,
    /// Worlds in which everything is as the last goal wants it.
    settled: usize,
}

fn explore(setup: &Setup) -> Explored {
    let first = World::new(setup);
    let mut known = HashSet::from([first.clone()]);
    let mut came_by: Vec<(u32, String)> = vec![(0, "the world begins".to_owned())];
    let mut queue = VecDeque::from([(0u32, first)]);
    let mut settled = 0;
    while let Some((index, world)) = queue.pop_front() {
        settled += usize::from(world.is_settled(setup));
        for (what, next) in world.next(setup) {
            if next.lost(setup) {
                return Explored { states: known.len(), broken: Some(story(&came_by, index, what, &next)), settled };
            }
            if known.insert(next.clone()) {
                queue.push_back((u32::try_from(came_by.len()).unwrap(), next));
                came_by.push((index, what));
                assert!(known.len() < STATES_MAX, "the world of {setup:?} has no end");
            }
        }
    }
    Explored { states: known.len(), broken: None, settled }
}

fn story(came_by: &[(u32, String)], mut index: u32, last: String, end: &World) -> Vec<String> {
    let mut story = vec![format!("{end:?}"), last];
    while index != 0 {
        let (before, what) = &came_by[index as usize];
        story.push(what.clone());
        index = *before;
    }
    story.reverse();
    story
}

fn acks(acks: u32, standbys: &[usize]) -> Goal {
    Goal::Acks(Acks { members: standbys.iter().map(|index| member(*index)).collect(), acks })
}

/// Everything to wait for among these standbys, and to wait for nobody, and async.
fn goals(standbys: usize) -> Vec<Goal> {
    let mut goals = vec![Goal::Async, acks(0, &[])];
    for bits in 1..1usize << standbys {
        let among: Vec<usize> = (0..standbys).filter(|index| bits >> index & 1 == 1).map(|index| index + 1).collect();
        goals.extend((1..=u32::try_from(among.len()).unwrap()).map(|count| acks(count, &among)));
    }
    goals
}

fn assert_nothing_is_lost(setup: &Setup) -> usize {
    let explored = explore(setup);
    if let Some(story) = explored.broken {
        panic!("{:?}\n{}", setup.goals, story.join("\n"));
    }
    assert!(explored.settled > 0, "{:?} is never reached", setup.goals);
    explored.states
}

#[test]
fn i5_between_any_two_goals_of_three_members_with_a_third_in_between_nothing_acknowledged_is_lost() {
    let mut states = 0;
    for from in goals(2) {
        for by in goals(2) {
            for to in goals(2) {
                let goals = vec![from.clone(), by.clone(), to];
                states += assert_nothing_is_lost(&Setup { standbys: 2, goals, outages: 1, crashes: 1, failovers: 1, bug: None });
            }
        }
    }
    println!("{states} states");
}
