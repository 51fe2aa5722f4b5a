//! How this member's standby receives: what is remembered between two looks. Decides nothing: [`super::rules::receiving`] does.

use crate::clock::BootTime;
use crate::facts::postgres::HalfSegment;
use crate::policy::{receiving, upstream};

use super::copying::Progress;
use super::event::Failure;

/// What is known of it.
#[derive(Debug, Clone, Default)]
pub struct Receiving {
    /// Since when a standby that should stream does not.
    pub not_streaming_since: Option<BootTime>,
    /// Since when what it has is past the point where the leader's timeline left its own.
    pub past_the_switch_since: Option<BootTime>,
    /// Whether it gets on.
    pub progress: receiving::Progress,
    /// The member that it is to follow instead of the leader.
    pub upstream: upstream::Remembered,
    /// Whether the leader's server took a connection from here, and when that was known.
    pub reached: Option<(BootTime, Result<(), Failure>)>,
    /// How often in a row a standby ended by itself, with an error, before it had got anywhere.
    pub ends: u32,
    /// Segments that were received in part, as found before the last start, and not told yet.
    pub half_segments: Vec<HalfSegment>,
    /// The copy, or the rewind, that is under way.
    pub copying: Option<Progress>,
}
