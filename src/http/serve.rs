//! Moves bytes: accepts connections, asks [`answer`], writes what it says. Decides nothing but what a stranger may cost us (SAFETY 75).
//!
//! Everything runs on one thread of its own with its own small runtime: a daemon whose other threads are busy or blocked still answers,
//! and still turns to 503 at A, since each request reads the clock itself. A connection above a limit is closed at once, unanswered:
//! waiting ones would be no cheaper.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::Router;
use axum::body::Body as HttpBody;
use axum::extract::{Query, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};

use crate::clock::BootTime;
use crate::facts::failsafe::PromiseAsk;
use crate::http::answer::{self, Answer, Body, Moment};
use crate::http::peer::PROMISED;
use crate::http::promises::{Answered, Promises};
use crate::http::snapshot::Snapshot;
use crate::types::ClusterName;

/// The age of what an answer was made from, in ms.
pub const AGE_HEADER: &str = "x-pgherd-age-ms";

/// How long to wait before accepting again when accepting failed (no descriptors left, say).
const ACCEPT_PAUSE_MS: u64 = 100;
/// Request heads have at most this many headers.
const HEADERS_MAX: usize = 64;

/// What a stranger may cost us.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at one time.
    pub connections: usize,
    /// Connections at one time from one address, so that no single host can shut out the health checks of the others.
    pub connections_per_address: usize,
    /// Time for a request's head to arrive; also how long an idle connection is kept.
    pub header_read: Duration,
    /// Life of a connection; after it the answer in hand is finished within `header_read`.
    pub connection_life: Duration,
    /// Bytes of a request's head. At least 8192 (hyper's own minimum).
    pub head_bytes: usize,
    /// Bytes a request's body may announce. None is read but that of `POST /failsafe`.
    pub body_bytes: u64,
    /// Bytes of the body of `POST /failsafe`.
    pub call_bytes: usize,
    /// Time for the body of `POST /failsafe`, and then for the machine's answer.
    pub call: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            connections_per_address: 128,
            header_read: Duration::from_secs(5),
            connection_life: Duration::from_secs(120),
            head_bytes: 16 * 1024,
            body_bytes: 64 * 1024,
            call_bytes: 4 * 1024,
            call: Duration::from_millis(500),
        }
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Listens at `address` (`10.0.12.9:8008`).
pub fn bind(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("listening for HTTP at {address} (spec.api.listen)"))
}

/// Serves on a thread of its own until the returned [`Server`] is dropped.
pub fn start(
    listener: TcpListener,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    promises: Arc<Promises>,
    limits: Limits,
) -> anyhow::Result<Server> {
    let address = listener.local_addr().context("reading the HTTP listener's address")?;
    listener.set_nonblocking(true).context("making the HTTP listener non-blocking")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the HTTP runtime")?;
    let (stop, stopped) = oneshot::channel();
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener).context("handing the HTTP listener to its runtime")?
    };
    let serve = move || {
        runtime.block_on(async {
            tokio::select! {
                () = accept(listener, Shared { snapshots, promises, limits }) => {}
                _ = stopped => {}
            }
        });
    };
    let thread = std::thread::Builder::new().name("http".to_owned()).spawn(serve).context("starting the HTTP thread")?;
    Ok(Server { address, stop: Some(stop), thread: Some(thread) })
}

async fn accept(listener: tokio::net::TcpListener, shared: Shared) {
    let limits = shared.limits;
    let router = Router::new().fallback(handle).with_state(shared);
    let places = Arc::new(Places::default());
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if let Some(place) = Places::take(&places, peer.ip(), &limits) {
                    tokio::spawn(connection(stream, router.clone(), limits, place));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "accepting an HTTP connection failed");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router, limits: Limits, _place: Place) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_read)
        .max_buf_size(limits.head_bytes)
        .max_headers(HEADERS_MAX)
        .auto_date_header(false);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // What goes wrong on a connection (reset, timed out, not HTTP) is the stranger's business and would only fill the log.
    if tokio::time::timeout(limits.connection_life, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(limits.header_read, connection).await;
    }
}

#[derive(Clone)]
struct Shared {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    promises: Arc<Promises>,
    limits: Limits,
}

