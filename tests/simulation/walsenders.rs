//! Walsenders, as a primary has them: one for each connection, for as long as it takes the connection to be known to be over.
//!
//! A standby that ends, or that asks somebody else, says so at once where the network lets it. One that is cut off, frozen or without power
//! says nothing: its walsender stays until wal_sender_timeout, shows what it flushed last and counts for what it has, and holds its slot, so
//! that another one of the member is refused. Without a slot there are two.

use pgherd::facts::postgres::ReplicaFacts;
use pgherd::facts::synchrony::Names;
use pgherd::policy::slots::slot_of;
use pgherd::types::Lsn;

use super::clock::{Real, ms, us};
use super::postgres::{Receiver, WAL_TIMEOUT_MS};
use super::synchrony::priority;
use super::world::{Sim, What};

/// Chance, each time it is looked at, that what it sends to a host that is back from somewhere else is answered with a reset by now.
const RESET_PERCENT: u64 = 4;
/// Nearer than this to the end of the WAL it has caught up.
const CAUGHT_UP_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone)]
pub struct Walsender {
    pub to: usize,
    pub connection: u64,
    /// It holds its member's slot.
    by_slot: bool,
    /// What it read last.
    pub names: Names,
    /// What it made of it, for all to see.
    pub priority: u32,
    pub flush: Lsn,
    /// It sends a timeline that its server has left, up to there, to one that has more of it; None = it sends whatever there is.
    until: Option<Lsn>,
    /// It has sent everything at some time.
    pub caught_up: bool,
    /// When the other end was there last.
    heard: Real,
    /// The other end has gone without a word.
    is_half_open: bool,
}

impl Sim {
    /// A standby has connected: a walsender that has what the postmaster has. None = it is refused.
    pub fn walsender_starts(&mut self, host: usize, to: usize, until: Option<Lsn>) -> Option<u64> {
        if self.is_synchronous {
            self.look_after_walsenders(host);
        }
        let by_slot = self.hosts[to].server.postmaster.as_ref()?.by_slot;
        let name = self.hosts[to].name.clone();
        let server = &mut self.hosts[host].server;
        let synchronous = &mut server.postmaster.as_mut()?.synchronous;
        let has_slot = server.data.as_ref().is_some_and(|data| data.slots.contains_key(&slot_of(&name)));
        let is_active = synchronous.senders.iter().any(|sender| sender.to == to && sender.by_slot);
        if self.is_synchronous && by_slot && (!has_slot || is_active) {
            return None;
        }
        self.ids += 1;
        let names = synchronous.read.clone();
        synchronous.senders.push(Walsender {
            to,
            connection: self.ids,
            by_slot,
            priority: priority(&names, name.as_str()),
            names,
            flush: Lsn(0),
            until,
            caught_up: false,
            heard: self.now,
            is_half_open: false,
        });
        Some(self.ids)
    }

    /// Ends those whose connection is known to be over.
    pub fn look_after_walsenders(&mut self, host: usize) {
        if self.hosts[host].stands {
            return;
        }
        let now = self.now;
        let Some(postmaster) = &mut self.hosts[host].server.postmaster else { return };
        let mut senders = std::mem::take(&mut postmaster.synchronous.senders);
        senders.retain_mut(|sender| {
            let reachable = !self.cut(host, sender.to) && self.hosts[sender.to].powered && !self.hosts[sender.to].stands;
            let is_there =
                self.hosts[sender.to].server.postmaster.as_ref().is_some_and(
                    |theirs| matches!(theirs.receiver, Receiver::Streaming { connection, .. } if connection == sender.connection),
                );
            if reachable && is_there {
                sender.heard = now;
            } else if reachable && (!sender.is_half_open || self.timing.percent(RESET_PERCENT)) {
                return false;
            }
            sender.is_half_open |= !is_there;
            now.since(sender.heard) < ms(WAL_TIMEOUT_MS)
        });
        if let Some(postmaster) = &mut self.hosts[host].server.postmaster {
            postmaster.synchronous.senders = senders;
        }
    }

    fn senders(&self, host: usize) -> impl Iterator<Item = &Walsender> {
        self.hosts[host].server.postmaster.iter().flat_map(|postmaster| &postmaster.synchronous.senders)
    }

    /// Its walsender is there.
    pub fn is_sent_to(&self, from: usize, connection: u64) -> bool {
        !self.is_synchronous || self.senders(from).any(|sender| sender.connection == connection)
    }

    /// Its walsender sends a timeline that its server has left, to one that has more of it.
    pub fn sends_what_was_left(&self, from: usize, connection: u64) -> bool {
        self.senders(from).any(|sender| sender.connection == connection && sender.until.is_some())
    }

    /// A standby says how far it has flushed.
    pub fn reply(&mut self, host: usize) {
        if !self.is_synchronous {
            return;
        }
        let Some(postmaster) = &self.hosts[host].server.postmaster else { return };
        let Receiver::Streaming { from, connection, .. } = postmaster.receiver else { return };
        let flush = self.hosts[host].server.data.as_ref().map_or(Lsn(0), |data| data.wal.end);
        let takes = self.timing.between(us(100), ms(2));
        self.later(takes, What::Reply { host, from, connection, flush });
    }

    pub fn replied(&mut self, host: usize, from: usize, connection: u64, flush: Lsn) {
        if self.cut(host, from) || !self.hosts[from].powered {
            return;
        }
        if self.hosts[from].stands {
            return self.later(ms(20), What::Reply { host, from, connection, flush });
        }
        let slot = slot_of(&self.hosts[host].name);
        let server = &mut self.hosts[from].server;
        let (Some(data), Some(postmaster)) = (&mut server.data, &mut server.postmaster) else { return };
        let Some(sender) = postmaster.synchronous.senders.iter_mut().find(|sender| sender.connection == connection) else { return };
        sender.flush = sender.flush.max(flush);
        sender.caught_up |= data.wal.end.bytes_since(flush) <= CAUGHT_UP_BYTES;
        if let Some(kept) = data.slots.get_mut(&slot).filter(|_| sender.by_slot) {
            *kept = (*kept).max(flush);
        }
        self.releases(from, connection);
    }

    /// Somebody streams by this slot.
    pub fn is_active(&self, host: usize, slot: &str) -> bool {
        self.senders(host).any(|sender| sender.by_slot && slot_of(&self.hosts[sender.to].name) == slot)
    }

    /// A stop in good order waits for what walsenders have sent to be flushed, however long nobody has answered.
    pub fn walsenders_are_done(&self, host: usize) -> bool {
        let end = self.hosts[host].server.data.as_ref().map_or(Lsn(0), |data| data.wal.end);
        self.senders(host).all(|sender| sender.flush >= end)
    }

    /// pg_stat_replication.
    pub fn walsenders_of(&self, host: usize) -> Vec<ReplicaFacts> {
        let server = &self.hosts[host].server;
        let (Some(data), Some(postmaster)) = (&server.data, &server.postmaster) else { return Vec::new() };
        let row = |sender: &Walsender| ReplicaFacts {
            application_name: self.hosts[sender.to].name.to_string(),
            state: if sender.caught_up { "streaming" } else { "catchup" }.to_owned(),
            client_addr: None,
            sent_lsn: Some(sender.until.unwrap_or(data.wal.end)),
            flush_lsn: Some(sender.flush),
            replay_lsn: Some(sender.flush),
            sync_state: String::new(),
            sync_priority: sender.priority,
        };
        postmaster.synchronous.senders.iter().map(row).collect()
    }
}
