//! Decides until when a proved lock may be relied on, and when PostgreSQL must be announced, stopped and killed before that.
//!
//! Never asks for the time: the send time of a keepalive comes in, deadlines come out. Everything counts from the moment before the
//! request was handed to the client, never from the answer: etcd counts the lease from when it handles the request, which is later.
//!
//! ```text
//! send        A            fast stop     immediate    kill      F          E - M        E
//!  |--2R + a--|---S/10-------|-------------|------------|--------|-----W-----|-----M-----|
//!             announce                                    proved   watchdog    no reset   etcd may give
//!                                                         empty    window      later      the lock away
//! ```
//!
//! The rule that would surprise: with an armed watchdog everything ends W earlier, because a feed that was delayed between its check
//! and its system call may still postpone the reset by one W (SAFETY 5, "why 2W").

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::facts::guard::Rung;

/// Shortest lease, in seconds: below it etcd's own least ttl (1.5 x its election timeout) is not met.
pub const TTL_MIN_SECONDS: u64 = 3;
/// Longest lease, in seconds.
pub const TTL_MAX_SECONDS: u64 = 300;
/// How much faster than etcd's clock ours may be seen to run, in thousandths of the ttl (0.5 %, SAFETY row 24).
pub const CLOCK_DRIFT_PER_MILLE: u32 = 5;
/// Shortest ladder, from A to F, in milliseconds: a fast stop, an immediate stop and a kill have to fit in.
pub const LADDER_MIN_MS: u64 = 1_500;
/// Shortest watchdog timeout that is used, in seconds.
pub const WATCHDOG_MIN_SECONDS: u64 = 2;
/// The least ttl that leaves room for a watchdog, in seconds.
pub const WATCHDOG_TTL_MIN_SECONDS: u64 = 8;

/// Rungs of the ladder as percent of its length S. Their order is the safety argument (I2).
const RUNG_PERCENT: [(Rung, u32); 4] = [(Rung::Announce, 0), (Rung::FastStop, 10), (Rung::ImmediateStop, 50), (Rung::KillAll, 75)];
const _: () = assert!(RUNG_PERCENT[1].1 < RUNG_PERCENT[2].1 && RUNG_PERCENT[2].1 < RUNG_PERCENT[3].1 && RUNG_PERCENT[3].1 < 100);

/// What the deadlines of one lease are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTimes {
    /// T: the granted ttl of the lease itself, whole seconds. Not the spec's: a changed spec needs a new lease first.
    pub ttl: Duration,
    /// M: no reset and no PostgreSQL later than E less this.
    pub safety_margin: Duration,
    /// W of a watchdog that is armed, as read back from the device; None when none is.
    pub watchdog: Option<Duration>,
}

