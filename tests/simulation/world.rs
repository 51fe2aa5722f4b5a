//! The world of one run: a queue of what is to happen, ordered by time and by a seeded coin, and everything it happens to.
//!
//! Nothing in here decides for pgherd: the machine, the guard's state and ladder and the lease's book are the crate's own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use pgherd::clock::BootTime;
use pgherd::facts::cluster::{ClusterView, SpecRecord};
use pgherd::facts::failsafe::PromiseAsk;
use pgherd::facts::postgres::Probe;
use pgherd::machine::event::Event;
use pgherd::spec::cluster::{self, ClusterSpec};
use pgherd::types::{Lsn, MemberName, Revision};

use super::check::Checks;
use super::clock::{Real, ms};
use super::coverage::Coverage;
use super::documents::Replication;
use super::etcd::Etcd;
use super::guard::AskedBy;
use super::host::Host;
use super::network::{EtcdAnswer, EtcdAsk, Link};
use super::plan::Fault;
use super::random::Random;
use super::strikes::Armed;
use super::synchrony::Reader;
use super::trace::Trace;

/// How often clients try every server.
const CLIENT_EVERY_MS: u64 = 40;
/// More events than that at one instant are a circle (L5).
const AT_ONCE_MAX: u32 = 10_000;
/// Hosts boot long before a run begins, so that nothing saturates at zero.
const BOOTED_BEFORE_S: u64 = 1_000;

/// Something that is to happen to one run of a daemon; it waits while the daemon is frozen.
#[derive(Debug, Clone)]
pub enum DaemonDue {
    /// A fact for the machine.
    Fact(Box<Event>),
    Wake {
        token: u64,
    },
    Probe {
        token: u64,
    },
    Probed {
        probe: Box<Probe>,
    },
    LeaseWake {
        token: u64,
    },
    LeaseBudget {
        token: u64,
    },
    WatchTick,
    WatchRetry,
    View {
        token: u64,
        view: Arc<ClusterView>,
    },
    Answer {
        call: u64,
        answer: Box<EtcdAnswer>,
        revision: Revision,
    },
    Timeout {
        call: u64,
    },
    GuardSilent {
        ask: u64,
        from: AskedBy,
    },
    Job {
        id: u64,
        step: u32,
    },
    Peers {
        id: u64,
    },
    /// A peer's answer to a call of failsafe.
    Promised {
        round: u64,
        from: MemberName,
        promised: bool,
    },
    PromisesOver {
        round: u64,
    },
    Scan {
        id: u64,
    },
}

impl DaemonDue {
    /// A timer of the daemon's own, which on waking may be seen before or after what came meanwhile.
    fn is_timer(&self) -> bool {
        matches!(
            self,
            DaemonDue::Wake { .. }
                | DaemonDue::Probe { .. }
                | DaemonDue::LeaseWake { .. }
                | DaemonDue::LeaseBudget { .. }
                | DaemonDue::WatchTick
                | DaemonDue::WatchRetry
                | DaemonDue::Timeout { .. }
                | DaemonDue::GuardSilent { .. }
                | DaemonDue::PromisesOver { .. }
        )
    }
}

