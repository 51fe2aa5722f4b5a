//! The rules behind the health paths: whether this member may be called primary, replica, live, ready, at this moment.
//!
//! Stricter than Patroni on leader paths: 200 needs our lock, now before A, AND a probe not older than `loop_wait` that saw PostgreSQL
//! accept connections out of recovery, AND no order to end it. In maintenance mode the guard's word stands for the lock: it ends nothing. All are checked against the clock of the request, so a daemon that hangs turns to 503 by
//! itself, before its PostgreSQL is stopped (I13).

use crate::clock::BootTime;
use crate::facts::cluster::MemberRole;
use crate::facts::guard::{PostmasterFacts, Word};
use crate::facts::postgres::STREAMING;
use crate::facts::routing::{Serves, ServesAnswer};
use crate::http::peer::Writable;
use crate::http::query::{self, Parameters};
use crate::http::snapshot::Snapshot;

/// Whether leader paths answer 200.
pub fn is_primary(snapshot: &Snapshot, now: BootTime) -> bool {
    let lock_holds = snapshot.lock.is_some_and(|lock| now < lock.announce_at);
    (lock_holds || snapshot.suspends)
        && !snapshot.ends_postgres
        && !snapshot.closed
        && snapshot.fresh_sql(now).is_some_and(|sql| !sql.in_recovery)
}

/// Whether this member goes on without etcd, or on an etcd that it does not believe (SAFETY row 17): it leads only as long as its lock or
/// the promises of the others last, or follows whom it knew last and does not run for the lock. No path answers otherwise for it: what a
/// member still serves, it serves.
pub fn is_degraded(snapshot: &Snapshot) -> bool {
    !snapshot.etcd_reachable
}

/// Whether PostgreSQL runs and takes connections.
pub fn is_running(snapshot: &Snapshot, now: BootTime) -> bool {
    snapshot.fresh_sql(now).is_some()
}

/// Whether replica paths answer 200: a running standby that may serve reads, within the query's `lag` and `replication_state`.
pub fn is_serving_replica(snapshot: &Snapshot, now: BootTime, parameters: &Parameters) -> bool {
    let Some(sql) = snapshot.fresh_sql(now) else { return false };
    if !sql.in_recovery || !snapshot.declared || snapshot.tag_is_on("noloadbalance") {
        return false;
    }
    if let Some(wanted) = query::first(parameters, "replication_state")
        && replication_state(snapshot, now) != Some(wanted)
    {
        return false;
    }
    let limit = query::first(parameters, "lag").and_then(query::bytes);
    limit.is_none_or(|limit| !is_behind(leader_position(snapshot, now), sql.replay_lsn.0, limit))
}

/// What this member serves, for those who tell it to their HAProxy. "Yes" is what the health paths say; "no" only what is sure to last a
/// moment: a probe that failed, a proof that is late or a daemon that has just started may be over before the next check, and sessions
/// that are cut do not come back.
pub fn serves(snapshot: &Snapshot, now: BootTime) -> Serves {
    let by_guard = match &snapshot.postmaster {
        Some(PostmasterFacts::Running { word: Word::Standby, .. }) => Some(MemberRole::Replica),
        Some(PostmasterFacts::Running { word: Word::Writable, .. }) => Some(MemberRole::Primary),
        Some(PostmasterFacts::Ending { .. } | PostmasterFacts::ProvedEmpty { .. }) => Some(MemberRole::Uninitialized),
        Some(PostmasterFacts::Unclaimed { .. }) | None => None,
    };
    let in_recovery = snapshot.fresh_sql(now).map(|sql| sql.in_recovery);
    let ends = snapshot.ends_postgres || by_guard == Some(MemberRole::Uninitialized);
    let not_primary = ends || by_guard == Some(MemberRole::Replica) || in_recovery == Some(true);
    let not_replica = ends || in_recovery == Some(false) || snapshot.tag_is_on("noloadbalance");
    let is_current = now.since(snapshot.taken) <= snapshot.loop_wait;
    let word = |yes: bool, no: bool| if yes { Some(true) } else { (no && is_current).then_some(false) };
    Serves {
        primary: word(is_primary(snapshot, now), not_primary),
        replica: word(!ends && is_serving_replica(snapshot, now, &[]), not_replica),
    }
}

/// `/pgherd/serves`.
pub fn serves_answer(snapshot: &Snapshot, now: BootTime) -> ServesAnswer {
    let age_ms = u64::try_from(now.since(snapshot.taken).as_millis()).unwrap_or(u64::MAX);
    ServesAnswer { member: snapshot.member.clone(), serves: serves(snapshot, now), age_ms }
}

