//! What only the holder of the lock may write, and how the lock is taken.
//!
//! Each is ONE transaction that compares the leader key's create revision with the epoch (I4), so that a leader that was frozen and has
//! lost the lock changes nothing when it wakes. Taking the lock also compares the revisions of `sync` and `history` that the member
//! judged itself on, and reserves its timeline id in the same transaction: an id is never used twice (I9).

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp, TxnResponse};
use serde::Serialize;

use super::client::{Etcd, found, found_one, header};
use super::error::EtcdError;
use super::keys::Key;
use super::view::{Kv, initialize, text};
use crate::facts::cluster::{ClusterView, FailsafeRecord, HistoryEntry, Initialize, MemberRecord, ReleaseRecord, StatusRecord};
use crate::facts::synchrony::SyncRecord;
use crate::types::{Epoch, LeaseId, LockIdentity, MemberName, Revision, SystemId};

/// How a fenced write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced {
    /// Written while the lock was ours.
    Written,
    /// Nothing was written: the lock is not ours under this epoch.
    NotOurs,
}

/// How giving the lock up ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// The lock is deleted.
    Released,
    /// The lock was not ours under this epoch; nothing was written.
    NotOurs,
}

/// How moving the keys to another lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// Member key and, if one is held, the lock hang on the new lease, under the same epoch.
    Moved,
    /// Not everything hung on the old lease; nothing was written.
    NotOurs,
}

/// What a member takes the lock with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcquireRequest {
    /// Who.
    pub member: MemberName,
    /// On which lease; the member key hangs on it too.
    pub lease: LeaseId,
    /// The mod revision of `history` that eligibility was judged on: it names the vacancy.
    pub vacancy: Revision,
    /// The mod revision of `sync` that eligibility was judged on.
    pub sync_revision: Revision,
    /// The mod revision of `failsafe` that eligibility was judged on.
    pub failsafe_revision: Revision,
    /// The mod revision of `spec` that eligibility was judged on. What is absent may have been there in between; a spec that was deleted is
    /// another one when it is there again.
    pub spec_revision: Revision,
    /// The mod revision of `maintenance` that was judged on. Absent, as it is for every election; while it is there, only who has written all
    /// the while takes the lock anew.
    pub maintenance_revision: Revision,
    /// The whole new history, with the entry that reserves our timeline id.
    pub history: Vec<HistoryEntry>,
    /// The present one could be read. What cannot is not empty: it may have used any timeline id (I9).
    pub history_is_readable: bool,
    /// The system identifier, when this is the first lock of the cluster.
    pub initialize: Option<SystemId>,
}

impl AcquireRequest {
    /// Names all that the member judged itself on, as that view has it.
    pub fn judged_on(
        view: &ClusterView,
        member: MemberName,
        lease: LeaseId,
        history: Vec<HistoryEntry>,
        initialize: Option<SystemId>,
    ) -> Self {
        AcquireRequest {
            member,
            lease,
            vacancy: view.history_revision,
            sync_revision: view.sync_revision,
            failsafe_revision: view.failsafe_revision,
            spec_revision: view.spec_revision,
            maintenance_revision: view.maintenance_revision,
            history,
            history_is_readable: !view.unreadable.contains_key(&super::keys::relative(&Key::History)),
            initialize,
        }
    }
}

/// How taking the lock ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquisition {
    /// The lock is ours.
    Acquired(LockIdentity),
    /// Nothing was written.
    Beaten(Beaten),
    /// The answer was lost and reading back did not tell: the lock may be ours now, or become ours a little later. If the leader key
    /// shows up on our lease, it is ours; until then nobody may be sure. Not to be tried again blindly.
    Unknown(String),
}

/// Why the lock was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beaten {
    /// Somebody holds it.
    Held {
        /// The value of the leader key.
        by: String,
    },
    /// The vacancy that eligibility was judged on is over.
    HistoryMoved,
    /// The sync record that eligibility was judged on has changed.
    SyncMoved,
    /// Who may lead while etcd is away has changed.
    FailsafeMoved,
    /// The spec has changed, or all keys were deleted and a spec was applied again.
    SpecMoved,
    /// Maintenance mode was set or ended meanwhile.
    Maintenance,
    /// Our member key is not there, or not on our lease.
    MemberKeyNotOurs,
    /// The cluster has another identity, or somebody else is initializing it.
    InitializeTaken(String),
}

