//! Looks at the data directory at rest: what pg_controldata says, and what lies around it.
//!
//! Strict: a label that is missing, a value that does not parse, a damaged checksum are never guessed around. What could not be read is
//! `Unknown`; what was read and must not be started is `Unusable` with a sentence.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::installation::Installation;
use super::layout::{INSIDE_NAME, Layout};
use super::program::Program;
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState, StandbyFloor};
use crate::types::{Lsn, TimelineId};

/// How long pg_controldata may take: it reads one small file, but the disk may be stalled.
pub const CONTROLDATA_LIMIT: Duration = Duration::from_secs(10);

/// PostgreSQL writes the control file at this length, whatever it holds (pg_control.h, PG_CONTROL_FILE_SIZE).
const CONTROL_FILE_BYTES: u64 = 8192;

/// The data directory as it is now. Meant for a stopped server; of a running one it says what the last checkpoint wrote.
pub async fn look(installation: &Installation, layout: &Layout) -> DataDirectory {
    match look_closer(installation, layout).await {
        Ok(seen) => seen,
        Err(error) => {
            tracing::warn!(data_dir = %layout.data_dir().display(), "the data directory could not be read: {error:#}");
            DataDirectory::Unknown
        }
    }
}

async fn look_closer(installation: &Installation, layout: &Layout) -> Result<DataDirectory> {
    let data_dir = layout.data_dir();
    if super::files::is_there(&layout.swap_journal())? {
        return Ok(DataDirectory::Unusable(format!(
            "a swap of {} was interrupted (see {}); it is finished at the daemon's next start",
            data_dir.display(),
            layout.swap_journal().display()
        )));
    }
    let Some(names) = entry_names(data_dir)? else { return Ok(DataDirectory::Empty) };
    if names.is_empty() {
        return Ok(DataDirectory::Empty);
    }
    if let Some(attempt) = super::rewind::marker(layout)? {
        return Ok(DataDirectory::HalfRewound(Box::new(attempt)));
    }
    let here = |name: &str| super::files::is_there(&data_dir.join(name));
    if !here("global/pg_control")? || !here("PG_VERSION")? {
        return Ok(DataDirectory::Unusable(format!(
            "{} holds files ({}) but is no PostgreSQL data directory; empty it or name another data_dir",
            data_dir.display(),
            names.iter().take(3).cloned().collect::<Vec<_>>().join(", ")
        )));
    }
    let length = std::fs::metadata(data_dir.join("global/pg_control")).context("reading the length of the control file")?.len();
    if length < CONTROL_FILE_BYTES {
        return Ok(DataDirectory::Unusable(format!(
            "the control file of {} is cut short, {length} bytes of {CONTROL_FILE_BYTES}; restore this member from another one",
            data_dir.display()
        )));
    }
    let version = std::fs::read_to_string(data_dir.join("PG_VERSION")).context("reading PG_VERSION")?;
    if version.trim() != installation.major.to_string() {
        return Ok(DataDirectory::Unusable(format!(
            "{} is of PostgreSQL {}, the programs in {} are of {}; install those of {} or upgrade the data directory with pg_upgrade",
            data_dir.display(),
            version.trim(),
            installation.bin_dir.display(),
            installation.major,
            version.trim()
        )));
    }
    match read_control(installation, layout).await? {
        Ok(control) => Ok(DataDirectory::Full(control)),
        Err(error) => Ok(DataDirectory::Unusable(format!("the control file of {} is not right: {error:#}", data_dir.display()))),
    }
}

/// The control file and what lies around it, whatever else is to be thought of the data directory.
pub async fn control_file(installation: &Installation, layout: &Layout) -> Result<ControlFacts> {
    read_control(installation, layout).await?
}

/// The inner error: it was read, and is not right.
async fn read_control(installation: &Installation, layout: &Layout) -> Result<Result<ControlFacts>> {
    let data_dir = layout.data_dir();
    let here = |name: &str| super::files::is_there(&data_dir.join(name));
    let output = Program::new(installation.program("pg_controldata")).arg("-D").arg(data_dir).run_ok(CONTROLDATA_LIMIT).await?;
    let mut control = match parse(&output.stdout, &output.stderr, installation.major) {
        Ok(control) => control,
        Err(error) => return Ok(Err(error)),
    };
    control.standby_signal = here("standby.signal")?;
    control.backup_label = here("backup_label")?;
    control.promoted = layout.promotion_file().read()?.map(|own| (own.timeline, own.epoch));
    control.unarchived = super::unarchived::left(&data_dir.join("pg_wal"), &control)?.len();
    Ok(Ok(control))
}

