//! The handle that everything but the lease goes through: cheap to clone, each call bounded in time and failing over by itself.
//!
//! It remembers which etcd it spoke to, and at which revision; an answer from another one is an error (SAFETY row 43).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use etcd_client::{Client, DeleteOptions, GetOptions, GetResponse, ResponseHeader, Txn, TxnOp, TxnOpResponse, TxnResponse};

use super::error::{EtcdError, is_no_space};
use super::keys::{Key, Keys};
use super::pool::{ANSWER_MAX_BYTES, Answer, Boxed, Kind, Pool};
use super::settings::Settings;
use super::view::{Kv, view_of};
use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Condition};
use crate::types::{EtcdClusterId, LeaseId, LeaseIdentity, Revision};

/// A handle on one cluster's keys.
#[derive(Clone)]
pub struct Etcd {
    pub(super) pool: Arc<Pool>,
    pub(super) keys: Arc<Keys>,
    /// Counts events of this handle: their keys must differ.
    pub(super) events: Arc<AtomicU64>,
}

impl Etcd {
    /// Makes a handle. Nothing is sent until the first call, so that an etcd that is away is no error here.
    ///
    /// # Errors
    /// [`EtcdError::Refused`] when the settings cannot work.
    pub fn new(settings: Settings) -> Result<Self, EtcdError> {
        let keys = Arc::new(settings.keys());
        Ok(Self { pool: Arc::new(Pool::new(settings)?), keys, events: Arc::new(AtomicU64::new(0)) })
    }

    /// The keys of this cluster.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// How etcd is reached.
    pub fn settings(&self) -> &Settings {
        self.pool.settings()
    }

    /// The etcd cluster that answered first; None before.
    pub fn cluster(&self) -> Option<EtcdClusterId> {
        self.pool.cluster()
    }

    /// All keys but events and old specs, at one revision. It goes through raft, so that it is never older than the call.
    ///
    /// # Errors
    /// When etcd cannot be asked, or is not the one it was before.
    pub async fn read_view(&self) -> Result<ClusterView, EtcdError> {
        Ok(self.list().await?.0)
    }

    /// The view, when the request for it was sent, and which endpoint answered.
    pub(super) async fn list(&self) -> Result<(ClusterView, BootTime, usize), EtcdError> {
        let ranges = self.keys.view_ranges().map(|(from, to)| (from, Some(to)));
        let sent = BootTime::now();
        let (index, listed) = self.through_raft(ranges.into()).await?;
        let (cluster, revision) = (EtcdClusterId(listed.header.cluster_id()), Revision(listed.header.revision()));
        Ok((view_of(&self.keys, Some(cluster), revision, listed.found.into_iter().flatten()), sent, index))
    }

    /// Version of the etcd member that answers, and the condition it deserves.
    ///
    /// # Errors
    /// When etcd cannot be asked.
    pub async fn version(&self) -> Result<(String, Option<Condition>), EtcdError> {
        let (_, status) = self.pool.ask(Kind::Read, |mut client| Box::pin(async move { client.status().await })).await?;
        let version = status.version().to_owned();
        let condition = super::version::version_condition(&version);
        Ok((version, condition))
    }

    /// The ttl that a lease was granted with, and etcd's raft term: a lease begins anew when the term changes. None = there is no such
    /// lease. How much of it is left is not asked: nothing may be counted from that.
    ///
    /// # Errors
    /// When etcd cannot be asked.
    pub async fn granted_ttl(&self, lease: LeaseId) -> Result<Option<(Duration, u64)>, EtcdError> {
        let call = move |mut client: Client| -> Boxed<_> { Box::pin(async move { client.lease_time_to_live(lease.0, None).await }) };
        let (_, answer) = self.pool.ask(Kind::Read, call).await?;
        let seconds = u64::try_from(answer.granted_ttl()).unwrap_or(0);
        let term = answer.header().map_or(0, etcd_client::ResponseHeader::raft_term);
        Ok((answer.ttl() >= 0 && seconds > 0).then_some((Duration::from_secs(seconds), term)))
    }

