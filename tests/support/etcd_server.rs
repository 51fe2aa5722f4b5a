//! Real etcd members on loopback, in a directory of their own, ended by pid when the test ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::etcd::EtcdMember;
use pgherd::cli::demo::ports::PortBlock;
use pgherd::cli::demo::process::{Household, OsUser, ProcessId, become_subreaper, end_of, wait_for};
use pgherd::etcd::{Etcd, Settings, TlsFiles};

/// Bound on whatever a healthy machine does at once and a noisy one later.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Bound on a whole test.
const TEST_LIMIT: Duration = Duration::from_secs(180);

/// Runs a test with a cluster of its own, and not for ever.
pub async fn run<F: Future<Output = ()>>(version: Version, members: u16, extra: &[&str], test: impl FnOnce(EtcdServer) -> F) {
    let server = EtcdServer::start(version, members, extra).await;
    tokio::time::timeout(TEST_LIMIT, test(server)).await.expect("the test does not come to an end");
}

/// Which etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// The distribution's: Debian 12 has 3.4.23, with every bug that SAFETY 6 names.
    Distribution,
    /// 3.5.1, laid down by `make setup-tests`.
    V3_5,
}

impl Version {
    fn program(self) -> PathBuf {
        let program = match self {
            Version::Distribution => PathBuf::from("/usr/bin/etcd"),
            Version::V3_5 => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/etcd-3.5/etcd"),
        };
        assert!(program.is_file(), "{} is missing: run `make setup-tests`", program.display());
        program
    }
}

/// One etcd cluster.
pub struct EtcdServer {
    program: PathBuf,
    members: Vec<EtcdMember>,
    token: String,
    extra: Vec<String>,
    tls: Option<TlsFiles>,
    household: Household,
    _ports: PortBlock,
    place: tempfile::TempDir,
}

impl EtcdServer {
    /// Starts `count` members and waits until they answer. `extra` goes to each one's command line.
    async fn start(version: Version, count: u16, extra: &[&str]) -> EtcdServer {
        EtcdServer::start_as(version, count, extra, None).await
    }

    /// One member that speaks TLS as `extra` says; `tls` is what its clients have.
    pub async fn start_tls(version: Version, extra: &[&str], tls: TlsFiles) -> EtcdServer {
        EtcdServer::start_as(version, 1, extra, Some(tls)).await
    }

    async fn start_as(version: Version, count: u16, extra: &[&str], tls: Option<TlsFiles>) -> EtcdServer {
        become_subreaper().unwrap();
        let ports = PortBlock::free().unwrap();
        let member =
            |index: u16| EtcdMember { name: format!("e{index}"), client_port: ports.etcd_client(index), peer_port: ports.etcd_peer(index) };
        let place = place();
        let user = OsUser { name: "whoever runs the tests".into(), change_to: None };
        let server = EtcdServer {
            program: version.program(),
            members: (0..count).map(member).collect(),
            token: "tests".into(),
            extra: extra.iter().map(|&arg| arg.to_owned()).collect(),
            tls,
            household: Household::open(place.path(), user).unwrap(),
            _ports: ports,
            place,
        };
        (0..count).for_each(|index| server.start_member(usize::from(index)));
        server.wait_ready().await;
        server
    }

    /// Starts one member, again if it ran before.
    pub fn start_member(&self, index: usize) {
        let member = &self.members[index];
        let mut command = member.command(&self.program, self.household.dir(), &self.members, &self.token);
        if self.tls.is_some() {
            // The last one counts.
            let url = self.url(member);
            command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        }
        command.args(&self.extra);
        let log = self.place.path().join(format!("{}.log", member.name));
        self.household.spawn(&member.name, command, &log, false).unwrap();
    }

    /// Forgets all data, and starts anew as another cluster on the same ports.
    pub async fn rebuild(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
            std::fs::remove_dir_all(self.place.path().join(&self.members[index].name)).unwrap();
        }
        self.token = "rebuilt".into();
        (0..self.members.len()).for_each(|index| self.start_member(index));
        self.wait_ready().await;
    }

    /// Waits until a majority answers.
    pub async fn wait_ready(&self) {
        let ready = async {
            let mut again = tokio::time::interval(Duration::from_millis(50));
            while self.etcd().read_view().await.is_err_and(|e| !matches!(e, pgherd::etcd::EtcdError::Refused(_))) {
                again.tick().await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, ready).await.is_ok(), "etcd did not start:\n{}", self.log());
    }

    fn log(&self) -> String {
        let read = |member: &EtcdMember| std::fs::read_to_string(self.place.path().join(format!("{}.log", member.name)));
        self.members.iter().filter_map(|member| read(member).ok()).collect()
    }

    fn process(&self, index: usize) -> ProcessId {
        self.household.named(&self.members[index].name).unwrap()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&self, index: usize) {
        let process = self.process(index);
        process.signal(Signal::SIGKILL);
        assert!(wait_for(PATIENCE, || end_of(process).is_some()), "etcd does not end");
    }

    /// Hangs: connections stay, nothing answers.
    pub fn freeze(&self, index: usize) {
        self.process(index).signal(Signal::SIGSTOP);
    }

    /// Goes on.
    pub fn thaw(&self, index: usize) {
        self.process(index).signal(Signal::SIGCONT);
    }

    /// Client URL of each member.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| self.url(member)).collect()
    }

    fn url(&self, member: &EtcdMember) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        member.client_url().replacen("http", scheme, 1)
    }

    /// Client port of a member.
    pub fn port(&self, index: usize) -> u16 {
        self.members[index].client_port
    }

    /// Settings for all members.
    pub fn settings(&self) -> Settings {
        Settings { tls: self.tls.clone(), ..settings(self.endpoints()) }
    }

    /// A handle of its own.
    pub fn etcd(&self) -> Etcd {
        Etcd::new(self.settings()).unwrap()
    }

    /// A client without any of our care: a stranger, or an administrator.
    pub async fn stranger(&self) -> etcd_client::Client {
        etcd_client::Client::connect(self.endpoints(), None).await.unwrap()
    }

    /// Which member leads.
    pub async fn leader(&self) -> usize {
        for (index, endpoint) in self.endpoints().iter().enumerate() {
            let mut client = etcd_client::Client::connect([endpoint], None).await.unwrap();
            let status = client.status().await.unwrap();
            if status.leader() == status.header().unwrap().member_id() {
                return index;
            }
        }
        panic!("no member of etcd leads");
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        if let Err(e) = self.household.end_all() {
            eprintln!("{e:#}");
        }
    }
}

/// In memory where that is possible: a disk that stalls for seconds while other tests run is not what is tested here.
fn place() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Settings with a bound that a noisy machine keeps, for the cluster `main`.
pub fn settings(endpoints: Vec<String>) -> Settings {
    Settings { request_timeout: Duration::from_secs(5), ..Settings::plain(endpoints, "/pgherd", "main".parse().unwrap()) }
}
