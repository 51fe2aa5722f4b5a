//! A TCP proxy that can break a connection the ways a network does: cut, silent in one direction or both, slow.
//!
//! Silence keeps the bytes and delivers them when it is over, as TCP does when packets are lost for a while. It can be broken for the
//! connections of one standby alone: a walreceiver says the member's name as its application_name when it connects.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const CHUNK_BYTES: usize = 16 * 1024;
/// A start-up packet is within this.
const CALLER_BYTES: usize = 1024;

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Everything passes.
    Pass,
    /// Connections break, new ones too.
    Cut,
    /// Nothing arrives in either direction, and nobody is told.
    Silent,
    /// What the client sends arrives, the answers do not.
    AnswersLost,
    /// What the client sends does not arrive.
    RequestsLost,
    /// Everything arrives this much later.
    Slow(Duration),
}

/// For all, and for who is told apart from them.
#[derive(Debug, Clone)]
struct State {
    all: Network,
    one: Option<(String, Network)>,
}

#[derive(Debug)]
struct Shared {
    network: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Shared {
    /// Waits until the network lets a chunk pass; false when it must not pass at all.
    fn lets_pass(&self, is_answer: bool, caller: &Caller) -> bool {
        let arrived = Instant::now();
        let mut network = self.network.lock().unwrap();
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return false;
            }
            let one = network.one.as_ref().filter(|(name, _)| caller.is(name)).map(|(_, network)| *network);
            let wait = match one.unwrap_or(network.all) {
                Network::Cut => return false,
                Network::Pass => return true,
                Network::AnswersLost if !is_answer => return true,
                Network::RequestsLost if is_answer => return true,
                Network::Slow(delay) if arrived.elapsed() >= delay => return true,
                Network::Slow(delay) => delay.saturating_sub(arrived.elapsed()),
                Network::Silent | Network::AnswersLost | Network::RequestsLost => Duration::from_secs(1),
            };
            network = self.changed.wait_timeout(network, wait).unwrap().0;
        }
    }

    fn break_all(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A proxy in front of one address.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on `listen` (port 0: any) and passes on to `to`.
    pub fn start(listen: SocketAddr, to: SocketAddr) -> Proxy {
        let listener = TcpListener::bind(listen).unwrap_or_else(|error| panic!("binding {listen}: {error}"));
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            network: Mutex::new(State { all: Network::Pass, one: None }),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || serve(client, to, &shared));
            }
        });
        Proxy { address, shared }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the network does, at once, also for connections that are open.
    pub fn set(&self, network: Network) {
        self.shared.network.lock().unwrap().all = network;
        self.shared.changed.notify_all();
        if network == Network::Cut {
            self.shared.break_all();
        }
    }

    /// The same for the connections of one standby alone, also for those that are open. What is held back when it is cut is lost.
    pub fn set_for(&self, name: &str, network: Network) {
        self.shared.network.lock().unwrap().one = Some((name.to_owned(), network));
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        self.shared.break_all();
        let _ = TcpStream::connect_timeout(&self.address, CONNECT_LIMIT);
    }
}

fn serve(client: TcpStream, to: SocketAddr, shared: &Arc<Shared>) {
    if shared.network.lock().unwrap().all == Network::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect_timeout(&to, CONNECT_LIMIT) else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let copies = |stream: &TcpStream| stream.try_clone().unwrap();
    shared.streams.lock().unwrap().extend([copies(&client), copies(&server)]);
    let (answers_from, answers_to) = (copies(&server), copies(&client));
    let (back, caller) = (Arc::clone(shared), Arc::new(Caller::default()));
    let called = Arc::clone(&caller);
    std::thread::spawn(move || pump(answers_from, answers_to, &back, true, &called));
    pump(client, server, shared, false, &caller);
}

/// The first that a client said, in which its name is.
#[derive(Debug, Default)]
struct Caller(Mutex<Vec<u8>>);

impl Caller {
    fn says(&self, chunk: &[u8]) {
        let mut said = self.0.lock().unwrap();
        let room = CALLER_BYTES.saturating_sub(said.len());
        said.extend(chunk.iter().take(room));
    }

    /// PostgreSQL's start-up packet: names and values, each ended by a zero.
    fn is(&self, name: &str) -> bool {
        let named = format!("application_name\0{name}\0");
        self.0.lock().unwrap().windows(named.len()).any(|part| part == named.as_bytes())
    }
}

/// Copies one direction until either side ends.
fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared, is_answer: bool, caller: &Caller) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(length) = from.read(&mut chunk) {
        if !is_answer {
            caller.says(&chunk[..length]);
        }
        if !shared.lets_pass(is_answer, caller) {
            let _ = from.shutdown(Shutdown::Both);
            break;
        }
        if length == 0 || to.write_all(&chunk[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    /// An echo server behind a proxy, and a client's connection to it.
    fn echo() -> (Proxy, TcpStream) {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = TcpListener::bind(any).unwrap();
        let server = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut &stream));
            }
        });
        let proxy = Proxy::start(any, server);
        let client = TcpStream::connect(proxy.address()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        (proxy, client)
    }

    fn echoes(client: &mut TcpStream) -> Option<usize> {
        client.write_all(b"ping").ok()?;
        client.read(&mut [0; 64]).ok()
    }

    #[test]
    fn what_passes_comes_back() {
        let (_proxy, mut client) = echo();
        assert_eq!(echoes(&mut client), Some(4));
    }

    #[test]
    fn a_cut_breaks_open_connections_and_new_ones_until_it_is_healed() {
        let (proxy, mut client) = echo();
        assert_eq!(echoes(&mut client), Some(4));
        proxy.set(Network::Cut);
        assert_ne!(echoes(&mut client), Some(4));
        let mut again = TcpStream::connect(proxy.address()).unwrap();
        again.set_read_timeout(Some(LIMIT)).unwrap();
        assert_ne!(echoes(&mut again), Some(4));
        proxy.set(Network::Pass);
        let mut healed = TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(echoes(&mut healed), Some(4));
    }

    #[test]
    fn silence_in_any_direction_holds_the_bytes_back_and_delivers_them_afterwards() {
        for network in [Network::Silent, Network::AnswersLost, Network::RequestsLost] {
            let (proxy, mut client) = echo();
            proxy.set(network);
            assert_eq!(echoes(&mut client), None, "{network:?}");
            proxy.set(Network::Pass);
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(client.read(&mut [0; 64]).unwrap(), 4, "{network:?}");
        }
    }

    #[test]
    fn one_caller_alone_is_held_back_and_what_was_held_back_when_it_is_cut_is_lost() {
        let (proxy, mut other) = echo();
        let mut one = TcpStream::connect(proxy.address()).unwrap();
        one.set_read_timeout(Some(LIMIT)).unwrap();
        one.write_all(b"user\0r\0application_name\0n2\0\0").unwrap();
        assert!(one.read(&mut [0; 64]).is_ok_and(|length| length > 0));
        proxy.set_for("n2", Network::Silent);
        assert_eq!((echoes(&mut one), echoes(&mut other)), (None, Some(4)));
        proxy.set_for("n2", Network::Cut);
        assert_ne!(one.read(&mut [0; 64]).ok(), Some(4));
        assert_eq!(echoes(&mut other), Some(4));
    }

    #[test]
    fn slow_is_later_but_whole() {
        let (proxy, mut client) = echo();
        proxy.set(Network::Slow(LIMIT));
        assert_eq!(echoes(&mut client), None);
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(client.read(&mut [0; 64]).unwrap(), 4);
    }
}
