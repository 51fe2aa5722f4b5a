//! Every world that can be reached, the nearest first.

use crate::bits::{Code, Table, any, count_of, is_acks, members_of};
use crate::bugs::Bug;
use crate::event::{KINDS, Kind};
use crate::rules::Rules;
use crate::world::{Setup, World};

/// More states than any exploration has: one that does not end is an error of the test.
const STATES_MAX: usize = 16_000_000;

/// How the story of a lost commit ends.
pub const LOST: &str = "the acknowledged commit is lost";

pub struct Explored {
    pub states: usize,
    /// What never happened of what may.
    pub unseen: Vec<Kind>,
    /// What happened, step by step, until a commit was lost, or the daemon could never do what the goal wants.
    pub broken: Option<Vec<String>>,
}

/// Whether the goals are the same however the standbys are numbered; if not, no two numberings are one.
fn has_symmetry(setup: &Setup) -> bool {
    let alike = |goal: &Code, members: u8| {
        let is_like = members & !setup.everybody() == 0 && members.count_ones() == members_of(*goal).count_ones();
        !is_like || setup.goals.contains(&any(count_of(*goal), members))
    };
    setup.goals.iter().filter(|goal| is_acks(**goal)).all(|goal| (0..32).step_by(2).all(|members| alike(goal, members)))
}

pub fn explore(setup: &Setup) -> Explored {
    assert!(!setup.symmetry || has_symmetry(setup), "{setup:?} has no symmetry");
    let mut rules = Rules::default();
    let (mut known, mut came_from) = (Table::default(), Vec::new());
    let (mut well, mut alone) = (Table::default(), Table::default());
    for world in World::first(setup, &mut rules) {
        came_from.push(u32::try_from(known.insert(world.pack()).0).unwrap());
    }
    let (mut index, mut next, mut seen) = (0, Vec::new(), 0u32);
    let mut broken = None;
    while index < known.len() && broken.is_none() {
        let world = World::unpack(known.key(index));
        if world.lost(setup, &mut rules) {
            broken = Some(LOST.to_owned());
        } else if setup.bug.is_none_or(Bug::is_of_progress) {
            broken = world.come_to_rest(setup, &mut rules, true, &mut well).err();
            if setup.alone && broken.is_none() {
                broken = world.come_to_rest(setup, &mut rules, false, &mut alone).err();
            }
        }
        next.clear();
        world.next(setup, &mut rules, &mut next);
        for (event, world) in &next {
            seen |= 1 << event.0 as u32;
            let world = if setup.symmetry { world.in_order(setup, &mut rules) } else { *world };
            if known.insert(world.pack()).1 {
                came_from.push(u32::try_from(index).unwrap());
            }
        }
        assert!(known.len() < STATES_MAX, "the world of {setup:?} has no end");
        index += 1;
    }
    let broken = broken.map(|why| story(setup, &mut rules, &known, &came_from, index - 1, &why));
    let unseen = KINDS.into_iter().filter(|kind| seen >> *kind as u32 & 1 == 0).collect();
    Explored { states: known.len(), unseen, broken }
}

/// What led to a world is found again from each world before: of millions only these few have to be told.
fn story(setup: &Setup, rules: &mut Rules, known: &Table, came_from: &[u32], mut index: usize, why: &str) -> Vec<String> {
    let mut story = vec![format!("{why}: {}", World::unpack(known.key(index)))];
    while came_from[index] as usize != index {
        let before = came_from[index] as usize;
        let mut next = Vec::new();
        World::unpack(known.key(before)).next(setup, rules, &mut next);
        for (event, world) in next {
            if world.pack() == known.key(index) {
                story.push(event.to_string());
                break;
            }
            if setup.symmetry && world.in_order(setup, rules).pack() == known.key(index) {
                story.push(format!("{event}; from now on the standbys have other numbers"));
                break;
            }
        }
        index = before;
    }
    story.push(World::unpack(known.key(index)).to_string());
    story.reverse();
    story
}
