//! The failover drill: writes through HAProxy all the while, breaks the primary twice, and tells what it cost.
//!
//! It passes only when every acknowledged row is there, once, and one primary with all others streaming is left: commits wait for a
//! standby (`quorum`), so that no acknowledged one may be lost, on whichever side of a switch point it lies (P2).

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use tokio_postgres::{Config, NoTls};

use super::cluster::LocalCluster;
use super::ledger::{Acknowledged, RowKey, Verdict, judge, switch_points};
use super::process::wait_for;
use super::runtime::{block_on, in_own_thread};
use super::writer::{Attempt, Outcome, TABLE, Writer};
use crate::clock::BootTime;
use crate::types::TimelineId;

/// Time from one row to the next, in milliseconds.
const ROW_INTERVAL_MS: u64 = 10;
/// After how long an attempt is given up as unknown, in milliseconds.
const ROW_LIMIT_MS: u64 = 2_000;
/// Limit of a connection attempt, in milliseconds.
const CONNECT_LIMIT_MS: u64 = 1_000;
/// Rows to see acknowledged before and after each fault.
const ROWS_BETWEEN: usize = 300;
/// How long writes and the whole cluster may take to come back, in milliseconds.
const RECOVERY_BOUND_MS: u64 = 120_000;
/// Lost rows that are shown of each kind.
const ROWS_SHOWN: usize = 10;
/// The client's name in the ledger.
const CLIENT: &str = "drill";

/// The attempts so far.
type Log = Arc<Mutex<Vec<Attempt>>>;

/// Runs the drill. True when it passed.
pub fn failover(cluster: &LocalCluster, stop: &AtomicBool) -> Result<bool> {
    let write_port = cluster.plan.frontends.context("the drill needs HAProxy")?.write;
    let log = Log::default();
    let done = Arc::new(AtomicBool::new(false));
    let config = cluster.connection(write_port)?;
    let writer = {
        let (log, done) = (Arc::clone(&log), Arc::clone(&done));
        std::thread::spawn(move || block_on(async move { write_rows(&config, &log, &done).await }))
    };
    let result = faults(cluster, &log, stop);
    done.store(true, Ordering::SeqCst);
    writer.join().ok().context("the writer panicked")??;
    result?;
    let verdict = verdict(cluster, &log)?;
    let whole = has_one_primary_and_the_rest_streams(cluster)?;
    report(&verdict);
    if !whole {
        println!("that is NOT one primary with all others streaming");
    }
    Ok(whole && holds_all(&verdict))
}

/// The two faults, in order, each told with its interruption.
fn faults(cluster: &LocalCluster, log: &Log, stop: &AtomicBool) -> Result<()> {
    more_rows(log, stop)?;
    let (name, index) = leader(cluster)?;
    let postmaster = cluster.postmaster(index).with_context(|| format!("{name} leads, but its postmaster is not there"))?;
    let begun = BootTime::now();
    postmaster.signal(Signal::SIGKILL);
    settle(cluster, log, stop, begun, &format!("{name}: SIGKILL to the postmaster of the primary"))?;

    let (name, index) = leader(cluster)?;
    let begun = BootTime::now();
    cluster.cut_power(index);
    more_rows(log, stop)?;
    cluster.start_node(index)?;
    settle(cluster, log, stop, begun, &format!("{name}: SIGKILL to daemon, guard and PostgreSQL of the primary"))
}

/// Waits until rows flow and the cluster is whole again, then prints what the fault cost.
fn settle(cluster: &LocalCluster, log: &Log, stop: &AtomicBool, begun: BootTime, what: &str) -> Result<()> {
    more_rows(log, stop)?;
    let durable = cluster.wait_until_durable(Duration::from_millis(RECOVERY_BOUND_MS), || stop.load(Ordering::SeqCst));
    ensure!(!stop.load(Ordering::SeqCst), "interrupted");
    ensure!(
        durable,
        "after `{what}` the cluster was not whole again, with commits that wait for both standbys, within {} s",
        RECOVERY_BOUND_MS / 1000
    );
    more_rows(log, stop)?;
    let status = cluster.status()?;
    println!(
        "{what}\n    writes interrupted for {:.3} s; now {} leads on timeline {}",
        longest_gap(log, begun).as_secs_f64(),
        status.leader.as_deref().unwrap_or("nobody"),
        status.timeline.map_or("?".into(), |timeline| timeline.to_string()),
    );
    Ok(())
}

