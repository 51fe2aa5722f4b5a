//! What this member knows of what operators asked for, beyond what etcd says. Decides nothing: the rules do.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::BootTime;
use crate::facts::postgres::Survey;
use crate::facts::requests::StageTime;

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
}

impl Requests {
    /// The wall clock as of now. None = it was not read.
    pub fn wall_now_s(&self, now: BootTime) -> Option<u64> {
        self.wall.map(|(read, since_1970_s)| since_1970_s.saturating_add(now.since(read).as_secs()))
    }
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
