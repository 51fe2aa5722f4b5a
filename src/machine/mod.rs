//! The core: facts in, actions out. No IO, no clock, no waiting; the same machine runs in the daemon and in tests.
//!
//! [`Machine::handle`] takes in one event, lets the rules that must always win go first, then asks the state's rule what to do.
//! A state asks again for what it needs until the result is seen, so a lost action costs a moment and nothing else.
//!
//! What must always win, before any state is asked: a proof of the lock that has run out counts as no lock (I2), and a PostgreSQL
//! that is out of recovery without a lock is ended (SAFETY row 66).

mod absorb;
pub mod action;
pub mod archiving;
mod bookkeeping;
pub mod copying;
pub mod edges;
pub mod event;
pub mod failsafe;
mod finished;
pub mod hold;
mod maintenance;
mod node;
pub mod reactions;
pub mod receiving;
pub mod requests;
mod rules;
pub mod state;
pub mod synchrony;
#[cfg(test)]
pub(crate) mod tests;
pub mod world;

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::MemberRole;
use crate::facts::guard::Word;
use crate::facts::requests::Ask;
use crate::mutants::{Mutant, mutant};

use self::action::{Action, LeaseOrder, Operation, OperationKind};
use self::event::Event;
use self::node::{Context, Input, Node};
use self::rules::{archiving as archiving_rules, failsafe as without_etcd, publish, rejoining, requests as asked_for, restart};
use self::state::State;
use self::world::{Etcd, Lock, Me, World};

/// How often a server is asked while a role changes.
pub const PROBE_FAST_MS: u64 = 20;
/// How often it is asked otherwise; also the bound within which a promotion by hand is seen.
pub const PROBE_IDLE_MS: u64 = 1_000;
/// Longest time between two looks of the machine at its facts.
pub const TICK_MS: u64 = 1_000;
/// A lease that was asked for and did not come is asked for again after so long.
const LEASE_AGAIN_S: u64 = 5;
/// A lock is given back when PostgreSQL did not come up so often in a row.
const STARTS_MAX: u32 = 3;
/// Least time for which a lock is kept without getting anywhere.
const IDLE_LOCK_S: u64 = 60;
/// Beyond ttl: how long a member key of another run is waited for.
const FOREIGN_KEY_GRACE_S: u64 = 3;
/// Transitions that one event may cause; more would be a circle.
const TRANSITIONS_MAX: usize = 8;

/// One member's decisions.
pub struct Machine {
    machine: statig::blocking::StateMachine<Node>,
    world: World,
}

impl Machine {
    /// A member that knows nothing yet.
    pub fn new(me: Me) -> Self {
        Machine { machine: Node.state_machine(), world: World::new(me) }
    }

    /// A member in a given state, for tests.
    pub fn resume(world: World, state: State) -> Self {
        let mut machine = Node.uninitialized_state_machine();
        *machine.state_mut() = state; // safe only while uninitialised
        Machine { machine: machine.into(), world }
    }

    /// The state.
    pub fn state(&self) -> &State {
        self.machine.state()
    }

    /// What is known.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What this member's PostgreSQL is, as its member key says.
    pub fn role(&self) -> MemberRole {
        publish::role(&self.world)
    }

