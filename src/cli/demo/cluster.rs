//! A whole cluster on loopback: etcd, HAProxy and pgherd nodes as child processes in one directory. The demo and the live tests run on it.
//!
//! It only starts and ends processes and asks what they say; it decides nothing that pgherd should. Everything of a cluster is below
//! its directory, and all of it is gone after [`LocalCluster::end`].

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::documents::{ClusterDocument, DeclaredMember, NodeDocument};
use super::etcd::EtcdMember;
use super::haproxy::{self, Backend, Checks, Frontends, configuration};
use super::http;
use super::process::{Found, Household, OsUser, ProcessId, become_subreaper, wait_for, wait_for_every};
use super::programs::Programs;
use super::status::Status;

/// How long etcd may take to answer after its start, in milliseconds.
const ETCD_START_MS: u64 = 20_000;
/// How long HAProxy may take to listen, in milliseconds.
const HAPROXY_START_MS: u64 = 5_000;
/// Limit of one question to etcd's health, in milliseconds.
const HEALTH_LIMIT_MS: u64 = 1_000;
/// Limit of one pgherd command, in milliseconds.
const COMMAND_LIMIT_MS: u64 = 60_000;
/// Time between two looks at the status, in milliseconds: each one is a process.
const STATUS_PAUSE_MS: u64 = 250;
/// Bytes of randomness in a generated password.
const PASSWORD_BYTES: usize = 18;

/// One node: what it is declared as, and where it really listens.
#[derive(Debug, Clone)]
pub struct NodePlan {
    /// As the cluster document declares it.
    pub declared: DeclaredMember,
    /// etcd's client URLs as this node sees them.
    pub endpoints: Vec<String>,
    /// Where its PostgreSQL listens beside loopback.
    pub postgres_listen: String,
    /// Where its HTTP API listens.
    pub api_listen: SocketAddr,
}

/// What a local cluster consists of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where everything is put. Made if absent; its path must be short, since sockets are in it (at most 107 bytes).
    pub dir: PathBuf,
    /// The cluster's name.
    pub cluster: String,
    /// The nodes.
    pub nodes: Vec<NodePlan>,
    /// The members of etcd.
    pub etcd: Vec<EtcdMember>,
    /// HAProxy's ports, if it is wanted.
    pub frontends: Option<Frontends>,
    /// What to run.
    pub programs: Programs,
}

/// A cluster that runs, or could.
#[derive(Debug)]
pub struct LocalCluster {
    /// What it consists of.
    pub plan: Plan,
    household: Household,
}

