//! What operators asked for: taken up, refused with the reason, answered when done.

use statig::prelude::*;

use crate::facts::cluster::{Ask, RequestKey, RequestProgress};
use crate::machine::action::{Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::rules::primary;
use crate::machine::state::State;
use crate::types::MemberName;

/// A primary looks at what is asked. The refusal is written before PostgreSQL is touched.
pub(crate) fn taken_up(context: &mut Context<'_>) -> Outcome<State> {
    let Some(view) = context.world.fresh_view().cloned() else { return Handled };
    for (id, key) in &view.requests {
        let Ask::Switchover { to } = &key.record.ask else { continue };
        match &key.record.progress {
            RequestProgress::Created => {
                match why_not(context, to) {
                    Some(reason) => answer(context, id, key, RequestProgress::Refused { reason }),
                    None => {
                        let claim = RequestProgress::Claimed { by: context.world.me.name.clone(), stage: "checked".to_owned() };
                        answer(context, id, key, claim);
                    }
                }
                return Handled;
            }
            RequestProgress::Claimed { by, .. } if *by == context.world.me.name && !context.world.tried_requests.contains(id) => {
                if let Some(reason) = why_not(context, to) {
                    answer(context, id, key, RequestProgress::Refused { reason });
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

/// SAFETY row 69: refused before the primary is touched.
fn why_not(context: &Context<'_>, to: &MemberName) -> Option<String> {
    let world = &context.world;
    let (Some(view), Some(spec), Some(sql)) = (world.fresh_view(), world.spec(), world.sql()) else {
        return Some("the leader cannot see etcd or its own PostgreSQL now".to_owned());
    };
    if *to == world.me.name {
        return Some(format!("`{to}` leads already"));
    }
    let Some(member) = spec.member(to) else { return Some(format!("`{to}` is not in spec.members")) };
    if member.nofailover() {
        return Some(format!("`{to}` never leads: failover_priority is 0 or the tag nofailover is set"));
    }
    let Some(key) = view.members.get(to) else { return Some(format!("the daemon of `{to}` is not there: it has no member key")) };
    let replica = sql.replicas.iter().find(|replica| replica.application_name == to.as_str() && replica.state == "streaming");
    let Some(flushed) = replica.and_then(|replica| replica.flush_lsn) else {
        return Some(format!("`{to}` does not stream from the leader (its state is `{}`)", key.record.state));
    };
    let (lag, limit) = (sql.receive_lsn.bytes_since(flushed), spec.ha.maximum_lag_on_failover);
    (lag > limit).then(|| format!("`{to}` is {lag} bytes behind, more than maximum_lag_on_failover of {limit} bytes"))
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
            (Ask::Switchover { to }, RequestProgress::Claimed { by, .. }) if by == me && context.world.tried_requests.contains(id) => {
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
