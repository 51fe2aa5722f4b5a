//! What an operator asks of one member's own PostgreSQL: to be started again, or to have its files written again. That member takes the
//! request up, carries it out and answers it.
//!
//! A restart takes one member at a time: standbys before the leader, and never two at once. Two claims are two writes, and etcd has them in
//! one order for all: a view that shows our claim shows every earlier one, so that who claimed later sees it and waits.
//!
//! A standby is stopped and comes back the usual way. A primary makes a checkpoint, stops and starts again under the lock that it has; what
//! becomes of it when that fails is what becomes of any primary (SAFETY rows 6, 9 and 67). A daemon that is started again meanwhile carries
//! nothing on: it answers.

use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::ClusterView;
use crate::facts::guard::Word;
use crate::facts::requests::{Ask, RequestKey, RequestProgress};
use crate::facts::synchrony::SyncRecord;
use crate::machine::action::{OperationKind, StopMode};
use crate::machine::node::{Context, after_leading};
use crate::machine::requests::{Reload, Restart, RestartStage};
use crate::machine::rules::handover::{self, Before};
use crate::machine::rules::{primary, requests, standby};
use crate::machine::state::{Demotion, HandOver, HandOverStage, Promotion, State, Then, Way};
use crate::machine::world::{Lock, World};
use crate::mutants::{Mutant, mutant};
use crate::policy::rejoin::Rejoin;
use crate::policy::restart::{self as policy, Part};
use crate::policy::switchover::Obstacle;
use crate::policy::synchrony::goal;
use crate::spec::cluster::ReplicationMode;
use crate::types::MemberName;

/// A restart that is not over by then is answered as one that is not: recovery of a standby that was far from its last restartpoint takes long.
const RESTART_PATIENCE_S: u64 = 600;

/// A standby that was stopped to be started again has so long to end, and so long to run, before maintenance mode that was set meanwhile begins.
const STARTED_WITHIN_S: u64 = 30;

/// Files are written, tried and read within this, or it is not known.
const RELOAD_PATIENCE_S: u64 = 90;

/// A standby that lags no more than this is back, also if it lagged less before: one WAL segment.
const LAG_BACK_BYTES: u64 = 16 << 20;

/// In every state: what this member was asked goes on, and is answered.
pub(crate) fn settle(context: &mut Context<'_>, state: &State) {
    advance(context, state);
    let Some(view) = context.world.fresh_view().cloned() else { return };
    forget_answered(context, &view);
    if context.world.in_flight.contains(&OperationKind::AnswerRequest) {
        return;
    }
    let me = context.world.me.name.clone();
    for (id, key) in &view.requests {
        let progress = match (key.record.ask.of_member(), &key.record.progress) {
            (Some(on), RequestProgress::Claimed { .. }) if *on == me => going_on(context, state, &view, (id, key)),
            (Some(on), RequestProgress::Created) if *on == me => judged(context, state, &view, (id, key)),
            (Some(on), RequestProgress::Claimed { .. }) if *state == State::Primary => orphaned(context, &view, id, on),
            _ => None,
        };
        let Some(progress) = progress.filter(|progress| *progress != key.record.progress) else { continue };
        let claims = matches!(progress, RequestProgress::Claimed { .. });
        if requests::answer(context, id, key, progress) && claims {
            context.world.requests.claimed.insert(id.clone());
        }
        return;
    }
}

fn forget_answered(context: &mut Context<'_>, view: &ClusterView) {
    let open = |id: &String| view.requests.get(id).is_some_and(|key| key.record.progress.is_open());
    let requests = &mut context.world.requests;
    requests.restart = requests.restart.take().filter(|restart| restart.end.is_none() || restart.request.as_ref().is_some_and(open));
    requests.reload = requests.reload.take().filter(|reload| reload.end.is_none() || open(&reload.request));
    for (id, key) in &view.requests {
        if key.record.ask.of_member().is_some() {
            requests.seen.entry(id.clone()).or_insert(context.now);
        }
    }
    requests.seen.retain(|id, _| view.requests.contains_key(id));
    requests.claimed.retain(|id| view.requests.contains_key(id));
    requests.tried.retain(|id| view.requests.contains_key(id));
}

/// A member that took one up is gone, and so is whoever could answer. Its daemon, when it comes back, carries nothing on.
fn orphaned(context: &Context<'_>, view: &ClusterView, id: &str, on: &MemberName) -> Option<RequestProgress> {
    let gone = !view.members.contains_key(on) && requests::is_orphaned(context, id);
    gone.then(|| refused(format!("the daemon of `{on}` took it up and is not there any more: how far it got is not known")))
}

