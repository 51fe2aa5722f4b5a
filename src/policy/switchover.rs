//! What stands in the way of handing the lock over, and to whom it is best handed. Never talks to etcd or PostgreSQL.
//!
//! Judged by the leader before anything is touched (SAFETY row 69). An obstacle is a reason to refuse; a warning is what the switchover
//! would cost, for a person to agree to. What is not known is said to be unknown, which is not the same as nothing.

use crate::facts::cluster::{ClusterView, Severity};
use crate::facts::postgres::{STREAMING, SqlFacts, Survey};
use crate::facts::requests::Candidate;
use crate::spec::cluster::ClusterSpec;
use crate::types::MemberName;

/// WAL segments that may wait for the archiver without a word: it sends one off while PostgreSQL is stopped.
const READY_SEGMENTS_MAX: u64 = 1;

/// WAL that a target may have received and not replayed: about a second of replay, in which nobody can write.
const REPLAY_BEHIND_MAX_BYTES: u64 = 128 << 20;

/// What is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The leader, who judges.
    pub me: &'a MemberName,
    /// The spec in force.
    pub spec: &'a ClusterSpec,
    /// etcd's keys.
    pub view: &'a ClusterView,
    /// The leader's server, as last probed.
    pub sql: &'a SqlFacts,
    /// What is under way on it. None = it could not be asked.
    pub survey: Option<&'a Survey>,
}

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// It will not pass by itself.
    Lasting(String),
    /// It may pass in a moment.
    Passing(String),
}

impl Obstacle {
    /// The sentence.
    pub fn reason(&self) -> &str {
        match self {
            Obstacle::Lasting(reason) | Obstacle::Passing(reason) => reason,
        }
    }
}

/// What stands in the way of a hand-over to this member, the weightiest first.
pub fn obstacles(inputs: &Inputs<'_>, to: &MemberName) -> Vec<Obstacle> {
    let lasting = |reason| vec![Obstacle::Lasting(reason)];
    if to == inputs.me {
        return lasting(format!("`{to}` leads already"));
    }
    let Some(member) = inputs.spec.member(to) else { return lasting(format!("`{to}` is not in spec.members")) };
    if member.nofailover() {
        return lasting(format!("`{to}` never leads: failover_priority is 0, or the tag nofailover or nostream is set"));
    }
    let Some(key) = inputs.view.members.get(to) else {
        return lasting(format!("the daemon of `{to}` is not there: it has no member key"));
    };
    let mut found: Vec<Obstacle> = of_the_stream(inputs, to, &key.record.state).into_iter().collect();
    let paused = |kind: &str| kind == REPLAY_PAUSED;
    let conditions = key.record.conditions.iter().filter(|condition| condition.severity == Severity::Error || paused(&condition.kind));
    found.extend(conditions.map(|condition| Obstacle::Lasting(format!("`{to}`: {}", condition.message))));
    match inputs.survey {
        None => found.push(Obstacle::Passing("what is under way on the leader's PostgreSQL could not be asked".to_owned())),
        Some(survey) => found.extend(survey.base_backups.iter().map(|who| {
            Obstacle::Lasting(format!(
                "a base backup is being taken from the leader and would be broken off: {who}; wait for it, or end it"
            ))
        })),
    }
    found
}

/// The condition of a member whose replay is paused: it would not come out of recovery, or not soon.
pub const REPLAY_PAUSED: &str = "replay_paused";

/// Whether a member says so of itself: it is the last that is to lead.
pub fn replay_is_paused(view: &ClusterView, name: &MemberName) -> bool {
    view.members.get(name).is_some_and(|key| key.record.conditions.iter().any(|condition| condition.kind == REPLAY_PAUSED))
}

fn of_the_stream(inputs: &Inputs<'_>, to: &MemberName, own: &str) -> Option<Obstacle> {
    // A walsender of a connection that is half gone can stand beside the one at work.
    let of_it = || inputs.sql.replicas.iter().filter(|replica| replica.application_name == to.as_str());
    let replica = of_it().find(|replica| replica.streams()).or_else(|| of_it().next());
    let replayed = replica.and_then(|replica| replica.replay_lsn);
    let Some(flushed) = replica.filter(|replica| replica.streams()).and_then(|replica| replica.flush_lsn) else {
        let seen = replica.map_or("the leader does not see it", |replica| replica.state.as_str());
        let reason = format!("`{to}` does not stream from the leader (its own state: {own}; in pg_stat_replication: {seen})");
        return Some(if own == STREAMING { Obstacle::Passing(reason) } else { Obstacle::Lasting(reason) });
    };
    let (lag, limit) = (inputs.sql.receive_lsn.bytes_since(flushed), inputs.spec.ha.maximum_lag_on_failover);
    let reason = || format!("`{to}` is {lag} bytes behind, more than maximum_lag_on_failover of {limit} bytes");
    if lag > limit {
        return Some(Obstacle::Lasting(reason()));
    }
    let behind = inputs.sql.receive_lsn.bytes_since(replayed?);
    (behind > REPLAY_BEHIND_MAX_BYTES).then(|| {
        let why =
            format!("`{to}` has not replayed {behind} bytes of what it has, and nobody could write until it had: is a query in its way?");
        Obstacle::Passing(why)
    })
}

