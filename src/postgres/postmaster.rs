//! What the guard is asked to start: program, arguments and environment of the postmaster, and the signal file that makes it a standby.
//!
//! Only settings that never change by a reload are on the command line: they win over every file, so that ALTER SYSTEM cannot move the
//! socket or take `hot_standby` away; anything else there would hide a pending restart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::files;
use super::installation::Installation;
use super::layout::Layout;
use crate::facts::guard::Word;
use crate::guard::protocol::StartOrder;

/// The order to start a postmaster on this data directory. `settings` are those of [`crate::policy::parameters::command_line`].
/// `stderr` takes the postmaster's output until its own logging begins; None = the guard's own.
pub fn start_order(
    installation: &Installation,
    layout: &Layout,
    settings: &[(String, String)],
    word: Word,
    stderr: Option<PathBuf>,
) -> Result<StartOrder> {
    let text = |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()));
    let mut arguments = vec!["-D".to_owned(), text(layout.data_dir())?];
    for (name, value) in settings {
        arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
    }
    // The C locale for the server's own messages; databases have their own. archive_command and friends find the usual programs.
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin".to_owned());
    let mut environment = BTreeMap::from([("LC_ALL".to_owned(), "C".to_owned()), ("PATH".to_owned(), path)]);
    for name in ["HOME", "LD_LIBRARY_PATH", "TZ"] {
        environment.extend(std::env::var(name).map(|value| (name.to_owned(), value)));
    }
    let data_dir = layout.data_dir().to_owned();
    Ok(StartOrder { program: installation.program("postgres"), arguments, data_dir, environment, word, stderr })
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
