//! A small cluster: up to three watched machines, each with a toy server and guard, around one toy etcd. Time goes in steps.
//!
//! The ends of operations overtake facts, as in the daemon's two queues: an answer is delivered in the step in which it is given, what
//! guard, etcd and probe show comes a step later.

pub(crate) mod etcd;
mod lease;
mod perform;
pub(crate) mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::SpecRecord;
use crate::facts::postgres::{Probe, ReplicaFacts};
use crate::facts::requests::{Ask, RequestKey, RequestProgress, RequestRecord};
use crate::machine::action::{Action, OperationKind};
use crate::machine::event::Event;
use crate::machine::tests::checked::Checked;
use crate::machine::tests::fixtures::{T0, incarnation, me, ms, name};
use crate::spec::cluster::ClusterSpec;
use crate::types::{Lsn, MemberName, Revision, TimelineId};

use self::etcd::ToyEtcd;
use self::lease::ToyLease;
use self::perform::Pending;
use self::server::{Process, Server};

const STEP_MS: u64 = 5;
/// How long etcd has to be away before the watch says so.
const UNREACHABLE_AFTER_MS: u64 = 800;

/// One daemon's run.
pub(crate) struct Daemon {
    pub(crate) checked: Checked,
    lease: ToyLease,
    pending: Vec<Pending>,
    next_look: BootTime,
    next_probe: BootTime,
    seen: Option<(Revision, u64)>,
    unreachable_since: Option<BootTime>,
    said_unreachable: bool,
    facts_seen: Option<(i32, u64)>,
    inbox: Vec<(BootTime, Event)>,
    /// Probes on their way.
    probe: Option<Probe>,
}

pub(crate) struct Host {
    pub(crate) server: Server,
    pub(crate) daemon: Option<Daemon>,
    /// Reaches etcd.
    pub(crate) connected: bool,
    /// Operations that are carried out, but whose answer never comes.
    pub(crate) lost_answers: BTreeSet<OperationKind>,
    /// Operations that come to nothing.
    pub(crate) failing: BTreeSet<OperationKind>,
    /// Jobs of this kind never end by themselves.
    pub(crate) hanging: BTreeSet<OperationKind>,
    pub(crate) exit: Option<u8>,
    runs: u64,
}

pub(crate) struct Toy {
    pub(crate) now: BootTime,
    pub(crate) etcd: ToyEtcd,
    pub(crate) hosts: BTreeMap<MemberName, Host>,
    specs: BTreeMap<u64, Arc<ClusterSpec>>,
    /// Who promoted to which timeline id: each id once, ever (I9).
    pub(crate) promoted: BTreeMap<TimelineId, MemberName>,
    /// Who made what follows initdb: the application's roles and databases.
    pub(crate) post_init: BTreeSet<MemberName>,
    tokens: u64,
    /// Clients write.
    pub(crate) load: bool,
    /// All decisions, for the message of a test that fails.
    pub(crate) log: Vec<String>,
    pub(crate) events_handled: usize,
    primaries_seen: BTreeSet<String>,
    /// Whose HTTP calls do not reach whom.
    pub(crate) cut: BTreeSet<(MemberName, MemberName)>,
    /// Answers to calls of a leader without etcd.
    answers: BTreeMap<u64, Result<(), String>>,
}

impl Toy {
    /// Hosts with empty data directories, and a daemon on each. No spec is applied yet.
    pub(crate) fn new(members: &[&str]) -> Self {
        let mut toy = Toy {
            now: T0,
            etcd: ToyEtcd::new(T0, Duration::from_secs(10)),
            hosts: BTreeMap::new(),
            specs: BTreeMap::new(),
            promoted: BTreeMap::new(),
            post_init: BTreeSet::new(),
            tokens: 0,
            load: true,
            log: Vec::new(),
            events_handled: 0,
            primaries_seen: BTreeSet::new(),
            cut: BTreeSet::new(),
            answers: BTreeMap::new(),
        };
        for member in members {
            let host = Host {
                server: Server::new(),
                daemon: None,
                connected: true,
                lost_answers: BTreeSet::new(),
                failing: BTreeSet::new(),
                hanging: BTreeSet::new(),
                exit: None,
                runs: 0,
            };
            toy.hosts.insert(name(member), host);
            toy.start_daemon(member);
        }
        toy
    }

    /// A cluster that works: a spec of these members is applied and everything has come together.
    pub(crate) fn working(members: &[&str]) -> Self {
        Self::working_with(members, crate::machine::tests::fixtures::spec(members))
    }

