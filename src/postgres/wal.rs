//! Where a stopped server's WAL ends: its newest timeline, and where its last record starts, read by pg_waldump from the latest
//! checkpoint on.
//!
//! pg_waldump ends with an error at the end of WAL, by design; its message is not read. What counts is the last record it printed, and
//! only if the checkpoint record itself was among them: otherwise the end is unknown.

use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::history_files;
use super::installation::Installation;
use super::lost::Piece;
use super::program::{Program, is_executable};
use crate::facts::postgres::ControlFacts;
use crate::policy::rejoin::{LastRecord, LocalWal};
use crate::types::{Lsn, TimelineId};

/// How long reading the WAL since the last checkpoint may take: about a gigabyte a minute on a slow disk, and max_wal_size is 1 GB by
/// default.
pub const WAL_LIMIT: Duration = Duration::from_secs(120);

/// The end of the WAL of a stopped server. Never fails: what could not be read is said to be unknown.
pub async fn end_of_wal(installation: &Installation, data_dir: &Path, control: &ControlFacts, limit: Duration) -> LocalWal {
    let newest = newest_segment_timeline(data_dir);
    let control_timeline = control.timeline.max(control.min_recovery_timeline);
    let timeline = newest.as_ref().copied().unwrap_or(control_timeline).max(control_timeline);
    let history = history_files::read(data_dir, timeline).unwrap_or_else(|error| {
        tracing::warn!("the history of timeline {timeline} could not be read: {error:#}");
        None
    });
    let last_record = match newest {
        Ok(_) => last_record(installation, data_dir, control, timeline, limit)
            .await
            .map_or_else(|error| LastRecord::Unknown(format!("{error:#}")), LastRecord::Known),
        Err(error) => LastRecord::Unknown(format!("{error:#}")),
    };
    LocalWal { timeline, history, last_record }
}

/// The newest timeline that a segment in pg_wal belongs to: a segment is made with the first byte that is received or written.
fn newest_segment_timeline(data_dir: &Path) -> Result<TimelineId> {
    let whole = segments_in(&data_dir.join("pg_wal"))?.into_iter().filter(|file| !file.is_partial());
    Ok(whole.map(|file| file.segment.timeline).max().unwrap_or_default())
}

/// Reads on from the checkpoint; where the WAL goes over to a newer timeline, from the switch point on in that one.
async fn last_record(
    installation: &Installation,
    data_dir: &Path,
    control: &ControlFacts,
    newest: TimelineId,
    limit: Duration,
) -> Result<Lsn> {
    let mut start = control.checkpoint;
    let history = history_files::read(data_dir, newest)?.unwrap_or_default();
    if newest > control.timeline {
        // The switch at which `newest` began: its records start there. Before it all is shared with its ancestors.
        let switch = history.0.last().with_context(|| format!("{} is missing", newest.history_file_name()))?;
        ensure!(
            history.left_at(control.timeline).is_some(),
            "timeline {newest} is no descendant of the checkpoint's timeline {}",
            control.timeline
        );
        if switch.at > start {
            start = switch.at;
            return match read_on(installation, data_dir, newest, start, limit).await? {
                Some(last) => Ok(last),
                // Nothing of the new timeline arrived: all there is starts before the switch.
                None => Ok(Lsn(start.0.saturating_sub(1))),
            };
        }
    }
    read_on(installation, data_dir, newest, start, limit)
        .await?
        .with_context(|| format!("no record could be read at the checkpoint {start}"))
}

/// Start of the last record that pg_waldump prints from `start` on; None when it prints none.
async fn read_on(installation: &Installation, data_dir: &Path, timeline: TimelineId, start: Lsn, limit: Duration) -> Result<Option<Lsn>> {
    let piece = Piece { timeline, from: start, to: None };
    Ok(dump_within(installation, &data_dir.join("pg_wal"), piece, limit).await?.last)
}

