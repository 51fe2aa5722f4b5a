//! `pgherd demo --script bench`: how long writes stop when a node is stopped, killed, cut off or loses its power, and what pgherd costs.
//!
//! Everything runs with the defaults of a cluster document, three members and three members of etcd on one machine; HAProxy checks every
//! second, as `render haproxy` has it. So a figure holds what processes and their clocks cost, and no network. The scenarios take turns:
//! each run meets another primary, and no run is excused.

mod ask;
mod bare;
mod clients;
mod floor;
mod idle;
mod machine;
mod overhead;
mod report;
mod rewinds;
mod scenario;
mod statistics;
mod waiting;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use tokio_postgres::Config;

use super::cluster::LocalCluster;
use super::documents::ClusterDocument;
use super::drill::leader;
use super::ports::PortBlock;
use super::process::wait_for_every;
use super::runtime::in_own_thread;
use super::writer::Writer;
use crate::clock::wall_clock;
use floor::Floor;
use report::Report;
use scenario::{Rounds, Run, Scenario, Switched};

/// `ha.loop_wait`'s default, in seconds.
const LOOP_WAIT_S: u32 = 5;
/// What is run in turn, with the default ttl; the idle cluster, and what quorum costs, are measured behind it.
const TURNS: [Scenario; 8] = [
    Scenario::Stop,
    Scenario::Postmaster,
    Scenario::Daemon,
    Scenario::Switchover,
    Scenario::Power,
    Scenario::StandbyStop,
    Scenario::StandbyKill,
    Scenario::StandbySilent,
];
/// How often each scenario is run, unless told.
const RUNS: u16 = 10;
/// How long making the clients' table may take, in milliseconds.
const TABLE_LIMIT_MS: u64 = 10_000;
/// How long members may take to be on leases of a changed ttl, in milliseconds.
const LEASES_BOUND_MS: u64 = 60_000;
/// Time between two looks at the leases, in milliseconds.
const LEASES_PAUSE_MS: u64 = 250;

/// Options of `--script bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// bench: how often each scenario is run [default: 10]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: Option<u16>,
    /// bench: only these scenarios, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Scenario>,
    /// bench: write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// bench: replace the measured section of this page
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
}

impl BenchArgs {
    /// Refuses what would be in vain to find out at the end.
    pub fn check(&self, measures: bool) -> Result<()> {
        let given = self.runs.is_some() || !self.only.is_empty() || self.json.is_some() || self.markdown.is_some();
        ensure!(measures || !given, "--runs, --only, --json and --markdown belong to --script bench");
        self.markdown.as_deref().map_or(Ok(()), report::check_page)
    }

    fn count(&self) -> u16 {
        self.runs.unwrap_or(RUNS)
    }

    fn wants(&self, scenario: Scenario) -> bool {
        self.only.is_empty() || self.only.contains(&scenario)
    }

    fn command(&self) -> String {
        let mut text = format!("pgherd demo --script bench --runs {}", self.count());
        for (at, scenario) in self.only.iter().enumerate() {
            let name = clap::ValueEnum::to_possible_value(scenario).map(|value| value.get_name().to_owned()).unwrap_or_default();
            text.push_str(if at == 0 { " --only " } else { "," });
            text.push_str(&name);
        }
        text
    }
}

/// The demo's cluster document with the defaults of what is measured.
pub fn document(cluster: &LocalCluster, ttl_s: u32) -> Result<ClusterDocument> {
    Ok(ClusterDocument { ttl_s, loop_wait_s: LOOP_WAIT_S, ..cluster.document()? })
}

/// The ttl that the cluster is brought up with, in seconds.
pub fn first_ttl_s() -> u32 {
    Scenario::Power.ttl_s()
}

/// Measures. True when every promise is kept.
pub fn run(cluster: &LocalCluster, ports: &PortBlock, args: &BenchArgs, stop: &AtomicBool) -> Result<bool> {
    let (at, load_before) = (wall_clock(), machine::load());
    make_table(cluster)?;
    let mut runs = Vec::new();
    let turns: Vec<Scenario> = TURNS.into_iter().filter(|scenario| args.wants(*scenario)).collect();
    let mut result = rounds(cluster, ports, stop, args.count(), &turns, &mut runs);
    let mut idle = None;
    if result.is_ok() && args.wants(Scenario::Idle) {
        println!("leaving the cluster alone");
        match idle::measure(cluster, stop) {
            Ok(measured) => idle = Some(measured),
            Err(error) => result = Err(error),
        }
    }
    let mut overhead = None;
    if result.is_ok() && args.wants(Scenario::Overhead) {
        match document(cluster, first_ttl_s()).and_then(|document| overhead::measure(cluster, &document, ports, args.count(), stop)) {
            Ok(measured) => overhead = Some(measured),
            Err(error) => result = Err(error),
        }
    }
    if result.is_ok() && args.wants(Scenario::PowerShort) {
        result = document(cluster, Scenario::PowerShort.ttl_s())
            .and_then(|document| change_to(cluster, &document))
            .and_then(|()| rounds(cluster, ports, stop, args.count(), &[Scenario::PowerShort], &mut runs));
    }
    let mut rewinds = Vec::new();
    if result.is_ok() && args.wants(Scenario::Rewind) {
        result = document(cluster, Scenario::Rewind.ttl_s())
            .and_then(|document| change_to(cluster, &rewinds::document(document)))
            .and_then(|()| rewinds::measure(cluster, args.count(), stop, &mut rewinds));
    }
    let report = Report {
        at,
        command: args.command(),
        load: [load_before, machine::load()],
        machine: machine::look(&cluster.plan.programs, &cluster.plan.dir),
        targets: report::targets(&runs, &rewinds, idle.as_ref(), overhead.as_ref()),
        outages: report::outages(&runs),
        runs,
        rewinds,
        idle,
        overhead,
    };
    // What was measured is shown even when a later run failed.
    println!("\n{}", report.markdown());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report).context("writing JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    result?;
    if let Some(page) = &args.markdown {
        report.write_section(page)?;
    }
    Ok(report.passed())
}

