//! The member key: what this member says of itself, written when it changes, and its positions at most once per loop_wait.
//!
//! While a leader hands over, and while the lock is absent, positions decide who leads: then every change is written at once.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{DataDirectoryReport, MemberRecord, MemberRole, Vote};
use crate::facts::failsafe;
use crate::facts::guard::{PostmasterFacts, Word};
use crate::facts::maintenance;
use crate::facts::postgres::{DataDirectory, ProbeOutcome, STREAMING};
use crate::facts::synchrony;
use crate::machine::action::{Operation, OperationKind};
use crate::machine::bookkeeping::MEMBER_KEY_FAILED;
use crate::machine::copying::Progress;
use crate::machine::node::Context;
use crate::machine::rules::{handover, standby};
use crate::machine::state::{State, StateKind};
use crate::machine::world::World;
use crate::policy::switchover::REPLAY_PAUSED;
use crate::policy::{election, slots};
use crate::spec::cluster::OnRewindFailure;
use crate::types::{Lsn, TimelineId};

/// A member's state while its server ends.
const STOPPING: &str = "stopping";
/// A member's state when its server has ended.
const STOPPED: &str = "stopped";

/// A key that was written so long ago has to be seen in etcd.
const VANISHED_AFTER_MS: u64 = 1_000;

/// How far a copy has got is told at most so often.
const PROGRESS_EVERY_S: u64 = 3;

/// Writes the member key if it has to be written.
pub(crate) fn publish(context: &mut Context<'_>, state: &State) {
    if context.world.lease.is_none() || context.world.exited {
        return;
    }
    let Some(record) = record(context.world, state) else { return };
    let due = match &context.world.written {
        None => true,
        Some(_) if context.world.asked.moved => true,
        Some((_, at)) if vanished(context.world) && context.now.since(*at) >= Duration::from_millis(VANISHED_AFTER_MS) => true,
        Some((last, at)) => {
            // How far a copy has got is for people, and not worth a write of its own.
            let slow = MemberRecord { receive_lsn: last.receive_lsn, replay_lsn: last.replay_lsn, ..record.clone() };
            let progress_only = MemberRecord { copying: last.copying.clone(), ..slow.clone() } == *last && record.copying.is_some();
            let positions_only = slow == *last;
            let loop_wait = context.world.spec().map(|spec| spec.ha.loop_wait).unwrap_or_default();
            let waited = context.now.since(*at);
            let told_lately = progress_only && waited < loop_wait.min(Duration::from_secs(PROGRESS_EVERY_S));
            record != *last && !told_lately && (!positions_only || waited >= loop_wait || positions_matter_now(context.world))
        }
    };
    if due && !has_time(context.world, context.now) && context.world.may_start(context.now, OperationKind::PutMember) {
        context.world.writing = Some(record.clone());
        context.world.writing_on = context.world.lease;
        context.world.asked.moved = false;
        context.start(Operation::PutMember(Box::new(record)));
    }
}

/// A lock is on its way from one member to another, and writes stand still until etcd has written that: what this member says of itself is
/// written after it.
fn has_time(world: &World, now: BootTime) -> bool {
    let lately = world.vacancy.is_some_and(|vacancy| now.since(vacancy.seen) < Duration::from_millis(standby::SUCCESSOR_TAKES_MS));
    let handed = world.view.as_ref().and_then(|view| view.release.as_ref()).is_some_and(|release| release.to.is_some());
    let decides = [OperationKind::Release, OperationKind::WriteSync].iter().any(|kind| world.in_flight.contains(kind));
    // Where nobody was named the others wait for what this member says.
    let runs = world.in_flight.contains(&OperationKind::Acquire) || handover::is_for_another(world);
    world.written.is_some() && (decides || lately && handed && runs)
}

/// Our key is not what we wrote, although we did not take it away: somebody's hand did. A view may be a little older than the key.
fn vanished(world: &World) -> bool {
    let key = world.fresh_view().map(|view| view.members.get(&world.me.name).map(|key| key.lease));
    key.is_some_and(|key| key != world.lease.map(|lease| lease.lease))
}

