//! Decides how a stopped member comes back under the present leader: follow, rewind, clone anew, wait, or not at all. Never looks at a disk.
//!
//! A position past the switch point is divergence; so is a timeline that the leader's history does not know, and so is a timeline of the
//! leader's number that somebody else's promotion made (SAFETY row 53: two promotions from one point write identical history files, only
//! the epoch tells them apart). What is not known counts as diverged: a clone costs time, a wrong follow costs data.

use serde::{Deserialize, Serialize};

use crate::facts::cluster::HistoryEntry;
pub use crate::facts::postgres::LostRange;
use crate::facts::postgres::{ControlFacts, DatabaseState, HalfSegment};
use crate::mutants::{Mutant, mutant};
use crate::policy::rejoin::rewind::{Divergence, Rewinding};
pub use crate::policy::timelines::{Switch, TimelineHistory};
use crate::types::{Epoch, Lsn, SystemId, TimelineId};

/// Starts that ended by themselves, one after the other, before something else is tried.
pub const STARTS_IN_VAIN: u32 = 3;

/// This member's own record of its last promotion, written before promote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnPromotion {
    /// The timeline that was reserved for it.
    pub timeline: TimelineId,
    /// Under which leadership.
    pub epoch: Epoch,
    /// The timeline it left.
    pub parent: TimelineId,
    /// Where it left it, once known.
    pub switch_lsn: Option<Lsn>,
}

/// Start of the last WAL record at or after the latest checkpoint, on the timeline that the stopped member's WAL ends on.
///
/// The start and not the end: the end of the last record and the switch point may differ by a page header, while a record that starts
/// before the switch point always ends at or before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LastRecord {
    /// It starts here.
    Known(Lsn),
    /// It could not be read: a sentence says why. Counts as diverged.
    Unknown(String),
}

/// The end of a stopped member's WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalWal {
    /// The timeline its newest WAL is on.
    pub timeline: TimelineId,
    /// That timeline's ancestors. None when its history file is missing or unreadable.
    pub history: Option<TimelineHistory>,
    /// The last record.
    pub last_record: LastRecord,
}

/// The leader as asked after the local server was stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderLineage {
    /// Its cluster.
    pub system_id: SystemId,
    /// Its major version.
    pub major_version: u32,
    /// Whether it is still in recovery: its timeline will change when it is promoted.
    pub in_recovery: bool,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Its timeline's ancestors.
    pub history: TimelineHistory,
    /// How far its WAL reached when asked.
    pub lsn: Lsn,
    /// The timeline in its control file: it is the one it was promoted to only after its first checkpoint there.
    pub control_timeline: TimelineId,
    /// full_page_writes.
    pub full_page_writes: bool,
}

impl LeaderLineage {
    /// Of one in recovery nothing can be judged.
    fn history_not_known(&self) -> Rejoin {
        Rejoin::Wait { why: format!("the leader is still in recovery on timeline {}: its history is not known yet", self.timeline) }
    }
}

impl OwnPromotion {
    /// One that no leadership ordered. What it left is not known; its number says that it was not before this.
    pub fn by_hand(timeline: TimelineId) -> Self {
        OwnPromotion { timeline, epoch: Epoch::BY_HAND, parent: TimelineId(timeline.0 - 1), switch_lsn: None }
    }
}

/// All that the decision rests on.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The stopped member's control file.
    pub local: &'a ControlFacts,
    /// The end of its WAL.
    pub wal: &'a LocalWal,
    /// Its own record of its last promotion.
    pub own_promotion: Option<&'a OwnPromotion>,
    /// Who promoted `wal.timeline`, by etcd's history; None when that is not recorded there.
    pub promoted_under: Option<Epoch>,
    /// Whether there were leaderships before that timeline was made: [`led_before`].
    pub led_before: bool,
    /// The leader.
    pub leader: &'a LeaderLineage,
    /// Whether a rewind is wanted, and what is in its way on this host.
    pub rewinding: &'a Rewinding,
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejoin {
    /// Start as a standby: its WAL is all in the leader's past.
    Follow,
    /// Keep the WAL that is nowhere else, then rewind to the leader.
    Rewind {
        /// A sentence.
        why: String,
        /// What the leader lacks.
        lost: LostRange,
    },
    /// Clone from the leader. The old directory is kept if `lost` names WAL that is nowhere else.
    Clone {
        /// A sentence.
        why: String,
        /// What the leader lacks; None = nothing.
        lost: Option<LostRange>,
    },
    /// Ask again later.
    Wait {
        /// A sentence.
        why: String,
    },
    /// Never: an operator has to look.
    Refuse {
        /// A sentence, and what to do.
        why: String,
    },
}

