//! What documents may hold, rule by rule, and properties that no document may break.

use proptest::prelude::*;

use super::cluster::ClusterSpec;
use super::node::NodeSpec;
use super::{DOCUMENT_MAX_BYTES, Document, Loaded, Problem, Problems, Severity, cluster, load_any, node};

const HEAD: &str = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n";
const THREE: &str = "  members:\n    - { name: a, address: h1 }\n    - { name: b, address: h2 }\n    - { name: c, address: h3 }\n";
const NODE: &str = "apiVersion: pgherd/v1\nkind: Node\nmetadata: { name: a }\nspec:\n  cluster: main\n  \
                    etcd: { endpoints: [ \"http://127.0.0.1:2379\" ] }\n  postgres:\n    data_dir: /data\n    \
                    superuser: { username: postgres, password_file: /s/superuser }\n    \
                    replication: { username: replicator, password_file: /s/replication }\n";

/// A cluster of three with `rest` in its spec.
fn three(rest: &str) -> Result<Loaded<ClusterSpec>, Problems> {
    cluster::load("test", &format!("{HEAD}{THREE}{rest}"))
}

fn with_node(rest: &str) -> Result<Loaded<NodeSpec>, Problems> {
    node::load("test", &format!("{NODE}{rest}"))
}

/// The one problem of a document.
#[track_caller]
fn only<T: std::fmt::Debug>(outcome: Result<T, Problems>) -> Problem {
    let problems = outcome.expect_err("a problem was expected").0;
    assert_eq!(problems.len(), 1, "{}", Problems(problems));
    problems.into_iter().next().unwrap()
}

#[track_caller]
fn at<T: std::fmt::Debug>(outcome: Result<T, Problems>, path: &str, says: &str) {
    let problem = only(outcome);
    assert_eq!(problem.path, path, "{problem}");
    assert!(problem.to_string().contains(says), "{problem}");
}

#[test]
fn row_60_all_problems_are_reported_at_once_each_with_its_place() {
    let text = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: Main }\nspec:\n  members:\n    - name: a\n      adress: h1\n      \
                port: 0\n  ha:\n    ttl: 5m\n    ttl: 30s\n  replication: { mode: quorm }\n";
    let problems = load_any("c.yaml", text).unwrap_err();
    let places: Vec<String> = problems.0.iter().map(|problem| format!("{}:{} {}", problem.line, problem.column, problem.path)).collect();
    let expected = [
        "3:19 metadata.name",
        "6:7 spec.members[0].address",
        "7:7 spec.members[0].adress",
        "8:13 spec.members[0].port",
        "10:10 spec.ha.ttl",
        "11:5 spec.ha.ttl",
        "12:24 spec.replication.mode",
    ];
    assert_eq!(places, expected, "{problems}");
    let lines: Vec<String> = problems.to_string().lines().map(str::to_owned).collect();
    let known = "name, address, port, api_port, failover_priority, tags";
    assert_eq!(
        lines[2],
        format!("c.yaml:7:7: spec.members[0].adress: there is no such key here; expected one of {known} (did you mean `address`?)")
    );
    assert!(lines[4].ends_with("(did you mean `5min`?)"), "{}", lines[4]);
    assert!(lines[5].ends_with("this key is already on line 10"), "{}", lines[5]);
}

#[test]
fn a_key_in_the_wrong_section_is_shown_the_right_one() {
    at(three("  ttl: 30s\n"), "spec.ttl", "did you mean `spec.ha.ttl`?");
    at(three("  ha: { noloadbalance: true }\n"), "spec.ha.noloadbalance", "did you mean `spec.members[].tags.noloadbalance`?");
}

#[test]
fn row_60_documents_that_are_no_documents_are_rejected_with_a_reason() {
    for (text, says) in [
        ("", "the document is empty"),
        ("# only a comment\n", "the document is empty"),
        ("--- \n...\n", "the document is empty"),
        ("- a\n", "found a list"),
        ("just text", "found `just text`"),
        ("kind: [", "this is not YAML"),
        ("a: b: c", "this is not YAML"),
        ("\u{0}", "this is not YAML"),
        ("kind: Clustr", "did you mean `Cluster`?"),
        ("kind: { a: b }", "this key is missing; expected one of Cluster, Node"),
        ("%YAML 1.1\n---\nkind: Cluster\n", "this is not YAML"),
    ] {
        let problem = only(load_any("test", text));
        assert!(problem.message.contains(says) || problem.hint.as_deref().is_some_and(|hint| hint.contains(says)), "{text:?}: {problem}");
    }
    at(cluster::load("test", NODE), "kind", "expected a Cluster document, found a Node document");
    at(cluster::load("test", &format!("{HEAD}{THREE}---\n{HEAD}{THREE}")), "", "one document per file");
}