/// Whether every record from the first one in a piece up to its end can be read. A piece without a record cannot.
pub async fn reads_through(installation: &Installation, pg_wal: &Path, piece: Piece) -> Result<bool> {
    let dumped = dump_within(installation, pg_wal, piece, WAL_LIMIT).await?;
    Ok(dumped.to_the_end && dumped.last.is_some())
}

async fn dump_within(installation: &Installation, pg_wal: &Path, piece: Piece, limit: Duration) -> Result<Dumped> {
    tokio::time::timeout(limit, dump(installation, pg_wal, piece, |_| {}))
        .await
        .with_context(|| format!("pg_waldump did not end within {} s", limit.as_secs()))?
}

/// What pg_waldump printed.
struct Dumped {
    /// Start of the last record; None when there was none.
    last: Option<Lsn>,
    /// It came to the end that it was told. Where the WAL ends before that, it ends with an error.
    to_the_end: bool,
}

/// Hands every record that pg_waldump prints to `each`.
async fn dump(installation: &Installation, pg_wal: &Path, piece: Piece, mut each: impl FnMut(&str)) -> Result<Dumped> {
    let pg_waldump = installation.program("pg_waldump");
    ensure!(is_executable(&pg_waldump), "there is no {}", pg_waldump.display());
    let mut program = Program::new(pg_waldump)
        .arg("-p")
        .arg(pg_wal)
        .arg("-t")
        .arg(piece.timeline.to_string())
        .arg("-s")
        .arg(piece.from.to_string())
        .env("TZ", "UTC");
    if let Some(to) = piece.to {
        program = program.arg("-e").arg(to.to_string());
    }
    if let Some((first, last)) = files_of(pg_wal, piece)? {
        program = program.arg(first).arg(last);
    }
    let mut running = program.spawn()?;
    let stdout = running.child.stdout.take().context("standard output was not piped")?;
    // It says one line at the end; closing the pipe instead of reading it would end it early.
    let stderr = running.child.stderr.take().context("standard error was not piped")?;
    let mut lines = BufReader::new(stdout).split(b'\n');
    let mut last = None;
    while let Some(line) = lines.next_segment().await? {
        let line = String::from_utf8_lossy(&line);
        // Other lines: "first record is after …", and texts of users that hold a line break.
        if line.starts_with("rmgr: ") {
            last = Some(record_start(&line).with_context(|| format!("pg_waldump printed `{line}`"))?);
            each(&line);
        }
    }
    let status = running.wait().await?;
    if status.code().is_none() {
        bail!("pg_waldump was ended by a signal");
    }
    drop(stderr);
    Ok(Dumped { last, to_the_end: status.success() })
}

/// The files that a piece begins and ends in. Without them pg_waldump takes the size of a segment from the header of whichever file the directory
/// names first; that may be one which PostgreSQL has made ahead, and then it is all zeros and an error. None = the first one is not there.
fn files_of(pg_wal: &Path, piece: Piece) -> Result<Option<(String, String)>> {
    let whole = segments_in(pg_wal)?.into_iter().filter(|file| file.segment.timeline == piece.timeline && !file.is_partial());
    let mut files: Vec<_> = whole
        .map(|file| {
            let (begins, ends) = file.segment.range(file.bytes);
            (begins, ends, file.name)
        })
        .collect();
    files.sort();
    let first = files.iter().position(|(begins, ends, _)| (*begins..*ends).contains(&piece.from));
    let last = files.iter().rposition(|(begins, ..)| piece.to.is_none_or(|to| *begins < to));
    Ok(first.zip(last).filter(|(first, last)| first <= last).map(|(first, last)| (files[first].2.clone(), files[last].2.clone())))
}

/// Committed transactions in a stretch of WAL.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Commits {
    /// How many.
    pub count: u64,
    /// When the first one was, in UTC by that server's clock.
    pub first: Option<String>,
    /// When the last one was.
    pub last: Option<String>,
}

