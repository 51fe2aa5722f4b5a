//! Following the leader, and running for the lock when there is none.
//!
//! A member is a standby first: whatever its data directory was, PostgreSQL is started in recovery, and the lock alone, won on a
//! view that it was judged on, brings it out.

use std::sync::Arc;
use std::time::Duration;

use statig::prelude::*;

use crate::facts::cluster::{ClusterView, HistoryEntry, Initialize, MemberRole, Vote};
use crate::facts::guard::Word;
use crate::facts::postgres::{DataDirectory, DatabaseState};
use crate::facts::requests::{Ask, RequestProgress};
use crate::machine::action::{Action, Operation, OperationKind, StartAs, StopMode, Upstream};
use crate::machine::node::Context;
use crate::machine::rules::{archiving, handover, receiving, reinit, requests, slots, synchrony};
use crate::machine::state::{Demotion, Promotion, State, Then, Way};
use crate::machine::world::{Etcd, Lock};
use crate::mutants::{Mutant, mutant};
use crate::policy::election::{self, Inputs, Verdict};
use crate::policy::rejoin;
use crate::types::{LeaseId, Lsn, MemberName, TimelineId};

/// PostgreSQL's XLOG_BLCKSZ, as it is built.
const WAL_PAGE_BYTES: u64 = 8_192;

/// Files that were judged fit to follow the leader are not doubted for so long.
const JUDGED_FOR_S: u64 = 20;
/// For so long what is seen of a standby and of its leader has to contradict, each being told at its own time.
const DIVERGED_AFTER_S: u64 = 2;
/// Entries of `history` that are kept: far more than PostgreSQL keeps history files for in practice.
const HISTORY_MAX_ENTRIES: usize = 1_000;
/// The others are asked again after so long whether they may write.
const PEERS_AGAIN_MS: u64 = 200;
/// By a member that cannot lead as it is.
const PEERS_AGAIN_IN_VAIN_MS: u64 = 1_000;
/// How long a successor that was named is given to take the lock, before its former leader starts without anybody to follow.
pub(crate) const SUCCESSOR_TAKES_MS: u64 = 1_000;
/// A data directory that cannot be used is looked at again after so long.
const LOOK_AGAIN_S: u64 = 5;
/// A standby's stop, which holds nobody up.
pub(crate) const STANDBY_STOP_S: u64 = 10;

pub(crate) fn following(context: &mut Context<'_>) -> Outcome<State> {
    if context.world.spec().is_some() && context.world.declared().is_none() {
        return Transition(State::Undeclared);
    }
    if let Some(state) = lock_is_ours(context).or_else(|| ended_if_writable(context)) {
        return Transition(state);
    }
    if reinit::begins(context) {
        return Transition(State::Rejoining);
    }
    if context.world.running().is_some() { follow_running(context) } else { start_following(context) }
}

/// Won a moment ago, adopted, or proved again after etcd was away: `Promoting` waits for the proof. A leadership writes on the one
/// timeline that its lock was taken with: a server that is on it starts in place, any other is promoted onto it.
fn lock_is_ours(context: &Context<'_>) -> Option<State> {
    let world = context.world.lock.identity().map(|lock| (lock, &context.world));
    let (lock, world) = world?;
    if world.gives_back(lock) {
        return None;
    }
    // A lock that was won a moment ago is proved in `Promoting`; any other has to be proved anew first, and until then there are readers.
    let hopeless = matches!(world.lock, Lock::Unproved(_)) && (world.etcd != Etcd::Reachable || world.reserved.is_none());
    let announced = matches!(world.lock, Lock::Proved { announce_at, .. } if context.now >= announce_at);
    if hopeless || announced {
        return None;
    }
    let (reserved, own) = (world.timeline_of(lock)?, world.own_timeline()?);
    let recovering = world.sql().is_some_and(|sql| sql.in_recovery);
    let way = match (reserved == own, recovering) {
        (true, _) => Way::StartInPlace,
        // Promoted past it by somebody's hand: PostgreSQL would take yet another id.
        _ if own > reserved => return None,
        (false, true) => Way::Promote { timeline: reserved },
        // First it has to run as a standby.
        (false, false) => return None,
    };
    Some(State::Promoting { promotion: Promotion { lock, way, since: context.now } })
}

