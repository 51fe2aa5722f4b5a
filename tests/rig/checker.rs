//! Judges what the prober saw: was there ever more than one writer, did anyone else claim to be primary, is the history whole.
//!
//! Each observation has a begin and an end, and what was seen was true at some instant between them. A verdict is given only where
//! every choice of these instants leads to it: what the checker reports happened, however noisy the machine was.

use std::collections::{BTreeMap, BTreeSet};

use pgherd::cli::demo::ledger::{RowKey, Verdict};
use pgherd::clock::BootTime;
use pgherd::types::TimelineId;

/// A commit that a node acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// By whom.
    pub node: String,
    /// On which timeline.
    pub timeline: TimelineId,
    /// Before the row was sent.
    pub begun: BootTime,
    /// When the answer was there.
    pub ended: BootTime,
}

/// An answer to OPTIONS /primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Who was asked.
    pub node: String,
    /// Whether the answer was 200.
    pub is_primary: bool,
    /// Before the question was sent.
    pub begun: BootTime,
    /// When the answer was there.
    pub ended: BootTime,
}

/// Acknowledgements of one node on one timeline.
struct Reign<'a> {
    node: &'a str,
    timeline: TimelineId,
    /// The acknowledgement that was over first: the reign had begun by its end.
    first: &'a Ack,
    /// The acknowledgement that was begun last: the reign still was at its begin.
    last: &'a Ack,
}

fn reigns(acks: &[Ack]) -> Vec<Reign<'_>> {
    let mut by_reign: BTreeMap<(&str, TimelineId), Reign<'_>> = BTreeMap::new();
    for ack in acks {
        let reign =
            by_reign.entry((&ack.node, ack.timeline)).or_insert(Reign { node: &ack.node, timeline: ack.timeline, first: ack, last: ack });
        if ack.ended < reign.first.ended {
            reign.first = ack;
        }
        if ack.begun > reign.last.begun {
            reign.last = ack;
        }
    }
    by_reign.into_values().collect()
}

/// I1 and I9: reports a pair of reigns of which each acknowledged something after the other had, a timeline with two writers, or a
/// timeline that came after a higher one.
pub fn two_writers(acks: &[Ack]) -> Option<String> {
    let reigns = reigns(acks);
    for (at, one) in reigns.iter().enumerate() {
        for other in &reigns[at + 1..] {
            let one_then_other = one.first.ended < other.last.begun;
            let other_then_one = other.first.ended < one.last.begun;
            let problem = match (one_then_other, other_then_one) {
                (true, true) => "each acknowledged a commit after the other had",
                _ if one.timeline == other.timeline => "both wrote the same timeline",
                (true, false) if one.timeline > other.timeline => "the timeline went back",
                (false, true) if other.timeline > one.timeline => "the timeline went back",
                _ => continue,
            };
            return Some(format!("{problem}:\n  {}\n  {}", told(one), told(other)));
        }
    }
    None
}

fn told(reign: &Reign<'_>) -> String {
    format!(
        "{} on timeline {}: acknowledged by {:?}, and still something sent at {:?} (answered {:?})",
        reign.node, reign.timeline, reign.first.ended, reign.last.begun, reign.last.ended
    )
}

/// I13: reports a node that answered 200 wholly between two successive answers of 200 of another.
pub fn two_primaries_claimed(claims: &[Claim]) -> Option<String> {
    let nodes: BTreeSet<&str> = claims.iter().map(|claim| claim.node.as_str()).collect();
    for node in nodes {
        let mut own: Vec<&Claim> = claims.iter().filter(|claim| claim.node == node).collect();
        own.sort_by_key(|claim| claim.begun);
        for pair in own.windows(2).filter(|pair| pair[0].is_primary && pair[1].is_primary) {
            let inside =
                |claim: &&Claim| claim.node != node && claim.is_primary && claim.begun > pair[0].ended && claim.ended < pair[1].begun;
            if let Some(other) = claims.iter().find(inside) {
                return Some(format!(
                    "{node} answered /primary with 200 at {:?} and {:?}, {} in between at {:?}",
                    pair[0].ended, pair[1].begun, other.node, other.begun
                ));
            }
        }
    }
    None
}

