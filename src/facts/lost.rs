//! WAL that only one member had, as it is told: in its member key, in events, to people.

use serde::{Deserialize, Serialize};

use crate::types::{Lsn, TimelineId};

/// WAL that one member had and nobody else has: it was taken away from its data directory, and is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostWrites {
    /// Wall-clock RFC 3339: for people only.
    pub at: String,
    /// The timeline it begins on.
    pub timeline: TimelineId,
    /// From where.
    pub from: Lsn,
    /// To where: the start of its last record.
    pub to: Lsn,
    /// So much of it.
    pub bytes: u64,
    /// Transactions that were committed in it; None = they could not be counted.
    pub transactions: Option<u64>,
    /// When the first of them was committed, by that server's wall clock.
    pub first_commit: Option<String>,
    /// When the last one was.
    pub last_commit: Option<String>,
    /// Where it is kept on that host.
    pub kept: String,
    /// Why it is nobody else's.
    pub why: String,
}
