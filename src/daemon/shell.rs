//! The loop: take an event, ask the machine, carry out its actions, tell the HTTP API. And the tasks that feed the queue.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::clock::{BootTime, wall_clock_s};
use crate::etcd::{Etcd, WatchEvent, WatchTimes};
use crate::facts::cluster::{ClusterView, Versions};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::guard::protocol::{PROTOCOL_VERSION, Request};
use crate::http;
use crate::http::promises::Promises;
use crate::http::snapshot::Snapshot;
use crate::machine::Machine;
use crate::machine::action::Action;
use crate::machine::event::Event;
use crate::machine::world::Me;
use crate::routing;
use crate::spec;

use super::executor::Executor;
use super::guard_link::{GuardLink, Sink};
use super::host::Host;
use super::{prober, snapshot};

/// The ttl that the watch's bounds are derived from before a spec is known.
const TTL_BEFORE_SPEC_S: u64 = 10;
/// How long the daemon may take to say good-bye.
const GOOD_BYE_TIMEOUT_MS: u64 = 5_000;

/// How often the machine is told the wall clock while a switchover is scheduled.
const WALL_CLOCK_EVERY: Duration = Duration::from_secs(1);

/// What the signal handlers ask for.
enum Signalled {
    Stop,
    Leave,
    Reread,
}

/// How the daemon leaves by the machine's word.
enum Leaving {
    /// PostgreSQL has ended; the guard ends too.
    Ended(u8),
    /// Guard and PostgreSQL stay.
    AsItIs,
}

/// What waits for the machine.
pub struct Queue {
    /// Facts, which come again.
    pub events: mpsc::Receiver<Event>,
    /// Ends of operations, which do not.
    pub ends: mpsc::Receiver<Event>,
}