impl LeaseTimes {
    /// Times with the default margin (T/20) and no watchdog.
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, safety_margin: default_safety_margin(ttl), watchdog: None }
    }

    /// R = T/6: from the send time of one renewal to that of the next.
    pub fn renewal_interval(&self) -> Duration {
        self.ttl / 6
    }

    /// a = T/10: bounds a keepalive and its proof together.
    pub fn renewal_budget(&self) -> Duration {
        self.ttl / 10
    }

    /// E as a span from the send time: T(1 - 0.5 %).
    pub fn validity(&self) -> Duration {
        self.ttl / 1000 * (1000 - CLOCK_DRIFT_PER_MILLE)
    }

    /// A as a span from the send time: two renewals lost, and the answer to the third overdue.
    fn announce_after(&self) -> Duration {
        2 * self.renewal_interval() + self.renewal_budget()
    }

    /// F as a span from the send time; None when margin and watchdog leave nothing.
    fn fenced_after(&self) -> Option<Duration> {
        self.validity().checked_sub(self.safety_margin)?.checked_sub(self.watchdog.unwrap_or_default())
    }

    /// The deadlines that a keepalive sent at `sent` carries once it is proved.
    ///
    /// With times that [`LeaseTimes::validate`] refuses the rungs collapse onto A or earlier: too early, never too late.
    pub fn deadlines(&self, sent: BootTime) -> Deadlines {
        let fenced = self.fenced_after().unwrap_or_default();
        let announce = self.announce_after().min(fenced);
        let ladder = fenced - announce;
        let rung = |percent: u32| sent + announce + ladder * percent / 100;
        Deadlines {
            announce_at: rung(RUNG_PERCENT[0].1),
            fast_stop_at: rung(RUNG_PERCENT[1].1),
            immediate_at: rung(RUNG_PERCENT[2].1),
            kill_at: rung(RUNG_PERCENT[3].1),
            fenced_by: sent + fenced,
            valid_until: sent + self.validity(),
        }
    }

    /// Whether these times keep the promises.
    ///
    /// # Errors
    /// One sentence for each inequality that does not hold, with its numbers.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut broken = Vec::new();
        let whole = self.ttl.subsec_nanos() == 0;
        if !whole || !(TTL_MIN_SECONDS..=TTL_MAX_SECONDS).contains(&self.ttl.as_secs()) {
            broken.push(format!(
                "ttl must be whole seconds from {TTL_MIN_SECONDS} s to {TTL_MAX_SECONDS} s, but it is {}",
                seconds(self.ttl)
            ));
        }
        let (announce, validity, margin) = (self.announce_after(), self.validity(), self.safety_margin);
        let ladder_end = announce + Duration::from_millis(LADDER_MIN_MS);
        let watchdog = self.watchdog.unwrap_or_default();
        if validity < ladder_end + margin + watchdog {
            broken.push(format!(
                "the ladder needs {}: 0.995 ttl - safety_margin - watchdog timeout - (2/6 + 1/10) ttl >= {}, but {} - {} - {} - {} = {}",
                seconds(Duration::from_millis(LADDER_MIN_MS)),
                seconds(Duration::from_millis(LADDER_MIN_MS)),
                seconds(validity),
                seconds(margin),
                seconds(watchdog),
                seconds(announce),
                signed_seconds(validity, announce + margin + watchdog),
            ));
        }
        if let Some(timeout) = self.watchdog
            && validity < announce + margin + 2 * timeout
        {
            broken.push(format!(
                "a watchdog needs 0.995 ttl - safety_margin - 2 x its timeout >= (2/6 + 1/10) ttl, but {} - {} - 2 x {} < {}",
                seconds(validity),
                seconds(margin),
                seconds(timeout),
                seconds(announce),
            ));
        }
        if broken.is_empty() { Ok(()) } else { Err(broken) }
    }
}

/// M when the spec does not say: T/20.
pub fn default_safety_margin(ttl: Duration) -> Duration {
    ttl / 20
}

/// W: the largest whole second <= T/4, at least 2, with E - M - 2W >= A. None: no watchdog can be used with this ttl and margin.
pub fn usable_watchdog_timeout(ttl: Duration, safety_margin: Duration) -> Option<Duration> {
    let longest = ttl.as_secs() / 4;
    (WATCHDOG_MIN_SECONDS..=longest).rev().map(Duration::from_secs).find(|timeout| {
        let times = LeaseTimes { ttl, safety_margin, watchdog: Some(*timeout) };
        times.validate().is_ok()
    })
}

/// When what has to have happened, for one proved keepalive. Ordered: each field is not later than the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Deadlines {
    /// A: leader paths answer 503; a proof before the fast stop takes it back.
    pub announce_at: BootTime,
    /// A + S/10: SIGINT to the postmaster. From here on there is no way back but the proof of death.
    pub fast_stop_at: BootTime,
    /// A + S/2: SIGQUIT to the postmaster.
    pub immediate_at: BootTime,
    /// A + 3S/4: SIGKILL to every process.
    pub kill_at: BootTime,
    /// F: no process of PostgreSQL is left.
    pub fenced_by: BootTime,
    /// E: until here the lock is proved to be ours, and not a nanosecond longer.
    pub valid_until: BootTime,
}

