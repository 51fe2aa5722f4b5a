//! Archives the WAL that a primary's archiver did not get to, as PostgreSQL would, and puts beside what cannot be archived in a moment.
//!
//! Why it may not stay where it is: the standby that this server becomes renames such segments and writes over them, whatever is marked in
//! archive_status, so a second name for one is no protection; nor can the standby be told to keep them without keeping all. So it is copied,
//! which needs room and nothing else, and changes nothing for PostgreSQL. The mark goes with the file: `.ready` becomes `.done` once it is
//! archived, or once its copy is on disk. From then on pgherd alone archives it, or an archive_command that refuses a name that is
//! there would stop the archiver of a later primary.
//!
//! Like PostgreSQL's archiver this may archive a file twice: when it is ended between the command and the mark. A segment that was complete
//! when PostgreSQL crashed, and not marked yet, is not seen: that is the moment between two system calls. What surprises: the lock of
//! [`super::rewind`] is the standard input of the command, for a command that outlives its daemon must not read a segment that PostgreSQL,
//! started since, is writing over.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::layout::Layout;
use super::program::Program;
use super::{files, lost, rewind, wal};
use crate::facts::archiving::{Archived, Unarchived};
use crate::policy::rejoin::LeaderLineage;
use crate::policy::rejoin::archiving::{Marked, belongs};
use crate::types::{Lsn, TimelineId};

/// How long one command may take while PostgreSQL waits to be started. What takes longer is put beside, and goes on from there.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long all of them may.
const PASS_LIMIT: Duration = Duration::from_secs(60);
/// How long one command may take for a file that is beside, for which nobody waits.
const BESIDE_COMMAND_LIMIT: Duration = Duration::from_secs(600);
/// How long copying may take: PostgreSQL waits for it.
const COPY_LIMIT: Duration = Duration::from_secs(300);
/// More is never put beside: with segments of 16 MB, 256 GB.
pub const BESIDE_FILES_MAX: usize = 16_384;
/// What the file system that takes copies has to have left.
const ROOM_LEFT_BYTES: u64 = 64 << 20;
/// Of the last line that a command wrote.
const SAID_CHARS_MAX: usize = 200;
/// From this version on PostgreSQL refuses a command with a placeholder that it does not know; before it was left as it is.
const STRICT_PLACEHOLDERS_MAJOR: u32 = 16;

/// How files get into the archive.
#[derive(Debug, Clone)]
pub enum Archiver {
    /// `archive_command`, of a server of this major version.
    Command(String, u32),
    /// Not by pgherd: why.
    Nobody(String),
}

/// What PostgreSQL has marked as ready, in the order in which it would archive it: history files first, then by name.
pub fn ready(pg_wal: &Path) -> Result<Vec<String>> {
    let status = pg_wal.join("archive_status");
    if !files::is_there(&status)? {
        return Ok(Vec::new());
    }
    in_order(&status, |name| name.strip_suffix(".ready").map(str::to_owned))
}

fn in_order(directory: &Path, wanted: impl Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let name = wanted(&entry?.file_name().to_string_lossy());
        found.extend(name.filter(|name| marked(name, 1).is_some()));
    }
    found.sort_by_key(|name| (!name.ends_with(".history"), name.clone()));
    Ok(found)
}

/// A file of pg_wal by its name; None = PostgreSQL archives no file of such a name.
fn marked(name: &str, segment_bytes: u64) -> Option<Marked> {
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte));
    let ended = |segment: &str| {
        let segment = wal::segment_of(segment).filter(|_| is_hex(segment))?;
        Some(Marked::Segment { timeline: segment.timeline, ends: segment.range(segment_bytes).1 })
    };
    match name.split('.').collect::<Vec<_>>().as_slice() {
        [segment] => ended(segment),
        [segment, "partial"] => ended(segment).map(|_| Marked::Other),
        [segment, from, "backup"] if from.len() == 8 && is_hex(from) => ended(segment),
        [timeline, "history"] if timeline.len() == 8 && is_hex(timeline) => {
            u32::from_str_radix(timeline, 16).ok().map(|timeline| Marked::History(TimelineId(timeline)))
        }
        _ => None,
    }
}

/// The files that are beside.
fn put(place: &Path) -> Result<Vec<String>> {
    if !files::is_there(place)? {
        return Ok(Vec::new());
    }
    in_order(place, |name| Some(name.to_owned()))
}

/// What is beside, if anything.
pub fn beside(layout: &Layout) -> Result<Option<Unarchived>> {
    let place = layout.unarchived_dir();
    let names = put(&place)?;
    let (Some(first), Some(last)) = (names.first().cloned(), names.last().cloned()) else { return Ok(None) };
    Ok(Some(Unarchived { files: names.len(), first, last, place: place.display().to_string() }))
}

