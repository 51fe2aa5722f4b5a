//! Small clusters that work, break and heal. I1 is checked at every step by the toy, the claims on orders by the watch on each machine.

use std::time::Duration;

use crate::facts::cluster::Initialize;
use crate::facts::requests::{Ask, RequestProgress};
use crate::machine::action::OperationKind;
use crate::machine::tests::fixtures::{name, spec, spec_with};
use crate::types::TimelineId;

use super::toy::Toy;

pub(super) const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(super) const THREE: [&str; 3] = ["a", "b", "c"];

/// Long enough for a lease of 10 s to expire and for an election without a release.
const FAILOVER: Duration = s(25);

fn timeline(toy: &mut Toy, member: &str) -> TimelineId {
    toy.host(member).server.data.as_ref().unwrap().timeline()
}

#[test]
fn three_empty_members_become_one_primary_and_two_standbys() {
    let mut toy = Toy::working(&THREE);
    assert_eq!(toy.leader(), Some("a"), "the first of the spec");
    toy.run(s(20));
    assert_eq!(toy.primary(), Some("a"));
}

#[test]
fn a_member_whose_initdb_fails_lets_another_initialize_and_is_cloned() {
    let mut toy = Toy::new(&THREE);
    toy.host("a").failing.insert(OperationKind::Initdb);
    toy.apply(spec(&THREE));
    toy.converges(s(40));
    assert_eq!(toy.leader(), Some("b"));
    assert!(toy.etcd.writes.len() < 200, "{} writes", toy.etcd.writes.len());
}

#[test]
fn where_initdb_fails_everywhere_it_is_tried_again_and_not_in_a_tight_loop() {
    let mut toy = Toy::new(&THREE);
    for member in THREE {
        toy.host(member).failing.insert(OperationKind::Initdb);
    }
    toy.apply(spec(&THREE));
    toy.run(s(60));
    assert!(toy.etcd.writes.len() < 400, "{} writes in a minute", toy.etcd.writes.len());
    assert!(toy.daemon("a").checked.world().conditions.contains_key("initdb_failed"));
    for member in THREE {
        toy.host(member).failing.clear();
    }
    toy.converges(s(40));
}

#[test]
fn operations_that_fail_for_a_while_leave_nothing_stuck() {
    use OperationKind::*;
    for kind in [Look, Start, Configure, Clone, PlanRejoin, Promote, EnsureRoles, Checkpoint, AskPeers] {
        let mut toy = Toy::working(&THREE);
        for member in THREE {
            toy.host(member).failing.insert(kind);
        }
        toy.ask("1", Ask::Switchover { to: name("b") });
        toy.run(s(15));
        toy.power_off("a");
        toy.run(s(30));
        toy.start_daemon("a");
        toy.run(s(10));
        for member in THREE {
            toy.host(member).failing.clear();
        }
        toy.converges(s(90));
    }
}

#[test]
fn a_converged_cluster_without_writers_writes_one_position_update_per_loop_wait_and_nothing_else() {
    let mut toy = Toy::working(&THREE);
    toy.load = false;
    toy.run(s(12));
    let from = toy.etcd.writes.len();
    toy.run(s(50));
    let written: Vec<&str> = toy.etcd.writes[from..].iter().map(|(_, what)| *what).collect();
    assert!(written.iter().all(|what| *what == "status"), "{written:?}");
    assert!((9..=11).contains(&written.len()), "{} in 50 s", written.len());
}

#[test]
fn under_load_each_member_writes_its_position_once_per_loop_wait() {
    let mut toy = Toy::working(&THREE);
    toy.run(s(12));
    let (from, handled) = (toy.etcd.writes.len(), toy.events_handled);
    toy.run(s(50));
    let written = toy.etcd.writes.len() - from;
    assert!(written <= 4 * 11, "{written} writes in 50 s");
    assert!(toy.events_handled - handled < 3 * 50 * 12, "{} events in 50 s", toy.events_handled - handled);
}

