//! The probe: one question over a connection that stays open, once per tick, within a limit.
//!
//! The timeline of a server in recovery is nowhere to be asked directly: the walreceiver says which one it receives, but it is gone just
//! when the primary is, which is when it matters; the control file lags behind until the next restartpoint. The newest of both, and of
//! the WAL segments that lie in pg_wal while no walreceiver runs, is the lineage this server's WAL ends on: a segment of a timeline is
//! made when the first byte of that timeline is received or restored, and diverged ones are removed at the switch.
//!
//! The question is planned once per connection: planning it takes several times what answering it does, and while a role changes it is
//! asked every 20 ms on every member.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use tokio_postgres::SimpleQueryRow;

use super::sql::{Connection, Sql, SqlError, from_json, maybe, text};
use crate::clock::BootTime;
use crate::facts::postgres::{Probe, ProbeOutcome, ReplicaFacts, SlotFacts, SqlFacts, WalReceiverFacts};
use crate::types::{Lsn, TimelineId};

/// The probe's connection, between probes.
#[derive(Default)]
pub struct ProbeConnection(Option<Connection>);

/// All in one row, as text, and in this order, since columns are worked out one after the other: that nothing is received any more and that
/// everything was replayed comes before the positions. The other way round, what came or was replayed between the two would be missing from a
/// position that counts as the last one. `r` keeps the answer to "in recovery?" the same throughout, so that a promotion in the middle gives
/// an error and not a mixture. Works from PostgreSQL 13 to 18.
const QUESTION: &str = "
with r as materialized (select pg_is_in_recovery() as rec),
w as materialized (select * from pg_stat_wal_receiver),
c as materialized (select timeline_id as tli from pg_control_checkpoint()),
m as materialized (select min_recovery_end_timeline as tli from pg_control_recovery())
select r.rec::text as in_recovery,
  (select status from w) as receiver_status, (select sender_host from w) as sender_host, (select sender_port::text from w) as sender_port,
  (select latest_end_lsn::text from w) as latest_end_lsn,
  (select pid || ' ' || backend_start from pg_stat_activity where backend_type = 'startup') as startup,
  exists (select from pg_stat_activity where backend_type = 'walreceiver')::text as receives,
  exists (select from pg_stat_activity where backend_type = 'startup' and wait_event in ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval'))::text as replayed_all,
  case when r.rec then pg_last_wal_receive_lsn()::text end as receive_lsn,
  case when r.rec then pg_last_wal_replay_lsn()::text end as replay_lsn,
  case when r.rec then null else pg_current_wal_lsn()::text end as write_lsn,
  case when r.rec then null else left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) end as insert_tli,
  case when r.rec then pg_is_wal_replay_paused()::text end as paused,
  c.tli::text as checkpoint_tli, m.tli::text as min_recovery_tli,
  (select received_tli::text from w) as received_tli,
  case when r.rec and not exists (select from w) then (select left(max(name), 8) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$') end as segment_tli,
  (select coalesce(json_agg(json_build_object('application_name', application_name, 'state', coalesce(state, ''), 'client_addr', host(client_addr),
     'sent_lsn', sent_lsn, 'flush_lsn', flush_lsn, 'replay_lsn', replay_lsn, 'sync_state', coalesce(sync_state, ''),
     'sync_priority', coalesce(sync_priority, 0))), '[]')::text from pg_stat_replication) as replicas,
  case when r.rec then null else pg_current_wal_lsn()::text end as written_by_then,
  current_setting('synchronous_standby_names') as names,
  (select coalesce(json_agg(coalesce(o.rolname, 'every role') || ' in ' || coalesce(d.datname, 'every database')), '[]')::text
     from pg_db_role_setting s left join pg_roles o on o.oid = s.setrole left join pg_database d on d.oid = s.setdatabase
     where exists (select from unnest(s.setconfig) c where c ~* '^synchronous_commit=' and c !~* '=(on|true|yes|1|remote_apply)$')) as lowered,
  (select coalesce(json_agg(to_json(s)), '[]')::text from pg_replication_slots s where not temporary) as slots,
  (select coalesce(json_agg(name order by name), '[]')::text from pg_settings where pending_restart) as pending_restart,
  (select coalesce(json_agg(name order by name), '[]')::text from pg_settings where setting = 'off' and (name = 'full_page_writes'
     or name in ('data_checksums', 'wal_log_hints') and 'on' not in (current_setting('data_checksums'), current_setting('wal_log_hints'))))
     as no_rewind,
  (split_part(pg_read_file('postmaster.pid'), E'\\n', 8) like 'stopping%')::text as stopping,
  current_setting('server_version_num') as version_num, pg_postmaster_start_time()::text as started,
  (select (system_identifier)::text from pg_control_system()) as system_id
from r, c, m";

impl Sql {
    /// Asks the server how it is. Never fails: what is not known is said to be unknown.
    pub async fn probe(&self, limit: Duration) -> Probe {
        let begun = BootTime::now();
        let asked = tokio::time::timeout(limit, async {
            let mut kept = self.probing.lock().await;
            // Taken out while it is in use: if this future is dropped or fails, the connection goes with it.
            let connection = kept.0.take().filter(|connection| !connection.is_closed());
            let reused = connection.is_some();
            let mut answer = self.ask(connection).await;
            if reused && answer.is_err() {
                // The server may have been restarted behind the kept connection.
                answer = self.ask(None).await;
            }
            let (connection, facts) = answer?;
            kept.0 = Some(connection);
            Ok(facts)
        });
        let outcome = match asked.await {
            Ok(Ok(facts)) => ProbeOutcome::Accepting(Box::new(facts)),
            Ok(Err(SqlError::NotYet(why))) => ProbeOutcome::NotYet(why),
            Ok(Err(error)) => ProbeOutcome::Unknown(error.to_string()),
            Err(_) => ProbeOutcome::Unknown(format!("no answer within {} ms", limit.as_millis())),
        };
        Probe { begun, outcome }
    }

    async fn ask(&self, connection: Option<Connection>) -> Result<(Connection, SqlFacts), SqlError> {
        let connection = match connection {
            Some(connection) => connection,
            None => {
                let connection = self.open().await?;
                connection.execute(&format!("prepare probe as {QUESTION}")).await?;
                connection
            }
        };
        let row = connection.row("execute probe").await?;
        let facts = read(&row)?;
        Ok((connection, facts))
    }
}

/// A row of pg_stat_replication as JSON.
#[derive(Deserialize)]
struct ReplicaRow {
    application_name: String,
    state: String,
    client_addr: Option<String>,
    sent_lsn: Option<Lsn>,
    flush_lsn: Option<Lsn>,
    replay_lsn: Option<Lsn>,
    sync_state: String,
    sync_priority: u32,
}

fn read(row: &SimpleQueryRow) -> Result<SqlFacts, SqlError> {
    let in_recovery = text(row, "in_recovery")? == "true";
    let (receive_lsn, replay_lsn) = if in_recovery {
        (parsed(row, "receive_lsn")?.unwrap_or_default(), parsed(row, "replay_lsn")?.unwrap_or_default())
    } else {
        let write: Lsn = required(row, "write_lsn")?;
        (write, write)
    };
    let json = |column| text(row, column);
    let replicas: Vec<ReplicaRow> = from_json(json("replicas")?)?;
    Ok(SqlFacts {
        in_recovery,
        timeline: timeline(row, in_recovery)?,
        receive_lsn,
        replay_lsn,
        startup: maybe(row, "startup")?.unwrap_or_default().to_owned(),
        receives: maybe(row, "receives")? == Some("true"),
        replayed_all: in_recovery && maybe(row, "replayed_all")? == Some("true"),
        replay_paused: maybe(row, "paused")? == Some("true"),
        walreceiver: maybe(row, "receiver_status")?
            .map(|status| -> Result<_, SqlError> {
                Ok(WalReceiverFacts {
                    status: status.to_owned(),
                    sender_host: maybe(row, "sender_host")?.map(str::to_owned),
                    sender_port: maybe(row, "sender_port")?.and_then(|port| port.parse().ok()),
                    latest_end_lsn: parsed(row, "latest_end_lsn")?,
                })
            })
            .transpose()?,
        replicas: replicas.into_iter().map(ReplicaFacts::from).collect(),
        written_by_then: parsed(row, "written_by_then")?.unwrap_or_default(),
        synchronous_standby_names: text(row, "names")?.to_owned(),
        lowered: from_json(json("lowered")?)?,
        slots: from_json::<Vec<SlotRow>>(json("slots")?)?.into_iter().map(SlotFacts::from).collect(),
        pending_restart: from_json(json("pending_restart")?)?,
        no_rewind: from_json(json("no_rewind")?)?,
        stopping: maybe(row, "stopping")? == Some("true"),
        server_version_num: required(row, "version_num")?,
        postmaster_start_time: text(row, "started")?.to_owned(),
        // int8 in the view, unsigned in the control file.
        system_id: crate::types::SystemId(required::<i64>(row, "system_id")?.cast_unsigned()),
    })
}

impl From<ReplicaRow> for ReplicaFacts {
    fn from(row: ReplicaRow) -> Self {
        let ReplicaRow { application_name, state, client_addr, sent_lsn, flush_lsn, replay_lsn, sync_state, sync_priority } = row;
        Self { application_name, state, client_addr, sent_lsn, flush_lsn, replay_lsn, sync_state, sync_priority }
    }
}

/// A row of pg_replication_slots as JSON: its columns differ from version to version.
#[derive(Deserialize)]
struct SlotRow {
    slot_name: String,
    slot_type: String,
    active: bool,
    restart_lsn: Option<Lsn>,
    wal_status: Option<String>,
    safe_wal_size: Option<i64>,
    #[serde(default)]
    synced: bool,
}

impl From<SlotRow> for SlotFacts {
    fn from(row: SlotRow) -> Self {
        let SlotRow { slot_name, slot_type, active, restart_lsn, wal_status, safe_wal_size, synced } = row;
        Self { name: slot_name, logical: slot_type == "logical", active, restart_lsn, wal_status, safe_wal_size, synced }
    }
}

fn timeline(row: &SimpleQueryRow, in_recovery: bool) -> Result<TimelineId, SqlError> {
    let hexadecimal = |column| -> Result<Option<u32>, SqlError> {
        let digits = maybe(row, column)?;
        digits
            .map(|digits| u32::from_str_radix(digits, 16).map_err(|_| SqlError::Nonsense(format!("`{column}` is `{digits}`"))))
            .transpose()
    };
    let seen = if in_recovery {
        let control = parsed::<u32>(row, "checkpoint_tli")?.max(parsed(row, "min_recovery_tli")?);
        control.max(parsed(row, "received_tli")?).max(hexadecimal("segment_tli")?)
    } else {
        hexadecimal("insert_tli")?
    };
    seen.filter(|id| *id > 0).map(TimelineId).ok_or_else(|| SqlError::Nonsense("no timeline".to_owned()))
}

fn parsed<T: FromStr>(row: &SimpleQueryRow, column: &str) -> Result<Option<T>, SqlError> {
    maybe(row, column)?.map(|value| value.parse().map_err(|_| SqlError::Nonsense(format!("`{column}` is `{value}`")))).transpose()
}

fn required<T: FromStr>(row: &SimpleQueryRow, column: &str) -> Result<T, SqlError> {
    parsed(row, column)?.ok_or_else(|| SqlError::Nonsense(format!("`{column}` is null")))
}

#[cfg(test)]
mod tests {
    use super::QUESTION;

    /// What a final position is believed on (`is_last_word` in the machine's rules) must have been true before the position was read.
    #[test]
    fn that_nothing_more_comes_is_asked_before_how_far_it_came() {
        let at = |column: &str| QUESTION.find(&format!(" as {column}")).unwrap_or_else(|| panic!("{column}"));
        for settled in ["receiver_status", "receives", "startup", "replayed_all"] {
            for position in ["receive_lsn", "replay_lsn", "segment_tli"] {
                assert!(at(settled) < at(position), "{settled} is asked after {position}");
            }
        }
    }
}
