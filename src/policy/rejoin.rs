//! Decides how a stopped member comes back under the present leader: follow, clone anew, wait, or not at all. Never looks at a disk.
//!
//! A position past the switch point is divergence; so is a timeline that the leader's history does not know, and so is a timeline of the
//! leader's number that somebody else's promotion made (SAFETY row 53: two promotions from one point write identical history files, only
//! the epoch tells them apart). What is not known counts as diverged: a clone costs time, a wrong follow costs data.

use serde::{Deserialize, Serialize};

use crate::facts::postgres::{ControlFacts, DatabaseState};
pub use crate::policy::timelines::{Switch, TimelineHistory};
use crate::types::{Epoch, Lsn, SystemId, TimelineId};

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
    /// The leader.
    pub leader: &'a LeaderLineage,
}

/// WAL that this member has and the leader does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LostRange {
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// From where.
    pub from: Lsn,
    /// To where at least; None when it could not be read.
    pub to: Option<Lsn>,
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejoin {
    /// Start as a standby: its WAL is all in the leader's past.
    Follow,
    /// Clone from the leader. The old directory is kept if `lost` names WAL that is nowhere else.
    Clone {
        /// A sentence.
        why: String,
        /// What the leader lacks.
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
        return Rejoin::Wait {
            why: format!("the leader is still in recovery on timeline {}: its history is not known yet", leader.timeline),
        };
    }
    match divergence(inputs) {
        None => Rejoin::Follow,
        Some((why, from)) => Rejoin::Clone { why, lost: Some(LostRange { timeline: wal.timeline, from, to: known_end(local, wal) }) },
    }
}

/// Why this member's WAL is not all in the leader's past, and from where on; None when it is.
fn divergence(inputs: Inputs<'_>) -> Option<(String, Lsn)> {
    let Inputs { local, wal, leader, .. } = inputs;
    let own = wal.timeline;
    let Some(history) = ancestors(wal) else {
        return Some((format!("the history of timeline {own}, on which this member's WAL ends, cannot be read"), Lsn(0)));
    };
    let from = fork(own, history, leader);
    let switch = if own == leader.timeline { None } else { leader.history.left_at(own) };
    if own != leader.timeline && switch.is_none() {
        return Some((
            format!("this member's WAL ends on timeline {own}, which is no ancestor of the leader's timeline {}", leader.timeline),
            from,
        ));
    }
    if history.0.iter().map(at).ne(leader.history.before(own).iter().map(at)) {
        return Some((
            format!("timeline {own} of this member and of the leader began at different points: they are two timelines of one number"),
            from,
        ));
    }
    if let Some(why) = foreign_promotion(inputs) {
        return Some((why, own_start(history)));
    }
    let limit = match switch {
        Some(switch) => switch,
        None if was_primary(local) => {
            return Some((
                format!("this member was a primary on timeline {own}, on which the leader now writes"),
                leader.lsn.min(local.checkpoint),
            ));
        }
        None => leader.lsn,
    };
    past(local, wal, leader.timeline, limit)
}

/// Whether anything starts at or after `limit`, the first position that is not in the leader's past.
fn past(local: &ControlFacts, wal: &LocalWal, leader_timeline: TimelineId, limit: Lsn) -> Option<(String, Lsn)> {
    let own = wal.timeline;
    let replayed_past = local.min_recovery_timeline == own && local.min_recovery_end > limit;
    if (local.timeline == own && local.checkpoint >= limit) || replayed_past {
        return Some((format!("the control file is past {limit}, where the leader's history leaves timeline {own}"), limit));
    }
    match &wal.last_record {
        LastRecord::Known(start) if *start >= limit => {
            Some((format!("a WAL record at {start} is past {limit}, where the leader's history leaves timeline {own}"), limit))
        }
        LastRecord::Known(_) => None,
        // A standby on the leader's own timeline received all it has from a primary of it; the walreceiver says so if it is ahead.
        LastRecord::Unknown(_) if own == leader_timeline => None,
        LastRecord::Unknown(why) => {
            Some((format!("the end of this member's WAL is not known, which counts as past {limit}: {why}"), limit))
        }
    }
}