/// Whether every change of position has to be seen by others at once.
pub(crate) fn positions_matter_now(world: &World) -> bool {
    let election = world.vacancy.is_some() && !world.failsafe.keeps_still;
    // Until its server is being stopped what a leader has yet to send changes all the while.
    let is_handed = |leader: &MemberRecord| {
        leader.machine_state == StateKind::HandingOver.name() && [STOPPING, STOPPED].contains(&leader.state.as_str())
    };
    (election || world.other_leader().is_some_and(|(_, key)| is_handed(&key.record))) && !handover::is_for_another(world)
}

fn record(world: &World, state: &State) -> Option<MemberRecord> {
    let member = world.declared()?;
    let sql = world.sql();
    let role = role(world);
    let half = if let DataDirectory::HalfRewound(attempt) = &world.data { Some(attempt) } else { None };
    let at_rest = world.control().map(|control| control.system_id).or(half.map(|attempt| attempt.system_id));
    let system_id = sql.map(|sql| sql.system_id).or(at_rest);
    // Of a stopped server the timeline that its WAL ends on, not the one of its last checkpoint: others must not use the id again.
    let timeline = world.own_timeline();
    let last = world.written.as_ref().map(|(record, _)| record);
    Some(bounded(MemberRecord {
        incarnation: world.me.incarnation.clone(),
        role,
        state: patroni_state(world, state).to_owned(),
        machine_state: state.name().to_owned(),
        timeline,
        receive_lsn: sql.map(|sql| sql.receive_lsn.max(if sql.in_recovery { sql.replay_lsn } else { sql.receive_lsn })),
        replay_lsn: sql.filter(|sql| sql.in_recovery).map(|sql| sql.replay_lsn),
        system_id,
        data_directory: data_directory(world, last),
        vote: match half {
            // It has nothing that anybody could lead with, and nobody is to wait for it.
            Some(_) => world.vacancy.map(|vacancy| Vote { vacancy: vacancy.id, timeline: TimelineId(0), lsn: Lsn(0) }),
            None if matches!(state, State::Candidate) => standby::own_vote(world),
            None => None,
        },
        api_url: member.api_url(),
        host: member.address.clone(),
        port: member.port,
        versions: crate::facts::cluster::Versions {
            postgres: sql.map(|sql| sql.server_version_num).or(world.me.versions.postgres),
            ..world.me.versions.clone()
        },
        observed_generation: world.in_force.as_ref().map_or(0, |files| files.generation),
        features: [failsafe::FEATURE, synchrony::FEATURE, slots::FEATURE, maintenance::FEATURE].map(str::to_owned).to_vec(),
        pending_restart: sql.map(|sql| sql.pending_restart.clone()).unwrap_or_default(),
        tags: member.tags.set(),
        // Once it is written this one is not true any more.
        conditions: world.conditions.values().filter(|condition| condition.kind != MEMBER_KEY_FAILED).cloned().collect(),
        lost_writes: world.kept.lost.clone(),
        copying: world.receiving.copying.as_ref().map(Progress::copying),
        maintenance: world.guard_maintained(),
    }))
}

/// Conditions carry error texts of others: bounded, so that the key stays small.
fn bounded(mut record: MemberRecord) -> MemberRecord {
    const MESSAGE_MAX_CHARS: usize = 1_000;
    let sentences = record.conditions.iter_mut().map(|condition| &mut condition.message);
    for sentence in sentences.chain(record.lost_writes.iter_mut().map(|lost| &mut lost.why)) {
        if sentence.chars().count() > MESSAGE_MAX_CHARS {
            *sentence = sentence.chars().take(MESSAGE_MAX_CHARS).collect();
        }
    }
    record
}

pub(crate) fn role(world: &World) -> MemberRole {
    match (world.running(), world.sql()) {
        (Some(_), Some(sql)) if sql.in_recovery => MemberRole::Replica,
        (Some((_, Word::Writable)), Some(_)) => MemberRole::Primary,
        (Some((_, Word::Standby)), _) => MemberRole::Replica,
        _ if world.control().is_some() => MemberRole::Replica,
        _ => MemberRole::Uninitialized,
    }
}