/// Counts them, up to the record that starts at `last_record`.
///
/// # Errors
/// When not all of it could be read: a part is not a number.
pub async fn commits(installation: &Installation, pg_wal: &Path, pieces: &[Piece], last_record: Lsn) -> Result<Commits> {
    let mut commits = Commits::default();
    let mut reached = None;
    for piece in pieces {
        let dumped = dump(installation, pg_wal, *piece, |line| {
            if let Some(at) = commit_time(line) {
                commits.count += 1;
                commits.first.get_or_insert_with(|| at.clone());
                commits.last = Some(at);
            }
        })
        .await?;
        reached = dumped.last.or(reached);
    }
    ensure!(reached.is_some_and(|reached| reached >= last_record), "its WAL could be read to {reached:?} and not to {last_record}");
    Ok(commits)
}

/// `… tx: 730, lsn: 0/1, prev 0/0, desc: COMMIT 2026-11-26 04:20:22.123456 UTC; …` -> `2026-11-26T04:20:22.123456Z`. None = no commit.
fn commit_time(line: &str) -> Option<String> {
    let (_, what) = line.strip_prefix("rmgr: Transaction ")?.split_once(" desc: ")?;
    let mut words = what.strip_prefix("COMMIT_PREPARED ").or_else(|| what.strip_prefix("COMMIT "))?.split([' ', ';']);
    // A prepared one is named first.
    let date = words.next().filter(|word| !word.ends_with(':')).or_else(|| words.next())?;
    Some(format!("{date}T{}Z", words.next()?))
}

/// A WAL segment by its file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its timeline.
    pub timeline: TimelineId,
    high: u64,
    low: u64,
}

impl Segment {
    /// Where it begins, and where the next one does.
    pub fn range(&self, segment_bytes: u64) -> (Lsn, Lsn) {
        let begins = (self.high << 32) + self.low * segment_bytes;
        (Lsn(begins), Lsn(begins + segment_bytes))
    }
}

/// A file of pg_wal that is a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentFile {
    /// Its name.
    pub name: String,
    /// Which segment, also as `.partial`.
    pub segment: Segment,
    /// Its size.
    pub bytes: u64,
}

impl SegmentFile {
    /// It was ended by a promotion.
    pub fn is_partial(&self) -> bool {
        self.name.ends_with(".partial")
    }
}

/// The segments that are in a directory, in no order.
pub fn segments_in(pg_wal: &Path) -> Result<Vec<SegmentFile>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(pg_wal).with_context(|| format!("reading {}", pg_wal.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(segment) = segment_of(&name) {
            let bytes = match entry.metadata() {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                metadata => metadata.with_context(|| format!("looking at {}", entry.path().display()))?.len(),
            };
            found.push(SegmentFile { name, segment, bytes });
        }
    }
    Ok(found)
}

/// The segment that a file of pg_wal is, also as `.partial`.
pub fn segment_of(name: &str) -> Option<Segment> {
    let digits = name.strip_suffix(".partial").unwrap_or(name);
    if digits.len() != 24 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let part = |range: std::ops::Range<usize>| u32::from_str_radix(digits.get(range)?, 16).ok();
    Some(Segment { timeline: TimelineId(part(0..8)?), high: part(8..16)?.into(), low: part(16..24)?.into() })
}

/// Where `xlp_pageaddr` is in a page's header (XLogPageHeaderData).
const PAGE_ADDRESS_AT_BYTES: u64 = 8;

/// Whether a segment's first page was written as what its name says: one that was made ahead is all zeros, or has what it was before.
pub fn is_begun(pg_wal: &Path, file: &SegmentFile) -> Result<bool> {
    let path = pg_wal.join(&file.name);
    let mut address = [0; 8];
    if file.bytes < PAGE_ADDRESS_AT_BYTES + address.len() as u64 {
        return Ok(false);
    }
    match std::fs::File::open(&path).and_then(|opened| opened.read_exact_at(&mut address, PAGE_ADDRESS_AT_BYTES)) {
        // Of a server that runs: it is another one by now.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        read => read.with_context(|| format!("reading {}", path.display()))?,
    }
    Ok(Lsn(u64::from_ne_bytes(address)) == file.segment.range(file.bytes).0)
}

