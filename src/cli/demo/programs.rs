//! Finds the programs that a local cluster is made of, in places that the servers' user can reach.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::process::OsUser;

/// Where distributions put PostgreSQL's programs: below these, in VERSION/bin.
const POSTGRES_HOMES: &[&str] = &["/usr/lib/postgresql"];
/// Where programs are looked for beside PATH: an ordinary user's PATH has no sbin.
const MORE_PATH: &[&str] = &["/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/usr/bin"];

/// Programs of a local cluster.
#[derive(Debug, Clone)]
pub struct Programs {
    /// This program. `pgherd-guard` is beside it.
    pub pgherd: PathBuf,
    /// etcd.
    pub etcd: PathBuf,
    /// HAProxy, where it is installed.
    pub haproxy: Option<PathBuf>,
    /// The folder of `postgres`, `initdb` and their like.
    pub postgres_bin: PathBuf,
}

impl Programs {
    /// The installed ones, with PostgreSQL in its newest version.
    pub fn find(pgherd: &Path) -> Result<Programs> {
        Ok(Programs {
            pgherd: pgherd.to_owned(),
            etcd: on_path("etcd").context("etcd is not installed: apt install etcd-server")?,
            haproxy: on_path("haproxy"),
            postgres_bin: newest_postgres().context("PostgreSQL is not installed: apt install postgresql")?,
        })
    }

    /// The major version of PostgreSQL.
    pub fn postgres_major(&self) -> Result<u32> {
        // Not `postgres --version`: a dead child of that name is taken for an orphaned server and reaped (see process).
        let program = self.postgres_bin.join("initdb");
        let output = Command::new(&program).arg("--version").output().with_context(|| format!("running {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let digits = |word: &str| word.split('.').next().and_then(|major| major.parse().ok());
        text.split_whitespace().find_map(digits).with_context(|| format!("{} says `{}`, not its version", program.display(), text.trim()))
    }

    /// The same programs where `user` can reach them: what lies behind a closed directory (a build tree in root's home) is copied.
    pub fn within_reach(&self, user: &OsUser, dir: &Path) -> Result<Programs> {
        let mut placed = self.clone();
        let guard = self.pgherd.with_file_name("pgherd-guard");
        if !user.can_reach(&self.pgherd) || !user.can_reach(&guard) {
            fs::create_dir_all(dir.join("bin"))?;
            placed.pgherd = dir.join("bin/pgherd");
            copy(&self.pgherd, &placed.pgherd)?;
            copy(&guard, &dir.join("bin/pgherd-guard"))?;
        }
        if !user.can_reach(&self.etcd) {
            placed.etcd = dir.join("bin/etcd");
            fs::create_dir_all(dir.join("bin"))?;
            copy(&self.etcd, &placed.etcd)?;
        }
        if !user.can_reach(&self.postgres_bin) {
            let home = self.postgres_bin.parent().context("PostgreSQL's programs are in the root directory")?;
            let (from, to) = (home.join("."), dir.join("postgresql"));
            let status = Command::new("cp").arg("-a").arg("--no-preserve=ownership").arg(&from).arg(&to).status()?;
            if !status.success() {
                bail!("copying {} to {} failed", from.display(), to.display());
            }
            placed.postgres_bin = to.join("bin");
        }
        Ok(placed)
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(MORE_PATH.iter().map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

fn newest_postgres() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = POSTGRES_HOMES
        .iter()
        .filter_map(|home| fs::read_dir(home).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").is_file())
        .collect();
    found.sort();
    found.pop().map(|(_, bin)| bin).or_else(|| on_path("postgres")?.canonicalize().ok()?.parent().map(Path::to_owned))
}
