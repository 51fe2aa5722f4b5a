//! What each state does: facts in, actions and the next state out. No rule waits and none can fail.

pub(crate) mod archiving;
pub(crate) mod bootstrap;
pub(crate) mod demoting;
pub(crate) mod failsafe;
pub(crate) mod handover;
pub(crate) mod paused;
pub(crate) mod primary;
pub(crate) mod promoting;
pub(crate) mod publish;
pub(crate) mod receiving;
pub(crate) mod reinit;
pub(crate) mod rejoining;
pub(crate) mod requests;
pub(crate) mod restart;
pub(crate) mod slots;
pub(crate) mod standby;
pub(crate) mod starting;
pub(crate) mod synchrony;
