//! Keeps the WAL that only this member has, before a rewind takes it away, and says how much it is (P5, SAFETY row 49).
//!
//! It is copied and not linked: pg_rewind writes into files of pg_wal where they lie, and a second name would be written to with them. A copy
//! appears whole, under its number, or not at all. Nothing is ever removed here: when there is no room for one more, nothing is rewound.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::installation::Installation;
use super::layout::Layout;
use super::{files, history_files, wal};
use crate::clock::wall_clock;
use crate::facts::lost::LostWrites;
use crate::facts::postgres::LostRange;
use crate::policy::rejoin::{LastRecord, LocalWal};
use crate::types::{Lsn, TimelineId};

/// So many are kept on one host; then nothing is rewound until a person has looked.
pub const KEPT_MAX: usize = 8;
/// Together they are not more than this.
pub const KEPT_BYTES_MAX: u64 = 32 << 30;
/// What a file system that takes a copy has to have left.
const ROOM_LEFT_BYTES: u64 = 64 << 20;
/// Counting transactions is worth so long; afterwards their number is unknown.
const COUNT_LIMIT: Duration = Duration::from_secs(60);
/// Sizes of WAL segments that PostgreSQL has.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// See [`SEGMENT_BYTES_MIN`].
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Part of the lost range, on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which.
    pub timeline: TimelineId,
    /// From where.
    pub from: Lsn,
    /// To where; None = to the end of its WAL.
    pub to: Option<Lsn>,
}

/// The lost range by timelines: a member may have been promoted, once or more often, after it left the others.
pub fn pieces(wal: &LocalWal, from: Lsn) -> Vec<Piece> {
    let history = wal.history.as_ref().map(|history| history.0.as_slice()).unwrap_or_default();
    let begins = |index: usize| index.checked_sub(1).and_then(|before| history.get(before)).map_or(Lsn(0), |switch| switch.at);
    let left = history.iter().enumerate().filter(|(_, switch)| switch.at > from);
    let mut pieces: Vec<Piece> =
        left.map(|(index, switch)| Piece { timeline: switch.parent, from: from.max(begins(index)), to: Some(switch.at) }).collect();
    pieces.push(Piece { timeline: wal.timeline, from: from.max(begins(history.len())), to: None });
    pieces
}

/// What is kept on this host, oldest first. What cannot be read is left out, and logged.
pub fn list(layout: &Layout) -> Vec<LostWrites> {
    let read = |path: PathBuf| -> Result<Option<LostWrites>> {
        let Some(text) = files::read_if_there(&path.join("report.json"))? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("expected a report in {}", path.display()))
    };
    let reports = numbered(layout).unwrap_or_default().into_iter().map(|(_, path)| read(path));
    let readable = reports.filter_map(|report| {
        report.unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "what is kept of lost writes could not be read");
            None
        })
    });
    readable.collect()
}

/// Why nothing more can be kept; None when it can.
pub fn obstacle(layout: &Layout) -> Option<String> {
    let place = layout.lost_dir();
    match numbered(layout) {
        Ok(kept) if kept.len() >= KEPT_MAX => {
            Some(format!("{} keeps the WAL of {KEPT_MAX} divergences: save what is wanted, then remove them by name", place.display()))
        }
        Ok(_) => None,
        Err(error) => Some(format!("{} cannot be read: {error:#}", place.display())),
    }
}

