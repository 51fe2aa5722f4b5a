//! One GET or OPTIONS over plain HTTP to loopback, with a time limit: enough to ask etcd for its health and a member for its role.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

/// Most bytes of an answer that are read.
const ANSWER_MAX_BYTES: u64 = 1 << 20;

/// Asks once. Returns the status code and the body.
pub fn ask(method: &str, address: SocketAddr, path: &str, limit: Duration) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, limit).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(|| format!("asking {address}"))?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX_BYTES).read_to_end(&mut answer).with_context(|| format!("reading the answer of {address}"))?;
    let answer = String::from_utf8_lossy(&answer);
    let code = answer.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((code.with_context(|| format!("{address} did not answer in HTTP"))?, body.to_owned()))
}
