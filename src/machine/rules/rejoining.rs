//! The way back behind the leader: stop, judge, then follow, rewind, or copy beside and swap. Never on a running server.
//!
//! WAL past the switch point is kept before a rewind, and a directory that is swapped out is kept whole (I10, P5); the judgement is
//! `policy::rejoin`'s. A directory that is half rewound stays here until a leader is there to go on with: it is never started.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::ClusterView;
use crate::facts::postgres::DataDirectory;
use crate::machine::action::{Action, Decision, Old, Operation, OperationKind, StopMode};
use crate::machine::node::Context;
use crate::machine::rules::{archiving, reinit, standby};
use crate::machine::state::State;
use crate::machine::world::World;
use crate::mutants::{Mutant, mutant};
use crate::policy::rejoin::{LostRange, Rejoin};

/// So long after the leader began to write a rewind waits for `sync` to name others in this member's place.
const COUNTED_ON_S: u64 = 8;
/// A way back that was refused needs a person; it is judged again after so long.
const REFUSED_PAUSE_MS: u64 = 10_000;

pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    if let Some(state) = standby::ended_if_writable(context) {
        return Transition(state);
    }
    if let Some(outcome) = reinit::carried_out(context) {
        return outcome;
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
        DataDirectory::Full(_) => context.world.clear("rewind_unfinished"),
        DataDirectory::HalfRewound(_) if context.world.spec().is_some() && context.world.declared().is_none() => {
            return Transition(State::Following);
        }
        DataDirectory::HalfRewound(attempt) => {
            let message = format!("a rewind has not ended, and PostgreSQL is not started before it has: {}", attempt.why);
            context.world.warn("rewind_unfinished", message);
        }
    }
    let Some(leader) = standby::upstream(context) else {
        context.world.rejoin = None;
        if matches!(context.world.data, DataDirectory::HalfRewound(_)) {
            return Handled;
        }
        // Nobody to get behind: in recovery at our own end, we can be asked for our position.
        standby::start_standby(context, None);
        return if context.world.in_flight.contains(&OperationKind::Start) { Transition(State::Following) } else { Handled };
    };
    if archiving::goes_first(context, &leader) {
        return Handled;
    }
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
        Some(Rejoin::Rewind { why, lost }) => {
            if sync_counts_on_us(context.world) {
                wait_for_sync(context, why, lost);
                return Handled;
            }
            let Some(spec) = context.world.spec().cloned() else { return Handled };
            let Some(history) = context.world.fresh_view().map(|view| view.history.clone()) else { return Handled };
            if context.start(Operation::Rewind { from: leader, spec, why: why.clone(), lost, history }) {
                context.decide(
                    "rewind",
                    format!("the data directory is rewound to the leader, what it has and the leader has not is kept: {why}"),
                );
            }
        }
        Some(Rejoin::Clone { why, lost }) => {
            // Who leads has to be known now, not only to have been.
            let Some(spec) = context.world.spec().cloned().filter(|_| context.world.fresh_view().is_some()) else { return Handled };
            if context.start(Operation::Clone { from: leader.clone(), leader, spec, old: Old::Kept(lost) }) {
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

/// Commits are acknowledged on the strength of what this member has. While it is rewound it has nothing: the leader's loss would be theirs.
fn sync_counts_on_us(world: &World) -> bool {
    let begun = matches!(world.data, DataDirectory::HalfRewound(_));
    !begun && is_counted_on(world) && !mutant(Mutant::RewoundWhileCountedOn)
}

/// `sync` says that commits may be here and nowhere else but at the leader, or cannot be read.
pub(crate) fn is_counted_on(world: &World) -> bool {
    let named = |view: &ClusterView| match &view.sync {
        Some(record) => record.copies > 1 && record.members.contains(&world.me.name),
        None => view.sync_revision.0 != 0,
    };
    world.fresh_view().is_some_and(|view| named(view))
}

/// The leader counts on others as soon as they have everything. If there are none, a copy does no harm: the directory stays until it is made.
fn wait_for_sync(context: &mut Context<'_>, why: String, lost: LostRange) {
    let since = context.world.leader_writes_since.map(|(_, since)| since);
    if since.is_some_and(|since| context.now.since(since) >= Duration::from_secs(COUNTED_ON_S)) {
        let why = format!("{why}; it is not rewound: commits are acknowledged on the strength of what it has");
        context.world.rejoin = Some(Rejoin::Clone { why, lost: Some(lost) });
        return;
    }
    let message = "sync still names this member: a rewind waits until others have everything that was acknowledged";
    context.world.set_info("rejoin_waits", message.to_owned());
}

/// In every state: what only this member had and was taken away is told, with its facts.
pub(crate) fn tell_what_was_lost(context: &mut Context<'_>) {
    for lost in std::mem::take(&mut context.world.kept.untold) {
        let transactions = lost.transactions.map_or_else(|| "an unknown number of".to_owned(), |count| count.to_string());
        let message = format!(
            "{} bytes of WAL with {transactions} committed transactions, on timeline {} from {} to {}, are in nobody's history: kept in {}",
            lost.bytes, lost.timeline, lost.from, lost.to, lost.kept
        );
        let mut decision = Decision { kind: "lost_writes", message, facts: context.world.decision_facts() };
        let times = [("first_commit", lost.first_commit), ("last_commit", lost.last_commit)];
        decision.facts.extend(times.into_iter().filter_map(|(key, at)| Some((key.to_owned(), at?))));
        context.actions.push(Action::Record(decision));
    }
}

/// In every state: what was made of a segment that was received in part, before PostgreSQL was started on it.
pub(crate) fn tell_what_was_completed(context: &mut Context<'_>) {
    for half in std::mem::take(&mut context.world.receiving.half_segments) {
        match &half.obstacle {
            None => context.decide("wal_completed", format!("{}; it was filled up from {}", half.sentence(), half.older)),
            Some(why) => {
                let message = format!("{}, and cannot be filled up: {why}; PostgreSQL may end at it", half.sentence());
                context.world.warn("wal_incomplete", message);
            }
        }
    }
}

fn plan(context: &mut Context<'_>, leader: crate::machine::action::Upstream) {
    let (Some(view), Some(spec)) = (context.world.fresh_view().cloned(), context.world.spec().cloned()) else { return };
    let Some(leader_timeline) = context.world.other_leader().and_then(|(_, key)| key.record.timeline) else { return };
    let epoch = view.leader.as_ref().map(|leader| leader.epoch);
    let (rewinds_failed, starts_in_vain) = (context.world.failures(OperationKind::Rewind), context.world.receiving.ends);
    let history = view.history.clone();
    if context.start(Operation::PlanRejoin { leader, spec, leader_timeline, history, rewinds_failed, starts_in_vain }) {
        context.world.planned_for = epoch;
    }
}
