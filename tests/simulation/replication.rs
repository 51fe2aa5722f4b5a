//! What goes on between servers, and between servers and clients: streaming, commits, the ends of processes.

use pgherd::types::Lsn;

use super::clock::{Real, ms, us};
use super::postgres::{Change, Phase, RECEIVER_RETRY_MS, Receiver, StuckReceiver, WAL_TIMEOUT_MS};
use super::wal::segment_start;
use super::world::{Sim, What};

/// Longest that one takes to be told that the timeline it asked for was left before it.
const AGAIN_MAX_MS: u64 = 400;

impl Sim {
    /// Something may have changed in a server: it is looked at when the next thing is due.
    pub fn server_changed(&mut self, host: usize) {
        let Some(due) = self.hosts[host].server.next_due() else { return };
        if self.hosts[host].server_due.is_none_or(|at| due < at || at < self.now) {
            self.hosts[host].server_due = Some(due);
            self.at(due, What::Server { host });
        }
    }

    pub fn server_due(&mut self, host: usize) {
        self.hosts[host].server_due = None;
        if self.hosts[host].stands {
            // Its machine stands still, and it with it.
            self.hosts[host].server_due = Some(self.now.after(ms(20)));
            return self.later(ms(20), What::Server { host });
        }
        let now = self.now;
        let drained = self.standbys_have_all(host);
        let pid_before = self.hosts[host].server.postmaster.as_ref().map(|postmaster| postmaster.pid);
        let by_hand = self.hosts[host].server.postmaster.as_ref().is_some_and(|postmaster| postmaster.promoted_by_hand.is_some());
        let change = self.hosts[host].server.advance(now, &mut self.random, &mut self.wal_tokens, |_| drained);
        if let Some(change) = change {
            self.say(Some(host), || format!("PostgreSQL: {change:?}"));
            match change {
                Change::Accepts => {
                    let recovering = self.hosts[host].server.recovering();
                    if recovering {
                        if let Some(pid) = pid_before {
                            self.later(ms(1), What::Receiver { host, pid });
                        }
                    } else {
                        if !self.excused(host) {
                            self.checks.opened(host, &self.hosts);
                        }
                    }
                }
                Change::Promoted(timeline) => {
                    let excused = self.excused(host);
                    let name = self.hosts[host].name.as_str();
                    let reserved = self.etcd.view.history.iter().any(|entry| entry.timeline == timeline && entry.member.as_str() == name);
                    self.checks.promoted(host, timeline, reserved, by_hand, excused, &self.hosts);
                    if !excused {
                        self.checks.judge_acknowledged(host, &self.etcd.view, &self.hosts);
                    }
                    self.checks.asked.led();
                }
                Change::ShutDown => self.wal_flows(host),
                Change::Ended => self.receivers_notice(host, pid_before),
            }
        }
        self.server_changed(host);
        if !self.hosts[host].server.ended.is_empty() || self.hosts[host].server.is_empty() {
            self.guard_turn(host);
        }
    }

    fn standbys_have_all(&self, host: usize) -> bool {
        if self.is_synchronous {
            return self.walsenders_are_done(host);
        }
        let Some((data, postmaster)) = self.hosts[host].server.data.as_ref().zip(self.hosts[host].server.postmaster.as_ref()) else {
            return true;
        };
        self.hosts.iter().all(|other| {
            let streams = other.server.postmaster.as_ref().is_some_and(
                |theirs| matches!(theirs.receiver, Receiver::Streaming { from, pid, .. } if from == host && pid == postmaster.pid),
            );
            !streams || other.server.data.as_ref().is_some_and(|theirs| theirs.wal.end >= data.wal.end)
        })
    }

