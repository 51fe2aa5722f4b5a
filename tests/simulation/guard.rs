//! The guard of a host: the crate's own state and ladder around this world's processes, and the daemon's requests to it.
//!
//! A frozen guard reads nothing. Who has waited too long hangs up, and what was not read by then is never done.

use std::time::Duration;

use pgherd::facts::guard::{GuardFacts, Maintenance, Rung, StartId, Word};
use pgherd::guard::ladder::{KILL_AGAIN_MS, decide};
use pgherd::guard::protocol::{Refusal, StopOrder};
use pgherd::guard::state::{GuardState, Postmaster};
use pgherd::machine::event::{Event, Finished};
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::types::{Epoch, LeaseIdentity, LockIdentity};

use super::check::AWAKE_MS;
use super::clock::{Real, ms, us};
use super::host::Guard;
use super::mutants::{Mutant, mutant};
use super::world::{DaemonDue, Sim, What};

/// How long an order to the guard may take.
pub const ORDER_TIMEOUT_MS: u64 = 2_000;
/// How long processes may take to vanish after SIGKILL.
const SCAN_TIMEOUT_MS: u64 = 30_000;

/// What the daemon asks of the guard.
#[derive(Debug, Clone)]
pub enum GuardAsk {
    Facts,
    Start { word: Word, upstream: Option<usize> },
    Vouch { start: StartId },
    Lock { identity: LockIdentity, sent: pgherd::clock::BootTime, times: LeaseTimes },
    NoLock { epoch: Epoch },
    Maintain(Maintenance),
    Lease { identity: LeaseIdentity },
    Stop(StopOrder),
}

/// Who waits for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskedBy {
    Order,
    Lease,
    Job(u64),
    Scan,
    /// The lock is about to move to another lease.
    Move(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskError {
    Refused(Refusal),
    Silent,
    Gone,
}

/// A request that a frozen guard has not read.
pub struct Waiting {
    pub id: u64,
    pub run: u64,
    pub ask: GuardAsk,
    pub from: AskedBy,
}

/// The daemon fences without the guard.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    pub id: u64,
    pub until: Real,
}

impl Sim {
    /// Asks the guard. The answer comes by [`Sim::guard_answered`], at once or never before the patience is over.
    pub fn guard_ask(&mut self, host: usize, ask: GuardAsk, from: AskedBy, patience: Duration) {
        let now = self.now;
        let run = self.hosts[host].daemon.as_ref().map_or(0, |daemon| daemon.run);
        let Some(guard) = &mut self.hosts[host].guard else {
            if !matches!(from, AskedBy::Order | AskedBy::Scan) {
                self.fact_soon(host, Event::GuardGone);
            }
            return self.guard_answered(host, run, from, Err(AskError::Gone));
        };
        if guard.frozen {
            self.ids += 1;
            guard.waiting.push(Waiting { id: self.ids, run, ask, from });
            let id = self.ids;
            return self.daemon_later(host, run, patience, DaemonDue::GuardSilent { ask: id, from });
        }
        let answer = self.guard_does(host, now, ask);
        self.guard_turn(host);
        self.guard_answered(host, run, from, answer);
    }

    fn guard_does(&mut self, host: usize, now: Real, ask: GuardAsk) -> Result<GuardFacts, AskError> {
        let local = self.hosts[host].local(now);
        self.guard_looks(host);
        let this = &mut self.hosts[host];
        if matches!(ask, GuardAsk::Start { .. }) {
            self.checks.starts(this);
        }
        let Some(guard) = &mut this.guard else { return Err(AskError::Gone) };
        let done = match ask {
            GuardAsk::Facts => Ok(()),
            GuardAsk::Start { word, upstream } => guard.state.may_start(local, word).map(|()| {
                let pid = this.server.spawn(now, &mut self.random, upstream);
                if let Some(postmaster) = this.server.postmaster.as_mut().filter(|started| self.is_synchronous && started.recovering)
                    && self.timing.percent(20)
                {
                    postmaster.replays_until = postmaster.replays_until.after(self.timing.between(ms(50), ms(6_000)));
                }
                guard.state.started(pid, word, false);
            }),
            GuardAsk::Vouch { start } => guard.state.vouch(local, start, Word::Writable),
            GuardAsk::Lock { identity, sent, times } => guard.state.lock(local, identity, sent, times),
            GuardAsk::NoLock { epoch } => guard.state.no_lock(local, epoch),
            GuardAsk::Maintain(word) => {
                let suspended = guard.state.maintenance.suspends;
                let done = guard.state.maintain(local, word);
                if suspended && !word.suspends && self.checks.etcd_forgot {
                    // The end of it was forgotten with the rest: it is ended as if somebody had insisted.
                    this.excused_until = this.excused_until.max(now.after(ms(AWAKE_MS) + this.server.dies_within()));
                }
                self.checks.fences_again(this, local, word, &self.etcd.view);
                done
            }
            GuardAsk::Lease { identity } => {
                guard.state.lease = Some(identity);
                Ok(())
            }
            GuardAsk::Stop(order) => {
                guard.state.stop(local, order);
                Ok(())
            }
        };
        self.checks.deadline_was_taken(this);
        self.server_changed(host);
        match done {
            Ok(()) => Ok(self.facts_of_guard(host)),
            Err(refusal) => Err(AskError::Refused(refusal)),
        }
    }

