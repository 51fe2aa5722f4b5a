//! What an operator asks of one member's PostgreSQL: restarts, one at a time and under the lock that is there, and files that are written
//! again (SAFETY rows 6, 9, 67).

use std::sync::Arc;

use super::checked::{Checked, transitions};
use super::cluster::{THREE, s};
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{leads, led_by_us, ours, restarts, standby};
use super::toy::Toy;
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::guard::{PostmasterFacts, Rung, StartId, Word};
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::{SqlFacts, Survey};
use crate::facts::requests::{Ask, Candidate, RequestKey, RequestProgress, RequestRecord};
use crate::machine::action::{Action, Operation, OperationKind, StopMode};
use crate::machine::event::{Configured, Event, Finished};
use crate::machine::requests::{Restart, RestartStage};
use crate::machine::state::State;
use crate::machine::world::World;
use crate::types::Revision;

fn restart(on: &str) -> Ask {
    Ask::Restart { on: name(on), if_leader: None, if_pending: false, at_s: None }
}

fn asked(ask: Ask, progress: RequestProgress) -> RequestKey {
    RequestKey { record: RequestRecord { ask, by: "anna".to_owned(), at: String::new(), progress }, mod_revision: Revision(450) }
}

fn claimed(by: &str) -> RequestProgress {
    RequestProgress::Claimed { by: name(by), stage: "checked".to_owned(), stages: Vec::new() }
}

fn with(view: ClusterView, requests: &[(&str, RequestKey)]) -> Arc<ClusterView> {
    let mut view = ClusterView { revision: Revision(500), ..view };
    view.requests.extend(requests.iter().map(|(id, key)| ((*id).to_owned(), key.clone())));
    Arc::new(view)
}

/// `a` leads, or follows `b`, and this was asked of it.
fn asked_of_a(leads_too: bool, key: RequestKey, ours: bool) -> Checked {
    let (base, state) = if leads_too { (leads(), State::Primary) } else { (standby(), State::Following) };
    let view = if leads_too { led_by_us() } else { super::reactions::worlds::led_by_b() };
    let mut world = World { view: Some(with(view, &[("1", key)])), ..base };
    if ours {
        world.requests.claimed.insert("1".to_owned());
    }
    Checked::resume(world, state)
}

fn renewed(now: BootTime) -> Event {
    Event::Lease(LeaseEvent::Proved { lock: ours(), sent: now, until: now + times().validity() })
}

fn answered(actions: &[Action]) -> Option<&RequestProgress> {
    actions.iter().find_map(|action| match action {
        Action::Do(Operation::AnswerRequest { progress, .. }) => Some(progress),
        _ => None,
    })
}

