//! What pgherd costs while nothing happens: memory, processor time, requests to etcd.
//!
//! Requests are counted by etcd, not by pgherd: messages that its members received from clients, on whatever call. What a watch sends
//! (to ask how far it is) is shown apart, since it is no request that etcd answers from its store.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::super::cluster::LocalCluster;
use super::super::http;
use super::super::process::{ProcessId, wait_for};
use super::machine;
use crate::clock::BootTime;

/// How long the cluster is left alone first, in milliseconds: roles are seen to, files kept, connections closed.
const SETTLE_MS: u64 = 10_000;
/// How long is measured, in milliseconds.
const MEASURE_MS: u64 = 60_000;
/// Ticks of processor time in a second: USER_HZ, which is 100 wherever Linux shows times to programs (proc(5)).
const TICKS_PER_S: f64 = 100.0;
/// Limit of one question to etcd, in milliseconds.
const ASK_LIMIT_MS: u64 = 2_000;
/// The counter that is read: one for each message of a client, by method.
const COUNTER: &str = "grpc_server_msg_received_total";

/// What one member costs.
#[derive(Debug, Clone, Serialize)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Whether it leads.
    pub leads: bool,
    /// The daemon's resident memory, in MB of 10^6 bytes.
    pub daemon_mb: f64,
    /// The guard's.
    pub guard_mb: f64,
    /// The daemon's use of one core, in percent.
    pub daemon_core_percent: f64,
    /// The guard's.
    pub guard_core_percent: f64,
    /// PostgreSQL's, of all its processes that lived throughout: what the daemon asks is answered there.
    pub postgres_core_percent: f64,
}

/// What the whole cluster costs.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// How long was measured, in seconds.
    pub seconds: f64,
    /// The members.
    pub members: Vec<Member>,
    /// Requests to etcd per second and member, without those of watches.
    pub etcd_requests: f64,
    /// What watches sent, per second and member.
    pub etcd_watch_messages: f64,
    /// Requests per second and member, by method.
    pub by_method: BTreeMap<String, f64>,
}

impl Idle {
    /// The largest of a figure over the members.
    pub fn largest(&self, of: fn(&Member) -> f64) -> f64 {
        self.members.iter().map(of).fold(0.0, f64::max)
    }
}