    fn facts_of_guard(&self, host: usize) -> GuardFacts {
        let local = self.local(host);
        let guard = self.hosts[host].guard.as_ref().expect("the guard answers");
        GuardFacts { sequence: guard.sequence, pid: guard.pid, ..guard.state.facts(local) }
    }

    fn guard_looks(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        if let Some(guard) = this.guard.as_mut().filter(|guard| !matches!(guard.state.postmaster, Postmaster::Kept(_))) {
            guard.state.looked(this.server.pids());
        }
    }

    pub fn guard_answered(&mut self, host: usize, run: u64, from: AskedBy, answer: Result<GuardFacts, AskError>) {
        if self.hosts[host].daemon_of(run).is_none() {
            return;
        }
        match from {
            AskedBy::Order => match answer {
                Ok(facts) => self.fact_soon(host, Event::Guard(facts)),
                Err(AskError::Refused(_)) => {}
                Err(AskError::Silent | AskError::Gone) => self.fact_soon(host, Event::GuardGone),
            },
            AskedBy::Lease => self.lease_acknowledged(host, answer.map(|_| ())),
            AskedBy::Job(id) => self.job_heard_guard(host, id, answer),
            AskedBy::Scan => self.scan_heard_guard(host, answer),
            AskedBy::Move(id) => self.move_heard_guard(host, id, answer.is_ok()),
        }
    }

    /// The patience of a request is over. If nobody has read it, nobody ever will.
    pub fn guard_silent(&mut self, host: usize, run: u64, ask: u64, from: AskedBy) {
        let Some(guard) = &mut self.hosts[host].guard else { return };
        let before = guard.waiting.len();
        guard.waiting.retain(|waiting| waiting.id != ask);
        if guard.waiting.len() != before {
            self.guard_answered(host, run, from, Err(AskError::Silent));
        }
    }

    /// One turn of the guard's loop: its promises first.
    pub fn guard_turn(&mut self, host: usize) {
        let now = self.now;
        loop {
            let local = self.local(host);
            let this = &mut self.hosts[host];
            let Some(guard) = this.guard.as_mut().filter(|guard| !guard.frozen && !this.stands) else { return };
            guard.state.check_clock(local);
            let climb = decide(local, &guard.state).climb.filter(|_| !mutant(Mutant::LadderNotClimbed));
            if let Some(rung) = climb {
                match rung {
                    Rung::Announce => {}
                    Rung::FastStop => this.server.fast_stop(now, &mut self.random),
                    Rung::ImmediateStop => this.server.immediate_stop(now, &mut self.random),
                    Rung::KillAll => this.server.kill_all(now, &mut self.random),
                }
                guard.state.climbed(rung);
            }
            reap(guard, &mut this.server, local);
            if climb.is_none() || climb == Some(Rung::KillAll) {
                break;
            }
        }
        self.server_changed(host);
        self.publish_guard(host);
        self.arm_guard(host);
    }

    fn publish_guard(&mut self, host: usize) {
        let mut facts = self.facts_of_guard(host);
        let Some(guard) = &mut self.hosts[host].guard else { return };
        facts.sequence = 0;
        if guard.told.as_ref() == Some(&facts) {
            return;
        }
        guard.told = Some(facts.clone());
        guard.sequence += 1;
        facts.sequence = guard.sequence;
        self.fact_soon(host, Event::Guard(facts));
    }

    fn arm_guard(&mut self, host: usize) {
        let (local, now) = (self.local(host), self.now);
        let jitter = self.random.between(us(20), us(900));
        let Some(guard) = &mut self.hosts[host].guard else { return };
        let mut wake_at = decide(local, &guard.state).wake_at;
        if matches!(&guard.state.postmaster, Postmaster::Kept(kept) if kept.end.is_some()) {
            let soon = local + ms(KILL_AGAIN_MS);
            wake_at = Some(wake_at.map_or(soon, |at| at.min(soon)));
        }
        guard.wake += 1;
        let (pid, token) = (guard.pid, guard.wake);
        if let Some(at) = wake_at {
            let real = self.hosts[host].clock.real(now, at).after(jitter);
            self.at(real, What::GuardWake { host, pid, token });
        }
    }

    pub fn guard_wakes(&mut self, host: usize, pid: i32, token: u64) {
        let due = self.hosts[host].guard.as_ref().is_some_and(|guard| guard.pid == pid && guard.wake == token);
        if due {
            self.guard_turn(host);
        }
    }