fn refusal(actions: &[Action]) -> &str {
    match answered(actions) {
        Some(RequestProgress::Refused { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

fn stops(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Stop(_)))
}

fn over(toy: &Toy, id: &str) -> bool {
    !toy.progress(id).is_open()
}

#[track_caller]
fn done(toy: &Toy, id: &str) -> Vec<String> {
    match toy.progress(id) {
        RequestProgress::Done { stages, .. } => stages.iter().map(|over| over.stage.clone()).collect(),
        other => panic!("{other:?}\n{}", toy.story()),
    }
}

#[test]
fn a_standby_is_started_again_and_is_done_when_it_streams() {
    let mut toy = Toy::working(&THREE);
    toy.ask("1", restart("b"));
    toy.until("it is down", s(5), |toy| !toy.hosts[&name("b")].server.accepting(toy.now));
    assert!(!over(&toy, "1"));
    toy.until("the answer", s(10), |toy| over(toy, "1"));
    assert_eq!(done(&toy, "1"), ["stop", "start", "return"]);
    assert!(toy.hosts[&name("b")].server.streaming, "{}", toy.story());
    assert_eq!(toy.primary(), Some("a"));
    toy.converges(s(20));
}

#[test]
fn a_primary_is_started_again_in_place_under_the_same_leadership() {
    let mut toy = Toy::working(&THREE);
    let (epoch, timeline) = (toy.etcd.keys.leader.as_ref().unwrap().epoch, toy.hosts[&name("a")].server.data.as_ref().unwrap().timeline());
    toy.ask("1", restart("a"));
    toy.until("it is down", s(5), |toy| toy.primary().is_none());
    toy.until("the answer", s(10), |toy| over(toy, "1"));
    assert_eq!(done(&toy, "1"), ["checkpoint", "stop", "start", "return"]);
    assert_eq!((toy.primary(), toy.etcd.keys.leader.as_ref().unwrap().epoch), (Some("a"), epoch));
    assert_eq!(toy.hosts[&name("a")].server.data.as_ref().unwrap().timeline(), timeline);
    toy.converges(s(20));
}

#[test]
fn restarts_that_an_operator_asks_for_are_no_crash_loop() {
    let mut toy = Toy::working(&THREE);
    for round in 0..6 {
        let id = round.to_string();
        toy.ask(&id, restart("a"));
        toy.until("the answer", s(20), |toy| over(toy, &id));
        done(&toy, &id);
    }
    assert_eq!(toy.primary(), Some("a"));
}

#[test]
fn of_three_that_are_asked_at_once_one_at_a_time_is_down_and_the_primary_last() {
    let mut toy = Toy::working(&THREE);
    for (id, on) in [("1", "a"), ("2", "b"), ("3", "c")] {
        toy.ask(id, restart(on));
    }
    let mut order = Vec::new();
    toy.until("all answers", s(60), |toy| {
        ["1", "2", "3"].iter().all(|id| over(toy, id)) || {
            let down: Vec<_> = THREE.iter().filter(|member| !toy.hosts[&name(member)].server.accepting(toy.now)).collect();
            assert!(down.len() < 2, "{down:?}\n{}", toy.story());
            false
        }
    });
    for id in ["2", "3", "1"] {
        done(&toy, id);
        order.push(toy.etcd.keys.requests[id].mod_revision);
    }
    assert!(order.is_sorted(), "the primary was answered last: {order:?}");
    toy.converges(s(20));
}

#[test]
fn a_member_whose_role_has_changed_or_that_has_nothing_pending_is_left_alone() {
    for (leads_too, if_leader, because) in [(true, false, "leads by now"), (false, true, "does not lead by now")] {
        let ask = Ask::Restart { on: name("a"), if_leader: Some(if_leader), if_pending: false, at_s: None };
        for (progress, ours) in [(RequestProgress::Created, false), (claimed("a"), true)] {
            let mut checked = asked_of_a(leads_too, asked(ask.clone(), progress), ours);
            let actions = checked.handle(T0, Event::Tick);
            assert!(refusal(&actions).contains(because) && !stops(&actions), "{actions:?}");
        }
    }
    let ask = Ask::Restart { on: name("a"), if_leader: None, if_pending: true, at_s: None };
    let actions = asked_of_a(true, asked(ask, RequestProgress::Created), false).handle(T0, Event::Tick);
    assert!(matches!(answered(&actions), Some(RequestProgress::Done { message, .. }) if message.contains("nothing of")), "{actions:?}");
}

#[test]
fn what_a_run_before_this_one_took_up_is_answered_and_not_begun_again() {
    for leads_too in [true, false] {
        let mut checked = asked_of_a(leads_too, asked(restart("a"), claimed("a")), false);
        let actions = checked.handle(T0, Event::Tick);
        assert!(refusal(&actions).contains("was started again") && !stops(&actions), "{actions:?}");
        assert!(checked.world().requests.restart.is_none());
    }
}

#[test]
fn what_a_member_took_up_that_is_gone_is_answered_by_the_leader() {
    let mut world = leads();
    let mut view = led_by_us();
    view.members.remove(&name("c"));
    world.view = Some(with(view, &[("1", asked(restart("c"), claimed("c")))]));
    let mut checked = Checked::resume(world, State::Primary);
    assert_eq!(answered(&checked.handle(T0, Event::Tick)), None, "its key may come back");
    let actions = checked.handle(T0 + s(5), renewed(T0 + s(5)));
    assert!(refusal(&actions).contains("is not there any more"), "{actions:?}");
}

#[test]
fn nothing_is_restarted_while_nobody_leads() {
    let mut world = standby();
    world.view = Some(with(super::reactions::worlds::vacant(), &[("1", asked(restart("a"), RequestProgress::Created))]));
    world.vacancy = Some(crate::machine::world::Vacancy { id: Revision(350), seen: T0 });
    let mut checked = Checked::resume(world, State::Following);
    let actions = checked.handle(T0, Event::Tick);
    assert!(refusal(&actions).contains("nobody leads") && !stops(&actions), "{actions:?}");
}

/// `a` leads and makes the checkpoint before the stop.
fn makes_checkpoint() -> Checked {
    let mut checked = asked_of_a(true, asked(restart("a"), claimed("a")), true);
    checked.handle(T0, Event::Tick);
    assert_eq!(checked.state(), &State::Restarting);
    checked
}

#[test]
fn a_checkpoint_that_fails_or_does_not_end_costs_no_outage() {
    let mut failed = makes_checkpoint();
    failed.handle(T0 + ms(500), Event::Finished(Finished::RequestAnswered(Ok(true))));
    let actions = failed.handle(T0 + s(1), Event::Finished(Finished::Checkpointed(Err("no space".to_owned()))));
    assert_eq!(failed.state(), &State::Primary);
    assert!(!stops(&actions), "{actions:?}");
    assert!(refusal(&actions).contains("the checkpoint before the stop failed") && refusal(&actions).contains("was not stopped"));
    let mut late = makes_checkpoint();
    for second in 1..=101 {
        let actions = late.handle(T0 + s(second), renewed(T0 + s(second)));
        assert!(!stops(&actions), "{actions:?}");
    }
    assert_eq!(late.state(), &State::Primary);
}

#[test]
fn a_daemon_that_is_to_stop_hands_over_instead_of_starting_again() {
    let mut checked = makes_checkpoint();
    let actions = checked.handle(T0 + s(1), Event::StopRequested);
    assert_eq!(checked.state().name(), "handing_over");
    assert!(!stops(&actions), "{actions:?}");
    let mut checked = makes_checkpoint();
    checked.handle(T0 + s(1), Event::Finished(Finished::Checkpointed(Ok(()))));
    assert_eq!(checked.world().requests.restart.as_ref().unwrap().stage, RestartStage::Stop);
    checked.handle(T0 + s(1), Event::StopRequested);
    assert_eq!(checked.state().name(), "handing_over");
}

#[test]
fn a_lock_that_is_lost_on_the_way_ends_the_restart_and_nothing_is_started_as_a_primary() {
    let mut checked = makes_checkpoint();
    checked.handle(T0 + ms(50), Event::Finished(Finished::Checkpointed(Ok(()))));
    let ending = PostmasterFacts::Ending { start: StartId(1), rung: Rung::FastStop, word: Word::Writable };
    checked.handle(T0 + ms(60), Event::Guard(guard(2, ending)));
    let view = ClusterView { leader: Some(leader("b", 8, 490)), ..led_by_us() };
    let actions = checked.handle(T0 + ms(70), Event::View(with(view, &[("1", asked(restart("a"), claimed("a")))]), T0 + ms(70)));
    assert_eq!(checked.state().name(), "demoting", "{actions:?}");
    checked.handle(T0 + ms(80), Event::Guard(guard(3, nothing_runs())));
    assert_eq!(checked.state(), &State::Following);
    let actions = checked.handle(T0 + s(2), Event::Finished(Finished::RequestAnswered(Ok(true))));
    let actions = [actions, checked.handle(T0 + s(3), Event::Tick)].concat();
    assert!(refusal(&actions).contains("`b` leads"), "{actions:?}");
}

/// Found by the simulator (seed 397): it stayed at its checkpoint for ever.
#[test]
fn a_guard_that_ends_during_the_checkpoint_leaves_no_restart_behind_that_does_not_end() {
    let mut checked = makes_checkpoint();
    checked.handle(T0 + ms(50), Event::GuardGone);
    assert_eq!(checked.state().name(), "demoting");
    assert_eq!(checked.world().requests.restart.as_ref().unwrap().stage, RestartStage::Start);
}

#[test]
fn an_archiver_that_never_ends_does_not_hold_a_restart() {
    let mut checked = makes_checkpoint();
    checked.handle(T0 + ms(50), Event::Finished(Finished::Checkpointed(Ok(()))));
    let ending = PostmasterFacts::Ending { start: StartId(1), rung: Rung::FastStop, word: Word::Writable };
    checked.handle(T0 + ms(60), Event::Guard(guard(2, ending)));
    let actions = checked.handle(T0 + ms(400), Event::Tick);
    assert!(operations(&actions).contains(&OperationKind::Look), "{actions:?}");
    let looked = super::reactions::worlds::full(crate::facts::postgres::DatabaseState::ShutDown).data;
    checked.handle(T0 + ms(410), Event::Finished(Finished::Looked(looked)));
    let killed = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Stop(StopMode::Kill)));
    assert!(!killed(&checked.handle(T0 + ms(1_000), Event::Tick)));
    assert!(killed(&checked.handle(T0 + ms(1_200), Event::Tick)));
}

