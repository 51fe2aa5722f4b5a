//! A planned end of leadership: what it does not wait for, and its ways back (SAFETY rows 51, 59, 70, 71).

use std::sync::Arc;

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::reactions::worlds::{full, leads, led_by_us, ours};
use super::toy::Toy;
use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Condition, MemberRole, Severity};
use crate::facts::guard::{PostmasterFacts, Rung, StartId, Word};
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::{Archiver, DataDirectory, DatabaseState, SqlFacts, Survey};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::facts::synchrony::{Acks, FEATURE, Names, SyncRecord};
use crate::machine::action::{Action, Operation, StopMode};
use crate::machine::event::{Event, Finished};
use crate::machine::state::{HandOver, HandOverStage, State};
use crate::machine::synchrony::OfServer;
use crate::machine::world::World;
use crate::policy::switchover::REPLAY_PAUSED;
use crate::policy::synchrony::InForce;
use crate::types::{Epoch, Lsn, Revision};

pub(super) fn asked(progress: RequestProgress, to: &str, by: &str, mod_revision: i64) -> RequestKey {
    let record = RequestRecord { ask: Ask::Switchover { to: name(to) }, by: by.to_owned(), at: String::new(), progress };
    RequestKey { record, mod_revision: Revision(mod_revision) }
}

fn claimed(by: &str) -> RequestProgress {
    RequestProgress::Claimed { by: name(by), stage: "checkpoint".to_owned(), stages: Vec::new() }
}

/// `a` leads, and this was asked for.
fn view_with(requests: &[(&str, RequestKey)]) -> ClusterView {
    let mut view = led_by_us();
    view.revision = Revision(500);
    view.members.get_mut(&name("c")).unwrap().record.state = "streaming".to_owned();
    view.requests.extend(requests.iter().map(|(id, key)| ((*id).to_owned(), key.clone())));
    view
}

fn streams() -> SqlFacts {
    SqlFacts { replicas: vec![streaming("c", 1_000)], ..sql(false, 2, 1_000) }
}

/// `a` leads, sees `c` stream, and this was asked for.
pub(super) fn primary(requests: &[(&str, RequestKey)]) -> Checked {
    Checked::resume(leads_with(requests), State::Primary)
}

fn leads_with(requests: &[(&str, RequestKey)]) -> World {
    let mut world = World { view: Some(Arc::new(view_with(requests))), probe: Some(probe(T0, streams())), ..leads() };
    world.requests.survey = Some((T0, Survey::default()));
    world
}

fn renewed(now: BootTime) -> Event {
    Event::Lease(LeaseEvent::Proved { lock: ours(), sent: now, until: now + times().validity() })
}

