//! Failsafe in small clusters: who goes on without etcd, for how long, and who keeps still meanwhile. The toy checks I1 at every step.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::machine::action::OperationKind;
use crate::machine::event::Event;
use crate::machine::tests::fixtures::{ms, name, spec_with};
use crate::machine::world::Lock;
use crate::spec::cluster::ClusterSpec;
use crate::types::{Epoch, TimelineId};

use super::cluster::{THREE, s};
use super::toy::Toy;

const ON: &str = "ha: { ttl: 10s, loop_wait: 5s, failsafe: true }";

fn on(members: &[&str]) -> Arc<ClusterSpec> {
    spec_with(members, ON)
}

/// Three members under failsafe; `a` leads and relies on the others.
fn failsafe() -> Toy {
    let mut toy = Toy::working_with(&THREE, on(&THREE));
    toy.until("failsafe is in force", s(20), |toy| relies(toy, "a"));
    toy
}

fn relies(toy: &Toy, member: &str) -> bool {
    toy.daemon(member).checked.world().failsafe.armed.is_some()
}

fn epoch(toy: &Toy) -> Option<Epoch> {
    toy.etcd.keys.leader.as_ref().map(|leader| leader.epoch)
}

fn cut(toy: &mut Toy, from: &str, to: &str) {
    toy.cut.insert((name(from), name(to)));
}

/// `member` takes writes at every step of this span.
#[track_caller]
fn writes_throughout(toy: &mut Toy, member: &str, span: Duration) {
    let until = toy.now + span;
    while toy.now < until {
        toy.run(ms(5));
        assert_eq!(toy.primary(), Some(member), "{}", toy.story());
        assert!(announce_at(toy, member).is_some_and(|at| toy.now < at), "its leader paths answer 503\n{}", toy.story());
    }
}

/// A, as this member's leader paths go by it.
fn announce_at(toy: &Toy, member: &str) -> Option<BootTime> {
    match toy.daemon(member).checked.world().lock {
        Lock::Proved { announce_at, .. } => Some(announce_at),
        Lock::None | Lock::Unproved(_) => None,
    }
}

/// `a`, alone cut from etcd for long, is back, and cannot take the lock anew.
fn lapsed() -> Toy {
    let mut toy = failsafe();
    toy.host("a").failing.insert(OperationKind::Acquire);
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(25));
    toy.host("a").connected = true;
    toy.until("it knows of the lapse", s(3), |toy| toy.daemon("a").checked.world().failsafe.lapsed);
    toy
}

#[test]
fn a_leader_goes_on_for_as_long_as_etcd_is_away_and_all_others_promise() {
    let mut toy = failsafe();
    let before = epoch(&toy);
    toy.etcd.up = false;
    writes_throughout(&mut toy, "a", s(60));
    assert!(toy.daemon("a").checked.world().conditions.contains_key("failsafe"), "and says so");
    let now = toy.now;
    toy.etcd.come_back(now);
    writes_throughout(&mut toy, "a", s(20));
    assert_eq!(epoch(&toy), before, "the lock was there all the while");
    assert!(!toy.daemon("a").checked.world().conditions.contains_key("failsafe"));
    toy.converges(s(5));
}

#[test]
fn a_leader_alone_cut_from_etcd_bridges_the_lapse_of_its_lease_with_a_new_epoch_on_the_same_timeline() {
    let mut toy = failsafe();
    let before = epoch(&toy);
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(45));
    assert_eq!(epoch(&toy), None, "the lease is gone, and nobody took the lock");
    toy.host("a").connected = true;
    writes_throughout(&mut toy, "a", s(20));
    toy.converges(s(5));
    assert!(epoch(&toy) > before);
    assert_eq!(toy.host("a").server.data.as_ref().unwrap().timeline(), TimelineId(1));
    assert!(toy.promoted.is_empty(), "nobody was promoted: {:?}", toy.promoted);
    assert_eq!(toy.etcd.keys.history.len(), 1, "and no timeline was reserved");
    // It goes on as any other leadership: it may be cut off once more, and its end leads to another.
    toy.until("it relies on the others again", s(20), |toy| relies(toy, "a"));
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(30));
    toy.host("a").connected = true;
    toy.converges(s(30));
    toy.power_off("a");
    toy.until("another primary", s(30), |toy| toy.primary().is_some_and(|leader| leader != "a"));
    toy.start_daemon("a");
    toy.converges(s(60));
}

