//! Every endpoint x role x method, as PATRONI's documentation and source have it, and where pgherd is stricter.

use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::facts::guard::{PostmasterFacts, Rung, StartId, Word};
use crate::facts::postgres::{Probe, ProbeOutcome};
use crate::http::testing::{at, moment, primary, replica, seen, start, stopped};
use crate::types::Lsn;

fn query(text: &str) -> Vec<(String, String)> {
    text.split('&').filter_map(|pair| pair.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn ask(snapshot: &Snapshot, moment: Moment, method: &Method, target: &str) -> Answer {
    let (path, parameters) = target.split_once('?').unwrap_or((target, ""));
    answer(snapshot, moment, method, path, &query(parameters))
}

fn status(snapshot: &Snapshot, target: &str) -> u16 {
    ask(snapshot, moment(), &Method::GET, target).status
}

fn body(snapshot: &Snapshot, target: &str) -> Value {
    match ask(snapshot, moment(), &Method::GET, target).body {
        Body::Json(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("{target}: {other:?}"),
    }
}

/// Path; its GET status on a primary, a replica, a stopped member; whether HEAD and OPTIONS know it.
const TABLE: &[(&str, u16, u16, u16, bool)] = &[
    ("/", 200, 503, 503, true),
    ("/primary", 200, 503, 503, true),
    ("/master", 200, 503, 503, true),
    ("/leader", 200, 503, 503, true),
    ("/read-write", 200, 503, 503, true),
    ("/standby-leader", 503, 503, 503, true),
    ("/standby_leader", 503, 503, 503, true),
    ("/replica", 503, 200, 503, true),
    ("/read-only", 200, 200, 503, true),
    ("/health", 200, 200, 503, true),
    ("/sync", 503, 503, 503, true),
    ("/synchronous", 503, 503, 503, true),
    ("/quorum", 503, 503, 503, true),
    ("/async", 503, 200, 503, true),
    ("/asynchronous", 503, 200, 503, true),
    ("/read-only-sync", 200, 503, 503, true),
    ("/read-only-synchronous", 200, 503, 503, true),
    ("/read-only-quorum", 200, 503, 503, true),
    ("/no-such-path", 503, 503, 503, true),
    ("/my-master-db", 200, 503, 503, true),
    ("/replica/x", 503, 200, 503, true),
    ("/healthz", 200, 200, 503, true),
    ("/liveness", 200, 200, 200, false),
    ("/readiness", 200, 200, 503, false),
    ("/patroni", 200, 200, 200, false),
    ("/cluster", 200, 200, 200, false),
    ("/history", 200, 200, 200, false),
    ("/config", 200, 200, 200, false),
    ("/metrics", 200, 200, 200, false),
    ("/failsafe", 502, 502, 502, false),
    ("/pgherd/serves", 200, 200, 200, false),
    ("/pgherd/writable", 200, 200, 200, false),
];

#[test]
fn every_path_answers_as_the_table_says_for_every_role_and_method() {
    for (path, on_primary, on_replica, on_stopped, known_to_head) in TABLE {
        for (who, snapshot, expected) in
            [("primary", primary(), on_primary), ("replica", replica(), on_replica), ("stopped", stopped(), on_stopped)]
        {
            assert_eq!(status(&snapshot, path), *expected, "GET {path} on a {who}");
            for method in [Method::HEAD, Method::OPTIONS] {
                let answer = ask(&snapshot, moment(), &method, path);
                assert_eq!(answer.status, if *known_to_head { *expected } else { 503 }, "{method} {path} on a {who}");
                assert_eq!(answer.body, Body::Empty, "{method} {path} on a {who}");
            }
            for method in [Method::PUT, Method::POST, Method::PATCH, Method::DELETE] {
                assert_eq!(ask(&snapshot, moment(), &method, path).status, 403, "{method} {path} on a {who}");
            }
            assert_eq!(ask(&snapshot, moment(), &Method::TRACE, path).status, 501, "TRACE {path} on a {who}");
        }
    }
}

const LEADER_PATHS: [&str; 5] = ["/", "/primary", "/master", "/leader", "/read-write"];

fn assert_no_leader_path_answers(snapshot: &Snapshot, moment: Moment, why: &str) {
    for path in LEADER_PATHS.iter().chain(&["/read-only-sync", "/read-only-quorum"]) {
        assert_eq!(ask(snapshot, moment, &Method::GET, path).status, 503, "{path}: {why}");
        assert_eq!(ask(snapshot, moment, &Method::OPTIONS, path).status, 503, "OPTIONS {path}: {why}");
    }
}

#[test]
fn i13_leader_paths_turn_to_503_at_a_by_the_clock_alone() {
    let mut snapshot = primary();
    let announce = snapshot.lock.unwrap().announce_at;
    snapshot.probe.as_mut().unwrap().begun = announce;
    let just_before = Moment { boot: announce.before(Duration::from_nanos(1)), ..moment() };
    assert_eq!(ask(&snapshot, just_before, &Method::GET, "/primary").status, 200);
    assert_no_leader_path_answers(&snapshot, Moment { boot: announce, ..moment() }, "A has come");
}

#[test]
fn i13_leader_paths_need_a_probe_not_older_than_loop_wait() {
    let snapshot = primary();
    assert_eq!(ask(&snapshot, at(snapshot.loop_wait), &Method::GET, "/primary").status, 200);
    assert_no_leader_path_answers(&snapshot, at(snapshot.loop_wait + Duration::from_nanos(1)), "the probe is too old");
}

#[test]
fn i13_leader_paths_need_our_lock_and_a_server_out_of_recovery_that_accepts() {
    let mut without_lock = primary();
    without_lock.lock = None;
    assert_no_leader_path_answers(&without_lock, moment(), "no lock of ours, whatever etcd's leader key says");
    let mut in_recovery = primary();
    seen(&mut in_recovery).in_recovery = true;
    assert_no_leader_path_answers(&in_recovery, moment(), "still in recovery");
    for outcome in [ProbeOutcome::NotYet("starting up".to_owned()), ProbeOutcome::Unknown("timed out".to_owned())] {
        let mut down = primary();
        down.probe = Some(Probe { begun: start(), outcome });
        assert_no_leader_path_answers(&down, moment(), "the last probe failed, although one before it succeeded");
    }
    let mut no_probe = primary();
    no_probe.probe = None;
    assert_no_leader_path_answers(&no_probe, moment(), "never probed");
}

#[test]
fn row_19_leader_paths_turn_to_503_before_postgresql_is_told_to_end() {
    let mut snapshot = primary();
    snapshot.ends_postgres = true;
    assert_no_leader_path_answers(&snapshot, moment(), "PostgreSQL has been ordered to end");
}

#[test]
fn a_paused_member_without_etcd_is_no_leader_without_its_lock() {
    let mut snapshot = primary();
    (snapshot.paused, snapshot.etcd_reachable, snapshot.lock) = (true, false, None);
    assert_no_leader_path_answers(&snapshot, moment(), "Patroni would answer from the server's role");
    snapshot.suspends = true;
    assert_eq!(status(&snapshot, "/primary"), 200, "its guard ends nothing, and etcd knows: nobody is elected");
    snapshot.ends_postgres = true;
    assert_no_leader_path_answers(&snapshot, moment(), "PostgreSQL has been ordered to end");
}

#[test]
fn a_replica_with_noloadbalance_serves_no_reads() {
    let mut snapshot = replica();
    snapshot.tags.insert("noloadbalance".to_owned(), Value::Bool(true));
    for path in ["/replica", "/read-only", "/async"] {
        assert_eq!(status(&snapshot, path), 503, "{path}");
    }
    assert_eq!(status(&snapshot, "/health"), 200);
}

#[test]
fn lag_counts_from_the_farthest_known_leader_position_and_bad_values_are_ignored() {
    let mut snapshot = replica();
    for (target, expected) in [("/replica?lag=256", 200), ("/replica?lag=255", 503), ("/replica?lag=16kB", 200), ("/replica?lag=lots", 200)]
    {
        assert_eq!(status(&snapshot, target), expected, "{target}");
    }
    seen(&mut snapshot).walreceiver.as_mut().unwrap().latest_end_lsn = Some(Lsn(0x0300_0100 + 20_000));
    for path in ["/replica", "/read-only", "/async"] {
        assert_eq!(status(&snapshot, &format!("{path}?lag=16kB")), 503, "{path}: the walreceiver knows better than etcd");
        assert_eq!(status(&snapshot, &format!("{path}?lag=20000")), 200, "{path}");
    }
    assert_eq!(status(&primary(), "/read-only?lag=0"), 200, "a leader has no lag");
}

#[test]
fn replication_state_is_compared_when_asked_for() {
    let mut snapshot = replica();
    assert_eq!(status(&snapshot, "/replica?replication_state=streaming"), 200);
    seen(&mut snapshot).walreceiver = None;
    assert_eq!(status(&snapshot, "/replica?replication_state=streaming"), 503);
    assert_eq!(status(&snapshot, "/replica"), 200);
}

#[test]
fn tags_are_compared_on_read_paths_and_ignored_on_leader_paths() {
    let mut snapshot = replica();
    snapshot.tags.insert("site".to_owned(), Value::from("South"));
    snapshot.tags.insert("clonefrom".to_owned(), Value::Bool(true));
    for (target, expected) in [
        ("/replica?tag_site=South", 200),
        ("/replica?tag_site=south", 503),
        ("/replica?tag_clonefrom=true", 200),
        ("/replica?tag_clonefrom=True", 503),
        ("/replica?tag_missing=1", 503),
        ("/replica?tag_missing=", 200),
        ("/health?tag_site=North", 503),
        ("/replica?tag_site=South&tag_clonefrom=false", 503),
    ] {
        assert_eq!(status(&snapshot, target), expected, "{target}");
    }
    assert_eq!(status(&primary(), "/primary?tag_missing=1"), 200);
}

#[test]
fn async_needs_etcd_since_only_etcd_says_who_is_synchronous() {
    let mut snapshot = replica();
    snapshot.etcd_reachable = false;
    assert_eq!(status(&snapshot, "/async"), 503);
    assert_eq!(status(&snapshot, "/replica"), 200);
}

#[test]
fn liveness_follows_the_loop_and_not_postgresql() {
    let live = |snapshot: &Snapshot, span| ask(snapshot, at(span), &Method::GET, "/liveness").status;
    let (leader, follower) = (primary(), replica());
    assert_eq!((live(&leader, leader.ttl), live(&leader, leader.ttl + Duration::from_millis(1))), (200, 503));
    assert_eq!((live(&follower, follower.ttl * 2), live(&follower, follower.ttl * 3)), (200, 503));
    let mut paused = primary();
    paused.paused = true;
    assert_eq!(live(&paused, Duration::from_secs(3600)), 200);
}

#[test]
fn readiness_of_a_replica_needs_streaming_and_a_known_small_lag() {
    let mut snapshot = replica();
    assert_eq!(status(&snapshot, "/readiness?lag=255"), 503);
    assert_eq!(status(&snapshot, "/readiness?lag=255&mode=write"), 200, "all is received");
    snapshot.etcd_reachable = false;
    assert_eq!(status(&snapshot, "/readiness"), 200, "the walreceiver still says where the leader is");
    seen(&mut snapshot).walreceiver.as_mut().unwrap().latest_end_lsn = None;
    assert_eq!(status(&snapshot, "/readiness"), 503);
    let mut waiting = replica();
    "waiting".clone_into(&mut seen(&mut waiting).walreceiver.as_mut().unwrap().status);
    assert_eq!(status(&waiting, "/readiness"), 503);
}

#[test]
fn the_body_of_a_health_path_is_that_of_patroni_and_carries_its_age() {
    let snapshot = primary();
    let later = at(Duration::from_millis(1500));
    let answer = ask(&snapshot, later, &Method::GET, "/primary");
    assert_eq!(answer.age_ms, 1500);
    assert_eq!(answer.body, ask(&snapshot, later, &Method::GET, "/patroni").body);
    let body = body(&snapshot, "/patroni");
    assert_eq!(body["state"], "running");
    assert_eq!(body["role"], "primary");
    assert_eq!(body["xlog"]["location"], 0x0300_0200);
    assert_eq!(body["timeline"], 3);
    assert_eq!(body["patroni"]["scope"], "main");
    assert_eq!(body["patroni"]["name"], "mdw");
    assert_eq!(body["database_system_identifier"], "7512345678901234567");
    assert_eq!(body["dcs_last_seen"], 1_795_351_950);
    assert!(body.get("cluster_unlocked").is_none());
}

#[test]
fn row_17_a_member_that_cannot_ask_etcd_says_that_it_is_degraded_and_still_serves() {
    for (member, path) in [(primary(), "/primary"), (replica(), "/replica")] {
        assert_eq!(body(&member, path)["pgherd"]["degraded"], false, "{path}");
        let mut cut_off = member;
        cut_off.etcd_reachable = false;
        for asked in [path, "/health", "/patroni"] {
            assert_eq!(status(&cut_off, asked), 200, "{asked}");
            assert_eq!(body(&cut_off, asked)["pgherd"]["degraded"], true, "{asked}");
        }
    }
}

#[test]
fn a_server_that_cannot_be_asked_is_unknown_and_has_no_positions() {
    let mut snapshot = primary();
    snapshot.probe = Some(Probe { begun: start(), outcome: ProbeOutcome::Unknown("timed out".to_owned()) });
    let body = body(&snapshot, "/patroni");
    assert_eq!(body["state"], "unknown");
    assert!(body.get("xlog").is_none() && body.get("timeline").is_none(), "{body}");
}

#[test]
fn cluster_and_history_need_an_answer_of_etcd_and_say_its_age() {
    let mut snapshot = replica();
    let answer = ask(&snapshot, at(Duration::from_secs(7)), &Method::GET, "/cluster");
    assert_eq!((answer.status, answer.age_ms), (200, 7000));
    snapshot.view = None;
    assert_eq!(status(&snapshot, "/cluster"), 503);
    assert_eq!(status(&snapshot, "/history"), 503);
}

#[test]
fn config_without_a_spec_is_502() {
    let mut snapshot = replica();
    assert_eq!(body(&snapshot, "/config")["ttl"], 10);
    snapshot.observed_generation = 0;
    assert_eq!(status(&snapshot, "/config"), 502);
}

#[test]
fn metrics_have_patronis_names_and_labels() {
    let Body::Text(text) = ask(&primary(), moment(), &Method::GET, "/metrics").body else { panic!("metrics are text") };
    for line in [
        r#"patroni_primary{scope="main",name="mdw"} 1"#,
        r#"patroni_replica{scope="main",name="mdw"} 0"#,
        r#"patroni_xlog_location{scope="main",name="mdw"} 50332160"#,
        r#"patroni_postgres_state{scope="main",name="mdw"} 5"#,
        r#"patroni_postgres_timeline{scope="main",name="mdw"} 3"#,
        r#"pgherd_lock_seconds_left{scope="main",name="mdw"} 30.0"#,
        r#"pgherd_promotions_total{scope="main",name="mdw"} 0"#,
        r#"pgherd_machine_state{scope="main",name="mdw",state="primary"} 1"#,
        r#"pgherd_copy_bytes{scope="main",name="mdw",part="done"} 0"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[test]
fn whoever_may_have_a_writable_server_says_so_and_not_knowing_is_null() {
    let writable = |snapshot: &Snapshot| body(snapshot, "/pgherd/writable")["writable"].clone();
    assert_eq!(writable(&primary()), Value::Bool(true));
    assert_eq!(writable(&replica()), Value::Bool(false));
    assert_eq!(writable(&stopped()), Value::Bool(false));
    let mut no_guard = stopped();
    no_guard.postmaster = None;
    assert_eq!(writable(&no_guard), Value::Null);
    let mut by_hand = replica();
    seen(&mut by_hand).in_recovery = false;
    assert_eq!(writable(&by_hand), Value::Bool(true), "promoted by hand");
    let ending = |word| PostmasterFacts::Ending { start: StartId(1), rung: Rung::KillAll, word };
    assert_eq!(
        writable(&Snapshot { postmaster: Some(ending(Word::Standby)), ..stopped() }),
        Value::Bool(false),
        "nobody waits for a standby"
    );
    assert_eq!(writable(&Snapshot { unguarded: true, ..no_guard }), Value::Bool(true), "nobody has looked yet what is left");
    let about_to_write = Snapshot { lock: primary().lock, ..replica() };
    assert_eq!(writable(&about_to_write), Value::Bool(true), "it is being promoted");
    for left in [ending(Word::Writable), PostmasterFacts::Unclaimed { pids: vec![7] }] {
        let not_dead = Snapshot { postmaster: Some(left), ..stopped() };
        assert_eq!(writable(&not_dead), Value::Bool(true), "a former primary's processes are not proved dead (seed 16708)");
    }
    assert_eq!(body(&primary(), "/pgherd/writable")["epoch"], 40);
}

#[test]
fn an_old_no_is_not_a_no() {
    let snapshot = replica();
    let answer = ask(&snapshot, at(snapshot.loop_wait + Duration::from_secs(1)), &Method::GET, "/pgherd/writable");
    let Body::Json(text) = answer.body else { panic!("{answer:?}") };
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["writable"], Value::Null);
}

#[test]
fn what_a_member_serves_is_told_to_routing_and_a_doubt_is_not_a_no() {
    let serves = |snapshot: &Snapshot| {
        let body = body(snapshot, "/pgherd/serves");
        [body["primary"].as_bool(), body["replica"].as_bool()]
    };
    assert_eq!(serves(&primary()), [Some(true), Some(false)]);
    assert_eq!(serves(&replica()), [Some(false), Some(true)]);
    assert_eq!(serves(&stopped()), [Some(false), Some(false)]);
    let leaves = Snapshot { ends_postgres: true, ..primary() };
    assert_eq!(serves(&leaves), [Some(false), Some(false)], "sessions are on their way out");
    let with_doubt = |change: fn(&mut Snapshot)| {
        let mut snapshot = primary();
        change(&mut snapshot);
        serves(&snapshot)[0]
    };
    let failed = Probe { begun: start(), outcome: ProbeOutcome::Unknown("no answer".to_owned()) };
    assert_eq!(serves(&Snapshot { probe: Some(failed), ..primary() }), [None, None], "one probe that failed");
    assert_eq!(with_doubt(|snapshot| snapshot.lock = None), None, "a daemon that starts beside a primary has no proof yet");
    assert_eq!(with_doubt(|snapshot| snapshot.closed = true), None);
    assert_eq!(with_doubt(|snapshot| snapshot.postmaster = None), Some(true), "as /primary says");
    let mut by_hand = replica();
    seen(&mut by_hand).in_recovery = false;
    assert_eq!(serves(&by_hand), [Some(false), Some(false)], "promoted by hand");
    let mut spared = replica();
    spared.tags.insert("noloadbalance".to_owned(), Value::Bool(true));
    assert_eq!(serves(&spared), [Some(false), Some(false)]);
}

#[test]
fn what_a_member_that_hangs_knew_is_no_word_and_from_a_on_it_says_yes_no_more() {
    let word = |snapshot: &Snapshot, after| {
        let Body::Json(text) = ask(snapshot, at(after), &Method::GET, "/pgherd/serves").body else { panic!("no JSON") };
        let body: Value = serde_json::from_str(&text).unwrap();
        [body["primary"].as_bool(), body["replica"].as_bool()]
    };
    assert_eq!(word(&replica(), replica().loop_wait + Duration::from_secs(1)), [None, None]);
    let a = primary().lock.unwrap().announce_at.since(start());
    let probed_just_now = Snapshot { loop_wait: a * 2, ..primary() };
    assert_eq!(word(&probed_just_now, a - Duration::from_millis(1)), [Some(true), Some(false)]);
    assert_eq!(word(&probed_just_now, a), [None, Some(false)], "a proof may still come, and the sessions are not cut before the fast stop");
}

#[test]
fn a_member_that_knows_nothing_fails_every_health_path() {
    let snapshot = Snapshot::unknown(start(), "mdw".parse().unwrap(), "main".parse().unwrap());
    for (path, ..) in TABLE.iter().filter(|row| row.4) {
        assert_eq!(status(&snapshot, path), 503, "{path}");
    }
}
