//! Commits that wait for standbys, as PostgreSQL has it: each process reads synchronous_standby_names at its own time, who counts is what
//! each walsender made of it, how many is the business of the walsender that releases, and whether backends wait is the checkpointer's.
//!
//! Also what must hold of it (I5, I6), judged by what is really on whose disk.

use std::collections::{BTreeMap, BTreeSet};

use pgherd::facts::cluster::ClusterView;
use pgherd::facts::synchrony::{Names, SyncRecord};
use pgherd::types::Lsn;

use super::check::Checks;
use super::clock::{ms, secs, us};
use super::host::Host;
use super::plan::Fault;
use super::postgres::Receiver;
use super::wal::{Data, Wal};
use super::walsenders::Walsender;
use super::world::{Sim, What, member};

/// A process that reads the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    Checkpointer,
    /// The walsender of this connection.
    Walsender(u64),
}

/// What a postmaster's processes go by.
#[derive(Debug, Clone)]
pub struct Synchronous {
    /// The postmaster, and whatever it starts from now on.
    pub read: Names,
    checkpointer: Names,
    pub senders: Vec<Walsender>,
    /// Commits that wait.
    waiting: Vec<Lsn>,
}

impl Synchronous {
    pub fn started(names: Names) -> Self {
        Synchronous { checkpointer: names.clone(), read: names, senders: Vec::new(), waiting: Vec::new() }
    }

    pub fn backends_wait(&self) -> bool {
        self.checkpointer != Names::Nobody
    }

    /// How far commits are released by the walsender of this connection: None = it releases nobody. Two of one name count twice.
    fn released_by(&self, connection: u64) -> Option<Lsn> {
        let counts = |sender: &&Walsender| sender.priority > 0 && sender.caught_up && sender.flush > Lsn(0);
        let own = self.senders.iter().find(|sender| sender.connection == connection).filter(counts)?;
        let count = own.names.acks()?.acks as usize;
        let mut candidates: Vec<&Walsender> = self.senders.iter().filter(counts).collect();
        if candidates.len() < count || count == 0 {
            return None;
        }
        match own.names {
            Names::First(_) => {
                candidates.sort_by_key(|sender| sender.priority);
                candidates.truncate(count);
                candidates
                    .iter()
                    .any(|sender| sender.connection == connection)
                    .then(|| candidates.iter().map(|sender| sender.flush).min())?
            }
            _ => {
                candidates.sort_by_key(|sender| std::cmp::Reverse(sender.flush));
                candidates.get(count - 1).map(|sender| sender.flush)
            }
        }
    }
}

/// SyncRepGetStandbyPriority: the place in the list.
pub fn priority(names: &Names, name: &str) -> u32 {
    let place = |acks: &pgherd::facts::synchrony::Acks| acks.members.iter().position(|member| member.as_str() == name);
    match names {
        Names::Nobody | Names::Block => 0,
        Names::Any(acks) => u32::from(place(acks).is_some()),
        // The placeholder is first.
        Names::First(acks) => place(acks).map_or(0, |place| place as u32 + 2),
    }
}

impl Sim {
    /// The files of a running server are to be read again.
    pub fn reload(&mut self, host: usize) {
        let Some(pid) = self.hosts[host].server.postmaster.as_ref().map(|postmaster| postmaster.pid) else { return };
        let takes = self.timing.between(us(200), ms(8));
        self.later(takes, What::Reload { host, pid });
    }

    pub fn reloads(&mut self, host: usize, pid: i32) {
        let (names, closed) = (self.hosts[host].server.names_on_disk.clone(), self.hosts[host].server.closed_on_disk);
        let Some(postmaster) = self.hosts[host].server.postmaster.as_mut().filter(|postmaster| postmaster.pid == pid) else { return };
        postmaster.synchronous.read = names;
        postmaster.gate.reads(closed);
        let senders = postmaster.synchronous.senders.iter().map(|sender| Reader::Walsender(sender.connection));
        let readers: Vec<Reader> = senders.chain([Reader::Checkpointer]).collect();
        for reader in readers {
            // Busy ones come to it late.
            let takes = if self.timing.percent(15) { self.timing.between(ms(20), secs(4)) } else { self.timing.between(us(50), ms(6)) };
            self.later(takes, What::Rereads { host, pid, reader });
        }
    }

