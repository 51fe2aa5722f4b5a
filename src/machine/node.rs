//! The hierarchy of states, for statig: which rule a state has, and what its superstates add.
//!
//! ```text
//! Starting   Undeclared
//! Bootstrapping   AwaitingLeader | Initializing | Cloning
//! Running
//!   Standby       Following | Candidate | Rejoining
//!   Leading       Promoting | Primary | HandingOver | Restarting
//!   Demoting   Paused
//! Stopping
//! ```
//! Facts are taken in before dispatch, so a state sees one kind of input, "look again", and three that must always win: the lock is
//! gone, PostgreSQL is writable without a lock, the daemon is to stop. Leaves never handle those three; a test walks all leaves.

use statig::prelude::*;

use crate::clock::BootTime;

use super::action::{Action, Decision, Operation, StopMode};
use super::edges;
use super::rules::{bootstrap, demoting, handover, paused, primary, promoting, rejoining, restart, standby, starting};
use super::state::{Demotion, HandOver, Promotion, State, Then};
use super::world::World;

/// What a state is dispatched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// The facts may have changed, or time went by.
    Observe,
    /// The lock was ours and is not any more, or its proof ran out.
    LockGone(String),
    /// PostgreSQL is out of recovery and no lock allows it.
    Unlawful,
    /// The daemon is to stop.
    Stop,
}

/// Lent to the rules for one dispatch.
pub(crate) struct Context<'a> {
    pub now: BootTime,
    pub world: &'a mut World,
    pub actions: &'a mut Vec<Action>,
}

impl Context<'_> {
    /// Starts an operation unless it, or another job, is under way or backing off. True if it was started.
    pub fn start(&mut self, operation: Operation) -> bool {
        let kind = operation.kind();
        let may = self.world.may_start(self.now, kind);
        if may {
            self.world.in_flight.insert(kind);
            self.world.note_asked(&operation);
            self.actions.push(Action::Do(operation));
        }
        may
    }

    /// Orders the end of PostgreSQL; asked again until it is seen, at most once a second for one postmaster and mode.
    pub fn stop(&mut self, mode: StopMode) {
        if self.world.may_ask_stop(self.now, mode) {
            self.actions.push(Action::Stop(mode));
        }
    }

    /// Records a decision.
    pub fn decide(&mut self, kind: &'static str, message: impl Into<String>) {
        self.actions.push(Action::Record(Decision { kind, message: message.into(), facts: self.world.decision_facts() }));
    }
}

/// statig's shared storage: the machine's memory is in [`World`], lent through the context.
pub(crate) struct Node;

#[state_machine(
    initial = "State::Starting",
    state(name = "State", custom),
    superstate(name = "Superstate", derive(Debug)),
    after_transition = "Self::after_transition",
    visibility = "pub(crate)"
)]
impl Node {
    #[superstate]
    fn bootstrapping(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        anywhere(context, event)
    }

    #[superstate]
    fn running(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        anywhere(context, event)
    }

    #[superstate(superstate = "running")]
    fn standby() -> Outcome<State> {
        Super
    }

    #[superstate(superstate = "running")]
    fn leading(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::LockGone(_) if context.world.cannot_write(context.now) => Transition(after_leading(context)),
            Input::Observe | Input::LockGone(_) | Input::Unlawful | Input::Stop => Super,
        }
    }

    #[state]
    fn starting(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => unless_maintained(context, starting::rule),
            Input::LockGone(_) | Input::Unlawful | Input::Stop => anywhere(context, event),
        }
    }

    #[state]
    fn undeclared(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => starting::undeclared(context),
            Input::LockGone(_) | Input::Unlawful | Input::Stop => anywhere(context, event),
        }
    }

    #[state(superstate = "bootstrapping")]
    fn awaiting_leader(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, |context| unless_maintained(context, bootstrap::awaiting_leader))
    }

    #[state(superstate = "bootstrapping")]
    fn initializing(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, bootstrap::initializing)
    }

    #[state(superstate = "bootstrapping")]
    fn cloning(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, bootstrap::cloning)
    }

    #[state(superstate = "standby")]
    fn following(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, |context| unless_maintained_or_down(context, standby::following))
    }

    #[state(superstate = "standby")]
    fn candidate(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, |context| unless_maintained(context, standby::candidate))
    }

    #[state(superstate = "standby")]
    fn rejoining(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        observe(context, event, |context| unless_maintained_or_down(context, rejoining::rule))
    }

    #[state(superstate = "leading")]
    fn promoting(promotion: &mut Promotion, context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => promoting::rule(promotion, context),
            Input::Stop => Handled, // stays until it is primary or has failed; then it hands over in good order
            Input::LockGone(_) | Input::Unlawful => Super,
        }
    }

    #[state(superstate = "leading")]
    fn primary(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => unless_maintained(context, primary::rule),
            // In maintenance mode the daemon leaves, and nothing is handed over.
            Input::Stop if context.world.is_maintained() => Transition(State::Paused),
            Input::Stop => primary::hand_over(context, None, None),
            Input::LockGone(_) | Input::Unlawful => Super,
        }
    }

    #[state(superstate = "leading")]
    fn handing_over(hand_over: &mut HandOver, context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => handover::rule(hand_over, context),
            Input::Stop => Handled, // it is on its way already
            Input::LockGone(_) => {
                handover::lock_is_gone(hand_over, context);
                Super
            }
            Input::Unlawful => Super,
        }
    }

    #[state(superstate = "leading")]
    fn restarting(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => restart::rule(context),
            Input::Stop => Handled, // the rule has seen that the daemon is to stop, and hands over
            Input::LockGone(_) | Input::Unlawful => Super,
        }
    }

    #[state(superstate = "running")]
    fn demoting(demotion: &mut Demotion, context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe | Input::Stop => demoting::rule(demotion, context),
            Input::LockGone(_) | Input::Unlawful => demoting::rule(demotion, context),
        }
    }

    #[state(superstate = "running")]
    fn paused(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
        match event {
            Input::Observe => paused::rule(context),
            // That is what maintenance mode is about; without the guard's word the ladder runs, as ever.
            Input::LockGone(_) if context.world.suspends() => Handled,
            // The daemon leaves, and whatever runs goes on.
            Input::Stop => paused::leave(context),
            Input::LockGone(_) | Input::Unlawful => Super,
        }
    }

    #[state]
    fn stopping(context: &mut Context<'_>) -> Outcome<State> {
        demoting::stopping(context)
    }
}

