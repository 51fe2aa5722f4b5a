//! The core: facts in, actions out. No IO, no clock, no waiting; the same machine runs in the daemon and in tests.
//!
//! [`Machine::handle`] takes in one event, lets the rules that must always win go first, then asks the state's rule what to do.
//! A state asks again for what it needs until the result is seen, so a lost action costs a moment and nothing else.
//!
//! What must always win, before any state is asked: a proof of the lock that has run out counts as no lock (I2), and a PostgreSQL
//! that is out of recovery without a lock is ended (SAFETY row 66).

pub mod action;
pub mod edges;
pub mod event;
mod node;
mod rules;
pub mod state;
pub mod world;

use std::time::Duration;

use statig::prelude::*;

use crate::clock::BootTime;
use crate::facts::cluster::MemberRole;

use self::action::{Action, LeaseOrder, Operation, OperationKind};
use self::event::Event;
use self::node::{Context, Input, Node};
use self::rules::{publish, requests};
use self::state::State;
use self::world::{Etcd, Lock, Me, World};

/// How often a server is asked while a role changes.
pub const PROBE_FAST_MS: u64 = 20;
/// How often it is asked otherwise; also the bound within which a promotion by hand is seen.
pub const PROBE_IDLE_MS: u64 = 1_000;
/// Longest time between two looks of the machine at its facts.
pub const TICK_MS: u64 = 1_000;
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

    /// Takes in what happened and says what to do, in order.
    pub fn handle(&mut self, now: BootTime, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        // Before anything else is believed: what the clock says of the lock. This event may have waited for long.
        let ran_out = self.proof_ran_out(now);
        let stop = matches!(event, Event::StopRequested);
        let gone = self.world.absorb(now, event).or(ran_out).or_else(|| self.proof_ran_out(now));
        if let Some(why) = gone {
            self.dispatch(now, &mut actions, Input::LockGone(why));
        }
        if self.unlawful() {
            self.dispatch(now, &mut actions, Input::Unlawful);
        }
        if stop {
            self.dispatch(now, &mut actions, Input::Stop);
        }
        self.settle(now, &mut actions);
        actions
    }

    /// Lets the rules run until the state stays, then says what others have to know.
    fn settle(&mut self, now: BootTime, actions: &mut Vec<Action>) {
        for _ in 0..TRANSITIONS_MAX {
            let before = self.state().clone();
            self.dispatch(now, actions, Input::Observe);
            // A stop that was asked for in the middle of a promotion is remembered, and acted on when there is a primary.
            if self.world.stop_requested && matches!(self.state(), State::Primary | State::Following | State::Candidate) {
                self.dispatch(now, actions, Input::Stop);
            }
            if self.state().name() == before.name() {
                break;
            }
        }
        let state = self.state().clone();
        let mut context = Context { now, world: &mut self.world, actions };
        publish::standing_conditions(context.world);
        keep_lease(&mut context, &state);
        forget_lock(&mut context);
        release_orphan(&mut context, &state);
        requests::settle(&mut context, &state);
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
        (now >= until).then(|| {
            self.world.lock = Lock::Unproved(identity);
            "the proof of the lock ran out".to_owned()
        })
    }

    /// Out of recovery with no lock that could allow it. With an unproved lock the guard's ladder decides.
    fn unlawful(&self) -> bool {
        let writable = self.world.sql().is_some_and(|sql| !sql.in_recovery);
        writable && self.world.lock == Lock::None && !matches!(self.state(), State::Demoting { .. } | State::Stopping)
    }

    /// When to call again at the latest.
    pub fn next_look(&self, now: BootTime) -> BootTime {
        let tick = now + Duration::from_millis(if self.hurried() { PROBE_FAST_MS } else { TICK_MS });
        let proof = match self.world.lock {
            Lock::Proved { until, .. } => Some(until),
            Lock::None | Lock::Unproved(_) => None,
        };
        [self.world.next_retry(now), proof.filter(|at| *at > now)].into_iter().flatten().fold(tick, BootTime::min)
    }

    /// How often PostgreSQL is to be asked.
    pub fn probe_every(&self) -> Duration {
        Duration::from_millis(if self.hurried() { PROBE_FAST_MS } else { PROBE_IDLE_MS })
    }

    /// A role is changing, or a server is coming up: what is seen late is an outage that lasts longer.
    fn hurried(&self) -> bool {
        let coming_up = self.world.running().is_some() && self.world.sql().is_none();
        match self.state() {
            State::Promoting { .. } | State::HandingOver { .. } | State::Candidate | State::Demoting { .. } => true,
            State::Following | State::Primary | State::Starting => coming_up || publish::positions_matter_now(&self.world),
            State::Undeclared | State::AwaitingLeader | State::Initializing | State::Cloning | State::Rejoining | State::Stopping => false,
        }
    }
}

/// A lease is asked for again when it is gone. Starting sees to the first one, which may be the guard's.
fn keep_lease(context: &mut Context<'_>, state: &State) {
    let wanted = !matches!(state, State::Starting | State::Undeclared | State::Stopping) || (context.world.foreign.is_some());
    if wanted && context.world.lease.is_none() && !context.world.lease_asked && context.world.declared().is_some() {
        context.world.lease_asked = true;
        context.actions.push(Action::Lease(LeaseOrder::Grant));
    }
}

/// The guard is told that the lock is not ours as soon as that is safe.
fn forget_lock(context: &mut Context<'_>) {
    let known = context.world.guard.as_ref().and_then(|guard| guard.lock).map(|lock| lock.identity.epoch);
    let harmless = context.world.proved_empty() || matches!(context.world.running(), Some((_, crate::facts::guard::Word::Standby)));
    if let (Some(epoch), Lock::None, true) = (known, context.world.lock, harmless) {
        context.actions.push(Action::ForgetLock(epoch));
    }
}

/// A lock on our lease that we do not know as ours: the answer to the race was lost. It is given back, and the race begins again.
fn release_orphan(context: &mut Context<'_>, state: &State) {
    let world = &context.world;
    let standby = matches!(state, State::Following | State::Candidate) && world.lock == Lock::None;
    if !standby || world.in_flight.contains(&OperationKind::Acquire) || world.in_flight.contains(&OperationKind::Release) {
        return;
    }
    let (Some(leader), Some(lease)) = (world.fresh_view().and_then(|view| view.leader.clone()), world.lease) else { return };
    if leader.lease == lease.lease && leader.holder == world.me.name.as_str() {
        context.start(Operation::Release { epoch: leader.epoch, record: None });
    }
}

/// A second daemon of this name does not run (SAFETY row 64): another run's key that is still there after ttl + 3 s is alive.
fn leave_if_name_is_taken(context: &mut Context<'_>) {
    let Some((since, _)) = &context.world.foreign else { return };
    let ttl = context.world.spec().map_or(Duration::from_secs(30), |spec| spec.ha.ttl);
    let untouched = context.world.running().is_none();
    if context.world.etcd == Etcd::Reachable
        && untouched
        && context.now.since(*since) > ttl + Duration::from_secs(FOREIGN_KEY_GRACE_S)
        && !context.world.exited
    {
        let name = context.world.me.name.clone();
        context.decide("name_taken", format!("another daemon named `{name}` is alive: this one does not run"));
        context.world.exited = true;
        context.actions.push(Action::Exit(4));
    }
}