#[test]
fn when_the_leaders_host_loses_power_another_leads_on_a_timeline_that_was_never_used() {
    let mut toy = Toy::working(&THREE);
    toy.power_off("a");
    toy.until("another primary", s(14), |toy| toy.primary().is_some());
    assert_eq!(toy.primary(), Some("b"));
    assert_eq!(timeline(&mut toy, "b"), TimelineId(2));
    toy.converges(FAILOVER);
    toy.start_daemon("a");
    toy.converges(s(40));
    assert_eq!(toy.leader(), Some("b"));
}

#[test]
fn a_daemon_that_is_told_to_stop_hands_over_and_loses_nothing() {
    let mut toy = Toy::working(&THREE);
    toy.stop_daemon("a");
    toy.until("another primary", s(4), |toy| toy.primary().is_some_and(|name| name != "a"));
    toy.until("the daemon has left", s(5), |toy| toy.hosts[&name("a")].exit == Some(0));
    toy.converges(s(20));
    let (old, new) = (toy.host("a").server.data.clone().unwrap(), toy.primary().unwrap().to_owned());
    assert!(old.is_in_the_past_of(toy.hosts[&name(&new)].server.data.as_ref().unwrap()), "{}", toy.story());
    toy.start_daemon("a");
    toy.converges(s(40));
}

#[test]
fn a_switchover_is_done_and_says_so() {
    let mut toy = Toy::working(&THREE);
    toy.ask("1", Ask::Switchover { to: name("c") });
    toy.until("c leads", s(6), |toy| toy.primary() == Some("c"));
    toy.until("the answer", s(6), |toy| matches!(toy.progress("1"), RequestProgress::Done { .. } | RequestProgress::Refused { .. }));
    assert!(matches!(toy.progress("1"), RequestProgress::Done { .. }), "{:?}", toy.progress("1"));
    toy.converges(s(20));
    assert_eq!(toy.leader(), Some("c"));
}

#[test]
fn switchovers_to_and_fro_take_a_new_timeline_each() {
    let mut toy = Toy::working(&THREE);
    for (round, to) in ["b", "c", "a", "b"].into_iter().enumerate() {
        let id = format!("{round}");
        toy.ask(&id, Ask::Switchover { to: name(to) });
        toy.until("the answer", s(12), |toy| matches!(toy.progress(&id), RequestProgress::Done { .. } | RequestProgress::Refused { .. }));
        assert!(matches!(toy.progress(&id), RequestProgress::Done { .. }), "{:?}\n{}", toy.progress(&id), toy.story());
        toy.converges(s(40));
        toy.run(s(2));
        assert_eq!(toy.leader(), Some(to));
    }
    assert_eq!(toy.promoted.len(), 4, "{:?}", toy.promoted);
}

#[test]
fn a_switchover_is_refused_with_its_reason_before_anything_is_touched() {
    let members = ["a", "b", "c, failover_priority: 0"];
    let mut toy = Toy::working_with(&THREE, spec(&members));
    let leads = toy.leader().unwrap().to_owned();
    assert_ne!(leads, "c");
    toy.power_off("b");
    toy.run(s(3));
    for (to, because) in
        [("nobody", "not in spec.members"), ("c", "never leads"), ("b", "does not stream"), (leads.as_str(), "leads already")]
    {
        toy.ask(to, Ask::Switchover { to: name(to) });
        toy.until("an answer", s(6), |toy| matches!(toy.progress(to), RequestProgress::Refused { .. }));
        let RequestProgress::Refused { reason } = toy.progress(to) else { unreachable!() };
        assert!(reason.contains(because), "{to}: {reason}");
        assert_eq!(toy.state(&leads), "primary");
    }
}

#[test]
fn of_two_switchovers_at_once_both_are_answered() {
    let mut toy = Toy::working(&THREE);
    toy.ask("1", Ask::Switchover { to: name("b") });
    toy.ask("2", Ask::Switchover { to: name("c") });
    for id in ["1", "2"] {
        toy.until("an answer", s(30), |toy| matches!(toy.progress(id), RequestProgress::Done { .. } | RequestProgress::Refused { .. }));
    }
    toy.converges(s(40));
}

