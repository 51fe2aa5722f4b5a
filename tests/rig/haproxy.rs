//! The HAProxy of a test's cluster: how often it looks by itself, who tells it, how its servers stand, and where a client gets through it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::cluster::{LocalCluster, Plan};
use pgherd::cli::demo::haproxy::{Checks, Frontends};

use super::said::ask;
use super::world::World;

/// No second check of a server within any test: what changes, and whose sessions end, changes because HAProxy was told.
pub const NEVER: Checks = Checks { inter_ms: 3_600_000, fastinter_ms: 3_600_000, end_sessions: false };
/// As by default.
pub const EACH_SECOND: Checks = Checks { inter_ms: 1_000, fastinter_ms: 200, end_sessions: true };
/// A client gives up after so long, and tries again.
const CLIENT_LIMIT: Duration = Duration::from_secs(2);

/// An HAProxy.
#[derive(Debug, Clone, Copy)]
pub struct Haproxy {
    pub checks: Checks,
    /// Nodes whose documents name its runtime socket.
    pub told_by: &'static [usize],
}

impl Haproxy {
    /// Puts it into the plan, or none.
    pub fn plan(haproxy: Option<Haproxy>, plan: &mut Plan) {
        plan.frontends = plan.frontends.zip(haproxy).map(|(frontends, haproxy)| Frontends { checks: haproxy.checks, ..frontends });
    }

    /// Takes it out of the documents of those who do not tell it.
    pub fn name_in_documents(haproxy: Option<Haproxy>, cluster: &LocalCluster) {
        let Some(haproxy) = haproxy else { return };
        for index in (0..cluster.plan.nodes.len()).filter(|index| !haproxy.told_by.contains(index)) {
            let mut document = cluster.node_document(index);
            document.haproxy_sockets.clear();
            cluster.write_node_document(index, &document).unwrap();
        }
    }
}

/// A client's connection through HAProxy.
pub struct Session(TcpStream);

impl Session {
    /// Somebody has ended it.
    pub fn is_cut(&mut self) -> bool {
        match self.0.read(&mut [0; 64]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }
}

impl World {
    fn frontends(&self) -> Frontends {
        self.cluster.plan.frontends.unwrap()
    }

    /// Where HAProxy lets clients write.
    pub fn write_port(&self) -> u16 {
        self.frontends().write
    }

    /// Which node answers at a port of HAProxy; None when none does.
    pub fn through(&self, port: u16) -> Option<usize> {
        let said = ask(self.cluster.connection(port).unwrap(), "SELECT inet_server_port()", CLIENT_LIMIT).ok()??;
        (0..self.nodes()).find(|index| self.port(*index).to_string() == said)
    }

    /// Opens a session through HAProxy that says nothing, once it gets to a server.
    pub fn silent_session(&self, port: u16) -> Session {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut session = Session(stream);
        assert!(!session.is_cut());
        self.settle("HAProxy has the session", || self.sessions() > 0);
        session
    }

    /// Sessions that are open on servers for writing.
    fn sessions(&self) -> u32 {
        let text = self.runtime("show stat -1 4 -1");
        let of_writes = text.lines().filter(|line| line.starts_with("primary,"));
        of_writes.filter_map(|line| line.split(',').nth(4)?.parse::<u32>().ok()).sum()
    }

    /// The nodes that HAProxy sends sessions of a backend to.
    pub fn up_in(&self, backend: &str) -> Vec<usize> {
        let text = self.runtime(&format!("show servers state {backend}"));
        let rows = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let up = rows.filter(|row| row.len() > 5 && row[0] != "#" && row[5] != "0");
        let mut up: Vec<usize> = up.filter_map(|row| self.cluster.index_of(row[3])).collect();
        up.sort_unstable();
        up
    }

    /// Asks HAProxy's runtime socket; empty when nobody answers there.
    pub fn runtime(&self, command: &str) -> String {
        let mut answer = String::new();
        if let Ok(mut stream) = UnixStream::connect(self.cluster.haproxy_socket()) {
            let _ = writeln!(stream, "{command}");
            let _ = stream.read_to_string(&mut answer);
        }
        answer
    }

    /// Ends HAProxy and starts it again.
    pub fn restart_haproxy(&self) {
        let haproxy = self.cluster.household().named("haproxy").unwrap();
        haproxy.signal(Signal::SIGKILL);
        self.settle("HAProxy has ended", || !haproxy.is_alive());
        self.cluster.start_haproxy().unwrap();
    }

    /// Waits until clients get to this node for writing and to the others for reading, by what HAProxy says and by what they see.
    #[track_caller]
    pub fn wait_routed(&self, leader: usize, when: &str) {
        let others = self.others(leader);
        let mut seen = (Vec::new(), Vec::new(), None);
        let routed = || {
            seen = (self.up_in("primary"), self.up_in("standby"), self.through(self.write_port()));
            seen == (vec![leader], others.clone(), Some(leader))
        };
        let is_routed = super::wait::settles_within(super::world::PATIENCE, routed);
        assert!(
            is_routed,
            "not routed to {} {when}: for writes {:?}, for reads {:?}, a client got to {:?}",
            leader, seen.0, seen.1, seen.2
        );
    }
}
