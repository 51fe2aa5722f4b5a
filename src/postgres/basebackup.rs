//! Clones the leader, or a standby of it: pg_basebackup into a directory beside, then a swap into the data directory's place.
//!
//! Until the copy is complete, synced and marked as a standby nothing of the old directory is touched. What cannot work is refused before
//! a byte is copied: no room, a tablespace that has no directory here, a `kept/` that is occupied, a source of another major version.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::installation::Installation;
use super::layout::Layout;
use super::leader::LeaderFacts;
use super::program::{Program, Watch};
use super::swap::{self, Keep, SwapError};
use super::tablespaces::{Placed, TablespaceMap};
use super::{files, history_files, postmaster, rewind, tablespaces};

/// The first version whose server compresses a plain-format backup on the wire.
const SERVER_COMPRESSION_MAJOR: u32 = 15;

/// What the leader's pg_stat_replication shows for a copy in the making: no member's name, since [`MemberName`](crate::types::MemberName)
/// knows no colon. pg_basebackup reports how far it has flushed the WAL that it streams; by its member's name it would acknowledge commits
/// that are in no data directory yet.
const COPY_NAME: &str = "pgherd:copy";

/// One clone.
#[derive(Debug, Clone)]
pub struct CloneJob {
    /// Connection string of the source, as the replication user, with its passfile ([`super::conninfo::build`]).
    pub conninfo: String,
    /// What it said before.
    pub source: LeaderFacts,
    /// Most bytes per second; None = as fast as it goes.
    pub max_rate_bytes: Option<u64>,
    /// `gzip`, `lz4`, `zstd`, with a level if wanted (`zstd:3`); ignored before PostgreSQL 15.
    pub compress: Option<String>,
    /// Whether the source checkpoints at once instead of over its usual time.
    pub checkpoint_fast: bool,
    /// What becomes of the old directory.
    pub keep: Keep,
    /// Where tablespaces of the cluster are on this host, if elsewhere.
    pub tablespace_map: TablespaceMap,
    /// How long it may take in all.
    pub limit: Duration,
    /// Who is told how far it has got.
    pub watch: Watch,
}

/// Runs it. Afterwards the data directory is the clone, marked as a standby, and was never started. PostgreSQL is stopped throughout.
pub async fn clone_from(installation: &Installation, layout: &Layout, job: &CloneJob) -> Result<(), SwapError> {
    layout.prepare()?;
    swap::check(layout, &job.keep)?;
    refuse_impossible(layout, installation.major, &job.source, &job.tablespace_map)?;
    // A pg_basebackup that outlived its daemon would write into this copy, under the same names.
    let lock = Arc::new(rewind::lock(layout).await?);
    let work = layout.clone_dir();
    // An earlier attempt's copy never served anybody, and takes the room of this one.
    swap::remove(layout, &work).await.context("removing what an earlier clone left")?;
    tablespaces::remove_unfinished(layout)?;
    swap::remove_discarded(layout).await?;
    refuse_without_room(layout, job)?;
    files::make_directory(&layout.work())?;
    let placed = tablespaces::make(layout, &job.source.tablespaces, &job.tablespace_map)?;
    program(installation, layout, job, &placed)?.stdin(lock).run_ok_watched(job.limit, &job.watch).await?;
    tablespaces::check(&work, &placed)?;
    finish_copy(&work, job)?;
    swap::swap(layout, &work, &job.keep)?;
    Ok(swap::remove_discarded(layout).await?)
}

/// The copy is synced by pg_basebackup itself; what we add to it is synced here.
fn finish_copy(work: &Path, job: &CloneJob) -> Result<()> {
    // The source's own leftovers, if its data directory is a mount point.
    let inside = work.join(super::layout::INSIDE_NAME);
    files::remove_directory_if_there(&inside).with_context(|| format!("removing {}", inside.display()))?;
    history_files::bring(work, &job.source.history_files)?;
    postmaster::set_standby(work, true)
}

/// What no copy can be made of here, however much room there is. Asked before anything is touched.
pub fn refuse_impossible(layout: &Layout, major: u32, source: &LeaderFacts, map: &TablespaceMap) -> Result<()> {
    if source.lineage.major_version != major {
        bail!(
            "the source of the copy runs PostgreSQL {}, this host has {major}: a clone needs the same major version",
            source.lineage.major_version
        );
    }
    tablespaces::refuse_impossible(layout, &source.tablespaces, map)
}

fn refuse_without_room(layout: &Layout, job: &CloneJob) -> Result<()> {
    let work = layout.work();
    let place = work.ancestors().find(|path| path.is_dir()).context("no directory to clone into")?;
    for (place, bytes) in tablespaces::rooms(&job.source, &job.tablespace_map, place)? {
        let free = nix::sys::statvfs::statvfs(&place).with_context(|| format!("asking for the room in {}", place.display()))?;
        let free_bytes = free.blocks_available().saturating_mul(free.fragment_size());
        if bytes > free_bytes {
            bail!(
                "what is to be copied there is {} MB, {} has room for {} MB: make room (is something in {}?), or have the old directory \
                 emptied first (`pgherd reinit MEMBER --in-place`)",
                bytes >> 20,
                place.display(),
                free_bytes >> 20,
                layout.kept_dir().display()
            );
        }
    }
    Ok(())
}

fn program(installation: &Installation, layout: &Layout, job: &CloneJob, placed: &[Placed]) -> Result<Program> {
    let mut program = Program::new(installation.program("pg_basebackup"))
        .option("pgdata", layout.clone_dir())
        // Of a key that is there twice libpq takes the last.
        .option("dbname", format!("{} application_name='{COPY_NAME}'", job.conninfo))
        .arg("--wal-method=stream")
        .arg("--no-password")
        .arg("--progress")
        .option("checkpoint", if job.checkpoint_fast { "fast" } else { "spread" });
    if let Some(bytes) = job.max_rate_bytes {
        // 32 kB/s to 1 GB/s are pg_basebackup's own bounds.
        program = program.option("max-rate", format!("{}k", (bytes / 1024).clamp(32, 1024 * 1024)));
    }
    if let Some(method) = job.compress.as_deref().filter(|_| installation.major >= SERVER_COMPRESSION_MAJOR) {
        program = program.option("compress", if method.starts_with("server-") { method.to_owned() } else { format!("server-{method}") });
    }
    for Placed { from, to, .. } in placed {
        // An `=` within a path is escaped, as pg_basebackup has it.
        let escaped = |path: &Path| path.display().to_string().replace('=', "\\=");
        program = program.option("tablespace-mapping", format!("{}={}", escaped(from), escaped(to)));
    }
    if let Some(wal) = swap::new_wal_directory(layout)? {
        program = program.option("waldir", wal);
    }
    Ok(program)
}
