//! The steps of a change, one after the other, as a person would do them. That no order of what may happen loses anything is explored in
//! tests/synchrony.rs.

use super::*;

fn member(name: &str) -> MemberName {
    name.parse().unwrap()
}

fn members(names: &str) -> BTreeSet<MemberName> {
    names.split_whitespace().map(member).collect()
}

fn acks(acks: u32, names: &str) -> Acks {
    Acks { members: members(names), acks }
}

fn goal(count: u32, names: &str) -> Goal {
    Goal::Acks(acks(count, names))
}

fn record(leader: &str, epoch: i64, copies: u32, names: &str) -> SyncRecord {
    SyncRecord { leader: member(leader), epoch: Epoch(epoch), members: members(names), copies }
}

/// `a` leads under epoch 7; every walsender reads the names as soon as they are set, and every standby flushes what is written.
struct Cluster {
    record: Option<SyncRecord>,
    in_force: InForce,
    standbys: BTreeSet<MemberName>,
    file: Names,
    written: Lsn,
    flushed: Lsn,
}

impl Cluster {
    fn new(standbys: &str) -> Cluster {
        let in_force = InForce::since_start(Names::Nobody);
        Cluster { record: None, in_force, standbys: members(standbys), file: Names::Nobody, written: Lsn(100), flushed: Lsn(100) }
    }

    fn senders(&self) -> Vec<Sender> {
        let priority = |name: &MemberName| match &self.file {
            Names::Nobody | Names::Block => 0,
            Names::Any(acks) => u32::from(acks.members.contains(name)),
            Names::First(acks) => acks.members.iter().position(|member| member == name).map_or(0, |at| at as u32 + 2),
        };
        let sender = |name: &MemberName| Sender { member: name.clone(), priority: priority(name), flush: self.flushed, streaming: true };
        self.standbys.iter().map(sender).collect()
    }

    fn step(&self, goal: &Goal) -> Step {
        step(&Inputs {
            me: &member("a"),
            epoch: Epoch(7),
            record: self.record.as_ref(),
            goal,
            in_force: &self.in_force,
            senders: &self.senders(),
        })
    }

    /// What is done on the way to the goal, and how it ends.
    fn go(&mut self, goal: &Goal) -> Vec<String> {
        let mut done = Vec::new();
        for _ in 0..20 {
            self.in_force.seen(&self.senders(), self.written, goal);
            match self.step(goal) {
                Step::Done => return done,
                Step::Wait(why) => {
                    done.push(format!("wait: {why}"));
                    return done;
                }
                Step::Record(record) => {
                    let text = |record: &SyncRecord| {
                        let names: Vec<String> = record.members.iter().map(ToString::to_string).collect();
                        format!("sync: {} of {}", record.copies, names.join(" "))
                    };
                    done.push(record.as_ref().map_or("no sync".to_owned(), text));
                    self.record = record;
                }
                Step::Names(names) => {
                    done.push(format!("names: {names}"));
                    self.in_force.ordered(&names);
                    self.in_force.took(names.clone());
                    self.file = names;
                }
            }
        }
        panic!("{goal:?} is never reached: {done:?}");
    }
}

#[test]
fn three_members_go_from_async_to_a_quorum_lose_a_standby_and_get_it_back() {
    let mut cluster = Cluster::new("b c");
    assert_eq!(cluster.go(&goal(1, "b c")), ["names: ANY 1 (\"b\", \"c\")", "sync: 2 of a b c"]);

    cluster.standbys.remove(&member("b"));
    assert_eq!(cluster.go(&goal(1, "c")), ["names: ANY 1 (\"c\")", "sync: 2 of a c"], "names narrow first, then the record");

    cluster.standbys.insert(member("b"));
    assert_eq!(
        cluster.go(&goal(1, "b c")),
        ["sync: 2 of a b c", "names: ANY 1 (\"b\", \"c\")"],
        "the record allows more before the names do"
    );
    assert_eq!(cluster.go(&Goal::Async), ["no sync", "names: "], "nobody relies on the names before they are emptied");
}

#[test]
fn in_sync_mode_a_standby_is_replaced_by_way_of_a_record_that_allows_for_both() {
    let mut cluster = Cluster::new("b c d");
    cluster.go(&goal(2, "b c"));
    let expected = ["sync: 3 of a b c d", "names: ANY 2 (\"c\", \"d\")", "sync: 3 of a c d"];
    assert_eq!(cluster.go(&goal(2, "c d")), expected);
}

#[test]
fn how_many_acknowledge_grows_by_way_of_first() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b c"));
    let expected = ["names: FIRST 2 (\"pgherd:nobody\", \"b\", \"c\")", "sync: 3 of a b c", "names: ANY 2 (\"b\", \"c\")"];
    assert_eq!(cluster.go(&goal(2, "b c")), expected);
}

