//! Archives the WAL that a primary's archiver did not get to, as PostgreSQL would, and puts beside what cannot be archived in a moment.
//!
//! Why it may not stay where it is: the standby that this server becomes renames such segments and writes over them, whatever is marked in
//! archive_status, so a second name for one is no protection; nor can the standby be told to keep them without keeping all. So it is copied,
//! which needs room and nothing else, and changes nothing for PostgreSQL. The mark goes with the file: `.ready` becomes `.done` once it is
//! archived, or once its copy is on disk. From then on pgherd alone archives it, or an archive_command that refuses a name that is
//! there would stop the archiver of a later primary.
//!
//! Like PostgreSQL's archiver this may archive a file twice: when it is ended between the command and the mark. A complete segment without any
//! mark is to be archived, too: PostgreSQL makes the mark without syncing it (XLogArchiveNotify), so that a loss of power takes the marks of the
//! last seconds and not the segments; a primary makes up for that at its checkpoints (XLogArchiveCheckDone), a standby does not.
//!
//! What surprises: the lock of [`super::rewind`] is the standard input of the command and named in its environment, for what outlives its
//! daemon, or a command that it was started by, must not read a segment that PostgreSQL, started since, is writing over. And what is beside has
//! an `archive_status` there, as in pg_wal: a command may archive ahead, in the background, what is marked (pgBackRest, WAL-G).

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::layout::Layout;
use super::program::Program;
use super::{files, lost, rewind, wal};
use crate::facts::archiving::{Archived, Unarchived};
use crate::facts::postgres::{ControlFacts, DatabaseState};
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

/// Mode bits of a data directory that its group may read: initdb's `--allow-group-access`.
const GROUP_MAY_READ_MODE: u32 = 0o050;
/// Where the marks are, within pg_wal.
const STATUS: &str = "archive_status";

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
    let status = pg_wal.join(STATUS);
    if !files::is_there(&status)? {
        return Ok(Vec::new());
    }
    in_order(&status, |name| name.strip_suffix(".ready").map(str::to_owned))
}

/// What is to be archived of a stopped server: what is marked as ready, and what a loss of power took the mark of.
pub fn left(pg_wal: &Path, control: &ControlFacts) -> Result<Vec<String>> {
    let mut left = ready(pg_wal)?;
    // A data directory whose WAL is gone or cannot be read is seen for what it is all the same: a copy is to take its place.
    left.extend(unmarked(pg_wal, control).unwrap_or_else(|error| {
        tracing::warn!(error = format!("{error:#}"), "WAL that is to be archived and is not marked so could not be looked for");
        Vec::new()
    }));
    Ok(left)
}

/// Complete segments of the timeline that a primary wrote on last, without any mark. The one before the newest that was begun is complete, and
/// was made durable when that one was begun.
fn unmarked(pg_wal: &Path, control: &ControlFacts) -> Result<Vec<String>> {
    let in_recovery = matches!(control.state, DatabaseState::InArchiveRecovery | DatabaseState::ShutDownInRecovery);
    if in_recovery || control.backup_label {
        return Ok(Vec::new());
    }
    // Until its first checkpoint after a promotion the control file has the timeline before.
    let timeline = control.promoted.map_or(control.timeline, |(promoted, _)| promoted.max(control.timeline));
    let mut segments: Vec<wal::SegmentFile> = wal::segments_in(pg_wal)?;
    segments.retain(|file| file.segment.timeline == timeline && !file.is_partial() && lost::is_segment_size(file.bytes));
    segments.sort_by_key(|file| file.segment.range(file.bytes));
    let (mut without, mut before) = (Vec::new(), None);
    for file in segments {
        let has = |kind| files::is_there(&mark(pg_wal, &file.name, kind));
        let is_marked = has("ready")? || has("done")?;
        // What follows the newest one was made ahead.
        if !is_marked && !wal::is_begun(pg_wal, &file)? {
            break;
        }
        without.extend(before.replace((!is_marked).then_some(file.name)).flatten());
    }
    Ok(without)
}