fn answers(actions: &[Action]) -> Vec<(&str, &RequestProgress)> {
    let of = |action| match action {
        &Action::Do(Operation::AnswerRequest { ref id, ref progress, .. }) => Some((id.as_str(), progress)),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

/// As done, or as refused, and nothing else is.
#[track_caller]
pub(super) fn is_answered(actions: &[Action], id: &str, done: bool) {
    let [(answered, progress)] = answers(actions)[..] else { panic!("{actions:?}") };
    let (is_done, is_refused) = (matches!(progress, RequestProgress::Done { .. }), matches!(progress, RequestProgress::Refused { .. }));
    assert!(answered == id && is_done == done && is_refused != done, "{progress:?}");
}

fn stops(actions: &[Action]) -> Vec<StopMode> {
    actions.iter().filter_map(|action| if let Action::Stop(mode) = action { Some(*mode) } else { None }).collect()
}

/// `a` hands over to `c`, its checkpoint under way.
fn makes_checkpoint() -> Checked {
    let mut world = leads_with(&[("1", asked(claimed("a"), "c", "anna", 450))]);
    world.requests.claimed.insert("1".to_owned());
    let mut checked = Checked::resume(world, State::Primary);
    checked.handle(T0, Event::Tick);
    assert_eq!(checked.state().name(), "handing_over");
    checked
}

#[test]
fn row_70_a_checkpoint_that_fails_or_a_target_that_is_gone_by_then_costs_no_outage() {
    let gone = || {
        let mut view = view_with(&[("1", asked(claimed("a"), "c", "anna", 450))]);
        view.members.remove(&name("c"));
        Event::View(Arc::new(view), T0 + s(1))
    };
    for (target_is_gone, checkpoint, because) in
        [(false, Err("no space".to_owned()), "the checkpoint before the stop failed"), (true, Ok(()), "the daemon of `c` is not there")]
    {
        let mut checked = makes_checkpoint();
        let mut actions = if target_is_gone { checked.handle(T0 + s(1), gone()) } else { Vec::new() };
        assert_eq!(checked.state() == &State::Primary, target_is_gone, "the checkpoint is not waited for when nothing comes of it");
        actions.extend(checked.handle(T0 + s(1), Event::Finished(Finished::Checkpointed(checkpoint))));
        assert_eq!((checked.state(), stops(&actions)), (&State::Primary, Vec::new()), "{actions:?}");
        let answered = answers(&actions);
        let [("1", RequestProgress::Refused { reason })] = answered.as_slice() else { panic!("{answered:?}") };
        assert!(reason.contains(because) && reason.contains("was not stopped"), "{reason}");
    }
}

/// As [`makes_checkpoint`], or because the daemon is to stop; and commits wait for `c`.
fn makes_checkpoint_while_commits_wait(asked_for: bool) -> Checked {
    let request = [("1", asked(claimed("a"), "c", "anna", 450))];
    let mut world = leads_with(&request[..usize::from(asked_for)]);
    world.requests.claimed.insert("1".to_owned());
    let mut view = ClusterView::clone(world.view.as_deref().unwrap());
    view.members.values_mut().for_each(|key| key.record.features.push(FEATURE.to_owned()));
    view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(300), members: [name("a"), name("c")].into(), copies: 2 });
    view.sync_revision = Revision(310);
    world.view = Some(Arc::new(view));
    world.spec = Some((1, spec_with(&["a", "b", "c"], "replication: { mode: quorum }")));
    let names = Names::Any(Acks { members: [name("c")].into(), acks: 1 });
    world.probe = Some(probe(T0, SqlFacts { synchronous_standby_names: names.to_string(), ..streams() }));
    world.synchrony.server = Some(OfServer::new(StartId(1), InForce::since_start(names), T0));
    let mut checked = Checked::resume(world, State::Primary);
    checked.handle(T0, if asked_for { Event::Tick } else { Event::StopRequested });
    assert_eq!(checked.state().name(), "handing_over");
    checked
}

/// While the checkpoint is made the names cannot be set: commits would hang for as long as it takes.
#[test]
fn row_70_the_checkpoint_is_not_waited_for_while_commits_wait_for_a_standby_that_is_gone() {
    let both = || vec![streaming("b", 1_000), streaming("c", 1_000)];
    for (asked_for, replicas, state, stopped) in [
        (true, Vec::new(), "primary", Vec::new()),
        (false, Vec::new(), "handing_over", vec![StopMode::Fast { patience: s(30) }]),
        // The names are to be changed then too, but nobody waits for that.
        (true, both(), "handing_over", Vec::new()),
    ] {
        let mut checked = makes_checkpoint_while_commits_wait(asked_for);
        let mut actions = Vec::new();
        for second in 1..=4 {
            let now = T0 + s(second);
            actions.extend(checked.handle(now, renewed(now)));
            let shown = checked.world().sql().unwrap().clone();
            actions.extend(checked.handle(now, Event::Probed(probe(now, SqlFacts { replicas: replicas.clone(), ..shown }))));
        }
        assert_eq!(checked.state().name(), state);
        let modes: Vec<_> = stops(&actions).into_iter().map(|mode| std::mem::discriminant(&mode)).collect();
        assert_eq!(modes.first(), stopped.first().map(std::mem::discriminant).as_ref(), "{actions:?}");
        let cancelled = actions.iter().any(|action| matches!(action, Action::CancelJob));
        assert_eq!(cancelled, replicas.is_empty(), "{actions:?}");
        if state == "primary" {
            let answered = answers(&actions);
            let Some(("1", RequestProgress::Refused { reason })) = answered.last() else { panic!("{answered:?}") };
            assert!(reason.contains("commits wait for") && reason.contains("was not stopped"), "{reason}");
            assert!(actions.iter().any(|action| matches!(action, Action::Do(Operation::WriteSync { .. }))), "{actions:?}");
        }
    }
}

