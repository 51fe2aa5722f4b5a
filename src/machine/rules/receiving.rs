//! From whom this standby receives, and what is done when it receives nothing (SAFETY rows 10 and 56).
//!
//! A walreceiver is started again by taking away whom to follow: the next look gives it back. PostgreSQL is started again only once the
//! leader's server has answered a connection from here, since nothing helps against a leader that cannot be reached.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::MemberKey;
use crate::facts::guard::Word;
use crate::facts::postgres::{ProbeOutcome, SqlFacts};
use crate::machine::action::{Operation, Upstream};
use crate::machine::node::Context;
use crate::machine::world::{Etcd, World};
use crate::mutants::{Mutant, mutant};
use crate::policy::receiving::{SERVER_STARTS_MAX, Seen, Step, given};
use crate::policy::slots::FEATURE as MEMBER_SLOTS;
use crate::policy::upstream::{self, Inputs, Source};
use crate::types::MemberName;

/// What the leader's server answered so long ago still counts.
const REACHED_FOR_S: u64 = 5;
/// A server that takes no connections may follow somebody who does not lead any more for so long: one that goes through the WAL that it has
/// loses nothing by it, and a former primary that is stopped in the middle of that could not be rewound.
const STARTS_WITHIN_S: u64 = 300;
/// PostgreSQL's own wal_receiver_timeout, for a spec that asks for PostgreSQL's default.
const WAL_RECEIVER_TIMEOUT: &str = "60s";

/// A member as somebody to follow.
pub(crate) fn upstream_of(name: &MemberName, key: &MemberKey) -> Upstream {
    Upstream { member: name.clone(), host: key.record.host.clone(), port: key.record.port, keeps_slots: key.knows(MEMBER_SLOTS) }
}

/// Whom the server is to follow now. None = nobody: it replays from the archive only, or nobody is known to lead.
pub(crate) fn source(context: &mut Context<'_>) -> Option<Upstream> {
    let now = context.now;
    let world = &mut *context.world;
    let me = world.declared().filter(|member| !member.tags.nostream)?.clone();
    let view = world.view.clone()?;
    let follows = world.in_force.as_ref().and_then(|files| files.upstream.as_ref()).map(|upstream| &upstream.member);
    let inputs = Inputs { now, me: &me, view: &view, follows, gets_nothing_since: gets_nothing_since(world) };
    let mut remembered = world.receiving.upstream;
    let source = upstream::choose(&mut remembered, &inputs);
    world.receiving.upstream = remembered;
    match source {
        Source::Member(name) => view.members.get(&name).map(|key| upstream_of(&name, key)),
        Source::Leader => world.other_leader().map(|(name, key)| upstream_of(name, key)),
    }
}

/// Since when nothing comes from whom the server was told to follow, although it asks. What streams and gets nothing is found out later.
fn gets_nothing_since(world: &World) -> Option<BootTime> {
    let sql = world.sql().filter(|sql| asks(world, sql))?;
    let told = told_at(world);
    if !sql.streams() {
        return world.receiving.not_streaming_since.map(|since| since.max(told));
    }
    let stands = world.receiving.progress.stands_still(world.probe.as_ref()?.begun, told, patience(world, sql));
    stands.then_some(told)
}

/// Since when the server that runs knows whom to follow.
fn told_at(world: &World) -> BootTime {
    world.configured_at.max(world.postmaster_since)
}

/// It has gone through all that it found, and nobody holds it up.
fn asks(world: &World, sql: &SqlFacts) -> bool {
    sql.in_recovery && !sql.replay_paused && world.replayed_by.as_ref() == Some(&sql.startup)
}

fn patience(world: &World, sql: &SqlFacts) -> Duration {
    let parameters = world.spec().map(|spec| spec.postgres.parameters_of(&world.me.name)).unwrap_or_default();
    let timeout = parameters.get("wal_receiver_timeout").map(|value| value.as_deref().unwrap_or(WAL_RECEIVER_TIMEOUT));
    given(sql.streams(), timeout)
}

