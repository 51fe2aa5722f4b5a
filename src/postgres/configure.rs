//! Puts configuration files in place, tries them, and takes them back when they do not serve.
//!
//! Files are written whole. A candidate is first read by `postgres -C` (syntax, names, ranges); on a running server the views that read
//! the files as they lie are asked next, then comes the reload, then a fresh connection as ourselves. Whatever fails puts the old files
//! back. The files that served last are kept in `last_good/`: an install that a crash interrupted is thereby seen and gone through again,
//! and a failed start can fall back to them once. Two small files are apart from them, and never put back: whom the server follows, and whom
//! commits wait for.
//!
//! postgresql.auto.conf belongs to pgherd too: what ALTER SYSTEM wrote there is undone, and kept beside for a look.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::files;
use super::installation::Installation;
use super::layout::Layout;
use super::program::Program;
use super::sql::{Connection, Sql, SqlError, text};
use crate::facts::synchrony::Names;
use crate::policy::{hba, parameters};

/// How long `postgres -C` may take.
const CHECK_LIMIT: Duration = Duration::from_secs(20);
/// First words of every file pgherd writes; a file without them is somebody else's.
const MARK: &str = "# Written by pgherd";
/// postgresql.auto.conf without a setting.
const NO_ALTER_SYSTEM: &str = "# Written by pgherd: ALTER SYSTEM is undone, settings are in the cluster's spec.\n";
/// Beside the data directory: pg_hba.conf as it is to be when clients are let in.
const WHEN_OPEN: &str = "pg_hba.when_open.conf";
const AUTO_CONF: &str = "postgresql.auto.conf";
/// Every file of a data directory that is pgherd's own.
pub const FILES: [&str; 6] =
    ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", AUTO_CONF, parameters::live::UPSTREAM_CONF, parameters::live::NAMES_CONF];

/// The files as they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFiles {
    /// postgresql.conf.
    pub postgresql_conf: String,
    /// pg_hba.conf.
    pub pg_hba: String,
    /// pg_ident.conf.
    pub pg_ident: String,
    /// Whom the server follows. In place whatever becomes of the others.
    pub upstream: String,
}

impl ConfigFiles {
    fn named(&self) -> [(&'static str, &str); 3] {
        [("postgresql.conf", &self.postgresql_conf), ("pg_hba.conf", &self.pg_hba), ("pg_ident.conf", &self.pg_ident)]
    }
}

/// What came of an installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The files were in place already, and have served.
    Unchanged,
    /// In place for the next start (the server is stopped).
    Installed {
        /// Parameters that ALTER SYSTEM had set.
        undone: Vec<String>,
    },
    /// In place, reloaded, and we still get in.
    Reloaded {
        /// Parameters that wait for a restart.
        pending_restart: Vec<String>,
        /// Parameters that ALTER SYSTEM had set.
        undone: Vec<String>,
    },
    /// The files that were there before are there again.
    PutBack {
        /// PostgreSQL's own words.
        why: String,
    },
}

/// Files as they lay, for putting them back.
struct Before(Vec<(PathBuf, Option<String>)>);

impl Before {
    fn take(layout: &Layout, files: &ConfigFiles) -> Result<Self> {
        let mut all = Vec::new();
        for (name, _) in files.named() {
            let path = layout.data_dir().join(name);
            all.push((path.clone(), files::read_if_there(&path)?));
        }
        Ok(Self(all))
    }

    fn put_back(&self) -> Result<()> {
        for (path, content) in &self.0 {
            match content {
                Some(content) => files::write_if_changed(path, content.as_bytes()).map(|_| ())?,
                None => files::remove_file_if_there(path).with_context(|| format!("removing {}", path.display()))?,
            }
        }
        Ok(())
    }
}

/// Before a start, the server stopped. [`Outcome::PutBack`] leaves what was there.
pub async fn install_stopped(installation: &Installation, layout: &Layout, files: &ConfigFiles) -> Result<Outcome> {
    write_upstream(layout, files)?;
    let undone = undo_alter_system(layout)?;
    // What has served needs no check: a primary that crashed is back the sooner.
    if undone.is_empty() && in_place(layout.data_dir(), files)? && in_place(&layout.last_good_dir(), files)? {
        return Ok(Outcome::Unchanged);
    }
    if let Some(why) = check_candidate(installation, layout, files).await? {
        return Ok(Outcome::PutBack { why });
    }
    match write_all(layout, files)? || !undone.is_empty() {
        true => Ok(Outcome::Installed { undone }),
        false => Ok(Outcome::Unchanged),
    }
}

