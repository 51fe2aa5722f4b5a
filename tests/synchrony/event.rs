//! What happens from one world to the next, and how it is told.

use crate::bits::{ASYNC, Code, GONE, STAY, count_of, members_of, names, record};
use crate::world::World;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Goal,
    Killed,
    KilledWriting,
    LandsLate,
    Fails,
    FailsAfterAll,
    Proved,
    Probed,
    Records,
    Sets,
    Written,
    CheckpointerReads,
    CheckpointerLetsGo,
    Connects,
    Reads,
    Gone,
    Flushes,
    Acknowledged,
    Leads,
    LeadsWithout,
}

/// What happens without any bug.
pub const KINDS: [Kind; 18] = [
    Kind::Goal,
    Kind::Killed,
    Kind::Fails,
    Kind::FailsAfterAll,
    Kind::Proved,
    Kind::Probed,
    Kind::Records,
    Kind::Sets,
    Kind::Written,
    Kind::CheckpointerReads,
    Kind::CheckpointerLetsGo,
    Kind::Connects,
    Kind::Reads,
    Kind::Gone,
    Kind::Flushes,
    Kind::Acknowledged,
    Kind::Leads,
    Kind::LeadsWithout,
];

/// With the goal, the names, the record or the number of the standby that it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event(pub Kind, pub Code);

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Event(kind, what) = *self;
        match kind {
            Kind::Goal => write!(f, "the goal is {}", goal_text(what)),
            Kind::Killed => write!(f, "the daemon is killed and another takes over"),
            Kind::KilledWriting => write!(f, "the daemon is killed with this on its way to etcd: {}", record_text(what)),
            Kind::LandsLate => write!(f, "etcd has what the killed daemon wrote"),
            Kind::Fails => write!(f, "setting {} fails before anything of it is done", names_text(what)),
            Kind::FailsAfterAll => write!(f, "the proof fails"),
            Kind::Proved => write!(f, "the names are proved"),
            Kind::Probed => write!(f, "the walsenders are looked at"),
            Kind::Records => write!(f, "etcd has {}", record_text(what)),
            Kind::Sets => write!(f, "the names are {}", names_text(what)),
            Kind::Written => write!(f, "the commit is written"),
            Kind::CheckpointerReads => write!(f, "the checkpointer reads the names"),
            Kind::CheckpointerLetsGo => write!(f, "the checkpointer lets everybody go"),
            Kind::Connects => write!(f, "n{what} connects"),
            Kind::Reads => write!(f, "the walsender of n{what} reads the names"),
            Kind::Gone => write!(f, "n{what} is gone"),
            Kind::Flushes => write!(f, "n{what} flushes the commit"),
            Kind::Acknowledged => write!(f, "the commit is acknowledged"),
            Kind::Leads | Kind::LeadsWithout if what == 0 => write!(f, "n0 crashes and leads again"),
            Kind::Leads => write!(f, "n{what} leads (n0 from now on, and the former leader n{what})"),
            Kind::LeadsWithout => write!(f, "n{what} leads without the commit (n0 from now on, and the former leader n{what})"),
        }
    }
}

pub fn goal_text(goal: Code) -> String {
    match goal {
        ASYNC => "async".to_owned(),
        STAY => "to stay".to_owned(),
        _ => format!("{} of {}", count_of(goal), members_text(members_of(goal))),
    }
}

fn members_text(members: u8) -> String {
    let text: Vec<String> = (0..5).filter(|index| members >> index & 1 == 1).map(|index| format!("n{index}")).collect();
    format!("{{{}}}", text.join(" "))
}

fn names_text(code: Code) -> String {
    if code == GONE { "gone".to_owned() } else { format!("`{}`", names(code)) }
}

fn record_text(code: Code) -> String {
    let text = |record: pgherd::facts::synchrony::SyncRecord| {
        format!("{} of {} under {}", record.copies, members_text(members_of(code)), record.leader)
    };
    record(code).map_or("no record".to_owned(), text)
}

impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let senders: Vec<String> = self.senders.iter().map(|code| names_text(*code)).collect();
        let acknowledged = if self.acknowledged { "an acknowledged" } else { "the" };
        write!(f, "the goal is {}, etcd has {}, ", goal_text(self.goal), record_text(self.record))?;
        write!(f, "the names are {}, the walsenders go by {}, ", names_text(self.file), senders.join(", "))?;
        write!(f, "{acknowledged} commit is on {}", members_text(self.holders))
    }
}
