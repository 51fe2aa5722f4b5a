//! What the guard is asked to start: program, arguments and environment of the postmaster, and the signal file that makes it a standby.
//!
//! Only settings that never change by a reload are on the command line: they win over every file, so that ALTER SYSTEM cannot move the
//! socket or take `hot_standby` away; anything else there would hide a pending restart.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::files;
use super::installation::Installation;
use super::layout::Layout;

/// A postmaster as the guard starts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostmasterCommand {
    /// The `postgres` program.
    pub program: PathBuf,
    /// All of argv, the program's name first.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: BTreeMap<OsString, OsString>,
}

/// The command for this data directory. `settings` are those of [`crate::policy::parameters::command_line`].
pub fn postmaster_command(installation: &Installation, layout: &Layout, settings: &[(String, String)]) -> PostmasterCommand {
    let mut argv: Vec<OsString> = vec!["postgres".into(), "-D".into(), layout.data_dir().into()];
    for (name, value) in settings {
        argv.push("-c".into());
        argv.push(format!("{name}={value}").into());
    }
    // The C locale for the server's own messages; databases have their own. archive_command and friends find the usual programs.
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let mut env = BTreeMap::from([("LC_ALL".into(), "C".into()), ("PATH".into(), path)]);
    for name in ["HOME", "LD_LIBRARY_PATH", "TZ"] {
        if let Some(value) = std::env::var_os(name) {
            env.insert(name.into(), value);
        }
    }
    PostmasterCommand { program: installation.program("postgres"), argv, env }
}

/// Makes the stopped server start as a standby, or not. Durable when this returns.
pub fn set_standby(data_dir: &Path, standby: bool) -> Result<()> {
    let path = data_dir.join("standby.signal");
    if standby {
        // recovery.signal would end recovery at its target by itself.
        files::remove_file_if_there(&data_dir.join("recovery.signal")).context("removing recovery.signal")?;
        files::write_if_changed(&path, b"")?;
    } else {
        files::remove_file_if_there(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    files::sync_directory(data_dir)
}
