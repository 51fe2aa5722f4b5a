//! The shell around the machine: one queue with one owner, and the edges that feed it.
//!
//! ```text
//! etcd's watch   lease thread   guard   prober   signals   ends of operations
//!        \            |           |       |         |          /
//!                         one queue of events
//!                                 |
//!                       Machine::handle(now, event)
//!                                 |
//!            actions, in order -> executor -> IO -> events again
//! ```
//! The shell decides nothing. The clock is read once for each event, when it is taken from the queue: an event that waited is judged
//! by the time at which it is judged.

mod archiving;
mod executor;
mod guard_link;
mod host;
mod jobs;
mod prober;
mod records;
mod rejoining;
mod shell;
mod snapshot;

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::machine::event::Event;
use crate::spec::node::NodeSpec;

use self::guard_link::{GuardLink, NoGuard, Sink};
use self::host::Host;

/// Events that may wait. Far more than one round of everything; a full queue means that the daemon does not get to run.
const QUEUE_MAX: usize = 4_096;
/// Ends of operations that may wait: one of each kind runs at a time, so this is never full.
const ENDS_MAX: usize = 64;
/// Worker threads of the runtime: the machine's loop and everything that waits.
const WORKER_THREADS: usize = 2;
/// How often, and how far apart, the lock of run_dir is tried.
const LOCK_TRIES: u32 = 40;
/// See [`LOCK_TRIES`].
const LOCK_AGAIN: Duration = Duration::from_millis(50);
/// Exit code: refused (DESIGN, command line).
const EXIT_REFUSED: u8 = 4;
/// Exit code: stays down after repeated crashes.
const EXIT_CRASH_LOOP: u8 = 7;

/// How `pgherd run` was called.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Start although the daemon crashed three times within a minute.
    pub clear_crashes: bool,
}

/// Runs the daemon until it is told to leave; returns the exit code. The caller has dropped root's rights already.
///
/// # Errors
/// When the host lacks what the daemon needs to begin.
pub fn run(node: NodeSpec, options: &Options) -> anyhow::Result<u8> {
    make_private_directory(&node.run_dir)?;
    let Some(_lock) = lock_run_dir(&node.run_dir)? else {
        eprintln!("another daemon runs with run_dir {}: this one does not", node.run_dir.display());
        return Ok(EXIT_REFUSED);
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build().context("building the runtime")?;
    let host = Arc::new(Host::find(node)?);
    let (queue, events) = mpsc::channel(QUEUE_MAX);
    let (ended, ends) = mpsc::channel(ENDS_MAX);
    let sink = sink(queue, ended);
    let guard =
        match GuardLink::open(&host.node.run_dir, host.layout.data_dir(), &host.guard_binary, options.clear_crashes, Arc::clone(&sink)) {
            Ok(guard) => guard,
            Err(NoGuard::Other(error)) => return Err(error),
            Err(refused) => {
                eprintln!("{refused}");
                return Ok(if matches!(refused, NoGuard::CrashLoop(_)) { EXIT_CRASH_LOOP } else { EXIT_REFUSED });
            }
        };
    let code = runtime.block_on(shell::run(host, guard, sink, shell::Queue { events, ends }))?;
    // Tasks that still wait for a network or a child must not hold the process.
    runtime.shutdown_background();
    Ok(code)
}

/// Events from any thread. A full queue drops what comes again by itself (views, probes, the guard's facts); the end of an operation
/// does not, and has a queue of its own.
fn sink(queue: mpsc::Sender<Event>, ends: mpsc::Sender<Event>) -> Sink {
    Arc::new(move |event| {
        let way = if matches!(event, Event::Finished(_)) { &ends } else { &queue };
        match way.try_send(event) {
            // The loop has left: nobody is there to be told.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => tracing::error!("the queue of events is full: an event is dropped"),
        }
    })
}

fn make_private_directory(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| {
        format!(
            "making run_dir {}; the unit's RuntimeDirectory=, or an administrator, has to make it for the daemon's user",
            path.display()
        )
    })
}

/// One daemon per run_dir. The lock goes with the process, however it ends; the last thread of one that was killed a moment ago may
/// still hold it.
fn lock_run_dir(run_dir: &Path) -> anyhow::Result<Option<Flock<File>>> {
    let path = run_dir.join("daemon.lock");
    let mut file =
        File::options().create(true).write(true).truncate(false).open(&path).with_context(|| format!("opening {}", path.display()))?;
    for _ in 0..LOCK_TRIES {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
            Err((_, error)) => return Err(error).with_context(|| format!("locking {}", path.display())),
        };
        std::thread::sleep(LOCK_AGAIN);
    }
    Ok(None)
}
