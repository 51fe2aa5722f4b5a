//! The edges of the machine as a table: every way from one state to another, with the reason a person reads in the log.
//!
//! An edge without a row is a defect: tests walk the machine and look every transition up here. Numbers have gaps, and an event
//! records the row, so that an operator can quote it.

use super::state::State;

/// One way from a state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// To quote.
    pub number: u16,
    /// Name of the state left.
    pub from: &'static str,
    /// Name of the state entered.
    pub to: &'static str,
    /// Why.
    pub reason: &'static str,
}

const fn edge(number: u16, from: &'static str, to: &'static str, reason: &'static str) -> Edge {
    Edge { number, from, to, reason }
}

/// All edges.
pub const EDGES: &[Edge] = &[
    edge(100, "starting", "undeclared", "this member is not in spec.members"),
    edge(110, "starting", "awaiting_leader", "the data directory is empty"),
    edge(120, "starting", "following", "there is data, and a member is a standby first"),
    edge(130, "starting", "primary", "the guard kept the lock and PostgreSQL for this daemon"),
    edge(150, "starting", "demoting", "PostgreSQL may write and the lock is not proved ours"),
    edge(160, "starting", "stopping", "the daemon is to stop"),
    edge(170, "starting", "paused", "maintenance mode is on"),
    edge(200, "undeclared", "starting", "this member was declared"),
    edge(210, "undeclared", "stopping", "the daemon is to stop"),
    edge(220, "undeclared", "demoting", "PostgreSQL may write and the lock is not proved ours"),
    edge(300, "awaiting_leader", "initializing", "every declared member is empty and this one is first, or an operator said so"),
    edge(310, "awaiting_leader", "cloning", "there is a leader to copy"),
    edge(320, "awaiting_leader", "following", "the data directory holds data"),
    edge(330, "awaiting_leader", "undeclared", "this member was removed from spec.members"),
    edge(340, "awaiting_leader", "demoting", "PostgreSQL may write and the lock is not proved ours"),
    edge(350, "awaiting_leader", "stopping", "the daemon is to stop"),
    edge(360, "awaiting_leader", "paused", "maintenance mode is on"),
    edge(400, "initializing", "promoting", "the new cluster's first lock was won"),
    edge(410, "initializing", "awaiting_leader", "the claim to initialize is not ours, or is given back"),
    edge(420, "initializing", "following", "somebody else leads, the lock could not be won, or there is data"),
    edge(430, "initializing", "demoting", "PostgreSQL may write and the lock is not proved ours"),
    edge(440, "initializing", "stopping", "the daemon is to stop"),
    edge(500, "cloning", "following", "the copy is in place, or there is data"),
    edge(510, "cloning", "awaiting_leader", "the leader went away during the copy"),
    edge(520, "cloning", "demoting", "PostgreSQL may write and the lock is not proved ours"),
    edge(530, "cloning", "stopping", "the daemon is to stop"),
    edge(600, "following", "candidate", "the lock is absent"),
    edge(610, "following", "rejoining", "the way back behind the leader has to be judged, or a new copy was ordered"),
    edge(620, "following", "awaiting_leader", "the data directory is empty"),
    edge(630, "following", "promoting", "the lock is ours"),
    edge(640, "following", "undeclared", "this member was removed from spec.members"),
    edge(650, "following", "demoting", "PostgreSQL may write and must not"),
    edge(660, "following", "stopping", "the daemon is to stop"),
    edge(670, "following", "paused", "maintenance mode is on"),
    edge(700, "candidate", "promoting", "this member won the lock"),
    edge(710, "candidate", "following", "another member leads, or this one may not run now"),
    edge(720, "candidate", "demoting", "PostgreSQL may write and must not"),
    edge(730, "candidate", "stopping", "the daemon is to stop"),
    edge(740, "candidate", "paused", "maintenance mode is on"),
    edge(800, "rejoining", "following", "the data directory can follow the leader, or nobody leads"),
    edge(810, "rejoining", "awaiting_leader", "the data directory is empty"),
    edge(820, "rejoining", "demoting", "PostgreSQL may write and must not"),
    edge(830, "rejoining", "stopping", "the daemon is to stop"),
    edge(840, "rejoining", "paused", "maintenance mode is on"),
    edge(900, "promoting", "primary", "PostgreSQL takes writes under the lock"),
    edge(910, "promoting", "demoting", "the lock or the server is gone, or it took too long"),
    edge(920, "promoting", "following", "PostgreSQL has ended; the lock is gone, cannot be proved now, or allows another timeline"),
    edge(930, "promoting", "stopping", "the lock is gone, PostgreSQL has ended, and the daemon is to stop"),
    edge(1000, "primary", "promoting", "PostgreSQL ended by itself and is started again in place, or it is not promoted yet"),
    edge(1010, "primary", "handing_over", "a switchover was asked for, or the daemon is to stop"),
    edge(1015, "primary", "restarting", "an operator asked for a restart of PostgreSQL"),
    edge(1020, "primary", "demoting", "the lock or the server is gone"),
    edge(1030, "primary", "following", "the lock is gone and PostgreSQL has ended"),
    edge(1040, "primary", "stopping", "the lock is gone, PostgreSQL has ended, and the daemon is to stop"),
    edge(1050, "primary", "paused", "maintenance mode is on"),
    edge(1100, "handing_over", "following", "the lock was released in good order"),
    edge(1110, "handing_over", "stopping", "the lock was released in good order, and the daemon is to stop"),
    edge(1120, "handing_over", "promoting", "the successor did not get the shutdown checkpoint in time: back to work"),
    edge(1125, "handing_over", "primary", "the hand-over was given up before PostgreSQL was stopped: back to work"),
    edge(1130, "handing_over", "demoting", "the lock is gone"),
    edge(1150, "restarting", "promoting", "PostgreSQL has ended, and is started again under the same lock"),
    edge(1155, "restarting", "primary", "the restart was given up before PostgreSQL was stopped: back to work"),
    edge(1160, "restarting", "handing_over", "the daemon is to stop, and PostgreSQL is being stopped already"),
    edge(1165, "restarting", "demoting", "the lock or the guard is gone"),
    edge(1170, "restarting", "following", "the lock is gone, or cannot be proved now, and PostgreSQL has ended"),
    edge(1175, "restarting", "stopping", "the lock is gone, PostgreSQL has ended, and the daemon is to stop"),
    edge(1200, "demoting", "following", "PostgreSQL has ended, proved"),
    edge(1210, "demoting", "promoting", "PostgreSQL has ended, and the lock is still ours and proved"),
    edge(1220, "demoting", "stopping", "PostgreSQL has ended, and the daemon is to stop"),
    edge(1300, "paused", "starting", "maintenance mode is over, and all is judged afresh"),
    edge(1310, "paused", "primary", "maintenance mode is over, and the lock was held all the while or taken anew"),
    edge(1320, "paused", "demoting", "PostgreSQL may write, the lock is not proved ours, and the guard suspends nothing"),
];

/// The row for a transition.
pub fn find(from: &str, to: &str) -> Option<&'static Edge> {
    EDGES.iter().find(|edge| edge.from == from && edge.to == to)
}

/// Why a transition happens. One that has no row is said loudly: a person should report it.
pub fn reason(from: &State, to: &State) -> &'static str {
    find(from.name(), to.name()).map_or("NO ROW IN THE TABLE OF EDGES: please report this", |edge| edge.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ways_are_unique_and_every_name_is_a_state() {
        for (index, edge) in EDGES.iter().enumerate() {
            assert!(State::NAMES.contains(&edge.from) && State::NAMES.contains(&edge.to), "{edge:?}");
            for other in &EDGES[..index] {
                assert!(other.number < edge.number, "{edge:?} is not in order");
                assert!((other.from, other.to) != (edge.from, edge.to), "{edge:?} stands twice");
            }
        }
    }

    #[test]
    fn every_state_but_the_last_has_a_way_out_and_every_state_but_the_first_a_way_in() {
        for name in State::NAMES {
            assert!(name == "stopping" || EDGES.iter().any(|edge| edge.from == name), "{name} has no way out");
            assert!(name == "starting" || EDGES.iter().any(|edge| edge.to == name), "{name} has no way in");
        }
    }
}
