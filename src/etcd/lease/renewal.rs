//! One renewal with its proof, over as many endpoints as the budget allows.
//!
//! A renewal counts only with the proof: a transaction AFTER the keepalive that compares the lock's epoch and lease. Its else branch deletes
//! a key that never exists, so that it goes through raft; it counts only if its raft term is the keepalive's, because a new etcd leader
//! has its own idea of leases (SAFETY 5).
//!
//! etcd-client throws the header of a stream's first answer away, and matches nothing to anything. So a stream is opened per endpoint
//! and kept; on it one keepalive is sent, and one answer awaited. At any doubt (time-out, error, a slower endpoint) the stream is dropped,
//! so that an old answer can never be taken for a new one.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, LeaseKeepAliveStream, LeaseKeeper, ResponseHeader, Txn, TxnOp};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use crate::clock::BootTime;
use crate::etcd::client::found_one;
use crate::etcd::error::{EtcdError, Failure, Suspicion, classify, conclude, is_no_space};
use crate::etcd::keys::Keys;
use crate::etcd::pool::{Kind, Pool, hedge_after};
use crate::etcd::view::{Kv, shorten, text};
use crate::types::{EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity};

/// Tries per endpoint within one budget.
const ROUNDS: usize = 2;

/// How a renewal ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Renewed; the lock, if one was given, is proved.
    /// With the ttl that the lease was granted with: an adopted one may be older than the spec.
    Renewed { sent: BootTime, ttl: Duration },
    /// The lock is not ours; the lease was renewed if `sent` says when.
    LockNotOurs { sent: Option<BootTime>, found: String },
    /// There is no such lease.
    LeaseNotFound,
    /// Nobody knows: etcd could not be asked.
    Failed(String),
    /// Nobody knows: what answered is another etcd, or one from the past.
    Suspicious(String),
}

type Stream = Box<(LeaseKeeper, LeaseKeepAliveStream)>;

/// The connections of the lease thread.
pub(super) struct Renewer {
    pool: Pool,
    keys: Keys,
    /// An open stream per endpoint, for one lease.
    streams: Vec<Option<Stream>>,
    streams_of: Option<LeaseIdentity>,
}

/// What one try at one endpoint came to.
enum Tried {
    Done(Outcome, Option<Stream>),
    Not(Failure),
}

impl Renewer {
    pub(super) fn new(pool: Pool) -> Self {
        let keys = pool.settings().keys();
        let streams = pool.order().iter().map(|_| None).collect();
        Self { pool, keys, streams, streams_of: None }
    }

    /// Gets a lease. The send time is from before the request was handed to the client.
    pub(super) async fn grant(&mut self, ttl: Duration, budget: Duration) -> Result<(LeaseIdentity, BootTime), String> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let sent = BootTime::now();
        let call = |mut client: Client| -> crate::etcd::pool::Boxed<_> { Box::pin(async move { client.lease_grant(seconds, None).await }) };
        let answer = tokio::time::timeout(budget.max(self.pool.settings().request_timeout), self.pool.ask(Kind::Write, call)).await;
        let (_, granted) = answer.map_err(|_| format!("no lease within {budget:?}"))?.map_err(|e| e.to_string())?;
        if granted.ttl() < seconds {
            return Err(format!("etcd granted {} s although {seconds} s were asked for", granted.ttl()));
        }
        let cluster = EtcdClusterId(granted.header().map_or(0, ResponseHeader::cluster_id));
        Ok((LeaseIdentity { cluster, lease: LeaseId(granted.id()) }, sent))
    }

    pub(super) async fn revoke(&self, lease: LeaseIdentity) -> Result<(), EtcdError> {
        let id = lease.lease.0;
        self.pool.ask(Kind::Write, move |mut client| Box::pin(async move { client.lease_revoke(id).await })).await.map(|_| ())
    }

    /// Renews and proves. A silent endpoint gets the next one beside it after a part of the budget; each has its own send time.
    pub(super) async fn renew(&mut self, lease: LeaseIdentity, lock: Option<LockIdentity>, budget: Duration, hear_first: bool) -> Outcome {
        if self.streams_of != Some(lease) {
            self.streams.iter_mut().for_each(|stream| *stream = None);
            self.streams_of = Some(lease);
        }
        let order = self.pool.order();
        let patience = hedge_after(budget, order.len());
        let mut to_try = order.iter().cycle().take(order.len() * ROUNDS).copied();
        let deadline = Instant::now() + budget;
        let mut failures = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut running = FuturesUnordered::new();
        let (pool, keys, streams) = (&self.pool, &self.keys, &mut self.streams);
        let mut more = true;
        let outcome = loop {
            match to_try.next() {
                Some(index) if !open.contains(&index) => {
                    let stream = streams.get_mut(index).and_then(Option::take);
                    open.push(index);
                    running
                        .push(async move { (index, try_one(pool, keys, index, stream, Asked { lease, lock, budget, hear_first }).await) });
                }
                Some(_) => {}
                None => more = false,
            }
            if running.is_empty() && !more {
                break None;
            }
            tokio::select! {
                Some((index, tried)) = running.next() => {
                    open.retain(|other| *other != index);
                    match tried {
                        Tried::Done(outcome, stream) => {
                            if let Some(kept) = streams.get_mut(index) {
                                *kept = stream;
                            }
                            pool.prefer(index);
                            break Some(outcome);
                        }
                        Tried::Not(failure) => {
                            pool.forget(index);
                            failures.push((pool.url(index).to_owned(), failure));
                        }
                    }
                }
                () = tokio::time::sleep(patience), if more => {}
                () = tokio::time::sleep_until(deadline) => {
                    let silent = |index: &usize| (pool.url(*index).to_owned(), Failure::NoAnswer(format!("no answer within {budget:?}")));
                    failures.extend(open.iter().map(silent));
                    break None;
                }
            }
        };
        drop(running);
        open.iter().for_each(|index| self.pool.forget(*index));
        outcome.unwrap_or_else(|| {
            if let Some(first) = order.first() {
                self.pool.move_on(*first);
            }
            let suspicious = failures.iter().any(|(_, failure)| matches!(failure, Failure::Suspicious(_)));
            let why = conclude(&failures, false).to_string();
            if suspicious { Outcome::Suspicious(why) } else { Outcome::Failed(why) }
        })
    }
}

