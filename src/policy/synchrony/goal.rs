//! Decides whom commits are to wait for: which standbys count, and how many of them. Never says how to get there.
//!
//! What surprises: a standby that leaves has gone for a while already, and one that comes back after it left has to stay for a while before
//! it counts again, so that one that flaps does not keep `sync` changing. One that is seen for the first time counts at once: after a
//! failover commits wait for it. But it is seen only once it is sent WAL of this leadership. A walsender lets in who has more of an older
//! timeline than its own server ever had, sends it what it has already, and believes meanwhile that all it says to have flushed is ours
//! (PostgreSQL, walsender.c: StartReplication, ProcessStandbyReplyMessage).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Goal;
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::postgres::ReplicaFacts;
use crate::facts::synchrony::{Acks, FEATURE, Names, Sender};
use crate::mutants::{Mutant, mutant};
use crate::spec::cluster::{ClusterSpec, Member, ReplicationMode};
use crate::types::{Lsn, MemberName};

/// How long a standby that counts may be away before it counts no more.
pub const LEAVES_AFTER_MS: u64 = 1_000;
/// How long one that `sync` names is waited for when a leadership begins: it has to find its new primary first.
pub const CONNECTS_WITHIN_MS: u64 = 5_000;
/// How long one that left has to be back before it counts again.
pub const RETURNS_AFTER_MS: u64 = 2_000;
/// How long a standby may take to flush what was written.
pub const FLUSHES_WITHIN_MS: u64 = 2_000;

/// What of a standby is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    /// It counts.
    counts: bool,
    /// Since when it is fit, or unfit, as seen last.
    since: BootTime,
    fit: bool,
    /// It counted before, and left.
    left: bool,
    /// It has been seen in this leadership.
    connected: bool,
    /// It may have WAL that this leader never had, until it is seen.
    may_be_ahead: bool,
    /// What it has to flush next, and when that was written.
    due: (Lsn, BootTime),
}

impl Standing {
    fn absent(now: BootTime, written: Lsn) -> Standing {
        let due = (written, now);
        Standing { counts: false, since: now, fit: false, left: false, connected: false, may_be_ahead: false, due }
    }
}

/// Who counts, through one leadership.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standbys {
    members: BTreeMap<MemberName, Standing>,
    /// Written when the primary of this leadership was seen first, and so on its own timeline.
    began: Option<Lsn>,
}

impl Standbys {
    /// Those that a record names count until they have been away for too long; but commits do not wait for one before it is seen, unless
    /// they do already: where this leadership began with names, nobody can be ahead.
    pub fn named(members: impl Iterator<Item = MemberName>, names: Option<&Names>, now: BootTime) -> Standbys {
        let acks = names.and_then(Names::acks);
        let standing = |name: &MemberName| Standing {
            counts: true,
            may_be_ahead: acks.is_none_or(|acks| !acks.members.contains(name)) && !mutant(Mutant::CountedWhileAhead),
            ..Standing::absent(now, Lsn(0))
        };
        Standbys { members: members.map(|name| (name.clone(), standing(&name))).collect(), began: None }
    }

    /// From here on what a walsender has sent is WAL of this leadership.
    pub fn began(&self) -> Option<Lsn> {
        self.began
    }