#[test]
fn a_lapse_is_bridged_whatever_failed_how_often_while_etcd_was_away() {
    for seconds in 20..32 {
        let mut toy = failsafe();
        toy.host("a").connected = false;
        writes_throughout(&mut toy, "a", s(seconds));
        toy.host("a").connected = true;
        writes_throughout(&mut toy, "a", s(8));
        assert_eq!(toy.leader(), Some("a"), "{}", toy.story());
    }
}

#[test]
fn l5_members_that_keep_still_write_their_positions_no_more_often_than_ever() {
    let mut toy = failsafe();
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(20));
    let (from, handled) = (toy.etcd.writes.len(), toy.events_handled);
    writes_throughout(&mut toy, "a", s(50));
    let written = toy.etcd.writes.len() - from;
    assert!(written <= 2 * 11, "{written} writes of two members in 50 s");
    assert!(toy.events_handled - handled < 3 * 50 * 12, "{} events in 50 s", toy.events_handled - handled);
    assert!(toy.daemon("b").checked.world().conditions.contains_key("promised"), "and it is said why nobody leads");
    toy.host("a").connected = true;
    toy.converges(s(10));
    toy.run(s(12));
    assert!(!toy.daemon("b").checked.world().conditions.contains_key("promised"));
}

#[test]
fn one_member_that_does_not_answer_ends_it_by_f_and_the_others_elect_once_promises_are_over() {
    let mut toy = failsafe();
    let sent = toy.now;
    toy.host("a").connected = false;
    cut(&mut toy, "a", "c");
    toy.until("nobody writes", s(10), |toy| toy.primary().is_none());
    assert!(toy.now < sent + s(10), "F is before the lease can be over");
    // `b` promised in the first rounds: it runs later than `c` could, and not later than a ttl and the ladder's begin after the cut.
    toy.until("another primary", s(20), |toy| toy.primary().is_some_and(|leader| leader != "a"));
    toy.host("a").connected = true;
    toy.cut.clear();
    toy.converges(s(60));
    assert_ne!(toy.leader(), Some("a"));
}

#[test]
fn a_member_that_is_down_is_one_that_does_not_promise() {
    let mut toy = failsafe();
    toy.power_off("c");
    toy.run(s(3));
    assert!(toy.etcd.keys.failsafe.as_ref().unwrap().members.contains_key(&name("c")), "it may come back and run");
    toy.etcd.up = false;
    toy.until("nobody writes", s(10), |toy| toy.primary().is_none());
}

#[test]
fn a_member_that_promised_does_not_run_before_its_promise_is_over() {
    let mut toy = failsafe();
    toy.host("a").connected = false;
    // The lease is gone, the leader writes on; then it ends, and the last promises are all that is left.
    writes_throughout(&mut toy, "a", s(25));
    let promised = |toy: &Toy, member: &str| toy.daemon(member).checked.world().failsafe.promise.as_ref().map(|promise| promise.until);
    toy.power_off("a");
    let until = promised(&toy, "b").min(promised(&toy, "c")).unwrap();
    assert!(until > toy.now + s(8));
    while toy.now < until {
        toy.run(ms(5));
        assert_eq!((toy.primary(), epoch(&toy)), (None, None), "{}", toy.story());
    }
    toy.until("another primary", s(5), |toy| toy.primary().is_some());
}

