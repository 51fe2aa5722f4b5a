//! Inserts one row at a time and tells how certain its fate is.
//!
//! The rule that would surprise: an error is a definite failure only when the server said so in an ERROR, which aborts. A broken
//! connection, a FATAL, a time limit or a warning on the way leave the row's fate open: the commit may have been made.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::future::join;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Statement};

use crate::clock::BootTime;
use crate::types::{Lsn, TimelineId};

/// The table that rows go to.
pub const TABLE: &str = "pgherd_ledger";
const CREATE: &str = "CREATE TABLE IF NOT EXISTS pgherd_ledger (client text NOT NULL, seq bigint NOT NULL, node text NOT NULL)";
// The file name begins with the timeline the server writes, in eight hexadecimal digits.
const INSERT: &str =
    "INSERT INTO pgherd_ledger (client, seq, node) VALUES ($1, $2, $3) RETURNING pg_walfile_name(pg_current_wal_insert_lsn())";
const POSITION: &str = "SELECT pg_current_wal_lsn()::text";

/// What became of one attempt, as far as the client can know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Committed, and the server said so.
    Acknowledged {
        /// The server's timeline.
        timeline: TimelineId,
        /// Its write position after the commit, if it could still be asked.
        position: Option<Lsn>,
    },
    /// Not committed: it must never appear.
    Failed(String),
    /// May or may not have been committed.
    Unknown(String),
}

/// One attempt.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The client's own count.
    pub seq: i64,
    /// Before it was sent.
    pub begun: BootTime,
    /// When its outcome was known.
    pub ended: BootTime,
    /// What became of it.
    pub outcome: Outcome,
}

/// A connection that inserts.
#[derive(Debug)]
pub struct Writer {
    client: Client,
    insert: Statement,
    position: Statement,
    warned: Arc<AtomicBool>,
}

impl Writer {
    /// Connects and prepares, within `limit`.
    pub async fn connect(config: &Config, limit: Duration) -> Result<Writer> {
        tokio::time::timeout(limit, Writer::open(config)).await.context("the server did not answer in time")?
    }

    async fn open(config: &Config) -> Result<Writer> {
        let (client, mut connection) = config.connect(NoTls).await.context("connecting")?;
        let warned = Arc::new(AtomicBool::new(false));
        let warning = Arc::clone(&warned);
        tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notice(notice) = message
                    && notice.severity() != "NOTICE"
                {
                    warning.store(true, Ordering::SeqCst);
                }
            }
        });
        let (insert, position) = (client.prepare(INSERT), client.prepare(POSITION));
        let (insert, position) = join(insert, position).await;
        Ok(Writer { client, insert: insert.context("preparing")?, position: position.context("preparing")?, warned })
    }

    /// Makes the table, if it is not there.
    pub async fn create_table(config: &Config, limit: Duration) -> Result<()> {
        let work = async {
            let (client, connection) = config.connect(NoTls).await?;
            tokio::spawn(connection);
            client.batch_execute(CREATE).await
        };
        tokio::time::timeout(limit, work).await.context("the server did not answer in time")?.context("making the table")
    }

    /// Inserts one row. Takes as long as the server takes: put a limit around it, and count what it cut off as [`Outcome::Unknown`].
    pub async fn insert(&self, client: &str, seq: i64, node: &str) -> Attempt {
        let begun = BootTime::now();
        let row = async {
            let row = self.client.query_one(&self.insert, &[&client, &seq, &node]).await;
            (row, BootTime::now())
        };
        // Sent at once behind the row: the server answers it after the commit.
        let (answer, position) = join(row, self.client.query_one(&self.position, &[])).await;
        let (row, ended) = answer;
        let outcome = match row {
            Ok(_) if self.warned.load(Ordering::SeqCst) => Outcome::Unknown("the server warned".into()),
            Ok(row) => {
                let file: &str = row.get(0);
                let timeline = file.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
                let position = position.ok().and_then(|row| row.get::<_, &str>(0).parse().ok());
                Outcome::Acknowledged { timeline: TimelineId(timeline), position }
            }
            Err(error) => outcome_of(&error),
        };
        Attempt { seq, begun, ended, outcome }
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

fn outcome_of(error: &tokio_postgres::Error) -> Outcome {
    match error.as_db_error() {
        Some(said) if said.severity() == "ERROR" => Outcome::Failed(format!("{}: {}", said.code().code(), said.message())),
        Some(said) => Outcome::Unknown(format!("{}: {}", said.code().code(), said.message())),
        None => Outcome::Unknown(error.to_string()),
    }
}
