//! `pgherd events`: the last decisions, as they were recorded.

use std::fmt::Write as _;

use crate::cli::connect::{self, block_on};
use crate::cli::exit::Outcome;
use crate::cli::output::{print, print_json};
use crate::cli::{Connection, OutputFormat};
use crate::facts::cluster::DecisionRecord;

/// `pgherd events`.
pub fn events(connection: &Connection, format: OutputFormat, limit: u32) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    let events = block_on(async { Ok(etcd.read_events(limit).await?) })?;
    match format {
        OutputFormat::Json => print_json(&events),
        OutputFormat::Table => print(&text(&events)),
    }
}

/// One line per event: when, who, what, and the facts behind it.
fn text(events: &[DecisionRecord]) -> String {
    let mut out = String::new();
    for event in events {
        let _ = write!(out, "{}  {}  {}: {}", event.at, event.member, event.kind, one_line(&event.message));
        for (fact, value) in &event.facts {
            let _ = write!(out, "  {fact}={}", one_line(value));
        }
        out.push('\n');
    }
    out
}

/// Without line feeds and other control characters: what is shown comes from etcd, where anybody may have written.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let event = DecisionRecord {
            at: "2026-11-22T12:00:00.000Z".to_owned(),
            member: "mdw".parse().unwrap(),
            kind: "promoted".to_owned(),
            message: "this member won\nthe lock\u{1b}[2J".to_owned(),
            facts: [("timeline".to_owned(), "4".to_owned())].into(),
        };
        assert_eq!(text(&[event]), "2026-11-22T12:00:00.000Z  mdw  promoted: this member won the lock [2J  timeline=4\n");
    }
}
