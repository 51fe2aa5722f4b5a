//! Decides how `sync` in etcd and synchronous_standby_names change, one step at a time. Never talks to either.
//!
//! What holds at every instant (I5, I6): whatever a walsender may still go by lets a commit through only when it is on as many members as
//! `sync` says, and so does every commit that was acknowledged before. Whoever sees the positions of enough members to be sure of one of
//! those, and is not behind any, has every acknowledged commit ([`SyncRecord::holds_all`]). So the record is weakened before the names are
//! ([`Step::Record`] with what both allow), and strengthened after: when all walsenders are seen to go by the new names and enough
//! standbys have flushed what was written by then.
//!
//! What surprises: a reload reaches each walsender at its own time, and meanwhile they release by mixtures: those who count are shared
//! (sync_priority, which each walsender writes when it reads the names), how many is each one's own. So what may be in force is judged as
//! all members that may count, and the least number. When that number grows, nothing shows that it has arrived, and so the names pass
//! through another form, which each walsender's sync_priority does show.

pub mod goal;

use std::collections::BTreeSet;

use self::goal::Standbys;
use crate::facts::synchrony::{Acks, Names, Sender, SyncRecord};
use crate::mutants::{Mutant, mutant};
use crate::types::{Epoch, Lsn, MemberName};

/// Forms of the names that some walsender may still go by; beyond, two are counted as what both allow.
const EARLIER_MAX: usize = 8;

impl Acks {
    /// Nobody: the leader alone has everything.
    fn nobody() -> Acks {
        Acks { members: BTreeSet::new(), acks: 0 }
    }

    /// Whether every commit that waited for these has been acknowledged by enough of those.
    fn implies(&self, other: &Acks) -> bool {
        let elsewhere = self.members.difference(&other.members).count();
        other.acks == 0 || u64::from(self.acks) >= u64::from(other.acks) + elsewhere as u64
    }

    /// What holds when each commit waited for these or for those, or for a mixture: any of them that count, and the lesser number.
    fn or(&self, other: &Acks) -> Acks {
        match self.acks.min(other.acks) {
            0 => Acks::nobody(),
            acks => Acks { members: self.members.union(&other.members).cloned().collect(), acks },
        }
    }
}

impl SyncRecord {
    /// Whether a member that is not behind any of those seen, itself among them, has every acknowledged commit: the leader has, and of so
    /// many others at least one has.
    pub fn holds_all<'a>(&self, seen: impl Iterator<Item = &'a MemberName> + Clone) -> bool {
        let of_members = seen.clone().filter(|name| self.members.contains(*name)).count();
        let enough = self.members.len() - usize::from(mutant(Mutant::OneFewerSeen));
        seen.clone().any(|name| *name == self.leader) || of_members + self.copies as usize > enough
    }

    fn new(leader: &MemberName, epoch: Epoch, acks: &Acks) -> SyncRecord {
        let members: BTreeSet<MemberName> = acks.members.iter().chain([leader]).cloned().collect();
        // For more than there are every commit waits for ever.
        let copies = acks.acks.saturating_add(1).min(u32::try_from(members.len()).unwrap_or(u32::MAX));
        SyncRecord { leader: leader.clone(), epoch, members, copies }
    }

    /// What makes commits wait for whom this says. None = for nobody.
    pub fn names(&self) -> Option<Names> {
        Some(self.acks()).filter(|acks| acks.acks > 0).map(Names::Any)
    }

    /// Whom commits waited for, the leader's own copy not counted.
    fn acks(&self) -> Acks {
        match self.copies.saturating_sub(1) {
            0 => Acks::nobody(),
            acks => Acks { members: self.members.iter().filter(|name| **name != self.leader).cloned().collect(), acks },
        }
    }
}

/// Where to go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Goal {
    /// Nothing is promised and nobody waits.
    Async,
    /// Commits wait for these; for nobody when it is empty: then only the leader has everything, and only it may lead.
    Acks(Acks),
    /// As it is: what the spec asks for cannot be in force yet.
    Stay,
    /// There are fewer than so many to wait for, and the spec says that commits wait all the same. Names that ask for as many stay.
    Wait(u32),
}

/// The next thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// All is as it should be.
    Done,
    /// Write `sync` under our epoch, over the revision that this was judged on. None = delete it.
    Record(Option<SyncRecord>),
    /// Set the names and prove that new processes have them; from [`Names::Nobody`], or from what is not known, also that backends wait:
    /// that the checkpointer has read these names, since a backend may wait by those of before which are about to be emptied.
    Names(Names),
    /// Nothing can be done before something is seen: a sentence.
    Wait(String),
}