/// Where a member does not lead, a server runs under a standby's word or not at all.
pub(crate) fn ended_if_writable(context: &Context<'_>) -> Option<State> {
    matches!(context.world.running(), Some((_, Word::Writable))).then(|| {
        let why = "the guard lets PostgreSQL write, and this member does not lead".to_owned();
        let then = context.world.lock.identity().map_or(Then::Follow, Then::StartAgain);
        State::Demoting { demotion: Demotion { why, then } }
    })
}

fn start_following(context: &mut Context<'_>) -> Outcome<State> {
    if !context.world.proved_empty() || context.world.job().is_some() {
        return Handled;
    }
    match &context.world.data {
        DataDirectory::Unknown => {
            context.start(Operation::Look);
            return Handled;
        }
        DataDirectory::Empty => return Transition(State::AwaitingLeader),
        DataDirectory::Unusable(why) => {
            let message = why.clone();
            context.world.fail("data_directory_unusable", message);
            look_again(context);
            return Handled;
        }
        // Never started as it is.
        DataDirectory::HalfRewound(_) => return Transition(State::Rejoining),
        DataDirectory::Full(_) => {}
    }
    context.world.clear("data_directory_unusable");
    if let Some(why) = wrong_identity(context) {
        context.world.fail("wrong_system_id", why);
        look_again(context);
        return Handled;
    }
    context.world.clear("wrong_system_id");
    if handover::successor_goes_first(context) {
        return Handled;
    }
    let first_judged = has_to_be_seen_first(context);
    let upstream = receiving::source(context).filter(|_| !first_judged);
    if has_to_be_judged(context) {
        return Transition(State::Rejoining);
    }
    start_standby(context, upstream);
    Handled
}

/// Somebody has to put the data directory right: that is to be seen without a restart of the daemon.
pub(crate) fn look_again(context: &mut Context<'_>) {
    if context.now.since(context.world.looked_at) >= Duration::from_secs(LOOK_AGAIN_S) {
        context.start(Operation::Look);
    }
}

/// Asks for a postmaster in recovery.
pub(crate) fn start_standby(context: &mut Context<'_>, upstream: Option<Upstream>) {
    let Some((generation, spec)) = context.world.spec.clone() else { return };
    let upstream = upstream.filter(|_| context.world.declared().is_some_and(|member| !member.tags.nostream));
    let (fall_back, names) = (context.world.files_failed, context.world.names_at_first());
    if context.start(Operation::Start { role: StartAs::Standby(upstream.clone()), spec, generation, fall_back, names, closed: false }) {
        context.world.in_force = Some(crate::machine::world::InForce { generation, upstream });
    }
}

/// SAFETY row 64: the data directory of another cluster is not started.
fn wrong_identity(context: &Context<'_>) -> Option<String> {
    let own = context.world.control()?.system_id;
    match &context.world.view.as_ref()?.initialize {
        Some(Initialize::Done(id)) if *id != own => Some(format!(
            "the data directory holds system identifier {own}, the cluster's is {id}: PostgreSQL is not started; move the directory away to have it cloned"
        )),
        Some(_) | None => None,
    }
}

