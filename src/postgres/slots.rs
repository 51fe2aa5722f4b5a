//! Replication slots: made, moved on and dropped as it is told. Decides nothing.

use std::time::Duration;

use super::sql::{Sql, SqlError};
use crate::policy::slots::Change;

/// Each on its own: one that fails, such as one that somebody uses just then, keeps no other from being seen to.
///
/// # Errors
/// The first that failed.
pub async fn keep(sql: &Sql, changes: &[Change], limit: Duration) -> Result<(), SqlError> {
    let mut first = Ok(());
    for change in changes {
        let done = one(sql, change, limit).await;
        first = first.and(done);
    }
    first
}

async fn one(sql: &Sql, change: &Change, limit: Duration) -> Result<(), SqlError> {
    match change {
        Change::CreatePhysical { name } => sql
            .with(limit, async |to| to.query("select pg_create_physical_replication_slot($1::text::name, true)::text", &[name]).await)
            .await
            .map(drop),
        Change::CreateLogical { name, database, plugin, failover } => {
            // The column came with the version that keeps logical slots through a failover.
            let statement = if *failover {
                "select pg_create_logical_replication_slot($1::text::name, $2::text::name, failover => true)::text"
            } else {
                "select pg_create_logical_replication_slot($1::text::name, $2::text::name)::text"
            };
            sql.of_database(database).with(limit, async |to| to.query(statement, &[name, plugin]).await).await.map(drop)
        }
        Change::Advance { name, to } => {
            let to_lsn = to.to_string();
            let statement = "select pg_replication_slot_advance($1::text::name, $2::text::pg_lsn)::text";
            sql.with(limit, async |to| to.query(statement, &[name, &to_lsn]).await).await.map(drop)
        }
        Change::Drop { name } => {
            let statement =
                "select pg_drop_replication_slot(slot_name)::text from pg_replication_slots where slot_name = $1::text and not active";
            sql.with(limit, async |to| to.query(statement, &[name]).await).await.map(drop)
        }
    }
}
