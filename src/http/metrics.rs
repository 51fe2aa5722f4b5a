//! `/metrics`: Patroni's names with labels `scope` and `name`, and `pgherd_…` for what Patroni does not say.
//!
//! All of Patroni's are gauges, because the client library would add `_total` to a counter's name and dashboards would go blank. As
//! in Patroni, what is not known is 0: look at `patroni_postgres_running` first.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::facts::cluster::Severity;
use crate::facts::postgres::STREAMING;
use crate::http::answer::Moment;
use crate::http::snapshot::Snapshot;
use crate::http::{bodies, health};

/// The metrics in Prometheus' text form.
pub fn text(snapshot: &Snapshot, moment: Moment) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape { snapshot: Arc::new(snapshot.clone()), moment }));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Scrape {
    snapshot: Arc<Snapshot>,
    moment: Moment,
}

/// Writes one metric after another with the common labels.
struct Writer<'e, 's> {
    encoder: DescriptorEncoder<'e>,
    scope: &'s str,
    name: &'s str,
}

impl Writer<'_, '_> {
    fn gauge(&mut self, name: &str, help: &str, value: i64) -> fmt::Result {
        let labels = [("scope", self.scope), ("name", self.name)];
        self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_family(&labels)?.encode_gauge(&value)
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let labels = [("scope", self.scope), ("name", self.name)];
        self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_family(&labels)?.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let labels = [("scope", self.scope), ("name", self.name)];
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// One metric with a further label, one line per value of it.
    fn labelled<'v>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        label: &str,
        values: impl Iterator<Item = (&'v str, u64)>,
    ) -> fmt::Result {
        let counts = matches!(kind, MetricType::Counter);
        let mut metric = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (word, value) in values {
            let labels = [("scope", self.scope), ("name", self.name), (label, word)];
            let mut line = metric.encode_family(&labels)?;
            if counts {
                line.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            } else {
                line.encode_gauge(&signed(value))?;
            }
        }
        Ok(())
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer { encoder, scope: self.snapshot.cluster.as_str(), name: self.snapshot.member.as_str() };
        self.patroni_server(&mut writer)?;
        self.patroni_positions(&mut writer)?;
        self.patroni_cluster(&mut writer)?;
        self.own_gauges(&mut writer)?;
        self.own_counters(&mut writer)
    }
}

impl Scrape {
    fn patroni_server(&self, to: &mut Writer<'_, '_>) -> fmt::Result {
        let (snapshot, now) = (&*self.snapshot, self.moment.boot);
        let sql = snapshot.fresh_sql(now);
        let streaming = health::replication_state(snapshot, now) == Some(STREAMING);
        let from_archive = health::replication_state(snapshot, now) == Some("in archive recovery");
        let started = sql.and_then(|sql| unix_seconds(&sql.postmaster_start_time)).unwrap_or(0.0);
        to.gauge("patroni_version", "Version of the Patroni API that is spoken here", api_version())?;
        to.gauge("patroni_postgres_running", "1 if PostgreSQL runs", sql.is_some().into())?;
        to.seconds("patroni_postmaster_start_time", "Start of PostgreSQL, epoch seconds", started)?;
        to.gauge("patroni_postgres_timeline", "Timeline of PostgreSQL", sql.map_or(0, |sql| sql.timeline.0.into()))?;
        to.gauge("patroni_postgres_server_version", "Version of PostgreSQL", snapshot.server_version_num.unwrap_or(0).into())?;
        to.gauge("patroni_postgres_streaming", "1 if PostgreSQL streams from its upstream", streaming.into())?;
        to.gauge("patroni_postgres_in_archive_recovery", "1 if PostgreSQL replays, but does not stream", from_archive.into())?;
        to.gauge("patroni_postgres_state", "Patroni's number for the state", state_number(bodies::state_word(snapshot, self.moment)))
    }

