//! A TCP proxy that passes a request on and loses its answer: once a marker was seen in what a client sends, nothing comes back on that
//! connection any more. Or it holds that request back, until whoever asked has long given up. gRPC sends our values as they are, so that any text in a record can be the marker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

const CHUNK_BYTES: usize = 64 * 1024;

/// A request is in few packets; what comes later is its caller's end of patience.
const WHOLE_WITHIN: Duration = Duration::from_millis(200);

/// How long a server may take to answer what was held back.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

/// What happens to connections after the one whose answer was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// They work.
    Pass,
    /// Nothing gets through any more.
    Cut,
}

/// Starts one in front of a port on loopback; answers with its URL and with whether the marker was seen.
pub async fn lose_answer_to(marker: &'static str, port: u16, afterwards: Afterwards) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(AtomicBool::new(false));
    let said = seen.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            if said.load(Ordering::SeqCst) && afterwards == Afterwards::Cut {
                continue;
            }
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            tokio::spawn(serve(client, server, marker, said.clone()));
        }
    });
    (url, seen)
}

async fn serve(client: TcpStream, server: TcpStream, marker: &'static str, seen: Arc<AtomicBool>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let lost = Arc::new(AtomicBool::new(false));
    let dropped = lost.clone();
    let answers = tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(length @ 1..) = from_server.read(&mut chunk).await {
            if !dropped.load(Ordering::SeqCst) && to_client.write_all(&chunk[..length]).await.is_err() {
                return;
            }
        }
    });
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(length @ 1..) = from_client.read(&mut chunk).await {
        if chunk[..length].windows(marker.len()).any(|window| window == marker.as_bytes()) {
            // Before it is passed on, so that its answer cannot be faster.
            lost.store(true, Ordering::SeqCst);
            seen.store(true, Ordering::SeqCst);
        }
        if to_server.write_all(&chunk[..length]).await.is_err() {
            break;
        }
    }
    answers.abort();
}

/// A request that is on its way.
pub struct HeldBack {
    let_through: oneshot::Sender<()>,
    answered: oneshot::Receiver<()>,
}

impl HeldBack {
    /// Lets it through, and waits until the server has answered.
    pub async fn let_through(self) {
        self.let_through.send(()).unwrap();
        tokio::time::timeout(ANSWERED_WITHIN, self.answered).await.expect("the server did not answer").expect("nothing was held back");
    }
}

/// Starts one that keeps the first request with the marker, and passes everything else on. Answers with its URL, and with what it keeps.
pub async fn hold_back(marker: &'static str, port: u16) -> (String, HeldBack) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (let_through, wait) = oneshot::channel();
    let (said, answered) = oneshot::channel();
    tokio::spawn(async move {
        let first = Arc::new(Mutex::new(Some((wait, said))));
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            tokio::spawn(keep(client, server, marker, first.clone()));
        }
    });
    (url, HeldBack { let_through, answered })
}

type First = Arc<Mutex<Option<(oneshot::Receiver<()>, oneshot::Sender<()>)>>>;

async fn keep(client: TcpStream, server: TcpStream, marker: &'static str, first: First) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut request = vec![0; CHUNK_BYTES];
    let mut answer = vec![0; CHUNK_BYTES];
    loop {
        tokio::select! {
            read = from_server.read(&mut answer) => {
                let Ok(length @ 1..) = read else { return };
                if to_client.write_all(&answer[..length]).await.is_err() {
                    return;
                }
            }
            read = from_client.read(&mut request) => {
                let Ok(length @ 1..) = read else { return };
                let marked = request[..length].windows(marker.len()).any(|window| window == marker.as_bytes());
                let kept = if marked { first.lock().unwrap().take() } else { None };
                let Some((wait, said)) = kept else {
                    if to_server.write_all(&request[..length]).await.is_err() {
                        return;
                    }
                    continue;
                };
                let mut whole = request[..length].to_vec();
                while let Ok(Ok(length @ 1..)) = tokio::time::timeout(WHOLE_WITHIN, from_client.read(&mut request)).await {
                    whole.extend_from_slice(&request[..length]);
                }
                if wait.await.is_ok() && to_server.write_all(&whole).await.is_ok() && from_server.read(&mut answer).await.is_ok_and(|length| length > 0) {
                    let _ = said.send(());
                }
                return;
            }
        }
    }
}
