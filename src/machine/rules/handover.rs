//! A planned end of leadership: checkpoint, fast stop, the successor has the shutdown checkpoint, release. Each stage has a deadline
//! and a way on or back.
//!
//! Order is the safety argument: the lock goes only after the proof that no process of PostgreSQL is left. What does not have to be waited
//! for is ended: once the shutdown checkpoint is written and the successor has it, what is left of PostgreSQL are the archiver and
//! walsenders to others, and their end loses nothing.

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, HistoryEntry, LeaderKey, MemberRole, ReleaseRecord};
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState};
use crate::facts::requests::{Ask, RequestProgress};
use crate::machine::action::{Action, Operation, OperationKind, StopMode};
use crate::machine::node::{Context, after_leading};
use crate::machine::requests::HandedOver;
use crate::machine::rules::{primary, requests, standby, synchrony};
use crate::machine::state::{Demotion, HandOver, HandOverStage, Promotion, State, Then, Way};
use crate::machine::world::{Lock, World};
use crate::mutants::{Mutant, mutant};
use crate::policy::switchover::{self, Obstacle};
use crate::types::MemberName;

/// How long the checkpoint before the stop may take when the daemon is to stop: then PostgreSQL is stopped all the same.
const CHECKPOINT_PATIENCE_S: u64 = 30;

/// How long it may take when an operator asked: a stop would have to write the same again while nobody can write, so nothing is stopped.
pub(crate) const ASKED_CHECKPOINT_PATIENCE_S: u64 = 100;

/// How long an archiver that comes on is waited for before the stop.
const ARCHIVER_CATCHES_UP_S: u64 = 10;

/// How often it is looked at meanwhile.
const ARCHIVER_LOOK_MS: u64 = 500;

/// How long a successor may take to have the shutdown checkpoint. One that streams has it before the stop ends.
const SUCCESSOR_PATIENCE_MS: u64 = 3_000;

/// How long reading the data directory may take.
const LOOK_PATIENCE_S: u64 = 10;

/// A stop that lasts so long is looked at: the shutdown checkpoint may be written, and something else hold it.
const STOP_LOOK_MS: u64 = 300;

/// Why a hand-over is given up in maintenance mode.
const MAINTAINED: &str = "maintenance mode was set, in which nobody takes the lock";

/// How long the archiver is given once that is seen: about a second in all. What it has not archived then is seen to on the way back.
pub(crate) const ARCHIVER_PATIENCE_MS: u64 = 700;

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

/// How the checkpoint before a planned stop stands.
pub(crate) enum Before {
    /// It is being made.
    Waits,
    /// It is made, and the server runs.
    Made,
    /// It failed, or takes too long: why.
    Failed(String),
    /// There is no server that runs any more.
    Ended,
}

/// Has a checkpoint made, which began then.
pub(crate) fn checkpointed(context: &mut Context<'_>, since: BootTime, patience: Duration) -> Before {
    let late = context.now.since(since) > patience;
    let failed = context.world.failures(OperationKind::Checkpoint) > 0;
    if context.world.running().is_none() {
        return Before::Ended;
    }
    if context.world.checkpointed.is_some() {
        return Before::Made;
    }
    if !late && !failed {
        context.start(Operation::Checkpoint);
        return Before::Waits;
    }
    let how = if failed { "failed".to_owned() } else { format!("took longer than {} s", patience.as_secs()) };
    Before::Failed(format!("the checkpoint before the stop {how}; what it wrote, the next one need not write"))
}

/// Nobody could take the lock that would be released.
fn is_overtaken(context: &Context<'_>) -> bool {
    context.world.is_maintained() && !context.world.stop_requested
}

