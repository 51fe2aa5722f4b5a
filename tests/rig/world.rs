//! A cluster for one test: brought up, broken, and judged at the end.
//!
//! Every test ends with [`World::finish`], which checks what the prober saw all the while: no two writers, no two primaries, a whole
//! history. A test that panics prints the ends of the logs and keeps them under target/.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use pgherd::cli::demo::cluster::{LocalCluster, Said, run};
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::cli::demo::ledger::{judge, switch_points};
use pgherd::cli::demo::ports::PortBlock;
use pgherd::cli::demo::process::{ProcessId, end_of};
use pgherd::cli::demo::programs::Programs;
use pgherd::cli::demo::read_ledger;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::cli::demo::status::Status;
use pgherd::cli::demo::writer::Writer;
use pgherd::clock::BootTime;
use pgherd::types::TimelineId;

use super::checker::{broken_history, two_primaries_claimed, two_writers};
use super::haproxy::Haproxy;
use super::prober::{Prober, Target};
use super::proxies::{proxy_etcd, proxy_nodes};
use super::proxy::{Network, Proxy};
use super::secrets;
use super::wait::{holds_within, settles_within};

/// How long bringing up, a failover or a rejoin may take on a busy machine before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// Rows that show that a node takes writes.
const ROWS_TO_SEE: usize = 10;
const LIMIT: Duration = Duration::from_secs(5);
/// Memory that a cluster in /dev/shm must leave.
const SHM_FREE_BYTES: u64 = 3 << 30;
/// Not the least that is allowed: a probe older than this counts as none, and the machine may be busy.
const LOOP_WAIT_S: u32 = 2;
const TAIL_LINES: usize = 60;

/// What a test's cluster is like.
#[derive(Debug, Clone)]
pub struct Setup {
    pub nodes: u16,
    pub etcd_members: u16,
    pub ttl_s: u32,
    /// The tests' PostgreSQL 17 instead of the distribution's.
    pub postgres_17: bool,
    /// The tests' etcd 3.5 instead of the distribution's.
    pub etcd_3_5: bool,
    /// Whether what members say to each other goes through proxies too, and not only what they say to etcd.
    pub proxied: bool,
    /// Clients of the prober that write to each node.
    pub clients: usize,
    /// An HAProxy before the nodes, and who tells it.
    pub haproxy: Option<Haproxy>,
    /// Changes the cluster document before it is applied.
    pub document: fn(&mut ClusterDocument),
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            nodes: 3,
            etcd_members: 1,
            ttl_s: 4,
            postgres_17: false,
            etcd_3_5: false,
            proxied: false,
            clients: 1,
            haproxy: None,
            document: |_| {},
        }
    }
}

/// For tests of what happens without failsafe: with it the others promise, and the primary goes on (tests/live/failsafe.rs).
pub fn without_failsafe(document: &mut ClusterDocument) {
    document.failsafe = Some(false);
}

/// A cluster under test.
pub struct World {
    pub cluster: LocalCluster,
    pub document: ClusterDocument,
    pub prober: Option<Prober>,
    clients: usize,
    /// By node, then by member of etcd.
    etcd_proxies: Vec<Vec<Proxy>>,
    /// By node: what others reach its PostgreSQL and its API through.
    node_proxies: Vec<[Proxy; 2]>,
    pub ports: PortBlock,
    _place: tempfile::TempDir,
}

impl World {
    /// Directories, documents and proxies; nothing runs.
    pub fn lay_out(setup: &Setup) -> World {
        let place = place();
        let ports = PortBlock::free().unwrap();
        let mut programs = Programs::find(Path::new(env!("CARGO_BIN_EXE_pgherd"))).unwrap();
        if setup.postgres_17 {
            programs.postgres_bin = tool("postgresql-17/bin");
        }
        if setup.etcd_3_5 {
            programs.etcd = tool("etcd-3.5/etcd");
        }
        let mut plan = LocalCluster::plan_on_loopback(&place.path().join("c"), setup.nodes, setup.etcd_members, &ports, programs);
        plan.cluster = "live".into();
        Haproxy::plan(setup.haproxy, &mut plan);
        let etcd_proxies = proxy_etcd(&mut plan);
        let node_proxies = if setup.proxied { proxy_nodes(&mut plan) } else { Vec::new() };
        let cluster = LocalCluster::lay_out(plan).unwrap();
        Haproxy::name_in_documents(setup.haproxy, &cluster);
        let mut document = cluster.document().unwrap();
        document.ttl_s = setup.ttl_s;
        document.loop_wait_s = LOOP_WAIT_S;
        document.pg_hba = ["all", "replication"].map(|database| format!("host {database} all 127.0.0.0/8 scram-sha-256")).into();
        // Segments that a killed server leaves behind are in its data directory, and go with it.
        document.parameters.insert("dynamic_shared_memory_type".into(), "mmap".into());
        // What a lost row means is judged by the mode: tests say so when they want commits to wait.
        document.mode = std::env::var("PGHERD_TEST_MODE").unwrap_or_else(|_| "async".into());
        (setup.document)(&mut document);
        World { cluster, document, prober: None, clients: setup.clients, etcd_proxies, node_proxies, ports, _place: place }
    }