/// A running server has a full directory, whatever the last look at it was.
fn data_directory(world: &World, last: Option<&MemberRecord>) -> DataDirectoryReport {
    match &world.data {
        DataDirectory::Empty => DataDirectoryReport::Empty,
        DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => DataDirectoryReport::Full,
        DataDirectory::Unknown if world.running().is_some() => DataDirectoryReport::Full,
        DataDirectory::Unknown => last.map_or(DataDirectoryReport::Unknown, |record| match record.data_directory {
            // What was there is still there; an empty one may have been filled meanwhile.
            DataDirectoryReport::Full => DataDirectoryReport::Full,
            DataDirectoryReport::Empty | DataDirectoryReport::Unknown => DataDirectoryReport::Unknown,
        }),
    }
}

/// Patroni's words (PATRONI.md), so that plugins and dashboards go on to understand.
pub(crate) fn patroni_state(world: &World, state: &State) -> &'static str {
    match state {
        State::Cloning => return "creating replica",
        State::Initializing => return "initializing new cluster",
        State::Rejoining if world.in_flight.contains(&OperationKind::Clone) => return "creating replica",
        State::Rejoining if world.in_flight.contains(&OperationKind::EmptyDirectory) => return "creating replica",
        State::Rejoining if world.in_flight.contains(&OperationKind::Rewind) => return "running pg_rewind",
        _ => {}
    }
    match world.guard.as_ref().map(|guard| &guard.postmaster) {
        None | Some(PostmasterFacts::Unclaimed { .. }) => "unknown",
        Some(PostmasterFacts::Ending { .. }) => STOPPING,
        Some(PostmasterFacts::ProvedEmpty { last }) => match last {
            Some(end) if end.rung.is_none() && end.exit_status != Some(0) => "crashed",
            Some(_) | None => STOPPED,
        },
        Some(PostmasterFacts::Running { .. }) => match world.probe.as_ref().map(|probe| &probe.outcome) {
            Some(ProbeOutcome::Accepting(sql)) if sql.in_recovery && sql.streams() => STREAMING,
            Some(ProbeOutcome::Accepting(_)) => "running",
            Some(ProbeOutcome::NotYet(_)) | None => "starting",
            Some(ProbeOutcome::Unknown(_)) => "unknown",
        },
    }
}

/// Conditions that follow from facts and belong to no single state; and the end of those that are over with their state.
pub(crate) fn standing_conditions(world: &mut World, state: &State) {
    match world.guard.as_ref().map(|guard| guard.conditions.join("; ")) {
        Some(less) if !less.is_empty() => world.set_info("guard", less),
        Some(_) | None => world.clear("guard"),
    }
    let restart = world.sql().map(|sql| sql.pending_restart.clone()).unwrap_or_default();
    if restart.is_empty() {
        world.clear("pending_restart");
    } else {
        world.set_info("pending_restart", format!("takes effect with the next restart of PostgreSQL: {}", restart.join(", ")));
    }
    could_it_be_rewound(world);
    was_it_put_back(world);
    match world.sql().map(|sql| sql.in_recovery && sql.replay_paused) {
        Some(true) => {
            let message = "replay is paused, and no switchover goes here: by hand (pg_wal_replay_resume() ends it), or because a parameter is \
                           lower than the primary's, which the log names and a restart mends";
            world.warn(REPLAY_PAUSED, message.to_owned());
        }
        Some(false) | None => world.clear(REPLAY_PAUSED),
    }
    match world.fresh_view().map(|view| view.spec.is_some()) {
        Some(false) if world.spec().is_some() => {
            let message = "the spec is gone from etcd; the last good one stays in force, and nobody takes the lock until one is applied";
            world.warn("spec_missing", message.to_owned());
        }
        Some(_) => world.clear("spec_missing"),
        None => {}
    }
    let at_work = world.sql().is_some();
    let over: &[&'static str] = match state {
        State::AwaitingLeader | State::Initializing => &["waiting_to_lead", "wrong_system_id", "data_directory_unusable", "rejoin_refused"],
        State::Following if at_work => &BEHIND_A_LEADER,
        State::Primary if at_work => &UNDER_THE_LOCK,
        State::Following | State::Rejoining | State::Cloning => &["waiting_to_initialize", "waiting_to_lead"],
        State::Candidate | State::Promoting { .. } | State::HandingOver { .. } | State::Restarting => &["waiting_to_initialize"],
        State::Starting | State::Undeclared | State::Primary | State::Demoting { .. } | State::Paused | State::Stopping => &[],
    };
    over.iter().for_each(|kind| world.clear(kind));
    if !state.is_leading() && *state != State::Paused {
        OF_A_LEADER.iter().for_each(|kind| world.clear(kind));
    }
}

