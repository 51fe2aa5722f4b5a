//! HAProxy of a local cluster: the reference deployment's listeners with the checks of the default cluster document.
//!
//! The nodes tell it of changes of roles through its runtime socket; its checks are what is left when they do not. These ask OPTIONS
//! /master and /replica, Patroni's paths: what stands in hand-written files today must go on working.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// A server behind HAProxy.
#[derive(Debug, Clone)]
pub struct Backend {
    /// The member's name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// PostgreSQL's port.
    pub port: u16,
    /// The port that is asked for the role.
    pub api_port: u16,
}

/// Ports that HAProxy listens on, on 127.0.0.1.
#[derive(Debug, Clone, Copy)]
pub struct Frontends {
    /// To the leader.
    pub write: u16,
    /// To the replicas.
    pub read: u16,
    /// Statistics page.
    pub stats: u16,
    /// How often it looks by itself.
    pub checks: Checks,
}

/// The checks of a server: the time between two, and what follows from them.
#[derive(Debug, Clone, Copy)]
pub struct Checks {
    /// Of one that stays as it is, in milliseconds.
    pub inter_ms: u32,
    /// Of one that is about to change, in milliseconds.
    pub fastinter_ms: u32,
    /// Whether HAProxy ends the sessions of a server that it takes out.
    pub end_sessions: bool,
}

impl Default for Checks {
    fn default() -> Checks {
        Checks { inter_ms: 1_000, fastinter_ms: 200, end_sessions: true }
    }
}

/// HAProxy's runtime socket, when its files are in `dir`.
pub fn runtime_socket(dir: &Path) -> PathBuf {
    dir.join("haproxy.sock")
}

/// The configuration file's text. `dir` takes the runtime socket.
///
/// A server that refuses a connection would be tried again after a second, three times, even when HAProxy is told meanwhile that it is
/// down [tried, HAProxy 2.6]. For writes there is no other one, and the client is sooner served when it is refused and comes again.
pub fn configuration(dir: &Path, frontends: Frontends, backends: &[Backend]) -> String {
    let mut text = format!(
        "global
    maxconn 1000
    nbthread 1
    stats socket {socket} mode 600 level admin

defaults
    mode tcp
    log global
    timeout connect 4s
    timeout client 60m
    timeout server 60m
    timeout check 5s

listen stats
    mode http
    bind 127.0.0.1:{stats}
    stats enable
    stats uri /
    stats refresh 2s
",
        socket = runtime_socket(dir).display(),
        stats = frontends.stats,
    );
    let Checks { inter_ms, fastinter_ms, end_sessions } = frontends.checks;
    let end_sessions = if end_sessions { " on-marked-down shutdown-sessions" } else { "" };
    for (name, port, balance, again, path) in [
        ("primary", frontends.write, "first", "retries 0", "/master"),
        ("standby", frontends.read, "roundrobin", "option redispatch 1", "/replica"),
    ] {
        let _ = write!(
            text,
            "
listen {name}
    bind 127.0.0.1:{port}
    balance {balance}
    {again}
    option httpchk OPTIONS {path}
    http-check expect status 200
    default-server inter {inter_ms}ms fastinter {fastinter_ms}ms fall 2 rise 1{end_sessions}
"
        );
        for backend in backends {
            let Backend { name, address, port, api_port } = backend;
            let _ = writeln!(text, "    server {name} {address}:{port} maxconn 100 check port {api_port}");
        }
    }
    text
}