#[test]
fn how_many_acknowledge_shrinks_at_once() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(2, "b c"));
    assert_eq!(cluster.go(&goal(1, "b c")), ["sync: 2 of a b c", "names: ANY 1 (\"b\", \"c\")"]);
}

#[test]
fn a_walsender_that_still_shows_any_holds_back_the_greater_number() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b c"));
    let stalled = cluster.senders();
    let to = goal(2, "b c");
    let Step::Names(first) = cluster.step(&to) else { panic!("the names grow first") };
    cluster.in_force.ordered(&first);
    cluster.in_force.took(first.clone());
    cluster.file = first;
    let one_reads = [stalled[0].clone(), cluster.senders()[1].clone()];
    cluster.in_force.seen(&one_reads, cluster.written, &to);
    assert!(matches!(cluster.step(&to), Step::Wait(why) if why.contains("walsender")), "b has not read it");
    cluster.in_force.seen(&cluster.senders(), cluster.written, &to);
    assert!(matches!(cluster.step(&to), Step::Record(Some(_))), "both have");
}

#[test]
fn a_greater_number_in_the_same_form_is_never_seen() {
    let mut cluster = Cluster::new("b c");
    for number in [1, 2] {
        cluster.file = Names::Any(acks(number, "b c"));
        cluster.in_force.ordered(&cluster.file);
        cluster.in_force.took(cluster.file.clone());
    }
    cluster.in_force.seen(&cluster.senders(), cluster.written, &goal(2, "b c"));
    assert!(!cluster.in_force.goes_by(&acks(2, "b c")), "a walsender shows 1 under both");
    assert!(cluster.in_force.goes_by(&acks(1, "b c")));
}

#[test]
fn a_standby_counts_only_when_it_has_flushed_what_was_written_when_the_names_took_effect() {
    let mut cluster = Cluster::new("b c");
    cluster.written = Lsn(200);
    let expected = ["names: ANY 1 (\"b\", \"c\")", "wait: not enough standbys have flushed what was written when the names changed"];
    assert_eq!(cluster.go(&goal(1, "b c")), expected);

    // Writing goes on; who has what was written then has all that was acknowledged before.
    cluster.written = Lsn(300);
    cluster.flushed = Lsn(200);
    assert_eq!(cluster.go(&goal(1, "b c")), ["sync: 2 of a b c"]);
}

#[test]
fn row_47_names_are_emptied_only_once_the_record_lets_no_standby_lead() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b c"));
    cluster.standbys.clear();
    assert_eq!(cluster.go(&goal(0, "")), ["sync: 1 of a", "names: "]);
    let record = cluster.record.unwrap();
    assert!(!record.holds_all(members("b c").iter()), "b and c may have nothing of what was acknowledged since");
    assert!(record.holds_all(members("a").iter()));
}

#[test]
fn with_nobody_to_wait_for_commits_go_on_waiting_when_the_spec_says_so() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b c"));
    cluster.standbys.clear();
    assert_eq!(cluster.go(&Goal::Wait(1)), [] as [&str; 0]);
}

#[test]
fn with_too_few_to_wait_for_no_commit_goes_by_less_than_a_strict_spec_asks_for() {
    const ALL_WAIT: &str = "names: ANY 1 (\"pgherd:nobody\")";
    assert_eq!(Cluster::new("").go(&Goal::Wait(1)), [ALL_WAIT], "nobody waited, as in async");
    let mut alone = Cluster::new("");
    alone.go(&goal(0, ""));
    assert_eq!(alone.go(&Goal::Wait(1)), [ALL_WAIT], "strict was turned on while there was nobody");
    let mut fewer = Cluster::new("b");
    fewer.go(&goal(1, "b"));
    assert_eq!(fewer.go(&Goal::Wait(2)), [ALL_WAIT], "two are asked for now");
    fewer.standbys.insert(member("c"));
    assert_eq!(fewer.go(&goal(2, "b c")), ["sync: 3 of a b c", "names: ANY 2 (\"b\", \"c\")"], "nothing was released since they all wait");
}

/// The names ask for more than the goal, and so the record could be the goal's at once; but then it would have to be weakened again for
/// the goal's names, and strengthened again, for ever.
#[test]
fn a_record_that_the_next_names_would_undo_is_not_written() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(2, "b c"));
    assert_eq!(cluster.go(&goal(1, "b")), ["sync: 2 of a b c", "names: ANY 1 (\"b\")", "sync: 2 of a b"]);
}

