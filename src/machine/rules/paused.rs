//! Maintenance mode: a person works on the cluster, and this member starts, stops, copies and elects nothing. The lock is kept up, and the
//! guard is told not to end a primary whose lock is not proved any more.
//!
//! Order is the safety argument. Into it: *see the key -> note in etcd that our guard may suspend, in a transaction that compares the key ->
//! tell the guard*. Out of it: *the key says `ending` -> the lock is proved anew -> the guard fences again -> take the note back -> the key
//! goes*. Every election compares that the key is absent, so nobody can have been elected beside a server that nobody would have ended.
//!
//! What surprises: a primary whose lock ran out here takes it anew, on the timeline that it wrote on all the while.

use std::sync::Arc;
use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::{ClusterView, Continued, HistoryEntry};
use crate::facts::guard::{Maintenance, Word};
use crate::facts::maintenance::{MaintenanceRecord, Phase};
use crate::machine::action::{Action, Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::rules::{primary, slots, starting, synchrony};
use crate::machine::state::State;
use crate::machine::world::Lock;
use crate::mutants::{Mutant, mutant};
use crate::policy::maintenance::{WAITS_KIND, awaited, is_ending};
use crate::types::{Epoch, LeaseId, MemberName, Revision};

/// How often the guard is asked what it sees.
const GUARD_LOOKS_EVERY_MS: u64 = 1_000;

pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    starting::adopt_or_ask_for_a_lease(context);
    if !context.world.is_maintained() {
        return over(context);
    }
    look_again(context);
    take_lock_anew(context);
    tell_guard(context);
    take_note_back(context);
    end(context);
    keep_records(context);
    say(context);
    Handled
}

/// Evaluated afresh, but for a leader that led all the while.
fn over(context: &mut Context<'_>) -> Outcome<State> {
    let world = &mut *context.world;
    world.asked.suspended = None;
    for kind in ["maintenance", WAITS_KIND] {
        world.clear(kind);
    }
    let writes = matches!(world.running(), Some((_, Word::Writable)));
    let leads = writes && matches!(world.lock, Lock::Proved { until, .. } if context.now < until);
    Transition(if leads { State::Primary } else { State::Starting })
}

/// SIGTERM. The lock runs out while no daemon keeps it up, and the next one takes it anew. So that the guard ends nothing meanwhile, it is told
/// first; if that cannot be, the lock is over before long, and PostgreSQL with it.
pub(crate) fn leave(context: &mut Context<'_>) -> Outcome<State> {
    let world = &mut *context.world;
    let writes = matches!(world.running(), Some((_, Word::Writable)));
    if !world.exited && (world.suspends() || !writes) {
        world.exited = true;
        context.decide("leaves", "the daemon leaves in maintenance mode: guard and PostgreSQL stay as they are");
        context.actions.push(Action::Leave);
    }
    Handled
}

/// The guard is told of every revision of the key, also if it has nothing to suspend: no earlier word can come after that.
fn tell_guard(context: &mut Context<'_>) {
    let Some(guard) = context.world.guard.as_ref().filter(|_| !context.world.guard_gone) else { return };
    let known = guard.maintenance;
    let Some(mut word) = word(context) else { return };
    // An etcd that was restored counts from an older revision: the guard fences all the same.
    if !word.suspends {
        word.revision = word.revision.max(known.revision);
    }
    if word.revision > known.revision || word.revision == known.revision && word != known {
        context.actions.push(Action::Maintain(word));
    }
}

