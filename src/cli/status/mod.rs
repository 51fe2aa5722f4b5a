//! `pgherd status`: reads etcd, makes the report, prints it. The report itself is pure, see [`report`].

pub mod report;
pub mod table;
#[cfg(test)]
pub(crate) mod testing;

use std::io::IsTerminal;
use std::time::Duration;

use crate::cli::connect::{self, block_on};
use crate::cli::exit::{DONE, FAILED, Failure, Outcome};
use crate::cli::output::{print, print_json, tell};
use crate::cli::{Connection, OutputFormat};
use crate::clock::wall_clock;
use crate::etcd::Etcd;
use crate::facts::cluster::SpecRecord;
use crate::spec::cluster;
use crate::spec::unbuilt;
use report::{Declared, StatusReport, Wanted, report};

/// Clears a terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// `pgherd status`.
pub fn status(connection: &Connection, format: OutputFormat, check: bool, watch: Option<Duration>) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let Some(interval) = watch else {
            let report = read(&etcd).await?;
            show(&report, format, "")?;
            return Ok(if check && !report.is_ready() { FAILED } else { DONE });
        };
        let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
        loop {
            match read(&etcd).await {
                Ok(report) => show(&report, format, clear)?,
                // Whoever watches wants to see it come back.
                Err(failure) => tell(&format!("pgherd: {:#}", failure.error)),
            }
            tokio::time::sleep(interval).await;
        }
    })
}

/// The table for people, as of now.
pub(crate) async fn table_now(etcd: &Etcd) -> Result<String, Failure> {
    Ok(table::text(&read(etcd).await?))
}

async fn read(etcd: &Etcd) -> Result<StatusReport, Failure> {
    let view = etcd.read_view().await?;
    let wanted = view.spec.as_ref().and_then(wanted);
    Ok(report(&etcd.settings().cluster, &view, wanted.as_ref(), wall_clock()))
}

fn show(report: &StatusReport, format: OutputFormat, clear: &str) -> Result<(), Failure> {
    match format {
        OutputFormat::Json => print_json(report),
        OutputFormat::Table => print(&format!("{clear}{}", table::text(report))),
    }
    .map(|_| ())
}

/// What the applied document says; None when it cannot be read.
fn wanted(record: &SpecRecord) -> Option<Wanted> {
    let spec = cluster::load("the document in force", &record.document).ok()?.spec;
    let declared = |member: &cluster::Member| Declared { name: member.name.clone(), host: format!("{}:{}", member.address, member.port) };
    Some(Wanted {
        members: spec.members.iter().map(declared).collect(),
        maximum_lag_on_failover: spec.ha.maximum_lag_on_failover,
        mode: spec.replication.mode,
        conditions: unbuilt::conditions(&spec),
    })
}
