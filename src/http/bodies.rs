//! The JSON bodies, with Patroni's keys and words (Patroni 4.1 REST API), and under `pgherd` what is our own.
//!
//! A position that was not read in a fresh probe is left out, or `"unknown"` in `/cluster`: never the value it had before.

use serde_json::{Map, Value, json};

use crate::facts::cluster::{ClusterView, MemberKey, MemberRole};
use crate::facts::postgres::SqlFacts;
use crate::http::answer::Moment;
use crate::http::health;
use crate::http::snapshot::Snapshot;
use crate::types::Lsn;

/// The Patroni API that is spoken here. Tools (check_patroni) choose key names and states by it.
pub const PATRONI_API_VERSION: &str = "4.1.0";

/// Patroni's word for the state: `running` only if a fresh probe saw it.
pub fn state_word(snapshot: &Snapshot, moment: Moment) -> &str {
    let said_running = matches!(snapshot.state.as_str(), "running" | "streaming" | "in archive recovery");
    match (health::is_running(snapshot, moment.boot), said_running) {
        (true, _) => "running",
        (false, true) => "unknown",
        (false, false) => &snapshot.state,
    }
}

/// Patroni's word for the role.
pub fn role_word(role: MemberRole) -> &'static str {
    match role {
        MemberRole::Primary => "primary",
        MemberRole::Replica => "replica",
        MemberRole::Uninitialized => "uninitialized",
    }
}

/// `/patroni` and the health paths.
pub fn member(snapshot: &Snapshot, moment: Moment) -> Value {
    let now = moment.boot;
    let mut body = Map::new();
    body.insert("state".to_owned(), json!(state_word(snapshot, moment)));
    body.insert("role".to_owned(), json!(role_word(snapshot.role)));
    if let Some(version) = snapshot.server_version_num {
        body.insert("server_version".to_owned(), json!(version));
    }
    if let Some(sql) = snapshot.fresh_sql(now) {
        server(&mut body, sql);
    }
    if let Some(word) = health::replication_state(snapshot, now) {
        body.insert("replication_state".to_owned(), json!(word));
    }
    if snapshot.paused {
        body.insert("pause".to_owned(), json!(true));
    }
    if snapshot.view.as_ref().is_none_or(|(_, view)| view.leader.is_none()) {
        body.insert("cluster_unlocked".to_owned(), json!(true));
    }
    if snapshot.leads_without_etcd(now) {
        body.insert("failsafe_mode_is_active".to_owned(), json!(true));
    }
    if let Some(seen) = dcs_last_seen(snapshot, moment) {
        body.insert("dcs_last_seen".to_owned(), json!(seen));
    }
    if !snapshot.tags.is_empty() {
        body.insert("tags".to_owned(), json!(snapshot.tags));
    }
    if !snapshot.pending_restart.is_empty() {
        body.insert("pending_restart".to_owned(), json!(true));
        let reasons: Map<_, _> = snapshot.pending_restart.iter().map(|name| (name.clone(), json!({}))).collect();
        body.insert("pending_restart_reason".to_owned(), Value::Object(reasons));
    }
    if let Some(id) = snapshot.system_id {
        body.insert("database_system_identifier".to_owned(), json!(id));
    }
    let scope = json!({ "version": PATRONI_API_VERSION, "scope": snapshot.cluster, "name": snapshot.member });
    body.insert("patroni".to_owned(), scope);
    body.insert("pgherd".to_owned(), own(snapshot, moment));
    Value::Object(body)
}

fn server(body: &mut Map<String, Value>, sql: &SqlFacts) {
    body.insert("postmaster_start_time".to_owned(), json!(sql.postmaster_start_time));
    body.insert("timeline".to_owned(), json!(sql.timeline));
    let xlog = if sql.in_recovery {
        let (received, replayed) = (sql.receive_lsn.0, sql.replay_lsn.0);
        json!({ "received_location": received, "replayed_location": replayed, "replayed_timestamp": null, "paused": sql.replay_paused })
    } else {
        json!({ "location": sql.receive_lsn.0 })
    };
    body.insert("xlog".to_owned(), xlog);
    if !sql.replicas.is_empty() {
        let replicas = sql.replicas.iter().map(|replica| {
            json!({
                "application_name": replica.application_name, "client_addr": replica.client_addr,
                "state": replica.state, "sync_state": replica.sync_state,
            })
        });
        body.insert("replication".to_owned(), Value::Array(replicas.collect()));
    }
}

