//! Servers for one test.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid, setgid, setgroups, setuid};
use pgherd::facts::postgres::{ControlFacts, DataDirectory, Probe, ProbeOutcome, SqlFacts};
use pgherd::policy::hba::{HbaInputs, pg_hba_conf, pg_ident_conf};
use pgherd::policy::parameters::{ConfigInputs, Parameters, command_line, postgresql_conf};
use pgherd::postgres::conninfo::{PassfileEntry, Target, build, write_passfile};
use pgherd::postgres::roles::{Account, Accounts, ensure_roles};
use pgherd::postgres::{
    CloneJob, ConfigFiles, InitdbJob, Installation, Keep, Layout, LeaderServer, Secret, Sql, clone_from, configure, data_directory, initdb,
    postmaster_command, set_standby,
};
use pgherd::types::Lsn;

use super::wait::holds_within;

pub const LIMIT: Duration = Duration::from_secs(20);
pub const PATIENCE: Duration = Duration::from_secs(60);
const PROBE_LIMIT: Duration = Duration::from_secs(5);
const CLONE_LIMIT: Duration = Duration::from_secs(120);
/// Told apart from everything else in a log.
pub const SUPERUSER_PASSWORD: &str = "canary-su:per\\'user";
pub const REPLICATION_PASSWORD: &str = "canary-repl:ica\\tion";
pub const REWIND_PASSWORD: &str = "canary-rewind";
/// Holds what a shell, SQL or a connection string could trip over.
pub const REPLICATION_USER: &str = "repl \"i'c\\ator";

/// Where to look: PGHERD_TEST_PG_BINS (separated by colons), or the distribution's and the tests' own.
pub async fn installations() -> Vec<Installation> {
    become_postgres();
    let mut found = Vec::new();
    match std::env::var_os("PGHERD_TEST_PG_BINS") {
        Some(named) => {
            for bin_dir in std::env::split_paths(&named) {
                found.push(Installation::find(Some(&bin_dir), None).await.unwrap());
            }
        }
        None => {
            found.push(Installation::find(None, None).await.expect("the tests need a PostgreSQL: make setup"));
            let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/postgresql-17/bin");
            if own.is_dir() {
                found.push(Installation::find(Some(&own), Some(17)).await.unwrap());
            }
        }
    }
    found
}

/// Once per process, for all its threads.
fn become_postgres() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if geteuid().is_root() {
            let user = User::from_name("postgres").unwrap().expect("there is a user postgres where PostgreSQL is installed");
            setgroups(&[user.gid]).unwrap();
            setgid(user.gid).unwrap();
            setuid(user.uid).unwrap();
        }
    });
}

/// A directory in memory where there is room: the tests sync a lot.
pub fn place() -> tempfile::TempDir {
    become_postgres();
    let in_memory = nix::sys::statvfs::statvfs("/dev/shm").is_ok_and(|shm| shm.blocks_available() * shm.fragment_size() > 4 << 30);
    if in_memory { tempfile::tempdir_in("/dev/shm").unwrap() } else { tempfile::tempdir().unwrap() }
}

/// The programs that hold the lock of the work on a data directory as their standard input, by their names.
pub fn programs_with_the_lock(layout: &Layout) -> Vec<String> {
    let lock = layout.rewind_dir().join("lock");
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|process| process.path());
    let with = processes.filter(|process| std::fs::read_link(process.join("fd/0")).is_ok_and(|input| input == lock));
    with.filter_map(|process| Some(std::fs::read_to_string(process.join("comm")).ok()?.trim().to_owned())).collect()
}

/// Stands in for a program that a killed daemon left.
pub fn left_with_the_lock(layout: &Layout) -> Child {
    std::fs::create_dir_all(layout.rewind_dir()).unwrap();
    let lock = File::options().create(true).truncate(false).write(true).read(true).open(layout.rewind_dir().join("lock")).unwrap();
    lock.lock().unwrap();
    Command::new("/bin/sleep").arg("600").stdin(lock).spawn().unwrap()
}