#[derive(Debug, Clone)]
pub enum What {
    Daemon {
        host: usize,
        run: u64,
        due: DaemonDue,
    },
    /// A request arrives at etcd.
    Arrive {
        host: usize,
        run: u64,
        call: u64,
        ask: Box<EtcdAsk>,
        held: u64,
    },
    EtcdTick,
    GuardWake {
        host: usize,
        pid: i32,
        token: u64,
    },
    Server {
        host: usize,
    },
    /// A walreceiver tries, or notices.
    Receiver {
        host: usize,
        pid: i32,
    },
    /// WAL reaches a standby.
    Stream {
        host: usize,
        pid: i32,
    },
    /// The postmaster gets SIGHUP.
    Reload {
        host: usize,
        pid: i32,
    },
    /// One of its processes reads the files.
    Rereads {
        host: usize,
        pid: i32,
        reader: Reader,
    },
    /// A standby's answer is at the walsender.
    Reply {
        host: usize,
        from: usize,
        connection: u64,
        flush: Lsn,
    },
    /// A call of failsafe arrives at the HTTP API of `to`.
    PromiseCall {
        host: usize,
        run: u64,
        round: u64,
        to: MemberName,
        ask: Box<PromiseAsk>,
    },
    /// The end of etcd for one host.
    CutEtcd {
        host: usize,
    },
    Supervisor {
        host: usize,
    },
    KillDaemon {
        host: usize,
    },
    Flap {
        host: usize,
    },
    Client,
    Fault {
        index: usize,
    },
    FaultEnds {
        index: usize,
    },
}

struct Entry {
    at: Real,
    tie: u32,
    number: u64,
    what: What,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.tie, self.number).cmp(&(other.at, other.tie, other.number))
    }
}

pub struct Sim {
    pub now: Real,
    /// Events since time went by last.
    at_once: u32,
    queue: BinaryHeap<Reverse<Entry>>,
    entries: u64,
    pub ids: u64,
    pub random: Random,
    ties: Random,
    /// When processes read files, and answers of standbys: apart, so that what does not wait goes on as it was.
    pub timing: Random,
    /// Commits wait for standbys at some time in this run.
    pub is_synchronous: bool,
    /// As the spec has it.
    pub replication: Replication,
    /// A standby is to stream from another.
    pub cascades: bool,
    pub etcd: Etcd,
    pub hosts: Vec<Host>,
    /// To etcd and back, for each host.
    pub links: Vec<(Link, Link)>,
    /// Host to host, for replication and HTTP: true = cut.
    pub peers_cut: BTreeMap<(usize, usize), bool>,
    pub specs: BTreeMap<u64, Arc<ClusterSpec>>,
    /// Tokens of promotions: who wrote which WAL.
    pub wal_tokens: u64,
    pub system_ids: u64,
    pub plan: Vec<Fault>,
    pub armed: Vec<Armed>,
    pub trace: Trace,
    pub checks: Checks,
    pub coverage: Coverage,
    /// Calls of failsafe that a machine has not answered: who asked, in which run and round, and who was asked.
    pub promise_calls: BTreeMap<u64, (usize, u64, u64, MemberName)>,
    /// Everything was put right: what the plan still has is over.
    pub healed: bool,
    /// Clients write.
    pub load: bool,
}

/// `a`, `b`, `c` …
pub fn member(index: usize) -> MemberName {
    let letter = char::from(b'a' + u8::try_from(index).unwrap_or(0));
    letter.to_string().parse().expect("a letter is a name")
}

/// A spec of the members, with the given lines of `spec:`.
pub fn spec_of(members: &[String], rest: &str) -> Arc<ClusterSpec> {
    use std::fmt::Write as _;
    let mut text = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n".to_owned();
    for (index, member) in members.iter().enumerate() {
        writeln!(text, "    - {{ address: 198.18.0.{}, name: {member} }}", index + 1).expect("writing to a string");
    }
    for line in rest.lines() {
        writeln!(text, "  {line}").expect("writing to a string");
    }
    Arc::new(cluster::load("simulation", &text).unwrap_or_else(|problems| panic!("{problems}\n{text}")).spec)
}

impl Sim {
    /// Hosts with empty data directories and a daemon on each; no spec is applied yet.
    pub fn new(seed: u64, hosts: usize, traced: bool) -> Self {
        let mut sim = Sim::of_hosts(seed, hosts, traced);
        sim.later(ms(1), What::EtcdTick);
        sim.later(ms(CLIENT_EVERY_MS), What::Client);
        for host in 0..hosts {
            sim.start_daemon(host);
        }
        sim
    }

