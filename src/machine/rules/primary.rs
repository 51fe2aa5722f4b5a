//! Leading: keep the records under our epoch current, take up new configuration last, answer requests, and notice the end.
//!
//! The lock's upkeep is not here: it has its own thread, and the ladder is the guard's. Between A and the fast stop this state
//! stays: a proof in time takes the announcement back.

use std::collections::BTreeMap;

use statig::prelude::*;

use crate::facts::cluster::{HistoryEntry, MemberRole, StatusRecord};
use crate::facts::guard::{Rung, Word};
use crate::facts::postgres::SqlFacts;
use crate::machine::action::{Operation, OperationKind};
use crate::machine::bookkeeping::{CRASH_LIMIT, CRASH_WINDOW_S};
use crate::machine::node::Context;
use crate::machine::rules::{requests, restart, slots, synchrony};
use crate::machine::state::{Demotion, HandOver, Promotion, State, Then, Way};
use crate::machine::world::Lock;
use crate::policy::synchrony::goal as synchrony_goal;
use crate::spec::cluster::PermanentSlot;
use crate::types::{LockIdentity, Lsn, MemberName, TimelineId};

pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    let Some(lock) = context.world.lock.identity() else {
        let why = "the lock is not ours".to_owned();
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } });
    };
    if context.world.ending().is_some_and(|rung| rung >= Rung::FastStop) {
        let why = "the guard is ending PostgreSQL".to_owned();
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::StartAgain(lock) } });
    }
    if let Some(why) = context.world.unguarded() {
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then: Then::StartAgain(lock) } });
    }
    if context.world.proved_empty() {
        return ended_by_itself(context, lock);
    }
    match context.world.running() {
        Some((_, Word::Writable)) => {}
        Some((_, Word::Standby)) => {
            return Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } });
        }
        None => return Handled,
    }
    if let Some(at) = context.world.sql().filter(|sql| sql.in_recovery).map(|sql| sql.timeline) {
        return not_promoted_yet(context, lock, at);
    }
    if context.world.sql().is_some_and(|sql| sql.stopping) {
        return restart::told_to_stop(context);
    }
    upkeep(context, lock);
    match requests::taken_up(context) {
        Handled => restart::of_primary(context),
        goes => goes,
    }
}

/// Adopted from a daemon that ended between the guard's word and the promotion (SAFETY row 52): it is gone on with.
fn not_promoted_yet(context: &Context<'_>, lock: LockIdentity, at: TimelineId) -> Outcome<State> {
    let Some(timeline) = context.world.timeline_of(lock) else { return Handled };
    if timeline == at {
        return start_again_as_primary(lock);
    }
    let way = Way::Promote { timeline };
    Transition(State::Promoting { promotion: Promotion { lock, way, since: context.now } })
}

/// There is nothing to promote it to, and in recovery it stays.
pub(crate) fn start_again_as_primary(lock: LockIdentity) -> Outcome<State> {
    let why = "PostgreSQL is in recovery on the timeline that the lock allows it to write on".to_owned();
    Transition(State::Demoting { demotion: Demotion { why, then: Then::StartAgain(lock) } })
}

/// SAFETY rows 6 and 9: once more in place; in a crash loop another member has to lead.
fn ended_by_itself(context: &mut Context<'_>, lock: LockIdentity) -> Outcome<State> {
    let at_once = context.world.spec().is_some_and(|spec| spec.ha.primary_start_timeout.is_zero());
    if at_once || context.world.recent_primary_starts(context.now) >= CRASH_LIMIT {
        let why = if at_once {
            "PostgreSQL ended and primary_start_timeout is 0".to_owned()
        } else {
            format!("PostgreSQL ended {CRASH_LIMIT} times within {CRASH_WINDOW_S} s")
        };
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Release(lock) } });
    }
    Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } })
}

fn upkeep(context: &mut Context<'_>, lock: LockIdentity) {
    let Some(spec) = context.world.spec().cloned() else { return };
    if !keep_records(context, lock) {
        return;
    }
    synchrony::keep(context, lock);
    let start = context.world.running().map(|(start, _)| start);
    if context.world.roles_for != start {
        let post_init = context.world.initialized_here;
        context.start(Operation::EnsureRoles { spec, post_init });
    } else {
        context.world.initialized_here = false;
        slots::keep(context);
        take_up_configuration(context);
    }
}

/// What those who elect the next leader go by, for as long as PostgreSQL takes writes here. True = it does, under a proved lock.
pub(crate) fn keep_records(context: &mut Context<'_>, lock: LockIdentity) -> bool {
    let Some((timeline, lsn)) = context.world.sql().filter(|sql| !sql.in_recovery).map(|sql| (sql.timeline, sql.receive_lsn)) else {
        return false;
    };
    if !matches!(context.world.lock, Lock::Proved { until, .. } if context.now < until) {
        return false;
    }
    record_promotion(context, lock, timeline);
    write_status(context, lock, timeline, lsn);
    true
}