fn refused(reason: impl Into<String>) -> RequestProgress {
    RequestProgress::Refused { reason: reason.into() }
}

/// What this member's PostgreSQL is, as far as it can be restarted or reloaded now.
fn part(context: &Context<'_>, state: &State) -> Result<Part, Obstacle> {
    let me = &context.world.me.name;
    let passing = |why: &str| Err(Obstacle::Passing(why.to_owned()));
    if context.world.stop_requested {
        return Err(Obstacle::Lasting(format!("the daemon of `{me}` is being stopped")));
    }
    match (state, context.world.running()) {
        (State::Primary, Some((_, Word::Writable))) => Ok(Part::Leader),
        (State::Following, Some((_, Word::Standby))) if context.world.lock == Lock::None => match context.world.vacancy {
            None => Ok(Part::Standby),
            Some(_) => Err(Obstacle::Lasting(format!("nobody leads, and `{me}` may be needed for the election"))),
        },
        (State::Paused, _) => Err(Obstacle::Lasting(requests::MAINTAINED.to_owned())),
        (State::Candidate, _) => Err(Obstacle::Lasting(format!("nobody leads, and `{me}` may be needed for the election"))),
        (State::Promoting { .. } | State::HandingOver { .. } | State::Restarting, _) => passing("its role is changing"),
        (State::Primary | State::Demoting { .. } | State::Starting | State::Stopping, _) => {
            passing("its PostgreSQL is being started or ended")
        }
        (State::Following, Some(_)) => passing("its role is changing"),
        (State::Following, None) => {
            Err(Obstacle::Lasting(format!("PostgreSQL of `{me}` does not run now: it is being started as it is, or cannot be")))
        }
        (State::Undeclared | State::AwaitingLeader | State::Initializing | State::Cloning | State::Rejoining, _) => {
            Err(Obstacle::Lasting(format!("`{me}` has no PostgreSQL that runs (its daemon: {})", state.name())))
        }
    }
}

/// Whether one that nobody has taken up is to be taken up, refused, or left for now.
fn judged(context: &Context<'_>, state: &State, view: &ClusterView, (id, key): (&str, &RequestKey)) -> Option<RequestProgress> {
    let wall_s = context.world.requests.wall_now_s(context.now);
    if key.record.ask.at_s().is_some_and(|at_s| wall_s.is_none_or(|now| now < at_s)) {
        return None;
    }
    if let Some(why) = policy::missed(view, id, key, wall_s) {
        return Some(refused(why));
    }
    match (part(context, state), &key.record.ask) {
        (Err(Obstacle::Passing(_)), _) => None,
        (Err(Obstacle::Lasting(why)), _) => Some(refused(why)),
        (Ok(part), Ask::Restart { if_leader, if_pending, .. }) => {
            if let Some(progress) = in_vain(context, part, *if_leader, *if_pending) {
                return Some(progress);
            }
            policy::waits_for(view, &context.world.me.name, id, wall_s).is_none().then(|| claim(context))
        }
        (Ok(_), _) => context.world.requests.reload.is_none().then(|| claim(context)),
    }
}

fn claim(context: &Context<'_>) -> RequestProgress {
    RequestProgress::Claimed { by: context.world.me.name.clone(), stage: policy::CLAIMED.to_owned(), stages: Vec::new() }
}

/// It is not what was asked for, or nothing waits for it.
fn in_vain(context: &Context<'_>, part: Part, if_leader: Option<bool>, if_pending: bool) -> Option<RequestProgress> {
    let me = &context.world.me.name;
    let other_part = if_leader.filter(|wanted| *wanted != (part == Part::Leader) && !mutant(Mutant::RestartOfEitherRole));
    if let Some(wanted) = other_part {
        let (is, was) = if wanted { ("does not lead", "a primary") } else { ("leads", "a standby") };
        return Some(refused(format!("`{me}` {is} by now, and the restart of {was} was asked for")));
    }
    let pending = context.world.sql().is_none_or(|sql| !sql.pending_restart.is_empty());
    (if_pending && !pending)
        .then(|| RequestProgress::Done { message: format!("nothing of `{me}` waits for a restart"), stages: Vec::new() })
}