#[test]
fn etcd_away_and_back_means_read_only_meanwhile_and_the_same_leadership_again() {
    let mut toy = Toy::working(&THREE);
    let epoch = toy.etcd.keys.leader.as_ref().unwrap().epoch;
    toy.etcd.up = false;
    toy.until("nobody writes", s(12), |toy| toy.primary().is_none());
    toy.until("a serves reads", s(10), |toy| {
        let server = &toy.hosts[&name("a")].server;
        server.accepting(toy.now) && server.in_recovery()
    });
    toy.run(s(30));
    assert_eq!(toy.primary(), None, "for as long as etcd is away");
    let now = toy.now;
    toy.etcd.come_back(now);
    toy.converges(s(30));
    assert_eq!(toy.etcd.keys.leader.as_ref().unwrap().epoch, epoch);
    assert_eq!(timeline(&mut toy, "a"), TimelineId(1), "no promotion was needed");
}

#[test]
fn a_short_absence_of_etcd_is_not_noticed_by_clients() {
    let mut toy = Toy::working(&THREE);
    toy.etcd.up = false;
    toy.run(s(2));
    let now = toy.now;
    toy.etcd.come_back(now);
    for _ in 0..400 {
        toy.run(Duration::from_millis(50));
        assert_eq!(toy.primary(), Some("a"), "{}", toy.story());
    }
}

#[test]
fn a_leader_that_is_cut_off_is_fenced_before_another_writes_and_follows_afterwards() {
    let mut toy = Toy::working(&THREE);
    toy.host("a").connected = false;
    toy.until("another primary", s(16), |toy| toy.primary().is_some_and(|name| name != "a"));
    toy.run(s(10));
    toy.host("a").connected = true;
    toy.converges(s(40));
    assert_ne!(toy.leader(), Some("a"));
}

#[test]
fn a_daemon_that_is_back_in_time_costs_no_outage() {
    let mut toy = Toy::working(&THREE);
    let epoch = toy.etcd.keys.leader.as_ref().unwrap().epoch;
    toy.kill_daemon("a");
    toy.run(Duration::from_millis(800));
    toy.start_daemon("a");
    for _ in 0..400 {
        toy.run(Duration::from_millis(50));
        assert_eq!(toy.primary(), Some("a"), "{}", toy.story());
    }
    toy.converges(s(5));
    assert_eq!(toy.etcd.keys.leader.as_ref().unwrap().epoch, epoch);
}

#[test]
fn a_daemon_that_is_gone_for_good_is_fenced_by_its_guard_and_another_leads() {
    let mut toy = Toy::working(&THREE);
    toy.kill_daemon("a");
    toy.until("another primary", s(14), |toy| toy.primary().is_some_and(|name| name != "a"));
    toy.start_daemon("a");
    toy.converges(s(40));
}

#[test]
fn a_standbys_daemon_that_comes_back_late_goes_on_with_the_server_that_runs() {
    let mut toy = Toy::working(&THREE);
    toy.kill_daemon("b");
    toy.run(s(15));
    toy.start_daemon("b");
    toy.converges(s(15));
    assert!(toy.hosts[&name("b")].server.streaming);
}

#[test]
fn a_lock_that_is_deleted_by_hand_ends_the_leadership_at_once_and_leads_to_one_other() {
    let mut toy = Toy::working(&THREE);
    toy.etcd.by_hand(|keys| keys.leader = None);
    toy.until("the old primary has ended", s(1), |toy| toy.primary().is_none());
    toy.until("a primary", s(12), |toy| toy.primary().is_some());
    toy.converges(s(40));
}

#[test]
fn after_etcd_was_wiped_nobody_leads_until_the_spec_is_applied_again() {
    let mut toy = Toy::working(&THREE);
    toy.etcd.wipe();
    toy.until("the old primary has ended", s(1), |toy| toy.primary().is_none());
    for _ in 0..300 {
        toy.run(Duration::from_millis(100));
        assert_eq!(toy.primary(), None, "{}", toy.story());
        assert_eq!(toy.etcd.keys.initialize, None);
    }
    toy.apply(spec(&THREE));
    toy.converges(s(60));
    assert!(matches!(toy.etcd.keys.initialize, Some(Initialize::Done(_))));
    assert!(toy.promoted.keys().all(|timeline| timeline.0 >= 2), "{:?}", toy.promoted);
}