/// What the guard has to know by now. None = not to be said yet.
fn word(context: &mut Context<'_>) -> Option<Maintenance> {
    let view = Arc::clone(context.world.fresh_view()?);
    let Some(_) = &view.maintenance else {
        // An operator insisted: nothing is waited for.
        return context.world.suspends().then_some(Maintenance { revision: view.revision, suspends: false });
    };
    let revision = view.maintenance_revision;
    if is_ending(&view) {
        let ready = context.world.by_hand().is_none() && may_fence(context, &view);
        return ready.then_some(Maintenance { revision, suspends: false });
    }
    // By an operator's word, or by a daemon that knows nothing of this: then nobody waits for us.
    if another_leads(context, &view) {
        return Some(Maintenance { revision, suspends: false });
    }
    if mutant(Mutant::SuspendsByWhatItSaw) && writes_under_the_lock(context) {
        return Some(Maintenance { revision, suspends: true });
    }
    if context.world.asked.suspended == Some(revision) {
        return Some(Maintenance { revision, suspends: true });
    }
    if context.world.suspends() || writes_under_the_lock(context) {
        context.start(Operation::NoteSuspension { revision, suspends: true });
        return None;
    }
    context.world.cannot_write(context.now).then_some(Maintenance { revision, suspends: false })
}

/// A primary in good order, of which `history` says what it writes on. One that is not is the guard's ladder's business, whose deadlines run on.
fn writes_under_the_lock(context: &Context<'_>) -> bool {
    let world = &context.world;
    let recorded = world.lock.identity().is_some_and(|lock| world.recorded == Some(lock.epoch));
    world.lock.is_proved_at(context.now)
        && world.writes()
        && recorded
        && world.is_proved_by_etcd()
        && !world.promotion_asked_lately(context.now)
}

/// The deadlines of the lock may count again. They do so at once, as they are then: with an old proof the fast stop would follow.
fn may_fence(context: &Context<'_>, view: &ClusterView) -> bool {
    let world = &context.world;
    let proved = world.is_proved_by_etcd() && world.lock.is_proved_at(context.now);
    !world.suspends() || proved || another_leads(context, view) || world.cannot_write(context.now) || mutant(Mutant::FencesWithAnOldProof)
}

fn another_leads(context: &Context<'_>, view: &ClusterView) -> bool {
    view.leader.as_ref().is_some_and(|leader| leader.holder != context.world.me.name.as_str())
}

/// The guard looks at the process table when it is asked: what a person starts here is seen, and so is a guard that was late once.
fn look_again(context: &mut Context<'_>) {
    let asked = context.world.asked.guard_looked;
    if asked.is_none_or(|at| context.now.since(at) >= Duration::from_millis(GUARD_LOOKS_EVERY_MS)) {
        context.world.asked.guard_looked = Some(context.now);
        context.actions.push(Action::AskGuard);
    }
}

/// Our guard fences again: etcd's note that it may not goes.
fn take_note_back(context: &mut Context<'_>) {
    let world = &context.world;
    let Some(view) = world.fresh_view() else { return };
    let revision = view.maintenance_revision;
    let fences = world.guard_maintained().is_some_and(|word| word.revision >= revision && !word.suspends);
    let early = mutant(Mutant::NoteTakenBackBeforeTheGuardFences);
    // Without the member key another daemon of this name may be at work, and the note be of its guard.
    if is_ending(view) && view.suspended.contains(&world.me.name) && world.written.is_some() && (fences || early) {
        context.start(Operation::NoteSuspension { revision, suspends: false });
    }
}

/// Whoever sees that nobody is waited for any more deletes the key.
fn end(context: &mut Context<'_>) {
    let world = &context.world;
    let (Some(view), Some(spec)) = (world.fresh_view(), world.spec()) else { return };
    let nobody_asked = mutant(Mutant::EndedBeforeAllHaveHeard);
    if !is_ending(view) || !nobody_asked && !awaited(view, spec.members.iter().map(|member| &member.name)).is_empty() {
        return;
    }
    let leader = view.leader.as_ref().map_or(Revision(0), |leader| leader.mod_revision);
    context.start(Operation::EndMaintenance { revision: view.maintenance_revision, leader });
}

