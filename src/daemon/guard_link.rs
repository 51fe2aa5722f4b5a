//! The daemon's end of the guard: who it is now, orders to it in their order, its facts as events, and what happens when it is gone.
//!
//! The rule that surprises: a guard that is gone or silent is replaced only after every process of PostgreSQL was ended by scan, by
//! the daemon itself. Until then nothing is known to be dead.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::clock::BootTime;
use crate::facts::guard::GuardFacts;
use crate::guard::client::{self, GuardClient, GuardError};
use crate::guard::protocol::{ByeReason, Refusal, Request, SOCKET_NAME, StopOrder};
use crate::guard::{scan, sys};
use crate::machine::action::StopMode;
use crate::machine::event::Event;
use crate::policy::deadlines::LeaseTimes;
use crate::types::LockIdentity;

/// How long an order may take. The guard never waits for anything itself.
pub const ORDER_TIMEOUT_MS: u64 = 2_000;
/// How long processes may take to vanish after SIGKILL before the daemon reports that it could not fence.
const SCAN_TIMEOUT_MS: u64 = 30_000;
/// Orders that may wait; each is repeated by the machine until it is seen to be done.
const ORDERS_MAX: usize = 64;
/// Between a fast stop's patience and SIGKILL: what an immediate stop may take.
const IMMEDIATE_PATIENCE_MS: u64 = 5_000;

/// Why no guard could be had, and the daemon's exit code for it.
#[derive(Debug, thiserror::Error)]
pub enum NoGuard {
    /// Three daemons were ended by a signal within 60 s (SAFETY row 5).
    #[error("{0}")]
    CrashLoop(String),
    /// Another daemon owns the guard.
    #[error("{0}: another daemon runs for this data directory")]
    Owned(String),
    /// Anything else.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// Sends events into the daemon's queue from any thread.
pub type Sink = Arc<dyn Fn(Event) + Send + Sync>;

/// The guard of this run directory.
pub struct GuardLink {
    run_dir: PathBuf,
    data_dir: PathBuf,
    binary: PathBuf,
    sink: Sink,
    client: Mutex<Arc<GuardClient>>,
    orders: mpsc::SyncSender<Request>,
}

impl GuardLink {
    /// Finds the guard that is there, or starts one. Blocking; before the runtime.
    ///
    /// # Errors
    /// [`NoGuard`], which names the exit code.
    pub fn open(run_dir: &Path, data_dir: &Path, binary: &Path, clear_crashes: bool, sink: Sink) -> Result<Arc<Self>, NoGuard> {
        if clear_crashes && let Ok(Some(looker)) = GuardClient::connect(run_dir, false) {
            looker.request(&Request::Clear, Duration::from_millis(ORDER_TIMEOUT_MS)).context("clearing the crash count")?;
        }
        let client = match GuardClient::connect(run_dir, true) {
            Ok(Some(client)) => client,
            Ok(None) => GuardClient::spawn(binary, run_dir, data_dir)?,
            // A frozen guard keeps no promise: what it keeps is ended without it, and it with that (SAFETY row 3).
            Err(GuardError::Silent(_)) => {
                scan::fence_by_scan(data_dir, Duration::from_millis(SCAN_TIMEOUT_MS)).context("ending PostgreSQL without the guard")?;
                end_guard(run_dir)?;
                GuardClient::spawn(binary, run_dir, data_dir)?
            }
            Err(GuardError::Version(_)) => {
                client::upgrade(run_dir, binary)?;
                GuardClient::connect(run_dir, true).map_err(anyhow::Error::from)?.context("the upgraded guard does not answer")?
            }
            Err(GuardError::Refused { reason: Refusal::CrashLoop, message, .. }) => return Err(NoGuard::CrashLoop(message)),
            Err(GuardError::Refused { reason: Refusal::Owned, message, .. }) => return Err(NoGuard::Owned(message)),
            Err(other) => return Err(NoGuard::Other(anyhow::Error::from(other).context("connecting to the guard"))),
        };
        let (orders, queue) = mpsc::sync_channel(ORDERS_MAX);
        let link = Arc::new(GuardLink {
            run_dir: run_dir.to_owned(),
            data_dir: data_dir.to_owned(),
            binary: binary.to_owned(),
            sink,
            client: Mutex::new(Arc::new(client)),
            orders,
        });
        link.listen()?;
        let worker = Arc::clone(&link);
        thread::Builder::new()
            .name("guard-orders".into())
            .spawn(move || worker.carry_out(&queue))
            .context("starting the thread for orders to the guard")?;
        Ok(link)
    }

    fn listen(&self) -> anyhow::Result<()> {
        let (facts, ended, died) = (Arc::clone(&self.sink), Arc::clone(&self.sink), Arc::clone(&self.sink));
        let client = self.client();
        client.on_death(move || died(Event::GuardGone))?;
        client::subscribe(&self.run_dir, move |each| facts(Event::Guard(each)), move || ended(Event::GuardGone))
    }

    fn carry_out(&self, queue: &mpsc::Receiver<Request>) {
        while let Ok(request) = queue.recv() {
            let client = self.client();
            match client.request(&request, Duration::from_millis(ORDER_TIMEOUT_MS)) {
                Ok(facts) => (self.sink)(Event::Guard(facts)),
                Err(GuardError::Refused { message, facts, .. }) => {
                    tracing::info!(message, "the guard refused an order");
                    if let Some(facts) = facts {
                        (self.sink)(Event::Guard(*facts));
                    }
                }
                Err(error) => {
                    tracing::error!(error = %error, "the guard does not do its work");
                    self.say_gone(&client);
                }
            }
        }
    }