/// Marks as ready what lost its mark, durably. Before the server is a standby: its control file does not say any more then that it was a primary.
pub fn mark_left(pg_wal: &Path, control: &ControlFacts) -> Result<()> {
    for name in unmarked(pg_wal, control)? {
        let path = mark(pg_wal, &name, "ready");
        files::write_whole(&path, b"").with_context(|| format!("marking {name} as to be archived"))?;
    }
    Ok(())
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

/// Sees to everything that is to be archived, PostgreSQL stopped: archived if the leader has it too, up to `shared`, or put beside.
///
/// # Errors
/// When some of it is neither. That is marked as before.
pub async fn archive_left(
    layout: &Layout,
    control: &ControlFacts,
    archiver: &Archiver,
    leader: &LeaderLineage,
    shared: Option<Lsn>,
) -> Result<Archived> {
    let lock = Arc::new(rewind::lock(layout).await?);
    let pg_wal = layout.data_dir().join("pg_wal");
    // What is marked is seen to all the same.
    let all_marked = mark_left(&pg_wal, control);
    let ours = take_marks(layout, &pg_wal, leader, shared)?;
    let until = Instant::now() + PASS_LIMIT;
    let (mut archived, mut why, mut left) = (0, None, Vec::new());
    for name in ours {
        if why.is_some() {
            left.push(name);
            continue;
        }
        let path = Path::new("pg_wal").join(&name);
        let limit = COMMAND_LIMIT.min(until.saturating_duration_since(Instant::now()));
        match archiver.archive(layout, &path, &name, limit, Some(&lock)).await {
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
    if let Some(why) = &why {
        let (layout, left) = (layout.clone(), left.clone());
        lost::holding(&lock, move || put_beside(&layout, &pg_wal, &left)).await.with_context(|| why.clone())?;
    }
    all_marked.context("looking for WAL that is to be archived and lost its mark")?;
    Ok(Archived { files: archived, beside: beside(layout)?, why })
}

/// What is to be archived from here. Everything else loses its mark before the first command is run, which may look for what is marked.
fn take_marks(layout: &Layout, pg_wal: &Path, leader: &LeaderLineage, shared: Option<Lsn>) -> Result<Vec<String>> {
    let place = layout.unarchived_dir();
    let put = put(&place)?;
    if !put.is_empty() {
        files::sync_directory(&place)?;
    }
    let segment_bytes = wal::segments_in(pg_wal)?.iter().map(|file| file.bytes).max().unwrap_or(0);
    let mut ours = Vec::new();
    for name in ready(pg_wal)? {
        let belongs = marked(&name, segment_bytes).is_some_and(|marked| belongs(marked, leader, shared));
        if !files::is_there(&pg_wal.join(&name))? {
            // As PostgreSQL does with a mark whose file is gone.
            files::remove_file_if_there(&mark(pg_wal, &name, "ready")).context("removing the mark of a file that is gone")?;
        } else if !belongs || put.contains(&name) {
            // One that is beside was put there by an attempt that did not get to the mark; it is archived from there.
            done(pg_wal, &name)?;
        } else {
            ours.push(name);
        }
    }
    Ok(ours)
}

/// Archives what is beside, until one cannot be.
pub async fn archive_beside(layout: &Layout, archiver: &Archiver) -> Result<Archived> {
    let place = layout.unarchived_dir();
    let (mut archived, mut why) = (0, None);
    let names = put(&place)?;
    mark_beside(&place, &names)?;
    for name in names {
        let path = place.join(&name);
        if let Err(error) = archiver.archive(layout, &path, &name, BESIDE_COMMAND_LIMIT, None).await {
            why = Some(format!("{error:#}"));
            break;
        }
        files::remove_file_if_there(&path).with_context(|| format!("removing {}, which is archived", path.display()))?;
        files::remove_file_if_there(&mark(&place, &name, "ready")).context("removing the mark of a file that is archived")?;
        archived += 1;
    }
    if archived > 0 {
        files::sync_directory(&place)?;
    }
    if why.is_none() {
        mark_beside(&place, &[])?;
    }
    Ok(Archived { files: archived, beside: beside(layout)?, why })
}

/// For the commands alone: made anew each time, since a person may have removed files.
fn mark_beside(place: &Path, names: &[String]) -> Result<()> {
    let status = place.join(STATUS);
    files::remove_directory_if_there(&status).with_context(|| format!("removing {}", status.display()))?;
    if names.is_empty() {
        return Ok(());
    }
    files::make_directory(&status)?;
    for name in names {
        let path = mark(place, name, "ready");
        fs::write(&path, "").with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// After a rewind, which came with the marks of the leader's files: what is here is the leader's to archive.
pub(super) fn forget(pg_wal: &Path) -> Result<()> {
    ready(pg_wal)?.iter().try_for_each(|name| done(pg_wal, name))
}

fn mark(pg_wal: &Path, name: &str, mark: &str) -> PathBuf {
    pg_wal.join(STATUS).join(format!("{name}.{mark}"))
}

/// PostgreSQL never archives it from here on. Some commands set the mark themselves.
fn done(pg_wal: &Path, name: &str) -> Result<()> {
    let done = mark(pg_wal, name, "done");
    match fs::rename(mark(pg_wal, name, "ready"), &done) {
        Err(error) if error.kind() == ErrorKind::NotFound && files::is_there(&done)? => {}
        renamed => renamed.with_context(|| format!("marking {name} as archived"))?,
    }
    files::sync_directory(&pg_wal.join(STATUS))
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
    async fn archive(&self, layout: &Layout, path: &Path, name: &str, limit: Duration, lock: Option<&Arc<fs::File>>) -> Result<()> {
        let (command, major) = match self {
            Archiver::Command(command, major) => (command, *major),
            Archiver::Nobody(why) => bail!(why.clone()),
        };
        ensure!(!limit.is_zero(), "there is more to archive than fits into {} s", PASS_LIMIT.as_secs());
        let command = expand(command, major, &path.to_string_lossy(), name)?;
        let mode = fs::metadata(layout.data_dir()).with_context(|| format!("looking at {}", layout.data_dir().display()))?.mode();
        // As the postmaster sets it (SetDataDirectoryCreatePerm).
        let umask = if mode & GROUP_MAY_READ_MODE == GROUP_MAY_READ_MODE { "027" } else { "077" };
        let mut shell = Program::new("/bin/sh").arg("-c").arg(format!("umask {umask}\n{command}")).current_dir(layout.data_dir());
        if let Some(lock) = lock {
            shell = shell.stdin(Arc::clone(lock)).env(rewind::LOCK_VARIABLE, rewind::lock_file(layout));
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
    use crate::machine::tests::fixtures::control;
    use crate::types::Epoch;

    #[test]
    fn placeholders_are_what_postgresql_makes_of_them() {
        let expand = |command, major| expand(command, major, "pg_wal/X", "X");
        assert_eq!(expand("cp %p '/a/%f' # 100%%", 17).unwrap(), "cp pg_wal/X '/a/X' # 100%");
        assert_eq!(expand("date +%Y %%p 5%", 15).unwrap(), "date +%Y %p 5%");
        assert!(expand("date +%Y", 16).is_err() && expand("5%", 16).is_err());
    }

    #[test]
    fn only_a_complete_segment_of_what_was_a_primary_is_one_that_lost_its_mark() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let pg_wal = directory.path();
        fs::create_dir(pg_wal.join(STATUS)).unwrap();
        let name = |timeline: u32, number: u64| format!("{timeline:08X}{:08X}{number:08X}", 0);
        let segment = |timeline, number: u64, address: u64| {
            let mut content = vec![0; 1 << 20];
            content[8..16].copy_from_slice(&(address << 20).to_ne_bytes());
            fs::write(pg_wal.join(name(timeline, number)), content).unwrap();
        };
        // 3 and 5 are complete, 6 is being written, 7 and 8 are made ahead, of an old one and of zeros.
        (3..=6).for_each(|number| segment(2, number, number));
        segment(2, 7, 1);
        segment(2, 8, 0);
        segment(1, 3, 3);
        fs::write(pg_wal.join(STATUS).join(format!("{}.done", name(2, 4))), "").unwrap();
        let control = ControlFacts { promoted: Some((TimelineId(2), Epoch(7))), ..control(DatabaseState::InProduction, 1, 0) };
        let lost = |control: &ControlFacts| unmarked(pg_wal, control).unwrap();
        assert_eq!(lost(&control), [name(2, 3), name(2, 5)]);
        for control in [
            ControlFacts { state: DatabaseState::InArchiveRecovery, ..control.clone() },
            ControlFacts { backup_label: true, ..control.clone() },
        ] {
            assert_eq!(lost(&control), Vec::<String>::new(), "a standby's are another's to archive");
        }
        assert_eq!(
            left(&pg_wal.join("gone"), &control).unwrap(),
            Vec::<String>::new(),
            "what has no WAL is looked at all the same, to be copied"
        );
        mark_left(pg_wal, &control).unwrap();
        assert_eq!((ready(pg_wal).unwrap(), lost(&control)), (vec![name(2, 3), name(2, 5)], Vec::new()));
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
