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

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::files;
use super::layout::{INSIDE_NAME, Layout};

/// Beside what is kept: why.
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
            files::write_whole(&kept.join(WHY), &serde_json::to_vec_pretty(&Why { why }).context("writing why.json")?)?;
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
    super::rewind::remove_marker(layout)?;
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
    layout.prepare()?;
    // What a copy before has left must not come in, and what was discarded before is in the way.
    remove(layout, &layout.clone_dir()).await?;
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
pub async fn remove_discarded(layout: &Layout) -> Result<()> {
    if files::is_there(&layout.swap_journal())? {
        return Ok(());
    }
    remove(layout, &layout.discard_dir().join("data")).await?;
    files::remove_directory_if_there(&layout.discard_dir()).with_context(|| format!("removing {}", layout.discard_dir().display()))
}

/// Removes a data directory that is not in use, off the runtime's threads.
pub(super) async fn remove(layout: &Layout, directory: &Path) -> Result<()> {
    let (layout, directory) = (layout.clone(), directory.to_owned());
    tokio::task::spawn_blocking(move || remove_with_wal(&layout, &directory)).await.context("the removal was ended")?
}

/// Removes a data directory that is not in use, and its WAL directory if that is one of ours outside it.
fn remove_with_wal(layout: &Layout, directory: &Path) -> Result<()> {
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
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use anyhow::bail;

    use super::*;

    thread_local! {
        static EFFECTS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
        static BY_ENTRY: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn crash_if_due() -> Result<()> {
        match EFFECTS_LEFT.get() {
            Some(0) => bail!("crash"),
            left => EFFECTS_LEFT.set(left.map(|left| left - 1)),
        }
        Ok(())
    }

    pub(super) fn rename_whole_works() -> io::Result<()> {
        if BY_ENTRY.get() { Err(Errno::EACCES.into()) } else { Ok(()) }
    }

    const OLD: [(&str, &str); 3] = [("PG_VERSION", "old"), ("global/pg_control", "old"), ("pg_wal/1", "diverged")];
    const NEW: [(&str, &str); 4] = [("PG_VERSION", "new"), ("global/pg_control", "new"), ("pg_wal/1", "shared"), ("standby.signal", "")];

    fn fill(directory: &Path, content: &[(&str, &str)]) {
        for (name, text) in content {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn holds(directory: &Path, content: &[(&str, &str)]) -> bool {
        fn walk(directory: &Path, root: &Path, found: &mut BTreeMap<String, String>) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                if path.is_dir() { walk(&path, root, found) } else { found.extend([(name, fs::read_to_string(&path).unwrap())]) }
            }
        }
        let mut found = BTreeMap::new();
        walk(directory, directory, &mut found);
        found == content.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    struct Place {
        _directory: tempfile::TempDir,
        layout: Layout,
    }

    fn place(old: bool) -> Place {
        // In memory: hundreds of swaps sync each step.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let layout = Layout::new(&directory.path().join("data"), None).unwrap();
        if old {
            fill(layout.data_dir(), &OLD);
        }
        fill(&layout.clone_dir(), &NEW);
        Place { _directory: directory, layout }
    }

    fn kept() -> Keep {
        Keep::Whole { why: "diverged".into() }
    }

    /// Crashes before the n-th effect of a swap and before the m-th of its recovery, for every n and m.
    fn crash_everywhere(old: bool, by_entry: bool, keep: &Keep, judge: impl Fn(&Layout)) {
        BY_ENTRY.set(by_entry);
        let (mut crashes, mut untouched, mut finished) = (0, 0, 0);
        for first in 0.. {
            let mut second = 0;
            loop {
                let place = place(old);
                EFFECTS_LEFT.set(Some(first));
                let swapped = swap(&place.layout, &place.layout.clone_dir(), keep);
                EFFECTS_LEFT.set(Some(second));
                let recovered = recover_interrupted_swap(&place.layout);
                EFFECTS_LEFT.set(None);
                recover_interrupted_swap(&place.layout).unwrap();
                assert!(!place.layout.swap_journal().exists());
                if swapped.is_err() && holds(place.layout.data_dir(), if old { &OLD } else { &[] }) {
                    assert!(holds(&place.layout.clone_dir(), &NEW), "a swap that was not begun may be tried again");
                    untouched += 1;
                } else {
                    assert!(holds(place.layout.data_dir(), &NEW));
                    judge(&place.layout);
                    finished += 1;
                }
                crashes += usize::from(recovered.is_err());
                match (swapped.is_ok(), recovered.is_ok()) {
                    (true, _) => {
                        assert!(crashes > 0 && untouched > 0 && finished > 0, "{crashes} {untouched} {finished}");
                        return;
                    }
                    (false, true) => break,
                    (false, false) => second += 1,
                }
            }
        }
    }

    #[test]
    fn a_diverged_directory_is_kept_whole_whatever_the_moment_of_the_crash() {
        for by_entry in [false, true] {
            crash_everywhere(true, by_entry, &kept(), |layout| {
                assert!(holds(&layout.kept_dir().join("data"), &OLD));
                assert!(fs::read_to_string(layout.kept_dir().join("why.json")).unwrap().contains("diverged"));
            });
        }
    }

    /// Found by reading: what was left of a swap that never began was taken for a diverged directory, and nothing was swapped any more.
    #[test]
    fn a_swap_that_a_crash_kept_from_beginning_is_begun_again() {
        let mut kept_from_beginning = 0;
        for first in 0.. {
            let place = place(true);
            let again = || swap(&place.layout, &place.layout.clone_dir(), &kept());
            EFFECTS_LEFT.set(Some(first));
            let ended = again();
            EFFECTS_LEFT.set(None);
            if ended.is_ok() {
                break;
            }
            if !recover_interrupted_swap(&place.layout).unwrap() {
                again().unwrap();
                assert!(holds(&place.layout.kept_dir().join("data"), &OLD) && holds(place.layout.data_dir(), &NEW));
                kept_from_beginning += 1;
            }
        }
        assert!(kept_from_beginning > 1, "{kept_from_beginning}");
    }

    #[test]
    fn a_replaceable_directory_is_whole_until_the_new_one_is_in_place() {
        for by_entry in [false, true] {
            crash_everywhere(true, by_entry, &Keep::Nothing, |layout| assert!(holds(&layout.discard_dir().join("data"), &OLD)));
        }
    }

    #[test]
    fn a_crash_while_an_empty_place_is_filled_is_finished_at_the_start() {
        for by_entry in [false, true] {
            crash_everywhere(false, by_entry, &Keep::Empty, |_| {});
        }
    }

    #[test]
    fn a_second_diverged_directory_is_refused_before_anything_moves() {
        let place = place(true);
        fill(&place.layout.kept_dir(), &[("data/PG_VERSION", "older")]);
        assert!(matches!(swap(&place.layout, &place.layout.clone_dir(), &kept()), Err(SwapError::KeptOccupied(_))));
        assert!(holds(place.layout.data_dir(), &OLD) && !place.layout.swap_journal().exists());
    }

    #[test]
    fn nothing_is_initialized_over_a_full_directory() {
        let place = place(true);
        assert!(matches!(swap(&place.layout, &place.layout.clone_dir(), &Keep::Empty), Err(SwapError::NotEmpty(_))));
        assert!(holds(place.layout.data_dir(), &OLD));
    }

    #[test]
    fn a_file_that_appeared_in_the_meantime_is_never_overwritten() {
        let place = place(false);
        BY_ENTRY.set(true);
        EFFECTS_LEFT.set(Some(5));
        assert!(swap(&place.layout, &place.layout.clone_dir(), &Keep::Empty).is_err());
        EFFECTS_LEFT.set(None);
        fill(place.layout.data_dir(), &[("global/mine", "mine"), ("standby.signal", "mine")]);
        assert!(recover_interrupted_swap(&place.layout).is_err());
        assert_eq!(fs::read_to_string(place.layout.data_dir().join("standby.signal")).unwrap(), "mine");
    }

    #[tokio::test]
    async fn what_is_discarded_goes_with_its_own_wal_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let wal_dir = directory.path().canonicalize().unwrap().join("wal");
        fill(&wal_dir, &[("pgherd-1/000000010000000000000001", "old"), ("pgherd-2/000000010000000000000001", "new")]);
        let layout = Layout::new(&directory.path().join("data"), Some(&wal_dir)).unwrap();
        let discarded = layout.discard_dir().join("data");
        fill(&discarded, &OLD[..2]);
        std::os::unix::fs::symlink(wal_dir.join("pgherd-1"), discarded.join("pg_wal")).unwrap();
        remove_discarded(&layout).await.unwrap();
        assert!(!layout.discard_dir().exists() && !wal_dir.join("pgherd-1").exists() && wal_dir.join("pgherd-2").exists());
        assert_eq!(new_wal_directory(&layout).unwrap(), Some(wal_dir.join("pgherd-1")), "the name is free again");
    }

    /// Crashes before the n-th effect of emptying, for every n: what is left is whole, or is finished by the next look.
    #[test]
    fn a_directory_that_is_given_up_is_whole_or_out_and_never_half_there() {
        for by_entry in [false, true] {
            BY_ENTRY.set(by_entry);
            let (mut untouched, mut gone) = (0, 0);
            for effects in 0.. {
                let place = place(true);
                fs::remove_dir_all(place.layout.clone_dir()).unwrap();
                place.layout.prepare().unwrap();
                EFFECTS_LEFT.set(Some(effects));
                let emptied = move_out(&place.layout);
                EFFECTS_LEFT.set(None);
                let journal = place.layout.swap_journal().exists();
                if emptied.is_err() && !journal && holds(place.layout.data_dir(), &OLD) {
                    untouched += 1;
                    continue;
                }
                recover_interrupted_swap(&place.layout).unwrap();
                assert!(!place.layout.swap_journal().exists() && holds(place.layout.data_dir(), &[]));
                assert!(holds(&place.layout.discard_dir().join("data"), &OLD), "aside, to be removed");
                gone += 1;
                if emptied.is_ok() {
                    break;
                }
            }
            assert!(untouched > 0 && gone > 2, "{untouched} {gone}");
        }
        BY_ENTRY.set(false);
    }
}
