//! Each rule of the election is a promise. Three members `a`, `b`, `c` whose leader was `a`; `b` asks, unless a test says otherwise.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::facts::cluster::{Condition, FailsafeRecord, MemberRole, ReleaseRecord, Severity, StatusRecord};
use crate::machine::tests::fixtures::{SYSTEM, T0, empty_record, entry, key, ms, name, record, recorded, spec, view};
use crate::policy::switchover::REPLAY_PAUSED;
use crate::types::{Epoch, Revision};

mod by_hand;
mod synchronous;

/// The ladder of a ttl of 10 s.
const LADDER: Duration = Duration::from_millis(5_116);
const VACANCY: Revision = Revision(50);
const LSN: u64 = 0x0300_0000;
const MEMBERS: [&str; 3] = ["a", "b", "c"];

/// The lock went away at `T0`, without a release; all that is not said is well.
struct Vacant {
    members: Vec<&'static str>,
    view: ClusterView,
    me: MemberName,
    own: Vote,
    peers: Option<Vec<MemberName>>,
    system_id: SystemId,
    promise: Option<Promise>,
    promoted: Option<(TimelineId, Epoch)>,
    accept_loss: Option<u64>,
}

fn vote(timeline: u32, lsn: u64) -> Vote {
    Vote { vacancy: VACANCY, timeline: TimelineId(timeline), lsn: Lsn(lsn) }
}

impl Vacant {
    fn new() -> Self {
        let mut view = view(60);
        view.history = vec![recorded(1, "a", 1, 10, 0, 0)];
        view.history_revision = VACANCY;
        view.status = Some(StatusRecord {
            epoch: Epoch(10),
            timeline: TimelineId(1),
            lsn: Lsn(LSN),
            slots: Default::default(),
            replayed: Default::default(),
            conditions: Vec::new(),
        });
        let vacant = Vacant {
            members: MEMBERS.to_vec(),
            view,
            me: name("b"),
            own: vote(1, LSN),
            peers: Some(Vec::new()),
            system_id: SYSTEM,
            promise: None,
            promoted: None,
            accept_loss: None,
        };
        vacant.voted("b", vote(1, LSN)).voted("c", vote(1, LSN))
    }