#[test]
fn row_60_a_document_of_10_mb_is_rejected_unread() {
    let text = format!("{HEAD}{THREE}# {}\n", "x".repeat(10_000_000));
    at(load_any("test", &text), "", &format!("at most {DOCUMENT_MAX_BYTES}"));
    assert!(cluster::load("test", &text).is_err());
}

#[test]
fn hostile_nesting_and_aliases_are_rejected() {
    at(load_any("test", &"[".repeat(100_000)), "", "this is not YAML");
    at(load_any("test", &"- ".repeat(100_000)), "", "this is not YAML");
    at(three("  ha: &x { ttl: 30s }\n  watchdog: *x\n"), "", "aliases are not used here");
    at(three("  watchdog: *unknown\n"), "", "aliases are not used here");
    at(three("  ha: { ttl: !!str 30s }\n"), "", "tags are not used here");
    at(three("  <<: { ha: { ttl: 30s } }\n"), "spec.<<", "no such key");
}

#[test]
fn row_60_a_wrong_type_names_what_was_expected_and_what_was_found() {
    at(three("  ha: [ a ]\n"), "spec.ha", "found a list");
    at(three("  ha: { ttl: { a: b } }\n"), "spec.ha.ttl", "expected a duration from 3s to 300s, found a mapping of keys");
    at(three("  ha: { ttl: }\n"), "spec.ha.ttl", "found nothing");
    at(three("  ha: { failsafe: on }\n"), "spec.ha.failsafe", "expected true or false, found `on` (did you mean `true`?)");
    at(three("  postgres: { version: 17.4 }\n"), "spec.postgres.version", "expected a whole number from 13 to 99, found `17.4`");
    at(three("  postgres: { version: \"17\" }\n"), "spec.postgres.version", "without quotes");
    at(three("  postgres: { pg_hba: local all all peer }\n"), "spec.postgres.pg_hba", "expected a list");
    at(three("  postgres: { archive_command: 12 }\n"), "spec.postgres.archive_command", "put it in quotes");
    at(cluster::load("test", &format!("{HEAD}  members: {{ a: h1 }}\n")), "spec.members", "expected a list");
}

#[test]
fn a_value_out_of_range_names_the_range() {
    at(three("  ha: { ttl: 2s }\n"), "spec.ha.ttl", "expected a duration from 3s to 300s, found `2s`");
    at(three("  ha: { ttl: 301 }\n"), "spec.ha.ttl", "expected a duration from 3s to 300s, found `301`");
    at(three("  ha: { loop_wait: 61s }\n"), "spec.ha.loop_wait", "from 1s to 60s");
    at(three("  ha: { retry_timeout: 500ms }\n"), "spec.ha.retry_timeout", "from 1s to 60s");
    at(three("  ha: { ttl: 10500ms }\n"), "spec.ha.ttl", "whole seconds");
    at(three("  replication: { basebackup: { max_rate: 31kB } }\n"), "spec.replication.basebackup.max_rate", "from 32kB to 1GB");
}

#[test]
fn an_empty_section_is_as_if_it_were_left_out() {
    let loaded = three("  ha:\n  postgres: { parameters: , pg_ident: }\n  routing: ~\n").unwrap();
    let mut bare = three("").unwrap().spec;
    bare.typed = loaded.spec.typed.clone();
    assert_eq!(loaded.spec, bare);
}

#[test]
fn patronis_old_name_is_taken_with_a_warning() {
    let loaded = three("  ha: { master_start_timeout: 7s }\n").unwrap();
    assert_eq!(loaded.spec.ha.primary_start_timeout.as_secs(), 7);
    assert!(matches!(loaded.warnings.as_slice(), [warning] if warning.path == "spec.ha.master_start_timeout"));
    at(three("  ha: { master_start_timeout: 7s, primary_start_timeout: 8s }\n"), "spec.ha.master_start_timeout", "old name");
}

