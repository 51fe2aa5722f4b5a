//! A standby that receives nothing, and one that is to stream from another: `a` of three, while `b` leads.

use std::sync::Arc;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, MemberRole};
use crate::facts::postgres::SqlFacts;
use crate::machine::action::{Action, Operation, StopMode};
use crate::machine::event::{Configured, Event, Finished};
use crate::machine::state::State;
use crate::machine::world::World;
use crate::spec::cluster::ClusterSpec;
use crate::types::{Lsn, TimelineId};

use super::checked::Checked;
use super::cluster::s;
use super::fixtures::*;
use super::reactions::worlds::{led_by_b, standby};

/// A standby at work, watched second by second.
struct Watched {
    checked: Checked,
    second: u64,
    view: ClusterView,
    /// What the leader's server answers a connection from here.
    reached: Result<(), String>,
    /// What was done, and in which second.
    done: Vec<(u64, String)>,
}

impl Watched {
    fn new(spec: Arc<ClusterSpec>) -> Watched {
        let world = World { spec: Some((1, spec)), ..standby() };
        Watched { checked: Checked::resume(world, State::Following), second: 0, view: led_by_b(), reached: Ok(()), done: Vec::new() }
    }

    fn now(&self) -> BootTime {
        T0 + s(self.second)
    }

    /// So many seconds go by, in which the server shows this.
    fn shows(&mut self, seconds: u64, facts: &SqlFacts) -> &mut Self {
        for _ in 0..seconds {
            let now = self.now();
            self.happens(Event::View(Arc::new(self.view.clone()), now));
            self.happens(Event::Probed(probe(now, facts.clone())));
            self.second += 1;
        }
        self
    }

    fn happens(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let actions = self.checked.handle(self.now(), event);
            events.extend(actions.iter().filter_map(|action| self.carry_out(action)));
        }
    }

    fn carry_out(&mut self, action: &Action) -> Option<Event> {
        let (what, finished) = match action {
            Action::Do(Operation::Configure { generation, upstream, .. }) => {
                let from = upstream.as_ref().map_or("nobody".to_owned(), |upstream| upstream.member.to_string());
                let (generation, upstream) = (*generation, upstream.clone());
                (format!("follows {from}"), Finished::Configured { generation, upstream, result: Ok(Configured::Taken) })
            }
            Action::Do(Operation::ReachLeader(leader)) => {
                (format!("asks {}", leader.member), Finished::LeaderReached(self.reached.clone()))
            }
            Action::Stop(StopMode::Fast { .. }) => {
                self.done.push((self.second, "stops".to_owned()));
                return None;
            }
            _ => return None,
        };
        self.done.push((self.second, what));
        Some(Event::Finished(finished))
    }

    fn has_condition(&self, kind: &str) -> bool {
        self.checked.world().conditions.contains_key(kind)
    }
}

fn at(second: u64, what: &str) -> (u64, String) {
    (second, what.to_owned())
}

fn without_receiver() -> SqlFacts {
    SqlFacts { walreceiver: None, ..sql(true, 2, 1_000) }
}

fn three() -> Arc<ClusterSpec> {
    spec(&["a", "b", "c"])
}

#[test]
fn row_10_the_walreceiver_is_started_again_and_then_postgresql_once_the_leader_has_answered_a_connection() {
    let mut watched = Watched::new(three());
    watched.shows(21, &without_receiver());
    assert_eq!(watched.done, [at(10, "follows nobody"), at(10, "follows b"), at(20, "asks b"), at(20, "stops")]);
    assert_eq!(watched.checked.state().name(), "rejoining");
    assert!(watched.has_condition("receives_nothing"));
}

#[test]
fn row_10_postgresql_is_left_alone_while_the_leader_cannot_be_reached_from_here() {
    let mut watched = Watched::new(three());
    watched.reached = Err("connection refused".to_owned());
    watched.shows(100, &without_receiver());
    assert!(watched.done.iter().all(|(_, what)| what != "stops"), "{:?}", watched.done);
    assert!(watched.has_condition("leader_unreachable"));
    watched.reached = Ok(());
    watched.shows(20, &without_receiver());
    assert_eq!(watched.done.last().map(|(_, what)| what.as_str()), Some("stops"));
}

