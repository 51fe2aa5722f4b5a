//! Connections to PostgreSQL, and the few things pgherd asks of it that change something.
//!
//! The local server is reached over its Unix socket as the superuser by peer authentication (pgherd's own first line of pg_hba), another
//! member's over TCP with SCRAM. Each order is a connection of its own: a CHECKPOINT of minutes must not hold up the probe, which keeps
//! one open ([`super::probe`]). Every order has a time limit; after it nothing is known about whether it took effect.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, SimpleQueryRow};

use super::probe::ProbeConnection;

/// The database that pgherd connects to: there after every initdb.
pub const DATABASE: &str = "postgres";
/// What pg_stat_activity shows for pgherd.
pub const APPLICATION_NAME: &str = "pgherd";
/// How long a small question may take: reload, a look at a view, a role.
pub const QUESTION_LIMIT: Duration = Duration::from_secs(10);

/// A password. Never shown by Debug or Display.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Holds a password.
    pub fn new(password: &str) -> Self {
        Self(password.into())
    }

    /// Reads a secret file: one line, whose line end does not belong to the password.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading the password file {}", path.display()))?;
        let line = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
        anyhow::ensure!(!line.is_empty(), "the password file {} is empty", path.display());
        anyhow::ensure!(!line.contains(['\n', '\0']), "the password file {} must hold one line", path.display());
        Ok(Self::new(line))
    }

    /// The password itself, for a passfile or a protocol.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// SQLSTATE 57P03: the server is starting, stopping, or in recovery and not yet consistent.
    #[error("the server does not take connections now: {0}")]
    NotYet(String),
    /// The server answered with an error.
    #[error("the server refused ({code}): {message}")]
    Refused {
        /// SQLSTATE.
        code: String,
        /// Its message, with the detail and the hint.
        message: String,
    },
    /// No answer in time, or no connection. Whether an order took effect is not known.
    #[error("no answer from the server: {0}")]
    NoAnswer(String),
    /// An answer that makes no sense.
    #[error("the server's answer makes no sense: {0}")]
    Nonsense(String),
}

impl From<tokio_postgres::Error> for SqlError {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(db) = error.as_db_error() else { return SqlError::NoAnswer(chain(&error)) };
        if *db.code() == SqlState::CANNOT_CONNECT_NOW {
            return SqlError::NotYet(db.message().to_owned());
        }
        let extra = [db.detail(), db.hint()].into_iter().flatten().fold(String::new(), |all, one| all + "; " + one);
        SqlError::Refused { code: db.code().code().to_owned(), message: format!("{}{extra}", db.message()) }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// An open connection. Dropping it ends it, and with it what it asked.
pub struct Connection {
    client: Client,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    /// Connects. The caller limits the time.
    pub async fn open(config: &Config) -> Result<Self, SqlError> {
        let (client, connection) = config.connect(NoTls).await?;
        let major = connection.parameter("server_version").and_then(major_of).unwrap_or(0);
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        let connection = Self { client, driver };
        // Those that not every version knows, which the start-up packet therefore cannot carry.
        if let Some(statements) = timeouts_off(major) {
            connection.client.batch_execute(statements).await?;
        }
        Ok(connection)
    }

    /// Whether it is of no use any more.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Asks for promotion and does not wait for it: the caller polls until the probe says it is out of recovery, and checks the timeline.
    /// Only under the lock, after the guard has the deadline (I3).
    pub async fn promote(&self, limit: Duration) -> Result<(), SqlError> {
        let asked = within(limit, "did not answer", self.row("select pg_catalog.pg_promote(wait => false)::text as asked")).await?;
        match text(&asked, "asked")? {
            "true" => Ok(()),
            _ => Err(SqlError::Nonsense("pg_promote could not signal the postmaster".to_owned())),
        }
    }

    /// Runs statements, as text; no rows wanted.
    pub async fn execute(&self, statements: &str) -> Result<(), SqlError> {
        Ok(self.client.batch_execute(statements).await?)
    }

    /// Runs one statement, as text, in one round trip; all values come as text.
    pub async fn rows(&self, statement: &str) -> Result<Vec<SimpleQueryRow>, SqlError> {
        let messages = self.client.simple_query(statement).await?;
        Ok(messages.into_iter().filter_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None }).collect())
    }

    /// As [`Self::rows`], for a statement that gives one row.
    pub async fn row(&self, statement: &str) -> Result<SimpleQueryRow, SqlError> {
        self.rows(statement).await?.into_iter().next().ok_or_else(|| SqlError::Nonsense("no row came back".to_owned()))
    }

    /// Runs one statement with text parameters; the values of each row as text.
    pub async fn query(&self, statement: &str, parameters: &[&str]) -> Result<Vec<Vec<Option<String>>>, SqlError> {
        let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            parameters.iter().map(|text| text as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
        let rows = self.client.query(statement, &parameters).await?;
        Ok(rows.iter().map(|row| (0..row.len()).map(|column| row.try_get(column).unwrap_or(None)).collect()).collect())
    }
}

