//! One data directory, one guard, and a daemon that is as small as can be: for one test.
//!
//! The daemon is either this process, or a second copy of it ([`Daemon`]) that may be killed and frozen.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, mpsc};
use std::thread;
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid, setgid, setgroups, setuid};
use pgherd::clock::BootTime;
use pgherd::facts::guard::{GuardFacts, LastEnd, PostmasterFacts, StartId, Word};
use pgherd::guard::client::{GuardClient, GuardError};
use pgherd::guard::protocol::{ByeReason, Request, StartOrder, StopOrder};
use pgherd::guard::{scan, sys};
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity};
use serde::{Deserialize, Serialize};

use super::wait::holds_within;

/// How long anything may take on a machine that does much else. No test fails for being slow before that.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// How long an answer of a guard that is alive may take.
pub const ANSWER: Duration = Duration::from_secs(20);
/// A silent guard is not waited for longer.
pub const SILENCE: Duration = Duration::from_millis(500);
/// Set in a copy of this process that plays the daemon: the run directory.
const ROLE: &str = "PGHERD_TEST_DAEMON_OF";
const GUARD: &str = env!("CARGO_BIN_EXE_pgherd-guard");

/// Once per process, for all its threads.
fn prepare_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Orphans of a guard that is killed come to us: PID 1 may take its time.
        set_child_subreaper(true).unwrap();
        if geteuid().is_root() {
            let user = User::from_name("postgres").unwrap().expect("there is a user postgres where PostgreSQL is installed");
            setgroups(&[user.gid]).unwrap();
            setgid(user.gid).unwrap();
            setuid(user.uid).unwrap();
        }
    });
}

/// Where the programs of PostgreSQL are: PGHERD_TEST_PG_BINS (the first of it), or the distribution's.
fn bin_dir() -> PathBuf {
    if let Some(named) = std::env::var_os("PGHERD_TEST_PG_BINS") {
        return std::env::split_paths(&named).next().unwrap();
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("the tests need a PostgreSQL: make setup");
    let mut found: Vec<PathBuf> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    found.sort();
    found.retain(|bin| bin.join("postgres").exists());
    found.pop().expect("the tests need a PostgreSQL: make setup")
}

fn run(command: &mut Command) {
    let output = command.current_dir("/").output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn times(ttl_s: u64) -> LeaseTimes {
    LeaseTimes::new(Duration::from_secs(ttl_s))
}

pub fn identity() -> LockIdentity {
    LockIdentity { lease: LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(5) }, epoch: Epoch(7) }
}

pub fn lock(ttl_s: u64) -> Request {
    Request::Lock { identity: identity(), sent: BootTime::now(), times: times(ttl_s) }
}

pub struct World {
    place: tempfile::TempDir,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    pub guard: GuardClient,
}

impl World {
    /// A guard that keeps nothing yet; this process is its daemon.
    pub fn new() -> Self {
        Self::with(|_, _| {})
    }

    /// The same; `first` is called before there is a guard.
    pub fn with(first: impl FnOnce(&Path, &Path)) -> Self {
        prepare_process();
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let (run_dir, data_dir) = (root.join("run"), root.join("data"));
        std::fs::create_dir(&run_dir).unwrap();
        run(Command::new(bin_dir().join("initdb")).args(["-A", "trust", "-U", "postgres", "-N", "-D"]).arg(&data_dir));
        first(&run_dir, &data_dir);
        let guard = GuardClient::spawn(Path::new(GUARD), &run_dir, &data_dir).unwrap();
        Self { place, run_dir, data_dir, guard }
    }

    pub fn start_order(&self, word: Word) -> StartOrder {
        start_order(&self.run_dir, &self.data_dir, word)
    }

    pub fn ask(&self, request: &Request) -> Result<GuardFacts, GuardError> {
        self.guard.request(request, ANSWER)
    }

    /// Asks for what must be done.
    pub fn order(&self, request: &Request) -> GuardFacts {
        self.ask(request).unwrap_or_else(|error| panic!("{request:?}: {error}"))
    }

    /// Starts a primary under a lock, and waits until it accepts connections.
    pub fn primary(&self, ttl_s: u64) -> (StartId, i32) {
        self.order(&lock(ttl_s));
        let running = running(&self.order(&Request::Start(self.start_order(Word::Writable))));
        // A slow start must not meet the ladder.
        self.accepts(|| drop(self.order(&lock(ttl_s))));
        running
    }

    /// Waits until the server takes connections; `meanwhile` is called between two looks.
    pub fn accepts(&self, mut meanwhile: impl FnMut()) {
        let connects = holds_within(PATIENCE, || {
            meanwhile();
            sql(&self.run_dir, "SELECT 1").is_ok()
        });
        assert!(connects, "PostgreSQL does not take connections: {}", self.log());
    }

    pub fn sql(&self, statement: &str) -> Result<Vec<String>, String> {
        sql(&self.run_dir, statement)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.run_dir.join("postgres.log")).unwrap_or_default()
    }

    /// Facts as anybody may ask for them.
    pub fn look(&self) -> GuardFacts {
        let looker = GuardClient::connect(&self.run_dir, false).unwrap().expect("a guard listens");
        looker.request(&Request::Facts, ANSWER).unwrap()
    }

    /// Waits until the guard has told a proof of death, and returns how it came to that.
    pub fn proved_empty(&self) -> LastEnd {
        let mut last = None;
        let proved = holds_within(PATIENCE, || match self.look().postmaster {
            PostmasterFacts::ProvedEmpty { last: Some(end) } => {
                last = Some(end);
                true
            }
            _ => false,
        });
        assert!(proved, "no proof of death: {:?}", self.look());
        self.assert_nothing_left();
        last.unwrap()
    }

    pub fn assert_nothing_left(&self) {
        assert_eq!(scan::postgres_processes(&self.data_dir).unwrap(), Vec::<i32>::new(), "processes of PostgreSQL are left");
    }

    /// Waits until no process of PostgreSQL is left, without asking anybody.
    pub fn nothing_is_left_in_the_end(&self) {
        assert!(holds_within(PATIENCE, || scan::postgres_processes(&self.data_dir).unwrap().is_empty()), "processes are left");
    }

    /// This process is the daemon no longer.
    pub fn resign(&self) {
        self.order(&Request::Bye { reason: ByeReason::Leaving });
    }

    /// Hands the role of the daemon to another process.
    pub fn daemon(&self, test: &str) -> Daemon {
        self.resign();
        Daemon::start(&self.run_dir, test)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The guard first, by what stands for it and no later process of its number: it would start to prove things.
        if let Ok(pidfd) = sys::pidfd_open(self.guard.pid()) {
            let _ = sys::pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
        }
        let fenced = scan::fence_by_scan(&self.data_dir, PATIENCE);
        if std::thread::panicking() {
            eprintln!("the server's log in {}:\n{}", self.place.path().display(), self.log());
        } else {
            fenced.unwrap();
        }
    }
}