#[test]
fn all_down_and_up_again_is_the_same_cluster() {
    let mut toy = Toy::working(&THREE);
    for member in THREE {
        toy.power_off(member);
    }
    toy.run(s(30));
    for member in THREE {
        toy.start_daemon(member);
    }
    toy.converges(s(60));
}

#[test]
fn one_member_alone_bootstraps_and_comes_back_from_everything() {
    let mut toy = Toy::working(&["a"]);
    toy.power_off("a");
    toy.run(s(20));
    toy.start_daemon("a");
    toy.converges(s(40));
    let now = toy.now;
    toy.host("a").server.crash(now);
    toy.converges(s(10));
    toy.etcd.by_hand(|keys| keys.leader = None);
    toy.run(s(2));
    toy.converges(s(40));
    toy.kill_guard("a");
    toy.run(s(1));
    toy.converges(s(40));
    toy.stop_daemon("a");
    toy.until("it has left", s(10), |toy| toy.hosts[&name("a")].exit == Some(0));
    toy.start_daemon("a");
    toy.converges(s(40));
}

#[test]
fn a_primary_that_crashes_once_is_started_in_place_under_the_same_leadership() {
    let mut toy = Toy::working(&THREE);
    let epoch = toy.etcd.keys.leader.as_ref().unwrap().epoch;
    let now = toy.now;
    toy.host("a").server.crash(now);
    toy.until("it writes again", s(3), |toy| toy.primary() == Some("a"));
    toy.converges(s(30));
    assert_eq!(toy.etcd.keys.leader.as_ref().unwrap().epoch, epoch);
}

#[test]
fn a_primary_in_a_crash_loop_gives_the_lock_up_and_another_leads() {
    let mut toy = Toy::working(&THREE);
    toy.host("a").server.crashes = true;
    let now = toy.now;
    toy.host("a").server.crash(now);
    toy.until("another primary", s(60), |toy| toy.primary().is_some_and(|name| name != "a"));
    toy.converges(s(40));
    toy.run(s(60));
    assert_ne!(toy.leader(), Some("a"), "{}", toy.story());
}

#[test]
fn a_standby_that_is_promoted_by_hand_is_fenced_and_never_gains_the_lock() {
    let mut toy = Toy::working(&THREE);
    toy.promote_by_hand("b");
    toy.until("it is fenced", s(2), |toy| !toy.hosts[&name("b")].server.acknowledges(toy.now));
    toy.converges(s(60));
    assert_eq!(toy.leader(), Some("a"));
    assert_eq!(timeline(&mut toy, "b"), TimelineId(1), "its own timeline is gone");
}

#[test]
fn a_standby_that_was_promoted_by_hand_does_not_lead_when_the_leader_is_lost_meanwhile() {
    let mut toy = Toy::working(&THREE);
    toy.power_off("a");
    toy.promote_by_hand("b");
    toy.run(s(2));
    toy.until("a primary", s(30), |toy| toy.primary().is_some());
    assert_eq!(toy.primary(), Some("c"), "{}", toy.story());
    toy.converges(s(60));
}

#[test]
fn a_second_daemon_of_a_name_leaves_with_exit_code_4() {
    let mut toy = Toy::working(&["a", "b"]);
    // Somebody elsewhere keeps the member key of `c` up, on a lease that lives.
    let lease = toy.etcd.grant();
    let foreign = toy.etcd.keys.members[&name("b")].record.clone();
    toy.etcd.put_member(&name("c"), foreign, lease.lease);
    toy.apply(spec(&THREE));
    let mut other = Toy::new(&["c"]);
    toy.hosts.extend(other.hosts.remove_entry(&name("c")));
    for _ in 0..250 {
        toy.run(Duration::from_millis(100));
        toy.etcd.keep_alive(lease.lease);
        if toy.hosts[&name("c")].exit.is_some() {
            break;
        }
    }
    assert_eq!(toy.hosts[&name("c")].exit, Some(4), "{}", toy.story());
    assert!(toy.hosts[&name("c")].server.data.is_none(), "it touched nothing");
}

