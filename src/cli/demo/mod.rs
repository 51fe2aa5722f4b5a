//! `pgherd demo`: a cluster on this machine's loopback to look at and to break, and the same as a library for the live tests.
//!
//! It runs in the foreground, and everything it started and wrote is gone when it ends; `--down` does the same after a crash.
//! PostgreSQL, etcd and HAProxy run as `postgres` when this is started as root, else as the present user.

mod bench;
pub mod cluster;
pub mod documents;
mod drill;
pub mod etcd;
pub mod haproxy;
pub mod http;
pub mod ledger;
pub mod ports;
pub mod process;
pub mod programs;
pub mod runtime;
pub mod status;
pub mod writer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use cluster::{LocalCluster, remove_dir};
pub use drill::read_ledger;
use ports::PortBlock;
use process::{Household, OsUser, wait_for};
use programs::Programs;
use runtime::block_on;

/// Nodes of the demo.
const NODES: u16 = 3;
/// Members of its etcd.
const ETCD_MEMBERS: u16 = 3;
/// How long the cluster may take to be whole for the first time, in milliseconds.
const READY_BOUND_MS: u64 = 180_000;
/// How long a command that needs etcd is tried again right after the start, in milliseconds.
const APPLY_BOUND_MS: u64 = 15_000;
/// Lines of a log that are shown after a failure.
const TAIL_LINES: usize = 30;

/// A cluster on loopback until Ctrl-C.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Run this script instead of waiting for Ctrl-C; the exit code tells how it went
    #[arg(long, value_enum)]
    pub script: Option<Script>,
    /// End what a crashed demo left behind, and remove its directory
    #[arg(long)]
    pub down: bool,
    /// Where everything is put [default: /tmp/pgherd-demo-UID]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The first of 40 ports on 127.0.0.1
    #[arg(long, default_value_t = 15_000, value_parser = clap::value_parser!(u16).range(1024..=65_000))]
    pub base_port: u16,
    /// What `--script bench` takes
    #[command(flatten)]
    pub bench: bench::BenchArgs,
}

/// What a demo can do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Script {
    /// Break the primary twice under load and account for every acknowledged row
    Failover,
    /// Measure how long writes stop when a node is stopped, killed or cut off, and what pgherd costs; minutes for each run
    Bench,
}

/// Runs the command. True when all went well; the error says what did not.
pub fn run(args: &DemoArgs) -> Result<bool> {
    let uid = nix::unistd::Uid::effective();
    let dir = args.dir.clone().unwrap_or_else(|| std::env::temp_dir().join(format!("pgherd-demo-{uid}")));
    if args.down {
        return down(&dir).map(|()| true);
    }
    args.bench.check(args.script == Some(Script::Bench))?;
    let stop = stop_on_signal()?;
    refuse_to_disturb(&dir)?;
    let ports = PortBlock::at(args.base_port)?;
    let programs = Programs::find(&std::env::current_exe().context("finding this program")?)?;
    let plan = LocalCluster::plan_on_loopback(&dir, NODES, ETCD_MEMBERS, &ports, programs);
    let cluster = LocalCluster::lay_out(plan)?;
    let document = match args.script {
        Some(Script::Bench) => bench::document(&cluster, bench::first_ttl_s())?,
        Some(Script::Failover) | None => cluster.document()?,
    };
    let result = bring_up(&cluster, &document.to_yaml(), &stop).and_then(|()| {
        println!("{}", how_to_connect(&cluster)?);
        match args.script {
            Some(Script::Failover) => drill::failover(&cluster, &stop),
            Some(Script::Bench) => bench::run(&cluster, &ports, &args.bench, &stop),
            None => {
                println!("Ctrl-C ends it and removes everything.");
                while !wait_for(Duration::from_secs(3600), || stop.load(Ordering::SeqCst)) {}
                Ok(true)
            }
        }
    });
    let in_question = if args.script == Some(Script::Bench) { result.is_err() } else { !matches!(result, Ok(true)) };
    if in_question && !stop.load(Ordering::SeqCst) {
        show_logs(&cluster);
    }
    let ended = cluster.end();
    if stop.load(Ordering::SeqCst) && args.script.is_none() {
        return ended.map(|()| true);
    }
    let passed = result?;
    ended.map(|()| passed)
}