fn attempts(log: &Log) -> std::sync::MutexGuard<'_, Vec<Attempt>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn acknowledged_count(log: &Log) -> usize {
    attempts(log).iter().filter(|attempt| matches!(attempt.outcome, Outcome::Acknowledged { .. })).count()
}

fn more_rows(log: &Log, stop: &AtomicBool) -> Result<()> {
    let before = acknowledged_count(log);
    let bound = Duration::from_millis(RECOVERY_BOUND_MS);
    let enough = wait_for(bound, || stop.load(Ordering::SeqCst) || acknowledged_count(log) >= before + ROWS_BETWEEN);
    ensure!(!stop.load(Ordering::SeqCst), "interrupted");
    if !enough {
        let last = attempts(log).last().map_or("nothing was tried".into(), |attempt| format!("{:?}", attempt.outcome));
        bail!("no {ROWS_BETWEEN} rows were acknowledged within {} s; the last attempt: {last}", RECOVERY_BOUND_MS / 1000);
    }
    Ok(())
}

/// The longest time between two acknowledgements that ends after `since`.
fn longest_gap(log: &Log, since: BootTime) -> Duration {
    let attempts = attempts(log);
    let mut times: Vec<BootTime> =
        attempts.iter().filter(|attempt| matches!(attempt.outcome, Outcome::Acknowledged { .. })).map(|attempt| attempt.ended).collect();
    times.sort();
    times.windows(2).filter(|pair| pair[1] > since).map(|pair| pair[1].since(pair[0])).max().unwrap_or_default()
}

/// Who leads, by name and place in the plan.
pub(super) fn leader(cluster: &LocalCluster) -> Result<(String, usize)> {
    let name = cluster.status()?.leader.context("nobody leads")?;
    let index = cluster.index_of(&name).with_context(|| format!("{name} leads and is not one of ours"))?;
    Ok((name, index))
}

/// One row each interval over one connection; a new one as soon as that breaks.
async fn write_rows(config: &Config, log: &Log, done: &AtomicBool) -> Result<()> {
    let mut connection = None;
    let mut table = false;
    let mut seq = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(ROW_INTERVAL_MS));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let limit = Duration::from_millis(CONNECT_LIMIT_MS);
    while !done.load(Ordering::SeqCst) {
        tick.tick().await;
        if !table {
            table = Writer::create_table(config, limit).await.is_ok();
            continue;
        }
        let Some(writer) = &connection else {
            connection = Writer::connect(config, limit).await.ok();
            continue;
        };
        seq += 1;
        let begun = BootTime::now();
        let attempt = tokio::time::timeout(Duration::from_millis(ROW_LIMIT_MS), writer.insert(CLIENT, seq, "haproxy")).await;
        let too_late = Outcome::Unknown(format!("no answer within {ROW_LIMIT_MS} ms"));
        let attempt = attempt.unwrap_or(Attempt { seq, begun, ended: BootTime::now(), outcome: too_late });
        if !matches!(attempt.outcome, Outcome::Acknowledged { .. }) {
            connection = None;
        }
        attempts(log).push(attempt);
    }
    Ok(())
}

/// Compares what was acknowledged with what the present primary holds.
fn verdict(cluster: &LocalCluster, log: &Log) -> Result<Verdict> {
    let (_, index) = leader(cluster)?;
    let config = cluster.connection(cluster.plan.nodes[index].declared.port)?;
    let (found, timeline) = in_own_thread(async move { read_ledger(&config).await })?;
    let file = cluster.data_dir(index).join("pg_wal").join(timeline.history_file_name());
    // The first timeline has no history file, and nothing was left.
    let history =
        if timeline.0 > 1 { fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))? } else { String::new() };
    let acks: Vec<Acknowledged> = attempts(log).iter().filter_map(acknowledged).collect();
    Ok(judge(&acks, &found, timeline, &switch_points(&history)))
}

fn acknowledged(attempt: &Attempt) -> Option<Acknowledged> {
    match attempt.outcome {
        Outcome::Acknowledged { timeline, position } => Some(Acknowledged { row: (CLIENT.to_owned(), attempt.seq), timeline, position }),
        Outcome::Failed(_) | Outcome::Unknown(_) => None,
    }
}