/// What this leadership knows of what PostgreSQL goes by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct InForce {
    /// What every new process reads. None = it is not known.
    set: Option<Names>,
    /// What some walsender may still go by.
    earlier: Vec<Names>,
    /// A goal, and the WAL position that was written when no walsender could release short of it any more.
    written: Option<(Acks, Lsn)>,
}

impl InForce {
    /// A server whose names were set before it took connections, or before it could acknowledge anything.
    pub fn since_start(names: Names) -> InForce {
        InForce { set: Some(names), ..InForce::default() }
    }

    /// A server that runs, of which only the record is known. By the invariant commits wait for at least as many as it says; but who counts
    /// may be more than its members: anybody who is connected, or declared.
    pub fn unknown(record: Option<&SyncRecord>, anybody: BTreeSet<MemberName>) -> InForce {
        let acks = match record.map_or(0, |record| record.copies.saturating_sub(1)) {
            0 => Acks::nobody(),
            acks => Acks { members: anybody, acks },
        };
        let may_not_wait = (acks.acks == 0).then_some(Names::Nobody);
        InForce {
            set: None,
            earlier: [Names::Any(acks.clone()), Names::First(acks)].into_iter().chain(may_not_wait).collect(),
            written: None,
        }
    }

    /// What every new process reads, if it is known.
    pub fn set(&self) -> Option<&Names> {
        self.set.as_ref()
    }

    /// The names are about to be set: from now on some walsender may go by them, whatever comes of it.
    pub fn ordered(&mut self, names: &Names) {
        let before = self.set.take();
        self.add(before.into_iter().chain([names.clone()]).collect());
        let still = self.written.as_ref().is_some_and(|(goal, _)| self.goes_by(goal));
        self.written = self.written.take().filter(|_| still);
    }

    /// They were set, new processes are seen to have them, and backends wait unless these are [`Names::Nobody`].
    pub fn took(&mut self, names: Names) {
        // Nobody is released by these: backends are proved to wait, and Block has no walsender.
        self.earlier.retain(|earlier| *earlier != names && !matches!(earlier, Names::Nobody | Names::Block));
        if mutant(Mutant::WalsendersNotSeen) {
            self.earlier.clear();
        }
        self.set = Some(names);
    }

    /// Somebody else set other names, unseen: what new processes read is not known, and what some read before may be anything.
    pub fn forget(&mut self) {
        let before = self.set.take();
        self.add(before.into_iter().chain([Names::Nobody]).collect());
        self.written = None;
    }

    /// Whatever some process may go by lets nobody go, or is this.
    pub fn is_at_most(&self, names: &Names) -> bool {
        self.earlier.iter().chain(&self.set).all(|each| *each == Names::Block || each == names)
    }

    /// Some walsender may count this one.
    pub fn names(&self, name: &MemberName) -> bool {
        self.earlier.iter().chain(&self.set).filter_map(Names::acks).any(|acks| acks.members.contains(name))
    }

    /// Some backend may go by empty names, and wait for nobody.
    pub fn may_not_wait(&self) -> bool {
        self.earlier.iter().chain(&self.set).any(|names| *names == Names::Nobody)
    }

    /// Whether commits go through when these standbys flush what is written.
    pub fn is_served_by(&self, standbys: &Standbys) -> bool {
        let are_there = |acks: &Acks| acks.members.iter().filter(|name| standbys.counts(name)).count() >= acks.acks as usize;
        self.earlier.iter().chain(&self.set).all(|names| *names != Names::Block && names.acks().is_none_or(are_there))
    }

    /// What is set, or was and may be read still, does not make every commit wait for so many.
    fn may_release_for_fewer(&self, asked: u32) -> bool {
        let fewer = self.may_not_wait() || self.least().is_some_and(|least| least < asked);
        fewer && self.set != Some(Names::Block)
    }

    fn add(&mut self, more: Vec<Names>) {
        for names in more {
            if !self.earlier.contains(&names) {
                self.earlier.push(names);
            }
        }
        while self.earlier.len() > EARLIER_MAX {
            let is_any = |names: &Names| matches!(names, Names::Any(_));
            let is_first = |names: &Names| matches!(names, Names::First(_));
            let merged = merge_two(&mut self.earlier, is_any, Names::Any) || merge_two(&mut self.earlier, is_first, Names::First);
            if !merged {
                break;
            }
        }
    }

