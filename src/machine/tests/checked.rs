//! A machine that is watched: whatever it is told, what it orders has to keep the claims. Every test of this module goes through here.

use std::collections::BTreeSet;

use crate::clock::BootTime;
use crate::facts::cluster::{DataDirectoryReport, Initialize};
use crate::facts::guard::Word;
use crate::facts::postgres::DataDirectory;
use crate::machine::Machine;
use crate::machine::action::{Action, LeaseOrder, Old, Operation, OperationKind, StartAs};
use crate::machine::edges;
use crate::machine::event::{AcquireOutcome, Event, Finished};
use crate::machine::state::State;
use crate::machine::world::{Lock, Me, World};
use crate::types::Epoch;

/// More orders at once than any event can need.
pub(crate) const ACTIONS_PER_EVENT_MAX: usize = 16;

/// The machine, and what it has under way as the outside sees it.
pub(crate) struct Checked {
    pub(crate) machine: Machine,
    under_way: BTreeSet<OperationKind>,
    releases: Releases,
    exited: bool,
}

/// What may be on its way to etcd, told from orders and answers alone.
#[derive(Debug, Default)]
struct Releases {
    /// No release of this leadership can be.
    sure_of: Option<Epoch>,
    /// Nor of this one, which was taken over with a server that may write.
    found_writing: Option<Epoch>,
    /// Its key is being written again, and no release was ordered since.
    reaffirming: Option<Epoch>,
}

impl Releases {
    fn answered(&mut self, finished: &Finished) {
        match finished {
            Finished::Acquired(AcquireOutcome::Won(lock)) => self.sure_of = Some(lock.epoch),
            Finished::Reaffirmed(result) => {
                let epoch = self.reaffirming.take();
                self.sure_of = if matches!(result, Ok(Some(_))) { epoch.or(self.sure_of) } else { self.sure_of };
            }
            _ => {}
        }
    }

    fn ordered(&mut self, operation: &Operation) {
        match operation {
            Operation::Reaffirm(epoch) => self.reaffirming = Some(*epoch),
            Operation::Release { epoch, .. } => {
                let others = |known: Option<Epoch>| known.filter(|known| known != epoch);
                *self = Releases {
                    sure_of: others(self.sure_of),
                    found_writing: others(self.found_writing),
                    reaffirming: others(self.reaffirming),
                };
            }
            _ => {}
        }
    }
}

impl Checked {
    pub(crate) fn new(me: Me) -> Self {
        Checked { machine: Machine::new(me), under_way: BTreeSet::new(), releases: Releases::default(), exited: false }
    }

    pub(crate) fn resume(world: World, state: State) -> Self {
        let under_way = world.in_flight.clone();
        let releases = Releases { sure_of: world.sure_of, found_writing: world.found_writing, reaffirming: world.asked.reaffirming };
        Checked { machine: Machine::resume(world, state), under_way, releases, exited: false }
    }

    pub(crate) fn world(&self) -> &World {
        self.machine.world()
    }

    pub(crate) fn state(&self) -> &State {
        self.machine.state()
    }

    /// [`Machine::handle`], judged.
    pub(crate) fn handle(&mut self, now: BootTime, event: Event) -> Vec<Action> {
        if let Event::Finished(finished) = &event {
            finished.kind().map(|kind| self.under_way.remove(&kind));
            self.releases.answered(finished);
        }
        let said = format!("{event:?}");
        let before = self.state().clone();
        let actions = self.machine.handle(now, event);
        let ordered = format!("{actions:?}");
        let context = format!("at {now:?} in {} on {said:.300}: {ordered:.2000}", before.name());
        assert!(actions.len() <= ACTIONS_PER_EVENT_MAX, "{} actions {context}", actions.len());
        assert!(!self.exited || actions.iter().all(|action| !matches!(action, Action::Do(_))), "after the order to leave, {context}");
        for (from, to) in transitions(&actions) {
            assert!(edges::find(&from, &to).is_some(), "no edge {from} -> {to}, {context}");
        }
        for action in &actions {
            self.judge(now, &before, action, &context);
        }
        actions
    }

