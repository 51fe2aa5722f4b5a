//! One leader, its standbys and one commit: what `policy::synchrony` is explored in.
//!
//! WAL is two positions: before the commit, and after it. Who has flushed the commit is a set that only grows.

use std::collections::BTreeSet;

use pgherd::facts::synchrony::{Names, Sender, SyncRecord};
use pgherd::policy::synchrony::{Goal, InForce, Inputs, Step, step};
use pgherd::types::{Epoch, Lsn, MemberName};

const BEFORE: Lsn = Lsn(1);
const AFTER: Lsn = Lsn(2);

/// A deliberate bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The names are set before the record allows it.
    NamesFirst,
    /// A reload is taken for effective at once.
    ReloadIsEffect,
    /// What standbys have flushed is not looked at.
    FlushNotLooked,
    /// The position is the one of before the reload took effect.
    WrittenTooEarly,
    /// How many acknowledge is believed to be seen, whatever form the names have.
    NumberSeenWithoutForm,
    /// A daemon that starts believes that what is in the file has taken effect.
    FileBelieved,
    /// One member less than needed is enough to lead.
    OneTooFew,
    /// Names are emptied while the record lets standbys lead (SAFETY row 47).
    EmptiedToMakeRoom,
    /// The former leader's record is thrown away by the new one.
    RecordThrownAway,
    /// That backends wait is not proved after names were empty.
    WaitingNotProved,
}

#[derive(Debug, Clone)]
pub struct Setup {
    pub standbys: usize,
    /// One after the other, each at any time.
    pub goals: Vec<Goal>,
    /// How often a standby's connection ends.
    pub outages: u8,
    /// How often the daemon is killed.
    pub crashes: u8,
    pub failovers: u8,
    pub bug: Option<Bug>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    leader: usize,
    epoch: i64,
    record: Option<SyncRecord>,
    goal: usize,
    in_force: InForce,
    /// What the file holds and new processes read.
    file: Names,
    /// Names that are being set.
    setting: Option<Names>,
    /// By member: what its walsender goes by. None = it is not connected.
    senders: Vec<Option<Names>>,
    /// Whether backends wait.
    waits: bool,
    /// Who has the commit; empty before it is written.
    holders: u8,
    acknowledged: bool,
    outages: u8,
    crashes: u8,
    failovers: u8,
}

pub fn member(index: usize) -> MemberName {
    format!("n{index}").parse().unwrap()
}

/// Position in the list that this form of the names gives a member; 0 = none.
fn priority(names: &Names, index: usize) -> u32 {
    let at = |members: &BTreeSet<MemberName>| members.iter().position(|name| *name == member(index));
    match names {
        Names::Nobody | Names::Block => 0,
        Names::Any(acks) => u32::from(acks.members.contains(&member(index))),
        // The placeholder is the first.
        Names::First(acks) => at(&acks.members).map_or(0, |at| u32::try_from(at).unwrap() + 2),
    }
}

impl World {
    pub fn new(setup: &Setup) -> World {
        World {
            leader: 0,
            epoch: 1,
            record: None,
            goal: 0,
            in_force: InForce::since_start(Names::Nobody),
            file: Names::Nobody,
            setting: None,
            senders: (0..=setup.standbys).map(|index| (index != 0).then_some(Names::Nobody)).collect(),
            waits: false,
            holders: 0,
            acknowledged: false,
            outages: setup.outages,
            crashes: setup.crashes,
            failovers: setup.failovers,
        }
    }