fn checkpoint(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    // Also when the daemon is to stop: in maintenance mode it leaves, and PostgreSQL stays.
    if context.world.is_maintained() && context.world.running().is_some() {
        return back_to_work(hand_over, context, MAINTAINED.to_owned());
    }
    let asked = hand_over.request.is_some() && !context.world.stop_requested;
    let patience = Duration::from_secs(if asked { ASKED_CHECKPOINT_PATIENCE_S } else { CHECKPOINT_PATIENCE_S });
    primary::keep_records(context, hand_over.lock);
    let runs = context.world.running().is_some();
    let held_up = runs && synchrony::is_held_up(context, hand_over.lock);
    if asked
        && runs
        && let Some(why) = comes_to_nothing(hand_over, context, held_up)
    {
        return back_to_work(hand_over, context, why);
    }
    // On the way out of the daemon there is no way back: what hangs hangs no longer than it must.
    let before = if held_up { Before::Ended } else { checkpointed(context, hand_over.since, patience) };
    let in_time = context.now.since(hand_over.since) <= patience;
    if let Some(since) = context.world.checkpointed.filter(|_| matches!(before, Before::Made) && in_time)
        && archiver_is_waited_for(context, since, asked)
    {
        return Handled;
    }
    match before {
        Before::Waits => return Handled,
        Before::Failed(why) if asked => return back_to_work(hand_over, context, why),
        // It may have taken long, and this is the last moment in which nothing has to be taken back.
        Before::Made if asked => match hand_over.to.as_ref().and_then(|to| requests::why_not(context, to)) {
            Some(Obstacle::Passing(_)) if in_time => return Handled,
            Some(Obstacle::Passing(why) | Obstacle::Lasting(why)) => return back_to_work(hand_over, context, why),
            None => {}
        },
        Before::Made | Before::Failed(_) | Before::Ended => {}
    }
    standby::cancel_job(context);
    hand_over.enter(HandOverStage::Stop, context.now);
    stop(hand_over, context)
}

/// What is not archived when PostgreSQL has ended holds up the way back: an archiver that is behind and comes on is given a moment, in which
/// writes go on.
fn archiver_is_waited_for(context: &mut Context<'_>, since: BootTime, asked: bool) -> bool {
    let requests = &context.world.requests;
    let known = requests.survey.as_ref().filter(|(asked, _)| *asked >= since);
    let comes_on = known.map(|(_, survey)| switchover::archiver_comes_on(survey));
    let late = context.now.since(since) >= Duration::from_secs(ARCHIVER_CATCHES_UP_S);
    // Who asked is told what is under way, and so it has to be known once more; a daemon that is to stop does not wait for that.
    let is_over = match comes_on {
        Some(comes_on) => late || !comes_on,
        None => !asked && (late || context.world.failures(OperationKind::Survey) > 0),
    };
    if is_over {
        return false;
    }
    let again = context.now.since(requests.survey_asked) >= Duration::from_millis(ARCHIVER_LOOK_MS);
    if (known.is_none() || again) && context.start(Operation::Survey) {
        context.world.requests.survey_asked = context.now;
    }
    true
}

/// Why the rest of the checkpoint is not waited for.
fn comes_to_nothing(hand_over: &HandOver, context: &Context<'_>, held_up: bool) -> Option<String> {
    if held_up {
        return Some("commits wait for a standby that is gone, and whom they wait for cannot be changed meanwhile".to_owned());
    }
    let view = context.world.fresh_view()?;
    let gone = hand_over.to.as_ref().filter(|to| !view.members.contains_key(*to))?;
    Some(format!("the daemon of `{gone}` is not there: it has no member key"))
}

fn stop(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.nothing_can_write() {
        hand_over.enter(HandOverStage::Wait { since: context.now }, context.now);
        return wait(hand_over, context.now, context);
    }
    let patience = context.world.spec().map_or(Duration::from_secs(30), |spec| spec.ha.primary_stop_timeout);
    context.stop(StopMode::Fast { patience });
    if context.world.ending().is_some() {
        // A successor that is gone gets it no sooner for an archiver that is waited for.
        end_what_is_left(context, hand_over.stage_since, |control, context| match successor(hand_over, control, context) {
            Some(_) => (ARCHIVER_PATIENCE_MS, "the successor has all of it"),
            None => (ARCHIVER_PATIENCE_MS + SUCCESSOR_PATIENCE_MS, "no successor has all of it in time"),
        });
    }
    Handled
}

/// The control file says `shut down`: no session is left and none begins, and all that was written is on disk. Who still runs are the
/// archiver, whose command may take for ever, and walsenders that wait for a standby. `patience` is how long they are given, and why no longer.
pub(crate) fn end_what_is_left(
    context: &mut Context<'_>,
    stops_since: BootTime,
    patience: impl Fn(&ControlFacts, &Context<'_>) -> (u64, &'static str),
) {
    let Some((seen, control)) = context.world.looks.shut_down.clone() else {
        if context.now.since(stops_since) >= Duration::from_millis(STOP_LOOK_MS) {
            context.start(Operation::Look);
        }
        return;
    };
    let (patience_ms, who) = patience(&control, context);
    if context.now.since(seen) >= Duration::from_millis(patience_ms) && context.world.may_ask_stop(context.now, StopMode::Kill) {
        context.actions.push(Action::Stop(StopMode::Kill));
        let message = format!(
            "PostgreSQL has shut down at {} and {who}: the archiver, or a walsender, that still runs is ended; what is not in \
             the archive is archived before this member follows",
            control.checkpoint
        );
        context.decide("stop_not_waited_for", message);
    }
}

