//! Keeps `sync` and synchronous_standby_names what the spec wants them to be, one step of [`policy::synchrony`](crate::policy::synchrony) at
//! a time: under the lock, on a record that nothing can change behind our back, and on what was seen of the server after the last change.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::guard::Word;
use crate::facts::synchrony::{Names, SyncRecord};
use crate::machine::action::{Action, AfterNames, Operation, OperationKind};
use crate::machine::node::Context;
use crate::machine::rules::handover;
use crate::machine::state::StateKind;
use crate::machine::synchrony::{Gate, Known, OfServer};
use crate::machine::world::World;
use crate::mutants::{Mutant, mutant};
use crate::policy::synchrony::goal::{self, Standbys, Wanted};
use crate::policy::synchrony::{self, Goal, InForce, Inputs, Step};
use crate::types::{LockIdentity, Lsn, MemberName};

/// How long after a step the server is asked often: the next one waits for what it shows, and so may commits.
const HURRY: Duration = Duration::from_secs(5);

/// Of a primary.
pub(crate) fn keep(context: &mut Context<'_>, lock: LockIdentity) {
    found_running(context, lock);
    match context.world.names_of_server().map(|server| server.gate) {
        Some(Gate::Closed(since) | Gate::Unknown(since)) => open(context, lock, since),
        Some(Gate::Open) | None => context.world.clear("closed"),
    }
    if let Some(why) = context.world.view.as_ref().and_then(|view| view.unreadable.get("sync").cloned()) {
        let message = format!("the key sync cannot be read, and nothing of it is changed: {why}; delete it to have it written anew");
        context.world.fail("sync_unreadable", message);
    } else {
        context.world.clear("sync_unreadable");
    }
    let Some(wanted) = look(context, lock) else { return };
    say(context, &wanted);
    match next(context, lock, &wanted) {
        None => {}
        Some((_, Step::Done)) => context.world.clear("synchrony_changes"),
        Some((_, Step::Wait(why))) => context.world.set_info("synchrony_changes", why),
        Some((known, Step::Record(record))) => {
            write(context, lock, known, record);
            context.world.synchrony.hurries_until = context.now + HURRY;
        }
        Some((_, Step::Names(names))) => {
            set(context, names);
            context.world.synchrony.hurries_until = context.now + HURRY;
        }
    }
}

/// Of a primary that makes the checkpoint before its stop, a job, during which no names can be set. True = commits wait for standbys that
/// are gone, and another would not have to.
pub(crate) fn is_held_up(context: &mut Context<'_>, lock: LockIdentity) -> bool {
    let Some(wanted) = look(context, lock) else { return false };
    let changes = next(context, lock, &wanted).is_some_and(|(_, step)| matches!(step, Step::Record(_) | Step::Names(_)));
    let (Some(server), Some((_, standbys))) = (context.world.names_of_server(), &context.world.synchrony.standbys) else { return false };
    changes && !server.in_force.is_served_by(standbys)
}

/// The next step. None = it cannot be told, or one is being taken.
fn next(context: &Context<'_>, lock: LockIdentity, wanted: &Wanted) -> Option<(Known, Step)> {
    let world = &*context.world;
    // One change at a time: what is on its way may come to be after the next would have been judged on its not being there.
    if [OperationKind::WriteSync, OperationKind::SetNames].iter().any(|kind| world.in_flight.contains(kind)) {
        return None;
    }
    let (known, server, sql) = (world.sync_of(lock.epoch)?, world.names_of_server()?, world.sql()?);
    // A server that was found running, where nothing is promised, and nobody waits: nothing has to be known of it.
    if wanted.goal == Goal::Async && known.record.is_none() && sql.synchronous_standby_names.is_empty() {
        return Some((known, Step::Done));
    }
    let senders = goal::senders(&sql.replicas);
    let inputs = Inputs {
        me: &world.me.name,
        epoch: lock.epoch,
        record: known.record.as_ref(),
        goal: &wanted.goal,
        in_force: &server.in_force,
        senders: &senders,
    };
    let step = synchrony::step(&inputs);
    Some((known, step))
}

