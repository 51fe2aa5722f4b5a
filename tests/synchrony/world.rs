//! One leader, its standbys and one commit: what `policy::synchrony` is explored in.
//!
//! WAL is two positions: before the commit, and after it. Who has flushed the commit is a set that only grows.

use crate::bits::{
    BLOCK, Code, GONE, NO_RECORD, NOBODY, STAY, Table, count_of, is_acks, members_of, names_of_goal, priority, record_of_goal, swapped,
    swapped_record,
};
use crate::bugs::Bug;
use crate::event::{Event, Kind};
use crate::rules::{AFTER, BEFORE, Does, Rules, Shown};

/// More steps of the daemon than any change takes.
const STEPS_MAX: usize = 60;

/// By set of members: the groups of which it has nobody.
const WITHOUT: [u32; 32] = {
    let (mut all, mut members) = ([0; 32], 0);
    while members < 32 {
        let mut group = 0;
        while group < 32 {
            all[members] |= if members & group == 0 { 1 << group } else { 0 };
            group += 1;
        }
        members += 1;
    }
    all
};

/// As many changes of the goal as one likes.
pub const ANY_NUMBER: u8 = 7;

#[derive(Debug, Clone)]
pub struct Setup {
    pub standbys: usize,
    /// The first goal is one of these.
    pub from: Vec<Code>,
    /// Then it becomes any of these, at any moment.
    pub goals: Vec<Code>,
    /// So often, or [`ANY_NUMBER`].
    pub changes: u8,
    /// Whether each standby's connection ends once.
    pub outages: bool,
    /// How often the daemon fails: is killed, or does not learn what came of a change of the names.
    pub crashes: u8,
    /// How often another member takes over.
    pub failovers: u8,
    /// Whether the daemon's steps must come to an end also when nothing else happens, whatever is missing.
    pub alone: bool,
    /// Whether worlds that differ only in how the standbys are numbered are one.
    pub symmetry: bool,
    pub bug: Option<Bug>,
}

impl Setup {
    pub fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// A bit for each member.
    pub fn everybody(&self) -> u8 {
        (2 << self.standbys) - 1
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    pub goal: Code,
    pub changes: u8,
    pub record: Code,
    pub in_force: u32,
    /// What new processes read.
    pub file: Code,
    /// What is in the file is being set: nobody has proved yet that it is in force.
    pub setting: bool,
    /// By standby, n1 first: what its walsender goes by.
    pub senders: [Code; 4],
    /// Whether backends wait.
    pub waits: bool,
    /// The checkpointer has read empty names, and will let everybody go.
    pub emptying: bool,
    /// Who has the commit, a bit for each member; none before it is written.
    pub holders: u8,
    pub acknowledged: bool,
    /// Whose connection may still end.
    pub outages: u8,
    pub crashes: u8,
    pub failovers: u8,
    /// Of [`Bug::WriteLandsLate`]: a killed daemon's record that is on its way to etcd.
    pub late: Code,
    /// Of [`Bug::PositionOfBefore`]: the commit was written before the names were set.
    pub early: bool,
}

impl World {
    /// The world begins with a server that has just been started, once for each first goal.
    pub fn first(setup: &Setup, rules: &mut Rules) -> Vec<World> {
        let in_force = rules.since_start(NOBODY);
        let first = |goal: &Code| World {
            goal: *goal,
            changes: setup.changes,
            record: NO_RECORD,
            in_force,
            file: NOBODY,
            setting: false,
            senders: std::array::from_fn(|at| if at < setup.standbys { NOBODY } else { GONE }),
            waits: false,
            emptying: false,
            holders: 0,
            acknowledged: false,
            outages: if setup.outages { setup.everybody() & !1 } else { 0 },
            crashes: setup.crashes,
            failovers: setup.failovers,
            late: NO_RECORD,
            early: false,
        };
        setup.from.iter().map(first).collect()
    }

    pub fn pack(&self) -> u128 {
        let rest = u64::from(self.setting)
            | u64::from(self.waits) << 1
            | u64::from(self.emptying) << 2
            | u64::from(self.acknowledged) << 3
            | u64::from(self.early) << 4
            | u64::from(self.crashes) << 5
            | u64::from(self.failovers) << 7
            | u64::from(self.changes) << 9
            | u64::from(self.holders) << 12
            | u64::from(self.outages >> 1) << 17
            | u64::from(self.goal) << 21
            | u64::from(self.record) << 30
            | u64::from(self.late) << 44;
        let [a, b, c, d] = self.senders;
        let names = u64::from(a) | u64::from(b) << 10 | u64::from(c) << 20 | u64::from(d) << 30 | u64::from(self.file) << 40;
        // 58 bits, 50, and 20.
        u128::from(rest) | u128::from(names) << 58 | u128::from(self.in_force) << 108
    }

