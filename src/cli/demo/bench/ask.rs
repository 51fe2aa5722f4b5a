//! One question to a server, over a connection of its own, from synchronous code.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::{Client, Config, NoTls};

use super::super::runtime::in_own_thread;

/// Limit of one question, in milliseconds. A checkpoint is one.
const ASK_LIMIT_MS: u64 = 30_000;

/// Runs one statement, whose rows nobody wants.
pub fn execute(config: &Config, statement: &str) -> Result<()> {
    let text = statement.to_owned();
    ask(config, async move |client: Client| client.batch_execute(&text).await).with_context(|| statement.to_owned())
}

/// Rows of two text columns.
pub fn texts(config: &Config, question: &str) -> Result<Vec<(String, String)>> {
    let question = question.to_owned();
    let rows = ask(config, async move |client: Client| client.query(&question, &[]).await)?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Names of the standbys that stream from a server.
pub fn streaming(config: &Config) -> Result<Vec<String>> {
    let rows = texts(config, "SELECT application_name, '' FROM pg_stat_replication WHERE state = 'streaming'")?;
    Ok(rows.into_iter().map(|(name, _)| name).collect())
}

fn ask<T: Send + 'static, F>(config: &Config, question: impl FnOnce(Client) -> F + Send + 'static) -> Result<T>
where
    F: Future<Output = Result<T, tokio_postgres::Error>> + Send + 'static,
{
    let config = config.clone();
    in_own_thread(async move {
        let work = async {
            let (client, connection) = config.connect(NoTls).await?;
            tokio::spawn(connection);
            question(client).await
        };
        Ok(tokio::time::timeout(Duration::from_millis(ASK_LIMIT_MS), work).await.context("no answer in time")??)
    })
}