    /// Those that received from a postmaster that ended see the connection close, unless the network hides it.
    pub fn receivers_notice(&mut self, host: usize, pid: Option<i32>) {
        for other in 0..self.hosts.len() {
            if self.cut(host, other) {
                continue;
            }
            let Some(postmaster) = &mut self.hosts[other].server.postmaster else { continue };
            if matches!(postmaster.receiver, Receiver::Streaming { from, pid: of, .. } if from == host && Some(of) == pid) {
                postmaster.receiver = Receiver::Waiting;
                let theirs = postmaster.pid;
                self.later(ms(RECEIVER_RETRY_MS), What::Receiver { host: other, pid: theirs });
            }
        }
    }

    /// primary_conninfo is changed under a running standby.
    pub fn follow(&mut self, host: usize, upstream: Option<usize>) {
        let by_slot = self.hosts[host].server.slot_on_disk;
        let Some(postmaster) = &mut self.hosts[host].server.postmaster else { return };
        if (postmaster.upstream, postmaster.by_slot) == (upstream, by_slot) || !postmaster.recovering {
            return;
        }
        (postmaster.upstream, postmaster.by_slot) = (upstream, by_slot);
        postmaster.receiver = Receiver::Waiting;
        // Another walreceiver.
        postmaster.stuck_receiver = postmaster.stuck_receiver.filter(|stuck| *stuck == StuckReceiver::Wedged);
        let pid = postmaster.pid;
        self.later(ms(5), What::Receiver { host, pid });
    }

    /// The walreceiver tries to connect, or looks after its connection.
    pub fn receiver_due(&mut self, host: usize, pid: i32) {
        let now = self.now;
        if self.hosts[host].stands {
            return self.later(ms(20), What::Receiver { host, pid });
        }
        let Some(postmaster) = self.hosts[host].server.postmaster.as_ref().filter(|postmaster| postmaster.pid == pid) else { return };
        if !postmaster.recovering || !matches!(postmaster.phase, Phase::Accepting) {
            return;
        }
        // It asks for more when it has gone through what is there.
        if now < postmaster.replays_until {
            let until = postmaster.replays_until;
            return self.at(until, What::Receiver { host, pid });
        }
        let (receiver, upstream, stuck) = (postmaster.receiver, postmaster.upstream, postmaster.stuck_receiver);
        let next = match receiver {
            Receiver::Streaming { from, pid: theirs, connection, heard } => {
                let reachable = !self.cut(host, from) && self.hosts[from].powered && !self.hosts[from].stands;
                let there = self.hosts[from].server.postmaster.as_ref().is_some_and(|postmaster| postmaster.pid == theirs)
                    && self.is_sent_to(from, connection);
                match (reachable, there) {
                    (true, true) => Receiver::Streaming { from, pid: theirs, connection, heard: now },
                    (true, false) => Receiver::Waiting,
                    (false, _) if now.since(heard) >= ms(WAL_TIMEOUT_MS) => Receiver::Waiting,
                    (false, _) => receiver,
                }
            }
            Receiver::Waiting if stuck.is_some() => Receiver::Waiting,
            Receiver::Waiting => upstream.and_then(|from| self.connect(host, from)).unwrap_or(Receiver::Waiting),
        };
        let began = receiver == Receiver::Waiting && next != Receiver::Waiting;
        let this = &mut self.hosts[host].server;
        if let (Some(data), Some(postmaster)) = (&this.data, &mut this.postmaster) {
            postmaster.receiver = next;
            if began && postmaster.received == Lsn(0) {
                postmaster.received = segment_start(data.wal.end);
            }
        }
        self.later(ms(RECEIVER_RETRY_MS), What::Receiver { host, pid });
        self.reply(host);
        if began {
            self.stream_to(host);
        }
    }

