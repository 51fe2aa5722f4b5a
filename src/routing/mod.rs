//! Tells the HAProxys of this host, through their runtime sockets, about a change of roles the moment that it is known.
//!
//! ```text
//! the machine's last state (as the HTTP API gets it) --+
//!                                                       +--> words --> policy/routing.rs --> orders --> HAProxy's socket
//! the other members' /pgherd/serves, when something  --+                    ^                              |
//! in etcd says that it may have changed                                     +---- how its servers stand ---+
//! ```
//! A view of etcd only says *when* to ask: that a member takes writes is heard from that member alone, whose answer knows its lock's
//! deadlines. Nothing here is on the way of a lease, a probe or an order: one task for each socket reads the latest state and never makes
//! anybody wait; what comes while it is busy is one state later, not a queue.
//!
//! What HAProxy is told holds until its next check, which judges anew. So a daemon that dies, hangs or cannot reach the socket leaves
//! HAProxy as right as its checks are ([`crate::policy::routing`]); a HAProxy that was started anew is seen at the next look.

mod haproxy;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::clock::BootTime;
use crate::facts::cluster::MemberRole;
use crate::facts::routing::{Server, Serves};
use crate::http::snapshot::Snapshot;
use crate::http::{health, peer};
use crate::policy::routing::{self, Told, Words};
use crate::types::{Epoch, MemberName};

use haproxy::RuntimeSocket;

/// How long another member may take to say what it serves.
const ASK_TIMEOUT_MS: u64 = 500;
/// A word that was asked for so long ago is not passed on any more: this task may not have run since.
const WORD_COUNTS_MS: u64 = 1_000;
/// First pause while the member that holds the lock does not say yet that it takes writes, HAProxy does not answer, or it had something to
/// be told: a check that was on its way then may have undone it. It doubles, up to `loop_wait`.
const AGAIN_FIRST_MS: u64 = 50;

/// What is in the way, by socket; called with all of it after each look.
type Say = Arc<dyn Fn(Option<String>) + Send + Sync>;

/// Begins to tell the HAProxys at these sockets. Ends with the runtime.
pub fn start(sockets: &[PathBuf], snapshots: &watch::Receiver<Arc<Snapshot>>, say: &Say) {
    let troubles = Arc::new(Mutex::new(BTreeMap::new()));
    for path in sockets {
        let teller = Teller {
            socket: RuntimeSocket::new(path.clone()),
            snapshots: snapshots.clone(),
            told: Told::default(),
            troubles: Arc::clone(&troubles),
            say: Arc::clone(say),
        };
        tokio::spawn(teller.run());
    }
}

/// One HAProxy.
struct Teller {
    socket: RuntimeSocket,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    told: Told,
    troubles: Arc<Mutex<BTreeMap<PathBuf, String>>>,
    say: Say,
}

/// Words, and when they were asked for.
type Heard = BTreeMap<MemberName, (BootTime, Serves)>;

/// How a look ended.
enum Look {
    /// Everybody was heard.
    Done {
        /// The next look may wait.
        settled: bool,
        /// What is wrong with how HAProxy is set up.
        trouble: Option<String>,
    },
    /// Something changed meanwhile.
    Overtaken,
}

impl Teller {
    async fn run(mut self) {
        let (mut again_ms, mut signs) = (AGAIN_FIRST_MS, None);
        loop {
            let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
            let now = BootTime::now();
            let seen = Signs::of(&snapshot, now);
            if signs.as_ref() != Some(&seen) {
                again_ms = AGAIN_FIRST_MS;
            }
            let loop_wait_ms = u64::try_from(snapshot.loop_wait.as_millis()).unwrap_or(u64::MAX);
            let look = self.look(&snapshot, &seen).await;
            let overtaken = matches!(look, Ok(Look::Overtaken));
            let settled = matches!(look, Ok(Look::Done { settled: true, .. }));
            match look {
                Ok(Look::Overtaken) => {}
                Ok(Look::Done { trouble, .. }) => self.report(trouble),
                Err(error) => {
                    // One that was started anew has forgotten what it was told.
                    self.told = Told::default();
                    self.report(Some(format!("{error:#}")));
                }
            }
            let wait_ms = match (overtaken, settled) {
                (true, _) => 0,
                (_, true) => loop_wait_ms,
                (_, false) => again_ms.min(loop_wait_ms),
            };
            again_ms = if settled { AGAIN_FIRST_MS } else { again_ms.saturating_mul(2) };
            let _ = tokio::time::timeout(Duration::from_millis(wait_ms), news(&mut self.snapshots, &seen)).await;
            signs = Some(seen);
        }
    }

