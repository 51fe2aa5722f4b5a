//! A new copy of this member that an operator ordered by name (`pgherd reinit`): taken up, carried out, and answered once it streams.
//!
//! The order is in etcd, with the stage that it has got to, so that the next run of the daemon goes on. The copy is made beside, and the old
//! directory goes when it is in place; ordered in place, the directory is emptied first, and what is half emptied or half copied is no data
//! directory that anything is started on. Neither begins while `sync` counts on this member, and all of it
//! waits while nobody leads: until it is emptied, the directory is what it was, and this member can be elected with it.

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::postgres::DataDirectory;
use crate::facts::requests::{Ask, RequestKey, RequestProgress};
use crate::machine::action::{Action, Old, Operation, OperationKind, StopMode};
use crate::machine::node::Context;
use crate::machine::requests::{Reinit, ReinitStage};
use crate::machine::rules::{bootstrap, rejoining, standby};
use crate::machine::state::State;
use crate::machine::world::{Lock, World};
use crate::mutants::{Mutant, mutant};
use crate::policy::reinit::{self, Inputs};
use crate::policy::switchover::Obstacle;

/// So long the leader is given to count on others in this member's place.
const UNCOUNTED_WITHIN_S: u64 = 30;
/// So long `sync` has to have left this member out, its server being down: what the leader had sent before it saw it go has landed by then.
const UNCOUNTED_FOR_S: u64 = 3;
/// After so many copies that failed in a row the old directory is gone on with.
const COPIES_MAX: u32 = 3;

/// The order that is to be carried out now: it stands, and its copy is not in place.
fn ordered(world: &World) -> Option<&Reinit> {
    let reinit = world.requests.reinit.as_ref()?;
    (reinit.given_up.is_none() && reinit.stage < ReinitStage::Start).then_some(reinit)
}

/// The leader alone is to be copied.
pub(crate) fn from_leader_only(world: &World) -> bool {
    ordered(world).is_some_and(|reinit| reinit.from_leader)
}

fn obstacle(world: &World, request: &str) -> Option<Obstacle> {
    let (Some(spec), Some(view)) = (world.spec(), world.fresh_view()) else {
        return Some(Obstacle::Passing("this member cannot see etcd now".to_owned()));
    };
    reinit::obstacle(&Inputs { me: &world.me.name, leads: world.lock != Lock::None, spec, view, request })
}

fn enter(context: &mut Context<'_>, stage: ReinitStage) {
    if let Some(reinit) = &mut context.world.requests.reinit {
        reinit.enter(stage, context.now);
    }
}

/// Of what is still there nothing was thrown away: it is gone on with.
fn give_up(context: &mut Context<'_>, why: String) {
    context.decide("reinit_given_up", format!("the new copy that was ordered is not made, the data directory stays as it is: {why}"));
    if let Some(reinit) = &mut context.world.requests.reinit {
        reinit.given_up = Some(why);
    }
}

/// Of a standby: it is to go to [`State::Rejoining`], where all of this is done.
pub(crate) fn begins(context: &mut Context<'_>) -> bool {
    let Some(reinit) = ordered(context.world) else { return false };
    let (id, stage) = (reinit.id.clone(), reinit.stage);
    // One that was being emptied has nothing to go back to.
    let whole = context.world.running().is_some() || context.world.control().is_some() || stage == ReinitStage::Claimed;
    match obstacle(context.world, &id) {
        Some(Obstacle::Passing(_)) if stage > ReinitStage::Claimed => return false,
        Some(Obstacle::Lasting(_)) if !whole => return false,
        Some(Obstacle::Passing(why) | Obstacle::Lasting(why)) => {
            give_up(context, why);
            return false;
        }
        None => {}
    }
    context.world.forget_failures(OperationKind::Clone);
    enter(context, ReinitStage::Stop);
    context.decide("reinit", "PostgreSQL is stopped, and the data directory is given up for a new copy: an operator ordered it");
    true
}

