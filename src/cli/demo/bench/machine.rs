//! On what was measured: figures without it mean nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use super::super::programs::Programs;

/// The machine and the versions.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processors that may be used.
    pub cores: usize,
    /// What they are.
    pub processor: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The file system under the data directories, as its mount names it.
    pub file_system: String,
    /// PostgreSQL's version.
    pub postgres: String,
    /// etcd's.
    pub etcd: String,
    /// HAProxy's.
    pub haproxy: String,
    /// pgherd's, and how it was built.
    pub pgherd: String,
}

/// Looks at this machine. What cannot be found out is `unknown`.
pub fn look(programs: &Programs, dir: &Path) -> Machine {
    let haproxy = programs.haproxy.as_deref().map_or_else(unknown, |program| version(program, "-v"));
    let build = if cfg!(debug_assertions) { "debug build" } else { "release build" };
    Machine {
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        processor: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
        memory_mib: field("/proc/meminfo", "MemTotal").and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0) / 1024,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| unknown(), |text| text.trim().to_owned()),
        file_system: file_system(dir).unwrap_or_else(unknown),
        postgres: version(&programs.postgres_bin.join("postgres"), "--version"),
        etcd: version(&programs.etcd, "--version"),
        haproxy,
        pgherd: format!("{}, {build}", env!("CARGO_PKG_VERSION")),
    }
}

/// The load averages of 1, 5 and 15 minutes.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The value after the colon of the first line that begins with `name`.
pub fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn version(program: &Path, option: &str) -> String {
    let output = Command::new(program).arg(option).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().map_or_else(unknown, |line| version_word(line).to_owned())
}

/// The first word of a line that looks like a version.
fn version_word(line: &str) -> &str {
    line.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).unwrap_or(line)
}

/// The type of the mount that `dir` is on: of the mount points that hold it, the longest.
fn file_system(dir: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        Some((fields.get(1)?.to_string(), fields.get(2)?.to_string()))
    };
    let of_dir = mounts.lines().filter_map(mount).filter(|(point, _)| dir.starts_with(point));
    of_dir.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_programs_say() {
        assert_eq!(version_word("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), "15.18");
        assert_eq!(version_word("etcd Version: 3.4.23"), "3.4.23");
        assert_eq!(version_word("HAProxy version 2.6.12-1+deb12u3 2025/10/03 - https://haproxy.org/"), "2.6.12-1+deb12u3");
    }
}