/// Our entry in `history` gets its epoch, once; the executor adds parent and switch point from the history file. At once: what is not
/// recorded is not known to those who elect the next leader. So a view that is late is not waited for: what was written with the lock is
/// the newest there is, since nobody else has written under it.
fn record_promotion(context: &mut Context<'_>, lock: LockIdentity, timeline: TimelineId) {
    if context.world.recorded == Some(lock.epoch) {
        return;
    }
    let view = context.world.fresh_view().filter(|view| view.revision.0 >= lock.epoch.0);
    if view.is_some_and(|view| view.has_recorded(lock.epoch)) {
        context.world.recorded = Some(lock.epoch);
        return;
    }
    let mut history = view.map_or_else(|| context.world.asked.history.clone(), |view| view.history.clone());
    let ours = |entry: &&mut HistoryEntry| entry.awaits(&context.world.me.name, lock.lease.lease);
    let Some(entry) = history.iter_mut().rev().find(ours) else { return };
    // A lock won to start in place keeps the timeline it has; the reserved id then stays unused for good.
    if entry.timeline == timeline {
        match &mut entry.continued {
            Some(continued) => continued.epoch = Some(lock.epoch),
            None => entry.epoch = Some(lock.epoch),
        }
        context.start(Operation::RecordPromotion { epoch: lock.epoch, history });
    }
}

/// Every loop_wait, and whenever WAL moved by half of what a failover may lose (P2).
fn write_status(context: &mut Context<'_>, lock: LockIdentity, timeline: TimelineId, lsn: Lsn) {
    let Some((ha, ha_slots)) = context.world.spec().map(|spec| (spec.ha.clone(), spec.replication.slots.clone())) else { return };
    let due = match &context.world.status_written {
        None => true,
        Some((last, at)) => {
            last.epoch != lock.epoch
                || context.now.since(*at) >= ha.loop_wait
                || lsn.bytes_since(last.lsn) >= (ha.maximum_lag_on_failover / 2).max(1)
        }
    };
    let slots = context.world.sql().map(|sql| permanent_slots(&ha_slots, sql)).unwrap_or_default();
    let replayed = replayed(context, lock);
    let record = StatusRecord { epoch: lock.epoch, timeline, lsn, slots, replayed, conditions: Vec::new() };
    if due && context.start(Operation::WriteStatus(record.clone())) {
        context.world.status_written = Some((record, context.now));
    }
}

/// How far those that `sync` counts on are known to be: at least as far as was said before in this leadership.
fn replayed(context: &Context<'_>, lock: LockIdentity) -> BTreeMap<MemberName, Lsn> {
    let world = &*context.world;
    let Some(record) = world.sync_of(lock.epoch).and_then(|known| known.record) else { return BTreeMap::new() };
    let written = world.status_written.as_ref().map(|(status, _)| status);
    let seen = world.view.as_ref().and_then(|view| view.status.as_ref());
    let said = written.or(seen).filter(|status| status.epoch == lock.epoch).map(|status| &status.replayed);
    let began = world.synchrony.standbys_of(lock.epoch).and_then(synchrony_goal::Standbys::began);
    let shown = |name: &MemberName| synchrony_goal::replayed_by(&world.sql()?.replicas, name, began?);
    let counted = record.members.iter().filter(|name| record.is_standby(name));
    counted.filter_map(|name| Some((name.clone(), said.and_then(|said| said.get(name).copied()).max(shown(name))?))).collect()
}

/// For standbys to move theirs on to.
fn permanent_slots(wanted: &BTreeMap<String, PermanentSlot>, sql: &SqlFacts) -> BTreeMap<String, Lsn> {
    let positions = sql.slots.iter().filter(|slot| wanted.contains_key(&slot.name));
    positions.filter_map(|slot| Some((slot.name.clone(), slot.restart_lsn?))).collect()
}

/// A standby tries a new generation first; alone, the primary has to try it itself.
fn take_up_configuration(context: &mut Context<'_>) {
    // It would let clients in.
    if context.world.may_be_closed() {
        return;
    }
    let Some((generation, spec)) = context.world.spec.clone() else { return };
    let current = context.world.in_force.as_ref().map(|files| files.generation);
    let anew = context.world.requests.writes_anew();
    if (current == Some(generation) || context.world.refused_generation == Some(generation)) && !anew {
        return;
    }
    let Some(view) = context.world.view.clone() else { return };
    let standbys: Vec<_> = view
        .members
        .iter()
        .filter(|(name, key)| **name != context.world.me.name && spec.member(name).is_some() && key.record.role == MemberRole::Replica)
        .collect();
    let refused_by = standbys.iter().find(|(_, key)| {
        key.record.observed_generation < generation
            && key.record.conditions.iter().any(|condition| condition.kind == "configuration_refused")
    });
    if let Some((name, _)) = refused_by {
        let message = format!("generation {generation} of the spec waits: `{name}` tried its configuration and put it back");
        context.world.fail("configuration_waits", message);
        return;
    }
    let tried = standbys.iter().any(|(_, key)| key.record.observed_generation >= generation);
    if tried || standbys.is_empty() || current.is_none() || current == Some(generation) {
        context.world.clear("configuration_waits");
        context.start(Operation::Configure { spec, generation, upstream: None, anew });
    }
}

/// The way into a planned end of leadership.
pub(crate) fn hand_over(context: &mut Context<'_>, to: Option<MemberName>, request: Option<String>) -> Outcome<State> {
    let Some(lock) = context.world.lock.identity() else {
        let why = "the lock is not ours".to_owned();
        return Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } });
    };
    context.world.checkpointed = None;
    context.world.forget_failures(OperationKind::Checkpoint);
    Transition(State::HandingOver { hand_over: HandOver::new(lock, to, request, context.now) })
}