/// One that this member has taken up: begun, or how far it is.
fn going_on(context: &mut Context<'_>, state: &State, view: &ClusterView, (id, key): (&str, &RequestKey)) -> Option<RequestProgress> {
    let requests = &context.world.requests;
    if let Some(restart) = requests.restart.clone().filter(|restart| restart.request.as_deref() == Some(id)) {
        return Some(restart.end.unwrap_or_else(|| RequestProgress::Claimed {
            by: context.world.me.name.clone(),
            stage: restart.stage.name().to_owned(),
            stages: restart.stages,
        }));
    }
    if let Some(reload) = requests.reload.clone().filter(|reload| reload.request == id) {
        return reload.end;
    }
    let again = mutant(Mutant::RestartCarriedOutAgain);
    if !requests.claimed.contains(id) && !again {
        let why =
            "its daemon was started again after it had taken this up, and does not know how far it got: `pgherd status` tells how it is";
        return Some(refused(why));
    }
    if requests.tried.contains(id) && !again {
        return Some(refused("it was begun and came to nothing: `pgherd events` tells why"));
    }
    match (part(context, state), &key.record.ask) {
        (Err(Obstacle::Passing(_)), _) => None,
        (Err(Obstacle::Lasting(why)), _) => Some(refused(why)),
        (Ok(part), Ask::Restart { if_leader, if_pending, .. }) => {
            if let Some(progress) = in_vain(context, part, *if_leader, *if_pending) {
                return Some(progress);
            }
            // The leader's own rule begins it: it is another state.
            if part == Part::Standby && may_begin(context, view, id) {
                begin(context, id, RestartStage::Stop);
                context.decide("restart", format!("PostgreSQL is started again, asked for by {}", key.record.by));
                stop_standby(context);
            }
            None
        }
        (Ok(_), _) => {
            context.world.requests.tried.insert(id.to_owned());
            context.world.requests.reload = Some(Reload { request: id.to_owned(), since: context.now, ordered: false, end: None });
            context.decide("reload", format!("writes its files again and has PostgreSQL read them, asked for by {}", key.record.by));
            None
        }
    }
}

/// Nobody else is at it.
fn may_begin(context: &Context<'_>, view: &ClusterView, id: &str) -> bool {
    context.world.requests.restart.is_none() && policy::yields_to(view, &context.world.me.name, id).is_none()
}

fn begin(context: &mut Context<'_>, id: &str, stage: RestartStage) {
    context.world.requests.tried.insert(id.to_owned());
    context.world.requests.restart = Some(begun(context, Some(id.to_owned()), stage));
}

fn begun(context: &Context<'_>, request: Option<String>, stage: RestartStage) -> Restart {
    let world = &*context.world;
    Restart {
        request,
        was: world.running().map(|(start, _)| start),
        leads: matches!(world.running(), Some((_, Word::Writable))),
        copies: sync_of(world).filter(|record| record.is_standby(&world.me.name)).map_or(0, |record| record.copies),
        lag: lag(world).unwrap_or(0),
        since: context.now,
        stage,
        stage_since: context.now,
        stages: Vec::new(),
        end: None,
    }
}

/// Of a primary whose postmaster was told to stop by somebody's hand (SAFETY row 67), and perhaps to wait until every client has gone, while
/// none gets in: it is stopped at once, and starts again in place. Unlike a restart that was asked for, it counts as an end by itself.
pub(crate) fn told_to_stop(context: &mut Context<'_>) -> Outcome<State> {
    context.world.requests.restart = Some(begun(context, None, RestartStage::Stop));
    context.decide("stopped_by_hand", "somebody told PostgreSQL to stop: it is stopped at once, and started again");
    standby::cancel_job(context);
    Transition(State::Restarting)
}

/// PostgreSQL of this standby is down because we stopped it to start it again. Maintenance mode that is set in that moment does not leave it so;
/// whoever set it is told when it runs. One that does not start at once is left to whoever set it.
pub(crate) fn is_in_the_middle(context: &Context<'_>) -> bool {
    let world = &*context.world;
    let Some(restart) = world.requests.restart.as_ref().filter(|restart| restart.end.is_none() && !restart.leads) else { return false };
    let down = match restart.stage {
        RestartStage::Stop => true,
        RestartStage::Start => world.running().is_none(),
        RestartStage::Checkpoint | RestartStage::Return => false,
    };
    // A start is all that it comes to its end by.
    let starts = matches!(world.rejoin, None | Some(Rejoin::Follow)) && world.requests.reinit.is_none();
    let soon = context.now.since(restart.stage_since) < Duration::from_secs(STARTED_WITHIN_S);
    down && starts && soon && world.failures(OperationKind::Start) == 0 && !mutant(Mutant::PausedInARestart)
}

fn stop_standby(context: &mut Context<'_>) {
    standby::cancel_job(context);
    context.stop(StopMode::Fast { patience: Duration::from_secs(standby::STANDBY_STOP_S) });
}