    fn members(mut self, members: &[&'static str]) -> Self {
        self.members = members.to_vec();
        self
    }

    fn voted(mut self, member: &str, vote: Vote) -> Self {
        let mut record = record(MemberRole::Replica, vote.timeline.0, vote.lsn.0);
        record.vote = Some(vote);
        if self.me == name(member) {
            self.own = vote;
        }
        self.view.members.insert(name(member), key(record, 7));
        self
    }

    fn silent(mut self, member: &str) -> Self {
        self.view.members.insert(name(member), key(record(MemberRole::Replica, 1, LSN), 7));
        self
    }

    fn gone(mut self, member: &str) -> Self {
        self.view.members.remove(&name(member));
        self
    }

    fn of_member(mut self, me: &str) -> Self {
        self.me = name(me);
        self.own = self.view.members.get(&self.me).and_then(|key| key.record.vote).unwrap_or(self.own);
        self
    }

    fn released_to(mut self, to: Option<&str>) -> Self {
        self.view.release =
            Some(ReleaseRecord { epoch: Epoch(10), timeline: TimelineId(1), lsn: Lsn(LSN), to: to.map(name), all_seen: true });
        self.peers = None;
        self
    }

    fn history(mut self, history: Vec<HistoryEntry>) -> Self {
        self.view.history = history;
        self
    }

    fn peers(mut self, writable: Option<&[&str]>) -> Self {
        self.peers = writable.map(|names| names.iter().copied().map(name).collect());
        self
    }

    fn with(mut self, change: impl FnOnce(&mut ClusterView)) -> Self {
        change(&mut self.view);
        self
    }

    fn judge_after(&self, since_ms: u64) -> Verdict {
        let spec = spec(&self.members);
        judge(&Inputs {
            now: T0 + ms(since_ms),
            me: &self.me,
            spec: &spec,
            view: &self.view,
            vacant_since: T0,
            own: self.own,
            system_id: self.system_id,
            peers: self.peers.as_deref(),
            ladder: LADDER,
            promise: self.promise.as_ref(),
            started: T0.before(ms(1_000)),
            promoted: self.promoted,
            accept_loss: self.accept_loss,
        })
    }

    fn runs_after(&self, since_ms: u64) -> bool {
        matches!(self.judge_after(since_ms), Verdict::Run { .. })
    }

    fn not_eligible_because(&self, because: &str) {
        match self.judge_after(60_000) {
            Verdict::NotEligible { why } => assert!(why.contains(because), "{why}"),
            other => panic!("{other:?}, expected: {because}"),
        }
    }
}

#[test]
fn when_all_voters_have_voted_the_best_runs_at_once() {
    let vacant = Vacant::new().voted("b", vote(1, LSN + 8));
    assert!(vacant.runs_after(0));
}

#[test]
fn the_others_wait_their_turn_and_run_if_the_best_does_not() {
    let vacant = Vacant::new().voted("c", vote(1, LSN + 8));
    assert!(!vacant.runs_after(VOTERS_GRACE_MS + RANK_STEP_MS - 1));
    assert!(vacant.runs_after(VOTERS_GRACE_MS + RANK_STEP_MS));
}

#[test]
fn a_voter_that_is_silent_is_waited_for_no_longer_than_the_grace() {
    let vacant = Vacant::new().voted("b", vote(1, LSN + 8)).silent("c");
    assert!(matches!(vacant.judge_after(0), Verdict::Wait { until, .. } if until == T0 + ms(VOTERS_GRACE_MS)));
    assert!(vacant.runs_after(VOTERS_GRACE_MS));
}

#[test]
fn a_vote_for_an_earlier_vacancy_is_none() {
    let old = Vote { vacancy: Revision(VACANCY.0 - 1), ..vote(1, LSN + 8) };
    let vacant = Vacant::new().voted("c", old);
    assert!(!vacant.runs_after(0), "c has not spoken for this vacancy");
    assert!(vacant.runs_after(VOTERS_GRACE_MS), "and its old word makes it no better");
}

#[test]
fn neither_the_former_leader_nor_who_never_leads_nor_who_is_empty_is_waited_for() {
    let vacant = Vacant::new().silent("a");
    assert!(vacant.runs_after(0), "the former holder");
    let vacant = Vacant::new().members(&["a", "b", "c, failover_priority: 0"]).silent("c");
    assert!(vacant.runs_after(0), "who never leads gives no vote");
    let vacant = Vacant::new().with(|view| {
        view.members.insert(name("c"), key(empty_record(), 7));
    });
    assert!(vacant.runs_after(0), "who has no data has no position");
    let vacant = Vacant::new().members(&["a", "b"]).silent("c");
    assert!(vacant.runs_after(0), "who is not declared has no say");
}

#[test]
fn timeline_comes_before_position_before_priority_before_the_order_in_the_spec() {
    let history = vec![recorded(1, "a", 1, 10, 0, 0), entry(2, "a", 1)];
    let votes: [(&[&'static str; 3], Vote, Vote); 4] = [
        (&MEMBERS, vote(2, LSN), vote(1, LSN + 800)),
        (&["a", "b", "c, failover_priority: 5"], vote(1, LSN + 8), vote(1, LSN)),
        (&["a", "c", "b, failover_priority: 2"], vote(1, LSN), vote(1, LSN)),
        (&["a", "b", "c"], vote(1, LSN), vote(1, LSN)),
    ];
    for (members, b, c) in votes {
        let vacant = Vacant::new().members(members).history(history.clone()).voted("b", b).voted("c", c);
        assert!(vacant.runs_after(0), "{members:?} {b:?} {c:?}");
        assert!(!vacant.of_member("c").runs_after(0), "{members:?} {b:?} {c:?}: only one of them is the best");
    }
}

#[test]
fn the_member_that_a_release_names_runs_at_once_and_the_others_leave_it_alone_for_a_bounded_time() {
    let vacant = Vacant::new().released_to(Some("c")).voted("b", vote(1, LSN + 8));
    assert!(!vacant.runs_after(0));
    assert!(!vacant.runs_after(EXPECTED_GRACE_MS - 1));
    assert!(vacant.runs_after(EXPECTED_GRACE_MS));
    assert!(vacant.of_member("c").runs_after(0), "without votes, peers or rank");
}

#[test]
fn a_release_for_a_member_that_is_not_there_holds_nobody_up() {
    let vacant = Vacant::new().released_to(Some("c")).gone("c");
    assert!(vacant.runs_after(0));
    assert!(Vacant::new().released_to(None).runs_after(0), "nor does one for nobody");
}

#[test]
fn row_37_and_39_without_a_release_the_others_are_asked_whether_they_write_first() {
    assert!(!Vacant::new().peers(None).runs_after(60_000), "not asked yet");
    let vacant = Vacant::new().peers(Some(&["a"]));
    assert!(!vacant.runs_after(LADDER.as_millis() as u64 - 1), "whoever may write is given time to be fenced");
    assert!(vacant.runs_after(LADDER.as_millis() as u64 + 1), "and no more than that");
    assert!(Vacant::new().released_to(None).runs_after(0), "a release in good order says it all");
}

#[test]
fn i1_a_member_that_promised_or_that_the_failsafe_key_does_not_name_does_not_run_however_well_it_stands() {
    let named =
        |members: &[&str]| FailsafeRecord { ttl_s: 10, members: members.iter().map(|member| (name(member), String::new())).collect() };
    let mut vacant = Vacant::new().with(|view| view.failsafe = Some(named(&MEMBERS)));
    assert_eq!(
        vacant.judge_after(0),
        wait(T0 + ms(9_000), "the run of this daemon before may have promised not to run: it waits one ttl from its start")
    );
    assert!(vacant.runs_after(9_000), "a ttl after its start");
    vacant.promise = Some(Promise { to: name("a"), epoch: Some(Epoch(10)), until: T0 + ms(30_000) });
    assert!(matches!(vacant.judge_after(29_999), Verdict::Wait { until, .. } if until == T0 + ms(30_000)));
    assert!(vacant.runs_after(30_000));
    Vacant::new().with(|view| view.failsafe = Some(named(&["a", "c"]))).not_eligible_because("does not name this member");
}

#[test]
fn who_never_leads_or_is_not_declared_is_not_eligible() {
    for member in ["b, failover_priority: 0", "b, tags: { nofailover: true }"] {
        Vacant::new().members(&["a", member, "c"]).not_eligible_because("nofailover");
    }
    Vacant::new().members(&["a", "c"]).not_eligible_because("not in spec.members");
}

#[test]
fn p2_who_is_too_far_behind_the_last_known_position_of_the_leader_is_not_eligible() {
    let limit = 1 << 20;
    let behind = |bytes: u64| Vacant::new().voted("b", vote(1, LSN - bytes)).voted("c", vote(1, LSN - bytes));
    assert!(behind(limit).runs_after(0));
    behind(limit + 1).not_eligible_because("behind");
    // The release tells of more than the last status did.
    let mut vacant = behind(limit).released_to(None);
    vacant.view.release.as_mut().unwrap().lsn = Lsn(LSN + 1);
    vacant.not_eligible_because("behind");
}

#[test]
fn p2_an_unknown_position_is_not_a_position_without_lag() {
    let vacant = Vacant::new().voted("b", vote(1, 0)).with(|view| view.status = None);
    vacant.not_eligible_because("not known");
}

#[test]
fn row_53_a_timeline_that_the_cluster_has_left_behind_is_not_eligible_however_far_it_goes() {
    // `a` promoted to 2 and died; `b` was promoted to 3 from the same point and led. Now `a` is back with more WAL.
    let history = vec![recorded(1, "c", 1, 10, 0, 0), recorded(2, "a", 2, 20, 1, LSN), recorded(3, "b", 3, 30, 1, LSN)];
    let vacant = Vacant::new().history(history).voted("b", vote(3, LSN + 64)).voted("c", vote(3, LSN + 64));
    vacant.voted("a", vote(2, LSN + 4_096)).of_member("a").not_eligible_because("not an ancestor");
}

#[test]
fn row_53_a_member_off_the_lineage_is_nobodys_better_candidate() {
    let history = vec![recorded(1, "c", 1, 10, 0, 0), recorded(2, "a", 2, 20, 1, LSN)];
    let vacant = Vacant::new().history(history).voted("b", vote(2, LSN + 64)).voted("c", vote(5, LSN + 4_096));
    assert!(vacant.runs_after(0), "c was promoted by hand: {:?}", vacant.judge_after(0));
}

#[test]
fn an_ancestor_counts_up_to_the_point_where_it_was_left() {
    let history = || vec![recorded(1, "c", 1, 10, 0, 0), recorded(2, "a", 2, 20, 1, LSN + 64)];
    let at = |lsn: u64| Vacant::new().history(history()).voted("b", vote(1, lsn)).gone("c");
    assert!(at(LSN + 64).runs_after(60_000), "it received nothing of the new timeline yet");
    at(LSN + 65).not_eligible_because("was left at");
}

#[test]
fn row_66_a_later_timeline_that_no_leadership_reserved_is_not_eligible() {
    Vacant::new().voted("b", vote(2, LSN + 8)).not_eligible_because("by hand");
    // Reserved by a leadership that did not come to record it: its standbys may lead.
    let history = vec![recorded(1, "a", 1, 10, 0, 0), entry(2, "a", 2)];
    assert!(Vacant::new().history(history).voted("b", vote(2, LSN + 8)).runs_after(0));
}

#[test]
fn where_nobody_is_on_the_lineage_any_more_the_best_leads_once_all_have_said_so() {
    let vacant = Vacant::new().voted("a", vote(2, LSN)).voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN));
    assert!(vacant.runs_after(0), "{:?}", vacant.judge_after(0));
    assert!(!Vacant::new().voted("a", vote(2, LSN)).voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN)).of_member("c").runs_after(0));
    Vacant::new().voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN)).gone("a").not_eligible_because("by hand");
    Vacant::new().voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN)).silent("a").not_eligible_because("by hand");
    Vacant::new().voted("a", vote(1, LSN)).voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN)).not_eligible_because("by hand");
}