    /// Takes in what the server showed: who goes by what, and how far the WAL was written just then, asked for after that.
    pub fn seen(&mut self, senders: &[Sender], write_lsn: Lsn, goal: &Goal) {
        let Some(set) = self.set.clone() else { return };
        if senders.iter().all(|sender| shows(&set, sender)) {
            self.earlier.retain(|earlier| !is_replaced(earlier, &set));
        }
        let Goal::Acks(goal) = goal else {
            self.written = None;
            return;
        };
        if self.written.as_ref().is_none_or(|(of, _)| of != goal) {
            self.written = self.goes_by(goal).then(|| (goal.clone(), write_lsn));
        }
    }

    /// All that may be in force at once: those who may count, and the least number. None = nothing is released.
    fn loosest(&self) -> Option<Acks> {
        let all = self.earlier.iter().chain(&self.set).filter_map(|names| match names {
            Names::Block => None,
            Names::Nobody => Some(Acks::nobody()),
            Names::Any(acks) | Names::First(acks) => Some(acks.clone()),
        });
        all.reduce(|a, b| a.or(&b))
    }

    /// Whether whatever may be in force waits for enough of these.
    fn goes_by(&self, goal: &Acks) -> bool {
        self.loosest().is_none_or(|loosest| loosest.implies(goal))
    }

    /// The least number that a walsender may release for.
    fn least(&self) -> Option<u32> {
        self.earlier.iter().chain(&self.set).filter_map(Names::acks).map(|acks| acks.acks).min()
    }
}

/// Counts two of one kind as what both allow.
fn merge_two(earlier: &mut Vec<Names>, kind: impl Fn(&Names) -> bool, make: impl Fn(Acks) -> Names) -> bool {
    let at: Vec<usize> = (0..earlier.len()).filter(|index| kind(&earlier[*index])).take(2).collect();
    let [first, second] = at[..] else { return false };
    let other = earlier.remove(second);
    let (Some(a), Some(b)) = (earlier[first].acks(), other.acks()) else { return false };
    earlier[first] = make(a.or(b));
    true
}

/// Whether a walsender shows that it has read these names; or, of one that shows the same under both, that it makes no difference who counts.
fn shows(names: &Names, sender: &Sender) -> bool {
    match names {
        Names::Nobody | Names::Block => sender.priority == 0,
        Names::Any(acks) => sender.priority == u32::from(acks.members.contains(&sender.member)),
        Names::First(acks) => (sender.priority > 1) == acks.members.contains(&sender.member) && sender.priority != 1,
    }
}

/// Whether nothing is left of `earlier` once all walsenders show `set`: one that shows 0 releases nobody; who counts is what they show; and
/// how many is seen only when the forms differ, and does not matter when it was as many before.
fn is_replaced(earlier: &Names, set: &Names) -> bool {
    match (earlier, set) {
        (_, Names::Nobody | Names::Block) | (Names::Block, _) => true,
        (Names::Any(_), Names::First(_)) | (Names::First(_), Names::Any(_)) => true,
        (Names::Any(earlier), Names::Any(set)) | (Names::First(earlier), Names::First(set)) => earlier.acks >= set.acks,
        // Backends are proved to wait when the names are set, not by what walsenders show.
        (Names::Nobody, Names::Any(_) | Names::First(_)) => false,
    }
}

/// What the step is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The leader.
    pub me: &'a MemberName,
    /// Its leadership.
    pub epoch: Epoch,
    /// `sync` as seen at a revision not before anything this leadership wrote, and when nothing that it sent can land any more: neither a
    /// write whose answer was lost, nor one of a daemon that was killed.
    pub record: Option<&'a SyncRecord>,
    /// Where to go.
    pub goal: &'a Goal,
    /// What PostgreSQL goes by.
    pub in_force: &'a InForce,
    /// The walsenders that bear the name of a member, also of one that is not declared any more: the names of before may count it.
    pub senders: &'a [Sender],
}

/// The next step, which may be taken at once; a crash before, within or after it leaves everything acknowledged where it can be found.
pub fn step(inputs: &Inputs<'_>) -> Step {
    if let Some(record) = inputs.record.filter(|record| record.leader != *inputs.me || record.epoch != inputs.epoch) {
        return Step::Record(Some(taken_over(inputs.me, inputs.epoch, record)));
    }
    match inputs.goal {
        Goal::Wait(asked) if inputs.in_force.may_release_for_fewer(*asked) => Step::Names(Names::Block),
        Goal::Stay | Goal::Wait(_) => Step::Done,
        Goal::Async if inputs.record.is_some() => Step::Record(None),
        Goal::Async if inputs.in_force.set() != Some(&Names::Nobody) => Step::Names(Names::Nobody),
        Goal::Async => Step::Done,
        Goal::Acks(goal) => towards(inputs, goal),
    }
}