/// A directory that was a primary's, or is on another timeline than the leader, may have diverged.
fn has_to_be_judged(context: &Context<'_>) -> bool {
    let (Some(control), Some((_, key))) = (context.world.control(), context.world.other_leader()) else { return false };
    let was_standby = matches!(control.state, DatabaseState::ShutDownInRecovery | DatabaseState::InArchiveRecovery);
    let same_timeline = key.record.timeline == Some(control.timeline.max(control.min_recovery_timeline));
    // A copy made a moment ago: its control file is the leader's own. Of another timeline it is a former leader's, whose WAL may be past
    // the point where this one left it, and then PostgreSQL would refuse to start at every attempt.
    if control.backup_label && control.standby_signal && same_timeline {
        return false;
    }
    let is_past = was_standby && same_timeline || handover::is_in_the_past_of_the_leader(context);
    key.record.role == MemberRole::Primary && (!is_past || has_to_be_seen_first(context))
}

/// The leader, as it says itself.
pub(crate) fn upstream(context: &Context<'_>) -> Option<Upstream> {
    context.world.other_leader().map(|(name, key)| receiving::upstream_of(name, key))
}

fn follow_running(context: &mut Context<'_>) -> Outcome<State> {
    // Found running by this daemon: before it is told to follow anybody, its files are looked at.
    if context.world.promoted.is_none() {
        context.start(Operation::Look);
    }
    if context.world.sql().is_some_and(|sql| sql.stopping) {
        // By somebody's hand, and perhaps with the patience to wait for every reader: it ends, and starts again.
        context.stop(StopMode::Fast { patience: Duration::from_secs(STANDBY_STOP_S) });
        return Handled;
    }
    let first_judged = has_to_be_seen_first(context);
    let cannot_follow = has_diverged(context) || receiving::is_stuck(context) || receiving::waits_for_a_former_leader(context);
    if cannot_follow || (first_judged && context.world.leader_writes()) {
        context.decide("rejoin", "PostgreSQL cannot follow the leader as it is: it is stopped and the way back is judged");
        context.stop(StopMode::Fast { patience: Duration::from_secs(STANDBY_STOP_S) });
        return Transition(State::Rejoining);
    }
    if !first_judged && context.world.promoted.is_some() {
        keep_configured(context);
        // While nobody leads nothing is read anew: whoever is promoted sees to it then.
        if context.world.vacancy.is_none() {
            synchrony::keep_standby(context);
        }
        slots::keep(context);
    }
    if context.world.vacancy.is_some() && can_be_candidate(context) { Transition(State::Candidate) } else { Handled }
}

/// No leader is followed before its history has been held against our files, or PostgreSQL would make use of them in a way that cannot be
/// taken back. A server that streams was judged, or is past that.
fn has_to_be_seen_first(context: &Context<'_>) -> bool {
    let world = &context.world;
    let streams = world.running().is_some() && (world.sql().is_none() || world.receiving.not_streaming_since.is_none());
    !streams && (is_of_another_promotion(context) || archiving::is_owed(world))
}

/// Our WAL ends on a timeline that we may have made ourselves, outside the cluster's history (SAFETY row 53): no leader is followed before
/// the files have been judged.
fn is_of_another_promotion(context: &Context<'_>) -> bool {
    let world = &context.world;
    // An old view too: whom it names is whom the files say to follow while etcd cannot be asked.
    let (Some(view), Some(own)) = (world.view.as_ref(), world.own_timeline()) else { return false };
    if world.judged.is_some_and(|(epoch, _)| view.leader.as_ref().is_some_and(|leader| leader.epoch == epoch)) {
        return false;
    }
    world.promoted.is_some_and(|promoted| rejoin::may_be_of_another_promotion(own, promoted, &view.history))
}

/// Our WAL goes past the point where the leader's timeline left ours, as etcd's history tells. The files have the last word: once they
/// were judged fit to follow this leader, PostgreSQL gets its time, since a timeline is told late while recovery goes over to it. Such a
/// standby may well stream, again and again for a moment: it is sent what it has, up to where the leader left its timeline.
fn has_diverged(context: &mut Context<'_>) -> bool {
    let past = is_past_the_switch(context);
    let receiving = &mut context.world.receiving;
    receiving.past_the_switch_since = past.then(|| receiving.past_the_switch_since.unwrap_or(context.now));
    let leader = context.world.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.epoch);
    let fit =
        context.world.judged.is_some_and(|(epoch, at)| Some(epoch) == leader && context.now.since(at) < Duration::from_secs(JUDGED_FOR_S));
    let since = context.world.receiving.past_the_switch_since;
    !fit && since.is_some_and(|since| context.now.since(since) >= Duration::from_secs(DIVERGED_AFTER_S))
}