/// Runs until the machine, or SIGUSR2, ends it.
pub async fn run(host: Arc<Host>, guard: Arc<GuardLink>, sink: Sink, mut queue: Queue) -> anyhow::Result<u8> {
    let etcd = Etcd::new(host.etcd_settings()?).context("etcd's settings in the node document")?;
    let (pace, pace_seen) = watch::channel(None);
    let (published, answers) =
        watch::channel(Arc::new(Snapshot::unknown(BootTime::now(), host.node.name.clone(), host.node.cluster.clone())));
    let _watch = feed_watch(&etcd, &sink);
    tokio::spawn(prober::run(Arc::clone(&host), pace_seen, Arc::clone(&sink)));
    warn_of_old_etcd(etcd.clone());
    end_lease_before_boot(&host, &guard, etcd.clone());
    let mut signals = signals()?;
    let mut machine = Machine::new(Me {
        name: host.node.name.clone(),
        incarnation: host.incarnation.clone(),
        versions: Versions { pgherd: env!("CARGO_PKG_VERSION").to_owned(), postgres: None, guard_protocol: PROTOCOL_VERSION },
    });
    let (calls, routed) = (Arc::clone(&sink), Arc::clone(&sink));
    let promises = Promises::new(Box::new(move |id, ask, received| calls(Event::PromiseAsked { id, ask, received })));
    let mut executor = Executor::new(Arc::clone(&host), etcd, guard, sink, Arc::clone(&promises));
    routing::start(&host.node.routing.haproxy_sockets, &answers, &(Arc::new(move |trouble| routed(Event::Routed(trouble))) as _));
    let mut serving = Serving { host: Arc::clone(&host), answers, promises, server: None };
    serving.begin(None)?;
    let mut kept = snapshot::Kept::default();
    let mut spec_read = SpecReader::default();
    let mut served = None;
    let mut time_told = BootTime::default();
    let publish = |machine: &Machine, kept: &snapshot::Kept| {
        let _ = published.send(Arc::new(snapshot::take(BootTime::now(), &host.node.cluster, machine, kept)));
    };
    loop {
        let now = BootTime::now();
        let wait = machine.next_look(now).since(now);
        let event = tokio::select! {
            biased;
            Some(signalled) = signals.recv() => match signalled {
                Signalled::Stop => Event::StopRequested,
                Signalled::Leave => {
                    executor.leave().await;
                    return Ok(0);
                }
                Signalled::Reread => {
                    executor.reread_secrets();
                    continue;
                }
            },
            Some(end) = queue.ends.recv() => end,
            event = queue.events.recv() => event.context("the queue of events was closed")?,
            () = tokio::time::sleep(wait) => Event::Tick,
        };
        // Facts come oftener than ticks.
        if machine.waits_for_a_time() && now.since(time_told) >= WALL_CLOCK_EVERY {
            time_told = now;
            step(&mut machine, &mut executor, &mut kept, Event::WallClock(wall_clock_s()), &publish);
        }
        if let Event::View(view, _) = &event
            && let Some(read) = spec_read.read(view)
        {
            if let Event::SpecRead(_, spec) = &read {
                host.settle(spec).await.context("finding PostgreSQL's programs")?;
                executor.spec_changed(spec);
                serving.begin(Some(spec))?;
            }
            step(&mut machine, &mut executor, &mut kept, read, &publish);
        }
        let leaving = step(&mut machine, &mut executor, &mut kept, event, &publish);
        let running = machine.world().running().map(|(start, _)| start);
        if running != served && machine.world().sql().is_some() && !machine.world().is_closed() {
            served = running;
            super::jobs::note_served(&host);
        }
        pace.send_if_modified(|pace| {
            let wanted = running.map(|_| machine.probe_every(now));
            std::mem::replace(pace, wanted) != wanted
        });
        if let Some(Leaving::AsItIs) = leaving {
            executor.leave().await;
            return Ok(0);
        }
        if let Some(Leaving::Ended(code)) = leaving {
            let good_bye = tokio::time::timeout(Duration::from_millis(GOOD_BYE_TIMEOUT_MS), executor.good_bye()).await;
            if good_bye.is_err() {
                tracing::warn!("the lease could not be given back in time; it runs out by itself");
            }
            return Ok(code);
        }
    }
}

/// One round: the machine judges, the HTTP API is told, the executor carries out. In this order, so that nobody is sent to a primary that
/// has been ordered to end. Some = leave.
fn step(
    machine: &mut Machine,
    executor: &mut Executor,
    kept: &mut snapshot::Kept,
    event: Event,
    publish: &impl Fn(&Machine, &snapshot::Kept),
) -> Option<Leaving> {
    count(kept, &event);
    let event = executor.before_machine(machine, event)?;
    let was = machine.state().name();
    let actions = machine.handle(BootTime::now(), event);
    let is = machine.state().name();
    // Maintenance mode is neither.
    let maintained = [was, is].contains(&"paused");
    if was != is && is == "primary" && !maintained {
        kept.counters.promotions += 1;
    }
    if was == "primary" && is != "primary" && !maintained {
        *kept.counters.demotions.entry(is.to_owned()).or_default() += 1;
    }
    publish(machine, kept);
    let mut code = None;
    for action in actions {
        match action {
            Action::Exit(with) => code = Some(Leaving::Ended(with)),
            Action::Leave => code = Some(Leaving::AsItIs),
            other => executor.perform(machine, other),
        }
    }
    code
}

fn count(kept: &mut snapshot::Kept, event: &Event) {
    match event {
        Event::Lease(LeaseEvent::Proved { .. } | LeaseEvent::Renewed { .. }) => kept.counters.renewals += 1,
        Event::Lease(LeaseEvent::Failed { .. } | LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound }) => kept.counters.renewal_failures += 1,
        _ => {}
    }
}

