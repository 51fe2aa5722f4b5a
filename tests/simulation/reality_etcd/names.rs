//! What the script's names mean in one world, and a view in those names, which is the same in both worlds.

use std::collections::BTreeMap;

use pgherd::etcd::AcquireRequest;
use pgherd::facts::cluster::{ClusterView, FailsafeRecord, HistoryEntry, Initialize, ReleaseRecord, StatusRecord};
use pgherd::facts::requests::RequestProgress;
use pgherd::facts::synchrony::SyncRecord;
use pgherd::types::{Epoch, LeaseId, LeaseIdentity, LockIdentity, Lsn, MemberName, Revision, SystemId, TimelineId};

use super::super::etcd::CLUSTER;
use super::script::{Judged, Lease, Lock};
use super::support::{entry, name};

/// A lease that no etcd has granted.
const UNKNOWN: LeaseId = LeaseId(0x7777_7777);
/// What is no number of a granted lease.
const NOT_GRANTED: i64 = -1;
/// An epoch that no leader key can have: etcd's first revision is older than any key.
const NEVER: Epoch = Epoch(1);

/// Of one world.
pub struct Names {
    granted: Vec<LeaseId>,
    named: BTreeMap<Lease, LeaseId>,
    locks: Vec<LockIdentity>,
    /// Where the script began.
    from: Revision,
    /// The last look.
    pub view: ClusterView,
    pub remembered: ClusterView,
}

/// What a person writes into `sync`.
pub fn sync_by_hand() -> SyncRecord {
    SyncRecord { leader: name("a"), epoch: Epoch(1), members: ["a", "b"].map(name).into(), copies: 2 }
}

impl Names {
    pub fn new(view: ClusterView) -> Self {
        let remembered = view.clone();
        Names { granted: Vec::new(), named: BTreeMap::new(), locks: Vec::new(), from: view.revision, view, remembered }
    }

    pub fn was_granted(&mut self, lease: Lease, id: LeaseId) {
        self.granted.push(id);
        self.named.insert(lease, id);
    }

    pub fn granted(&self) -> &[LeaseId] {
        &self.granted
    }

    pub fn was_won(&mut self, lock: LockIdentity) {
        if self.locks.last() != Some(&lock) {
            self.locks.push(lock);
        }
    }

    pub fn lease(&self, lease: Lease) -> LeaseId {
        self.named.get(&lease).copied().unwrap_or(UNKNOWN)
    }

    pub fn lock(&self, lock: Lock) -> LockIdentity {
        let never = LockIdentity { lease: LeaseIdentity { cluster: CLUSTER, lease: UNKNOWN }, epoch: NEVER };
        self.locks.iter().rev().nth(lock).copied().unwrap_or(never)
    }

    pub fn epoch(&self, lock: Lock) -> Epoch {
        self.lock(lock).epoch
    }

    pub fn request(&self, request: Lease) -> String {
        format!("{:x}", self.lease(request).0)
    }

    pub fn judged(&self, judged: Judged) -> &ClusterView {
        match judged {
            Judged::Now => &self.view,
            Judged::Before => &self.remembered,
        }
    }

    /// Whether a put over what was remembered would be sent at all: a foreign key is not written over.
    pub fn may_put_over(&self, member: &MemberName, lease: LeaseId) -> bool {
        self.remembered.members.get(member).is_none_or(|key| key.lease == lease)
    }

    pub fn remembered_revision(&self, member: &MemberName) -> Revision {
        self.remembered.members.get(member).map_or(Revision(0), |key| key.mod_revision)
    }

    pub fn ask(&self, member: &str, lease: Lease, judged: Judged, initialize: Option<u64>) -> AcquireRequest {
        let (member, lease, view) = (name(member), self.lease(lease), self.judged(judged));
        let mut history = view.history.clone();
        history.push(entry(&member, lease, "the script says so"));
        AcquireRequest::judged_on(view, member, lease, history, initialize.map(SystemId))
    }

    pub fn status(&self, lock: Lock, lsn: u64) -> StatusRecord {
        StatusRecord {
            epoch: self.epoch(lock),
            timeline: TimelineId(2),
            lsn: Lsn(lsn),
            slots: Default::default(),
            replayed: Default::default(),
            conditions: Vec::new(),
        }
    }

