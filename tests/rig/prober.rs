//! Writes to every node directly, all the while, and asks each whether it calls itself primary: what I1 and I13 are checked by.
//!
//! A backend that is stuck is left alone with its row and may still answer much later, as a real client's would; a new connection
//! goes on beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::join_all;
use pgherd::cli::demo::http;
use pgherd::cli::demo::ledger::{Acknowledged, RowKey};
use pgherd::cli::demo::runtime::block_on;
use pgherd::cli::demo::writer::{Attempt, Outcome, Writer};
use pgherd::clock::BootTime;
use tokio_postgres::Config;

use super::checker::{Ack, Claim};
use super::wait::holds_within;

const ROW_INTERVAL: Duration = Duration::from_millis(20);
const ASK_LIMIT: Duration = Duration::from_millis(500);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// After how long a row's fate is counted as unknown.
const ROW_LIMIT: Duration = Duration::from_secs(20);
/// Connections of one client beside each other.
const CONNECTIONS_MAX: usize = 4;

/// A node as the prober reaches it.
#[derive(Debug, Clone)]
pub struct Target {
    pub node: String,
    /// Clients that write to it beside each other, each with rows of its own.
    pub clients: usize,
    pub postgres: Config,
    pub api: SocketAddr,
}

/// One attempt on one node.
#[derive(Debug, Clone)]
pub struct Probe {
    pub node: String,
    /// By whom: a row is named by its client and that client's own count.
    pub client: String,
    pub attempt: Attempt,
}

#[derive(Debug, Default)]
struct Log {
    probes: Mutex<Vec<Probe>>,
    claims: Mutex<Vec<Claim>>,
    /// What stood in the way of the last connection to each node.
    refusals: Mutex<BTreeMap<String, String>>,
    stop: AtomicBool,
}

/// Runs until it is dropped.
#[derive(Debug)]
pub struct Prober {
    log: Arc<Log>,
    threads: Vec<JoinHandle<()>>,
}

impl Prober {
    pub fn start(targets: &[Target]) -> Prober {
        let log = Arc::new(Log::default());
        let mut threads = Vec::new();
        for target in targets {
            let (writes, asks) = (Arc::clone(&log), Arc::clone(&log));
            let (to, of) = (target.clone(), target.clone());
            threads.push(std::thread::spawn(move || {
                let local = tokio::task::LocalSet::new();
                block_on(local.run_until(async {
                    join_all((0..to.clients).map(|client| write(&to, format!("{}.{client}", to.node), &writes))).await;
                    Ok(())
                }))
                .unwrap();
            }));
            threads.push(std::thread::spawn(move || ask(&of, &asks)));
        }
        Prober { log, threads }
    }

    pub fn claims(&self) -> Vec<Claim> {
        self.log.claims.lock().unwrap().clone()
    }

    /// Rows of `node` that were acknowledged after being sent after `since`.
    pub fn acknowledged_since(&self, node: &str, since: BootTime) -> usize {
        let probes = self.log.probes.lock().unwrap();
        probes.iter().filter(|probe| probe.node == node && probe.attempt.begun > since && is_acknowledged(&probe.attempt)).count()
    }

    /// Attempts on `node` begun after `since` that were not acknowledged.
    pub fn refused_since(&self, node: &str, since: BootTime) -> Vec<Attempt> {
        let probes = self.log.probes.lock().unwrap();
        let refused = |probe: &&Probe| probe.node == node && probe.attempt.begun > since && !is_acknowledged(&probe.attempt);
        probes.iter().filter(refused).map(|probe| probe.attempt.clone()).collect()
    }

    /// Why the last connection to `node` that failed did so.
    pub fn last_refusal(&self, node: &str) -> Option<String> {
        self.log.refusals.lock().unwrap().get(node).cloned()
    }

    /// The longest time between two acknowledgements of anybody that ends after `since`.
    pub fn longest_gap(&self, since: BootTime) -> Duration {
        let mut times: Vec<BootTime> = self.acks().iter().map(|ack| ack.ended).collect();
        times.sort();
        times.windows(2).filter(|pair| pair[1] > since).map(|pair| pair[1].since(pair[0])).max().unwrap_or_default()
    }