    /// A process reads the files as they are now.
    pub fn rereads(&mut self, host: usize, pid: i32, reader: Reader) {
        if self.hosts[host].stands {
            return self.later(ms(20), What::Rereads { host, pid, reader });
        }
        let names = self.hosts[host].server.names_on_disk.clone();
        let name_of: Vec<String> = self.hosts.iter().map(|host| host.name.to_string()).collect();
        let Some(postmaster) = self.hosts[host].server.postmaster.as_mut().filter(|postmaster| postmaster.pid == pid) else { return };
        let synchronous = &mut postmaster.synchronous;
        match reader {
            Reader::Checkpointer => {
                synchronous.checkpointer = names;
                if !synchronous.backends_wait() {
                    // Whoever waits is told to go on (SAFETY row 47).
                    let woken = std::mem::take(&mut synchronous.waiting);
                    woken.into_iter().for_each(|lsn| self.acknowledged(host, lsn));
                }
            }
            Reader::Walsender(connection) => {
                if let Some(sender) = synchronous.senders.iter_mut().find(|sender| sender.connection == connection) {
                    sender.priority = priority(&names, &name_of[sender.to]);
                    sender.names = names;
                    // It releases whom it can by its new names.
                    self.releases(host, connection);
                }
            }
        }
    }

    /// A new session sees what the postmaster has read.
    pub fn new_session_has(&self, host: usize, names: &Names) -> bool {
        self.hosts[host].server.postmaster.as_ref().is_some_and(|postmaster| postmaster.synchronous.read == *names)
    }

    /// The checkpointer comes to a checkpoint that was asked for after it has read the files.
    pub fn checkpointer_reads(&mut self, host: usize) {
        if let Some(pid) = self.hosts[host].server.postmaster.as_ref().map(|postmaster| postmaster.pid) {
            self.rereads(host, pid, Reader::Checkpointer);
        }
    }

    pub fn releases(&mut self, host: usize, by: u64) {
        let Some(postmaster) = &mut self.hosts[host].server.postmaster else { return };
        let Some(to) = postmaster.synchronous.released_by(by) else { return };
        let waiting = std::mem::take(&mut postmaster.synchronous.waiting);
        let (released, still) = waiting.into_iter().partition::<Vec<Lsn>, _>(|lsn| *lsn <= to);
        postmaster.synchronous.waiting = still;
        released.into_iter().for_each(|lsn| self.acknowledged(host, lsn));
    }

    /// A client's transaction is in the WAL: it is acknowledged, or waits, or its client gives up waiting.
    pub fn committed(&mut self, host: usize, lsn: Lsn) {
        if !self.is_synchronous {
            return;
        }
        let cancels = self.timing.below(100) == 0;
        let server = &mut self.hosts[host].server;
        let waits = match &mut server.postmaster {
            Some(postmaster) => {
                let waits = postmaster.synchronous.backends_wait();
                if waits && !cancels {
                    postmaster.synchronous.waiting.push(lsn);
                }
                waits
            }
            None => server.orphans_wait,
        };
        if !waits {
            self.acknowledged(host, lsn);
        }
    }

    fn acknowledged(&mut self, host: usize, lsn: Lsn) {
        let Some(token) = self.hosts[host].server.data.as_ref().map(|data| data.wal.token()) else { return };
        self.checks.acknowledged(host, token, lsn, &self.etcd.view, &self.hosts);
    }

