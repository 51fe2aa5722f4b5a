//! True time, and each host's CLOCK_BOOTTIME as a function of it: with a rate of its own, and standing still under a hypervisor's pause.

use std::time::Duration;

use pgherd::clock::BootTime;

/// Nanoseconds since the run began, by nobody's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Real(pub u64);

impl Real {
    pub fn after(self, span: Duration) -> Real {
        Real(self.0 + u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 4))
    }

    /// As every host's wall clock has it.
    pub fn wall_s(self) -> u64 {
        const BEGUN_S: u64 = 1_790_000_000;
        BEGUN_S + self.0 / 1_000_000_000
    }

    pub fn since(self, earlier: Real) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

pub const fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

pub const fn us(value: u64) -> Duration {
    Duration::from_micros(value)
}

pub const fn secs(value: u64) -> Duration {
    Duration::from_secs(value)
}

const MILLION: i128 = 1_000_000;

/// One machine's clock.
#[derive(Debug, Clone)]
pub struct HostClock {
    at: Real,
    local: BootTime,
    /// How much faster than true time it runs, in millionths.
    ppm: i64,
    stands: bool,
}

impl HostClock {
    pub fn new(local: BootTime) -> Self {
        HostClock { at: Real(0), local, ppm: 0, stands: false }
    }

    pub fn local(&self, now: Real) -> BootTime {
        if self.stands {
            return self.local;
        }
        let passed = i128::from(now.0.saturating_sub(self.at.0));
        let local = i128::from(self.local.0) + passed * (MILLION + i128::from(self.ppm)) / MILLION;
        BootTime(u64::try_from(local).unwrap_or(u64::MAX))
    }

    /// When this clock will show `local`, not earlier; now, if it shows more already.
    pub fn real(&self, now: Real, local: BootTime) -> Real {
        let shown = self.local(now);
        if local <= shown {
            return now;
        }
        let left = i128::from(local.0 - shown.0);
        let real = left * MILLION / (MILLION + i128::from(self.ppm)) + 1;
        Real(now.0.saturating_add(u64::try_from(real).unwrap_or(u64::MAX / 4)))
    }

    fn rebase(&mut self, now: Real) {
        self.local = self.local(now);
        self.at = now;
    }

    pub fn set_rate(&mut self, now: Real, ppm: i64) {
        self.rebase(now);
        self.ppm = ppm;
    }

    pub fn stand_still(&mut self, now: Real) {
        self.rebase(now);
        self.stands = true;
    }

    /// True = it stood.
    pub fn go_on(&mut self, now: Real) -> bool {
        if self.stands {
            self.at = now;
        }
        std::mem::take(&mut self.stands)
    }

    /// The machine booted: its clock begins anew.
    pub fn boot(&mut self, now: Real, local: BootTime) {
        *self = HostClock { at: now, local, ppm: self.ppm, stands: false };
    }
}
