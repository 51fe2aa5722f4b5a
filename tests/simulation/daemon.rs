//! One run of the daemon around the unchanged machine: its queues, the order in which actions are carried out, its probes, its end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pgherd::facts::cluster::Versions;
use pgherd::facts::lease::LeaseEvent;
use pgherd::facts::postgres::{Probe, ProbeOutcome, ReplicaFacts, SlotFacts, SqlFacts, WalReceiverFacts};
use pgherd::guard::protocol::StopOrder;
use pgherd::guard::state::Postmaster;
use pgherd::machine::Machine;
use pgherd::machine::action::{Action, LeaseOrder, StopMode};
use pgherd::machine::edges;
use pgherd::machine::event::{Event, Finished};
use pgherd::machine::world::Me;
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::types::{Incarnation, LockIdentity, Lsn, Revision};

use super::check::Checks;
use super::clock::{Real, ms, secs, us};
use super::guard::{AskedBy, GuardAsk, ORDER_TIMEOUT_MS};
use super::host::{Daemon, Watch};
use super::lease::{Command, LeaseThread};
use super::network::{Caller, EtcdAsk, REQUEST_TIMEOUT_MS};
use super::postgres::Receiver;
use super::strikes::Hook;
use super::world::{DaemonDue, Sim, What};

/// How long a silent guard is waited for at the daemon's start.
const HELLO_TIMEOUT_MS: u64 = 2_000;
/// Processes that were killed at the daemon's start are looked for again after so long.
const LOOK_AGAIN_MS: u64 = 20;
/// The unit's RestartSec.
const RESTART_MS: u64 = 100;
/// Between a fast stop's patience and SIGKILL.
const IMMEDIATE_PATIENCE_MS: u64 = 5_000;
/// The daemon leaves for good with these (RestartPreventExitStatus).
const STAYS_DOWN: [u8; 3] = [2, 4, 7];
/// How long a server may take to answer a probe.
pub const PROBE_TIMEOUT_MS: u64 = 2_000;

impl Sim {
    /// The service manager starts the daemon. It finds its guard, or makes one.
    pub fn start_daemon(&mut self, host: usize) {
        if self.hosts[host].daemon.is_some() || !self.hosts[host].powered {
            return;
        }
        if self.hosts[host].guard.as_ref().is_some_and(|guard| guard.state.crash_loop) {
            self.hosts[host].exit = Some(7);
            return;
        }
        if self.hosts[host].guard.as_ref().is_some_and(|guard| guard.frozen) {
            if !std::mem::replace(&mut self.hosts[host].hello_waits, true) {
                return self.later(ms(HELLO_TIMEOUT_MS), What::Supervisor { host });
            }
            // It does not answer to hello: PostgreSQL is ended without it, and it with that.
            let now = self.now;
            let this = &mut self.hosts[host];
            this.server.kill_all(now, &mut self.random);
            if this.server.is_empty() {
                this.guard = None;
            }
            self.server_changed(host);
            if self.hosts[host].guard.is_some() {
                return self.later(ms(LOOK_AGAIN_MS), What::Supervisor { host });
            }
        }
        if self.hosts[host].guard.is_none() {
            self.spawn_guard(host);
        }
        let this = &mut self.hosts[host];
        this.hello_waits = false;
        this.runs += 1;
        this.exit = None;
        let run = this.runs;
        let incarnation = Incarnation { boot_id: this.boot.to_string(), started_ns: run };
        let me = Me { name: this.name.clone(), incarnation, versions: Versions::default() };
        this.daemon = Some(Daemon {
            run,
            machine: Machine::new(me),
            ends: VecDeque::new(),
            facts: VecDeque::new(),
            actions: VecDeque::new(),
            exit: None,
            frozen: false,
            starved: false,
            parked: Vec::new(),
            wake: 0,
            tick_due: false,
            time_told: Real(0),
            pace: None,
            probe: 0,
            probing: false,
            lease: None,
            watch: Watch::default(),
            calls: BTreeMap::new(),
            records: BTreeMap::new(),
            job: None,
            spec_read: None,
            witness: Revision(0),
            scan: None,
            under_way: BTreeSet::new(),
        });
        if let Some(guard) = &mut this.guard {
            guard.owner = Some(run);
            guard.told = None;
        }
        self.say(Some(host), || format!("daemon: run {run} begins"));
        self.end_lease_before_boot(host);
        self.guard_turn(host);
        self.watch_begins(host);
        self.pump(host);
    }