    fn patroni_positions(&self, to: &mut Writer<'_, '_>) -> fmt::Result {
        let sql = self.snapshot.fresh_sql(self.moment.boot);
        let written = sql.filter(|sql| !sql.in_recovery).map_or(0, |sql| signed(sql.receive_lsn.0));
        let standby = sql.filter(|sql| sql.in_recovery);
        to.gauge("patroni_xlog_location", "WAL position of a primary, 0 otherwise", written)?;
        let received = standby.map_or(0, |sql| signed(sql.receive_lsn.0));
        to.gauge("patroni_xlog_received_location", "WAL position received by a standby, 0 otherwise", received)?;
        let replayed = standby.map_or(0, |sql| signed(sql.replay_lsn.0));
        to.gauge("patroni_xlog_replayed_location", "WAL position replayed by a standby, 0 otherwise", replayed)?;
        to.gauge("patroni_xlog_replayed_timestamp", "Time of the last replayed commit: not measured, always 0", 0)?;
        to.gauge("patroni_xlog_paused", "1 if replay is paused", standby.is_some_and(|sql| sql.replay_paused).into())
    }

    fn patroni_cluster(&self, to: &mut Writer<'_, '_>) -> fmt::Result {
        let (snapshot, now) = (&*self.snapshot, self.moment.boot);
        let primary = health::is_primary(snapshot, now);
        let replica = snapshot.fresh_sql(now).is_some_and(|sql| sql.in_recovery);
        let unlocked = snapshot.view.as_ref().is_none_or(|(_, view)| view.leader.is_none());
        to.gauge("patroni_primary", "1 if this member leads and PostgreSQL takes writes", primary.into())?;
        to.gauge("patroni_standby_leader", "1 if this member leads a standby cluster", 0)?;
        to.gauge("patroni_replica", "1 if PostgreSQL is a running standby", replica.into())?;
        let view = snapshot.view.as_ref().map(|(_, view)| view);
        let stands_by = view.and_then(|view| snapshot.synchronous_role(view, &snapshot.member)).filter(|_| replica);
        to.gauge("patroni_sync_standby", "1 if this member is a synchronous standby", (stands_by == Some("sync_standby")).into())?;
        to.gauge("patroni_quorum_standby", "1 if this member is a quorum standby", (stands_by == Some("quorum_standby")).into())?;
        to.gauge("patroni_cluster_unlocked", "1 if nobody holds the leader lock", unlocked.into())?;
        let without_etcd = snapshot.leads_without_etcd(now);
        to.gauge("patroni_failsafe_mode_is_active", "1 if this member leads although etcd cannot be asked", without_etcd.into())?;
        let seen = bodies::dcs_last_seen(snapshot, self.moment).unwrap_or(0);
        to.gauge("patroni_dcs_last_seen", "When etcd's state was last known to be current, epoch seconds", signed(seen))?;
        to.gauge("patroni_pending_restart", "1 if PostgreSQL waits for a restart", i64::from(!snapshot.pending_restart.is_empty()))?;
        to.gauge("patroni_is_paused", "1 in maintenance mode", snapshot.paused.into())
    }

    fn own_gauges(&self, to: &mut Writer<'_, '_>) -> fmt::Result {
        let (snapshot, now) = (&*self.snapshot, self.moment.boot);
        let left = |until: Option<crate::clock::BootTime>| until.map_or(0.0, |until| until.since(now).as_secs_f64());
        let lock = snapshot.lock;
        to.seconds(
            "pgherd_lock_seconds_left",
            "Until the leader lock ends unless it is renewed; 0 without it",
            left(lock.map(|l| l.valid_until)),
        )?;
        let announce = left(lock.map(|lock| lock.announce_at));
        to.seconds("pgherd_announce_seconds_left", "Until leader paths turn to 503 unless the lock is renewed; 0 without it", announce)?;
        to.gauge("pgherd_lock_epoch", "The leadership this member holds, 0 without one", lock.map_or(0, |lock| lock.identity.epoch.0))?;
        to.seconds("pgherd_state_age_seconds", "Age of the state that answers are made from", now.since(snapshot.taken).as_secs_f64())?;
        to.gauge("pgherd_etcd_reachable", "1 if etcd answers", snapshot.etcd_reachable.into())?;
        to.gauge("pgherd_declared", "1 if the spec names this member", snapshot.declared.into())?;
        to.gauge("pgherd_observed_generation", "The spec generation taken up", signed(snapshot.observed_generation))?;
        let copying = snapshot.copying.as_ref();
        let bytes = |part: Option<u64>| part.unwrap_or(0);
        let parts = [("done", bytes(copying.and_then(|it| it.done_bytes))), ("total", bytes(copying.and_then(|it| it.total_bytes)))];
        let help = "Bytes of the copy, or the rewind, that is being made for this member; 0 without one";
        to.labelled("pgherd_copy_bytes", help, MetricType::Gauge, "part", parts.into_iter())?;
        let severities = [("info", Severity::Info), ("warning", Severity::Warning), ("error", Severity::Error)];
        let conditions =
            severities.map(|(word, severity)| (word, snapshot.conditions.iter().filter(|c| c.severity == severity).count() as u64));
        to.labelled("pgherd_conditions", "What is in the way of the spec here", MetricType::Gauge, "severity", conditions.into_iter())?;
        to.labelled(
            "pgherd_machine_state",
            "1 for the state the machine is in",
            MetricType::Gauge,
            "state",
            [(&*snapshot.machine_state, 1)].into_iter(),
        )
    }

