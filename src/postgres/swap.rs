//! Puts a finished directory (a clone, or initdb's result) where the data directory is, and the old one aside, so that a crash at any
//! point is finished at the next start and nothing is overwritten (P5).
//!
//! The journal `swap.json` is the commit: before it is written nothing has moved; while it is there the data directory counts as
//! unusable and [`recover_interrupted_swap`] goes on from its stage; each stage may be repeated. Old content goes to `kept/` (a diverged
//! directory, one at a time, removed only by name) or to `discard/` (its content is elsewhere), which is removed once the swap is done.
//!
//! A directory is renamed whole where that works. Where it cannot be (a mount point, a parent that is not ours), its entries are moved
//! one by one, never onto an existing one, with `global` (the control file) first out and last in: half a directory cannot be started.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::layout::{INSIDE_NAME, Layout};
use super::{files, rewind, tablespaces};

/// Beside what is kept: why, and where its tablespaces are.
const WHY: &str = "why.json";

/// Why a swap was not begun.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// `kept/` already holds a diverged directory.
    #[error("{0} already keeps a diverged data directory; look at its why.json, then remove it by name")]
    KeptOccupied(PathBuf),
    /// The data directory holds something although the caller said it was empty.
    #[error("{0} is not empty: it is not initialized over")]
    NotEmpty(PathBuf),
    /// A file operation failed; if the journal was written, the next start goes on.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// What becomes of the old data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// It holds WAL that is nowhere else: all of it goes to `kept/`, with this reason.
    Whole {
        /// A sentence for `why.json`: range, bytes, when.
        why: String,
    },
    /// All of its content is proved to be elsewhere, or an operator said so by name: removed once the new one is in place.
    Nothing,
    /// There is none: the data directory is absent or empty. Anything in it stops the swap.
    Empty,
}

/// The journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Journal {
    /// The finished directory.
    from: PathBuf,
    /// Where the old content goes; None when there is none.
    aside: Option<PathBuf>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    /// The old content is on its way out.
    Out,
    /// The new content is on its way in.
    In,
}

/// Refuses early what [`swap`] would refuse: asked before hours of copying.
pub fn check(layout: &Layout, keep: &Keep) -> Result<(), SwapError> {
    // The reason alone is what a crash left of a swap that had not begun.
    let occupied = |dir: &Path, but: &str| -> Result<bool> { Ok(dir.is_dir() && entries(dir)?.iter().any(|name| name != but)) };
    match keep {
        Keep::Whole { .. } if occupied(&layout.kept_dir(), WHY)? => Err(SwapError::KeptOccupied(layout.kept_dir())),
        Keep::Empty if occupied(layout.data_dir(), "")? => Err(SwapError::NotEmpty(layout.data_dir().to_owned())),
        _ => Ok(()),
    }
}

/// Puts `from` in the data directory's place. PostgreSQL is stopped, and proved so, until this returns.
pub fn swap(layout: &Layout, from: &Path, keep: &Keep) -> Result<(), SwapError> {
    check(layout, keep)?;
    crash_point()?;
    let aside = match keep {
        Keep::Empty => None,
        Keep::Whole { why } => {
            let kept = layout.kept_dir();
            files::make_directory(&kept)?;
            files::write_whole(&kept.join(WHY), &serde_json::to_vec_pretty(&why_kept(layout, why)?).context("writing why.json")?)?;
            Some(kept.join("data"))
        }
        Keep::Nothing => {
            let discard = layout.discard_dir();
            files::make_directory(&discard)?;
            Some(discard.join("data"))
        }
    };
    let journal = Journal { from: from.to_owned(), aside, stage: Stage::Out };
    crash_point()?;
    write_journal(layout, &journal)?;
    finish(layout, journal)?;
    Ok(())
}

#[derive(Serialize)]
struct Why<'a> {
    why: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tablespaces: Vec<PathBuf>,
}

fn why_kept<'a>(layout: &Layout, why: &'a str) -> Result<Why<'a>> {
    Ok(Why { why, tablespaces: tablespaces::of(layout.data_dir())? })
}