    pub fn unpack(key: u128) -> World {
        let (rest, names) = (key as u64, (key >> 58) as u64);
        let flag = |at: u32| rest >> at & 1 == 1;
        let small = |at: u32, mask: u64| (rest >> at & mask) as u8;
        let code = |of: u64, at: u32, mask: u64| (of >> at & mask) as Code;
        World {
            goal: code(rest, 21, 0x1FF),
            changes: small(9, 7),
            record: code(rest, 30, 0x3FFF),
            in_force: (key >> 108) as u32,
            file: code(names, 40, 0x3FF),
            setting: flag(0),
            senders: [code(names, 0, 0x3FF), code(names, 10, 0x3FF), code(names, 20, 0x3FF), code(names, 30, 0x3FF)],
            waits: flag(1),
            emptying: flag(2),
            holders: small(12, 31),
            acknowledged: flag(3),
            outages: small(17, 15) << 1,
            crashes: small(5, 3),
            failovers: small(7, 3),
            late: code(rest, 44, 0x3FFF),
            early: flag(4),
        }
    }

    pub fn epoch(&self, setup: &Setup) -> u8 {
        1 + setup.failovers - self.failovers
    }

    pub fn shown(&self, setup: &Setup) -> Shown {
        let mut shown = Shown::default();
        for index in 1..=setup.standbys {
            let names = self.senders[index - 1];
            if names != GONE {
                let priority = self.shown_priority(setup, priority(names, index), index);
                shown.add(index, priority, self.holders >> index & 1 == 1 || setup.has(Bug::FlushNotLookedAt));
            }
        }
        shown
    }

    fn step(&self, setup: &Setup, rules: &mut Rules) -> Does {
        let shown = self.shown(setup);
        let record = if setup.has(Bug::NamesFirst) { NO_RECORD } else { self.record };
        let does = rules.step(self.epoch(setup), record, self.goal, self.in_force, shown);
        self.instead(setup, does)
    }

    /// Whether an acknowledged commit is out of reach: the leader has it not, or some may lead of whom nobody has it.
    pub fn lost(&self, setup: &Setup, rules: &mut Rules) -> bool {
        self.acknowledged && (self.holders & 1 == 0 || self.groups(setup, rules) & WITHOUT[usize::from(self.holders)] != 0)
    }

    /// Those who may choose one of them for the leader when n0 is gone: a bit for each group.
    fn groups(&self, setup: &Setup, rules: &mut Rules) -> u32 {
        rules.may_lead(self.record, setup.everybody(), u32::from(setup.has(Bug::OneTooFew)))
    }

    /// Whether some walsender lets the commit through now. Which of those that count come first is not looked at: any of them may.
    pub fn is_released(&self, setup: &Setup) -> bool {
        let mut have = 0;
        for index in 1..=setup.standbys {
            have += u32::from(self.holders >> index & 1 == 1 && priority(self.senders[index - 1], index) > 0);
        }
        (1..=setup.standbys).any(|index| {
            let names = self.senders[index - 1];
            priority(names, index) > 0 && have >= count_of(names)
        })
    }

    fn may(&self, all: &mut Vec<(Event, World)>, event: Event, change: impl FnOnce(&mut World)) {
        let mut next = *self;
        change(&mut next);
        if next != *self {
            all.push((event, next));
        }
    }

    /// All that may happen next.
    pub fn next(&self, setup: &Setup, rules: &mut Rules, all: &mut Vec<(Event, World)>) {
        if self.holders != 0 && !self.acknowledged && (!self.waits || self.is_released(setup)) {
            self.may(all, Event(Kind::Acknowledged, 0), |world| world.acknowledged = true);
            if self.failovers == 0 {
                // Nothing but a failover goes by whether it was acknowledged: what happens before it may as well happen after it.
                return;
            }
        }
        if self.changes > 0 {
            for goal in &setup.goals {
                if self.goal != *goal {
                    self.may(all, Event(Kind::Goal, *goal), |world| {
                        world.goal = *goal;
                        world.changes -= u8::from(world.changes != ANY_NUMBER);
                    });
                }
            }
        }
        self.postgresql(setup, all);
        let step = if self.setting { Does::Nothing } else { self.step(setup, rules) };
        if self.crashes > 0 {
            self.crash(setup, rules, step, all);
        }
        if self.late != NO_RECORD {
            self.may(all, Event(Kind::LandsLate, 0), |world| {
                world.record = world.late;
                world.late = NO_RECORD;
            });
        }
        if !self.setting {
            self.may(all, Event(Kind::Probed, 0), |world| world.probe(setup, rules));
            let (kind, what) = match step {
                Does::Records(record) => (Kind::Records, record),
                Does::Sets(names) => (Kind::Sets, names),
                Does::Nothing => (Kind::Probed, 0),
            };
            self.may(all, Event(kind, what), |world| world.take(setup, rules, step));
        } else if self.waits || self.file == NOBODY || !setup.has(Bug::AnyWaitIsProof) {
            self.may(all, Event(Kind::Proved, 0), |world| world.prove(setup, rules));
        }
        if self.failovers > 0 {
            self.failover(setup, rules, all);
        }
    }