fn numbered(layout: &Layout) -> Result<Vec<(u32, PathBuf)>> {
    let place = layout.lost_dir();
    if !files::is_there(&place)? {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&place).with_context(|| format!("reading {}", place.display()))? {
        let path = entry?.path();
        if let Some(number) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Copies the WAL of a stopped server that is past `lost.from` beside, durably, with a report. A copy that is there already is not made again.
///
/// # Errors
/// When not all of it can be kept. Then nothing was changed.
pub async fn keep(
    installation: &Installation,
    layout: &Layout,
    lock: &Arc<File>,
    wal: &LocalWal,
    lost: LostRange,
    why: &str,
) -> Result<LostWrites> {
    let LastRecord::Known(to) = wal.last_record else { bail!("the end of the WAL that would be lost cannot be read: it is not kept") };
    if let Some(kept) = list(layout).into_iter().find(|kept| (kept.timeline, kept.from, kept.to) == (lost.timeline, lost.from, to)) {
        return Ok(kept);
    }
    if let Some(obstacle) = obstacle(layout) {
        bail!(obstacle);
    }
    let pg_wal = layout.data_dir().join("pg_wal");
    let pieces = pieces(wal, lost.from);
    let wanted = segments(&pg_wal, &pieces, to)?;
    let bytes: u64 = wanted.iter().map(|(_, bytes)| bytes).sum();
    has_room(layout, bytes)?;
    let commits = match tokio::time::timeout(COUNT_LIMIT, wal::commits(installation, &pg_wal, &pieces, to)).await {
        Ok(Ok(commits)) => Some(commits),
        Ok(Err(error)) => {
            tracing::warn!(error = format!("{error:#}"), "the transactions that are lost could not be counted");
            None
        }
        Err(_) => None,
    };
    let number = numbered(layout)?.last().map_or(1, |(last, _)| last + 1);
    let place = layout.lost_dir().join(number.to_string());
    let report = LostWrites {
        at: wall_clock(),
        timeline: lost.timeline,
        from: lost.from,
        to,
        bytes: to.bytes_since(lost.from),
        transactions: commits.as_ref().map(|commits| commits.count),
        first_commit: commits.as_ref().and_then(|commits| commits.first.clone()),
        last_commit: commits.and_then(|commits| commits.last),
        kept: place.display().to_string(),
        why: why.to_owned(),
    };
    let names = wanted.into_iter().map(|(name, _)| name).collect();
    let (layout, said) = (layout.clone(), report.clone());
    holding(lock, move || copy(&layout, &pg_wal, names, &place, &said)).await?;
    Ok(report)
}

/// A thread cannot be ended: whoever is not waited for any more goes on, and the lock is held until it is through.
pub(super) async fn holding(lock: &Arc<File>, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let lock = Arc::clone(lock);
    let work = move || {
        let result = work();
        drop(lock);
        result
    };
    tokio::task::spawn_blocking(work).await.context("the copy of WAL was ended")?
}

fn copy(layout: &Layout, pg_wal: &Path, names: Vec<String>, place: &Path, report: &LostWrites) -> Result<()> {
    layout.prepare()?;
    let unfinished = layout.lost_dir().join(".unfinished");
    files::remove_directory_if_there(&unfinished).with_context(|| format!("removing {}", unfinished.display()))?;
    let into = unfinished.join("pg_wal");
    files::make_directory(&into)?;
    for name in names {
        copy_file(&pg_wal.join(&name), &into.join(&name))?;
    }
    files::sync_directory(&into)?;
    files::write_whole(&unfinished.join("report.json"), &serde_json::to_vec_pretty(report)?)?;
    fs::rename(&unfinished, place).with_context(|| format!("moving what is kept to {}", place.display()))?;
    files::sync_directory(&layout.lost_dir())
}

/// Durable when this returns.
pub(super) fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("copying {} to {}", from.display(), to.display());
    fs::copy(from, to).with_context(context)?;
    File::open(to).and_then(|file| file.sync_all()).with_context(context)
}

/// Segments and history files that hold some of it, with their sizes.
fn segments(pg_wal: &Path, pieces: &[Piece], to: Lsn) -> Result<Vec<(String, u64)>> {
    let found = wal::segments_in(pg_wal)?;
    let size = found.iter().find(|file| !file.is_partial()).map(|file| file.bytes).context("there is no WAL segment in pg_wal")?;
    ensure!(is_segment_size(size), "WAL segments in {} are of {size} bytes, which PostgreSQL does not have", pg_wal.display());
    let in_it = |segment: &wal::Segment| {
        let (begins, ends) = segment.range(size);
        pieces.iter().any(|piece| piece.timeline == segment.timeline && ends > piece.from && begins <= piece.to.unwrap_or(to))
    };
    let kept: Vec<_> = found.into_iter().filter(|file| in_it(&file.segment)).collect();
    for piece in pieces {
        let last = piece.to.map_or(to, |end| Lsn(end.0.saturating_sub(1)));
        let holds = |at: Lsn| {
            kept.iter().any(|wal::SegmentFile { segment, .. }| {
                let (begins, ends) = segment.range(size);
                segment.timeline == piece.timeline && (begins..ends).contains(&at)
            })
        };
        ensure!(
            holds(piece.from) && holds(last),
            "the WAL of timeline {} from {} to {last} is not all in pg_wal",
            piece.timeline,
            piece.from
        );
    }
    let histories = history_files::sizes(pg_wal)?;
    Ok(kept.into_iter().map(|file| (file.name, file.bytes)).chain(histories).collect())
}

/// Whether PostgreSQL has WAL segments of that size.
pub(super) fn is_segment_size(bytes: u64) -> bool {
    (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&bytes) && bytes.is_power_of_two()
}

fn has_room(layout: &Layout, bytes: u64) -> Result<()> {
    layout.prepare()?;
    let mut kept = 0_u64;
    for (_, path) in numbered(layout)? {
        for entry in fs::read_dir(path.join("pg_wal")).with_context(|| format!("reading {}", path.display()))? {
            kept += entry?.metadata()?.len();
        }
    }
    let place = layout.beside();
    ensure!(
        kept + bytes <= KEPT_BYTES_MAX,
        "{} would hold {} MB of WAL, more than {} MB: save what is wanted, then remove it by name",
        layout.lost_dir().display(),
        (kept + bytes) >> 20,
        KEPT_BYTES_MAX >> 20
    );
    let free = nix::sys::statvfs::statvfs(place).with_context(|| format!("asking for the room in {}", place.display()))?;
    let free_bytes = free.blocks_available().saturating_mul(free.fragment_size());
    ensure!(
        bytes.saturating_add(ROOM_LEFT_BYTES) <= free_bytes,
        "{} has no room for {} MB of WAL that would be lost: make room, or it is not rewound",
        place.display(),
        bytes >> 20
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::rejoin::{Switch, TimelineHistory};

    const MB_16: usize = 16 << 20;

    fn wal_of(timeline: u32, switches: &[(u32, u64)]) -> LocalWal {
        let switches = switches.iter().map(|(id, at)| Switch { parent: TimelineId(*id), at: Lsn(*at), reason: String::new() });
        LocalWal {
            timeline: TimelineId(timeline),
            history: Some(TimelineHistory(switches.collect())),
            last_record: LastRecord::Known(Lsn(0x590_0000)),
        }
    }

    #[test]
    fn what_is_lost_lies_on_every_timeline_since_the_fork() {
        let piece = |timeline, from, to: Option<u64>| Piece { timeline: TimelineId(timeline), from: Lsn(from), to: to.map(Lsn) };
        assert_eq!(pieces(&wal_of(1, &[]), Lsn(0x500)), [piece(1, 0x500, None)]);
        assert_eq!(pieces(&wal_of(3, &[(1, 0x300), (2, 0x700)]), Lsn(0x500)), [piece(2, 0x500, Some(0x700)), piece(3, 0x700, None)]);
        assert_eq!(pieces(&wal_of(3, &[(1, 0x300), (2, 0x700)]), Lsn(0x700)), [piece(3, 0x700, None)]);
    }

    #[tokio::test]
    async fn a_copy_that_nobody_waits_for_any_more_keeps_the_lock_until_it_is_through() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let open = || File::options().create(true).truncate(false).write(true).open(directory.path().join("lock")).unwrap();
        let lock = Arc::new(open());
        lock.try_lock().unwrap();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let mut copy = Box::pin(async move { holding(&lock, move || ended.recv().map_err(Into::into)).await });
        tokio::select! {
            biased;
            ended = &mut copy => panic!("{ended:?}"),
            () = std::future::ready(()) => {}
        }
        drop(copy);
        assert!(open().try_lock().is_err(), "the next job has to wait");
        end.send(()).unwrap();
        open().lock().unwrap();
    }

    #[test]
    fn only_segments_that_hold_some_of_it_are_kept_and_all_of_those() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let put = |name: &str, bytes: usize| fs::write(directory.path().join(name), vec![0; bytes]).unwrap();
        for name in ["000000010000000000000004", "000000010000000000000005", "000000010000000000000006", "000000020000000000000005"] {
            put(name, MB_16);
        }
        put("00000002.history", 10);
        let of = |timeline, from| [Piece { timeline: TimelineId(timeline), from: Lsn(from), to: None }];
        let mut names: Vec<String> =
            segments(directory.path(), &of(1, 0x500_0028), Lsn(0x590_0000)).unwrap().into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert_eq!(names, ["000000010000000000000005", "00000002.history"], "the next one is preallocated, and holds nothing yet");
        let missing = segments(directory.path(), &of(1, 0x300_0028), Lsn(0x590_0000)).unwrap_err().to_string();
        assert!(missing.contains("not all in pg_wal"), "{missing}");
        assert!(segments(directory.path(), &of(2, 0x500_0028), Lsn(0x600_0000)).is_err(), "its end is missing");
    }
}
