//! Which slots: of three members, `a` asks; it has everybody's view and its own server's slots.

use super::*;
use crate::facts::cluster::MemberRole;
use crate::machine::tests::fixtures::{T0, key, ms, name, record, spec_with, view};

struct Sight {
    spec: std::sync::Arc<ClusterSpec>,
    view: ClusterView,
    absent: AbsentSince,
    kept: BTreeSet<String>,
    slots: Vec<SlotFacts>,
    in_recovery: bool,
    major_version: u32,
    now: BootTime,
}

impl Sight {
    fn primary(replication: &str) -> Sight {
        let mut view = view(60);
        for member in ["a", "b", "node-c"] {
            view.members.insert(name(member), key(record(MemberRole::Replica, 1, 500), 1));
        }
        let rest = format!("replication: {{ mode: async{replication} }}\n  postgres: {{ parameters: {{ wal_level: logical }} }}");
        let spec = spec_with(&["a", "b", "node-c"], &rest);
        Sight {
            spec,
            view,
            absent: AbsentSince::new(),
            kept: BTreeSet::new(),
            slots: Vec::new(),
            in_recovery: false,
            major_version: 17,
            now: T0,
        }
    }

    fn standby(replication: &str) -> Sight {
        Sight { in_recovery: true, ..Sight::primary(replication) }
    }

    fn has(mut self, slot: SlotFacts) -> Sight {
        self.slots.push(slot);
        self
    }

    fn changes(&self) -> Vec<Change> {
        changes(&Inputs {
            now: self.now,
            me: self.spec.member(&name("a")).unwrap(),
            spec: &self.spec,
            view: &self.view,
            absent: &self.absent,
            in_recovery: self.in_recovery,
            own: Lsn(1_000),
            major_version: self.major_version,
            slots: &self.slots,
            kept: &self.kept,
        })
    }
}

fn slot(name: &str, at: u64) -> SlotFacts {
    SlotFacts { name: name.to_owned(), restart_lsn: Some(Lsn(at)), wal_status: Some("reserved".to_owned()), ..SlotFacts::default() }
}

fn physical(name: &str) -> Change {
    Change::CreatePhysical { name: name.to_owned() }
}

fn drop_of(name: &str) -> Change {
    Change::Drop { name: name.to_owned() }
}

#[test]
fn a_primary_and_a_standby_that_may_lead_have_a_slot_for_every_other_member() {
    for sight in [Sight::primary(""), Sight::standby("")] {
        assert_eq!(sight.changes(), [physical("b"), physical("node_c")]);
    }
}

#[test]
fn with_use_slots_false_there_are_none_and_those_that_were_made_go() {
    assert_eq!(Sight::primary(", use_slots: false").changes(), []);
    assert_eq!(Sight::primary(", use_slots: false").has(slot("b", 1)).changes(), [drop_of("b")]);
}

#[test]
fn a_standby_moves_the_others_slots_on_to_where_they_are_and_never_beyond_itself_or_back() {
    let mut sight = Sight::standby("").has(slot("b", 100)).has(slot("node_c", 700));
    let to = |lsn| Change::Advance { name: "b".to_owned(), to: Lsn(lsn) };
    assert_eq!(sight.changes(), [to(500)], "node-c is behind its slot");
    sight.view.members.get_mut(&name("b")).unwrap().record.receive_lsn = Some(Lsn(5_000));
    assert_eq!(sight.changes(), [to(1_000)], "so far this standby is itself");
    assert_eq!(Sight::primary("").has(slot("b", 100)).has(slot("node_c", 1)).changes(), [], "a primary's move by streaming");
}

fn streaming_from(mut sight: Sight, member: &str, from: &str) -> Sight {
    let spec = std::sync::Arc::make_mut(&mut sight.spec);
    let member = spec.members.iter_mut().find(|declared| declared.name == name(member)).unwrap();
    member.tags.replicatefrom = Some(name(from));
    sight
}

#[test]
fn row_56_a_primary_moves_on_the_slot_of_a_member_that_streams_from_a_standby() {
    let sight = || Sight::primary("").has(slot("b", 100)).has(slot("node_c", 100));
    assert_eq!(streaming_from(sight(), "b", "node-c").changes(), [Change::Advance { name: "b".to_owned(), to: Lsn(500) }]);
    assert_eq!(streaming_from(sight(), "b", "a").changes(), [], "from here: it moves by streaming");
}

#[test]
fn row_56_a_standby_that_never_leads_has_slots_for_those_that_stream_from_it_and_for_nobody_else() {
    let mut sight = streaming_from(Sight::standby(""), "node-c", "a");
    std::sync::Arc::make_mut(&mut sight.spec).members[0].tags.nofailover = true;
    assert_eq!(sight.changes(), [physical("node_c")]);
}

#[test]
fn the_slot_of_a_member_that_stays_away_is_kept_for_member_slots_ttl_and_then_dropped() {
    let mut sight = Sight::primary(", member_slots_ttl: 10min").has(slot("b", 100)).has(slot("node_c", 100));
    sight.view.members.remove(&name("b"));
    note_absent(&mut sight.absent, T0, &sight.spec, &sight.view);
    sight.now = T0 + ms(599_000);
    assert_eq!(sight.changes(), []);
    sight.now = T0 + ms(600_000);
    assert_eq!(sight.changes(), [drop_of("b")]);
    sight.slots.remove(0);
    assert_eq!(sight.changes(), [], "nor made again");
    sight.view.members.insert(name("b"), key(record(MemberRole::Replica, 1, 500), 1));
    note_absent(&mut sight.absent, sight.now, &sight.spec, &sight.view);
    assert_eq!(sight.changes(), [physical("b")], "it is back");
}