    fn crash(&self, setup: &Setup, rules: &mut Rules, step: Does, all: &mut Vec<(Event, World)>) {
        let unknown = self.found_at_start(setup, rules);
        let killed = |world: &mut World| {
            world.crashes -= 1;
            world.setting = false;
            world.in_force = unknown;
        };
        self.may(all, Event(Kind::Killed, 0), killed);
        match step {
            Does::Records(record) if setup.has(Bug::WriteLandsLate) => self.may(all, Event(Kind::KilledWriting, record), |world| {
                killed(world);
                world.late = record;
            }),
            Does::Sets(names) if !setup.has(Bug::OrderForgotten) => self.may(all, Event(Kind::Fails, names), |world| {
                world.crashes -= 1;
                world.in_force = rules.ordered(world.in_force, names);
            }),
            _ if self.setting => self.may(all, Event(Kind::FailsAfterAll, 0), |world| {
                world.crashes -= 1;
                world.setting = false;
            }),
            _ => {}
        }
    }

    fn take(&mut self, setup: &Setup, rules: &mut Rules, step: Does) {
        match step {
            Does::Records(record) => {
                self.record = record;
                // It compares the revision that it was judged on.
                self.late = NO_RECORD;
            }
            Does::Sets(names) => {
                if !setup.has(Bug::OrderForgotten) {
                    self.in_force = rules.ordered(self.in_force, names);
                }
                self.file = names;
                self.setting = true;
                self.early = setup.has(Bug::PositionOfBefore) && self.holders != 0;
            }
            Does::Nothing => {}
        }
    }

    fn prove(&mut self, setup: &Setup, rules: &mut Rules) {
        if setup.has(Bug::OrderForgotten) {
            self.in_force = rules.ordered(self.in_force, self.file);
        }
        self.setting = false;
        self.in_force = rules.took(self.in_force, self.file);
        if self.file != NOBODY && !setup.has(Bug::WaitingNotProved) && !setup.has(Bug::AnyWaitIsProof) {
            self.waits = true;
            self.emptying = false;
        }
    }

    fn probe(&mut self, setup: &Setup, rules: &mut Rules) {
        if setup.has(Bug::NeverLooks) {
            return;
        }
        let written = if setup.has(Bug::PositionOfBefore) { self.early } else { self.holders != 0 };
        self.in_force = rules.seen(self.in_force, self.shown(setup), if written { AFTER } else { BEFORE }, self.goal);
    }

    fn postgresql(&self, setup: &Setup, all: &mut Vec<(Event, World)>) {
        if self.holders == 0 {
            self.may(all, Event(Kind::Written, 0), |world| world.holders = 1);
        }
        // The checkpointer reads the names at any time after the reload, and acts some time after that.
        if self.emptying {
            self.may(all, Event(Kind::CheckpointerLetsGo, 0), |world| {
                world.waits = false;
                world.emptying = false;
            });
        } else {
            self.may(all, Event(Kind::CheckpointerReads, 0), |world| {
                world.emptying = world.waits && world.file == NOBODY;
                world.waits |= world.file != NOBODY;
            });
        }
        let mut index = 1;
        while index <= setup.standbys {
            let (at, what) = (index - 1, index as Code);
            if self.senders[at] == GONE {
                self.may(all, Event(Kind::Connects, what), |world| world.senders[at] = world.read(setup));
            } else {
                self.may(all, Event(Kind::Reads, what), |world| world.senders[at] = world.read(setup));
                if self.outages >> index & 1 == 1 {
                    self.may(all, Event(Kind::Gone, what), |world| {
                        world.outages &= !(1 << index);
                        world.senders[at] = GONE;
                    });
                }
                if self.holders != 0 && self.flush_matters(index) {
                    self.may(all, Event(Kind::Flushes, what), |world| world.holders |= 1 << index);
                }
            }
            index += 1;
        }
    }