/// More waits for the archiver than it sends off while PostgreSQL is stopped, and it comes on.
pub fn archiver_comes_on(survey: &Survey) -> bool {
    survey.archiver.as_ref().is_some_and(|archiver| !archiver.failing && archiver.ready > READY_SEGMENTS_MAX)
}

/// What a hand-over from this leader costs, whoever follows.
pub fn costs(inputs: &Inputs<'_>) -> Vec<String> {
    let Some(survey) = inputs.survey else { return Vec::new() };
    let archiver = survey.archiver.as_ref().and_then(|archiver| {
        let behind = archiver.ready > READY_SEGMENTS_MAX;
        (archiver.failing || behind).then(|| {
            let how = if archiver.failing { "its last attempt failed" } else { "it is behind" };
            format!(
                "{} WAL segments are not archived yet ({how}): what its archiver does not get to is archived by pgherd before it follows",
                archiver.ready
            )
        })
    });
    transactions(survey).chain(archiver).collect()
}

fn transactions(survey: &Survey) -> impl Iterator<Item = String> {
    survey.transactions.iter().map(|open| {
        let who = if open.application_name.is_empty() { "a client" } else { open.application_name.as_str() };
        format!("a transaction of {who} (pid {}), open for {} s and {}, would be rolled back", open.pid, open.seconds, open.state)
    })
}

/// What a restart of this leader cuts off. What is not archived yet stays with it, and is archived later.
pub fn costs_of_restart(inputs: &Inputs<'_>) -> Vec<String> {
    let Some(survey) = inputs.survey else { return vec!["what is under way on the primary could not be asked".to_owned()] };
    let backups = survey.base_backups.iter().map(|who| format!("a base backup that is being taken would be broken off: {who}"));
    transactions(survey).chain(backups).collect()
}

/// What a hand-over to this member costs besides.
fn costs_of(inputs: &Inputs<'_>, to: &MemberName) -> Vec<String> {
    let mut found = Vec::new();
    if inputs.view.sync.as_ref().is_some_and(|record| !record.members.contains(to)) {
        found.push(format!("commits do not wait for `{to}`: it has to catch up after the stop, or the hand-over is given up"));
    }
    if let Some(key) = inputs.view.members.get(to) {
        if !key.record.pending_restart.is_empty() {
            found.push(format!("on `{to}` these wait for a restart: {}", key.record.pending_restart.join(", ")));
        }
        let warnings =
            key.record.conditions.iter().filter(|condition| condition.severity == Severity::Warning && condition.kind != REPLAY_PAUSED);
        found.extend(warnings.map(|condition| format!("`{to}`: {}", condition.message)));
    }
    found
}

/// Every other member that is declared, the best one first: without obstacles, in the key `sync`, by priority, by position, by the
/// spec's order.
pub fn candidates(inputs: &Inputs<'_>) -> Vec<Candidate> {
    let others = inputs.spec.members.iter().filter(|member| member.name != *inputs.me);
    let mut all: Vec<_> = others.map(|member| (member, obstacles(inputs, &member.name))).collect();
    all.sort_by_key(|(member, obstacles)| {
        let synchronous = inputs.view.sync.as_ref().is_some_and(|record| record.members.contains(&member.name));
        let received = inputs.view.members.get(&member.name).and_then(|key| key.record.receive_lsn);
        (!obstacles.is_empty(), std::cmp::Reverse((synchronous, member.failover_priority, received)))
    });
    let judged = all.into_iter().map(|(member, obstacles)| Candidate {
        name: member.name.clone(),
        obstacles: obstacles.iter().map(|obstacle| obstacle.reason().to_owned()).collect(),
        warnings: costs_of(inputs, &member.name),
    });
    judged.collect()
}

#[cfg(test)]
mod tests;
