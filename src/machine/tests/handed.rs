//! A member that is handed the lock in good order: what is got ready before writes stand still, and what is not taken for granted.

use std::sync::Arc;

use super::checked::Checked;
use super::fixtures::{self, *};
use super::reactions::worlds::{full, leads, led_by_b, standby, vacant};
use crate::facts::cluster::{ClusterView, MemberRole, ReleaseRecord};
use crate::facts::guard::StartId;
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::{DatabaseState, SqlFacts};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::facts::synchrony::{Acks, Names, SyncRecord};
use crate::machine::action::{Action, Operation, StartAs};
use crate::machine::event::{AcquireOutcome, Event, Finished, PutOutcome};
use crate::machine::requests::HandedOver;
use crate::machine::state::State;
use crate::machine::synchrony::OfServer;
use crate::machine::world::World;
use crate::policy::synchrony::InForce;
use crate::policy::synchrony::goal::Standbys;
use crate::types::{Epoch, Lsn, MemberName, Revision, TimelineId};

/// What commits wait for when `a` leads by the record of [`recorded`].
fn any_of_the_others() -> Names {
    Names::Any(Acks { members: [name("b"), name("c")].into(), acks: 1 })
}

/// `sync` counts on all three.
fn recorded(view: ClusterView) -> ClusterView {
    let members = ["a", "b", "c"].map(name).into();
    let record = SyncRecord { leader: name("b"), epoch: Epoch(350), members, copies: 2 };
    ClusterView { sync: Some(record), sync_revision: Revision(360), ..view }
}

/// `b` hands over to this member.
fn hands_over_to(to: &str) -> ClusterView {
    let mut view = recorded(led_by_b());
    view.members.get_mut(&name("b")).unwrap().record.machine_state = "handing_over".to_owned();
    let progress = RequestProgress::Claimed { by: name("b"), stage: "checkpoint".to_owned(), stages: Vec::new() };
    let record = RequestRecord { ask: Ask::Switchover { to: name(to) }, by: "anna".to_owned(), at: String::new(), progress };
    view.requests.insert("1".to_owned(), RequestKey { record, mod_revision: Revision(390) });
    view
}

/// `b` has given the lock up at this position, to whom is said.
fn released(lsn: u64, to: &str) -> ClusterView {
    let release = ReleaseRecord { epoch: Epoch(350), timeline: TimelineId(2), lsn: Lsn(lsn), to: Some(name(to)), all_seen: true };
    ClusterView { release: Some(release), revision: Revision(410), ..recorded(vacant()) }
}

/// `a` streams from `b`, and acknowledges nothing if it is promoted as it is.
fn streams() -> World {
    let shown = SqlFacts { synchronous_standby_names: Names::Block.to_string(), ..sql(true, 2, 1_000) };
    let mut world = World { view: Some(Arc::new(recorded(led_by_b()))), probe: Some(probe(T0, shown)), ..standby() };
    world.spec = Some((1, spec_with(&["a", "b", "c"], "replication: { mode: quorum, use_slots: false }")));
    world.replayed_by = Some(String::new());
    world.synchrony.server = Some(OfServer::new(StartId(1), InForce::since_start(Names::Block), T0));
    world
}

fn names_set(actions: &[Action]) -> Vec<Names> {
    let of = |action: &Action| if let Action::Do(Operation::SetNames { names, .. }) = action { Some(names.clone()) } else { None };
    actions.iter().filter_map(of).collect()
}

fn sees(checked: &mut Checked, view: ClusterView) -> Vec<Action> {
    checked.handle(T0 + ms(1), Event::View(Arc::new(view), T0 + ms(1)))
}

fn is_done(actions: &[Action], what: fn(&Operation) -> bool) -> bool {
    actions.iter().any(|action| matches!(action, Action::Do(operation) if what(operation)))
}

/// `b` hands over to it, and it has set its names.
fn has_its_names() -> Checked {
    let mut checked = Checked::resume(streams(), State::Following);
    sees(&mut checked, hands_over_to("a"));
    checked.handle(T0 + ms(1), Event::Finished(Finished::NamesSet(Ok(()))));
    checked
}

/// The lock is released like this, and it takes it. What it does then.
fn takes_the_lock(checked: &mut Checked, released: ClusterView) -> Vec<Action> {
    checked.handle(T0 + ms(1), Event::Finished(Finished::MemberPut(PutOutcome::Written)));
    let runs = sees(checked, released);
    assert!(is_done(&runs, |operation| matches!(operation, Operation::Acquire { .. })), "{runs:?}");
    assert!(!runs.iter().any(|action| matches!(action, Action::Do(Operation::PutMember(_)))), "what it says of itself has time");
    checked.handle(T0 + ms(2), Event::Finished(Finished::Acquired(AcquireOutcome::Won(lock(7, 420)))))
}

fn is_proved(checked: &mut Checked) -> Vec<Action> {
    let sent = T0 + ms(3);
    checked.handle(T0 + ms(4), Event::Lease(LeaseEvent::Proved { lock: lock(7, 420), sent, until: sent + times().validity() }))
}