    fn judge(&mut self, now: BootTime, before: &State, action: &Action, context: &str) {
        let world = self.machine.world();
        match action {
            Action::Do(operation) => {
                let kind = operation.kind();
                assert!(!self.under_way.contains(&kind), "{kind:?} twice at a time, {context}");
                let job = self.under_way.iter().find(|under_way| under_way.is_job());
                assert!(!kind.is_job() || job.is_none(), "{kind:?} while {job:?} is under way, {context}");
                judge_operation(world, &self.releases, now, operation, context);
                self.releases.ordered(operation);
                self.under_way.insert(kind);
            }
            Action::Lease(LeaseOrder::Hold(lock)) => {
                assert_eq!(world.lock.identity(), Some(*lock), "holds a lock that is not ours, {context}");
            }
            Action::ForgetLock(_) => {
                let standby = matches!(world.running(), Some((_, Word::Standby)));
                assert!(world.lock == Lock::None && (world.proved_empty() || standby), "forgets a lock that PostgreSQL needs, {context}");
            }
            Action::Exit(_) => {
                let dead = world.proved_empty() || world.guard.is_none();
                assert!(dead, "leaves while PostgreSQL may be alive, {context}");
                self.exited = true;
            }
            Action::Maintain(word) => {
                let view = world.view.as_deref().expect("a word on maintenance mode that nobody read");
                let noted = world.asked.suspended == Some(word.revision) && view.maintenance_revision == word.revision;
                assert!(!word.suspends || noted, "I2: suspends without a note of it in etcd, {context}");
                let fenced = word.suspends || !world.suspends() || proved_now(world, now) || world.cannot_write(now);
                assert!(fenced || view.maintenance.is_none() || view.leader.is_some(), "P2: ends a primary that could go on, {context}");
            }
            Action::AskGuard => {}
            Action::Leave => {
                assert_eq!(*before, State::Paused, "leaves PostgreSQL behind, {context}");
                self.exited = true;
            }
            Action::AnswerPromise { result: Ok(()), .. } => {
                let idle = world.lock == Lock::None && !world.in_flight.contains(&OperationKind::Acquire);
                assert!(idle && world.cannot_write(now), "I1: promises not to lead while it does or may, {context}");
                assert!(world.failsafe.promise.is_some(), "a promise that is not booked, {context}");
            }
            Action::Lease(LeaseOrder::Adopt(lease, Some(lock))) => {
                assert_eq!(lock.lease, *lease, "I2: a lock on one lease is kept up by another, {context}");
                if *before == State::Starting && matches!(world.running(), Some((_, Word::Writable))) {
                    self.releases.found_writing = Some(lock.epoch);
                }
            }
            Action::Lease(_) => {}
            Action::AnswerPromise { result: Err(_), .. } | Action::CancelJob | Action::Stop(_) | Action::Record(_) => {}
        }
    }
}

fn proved_now(world: &World, now: BootTime) -> bool {
    world.lock.is_proved_at(now)
}