#[test]
fn a_lost_slot_is_dropped_to_be_made_anew_and_one_in_use_is_left_alone() {
    let lost = SlotFacts { wal_status: Some("lost".to_owned()), restart_lsn: None, ..slot("b", 1) };
    assert_eq!(Sight::primary("").has(lost.clone()).has(slot("node_c", 1)).changes(), [drop_of("b")]);
    let in_use = SlotFacts { active: true, ..lost };
    assert_eq!(Sight::primary("").has(in_use).has(slot("node_c", 1)).changes(), []);
}

#[test]
fn slots_that_nobody_here_made_are_left_alone() {
    let sight = Sight::primary("").has(slot("b", 1)).has(slot("node_c", 1)).has(slot("debezium", 1));
    assert_eq!(sight.changes(), []);
    let logical = SlotFacts { logical: true, ..slot("b", 1) };
    assert_eq!(Sight::primary("").has(logical).has(slot("node_c", 1)).changes(), [], "not even under a member's name");
}

#[test]
fn row_57_permanent_slots_are_there_on_the_primary_and_kept_through_a_failover_where_postgresql_can() {
    let replication = ", slots: { backup: { type: physical }, cdc: { type: logical, database: app, plugin: pgoutput } }";
    let of_members = |sight: Sight| sight.has(slot("b", 500)).has(slot("node_c", 500));
    let logical =
        |failover| Change::CreateLogical { name: "cdc".to_owned(), database: "app".to_owned(), plugin: "pgoutput".to_owned(), failover };
    let mut sight = of_members(Sight::primary(replication));
    assert_eq!(sight.changes(), [physical("backup"), logical(true)]);
    sight.major_version = 16;
    assert_eq!(sight.changes(), [physical("backup"), logical(false)]);
    let standby = of_members(Sight::standby(replication));
    assert_eq!(standby.changes(), [physical("backup")], "its copy of a logical one comes from the primary");
}

#[test]
fn row_57_a_former_primary_gives_its_own_slot_up_once_the_next_one_has_it_so_that_a_copy_takes_its_place() {
    let own = SlotFacts { logical: true, ..slot("cdc", 100) };
    let copy = SlotFacts { synced: true, ..own.clone() };
    let standby = |cdc: &SlotFacts, leader: &str, status_of: i64| {
        let replication = ", slots: { cdc: { type: logical, database: app, plugin: pgoutput } }";
        let mut sight = Sight::standby(replication).has(slot("b", 500)).has(slot("node_c", 500)).has(cdc.clone());
        sight.view.leader = Some(crate::machine::tests::fixtures::leader(leader, 2, 20));
        sight.view.status = Some(StatusRecord {
            epoch: crate::types::Epoch(status_of),
            timeline: crate::types::TimelineId(2),
            lsn: Lsn(500),
            slots: [("cdc".to_owned(), Lsn(400))].into(),
            replayed: Default::default(),
            conditions: Vec::new(),
        });
        sight
    };
    assert_eq!(standby(&own, "b", 20).changes(), [drop_of("cdc")]);
    assert_eq!(standby(&copy, "b", 20).changes(), [], "PostgreSQL keeps it");
    assert_eq!(standby(&own, "b", 10).changes(), [], "what the former leadership had says nothing");
    assert_eq!(standby(&own, "a", 20).changes(), [], "it is in recovery for a moment, and leads");
    let before_17 = Sight { major_version: 16, ..standby(&own, "b", 20) };
    assert_eq!(before_17.changes(), [], "nobody else has it");
}

#[test]
fn a_standby_moves_a_permanent_physical_slot_on_to_where_the_leader_says_it_is() {
    let mut sight = Sight::standby(", slots: { backup: { type: physical } }").has(slot("b", 500)).has(slot("node_c", 500));
    sight = sight.has(slot("backup", 100));
    assert_eq!(sight.changes(), [], "nothing is said");
    sight.view.status = Some(StatusRecord {
        epoch: crate::types::Epoch(1),
        timeline: crate::types::TimelineId(1),
        lsn: Lsn(900),
        slots: [("backup".to_owned(), Lsn(300))].into(),
        replayed: Default::default(),
        conditions: Vec::new(),
    });
    assert_eq!(sight.changes(), [Change::Advance { name: "backup".to_owned(), to: Lsn(300) }]);
}

#[test]
fn the_time_to_full_is_that_of_the_unused_slot_with_the_least_room() {
    let with_room = |name: &str, left: i64| SlotFacts { safe_wal_size: Some(left), ..slot(name, 1) };
    let in_use = SlotFacts { active: true, ..with_room("c", 1) };
    let slots = [with_room("a", 5_000), with_room("b", 2_000), in_use, slot("unbounded", 1)];
    assert_eq!(time_to_full(&slots, 100), Some(("b".to_owned(), Duration::from_secs(20))));
    assert_eq!(time_to_full(&slots, 0), None, "nothing is written");
}

#[test]
fn the_slot_of_a_member_that_is_not_declared_any_more_is_dropped_by_who_kept_it() {
    let mut sight = Sight::standby("").has(slot("b", 500)).has(slot("node_c", 500)).has(slot("gone", 100));
    assert_eq!(sight.changes(), [], "nobody here made it");
    sight.kept.insert("gone".to_owned());
    assert_eq!(sight.changes(), [drop_of("gone")]);
    sight.slots[2].active = true;
    assert_eq!(sight.changes(), []);
}
