//! Finds PostgreSQL's programs on this host.
//!
//! A directory counts only if it holds every program pgherd needs, so that a lone client package is not taken for a server.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::program::{Program, is_executable};

/// Oldest major version pgherd works with: the first whose `pg_promote`, `primary_conninfo` reload and `standby.signal` are as used here.
pub const OLDEST_MAJOR: u32 = 13;
/// How long `postgres --version` may take.
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// What a server installation must hold. pg_waldump is wanted too, but its absence only costs a clone where a look would have done.
const NEEDED_PROGRAMS: [&str; 4] = ["postgres", "initdb", "pg_controldata", "pg_basebackup"];
/// Where distributions put server programs: directory, then what each version's directory starts with, then what is below it.
const USUAL_PLACES: [(&str, &str, &str); 4] =
    [("/usr/lib/postgresql", "", "bin"), ("/usr", "pgsql-", "bin"), ("/opt", "pgsql", "bin"), ("/usr/local", "pgsql", "bin")];

/// One installed PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Directory of its programs.
    pub bin_dir: PathBuf,
    /// Major version: 17.
    pub major: u32,
    /// As `server_version_num`: 170010.
    pub version_num: u32,
}

impl Installation {
    /// Looks in `bin_dir`, or else in PATH and the distributions' usual places, and takes the newest that fits `want_major`.
    pub async fn find(bin_dir: Option<&Path>, want_major: Option<u32>) -> Result<Installation> {
        let places = bin_dir.map_or_else(usual_places, |given| vec![given.to_owned()]);
        let mut found: Vec<Installation> = Vec::new();
        let mut problems = Vec::new();
        for place in &places {
            match Self::look(place).await {
                Ok(Some(one)) => found.push(one),
                Ok(None) => {}
                Err(error) => problems.push(format!("{error:#}")),
            }
        }
        let fits = |one: &&Installation| one.major >= OLDEST_MAJOR && want_major.is_none_or(|major| one.major == major);
        // max_by_key takes the last of equals; the first place named is the one meant.
        if let Some(best) = found.iter().rev().filter(fits).max_by_key(|one| one.version_num) {
            return Ok(best.clone());
        }
        let wanted = want_major.map_or(format!("{OLDEST_MAJOR} or newer"), |major| major.to_string());
        let seen = match (found.is_empty(), problems.is_empty()) {
            (true, true) => format!("none in {}", list(&places)),
            (true, false) => problems.join("; "),
            (false, _) => found.iter().map(|one| format!("{} in {}", one.major, one.bin_dir.display())).collect::<Vec<_>>().join(", "),
        };
        bail!(
            "expected the server programs of PostgreSQL {wanted}, found {seen}; install them or set postgres.bin_dir in the node document"
        )
    }

    /// What is in one directory: None when it is no server installation.
    async fn look(bin_dir: &Path) -> Result<Option<Installation>> {
        if !NEEDED_PROGRAMS.iter().all(|name| is_executable(&bin_dir.join(name))) {
            return Ok(None);
        }
        let output = Program::new(bin_dir.join("postgres")).arg("--version").run_ok(VERSION_LIMIT).await?;
        let version_num =
            parse_version(&output.stdout).with_context(|| format!("{}/postgres says `{}`", bin_dir.display(), output.stdout.trim()))?;
        Ok(Some(Installation { bin_dir: bin_dir.to_owned(), major: version_num / 10_000, version_num }))
    }

    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

/// `postgres (PostgreSQL) 17.10 (Debian …)` -> 170010; `18beta1` -> 180000.
fn parse_version(text: &str) -> Option<u32> {
    let word = text.strip_prefix("postgres (PostgreSQL) ")?.split_whitespace().next()?;
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>().ok();
    let (major, rest) = word.split_once('.').unwrap_or((word, "0"));
    number(major).map(|major| major * 10_000 + number(rest).unwrap_or(0))
}

fn usual_places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    for (parent, prefix, below) in USUAL_PLACES {
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        let mut versions: Vec<PathBuf> =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|entry| entry.path().join(below)).collect();
        versions.sort();
        places.extend(versions);
    }
    let mut seen = BTreeSet::new();
    places.retain(|place| place.is_absolute() && seen.insert(place.clone()));
    places
}

fn list(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_distributions_write_them() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(150_018));
        assert_eq!(parse_version("postgres (PostgreSQL) 17.10"), Some(170_010));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1"), Some(180_000));
        assert_eq!(parse_version("postgres (PostgreSQL) next"), None);
        assert_eq!(parse_version(""), None);
    }

    #[tokio::test]
    async fn a_directory_without_the_server_programs_is_named_in_the_error() {
        let directory = tempfile::tempdir().unwrap();
        let error = Installation::find(Some(directory.path()), Some(17)).await.unwrap_err().to_string();
        assert!(error.contains(&directory.path().display().to_string()) && error.contains("17"), "{error}");
    }
}
