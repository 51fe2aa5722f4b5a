//! Completes the WAL segment that a timeline begins in, where only its beginning was received, before a standby is started on it.
//!
//! A timeline mostly begins in the middle of a segment. Its file of that segment begins with what the timeline before has up to the switch; a
//! primary copies that at its promotion (XLogFileCopy), a standby receives it from the segment's beginning on (RequestXLogStreaming), into a
//! file that is zeros otherwise. A standby that is stopped meanwhile is left with a file that ends before the switch. PostgreSQL then reads
//! this one and not the older timeline's, which is whole (XLogFileReadAnyTLI: the newest first); where it ends, the WAL belongs to the older
//! timeline by the history, it does not go back to that, and startup ends: "according to history file, WAL location … belongs to timeline 1,
//! but previous recovered WAL file came from timeline 2". At every start, for good [measured on 15 and 17].
//!
//! What is done: the beginning is filled up from the older timeline's file, as the primary's own was. **Nothing is lost by it** (P2, P5, I5),
//! whoever counts on what this member has: a byte is written only where there is a zero, in front of the switch, and the older file stays.
//! What the member has of the new timeline, and told anybody of, is behind the switch and is not touched. Removing the file would be as
//! good where it ends before the switch, and would lose what was flushed where a loss of power left a hole in it. It is done only when
//!
//! - pg_waldump cannot read the newer file up to the switch, and can read the older one;
//! - every byte in front of the switch is the older file's or zero: another byte would be another history, which is not this page's to judge.
//!
//! A file appears whole under its name or not at all, and is on disk before PostgreSQL is started. It needs no leader: also a member that
//! nobody leads has to start, to be asked how far it is. What cannot be completed is told with its reason; after some starts in vain the
//! member is copied ([`crate::policy::rejoin::unless_it_does_not_start`]). Where the older file is not there at all, as with any former primary,
//! the newer one is read only when starts have been in vain: reading a segment takes longer than comparing it.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::installation::Installation;
use super::lost::{Piece, is_segment_size};
use super::wal::{self, SegmentFile};
use super::{files, history_files};
use crate::facts::postgres::HalfSegment;
use crate::policy::timelines::Switch;
use crate::types::{Lsn, TimelineId};

/// Read at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// Of this name PostgreSQL removes what is left over, when it starts (RemoveTempXlogFiles).
const TEMPORARY: &str = "xlogtemp.pgherd";

/// What is not whole, without changing anything. For a member that does not start: a segment without an older timeline's file, as many members
/// have it, is read too.
///
/// # Errors
/// When something could not be read.
pub async fn look(installation: &Installation, data_dir: &Path) -> Result<Vec<HalfSegment>> {
    each(installation, data_dir, None).await
}

/// Completes what can be completed; tells what was done, and what could not be. The server is stopped.
///
/// # Errors
/// When something could not be read or written. Then that file is as it was.
pub async fn complete(installation: &Installation, data_dir: &Path) -> Result<Vec<HalfSegment>> {
    each(installation, data_dir, Some(fill)).await
}

/// Oldest timeline first: several may begin in one segment, and each one's beginning is the one's before.
async fn each(installation: &Installation, data_dir: &Path, fill: Option<fn(&Beginning) -> Result<()>>) -> Result<Vec<HalfSegment>> {
    let pg_wal = data_dir.join("pg_wal");
    let segments: Vec<SegmentFile> = wal::segments_in(&pg_wal)?.into_iter().filter(|file| !file.is_partial()).collect();
    let mut found = Vec::new();
    for timeline in history_files::all(data_dir)?.into_keys() {
        let history = history_files::read(data_dir, timeline)?.unwrap_or_default();
        let Some(beginning) = history.0.last().and_then(|switch| Beginning::of(&pg_wal, &segments, timeline, switch)) else { continue };
        if !beginning.older_is_there && fill.is_some() {
            continue;
        }
        let Some(half) = beginning.judge(installation, &pg_wal).await? else { continue };
        if let (None, Some(fill)) = (&half.obstacle, fill) {
            fill(&beginning)?;
        }
        found.push(half);
    }
    Ok(found)
}

/// The files of the segment that a timeline begins in, of it and of the one that it left.
struct Beginning {
    timeline: TimelineId,
    parent: TimelineId,
    begins: Lsn,
    switch: Lsn,
    newer: PathBuf,
    older: PathBuf,
    older_is_there: bool,
}

impl Beginning {
    /// None = there is nothing to complete.
    fn of(pg_wal: &Path, segments: &[SegmentFile], timeline: TimelineId, switch: &Switch) -> Option<Beginning> {
        let holds = |file: &&SegmentFile| {
            let (begins, ends) = file.segment.range(file.bytes);
            file.segment.timeline == timeline && is_segment_size(file.bytes) && begins < switch.at && switch.at < ends
        };
        let newer = segments.iter().find(holds)?;
        let (begins, _) = newer.segment.range(newer.bytes);
        // The same name but for the timeline in front.
        let older = format!("{:08X}{}", switch.parent.0, newer.name.get(8..)?);
        Some(Beginning {
            timeline,
            parent: switch.parent,
            begins,
            switch: switch.at,
            newer: pg_wal.join(&newer.name),
            older_is_there: segments.iter().any(|file| file.name == older && file.bytes == newer.bytes),
            older: pg_wal.join(older),
        })
    }

