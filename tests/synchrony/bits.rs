//! Names, records and goals as small numbers, and a table of worlds: there are millions of them, and a debug build has to compare them.
//!
//! n0 is the leader, always: who takes over changes names with the former one, and so a goal means the same after it.

use pgherd::facts::synchrony::{Acks, Names, SyncRecord};
use pgherd::policy::synchrony::Goal;
use pgherd::types::{Epoch, MemberName};

/// Names, a goal or a record as a number.
pub type Code = u16;

/// Of a walsender: there is none.
pub const GONE: Code = 0;
/// Names: [`Names::Nobody`].
pub const NOBODY: Code = 1 << 5;
/// Names: [`Names::Block`].
pub const BLOCK: Code = 2 << 5;
/// A goal: [`Goal::Async`].
pub const ASYNC: Code = 0;
/// A goal: [`Goal::Wait`] for one. [`Goal::Stay`] does nothing.
pub const STAY: Code = 1 << 5;
/// A record: there is none.
pub const NO_RECORD: Code = 0;

const ANY: Code = 1 << 8;
const FIRST: Code = 2 << 8;
const RECORD: Code = 1 << 13;

/// Names or a goal: `count` of these members, a bit for each.
pub const fn any(count: u32, members: u8) -> Code {
    ANY | (count as Code) << 5 | members as Code
}

/// Who counts.
pub fn members_of(code: Code) -> u8 {
    (code & 31) as u8
}

/// How many of them; of a record, the leader counted.
pub fn count_of(code: Code) -> u32 {
    u32::from(code >> 5 & 7)
}

/// Whether somebody is named in these names, or in this goal.
pub fn is_acks(code: Code) -> bool {
    code >> 8 != 0
}

pub fn is_first(names: Code) -> bool {
    names >> 8 == FIRST >> 8
}

/// FIRST turned into ANY.
pub fn as_any(names: Code) -> Code {
    if is_first(names) { names ^ FIRST ^ ANY } else { names }
}

/// What the names are when the goal is reached.
pub fn names_of_goal(goal: Code) -> Code {
    if is_acks(goal) && count_of(goal) > 0 { goal } else { NOBODY }
}

/// What the record is when the goal is reached.
pub fn record_of_goal(goal: Code, epoch: u8) -> Code {
    if !is_acks(goal) {
        return NO_RECORD;
    }
    let (members, count) = if count_of(goal) == 0 { (1, 1) } else { (members_of(goal) | 1, count_of(goal) as Code + 1) };
    RECORD | Code::from(epoch - 1) << 11 | count << 5 | Code::from(members)
}

/// Who wrote the record.
pub fn leader_index(record: Code) -> usize {
    usize::from(record >> 8 & 7)
}

/// The leadership that the record was written under, the first is 1.
pub fn epoch_of(record: Code) -> u8 {
    (record >> 11 & 3) as u8 + 1
}

/// `sync_priority` that a walsender makes of these names.
pub fn priority(names: Code, index: usize) -> u32 {
    let members = members_of(names);
    match names >> 8 {
        _ if members >> index & 1 == 0 => 0,
        1 => 1,
        // The placeholder is the first of the list.
        2 => 2 + (members & ((1 << index) - 1)).count_ones(),
        _ => 0,
    }
}

/// Two members change places.
pub fn swapped(bits: u8, index: usize) -> u8 {
    let differ = (bits ^ bits >> index) & 1;
    bits ^ (differ | differ << index)
}

/// The record when n0 and another change names.
pub fn swapped_record(record: Code, index: usize) -> Code {
    if record == NO_RECORD {
        return record;
    }
    let leader = match leader_index(record) {
        0 => index as Code,
        at if at == index => 0,
        at => at as Code,
    };
    record & !(7 << 8 | 31) | leader << 8 | Code::from(swapped(members_of(record), index))
}

pub fn member(index: usize) -> MemberName {
    format!("n{index}").parse().unwrap()
}