async fn handle(State(shared): State<Shared>, request: Request) -> Response<HttpBody> {
    let received = BootTime::now();
    let snapshot = Arc::clone(&shared.snapshots.borrow());
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > shared.limits.body_bytes) {
        return said(StatusCode::PAYLOAD_TOO_LARGE, format!("a request's body has at most {} bytes\n", shared.limits.body_bytes));
    }
    if request.method() == Method::POST && request.uri().path() == "/failsafe" {
        return call(&shared, &snapshot.cluster, request, received).await;
    }
    let parameters = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).map(|query| query.0).unwrap_or_default();
    let moment =
        Moment { boot: BootTime::now(), unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()) };
    response(answer::answer(&snapshot, moment, request.method(), request.uri().path(), &parameters))
}

/// A leader without etcd asks this member not to run.
async fn call(shared: &Shared, cluster: &ClusterName, request: Request, received: BootTime) -> Response<HttpBody> {
    let limits = &shared.limits;
    let body = match tokio::time::timeout(limits.call, axum::body::to_bytes(request.into_body(), limits.call_bytes)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return said(StatusCode::PAYLOAD_TOO_LARGE, format!("a call has at most {} bytes\n", limits.call_bytes)),
        Err(_) => return said(StatusCode::REQUEST_TIMEOUT, "the call did not arrive\n".to_owned()),
    };
    let ask: PromiseAsk = match serde_json::from_slice(&body) {
        Ok(ask) => ask,
        Err(error) => return said(StatusCode::BAD_REQUEST, format!("this is no call of a leader: {error}\n")),
    };
    if ask.cluster != *cluster {
        return said(StatusCode::INTERNAL_SERVER_ERROR, format!("this is a member of the cluster `{cluster}`\n"));
    }
    match shared.promises.ask(ask, received, limits.call).await {
        Answered::Promised => said(StatusCode::OK, PROMISED.to_owned()),
        Answered::Refused(why) => said(StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")),
        Answered::Unanswered(why) => said(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

fn said(status: StatusCode, text: String) -> Response<HttpBody> {
    response(Answer { status: status.as_u16(), body: Body::Text(text), age_ms: 0 })
}

fn response(answer: Answer) -> Response<HttpBody> {
    let (kind, body) = match answer.body {
        Body::Empty => (None, HttpBody::empty()),
        Body::Json(text) => (Some("application/json"), HttpBody::from(text)),
        Body::Text(text) => (Some("text/plain; charset=utf-8"), HttpBody::from(text)),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(kind) = kind {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response.headers_mut().insert(HeaderName::from_static(AGE_HEADER), HeaderValue::from(answer.age_ms));
    response
}

/// Who is connected: counts per address.
#[derive(Debug, Default)]
struct Places {
    taken: Mutex<BTreeMap<IpAddr, usize>>,
}

/// One connection's place; free again when dropped.
struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    fn take(places: &Arc<Places>, address: IpAddr, limits: &Limits) -> Option<Place> {
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_this = taken.get(&address).copied().unwrap_or(0);
        if taken.values().sum::<usize>() >= limits.connections || of_this >= limits.connections_per_address {
            return None;
        }
        taken.insert(address, of_this + 1);
        Some(Place { places: Arc::clone(places), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get(&self.address).copied() {
            Some(count) if count > 1 => taken.insert(self.address, count - 1),
            _ => taken.remove(&self.address),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_the_places_of_the_others() {
        let limits = Limits { connections: 3, connections_per_address: 2, ..Limits::default() };
        let places = Arc::new(Places::default());
        let [a, b, c] = [1, 2, 3].map(|n| IpAddr::from([10, 0, 0, n]));
        let first = Places::take(&places, a, &limits);
        let second = Places::take(&places, a, &limits);
        assert!(first.is_some() && second.is_some());
        assert!(Places::take(&places, a, &limits).is_none(), "a third one from the same address");
        let third = Places::take(&places, b, &limits);
        assert!(third.is_some());
        assert!(Places::take(&places, c, &limits).is_none(), "all places are taken");
        drop(first);
        assert!(Places::take(&places, c, &limits).is_some());
    }
}