    /// Ends a lease at once, with every key on it. A lease that is gone already is fine.
    ///
    /// # Errors
    /// When etcd cannot be asked.
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), EtcdError> {
        let revoked = self.pool.ask(Kind::Write, move |mut client| Box::pin(async move { client.lease_revoke(lease.0).await })).await;
        match revoked {
            Ok(_) | Err(EtcdError::LeaseNotFound) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Reads ranges at one revision that is not older than the call.
    async fn through_raft(&self, ranges: Vec<Range>) -> Result<(usize, Snapshot), EtcdError> {
        let never = self.keys.never();
        let call = move |client| -> Boxed<Snapshot> { Box::pin(snapshot(client, ranges.clone(), never.clone())) };
        self.pool.ask(Kind::Read, call).await
    }

    /// A transaction that may be carried out twice: the second time changes nothing more.
    pub(super) async fn transact(&self, txn: Txn) -> Result<TxnResponse, EtcdError> {
        let (_, response) = self.pool.ask(Kind::Write, move |client| send(client, txn.clone())).await?;
        Ok(response)
    }

    /// A transaction that is sent once, to an endpoint that has just answered.
    pub(super) async fn transact_once(&self, endpoint: usize, txn: Txn) -> Result<TxnResponse, EtcdError> {
        self.pool.ask_once(endpoint, move |client| send(client, txn.clone())).await
    }

    /// Reads keys at one revision, and finds an endpoint that answers.
    pub(super) async fn read(&self, keys: &[&Key]) -> Result<(usize, Vec<Option<Kv>>), EtcdError> {
        let ranges = keys.iter().map(|key| (self.keys.path(key), None)).collect();
        let (index, read) = self.through_raft(ranges).await?;
        Ok((index, read.found.into_iter().map(|kvs| kvs.into_iter().next()).collect()))
    }

    /// Reads one key.
    pub(super) async fn read_one(&self, key: &Key) -> Result<Option<Kv>, EtcdError> {
        let (_, mut found) = self.read(&[key]).await?;
        Ok(found.pop().flatten())
    }

    /// Reads a range that is for people, not for decisions.
    pub(super) async fn range(&self, from: String, options: GetOptions) -> Result<GetResponse, EtcdError> {
        let call = move |client: Client| -> Boxed<GetResponse> {
            let (from, options) = (from.clone(), options.clone());
            Box::pin(async move { client.kv_client().max_decoding_message_size(ANSWER_MAX_BYTES).get(from, Some(options)).await })
        };
        Ok(self.pool.ask(Kind::Read, call).await?.1)
    }

    /// Deletes keys `[from, to)` that are for people only.
    pub(super) async fn delete_range(&self, from: String, to: String) -> Result<(), EtcdError> {
        self.transact(Txn::new().and_then([TxnOp::delete(from, Some(DeleteOptions::new().with_range(to)))])).await.map(|_| ())
    }

    /// A lease as named in this etcd cluster.
    pub(super) fn identity(&self, response: &TxnResponse, lease: LeaseId) -> LeaseIdentity {
        LeaseIdentity { cluster: header(response).0, lease }
    }
}

/// From, and to; without the latter one key.
type Range = (String, Option<String>);

/// What ranges held at the header's revision.
struct Snapshot {
    header: ResponseHeader,
    found: Vec<Vec<Kv>>,
}

impl Answer for Snapshot {
    fn header(&self) -> Option<&ResponseHeader> {
        Some(&self.header)
    }
}

fn gets_of(ranges: Vec<Range>) -> impl Iterator<Item = (String, GetOptions)> {
    let options = |to: Option<String>| to.map_or_else(GetOptions::new, |to| GetOptions::new().with_range(to));
    ranges.into_iter().map(move |(from, to)| (from, options(to)))
}

/// A transaction with a condition that always holds, and an else branch that makes it a write to etcd (SAFETY 5).
///
/// When its database is full etcd refuses every transaction, but not a plain deletion. That one goes through raft too, and so the ranges
/// are read at its revision (SAFETY row 44).
async fn snapshot(client: Client, ranges: Vec<Range>, never: String) -> Result<Snapshot, etcd_client::Error> {
    let mut kv = client.kv_client().max_decoding_message_size(ANSWER_MAX_BYTES);
    let gets: Vec<TxnOp> = gets_of(ranges.clone()).map(|(from, options)| TxnOp::get(from, Some(options))).collect();
    match kv.txn(Txn::new().when([]).and_then(gets).or_else([TxnOp::delete(never.clone(), None)])).await {
        Ok(mut response) => {
            let found = found(&response);
            Ok(Snapshot { header: response.take_header().ok_or_else(no_header)?, found })
        }
        Err(e) if is_no_space(&e) => {
            let header = kv.delete(never, None).await?.take_header().ok_or_else(no_header)?;
            let mut found = Vec::new();
            for (from, options) in gets_of(ranges) {
                let response = kv.get(from, Some(options.with_revision(header.revision()))).await?;
                found.push(response.kvs().iter().map(Kv::from).collect());
            }
            Ok(Snapshot { header, found })
        }
        Err(e) => Err(e),
    }
}

fn no_header() -> etcd_client::Error {
    etcd_client::Error::Internal("the answer has no header".into())
}

fn send(client: Client, txn: Txn) -> Boxed<TxnResponse> {
    Box::pin(async move { client.kv_client().max_decoding_message_size(ANSWER_MAX_BYTES).txn(txn).await })
}

/// Cluster and revision of a judged answer, which has a header.
pub(super) fn header(response: &TxnResponse) -> (EtcdClusterId, Revision) {
    response.header().map_or((EtcdClusterId(0), Revision(0)), |h| (EtcdClusterId(h.cluster_id()), Revision(h.revision())))
}

/// What each get of a transaction found, in order.
pub(super) fn found(response: &TxnResponse) -> Vec<Vec<Kv>> {
    let gets = response.op_responses().into_iter().filter_map(|op| match op {
        TxnOpResponse::Get(get) => Some(get.kvs().iter().map(Kv::from).collect()),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    });
    gets.collect()
}

/// The first key that each get found.
pub(super) fn found_one(response: &TxnResponse, at: usize) -> Option<Kv> {
    found(response).into_iter().nth(at).and_then(|kvs| kvs.into_iter().next())
}
