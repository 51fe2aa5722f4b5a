//! Whose turn it is to have its PostgreSQL started again. Never talks to etcd or PostgreSQL.
//!
//! One member at a time, standbys in the order of their names, the leader last. What is scheduled for one time goes on only as long as all
//! that went before came back. A switchover has its turn as one more: of a restart and a switchover that were claimed at the same moment the
//! one that was claimed first goes on, and the other waits.

use crate::facts::cluster::ClusterView;
use crate::facts::requests::{Ask, RequestKey, RequestProgress};
use crate::mutants::{Mutant, mutant};
use crate::types::{MemberName, Revision};

/// How much later than its time a scheduled restart may begin: others come before it.
const SCHEDULE_LATE_MAX_S: u64 = 600;

/// What a member is, as far as its turn is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// In recovery, behind a leader.
    Standby,
    /// Takes writes.
    Leader,
}

/// Open restarts of other members.
fn others<'a>(view: &'a ClusterView, me: &'a MemberName, id: &'a str) -> impl Iterator<Item = (&'a MemberName, &'a RequestKey)> {
    let of = |key: &'a RequestKey| if let Ask::Restart { on, .. } = &key.record.ask { Some(on) } else { None };
    let all = view.requests.iter().filter(move |(other, key)| other.as_str() != id && key.record.progress.is_open());
    all.filter_map(move |(_, key)| Some((of(key)?, key))).filter(move |(on, _)| *on != me)
}

/// Switchovers that a leader has taken up, and which.
fn switchovers(view: &ClusterView) -> impl Iterator<Item = (&MemberName, &RequestKey)> {
    let hand_over = |ask: &Ask| matches!(ask, Ask::Switchover { .. } | Ask::ScheduledSwitchover { .. });
    view.requests.values().filter(move |key| hand_over(&key.record.ask)).filter_map(|key| Some((key.record.progress.claimed_by()?, key)))
}

/// Whether it was claimed before `claimed`, or is at it already: what was written since does not make it the later one.
fn comes_before(key: &RequestKey, claimed: Revision) -> bool {
    let begun = matches!(&key.record.progress, RequestProgress::Claimed { stage, .. } if stage != CLAIMED);
    key.record.progress.claimed_by().is_some() && (begun || key.mod_revision < claimed)
}

/// Why a restart of this member is not to be taken up yet.
pub fn waits_for(view: &ClusterView, me: &MemberName, id: &str, wall_s: Option<u64>) -> Option<String> {
    if mutant(Mutant::RestartsAtOnce) {
        return None;
    }
    if switchovers(view).next().is_some() {
        return Some("a switchover is under way".to_owned());
    }
    let rank = |member: &MemberName| (view.leader.as_ref().is_some_and(|leader| leader.holder == member.as_str()), member.clone());
    let due = |key: &RequestKey| key.record.ask.at_s().is_none_or(|at_s| wall_s.is_some_and(|now| now >= at_s));
    others(view, me, id).find_map(|(on, key)| match key.record.progress.claimed_by() {
        Some(_) => Some(format!("`{on}` is being restarted")),
        None => (due(key) && view.members.contains_key(on) && rank(on) < rank(me)).then(|| format!("`{on}` comes before it")),
    })
}

/// Who claimed a restart or a switchover before this restart was claimed, or is at it already. Our own claim has to be in the view, and not
/// begun.
pub fn yields_to<'a>(view: &'a ClusterView, me: &'a MemberName, id: &'a str) -> Option<&'a MemberName> {
    let claimed: Revision = view.requests.get(id)?.mod_revision;
    let all = others(view, me, id).chain(switchovers(view));
    all.into_iter().find(|(_, key)| comes_before(key, claimed) && !mutant(Mutant::RestartsAtOnce)).map(|(by, _)| by)
}

/// The member whose restart a switchover waits for: one that was claimed before the switchover was, or any that is claimed while it is not.
pub fn before_switchover(view: &ClusterView, claimed: Option<Revision>) -> Option<&MemberName> {
    if mutant(Mutant::SwitchesOverInARestart) {
        return None;
    }
    let restarted = |key: &RequestKey| matches!(key.record.ask, Ask::Restart { .. });
    let first = |key: &&RequestKey| match claimed {
        Some(claimed) => comes_before(key, claimed),
        None => key.record.progress.claimed_by().is_some(),
    };
    view.requests.values().filter(|key| restarted(key)).find(first)?.record.ask.of_member()
}

/// The stage of a restart or a switchover that was claimed and has not begun.
pub const CLAIMED: &str = "checked";

/// Why one that was scheduled does not take place any more.
pub fn missed(view: &ClusterView, id: &str, key: &RequestKey, wall_s: Option<u64>) -> Option<String> {
    let at_s = key.record.ask.at_s()?;
    if wall_s.is_some_and(|now| now > at_s.saturating_add(SCHEDULE_LATE_MAX_S)) {
        return Some(format!("the time that it was scheduled for went by more than {SCHEDULE_LATE_MAX_S} s ago"));
    }
    let failed = |other: &RequestKey| match (&other.record.ask, &other.record.progress) {
        (Ask::Restart { on, at_s: at, .. }, RequestProgress::Refused { reason }) if *at == Some(at_s) => Some((on.clone(), reason.clone())),
        _ => None,
    };
    let (on, reason) = view.requests.iter().filter(|(other, _)| other.as_str() != id).find_map(|(_, other)| failed(other))?;
    Some(format!("the restart of `{on}`, scheduled for the same time, did not succeed: {reason}"))
}

#[cfg(test)]
mod tests;
