//! Commits that wait for standbys, by single members.

use super::checked::Checked;
use super::fixtures::*;
use super::reactions::worlds::standby;
use crate::machine::event::Event;
use crate::machine::state::State;

#[test]
fn what_a_leader_said_of_its_commits_is_over_with_its_leadership() {
    for state in [State::Following, State::Rejoining] {
        let mut world = standby();
        world.fail("durability_reduced", "too few standbys are there".to_owned());
        world.warn("closed", "clients are kept out".to_owned());
        let mut member = Checked::resume(world, state);
        member.handle(T0, Event::Tick);
        let left: Vec<&&str> = member.world().conditions.keys().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
