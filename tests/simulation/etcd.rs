//! etcd as far as pgherd sees it: revisions, leases, and the transactions that the daemon makes, each applied at one moment. Who reaches
//! it, and what becomes of requests and answers on the way, is `network`'s business. `reality_etcd` holds it against real servers.
//!
//! What would surprise: a lease that has run out is there until the next look at expired leases, 500 ms apart, and every lease gets its
//! full ttl again, and an election more, when etcd's leader changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pgherd::etcd::AcquireRequest;
use pgherd::facts::cluster::{
    ClusterView, FailsafeRecord, HistoryEntry, Initialize, LeaderKey, MemberKey, MemberRecord, ReleaseRecord, StatusRecord,
};
use pgherd::facts::requests::{RequestKey, RequestProgress, RequestRecord};
use pgherd::facts::synchrony::SyncRecord;
use pgherd::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, MemberName, Revision};

use super::clock::{Real, ms, secs};
use super::mutants::{Mutant, mutant};

/// etcd's lessor looks for expired leases so often.
pub const EXPIRY_TICK_MS: u64 = 500;
/// etcd's election timeout, by default.
const ELECTION_MS: u64 = 1_000;
/// A lease is granted for so long at least: 1.5 elections, in whole seconds.
const TTL_LEAST_S: u64 = 2;
/// The one cluster.
pub const CLUSTER: EtcdClusterId = EtcdClusterId(14_841_639_068_965_178_418);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    Yes,
    /// No majority. `refuses` = its members are gone, and a connection is refused at once.
    No {
        refuses: bool,
    },
    /// Between two leaders.
    Electing {
        until: Real,
    },
}

#[derive(Debug, Clone)]
struct Lease {
    ttl: Duration,
    until: Real,
}

/// Known bugs of old servers (SAFETY 6), switched on as faults.
#[derive(Debug, Clone, Default)]
pub struct Bugs {
    /// #20616: a keepalive of a lease that is gone answers as if it were there.
    pub renews_the_dead: bool,
    /// #15247: the old leader revokes leases that live.
    pub revokes_early: bool,
    /// Watches lose deletions.
    pub loses_deletions: bool,
}

/// How taking it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    Ours(LockIdentity),
    Beaten,
    /// Nobody's: of what was judged on the spec alone has changed.
    SpecMoved,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    Written,
    Foreign(LeaseId),
    /// Another write of ours came between.
    Moved,
    NoLease,
}

pub struct Etcd {
    pub serving: Serving,
    pub term: u64,
    pub view: Arc<ClusterView>,
    pub bugs: Bugs,
    /// The database is full: whatever writes is refused (SAFETY row 44).
    pub no_space: bool,
    leases: BTreeMap<LeaseId, Lease>,
    next_lease: i64,
    pub next_tick: Real,
    /// Epochs of leaders' writes that were accepted (I4).
    pub fenced_writes: Vec<Epoch>,
    /// Transactions that wrote, by the name of what they wrote, for L5.
    pub writes: u64,
    /// Mod revision of `leader`.
    pub leader_revision: Revision,
    backup: Option<(Arc<ClusterView>, BTreeMap<LeaseId, Lease>)>,
}

impl Etcd {
    pub fn new() -> Self {
        Etcd {
            serving: Serving::Yes,
            term: 2,
            view: Arc::new(ClusterView { etcd_cluster: Some(CLUSTER), revision: Revision(1), ..ClusterView::default() }),
            bugs: Bugs::default(),
            no_space: false,
            leases: BTreeMap::new(),
            next_lease: 0x7000,
            next_tick: Real(0),
            fenced_writes: Vec::new(),
            writes: 0,
            leader_revision: Revision(0),
            backup: None,
        }
    }

    pub fn serves(&self) -> bool {
        self.serving == Serving::Yes
    }

    /// Time goes by. True = something changed.
    pub fn tick(&mut self, now: Real) -> bool {
        if now < self.next_tick {
            return false;
        }
        self.next_tick = now.after(ms(EXPIRY_TICK_MS));
        if !self.serves() {
            return false;
        }
        let expired: Vec<LeaseId> = self.leases.iter().filter(|(_, lease)| lease.until <= now).map(|(id, _)| *id).collect();
        let gone: Vec<bool> = expired.into_iter().map(|lease| self.revoke(lease)).collect();
        gone.contains(&true)
    }

    /// Leases that live run out now: the bug of an old leader.
    pub fn revoke_early(&mut self) {
        self.leases.values_mut().for_each(|lease| lease.until = Real(0));
    }

    /// A new leader: a new term, and for every lease its full ttl and an election more.
    pub fn elected(&mut self, now: Real) {
        self.serving = Serving::Yes;
        self.term += 1;
        for lease in self.leases.values_mut() {
            lease.until = now.after(lease.ttl + ms(ELECTION_MS));
        }
    }