    /// Patroni's word for its state.
    pub fn patroni_state(&self) -> &'static str {
        publish::patroni_state(&self.world, self.state())
    }

    /// PostgreSQL has been ordered to end: nobody is to be sent here any more.
    pub fn ends_postgres(&self) -> bool {
        let stops = |restart: &requests::Restart| restart.end.is_none() && restart.stage != requests::RestartStage::Checkpoint;
        let restarts = *self.state() == State::Restarting && self.world.requests.restart.as_ref().is_some_and(stops);
        self.state().ends_postgres() || restarts
    }

    /// Takes in what happened and says what to do, in order.
    pub fn handle(&mut self, now: BootTime, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.world.failsafe.started.get_or_insert(now);
        // Before anything else is believed: what the clock says of the lock. This event may have waited for long.
        let ran_out = self.proof_ran_out(now);
        let stop = matches!(event, Event::StopRequested);
        let asked = if let Event::PromiseAsked { id, ask, received } = &event { Some((*id, ask.clone(), *received)) } else { None };
        let lost = self.world.absorb(now, event);
        // The event itself may be a proof that comes too late.
        let came_late = self.proof_ran_out(now);
        let gone = lost.or(ran_out).or(came_late).or_else(|| self.lapse_ended(now));
        self.world.notice_idle_guard(now);
        if let Some(why) = gone {
            self.dispatch(now, &mut actions, Input::LockGone(why));
        }
        if self.unlawful(now) {
            self.dispatch(now, &mut actions, Input::Unlawful);
        }
        if stop {
            self.dispatch(now, &mut actions, Input::Stop);
        }
        // Before the state may run for the lock.
        if let Some((id, ask, received)) = asked {
            let answer = self.promise(now, id, &ask, received);
            actions.push(answer);
        }
        self.world.note_promise(now);
        self.settle(now, &mut actions);
        actions
    }

    /// Lets the rules run until the state stays, then says what others have to know.
    fn settle(&mut self, now: BootTime, actions: &mut Vec<Action>) {
        for _ in 0..TRANSITIONS_MAX {
            let before = self.state().clone();
            self.dispatch(now, actions, Input::Observe);
            // A stop that was asked for in the middle of something is remembered, and acted on when that is over.
            let in_the_middle = matches!(
                self.state(),
                State::Promoting { .. } | State::HandingOver { .. } | State::Restarting | State::Demoting { .. } | State::Stopping
            );
            if self.world.stop_requested && !in_the_middle {
                self.dispatch(now, actions, Input::Stop);
            }
            if self.state().name() == before.name() {
                break;
            }
        }
        let state = self.state().clone();
        let mut context = Context { now, world: &mut self.world, actions };
        publish::standing_conditions(context.world, &state);
        replace_guard(&mut context, &state);
        keep_lease(&mut context, &state);
        forget_lock(&mut context, &state);
        release_orphan(&mut context, &state);
        release_useless(&mut context, &state);
        reaffirm(&mut context, &state);
        without_etcd::keep(&mut context, &state);
        asked_for::settle(&mut context, &state);
        restart::settle(&mut context, &state);
        rejoining::tell_what_was_lost(&mut context);
        rejoining::tell_what_was_completed(&mut context);
        archiving_rules::settle(&mut context, &state);
        publish::publish(&mut context, &state);
        leave_if_name_is_taken(&mut context);
    }

    fn dispatch(&mut self, now: BootTime, actions: &mut Vec<Action>, input: Input) {
        let mut context = Context { now, world: &mut self.world, actions };
        self.machine.handle_with_context(&input, &mut context);
    }

    /// E has passed: what was proved is not proved any more. The lock may still be ours; a later proof says so.
    fn proof_ran_out(&mut self, now: BootTime) -> Option<String> {
        let Lock::Proved { identity, until, .. } = self.world.lock else { return None };
        (now >= until && !mutant(Mutant::ProofNeverRunsOut)).then(|| {
            self.world.unprove(identity);
            "the proof of the lock ran out".to_owned()
        })
    }

    /// Out of recovery with no lock that could allow it, or with the guard in the belief that it is a standby: then nobody would fence it.
    /// A writable one with an unproved lock is the guard's ladder's business.
    fn unlawful(&self, now: BootTime) -> bool {
        let writes = self.world.sql().is_some_and(|sql| !sql.in_recovery);
        let allowed = match (self.state(), self.world.running()) {
            (State::Demoting { .. } | State::Stopping, _) | (_, None) => true,
            // Not adopted yet: the guard knows a lock, and its ladder runs.
            (State::Starting, Some((_, Word::Writable))) if !self.world.lease_asked => {
                self.world.guard.as_ref().is_some_and(|guard| guard.lock.is_some())
            }
            // What a person promoted there is left to that person.
            (State::Paused, Some((_, Word::Standby))) => true,
            (_, Some((_, Word::Writable))) => self.world.lock != Lock::None || self.world.suspends(),
            // The guard's facts may come later than what the promotion that it agreed to led to.
            (state, Some((_, Word::Standby))) => matches!(state, State::Promoting { .. }) && self.world.promotion_asked_lately(now),
        };
        writes && !allowed && !mutant(Mutant::UnlawfulLeftAlone)
    }

    /// Something is scheduled, and it is for this member to carry it out: the wall clock has to be told.
    pub fn waits_for_a_time(&self) -> bool {
        let leads = *self.state() == State::Primary;
        let for_us = |ask: &Ask| ask.at_s().is_some() && ask.of_member().map_or(leads, |on| *on == self.world.me.name);
        self.world.view.as_deref().is_some_and(|view| view.requests.values().any(|key| for_us(&key.record.ask)))
    }

    /// When to call again at the latest.
    pub fn next_look(&self, now: BootTime) -> BootTime {
        let tick = now + Duration::from_millis(if self.hurried(now) { PROBE_FAST_MS } else { TICK_MS });
        let proof = match self.world.lock {
            Lock::Proved { announce_at, .. } if self.world.failsafe.lapsed => Some(announce_at),
            Lock::Proved { until, .. } => Some(until),
            Lock::None | Lock::Unproved(_) => None,
        };
        let ladder = self.world.ladder_due.map(|due| [due.immediate_at, due.kill_at, due.fenced_by]);
        let deadlines = proof.into_iter().chain(ladder.into_iter().flatten()).filter(|at| *at > now);
        deadlines.chain(self.world.next_retry(now)).fold(tick, BootTime::min)
    }

    /// How often PostgreSQL is to be asked.
    pub fn probe_every(&self, now: BootTime) -> Duration {
        // The HTTP API takes a probe for true no longer than loop_wait.
        let loop_wait = self.world.spec().map_or(Duration::from_millis(PROBE_IDLE_MS), |spec| spec.ha.loop_wait);
        let idle = Duration::from_millis(PROBE_IDLE_MS).min(loop_wait / 3);
        // One that ends takes no connection, and how it ended the guard says.
        let ends = self.world.ending().is_some();
        if self.hurried(now) && !ends { Duration::from_millis(PROBE_FAST_MS) } else { idle }
    }

    /// A role is changing, or a server is coming up: what is seen late is an outage that lasts longer.
    fn hurried(&self, now: BootTime) -> bool {
        let coming_up = self.world.running().is_some() && self.world.sql().is_none();
        match self.state() {
            State::Promoting { .. } | State::HandingOver { .. } | State::Restarting | State::Candidate | State::Demoting { .. } => true,
            State::Primary if self.world.hurries(now) => true,
            State::Following | State::Primary | State::Starting => coming_up || publish::positions_matter_now(&self.world),
            State::Undeclared | State::AwaitingLeader | State::Initializing | State::Cloning | State::Rejoining => false,
            State::Paused | State::Stopping => false,
        }
    }
}

