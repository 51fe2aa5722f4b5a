//! Whose turn it is: `c` leads unless a test says otherwise.

use super::*;
use crate::facts::cluster::MemberRole;
use crate::facts::requests::RequestRecord;
use crate::machine::tests::fixtures::{key, leader, name, record, view};

const NOW_S: Option<u64> = Some(1_000);

fn led_by(holder: &str) -> ClusterView {
    let mut view = view(60);
    view.leader = Some(leader(holder, 9, 50));
    for member in ["a", "b", "c"] {
        view.members.insert(name(member), key(record(MemberRole::Replica, 1, 1_000), 7));
    }
    view
}

fn asked(on: &str, at_s: Option<u64>, progress: RequestProgress, mod_revision: i64) -> RequestKey {
    let ask = Ask::Restart { on: name(on), if_leader: None, if_pending: false, at_s };
    let record = RequestRecord { ask, by: "a test".to_owned(), at: String::new(), progress };
    RequestKey { record, mod_revision: Revision(mod_revision) }
}

fn claimed(by: &str, stage: &str) -> RequestProgress {
    RequestProgress::Claimed { by: name(by), stage: stage.to_owned(), stages: Vec::new() }
}

fn with(holder: &str, requests: Vec<(&str, RequestKey)>) -> ClusterView {
    let mut view = led_by(holder);
    view.requests.extend(requests.into_iter().map(|(id, key)| (id.to_owned(), key)));
    view
}

#[test]
fn standbys_come_in_the_order_of_their_names_and_the_leader_last() {
    let created = |on| asked(on, None, RequestProgress::Created, 10);
    let all = || vec![("1", created("a")), ("2", created("b")), ("3", created("c"))];
    let turn = |holder: &str| {
        let view = with(holder, all());
        let of = |(member, id): &(&'static str, &'static str)| waits_for(&view, &name(member), id, NOW_S).is_none();
        [("a", "1"), ("b", "2"), ("c", "3")].into_iter().filter(of).map(|(member, _)| member).collect::<Vec<_>>()
    };
    assert_eq!(turn("c"), ["a"]);
    assert_eq!(turn("a"), ["b"]);
    let mut without_a = with("c", all());
    without_a.members.remove(&name("a"));
    assert_eq!(waits_for(&without_a, &name("b"), "2", NOW_S), None, "nobody waits for a member that is not there");
    let later = with("c", vec![("1", asked("a", Some(2_000), RequestProgress::Created, 10)), ("2", created("b"))]);
    assert_eq!(waits_for(&later, &name("b"), "2", NOW_S), None, "its time has not come");
}

#[test]
fn nobody_is_restarted_while_another_is_or_while_the_leader_changes() {
    let created = asked("a", None, RequestProgress::Created, 10);
    let view = with("c", vec![("1", created.clone()), ("2", asked("b", None, claimed("b", "stop"), 11))]);
    assert!(waits_for(&view, &name("a"), "1", NOW_S).unwrap().contains("`b` is being restarted"));
    let mut switching = asked("a", None, claimed("c", "stop"), 11);
    switching.record.ask = Ask::Switchover { to: name("b") };
    let view = with("c", vec![("1", created), ("2", switching)]);
    assert!(waits_for(&view, &name("a"), "1", NOW_S).unwrap().contains("switchover"));
}

#[test]
fn of_two_that_claimed_at_the_same_time_the_first_goes_on_and_the_other_waits() {
    let view = with("c", vec![("1", asked("a", None, claimed("a", CLAIMED), 20)), ("2", asked("b", None, claimed("b", CLAIMED), 21))]);
    assert_eq!(yields_to(&view, &name("a"), "1"), None);
    assert_eq!(yields_to(&view, &name("b"), "2"), Some(&name("a")));
    let at_it = with("c", vec![("1", asked("a", None, claimed("a", "stop"), 30)), ("2", asked("b", None, claimed("b", CLAIMED), 21))]);
    assert_eq!(yields_to(&at_it, &name("b"), "2"), Some(&name("a")), "what it wrote since does not make it the later one");
}

#[test]
fn of_a_restart_and_a_switchover_that_were_claimed_at_the_same_time_the_first_goes_on_and_the_other_waits() {
    let switchover = |stage, mod_revision| {
        let mut key = asked("a", None, claimed("c", stage), mod_revision);
        key.record.ask = Ask::Switchover { to: name("b") };
        key
    };
    let both = |restart: RequestKey, switchover: RequestKey| {
        let claimed = switchover.mod_revision;
        let view = with("c", vec![("1", restart), ("2", switchover)]);
        (yields_to(&view, &name("a"), "1").cloned(), before_switchover(&view, Some(claimed)).cloned())
    };
    let restart = |stage, mod_revision| asked("a", None, claimed("a", stage), mod_revision);
    assert_eq!(both(restart(CLAIMED, 20), switchover(CLAIMED, 21)), (None, Some(name("a"))));
    assert_eq!(both(restart(CLAIMED, 21), switchover(CLAIMED, 20)), (Some(name("c")), None));
    assert_eq!(
        both(restart(CLAIMED, 20), switchover("checkpoint", 30)).0,
        Some(name("c")),
        "what it wrote since does not make it the later one"
    );
    assert_eq!(both(restart("stop", 30), switchover(CLAIMED, 20)).1, Some(name("a")));
    let created = asked("a", None, RequestProgress::Created, 10);
    assert_eq!(before_switchover(&with("c", vec![("1", created)]), None), None, "nobody has taken it up");
    assert_eq!(before_switchover(&with("c", vec![("1", restart(CLAIMED, 20))]), None), Some(&name("a")));
    let of_our_own = with("a", vec![("1", restart(CLAIMED, 21)), ("2", switchover(CLAIMED, 20))]);
    assert!(yields_to(&of_our_own, &name("a"), "1").is_some(), "the leader's own restart too");
}

#[test]
fn what_was_scheduled_for_one_time_stops_at_the_first_that_fails_and_does_not_come_too_late() {
    let failed = RequestProgress::Refused { reason: "it is not back".to_owned() };
    let ours = asked("b", Some(900), RequestProgress::Created, 10);
    let view = with("c", vec![("1", asked("a", Some(900), failed.clone(), 20)), ("2", ours.clone())]);
    assert!(missed(&view, "2", &ours, NOW_S).unwrap().contains("`a`, scheduled for the same time, did not succeed: it is not back"));
    let elsewhere = with("c", vec![("1", asked("a", Some(901), failed.clone(), 20)), ("2", ours.clone())]);
    assert_eq!(missed(&elsewhere, "2", &ours, NOW_S), None);
    assert!(missed(&elsewhere, "2", &ours, Some(1_501)).unwrap().contains("went by"));
    let at_once = asked("b", None, RequestProgress::Created, 10);
    assert_eq!(missed(&with("c", vec![("1", asked("a", None, failed, 20)), ("2", at_once.clone())]), "2", &at_once, NOW_S), None);
}