    fn own_counters(&self, to: &mut Writer<'_, '_>) -> fmt::Result {
        let counters = &self.snapshot.counters;
        to.counter("pgherd_promotions", "Times this member became primary", counters.promotions)?;
        let demotions = counters.demotions.iter().map(|(reason, count)| (reason.as_str(), *count));
        to.labelled("pgherd_demotions", "Times this member left being primary", MetricType::Counter, "reason", demotions)?;
        to.counter("pgherd_renewals", "Renewals of the lease that were proved", counters.renewals)?;
        to.counter("pgherd_renewal_failures", "Renewals that failed or were not proved in time", counters.renewal_failures)
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// `4.1.0` is 40100, as Patroni prints it.
fn api_version() -> i64 {
    bodies::PATRONI_API_VERSION.split('.').fold(0, |number, part| number * 100 + part.parse::<i64>().unwrap_or(0))
}

/// `patroni_postgres_state` (Patroni 4.1, `PostgresqlState`).
fn state_number(word: &str) -> i64 {
    match word {
        "initializing new cluster" => 0,
        "initdb failed" => 1,
        "running custom bootstrap script" => 2,
        "custom bootstrap failed" => 3,
        "creating replica" => 4,
        "running" => 5,
        "starting" => 6,
        "starting after custom bootstrap" => 7,
        "start failed" => 8,
        "restarting" => 9,
        "restart failed" => 10,
        "stopping" => 11,
        "stopped" => 12,
        "stop failed" => 13,
        "crashed" => 14,
        _ => -1,
    }
}

/// PostgreSQL's `2026-11-22 12:00:00.5+00` (ISO DateStyle) as epoch seconds. Days by Howard Hinnant's `days_from_civil`.
fn unix_seconds(text: &str) -> Option<f64> {
    let (date, rest) = text.split_once([' ', 'T'])?;
    let zone_at = rest.find(['+', '-', 'Z']).unwrap_or(rest.len());
    let (time, zone) = rest.split_at(zone_at);
    let mut date = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':').map(|part| part.parse::<f64>().ok());
    let seconds = time.next()?? * 3600.0 + time.next()?? * 60.0 + time.next()??;
    let sign = if zone.starts_with('-') { -1.0 } else { 1.0 };
    let mut zone = zone.trim_start_matches(['+', '-', 'Z']).split(':').map(|part| part.parse::<f64>().unwrap_or(0.0));
    let offset = sign * (zone.next().unwrap_or(0.0) * 3600.0 + zone.next().unwrap_or(0.0) * 60.0);
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    #[allow(clippy::cast_precision_loss)]
    Some(days as f64 * 86_400.0 + seconds - offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresqls_timestamps_become_epoch_seconds() {
        let cases = [
            ("1970-01-01 00:00:00+00", 0.0),
            ("2000-02-29 12:00:00.5+00", 951_825_600.5),
            ("2026-11-22 14:52:30+02", 1_795_351_950.0),
            ("2026-11-22 07:22:30-05:30", 1_795_351_950.0),
        ];
        for (text, seconds) in cases {
            assert_eq!(unix_seconds(text), Some(seconds), "{text}");
        }
        assert_eq!(unix_seconds("yesterday"), None);
    }

    #[test]
    fn the_api_version_is_a_number_as_patroni_prints_it() {
        assert_eq!(api_version(), 40100);
    }
}