/// On a running server. `limit` bounds each question to it, the reload included.
pub async fn install_running(
    installation: &Installation,
    layout: &Layout,
    sql: &Sql,
    files: &ConfigFiles,
    limit: Duration,
) -> Result<Outcome> {
    // Also when the file says so already: whoever wrote it may have been ended before the server was told, and a standby that is taken for
    // detached must not receive again by itself.
    write_upstream(layout, files)?;
    sql.reload(limit).await?;
    let undone = undo_alter_system(layout)?;
    if undone.is_empty() && in_place(layout.data_dir(), files)? && in_place(&layout.last_good_dir(), files)? {
        return Ok(Outcome::Unchanged);
    }
    if let Some(why) = check_candidate(installation, layout, files).await? {
        return Ok(Outcome::PutBack { why });
    }
    // Kept open throughout: a reload that locks us out must be taken back over it.
    let held = tokio::time::timeout(limit, sql.open()).await.context("connecting to the server took too long")??;
    let before = Before::take(layout, files)?;
    write_all(layout, files)?;
    let tried = try_on(sql, &held, installation.major, limit).await;
    if let Err(error) = tried {
        before.put_back().with_context(|| format!("putting the old files back after: {error}"))?;
        // Also after a failed check: the server may have been told to reload by somebody else meanwhile.
        let _ = sql.reload_over(&held, limit).await;
        return Ok(Outcome::PutBack { why: error.to_string() });
    }
    served(layout)?;
    let pending_restart = sql.pending_restart(limit).await?;
    Ok(Outcome::Reloaded { pending_restart, undone })
}

fn write_upstream(layout: &Layout, files: &ConfigFiles) -> Result<()> {
    files::write_if_changed(&layout.data_dir().join(parameters::live::UPSTREAM_CONF), files.upstream.as_bytes()).map(drop)
}

/// Whom commits wait for, from the next start or reload on.
pub fn write_names(layout: &Layout, names: &Names, failover_slots: bool) -> Result<()> {
    let conf = parameters::live::names_conf(names, failover_slots).map_err(anyhow::Error::msg)?;
    files::write_if_changed(&layout.data_dir().join(parameters::live::NAMES_CONF), conf.as_bytes()).map(drop)
}

/// Before a start: no client gets in. What was put in place for this start is kept beside, for [`open`].
pub fn close(layout: &Layout, pg_hba: &str) -> Result<()> {
    if !is_closed(layout)? {
        layout.prepare()?;
        let installed = files::read_if_there(&layout.data_dir().join("pg_hba.conf"))?.unwrap_or_default();
        files::write_if_changed(&layout.beside().join(WHEN_OPEN), installed.as_bytes())?;
    }
    files::write_if_changed(&layout.data_dir().join("pg_hba.conf"), pg_hba.as_bytes()).map(drop)
}

fn is_closed(layout: &Layout) -> Result<bool> {
    Ok(files::read_if_there(&layout.data_dir().join("pg_hba.conf"))?.is_some_and(|text| text.contains(hba::CLOSED)))
}

/// On a running server that [`close`] may have closed: clients get in by the lines that it closed, or else by these. What served last may be
/// of an older document.
pub async fn open(layout: &Layout, sql: &Sql, pg_hba: &str, limit: Duration) -> Result<()> {
    if is_closed(layout)? {
        let installed = files::read_if_there(&layout.beside().join(WHEN_OPEN))?;
        files::write_if_changed(&layout.data_dir().join("pg_hba.conf"), installed.as_deref().unwrap_or(pg_hba).as_bytes())?;
    }
    // Also when it was opened before: who did may have been ended before the server was told.
    sql.reload(limit).await?;
    Ok(())
}

/// On a running server; what comes after it is told whom commits wait for. Ends when a new session has the names, and then every process was
/// told to read them.
///
/// # Errors
/// When that is not known within the limits.
pub async fn set_names(layout: &Layout, sql: &Sql, (names, failover_slots): (&Names, bool), limit: Duration) -> Result<()> {
    write_names(layout, names, failover_slots)?;
    undo_alter_system(layout)?;
    let fresh = sql.reload(limit).await?;
    let row = tokio::time::timeout(limit, fresh.row("select current_setting('synchronous_standby_names') as names")).await??;
    let shown = text(&row, "names")?;
    ensure!(shown == names.to_string(), "a new session has synchronous_standby_names `{shown}` and not `{names}`");
    Ok(())
}

async fn try_on(sql: &Sql, held: &Connection, major: u32, limit: Duration) -> Result<(), SqlError> {
    let errors = tokio::time::timeout(limit, file_errors(held, major))
        .await
        .unwrap_or_else(|_| Err(SqlError::NoAnswer("the check of the files took too long".to_owned())))?;
    match errors.is_empty() {
        true => sql.reload_over(held, limit).await,
        false => Err(SqlError::Nonsense(errors.join("; "))),
    }
}

