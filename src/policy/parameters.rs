//! Makes postgresql.conf, whole, and the few settings of the command line. Never asks a server.
//!
//! Later lines win in PostgreSQL's files, so the order is: pgherd's defaults, the spec's parameters, the member's, and last what pgherd
//! owns. What must not be lower on a standby than it was on the primary is raised to the control file's values: a server below them
//! does not start as a standby, and a standby below them cannot be promoted (SAFETY row 50).

pub mod live;

use std::collections::{BTreeMap, BTreeSet};

use self::live::{NAMES_CONF, UPSTREAM_CONF};
use crate::facts::postgres::StandbyFloor;
use crate::types::ClusterName;

/// Parameters as in a spec: the value as PostgreSQL's own text; None = PostgreSQL's default.
pub type Parameters = BTreeMap<String, Option<String>>;

/// All that postgresql.conf is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigInputs {
    /// PostgreSQL's `cluster_name`.
    pub cluster: ClusterName,
    /// Major version of the server.
    pub major_version: u32,
    /// The node's `listen`; loopback is added.
    pub listen: String,
    /// Port.
    pub port: u16,
    /// Directory of the Unix socket.
    pub socket_dir: String,
    /// Directory of PostgreSQL's log; None = standard error.
    pub log_dir: Option<String>,
    /// `spec.postgres.parameters`.
    pub parameters: Parameters,
    /// `spec.postgres.member_parameters` of this member.
    pub member_parameters: Parameters,
    /// `archive_command`.
    pub archive_command: Option<String>,
    /// `restore_command`.
    pub restore_command: Option<String>,
    /// Where a standby streams from; None = nowhere (a primary, or nobody leads).
    pub primary_conninfo: Option<String>,
    /// Its slot there.
    pub primary_slot_name: Option<String>,
    /// Where the files are that change apart from this one ([`UPSTREAM_CONF`], [`NAMES_CONF`]).
    pub data_dir: String,
    /// There are permanent logical slots that standbys keep copies of.
    pub failover_slots: bool,
    /// What the control file demands of a standby; None for a server that never was one.
    pub floor: Option<StandbyFloor>,
    /// Whether the kernel tells who asks for a sync of a whole file system of write errors ([`syncfs_tells_errors`]).
    pub syncfs_tells_errors: bool,
}

/// A parameter whose value in the spec is below what this data directory can start with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raised {
    /// Which.
    pub name: String,
    /// What the spec says, or PostgreSQL's default.
    pub wanted: u32,
    /// What is used instead.
    pub used: u32,
}

/// postgresql.conf, and what was raised in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The file.
    pub text: String,
    /// For a condition.
    pub raised: Vec<Raised>,
}

