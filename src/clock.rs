//! The one clock that decisions may use: CLOCK_BOOTTIME, which goes on in suspend and which no administrator or NTP can set.
//!
//! The core gets a [`BootTime`] as an argument and never asks for one; only the edges call [`BootTime::now`]. `Instant` and tokio's
//! time are CLOCK_MONOTONIC, which stands still in suspend: timers may use them, decisions never.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Nanoseconds since this machine's boot. Comparable on one machine and within one boot only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootTime(pub u64);

impl BootTime {
    /// Asks the kernel. Edges only.
    ///
    /// # Panics
    /// If the kernel has no CLOCK_BOOTTIME (Linux before 2.6.39): without it nothing can be promised.
    #[allow(clippy::expect_used)]
    pub fn now() -> Self {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME, in Linux since 2.6.39");
        Self(time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs())
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    pub fn since(self, earlier: BootTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This time less `span`, not below zero.
    pub fn before(self, span: Duration) -> BootTime {
        BootTime(self.0.saturating_sub(nanos(span)))
    }
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

impl Add<Duration> for BootTime {
    type Output = BootTime;
    fn add(self, span: Duration) -> BootTime {
        BootTime(self.0.saturating_add(nanos(span)))
    }
}

impl Sub<BootTime> for BootTime {
    type Output = Duration;
    fn sub(self, earlier: BootTime) -> Duration {
        self.since(earlier)
    }
}

impl fmt::Debug for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot+{}.{:03}s", self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000)
    }
}

/// The wall clock in seconds since 1970. For schedules only (SAFETY row 23). Edges only.
pub fn wall_clock_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The wall clock as RFC 3339 in UTC with milliseconds. For people only: no decision may come from it (SAFETY row 23). Edges only.
pub fn wall_clock() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    rfc3339(now)
}

/// Time since 1970 as RFC 3339. The days are counted from 1 March, so that a leap day is the last of its year.
pub fn rfc3339(since_1970: Duration) -> String {
    const DAY_S: u64 = 86_400;
    const DAYS_BEFORE_1970: u64 = 719_468;
    const ERA_DAYS: u64 = 146_097;
    let (days, second) = (since_1970.as_secs() / DAY_S + DAYS_BEFORE_1970, since_1970.as_secs() % DAY_S);
    let (era, day_of_era) = (days / ERA_DAYS, days % ERA_DAYS);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since_1970.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_clock_is_printed_as_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_span_before_the_boot_saturates_instead_of_wrapping() {
        assert_eq!(BootTime(5).since(BootTime(9)), Duration::ZERO);
        assert_eq!(BootTime(5).before(Duration::from_secs(1)), BootTime(0));
        assert_eq!(BootTime(u64::MAX) + Duration::from_secs(1), BootTime(u64::MAX));
    }
}
