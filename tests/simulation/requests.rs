//! What operators ask for, what may come of it, and what it excuses: switchovers with what may be in their way, at once and at a time, and
//! failovers by hand with a loss that is accepted.

use std::collections::{BTreeMap, BTreeSet};

use pgherd::clock::BootTime;
use pgherd::facts::cluster::ClusterView;
use pgherd::facts::requests::{Ask, RequestProgress, RequestRecord};
use pgherd::machine::action::Action;
use pgherd::machine::state::State;
use pgherd::policy::election;
use pgherd::types::{Lsn, MemberName};

use super::check::Checks;
use super::clock::{ms, secs};
use super::host::{Daemon, Host};
use super::plan::{Fault, Kind};
use super::world::{Sim, member};

/// What `pgherd switchover` gives its request when nobody says otherwise.
const REQUEST_TTL_S: u64 = 120;
/// How far ahead a schedule may be: more than the leader takes to hear of everything (6 s).
const SCHEDULED_AHEAD_MAX_S: u64 = 15;
/// Where a choice says what kind of request it is.
const KIND_SHIFT: u32 = 40;
/// A person who does nothing in maintenance mode, as the choice of that.
const NOTHING_ELSE: u64 = 7;
/// One restart and nothing else, as the choice of a fault that follows another.
const RESTARTS_ONE: u64 = 7;
/// A failover by hand, as the choice of a fault that follows another.
const BY_HAND: u64 = 7;
/// By then the guards have ended what they kept, and the lock is gone.
const LOCK_IS_GONE_S: u64 = 16;

/// What operators asked for, as the checks need it.
#[derive(Debug, Default)]
pub struct Asked {
    /// Requests that a leader began to carry out: who, and when by its clock.
    carried_out: BTreeMap<String, (MemberName, BootTime)>,
    /// Restarts that a member has begun: who, and when by its clock.
    begun: BTreeMap<String, (MemberName, BootTime)>,
    /// Hosts that are to lead by hand, and how many bytes may be lost.
    accepted: BTreeMap<usize, u64>,
    /// Those that have said that they go by it.
    decided: BTreeSet<usize>,
}

impl Asked {
    /// How many bytes this promotion may lose, if it is one by hand.
    pub fn accepts(&self, host: usize) -> Option<u64> {
        self.accepted.get(&host).copied().filter(|_| self.decided.contains(&host))
    }

    pub fn decided(&mut self, host: usize, actions: &[Action]) {
        let by_hand = |action: &Action| matches!(action, Action::Record(decision) if decision.kind == "failover_by_hand");
        if actions.iter().any(by_hand) {
            self.decided.insert(host);
        }
    }

    /// Whatever was accepted was for this one, whoever it was.
    pub fn led(&mut self) {
        self.accepted.clear();
        self.decided.clear();
    }
}

impl Checks {
    /// Whom a release names has all that was written (row 70): it asks nobody, and nobody else runs for a while.
    pub fn released_for(&mut self, this: &Host, successor: &Host, checkpoint: Lsn) {
        let of = |host: &Host| host.server.data.as_ref().map(|data| (data.wal.token(), data.wal.end));
        let has_it = of(successor).is_some_and(|(token, end)| of(this).is_some_and(|own| own.0 == token) && end > checkpoint);
        if !has_it && !self.data_was_lost && !self.restored && self.by_hand.is_empty() && !self.mixed_by_hand {
            self.fail("I5", format!("{} gives the lock to {}, which lacks the checkpoint at {checkpoint}", this.name, successor.name));
        }
    }

    /// What an operator asked for is carried out once (rows 70 and 71), and a switchover not while a member is being restarted.
    pub fn carries_out(&mut self, daemon: &Daemon, view: &ClusterView) {
        let State::HandingOver { hand_over } = daemon.machine.state() else { return };
        let Some(request) = &hand_over.request else { return };
        let now = (daemon.machine.world().me.name.clone(), hand_over.since);
        let begins = !self.asked.carried_out.contains_key(request);
        let first = self.asked.carried_out.entry(request.clone()).or_insert_with(|| now.clone());
        if *first != now && !self.restored {
            let what = format!("request {request} is carried out a second time");
            self.fail("L4", what);
        }
        let goes_on = |id: &String, by: &MemberName| view.requests.get(id).and_then(|key| key.record.progress.claimed_by()) == Some(by);
        let restart = self.asked.begun.iter().find(|(id, (by, _))| goes_on(id, by)).map(|(id, _)| id.clone());
        if let Some(restart) = restart.filter(|_| begins && goes_on(request, &now.0) && !self.restored) {
            self.fail("L4", format!("switchover {request} begins while restart {restart} goes on"));
        }
    }
}