/// What a command said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Its exit code; None when it was ended by a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl LocalCluster {
    /// Lays out directories, secrets and node documents. Starts nothing.
    pub fn lay_out(mut plan: Plan) -> Result<LocalCluster> {
        become_subreaper()?;
        let user = OsUser::for_servers()?;
        fs::create_dir_all(&plan.dir).with_context(|| format!("making {}", plan.dir.display()))?;
        fs::set_permissions(&plan.dir, fs::Permissions::from_mode(0o755))?;
        plan.dir = plan.dir.canonicalize()?;
        ensure!(user.can_reach(&plan.dir), "the user {} cannot reach {}: choose another --dir", user.name, plan.dir.display());
        plan.programs = plan.programs.within_reach(&user, &plan.dir)?;
        let household = Household::open(&plan.dir, user)?;
        let cluster = LocalCluster { plan, household };
        cluster.make_dir("etcd", 0o700)?;
        cluster.make_dir("secrets", 0o700)?;
        for secret in ["superuser", "replication"] {
            cluster.write_secret(secret)?;
        }
        for index in 0..cluster.plan.nodes.len() {
            cluster.make_dir(cluster.name(index), 0o700)?;
            for part in ["run", "log"] {
                cluster.make_dir(&format!("{}/{part}", cluster.name(index)), 0o700)?;
            }
            cluster.write_node_document(index, &cluster.node_document(index))?;
        }
        Ok(cluster)
    }

    fn make_dir(&self, name: &str, mode: u32) -> Result<()> {
        let path = self.plan.dir.join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        self.household.user.own(&path)
    }

    fn write_secret(&self, name: &str) -> Result<()> {
        let path = self.plan.dir.join("secrets").join(name);
        let mut bytes = [0_u8; PASSWORD_BYTES];
        fs::File::open("/dev/urandom")?.read_exact(&mut bytes).context("making a password")?;
        let password: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(password.as_bytes())?;
        self.household.user.own(&path)
    }

    /// The node document that [`LocalCluster::lay_out`] wrote for this node.
    pub fn node_document(&self, index: usize) -> NodeDocument {
        let node = &self.plan.nodes[index];
        NodeDocument {
            name: node.declared.name.clone(),
            cluster: self.plan.cluster.clone(),
            endpoints: node.endpoints.clone(),
            api_listen: node.api_listen.to_string(),
            postgres_listen: node.postgres_listen.clone(),
            os_user: self.household.user.name.clone(),
            bin_dir: self.plan.programs.postgres_bin.clone(),
            dir: self.node_dir(index),
            secrets: self.plan.dir.join("secrets"),
            haproxy_sockets: self.plan.frontends.map(|_| self.haproxy_socket()).into_iter().collect(),
        }
    }

    /// Writes the node document of this node anew.
    pub fn write_node_document(&self, index: usize, document: &NodeDocument) -> Result<()> {
        let path = self.node_file(index);
        fs::write(&path, document.to_yaml()).with_context(|| format!("writing {}", path.display()))?;
        self.household.user.own(&path)
    }

    /// The node's name.
    pub fn name(&self, index: usize) -> &str {
        &self.plan.nodes[index].declared.name
    }

    /// The node of that name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.plan.nodes.iter().position(|node| node.declared.name == name)
    }

    /// The node's directory.
    pub fn node_dir(&self, index: usize) -> PathBuf {
        self.plan.dir.join(self.name(index))
    }

    /// The node's data directory.
    pub fn data_dir(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("data")
    }

    /// The node document's file.
    pub fn node_file(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("node.yaml")
    }

    /// The log of the daemon and of what writes to its standard error.
    pub fn node_log(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("pgherd.log")
    }

    /// Whose processes these are.
    pub fn household(&self) -> &Household {
        &self.household
    }

    /// The password of the superuser.
    pub fn superuser_password(&self) -> Result<String> {
        fs::read_to_string(self.plan.dir.join("secrets/superuser")).context("reading the superuser's password")
    }

    /// How the superuser connects to a port on 127.0.0.1: a server's own, or HAProxy's.
    pub fn connection(&self, port: u16) -> Result<tokio_postgres::Config> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user(&self.household.user.name).dbname("postgres").password(self.superuser_password()?);
        // Half of what is tried here fails on purpose: not into the server's log.
        config.application_name("pgherd-demo").options("-c log_min_messages=panic").connect_timeout(Duration::from_secs(2));
        Ok(config)
    }

    /// Starts one member of etcd.
    pub fn start_etcd_member(&self, index: usize) -> Result<ProcessId> {
        let member = &self.plan.etcd[index];
        let command = member.command(&self.plan.programs.etcd, &self.plan.dir.join("etcd"), &self.plan.etcd, &self.plan.cluster);
        self.household.spawn(&member.name, command, &self.plan.dir.join("etcd").join(format!("{}.log", member.name)), true)
    }

    /// Starts all members of etcd and waits until every one of them is healthy.
    pub fn start_etcd(&self) -> Result<()> {
        for index in 0..self.plan.etcd.len() {
            self.start_etcd_member(index)?;
        }
        for member in &self.plan.etcd {
            ensure!(
                wait_for(Duration::from_millis(ETCD_START_MS), || self.etcd_is_healthy(member)),
                "etcd member {} is not healthy after {ETCD_START_MS} ms, see {}",
                member.name,
                self.plan.dir.join("etcd").display()
            );
        }
        Ok(())
    }

    fn etcd_is_healthy(&self, member: &EtcdMember) -> bool {
        let address = (Ipv4Addr::LOCALHOST, member.client_port).into();
        http::ask("GET", address, "/health", Duration::from_millis(HEALTH_LIMIT_MS))
            .is_ok_and(|(code, body)| code == 200 && body.contains("true"))
    }

    /// The runtime socket of HAProxy.
    pub fn haproxy_socket(&self) -> PathBuf {
        haproxy::runtime_socket(&self.plan.dir.join("haproxy"))
    }

    /// Starts HAProxy, if the plan has one.
    pub fn start_haproxy(&self) -> Result<()> {
        let Some(frontends) = self.plan.frontends else { return Ok(()) };
        let program = self.plan.programs.haproxy.as_ref().context("HAProxy is not installed: apt install haproxy")?;
        let backend = |node: &NodePlan| Backend {
            name: node.declared.name.clone(),
            address: node.declared.address.clone(),
            port: node.declared.port,
            api_port: node.declared.api_port,
        };
        let backends: Vec<Backend> = self.plan.nodes.iter().map(backend).collect();
        self.make_dir("haproxy", 0o700)?;
        let dir = self.plan.dir.join("haproxy");
        let file = dir.join("haproxy.cfg");
        fs::write(&file, configuration(&dir, frontends, &backends)).context("writing haproxy.cfg")?;
        let mut command = Command::new(program);
        command.arg("-db").arg("-f").arg(&file);
        self.household.spawn("haproxy", command, &dir.join("haproxy.log"), true)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, frontends.stats));
        let up = || http::ask("GET", address, "/", Duration::from_millis(HEALTH_LIMIT_MS)).is_ok();
        ensure!(
            wait_for(Duration::from_millis(HAPROXY_START_MS), up),
            "HAProxy does not listen, see {}",
            dir.join("haproxy.log").display()
        );
        Ok(())
    }

    /// Starts the daemon of a node.
    pub fn start_node(&self, index: usize) -> Result<ProcessId> {
        self.household.spawn(self.name(index), self.node_command(index), &self.node_log(index), false)
    }

    /// What [`LocalCluster::start_node`] runs.
    pub fn node_command(&self, index: usize) -> Command {
        let mut command = Command::new(&self.plan.programs.pgherd);
        command.arg("run").arg("--config").arg(self.node_file(index));
        command
    }

    /// The daemon of a node, while it lives.
    pub fn daemon(&self, index: usize) -> Option<ProcessId> {
        self.household.named(self.name(index)).filter(|id| id.is_alive())
    }

    /// The guard of a node: a pgherd-guard that names the node's directory.
    pub fn guard(&self, index: usize) -> Option<ProcessId> {
        let dir = self.node_dir(index);
        let of_node = |found: &&Found| {
            let pid = found.id.pid;
            let text = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(&format!("{}/", dir.display())) || cwd.starts_with(&dir)
        };
        self.household.living().iter().filter(|found| found.name == "pgherd-guard").find(of_node).map(|found| found.id)
    }

    /// Every PostgreSQL process of a node: those whose working directory is its data directory.
    pub fn postgres_processes(&self, index: usize) -> Vec<ProcessId> {
        let data = self.data_dir(index);
        let here = |found: &Found| fs::read_link(format!("/proc/{}/cwd", found.id.pid)).is_ok_and(|cwd| cwd == data);
        Found::all().into_iter().filter(|found| found.name == "postgres" && !found.is_dead && here(found)).map(|found| found.id).collect()
    }

    /// The postmaster of a node, while it lives.
    pub fn postmaster(&self, index: usize) -> Option<ProcessId> {
        let text = fs::read_to_string(self.data_dir(index).join("postmaster.pid")).ok()?;
        let id = ProcessId::of(text.lines().next()?.trim().parse().ok()?)?;
        self.postgres_processes(index).contains(&id).then_some(id)
    }

    /// Daemon, guard and every process of PostgreSQL: all that runs of a node.
    pub fn processes(&self, index: usize) -> Vec<ProcessId> {
        self.daemon(index).into_iter().chain(self.guard(index)).chain(self.postgres_processes(index)).collect()
    }

    /// All of a node at once, as when its power goes.
    pub fn cut_power(&self, index: usize) {
        let all = self.processes(index);
        for id in &all {
            id.signal(Signal::SIGKILL);
        }
        // A postmaster may have had a child on the way.
        wait_for(Duration::from_millis(HEALTH_LIMIT_MS), || {
            let left = self.postgres_processes(index);
            left.iter().for_each(|id| id.signal(Signal::SIGKILL));
            left.is_empty() && !all.iter().any(|id| id.is_alive())
        });
    }

    /// Runs a pgherd command against this cluster, past any proxy of a node.
    pub fn pgherd(&self, arguments: &[&str]) -> Result<Said> {
        let endpoints: Vec<String> = self.plan.etcd.iter().map(EtcdMember::client_url).collect();
        let mut command = Command::new(&self.plan.programs.pgherd);
        command.args(arguments).env("PGHERD_ENDPOINTS", endpoints.join(",")).env("PGHERD_CLUSTER", &self.plan.cluster);
        run(command, Duration::from_millis(COMMAND_LIMIT_MS))
    }

    /// Applies a cluster document.
    pub fn apply(&self, document: &str) -> Result<Said> {
        let file = self.plan.dir.join("cluster.yaml");
        fs::write(&file, document).context("writing the cluster document")?;
        self.pgherd(&["apply", "-f", &file.to_string_lossy()])
    }

    /// Asks for the status.
    pub fn status(&self) -> Result<Status> {
        let said = self.pgherd(&["status", "-o", "json"])?;
        ensure!(said.code == Some(0), "pgherd status: exit {:?}: {}", said.code, said.err.trim());
        serde_json::from_str(&said.out).with_context(|| format!("reading what pgherd status said: {}", said.out))
    }

    /// Whether one leader leads and every other member of the plan streams from it on its timeline.
    pub fn is_whole(&self) -> bool {
        self.status().is_ok_and(|status| status.is_whole(self.plan.nodes.len()))
    }

    /// Waits until the cluster is whole and each commit is on two members, or `give_up` says that nobody wants to know any more.
    pub fn wait_until_durable(&self, bound: Duration, give_up: impl Fn() -> bool) -> bool {
        let nodes = self.plan.nodes.len();
        let durable = || self.status().is_ok_and(|status| status.is_whole(nodes) && status.is_durable(nodes));
        wait_for_every(Duration::from_millis(STATUS_PAUSE_MS), bound, || give_up() || durable()) && !give_up()
    }

    /// Ends every process and removes the directory.
    pub fn end(&self) -> Result<()> {
        self.household.end_all()?;
        remove_dir(&self.plan.dir)
    }

    /// A plan with all nodes on 127.0.0.1, told apart by their ports.
    pub fn plan_on_loopback(dir: &Path, nodes: u16, etcd_members: u16, ports: &super::ports::PortBlock, programs: Programs) -> Plan {
        let member = |index| EtcdMember {
            name: format!("e{}", index + 1),
            client_port: ports.etcd_client(index),
            peer_port: ports.etcd_peer(index),
        };
        let etcd: Vec<EtcdMember> = (0..etcd_members).map(member).collect();
        let node = |index| NodePlan {
            declared: DeclaredMember {
                name: format!("n{}", index + 1),
                address: "127.0.0.1".into(),
                port: ports.postgres(index),
                api_port: ports.api(index),
                tags: Default::default(),
            },
            endpoints: etcd.iter().map(EtcdMember::client_url).collect(),
            postgres_listen: "127.0.0.1".into(),
            api_listen: (Ipv4Addr::LOCALHOST, ports.api(index)).into(),
        };
        Plan {
            dir: dir.to_owned(),
            cluster: "demo".into(),
            nodes: (0..nodes).map(node).collect(),
            frontends: Some(Frontends { write: ports.write(), read: ports.read(), stats: ports.stats(), checks: Checks::default() }),
            programs,
            etcd,
        }
    }

    /// A cluster document for the plan's members, with the reference's parameters.
    pub fn document(&self) -> Result<ClusterDocument> {
        Ok(ClusterDocument {
            name: self.plan.cluster.clone(),
            members: self.plan.nodes.iter().map(|node| node.declared.clone()).collect(),
            ttl_s: 5,
            loop_wait_s: 1,
            failsafe: None,
            ha: Vec::new(),
            mode: "quorum".into(),
            replication: Vec::new(),
            version: self.plan.programs.postgres_major()?,
            parameters: [("max_connections", "50"), ("shared_buffers", "16MB"), ("wal_keep_size", "128MB")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            pg_hba: vec!["host all all 127.0.0.0/8 scram-sha-256".into()],
            postgres: Vec::new(),
        })
    }
}

