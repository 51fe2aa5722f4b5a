//! What operators asked for: taken up, refused with the reason, answered when done.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::{Ask, RequestKey, RequestProgress};
use crate::machine::action::{Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::rules::primary;
use crate::machine::state::State;
use crate::types::MemberName;

/// So long a standby that says that it streams is given to be seen streaming by the primary: the primary looks once a second, and a
/// standby that has just come catches up first.
const SEEN_STREAMING_MS: u64 = 3_000;

/// What stands in the way of a switchover.
enum Obstacle {
    /// It will not pass by itself.
    Lasting(String),
    /// It may pass in a moment.
    Passing(String),
}

/// A primary looks at what is asked. The refusal is written before PostgreSQL is touched.
pub(crate) fn taken_up(context: &mut Context<'_>) -> Outcome<State> {
    let Some(view) = context.world.fresh_view().cloned() else { return Handled };
    let now = context.now;
    context.world.requests_seen.retain(|id, _| view.requests.contains_key(id));
    for (id, key) in &view.requests {
        let Ask::Switchover { to } = &key.record.ask else { continue };
        context.world.requests_seen.entry(id.clone()).or_insert(now);
        match &key.record.progress {
            RequestProgress::Created => {
                if nothing_in_the_way(context, id, key, to) {
                    let claim = RequestProgress::Claimed { by: context.world.me.name.clone(), stage: "checked".to_owned() };
                    answer(context, id, key, claim);
                }
                return Handled;
            }
            RequestProgress::Claimed { by, .. } if *by == context.world.me.name && !context.world.tried_requests.contains(id) => {
                if !nothing_in_the_way(context, id, key, to) {
                    return Handled;
                }
                context.world.tried_requests.insert(id.clone());
                context.decide("switchover", format!("hands over to `{to}`, asked for by {}", key.record.by));
                return primary::hand_over(context, Some(to.clone()), Some(id.clone()));
            }
            RequestProgress::Claimed { .. } | RequestProgress::Done { .. } | RequestProgress::Refused { .. } => {}
        }
    }
    Handled
}

/// Whether the switchover may begin. If not, it is refused, or waits for what may pass.
fn nothing_in_the_way(context: &mut Context<'_>, id: &str, key: &RequestKey, to: &MemberName) -> bool {
    let seen = context.world.requests_seen.get(id).copied().unwrap_or(context.now);
    let in_time = context.now.since(seen) < Duration::from_millis(SEEN_STREAMING_MS);
    match why_not(context, to) {
        None => return true,
        Some(Obstacle::Passing(_)) if in_time => {}
        Some(Obstacle::Passing(reason) | Obstacle::Lasting(reason)) => answer(context, id, key, RequestProgress::Refused { reason }),
    }
    false
}

/// SAFETY row 69: refused before the primary is touched.
fn why_not(context: &Context<'_>, to: &MemberName) -> Option<Obstacle> {
    let lasting = |reason| Some(Obstacle::Lasting(reason));
    let world = &context.world;
    let (Some(view), Some(spec), Some(sql)) = (world.fresh_view(), world.spec(), world.sql()) else {
        return lasting("the leader cannot see etcd or its own PostgreSQL now".to_owned());
    };
    if *to == world.me.name {
        return lasting(format!("`{to}` leads already"));
    }
    let Some(member) = spec.member(to) else { return lasting(format!("`{to}` is not in spec.members")) };
    if member.nofailover() {
        return lasting(format!("`{to}` never leads: failover_priority is 0, or the tag nofailover or nostream is set"));
    }
    let Some(key) = view.members.get(to) else { return lasting(format!("the daemon of `{to}` is not there: it has no member key")) };
    // A walsender of a connection that is half gone can stand beside the one at work.
    let of_it = || sql.replicas.iter().filter(|replica| replica.application_name == to.as_str());
    let replica = of_it().find(|replica| replica.state == "streaming").or_else(|| of_it().next());
    let own = &key.record.state;
    let Some(flushed) = replica.filter(|replica| replica.state == "streaming").and_then(|replica| replica.flush_lsn) else {
        let seen = replica.map_or("the leader does not see it", |replica| replica.state.as_str());
        let reason = format!("`{to}` does not stream from the leader (its own state: {own}; in pg_stat_replication: {seen})");
        return Some(if own == "streaming" { Obstacle::Passing(reason) } else { Obstacle::Lasting(reason) });
    };
    let (lag, limit) = (sql.receive_lsn.bytes_since(flushed), spec.ha.maximum_lag_on_failover);
    let reason = || format!("`{to}` is {lag} bytes behind, more than maximum_lag_on_failover of {limit} bytes");
    (lag > limit).then(|| Obstacle::Lasting(reason()))
}

fn answer(context: &mut Context<'_>, id: &str, key: &RequestKey, progress: RequestProgress) {
    context.start(Operation::AnswerRequest { id: id.to_owned(), mod_revision: key.mod_revision, progress });
}

/// In every state: requests that this member claimed get their answer when the outcome is seen.
pub(crate) fn settle(context: &mut Context<'_>, state: &State) {
    let Some(view) = context.world.fresh_view().cloned() else { return };
    let busy = matches!(state, State::HandingOver { .. } | State::Promoting { .. } | State::Demoting { .. });
    if busy || context.world.in_flight.contains(&OperationKind::AnswerRequest) {
        return;
    }
    let me = &context.world.me.name;
    let initialized = matches!(view.initialize, Some(crate::facts::cluster::Initialize::Done(_)));
    for (id, key) in &view.requests {
        let leader = view.leader.as_ref().map(|leader| leader.holder.as_str());
        let open = matches!(key.record.progress, RequestProgress::Created | RequestProgress::Claimed { .. });
        let progress = match (&key.record.ask, &key.record.progress) {
            (Ask::Switchover { to }, RequestProgress::Claimed { by, .. })
                if by == me && (*state != State::Primary || context.world.tried_requests.contains(id)) =>
            {
                match leader {
                    Some(leader) if leader == to.as_str() && context.world.leader_writes() => {
                        RequestProgress::Done { message: format!("`{to}` leads") }
                    }
                    Some(leader) if leader == to.as_str() => continue,
                    // Given back a moment ago: the view is older than that.
                    Some(leader) if leader == me.as_str() && *state != State::Primary => continue,
                    Some(leader) => RequestProgress::Refused { reason: format!("the hand-over did not succeed: `{leader}` leads") },
                    None => continue,
                }
            }
            (Ask::Bootstrap { on }, _) if open && on == me && initialized => {
                RequestProgress::Done { message: "the cluster is initialized".to_owned() }
            }
            _ => continue,
        };
        answer(context, id, key, progress);
        return;
    }
}