impl Checks {
    /// A restart that an operator asked for is begun once, on what it was asked for, and while nobody else is at one.
    pub fn restarts(&mut self, daemon: &Daemon, view: &ClusterView) {
        let world = daemon.machine.world();
        let Some(restart) = world.requests.restart.as_ref().filter(|restart| restart.end.is_none()) else { return };
        let (Some(request), false) = (&restart.request, self.restored) else { return };
        let now = (world.me.name.clone(), restart.since);
        let begins = !self.asked.begun.contains_key(request);
        if *self.asked.begun.entry(request.clone()).or_insert_with(|| now.clone()) != now {
            self.fail("L4", format!("restart {request} is begun a second time"));
        }
        let ask = view.requests.get(request).map(|key| &key.record.ask);
        if let Some(Ask::Restart { if_leader: Some(wanted), .. }) = ask.filter(|_| begins)
            && *wanted != restart.leads
        {
            self.fail("L4", format!("restart {request} of a {} takes what is not one", if *wanted { "primary" } else { "standby" }));
        }
        let goes_on = |id: &String, by: &MemberName| {
            view.requests.get(id).is_some_and(|key| key.record.progress.claimed_by() == Some(by) && key.record.ask.of_member() == Some(by))
        };
        let other = self.asked.begun.iter().find(|(id, (by, _))| *by != world.me.name && goes_on(id, by)).map(|(id, _)| id.clone());
        let switches = |(id, (by, _)): &(&String, &(MemberName, BootTime))| {
            view.requests.get(*id).is_some_and(|key| key.record.progress.claimed_by() == Some(by))
        };
        let switchover = self.asked.carried_out.iter().find(switches).map(|(id, _)| id.clone());
        if let Some(other) = other.or(switchover).filter(|_| begins) {
            self.fail("L4", format!("restart {request} begins while {other} goes on"));
        }
    }
}

impl Sim {
    pub fn request(&mut self, ask: Ask) {
        let record = RequestRecord { ask, by: "operator".to_owned(), at: String::new(), progress: RequestProgress::Created };
        self.etcd.create_request(self.now, secs(REQUEST_TTL_S), record);
        self.etcd_changed();
    }

    pub fn request_switchover(&mut self, to: usize) {
        self.request(Ask::Switchover { to: member(to) });
    }

    /// One switchover, perhaps with an archiver in its way that does not end; two at once; one for later; or nobody is left to hand over,
    /// and a member that the rules hold back is to lead by hand.
    pub fn switch_over(&mut self, fault: &Fault) {
        let to = ((fault.choice >> 8) % self.hosts.len() as u64) as usize;
        match (fault.choice >> KIND_SHIFT) % 8 {
            0 => {
                self.request_switchover(to);
                self.request_switchover((to + 1) % self.hosts.len());
            }
            1 => {
                self.hosts.iter_mut().for_each(|host| host.server.ail.archives_for_ever = true);
                self.request_switchover(to);
            }
            2 => {
                // Also so long that whatever is judged when it is written is old by its time.
                let at_s = self.now.wall_s() + (fault.choice >> 50) % SCHEDULED_AHEAD_MAX_S;
                self.request(Ask::ScheduledSwitchover { to: member(to), at_s });
            }
            3 => {
                let lasts = secs(LOCK_IS_GONE_S + 14);
                for other in (0..self.hosts.len()).filter(|other| *other != to) {
                    self.follows(ms(fault.choice >> 50 & 0xff), (Kind::PowerOff, 0), other, lasts);
                }
                let by_hand = (to as u64) << 8 | BY_HAND << KIND_SHIFT | fault.choice >> 50 << 50;
                self.follows(secs(LOCK_IS_GONE_S), (Kind::Switchover, by_hand), to, ms(0));
            }
            BY_HAND => self.fail_over_by_hand(to, fault.choice >> 50),
            _ => self.request_switchover(to),
        }
    }