impl Deadlines {
    /// When `rung` is due.
    pub fn rung_at(&self, rung: Rung) -> BootTime {
        match rung {
            Rung::Announce => self.announce_at,
            Rung::FastStop => self.fast_stop_at,
            Rung::ImmediateStop => self.immediate_at,
            Rung::KillAll => self.kill_at,
        }
    }

    /// Both promises at once: each deadline is the earlier one. For the moment in which the lock may hang on either of two leases.
    pub fn earlier(&self, other: &Deadlines) -> Deadlines {
        Deadlines {
            announce_at: self.announce_at.min(other.announce_at),
            fast_stop_at: self.fast_stop_at.min(other.fast_stop_at),
            immediate_at: self.immediate_at.min(other.immediate_at),
            kill_at: self.kill_at.min(other.kill_at),
            fenced_by: self.fenced_by.min(other.fenced_by),
            valid_until: self.valid_until.min(other.valid_until),
        }
    }
}

/// Why the watchdog must not be fed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedRefusal {
    /// The previous feed is a whole timeout ago: the device should have fired. On some devices a late feed re-arms it (SAFETY 8).
    Late,
    /// A feed now could postpone the reset past E - M.
    PastTheLock,
}

/// What the feed rule asks about the watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchdogState {
    /// W as read back from the device.
    pub timeout: Duration,
    /// When it was fed (or armed) last: read BEFORE that system call, so the device counts from then or later.
    pub fed_at: BootTime,
}

/// Whether the watchdog may be fed at `now`: never late; and previous feed + 2W <= E - M, or it is proved that no process of PostgreSQL
/// can write (`not_writable`).
///
/// # Errors
/// Why not. After [`FeedRefusal::Late`] the only right act is to kill PostgreSQL.
pub fn may_feed(
    now: BootTime,
    watchdog: &WatchdogState,
    lock: Option<(&Deadlines, &LeaseTimes)>,
    not_writable: bool,
) -> Result<(), FeedRefusal> {
    if now >= watchdog.fed_at + watchdog.timeout {
        return Err(FeedRefusal::Late);
    }
    let inside_the_lock =
        lock.is_some_and(|(deadlines, times)| watchdog.fed_at + 2 * watchdog.timeout <= deadlines.valid_until.before(times.safety_margin));
    if not_writable || inside_the_lock { Ok(()) } else { Err(FeedRefusal::PastTheLock) }
}

/// Numbers in messages: at most milliseconds, without trailing zeros.
fn seconds(span: Duration) -> String {
    let text = format!("{:.3}", span.as_secs_f64());
    format!("{} s", text.trim_end_matches('0').trim_end_matches('.'))
}

