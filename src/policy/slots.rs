//! Decides which replication slots a member should have, and how far they are to be moved on. Never talks to PostgreSQL.
//!
//! Every member that may lead has a slot for every other one, so that a new primary still has the WAL that its standbys need, and so has one
//! that others stream from; what is not in use is moved on to where those members say they are. On a primary that is the slot of a member
//! that streams from a standby, and may fall back any moment. Slots that nobody here made are left alone: only those that bear the name
//! of a member, or of a permanent slot in the spec, are touched.
//!
//! What surprises: a slot that is `lost` is dropped and made anew. It holds nothing back any more, and its member has to be copied.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, StatusRecord};
use crate::facts::postgres::SlotFacts;
use crate::spec::cluster::{ClusterSpec, Member, PermanentSlot};
use crate::types::{Lsn, MemberName};

/// What a member key's `features` says when its daemon keeps a slot for every other member.
pub const FEATURE: &str = "member_slots";

/// Changes that are made at once; the next look makes more.
const CHANGES_MAX: usize = 16;
/// PostgreSQL keeps logical slots through a failover from this major version on (manual, "Replication Slot Synchronization").
pub const FAILOVER_SLOTS_SINCE: u32 = 17;

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Make a physical slot that keeps WAL from now on.
    CreatePhysical {
        /// Its name.
        name: String,
    },
    /// Make a logical slot; only a primary can.
    CreateLogical {
        /// Its name.
        name: String,
        /// Its database.
        database: String,
        /// Its output plugin.
        plugin: String,
        /// Standbys keep a copy of it.
        failover: bool,
    },
    /// Keep WAL from there on only.
    Advance {
        /// Which.
        name: String,
        /// To where.
        to: Lsn,
    },
    /// Remove it.
    Drop {
        /// Which.
        name: String,
    },
}

/// The slot of a member: its name, with what a slot's name cannot hold replaced as Patroni does.
pub fn slot_of(member: &MemberName) -> String {
    member.as_str().replace('-', "_")
}

/// Since when members have no key in etcd.
pub type AbsentSince = BTreeMap<MemberName, BootTime>;

/// What has to be remembered between two looks.
#[derive(Debug, Clone, Default)]
pub struct Remembered {
    /// Since when members have no key in etcd.
    pub absent: AbsentSince,
    /// When the slots were looked at last.
    pub looked_at: Option<BootTime>,
    /// Names of slots that were kept for a member, or for the spec, in this run of the daemon.
    pub kept: BTreeSet<String>,
    /// What was written then.
    pub written: Lsn,
    /// When they were changed last.
    pub changed_at: BootTime,
}

/// Takes in a view: who is there is absent no more.
pub fn note_absent(absent: &mut AbsentSince, now: BootTime, spec: &ClusterSpec, view: &ClusterView) {
    for member in &spec.members {
        match view.members.contains_key(&member.name) {
            true => drop(absent.remove(&member.name)),
            false => drop(absent.entry(member.name.clone()).or_insert(now)),
        }
    }
    absent.retain(|name, _| spec.member(name).is_some());
}

/// What is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// Now.
    pub now: BootTime,
    /// Whose slots.
    pub me: &'a Member,
    /// The spec in force.
    pub spec: &'a ClusterSpec,
    /// The members' positions.
    pub view: &'a ClusterView,
    /// Since when members have no key.
    pub absent: &'a AbsentSince,
    /// This server is a standby.
    pub in_recovery: bool,
    /// How far it has replayed, or written.
    pub own: Lsn,
    /// Its major version.
    pub major_version: u32,
    /// Its slots.
    pub slots: &'a [SlotFacts],
    /// Slots that were kept for somebody before.
    pub kept: &'a BTreeSet<String>,
}

/// What is to be done now, most needed first; empty when all is as it should be.
pub fn changes(inputs: &Inputs<'_>) -> Vec<Change> {
    let mut changes = Vec::new();
    for member in inputs.spec.members.iter().filter(|member| member.name != inputs.me.name) {
        changes.extend(of_member(inputs, member));
    }
    for (name, slot) in &inputs.spec.replication.slots {
        changes.extend(permanent(inputs, name, slot));
    }
    // Of a member that is not declared any more, or a permanent one that the spec has no more.
    let kept = wanted_names(inputs.spec, &inputs.me.name);
    let left = inputs.slots.iter().filter(|slot| inputs.kept.contains(&slot.name) && !kept.contains(&slot.name) && !slot.active);
    changes.extend(left.map(|slot| Change::Drop { name: slot.name.clone() }));
    changes.sort_by_key(|change| matches!(change, Change::Advance { .. }));
    changes.truncate(CHANGES_MAX);
    changes
}

/// Names of slots that this member keeps for somebody.
pub fn wanted_names(spec: &ClusterSpec, me: &MemberName) -> BTreeSet<String> {
    let of_members = spec.members.iter().filter(|member| member.name != *me).map(|member| slot_of(&member.name));
    of_members.chain(spec.replication.slots.keys().cloned()).collect()
}

