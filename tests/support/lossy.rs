//! A TCP proxy that passes a request on and loses its answer: once a marker was seen in what a client sends, nothing comes back on that
//! connection any more. gRPC sends our values as they are, so that any text in a record can be the marker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CHUNK_BYTES: usize = 64 * 1024;

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