/// A lease is asked for again when it is gone. Starting sees to the first one, which may be the guard's.
fn keep_lease(context: &mut Context<'_>, state: &State) {
    let world = &mut *context.world;
    let kept_up = world.lease.or(world.adopting);
    if let (true, Some(lease), Some(_), false) = (world.lease_silent, kept_up, &world.guard, world.guard_gone) {
        world.lease_silent = false;
        world.holding = world.lock.identity();
        context.actions.push(Action::Lease(LeaseOrder::Adopt(lease, world.holding)));
    }
    if let (Lock::Unproved(lock), None, false, Some(_)) = (world.lock, world.holding, world.guard_gone, &world.guard)
        && !world.gives_back(lock)
    {
        world.holding = Some(lock);
        context.actions.push(Action::Lease(LeaseOrder::Hold(lock)));
    }
    let awaited = world.awaits_adoption(context.now);
    let asked = world.lease_asked && context.now.since(world.lease_asked_at) < Duration::from_secs(LEASE_AGAIN_S);
    let wanted = match state {
        State::Undeclared | State::Stopping => false,
        State::Starting => world.lease_asked,
        _ => true,
    };
    if wanted && world.lease.is_none() && !awaited && !asked && world.declared().is_some() {
        world.lease_asked = true;
        world.lease_asked_at = context.now;
        world.adopting = None;
        context.actions.push(Action::Lease(LeaseOrder::Grant));
    }
}

/// Without a guard nothing can be started, and nobody would notice the end of what runs; nor can anything be started beside processes
/// that it was not told of. The states that lead, and those on their way out, see to it themselves; whoever is undeclared lets be what
/// somebody else runs.
fn replace_guard(context: &mut Context<'_>, state: &State) {
    let elsewhere = state.is_leading() || matches!(state, State::Demoting { .. } | State::Stopping);
    // In maintenance mode nothing is ended; at its end a guard is needed, but not at the price of what a person started.
    let left_alone = *state == State::Paused && (!context.world.maintenance_ends() || context.world.unclaimed());
    let absent = context.world.guard.is_none() && *state != State::Starting;
    let unclaimed = context.world.unclaimed() && *state != State::Undeclared;
    if !elsewhere && !left_alone && (context.world.guard_gone || absent || unclaimed) {
        context.start(Operation::FenceByScan);
    }
}

