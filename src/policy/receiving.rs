//! Decides what is done about a standby that receives nothing although its leader writes (SAFETY row 10): first its walreceiver is started
//! again, then PostgreSQL, a few times and ever more seldom. Never touches a server.
//!
//! What surprises: a standby that goes through WAL that it has, or gets from the archive, has no walreceiver and is well; only one that has
//! once gone through all of it and asks for more can be stuck. What moves is never stuck, whoever it gets it from.

use std::time::Duration;

use crate::clock::BootTime;
use crate::types::Lsn;

/// A standby that asks for WAL and does not stream gets so long. PostgreSQL tries to connect each wal_retrieve_retry_interval meanwhile.
pub const CONNECTS_WITHIN_S: u64 = 10;
/// wal_receiver_timeout as pgherd sets it unless the spec says otherwise: one that streams and gets nothing is given so long.
const RECEIVES_WITHIN_S: u64 = 15;
/// No less, whatever wal_receiver_timeout says.
const RECEIVES_WITHIN_MIN_S: u64 = 5;
/// And no more, also where wal_receiver_timeout is off.
const RECEIVES_WITHIN_MAX_S: u64 = 300;
/// So often PostgreSQL is started again for one standstill; from then on only the walreceiver is, since readers lose their connections for
/// nothing.
pub const SERVER_STARTS_MAX: u32 = 3;
/// The wait doubles so often.
const DOUBLINGS_MAX: u32 = 5;

/// How a standby gets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// How far it was when it was looked at last.
    reached: Lsn,
    /// Since when it stands still although there is more to get.
    since: Option<BootTime>,
    /// It does not even stream, or its leader has written on since then. Some bytes that a leader has written and not flushed, and then
    /// nothing for hours, are no standstill.
    in_earnest: bool,
    /// How far the leader had written then.
    leader: Option<Lsn>,
    /// What was done about it since it moved last.
    tries: u32,
    /// When the last of that was done.
    tried_at: Option<BootTime>,
}

/// What is seen of it.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// The end of its WAL, received or replayed.
    pub reached: Lsn,
    /// How far the leader is known to have written.
    pub leader: Option<Lsn>,
    /// Its walreceiver streams.
    pub streams: bool,
    /// It has gone through all the WAL that it found, and nobody has paused it: it asks for more.
    pub asks: bool,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Wait,
    /// Its walreceiver is to be started again.
    RestartReceiver,
    /// PostgreSQL is.
    RestartServer,
}

impl Progress {
    /// Takes in what was seen.
    pub fn seen(&mut self, now: BootTime, seen: Seen) {
        let moved = seen.reached > self.reached;
        let behind = seen.leader.is_some_and(|leader| leader > seen.reached);
        let stands = seen.asks && (!seen.streams || behind);
        if seen.streams && (moved || !behind) {
            (self.tries, self.tried_at) = (0, None);
        }
        (self.since, self.leader) = match (stands, moved, self.since) {
            (false, _, _) => (None, None),
            (true, false, Some(since)) => (Some(since), self.leader),
            (true, _, _) => (Some(now), seen.leader),
        };
        self.in_earnest = !seen.streams || seen.leader > self.leader;
        self.reached = seen.reached;
    }

    /// Whether it has stood still for as long as it is given, from `at_earliest` on.
    pub fn stands_still(&self, now: BootTime, at_earliest: BootTime, given: Duration) -> bool {
        self.in_earnest && self.since.is_some_and(|since| now.since(since.max(at_earliest)) >= given)
    }

    /// What is due. `at_earliest` = since when there is a leader that writes, and the server was told whom to follow.
    pub fn step(&self, now: BootTime, at_earliest: BootTime, given: Duration) -> Step {
        let since = self.tried_at.map_or(at_earliest, |tried| tried.max(at_earliest));
        let given = given * (1 << self.tries.saturating_sub(1).min(DOUBLINGS_MAX));
        match self.tries {
            _ if !self.stands_still(now, since, given) => Step::Wait,
            1..=SERVER_STARTS_MAX => Step::RestartServer,
            _ => Step::RestartReceiver,
        }
    }

    /// The step was taken.
    pub fn tried(&mut self, now: BootTime) {
        self.tries = self.tries.saturating_add(1);
        self.tried_at = Some(now);
    }

    /// How often something was done about it since it moved last.
    pub fn tries(&self) -> u32 {
        self.tries
    }
}

/// How long a standby is given: one that does not stream, or one that streams under this wal_receiver_timeout and gets nothing.
pub fn given(streams: bool, wal_receiver_timeout: Option<&str>) -> Duration {
    if !streams {
        return Duration::from_secs(CONNECTS_WITHIN_S);
    }
    let typed = wal_receiver_timeout.map_or(Some(Duration::from_secs(RECEIVES_WITHIN_S)), time);
    let off_or_nonsense = Duration::from_secs(RECEIVES_WITHIN_MAX_S);
    typed
        .filter(|span| !span.is_zero())
        .unwrap_or(off_or_nonsense)
        .clamp(Duration::from_secs(RECEIVES_WITHIN_MIN_S), Duration::from_secs(RECEIVES_WITHIN_MAX_S))
}

/// A span as PostgreSQL reads it: a whole number, in milliseconds unless it says otherwise.
fn time(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit_us: u64 = match text[digits..].trim() {
        "us" => 1,
        "" | "ms" => 1_000,
        "s" => 1_000_000,
        "min" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    number.checked_mul(unit_us).map(Duration::from_micros)
}

#[cfg(test)]
mod tests;