/// Decides. See the module's header for the rule.
pub fn decide(inputs: Inputs<'_>) -> Rejoin {
    let Inputs { local, wal, leader, .. } = inputs;
    if local.system_id != leader.system_id {
        return Rejoin::Refuse {
            why: format!(
                "this data directory is of the database system {}, the leader's is {}: it is of another cluster; name another data_dir, or reinit this member by name",
                local.system_id, leader.system_id
            ),
        };
    }
    if local.major_version != leader.major_version {
        return Rejoin::Refuse {
            why: format!(
                "this data directory is of PostgreSQL {}, the leader runs {}: a standby needs the same major version",
                local.major_version, leader.major_version
            ),
        };
    }
    if leader.in_recovery {
        return leader.history_not_known();
    }
    match divergence(inputs) {
        _ if mutant(Mutant::DivergenceIgnored) => Rejoin::Follow,
        None => Rejoin::Follow,
        Some(Divergence { why, timeline, from, blind }) => {
            let lost = LostRange { timeline, from, to: known_end(local, wal) };
            rewind::or_clone(local, leader, inputs.rewinding, Divergence { why, timeline, from, blind }, lost)
        }
    }
}

/// Fit to follow by all that is judged, and yet PostgreSQL ends again and again, by a segment that cannot be completed: it is copied, and not
/// started for ever. What it has is kept whole.
pub fn unless_it_does_not_start(plan: Rejoin, starts_in_vain: u32, incomplete: Option<&HalfSegment>) -> Rejoin {
    match (plan, incomplete) {
        (Rejoin::Follow, Some(half)) if starts_in_vain >= STARTS_IN_VAIN => Rejoin::Clone {
            why: format!(
                "PostgreSQL ended {starts_in_vain} times by itself: {}, and {}",
                half.sentence(),
                half.obstacle.as_deref().unwrap_or("it was not completed")
            ),
            lost: None,
        },
        (plan, _) => plan,
    }
}

/// Why this member's WAL is not all in the leader's past, and from where on; None when it is.
fn divergence(inputs: Inputs<'_>) -> Option<Divergence> {
    let Inputs { local, wal, leader, .. } = inputs;
    let own = wal.timeline;
    let on_own = |why: String, from| Some(Divergence { why, timeline: own, from, blind: Some(rewind::SAME_NUMBER) });
    let Some(history) = ancestors(wal) else {
        let why = format!("the history of timeline {own}, on which this member's WAL ends, cannot be read");
        return Some(Divergence { why, timeline: own, from: Lsn(0), blind: Some(rewind::NO_HISTORY) });
    };
    let from = fork(own, history, leader);
    let switch = if own == leader.timeline { None } else { leader.history.left_at(own) };
    if own != leader.timeline && switch.is_none() {
        let theirs = leader.timeline;
        let why = format!("this member's WAL ends on timeline {own}, which is no ancestor of the leader's timeline {theirs}");
        // The timeline that both were on last is the one that the WAL which is lost begins on.
        let timeline = history.0.iter().find(|switch| switch.at > from).map_or(own, |switch| switch.parent);
        return Some(Divergence { why, timeline, from, blind: None });
    }
    if history.0.iter().map(at).ne(leader.history.before(own).iter().map(at)) {
        let why =
            format!("timeline {own} of this member and of the leader began at different points: they are two timelines of one number");
        return on_own(why, from);
    }
    if let Some(why) = foreign_promotion(inputs) {
        return on_own(why, own_start(history));
    }
    let limit = match switch {
        Some(switch) => switch,
        None if was_primary(local) => {
            let why = format!("this member was a primary on timeline {own}, on which the leader now writes");
            return on_own(why, leader.lsn.min(local.checkpoint));
        }
        None => leader.lsn,
    };
    let mut past = control_file_is_past(local, wal, leader, limit).or_else(|| last_record_is_past(wal, leader, limit))?;
    past.blind = past.blind.or((own == leader.timeline).then_some(rewind::SAME_NUMBER));
    past.blind = past.blind.or((past.from != from).then_some(rewind::ANOTHER_FORK));
    Some(past)
}

