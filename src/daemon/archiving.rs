//! What a primary's archiver did not get to, as the operations that see to it.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::facts::archiving::Archived;
use crate::machine::action::Upstream;
use crate::postgres::data_directory;
use crate::postgres::unarchived::{self, Archiver};
use crate::spec::cluster::ClusterSpec;
use crate::types::Lsn;

use super::host::Host;

/// A question to the leader.
const LEADER_LIMIT: Duration = Duration::from_secs(10);

/// Before PostgreSQL becomes a standby, is rewound, or has a copy take its place.
pub async fn left(host: &Host, leader: &Upstream, spec: &ClusterSpec, shared: Option<Lsn>) -> anyhow::Result<Archived> {
    let asked = host.leader_server(leader)?.look(LEADER_LIMIT).await.context("asking the leader what belongs into the archive")?;
    ensure!(!asked.lineage.in_recovery, "the leader is in recovery: what belongs into the archive is not known");
    let control = data_directory::control_file(&host.settled()?.installation, &host.layout).await?;
    unarchived::archive_left(&host.layout, &control, &archiver(host, spec)?, &asked.lineage, shared).await
}

/// What was put beside, while PostgreSQL does whatever it does.
pub async fn beside(host: &Host, spec: &ClusterSpec) -> anyhow::Result<Archived> {
    unarchived::archive_beside(&host.layout, &archiver(host, spec)?).await
}

/// As this member's PostgreSQL is configured.
fn archiver(host: &Host, spec: &ClusterSpec) -> anyhow::Result<Archiver> {
    let parameters = [spec.postgres.member_parameters.get(&host.node.name), Some(&spec.postgres.parameters)];
    let library = parameters.into_iter().flatten().find_map(|parameters| parameters.get("archive_library"));
    Ok(match (library.cloned().flatten().filter(|library| !library.is_empty()), &spec.postgres.archive_command) {
        (Some(library), _) => Archiver::Nobody(format!("archive_library `{library}` is PostgreSQL's to run: archive these files by hand")),
        (None, Some(command)) => Archiver::Command(command.clone(), host.settled()?.installation.major),
        (None, None) => Archiver::Nobody("postgres.archive_command is not set".to_owned()),
    })
}
