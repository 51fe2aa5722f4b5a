//! What the machine asks: pure rules over facts.

pub mod deadlines;
pub mod election;
pub mod failsafe;
pub mod hba;
pub mod maintenance;
pub mod parameters;
pub mod receiving;
pub mod reinit;
pub mod rejoin;
pub mod renewal;
pub mod restart;
pub mod routing;
pub mod slots;
pub mod switchover;
pub mod synchrony;
pub mod timelines;
pub mod upstream;
