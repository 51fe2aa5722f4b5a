//! The two clients of a measurement: one writes through HAProxy, one goes to the nodes themselves.
//!
//! The direct client does what a driver with several hosts and `target_session_attrs=read-write` does, without its pauses: it keeps a
//! connection to every node, and while the node that took the last row takes no more, it tries all of them. So what it sees is
//! PostgreSQL's own absence, and no health check's interval is in it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::join_all;
use tokio_postgres::Config;

use super::super::runtime::block_on;
use super::super::writer::{Outcome, Writer};
use super::statistics::outage;
use crate::clock::BootTime;

/// Time from one row to the next, in milliseconds.
const ROW_INTERVAL_MS: u64 = 5;
/// Pause before the next attempt to connect, in milliseconds. Shorter ones make a starting server refuse connections instead of recovering.
const RECONNECT_PAUSE_MS: u64 = 10;
/// After how long an attempt is given up as unknown, in milliseconds.
const ROW_LIMIT_MS: u64 = 1_000;
/// Limit of a connection attempt, in milliseconds.
const CONNECT_LIMIT_MS: u64 = 1_000;
/// The direct client tries the other nodes when no row was acknowledged for so long, in milliseconds.
const SILENCE_MS: u64 = 20;

/// One attempt to write a row, or to connect in order to.
#[derive(Debug, Clone)]
pub struct Tried {
    /// When its outcome was known.
    pub ended: BootTime,
    /// The node it went to; None through HAProxy.
    pub node: Option<usize>,
    /// None = acknowledged; else what happened instead.
    pub failure: Option<String>,
}

/// What all tasks of a client share.
#[derive(Debug, Default)]
struct Shared {
    tried: Mutex<Vec<Tried>>,
    done: AtomicBool,
    /// Nothing is written for now; connections stay open.
    paused: AtomicBool,
    /// When a row was acknowledged last, as [`BootTime`].
    last_ns: AtomicU64,
    /// Which node did.
    last_node: AtomicU64,
}

/// A client that writes until it is told to end.
#[derive(Debug)]
pub struct Client {
    name: &'static str,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Client {
    /// Writes to whatever answers at one place.
    pub fn through_haproxy(config: Config) -> Result<Client> {
        Client::start("haproxy", vec![(None, config)])
    }

    /// Writes to whichever node takes rows.
    pub fn direct(nodes: Vec<Config>) -> Result<Client> {
        Client::start("direct", nodes.into_iter().enumerate().map(|(index, config)| (Some(index), config)).collect())
    }

    fn start(name: &'static str, places: Vec<(Option<usize>, Config)>) -> Result<Client> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let work = async move {
            join_all(places.iter().map(|(node, config)| write(name, *node, config, &of_thread))).await;
            Ok(())
        };
        let thread = std::thread::Builder::new().name(format!("client-{name}")).spawn(move || block_on(work));
        Ok(Client { name, shared, thread: Some(thread.context("starting a client")?) })
    }

    /// What was tried so far.
    pub fn tried(&self) -> Vec<Tried> {
        self.shared.lock().clone()
    }

    /// How many rows were acknowledged after `since`.
    pub fn acknowledged_after(&self, since: BootTime) -> usize {
        self.shared.lock().iter().rev().take_while(|tried| tried.ended > since).filter(|tried| tried.failure.is_none()).count()
    }

    /// Forgets what was tried before `time`, but for the last acknowledgement.
    pub fn forget_before(&self, time: BootTime) {
        let mut tried = self.shared.lock();
        let last = tried.iter().rposition(|each| each.ended < time && each.failure.is_none()).unwrap_or(0);
        tried.drain(..last);
    }

    /// The longest time without an acknowledged row that ended after `fault`.
    pub fn outage_after(&self, fault: BootTime) -> Result<Duration> {
        let tried = self.shared.lock();
        let acknowledged: Vec<BootTime> = tried.iter().filter(|each| each.failure.is_none()).map(|each| each.ended).collect();
        outage(&acknowledged, fault).with_context(|| format!("no row of the client `{}` was acknowledged", self.name))
    }

    /// Stops writing, or goes on.
    pub fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::SeqCst);
    }

    /// What it says of itself.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Ends it.
    pub fn end(mut self) -> Result<()> {
        self.shared.done.store(true, Ordering::SeqCst);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().ok().context("a client panicked")?
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Tried>> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this node is to be tried now: it took the last row, or nobody does.
    fn is_due(&self, node: Option<usize>) -> bool {
        let Some(node) = node else { return true };
        let silent = BootTime::now().since(BootTime(self.last_ns.load(Ordering::SeqCst))) > Duration::from_millis(SILENCE_MS);
        silent || self.last_node.load(Ordering::SeqCst) == node as u64
    }

    fn note(&self, node: Option<usize>, failure: Option<String>) {
        let ended = BootTime::now();
        if failure.is_none() {
            self.last_node.store(node.unwrap_or(0) as u64, Ordering::SeqCst);
            self.last_ns.store(ended.0, Ordering::SeqCst);
        }
        self.lock().push(Tried { ended, node, failure });
    }
}

/// One row each interval over one connection; a new one as soon as that breaks.
async fn write(client: &str, node: Option<usize>, config: &Config, shared: &Shared) {
    let mut connection: Option<Writer> = None;
    let mut seq = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(ROW_INTERVAL_MS));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (connect_limit, row_limit) = (Duration::from_millis(CONNECT_LIMIT_MS), Duration::from_millis(ROW_LIMIT_MS));
    while !shared.done.load(Ordering::SeqCst) {
        tick.tick().await;
        if shared.paused.load(Ordering::SeqCst) || !shared.is_due(node) {
            continue;
        }
        let Some(writer) = connection.as_ref().filter(|writer| !writer.is_closed()) else {
            match Writer::connect(config, connect_limit).await {
                Ok(writer) => connection = Some(writer),
                Err(error) => {
                    shared.note(node, Some(format!("{error:#}")));
                    tokio::time::sleep(Duration::from_millis(RECONNECT_PAUSE_MS)).await;
                }
            }
            continue;
        };
        seq += 1;
        match tokio::time::timeout(row_limit, writer.insert(client, seq, client)).await.map(|attempt| attempt.outcome) {
            Ok(Outcome::Acknowledged { .. }) => shared.note(node, None),
            // A standby says so, in an ERROR: the connection is good for the moment when it is promoted.
            Ok(Outcome::Failed(why)) => shared.note(node, Some(why)),
            Ok(Outcome::Unknown(why)) => {
                connection = None;
                shared.note(node, Some(why));
            }
            Err(_) => {
                connection = None;
                shared.note(node, Some(format!("no answer within {ROW_LIMIT_MS} ms")));
            }
        }
    }
}
