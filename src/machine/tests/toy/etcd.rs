//! A toy etcd: one revision, leases, and the transactions that the daemon makes, compared as the real ones are.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{
    ClusterView, FailsafeRecord, HistoryEntry, Initialize, LeaderKey, MemberKey, MemberRecord, ReleaseRecord, StatusRecord,
};
use crate::facts::maintenance::{MaintenanceRecord, Phase};
use crate::facts::requests::RequestProgress;
use crate::facts::synchrony::SyncRecord;
use crate::machine::event::AcquireOutcome;
use crate::machine::tests::fixtures::{ETCD, ms};
use crate::types::{Epoch, LeaseId, LeaseIdentity, LockIdentity, MemberName, Revision, SystemId};

/// etcd looks for expired leases this often.
const EXPIRY_TICK_MS: u64 = 500;

pub(crate) struct ToyEtcd {
    /// A majority is there.
    pub(crate) up: bool,
    pub(crate) keys: ClusterView,
    leases: BTreeMap<LeaseId, BootTime>,
    pub(crate) ttl: Duration,
    next_lease: i64,
    next_expiry: BootTime,
    /// Transactions that wrote, by the name of what they wrote.
    pub(crate) writes: Vec<(BootTime, &'static str)>,
    now: BootTime,
}

impl ToyEtcd {
    pub(crate) fn new(now: BootTime, ttl: Duration) -> Self {
        let keys = ClusterView { etcd_cluster: Some(ETCD), revision: Revision(1), ..ClusterView::default() };
        ToyEtcd { up: true, keys, leases: BTreeMap::new(), ttl, next_lease: 100, next_expiry: now, writes: Vec::new(), now }
    }

    /// Time goes by: leases expire, never early.
    pub(crate) fn tick(&mut self, now: BootTime) {
        self.now = now;
        if !self.up || now < self.next_expiry {
            return;
        }
        self.next_expiry = now + ms(EXPIRY_TICK_MS);
        let expired: Vec<LeaseId> = self.leases.iter().filter(|(_, until)| **until <= now).map(|(lease, _)| *lease).collect();
        for lease in expired {
            self.revoke(lease);
        }
    }

    /// Back after an outage: a new etcd leader gives every lease its full ttl again.
    pub(crate) fn come_back(&mut self, now: BootTime) {
        self.up = true;
        let until = now + self.ttl;
        self.leases.values_mut().for_each(|lease| *lease = until);
    }

    pub(crate) fn grant(&mut self) -> LeaseIdentity {
        self.next_lease += 1;
        let lease = LeaseId(self.next_lease);
        self.leases.insert(lease, self.now + self.ttl);
        LeaseIdentity { cluster: ETCD, lease }
    }

    /// False = there is no such lease.
    pub(crate) fn keep_alive(&mut self, lease: LeaseId) -> bool {
        let until = self.now + self.ttl;
        self.leases.get_mut(&lease).map(|kept| *kept = until).is_some()
    }

    pub(crate) fn revoke(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let keys = &mut self.keys;
        let before = keys.members.len();
        keys.members.retain(|_, key| key.lease != lease);
        let mut changed = before != keys.members.len();
        if keys.leader.as_ref().is_some_and(|leader| leader.lease == lease) {
            keys.leader = None;
            changed = true;
        }
        if matches!(&keys.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease) {
            keys.initialize = None;
            changed = true;
        }
        if changed {
            keys.revision.0 += 1;
        }
    }

    fn wrote(&mut self, what: &'static str) -> Revision {
        self.keys.revision.0 += 1;
        self.writes.push((self.now, what));
        self.keys.revision
    }

    /// A key changed by somebody's hand.
    pub(crate) fn by_hand(&mut self, change: impl FnOnce(&mut ClusterView)) {
        change(&mut self.keys);
        self.keys.revision.0 += 1;
    }