/// `rmgr: XLOG len (rec/tot): 114/114, tx: 0, lsn: 0/01500718, prev 0/015006E0, desc: …` -> 0/1500718.
fn record_start(line: &str) -> Option<Lsn> {
    let (_, rest) = line.split_once(" lsn: ")?;
    rest.split_once(',')?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_starts_where_pg_waldump_says() {
        let line = "rmgr: XLOG        len (rec/tot):    114/   114, tx:          0, lsn: 0/01500718, prev 0/015006E0, desc: CHECKPOINT_SHUTDOWN redo 0/1500718; lsn: 9/9, x";
        assert_eq!(record_start(line), Some(Lsn(0x150_0718)));
        assert_eq!(record_start("pg_waldump: first record is after 0/1"), None);
    }

    #[test]
    fn a_commit_is_told_by_its_record_and_by_nothing_that_a_user_wrote() {
        let line =
            |rmgr: &str, desc: &str| format!("rmgr: {rmgr} len (rec/tot): 34/ 34, tx: 730, lsn: 0/01500718, prev 0/015006E0, desc: {desc}");
        let time = "2026-11-26 04:20:22.123456 UTC";
        let read = Some("2026-11-26T04:20:22.123456Z".to_owned());
        assert_eq!(commit_time(&line("Transaction", &format!("COMMIT {time}"))), read);
        assert_eq!(commit_time(&line("Transaction", &format!("COMMIT {time}; inval msgs: catcache 21"))), read);
        assert_eq!(commit_time(&line("Transaction", &format!("COMMIT_PREPARED 731: {time}"))), read);
        assert_eq!(commit_time(&line("Transaction", &format!("ABORT {time}"))), None);
        assert_eq!(commit_time(&line("LogicalMessage", "COMMIT 1 2")), None);
    }

    #[test]
    fn a_segments_name_is_its_place() {
        let segment = segment_of("0000000200000001000000FF").unwrap();
        assert_eq!((segment.timeline, segment.range(16 << 20)), (TimelineId(2), (Lsn(0x1_FF00_0000), Lsn(0x2_0000_0000))));
        assert_eq!(segment_of("0000000200000001000000FF.partial"), Some(segment));
        for other in ["00000002.history", "0000000200000001000000F", "archive_status", "0000000200000001000000FG"] {
            assert_eq!(segment_of(other), None, "{other}");
        }
    }

    #[test]
    fn pg_waldump_is_told_the_files_so_that_it_looks_into_none_that_was_made_ahead() {
        let place = tempfile::tempdir().unwrap();
        for name in [
            "000000010000000000000003",
            "000000020000000000000003",
            "000000020000000000000004",
            "000000020000000000000005",
            "00000002.history",
        ] {
            std::fs::File::create(place.path().join(name)).unwrap().set_len(16 << 20).unwrap();
        }
        let files = |from, to| files_of(place.path(), Piece { timeline: TimelineId(2), from: Lsn(from), to }).unwrap();
        let named = |first: &str, last: &str| Some((format!("0000000200000000000000{first}"), format!("0000000200000000000000{last}")));
        assert_eq!(files(0x300_0028, None), named("03", "05"));
        assert_eq!(files(0x400_0000, None), named("04", "05"));
        assert_eq!(files(0x300_0028, Some(Lsn(0x400_0000))), named("03", "03"));
        assert_eq!(files(0x300_0028, Some(Lsn(0x400_0028))), named("03", "04"));
        assert_eq!(files(0x200_0028, None), None, "its first file is not there");
    }
}