impl Etcd {
    /// Publishes the leader's position.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn write_status(&self, epoch: Epoch, status: &StatusRecord) -> Result<Fenced, EtcdError> {
        self.write_fenced(epoch, TxnOp::put(self.keys.path(&Key::Status), json(&Key::Status, status)?, None)).await
    }

    /// Replaces `history`, once promoted: epoch, parent and switch point of our entry are known now.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn record_promotion(&self, epoch: Epoch, history: &[HistoryEntry]) -> Result<Fenced, EtcdError> {
        self.write_fenced(epoch, TxnOp::put(self.keys.path(&Key::History), json(&Key::History, &history)?, None)).await
    }

    /// Writes, or deletes, `failsafe` over what was judged on. Answers with the revision at which it was done; None = nothing was.
    ///
    /// A write whose answer was lost is carried out once at most, however late: what it was judged on is gone by then.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn write_failsafe(
        &self,
        epoch: Epoch,
        judged_on: Revision,
        record: Option<&FailsafeRecord>,
    ) -> Result<Option<Revision>, EtcdError> {
        let path = self.keys.path(&Key::Failsafe);
        let write = self.put_or_delete(&Key::Failsafe, record)?;
        let unchanged = Compare::mod_revision(path, CompareOp::Equal, judged_on.0);
        let response = self.transact(Txn::new().when([self.is_epoch(epoch), unchanged]).and_then([write])).await?;
        Ok(response.succeeded().then(|| header(&response).1))
    }

    /// Writes the lock's key again, on the lease that it hangs on: a release or a write of `sync` that was judged on it as it was does
    /// nothing any more. Answers with the revision at which it was done; None = the lock is not ours.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn reaffirm(&self, epoch: Epoch, member: &MemberName) -> Result<Option<Revision>, EtcdError> {
        let same_lease = PutOptions::new().with_ignore_lease();
        let write = TxnOp::put(self.keys.leader(), member.as_str(), Some(same_lease));
        let response = self.transact(Txn::new().when([self.is_epoch(epoch)]).and_then([write])).await?;
        Ok(response.succeeded().then(|| header(&response).1))
    }

    /// Writes `sync`, or deletes it, over what was judged on: the key as it was read, and the lock's key as it was read. True = written;
    /// either way as of that revision.
    ///
    /// A write whose answer was lost may be carried out late, until the lock's key is written again ([`Etcd::reaffirm`]).
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn write_sync(
        &self,
        epoch: Epoch,
        lock: Revision,
        judged_on: Revision,
        record: Option<&SyncRecord>,
    ) -> Result<(bool, Revision), EtcdError> {
        let path = self.keys.path(&Key::Sync);
        let write = self.put_or_delete(&Key::Sync, record)?;
        let lock_as_read = Compare::mod_revision(self.keys.leader(), CompareOp::Equal, lock.0);
        let unchanged = Compare::mod_revision(path, CompareOp::Equal, judged_on.0);
        let response = self.transact(Txn::new().when([self.is_epoch(epoch), lock_as_read, unchanged]).and_then([write])).await?;
        Ok((response.succeeded(), header(&response).1))
    }

    fn put_or_delete(&self, key: &Key, record: Option<&impl Serialize>) -> Result<TxnOp, EtcdError> {
        let path = self.keys.path(key);
        Ok(match record {
            Some(record) => TxnOp::put(path, json(key, record)?, None),
            None => TxnOp::delete(path, None),
        })
    }

    /// Written a second time it is the same write, so that it may be asked of several endpoints.
    async fn write_fenced(&self, epoch: Epoch, write: TxnOp) -> Result<Fenced, EtcdError> {
        let txn = Txn::new().when([self.is_epoch(epoch)]).and_then([write]);
        Ok(if self.transact(txn).await?.succeeded() { Fenced::Written } else { Fenced::NotOurs })
    }

    /// Gives the lock up: deletes it and writes how we left, in one transaction. Without a record the others must wait longer. Only
    /// after PostgreSQL is proved dead. `seen` is the lock's key as the caller has seen it, if it has.
    ///
    /// It deletes the key as it was seen or read: carried out late, after somebody has gone on with the lock ([`Etcd::reaffirm`]), it does
    /// nothing. Nor does it in maintenance mode, in which nobody could take the lock.
    ///
    /// # Errors
    /// When etcd cannot be asked, or it is not known whether the lock is gone.
    pub async fn release(&self, epoch: Epoch, seen: Option<Revision>, record: Option<&ReleaseRecord>) -> Result<Released, EtcdError> {
        // Writes stand still meanwhile: to an endpoint that has just answered it goes without reading the key once more.
        if let Some((endpoint, seen)) = self.pool.heard_just_now().zip(seen) {
            match self.transact_once(endpoint, self.release_txn(epoch, seen, record)?).await {
                Ok(response) if response.succeeded() => return Ok(Released::Released),
                // It may be carried out all the same, or nothing was sent: what is there tells.
                Ok(_) | Err(EtcdError::Unknown(_) | EtcdError::Unreachable(_)) => {}
                Err(e) => return Err(e),
            }
        }
        let (endpoint, held) = self.read(&[&Key::Leader]).await?;
        let Some(held) = held.into_iter().flatten().find(|kv| kv.create_revision == epoch.0) else {
            return self.was_released(epoch).await;
        };
        let unsure = match self.transact_once(endpoint, self.release_txn(epoch, Revision(held.mod_revision), record)?).await {
            Ok(response) if response.succeeded() => return Ok(Released::Released),
            Ok(_) => "the lock's key was written meanwhile, or maintenance mode was set".to_owned(),
            Err(EtcdError::Unknown(why)) => why,
            Err(e) => return Err(e),
        };
        let still = self.read_one(&Key::Leader).await?.is_some_and(|kv| kv.create_revision == epoch.0);
        if still { Err(EtcdError::Unknown(unsure)) } else { self.was_released(epoch).await }
    }

    fn release_txn(&self, epoch: Epoch, as_seen: Revision, record: Option<&ReleaseRecord>) -> Result<Txn, EtcdError> {
        let mut writes = vec![TxnOp::delete(self.keys.leader(), None)];
        if let Some(record) = record {
            writes.push(TxnOp::put(self.keys.path(&Key::Release), json(&Key::Release, record)?, None));
        }
        let as_seen = Compare::mod_revision(self.keys.leader(), CompareOp::Equal, as_seen.0);
        let nobody_pauses = Compare::create_revision(self.keys.path(&Key::Maintenance), CompareOp::Equal, 0);
        Ok(Txn::new().when([self.is_epoch(epoch), as_seen, nobody_pauses]).and_then(writes))
    }

    /// The lock is not of this epoch any more: was it us who gave it up, the answer having been lost?
    async fn was_released(&self, epoch: Epoch) -> Result<Released, EtcdError> {
        let record = self.read_one(&Key::Release).await?;
        let ours = record.and_then(|kv| super::view::json::<ReleaseRecord>(&kv).ok()).is_some_and(|record| record.epoch == epoch);
        Ok(if ours { Released::Released } else { Released::NotOurs })
    }

    /// Takes the lock, if everything that the request was judged on still holds.
    ///
    /// # Errors
    /// When etcd cannot be asked before anything was written, or `history` cannot be read. A lost answer is [`Acquisition::Unknown`].
    pub async fn acquire(&self, request: &AcquireRequest) -> Result<Acquisition, EtcdError> {
        // While nobody leads nobody writes. All that is read before is compared in the transaction, but for a claim of `initialize`.
        let all_is_known = request.initialize.is_none() && request.history_is_readable;
        if let Some(endpoint) = self.pool.heard_just_now().filter(|_| all_is_known) {
            match self.take(endpoint, request, None).await {
                // Nothing was sent: another endpoint may answer.
                Err(EtcdError::Unreachable(_)) => {}
                ended => return ended,
            }
        }
        match self.read_before(request).await? {
            Ok((endpoint, identity)) => self.take(endpoint, request, identity).await,
            Err(beaten) => Ok(beaten),
        }
    }

    async fn take(&self, endpoint: usize, request: &AcquireRequest, identity: Option<SystemIdWrite>) -> Result<Acquisition, EtcdError> {
        match self.transact_once(endpoint, self.acquire_txn(request, identity)?).await {
            Ok(response) if response.succeeded() => {
                let lease = self.identity(&response, request.lease);
                Ok(Acquisition::Acquired(LockIdentity { lease, epoch: Epoch(header(&response).1.0) }))
            }
            Ok(response) => Ok(self.judge_defeat(request, &response)),
            Err(EtcdError::Unknown(why)) => match self.read_one(&Key::Leader).await {
                Ok(Some(leader)) => Ok(self.read_back(request, &leader)),
                Ok(None) => Ok(Acquisition::Unknown(why)),
                Err(e) => Ok(Acquisition::Unknown(format!("{why}; reading back: {e}"))),
            },
            Err(e) => Err(e),
        }
    }

    /// An endpoint that answers, and what is to be written as the cluster's identity. Err: there is no use in trying.
    async fn read_before(&self, request: &AcquireRequest) -> Result<Result<(usize, Option<SystemIdWrite>), Acquisition>, EtcdError> {
        let (endpoint, before) = self.read(&[&Key::Leader, &Key::Initialize, &Key::History]).await?;
        let mut before = before.into_iter();
        if let Some(leader) = before.next().flatten() {
            return Ok(Err(self.read_back(request, &leader)));
        }
        let claim = before.next().flatten();
        if let Some(history) = before.next().flatten() {
            super::view::json::<Vec<HistoryEntry>>(&history)
                .map_err(|why| EtcdError::Unreadable { key: super::keys::relative(&Key::History), why })?;
        }
        Ok(match initialize_guard(request, claim.as_ref()) {
            Ok(identity) => Ok((endpoint, identity)),
            Err(taken) => Err(Acquisition::Beaten(taken)),
        })
    }

    fn acquire_txn(&self, request: &AcquireRequest, identity: Option<SystemIdWrite>) -> Result<Txn, EtcdError> {
        let path = |key: &Key| self.keys.path(key);
        let member = path(&Key::Member(request.member.clone()));
        let mut compares = vec![
            Compare::create_revision(self.keys.leader(), CompareOp::Equal, 0),
            Compare::mod_revision(path(&Key::History), CompareOp::Equal, request.vacancy.0),
            Compare::mod_revision(path(&Key::Sync), CompareOp::Equal, request.sync_revision.0),
            Compare::mod_revision(path(&Key::Failsafe), CompareOp::Equal, request.failsafe_revision.0),
            Compare::mod_revision(path(&Key::Spec), CompareOp::Equal, request.spec_revision.0),
            Compare::mod_revision(path(&Key::Maintenance), CompareOp::Equal, request.maintenance_revision.0),
            Compare::lease(member.clone(), CompareOp::Equal, request.lease.0),
            Compare::create_revision(member.clone(), CompareOp::Greater, 0),
        ];
        let on_lease = PutOptions::new().with_lease(request.lease.0);
        let mut writes = vec![
            TxnOp::put(self.keys.leader(), request.member.as_str(), Some(on_lease)),
            TxnOp::put(path(&Key::History), json(&Key::History, &request.history)?, None),
            TxnOp::delete(path(&Key::Release), None),
        ];
        if let Some(SystemIdWrite { system_id, revision }) = identity {
            compares.push(Compare::mod_revision(path(&Key::Initialize), CompareOp::Equal, revision.0));
            writes.push(TxnOp::put(path(&Key::Initialize), system_id.to_string(), None));
        }
        let member_key = Key::Member(request.member.clone());
        let reasons = [Key::Leader, Key::History, Key::Sync, Key::Failsafe, Key::Spec, Key::Maintenance, member_key, Key::Initialize];
        Ok(Txn::new().when(compares).and_then(writes).or_else(reasons.map(|key| TxnOp::get(path(&key), None))))
    }

    /// A leader key is there: it is ours if it hangs on our lease and names us, whichever answer was lost.
    fn read_back(&self, request: &AcquireRequest, leader: &Kv) -> Acquisition {
        let ours = leader.lease == request.lease.0 && text(leader) == request.member.as_str();
        match self.pool.cluster() {
            Some(cluster) if ours => {
                let lease = crate::types::LeaseIdentity { cluster, lease: request.lease };
                Acquisition::Acquired(LockIdentity { lease, epoch: Epoch(leader.create_revision) })
            }
            _ => Acquisition::Beaten(Beaten::Held { by: text(leader) }),
        }
    }

    fn judge_defeat(&self, request: &AcquireRequest, response: &TxnResponse) -> Acquisition {
        let mut seen = found(response).into_iter().map(|kvs| kvs.into_iter().next());
        let mut next = || seen.next().flatten();
        let (leader, history, sync, failsafe, spec) = (next(), next(), next(), next(), next());
        let (maintenance, member, identity) = (next(), next(), next());
        let revision = |kv: &Option<Kv>| Revision(kv.as_ref().map_or(0, |kv| kv.mod_revision));
        if let Some(leader) = leader {
            return self.read_back(request, &leader);
        }
        Acquisition::Beaten(if revision(&history) != request.vacancy {
            Beaten::HistoryMoved
        } else if revision(&sync) != request.sync_revision {
            Beaten::SyncMoved
        } else if revision(&failsafe) != request.failsafe_revision {
            Beaten::FailsafeMoved
        } else if revision(&spec) != request.spec_revision {
            Beaten::SpecMoved
        } else if revision(&maintenance) != request.maintenance_revision {
            Beaten::Maintenance
        } else if member.is_none_or(|kv| kv.lease != request.lease.0) {
            Beaten::MemberKeyNotOurs
        } else {
            Beaten::InitializeTaken(identity.map_or_else(|| "it changed meanwhile".to_owned(), |kv| text(&kv)))
        })
    }

    /// Puts the member key and, if one is held, the lock on a new lease, under the same epoch: the last step of a changed ttl.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn move_to_lease(
        &self,
        member: &MemberName,
        record: &MemberRecord,
        lock: Option<Epoch>,
        old: LeaseId,
        new: LeaseId,
    ) -> Result<Moved, EtcdError> {
        let key = self.keys.path(&Key::Member(member.clone()));
        let on_new = || Some(PutOptions::new().with_lease(new.0));
        let mut compares = vec![Compare::lease(key.clone(), CompareOp::Equal, old.0)];
        let mut writes = vec![TxnOp::put(key.clone(), json(&Key::Member(member.clone()), record)?, on_new())];
        if let Some(epoch) = lock {
            compares.push(self.is_epoch(epoch));
            compares.push(Compare::lease(self.keys.leader(), CompareOp::Equal, old.0));
            writes.push(TxnOp::put(self.keys.leader(), member.as_str(), on_new()));
        }
        let reasons = [TxnOp::get(key, None), TxnOp::get(self.keys.leader(), None)];
        let response = self.transact(Txn::new().when(compares).and_then(writes).or_else(reasons)).await?;
        if response.succeeded() {
            return Ok(Moved::Moved);
        }
        // The same transaction may have been carried out before, its answer lost.
        let on_new = |at: usize| found_one(&response, at).filter(|kv| kv.lease == new.0);
        let lock_moved = lock.is_none_or(|epoch| on_new(1).is_some_and(|kv| kv.create_revision == epoch.0));
        Ok(if on_new(0).is_some() && lock_moved { Moved::Moved } else { Moved::NotOurs })
    }

    pub(super) fn is_epoch(&self, epoch: Epoch) -> Compare {
        Compare::create_revision(self.keys.leader(), CompareOp::Equal, epoch.0)
    }
}

