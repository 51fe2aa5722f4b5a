//! One client per endpoint, and the fail-over between them.
//!
//! etcd-client's own balancing puts a request behind a connection that hangs, so each endpoint gets a client of its own. A call starts
//! at the endpoint that worked last; an endpoint that fails is followed by the next at once, and one that is merely silent gets the next
//! one **beside** it after a part of the budget: so a hanging endpoint costs that part, and a slow one is not cut off. The first
//! trustworthy answer wins. Only requests that may be carried out twice are asked this way ([`Pool::ask`]); others go to an endpoint
//! that has just answered, once ([`Pool::ask_once`]).
//!
//! A client whose request went unanswered is dropped: the next one connects anew.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{
    Client, GetResponse, LeaseGrantResponse, LeaseRevokeResponse, LeaseTimeToLiveResponse, ResponseHeader, StatusResponse, TxnResponse,
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use super::error::{EtcdError, Failure, Suspicion, classify, conclude};
use super::settings::Settings;
use crate::types::{EtcdClusterId, Revision};

/// Longest wait for a silent endpoint before the next one is asked beside it. The shortest is a part of the budget.
const HEDGE_AFTER_MAX_MS: u64 = 500;
/// How long an endpoint that answered counts as one that answers. A host whose power is cut is missed only after the least ttl.
const JUST_NOW_MS: u64 = 250;
/// Largest answer that is taken: a spec of etcd's limit of 1.5 MB and the members' records fit many times.
pub(super) const ANSWER_MAX_BYTES: usize = 64 << 20;

pub(super) type Boxed<T> = Pin<Box<dyn Future<Output = Result<T, etcd_client::Error>> + Send>>;

/// Whether a request changes anything: then no answer means that nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// An answer's header.
pub(super) trait Answer {
    fn header(&self) -> Option<&ResponseHeader>;

    /// Whether it went through raft, so that its revision is not lower than any seen before.
    fn is_linearizable() -> bool {
        true
    }
}

impl Answer for LeaseTimeToLiveResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }

    fn is_linearizable() -> bool {
        false
    }
}

impl Answer for StatusResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }

    fn is_linearizable() -> bool {
        false
    }
}

macro_rules! answers {
    ($($type:ty),*) => {$(
        impl Answer for $type {
            fn header(&self) -> Option<&ResponseHeader> {
                self.header()
            }
        }
    )*};
}
answers!(TxnResponse, GetResponse, LeaseGrantResponse, LeaseRevokeResponse);

/// What was seen of etcd so far: an answer from another cluster, or from before what was seen, is not believed.
#[derive(Debug, Default)]
pub(super) struct Witness {
    cluster: Option<u64>,
    revision: i64,
}

impl Witness {
    /// Judges a linearizable answer to a request that was sent when `floor` was the highest revision seen.
    pub(super) fn judge(&mut self, endpoint: &str, floor: i64, cluster: u64, revision: i64) -> Result<(), Suspicion> {
        let expected = *self.cluster.get_or_insert(cluster);
        if expected != cluster {
            return Err(Suspicion::OtherCluster { endpoint: endpoint.to_owned(), expected, found: cluster });
        }
        if revision < floor {
            return Err(Suspicion::RevisionWentBack { endpoint: endpoint.to_owned(), seen: floor, found: revision });
        }
        self.revision = self.revision.max(revision);
        Ok(())
    }
}

struct Slot {
    url: String,
    client: Mutex<Option<Client>>,
}

pub(super) struct Pool {
    settings: Settings,
    slots: Vec<Slot>,
    preferred: AtomicUsize,
    /// Which endpoint answered last, and when.
    heard: Mutex<Option<(usize, Instant)>>,
    witness: Mutex<Witness>,
}

