//! Maintenance mode: the keys in etcd, the person who sets and ends it and what that person does meanwhile, and what must hold.

use pgherd::clock::BootTime;
use pgherd::facts::cluster::ClusterView;
use pgherd::facts::guard::Maintenance;
use pgherd::facts::maintenance::{MaintenanceRecord, Phase};
use pgherd::machine::action::{Action, Decision, Operation, OperationKind};
use pgherd::machine::requests::RestartStage;
use pgherd::machine::state::State;
use pgherd::policy::rejoin::Rejoin;
use pgherd::types::{MemberName, Revision};

use super::check::{AWAKE_MS, Checks};
use super::clock::{ms, secs};
use super::etcd::Etcd;
use super::host::{Daemon, Host};
use super::plan::{Fault, Kind};
use super::world::Sim;

/// What a restart has stopped is given so long before it is left to whoever set maintenance mode: less than the rule's own.
const PATIENCE_S: u64 = 20;

impl Etcd {
    fn maintain(&mut self, phase: Phase) {
        self.by_hand(|keys, revision| {
            let (by, why) = ("operator".to_owned(), "a run".to_owned());
            keys.maintenance = Some(MaintenanceRecord { by, why, at: String::new(), until: None, phase });
            keys.maintenance_revision = revision;
        });
    }

    pub fn note_suspension(&mut self, member: &MemberName, seen: Revision, suspends: bool) -> bool {
        let fits = self.view.maintenance_revision == seen;
        if fits && self.view.suspended.contains(member) != suspends {
            self.wrote();
            let suspended = &mut self.keys().suspended;
            if suspends {
                suspended.insert(member.clone())
            } else {
                suspended.remove(member)
            };
        }
        fits
    }

    pub fn end_maintenance(&mut self, seen: Revision, leader: Revision) -> bool {
        let found = self.view.leader.as_ref().map_or(Revision(0), |leader| leader.mod_revision);
        let fits = self.view.maintenance_revision == seen && found == leader && self.view.maintenance.is_some();
        if fits {
            self.wrote();
            let keys = self.keys();
            (keys.maintenance, keys.maintenance_revision) = (None, Revision(0));
        }
        fits
    }
}

impl Sim {
    /// `pgherd pause`, where somebody leads. Then some of what maintenance mode is for.
    pub fn person_pauses(&mut self, fault: &Fault, host: usize) {
        if self.etcd.view.leader.is_none() || self.etcd.view.maintenance.is_some() {
            return;
        }
        self.etcd.maintain(Phase::On);
        self.etcd_changed();
        let other = (host + 1) % self.hosts.len();
        let soon = ms(20 + fault.choice % 3_000);
        match (fault.choice >> 16) % 8 {
            0 => self.follows(soon, (Kind::CutEtcd, 0), host, secs(16)),
            1 => self.follows(soon, (Kind::EtcdDown, fault.choice), host, secs(14)),
            2 => self.follows(soon, (Kind::StoppedByHand, 0), host, ms(0)),
            3 => self.follows(soon, (Kind::KillDaemon, 0), host, ms(0)),
            4 => self.follows(soon, (Kind::DaemonStaysDown, 0), host, secs(14)),
            5 => self.follows(soon, (Kind::PowerOff, 0), host, secs(8)),
            6 => self.follows(soon, (Kind::StoppedByHand, 0), other, ms(0)),
            _ => {}
        }
    }

    /// `pgherd resume`. What the person promoted by hand is stopped first, as the daemons ask, and later if it was promoted later.
    pub fn person_resumes(&mut self) {
        let Some(phase) = self.etcd.view.maintenance.as_ref().map(|record| record.phase) else { return };
        let now = self.now;
        for host in 0..self.hosts.len() {
            if self.hosts[host].server.postmaster.as_ref().is_some_and(|postmaster| postmaster.promoted_by_hand.is_some()) {
                self.hosts[host].server.fast_stop(now, &mut self.random);
                self.server_changed(host);
            }
        }
        if phase == Phase::On {
            self.etcd.maintain(Phase::Ending);
            self.etcd_changed();
        }
    }