/// The major version in what a server says of itself, such as `17.2 (Debian 17.2-1)` or `18beta1`.
fn major_of(server_version: &str) -> Option<u32> {
    let digits = server_version.find(|character: char| !character.is_ascii_digit()).unwrap_or(server_version.len());
    server_version[..digits].parse().ok()
}

/// What ends a session that is slow, or waits for its next question, and is unknown to older servers.
fn timeouts_off(major: u32) -> Option<&'static str> {
    match major {
        17.. => Some("set idle_session_timeout = 0; set transaction_timeout = 0"),
        14.. => Some("set idle_session_timeout = 0"),
        _ => None,
    }
}

/// Text value of a column by name; an error names the column.
pub(super) fn text<'a>(row: &'a SimpleQueryRow, column: &str) -> Result<&'a str, SqlError> {
    maybe(row, column)?.ok_or_else(|| SqlError::Nonsense(format!("`{column}` is null")))
}

/// Text value of a column by name, or null.
pub(super) fn maybe<'a>(row: &'a SimpleQueryRow, column: &str) -> Result<Option<&'a str>, SqlError> {
    row.try_get(column).map_err(|error| SqlError::Nonsense(chain(&error)))
}

/// What a column holds as JSON.
pub(super) fn from_json<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, SqlError> {
    serde_json::from_str(json).map_err(|error| SqlError::Nonsense(error.to_string()))
}

/// A server and how to reach it. Cheap to clone; clones share the probe's connection.
#[derive(Clone)]
pub struct Sql {
    config: Config,
    pub(super) probing: Arc<Mutex<ProbeConnection>>,
}

impl fmt::Debug for Sql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sql({:?} {:?})", self.config.get_hosts(), self.config.get_user())
    }
}

impl Sql {
    /// The local server, over its Unix socket, as the superuser.
    pub fn local(socket_dir: &Path, port: u16, superuser: &str) -> Self {
        let mut config = base_config(port, superuser);
        config.host_path(PathBuf::from(socket_dir));
        Self { config, probing: Arc::default() }
    }

    /// Another member's server, over TCP with a password.
    pub fn remote(host: &str, port: u16, user: &str, password: &Secret) -> Self {
        let mut config = base_config(port, user);
        config.host(host).password(password.expose());
        Self { config, probing: Arc::default() }
    }

    /// The same server, another database.
    pub(super) fn of_database(&self, database: &str) -> Self {
        let mut config = self.config.clone();
        config.dbname(database);
        Self { config, probing: Arc::default() }
    }

    /// Opens a connection and uses it, both within `limit`.
    pub async fn with<T>(&self, limit: Duration, work: impl AsyncFnOnce(&Connection) -> Result<T, SqlError>) -> Result<T, SqlError> {
        let all = async { work(&self.open().await?).await };
        tokio::time::timeout(limit, all)
            .await
            .unwrap_or_else(|_| Err(SqlError::NoAnswer(format!("nothing within {} ms", limit.as_millis()))))
    }

    pub(super) async fn open(&self) -> Result<Connection, SqlError> {
        Connection::open(&self.config).await
    }

    /// CHECKPOINT; may take minutes.
    pub async fn checkpoint(&self, limit: Duration) -> Result<(), SqlError> {
        self.with(limit, async |connection| connection.execute("checkpoint").await).await
    }

    /// Writes a few bytes of WAL, and flushes them, so that every standby has something to answer: what lets commits go is an answer that comes
    /// after the walsender has read synchronous_standby_names, and the postmaster tells it to before a new session has them. As all of
    /// pgherd's sessions this one waits for no standby. An error on a server in recovery.
    ///
    /// Within a transaction, and no mere `pg_current_xact_id()`: a commit that wrote nothing else is left to the walwriter to flush.
    pub async fn have_standbys_answer(&self, limit: Duration) -> Result<(), SqlError> {
        let message = "select pg_catalog.pg_logical_emit_message(true, 'pgherd', ''::text)";
        self.with(limit, async |connection| connection.execute(message).await).await
    }

    /// A session of its own, for [`Connection::promote`].
    pub async fn session(&self, limit: Duration) -> Result<Connection, SqlError> {
        within(limit, "did not take a connection", self.open()).await
    }

