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
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if is_postgres_in(pid, data_dir) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether this process's executable is PostgreSQL's server. False as well for one that has ended.
pub fn is_postgres(pid: i32) -> bool {
    link(pid, "exe").is_some_and(|exe| without_deleted(&exe).ends_with(b"/postgres"))
}

fn is_postgres_in(pid: i32, data_dir: &Path) -> bool {
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
        // Between the look and the signal the pid may have become another process: the descriptor cannot, so look again through it.
        if let Ok(pidfd) = sys::pidfd_open(*pid)
            && is_postgres_in(*pid, data_dir)
        {
            let _ = sys::pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL);
        }
    }
    Ok(found.len())
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