#[test]
fn what_is_scheduled_for_one_time_is_carried_out_one_after_the_other_once() {
    let mut toy = Toy::working(&THREE);
    for (id, on) in [("1", "a"), ("2", "b"), ("3", "c")] {
        toy.ask(id, Ask::Restart { on: name(on), if_leader: None, if_pending: false, at_s: Some(2_000) });
    }
    let tell = |toy: &mut Toy, wall_s| THREE.iter().for_each(|member| toy.deliver(&name(member), Event::WallClock(wall_s)));
    tell(&mut toy, 1_990);
    toy.run(s(3));
    assert!(["1", "2", "3"].iter().all(|id| *toy.progress(id) == RequestProgress::Created));
    tell(&mut toy, 2_000);
    toy.until("all answers", s(60), |toy| ["1", "2", "3"].iter().all(|id| over(toy, id)));
    ["1", "2", "3"].iter().for_each(|id| drop(done(&toy, id)));
    toy.converges(s(20));
}

#[test]
fn a_standby_that_leads_by_the_time_it_is_back_is_back() {
    let restart = restarts(standby(), RestartStage::Return).requests.restart.map(|restart| Restart { leads: false, ..restart });
    let mut world = World { view: Some(with(led_by_us(), &[("1", asked(self::restart("a"), claimed("a")))])), ..leads() };
    world.requests.restart = restart;
    let actions = Checked::resume(world, State::Primary).handle(T0, Event::Tick);
    assert!(matches!(answered(&actions), Some(RequestProgress::Done { .. })), "{actions:?}");
}