#[test]
fn a_record_that_a_former_leader_wrote_is_taken_over_before_anything_else() {
    let mut cluster = Cluster::new("b c");
    cluster.in_force = InForce::since_start(Names::Block);
    for to in [Goal::Stay, Goal::Wait(1), Goal::Async, goal(1, "c")] {
        cluster.record = Some(record("b", 6, 2, "a b c"));
        assert_eq!(cluster.step(&to), Step::Record(Some(record("a", 7, 2, "a b c"))), "what it says still holds");
        cluster.record = Some(record("b", 6, 2, "b c"));
        assert_eq!(cluster.step(&to), Step::Record(Some(record("a", 7, 3, "a b c"))), "and so do we, who were not among them");
        cluster.record = Some(record("a", 6, 2, "a b c"));
        assert_eq!(cluster.step(&to), Step::Record(Some(record("a", 7, 2, "a b c"))), "our own of an earlier leadership");
    }
}

#[test]
fn a_daemon_that_takes_over_sets_first_what_the_record_says() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b c"));
    cluster.in_force = InForce::unknown(cluster.record.as_ref(), members("b c"));
    let expected = [
        "names: ANY 1 (\"b\", \"c\")",
        "names: FIRST 2 (\"pgherd:nobody\", \"b\", \"c\")",
        "sync: 3 of a b c",
        "names: ANY 2 (\"b\", \"c\")",
    ];
    assert_eq!(cluster.go(&goal(2, "b c")), expected, "also when it is to grow");

    cluster.in_force = InForce::unknown(cluster.record.as_ref(), members("b c"));
    assert_eq!(cluster.go(&Goal::Async), ["no sync", "names: "]);

    cluster.record = Some(record("a", 7, 2, "a b c"));
    cluster.in_force = InForce::unknown(cluster.record.as_ref(), members("b c"));
    let steps = cluster.go(&goal(1, "c"));
    assert_eq!(steps, ["names: ANY 1 (\"c\")", "sync: 2 of a c"], "whoever is not to count may be ahead: it is not named in between");

    cluster.record = None;
    // Without a record names may be set that nobody knows of: only empty ones show that they are read.
    cluster.in_force = InForce::unknown(None, members("b c"));
    assert_eq!(cluster.go(&goal(1, "b")), ["names: ", "names: ANY 1 (\"b\")", "sync: 2 of a b"]);
}

#[test]
fn what_came_of_setting_names_that_failed_counts_for_both() {
    let mut cluster = Cluster::new("b c");
    cluster.go(&goal(1, "b"));
    assert_eq!(cluster.step(&goal(1, "c")), Step::Record(Some(record("a", 7, 2, "a b c"))));
    cluster.record = Some(record("a", 7, 2, "a b c"));
    // It fails, and a walsender may have read it.
    cluster.in_force.ordered(&Names::Any(acks(1, "c")));
    assert_eq!(cluster.in_force.set(), None);
    assert_eq!(cluster.go(&goal(1, "b")), ["names: ANY 1 (\"b\")", "sync: 2 of a b"]);
}

#[test]
fn of_more_names_than_are_kept_apart_two_count_as_what_both_allow() {
    let mut in_force = InForce::since_start(Names::Nobody);
    let pairs: Vec<String> = ('b'..'p').map(|name| format!("{name} z")).collect();
    for pair in &pairs {
        let names = Names::Any(acks(1, pair));
        in_force.ordered(&names);
        in_force.took(names);
    }
    assert!(in_force.earlier.len() <= EARLIER_MAX);
    assert_eq!(in_force.loosest(), Some(acks(1, &pairs.join(" "))), "and nothing is forgotten");
}

#[test]
fn who_may_lead_is_not_behind_any_of_so_many_that_one_has_everything() {
    let quorum = record("a", 7, 2, "a b c d");
    assert!(quorum.holds_all(members("a").iter()), "the leader has everything");
    assert!(quorum.holds_all(members("b c d").iter()));
    assert!(!quorum.holds_all(members("b c").iter()), "d alone may have it");
    assert!(!quorum.holds_all(members("b c x").iter()), "a stranger says nothing of it");
    let sync = record("a", 7, 4, "a b c d");
    assert!(sync.holds_all(members("b").iter()), "everybody has it");
    assert!(!sync.holds_all(members("x").iter()));
}

#[test]
fn names_are_printed_as_postgresql_reads_them() {
    assert_eq!(Names::Nobody.to_string(), "");
    assert_eq!(Names::Block.to_string(), "ANY 1 (\"pgherd:nobody\")");
    assert_eq!(Names::Any(acks(1, "c b")).to_string(), "ANY 1 (\"b\", \"c\")");
    assert_eq!(Names::First(acks(2, "b c-1 d_2")).to_string(), "FIRST 2 (\"pgherd:nobody\", \"b\", \"c-1\", \"d_2\")");
    assert!("pgherd:nobody".parse::<MemberName>().is_err(), "no member can have the placeholder's name");
}