/// `from - less`, which may be negative.
fn signed_seconds(from: Duration, less: Duration) -> String {
    if from >= less { seconds(from - less) } else { format!("-{}", seconds(less - from)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENT: BootTime = BootTime(1_000_000_000_000);

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    fn times(ttl_s: u64, margin_ms: Option<u64>, watchdog: bool) -> LeaseTimes {
        let mut times = LeaseTimes::new(Duration::from_secs(ttl_s));
        if let Some(margin) = margin_ms {
            times.safety_margin = ms(margin);
        }
        times.watchdog = watchdog.then(|| usable_watchdog_timeout(times.ttl, times.safety_margin).unwrap());
        times
    }

    /// A rounded as DESIGN prints it: T/6 has no end in decimals.
    fn near(at: BootTime, span: Duration) -> bool {
        at.since(SENT + span) < ms(5) && (SENT + span).since(at) < ms(5)
    }

    #[test]
    fn the_deadlines_are_those_that_the_design_gives() {
        for (ttl, margin, watchdog, w, a, f) in [
            (30, Some(5_000), true, Some(5), 13_000, 19_850),
            (10, None, true, Some(2), 4_333, 7_450),
            (10, None, false, Some(2), 4_333, 9_450),
            (3, None, false, None, 1_300, 2_835),
        ] {
            let times = times(ttl, margin, watchdog);
            let deadlines = times.deadlines(SENT);
            assert_eq!(usable_watchdog_timeout(times.ttl, times.safety_margin), w.map(Duration::from_secs), "W of {times:?}");
            assert!(near(deadlines.announce_at, ms(a)), "A of {times:?}: {deadlines:?}");
            assert!(near(deadlines.fenced_by, ms(f)), "F of {times:?}: {deadlines:?}");
            assert_eq!(deadlines.valid_until, SENT + ms(ttl * 995));
            assert_eq!(times.validate(), Ok(()));
        }
    }

    #[test]
    fn the_rungs_are_in_order_for_every_ttl_that_is_accepted() {
        for ttl in TTL_MIN_SECONDS..=TTL_MAX_SECONDS {
            for watchdog in [false, true] {
                let mut times = times(ttl, None, false);
                if watchdog {
                    times.watchdog = usable_watchdog_timeout(times.ttl, times.safety_margin);
                    assert_eq!(times.watchdog.is_some(), ttl >= WATCHDOG_TTL_MIN_SECONDS, "ttl {ttl}");
                }
                assert_eq!(times.validate(), Ok(()));
                let d = times.deadlines(SENT);
                let order = [SENT, d.announce_at, d.fast_stop_at, d.immediate_at, d.kill_at, d.fenced_by, d.valid_until];
                assert!(order.windows(2).all(|pair| pair[0] < pair[1]), "ttl {ttl}: {d:?}");
                assert!(d.fenced_by.since(d.announce_at) >= ms(LADDER_MIN_MS));
            }
        }
    }

    #[test]
    fn a_refusal_prints_the_inequality_with_its_numbers() {
        let mut times = times(10, Some(5_000), false);
        let said = times.validate().unwrap_err().join("\n");
        assert!(said.contains("9.95 s - 5 s - 0 s - 4.333 s = 0.617 s"), "{said}");
        times.safety_margin = ms(500);
        times.watchdog = Some(Duration::from_secs(3));
        let said = times.validate().unwrap_err().join("\n");
        assert!(said.contains("9.95 s - 0.5 s - 2 x 3 s < 4.333 s"), "{said}");
        assert!(LeaseTimes::new(ms(3_500)).validate().unwrap_err()[0].contains("whole seconds"));
        assert!(LeaseTimes::new(ms(2_000)).validate().is_err());
    }

    #[test]
    fn incoherent_times_fence_too_early_and_never_too_late() {
        let times = LeaseTimes { ttl: ms(3_000), safety_margin: ms(60_000), watchdog: Some(ms(60_000)) };
        assert!(times.validate().is_err());
        let deadlines = times.deadlines(SENT);
        assert_eq!((deadlines.announce_at, deadlines.kill_at, deadlines.fenced_by), (SENT, SENT, SENT));
    }

    #[test]
    fn a_feed_is_refused_after_the_deadline() {
        let times = times(10, None, true);
        let deadlines = times.deadlines(SENT);
        let w = times.watchdog.unwrap();
        let last_allowed = deadlines.valid_until.before(times.safety_margin + 2 * w);
        let fed = |at: BootTime| WatchdogState { timeout: w, fed_at: at };
        let lock = Some((&deadlines, &times));
        assert_eq!(may_feed(last_allowed, &fed(last_allowed), lock, false), Ok(()));
        let after = BootTime(last_allowed.0 + 1);
        assert_eq!(may_feed(after, &fed(after), lock, false), Err(FeedRefusal::PastTheLock));
        assert_eq!(may_feed(after, &fed(after), None, false), Err(FeedRefusal::PastTheLock));
        assert_eq!(may_feed(after, &fed(after), None, true), Ok(()));
    }

    #[test]
    fn a_late_feeder_must_not_feed_whatever_else_is_true() {
        let times = times(10, None, true);
        let deadlines = times.deadlines(SENT);
        let dog = WatchdogState { timeout: times.watchdog.unwrap(), fed_at: SENT };
        assert_eq!(may_feed(SENT + dog.timeout, &dog, Some((&deadlines, &times)), true), Err(FeedRefusal::Late));
    }
}