#[test]
fn row_62_times_that_leave_no_room_are_refused_with_the_inequality() {
    // SAFETY row 62.
    at(three("  ha: { ttl: 3s }\n  watchdog: { mode: required }\n"), "spec.watchdog.mode", "ttl >= 8 s, but ttl = 3s");
    at(
        three("  ha: { ttl: 3s }\n  watchdog: { mode: off, safety_margin: 2s }\n"),
        "spec.watchdog.safety_margin",
        "2.985 s - 2 s - 0 s - 1.3 s = -0.315 s",
    );
    at(
        three("  ha: { ttl: 10s }\n  watchdog: { mode: required, safety_margin: 2s }\n"),
        "spec.watchdog.mode",
        "9.95 s - 2 s - 2 x 2 s < 4.333 s",
    );
    for fits in ["  ha: { ttl: 3s }\n", "  ha: { ttl: 30s }\n  watchdog: { mode: required, safety_margin: 5s }\n", "  ha: { ttl: 300s }\n"]
    {
        assert!(three(fits).is_ok(), "{fits}");
    }
}

#[test]
fn members_that_would_collide_are_refused() {
    let members =
        |second: &str| cluster::load("test", &format!("{HEAD}  members:\n    - {{ name: a-b, address: Host }}\n    - {{ {second} }}\n"));
    at(members("name: a-b, address: h2"), "spec.members[1].name", "another member is called `a-b`");
    at(members("name: a_b, address: h2"), "spec.members[1].name", "once dashes become underscores");
    at(members("name: c, address: host, api_port: 8009"), "spec.members[1].port", "host:5432 is taken already by spec.members[0].port");
    at(members("name: c, address: host, port: 5433"), "spec.members[1].api_port", "spec.members[0].api_port");
    at(members("name: c, address: host, port: 8008, api_port: 8009"), "spec.members[1].port", "spec.members[0].api_port");
    assert!(members("name: c, address: host, port: 5433, api_port: 8009").is_ok());
}

#[test]
fn a_member_that_does_not_stream_needs_an_archive_and_serves_nobody() {
    let load = |tags_a: &str, tags_b: &str, rest: &str| {
        let members =
            format!("    - {{ name: a, address: a, tags: {{ {tags_a} }} }}\n    - {{ name: b, address: b, tags: {{ {tags_b} }} }}\n");
        cluster::load("test", &format!("{HEAD}  members:\n{members}    - {{ name: c, address: c }}\n{rest}"))
    };
    let archive = "  postgres: { restore_command: cp /archive/%f %p }\n";
    let spec = load("nostream: true", "", archive).unwrap().spec;
    assert!(spec.members[0].nofailover(), "it never leads");
    at(load("nostream: true", "", ""), "spec.members[0].tags.nostream", "restore_command, which is missing");
    at(load("nostream: true, replicatefrom: b", "", archive), "spec.members[0].tags.nostream", "asks for the contrary");
    at(load("nostream: true", "replicatefrom: a", archive), "spec.members[1].tags.replicatefrom", "streams from nobody");
}

#[test]
fn a_cluster_that_nobody_may_lead_is_warned_of() {
    let text = "  members: [ { name: a, address: h1, failover_priority: 0 }, { name: b, address: h2, tags: { nofailover: true } } ]\n";
    let warnings = cluster::load("test", &format!("{HEAD}{text}")).unwrap().warnings;
    assert!(matches!(warnings.as_slice(), [warning] if warning.path == "spec.members"), "{warnings:?}");
}

#[test]
fn replication_that_goes_round_in_a_circle_is_refused() {
    let members = |a: &str, b: &str| {
        let member = |name: &str, from: &str| format!("    - {{ name: {name}, address: {name}, tags: {{ replicatefrom: {from} }} }}\n");
        cluster::load("test", &format!("{HEAD}  members:\n    - {{ name: c, address: c }}\n{}{}", member("a", a), member("b", b)))
    };
    assert!(members("c", "a").is_ok());
    let circle = members("b", "a").unwrap_err();
    assert_eq!(circle.errors().count(), 2);
    assert!(circle.to_string().contains("a would replicate from itself: a -> b -> a"), "{circle}");
    at(members("a", "c"), "spec.members[1].tags.replicatefrom", "a would replicate from itself: a -> a");
    at(members("c", "cc"), "spec.members[2].tags.replicatefrom", "there is no member `cc` (did you mean `c`?)");
}