/// One server: its places, its settings, and its process while it runs.
pub struct Server {
    pub installation: Installation,
    pub layout: Layout,
    pub name: String,
    pub port: u16,
    pub inputs: ConfigInputs,
    pub sql: Sql,
    root: PathBuf,
    postmaster: Option<Child>,
}

impl Server {
    /// Places only; nothing is made.
    pub fn new(installation: &Installation, root: &Path, name: &str) -> Server {
        Server::with_wal_dir(installation, root, name, None)
    }

    pub fn with_wal_dir(installation: &Installation, root: &Path, name: &str, wal_dir: Option<&Path>) -> Server {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let layout = Layout::new(&root.join(name), wal_dir).unwrap();
        let inputs = ConfigInputs {
            cluster: "main".parse().unwrap(),
            major_version: installation.major,
            listen: "127.0.0.1".into(),
            port,
            socket_dir: root.display().to_string(),
            log_dir: None,
            parameters: parameters(&[("fsync", "off"), ("shared_buffers", "8MB"), ("log_statement", "all"), ("wal_keep_size", "64MB")]),
            member_parameters: Parameters::new(),
            archive_command: None,
            restore_command: None,
            primary_conninfo: None,
            primary_slot_name: None,
            data_dir: layout.data_dir().display().to_string(),
            failover_slots: false,
            floor: None,
            syncfs_tells_errors: true,
        };
        let sql = Sql::local(root, port, "postgres");
        let (installation, root, name) = (installation.clone(), root.to_owned(), name.to_owned());
        Server { installation, layout, name, port, inputs, sql, root, postmaster: None }
    }

    /// A primary that runs, with its roles.
    pub async fn primary(installation: &Installation, root: &Path, name: &str) -> Server {
        let mut server = Server::new(installation, root, name);
        server.make_primary().await;
        server
    }

    pub async fn make_primary(&mut self) {
        initdb(&self.installation, &self.layout, &initdb_job()).await.unwrap();
        self.start().await;
        ensure_roles(&self.sql, &accounts(), LIMIT).await.unwrap();
    }

    pub fn data_dir(&self) -> &Path {
        self.layout.data_dir()
    }

    pub fn files(&self) -> ConfigFiles {
        let access = HbaInputs {
            members: vec!["127.0.0.1".into()],
            os_user: User::from_uid(geteuid()).unwrap().unwrap().name,
            superuser: "postgres".into(),
            replication: REPLICATION_USER.into(),
            rewind: Some("rewinder".into()),
            pg_hba: vec!["host all postgres {members} scram-sha-256".into()],
            pg_ident: Vec::new(),
        };
        let postgresql_conf = postgresql_conf(&self.inputs).unwrap().text;
        ConfigFiles {
            postgresql_conf,
            pg_hba: pg_hba_conf(&access),
            pg_ident: pg_ident_conf(&access),
            upstream: pgherd::policy::parameters::live::upstream_conf(&self.inputs).unwrap(),
        }
    }

    pub fn passfile(&self) -> PathBuf {
        let path = self.root.join(format!("{}.pgpass", self.name));
        let password = Secret::new(REPLICATION_PASSWORD);
        write_passfile(&path, &[PassfileEntry { user: REPLICATION_USER, password: &password }]).unwrap();
        path
    }

    /// How this server follows another.
    pub fn conninfo_to(&self, other: &Server) -> String {
        build(Target {
            host: "127.0.0.1",
            port: other.port,
            user: REPLICATION_USER,
            passfile: &self.passfile(),
            application_name: &self.name,
            dbname: None,
        })
    }

    pub fn as_leader(&self) -> LeaderServer {
        LeaderServer { host: "127.0.0.1".into(), port: self.port, user: "rewinder".into(), password: Secret::new(REWIND_PASSWORD) }
    }