impl Pool {
    pub(super) fn new(settings: Settings) -> Result<Self, EtcdError> {
        settings.check()?;
        let slots = settings.endpoints.iter().map(|url| Slot { url: url.clone(), client: Mutex::new(None) }).collect();
        Ok(Self { settings, slots, preferred: AtomicUsize::new(0), heard: Mutex::new(None), witness: Mutex::new(Witness::default()) })
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The etcd cluster that answered first.
    pub(super) fn cluster(&self) -> Option<EtcdClusterId> {
        lock(&self.witness).cluster.map(EtcdClusterId)
    }

    /// The highest revision seen in a linearizable answer.
    pub(super) fn revision(&self) -> Revision {
        Revision(lock(&self.witness).revision)
    }

    pub(super) fn url(&self, index: usize) -> &str {
        self.slots.get(index).map_or("?", |slot| slot.url.as_str())
    }

    /// An endpoint that has answered just now, and nothing else since: what is sent once goes there without a question before it.
    pub(super) fn heard_just_now(&self) -> Option<usize> {
        lock(&self.heard).filter(|(_, at)| at.elapsed() < Duration::from_millis(JUST_NOW_MS)).map(|(index, _)| index)
    }

    /// Endpoints in the order they are to be tried.
    pub(super) fn order(&self) -> Vec<usize> {
        let count = self.slots.len();
        let first = self.preferred.load(Ordering::Relaxed);
        (0..count).map(|step| (first + step) % count).collect()
    }

    /// The endpoint to begin with the next time.
    pub(super) fn prefer(&self, index: usize) {
        self.preferred.store(index, Ordering::Relaxed);
    }

    /// Begins with the next endpoint from now on.
    pub(super) fn move_on(&self, from: usize) {
        self.forget(from);
        self.prefer((from + 1) % self.slots.len());
    }

    /// Drops the connection to an endpoint.
    pub(super) fn forget(&self, index: usize) {
        *lock(&self.heard) = None;
        if let Some(slot) = self.slots.get(index) {
            lock(&slot.client).take();
        }
    }

    /// The client of an endpoint, connected anew if there is none.
    pub(super) async fn client(&self, index: usize, budget: Duration) -> Result<Client, etcd_client::Error> {
        let Some(slot) = self.slots.get(index) else {
            return Err(etcd_client::Error::InvalidArgs(format!("there is no endpoint {index}")));
        };
        if let Some(client) = lock(&slot.client).clone() {
            return Ok(client);
        }
        let client = self.settings.connect(&slot.url, budget).await?;
        Ok(lock(&slot.client).insert(client).clone())
    }

    /// Judges an answer's header; an answer without one is not believed either.
    pub(super) fn judge(&self, index: usize, floor: i64, header: Option<&ResponseHeader>) -> Result<(), Failure> {
        let Some(header) = header else {
            return Err(Failure::Busy("the answer has no header".into()));
        };
        let mut witness = lock(&self.witness);
        witness.judge(self.url(index), floor, header.cluster_id(), header.revision()).map_err(Failure::Suspicious)
    }

    async fn attempt<T: Answer>(&self, index: usize, call: &(impl Fn(Client) -> Boxed<T> + Sync)) -> Result<T, Failure> {
        let floor = if T::is_linearizable() { self.revision().0 } else { 0 };
        let client = self.client(index, self.settings.request_timeout).await.map_err(|e| classify(&e))?;
        let answer = call(client).await.map_err(|e| classify(&e))?;
        self.judge(index, floor, answer.header())?;
        if T::is_linearizable() {
            *lock(&self.heard) = Some((index, Instant::now()));
        }
        Ok(answer)
    }

    /// Asks for something that may be carried out more than once. Answers with the endpoint that answered.
    pub(super) async fn ask<T: Answer>(&self, kind: Kind, call: impl Fn(Client) -> Boxed<T> + Sync) -> Result<(usize, T), EtcdError> {
        let budget = self.settings.request_timeout;
        let order = self.order();
        let hedge_after = hedge_after(budget, order.len());
        let deadline = Instant::now() + budget;
        let mut race = Race { order, next: 0, open: Vec::new(), failures: Vec::new() };
        let mut running = FuturesUnordered::new();
        loop {
            if running.is_empty() && race.next >= race.order.len() {
                return Err(conclude(&race.failures, kind == Kind::Write));
            }
            if let Some(index) = race.start() {
                let call = &call;
                running.push(async move { (index, self.attempt(index, call).await) });
            }
            tokio::select! {
                Some((index, result)) = running.next() => {
                    race.open.retain(|open| *open != index);
                    match result {
                        Ok(answer) => {
                            self.prefer(index);
                            race.open.iter().for_each(|slow| self.forget(*slow));
                            return Ok((index, answer));
                        }
                        Err(failure) => {
                            if !matches!(failure, Failure::Refused(_) | Failure::LeaseNotFound) {
                                self.forget(index);
                            }
                            race.failures.push((self.url(index).to_owned(), failure));
                        }
                    }
                }
                () = tokio::time::sleep(hedge_after), if race.next < race.order.len() => {}
                () = tokio::time::sleep_until(deadline) => {
                    for index in std::mem::take(&mut race.open) {
                        self.forget(index);
                        race.failures.push((self.url(index).to_owned(), Failure::NoAnswer(format!("no answer within {budget:?}"))));
                    }
                    return Err(conclude(&race.failures, kind == Kind::Write));
                }
            }
        }
    }

    /// Asks one endpoint, once. The caller has found out with [`Pool::ask`] that this endpoint answers.
    pub(super) async fn ask_once<T: Answer>(&self, index: usize, call: impl Fn(Client) -> Boxed<T> + Sync) -> Result<T, EtcdError> {
        let budget = self.settings.request_timeout;
        let failure = match tokio::time::timeout(budget, self.attempt(index, &call)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failure)) => failure,
            Err(_) => Failure::NoAnswer(format!("no answer within {budget:?}")),
        };
        if !matches!(failure, Failure::Refused(_) | Failure::LeaseNotFound) {
            self.move_on(index);
        }
        Err(conclude(&[(self.url(index).to_owned(), failure)], true))
    }
}

