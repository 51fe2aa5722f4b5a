//! Rewinds a stopped member that has diverged: keeps the WAL that only it has, then pg_rewind, behind a marker (Patroni #2302, #3367).
//!
//! From the marker on the data directory is neither what it was nor what it is to be, and [`super::data_directory::look`] says so until all of
//! it is done. What surprises: the marker's lock is the standard input of everything that is started here, so that it is held for as long as
//! any of them lives, also past the end of a daemon that was killed; who takes it first ends them.

use std::fs::{self, File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::installation::Installation;
use super::layout::{INSIDE_NAME, Layout};
use super::leader::LeaderFacts;
use super::program::{Program, Watch, is_executable};
use super::{configure, data_directory, files, history_files, lost, postmaster, tablespaces, unarchived, wal};
use crate::facts::lost::LostWrites;
use crate::facts::postgres::{ControlFacts, DatabaseState, LostRange, RewindAttempt};
use crate::types::Epoch;

/// Recovery of a primary that crashed, before it can be rewound: as long as its WAL since the last checkpoint takes.
const RECOVERY_LIMIT: Duration = Duration::from_secs(3_600);
/// Whoever works on the data directory for a daemon that is gone is dead so soon after SIGKILL, unless the kernel holds it.
const ORPHANS_LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts at the lock.
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// One rewind.
#[derive(Debug, Clone)]
pub struct RewindJob {
    /// Connection string of the leader, as the rewind user, with its passfile.
    pub conninfo: String,
    /// What the leader said a moment ago.
    pub leader: LeaderFacts,
    /// Who promoted its timeline, by etcd's history.
    pub promoted_under: Option<Epoch>,
    /// Why.
    pub why: String,
    /// What only this member has.
    pub lost: LostRange,
    /// This boot of the host.
    pub boot_id: String,
    /// Fetch WAL that pg_rewind misses by restore_command.
    pub restore_wal: bool,
    /// How long pg_rewind may take.
    pub limit: Duration,
    /// Who is told how far it has got.
    pub watch: Watch,
}

/// What this host lacks for a rewind; None when nothing.
pub fn obstacle(installation: &Installation, layout: &Layout) -> Option<String> {
    let program = installation.program("pg_rewind");
    if !is_executable(&program) {
        return Some(format!("there is no {}", program.display()));
    }
    // pg_rewind removes what the leader does not have.
    let inside = layout.data_dir().join(INSIDE_NAME);
    if fs::read_dir(&inside).is_ok_and(|mut entries| entries.next().is_some()) {
        return Some(format!("pg_rewind would remove what is kept in {}", inside.display()));
    }
    lost::obstacle(layout)
}

/// Runs it. Afterwards the data directory is behind the leader, marked as a standby, and was never started. PostgreSQL is stopped throughout.
/// What is kept of the old WAL is told as soon as it is.
pub async fn rewind(installation: &Installation, layout: &Layout, job: &RewindJob, kept: impl FnOnce(LostWrites) + Send) -> Result<()> {
    let lineage = &job.leader.lineage;
    ensure!(!lineage.in_recovery, "the leader is in recovery");
    ensure!(lineage.control_timeline == lineage.timeline, "the leader's control file is still of timeline {}", lineage.control_timeline);
    let lock = Arc::new(lock(layout).await?);
    let attempt = match marker(layout)? {
        Some(attempt) => again(layout, attempt)?,
        None => {
            refuse_unknown_tablespaces(layout, job)?;
            first(installation, layout, job, &lock, kept).await?
        }
    };
    if !attempt.finished {
        refuse_unknown_tablespaces(layout, job)?;
        run(installation, layout, job, lock).await?;
        check(installation, layout, job).await?;
        // From here on it is all on disk: pg_rewind syncs at its end.
        write_marker(layout, &RewindAttempt { finished: true, ..attempt.clone() })?;
    }
    finish(layout, job)
}

/// The marker; None when no rewind was begun.
pub fn marker(layout: &Layout) -> Result<Option<RewindAttempt>> {
    let path = layout.rewind_marker();
    let Some(text) = files::read_if_there(&path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).with_context(|| format!("expected the marker of a rewind in {}", path.display()))
}

fn write_marker(layout: &Layout, attempt: &RewindAttempt) -> Result<()> {
    files::write_whole(&layout.rewind_marker(), &serde_json::to_vec_pretty(attempt)?)
}

/// The data directory that the marker spoke of is gone, or rewound.
pub(super) fn remove_marker(layout: &Layout) -> Result<()> {
    files::remove_file_if_there(&layout.rewind_marker()).context("removing the marker of a rewind")?;
    if layout.rewind_dir().is_dir() {
        files::sync_directory(&layout.rewind_dir())?;
    }
    files::remove_directory_if_there(&saved(layout)).context("removing the files that were saved for a rewind")
}

fn saved(layout: &Layout) -> PathBuf {
    layout.rewind_dir().join("files")
}

/// Nobody works on the data directory for an earlier daemon any more. Also before it is swapped out.
pub async fn end_orphans(layout: &Layout) -> Result<()> {
    if files::is_there(&layout.rewind_dir())? {
        lock(layout).await?;
    }
    Ok(())
}

/// Where the lock is.
pub(super) fn lock_file(layout: &Layout) -> PathBuf {
    layout.rewind_dir().join("lock")
}

/// Empty, and locked for as long as it is open anywhere. Whatever was started under it before has ended.
pub(super) async fn lock(layout: &Layout) -> Result<File> {
    layout.prepare()?;
    files::make_directory(&layout.rewind_dir())?;
    let path = lock_file(layout);
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let locked = async {
        let mut ours = false;
        loop {
            if !ours {
                match file.try_lock() {
                    Ok(()) => ours = true,
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("locking {}", path.display())),
                }
            }
            if !kill_holders(&path)? && ours {
                return Ok(());
            }
            tokio::time::sleep(LOCK_AGAIN).await;
        }
    };
    tokio::time::timeout(ORPHANS_LIMIT, locked).await.with_context(|| {
        format!("programs of an earlier job still work on {}, and SIGKILL did not end them", layout.data_dir().display())
    })??;
    Ok(file)
}