#[test]
fn a_key_that_this_host_left_behind_is_waited_for_and_then_taken() {
    let mut toy = Toy::working(&THREE);
    // The power goes, and is back long before the lease is over: no guard hands it on.
    toy.power_off("b");
    toy.run(s(1));
    toy.start_daemon("b");
    toy.converges(s(40));
    assert_eq!(toy.hosts[&name("b")].exit, None);
}

#[test]
fn an_undeclared_member_touches_nothing() {
    let mut toy = Toy::new(&THREE);
    toy.apply(spec(&["a", "b"]));
    toy.until("a leads", s(30), |toy| toy.primary() == Some("a"));
    toy.run(s(20));
    assert_eq!(toy.state("c"), "undeclared");
    assert!(toy.hosts[&name("c")].server.data.is_none());
    assert!(!toy.etcd.keys.members.contains_key(&name("c")));
    toy.apply(spec(&THREE));
    toy.converges(s(40));
    assert!(toy.hosts[&name("c")].server.streaming);
}

#[test]
fn a_lost_answer_of_the_acquiring_transaction_is_given_back_or_used_and_leads_to_one() {
    let mut toy = Toy::working(&THREE);
    for member in ["b", "c"] {
        toy.host(member).lost_answers.insert(OperationKind::Acquire);
    }
    toy.power_off("a");
    toy.run(s(20));
    for member in ["b", "c"] {
        toy.host(member).lost_answers.clear();
    }
    toy.converges(s(40));
}

#[test]
fn lost_answers_of_every_kind_leave_nothing_stuck() {
    use OperationKind::*;
    for kind in [PutMember, Acquire, Release, WriteStatus, RecordPromotion, ClaimInitialize, GiveUpInitialize, AnswerRequest] {
        let mut toy = Toy::new(&THREE);
        for member in THREE {
            toy.host(member).lost_answers.insert(kind);
        }
        toy.apply(spec(&THREE));
        toy.run(s(20));
        toy.ask("1", Ask::Switchover { to: name("b") });
        toy.run(s(15));
        for member in THREE {
            toy.host(member).lost_answers.clear();
        }
        toy.converges(s(60));
    }
}

#[test]
fn a_job_that_hangs_holds_up_neither_a_promotion_nor_the_way_out() {
    for kind in [OperationKind::Configure, OperationKind::Clone, OperationKind::EnsureRoles, OperationKind::Checkpoint, OperationKind::Look]
    {
        let mut toy = Toy::working(&THREE);
        for member in THREE {
            toy.host(member).hanging.insert(kind);
        }
        toy.apply(spec_with(&THREE, "ha: { ttl: 10s, loop_wait: 5s, maximum_lag_on_failover: 2MB }"));
        toy.run(s(5));
        for member in THREE {
            toy.stop_daemon(member);
        }
        toy.until("all have left", s(120), |toy| THREE.iter().all(|member| toy.hosts[&name(member)].exit == Some(0)));
    }
}

/// Found by the simulator's seed 7522.
#[test]
fn row_32_a_member_removed_from_the_spec_while_it_runs_initdb_keeps_others_from_making_a_second_cluster() {
    let mut toy = Toy::new(&THREE);
    toy.apply(spec(&THREE));
    toy.until("a runs initdb", s(20), |toy| toy.daemon("a").checked.world().in_flight.contains(&OperationKind::Initdb));
    toy.apply(spec(&["b", "c"]));
    toy.run(s(40));
    let with_data = |toy: &Toy| THREE.into_iter().filter(|member| toy.hosts[&name(member)].server.data.is_some()).collect::<Vec<_>>();
    assert_eq!((toy.primary(), with_data(&toy)), (None, vec!["a"]), "{}", toy.story());
    toy.apply(spec(&THREE));
    toy.converges(s(40));
    assert_eq!(toy.leader(), Some("a"), "with what it made");
    assert!(toy.post_init.contains(&name("a")), "and what follows initdb is made too");
}
