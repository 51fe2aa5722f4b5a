//! Which path answers what: a pure function of snapshot, moment and request. Never waits, never looks anything up.
//!
//! What surprises, and is Patroni's (HAProxy files rely on it): a path that no endpoint owns is matched by SUBSTRING, so `/master-db`
//! is a leader path; an unknown path is 503, not 404; HEAD and OPTIONS know the health paths only, so `HEAD /liveness` is 503.

use axum::http::Method;

use crate::clock::BootTime;
use crate::http::query::Parameters;
use crate::http::snapshot::Snapshot;
use crate::http::{bodies, health, metrics};

/// The time of a request.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// What decides.
    pub boot: BootTime,
    /// Wall clock, seconds since 1970: shown only.
    pub unix_seconds: u64,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: Body,
    /// Age of what the answer was made from.
    pub age_ms: u64,
}

/// An answer's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// None.
    Empty,
    /// `application/json`.
    Json(String),
    /// `text/plain`.
    Text(String),
}

const OK: u16 = 200;
const FORBIDDEN: u16 = 403;
const NOT_IMPLEMENTED: u16 = 501;
const BAD_GATEWAY: u16 = 502;
const UNAVAILABLE: u16 = 503;

/// Why calls that change something are refused.
const READ_ONLY: &str = "this API changes nothing: use the pgherd command (pgherd switchover, pgherd apply, pgherd --help) instead\n";

/// Answers one request.
pub fn answer(snapshot: &Snapshot, moment: Moment, method: &Method, path: &str, parameters: &Parameters) -> Answer {
    let (status, body) = match method.as_str() {
        "GET" => get(snapshot, moment, path, parameters),
        "HEAD" | "OPTIONS" => (code(health_path(snapshot, moment.boot, path, parameters)), Body::Empty),
        "PUT" | "POST" | "PATCH" | "DELETE" => (FORBIDDEN, Body::Text(READ_ONLY.to_owned())),
        _ => (NOT_IMPLEMENTED, Body::Text("only GET, HEAD and OPTIONS are answered\n".to_owned())),
    };
    Answer { status, body, age_ms: age_ms(snapshot, moment, method, path) }
}

fn get(snapshot: &Snapshot, moment: Moment, path: &str, parameters: &Parameters) -> (u16, Body) {
    let now = moment.boot;
    match first_segment(path) {
        "liveness" => (code(health::is_live(snapshot, now)), Body::Empty),
        "readiness" => (code(health::is_ready(snapshot, now, parameters)), Body::Empty),
        "patroni" => (OK, json(&bodies::member(snapshot, moment))),
        "metrics" => match metrics::text(snapshot, moment) {
            Ok(text) => (OK, Body::Text(text)),
            Err(error) => (UNAVAILABLE, Body::Text(format!("metrics cannot be written: {error}\n"))),
        },
        "cluster" => from_view(snapshot, |view| bodies::cluster(snapshot, view)),
        "history" => from_view(snapshot, bodies::history),
        "config" if snapshot.observed_generation == 0 => {
            (BAD_GATEWAY, Body::Text("no spec has been applied: use `pgherd apply`\n".to_owned()))
        }
        "config" => (OK, json(&bodies::config(snapshot))),
        "failsafe" => match snapshot.view.as_ref().and_then(|(_, view)| view.failsafe.as_ref()) {
            Some(record) => (OK, json(&record.members)),
            None => (BAD_GATEWAY, Body::Text("failsafe mode is not in force\n".to_owned())),
        },
        "pgherd" if path.ends_with("/serves") => (OK, json(&health::serves_answer(snapshot, now))),
        "pgherd" if path.ends_with("/writable") => (OK, json(&health::writable(snapshot, now))),
        _ => (code(health_path(snapshot, now, path, parameters)), json(&bodies::member(snapshot, moment))),
    }
}

/// Patroni dispatches on the first segment: `/liveness/x` is `/liveness`.
fn first_segment(path: &str) -> &str {
    path.trim_start_matches('/').split('/').next().unwrap_or_default()
}

fn code(good: bool) -> u16 {
    if good { OK } else { UNAVAILABLE }
}

fn json<T: serde::Serialize>(value: &T) -> Body {
    // What goes in is plain data with text keys: there is nothing in it that JSON cannot hold.
    Body::Json(serde_json::to_string(value).unwrap_or_else(|_| "{}".to_owned()))
}

fn from_view(snapshot: &Snapshot, body: impl Fn(&crate::facts::cluster::ClusterView) -> serde_json::Value) -> (u16, Body) {
    match &snapshot.view {
        Some((_, view)) => (OK, json(&body(view))),
        None => (UNAVAILABLE, Body::Text("etcd has not answered since this daemon started\n".to_owned())),
    }
}

/// What etcd said may be older than the snapshot that carries it.
fn age_ms(snapshot: &Snapshot, moment: Moment, method: &Method, path: &str) -> u64 {
    let of_etcd = *method == Method::GET && matches!(first_segment(path), "cluster" | "history");
    let made = match &snapshot.view {
        Some((as_of, _)) if of_etcd => *as_of,
        _ => snapshot.taken,
    };
    u64::try_from(moment.boot.since(made).as_millis()).unwrap_or(u64::MAX)
}

/// The health handler: by substring in this order, then by exact path. Tags are for paths that spread reads, never for leader paths.
fn health_path(snapshot: &Snapshot, now: BootTime, path: &str, parameters: &Parameters) -> bool {
    let path = if path.trim_matches('/').is_empty() { "/primary" } else { path };
    let has = |word: &str| path.contains(word);
    if has("standby_leader") || has("standby-leader") {
        return false;
    }
    let primary = health::is_primary(snapshot, now);
    if has("leader") || has("master") || has("primary") || has("read-write") {
        return primary;
    }
    let replica = || health::is_serving_replica(snapshot, now, parameters);
    let good = if has("replica") {
        replica()
    } else if has("read-only") && !has("sync") && !has("quorum") {
        primary || replica()
    } else if has("health") {
        health::is_running(snapshot, now)
    } else {
        // Only etcd says for whom commits wait.
        let own = snapshot.current_view().map(|view| snapshot.synchronous_role(view, &snapshot.member));
        let stands_by = |word: &str| own == Some(Some(word)) && replica();
        match path {
            "/async" | "/asynchronous" => own == Some(None) && replica(),
            "/sync" | "/synchronous" => stands_by("sync_standby"),
            "/quorum" => stands_by("quorum_standby"),
            "/read-only-sync" | "/read-only-synchronous" => primary || stands_by("sync_standby"),
            "/read-only-quorum" => primary || stands_by("quorum_standby"),
            _ => false,
        }
    };
    good && health::tags_match(snapshot, parameters)
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
