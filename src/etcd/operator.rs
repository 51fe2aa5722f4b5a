//! What operators write and read: the spec, requests, events.
//!
//! The spec is replaced by compare-and-swap only, so that of two that apply at once one is told. A request hangs on a lease of its own
//! until a leader takes it up: nothing is begun long after its requester gave up.

use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp};

use super::client::{Etcd, found_one};
use super::error::EtcdError;
use super::keys::{Key, relative};
use super::leader::json;
use super::pool::Kind;
use super::view::Kv;
use crate::clock::wall_clock;
use crate::facts::cluster::{DecisionRecord, SpecRecord};
use crate::facts::maintenance::MaintenanceRecord;
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::types::{MemberName, Revision};

/// Specs that `spec-history/` keeps.
pub const SPEC_HISTORY_KEPT: u64 = 20;
/// Decisions that `events/` keeps, give or take what each daemon writes between two trims.
pub const EVENTS_KEPT: u32 = 1_000;
/// Events of one handle between two trims; the first one trims too.
const EVENTS_BETWEEN_TRIMS: u64 = 50;

/// How long an answer is there for a requester that comes back for it.
pub const ANSWER_KEPT_S: i64 = 600;

/// How applying a spec ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is in force.
    Applied {
        /// Its generation.
        generation: u64,
    },
    /// Somebody else's is; nothing was written.
    Conflict {
        /// The generation in force, if there is one.
        found: Option<u64>,
    },
}

impl Etcd {
    /// Puts a spec in force, as typed. With `expected_generation` only over that one (0: only if there is none); without, over
    /// whichever is in force when it is read. A spec that cannot be read is replaced.
    ///
    /// # Errors
    /// When etcd cannot be asked, or it is not known whether the spec is in force.
    pub async fn apply_spec(&self, document: &str, by: &str, expected_generation: Option<u64>) -> Result<Applied, EtcdError> {
        let (endpoint, before) = self.read(&[&Key::Spec]).await?;
        let before = before.into_iter().next().flatten();
        let found = before.as_ref().and_then(generation_of);
        if expected_generation.is_some_and(|expected| expected != found.unwrap_or(0)) {
            return Ok(Applied::Conflict { found });
        }
        // Where the spec is gone or unreadable, its history still says which generations have been used.
        let last = match found {
            Some(found) => found,
            None => self.spec_generations().await?.into_iter().max().unwrap_or(0),
        };
        let record = SpecRecord { generation: last + 1, document: document.to_owned(), by: by.to_owned(), at: wall_clock() };
        let value = json(&Key::Spec, &record)?;
        let txn = self.apply_txn(before.map_or(0, |kv| kv.mod_revision), record.generation, &value);
        let applied = Applied::Applied { generation: record.generation };
        match self.transact_once(endpoint, txn).await {
            Ok(response) if response.succeeded() => Ok(applied),
            Ok(_) => Ok(Applied::Conflict { found: self.read_one(&Key::Spec).await?.as_ref().and_then(generation_of) }),
            Err(EtcdError::Unknown(why)) => {
                let now = self.read_one(&Key::Spec).await?;
                if now.is_some_and(|kv| kv.value == value) { Ok(applied) } else { Err(EtcdError::Unknown(why)) }
            }
            Err(e) => Err(e),
        }
    }

    fn apply_txn(&self, mod_revision: i64, generation: u64, value: &[u8]) -> Txn {
        let spec = self.keys.path(&Key::Spec);
        let mut writes =
            vec![TxnOp::put(spec.clone(), value, None), TxnOp::put(self.keys.path(&Key::SpecHistory(generation)), value, None)];
        if let Some(old) = generation.checked_sub(SPEC_HISTORY_KEPT) {
            writes.push(TxnOp::delete(self.keys.path(&Key::SpecHistory(old)), None));
        }
        Txn::new().when([Compare::mod_revision(spec, CompareOp::Equal, mod_revision)]).and_then(writes)
    }

    /// The spec in force.
    ///
    /// # Errors
    /// When etcd cannot be asked, or the record cannot be read.
    pub async fn read_spec(&self) -> Result<Option<SpecRecord>, EtcdError> {
        self.read_one(&Key::Spec).await?.map(|kv| parse(&Key::Spec, &kv)).transpose()
    }

    /// Generations that `spec-history/` has, in order.
    ///
    /// # Errors
    /// When etcd cannot be asked.
    pub async fn spec_generations(&self) -> Result<Vec<u64>, EtcdError> {
        let (from, to) = self.keys.folder("spec-history");
        let response = self.range(from, GetOptions::new().with_range(to).with_keys_only()).await?;
        let number = |key| if let Some(Key::SpecHistory(generation)) = key { Some(generation) } else { None };
        let mut generations: Vec<u64> = response.kvs().iter().filter_map(|kv| number(self.keys.parse(kv.key()))).collect();
        generations.sort_unstable();
        Ok(generations)
    }

    /// An older spec.
    ///
    /// # Errors
    /// When etcd cannot be asked, or the record cannot be read.
    pub async fn read_old_spec(&self, generation: u64) -> Result<Option<SpecRecord>, EtcdError> {
        let key = Key::SpecHistory(generation);
        self.read_one(&key).await?.map(|kv| parse(&key, &kv)).transpose()
    }

