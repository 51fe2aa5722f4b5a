//! `policy::synchrony` asked once for each different question: of millions of worlds only some thousands are different to it.

use std::collections::HashMap;

use pgherd::facts::synchrony::Sender;
use pgherd::policy::synchrony::{InForce, Inputs, Step, step};
use pgherd::types::{Epoch, Lsn, MemberName};

use crate::bits::{self, Code, Table, goal, member, names, record};
use crate::symmetry::Numberings;

pub const BEFORE: Lsn = Lsn(1);
pub const AFTER: Lsn = Lsn(2);

/// What the walsenders show: of each standby whether it is there, its priority, and whether it has flushed the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shown(u32);

const THERE: u32 = 1;
const FLUSHED: u32 = 2;

impl Shown {
    pub fn add(&mut self, index: usize, priority: u32, flushed: bool) {
        self.0 |= (THERE | if flushed { FLUSHED } else { 0 } | priority << 2) << (5 * (index - 1));
    }

    /// What `index` of `other` shows, shown by `to`.
    pub fn with(self, other: Shown, index: usize, to: usize) -> Shown {
        Shown(self.0 | (other.0 >> (5 * (index - 1)) & 31) << (5 * (to - 1)))
    }

    fn senders(self) -> Vec<Sender> {
        let of = |index: usize| {
            let bits = self.0 >> (5 * (index - 1)) & 31;
            let flush = if bits & FLUSHED != 0 { AFTER } else { BEFORE };
            (bits & THERE != 0).then(|| Sender { member: member(index), priority: bits >> 2, flush, streaming: true })
        };
        (1..=4).filter_map(of).collect()
    }
}

/// The next step as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Nothing,
    Records(Code),
    Sets(Code),
}

/// How what the daemon knows came about: from nothing, or from another by its id.
#[derive(Debug, Clone, Copy)]
enum Change {
    SinceStart(Code),
    Unknown(Code, u8),
    Ordered(u32, Code),
    Took(u32, Code),
    Seen(u32, Shown, Lsn, Code),
}

impl Change {
    fn key(self) -> u128 {
        let of = |tag: u128, id: u32, code: Code| tag | u128::from(code) << 4 | u128::from(id) << 40;
        match self {
            Change::SinceStart(code) => of(0, 0, code),
            Change::Unknown(code, anybody) => of(1, u32::from(anybody), code),
            Change::Ordered(id, code) => of(2, id, code),
            Change::Took(id, code) => of(3, id, code),
            Change::Seen(id, shown, write_lsn, to) => of(4, id, to) | u128::from(write_lsn.0) << 62 | u128::from(shown.0) << 64,
        }
    }
}

fn changed(mut in_force: InForce, change: impl FnOnce(&mut InForce)) -> InForce {
    change(&mut in_force);
    in_force
}

/// In which of the sets that it is printed with each standby is. That the order is good is all that depends on it.
fn marks(in_force: &InForce) -> [u32; 4] {
    let text = format!("{in_force:?}");
    let sets: Vec<&str> = text.split("members: {").skip(1).filter_map(|rest| rest.split('}').next()).collect();
    std::array::from_fn(|at| {
        let name = format!("n{}", at + 1);
        sets.iter().fold(1, |mark, set| mark << 1 | u32::from(set.contains(&name)))
    })
}

#[derive(Default)]
pub struct Rules {
    asked: Table,
    answers: Vec<u32>,
    ids: HashMap<InForce, u32>,
    in_force: Vec<(InForce, Change, [u32; 4])>,
    /// By id and numbering of the standbys: the id of the same with other numbers.
    numbered: Vec<[u32; 24]>,
    pub numberings: Numberings,
    /// By record: who may lead, a bit for each group of members.
    may_lead: Vec<Option<u32>>,
}

impl Rules {
    fn ask(&mut self, question: u128, answer: impl FnOnce(&mut Rules) -> u32) -> u32 {
        if let Some(at) = self.asked.find(question) {
            return self.answers[at];
        }
        let answer = answer(self);
        self.asked.insert(question);
        self.answers.push(answer);
        answer
    }

    fn apply(&mut self, change: Change) -> u32 {
        self.ask(change.key(), |rules| {
            let before = |id: u32| rules.in_force[id as usize].0.clone();
            let in_force = match change {
                Change::SinceStart(code) => InForce::since_start(names(code)),
                Change::Unknown(code, anybody) => {
                    InForce::unknown(record(code).as_ref(), (1..5).filter(|index| anybody >> index & 1 == 1).map(member).collect())
                }
                Change::Ordered(id, code) => changed(before(id), |next| next.ordered(&names(code))),
                Change::Took(id, code) => changed(before(id), |next| next.took(names(code))),
                Change::Seen(id, shown, write_lsn, to) => changed(before(id), |next| next.seen(&shown.senders(), write_lsn, &goal(to))),
            };
            let next = u32::try_from(rules.in_force.len()).unwrap();
            assert!(next < 1 << 20, "more of InForce than a world's number has room for");
            *rules.ids.entry(in_force.clone()).or_insert_with(|| {
                let marks = marks(&in_force);
                rules.in_force.push((in_force, change, marks));
                rules.numbered.push([u32::MAX; 24]);
                next
            })
        })
    }