#[test]
fn slots_and_senders_must_be_enough_for_the_members() {
    let parameters = |text: &str| three(&format!("  postgres: {{ parameters: {{ {text} }} }}\n"));
    at(parameters("max_wal_senders: 3"), "spec.postgres.parameters.max_wal_senders", "2 standbys and 2 for a clone need 4");
    at(parameters("max_replication_slots: 1"), "spec.postgres.parameters.max_replication_slots", "1 is too few");
    at(parameters("max_wal_senders: ten"), "spec.postgres.parameters.max_wal_senders", "expected a whole number");
    assert!(parameters("max_wal_senders: 4, max_replication_slots: 2").is_ok());
    let slots = |text: &str| three(&format!("  replication: {{ slots: {{ {text} }} }}\n"));
    at(slots("a: { type: physical }"), "spec.replication.slots.a", "member a's own slot");
    at(slots("s: { type: logical }"), "spec.replication.slots.s", "needs database and plugin");
    at(slots("s: { type: logical, database: d, plugin: pgoutput }"), "spec.replication.slots.s", "wal_level: logical");
    at(slots("s: { type: physical, database: d }"), "spec.replication.slots.s", "neither database nor plugin");
    at(slots("\"s'\": { type: physical }"), "spec.replication.slots.s\\'", "lower-case letters");
}

#[test]
fn more_synchronous_standbys_than_there_are_standbys_is_refused() {
    let path = "spec.replication.synchronous_node_count";
    at(
        three("  replication: { mode: sync, synchronous_node_count: 3 }\n"),
        path,
        "3 standbys must hold each commit, but 3 members leave 2",
    );
    at(three("  replication: { synchronous_node_count: 3 }\n"), path, "leave 2");
    assert!(three("  replication: { mode: quorum, synchronous_node_count: 2 }\n").is_ok());
    at(
        three("  replication: { mode: quorum, synchronous_node_count: 2, use_slots: false }\n"),
        "spec.replication.use_slots",
        "each member needs its slot",
    );
    assert!(three("  replication: { mode: async, synchronous_node_count: 3 }\n").is_ok());
}

#[test]
fn methods_must_exist() {
    at(three("  bootstrap: { method: intidb }\n"), "spec.bootstrap.method", "did you mean `initdb`?");
    at(three("  replication: { create_replica_methods: [ restore ] }\n"), "spec.replication.create_replica_methods[0]", "found `restore`");
    at(three("  bootstrap: { custom: { restore: { command: [] } } }\n"), "spec.bootstrap.custom.restore.command", "expected a program");
    assert!(three("  bootstrap: { method: restore, custom: { restore: { command: [ /bin/restore, x ] } } }\n").is_ok());
}

#[test]
fn client_rules_that_postgresql_could_not_read_are_refused() {
    let hba = |line: &str| three(&format!("  postgres:\n    pg_hba:\n      - {line}\n"));
    at(hba("host all all 10.0.0.0/8 scram"), "spec.postgres.pg_hba[0]", "no authentication method");
    at(hba("host all all {member} scram-sha-256"), "spec.postgres.pg_hba[0]", "did you mean `{members}`?");
    at(hba("\"host all all all trust\\nlocal all all trust\""), "spec.postgres.pg_hba[0]", "`\\n` may not be in here");
    at(hba("local all all peer \\"), "spec.postgres.pg_hba[0]", "continued");
    assert!(hba("\"hostssl\\tall all {members}\\tscram-sha-256 clientcert=verify-full # ours\"").is_ok());
    at(three("  postgres: { pg_ident: [ \"a b\" ] }\n"), "spec.postgres.pg_ident[0]", "expected a map name");
}

