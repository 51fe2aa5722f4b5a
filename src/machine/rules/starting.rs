//! The first looks: guard, etcd, spec, lease, member key, data directory. Touches PostgreSQL only to fence it.
//!
//! What surprises: a lock is adopted only from the guard, and counts only once it is proved. A key in etcd with our name is nothing.

use statig::prelude::*;

use crate::facts::guard::{PostmasterFacts, Word};
use crate::facts::postgres::DataDirectory;
use crate::machine::action::{Action, LeaseOrder, Operation};
use crate::machine::node::Context;
use crate::machine::state::{Demotion, State, Then};
use crate::machine::world::{Lock, UNCLAIMED};
use crate::mutants::{Mutant, mutant};
use crate::types::{LeaseIdentity, LockIdentity};

pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    let Some(guard) = context.world.guard.clone() else { return Handled };
    adopt_or_ask_for_a_lease(context);
    match guard.postmaster {
        PostmasterFacts::Running { word: Word::Writable, .. } => adopt_primary(context),
        PostmasterFacts::Running { word: Word::Standby, .. } if context.world.spec().is_some() => declared_or(context, State::Following),
        PostmasterFacts::Running { word: Word::Standby, .. } | PostmasterFacts::Ending { .. } => Handled,
        PostmasterFacts::Unclaimed { .. } => {
            // Nobody vouches for it: it may write. A server that a former guard left behind is ending already.
            let why = UNCLAIMED.to_owned();
            Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } })
        }
        PostmasterFacts::ProvedEmpty { .. } => nothing_runs(context),
    }
}

/// The guard's memory first: a lease of an earlier run of this daemon goes on, and with it the member key and the lock.
pub(crate) fn adopt_or_ask_for_a_lease(context: &mut Context<'_>) {
    if context.world.lease.is_some() || context.world.lease_asked || context.world.spec().is_none() {
        return;
    }
    // The spec comes before the view that it was read from, in which the deliberate bug finds its name.
    if mutant(Mutant::AdoptedByName) && context.world.view.is_none() {
        return;
    }
    let by_name = named_like_us(context);
    let guard = context.world.guard.as_ref();
    let lock = guard.and_then(|guard| guard.lock).map(|lock| lock.identity).or(by_name);
    // The lock's own lease first: a run between may have got another one, and renewing that keeps up no lock.
    let kept = lock.map(|lock| lock.lease).or(guard.and_then(|guard| guard.lease));
    context.world.lease_asked_at = context.now;
    if let Some(identity) = kept {
        if let Some(lock) = lock {
            context.world.lock = Lock::Unproved(lock);
            context.world.holding = Some(lock);
            // That word was given when no release of this leadership could be on its way, and none begins while the server may write.
            let writes = matches!(context.world.running(), Some((_, Word::Writable)));
            context.world.found_writing = writes.then_some(lock.epoch);
        }
        context.world.lease_asked = true;
        context.world.adopting = Some(identity);
        context.actions.push(Action::Lease(LeaseOrder::Adopt(identity, lock)));
    } else if context.world.declared().is_some() {
        context.world.lease_asked = true;
        context.actions.push(Action::Lease(LeaseOrder::Grant));
    }
}

/// Never: a matching name is nothing. What a deliberate bug would take for ours.
fn named_like_us(context: &Context<'_>) -> Option<LockIdentity> {
    let world = &context.world;
    let leader = world.view.as_ref()?.leader.as_ref().filter(|leader| leader.holder == world.me.name.as_str())?;
    let lease = LeaseIdentity { cluster: world.view.as_ref()?.etcd_cluster?, lease: leader.lease };
    mutant(Mutant::AdoptedByName).then_some(LockIdentity { lease, epoch: leader.epoch })
}

fn adopt_primary(context: &mut Context<'_>) -> Outcome<State> {
    match context.world.lock {
        Lock::Proved { until, .. } if context.now < until => {
            context.decide("adopted", "the guard handed over the lock and PostgreSQL; both are as the daemon before left them");
            Transition(State::Primary)
        }
        // The guard's ladder runs whatever this daemon learns.
        Lock::Proved { .. } | Lock::Unproved(_) => Handled,
        // Not asked for yet: the ttl, and with it the spec, has to be known first.
        Lock::None if !context.world.lease_asked && context.world.guard.as_ref().is_some_and(|guard| guard.lock.is_some()) => Handled,
        Lock::None => {
            let why = "PostgreSQL may write, and the guard knows of no lock that allows it".to_owned();
            Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } })
        }
    }
}

fn nothing_runs(context: &mut Context<'_>) -> Outcome<State> {
    if context.world.spec().is_none() || context.world.view.is_none() {
        return Handled;
    }
    if context.world.declared().is_none() {
        return Transition(State::Undeclared);
    }
    if context.world.data == DataDirectory::Unknown {
        context.start(Operation::Look);
        return Handled;
    }
    // Without the member key another daemon of this name may be at work.
    if context.world.written.is_none() {
        return Handled;
    }
    match &context.world.data {
        DataDirectory::Empty => Transition(State::AwaitingLeader),
        DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => Transition(State::Following),
        DataDirectory::Unknown => Handled,
    }
}

fn declared_or(context: &Context<'_>, state: State) -> Outcome<State> {
    if context.world.declared().is_some() { Transition(state) } else { Transition(State::Undeclared) }
}

/// Serves health, starts and stops nothing, waits to be declared. Its key goes on saying what is in the data directory.
pub(crate) fn undeclared(context: &mut Context<'_>) -> Outcome<State> {
    if context.world.declared().is_some() {
        context.world.clear("undeclared");
        return Transition(State::Starting);
    }
    let message = format!("`{}` is not in spec.members: apply a spec that names it, or stop this daemon", context.world.me.name);
    context.world.warn("undeclared", message);
    if context.world.proved_empty() && context.world.data == DataDirectory::Unknown {
        context.start(Operation::Look);
    }
    super::bootstrap::give_back_claim(context);
    Handled
}