/// Defaults of pgherd's that differ from PostgreSQL's, or that initdb would have written. The spec overrides them.
const DEFAULTS: [(&str, &str); 25] = [
    // What bounds the time until a standby follows a new primary, or notices that the old one is gone (SAFETY row 58).
    // Where commits wait for standbys, the first is the rest of the outage: a primary that is back acknowledges nothing before one has found
    // it. With a restore_command each attempt runs that, too.
    ("wal_retrieve_retry_interval", "200ms"),
    ("wal_receiver_timeout", "15s"),
    ("wal_sender_timeout", "15s"),
    ("tcp_keepalives_idle", "10s"),
    ("tcp_keepalives_interval", "5s"),
    ("tcp_keepalives_count", "3"),
    // What replication and rewind need; the numbers are those of PATRONI.md.
    ("wal_level", "replica"),
    ("wal_log_hints", "on"),
    ("max_wal_senders", "10"),
    ("max_replication_slots", "10"),
    ("wal_keep_size", "128MB"),
    // What slots may hold back: without a limit one that nobody uses fills the disk (SAFETY row 29).
    ("max_slot_wal_keep_size", "50GB"),
    ("max_connections", "100"),
    ("max_worker_processes", "8"),
    ("max_prepared_transactions", "0"),
    ("max_locks_per_transaction", "64"),
    ("password_encryption", "scram-sha-256"),
    // What initdb would have written from the environment: the same on every member.
    ("shared_buffers", "128MB"),
    ("dynamic_shared_memory_type", "posix"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("lc_messages", "C"),
    ("datestyle", "iso, mdy"),
    ("default_text_search_config", "pg_catalog.english"),
    ("log_line_prefix", "%m [%p] %q%u@%d "),
];

/// What pgherd sets itself: a spec that names one of these is refused, with where it is said instead.
const OWNED: [(&str, &str); 27] = [
    ("listen_addresses", "postgres.listen in the node document"),
    ("port", "port of the member"),
    ("unix_socket_directories", "postgres.socket_dir in the node document"),
    ("cluster_name", "metadata.name"),
    ("data_directory", "postgres.data_dir in the node document"),
    ("config_file", "nowhere: pgherd writes it"),
    ("hba_file", "nowhere: pgherd writes it from postgres.pg_hba"),
    ("ident_file", "nowhere: pgherd writes it from postgres.pg_ident"),
    ("external_pid_file", "nowhere"),
    ("hot_standby", "nowhere: it is always on"),
    ("primary_conninfo", "nowhere: it follows the leader"),
    ("primary_slot_name", "replication.use_slots"),
    ("promote_trigger_file", "nowhere: pgherd promotes"),
    ("recovery_target", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_timeline", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_action", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_lsn", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_name", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_time", "nowhere: standbys follow the latest timeline"),
    ("recovery_target_xid", "nowhere: standbys follow the latest timeline"),
    ("synchronous_standby_names", "replication.mode"),
    ("archive_mode", "postgres.archive_command"),
    ("archive_command", "postgres.archive_command"),
    ("restore_command", "postgres.restore_command"),
    ("restart_after_crash", "nowhere: it is always on"),
    ("allow_alter_system", "nowhere: settings are in the spec"),
    ("event_source", "nowhere"),
];

/// Where a parameter that pgherd owns is said instead; None for one that a spec may set.
pub fn owned_elsewhere(name: &str) -> Option<&'static str> {
    OWNED.iter().find(|(owned, _)| owned.eq_ignore_ascii_case(name)).map(|(_, instead)| *instead)
}

/// Whether syncfs(2) of this kernel release reports write errors: Linux 5.8 and later (PostgreSQL manual, recovery_init_sync_method).
pub fn syncfs_tells_errors(kernel_release: &str) -> bool {
    let mut numbers = kernel_release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 8),
        _ => false,
    }
}

/// Whether the text can be the name of a parameter: `work_mem`, `pg_stat_statements.track`.
pub fn is_name(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "_$".contains(c))
    };
    !name.is_empty() && name.split('.').count() <= 2 && name.split('.').all(part)
}

/// A value as PostgreSQL's configuration files quote it (guc-file.l, DeescapeQuotedString). None if it holds a NUL, which none can.
pub fn quote(value: &str) -> Option<String> {
    let mut quoted = String::from("'");
    for c in value.chars() {
        match c {
            '\0' => return None,
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            other => quoted.push(other),
        }
    }
    quoted.push('\'');
    Some(quoted)
}

/// The whole file. An error is a sentence that names the parameter.
pub fn postgresql_conf(inputs: &ConfigInputs) -> Result<Configuration, String> {
    let chosen = chosen(inputs);
    let owned = owned(inputs);
    let raised = raised(inputs, &chosen);
    let mut text = String::from("# Written by pgherd from the cluster's spec: edits are undone.\n");
    let own_names: BTreeSet<&str> = owned.iter().map(|(name, _)| *name).collect();
    for (name, value) in chosen.iter().filter(|(name, _)| !own_names.contains(name.as_str())) {
        push(&mut text, name, value)?;
    }
    if !raised.is_empty() {
        text.push_str("# Raised to what this data directory was last run with: a standby must not have less.\n");
    }
    for one in &raised {
        push(&mut text, &one.name, &one.used.to_string())?;
    }
    text.push_str("# What pgherd owns.\n");
    for (name, value) in &owned {
        push(&mut text, name, value)?;
    }
    for file in [UPSTREAM_CONF, NAMES_CONF] {
        push(&mut text, "include_if_exists", &format!("{}/{file}", inputs.data_dir))?;
    }
    Ok(Configuration { text, raised })
}

/// Settings for the command line: none of them ever changes by a reload, and no file and no ALTER SYSTEM wins over them.
pub fn command_line(inputs: &ConfigInputs) -> Vec<(String, String)> {
    let own = owned(inputs);
    let fixed = ["listen_addresses", "port", "unix_socket_directories", "cluster_name", "hot_standby"];
    own.into_iter().filter(|(name, _)| fixed.contains(name)).map(|(name, value)| (name.to_owned(), value)).collect()
}

