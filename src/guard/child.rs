//! Makes a postmaster out of a fork of the guard. Decides nothing.
//!
//! The order matters and is DESIGN's: everything that makes the guard special is given up first, then the parent-death signal is set (a
//! later change of uid or capabilities would clear it), then the parent is looked at (it may have died before), then exec. SIGQUIT and
//! not SIGKILL: the postmaster has to take its backends with it, which on their own would go on and acknowledge.
//!
//! The rule that would surprise: nothing is waited for. The child opens the log file, which may be on a disk that hangs, and says over a
//! pipe what did not work; the guard goes on meanwhile.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, execve, getpid, getppid, pipe2, setsid};

use super::protocol::StartOrder;
use super::scan;
use super::sys::{self, Scheduling};

/// Exit status of a child that did not get as far as being PostgreSQL, as in a shell.
pub const NOT_EXECUTED: i32 = 127;
/// Where the kernel keeps a process's OOM score adjustment.
pub const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// How each line of a child begins: conditions of the last start, forgotten with the next.
pub const NOTE: &str = "PostgreSQL ";

/// More than the lines of PostgreSQL's lock files that are wanted of them: numbers, and two paths of at most 1,024 bytes.
const LOCK_FILE_READ_BYTES: u64 = 4_096;

/// A limit that the guard changed for itself, as it was before: `RLIMIT_CORE`.
pub type CoreLimit = (rlim_t, rlim_t);

/// A guard that dumps core dies late, and PostgreSQL gets its parent-death signal late: no core. Returns what the child gets back.
pub fn forbid_core_dumps() -> Option<CoreLimit> {
    let found = getrlimit(Resource::RLIMIT_CORE).ok()?;
    setrlimit(Resource::RLIMIT_CORE, 0, found.1).ok()?;
    Some(found)
}

/// A child on its way to being a postmaster.
pub struct Spawned {
    /// Its pid.
    pub pid: i32,
    /// What it could not do, a line each, until exec or its end.
    pub notes: OwnedFd,
}

struct Exec {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Exec {
    fn prepare(order: &StartOrder) -> io::Result<Self> {
        let text =
            |text: &[u8]| CString::new(text).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a NUL byte in the start order"));
        let program = text(order.program.as_os_str().as_bytes())?;
        let mut arguments = vec![program.clone()];
        for argument in &order.arguments {
            arguments.push(text(argument.as_bytes())?);
        }
        let pairs = order.environment.iter().map(|(name, value)| text(format!("{name}={value}").as_bytes()));
        Ok(Self { program, arguments, environment: pairs.collect::<io::Result<_>>()? })
    }
}

/// Forks and executes a postmaster.
///
/// # Errors
/// When the order cannot be executed by any means, or the system has no room for a process or a pipe.
pub fn spawn(order: &StartOrder, core: Option<CoreLimit>) -> io::Result<Spawned> {
    let exec = Exec::prepare(order)?;
    let (notes, tell) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let mut tell = File::from(tell);
    let guard = getpid();
    let pid = sys::fork(|| {
        for refused in give_up_privileges(core) {
            let _ = writeln!(tell, "{refused}");
        }
        if let Some(pid) = forget_another_process(&order.data_dir) {
            let _ = writeln!(tell, "{NOTE}was started although postmaster.pid named process {pid}, which is none of its own");
        }
        let Err(error) = execute(&exec, order.stderr.as_deref(), guard);
        let _ = writeln!(tell, "{NOTE}was not executed as {}: {error}", order.program.display());
        NOT_EXECUTED
    })?;
    Ok(Spawned { pid, notes })
}

/// Makes the child ordinary. What is refused is said and not more: PostgreSQL runs with it.
fn give_up_privileges(core: Option<CoreLimit>) -> Vec<String> {
    let mut refused = Vec::new();
    let mut note = |what: &str, done: io::Result<()>| {
        if let Err(error) = done {
            refused.push(format!("{NOTE}runs with {what}: {error}"));
        }
    };
    note("the OOM score of its parent", reset_oom_score());
    note("the nice value of its parent", sys::reset_nice());
    note("the scheduling of its parent", sys::schedule(Scheduling::Ordinary));
    // After the resets above: some of them need a capability.
    note("the capabilities of its parent", sys::drop_capabilities());
    if let Some((soft, hard)) = core {
        note("no core dumps", setrlimit(Resource::RLIMIT_CORE, soft, hard).map_err(io::Error::from));
    }
    sys::reset_signal_actions();
    note("signals blocked", sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(io::Error::from));
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    refused
}

/// After a loss of power the number of the postmaster that was may be another process's by now, and PostgreSQL does not start beside a living
/// process of its user that its lock file names (miscinit.c, CreateLockFile). That nothing of PostgreSQL is there was proved a moment ago; one
/// that a person starts right now is PostgreSQL in this directory, and its file stays.
fn forget_another_process(data_dir: &Path) -> Option<i32> {
    let path = data_dir.join("postmaster.pid");
    let text = lock_file(&path)?;
    let pid: i32 = text.lines().next()?.trim().parse().ok().filter(|pid| *pid > 1)?;
    let lives = kill(Pid::from_raw(pid), None).is_ok();
    if !lives || scan::is_postgres_in(pid, data_dir) {
        return None;
    }
    // First, since where it is is said in the other.
    forget_its_socket(&text);
    std::fs::remove_file(&path).is_ok().then_some(pid)
}

/// The same postmaster's lock file beside its socket, which PostgreSQL goes by in the same way.
fn forget_its_socket(text: &str) -> Option<()> {
    let lines: Vec<&str> = text.lines().collect();
    // Process, data directory, start, port, directory of the first socket (pidfile.h).
    let [process, data_dir, _, port, sockets, ..] = lines[..] else { return None };
    let path = Path::new(sockets).join(format!(".s.PGSQL.{port}.lock"));
    let of_the_same = lock_file(&path)?.lines().take(2).eq([process, data_dir]);
    if of_the_same { std::fs::remove_file(&path).ok() } else { None }
}

fn lock_file(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(LOCK_FILE_READ_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

fn reset_oom_score() -> io::Result<()> {
    if std::fs::read_to_string(OOM_SCORE)?.trim() == "0" {
        return Ok(());
    }
    std::fs::write(OOM_SCORE, "0")
}

fn execute(exec: &Exec, stderr: Option<&Path>, guard: Pid) -> io::Result<Infallible> {
    setsid()?;
    dup2_stdin(File::open("/dev/null")?.as_fd())?;
    match stderr {
        Some(path) => {
            let log = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
            dup2_stdout(log.as_fd())?;
            dup2_stderr(log.as_fd())?;
        }
        None => dup2_stdout(io::stderr().as_fd())?,
    }
    // Everything the guard opens is close-on-exec already; this is for what it may have been given. Refused before Linux 5.11.
    let _ = sys::descriptors_from_3(true);
    set_pdeathsig(Signal::SIGQUIT)?;
    if getppid() != guard {
        return Err(io::Error::other("the guard has ended"));
    }
    Ok(execve(&exec.program, &exec.arguments, &exec.environment)?)
}