    pub(crate) fn working_with(members: &[&str], spec: Arc<ClusterSpec>) -> Self {
        let mut toy = Self::new(members);
        toy.apply(spec);
        toy.converges(Duration::from_secs(30));
        // What the leader knows of its standbys is as old as its last probe.
        toy.run(Duration::from_secs(2));
        toy
    }

    pub(crate) fn apply(&mut self, spec: Arc<ClusterSpec>) {
        let generation = self.specs.len() as u64 + 1;
        self.specs.insert(generation, spec);
        let record = SpecRecord { generation, document: format!("generation {generation}"), by: "test".to_owned(), at: String::new() };
        self.etcd.by_hand(|keys| {
            keys.spec = Some(record);
            keys.spec_revision.0 = keys.revision.0 + 1;
        });
    }

    pub(crate) fn host(&mut self, member: &str) -> &mut Host {
        self.hosts.get_mut(&name(member)).unwrap()
    }

    pub(crate) fn daemon(&self, member: &str) -> &Daemon {
        self.hosts[&name(member)].daemon.as_ref().unwrap_or_else(|| panic!("the daemon of {member} does not run"))
    }

    pub(crate) fn state(&self, member: &str) -> &'static str {
        self.daemon(member).checked.state().name()
    }

    pub(crate) fn start_daemon(&mut self, member: &str) {
        let now = self.now;
        let host = self.host(member);
        host.runs += 1;
        host.exit = None;
        if host.server.guard.is_none() {
            host.server.new_guard();
        }
        let me = crate::machine::world::Me { incarnation: incarnation(host.runs), ..me(member) };
        host.daemon = Some(Daemon {
            checked: Checked::new(me),
            lease: ToyLease::default(),
            pending: Vec::new(),
            next_look: now,
            next_probe: now,
            seen: None,
            unreachable_since: None,
            said_unreachable: false,
            facts_seen: None,
            inbox: Vec::new(),
            probe: None,
        });
    }

    /// SIGKILL to the daemon: guard and PostgreSQL stay.
    pub(crate) fn kill_daemon(&mut self, member: &str) {
        self.host(member).daemon = None;
    }

    /// The power goes: everything of this host, but what is on disk.
    pub(crate) fn power_off(&mut self, member: &str) {
        let now = self.now;
        let host = self.host(member);
        host.daemon = None;
        host.server.crash(now);
        host.server.guard = None;
    }

    /// The guard ends; its death signal takes PostgreSQL with it.
    pub(crate) fn kill_guard(&mut self, member: &str) {
        let now = self.now;
        let host = self.host(member);
        host.server.crash(now);
        host.server.guard = None;
        if let Some(daemon) = &mut host.daemon {
            daemon.inbox.push((now + ms(STEP_MS), Event::GuardGone));
        }
    }

    pub(crate) fn stop_daemon(&mut self, member: &str) {
        self.deliver(&name(member), Event::StopRequested);
    }

    pub(crate) fn ask(&mut self, id: &str, ask: Ask) {
        let record = RequestRecord { ask, by: "a test".to_owned(), at: String::new(), progress: RequestProgress::Created };
        let mod_revision = Revision(self.etcd.keys.revision.0 + 1);
        self.etcd.by_hand(|keys| {
            keys.requests.insert(id.to_owned(), RequestKey { record, mod_revision });
        });
    }

    pub(crate) fn progress(&self, id: &str) -> &RequestProgress {
        &self.etcd.keys.requests[id].record.progress
    }

    pub(crate) fn leader(&self) -> Option<&str> {
        self.etcd.keys.leader.as_ref().map(|leader| leader.holder.as_str())
    }

    /// Whose server takes writes.
    pub(crate) fn primary(&self) -> Option<&str> {
        self.hosts.iter().find(|(_, host)| host.server.acknowledges(self.now)).map(|(name, _)| name.as_str())
    }

    pub(crate) fn run(&mut self, span: Duration) {
        let until = self.now + span;
        while self.now < until {
            self.step();
        }
    }

    /// Runs until something holds.
    pub(crate) fn until(&mut self, what: &str, within: Duration, holds: impl Fn(&Toy) -> bool) {
        let deadline = self.now + within;
        while !holds(self) {
            assert!(self.now < deadline, "not within {within:?}: {what}\n{}", self.story());
            self.step();
        }
    }

    /// One primary that holds the lock, and everybody else that is declared and up streams from it: L1.
    pub(crate) fn converges(&mut self, within: Duration) {
        self.until("one primary, all others streaming", within, Toy::has_converged);
    }

    fn has_converged(&self) -> bool {
        let Some(leader) = self.leader() else { return false };
        self.hosts.iter().filter(|(_, host)| host.daemon.is_some()).all(|(name, host)| {
            let state = self.state(name.as_str());
            if name.as_str() == leader {
                state == "primary" && host.server.acknowledges(self.now)
            } else {
                state == "following" && host.server.streaming
            }
        })
    }

    /// Where everybody is, and the last decisions.
    pub(crate) fn story(&self) -> String {
        use std::fmt::Write as _;
        let mut story = format!("at {:?}, leader {:?}\n", self.now, self.etcd.keys.leader);
        for (name, host) in &self.hosts {
            let machine = host.daemon.as_ref().map(|daemon| {
                let world = daemon.checked.world();
                (daemon.checked.state(), &world.lock, &world.in_flight, &world.conditions)
            });
            let _ =
                writeln!(story, "{name}: {machine:?} {:?} {:?}", host.server.process, host.server.data.as_ref().map(|d| (&d.wal, d.end)));
        }
        for line in self.log.iter().rev().take(40).rev() {
            let _ = writeln!(story, "  {line}");
        }
        story
    }

    fn step(&mut self) {
        self.now = self.now + ms(STEP_MS);
        self.etcd.tick(self.now);
        let names: Vec<MemberName> = self.hosts.keys().cloned().collect();
        for name in &names {
            let shut_down = self.hosts.get_mut(name).and_then(|host| host.server.tick(self.now));
            if let Some(end) = shut_down {
                self.send_the_last_record(name, end);
            }
        }
        self.stream();
        for name in &names {
            self.carry_out(name);
            self.keep_lease(name);
            self.watch(name);
            self.guard_and_probe(name);
            self.inbox(name);
            self.look(name);
        }
        self.at_most_one_writer();
    }

    /// I1, whatever happens.
    fn at_most_one_writer(&mut self) {
        let writers: Vec<&str> = self
            .hosts
            .iter()
            .filter(|(_, host)| host.server.acknowledges(self.now) && !host.server.promoted_by_hand)
            .map(|(name, _)| name.as_str())
            .collect();
        assert!(writers.len() <= 1, "I1: {writers:?} all take writes\n{}", self.story());
        self.primaries_seen.extend(writers.into_iter().map(str::to_owned));
    }

    /// A primary that stops in good order sends the shutdown checkpoint to those who stream.
    fn send_the_last_record(&mut self, from: &MemberName, end: Lsn) {
        let Some(source) = self.hosts[from].server.data.clone() else { return };
        for host in self.hosts.values_mut().filter(|host| host.server.streaming && host.server.upstream.as_ref() == Some(from)) {
            if let Some(data) = host.server.data.as_mut().filter(|data| data.is_in_the_past_of(&source)) {
                data.wal = source.wal.clone();
                data.end = end;
            }
        }
    }

    /// WAL grows on the primary and flows to standbys whose own seems to be in its past. That it only seems so must not happen.
    fn stream(&mut self) {
        let now = self.now;
        let mut primaries = BTreeMap::new();
        for (name, host) in &mut self.hosts {
            // One that stops in good order waits until its standbys have everything.
            let stops = matches!(host.server.process, Process::Ending { clean: true, was_recovering: false, .. });
            if stops || host.server.accepting(now) && !host.server.in_recovery() {
                let grows = self.load && !stops;
                if let Some(data) = &mut host.server.data {
                    data.end = Lsn(data.end.0 + if grows { 10 } else { 0 });
                    primaries.insert(name.clone(), data.clone());
                }
            }
        }
        let mut mixed = None;
        for (name, host) in &mut self.hosts {
            let server = &mut host.server;
            let source = server.upstream.as_ref().and_then(|upstream| primaries.get(upstream));
            let receives = server.accepting(now) && server.in_recovery();
            let flows = source.filter(|source| receives && server.data.as_ref().is_some_and(|data| data.seems_in_the_past_of(source)));
            server.streaming = flows.is_some();
            if let (Some(source), Some(data)) = (flows, &mut server.data) {
                mixed = mixed.or(Some(name.clone()).filter(|_| !data.is_in_the_past_of(source)));
                data.wal = source.wal.clone();
                data.end = source.end;
            }
        }
        if let Some(name) = mixed {
            panic!("row 53: `{name}` streams over WAL of its own\n{}", self.story());
        }
    }

    fn replicas_of(&self, upstream: &MemberName) -> Vec<ReplicaFacts> {
        let streaming = self.hosts.iter().filter(|(_, host)| host.server.streaming && host.server.upstream.as_ref() == Some(upstream));
        let row = |(name, host): (&MemberName, &Host)| ReplicaFacts {
            application_name: name.as_str().to_owned(),
            state: "streaming".to_owned(),
            client_addr: None,
            sent_lsn: host.server.data.as_ref().map(|data| data.end),
            flush_lsn: host.server.data.as_ref().map(|data| data.end),
            replay_lsn: None,
            sync_state: "async".to_owned(),
            sync_priority: 0,
        };
        streaming.map(row).collect()
    }

    pub(crate) fn reaches_etcd(&self, member: &MemberName) -> bool {
        self.etcd.up && self.hosts[member].connected
    }

    fn watch(&mut self, member: &MemberName) {
        let (now, reaches) = (self.now, self.reaches_etcd(member));
        let keys = &self.etcd.keys;
        let at = (keys.revision, keys.spec.as_ref().map_or(0, |spec| spec.generation));
        let Some(daemon) = self.hosts.get_mut(member).and_then(|host| host.daemon.as_mut()) else { return };
        if !reaches {
            let since = *daemon.unreachable_since.get_or_insert(now);
            if !daemon.said_unreachable && now.since(since) >= ms(UNREACHABLE_AFTER_MS) {
                daemon.said_unreachable = true;
                daemon.seen = None;
                daemon.inbox.push((now, Event::EtcdUnreachable("no endpoint answers".to_owned())));
            }
            return;
        }
        daemon.unreachable_since = None;
        daemon.said_unreachable = false;
        if daemon.seen == Some(at) {
            return;
        }
        let spec_changed = daemon.seen.is_none_or(|(_, generation)| generation != at.1);
        daemon.seen = Some(at);
        if let Some(spec) = self.specs.get(&at.1).filter(|_| spec_changed) {
            daemon.inbox.push((now + ms(STEP_MS), Event::SpecRead(at.1, Arc::clone(spec))));
        }
        daemon.inbox.push((now + ms(STEP_MS), Event::View(Arc::new(keys.clone()), now)));
    }

    fn guard_and_probe(&mut self, member: &MemberName) {
        let now = self.now;
        let replicas = self.replicas_of(member);
        let Some(host) = self.hosts.get_mut(member) else { return };
        let Some(daemon) = &mut host.daemon else { return };
        if let Some(facts) = host.server.facts()
            && daemon.facts_seen != Some((facts.pid, facts.sequence))
        {
            daemon.facts_seen = Some((facts.pid, facts.sequence));
            daemon.inbox.push((now + ms(STEP_MS), Event::Guard(facts)));
        }
        if let Some(probe) = daemon.probe.take() {
            daemon.inbox.push((now, Event::Probed(probe)));
        } else if now >= daemon.next_probe && daemon.checked.world().running().is_some() {
            daemon.next_probe = now + daemon.checked.machine.probe_every(now);
            daemon.probe = Some(host.server.probe(now, replicas));
        }
    }

    fn inbox(&mut self, member: &MemberName) {
        let Some(daemon) = self.hosts.get_mut(member).and_then(|host| host.daemon.as_mut()) else { return };
        let now = self.now;
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut daemon.inbox).into_iter().partition(|(at, _)| *at <= now);
        daemon.inbox = later;
        for (_, event) in due {
            self.deliver(member, event);
        }
    }

    fn look(&mut self, member: &MemberName) {
        let due = self.hosts[member].daemon.as_ref().is_some_and(|daemon| daemon.next_look <= self.now);
        if due {
            self.deliver(member, Event::Tick);
        }
    }

    pub(crate) fn deliver(&mut self, member: &MemberName, event: Event) {
        let now = self.now;
        let Some(daemon) = self.hosts.get_mut(member).and_then(|host| host.daemon.as_mut()) else { return };
        self.events_handled += 1;
        let actions = daemon.checked.handle(now, event);
        daemon.next_look = daemon.checked.machine.next_look(now);
        assert!(daemon.next_look > now, "{member} wants to look again at once");
        for action in actions {
            if let Action::Record(decision) = &action {
                let (from, to) = (decision.facts.get("from"), decision.facts.get("to"));
                let way = from.zip(to).map(|(from, to)| format!("{from} -> {to}: ")).unwrap_or_default();
                self.log.push(format!("{now:?} {member} {way}{}", decision.message));
            }
            self.perform(member, action);
        }
    }
}