/// Of a standby at work: what is done when it receives nothing. True = PostgreSQL is to be stopped, judged and started again.
pub(crate) fn is_stuck(context: &mut Context<'_>) -> bool {
    let now = context.now;
    let world = &mut *context.world;
    let streams_at_all = world.declared().is_some_and(|member| !member.tags.nostream);
    let Some(sql) = world.sql().filter(|sql| sql.in_recovery && streams_at_all).cloned() else { return false };
    let leader = world.fresh_view().and_then(|view| view.leader_position());
    let seen = Seen { reached: sql.end_of_wal(), leader, streams: sql.streams(), asks: asks(world, &sql) };
    world.receiving.progress.seen(now, seen);
    let Some((_, writes_since)) = world.leader_writes_since.filter(|_| world.etcd == Etcd::Reachable) else { return false };
    if world.receiving.progress.tries() == 0 {
        world.clear("receives_nothing");
    }
    if sql.streams() {
        world.clear("leader_unreachable");
    }
    if mutant(Mutant::StandstillIgnored) {
        return false;
    }
    match world.receiving.progress.step(now, told_at(world).max(writes_since), patience(world, &sql)) {
        Step::Wait => false,
        Step::RestartReceiver => {
            restart_receiver(context);
            false
        }
        Step::RestartServer => restart_server(context),
    }
}

/// A server that takes no connections cannot be told whom to follow. One that was rewound takes none before it has all that its source had:
/// with that source gone it would wait for ever. Nobody reads from it, so that it is stopped, judged, and started behind the present leader.
pub(crate) fn waits_for_a_former_leader(context: &mut Context<'_>) -> bool {
    let (now, world) = (context.now, &*context.world);
    let starts = matches!(world.running(), Some((_, Word::Standby)))
        && matches!(world.probe.as_ref().map(|probe| &probe.outcome), Some(ProbeOutcome::NotYet(_)));
    let Some((_, writes_since)) = world.leader_writes_since.filter(|_| starts && world.etcd == Etcd::Reachable) else { return false };
    if now.since(writes_since.max(world.postmaster_since)) < Duration::from_secs(STARTS_WITHIN_S) {
        return false;
    }
    let follows = world.in_force.as_ref().and_then(|files| files.upstream.as_ref()).map(|upstream| upstream.member.clone());
    let leads = |member: &MemberName| world.other_leader().is_some_and(|(leader, _)| leader == member);
    let Some(former) = follows.filter(|member| !leads(member)) else { return false };
    source(context).is_some_and(|source| source.member != former)
}

/// Whom to follow is taken away; the next look gives it back.
fn restart_receiver(context: &mut Context<'_>) {
    let Some((generation, spec)) = context.world.spec.clone() else { return };
    if context.start(Operation::Configure { spec, generation, upstream: None, anew: false }) {
        tried(context, "its walreceiver is started again");
    }
}

fn restart_server(context: &mut Context<'_>) -> bool {
    let now = context.now;
    let Some((name, key)) = context.world.other_leader() else { return false };
    let leader = upstream_of(name, key);
    let fresh = context.world.receiving.reached.clone().filter(|(at, _)| now.since(*at) < Duration::from_secs(REACHED_FOR_S));
    match fresh {
        Some((_, Ok(()))) => {
            context.world.clear("leader_unreachable");
            tried(context, "PostgreSQL is started again");
            true
        }
        Some((_, Err(why))) => {
            let message = format!(
                "the leader `{}` does not answer here, so nothing that is done to this member's PostgreSQL helps: {why}",
                leader.member
            );
            context.world.warn("leader_unreachable", message);
            false
        }
        None => {
            context.start(Operation::ReachLeader(leader));
            false
        }
    }
}

fn tried(context: &mut Context<'_>, what: &str) {
    let now = context.now;
    context.world.receiving.progress.tried(now);
    let tries = context.world.receiving.progress.tries();
    context.decide("receives_nothing", format!("nothing is received although the leader writes: {what}"));
    let world = &mut *context.world;
    if tries > SERVER_STARTS_MAX + 1 {
        let message = "nothing is received although the leader writes, and neither a new walreceiver nor new starts of PostgreSQL helped: \
                       PostgreSQL's logs here and on the leader say why";
        world.fail("receives_nothing", message.to_owned());
    } else {
        world.warn("receives_nothing", format!("nothing is received although the leader writes: {what}"));
    }
}

/// Says whom a member with the tag `replicatefrom` follows instead.
pub(crate) fn say(context: &mut Context<'_>, source: Option<&Upstream>) {
    let world = &mut *context.world;
    let wanted = world.declared().and_then(|member| member.tags.replicatefrom.clone());
    match (wanted, source) {
        (Some(wanted), Some(source)) if source.member != wanted => {
            let message = format!(
                "streams from the leader `{}`: `{wanted}` (tag replicatefrom) does not stream itself, or gives nothing",
                source.member
            );
            world.set_info("upstream_away", message);
        }
        _ => world.clear("upstream_away"),
    }
}
