//! What stands in the way, one thing at a time: `a` leads, `c` streams, and all that a test does not say is well.

use std::sync::Arc;

use super::*;
use crate::facts::cluster::{Condition, MemberRole};
use crate::facts::postgres::{Archiver, OpenTransaction, ReplicaFacts};
use crate::facts::synchrony::SyncRecord;
use crate::machine::tests::fixtures::{key, name, record, spec, sql, view};
use crate::types::{Epoch, Lsn};

const LSN: u64 = 0x0300_0000;

struct Sight {
    spec: Arc<ClusterSpec>,
    view: ClusterView,
    sql: SqlFacts,
    survey: Option<Survey>,
}

fn replica(member: &str, state: &str, flushed: Option<u64>) -> ReplicaFacts {
    ReplicaFacts {
        application_name: member.to_owned(),
        state: state.to_owned(),
        client_addr: None,
        sent_lsn: None,
        flush_lsn: flushed.map(Lsn),
        replay_lsn: None,
        sync_state: "async".to_owned(),
        sync_priority: 0,
    }
}

impl Sight {
    fn new() -> Self {
        let mut view = view(60);
        for member in ["a", "b", "c"] {
            let mut record = record(MemberRole::Replica, 1, LSN);
            record.state = "streaming".to_owned();
            view.members.insert(name(member), key(record, 7));
        }
        let replicas = ["b", "c"].map(|member| replica(member, "streaming", Some(LSN))).into();
        let sql = SqlFacts { replicas, ..sql(false, 1, LSN) };
        Sight { spec: spec(&["a", "b", "c"]), view, sql, survey: Some(Survey::default()) }
    }

    fn with(mut self, change: impl FnOnce(&mut Sight)) -> Self {
        change(&mut self);
        self
    }

    fn condition(self, member: &str, kind: &str, severity: Severity) -> Self {
        let condition = Condition { kind: kind.to_owned(), severity, message: format!("{kind} is said") };
        self.with(|sight| sight.view.members.get_mut(&name(member)).unwrap().record.conditions.push(condition))
    }

