//! Tablespaces of a copy: each data directory has its own directory within the tablespace's, as it has for its WAL, so that a swap, which
//! moves the links, need not touch them.
//!
//! ```text
//! /ts/fast                   the tablespace's directory on this host: the cluster's, or what `tablespace_map` says
//! /ts/fast/PG_17_202406281   where the server that created it put it, or one that replayed that
//! /ts/fast/pgherd-1          a copy's; data_dir/pg_tblspc/16385 is a link to it
//! ```
//! It is within, and not beside, because that may be a mount point or have a parent that is not ours; and it has to be there: an absent one may
//! be a file system that is not mounted, which a copy must not be put under. What surprises: what is removed with a data directory is asked of
//! its own links, and is left alone where another data directory that is kept or in use here has the same link. pg_basebackup makes the links last, so
//! what a copy makes is noted first, in `tablespaces.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::files;
use super::layout::Layout;
use super::leader::LeaderFacts;

/// What the names of pgherd's directories within a tablespace's begin with.
const PREFIX: &str = "pgherd-";
/// Most of them within one: the one in use, the kept one, the one being made, and what crashes left.
const DIRECTORIES_MAX: u32 = 1_000;

/// Where tablespaces of the cluster are on this host, if not where they are elsewhere.
pub type TablespaceMap = BTreeMap<PathBuf, PathBuf>;

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its name in `pg_tblspc`.
    pub oid: String,
    /// Its name.
    pub name: String,
    /// Where the source's link goes.
    pub location: PathBuf,
    /// How much is in it; None when the user may not ask.
    pub bytes: Option<u64>,
}

impl Tablespace {
    /// Its directory on this host: a copy's own one is not the tablespace's.
    pub fn directory(&self, map: &TablespaceMap) -> PathBuf {
        let directory = if is_ours(&self.location) { self.location.parent().unwrap_or(&self.location) } else { &self.location };
        map.get(directory).cloned().unwrap_or_else(|| directory.to_owned())
    }
}

fn is_ours(path: &Path) -> bool {
    let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(PREFIX));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A tablespace of a copy that is being made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Its name in `pg_tblspc`.
    pub oid: String,
    /// Where the source's link goes.
    pub from: PathBuf,
    /// Where the copy's is to go.
    pub to: PathBuf,
}

/// Refuses what cannot be copied here, before anything is touched.
pub fn refuse_impossible(layout: &Layout, tablespaces: &[Tablespace], map: &TablespaceMap) -> Result<()> {
    for tablespace in tablespaces {
        let (directory, name) = (tablespace.directory(map), &tablespace.name);
        let instead = "or name another one for it in postgres.tablespace_map of this host's node document";
        ensure!(
            directory.is_dir(),
            "the tablespace `{name}` has no directory here: mount or make {}, owned by the user of the data directory, {instead}",
            directory.display()
        );
        let real = directory.canonicalize().with_context(|| format!("resolving {}", directory.display()))?;
        ensure!(
            !real.starts_with(layout.data_dir()) && !real.starts_with(layout.beside()),
            "the tablespace `{name}` is in {}, within the data directory or pgherd's own: a copy of it there would go with that; {instead}",
            real.display()
        );
        let writable = nix::unistd::access(&real, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK);
        writable.with_context(|| format!("writing into {}, the directory of the tablespace `{name}`", real.display()))?;
    }
    Ok(())
}

/// How much goes where, with what goes into `work`, file system by file system: for each a place on it. None when the source's user may not
/// ask for all of it.
pub fn rooms(source: &LeaderFacts, map: &TablespaceMap, work: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let apart: Option<u64> = source.tablespaces.iter().map(|tablespace| tablespace.bytes).sum();
    let Some((all, apart)) = source.database_bytes.zip(apart) else { return Ok(Vec::new()) };
    let within = source.tablespaces.iter().map(|tablespace| (tablespace.directory(map), tablespace.bytes.unwrap_or(0)));
    let mut rooms: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (place, bytes) in std::iter::once((work.to_owned(), all.saturating_sub(apart))).chain(within) {
        let device = fs::metadata(&place).with_context(|| format!("looking at {}", place.display()))?.dev();
        rooms.entry(device).or_insert((place, 0)).1 += bytes;
    }
    Ok(rooms.into_values().collect())
}

/// Makes a directory for each tablespace of a copy, and notes that.
pub fn make(layout: &Layout, tablespaces: &[Tablespace], map: &TablespaceMap) -> Result<Vec<Placed>> {
    let mut placed = Vec::new();
    for tablespace in tablespaces {
        let to = make_one(&tablespace.directory(map))?;
        placed.push(Placed { oid: tablespace.oid.clone(), from: tablespace.location.clone(), to });
        // One that was made and not noted is empty.
        let made: Vec<&PathBuf> = placed.iter().map(|placed| &placed.to).collect();
        files::write_whole(&layout.tablespaces_note(), &serde_json::to_vec_pretty(&made)?)?;
    }
    Ok(placed)
}

