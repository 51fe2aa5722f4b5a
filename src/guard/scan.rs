//! Finds, and ends, the processes of PostgreSQL that belong to a data directory, from the process table alone.
//!
//! A process of PostgreSQL is one whose executable is named `postgres` (also `postgres (deleted)`, after a package upgrade) and whose
//! working directory is the data directory: every process of a server has both, and keeps them after the postmaster has died. Pid files
//! prove nothing, in either direction.
//!
//! The rule that would surprise: a zombie does not count. It has given up its memory and its sockets and cannot answer anybody.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::sys;
use crate::clock::BootTime;

/// Between two looks while waiting for killed processes to go.
pub const RESCAN_MS: u64 = 20;
const DELETED: &[u8] = b" (deleted)";

/// Pids of the processes of PostgreSQL in `data_dir` (canonical), ascending.
///
/// # Errors
/// When the process table cannot be read: then nothing is proved.
pub fn postgres_processes(data_dir: &Path) -> io::Result<Vec<i32>> {
    let mut found = processes()?;
    found.retain(|pid| is_postgres_in(*pid, data_dir));
    found.sort_unstable();
    Ok(found)
}

fn processes() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(pids)
}

/// Its parent's pid.
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // `pid (name) state ppid …`, and a name may hold parentheses and blanks.
    let after_name = stat.rsplit(|byte| *byte == b')').next()?;
    std::str::from_utf8(after_name).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Whether this process's executable is PostgreSQL's server. False as well for one that has ended.
pub fn is_postgres(pid: i32) -> bool {
    link(pid, "exe").is_some_and(|exe| without_deleted(&exe).ends_with(b"/postgres"))
}

/// Whether this process is PostgreSQL in `data_dir`.
pub fn is_postgres_in(pid: i32, data_dir: &Path) -> bool {
    is_postgres(pid) && link(pid, "cwd").is_some_and(|cwd| without_deleted(&cwd) == data_dir.as_os_str().as_bytes())
}

/// A link under /proc/PID. Reading it touches no disk: the text comes from the kernel's own cache of names.
fn link(pid: i32, name: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/{name}")).ok()
}

fn without_deleted(path: &Path) -> &[u8] {
    let bytes = path.as_os_str().as_bytes();
    bytes.strip_suffix(DELETED).unwrap_or(bytes)
}

/// Whether no process of PostgreSQL is left in `data_dir`: two looks, each finding none. One is not enough when it is not known that the
/// postmaster had ended before it: a child forked behind the look's back, at a pid that was passed already, would be missed. After the
/// first look the postmaster is gone, and nobody else forks.
///
/// # Errors
/// When the process table cannot be read.
pub fn proved_empty(data_dir: &Path) -> io::Result<bool> {
    Ok(postgres_processes(data_dir)?.is_empty() && postgres_processes(data_dir)?.is_empty())
}

/// SIGKILLs every process of PostgreSQL in `data_dir` once. Returns how many were found.
///
/// # Errors
/// When the process table cannot be read.
pub fn kill_all(data_dir: &Path) -> io::Result<usize> {
    let found = postgres_processes(data_dir)?;
    for pid in &found {
        kill_if(*pid, |pid| is_postgres_in(pid, data_dir));
    }
    Ok(found.len())
}

/// Between the look and the signal a pid may become another process. The descriptor cannot: open it, look again, and kill through it.
fn kill_if(pid: i32, still: impl Fn(i32) -> bool) {
    if let Ok(pidfd) = sys::pidfd_open(pid)
        && still(pid)
    {
        // It may have ended meanwhile; whoever could not be killed is found by the next look.
        let _ = sys::pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
    }
}

/// What is left when the guard's own postmaster has ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Left {
    /// Processes of PostgreSQL: in the data directory, or children of the caller.
    pub postgres: Vec<i32>,
    /// Other children of the caller (a subreaper gets its descendants' orphans); zombies too.
    pub other_children: Vec<i32>,
}

/// Looks at what is left. Called after the end of the postmaster one look is enough: nobody else forks processes of PostgreSQL.
///
/// # Errors
/// When the process table cannot be read.
pub fn left(data_dir: &Path) -> io::Result<Left> {
    let ours = std::process::id().cast_signed();
    let mut left = Left::default();
    for pid in processes()? {
        let is_child = parent(pid) == Some(ours);
        if (is_child && is_postgres(pid)) || is_postgres_in(pid, data_dir) {
            left.postgres.push(pid);
        } else if is_child {
            left.other_children.push(pid);
        }
    }
    Ok(left)
}

/// SIGKILLs the caller's children that are PostgreSQL, and every process of PostgreSQL in `data_dir`.
///
/// # Errors
/// When the process table cannot be read.
pub fn kill_left(data_dir: &Path) -> io::Result<()> {
    let ours = std::process::id().cast_signed();
    for pid in left(data_dir)?.postgres {
        kill_if(pid, |pid| is_postgres_in(pid, data_dir) || (parent(pid) == Some(ours) && is_postgres(pid)));
    }
    Ok(())
}

/// SIGKILLs these children of the caller.
pub fn end_others(children: &[i32]) {
    let ours = std::process::id().cast_signed();
    for pid in children {
        kill_if(*pid, |pid| parent(pid) == Some(ours));
    }
}

/// What the daemon does when the guard is silent or dead: SIGKILL to every process of PostgreSQL in `data_dir` (canonical), again and
/// again, until none is left ([`proved_empty`]). Blocks the calling thread.
///
/// # Errors
/// `TimedOut` when one is still there after `timeout` (uninterruptible, for example): nothing is proved then, and the lock must not be
/// released. Or the process table cannot be read.
pub fn fence_by_scan(data_dir: &Path, timeout: Duration) -> io::Result<()> {
    let deadline = BootTime::now() + timeout;
    while kill_all(data_dir)? > 0 || !proved_empty(data_dir)? {
        if BootTime::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "processes of PostgreSQL are still there after SIGKILL"));
        }
        thread::sleep(Duration::from_millis(RESCAN_MS));
    }
    Ok(())
}