    /// When a lease that holds is over at the earliest; None = it is gone.
    pub fn lease_until(&self, lease: LeaseId) -> Option<Real> {
        self.leases.get(&lease).map(|lease| lease.until)
    }

    /// As it was granted.
    pub fn granted_ttl(&self, lease: LeaseId) -> Option<Duration> {
        self.leases.get(&lease).map(|lease| lease.ttl)
    }

    pub fn keys(&mut self) -> &mut ClusterView {
        Arc::make_mut(&mut self.view)
    }

    pub fn wrote(&mut self) -> Revision {
        self.writes += 1;
        let keys = self.keys();
        keys.revision.0 += 1;
        keys.revision
    }

    /// Somebody puts a key by hand; at which revision.
    pub fn by_hand(&mut self, put: impl FnOnce(&mut ClusterView, Revision)) {
        let revision = self.wrote();
        put(self.keys(), revision);
    }

    /// Somebody deletes keys by hand. Where there are none, nothing is written.
    pub fn delete_by_hand(&mut self, delete: impl FnOnce(&mut ClusterView)) {
        let mut without = ClusterView::clone(&self.view);
        delete(&mut without);
        if without != *self.view {
            self.view = Arc::new(without);
            self.wrote();
        }
    }

    /// `etcdctl del --prefix`: leases stay.
    pub fn wipe(&mut self) {
        self.delete_by_hand(|keys| {
            *keys = ClusterView { etcd_cluster: Some(CLUSTER), revision: keys.revision, ..ClusterView::default() };
        });
    }

    pub fn back_up(&mut self) {
        self.backup = Some((Arc::clone(&self.view), self.leases.clone()));
    }

    /// Comes back as it was at the backup (SAFETY row 43).
    pub fn restore(&mut self, now: Real) -> bool {
        let Some((view, leases)) = self.backup.clone() else { return false };
        (self.view, self.leases) = (view, leases);
        self.elected(now);
        true
    }

    pub fn grant(&mut self, now: Real, ttl: Duration) -> LeaseIdentity {
        self.next_lease += 1;
        let (lease, ttl) = (LeaseId(self.next_lease), ttl.max(secs(TTL_LEAST_S)));
        self.leases.insert(lease, Lease { ttl, until: now.after(ttl) });
        LeaseIdentity { cluster: CLUSTER, lease }
    }

    /// The ttl it was granted with; None = there is no such lease. One that has run out is not brought back: etcd answers once it is gone.
    pub fn keep_alive(&mut self, now: Real, lease: LeaseId) -> Option<Duration> {
        if self.leases.get(&lease).is_some_and(|kept| kept.until <= now) {
            self.revoke(lease);
        }
        let known = self.leases.get_mut(&lease).map(|kept| {
            kept.until = now.after(kept.ttl);
            kept.ttl
        });
        known.or(self.bugs.renews_the_dead.then_some(Duration::from_secs(10)))
    }

    /// True = keys went with it.
    pub fn revoke(&mut self, lease: LeaseId) -> bool {
        self.leases.remove(&lease);
        let asked = request_on(lease);
        // What was taken up does not hang on its requester's lease any more.
        let hangs = |view: &ClusterView| {
            let key = view.requests.get(&asked);
            key.is_some_and(|key| key.record.progress == RequestProgress::Created && key.record.ask.at_s().is_none())
        };
        let has = |view: &ClusterView| {
            view.members.values().any(|key| key.lease == lease)
                || view.leader.as_ref().is_some_and(|leader| leader.lease == lease)
                || matches!(&view.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease)
                || hangs(view)
        };
        if !has(&self.view) {
            return false;
        }
        let keys = self.keys();
        keys.members.retain(|_, key| key.lease != lease);
        keys.leader = keys.leader.take().filter(|leader| leader.lease != lease);
        if matches!(&keys.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease) {
            keys.initialize = None;
        }
        if hangs(keys) {
            keys.requests.remove(&asked);
        }
        keys.revision.0 += 1;
        true
    }

    /// The transaction after a keepalive: whether the lock is this one.
    pub fn proves(&self, lock: LockIdentity) -> bool {
        self.view.leader.as_ref().is_some_and(|leader| leader.epoch == lock.epoch && leader.lease == lock.lease.lease)
    }

    pub fn proves_epoch(&self, epoch: Epoch) -> bool {
        self.is_epoch(epoch)
    }

    fn is_epoch(&self, epoch: Epoch) -> bool {
        self.view.leader.as_ref().is_some_and(|leader| leader.epoch == epoch)
    }

    pub fn member_revision(&self, member: &MemberName) -> Revision {
        self.view.members.get(member).map_or(Revision(0), |key| key.mod_revision)
    }

