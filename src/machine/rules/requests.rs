//! What operators asked for: taken up, refused with the reason, answered when done.
//!
//! A request is taken up by compare-and-swap, one at a time: of two operators one is told at once that the other was first (SAFETY row 71).
//! Each run of the daemon tries one once. Whoever leads answers what another took up and did not finish, so that nothing stays open.

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::requests::{Ask, Candidate, RequestKey, RequestProgress, StageTime};
use crate::machine::action::{Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::requests::HandedOver;
use crate::machine::rules::{primary, reinit, standby};
use crate::machine::state::{HandOver, State};
use crate::mutants::{Mutant, mutant};
use crate::policy::election::Verdict;
use crate::policy::restart;
use crate::policy::switchover::{self, Inputs, Obstacle};
use crate::types::{MemberName, Revision};

/// So long a standby that says that it streams is given to be seen streaming by the primary: the primary looks once a second, and a
/// standby that has just come catches up first.
const SEEN_STREAMING_MS: u64 = 3_000;

/// So long PostgreSQL is given to say what is under way on it.
const SURVEYED_WITHIN_MS: u64 = 6_000;

/// How much later than its time a scheduled switchover may begin.
const SCHEDULE_LATE_MAX_S: u64 = 60;

/// Whoever took a request up is given so long to answer it after another leads, or after its member key is gone: it knows better what it
/// came to.
const ORPHANED_AFTER_MS: u64 = 5_000;

/// Why nothing is carried out in maintenance mode.
pub(crate) const MAINTAINED: &str = "maintenance mode is on: end it first (`pgherd resume`)";

type Open<'a> = (&'a String, &'a RequestKey, &'a MemberName);

/// Switchovers that nobody has answered and whose time has come, in the order in which they were written.
fn open<'a>(view: &'a ClusterView, context: &Context<'_>) -> Vec<Open<'a>> {
    let wall_s = context.world.requests.wall_now_s(context.now);
    let switchovers = view.requests.iter().filter_map(|(id, key)| match (&key.record.ask, &key.record.progress) {
        (Ask::Switchover { to }, progress) if progress.is_open() => Some((id, key, to)),
        (Ask::ScheduledSwitchover { to, at_s }, RequestProgress::Created) if wall_s.is_some_and(|now| now >= *at_s) => Some((id, key, to)),
        (Ask::ScheduledSwitchover { to, .. }, RequestProgress::Claimed { .. }) => Some((id, key, to)),
        _ => None,
    });
    let mut open: Vec<_> = switchovers.collect();
    open.sort_by_key(|(_, key, _)| key.mod_revision);
    open
}

/// The time that it was scheduled for went by without a leader that could carry it out.
fn is_too_late(context: &Context<'_>, key: &RequestKey) -> bool {
    let Ask::ScheduledSwitchover { at_s, .. } = key.record.ask else { return false };
    context.world.requests.wall_now_s(context.now).is_some_and(|now| now > at_s.saturating_add(SCHEDULE_LATE_MAX_S))
}

fn claimed_by(key: &RequestKey) -> Option<&MemberName> {
    key.record.progress.claimed_by()
}

