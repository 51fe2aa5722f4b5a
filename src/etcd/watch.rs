//! Keeps a [`ClusterView`] current: lists, watches from the revision after the list, lists again at any doubt.
//!
//! After a cancelled, compacted, broken or silent watch nothing is assumed to have been seen. Silence is found out by asking the stream
//! for its progress, one question at a time; and because a watch can lose events without a sign (etcd before 3.4.36 and 3.5.18), a
//! list is made beside it now and then, and wins.
//!
//! The rule that would surprise: an event does not make the view fresher. `as_of` is when the list, or the question for progress, was
//! sent: an event may have been on its way for long. (etcd before 3.4.25 and 3.5.8 may let an answer overtake events by milliseconds,
//! etcd #15220.)

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::task::JoinHandle;

use super::client::Etcd;
use super::error::{EtcdError, Suspicion, classify};
use super::pool::ANSWER_MAX_BYTES;
use super::view::{Change, Kv, apply};
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;

/// First and longest pause between two failed tries.
const RETRY_MIN_MS: u64 = 100;
/// See [`RETRY_MIN_MS`].
const RETRY_MAX_MS: u64 = 1_000;
/// Questions for progress within one [`WatchTimes::silence`].
const QUESTIONS_PER_SILENCE: u32 = 3;
/// What etcd puts as watch id into the answer to a question for progress.
const PROGRESS_WATCH_ID: i64 = -1;

/// What the watch says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// All keys. The same allocation as before when nothing changed but `as_of`.
    View {
        /// The view.
        view: Arc<ClusterView>,
        /// It holds everything that etcd had at this time.
        as_of: BootTime,
    },
    /// etcd cannot be asked. Sent again with each failed try.
    Unreachable {
        /// The first failed try.
        since: BootTime,
        /// A sentence.
        why: String,
    },
    /// Only answers that cannot be trusted came: nobody may acquire the lock (SAFETY row 43). Sent again with each failed try.
    Suspicious {
        /// What is wrong.
        why: Suspicion,
    },
}

/// Bounds of the watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchTimes {
    /// Longest wait for an answer of the stream to a question for its progress.
    pub silence: Duration,
    /// Between two lists beside a watch that seems to be well.
    pub list_every: Duration,
}

impl WatchTimes {
    /// For a lease of this ttl: a third of it may pass in silence.
    pub fn for_ttl(ttl: Duration) -> Self {
        Self { silence: ttl / 3, list_every: ttl }
    }
}

/// Ends the watch when dropped.
#[derive(Debug)]
pub struct WatchHandle(JoinHandle<()>);