#[test]
fn a_virtual_address_that_cannot_reach_a_member_is_warned_of() {
    let text = "  members: [ { name: a, address: 10.0.12.9 }, { name: b, address: 10.0.16.11 } ]\n  \
                routing: { vip: { address: 10.0.12.10/24, virtual_router_id: 51 } }\n";
    let loaded = cluster::load("test", &format!("{HEAD}{text}")).unwrap();
    assert!(matches!(loaded.warnings.as_slice(), [warning] if warning.message.starts_with("b (10.0.16.11) is not in the network")));
    let wide = cluster::load("test", &format!("{HEAD}{}", text.replace("10.0.12.10/24", "10.0.12.10/20")));
    assert_eq!(wide.unwrap().warnings.len(), 1, "10.0.16.0/20 begins where 10.0.0.0/20 has ended");
    at(three("  routing: { vip: { address: 10.0.12.10, virtual_router_id: 1 } }\n"), "spec.routing.vip.address", "prefix length");
    at(three("  routing: { haproxy: { read_port: 5000 } }\n"), "spec.routing.haproxy.read_port", "port 5000 is taken already");
}

#[test]
fn runtime_sockets_of_haproxy_are_a_few_paths_that_a_socket_can_have() {
    let sockets = |list: &str| with_node(&format!("  routing: {{ haproxy_sockets: [ {list} ] }}\n"));
    let key = "spec.routing.haproxy_sockets";
    assert_eq!(sockets("/run/haproxy/admin.sock").unwrap().spec.routing.haproxy_sockets.len(), 1);
    at(sockets("haproxy.sock"), &format!("{key}[0]"), "absolute path");
    at(sockets("/run/a.sock, /run/a.sock"), &format!("{key}[1]"), "in the list already");
    at(sockets(&format!("/run/{}", "x".repeat(103))), &format!("{key}[0]"), "at most 107 bytes");
    at(sockets(&(0..9).map(|n| format!("/run/{n}.sock")).collect::<Vec<_>>().join(", ")), key, "at most 8");
}

#[test]
fn an_endpoint_that_is_no_url_is_shown_what_was_meant() {
    let endpoint = |text: &str| node::load("test", &NODE.replace("http://127.0.0.1:2379", text));
    at(endpoint("http/127.0.0.1:2379"), "spec.etcd.endpoints[0]", "did you mean `http://127.0.0.1:2379`?");
    at(endpoint("10.0.0.1:2379"), "spec.etcd.endpoints[0]", "did you mean `http://10.0.0.1:2379`?");
    at(endpoint("http://[::1]:2379/"), "spec.etcd.endpoints[0]", "did you mean `http://[::1]:2379`?");
    at(endpoint("https://etcd1:2379"), "spec.etcd.endpoints[0]", "spec.etcd.tls.ca_file");
    for wrong in
        ["", "http://", "http://10.0.0.1", "http://h:0", "http://h:99999", "ftp://h:21", "http://h:+1", "http://a b:1", "http://h:1/v3"]
    {
        at(endpoint(wrong), "spec.etcd.endpoints[0]", "expected a URL");
    }
    assert_eq!(endpoint("http://[::1]:2379").unwrap().warnings, []);
    assert_eq!(endpoint("http://10.0.0.1:2379").unwrap().warnings.len(), 1, "in the clear");
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    for text in [
        NODE.replace("http://127.0.0.1:2379", "http://root:Canary1@127.0.0.1:2379"),
        NODE.replace("/s/superuser", "Canary1"),
        NODE.replace("password_file: /s/superuser", "password: Canary1"),
        NODE.replace("/s/superuser", "[ Canary1 ]"),
    ] {
        let problems = load_any("test", &text).unwrap_err().to_string();
        assert!(!problems.contains("Canary1"), "{problems}");
    }
}

#[test]
fn every_secret_file_is_listed_under_its_key() {
    let spec = with_node("  api: { auth: { username: u, password_file: /s/api } }\n").unwrap().spec;
    let files: Vec<String> = spec.secret_files().into_iter().map(|secret| format!("{} {}", secret.key, secret.file.display())).collect();
    let expected = [
        "spec.api.auth.password_file /s/api",
        "spec.postgres.superuser.password_file /s/superuser",
        "spec.postgres.replication.password_file /s/replication",
    ];
    assert_eq!(files, expected);
}

