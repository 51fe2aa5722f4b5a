//! A planned end of leadership: checkpoint, fast stop, the successor has the shutdown checkpoint, release. Each stage has a deadline
//! and a way on or back.
//!
//! Order is the safety argument: the lock goes only after the proof that no process of PostgreSQL is left.

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::{MemberRole, ReleaseRecord};
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState};
use crate::machine::action::{Operation, OperationKind, StopMode};
use crate::machine::node::{Context, after_leading};
use crate::machine::rules::{primary, standby};
use crate::machine::state::{Demotion, HandOver, HandOverStage, Promotion, State, Then, Way};
use crate::machine::world::Lock;
use crate::types::MemberName;

/// How long a successor may take to have the shutdown checkpoint. One that streams has it before the stop ends.
const SUCCESSOR_PATIENCE_MS: u64 = 3_000;

/// How long reading the data directory may take.
const LOOK_PATIENCE_S: u64 = 10;

pub(crate) fn rule(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.lock == Lock::None {
        let then = Then::Follow;
        return if context.world.nothing_can_write() {
            Transition(after_leading(context))
        } else {
            Transition(State::Demoting { demotion: Demotion { why: "the lock is not ours".to_owned(), then } })
        };
    }
    if let Some(why) = context.world.unguarded() {
        let then = Then::StartAgain(hand_over.lock);
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then } });
    }
    match hand_over.stage {
        HandOverStage::Checkpoint => checkpoint(hand_over, context),
        HandOverStage::Stop => stop(hand_over, context),
        HandOverStage::Wait { since } => wait(hand_over, since, context),
        HandOverStage::Release => release(hand_over, context),
    }
}

fn checkpoint(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    let ended = context.world.running().is_none();
    let impatient =
        context.now.since(hand_over.since) > primary::CHECKPOINT_PATIENCE || context.world.failures(OperationKind::Checkpoint) > 0;
    if ended || context.world.checkpointed || impatient {
        standby::cancel_job(context);
        hand_over.enter(HandOverStage::Stop);
        return stop(hand_over, context);
    }
    context.start(Operation::Checkpoint);
    Handled
}

fn stop(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.nothing_can_write() {
        hand_over.enter(HandOverStage::Wait { since: context.now });
        return wait(hand_over, context.now, context);
    }
    let patience = context.world.spec().map_or(Duration::from_secs(30), |spec| spec.ha.primary_stop_timeout);
    context.stop(StopMode::Fast { patience });
    Handled
}

fn wait(hand_over: &mut HandOver, since: BootTime, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.job().is_some_and(|job| job != OperationKind::Look) {
        standby::cancel_job(context);
    }
    let control = match &context.world.data {
        DataDirectory::Unknown if context.now.since(since) > Duration::from_secs(LOOK_PATIENCE_S) => {
            return give_up(hand_over, context, "how PostgreSQL ended could not be read");
        }
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Handled;
        }
        DataDirectory::Full(control) => Some(control.clone()),
        DataDirectory::Empty | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => None,
    };
    let clean = control.filter(|control| control.state == DatabaseState::ShutDown);
    let Some(control) = clean else {
        // Not stopped in good order: nobody can be promised anything.
        return give_up(hand_over, context, "PostgreSQL did not shut down in good order");
    };
    if let Some(successor) = successor(hand_over, &control, context) {
        return begin_release(hand_over, context, &control, Some(successor));
    }
    if context.now.since(since) < Duration::from_millis(SUCCESSOR_PATIENCE_MS) && somebody_could(hand_over, context) {
        return Handled;
    }
    if hand_over.request.is_some() && !context.world.stop_requested {
        return give_up(hand_over, context, "the successor did not get the shutdown checkpoint in time");
    }
    begin_release(hand_over, context, &control, None)
}

/// A member that has all our WAL, the one asked for or the best.
fn successor(hand_over: &HandOver, control: &ControlFacts, context: &Context<'_>) -> Option<MemberName> {
    let (view, spec) = (context.world.fresh_view()?, context.world.spec()?);
    spec.members
        .iter()
        .filter(|member| member.name != context.world.me.name && !member.nofailover())
        .filter(|member| hand_over.to.as_ref().is_none_or(|to| *to == member.name))
        .filter(|member| {
            view.members.get(&member.name).is_some_and(|key| {
                // The record begins at `checkpoint`: who has received past it has it whole, for WAL is sent in whole records.
                key.record.role == MemberRole::Replica
                    && key.record.timeline == Some(control.timeline)
                    && key.record.receive_lsn.is_some_and(|lsn| lsn > control.checkpoint)
            })
        })
        .max_by_key(|member| member.failover_priority)
        .map(|member| member.name.clone())
}

fn somebody_could(hand_over: &HandOver, context: &Context<'_>) -> bool {
    let (Some(view), Some(spec)) = (context.world.fresh_view(), context.world.spec()) else { return false };
    view.members.iter().any(|(name, key)| {
        *name != context.world.me.name
            && key.record.role == MemberRole::Replica
            && spec.member(name).is_some_and(|member| !member.nofailover())
            && hand_over.to.as_ref().is_none_or(|to| to == name)
    })
}

fn begin_release(hand_over: &mut HandOver, context: &mut Context<'_>, control: &ControlFacts, to: Option<MemberName>) -> Outcome<State> {
    let record = ReleaseRecord { epoch: hand_over.lock.epoch, timeline: control.timeline, lsn: control.checkpoint, to };
    let message = match &record.to {
        Some(to) => format!("releases the lock at {} for `{to}`", record.lsn),
        None => format!("releases the lock at {}, no member is known to have everything", record.lsn),
    };
    if context.start(Operation::Release { epoch: hand_over.lock.epoch, record: Some(record) }) {
        context.decide("releases", message);
        hand_over.enter(HandOverStage::Release);
    }
    Handled
}

fn release(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.in_flight.contains(&OperationKind::Release) {
        return Handled;
    }
    if context.world.released == Some(hand_over.lock.epoch) {
        context.world.let_go(context.actions);
        return Transition(after_leading(context));
    }
    // It failed or is unknown: judge again who has what, and ask again.
    hand_over.enter(HandOverStage::Wait { since: hand_over.since });
    Handled
}

/// The way back: the lock is still ours, so PostgreSQL starts again under it; on the way out of the daemon it is given up instead.
fn give_up(hand_over: &HandOver, context: &mut Context<'_>, why: &str) -> Outcome<State> {
    if context.world.stop_requested {
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then: Then::Release(hand_over.lock) } });
    }
    context.decide("hand_over_given_up", why);
    Transition(State::Promoting { promotion: Promotion { lock: hand_over.lock, way: Way::StartInPlace, since: context.now } })
}
