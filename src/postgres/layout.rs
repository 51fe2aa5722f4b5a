//! Where things are: the data directory, and pgherd's own directory beside it.
//!
//! ```text
//! /opt/pgdata          the data directory
//! /opt/pgdata.pgherd/  lease           the daemon's lease, for the boot after this one
//!                      promotion.json  what this data directory was last promoted to, and under which epoch
//!                      last_good/      the configuration files that served last
//!                      initdb/ clone/  work in progress, never served
//!                      kept/           the one diverged directory that was swapped out, with why.json
//!                      discard/        a directory swapped out whose content is elsewhere, while it is being removed
//!                      swap.json       a swap under way: it is finished at the next start
//!                      tablespaces.json  what a copy under way has made in the directories of tablespaces
//!                      rewind/         a rewind under way: marker.json, and the configuration files as they were before
//!                      lost/1/ …       WAL that a rewind took away, with report.json
//!                      unarchived/     WAL that is to be archived and is not in pg_wal for long
//! ```
//!
//! When the data directory is a mount point, what must be on its file system (initdb, clone, kept, discard) is in `.pgherd` inside it,
//! since a rename does not cross file systems.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::files;
use crate::policy::rejoin::OwnPromotion;

/// The directory inside a data directory that is a mount point. PostgreSQL and pgherd's own emptiness check leave it alone.
pub const INSIDE_NAME: &str = ".pgherd";
/// What is added to the data directory's name for the directory beside it.
const BESIDE_SUFFIX: &str = ".pgherd";

/// The places of one member's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    data_dir: PathBuf,
    wal_dir: Option<PathBuf>,
    beside: PathBuf,
}

impl Layout {
    /// Resolves the data directory's symbolic links (the guard recognises a postmaster by its working directory); makes nothing.
    pub fn new(data_dir: &Path, wal_dir: Option<&Path>) -> Result<Self> {
        let data_dir = resolve(data_dir)?;
        let wal_dir = wal_dir.map(resolve).transpose()?;
        if let Some(wal) = &wal_dir {
            ensure!(!wal.starts_with(&data_dir), "wal_dir {} must be outside data_dir {}", wal.display(), data_dir.display());
        }
        let name = data_dir.file_name().context("data_dir cannot be the root directory")?;
        let mut beside_name = OsString::from(name);
        beside_name.push(BESIDE_SUFFIX);
        let beside = data_dir.with_file_name(beside_name);
        Ok(Self { data_dir, wal_dir, beside })
    }

    /// The data directory, without symbolic links.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Where pg_wal lives when not in the data directory.
    pub fn wal_dir(&self) -> Option<&Path> {
        self.wal_dir.as_deref()
    }

    /// pgherd's directory beside the data directory.
    pub fn beside(&self) -> &Path {
        &self.beside
    }

    /// Makes the directory beside the data directory.
    pub fn prepare(&self) -> Result<()> {
        files::make_directory(&self.beside).with_context(|| {
            format!("expected to make {}: make it once, owned by the user of the data directory, mode 0700", self.beside.display())
        })
    }

    /// The directory for what has to be on the data directory's own file system.
    pub fn work(&self) -> PathBuf {
        if is_mount_point(&self.data_dir) { self.data_dir.join(INSIDE_NAME) } else { self.beside.clone() }
    }

    /// initdb's work in progress.
    pub fn initdb_dir(&self) -> PathBuf {
        self.work().join("initdb")
    }

    /// pg_basebackup's work in progress.
    pub fn clone_dir(&self) -> PathBuf {
        self.work().join("clone")
    }

    /// The diverged directory that was swapped out.
    pub fn kept_dir(&self) -> PathBuf {
        self.work().join("kept")
    }

    /// What is being removed.
    pub fn discard_dir(&self) -> PathBuf {
        self.work().join("discard")
    }

    /// The journal of a swap under way.
    pub fn swap_journal(&self) -> PathBuf {
        self.beside.join("swap.json")
    }

    /// What a copy under way has made outside the data directory.
    pub fn tablespaces_note(&self) -> PathBuf {
        self.beside.join("tablespaces.json")
    }

    /// What is known of a rewind under way.
    pub fn rewind_dir(&self) -> PathBuf {
        self.beside.join("rewind")
    }

