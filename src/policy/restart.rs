//! Whose turn it is to have its PostgreSQL started again. Never talks to etcd or PostgreSQL.
//!
//! One member at a time, standbys in the order of their names, the leader last. What is scheduled for one time goes on only as long as all
//! that went before came back.

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

fn switches_over(view: &ClusterView) -> bool {
    let hand_over = |ask: &Ask| matches!(ask, Ask::Switchover { .. } | Ask::ScheduledSwitchover { .. });
    view.requests.values().any(|key| hand_over(&key.record.ask) && key.record.progress.claimed_by().is_some())
}

/// Why a restart of this member is not to be taken up yet.
pub fn waits_for(view: &ClusterView, me: &MemberName, id: &str, wall_s: Option<u64>) -> Option<String> {
    if mutant(Mutant::RestartsAtOnce) {
        return None;
    }
    if switches_over(view) {
        return Some("a switchover is under way".to_owned());
    }
    let rank = |member: &MemberName| (view.leader.as_ref().is_some_and(|leader| leader.holder == member.as_str()), member.clone());
    let due = |key: &RequestKey| key.record.ask.at_s().is_none_or(|at_s| wall_s.is_some_and(|now| now >= at_s));
    others(view, me, id).find_map(|(on, key)| match key.record.progress.claimed_by() {
        Some(_) => Some(format!("`{on}` is being restarted")),
        None => (due(key) && view.members.contains_key(on) && rank(on) < rank(me)).then(|| format!("`{on}` comes before it")),
    })
}

/// Who claimed a restart before this one was claimed, or is at it already. Our own claim has to be in the view, and not begun.
pub fn yields_to<'a>(view: &'a ClusterView, me: &'a MemberName, id: &'a str) -> Option<&'a MemberName> {
    let claimed: Revision = view.requests.get(id)?.mod_revision;
    let begun = |key: &RequestKey| matches!(&key.record.progress, RequestProgress::Claimed { stage, .. } if stage != CLAIMED);
    let first = |key: &RequestKey| key.record.progress.claimed_by().is_some() && (begun(key) || key.mod_revision < claimed);
    others(view, me, id).find(|(_, key)| first(key) && !mutant(Mutant::RestartsAtOnce)).map(|(on, _)| on)
}

/// The stage of a restart that was claimed and has not begun.
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