/// The claims on single operations: I2, I3, I10, I11.
fn judge_operation(world: &World, releases: &Releases, now: BootTime, operation: &Operation, context: &str) {
    let proved = |identity: Option<crate::types::LockIdentity>| match world.lock {
        Lock::Proved { identity: proved, until, announce_at } => {
            announce_at <= until && now < announce_at && identity.is_none_or(|identity| identity == proved)
        }
        Lock::None | Lock::Unproved(_) => false,
    };
    match operation {
        Operation::Promote { lock, timeline, .. } => {
            assert!(proved(Some(*lock)), "I3: promotes without a proof, {context}");
            assert_eq!(world.timeline_of(*lock), Some(*timeline), "I9: promotes onto another id than was reserved, {context}");
            assert_eq!(releases.sure_of, Some(lock.epoch), "I1: promotes although a release may be on its way, {context}");
        }
        Operation::Start { role: StartAs::Primary, .. } => {
            assert!(proved(None), "I2: starts a primary without a proof, {context}");
            let held = world.lock.identity().map(|lock| lock.epoch);
            let sure = [releases.sure_of, releases.found_writing].contains(&held);
            assert!(sure, "I1: starts a primary although a release may be on its way, {context}");
            assert!(world.proved_empty(), "starts a second server, {context}");
        }
        Operation::Start { .. }
        | Operation::Clone { .. }
        | Operation::EmptyDirectory { .. }
        | Operation::Rewind { .. }
        | Operation::PlanRejoin { .. }
        | Operation::ArchiveLeft { .. }
        | Operation::Initdb { .. } => {
            assert!(world.proved_empty(), "I10: works on the data directory of a live server, {context}");
        }
        Operation::Release { record, .. } => {
            let standby = record.is_none() && matches!(world.running(), Some((_, Word::Standby)));
            assert!(world.nothing_can_write() || standby, "I2: releases the lock while PostgreSQL may write, {context}");
        }
        Operation::Acquire { judged_on, .. } => {
            let wrote_on = judged_on.maintenance.is_none() || world.suspends() || world.failsafe.lapsed;
            assert!(wrote_on, "I1: takes the lock in maintenance mode, {context}");
            let named = judged_on.failsafe.as_ref().is_none_or(|record| record.members.contains_key(&world.me.name));
            assert!(named, "I1: takes the lock although the failsafe key does not name it, {context}");
            let released = judged_on.release.as_ref().map(|release| release.epoch);
            let bound = world.failsafe.promise.as_ref().is_some_and(|promise| now < promise.until && promise.epoch != released);
            let first = !matches!(judged_on.initialize, Some(Initialize::Done(_)));
            assert!(!bound || first, "I1: takes the lock within a promise not to, {context}");
        }
        Operation::WriteFailsafe { .. } => {
            let relies = world.failsafe.armed.is_some() || world.failsafe.disarming.is_some();
            assert!(!relies && world.is_proved_by_etcd(), "I1: changes the failsafe key while it may be relied on, {context}");
        }
        _ => {}
    }
    match operation {
        Operation::Start { .. } | Operation::Promote { .. } => {
            let half = matches!(world.data, DataDirectory::HalfRewound(_));
            assert!(!half, "I10: starts what is half rewound, {context}");
        }
        Operation::Rewind { .. } => {
            let leads = world.lock != Lock::None;
            assert!(!leads && world.leader_writes(), "I10: rewinds without another leader that writes, {context}");
        }
        Operation::Clone { .. } | Operation::EmptyDirectory { .. } => {
            if let Operation::Clone { old, .. } = operation {
                // One that was found empty is unknown from the order on.
                let found_empty = *old == Old::Empty;
                assert_eq!(found_empty, world.data == DataDirectory::Unknown, "P5: says wrongly whether there is data to keep, {context}");
            }
            let gives_up = !matches!(operation, Operation::Clone { old: Old::Empty | Old::Kept(_), .. });
            let ordered = world.requests.reinit.as_ref().is_some_and(|reinit| reinit.given_up.is_none());
            assert!(!gives_up || ordered, "P5: throws a data directory away that nobody gave up, {context}");
            let leads = world.lock != Lock::None;
            assert!(!leads && world.other_leader().is_some(), "I10: replaces its data directory without another leader, {context}");
        }
        Operation::Initdb { .. } => {
            let view = world.view.as_ref().unwrap_or_else(|| panic!("I11: initdb without a view, {context}"));
            let full = view.members.values().any(|key| key.record.data_directory == DataDirectoryReport::Full);
            let claimed =
                matches!(&view.initialize, Some(Initialize::Claimed { lease, .. }) if Some(*lease) == world.lease.map(|own| own.lease));
            assert!(!full && claimed && view.leader.is_none(), "I11: initdb although data is known or the claim is not ours, {context}");
        }
        _ => {}
    }
}

/// The transitions that a list of actions records, in order.
pub(crate) fn transitions(actions: &[Action]) -> Vec<(String, String)> {
    let decided = actions.iter().filter_map(|action| if let Action::Record(decision) = action { decision.transition() } else { None });
    decided.map(|(from, to)| (from.to_owned(), to.to_owned())).collect()
}
