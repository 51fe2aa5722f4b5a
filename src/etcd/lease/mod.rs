//! The lease: renewed on a thread, a runtime and connections of its own, with nothing else in front of it.
//!
//! Every R it renews, proves the lock if one is held, and hands the new deadline to the guard, whose acknowledgement it awaits before
//! it renews again. It decides nothing: it says what happened ([`LeaseEvent`]) and does what it is told.
//!
//! ```text
//! Grant --> Granted --> (put_member, acquire) --> Hold --> Proved, every R --> LetGo, then release
//! Adopt --> Proved | Renewed | Lost
//! Arm   --> Sustained, in place of a renewal that etcd did not answer
//! ```
//!
//! The rule that would surprise: the guard's acknowledgement, not etcd's answer, makes a deadline true. Without one within R nothing is
//! renewed any more.

mod renewal;

use std::pin::Pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::renewal::{Outcome, Renewer};
use super::pool::Pool;
use super::settings::Settings;
use crate::clock::BootTime;
use crate::facts::failsafe::Armed;
use crate::facts::lease::LeaseEvent;
use crate::policy::deadlines::LeaseTimes;
use crate::policy::renewal::{Book, Round, Step};
use crate::types::{LeaseIdentity, LockIdentity};

/// How long the thread that waits for the guard outlives its last wait: so that there is always one.
const WAITER_KEEP_ALIVE_S: u64 = 3_600;

/// Threads that may wait for a guard that does not answer, or for a file, at once.
const WAITERS_MAX: usize = 8;

/// The guard's answer to a new deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acknowledged {
    /// It counts from now on.
    Yes,
    /// The guard is gone, or does not take it: a sentence.
    No(String),
}

/// Hands a proved lock, its send time and the times of the lease it hangs on to the guard and waits for the answer. May block; the lease
/// thread does not wait longer than R.
pub type Acknowledge = Box<dyn Fn(LockIdentity, BootTime, LeaseTimes) -> Acknowledged + Send + Sync>;
/// Calls every peer of a round at once, within its budget. An error: one did not promise, and who and why. The calls are sent after it is
/// called and not before; the lease thread waits for it.
pub type CallPeers = Box<dyn Fn(Round) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;
/// Takes events in, on the lease thread: it must not block.
pub type Sink = Box<dyn Fn(LeaseEvent) + Send>;

enum Command {
    Adopt(LeaseIdentity, Option<LockIdentity>),
    Grant,
    Hold(LockIdentity),
    LetGo,
    Arm(Option<Armed>),
    ChangeTimes(LeaseTimes),
    ChangeSettings(Box<Settings>),
    Revoke,
    Stop,
}

/// Gives orders to the lease thread. None of them waits. Dropping it ends the thread and leaves the lease as it is.
#[derive(Debug)]
pub struct LeaseHandle {
    commands: UnboundedSender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a command to the lease thread")
    }
}

impl LeaseHandle {
    /// Takes over what the guard handed to us, only before its E: renews and proves at once.
    pub fn adopt(&self, lease: LeaseIdentity, lock: Option<LockIdentity>) {
        self.send(Command::Adopt(lease, lock));
    }

    /// Gets a new lease, and forgets the old one if there is any.
    pub fn grant(&self) {
        self.send(Command::Grant);
    }

    /// A lock was taken on our lease: renews and proves at once, so that promotion can begin.
    pub fn hold(&self, lock: LockIdentity) {
        self.send(Command::Hold(lock));
    }

    /// The lock is about to be given up: the lease is renewed without it. To be sent before [`super::Etcd::release`], or the proof says
    /// that the lock was lost.
    pub fn let_go(&self) {
        self.send(Command::LetGo);
    }

    /// What the lock may go on with while etcd cannot be asked. None is answered with [`LeaseEvent::Disarmed`].
    pub fn arm(&self, armed: Option<Armed>) {
        self.send(Command::Arm(armed));
    }

    /// New times. A changed ttl brings [`LeaseEvent::Granted`]; after [`super::Etcd::move_to_lease`] that lease is adopted.
    pub fn change_times(&self, times: LeaseTimes) {
        self.send(Command::ChangeTimes(times));
    }