    /// A whole cluster with the prober at work.
    pub fn up(setup: &Setup) -> World {
        let mut world = World::lay_out(setup);
        world.start_etcd_and_apply();
        world.cluster.start_haproxy().unwrap();
        world.start_all();
        world.wait_whole("after the bootstrap");
        if world.document.mode != "async" {
            world.wait_synchronous("after the bootstrap");
        }
        world.start_prober();
        let leader = world.leader();
        world.wait_writes(leader);
        world
    }

    /// Starts the daemon of every node.
    pub fn start_all(&self) {
        for index in 0..self.nodes() {
            self.cluster.start_node(index).unwrap();
        }
    }

    pub fn start_etcd_and_apply(&self) {
        self.cluster.start_etcd().unwrap();
        self.apply().must_succeed("pgherd apply");
    }

    /// Applies the document as it is now.
    pub fn apply(&self) -> Said {
        self.cluster.apply(&self.document.to_yaml()).unwrap()
    }

    /// Makes the ledger on the leader and writes to all nodes from now on.
    pub fn start_prober(&mut self) {
        self.create_table(self.leader());
        self.probe_all();
    }

    /// Writes to all nodes from now on.
    pub fn probe_all(&mut self) {
        let target = |index| Target {
            node: self.cluster.name(index).to_owned(),
            clients: self.clients,
            postgres: self.cluster.connection(self.port(index)).unwrap(),
            api: self.cluster.plan.nodes[index].api_listen,
        };
        self.prober = Some(Prober::start(&(0..self.nodes()).map(target).collect::<Vec<_>>()));
    }

    pub fn nodes(&self) -> usize {
        self.cluster.plan.nodes.len()
    }

    pub fn port(&self, index: usize) -> u16 {
        self.cluster.plan.nodes[index].declared.port
    }

    pub fn name(&self, index: usize) -> &str {
        self.cluster.name(index)
    }

    pub fn prober(&self) -> &Prober {
        self.prober.as_ref().unwrap()
    }

    pub fn status(&self) -> Status {
        self.cluster.status().unwrap()
    }

    /// Who leads. Waits until somebody does.
    pub fn leader(&self) -> usize {
        let mut leader = None;
        self.settle("somebody leads", || {
            leader = self.cluster.status().ok().and_then(|status| self.cluster.index_of(&status.leader?));
            leader.is_some()
        });
        leader.unwrap()
    }

    pub fn timeline(&self) -> u32 {
        self.status().timeline.unwrap()
    }

    /// Nodes but this one.
    pub fn others(&self, index: usize) -> Vec<usize> {
        (0..self.nodes()).filter(|other| *other != index).collect()
    }

    /// A replica.
    pub fn replica(&self) -> usize {
        self.others(self.leader())[0]
    }

    /// Waits until it is so, or fails with the ends of the logs.
    #[track_caller]
    pub fn settle(&self, what: &str, condition: impl FnMut() -> bool) {
        assert!(settles_within(PATIENCE, condition), "not within {} s: {what}", PATIENCE.as_secs());
    }

    #[track_caller]
    pub fn wait_whole(&self, when: &str) {
        self.settle(&format!("one leader, all others streaming, {when}"), || self.cluster.is_whole());
    }

    /// Waits until another node than `former` leads and takes writes, and returns it.
    #[track_caller]
    pub fn wait_another_leads(&self, former: usize) -> usize {
        let mut leader = former;
        self.settle(&format!("another than {} leads", self.name(former)), || {
            let name = self.cluster.status().ok().and_then(|status| status.leader);
            leader = name.and_then(|name| self.cluster.index_of(&name)).unwrap_or(former);
            leader != former
        });
        self.wait_writes(leader);
        leader
    }

    /// Waits until rows sent to this node from now on are acknowledged.
    #[track_caller]
    pub fn wait_writes(&self, index: usize) {
        let since = BootTime::now();
        let prober = self.prober();
        let written = holds_within(PATIENCE, || prober.acknowledged_since(self.name(index), since) >= ROWS_TO_SEE);
        let last = prober.refused_since(self.name(index), since).pop();
        let refusal = prober.last_refusal(self.name(index));
        assert!(written, "{} takes no writes; the last attempt: {last:?}, the last connection refused: {refusal:?}", self.name(index));
    }