/// Removes a cluster's directory with everything in it.
pub fn remove_dir(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

/// Runs a command to its end, but no longer than `limit`.
pub fn run(mut command: Command, limit: Duration) -> Result<Said> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
    let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let mut ended = None;
    wait_for(limit, || {
        ended = child.try_wait().ok().flatten();
        ended.is_some()
    });
    let Some(status) = ended else {
        let _ = child.kill();
        let _ = child.wait();
        bail!("{:?} did not end within {} s", command, limit.as_secs());
    };
    let text = |reader: std::thread::JoinHandle<String>| reader.join().unwrap_or_default();
    Ok(Said { code: status.code(), out: text(out), err: text(err) })
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::super::ports::PortBlock;
    use super::*;

    /// A plan with the real etcd and HAProxy in a directory that the servers' user can reach.
    fn plan(dir: &Path, ports: &PortBlock) -> Plan {
        // Not run here; any program will do.
        let pgherd = dir.with_file_name("pgherd");
        for program in [&pgherd, &dir.with_file_name("pgherd-guard")] {
            fs::copy("/bin/true", program).unwrap();
        }
        LocalCluster::plan_on_loopback(dir, 3, 3, ports, Programs::find(&pgherd).unwrap())
    }

    #[test]
    fn etcd_and_haproxy_of_a_local_cluster_run_and_leave_nothing_behind() {
        let place = tempfile::Builder::new().prefix("pgherd-").permissions(fs::Permissions::from_mode(0o755)).tempdir_in("/tmp").unwrap();
        let dir = place.path().join("c");
        let ports = PortBlock::free().unwrap();
        let cluster = LocalCluster::lay_out(plan(&dir, &ports)).unwrap();
        cluster.start_etcd().unwrap();
        cluster.start_haproxy().unwrap();

        let mode = |name: &str| fs::metadata(dir.join("secrets").join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("superuser"), mode("replication")), (0o600, 0o600));
        assert_eq!(cluster.household().living().len(), 4, "{:?}", cluster.household().living());
        let haproxy = cluster.household().named("haproxy").unwrap();

        cluster.end().unwrap();
        assert!(!haproxy.is_alive());
        assert!(!dir.exists());
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let mut command = Command::new("sleep");
        command.arg("300");
        assert!(run(command, Duration::from_millis(50)).is_err());
    }
}