/// Turns SIGINT, SIGTERM and SIGHUP into a flag: a demo that just died would leave servers behind.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let wait = async move {
        let (mut int, mut term, mut hup) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
        flag.store(true, Ordering::SeqCst);
        Ok(())
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || block_on(wait)).context("waiting for signals")?;
    Ok(stop)
}

fn down(dir: &Path) -> Result<()> {
    if !dir.exists() {
        println!("nothing to end: {} does not exist", dir.display());
        return Ok(());
    }
    ensure!(is_a_demos(dir), "{} does not look like a demo's directory: nothing was touched", dir.display());
    Household::open(dir, OsUser::for_servers()?)?.end_all()?;
    remove_dir(dir)?;
    println!("ended, and {} removed", dir.display());
    Ok(())
}

/// A demo's directory, or one that holds nothing.
fn is_a_demos(dir: &Path) -> bool {
    dir.join("pids").is_file() || dir.join("secrets").is_dir() || fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// Makes way for a new demo in `dir`, unless another one runs there or the directory is something else.
fn refuse_to_disturb(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    ensure!(is_a_demos(dir), "{} does not look like a demo's directory: choose another --dir", dir.display());
    let living = Household::open(dir, OsUser::for_servers()?)?.living();
    ensure!(living.is_empty(), "a demo runs in {}, or died there: `make demo-down` ends it", dir.display());
    remove_dir(dir)
}

fn bring_up(cluster: &LocalCluster, document: &str, stop: &AtomicBool) -> Result<()> {
    println!("starting {} etcd members", cluster.plan.etcd.len());
    cluster.start_etcd()?;
    let mut said = cluster.apply(document)?;
    let applied = wait_for(Duration::from_millis(APPLY_BOUND_MS), || {
        if said.code == Some(3)
            && let Ok(again) = cluster.apply(document)
        {
            said = again;
        }
        said.code != Some(3) || stop.load(Ordering::SeqCst)
    });
    ensure!(applied && said.code == Some(0), "pgherd apply: exit {:?}: {}{}", said.code, said.out, said.err);
    println!("starting HAProxy and {} nodes", cluster.plan.nodes.len());
    cluster.start_haproxy()?;
    for index in 0..cluster.plan.nodes.len() {
        cluster.start_node(index)?;
    }
    let ready = cluster.wait_until_durable(Duration::from_millis(READY_BOUND_MS), || stop.load(Ordering::SeqCst));
    if stop.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    ensure!(ready, "the cluster was not whole, with commits that wait for both standbys, within {} s", READY_BOUND_MS / 1000);
    Ok(())
}

/// The status as a person sees it, and what to type next.
fn how_to_connect(cluster: &LocalCluster) -> Result<String> {
    let frontends = cluster.plan.frontends.context("a demo has HAProxy")?;
    let user = &cluster.household().user.name;
    let passfile = cluster.plan.dir.join("secrets/pgpass");
    write_passfile(&passfile, &format!("*:*:*:{user}:{}\n", cluster.superuser_password()?))?;
    let psql = format!("PGPASSFILE={} psql -h 127.0.0.1 -U {user} -d postgres", passfile.display());
    let pgherd = format!("{} --config {}", cluster.plan.programs.pgherd.display(), cluster.node_file(0).display());
    Ok(format!(
        "{}
write  {psql} -p {}
read   {psql} -p {}
stats  http://127.0.0.1:{}/
look   {pgherd} status --watch
logs   {}/*/pgherd.log",
        cluster.pgherd(&["status"])?.out,
        frontends.write,
        frontends.read,
        frontends.stats,
        cluster.plan.dir.display(),
    ))
}

/// For whoever runs the demo, root or not: the servers do not need it.
fn write_passfile(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes()).context("writing the passfile")
}

fn show_logs(cluster: &LocalCluster) {
    for index in 0..cluster.plan.nodes.len() {
        let path = cluster.node_log(index);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- the end of {}", path.display());
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            eprintln!("{line}");
        }
    }
}