/// It is sent what it has, again and again, up to where its leader left the timeline, and streams for as long as that takes.
#[test]
fn one_with_wal_that_its_leader_never_had_is_stopped_and_judged_although_it_streams_now_and_then() {
    let mut watched = Watched::new(three());
    watched.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(3));
    watched.view.history.push(recorded(3, "b", 8, watched.view.leader.as_ref().unwrap().epoch.0, 2, 900));
    for _ in 0..3 {
        watched.shows(1, &without_receiver()).shows(1, &sql(true, 2, 1_000));
    }
    assert_eq!(watched.done.first(), Some(&at(2, "stops")), "{:?}", watched.done);
    assert_eq!(watched.checked.state().name(), "rejoining");

    let mut watched = Watched::new(three());
    watched.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(3));
    watched.view.history.push(recorded(3, "b", 8, watched.view.leader.as_ref().unwrap().epoch.0, 2, 1_000));
    watched.shows(5, &sql(true, 2, 1_000));
    assert_eq!(watched.done, [], "it has nothing that the leader never had");
}

#[test]
fn one_whose_way_to_the_leaders_timeline_is_not_in_history_is_judged_only_when_it_does_not_stream() {
    for (facts, stopped) in [(sql(true, 2, 1_000), false), (without_receiver(), true)] {
        let mut watched = Watched::new(three());
        let epoch = watched.view.leader.as_ref().unwrap().epoch.0;
        watched.view.members.get_mut(&name("b")).unwrap().record.timeline = Some(TimelineId(4));
        watched.view.history.push(recorded(4, "b", 8, epoch, 3, 2_000));
        watched.shows(5, &facts);
        assert_eq!(watched.done.iter().any(|(_, what)| what == "stops"), stopped, "{:?}", watched.done);
    }
}

#[test]
fn row_10_one_that_streams_and_gets_nothing_is_stuck_when_the_leader_has_written_more() {
    let mut watched = Watched::new(three());
    watched.shows(60, &sql(true, 2, 1_000));
    assert_eq!(watched.done, [], "it has all there is");
    let b_is_at = |watched: &mut Watched, lsn| watched.view.members.get_mut(&name("b")).unwrap().record.receive_lsn = Some(Lsn(lsn));
    b_is_at(&mut watched, 2_000);
    watched.shows(100, &sql(true, 2, 1_000));
    assert_eq!(watched.done, [], "not everything that is written is flushed and sent at once");
    watched.shows(1, &sql(true, 2, 2_000));
    b_is_at(&mut watched, 3_000);
    watched.shows(1, &sql(true, 2, 2_000));
    b_is_at(&mut watched, 4_000);
    watched.shows(16, &sql(true, 2, 2_000));
    assert_eq!(watched.done, [at(176, "follows nobody"), at(176, "follows b")]);
    watched.shows(2, &sql(true, 2, 4_000));
    assert!(!watched.has_condition("receives_nothing"), "it moves again");
}

#[test]
fn without_a_leader_that_writes_nothing_is_done_to_a_standby() {
    let mut watched = Watched::new(three());
    watched.view.members.get_mut(&name("b")).unwrap().record.role = MemberRole::Replica;
    watched.shows(100, &without_receiver());
    assert_eq!(watched.done, []);
}

fn with_upstream_c() -> Arc<ClusterSpec> {
    spec(&["a, tags: { replicatefrom: c }", "b", "c"])
}

fn c_is(watched: &mut Watched, state: &str) {
    let mut record = record(MemberRole::Replica, 2, 1_000);
    record.state = state.to_owned();
    watched.view.members.insert(name("c"), key(record, 9));
}

#[test]
fn row_56_a_member_streams_from_its_upstream_falls_back_to_the_leader_and_returns() {
    let mut watched = Watched::new(with_upstream_c());
    c_is(&mut watched, "streaming");
    watched.shows(20, &sql(true, 2, 1_000));
    assert_eq!(watched.done, [at(10, "follows c")], "it followed the leader before");
    c_is(&mut watched, "running");
    watched.shows(10, &sql(true, 2, 1_000));
    assert_eq!(watched.done.last(), Some(&at(25, "follows b")));
    assert!(watched.has_condition("upstream_away"));
    c_is(&mut watched, "streaming");
    watched.shows(20, &sql(true, 2, 1_000));
    assert_eq!(watched.done.last(), Some(&at(40, "follows c")));
    assert!(!watched.has_condition("upstream_away"));
}

#[test]
fn row_56_an_upstream_that_gives_nothing_is_left_for_the_leader_before_anything_is_started_again() {
    let mut watched = Watched::new(with_upstream_c());
    c_is(&mut watched, "streaming");
    watched.shows(12, &sql(true, 2, 1_000));
    watched.shows(8, &without_receiver());
    assert_eq!(watched.done, [at(10, "follows c"), at(17, "follows b")]);
}

#[test]
fn a_member_with_nostream_follows_nobody_and_nothing_is_done_about_it() {
    let archive = "postgres: { restore_command: cp /archive/%f %p }";
    let mut watched = Watched::new(spec_with(&["a, tags: { nostream: true }", "b", "c"], archive));
    watched.shows(100, &without_receiver());
    assert_eq!(watched.done, [at(0, "follows nobody")]);
}
