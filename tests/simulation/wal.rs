//! WAL as a tree of histories. What PostgreSQL compares (timeline and position) and what is really in it (who wrote it) are kept apart:
//! two promotions to one id from one point look the same to PostgreSQL and are not the same (SAFETY row 53).

use std::collections::{BTreeMap, BTreeSet};

use pgherd::facts::postgres::{ControlFacts, DatabaseState, StandbyFloor};
use pgherd::policy::rejoin::{LastRecord, LocalWal, OwnPromotion, Switch, TimelineHistory};
use pgherd::types::{Lsn, SystemId, TimelineId};

/// A transaction's record.
pub const RECORD_BYTES: u64 = 96;
/// A checkpoint's record.
pub const CHECKPOINT_BYTES: u64 = 120;

/// Streaming begins where a segment does.
const SEGMENT_BYTES: u64 = 16 << 20;

pub fn segment_start(at: Lsn) -> Lsn {
    Lsn(at.0 - at.0 % SEGMENT_BYTES)
}

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
    /// Where the last checkpoint's record begins.
    pub last_checkpoint: Lsn,
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
        self.goes_into(other, |mine, theirs| mine == theirs).is_some_and(|left| self.end <= left)
    }

    /// As PostgreSQL sees it, which knows timelines and positions only.
    pub fn looks_like_the_past_of(&self, other: &Wal) -> bool {
        self.left_by(other).is_some_and(|left| self.end <= left)
    }

    /// Up to where a server with the other's WAL sends what this one asks for. None = its walsender refuses: it looks no closer than where
    /// the segment begins, so that who is past by less is let in.
    pub fn is_sent_by(&self, other: &Wal) -> Option<Lsn> {
        self.left_by(other).filter(|left| segment_start(self.end) <= *left)
    }

    /// Where the other left the timeline that this ends on, or has got to on it, as PostgreSQL sees it.
    fn left_by(&self, other: &Wal) -> Option<Lsn> {
        self.goes_into(other, |mine, theirs| (mine.timeline, mine.start) == (theirs.timeline, theirs.start))
    }

    fn goes_into(&self, other: &Wal, same: impl Fn(&Segment, &Segment) -> bool) -> Option<Lsn> {
        let known = self.segments.len();
        let goes = other.segments.len() >= known && self.segments.iter().zip(&other.segments).all(|(mine, theirs)| same(mine, theirs));
        goes.then(|| other.segments.get(known).map_or(other.end, |next| next.start))
    }

    /// Receives what `source` has beyond our end.
    pub fn receive(&mut self, source: &Wal) {
        self.segments.clone_from(&source.segments);
        self.end = source.end;
        self.last_record = source.last_record;
        self.last_checkpoint = source.last_checkpoint;
    }
}

/// A data directory.
#[derive(Debug, Clone)]
pub struct Data {
    pub system_id: SystemId,
    pub wal: Wal,
    pub state: DatabaseState,
    pub checkpoint: Lsn,
    /// What recovery must reach, as the control file has it. A standby moves it when pages reach the disk, which is taken to be at
    /// restartpoints and at its stop only: whoever crashes in between has replayed more than it names.
    pub min_recovery: Option<(Lsn, TimelineId)>,
    pub standby_signal: bool,
    pub backup_label: bool,
    /// Ids for which a history file was laid, so that PostgreSQL does not take them.
    pub laid: BTreeSet<TimelineId>,
    /// The newest timeline that a history file was brought for, by a walreceiver or before a start, and what it says.
    pub brought: (TimelineId, TimelineHistory),
    /// Replication slots, which a copy has none of.
    pub slots: BTreeMap<String, Lsn>,
    /// pg_rewind has begun to write, and has not ended.
    pub half: Option<Half>,
    /// Segments that the archiver has not got to: there is always one. And how often it was tried to archive them without it.
    pub unarchived: usize,
    pub archive_tries: u32,
}