    /// Asks the server to read its files again, and waits until a new connection sees that it has: that one.
    pub async fn reload(&self, limit: Duration) -> Result<Connection, SqlError> {
        let reloading = async {
            let held = self.open().await?;
            // It has only just been made: it has the postmaster's time.
            let before = loaded_at(&held).await?;
            self.reload_from(&held, Some(before)).await
        };
        within(limit, NOT_RELOADED, reloading).await
    }

    /// As [`Self::reload`], asked over a connection that is open already, as what is loaded may shut new ones out.
    pub(super) async fn reload_over(&self, held: &Connection, limit: Duration) -> Result<(), SqlError> {
        let reloading = async {
            let before = match self.open().await {
                Ok(fresh) => Some(loaded_at(&fresh).await?),
                Err(_) => None,
            };
            self.reload_from(held, before).await
        };
        within(limit, NOT_RELOADED, reloading).await.map(drop)
    }

    async fn reload_from(&self, held: &Connection, before: Option<String>) -> Result<Connection, SqlError> {
        held.execute("select pg_catalog.pg_reload_conf()").await?;
        let mut pause = RELOAD_POLL_MIN;
        loop {
            let fresh = self.open().await?;
            if before != Some(loaded_at(&fresh).await?) {
                return Ok(fresh);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RELOAD_POLL_MAX);
        }
    }

    /// Names of parameters that wait for a restart.
    pub async fn pending_restart(&self, limit: Duration) -> Result<Vec<String>, SqlError> {
        let question = "select name from pg_catalog.pg_settings where pending_restart order by name";
        let rows = self.with(limit, async |connection| connection.rows(question).await).await?;
        rows.iter().map(|row| text(row, "name").map(str::to_owned)).collect()
    }

    /// Runs the spec's `bootstrap.post_init`, one statement text after the other, once, on the first primary.
    pub async fn run_post_init(&self, statements: &[String], limit: Duration) -> Result<()> {
        for (index, statement) in statements.iter().enumerate() {
            // The operator's own SQL: names are found and made where PostgreSQL's default search path says.
            let run = self.with(limit, async |connection| {
                connection.execute("set search_path = \"$user\", public").await?;
                connection.execute(statement).await
            });
            run.await.with_context(|| format!("bootstrap.post_init[{index}] failed: the statements before it are done"))?;
        }
        Ok(())
    }
}

/// Between two looks at whether a reload has happened: the postmaster takes its signal at once, but for a machine that is busy.
const RELOAD_POLL_MIN: Duration = Duration::from_millis(2);
/// The longest time between two of them.
const RELOAD_POLL_MAX: Duration = Duration::from_millis(20);

const NOT_RELOADED: &str = "did not reload its files";

/// When the files were read that this session goes by. A fresh connection has the postmaster's time; one that is open has the time at which it
/// noticed itself.
async fn loaded_at(connection: &Connection) -> Result<String, SqlError> {
    let row = connection.row("select extract(epoch from pg_catalog.pg_conf_load_time())::text as at").await?;
    Ok(text(&row, "at")?.to_owned())
}

async fn within<T>(limit: Duration, not_done: &str, work: impl Future<Output = Result<T, SqlError>>) -> Result<T, SqlError> {
    let late = || SqlError::NoAnswer(format!("the server {not_done} within {} ms", limit.as_millis()));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(late()))
}

fn base_config(port: u16, user: &str) -> Config {
    let mut config = Config::new();
    config.port(port).user(user).dbname(DATABASE).application_name(APPLICATION_NAME);
    // Settings of the role or the database must not shape pgherd's sessions, from their first statement on. Its own few writes must not
    // wait for standbys that may never come.
    config.options(
        "-c search_path=pg_catalog -c default_transaction_read_only=off -c synchronous_commit=local -c client_min_messages=warning \
         -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0",
    );
    config.keepalives_idle(Duration::from_secs(super::conninfo::KEEPALIVES_IDLE_S.into()));
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        let secret = Secret::new("canary");
        let sql = Sql::remote("h", 5432, "u", &secret);
        assert!(!format!("{secret:?} {sql:?}").contains("canary"));
    }

    #[test]
    fn a_password_file_holds_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        for (content, password) in
            [("pass word\n", Some("pass word")), ("p\r\n", Some("p")), ("p", Some("p")), ("", None), ("\n", None), ("a\nb\n", None)]
        {
            std::fs::write(&path, content).unwrap();
            assert_eq!(Secret::read(&path).ok().map(|secret| secret.expose().to_owned()).as_deref(), password, "{content:?}");
        }
        assert!(Secret::read(&directory.path().join("none")).is_err());
    }
}