/// What must hold of `initialize`, and what to write there: it is absent, claimed by us, or already this identity.
fn initialize_guard(request: &AcquireRequest, found: Option<&Kv>) -> Result<Option<SystemIdWrite>, Beaten> {
    let Some(system_id) = request.initialize else { return Ok(None) };
    let revision = match found.map(|kv| (kv, initialize(kv))) {
        None => 0,
        Some((kv, Initialize::Claimed { lease, .. })) if lease == request.lease => kv.mod_revision,
        Some((kv, Initialize::Done(done))) if done == system_id => kv.mod_revision,
        Some((kv, _)) => return Err(Beaten::InitializeTaken(text(kv))),
    };
    Ok(Some(SystemIdWrite { system_id, revision: Revision(revision) }))
}

/// The system identifier to be written over what was found at `revision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SystemIdWrite {
    system_id: SystemId,
    revision: Revision,
}

pub(super) fn json(key: &Key, record: &impl serde::Serialize) -> Result<Vec<u8>, EtcdError> {
    serde_json::to_vec(record).map_err(|e| EtcdError::Unreadable { key: super::keys::relative(key), why: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(initialize: Option<u64>) -> AcquireRequest {
        AcquireRequest {
            member: "a".parse().unwrap(),
            lease: LeaseId(7),
            vacancy: Revision(0),
            sync_revision: Revision(0),
            failsafe_revision: Revision(0),
            spec_revision: Revision(0),
            maintenance_revision: Revision(0),
            history: Vec::new(),
            history_is_readable: true,
            initialize: initialize.map(SystemId),
        }
    }

    fn kv(value: &str, lease: i64) -> Kv {
        Kv { key: Vec::new(), value: value.as_bytes().to_vec(), create_revision: 3, mod_revision: 4, lease }
    }

    #[test]
    fn i11_the_identity_is_written_over_nothing_our_claim_or_itself_only() {
        let at = |found: Option<Kv>| initialize_guard(&request(Some(42)), found.as_ref()).map(|write| write.unwrap().revision.0);
        assert_eq!(at(None), Ok(0));
        assert_eq!(at(Some(kv("a", 7))), Ok(4));
        assert_eq!(at(Some(kv("42", 0))), Ok(4));
        assert!(at(Some(kv("b", 8))).is_err(), "claimed by somebody else");
        assert!(at(Some(kv("43", 0))).is_err(), "another cluster's identity");
        assert!(at(Some(kv("rubbish", 0))).is_err());
        assert_eq!(initialize_guard(&request(None), Some(&kv("43", 0))), Ok(None));
    }
}
