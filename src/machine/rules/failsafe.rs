//! A leader's duties under failsafe: keep the record, tell the lease's thread what it may go on with, and take the lock anew when the lease
//! ran out meanwhile.
//!
//! Order is the safety argument. *Rely on nobody -> the lease's thread says so -> etcd proves the lock by a renewal sent after that -> write
//! the record -> see it -> rely on those in it.* A member that is new in the record has promised nothing before.

use std::sync::Arc;
use std::time::Duration;

use crate::facts::cluster::{ClusterView, Continued, HistoryEntry};
use crate::facts::failsafe::Armed;
use crate::facts::guard::Word;
use crate::machine::action::{Action, LeaseOrder, Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::state::State;
use crate::machine::world::{Lock, World};
use crate::policy::failsafe::{self, HeldBack, Wanted};
use crate::types::{Epoch, LeaseId};

/// An order to rely on nobody that was not answered is given again after so long.
const DISARM_AGAIN_MS: u64 = 1_000;

/// In every state.
pub(crate) fn keep(context: &mut Context<'_>, state: &State) {
    let wanted = wanted(context.world);
    rely_on(context, wanted.as_ref());
    if *state == State::Primary {
        write_record(context, wanted.as_ref());
        take_anew(context);
        hold_what_was_taken_anew(context);
    }
    say(context, state, wanted.as_ref());
}

/// None as long as no proof says what lease the lock hangs on.
fn wanted(world: &World) -> Option<Wanted> {
    let (_, times) = world.failsafe.proof?;
    Some(failsafe::wanted(world.spec()?, world.view.as_deref()?, times.ttl))
}

/// Tells the lease's thread, whenever it changes. Once it relies on somebody it does so until it is told not to: the view stays what it
/// was while etcd is away, and so does the record, which only the holder of the lock may change.
fn rely_on(context: &mut Context<'_>, wanted: Option<&Wanted>) {
    let armed = wanted.and_then(|wanted| may_rely_on(context.world, wanted));
    let (now, failsafe) = (context.now, &mut context.world.failsafe);
    let unanswered = failsafe.disarming.is_some_and(|since| now.since(since) >= Duration::from_millis(DISARM_AGAIN_MS));
    // A late answer to an order before must not be taken for one to the next.
    let waits = failsafe.disarming.is_some() && !unanswered;
    if waits || armed == failsafe.armed && !unanswered {
        return;
    }
    let order = if unanswered { None } else { armed };
    failsafe.disarming = order.is_none().then_some(now);
    failsafe.armed = order.clone();
    context.actions.push(Action::Lease(LeaseOrder::Failsafe(order)));
}

fn may_rely_on(world: &World, wanted: &Wanted) -> Option<Armed> {
    let Lock::Proved { identity, .. } = world.lock else { return None };
    let view = world.view.as_ref()?;
    if world.failsafe.went_back {
        return None;
    }
    let changing = [OperationKind::WriteFailsafe, OperationKind::Release].iter().any(|kind| world.in_flight.contains(kind));
    if changing || !view.has_recorded(identity.epoch) {
        return None;
    }
    let armed = failsafe::armed(&world.me.name, identity, wanted.clone(), view, world.failsafe.written)?;
    // To begin with it, etcd has to have proved this very lock.
    (world.failsafe.armed.as_ref() == Some(&armed) || world.is_proved_by_etcd()).then_some(armed)
}

fn write_record(context: &mut Context<'_>, wanted: Option<&Wanted>) {
    let world = &context.world;
    let (Some(wanted), Some(lock), Some((sent, _))) = (wanted, world.lock.identity(), world.failsafe.proof) else { return };
    let Some(view) = world.fresh_view().filter(|view| view.leader.as_ref().is_some_and(|leader| leader.epoch == lock.epoch)) else {
        return;
    };
    let relies = world.failsafe.armed.is_some() || world.failsafe.disarming.is_some() || sent < world.failsafe.disarmed_at;
    if relies
        || !view.has_recorded(lock.epoch)
        || !world.is_proved_by_etcd()
        || !failsafe::has_to_be_written(wanted, view, world.failsafe.written)
    {
        return;
    }
    let (judged_on, record) = (view.failsafe_revision, wanted.clone().record());
    if context.start(Operation::WriteFailsafe { epoch: lock.epoch, judged_on, record }) {
        // What is on its way is not known.
        context.world.failsafe.written = None;
    }
}

/// The lease ran out; within the promises that hold, the lock is taken once more, on a new lease and for the timeline that we write on.
fn take_anew(context: &mut Context<'_>) {
    let world = &context.world;
    let (true, Some(lock), Some(lease)) = (world.failsafe.lapsed, world.lock.identity(), world.lease) else { return };
    let Some(view) = world.fresh_view().cloned() else { return };
    let absent_or_ours = view.leader.as_ref().is_none_or(|leader| world.is_taken_anew(leader));
    let writes = matches!(world.running(), Some((_, Word::Writable)));
    let ready = lease != lock.lease && world.written.is_some() && writes && absent_or_ours;
    let started = world.failsafe.started.unwrap_or(context.now);
    // Whoever made the record what it is now, we are in it: or we may not run.
    let named = !matches!(failsafe::held_back(context.now, &world.me.name, &view, None, started), Some(HeldBack::Never(_)));
    if !ready || !named || view.spec.is_none() {
        return;
    }
    let Some(history) = continued(&view, lock.epoch, lease.lease) else { return };
    if context.start(Operation::Acquire { judged_on: Arc::clone(&view), history, initialize: None }) {
        let message =
            format!("the lease of epoch {} ran out while etcd could not be asked: takes the lock anew on the same timeline", lock.epoch);
        context.decide("takes_anew", message);
    }
}

/// `history` with the timeline of this leadership handed on to the next.
fn continued(view: &ClusterView, epoch: Epoch, lease: LeaseId) -> Option<Vec<HistoryEntry>> {
    let mut history = view.history.clone();
    let entry = history.iter_mut().rev().find(|entry| entry.is_of(epoch))?;
    entry.continued = Some(Continued { lease, epoch: None });
    Some(history)
}

/// Won in a lapse: the lease's thread has to prove it, and the guard to learn of it.
fn hold_what_was_taken_anew(context: &mut Context<'_>) {
    let Lock::Proved { identity, .. } = context.world.lock else { return };
    if !context.world.failsafe.lapsed && context.world.holding.is_none() {
        context.world.holding = Some(identity);
        context.actions.push(Action::Lease(LeaseOrder::Hold(identity)));
    }
}

fn say(context: &mut Context<'_>, state: &State, wanted: Option<&Wanted>) {
    match wanted {
        Some(Wanted::Waits(why)) if *state == State::Primary => context.world.set_info("failsafe_waits", why.clone()),
        _ => context.world.clear("failsafe_waits"),
    }
    match &context.world.failsafe.promise {
        Some(promise) if context.world.failsafe.keeps_still => {
            let message = format!("leaves the lock to `{}`, which leads although it cannot ask etcd", promise.to);
            context.world.set_info("promised", message);
        }
        _ => context.world.clear("promised"),
    }
    let leads_on = context.world.failsafe.sustained.is_some();
    if leads_on {
        let peers =
            context.world.failsafe.armed.as_ref().map(|armed| armed.peers.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>());
        let others = peers
            .filter(|peers| !peers.is_empty())
            .map_or_else(|| "nobody else may lead".to_owned(), |peers| format!("as long as {} answer", peers.join(" and ")));
        context.world.warn("failsafe", format!("etcd cannot be asked, and this member leads on, {others}"));
    } else {
        context.world.clear("failsafe");
    }
    if leads_on != context.world.failsafe.said {
        context.world.failsafe.said = leads_on;
        let message = if leads_on { "etcd cannot be asked: leads on by the promises of all others" } else { "leads no longer by promises" };
        context.decide("failsafe", message);
    }
}
