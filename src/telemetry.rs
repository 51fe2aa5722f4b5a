//! Logs: one line per event to standard error, for people or as JSON. Never a secret: those travel in types that do not print.
//!
//! Whoever logs never waits. Lines go through a bounded queue to a thread of their own; when standard error is stuck (a full pipe, a
//! journal that hangs) lines are dropped and counted, because a renewal that waits for a log line is an outage.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// How much is logged.
pub use crate::spec::node::LogLevel;
/// What a line looks like.
pub use crate::spec::node::{LogFormat, LogSpec};

/// Lines that wait for standard error.
const QUEUE_LINES: usize = 4096;
/// How long the last words of a panic may wait for standard error, in ms.
const LAST_WORDS_WAIT_MS: u16 = 100;
/// Most bytes of the last words: a pipe takes this much at once (POSIX PIPE_BUF).
const LAST_WORDS_MAX_BYTES: usize = 4096;
/// How long the end of the process may wait for the lines that are still queued, in ms.
const FLUSH_WAIT_MS: u64 = 1_000;

/// Logging, until this is dropped: then what is queued is written.
#[derive(Debug)]
pub struct Telemetry {
    queue: Queue,
    written: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

/// Starts logging. Starts a thread.
pub fn start(log: LogSpec) -> anyhow::Result<Telemetry> {
    let (sender, lines) = sync_channel(QUEUE_LINES);
    let (done, written) = sync_channel(1);
    let queue = Queue { lines: sender, lost: Arc::default() };
    let lost = Arc::clone(&queue.lost);
    let write = move || {
        write_lines(&lines, &lost, &mut io::stderr());
        let _ = done.try_send(());
    };
    let thread = std::thread::Builder::new().name("log".to_owned()).spawn(write).context("starting the log thread")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter(log.level)).with_writer(queue.clone());
    let set = match log.format {
        LogFormat::Human => builder.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    set.map_err(anyhow::Error::from_boxed).context("starting the log")?;
    Ok(Telemetry { queue, written, thread: Some(thread) })
}

/// Our own lines at `level`, those of libraries only when something should be looked at.
fn filter(level: LogLevel) -> EnvFilter {
    let (own, others) = match level {
        LogLevel::Error => ("error", "error"),
        LogLevel::Warn => ("warn", "warn"),
        LogLevel::Info => ("info", "warn"),
        LogLevel::Debug => ("debug", "warn"),
        LogLevel::Trace => ("trace", "debug"),
    };
    EnvFilter::new(format!("{others},pgherd={own}"))
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        // An empty line ends the thread: the subscriber keeps senders of its own for ever.
        let _ = self.queue.lines.try_send(Vec::new());
        if self.written.recv_timeout(Duration::from_millis(FLUSH_WAIT_MS)).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Where lines go.
#[derive(Debug, Clone)]
struct Queue {
    lines: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Queue;
    fn make_writer(&'a self) -> Queue {
        self.clone()
    }
}

impl Write for Queue {
    /// The subscriber writes a whole line at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(line.to_vec()) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_lines(lines: &Receiver<Vec<u8>>, lost: &AtomicU64, out: &mut impl Write) {
    for line in lines.iter().take_while(|line| !line.is_empty()) {
        // Nobody is left to tell when standard error fails.
        let _ = out.write_all(&line);
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(out, "{lost} log lines were lost: standard error did not take them fast enough");
        }
    }
}

/// From now on a panic anywhere ends the process (SAFETY row 5): the guard then sees the daemon gone, instead of a daemon that lives
/// on by half. What is said before never waits for longer than 100 ms.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed").to_owned();
        let text = format!("pgherd aborts: thread {name}: {panic}\n");
        last_words(text.as_bytes());
        std::process::abort();
    }));
}

fn last_words(text: &[u8]) {
    let stderr = io::stderr();
    let mut wanted = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if matches!(poll(&mut wanted, PollTimeout::from(LAST_WORDS_WAIT_MS)), Ok(1)) {
        // Not through std's handle: its lock may be held by the thread that is stuck.
        let _ = nix::unistd::write(stderr.as_fd(), text.get(..LAST_WORDS_MAX_BYTES).unwrap_or(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_standard_error_costs_lines_and_never_time() {
        let (sender, lines) = sync_channel(2);
        let mut queue = Queue { lines: sender, lost: Arc::default() };
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            assert_eq!(queue.write(line.as_bytes()).unwrap(), line.len());
        }
        let mut out = Vec::new();
        let lost = Arc::clone(&queue.lost);
        drop(queue);
        write_lines(&lines, &lost, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("one\n2 log lines were lost"), "{text}");
        assert!(text.ends_with("two\n"), "{text}");
    }
}
