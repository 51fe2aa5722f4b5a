//! A standby that ends by itself again and again: it is not started without a pause, without a word, and for ever.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::guard::{LastEnd, PostmasterFacts, StartId, Word};
use crate::facts::postgres::{DataDirectory, DatabaseState, SqlFacts};
use crate::machine::action::{Action, Operation, OperationKind};
use crate::machine::event::{Event, Finished};
use crate::machine::state::State;
use crate::policy::rejoin::{Rejoin, STARTS_IN_VAIN, unless_it_does_not_start};

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::found::operations;
use super::reactions::worlds::{busy, full, led_by_b};

/// It sees this, looks at its files, which are of timeline 1, and has them judged against the leader on timeline 2. What it orders.
fn look_and_judge(checked: &mut Checked, now: BootTime, event: Event, plan: impl Fn(u32) -> Rejoin) -> Vec<Action> {
    let looked = || DataDirectory::Full(control(DatabaseState::InArchiveRecovery, 1, 400));
    let mut ordered = Vec::new();
    let mut actions = checked.handle(now, event);
    for _ in 0..8 {
        let asked = actions.iter().find_map(|action| match action {
            Action::Do(Operation::Look) => Some(Finished::Looked(looked())),
            Action::Do(Operation::PlanRejoin { starts_in_vain, .. }) => Some(Finished::RejoinPlanned(Ok(plan(*starts_in_vain)))),
            _ => None,
        });
        ordered.extend(actions);
        actions = checked.handle(now, asked.map_or(Event::Tick, Event::Finished));
    }
    ordered
}

/// Started, it takes connections and ends by itself some moments later: that is the event.
fn runs_and_ends(checked: &mut Checked, now: BootTime, start: u64, lived: Duration) -> Event {
    checked.handle(now, Event::Finished(Finished::Started(Ok(StartId(start)))));
    checked.handle(now, Event::Guard(guard(2 * start, running(start, Word::Standby))));
    let waits = SqlFacts { walreceiver: None, replayed_all: false, ..sql(true, 1, 400) };
    checked.handle(now + lived, Event::Probed(probe(now + lived, waits)));
    let last = LastEnd { start: StartId(start), exit_status: Some(1), signal: None, rung: None, at: now + lived };
    Event::Guard(guard(2 * start + 1, PostmasterFacts::ProvedEmpty { last: Some(last) }))
}

/// The first time that it ends.
fn first_end() -> (Checked, Event) {
    let mut checked = Checked::resume(busy(full(DatabaseState::InArchiveRecovery), OperationKind::Start), State::Following);
    let ended = runs_and_ends(&mut checked, T0, 1, ms(0));
    (checked, ended)
}

fn is_started(actions: &[Action]) -> bool {
    operations(actions).contains(&OperationKind::Start)
}

/// It had taken connections each time, so that no start had failed: it was started again at once, and nothing said so.
#[test]
fn a_standby_that_opens_and_ends_by_itself_is_paused_longer_each_time_and_named() {
    let (mut checked, mut ended) = first_end();
    let mut pauses = Vec::new();
    let mut now = T0;
    for ends in 1..8 {
        let since = now;
        let mut actions = look_and_judge(&mut checked, now, ended, |_| Rejoin::Follow);
        let named = checked.world().conditions.contains_key("standby_ends");
        assert_eq!(named, ends >= u64::from(STARTS_IN_VAIN), "after {ends} ends");
        while !is_started(&actions) {
            now = now + ms(50);
            assert!(now.since(since) < Duration::from_secs(20), "it is not started any more");
            actions = look_and_judge(&mut checked, now, Event::Tick, |_| Rejoin::Follow);
        }
        pauses.push(now.since(since));
        ended = runs_and_ends(&mut checked, now, ends + 1, ms(300));
        now = now + ms(300);
    }
    assert!(pauses.is_sorted() && pauses[1] > ms(200) && pauses[5] > s(3), "{pauses:?}");

    // One that is well for a while is another story.
    let mut actions = look_and_judge(&mut checked, now, ended, |_| Rejoin::Follow);
    while !is_started(&actions) {
        now = now + ms(500);
        actions = look_and_judge(&mut checked, now, Event::Tick, |_| Rejoin::Follow);
    }
    checked.handle(now, Event::Finished(Finished::Started(Ok(StartId(9)))));
    checked.handle(now, Event::Guard(guard(30, running(9, Word::Standby))));
    for (after, named) in [(s(1), true), (s(61), false)] {
        checked.handle(now + after, Event::Probed(probe(now + after, sql(true, 2, 1_000))));
        assert_eq!(checked.world().conditions.contains_key("standby_ends"), named, "{after:?} after it began to stream");
    }
}

#[test]
fn one_that_cannot_be_completed_is_copied_after_some_starts_and_not_started_for_ever() {
    let half = half_segment(Some("it is no better in the older one"));
    let plan = |in_vain| unless_it_does_not_start(Rejoin::Follow, in_vain, Some(&half));
    let (mut checked, mut ended) = first_end();
    let mut now = T0;
    for ends in 1..20 {
        let mut actions = look_and_judge(&mut checked, now, ended, plan);
        now = now + s(15);
        actions.extend(look_and_judge(&mut checked, now, Event::View(Arc::new(led_by_b()), now), plan));
        if operations(&actions).contains(&OperationKind::Clone) {
            assert_eq!(ends, u64::from(STARTS_IN_VAIN));
            return;
        }
        assert!(is_started(&actions), "{actions:?}");
        ended = runs_and_ends(&mut checked, now, ends + 1, ms(300));
    }
    panic!("it is started for ever");
}

#[test]
fn what_was_completed_is_an_event_and_what_could_not_be_is_a_condition_until_it_is_whole() {
    let mut checked = Checked::resume(full(DatabaseState::InArchiveRecovery), State::Following);
    let told = |actions: Vec<Action>| {
        let told = |action| if let Action::Record(decision) = action { Some(decision) } else { None };
        actions.into_iter().filter_map(told).filter(|decision| decision.kind == "wal_completed").collect::<Vec<_>>()
    };
    let found = |halves| Event::Finished(Finished::SegmentsCompleted(halves));
    let [decision] = &told(checked.handle(T0, found(vec![half_segment(None)])))[..] else { panic!("told once") };
    assert!(decision.message.contains("0/3002000") && decision.message.contains("filled up from 000000010000000000000003"), "{decision:?}");
    assert!(told(checked.handle(T0, Event::Tick)).is_empty());
    assert!(told(checked.handle(T0, found(vec![half_segment(Some("no better"))]))).is_empty());
    assert!(checked.world().conditions["wal_incomplete"].message.contains("no better"));
    checked.handle(T0, found(Vec::new()));
    assert!(!checked.world().conditions.contains_key("wal_incomplete"));
}