    /// Asks the cluster for something. The request goes away by itself after `ttl`, unless it is for a later time. Answers with its id.
    ///
    /// # Errors
    /// When etcd cannot be asked; on [`EtcdError::Unknown`] the request may be there, until its ttl, under the id that the error names.
    pub async fn create_request(&self, ask: Ask, by: &str, ttl: Duration) -> Result<String, EtcdError> {
        let lease = self.grant(i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX)).await?;
        // A lease id is unique in its etcd cluster, and so is the request's.
        let id = format!("{lease:x}");
        let key = Key::Request(id.clone());
        let record = RequestRecord { ask, by: by.to_owned(), at: wall_clock(), progress: RequestProgress::Created };
        let path = self.keys.path(&key);
        // One for a later time waits for it, and goes by an operator's hand; the lease was for its name only.
        let expiry = record.ask.at_s().is_none().then(|| PutOptions::new().with_lease(lease));
        let put = TxnOp::put(path.clone(), json(&key, &record)?, expiry);
        let txn = Txn::new().when([Compare::create_revision(path, CompareOp::Equal, 0)]).and_then([put]);
        match self.transact(txn).await {
            Ok(_) => Ok(id),
            Err(EtcdError::Unknown(why)) => Err(EtcdError::Unknown(format!("{why}; if it did, the request has the id {id}"))),
            Err(error) => Err(error),
        }
    }

    /// A lease that runs out by itself; so does one that was granted and whose answer was lost.
    async fn grant(&self, seconds: i64) -> Result<i64, EtcdError> {
        let grant = move |mut client: etcd_client::Client| -> super::pool::Boxed<_> {
            Box::pin(async move { client.lease_grant(seconds, None).await })
        };
        Ok(self.pool.ask(Kind::Write, grant).await?.1.id())
    }

    /// Says how far a request got, if nobody else did since `mod_revision`. Once it is taken up it does not expire any more, whatever becomes
    /// of the requester's lease; an answer is kept for [`ANSWER_KEPT_S`].
    ///
    /// # Errors
    /// When etcd cannot be asked, or it is not known whether it was written.
    pub async fn update_request(&self, id: &str, mod_revision: Revision, progress: RequestProgress) -> Result<bool, EtcdError> {
        let key = Key::Request(id.to_owned());
        let path = self.keys.path(&key);
        let Some(found) = self.read_one(&key).await? else { return Ok(false) };
        let record = RequestRecord { progress, ..parse(&key, &found)? };
        let value = json(&key, &record)?;
        let lease = if record.progress.is_open() { None } else { Some(PutOptions::new().with_lease(self.grant(ANSWER_KEPT_S).await?)) };
        let txn = Txn::new()
            .when([Compare::mod_revision(path.clone(), CompareOp::Equal, mod_revision.0)])
            .and_then([TxnOp::put(path.clone(), value.clone(), lease)])
            .or_else([TxnOp::get(path, None)]);
        let response = self.transact(txn).await?;
        Ok(response.succeeded() || found_one(&response, 0).is_some_and(|kv| kv.value == value))
    }

    /// A request as it stands; None when it is answered and deleted, or expired.
    ///
    /// # Errors
    /// When etcd cannot be asked, or the record cannot be read.
    pub async fn read_request(&self, id: &str) -> Result<Option<RequestKey>, EtcdError> {
        let key = Key::Request(id.to_owned());
        let Some(kv) = self.read_one(&key).await? else { return Ok(None) };
        Ok(Some(RequestKey { record: parse(&key, &kv)?, mod_revision: Revision(kv.mod_revision) }))
    }

    /// Takes a request back if it is as it was read. False = somebody has taken it up, or it is gone.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn cancel_request(&self, id: &str, mod_revision: Revision) -> Result<bool, EtcdError> {
        let path = self.keys.path(&Key::Request(id.to_owned()));
        let txn =
            Txn::new().when([Compare::mod_revision(path.clone(), CompareOp::Equal, mod_revision.0)]).and_then([TxnOp::delete(path, None)]);
        Ok(self.transact(txn).await?.succeeded())
    }

    /// Takes a request back, or clears it away; its lease runs out by itself.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn delete_request(&self, id: &str) -> Result<(), EtcdError> {
        let path = self.keys.path(&Key::Request(id.to_owned()));
        self.transact(Txn::new().and_then([TxnOp::delete(path, None)])).await.map(|_| ())
    }

    /// Sets maintenance mode, or ends it, over the key as it was read (`over`; 0 = it was absent) and while the lock is as it was read
    /// (`leader`: its mod revision; 0 = nobody holds it): so a hand-over of the lock is not cut in two. False = something has changed.
    ///
    /// # Errors
    /// When etcd cannot be asked, or it is not known whether it was written.
    pub async fn set_maintenance(&self, record: &MaintenanceRecord, over: Revision, leader: Revision) -> Result<bool, EtcdError> {
        let put = TxnOp::put(self.keys.path(&Key::Maintenance), json(&Key::Maintenance, record)?, None);
        self.change_maintenance(over, leader, put).await
    }

    /// While `maintenance` and the lock are as they were read.
    async fn change_maintenance(&self, over: Revision, leader: Revision, change: TxnOp) -> Result<bool, EtcdError> {
        let as_read = [
            Compare::mod_revision(self.keys.path(&Key::Maintenance), CompareOp::Equal, over.0),
            Compare::mod_revision(self.keys.leader(), CompareOp::Equal, leader.0),
        ];
        Ok(self.transact(Txn::new().when(as_read).and_then([change])).await?.succeeded())
    }

    /// Deletes `maintenance` as it was read, and all that members noted beside it, whoever has heard of it. False = it has changed.
    ///
    /// # Errors
    /// When etcd cannot be asked, or it is not known whether it was deleted.
    pub async fn insist_on_the_end_of_maintenance(&self, as_read: Revision) -> Result<bool, EtcdError> {
        let path = self.keys.path(&Key::Maintenance);
        let (from, to) = self.keys.folder("maintenance");
        let unchanged = Compare::mod_revision(path.clone(), CompareOp::Equal, as_read.0);
        let notes = TxnOp::delete(from, Some(DeleteOptions::new().with_range(to)));
        Ok(self.transact(Txn::new().when([unchanged]).and_then([TxnOp::delete(path, None), notes])).await?.succeeded())
    }

    /// Notes that a member's guard may suspend the lock's deadlines, or takes that back, while `maintenance` is as it was seen. Not on a
    /// lease: the guard goes on when its daemon does not. False = `maintenance` has changed.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn note_suspension(&self, member: &MemberName, seen: Revision, suspends: bool) -> Result<bool, EtcdError> {
        let path = self.keys.path(&Key::Suspended(member.clone()));
        let as_seen = Compare::mod_revision(self.keys.path(&Key::Maintenance), CompareOp::Equal, seen.0);
        let write = if suspends { TxnOp::put(path, seen.to_string(), None) } else { TxnOp::delete(path, None) };
        Ok(self.transact(Txn::new().when([as_seen]).and_then([write])).await?.succeeded())
    }

    /// Deletes `maintenance` as it was seen, while the lock is as it was seen (0 = nobody holds it). False = one of them has changed.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn end_maintenance(&self, seen: Revision, leader: Revision) -> Result<bool, EtcdError> {
        self.change_maintenance(seen, leader, TxnOp::delete(self.keys.path(&Key::Maintenance), None)).await
    }

    /// Records a decision. Now and then it also deletes the oldest.
    ///
    /// # Errors
    /// When etcd cannot be asked, or did not answer.
    pub async fn append_event(&self, event: &DecisionRecord) -> Result<(), EtcdError> {
        let count = self.events.fetch_add(1, Ordering::Relaxed);
        if self.pool.revision() == Revision(0) {
            self.read(&[&Key::Leader]).await?;
        }
        let key = self.keys.event(self.pool.revision().0, &event.member, count);
        let value = json(&Key::Event(String::new()), event)?;
        self.transact(Txn::new().and_then([TxnOp::put(key, value, None)])).await?;
        if count.is_multiple_of(EVENTS_BETWEEN_TRIMS) {
            self.trim_events().await?;
        }
        Ok(())
    }

    async fn trim_events(&self) -> Result<(), EtcdError> {
        let (from, to) = self.keys.folder("events");
        let all = GetOptions::new().with_range(to.clone());
        let count = self.range(from.clone(), all.clone().with_count_only()).await?.count();
        let surplus = count - i64::from(EVENTS_KEPT);
        if surplus <= 0 {
            return Ok(());
        }
        // One more than goes, so that its key is where the deletion ends.
        let oldest = self.range(from.clone(), all.with_keys_only().with_limit(surplus + 1)).await?;
        let Some(first_kept) = oldest.kvs().last().filter(|_| oldest.kvs().len() as i64 == surplus + 1) else { return Ok(()) };
        self.delete_range(from, String::from_utf8_lossy(first_kept.key()).into_owned()).await
    }

    /// The last `limit` decisions, oldest first. One that cannot be read is left out.
    ///
    /// # Errors
    /// When etcd cannot be asked.
    pub async fn read_events(&self, limit: u32) -> Result<Vec<DecisionRecord>, EtcdError> {
        let (from, to) = self.keys.folder("events");
        let newest = GetOptions::new().with_range(to).with_sort(SortTarget::Key, SortOrder::Descend).with_limit(i64::from(limit.max(1)));
        let response = self.range(from, newest).await?;
        Ok(response.kvs().iter().rev().filter_map(|kv| serde_json::from_slice(kv.value()).ok()).collect())
    }
}

fn generation_of(kv: &Kv) -> Option<u64> {
    super::view::json::<SpecRecord>(kv).ok().map(|record| record.generation)
}

fn parse<T: serde::de::DeserializeOwned>(key: &Key, kv: &Kv) -> Result<T, EtcdError> {
    super::view::json(kv).map_err(|why| EtcdError::Unreadable { key: relative(key), why })
}