fn index_of(name: &MemberName) -> usize {
    name.to_string()[1..].parse().unwrap()
}

fn bits<'a>(members: impl IntoIterator<Item = &'a MemberName>) -> Code {
    members.into_iter().fold(0, |bits, name| bits | 1 << index_of(name))
}

fn acks(code: Code) -> Acks {
    let members = (0..5).filter(|index| members_of(code) >> index & 1 == 1).map(member).collect();
    Acks { members, acks: count_of(code) }
}

pub fn names(code: Code) -> Names {
    match code {
        NOBODY => Names::Nobody,
        BLOCK => Names::Block,
        _ if is_first(code) => Names::First(acks(code)),
        _ => Names::Any(acks(code)),
    }
}

pub fn names_code(names: &Names) -> Code {
    let code = |form: Code, acks: &Acks| form | (acks.acks as Code) << 5 | bits(&acks.members);
    match names {
        Names::Nobody => NOBODY,
        Names::Block => BLOCK,
        Names::Any(acks) => code(ANY, acks),
        Names::First(acks) => code(FIRST, acks),
    }
}

pub fn goal(code: Code) -> Goal {
    match code {
        ASYNC => Goal::Async,
        STAY => Goal::Wait(1),
        _ => Goal::Acks(acks(code)),
    }
}

pub fn record(code: Code) -> Option<SyncRecord> {
    (code != NO_RECORD).then(|| SyncRecord {
        leader: member(leader_index(code)),
        epoch: Epoch(i64::from(epoch_of(code))),
        members: acks(code).members,
        copies: count_of(code),
    })
}

pub fn record_code(record: Option<&SyncRecord>) -> Code {
    let Some(record) = record else { return NO_RECORD };
    let epoch = Code::try_from(record.epoch.0 - 1).unwrap();
    RECORD | epoch << 11 | (index_of(&record.leader) as Code) << 8 | (record.copies as Code) << 5 | bits(&record.members)
}

/// Keys in the order in which they came, each once.
#[derive(Default)]
pub struct Table {
    keys: Vec<u128>,
    /// At the place that a key hashes to or the next free one: half of the hash, and where the key is, counted from 1.
    slots: Vec<u64>,
}

impl Table {
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn key(&self, index: usize) -> u128 {
        self.keys[index]
    }

    pub fn find(&self, key: u128) -> Option<usize> {
        if self.slots.is_empty() {
            return None;
        }
        (self.slots[self.place(key, hash(key))] as u32 as usize).checked_sub(1)
    }

    /// Where the key is; and whether it is new.
    pub fn insert(&mut self, key: u128) -> (usize, bool) {
        if self.keys.len() * 2 >= self.slots.len() {
            self.grow();
        }
        let hash = hash(key);
        let place = self.place(key, hash);
        let at = self.slots[place] as u32 as usize;
        if at != 0 {
            return (at - 1, false);
        }
        self.keys.push(key);
        self.slots[place] = hash & HALF | self.keys.len() as u64;
        (self.keys.len() - 1, true)
    }

    fn place(&self, key: u128, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut place = hash as usize & mask;
        loop {
            let slot = self.slots[place];
            if slot == 0 || (slot ^ hash) & HALF == 0 && self.keys[(slot as u32 - 1) as usize] == key {
                return place;
            }
            place = (place + 1) & mask;
        }
    }

    fn grow(&mut self) {
        self.slots = vec![0; (self.slots.len() * 2).max(1 << 10)];
        assert!(self.slots.len() < 1 << 32, "a place has half a slot");
        for index in 0..self.keys.len() {
            let hash = hash(self.keys[index]);
            let place = self.place(self.keys[index], hash);
            self.slots[place] = hash & HALF | (index as u64 + 1);
        }
    }
}

/// The upper half of a hash or a slot.
const HALF: u64 = 0xFFFF_FFFF << 32;

fn hash(key: u128) -> u64 {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let mixed = (low ^ high.rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ mixed >> 32 ^ high).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    mixed ^ mixed >> 32
}
