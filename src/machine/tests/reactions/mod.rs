//! The table of reactions against the machine, over the whole product of states and kinds of event: what is seen to happen is named here
//! as the table names it, and the two names have to be the same. Then: from all of these worlds there is a way out once things are well.
//!
//! What an event does is what the machine does beyond what it does when nothing happens at that moment.

mod happenings;
mod healed;
pub(crate) mod worlds;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::guard::{PostmasterFacts, Rung, Word};
use crate::machine::Machine;
use crate::machine::action::{Action, LeaseOrder, Operation, OperationKind, StopMode};
use crate::machine::event::{Event, EventKind};
use crate::machine::reactions::{Reaction, reaction};
use crate::machine::state::{State, StateKind};
use crate::machine::tests::checked::{Checked, transitions};
use crate::machine::tests::fixtures::{T0, guard, running};
use crate::machine::world::{Lock, World};

use self::happenings::happenings;
use self::worlds::{Case, cases};

/// What a watched machine did.
struct Outcome {
    /// The states it went to, in order.
    went: Vec<&'static str>,
    /// Its orders, as far as they are this state's: the member key and the lease itself are seen to in every state alike.
    orders: Vec<String>,
    world: World,
    state: State,
}

fn order(action: &Action) -> Option<String> {
    match action {
        Action::Record(_)
        | Action::Do(Operation::PutMember(_))
        | Action::Lease(LeaseOrder::Grant | LeaseOrder::Failsafe(_))
        | Action::AskGuard
        | Action::AnswerPromise { .. } => None,
        Action::Do(operation) => Some(format!("{:?}", operation.kind())),
        Action::CancelJob => Some("CancelJob".to_owned()),
        Action::Lease(LeaseOrder::Adopt(..)) => Some("Adopt".to_owned()),
        Action::Lease(LeaseOrder::Hold(_)) => Some("Hold".to_owned()),
        Action::Lease(LeaseOrder::LetGo) => Some("LetGo".to_owned()),
        Action::Stop(StopMode::Fast { .. }) => Some("StopFast".to_owned()),
        Action::Stop(StopMode::Kill) => Some("StopKill".to_owned()),
        Action::ForgetLock(_) => Some("ForgetLock".to_owned()),
        Action::Maintain(_) => Some("Maintain".to_owned()),
        Action::Exit(_) => Some("Exit".to_owned()),
        Action::Leave => Some("Leave".to_owned()),
    }
}

fn happens(state: &State, world: &World, now: BootTime, event: Event) -> Outcome {
    let mut checked = Checked::resume(world.clone(), state.clone());
    let actions = checked.handle(now, event);
    let went = transitions(&actions);
    let mut at = state.name().to_owned();
    for (from, to) in &went {
        assert_eq!(*from, at, "a transition from where the machine is not");
        at.clone_from(to);
    }
    assert_eq!(at, checked.state().name(), "a transition that is not recorded");
    let names = went.iter().filter_map(|(_, to)| State::NAMES.into_iter().find(|name| name == to));
    Outcome {
        went: names.collect(),
        orders: actions.iter().filter_map(order).collect(),
        world: checked.world().clone(),
        state: checked.state().clone(),
    }
}

/// One event in one world, beside nothing.
struct Seen {
    told: String,
    nothing: Outcome,
    after: Outcome,
    before: World,
    /// What the event alone changed of what is known.
    absorbed: World,
    /// It takes away what PostgreSQL writes by.
    takes_away: bool,
}

impl Seen {
    /// None where the member does not rest in that state in this world.
    fn new(case: &Case, world: &World, event: &Event) -> Option<Self> {
        let nothing = happens(&case.state, world, T0, Event::Tick);
        if !nothing.went.is_empty() {
            return None;
        }
        let mut absorbed = world.clone();
        let gone = absorbed.absorb(T0, event.clone());
        let may_write = !absorbed.cannot_write(T0);
        let suspends = absorbed.suspends();
        let unlawful = Machine::resume(absorbed.clone(), case.state.clone()).unlawful(T0);
        Some(Seen {
            told: format!("{} ({}) on {event:?}", case.state.name(), case.what),
            nothing,
            after: happens(&case.state, world, T0, event.clone()),
            before: world.clone(),
            absorbed,
            takes_away: unlawful || gone.is_some() && may_write && !suspends,
        })
    }