#[test]
fn a_problem_that_the_caller_found_gets_its_place() {
    let loaded = with_node("").unwrap();
    let problem = loaded.problem(Severity::Warning, "spec.postgres.superuser.password_file", "it is not there".to_owned(), None);
    assert_eq!(problem.to_string(), "test:9:53: warning: spec.postgres.superuser.password_file: it is not there");
}

#[test]
fn directories_in_each_others_way_are_refused() {
    let with = |line: &str| node::load("test", &NODE.replace("    data_dir: /data\n", &format!("    data_dir: /data\n    {line}\n")));
    at(with("wal_dir: /data/wal"), "spec.postgres.wal_dir", "within the data directory");
    at(with("log_dir: /data/log"), "spec.postgres.log_dir", "within the data directory");
    at(with("socket_dir: relative"), "spec.postgres.socket_dir", "absolute path");
    at(with(&format!("socket_dir: /{}", "x".repeat(92))), "spec.postgres.socket_dir", "Unix socket");
    at(with("os_user: root"), "spec.postgres.os_user", "refuses to run as root");
    assert!(with("wal_dir: /data-wal").is_ok());
}

/// Text that somebody hostile might type, as a YAML double-quoted scalar.
fn hostile() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("'".to_owned()),
        Just("\"".to_owned()),
        Just("\n".to_owned()),
        Just("\\".to_owned()),
        Just("\0".to_owned()),
        Just("../".to_owned()),
        Just("'; DROP TABLE t; --".to_owned()),
        Just("$(reboot)".to_owned()),
        Just("{members}".to_owned()),
        "[a-z0-9_./@-]{0,8}",
        "\\PC{0,4}",
    ];
    prop::collection::vec(pieces, 0..4).prop_map(|pieces| pieces.concat())
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn is_safe(text: &str, also: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
}

proptest! {
    #[test]
    fn row_76_no_accepted_cluster_document_yields_a_hostile_name(text in hostile(), place in 0..6) {
        let text = quoted(&text);
        let put = |at: i32, or: &str| if at == place { text.clone() } else { or.to_owned() };
        let document = format!(
            "{{ apiVersion: pgherd/v1, kind: Cluster, metadata: {{ name: {} }}, spec: {{ members: [ {{ name: {}, address: {} }} ], \
             replication: {{ slots: {{ {}: {{ type: physical }} }} }}, postgres: {{ parameters: {{ {}: 1 }} }}, \
             bootstrap: {{ initdb: {{ locale: {} }} }} }} }}",
            put(0, "main"), put(1, "a"), put(2, "h"), put(3, "s"), put(4, "work_mem"), put(5, "C")
        );
        if let Ok(loaded) = cluster::load("test", &document) {
            let spec = loaded.spec;
            prop_assert!(is_safe(spec.name.as_str(), "-"));
            prop_assert!(is_safe(spec.members[0].name.as_str(), "_-"));
            prop_assert!(is_safe(&spec.members[0].address, ".:-_"), "{}", spec.members[0].address);
            prop_assert!(spec.postgres.parameters.keys().all(|name| is_safe(name, "_.")));
            prop_assert!(is_safe(&spec.bootstrap.initdb.locale, "_-.@"));
            let slots = spec.typed.spec.unwrap().replication.unwrap().slots.unwrap();
            prop_assert!(slots.keys().all(|name| is_safe(name, "_")));
        }
    }

    #[test]
    fn row_76_no_accepted_node_document_yields_a_hostile_name(text in hostile(), place in 0..5) {
        let text = quoted(&text);
        let put = |at: i32, or: &str| if at == place { text.clone() } else { or.to_owned() };
        let document = NODE
            .replace("name: a", &format!("name: {}", put(0, "a")))
            .replace("\"http://127.0.0.1:2379\"", &put(1, "\"http://127.0.0.1:2379\""))
            .replace("username: postgres", &format!("username: {}", put(2, "postgres")))
            .replace("data_dir: /data", &format!("data_dir: {}\n    os_user: {}", put(3, "/data"), put(4, "postgres")));
        if let Ok(loaded) = node::load("test", &document) {
            let spec = loaded.spec;
            prop_assert!(is_safe(spec.name.as_str(), "_-"));
            prop_assert!(is_safe(&spec.etcd.endpoints[0], ":/.[]_-"));
            prop_assert!(is_safe(&spec.postgres.superuser.username, "_-.@$"));
            prop_assert!(is_safe(&spec.postgres.os_user, "_-."));
            let data_dir = spec.postgres.data_dir.to_str().unwrap();
            prop_assert!(data_dir.starts_with('/') && !data_dir.contains("..") && !data_dir.contains(['\n', '\0']), "{data_dir}");
        }
    }

    #[test]
    fn parameter_values_are_the_source_text(value in "on|off|yes|0640|12:30|1e3|0x1F|\\.5|TRUE|1_000|[a-z0-9]{1,8}") {
        prop_assume!(value != "null");
        let loaded = three(&format!("  postgres: {{ parameters: {{ search_path: {value} }} }}\n")).unwrap();
        prop_assert_eq!(loaded.spec.postgres.parameters["search_path"].as_deref(), Some(value.as_str()));
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,200}", rest in "[ \n\\-:{}\\[\\]a-z&*!|>'\"%@`#,?]{0,60}") {
        let _ = load_any("test", &text);
        let _ = load_any("test", &rest);
        let _ = cluster::load("test", &format!("{HEAD}{THREE}{rest}"));
    }

    /// The schema and the types are derived from one source; nothing fits the one and not the other.
    #[test]
    fn what_fits_the_schema_fits_the_types(line in 4usize..70, value in "\\[\\]|\\{\\}|null|true|17|-1|text|5min|[0-9]{1,20}|'17'|\\{ a: 1 \\}|\\[ 1, a \\]") {
        let defaults = include_str!("../../specs/defaults.cluster.yaml");
        let mutated: Vec<String> = defaults.lines().enumerate().map(|(at, text)| match text.split_once(": ") {
            Some((key, _)) if at == line => format!("{key}: {value}"),
            _ => text.to_owned(),
        }).collect();
        if let Err(problems) = load_any("test", &mutated.join("\n")) {
            prop_assert!(!problems.to_string().contains("cannot be taken"), "{problems}");
        }
    }
}

