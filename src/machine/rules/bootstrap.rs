//! An empty data directory: wait for a leader and copy it, or be the one that runs initdb.
//!
//! initdb happens only when every declared member has reported an empty data directory, or an operator named this member; never
//! when any data directory is known to hold something (I11, SAFETY rows 32 and 72).

use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::{ClusterView, DataDirectoryReport, Initialize, MemberKey, MemberRole};
use crate::facts::postgres::DataDirectory;
use crate::facts::requests::{Ask, RequestProgress};
use crate::machine::action::{Old, Operation, OperationKind, Upstream};
use crate::machine::node::Context;
use crate::machine::rules::{receiving, reinit, standby};
use crate::machine::state::{Promotion, State, Way};
use crate::machine::world::Lock;
use crate::mutants::{Mutant, mutant};
use crate::policy::upstream;
use crate::types::{MemberName, TimelineId};

/// How much longer each further member in the spec waits before it claims initialization.
const CLAIM_STEP_MS: u64 = 2_000;

pub(crate) fn awaiting_leader(context: &mut Context<'_>) -> Outcome<State> {
    if context.world.declared().is_none() {
        return Transition(State::Undeclared);
    }
    if let Some(state) = has_data(context) {
        return Transition(state);
    }
    match context.world.data {
        DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => return Transition(State::Following),
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Handled;
        }
        DataDirectory::Empty => {}
    }
    if context.world.written.is_none() || context.world.fresh_view().is_none() {
        // What this member says of itself goes on counting.
        standby::look_again(context);
        return Handled;
    }
    if leader_to_copy(context).is_some() {
        return Transition(State::Cloning);
    }
    match may_initialize(context) {
        Ok(()) => {
            context.world.clear("waiting_to_initialize");
            Transition(State::Initializing)
        }
        Err(why) => {
            context.world.set_info("waiting_to_initialize", why);
            // Somebody may bring the data back that is waited for.
            standby::look_again(context);
            // Given back before, and etcd may not have heard it.
            give_back_claim(context);
            Handled
        }
    }
}

/// A server runs here, wherever it came from: there is data, and no look at the directory is believed while it runs.
fn has_data(context: &Context<'_>) -> Option<State> {
    context.world.running()?;
    standby::ended_if_writable(context).or(Some(State::Following))
}

/// Another member that leads with a running primary. Whoever holds the lock copies nobody: its view is older than that.
pub(crate) fn leader_to_copy(context: &Context<'_>) -> Option<Upstream> {
    context.world.fresh_view().filter(|_| context.world.lock == Lock::None)?;
    let (_, key) = context.world.other_leader()?;
    (key.record.role == MemberRole::Primary).then(|| standby::upstream(context))?
}

/// A standby that spares the leader the work. After a copy that failed it is the leader that is copied.
pub(crate) fn source_of_copy(context: &Context<'_>) -> Option<Upstream> {
    let world = &context.world;
    if reinit::from_leader_only(world) {
        return None;
    }
    let (view, spec) = (world.fresh_view()?, world.spec()?);
    let name = upstream::copy_source(spec, view, &world.me.name).filter(|_| world.failures(OperationKind::Clone) == 0)?;
    view.members.get(name).map(|key| receiving::upstream_of(name, key))
}

fn may_initialize(context: &Context<'_>) -> Result<(), String> {
    let (Some(view), Some(spec)) = (context.world.fresh_view(), context.world.spec()) else {
        return Err("etcd cannot be asked".to_owned());
    };
    if context.world.backs_off(context.now, OperationKind::Initdb) {
        return Err("initdb failed here a moment ago; it is tried again unless another member is faster".to_owned());
    }
    match &view.initialize {
        None => {}
        // Also one that the run before this left on the lease that was taken over.
        Some(Initialize::Claimed { lease: on, .. }) if context.world.lease.is_some_and(|lease| lease.lease == *on) => {}
        Some(Initialize::Claimed { by, .. }) if !spec.members.iter().any(|member| member.name.as_str() == by) => {
            return Err(format!("`{by}` has begun to initialize the cluster and is not in spec.members: declare it, or stop its daemon"));
        }
        Some(Initialize::Claimed { by, .. }) => return Err(format!("`{by}` is initializing the cluster")),
        Some(Initialize::Done(id)) => {
            return Err(format!(
                "the cluster exists (system identifier {id}) and nobody leads it: a member with its data has to come back"
            ));
        }
        Some(Initialize::Unreadable(value)) => return Err(format!("the key initialize is unreadable: `{value}`")),
    }
    if view.leader.is_some() {
        return Err("somebody holds the lock".to_owned());
    }
    if view.spec.is_none() {
        return Err("there is no spec in etcd".to_owned());
    }
    if asked_to_bootstrap(view, &context.world.me.name) {
        return Ok(());
    }
    // Of members that the spec names no more too: one that was removed while it ran initdb has the cluster's data.
    for (name, key) in &view.members {
        match key.record.data_directory {
            _ if mutant(Mutant::InitdbBesideData) => {}
            DataDirectoryReport::Empty => {}
            DataDirectoryReport::Full => {
                return Err(format!("the data directory of `{name}` is not empty: it has to lead, or be emptied by hand"));
            }
            DataDirectoryReport::Unknown => return Err(format!("what is in the data directory of `{name}` is not known")),
        }
    }
    if let Some(silent) = spec.members.iter().find(|member| !view.members.contains_key(&member.name)) {
        let me = &context.world.me.name;
        let silent = &silent.name;
        return Err(format!("`{silent}` has not reported an empty data directory; `pgherd bootstrap --on {me}` goes on without it"));
    }
    let mut candidates: Vec<_> = spec.members.iter().filter(|member| !member.nofailover()).collect();
    candidates.sort_by_key(|member| std::cmp::Reverse(member.failover_priority));
    let Some(rank) = candidates.iter().position(|member| member.name == context.world.me.name) else {
        return Err("this member never leads".to_owned());
    };
    let since = context.world.vacancy.map_or(context.now, |vacancy| vacancy.seen);
    if context.now.since(since) < Duration::from_millis(CLAIM_STEP_MS * rank as u64) {
        return Err(format!("`{}` comes first", candidates[0].name));
    }
    Ok(())
}