    /// The history with our entry recorded.
    pub fn promoted(&self, lock: Lock) -> Vec<HistoryEntry> {
        let mut history = self.view.history.clone();
        if let Some(last) = history.last_mut() {
            (last.epoch, last.switch_lsn) = (Some(self.epoch(lock)), Some(Lsn(77)));
        }
        history
    }

    pub fn release(&self, lock: Lock) -> ReleaseRecord {
        ReleaseRecord { epoch: self.epoch(lock), timeline: TimelineId(2), lsn: Lsn(99), to: Some(name("b")), all_seen: true }
    }

    /// How many keys hang on a lease.
    pub fn hang_on(&self, lease: LeaseId) -> usize {
        let view = &self.view;
        let members = view.members.values().filter(|key| key.lease == lease).count();
        let leader = view.leader.as_ref().is_some_and(|leader| leader.lease == lease);
        let claim = matches!(&view.initialize, Some(Initialize::Claimed { lease: on, .. }) if *on == lease);
        let request = view.requests.get(&format!("{:x}", lease.0)).is_some_and(|key| key.record.progress == RequestProgress::Created);
        members + [leader, claim, request].into_iter().filter(|there| *there).count()
    }

    /// 0 = none, as in etcd; then in the order of granting.
    pub fn number(&self, lease: LeaseId) -> i64 {
        if lease.0 == 0 {
            return 0;
        }
        self.granted.iter().position(|id| *id == lease).map_or(NOT_GRANTED, |at| at as i64 + 1)
    }

    /// Counted from where the script began; 0 is still none.
    pub fn counted(&self, revision: Revision) -> i64 {
        if revision.0 == 0 { 0 } else { revision.0 - self.from.0 }
    }

    fn count(&self, revision: &mut Revision) {
        revision.0 = self.counted(*revision);
    }

    fn count_epoch(&self, epoch: &mut Epoch) {
        epoch.0 = self.counted(Revision(epoch.0));
    }

    fn rename(&self, lease: &mut LeaseId) {
        lease.0 = self.number(*lease);
    }

    /// The last look, in names.
    pub fn named_view(&self) -> ClusterView {
        let mut view = self.view.clone();
        view.etcd_cluster = Some(CLUSTER);
        let ClusterView { revision, sync_revision, failsafe_revision, spec_revision, history_revision, maintenance_revision, .. } =
            &mut view;
        for revision in [revision, sync_revision, failsafe_revision, spec_revision, history_revision, maintenance_revision] {
            self.count(revision);
        }
        for key in view.members.values_mut() {
            self.rename(&mut key.lease);
            self.count(&mut key.mod_revision);
        }
        if let Some(leader) = &mut view.leader {
            self.rename(&mut leader.lease);
            self.count_epoch(&mut leader.epoch);
            self.count(&mut leader.mod_revision);
        }
        if let Some(Initialize::Claimed { lease, .. }) = &mut view.initialize {
            self.rename(lease);
        }
        view.status.iter_mut().for_each(|status| self.count_epoch(&mut status.epoch));
        view.release.iter_mut().for_each(|release| self.count_epoch(&mut release.epoch));
        for entry in &mut view.history {
            self.rename(&mut entry.lease);
            entry.epoch.iter_mut().for_each(|epoch| self.count_epoch(epoch));
        }
        let requests = std::mem::take(&mut view.requests);
        for (id, mut request) in requests {
            let lease = i64::from_str_radix(&id, 16).unwrap_or(NOT_GRANTED);
            self.count(&mut request.mod_revision);
            request.record.at.clear();
            view.requests.insert(self.number(LeaseId(lease)).to_string(), request);
        }
        view
    }
}

pub fn failsafe(members: &[&str]) -> Option<FailsafeRecord> {
    let members: BTreeMap<_, _> = members.iter().map(|member| (name(member), format!("http://{member}:8008"))).collect();
    (!members.is_empty()).then_some(FailsafeRecord { ttl_s: 10, members })
}

pub fn progress(word: &str) -> RequestProgress {
    RequestProgress::Claimed { by: name("a"), stage: word.to_owned(), stages: Vec::new() }
}