/// A server that this daemon did not start: what it goes by is known as far as `sync` says it.
fn found_running(context: &mut Context<'_>, lock: LockIdentity) {
    let world = &mut *context.world;
    let (Some((start, _)), None, Some(known)) = (world.running(), world.names_of_server(), world.sync_of(lock.epoch)) else { return };
    let anybody = anybody(context);
    let in_force = InForce::unknown(known.record.as_ref(), anybody);
    let gate = if known.record.is_some_and(|record| record.copies > 1) { Gate::Unknown(context.now) } else { Gate::Open };
    context.world.synchrony.server = Some(OfServer { gate, ..OfServer::new(start, in_force, context.now) });
}

/// Whoever may have been named: declared, or connected.
fn anybody(context: &Context<'_>) -> BTreeSet<MemberName> {
    let world = &*context.world;
    let declared = world.spec().into_iter().flat_map(|spec| spec.members.iter().map(|member| member.name.clone()));
    let connected = world.sql().into_iter().flat_map(|sql| goal::senders(&sql.replicas)).map(|sender| sender.member);
    let recorded = world.view.as_ref().and_then(|view| view.sync.as_ref()).into_iter().flat_map(|record| record.members.iter().cloned());
    declared.chain(connected).chain(recorded).filter(|name| *name != world.me.name).collect()
}

/// Takes in what the last probe showed, if it was asked after the last change.
fn look(context: &mut Context<'_>, lock: LockIdentity) -> Option<Wanted> {
    let world = &mut *context.world;
    let spec = world.spec()?.clone();
    let view = world.view.clone()?;
    let begun = world.probe.as_ref()?.begun;
    let sql = world.sql().filter(|sql| !sql.in_recovery)?;
    let (senders, replicas, written) = (goal::senders(&sql.replicas), sql.replicas.clone(), sql.written_by_then);
    let shown = sql.synchronous_standby_names.clone();
    let known = world.sync_of(lock.epoch);
    if known.is_none() && world.synchrony.standbys_of(lock.epoch).is_none() {
        // Those that it names are waited for: who they are has to be known first.
        return None;
    }
    let recorded = known.and_then(|known| known.record);
    let me = world.me.name.clone();
    let set = world.names_of_server().and_then(|server| server.in_force.set()).cloned();
    let named = || recorded.iter().flat_map(|record| record.members.iter()).filter(|name| **name != me).cloned();
    let mut standbys = match world.synchrony.standbys.take() {
        Some((epoch, standbys)) if epoch == lock.epoch => standbys,
        _ => {
            world.synchrony.hurries_until = context.now + HURRY;
            Standbys::named(named(), set.as_ref(), context.now)
        }
    };
    standbys.seen(context.now, &spec, &replicas, written);
    let chosen = set.as_ref().and_then(Names::acks).map(|acks| acks.members.clone());
    let wanted = goal::wanted(&spec, &view, &me, &standbys, chosen.as_ref());
    world.synchrony.standbys = Some((lock.epoch, standbys));
    // A walsender that has heard nothing of its standby yet shows 0 whatever it has read. Others, such as pg_receivewal, may never hear of it.
    let counts = |in_force: &InForce, name: &MemberName| spec.member(name).is_some() || in_force.names(name);
    let all_speak = |server: &OfServer| senders.iter().all(|sender| sender.flush > Lsn(0) || !counts(&server.in_force, &sender.member));
    let is_seen = |server: &&mut OfServer| all_speak(server) && begun >= server.took_at || mutant(Mutant::StaleProbeBelieved);
    if let Some(server) = world.synchrony.server.as_mut().filter(is_seen) {
        if server.in_force.set().is_some_and(|set| set.to_string() != shown) {
            // Somebody else's: what processes go by is not known any more.
            server.in_force.forget();
        }
        server.in_force.seen(&senders, written, &wanted.goal);
    }
    Some(wanted)
}

fn write(context: &mut Context<'_>, lock: LockIdentity, known: Known, record: Option<SyncRecord>) {
    context.start(Operation::WriteSync { epoch: lock.epoch, lock: known.lock, judged_on: known.revision, record });
}