    /// What marks each standby in this, whatever number it has.
    pub fn marks(&self, in_force: u32) -> [u32; 4] {
        self.in_force[in_force as usize].2
    }

    /// The same with the standbys numbered anew: what led to it is done again with the other numbers.
    pub fn renumbered(&mut self, in_force: u32, numbering: u8) -> u32 {
        let known = self.numbered[in_force as usize][usize::from(numbering)];
        if known != u32::MAX {
            return known;
        }
        let change = match self.in_force[in_force as usize].1 {
            Change::SinceStart(code) => Change::SinceStart(self.numberings.code(numbering, code)),
            Change::Unknown(code, anybody) => {
                Change::Unknown(self.numberings.record(numbering, code), self.numberings.bits(numbering, anybody))
            }
            Change::Ordered(id, code) => Change::Ordered(self.renumbered(id, numbering), self.numberings.code(numbering, code)),
            Change::Took(id, code) => Change::Took(self.renumbered(id, numbering), self.numberings.code(numbering, code)),
            Change::Seen(id, shown, write_lsn, to) => {
                let id = self.renumbered(id, numbering);
                Change::Seen(id, self.numberings.shown(numbering, shown), write_lsn, self.numberings.code(numbering, to))
            }
        };
        let other = self.apply(change);
        self.numbered[in_force as usize][usize::from(numbering)] = other;
        other
    }

    pub fn since_start(&mut self, code: Code) -> u32 {
        self.apply(Change::SinceStart(code))
    }

    /// A daemon takes over a server that runs; `anybody` may count.
    pub fn unknown(&mut self, code: Code, anybody: u8) -> u32 {
        self.apply(Change::Unknown(code, anybody))
    }

    pub fn ordered(&mut self, in_force: u32, code: Code) -> u32 {
        self.apply(Change::Ordered(in_force, code))
    }

    pub fn took(&mut self, in_force: u32, code: Code) -> u32 {
        self.apply(Change::Took(in_force, code))
    }

    pub fn seen(&mut self, in_force: u32, shown: Shown, write_lsn: Lsn, to: Code) -> u32 {
        self.apply(Change::Seen(in_force, shown, write_lsn, to))
    }

    pub fn step(&mut self, epoch: u8, code: Code, to: Code, in_force: u32, shown: Shown) -> Does {
        let what = u128::from(shown.0) << 64 | u128::from(epoch) << 60 | u128::from(code) << 88;
        let answer = self.ask(what | u128::from(in_force) << 40 | u128::from(to) << 4 | 5, |rules| {
            let (record, goal, senders) = (record(code), goal(to), shown.senders());
            let inputs = Inputs {
                me: &member(0),
                epoch: Epoch(i64::from(epoch)),
                record: record.as_ref(),
                goal: &goal,
                in_force: &rules.in_force[in_force as usize].0,
                senders: &senders,
            };
            match step(&inputs) {
                Step::Done | Step::Wait(_) => 0,
                Step::Record(record) => 1 << 16 | u32::from(bits::record_code(record.as_ref())),
                Step::Names(names) => 2 << 16 | u32::from(bits::names_code(&names)),
            }
        });
        let code = (answer & 0xFFFF) as Code;
        match answer >> 16 {
            0 => Does::Nothing,
            1 => Does::Records(code),
            _ => Does::Sets(code),
        }
    }

    /// Which groups without the leader n0 may choose one from among them: a bit for each group. `fewer` is how many less than needed.
    pub fn may_lead(&mut self, code: Code, everybody: u8, fewer: u32) -> u32 {
        let at = usize::from(code);
        if self.may_lead.len() <= at {
            self.may_lead.resize(at + 1, None);
        }
        if let Some(known) = self.may_lead[at] {
            return known;
        }
        let mut groups = 0;
        if let Some(mut record) = record(code) {
            record.copies += fewer;
            for group in (2..=everybody).filter(|group| group & 1 == 0 && group & !everybody == 0) {
                let seen: Vec<MemberName> = (1..5).filter(|index| group >> index & 1 == 1).map(member).collect();
                groups |= u32::from(record.holds_all(seen.iter())) << group;
            }
        }
        self.may_lead[at] = Some(groups);
        groups
    }
}