/// A primary looks at what is asked. The refusal is written before PostgreSQL is touched.
pub(crate) fn taken_up(context: &mut Context<'_>) -> Outcome<State> {
    let Some(view) = context.world.fresh_view().cloned() else { return Handled };
    // Only a primary lets in whom it kept out, and a hand-over may take longer than they are to be kept out.
    if context.world.keeps_out() {
        return Handled;
    }
    let (now, me) = (context.now, context.world.me.name.clone());
    let open = open(&view, context);
    // One for a later time is looked at from then on: what was known when it was written says nothing by then.
    let waits =
        |key: &RequestKey| matches!(key.record.ask, Ask::ScheduledSwitchover { .. }) && key.record.progress == RequestProgress::Created;
    let is_due = |id: &String| view.requests.get(id).is_some_and(|key| !waits(key) || open.iter().any(|(of, ..)| *of == id));
    let requests = &mut context.world.requests;
    requests.seen.retain(|id, _| is_due(id));
    requests.claimed.retain(|id| view.requests.contains_key(id));
    requests.tried.retain(|id| view.requests.contains_key(id));
    for id in view.requests.keys().filter(|id| is_due(id)) {
        requests.seen.entry(id.clone()).or_insert(now);
    }
    let is_check = |key: &RequestKey| match &key.record.ask {
        Ask::CheckSwitchover { to } if key.record.progress == RequestProgress::Created => Some(to.clone()),
        _ => None,
    };
    let restart_is_weighed = |key: &RequestKey| key.record.ask == Ask::CheckRestart && key.record.progress == RequestProgress::Created;
    if let Some((id, key)) = view.requests.iter().find(|(_, key)| restart_is_weighed(key)) {
        weigh_restart(context, id, key);
        return Handled;
    }
    if let Some((id, key, to)) = view.requests.iter().find_map(|(id, key)| Some((id, key, is_check(key)?))) {
        judge(context, id, key, to.as_ref());
        return Handled;
    }
    // What is being carried out comes before what is asked.
    if let Some((id, key, to)) = open.iter().copied().find(|(_, key, _)| claimed_by(key) == Some(&me)) {
        return carry_on(context, id, key, to);
    }
    let created = |(_, key, _): &Open<'_>| key.record.progress == RequestProgress::Created;
    let of_a_former_leader = |one: &Open<'_>| {
        let orphaned = claimed_by(one.1).is_some() && is_orphaned(context, one.0);
        let why = if orphaned { "the leader that took it up is not there any more" } else { "another led when it was asked for" };
        (orphaned || created(one) && is_of_another_leadership(context, one.1)).then_some(why)
    };
    if let Some(((id, key, to), why)) = open.iter().copied().find_map(|one| Some((one, of_a_former_leader(&one)?))) {
        let progress = if *to == me {
            RequestProgress::Done { message: format!("`{to}` leads"), stages: Vec::new() }
        } else {
            RequestProgress::Refused { reason: format!("{why}: `{me}` leads") }
        };
        answer(context, id, key, progress);
        return Handled;
    }
    if let Some((id, key, to)) = open.iter().copied().find(|one| created(one) && is_too_late(context, one.1)) {
        let reason =
            format!("the time that it was scheduled for went by more than {SCHEDULE_LATE_MAX_S} s ago, and nobody could carry it out");
        if answer(context, id, key, RequestProgress::Refused { reason: reason.clone() }) {
            context.decide("schedule_expired", format!("the switchover to `{to}` that {} scheduled: {reason}", key.record.by));
        }
        return Handled;
    }
    if let Some((id, key, to)) = open.iter().copied().find(created)
        && nothing_in_the_way(context, id, key, to)
    {
        let claim = RequestProgress::Claimed { by: me, stage: restart::CLAIMED.to_owned(), stages: Vec::new() };
        if answer(context, id, key, claim) {
            context.world.requests.claimed.insert(id.clone());
        }
    }
    Handled
}

/// It was written before this leadership, for at once: who asked for it agreed that somebody else hands over. Of two that are asked for at once the
/// second would follow on the first, and move the primary once more.
fn is_of_another_leadership(context: &Context<'_>, key: &RequestKey) -> bool {
    let began = context.world.lock.identity().map(|lock| Revision(lock.epoch.0));
    matches!(key.record.ask, Ask::Switchover { .. }) && began.is_some_and(|began| key.mod_revision < began)
}

/// So long ago that whoever took it up would have answered.
pub(crate) fn is_orphaned(context: &Context<'_>, id: &str) -> bool {
    let seen = context.world.requests.seen.get(id).copied().unwrap_or(context.now);
    context.now.since(seen) >= Duration::from_millis(ORPHANED_AFTER_MS)
}

/// One that this member has taken up.
fn carry_on(context: &mut Context<'_>, id: &str, key: &RequestKey, to: &MemberName) -> Outcome<State> {
    let requests = &context.world.requests;
    if requests.tried.contains(id) && !mutant(Mutant::RequestCarriedOutAgain) {
        return Handled;
    }
    if !requests.claimed.contains(id) && !mutant(Mutant::RequestCarriedOutAgain) {
        let reason = "the leader's daemon was started again after it had taken this up, and does not know how far it got: `pgherd events` \
                      tells, and it can be asked for again";
        answer(context, id, key, RequestProgress::Refused { reason: reason.to_owned() });
        return Handled;
    }
    if !nothing_in_the_way(context, id, key, to) {
        return Handled;
    }
    context.world.requests.tried.insert(id.to_owned());
    let costs = inputs(context).map(|inputs| switchover::costs(&inputs)).unwrap_or_default();
    let costs = costs.into_iter().map(|cost| format!("; {cost}")).collect::<String>();
    context.decide("switchover", format!("hands over to `{to}`, asked for by {}{costs}", key.record.by));
    primary::hand_over(context, Some(to.clone()), Some(id.to_owned()))
}