/// Names of the entries, without pgherd's own; None when the directory is not there.
fn entry_names(data_dir: &Path) -> Result<Option<Vec<String>>> {
    let entries = match std::fs::read_dir(data_dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries.with_context(|| format!("reading the directory {}", data_dir.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name != INSIDE_NAME);
    names.sort();
    Ok(Some(names))
}

/// Reads pg_controldata's output in the C locale. What lies beside it (`standby.signal`, `backup_label`, our own
/// record of a promotion) is left out.
fn parse(stdout: &str, stderr: &str, major_version: u32) -> Result<ControlFacts> {
    // Up to 16 the checksum warning is on standard output, since 17 on standard error; it never says anything else there.
    if !stderr.is_empty() || stdout.lines().any(|line| line.starts_with("WARNING")) {
        bail!("its checksum is wrong, or it is of another PostgreSQL; restore this member from another one");
    }
    let mut values = BTreeMap::new();
    for line in stdout.lines() {
        if let Some((label, value)) = line.split_once(':') {
            values.insert(label.trim(), value.trim());
        }
    }
    let get = |label: &'static str| values.get(label).copied().with_context(|| format!("pg_controldata says nothing of `{label}`"));
    let number = |label| -> Result<u32> { get(label)?.parse().with_context(|| format!("reading `{label}`")) };
    let lsn = |label| -> Result<Lsn> { Ok(get(label)?.parse()?) };
    let switch = |label| match get(label)? {
        "on" => Ok(true),
        "off" => Ok(false),
        other => bail!("`{label}` is `{other}`, neither on nor off"),
    };
    Ok(ControlFacts {
        system_id: get("Database system identifier")?.parse()?,
        major_version,
        state: state(get("Database cluster state")?)?,
        checkpoint: lsn("Latest checkpoint location")?,
        timeline: TimelineId(number("Latest checkpoint's TimeLineID")?),
        min_recovery_end: lsn("Minimum recovery ending location")?,
        min_recovery_timeline: TimelineId(number("Min recovery ending loc's timeline")?),
        data_checksums: number("Data page checksum version")? > 0,
        wal_log_hints: switch("wal_log_hints setting")?,
        floor: StandbyFloor {
            max_connections: number("max_connections setting")?,
            max_worker_processes: number("max_worker_processes setting")?,
            max_wal_senders: number("max_wal_senders setting")?,
            max_prepared_transactions: number("max_prepared_xacts setting")?,
            max_locks_per_transaction: number("max_locks_per_xact setting")?,
        },
        standby_signal: false,
        backup_label: false,
        promoted: None,
        unarchived: 0,
    })
}

fn state(text: &str) -> Result<DatabaseState> {
    Ok(match text {
        "starting up" => DatabaseState::StartingUp,
        "shut down" => DatabaseState::ShutDown,
        "shut down in recovery" => DatabaseState::ShutDownInRecovery,
        "shutting down" => DatabaseState::ShuttingDown,
        "in crash recovery" => DatabaseState::InCrashRecovery,
        "in archive recovery" => DatabaseState::InArchiveRecovery,
        "in production" => DatabaseState::InProduction,
        other => bail!("`{other}` is no known state of a database cluster"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SystemId;

    const STANDBY_15: &str = "\
pg_control version number:            1300
Database system identifier:           7710980191000723168
Database cluster state:               in archive recovery
Latest checkpoint location:           0/1500718
Latest checkpoint's REDO location:    0/1500718
Latest checkpoint's TimeLineID:       3
Latest checkpoint's oldestCommitTsXid:0
Minimum recovery ending location:     16/B374D848
Min recovery ending loc's timeline:   4
wal_log_hints setting:                on
max_connections setting:              100
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           7
max_locks_per_xact setting:           64
Data page checksum version:           1
";

    #[test]
    fn the_control_file_is_read_as_postgresql_writes_it() {
        let control = parse(STANDBY_15, "", 15).unwrap();
        assert_eq!(control.system_id, SystemId(7_710_980_191_000_723_168));
        assert_eq!(control.state, DatabaseState::InArchiveRecovery);
        assert_eq!((control.timeline, control.min_recovery_timeline), (TimelineId(3), TimelineId(4)));
        assert_eq!(control.min_recovery_end, Lsn(0x16_B374_D848));
        assert_eq!(control.floor.max_prepared_transactions, 7);
        assert!(control.data_checksums && control.wal_log_hints);
    }

    #[test]
    fn a_missing_or_damaged_line_is_never_guessed() {
        for line in STANDBY_15.lines().filter(|line| !line.contains("version number") && !line.contains("REDO") && !line.contains("Commit"))
        {
            let without: String = STANDBY_15.lines().filter(|other| *other != line).map(|line| format!("{line}\n")).collect();
            assert!(parse(&without, "", 15).is_err(), "without `{line}`");
        }
        assert!(parse(&STANDBY_15.replace("in archive recovery", "wird gestartet"), "", 15).is_err());
        assert!(parse(&STANDBY_15.replace("16/B374D848", "16-B374D848"), "", 15).is_err());
    }

    #[test]
    fn a_wrong_checksum_is_seen_wherever_the_version_says_it() {
        let warned = format!("WARNING: Calculated CRC checksum does not match value stored in file.\n{STANDBY_15}");
        assert!(parse(&warned, "", 15).is_err());
        assert!(parse(STANDBY_15, "pg_controldata: warning: calculated CRC checksum does not match", 17).is_err());
    }
}
