//! Timeline history files in pg_wal: reading our own, bringing the leader's, and reserving ids that others took.
//!
//! PostgreSQL promotes to the first id that has no history file. An id that somebody else reserved is therefore laid as a file that holds
//! a comment only: it names no parent, so no standby takes it for a descendant of its own timeline, and no later history inherits it.
//! PostgreSQL looks for the newest timeline by counting up until a file is missing, and a standby fetches every file up to its primary's
//! timeline, so a laid file must stay below a real one, and must go where no real one is above it: a standby that starts there would
//! take it for the newest timeline, and fail. No existing file is ever overwritten.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::files;
use crate::policy::rejoin::TimelineHistory;
use crate::types::TimelineId;

/// First words of a laid file.
const RESERVED_MARK: &str = "# reserved by pgherd: ";

/// Reads one of our own history files; None when it is not there. A laid one is there, with no ancestors.
pub fn read(data_dir: &Path, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
    let path = data_dir.join("pg_wal").join(timeline.history_file_name());
    let Some(text) = files::read_if_there(&path)? else { return Ok(None) };
    text.parse().map(Some).with_context(|| format!("reading {}", path.display()))
}

/// Whether a history file only reserves its id.
pub fn is_reservation(content: &str) -> bool {
    content.starts_with(RESERVED_MARK)
}

/// Before promote: lays a file for each id that somebody else reserved. PostgreSQL's own file for the id we reserved must not be there.
pub fn lay(data_dir: &Path, reserved_by_others: &[(TimelineId, String)]) -> Result<()> {
    let pg_wal = data_dir.join("pg_wal");
    for (timeline, who) in reserved_by_others {
        let path = pg_wal.join(timeline.history_file_name());
        // One that is there, real or laid, keeps the id from being taken just as well.
        if !files::is_there(&path)? {
            files::write_whole(&path, format!("{RESERVED_MARK}{}\n", who.replace(['\n', '\r'], " ")).as_bytes())?;
        }
    }
    files::sync_directory(&pg_wal)
}

/// Before the start of a standby, the server stopped: removes laid files above the newest real history file and above `timeline`, the
/// timeline its WAL ends on. Gives the ids that were removed.
pub fn remove_unused_reservations(data_dir: &Path, timeline: TimelineId) -> Result<Vec<TimelineId>> {
    let all = all(data_dir)?;
    let newest_real = all.iter().filter(|(_, content)| !is_reservation(content)).map(|(id, _)| *id).max().unwrap_or_default().max(timeline);
    let unused: Vec<TimelineId> =
        all.iter().filter(|(id, content)| is_reservation(content) && **id > newest_real).map(|(id, _)| *id).collect();
    let pg_wal = data_dir.join("pg_wal");
    for id in &unused {
        files::remove_file_if_there(&pg_wal.join(id.history_file_name()))
            .with_context(|| format!("removing {}", id.history_file_name()))?;
    }
    files::sync_directory(&pg_wal)?;
    Ok(unused)
}

/// Before the start of a standby, the server stopped: brings every history file of the leader that is missing here, so that recovery goes
/// straight to the leader's timeline. A different file of the same number is an error: the caller had to see it as divergence.
pub fn bring(data_dir: &Path, leaders: &BTreeMap<TimelineId, String>) -> Result<()> {
    let pg_wal = data_dir.join("pg_wal");
    for (timeline, content) in leaders {
        let path = pg_wal.join(timeline.history_file_name());
        match files::read_if_there(&path)? {
            Some(here) if here == *content || is_reservation(content) => {}
            Some(here) if !is_reservation(&here) && here.parse::<TimelineHistory>() == content.parse::<TimelineHistory>() => {}
            Some(here) if !is_reservation(&here) => {
                bail!("{} differs from the leader's: this member knows another timeline {timeline}; reinit it", path.display())
            }
            _ => files::write_whole(&path, content.as_bytes())?,
        }
    }
    Ok(())
}