    pub fn acks(&self) -> Vec<Ack> {
        let ack = |probe: &Probe| match probe.attempt.outcome {
            Outcome::Acknowledged { timeline, .. } => {
                Some(Ack { node: probe.node.clone(), timeline, begun: probe.attempt.begun, ended: probe.attempt.ended })
            }
            Outcome::Failed(_) | Outcome::Unknown(_) => None,
        };
        self.log.probes.lock().unwrap().iter().filter_map(ack).collect()
    }

    /// Acknowledged rows with their positions.
    pub fn acknowledged(&self) -> Vec<Acknowledged> {
        let row = |probe: &Probe| match probe.attempt.outcome {
            Outcome::Acknowledged { timeline, position } => {
                Some(Acknowledged { row: (probe.client.clone(), probe.attempt.seq), timeline, position })
            }
            Outcome::Failed(_) | Outcome::Unknown(_) => None,
        };
        self.log.probes.lock().unwrap().iter().filter_map(row).collect()
    }

    /// Rows that the server refused for certain.
    pub fn failed(&self) -> BTreeSet<RowKey> {
        let failed = |probe: &&Probe| matches!(probe.attempt.outcome, Outcome::Failed(_));
        self.log.probes.lock().unwrap().iter().filter(failed).map(|probe| (probe.client.clone(), probe.attempt.seq)).collect()
    }

    /// Stops writing and asking.
    pub fn stop(&mut self) {
        self.log.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.log.stop.store(true, Ordering::SeqCst);
    }
}

fn is_acknowledged(attempt: &Attempt) -> bool {
    matches!(attempt.outcome, Outcome::Acknowledged { .. })
}

/// One connection, and whether a row is on its way over it.
struct Lane {
    writer: Writer,
    busy: AtomicBool,
}

/// One client.
async fn write(target: &Target, client: String, log: &Arc<Log>) {
    let mut lanes: Vec<Rc<Lane>> = Vec::new();
    let seq = AtomicI64::new(0);
    let mut tick = tokio::time::interval(ROW_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !log.stop.load(Ordering::SeqCst) {
        tick.tick().await;
        lanes.retain(|lane| !lane.writer.is_closed());
        let idle = lanes.iter().find(|lane| !lane.busy.load(Ordering::SeqCst)).cloned();
        let Some(lane) = idle else {
            if lanes.len() < CONNECTIONS_MAX {
                match Writer::connect(&target.postgres, CONNECT_LIMIT).await {
                    Ok(writer) => lanes.push(Rc::new(Lane { writer, busy: AtomicBool::new(false) })),
                    Err(error) => drop(log.refusals.lock().unwrap().insert(target.node.clone(), format!("{error:#}"))),
                }
            }
            continue;
        };
        lane.busy.store(true, Ordering::SeqCst);
        let (node, client) = (target.node.clone(), client.clone());
        let (seq, log) = (seq.fetch_add(1, Ordering::SeqCst), Arc::clone(log));
        tokio::task::spawn_local(async move {
            let begun = BootTime::now();
            let answer = tokio::time::timeout(ROW_LIMIT, lane.writer.insert(&client, seq, &node)).await;
            let too_late = || Attempt { seq, begun, ended: BootTime::now(), outcome: Outcome::Unknown("no answer in time".into()) };
            let attempt = answer.unwrap_or_else(|_| too_late());
            log.probes.lock().unwrap().push(Probe { node, client, attempt });
            lane.busy.store(false, Ordering::SeqCst);
        });
    }
}

/// Asks for the role once in each interval of the wait helper.
fn ask(target: &Target, log: &Log) {
    holds_within(Duration::from_secs(3600), || {
        let begun = BootTime::now();
        if let Ok((code, _)) = http::ask("OPTIONS", target.api, "/primary", ASK_LIMIT) {
            let claim = Claim { node: target.node.clone(), is_primary: code == 200, begun, ended: BootTime::now() };
            log.claims.lock().unwrap().push(claim);
        }
        log.stop.load(Ordering::SeqCst)
    });
}