fn own(snapshot: &Snapshot, moment: Moment) -> Value {
    let age = moment.boot.since(snapshot.taken).as_millis();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "machine_state": snapshot.machine_state,
        "declared": snapshot.declared,
        "observed_generation": snapshot.observed_generation,
        "etcd_reachable": snapshot.etcd_reachable,
        "degraded": health::is_degraded(snapshot),
        "epoch": snapshot.lock.map(|lock| lock.identity.epoch),
        "lock_ms_left": snapshot.lock.map(|lock| u64::try_from(lock.valid_until.since(moment.boot).as_millis()).unwrap_or(u64::MAX)),
        "age_ms": u64::try_from(age).unwrap_or(u64::MAX),
        "conditions": snapshot.conditions,
    })
}

/// When etcd's view was last known to be current, in seconds since 1970.
pub fn dcs_last_seen(snapshot: &Snapshot, moment: Moment) -> Option<u64> {
    let (as_of, _) = snapshot.view.as_ref()?;
    Some(moment.unix_seconds.saturating_sub(moment.boot.since(*as_of).as_secs()))
}

/// `/cluster`: the members that have a key, by name.
pub fn cluster(snapshot: &Snapshot, view: &ClusterView) -> Value {
    let leader_lsn = view.leader_position();
    let is_leader = |name: &str| view.leader.as_ref().is_some_and(|leader| leader.holder == name);
    let members: Vec<_> = view
        .members
        .iter()
        .map(|(name, key)| {
            let role = snapshot.synchronous_role(view, name).unwrap_or("replica");
            cluster_member(name.as_str(), key, if is_leader(name.as_str()) { "leader" } else { role }, leader_lsn)
        })
        .collect();
    let mut body = Map::new();
    body.insert("members".to_owned(), Value::Array(members));
    body.insert("scope".to_owned(), json!(snapshot.cluster));
    if view.maintenance.is_some() {
        body.insert("pause".to_owned(), json!(true));
    }
    Value::Object(body)
}

fn cluster_member(name: &str, key: &MemberKey, role: &str, leader_lsn: Option<Lsn>) -> Value {
    let record = &key.record;
    let mut member = Map::new();
    let mut put = |key: &str, value: Value| member.insert(key.to_owned(), value);
    put("name", json!(name));
    put("role", json!(role));
    put("state", json!(record.state));
    put("api_url", json!(format!("{}/patroni", record.api_url.trim_end_matches('/'))));
    put("host", json!(record.host));
    put("port", json!(record.port));
    if let Some(timeline) = record.timeline {
        put("timeline", json!(timeline));
    }
    if !record.pending_restart.is_empty() {
        put("pending_restart", json!(true));
        put("pending_restart_reason", record.pending_restart.iter().map(|name| (name.clone(), json!({}))).collect::<Map<_, _>>().into());
    }
    if !record.tags.is_empty() {
        put("tags", json!(record.tags));
    }
    if role != "leader" {
        let positions = [("receive", record.receive_lsn), ("replay", record.replay_lsn)];
        for (what, lsn) in positions {
            put(&format!("{what}_lsn"), or_unknown(lsn));
            put(&format!("{what}_lag"), or_unknown(lag(leader_lsn, lsn)));
        }
        let farthest = record.receive_lsn.max(record.replay_lsn);
        put("lsn", or_unknown(farthest));
        put("lag", or_unknown(lag(leader_lsn, farthest)));
    }
    Value::Object(member)
}

fn or_unknown<T: serde::Serialize>(value: Option<T>) -> Value {
    value.map_or_else(|| json!("unknown"), |value| json!(value))
}

fn lag(leader: Option<Lsn>, ours: Option<Lsn>) -> Option<u64> {
    Some(leader?.bytes_since(ours?))
}

/// `/history`: `[timeline that ended, where, why, when, who led next]`; switches that their leader has recorded.
pub fn history(view: &ClusterView) -> Value {
    let switches = view.history.iter().filter_map(|entry| {
        let (parent, lsn) = (entry.parent?, entry.switch_lsn?);
        Some(json!([parent, lsn.0, entry.why, entry.at, entry.member]))
    });
    Value::Array(switches.collect())
}

/// `/config`: the spec in force under Patroni's keys, as far as they mean the same.
pub fn config(snapshot: &Snapshot) -> Value {
    json!({
        "ttl": snapshot.ttl.as_secs(),
        "loop_wait": snapshot.loop_wait.as_secs(),
        "retry_timeout": snapshot.retry_timeout.as_secs(),
        "maximum_lag_on_failover": snapshot.maximum_lag_on_failover,
        "postgresql": { "parameters": snapshot.parameters },
    })
}