fn asked_to_bootstrap(view: &ClusterView, me: &MemberName) -> bool {
    let open = RequestProgress::is_open;
    let nobody_has_data = !view.members.values().any(MemberKey::has_data);
    nobody_has_data
        && view.requests.values().any(|key| matches!(&key.record.ask, Ask::Bootstrap { on } if on == me) && open(&key.record.progress))
}

/// A member that the spec names no more gives its claim back, but only when there is nothing in its data directory: what initdb made
/// there is the cluster's data, and the claim keeps others from making a second one before this member could say so.
pub(crate) fn give_back_claim(context: &mut Context<'_>) {
    let (Some(view), Some(lease)) = (context.world.fresh_view(), context.world.lease) else { return };
    if view.is_claimed_on(lease.lease) && context.world.data == DataDirectory::Empty {
        context.start(Operation::GiveUpInitialize);
    }
}

/// Claim, initdb, lock: each step is asked for until it is seen, and a crash after any of them is a state that somebody can go on from.
pub(crate) fn initializing(context: &mut Context<'_>) -> Outcome<State> {
    if let Lock::Unproved(lock) | Lock::Proved { identity: lock, .. } = context.world.lock {
        context.world.initialized_here = true;
        return Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } });
    }
    if let Some(state) = has_data(context) {
        standby::cancel_job(context);
        return Transition(state);
    }
    if context.world.in_flight.contains(&OperationKind::Initdb) || context.world.in_flight.contains(&OperationKind::Acquire) {
        return Handled;
    }
    if context.world.spec().is_some() && context.world.declared().is_none() {
        return Transition(State::AwaitingLeader);
    }
    let (Some(view), Some(spec), Some(lease)) = (context.world.fresh_view().cloned(), context.world.spec().cloned(), context.world.lease)
    else {
        return Handled;
    };
    if view.leader.is_some() {
        return Transition(State::Following);
    }
    let claimed_by_us = view.is_claimed_on(lease.lease);
    match context.world.data {
        DataDirectory::Full(ref control) => {
            // Ours, made a moment ago. The lock goes with the identity, in one transaction.
            let own = control.system_id;
            let initialize = Some(own);
            let somebody_elses = match &view.initialize {
                Some(Initialize::Claimed { lease: on, .. }) => *on != lease.lease,
                Some(Initialize::Done(id)) => *id != own,
                Some(Initialize::Unreadable(_)) => true,
                None => false,
            };
            if somebody_elses {
                return Transition(State::Following);
            }
            // Nobody takes a lock in maintenance mode that was not theirs.
            if view.maintenance.is_some() {
                return Handled;
            }
            let reserved = TimelineId(1);
            context.world.reserved = Some(reserved);
            let history = standby::with_reservation(&view, reserved, &context.world.me.name, lease.lease, "the cluster was initialized");
            context.start(Operation::Acquire { judged_on: view, history, initialize });
            Handled
        }
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            Handled
        }
        DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => Transition(State::Following),
        DataDirectory::Empty if claimed_by_us => {
            let full = view.members.values().any(MemberKey::has_data) && !mutant(Mutant::InitdbBesideData);
            if full || context.world.backs_off(context.now, OperationKind::Initdb) {
                context.start(Operation::GiveUpInitialize);
                return Transition(State::AwaitingLeader);
            }
            // Without the guard's proof that nothing runs there, nothing is made there (I10).
            if context.world.proved_empty() && context.start(Operation::Initdb { spec }) {
                context.world.data = DataDirectory::Unknown;
            }
            Handled
        }
        DataDirectory::Empty => {
            if view.initialize.is_some() {
                return Transition(State::AwaitingLeader);
            }
            context.start(Operation::ClaimInitialize);
            Handled
        }
    }
}

pub(crate) fn cloning(context: &mut Context<'_>) -> Outcome<State> {
    if let Some(state) = has_data(context) {
        standby::cancel_job(context);
        return Transition(state);
    }
    if context.world.in_flight.contains(&OperationKind::Clone) {
        let leader_gone = context.world.fresh_view().is_some_and(|view| view.leader.is_none());
        if leader_gone {
            context.actions.push(crate::machine::action::Action::CancelJob);
            return Transition(State::AwaitingLeader);
        }
        return Handled;
    }
    match context.world.data {
        DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => return Transition(State::Following),
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Handled;
        }
        DataDirectory::Empty => {}
    }
    let (Some(leader), Some(spec)) = (leader_to_copy(context), context.world.spec().cloned()) else {
        return Transition(State::AwaitingLeader);
    };
    let from = source_of_copy(context).unwrap_or_else(|| leader.clone());
    if context.world.proved_empty() && context.start(Operation::Clone { from, leader, spec, old: Old::Empty }) {
        context.world.data = DataDirectory::Unknown;
    }
    Handled
}
