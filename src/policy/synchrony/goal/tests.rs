//! Who counts, and when: by hand-made sights of three members, `a` leads.

use super::*;
use crate::facts::cluster::MemberRole;
use crate::machine::tests::fixtures::{T0, key, ms, name, record, view};
use crate::spec::cluster::load;

fn spec(replication: &str) -> ClusterSpec {
    let text = format!(
        "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: {{ name: main }}\nspec:\n  members:\n    - {{ name: a, address: h1 }}\n    \
         - {{ name: b, address: h2 }}\n    - {{ name: c, address: h3 }}\n  replication: {{ {replication} }}\n"
    );
    load("a test", &text).unwrap_or_else(|problems| panic!("{problems}")).spec
}

fn replica(member: &str, flush: u64) -> ReplicaFacts {
    ReplicaFacts {
        application_name: member.to_owned(),
        state: "streaming".to_owned(),
        client_addr: None,
        sent_lsn: Some(Lsn(flush)),
        flush_lsn: Some(Lsn(flush)),
        replay_lsn: None,
        sync_state: String::new(),
        sync_priority: 1,
    }
}

fn all_there() -> ClusterView {
    let mut view = view(60);
    for member in ["a", "b", "c"] {
        view.members.insert(name(member), key(record(MemberRole::Replica, 1, 100), 1));
    }
    for key in view.members.values_mut() {
        key.record.features.push(FEATURE.to_owned());
    }
    view
}

struct Sight {
    spec: ClusterSpec,
    standbys: Standbys,
    now: BootTime,
    view: ClusterView,
}

impl Sight {
    fn of(replication: &str) -> Sight {
        Sight { spec: spec(replication), standbys: Standbys::default(), now: T0, view: all_there() }
    }

    /// So much later the server shows these, all of which have flushed what is written.
    fn shows(&mut self, later_ms: u64, members: &[&str]) -> &mut Self {
        let replicas: Vec<ReplicaFacts> = members.iter().map(|member| replica(member, 1_000)).collect();
        self.sees(later_ms, &replicas, 1_000)
    }

    fn sees(&mut self, later_ms: u64, replicas: &[ReplicaFacts], written: u64) -> &mut Self {
        self.now = self.now + ms(later_ms);
        self.standbys.seen(self.now, &self.spec, replicas, Lsn(written));
        self
    }

    fn wanted(&self) -> Wanted {
        wanted(&self.spec, &self.view, &name("a"), &self.standbys, None)
    }

