//! Worlds that differ only in how the standbys are numbered are one: the standbys of each are put in order.
//!
//! The rule knows members by name only, and every numbering is as good as another: whichever is taken, nothing that may happen is left out.
//! Order that is not found only makes for more worlds.

use crate::bits::{Code, leader_index, members_of};
use crate::rules::{Rules, Shown};
use crate::world::{Setup, World};

/// What becomes of n1 … n4.
pub type Numbering = [u8; 4];

/// All numberings, the one that changes nothing first.
pub struct Numberings {
    all: Vec<Numbering>,
    /// By numbering and set of members.
    bits: Vec<[u8; 32]>,
    /// By the key of a numbering.
    at: [u8; 256],
}

fn key(numbering: Numbering) -> usize {
    numbering.iter().fold(0, |key, index| key << 2 | usize::from(index - 1))
}

impl Default for Numberings {
    fn default() -> Numberings {
        let mut numberings = Numberings { all: Vec::new(), bits: Vec::new(), at: [0; 256] };
        for number in 0..256usize {
            let numbering: Numbering = std::array::from_fn(|at| (number >> (6 - 2 * at) & 3) as u8 + 1);
            let is_one = (1..=4).all(|index| numbering.contains(&index));
            if is_one {
                numberings.at[key(numbering)] = numberings.all.len() as u8;
                numberings.all.push(numbering);
                numberings.bits.push(std::array::from_fn(|bits| {
                    (1..5).filter(|index| bits >> index & 1 == 1).fold(bits as u8 & 1, |bits, index| bits | 1 << numbering[index - 1])
                }));
            }
        }
        numberings
    }
}

impl Numberings {
    pub fn bits(&self, at: u8, bits: u8) -> u8 {
        self.bits[usize::from(at)][usize::from(bits)]
    }

    /// Names or a goal.
    pub fn code(&self, at: u8, code: Code) -> Code {
        code & !31 | Code::from(self.bits(at, (code & 31) as u8))
    }

    pub fn record(&self, at: u8, record: Code) -> Code {
        let leader = leader_index(record);
        let leader = if leader == 0 { 0 } else { Code::from(self.all[usize::from(at)][leader - 1]) };
        self.code(at, record) & !(7 << 8) | leader << 8
    }

    pub fn shown(&self, at: u8, shown: Shown) -> Shown {
        let numbering = self.all[usize::from(at)];
        (1..5).fold(Shown::default(), |all, index| all.with(shown, index, usize::from(numbering[index - 1])))
    }
}

impl World {
    /// The same world with its standbys in order.
    pub fn in_order(&self, setup: &Setup, rules: &mut Rules) -> World {
        let marks = rules.marks(self.in_force);
        let mut order = [(u64::MAX, 4u8); 4];
        let mut index = 1;
        let mut in_order = true;
        // A loop by hand: this is done some hundred million times, and by a debug build.
        while index <= setup.standbys {
            let sender = self.senders[index - 1];
            let mark = u64::from(self.holders >> index & 1)
                | u64::from(self.goal >> index & 1) << 1
                | u64::from(self.record >> index & 1) << 2
                | u64::from(self.file >> index & 1) << 3
                | u64::from(sender >> index & 1) << 4
                | u64::from(self.outages >> index & 1) << 5
                | u64::from(self.late >> index & 1) << 6
                | u64::from(leader_index(self.record) == index) << 7
                | u64::from(sender >> 5) << 8
                | u64::from(members_of(sender).count_ones()) << 14
                | u64::from(marks[index - 1]) << 20;
            order[index - 1] = (mark, index as u8);
            in_order &= index == 1 || order[index - 2].0 <= mark;
            index += 1;
        }
        if in_order {
            return *self;
        }
        while index <= 4 {
            order[index - 1].1 = index as u8;
            index += 1;
        }
        // So few are in order soonest by exchanging neighbours.
        for last in [3, 2, 1] {
            for at in 0..last {
                if order[at].0 > order[at + 1].0 {
                    order.swap(at, at + 1);
                }
            }
        }
        let mut numbering = [0; 4];
        for at in 0..4 {
            numbering[usize::from(order[at].1) - 1] = at as u8 + 1;
        }
        let at = rules.numberings.at[key(numbering)];
        let mut world = *self;
        world.in_force = rules.renumbered(self.in_force, at);
        let numberings = &rules.numberings;
        world.goal = numberings.code(at, self.goal);
        world.record = numberings.record(at, self.record);
        world.late = numberings.record(at, self.late);
        world.file = numberings.code(at, self.file);
        for (sender, to) in self.senders.into_iter().zip(numbering) {
            world.senders[usize::from(to) - 1] = numberings.code(at, sender);
        }
        world.holders = numberings.bits(at, self.holders);
        world.outages = numberings.bits(at, self.outages);
        world
    }
}