/// Which endpoints were asked, and how that went.
struct Race {
    order: Vec<usize>,
    next: usize,
    open: Vec<usize>,
    failures: Vec<(String, Failure)>,
}

impl Race {
    fn start(&mut self) -> Option<usize> {
        let index = *self.order.get(self.next)?;
        self.next += 1;
        self.open.push(index);
        Some(index)
    }
}

/// How long a silent endpoint is waited for before the next is asked beside it.
pub(super) fn hedge_after(budget: Duration, endpoints: usize) -> Duration {
    let part = budget / u32::try_from(endpoints).unwrap_or(u32::MAX).saturating_add(1);
    part.min(Duration::from_millis(HEDGE_AFTER_MAX_MS))
}

/// A poisoned lock holds nothing that a panic could have left half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_cluster_or_an_earlier_revision_is_not_believed() {
        let mut witness = Witness::default();
        assert_eq!(witness.judge("a", 0, 7, 100), Ok(()));
        assert!(matches!(witness.judge("b", 100, 8, 200), Err(Suspicion::OtherCluster { expected: 7, found: 8, .. })));
        assert!(matches!(witness.judge("b", 100, 7, 99), Err(Suspicion::RevisionWentBack { seen: 100, found: 99, .. })));
        assert_eq!(witness.revision, 100, "what is not believed is not remembered");
    }

    #[test]
    fn answers_that_overtook_each_other_are_not_suspicious() {
        let mut witness = Witness::default();
        assert_eq!(witness.judge("a", 0, 7, 100), Ok(()));
        assert_eq!(witness.judge("a", 90, 7, 95), Ok(()), "it was sent when only 90 had been seen");
    }

    #[test]
    fn a_hanging_endpoint_costs_a_part_of_the_budget_only() {
        for endpoints in 1..6 {
            assert!(hedge_after(Duration::from_millis(300), endpoints) * u32::try_from(endpoints).unwrap() < Duration::from_millis(300));
        }
        assert_eq!(hedge_after(Duration::from_secs(60), 1), Duration::from_millis(HEDGE_AFTER_MAX_MS));
    }
}
