//! Files that are there whole or not at all: written to a temporary name in the same directory, fsynced, renamed, the directory fsynced.
//!
//! Blocking calls; the callers are the executor's jobs, never the renewal path.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

/// Mode of every file written here: PostgreSQL's own for what is in a data directory.
pub const FILE_MODE: u32 = 0o600;
/// Mode of every directory made here.
pub const DIRECTORY_MODE: u32 = 0o700;

/// Writes `content` to `path`, whole. A crash leaves the old file or the new one.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().context("a file needs a directory")?;
    let name = path.file_name().context("a file needs a name")?.to_string_lossy();
    let temporary = parent.join(format!(".{name}.pgherd-new"));
    let write = || -> std::io::Result<()> {
        // A leftover of an earlier crash may have another mode; it is not reused.
        remove_file_if_there(&temporary)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    sync_directory(parent)
}

/// As [`write_whole`], unless the file already holds just that. Says whether it wrote.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(false);
    }
    write_whole(path, content)?;
    Ok(true)
}

/// Makes the entries of a directory durable.
pub fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).with_context(|| format!("syncing the directory {}", path.display()))
}

/// Makes a directory and its missing parents, mode 0700, and makes them durable.
pub fn make_directory(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .with_context(|| format!("making the directory {}", path.display()))?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Removes a file; one that is not there is fine.
pub fn remove_file_if_there(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a directory with all that is in it, following no symbolic link; one that is not there is fine.
pub fn remove_directory_if_there(path: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads a file as text; None when it is not there.
pub fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Whether there is anything at the path: a dangling symbolic link counts. An error is an error, not absence.
pub fn is_there(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("looking at {}", path.display())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    use super::*;

    /// Looks until there is something, for at most 20 s.
    pub(crate) async fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut looks = tokio::time::interval(Duration::from_millis(10));
        loop {
            looks.tick().await;
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "it did not come to pass within 20 s");
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        fs::write(directory.path().join(".f.pgherd-new"), "half of an earlier atte").unwrap();
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, FILE_MODE);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn unchanged_content_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        assert!(write_if_changed(&path, b"one").unwrap());
        assert!(!write_if_changed(&path, b"one").unwrap());
        assert!(write_if_changed(&path, b"two").unwrap());
    }
}