    fn inputs<T>(&self, ask: impl FnOnce(&Inputs<'_>) -> T) -> T {
        let me = name("a");
        ask(&Inputs { me: &me, spec: &self.spec, view: &self.view, sql: &self.sql, survey: self.survey.as_ref() })
    }

    fn in_the_way_of(&self, to: &str) -> Vec<Obstacle> {
        self.inputs(|inputs| obstacles(inputs, &name(to)))
    }

    #[track_caller]
    fn refused(&self, to: &str, because: &str) {
        let found = self.in_the_way_of(to);
        assert!(matches!(found.as_slice(), [Obstacle::Lasting(why)] if why.contains(because)), "{found:?}");
    }
}

#[test]
fn nothing_is_in_the_way_of_a_standby_that_streams() {
    assert_eq!(Sight::new().in_the_way_of("c"), []);
    assert_eq!(Sight::new().inputs(costs), Vec::<String>::new());
}

#[test]
fn row_69_whoever_leads_is_not_declared_never_leads_is_not_there_or_is_behind_is_refused_with_the_reason() {
    Sight::new().refused("a", "leads already");
    Sight::new().refused("x", "not in spec.members");
    Sight::new().with(|sight| sight.spec = spec(&["a", "b", "c, failover_priority: 0"])).refused("c", "never leads");
    Sight::new().with(|sight| drop(sight.view.members.remove(&name("c")))).refused("c", "no member key");
    let lag = |sight: &mut Sight| sight.sql.replicas[1].flush_lsn = Some(Lsn(LSN - (32 << 20)));
    Sight::new().with(lag).refused("c", "bytes behind, more than maximum_lag_on_failover");
    let other = |sight: &mut Sight| sight.view.members.get_mut(&name("c")).unwrap().record.state = "starting".to_owned();
    Sight::new().with(|sight| sight.sql.replicas.truncate(1)).with(other).refused("c", "does not stream");
}

/// It has all WAL and would take writes only when it has replayed it: an outage for as long as that takes.
#[test]
fn row_51_a_target_that_is_far_behind_in_replay_is_refused_unless_it_catches_up_in_a_moment() {
    let replayed = |behind: u64| {
        Sight::new().with(|sight| sight.sql.replicas[1].replay_lsn = Some(Lsn(2 * REPLAY_BEHIND_MAX_BYTES - behind))).with(|sight| {
            sight.sql.replicas.iter_mut().for_each(|replica| replica.flush_lsn = Some(Lsn(2 * REPLAY_BEHIND_MAX_BYTES)));
            sight.sql.receive_lsn = Lsn(2 * REPLAY_BEHIND_MAX_BYTES);
        })
    };
    assert_eq!(replayed(REPLAY_BEHIND_MAX_BYTES).in_the_way_of("c"), []);
    let found = replayed(REPLAY_BEHIND_MAX_BYTES + 1).in_the_way_of("c");
    assert!(matches!(found.as_slice(), [Obstacle::Passing(why)] if why.contains("has not replayed")), "{found:?}");
}

#[test]
fn what_the_leader_has_not_seen_yet_may_pass() {
    for sight in [Sight::new().with(|sight| sight.sql.replicas.truncate(1)), Sight::new().with(|sight| sight.survey = None)] {
        assert!(matches!(sight.in_the_way_of("c").as_slice(), [Obstacle::Passing(_)]), "{:?}", sight.in_the_way_of("c"));
    }
}

#[test]
fn row_50_a_target_whose_replay_is_paused_or_that_cannot_do_its_work_is_refused() {
    Sight::new().condition("c", REPLAY_PAUSED, Severity::Warning).refused("c", "replay_paused is said");
    Sight::new().condition("c", "rejoin_refused", Severity::Error).refused("c", "rejoin_refused is said");
    assert_eq!(Sight::new().condition("c", "name_taken", Severity::Warning).in_the_way_of("c"), [], "it is only said");
    assert_eq!(Sight::new().condition("b", REPLAY_PAUSED, Severity::Warning).in_the_way_of("c"), [], "another's");
}

#[test]
fn a_base_backup_from_the_leader_is_not_broken_off() {
    let backup = |sight: &mut Sight| sight.survey.as_mut().unwrap().base_backups.push("pg_basebackup from 10.0.0.9, pid 77".to_owned());
    Sight::new().with(backup).refused("c", "would be broken off: pg_basebackup from 10.0.0.9, pid 77");
}

#[test]
fn row_59_long_transactions_and_an_archiver_that_is_behind_are_said_and_do_not_stand_in_the_way() {
    let busy = Sight::new().with(|sight| {
        let open = OpenTransaction { pid: 42, application_name: String::new(), state: "idle in transaction".to_owned(), seconds: 90 };
        sight.survey =
            Some(Survey { transactions: vec![open], archiver: Some(Archiver { failing: false, ready: 9 }), ..Survey::default() });
    });
    assert_eq!(busy.in_the_way_of("c"), []);
    let said = busy.inputs(costs);
    assert!(said[0].contains("a client (pid 42), open for 90 s and idle in transaction, would be rolled back"), "{said:?}");
    assert!(said[1].contains("9 WAL segments are not archived yet (it is behind)"), "{said:?}");
    for (archiver, words) in
        [(Archiver { failing: false, ready: 1 }, 0), (Archiver { failing: false, ready: 2 }, 1), (Archiver { failing: true, ready: 1 }, 1)]
    {
        let sight = Sight::new().with(|sight| sight.survey = Some(Survey { archiver: Some(archiver), ..Survey::default() }));
        assert_eq!(sight.inputs(costs).len(), words);
    }
}

#[test]
fn the_best_candidate_has_nothing_in_its_way_then_is_in_sync_then_has_priority_then_is_first() {
    let order = |sight: &Sight| sight.inputs(candidates).iter().map(|one| one.name.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(order(&Sight::new()), "b c");
    let preferred = || Sight::new().with(|sight| sight.spec = spec(&["a", "b", "c, failover_priority: 5"]));
    assert_eq!(order(&preferred()), "c b");
    let in_sync = |sight: &mut Sight| {
        sight.view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(10), members: [name("a"), name("b")].into(), copies: 2 });
    };
    assert_eq!(order(&preferred().with(in_sync)), "b c");
    let judged = preferred().with(in_sync).inputs(candidates);
    assert!(judged[1].warnings[0].contains("commits do not wait for `c`"), "{judged:?}");
    assert_eq!(order(&preferred().with(in_sync).condition("b", "stuck", Severity::Error)), "c b");
}