fn wait(hand_over: &mut HandOver, since: BootTime, context: &mut Context<'_>) -> Outcome<State> {
    if is_overtaken(context) {
        return give_up(hand_over, context, MAINTAINED);
    }
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
    if mutant(Mutant::ReleasedBeforeTheCheckpointArrived) && hand_over.to.is_some() {
        return begin_release(hand_over, context, &control, hand_over.to.clone());
    }
    let in_time = context.now.since(since) < Duration::from_millis(SUCCESSOR_PATIENCE_MS);
    let successor = successor(hand_over, &control, context);
    // One that may not come out of recovery is not the first to be handed to for having received a moment sooner.
    let better = |to: &MemberName| in_time && is_paused(context, to) && could(hand_over, context).any(|other| !is_paused(context, other));
    if let Some(successor) = successor.filter(|to| !better(to)) {
        return begin_release(hand_over, context, &control, Some(successor));
    }
    if in_time && could(hand_over, context).next().is_some() {
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
        .max_by_key(|member| (!is_paused(context, &member.name), member.failover_priority))
        .map(|member| member.name.clone())
}

/// Who may have all of it in a moment.
fn could<'a>(hand_over: &'a HandOver, context: &'a Context<'_>) -> impl Iterator<Item = &'a MemberName> {
    let known = context.world.fresh_view().zip(context.world.spec());
    let candidates = known.into_iter().flat_map(|(view, spec)| view.members.iter().map(move |(name, key)| (name, key, spec)));
    let could = candidates.filter(|(name, key, spec)| {
        **name != context.world.me.name
            && key.record.role == MemberRole::Replica
            && spec.member(name).is_some_and(|member| !member.nofailover())
            && hand_over.to.as_ref().is_none_or(|to| to == *name)
    });
    could.map(|(name, ..)| name)
}

fn is_paused(context: &Context<'_>, name: &MemberName) -> bool {
    context.world.fresh_view().is_some_and(|view| switchover::replay_is_paused(view, name))
}

fn begin_release(hand_over: &mut HandOver, context: &mut Context<'_>, control: &ControlFacts, to: Option<MemberName>) -> Outcome<State> {
    let record = ReleaseRecord {
        epoch: hand_over.lock.epoch,
        timeline: control.timeline,
        lsn: control.checkpoint,
        to,
        all_seen: context.world.all_are_seen(hand_over.lock.epoch),
    };
    let message = match &record.to {
        Some(to) => format!("releases the lock at {} for `{to}`", record.lsn),
        None => format!("releases the lock at {}, no member is known to have everything", record.lsn),
    };
    if context.start(Operation::Release { epoch: hand_over.lock.epoch, record: Some(record) }) {
        context.decide("releases", message);
        hand_over.enter(HandOverStage::Release, context.now);
    }
    Handled
}

fn release(hand_over: &mut HandOver, context: &mut Context<'_>) -> Outcome<State> {
    if context.world.in_flight.contains(&OperationKind::Release) {
        return Handled;
    }
    if context.world.released == Some(hand_over.lock.epoch) {
        note_end(hand_over, context, None);
        context.world.let_go(context.actions);
        return Transition(after_leading(context));
    }
    // It failed or is unknown: judge again who has what, and ask again.
    hand_over.enter(HandOverStage::Wait { since: hand_over.since }, context.now);
    Handled
}

/// The leader gives its lock, or has given it, to another member by name, which is there.
pub(crate) fn is_for_another(world: &World) -> bool {
    let Some(view) = world.fresh_view() else { return false };
    let is_there = |to: &MemberName| *to != world.me.name && view.members.contains_key(to);
    let Some((leader, _)) = world.other_leader() else {
        return view.leader.is_none() && view.release.as_ref().and_then(|release| release.to.as_ref()).is_some_and(is_there);
    };
    view.requests.values().any(|request| {
        let claimed = matches!(&request.record.progress, RequestProgress::Claimed { by, .. } if by == leader);
        let to = if let Ask::Switchover { to } | Ask::ScheduledSwitchover { to, .. } = &request.record.ask { Some(to) } else { None };
        claimed && to.is_some_and(is_there)
    })
}