/// Whether the switchover may begin. If not, it is refused, or waits for what may pass.
fn nothing_in_the_way(context: &mut Context<'_>, id: &str, key: &RequestKey, to: &MemberName) -> bool {
    if !surveyed(context, id) {
        return false;
    }
    let seen = context.world.requests.seen.get(id).copied().unwrap_or(context.now);
    let in_time = context.now.since(seen) < Duration::from_millis(SEEN_STREAMING_MS);
    let claimed = claimed_by(key).map(|_| key.mod_revision);
    // A member that is being restarted does not stream either: it is better said by its name.
    let obstacle = match (why_not(context, to), being_restarted(context, claimed)) {
        (Some(Obstacle::Lasting(why)), _) => Some(Obstacle::Lasting(why)),
        (_, Some(why)) => Some(Obstacle::Passing(why)),
        (found, None) => found,
    };
    match obstacle {
        None => return true,
        Some(Obstacle::Passing(_)) if in_time => {}
        Some(Obstacle::Passing(reason) | Obstacle::Lasting(reason)) => {
            answer(context, id, key, RequestProgress::Refused { reason });
        }
    }
    false
}

/// A restart that a switchover has to wait for, which was claimed then, or not yet.
fn being_restarted(context: &Context<'_>, claimed: Option<Revision>) -> Option<String> {
    let on = restart::before_switchover(context.world.fresh_view()?, claimed)?;
    Some(format!("PostgreSQL of `{on}` is being restarted, as an operator asked: ask again when that is over"))
}

/// SAFETY row 69: refused before the primary is touched, with all that is in the way.
pub(crate) fn why_not(context: &Context<'_>, to: &MemberName) -> Option<Obstacle> {
    let Some(inputs) = inputs(context) else { return Some(Obstacle::Lasting(BLIND.to_owned())) };
    let found = switchover::obstacles(&inputs, to);
    let all = found.iter().map(Obstacle::reason).collect::<Vec<_>>().join("; ");
    match found.iter().any(|obstacle| matches!(obstacle, Obstacle::Lasting(_))) {
        true => Some(Obstacle::Lasting(all)),
        false => (!found.is_empty()).then_some(Obstacle::Passing(all)),
    }
}

const BLIND: &str = "the leader cannot see etcd or its own PostgreSQL now";

fn inputs<'a>(context: &'a Context<'_>) -> Option<Inputs<'a>> {
    let world = &*context.world;
    let survey = world.requests.survey.as_ref().map(|(_, survey)| survey);
    Some(Inputs { me: &world.me.name, spec: world.spec()?, view: world.fresh_view()?, sql: world.sql()?, survey })
}

/// What is under way is asked anew for each request. True = it is known, or could not be asked in time.
fn surveyed(context: &mut Context<'_>, id: &str) -> bool {
    let seen = context.world.requests.seen.get(id).copied().unwrap_or(context.now);
    if context.world.requests.survey.as_ref().is_some_and(|(asked, _)| *asked >= seen) {
        return true;
    }
    if context.start(Operation::Survey) {
        context.world.requests.survey_asked = context.now;
    }
    context.now.since(seen) >= Duration::from_millis(SURVEYED_WITHIN_MS)
}

/// Says what a switchover would meet, to the one that is asked for or to all.
fn judge(context: &mut Context<'_>, id: &str, key: &RequestKey, to: Option<&MemberName>) {
    if !surveyed(context, id) {
        return;
    }
    let progress = match inputs(context) {
        None => RequestProgress::Refused { reason: BLIND.to_owned() },
        Some(inputs) => {
            let mut candidates = switchover::candidates(&inputs);
            if let Some(to) = to {
                candidates.retain(|candidate| candidate.name == *to);
                if candidates.is_empty() {
                    let obstacles = switchover::obstacles(&inputs, to).iter().map(|obstacle| obstacle.reason().to_owned()).collect();
                    candidates.push(Candidate { name: to.clone(), obstacles, warnings: Vec::new() });
                }
            }
            let restarts = being_restarted(context, None);
            candidates.iter_mut().for_each(|candidate| candidate.obstacles.extend(restarts.clone()));
            RequestProgress::Judged { candidates, warnings: switchover::costs(&inputs) }
        }
    };
    answer(context, id, key, progress);
}

