//! What this member knows of what operators asked for, beyond what etcd says. Decides nothing: the rules do.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::BootTime;
use crate::facts::guard::StartId;
use crate::facts::postgres::Survey;
use crate::facts::requests::{RequestProgress, StageTime};
use crate::types::{Epoch, MemberName};

use super::event::{Configured, Failure};

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Requests {
    /// The open requests, and when this member saw each first while it led; of one for a later time, when it saw that its time had come.
    pub seen: BTreeMap<String, BootTime>,
    /// Those that this run of the daemon took up.
    pub claimed: BTreeSet<String>,
    /// Those that it has acted on: each is tried once.
    pub tried: BTreeSet<String>,
    /// The wall clock, and when it was read: seconds since 1970.
    pub wall: Option<(BootTime, u64)>,
    /// When PostgreSQL was last asked what is under way on it.
    pub survey_asked: BootTime,
    /// What it said, and when it was asked.
    pub survey: Option<(BootTime, Survey)>,
    /// How the last hand-over ended.
    pub handed_over: Option<HandedOver>,
    /// A new copy of this member that an operator ordered.
    pub reinit: Option<Reinit>,
    /// The restart of its own PostgreSQL that this member is about, until its answer is seen in etcd.
    pub restart: Option<Restart>,
    /// The files that it was asked to write again, until the answer is seen in etcd.
    pub reload: Option<Reload>,
}

impl Requests {
    /// The wall clock as of now. None = it was not read.
    pub fn wall_now_s(&self, now: BootTime) -> Option<u64> {
        self.wall.map(|(read, since_1970_s)| since_1970_s.saturating_add(now.since(read).as_secs()))
    }

    /// A copy has taken the data directory's place.
    pub(super) fn copy_is_there(&mut self, now: BootTime) {
        if let Some(reinit) = self.reinit.as_mut().filter(|reinit| reinit.stage == ReinitStage::Copy) {
            reinit.enter(ReinitStage::Start, now);
        }
    }
}

impl Requests {
    /// The files are to be written although they are what is wanted.
    pub fn writes_anew(&self) -> bool {
        self.reload.as_ref().is_some_and(|reload| !reload.ordered && reload.end.is_none())
    }

    pub(super) fn files_are_written(&mut self) {
        if let Some(reload) = &mut self.reload {
            reload.ordered = true;
        }
    }

    pub(super) fn files_were_written(&mut self, me: &MemberName, result: &Result<Configured, Failure>) {
        let Some(reload) = self.reload.as_mut().filter(|reload| reload.ordered && reload.end.is_none()) else { return };
        let refused = |why: &str| RequestProgress::Refused { reason: format!("PostgreSQL of `{me}`: {why}") };
        reload.end = Some(match result {
            Ok(Configured::Taken) => RequestProgress::Done { message: format!("`{me}` has taken up its files"), stages: Vec::new() },
            Ok(Configured::PutBack(why)) => refused(&format!("it does not take the files, and those before are back: {why}")),
            Err(why) => refused(why),
        });
    }
}

/// A restart of this member's PostgreSQL that has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// The request that asked for it. None = somebody told the postmaster to stop.
    pub request: Option<String>,
    /// The start that is to end. None = the one that is still there when it begins to stop.
    pub was: Option<StartId>,
    /// It leads, and starts again under its lock.
    pub leads: bool,
    /// Commits waited for it, or could: how many copies of each there were. 0 = it did not count.
    pub copies: u32,
    /// How far behind the leader it was.
    pub lag: u64,
    /// When it began.
    pub since: BootTime,
    /// How far it got.
    pub stage: RestartStage,
    /// When that began.
    pub stage_since: BootTime,
    /// How long the stages before took.
    pub stages: Vec<StageTime>,
    /// How it ended.
    pub end: Option<RequestProgress>,
}

/// Stages of a restart, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartStage {
    /// A checkpoint makes the stop of a primary short.
    Checkpoint,
    /// PostgreSQL is being stopped.
    Stop,
    /// It is being started, until it takes connections.
    Start,
    /// It has to be what it was before: to take writes from everybody, or to stream and to be waited for.
    Return,
}

impl RestartStage {
    /// For people, and for programs that read how far a request got.
    pub const fn name(self) -> &'static str {
        match self {
            RestartStage::Checkpoint => "checkpoint",
            RestartStage::Stop => "stop",
            RestartStage::Start => "start",
            RestartStage::Return => "return",
        }
    }
}

impl Restart {
    /// Goes to another stage, and books how long this one took.
    pub fn enter(&mut self, stage: RestartStage, now: BootTime) {
        StageTime::book(&mut self.stages, self.stage.name(), now.since(self.stage_since));
        (self.stage, self.stage_since) = (stage, now);
    }
}

/// Files that are written again because somebody asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reload {
    /// The request that asked for it.
    pub request: String,
    /// When it was begun.
    pub since: BootTime,
    /// It was ordered: what is configured from here on answers it.
    pub ordered: bool,
    /// How it ended.
    pub end: Option<RequestProgress>,
}

/// How a hand-over ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandedOver {
    /// The request that asked for it.
    pub request: Option<String>,
    /// How long each stage took.
    pub stages: Vec<StageTime>,
    /// Why it was given up; None = the lock was released.
    pub given_up: Option<String>,
    /// When.
    pub at: BootTime,
}

/// An operator's order to copy this member anew, as far as it has got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reinit {
    /// The request.
    pub id: String,
    /// The leader is copied, and no other.
    pub from_leader: bool,
    /// The directory is emptied before the copy is made.
    pub in_place: bool,
    /// How far it got.
    pub stage: ReinitStage,
    /// When that began, in this run of the daemon.
    pub since: BootTime,
    /// How long the stages before took.
    pub stages: Vec<StageTime>,
    /// Since when `sync` has not counted on this member, its server being down; and under which leader.
    pub uncounted_since: Option<(Option<Epoch>, BootTime)>,
    /// Why it is given up: nothing of the directory was thrown away.
    pub given_up: Option<String>,
}

/// Stages of a new copy, in order. Their names are in the request in etcd: it is what the next run of the daemon goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReinitStage {
    /// Taken up; nothing is touched yet.
    Claimed,
    /// PostgreSQL is being stopped.
    Stop,
    /// `sync` has to name others in this member's place.
    Sync,
    /// The directory is being emptied.
    Empty,
    /// The copy is being made, and put in the directory's place.
    Copy,
    /// The copy is in place; it has to stream.
    Start,
}

impl ReinitStage {
    /// For people, and for the next run of the daemon.
    pub const fn name(self) -> &'static str {
        match self {
            ReinitStage::Claimed => "claimed",
            ReinitStage::Stop => "stop",
            ReinitStage::Sync => "sync",
            ReinitStage::Empty => "empty",
            ReinitStage::Copy => "copy",
            ReinitStage::Start => "start",
        }
    }

    /// Where the next run of the daemon goes on. What was begun and has not ended begins again; a copy that is in place is not made twice.
    pub fn resumed(name: &str) -> ReinitStage {
        match name {
            "claimed" => ReinitStage::Claimed,
            "start" => ReinitStage::Start,
            _ => ReinitStage::Stop,
        }
    }
}

impl Reinit {
    /// Goes to another stage, and books how long this one took. One that is entered again goes on.
    pub fn enter(&mut self, stage: ReinitStage, now: BootTime) {
        if self.stage != stage {
            StageTime::book(&mut self.stages, self.stage.name(), now.since(self.since));
            (self.stage, self.since) = (stage, now);
        }
    }
}
