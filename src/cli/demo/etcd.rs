//! etcd members of a local cluster, as the reference deployment sets them up, on loopback.

use std::path::Path;
use std::process::Command;

/// etcd's own defaults, written out because the least lease follows from them (1.5 elections, in milliseconds).
const HEARTBEAT_MS: &str = "100";
const ELECTION_MS: &str = "1000";

/// One member's name and ports.
#[derive(Debug, Clone)]
pub struct EtcdMember {
    /// `e1`.
    pub name: String,
    /// Client port on 127.0.0.1.
    pub client_port: u16,
    /// Peer port on 127.0.0.1.
    pub peer_port: u16,
}

impl EtcdMember {
    /// Where clients reach it.
    pub fn client_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// How to start it. `all` are the members of its cluster, itself included; `dir` holds each one's data under its name.
    pub fn command(&self, program: &Path, dir: &Path, all: &[EtcdMember], token: &str) -> Command {
        let cluster: Vec<String> = all.iter().map(|member| format!("{}={}", member.name, member.peer_url())).collect();
        let mut command = Command::new(program);
        command.arg("--name").arg(&self.name).arg("--data-dir").arg(dir.join(&self.name));
        command.args(["--listen-client-urls", &self.client_url(), "--advertise-client-urls", &self.client_url()]);
        command.args(["--listen-peer-urls", &self.peer_url(), "--initial-advertise-peer-urls", &self.peer_url()]);
        command.args(["--initial-cluster", &cluster.join(","), "--initial-cluster-token", token, "--initial-cluster-state", "new"]);
        command.args(["--heartbeat-interval", HEARTBEAT_MS, "--election-timeout", ELECTION_MS]);
        command.args(["--logger", "zap", "--log-level", "warn"]);
        command
    }
}
