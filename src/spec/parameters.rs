//! Which PostgreSQL parameters a spec may set, and to what as far as the cluster depends on it.
//!
//! Syntax and ranges of all other values are PostgreSQL's to judge, on a standby first. Values are the source text: nothing here
//! re-reads them but what a rule needs.

use std::collections::BTreeMap;

use super::checks::one_line;
use super::problems::Report;
use super::walk::join;
use crate::policy::parameters::owned_elsewhere;

/// Longest part of a parameter's name: PostgreSQL's NAMEDATALEN - 1.
const NAME_PART_MAX_BYTES: usize = super::checks::IDENTIFIER_MAX_BYTES;
/// Longest value.
const VALUE_MAX_BYTES: usize = 8 * 1024;

/// Words that are no parameters, and would pull other files in where postgresql.conf has parameters.
const DIRECTIVES: [&str; 3] = ["include", "include_dir", "include_if_exists"];

/// Must be the same on all members: a standby with less than its primary stops replaying and cannot be promoted (PostgreSQL manual,
/// "Hot Standby: Administrator's Overview"), and the others decide what is in the WAL.
const SAME_EVERYWHERE: &[&str] = &[
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
    "track_commit_timestamp",
    "wal_level",
    "wal_log_hints",
];

/// Settings that lose data when the machine does, and what they lose.
const DANGEROUS: &[(&str, bool, &str)] = &[
    ("data_sync_retry", true, "a write that the disk lost can be taken for written"),
    ("fsync", false, "data can be lost and damaged when the machine stops"),
    ("full_page_writes", false, "data can be damaged when the machine stops, and pg_rewind needs it"),
    ("ignore_checksum_failure", true, "damaged data is served"),
    ("zero_damaged_pages", true, "damaged data is destroyed"),
];

/// Holds one map of parameters against the rules. `shared` is false for the parameters of one member.
pub(super) fn check(parameters: &BTreeMap<String, Option<String>>, path: &str, shared: bool, report: &mut Report) {
    for (name, value) in parameters {
        let path = join(path, name);
        if let Err(message) = check_name(name) {
            match name.to_lowercase() {
                lower if lower != *name && check_name(&lower).is_ok() => {
                    report.error_hint(&path, message, format!("did you mean `{lower}`?"))
                }
                _ => report.error(&path, message),
            }
            continue;
        }
        if let Some(place) = owned(name) {
            report.error(&path, format!("pgherd sets this itself; expected in {place}"));
            continue;
        }
        if !shared && SAME_EVERYWHERE.contains(&name.as_str()) {
            report.error(&path, "this must be the same on all members; expected it in spec.postgres.parameters");
        }
        if let Some(value) = value {
            check_value(name, value, &path, report);
        }
    }
}

fn owned(name: &str) -> Option<&'static str> {
    if DIRECTIVES.contains(&name) {
        return Some("nowhere: pgherd writes the file whole");
    }
    if name.starts_with("recovery_target") {
        return Some("nowhere: standbys follow the latest timeline");
    }
    owned_elsewhere(name)
}

fn check_name(name: &str) -> Result<(), String> {
    let part = |part: &str| {
        part.len() <= NAME_PART_MAX_BYTES
            && part.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    if name.split('.').count() <= 2 && name.split('.').all(part) {
        return Ok(());
    }
    Err("expected the name of a PostgreSQL parameter: lower-case letters, digits and `_`, with a `.` for an extension's".to_owned())
}

fn check_value(name: &str, value: &str, path: &str, report: &mut Report) {
    if report.check(path, one_line(value)).is_none() {
        return;
    }
    if value.len() > VALUE_MAX_BYTES {
        report.error(path, format!("the value has {} bytes; expected at most {VALUE_MAX_BYTES}", value.len()));
    }
    if name == "wal_level" && !matches!(value, "replica" | "logical") {
        report.error(path, format!("expected replica or logical, found `{value}`: standbys cannot follow with less"));
    }
    if let Some((_, danger, loss)) = DANGEROUS.iter().find(|(dangerous, ..)| *dangerous == name)
        && boolean(value) == Some(*danger)
    {
        report.warn(path, format!("with `{value}` {loss}"));
    }
    if name == "synchronous_commit" && matches!(boolean(value), Some(false)) {
        report.warn(path, "an acknowledged commit can be lost when PostgreSQL or the machine stops");
    }
}

/// A boolean as PostgreSQL reads one: unambiguous beginnings of the words count (parse_bool).
fn boolean(value: &str) -> Option<bool> {
    let value = value.to_ascii_lowercase();
    let begins = |word: &str, least: usize| value.len() >= least && word.starts_with(value.as_str());
    if begins("true", 1) || begins("yes", 1) || begins("on", 2) || value == "1" {
        Some(true)
    } else if begins("false", 1) || begins("no", 1) || begins("off", 2) || value == "0" {
        Some(false)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::problems::Severity;

    fn problems(name: &str, value: &str, shared: bool) -> Vec<(Severity, String)> {
        let mut report = Report::new("test");
        check(&BTreeMap::from([(name.to_owned(), Some(value.to_owned()))]), "p", shared, &mut report);
        report.into_parts().1.into_iter().map(|problem| (problem.severity, problem.message)).collect()
    }

    #[test]
    fn what_pgherd_owns_is_refused_with_the_place_to_set_it() {
        for name in
            ["port", "listen_addresses", "primary_conninfo", "synchronous_standby_names", "hba_file", "recovery_target_timeline", "include"]
        {
            assert!(matches!(problems(name, "x", true).as_slice(), [(Severity::Error, _)]), "{name}");
        }
        assert!(problems("archive_command", "cp", true)[0].1.contains("postgres.archive_command"));
    }

    #[test]
    fn ordinary_and_extension_parameters_are_taken_as_they_are() {
        for (name, value) in [("work_mem", "64MB"), ("pg_stat_statements.max", "10000"), ("log_line_prefix", "%m [%p] '"), ("fsync", "on")]
        {
            assert_eq!(problems(name, value, true), [], "{name}");
        }
    }

    #[test]
    fn hostile_names_and_values_are_refused() {
        for name in ["a b", "a'", "a\n", "", ".", "a..b", "a.b.c", "a;b", "a=b", "../a", "\u{e4}", "1a"] {
            assert!(matches!(problems(name, "x", true).as_slice(), [(Severity::Error, _)]), "{name:?}");
        }
        for value in ["a\nfsync = off", "a\0b", "a\rb"] {
            assert!(matches!(problems("work_mem", value, true).as_slice(), [(Severity::Error, _)]), "{value:?}");
        }
    }

    #[test]
    fn settings_that_lose_data_are_warned_of_however_they_are_spelled() {
        for value in ["off", "OFF", "false", "f", "no", "0", "of"] {
            assert!(matches!(problems("fsync", value, true).as_slice(), [(Severity::Warning, _)]), "{value}");
        }
        assert!(matches!(problems("wal_level", "minimal", true).as_slice(), [(Severity::Error, _)]));
    }

    #[test]
    fn what_standbys_depend_on_cannot_differ_between_members() {
        assert!(matches!(problems("max_connections", "10", false).as_slice(), [(Severity::Error, _)]));
        assert_eq!(problems("work_mem", "1MB", false), []);
    }
}