/// Names the lock to what a command starts, which may have another standard input and a session of its own.
pub(super) const LOCK_VARIABLE: &str = "PGHERD_LOCK";

/// Everything that has the lock as its standard input, or in its environment. Whether there was anything.
fn kill_holders(lock: &Path) -> Result<bool> {
    let mut met = false;
    let variable = [LOCK_VARIABLE.as_bytes(), b"=", lock.as_os_str().as_bytes()].concat();
    for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that has ended meanwhile has neither.
        let has_input = || fs::read_link(entry.path().join("fd/0")).is_ok_and(|input| input == lock);
        let has_variable =
            || fs::read(entry.path().join("environ")).is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == variable));
        if has_input() || has_variable() {
            tracing::warn!(pid, "a program that worked on the data directory for an earlier job is ended");
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            met = true;
        }
    }
    Ok(met)
}

/// Before each attempt: the leader may have made one since.
fn refuse_unknown_tablespaces(layout: &Layout, job: &RewindJob) -> Result<()> {
    let ours = tablespaces::links(layout.data_dir())?;
    if let Some(unknown) = job.leader.tablespaces.iter().find(|tablespace| !ours.contains_key(&tablespace.oid)) {
        // To the leader's path, where something else may be: what is kept of this member, for one.
        bail!("the leader has a tablespace `{}` that is not here, and pg_rewind would make a link for it", unknown.name);
    }
    Ok(())
}

/// The server in good order, its WAL kept, its files saved, the marker written.
async fn first(
    installation: &Installation,
    layout: &Layout,
    job: &RewindJob,
    lock: &Arc<File>,
    kept: impl FnOnce(LostWrites) + Send,
) -> Result<RewindAttempt> {
    let mut control = data_directory::control_file(installation, layout).await?;
    if !matches!(control.state, DatabaseState::ShutDown | DatabaseState::ShutDownInRecovery) {
        recover(installation, layout, &control, lock).await.context("recovering the server before it is rewound")?;
        control = data_directory::control_file(installation, layout).await?;
        ensure!(control.state == DatabaseState::ShutDown, "the server was recovered and is not shut down: {:?}", control.state);
    }
    let wal = wal::end_of_wal(installation, layout.data_dir(), &control, wal::WAL_LIMIT).await;
    let report = lost::keep(installation, layout, lock, &wal, job.lost, &job.why).await.context("keeping the WAL that would be lost")?;
    let saved = saved(layout);
    files::remove_directory_if_there(&saved).with_context(|| format!("removing {}", saved.display()))?;
    files::make_directory(&saved)?;
    for name in configure::FILES {
        let from = layout.data_dir().join(name);
        if files::is_there(&from)? {
            lost::copy_file(&from, &saved.join(name))?;
        }
    }
    files::sync_directory(&saved)?;
    let attempt = RewindAttempt {
        why: job.why.clone(),
        lost: job.lost,
        system_id: control.system_id,
        attempts: 1,
        leader_timeline: job.leader.lineage.timeline,
        promoted_under: job.promoted_under,
        boot_id: job.boot_id.clone(),
        checkpoint: control.checkpoint,
        kept: report.kept.clone(),
        finished: false,
    };
    write_marker(layout, &attempt)?;
    kept(report);
    Ok(attempt)
}

