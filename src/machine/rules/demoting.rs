//! The end of PostgreSQL, proved, before anything else; and the way out of the daemon.
//!
//! The lock is never released, and nothing is started, while any process of PostgreSQL is left.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::guard::Word;
use crate::machine::action::{Action, Operation, OperationKind, StopMode};
use crate::machine::node::{Context, after_leading};
use crate::machine::rules::{promoting, standby};
use crate::machine::state::{Demotion, Promotion, State, Then, Way};
use crate::machine::world::{Etcd, Lock};
use crate::mutants::{Mutant, mutant};
use crate::types::LockIdentity;

/// How long a member whose leadership came to nothing leaves the lock to others, if there are any (SAFETY rows 9 and 51).
const ABSTAIN_S: u64 = 20;

pub(crate) fn rule(demotion: &mut Demotion, context: &mut Context<'_>) -> Outcome<State> {
    let released_alive = mutant(Mutant::ReleasedBeforeDeath) && matches!(demotion.then, Then::Release(_));
    if !ended(context, StopMode::Kill) && !released_alive {
        return Handled;
    }
    if context.world.lock == Lock::None {
        return Transition(after_leading(context));
    }
    if let Then::Release(lock) | Then::StartAgain(lock) = &mut demotion.then {
        promoting::follow_lease(lock, context);
    }
    match demotion.then {
        Then::Follow => {
            context.world.let_go(context.actions);
            Transition(after_leading(context))
        }
        Then::Release(lock) => released(context, lock),
        Then::StartAgain(lock) if context.world.stop_requested => released(context, lock),
        Then::StartAgain(lock) => match context.world.lock {
            Lock::Proved { identity, announce_at, .. } if identity == lock && context.now < announce_at => {
                Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } })
            }
            // It can be proved again soon.
            Lock::Unproved(identity) if identity == lock && context.world.etcd == Etcd::Reachable => {
                Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } })
            }
            // Read-only until it is proved again, or known to be gone.
            Lock::Proved { .. } | Lock::Unproved(_) | Lock::None => Transition(State::Following),
        },
    }
}

/// Orders the end until it is proved.
fn ended(context: &mut Context<'_>, mode: StopMode) -> bool {
    standby::cancel_job(context);
    if context.world.unguarded().is_some() || context.world.guard.is_none() {
        context.start(Operation::FenceByScan);
        return false;
    }
    if context.world.proved_empty() {
        // A start that was ordered before may still bring a server up.
        return context.world.nothing_can_write();
    }
    context.stop(mode);
    false
}

/// Gives the lock back, without a record: nobody is promised anything.
fn released(context: &mut Context<'_>, lock: LockIdentity) -> Outcome<State> {
    // Nobody could take it in maintenance mode: it is kept, and judged afresh when that is over.
    if context.world.is_maintained() && !context.world.stop_requested {
        return Transition(State::Following);
    }
    if context.world.released == Some(lock.epoch) {
        context.world.let_go(context.actions);
        context.world.abstains_until = Some(context.now + Duration::from_secs(ABSTAIN_S));
        return Transition(after_leading(context));
    }
    // Nobody can be told now. Reads are served meanwhile; the lock runs out, or is given back when etcd is there again.
    if context.world.etcd != Etcd::Reachable && !context.world.stop_requested {
        context.world.let_go(context.actions);
        return Transition(State::Following);
    }
    context.start(Operation::Release { epoch: lock.epoch, record: None });
    Handled
}

/// SIGTERM: PostgreSQL ends, the lock goes, the daemon leaves.
pub(crate) fn stopping(context: &mut Context<'_>) -> Outcome<State> {
    let patience = context.world.spec().map_or(Duration::from_secs(30), |spec| spec.ha.primary_stop_timeout);
    let writable = matches!(context.world.running(), Some((_, Word::Writable)));
    let mode = if writable && context.world.lock == Lock::None { StopMode::Kill } else { StopMode::Fast { patience } };
    // A guard that was never met keeps nothing: the shell has started none.
    let met = context.world.guard.is_some() || context.world.guard_gone;
    if met && !ended(context, mode) {
        return Handled;
    }
    if let Some(lock) = context.world.lock.identity() {
        if context.world.released == Some(lock.epoch) {
            context.world.let_go(context.actions);
        } else {
            context.start(Operation::Release { epoch: lock.epoch, record: None });
            // etcd away: the lease runs out by itself.
            if context.world.failures(OperationKind::Release) < 3 {
                return Handled;
            }
        }
    }
    if !context.world.exited {
        context.world.exited = true;
        context.actions.push(Action::Exit(0));
    }
    Handled
}