/// Until the stop it takes writes as before: what a failover may lose is counted from `status` (P2).
#[test]
fn p2_the_leaders_position_goes_on_being_written_while_a_long_checkpoint_is_made() {
    let mut checked = makes_checkpoint();
    checked.handle(T0, Event::Finished(Finished::StatusWritten(Ok(true))));
    let mut written = Vec::new();
    for second in 1..=30 {
        let now = T0 + s(second);
        let mut actions = checked.handle(now, renewed(now));
        actions.extend(checked.handle(now, Event::Probed(probe(now, SqlFacts { ..sql(false, 2, 1_000 + second) }))));
        let lsn = actions
            .iter()
            .find_map(|action| if let Action::Do(Operation::WriteStatus(record)) = action { Some(record.lsn.0) } else { None });
        if let Some(lsn) = lsn {
            written.push(lsn);
            checked.handle(now, Event::Finished(Finished::StatusWritten(Ok(true))));
        }
    }
    assert_eq!(checked.state().name(), "handing_over");
    assert!(written.len() >= 5 && written.iter().all(|lsn| *lsn > 1_000), "{written:?}");
}

#[test]
fn row_70_a_checkpoint_that_does_not_end_is_given_up_and_postgresql_is_not_stopped() {
    let mut checked = makes_checkpoint();
    let mut actions = Vec::new();
    for second in 1..=101 {
        actions.extend(checked.handle(T0 + s(second), renewed(T0 + s(second))));
        if checked.state() == &State::Primary {
            break;
        }
        assert!(second < 101, "it has been going on for {second} s");
    }
    assert_eq!(stops(&actions), Vec::new());
    assert!(actions.iter().any(|action| matches!(action, Action::CancelJob)), "{actions:?}");
}

/// PostgreSQL of `a` is stopping since T0; `c` has received up to there.
fn stops_since_t0(received: u64) -> Checked {
    let ending = PostmasterFacts::Ending { start: StartId(1), rung: Rung::FastStop, word: Word::Writable };
    let mut view = view_with(&[("1", asked(claimed("a"), "c", "anna", 450))]);
    view.members.insert(name("c"), key(record(MemberRole::Replica, 2, received), 9));
    let world = World { guard: Some(guard(1, ending)), probe: None, view: Some(Arc::new(view)), ..leads() };
    let hand_over = HandOver { stage: HandOverStage::Stop, ..HandOver::new(ours(), Some(name("c")), Some("1".to_owned()), T0) };
    Checked::resume(world, State::HandingOver { hand_over })
}

fn looked(state: DatabaseState) -> Event {
    Event::Finished(Finished::Looked(full(state).data))
}

#[test]
fn a_slow_archiver_holds_the_switchover_no_longer_than_a_second_and_one_whose_successor_is_gone_no_longer_than_its_patience() {
    let [shut_down, shutting_down] = [DatabaseState::ShutDown, DatabaseState::ShuttingDown];
    for (state, received, ends_after_ms) in [(shut_down, 1_100, Some(1_200)), (shut_down, 1_000, Some(4_200)), (shutting_down, 1_100, None)]
    {
        let mut checked = stops_since_t0(received);
        let early = checked.handle(T0 + ms(100), Event::Tick);
        assert!(!early.iter().any(|action| matches!(action, Action::Do(Operation::Look))), "a stop that is quick is not looked at");
        let mut actions = checked.handle(T0 + ms(400), Event::Tick);
        assert!(actions.iter().any(|action| matches!(action, Action::Do(Operation::Look))), "{actions:?}");
        actions.extend(checked.handle(T0 + ms(410), looked(state)));
        for now in [1_000, 1_200, 4_000, 4_200].map(ms) {
            actions.extend(checked.handle(T0 + now, renewed(T0 + now)));
            let due = ends_after_ms.is_some_and(|after| now >= ms(after));
            assert_eq!(stops(&actions).contains(&StopMode::Kill), due, "{state:?}, received {received}, after {now:?}");
        }
        assert!(!actions.iter().any(|action| matches!(action, Action::Do(Operation::Release { .. }))), "a process is still there");
        assert_eq!(checked.state().name(), "handing_over");
    }
}