fn set(context: &mut Context<'_>, names: Names) {
    // Commits may wait for it, and a logical slot that is being made waits for the longest transaction.
    if context.world.job() == Some(OperationKind::KeepSlots) && !context.world.backs_off(context.now, OperationKind::SetNames) {
        context.actions.push(Action::CancelJob);
        return;
    }
    let (Some((start, _)), Some(spec)) = (context.world.running(), context.world.spec().cloned()) else { return };
    let may_not_wait = context.world.names_of_server().is_none_or(|server| server.in_force.may_not_wait());
    let in_recovery = context.world.sql().is_some_and(|sql| sql.in_recovery);
    let then = match &names {
        // The checkpointer wakes all who wait when it reads these.
        Names::Nobody => AfterNames::Nothing,
        _ if may_not_wait => AfterNames::Checkpoint,
        Names::Block => AfterNames::Nothing,
        // Nobody waits yet.
        _ if in_recovery => AfterNames::Nothing,
        Names::Any(_) | Names::First(_) => AfterNames::Answers,
    };
    context.start(Operation::SetNames { start, names, spec, then });
}

/// Longest that clients are kept out of a primary that was started again.
const CLOSED_MAX: Duration = Duration::from_secs(30);

/// What was recovered may hold commits that no standby has: clients see them when as many standbys have them as `sync` asks for (SAFETY row 48).
/// A daemon that finds the server running does not know how far it recovered: what it has by now is no less.
fn open(context: &mut Context<'_>, lock: LockIdentity, since: BootTime) {
    let Some(spec) = context.world.spec().cloned() else { return };
    let known = context.world.sync_of(lock.epoch);
    let Some((replicas, written)) = context.world.sql().map(|sql| (sql.replicas.clone(), sql.written_by_then)) else { return };
    let Some(server) = context.world.synchrony.server.as_mut() else { return };
    let recovered = *server.recovered.get_or_insert(written);
    let found = matches!(server.gate, Gate::Unknown(_));
    let enough = known.is_some_and(|known| {
        known.record.is_none_or(|record| {
            let has_it = |name: &&MemberName| goal::flushed_by(&replicas, name, recovered).is_some_and(|flushed| flushed >= recovered);
            record.members.iter().filter(|name| **name != record.leader).filter(has_it).count() + 1 >= record.copies as usize
        })
    });
    let patience_is_over = context.now.since(since) >= CLOSED_MAX;
    if enough || patience_is_over || (found && mutant(Mutant::FoundServerOpened)) {
        let started = context.start(Operation::Open { spec });
        if started && !enough && !found {
            let message = format!("clients are let in although too few standbys have what was recovered up to {recovered}");
            context.decide("opened_unreplicated", message);
        }
        return;
    }
    let are = if found { "may be" } else { "are" };
    let message =
        format!("clients {are} kept out until standbys have what was recovered up to {recovered}, for {} s at most", CLOSED_MAX.as_secs());
    context.world.warn("closed", message);
}

/// Of a standby: it becomes a primary that acknowledges nothing before it is known by whom. While the leader hands over to it, it gets the
/// names that it will be promoted with, if it is seen then that it may have them: so that nothing is read anew while writes stand still.
pub(crate) fn keep_standby(context: &mut Context<'_>) {
    let at_first = context.world.names_at_first();
    let wanted = names_when_handed_to(context.world).filter(|_| at_first == Names::Block).unwrap_or(at_first);
    has_names(context, &wanted);
}

fn names_when_handed_to(world: &World) -> Option<Names> {
    let (_, key) = world.other_leader()?;
    let may_lead = world.declared().is_some_and(|member| !member.nofailover()) && !handover::is_for_another(world);
    let hands_over = key.record.machine_state == StateKind::HandingOver.name();
    let record = world.fresh_view()?.sync.as_ref().filter(|_| hands_over && may_lead)?;
    names_by(world, &synchrony::taken_over(&world.me.name, record.epoch, record))
}

/// What a record asks for, if that is as much as the spec wants at least: with `strict` no commit goes by less.
fn names_by(world: &World, record: &SyncRecord) -> Option<Names> {
    let replication = &world.spec()?.replication;
    let least = if replication.strict { replication.synchronous_node_count } else { 0 };
    record.names().filter(|names| names.acks().is_some_and(|acks| acks.acks >= least))
}