    fn members(&self) -> impl Iterator<Item = usize> + '_ {
        0..self.senders.len()
    }

    fn shown(&self) -> Vec<Sender> {
        let shown = |index: usize| {
            let names = self.senders[index].as_ref()?;
            let flush = if self.holders >> index & 1 == 1 { AFTER } else { BEFORE };
            Some(Sender { member: member(index), priority: priority(names, index), flush, streaming: true })
        };
        self.members().filter_map(shown).collect()
    }

    fn step(&self, setup: &Setup) -> Step {
        let mut senders = self.shown();
        if setup.bug == Some(Bug::FlushNotLooked) {
            senders.iter_mut().for_each(|sender| sender.flush = AFTER);
        }
        let me = member(self.leader);
        let goal = &setup.goals[self.goal];
        let inputs =
            Inputs { me: &me, epoch: Epoch(self.epoch), record: self.record.as_ref(), goal, in_force: &self.in_force, senders: &senders };
        let step = step(&inputs);
        match (setup.bug, &step, goal) {
            (Some(Bug::NamesFirst), Step::Record(_), Goal::Acks(acks)) if self.in_force.set() != Some(&Names::Any(acks.clone())) => {
                Step::Names(Names::Any(acks.clone()))
            }
            (Some(Bug::EmptiedToMakeRoom), Step::Record(_), Goal::Acks(acks)) if acks.acks == 0 && self.file != Names::Nobody => {
                Step::Names(Names::Nobody)
            }
            (Some(Bug::RecordThrownAway), Step::Record(Some(record)), _) if self.record.as_ref().is_some_and(|r| r.leader != me) => {
                let everybody: BTreeSet<MemberName> = self.members().map(member).collect();
                let copies = u32::try_from(everybody.len()).unwrap();
                Step::Record(Some(SyncRecord { members: everybody, copies, ..record.clone() }))
            }
            _ => step,
        }
    }

    pub fn is_settled(&self, setup: &Setup) -> bool {
        self.goal + 1 == setup.goals.len() && self.setting.is_none() && self.step(setup) == Step::Done
    }

    /// Whether an acknowledged commit is out of reach of some members that the record lets lead without the leader.
    pub fn lost(&self, setup: &Setup) -> bool {
        let Some(record) = self.record.as_ref().filter(|_| self.acknowledged) else { return false };
        self.groups().any(|seen| seen & self.holders == 0 && self.may_lead(record, seen, setup))
    }

    /// Every set of members but the leader.
    fn groups(&self) -> impl Iterator<Item = u8> + '_ {
        (1..1u8 << self.senders.len()).filter(|seen| seen >> self.leader & 1 == 0)
    }

    fn may_lead(&self, record: &SyncRecord, seen: u8, setup: &Setup) -> bool {
        let seen: Vec<MemberName> = self.members().filter(|index| seen >> index & 1 == 1).map(member).collect();
        let mut record = record.clone();
        if setup.bug == Some(Bug::OneTooFew) {
            record.copies += 1;
        }
        record.holds_all(seen.iter())
    }

    /// Whether some walsender lets the commit through now.
    fn is_released(&self) -> bool {
        let counts = |index: usize| self.senders[index].as_ref().map_or(0, |names| priority(names, index));
        let mut candidates: Vec<(u32, usize)> = self.members().map(|index| (counts(index), index)).filter(|(at, _)| *at > 0).collect();
        candidates.sort_unstable();
        let has_it = |index: &usize| self.holders >> index & 1 == 1;
        candidates.iter().any(|(_, index)| match &self.senders[*index] {
            Some(Names::Any(acks)) => candidates.iter().filter(|(_, index)| has_it(index)).count() >= acks.acks as usize,
            Some(Names::First(acks)) => {
                let first: Vec<_> = candidates.iter().take(acks.acks as usize).collect();
                first.len() == acks.acks as usize && first.iter().all(|(_, index)| has_it(index))
            }
            Some(Names::Nobody | Names::Block) | None => false,
        })
    }

    /// All that may happen next, with what it is.
    pub fn next(&self, setup: &Setup) -> Vec<(String, World)> {
        let mut all = Vec::new();
        let mut may = |what: String, change: &dyn Fn(&mut World)| {
            let mut next = self.clone();
            change(&mut next);
            if next != *self {
                all.push((what, next));
            }
        };
        self.operator_and_daemon(setup, &mut may);
        self.postgresql(setup, &mut may);
        self.failover(setup, &mut may);
        all
    }

    fn operator_and_daemon(&self, setup: &Setup, may: &mut dyn FnMut(String, &dyn Fn(&mut World))) {
        if self.goal + 1 < setup.goals.len() {
            may(format!("the goal is {:?}", setup.goals[self.goal + 1]), &|world| world.goal += 1);
        }
        if self.crashes > 0 {
            may("the daemon is killed and another takes over".to_owned(), &|world| {
                world.crashes -= 1;
                world.setting = None;
                world.in_force = match setup.bug {
                    Some(Bug::FileBelieved) => InForce::since_start(world.file.clone()),
                    _ => InForce::unknown(
                        world.record.as_ref(),
                        world.members().filter(|index| *index != world.leader).map(member).collect(),
                    ),
                };
            });
        }
        let write_lsn = if self.holders == 0 || setup.bug == Some(Bug::WrittenTooEarly) { BEFORE } else { AFTER };
        let goal = &setup.goals[self.goal];
        if let Some(names) = &self.setting {
            may(format!("proved: {names}"), &|world| {
                world.setting = None;
                world.waits |= *names != Names::Nobody && setup.bug != Some(Bug::WaitingNotProved);
                world.in_force.took(names.clone());
            });
            return;
        }
        may("a probe".to_owned(), &|world| {
            let mut shown = world.shown();
            if let Some(set) = world.in_force.set().filter(|_| setup.bug == Some(Bug::ReloadIsEffect)) {
                shown = (1..world.senders.len()).map(|index| Sender { priority: priority(set, index), ..shown[0].clone() }).collect();
                for (index, sender) in shown.iter_mut().enumerate() {
                    sender.member = member(index + 1);
                }
            }
            world.in_force.seen(&shown, write_lsn, goal);
            if setup.bug == Some(Bug::NumberSeenWithoutForm) && world.senders.iter().flatten().all(|names| *names != Names::Nobody) {
                let set = world.in_force.set().cloned();
                if let Some(set @ Names::First(_)) = set.filter(|_| world.in_force != InForce::since_start(Names::Nobody)) {
                    world.in_force = InForce::since_start(set);
                }
            }
        });
        match self.step(setup) {
            Step::Record(record) => may(format!("etcd has {record:?}"), &|world| world.record.clone_from(&record)),
            Step::Names(names) => may(format!("setting {names}"), &|world| {
                world.in_force.ordered(&names);
                world.file = names.clone();
                world.setting = Some(names.clone());
            }),
            Step::Done | Step::Wait(_) => {}
        }
    }

    fn postgresql(&self, _setup: &Setup, may: &mut dyn FnMut(String, &dyn Fn(&mut World))) {
        if self.holders == 0 {
            may("a commit is written".to_owned(), &|world| world.holders = 1 << world.leader);
        }
        // The checkpointer reads the names at any time after the reload.
        may("the checkpointer reads the names".to_owned(), &|world| world.waits = world.file != Names::Nobody);
        for index in self.members().filter(|index| *index != self.leader) {
            match &self.senders[index] {
                None => may(format!("n{index} connects"), &|world| world.senders[index] = Some(world.file.clone())),
                Some(_) => {
                    may(format!("the walsender of n{index} reads the names"), &|world| world.senders[index] = Some(world.file.clone()));
                    if self.outages > 0 {
                        may(format!("n{index} is gone"), &|world| {
                            world.outages -= 1;
                            world.senders[index] = None;
                        });
                    }
                    if self.holders != 0 {
                        may(format!("n{index} flushes the commit"), &|world| world.holders |= 1 << index);
                    }
                }
            }
        }
        if self.holders != 0 && !self.acknowledged && (!self.waits || self.is_released()) {
            may("the commit is acknowledged".to_owned(), &|world| world.acknowledged = true);
        }
    }

    /// The leader is gone, and one of those that the record lets lead does, which has the commit if any of those seen has it.
    fn failover(&self, setup: &Setup, may: &mut dyn FnMut(String, &dyn Fn(&mut World))) {
        let Some(record) = self.record.as_ref().filter(|_| self.failovers > 0 && self.holders != 0) else { return };
        for seen in self.groups().filter(|seen| self.may_lead(record, *seen, setup)) {
            for next in self.members().filter(|index| seen & self.holders >> index & 1 == 1 && seen >> index & 1 == 1) {
                may(format!("n{next} leads, having seen {seen:b}"), &|world| {
                    world.failovers -= 1;
                    world.leader = next;
                    world.epoch += 1;
                    world.setting = None;
                    world.file = Names::Block;
                    world.waits = true;
                    world.in_force = InForce::since_start(Names::Block);
                    let connected = |index: usize| (index != next).then_some(Names::Block);
                    world.senders = (0..world.senders.len()).map(connected).collect();
                });
            }
        }
    }
}