/// A member that may not come out of recovery is the last that is handed to, also when the others take a moment longer to have everything.
#[test]
fn row_50_a_daemon_that_is_stopped_hands_over_to_a_member_whose_replay_is_paused_only_if_no_other_gets_everything_in_time() {
    for (b_gets_it, to) in [(true, "b"), (false, "c")] {
        let view = |b_received: u64| {
            let mut view = view_with(&[]);
            view.members.insert(name("b"), key(record(MemberRole::Replica, 2, b_received), 8));
            let mut paused = record(MemberRole::Replica, 2, 1_100);
            let (kind, message) = (REPLAY_PAUSED.to_owned(), "replay is paused".to_owned());
            paused.conditions.push(Condition { kind, severity: Severity::Warning, message });
            view.members.insert(name("c"), key(paused, 9));
            Arc::new(view)
        };
        let spec = Some((1, spec(&["a", "b", "c, failover_priority: 200"])));
        let world = World { guard: Some(guard(1, nothing_runs())), probe: None, spec, view: Some(view(1_000)), ..leads() };
        let world = World { data: full(DatabaseState::ShutDown).data, stop_requested: true, ..world };
        let hand_over = HandOver { stage: HandOverStage::Wait { since: T0 }, ..HandOver::new(ours(), None, None, T0) };
        let mut checked = Checked::resume(world, State::HandingOver { hand_over });
        let released = |actions: &[Action]| {
            actions.iter().find_map(|action| match action {
                Action::Do(Operation::Release { record: Some(record), .. }) => Some(record.to.clone()),
                _ => None,
            })
        };
        assert_eq!(released(&checked.handle(T0 + ms(100), Event::Tick)), None, "`b` may have it in a moment");
        let now = T0 + if b_gets_it { ms(200) } else { ms(3_000) };
        let actions = checked.handle(now, Event::View(view(if b_gets_it { 1_100 } else { 1_000 }), now));
        assert_eq!(released(&actions), Some(Some(name(to))), "{actions:?}");
    }
}

#[test]
fn a_look_that_began_before_postgresql_ended_is_not_taken_for_how_it_ended() {
    let mut checked = stops_since_t0(1_100);
    checked.handle(T0 + ms(400), Event::Tick);
    checked.handle(T0 + ms(500), Event::Guard(guard(2, nothing_runs())));
    let actions = checked.handle(T0 + ms(510), looked(DatabaseState::ShuttingDown));
    assert_eq!(checked.world().data, DataDirectory::Unknown);
    assert!(actions.iter().any(|action| matches!(action, Action::Do(Operation::Look))), "{actions:?}");
    let actions = checked.handle(T0 + ms(520), looked(DatabaseState::ShutDown));
    assert!(actions.iter().any(|action| matches!(action, Action::Do(Operation::Release { .. }))), "{actions:?}");
}

/// What is not archived when PostgreSQL ends holds up the way back.
#[test]
fn row_59_an_archiver_that_comes_on_is_given_a_moment_before_the_stop_and_one_that_fails_or_is_too_slow_is_not_waited_for() {
    let archiver = |failing, ready| Ok(Survey { archiver: Some(Archiver { failing, ready }), ..Survey::default() });
    let done = || Ok(Survey::default());
    for (said, stopped_after_s) in [
        (vec![done()], 0),
        (vec![archiver(false, 1)], 0),
        (vec![archiver(true, 3)], 0),
        (vec![Err("no answer".to_owned()), done()], 1),
        (vec![archiver(false, 3), archiver(false, 2), archiver(false, 1)], 2),
        (vec![archiver(false, 3); 20], 10),
    ] {
        let mut checked = makes_checkpoint();
        let mut said = said.into_iter();
        let begun = T0 + ms(10);
        let mut actions = checked.handle(begun, Event::Finished(Finished::Checkpointed(Ok(()))));
        for second in 0..=10 {
            let now = begun + s(second);
            actions.extend(checked.handle(now, renewed(now)));
            if actions.drain(..).any(|action| matches!(action, Action::Do(Operation::Survey))) {
                let answered = checked.handle(now, Event::Finished(Finished::Surveyed(said.next().unwrap())));
                actions.extend(answered);
            }
            assert_eq!(checked.state().ends_postgres(), second >= stopped_after_s, "after {second} s: {actions:?}");
            if second >= stopped_after_s {
                break;
            }
        }
    }
}

