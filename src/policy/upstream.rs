//! Decides whom a standby streams from: the leader, or the member that its tag `replicatefrom` names while that one is well. Never asks
//! anybody; what is known of the others is what their keys in etcd say.
//!
//! Nothing goes round in a circle: a spec whose tags do is refused, whoever leads has no upstream, and every other way goes to the leader
//! (SAFETY row 56). What surprises: a member that was left is returned to only after it has been well for a while, and ever later if it
//! seemed well and gave nothing, so that a standby does not go back and forth.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, MemberRecord, MemberRole};
use crate::facts::postgres::STREAMING;
use crate::mutants::{Mutant, mutant};
use crate::policy::rejoin::LeaderLineage;
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::{Lsn, MemberName};

/// A member that is away, or streams from nobody, or gives nothing, is left after so long. A change of leaders takes less.
pub const LEFT_AFTER_MS: u64 = 5_000;
/// One that was left has to be well for so long before it is returned to.
pub const RETURNED_AFTER_S: u64 = 10;
/// And for twice as long each time that it seemed well and gave nothing, up to so many times.
const DOUBLINGS_MAX: u32 = 6;
/// Streaming from it for so long, it has been good for something.
const SETTLED_AFTER_S: u64 = 60;

/// What has to be remembered between two looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remembered {
    /// Whether the member that is to be followed is well, and since when.
    standing: Option<(bool, BootTime)>,
    /// How often in a row it seemed well and gave nothing.
    in_vain: u32,
    /// It is being left for that, which is counted, and the server has not been told yet.
    leaves: bool,
}

/// What is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// Now.
    pub now: BootTime,
    /// Who asks.
    pub me: &'a Member,
    /// The keys, also of a while ago.
    pub view: &'a ClusterView,
    /// Whom the server was told to follow. None = nobody yet.
    pub follows: Option<&'a MemberName>,
    /// Since when it gets nothing from there although it asks. None = it does, or does not ask.
    pub gets_nothing_since: Option<BootTime>,
}

/// Whom to stream from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Whoever leads.
    Leader,
    /// A standby.
    Member(MemberName),
}

/// A standby that streams on the leader's timeline.
pub fn is_well(view: &ClusterView, name: &MemberName) -> bool {
    let Some((_, leader)) = view.leader_member() else { return false };
    let streams = |record: &MemberRecord| record.role == MemberRole::Replica && record.state == STREAMING;
    view.members.get(name).is_some_and(|key| streams(&key.record) && key.record.timeline == leader.record.timeline)
}

/// Takes in what is known, and says whom to stream from.
pub fn choose(remembered: &mut Remembered, inputs: &Inputs<'_>) -> Source {
    let Some(wanted) = inputs.me.tags.replicatefrom.as_ref() else {
        *remembered = Remembered::default();
        return Source::Leader;
    };
    // Whoever holds the lock itself follows nobody else for it.
    let leader = inputs.view.leader_member().filter(|(name, _)| **name != inputs.me.name);
    if leader.is_some_and(|(name, _)| name == wanted) {
        *remembered = Remembered::default();
        return Source::Leader;
    }
    let follows = inputs.follows == Some(wanted);
    // Between two leaders nobody streams, and nothing that is done now helps.
    if leader.is_none_or(|(_, key)| key.record.role != MemberRole::Primary) {
        return if follows { Source::Member(wanted.clone()) } else { Source::Leader };
    }
    let now = inputs.now;
    let well = is_well(inputs.view, wanted);
    if remembered.standing.is_none_or(|(was, _)| was != well) {
        remembered.standing = Some((well, now));
    }
    let since = remembered.standing.map_or(now, |(_, since)| since);
    if !follows {
        remembered.leaves = false;
        let wait = Duration::from_secs(RETURNED_AFTER_S) * (1 << remembered.in_vain.min(DOUBLINGS_MAX));
        let at_once = inputs.follows.is_none() && remembered.in_vain == 0;
        return if well && (at_once || now.since(since) >= wait) { Source::Member(wanted.clone()) } else { Source::Leader };
    }
    let long = |since: BootTime| now.since(since) >= Duration::from_millis(LEFT_AFTER_MS) && !mutant(Mutant::CascadeWithoutFallback);
    if remembered.leaves {
        return Source::Leader;
    }
    if well && inputs.gets_nothing_since.is_some_and(long) {
        *remembered = Remembered { standing: Some((well, now)), in_vain: remembered.in_vain.saturating_add(1), leaves: true };
        return Source::Leader;
    }
    if !well && long(since) {
        return Source::Leader;
    }
    if well && inputs.gets_nothing_since.is_none() && now.since(since) >= Duration::from_secs(SETTLED_AFTER_S) {
        remembered.in_vain = 0;
    }
    Source::Member(wanted.clone())
}

/// A standby to copy instead of the leader: of those with the tag `clonefrom` that stream and are not far behind, the one that is farthest;
/// among equals the first of the spec.
pub fn copy_source<'a>(spec: &'a ClusterSpec, view: &ClusterView, me: &MemberName) -> Option<&'a MemberName> {
    let leader = view.leader_position()?;
    let position = |name: &MemberName| view.members.get(name).and_then(|key| key.record.replay_lsn);
    let is_near = |at: Lsn| leader.bytes_since(at) <= spec.ha.maximum_lag_on_failover;
    let tagged = spec.members.iter().filter(|member| member.tags.clonefrom && member.name != *me).map(|member| &member.name);
    let fit = tagged.filter(|name| is_well(view, name) && position(name).is_some_and(is_near));
    fit.rev().max_by_key(|name| position(name))
}

/// Whether what the copy would be of is what the leader has: asked of both before a byte is copied.
///
/// # Errors
/// A sentence that says why not.
pub fn may_be_copied(source: &LeaderLineage, leader: &LeaderLineage) -> Result<(), String> {
    if leader.in_recovery {
        return Err("the leader is still in recovery: its history is not known yet".to_owned());
    }
    if source.system_id != leader.system_id {
        return Err(format!("it is of the database system {}, the leader's is {}", source.system_id, leader.system_id));
    }
    // Of a standby it is the one of its last restartpoint, from which the copy would begin.
    if (source.timeline, &source.history) != (leader.timeline, &leader.history) {
        return Err(format!("a copy of it would begin on timeline {}, the leader is on {}", source.timeline, leader.timeline));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
