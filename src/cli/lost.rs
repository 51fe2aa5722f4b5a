//! `pgherd get lost-writes`: what members had written and nobody else has, as they say themselves.
//!
//! A member that is down says nothing: its own host still has the reports, beside its data directory.

use comfy_table::Table;
use comfy_table::presets::ASCII_FULL_CONDENSED;
use serde::Serialize;

use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::Outcome;
use crate::cli::output::{print, print_json, tell};
use crate::cli::{Connection, OutputFormat};
use crate::facts::cluster::{ClusterView, MemberKey};
use crate::facts::lost::LostWrites;
use crate::types::MemberName;

/// The condition of a member that keeps a whole directory.
const KEPT: &str = "diverged_kept";

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
        OutputFormat::Json => {
            kept_whole(&view).iter().for_each(|line| tell(line));
            print_json(&lost)
        }
        OutputFormat::Table => print(&text(&lost, &kept_whole(&view))),
    }
}

/// Where a copy took a directory's place, what was lost has not been counted: the whole directory is there.
fn kept_whole(view: &ClusterView) -> Vec<String> {
    let kept = |key: &MemberKey| key.record.conditions.iter().find(|condition| condition.kind == KEPT).map(|kept| one_line(&kept.message));
    view.members.iter().filter_map(|(member, key)| Some(format!("{member}: {}", kept(key)?))).collect()
}

fn lost(view: &ClusterView) -> Vec<Lost<'_>> {
    view.members.iter().flat_map(|(member, key)| key.record.lost_writes.iter().map(move |writes| Lost { member, writes })).collect()
}

fn text(lost: &[Lost<'_>], whole: &[String]) -> String {
    let whole: String = whole.iter().map(|line| format!("{line}\n")).collect();
    match (lost.is_empty(), whole.is_empty()) {
        (true, true) => return "no member that is there keeps lost writes\n".to_owned(),
        (true, false) => return whole,
        (false, _) => {}
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
    format!("{table}\n{whole}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing::{name, record, view};
    use crate::facts::cluster::{Condition, Severity};
    use crate::machine::tests::fixtures::lost_writes;

    #[test]
    fn lost_writes_are_shown_by_member_and_what_is_not_known_is_said_to_be_unknown() {
        let mut view = view();
        assert!(text(&lost(&view), &kept_whole(&view)).contains("no member"));
        let kept = Condition { kind: KEPT.to_owned(), severity: Severity::Info, message: "a directory is kept at /kept".to_owned() };
        record(&mut view, "standby").conditions.push(kept);
        assert_eq!(text(&lost(&view), &kept_whole(&view)), "standby: a directory is kept at /kept\n", "a copy took its place");
        record(&mut view, "mdw").lost_writes = vec![LostWrites { transactions: None, ..lost_writes() }];
        record(&mut view, "standby").lost_writes = vec![lost_writes()];
        let rows = lost(&view);
        assert_eq!(rows.iter().map(|row| row.member.clone()).collect::<Vec<_>>(), [name("mdw"), name("standby")]);
        let text = text(&rows, &kept_whole(&view));
        assert!(text.ends_with("standby: a directory is kept at /kept\n"), "{text}");
        let line = |who: &str| text.lines().find(|line| line.contains(who)).unwrap().to_owned();
        assert!(line("mdw").contains("unknown") && line("standby").contains("| 3 "), "{text}");
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!((&json[1]["member"], &json[1]["transactions"], &json[1]["bytes"]), (&"standby".into(), &3.into(), &100.into()));
    }
}
