//! Waiting, with a bound and an end when somebody presses Ctrl-C.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::super::cluster::LocalCluster;
use super::super::process::{wait_for, wait_for_every};
use super::super::status::Status;
use super::clients::Client;
use crate::clock::BootTime;

/// Rows that each client has to see acknowledged before a fault, and again after it and after the cluster is whole: 2 s of writing,
/// two rounds of HAProxy's checks.
const ROWS_AROUND: usize = 400;
/// How long writes, or the whole cluster, may take to come back, in milliseconds.
const RECOVERY_BOUND_MS: u64 = 180_000;
/// Time between two looks at the status, in milliseconds: each one is a process.
const STATUS_PAUSE_MS: u64 = 250;

/// Waits until it is so; `what` says what was not.
pub fn until(stop: &AtomicBool, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let so = wait_for(Duration::from_millis(RECOVERY_BOUND_MS), || stop.load(Ordering::SeqCst) || condition());
    judge(stop, so, what)
}

/// Waits until the cluster's status is as wanted.
pub fn until_status(cluster: &LocalCluster, stop: &AtomicBool, what: &str, wanted: impl Fn(&Status) -> bool) -> Result<()> {
    let mut last = None;
    let so = wait_for_every(Duration::from_millis(STATUS_PAUSE_MS), Duration::from_millis(RECOVERY_BOUND_MS), || {
        last = cluster.status().ok();
        stop.load(Ordering::SeqCst) || last.as_ref().is_some_and(&wanted)
    });
    judge(stop, so, what).with_context(|| format!("the last status: {last:?}"))
}

fn judge(stop: &AtomicBool, so: bool, what: &str) -> Result<()> {
    ensure!(!stop.load(Ordering::SeqCst), "interrupted");
    ensure!(so, "{what}, for {} s", RECOVERY_BOUND_MS / 1000);
    Ok(())
}

/// Waits until each of these clients has seen enough rows acknowledged since.
pub fn until_rows_flow(stop: &AtomicBool, clients: &[&Client], since: BootTime) -> Result<()> {
    for client in clients {
        until(stop, "no rows are acknowledged", || client.acknowledged_after(since) >= ROWS_AROUND).with_context(|| {
            let last = client.tried().pop().and_then(|tried| tried.failure).unwrap_or_else(|| "acknowledged".to_owned());
            format!("the client `{}`, whose last attempt ended so: {last}", client.name())
        })?;
    }
    Ok(())
}