    /// Looks at the servers, and tells what is known with each word that comes in; our own is known at once.
    async fn look(&mut self, snapshot: &Snapshot, seen: &Signs) -> anyhow::Result<Look> {
        let Some(spec) = &snapshot.spec else { return Ok(Look::Done { settled: true, trouble: None }) };
        let mut servers = self.socket.servers().await?;
        let mut asks = JoinSet::new();
        for member in spec.members.iter().filter(|member| member.name != snapshot.member) {
            asks.spawn(ask(member.name.clone(), member.api_url()));
        }
        let (mut heard, mut was_right) = (Heard::new(), true);
        loop {
            was_right &= self.tell(&mut heard, &mut servers).await?;
            let next = tokio::select! {
                next = asks.join_next() => next,
                () = news(&mut self.snapshots, seen) => return Ok(Look::Overtaken),
            };
            match next {
                Some(Ok(Some((member, word)))) => drop(heard.insert(member, word)),
                Some(Ok(None) | Err(_)) => {}
                None => break,
            }
        }
        let words = counting(&heard, BootTime::now());
        let members: Vec<&MemberName> = spec.members.iter().filter(|member| !member.nofailover()).map(|member| &member.name).collect();
        let held = self.told.contradicted(&words, &servers);
        let trouble = routing::misfit(&members, &servers).or_else(|| {
            let member = held.first()?;
            Some(format!("{member} says that it takes writes, and its own check holds it down: look at the check's path and port"))
        });
        let holder = seen.leader.as_ref().map(|(holder, _)| holder.as_str());
        let leads = holder.is_none_or(|holder| routing::primary(&words).is_some_and(|primary| primary.as_str() == holder));
        Ok(Look::Done { settled: leads && was_right, trouble })
    }

    /// Whether there was nothing to tell.
    async fn tell(&mut self, heard: &mut Heard, servers: &mut [Server]) -> anyhow::Result<bool> {
        let now = BootTime::now();
        {
            let snapshot = self.snapshots.borrow();
            heard.insert(snapshot.member.clone(), (now, health::serves(&snapshot, now)));
        }
        let orders = self.told.orders(&counting(heard, now), servers);
        if !orders.is_empty() {
            self.socket.tell(&orders).await?;
            routing::after(&orders, servers);
        }
        Ok(orders.is_empty())
    }

    /// What is in the way is said each time: events may be dropped, and come again.
    fn report(&self, trouble: Option<String>) {
        let path = self.socket.path();
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            Some(trouble) => {
                let message = format!("HAProxy at {} is not told of all changes of roles: {trouble}", path.display());
                if troubles.get(path) != Some(&message) {
                    tracing::warn!("{message}");
                }
                troubles.insert(path.to_owned(), message);
            }
            None => {
                if troubles.remove(path).is_some() {
                    tracing::info!("HAProxy at {} is told of changes of roles again", path.display());
                }
            }
        }
        let all: Vec<&str> = troubles.values().map(String::as_str).collect();
        (self.say)((!all.is_empty()).then(|| all.join("; ")));
    }
}

/// The words that are not too old.
fn counting(heard: &Heard, now: BootTime) -> Words {
    let counts = |asked: &BootTime| now.since(*asked) <= Duration::from_millis(WORD_COUNTS_MS);
    heard.iter().filter(|(_, (asked, _))| counts(asked)).map(|(member, (_, serves))| (member.clone(), *serves)).collect()
}