/// Sees to everything that is marked, PostgreSQL stopped: archived if the leader has it too, up to `shared`, or put beside.
///
/// # Errors
/// When some of it is neither. That is marked as before.
pub async fn archive_left(layout: &Layout, archiver: &Archiver, leader: &LeaderLineage, shared: Option<Lsn>) -> Result<Archived> {
    let lock = Arc::new(rewind::lock(layout).await?);
    let pg_wal = layout.data_dir().join("pg_wal");
    let segment_bytes = wal::segments_in(&pg_wal)?.iter().map(|file| file.bytes).max().unwrap_or(0);
    let until = Instant::now() + PASS_LIMIT;
    let (mut archived, mut why, mut left) = (0, None, Vec::new());
    for name in ready(&pg_wal)? {
        let ours = marked(&name, segment_bytes).is_some_and(|marked| belongs(marked, leader, shared));
        let path = Path::new("pg_wal").join(&name);
        if !files::is_there(&pg_wal.join(&name))? {
            // As PostgreSQL does with a mark whose file is gone.
            files::remove_file_if_there(&mark(&pg_wal, &name, "ready")).context("removing the mark of a file that is gone")?;
        } else if !ours {
            done(&pg_wal, &name)?;
        } else if why.is_some() {
            left.push(name);
        } else {
            let limit = COMMAND_LIMIT.min(until.saturating_duration_since(Instant::now()));
            match archiver.archive(layout.data_dir(), &path, &name, limit, Some(&lock)).await {
                Ok(()) => {
                    done(&pg_wal, &name)?;
                    archived += 1;
                }
                Err(error) => {
                    why = Some(format!("{error:#}"));
                    left.push(name);
                }
            }
        }
    }
    if let Some(why) = &why {
        let (layout, left) = (layout.clone(), left.clone());
        lost::holding(&lock, move || put_beside(&layout, &pg_wal, &left)).await.with_context(|| why.clone())?;
    }
    Ok(Archived { files: archived, beside: beside(layout)?, why })
}

/// Archives what is beside, until one cannot be.
pub async fn archive_beside(layout: &Layout, archiver: &Archiver) -> Result<Archived> {
    let place = layout.unarchived_dir();
    let (mut archived, mut why) = (0, None);
    for name in put(&place)? {
        let path = place.join(&name);
        if let Err(error) = archiver.archive(layout.data_dir(), &path, &name, BESIDE_COMMAND_LIMIT, None).await {
            why = Some(format!("{error:#}"));
            break;
        }
        files::remove_file_if_there(&path).with_context(|| format!("removing {}, which is archived", path.display()))?;
        archived += 1;
    }
    if archived > 0 {
        files::sync_directory(&place)?;
    }
    Ok(Archived { files: archived, beside: beside(layout)?, why })
}

/// After a rewind, which came with the marks of the leader's files: what is here is the leader's to archive.
pub(super) fn forget(pg_wal: &Path) -> Result<()> {
    ready(pg_wal)?.iter().try_for_each(|name| done(pg_wal, name))
}

fn mark(pg_wal: &Path, name: &str, mark: &str) -> PathBuf {
    pg_wal.join("archive_status").join(format!("{name}.{mark}"))
}

/// PostgreSQL never archives it from here on.
fn done(pg_wal: &Path, name: &str) -> Result<()> {
    fs::rename(mark(pg_wal, name, "ready"), mark(pg_wal, name, "done")).with_context(|| format!("marking {name} as archived"))?;
    files::sync_directory(&pg_wal.join("archive_status"))
}

/// Oldest first, as far as there is room.
fn put_beside(layout: &Layout, pg_wal: &Path, names: &[String]) -> Result<()> {
    layout.prepare()?;
    let place = layout.unarchived_dir();
    files::make_directory(&place)?;
    let until = Instant::now() + COPY_LIMIT;
    let before = put(&place)?.len();
    for (index, name) in names.iter().enumerate() {
        let rest = || format!("{} files of WAL, {name} to {}, stay where they are", names.len() - index, names[names.len() - 1]);
        let there = before + index;
        ensure!(there < BESIDE_FILES_MAX, "{} holds {there} files already: {}", place.display(), rest());
        ensure!(Instant::now() < until, "putting WAL into {} took longer than {} s: {}", place.display(), COPY_LIMIT.as_secs(), rest());
        let bytes = fs::metadata(pg_wal.join(name)).with_context(|| format!("looking at {name}"))?.len();
        let free = nix::sys::statvfs::statvfs(&place).with_context(|| format!("asking for the room in {}", place.display()))?;
        let free_bytes = free.blocks_available().saturating_mul(free.fragment_size());
        ensure!(bytes.saturating_add(ROOM_LEFT_BYTES) <= free_bytes, "{} has no room for more: {}", place.display(), rest());
        let unfinished = place.join(".unfinished");
        lost::copy_file(&pg_wal.join(name), &unfinished).with_context(rest)?;
        fs::rename(&unfinished, place.join(name)).with_context(|| format!("putting {name} into {}", place.display()))?;
        files::sync_directory(&place)?;
        done(pg_wal, name)?;
    }
    Ok(())
}