/// I5 and I8: reports rows that must be there and are not, that must not be there and are, or are there twice.
pub fn broken_history(verdict: &Verdict, failed: &BTreeSet<RowKey>, found: &BTreeMap<RowKey, u64>) -> Option<String> {
    let risen: Vec<&RowKey> = failed.iter().filter(|row| found.contains_key(*row)).collect();
    let problems = [
        ("acknowledged, below the switch point, and lost", verdict.missing.len(), format!("{:?}", verdict.missing.first())),
        ("refused, and there all the same", risen.len(), format!("{:?}", risen.first())),
        ("there more than once", verdict.duplicates.len(), format!("{:?}", verdict.duplicates.first())),
    ];
    let told: Vec<String> = problems
        .iter()
        .filter(|(_, count, _)| *count > 0)
        .map(|(what, count, first)| format!("{count} rows {what}, such as {first}"))
        .collect();
    (!told.is_empty()).then(|| told.join("\n"))
}

#[cfg(test)]
mod tests {
    use pgherd::cli::demo::ledger::Acknowledged;

    use super::*;

    fn ack(node: &str, timeline: u32, begun: u64, ended: u64) -> Ack {
        Ack { node: node.into(), timeline: TimelineId(timeline), begun: BootTime(begun), ended: BootTime(ended) }
    }

    fn claim(node: &str, is_primary: bool, begun: u64, ended: u64) -> Claim {
        Claim { node: node.into(), is_primary, begun: BootTime(begun), ended: BootTime(ended) }
    }

    #[test]
    fn one_writer_after_another_is_no_offence() {
        let failover_and_back = [ack("a", 1, 0, 1), ack("a", 1, 2, 3), ack("b", 2, 4, 5), ack("b", 2, 6, 7), ack("a", 3, 8, 9)];
        assert_eq!(two_writers(&failover_and_back), None);
    }

    #[test]
    fn answers_that_may_have_come_one_after_the_other_are_no_offence() {
        // a's row was sent early and its answer was read late: it may have committed before b began.
        assert_eq!(two_writers(&[ack("a", 1, 0, 1), ack("a", 1, 2, 9), ack("b", 2, 3, 4)]), None);
    }

    #[test]
    fn two_writers_at_once_are_reported_with_their_times() {
        let report = two_writers(&[ack("a", 1, 0, 1), ack("b", 2, 2, 3), ack("a", 1, 4, 5)]).unwrap();
        assert!(
            report.contains("each acknowledged") && report.contains("a on timeline 1") && report.contains("b on timeline 2"),
            "{report}"
        );
    }

    #[test]
    fn a_second_writer_of_one_timeline_and_a_timeline_that_goes_back_are_reported() {
        assert!(two_writers(&[ack("a", 2, 0, 1), ack("b", 2, 2, 3)]).unwrap().contains("same timeline"));
        assert!(two_writers(&[ack("a", 2, 0, 1), ack("b", 1, 2, 3)]).unwrap().contains("went back"));
    }

    #[test]
    fn two_primaries_over_http_are_reported_only_when_one_answered_between_the_others_answers() {
        let overlap = [claim("a", true, 0, 1), claim("b", true, 2, 3), claim("a", true, 4, 5)];
        assert!(two_primaries_claimed(&overlap).unwrap().contains('b'));
        let handover = [claim("a", true, 0, 1), claim("a", false, 2, 3), claim("b", true, 4, 5), claim("a", true, 6, 7)];
        assert_eq!(two_primaries_claimed(&handover), None);
    }

    #[test]
    fn a_lost_a_risen_and_a_doubled_row_are_each_reported() {
        let row = |seq| ("c".to_owned(), seq);
        let lost = Acknowledged { row: row(1), timeline: TimelineId(1), position: None };
        let verdict = Verdict { missing: vec![lost], duplicates: vec![row(2)], ..Verdict::default() };
        let report = broken_history(&verdict, &[row(3)].into(), &[(row(3), 1)].into()).unwrap();
        assert_eq!(report.lines().count(), 3, "{report}");
        assert_eq!(broken_history(&Verdict::default(), &[row(3)].into(), &[(row(4), 1)].into()), None);
    }
}
