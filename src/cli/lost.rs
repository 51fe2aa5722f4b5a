//! `pgherd get lost-writes`: what members had written and nobody else has, as they say themselves.
//!
//! A member that is down says nothing: its own host still has the reports, beside its data directory.

use comfy_table::Table;
use comfy_table::presets::ASCII_FULL_CONDENSED;
use serde::Serialize;

use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::Outcome;
use crate::cli::output::{print, print_json};
use crate::cli::{Connection, OutputFormat};
use crate::facts::cluster::ClusterView;
use crate::facts::lost::LostWrites;
use crate::types::MemberName;

const HEADER: [&str; 9] = ["Member", "When", "TL", "From", "To", "Bytes", "Transactions", "Committed", "Kept"];

/// One report with whose it is.
#[derive(Debug, Serialize)]
struct Lost<'a> {
    member: &'a MemberName,
    #[serde(flatten)]
    writes: &'a LostWrites,
}

/// `pgherd get lost-writes`.
pub fn lost_writes(connection: &Connection, format: OutputFormat) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    let view = block_on(async { Ok(etcd.read_view().await?) })?;
    let lost = lost(&view);
    match format {
        OutputFormat::Json => print_json(&lost),
        OutputFormat::Table => print(&text(&lost)),
    }
}

fn lost(view: &ClusterView) -> Vec<Lost<'_>> {
    view.members.iter().flat_map(|(member, key)| key.record.lost_writes.iter().map(move |writes| Lost { member, writes })).collect()
}

fn text(lost: &[Lost<'_>]) -> String {
    if lost.is_empty() {
        return "no member that is there keeps lost writes\n".to_owned();
    }
    let mut table = Table::new();
    table.load_style(ASCII_FULL_CONDENSED).set_header(HEADER);
    for Lost { member, writes } in lost {
        let committed = match (&writes.first_commit, &writes.last_commit) {
            (Some(first), Some(last)) => format!("{first} to {last}"),
            _ => "unknown".to_owned(),
        };
        let committed = if writes.transactions == Some(0) { "nothing".to_owned() } else { committed };
        table.add_row([
            member.to_string(),
            one_line(&writes.at),
            writes.timeline.to_string(),
            writes.from.to_string(),
            writes.to.to_string(),
            writes.bytes.to_string(),
            writes.transactions.map_or_else(|| "unknown".to_owned(), |count| count.to_string()),
            one_line(&committed),
            one_line(&writes.kept),
        ]);
    }
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing::{name, record, view};
    use crate::machine::tests::fixtures::lost_writes;

    #[test]
    fn lost_writes_are_shown_by_member_and_what_is_not_known_is_said_to_be_unknown() {
        let mut view = view();
        assert!(text(&lost(&view)).contains("no member"));
        record(&mut view, "mdw").lost_writes = vec![LostWrites { transactions: None, ..lost_writes() }];
        record(&mut view, "standby").lost_writes = vec![lost_writes()];
        let rows = lost(&view);
        assert_eq!(rows.iter().map(|row| row.member.clone()).collect::<Vec<_>>(), [name("mdw"), name("standby")]);
        let text = text(&rows);
        let line = |who: &str| text.lines().find(|line| line.contains(who)).unwrap().to_owned();
        assert!(line("mdw").contains("unknown") && line("standby").contains("| 3 "), "{text}");
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!((&json[1]["member"], &json[1]["transactions"], &json[1]["bytes"]), (&"standby".into(), &3.into(), &100.into()));
    }
}