/// Found by the simulator's seed 7942.
#[test]
fn a_member_that_the_spec_does_not_name_and_that_is_on_the_lineage_is_not_passed_over() {
    let removed = |timeline| {
        let vacant = Vacant::new().voted("a", vote(2, LSN)).voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN));
        vacant.with(|view| drop(view.members.insert(name("d"), key(record(MemberRole::Replica, timeline, LSN), 7))))
    };
    removed(1).not_eligible_because("by hand");
    let mut elsewhere = removed(1);
    elsewhere.view.members.get_mut(&name("d")).unwrap().record = empty_record();
    assert!(elsewhere.runs_after(0), "{:?}", elsewhere.judge_after(0));
}

#[test]
fn row_64_a_member_of_another_cluster_is_not_eligible() {
    let mut vacant = Vacant::new();
    vacant.system_id = SystemId(1);
    vacant.not_eligible_because("system identifier");
}

#[test]
fn nobody_leads_while_somebody_initializes_or_the_identity_is_unreadable() {
    let claimed = Initialize::Claimed { by: "c".to_owned(), lease: crate::types::LeaseId(70) };
    Vacant::new().with(|view| view.initialize = Some(claimed)).not_eligible_because("is initializing");
    Vacant::new().with(|view| view.initialize = Some(Initialize::Unreadable("x".to_owned()))).not_eligible_because("unreadable");
}