    /// Whether anything can come of it that this standby flushes the commit now and not later. To be on more members makes a commit no
    /// easier to lose; a failover goes by who has it, else only a walsender that counts it, and the rule while its goal has too few.
    fn flush_matters(&self, index: usize) -> bool {
        let counts = !self.acknowledged && priority(self.senders[index - 1], index) > 0;
        let goal = members_of(self.goal);
        let is_wanted = goal >> index & 1 == 1 && (goal & self.holders).count_ones() < count_of(self.goal);
        self.failovers > 0 || counts || is_wanted
    }

    /// n0 crashes and leads again; or is gone, and one of those leads who the record lets, which has the commit if any of those seen has
    /// it. If none has, it is gone for good, and another may be written.
    fn failover(&self, setup: &Setup, rules: &mut Rules, all: &mut Vec<(Event, World)>) {
        let (mut with, mut without) = (self.holders & 1, !self.holders & 1);
        let mut groups = self.groups(setup, rules);
        while groups != 0 {
            let group = groups.trailing_zeros() as u8;
            let have = group & self.holders;
            if have == 0 || setup.has(Bug::BehindLeads) {
                without |= group & !self.holders;
            }
            with |= have;
            groups &= groups - 1;
        }
        let block = rules.since_start(BLOCK);
        for index in 0..=setup.standbys {
            let leads = |world: &mut World| {
                world.failovers -= 1;
                world.record = swapped_record(world.record, index);
                world.holders = swapped(world.holders, index);
                world.outages = swapped(world.outages | u8::from(setup.outages), index) & !1;
                world.setting = false;
                world.late = NO_RECORD;
                world.file = BLOCK;
                world.waits = true;
                world.emptying = false;
                world.in_force = block;
                for at in 0..setup.standbys {
                    world.senders[at] = BLOCK;
                }
            };
            if with >> index & 1 == 1 {
                self.may(all, Event(Kind::Leads, index as Code), leads);
            }
            if without >> index & 1 == 1 {
                self.may(all, Event(Kind::LeadsWithout, index as Code), |world| {
                    leads(world);
                    world.holders &= if world.acknowledged { !0 } else { 0 };
                });
            }
        }
    }

    /// From here on nothing fails and nobody changes the goal: what the daemon does then, until nothing is left to do. When all `is_well`,
    /// every standby is connected, has read the names and has flushed, and it ends as the goal wants; else nothing happens but what the
    /// daemon does, and it ends at all. An error says why not. What ended well is `known`.
    pub fn come_to_rest(&self, setup: &Setup, rules: &mut Rules, is_well: bool, known: &mut Table) -> Result<(), String> {
        let mut world = World { changes: 0, outages: 0, crashes: 0, acknowledged: false, late: NO_RECORD, early: false, ..*self };
        let mut passed = Vec::new();
        let mut at_rest = false;
        while !at_rest {
            if is_well {
                world.all_is_well(setup);
            }
            if known.find(world.pack()).is_some() {
                break;
            }
            passed.push(world.pack());
            if passed.len() > STEPS_MAX {
                return Err(format!("goes on for ever: {world}"));
            }
            if world.setting {
                world.prove(setup, rules);
                continue;
            }
            let before = world;
            world.probe(setup, rules);
            let step = world.step(setup, rules);
            world.take(setup, rules, step);
            at_rest = step == Does::Nothing && world == before;
        }
        if at_rest && is_well {
            world.settled(setup)?;
        }
        for key in passed {
            known.insert(key);
        }
        Ok(())
    }

    fn all_is_well(&mut self, setup: &Setup) {
        for at in 0..setup.standbys {
            self.senders[at] = self.read(setup);
        }
        self.waits = self.file != NOBODY;
        self.emptying = false;
        self.holders = if self.holders == 0 { 0 } else { setup.everybody() };
    }

    fn settled(&self, setup: &Setup) -> Result<(), String> {
        let goal = self.goal;
        if goal == STAY {
            return Ok(());
        }
        if self.record != record_of_goal(goal, self.epoch(setup)) || self.file != names_of_goal(goal) {
            return Err(format!("stands still: {self}"));
        }
        let waits_for_ever = self.holders != 0 && is_acks(goal) && self.waits && !self.is_released(setup);
        if waits_for_ever { Err(format!("lets nothing through: {self}")) } else { Ok(()) }
    }
}