/// True = this standby has these names.
fn has_names(context: &mut Context<'_>, wanted: &Names) -> bool {
    let world = &mut *context.world;
    let Some((start, Word::Standby)) = world.running() else { return false };
    let (Some(begun), Some(shown)) =
        (world.probe.as_ref().map(|probe| probe.begun), world.sql().map(|sql| sql.synchronous_standby_names.clone()))
    else {
        return false;
    };
    if world.names_of_server().is_none() {
        let anybody = BTreeSet::new();
        world.synchrony.server = Some(OfServer::new(start, InForce::unknown(None, anybody), context.now));
    }
    let Some(server) = world.synchrony.server.as_mut() else { return false };
    if begun >= server.took_at && server.in_force.set().is_some_and(|set| set.to_string() != shown) {
        server.in_force.forget();
    }
    if server.in_force.set() == Some(wanted) {
        return true;
    }
    // Where nobody waits for anybody, what a standby has been told makes no difference.
    if *wanted != Names::Nobody || server.in_force.set().is_some() {
        set(context, wanted.clone());
    }
    *wanted == Names::Nobody
}

/// What a promoted server goes by from its first moment. A walsender counts what its standby says to have flushed, also of WAL that this
/// member never had: so nobody is counted before it is seen how far each is. Where nobody can be ahead, commits go on as soon as a standby
/// that `sync` names has found the new primary.
fn names_to_promote_with(context: &Context<'_>, lock: LockIdentity, record: &SyncRecord) -> Names {
    let at_first = context.world.names_at_first();
    let is_known = context.world.nobody_is_ahead(lock.epoch) && at_first == Names::Block;
    names_by(context.world, record).filter(|_| is_known).unwrap_or(at_first)
}

/// Before a promotion: `sync` is ours (I3), and nothing is acknowledged until it is known by whom. True = it may go on.
pub(crate) fn ready_to_promote(context: &mut Context<'_>, lock: LockIdentity) -> bool {
    let Some(known) = context.world.sync_of(lock.epoch) else { return false };
    let Some(record) = &known.record else { return true };
    let taken = synchrony::taken_over(&context.world.me.name, lock.epoch, record);
    let is_ours = record.leader == taken.leader && record.epoch == taken.epoch || mutant(Mutant::RecordNotTakenOver);
    let names = names_to_promote_with(context, lock, &taken);
    if !is_ours {
        write(context, lock, known, Some(taken.clone()));
    }
    is_ours & goes_by(context, &names, &taken)
}

/// True = the server that is to be promoted goes by these names, or nobody is acknowledged anything by it. A standby gets them while the record is
/// written: it acknowledges nothing.
fn goes_by(context: &mut Context<'_>, names: &Names, record: &SyncRecord) -> bool {
    let Some((start, word)) = context.world.running() else { return false };
    if word == Word::Standby {
        // Nothing has to be set to acknowledge nothing: it is not waited for what does not come about.
        let is_refused = context.world.failures(OperationKind::SetNames) > 0 && !context.world.in_flight.contains(&OperationKind::SetNames);
        let at_most = |server: &OfServer| server.in_force.is_at_most(names);
        return is_refused && context.world.names_of_server().is_some_and(at_most) || has_names(context, names);
    }
    // The guard's word may be given already, and the promotion not asked for, or not taken (SAFETY row 52).
    if context.world.names_of_server().is_none() {
        let in_force = InForce::unknown(Some(record), anybody(context));
        context.world.synchrony.server = Some(OfServer::new(start, in_force, context.now));
    }
    let present = context.world.names_of_server().and_then(|server| server.in_force.set());
    if present.is_some_and(|present| *present == Names::Block || present == names) {
        return true;
    }
    set(context, Names::Block);
    false
}

/// While commits wait for standbys, a former leader that still runs must not be told by this one that it has them, once this one has said
/// how far it is: what a leader that gave the lock back acknowledged is known.
fn has_to_be_detached(world: &World) -> bool {
    is_recorded(world) && world.view.as_ref().is_some_and(|view| view.release.is_none())
}

/// `sync` says who has what, readably or not.
pub(crate) fn is_recorded(world: &World) -> bool {
    world.view.as_ref().is_some_and(|view| view.sync_revision.0 != 0)
}

/// Of a candidate: it stops receiving before it says how far it is.
pub(crate) fn detach(context: &mut Context<'_>) {
    if mutant(Mutant::VoteWhileReceiving) {
        return;
    }
    let world = &*context.world;
    let attached = world.in_force.as_ref().is_none_or(|files| files.upstream.is_some());
    let (true, true, Some((generation, spec))) = (attached, has_to_be_detached(world), world.spec.clone()) else { return };
    // Not worth an election that waits.
    if world.job().is_some_and(|job| matches!(job, OperationKind::SetNames | OperationKind::KeepSlots)) {
        context.actions.push(Action::CancelJob);
        return;
    }
    context.start(Operation::Configure { spec, generation, upstream: None, anew: false });
}