#[test]
fn row_72_nobody_leads_without_a_spec_in_etcd() {
    Vacant::new().with(|view| view.spec = None).not_eligible_because("no spec");
}

/// etcd was emptied, a spec applied, and all members are there.
fn wiped() -> Vacant {
    let vacant = Vacant::new().voted("a", vote(1, LSN)).voted("b", vote(1, LSN + 8));
    vacant.with(|view| {
        (view.initialize, view.status) = (None, None);
        view.history.clear();
    })
}

#[test]
fn i9_without_etcds_records_nobody_with_data_is_passed_over_before_it_said_how_far_it_is() {
    assert!(matches!(wiped().silent("c").judge_after(60_000), Verdict::Wait { why, .. } if why.contains("`c`")));
    let with_c_that_never_leads = || wiped().silent("c").members(&["a", "b", "c, failover_priority: 0"]);
    assert!(matches!(with_c_that_never_leads().judge_after(60_000), Verdict::Run { .. }), "it never votes, and says where it is");
    let unread = with_c_that_never_leads().with(|view| view.members.get_mut(&name("c")).unwrap().record.receive_lsn = None);
    assert!(matches!(unread.judge_after(60_000), Verdict::Wait { why, .. } if why.contains("`c`")));
}

#[test]
fn i9_a_server_that_was_promoted_outside_the_leadership_of_its_timeline_does_not_stand_for_election() {
    let vacant = |promoted| {
        let history = vec![recorded(1, "a", 1, 10, 0, 0), recorded(2, "a", 1, 20, 1, LSN)];
        Vacant { promoted, ..Vacant::new().voted("b", vote(2, LSN + 8)).voted("c", vote(2, LSN)).history(history) }
    };
    assert!(vacant(None).runs_after(0), "it streamed timeline 2");
    assert!(vacant(Some((TimelineId(2), Epoch(20)))).runs_after(0), "it led timeline 2");
    assert!(vacant(Some((TimelineId(1), Epoch::BY_HAND))).runs_after(0), "it was promoted once, and has left that timeline");
    let unrecorded = |who, promoted| vacant(Some(promoted)).history(vec![recorded(1, "a", 1, 10, 0, 0), entry(2, who, 8)]);
    assert!(unrecorded("b", (TimelineId(2), Epoch(20))).runs_after(0), "its leadership ended before it was recorded");
    unrecorded("b", (TimelineId(2), Epoch::BY_HAND)).not_eligible_because("timeline 2 was promoted here");
    unrecorded("a", (TimelineId(2), Epoch(20))).not_eligible_because("timeline 2 was promoted here");
    let forgotten = vacant(Some((TimelineId(2), Epoch(20)))).history(Vec::new());
    assert!(matches!(forgotten.judge_after(60_000), Verdict::Run { .. }), "etcd was lost, and nobody else has that number");
    vacant(Some((TimelineId(2), Epoch::BY_HAND))).not_eligible_because("timeline 2 was promoted here");
    vacant(Some((TimelineId(2), Epoch(15)))).not_eligible_because("timeline 2 was promoted here");
}