fn feed_watch(etcd: &Etcd, sink: &Sink) -> crate::etcd::WatchHandle {
    let sink = Arc::clone(sink);
    etcd.watch(WatchTimes::for_ttl(Duration::from_secs(TTL_BEFORE_SPEC_S)), move |event| {
        sink(match event {
            WatchEvent::View { view, as_of } => Event::View(view, as_of),
            WatchEvent::Unreachable { why, .. } => Event::EtcdUnreachable(why),
            WatchEvent::Suspicious { why } => Event::EtcdSuspicious(why.to_string()),
        });
    })
}

/// Known lease and watch bugs of old servers are said once, loudly (SAFETY 6).
fn warn_of_old_etcd(etcd: Etcd) {
    tokio::spawn(async move {
        match etcd.version().await {
            Ok((_, Some(condition))) => tracing::warn!("{}", condition.message),
            Ok((version, None)) => tracing::info!(version, "etcd"),
            Err(error) => tracing::debug!(error = %error, "etcd's version is not known"),
        }
    });
}

/// After a reboot no guard is left: what hung on this machine's lease before it is over, and need not be waited for.
fn end_lease_before_boot(host: &Host, guard: &GuardLink, etcd: Etcd) {
    let kept = guard.ask(&Request::Facts).is_ok_and(|facts| facts.lease.is_some());
    let Some(old) = host.lease_before_boot().filter(|_| !kept) else { return };
    tokio::spawn(async move {
        match etcd.revoke(old.lease).await {
            Ok(()) => tracing::info!(lease = %old.lease, "the lease of this machine before its reboot was revoked"),
            Err(error) => tracing::info!(error = %error, "the lease of this machine before its reboot is left to run out"),
        }
    });
}

fn signals() -> anyhow::Result<mpsc::Receiver<Signalled>> {
    let (sender, receiver) = mpsc::channel(8);
    let kinds = [(SignalKind::terminate(), 0), (SignalKind::interrupt(), 0), (SignalKind::user_defined2(), 1), (SignalKind::hangup(), 2)];
    for (kind, what) in kinds {
        let mut stream = signal(kind).context("listening for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                let signalled = match what {
                    0 => Signalled::Stop,
                    1 => Signalled::Leave,
                    _ => Signalled::Reread,
                };
                if sender.send(signalled).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(receiver)
}

/// Reads a spec document once for each change.
#[derive(Default)]
struct SpecReader {
    seen: Option<(u64, String)>,
}

impl SpecReader {
    fn read(&mut self, view: &ClusterView) -> Option<Event> {
        let record = view.spec.as_ref()?;
        if self.seen.as_ref().is_some_and(|(generation, document)| *generation == record.generation && *document == record.document) {
            return None;
        }
        self.seen = Some((record.generation, record.document.clone()));
        Some(match spec::cluster::load("spec in etcd", &record.document) {
            Ok(loaded) => Event::SpecRead(record.generation, Arc::new(loaded.spec)),
            Err(problems) => Event::SpecUnreadable(record.generation, problems.to_string()),
        })
    }
}

/// The HTTP API begins at once when the node document says where, otherwise when the spec says on which port. It has a thread of its own.
struct Serving {
    host: Arc<Host>,
    answers: watch::Receiver<Arc<Snapshot>>,
    promises: Arc<Promises>,
    server: Option<http::Server>,
}

impl Serving {
    fn begin(&mut self, spec: Option<&spec::cluster::ClusterSpec>) -> anyhow::Result<()> {
        let port = spec.and_then(|spec| spec.member(&self.host.node.name)).map(|member| member.api_port);
        let listen = self.host.node.api.listen.clone().or_else(|| port.map(|port| format!("0.0.0.0:{port}")));
        let Some(listen) = listen.filter(|_| self.server.is_none()) else { return Ok(()) };
        tracing::info!(listen, "HTTP API");
        self.server =
            Some(http::start(http::serve::bind(&listen)?, self.answers.clone(), Arc::clone(&self.promises), http::Limits::default())?);
        Ok(())
    }
}