#[test]
fn the_member_that_is_named_has_its_names_before_the_leader_stops_and_another_keeps_its_own() {
    let mut named = Checked::resume(streams(), State::Following);
    assert_eq!(names_set(&sees(&mut named, hands_over_to("a"))), [any_of_the_others()]);
    let mut other = Checked::resume(streams(), State::Following);
    assert_eq!(names_set(&sees(&mut other, hands_over_to("c"))), []);
}

#[test]
fn the_names_are_taken_back_when_the_leader_goes_on() {
    let mut checked = has_its_names();
    assert_eq!(names_set(&sees(&mut checked, recorded(led_by_b()))), [Names::Block]);
}

#[test]
fn i3_the_record_is_taken_over_while_the_proof_is_waited_for_and_the_promotion_waits_for_both() {
    let mut checked = has_its_names();
    let won = takes_the_lock(&mut checked, released(900, "a"));
    assert!(is_done(&won, |operation| matches!(operation, Operation::WriteSync { .. })), "{won:?}");
    assert_eq!(names_set(&won), [], "it has them");
    let proved = is_proved(&mut checked);
    assert!(!is_done(&proved, |operation| matches!(operation, Operation::Promote { .. })), "the record is not its own yet: {proved:?}");
    let written = checked.handle(T0 + ms(5), Event::Finished(Finished::SyncWritten(Ok((true, Revision(421))))));
    assert!(is_done(&written, |operation| matches!(operation, Operation::Promote { .. })), "{written:?}");
}

#[test]
fn i5_a_member_that_others_may_be_ahead_of_acknowledges_nothing_when_it_is_promoted() {
    let mut checked = has_its_names();
    // It ends just before the shutdown checkpoint: another may have that, and its walsender would count it for what comes in its place.
    let won = takes_the_lock(&mut checked, released(1_000, "a"));
    assert_eq!(names_set(&won), [Names::Block]);
    checked.handle(T0 + ms(3), Event::Finished(Finished::SyncWritten(Ok((true, Revision(421))))));
    let proved = is_proved(&mut checked);
    assert!(!is_done(&proved, |operation| matches!(operation, Operation::Promote { .. })), "{proved:?}");
    let set = checked.handle(T0 + ms(5), Event::Finished(Finished::NamesSet(Ok(()))));
    assert!(is_done(&set, |operation| matches!(operation, Operation::Promote { .. })), "{set:?}");
}

#[test]
fn i6_a_member_that_is_handed_the_lock_by_a_leader_that_had_not_seen_all_whom_sync_names_acknowledges_nothing_when_it_is_promoted() {
    let mut checked = has_its_names();
    let mut view = released(900, "a");
    view.release.as_mut().unwrap().all_seen = false;
    assert_eq!(names_set(&takes_the_lock(&mut checked, view)), [Names::Block]);
}

#[test]
fn a_leader_says_when_it_hands_over_whether_it_has_seen_all_whom_sync_names() {
    let all_seen = |followed: &[&str]| {
        let mut world = leads();
        let members = ["a", "b", "c"].map(name).into();
        let mut view = ClusterView::clone(world.view.as_deref().unwrap());
        let epoch = view.leader.as_ref().unwrap().epoch;
        view.sync = Some(SyncRecord { leader: name("a"), epoch, members, copies: 2 });
        view.sync_revision = Revision(360);
        world.view = Some(Arc::new(view));
        world.sure_of = Some(epoch);
        let mut standbys = Standbys::named(["b", "c"].map(name).into_iter(), Some(&Names::Block), T0);
        let replicas: Vec<_> = followed.iter().map(|member| streaming(member, 1_000)).collect();
        standbys.seen(T0, world.spec().unwrap(), &replicas, Lsn(1_000));
        world.synchrony.standbys = Some((epoch, standbys));
        world.all_are_seen(epoch)
    };
    assert!(!all_seen(&["b"]) && all_seen(&["b", "c"]));
}

#[test]
fn a_former_leader_is_started_once_it_is_known_whom_it_follows_and_is_not_kept_down_for_that() {
    let gave_it_to =
        |to: &str| World { view: Some(Arc::new(released(900, to))), released: Some(Epoch(350)), ..full(DatabaseState::ShutDown) };
    let starts = |actions: &[Action]| -> Option<Option<MemberName>> {
        actions.iter().find_map(|action| match action {
            Action::Do(Operation::Start { role: StartAs::Standby(upstream), .. }) => {
                Some(upstream.as_ref().map(|upstream| upstream.member.clone()))
            }
            _ => None,
        })
    };
    let mut checked = Checked::resume(gave_it_to("c"), State::Following);
    assert_eq!(starts(&sees(&mut checked, released(900, "c"))), None);
    let mut taken = recorded(led_by_b());
    taken.leader = Some(leader("c", 9, 430));
    taken.revision = Revision(430);
    assert_eq!(starts(&sees(&mut checked, taken)), Some(Some(name("c"))));

    let mut alone = Checked::resume(gave_it_to("c"), State::Following);
    assert_eq!(starts(&sees(&mut alone, released(900, "c"))), None);
    let late = T0 + ms(1_100);
    let in_vain = alone.handle(late, Event::View(Arc::new(released(900, "c")), late));
    assert_eq!(starts(&in_vain), Some(None), "it can be asked for its position");
}