/// Says what a restart of this primary would cut off.
fn weigh_restart(context: &mut Context<'_>, id: &str, key: &RequestKey) {
    if surveyed(context, id) {
        let judged = |inputs| RequestProgress::Judged { candidates: Vec::new(), warnings: switchover::costs_of_restart(&inputs) };
        let progress = inputs(context).map_or_else(|| RequestProgress::Refused { reason: BLIND.to_owned() }, judged);
        answer(context, id, key, progress);
    }
}

pub(crate) fn answer(context: &mut Context<'_>, id: &str, key: &RequestKey, progress: RequestProgress) -> bool {
    context.start(Operation::AnswerRequest { id: id.to_owned(), mod_revision: key.mod_revision, progress })
}

/// In every state: requests that this member claimed get their answer when the outcome is seen, and show how far they got until then.
pub(crate) fn settle(context: &mut Context<'_>, state: &State) {
    let Some(view) = context.world.fresh_view().cloned() else { return };
    if context.world.in_flight.contains(&OperationKind::AnswerRequest) {
        return;
    }
    if let State::HandingOver { hand_over } = state {
        return tell(context, hand_over, &view);
    }
    if matches!(state, State::Promoting { .. } | State::Demoting { .. }) {
        return;
    }
    if *state == State::Paused {
        return refuse_all(context, &view);
    }
    if let Some((id, progress)) = reinit::settle(context, state, &view) {
        answer(context, &id, &view.requests[&id], progress);
        return;
    }
    for (id, key) in &view.requests {
        let progress = match &key.record.ask {
            Ask::Switchover { to } | Ask::ScheduledSwitchover { to, .. } => outcome(context, state, &view, (id, key, to)),
            Ask::CheckSwitchover { .. } | Ask::CheckRestart | Ask::Restart { .. } | Ask::Reload { .. } | Ask::Reinit { .. } => None,
            Ask::Failover { to, accept_loss } if key.record.progress.is_open() => {
                of_failover(context, state, &view, (id, key, to), accept_loss.is_some())
            }
            Ask::Failover { .. } => None,
            Ask::Bootstrap { on } => initialized(context, &view, key, on),
        };
        if let Some(progress) = progress {
            answer(context, id, key, progress);
            return;
        }
    }
}

/// In maintenance mode nothing is carried out; what is scheduled waits for its time.
fn refuse_all(context: &mut Context<'_>, view: &ClusterView) {
    let me = context.world.me.name.clone();
    let leads = view.leader.as_ref().is_some_and(|leader| leader.holder == me.as_str());
    let for_me = |key: &RequestKey| match (&key.record.ask, &key.record.progress) {
        // What a member does to itself has rules of its own.
        (Ask::Restart { .. } | Ask::Reload { .. }, _) => false,
        // A copy that has begun goes on when maintenance mode is over.
        (Ask::Reinit { on, .. }, progress) => *on == me && *progress == RequestProgress::Created,
        (_, RequestProgress::Claimed { by, .. }) => *by == me,
        (Ask::ScheduledSwitchover { .. }, _) => false,
        (Ask::Switchover { .. } | Ask::CheckSwitchover { .. } | Ask::CheckRestart, progress) => leads && progress.is_open(),
        (Ask::Failover { to: on, .. } | Ask::Bootstrap { on }, progress) => *on == me && progress.is_open(),
    };
    let Some((id, key)) = view.requests.iter().find(|(_, key)| for_me(key)) else { return };
    let given_up = context.world.requests.handed_over.as_ref().filter(|end| end.request.as_ref() == Some(id));
    let reason = given_up.and_then(|end| end.given_up.clone()).unwrap_or_else(|| MAINTAINED.to_owned());
    answer(context, id, key, RequestProgress::Refused { reason });
}

/// While the lock is being handed over: how far that is, and to others that they come second.
fn tell(context: &mut Context<'_>, hand_over: &HandOver, view: &ClusterView) {
    let open = open(view, context);
    if let Some((id, key, _)) = open.iter().copied().find(|(_, key, _)| key.record.progress == RequestProgress::Created) {
        let first = open.iter().find(|(id, ..)| Some(*id) == hand_over.request.as_ref());
        let reason = match first {
            Some((_, first, to)) => format!("another switchover is under way: to `{to}`, asked for by {}", first.record.by),
            None => "the leader's daemon is being stopped, and hands over to the member that has everything".to_owned(),
        };
        answer(context, id, key, RequestProgress::Refused { reason });
        return;
    }
    let Some((id, key, _)) = open.into_iter().find(|(id, ..)| Some(*id) == hand_over.request.as_ref()) else { return };
    let by = context.world.me.name.clone();
    let now = RequestProgress::Claimed { by, stage: hand_over.stage.name().to_owned(), stages: hand_over.stages.clone() };
    if now != key.record.progress {
        answer(context, id, key, now);
    }
}

