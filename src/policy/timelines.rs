//! Timeline history: what a history file of pg_wal says. Reads text, never a file.
//!
//! PostgreSQL manual, "Timelines". A file that holds comments only is a history without ancestors.

use std::fmt;
use std::str::FromStr;

use crate::types::{Lsn, ParseError, TimelineId};

/// One line of a history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// The timeline that was left.
    pub parent: TimelineId,
    /// Where: the first position that is on the next timeline.
    pub at: Lsn,
    /// What PostgreSQL noted: `no recovery target specified` …
    pub reason: String,
}

/// The ancestors of a timeline, oldest first, as its history file lists them. Timeline 1 has none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TimelineHistory(pub Vec<Switch>);

impl TimelineHistory {
    /// Where the ancestor `timeline` was left; None when it is no ancestor.
    pub fn left_at(&self, timeline: TimelineId) -> Option<Lsn> {
        self.0.iter().find(|switch| switch.parent == timeline).map(|switch| switch.at)
    }

    /// The ancestors of the ancestor `timeline`.
    pub fn before(&self, timeline: TimelineId) -> &[Switch] {
        let end = self.0.iter().position(|switch| switch.parent == timeline).unwrap_or(self.0.len());
        &self.0[..end]
    }
}

impl FromStr for TimelineHistory {
    type Err = ParseError;

    /// As PostgreSQL's readTimeLineHistory: `#` comments and empty lines are skipped, parents must increase.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut switches: Vec<Switch> = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let bad = || ParseError(format!("`{line}` is no line of a timeline history: timeline, position, reason"));
            let mut words = line.splitn(3, char::is_whitespace).map(str::trim);
            let parent = words.next().and_then(|word| word.parse().ok()).map(TimelineId).ok_or_else(bad)?;
            let at = words.next().ok_or_else(bad)?.parse()?;
            let ordered = switches.last().is_none_or(|last| last.parent < parent) && parent > TimelineId(0);
            if !ordered {
                return Err(ParseError(format!("the timelines of a history must increase, found {parent} out of order")));
            }
            switches.push(Switch { parent, at, reason: words.next().unwrap_or_default().to_owned() });
        }
        Ok(Self(switches))
    }
}

impl fmt::Display for TimelineHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for switch in &self.0 {
            writeln!(f, "{}\t{}\t{}", switch.parent, switch.at, switch.reason)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_history_file_is_read_as_postgresql_writes_it() {
        let text = "# comment\n\n1\t0/5000000\tno recovery target specified\n  2\t16/B374D848\tbefore 2000-01-01 \n";
        let read: TimelineHistory = text.parse().unwrap();
        assert_eq!(read.left_at(TimelineId(2)), Some(Lsn(0x16_B374_D848)));
        assert_eq!(read.0[0].reason, "no recovery target specified");
        assert_eq!(read.to_string().parse::<TimelineHistory>().unwrap(), read);
        for wrong in ["1", "x\t0/1\ty", "1\t0-1\ty", "2\t0/1\ty\n1\t0/2\ty", "0\t0/1\tx"] {
            assert!(wrong.parse::<TimelineHistory>().is_err(), "{wrong}");
        }
        assert_eq!("# reserved".parse::<TimelineHistory>().unwrap(), TimelineHistory::default());
    }

    proptest! {
        #[test]
        fn no_history_file_makes_the_reader_panic(text in "[0-9A-F/\t\n #x]{0,80}") {
            let _ = text.parse::<TimelineHistory>();
        }
    }
}