    /// `etcdctl del --prefix`: leases stay.
    pub(crate) fn wipe(&mut self) {
        let revision = Revision(self.keys.revision.0 + 1);
        self.keys = ClusterView { etcd_cluster: Some(ETCD), revision, ..ClusterView::default() };
    }

    pub(crate) fn proves(&self, lock: LockIdentity) -> bool {
        self.keys.leader.as_ref().is_some_and(|leader| leader.epoch == lock.epoch && leader.lease == lock.lease.lease)
    }

    fn is_epoch(&self, epoch: Epoch) -> bool {
        self.keys.leader.as_ref().is_some_and(|leader| leader.epoch == epoch)
    }

    /// Err = the lease that a foreign key hangs on; None = our lease is gone.
    pub(crate) fn put_member(&mut self, member: &MemberName, record: MemberRecord, lease: LeaseId) -> Option<Result<(), LeaseId>> {
        if !self.leases.contains_key(&lease) {
            return None;
        }
        if let Some(foreign) = self.keys.members.get(member).filter(|key| key.lease != lease) {
            return Some(Err(foreign.lease));
        }
        let mod_revision = self.wrote("member");
        self.keys.members.insert(member.clone(), MemberKey { record, lease, mod_revision });
        Some(Ok(()))
    }

    pub(crate) fn acquire(
        &mut self,
        member: &MemberName,
        lease: LeaseIdentity,
        judged_on: &ClusterView,
        history: Vec<HistoryEntry>,
        initialize: Option<SystemId>,
    ) -> AcquireOutcome {
        // Read back: an earlier answer was lost.
        if let Some(leader) = self.keys.leader.as_ref().filter(|leader| leader.lease == lease.lease && leader.holder == member.as_str()) {
            return AcquireOutcome::Won(LockIdentity { lease, epoch: leader.epoch });
        }
        let ours = self.keys.members.get(member).is_some_and(|key| key.lease == lease.lease);
        let identity_fits = match (initialize, &self.keys.initialize) {
            (None, _) | (Some(_), None) => true,
            (Some(id), Some(Initialize::Done(done))) => id == *done,
            (Some(_), Some(Initialize::Claimed { lease: on, .. })) => *on == lease.lease,
            (Some(_), Some(Initialize::Unreadable(_))) => false,
        };
        let fits = self.keys.leader.is_none()
            && self.keys.history_revision == judged_on.history_revision
            && self.keys.sync_revision == judged_on.sync_revision
            && self.keys.failsafe_revision == judged_on.failsafe_revision
            && self.keys.spec_revision == judged_on.spec_revision
            && self.keys.maintenance_revision == judged_on.maintenance_revision
            && ours
            && identity_fits;
        if !fits {
            let spec_alone = self.keys.leader.is_none()
                && self.keys.history_revision == judged_on.history_revision
                && self.keys.spec_revision != judged_on.spec_revision;
            return if spec_alone { AcquireOutcome::SpecMoved } else { AcquireOutcome::Beaten };
        }
        let revision = self.wrote("acquire");
        let epoch = Epoch(revision.0);
        self.keys.leader =
            Some(LeaderKey { holder: member.as_str().to_owned(), epoch, lease: lease.lease, mod_revision: Revision(epoch.0) });
        self.keys.history = history;
        self.keys.history_revision = revision;
        self.keys.release = None;
        if let Some(id) = initialize {
            self.keys.initialize = Some(Initialize::Done(id));
        }
        AcquireOutcome::Won(LockIdentity { lease, epoch })
    }

    pub(crate) fn release(&mut self, epoch: Epoch, record: Option<ReleaseRecord>) -> bool {
        if !self.is_epoch(epoch) || self.keys.maintenance.is_some() {
            return self.keys.release.as_ref().is_some_and(|release| release.epoch == epoch);
        }
        self.wrote("release");
        self.keys.leader = None;
        if record.is_some() {
            self.keys.release = record;
        }
        true
    }