/// What a member says. None = nothing, and that is not "no".
async fn ask(member: MemberName, api_url: String) -> Option<(MemberName, (BootTime, Serves))> {
    let asked = BootTime::now();
    match peer::ask_serves(&api_url, Duration::from_millis(ASK_TIMEOUT_MS)).await {
        Ok(answer) if answer.member == member => Some((member, (asked, answer.serves))),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%member, error = format!("{error:#}"), "a member does not say what it serves");
            None
        }
    }
}

/// What says that the members may serve something else than at the last look.
#[derive(Debug, PartialEq, Eq)]
struct Signs {
    own: Serves,
    leader: Option<(String, Epoch)>,
    members: BTreeMap<MemberName, (MemberRole, String, String)>,
}

impl Signs {
    fn of(snapshot: &Snapshot, now: BootTime) -> Self {
        let view = snapshot.view.as_ref().map(|(_, view)| view);
        let leader = view.and_then(|view| view.leader.as_ref()).map(|leader| (leader.holder.clone(), leader.epoch));
        let members = view.map(|view| &view.members).into_iter().flatten();
        let members = members.map(|(member, key)| {
            let record = &key.record;
            (member.clone(), (record.role, record.machine_state.clone(), record.state.clone()))
        });
        Signs { own: health::serves(snapshot, now), leader, members: members.collect() }
    }
}

/// Returns once the signs are others than these.
async fn news(snapshots: &mut watch::Receiver<Arc<Snapshot>>, than: &Signs) {
    loop {
        if snapshots.changed().await.is_err() {
            // The daemon's loop has left.
            return std::future::pending().await;
        }
        if Signs::of(&snapshots.borrow(), BootTime::now()) != *than {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::sync::mpsc;

    use super::*;
    use crate::http::testing::{primary, start};

    const TEXT: &str = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n    \
                        - { name: mdw, address: 127.0.0.1 }\n    - { name: other, address: 127.0.0.1, port: 2, api_port: 1 }\n";
    /// A HAProxy that takes both members for primaries whatever it is told, as one whose checks disagree.
    const STUBBORN: &str = "1\n# be_id be_name srv_id srv_name srv_op_state srv_admin_state srv_check_state\n\
                            2 primary 1 mdw 2 0 6\n2 primary 2 other 2 0 6\n\n";

    /// Far less than the `loop_wait` of this test.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Listens as HAProxy does, and passes on what it is told.
    fn stubborn(path: &std::path::Path) -> mpsc::UnboundedReceiver<String> {
        let listener = UnixListener::bind(path).unwrap();
        let (said, told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut line = [0; 4096];
                let length = stream.read(&mut line).await.unwrap();
                let line = String::from_utf8_lossy(&line[..length]).trim().to_owned();
                let answer = if line.starts_with("show") { STUBBORN } else { "\n" };
                stream.write_all(answer.as_bytes()).await.unwrap();
                if !line.starts_with("show") {
                    let _ = said.send(line);
                }
            }
        });
        told
    }

    #[tokio::test]
    async fn what_a_check_undoes_that_was_on_its_way_is_told_again_long_before_the_next_look() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s");
        let mut told = stubborn(&path);
        let mut snapshot = primary();
        // Its facts are as of a made-up start; they have to be fresh now, and no look is due within this test.
        snapshot.loop_wait = BootTime::now().since(start()) + Duration::from_secs(3_600);
        if let Some(lock) = &mut snapshot.lock {
            lock.announce_at = BootTime::now() + Duration::from_secs(3_600);
        }
        snapshot.spec = Some(Arc::new(crate::spec::cluster::load("test", TEXT).unwrap().spec));
        let (_published, snapshots) = watch::channel(Arc::new(snapshot));
        let (report, mut reports) = mpsc::unbounded_channel();
        let say: Say = Arc::new(move |trouble| drop(report.send(trouble)));
        super::start(&[path], &snapshots, &say);
        for _ in 0..3 {
            let line = tokio::time::timeout(PATIENCE, told.recv()).await.expect("it is told again").unwrap();
            assert_eq!(line, "set server primary/other health down;shutdown sessions server primary/other");
        }
        assert_eq!(reports.recv().await, Some(None), "nothing is in the way");
    }
}