/// How far this standby is behind what the leader said last.
fn lag(world: &World) -> Option<u64> {
    let leader = world.view.as_ref()?.leader_position()?;
    Some(leader.bytes_since(world.sql()?.end_of_wal()))
}

/// What was seen moves a restart on. Also without etcd: what has begun comes to its end.
fn advance(context: &mut Context<'_>, state: &State) {
    let now = context.now;
    let Some(mut restart) = context.world.requests.restart.clone().filter(|restart| restart.end.is_none()) else {
        return advance_reload(context, state);
    };
    let present = context.world.start_and_phase().0;
    // The guard, or the server, ended before the checkpoint did.
    if restart.stage == RestartStage::Checkpoint && *state != State::Restarting {
        restart.enter(RestartStage::Stop, now);
    }
    if restart.stage == RestartStage::Stop && present == restart.was && present.is_some() {
        if !restart.leads && *state == State::Following && matches!(context.world.running(), Some((_, Word::Standby))) {
            stop_standby(context);
        }
    } else if restart.stage == RestartStage::Stop {
        restart.enter(RestartStage::Start, now);
    }
    if restart.stage == RestartStage::Start && context.world.sql().is_some() {
        restart.enter(RestartStage::Return, now);
    }
    restart.end = how_it_ended(context, state, &mut restart);
    context.world.requests.restart = Some(restart);
}

/// None = it goes on.
fn how_it_ended(context: &Context<'_>, state: &State, restart: &mut Restart) -> Option<RequestProgress> {
    let (world, me) = (&*context.world, &context.world.me.name);
    if restart.stage == RestartStage::Return && is_back(context, state, restart) {
        restart.enter(RestartStage::Return, context.now);
        return Some(RequestProgress::Done { message: format!("PostgreSQL of `{me}` was started again"), stages: restart.stages.clone() });
    }
    let leader = world.fresh_view().and_then(|view| view.leader.as_ref()).map(|leader| leader.holder.clone());
    let deposed = restart.leads && matches!(state, State::Following | State::Rejoining) && world.lock == Lock::None;
    if let Some(other) = leader.filter(|holder| deposed && holder != me.as_str()) {
        return Some(refused(format!("PostgreSQL of `{me}` did not come back as the primary: `{other}` leads")));
    }
    if world.stop_requested {
        return Some(refused(format!("the daemon of `{me}` is being stopped")));
    }
    let late = context.now.since(restart.since) >= Duration::from_secs(RESTART_PATIENCE_S);
    let stage = restart.stage.name();
    late.then(|| refused(format!("PostgreSQL of `{me}` is not back after {RESTART_PATIENCE_S} s (stage: {stage})")))
}

/// It is what it was before, or more: nobody has to wait for it any more. In maintenance mode it goes on being what it is.
fn is_back(context: &Context<'_>, state: &State, restart: &Restart) -> bool {
    let world = &*context.world;
    let in_recovery = world.sql().is_none_or(|sql| sql.in_recovery);
    match state {
        State::Primary => writes_again(context),
        State::Paused if !in_recovery => writes_again(context),
        State::Following | State::Paused if !restart.leads => streams_again(world, restart),
        _ => false,
    }
}

fn writes_again(context: &Context<'_>) -> bool {
    let world = &*context.world;
    world.lock.is_proved_at(context.now) && world.sql().is_some_and(|sql| !sql.in_recovery) && !world.may_be_closed()
}

fn streams_again(world: &World, restart: &Restart) -> bool {
    let (Some(sql), Some(_)) = (world.sql(), world.fresh_view()) else { return false };
    let nostream = world.declared().is_some_and(|member| member.tags.nostream);
    let near = lag(world).is_none_or(|lag| lag <= restart.lag.max(LAG_BACK_BYTES));
    sql.in_recovery && (sql.streams() || nostream) && counts_again(world, restart.copies) && near
}

fn sync_of(world: &World) -> Option<&SyncRecord> {
    world.view.as_ref()?.sync.as_ref()
}

/// It is in `sync` again, so that the next one can leave; or is not needed there: in `sync` mode another took its place, or the document does not
/// let it count any more.
fn counts_again(world: &World, copies_before: u32) -> bool {
    let (Some(record), Some(spec), Some(member)) = (sync_of(world), world.spec(), world.declared()) else { return true };
    let replaced = spec.replication.mode == ReplicationMode::Sync && record.copies >= copies_before;
    let may = goal::may_count(member) && member.tags.replicatefrom.is_none();
    copies_before == 0 || record.is_standby(&world.me.name) || replaced || !may
}

