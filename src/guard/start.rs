//! Sets up the guard's process: what it needs to be in time, and what it must not share with the daemon.
//!
//! The rule that would surprise: little of it is a reason not to start. A guard without locked memory or a place at the head of the line
//! keeps its promises on every machine that is not starved, so that is a condition for a person to read.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, setsid};

use super::child::{self, OOM_SCORE};
use super::protocol::{PROTOCOL_VERSION, SOCKET_NAME};
use super::server::Guard;
use super::state::GuardState;
use super::sys::{self, Scheduling};
use super::upgrade::RESUME;

/// Name of the file in the run directory whose flock says that a guard lives.
pub const LOCK_NAME: &str = "guard.lock";
/// Prints the protocol version: a daemon tries a new program with it before it lets the guard execute it.
pub const SAY_PROTOCOL: &str = "--protocol";
/// OOM score adjustment that is good enough: the OOM killer takes nearly anything else first. The unit file gives this to the daemon.
const GUARD_OOM_SCORE: i32 = -900;
/// RLIMIT_MEMLOCK that leaves room: twice the guard, and all its connections with full buffers.
const MEMLOCK_ROOMY_BYTES: u64 = 8 << 20;

/// The guard's main.
///
/// # Errors
/// Wrong arguments, another guard in this run directory, or a system without what the promises hang on.
pub fn main(arguments: Vec<OsString>) -> anyhow::Result<()> {
    match arguments.as_slice() {
        [say] if say == SAY_PROTOCOL => {
            println!("{PROTOCOL_VERSION}");
            Ok(())
        }
        [resume, memory] if resume == RESUME => {
            let memory = memory.to_str().and_then(|text| text.parse().ok()).context("expected a descriptor's number after --resume")?;
            let mut guard = Guard::resume(memory, signals()?).context("taking up what the former program left")?;
            run(&mut guard)
        }
        [run_dir, data_dir] => run(&mut first(Path::new(run_dir), Path::new(data_dir))?),
        _ => bail!("expected RUN_DIR DATA_DIR; the daemon starts the guard, nobody else needs to"),
    }
}

fn run(guard: &mut Guard) -> anyhow::Result<()> {
    ask_for_privileges(guard);
    let done = guard.run();
    guard.withdraw();
    done.context("waiting for something to happen")
}

fn first(run_dir: &Path, data_dir: &Path) -> anyhow::Result<Guard> {
    ensure!(run_dir.is_absolute() && data_dir.is_absolute(), "expected absolute paths");
    // What the daemon had open must not stay open through us; refused before Linux 5.9, and the daemon's are close-on-exec anyway.
    let _ = sys::descriptors_from_3(false);
    match setsid() {
        // We lead a process group already, and with that we are as safe from the daemon's terminal.
        Ok(_) | Err(Errno::EPERM) => {}
        Err(error) => return Err(error).context("leaving the daemon's session"),
    }
    chdir("/").context("leaving the daemon's directory")?;
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let flock = alone(run_dir)?;
    let listener = listen(&run_dir.join(SOCKET_NAME))?;
    let paths: (PathBuf, PathBuf) = (run_dir.to_owned(), data_dir.to_owned());
    let mut guard = Guard::new(paths, GuardState::default(), (listener, flock), signals()?).context("setting up the guard")?;
    guard.core = child::forbid_core_dumps();
    Ok(guard)
}

/// One guard to a run directory.
fn alone(run_dir: &Path) -> anyhow::Result<OwnedFd> {
    let path = run_dir.join(LOCK_NAME);
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = open.with_context(|| format!("opening {}", path.display()))?;
    file.try_lock().with_context(|| format!("another guard holds {}", path.display()))?;
    Ok(file.into())
}

fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    // The flock is ours, so a socket that is there was left by a dead guard.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context("removing a dead guard's socket"),
        _ => {}
    }
    UnixListener::bind(socket).with_context(|| format!("listening on {}", socket.display()))
}

/// SIGCHLD and SIGTERM come through a descriptor; the others that a service manager or a terminal may send do nothing.
fn signals() -> anyhow::Result<SignalFd> {
    let mut taken = SigSet::empty();
    taken.add(Signal::SIGCHLD);
    taken.add(Signal::SIGTERM);
    let mut blocked = taken;
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGPIPE, Signal::SIGALRM] {
        blocked.add(signal);
    }
    blocked.thread_set_mask().context("blocking signals")?;
    SignalFd::with_flags(&taken, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).context("taking signals through a descriptor")
}

fn ask_for_privileges(guard: &mut Guard) {
    let subreaper = set_child_subreaper(true).map_err(io::Error::from);
    let locked = mlockall(what_to_lock()).map_err(io::Error::from);
    for (what, done) in [
        ("orphans of PostgreSQL do not come to the guard", subreaper),
        ("the guard's memory is not locked, swapping can delay it", locked),
        ("the guard is scheduled like any other process", sys::schedule(Scheduling::FirstInLine)),
        ("the guard can be chosen by the OOM killer", lower_oom_score()),
    ] {
        if let Err(error) = done {
            guard.condition(format!("{what}: {error}"));
        }
    }
}

/// With room to spare also what will be allocated; under a tight limit an allocation would fail, and a guard that fails takes PostgreSQL
/// with it.
fn what_to_lock() -> MlockAllFlags {
    let roomy = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft >= MEMLOCK_ROOMY_BYTES);
    if roomy { MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE } else { MlockAllFlags::MCL_CURRENT }
}

fn lower_oom_score() -> io::Result<()> {
    let found = fs::read_to_string(OOM_SCORE)?;
    if found.trim().parse::<i32>().is_ok_and(|score| score <= GUARD_OOM_SCORE) {
        return Ok(());
    }
    fs::write(OOM_SCORE, GUARD_OOM_SCORE.to_string())
}
