//! Asks the running server how it is, again and again. One question at a time; how often is the machine's to say.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::guard_link::Sink;
use super::host::Host;
use crate::machine::event::Event;

/// How long a server may take to answer before it counts as unknown.
const PROBE_TIMEOUT_MS: u64 = 2_000;

/// `None` = no server runs: nothing is asked.
pub type Pace = Option<Duration>;

/// Probes until the daemon ends.
pub async fn run(host: Arc<Host>, mut pace: watch::Receiver<Pace>, sink: Sink) {
    loop {
        let Some(every) = *pace.borrow_and_update() else {
            if pace.changed().await.is_err() {
                return;
            }
            continue;
        };
        if let Ok(settled) = host.settled() {
            sink(Event::Probed(settled.sql.probe(Duration::from_millis(PROBE_TIMEOUT_MS)).await));
        }
        // A change of pace is a change of role: look at once.
        if tokio::time::timeout(every, pace.changed()).await.is_ok_and(|changed| changed.is_err()) {
            return;
        }
    }
}