fn switchover(to: &str, progress: RequestProgress, mod_revision: i64) -> RequestKey {
    RequestKey { mod_revision: Revision(mod_revision), ..asked(Ask::Switchover { to: name(to) }, progress) }
}

/// `a` leads and sees `c` stream. `b` or `a` has claimed a restart, and a switchover to `c` was asked for.
fn both_asked(restart_of: &str, stage: &str, switchover: RequestKey) -> Checked {
    let stage = RequestProgress::Claimed { by: name(restart_of), stage: stage.to_owned(), stages: Vec::new() };
    let mut view = led_by_us();
    view.members.get_mut(&name("c")).unwrap().record.state = "streaming".to_owned();
    let streams = probe(T0, SqlFacts { replicas: vec![streaming("c", 1_000)], ..sql(false, 2, 1_000) });
    let view = with(view, &[("1", asked(restart(restart_of), stage)), ("2", switchover)]);
    let mut world = World { view: Some(view), probe: Some(streams), ..leads() };
    world.requests.survey = Some((T0, Survey::default()));
    world.requests.claimed = ["1", "2"].map(str::to_owned).into_iter().collect();
    Checked::resume(world, State::Primary)
}

#[test]
fn row_71_a_switchover_that_comes_second_to_a_restart_waits_and_is_told() {
    for (progress, mod_revision) in [(RequestProgress::Created, 440), (claimed("a"), 451)] {
        let mut checked = both_asked("b", "stop", switchover("c", progress, mod_revision));
        assert_eq!(answered(&checked.handle(T0, Event::Tick)), None, "it may be over in a moment");
        let actions = checked.handle(T0 + s(3), renewed(T0 + s(3)));
        assert!(refusal(&actions).contains("PostgreSQL of `b` is being restarted"), "{actions:?}");
        assert_eq!((checked.state(), stops(&actions)), (&State::Primary, false));
    }
}

#[test]
fn row_71_of_a_restart_and_a_switchover_that_were_claimed_at_once_the_first_begins() {
    for (restart_of, switchover_at, begins) in
        [("b", 449, "handing_over"), ("b", 451, "primary"), ("a", 449, "handing_over"), ("a", 451, "restarting")]
    {
        let mut checked = both_asked(restart_of, "checked", switchover("c", claimed("a"), switchover_at));
        checked.handle(T0, Event::Tick);
        assert_eq!(checked.state().name(), begins, "`{restart_of}` claimed at 450, the switchover at {switchover_at}");
    }
}

#[test]
fn whoever_asks_what_a_switchover_would_meet_is_told_of_a_restart() {
    let check = asked(Ask::CheckSwitchover { to: None }, RequestProgress::Created);
    let actions = both_asked("b", "stop", check).handle(T0, Event::Tick);
    let Some(RequestProgress::Judged { candidates, .. }) = answered(&actions) else { panic!("{actions:?}") };
    let told = |candidate: &Candidate| candidate.obstacles.iter().any(|obstacle| obstacle.contains("`b` is being restarted"));
    assert!(!candidates.is_empty() && candidates.iter().all(told), "{candidates:?}");
}