    /// After copies were in doubt: one leads by a record of its own, all others are standbys of it, and each is who it should be.
    pub fn looks_whether_copies_count(&mut self) {
        if !self.checks.copies_in_doubt {
            return;
        }
        let view = &self.etcd.view;
        let (Some(leader), Some(record)) = (&view.leader, &view.sync) else { return };
        let Some(host) = self.hosts.iter().position(|host| host.name.as_str() == leader.holder) else { return };
        let is_theirs = record.leader == self.hosts[host].name && record.epoch == leader.epoch;
        let follows = |other: usize| {
            let server = &self.hosts[other].server;
            let streams = server.postmaster.as_ref().map(|postmaster| postmaster.receiver);
            server.recovering() && server.orphans.is_empty() && matches!(streams, Some(Receiver::Streaming { from, .. }) if from == host)
        };
        let leads = self.hosts[host].server.accepting() && !self.hosts[host].server.of_standby();
        let all_follow = (0..self.hosts.len()).all(|other| self.hosts[other].name == member(other) && (other == host || follows(other)));
        let wal = self.hosts[host].server.data.as_ref().map(|data| data.wal.clone());
        if let Some(wal) = wal.filter(|_| is_theirs && leads && all_follow) {
            self.checks.copies_count_again(&wal, &self.hosts);
        }
    }

    /// A process crashed in every standby, or in one: each goes through its WAL again, and says meanwhile how far it is with that.
    pub fn standbys_begin_anew(&mut self, fault: &Fault) {
        for host in 0..self.hosts.len() {
            let takes = self.timing.between(ms(50), secs(6));
            let spared = !fault.choice.is_multiple_of(3) && fault.choice / 4 % self.hosts.len() as u64 != host as u64;
            let now = self.now;
            let Some(postmaster) = self.hosts[host].server.postmaster.as_mut().filter(|postmaster| postmaster.recovering && !spared) else {
                continue;
            };
            (postmaster.receiver, postmaster.received) = (Receiver::Waiting, Lsn(0));
            (postmaster.startups, postmaster.replays_until) = (postmaster.startups + 1, now.after(takes));
        }
    }
}

/// Up to where commits were acknowledged, of each promotion's WAL; and the promotions whose leader had said in `sync` who has them.
#[derive(Debug, Clone, Default)]
pub struct Acknowledged(BTreeMap<u64, Lsn>, BTreeSet<u64>);

impl Acknowledged {
    /// A commit of this promotion's WAL at or behind this position was.
    pub fn reaches(&self, token: u64, lsn: Lsn) -> bool {
        self.0.get(&token).is_some_and(|farthest| *farthest >= lsn)
    }
}

impl Checks {
    fn acknowledged(&mut self, host: usize, token: u64, lsn: Lsn, view: &ClusterView, hosts: &[Host]) {
        self.acknowledgements += 1;
        // It may not know yet that another has taken over, and that one must have it.
        let leader = view.leader.as_ref().map(|leader| leader.holder.as_str()).filter(|holder| *holder != hosts[host].name.as_str());
        let promoted = hosts.iter().find(|other| Some(other.name.as_str()) == leader && other.server.acknowledges_by_itself());
        let promoted = promoted.and_then(|other| other.server.data.as_ref()).filter(|data| data.wal.token() != token);
        let has = |data: &super::wal::Data| data.wal.extent_of(token).is_some_and(|extent| extent >= lsn);
        if promoted.is_some_and(|data| !has(data)) {
            // Where the mode was not in force yet it was not promised.
            if self.acknowledged.1.contains(&token) && !self.copies_do_not_count() {
                let what = format!("{} acknowledges a commit up to {lsn} that {leader:?}, which leads, has not", hosts[host].name);
                self.fail("I5", what);
            }
            return;
        }
        let farthest = self.acknowledged.0.entry(token).or_default();
        *farthest = (*farthest).max(lsn);
        if view.sync.as_ref().is_some_and(|record| record.leader == hosts[host].name) {
            self.judge_record(view, hosts);
        }
    }