/// SAFETY row 27: until it has what it was known to have, it is no witness in an election of what was acknowledged.
fn was_it_put_back(world: &mut World) {
    let (Some(view), Some(sql)) = (world.fresh_view(), world.sql()) else { return };
    // What streams is behind the leader's word by as much as its last probe is old, and catches up.
    let has_gone_through_all = world.replayed_by.as_ref() == Some(&sql.startup);
    if sql.in_recovery && has_gone_through_all && !sql.streams() && election::was_put_back(view, &world.me.name, sql.end_of_wal()) {
        let end = sql.end_of_wal();
        let message = format!(
            "its WAL ends at {end}, and it was known to have more: its disk was put back to an older state, or has lost what it said was \
             written; it is not counted on before it has caught up"
        );
        world.warn("put_back", message);
    } else if !sql.in_recovery || has_gone_through_all {
        world.clear("put_back");
    }
}

/// What a rewind would need is looked at while all is well, and not on the day.
fn could_it_be_rewound(world: &mut World) {
    let Some(postgres) = world.spec().map(|spec| spec.postgres.clone()).filter(|postgres| postgres.use_pg_rewind) else {
        return world.clear("rewind_unavailable");
    };
    let Some(off) = world.sql().map(|sql| sql.no_rewind.join(", ")) else { return };
    let settings = (!off.is_empty()).then(|| format!("these settings are off: {off}"));
    match (settings.or(world.kept.no_rewind.clone()), postgres.on_rewind_failure) {
        (None, _) => world.clear("rewind_unavailable"),
        (Some(why), OnRewindFailure::Reclone) => {
            world.set_info("rewind_unavailable", format!("if it diverged, this member would be cloned and not rewound: {why}"));
        }
        (Some(why), OnRewindFailure::Stop) => {
            world.warn("rewind_unavailable", format!("if it diverged, this member would be left to a person: {why}"));
        }
    }
}

/// What only a leader knows: whom its commits wait for.
const OF_A_LEADER: [&str; 7] =
    ["durability_reduced", "durability_lowered", "synchrony_waits", "synchrony_changes", "synchrony_version", "sync_unreadable", "closed"];

/// What is over when a standby is at work.
const BEHIND_A_LEADER: [&str; 17] = [
    "waiting_to_initialize",
    "waiting_to_lead",
    "wrong_system_id",
    "data_directory_unusable",
    "initdb_failed",
    "clone_failed",
    "rewind_failed",
    "rewind_unfinished",
    "rejoin_waits",
    "rejoin_unclear",
    "rejoin_refused",
    "promotion_failed",
    "checkpoint_failed",
    "release_failed",
    "roles_failed",
    "fence_failed",
    "configuration_waits",
];

/// What is over when a primary is at work.
const UNDER_THE_LOCK: [&str; 17] = [
    "receives_nothing",
    "leader_unreachable",
    "upstream_away",
    "waiting_to_initialize",
    "waiting_to_lead",
    "wrong_system_id",
    "data_directory_unusable",
    "initdb_failed",
    "clone_failed",
    "rewind_failed",
    "rewind_unfinished",
    "rejoin_waits",
    "rejoin_unclear",
    "rejoin_refused",
    "promotion_failed",
    "release_failed",
    "fence_failed",
];