/// At the daemon's start, PostgreSQL stopped: finishes a swap that a crash interrupted. Says whether there was one. What was swapped out
/// for removal is removed by [`remove_discarded`], which may take long and may run beside everything else.
pub fn recover_interrupted_swap(layout: &Layout) -> Result<bool> {
    let path = layout.swap_journal();
    let Some(text) = files::read_if_there(&path)? else { return Ok(false) };
    let journal = serde_json::from_str(&text).with_context(|| format!("expected a swap's journal in {}", path.display()))?;
    finish(layout, journal)?;
    Ok(true)
}

fn finish(layout: &Layout, mut journal: Journal) -> Result<()> {
    crash_point()?;
    if journal.stage == Stage::Out {
        if let Some(aside) = &journal.aside {
            move_directory(layout.data_dir(), aside, Stage::Out)?;
        }
        crash_point()?;
        journal.stage = Stage::In;
        write_journal(layout, &journal)?;
    }
    crash_point()?;
    move_directory(&journal.from, layout.data_dir(), Stage::In)?;
    crash_point()?;
    // The promotion on record was that of the directory that went out, and so was a rewind that was begun.
    layout.promotion_file().remove()?;
    crash_point()?;
    rewind::remove_marker(layout)?;
    crash_point()?;
    tablespaces::forget(layout)?;
    crash_point()?;
    files::remove_file_if_there(&layout.swap_journal()).context("removing the swap's journal")?;
    files::sync_directory(layout.beside())
}

fn write_journal(layout: &Layout, journal: &Journal) -> Result<()> {
    layout.prepare()?;
    files::write_whole(&layout.swap_journal(), &serde_json::to_vec_pretty(journal)?)
}

/// Moves a directory, whole or entry by entry; what has moved already is left. A source that is not there has moved.
fn move_directory(from: &Path, to: &Path, stage: Stage) -> Result<()> {
    if !files::is_there(from)? {
        return Ok(());
    }
    let context = || format!("moving {} to {}", from.display(), to.display());
    match rename_whole(from, to) {
        Ok(()) => return sync_parents(from, to),
        Err(error) if goes_by_entry(&error) => {}
        Err(error) => return Err(error).with_context(context),
    }
    match fs::DirBuilder::new().mode(files::DIRECTORY_MODE).create(to) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).with_context(context),
        _ => {}
    }
    let mut names = entries(from)?;
    names.sort_by_key(|name| (name == "global") != (stage == Stage::Out));
    for name in names {
        crash_point()?;
        renameat2(AT_FDCWD, &from.join(&name), AT_FDCWD, &to.join(&name), RenameFlags::RENAME_NOREPLACE)
            .map_err(io::Error::from)
            .with_context(|| format!("moving {} of {} to {}", name.display(), from.display(), to.display()))?;
    }
    files::sync_directory(from)?;
    files::sync_directory(to)?;
    // What is left is an empty directory, or a mount point with pgherd's own directory in it: then this fails, rightly.
    let _ = fs::remove_dir(from);
    sync_parents(from, to)
}

fn rename_whole(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    tests::rename_whole_works()?;
    fs::rename(from, to)
}

/// Between two effects: where the unit tests crash.
fn crash_point() -> Result<()> {
    #[cfg(test)]
    tests::crash_if_due()?;
    Ok(())
}

/// A mount point (EBUSY, EINVAL when it goes into its own `.pgherd`), a parent that is not ours, a move that was half done.
fn goes_by_entry(error: &io::Error) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw);
    matches!(number, Some(Errno::EBUSY | Errno::EINVAL | Errno::EACCES | Errno::EPERM | Errno::ENOTEMPTY | Errno::EEXIST))
}