    /// New endpoints or credentials, from the next renewal on.
    pub fn change_settings(&self, settings: Settings) {
        self.send(Command::ChangeSettings(Box::new(settings)));
    }

    /// Ends the lease with all that hangs on it, and keeps nothing up any more. Only after PostgreSQL is proved dead.
    pub fn revoke(&self) {
        self.send(Command::Revoke);
    }

    /// Ends the thread and waits for it; the lease is left as it is.
    pub fn stop(mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) {
        // The thread ends only when told to, so that nothing is lost here.
        let _ = self.commands.send(command);
    }
}

impl Drop for LeaseHandle {
    fn drop(&mut self) {
        self.send(Command::Stop);
    }
}

/// Starts the lease thread. It waits for an order.
///
/// # Errors
/// When the settings cannot work, or a thread or a runtime cannot be made.
pub fn spawn(
    settings: Settings,
    times: LeaseTimes,
    acknowledge: Acknowledge,
    call_peers: CallPeers,
    sink: Sink,
) -> anyhow::Result<LeaseHandle> {
    let pool = Pool::new(settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WAITERS_MAX)
        .thread_keep_alive(Duration::from_secs(WAITER_KEEP_ALIVE_S))
        .build()
        .context("making the lease thread's runtime")?;
    let (commands, orders) = unbounded_channel();
    let keeper = Keeper { book: Book::new(times), renewer: Renewer::new(pool), acknowledge: Arc::from(acknowledge), call_peers, sink };
    let thread = std::thread::Builder::new()
        .name("lease".into())
        .spawn(move || {
            runtime.block_on(keeper.run(orders));
            // A guard that never answers must not keep the daemon from ending.
            runtime.shutdown_background();
        })
        .context("starting the lease thread")?;
    Ok(LeaseHandle { commands, thread: Some(thread) })
}

struct Keeper {
    book: Book,
    renewer: Renewer,
    acknowledge: Arc<dyn Fn(LockIdentity, BootTime, LeaseTimes) -> Acknowledged + Send + Sync>,
    call_peers: CallPeers,
    sink: Sink,
}

impl Keeper {
    async fn run(mut self, mut orders: UnboundedReceiver<Command>) {
        loop {
            // The clock comes before anything else: after a pause the first thing to know is what has run out.
            let now = BootTime::now();
            self.book.expire(now);
            let order = match self.book.next(now) {
                Step::Idle => orders.recv().await.or(Some(Command::Stop)),
                Step::WaitUntil(at) => tokio::select! {
                    order = orders.recv() => order.or(Some(Command::Stop)),
                    () = tokio::time::sleep(at.since(now)) => None,
                },
                Step::Renew { lease, lock, budget, hear_first } => {
                    self.renew(lease, lock, budget, hear_first).await;
                    orders.try_recv().ok()
                }
                Step::Grant { ttl, budget } => {
                    self.grant(ttl, budget).await;
                    orders.try_recv().ok()
                }
            };
            match order {
                Some(Command::Stop) => return,
                Some(order) => self.obey(order).await,
                None => {}
            }
        }
    }

    async fn obey(&mut self, order: Command) {
        let now = BootTime::now();
        match order {
            Command::Adopt(lease, lock) => self.book.adopt(lease, lock, now),
            Command::Grant => {
                let said = self.book.grant(now);
                self.tell(said);
            }
            Command::Hold(lock) => {
                let refused = self.book.hold(lock, now).err().map(|why| LeaseEvent::Failed { why });
                self.tell(refused);
            }
            Command::LetGo => self.book.let_go(),
            Command::Arm(armed) => {
                let disarmed = self.book.arm(armed, now);
                self.tell(disarmed);
            }
            Command::ChangeTimes(times) => self.book.change_times(times, now),
            Command::ChangeSettings(settings) => match Pool::new(*settings) {
                Ok(pool) => self.renewer = Renewer::new(pool),
                Err(e) => self.tell(Some(LeaseEvent::Failed { why: format!("the old etcd settings stay: {e}") })),
            },
            Command::Revoke => {
                if let Some(lease) = self.book.forget()
                    && let Err(e) = self.renewer.revoke(lease).await
                {
                    self.tell(Some(LeaseEvent::Failed { why: format!("the lease was not revoked and will run out: {e}") }));
                }
            }
            Command::Stop => {}
        }
    }

