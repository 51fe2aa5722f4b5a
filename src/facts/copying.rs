//! How far a copy or a rewind has got, for people and programs: nothing is decided on it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::MemberName;

/// What pg_basebackup or pg_rewind says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes {
    /// So many are there.
    pub done: u64,
    /// Of so many, as estimated when it began.
    pub total: u64,
}

/// A copy or a rewind under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copying {
    /// Which of both.
    pub what: CopyKind,
    /// From whom.
    pub from: MemberName,
    /// Bytes that are there; None = it has not said yet.
    pub done_bytes: Option<u64>,
    /// Bytes in all, as estimated when it began; None = not known.
    pub total_bytes: Option<u64>,
    /// Bytes per second of late; None = not known yet.
    pub bytes_per_s: Option<u64>,
    /// At that rate; None = not known.
    pub seconds_left: Option<u64>,
}

/// Which of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyKind {
    /// pg_basebackup.
    Copy,
    /// pg_rewind.
    Rewind,
}

impl fmt::Display for Copying {
    /// `copy of n1: 120 MB of 400 MB (30 %), 12 MB/s, 23 s left`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            CopyKind::Copy => write!(f, "copy of {}", self.from)?,
            CopyKind::Rewind => write!(f, "rewind to {}", self.from)?,
        }
        let Some(done) = self.done_bytes else { return f.write_str(": begins") };
        write!(f, ": {}", size(done))?;
        if let Some(total) = self.total_bytes.filter(|total| *total > 0) {
            // What the server wrote meanwhile comes on top of what was estimated.
            let percent = u128::from(done.min(total)) * 100 / u128::from(total);
            write!(f, " of {} ({percent} %)", size(total.max(done)))?;
        }
        if let Some(rate) = self.bytes_per_s {
            write!(f, ", {}/s", size(rate))?;
        }
        match self.seconds_left {
            Some(left) if left >= 3_600 => write!(f, ", {} h {} min left", left / 3_600, left % 3_600 / 60),
            Some(left) if left >= 60 => write!(f, ", {} min {} s left", left / 60, left % 60),
            Some(left) => write!(f, ", {left} s left"),
            None => Ok(()),
        }
    }
}

/// In the unit that leaves up to four digits.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} kB", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{} MB", bytes >> 20),
        _ => format!("{} GB", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_left_out_and_never_zero() {
        let begins = Copying {
            what: CopyKind::Copy,
            from: "n1".parse().unwrap(),
            done_bytes: None,
            total_bytes: None,
            bytes_per_s: None,
            seconds_left: None,
        };
        assert_eq!(begins.to_string(), "copy of n1: begins");
        let rewinds = Copying { what: CopyKind::Rewind, done_bytes: Some(4 << 20), ..begins.clone() };
        assert_eq!(rewinds.to_string(), "rewind to n1: 4096 kB");
        let total = Copying {
            done_bytes: Some(120 << 20),
            total_bytes: Some(400 << 20),
            bytes_per_s: Some(12 << 20),
            seconds_left: Some(3_723),
            ..begins
        };
        assert_eq!(total.to_string(), "copy of n1: 120 MB of 400 MB (30 %), 12 MB/s, 1 h 2 min left");
    }
}