    /// Hosts with empty data directories on which nothing runs.
    pub fn of_hosts(seed: u64, hosts: usize, traced: bool) -> Self {
        let mut sim = Sim {
            now: Real(0),
            at_once: 0,
            queue: BinaryHeap::new(),
            entries: 0,
            ids: 0,
            random: Random::new(seed, 1),
            ties: Random::new(seed, 2),
            timing: Random::new(seed, 6),
            is_synchronous: false,
            replication: Replication::ASYNC,
            cascades: false,
            etcd: Etcd::new(),
            hosts: Vec::new(),
            links: vec![(Link::default(), Link::default()); hosts],
            peers_cut: BTreeMap::new(),
            specs: BTreeMap::new(),
            wal_tokens: 0,
            system_ids: 7_512_345_678_901_234_560,
            plan: Vec::new(),
            armed: Vec::new(),
            trace: Trace::new(traced),
            checks: Checks::new(),
            coverage: Coverage::default(),
            promise_calls: BTreeMap::new(),
            healed: false,
            load: true,
        };
        for index in 0..hosts {
            let booted = BootTime((BOOTED_BEFORE_S + sim.random.below(100_000)) * 1_000_000_000);
            sim.hosts.push(Host::new(member(index), booted));
        }
        sim
    }

    pub fn apply(&mut self, spec: Arc<ClusterSpec>) {
        let generation = self.specs.len() as u64 + 1;
        self.specs.insert(generation, spec);
        let record = SpecRecord { generation, document: format!("generation {generation}"), by: "operator".to_owned(), at: String::new() };
        self.etcd.by_hand(|keys, revision| (keys.spec, keys.spec_revision) = (Some(record), revision));
        self.etcd_changed();
    }

    pub fn at(&mut self, at: Real, what: What) {
        self.entries += 1;
        let tie = (self.ties.number() >> 32) as u32;
        self.queue.push(Reverse(Entry { at: at.max(self.now), tie, number: self.entries, what }));
    }

    pub fn later(&mut self, span: Duration, what: What) {
        self.at(self.now.after(span), what);
    }

    pub fn local(&self, host: usize) -> BootTime {
        self.hosts[host].local(self.now)
    }

    /// After so long by the host's own clock.
    pub fn daemon_later(&mut self, host: usize, run: u64, span: Duration, due: DaemonDue) {
        let at = self.hosts[host].clock.real(self.now, self.local(host) + span);
        self.at(at, What::Daemon { host, run, due });
    }

    pub fn daemon_at_local(&mut self, host: usize, at: BootTime, due: DaemonDue) {
        let Some(run) = self.hosts[host].daemon.as_ref().map(|daemon| daemon.run) else { return };
        let at = self.hosts[host].clock.real(self.now, at);
        self.at(at, What::Daemon { host, run, due });
    }

    pub fn say(&mut self, host: Option<usize>, line: impl FnOnce() -> String) {
        self.trace.say(self.now, host, line);
    }

    /// The next thing that happens. False = nothing is left before `until`.
    pub fn step(&mut self, until: Real) -> bool {
        match self.queue.peek() {
            Some(Reverse(entry)) if entry.at <= until => {}
            _ => {
                self.now = self.now.max(until);
                return false;
            }
        }
        let Some(Reverse(entry)) = self.queue.pop() else { return false };
        self.at_once = if entry.at == self.now { self.at_once + 1 } else { 0 };
        if self.at_once > AT_ONCE_MAX {
            self.checks.fail("L5", format!("{AT_ONCE_MAX} events without any time between them"));
        }
        self.now = entry.at;
        self.trace.mark(entry.at, &entry.what);
        self.happen(entry.what);
        self.check();
        true
    }