impl Drop for WatchHandle {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Etcd {
    /// Watches until the handle is dropped. `sink` is called on the runtime's threads and must not block.
    pub fn watch(&self, times: WatchTimes, sink: impl Fn(WatchEvent) + Send + Sync + 'static) -> WatchHandle {
        let watcher = Watcher { etcd: self.clone(), times, sink: Box::new(sink) };
        WatchHandle(tokio::spawn(async move { watcher.run().await }))
    }
}

struct Watcher {
    etcd: Etcd,
    times: WatchTimes,
    sink: Box<dyn Fn(WatchEvent) + Send + Sync>,
}

/// What is known, and how well.
struct Known {
    view: Arc<ClusterView>,
    as_of: BootTime,
    endpoint: usize,
}

/// Why one watch ended.
enum End {
    /// The endpoint is not trusted with the next one.
    Endpoint(String),
    /// The watch is of no use any more; the endpoint is well.
    Relist(String),
    /// A list saw more than the watch had delivered: go on from there.
    Behind(Known),
}

impl Watcher {
    async fn run(self) {
        let mut failing_since = None;
        let mut pause_ms = RETRY_MIN_MS;
        loop {
            match self.etcd.list().await {
                Ok((view, as_of, endpoint)) => {
                    failing_since = None;
                    let begun = BootTime::now();
                    self.follow_all(Known { view: Arc::new(view), as_of, endpoint }).await;
                    if begun.since(as_of) < self.times.silence && BootTime::now().since(begun) > Duration::from_millis(RETRY_MAX_MS) {
                        pause_ms = RETRY_MIN_MS;
                        continue;
                    }
                }
                Err(EtcdError::Suspicious(why)) => (self.sink)(WatchEvent::Suspicious { why }),
                Err(e) => {
                    let since = *failing_since.get_or_insert_with(BootTime::now);
                    (self.sink)(WatchEvent::Unreachable { since, why: e.to_string() });
                }
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = (pause_ms * 2).min(RETRY_MAX_MS);
        }
    }

    /// Watches from one list to the next need of one.
    async fn follow_all(&self, mut known: Known) {
        loop {
            self.say_unreadable(&known.view);
            self.tell(&known);
            let endpoint = known.endpoint;
            match self.follow(known).await {
                End::Behind(newer) => known = newer,
                End::Relist(why) => {
                    tracing::debug!(endpoint = self.etcd.pool.url(endpoint), why, "listing again");
                    return;
                }
                End::Endpoint(why) => {
                    tracing::info!(endpoint = self.etcd.pool.url(endpoint), why, "the etcd watch ended; listing again elsewhere");
                    self.etcd.pool.move_on(endpoint);
                    return;
                }
            }
        }
    }

    async fn open(&self, known: &Known) -> Result<WatchStream, String> {
        let client = self.etcd.pool.client(known.endpoint, self.times.silence).await.map_err(|e| format!("{:?}", classify(&e)))?;
        let options = WatchOptions::new().with_prefix().with_start_revision(known.view.revision.0 + 1).with_progress_notify();
        let mut watch = client.watch_client().max_decoding_message_size(ANSWER_MAX_BYTES);
        watch.watch(self.etcd.keys.base(), Some(options)).await.map_err(|e| format!("{:?}", classify(&e)))
    }

    async fn follow(&self, mut known: Known) -> End {
        let silence = self.times.silence;
        let mut stream = match tokio::time::timeout(silence, self.open(&known)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(why)) => return End::Endpoint(why),
            Err(_) => return End::Endpoint(format!("no answer to the watch within {silence:?}")),
        };
        let mut question: Option<BootTime> = None;
        let mut tick = tokio::time::interval(silence / QUESTIONS_PER_SILENCE);
        let mut next_list = Box::pin(self.list_later());
        loop {
            tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(response)) => match self.take(&mut known, &response, &mut question) {
                        Ok(()) => {}
                        Err(end) => return end,
                    },
                    Ok(None) => return End::Endpoint("the stream ended".into()),
                    Err(e) => return End::Endpoint(format!("{:?}", classify(&e))),
                },
                _ = tick.tick() => match question {
                    Some(asked) if BootTime::now().since(asked) >= silence => {
                        return End::Endpoint(format!("the watch is silent: no answer within {silence:?}"));
                    }
                    Some(_) => {}
                    None => {
                        question = Some(BootTime::now());
                        // The queue is never full, with one question at a time; the bound is for a stream whose far end does not read.
                        if !matches!(tokio::time::timeout(silence, stream.request_progress()).await, Ok(Ok(()))) {
                            return End::Endpoint("the stream takes no questions".into());
                        }
                    }
                },
                listed = &mut next_list => match listed {
                    Ok((view, as_of, endpoint)) => {
                        if differ(&known.view, &view) {
                            return End::Behind(Known { view: Arc::new(view), as_of, endpoint });
                        }
                        known.as_of = known.as_of.max(as_of);
                        next_list = Box::pin(self.list_later());
                    }
                    Err(e) => return End::Relist(e.to_string()),
                },
            }
        }
    }

    async fn list_later(&self) -> Result<(ClusterView, BootTime, usize), EtcdError> {
        tokio::time::sleep(self.times.list_every).await;
        self.etcd.list().await
    }

    /// Takes one response in, and says what is new.
    fn take(&self, known: &mut Known, response: &WatchResponse, question: &mut Option<BootTime>) -> Result<(), End> {
        self.etcd.pool.judge(known.endpoint, 0, response.header()).map_err(|failure| End::Endpoint(format!("{failure:?}")))?;
        if response.canceled() || response.compact_revision() > 0 {
            let (reason, compacted) = (response.cancel_reason(), response.compact_revision());
            return Err(End::Relist(format!("etcd cancelled the watch: {reason}; compacted at {compacted}")));
        }
        let changes: Vec<Change> = response.events().iter().filter_map(change).collect();
        if !changes.is_empty() {
            let mut view = ClusterView::clone(&known.view);
            apply(&mut view, &self.etcd.keys, &changes);
            if view.unreadable != known.view.unreadable {
                self.say_unreadable(&view);
            }
            known.view = Arc::new(view);
            self.tell(known);
        } else if response.watch_id() == PROGRESS_WATCH_ID
            && response.header().is_some_and(|h| h.revision() >= known.view.revision.0)
            && let Some(asked) = question.take()
        {
            known.as_of = known.as_of.max(asked);
            self.tell(known);
        }
        Ok(())
    }

    fn tell(&self, known: &Known) {
        (self.sink)(WatchEvent::View { view: known.view.clone(), as_of: known.as_of });
    }

    fn say_unreadable(&self, view: &ClusterView) {
        for (key, why) in &view.unreadable {
            tracing::warn!(key, why, "a record in etcd cannot be read and counts as absent");
        }
    }
}

/// Whether a list at the same or a later revision holds something else than the view that a watch has kept.
fn differ(watched: &ClusterView, listed: &ClusterView) -> bool {
    if listed.revision < watched.revision {
        return false;
    }
    let mut same = watched.clone();
    same.revision = listed.revision;
    same != *listed
}

fn change(event: &etcd_client::Event) -> Option<Change> {
    let kv = Kv::from(event.kv()?);
    Some(match event.event_type() {
        EventType::Put => Change::Put(kv),
        EventType::Delete => Change::Delete { mod_revision: kv.mod_revision, key: kv.key },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Revision;

    #[test]
    fn a_list_that_only_counts_further_does_not_end_the_watch() {
        let watched = ClusterView { revision: Revision(5), ..ClusterView::default() };
        let mut listed = ClusterView { revision: Revision(9), ..ClusterView::default() };
        assert!(!differ(&watched, &listed), "other clusters' keys moved the revision");
        listed.sync_revision = Revision(8);
        assert!(differ(&watched, &listed), "the watch has not delivered a change");
        listed.revision = Revision(4);
        assert!(!differ(&watched, &listed), "the watch is ahead of the list");
    }
}