impl Archiver {
    /// As PostgreSQL does it: system(3) in the data directory.
    async fn archive(&self, data_dir: &Path, path: &Path, name: &str, limit: Duration, lock: Option<&Arc<fs::File>>) -> Result<()> {
        let (command, major) = match self {
            Archiver::Command(command, major) => (command, *major),
            Archiver::Nobody(why) => bail!(why.clone()),
        };
        ensure!(!limit.is_zero(), "there is more to archive than fits into {} s", PASS_LIMIT.as_secs());
        let command = expand(command, major, &path.to_string_lossy(), name)?;
        let mut shell = Program::new("/bin/sh").arg("-c").arg(command).current_dir(data_dir);
        if let Some(lock) = lock {
            shell = shell.stdin(Arc::clone(lock));
        }
        let output = shell.run(limit).await.with_context(|| format!("archive_command for {name}"))?;
        ensure!(output.status.success(), "archive_command for {name} failed, {}", last_words(output.status, &output.stderr));
        Ok(())
    }
}

fn last_words(status: ExitStatus, stderr: &str) -> String {
    match stderr.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("{status}: {}", line.trim().chars().take(SAID_CHARS_MAX).collect::<String>()),
        None => format!("{status}, and said nothing"),
    }
}

/// `%p` the file's path, `%f` its name, `%%` a percent sign (PostgreSQL manual, "Continuous Archiving").
fn expand(command: &str, major: u32, path: &str, name: &str) -> Result<String> {
    let mut expanded = String::new();
    let mut rest = command.chars();
    while let Some(c) = rest.next() {
        match (c, rest.as_str().chars().next()) {
            ('%', Some(placeholder @ ('p' | 'f' | '%'))) => {
                rest.next();
                expanded.push_str(match placeholder {
                    'p' => path,
                    'f' => name,
                    _ => "%",
                });
            }
            ('%', _) if major >= STRICT_PLACEHOLDERS_MAJOR => bail!("archive_command has a `%` that is none of %p, %f and %%"),
            _ => expanded.push(c),
        }
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_what_postgresql_makes_of_them() {
        let expand = |command, major| expand(command, major, "pg_wal/X", "X");
        assert_eq!(expand("cp %p '/a/%f' # 100%%", 17).unwrap(), "cp pg_wal/X '/a/X' # 100%");
        assert_eq!(expand("date +%Y %%p 5%", 15).unwrap(), "date +%Y %p 5%");
        assert!(expand("date +%Y", 16).is_err() && expand("5%", 16).is_err());
    }

    #[test]
    fn what_is_marked_is_told_by_its_name_and_history_comes_first() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let status = directory.path().join("archive_status");
        assert_eq!(ready(directory.path()).unwrap(), Vec::<String>::new());
        fs::create_dir(&status).unwrap();
        for name in [
            "000000020000000000000005.ready",
            "000000010000000000000004.ready",
            "000000010000000000000004.00000028.backup.ready",
            "000000010000000000000005.partial.ready",
            "00000002.history.ready",
            "000000010000000000000003.done",
            "00000003.historyx.ready",
            "00000001000000000000000a.ready",
        ] {
            fs::write(status.join(name), "").unwrap();
        }
        assert_eq!(
            ready(directory.path()).unwrap(),
            [
                "00000002.history",
                "000000010000000000000004",
                "000000010000000000000004.00000028.backup",
                "000000010000000000000005.partial",
                "000000020000000000000005"
            ]
        );
        let ends = Marked::Segment { timeline: TimelineId(1), ends: Lsn(5 << 24) };
        assert_eq!(marked("000000010000000000000004", 16 << 20), Some(ends));
        assert_eq!(marked("000000010000000000000004.00000028.backup", 16 << 20), Some(ends));
        assert_eq!(marked("000000010000000000000005.partial", 16 << 20), Some(Marked::Other));
    }
}