pub fn start_order(run_dir: &Path, data_dir: &Path, word: Word) -> StartOrder {
    let settings = [
        ("listen_addresses", String::new()),
        ("unix_socket_directories", run_dir.display().to_string()),
        ("fsync", "off".to_owned()),
        ("shared_buffers", "8MB".to_owned()),
    ];
    let mut arguments = vec!["-D".to_owned(), data_dir.display().to_string()];
    arguments.extend(settings.into_iter().flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]));
    StartOrder {
        program: bin_dir().join("postgres"),
        arguments,
        data_dir: data_dir.to_owned(),
        environment: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned()), ("LC_ALL".to_owned(), "C".to_owned())]),
        word,
        stderr: Some(run_dir.join("postgres.log")),
    }
}

/// Start and pid of a postmaster that must be running.
pub fn running(facts: &GuardFacts) -> (StartId, i32) {
    match &facts.postmaster {
        PostmasterFacts::Running { start, pid, .. } => (*start, *pid),
        other => panic!("not running: {other:?}"),
    }
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn connect(run_dir: &Path) -> Result<tokio_postgres::Client, String> {
    let conninfo = format!("host={} user=postgres dbname=postgres connect_timeout=10", run_dir.display());
    let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    Ok(client)
}

/// One statement; the first column of its rows as text.
fn sql(run_dir: &Path, statement: &str) -> Result<Vec<String>, String> {
    runtime().block_on(async {
        let client = connect(run_dir).await?;
        let messages = client.simple_query(statement).await.map_err(|error| format!("{error:?}"))?;
        let rows = messages.iter().filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        Ok(rows.collect())
    })
}

/// A session that commits one row after the other, and one that is busy for ever: it does not look up when its postmaster dies.
pub struct Busy {
    acknowledged: Arc<Mutex<Vec<(i64, BootTime)>>>,
    count: Arc<AtomicUsize>,
    busy_pid: i32,
}

impl Busy {
    pub fn start(world: &World) -> Self {
        world.sql("CREATE TABLE IF NOT EXISTS ledger (value bigint)").unwrap();
        let (acknowledged, count) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (run_dir, told, counted) = (world.run_dir.clone(), Arc::clone(&acknowledged), Arc::clone(&count));
        thread::spawn(move || runtime().block_on(commit_for_ever(&run_dir, &told, &counted)));
        let (tell_pid, pid) = mpsc::channel();
        let run_dir = world.run_dir.clone();
        thread::spawn(move || runtime().block_on(count_for_ever(&run_dir, &tell_pid)));
        let busy_pid = pid.recv_timeout(PATIENCE).expect("the busy session is there");
        let busy = Self { acknowledged, count, busy_pid };
        busy.commits_go_on();
        busy
    }

    /// Waits until another commit was acknowledged.
    pub fn commits_go_on(&self) {
        let before = self.count.load(Ordering::SeqCst);
        assert!(holds_within(PATIENCE, || self.count.load(Ordering::SeqCst) > before), "no commit is acknowledged");
    }

    /// The backend that looks at nothing but its query.
    pub fn pid(&self) -> i32 {
        self.busy_pid
    }

    /// No commit that was asked for after `proof` was acknowledged.
    pub fn nothing_was_acknowledged_after(&self, proof: BootTime) {
        let late = self.acknowledged.lock().unwrap().iter().filter(|(_, asked)| *asked > proof).count();
        assert_eq!(late, 0, "commits that were asked for after the proof of death were acknowledged");
    }

    pub fn values(&self) -> Vec<i64> {
        self.acknowledged.lock().unwrap().iter().map(|(value, _)| *value).collect()
    }
}

async fn commit_for_ever(run_dir: &Path, acknowledged: &Mutex<Vec<(i64, BootTime)>>, count: &AtomicUsize) {
    let client = connect(run_dir).await.unwrap();
    for value in 0_i64.. {
        let asked = BootTime::now();
        if client.execute("INSERT INTO ledger SELECT $1::bigint FROM pg_sleep(0.002)", &[&value]).await.is_err() {
            return;
        }
        acknowledged.lock().unwrap().push((value, asked));
        count.fetch_add(1, Ordering::SeqCst);
    }
}

async fn count_for_ever(run_dir: &Path, tell_pid: &mpsc::Sender<i32>) {
    let client = connect(run_dir).await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let query = client.query("SELECT count(*) FROM (SELECT generate_series(1, 1000000000000)) AS numbers", &[]);
    let tell = async {
        tell_pid.send(pid).unwrap();
    };
    let _ = tokio::join!(query, tell);
}

/// What the test tells the process that plays the daemon.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    Ask(Request),
    /// Renews this lock, each R, as if etcd had proved it.
    Renew {
        ttl_s: u64,
    },
}