fn push(text: &mut String, name: &str, value: &str) -> Result<(), String> {
    if !is_name(name) {
        return Err(format!("`{name}` cannot be the name of a PostgreSQL parameter"));
    }
    let quoted = quote(value).ok_or_else(|| format!("the value of {name} holds a NUL byte"))?;
    text.push_str(&format!("{name} = {quoted}\n"));
    Ok(())
}

/// pgherd's defaults, the spec's over them, the member's over those. Parameter names are the same in any case of letters.
fn chosen(inputs: &ConfigInputs) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<String, String> = DEFAULTS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    // Before it recovers from a crash, PostgreSQL makes the whole data directory durable: file by file, which is seconds on a busy disk
    // even of a small cluster, or each file system at once. Nothing is safer about the slow way where the fast one tells errors.
    if inputs.major_version >= 14 && inputs.syncfs_tells_errors {
        chosen.insert("recovery_init_sync_method".to_owned(), "syncfs".to_owned());
    }
    for (name, value) in inputs.parameters.iter().chain(&inputs.member_parameters) {
        let name = name.to_ascii_lowercase();
        match value {
            Some(value) => chosen.insert(name, value.clone()),
            None => chosen.remove(&name),
        };
    }
    chosen
}

fn owned(inputs: &ConfigInputs) -> Vec<(&'static str, String)> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut owned = vec![
        ("listen_addresses", listen_addresses(&inputs.listen)),
        ("port", inputs.port.to_string()),
        ("unix_socket_directories", list_element(&inputs.socket_dir)),
        ("cluster_name", inputs.cluster.to_string()),
        ("hot_standby", "on".to_owned()),
        ("restart_after_crash", "on".to_owned()),
        ("recovery_target_timeline", "latest".to_owned()),
        ("restore_command", text(&inputs.restore_command)),
        ("archive_mode", if inputs.archive_command.is_some() { "on" } else { "off" }.to_owned()),
        ("archive_command", text(&inputs.archive_command)),
    ];
    match &inputs.log_dir {
        Some(directory) => owned.extend([("logging_collector", "on".to_owned()), ("log_directory", directory.clone())]),
        None => owned.extend([("logging_collector", "off".to_owned()), ("log_destination", "stderr".to_owned())]),
    }
    if inputs.major_version >= 17 {
        owned.push(("allow_alter_system", "off".to_owned()));
    }
    if inputs.failover_slots {
        // Without the feedback, rows that a slot's copy still needs are cleaned up under it (manual, "Replication Slot Synchronization").
        owned.extend([("sync_replication_slots", "on".to_owned()), ("hot_standby_feedback", "on".to_owned())]);
    }
    owned
}

/// The node's addresses, and loopback unless they already hold it.
fn listen_addresses(listen: &str) -> String {
    let mut addresses: Vec<&str> = listen.split(',').map(str::trim).filter(|address| !address.is_empty()).collect();
    let everywhere = addresses.iter().any(|address| matches!(*address, "*" | "0.0.0.0"));
    if !everywhere && !addresses.iter().any(|address| address.starts_with("127.") || *address == "localhost") {
        addresses.push("127.0.0.1");
    }
    addresses.join(",")
}