fn make_one(directory: &Path) -> Result<PathBuf> {
    for number in 1..=DIRECTORIES_MAX {
        let path = directory.join(format!("{PREFIX}{number}"));
        match fs::DirBuilder::new().mode(files::DIRECTORY_MODE).create(&path) {
            Ok(()) => {
                files::sync_directory(directory)?;
                return Ok(path);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("making the directory {}", path.display())),
        }
    }
    bail!("expected fewer than {DIRECTORIES_MAX} directories of copies in {}: remove old ones", directory.display())
}

/// Every link of a finished copy goes where it was told to.
pub fn check(copy: &Path, placed: &[Placed]) -> Result<()> {
    let links = links(copy)?;
    for Placed { oid, to, .. } in placed {
        ensure!(
            links.get(oid) == Some(to),
            "pg_basebackup left no link to {} for the tablespace {oid}: {:?}",
            to.display(),
            links.get(oid)
        );
    }
    Ok(())
}

/// The links of a data directory; none when it is not there.
pub fn links(data_dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let place = data_dir.join("pg_tblspc");
    let entries = match fs::read_dir(&place) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(BTreeMap::new()),
        entries => entries.with_context(|| format!("reading {}", place.display()))?,
    };
    let mut links = BTreeMap::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", place.display()))?;
        if entry.file_type()?.is_symlink() {
            let target = fs::read_link(entry.path()).with_context(|| format!("reading the link {}", entry.path().display()))?;
            links.insert(entry.file_name().to_string_lossy().into_owned(), target);
        }
    }
    Ok(links)
}

/// What is in use, kept, or not removed yet, by the links of every data directory here but one. Also of other servers that run on this host:
/// PostgreSQL lets two standbys of one host replay the same CREATE TABLESPACE into one directory.
fn linked(layout: &Layout, but: &Path) -> Result<BTreeSet<PathBuf>> {
    let here: [PathBuf; 4] =
        [layout.data_dir().to_owned(), layout.kept_dir().join("data"), layout.discard_dir().join("data"), layout.clone_dir()];
    let mut found = BTreeSet::new();
    for directory in here.iter().chain(&servers()?).filter(|directory| *directory != but) {
        found.extend(links(directory)?.into_values());
    }
    Ok(found)
}

/// The data directories of servers that run here, as far as they can be seen: a server works in its own.
fn servers() -> Result<BTreeSet<PathBuf>> {
    let processes = fs::read_dir("/proc").context("reading /proc")?.flatten();
    // A process that has ended meanwhile has none, and one of another user's is not shown.
    let places = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
    Ok(places.filter(|place| place.join("PG_VERSION").is_file()).collect())
}

/// What a copy has made that came to nothing. Nothing of one that is in place.
pub fn remove_unfinished(layout: &Layout) -> Result<()> {
    let note = layout.tablespaces_note();
    let Some(text) = files::read_if_there(&note)? else { return Ok(()) };
    let made: Vec<PathBuf> =
        serde_json::from_str(&text).with_context(|| format!("expected a list of directories in {}", note.display()))?;
    let linked = linked(layout, Path::new(""))?;
    for path in made.iter().filter(|path| is_ours(path) && !linked.contains(*path)) {
        files::remove_directory_if_there(path).with_context(|| format!("removing {}", path.display()))?;
    }
    forget(layout)
}

/// A copy is in place: what it has made is what its links say. Before the swap's journal goes, or a note that was left would, where the data
/// directory is not mounted at the next copy, name as unfinished what is in use.
pub(super) fn forget(layout: &Layout) -> Result<()> {
    files::remove_file_if_there(&layout.tablespaces_note()).context("removing the note of a copy's tablespaces")?;
    if layout.beside().is_dir() { files::sync_directory(layout.beside()) } else { Ok(()) }
}