    fn client(&self) -> Arc<GuardClient> {
        Arc::clone(&self.client.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives an order; the machine repeats it until it is seen to be done, so a full queue loses nothing.
    pub fn order(&self, request: Request) {
        if self.orders.try_send(request).is_err() {
            tracing::warn!("too many orders to the guard are waiting; this one is given again later");
        }
    }

    /// Orders the end of PostgreSQL.
    pub fn stop(&self, mode: StopMode) {
        let now = BootTime::now();
        let order = match mode {
            StopMode::Fast { patience } => {
                let immediate = now + patience;
                StopOrder::planned(now, immediate, immediate + Duration::from_millis(IMMEDIATE_PATIENCE_MS))
            }
            StopMode::Kill => StopOrder::at_once(now),
        };
        self.order(Request::Stop(order));
    }

    /// Asks and waits. Blocking: not on the runtime's threads.
    ///
    /// # Errors
    /// The guard's refusal, or its silence.
    pub fn ask(&self, request: &Request) -> Result<GuardFacts, GuardError> {
        self.request(request, Duration::from_millis(ORDER_TIMEOUT_MS))
    }

    /// The news that a guard has died can be overtaken by the last that it said, which then stands: whoever finds it gone says so again.
    fn request(&self, request: &Request, patience: Duration) -> Result<GuardFacts, GuardError> {
        let client = self.client();
        let answer = client.request(request, patience);
        if matches!(answer, Err(GuardError::Gone(_))) {
            self.say_gone(&client);
        }
        answer
    }

    /// Nothing is said of a guard that another has replaced: the news would be taken for that one's end.
    fn say_gone(&self, client: &Arc<GuardClient>) {
        if Arc::ptr_eq(client, &self.client()) {
            (self.sink)(Event::GuardGone);
        }
    }

    /// Tells the guard until when the lock is proved, and waits for its acknowledgement. Called on the lease's thread.
    ///
    /// # Errors
    /// No acknowledgement within a renewal interval.
    pub fn acknowledge(&self, identity: LockIdentity, sent: BootTime, times: LeaseTimes) -> Result<(), GuardError> {
        match self.request(&Request::Lock { identity, sent, times }, times.renewal_interval()) {
            Ok(_) => Ok(()),
            // Recorded all the same: the ladder runs to its end, and PostgreSQL can be started again under this lock.
            Err(GuardError::Refused { reason: Refusal::LadderRuns, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Tells the guard that the lock is about to hang on another lease. Unlike [`GuardLink::acknowledge`] it takes no refusal for a yes.
    ///
    /// # Errors
    /// The guard's refusal, or its silence.
    pub fn acknowledge_move(&self, identity: LockIdentity, sent: BootTime, times: LeaseTimes) -> Result<(), GuardError> {
        self.request(&Request::Lock { identity, sent, times }, times.renewal_interval()).map(|_| ())
    }

    /// Ends every process of PostgreSQL without the guard, then has a new guard. Blocking.
    ///
    /// # Errors
    /// When processes are left, or no guard can be started.
    pub fn fence_by_scan(&self) -> anyhow::Result<()> {
        scan::fence_by_scan(&self.data_dir, Duration::from_millis(SCAN_TIMEOUT_MS)).context("ending PostgreSQL without the guard")?;
        if let Ok(facts) = self.ask(&Request::Facts) {
            // It lives and answers: what it saw is up to date again.
            (self.sink)(Event::Guard(facts));
            return Ok(());
        }
        let fresh = match GuardClient::connect(&self.run_dir, true) {
            Ok(Some(client)) => client,
            Ok(None) => GuardClient::spawn(&self.binary, &self.run_dir, &self.data_dir)?,
            Err(_) => {
                end_guard(&self.run_dir)?;
                GuardClient::spawn(&self.binary, &self.run_dir, &self.data_dir)?
            }
        };
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        self.listen()
    }

    /// SIGUSR2: guard and PostgreSQL stay, and our end is not a crash.
    pub fn leave(&self) {
        if let Err(error) = self.ask(&Request::Bye { reason: ByeReason::Leaving }) {
            tracing::warn!(error = %error, "could not say good-bye to the guard");
        }
    }

    /// The guard is told to end, which it does only if nothing of PostgreSQL is left. If it stays, our end is not a crash all the same.
    pub fn end(&self) {
        match self.ask(&Request::Shutdown) {
            // It ends its connections with itself: an answer may be missing.
            Ok(_) | Err(GuardError::Gone(_)) => {}
            Err(error) => {
                tracing::warn!(error = %error, "the guard does not end");
                let _ = self.ask(&Request::Bye { reason: ByeReason::Stopping });
            }
        }
    }
}

/// Ends a guard that does not answer, so that another can take its place: it holds the run directory's lock as long as it lives. Only
/// after the proof that nothing of PostgreSQL is left.
fn end_guard(run_dir: &Path) -> anyhow::Result<()> {
    let Ok(stream) = UnixStream::connect(run_dir.join(SOCKET_NAME)) else { return Ok(()) };
    let pid = sys::peer(&stream).context("finding the silent guard's process")?.pid;
    let process = sys::pidfd_open(pid).context("holding the silent guard's process")?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let is_guard = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgherd-guard"));
    anyhow::ensure!(is_guard, "process {pid} listens on the guard's socket and is {}: end it by hand", program.display());
    tracing::error!(pid, "the guard is alive and does not answer: it is ended");
    sys::pidfd_send_signal(process.as_fd(), Signal::SIGKILL).context("ending the silent guard")?;
    sys::wait_readable(&process).context("waiting for the end of the silent guard")
}