#[test]
fn row_71_a_switchover_and_restarts_that_are_asked_for_at_once_are_never_at_it_at_once() {
    for (restarted, to, later) in [("b", "c", 0), ("c", "c", 0), ("a", "b", 0), ("b", "b", 40), ("c", "b", 90), ("a", "c", 130)] {
        let mut toy = Toy::working(&THREE);
        toy.ask("1", restart(restarted));
        toy.run(ms(later));
        toy.ask("2", Ask::Switchover { to: name(to) });
        toy.until("both answers", s(60), |toy| {
            let down: Vec<_> = THREE.iter().filter(|member| !toy.hosts[&name(member)].server.accepting(toy.now)).collect();
            assert!(down.len() < 2, "{down:?}\n{}", toy.story());
            over(toy, "1") && over(toy, "2")
        });
        let refused = |id: &str| match toy.progress(id) {
            RequestProgress::Refused { reason } => Some(reason.clone()),
            _ => None,
        };
        assert_eq!(refused("1"), None, "{restarted}, {to}\n{}", toy.story());
        assert!(refused("2").is_none_or(|reason| reason.contains("is being restarted")), "{:?}\n{}", refused("2"), toy.story());
        toy.converges(s(30));
    }
}

#[test]
fn files_are_written_again_when_asked_for_and_what_postgresql_says_is_the_answer() {
    let reload = || asked(Ask::Reload { on: name("a") }, claimed("a"));
    for leads_too in [true, false] {
        for (result, expected) in [(Ok(Configured::Taken), None), (Ok(Configured::PutBack("line 7".to_owned())), Some("line 7"))] {
            let mut checked = asked_of_a(leads_too, reload(), true);
            let begun = [checked.handle(T0, Event::Tick), checked.handle(T0, Event::Tick)].concat();
            let anew = |action: &Action| matches!(action, Action::Do(Operation::Configure { anew: true, .. }));
            assert_eq!(begun.iter().filter(|action| anew(action)).count(), 1, "{begun:?}");
            let upstream = checked.world().in_force.as_ref().and_then(|files| files.upstream.clone());
            let actions = checked.handle(T0, Event::Finished(Finished::Configured { generation: 1, upstream, result }));
            match expected {
                None => assert!(matches!(answered(&actions), Some(RequestProgress::Done { .. })), "{actions:?}"),
                Some(why) => assert!(refusal(&actions).contains(why), "{actions:?}"),
            }
        }
    }
}

/// PostgreSQL of `a`, which leads or follows, says that its postmaster was told to stop.
fn told_to_stop(leads_too: bool) -> (Checked, Vec<Action>) {
    let base = if leads_too { leads() } else { standby() };
    let mut checked = Checked::resume(base, if leads_too { State::Primary } else { State::Following });
    let actions = checked.handle(T0, Event::Probed(probe(T0, SqlFacts { stopping: true, ..sql(!leads_too, 2, 1_000) })));
    (checked, actions)
}

#[test]
fn row_67_a_server_that_was_told_to_stop_and_waits_for_its_clients_is_stopped_at_once_and_started_again() {
    for leads_too in [true, false] {
        let (checked, actions) = told_to_stop(leads_too);
        let fast = |action: &Action| matches!(action, Action::Stop(StopMode::Fast { .. }));
        assert!(actions.iter().any(fast), "{actions:?}");
        assert_eq!(checked.state(), if leads_too { &State::Restarting } else { &State::Following });
    }
    let (mut checked, _) = told_to_stop(true);
    let actions = checked.handle(T0 + ms(300), Event::Guard(guard(2, nothing_runs())));
    assert_eq!(transitions(&actions), [("restarting".to_owned(), "promoting".to_owned())]);
}

#[test]
fn row_67_a_primary_that_is_stopped_by_hand_again_and_again_gives_the_lock_to_another() {
    let mut toy = Toy::working(&THREE);
    for _ in 0..5 {
        let leader = toy.leader().unwrap().to_owned();
        if leader != "a" {
            break;
        }
        let now = toy.now;
        toy.host("a").server.stopped_by_hand(now);
        toy.until("somebody takes writes", s(30), |toy| toy.primary().is_some());
    }
    assert_ne!(toy.primary(), Some("a"), "{}", toy.story());
    toy.converges(s(60));
}