/// Every row with how often it is there, and the server's timeline.
pub async fn read_ledger(config: &Config) -> Result<(BTreeMap<RowKey, u64>, TimelineId)> {
    let (client, connection) = config.connect(NoTls).await.context("connecting to the primary")?;
    tokio::spawn(connection);
    let file: String =
        client.query_one("SELECT pg_walfile_name(pg_current_wal_lsn())", &[]).await.context("asking for the timeline")?.get(0);
    let timeline = u32::from_str_radix(file.get(..8).unwrap_or_default(), 16).context("reading the timeline")?;
    let mut found = BTreeMap::new();
    for row in client.query(&format!("SELECT client, seq FROM {TABLE}"), &[]).await.context("reading the rows")? {
        *found.entry((row.get(0), row.get(1))).or_insert(0) += 1;
    }
    Ok((found, TimelineId(timeline)))
}

/// By the servers' own word, not by pgherd's.
fn has_one_primary_and_the_rest_streams(cluster: &LocalCluster) -> Result<bool> {
    let mut primaries = Vec::new();
    for node in &cluster.plan.nodes {
        let config = cluster.connection(node.declared.port)?;
        let standbys = in_own_thread(async move { streaming(&config).await });
        let standbys = standbys.with_context(|| format!("asking {}", node.declared.name))?;
        primaries.extend(standbys.map(|standbys| (&node.declared.name, standbys)));
    }
    let whole = primaries.len() == 1 && primaries[0].1.len() + 1 == cluster.plan.nodes.len();
    let told: Vec<String> = primaries.iter().map(|(name, standbys)| format!("{name} (to {})", standbys.join(", "))).collect();
    println!("primary and whom it streams to: {}", told.join(" AND "));
    Ok(whole)
}

/// The standbys that stream from this server; None when it is a standby itself.
async fn streaming(config: &Config) -> Result<Option<Vec<String>>> {
    let (client, connection) = config.connect(NoTls).await.context("connecting")?;
    tokio::spawn(connection);
    let sql =
        "SELECT pg_is_in_recovery(), (SELECT array_agg(application_name ORDER BY 1) FROM pg_stat_replication WHERE state = 'streaming')";
    let row = client.query_one(sql, &[]).await.context("asking for the standbys")?;
    Ok((!row.get::<_, bool>(0)).then(|| row.get::<_, Option<Vec<String>>>(1).unwrap_or_default()))
}

/// With `quorum` no acknowledged row may be lost, and none is there twice.
fn holds_all(verdict: &Verdict) -> bool {
    verdict.missing.is_empty() && verdict.beyond.is_empty() && verdict.duplicates.is_empty()
}

fn report(verdict: &Verdict) {
    println!("rows acknowledged {}, found {}", verdict.acknowledged, verdict.found);
    let lost = verdict.missing.len() + verdict.beyond.len();
    println!("rows acknowledged and lost {lost}, there twice {}", verdict.duplicates.len());
    for (place, rows) in [("where the history went on", &verdict.missing), ("beyond a switch point", &verdict.beyond)] {
        for ack in rows.iter().take(ROWS_SHOWN) {
            println!("    lost {place}: {ack:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Lsn;

    #[test]
    fn the_drill_fails_when_an_acknowledged_row_is_lost_on_either_side_of_a_switch_point() {
        let ack = |seq, position| Acknowledged { row: (CLIENT.to_owned(), seq), timeline: TimelineId(1), position: Some(Lsn(position)) };
        let verdict = |position| {
            let found = [((CLIENT.to_owned(), 1), 1)].into();
            judge(&[ack(1, 0x1000), ack(2, position)], &found, TimelineId(2), &switch_points("1\t0/3000\tno recovery target specified\n"))
        };
        let (below, beyond) = (verdict(0x2000), verdict(0x4000));
        assert_eq!((below.missing.len(), beyond.beyond.len()), (1, 1));
        assert!(!holds_all(&below) && !holds_all(&beyond));
        assert!(holds_all(&judge(&[ack(1, 1)], &[((CLIENT.to_owned(), 1), 1)].into(), TimelineId(2), &Default::default())));
    }
}
