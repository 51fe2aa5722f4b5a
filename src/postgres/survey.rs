//! What a stop of the primary would cut off or leave behind.

use std::time::Duration;

use super::sql::{Sql, SqlError, from_json, maybe, text};
use crate::facts::postgres::{Archiver, Survey};

/// Transactions that are open for less are not worth a word: most end by themselves before the stop.
const LONG_TRANSACTION_S: u32 = 10;
/// How many are named.
const NAMED_MAX: u32 = 5;

impl Sql {
    /// Asks the primary what is under way on it.
    ///
    /// # Errors
    /// When there is no answer, or one that makes no sense.
    pub async fn survey(&self, limit: Duration) -> Result<Survey, SqlError> {
        let question = format!(
            "select
  (select coalesce(json_agg(t), '[]')::text from (
     select pid, application_name, coalesce(state, 'of unknown state') as state,
       extract(epoch from clock_timestamp() - xact_start)::bigint as seconds
     from pg_stat_activity
     where backend_type = 'client backend' and xact_start < clock_timestamp() - interval '{LONG_TRANSACTION_S} s'
     order by xact_start limit {NAMED_MAX}) t) as transactions,
  (select coalesce(json_agg(coalesce(nullif(a.application_name, ''), 'somebody') || ' from ' || coalesce(host(a.client_addr), 'this host')
     || ', pid ' || b.pid), '[]')::text
     from pg_stat_progress_basebackup b left join pg_stat_activity a on a.pid = b.pid) as base_backups,
  case when current_setting('archive_mode') <> 'off' then
    (select json_build_object('failing', coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false),
       'ready', (select count(*) from pg_ls_archive_statusdir() where name like '%.ready'))::text from pg_stat_archiver) end as archiver"
        );
        let row = self.with(limit, async |connection| connection.row(&question).await).await?;
        let archiver: Option<Archiver> = maybe(&row, "archiver")?.map(from_json).transpose()?;
        Ok(Survey {
            transactions: from_json(text(&row, "transactions")?)?,
            base_backups: from_json(text(&row, "base_backups")?)?,
            archiver,
        })
    }
}
