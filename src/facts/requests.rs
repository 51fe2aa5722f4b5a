//! What operators ask the cluster for, as it stands in `requests/ID`, and how far it got.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{MemberName, Revision};

/// A request and its revision, for answering by compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// What was asked and how far it got.
    pub record: RequestRecord,
    /// Mod revision.
    pub mod_revision: Revision,
}

/// `requests/ID`. Hangs on a lease of its own (its expiry), so that nothing is taken up long after its requester gave up. What was taken up
/// stays until it is answered, whatever becomes of the requester; the answer stays for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// What is asked.
    pub ask: Ask,
    /// Who asks.
    pub by: String,
    /// Wall-clock RFC 3339: for people only.
    pub at: String,
    /// How far it got.
    pub progress: RequestProgress,
}

/// What an operator can ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Ask {
    /// Initialize the cluster on this member although not every member has reported an empty data directory.
    Bootstrap {
        /// Where.
        on: MemberName,
    },
    /// Hand the lock over.
    Switchover {
        /// To whom.
        to: MemberName,
    },
    /// Hand the lock over at a time. Hangs on no lease; whoever leads then carries it out.
    ScheduledSwitchover {
        /// To whom.
        to: MemberName,
        /// Seconds since 1970, by the leader's wall clock.
        at_s: u64,
    },
    /// Lead although the rules of the election say that WAL would be lost; only where nobody leads.
    Failover {
        /// Who.
        to: MemberName,
        /// How many bytes may be lost. None = nothing may: then it changes nothing.
        accept_loss: Option<u64>,
    },
    /// Say what a switchover would meet, and touch nothing. A kind of its own: a daemon that does not know it must not carry it out.
    CheckSwitchover {
        /// To whom; None = to the best.
        to: Option<MemberName>,
    },
    /// Start PostgreSQL of a member again. That member carries it out itself.
    Restart {
        /// Whose.
        on: MemberName,
        /// Only if it leads (true), or does not (false): who agreed to the restart of a standby did not agree to one of the primary.
        if_leader: Option<bool>,
        /// Only if a parameter waits for it.
        if_pending: bool,
        /// Not before, by that member's wall clock: seconds since 1970. Hangs on no lease then.
        at_s: Option<u64>,
    },
    /// Say what a restart of the primary would cut off, and touch nothing. Whoever leads answers.
    CheckRestart,
    /// Read secrets again, write PostgreSQL's files again, and have it read them. That member carries it out itself.
    Reload {
        /// Whose.
        on: MemberName,
    },
    /// Throw the data directory away and copy it anew. That member itself takes it up: it is its directory.
    Reinit {
        /// Whose.
        on: MemberName,
        /// The leader is copied, also where a member has the tag `clonefrom`.
        from_leader: bool,
        /// The directory is emptied before the copy is made: there is no room for both.
        in_place: bool,
    },
}

impl Ask {
    /// When it is to be carried out, if not at once: seconds since 1970.
    pub fn at_s(&self) -> Option<u64> {
        match self {
            Ask::ScheduledSwitchover { at_s, .. } => Some(*at_s),
            Ask::Restart { at_s, .. } => *at_s,
            Ask::Bootstrap { .. } | Ask::Switchover { .. } | Ask::Failover { .. } => None,
            Ask::CheckSwitchover { .. } | Ask::CheckRestart | Ask::Reload { .. } | Ask::Reinit { .. } => None,
        }
    }

    /// The member that carries this out on itself.
    pub fn of_member(&self) -> Option<&MemberName> {
        match self {
            Ask::Restart { on, .. } | Ask::Reload { on } => Some(on),
            Ask::Bootstrap { .. } | Ask::Switchover { .. } | Ask::ScheduledSwitchover { .. } | Ask::Failover { .. } => None,
            Ask::CheckSwitchover { .. } | Ask::CheckRestart | Ask::Reinit { .. } => None,
        }
    }
}

/// How far a request got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RequestProgress {
    /// Nobody has taken it up.
    Created,
    /// Being carried out.
    Claimed {
        /// By whom.
        by: MemberName,
        /// What happens now.
        stage: String,
        /// What is over, in order.
        #[serde(default)]
        stages: Vec<StageTime>,
    },
    /// Carried out.
    Done {
        /// What was achieved.
        message: String,
        /// How long each stage took, in order.
        #[serde(default)]
        stages: Vec<StageTime>,
    },
    /// What a switchover would meet.
    Judged {
        /// Those that could lead, the best first.
        candidates: Vec<Candidate>,
        /// What it costs, whoever leads.
        warnings: Vec<String>,
    },
    /// Not carried out.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// A member that the lock could be handed to, as the leader judges it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Who.
    pub name: MemberName,
    /// Why not. Empty = it can.
    pub obstacles: Vec<String>,
    /// What a person should know before.
    pub warnings: Vec<String>,
}

/// How long a stage of what was asked took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// Its name.
    pub stage: String,
    /// In milliseconds.
    pub ms: u64,
}

impl StageTime {
    /// Books how long a stage took. One that was entered again goes on.
    pub fn book(stages: &mut Vec<StageTime>, stage: &str, took: Duration) {
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        match stages.iter_mut().find(|known| known.stage == stage) {
            Some(known) => known.ms = known.ms.saturating_add(ms),
            None => stages.push(StageTime { stage: stage.to_owned(), ms }),
        }
    }
}

impl RequestProgress {
    /// Who is carrying it out.
    pub fn claimed_by(&self) -> Option<&MemberName> {
        match self {
            RequestProgress::Claimed { by, .. } => Some(by),
            RequestProgress::Created | RequestProgress::Done { .. } | RequestProgress::Judged { .. } | RequestProgress::Refused { .. } => {
                None
            }
        }
    }

    /// Nobody has answered it.
    pub fn is_open(&self) -> bool {
        matches!(self, RequestProgress::Created | RequestProgress::Claimed { .. })
    }
}