/// Removes the tablespaces of a data directory that is about to be removed.
pub fn remove_of(layout: &Layout, data_dir: &Path) -> Result<()> {
    let linked = linked(layout, data_dir)?;
    for target in links(data_dir)?.into_values().filter(|target| !linked.contains(target)) {
        for path in within(data_dir, &target)? {
            files::remove_directory_if_there(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// What a data directory has in its tablespaces, for a person who removes it. Never all of a directory that others are in, too.
pub(super) fn of(data_dir: &Path) -> Result<Vec<PathBuf>> {
    let found = links(data_dir)?.into_values().map(|target| {
        within(data_dir, &target).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "what is kept in a tablespace could not be looked at");
            Vec::new()
        })
    });
    Ok(found.flatten().collect())
}

/// What is a data directory's own of where one of its links goes: within a tablespace's directory are those of other versions' clusters and of
/// copies, too.
fn within(data_dir: &Path, target: &Path) -> Result<Vec<PathBuf>> {
    if !target.is_absolute() {
        return Ok(Vec::new());
    }
    if is_ours(target) {
        return Ok(vec![target.to_owned()]);
    }
    let Some(version) = files::read_if_there(&data_dir.join("PG_VERSION"))? else { return Ok(Vec::new()) };
    let ours = format!("PG_{}_", version.trim());
    let entries = match fs::read_dir(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("reading {}", target.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", target.display()))?;
        if entry.file_name().to_string_lossy().starts_with(&ours) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tablespace(location: &Path) -> Tablespace {
        Tablespace { oid: "16385".to_owned(), name: "far".to_owned(), location: location.to_owned(), bytes: None }
    }

    struct Place {
        _directory: tempfile::TempDir,
        root: PathBuf,
        layout: Layout,
    }

    fn place() -> Place {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = directory.path().canonicalize().unwrap();
        let layout = Layout::new(&root.join("data"), None).unwrap();
        layout.prepare().unwrap();
        fs::create_dir(root.join("ts")).unwrap();
        Place { _directory: directory, root, layout }
    }

    /// A data directory with a tablespace there.
    fn data(directory: &Path, tablespace: &Path) {
        fs::create_dir_all(directory.join("pg_tblspc")).unwrap();
        fs::write(directory.join("PG_VERSION"), "17\n").unwrap();
        symlink(tablespace, directory.join("pg_tblspc/16385")).unwrap();
        fs::create_dir_all(tablespace.join("PG_17_1/5")).unwrap();
    }

    #[test]
    fn a_copys_own_directory_is_within_the_tablespaces_and_not_within_another_copys() {
        let ts = Path::new("/ts/fast");
        let map = TablespaceMap::from([(ts.to_owned(), PathBuf::from("/mnt/x"))]);
        for location in ["/ts/fast", "/ts/fast/pgherd-12"] {
            assert_eq!(tablespace(Path::new(location)).directory(&TablespaceMap::new()), ts);
            assert_eq!(tablespace(Path::new(location)).directory(&map), Path::new("/mnt/x"));
        }
        let named_so = Path::new("/ts/pgherd-fast");
        assert_eq!(tablespace(named_so).directory(&map), named_so);
    }

    #[test]
    fn what_cannot_be_copied_here_is_refused_and_says_what_to_do() {
        let Place { root, layout, .. } = &place();
        let refused =
            |location: &Path| refuse_impossible(layout, &[tablespace(location)], &TablespaceMap::new()).map_err(|error| error.to_string());
        assert_eq!(refused(&root.join("ts")), Ok(()));
        let absent = refused(&root.join("absent")).unwrap_err();
        assert!(absent.contains("far") && absent.contains("tablespace_map"), "{absent}");
        fs::create_dir_all(layout.data_dir().join("within")).unwrap();
        assert!(refused(&layout.data_dir().join("within")).unwrap_err().contains("within the data directory"));
    }

    #[test]
    fn p5_what_is_removed_is_what_no_data_directory_that_stays_has_a_link_to() {
        let Place { root, layout, .. } = &place();
        let ts = root.join("ts");
        data(layout.data_dir(), &ts.join("pgherd-1"));
        let kept = layout.kept_dir().join("data");
        data(&kept, &ts);
        fs::create_dir_all(ts.join("PG_15_1")).unwrap();
        // A copy that came to nothing, one that is in place and not forgotten, and what is none of ours.
        let made = make(layout, &[tablespace(&ts)], &TablespaceMap::new()).unwrap();
        assert_eq!(made[0].to, ts.join("pgherd-2"));
        let noted = [ts.join("pgherd-2"), ts.join("pgherd-1"), root.join("data")];
        fs::write(layout.tablespaces_note(), serde_json::to_string(&noted).unwrap()).unwrap();
        remove_unfinished(layout).unwrap();
        assert!(!ts.join("pgherd-2").exists() && ts.join("pgherd-1/PG_17_1").exists() && layout.data_dir().exists());
        assert!(!layout.tablespaces_note().exists());

        // Another data directory with the same link as the kept one.
        let discarded = layout.discard_dir().join("data");
        data(&discarded, &ts);
        remove_of(layout, &discarded).unwrap();
        assert!(ts.join("PG_17_1").exists(), "it is the kept one's, too");
        fs::remove_dir_all(&discarded).unwrap();
        // Or another server's on this host.
        let another = root.join("another");
        data(&another, &ts);
        let mut server = std::process::Command::new("sleep").arg("600").current_dir(&another).spawn().unwrap();
        let removed = remove_of(layout, &kept);
        let stays = ts.join("PG_17_1").exists();
        server.kill().unwrap();
        server.wait().unwrap();
        removed.unwrap();
        assert!(stays, "it is in use");
        remove_of(layout, &kept).unwrap();
        assert!(!ts.join("PG_17_1").exists() && ts.join("PG_15_1").exists() && ts.join("pgherd-1/PG_17_1").exists());
        remove_of(layout, layout.data_dir()).unwrap();
        assert!(!ts.join("pgherd-1").exists() && ts.exists());
    }
}