    pub(crate) fn reaffirm(&mut self, epoch: Epoch) -> bool {
        let ours = self.is_epoch(epoch);
        if ours {
            let revision = self.wrote("leader");
            if let Some(leader) = &mut self.keys.leader {
                leader.mod_revision = revision;
            }
        }
        ours
    }

    pub(crate) fn write_sync(&mut self, epoch: Epoch, judged_on: Revision, record: Option<SyncRecord>) -> bool {
        let fits = self.is_epoch(epoch) && self.keys.sync_revision == judged_on;
        if fits {
            let revision = self.wrote("sync");
            self.keys.sync_revision = if record.is_some() { revision } else { Revision(0) };
            self.keys.sync = record;
        }
        fits
    }

    pub(crate) fn write_status(&mut self, status: StatusRecord) -> bool {
        let ours = self.is_epoch(status.epoch);
        if ours {
            self.wrote("status");
            self.keys.status = Some(status);
        }
        ours
    }

    pub(crate) fn record_promotion(&mut self, epoch: Epoch, history: Vec<HistoryEntry>) -> bool {
        let ours = self.is_epoch(epoch);
        if ours {
            self.keys.history_revision = self.wrote("history");
            self.keys.history = history;
        }
        ours
    }

    pub(crate) fn write_failsafe(&mut self, epoch: Epoch, judged_on: Revision, record: Option<FailsafeRecord>) -> Option<Revision> {
        if !self.is_epoch(epoch) || self.keys.failsafe_revision != judged_on {
            return None;
        }
        let revision = self.wrote("failsafe");
        self.keys.failsafe_revision = if record.is_some() { revision } else { Revision(0) };
        self.keys.failsafe = record;
        Some(revision)
    }

    pub(crate) fn note_suspension(&mut self, member: &MemberName, seen: Revision, suspends: bool) -> bool {
        let fits = self.keys.maintenance_revision == seen;
        if fits {
            self.wrote("suspension");
            if suspends {
                self.keys.suspended.insert(member.clone());
            } else {
                self.keys.suspended.remove(member);
            }
        }
        fits
    }

    pub(crate) fn end_maintenance(&mut self, seen: Revision, leader: Revision) -> bool {
        let found = self.keys.leader.as_ref().map_or(Revision(0), |leader| leader.mod_revision);
        let fits = self.keys.maintenance_revision == seen && found == leader;
        if fits {
            self.wrote("maintenance");
            (self.keys.maintenance, self.keys.maintenance_revision) = (None, Revision(0));
        }
        fits
    }

    /// A person sets maintenance mode, or ends it.
    pub(crate) fn maintain(&mut self, phase: Phase) {
        self.by_hand(|keys| {
            let (by, why) = ("dba".to_owned(), "a test".to_owned());
            keys.maintenance = Some(MaintenanceRecord { by, why, at: String::new(), until: None, phase });
            keys.maintenance_revision = Revision(keys.revision.0 + 1);
        });
    }

    pub(crate) fn claim_initialize(&mut self, member: &MemberName, lease: LeaseId) -> bool {
        let ours = self.keys.members.get(member).is_some_and(|key| key.lease == lease);
        if self.keys.initialize.is_none() && ours {
            self.wrote("claim");
            self.keys.initialize = Some(Initialize::Claimed { by: member.as_str().to_owned(), lease });
        }
        matches!(&self.keys.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease)
    }

    pub(crate) fn give_up_initialize(&mut self, lease: LeaseId) {
        if matches!(&self.keys.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease) {
            self.wrote("give up");
            self.keys.initialize = None;
        }
    }

    pub(crate) fn answer(&mut self, id: &str, mod_revision: Revision, progress: RequestProgress) -> bool {
        if self.keys.requests.get(id).is_none_or(|request| request.mod_revision != mod_revision) {
            return false;
        }
        let revision = self.wrote("request");
        if let Some(request) = self.keys.requests.get_mut(id) {
            request.record.progress = progress;
            request.mod_revision = revision;
        }
        true
    }
}