/// An element of a list parameter: in double quotes, so that commas and blanks in it stay.
fn list_element(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// What the floor raises. A value that is no plain number is left to PostgreSQL to refuse.
fn raised(inputs: &ConfigInputs, chosen: &BTreeMap<String, String>) -> Vec<Raised> {
    let Some(floor) = inputs.floor else { return Vec::new() };
    let floors = [
        ("max_connections", floor.max_connections),
        ("max_worker_processes", floor.max_worker_processes),
        ("max_wal_senders", floor.max_wal_senders),
        ("max_prepared_transactions", floor.max_prepared_transactions),
        ("max_locks_per_transaction", floor.max_locks_per_transaction),
    ];
    let default_of = |name: &str| DEFAULTS.iter().find(|(default, _)| *default == name).map_or("0", |(_, value)| value);
    let below = floors.into_iter().filter_map(|(name, used)| {
        let wanted = chosen.get(name).map_or(default_of(name), String::as_str).trim().parse::<u32>().ok()?;
        (wanted < used).then(|| Raised { name: name.to_owned(), wanted, used })
    });
    below.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inputs() -> ConfigInputs {
        ConfigInputs {
            cluster: "main".parse().unwrap(),
            major_version: 17,
            listen: "10.0.12.9".into(),
            port: 5432,
            socket_dir: "/run/pg, herd".into(),
            log_dir: None,
            parameters: Parameters::new(),
            member_parameters: Parameters::new(),
            archive_command: None,
            restore_command: None,
            primary_conninfo: None,
            primary_slot_name: None,
            data_dir: "/data".into(),
            failover_slots: false,
            floor: None,
            syncfs_tells_errors: true,
        }
    }

    fn parameters(pairs: &[(&str, Option<&str>)]) -> Parameters {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), value.map(str::to_owned))).collect()
    }

    /// What PostgreSQL makes of the file: the last value of each name.
    fn values(text: &str) -> BTreeMap<String, String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split_once(" = ").unwrap()).map(|(name, value)| (name.to_owned(), unquote(value))).collect()
    }

    /// guc-file.l's DeescapeQuotedString.
    fn unquote(quoted: &str) -> String {
        let mut text = String::new();
        let mut rest = quoted.strip_prefix('\'').unwrap().strip_suffix('\'').unwrap().chars();
        while let Some(c) = rest.next() {
            match (c, c == '\\' || c == '\'') {
                ('\\', _) => match rest.next().unwrap() {
                    'n' => text.push('\n'),
                    'r' => text.push('\r'),
                    other => text.push(other),
                },
                ('\'', _) => text.extend(rest.next().filter(|next| *next == '\'')),
                (other, _) => text.push(other),
            }
        }
        text
    }

    #[test]
    fn crash_recovery_syncs_whole_file_systems_only_where_that_tells_errors_and_nobody_wants_otherwise() {
        let method = |inputs: &ConfigInputs| values(&postgresql_conf(inputs).unwrap().text).get("recovery_init_sync_method").cloned();
        assert_eq!(method(&inputs()).as_deref(), Some("syncfs"));
        assert_eq!(method(&ConfigInputs { major_version: 13, ..inputs() }), None, "not there before 14");
        assert_eq!(method(&ConfigInputs { syncfs_tells_errors: false, ..inputs() }), None);
        let wish = parameters(&[("recovery_init_sync_method", Some("fsync"))]);
        assert_eq!(method(&ConfigInputs { parameters: wish, ..inputs() }).as_deref(), Some("fsync"));
        for (release, tells) in [("6.1.0-18-amd64", true), ("5.8.0", true), ("5.7.19", false), ("4.18.0-553.el8", false), ("new", false)] {
            assert_eq!(syncfs_tells_errors(release), tells, "{release}");
        }
    }

    proptest! {
        #[test]
        fn a_value_comes_out_as_it_went_in_and_stays_on_its_line(value in "[^\0]{0,60}") {
            let quoted = quote(&value).unwrap();
            prop_assert!(!quoted.contains('\n'));
            prop_assert_eq!(unquote(&quoted), value);
        }

        #[test]
        fn row_76_no_hostile_name_becomes_a_line(name in ".{0,20}") {
            let mut inputs = inputs();
            inputs.parameters = parameters(&[(&name, Some("1"))]);
            if let Ok(configuration) = postgresql_conf(&inputs) {
                prop_assert!(is_name(&name));
                prop_assert!(values(&configuration.text).contains_key(&name.to_ascii_lowercase()));
            }
        }
    }

    #[test]
    fn the_member_wins_over_the_cluster_and_null_is_postgresqls_default() {
        let mut inputs = inputs();
        inputs.parameters = parameters(&[("Work_Mem", Some("8MB")), ("max_connections", Some("200")), ("wal_keep_size", None)]);
        inputs.member_parameters = parameters(&[("work_mem", Some("16MB"))]);
        let values = values(&postgresql_conf(&inputs).unwrap().text);
        assert_eq!(values["work_mem"], "16MB");
        assert_eq!(values["max_connections"], "200");
        assert!(!values.contains_key("wal_keep_size"));
    }

    /// PostgreSQL's own: 5 s between two attempts to reach a primary, a minute until a silent one is given up, hours for a dead connection.
    #[test]
    fn row_58_a_standby_tries_to_reach_its_new_primary_five_times_a_second_and_notices_within_seconds_that_one_is_silent() {
        let mut inputs = inputs();
        let of = |inputs: &ConfigInputs| values(&postgresql_conf(inputs).unwrap().text);
        let defaults = of(&inputs);
        for (name, value) in [
            ("wal_retrieve_retry_interval", "200ms"),
            ("wal_receiver_timeout", "15s"),
            ("wal_sender_timeout", "15s"),
            ("tcp_keepalives_idle", "10s"),
            ("tcp_keepalives_interval", "5s"),
            ("tcp_keepalives_count", "3"),
        ] {
            assert_eq!(defaults.get(name).map(String::as_str), Some(value), "{name}");
        }
        inputs.parameters = parameters(&[("wal_retrieve_retry_interval", Some("3s"))]);
        assert_eq!(of(&inputs)["wal_retrieve_retry_interval"], "3s", "a document that says otherwise is obeyed");
    }

    #[test]
    fn what_pgherd_owns_is_said_once_whatever_the_spec_says() {
        let mut inputs = inputs();
        inputs.parameters = parameters(&[("hot_standby", Some("off")), ("PORT", Some("1")), ("recovery_target_timeline", Some("1"))]);
        let text = postgresql_conf(&inputs).unwrap().text;
        let values = values(&text);
        assert_eq!((values["hot_standby"].as_str(), values["port"].as_str()), ("on", "5432"));
        assert_eq!(values["recovery_target_timeline"], "latest");
        assert_eq!(values["listen_addresses"], "10.0.12.9,127.0.0.1");
        assert_eq!(values["unix_socket_directories"], "\"/run/pg, herd\"");
        assert_eq!(text.matches("hot_standby").count(), 1);
        assert!(command_line(&inputs).contains(&("hot_standby".into(), "on".into())));
        assert!(owned_elsewhere("Primary_ConnInfo").is_some() && owned_elsewhere("work_mem").is_none());
    }

    #[test]
    fn a_standby_never_starts_below_what_its_primary_had() {
        let mut inputs = inputs();
        inputs.parameters = parameters(&[("max_connections", Some("50")), ("max_wal_senders", None), ("max_worker_processes", Some("9"))]);
        inputs.floor = Some(StandbyFloor {
            max_connections: 200,
            max_worker_processes: 8,
            max_wal_senders: 12,
            max_prepared_transactions: 5,
            max_locks_per_transaction: 64,
        });
        let configuration = postgresql_conf(&inputs).unwrap();
        let values = values(&configuration.text);
        assert_eq!(values["max_connections"], "200");
        assert_eq!(values["max_wal_senders"], "12");
        assert_eq!(values["max_prepared_transactions"], "5");
        assert_eq!(values["max_worker_processes"], "9");
        let raised: Vec<_> = configuration.raised.iter().map(|one| (one.name.as_str(), one.wanted, one.used)).collect();
        assert_eq!(raised, [("max_connections", 50, 200), ("max_wal_senders", 10, 12), ("max_prepared_transactions", 0, 5)]);
    }

    #[test]
    fn the_archive_is_on_exactly_when_there_is_a_command() {
        let mut inputs = inputs();
        assert_eq!(values(&postgresql_conf(&inputs).unwrap().text)["archive_mode"], "off");
        inputs.archive_command = Some("cp %p '/a b/%f'".into());
        let values = values(&postgresql_conf(&inputs).unwrap().text);
        assert_eq!((values["archive_mode"].as_str(), values["archive_command"].as_str()), ("on", "cp %p '/a b/%f'"));
    }

    #[test]
    fn every_default_and_every_owned_name_is_a_name_once() {
        let names: BTreeSet<&str> = DEFAULTS.iter().map(|(name, _)| *name).chain(OWNED.iter().map(|(name, _)| *name)).collect();
        assert_eq!(names.len(), DEFAULTS.len() + OWNED.len());
        assert!(names.iter().all(|name| is_name(name)));
        for (name, _) in owned(&inputs()) {
            assert!(owned_elsewhere(name).is_some() || name.starts_with("log"), "{name} is owned, so a spec must not set it");
        }
    }

    #[test]
    fn loopback_is_added_only_where_it_is_missing() {
        for (listen, addresses) in
            [("*", "*"), ("10.0.0.1", "10.0.0.1,127.0.0.1"), ("127.0.0.5", "127.0.0.5"), ("a, localhost", "a,localhost")]
        {
            assert_eq!(listen_addresses(listen), addresses);
        }
    }
}