/// Row 53: the number and the history agree, and yet somebody else made this timeline.
fn foreign_promotion(inputs: Inputs<'_>) -> Option<String> {
    let Inputs { local, wal, own_promotion, promoted_under, .. } = inputs;
    let own = wal.timeline;
    if own == TimelineId(1) {
        // Nobody promoted it: initdb made it, and the system identifier tells two of those apart.
        return None;
    }
    match (own_promotion.filter(|record| record.timeline == own), promoted_under) {
        (Some(record), Some(epoch)) if record.epoch != epoch => Some(format!(
            "this member promoted timeline {own} under epoch {}, the leader's timeline {own} was promoted under epoch {epoch}",
            record.epoch
        )),
        (Some(record), None) => Some(format!(
            "this member promoted timeline {own} under epoch {}, and the cluster's history does not say that the leader's timeline {own} is that one",
            record.epoch
        )),
        (None, Some(epoch)) if was_primary(local) && local.timeline == own => Some(format!(
            "this member was a primary on timeline {own} without a record of having promoted it; the leader's was promoted under epoch {epoch}"
        )),
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::facts::postgres::StandbyFloor;

    const SWITCH: Lsn = Lsn(0x500_0000);

    fn history(switches: &[(u32, u64)]) -> TimelineHistory {
        TimelineHistory(switches.iter().map(|(id, at)| Switch { parent: TimelineId(*id), at: Lsn(*at), reason: "x".into() }).collect())
    }

    /// A member that ended on one timeline, and a leader on another.
    struct Case {
        local: ControlFacts,
        wal: LocalWal,
        own: Option<OwnPromotion>,
        promoted_under: Option<Epoch>,
        leader: LeaderLineage,
    }

    impl Case {
        fn decide(&self) -> Rejoin {
            decide(Inputs {
                local: &self.local,
                wal: &self.wal,
                own_promotion: self.own.as_ref(),
                promoted_under: self.promoted_under,
                leader: &self.leader,
            })
        }

        fn lost(&self) -> Option<LostRange> {
            match self.decide() {
                Rejoin::Clone { lost, .. } => lost,
                other => panic!("expected a clone, got {other:?}"),
            }
        }

        fn last_record(mut self, at: u64) -> Self {
            self.wal.last_record = LastRecord::Known(Lsn(at));
            self
        }

        /// The member promoted its timeline itself, under this epoch.
        fn promoted(mut self, epoch: i64) -> Self {
            let switch = self.wal.history.as_ref().and_then(|history| history.0.last().cloned()).unwrap();
            let (parent, switch_lsn) = (switch.parent, Some(switch.at));
            self.own = Some(OwnPromotion { timeline: self.wal.timeline, epoch: Epoch(epoch), parent, switch_lsn });
            self
        }
    }

    /// The old primary of timeline 1 was stopped in good order just before the switch; the leader is on timeline 2.
    fn old_primary() -> Case {
        Case {
            local: ControlFacts {
                system_id: SystemId(7),
                major_version: 17,
                state: DatabaseState::ShutDown,
                checkpoint: Lsn(SWITCH.0 - 0x80),
                timeline: TimelineId(1),
                min_recovery_end: Lsn(0),
                min_recovery_timeline: TimelineId(0),
                data_checksums: true,
                wal_log_hints: true,
                floor: StandbyFloor::default(),
                standby_signal: false,
                backup_label: false,
            },
            wal: LocalWal { timeline: TimelineId(1), history: None, last_record: LastRecord::Known(Lsn(SWITCH.0 - 0x80)) },
            own: None,
            promoted_under: Some(Epoch(10)),
            leader: LeaderLineage {
                system_id: SystemId(7),
                major_version: 17,
                in_recovery: false,
                timeline: TimelineId(2),
                history: history(&[(1, SWITCH.0)]),
                lsn: Lsn(0x600_0000),
            },
        }
    }

    /// The member ended on timeline 2, which the leader (on 3) left at 0x7000000.
    fn of_timeline_2() -> Case {
        let mut case = old_primary();
        case.local.timeline = TimelineId(2);
        case.local.checkpoint = Lsn(0x600_0000);
        case.wal =
            LocalWal { timeline: TimelineId(2), history: Some(history(&[(1, SWITCH.0)])), last_record: LastRecord::Known(Lsn(0x600_0000)) };
        case.leader.timeline = TimelineId(3);
        case.leader.history = history(&[(1, SWITCH.0), (2, 0x700_0000)]);
        case.leader.lsn = Lsn(0x800_0000);
        case
    }

    #[test]
    fn a_primary_stopped_in_good_order_follows_without_a_copy() {
        assert_eq!(old_primary().decide(), Rejoin::Follow);
    }

    #[test]
    fn one_record_past_the_switch_point_is_divergence_and_the_loss_is_named() {
        let lost = old_primary().last_record(SWITCH.0 + 0x28).lost().unwrap();
        assert_eq!(lost, LostRange { timeline: TimelineId(1), from: SWITCH, to: Some(Lsn(SWITCH.0 + 0x28)) });
        assert!(matches!(old_primary().last_record(SWITCH.0).decide(), Rejoin::Clone { .. }), "a record that starts there is past it");
    }

    #[test]
    fn an_end_that_could_not_be_read_counts_as_diverged() {
        let mut case = old_primary();
        case.wal.last_record = LastRecord::Unknown("there is no pg_waldump".into());
        assert_eq!(case.lost().unwrap().to, None);
    }

    #[test]
    fn a_control_file_past_the_switch_point_is_enough() {
        let mut case = old_primary();
        case.local.checkpoint = SWITCH;
        assert!(matches!(case.decide(), Rejoin::Clone { .. }));
        let mut case = old_primary();
        case.local.state = DatabaseState::InArchiveRecovery;
        (case.local.min_recovery_end, case.local.min_recovery_timeline) = (Lsn(SWITCH.0 + 1), TimelineId(1));
        assert!(matches!(case.decide(), Rejoin::Clone { .. }));
        (case.local.min_recovery_end, case.local.min_recovery_timeline) = (SWITCH, TimelineId(1));
        assert_eq!(case.decide(), Rejoin::Follow, "replayed to the very switch point");
    }

    #[test]
    fn row_53_the_same_timeline_id_of_another_epoch_is_divergence() {
        let mut case = of_timeline_2().promoted(5);
        case.promoted_under = Some(Epoch(5));
        assert_eq!(case.decide(), Rejoin::Follow, "the leader's timeline 2 is the one this member promoted");
        case.promoted_under = Some(Epoch(6));
        assert_eq!(case.lost().unwrap().from, SWITCH, "everything since its own promotion");
        case.promoted_under = None;
        assert!(matches!(case.decide(), Rejoin::Clone { .. }), "what is not recorded proves nothing");
    }

    #[test]
    fn row_53_also_when_both_are_still_on_that_timeline() {
        let mut case = of_timeline_2().promoted(5);
        case.leader.timeline = TimelineId(2);
        case.leader.history = history(&[(1, SWITCH.0)]);
        case.promoted_under = Some(Epoch(6));
        assert_eq!(case.lost().unwrap().from, SWITCH);
    }

    #[test]
    fn a_primary_without_a_record_of_its_promotion_has_diverged_if_another_is_on_record() {
        let mut case = of_timeline_2();
        assert!(matches!(case.decide(), Rejoin::Clone { .. }), "promoted by hand to a number that was then used");
        case.promoted_under = None;
        assert_eq!(case.decide(), Rejoin::Follow, "a cluster that was promoted before pgherd came");
        case.promoted_under = Some(Epoch(10));
        case.local.state = DatabaseState::ShutDownInRecovery;
        assert_eq!(case.decide(), Rejoin::Follow, "a standby never promoted anything");
    }

    #[test]
    fn two_timelines_of_one_number_are_told_apart_by_where_they_began() {
        let mut case = of_timeline_2();
        case.local.state = DatabaseState::ShutDownInRecovery;
        case.wal.history = Some(history(&[(1, SWITCH.0 - 0x1000)]));
        assert_eq!(case.lost().unwrap().from, Lsn(SWITCH.0 - 0x1000), "what they share ends where the first of them began");
    }

    #[test]
    fn a_timeline_that_the_leader_never_had_is_divergence_from_the_fork_on() {
        let mut case = of_timeline_2();
        case.leader.history = history(&[(1, SWITCH.0 - 0x2000)]);
        assert_eq!(case.lost().unwrap().from, Lsn(SWITCH.0 - 0x2000));
        case.leader.timeline = TimelineId(1);
        case.leader.history = TimelineHistory::default();
        assert_eq!(case.lost().unwrap().from, SWITCH, "ahead of the leader: the leader's timeline goes on where this one left it");
    }

    #[test]
    fn a_history_that_cannot_be_read_counts_as_diverged() {
        let mut case = of_timeline_2();
        case.wal.history = None;
        assert!(matches!(case.decide(), Rejoin::Clone { .. }));
    }

    #[test]
    fn a_standby_of_the_leaders_timeline_follows_and_a_primary_of_it_does_not() {
        let mut case = old_primary();
        case.leader.timeline = TimelineId(1);
        case.leader.history = TimelineHistory::default();
        assert!(matches!(case.decide(), Rejoin::Clone { .. }));
        case.local.backup_label = true;
        assert_eq!(case.decide(), Rejoin::Follow, "a fresh clone has the primary's control file");
        case.local.backup_label = false;
        case.local.state = DatabaseState::ShutDownInRecovery;
        assert_eq!(case.decide(), Rejoin::Follow);
        case.wal.last_record = LastRecord::Unknown("there is no pg_waldump".into());
        assert_eq!(case.decide(), Rejoin::Follow);
        case.wal.last_record = LastRecord::Known(case.leader.lsn);
        assert!(matches!(case.decide(), Rejoin::Clone { .. }), "it has what the leader lost");
    }

    #[test]
    fn a_leader_that_is_not_promoted_yet_is_waited_for() {
        let mut case = old_primary();
        case.leader.in_recovery = true;
        assert!(matches!(case.decide(), Rejoin::Wait { .. }));
    }

    #[test]
    fn another_cluster_or_another_major_version_is_refused() {
        let mut case = old_primary();
        case.leader.system_id = SystemId(8);
        assert!(matches!(case.decide(), Rejoin::Refuse { .. }));
        let mut case = old_primary();
        case.leader.major_version = 16;
        assert!(matches!(case.decide(), Rejoin::Refuse { .. }));
    }

    proptest! {
        #[test]
        fn nobody_follows_with_a_record_the_leader_does_not_have(record in 0_u64..0xA00_0000, timeline in 1_u32..3) {
            let mut case = if timeline == 1 { old_primary() } else { of_timeline_2().promoted(10) };
            case.wal.last_record = LastRecord::Known(Lsn(record));
            let limit = if timeline == 1 { SWITCH.0 } else { 0x700_0000 };
            prop_assert_eq!(case.decide() == Rejoin::Follow, record < limit);
        }
    }
}
