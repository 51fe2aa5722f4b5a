//! The states. A state names what the member works towards; a state asks for its idempotent action again until the result is seen.

use crate::clock::BootTime;
use crate::facts::requests::StageTime;
use crate::types::{LockIdentity, MemberName, TimelineId};

/// Where a member is. Superstates (bootstrapping, running, standby, leading) are in [`super::node`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing is known yet: guard, etcd, spec, lease and data directory are being asked.
    Starting,
    /// Not in `spec.members`: serve health, touch nothing.
    Undeclared,
    /// Empty data directory, and nobody to copy from.
    AwaitingLeader,
    /// The first member: initdb, then the first lock.
    Initializing,
    /// Copying the leader.
    Cloning,
    /// A standby, or on the way to be one.
    Following,
    /// A standby that saw the lock absent and may run for it.
    Candidate,
    /// PostgreSQL is down; how to get back behind the leader is being judged and done.
    Rejoining,
    /// The lock is ours; PostgreSQL is to come out of recovery.
    Promoting {
        /// How.
        promotion: Promotion,
    },
    /// The lock is ours and PostgreSQL takes writes.
    Primary,
    /// A planned end of leadership.
    HandingOver {
        /// How far.
        hand_over: HandOver,
    },
    /// PostgreSQL is started again under the lock because an operator asked. How far that is: [`super::requests::Restart`].
    Restarting,
    /// PostgreSQL must end, proved, before anything else.
    Demoting {
        /// Why, and what then.
        demotion: Demotion,
    },
    /// Maintenance mode: nothing is started, stopped, copied or elected here.
    Paused,
    /// On the way out.
    Stopping,
}

/// How a member that won the lock becomes writable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promotion {
    /// Under which lock.
    pub lock: LockIdentity,
    /// By promotion of a running standby, or by a start in place on the timeline it has.
    pub way: Way,
    /// When it began.
    pub since: BootTime,
}

/// See [`Promotion::way`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `pg_promote` onto a reserved timeline.
    Promote {
        /// The reserved id.
        timeline: TimelineId,
    },
    /// Start (again) as a primary on the timeline the data directory is on: after initdb, a crash or fencing, under an unbroken
    /// leadership.
    StartInPlace,
}

/// A planned end of leadership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandOver {
    /// Under which lock.
    pub lock: LockIdentity,
    /// To whom; None = to the best.
    pub to: Option<MemberName>,
    /// The request that asked for it; None = the daemon is being stopped.
    pub request: Option<String>,
    /// When it began.
    pub since: BootTime,
    /// How far it got.
    pub stage: HandOverStage,
    /// When that began.
    pub stage_since: BootTime,
    /// How long the stages before took.
    pub stages: Vec<StageTime>,
}

/// Stages of a hand-over, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOverStage {
    /// A checkpoint makes the stop short.
    Checkpoint,
    /// PostgreSQL is being stopped.
    Stop,
    /// The successor has to have the shutdown checkpoint.
    Wait {
        /// When PostgreSQL was seen to be down.
        since: BootTime,
    },
    /// The lock is being deleted.
    Release,
}

impl HandOverStage {
    /// For people, and for programs that read how far a request got.
    pub const fn name(self) -> &'static str {
        match self {
            HandOverStage::Checkpoint => "checkpoint",
            HandOverStage::Stop => "stop",
            HandOverStage::Wait { .. } => "successor",
            HandOverStage::Release => "release",
        }
    }
}

impl HandOver {
    /// At the beginning.
    pub fn new(lock: LockIdentity, to: Option<MemberName>, request: Option<String>, now: BootTime) -> Self {
        HandOver { lock, to, request, since: now, stage: HandOverStage::Checkpoint, stage_since: now, stages: Vec::new() }
    }

    /// Goes to another stage, and books how long this one took. One that is entered again goes on.
    pub fn enter(&mut self, stage: HandOverStage, now: BootTime) {
        StageTime::book(&mut self.stages, self.stage.name(), now.since(self.stage_since));
        (self.stage, self.stage_since) = (stage, now);
    }
}