    /// After a reboot no guard is left: what hung on this machine's lease before it is over.
    fn end_lease_before_boot(&mut self, host: usize) {
        let this = &self.hosts[host];
        let kept = this.guard.as_ref().is_some_and(|guard| guard.state.lease.is_some());
        if let Some((_, lease)) = this.disk.lease.filter(|(boot, _)| *boot != this.boot && !kept) {
            self.call(host, Caller::Nobody, EtcdAsk::Revoke { lease: lease.lease }, ms(REQUEST_TIMEOUT_MS));
        }
    }

    /// The daemon's process ends, by signal or by its own exit.
    pub fn daemon_ends(&mut self, host: usize, exit: Option<u8>) {
        let Some(daemon) = self.hosts[host].daemon.take() else { return };
        self.say(Some(host), || format!("daemon: run {} ends, {exit:?}", daemon.run));
        self.hosts[host].exit = exit;
        self.owner_ended(host, daemon.run);
        // Whoever had it stopped has had it started again, if the service manager is to keep it up.
        let again = self.hosts[host].supervised && exit.is_none_or(|code| !STAYS_DOWN.contains(&code));
        if again {
            self.later(ms(RESTART_MS), What::Supervisor { host });
        }
    }

    pub fn supervise(&mut self, host: usize) {
        if self.hosts[host].supervised && !self.hosts[host].stands {
            self.start_daemon(host);
        }
    }