/// In [`State::Rejoining`]. None = nothing is ordered, or nobody is there to copy from: the usual way.
pub(crate) fn carried_out(context: &mut Context<'_>) -> Option<Outcome<State>> {
    let reinit = ordered(context.world)?.clone();
    let copying = [OperationKind::Clone, OperationKind::EmptyDirectory].iter().any(|kind| context.world.in_flight.contains(kind));
    let leader = match bootstrap::leader_to_copy(context) {
        Some(leader) => leader,
        None if copying => {
            // What is being emptied cannot be gone back to.
            let copies = context.world.in_flight.contains(&OperationKind::Clone);
            if copies && context.world.fresh_view().is_some_and(|view| view.leader.is_none()) {
                context.actions.push(Action::CancelJob);
            }
            return Some(Handled);
        }
        None => return None,
    };
    if context.world.running().is_some() {
        context.world.rejoin = None;
        context.stop(StopMode::Fast { patience: Duration::from_secs(standby::STANDBY_STOP_S) });
        return Some(Handled);
    }
    if !context.world.proved_empty() || context.world.job().is_some() {
        return Some(Handled);
    }
    match &context.world.data {
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Some(Handled);
        }
        DataDirectory::Empty => {
            enter(context, ReinitStage::Copy);
            return Some(Transition(State::AwaitingLeader));
        }
        DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => {}
    }
    if reinit.stage < ReinitStage::Sync {
        enter(context, ReinitStage::Sync);
    }
    if !nobody_counts_on_us(context) {
        return Some(Handled);
    }
    if let Some(why) = failed_too_often(context.world) {
        give_up(context, why);
        return None;
    }
    if reinit.in_place {
        enter(context, ReinitStage::Empty);
        context.start(Operation::EmptyDirectory { leader });
        return Some(Handled);
    }
    enter(context, ReinitStage::Copy);
    let spec = context.world.spec().cloned()?;
    let from = bootstrap::source_of_copy(context).unwrap_or_else(|| leader.clone());
    context.start(Operation::Clone { from, leader, spec, old: Old::GivenUp });
    Some(Handled)
}

/// A directory that is whole is gone on with when its copy cannot be made; one that was being emptied has no other way than a copy.
fn failed_too_often(world: &World) -> Option<String> {
    let failed = [OperationKind::Clone, OperationKind::EmptyDirectory].iter().any(|kind| world.failures(*kind) >= COPIES_MAX);
    world.control().filter(|_| failed)?;
    let why = world.conditions.get("clone_failed").map_or("the log of its daemon says why", |condition| condition.message.as_str());
    Some(format!("it failed {COPIES_MAX} times in a row, and the data directory is what it was: {why}"))
}

/// Nothing that was acknowledged rests on what this member has. If it goes on doing so, the order is given up.
fn nobody_counts_on_us(context: &mut Context<'_>) -> bool {
    let now = context.now;
    let counted = rejoining::is_counted_on(context.world) && !mutant(Mutant::ReinitWhileCountedOn);
    let epoch = context.world.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.epoch);
    let whole = context.world.control().is_some();
    let Some(reinit) = &mut context.world.requests.reinit else { return false };
    // Another leader begins to count anew.
    let before = reinit.uncounted_since.filter(|(under, _)| *under == epoch);
    reinit.uncounted_since = if counted { None } else { before.or(Some((epoch, now))) };
    let waited = now.since(reinit.since);
    if let Some((_, since)) = reinit.uncounted_since {
        return now.since(since) >= Duration::from_secs(UNCOUNTED_FOR_S) || reinit.stage > ReinitStage::Sync && !whole;
    }
    if reinit.stage == ReinitStage::Sync && waited >= Duration::from_secs(UNCOUNTED_WITHIN_S) && context.world.control().is_some() {
        let why = format!(
            "sync goes on naming `{}` after {UNCOUNTED_WITHIN_S} s: commits are acknowledged on the strength of what it has, and others are \
             not there to take its place",
            context.world.me.name
        );
        give_up(context, why);
    }
    false
}

/// In every state: the order is taken up, or refused; how far it got is told, and what came of it.
pub(crate) fn settle(context: &mut Context<'_>, state: &State, view: &ClusterView) -> Option<(String, RequestProgress)> {
    let open = |id: &str| view.requests.get(id).is_some_and(|key| key.record.progress.is_open());
    if context.world.requests.reinit.as_ref().is_some_and(|reinit| !open(&reinit.id)) {
        context.world.requests.reinit = None;
    }
    let requests = view.requests.iter().filter(|(_, key)| key.record.progress.is_open());
    for (id, key) in requests {
        let Ask::Reinit { on, from_leader, in_place } = &key.record.ask else { continue };
        let progress = match (*on == context.world.me.name, &key.record.progress) {
            (false, _) => of_another(context.world, state, on),
            (true, RequestProgress::Created) => taken_up(context, state, id, key),
            (true, _) => {
                adopt(context, id, key, (*from_leader, *in_place));
                told(context, state, key)
            }
        };
        if let Some(progress) = progress {
            return Some((id.clone(), progress));
        }
    }
    None
}