#[test]
fn null_is_postgresqls_default_and_quoted_null_is_not() {
    let parameters = three("  postgres: { parameters: { a: null, b: ~, c: , d: \"null\", e: \"\" } }\n").unwrap().spec.postgres.parameters;
    let values: Vec<Option<&str>> = parameters.values().map(Option::as_deref).collect();
    assert_eq!(values, [None, None, None, Some("null"), Some("")]);
}

#[test]
fn a_members_own_parameters_win_over_the_clusters() {
    let text = "  postgres: { parameters: { work_mem: 1MB, temp_buffers: 8MB }, member_parameters: { b: { work_mem: 2MB } } }\n";
    let spec = three(text).unwrap().spec;
    let of = |member: &str| spec.postgres.parameters_of(&member.parse().unwrap())["work_mem"].clone();
    assert_eq!((of("a").as_deref(), of("b").as_deref()), (Some("1MB"), Some("2MB")));
    at(three("  postgres: { member_parameters: { bb: { work_mem: 2MB } } }\n"), "spec.postgres.member_parameters.bb", "did you mean `b`?");
}

#[test]
fn tags_are_shown_as_patroni_shows_them() {
    let text = format!(
        "{HEAD}  members:\n    - {{ name: a, address: h1, failover_priority: 0, tags: {{ noloadbalance: true, clonefrom: false, rack: 12, zone: x }} }}\n    \
         - {{ name: b, address: h2, failover_priority: 2 }}\n"
    );
    let spec = cluster::load("test", &text).unwrap().spec;
    let shown = |index: usize| serde_json::to_string(&spec.members[index].tags_set()).unwrap();
    assert_eq!(shown(0), r#"{"nofailover":true,"noloadbalance":true,"rack":12,"zone":"x"}"#);
    assert_eq!(shown(1), r#"{"failover_priority":2}"#);
}

#[test]
fn load_any_goes_by_the_kind() {
    assert!(matches!(load_any("test", NODE), Ok(Document::Node(_))));
    assert!(matches!(load_any("test", &format!("{HEAD}{THREE}")), Ok(Document::Cluster(_))));
}