/// Whether the control file is past `limit`, the first position on the member's timeline that is not in the leader's past.
///
/// It can be on an ancestor of that timeline: WAL of a new timeline is received before the old one is left in replay. It must not be past
/// where that one was left either, and on no other timeline at all; PostgreSQL would refuse to start at every attempt.
fn control_file_is_past(local: &ControlFacts, wal: &LocalWal, leader: &LeaderLineage, limit: Lsn) -> Option<Divergence> {
    let left = |timeline| if timeline == wal.timeline { limit } else { leader.history.left_at(timeline).unwrap_or(Lsn(0)) };
    let checkpoint = (local.timeline, local.checkpoint >= left(local.timeline));
    // Zero as long as there is no minimum.
    let replayed =
        (local.min_recovery_timeline, local.min_recovery_end > Lsn(0) && local.min_recovery_end > left(local.min_recovery_timeline));
    let (timeline, _) = [checkpoint, replayed].into_iter().find(|(_, is_past)| *is_past)?;
    let from = left(timeline);
    Some(Divergence {
        why: format!("the control file is past {from}, where the leader's history leaves timeline {timeline}"),
        timeline,
        from,
        blind: None,
    })
}

/// Whether the last record starts at or after `limit`.
fn last_record_is_past(wal: &LocalWal, leader: &LeaderLineage, limit: Lsn) -> Option<Divergence> {
    let own = wal.timeline;
    let blind = matches!(wal.last_record, LastRecord::Unknown(_)).then_some(rewind::UNKNOWN_END);
    let why = match &wal.last_record {
        LastRecord::Known(start) if *start >= limit => {
            format!("a WAL record at {start} is past {limit}, where the leader's history leaves timeline {own}")
        }
        LastRecord::Known(_) => return None,
        // A standby on the leader's own timeline received all it has from a primary of it; the walreceiver says so if it is ahead.
        LastRecord::Unknown(_) if own == leader.timeline => return None,
        LastRecord::Unknown(why) => format!("the end of this member's WAL is not known, which counts as past {limit}: {why}"),
    };
    Some(Divergence { why, timeline: own, from: limit, blind })
}

/// Row 53: the number and the history agree, and yet somebody else made this timeline.
fn foreign_promotion(inputs: Inputs<'_>) -> Option<String> {
    let Inputs { local, wal, own_promotion, promoted_under, .. } = inputs;
    let own = wal.timeline;
    if own == TimelineId(1) || mutant(Mutant::ForeignPromotionFollowed) {
        // Nobody promoted it: initdb made it, and the system identifier tells two of those apart.
        return None;
    }
    match (own_promotion.filter(|record| record.timeline == own), promoted_under) {
        (Some(OwnPromotion { epoch: Epoch::BY_HAND, .. }), _) if inputs.led_before => Some(format!(
            "this member was promoted to timeline {own} by hand, the leader's timeline {own} may have been made by somebody else"
        )),
        // A number from before all leaderships says nothing against a data directory that was there before pgherd.
        (Some(OwnPromotion { epoch: Epoch::BY_HAND, .. }), _) => None,
        (Some(record), Some(epoch)) if record.epoch != epoch => Some(format!(
            "this member promoted timeline {own} under epoch {}, the leader's timeline {own} was promoted under epoch {epoch}",
            record.epoch
        )),
        (Some(record), None) => Some(format!(
            "this member promoted timeline {own} under epoch {}, and the cluster's history does not say that the leader's timeline {own} is that one",
            record.epoch
        )),
        (None, _) if inputs.led_before && promoted_by_hand(local) == Some(own) => Some(format!(
            "this member was a primary on timeline {own} without a record of having promoted it; the leader's may have been made by somebody else"
        )),
        _ => None,
    }
}

