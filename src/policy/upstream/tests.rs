//! Of three members `c` is to follow `b`, and `a` leads.

use super::*;
use crate::facts::cluster::LeaderKey;
use crate::machine::tests::fixtures::{T0, key, name, record, spec_with, view};
use crate::types::{Epoch, LeaseId, Revision, TimelineId};

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

struct Sight {
    spec: std::sync::Arc<ClusterSpec>,
    view: ClusterView,
    remembered: Remembered,
    follows: Option<MemberName>,
    now: BootTime,
}

impl Sight {
    fn new() -> Sight {
        let mut view = view(60);
        view.leader = Some(LeaderKey { holder: "a".to_owned(), epoch: Epoch(50), lease: LeaseId(1), mod_revision: Revision(50) });
        view.members.insert(name("a"), key(record(MemberRole::Primary, 1, 1_000), 1));
        for member in ["b", "c"] {
            let mut standby = record(MemberRole::Replica, 1, 1_000);
            standby.state = STREAMING.to_owned();
            standby.replay_lsn = Some(Lsn(1_000));
            view.members.insert(name(member), key(standby, 2));
        }
        let mut spec = (*spec_with(&["a", "b", "c"], "replication: { mode: async }")).clone();
        spec.members[2].tags.replicatefrom = Some(name("b"));
        Sight { spec: std::sync::Arc::new(spec), view, remembered: Remembered::default(), follows: None, now: T0 }
    }

    fn b_is(&mut self, state: &str) {
        self.view.members.get_mut(&name("b")).unwrap().record.state = state.to_owned();
    }

    /// So much later; what was chosen is followed. Says whom.
    fn later(&mut self, seconds: u64, gets_nothing_since: Option<BootTime>) -> &'static str {
        self.now = self.now + s(seconds);
        let me = self.spec.members[2].clone();
        let inputs = Inputs { now: self.now, me: &me, view: &self.view, follows: self.follows.as_ref(), gets_nothing_since };
        let source = choose(&mut self.remembered, &inputs);
        let leader = self.view.leader_member().map(|(name, _)| name.clone());
        self.follows = match &source {
            Source::Member(name) => Some(name.clone()),
            Source::Leader => leader.or(self.follows.take()),
        };
        if source == Source::Leader { "leader" } else { "b" }
    }
}

#[test]
fn a_server_that_starts_streams_from_the_member_of_its_tag_at_once_if_that_one_is_well() {
    assert_eq!(Sight::new().later(0, None), "b");
    let mut sight = Sight::new();
    sight.b_is("running");
    assert_eq!(sight.later(0, None), "leader");
    let mut sight = Sight::new();
    sight.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(2));
    assert_eq!(sight.later(0, None), "leader", "of another timeline");
}

#[test]
fn one_without_the_tag_streams_from_the_leader() {
    let mut sight = Sight::new();
    std::sync::Arc::make_mut(&mut sight.spec).members[2].tags.replicatefrom = None;
    assert_eq!(sight.later(0, None), "leader");
}

#[test]
fn row_56_an_upstream_that_is_away_is_left_after_a_while_and_returned_to_once_it_has_been_well_for_a_while() {
    let mut sight = Sight::new();
    assert_eq!(sight.later(0, None), "b");
    let b = sight.view.members.remove(&name("b")).unwrap();
    assert_eq!(sight.later(1, None), "b");
    assert_eq!(sight.later(4, None), "b");
    assert_eq!(sight.later(1, None), "leader");
    sight.view.members.insert(name("b"), b);
    assert_eq!(sight.later(1, None), "leader");
    assert_eq!(sight.later(9, None), "leader");
    assert_eq!(sight.later(1, None), "b");
}

#[test]
fn one_that_streams_from_nobody_itself_for_a_moment_is_not_left() {
    let mut sight = Sight::new();
    assert_eq!(sight.later(0, None), "b");
    for _ in 0..10 {
        sight.b_is("running");
        assert_eq!(sight.later(1, None), "b");
        assert_eq!(sight.later(4, None), "b");
        sight.b_is("streaming");
        assert_eq!(sight.later(1, None), "b");
    }
}

