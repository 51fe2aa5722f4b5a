//! Judges what became of acknowledged rows: which must be in the final history, and which may be lost beyond a switch point.
//!
//! A row is judged by the position that its server had reached just after the commit: at or below the point where its timeline was
//! left, the commit is part of the new history for certain. The position is an upper bound, so a row is never excused wrongly
//! by more than what other sessions wrote in the same instant. A row whose position could not be read any more is excused only when
//! its timeline was left at all.

use std::collections::BTreeMap;

use crate::types::{Lsn, TimelineId};

/// What names a row: its client, and the client's own count.
pub type RowKey = (String, i64);

/// Where timelines were left, by timeline: the lines of a history file.
pub type SwitchPoints = BTreeMap<TimelineId, Lsn>;

/// Reads a timeline history file (PostgreSQL manual, "Timelines": parent, switch point, reason; `#` begins a comment).
pub fn switch_points(history_file: &str) -> SwitchPoints {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let timeline = fields.next()?.parse().ok()?;
        Some((TimelineId(timeline), fields.next()?.parse().ok()?))
    };
    history_file.lines().filter_map(line).collect()
}

/// An acknowledged row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledged {
    /// Which.
    pub row: RowKey,
    /// The server's timeline when it was inserted.
    pub timeline: TimelineId,
    /// The server's write position after the commit; None when the connection broke before it could be asked.
    pub position: Option<Lsn>,
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged rows.
    pub acknowledged: usize,
    /// Of these, rows that are there.
    pub found: usize,
    /// Rows that must be there and are not.
    pub missing: Vec<Acknowledged>,
    /// Rows that are not there and lie beyond a switch point, or on a timeline that did not become part of the history.
    pub beyond: Vec<Acknowledged>,
    /// Rows that are there more than once.
    pub duplicates: Vec<RowKey>,
}

/// Judges `acknowledged` by `found`, the rows of the final primary with how often each is there.
pub fn judge(acknowledged: &[Acknowledged], found: &BTreeMap<RowKey, u64>, last: TimelineId, left_at: &SwitchPoints) -> Verdict {
    let mut verdict = Verdict { acknowledged: acknowledged.len(), ..Verdict::default() };
    verdict.duplicates = found.iter().filter(|(_, times)| **times > 1).map(|(row, _)| row.clone()).collect();
    for ack in acknowledged {
        if found.contains_key(&ack.row) {
            verdict.found += 1;
        } else if may_be_lost(ack, last, left_at) {
            verdict.beyond.push(ack.clone());
        } else {
            verdict.missing.push(ack.clone());
        }
    }
    verdict
}

fn may_be_lost(ack: &Acknowledged, last: TimelineId, left_at: &SwitchPoints) -> bool {
    if ack.timeline == last {
        return false;
    }
    match (left_at.get(&ack.timeline), ack.position) {
        (Some(switch), Some(position)) => position > *switch,
        // Its timeline is not in the history at all, or where it lies is not known.
        (None, _) | (_, None) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HISTORY: &str = "1\t0/3000\tno recovery target specified\n\n# by hand\n2\t0/5000\tno recovery target specified\n";

    fn ack(seq: i64, timeline: u32, position: Option<u64>) -> Acknowledged {
        Acknowledged { row: ("c".into(), seq), timeline: TimelineId(timeline), position: position.map(Lsn) }
    }

    fn verdict(acks: &[Acknowledged], found: &[i64]) -> Verdict {
        let found = found.iter().map(|seq| (("c".to_owned(), *seq), 1)).collect();
        judge(acks, &found, TimelineId(3), &switch_points(HISTORY))
    }

    #[test]
    fn a_row_at_or_below_the_switch_point_must_be_there() {
        assert_eq!(verdict(&[ack(1, 1, Some(0x3000))], &[]).missing.len(), 1);
        assert_eq!(verdict(&[ack(1, 1, Some(0x3000))], &[1]).missing.len(), 0);
    }

    #[test]
    fn a_row_beyond_the_switch_point_is_counted_as_lost_and_not_as_missing() {
        let verdict = verdict(&[ack(1, 1, Some(0x3001)), ack(2, 2, None), ack(3, 7, Some(1))], &[]);
        assert_eq!((verdict.missing.len(), verdict.beyond.len()), (0, 3));
    }

    #[test]
    fn nothing_of_the_last_timeline_may_be_lost() {
        assert_eq!(verdict(&[ack(1, 3, None)], &[]).missing.len(), 1);
    }

    #[test]
    fn a_row_that_is_there_twice_is_reported() {
        let found = [(("c".to_owned(), 1), 2)].into();
        assert_eq!(judge(&[], &found, TimelineId(1), &SwitchPoints::new()).duplicates.len(), 1);
    }
}
