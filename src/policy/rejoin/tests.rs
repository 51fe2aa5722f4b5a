//! Who may follow, and who has diverged: one member and one leader, one thing changed at a time.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::facts::postgres::RewindAttempt;
use crate::facts::postgres::StandbyFloor;
use crate::machine::tests::fixtures::{control, entry, half_rewound, half_segment, recorded};
use crate::policy::rejoin::rewind::{ATTEMPTS_MAX, BrokenOff, go_on};
use crate::spec::cluster::OnRewindFailure;

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
    /// A leadership reserved the member's timeline, and ended before it recorded that.
    unrecorded: bool,
    leader: LeaderLineage,
    rewinding: Rewinding,
}

impl Case {
    fn decide(&self) -> Rejoin {
        decide(Inputs {
            local: &self.local,
            wal: &self.wal,
            own_promotion: self.own.as_ref(),
            promoted_under: self.promoted_under,
            led_before: self.unrecorded || self.promoted_under.is_some(),
            leader: &self.leader,
            rewinding: &self.rewinding,
        })
    }

    /// A rewind is wanted, and nothing of the host is in its way.
    fn rewinds(mut self) -> Self {
        self.rewinding.wanted = true;
        self
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
            promoted: None,
            unarchived: 0,
        },
        wal: LocalWal { timeline: TimelineId(1), history: None, last_record: LastRecord::Known(Lsn(SWITCH.0 - 0x80)) },
        own: None,
        promoted_under: Some(Epoch(10)),
        unrecorded: false,
        leader: LeaderLineage {
            system_id: SystemId(7),
            major_version: 17,
            in_recovery: false,
            timeline: TimelineId(2),
            history: history(&[(1, SWITCH.0)]),
            lsn: Lsn(0x600_0000),
            control_timeline: TimelineId(2),
            full_page_writes: true,
        },
        rewinding: Rewinding { wanted: false, on_failure: OnRewindFailure::Reclone, obstacle: None, failures: 0 },
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
    case.leader.control_timeline = TimelineId(3);
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
    let lost = old_primary().last_record(SWITCH.0 + 0x28).lost();
    assert_eq!(lost.unwrap(), LostRange { timeline: TimelineId(1), from: SWITCH, to: Some(Lsn(SWITCH.0 + 0x28)) });
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
fn a_control_file_past_the_switch_point_of_an_ancestor_is_enough_too() {
    let standby = || {
        let mut case = of_timeline_2();
        case.local.state = DatabaseState::InArchiveRecovery;
        (case.local.timeline, case.local.checkpoint) = (TimelineId(1), Lsn(SWITCH.0 - 0x80));
        (case.local.min_recovery_timeline, case.local.min_recovery_end) = (TimelineId(1), SWITCH);
        case
    };
    assert_eq!(standby().decide(), Rejoin::Follow, "it received timeline 2 and has not replayed any of it");
    let mut replayed = standby();
    replayed.local.min_recovery_end = Lsn(SWITCH.0 + 1);
    let lost = replayed.lost().unwrap();
    assert_eq!((lost.timeline, lost.from), (TimelineId(1), SWITCH));
    let mut checkpoint = standby();
    checkpoint.local.checkpoint = SWITCH;
    assert_eq!(checkpoint.lost().unwrap().from, SWITCH);
    let mut elsewhere = standby();
    elsewhere.local.min_recovery_timeline = TimelineId(4);
    assert!(matches!(elsewhere.decide(), Rejoin::Clone { .. }), "a timeline that is no ancestor");
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
    (case.leader.timeline, case.leader.history) = (TimelineId(2), history(&[(1, SWITCH.0)]));
    case.promoted_under = Some(Epoch(6));
    assert_eq!(case.lost().unwrap().from, SWITCH);
}

#[test]
fn row_53_a_timeline_made_by_hand_has_diverged_from_every_leaderships_and_from_nobody_elses() {
    let noted = || {
        let mut case = of_timeline_2().promoted(Epoch::BY_HAND.0);
        // Started again as a standby: only the record tells.
        case.local.state = DatabaseState::ShutDownInRecovery;
        case.promoted_under = None;
        case
    };
    assert_eq!(noted().decide(), Rejoin::Follow, "no leadership used that number: it was there before pgherd");
    let recorded = Case { promoted_under: Some(Epoch(6)), ..noted() };
    assert_eq!(recorded.lost().unwrap().from, SWITCH);
    let mut reserved = Case { unrecorded: true, ..noted() };
    assert_eq!(reserved.lost().unwrap().from, SWITCH, "its leadership ended before it was recorded");
    (reserved.leader.timeline, reserved.leader.history) = (TimelineId(2), history(&[(1, SWITCH.0)]));
    assert_eq!(reserved.lost().unwrap().from, SWITCH, "the leader writes on that number now");
}

#[test]
fn a_promotion_that_is_on_nobodys_record_was_made_by_hand() {
    use DatabaseState::{InArchiveRecovery, InProduction, ShutDown, ShutDownInRecovery};
    let by_hand = |state, timeline, promoted| promoted_by_hand(&ControlFacts { promoted, ..control(state, timeline, 1_000) });
    let of = |timeline, epoch| Some((TimelineId(timeline), epoch));
    for state in [InProduction, ShutDown] {
        assert_eq!(by_hand(state, 2, None), Some(TimelineId(2)));
        assert_eq!(by_hand(state, 3, of(2, Epoch(5))), Some(TimelineId(3)), "the record is of an earlier one");
        assert_eq!(by_hand(state, 2, of(2, Epoch(5))), None, "a leadership ordered it");
        assert_eq!(by_hand(state, 2, of(2, Epoch::BY_HAND)), None, "it is on record as what it is");
        assert_eq!(by_hand(state, 1, None), None, "initdb made timeline 1");
    }
    for state in [ShutDownInRecovery, InArchiveRecovery] {
        assert_eq!(by_hand(state, 2, None), None, "a standby got its timeline by streaming");
    }
    let copy = ControlFacts { backup_label: true, ..control(InProduction, 2, 1_000) };
    assert_eq!(promoted_by_hand(&copy), None, "a copy has the control file of whom it was made from");
}

#[test]
fn row_53_who_promoted_a_number_that_history_gives_to_another_follows_nobody_unjudged() {
    let by = |epoch| Some((TimelineId(2), Epoch(epoch)));
    let hand = Some((TimelineId(2), Epoch::BY_HAND));
    let (known, unrecorded) = ([recorded(2, "b", 8, 5, 1, 500)], [entry(2, "b", 8)]);
    let (before, after) = ([recorded(1, "b", 8, 5, 0, 0)], [recorded(3, "b", 8, 5, 2, 500)]);
    let table: [(_, &[HistoryEntry], bool, &str); 11] = [
        (None, &known, false, "it promoted nothing"),
        (Some((TimelineId(1), Epoch(6))), &known, false, "it promoted another timeline, long ago"),
        (by(5), &known, false, "it is the one that history names"),
        (by(6), &known, true, "another leadership made it"),
        (by(5), &unrecorded, true, "whose it is was never recorded"),
        (by(5), &[], true, "the history is gone, and it came from a leadership"),
        (hand, &known, true, "a leadership made the number too"),
        (hand, &unrecorded, true, "a leadership may have made the number too"),
        (hand, &before, true, "there were leaderships before, and none made the number"),
        (hand, &after, true, "the number was there before pgherd, and who has made it is seen from the files"),
        (hand, &[], true, "somebody else may have promoted to it by hand too, or its leadership is forgotten"),
    ];
    for (promoted, history, doubtful, why) in table {
        assert_eq!(may_be_of_another_promotion(TimelineId(2), promoted, history), doubtful, "{why}");
    }
}

#[test]
fn row_53_also_for_a_promotion_without_a_record_that_ended_before_its_first_checkpoint() {
    let mut case = of_timeline_2();
    case.local.state = DatabaseState::InProduction;
    (case.local.timeline, case.local.checkpoint) = (TimelineId(1), Lsn(SWITCH.0 - 0x80));
    (case.local.min_recovery_timeline, case.local.min_recovery_end) = (TimelineId(2), Lsn(SWITCH.0 + 0x60));
    assert_eq!(case.lost().unwrap().from, SWITCH);
    case.local.state = DatabaseState::InArchiveRecovery;
    assert_eq!(case.decide(), Rejoin::Follow, "a standby did not promote it");
}

#[test]
fn timeline_1_needs_no_record_of_a_promotion_since_initdb_made_it() {
    let mut case = old_primary();
    case.promoted_under = Some(Epoch(3));
    assert_eq!(case.decide(), Rejoin::Follow);
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
    let unrecorded = Case { promoted_under: None, unrecorded: true, ..of_timeline_2() };
    assert!(matches!(unrecorded.decide(), Rejoin::Clone { .. }), "the leadership of that number ended before it was recorded");
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

/// Its WAL goes past the switch, and nothing else is wrong with it.
fn diverged() -> Case {
    old_primary().last_record(SWITCH.0 + 0x28).rewinds()
}

fn clone_because(case: &Case, part: &str) {
    match case.decide() {
        Rejoin::Clone { why, lost } => assert!(why.contains(part) && lost.is_some(), "{why}"),
        other => panic!("expected a clone because of {part}, got {other:?}"),
    }
}

#[test]
fn a_member_that_wrote_on_is_rewound_and_what_is_lost_is_named() {
    let Rejoin::Rewind { lost, .. } = diverged().decide() else { panic!("{:?}", diverged().decide()) };
    assert_eq!(lost, LostRange { timeline: TimelineId(1), from: SWITCH, to: Some(Lsn(SWITCH.0 + 0x28)) });
    let mut branched = of_timeline_2().rewinds();
    branched.wal.timeline = TimelineId(4);
    branched.wal.history = Some(history(&[(1, SWITCH.0), (2, 0x780_0000)]));
    branched.local.timeline = TimelineId(4);
    let Rejoin::Rewind { lost, .. } = branched.decide() else { panic!("{:?}", branched.decide()) };
    assert_eq!((lost.timeline, lost.from), (TimelineId(2), Lsn(0x700_0000)), "it begins on the timeline that both were on last");
}

#[test]
fn whatever_pg_rewind_needs_and_is_not_there_has_the_member_cloned_with_the_reason() {
    let with = |change: fn(&mut Case)| {
        let mut case = diverged();
        change(&mut case);
        case
    };
    clone_because(&with(|case| (case.local.data_checksums, case.local.wal_log_hints) = (false, false)), "wal_log_hints");
    clone_because(&with(|case| case.leader.full_page_writes = false), "full_page_writes");
    clone_because(&with(|case| case.local.backup_label = true), "backup_label");
    clone_because(&with(|case| case.local.state = DatabaseState::InArchiveRecovery), "good order");
    clone_because(&with(|case| (case.local.state, case.local.standby_signal) = (DatabaseState::InCrashRecovery, true)), "good order");
    clone_because(&with(|case| case.rewinding.wanted = false), "use_pg_rewind");
    clone_because(&with(|case| case.rewinding.obstacle = Some("no program".to_owned())), "no program");
    clone_because(&with(|case| case.rewinding.failures = ATTEMPTS_MAX), "times in a row");
    clone_because(&with(|case| case.wal.last_record = LastRecord::Unknown("gone".to_owned())), "cannot be read");
    for (state, standby_signal) in [(DatabaseState::InProduction, false), (DatabaseState::ShutDownInRecovery, true)] {
        let case = with(|_| {});
        let local = ControlFacts { state, standby_signal, ..case.local.clone() };
        assert!(matches!(Case { local, ..case }.decide(), Rejoin::Rewind { .. }), "{state:?}");
    }
}

#[test]
fn a_rewind_waits_until_the_leaders_control_file_shows_its_timeline() {
    let mut case = diverged();
    case.leader.control_timeline = TimelineId(1);
    assert!(matches!(case.decide(), Rejoin::Wait { why } if why.contains("control file")));
    case.local.backup_label = true;
    assert!(matches!(case.decide(), Rejoin::Clone { .. }), "a copy waits for nothing");
}

/// pg_rewind would see none of these, or see them elsewhere.
#[test]
fn row_53_what_numbers_cannot_tell_apart_is_never_rewound() {
    clone_because(&of_timeline_2().promoted(99).rewinds(), "one number");
    let mut elsewhere = of_timeline_2().rewinds();
    elsewhere.leader.history = history(&[(1, SWITCH.0 + 0x1000), (2, 0x700_0000)]);
    clone_because(&elsewhere, "one number");
    let mut same = old_primary().rewinds();
    same.leader.timeline = TimelineId(1);
    same.leader.history = history(&[]);
    clone_because(&same, "one number");
}

#[test]
fn a_policy_that_says_stop_leaves_the_member_to_a_person() {
    let mut case = diverged();
    case.rewinding.on_failure = OnRewindFailure::Stop;
    assert!(matches!(case.decide(), Rejoin::Rewind { .. }));
    case.local.data_checksums = false;
    case.local.wal_log_hints = false;
    assert!(matches!(case.decide(), Rejoin::Refuse { why } if why.contains("wal_log_hints") && why.contains("stop")));
    case.rewinding.wanted = false;
    assert!(matches!(case.decide(), Rejoin::Clone { .. }), "a rewind that nobody wants does not fail");
}

#[test]
fn a_rewind_that_broke_off_goes_on_only_where_nothing_has_changed_and_is_bounded() {
    let Case { mut leader, mut rewinding, .. } = diverged();
    // What a first attempt needs is there already.
    rewinding.obstacle = Some("no room to keep more".to_owned());
    leader.timeline = half_rewound().leader_timeline;
    let again = |change: fn(&mut RewindAttempt, &mut BrokenOff<'_>)| {
        let mut attempt = half_rewound();
        let (kept, promoted_under) = (attempt.clone(), attempt.promoted_under);
        let checkpoint = Some(attempt.checkpoint);
        let mut broken_off =
            BrokenOff { attempt: &kept, leader: &leader, promoted_under, same_boot: true, checkpoint, rewinding: &rewinding };
        change(&mut attempt, &mut broken_off);
        go_on(BrokenOff { attempt: &attempt, ..broken_off })
    };
    let is_cloned = |decided: &Rejoin| matches!(decided, Rejoin::Clone { lost: Some(_), .. });
    assert!(matches!(again(|_, _| {}), Rejoin::Rewind { .. }));
    assert!(is_cloned(&again(|attempt, _| attempt.attempts = ATTEMPTS_MAX)));
    assert!(is_cloned(&again(|_, broken_off| broken_off.same_boot = false)), "what was not synced is gone");
    assert!(is_cloned(&again(|_, broken_off| broken_off.promoted_under = Some(Epoch(351)))), "another leadership");
    assert!(is_cloned(&again(|_, broken_off| broken_off.checkpoint = Some(Lsn(991)))), "the control file is the leader's already");
    assert!(is_cloned(&again(|_, broken_off| broken_off.checkpoint = None)), "it cannot be read");
    let finished = again(|attempt, broken_off| {
        (attempt.finished, broken_off.same_boot, broken_off.checkpoint) = (true, false, Some(Lsn(991)));
    });
    assert!(matches!(finished, Rejoin::Rewind { .. }), "it is all on disk: {finished:?}");
}

#[test]
fn what_can_be_followed_and_does_not_start_is_copied_only_for_a_segment_that_cannot_be_completed() {
    let incomplete = half_segment(Some("it is no better"));
    assert_eq!(unless_it_does_not_start(Rejoin::Follow, 30, None), Rejoin::Follow, "the cause may be another, and a copy no help");
    assert_eq!(unless_it_does_not_start(Rejoin::Follow, STARTS_IN_VAIN - 1, Some(&incomplete)), Rejoin::Follow);
    let copied = unless_it_does_not_start(Rejoin::Follow, STARTS_IN_VAIN, Some(&incomplete));
    assert!(matches!(&copied, Rejoin::Clone { why, lost: None } if why.contains("it is no better")), "{copied:?}");
    let waits = Rejoin::Wait { why: "a test".to_owned() };
    assert_eq!(unless_it_does_not_start(waits.clone(), STARTS_IN_VAIN, Some(&incomplete)), waits);
}