    /// The marker of a rewind under way.
    pub fn rewind_marker(&self) -> PathBuf {
        self.rewind_dir().join("marker.json")
    }

    /// The WAL that rewinds took away, each in a directory of its own.
    pub fn lost_dir(&self) -> PathBuf {
        self.beside.join("lost")
    }

    /// WAL that this member wrote as a primary, and that is archived from there.
    pub fn unarchived_dir(&self) -> PathBuf {
        self.beside.join("unarchived")
    }

    /// The configuration files that served last.
    pub fn last_good_dir(&self) -> PathBuf {
        self.beside.join("last_good")
    }

    /// The daemon's lease file.
    pub fn lease_file(&self) -> PathBuf {
        self.beside.join("lease")
    }

    /// The record of this data directory's last promotion.
    pub fn promotion_file(&self) -> OwnPromotionFile {
        OwnPromotionFile(self.beside.join("promotion.json"))
    }
}

/// `promotion.json`: written and fsynced before promote (SAFETY row 53), so that a timeline of this directory can be told from another
/// one of the same number.
#[derive(Debug, Clone)]
pub struct OwnPromotionFile(PathBuf);

impl OwnPromotionFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The record, if there is one. One that cannot be read is an error, not absence.
    pub fn read(&self) -> Result<Option<OwnPromotion>> {
        let Some(text) = files::read_if_there(&self.0)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("expected a promotion record in {}", self.0.display()))
    }

    /// Writes it, durably. Before promote.
    pub fn write(&self, record: &OwnPromotion) -> Result<()> {
        if let Some(parent) = self.0.parent() {
            files::make_directory(parent)?;
        }
        files::write_if_changed(&self.0, &serde_json::to_vec_pretty(record)?).map(|_| ())
    }

    /// Removes it: the data directory it spoke of is gone.
    pub fn remove(&self) -> Result<()> {
        files::remove_file_if_there(&self.0).with_context(|| format!("removing {}", self.0.display()))?;
        self.0.parent().map_or(Ok(()), files::sync_directory)
    }
}

/// The path without symbolic links; of a path that is not there, its parent's.
fn resolve(path: &Path) -> Result<PathBuf> {
    ensure!(path.is_absolute(), "expected an absolute path, found {}", path.display());
    if files::is_there(path)? {
        return path.canonicalize().with_context(|| format!("resolving {}: is it a link to something that is not there?", path.display()));
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent.is_dir() => Ok(parent.canonicalize()?.join(name)),
        _ => Ok(path.to_owned()),
    }
}

/// Whether a file system is mounted just there, also a bind mount of the same one (then only the mount table knows).
pub fn is_mount_point(path: &Path) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else { return false };
    table.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| Path::new(&unescape_octal(point)) == path)
}

/// The kernel writes space, tab, newline and backslash in mount points as `\040` and so on.
fn unescape_octal(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, Lsn, TimelineId};

    #[test]
    fn the_directory_beside_follows_a_symbolic_link_to_the_real_place() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let layout = Layout::new(&link, None).unwrap();
        assert_eq!(layout.data_dir(), real);
        assert_eq!(layout.beside(), real.with_file_name("real.pgherd"));
        assert_eq!(layout.work(), layout.beside(), "it is no mount point");
    }

    #[test]
    fn a_dangling_data_directory_is_an_error_and_not_an_empty_one() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("gone"), &link).unwrap();
        assert!(Layout::new(&link, None).is_err());
    }

    #[test]
    fn a_mount_point_is_recognised() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/proc/self")));
    }

    #[test]
    fn a_promotion_record_survives_and_a_damaged_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(&directory.path().join("data"), None).unwrap();
        let file = layout.promotion_file();
        assert_eq!(file.read().unwrap(), None);
        let record = OwnPromotion { timeline: TimelineId(2), epoch: Epoch(7), parent: TimelineId(1), switch_lsn: Some(Lsn(0x500_0000)) };
        file.write(&record).unwrap();
        assert_eq!(file.read().unwrap(), Some(record));
        std::fs::write(file.path(), "{").unwrap();
        assert!(file.read().is_err());
        file.remove().unwrap();
        assert_eq!(file.read().unwrap(), None);
    }
}