/// This member has given its lock to another: who leads is known in a moment, and takes writes a moment later. PostgreSQL is started here
/// behind that: it is told once whom to follow, nothing has to be judged then, and what its start takes is not taken from the
/// promotion that clients wait for. Not where commits would wait for this member.
pub(crate) fn successor_goes_first(context: &Context<'_>) -> bool {
    let world = &*context.world;
    let Some(view) = world.fresh_view() else { return false };
    let lately = |since: BootTime| context.now.since(since) < Duration::from_millis(standby::SUCCESSOR_TAKES_MS);
    match &view.leader {
        None => is_for_another(world) && world.vacancy.is_some_and(|vacancy| lately(vacancy.seen)),
        // The answer to the release came before the view.
        Some(leader) if Some(leader.epoch) == world.released => true,
        Some(leader) => {
            let handed_over = world.requests.handed_over.as_ref().is_some_and(|end| end.given_up.is_none() && lately(end.at));
            handed_over && began(world, view).is_none() && !commits_wait_for(&world.me.name, view, leader)
        }
    }
}

/// Too few others are there for commits to go on.
fn commits_wait_for(me: &MemberName, view: &ClusterView, leader: &LeaderKey) -> bool {
    let Some(record) = &view.sync else { return view.sync_revision.0 != 0 };
    let is_there = |name: &&MemberName| view.members.get(*name).is_some_and(|key| key.record.role == MemberRole::Replica);
    let others = record.members.iter().filter(|name| *name != me && name.as_str() != leader.holder).filter(is_there);
    others.count() + 1 < record.copies as usize
}

/// How the leader's timeline began, if it takes writes, and etcd's history says so.
fn began<'a>(world: &World, view: &'a ClusterView) -> Option<&'a HistoryEntry> {
    let (lock, (_, key)) = (view.leader.as_ref()?, world.other_leader()?);
    let timeline = key.record.timeline.filter(|_| key.record.role == MemberRole::Primary)?;
    let is_its = |entry: &&HistoryEntry| entry.timeline == timeline && entry.is_of(lock.epoch) && entry.switch_lsn.is_some();
    view.history.iter().find(is_its)
}

/// What is here was shut down as a primary, and with that checkpoint its WAL ends; the leader's timeline left the one that it was on behind
/// that. So it follows, with nothing to be judged.
pub(crate) fn is_in_the_past_of_the_leader(context: &Context<'_>) -> bool {
    let world = &*context.world;
    let Some((control, view)) = world.control().zip(world.fresh_view()) else { return false };
    let is_behind = |entry: &HistoryEntry| entry.parent == Some(control.timeline) && entry.switch_lsn > Some(control.checkpoint);
    let shut_down = control.state == DatabaseState::ShutDown && !control.backup_label;
    shut_down && began(world, view).is_some_and(is_behind)
}

/// The way back: the lock is still ours, so PostgreSQL starts again under it; on the way out of the daemon it is given up instead.
fn give_up(hand_over: &mut HandOver, context: &mut Context<'_>, why: &str) -> Outcome<State> {
    if context.world.stop_requested {
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then: Then::Release(hand_over.lock) } });
    }
    context.decide("hand_over_given_up", why);
    note_end(hand_over, context, Some(why.to_owned()));
    Transition(State::Promoting { promotion: Promotion { lock: hand_over.lock, way: Way::StartInPlace, since: context.now } })
}

/// The way back before anything was stopped.
fn back_to_work(hand_over: &mut HandOver, context: &mut Context<'_>, why: String) -> Outcome<State> {
    standby::cancel_job(context);
    let why = format!("{why}; PostgreSQL was not stopped");
    context.decide("hand_over_given_up", why.clone());
    note_end(hand_over, context, Some(why));
    Transition(State::Primary)
}

/// The view may show that the lock was released before the answer to the release comes.
pub(crate) fn lock_is_gone(hand_over: &mut HandOver, context: &mut Context<'_>) {
    let given_up = (hand_over.stage != HandOverStage::Release).then(|| "the lock was lost on the way".to_owned());
    note_end(hand_over, context, given_up);
}

/// For the answer to whoever asked.
fn note_end(hand_over: &mut HandOver, context: &mut Context<'_>, given_up: Option<String>) {
    let stage = hand_over.stage;
    hand_over.enter(stage, context.now);
    let (request, stages) = (hand_over.request.clone(), hand_over.stages.clone());
    context.world.requests.handed_over = Some(HandedOver { request, stages, given_up, at: context.now });
}
