//! The member key, and the claim to initialize the cluster.
//!
//! A member key is written only where there is none, or where it hangs on our own lease: a second daemon of the same name finds out
//! here (SAFETY row 64).

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::client::{Etcd, found_one};
use super::error::EtcdError;
use super::keys::Key;
use super::leader::json;
use super::view::Kv;
use crate::facts::cluster::MemberRecord;
use crate::types::{Incarnation, LeaseId, MemberName, Revision};

/// Tries of one put against other puts of our own: the key moved on between reading and writing.
const PUT_MEMBER_TRIES: u32 = 3;

/// How writing the member key ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutMember {
    /// It says what we say.
    Written,
    /// It hangs on a lease that is not ours; nothing was written.
    Foreign {
        /// Whose lease.
        lease: LeaseId,
        /// Which run of a daemon wrote it, if that can be read.
        incarnation: Option<Incarnation>,
        /// When it was last written.
        mod_revision: Revision,
    },
}

impl Etcd {
    /// Says of ourselves what `record` says.
    ///
    /// It compares the revision it has read, so that an older record that was stuck in the network cannot come after a newer one.
    ///
    /// # Errors
    /// [`EtcdError::LeaseNotFound`] when the lease is gone: a new one is needed. Otherwise when etcd cannot be asked.
    pub async fn put_member(&self, member: &MemberName, record: &MemberRecord, lease: LeaseId) -> Result<PutMember, EtcdError> {
        let key = Key::Member(member.clone());
        let path = self.keys.path(&key);
        let value = json(&key, record)?;
        let mut found = self.read_one(&key).await?;
        for _ in 0..PUT_MEMBER_TRIES {
            if let Some(foreign) = found.as_ref().and_then(|kv| foreign(kv, lease)) {
                return Ok(foreign);
            }
            let revision = found.map_or(0, |kv| kv.mod_revision);
            let txn = Txn::new()
                .when([Compare::mod_revision(path.clone(), CompareOp::Equal, revision)])
                .and_then([TxnOp::put(path.clone(), value.clone(), Some(PutOptions::new().with_lease(lease.0)))])
                .or_else([TxnOp::get(path.clone(), None)]);
            let response = self.transact(txn).await?;
            if response.succeeded() {
                return Ok(PutMember::Written);
            }
            found = found_one(&response, 0);
            if found.as_ref().is_some_and(|kv| kv.lease == lease.0 && kv.value == value) {
                return Ok(PutMember::Written);
            }
        }
        Err(EtcdError::Refused(format!("the key of member {member} changed {PUT_MEMBER_TRIES} times while it was being written")))
    }

    /// Claims the right to run initdb, on our lease; our member key must hang on it too. True also when the claim was ours already.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn claim_initialize(&self, member: &MemberName, lease: LeaseId) -> Result<bool, EtcdError> {
        let path = self.keys.path(&Key::Initialize);
        let txn = Txn::new()
            .when([
                Compare::create_revision(path.clone(), CompareOp::Equal, 0),
                Compare::lease(self.keys.path(&Key::Member(member.clone())), CompareOp::Equal, lease.0),
            ])
            .and_then([TxnOp::put(path.clone(), member.as_str(), Some(PutOptions::new().with_lease(lease.0)))])
            .or_else([TxnOp::get(path, None)]);
        let response = self.transact(txn).await?;
        Ok(response.succeeded() || found_one(&response, 0).is_some_and(|kv| kv.lease == lease.0))
    }

    /// Takes our claim back, if it is still there.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn give_up_initialize(&self, lease: LeaseId) -> Result<(), EtcdError> {
        let path = self.keys.path(&Key::Initialize);
        let ours = [
            Compare::lease(path.clone(), CompareOp::Equal, lease.0),
            // A key that is absent, or that is the system identifier for good, compares as lease 0.
            Compare::lease(path.clone(), CompareOp::NotEqual, 0),
        ];
        self.transact(Txn::new().when(ours).and_then([TxnOp::delete(path, None)])).await.map(|_| ())
    }
}

fn foreign(kv: &Kv, ours: LeaseId) -> Option<PutMember> {
    if kv.lease == ours.0 {
        return None;
    }
    let record: Option<MemberRecord> = super::view::json(kv).ok();
    Some(PutMember::Foreign {
        lease: LeaseId(kv.lease),
        incarnation: record.map(|record| record.incarnation),
        mod_revision: Revision(kv.mod_revision),
    })
}