/// Errors in the files as they lie in the data directory, whether loaded or not.
///
/// A setting that needs a restart is shown with an error too, though there is none: those `postgres -C` has read already.
pub async fn file_errors(connection: &Connection, major: u32) -> Result<Vec<String>, SqlError> {
    let mut question = "select format('%s line %s: %s: %s', f.sourcefile, f.sourceline, f.name, f.error) as error from pg_file_settings f \
          left join pg_settings s on lower(s.name) = lower(f.name) where f.error is not null and s.context is distinct from 'postmaster' \
        union all select format('pg_hba.conf line %s: %s', line_number, error) from pg_hba_file_rules where error is not null"
        .to_owned();
    if major >= 15 {
        question +=
            " union all select format('pg_ident.conf line %s: %s', line_number, error) from pg_ident_file_mappings where error is not null";
    }
    connection.rows(&question).await?.iter().map(|row| text(row, "error").map(str::to_owned)).collect()
}

/// Keeps the files in the data directory as those that served last. Called after a start that reached its goal, too.
pub fn served(layout: &Layout) -> Result<()> {
    if is_closed(layout)? {
        return Ok(());
    }
    let last_good = layout.last_good_dir();
    files::make_directory(&last_good)?;
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let content = std::fs::read(layout.data_dir().join(name)).with_context(|| format!("reading {name}"))?;
        files::write_if_changed(&last_good.join(name), &content)?;
    }
    Ok(())
}

/// After a failed start: puts the files that served last back, but for whom the server follows. False when there are none, or they are the
/// ones that just failed.
pub fn fall_back(layout: &Layout, files: &ConfigFiles) -> Result<bool> {
    write_upstream(layout, files)?;
    let mut changed = false;
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        if let Some(content) = files::read_if_there(&layout.last_good_dir().join(name))? {
            changed |= files::write_if_changed(&layout.data_dir().join(name), content.as_bytes())?;
        }
    }
    Ok(changed)
}

fn in_place(directory: &Path, files: &ConfigFiles) -> Result<bool> {
    for (name, content) in files.named() {
        if files::read_if_there(&directory.join(name))?.as_deref() != Some(content) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes what differs. The first time, what was there before pgherd is kept beside.
fn write_all(layout: &Layout, files: &ConfigFiles) -> Result<bool> {
    let mut changed = false;
    for (name, content) in files.named() {
        let path = layout.data_dir().join(name);
        keep_foreign(layout, &path, name)?;
        changed |= files::write_if_changed(&path, content.as_bytes())?;
    }
    Ok(changed)
}

fn keep_foreign(layout: &Layout, path: &Path, name: &str) -> Result<()> {
    let directory = layout.beside().join("before_pgherd");
    match files::read_if_there(path)? {
        Some(there) if !there.starts_with(MARK) && !directory.join(name).exists() => {
            files::make_directory(&directory)?;
            files::write_whole(&directory.join(name), there.as_bytes())
        }
        _ => Ok(()),
    }
}

/// PostgreSQL's reading of the candidate, without installing it; None when it has nothing against it.
async fn check_candidate(installation: &Installation, layout: &Layout, files: &ConfigFiles) -> Result<Option<String>> {
    layout.prepare()?;
    let candidate = layout.beside().join("candidate.conf");
    files::write_whole(&candidate, files.postgresql_conf.as_bytes())?;
    let mut setting = std::ffi::OsString::from("config_file=");
    setting.push(&candidate);
    let program =
        Program::new(installation.program("postgres")).arg("-D").arg(layout.data_dir()).arg("-C").arg("port").arg("-c").arg(setting);
    let output = program.run(CHECK_LIMIT).await?;
    files::remove_file_if_there(&candidate).context("removing the candidate")?;
    let reason = if output.stderr.is_empty() { format!("postgres -C ended with {}", output.status) } else { output.stderr };
    Ok((!output.status.success()).then_some(reason))
}

/// Empties postgresql.auto.conf. Gives the names that were set there.
fn undo_alter_system(layout: &Layout) -> Result<Vec<String>> {
    let path = layout.data_dir().join(AUTO_CONF);
    let Some(there) = files::read_if_there(&path)? else { return Ok(Vec::new()) };
    let settings = there.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let names: Vec<String> = settings.map(|line| line.split([' ', '=', '\t']).next().unwrap_or_default().to_owned()).collect();
    if !names.is_empty() {
        layout.prepare()?;
        files::write_whole(&layout.beside().join("undone.auto.conf"), there.as_bytes())?;
        files::write_whole(&path, NO_ALTER_SYSTEM.as_bytes())?;
    }
    Ok(names)
}