    /// `expected` is the revision that was read before.
    pub fn put_member(&mut self, member: &MemberName, record: MemberRecord, lease: LeaseId, expected: Revision) -> Put {
        if let Some(foreign) = self.view.members.get(member).filter(|key| key.lease != lease) {
            return Put::Foreign(foreign.lease);
        }
        if self.member_revision(member) != expected {
            let same = self.view.members.get(member).is_some_and(|key| key.record == record);
            return if same { Put::Written } else { Put::Moved };
        }
        if !self.leases.contains_key(&lease) {
            return Put::NoLease;
        }
        let mod_revision = self.wrote();
        self.keys().members.insert(member.clone(), MemberKey { record, lease, mod_revision });
        Put::Written
    }

    /// What `initialize` must be when the lock is the cluster's first; judged on a read before.
    fn identity_fits(&self, ask: &AcquireRequest) -> bool {
        match (ask.initialize, &self.view.initialize) {
            (None, _) | (Some(_), None) => true,
            (Some(id), Some(Initialize::Done(done))) => id == *done,
            (Some(_), Some(Initialize::Claimed { lease, .. })) => *lease == ask.lease,
            (Some(_), Some(Initialize::Unreadable(_))) => false,
        }
    }

    pub fn acquire(&mut self, ask: &AcquireRequest) -> Acquired {
        if let Some(leader) = &self.view.leader {
            return Self::read_back(leader, ask);
        }
        let member_is_ours = self.view.members.get(&ask.member).is_some_and(|key| key.lease == ask.lease);
        let but_for_the_spec = self.view.history_revision == ask.vacancy
            && self.view.sync_revision == ask.sync_revision
            && self.view.failsafe_revision == ask.failsafe_revision;
        let same_spec = self.view.spec_revision == ask.spec_revision;
        let but_for_the_spec = but_for_the_spec && self.view.maintenance_revision == ask.maintenance_revision;
        let fits = (but_for_the_spec && same_spec || mutant(Mutant::AcquireComparesNothing))
            && member_is_ours
            && self.identity_fits(ask)
            && self.leases.contains_key(&ask.lease);
        if !fits {
            return if but_for_the_spec && !same_spec { Acquired::SpecMoved } else { Acquired::Beaten };
        }
        let revision = self.wrote();
        let epoch = Epoch(revision.0);
        let keys = self.keys();
        keys.leader = Some(LeaderKey { holder: ask.member.as_str().to_owned(), epoch, lease: ask.lease, mod_revision: Revision(epoch.0) });
        keys.history.clone_from(&ask.history);
        keys.history_revision = revision;
        keys.release = None;
        if let Some(id) = ask.initialize {
            keys.initialize = Some(Initialize::Done(id));
        }
        self.leader_revision = revision;
        Acquired::Ours(LockIdentity { lease: LeaseIdentity { cluster: CLUSTER, lease: ask.lease }, epoch })
    }

    /// A leader key is there: whose is it?
    pub fn read_back(leader: &LeaderKey, ask: &AcquireRequest) -> Acquired {
        if leader.lease == ask.lease && leader.holder == ask.member.as_str() {
            let lease = LeaseIdentity { cluster: CLUSTER, lease: ask.lease };
            Acquired::Ours(LockIdentity { lease, epoch: leader.epoch })
        } else {
            Acquired::Beaten
        }
    }

    /// True = the lock of this epoch is released, now or before, by us. The key as it was read is deleted, and no other.
    pub fn release(&mut self, epoch: Epoch, as_read: Revision, record: Option<&ReleaseRecord>) -> bool {
        if !self.is_epoch(epoch) || (self.leader_revision != as_read && !mutant(Mutant::LateReleaseObeyed)) {
            return self.view.release.as_ref().is_some_and(|release| release.epoch == epoch);
        }
        // Nobody could take it.
        if self.view.maintenance.is_some() {
            return false;
        }
        self.fenced_writes.push(epoch);
        self.wrote();
        let keys = self.keys();
        keys.leader = None;
        if let Some(record) = record {
            keys.release = Some(record.clone());
        }
        true
    }

    /// The lock's key is written again as it is.
    pub fn reaffirm(&mut self, epoch: Epoch, member: &MemberName) -> bool {
        let written = self.write_fenced(epoch, |keys, _| {
            keys.leader.iter_mut().for_each(|leader| leader.holder = member.as_str().to_owned());
        });
        if written {
            self.leader_written(self.view.revision);
        }
        written
    }

    fn leader_written(&mut self, revision: Revision) {
        self.leader_revision = revision;
        if let Some(leader) = &mut self.keys().leader {
            leader.mod_revision = revision;
        }
    }