    /// Takes in what the primary showed.
    pub fn seen(&mut self, now: BootTime, spec: &ClusterSpec, replicas: &[ReplicaFacts], written: Lsn) {
        let began = *self.began.get_or_insert(written);
        for member in &spec.members {
            let flushed = flushed_by(replicas, &member.name, began);
            if flushed.is_none() && !self.members.contains_key(&member.name) {
                continue;
            }
            let standing = self.members.entry(member.name.clone()).or_insert(Standing::absent(now, written));
            if flushed.is_some_and(|flushed| flushed >= standing.due.0) {
                standing.due = (written, now);
            }
            let in_time = now.since(standing.due.1) < Duration::from_millis(FLUSHES_WITHIN_MS);
            let near = |flushed: Lsn| spec.replication.maximum_lag_on_syncnode.is_none_or(|limit| written.bytes_since(flushed) <= limit);
            let fit = may_count(member) && in_time && flushed.is_some_and(near);
            standing.connected |= fit;
            standing.may_be_ahead &= !fit;
            let patience_ms = if standing.connected { LEAVES_AFTER_MS } else { CONNECTS_WITHIN_MS };
            if fit != standing.fit {
                (standing.fit, standing.since) = (fit, now);
            }
            let long = |span_ms| now.since(standing.since) >= Duration::from_millis(span_ms);
            if standing.counts && !fit && (long(patience_ms) || !may_count(member)) {
                (standing.counts, standing.left) = (false, true);
            } else if !standing.counts && fit && (!standing.left || long(RETURNS_AFTER_MS)) {
                standing.counts = true;
            }
        }
        self.members.retain(|name, _| spec.member(name).is_some());
    }

    /// It has been seen in this leadership; one that has not only counts because the record names it, such as a former leader that is lost.
    fn has_been_seen(&self, name: &MemberName) -> bool {
        self.members.get(name).is_some_and(|standing| standing.connected)
    }

    /// Whether this one cannot have WAL that its leader never had: it follows, or nobody could.
    pub fn is_behind(&self, name: &MemberName) -> bool {
        self.members.get(name).is_some_and(|standing| !standing.may_be_ahead)
    }

    /// Whether this one does.
    pub fn counts(&self, name: &MemberName) -> bool {
        self.members.get(name).is_some_and(|standing| standing.counts)
    }

    /// Those that count, and that commits may wait for.
    fn counting(&self) -> impl Iterator<Item = &MemberName> {
        self.members.iter().filter(|(_, standing)| standing.counts && !standing.may_be_ahead).map(|(name, _)| name)
    }

    /// Somebody counts who has to be seen before commits may wait for it.
    fn awaits_somebody(&self) -> bool {
        self.members.values().any(|standing| standing.counts && standing.may_be_ahead)
    }
}

/// The spec lets it count.
pub fn may_count(member: &Member) -> bool {
    !member.tags.nosync && !member.tags.nostream && !member.nofailover()
}

/// Flushed by the standby of that name that streams, and has been sent what was written up to `sent`.
pub fn flushed_by(replicas: &[ReplicaFacts], name: &MemberName, sent: Lsn) -> Option<Lsn> {
    of(replicas, name, sent).filter_map(|replica| replica.flush_lsn).max()
}

/// Replayed by the standby of that name that streams, and has been sent what was written up to `sent`.
pub fn replayed_by(replicas: &[ReplicaFacts], name: &MemberName, sent: Lsn) -> Option<Lsn> {
    of(replicas, name, sent).filter_map(|replica| replica.replay_lsn).max()
}

/// Its walsenders that stream; none, if one of them has not been sent it: PostgreSQL counts each, also one whose standby is gone without a word.
fn of<'a>(replicas: &'a [ReplicaFacts], name: &MemberName, sent: Lsn) -> impl Iterator<Item = &'a ReplicaFacts> {
    let is_sent = |replica: &&ReplicaFacts| replica.sent_lsn.is_some_and(|to| to >= sent) || mutant(Mutant::CountedWhileAhead);
    let of_it: Vec<&ReplicaFacts> =
        replicas.iter().filter(|replica| replica.streams() && member_of(replica).as_ref() == Some(name)).collect();
    let all_are = of_it.iter().all(is_sent);
    of_it.into_iter().filter(move |_| all_are)
}

/// PostgreSQL takes names for the same in any case of letters.
fn member_of(replica: &ReplicaFacts) -> Option<MemberName> {
    replica.application_name.to_ascii_lowercase().parse().ok()
}

/// The walsenders that bear the name of a member, as the change of the names is judged on them. One that makes a copy releases nobody.
pub fn senders(replicas: &[ReplicaFacts]) -> Vec<Sender> {
    let sender = |replica: &ReplicaFacts| {
        Some(Sender {
            member: member_of(replica)?,
            priority: replica.sync_priority,
            flush: replica.flush_lsn.unwrap_or_default(),
            streaming: replica.streams(),
        })
    };
    replicas.iter().filter(|replica| replica.state != "backup").filter_map(sender).collect()
}