#[test]
fn one_that_seems_well_and_gives_nothing_is_returned_to_ever_later() {
    let mut sight = Sight::new();
    assert_eq!(sight.later(0, None), "b");
    for wait in [20, 40, 80, 160, 320, 640, 640] {
        let since = sight.now;
        assert_eq!(sight.later(4, Some(since)), "b");
        assert_eq!(sight.later(1, Some(since)), "leader");
        assert_eq!(sight.later(wait - 1, None), "leader");
        assert_eq!(sight.later(1, None), "b", "after {wait} s");
    }
    // Good for something in the end: what was before does not count.
    assert_eq!(sight.later(SETTLED_AFTER_S, None), "b");
    let since = sight.now;
    assert_eq!(sight.later(5, Some(since)), "leader");
    assert_eq!(sight.later(20, None), "b");
}

#[test]
fn leaving_it_counts_once_however_often_it_is_looked_at_until_the_server_has_been_told() {
    let mut sight = Sight::new();
    assert_eq!(sight.later(0, None), "b");
    let since = sight.now;
    for seconds in [5, 1, 1, 1, 1, 1] {
        assert_eq!(sight.later(seconds, Some(since)), "leader");
        sight.follows = Some(name("b"));
    }
    sight.follows = Some(name("a"));
    assert_eq!(sight.later(14, None), "leader");
    assert_eq!(sight.later(1, None), "b", "20 s after it was left");
}

#[test]
fn the_member_of_the_tag_is_followed_as_the_leader_when_it_leads_and_kept_between_two_leaders() {
    let mut sight = Sight::new();
    assert_eq!(sight.later(0, None), "b");
    sight.b_is("running");
    let leader = sight.view.leader.take();
    assert_eq!(sight.later(100, None), "b", "nobody leads");
    sight.view.leader = leader;
    sight.view.members.get_mut(&name("a")).unwrap().record.role = MemberRole::Replica;
    assert_eq!(sight.later(100, None), "b", "the leader does not write yet");
    sight.view.leader.as_mut().unwrap().holder = "c".to_owned();
    assert_eq!(sight.later(100, None), "b", "it holds the lock itself, and is not told anything else for it");
    sight.view.leader.as_mut().unwrap().holder = "b".to_owned();
    assert_eq!(sight.later(1, None), "leader");
    assert_eq!(sight.follows, Some(name("b")), "nothing has to be changed for that");
}

#[test]
fn a_copy_is_made_of_the_farthest_member_with_clonefrom_that_streams_and_is_near_and_of_the_leader_otherwise() {
    let mut sight = Sight::new();
    let of = |sight: &Sight| copy_source(&sight.spec, &sight.view, &name("c")).cloned();
    assert_eq!(of(&sight), None, "without the tag");
    std::sync::Arc::make_mut(&mut sight.spec).members[1].tags.clonefrom = true;
    std::sync::Arc::make_mut(&mut sight.spec).members[2].tags.clonefrom = true;
    assert_eq!(of(&sight), Some(name("b")), "and never of itself");
    sight.b_is("running");
    assert_eq!(of(&sight), None);
    sight.b_is("streaming");
    sight.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(2));
    assert_eq!(of(&sight), None, "of another timeline");
    sight.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(1));
    sight.view.members.get_mut(&name("a")).unwrap().record.receive_lsn = Some(Lsn(1_000 + (1 << 20)));
    assert_eq!(of(&sight), Some(name("b")));
    sight.view.members.get_mut(&name("a")).unwrap().record.receive_lsn = Some(Lsn(1_001 + (1 << 20)));
    assert_eq!(of(&sight), None, "too far behind");
}

#[test]
fn only_what_begins_on_the_leaders_own_timeline_and_history_is_copied_instead_of_it() {
    let of = |system_id, timeline, left_at| LeaderLineage {
        system_id: crate::types::SystemId(system_id),
        major_version: 17,
        in_recovery: true,
        timeline: TimelineId(timeline),
        control_timeline: TimelineId(timeline),
        full_page_writes: true,
        history: format!("1\t0/{left_at}\tno recovery target specified\n").parse().unwrap(),
        lsn: Lsn(1_000),
    };
    let leader = LeaderLineage { in_recovery: false, ..of(7, 2, "500") };
    assert_eq!(may_be_copied(&of(7, 2, "500"), &leader), Ok(()));
    for (source, why) in [(of(8, 2, "500"), "database system"), (of(7, 1, "500"), "timeline 1"), (of(7, 2, "501"), "timeline 2")] {
        let refused = may_be_copied(&source, &leader).unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(may_be_copied(&of(7, 2, "500"), &of(7, 2, "500")).unwrap_err().contains("still in recovery"));
}