    fn stays(&self) -> bool {
        self.after.went.is_empty()
    }

    /// A promise is booked as it is given, after what the event says was taken in.
    fn promises(&self) -> bool {
        self.after.world.failsafe.promise != self.before.failsafe.promise
    }

    fn ordered(&self, order: &str) -> bool {
        self.after.orders.iter().any(|given| given == order)
    }

    /// What the table has to call it. A panic is for what no reaction allows.
    fn name(&self) -> Reaction {
        let told_to_stop = self.absorbed.stop_requested && !self.before.stop_requested;
        let loses_guard = self.absorbed.guard_gone && !self.before.guard_gone;
        let has_job = self.before.job().is_some();
        match self.after.went.first() {
            Some(&"demoting") if self.takes_away && (self.ordered("StopKill") || self.ordered("FenceByScan")) => Reaction::Wins,
            None if self.takes_away && (self.ordered("StopKill") || self.before.ending() == Some(Rung::KillAll)) => Reaction::UnderWay,
            _ if self.takes_away => panic!("PostgreSQL is not ended at once: {self}"),
            Some(&"demoting") if loses_guard && self.ordered("FenceByScan") => Reaction::Demotes,
            None | Some(&"following") if loses_guard && self.ordered("FenceByScan") => Reaction::Scans,
            // A person works there.
            _ if loses_guard && self.after.state != State::Paused => panic!("nobody ends PostgreSQL by scan: {self}"),
            Some(&"stopping") if told_to_stop && (!has_job || self.ordered("CancelJob")) => Reaction::Leaves,
            None if told_to_stop && self.ordered("Leave") => Reaction::Departs,
            Some(&"handing_over") if told_to_stop => Reaction::HandsOver,
            _ if told_to_stop && self.after.world.stop_requested && self.after.state != State::Stopping => Reaction::Deferred,
            _ if told_to_stop => panic!("the stop is forgotten: {self}"),
            _ if !self.stays() || self.after.orders != self.nothing.orders => Reaction::TakenIn,
            _ if self.promises() => Reaction::Noted,
            _ if format!("{:?}", self.absorbed) != format!("{:?}", self.before) => Reaction::Noted,
            _ => Reaction::NothingNew,
        }
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { went, orders, .. } = &self.after;
        write!(f, "{}: goes {went:?}, orders {orders:?} (otherwise {:?})", self.told, self.nothing.orders)
    }
}

/// All that was seen, by pair.
fn product() -> BTreeMap<(StateKind, EventKind), Vec<Seen>> {
    let mut product: BTreeMap<_, Vec<Seen>> = BTreeMap::new();
    for state in StateKind::ALL {
        for case in cases(*state) {
            assert_eq!(StateKind::from(&case.state), *state, "{} is misplaced", case.what);
            for (world, event) in happenings(&case.world) {
                if let Some(seen) = Seen::new(&case, &world, &event) {
                    product.entry((*state, event.kind())).or_default().push(seen);
                }
            }
        }
    }
    product
}

#[test]
fn a_member_rests_in_every_world_that_events_are_tried_in() {
    for case in StateKind::ALL.iter().flat_map(|state| cases(*state)) {
        let nothing = happens(&case.state, &case.world, T0, Event::Tick);
        assert!(nothing.went.is_empty(), "{} ({}) goes to {:?} by itself", case.state.name(), case.what, nothing.went);
    }
}