    /// I6: every commit that was acknowledged is on as many members as `sync` says.
    pub fn judge_record(&mut self, view: &ClusterView, hosts: &[Host]) {
        if view.sync.is_none() {
            self.acknowledged.1.clear();
        }
        let (Some(record), false) = (&view.sync, self.copies_do_not_count()) else { return };
        let leader = hosts.iter().find(|host| host.name == record.leader).and_then(|host| host.server.data.as_ref());
        let Some(leader) = leader.map(|data| data.wal.clone()) else { return };
        self.acknowledged.1.insert(leader.token());
        if let Some(what) = self.short_of(record, &leader, hosts, None) {
            self.fail("I6", what);
        }
    }

    /// A commit that is on fewer members than the record says, one of them not counted.
    pub fn short_of(&self, record: &SyncRecord, leader: &Wal, hosts: &[Host], without: Option<usize>) -> Option<String> {
        for (token, lsn) in self.acknowledged.0.clone() {
            let gone = without.map(|without| &hosts[without].name);
            let on = |host: &&Host| {
                let has = |data: &Data| data.wal.extent_of(token).is_some_and(|extent| extent >= lsn);
                gone != Some(&host.name) && host.server.data.as_ref().is_some_and(has)
            };
            // What was left behind by a promotion is judged there.
            if leader.extent_of(token).is_none() {
                continue;
            }
            // What somebody has put back is not the record's fault, and may count as one.
            let put_back = self.put_back.map(|host| &hosts[host]).filter(|host| record.members.contains(&host.name) && !on(host)).is_some();
            let there = hosts.iter().filter(|host| record.members.contains(&host.name)).filter(on).count() + usize::from(put_back);
            if there < record.copies as usize {
                let members: Vec<&str> = record.members.iter().map(|name| name.as_str()).collect();
                let what = format!(
                    "a commit up to {lsn} is acknowledged and on {there} of {members:?}, where sync says that it is on {} at least",
                    record.copies
                );
                return Some(what);
            }
        }
        None
    }

    /// I5: where `sync` is in force a new primary has everything that was acknowledged.
    pub fn judge_acknowledged(&mut self, host: usize, view: &ClusterView, hosts: &[Host]) {
        let Some(data) = &hosts[host].server.data else { return };
        let has = |token: u64, lsn: Lsn| data.wal.extent_of(token).is_some_and(|extent| extent >= lsn);
        if view.sync_revision.0 == 0 || self.copies_do_not_count() {
            // Nothing was promised of what it has not.
            self.acknowledged.0.retain(|token, lsn| has(*token, *lsn));
            return;
        }
        if self.asked.accepts(host).is_some() {
            // What was acknowledged and is not here is given up, and nothing else.
            let kept = |(token, lsn): (u64, Lsn)| data.wal.extent_of(token).map(|extent| (token, lsn.min(extent)));
            self.acknowledged.0 = std::mem::take(&mut self.acknowledged.0).into_iter().filter_map(kept).collect();
            return;
        }
        let missing = self.acknowledged.0.iter().find(|(token, lsn)| !has(**token, **lsn)).map(|(_, lsn)| *lsn);
        if let Some(lsn) = missing {
            let what = format!("{} is promoted, and has not the commits up to {lsn} that were acknowledged", hosts[host].name);
            self.fail("I5", what);
        }
    }

    /// Copies that were may not be any more, or etcd knows of them no more.
    pub fn copies_do_not_count(&self) -> bool {
        self.restored || self.copies_in_doubt
    }

    /// Copies count again when everybody has what the leader had acknowledged by then, and nothing that the leader has not. What else was
    /// acknowledged is lost, and was forgiven.
    fn copies_count_again(&mut self, leader: &Wal, hosts: &[Host]) {
        self.acknowledged.0.retain(|token, lsn| leader.extent_of(*token).is_some_and(|extent| extent >= *lsn));
        let has = |wal: &Wal| self.acknowledged.0.iter().all(|(token, lsn)| wal.extent_of(*token).is_some_and(|extent| extent >= *lsn));
        let is_copy = |wal: &Wal| wal.is_in_the_past_of(leader) && has(wal);
        self.copies_in_doubt = !hosts.iter().all(|host| host.server.data.as_ref().is_some_and(|data| is_copy(&data.wal)));
    }
}