    pub async fn clone_job(&self, leader: &Server, keep: Keep) -> CloneJob {
        CloneJob {
            conninfo: self.conninfo_to(leader),
            source: leader.as_leader().look(LIMIT).await.unwrap(),
            max_rate_bytes: None,
            compress: Some("server-gzip".into()),
            checkpoint_fast: true,
            keep,
            tablespace_map: Default::default(),
            limit: CLONE_LIMIT,
            watch: Default::default(),
        }
    }

    /// A clone of `leader` that streams from it.
    pub async fn standby_of(leader: &Server, name: &str) -> Server {
        let mut standby = Server::new(&leader.installation, &leader.root, name);
        let job = standby.clone_job(leader, Keep::Empty).await;
        clone_from(&standby.installation, &standby.layout, &job).await.unwrap();
        standby.follow(leader).await;
        standby
    }

    /// Starts it as a standby of `leader`, and waits until it streams.
    pub async fn follow(&mut self, leader: &Server) {
        self.inputs.primary_conninfo = Some(self.conninfo_to(leader));
        set_standby(self.data_dir(), true).unwrap();
        self.start().await;
        self.until("it streams", |facts| facts.walreceiver.as_ref().is_some_and(|receiver| receiver.status == "streaming")).await;
    }

    pub async fn install(&self) {
        let outcome = configure::install_stopped(&self.installation, &self.layout, &self.files()).await.unwrap();
        assert!(!matches!(outcome, configure::Outcome::PutBack { .. }), "{outcome:?}");
    }

    /// Installs its files, starts it, and waits until it accepts connections.
    pub async fn start(&mut self) {
        self.install().await;
        self.spawn();
        self.until("it accepts connections", |_| true).await;
    }

    /// Starts the postmaster with what is there, and does not wait.
    pub fn spawn(&mut self) {
        assert!(self.postmaster.is_none(), "it runs already");
        let command = postmaster_command(&self.installation, &self.layout, &command_line(&self.inputs));
        let log = || File::options().create(true).append(true).open(self.log_path()).unwrap();
        let child = Command::new(&command.program)
            .args(&command.argv[1..])
            .env_clear()
            .envs(&command.env)
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn();
        self.postmaster = Some(child.unwrap());
    }