/// Every history file here with its content.
pub fn all(data_dir: &Path) -> Result<BTreeMap<TimelineId, String>> {
    let pg_wal = data_dir.join("pg_wal");
    let mut found = BTreeMap::new();
    for (id, name) in named(&pg_wal)? {
        if let Some(content) = files::read_if_there(&pg_wal.join(&name))? {
            found.insert(id, content);
        }
    }
    Ok(found)
}

/// The name of every history file in a directory, with its size.
pub fn sizes(pg_wal: &Path) -> Result<Vec<(String, u64)>> {
    let size = |name: String| {
        let path = pg_wal.join(&name);
        let bytes = path.symlink_metadata().with_context(|| format!("looking at {}", path.display()))?.len();
        Ok((name, bytes))
    };
    named(pg_wal)?.into_values().map(size).collect()
}

fn named(pg_wal: &Path) -> Result<BTreeMap<TimelineId, String>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(pg_wal).with_context(|| format!("reading {}", pg_wal.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let digits = name.strip_suffix(".history").filter(|digits| digits.len() == 8);
        if let Some(id) = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
            found.insert(TimelineId(id), name);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_dir(entries: &[(u32, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let pg_wal = directory.path().join("pg_wal");
        std::fs::create_dir(&pg_wal).unwrap();
        for (id, content) in entries {
            std::fs::write(pg_wal.join(TimelineId(*id).history_file_name()), content).unwrap();
        }
        directory
    }

    fn ids(data_dir: &Path) -> Vec<u32> {
        all(data_dir).unwrap().keys().map(|id| id.0).collect()
    }

    #[test]
    fn an_id_that_is_taken_is_never_written_over() {
        let directory = data_dir(&[(2, "1\t0/5000000\tx\n")]);
        lay(directory.path(), &[(TimelineId(2), "a".into()), (TimelineId(3), "b\nc".into())]).unwrap();
        assert_eq!(all(directory.path()).unwrap()[&TimelineId(2)], "1\t0/5000000\tx\n");
        assert_eq!(read(directory.path(), TimelineId(3)).unwrap(), Some(TimelineHistory::default()));
    }

    #[test]
    fn a_reservation_goes_only_where_no_real_timeline_is_above_it() {
        let reserved = format!("{RESERVED_MARK}x\n");
        let directory = data_dir(&[(2, &reserved), (3, "1\t0/5000000\tx\n"), (4, &reserved), (5, &reserved)]);
        assert_eq!(remove_unused_reservations(directory.path(), TimelineId(1)).unwrap(), [TimelineId(4), TimelineId(5)]);
        assert_eq!(ids(directory.path()), [2, 3]);
    }

    #[test]
    fn a_reservation_below_the_own_timeline_stays() {
        let directory = data_dir(&[(2, &format!("{RESERVED_MARK}x\n"))]);
        assert!(remove_unused_reservations(directory.path(), TimelineId(3)).unwrap().is_empty());
    }

    #[test]
    fn the_leaders_files_are_brought_and_a_different_one_is_refused() {
        let reserved = format!("{RESERVED_MARK}x\n");
        let directory = data_dir(&[(2, "1\t0/5000000\tmine\n"), (3, &reserved)]);
        let leaders = |two: &str| BTreeMap::from([(TimelineId(2), two.to_owned()), (TimelineId(3), "2\t0/6000000\tx\n".to_owned())]);
        bring(directory.path(), &leaders(&reserved)).unwrap();
        assert_eq!(all(directory.path()).unwrap()[&TimelineId(3)], "2\t0/6000000\tx\n", "a real one replaces a reservation");
        assert_eq!(all(directory.path()).unwrap()[&TimelineId(2)], "1\t0/5000000\tmine\n");
        assert!(bring(directory.path(), &leaders("1\t0/5000001\tx\n")).is_err());
    }
}
