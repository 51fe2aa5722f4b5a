//! From a won lock to a server that takes writes: proof first, then the guard's acknowledgement, then out of recovery.
//!
//! What surprises: nothing is promoted between A and E although the lock is still ours, since the ladder would begin at once.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::guard::Word;
use crate::facts::postgres::DataDirectory;
use crate::facts::synchrony::Names;
use crate::machine::action::{Action, LeaseOrder, Operation, OperationKind, StartAs, StopMode};
use crate::machine::bookkeeping::{CRASH_LIMIT, CRASH_WINDOW_S};
use crate::machine::node::Context;
use crate::machine::rules::{primary, standby, synchrony};
use crate::machine::state::{Demotion, Promotion, State, Then, Way};
use crate::machine::world::{Etcd, Lock};
use crate::mutants::{Mutant, mutant};
use crate::types::{LockIdentity, TimelineId};

/// primary_start_timeout of zero means that another leads at once when a primary ends; a promotion has to end all the same.
const NO_LIMIT_S: u64 = 60;
/// How long a promotion may go on when the daemon is to stop.
const STOP_PATIENCE_S: u64 = 10;

pub(crate) fn rule(promotion: &mut Promotion, context: &mut Context<'_>) -> Outcome<State> {
    follow_lease(&mut promotion.lock, context);
    let lock = promotion.lock;
    if context.world.released == Some(lock.epoch) {
        context.world.let_go(context.actions);
        let why = "the lock was given back".to_owned();
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } });
    }
    // What is being given back is not used before it is known whether it is.
    if context.world.gives_back(lock) {
        return Handled;
    }
    if context.world.holding != Some(lock) {
        context.world.forget_failures(OperationKind::Promote);
        context.world.forget_failures(OperationKind::Start);
        context.world.forget_failures(OperationKind::SetNames);
        context.world.holding = Some(lock);
        context.actions.push(Action::Lease(LeaseOrder::Hold(lock)));
    }
    if let Some(why) = context.world.unguarded() {
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then: Then::StartAgain(lock) } });
    }
    if let Some(why) = failed(promotion, context) {
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Release(lock) } });
    }
    // What a promotion needs beside the proof comes to be while that is waited for.
    let is_prepared = matches!(promotion.way, Way::Promote { .. }) && prepare(lock, context);
    let proved = matches!(context.world.lock, Lock::Proved { identity, announce_at, .. } if identity == lock && context.now < announce_at);
    if !proved && !mutant(Mutant::PromoteUnproved) {
        // No proof is to be had for now: readers are better served by a standby than by nothing.
        let read_only = promotion.way == Way::StartInPlace && context.world.etcd != Etcd::Reachable && context.world.proved_empty();
        return if read_only { Transition(State::Following) } else { Handled };
    }
    // It may still be given back: only when that is ruled out does anything begin to write under it.
    let writes = matches!(context.world.running(), Some((_, Word::Writable)));
    let sure = match promotion.way {
        Way::Promote { .. } => context.world.sure_of == Some(lock.epoch),
        Way::StartInPlace => context.world.may_start_in_place(lock),
    };
    if !sure && !writes && !mutant(Mutant::UsedWithoutWritingAgain) {
        return Handled;
    }
    match promotion.way {
        // A new timeline is begun on etcd's word only; promises are for what runs already.
        Way::Promote { .. } if !context.world.is_proved_by_etcd() => Handled,
        Way::Promote { timeline } => promote(promotion, timeline, is_prepared, context),
        Way::StartInPlace => start_in_place(promotion, context),
    }
}

/// A changed ttl brings the lock another lease; the epoch names the leadership all the same.
pub(crate) fn follow_lease(lock: &mut LockIdentity, context: &Context<'_>) {
    if let Some(present) = context.world.lock.identity().filter(|present| present.epoch == lock.epoch) {
        *lock = present;
    }
}