fn find<'a>(inputs: &'a Inputs<'_>, name: &str) -> Option<&'a SlotFacts> {
    inputs.slots.iter().find(|slot| slot.name == name)
}

fn of_member(inputs: &Inputs<'_>, member: &Member) -> Option<Change> {
    let replication = &inputs.spec.replication;
    let name = slot_of(&member.name);
    let slot = find(inputs, &name);
    let gone = inputs.absent.get(&member.name).is_some_and(|since| inputs.now.since(*since) >= replication.member_slots_ttl);
    let from_here = member.tags.replicatefrom.as_ref() == Some(&inputs.me.name);
    // It may stream from here now, or if this member leads one day.
    let may_stream = !inputs.in_recovery || !inputs.me.nofailover() || from_here;
    let wanted = replication.use_slots && !member.tags.nostream && !gone && may_stream;
    match slot {
        None => wanted.then_some(Change::CreatePhysical { name }),
        Some(slot) if slot.logical || slot.active => None,
        Some(slot) if !wanted || slot.is_lost() => Some(Change::Drop { name }),
        Some(slot) => {
            let theirs = inputs.view.members.get(&member.name).and_then(|key| key.record.receive_lsn.max(key.record.replay_lsn));
            // Of a primary: that member streams from another, and may come back here any moment.
            let elsewhere = member.tags.replicatefrom.is_some() && !from_here;
            moved_on(inputs, slot, theirs.filter(|_| inputs.in_recovery || elsewhere))
        }
    }
}

/// A slot that nobody uses here is moved on to where its user is.
fn moved_on(inputs: &Inputs<'_>, slot: &SlotFacts, theirs: Option<Lsn>) -> Option<Change> {
    let to = theirs?.min(inputs.own);
    slot.restart_lsn.is_some_and(|at| at < to).then(|| Change::Advance { name: slot.name.clone(), to })
}

fn permanent(inputs: &Inputs<'_>, name: &str, wanted: &PermanentSlot) -> Option<Change> {
    let replication = &inputs.spec.replication;
    if !replication.use_slots || (inputs.in_recovery && inputs.me.nofailover()) {
        return None;
    }
    let name = name.to_owned();
    match (find(inputs, &name), wanted) {
        (None, PermanentSlot::Physical) => Some(Change::CreatePhysical { name }),
        // Standbys get theirs from the primary, by PostgreSQL itself.
        (None, PermanentSlot::Logical { database, plugin }) => (!inputs.in_recovery).then(|| Change::CreateLogical {
            name,
            database: database.clone(),
            plugin: plugin.clone(),
            failover: inputs.major_version >= FAILOVER_SLOTS_SINCE,
        }),
        (Some(slot), _) if slot.is_lost() && !slot.active && !inputs.in_recovery => Some(Change::Drop { name }),
        (Some(slot), PermanentSlot::Logical { .. }) if is_in_the_way(inputs, slot) => Some(Change::Drop { name }),
        (Some(slot), PermanentSlot::Physical) if !slot.active => {
            let published = inputs.view.status.as_ref().and_then(|status: &StatusRecord| status.slots.get(&name).copied());
            moved_on(inputs, slot, published.filter(|_| inputs.in_recovery))
        }
        (Some(_), _) => None,
    }
}

/// Of a former primary: as long as its own slot bears the name, PostgreSQL copies no slot from the primary at all (slotsync.c, "same name
/// slot already exists on the standby"), and after another failover this one would be far behind. Only when the primary is known to have it.
fn is_in_the_way(inputs: &Inputs<'_>, slot: &SlotFacts) -> bool {
    let leader = inputs.view.leader.as_ref().filter(|leader| leader.holder != inputs.me.name.as_str());
    let status = inputs.view.status.as_ref().filter(|status| leader.is_some_and(|leader| leader.epoch == status.epoch));
    let primary_has_it = status.is_some_and(|status| status.slots.contains_key(&slot.name));
    inputs.in_recovery && inputs.major_version >= FAILOVER_SLOTS_SINCE && slot.logical && !slot.synced && !slot.active && primary_has_it
}

/// How long the WAL that slots hold back may go on growing before they are lost: the least room that is left, at `bytes_per_s`.
pub fn time_to_full(slots: &[SlotFacts], bytes_per_s: u64) -> Option<(String, Duration)> {
    let room = |slot: &&SlotFacts| slot.safe_wal_size.and_then(|left| u64::try_from(left.max(0)).ok());
    let held = slots.iter().filter(|slot| !slot.active && slot.restart_lsn.is_some());
    let tightest = held.filter(|slot| room(slot).is_some()).min_by_key(|slot| room(slot))?;
    let seconds = room(&tightest)?.checked_div(bytes_per_s)?;
    Some((tightest.name.clone(), Duration::from_secs(seconds)))
}

#[cfg(test)]
mod tests;