/// What is to be renewed, and how.
#[derive(Clone, Copy)]
struct Asked {
    lease: LeaseIdentity,
    lock: Option<LockIdentity>,
    budget: Duration,
    /// Nothing is renewed at an endpoint that has not answered just before.
    hear_first: bool,
}

async fn try_one(
    pool: &Pool,
    keys: &Keys,
    index: usize,
    stream: Option<Stream>,
    Asked { lease, lock, budget, hear_first }: Asked,
) -> Tried {
    let mut client = match pool.client(index, budget).await {
        Ok(client) => client,
        Err(e) => return Tried::Not(classify(&e)),
    };
    if let Some(lock) = lock.filter(|_| hear_first) {
        match prove(&mut client, keys, lock, pool.url(index)).await {
            Ok(Proof::Ours { .. }) => {}
            Ok(Proof::NotOurs { found }) => return Tried::Done(Outcome::LockNotOurs { sent: None, found }, None),
            Err(failure) => return Tried::Not(failure),
        }
    }
    let sent = BootTime::now();
    let (term, ttl, stream) = match keep_alive(&mut client, stream, lease, pool.url(index)).await {
        Ok(Some(renewed)) => renewed,
        Ok(None) => return confirm_not_found(&mut client, keys, lease, lock, pool.url(index)).await,
        Err(failure) => return Tried::Not(failure),
    };
    let Some(lock) = lock else {
        return Tried::Done(Outcome::Renewed { sent, ttl }, Some(stream));
    };
    match prove(&mut client, keys, lock, pool.url(index)).await.and_then(|proof| weigh(sent, ttl, term, proof)) {
        Ok(outcome) => Tried::Done(outcome, Some(stream)),
        Err(failure) => Tried::Not(failure),
    }
}

/// What a renewal and the proof after it are worth together. That the lock is not ours needs no more than the proof; that it is, counts
/// only for the etcd leader that the renewal reached.
fn weigh(sent: BootTime, ttl: Duration, renewed_in_term: u64, proof: Proof) -> Result<Outcome, Failure> {
    match proof {
        Proof::NotOurs { found } => Ok(Outcome::LockNotOurs { sent: Some(sent), found }),
        Proof::Ours { term } if term == renewed_in_term => Ok(Outcome::Renewed { sent, ttl }),
        Proof::Ours { term } => {
            Err(Failure::Busy(format!("etcd's raft term went from {renewed_in_term} to {term} between the renewal and its proof")))
        }
    }
}

/// One keepalive on a stream that has nothing outstanding. None: there is no such lease. Otherwise the raft term of the answer, and the
/// lease's ttl as it was granted.
async fn keep_alive(
    client: &mut Client,
    stream: Option<Stream>,
    lease: LeaseIdentity,
    endpoint: &str,
) -> Result<Option<(u64, Duration, Stream)>, Failure> {
    let mut stream = match stream {
        Some(stream) => stream,
        // Opening sends a keepalive and takes its answer in, without its header; a ttl of 0 comes back as this error and no other.
        None => match client.lease_keep_alive(lease.lease.0).await {
            Ok(stream) => Box::new(stream),
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => return Ok(None),
            Err(e) => return Err(classify(&e)),
        },
    };
    let (keeper, answers) = &mut *stream;
    keeper.keep_alive().await.map_err(|_| Failure::NotSent("the keepalive stream is closed".into()))?;
    let answer = answers.message().await.map_err(|e| classify(&e))?;
    let answer = answer.ok_or_else(|| Failure::NoAnswer("the keepalive stream ended".into()))?;
    let header = answer.header().ok_or_else(|| Failure::Busy("the answer has no header".into()))?;
    same_cluster(header, lease, endpoint)?;
    if answer.id() != lease.lease.0 {
        return Err(Failure::Busy(format!("the answer is about lease {}", answer.id())));
    }
    let seconds = u64::try_from(answer.ttl()).unwrap_or(0);
    if seconds == 0 {
        return Ok(None);
    }
    Ok(Some((header.raft_term(), Duration::from_secs(seconds), stream)))
}