#[test]
fn every_state_reacts_to_every_kind_of_event_as_the_table_says() {
    let product = product();
    let mut wrong = Vec::new();
    for state in StateKind::ALL {
        for event in EventKind::ALL {
            let named = reaction(*state, *event);
            let seen = product.get(&(*state, *event)).map_or(&[][..], Vec::as_slice);
            match seen.iter().max_by_key(|seen| seen.name()) {
                None => wrong.push(format!("{state:?} x {event:?}: no event of that kind was tried")),
                Some(most) if most.name() != named => {
                    wrong.push(format!(
                        "{state:?} x {event:?} is {named:?} in the table, and {:?} was seen, as in\n      {most:.600}",
                        most.name()
                    ));
                }
                Some(_) => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{} pairs:\n  {}", wrong.len(), wrong.join("\n  "));
}

#[test]
fn what_must_always_win_wins_every_time_and_not_only_once() {
    for ((state, event), seen) in product() {
        for seen in seen.iter().filter(|seen| seen.takes_away) {
            assert!(matches!(seen.name(), Reaction::Wins | Reaction::UnderWay), "{state:?} x {event:?}: {seen}");
            assert_eq!(seen.name(), reaction(state, event), "{seen}");
        }
    }
}

#[test]
fn every_event_that_comes_when_the_proof_ran_out_finds_the_leadership_ended() {
    let mut tried = 0;
    for case in StateKind::ALL.iter().flat_map(|state| cases(*state)) {
        let Lock::Proved { until, .. } = case.world.lock else { continue };
        for (world, event) in happenings(&case.world) {
            let mut absorbed = world.clone();
            absorbed.absorb(until, event.clone());
            let writes = !absorbed.cannot_write(until);
            let after = happens(&case.state, &world, until, event.clone());
            let ended = matches!(after.state, State::Demoting { .. } | State::Stopping);
            assert!(!writes || ended || after.world.suspends(), "{} ({}) goes {:?} on {event:?}", case.state.name(), case.what, after.went);
            assert!(!after.state.is_leading() || after.world.lock != Lock::None, "{} leads without a lock", case.what);
            tried += usize::from(writes);
        }
    }
    assert!(tried > 500, "only {tried} were tried");
}

#[test]
fn processes_that_no_guard_was_told_of_are_ended_by_scan_unless_the_member_is_undeclared_or_in_maintenance_mode() {
    for case in StateKind::ALL.iter().flat_map(|state| cases(*state)) {
        for (world, event) in happenings(&case.world) {
            let Event::Guard(facts) = &event else { continue };
            if let PostmasterFacts::Unclaimed { .. } = facts.postmaster {
                let after = happens(&case.state, &world, T0, event.clone());
                let scans = after.world.in_flight.contains(&OperationKind::FenceByScan);
                let left_alone = [State::Undeclared, State::Paused].contains(&case.state);
                assert_eq!(scans, !left_alone, "{} ({})", case.state.name(), case.what);
            }
        }
    }
}

#[test]
fn a_server_that_may_write_where_a_member_does_not_lead_is_ended() {
    use StateKind::{AwaitingLeader, Candidate, Cloning, Following, Initializing, Rejoining};
    for case in [AwaitingLeader, Initializing, Cloning, Following, Candidate, Rejoining].into_iter().flat_map(cases) {
        let facts = guard(9, running(9, Word::Writable));
        let after = happens(&case.state, &case.world, T0, Event::Guard(facts));
        assert!(matches!(after.state, State::Demoting { .. }), "{} ({}) goes {:?}", case.state.name(), case.what, after.went);
        assert!(after.orders.contains(&"StopKill".to_owned()), "{} ({})", case.state.name(), case.what);
    }
}

#[test]
fn a_member_that_was_removed_from_the_spec_gives_up_its_claim_to_initialize() {
    let case = cases(StateKind::Initializing).swap_remove(0);
    let after = happens(&case.state, &case.world, T0, Event::SpecRead(2, worlds::without_us()));
    assert_eq!(after.state, State::Undeclared);
    assert_eq!(after.orders, ["GiveUpInitialize"]);
}

#[test]
fn nothing_is_made_in_a_data_directory_without_the_guards_proof() {
    for state in [StateKind::Initializing, StateKind::Cloning] {
        for mut case in cases(state) {
            case.world.guard_gone = true;
            let after = happens(&case.state, &case.world, T0 + Duration::from_secs(20), Event::Tick);
            assert!(!after.orders.iter().any(|order| ["Initdb", "Clone"].contains(&order.as_str())), "{}: {:?}", case.what, after.orders);
        }
    }
}