/// The timeline that a data directory was promoted to without pgherd's doing: it has been a primary there, and no promotion of ours to it
/// is on record. To be noted before it is started as a standby, which leaves no trace of it in the control file.
pub fn promoted_by_hand(local: &ControlFacts) -> Option<TimelineId> {
    let own = local.timeline.max(local.min_recovery_timeline);
    let on_record = local.promoted.is_some_and(|(timeline, _)| timeline == own);
    (was_primary(local) && own > TimelineId(1) && !on_record).then_some(own)
}

/// Whether a member with WAL on timeline `own` may have made that timeline itself, and not the leadership that `history` says did. Such a
/// member must not follow as it is: PostgreSQL compares numbers and positions, and would go on with another's WAL on its own.
pub fn may_be_of_another_promotion(own: TimelineId, promoted: Option<(TimelineId, Epoch)>, history: &[HistoryEntry]) -> bool {
    let Some((_, epoch)) = promoted.filter(|(timeline, _)| *timeline == own) else { return false };
    let ours = history.iter().any(|entry| entry.timeline == own && entry.epoch == Some(epoch));
    !ours && !mutant(Mutant::ForeignPromotionFollowed)
}

/// Under which leadership a timeline was promoted, as the newest entry of it says; None when that is not recorded.
pub fn promoted_under(timeline: TimelineId, history: &[HistoryEntry]) -> Option<Epoch> {
    history.iter().rev().find(|entry| entry.timeline == timeline)?.epoch
}

/// Whether a leadership reserved that timeline, or one before it. If none did, the timeline was there before pgherd, and everybody has it
/// from the same promotion; else two members may have been promoted to it by hand, each for itself.
pub fn led_before(timeline: TimelineId, history: &[HistoryEntry]) -> bool {
    history.iter().any(|entry| entry.timeline <= timeline)
}

/// Whether the server last ran as a primary: a clone that was never started has the primary's control file, but a `backup_label`.
fn was_primary(local: &ControlFacts) -> bool {
    let state = matches!(
        local.state,
        DatabaseState::InProduction | DatabaseState::ShutDown | DatabaseState::ShuttingDown | DatabaseState::InCrashRecovery
    );
    state && !local.backup_label
}

fn ancestors(wal: &LocalWal) -> Option<&TimelineHistory> {
    const NONE: &TimelineHistory = &TimelineHistory(Vec::new());
    if wal.timeline <= TimelineId(1) { Some(NONE) } else { wal.history.as_ref() }
}

/// The last position that both have: where the two histories part.
fn fork(own: TimelineId, history: &TimelineHistory, leader: &LeaderLineage) -> Lsn {
    let mine = history.0.iter().map(at).chain([(own, Lsn(u64::MAX))]);
    let theirs = leader.history.0.iter().map(at).chain([(leader.timeline, Lsn(u64::MAX))]);
    let mut shared = Lsn(0);
    for (mine, theirs) in mine.zip(theirs) {
        if mine.0 != theirs.0 {
            return shared;
        }
        shared = mine.1.min(theirs.1);
        if mine.1 != theirs.1 {
            return shared;
        }
    }
    shared
}

fn own_start(history: &TimelineHistory) -> Lsn {
    history.0.last().map_or(Lsn(0), |switch| switch.at)
}

fn at(switch: &Switch) -> (TimelineId, Lsn) {
    (switch.parent, switch.at)
}

/// How far this member's WAL reaches at least; None when its end could not be read.
fn known_end(local: &ControlFacts, wal: &LocalWal) -> Option<Lsn> {
    match wal.last_record {
        LastRecord::Known(start) => Some(start.max(local.checkpoint).max(local.min_recovery_end)),
        LastRecord::Unknown(_) => None,
    }
}

pub mod archiving;
pub mod rewind;

#[cfg(test)]
mod tests;