fn is_past_the_switch(context: &Context<'_>) -> bool {
    let (Some(view), Some(sql), Some((_, key))) = (context.world.fresh_view(), context.world.sql(), context.world.other_leader()) else {
        return false;
    };
    let Some(leader) = key.record.timeline.filter(|_| key.record.role == MemberRole::Primary) else { return false };
    let whole = |entry: &HistoryEntry| entry.timeline <= TimelineId(1) || entry.parent.is_some() && entry.switch_lsn.is_some();
    let recorded = view.history.iter().any(|entry| entry.timeline == leader && entry.epoch.is_some() && whole(entry));
    match leader.cmp(&sql.timeline) {
        std::cmp::Ordering::Equal => false,
        std::cmp::Ordering::Less => recorded && view.leader.as_ref().is_some_and(|lock| is_of(view, leader, lock.epoch)),
        std::cmp::Ordering::Greater => {
            // Without a switch the timeline is another's, or history lacks an entry: the leader's own has let in who streams.
            let streams = context.world.receiving.not_streaming_since.is_none();
            let switch = election::switch_from(&view.history, leader, sql.timeline);
            recorded && switch.map_or(!streams, |switch| is_past(sql.end_of_wal(), switch))
        }
    }
}

/// WAL is sent in whole pages where its end is not known: to the end of the page that the switch is on there may be nothing but zeros.
/// If there is more, PostgreSQL does not stream, and the files tell when it is started again.
fn is_past(end: Lsn, switch: Lsn) -> bool {
    let fills_the_page = end.0.is_multiple_of(WAL_PAGE_BYTES) && end.0.saturating_sub(switch.0) < WAL_PAGE_BYTES;
    end > switch && !fills_the_page
}

fn is_of(view: &ClusterView, timeline: TimelineId, epoch: crate::types::Epoch) -> bool {
    view.history.iter().any(|entry| entry.timeline == timeline && entry.is_of(epoch))
}

/// Files follow the spec and the leader. A standby tries a new generation first; the primary waits for one that took it.
fn keep_configured(context: &mut Context<'_>) {
    let Some((generation, spec)) = context.world.spec.clone() else { return };
    let nostream = context.world.declared().is_some_and(|member| member.tags.nostream);
    let before = context.world.in_force.as_ref().and_then(|files| files.upstream.clone()).filter(|_| !nostream);
    let upstream = receiving::source(context).or(before);
    receiving::say(context, upstream.as_ref());
    let as_wanted = context.world.in_force.as_ref().is_some_and(|files| {
        (files.generation == generation || context.world.refused_generation == Some(generation)) && files.upstream == upstream
    });
    let anew = context.world.requests.writes_anew();
    if (!as_wanted || anew) && context.world.sql().is_some() {
        context.start(Operation::Configure { spec, generation, upstream, anew });
    }
}

fn can_be_candidate(context: &Context<'_>) -> bool {
    let world = &context.world;
    let in_recovery = world.sql().is_some_and(|sql| sql.in_recovery) && matches!(world.running(), Some((_, Word::Standby)));
    in_recovery
        && world.fresh_view().is_some_and(|view| view.spec.is_some())
        && world.written.is_some()
        && world.lock == Lock::None
        && !world.failsafe.keeps_still
        && world.declared().is_some_and(|member| !member.nofailover())
        && (!abstains(context) || synchrony::is_recorded(world))
}