/// Nothing more can come, and nothing that is there is left out: a position is what PostgreSQL has gone through, or received.
pub(crate) fn is_last_word(world: &World) -> bool {
    let (true, Some(probe), Some(sql)) = (is_recorded(world), &world.probe, world.sql()) else { return !is_recorded(world) };
    let detached = world.in_force.as_ref().is_some_and(|files| files.upstream.is_none())
        && probe.begun >= world.configured_at
        && sql.walreceiver.is_none()
        && !sql.receives;
    let replayed = world.replayed_by.as_ref() == Some(&sql.startup);
    (detached || !has_to_be_detached(world) || mutant(Mutant::VoteWhileReceiving)) && (replayed || mutant(Mutant::VoteWhileReplaying))
}

/// How many copies a commit has when it is acknowledged, whenever that changes.
fn say(context: &mut Context<'_>, wanted: &Wanted) {
    match &wanted.waits {
        Some(why) => context.world.warn("synchrony_waits", why.clone()),
        None => context.world.clear("synchrony_waits"),
    }
    say_lowered(context, wanted);
    say_version(context, wanted);
    let acks = match &wanted.goal {
        Goal::Acks(acks) => acks.acks,
        Goal::Async => 0,
        Goal::Stay => return context.world.clear("durability_reduced"),
        Goal::Wait(_) => {
            let message = "too few standbys are there for what strict asks for: commits wait until there are enough".to_owned();
            context.world.fail("durability_reduced", message);
            return;
        }
    };
    match wanted.short_of {
        Some(asked) => {
            let message = format!("{acks} of {asked} standbys that are to hold each commit are there: commits wait for {acks}");
            context.world.warn("durability_reduced", message);
        }
        None => context.world.clear("durability_reduced"),
    }
    let before = context.world.synchrony.said.replace(acks);
    if let Some(asked) = wanted.short_of.filter(|_| before != Some(acks)) {
        context.decide("durability_reduced", format!("commits wait for {acks} standbys, the spec asks for {asked}"));
    } else if before.is_some_and(|before| before < acks) {
        context.decide("durability_restored", format!("commits wait for {acks} standbys again"));
    }
}

/// Minor versions from which on a commit waits also in the moment before the checkpointer has read the names after a start (release notes of
/// May 2025); newer major versions have it from the beginning.
const WAITS_FROM_THE_START: [u32; 5] = [130_021, 140_018, 150_013, 160_009, 170_005];

/// A server that may acknowledge a commit too early just after its start.
fn say_version(context: &mut Context<'_>, wanted: &Wanted) {
    let Some(version) = context.world.sql().map(|sql| sql.server_version_num) else { return };
    let since = WAITS_FROM_THE_START.into_iter().find(|since| since / 10_000 == version / 10_000);
    match since.filter(|since| version < *since && wanted.goal != Goal::Async) {
        Some(since) => {
            let message = format!(
                "PostgreSQL {}.{} may acknowledge a commit without a standby in the moment after its start: upgrade to {}.{} or later",
                version / 10_000,
                version % 10_000,
                since / 10_000,
                since % 10_000
            );
            context.world.warn("synchrony_version", message);
        }
        None => context.world.clear("synchrony_version"),
    }
}

/// What waits for nobody although commits are to wait: the spec's own value, or what somebody set for a role or a database.
fn say_lowered(context: &mut Context<'_>, wanted: &Wanted) {
    let world = &mut *context.world;
    let value = world.spec().and_then(|spec| spec.postgres.parameters_of(&world.me.name).get("synchronous_commit").cloned().flatten());
    let by_spec = value.filter(|value| !matches!(value.to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1" | "remote_apply"));
    let by_spec = by_spec.map(|value| format!("everybody (spec.postgres.parameters: {value})"));
    let lowered: Vec<String> = world.sql().map(|sql| sql.lowered.clone()).unwrap_or_default().into_iter().chain(by_spec).collect();
    if lowered.is_empty() || wanted.goal == Goal::Async {
        return world.clear("durability_lowered");
    }
    let message =
        format!("synchronous_commit is below `on` for {}: their commits are acknowledged before a standby has them", lowered.join(", "));
    world.warn("durability_lowered", message);
}