/// Why PostgreSQL has to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demotion {
    /// A sentence.
    pub why: String,
    /// The lock, if it may still be ours when PostgreSQL has ended: then it is given back, or PostgreSQL starts again under it.
    pub then: Then,
}

/// What follows the proof of death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The lock is not ours: follow.
    Follow,
    /// The lock is still ours: give it back, another leads.
    Release(LockIdentity),
    /// The lock may still be ours: start again under it if it is proved, otherwise follow.
    StartAgain(LockIdentity),
}

enumerated! {
    /// The states by name only: what the tables of edges and reactions are over.
    StateKind {
        /// [`State::Starting`].
        Starting,
        /// [`State::Undeclared`].
        Undeclared,
        /// [`State::AwaitingLeader`].
        AwaitingLeader,
        /// [`State::Initializing`].
        Initializing,
        /// [`State::Cloning`].
        Cloning,
        /// [`State::Following`].
        Following,
        /// [`State::Candidate`].
        Candidate,
        /// [`State::Rejoining`].
        Rejoining,
        /// [`State::Promoting`].
        Promoting,
        /// [`State::Primary`].
        Primary,
        /// [`State::HandingOver`].
        HandingOver,
        /// [`State::Restarting`].
        Restarting,
        /// [`State::Demoting`].
        Demoting,
        /// [`State::Paused`].
        Paused,
        /// [`State::Stopping`].
        Stopping,
    }
}

impl StateKind {
    /// The name, as edges, logs and member keys have it.
    pub const fn name(self) -> &'static str {
        match self {
            StateKind::Starting => "starting",
            StateKind::Undeclared => "undeclared",
            StateKind::AwaitingLeader => "awaiting_leader",
            StateKind::Initializing => "initializing",
            StateKind::Cloning => "cloning",
            StateKind::Following => "following",
            StateKind::Candidate => "candidate",
            StateKind::Rejoining => "rejoining",
            StateKind::Promoting => "promoting",
            StateKind::Primary => "primary",
            StateKind::HandingOver => "handing_over",
            StateKind::Restarting => "restarting",
            StateKind::Demoting => "demoting",
            StateKind::Paused => "paused",
            StateKind::Stopping => "stopping",
        }
    }
}

impl From<&State> for StateKind {
    fn from(state: &State) -> Self {
        match state {
            State::Starting => StateKind::Starting,
            State::Undeclared => StateKind::Undeclared,
            State::AwaitingLeader => StateKind::AwaitingLeader,
            State::Initializing => StateKind::Initializing,
            State::Cloning => StateKind::Cloning,
            State::Following => StateKind::Following,
            State::Candidate => StateKind::Candidate,
            State::Rejoining => StateKind::Rejoining,
            State::Promoting { .. } => StateKind::Promoting,
            State::Primary => StateKind::Primary,
            State::HandingOver { .. } => StateKind::HandingOver,
            State::Restarting => StateKind::Restarting,
            State::Demoting { .. } => StateKind::Demoting,
            State::Paused => StateKind::Paused,
            State::Stopping => StateKind::Stopping,
        }
    }
}

impl State {
    /// Names of all leaf states.
    pub const NAMES: [&'static str; StateKind::ALL.len()] = {
        let mut names = [""; StateKind::ALL.len()];
        let mut at = 0;
        while at < names.len() {
            names[at] = StateKind::ALL[at].name();
            at += 1;
        }
        names
    };

    /// The leaf's name.
    pub fn name(&self) -> &'static str {
        StateKind::from(self).name()
    }

    /// PostgreSQL has been ordered to end, or has ended already on the way out of a leadership.
    pub fn ends_postgres(&self) -> bool {
        match self {
            State::Demoting { .. } | State::Stopping => true,
            State::HandingOver { hand_over } => hand_over.stage != HandOverStage::Checkpoint,
            _ => false,
        }
    }

    /// Promoting, Primary, HandingOver or Restarting.
    pub fn is_leading(&self) -> bool {
        matches!(self, State::Promoting { .. } | State::Primary | State::HandingOver { .. } | State::Restarting)
    }
}
