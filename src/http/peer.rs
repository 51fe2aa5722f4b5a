//! Asks another member's HTTP API. Before taking a lock that went away without a release: whoever may still have a writable PostgreSQL
//! defers us (SAFETY 5). And while etcd cannot be asked: whether a member leaves the lock to us.
//!
//! No answer is not "no": every failure is an error, and the caller decides what unknown means.

use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::facts::failsafe::PromiseAsk;
use crate::facts::routing::ServesAnswer;
use crate::types::{Epoch, MemberName};

/// What a member answers that has promised; Patroni's word.
pub const PROMISED: &str = "Accepted";
/// Most of a refusal that is repeated in a message.
const REASON_MAX_CHARS: usize = 200;
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
    get(format!("{}/pgherd/writable", api_url.trim_end_matches('/')), timeout).await
}

/// GET `/pgherd/serves` of the member whose API is at `api_url`, all within `timeout`.
pub async fn ask_serves(api_url: &str, timeout: Duration) -> anyhow::Result<ServesAnswer> {
    get(format!("{}/pgherd/serves", api_url.trim_end_matches('/')), timeout).await
}

async fn get<T: DeserializeOwned>(target: String, timeout: Duration) -> anyhow::Result<T> {
    let (status, body) = send(Method::GET, &target, Bytes::new(), timeout).await?;
    if !status.is_success() {
        bail!("{target} answered {status}");
    }
    serde_json::from_slice(&body).with_context(|| format!("{target} answered what is not understood"))
}

/// POST `/failsafe` of the member whose API is at `api_url`, all within `timeout`. Only its own "Accepted" is a promise.
pub async fn ask_promise(api_url: &str, ask: &PromiseAsk, timeout: Duration) -> anyhow::Result<()> {
    let target = format!("{}/failsafe", api_url.trim_end_matches('/'));
    let call = serde_json::to_vec(ask).context("writing the call")?;
    let (status, body) = send(Method::POST, &target, call.into(), timeout).await?;
    let said = String::from_utf8_lossy(&body);
    if status != StatusCode::OK || said.trim() != PROMISED {
        bail!("{target} answered {status}: {}", said.trim().chars().take(REASON_MAX_CHARS).collect::<String>());
    }
    Ok(())
}

async fn send(method: Method, target: &str, body: Bytes, timeout: Duration) -> anyhow::Result<(StatusCode, Bytes)> {
    let answer = tokio::time::timeout(timeout, exchange(method, target, body)).await;
    answer.with_context(|| format!("{target} did not answer within {} ms", timeout.as_millis()))?
}

async fn exchange(method: Method, target: &str, body: Bytes) -> anyhow::Result<(StatusCode, Bytes)> {
    let uri: hyper::Uri = target.parse().with_context(|| format!("`{target}` is not an address such as http://10.0.12.9:8008"))?;
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    let request = Request::builder().method(method).uri(uri).header(CONTENT_TYPE, "application/json").body(Full::new(body));
    let answer = client.request(request.context("making the request")?).await.with_context(|| format!("asking {target}"))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await;
    Ok((status, body.map_err(anyhow::Error::from_boxed).with_context(|| format!("reading the answer of {target}"))?.to_bytes()))
}