/// The WAL that pg_rewind reads is there again, whatever it had written into it.
fn again(layout: &Layout, attempt: RewindAttempt) -> Result<RewindAttempt> {
    if attempt.finished {
        return Ok(attempt);
    }
    let attempt = RewindAttempt { attempts: attempt.attempts + 1, ..attempt };
    write_marker(layout, &attempt)?;
    let (kept, pg_wal) = (Path::new(&attempt.kept).join("pg_wal"), layout.data_dir().join("pg_wal"));
    for entry in fs::read_dir(&kept).with_context(|| format!("reading {}", kept.display()))? {
        let name = entry?.file_name();
        lost::copy_file(&kept.join(&name), &pg_wal.join(&name))?;
    }
    Ok(attempt)
}

/// Crash recovery of what was a primary, by a server without a socket that no client can reach (SAFETY rows 33 and 55).
async fn recover(installation: &Installation, layout: &Layout, control: &ControlFacts, lock: &Arc<File>) -> Result<()> {
    ensure!(
        !control.backup_label && !control.standby_signal,
        "a backup_label or standby.signal is there: only an ordinary start handles it"
    );
    let mut program = Program::new(installation.program("postgres")).arg("--single").arg("-D").arg(layout.data_dir());
    for setting in ["archive_mode=off", "archive_command=false", "restore_command=", "synchronous_standby_names=", "logging_collector=off"]
    {
        program = program.arg("-c").arg(setting);
    }
    // It reads statements from its standard input, which is empty: it ends as soon as it has recovered.
    program.arg("template1").stdin(Arc::clone(lock)).run_ok(RECOVERY_LIMIT).await.map(drop)
}

async fn run(installation: &Installation, layout: &Layout, job: &RewindJob, lock: Arc<File>) -> Result<()> {
    let mut program = Program::new(installation.program("pg_rewind"))
        .option("target-pgdata", layout.data_dir())
        .option("source-server", &job.conninfo)
        // Whether that is safe is judged here, and not by pg_rewind.
        .arg("--no-ensure-shutdown")
        .arg("--progress");
    if job.restore_wal {
        program = program.arg("--restore-target-wal");
    }
    program.stdin(lock).run_ok_watched(job.limit, &job.watch).await.map(drop)
}

/// What pg_rewind left is what it was to leave. It ends well also where it saw nothing to do.
async fn check(installation: &Installation, layout: &Layout, job: &RewindJob) -> Result<()> {
    let lineage = &job.leader.lineage;
    let control = data_directory::control_file(installation, layout).await?;
    ensure!(control.backup_label, "pg_rewind saw nothing to rewind: it left no backup_label");
    let timeline = control.timeline.max(control.min_recovery_timeline);
    ensure!(
        timeline == lineage.timeline && control.state == DatabaseState::InArchiveRecovery,
        "pg_rewind left a control file of timeline {timeline} ({:?}), the leader is on {}",
        control.state,
        lineage.timeline
    );
    match history_files::read(layout.data_dir(), lineage.timeline)? {
        Some(history) if history == lineage.history => Ok(()),
        other => bail!("pg_rewind left another history of timeline {} than the leader has: {other:?}", lineage.timeline),
    }
}

/// Each step may be repeated; the marker goes last.
fn finish(layout: &Layout, job: &RewindJob) -> Result<()> {
    let data_dir = layout.data_dir();
    // The leader's own leftovers, if its data directory is a mount point.
    let inside = data_dir.join(INSIDE_NAME);
    files::remove_directory_if_there(&inside).with_context(|| format!("removing {}", inside.display()))?;
    // The leader's configuration came with its data.
    for name in configure::FILES {
        let (ours, theirs) = (saved(layout).join(name), data_dir.join(name));
        if files::is_there(&ours)? {
            lost::copy_file(&ours, &theirs)?;
        } else {
            files::remove_file_if_there(&theirs).with_context(|| format!("removing {}", theirs.display()))?;
        }
    }
    history_files::bring(data_dir, &job.leader.history_files)?;
    // SAFETY row 54: what diverged is not archived from here, whatever is under its name by now, and the rest is the leader's to archive.
    unarchived::forget(&data_dir.join("pg_wal"))?;
    layout.promotion_file().remove()?;
    postmaster::set_standby(data_dir, true)?;
    remove_marker(layout)
}