/// The guard is told that the lock is not ours as soon as that is safe.
fn forget_lock(context: &mut Context<'_>, state: &State) {
    // What the guard kept for this daemon has not been taken over yet.
    if *state == State::Starting {
        return;
    }
    let known = context.world.guard.as_ref().and_then(|guard| guard.lock).map(|lock| lock.identity.epoch);
    if let (Some(epoch), Lock::None, true) = (known, context.world.lock, context.world.cannot_write(context.now)) {
        context.actions.push(Action::ForgetLock(epoch));
    }
}

/// A lock on our lease that we do not know as ours: the answer to the race was lost. It is given back, and the race begins again.
fn release_orphan(context: &mut Context<'_>, state: &State) {
    let world = &context.world;
    let leads_nobody = match state {
        State::Undeclared | State::AwaitingLeader | State::Cloning | State::Following | State::Candidate | State::Rejoining => true,
        State::Starting
        | State::Initializing
        | State::Promoting { .. }
        | State::Primary
        | State::HandingOver { .. }
        | State::Restarting => false,
        State::Demoting { .. } | State::Paused | State::Stopping => false,
    };
    let busy = world.in_flight.contains(&OperationKind::Acquire) || world.in_flight.contains(&OperationKind::Release);
    if !leads_nobody || world.lock != Lock::None || busy || !world.cannot_write(context.now) {
        return;
    }
    let (Some(leader), Some(lease)) = (world.fresh_view().and_then(|view| view.leader.clone()), world.lease) else { return };
    let given_back = world.released == Some(leader.epoch);
    if leader.lease == lease.lease && leader.holder == world.me.name.as_str() && !given_back {
        context.start(Operation::Release { epoch: leader.epoch, record: None });
    }
}

/// A release whose answer was lost, or that the run before this one asked for, may still be carried out, and its successor asks nobody: before
/// the lock is used again, its key is written again.
fn reaffirm(context: &mut Context<'_>, state: &State) {
    let world = &context.world;
    let Lock::Proved { identity, .. } = world.lock else { return };
    let used = matches!(state, State::Following | State::Promoting { .. } | State::Primary | State::Paused);
    if used && world.etcd == Etcd::Reachable && world.sure_of != Some(identity.epoch) && !world.gives_back(identity) {
        context.start(Operation::Reaffirm(identity.epoch));
    }
}

/// A lock that this member cannot lead with is given back: its data directory is gone, it has to rejoin, was promoted past the lock's
/// timeline by hand, or just does not get anywhere.
fn release_useless(context: &mut Context<'_>, state: &State) {
    let world = &mut *context.world;
    let idle = *state == State::Following && world.lock != Lock::None && world.etcd == Etcd::Reachable;
    world.idle_lock_since = if idle { world.idle_lock_since.or(Some(context.now)) } else { None };
    let (Some(lock), false) = (world.lock.identity(), world.in_flight.contains(&OperationKind::Release)) else { return };
    if world.released == Some(lock.epoch) && world.cannot_write(context.now) {
        world.let_go(context.actions);
        return;
    }
    let past_it = || world.timeline_of(lock).zip(world.own_timeline()).is_some_and(|(reserved, own)| own > reserved);
    let cannot_start = world.failures(OperationKind::Start) >= STARTS_MAX;
    let patience = world.spec().map_or(Duration::ZERO, |spec| spec.ha.primary_start_timeout).max(Duration::from_secs(IDLE_LOCK_S));
    let useless = match state {
        State::Undeclared | State::AwaitingLeader | State::Cloning | State::Rejoining => true,
        State::Following => past_it() || cannot_start || world.idle_lock_since.is_some_and(|since| context.now.since(since) > patience),
        _ => false,
    };
    if !useless || !world.cannot_write(context.now) {
        return;
    }
    if world.etcd == Etcd::Reachable && context.start(Operation::Release { epoch: lock.epoch, record: None }) {
        context.decide("gives_back", "the lock is given back: this member cannot lead with it");
    }
}

/// A second daemon of this name does not run (SAFETY row 64): another run's key that is still there when its lease would have run
/// out, and 3 s more, is kept up by somebody.
fn leave_if_name_is_taken(context: &mut Context<'_>) {
    let Some((since, key)) = context.world.foreign else { return };
    let untouched = context.world.running().is_none();
    if context.world.etcd == Etcd::Reachable
        && untouched
        && context.world.foreign_seen.since(since) > key.ttl + Duration::from_secs(FOREIGN_KEY_GRACE_S)
        && !context.world.exited
    {
        let name = context.world.me.name.clone();
        context.decide("name_taken", format!("another daemon named `{name}` is alive: this one does not run"));
        context.world.exited = true;
        context.actions.push(Action::Exit(4));
    }
}