/// Why this leadership comes to nothing.
fn failed(promotion: &Promotion, context: &Context<'_>) -> Option<String> {
    let limit = context.world.spec().map(|spec| spec.ha.primary_start_timeout)?;
    let limit = if limit.is_zero() { Duration::from_secs(NO_LIMIT_S) } else { limit };
    let taken = context.now.since(promotion.since);
    let proved = matches!(context.world.lock, Lock::Proved { .. });
    if context.world.stop_requested && (!proved || taken > Duration::from_secs(STOP_PATIENCE_S)) {
        return Some("the daemon is to stop, and PostgreSQL does not take writes yet".to_owned());
    }
    if taken > limit {
        return Some(format!("PostgreSQL did not take writes within primary_start_timeout of {} s", limit.as_secs()));
    }
    if context.world.failures(OperationKind::Promote) >= 3 || context.world.failures(OperationKind::Start) >= 3 {
        return Some("PostgreSQL could not be brought up as a primary three times in a row".to_owned());
    }
    let ended = context.world.proved_empty() && matches!(promotion.way, Way::Promote { .. });
    ended.then(|| "PostgreSQL ended before it was promoted".to_owned())
}

/// True = whatever is promised of commits is known under this lock, and the server that is to be promoted goes by it.
fn prepare(lock: LockIdentity, context: &mut Context<'_>) -> bool {
    // Whatever else works on PostgreSQL has time, the cluster has not.
    if context.world.job().is_some_and(|job| !matches!(job, OperationKind::Promote | OperationKind::SetNames)) {
        standby::cancel_job(context);
    }
    let waits = context.world.sql().is_some_and(|sql| sql.in_recovery) && !context.world.promotion_asked_lately(context.now);
    waits && synchrony::ready_to_promote(context, lock)
}

fn promote(promotion: &Promotion, timeline: TimelineId, is_prepared: bool, context: &mut Context<'_>) -> Outcome<State> {
    let Some(sql) = context.world.sql() else { return Handled };
    let (in_recovery, at) = (sql.in_recovery, sql.timeline);
    if in_recovery {
        if is_prepared && context.start(Operation::Promote { lock: promotion.lock, timeline, parent: at }) {
            context.world.promote_asked = Some(context.now);
        }
        return Handled;
    }
    if !matches!(context.world.running(), Some((_, Word::Writable))) {
        return Handled;
    }
    if at != timeline {
        let why = format!("PostgreSQL promoted onto timeline {at}, reserved was {timeline}");
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Release(promotion.lock) } });
    }
    became_primary(context)
}

fn became_primary(context: &mut Context<'_>) -> Outcome<State> {
    context.world.reserved = None;
    context.world.promote_asked = None;
    context.world.note_primary_start(context.now);
    Transition(State::Primary)
}

fn start_in_place(promotion: &Promotion, context: &mut Context<'_>) -> Outcome<State> {
    match context.world.running() {
        Some((_, Word::Standby)) => {
            standby::cancel_job(context);
            context.stop(StopMode::Fast { patience: Duration::from_secs(standby::STANDBY_STOP_S) });
            return Handled;
        }
        Some((_, Word::Writable)) => {
            return match context.world.sql().map(|sql| sql.in_recovery) {
                Some(false) => became_primary(context),
                Some(true) => primary::start_again_as_primary(promotion.lock),
                None => Handled,
            };
        }
        None => {}
    }
    if context.world.job().is_some_and(|job| !matches!(job, OperationKind::Look | OperationKind::Start)) {
        standby::cancel_job(context);
    }
    if !context.world.proved_empty() || context.world.job().is_some() {
        return Handled;
    }
    if context.world.recent_primary_starts(context.now) >= CRASH_LIMIT {
        let why = format!("PostgreSQL was started {CRASH_LIMIT} times as a primary within {} s", CRASH_WINDOW_S);
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Release(promotion.lock) } });
    }
    match &context.world.data {
        DataDirectory::Full(_) => {
            let (reserved, own) = (context.world.timeline_of(promotion.lock), context.world.own_timeline());
            if reserved.is_none() {
                return Handled;
            }
            // It ended before it was on the timeline that the lock was taken with: from a standby it is promoted there.
            if reserved != own {
                return Transition(State::Following);
            }
            let (fall_back, names) = (context.world.files_failed, context.world.names_at_first());
            let closed = names != Names::Nobody && context.world.starts_closed(promotion.lock.epoch);
            if let Some((generation, spec)) = context.world.spec.clone()
                && context.start(Operation::Start { role: StartAs::Primary, spec, generation, fall_back, names, closed })
            {
                context.world.in_force = Some(crate::machine::world::InForce { generation, upstream: None });
            }
            Handled
        }
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            Handled
        }
        DataDirectory::Empty | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => {
            let why = "there is no data directory to lead with".to_owned();
            Transition(State::Demoting { demotion: Demotion { why, then: Then::Release(promotion.lock) } })
        }
    }
}
