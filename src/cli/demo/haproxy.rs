//! HAProxy of a local cluster: the reference deployment's listeners with the checks of the default cluster document.
//!
//! The checks ask OPTIONS /master and /replica, Patroni's paths: what stands in hand-written files today must go on working.

use std::fmt::Write as _;
use std::path::Path;

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
}

/// The configuration file's text. `dir` takes the runtime socket.
pub fn configuration(dir: &Path, frontends: Frontends, backends: &[Backend]) -> String {
    let mut text = format!(
        "global
    maxconn 1000
    nbthread 1
    stats socket {dir}/haproxy.sock mode 600 level admin

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
        dir = dir.display(),
        stats = frontends.stats,
    );
    for (name, port, balance, path) in
        [("primary", frontends.write, "first", "/master"), ("standby", frontends.read, "roundrobin", "/replica")]
    {
        let _ = write!(
            text,
            "
listen {name}
    bind 127.0.0.1:{port}
    balance {balance}
    option httpchk OPTIONS {path}
    http-check expect status 200
    default-server inter 1s fastinter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
"
        );
        for backend in backends {
            let Backend { name, address, port, api_port } = backend;
            let _ = writeln!(text, "    server {name} {address}:{port} maxconn 100 check port {api_port}");
        }
    }
    text
}