/// Measures. Nothing else may talk to this cluster's etcd meanwhile.
pub fn measure(cluster: &LocalCluster, stop: &AtomicBool) -> Result<Idle> {
    let leader = cluster.status()?.leader;
    rest(SETTLE_MS, stop)?;
    let processes = processes(cluster)?;
    let servers: Vec<Vec<ProcessId>> = (0..cluster.plan.nodes.len()).map(|index| cluster.postgres_processes(index)).collect();
    let of_servers = || servers.iter().map(|server| ticks(server)).collect::<Vec<_>>();
    let (begun, before, used, used_by_servers) = (BootTime::now(), counters(cluster)?, ticks(&processes), of_servers());
    rest(MEASURE_MS, stop)?;
    let seconds = BootTime::now().since(begun).as_secs_f64();
    let (after, used_after, used_by_servers_after) = (counters(cluster)?, ticks(&processes), of_servers());
    let share = |ticks: f64| ticks / TICKS_PER_S / seconds * 100.0;
    let percent = |at: usize| share(used_after[at] - used[at]);
    // One that has ended in between shows nothing afterwards.
    let of_server =
        |at: usize| used_by_servers_after[at].iter().zip(&used_by_servers[at]).map(|(after, before)| (after - before).max(0.0)).sum();
    let members = (0..cluster.plan.nodes.len())
        .map(|index| {
            let (daemon, guard) = (processes[2 * index], processes[2 * index + 1]);
            Ok(Member {
                name: cluster.name(index).to_owned(),
                leads: leader.as_deref() == Some(cluster.name(index)),
                daemon_mb: resident_mb(daemon)?,
                guard_mb: resident_mb(guard)?,
                daemon_core_percent: percent(2 * index),
                guard_core_percent: percent(2 * index + 1),
                postgres_core_percent: share(of_server(index)),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let each = seconds * members.len() as f64;
    let (mut by_method, mut etcd_watch_messages) = (BTreeMap::new(), 0.0);
    for (method, count) in after {
        let rate = (count - before.get(&method).copied().unwrap_or(0.0)) / each;
        if method == "Watch" {
            etcd_watch_messages += rate;
        } else if rate > 0.0 {
            by_method.insert(method, rate);
        }
    }
    Ok(Idle { seconds, members, etcd_requests: by_method.values().sum(), etcd_watch_messages, by_method })
}

fn rest(ms: u64, stop: &AtomicBool) -> Result<()> {
    let interrupted = wait_for(Duration::from_millis(ms), || stop.load(Ordering::SeqCst));
    ensure!(!interrupted, "interrupted");
    Ok(())
}

/// Daemon and guard of every node, in turn.
fn processes(cluster: &LocalCluster) -> Result<Vec<ProcessId>> {
    let mut list = Vec::new();
    for index in 0..cluster.plan.nodes.len() {
        let name = cluster.name(index);
        list.push(cluster.daemon(index).with_context(|| format!("the daemon of {name} does not run"))?);
        list.push(cluster.guard(index).with_context(|| format!("the guard of {name} does not run"))?);
    }
    Ok(list)
}

/// Processor time of each so far, user and system together.
fn ticks(processes: &[ProcessId]) -> Vec<f64> {
    processes.iter().map(|id| ticks_in(&fs::read_to_string(format!("/proc/{}/stat", id.pid)).unwrap_or_default()).unwrap_or(0.0)).collect()
}

/// Fields 14 and 15 of /proc/PID/stat; the name in field 2 may hold spaces and brackets.
fn ticks_in(stat: &str) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(number(11)? + number(12)?)
}

fn resident_mb(id: ProcessId) -> Result<f64> {
    let text = machine::field(&format!("/proc/{}/status", id.pid), "VmRSS").with_context(|| format!("process {} is gone", id.pid))?;
    let kib: f64 = text.split_whitespace().next().and_then(|number| number.parse().ok()).context("reading VmRSS")?;
    Ok(kib * 1024.0 / 1e6)
}

/// Messages by method, over all members of etcd.
fn counters(cluster: &LocalCluster) -> Result<BTreeMap<String, f64>> {
    let mut sum = BTreeMap::new();
    for member in &cluster.plan.etcd {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, member.client_port));
        let (code, body) = http::ask("GET", address, "/metrics", Duration::from_millis(ASK_LIMIT_MS))?;
        ensure!(code == 200, "etcd member {} answers {code} to /metrics", member.name);
        for (method, count) in received(&body) {
            *sum.entry(method).or_insert(0.0) += count;
        }
    }
    Ok(sum)
}

/// The counter's lines: `name{grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"} 12`.
fn received(metrics: &str) -> Vec<(String, f64)> {
    let line = |line: &str| {
        let rest = line.strip_prefix(COUNTER)?;
        let method = rest.split_once("grpc_method=\"")?.1.split('"').next()?.to_owned();
        Some((method, rest.rsplit_once(' ')?.1.parse().ok()?))
    };
    metrics.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcds_counter_is_read_by_method() {
        let text = "# TYPE grpc_server_msg_received_total counter\n\
            grpc_server_msg_received_total{grpc_method=\"Txn\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 12\n\
            grpc_server_msg_sent_total{grpc_method=\"Txn\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 99\n\
            grpc_server_msg_received_total{grpc_method=\"Watch\",grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"} 3\n";
        assert_eq!(received(text), [("Txn".to_owned(), 12.0), ("Watch".to_owned(), 3.0)]);
    }

    #[test]
    fn processor_time_is_read_behind_a_name_with_spaces() {
        let stat = "42 (a b) c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 9 0 1000 0 0";
        assert_eq!(ticks_in(stat), Some(12.0));
    }
}
