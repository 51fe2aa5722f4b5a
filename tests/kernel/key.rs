//! When two worlds are one: what can make no difference any more is forgotten, times count from now, and numbers by their rank.

use pgherd::clock::BootTime;
use pgherd::facts::guard::Word;
use pgherd::guard::state::{GuardState, Postmaster};

use crate::world::{Ask, Message, Mutant, Pause, STRANGE_LEASE, Setup, Who, World, at};

/// So long the daemon waits for an answer and its proof, in seconds: more than `a`, which bounds both.
const PATIENCE: u64 = 2;
/// Most messages under way that nobody waits for any more; others are lost.
const GIVEN_UP_MAX: usize = 1;

impl World {
    /// Forgets what can make no difference any more, so that worlds that differ only in it are one.
    pub fn tidy(&mut self, setup: &Setup) {
        for message in &mut self.net {
            let sent = match message.ask {
                Ask::Acquire { sent, .. } | Ask::Keepalive { sent, .. } | Ask::Proof { sent, .. } => sent,
                Ask::Release { .. } | Ask::Suspend { .. } | Ask::Acknowledge { .. } => self.now,
            };
            message.awaited &= self.now - sent <= PATIENCE;
        }
        // An acquisition that comes after its own lease has ended does nothing.
        let too_late = |sent: u64| !setup.late_messages || self.now >= sent + setup.ttl;
        self.net.retain(|m| !matches!(m.ask, Ask::Acquire { sent, .. } if !m.awaited && too_late(sent)));
        let credited = setup.has(Mutant::OldAnswerCreditedToANewerRenewal);
        // A keepalive that comes late only makes etcd's lease longer; the stranger's renewals cover that.
        self.net.retain(|m| m.awaited || credited || !matches!(m.ask, Ask::Proof { .. } | Ask::Keepalive { .. }));
        // One that nobody waits for is lost: a note too many only has the key stay longer.
        self.net.retain(|m| m.awaited || !matches!(m.ask, Ask::Suspend { .. }));
        if let Some(daemon) = self.daemon.as_mut().filter(|_| !setup.has(Mutant::PromoteWhateverRuns)) {
            daemon.vouched = daemon.vouched.filter(|start| self.pg.as_ref().is_some_and(|pg| pg.start == *start));
        }
        let asked = |lease: i64| self.net.iter().any(|m| matches!(m.ask, Ask::Keepalive { lease: of, .. } if of == lease));
        let locked = |lease: i64| self.lock.is_some_and(|lock| lock.lease == lease);
        let held = |lease: i64| self.daemon.as_ref().is_some_and(|daemon| daemon.lock.is_some_and(|lock| lock.1 == lease));
        self.leases.retain(|(lease, _)| locked(*lease) || asked(*lease) || held(*lease));
        self.renumber();
        self.net.sort_by_key(|message| (message.awaited, message.ask, message.answer));
        while self.net.iter().filter(|message| !message.awaited).count() > GIVEN_UP_MAX {
            self.net.remove(0);
        }
    }

    /// Epochs by rank and leases by order of appearance: that they were once larger numbers makes no difference.
    fn renumber(&mut self) {
        let mut epochs = Vec::new();
        self.numbers(&mut |epoch, _| epochs.push(*epoch));
        epochs.sort_unstable();
        epochs.dedup();
        let rank = |epoch: i64| i64::try_from(epochs.iter().filter(|other| **other > 0 && **other <= epoch).count()).unwrap();
        let mut leases = vec![0, STRANGE_LEASE];
        self.numbers(&mut |epoch, lease| {
            *epoch = rank(*epoch);
            let known = leases.iter().position(|other| other == lease);
            *lease = i64::try_from(known.unwrap_or(leases.len())).unwrap();
            if known.is_none() {
                leases.push(*lease);
            }
        });
    }

    /// Every pair of an epoch and a lease in this world; 0 where there is none.
    fn numbers(&mut self, each: &mut dyn FnMut(&mut i64, &mut i64)) {
        each(&mut self.newest, &mut 0);
        if let Some(lock) = &mut self.lock {
            each(&mut lock.epoch, &mut lock.lease);
        }
        if let Some(lock) = self.daemon.as_mut().and_then(|daemon| daemon.lock.as_mut()) {
            each(&mut lock.0, &mut lock.1);
        }
        let held = self.state.lock.as_mut().map(|lock| &mut lock.identity);
        for identity in held.into_iter().chain(&mut self.state.given_up) {
            each(&mut identity.epoch.0, &mut identity.lease.lease.0);
        }
        for message in &mut self.net {
            match &mut message.ask {
                Ask::Acquire { lease, .. } => each(message.answer.as_mut().unwrap_or(&mut 0), lease),
                Ask::Keepalive { lease, .. } => each(&mut 0, lease),
                Ask::Proof { epoch, lease, .. } => each(epoch, lease),
                Ask::Release { epoch } => each(epoch, &mut 0),
                Ask::Suspend { .. } | Ask::Acknowledge { .. } => {}
            }
        }
        self.leases.iter_mut().for_each(|(lease, _)| each(&mut 0, lease));
    }