#[test]
fn a_daemon_that_starts_under_failsafe_does_not_run_for_one_ttl() {
    let mut toy = failsafe();
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(25));
    // A restart forgets the promise; it must not set the member free.
    for member in ["b", "c"] {
        toy.kill_daemon(member);
        toy.start_daemon(member);
    }
    let started = toy.now;
    toy.power_off("a");
    while toy.now < started + s(10) {
        toy.run(ms(5));
        assert_eq!(epoch(&toy), None, "{}", toy.story());
    }
    toy.until("another primary", s(5), |toy| toy.primary().is_some());
}

#[test]
fn a_restarted_standby_promises_the_leader_that_it_never_saw() {
    let mut toy = failsafe();
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(25));
    toy.kill_daemon("b");
    toy.start_daemon("b");
    writes_throughout(&mut toy, "a", s(30));
}

#[test]
fn a_member_that_the_key_does_not_name_never_runs() {
    let mut toy = failsafe();
    toy.etcd.by_hand(|keys| {
        keys.failsafe.as_mut().unwrap().members.remove(&name("b"));
    });
    // By hand, in the moment in which the leader goes away: or it would put it right.
    toy.power_off("a");
    toy.until("another primary", s(30), |toy| toy.primary().is_some());
    assert_eq!(toy.primary(), Some("c"), "b is the first of the spec");
    toy.until("the new leader names it again", s(20), |toy| {
        toy.etcd.keys.failsafe.as_ref().is_some_and(|record| record.members.contains_key(&name("b")))
    });
}

#[test]
fn a_member_alone_goes_on_without_etcd() {
    let mut toy = Toy::working_with(&["a"], on(&["a"]));
    toy.until("failsafe is in force", s(20), |toy| relies(toy, "a"));
    toy.etcd.up = false;
    writes_throughout(&mut toy, "a", s(40));
    let now = toy.now;
    toy.etcd.come_back(now);
    writes_throughout(&mut toy, "a", s(10));
}

#[test]
fn a_primary_that_crashes_without_etcd_is_started_in_place() {
    let mut toy = failsafe();
    toy.etcd.up = false;
    writes_throughout(&mut toy, "a", s(20));
    let now = toy.now;
    toy.host("a").server.crash(now);
    toy.until("it writes again", s(2), |toy| toy.primary() == Some("a"));
    writes_throughout(&mut toy, "a", s(20));
    let now = toy.now;
    toy.etcd.come_back(now);
    toy.converges(s(30));
    assert_eq!(toy.leader(), Some("a"));
}

#[test]
fn the_key_goes_and_comes_with_the_spec_and_follows_its_members() {
    let mut toy = failsafe();
    let named =
        |toy: &Toy| toy.etcd.keys.failsafe.as_ref().map(|record| record.members.keys().map(ToString::to_string).collect::<Vec<_>>());
    toy.apply(spec_with(&THREE, "ha: { ttl: 10s, loop_wait: 5s, failsafe: false }"));
    toy.until("the key is gone", s(10), |toy| named(toy).is_none());
    assert!(!relies(&toy, "a"));
    toy.apply(on(&["a", "b, failover_priority: 0", "c"]));
    toy.until("it names who may lead", s(10), |toy| named(toy).is_some_and(|names| names == ["a", "c"]));
    toy.until("and is relied on", s(10), |toy| relies(toy, "a"));
    let from = toy.etcd.writes.len();
    toy.run(s(60));
    assert!(toy.etcd.writes[from..].iter().all(|(_, what)| *what != "failsafe"), "written once");
}

