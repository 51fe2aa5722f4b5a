//! What pgherd decides on, by relation: which position is before which other. A real server's positions and the model's have nothing in
//! common but that.

use std::cmp::Ordering;

use pgherd::facts::postgres::{ControlFacts, DatabaseState, SqlFacts};
use pgherd::policy::rejoin::{LastRecord, LeaderLineage, LocalWal, Rejoin};
use pgherd::types::{Lsn, TimelineId};

/// A stopped server's data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AtRest {
    pub state: DatabaseState,
    /// Of the control file's checkpoint.
    pub timeline: TimelineId,
    /// The checkpoint against the last record.
    pub checkpoint: Ordering,
    pub min_recovery_timeline: TimelineId,
    /// The minimum recovery end against the checkpoint; None = there is none.
    pub min_recovery_end: Option<Ordering>,
    /// Whether the minimum recovery end is past the start of the last record.
    pub must_recover_all: bool,
    /// That its WAL ends on.
    pub wal_timeline: TimelineId,
    pub parents: Option<Vec<TimelineId>>,
    /// The last record against the switch to its timeline; None = there was no switch.
    pub last_record: Option<Ordering>,
    pub standby_signal: bool,
    pub backup_label: bool,
}

impl AtRest {
    pub fn of(control: &ControlFacts, wal: &LocalWal) -> AtRest {
        let LastRecord::Known(last) = &wal.last_record else { panic!("where WAL ends could not be read: {wal:?}") };
        let switches = wal.history.as_ref().map(|history| history.0.as_slice());
        AtRest {
            state: control.state,
            timeline: control.timeline,
            checkpoint: control.checkpoint.cmp(last),
            min_recovery_timeline: control.min_recovery_timeline,
            min_recovery_end: (control.min_recovery_end > Lsn(0)).then(|| control.min_recovery_end.cmp(&control.checkpoint)),
            must_recover_all: control.min_recovery_end > *last,
            wal_timeline: wal.timeline,
            // Timeline 1 has no history file.
            parents: switches
                .map(|all| all.iter().map(|switch| switch.parent).collect())
                .or((wal.timeline == TimelineId(1)).then(Vec::new)),
            last_record: switches.and_then(|all| all.last()).map(|switch| last.cmp(&switch.at)),
            standby_signal: control.standby_signal,
            backup_label: control.backup_label,
        }
    }
}

/// A running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    pub in_recovery: bool,
    pub timeline: TimelineId,
    /// What was received since the start against what is replayed; None = nothing was.
    pub received: Option<Ordering>,
    pub replay_paused: bool,
    /// pg_stat_wal_receiver's word; None = no walreceiver.
    pub receiver: Option<String>,
    /// Who streams from here, and whether it has flushed all.
    pub replicas: Vec<(String, bool)>,
}

impl Running {
    pub fn of(facts: &SqlFacts) -> Running {
        let mut replicas: Vec<_> =
            facts.replicas.iter().map(|one| (one.application_name.clone(), one.flush_lsn >= Some(facts.receive_lsn))).collect();
        replicas.sort();
        Running {
            in_recovery: facts.in_recovery,
            timeline: facts.timeline,
            received: (facts.receive_lsn > Lsn(0)).then(|| facts.receive_lsn.cmp(&facts.replay_lsn)),
            replay_paused: facts.replay_paused,
            receiver: facts.walreceiver.as_ref().map(|receiver| receiver.status.clone()),
            replicas,
        }
    }
}

/// A decision about a rejoin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    pub follows: bool,
    /// The sentence, without its positions.
    pub why: String,
    /// The timeline of what is lost, and whether it begins at the end of the leader's share of it.
    pub lost: Option<(TimelineId, bool)>,
}

impl Judged {
    pub fn of(decided: &Rejoin, wal: &LocalWal, leader: &LeaderLineage) -> Judged {
        let (why, lost) = match decided {
            Rejoin::Follow => (String::new(), None),
            Rejoin::Clone { why, lost } => (why.clone(), *lost),
            Rejoin::Rewind { why, lost } => (why.clone(), Some(*lost)),
            Rejoin::Wait { why } | Rejoin::Refuse { why } => (why.clone(), None),
        };
        let positions = why.split(' ').map(|word| if word.contains('/') { "…" } else { word });
        Judged {
            follows: *decided == Rejoin::Follow,
            why: positions.collect::<Vec<_>>().join(" "),
            lost: lost.map(|lost| (lost.timeline, leader.history.left_at(wal.timeline) == Some(lost.from))),
        }
    }
}