/// A leadership of this member came to nothing a moment ago, and another may have better luck. Where commits wait for standbys the others may
/// need its word on how far it is all the same.
fn abstains(context: &Context<'_>) -> bool {
    let world = &context.world;
    world.abstains_until.is_some_and(|until| context.now < until) && somebody_else_could_lead(world)
}

fn somebody_else_could_lead(world: &crate::machine::world::World) -> bool {
    let (Some(view), Some(spec)) = (world.fresh_view(), world.spec()) else { return false };
    view.members.iter().any(|(name, key)| {
        *name != world.me.name && key.record.role == MemberRole::Replica && spec.member(name).is_some_and(|member| !member.nofailover())
    })
}

pub(crate) fn candidate(context: &mut Context<'_>) -> Outcome<State> {
    if let Some(state) = lock_is_ours(context).or_else(|| ended_if_writable(context)) {
        return Transition(state);
    }
    if context.world.in_flight.contains(&OperationKind::Acquire) {
        return Handled;
    }
    if context.world.vacancy.is_none() || !can_be_candidate(context) {
        context.world.clear("waiting_to_lead");
        return Transition(State::Following);
    }
    synchrony::detach(context);
    let verdict = verdict(context);
    ask_peers(context, if matches!(verdict, Some(Verdict::NotEligible { .. })) { PEERS_AGAIN_IN_VAIN_MS } else { PEERS_AGAIN_MS });
    match verdict {
        Some(Verdict::Run { .. }) if abstains(context) && by_hand(context).is_none() => {
            context.world.set_info("waiting_to_lead", "leaves the lock to another: its own leadership came to nothing".to_owned());
        }
        Some(Verdict::Run { why, initialize }) => {
            context.world.clear("waiting_to_lead");
            run(context, &why, initialize);
        }
        Some(Verdict::Wait { why, .. }) => context.world.set_info("waiting_to_lead", why),
        Some(Verdict::NotEligible { why }) => context.world.warn("waiting_to_lead", why),
        None => {}
    }
    Handled
}

/// Our last word on this vacancy.
pub(crate) fn own_vote(world: &crate::machine::world::World) -> Option<Vote> {
    let (vacancy, sql) = (world.vacancy?, world.sql()?);
    let last = sql.in_recovery && synchrony::is_last_word(world);
    last.then(|| Vote { vacancy: vacancy.id, timeline: sql.timeline, lsn: sql.end_of_wal() })
}

/// An operator's word that this member is to lead, and how much may be lost: for one attempt (SAFETY row 69).
fn by_hand(context: &Context<'_>) -> Option<(String, String, u64)> {
    let world = &context.world;
    world.fresh_view()?.requests.iter().find_map(|(id, key)| {
        let Ask::Failover { to, accept_loss } = &key.record.ask else { return None };
        let accepted = accept_loss.or(mutant(Mutant::LossNotAccepted).then_some(u64::MAX))?;
        let ours = world.requests.claimed.contains(id) && key.record.progress.is_open();
        let stands = (ours || key.record.progress == RequestProgress::Created) && !world.requests.tried.contains(id);
        (stands && *to == world.me.name).then(|| (id.clone(), key.record.by.clone(), accepted))
    })
}

pub(crate) fn verdict(context: &Context<'_>) -> Option<Verdict> {
    let world = &context.world;
    let (view, spec, vacancy) = (world.fresh_view()?, world.spec()?, world.vacancy?);
    let times = world.times()?;
    let deadlines = times.deadlines(vacancy.seen);
    let peers = world.peers.as_ref().filter(|answer| answer.vacancy == vacancy.id).map(|answer| answer.writable.as_slice());
    Some(election::judge(&Inputs {
        now: context.now,
        me: &world.me.name,
        spec,
        view,
        vacant_since: vacancy.seen,
        own: own_vote(world)?,
        promoted: world.promoted?,
        system_id: world.sql()?.system_id,
        peers,
        ladder: deadlines.fenced_by.since(deadlines.announce_at),
        promise: world.failsafe.promise.as_ref(),
        started: world.failsafe.started.unwrap_or(context.now),
        accept_loss: by_hand(context).map(|(_, _, accepted)| accepted),
    }))
}