#[test]
fn row_71_while_one_switchover_is_under_way_another_is_refused_at_once_and_says_whose() {
    let mut checked = makes_checkpoint();
    let second = asked(RequestProgress::Created, "b", "bert", 460);
    let view = view_with(&[("1", asked(claimed("a"), "c", "anna", 450)), ("2", second)]);
    let actions = checked.handle(T0 + s(1), Event::View(Arc::new(view), T0 + s(1)));
    let answered = answers(&actions);
    let [("2", RequestProgress::Refused { reason })] = answered.as_slice() else { panic!("{answered:?}") };
    assert!(reason.contains("another switchover is under way: to `c`, asked for by anna"), "{reason}");
}

#[test]
fn of_two_that_nobody_has_looked_at_the_one_that_was_written_first_is_taken_up() {
    let created = |to, by, at| asked(RequestProgress::Created, to, by, at);
    let mut checked = primary(&[("1", created("c", "bert", 460)), ("2", created("c", "anna", 450))]);
    let actions = checked.handle(T0, Event::Tick);
    let answered = answers(&actions);
    assert!(matches!(answered.as_slice(), [("2", RequestProgress::Claimed { .. })]), "{answered:?}");
}

#[test]
fn row_70_what_a_run_before_this_one_took_up_is_answered_and_not_carried_out_again() {
    let mut checked = primary(&[("1", asked(claimed("a"), "c", "anna", 450))]);
    let actions = checked.handle(T0, Event::Tick);
    assert_eq!(checked.state(), &State::Primary);
    let answered = answers(&actions);
    let [("1", RequestProgress::Refused { reason })] = answered.as_slice() else { panic!("{answered:?}") };
    assert!(reason.contains("was started again"), "{reason}");
}

#[test]
fn row_70_what_a_leader_took_up_that_is_gone_is_answered_by_the_next_one() {
    for (to, done) in [("a", true), ("c", false)] {
        let mut checked = primary(&[("1", asked(claimed("b"), to, "anna", 450))]);
        assert!(answers(&checked.handle(T0, Event::Tick)).is_empty(), "who took it up knows better");
        is_answered(&checked.handle(T0 + s(6), renewed(T0 + s(6))), "1", done);
    }
}

#[test]
fn each_stage_and_how_long_it_took_stands_in_the_request() {
    let mut checked = makes_checkpoint();
    checked.handle(T0 + ms(40), Event::Finished(Finished::Checkpointed(Ok(()))));
    let actions = checked.handle(T0 + ms(40), Event::Finished(Finished::Surveyed(Ok(Survey::default()))));
    let answered = answers(&actions);
    let [("1", RequestProgress::Claimed { stage, stages, .. })] = answered.as_slice() else { panic!("{answered:?}") };
    let stages: Vec<_> = stages.iter().map(|over| (over.stage.as_str(), over.ms)).collect();
    assert_eq!((stage.as_str(), stages.as_slice()), ("stop", [("checkpoint", 40)].as_slice()));
}

fn at(seconds: u64) -> Event {
    Event::WallClock(seconds)
}

fn scheduled(progress: RequestProgress, at_s: u64) -> RequestKey {
    let key = asked(progress, "c", "anna", 450);
    RequestKey { record: RequestRecord { ask: Ask::ScheduledSwitchover { to: name("c"), at_s }, ..key.record }, ..key }
}

