//! The daemon's end of the guard: asks, listens, notices its death.
//!
//! Blocking, on std alone: the lease thread uses it, and that thread has no runtime. Decides nothing; what a silent or dead guard means
//! is the daemon's to decide ([`super::scan::fence`] is what it then does).
//!
//! The rule that would surprise: a request that got no answer in time closes its connection, so that the guard, once it wakes up, drops
//! what it had not read yet instead of doing it late. The next request connects anew.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::protocol::{MESSAGE_MAX_BYTES, PROTOCOL_VERSION, Refusal, Request, Response, SOCKET_NAME};
use super::sys;
use crate::facts::guard::GuardFacts;

/// How long a guard that was just spawned may take until it answers.
pub const SPAWN_TIMEOUT_MS: u64 = 5_000;
/// How long `connect` waits for the answer to hello.
pub const HELLO_TIMEOUT_MS: u64 = 2_000;
const SPAWN_POLL_MS: u64 = 10;

/// Why a request has no `done`.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The guard answered no.
    #[error("the guard refused: {message}")]
    Refused {
        /// For branching.
        reason: Refusal,
        /// For people.
        message: String,
        /// Its state.
        facts: Option<Box<GuardFacts>>,
    },
    /// No answer in time: frozen, starved, or the request may or may not have been done.
    #[error("the guard did not answer within {0:?}")]
    Silent(Duration),
    /// Guard and daemon are of different versions: upgrade the guard.
    #[error("the guard speaks protocol version {0}, this program {PROTOCOL_VERSION}: upgrade the guard")]
    Version(u32),
    /// Nobody answers on the socket, or the connection broke.
    #[error("the guard is gone")]
    Gone(#[source] io::Error),
}

/// A connection to the guard, made again when it was lost. One request at a time; cheap enough to open one per thread.
pub struct GuardClient {
    socket: PathBuf,
    owner: bool,
    pid: i32,
    stream: Mutex<Option<BufReader<UnixStream>>>,
}

