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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_before_the_boot_saturates_instead_of_wrapping() {
        assert_eq!(BootTime(5).since(BootTime(9)), Duration::ZERO);
        assert_eq!(BootTime(5).before(Duration::from_secs(1)), BootTime(0));
        assert_eq!(BootTime(u64::MAX) + Duration::from_secs(1), BootTime(u64::MAX));
    }
}
