//! WAL as a tree of histories. What PostgreSQL compares (timeline and position) and what is really in it (who wrote it) are kept apart:
//! two promotions to one id from one point look the same to PostgreSQL and are not the same (SAFETY row 53).

use std::collections::BTreeSet;

use pgherd::facts::postgres::{ControlFacts, DatabaseState, StandbyFloor};
use pgherd::policy::rejoin::{LastRecord, LocalWal, OwnPromotion, Switch, TimelineHistory};
use pgherd::types::{Lsn, SystemId, TimelineId};

/// A transaction's record.
pub const RECORD_BYTES: u64 = 96;
/// A checkpoint's record.
pub const CHECKPOINT_BYTES: u64 = 120;

/// WAL that one promotion (or initdb) began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub timeline: TimelineId,
    pub start: Lsn,
    /// Which promotion: unique in a run.
    pub token: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wal {
    pub segments: Vec<Segment>,
    pub end: Lsn,
    /// Where the last record begins.
    pub last_record: Lsn,
}

impl Wal {
    pub fn timeline(&self) -> TimelineId {
        self.segments.last().map_or(TimelineId(0), |segment| segment.timeline)
    }

    pub fn token(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.token)
    }

    /// The timeline that a position is on.
    pub fn timeline_at(&self, at: Lsn) -> TimelineId {
        self.segments.iter().rev().find(|segment| segment.start <= at).map_or(TimelineId(1), |segment| segment.timeline)
    }

    pub fn append(&mut self, bytes: u64) -> Lsn {
        self.last_record = self.end;
        self.end = Lsn(self.end.0 + bytes);
        self.end
    }

    /// What the history file of the last timeline says.
    pub fn history(&self) -> TimelineHistory {
        let switches = self.segments.windows(2).map(|pair| Switch { parent: pair[0].timeline, at: pair[1].start, reason: String::new() });
        TimelineHistory(switches.collect())
    }

    /// How far the promotion `token` wrote in this history; None = it is not in it.
    pub fn extent_of(&self, token: u64) -> Option<Lsn> {
        let at = self.segments.iter().position(|segment| segment.token == token)?;
        Some(self.segments.get(at + 1).map_or(self.end, |next| next.start))
    }

    /// Truly: everything in here is in the other's past.
    pub fn is_in_the_past_of(&self, other: &Wal) -> bool {
        self.goes_into(other, |mine, theirs| mine == theirs)
    }

    /// As PostgreSQL sees it, which knows timelines and positions only.
    pub fn looks_like_the_past_of(&self, other: &Wal) -> bool {
        self.goes_into(other, |mine, theirs| (mine.timeline, mine.start) == (theirs.timeline, theirs.start))
    }

    fn goes_into(&self, other: &Wal, same: impl Fn(&Segment, &Segment) -> bool) -> bool {
        let known = self.segments.len();
        other.segments.len() >= known
            && self.segments.iter().zip(&other.segments).all(|(mine, theirs)| same(mine, theirs))
            && self.end <= other.segments.get(known).map_or(other.end, |next| next.start)
    }

    /// Receives what `source` has beyond our end.
    pub fn receive(&mut self, source: &Wal) {
        self.segments.clone_from(&source.segments);
        self.end = source.end;
        self.last_record = source.last_record;
    }
}

/// A data directory.
#[derive(Debug, Clone)]
pub struct Data {
    pub system_id: SystemId,
    pub wal: Wal,
    pub state: DatabaseState,
    pub checkpoint: Lsn,
    pub standby_signal: bool,
    pub backup_label: bool,
    /// Ids for which a history file was laid, so that PostgreSQL does not take them.
    pub laid: BTreeSet<TimelineId>,
}

impl Data {
    pub fn made_by_initdb(system_id: SystemId, token: u64) -> Self {
        let end = Lsn(0x0150_0000);
        Data {
            system_id,
            wal: Wal {
                segments: vec![Segment { timeline: TimelineId(1), start: Lsn(0), token }],
                end,
                last_record: Lsn(end.0 - CHECKPOINT_BYTES),
            },
            state: DatabaseState::ShutDown,
            checkpoint: Lsn(end.0 - CHECKPOINT_BYTES),
            standby_signal: false,
            backup_label: false,
            laid: BTreeSet::new(),
        }
    }

    fn was_standby(&self) -> bool {
        matches!(self.state, DatabaseState::ShutDownInRecovery | DatabaseState::InArchiveRecovery)
    }

    /// pg_controldata. A timeline that was promoted to is in the checkpoint only after the first one on it; before that recovery's end
    /// names it.
    pub fn control(&self, promotion: Option<&OwnPromotion>) -> ControlFacts {
        let timeline = self.wal.timeline_at(self.checkpoint);
        let newer = self.was_standby() || timeline != self.wal.timeline();
        ControlFacts {
            system_id: self.system_id,
            major_version: 15,
            state: self.state,
            checkpoint: self.checkpoint,
            timeline,
            min_recovery_end: if self.was_standby() { self.wal.end } else { Lsn(0) },
            min_recovery_timeline: if newer { self.wal.timeline() } else { TimelineId(0) },
            data_checksums: true,
            wal_log_hints: false,
            floor: StandbyFloor::default(),
            standby_signal: self.standby_signal,
            backup_label: self.backup_label,
            promoted: promotion.map(|own| (own.timeline, own.epoch)),
        }
    }

    /// pg_waldump of the end.
    pub fn local_wal(&self) -> LocalWal {
        LocalWal { timeline: self.wal.timeline(), history: Some(self.wal.history()), last_record: LastRecord::Known(self.wal.last_record) }
    }

    /// The id that PostgreSQL takes at a promotion: the first after its own that has no history file (measured on 17).
    pub fn next_timeline(&self) -> TimelineId {
        let mut next = self.wal.timeline().next();
        while self.laid.contains(&next) {
            next = next.next();
        }
        next
    }

    /// Leaves recovery onto `timeline`.
    pub fn promote(&mut self, timeline: TimelineId, token: u64) {
        self.wal.segments.push(Segment { timeline, start: self.wal.end, token });
        // The end-of-recovery record is the first on the new timeline.
        self.wal.append(RECORD_BYTES);
        self.state = DatabaseState::InProduction;
        self.standby_signal = false;
    }

    /// A checkpoint of a primary, or a restartpoint of a standby.
    pub fn make_checkpoint(&mut self) {
        if self.was_standby() {
            self.checkpoint = self.wal.last_record;
        } else {
            self.checkpoint = self.wal.end;
            self.wal.append(CHECKPOINT_BYTES);
        }
    }
}