fn advance_reload(context: &mut Context<'_>, state: &State) {
    let Some(mut reload) = context.world.requests.reload.clone().filter(|reload| reload.end.is_none()) else { return };
    let why = match part(context, state) {
        Err(Obstacle::Lasting(why)) => Some(why),
        Ok(_) | Err(Obstacle::Passing(_)) => {
            let late = context.now.since(reload.since) >= Duration::from_secs(RELOAD_PATIENCE_S);
            late.then(|| format!("the files were not written within {RELOAD_PATIENCE_S} s: look at the conditions in `pgherd status`"))
        }
    };
    reload.end = why.map(refused);
    context.world.requests.reload = Some(reload);
}

/// Of a primary: its own turn has come.
pub(crate) fn of_primary(context: &mut Context<'_>) -> Outcome<State> {
    let Some(view) = context.world.fresh_view().cloned() else { return Handled };
    let me = context.world.me.name.clone();
    let requests = &context.world.requests;
    let ready = |id: &String| requests.claimed.contains(id) && !requests.tried.contains(id) || mutant(Mutant::RestartCarriedOutAgain);
    let taken_up = view.requests.iter().find_map(|(id, key)| {
        let Ask::Restart { on, if_leader, if_pending, .. } = &key.record.ask else { return None };
        let ours = *on == me && key.record.progress.claimed_by() == Some(&me) && ready(id);
        (ours && in_vain(context, Part::Leader, *if_leader, *if_pending).is_none()).then(|| (id.clone(), key.record.by.clone()))
    });
    let Some((id, by)) = taken_up.filter(|(id, _)| may_begin(context, &view, id) && !context.world.stop_requested) else { return Handled };
    context.world.checkpointed = None;
    context.world.forget_failures(OperationKind::Checkpoint);
    begin(context, &id, RestartStage::Checkpoint);
    context.decide("restart", format!("PostgreSQL is started again under the lock that it has, asked for by {by}"));
    Transition(State::Restarting)
}

/// Of the state: checkpoint, stop, and back to a start in place.
pub(crate) fn rule(context: &mut Context<'_>) -> Outcome<State> {
    let Some(lock) = context.world.lock.identity() else {
        let why = "the lock is not ours".to_owned();
        return match context.world.nothing_can_write() {
            true => Transition(after_leading(context)),
            false => Transition(State::Demoting { demotion: Demotion { why, then: Then::Follow } }),
        };
    };
    if let Some(why) = context.world.unguarded() {
        return Transition(State::Demoting { demotion: Demotion { why: why.to_owned(), then: Then::StartAgain(lock) } });
    }
    let Some(restart) = context.world.requests.restart.clone().filter(|restart| restart.leads) else { return Transition(State::Primary) };
    if restart.stage == RestartStage::Checkpoint && context.world.stop_requested {
        return primary::hand_over(context, None, None);
    }
    if restart.stage == RestartStage::Checkpoint {
        match handover::checkpointed(context, restart.since, Duration::from_secs(handover::ASKED_CHECKPOINT_PATIENCE_S)) {
            Before::Waits => return Handled,
            Before::Failed(why) => {
                standby::cancel_job(context);
                let why = format!("{why}; PostgreSQL was not stopped");
                context.decide("restart_given_up", why.clone());
                if let Some(restart) = &mut context.world.requests.restart {
                    restart.end = Some(refused(why));
                }
                return Transition(State::Primary);
            }
            Before::Made | Before::Ended => {}
        }
        standby::cancel_job(context);
        let was = context.world.start_and_phase().0;
        if let Some(restart) = &mut context.world.requests.restart {
            restart.was = was;
            restart.enter(RestartStage::Stop, context.now);
        }
    }
    if context.world.nothing_can_write() {
        // An operator asked for it: what crashed before does not count against the start that follows.
        if restart.request.is_some() {
            context.world.primary_starts.clear();
        }
        return Transition(State::Promoting { promotion: Promotion { lock, way: Way::StartInPlace, since: context.now } });
    }
    if context.world.stop_requested {
        let hand_over = HandOver { stage: HandOverStage::Stop, ..HandOver::new(lock, None, None, context.now) };
        return Transition(State::HandingOver { hand_over });
    }
    let patience = context.world.spec().map_or(Duration::from_secs(30), |spec| spec.ha.primary_stop_timeout);
    context.stop(StopMode::Fast { patience });
    if context.world.ending().is_some() {
        let stops_since = context.world.requests.restart.as_ref().map_or(context.now, |restart| restart.stage_since);
        handover::end_what_is_left(context, stops_since, |_, _| (handover::ARCHIVER_PATIENCE_MS, "it starts again where it is"));
    }
    Handled
}