    #[track_caller]
    pub fn daemon(&self, index: usize) -> ProcessId {
        self.cluster.daemon(index).unwrap_or_else(|| panic!("the daemon of {} is not there", self.name(index)))
    }

    #[track_caller]
    pub fn guard(&self, index: usize) -> ProcessId {
        self.cluster.guard(index).unwrap_or_else(|| panic!("the guard of {} is not there", self.name(index)))
    }

    #[track_caller]
    pub fn postmaster(&self, index: usize) -> ProcessId {
        self.cluster.postmaster(index).unwrap_or_else(|| panic!("the postmaster of {} is not there", self.name(index)))
    }

    /// Sends SIGTERM to the daemon and waits until it and its PostgreSQL are gone.
    #[track_caller]
    pub fn stop_node(&self, index: usize) {
        let daemon = self.daemon(index);
        daemon.signal(Signal::SIGTERM);
        let gone = || !daemon.is_alive() && self.cluster.postgres_processes(index).is_empty() && self.cluster.guard(index).is_none();
        self.settle(&format!("{} has stopped with PostgreSQL and guard", self.name(index)), gone);
        assert_eq!(self.exit_code(daemon), 0, "after SIGTERM {} exits with 0", self.name(index));
    }

    /// The code that a daemon exits with. Waits until it has.
    #[track_caller]
    pub fn exit_code(&self, daemon: ProcessId) -> i32 {
        let mut code = None;
        self.settle("the daemon has exited", || {
            code = end_of(daemon);
            code.is_some()
        });
        match code {
            Some(WaitStatus::Exited(_, code)) => code,
            other => panic!("the daemon did not exit: {other:?}"),
        }
    }

    /// Runs initdb as the servers' user into a node's data directory, past pgherd.
    pub fn foreign_initdb(&self, index: usize) {
        let user = &self.cluster.household().user;
        let mut command = Command::new(self.cluster.plan.programs.postgres_bin.join("initdb"));
        command.arg("-D").arg(self.cluster.data_dir(index)).args(["-A", "scram-sha-256", "--no-sync", "-k", "-U", &user.name, "--pwfile"]);
        command.arg(self.cluster.plan.dir.join("secrets/superuser")).current_dir(self.cluster.node_dir(index));
        if let Some((uid, gid)) = user.change_to {
            command.uid(uid).gid(gid);
        }
        run(command, PATIENCE).unwrap().must_succeed("initdb");
    }

    /// Starts a PostgreSQL on a node's data directory and ports, past pgherd.
    pub fn foreign_postgres(&self, index: usize) -> ProcessId {
        let run_dir = self.cluster.node_dir(index).join("run");
        let mut command = Command::new(self.cluster.plan.programs.postgres_bin.join("postgres"));
        command.arg("-D").arg(self.cluster.data_dir(index)).arg("-p").arg(self.port(index).to_string()).arg("-k").arg(run_dir);
        self.cluster.household().spawn(&format!("postgres-{index}"), command, &self.cluster.node_log(index), true).unwrap()
    }

    /// Makes the ledger on one node.
    pub fn create_table(&self, index: usize) {
        let connection = self.cluster.connection(self.port(index)).unwrap();
        let made = || {
            let connection = connection.clone();
            in_own_thread(async move { Writer::create_table(&connection, LIMIT).await }).is_ok()
        };
        self.settle("the table is made", made);
    }

    /// The name of the etcd member that leads etcd.
    pub fn etcd_leader(&self) -> String {
        let members: Vec<(String, String)> =
            self.cluster.plan.etcd.iter().map(|member| (member.name.clone(), member.client_url())).collect();
        in_own_thread(async move {
            for (name, url) in members {
                let status = etcd_client::Client::connect([url], None).await?.status().await?;
                if status.header().is_some_and(|header| header.member_id() == status.leader()) {
                    return Ok(name);
                }
            }
            anyhow::bail!("no member of etcd leads")
        })
        .unwrap()
    }

    /// Breaks or heals what a node hears of etcd.
    pub fn set_etcd_network(&self, index: usize, network: Network) {
        self.etcd_proxies[index].iter().for_each(|proxy| proxy.set(network));
    }

    /// Breaks or heals what others hear of a node's PostgreSQL.
    pub fn set_replication_network(&self, index: usize, network: Network) {
        self.node_proxies[index][0].set(network);
    }

    /// Breaks or heals what one standby alone hears of a node's PostgreSQL.
    pub fn set_stream(&self, of: usize, to: usize, network: Network) {
        self.node_proxies[of][0].set_for(self.name(to), network);
    }

    /// Breaks or heals what others hear of a node's API.
    pub fn set_api_network(&self, index: usize, network: Network) {
        self.node_proxies[index][1].set(network);
    }