    /// A fact for the machine, now.
    pub fn fact(&mut self, host: usize, event: Event) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.facts.push_back(event);
            self.pump(host);
        }
    }

    /// A fact for the machine, once it has come through a socket.
    pub fn fact_soon(&mut self, host: usize, event: Event) {
        let Some(run) = self.hosts[host].daemon.as_ref().map(|daemon| daemon.run) else { return };
        let takes = self.random.between(us(50), us(600));
        self.later(takes, What::Daemon { host, run, due: DaemonDue::Fact(Box::new(event)) });
    }

    /// The end of an operation.
    pub fn end(&mut self, host: usize, finished: Finished) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.ends.push_back(Event::Finished(finished));
            self.pump(host);
        }
    }

    pub fn wakes(&mut self, host: usize, token: u64) {
        if let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|daemon| daemon.wake == token) {
            daemon.tick_due = true;
            self.pump(host);
        }
    }

    /// The daemon's loop: ends before facts, facts before ticks; each event's actions in order, and a fault may strike between any two.
    pub fn pump(&mut self, host: usize) {
        if self.checks.pumping.contains(&host) {
            return;
        }
        self.checks.pumping.insert(host);
        while let Some(run) = self.next_turn(host) {
            self.finish_turn(host, run);
        }
        self.checks.pumping.remove(&host);
    }

    /// Carries out what is left of the last event, then takes the next one in. None = there is nothing to do, or nobody to do it.
    fn next_turn(&mut self, host: usize) -> Option<u64> {
        let stands = self.hosts[host].stands;
        let daemon = self.hosts[host].daemon.as_mut().filter(|daemon| !daemon.frozen && !daemon.starved && !stands)?;
        let run = daemon.run;
        if !daemon.actions.is_empty() {
            return Some(run);
        }
        // As the daemon's loop does it: facts come oftener than ticks.
        if daemon.machine.waits_for_a_time() && self.now.since(daemon.time_told) >= secs(1) {
            daemon.time_told = self.now;
            self.handle(host, Event::WallClock(self.now.wall_s()));
            return Some(run);
        }
        let event = match daemon.ends.pop_front().or_else(|| daemon.facts.pop_front()) {
            Some(event) => event,
            None if daemon.tick_due => Event::Tick,
            None => return None,
        };
        if let Event::View(view, _) = &event
            && let Some(record) = view.spec.as_ref().filter(|record| daemon.spec_read != Some(record.generation))
        {
            let generation = record.generation;
            daemon.spec_read = Some(generation);
            daemon.facts.push_front(event.clone());
            if let Some(spec) = self.specs.get(&generation).cloned() {
                self.times_changed(host, spec.lease_times());
                self.handle(host, Event::SpecRead(generation, spec));
            }
            return Some(run);
        }
        self.handle(host, event);
        Some(run)
    }

    fn handle(&mut self, host: usize, event: Event) {
        let local = self.local(host);
        let Some(event) = self.before_machine(host, event) else { return };
        let now = self.now;
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.tick_due = false;
        self.trace.event(now, host, &event);
        Checks::before_event(daemon, &event);
        let actions = daemon.machine.handle(local, event);
        let to = daemon.machine.state().name();
        self.trace.actions(now, host, to, &actions);
        self.checks.judge_actions(local, daemon, &actions, self.etcd.view.sync.as_ref());
        self.checks.after_event(local, daemon, &self.etcd.view);
        self.checks.asked.decided(host, &actions);
        let went = actions.iter().filter_map(|action| if let Action::Record(decision) = action { decision.transition() } else { None });
        for (from, to) in went {
            match edges::find(from, to) {
                Some(edge) => self.coverage.edge(edge.number),
                None => self.checks.fail("edges", format!("no edge {from} -> {to}")),
            }
        }
        let next = daemon.machine.next_look(local);
        daemon.wake += 1;
        let (run, token) = (daemon.run, daemon.wake);
        daemon.actions.extend(actions);
        if next <= local {
            self.checks.fail("L5", format!("{} wants to look again at once", self.hosts[host].name));
        }
        let at = self.hosts[host].clock.real(now, next);
        self.at(at, What::Daemon { host, run, due: DaemonDue::Wake { token } });
    }

    /// Actions one by one, as long as the daemon lives and is not frozen.
    fn finish_turn(&mut self, host: usize, run: u64) {
        loop {
            let stands = self.hosts[host].stands;
            let Some(daemon) = self.hosts[host].daemon_of(run).filter(|daemon| !daemon.frozen && !daemon.starved && !stands) else {
                return;
            };
            let Some(action) = daemon.actions.pop_front() else { break };
            let hook = Hook::of(&action);
            if self.strike(host, hook, true) {
                // Struck down before it: it is carried out only by one that goes on.
                if let Some(daemon) = self.hosts[host].daemon_of(run) {
                    daemon.actions.push_front(action);
                }
                continue;
            }
            self.perform(host, action);
            self.strike(host, hook, false);
        }
        self.set_pace(host);
        if let Some(code) = self.hosts[host].daemon_of(run).and_then(|daemon| daemon.exit) {
            self.leave(host, code);
        }
    }

    /// The daemon's executor looks at lease events first.
    fn before_machine(&mut self, host: usize, event: Event) -> Option<Event> {
        match &event {
            Event::Lease(LeaseEvent::Granted { identity, sent, .. }) => {
                let daemon = self.hosts[host].daemon.as_ref()?;
                let world = daemon.machine.world();
                let (identity, sent) = (*identity, *sent);
                if let Some(old) = world.lease.or(world.adopting).filter(|old| *old != identity) {
                    if let Some(record) = world.key_to_move().cloned() {
                        let lock = world.lock.identity();
                        self.note_lease(host, identity);
                        self.move_keys(host, lock, record, old, identity, sent);
                    }
                    return None;
                }
                self.note_lease(host, identity);
            }
            Event::Lease(LeaseEvent::Moved { to, .. }) => {
                let lock = self.hosts[host].daemon.as_ref()?.machine.world().lock.identity();
                let lock = lock.map(|lock| LockIdentity { lease: *to, ..lock });
                self.lease_command(host, Command::Order(LeaseOrder::Adopt(*to, lock)));
            }
            _ => {}
        }
        Some(event)
    }

    fn note_lease(&mut self, host: usize, identity: pgherd::types::LeaseIdentity) {
        self.guard_ask(host, GuardAsk::Lease { identity }, AskedBy::Order, ms(ORDER_TIMEOUT_MS));
        self.hosts[host].disk.lease = Some((self.hosts[host].boot, identity));
    }

    fn times_changed(&mut self, host: usize, times: LeaseTimes) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.lease.is_some() {
            self.lease_command(host, Command::ChangeTimes(times));
        } else {
            daemon.lease = Some(LeaseThread::new(times));
        }
    }

    fn perform(&mut self, host: usize, action: Action) {
        match action {
            Action::Do(operation) if operation.kind().is_job() => self.begin_job(host, operation),
            Action::Do(operation) => self.begin_record(host, operation),
            Action::CancelJob => self.cancel_job(host),
            Action::Lease(order) => self.lease_command(host, Command::Order(order)),
            Action::Stop(mode) => {
                let now = self.local(host);
                let order = match mode {
                    StopMode::Fast { patience } => {
                        StopOrder::planned(now, now + patience, now + patience + Duration::from_millis(IMMEDIATE_PATIENCE_MS))
                    }
                    StopMode::Kill => StopOrder::at_once(now),
                };
                self.guard_ask(host, GuardAsk::Stop(order), AskedBy::Order, ms(ORDER_TIMEOUT_MS));
            }
            Action::ForgetLock(epoch) => self.guard_ask(host, GuardAsk::NoLock { epoch }, AskedBy::Order, ms(ORDER_TIMEOUT_MS)),
            Action::AskGuard => self.guard_ask(host, GuardAsk::Facts, AskedBy::Order, ms(ORDER_TIMEOUT_MS)),
            Action::Maintain(word) => self.guard_ask(host, GuardAsk::Maintain(word), AskedBy::Order, ms(ORDER_TIMEOUT_MS)),
            Action::Leave => self.leaves_as_it_is(host),
            Action::Record(_) => {}
            Action::AnswerPromise { id, result } => self.promise_is_answered(id, result.is_ok()),
            Action::Exit(code) => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.exit = Some(code);
                }
            }
        }
    }

    /// The lease goes with the member key, the guard ends, the daemon leaves.
    fn leave(&mut self, host: usize, code: u8) {
        let lease = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.machine.world().lease);
        if let Some(lease) = lease {
            self.call(host, Caller::Nobody, EtcdAsk::Revoke { lease: lease.lease }, ms(REQUEST_TIMEOUT_MS));
        }
        if let Some(guard) = &mut self.hosts[host].guard {
            guard.owner = None;
            if matches!(guard.state.postmaster, Postmaster::Empty(_)) && !guard.frozen {
                self.hosts[host].guard = None;
            }
        }
        self.daemon_ends(host, Some(code));
    }

    /// Guard and PostgreSQL stay, and the lease runs out.
    pub fn leaves_as_it_is(&mut self, host: usize) {
        if let Some(guard) = &mut self.hosts[host].guard {
            guard.owner = None;
        }
        self.daemon_ends(host, None);
    }

    /// A change of pace is a change of role: the prober looks at once.
    fn set_pace(&mut self, host: usize) {
        let local = self.local(host);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let pace = daemon.machine.world().running().map(|_| daemon.machine.probe_every(local));
        if pace == daemon.pace {
            return;
        }
        daemon.pace = pace;
        if !daemon.probing {
            daemon.probe += 1;
            let (run, token) = (daemon.run, daemon.probe);
            self.later(us(10), What::Daemon { host, run, due: DaemonDue::Probe { token } });
        }
    }

    pub fn probe(&mut self, host: usize, token: u64) {
        let begun = self.local(host);
        let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|daemon| daemon.probe == token && daemon.pace.is_some()) else { return };
        daemon.probing = true;
        let run = daemon.run;
        if self.is_synchronous {
            self.look_after_walsenders(host);
        }
        let probe = self.ask_server(host, begun);
        let hangs = self.hosts[host].server.ail.slowness > 20;
        let takes = if hangs { ms(PROBE_TIMEOUT_MS) } else { self.random.between(us(200), ms(3)) };
        let outcome = if hangs { Probe { begun, outcome: ProbeOutcome::Unknown("no answer".to_owned()) } } else { probe };
        self.daemon_later(host, run, takes, DaemonDue::Probed { probe: Box::new(outcome) });
    }

    pub fn probed(&mut self, host: usize, probe: Probe) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.probing = false;
        let run = daemon.run;
        if let Some(pace) = daemon.pace {
            daemon.probe += 1;
            let token = daemon.probe;
            self.daemon_later(host, run, pace, DaemonDue::Probe { token });
        }
        self.fact(host, Event::Probed(probe));
    }

    pub fn ask_server(&self, host: usize, begun: pgherd::clock::BootTime) -> Probe {
        let server = &self.hosts[host].server;
        let outcome = match (&server.postmaster, &server.data) {
            (Some(postmaster), Some(data)) if server.accepting() => {
                // Between two attempts there is no walreceiver.
                let walreceiver = server.streaming().then(|| WalReceiverFacts {
                    status: "streaming".to_owned(),
                    sender_host: None,
                    sender_port: None,
                    latest_end_lsn: None,
                });
                ProbeOutcome::Accepting(Box::new(SqlFacts {
                    in_recovery: postmaster.recovering,
                    timeline: data.wal.timeline(),
                    receive_lsn: if postmaster.recovering { postmaster.received } else { data.wal.end },
                    replay_lsn: if self.now < postmaster.replays_until { data.replayed_at_least() } else { data.wal.end },
                    replay_paused: false,
                    walreceiver,
                    replicas: if self.is_synchronous { self.walsenders_of(host) } else { self.replicas_of(host, postmaster.pid) },
                    written_by_then: if postmaster.recovering { Lsn(0) } else { data.wal.end },
                    synchronous_standby_names: postmaster.synchronous.read.to_string(),
                    startup: postmaster.startups.to_string(),
                    receives: server.streaming(),
                    replayed_all: postmaster.recovering && self.now >= postmaster.replays_until,
                    lowered: Vec::new(),
                    no_rewind: Vec::new(),
                    stopping: false,
                    slots: data.slots.iter().map(|(name, at)| slot(name, *at, self.is_active(host, name))).collect(),
                    pending_restart: Vec::new(),
                    server_version_num: 150_018,
                    postmaster_start_time: String::new(),
                    system_id: data.system_id,
                }))
            }
            (Some(_), _) => ProbeOutcome::NotYet("the database system is starting up".to_owned()),
            (None, _) => ProbeOutcome::Unknown("connection refused".to_owned()),
        };
        Probe { begun, outcome }
    }

    fn replicas_of(&self, host: usize, pid: i32) -> Vec<ReplicaFacts> {
        let streams = |other: &&super::host::Host| {
            other.server.postmaster.as_ref().is_some_and(
                |postmaster| matches!(postmaster.receiver, Receiver::Streaming { from, pid: of, .. } if from == host && of == pid),
            )
        };
        let row = |other: &super::host::Host| ReplicaFacts {
            application_name: other.name.as_str().to_owned(),
            state: "streaming".to_owned(),
            client_addr: None,
            sent_lsn: other.server.data.as_ref().map(|data| data.wal.end),
            flush_lsn: other.server.data.as_ref().map(|data| data.wal.end),
            replay_lsn: None,
            sync_state: "async".to_owned(),
            sync_priority: 0,
        };
        self.hosts.iter().filter(streams).map(row).collect()
    }
}

/// It holds WAL back: the model never removes any.
fn slot(name: &str, at: Lsn, active: bool) -> SlotFacts {
    SlotFacts { name: name.to_owned(), active, restart_lsn: Some(at), wal_status: Some("reserved".to_owned()), ..SlotFacts::default() }
}