impl GuardClient {
    /// Connects to the guard of `run_dir`, as its owner (the daemon) or only to look. `Ok(None)`: no guard is there.
    ///
    /// # Errors
    /// [`GuardError::Refused`] with [`Refusal::CrashLoop`] or [`Refusal::Owned`], [`GuardError::Version`], or no sense in the answer.
    pub fn connect(run_dir: &Path, owner: bool) -> Result<Option<Self>, GuardError> {
        let socket = run_dir.join(SOCKET_NAME);
        let timeout = Duration::from_millis(HELLO_TIMEOUT_MS);
        match open(&socket, owner, timeout) {
            Ok((stream, pid)) => Ok(Some(Self { socket, owner, pid, stream: Mutex::new(Some(stream)) })),
            Err(GuardError::Gone(error)) if nobody_listens(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts a guard for `data_dir` (canonical) and connects to it as its owner. It lives in a session of its own, with our standard
    /// error and no other descriptor of ours.
    ///
    /// # Errors
    /// When it cannot be executed, or does not answer within [`SPAWN_TIMEOUT_MS`].
    pub fn spawn(binary: &Path, run_dir: &Path, data_dir: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(binary)
            .arg(run_dir)
            .arg(data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .current_dir("/")
            .spawn()
            .with_context(|| format!("starting the guard {}", binary.display()))?;
        let deadline = Instant::now() + Duration::from_millis(SPAWN_TIMEOUT_MS);
        loop {
            if let Some(client) = Self::connect(run_dir, true).context("greeting the guard")? {
                // Nobody else waits for it: without this it would stay a zombie for as long as this daemon lives.
                thread::Builder::new().name("guard-reaper".into()).spawn(move || child.wait()).context("starting a thread")?;
                return Ok(client);
            }
            if let Some(status) = child.try_wait().context("looking after the guard")? {
                anyhow::bail!("the guard ended at once: {status}");
            }
            anyhow::ensure!(Instant::now() < deadline, "the guard was started but does not listen within {SPAWN_TIMEOUT_MS} ms");
            thread::sleep(Duration::from_millis(SPAWN_POLL_MS));
        }
    }

    /// The guard's pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Asks, and waits for the answer, at most `timeout` in all (waiting for another thread's request not counted: give each thread its
    /// own client where that matters).
    ///
    /// # Errors
    /// See [`GuardError`]. After `Silent` or `Gone` it is unknown whether the request was done.
    pub fn request(&self, request: &Request, timeout: Duration) -> Result<GuardFacts, GuardError> {
        let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + timeout;
        if let Some(mut stream) = slot.take() {
            match exchange(&mut stream, request, deadline, timeout) {
                Ok(answer) => {
                    *slot = Some(stream);
                    return told(answer);
                }
                // The guard had hung up before (it was upgraded): it never got to see this request.
                Err(GuardError::Gone(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error),
            }
        }
        let (mut stream, _) = open(&self.socket, self.owner, timeout)?;
        let answer = exchange(&mut stream, request, deadline, timeout)?;
        *slot = Some(stream);
        told(answer)
    }

    /// Calls `then` once, on a thread of its own, when the guard's process has ended.
    ///
    /// # Errors
    /// When the guard is gone already, or no thread can be started.
    pub fn on_death(&self, then: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
        let pidfd = sys::pidfd_open(self.pid).context("watching the guard's process")?;
        let wait = move || {
            while let Err(error) = sys::wait_readable(&pidfd) {
                if error.kind() != io::ErrorKind::Interrupted {
                    break;
                }
            }
            then();
        };
        thread::Builder::new().name("guard-watch".into()).spawn(wait).context("starting a thread")?;
        Ok(())
    }
}

/// Replaces the program of the guard of `run_dir` by `binary`, which is tried first: a program that does not say our protocol version is
/// not let in. Returns when the new program answers.
///
/// # Errors
/// When there is no guard, the new program is not a guard of our version, or the guard could not execute it.
pub fn upgrade(run_dir: &Path, binary: &Path) -> anyhow::Result<()> {
    let said = Command::new(binary).arg("--protocol").stdin(Stdio::null()).output().context("trying the new guard")?;
    let said = String::from_utf8_lossy(&said.stdout);
    anyhow::ensure!(
        said.trim() == PROTOCOL_VERSION.to_string(),
        "{} says protocol version `{}`, but this program needs {PROTOCOL_VERSION}",
        binary.display(),
        said.trim()
    );
    let timeout = Duration::from_millis(SPAWN_TIMEOUT_MS);
    let deadline = Instant::now() + timeout;
    let stream = UnixStream::connect(run_dir.join(SOCKET_NAME)).context("connecting to the guard")?;
    let mut stream = BufReader::new(stream);
    let hello = Request::Hello { version: PROTOCOL_VERSION, owner: true };
    exchange(&mut stream, &hello, deadline, timeout)?;
    match exchange(&mut stream, &Request::Upgrade { binary: binary.to_owned() }, deadline, timeout)? {
        Response::Hello { version: PROTOCOL_VERSION } => Ok(()),
        Response::Refused { message, .. } => anyhow::bail!("the guard did not upgrade itself: {message}"),
        other => anyhow::bail!("the upgraded guard answered {other:?}"),
    }
}

/// Calls `each` with the guard's facts, now and at every change, on a thread of its own, until the guard is gone or silent; then `ended`,
/// once. A connection that ends under a guard that lives (an upgrade, or we read too slowly) is made again.
///
/// # Errors
/// When there is no guard, or no thread can be started.
pub fn subscribe(
    run_dir: &Path,
    mut each: impl FnMut(GuardFacts) + Send + 'static,
    ended: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let socket = run_dir.join(SOCKET_NAME);
    let mut subscription = Some(subscribe_once(&socket)?);
    let listen = move || {
        while let Some((mut stream, first)) = subscription {
            each(first);
            let mut line = Vec::new();
            while let Ok(1..) = read_line(&mut stream, &mut line) {
                if let Ok(Response::Changed { facts }) = serde_json::from_slice(&line) {
                    each(*facts);
                }
            }
            subscription = subscribe_once(&socket).ok();
        }
        ended();
    };
    thread::Builder::new().name("guard-facts".into()).spawn(listen).context("starting a thread")?;
    Ok(())
}

fn subscribe_once(socket: &Path) -> anyhow::Result<(BufReader<UnixStream>, GuardFacts)> {
    let timeout = Duration::from_millis(HELLO_TIMEOUT_MS);
    let (mut stream, _) = open(socket, false, timeout)?;
    let first = told(exchange(&mut stream, &Request::Subscribe, Instant::now() + timeout, timeout)?)?;
    stream.get_ref().set_read_timeout(None).context("setting up the subscription")?;
    Ok((stream, first))
}

fn told(answer: Response) -> Result<GuardFacts, GuardError> {
    match answer {
        Response::Done { facts } | Response::Changed { facts } => Ok(*facts),
        Response::Refused { reason, message, facts } => Err(GuardError::Refused { reason, message, facts: Some(facts) }),
        Response::Hello { version } => Err(GuardError::Version(version)),
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Connects and says hello; returns the guard's pid with the stream.
fn open(socket: &Path, owner: bool, timeout: Duration) -> Result<(BufReader<UnixStream>, i32), GuardError> {
    let deadline = Instant::now() + timeout;
    let stream = UnixStream::connect(socket).map_err(GuardError::Gone)?;
    let pid = sys::peer(&stream).map_err(GuardError::Gone)?.pid;
    let mut stream = BufReader::new(stream);
    match exchange(&mut stream, &Request::Hello { version: PROTOCOL_VERSION, owner }, deadline, timeout)? {
        Response::Hello { version: PROTOCOL_VERSION } => Ok((stream, pid)),
        Response::Hello { version } => Err(GuardError::Version(version)),
        Response::Refused { reason, message, facts } => Err(GuardError::Refused { reason, message, facts: Some(facts) }),
        Response::Done { .. } | Response::Changed { .. } => Err(GuardError::Gone(senseless("the guard answered something else to hello"))),
    }
}

fn senseless(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// One request, one line back. Any failure leaves the stream to be dropped by the caller.
fn exchange(stream: &mut BufReader<UnixStream>, request: &Request, deadline: Instant, timeout: Duration) -> Result<Response, GuardError> {
    let late = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => GuardError::Silent(timeout),
        _ => GuardError::Gone(error),
    };
    // A socket timeout of zero would mean "for ever".
    let left = || deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()).ok_or(GuardError::Silent(timeout));
    let mut message = serde_json::to_vec(request).map_err(|error| GuardError::Gone(senseless(error)))?;
    message.push(b'\n');
    stream.get_ref().set_write_timeout(Some(left()?)).map_err(GuardError::Gone)?;
    stream.get_mut().write_all(&message).map_err(late)?;
    stream.get_ref().set_read_timeout(Some(left()?)).map_err(GuardError::Gone)?;
    let mut line = Vec::new();
    if read_line(stream, &mut line).map_err(late)? == 0 {
        return Err(GuardError::Gone(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&line).map_err(|error| GuardError::Gone(senseless(error)))
}

/// Reads up to and including a newline; 0 = the connection ended. A line that is too long is an error.
fn read_line(stream: &mut BufReader<UnixStream>, line: &mut Vec<u8>) -> io::Result<usize> {
    line.clear();
    let mut limited = io::Read::take(stream, MESSAGE_MAX_BYTES as u64);
    limited.read_until(b'\n', line)?;
    match line.last() {
        None => Ok(0),
        Some(b'\n') => Ok(line.len()),
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