    /// Breaks or heals everything between one node and all others; APIs of all nodes too, since who asks cannot be told apart there.
    pub fn set_whole_network(&self, index: usize, network: Network) {
        self.set_etcd_network(index, network);
        self.node_proxies[index][0].set(network);
        self.node_proxies.iter().for_each(|[_, api]| api.set(network));
    }

    /// Stops the prober, judges all it saw, ends the cluster and proves that nothing is left.
    #[track_caller]
    pub fn finish(mut self) {
        self.judge(true);
        self.no_secret_got_out();
        self.cluster.end().unwrap();
    }

    /// The same for the one case where two writers are possible by design: somebody promoted a standby by hand.
    #[track_caller]
    pub fn finish_after_a_promote_by_hand(mut self) {
        self.judge(false);
        self.no_secret_got_out();
        self.cluster.end().unwrap();
    }

    #[track_caller]
    fn judge(&mut self, one_writer: bool) {
        let leader = self.leader();
        let mut prober = self.prober.take().unwrap();
        prober.stop();
        if one_writer && let Some(report) = two_writers(&prober.acks()) {
            panic!("I1, one writer: {report}");
        }
        if let Some(report) = two_primaries_claimed(&prober.claims()) {
            panic!("I13, health tells the truth: {report}");
        }
        let connection = self.cluster.connection(self.port(leader)).unwrap();
        let (found, timeline) = in_own_thread(async move { read_ledger(&connection).await }).unwrap();
        let verdict = judge(&prober.acknowledged(), &found, timeline, &switch_points(&self.history_file(leader, timeline)));
        println!(
            "rows acknowledged {}, found {}, lost beyond a switch point {}; timeline {timeline}; claims asked {}",
            verdict.acknowledged,
            verdict.found,
            verdict.beyond.len(),
            prober.claims().len()
        );
        if one_writer && self.document.mode != "async" {
            assert!(verdict.beyond.is_empty(), "P2: acknowledged and lost: {:?}", verdict.beyond);
        }
        if one_writer && let Some(report) = broken_history(&verdict, &prober.failed(), &found) {
            panic!("the history on {} is broken: {report}", self.name(leader));
        }
    }

    /// I14: the passwords are nowhere but where they have to be.
    #[track_caller]
    fn no_secret_got_out(&self) {
        let found = secrets::found(self);
        assert!(found.is_empty(), "a password stands in {found:?}");
    }

    fn history_file(&self, index: usize, timeline: TimelineId) -> String {
        let file = self.cluster.data_dir(index).join("pg_wal").join(timeline.history_file_name());
        if timeline.0 > 1 { fs::read_to_string(file).unwrap() } else { String::new() }
    }

    fn keep_logs(&self) {
        let test = std::thread::current().name().unwrap_or("unnamed").replace("::", "-");
        let keep = Path::new(env!("CARGO_TARGET_TMPDIR")).join("live-logs").join(test);
        let _ = fs::remove_dir_all(&keep);
        let _ = fs::create_dir_all(&keep);
        eprintln!("=== status: {:?}", self.cluster.pgherd(&["status"]));
        for index in 0..self.nodes() {
            let text = fs::read_to_string(self.cluster.node_log(index)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("=== {}: the last {TAIL_LINES} of {} lines", self.name(index), lines.len());
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                eprintln!("{line}");
            }
            let _ = fs::write(keep.join(format!("{}.log", self.name(index))), text);
            for entry in fs::read_dir(self.cluster.node_dir(index).join("log")).into_iter().flatten().flatten() {
                let _ = fs::copy(entry.path(), keep.join(format!("{}-{}", self.name(index), entry.file_name().display())));
            }
        }
        eprintln!("=== whole logs are in {}", keep.display());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_logs();
        }
        self.prober = None;
        let ended = self.cluster.household().end_all();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// Expectations on what a command said.
pub trait MustSucceed {
    /// Fails the test with what was said unless the exit code is 0.
    fn must_succeed(&self, what: &str);
}

impl MustSucceed for Said {
    #[track_caller]
    fn must_succeed(&self, what: &str) {
        assert_eq!(self.code, Some(0), "{what}: {}{}", self.out, self.err);
    }
}

/// In memory where there is room: what is tested is not the disk.
fn place() -> tempfile::TempDir {
    let roomy = nix::sys::statvfs::statvfs("/dev/shm").is_ok_and(|stat| stat.blocks_available() * stat.fragment_size() > SHM_FREE_BYTES);
    let parent = if roomy { Path::new("/dev/shm") } else { Path::new("/tmp") };
    tempfile::Builder::new().prefix("pgherd-").permissions(fs::Permissions::from_mode(0o755)).tempdir_in(parent).unwrap()
}

/// A program that set-up put there for the tests.
fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(name);
    assert!(path.exists(), "{} is missing: run `make setup-tests`", path.display());
    path
}