    /// None = it is whole, or PostgreSQL can read it up to the switch.
    async fn judge(&self, installation: &Installation, pg_wal: &Path) -> Result<Option<HalfSegment>> {
        let bytes = self.switch.bytes_since(self.begins);
        let open = |path: &Path| File::open(path).map(BufReader::new).with_context(|| format!("reading {}", path.display()));
        let differ = match self.older_is_there {
            true => compare(open(&self.newer)?, open(&self.older)?, bytes).with_context(|| format!("reading {}", self.newer.display()))?,
            false => Differ { missing: Some(0), another: None },
        };
        let Some(first) = differ.missing.or(differ.another) else { return Ok(None) };
        let readable = async |timeline| {
            let piece = Piece { timeline, from: self.begins, to: Some(self.switch) };
            wal::reads_through(installation, pg_wal, piece).await
        };
        if readable(self.timeline).await? {
            return Ok(None);
        }
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let older = name(&self.older);
        let obstacle = if !self.older_is_there {
            Some(format!("{older} is not there"))
        } else if let Some(at) = differ.another {
            Some(format!("at {} it has something else than {older}", Lsn(self.begins.0 + at)))
        } else if !readable(self.parent).await? {
            Some(format!("{older} cannot be read up to there either"))
        } else {
            None
        };
        let missing = Lsn(self.begins.0 + first);
        Ok(Some(HalfSegment { file: name(&self.newer), timeline: self.timeline, missing, switch: self.switch, older, obstacle }))
    }
}

/// Where two files differ in their first bytes, as offsets.
#[derive(Debug, Default, PartialEq, Eq)]
struct Differ {
    /// The first byte that only the older one has: the newer one has a zero.
    missing: Option<u64>,
    /// The first byte that is another one.
    another: Option<u64>,
}

fn compare(newer: impl Read, older: impl Read, bytes: u64) -> io::Result<Differ> {
    let (mut newer, mut older) = (newer.take(bytes), older.take(bytes));
    let (mut here, mut there) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let (mut differ, mut offset) = (Differ::default(), 0);
    loop {
        let read = fill_chunk(&mut newer, &mut here)?;
        if fill_chunk(&mut older, &mut there)? != read {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "one of the two files is shorter than it was"));
        }
        for (at, (new, _)) in (offset..).zip(here[..read].iter().zip(&there[..read])).filter(|(_, (new, old))| new != old) {
            let first = if *new == 0 { &mut differ.missing } else { &mut differ.another };
            first.get_or_insert(at);
        }
        offset += read as u64;
        if read < CHUNK_BYTES {
            return Ok(differ);
        }
    }
}

fn fill_chunk(from: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < chunk.len() {
        match from.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The older file's bytes up to the switch, and the newer one's from there on, in the newer one's place.
fn fill(beginning: &Beginning) -> Result<()> {
    let Beginning { newer, older, .. } = beginning;
    let Some(pg_wal) = newer.parent() else { bail!("{} is in no directory", newer.display()) };
    let (temporary, shared) = (pg_wal.join(TEMPORARY), beginning.switch.bytes_since(beginning.begins));
    let write = || -> io::Result<()> {
        // The newer one first, for its length and its mode.
        std::fs::copy(newer, &temporary)?;
        let mut whole = File::options().write(true).open(&temporary)?;
        let copied = io::copy(&mut File::open(older)?.take(shared), &mut whole)?;
        if copied != shared {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the older timeline's file is shorter than it was"));
        }
        whole.sync_all()?;
        std::fs::rename(&temporary, newer)
    };
    let written = write().with_context(|| format!("completing {} from {}", newer.display(), older.display()));
    if written.is_err() {
        // On a disk that is full it would be in the way.
        let _ = files::remove_file_if_there(&temporary);
    }
    written?;
    files::sync_directory(pg_wal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_from_what_is_another() {
        let differ = |newer: &[u8], older: &[u8]| compare(newer, older, 4).unwrap();
        assert_eq!(differ(&[1, 2, 0, 3], &[1, 2, 0, 3]), Differ::default());
        assert_eq!(differ(&[1, 0, 0, 0], &[1, 2, 0, 3]), Differ { missing: Some(1), another: None });
        assert_eq!(differ(&[1, 0, 7, 0], &[1, 2, 0, 3]), Differ { missing: Some(1), another: Some(2) });
        assert_eq!(differ(&[1, 2, 3, 4, 9], &[1, 2, 3, 4, 5]), Differ::default(), "what is behind the switch is not looked at");
        assert!(compare(&[1_u8, 2][..], &[1_u8, 2, 3][..], 4).is_err());
    }

    #[test]
    fn a_difference_in_a_later_chunk_is_found_where_it_is() {
        let (mut newer, older) = (vec![1_u8; 3 * CHUNK_BYTES], vec![1_u8; 3 * CHUNK_BYTES]);
        newer[2 * CHUNK_BYTES + 5] = 0;
        let differ = compare(&newer[..], &older[..], older.len() as u64).unwrap();
        assert_eq!(differ, Differ { missing: Some(2 * CHUNK_BYTES as u64 + 5), another: None });
    }
}