    /// Suspended by a word that etcd has forgotten: what its guard takes with it needs a moment to end.
    pub fn ends_with_its_guard(&mut self, host: usize) {
        let now = self.now;
        if self.is_suspended(host) {
            let this = &mut self.hosts[host];
            this.excused_until = this.excused_until.max(now.after(ms(AWAKE_MS) + this.server.dies_within()));
        }
    }

    /// In maintenance mode a person may promote by hand, and nobody ends that.
    pub fn is_left_to_a_person(&self, host: usize) -> bool {
        self.hosts[host].daemon.as_ref().is_some_and(|daemon| *daemon.machine.state() == State::Paused)
    }

    /// P1 is suspended here, and etcd knows: nobody is elected beside it. Where etcd has forgotten, nobody knows.
    pub fn is_suspended(&self, host: usize) -> bool {
        let this = &self.hosts[host];
        let suspends = this.guard.as_ref().is_some_and(|guard| guard.state.maintenance.suspends);
        self.etcd.view.suspended.contains(&this.name) || suspends && self.checks.etcd_forgot
    }
}

impl Checks {
    /// Nobody is elected in maintenance mode; who wrote all the while may take the lock anew.
    pub fn elected(&mut self, host: &Host, before: &ClusterView) {
        let suspends = host.guard.as_ref().is_some_and(|guard| guard.state.maintenance.suspends);
        // Or did when it asked, and etcd came to that late.
        let suspended = suspends || before.suspended.contains(&host.name);
        if before.maintenance.is_some() && !suspended && !self.etcd_forgot {
            self.fail("I1", format!("{} takes the lock in maintenance mode", host.name));
        }
    }

    /// Row 68: nothing is started, stopped, copied or elected.
    pub fn judge_maintenance(&mut self, daemon: &Daemon, operation: &Operation) {
        let works = matches!(
            operation,
            Operation::Start { .. }
                | Operation::Promote { .. }
                | Operation::Clone { .. }
                | Operation::Rewind { .. }
                | Operation::Initdb { .. }
                | Operation::Release { .. }
        );
        if works && *daemon.machine.state() == State::Paused {
            self.fail("row 68", format!("{:?} is ordered in maintenance mode", operation.kind()));
        }
    }

    /// A standby that its own restart has taken down is started before maintenance mode begins there, unless it does not start.
    pub fn begins_maintenance(&mut self, now: BootTime, daemon: &Daemon, action: &Action) {
        let begins = |decision: &Decision| {
            let is = |key: &str, state: &str| decision.facts.get(key).is_some_and(|fact| fact == state);
            decision.kind == "transition" && is("to", "paused") && (is("from", "following") || is("from", "rejoining"))
        };
        let world = daemon.machine.world();
        let restart = world.requests.restart.as_ref().filter(|restart| restart.end.is_none() && !restart.leads);
        let (Action::Record(decision), Some(restart)) = (action, restart) else { return };
        let stopped = matches!(restart.stage, RestartStage::Stop | RestartStage::Start) && world.running().is_none();
        let could = world.failures(OperationKind::Start) == 0 && matches!(world.rejoin, None | Some(Rejoin::Follow));
        if begins(decision) && stopped && could && world.requests.reinit.is_none() && now.since(restart.stage_since) < secs(PATIENCE_S) {
            self.fail("row 68", format!("{} is left down by its own restart in maintenance mode", world.me.name));
        }
    }

    /// A word that makes deadlines count again which have passed ends PostgreSQL, although its lock could have been taken anew.
    pub fn fences_again(&mut self, this: &Host, now: BootTime, word: Maintenance, view: &ClusterView) {
        let Some(guard) = &this.guard else { return };
        let passed = guard.state.lock.is_none_or(|lock| lock.deadlines.fast_stop_at <= now);
        let writes = guard.state.may_write() && this.server.postmaster.is_some();
        let alone = view.leader.as_ref().is_none_or(|leader| leader.holder == this.name.as_str());
        if !word.suspends && passed && writes && alone && view.suspended.contains(&this.name) && !self.etcd_forgot {
            self.fail("row 68", format!("{} fences again with a proof that is over, and ends a primary that nobody replaces", this.name));
        }
    }
}