    /// Everything that can make a difference for what happens next, with times as seen from now.
    pub fn key(&self, setup: &Setup) -> Vec<u8> {
        let mut key = Key { bytes: Vec::with_capacity(96), now: at(self.now), ttl: setup.ttl };
        key.small(self.lock.map_or(0, |lock| lock.epoch * 4 + i64::from(lock.by == Who::Us) + 1));
        key.small(self.lock.map_or(0, |lock| lock.lease));
        for (lease, expires) in &self.leases {
            key.small(*lease);
            key.deadline(Some(at(*expires)));
        }
        key.small(-1);
        key.small(self.newest);
        key.pause(self.pause);
        key.small(self.paused);
        for message in &self.net {
            key.message(message);
        }
        key.small(-1);
        key.small(self.guard as i64);
        match &self.daemon {
            None => key.small(-2),
            Some(daemon) => {
                key.small(daemon.lock.map_or(0, |lock| lock.0));
                key.small(daemon.lock.map_or(0, |lock| lock.1));
                key.small(daemon.vouched.map_or(0, |start| 1 + i64::from(self.pg.as_ref().is_some_and(|pg| pg.start == start))));
                // Only for those who may meet a silent guard.
                key.deadline(daemon.fence_at.filter(|_| setup.guard_fails));
                key.pause(daemon.sees);
                key.small(daemon.says.map_or(-1, |word| word.revision.0 * 2 + i64::from(word.suspends)));
            }
        }
        key.guard(&self.state);
        key.moment(self.fed.map(|dog| dog.fed_at));
        key.small(i64::from(self.mid_feed));
        key.deadline(self.fires_at.map(at));
        if let Some(pg) = &self.pg {
            let bits = [pg.recovering, pg.promoted, pg.postmaster, pg.stopping, pg.killed];
            key.small(bits.iter().fold(1, |sum, bit| sum * 2 + i64::from(*bit)));
            key.small(i64::from(matches!(&self.state.postmaster, Postmaster::Kept(kept) if kept.start == pg.start)));
        }
        key.deadline(Some(self.proved));
        key.bytes
    }
}

struct Key {
    bytes: Vec<u8>,
    now: BootTime,
    ttl: u64,
}

impl Key {
    fn pause(&mut self, pause: Option<Pause>) {
        self.small(pause.map_or(-1, |pause| pause.revision));
        self.small(pause.map_or(-1, |pause| i64::from(pause.ending) * 4 + i64::from(pause.noted) * 2 + i64::from(pause.acknowledged)));
    }

    fn small(&mut self, number: i64) {
        self.bytes.push(u8::try_from(number + 8).unwrap());
    }

    /// Tenths of a second from now. Deadlines that have passed are all alike.
    fn deadline(&mut self, time: Option<BootTime>) {
        self.time(time, 0);
    }

    /// What something is counted from; after a whole ttl nothing is counted from it any more.
    fn moment(&mut self, time: Option<BootTime>) {
        self.time(time, i64::try_from(self.ttl).unwrap() * -10);
    }

    fn time(&mut self, time: Option<BootTime>, least: i64) {
        let tenths = |time: BootTime| i64::try_from(time.0 / 100_000_000).unwrap();
        let seen = time.map_or(i64::from(i16::MIN), |time| (tenths(time) - tenths(self.now)).max(least));
        self.bytes.extend(i16::try_from(seen).unwrap().to_le_bytes());
    }

    fn message(&mut self, message: &Message) {
        let (kind, epoch, lease, times) = match message.ask {
            Ask::Acquire { lease, sent } => (1, 0, lease, [Some(sent), None]),
            Ask::Keepalive { lease, sent } => (2, 0, lease, [Some(sent).filter(|_| message.awaited), None]),
            Ask::Proof { epoch, lease, claimed, sent } => (3, epoch, lease, [Some(claimed), Some(sent)]),
            Ask::Release { epoch } => (4, epoch, 0, [None, None]),
            Ask::Suspend { revision } => (5, revision, 0, [None, None]),
            Ask::Acknowledge { revision } => (6, revision, 0, [None, None]),
        };
        for number in [kind, epoch, lease, message.answer.unwrap_or(-1), i64::from(message.awaited)] {
            self.small(number);
        }
        times.into_iter().for_each(|time| self.moment(time.map(at)));
    }

    fn guard(&mut self, state: &GuardState) {
        self.small(state.lock.map_or(0, |lock| lock.identity.epoch.0));
        self.small(state.lock.map_or(0, |lock| lock.identity.lease.lease.0));
        self.deadline(state.lock.map(|lock| lock.deadlines.valid_until));
        self.small(state.given_up.map_or(0, |lock| lock.epoch.0));
        self.small(state.maintenance.revision.0);
        self.small(i64::from(state.maintenance.suspends));
        match &state.postmaster {
            Postmaster::Empty(_) => self.small(0),
            Postmaster::Unclaimed(_) => self.small(1),
            Postmaster::Kept(kept) => {
                self.small(2 + i64::from(kept.word == Word::Writable));
                self.small(kept.climbed.map_or(0, |rung| rung as i64 + 1));
                self.small(i64::from(kept.end.is_some()));
                self.deadline(kept.ladder.map(|ladder| ladder.valid_until));
                [kept.order.fast_at, kept.order.immediate_at, kept.order.kill_at].into_iter().for_each(|time| self.deadline(time));
            }
        }
    }
}