    /// A new guard's process, which knows nothing.
    pub fn spawn_guard(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        this.next_pid += 1;
        // Whoever ended before has no parent any more.
        this.server.ended.clear();
        let mut state = GuardState::default();
        state.looked(this.server.pids());
        let owner = this.daemon.as_ref().map(|daemon| daemon.run);
        let guard = Guard { pid: this.next_pid, state, frozen: false, sequence: 1, told: None, wake: 0, owner, waiting: Vec::new() };
        this.guard = Some(guard);
        self.say(Some(host), || "a guard is there".to_owned());
        self.guard_turn(host);
    }

    /// The guard's process ends; PostgreSQL's parent death signal is SIGQUIT.
    pub fn kill_guard(&mut self, host: usize) {
        self.ends_with_its_guard(host);
        let now = self.now;
        let this = &mut self.hosts[host];
        let Some(guard) = this.guard.take() else { return };
        this.server.immediate_stop(now, &mut self.random);
        let waiting = guard.waiting;
        self.server_changed(host);
        for left in waiting {
            self.guard_answered(host, left.run, left.from, Err(AskError::Gone));
        }
        self.fact_soon(host, Event::GuardGone);
    }

    pub fn freeze_guard(&mut self, host: usize) {
        if let Some(guard) = &mut self.hosts[host].guard {
            guard.frozen = true;
        }
    }

    /// SIGCONT: the clock first, then what is still to be read.
    pub fn thaw_guard(&mut self, host: usize) {
        let now = self.now;
        let Some(guard) = self.hosts[host].guard.as_mut().filter(|guard| guard.frozen) else { return };
        guard.frozen = false;
        let waiting = std::mem::take(&mut guard.waiting);
        self.guard_turn(host);
        for left in waiting {
            let answer = self.guard_does(host, now, left.ask);
            self.guard_turn(host);
            self.guard_answered(host, left.run, left.from, answer);
        }
    }

    /// The guard watches the daemon's process.
    pub fn owner_ended(&mut self, host: usize, run: u64) {
        let local = self.local(host);
        if let Some(guard) = self.hosts[host].guard.as_mut().filter(|guard| guard.owner == Some(run)) {
            guard.owner = None;
            guard.state.daemon_crashed(local);
        }
        self.guard_turn(host);
    }

    /// `FenceByScan`: the daemon ends every process itself, and looks until none is left.
    pub fn begin_scan(&mut self, host: usize) {
        self.ids += 1;
        let scan = Scan { id: self.ids, until: self.now.after(ms(SCAN_TIMEOUT_MS)) };
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.scan = Some(scan);
        }
        self.scan_on(host, scan.id);
    }

    pub fn scan_on(&mut self, host: usize, id: u64) {
        let now = self.now;
        let this = &mut self.hosts[host];
        let Some(daemon) = &mut this.daemon else { return };
        let Some(scan) = daemon.scan.filter(|scan| scan.id == id) else { return };
        let run = daemon.run;
        this.server.kill_all(now, &mut self.random);
        let empty = this.server.is_empty();
        self.server_changed(host);
        self.guard_turn(host);
        if empty {
            return self.guard_ask(host, GuardAsk::Facts, AskedBy::Scan, ms(ORDER_TIMEOUT_MS));
        }
        if now >= scan.until {
            return self.scan_ends(host, Err("processes of PostgreSQL are left".to_owned()));
        }
        self.daemon_later(host, run, ms(5), DaemonDue::Scan { id });
    }

    fn scan_heard_guard(&mut self, host: usize, answer: Result<GuardFacts, AskError>) {
        match answer {
            Ok(facts) => self.fact_soon(host, Event::Guard(facts)),
            Err(_) => {
                // Gone or silent: it is ended, and another takes its place. Whoever waits for it sees its socket close.
                let waiting = self.hosts[host].guard.take().map(|guard| guard.waiting).unwrap_or_default();
                self.spawn_guard(host);
                for left in waiting {
                    self.guard_answered(host, left.run, left.from, Err(AskError::Gone));
                }
            }
        }
        self.scan_ends(host, Ok(()));
    }

    fn scan_ends(&mut self, host: usize, result: Result<(), String>) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.scan = None;
        }
        self.end(host, Finished::FencedByScan(result));
    }
}

fn reap(guard: &mut Guard, server: &mut super::postgres::Server, local: pgherd::clock::BootTime) {
    for ended in std::mem::take(&mut server.ended) {
        if matches!(&guard.state.postmaster, Postmaster::Kept(kept) if kept.pid == ended.pid) {
            guard.state.postmaster_ended(local, ended.exit_status, ended.signal);
        }
    }
    let dead = matches!(&guard.state.postmaster, Postmaster::Kept(kept) if kept.end.is_some());
    if dead && (server.is_empty() || mutant(Mutant::DeathOfPostmasterIsProof)) {
        guard.state.proved_empty(local);
    }
}