#[test]
fn failsafe_waits_for_a_member_whose_daemon_does_not_say_that_it_knows_it() {
    let mut toy = Toy::new(&["a", "b"]);
    toy.apply(on(&["a", "b"]));
    toy.until("a leads", s(30), |toy| toy.primary() == Some("a"));
    toy.until("in force", s(20), |toy| relies(toy, "a"));
    toy.apply(on(&THREE));
    toy.until("it is said who is waited for", s(5), |toy| {
        let condition = toy.daemon("a").checked.world().conditions.get("failsafe_waits").cloned();
        condition.is_some_and(|condition| condition.message.contains("`c` has not said"))
    });
    toy.until("a member that has not said so could run", s(10), |toy| toy.etcd.keys.failsafe.is_none());
    assert!(!relies(&toy, "a"));
}

#[test]
fn a_lost_answer_of_the_acquisition_in_a_lapse_costs_nothing() {
    let mut toy = failsafe();
    toy.host("a").lost_answers.insert(OperationKind::Acquire);
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(25));
    toy.host("a").connected = true;
    toy.until("it was carried out", s(5), |toy| toy.leader() == Some("a"));
    toy.host("a").lost_answers.clear();
    writes_throughout(&mut toy, "a", s(20));
    toy.converges(s(5));
}

#[test]
fn a_lapse_that_cannot_be_bridged_by_a_ends_the_leadership_at_once() {
    let mut toy = lapsed();
    let announce_at = announce_at(&toy, "a").unwrap();
    toy.until("A", s(5), |toy| toy.now >= announce_at);
    toy.run(ms(50));
    assert_eq!(toy.primary(), None, "{}", toy.story());
    toy.until("another primary", s(15), |toy| toy.primary().is_some_and(|leader| leader != "a"));
    toy.host("a").failing.clear();
    toy.converges(s(60));
}

#[test]
fn i9_a_leader_whose_clock_stood_still_takes_nothing_anew_when_another_has_led_meanwhile() {
    let mut toy = failsafe();
    toy.host("a").connected = false;
    writes_throughout(&mut toy, "a", s(25));
    // What became of the cluster in a time that `a` does not know of: another leadership, which is over.
    toy.etcd.by_hand(|keys| {
        let mut led = keys.history.last().unwrap().clone();
        (led.timeline, led.member, led.epoch) = (TimelineId(led.timeline.0 + 1), name("b"), Some(Epoch(i64::MAX)));
        keys.history.push(led);
    });
    toy.host("a").connected = true;
    toy.until("a leads no more", s(3), |toy| toy.daemon("a").checked.world().lock == Lock::None);
    assert!(!toy.story().contains("takes_anew"), "{}", toy.story());
}

#[test]
fn a_lapse_ends_the_leadership_of_a_primary_that_is_on_its_way_out() {
    let mut toy = lapsed();
    toy.stop_daemon("a");
    toy.run(ms(50));
    assert_eq!((toy.primary(), toy.hosts[&name("a")].exit), (None, Some(0)), "neither waits for anybody\n{}", toy.story());
    toy.until("another primary", s(15), |toy| toy.primary().is_some());
}

#[test]
fn a_planned_stop_after_an_outage_of_etcd_waits_for_no_promise() {
    let mut toy = failsafe();
    toy.etcd.up = false;
    writes_throughout(&mut toy, "a", s(20));
    let now = toy.now;
    toy.etcd.come_back(now);
    toy.until("a is proved again", s(5), |toy| toy.daemon("a").checked.world().is_proved_by_etcd());
    toy.run(s(2));
    toy.stop_daemon("a");
    toy.until("another primary", s(4), |toy| toy.primary().is_some_and(|leader| leader != "a"));
}

/// Found by the simulator's seed 5747: the record in a restored etcd named more members than the leader asked for their promise.
#[test]
fn a_leader_whose_etcd_went_back_to_an_older_state_does_not_go_on_by_promises() {
    let mut toy = failsafe();
    toy.etcd.up = false;
    toy.deliver(&name("a"), Event::EtcdSuspicious("its revision went back".to_owned()));
    toy.run(ms(50));
    assert!(!relies(&toy, "a"), "{}", toy.story());
    toy.until("nobody writes", s(12), |toy| toy.primary().is_none());
}
