//! How long a former primary takes from its start until it streams, when it has to be rewound over 100 MB of WAL that nobody else has.
//!
//! In `async`, since in `quorum` nobody leads who lacks what may have been acknowledged. The WAL is written while the walreceivers of both
//! standbys stand still; then the primary's power goes. What had been sent by then is read by the standbys afterwards, so more is written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::super::cluster::LocalCluster;
use super::super::documents::ClusterDocument;
use super::super::drill::leader;
use super::super::process::ProcessId;
use super::super::status::Status;
use super::ask::{execute, streaming, texts};
use super::waiting;
use crate::clock::{BootTime, wall_clock};

/// How often it is measured at most. A member keeps what is lost eight times, and then is rewound no more.
const RUNS_MAX: u16 = 5;
/// What the former primary has at least and nobody else, in bytes.
const LOST_MIN_BYTES: u64 = 100 << 20;
/// 150 MB of WAL.
const WRITE: &str = "CREATE TABLE pgherd_lost AS SELECT i, repeat('x', 500) AS text FROM generate_series(1, 260000) i";
/// Whose standing still keeps WAL from a standby.
const WALRECEIVER: &str = "SELECT pid::text, '' FROM pg_stat_activity WHERE backend_type = 'walreceiver'";

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Rewind {
    /// When, wall clock.
    pub at: String,
    /// Which node.
    pub node: String,
    /// What it had and nobody else, in bytes of WAL.
    pub lost_bytes: u64,
    /// From the start of its daemon until it streamed, in seconds.
    pub back_s: f64,
}

/// The document it is measured with.
pub fn document(document: ClusterDocument) -> ClusterDocument {
    ClusterDocument { mode: "async".into(), ha: vec!["maximum_lag_on_failover: 1GB".into()], ..document }
}

/// Measures.
pub fn measure(cluster: &LocalCluster, count: u16, stop: &AtomicBool, measured: &mut Vec<Rewind>) -> Result<()> {
    waiting::until(stop, "commits wait for standbys", || names(cluster).is_ok_and(|names| names.is_empty()))?;
    for round in 1..=count.min(RUNS_MAX) {
        let rewind = one(cluster, stop)?;
        println!(
            "{} {round:>3}/{} rewind of {} over {} MB of WAL: back {:.3} s after its start",
            rewind.at,
            count.min(RUNS_MAX),
            rewind.node,
            rewind.lost_bytes / 1_000_000,
            rewind.back_s
        );
        measured.push(rewind);
    }
    Ok(())
}

/// The leader's synchronous_standby_names.
fn names(cluster: &LocalCluster) -> Result<String> {
    let (_, index) = leader(cluster)?;
    let rows =
        texts(&cluster.connection(cluster.plan.nodes[index].declared.port)?, "SELECT current_setting('synchronous_standby_names'), ''")?;
    Ok(rows.into_iter().next().context("no answer")?.0)
}

fn one(cluster: &LocalCluster, stop: &AtomicBool) -> Result<Rewind> {
    let (at, (node, former)) = (wall_clock(), leader(cluster)?);
    let told = lost(cluster, &node)?;
    diverge(cluster, former)?;
    let another = |status: &Status| status.leader.as_ref().is_some_and(|leader| *leader != node);
    waiting::until_status(cluster, stop, "nobody else leads", another)?;
    let (_, index) = leader(cluster)?;
    let new = cluster.connection(cluster.plan.nodes[index].declared.port)?;
    let writes =
        || texts(&new, "SELECT pg_is_in_recovery()::text, ''").is_ok_and(|rows| rows.iter().any(|(in_recovery, _)| in_recovery == "false"));
    waiting::until(stop, "the new leader takes no writes", writes)?;
    let inode = || Ok::<_, anyhow::Error>(fs::metadata(cluster.data_dir(former))?.ino());
    let before = inode()?;
    let started = BootTime::now();
    cluster.start_node(former)?;
    let streams = || streaming(&new).is_ok_and(|names| names.contains(&node));
    waiting::until(stop, "the former primary does not stream", streams)?;
    let back_s = BootTime::now().since(started).as_secs_f64();
    ensure!(before == inode()?, "{node} was copied, and not rewound");
    let nodes = cluster.plan.nodes.len();
    waiting::until_status(cluster, stop, "the cluster is not whole again", |status| status.is_whole(nodes))?;
    let mut lost_bytes = 0;
    waiting::until(stop, "what was lost is not told", || {
        lost_bytes = lost(cluster, &node).map_or(0, |bytes| bytes.saturating_sub(told));
        lost_bytes > 0
    })?;
    ensure!(lost_bytes >= LOST_MIN_BYTES, "{node} had only {lost_bytes} bytes of WAL that nobody else had");
    Ok(Rewind { at, node, lost_bytes, back_s })
}

/// The primary writes what reaches nobody, and its power goes.
fn diverge(cluster: &LocalCluster, primary: usize) -> Result<()> {
    let config = |index: usize| cluster.connection(cluster.plan.nodes[index].declared.port);
    let mut receivers = Vec::new();
    for index in (0..cluster.plan.nodes.len()).filter(|index| *index != primary) {
        let (pid, _) =
            texts(&config(index)?, WALRECEIVER)?.into_iter().next().with_context(|| format!("{} receives nothing", cluster.name(index)))?;
        receivers.push(ProcessId::of(pid.parse().context("reading a pid")?).context("a walreceiver has ended")?);
    }
    receivers.iter().for_each(|receiver| receiver.signal(Signal::SIGSTOP));
    let written = config(primary).and_then(|config| execute(&config, WRITE));
    cluster.cut_power(primary);
    receivers.iter().for_each(|receiver| receiver.signal(Signal::SIGCONT));
    written
}

/// Bytes of WAL that were taken away from a member, as the cluster says; 0 = it says nothing.
fn lost(cluster: &LocalCluster, node: &str) -> Result<u64> {
    /// As `pgherd get lost-writes` prints it.
    #[derive(Deserialize)]
    struct Lost {
        member: String,
        bytes: Option<u64>,
    }
    let said = cluster.pgherd(&["get", "lost-writes", "-o", "json"])?;
    ensure!(said.code == Some(0), "pgherd get lost-writes: exit {:?}: {}", said.code, said.err.trim());
    let all: Vec<Lost> = serde_json::from_str(&said.out).context("reading what pgherd get lost-writes said")?;
    Ok(all.into_iter().filter(|lost| lost.member == node).filter_map(|lost| lost.bytes).sum())
}