#[test]
fn a_scheduled_switchover_waits_for_its_time_by_the_wall_clock_and_one_that_is_late_expires_with_an_event() {
    for (now_s, taken_up, expired) in [(999, false, false), (1_000, true, false), (1_060, true, false), (1_061, false, true)] {
        let mut checked = primary(&[("1", scheduled(RequestProgress::Created, 1_000))]);
        assert!(checked.machine.waits_for_a_time());
        assert!(answers(&checked.handle(T0, Event::Tick)).is_empty(), "the time is not known");
        let actions = checked.handle(T0, at(now_s));
        let answered = answers(&actions);
        assert_eq!(matches!(answered.as_slice(), [("1", RequestProgress::Claimed { .. })]), taken_up, "{now_s}: {answered:?}");
        assert_eq!(matches!(answered.as_slice(), [("1", RequestProgress::Refused { .. })]), expired, "{now_s}: {answered:?}");
        let said = actions.iter().any(|action| matches!(action, Action::Record(decision) if decision.kind == "schedule_expired"));
        assert_eq!(said, expired);
    }
}

/// Found by reading: it was judged at once on what had been asked before, or refused since nothing was known, once it was 6 s old.
#[test]
fn a_schedule_is_judged_on_what_is_under_way_when_its_time_comes_however_long_ago_it_was_written() {
    for asked_since in [false, true] {
        let mut world = leads_with(&[("1", scheduled(RequestProgress::Created, 1_000))]);
        let long_over = Survey { base_backups: vec!["a copy that has ended".to_owned()], ..Survey::default() };
        world.requests.survey = asked_since.then_some((T0 + s(1), long_over));
        let mut checked = Checked::resume(world, State::Primary);
        checked.handle(T0, at(900));
        for second in 1..=20 {
            checked.handle(T0 + s(second), renewed(T0 + s(second)));
        }
        let actions = checked.handle(T0 + s(20), at(1_000));
        assert!(actions.iter().any(|action| matches!(action, Action::Do(Operation::Survey))), "{actions:?}");
        assert!(answers(&actions).is_empty(), "{:?}", answers(&actions));
        let actions = checked.handle(T0 + s(20) + ms(50), Event::Finished(Finished::Surveyed(Ok(Survey::default()))));
        assert!(matches!(answers(&actions).as_slice(), [("1", RequestProgress::Claimed { .. })]), "{:?}", answers(&actions));
    }
}

#[test]
fn row_23_a_wall_clock_that_was_set_back_does_not_begin_a_switchover_a_second_time() {
    let mut world = leads_with(&[("1", scheduled(claimed("a"), 1_000))]);
    world.requests.claimed.insert("1".to_owned());
    world.requests.tried.insert("1".to_owned());
    let mut checked = Checked::resume(world, State::Primary);
    checked.handle(T0, at(1_100));
    checked.handle(T0 + ms(500), Event::Finished(Finished::RequestAnswered(Ok(true))));
    checked.handle(T0 + s(1), at(900));
    checked.handle(T0 + s(2), at(1_000));
    assert_eq!(checked.state(), &State::Primary);
}

