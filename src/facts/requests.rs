//! What operators ask the cluster for, as it stands in `requests/ID`, and how far it got.

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

impl RequestProgress {
    /// Nobody has answered it.
    pub fn is_open(&self) -> bool {
        matches!(self, RequestProgress::Created | RequestProgress::Claimed { .. })
    }
}
