//! The way back behind the leader: stop, judge, then follow or copy beside and swap. Never on a running server.
//!
//! A directory with WAL past the switch point is kept whole beside (I10, P5); the judgement is `policy::rejoin`'s.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::postgres::DataDirectory;
use crate::machine::action::{Operation, OperationKind, StopMode};
use crate::machine::node::Context;
use crate::machine::rules::standby;
use crate::machine::state::State;
use crate::policy::rejoin::Rejoin;

/// A way back that was refused needs a person; it is judged again after so long.
const REFUSED_PAUSE_MS: u64 = 10_000;

pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    if let Some(state) = standby::ended_if_writable(context) {
        return Transition(state);
    }
    if context.world.running().is_some() {
        context.world.rejoin = None;
        context.stop(StopMode::Fast { patience: Duration::from_secs(standby::STANDBY_STOP_S) });
        return Handled;
    }
    if !context.world.proved_empty() || context.world.job().is_some() {
        return Handled;
    }
    match &context.world.data {
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Handled;
        }
        DataDirectory::Empty => return Transition(State::AwaitingLeader),
        // A copy that broke off between two renames is put right by the next look; nothing else can be judged.
        DataDirectory::Unusable(_) => return Transition(State::Following),
        DataDirectory::Full(_) => {}
    }
    let Some(leader) = standby::upstream(context) else {
        context.world.rejoin = None;
        // Nobody to get behind: in recovery at our own end, we can be asked for our position.
        standby::start_standby(context, None);
        return if context.world.in_flight.contains(&OperationKind::Start) { Transition(State::Following) } else { Handled };
    };
    match context.world.rejoin.clone() {
        None => plan(context, leader),
        Some(Rejoin::Follow) => {
            context.world.clear("rejoin_refused");
            standby::start_standby(context, Some(leader));
            if context.world.in_flight.contains(&OperationKind::Start) {
                context.world.rejoin = None;
                return Transition(State::Following);
            }
        }
        Some(Rejoin::Clone { why, lost }) => {
            // Who leads has to be known now, not only to have been.
            let Some(spec) = context.world.spec().cloned().filter(|_| context.world.fresh_view().is_some()) else { return Handled };
            if context.start(Operation::Clone { from: leader.clone(), leader, spec, lost, found_empty: false }) {
                let message = format!("a copy of the leader takes the data directory's place, the directory is kept beside, whole: {why}");
                context.decide("reclone", message);
            }
        }
        Some(Rejoin::Wait { why }) => {
            context.world.set_info("rejoin_waits", why);
            context.world.rejoin = None;
            context.world.retry_later(context.now, OperationKind::PlanRejoin);
        }
        Some(Rejoin::Refuse { why }) => {
            context.world.fail("rejoin_refused", why);
            context.world.rejoin = None;
            standby::look_again(context);
            context.world.pause(context.now, OperationKind::PlanRejoin, REFUSED_PAUSE_MS);
        }
    }
    Handled
}

fn plan(context: &mut Context<'_>, leader: crate::machine::action::Upstream) {
    let (Some(view), Some(spec)) = (context.world.fresh_view().cloned(), context.world.spec().cloned()) else { return };
    let Some(leader_timeline) = context.world.other_leader().and_then(|(_, key)| key.record.timeline) else { return };
    let epoch = view.leader.as_ref().map(|leader| leader.epoch);
    if context.start(Operation::PlanRejoin { leader, spec, leader_timeline, history: view.history.clone() }) {
        context.world.planned_for = epoch;
    }
}
