//! A failover by hand: what an operator who accepts a loss can override, and what nobody can.

use std::collections::BTreeSet;

use super::*;
use crate::facts::synchrony::SyncRecord;

const FAR: u64 = 32 << 20;
/// Three members, each with its turn.
const TURNS_MS: u64 = 4_000;

fn far_behind() -> Vacant {
    Vacant::new().voted("b", vote(1, LSN - FAR))
}

fn accepting(bytes: u64) -> impl FnOnce(Vacant) -> Vacant {
    move |vacant| Vacant { accept_loss: Some(bytes), ..vacant }
}

fn in_sync(view: &mut ClusterView) {
    let members: BTreeSet<MemberName> = MEMBERS.map(name).into();
    view.sync = Some(SyncRecord { leader: name("a"), epoch: Epoch(10), members, copies: 2 });
    view.sync_revision = Revision(44);
}

#[test]
fn a_member_that_is_too_far_behind_leads_when_that_loss_is_accepted_and_not_when_less_is() {
    far_behind().not_eligible_because("more than maximum_lag_on_failover");
    assert!(accepting(FAR)(far_behind()).runs_after(TURNS_MS));
    accepting(FAR - 1)(far_behind()).not_eligible_because("bytes that may be lost");
    let a_little = || Vacant::new().voted("b", vote(1, LSN - 8));
    assert!(a_little().runs_after(60_000), "the rules allow it in its turn");
    accepting(0)(a_little()).not_eligible_because("more than the 0 bytes that may be lost");
}

/// Else whoever asks in the moment after a crash gives up what the election would have kept.
#[test]
fn it_waits_until_whoever_the_rules_let_lead_has_had_its_turn_and_no_longer() {
    assert!(!far_behind().gone("c").silent("c").runs_after(TURNS_MS));
    assert!(!accepting(FAR)(far_behind()).runs_after(TURNS_MS - 1));
    assert!(accepting(FAR)(far_behind().silent("c")).runs_after(TURNS_MS));
}

#[test]
fn where_commits_waited_for_standbys_it_leads_without_sight_of_those_that_hold_them() {
    let alone = || Vacant::new().with(in_sync).gone("c");
    alone().not_eligible_because("not seen so far");
    assert!(accepting(0)(alone()).runs_after(TURNS_MS));
    let unreadable = accepting(0)(Vacant::new().with(|view| view.sync_revision = Revision(44)));
    unreadable.not_eligible_because("unreadable");
}

#[test]
fn nobody_can_override_identity_lineage_the_spec_or_an_unknown_position() {
    let all = u64::MAX;
    let other = Vacant { system_id: SystemId(9), ..Vacant::new() };
    accepting(all)(other).not_eligible_because("system identifier");
    accepting(all)(Vacant::new().members(&["a", "c"])).not_eligible_because("not in spec.members");
    accepting(all)(Vacant::new().members(&["a", "b, failover_priority: 0", "c"])).not_eligible_because("nofailover");
    accepting(all)(Vacant::new().voted("b", vote(1, 0))).not_eligible_because("is not known");
    accepting(all)(Vacant::new().with(|view| view.spec = None)).not_eligible_because("no spec in etcd");
    let left_behind = vec![recorded(1, "a", 1, 10, 0, 0), recorded(2, "c", 2, 20, 1, LSN - 8)];
    accepting(all)(Vacant::new().history(left_behind).voted("c", vote(2, LSN))).not_eligible_because("was left at");
}

#[test]
fn while_somebody_may_still_write_it_waits() {
    assert!(!accepting(u64::MAX)(Vacant::new().peers(Some(&["a"]))).runs_after(1_000));
    assert!(!accepting(u64::MAX)(Vacant::new().peers(None)).runs_after(60_000), "nobody was asked");
    assert!(accepting(u64::MAX)(Vacant::new().peers(Some(&["a"]))).runs_after(6_000), "the ladder is over");
}