/// Without a release in good order, a former leader may still be writable (SAFETY 5, promoter's side; rows 37 and 39).
fn ask_peers(context: &mut Context<'_>, again_ms: u64) {
    let (Some(vacancy), Some(spec)) = (context.world.vacancy, context.world.spec().cloned()) else { return };
    let released = context.world.view.as_ref().is_some_and(|view| view.release.is_some());
    // Who may write can change: they are asked until this member runs.
    let fresh = context
        .world
        .peers
        .as_ref()
        .is_some_and(|answer| answer.vacancy == vacancy.id && context.now.since(answer.sent) < Duration::from_millis(again_ms));
    if released || fresh {
        return;
    }
    let peers = spec.members.iter().filter(|member| member.name != context.world.me.name);
    let peers = peers.map(|member| (member.name.clone(), member.api_url())).collect();
    context.start(Operation::AskPeers { vacancy: vacancy.id, peers });
}

fn run(context: &mut Context<'_>, why: &str, initialize: Option<crate::types::SystemId>) {
    let Some(view) = context.world.fresh_view().cloned() else { return };
    if let Some((id, ..)) = by_hand(context)
        && !requests::takes_up_failover(context, &view, &id)
    {
        return;
    }
    let (Some(lease), Some(sql)) = (context.world.lease, context.world.sql()) else { return };
    let end = sql.end_of_wal();
    let reserved = election::next_timeline(&view, sql.timeline);
    let history = with_reservation(&view, reserved, &context.world.me.name, lease.lease, why);
    let message =
        format!("runs for the lock at {} on timeline {}, to promote onto timeline {reserved}: {why}", sql.end_of_wal(), sql.timeline);
    if context.start(Operation::Acquire { judged_on: Arc::clone(&view), history, initialize }) {
        context.world.reserved = Some(reserved);
        context.decide("runs", message);
        if let Some((id, by, accepted)) = by_hand(context) {
            context.world.requests.tried.insert(id);
            let lost = match election::bytes_behind(&view, end) {
                Some(bytes) => format!("{bytes} bytes of WAL that the last leader had published are not here"),
                None => "the last leader published no position".to_owned(),
            };
            let acknowledged =
                if view.sync_revision.0 == 0 { "" } else { ", and commits that were acknowledged may be among what is lost" };
            context
                .decide("failover_by_hand", format!("{lost}{acknowledged}: {by} asked for it and accepted the loss of {accepted} bytes"));
        }
    }
}

/// `history` with one more id, reserved in the transaction that takes the lock.
pub(crate) fn with_reservation(
    view: &ClusterView,
    timeline: TimelineId,
    member: &MemberName,
    lease: LeaseId,
    why: &str,
) -> Vec<HistoryEntry> {
    let mut history = view.history.clone();
    let surplus = (history.len() + 1).saturating_sub(HISTORY_MAX_ENTRIES);
    history.drain(..surplus);
    history.push(HistoryEntry {
        timeline,
        member: member.clone(),
        lease,
        epoch: None,
        parent: None,
        switch_lsn: None,
        why: why.to_owned(),
        at: String::new(),
        continued: None,
    });
    history
}

/// Cancels what runs for PostgreSQL, for a state that must not wait for it.
pub(crate) fn cancel_job(context: &mut Context<'_>) {
    if context.world.job().is_some() {
        context.actions.push(Action::CancelJob);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_that_only_fills_the_page_of_the_switch_is_not_past_it() {
        let switch = Lsn(0x5CA_BF88);
        assert!(!is_past(Lsn(0x5CA_C000), switch), "as it is received from a server that was killed");
        assert!(is_past(Lsn(0x5CA_BF90), switch) && is_past(Lsn(0x5CA_E000), switch));
        assert!(!is_past(switch, switch));
    }
}