/// What is in a data directory that is half rewound: no WAL that could be recovered, and pages of everybody that it was copied from.
#[derive(Debug, Clone)]
pub struct Half {
    /// What it was before.
    pub was: Wal,
    /// The leaders' WAL as it was when pages were copied from them.
    pub pages_of: Vec<Wal>,
    /// Its host lost power since: some of what was written may be gone, and nobody can tell.
    pub torn: bool,
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
                last_checkpoint: Lsn(end.0 - CHECKPOINT_BYTES),
            },
            state: DatabaseState::ShutDown,
            checkpoint: Lsn(end.0 - CHECKPOINT_BYTES),
            min_recovery: None,
            standby_signal: false,
            backup_label: false,
            laid: BTreeSet::new(),
            brought: (TimelineId(1), TimelineHistory::default()),
            slots: BTreeMap::new(),
            half: None,
            unarchived: 0,
            archive_tries: 0,
        }
    }

    /// pg_rewind begins to write.
    pub fn begin_rewind(&mut self, source: &Wal) {
        let nothing = Wal { segments: Vec::new(), end: Lsn(0), last_record: Lsn(0), last_checkpoint: Lsn(0) };
        let was = std::mem::replace(&mut self.wal, nothing);
        let half = self.half.get_or_insert(Half { was, pages_of: Vec::new(), torn: false });
        half.pages_of.push(source.clone());
    }

    /// What pg_rewind makes of the source's data as it is when it ends: to be recovered from where the two were one.
    pub fn rewound(source: &Data) -> Data {
        Data {
            state: DatabaseState::InArchiveRecovery,
            min_recovery: Some((source.wal.end, source.wal.timeline())),
            standby_signal: true,
            backup_label: true,
            slots: BTreeMap::new(),
            unarchived: 0,
            ..source.clone()
        }
    }

    /// A server without clients goes through what a crash has left, and stops.
    pub fn recover_alone(&mut self) {
        self.begin_recovery();
        self.open();
        self.shut_down();
    }

    /// pg_basebackup of a running primary: begins with a checkpoint and ends with a record of its own. Of a standby it begins with a
    /// restartpoint, and ends where that one has got to.
    pub fn base_backup(&mut self) -> Data {
        self.make_checkpoint();
        let checkpoint = self.checkpoint;
        if !self.was_standby() {
            self.wal.append(RECORD_BYTES);
        }
        Data { checkpoint, standby_signal: true, backup_label: true, slots: BTreeMap::new(), unarchived: 0, ..self.clone() }
    }

    /// Before a start. Laid files above the own timeline would keep a standby's recovery from following.
    pub fn set_standby(&mut self, standby: bool) {
        self.standby_signal = standby;
        if standby {
            let own = self.wal.timeline();
            self.laid.retain(|id| *id <= own);
        }
    }

    fn was_standby(&self) -> bool {
        matches!(self.state, DatabaseState::ShutDownInRecovery | DatabaseState::InArchiveRecovery)
    }

    /// pg_controldata. A timeline that was promoted to is in the checkpoint only after the first one on it; before that recovery's end
    /// names it.
    pub fn control(&self, promotion: Option<&OwnPromotion>) -> ControlFacts {
        let (min_recovery_end, min_recovery_timeline) = self.min_recovery.unwrap_or_default();
        ControlFacts {
            system_id: self.system_id,
            major_version: 15,
            state: self.state,
            checkpoint: self.checkpoint,
            timeline: self.half.as_ref().map_or(&self.wal, |half| &half.was).timeline_at(self.checkpoint),
            min_recovery_end,
            min_recovery_timeline,
            data_checksums: true,
            wal_log_hints: false,
            floor: StandbyFloor::default(),
            standby_signal: self.standby_signal,
            backup_label: self.backup_label,
            promoted: promotion.map(|own| (own.timeline, own.epoch)),
            unarchived: self.unarchived,
        }
    }

    /// pg_waldump of the end.
    pub fn local_wal(&self) -> LocalWal {
        let wal = self.half.as_ref().map_or(&self.wal, |half| &half.was);
        LocalWal { timeline: wal.timeline(), history: Some(wal.history()), last_record: LastRecord::Known(wal.last_record) }
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
        self.min_recovery = Some((self.wal.end, timeline));
        self.state = DatabaseState::InProduction;
        self.standby_signal = false;
        (self.unarchived, self.archive_tries) = (1, 0);
    }

    /// The postmaster starts on it.
    pub fn begin_recovery(&mut self) {
        if !self.standby_signal {
            // What was shut down as a primary needs no recovery, and its control file stays as it is.
            if self.state != DatabaseState::ShutDown {
                self.state = DatabaseState::InCrashRecovery;
            }
            return;
        }
        // Consistent is what a copy ends with; all there is of a primary that was not shut down; or else what the checkpoint needs.
        let copied = std::mem::take(&mut self.backup_label);
        let crashed = self.min_recovery.is_none() && self.state != DatabaseState::ShutDown;
        let least = if copied || crashed { self.wal.end } else { self.checkpoint };
        self.min_recovery = self.min_recovery.max(Some((least, self.wal.timeline_at(least))));
        self.state = DatabaseState::InArchiveRecovery;
    }

    /// How far a standby that takes connections has got for certain: it is consistent. After the crash of a primary that is all there is.
    pub fn replayed_at_least(&self) -> Lsn {
        self.checkpoint.max(self.min_recovery.unwrap_or_default().0).min(self.wal.end)
    }

    /// The history files of another server. No existing file is ever overwritten.
    pub fn bring(&mut self, theirs: &Wal) {
        if theirs.timeline() > self.brought.0 {
            self.brought = (theirs.timeline(), theirs.history());
        }
    }

    /// Recovery goes to the newest history that is there, and refuses if that has left the timeline of what must be recovered before.
    pub fn recovers(&self) -> bool {
        let past = |(end, timeline)| self.brought.1.left_at(timeline).is_some_and(|left| left < end);
        !self.standby_signal || !self.min_recovery.is_some_and(past)
    }

    /// A primary takes writes from now on.
    pub fn open(&mut self) {
        if self.state == DatabaseState::InCrashRecovery {
            self.make_checkpoint();
        }
        self.state = DatabaseState::InProduction;
    }

    /// The last that a stop in good order does.
    pub fn shut_down(&mut self) {
        let standby = self.was_standby();
        self.make_checkpoint();
        if standby {
            self.min_recovery = Some((self.wal.end, self.wal.timeline()));
        }
        self.state = if standby { DatabaseState::ShutDownInRecovery } else { DatabaseState::ShutDown };
    }

    /// A checkpoint of a primary, or a restartpoint of a standby.
    pub fn make_checkpoint(&mut self) {
        if self.was_standby() {
            self.checkpoint = self.wal.last_checkpoint;
            let end = Lsn(self.checkpoint.0 + CHECKPOINT_BYTES);
            self.min_recovery = self.min_recovery.max(Some((end, self.wal.timeline_at(self.checkpoint))));
        } else {
            self.checkpoint = self.wal.end;
            self.wal.last_checkpoint = self.wal.end;
            self.wal.append(CHECKPOINT_BYTES);
            self.min_recovery = None;
        }
    }
}