    fn connect(&mut self, host: usize, from: usize) -> Option<Receiver> {
        if from == host || self.cut(host, from) || !self.hosts[from].powered || self.hosts[from].stands {
            return None;
        }
        let source = &self.hosts[from].server;
        if source.recovering() && self.hosts[from].refuses == Some(host) {
            return None;
        }
        let pid = source.postmaster.as_ref().filter(|_| source.sends() && source.accepting())?.pid;
        let (ours, theirs) = (self.hosts[host].server.data.as_ref()?, source.data.as_ref()?);
        if ours.system_id != theirs.system_id {
            return None;
        }
        let Some(until) = ours.wal.is_sent_by(&theirs.wal) else {
            self.bring_histories(host, from);
            return None;
        };
        // One that is ahead is sent what it has, and told then that the timeline was left: it says until then how far it is itself.
        let is_ahead = until < ours.wal.end;
        if !is_ahead && !ours.wal.is_in_the_past_of(&theirs.wal) {
            self.checks.follows_another(host, from, &self.hosts);
        }
        let connection = self.walsender_starts(from, host, is_ahead.then_some(until))?;
        Some(Receiver::Streaming { from, pid, connection, heard: self.now })
    }

    /// What a walreceiver fetches of the server it connects to, and pgherd brings of the leader it may follow.
    pub fn bring_histories(&mut self, host: usize, from: usize) {
        let Some(theirs) = self.hosts[from].server.data.as_ref().map(|data| data.wal.clone()) else { return };
        if let Some(data) = &mut self.hosts[host].server.data {
            data.bring(&theirs);
        }
    }

    /// Whoever streams from here gets what is new, a little later.
    pub fn wal_flows(&mut self, host: usize) {
        for other in 0..self.hosts.len() {
            let streams = self.hosts[other]
                .server
                .postmaster
                .as_ref()
                .is_some_and(|postmaster| matches!(postmaster.receiver, Receiver::Streaming { from, .. } if from == host));
            if streams {
                self.stream_to(other);
            }
        }
    }

    fn stream_to(&mut self, host: usize) {
        let Some((pid, receiver)) = self.hosts[host].server.postmaster.as_ref().map(|postmaster| (postmaster.pid, postmaster.receiver))
        else {
            return;
        };
        if std::mem::replace(&mut self.hosts[host].stream_due, true) {
            return;
        }
        let slow = self.hosts[host].server.ail.slowness;
        let mut takes = self.random.between(us(200), ms(2)) * (1 + slow * 4);
        if matches!(receiver, Receiver::Streaming { from, connection, .. } if self.sends_what_was_left(from, connection)) {
            // The segment is sent again from its beginning.
            takes += self.timing.between(ms(1), ms(AGAIN_MAX_MS));
        }
        self.later(takes, What::Stream { host, pid });
    }

    pub fn wal_arrives(&mut self, host: usize, pid: i32) {
        self.hosts[host].stream_due = false;
        let now = self.now;
        let Some(postmaster) = self.hosts[host].server.postmaster.as_ref().filter(|postmaster| postmaster.pid == pid) else { return };
        let Receiver::Streaming { from, pid: theirs, connection, .. } = postmaster.receiver else { return };
        if postmaster.stuck_receiver.is_some() {
            return;
        }
        let gone = self.hosts[from].server.postmaster.as_ref().is_none_or(|postmaster| postmaster.pid != theirs)
            || !self.is_sent_to(from, connection);
        if self.cut(host, from) || gone || !self.hosts[from].powered {
            return;
        }
        if self.hosts[host].stands || self.hosts[from].stands {
            // What was sent waits where the connection has it.
            self.hosts[host].stream_due = true;
            return self.later(ms(20), What::Stream { host, pid });
        }
        let Some(source) = self.hosts[from].server.data.as_ref().map(|data| data.wal.clone()) else { return };
        let this = &mut self.hosts[host].server;
        if let (Some(data), Some(postmaster)) = (&mut this.data, &mut this.postmaster) {
            if !data.wal.looks_like_the_past_of(&source) {
                postmaster.receiver = Receiver::Waiting;
                data.bring(&source);
                return;
            }
            self.checks.takes_up_wal(host, data);
            data.wal.receive(&source);
            postmaster.received = data.wal.end;
            postmaster.receiver = Receiver::Streaming { from, pid: theirs, connection, heard: now };
        }
        self.reply(host);
        self.wal_flows(host);
    }

