//! What routing goes by: what each member says that it serves, and how the servers of an HAProxy stand.

use serde::{Deserialize, Serialize};

use crate::types::MemberName;

/// What a member serves. None = it does not know itself, or nobody has heard it: that is not "no".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Serves {
    /// Takes writes, under a lock that is proved to be its own.
    pub primary: Option<bool>,
    /// Serves reads as a standby.
    pub replica: Option<bool>,
}

/// `/pgherd/serves`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServesAnswer {
    /// Who answers: an address can have moved to another member.
    pub member: MemberName,
    /// What it says.
    #[serde(flatten)]
    pub serves: Serves,
    /// Age of what it knows, in ms.
    pub age_ms: u64,
}

/// A backend of HAProxy, by the names of the reference deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// Writes, checked by `/master` or `/primary`.
    Primary,
    /// Reads, checked by `/replica`.
    Standby,
}

impl Backend {
    /// Both.
    pub const ALL: [Backend; 2] = [Backend::Primary, Backend::Standby];

    /// Its name in HAProxy's file.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Primary => "primary",
            Backend::Standby => "standby",
        }
    }
}

/// A server of a backend; it has the name of the member that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The backend it is in.
    pub backend: Backend,
    /// The member.
    pub member: MemberName,
    /// How HAProxy has it.
    pub state: ServerState,
}

/// How HAProxy has a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerState {
    /// Gets sessions.
    Up,
    /// Gets none.
    Down,
    /// In maintenance or drained, by somebody's hand.
    ByHand,
    /// No check of HAProxy's own runs on it.
    Unchecked,
}