    async fn grant(&mut self, ttl: Duration, budget: Duration) {
        let event = match self.renewer.grant(ttl, budget).await {
            Ok((identity, sent)) => self.book.granted(identity, sent),
            Err(why) => self.book.grant_failed(BootTime::now(), why),
        };
        self.tell(Some(event));
    }

    async fn renew(&mut self, lease: LeaseIdentity, lock: Option<LockIdentity>, budget: Duration, hear_first: bool) {
        self.book.begun(BootTime::now());
        let event = match self.renewer.renew(lease, lock, budget, hear_first).await {
            Outcome::Renewed { sent, ttl } => {
                self.book.learn_ttl(ttl, BootTime::now());
                match lock {
                    None => self.book.renewed(sent).map(|until| LeaseEvent::Renewed { sent, until }),
                    Some(lock) => self.proved(lock, sent).await,
                }
            }
            Outcome::LockNotOurs { sent, found } => {
                tracing::warn!(found, "the lock is not ours any more");
                if let Some(sent) = sent {
                    self.book.renewed(sent);
                }
                self.book.lock_not_ours()
            }
            Outcome::LeaseNotFound => self.book.not_found(),
            // An answer from a wrong etcd is none, but it is not silence either: who leads is not known then (SAFETY row 43).
            Outcome::Suspicious(why) => Some(LeaseEvent::Failed { why }),
            Outcome::Failed(why) => {
                self.tell(Some(LeaseEvent::Failed { why }));
                self.go_on_by_promises().await
            }
        };
        self.tell(event);
    }

    /// etcd could not be asked: all others are, whether they leave the lock to us. E counts from before the first of the calls.
    async fn go_on_by_promises(&mut self) -> Option<LeaseEvent> {
        let sent = BootTime::now();
        let round = self.book.round(sent)?;
        let (lock, budget) = (round.armed.lock, round.budget);
        let answers = tokio::time::timeout(budget, (self.call_peers)(round)).await;
        if let Err(why) = answers.unwrap_or_else(|_| Err(format!("not every member answered within {budget:?}"))) {
            tracing::warn!(why, "the lock does not go on without etcd");
            return Some(LeaseEvent::Failed { why });
        }
        self.told_guard(lock, sent).await.or_else(|| self.book.sustained(sent).map(|until| LeaseEvent::Sustained { lock, sent, until }))
    }

    async fn proved(&mut self, lock: LockIdentity, sent: BootTime) -> Option<LeaseEvent> {
        self.told_guard(lock, sent).await.or_else(|| self.book.renewed(sent).map(|until| LeaseEvent::Proved { lock, sent, until }))
    }

    /// The guard learns the new deadline first, and everybody else after it. None: it has acknowledged.
    async fn told_guard(&mut self, lock: LockIdentity, sent: BootTime) -> Option<LeaseEvent> {
        let acknowledge = self.acknowledge.clone();
        let times = self.book.held_times();
        let within = times.renewal_interval();
        let waiting = tokio::task::spawn_blocking(move || acknowledge(lock, sent, times));
        let silent: String = match tokio::time::timeout(within, waiting).await {
            Ok(Ok(Acknowledged::Yes)) => return None,
            Ok(Ok(Acknowledged::No(why))) => why,
            Ok(Err(e)) => format!("asking the guard failed: {e}"),
            Err(_) => format!("the guard did not acknowledge the new deadline within {within:?}"),
        };
        tracing::error!(silent, "the lease is not renewed any more");
        Some(self.book.guard_silent())
    }

    fn tell(&self, event: Option<LeaseEvent>) {
        if let Some(event) = event {
            (self.sink)(event);
        }
    }
}