/// Patroni's rule: behind only when the leader's position is known and farther than ours plus the limit.
fn is_behind(leader: Option<u64>, ours: u64, limit: i64) -> bool {
    leader.is_some_and(|leader| i128::from(leader) > i128::from(ours) + i128::from(limit))
}

/// The farthest position of the leader that is known: from etcd, or from the walreceiver.
pub fn leader_position(snapshot: &Snapshot, now: BootTime) -> Option<u64> {
    let from_etcd = snapshot.view.as_ref().and_then(|(_, view)| view.status.as_ref()).map(|status| status.lsn.0);
    from_etcd.max(latest_end(snapshot, now)).filter(|position| *position > 0)
}

fn latest_end(snapshot: &Snapshot, now: BootTime) -> Option<u64> {
    snapshot.fresh_sql(now)?.walreceiver.as_ref()?.latest_end_lsn.map(|lsn| lsn.0)
}

/// `streaming` as long as the walreceiver says so; for a primary None.
pub fn replication_state(snapshot: &Snapshot, now: BootTime) -> Option<&'static str> {
    let sql = snapshot.fresh_sql(now)?;
    sql.in_recovery.then_some(())?;
    Some(if sql.streams() { STREAMING } else { "in archive recovery" })
}

/// `/liveness`: whether the daemon's loop turns. A restart by whoever asks costs nothing while it does not.
pub fn is_live(snapshot: &Snapshot, now: BootTime) -> bool {
    let limit = if snapshot.role == MemberRole::Primary { snapshot.ttl } else { snapshot.ttl * 2 };
    snapshot.paused || now.since(snapshot.loop_heartbeat) <= limit
}

/// `/readiness`: the leader, or a standby that streams and is within `lag` (default `maximum_lag_on_failover`) of the leader by
/// `mode=apply` (default) or `mode=write`. Without etcd the walreceiver must say where the leader is.
pub fn is_ready(snapshot: &Snapshot, now: BootTime, parameters: &Parameters) -> bool {
    if is_primary(snapshot, now) {
        return true;
    }
    let Some(sql) = snapshot.fresh_sql(now) else { return false };
    if !sql.in_recovery || replication_state(snapshot, now) != Some(STREAMING) {
        return false;
    }
    if snapshot.current_view().is_none() && latest_end(snapshot, now).is_none() {
        return false;
    }
    let default = i64::try_from(snapshot.maximum_lag_on_failover).unwrap_or(i64::MAX);
    let limit = query::first(parameters, "lag").and_then(query::bytes).unwrap_or(default);
    let ours = match query::first(parameters, "mode") {
        Some("write") => sql.receive_lsn,
        _ => sql.replay_lsn,
    };
    !is_behind(leader_position(snapshot, now), ours.0, limit)
}

/// Whether every `tag_KEY=VALUE` of the query is this member's; a tag that is not text is compared as its lower-cased text.
pub fn tags_match(snapshot: &Snapshot, parameters: &Parameters) -> bool {
    query::tags(parameters).all(|(key, wanted)| match snapshot.tags.get(key) {
        None | Some(serde_json::Value::Null) => false,
        Some(serde_json::Value::String(text)) => text == wanted,
        Some(other) => other.to_string().to_lowercase() == wanted,
    })
}

/// Whether this member has, or may have, a PostgreSQL out of recovery: asked by the others before they take a lock that went away
/// without a release. None = not known; "no" needs a guard that says so and a snapshot not older than `loop_wait`.
pub fn writable(snapshot: &Snapshot, now: BootTime) -> Writable {
    let promoted_by_hand = snapshot.fresh_sql(now).is_some_and(|sql| !sql.in_recovery);
    let by_guard = match &snapshot.postmaster {
        None => None,
        Some(PostmasterFacts::ProvedEmpty { .. }) => Some(false),
        Some(PostmasterFacts::Running { word: Word::Writable, .. }) => Some(true),
        Some(PostmasterFacts::Running { word: Word::Standby, .. }) => Some(false),
        // What is being ended, or what nobody vouches for, may write until it is proved dead, whatever this member is by now.
        Some(PostmasterFacts::Ending { word: Word::Writable, .. } | PostmasterFacts::Unclaimed { .. }) => Some(true),
        Some(PostmasterFacts::Ending { word: Word::Standby, .. }) => Some(false),
    };
    let age = now.since(snapshot.taken);
    // A lock that is proved to us is there to be written under, at the next moment if not in this one.
    let leads = snapshot.lock.as_ref().is_some_and(|lock| now < lock.valid_until);
    let known = match by_guard {
        _ if promoted_by_hand || leads || snapshot.unguarded => Some(true),
        Some(false) if age > snapshot.loop_wait => None,
        other => other,
    };
    Writable {
        member: snapshot.member.clone(),
        writable: known,
        epoch: snapshot.lock.map(|lock| lock.identity.epoch),
        age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    }
}
