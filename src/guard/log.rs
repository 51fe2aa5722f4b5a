//! The guard's few lines for people, on standard error, and never at the price of being late.
//!
//! The rule that would surprise: a line that would have to wait is dropped, and standard error that is a regular file is not written to
//! while a writable PostgreSQL is kept: its disk may be the one that hangs. Lines for it are kept back until then. Nothing is lost with
//! them: what the guard does is in the facts that the daemon logs.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};

use crate::clock::BootTime;

/// Longest line: what a pipe takes in one piece (PIPE_BUF) without blocking when it says that it is writable.
const LINE_MAX_BYTES: usize = 4_096;
/// Most lines in one second.
const LINES_PER_SECOND: u32 = 20;
/// Most lines kept back for a regular file.
const KEPT_LINES: usize = 100;

/// See the module.
pub struct Log {
    regular_file: bool,
    kept: VecDeque<String>,
    second: BootTime,
    said: u32,
}

impl Log {
    /// Looks at what standard error is.
    pub fn new() -> Self {
        let regular_file =
            fstat(io::stderr().as_fd()).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG);
        Self { regular_file, kept: VecDeque::new(), second: BootTime::default(), said: 0 }
    }

    /// Says one line.
    pub fn say(&mut self, now: BootTime, text: &str) {
        if now.since(self.second) >= Duration::from_secs(1) {
            (self.second, self.said) = (now, 0);
        }
        self.said += 1;
        if self.said > LINES_PER_SECOND || self.kept.len() >= KEPT_LINES {
            return;
        }
        let mut line = format!("pgherd-guard[{}]: {}", std::process::id(), text.replace('\n', " "));
        while line.len() >= LINE_MAX_BYTES {
            line.pop();
        }
        line.push('\n');
        self.kept.push_back(line);
    }

    /// Writes what may be written now. `idle`: no writable PostgreSQL is kept, so blocking would be no danger.
    pub fn flush(&mut self, idle: bool) {
        if self.regular_file && !idle {
            return;
        }
        while let Some(line) = self.kept.pop_front() {
            let mut stderr = io::stderr();
            let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
            let ready = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
            let broken = fds[0].revents().is_some_and(|flags| flags.intersects(PollFlags::POLLERR | PollFlags::POLLHUP));
            if ready && !broken {
                let _ = stderr.write_all(line.as_bytes());
            }
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}