/// The lease ran out while the guard ended nothing. Nobody else can have led since: every election compares that the key is absent.
fn take_lock_anew(context: &mut Context<'_>) {
    let world = &context.world;
    let (Lock::None, true, Some(lease)) = (world.lock, world.suspends(), world.lease) else { return };
    let Some(view) = world.fresh_view().cloned() else { return };
    let ours = |holder: &str| holder == world.me.name.as_str();
    let absent_or_ours = view.leader.as_ref().is_none_or(|leader| ours(&leader.holder) && leader.lease == lease.lease);
    // The guard keeps the lock that it was told last.
    let last = world.guard.as_ref().and_then(|guard| guard.lock).map(|lock| lock.identity.epoch);
    let (true, true, Some(last), true) = (world.writes(), absent_or_ours, last, view.maintenance.is_some() && view.spec.is_some()) else {
        return;
    };
    let (Some(history), true) = (continued(&view, &world.me.name, last, lease.lease), world.written.is_some()) else { return };
    if context.start(Operation::Acquire { judged_on: view, history, initialize: None }) {
        let message = format!("the lock of epoch {last} ran out in maintenance mode: takes it anew on the same timeline");
        context.decide("takes_anew", message);
    }
}

/// `history` with the timeline of that leadership of ours handed on to the next. None = another has led since. One that was handed on already,
/// by a lock that the answer to was lost, is ours too.
fn continued(view: &ClusterView, me: &MemberName, last: Epoch, lease: LeaseId) -> Option<Vec<HistoryEntry>> {
    let mut history = view.history.clone();
    let handed_on = |entry: &HistoryEntry| entry.continued.is_some_and(|continued| continued.epoch.is_none());
    let entry = history.last_mut().filter(|entry| entry.member == *me && (entry.is_of(last) || handed_on(entry)))?;
    entry.continued = Some(Continued { lease, epoch: None });
    Some(history)
}

/// What needs no server to be started or stopped goes on: what the lock's holder writes into etcd, whom commits wait for, slots.
fn keep_records(context: &mut Context<'_>) {
    let Lock::Proved { identity, until, .. } = context.world.lock else { return };
    let writes = matches!(context.world.running(), Some((_, Word::Writable)));
    if writes && context.now < until && primary::keep_records(context, identity) {
        synchrony::keep(context, identity);
        slots::keep(context);
    }
}

fn say(context: &mut Context<'_>) {
    let unnamed = || MaintenanceRecord { by: "unknown".into(), why: String::new(), at: String::new(), until: None, phase: Phase::On };
    let record = context.world.view.as_ref().and_then(|view| view.maintenance.clone()).unwrap_or_else(unnamed);
    let suspended = if !context.world.suspends() {
        ""
    } else if matches!(context.world.lock, Lock::Proved { .. }) {
        "; the guard would not end PostgreSQL if the lock could not be proved"
    } else {
        "; PostgreSQL writes on WITHOUT a proof of the lock: nothing would end it if another member were promoted by hand"
    };
    let ends = waited_for(context).map_or_else(String::new, |names| format!("; it ends when {names} have heard of it"));
    let message =
        format!("maintenance mode ({}: {}): nothing is started, stopped, copied or elected here{suspended}{ends}", record.by, record.why);
    context.world.set_info("maintenance", message);
    let waits = if context.world.maintenance_ends() { waits(context) } else { context.world.by_hand().map(str::to_owned) };
    context.world.set_or_clear(WAITS_KIND, waits);
}

/// Of whom something has to be heard. None = it is on, or nobody knows.
fn waited_for(context: &Context<'_>) -> Option<String> {
    let (view, spec) = (context.world.fresh_view().filter(|view| is_ending(view))?, context.world.spec()?);
    let names: Vec<_> = awaited(view, spec.members.iter().map(|member| &member.name)).iter().map(|(name, _)| format!("`{name}`")).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

/// Why it is not over here.
fn waits(context: &Context<'_>) -> Option<String> {
    let world = &context.world;
    if let Some(by_hand) = world.by_hand() {
        return Some(by_hand.to_owned());
    }
    if world.guard_maintained().is_none() {
        return Some("the guard has not said that it has heard of the end of maintenance mode".to_owned());
    }
    world.suspends().then(|| {
        let failed = world.failures(OperationKind::Acquire) > 0;
        let how = if failed { ", and could not be taken anew so far" } else { "" };
        format!("the lock has to be proved before the guard may fence again, or PostgreSQL would be ended{how}")
    })
}
