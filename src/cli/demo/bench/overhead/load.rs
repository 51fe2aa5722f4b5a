//! Writers that commit as fast as they are answered, each over a connection of its own, all in one thread.
//!
//! They are the same for every server that is measured, and cost it the same. While one server's writers work, those of the other
//! are connected and silent.

use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, Config, NoTls, Statement};

use crate::clock::BootTime;

/// How long writers work before it counts, in milliseconds: by then all of them have been answered, and wait for the next answer.
const LEAD_IN_MS: u64 = 50;
/// How long counts, in milliseconds.
const SPAN_MS: u64 = 200;
/// How long connecting, or the last answers of a slice, may take, in milliseconds.
const PATIENCE_MS: u64 = 30_000;
const CREATE: &str = "CREATE TABLE IF NOT EXISTS pgherd_overhead (writer integer NOT NULL)";
const INSERT: &str = "INSERT INTO pgherd_overhead (writer) VALUES ($1)";

/// Writers that are connected.
pub struct Load {
    runtime: Runtime,
    sessions: Vec<(i32, Client, Statement)>,
}

/// What was acknowledged in a while.
#[derive(Debug, Clone, Default)]
pub struct Slice {
    /// The while, in seconds.
    pub seconds: f64,
    /// How long each commit took, from the order to the acknowledgement, in seconds.
    pub latencies_s: Vec<f64>,
}

impl Slice {
    /// The two as one.
    pub fn join(mut self, other: Slice) -> Slice {
        self.seconds += other.seconds;
        self.latencies_s.extend(other.latencies_s);
        self
    }
}

impl Load {
    /// Makes the table if it is not there, and connects so many writers.
    pub fn connect(config: &Config, writers: i32) -> Result<Load> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")?;
        let open = async |writer: i32| {
            let (client, connection) = config.connect(NoTls).await.context("connecting")?;
            tokio::spawn(connection);
            if writer == 0 {
                client.batch_execute(CREATE).await.context("making the table")?;
            }
            let insert = client.prepare(INSERT).await.context("preparing")?;
            anyhow::Ok((writer, client, insert))
        };
        let all = async {
            let mut sessions = Vec::new();
            for writer in 0..writers {
                sessions.push(open(writer).await?);
            }
            Ok(sessions)
        };
        let sessions = runtime.block_on(async { within(Duration::from_millis(PATIENCE_MS), all).await })?;
        Ok(Load { runtime, sessions })
    }

    /// Lets them write for a while.
    pub fn slice(&self) -> Result<Slice> {
        let from = BootTime::now() + Duration::from_millis(LEAD_IN_MS);
        let until = from + Duration::from_millis(SPAN_MS);
        let each = self.sessions.iter().map(|(writer, client, insert)| write(*writer, client, insert, from, until));
        let limit = Duration::from_millis(LEAD_IN_MS + SPAN_MS + PATIENCE_MS);
        let latencies = self.runtime.block_on(async { within(limit, try_join_all(each)).await })?;
        Ok(Slice { seconds: Duration::from_millis(SPAN_MS).as_secs_f64(), latencies_s: latencies.concat() })
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.with_context(|| format!("the server did not answer within {} s", limit.as_secs()))?
}

/// Counts what was acknowledged between `from` and `until`.
async fn write(writer: i32, client: &Client, insert: &Statement, from: BootTime, until: BootTime) -> Result<Vec<f64>> {
    let mut latencies = Vec::new();
    loop {
        let begun = BootTime::now();
        client.execute(insert, &[&writer]).await.context("writing")?;
        let ended = BootTime::now();
        if ended >= until {
            return Ok(latencies);
        }
        if ended >= from {
            latencies.push(ended.since(begun).as_secs_f64());
        }
    }
}