enum Proof {
    Ours { term: u64 },
    NotOurs { found: String },
}

async fn prove(client: &mut Client, keys: &Keys, lock: LockIdentity, endpoint: &str) -> Result<Proof, Failure> {
    let ours = [
        Compare::create_revision(keys.leader(), CompareOp::Equal, lock.epoch.0),
        Compare::lease(keys.leader(), CompareOp::Equal, lock.lease.lease.0),
    ];
    let otherwise = [TxnOp::get(keys.leader(), None), TxnOp::delete(keys.never(), None)];
    let response = match client.txn(Txn::new().when(ours).or_else(otherwise)).await {
        Ok(response) => response,
        Err(e) if is_no_space(&e) => return prove_without_space(client, keys, lock, endpoint).await,
        Err(e) => return Err(classify(&e)),
    };
    let header = response.header().ok_or_else(|| Failure::Busy("the answer has no header".into()))?;
    same_cluster(header, lock.lease, endpoint)?;
    if response.succeeded() {
        return Ok(Proof::Ours { term: header.raft_term() });
    }
    Ok(Proof::NotOurs { found: describe(found_one(&response, 0).as_ref()) })
}

/// A full etcd refuses every transaction (SAFETY row 44). A plain deletion of the key that never exists is not refused and goes through
/// raft; when it is answered, this member has applied it, and what it then says of the leader key is not older.
async fn prove_without_space(client: &mut Client, keys: &Keys, lock: LockIdentity, endpoint: &str) -> Result<Proof, Failure> {
    let no_header = || Failure::Busy("the answer has no header".into());
    let barrier = client.delete(keys.never(), None).await.map_err(|e| classify(&e))?.take_header().ok_or_else(no_header)?;
    same_cluster(&barrier, lock.lease, endpoint)?;
    let read = client.get(keys.leader(), None).await.map_err(|e| classify(&e))?;
    let header = read.header().ok_or_else(no_header)?;
    same_cluster(header, lock.lease, endpoint)?;
    if header.revision() < barrier.revision() {
        return Err(Failure::Busy("the leader key was read from the past".into()));
    }
    let leader = read.kvs().first().map(Kv::from);
    let ours = |kv: &Kv| kv.create_revision == lock.epoch.0 && kv.lease == lock.lease.lease.0;
    Ok(match leader.as_ref() {
        Some(kv) if ours(kv) => Proof::Ours { term: barrier.raft_term() },
        found => Proof::NotOurs { found: describe(found) },
    })
}

fn describe(leader: Option<&Kv>) -> String {
    leader.map_or_else(
        || "no leader".to_owned(),
        |kv| format!("`{}` on lease {:x} under epoch {}", shorten(&text(kv)), kv.lease, kv.create_revision),
    )
}

/// "No such lease" from another etcd cluster, or while the lock still hangs on the lease, is not believed.
async fn confirm_not_found(client: &mut Client, keys: &Keys, lease: LeaseIdentity, lock: Option<LockIdentity>, endpoint: &str) -> Tried {
    let nowhere = LockIdentity { lease, epoch: crate::types::Epoch(-1) };
    match prove(client, keys, lock.unwrap_or(nowhere), endpoint).await {
        Ok(Proof::NotOurs { .. }) => Tried::Done(Outcome::LeaseNotFound, None),
        Ok(Proof::Ours { .. }) => Tried::Not(Failure::Busy("etcd does not know the lease that the lock hangs on".into())),
        Err(failure) => Tried::Not(failure),
    }
}

fn same_cluster(header: &ResponseHeader, lease: LeaseIdentity, endpoint: &str) -> Result<(), Failure> {
    let (expected, found) = (lease.cluster.0, header.cluster_id());
    if expected == found {
        return Ok(());
    }
    Err(Failure::Suspicious(Suspicion::OtherCluster { endpoint: endpoint.to_owned(), expected, found }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_from_another_raft_term_than_the_renewal_does_not_count() {
        let sent = BootTime(1);
        let ttl = Duration::from_secs(10);
        assert_eq!(weigh(sent, ttl, 4, Proof::Ours { term: 4 }), Ok(Outcome::Renewed { sent, ttl }));
        for term in [3, 5] {
            assert!(weigh(sent, ttl, 4, Proof::Ours { term }).is_err(), "{term}");
        }
    }

    #[test]
    fn a_lock_that_is_not_ours_is_not_ours_in_any_term() {
        let outcome = weigh(BootTime(1), Duration::from_secs(10), 4, Proof::NotOurs { found: "b".into() });
        assert_eq!(outcome, Ok(Outcome::LockNotOurs { sent: Some(BootTime(1)), found: "b".into() }));
    }
}