fn observe(context: &mut Context<'_>, event: &Input, rule: fn(&mut Context<'_>) -> Outcome<State>) -> Outcome<State> {
    match event {
        Input::Observe => rule(context),
        Input::LockGone(_) | Input::Unlawful | Input::Stop => Super,
    }
}

/// In maintenance mode a state does nothing more; what is in the middle of something comes to its end first, and does not ask.
fn unless_maintained(context: &mut Context<'_>, rule: fn(&mut Context<'_>) -> Outcome<State>) -> Outcome<State> {
    let guarded = context.world.guard.is_some() || context.world.guard_gone;
    if context.world.is_maintained() && guarded { Transition(State::Paused) } else { rule(context) }
}

/// As [`unless_maintained`]: a standby that its own restart has taken down runs again first.
fn unless_maintained_or_down(context: &mut Context<'_>, rule: fn(&mut Context<'_>) -> Outcome<State>) -> Outcome<State> {
    if restart::is_in_the_middle(context) { rule(context) } else { unless_maintained(context, rule) }
}

/// What every state does with the three inputs that must always win.
fn anywhere(context: &mut Context<'_>, event: &Input) -> Outcome<State> {
    match event {
        Input::Observe => Handled,
        // A standby under its guard's word, or nothing at all, cannot write: it stays as it is.
        Input::LockGone(_) if context.world.cannot_write(context.now) => Handled,
        Input::LockGone(why) => {
            // A proof that ran out is not the end of the lock: it may be proved again once PostgreSQL has ended.
            let then = context.world.lock.identity().map_or(Then::Follow, Then::StartAgain);
            Transition(State::Demoting { demotion: Demotion { why: why.clone(), then } })
        }
        Input::Unlawful => {
            let why = "PostgreSQL is out of recovery, and neither lock nor guard allow it".to_owned();
            let then = context.world.lock.identity().map_or(Then::Follow, Then::Release);
            Transition(State::Demoting { demotion: Demotion { why, then } })
        }
        Input::Stop => {
            if context.world.job().is_some() {
                context.actions.push(Action::CancelJob);
            }
            Transition(State::Stopping)
        }
    }
}

/// Where a member goes when its leadership ended in good order.
pub(crate) fn after_leading(context: &Context<'_>) -> State {
    if context.world.stop_requested { State::Stopping } else { State::Following }
}

impl Node {
    fn after_transition(&mut self, from: &State, to: &State, context: &mut Context<'_>) {
        // What one state waits for is not true of the next.
        for waiting in ["waiting_to_initialize", "waiting_to_lead", "rejoin_waits"] {
            context.world.clear(waiting);
        }
        let mut message = edges::reason(from, to).to_owned();
        if let State::Demoting { demotion } = to {
            message = format!("{message}: {}", demotion.why);
        }
        let mut facts = context.world.decision_facts();
        if let Some(edge) = edges::find(from.name(), to.name()) {
            facts.insert("edge".to_owned(), edge.number.to_string());
        }
        facts.insert("from".to_owned(), from.name().to_owned());
        facts.insert("to".to_owned(), to.name().to_owned());
        context.actions.push(Action::Record(Decision { kind: "transition", message, facts }));
    }
}