#[test]
fn what_a_switchover_would_meet_is_said_and_nothing_is_touched() {
    let check = |to: Option<&str>| {
        let key = asked(RequestProgress::Created, "c", "anna", 450);
        RequestKey { record: RequestRecord { ask: Ask::CheckSwitchover { to: to.map(name) }, ..key.record }, ..key }
    };
    for (to, names) in [(None, vec!["c", "b"]), (Some("b"), vec!["b"]), (Some("x"), vec!["x"])] {
        let mut checked = primary(&[("1", check(to))]);
        let actions = checked.handle(T0, Event::Tick);
        let answered = answers(&actions);
        let [("1", RequestProgress::Judged { candidates, .. })] = answered.as_slice() else { panic!("{answered:?}") };
        assert_eq!(candidates.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(
            candidates.iter().map(|one| one.obstacles.is_empty()).collect::<Vec<_>>(),
            names.iter().map(|one| *one == "c").collect::<Vec<_>>()
        );
        assert_eq!((checked.state(), stops(&actions)), (&State::Primary, Vec::new()));
    }
}

#[test]
fn row_69_a_failover_by_hand_leads_with_the_loss_that_was_accepted_and_no_more_and_says_what_it_is() {
    const LOST: u64 = 64 << 20;
    let mut toy = Toy::working(&["a", "b", "c"]);
    let former = toy.leader().unwrap().to_owned();
    let mut others = ["a", "b", "c"].into_iter().filter(|member| *member != former);
    let (to, gone) = (others.next().unwrap(), others.next().unwrap());
    toy.power_off(&former);
    toy.power_off(gone);
    toy.until("the lock is gone", s(30), |toy| toy.leader().is_none());
    toy.etcd.by_hand(|keys| {
        let status = keys.status.as_mut().unwrap();
        status.lsn = Lsn(status.lsn.0 + LOST);
    });
    toy.run(s(8));
    assert_eq!(toy.leader(), None, "the rules hold it back");
    let answered = |toy: &Toy, id: &str| !toy.progress(id).is_open();
    for (id, accept_loss) in [("1", None), ("2", Some(LOST / 2))] {
        toy.ask(id, Ask::Failover { to: name(to), accept_loss });
        toy.until("an answer", s(6), |toy| answered(toy, id));
        let RequestProgress::Refused { reason } = toy.progress(id) else { panic!("{:?}", toy.progress(id)) };
        assert!(reason.contains("bytes behind the last leader's"), "{reason}");
        assert_eq!(toy.leader(), None);
    }
    toy.ask("3", Ask::Failover { to: name(to), accept_loss: Some(2 * LOST) });
    toy.until("it is under way, and its requester can see it", s(10), |toy| matches!(toy.progress("3"), RequestProgress::Claimed { .. }));
    toy.until("it leads", s(10), |toy| toy.primary() == Some(to));
    toy.until("an answer", s(6), |toy| answered(toy, "3"));
    assert!(matches!(toy.progress("3"), RequestProgress::Done { .. }), "{:?}", toy.progress("3"));
    let why = toy.etcd.keys.history.last().unwrap().why.clone();
    assert!(why.contains("accepting the loss of"), "{why}");
    toy.ask("4", Ask::Failover { to: name(gone), accept_loss: Some(u64::MAX) });
    toy.until("an answer", s(6), |toy| answered(toy, "4"));
    let RequestProgress::Refused { reason } = toy.progress("4") else { panic!("{:?}", toy.progress("4")) };
    assert!(reason.contains("leads, and nothing was lost for this"), "{reason}");
}

/// Found live: the watch was faster than the answer to the release.
#[test]
fn the_stages_are_told_also_when_the_view_shows_the_release_before_its_answer_comes() {
    let mut world = stops_since_t0(1_100).world().clone();
    world.guard = Some(guard(2, nothing_runs()));
    world.data = full(DatabaseState::ShutDown).data;
    world.requests.tried.insert("1".to_owned());
    let hand_over = HandOver::new(ours(), Some(name("c")), Some("1".to_owned()), T0);
    let hand_over = HandOver { stage: HandOverStage::Wait { since: T0 }, ..hand_over };
    let mut checked = Checked::resume(world, State::HandingOver { hand_over });
    checked.handle(T0 + ms(10), Event::Tick);
    checked.handle(T0 + ms(20), Event::Finished(Finished::RequestAnswered(Ok(true))));
    let mut view = view_with(&[("1", asked(claimed("a"), "c", "anna", 450))]);
    view.leader = Some(leader("c", 9, 490));
    view.members.insert(name("c"), key(record(MemberRole::Primary, 3, 1_200), 9));
    let actions = checked.handle(T0 + ms(300), Event::View(Arc::new(view), T0 + ms(300)));
    let answered = answers(&actions);
    let [("1", RequestProgress::Done { stages, .. })] = answered.as_slice() else { panic!("{answered:?}") };
    let stages: Vec<_> = stages.iter().map(|over| (over.stage.as_str(), over.ms)).collect();
    assert_eq!(stages, [("successor", 10), ("release", 290), ("promotion", 0)]);
}
