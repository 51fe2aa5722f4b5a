//! Copies: a new one that an operator ordered, beside the old directory or in its emptied place; the steps of every other; and a disk that
//! is put back to what it was a while ago.

use pgherd::facts::requests::Ask;
use pgherd::facts::synchrony::SyncRecord;
use pgherd::machine::action::{Old, Upstream};
use pgherd::machine::event::Finished;

use super::check::Checks;
use super::host::Host;
use super::mutants::{Mutant, mutant};
use super::plan::Fault;
use super::wal::{Data, Half};
use super::world::{Sim, member};

impl Sim {
    /// Of any member, also of the leader, which refuses; now and then of two at once.
    pub fn order_reinit(&mut self, fault: &Fault, host: usize) {
        let order = |on: usize, bits: u64| Ask::Reinit { on: member(on), from_leader: bits & 1 == 0, in_place: bits & 6 == 0 };
        let on = if fault.choice.is_multiple_of(8) { host } else { (host + 1 + (fault.choice >> 3) as usize % 2) % self.hosts.len() };
        self.request(order(on, fault.choice >> 8));
        if (fault.choice >> 16).is_multiple_of(5) {
            self.request(order((on + 1) % self.hosts.len(), fault.choice >> 20));
        }
    }

    pub fn clone_step(&mut self, host: usize, id: u64, step: u32, from: &Upstream, old: Old) {
        let source = match self.ask_leader(host, from) {
            Ok(source) if !self.hosts[host].server.ail.breaks_copies => source,
            Ok(_) => return self.job_fails(host, "the copy broke off"),
            Err(why) => return self.job_fails(host, why),
        };
        if step < 3 {
            if step == 2 && mutant(Mutant::CopyMadeInPlace) {
                self.copies_into_place(host, source);
            }
            return self.job_later(host, id, step + 1);
        }
        if old == Old::Empty && self.hosts[host].server.data.is_some() && !mutant(Mutant::CopyMadeInPlace) {
            return self.job_fails(host, "somebody has put data into the data directory");
        }
        let Some(source_data) = &mut self.hosts[source].server.data else { return self.job_fails(host, "the leader has no data") };
        let copy = source_data.base_backup();
        self.wal_flows(source);
        let holder = self.etcd.view.leader.as_ref().map(|leader| leader.holder.clone());
        let given_up = old == Old::GivenUp;
        if given_up {
            self.checks.given_up(host, &self.hosts, self.etcd.view.sync.as_ref());
        }
        self.checks.swapped(host, &self.hosts, given_up || !mutant(Mutant::DivergedNotKept), holder.as_deref());
        let this = &mut self.hosts[host];
        if let Some(old) = this.server.data.replace(copy).filter(|_| !given_up && !mutant(Mutant::DivergedNotKept)) {
            this.disk.kept.push(old);
        }
        this.disk.promotion = None;
        this.disk.rewind = None;
        this.disk.half_empty = false;
        self.job_ends(host, Finished::Cloned(Ok(())));
    }

    /// A deliberate bug: what is there in the middle of a copy looks like a data directory.
    fn copies_into_place(&mut self, host: usize, source: usize) {
        let Some(theirs) = self.hosts[source].server.data.clone() else { return };
        let this = &mut self.hosts[host];
        let was = this.server.data.as_ref().map_or(theirs.wal.clone(), |data| data.wal.clone());
        let half = Half { was, pages_of: vec![theirs.wal.clone()], torn: false };
        this.server.data = Some(Data { half: Some(half), standby_signal: true, backup_label: true, ..theirs });
        (this.disk.rewind, this.disk.half_empty) = (None, false);
    }

    pub fn empty_step(&mut self, host: usize, id: u64, step: u32, leader: &Upstream) {
        if let Err(why) = self.ask_leader(host, leader) {
            return self.job_fails(host, why);
        }
        if step == 1 {
            return self.job_later(host, id, 2);
        }
        if step == 2 {
            let holder = self.etcd.view.leader.as_ref().map(|leader| leader.holder.clone());
            self.checks.given_up(host, &self.hosts, self.etcd.view.sync.as_ref());
            self.checks.swapped(host, &self.hosts, true, holder.as_deref());
            self.hosts[host].disk.half_empty = true;
            return self.job_later(host, id, 3);
        }
        let this = &mut self.hosts[host];
        this.server.data = None;
        (this.disk.promotion, this.disk.rewind, this.disk.half_empty) = (None, None, false);
        self.job_ends(host, Finished::Emptied(Ok(())));
    }
}

impl Sim {
    pub fn takes_snapshot(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        let whole = this.disk.rewind.is_none() && !this.disk.half_empty;
        this.snapshot = this.server.data.clone().filter(|_| whole).map(|data| (data, this.disk.promotion.clone()));
    }

    /// One host in a run; and where it counts, only to before what the leader has published of it: what it acknowledged since then is a stated
    /// limit.
    pub fn puts_back(&mut self, host: usize) {
        let Some((data, promotion)) = self.hosts[host].snapshot.take() else { return };
        let view = &self.etcd.view;
        let recognised = match &view.sync {
            _ if !self.is_synchronous => true,
            None => true,
            Some(record) => {
                let status = view.status.as_ref().filter(|status| status.epoch == record.epoch);
                let leads = self.hosts[host].name == record.leader;
                let known = status
                    .and_then(|status| if leads { status.replayed.values().max() } else { status.replayed.get(&self.hosts[host].name) });
                !record.members.contains(&self.hosts[host].name) || known.is_some_and(|known| *known > data.wal.end)
            }
        };
        let first = self.checks.put_back.is_none_or(|other| other == host);
        let clear = self.checks.by_hand.is_empty() && !self.checks.data_was_lost && !self.checks.restored && !self.checks.etcd_forgot;
        if !recognised || !first || !clear || !self.hosts[host].powered {
            return;
        }
        self.say(Some(host), || "!! its disk is put back to an older state".to_owned());
        self.checks.put_back = Some(host);
        self.power_off(host);
        let this = &mut self.hosts[host];
        this.server.data = Some(data);
        (this.disk.promotion, this.disk.rewind, this.disk.half_empty) = (promotion, None, false);
        self.power_on(host);
    }
}

impl Checks {
    /// What an operator gave up by name is thrown away: nothing that was acknowledged may rest on it (I6).
    fn given_up(&mut self, host: usize, hosts: &[Host], record: Option<&SyncRecord>) {
        let this = &hosts[host];
        let rests_on_it = |record: &&SyncRecord| {
            let leader = hosts.iter().find(|host| host.name == record.leader).and_then(|host| host.server.data.as_ref());
            let named = record.copies > 1 && record.members.contains(&this.name);
            named && leader.is_some_and(|leader| self.short_of(record, &leader.wal, hosts, Some(host)).is_some())
        };
        // Named it may be also by a daemon that has just come and does not know whom commits waited for: then more have the commits than `sync` says.
        let counts = record.filter(rests_on_it).is_some();
        if counts && this.server.data.is_some() && !this.disk.half_empty && !self.restored && !self.copies_in_doubt {
            self.fail("I6", format!("{} throws away what commits are acknowledged on the strength of", this.name));
        }
    }
}