#[test]
fn rows_13_and_72_without_an_identity_in_etcd_all_declared_members_have_to_report_the_same_first() {
    match wiped().judge_after(0) {
        Verdict::Run { initialize, .. } => assert_eq!(initialize, Some(SYSTEM), "the identity is written with the lock"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(wiped().gone("c").judge_after(60_000), Verdict::Wait { why, .. } if why.contains("`c`")));
    let unknown = wiped().with(|view| view.members.get_mut(&name("c")).unwrap().record.data_directory = DataDirectoryReport::Unknown);
    assert!(matches!(unknown.judge_after(60_000), Verdict::Wait { why, .. } if why.contains("`c`")));
    let empty = wiped().with(|view| view.members.get_mut(&name("c")).unwrap().record = empty_record());
    assert!(empty.runs_after(0), "one that is empty has reported too");
    let another = wiped().with(|view| view.members.get_mut(&name("c")).unwrap().record.system_id = Some(SystemId(1)));
    another.not_eligible_because("an operator has to decide");
}

#[test]
fn row_13_after_all_were_down_the_farthest_of_the_voters_leads() {
    let vacant = Vacant::new().voted("a", vote(1, LSN + 64)).voted("b", vote(1, LSN)).voted("c", vote(1, LSN));
    assert!(!vacant.runs_after(0));
    assert!(vacant.of_member("a").runs_after(0), "the former leader too, if it is the farthest");
}

#[test]
fn a_switch_point_is_found_through_all_ancestors_and_not_elsewhere() {
    let history = [recorded(2, "a", 1, 10, 1, 100), recorded(4, "b", 2, 20, 2, 200), recorded(5, "c", 3, 30, 4, 300)];
    let from = |timeline, ancestor| switch_from(&history, TimelineId(timeline), TimelineId(ancestor));
    assert_eq!((from(5, 4), from(5, 2), from(5, 1)), (Some(Lsn(300)), Some(Lsn(200)), Some(Lsn(100))));
    assert_eq!((from(5, 3), from(4, 5), from(9, 1)), (None, None, None));
}

fn histories() -> impl Strategy<Value = (Vec<u32>, Vec<u32>, u32, u32)> {
    (prop::collection::vec(1..60_u32, 0..20), prop::collection::vec(1..60_u32, 0..4), 1..60_u32, 0..60_u32)
}

proptest! {
    #[test]
    fn i9_the_next_timeline_is_none_that_anybody_used_or_reserved((reserved, reported, own, status) in histories()) {
        let mut view = view(9);
        view.history = reserved.iter().map(|timeline| entry(*timeline, "a", 1)).collect();
        for (index, timeline) in reported.iter().enumerate() {
            let member = name(["a", "b", "c", "d"][index]);
            view.members.insert(member, key(record(MemberRole::Replica, *timeline, 1), 7));
        }
        view.status = Some(StatusRecord { epoch: Epoch(1), timeline: TimelineId(status), lsn: Lsn(1), slots: Default::default(), replayed: Default::default(), conditions: Vec::new() });
        let next = next_timeline(&view, TimelineId(own)).0;
        let known = reserved.iter().chain(&reported).chain([&own, &status]);
        prop_assert!(known.into_iter().all(|timeline| next > *timeline));
    }

    #[test]
    fn i9_ids_that_leaderships_reserve_one_after_the_other_never_repeat(owns in prop::collection::vec(1..9_u32, 1..40)) {
        let mut view = view(9);
        let mut seen = std::collections::BTreeSet::new();
        for own in owns {
            let next = next_timeline(&view, TimelineId(own));
            prop_assert!(seen.insert(next), "{next} twice");
            view.history.push(entry(next.0, "a", 1));
        }
    }

    #[test]
    fn of_any_votes_one_member_at_most_runs_before_the_others_turn(
        lsns in prop::array::uniform3(LSN..LSN + 4),
        timelines in prop::array::uniform3(1..3_u32),
    ) {
        let history = vec![recorded(1, "a", 1, 10, 0, 0), entry(2, "a", 1)];
        let mut vacant = Vacant::new().history(history);
        for (index, member) in MEMBERS.into_iter().enumerate() {
            vacant = vacant.voted(member, vote(timelines[index], lsns[index]));
        }
        let running = MEMBERS.into_iter().filter(|member| {
            let mut other = Vacant { members: vacant.members.clone(), view: vacant.view.clone(), peers: Some(Vec::new()), ..Vacant::new() };
            other = other.of_member(member);
            other.runs_after(0)
        });
        prop_assert_eq!(running.count(), 1);
    }
}

/// A parameter that is lower than the primary's, and the promotion would fail.
#[test]
fn row_50_a_member_whose_replay_is_paused_runs_after_all_others_and_still_runs() {
    let paused = |view: &mut ClusterView, member: &str| {
        let (kind, message) = (REPLAY_PAUSED.to_owned(), "replay is paused".to_owned());
        let condition = Condition { kind, severity: Severity::Warning, message };
        view.members.get_mut(&name(member)).unwrap().record.conditions.push(condition);
    };
    let ahead = || Vacant::new().voted("b", vote(1, LSN + 8)).with(|view| paused(view, "b"));
    assert!(ahead().of_member("c").runs_after(0), "the farthest one would not come out of recovery");
    assert!(!ahead().runs_after(1_999));
    assert!(ahead().runs_after(2_000), "the others did not");
    assert!(ahead().with(|view| paused(view, "c")).runs_after(0), "all are");
}
