//! Where commits waited for standbys: who may lead is who must have every acknowledged one (I5).

use std::collections::BTreeSet;

use super::*;
use crate::facts::synchrony::SyncRecord;

fn on(copies: u32, members: &[&str]) -> impl FnOnce(&mut ClusterView) {
    let members: BTreeSet<MemberName> = members.iter().copied().map(name).collect();
    move |view| {
        view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(10), members, copies });
        view.sync_revision = Revision(44);
    }
}

fn waits_for_sight_of(vacant: &Vacant, because: &str) {
    vacant.not_eligible_because(because);
}

#[test]
fn with_the_quorum_of_positions_seen_the_one_that_is_not_behind_leads() {
    let vacant = Vacant::new().with(on(2, &["a", "b", "c"]));
    assert!(vacant.runs_after(0));
    assert!(!vacant.voted("c", vote(1, LSN + 8)).runs_after(2_000), "c may have what b has not");
}

#[test]
fn without_it_nobody_leads_however_long_it_takes() {
    let vacant = Vacant::new().with(on(2, &["a", "b", "c"])).silent("c");
    waits_for_sight_of(&vacant, "`a`, `c`");
    waits_for_sight_of(&Vacant::new().with(on(2, &["a", "b", "c"])).gone("c"), "not seen so far");
}

#[test]
fn where_every_member_of_the_record_has_everything_one_of_them_is_enough() {
    let vacant = Vacant::new().with(on(2, &["a", "b"])).gone("c");
    assert!(vacant.runs_after(1_500));
    waits_for_sight_of(&vacant.voted("c", vote(1, LSN)).gone("b").of_member("c"), "not seen so far: `a`, `b`");
}

#[test]
fn a_member_outside_the_record_may_lead_when_one_that_has_everything_is_seen_not_to_be_ahead() {
    assert!(Vacant::new().with(on(2, &["a", "b"])).of_member("c").runs_after(60_000));
    assert!(!Vacant::new().with(on(2, &["a", "b"])).voted("b", vote(1, LSN + 8)).of_member("c").runs_after(60_000));
}

#[test]
fn while_commits_waited_for_nobody_only_the_last_leader_leads() {
    let vacant = Vacant::new().with(on(1, &["a"]));
    waits_for_sight_of(&vacant, "`a`");
    assert!(Vacant::new().with(on(1, &["a"])).voted("a", vote(1, LSN)).of_member("a").runs_after(1_500));
    assert!(Vacant::new().with(on(1, &["a"])).voted("a", vote(1, LSN)).runs_after(60_000), "it is seen, and not ahead");
}

#[test]
fn a_vote_for_another_vacancy_is_no_sight() {
    let earlier = Vote { vacancy: Revision(49), ..vote(1, LSN) };
    waits_for_sight_of(&Vacant::new().with(on(2, &["a", "b", "c"])).voted("c", earlier), "`c`");
}

#[test]
fn whoever_has_all_of_a_leader_that_stopped_in_good_order_leads_whoever_else_is_seen() {
    let vacant = Vacant::new().with(on(2, &["a", "b", "c"])).gone("c").released_to(Some("b"));
    assert!(vacant.runs_after(0));
    let behind = Vacant::new().with(on(2, &["a", "b", "c"])).voted("b", vote(1, LSN - 8)).gone("c").released_to(Some("b"));
    assert!(!behind.runs_after(60_000));
    let of_another = vacant.with(|view| view.release.as_mut().unwrap().epoch = Epoch(9));
    assert!(!of_another.runs_after(60_000), "a release of an earlier leadership says nothing");
}

#[test]
fn an_unreadable_record_is_not_an_absent_one() {
    let vacant = Vacant::new().with(|view| view.sync_revision = Revision(44));
    vacant.not_eligible_because("unreadable");
}

/// `a` crashed with WAL that nobody acknowledged, `b` was promoted without it and is lost before anybody received from it.
fn left_behind(own: u64) -> Vacant {
    let taken_over = |view: &mut ClusterView| {
        on(2, &["a", "b", "c"])(view);
        view.sync.as_mut().unwrap().leader = name("b");
    };
    let history = vec![recorded(1, "a", 1, 10, 0, 0), recorded(2, "b", 2, 20, 1, LSN)];
    let vacant = Vacant::new().history(history).with(taken_over).gone("b");
    vacant.voted("a", vote(1, LSN + 80)).voted("c", vote(1, own)).of_member("c")
}

#[test]
fn who_diverged_is_seen_as_far_as_the_last_leaders_timeline_left_its_own() {
    assert!(left_behind(LSN).runs_after(2_000), "what a has beyond was acknowledged to nobody, and of timeline 2 it has nothing");
    left_behind(LSN - 8).not_eligible_because("`a`, `b`");
    left_behind(LSN).of_member("a").not_eligible_because("timeline 1 was left at");
}

/// Row 27. `a` led, and `c` was known to have all of it: whoever has less now was put back to an older state.
fn known(vacant: Vacant, replayed: &[(&str, u64)]) -> Vacant {
    vacant.with(|view| {
        let status = view.status.as_mut().unwrap();
        status.replayed = replayed.iter().map(|(member, lsn)| (name(member), Lsn(*lsn))).collect();
    })
}

#[test]
fn row_27_i5_a_member_that_was_put_back_in_time_is_no_witness_of_what_was_acknowledged() {
    // A commit is on `a` and `c`; `b` lacks it; then `c` is put back to before it, and `a` is away.
    let behind = LSN - 64;
    let put_back = || Vacant::new().with(on(2, &["a", "b", "c"])).voted("b", vote(1, behind)).voted("c", vote(1, behind));
    assert!(put_back().runs_after(60_000), "by their positions alone one of the two has everything");
    let known_to_have_it = known(put_back(), &[("c", LSN)]);
    waits_for_sight_of(&known_to_have_it, "`a`, `c` (put back to an older state)");
    waits_for_sight_of(&known(put_back(), &[("c", LSN)]).of_member("c"), "`a`, `c` (put back");
    assert!(known(put_back(), &[("c", behind)]).runs_after(60_000), "it has what it was known to have");
}

#[test]
fn row_27_i5_a_leader_that_was_put_back_in_time_does_not_lead_by_having_led() {
    let led = || Vacant::new().with(on(2, &["a", "b", "c"])).gone("b").voted("c", vote(1, LSN - 64)).voted("a", vote(1, LSN - 64));
    assert!(led().of_member("a").runs_after(60_000));
    // It had sent this to `b`, which is away.
    waits_for_sight_of(&known(led(), &[("b", LSN)]).of_member("a"), "not seen so far: `a`");
}

#[test]
fn row_27_i5_what_a_leadership_before_the_last_one_knew_counts_until_that_one_has_said_more() {
    // `c` was put back; `b` took `sync` over since, with `c` in it, and came to nothing before it said a position.
    let taken_over = |epoch: u64| {
        let put_back = Vacant::new().with(on(2, &["a", "c"])).gone("b").voted("a", vote(1, LSN - 64)).voted("c", vote(1, LSN - 64));
        let known = known(put_back, &[("c", LSN)]);
        known.with(move |view| view.status.as_mut().unwrap().epoch = Epoch(i64::try_from(epoch).unwrap())).of_member("c")
    };
    assert!(!taken_over(9).runs_after(60_000));
    assert!(taken_over(11).runs_after(60_000), "a leadership of which `sync` says nothing");
}