    pub fn run_until(&mut self, until: Real) {
        while self.checks.violation.is_none() && self.step(until) {}
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Daemon { host, run, due } => self.daemon_due(host, run, due),
            What::Arrive { host, run, call, ask, held } => self.arrive(host, run, call, ask, held),
            What::EtcdTick => self.etcd_tick(),
            What::GuardWake { host, pid, token } => self.guard_wakes(host, pid, token),
            What::Server { host } => self.server_due(host),
            What::Receiver { host, pid } => self.receiver_due(host, pid),
            What::Stream { host, pid } => self.wal_arrives(host, pid),
            What::Reload { host, pid } => self.reloads(host, pid),
            What::Rereads { host, pid, reader } => self.rereads(host, pid, reader),
            What::Reply { host, from, connection, flush } => self.replied(host, from, connection, flush),
            What::PromiseCall { host, run, round, to, ask } => self.peer_is_called(host, run, round, to, *ask),
            What::CutEtcd { host } => self.cut_off_from_etcd(host),
            What::Supervisor { host } => self.supervise(host),
            What::KillDaemon { host } => self.daemon_ends(host, None),
            What::Flap { host } => self.flap(host),
            What::Client => {
                self.clients_write();
                self.later(ms(CLIENT_EVERY_MS), What::Client);
            }
            What::Fault { index } => self.fault_begins(index),
            What::FaultEnds { index } => self.fault_ends(index),
        }
    }

    /// Something is due for a daemon: now, or when it goes on.
    pub fn daemon_due(&mut self, host: usize, run: u64, due: DaemonDue) {
        let stands = self.hosts[host].stands;
        let Some(daemon) = self.hosts[host].daemon_of(run) else { return };
        if daemon.frozen || stands {
            return daemon.parked.push(due);
        }
        match due {
            DaemonDue::Fact(event) => {
                daemon.facts.push_back(*event);
                self.pump(host);
            }
            DaemonDue::Wake { token } => self.wakes(host, token),
            DaemonDue::Probe { token } => self.probe(host, token),
            DaemonDue::Probed { probe } => self.probed(host, *probe),
            DaemonDue::LeaseWake { token } => self.lease_wake(host, token),
            DaemonDue::LeaseBudget { token } => self.lease_budget(host, token),
            DaemonDue::WatchTick => self.watch_tick(host),
            DaemonDue::WatchRetry => self.watch_retries(host),
            DaemonDue::View { token, view } => self.watch_delivers(host, token, view),
            DaemonDue::Answer { call, answer, revision } => self.answered(host, run, call, Some((*answer, revision))),
            DaemonDue::Timeout { call } => self.answered(host, run, call, None),
            DaemonDue::GuardSilent { ask, from } => self.guard_silent(host, run, ask, from),
            DaemonDue::Job { id, step } => self.job_goes_on(host, id, step),
            DaemonDue::Peers { id } => self.peers_answer(host, id),
            DaemonDue::Promised { round, from, promised } => self.promise_heard(host, round, &from, promised),
            DaemonDue::PromisesOver { round } => self.promises_over(host, round),
            DaemonDue::Scan { id } => self.scan_on(host, id),
        }
    }

    /// What waited goes on: timers first or last, as the coin falls; messages in the order they came.
    pub fn unpark(&mut self, host: usize) {
        let timers_first = self.random.percent(50);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let run = daemon.run;
        let (timers, messages): (Vec<_>, Vec<_>) = std::mem::take(&mut daemon.parked).into_iter().partition(DaemonDue::is_timer);
        let all = if timers_first { [timers, messages] } else { [messages, timers] };
        for (index, due) in all.into_iter().flatten().enumerate() {
            self.later(Duration::from_micros(1 + index as u64), What::Daemon { host, run, due });
        }
    }

    pub fn cut(&self, one: usize, other: usize) -> bool {
        self.peers_cut.get(&(one.min(other), one.max(other))).copied().unwrap_or(false)
    }

    pub fn host_of(&self, name: &MemberName) -> Option<usize> {
        // By what it should be called: a daemon may be started under another's name.
        (0..self.hosts.len()).find(|host| member(*host) == *name)
    }
}