    /// One member's restart with something in the middle of it; all of them at once, now or at a time; one as what it is now, just when that
    /// changes; or files that are written again.
    pub fn restart(&mut self, fault: &Fault, host: usize) {
        let how = fault.choice >> 50;
        let leads = |sim: &Sim, on: usize| sim.etcd.view.leader.as_ref().is_some_and(|leader| leader.holder == member(on).as_str());
        let plain = |on: usize, if_leader, at_s| Ask::Restart { on: member(on), if_leader, if_pending: how.is_multiple_of(9), at_s };
        match (fault.choice >> KIND_SHIFT) % 8 {
            0 => (0..self.hosts.len()).for_each(|on| self.request(plain(on, None, None))),
            1 => {
                let at_s = self.now.wall_s() + how % 6;
                (0..self.hosts.len()).for_each(|on| self.request(plain(on, None, Some(at_s))));
            }
            2 => {
                self.request_switchover(host);
                let if_leader = Some(leads(self, host));
                self.request(plain(host, if_leader, None));
            }
            // One of who is to lead, or leads, a moment before or after a switchover.
            4 => {
                let switchover = (Kind::Switchover, (host as u64) << 8 | 4 << KIND_SHIFT);
                self.follows(ms(how % 400), switchover, host, ms(0));
                let on = if how.is_multiple_of(3) { host } else { (host + how as usize) % self.hosts.len() };
                self.follows(ms((how >> 4) % 400), (Kind::Restart, RESTARTS_ONE << KIND_SHIFT), on, ms(0));
            }
            // Of a standby, and maintenance mode in the moment in which it is down.
            5 => {
                let on = if leads(self, host) { (host + 1) % self.hosts.len() } else { host };
                self.request(plain(on, None, None));
                self.follows(ms(how % 200), (Kind::Maintenance, NOTHING_ELSE << 16), on, ms(800 + (fault.choice >> 16) % 9_000));
            }
            RESTARTS_ONE => self.request(plain(host, None, None)),
            3 => (0..self.hosts.len()).for_each(|on| self.request(Ask::Reload { on: member(on) })),
            _ => {
                let if_leader = how.is_multiple_of(2).then(|| leads(self, host));
                self.request(plain(host, if_leader, None));
                let kinds = [
                    Kind::KillDaemon,
                    Kind::KillGuard,
                    Kind::KillPostmaster,
                    Kind::PowerOff,
                    Kind::CutEtcd,
                    Kind::LockDeleted,
                    Kind::StopDaemon,
                    Kind::LeaveDaemon,
                    Kind::StartRefused,
                    Kind::FreezeDaemon,
                    Kind::DiskFull,
                ];
                if let Some(kind) = kinds.get((fault.choice >> 8) as usize % (kinds.len() + 3)) {
                    let lasts = if *kind == Kind::LockDeleted { ms(0) } else { ms(800 + (fault.choice >> 16) % 9_000) };
                    self.follows(ms(how % 1_200), (*kind, fault.choice), host, lasts);
                }
            }
        }
    }

    /// As the command does it: refused while somebody leads; what is accepted is what it names. Or less, or nothing.
    fn fail_over_by_hand(&mut self, to: usize, how: u64) {
        let view = &self.etcd.view;
        let Some(key) = view.members.get(&member(to)).filter(|_| view.leader.is_none()) else { return };
        let Some(own) = key.record.receive_lsn.max(key.record.replay_lsn) else { return };
        let named = election::bytes_behind(view, own).unwrap_or(0);
        let accept_loss = match how % 4 {
            0 => None,
            1 => Some(named / 2),
            _ => Some(named),
        };
        if let Some(bytes) = accept_loss {
            self.checks.asked.accepted.insert(to, bytes);
        }
        self.request(Ask::Failover { to: member(to), accept_loss });
    }
}
