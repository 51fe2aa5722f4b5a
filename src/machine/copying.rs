//! How far the copy or the rewind that is under way has got, and how fast. Decides nothing.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::copying::{Bytes, CopyKind, Copying};
use crate::types::MemberName;

use super::action::Operation;

/// The rate is that of at least so long, once it has lasted that long.
const RATE_OVER_S: u64 = 10;
/// And nothing is said of it before.
const RATE_FROM_S: u64 = 1;

/// A copy or a rewind that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    what: CopyKind,
    from: MemberName,
    /// What the rate counts from, and what it counts from next.
    samples: Option<[(BootTime, u64); 2]>,
    last: Option<(BootTime, Bytes)>,
}

impl Progress {
    /// Of an operation that copies something.
    pub fn of(operation: &Operation) -> Option<Progress> {
        let (what, from) = match operation {
            Operation::Clone { from, .. } => (CopyKind::Copy, from),
            Operation::Rewind { from, .. } => (CopyKind::Rewind, from),
            _ => return None,
        };
        Some(Progress { what, from: from.member.clone(), samples: None, last: None })
    }

    /// It has got so far.
    pub fn got_on(&mut self, now: BootTime, bytes: Bytes) {
        let sample = (now, bytes.done);
        let [from, next] = self.samples.get_or_insert([sample, sample]);
        if now.since(next.0) >= Duration::from_secs(RATE_OVER_S) {
            (*from, *next) = (*next, sample);
        }
        self.last = Some((now, bytes));
    }

    /// For the member key.
    pub fn copying(&self) -> Copying {
        let bytes = self.last.map(|(_, bytes)| bytes);
        let bytes_per_s = self.samples.zip(self.last).and_then(|([(from, before), _], (now, bytes))| {
            let took = now.since(from);
            let grew = u128::from(bytes.done.saturating_sub(before));
            (took >= Duration::from_secs(RATE_FROM_S)).then(|| u64::try_from(grew * 1_000 / took.as_millis()).unwrap_or(u64::MAX))
        });
        let left = bytes.map(|bytes| bytes.total.saturating_sub(bytes.done));
        Copying {
            what: self.what,
            from: self.from.clone(),
            done_bytes: bytes.map(|bytes| bytes.done),
            total_bytes: bytes.map(|bytes| bytes.total),
            bytes_per_s,
            seconds_left: left.zip(bytes_per_s.filter(|rate| *rate > 0)).map(|(left, rate)| left.div_ceil(rate)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::fixtures::{T0, ms};

    #[test]
    fn the_rate_is_that_of_late_and_not_of_the_whole() {
        let mut progress = Progress { what: CopyKind::Copy, from: "n1".parse().unwrap(), samples: None, last: None };
        assert_eq!((progress.copying().done_bytes, progress.copying().bytes_per_s), (None, None));
        for second in 0..=60_u64 {
            // 10 a second at first, then 100.
            let done = if second <= 30 { second * 10 } else { 300 + (second - 30) * 100 };
            progress.got_on(T0 + ms(second * 1_000), Bytes { done, total: 4_300 });
            let rate = progress.copying().bytes_per_s;
            match second {
                0 => assert_eq!(rate, None),
                1..=30 => assert_eq!(rate, Some(10), "after {second} s"),
                55..=60 => assert_eq!(rate, Some(100), "after {second} s"),
                _ => {}
            }
        }
        assert_eq!(progress.copying().seconds_left, Some(10));
    }
}