/// Of a member that is gone from the spec nobody else would answer.
fn of_another(world: &World, state: &State, on: &crate::types::MemberName) -> Option<RequestProgress> {
    let gone = *state == State::Primary && world.spec().is_some_and(|spec| spec.member(on).is_none());
    gone.then(|| RequestProgress::Refused { reason: format!("`{on}` is not in spec.members") })
}

fn taken_up(context: &mut Context<'_>, state: &State, id: &str, key: &RequestKey) -> Option<RequestProgress> {
    let refused = |reason: String| Some(RequestProgress::Refused { reason });
    if matches!(state, State::Starting | State::Undeclared | State::Stopping | State::Initializing) {
        return None;
    }
    match obstacle(context.world, id) {
        Some(Obstacle::Passing(why) | Obstacle::Lasting(why)) => return refused(why),
        None => {}
    }
    match &context.world.data {
        _ if matches!(state, State::Cloning | State::AwaitingLeader) => {
            return refused(format!("`{}` has no data, and is being copied as it is", context.world.me.name));
        }
        DataDirectory::Unknown if context.world.running().is_none() => return None,
        _ => {}
    }
    context.decide("reinit", format!("a new copy of this member is ordered by {}", key.record.by));
    let (by, stage) = (context.world.me.name.clone(), ReinitStage::Claimed.name().to_owned());
    Some(RequestProgress::Claimed { by, stage, stages: Vec::new() })
}

/// Taken up by this run of the daemon or by one before it.
fn adopt(context: &mut Context<'_>, id: &str, key: &RequestKey, (from_leader, in_place): (bool, bool)) {
    if context.world.requests.reinit.as_ref().is_some_and(|reinit| reinit.id == id) {
        return;
    }
    let RequestProgress::Claimed { stage, stages, .. } = &key.record.progress else { return };
    context.world.requests.reinit = Some(Reinit {
        id: id.to_owned(),
        from_leader,
        in_place,
        stage: ReinitStage::resumed(stage),
        since: context.now,
        stages: stages.clone(),
        uncounted_since: None,
        given_up: None,
    });
}

/// How far it got, if that is news, or what came of it.
fn told(context: &mut Context<'_>, state: &State, key: &RequestKey) -> Option<RequestProgress> {
    // The daemon before has emptied it.
    if *state == State::Cloning && context.world.requests.reinit.as_ref().is_some_and(|reinit| reinit.stage < ReinitStage::Copy) {
        enter(context, ReinitStage::Copy);
    }
    let world = &*context.world;
    let reinit = world.requests.reinit.as_ref()?;
    let me = &world.me.name;
    let in_place = reinit.stage == ReinitStage::Start;
    let done = |what: &str| {
        Some(RequestProgress::Done { message: format!("`{me}` is a new copy, {what}"), stages: with_last(reinit, context.now) })
    };
    if let Some(reason) = &reinit.given_up {
        return Some(RequestProgress::Refused { reason: reason.clone() });
    }
    if state.is_leading() {
        let refused = RequestProgress::Refused { reason: format!("`{me}` leads by now, with the data that it had") };
        return if in_place { done("and leads by now") } else { Some(refused) };
    }
    if in_place && *state == State::Following && works_as_a_standby(world) {
        return done("and streams");
    }
    let by = me.clone();
    let now = RequestProgress::Claimed { by, stage: reinit.stage.name().to_owned(), stages: reinit.stages.clone() };
    (now != key.record.progress).then_some(now)
}

fn works_as_a_standby(world: &World) -> bool {
    let by_archive_only = world.declared().is_some_and(|member| member.tags.nostream);
    world.sql().is_some_and(|sql| sql.in_recovery && (by_archive_only || sql.streams()))
}

fn with_last(reinit: &Reinit, now: BootTime) -> Vec<crate::facts::requests::StageTime> {
    let mut all = reinit.clone();
    all.enter(ReinitStage::Claimed, now);
    all.stages
}