/// A process that plays the daemon: it does as it is told, and may be killed and frozen.
pub struct Daemon {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Daemon {
    pub fn start(run_dir: &Path, test: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, run_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, orders, answers }
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn tell(&mut self, command: &Told) -> Result<GuardFacts, String> {
        writeln!(self.orders, "{}", serde_json::to_string(command).unwrap()).unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the daemon ended");
            // The test harness of that process says things on the same line.
            if let Some((_, answer)) = line.split_once("@@") {
                return serde_json::from_str(answer).unwrap();
            }
        }
    }

    pub fn ask(&mut self, request: Request) -> Result<GuardFacts, String> {
        self.tell(&Told::Ask(request))
    }

    pub fn renew(&mut self, ttl_s: u64) -> GuardFacts {
        self.tell(&Told::Renew { ttl_s }).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Plays the daemon, if that is what this process is for: until its standard input ends.
pub fn played_the_daemon() -> bool {
    let Some(run_dir) = std::env::var_os(ROLE).map(PathBuf::from) else { return false };
    prepare_process();
    let client = GuardClient::connect(&run_dir, true);
    for line in std::io::stdin().lines() {
        let answer = match (&client, serde_json::from_str::<Told>(&line.unwrap()).unwrap()) {
            (Ok(Some(client)), Told::Ask(request)) => client.request(&request, ANSWER).map_err(|error| error.to_string()),
            (Ok(Some(client)), Told::Renew { ttl_s }) => {
                let run_dir = run_dir.clone();
                thread::spawn(move || renew_for_ever(&run_dir, ttl_s));
                client.request(&lock(ttl_s), ANSWER).map_err(|error| error.to_string())
            }
            (Ok(None), _) => Err("no guard".to_owned()),
            (Err(error), _) => Err(error.to_string()),
        };
        println!("@@{}", serde_json::to_string(&answer).unwrap());
    }
    true
}

/// On a connection of its own, as the lease's thread of the real daemon.
fn renew_for_ever(run_dir: &Path, ttl_s: u64) {
    let client = GuardClient::connect(run_dir, true).unwrap().unwrap();
    let (_keep, never) = mpsc::channel::<()>();
    while never.recv_timeout(times(ttl_s).renewal_interval()).is_err() {
        let _ = client.request(&lock(ttl_s), times(ttl_s).renewal_interval());
    }
}

/// A stop that climbs every rung within a second or so.
pub fn hasty_stop() -> Request {
    let now = BootTime::now();
    Request::Stop(StopOrder::planned(now, now + Duration::from_millis(500), now + Duration::from_millis(1_000)))
}

/// A stop that waits for PostgreSQL.
pub fn patient_stop() -> Request {
    let now = BootTime::now();
    Request::Stop(StopOrder::planned(now, now + PATIENCE, now + PATIENCE))
}