fn rounds(cluster: &LocalCluster, ports: &PortBlock, stop: &AtomicBool, count: u16, turns: &[Scenario], runs: &mut Vec<Run>) -> Result<()> {
    if turns.is_empty() {
        return Ok(());
    }
    let floor = if turns.contains(&Scenario::Switchover) { Some(Floor::start(cluster, ports)?) } else { None };
    let mut rounds = Rounds::begin(cluster, floor, stop)?;
    rounds.settle()?;
    for round in 1..=count {
        for scenario in turns {
            let run = rounds.run(*scenario)?;
            println!(
                "{} {round:>3}/{count} {:<56} {} -> {}  HAProxy {:.3} s, direct {:.3} s, failed {}+{}{}{}",
                run.at,
                scenario.title(),
                run.node,
                run.leader_after,
                run.haproxy_s,
                run.direct_s,
                run.haproxy_failed,
                run.direct_failed,
                run.first_failure.as_deref().filter(|_| *scenario == Scenario::Daemon).map(|why| format!(": {why}")).unwrap_or_default(),
                run.switched.as_ref().map(Switched::text).unwrap_or_default(),
            );
            runs.push(run);
        }
    }
    rounds.end()
}

fn make_table(cluster: &LocalCluster) -> Result<()> {
    let (_, index) = leader(cluster)?;
    make_table_on(cluster.connection(cluster.plan.nodes[index].declared.port)?)
}

fn make_table_on(config: Config) -> Result<()> {
    in_own_thread(async move { Writer::create_table(&config, Duration::from_millis(TABLE_LIMIT_MS)).await })
}

/// Applies a document with another ttl and waits until every member's key, and with it the lock, hangs on a lease of that ttl.
fn change_to(cluster: &LocalCluster, document: &ClusterDocument) -> Result<()> {
    let ttl_s = document.ttl_s;
    println!("changing to a ttl of {ttl_s} s and the mode {}", document.mode);
    let said = cluster.apply(&document.to_yaml())?;
    ensure!(said.code == Some(0), "pgherd apply: exit {:?}: {}{}", said.code, said.out, said.err);
    let endpoints: Arc<Vec<String>> = Arc::new(cluster.plan.etcd.iter().map(super::etcd::EtcdMember::client_url).collect());
    let prefix = format!("/{}/{}/members/", PREFIX, cluster.plan.cluster);
    let nodes = cluster.plan.nodes.len();
    let mut seen = Vec::new();
    let moved = wait_for_every(Duration::from_millis(LEASES_PAUSE_MS), Duration::from_millis(LEASES_BOUND_MS), || {
        let (endpoints, prefix) = (Arc::clone(&endpoints), prefix.clone());
        seen = in_own_thread(async move { granted_ttls(&endpoints, &prefix).await }).unwrap_or_default();
        seen.len() == nodes && seen.iter().all(|ttl| *ttl == i64::from(ttl_s))
    });
    ensure!(moved, "{} s after the ttl was changed to {ttl_s} s the members' leases have {seen:?}", LEASES_BOUND_MS / 1000);
    Ok(())
}

/// Where clusters are in etcd by default.
const PREFIX: &str = "pgherd";

/// The ttl that the lease of each key below `prefix` was granted with, in seconds.
async fn granted_ttls(endpoints: &[String], prefix: &str) -> Result<Vec<i64>> {
    let mut client = etcd_client::Client::connect(endpoints, None).await.context("connecting to etcd")?;
    let answer = client.get(prefix, Some(etcd_client::GetOptions::new().with_prefix().with_keys_only())).await?;
    let mut ttls = Vec::new();
    for key in answer.kvs() {
        ttls.push(client.lease_time_to_live(key.lease(), None).await?.granted_ttl());
    }
    Ok(ttls)
}
