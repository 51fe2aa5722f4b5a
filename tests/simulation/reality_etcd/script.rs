//! The language of the scripts: what is done, with everything that etcd numbers called by a name, and what was said to it.

use std::time::Duration;

/// A lease by the name that the script gives it; one that was never granted is one that etcd does not know.
pub type Lease = u8;
/// A lock that the script has won: 0 = the last one, 1 = the one before. One that it never won is an epoch that never was.
pub type Lock = usize;

pub struct Script {
    pub name: String,
    pub steps: Vec<Step>,
}

/// What a revision is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    /// The last look, just before.
    Now,
    /// The look that [`Step::Remember`] took.
    Before,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Grant {
        lease: Lease,
        ttl_s: u64,
    },
    KeepAlive {
        lease: Lease,
    },
    GrantedTtl {
        lease: Lease,
    },
    Revoke {
        lease: Lease,
    },
    /// Nobody renews it until it is gone.
    RunOut {
        lease: Lease,
    },
    /// Half its ttl goes by.
    Halfway {
        lease: Lease,
    },
    /// A keepalive just after its ttl, which etcd may not have noticed yet.
    KeepAliveLate {
        lease: Lease,
    },
    Put {
        member: &'static str,
        lease: Lease,
        run: u64,
    },
    /// Over what was remembered; what was read meanwhile is not looked at.
    PutOver {
        member: &'static str,
        lease: Lease,
        run: u64,
    },
    Claim {
        member: &'static str,
        lease: Lease,
    },
    GiveUp {
        lease: Lease,
    },
    Remember,
    Acquire {
        member: &'static str,
        lease: Lease,
        judged: Judged,
        initialize: Option<u64>,
    },
    /// The transaction after a keepalive. With another lease than the lock was taken on, if one is named.
    Prove {
        lock: Lock,
        on: Option<Lease>,
    },
    Status {
        lock: Lock,
        lsn: u64,
    },
    RecordPromotion {
        lock: Lock,
    },
    Failsafe {
        lock: Lock,
        judged: Judged,
        members: &'static [&'static str],
    },
    Release {
        lock: Lock,
        record: bool,
    },
    /// The lock's key is written again.
    Reaffirm {
        member: &'static str,
        lock: Lock,
    },
    Move {
        member: &'static str,
        lock: Option<Lock>,
        from: Lease,
        to: Lease,
    },
    /// A request, on a lease of this name.
    Ask {
        request: Lease,
        ttl_s: u64,
    },
    Answer {
        request: Lease,
        judged: Judged,
        word: &'static str,
    },
    ClearRequest {
        request: Lease,
    },
    ByHand(Hand),
    /// etcd's leader hands over, and nobody is down.
    LeaderMoves,
    /// etcd's leader is killed, and comes back.
    LeaderKilled,
}

/// What somebody does with `etcdctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hand {
    Delete(Thing),
    PutLeader { holder: &'static str, on: Option<Lease> },
    PutSync,
    PutInitialize(u64),
    Pause,
    Wipe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thing {
    Leader,
    Member(&'static str),
    Release,
    Status,
    Sync,
    Failsafe,
    Initialize,
    History,
    Maintenance,
}

impl Thing {
    pub const ALL: [Thing; 10] = [
        Thing::Leader,
        Thing::Member("a"),
        Thing::Member("b"),
        Thing::Release,
        Thing::Status,
        Thing::Sync,
        Thing::Failsafe,
        Thing::Initialize,
        Thing::History,
        Thing::Maintenance,
    ];
}

/// An answer, with names and counted revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Nothing,
    Did(bool),
    /// Seconds; None = there is no such lease.
    Ttl(Option<u64>),
    Written,
    /// On which lease, by number.
    Foreign(i64),
    Moved,
    NoLease,
    /// Under which epoch.
    Ours(i64),
    Beaten,
    At(Option<i64>),
    RanOut(Option<Life>),
    /// Whether etcd's term went up.
    TermRose(bool),
}

/// How long a lease lived after it was last renewed, as far as that can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub promised: Duration,
    pub least: Duration,
    pub most: Duration,
}