    /// The walreceiver of a standby gets stuck, and stays so until somebody does something about it.
    pub fn receiver_sticks(&mut self, host: usize, choice: u64) {
        let Some(postmaster) = self.hosts[host].server.postmaster.as_mut().filter(|postmaster| postmaster.recovering) else { return };
        let stuck = [StuckReceiver::Connecting, StuckReceiver::Deaf, StuckReceiver::Wedged][(choice % 3) as usize];
        postmaster.stuck_receiver = Some(stuck);
        if stuck != StuckReceiver::Deaf {
            postmaster.receiver = Receiver::Waiting;
        }
    }

    /// Clients that try every server, as a driver with several hosts would that believes nobody.
    pub fn clients_write(&mut self) {
        let now = self.now;
        if self.is_synchronous {
            (0..self.hosts.len()).for_each(|host| self.look_after_walsenders(host));
            self.looks_whether_copies_count();
        }
        for host in 0..self.hosts.len() {
            if !self.load || self.hosts[host].stands || !self.hosts[host].server.acknowledges(now) || !self.lets_client_in(host) {
                continue;
            }
            if self.hosts[host].server.ail.disk_full {
                self.panics(host);
                continue;
            }
            let bytes = if self.random.below(64) == 0 { self.random.below(400_000) } else { 0 };
            if let Some(data) = &mut self.hosts[host].server.data {
                data.wal.append(96 + bytes);
            }
            if let Some(lsn) = self.hosts[host].server.commit(now) {
                self.checks.commits += 1;
                self.committed(host, lsn);
                self.wal_flows(host);
            }
        }
        let says: Vec<usize> = (0..self.hosts.len()).filter(|host| self.says_primary(*host) && !self.is_suspended(*host)).collect();
        self.checks.leader_paths(now, &says, &self.hosts);
    }

    /// A full disk: PostgreSQL panics (SAFETY row 28).
    fn panics(&mut self, host: usize) {
        let now = self.now;
        self.hosts[host].server.panic(now, &mut self.random);
        self.server_changed(host);
    }

    /// The lock was renewed at etcd by a request that `host` sent: what it may rely on, by nobody's word but etcd's.
    pub fn lock_was_renewed(
        &mut self,
        host: usize,
        lease: pgherd::types::LeaseId,
        sent: pgherd::clock::BootTime,
        ttl: std::time::Duration,
    ) {
        let until = sent + ttl * 995 / 1000;
        let renewed = self.hosts[host].renewed_until.entry(lease).or_insert(until);
        *renewed = (*renewed).max(until);
        self.lock_hangs_on_a_lease(host);
    }

    /// The lock has what its lease has, also from before it hung there.
    pub fn lock_hangs_on_a_lease(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        let Some(leader) = self.etcd.view.leader.as_ref().filter(|leader| leader.holder == this.name.as_str()) else { return };
        if let Some(until) = this.renewed_until.get(&leader.lease) {
            this.proved_until = this.proved_until.max(*until);
        }
    }

    /// Every other member that may lead has promised not to.
    pub fn promises_hold(&mut self, host: usize, until: pgherd::clock::BootTime) {
        let proved = &mut self.hosts[host].proved_until;
        *proved = (*proved).max(until);
    }

    /// The end of the lock's time by its own lease; for what is taken away before it.
    pub fn lock_runs_until(&self) -> Option<(usize, Real)> {
        let leader = self.etcd.view.leader.as_ref()?;
        let host = self.host_of(&leader.holder.parse().ok()?)?;
        Some((host, self.etcd.lease_until(leader.lease).unwrap_or(self.now)))
    }

    /// Somebody promotes a standby by hand.
    pub fn promote_by_hand(&mut self, host: usize) -> bool {
        let now = self.now;
        let done = self.hosts[host].server.recovering() && self.hosts[host].server.promote(now, &mut self.random, true).is_ok();
        self.server_changed(host);
        done
    }
}
