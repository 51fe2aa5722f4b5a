//! What stands in the way, one thing at a time: `a` leads, `b` and `c` stream, and `c` is to be copied anew.

use std::sync::Arc;

use super::*;
use crate::facts::requests::{RequestKey, RequestRecord};
use crate::facts::synchrony::SyncRecord;
use crate::machine::tests::fixtures::{key, leader, name, record, spec, view};
use crate::types::{Epoch, Revision};

const LSN: u64 = 0x0300_0000;

fn cluster() -> ClusterView {
    let mut view = view(60);
    view.leader = Some(leader("a", 7, 50));
    for member in ["b", "c"] {
        let mut record = record(MemberRole::Replica, 1, LSN);
        record.state = "streaming".to_owned();
        view.members.insert(name(member), key(record, 8));
    }
    view.members.insert(name("a"), key(record(MemberRole::Primary, 1, LSN), 7));
    view
}

fn synchronous(mut view: ClusterView, members: &[&str], copies: u32) -> ClusterView {
    let members = members.iter().map(|member| name(member)).collect();
    view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(50), members, copies });
    view.sync_revision = Revision(55);
    view
}

fn claimed(mut view: ClusterView, id: &str, on: &str) -> ClusterView {
    let ask = Ask::Reinit { on: name(on), from_leader: false, in_place: false };
    let progress = RequestProgress::Claimed { by: name(on), stage: "copy".to_owned(), stages: Vec::new() };
    let record = RequestRecord { ask, by: "dba@x".to_owned(), at: String::new(), progress };
    view.requests.insert(id.to_owned(), RequestKey { record, mod_revision: Revision(59) });
    view
}

fn judged(spec: &Arc<ClusterSpec>, view: &ClusterView, leads: bool) -> Option<Obstacle> {
    obstacle(&Inputs { me: &name("c"), leads, spec, view, request: "1" })
}

#[track_caller]
fn refused(view: &ClusterView, because: &str) {
    let found = judged(&spec(&["a", "b", "c"]), view, false);
    assert!(found.as_ref().is_some_and(|obstacle| obstacle.reason().contains(because)), "{found:?}");
}

#[test]
fn a_standby_behind_a_leader_that_writes_may_be_copied_anew() {
    assert_eq!(judged(&spec(&["a", "b", "c"]), &cluster(), false), None);
    assert_eq!(judged(&spec(&["a", "b", "c"]), &claimed(cluster(), "1", "c"), false), None, "its own request is none in its way");
}

#[test]
fn i10_a_member_that_leads_or_has_nobody_to_copy_is_not_copied_anew() {
    assert!(matches!(judged(&spec(&["a", "b", "c"]), &cluster(), true), Some(Obstacle::Lasting(why)) if why.contains("leads")));
    refused(&ClusterView { leader: Some(leader("c", 8, 50)), ..cluster() }, "`c` leads");
    refused(&ClusterView { leader: None, ..cluster() }, "nobody leads");
    let mut alone = ClusterView { leader: None, ..cluster() };
    alone.members.retain(|member, _| *member == name("c"));
    refused(&alone, "may be the only copy");
    let mut promotes = cluster();
    promotes.members.get_mut(&name("a")).unwrap().record.role = MemberRole::Replica;
    refused(&promotes, "does not take writes now");
    refused(&ClusterView { leader: Some(leader("a", 9, 50)), ..cluster() }, "does not take writes now");
    let mut leaves = cluster();
    leaves.members.get_mut(&name("a")).unwrap().record.machine_state = "handing_over".to_owned();
    refused(&leaves, "hands the lock over");
    let mut foreign = cluster();
    foreign.members.get_mut(&name("a")).unwrap().record.system_id = Some(crate::types::SystemId(1));
    refused(&foreign, "the cluster's");
    refused(&claimed(cluster(), "2", "c"), "made already, asked for by dba@x");
}

#[test]
fn i6_a_member_that_commits_wait_for_needs_another_in_its_place() {
    let quorum = synchronous(cluster(), &["a", "b", "c"], 2);
    assert_eq!(judged(&spec(&["a", "b", "c"]), &quorum, false), None, "`b` can take its place");
    let mut gone = quorum.clone();
    gone.members.get_mut(&name("b")).unwrap().record.state = "starting".to_owned();
    refused(&gone, "0 could take its place, where 1 have to");
    refused(&claimed(quorum.clone(), "2", "b"), "0 could take its place");
    refused(&synchronous(cluster(), &["a", "b", "c"], 3), "1 could take its place, where 2 have to");
    let tagged = spec(&["a", "b, tags: {nosync: true}", "c"]);
    assert!(judged(&tagged, &quorum, false).is_some());
    assert_eq!(judged(&spec(&["a", "c"]), &synchronous(cluster(), &["a"], 1), false), None, "nobody counts on it");
    assert_eq!(judged(&spec(&["a", "b", "c"]), &synchronous(cluster(), &["a", "b"], 2), false), None);
    refused(&ClusterView { sync: None, sync_revision: Revision(55), ..cluster() }, "cannot be read");
}
