//! Asks another member's HTTP API. Used before taking a lock that went away without a release: whoever may still have a writable
//! PostgreSQL defers us (SAFETY 5).
//!
//! No answer is not "no": every failure is an error, and the caller decides what unknown means.

use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize};

use crate::types::{Epoch, MemberName};

/// Most bytes of an answer that are read.
const ANSWER_MAX_BYTES: usize = 16 * 1024;

/// What a member says of its own PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writable {
    /// Who answers: an address can have moved to another member.
    pub member: MemberName,
    /// Whether it has, or may have, a PostgreSQL out of recovery. None = it does not know itself.
    pub writable: Option<bool>,
    /// The leadership its guard still holds a lock for.
    pub epoch: Option<Epoch>,
    /// Age of what it knows, in ms.
    pub age_ms: u64,
}

/// GET `/pgherd/writable` of the member whose API is at `api_url` (`http://10.0.12.9:8008`), all within `timeout`.
pub async fn ask_writable(api_url: &str, timeout: Duration) -> anyhow::Result<Writable> {
    let target = format!("{}/pgherd/writable", api_url.trim_end_matches('/'));
    let answer = tokio::time::timeout(timeout, fetch(&target)).await;
    let body = answer.with_context(|| format!("{target} did not answer within {} ms", timeout.as_millis()))??;
    serde_json::from_slice(&body).with_context(|| format!("{target} answered what is not understood"))
}

async fn fetch(target: &str) -> anyhow::Result<Bytes> {
    let uri: hyper::Uri = target.parse().with_context(|| format!("`{target}` is not an address such as http://10.0.12.9:8008"))?;
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    let answer = client.get(uri).await.with_context(|| format!("asking {target}"))?;
    if !answer.status().is_success() {
        bail!("{target} answered {}", answer.status());
    }
    let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await;
    Ok(body.map_err(anyhow::Error::from_boxed).with_context(|| format!("reading the answer of {target}"))?.to_bytes())
}
