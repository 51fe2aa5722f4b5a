//! Makes a new data directory: initdb beside the place where it will be, then a swap into it.
//!
//! Never over anything: the place must be absent or empty, before and after. A work directory of an earlier attempt never served anybody
//! and is removed first (P5), so that a crash in the middle cannot stand in the way of the next attempt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::installation::Installation;
use super::layout::Layout;
use super::program::Program;
use super::sql::Secret;
use super::swap::{self, Keep};
use super::{files, rewind};

/// How long initdb may take; it syncs about 40 MB.
pub const INITDB_LIMIT: Duration = Duration::from_secs(300);

/// What initdb is to make.
#[derive(Debug, Clone)]
pub struct InitdbJob {
    /// The bootstrap superuser.
    pub superuser: String,
    /// Its password.
    pub password: Secret,
    /// `UTF8`.
    pub encoding: Option<String>,
    /// `C.UTF-8`.
    pub locale: Option<String>,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// Method for local connections, in the file that pgherd's own replaces before the first start.
    pub auth_local: String,
    /// Method for TCP connections, likewise.
    pub auth_host: String,
}

/// Runs it. Afterwards the data directory is in place, durable, and was never started.
pub async fn initdb(installation: &Installation, layout: &Layout, job: &InitdbJob) -> Result<()> {
    layout.prepare()?;
    swap::check(layout, &Keep::Empty)?;
    let lock = Arc::new(rewind::lock(layout).await?);
    let work = layout.initdb_dir();
    swap::remove(layout, &work).await.context("removing what an earlier initdb left")?;
    files::make_directory(&layout.work())?;
    let pwfile = PasswordFile(layout.beside().join("initdb-password"));
    files::write_whole(&pwfile.0, job.password.expose().as_bytes())?;
    let program = program(installation, layout, job, &pwfile.0)?;
    program.stdin(lock).run_ok(INITDB_LIMIT).await?;
    drop(pwfile);
    swap::swap(layout, &work, &Keep::Empty)?;
    Ok(())
}

fn program(installation: &Installation, layout: &Layout, job: &InitdbJob, pwfile: &std::path::Path) -> Result<Program> {
    let mut program = Program::new(installation.program("initdb"))
        .option("pgdata", layout.initdb_dir())
        .option("username", &job.superuser)
        .option("pwfile", pwfile)
        .option("auth-local", &job.auth_local)
        .option("auth-host", &job.auth_host);
    if let Some(encoding) = &job.encoding {
        program = program.option("encoding", encoding);
    }
    if let Some(locale) = &job.locale {
        program = program.option("locale", locale);
    }
    // On by default since 18, where the switch to turn it off appeared.
    program = match (job.data_checksums, installation.major) {
        (true, _) => program.arg("--data-checksums"),
        (false, 18..) => program.arg("--no-data-checksums"),
        (false, _) => program,
    };
    if let Some(wal) = swap::new_wal_directory(layout)? {
        program = program.option("waldir", wal);
    }
    Ok(program)
}

/// Removed when the job ends, however it ends.
struct PasswordFile(PathBuf);

impl Drop for PasswordFile {
    fn drop(&mut self) {
        let _ = files::remove_file_if_there(&self.0);
    }
}