/// `a` gave its lock to `c` at T0, which has taken it and is being promoted.
fn gave_its_lock_to_c() -> (World, ClusterView) {
    let mut view = recorded(vacant());
    view.leader = Some(leader("c", 9, 430));
    view.revision = Revision(430);
    let mut world = World { view: Some(Arc::new(view.clone())), released: Some(Epoch(420)), ..full(DatabaseState::ShutDown) };
    world.requests.handed_over = Some(HandedOver { request: None, stages: Vec::new(), given_up: None, at: T0 });
    (world, view)
}

/// It takes writes, on a timeline that left ours there.
fn writes(view: &ClusterView, switch: u64) -> ClusterView {
    let mut view = view.clone();
    view.members.insert(name("c"), key(record(MemberRole::Primary, 3, switch + 100), 9));
    view.history.push(fixtures::recorded(3, "c", 9, 430, 2, switch));
    view.revision = Revision(440);
    view
}

fn starts(actions: &[Action]) -> bool {
    is_done(actions, |operation| matches!(operation, Operation::Start { role: StartAs::Standby(_), .. }))
}

#[test]
fn a_former_leader_is_started_behind_the_promotion_of_its_successor_and_nothing_is_judged_when_its_wal_ends_before_the_switch() {
    let (world, view) = gave_its_lock_to_c();
    let mut checked = Checked::resume(world, State::Following);
    assert!(!starts(&sees(&mut checked, view.clone())), "clients wait for the promotion");
    let mut promoted = writes(&view, 1_100);
    promoted.history.pop();
    assert!(!starts(&sees(&mut checked, promoted)), "history does not say yet where the timeline begins");
    assert!(starts(&sees(&mut checked, writes(&view, 1_100))));
    assert_eq!(checked.state().name(), "following");
}

#[test]
fn a_former_leader_is_judged_when_the_switch_is_not_behind_its_shutdown_checkpoint_or_it_was_not_shut_down() {
    // Its checkpoint is at 1,000.
    for (state, switch) in [(DatabaseState::ShutDown, 1_000), (DatabaseState::InProduction, 1_100)] {
        let (world, view) = gave_its_lock_to_c();
        let mut checked = Checked::resume(World { data: full(state).data, ..world }, State::Following);
        assert!(!starts(&sees(&mut checked, writes(&view, switch))), "{state:?}");
        assert_eq!(checked.state().name(), "rejoining", "{state:?}");
    }
}

#[test]
fn a_former_leader_that_commits_wait_for_or_whose_successor_does_not_get_on_is_started_at_once() {
    let (world, view) = gave_its_lock_to_c();
    let mut needed = view.clone();
    needed.members.remove(&name("b"));
    assert!(starts(&sees(&mut Checked::resume(world.clone(), State::Following), needed)));
    let mut checked = Checked::resume(world, State::Following);
    let late = T0 + ms(1_100);
    assert!(starts(&checked.handle(late, Event::View(Arc::new(view), late))));
}

#[test]
fn with_strict_a_member_is_not_promoted_with_names_that_ask_for_less_than_the_spec() {
    for (count, expected) in [(1, vec![any_of_the_others()]), (2, vec![])] {
        let mut world = streams();
        let replication = format!("replication: {{ mode: quorum, strict: true, synchronous_node_count: {count} }}");
        world.spec = Some((1, spec_with(&["a", "b", "c"], &replication)));
        assert_eq!(names_set(&sees(&mut Checked::resume(world, State::Following), hands_over_to("a"))), expected, "{count}");
    }
}

#[test]
fn names_that_cannot_be_set_hold_no_promotion_up_that_acknowledges_nothing_without_them() {
    let mut checked = Checked::resume(streams(), State::Following);
    sees(&mut checked, recorded(led_by_b()));
    let won = takes_the_lock(&mut checked, released(900, "a"));
    assert_eq!(names_set(&won), [any_of_the_others()], "it did not see that it was handed over to");
    checked.handle(T0 + ms(3), Event::Finished(Finished::SyncWritten(Ok((true, Revision(421))))));
    let proved = is_proved(&mut checked);
    assert!(!is_done(&proved, |operation| matches!(operation, Operation::Promote { .. })), "they may be set in a moment: {proved:?}");
    let failed = checked.handle(T0 + ms(5), Event::Finished(Finished::NamesSet(Err("no answer".to_owned()))));
    assert!(is_done(&failed, |operation| matches!(operation, Operation::Promote { .. })), "{failed:?}");
}
