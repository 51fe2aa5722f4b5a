//! Asks the leader, over TCP, what a rejoining member has to know: its identity, timeline and history files, and whether it can be cloned.
//!
//! As the rewind user (or the superuser), whose password comes from a secret file. Asked after the local server was stopped, so that the
//! leader's position is not older than anything the local server received.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::sql::{Secret, Sql, SqlError, text};
use super::tablespaces::Tablespace;
use crate::policy::rejoin::{LeaderLineage, TimelineHistory};
use crate::types::TimelineId;

/// How to reach the leader's server.
#[derive(Debug, Clone)]
pub struct LeaderServer {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The rewind user, or the superuser.
    pub user: String,
    /// Its password.
    pub password: Secret,
}

/// What the leader said.
#[derive(Debug, Clone)]
pub struct LeaderFacts {
    /// For [`crate::policy::rejoin::decide`].
    pub lineage: LeaderLineage,
    /// The content of every history file it has, by timeline; also those that only reserve an id.
    pub history_files: BTreeMap<TimelineId, String>,
    /// Bytes of all databases; None when the user may not ask.
    pub database_bytes: Option<u64>,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
}

const IDENTITY: &str = "
select (select system_identifier::text from pg_control_system()) as system_id, current_setting('server_version_num') as version_num,
  (select timeline_id::text from pg_control_checkpoint()) as control_timeline, current_setting('full_page_writes') as full_page_writes,
  pg_is_in_recovery()::text as in_recovery,
  case when pg_is_in_recovery() then (select timeline_id::text from pg_control_checkpoint())
    else ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int::text end as timeline,
  case when pg_is_in_recovery() then pg_last_wal_replay_lsn()::text else pg_current_wal_insert_lsn()::text end as lsn";
const TABLESPACES: &str = "select oid::text as oid, spcname as name, pg_tablespace_location(oid) as location from pg_tablespace
  where spcname not in ('pg_default', 'pg_global') order by oid";
const TABLESPACE_BYTES: &str = "select oid::text as oid, pg_tablespace_size(oid)::text as bytes from pg_tablespace";
const HISTORY_NAMES: &str = "select name from pg_ls_dir('pg_wal') as name where name ~ '^[0-9A-F]{8}[.]history$' order by 1";
const HISTORY_CONTENT: &str = "select convert_from(pg_read_binary_file('pg_wal/' || $1::text), 'SQL_ASCII')";
const DATABASE_BYTES: &str = "select sum(pg_database_size(oid))::bigint::text as bytes from pg_database";

impl LeaderServer {
    /// Whether it takes a connection and answers on it.
    pub async fn answers(&self, limit: Duration) -> Result<(), SqlError> {
        let sql = Sql::remote(&self.host, self.port, &self.user, &self.password);
        sql.with(limit, async |connection| connection.execute("select").await).await
    }

    /// Has it make a checkpoint at once: after a promotion its own first one may be minutes away.
    pub async fn checkpoint(&self, limit: Duration) -> Result<(), SqlError> {
        Sql::remote(&self.host, self.port, &self.user, &self.password).checkpoint(limit).await
    }

    /// Asks it, all within `limit`.
    pub async fn look(&self, limit: Duration) -> Result<LeaderFacts, SqlError> {
        let sql = Sql::remote(&self.host, self.port, &self.user, &self.password);
        sql.with(limit, async |connection| {
            let row = connection.row(IDENTITY).await?;
            let mut history_files = BTreeMap::new();
            for row in connection.rows(HISTORY_NAMES).await? {
                let name = text(&row, "name")?;
                let timeline = u32::from_str_radix(&name[..8.min(name.len())], 16)
                    .map_err(|_| SqlError::Nonsense(format!("a history file called {name}")))?;
                let content = connection.query(HISTORY_CONTENT, &[name]).await?;
                let content = content.into_iter().flatten().flatten().next();
                history_files.insert(TimelineId(timeline), content.ok_or_else(|| SqlError::Nonsense(format!("{name} could not be read")))?);
            }
            let mut tablespaces = Vec::new();
            for row in connection.rows(TABLESPACES).await? {
                let (oid, name) = (text(&row, "oid")?.to_owned(), text(&row, "name")?.to_owned());
                let location = PathBuf::from(text(&row, "location")?);
                // One that PostgreSQL keeps in place is copied with the data directory.
                if location.is_absolute() {
                    tablespaces.push(Tablespace { oid, name, location, bytes: None });
                }
            }
            for row in connection.rows(TABLESPACE_BYTES).await.unwrap_or_default() {
                let (oid, bytes) = (text(&row, "oid")?, text(&row, "bytes")?.parse().ok());
                tablespaces.iter_mut().filter(|tablespace| tablespace.oid == oid).for_each(|tablespace| tablespace.bytes = bytes);
            }
            let bytes = connection.row(DATABASE_BYTES).await.ok();
            let database_bytes = bytes.and_then(|row| text(&row, "bytes").ok().and_then(|bytes| bytes.parse().ok()));
            let lineage = lineage(&row, &history_files)?;
            Ok(LeaderFacts { lineage, history_files, database_bytes, tablespaces })
        })
        .await
    }
}

fn lineage(row: &tokio_postgres::SimpleQueryRow, history_files: &BTreeMap<TimelineId, String>) -> Result<LeaderLineage, SqlError> {
    let nonsense = |what: &str| SqlError::Nonsense(format!("the leader's {what} makes no sense"));
    let timeline = TimelineId(text(row, "timeline")?.parse().map_err(|_| nonsense("timeline"))?);
    let history = match history_files.get(&timeline) {
        Some(content) => content.parse::<TimelineHistory>().map_err(|error| SqlError::Nonsense(error.to_string()))?,
        None if timeline == TimelineId(1) => TimelineHistory::default(),
        None => return Err(SqlError::Nonsense(format!("the leader has no {}", timeline.history_file_name()))),
    };
    let version: u32 = text(row, "version_num")?.parse().map_err(|_| nonsense("version"))?;
    let system_id: i64 = text(row, "system_id")?.parse().map_err(|_| nonsense("system identifier"))?;
    Ok(LeaderLineage {
        system_id: crate::types::SystemId(system_id.cast_unsigned()),
        major_version: version / 10_000,
        in_recovery: text(row, "in_recovery")? == "true",
        timeline,
        history,
        lsn: text(row, "lsn")?.parse().map_err(|_| nonsense("position"))?,
        control_timeline: TimelineId(text(row, "control_timeline")?.parse().map_err(|_| nonsense("control file"))?),
        full_page_writes: text(row, "full_page_writes")? == "on",
    })
}