    /// Over what was judged on; None deletes it. As of which revision, either way.
    pub fn write_sync(&mut self, epoch: Epoch, lock: Revision, judged_on: Revision, record: Option<SyncRecord>) -> (bool, Revision) {
        let as_read = self.leader_revision == lock || mutant(Mutant::LateRecordObeyed);
        let fits = self.is_epoch(epoch) && as_read && self.view.sync_revision == judged_on;
        let written = fits
            && self.write_fenced(epoch, |keys, revision| {
                keys.sync_revision = if record.is_some() { revision } else { Revision(0) };
                keys.sync = record;
            });
        (written, self.view.revision)
    }

    /// False = the lock is not of this epoch.
    pub fn write_fenced(&mut self, epoch: Epoch, write: impl FnOnce(&mut ClusterView, Revision)) -> bool {
        if !self.is_epoch(epoch) && !mutant(Mutant::EpochNotCompared) {
            return false;
        }
        self.fenced_writes.push(epoch);
        let revision = self.wrote();
        write(self.keys(), revision);
        true
    }

    pub fn write_status(&mut self, status: StatusRecord) -> bool {
        self.write_fenced(status.epoch, |keys, _| keys.status = Some(status))
    }

    pub fn record_promotion(&mut self, epoch: Epoch, history: Vec<HistoryEntry>) -> bool {
        self.write_fenced(epoch, |keys, revision| (keys.history, keys.history_revision) = (history, revision))
    }

    /// Over what was judged on; None deletes it. The revision of the write; None = nothing was written.
    pub fn write_failsafe(&mut self, epoch: Epoch, judged_on: Revision, record: Option<FailsafeRecord>) -> Option<Revision> {
        if self.view.failsafe_revision != judged_on {
            return None;
        }
        if record.is_none() && judged_on == Revision(0) {
            // There is nothing to delete, and so no revision of it.
            return self.is_epoch(epoch).then_some(self.view.revision);
        }
        let written = self.write_fenced(epoch, |keys, revision| {
            keys.failsafe_revision = if record.is_some() { revision } else { Revision(0) };
            keys.failsafe = record;
        });
        written.then_some(self.view.revision)
    }

    pub fn claim_initialize(&mut self, member: &MemberName, lease: LeaseId) -> bool {
        let ours = self.view.members.get(member).is_some_and(|key| key.lease == lease);
        if self.view.initialize.is_none() && ours && self.leases.contains_key(&lease) {
            self.wrote();
            self.keys().initialize = Some(Initialize::Claimed { by: member.as_str().to_owned(), lease });
        }
        self.claimed_by(lease)
    }

    fn claimed_by(&self, lease: LeaseId) -> bool {
        matches!(&self.view.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease)
    }

    pub fn give_up_initialize(&mut self, lease: LeaseId) {
        if self.claimed_by(lease) {
            self.wrote();
            self.keys().initialize = None;
        }
    }

    /// A request of an operator, on a lease of its own. Its id.
    pub fn create_request(&mut self, now: Real, ttl: Duration, record: RequestRecord) -> String {
        let id = request_on(self.grant(now, ttl).lease);
        let mod_revision = self.wrote();
        self.keys().requests.insert(id.clone(), RequestKey { record, mod_revision });
        id
    }

    pub fn answer_request(&mut self, id: &str, mod_revision: Revision, progress: RequestProgress) -> bool {
        let Some(found) = self.view.requests.get(id) else { return false };
        if found.mod_revision != mod_revision {
            // Said already, as after an answer that was lost.
            return found.record.progress == progress;
        }
        let revision = self.wrote();
        if let Some(request) = self.keys().requests.get_mut(id) {
            request.record.progress = progress;
            request.mod_revision = revision;
        }
        true
    }

    /// Member key and lock move to another lease of the same member, under the same epoch.
    pub fn move_to_lease(&mut self, member: &MemberName, record: MemberRecord, lock: Option<Epoch>, old: LeaseId, new: LeaseId) -> bool {
        let key_on = |view: &ClusterView, lease| view.members.get(member).is_some_and(|key| key.lease == lease);
        let lock_on = |view: &ClusterView, lease| {
            lock.is_none_or(|epoch| view.leader.as_ref().is_some_and(|leader| leader.epoch == epoch && leader.lease == lease))
        };
        if !key_on(&self.view, old) || !lock_on(&self.view, old) {
            // As after an answer that was lost.
            return key_on(&self.view, new) && lock_on(&self.view, new);
        }
        if !self.leases.contains_key(&new) {
            return false;
        }
        let mod_revision = self.wrote();
        let keys = self.keys();
        keys.members.insert(member.clone(), MemberKey { record, lease: new, mod_revision });
        if let (Some(_), Some(leader)) = (lock, &mut keys.leader) {
            (leader.lease, leader.holder) = (new, member.as_str().to_owned());
            self.leader_written(mod_revision);
        }
        true
    }
}

/// A request is called after its lease.
fn request_on(lease: LeaseId) -> String {
    format!("{:x}", lease.0)
}