fn entries(directory: &Path) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading the directory {}", directory.display()))? {
        let name = entry?.file_name();
        if name != INSIDE_NAME {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn sync_parents(from: &Path, to: &Path) -> Result<()> {
    [from, to].iter().filter_map(|path| path.parent()).filter(|parent| parent.is_dir()).try_for_each(files::sync_directory)
}

/// Empties a data directory that was given up by name: it goes out as it would for a copy, and nothing comes in. What is half out is finished by
/// the next look. PostgreSQL is stopped, and proved so.
pub async fn empty(layout: &Layout) -> Result<()> {
    rewind::end_orphans(layout).await?;
    // What a copy before has left must not come in, and what was discarded before is in the way.
    remove(layout, &layout.clone_dir()).await?;
    tablespaces::remove_unfinished(layout)?;
    remove_discarded(layout).await?;
    if !files::is_there(layout.data_dir())? {
        return Ok(());
    }
    move_out(layout)?;
    remove_discarded(layout).await
}

fn move_out(layout: &Layout) -> Result<()> {
    files::make_directory(&layout.discard_dir())?;
    let journal = Journal { from: layout.clone_dir(), aside: Some(layout.discard_dir().join("data")), stage: Stage::Out };
    crash_point()?;
    write_journal(layout, &journal)?;
    finish(layout, journal)
}

/// Removes what was swapped out because its content is elsewhere. Not while a swap is under way: the journal may still need it.
pub(super) async fn remove_discarded(layout: &Layout) -> Result<()> {
    if files::is_there(&layout.swap_journal())? {
        return Ok(());
    }
    remove(layout, &layout.discard_dir().join("data")).await?;
    files::remove_directory_if_there(&layout.discard_dir()).with_context(|| format!("removing {}", layout.discard_dir().display()))
}

/// One removal at a time. A thread goes on when its job is cancelled, and what it removes has the names of what the next job makes; that one
/// begins by removing, too. It is not the lock of [`rewind`], on which PostgreSQL's start would wait.
static REMOVING: Mutex<()> = Mutex::new(());

/// Removes a data directory that is not in use, off the runtime's threads.
pub(super) async fn remove(layout: &Layout, directory: &Path) -> Result<()> {
    let (layout, directory) = (layout.clone(), directory.to_owned());
    let work = move || {
        let _one = REMOVING.lock().unwrap_or_else(PoisonError::into_inner);
        remove_whole(&layout, &directory)
    };
    tokio::task::spawn_blocking(work).await.context("the removal was ended")?
}

/// Removes a data directory that is not in use, what only it has of tablespaces, and its WAL directory if that is one of ours outside it.
fn remove_whole(layout: &Layout, directory: &Path) -> Result<()> {
    tablespaces::remove_of(layout, directory)?;
    if let (Some(wal_dir), Ok(target)) = (layout.wal_dir(), fs::read_link(directory.join("pg_wal"))) {
        if target == wal_dir {
            // Of a directory made by hand: pgherd's own ones are below it and may be in use.
            for name in entries(wal_dir)?.iter().filter(|name| !name.to_string_lossy().starts_with(WAL_PREFIX)) {
                let path = wal_dir.join(name);
                if path.is_dir() { files::remove_directory_if_there(&path) } else { files::remove_file_if_there(&path) }
                    .with_context(|| format!("removing {}", path.display()))?;
            }
        } else if target.parent() == Some(wal_dir) {
            files::remove_directory_if_there(&target).with_context(|| format!("removing {}", target.display()))?;
        }
    }
    files::remove_directory_if_there(directory).with_context(|| format!("removing {}", directory.display()))
}

/// What the names of pgherd's WAL directories below `wal_dir` begin with.
const WAL_PREFIX: &str = "pgherd-";
/// Most WAL directories below one `wal_dir`: the one in use, the kept one, the one being made, and what crashes left.
const WAL_DIRECTORIES_MAX: u32 = 1_000;

/// A fresh directory below `wal_dir` for the WAL of a directory being made: each data directory has its own, so that a swap need not
/// touch the WAL. None when WAL stays in the data directory.
pub(super) fn new_wal_directory(layout: &Layout) -> Result<Option<PathBuf>> {
    let Some(wal_dir) = layout.wal_dir() else { return Ok(None) };
    let free = (1..=WAL_DIRECTORIES_MAX).map(|number| wal_dir.join(format!("{WAL_PREFIX}{number}"))).find(|path| !path.exists());
    free.map(Some)
        .with_context(|| format!("expected fewer than {WAL_DIRECTORIES_MAX} WAL directories in {}: remove old ones", wal_dir.display()))
}

#[cfg(test)]
#[path = "swap_tests.rs"]
mod tests;