/// The former leader's record under our name: it held everything, and so do we, who were let lead.
pub fn taken_over(me: &MemberName, epoch: Epoch, record: &SyncRecord) -> SyncRecord {
    let mut record = SyncRecord { leader: me.clone(), epoch, ..record.clone() };
    if record.members.insert(me.clone()) {
        record.copies += 1;
    }
    record
}

fn towards(inputs: &Inputs<'_>, goal: &Acks) -> Step {
    let in_force = inputs.in_force;
    let recorded = inputs.record.map(SyncRecord::acks);
    let record = |acks: &Acks| Step::Record(Some(SyncRecord::new(inputs.me, inputs.epoch, acks)));
    let as_wanted = inputs.record == Some(&SyncRecord::new(inputs.me, inputs.epoch, goal));
    let not_shown = || Step::Wait("not every walsender has been seen to go by the new synchronous_standby_names".to_owned());
    let Some(next) = next_names(in_force, recorded.as_ref(), goal) else { return not_shown() };
    let is_set = in_force.set.as_ref() == Some(&next);
    let mut then = in_force.clone();
    if !is_set {
        then.ordered(&next);
    }
    // What the next names would undo is not recorded: the record would be weakened for them and strengthened again without end.
    if !as_wanted && then.goes_by(goal) && is_reached(in_force, recorded.as_ref(), goal, inputs.senders) {
        return record(goal);
    }
    if is_set {
        return match (as_wanted, in_force.earlier.is_empty()) {
            (true, _) => Step::Done,
            (false, true) => Step::Wait("not enough standbys have flushed what was written when the names changed".to_owned()),
            (false, false) => not_shown(),
        };
    }
    match recorded {
        Some(recorded) if !then.goes_by(&recorded) && !mutant(Mutant::NamesBeforeRecord) => {
            record(&then.loosest().map_or(recorded.clone(), |loosest| recorded.or(&loosest)))
        }
        _ => Step::Names(next),
    }
}

/// Whether every acknowledged commit, and every one that may be from now on, has been acknowledged by enough of the goal.
fn is_reached(in_force: &InForce, recorded: Option<&Acks>, goal: &Acks, senders: &[Sender]) -> bool {
    if goal.acks == 0 {
        return true;
    }
    // What was set before this daemon came is known only as far as a record says it.
    let from_now_on = (in_force.set.is_some() || recorded.is_some()) && in_force.goes_by(goal);
    let before =
        recorded.is_some_and(|recorded| recorded.implies(goal)) || flushed(in_force, goal, senders) || mutant(Mutant::RecordBeforeFlush);
    from_now_on && before
}

/// Whether enough of the goal's members have flushed what was written when the names had taken effect.
fn flushed(in_force: &InForce, goal: &Acks, senders: &[Sender]) -> bool {
    let Some((_, written)) = in_force.written.as_ref().filter(|(of, _)| of == goal) else { return false };
    let there = |name: &&MemberName| senders.iter().any(|sender| sender.member == **name && sender.streaming && sender.flush >= *written);
    goal.members.iter().filter(there).count() >= goal.acks as usize
}

/// What to set on the way to the goal. None = nothing before the walsenders show what is set.
fn next_names(in_force: &InForce, recorded: Option<&Acks>, goal: &Acks) -> Option<Names> {
    if goal.acks == 0 {
        return Some(Names::Nobody);
    }
    let Some(set) = &in_force.set else {
        // What is known of it is the record: no more of them than it says, and nobody who is not to count, since one that is ahead would.
        // Without a record, the only form that walsenders show without doubt.
        let known = |acks: &Acks| Names::Any(Acks { members: goal.members.clone(), acks: acks.acks.min(goal.acks) });
        return Some(recorded.filter(|acks| acks.acks > 0).map_or(Names::Nobody, known));
    };
    if in_force.least().is_none_or(|least| least >= goal.acks) {
        return Some(Names::Any(goal.clone()));
    }
    match set {
        _ if !in_force.earlier.is_empty() => None,
        Names::First(acks) => Some(Names::Any(acks.clone())),
        Names::Any(_) | Names::Nobody | Names::Block => Some(Names::First(goal.clone())),
    }
}

#[cfg(test)]
mod tests;
