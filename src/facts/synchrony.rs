//! Who may hold every acknowledged commit: what etcd's `sync` says, and what PostgreSQL was told.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::types::{Epoch, Lsn, MemberName};

/// What a member key's `features` says when its daemon looks at `sync` before it runs for the lock.
pub const FEATURE: &str = "synchrony";

/// `sync`: every acknowledged commit is on at least `copies` of `members`, and on `leader`. Without the key nothing is promised.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SyncRecord {
    /// Who wrote it, and holds everything.
    pub leader: MemberName,
    /// The leadership that it was written under.
    pub epoch: Epoch,
    /// Who may hold a commit, the leader among them.
    pub members: BTreeSet<MemberName>,
    /// How many of them do at least, the leader counted.
    pub copies: u32,
}

impl SyncRecord {
    /// Commits wait for this standby, or may be released by it.
    pub fn is_standby(&self, name: &MemberName) -> bool {
        self.copies > 1 && *name != self.leader && self.members.contains(name)
    }
}

/// `synchronous_standby_names` as pgherd sets it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Names {
    /// Empty: no commit waits.
    #[default]
    Nobody,
    /// A name that no member can have: every commit waits.
    Block,
    /// `ANY acks (members)`: each walsender in it shows the priority 1.
    Any(Acks),
    /// `FIRST acks (nobody, members)`: each walsender in it shows a priority above 1. Passed through when `acks` grows, since that is how a
    /// walsender shows that it has read it.
    First(Acks),
}

/// So many of these acknowledge a commit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Acks {
    /// Standbys.
    pub members: BTreeSet<MemberName>,
    /// How many of them.
    pub acks: u32,
}

/// A name that is no member's: [`MemberName`] knows no colon.
const PLACEHOLDER: &str = "pgherd:nobody";

impl Names {
    /// Whom commits wait for; None = all wait, or none does.
    pub fn acks(&self) -> Option<&Acks> {
        match self {
            Names::Nobody | Names::Block => None,
            Names::Any(acks) | Names::First(acks) => Some(acks),
        }
    }
}

/// As PostgreSQL reads it (manual, "synchronous_standby_names").
impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |acks: &Acks| acks.members.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        match self {
            Names::Nobody => Ok(()),
            Names::Block => write!(f, "ANY 1 (\"{PLACEHOLDER}\")"),
            Names::Any(acks) => write!(f, "ANY {} ({})", acks.acks, list(acks)),
            Names::First(acks) => write!(f, "FIRST {} (\"{PLACEHOLDER}\", {})", acks.acks, list(acks)),
        }
    }
}

/// A walsender of a standby that has the name of a member, as pg_stat_replication shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender {
    /// The standby.
    pub member: MemberName,
    /// `sync_priority`: what the walsender itself made of the names when it read them last. 0 = it releases nobody.
    pub priority: u32,
    /// Flushed by the standby.
    pub flush: Lsn,
    /// The state is `streaming`.
    pub streaming: bool,
}