/// What is wanted, and what is in the way of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where to go.
    pub goal: Goal,
    /// Fewer standbys count than the spec asks for; how many it asks for.
    pub short_of: Option<u32>,
    /// The mode is not in force: a sentence says why.
    pub waits: Option<String>,
}

/// Whom commits are to wait for. `chosen` = whom they wait for now: among equals nobody is changed.
pub fn wanted(
    spec: &ClusterSpec,
    view: &ClusterView,
    me: &MemberName,
    standbys: &Standbys,
    chosen: Option<&BTreeSet<MemberName>>,
) -> Wanted {
    let replication = &spec.replication;
    if replication.mode == ReplicationMode::Async {
        return Wanted { goal: Goal::Async, short_of: None, waits: None };
    }
    // Once commits wait for somebody it is in force, whoever is down and whatever became of the record.
    let in_force = view.sync_revision.0 != 0 || chosen.is_some();
    if let Some(why) = not_known_by_all(spec, view).filter(|_| !in_force) {
        let goal = if replication.strict { Goal::Stay } else { Goal::Async };
        return Wanted { goal, short_of: None, waits: Some(why) };
    }
    let asked = replication.synchronous_node_count;
    let counting: BTreeSet<MemberName> = standbys.counting().filter(|name| *name != me).cloned().collect();
    // Only whose daemon speaks can be asked when the next leader is looked for; but a copy there is better than none.
    let spoken: BTreeSet<MemberName> = counting.iter().filter(|name| view.members.contains_key(*name)).cloned().collect();
    let members = if spoken.len() >= asked as usize { spoken } else { counting };
    let found = u32::try_from(members.len()).unwrap_or(u32::MAX);
    let short_of = (found < asked).then_some(asked);
    if short_of.is_some() && replication.strict {
        return Wanted { goal: Goal::Wait(asked), short_of, waits: None };
    }
    if short_of.is_some() && standbys.awaits_somebody() {
        return Wanted { goal: Goal::Stay, short_of, waits: None };
    }
    let acks = asked.min(found);
    let members = match replication.mode {
        ReplicationMode::Sync => first_of(spec, me, members, acks, standbys, chosen),
        ReplicationMode::Quorum | ReplicationMode::Async => members,
    };
    Wanted { goal: Goal::Acks(Acks { members, acks }), short_of, waits: None }
}

/// Those that have been seen, by sync_priority, then those that are chosen already, then by their order in the spec; last of all those that
/// stream from here only until another standby serves them again.
fn first_of(
    spec: &ClusterSpec,
    me: &MemberName,
    members: BTreeSet<MemberName>,
    acks: u32,
    standbys: &Standbys,
    chosen: Option<&BTreeSet<MemberName>>,
) -> BTreeSet<MemberName> {
    let mut in_order: Vec<&Member> = spec.members.iter().filter(|member| members.contains(&member.name)).collect();
    in_order.sort_by_key(|member| {
        let is_chosen = chosen.is_some_and(|chosen| chosen.contains(&member.name));
        let is_guest = member.tags.replicatefrom.as_ref().is_some_and(|from| from != me);
        (is_guest, !standbys.has_been_seen(&member.name), std::cmp::Reverse(member.tags.sync_priority), !is_chosen)
    });
    in_order.into_iter().take(acks as usize).map(|member| member.name.clone()).collect()
}

/// An older daemon would run for the lock without looking at `sync` (SAFETY row 65).
fn not_known_by_all(spec: &ClusterSpec, view: &ClusterView) -> Option<String> {
    let knows = |member: &&Member| view.members.get(&member.name).is_some_and(|key| key.knows(FEATURE));
    let not_yet = spec.members.iter().find(|member| !knows(member))?;
    Some(format!("commits do not wait for standbys yet: `{}` has not said that its daemon knows who may lead then", not_yet.name))
}

#[cfg(test)]
mod tests;