/// What became of a switchover that this member took up.
fn outcome(context: &Context<'_>, state: &State, view: &ClusterView, (id, key, to): Open<'_>) -> Option<RequestProgress> {
    let world = &context.world;
    let me = &world.me.name;
    if claimed_by(key) != Some(me) || (*state == State::Primary && !world.requests.tried.contains(id)) {
        return None;
    }
    let handed_over = world.requests.handed_over.as_ref().filter(|end| end.request.as_ref() == Some(id));
    match view.leader.as_ref()?.holder.as_str() {
        leader if leader == to.as_str() && world.leader_writes() => {
            let stages = handed_over.map_or_else(Vec::new, |end| with_promotion(end, context.now));
            Some(RequestProgress::Done { message: format!("`{to}` leads"), stages })
        }
        leader if leader == to.as_str() => None,
        // Given back a moment ago: the view is older than that.
        leader if leader == me.as_str() && *state != State::Primary => None,
        leader => {
            let why = handed_over.and_then(|end| end.given_up.clone()).map_or_else(String::new, |why| format!("{why}; "));
            Some(RequestProgress::Refused { reason: format!("the hand-over did not succeed: {why}`{leader}` leads") })
        }
    }
}

/// The last stage is the successor's: from the release to its first write.
fn with_promotion(end: &HandedOver, now: BootTime) -> Vec<StageTime> {
    let ms = u64::try_from(now.since(end.at).as_millis()).unwrap_or(u64::MAX);
    end.stages.iter().cloned().chain([StageTime { stage: "promotion".to_owned(), ms }]).collect()
}

/// Before a member runs for the lock because somebody asked for it: from then on nobody takes that back, and whoever asked sees it. True =
/// it is so.
pub(crate) fn takes_up_failover(context: &mut Context<'_>, view: &ClusterView, id: &str) -> bool {
    let by = context.world.me.name.clone();
    let Some(key) = view.requests.get(id) else { return false };
    if claimed_by(key) == Some(&by) {
        return true;
    }
    if answer(context, id, key, RequestProgress::Claimed { by, stage: "promotion".to_owned(), stages: Vec::new() }) {
        context.world.requests.claimed.insert(id.to_owned());
    }
    false
}

/// What became of a failover by hand: whoever leads says so, and until then the one that is to lead says why it does not.
fn of_failover(
    context: &Context<'_>,
    state: &State,
    view: &ClusterView,
    (id, key, to): Open<'_>,
    accepted: bool,
) -> Option<RequestProgress> {
    let me = &context.world.me.name;
    let tried = context.world.requests.tried.contains(id);
    let refused = |reason: String| Some(RequestProgress::Refused { reason });
    if let Some(leader) = &view.leader {
        return match *state == State::Primary && leader.holder == me.as_str() {
            true if to == me && tried => Some(RequestProgress::Done { message: format!("`{to}` leads"), stages: Vec::new() }),
            true => refused(format!("`{me}` leads, and nothing was lost for this: `pgherd switchover` moves it")),
            false => None,
        };
    }
    if to != me || *state != State::Candidate || context.world.in_flight.contains(&OperationKind::Acquire) {
        return None;
    }
    match standby::verdict(context)? {
        // Also one that the run of the daemon before this one took up.
        _ if tried || claimed_by(key).is_some() && !context.world.requests.claimed.contains(id) => {
            refused("it ran for the lock and came to nothing: `pgherd events` tells why".to_owned())
        }
        Verdict::NotEligible { why } if accepted => refused(why),
        Verdict::NotEligible { why } => refused(format!("{why}; what would be lost was not accepted")),
        Verdict::Run { .. } | Verdict::Wait { .. } => None,
    }
}

fn initialized(context: &Context<'_>, view: &ClusterView, key: &RequestKey, on: &MemberName) -> Option<RequestProgress> {
    let initialized = matches!(view.initialize, Some(crate::facts::cluster::Initialize::Done(_)));
    let answers = key.record.progress.is_open() && *on == context.world.me.name && initialized;
    answers.then(|| RequestProgress::Done { message: "the cluster is initialized".to_owned(), stages: Vec::new() })
}