    fn goal(&self) -> (u32, String) {
        match self.wanted().goal {
            Goal::Acks(acks) => (acks.acks, acks.members.iter().map(MemberName::as_str).collect::<Vec<_>>().join(" ")),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn in_quorum_all_standbys_count_and_one_of_them_acknowledges() {
    assert_eq!(Sight::of("mode: quorum").shows(0, &["b", "c"]).goal(), (1, "b c".to_owned()));
}

#[test]
fn in_sync_so_many_are_chosen_as_acknowledge_and_the_highest_priority_first() {
    let mut sight = Sight::of("mode: sync");
    assert_eq!(sight.shows(0, &["b", "c"]).goal(), (1, "b".to_owned()));
    sight.spec.members[2].tags.sync_priority = 5;
    assert_eq!(sight.goal(), (1, "c".to_owned()));
}

#[test]
fn in_sync_nobody_is_changed_among_equals() {
    let mut sight = Sight::of("mode: sync");
    sight.shows(0, &["b", "c"]);
    let chosen = [name("c")].into();
    let wanted = wanted(&sight.spec, &sight.view, &name("a"), &sight.standbys, Some(&chosen));
    assert_eq!(wanted.goal, Goal::Acks(Acks { members: chosen, acks: 1 }));
}

#[test]
fn in_sync_commits_do_not_wait_for_a_former_leader_that_is_lost_while_a_standby_is_there() {
    let mut sight = Sight::of("mode: sync");
    sight.spec.members[1].tags.sync_priority = 5;
    // `b` led before, and only `a` was its standby.
    sight.standbys = Standbys::named([name("b")].into_iter(), None, T0);
    assert_eq!(sight.shows(10, &["c"]).goal(), (1, "c".to_owned()));
    assert_eq!(sight.shows(10, &["b", "c"]).goal(), (1, "b".to_owned()), "it is back");
}

#[test]
fn a_standby_that_was_away_for_a_moment_still_counts_and_one_that_stays_away_does_not() {
    let mut sight = Sight::of("mode: quorum");
    sight.shows(0, &["b", "c"]).shows(10, &["c"]);
    assert_eq!(sight.shows(LEAVES_AFTER_MS - 20, &["c"]).goal().1, "b c");
    assert_eq!(sight.shows(20, &["c"]).goal().1, "c");
}

#[test]
fn a_standby_that_left_has_to_stay_for_a_while_before_it_counts_again() {
    let mut sight = Sight::of("mode: quorum");
    sight.shows(0, &["b", "c"]).shows(10, &["c"]).shows(LEAVES_AFTER_MS, &["c"]).shows(100, &["b", "c"]);
    assert_eq!(sight.shows(RETURNS_AFTER_MS - 10, &["b", "c"]).goal().1, "c");
    assert_eq!(sight.shows(10, &["b", "c"]).goal().1, "b c");
}

#[test]
fn one_that_the_record_names_is_waited_for_when_a_leadership_begins() {
    let begins = |names: Names| {
        let mut sight = Sight::of("mode: quorum");
        sight.standbys = Standbys::named([name("b"), name("c")].into_iter(), Some(&names), T0);
        sight
    };
    let mut sight = begins(Names::Any(Acks { members: [name("b"), name("c")].into(), acks: 1 }));
    sight.shows(10, &["c"]);
    assert_eq!(sight.shows(LEAVES_AFTER_MS + 10, &["c"]).goal().1, "b c", "commits wait for both already");
    assert_eq!(sight.shows(CONNECTS_WITHIN_MS, &["c"]).goal().1, "c");

    let mut sight = begins(Names::Block);
    assert_eq!(sight.shows(10, &[]).wanted().goal, Goal::Stay, "nobody has been seen yet");
    assert_eq!(sight.shows(10, &["c"]).goal().1, "c", "the other may be ahead");
    assert_eq!(sight.shows(10, &["b", "c"]).goal().1, "b c");
    let mut sight = begins(Names::Block);
    assert_eq!(sight.shows(CONNECTS_WITHIN_MS - 10, &[]).wanted().goal, Goal::Stay);
    assert_eq!(sight.shows(20, &[]).goal().0, 0, "nobody comes");
}

#[test]
fn a_standby_that_is_sent_no_wal_of_this_leadership_counts_for_nothing_whatever_it_says_to_have_flushed() {
    let mut sight = Sight::of("mode: quorum");
    sight.standbys = Standbys::named([name("b"), name("c")].into_iter(), Some(&Names::Block), T0);
    // The leader left the timeline before at 900, where b went on to 2 000.
    let ahead = ReplicaFacts { sent_lsn: Some(Lsn(900)), ..replica("b", 2_000) };
    assert_eq!(sight.sees(10, std::slice::from_ref(&ahead), 1_000).wanted().goal, Goal::Stay);
    assert_eq!(sight.sees(10, &[ahead, replica("c", 1_100)], 1_100).goal().1, "c");
    let half_gone = ReplicaFacts { sent_lsn: Some(Lsn(900)), ..replica("b", 2_000) };
    let beside = [half_gone, replica("b", 1_100), replica("c", 1_100)];
    assert_eq!(sight.sees(10, &beside, 1_200).goal().1, "c", "its walsender of before counts, too");
    assert_eq!(sight.sees(10, &[replica("b", 1_100), replica("c", 1_100)], 1_200).goal().1, "b c", "once it has followed");
}

#[test]
fn row_10_a_standby_that_is_connected_and_flushes_nothing_counts_no_more() {
    let mut sight = Sight::of("mode: quorum");
    sight.shows(0, &["b", "c"]);
    let stuck = |written| [replica("b", 1_000), replica("c", written)];
    sight.sees(10, &stuck(2_000), 2_000).sees(FLUSHES_WITHIN_MS, &stuck(3_000), 3_000);
    assert_eq!(sight.sees(LEAVES_AFTER_MS, &stuck(4_000), 4_000).goal().1, "c");
}

#[test]
fn a_standby_further_behind_than_maximum_lag_on_syncnode_does_not_count() {
    let mut sight = Sight::of("mode: quorum, maximum_lag_on_syncnode: 1kB");
    assert_eq!(sight.sees(0, &[replica("b", 10_000), replica("c", 8_000)], 10_000).goal().1, "b");
}

#[test]
fn members_with_nosync_nofailover_or_nostream_never_count() {
    for tag in ["nosync", "nofailover", "nostream"] {
        let mut sight = Sight::of("mode: quorum");
        let tags = &mut sight.spec.members[1].tags;
        match tag {
            "nosync" => tags.nosync = true,
            "nofailover" => tags.nofailover = true,
            _ => tags.nostream = true,
        }
        assert_eq!(sight.shows(0, &["b", "c"]).goal().1, "c", "{tag}");
    }
}

#[test]
fn a_member_that_streams_from_a_standby_counts_only_while_it_streams_from_the_leader_and_is_chosen_last() {
    let mut sight = Sight::of("mode: quorum");
    sight.spec.members[1].tags.replicatefrom = Some(name("c"));
    assert_eq!(sight.shows(0, &["c"]).goal().1, "c", "the primary does not see it");
    assert_eq!(sight.shows(0, &["b", "c"]).goal().1, "b c", "its upstream was away, and it streams from the primary");
    let mut sight = Sight::of("mode: sync");
    sight.spec.members[1].tags.replicatefrom = Some(name("c"));
    sight.spec.members[1].tags.sync_priority = 9;
    assert_eq!(sight.shows(0, &["b", "c"]).goal().1, "c");
    sight.spec.members[1].tags.replicatefrom = Some(name("a"));
    assert_eq!(sight.shows(0, &["b", "c"]).goal().1, "b", "it streams from the leader for good");
}

#[test]
fn one_whose_daemon_does_not_speak_counts_only_when_there_are_too_few_others() {
    let mut sight = Sight::of("mode: quorum");
    sight.view.members.remove(&name("b"));
    sight.view.sync_revision = crate::types::Revision(5);
    assert_eq!(sight.shows(0, &["b", "c"]).goal(), (1, "c".to_owned()));
    assert_eq!(Sight { view: sight.view.clone(), ..Sight::of("mode: quorum") }.shows(0, &["b"]).goal(), (1, "b".to_owned()));
}

#[test]
fn without_a_standby_nobody_waits_and_that_is_said() {
    let sight = Sight::of("mode: quorum");
    assert_eq!((sight.goal(), sight.wanted().short_of), ((0, String::new()), Some(1)));
}

#[test]
fn without_a_standby_commits_wait_all_the_same_where_the_spec_is_strict() {
    let sight = Sight::of("mode: quorum, strict: true");
    assert_eq!((sight.wanted().goal, sight.wanted().short_of), (Goal::Wait(1), Some(1)));
}

#[test]
fn with_fewer_than_asked_for_commits_wait_for_those_that_are_there() {
    let mut sight = Sight::of("mode: quorum, synchronous_node_count: 2");
    assert_eq!((sight.shows(0, &["c"]).goal(), sight.wanted().short_of), ((1, "c".to_owned()), Some(2)));
}

#[test]
fn row_65_the_mode_is_not_in_force_before_every_member_says_that_it_knows_it() {
    let mut sight = Sight::of("mode: quorum");
    sight.shows(0, &["b", "c"]);
    sight.view.members.get_mut(&name("c")).unwrap().record.features.clear();
    let wanted = sight.wanted();
    assert_eq!(wanted.goal, Goal::Async);
    assert!(wanted.waits.unwrap().contains("`c`"));
    sight.view.sync_revision = crate::types::Revision(5);
    assert_eq!(sight.goal().0, 1, "once in force it stays");
}

#[test]
fn a_walsender_that_makes_a_copy_is_none_that_releases_and_a_name_is_the_same_in_any_case() {
    let copies = ReplicaFacts { state: "backup".to_owned(), ..replica("b", 1) };
    let strangers = replica("Not A Member", 1);
    let found = senders(&[copies, strangers, replica("C", 7)]);
    assert_eq!(found.iter().map(|sender| sender.member.as_str()).collect::<Vec<_>>(), ["c"]);
}
