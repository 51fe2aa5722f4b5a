//! Where a stopped server's WAL ends: its newest timeline, and where its last record starts, read by pg_waldump from the latest
//! checkpoint on.
//!
//! pg_waldump ends with an error at the end of WAL, by design; its message is not read. What counts is the last record it printed, and
//! only if the checkpoint record itself was among them: otherwise the end is unknown.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::history_files;
use super::installation::Installation;
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
    let pg_wal = data_dir.join("pg_wal");
    let mut newest = TimelineId(0);
    for entry in std::fs::read_dir(&pg_wal).with_context(|| format!("reading {}", pg_wal.display()))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            newest = newest.max(TimelineId(u32::from_str_radix(&name[..8], 16)?));
        }
    }
    Ok(newest)
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
    let pg_waldump = installation.program("pg_waldump");
    ensure!(is_executable(&pg_waldump), "there is no {}", pg_waldump.display());
    let program = Program::new(pg_waldump)
        .arg("-p")
        .arg(data_dir.join("pg_wal"))
        .arg("-t")
        .arg(timeline.to_string())
        .arg("-s")
        .arg(start.to_string());
    let mut running = program.spawn()?;
    let stdout = running.child.stdout.take().context("standard output was not piped")?;
    // It says one line at the end; closing the pipe instead of reading it would end it early.
    let stderr = running.child.stderr.take().context("standard error was not piped")?;
    let reading = async {
        let mut lines = BufReader::new(stdout).split(b'\n');
        let mut last = None;
        while let Some(line) = lines.next_segment().await? {
            let line = String::from_utf8_lossy(&line);
            // Other lines: "first record is after …", and texts of users that hold a line break.
            if line.starts_with("rmgr: ") {
                last = Some(record_start(&line).with_context(|| format!("pg_waldump printed `{line}`"))?);
            }
        }
        let status = running.wait().await?;
        if status.code().is_none() {
            bail!("pg_waldump was ended by a signal");
        }
        Ok(last)
    };
    let last =
        tokio::time::timeout(limit, reading).await.with_context(|| format!("pg_waldump did not end within {} s", limit.as_secs()))?;
    drop(stderr);
    last
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
}