    fn log_path(&self) -> PathBuf {
        self.root.join(format!("{}.log", self.name))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.postmaster.as_ref().unwrap().id().cast_signed())
    }

    /// Whether the postmaster has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        let ended = self.postmaster.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
        if ended {
            self.postmaster = None;
        }
        ended
    }

    pub async fn probe(&self) -> Probe {
        self.sql.probe(PROBE_LIMIT).await
    }

    pub async fn facts(&self) -> SqlFacts {
        match self.probe().await.outcome {
            ProbeOutcome::Accepting(facts) => *facts,
            other => panic!("{} does not accept connections: {other:?}\n{}", self.name, self.log()),
        }
    }

    /// Waits until it has replayed what `leader` has written by now.
    pub async fn catches_up_with(&self, leader: &Server) -> SqlFacts {
        let position = leader.write_position().await;
        self.until("it has all", |facts| facts.replay_lsn >= position).await
    }

    /// Probes until it is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&SqlFacts) -> bool) -> SqlFacts {
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut looks = tokio::time::interval(Duration::from_millis(50));
        loop {
            looks.tick().await;
            let probe = self.probe().await;
            match probe.outcome {
                ProbeOutcome::Accepting(facts) if wanted(&facts) => return *facts,
                other => assert!(std::time::Instant::now() < deadline, "{}: not seen that {what}: {other:?}\n{}", self.name, self.log()),
            }
        }
    }

    pub async fn run(&self, statements: &str) {
        self.sql.with(LIMIT, async |connection| connection.execute(statements).await).await.unwrap();
    }

    /// The one text that a statement gives.
    pub async fn ask(&self, statement: &str) -> String {
        let row = self.sql.with(LIMIT, async |connection| connection.row(statement).await).await.unwrap();
        row.get(0).unwrap_or_default().to_owned()
    }

    /// Asks until that is the answer.
    pub async fn until_asked(&self, what: &str, statement: &str, answer: &str) {
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut looks = tokio::time::interval(Duration::from_millis(50));
        while self.ask(statement).await != answer {
            looks.tick().await;
            assert!(std::time::Instant::now() < deadline, "{}: not seen that {what}\n{}", self.name, self.log());
        }
    }

    /// How far it has written: behind a copy the next record would be inserted past the header of a segment that nobody has begun to write, and a
    /// standby gets there only with the next record, up to 15 s later.
    pub async fn write_position(&self) -> Lsn {
        self.ask("select pg_current_wal_flush_lsn()").await.parse().unwrap()
    }

    /// Promotes and waits until it is out of recovery.
    pub async fn promote(&self) -> SqlFacts {
        self.sql.session(LIMIT).await.unwrap().promote(LIMIT).await.unwrap();
        self.until("it is out of recovery", |facts| !facts.in_recovery).await
    }

    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.end(Signal::SIGINT)
    }

    /// As a crash: nothing is written at the end.
    pub fn crash(&mut self) -> Option<ExitStatus> {
        self.end(Signal::SIGQUIT)
    }

    /// Ends the postmaster by this signal. None = it did not run.
    pub fn end(&mut self, signal: Signal) -> Option<ExitStatus> {
        if let Some(postmaster) = &self.postmaster {
            let _ = kill(Pid::from_raw(postmaster.id().cast_signed()), signal);
        }
        self.wait()
    }

    /// Waits until the postmaster has ended. None = it did not run.
    pub fn wait(&mut self) -> Option<ExitStatus> {
        let mut child = self.postmaster.take()?;
        let mut ended = None;
        if !holds_within(PATIENCE, || {
            ended = child.try_wait().unwrap();
            ended.is_some()
        }) {
            let _ = child.kill();
            let _ = child.wait();
            assert!(std::thread::panicking(), "{} did not stop\n{}", self.name, self.log());
        }
        ended
    }

    pub async fn look(&self) -> DataDirectory {
        data_directory::look(&self.installation, &self.layout).await
    }

    pub async fn control(&self) -> ControlFacts {
        match self.look().await {
            DataDirectory::Full(control) => control,
            other => panic!("{}: {other:?}", self.name),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &self.postmaster {
            // A test may have frozen it.
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGCONT);
        }
        self.end(Signal::SIGQUIT);
    }
}

pub fn parameters(pairs: &[(&str, &str)]) -> Parameters {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), Some((*value).to_owned()))).collect()
}

pub fn initdb_job() -> InitdbJob {
    InitdbJob {
        superuser: "postgres".into(),
        password: Secret::new(SUPERUSER_PASSWORD),
        encoding: Some("UTF8".into()),
        locale: Some("C.UTF-8".into()),
        data_checksums: true,
        auth_local: "peer".into(),
        auth_host: "scram-sha-256".into(),
    }
}

pub fn accounts() -> Accounts {
    let account = |username: &str, password: &str| Account { username: username.into(), password: Secret::new(password) };
    Accounts {
        superuser: account("postgres", SUPERUSER_PASSWORD),
        replication: account(REPLICATION_USER, REPLICATION_PASSWORD),
        rewind: Some(account("rewinder", REWIND_PASSWORD)),
    }
}

/// Looks until it holds, without blocking what runs beside.
pub async fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    while !condition() {
        looks.tick().await;
        assert!(std::time::Instant::now() < deadline, "it did not come to pass");
    }
}

/// The same for what has to be asked for.
pub async fn eventually_async(mut condition: impl AsyncFnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut looks = tokio::time::interval(Duration::from_millis(50));
    while !condition().await {
        looks.tick().await;
        assert!(std::time::Instant::now() < deadline, "it did not come to pass");
    }
}
