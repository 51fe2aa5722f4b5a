//! The report for people: the table that users of patronictl know, and below it in words what is wrong.
//!
//! Lags are bytes, because bytes decide whether a member may lead. Columns that would be empty for every member are left out.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use crate::cli::events::one_line;
use crate::cli::status::report::{MemberStatus, NO_KEY, Role, StatusReport};
use crate::facts::cluster::{Condition, Severity};

/// Most characters of the tags' column; the rest is in `-o json`.
const TAGS_MAX_CHARS: usize = 60;

/// The whole text, ending in a line feed.
pub fn text(report: &StatusReport) -> String {
    let mut out = title(report);
    out.push_str(&table(report));
    out.push('\n');
    out.push_str(&words(report));
    out
}

fn title(report: &StatusReport) -> String {
    let id = report.system_id.map_or_else(|| "not initialized".to_owned(), |id| id.to_string());
    let generation = report.generation.map_or_else(|| "no spec".to_owned(), |generation| format!("generation {generation}"));
    format!("Cluster: {} ({id}), {generation}, as of {}\n", report.cluster, report.as_of)
}

fn table(report: &StatusReport) -> String {
    let pending = report.members.iter().any(|member| member.pending_restart);
    let tags = report.members.iter().any(|member| !member.tags.is_empty());
    let mut header = vec!["Member", "Host", "Role", "State", "TL", "Receive LSN", "Lag", "Replay LSN", "Lag"];
    header.extend(pending.then_some("Pending restart"));
    header.extend(tags.then_some("Tags"));
    let mut table = Table::new();
    table.load_style(presets::ASCII_FULL_CONDENSED).set_header(header);
    for member in &report.members {
        table.add_row(row(member, pending, tags));
    }
    for column in [4, 5, 6, 7, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

fn row(member: &MemberStatus, pending: bool, tags: bool) -> Vec<String> {
    let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    let lag = |bytes: Option<u64>| if member.role == Role::Leader { String::new() } else { known(bytes.map(|bytes| bytes.to_string())) };
    let state = if member.state == NO_KEY && member.machine_state.is_none() { "unknown (no key)" } else { &member.state };
    let mut row = vec![
        member.name.to_string(),
        one_line(&member.host),
        match member.role {
            Role::Leader => "Leader".to_owned(),
            Role::SyncStandby => "Sync Standby".to_owned(),
            Role::QuorumStandby => "Quorum Standby".to_owned(),
            Role::Replica => "Replica".to_owned(),
        },
        one_line(state),
        known(member.timeline.map(|timeline| timeline.to_string())),
        known(member.receive_lsn.map(|lsn| lsn.to_string())),
        lag(member.receive_lag_bytes),
        match (member.replay_lsn, member.role) {
            // A leader replays nothing.
            (None, Role::Leader) => String::new(),
            (lsn, _) => known(lsn.map(|lsn| lsn.to_string())),
        },
        lag(member.replay_lag_bytes),
    ];
    row.extend(pending.then(|| if member.pending_restart { "*".to_owned() } else { String::new() }));
    row.extend(tags.then(|| shortened(member)));
    row
}

fn shortened(member: &MemberStatus) -> String {
    let all: Vec<_> = member.tags.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let text = one_line(&all.join(", "));
    if text.chars().count() <= TAGS_MAX_CHARS {
        return text;
    }
    text.chars().take(TAGS_MAX_CHARS).chain(['…']).collect()
}

/// What is wrong, the worst first, one line each; then what is only worth knowing.
fn words(report: &StatusReport) -> String {
    let of_cluster = report.conditions.iter().map(|condition| (None, condition));
    let of_members = report.members.iter().flat_map(|member| member.conditions.iter().map(move |condition| (Some(member), condition)));
    let mut all: Vec<(Option<&MemberStatus>, &Condition)> = of_cluster.chain(of_members).collect();
    all.sort_by_key(|(_, condition)| std::cmp::Reverse(condition.severity));
    let mut out = String::new();
    for (member, copying) in report.members.iter().filter_map(|member| Some((member, member.copying.as_ref()?))) {
        let _ = writeln!(out, "{}: {}", member.name, one_line(&copying.to_string()));
    }
    for (member, condition) in all {
        let severity = match condition.severity {
            Severity::Info => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let who = member.map(|member| format!("{}: ", member.name)).unwrap_or_default();
        let _ = writeln!(out, "{severity}: {who}{}", one_line(&condition.message));
    }
    let told = |member: &MemberStatus| member.conditions.iter().any(|condition| condition.kind == "pending_restart");
    for member in report.members.iter().filter(|member| member.pending_restart && !told(member)) {
        let _ = writeln!(out, "note: {}: wait for a restart: {}", member.name, member.pending_restart_parameters.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing::{name, record, report_of, view};
    use crate::types::Lsn;

    #[test]
    fn the_table_is_the_one_that_users_of_patronictl_know() {
        let mut view = view();
        record(&mut view, "standby").replay_lsn = Some(Lsn(0x04FF_FF00));
        record(&mut view, "mdw").replay_lsn = None;
        let expected = "\
Cluster: main (7), generation 4, as of 2026-11-22T12:00:00.000Z
+----------+-----------------+---------+-----------+----+-------------+-----+------------+-----+
| Member   | Host            | Role    | State     | TL | Receive LSN | Lag | Replay LSN | Lag |
+==============================================================================================+
| mdw      | 10.0.12.9:5432  | Leader  | running   |  3 |   0/5000000 |     |            |     |
| standby  | 10.0.12.4:5432  | Replica | streaming |  3 |   0/5000000 |   0 |  0/4FFFF00 | 256 |
| standby1 | 10.0.16.11:5432 | Replica | streaming |  3 |   0/5000000 |   0 |  0/5000000 |   0 |
+----------+-----------------+---------+-----------+----+-------------+-----+------------+-----+
";
        assert_eq!(text(&report_of(&view)), expected);
    }

    #[test]
    fn what_is_wrong_stands_below_the_table_the_worst_first() {
        let mut view = view();
        view.members.remove(&name("standby1"));
        view.leader = None;
        record(&mut view, "standby").pending_restart = vec!["max_connections".to_owned()];
        let text = text(&report_of(&view));
        let (_, words) = text.split_once("+\nerror: ").unwrap();
        assert!(words.starts_with("nobody holds the leader lock"), "{text}");
        assert!(text.contains("| unknown (no key) |"), "{text}");
        assert!(text.contains("warning: standby1: has no key"), "{text}");
        assert!(text.ends_with("note: standby: wait for a restart: max_connections\n"), "{text}");
    }

    #[test]
    fn a_condition_is_one_line_even_if_a_stranger_wrote_it() {
        let mut view = view();
        let message = "first\nerror: second\u{1b}[2J".to_owned();
        record(&mut view, "mdw").conditions.push(Condition { kind: "x".to_owned(), severity: Severity::Warning, message });
        assert!(text(&report_of(&view)).ends_with("warning: mdw: first error: second [2J\n"));
    }
}
