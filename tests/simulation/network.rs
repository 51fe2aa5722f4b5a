//! Requests of a daemon to etcd, and what becomes of them: lost, late, applied without an answer, applied twice.
//!
//! A caller waits for so long and no longer. What it has given up may still arrive and be applied.

use std::time::Duration;

use pgherd::etcd::AcquireRequest;
use pgherd::facts::cluster::{FailsafeRecord, HistoryEntry, LeaderKey, MemberRecord, ReleaseRecord, StatusRecord};
use pgherd::facts::failsafe::PromiseAsk;
use pgherd::facts::requests::RequestProgress;
use pgherd::facts::synchrony::SyncRecord;
use pgherd::machine::event::Event;
use pgherd::types::{Epoch, LeaseId, LeaseIdentity, LockIdentity, MemberName, Revision};

use super::clock::{Real, ms, us};
use super::etcd::{Acquired, Put, Serving};
use super::world::{DaemonDue, Sim, What};

/// One request outside the lease's thread may take so long.
pub const REQUEST_TIMEOUT_MS: u64 = 3_000;
/// A server without a leader holds requests back; they are looked at again so often.
const HELD_BACK_MS: u64 = 70;
/// And so long at most, before it answers with an error.
const HOLD_BACK_MAX_MS: u64 = 5_000;
/// A late request is carried out within so long, mostly when its caller has given up; one that is lost so long after that.
const LATE_MS: u64 = 5_000;
/// How late a write of `sync` comes that is held up.
const RECORD_LATE_MS: u64 = 6_000;
/// A request for the lock that is overtaken comes so late: another has led by then.
pub const RACES_LATE_MS: u64 = 2_500;

/// One direction between a host and etcd.
#[derive(Debug, Clone, Default)]
pub struct Link {
    pub cut: bool,
    pub loss_percent: u64,
    pub delay: Option<(Duration, Duration)>,
    /// Requests are carried out twice now and then.
    pub duplicates_percent: u64,
    /// Writes are carried out late now and then.
    pub late_percent: u64,
}

/// Who waits for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    Lease,
    Watch,
    Record(u64),
    Nobody,
}

#[derive(Debug, Clone)]
pub enum EtcdAsk {
    Grant {
        ttl: Duration,
    },
    /// Sent when the host's clock showed `sent`.
    KeepAlive {
        lease: LeaseId,
        sent: pgherd::clock::BootTime,
    },
    Prove {
        lock: LockIdentity,
    },
    Revoke {
        lease: LeaseId,
    },
    List,
    ReadMember {
        member: MemberName,
    },
    GrantedTtl {
        lease: LeaseId,
    },
    PutMember {
        member: MemberName,
        record: Box<MemberRecord>,
        lease: LeaseId,
        expected: Revision,
    },
    ReadLeader,
    Acquire(Box<AcquireRequest>),
    Reaffirm {
        epoch: Epoch,
        member: MemberName,
    },
    WriteSync {
        epoch: Epoch,
        lock: Revision,
        judged_on: Revision,
        record: Option<SyncRecord>,
    },
    Release {
        epoch: Epoch,
        /// The key's mod revision when it was read.
        as_read: Revision,
        record: Option<ReleaseRecord>,
    },
    WriteStatus(Box<StatusRecord>),
    WriteFailsafe {
        epoch: Epoch,
        judged_on: Revision,
        record: Option<FailsafeRecord>,
    },
    NoteSuspension {
        member: MemberName,
        revision: Revision,
        suspends: bool,
    },
    EndMaintenance {
        revision: Revision,
        leader: Revision,
    },
    RecordPromotion {
        epoch: Epoch,
        history: Vec<HistoryEntry>,
    },
    ClaimInitialize {
        member: MemberName,
        lease: LeaseId,
    },
    GiveUpInitialize {
        lease: LeaseId,
    },
    AnswerRequest {
        id: String,
        mod_revision: Revision,
        progress: RequestProgress,
    },
    MoveToLease {
        member: MemberName,
        record: Box<MemberRecord>,
        lock: Option<Epoch>,
        old: LeaseId,
        new: LeaseId,
    },
}

#[derive(Debug, Clone)]
pub enum EtcdAnswer {
    Granted(LeaseIdentity),
    /// The raft term it was answered in, and the lease's ttl.
    Renewed {
        term: u64,
        ttl: Duration,
    },
    NoSuchLease,
    Proof {
        ours: bool,
        term: u64,
    },
    Done(bool),
    /// The revision of a write that was done.
    At(Option<Revision>),
    /// Whether it was, as of that revision.
    AsOf(bool, Revision),
    View(std::sync::Arc<pgherd::facts::cluster::ClusterView>),
    MemberAt(Revision),
    Put(Put),
    GrantedTtl(Option<(Duration, u64)>),
    /// With its mod revision.
    Leader(Option<LeaderKey>, Revision),
    Acquired(Acquired),
    /// etcd answered with an error: nothing was done.
    Error,
}

impl EtcdAsk {
    fn writes(&self) -> bool {
        !matches!(
            self,
            EtcdAsk::KeepAlive { .. }
                | EtcdAsk::List
                | EtcdAsk::ReadMember { .. }
                | EtcdAsk::GrantedTtl { .. }
                | EtcdAsk::ReadLeader
                | EtcdAsk::Prove { .. }
        )
    }

    /// A transaction that is the same when it is carried out twice: it is sent to another endpoint beside a silent one.
    fn may_be_sent_twice(&self) -> bool {
        matches!(
            self,
            EtcdAsk::PutMember { .. }
                | EtcdAsk::WriteStatus(_)
                | EtcdAsk::WriteFailsafe { .. }
                | EtcdAsk::RecordPromotion { .. }
                | EtcdAsk::WriteSync { .. }
                | EtcdAsk::NoteSuspension { .. }
                | EtcdAsk::EndMaintenance { .. }
                | EtcdAsk::Reaffirm { .. }
                | EtcdAsk::KeepAlive { .. }
                | EtcdAsk::Prove { .. }
                | EtcdAsk::MoveToLease { .. }
        )
    }
}

impl Sim {
    fn latency(&mut self, link: &Link) -> Duration {
        let base = self.random.between(us(150), us(900));
        match link.delay {
            Some((least, most)) => base + self.random.between(least, most),
            None if self.random.below(200) == 0 => base + self.random.between(ms(2), ms(40)),
            None => base,
        }
    }

    /// Sends a request. The caller is told by [`Sim::answered`], once.
    pub fn call(&mut self, host: usize, caller: Caller, ask: EtcdAsk, patience: Duration) -> u64 {
        self.ids += 1;
        let (id, run) = (self.ids, self.hosts[host].daemon.as_ref().map_or(0, |daemon| daemon.run));
        if let Some(daemon) = self.hosts[host].daemon_of(run) {
            daemon.calls.insert(id, (caller, daemon.witness));
        }
        self.daemon_later(host, run, patience, DaemonDue::Timeout { call: id });
        let link = self.links[host].0.clone();
        let held_up = matches!(&ask, EtcdAsk::WriteSync { record: Some(record), .. } if self.is_late_with_record(host, record.copies));
        let times = if ask.may_be_sent_twice() && self.random.percent(link.duplicates_percent) { 2 } else { 1 };
        for _ in 0..times {
            if link.cut || self.random.percent(link.loss_percent) {
                continue;
            }
            let is_lost = matches!(ask, EtcdAsk::Release { .. }) && self.loses_release(host)
                || matches!(ask, EtcdAsk::Reaffirm { .. }) && self.now < self.hosts[host].reaffirms_late_until && !self.healed;
            let is_late = matches!(caller, Caller::Record(_)) && ask.writes() && self.random.percent(link.late_percent);
            let late = match (is_lost, is_late) {
                _ if matches!(ask, EtcdAsk::Acquire(_)) && self.races_late(host) => ms(RACES_LATE_MS),
                _ if held_up => ms(RECORD_LATE_MS),
                _ if matches!(ask, EtcdAsk::ReadLeader) && self.hosts[host].reads_late.is_some() => {
                    self.hosts[host].reads_late.take().unwrap_or_default()
                }
                (true, _) => patience + self.random.between(ms(0), ms(LATE_MS)),
                (false, true) => self.random.between(ms(200), ms(LATE_MS)),
                (false, false) => ms(0),
            };
            let latency = self.latency(&link) + late;
            self.later(latency, What::Arrive { host, run, call: id, ask: Box::new(ask.clone()), held: 0 });
        }
        id
    }

    /// A request is at etcd.
    pub fn arrive(&mut self, host: usize, run: u64, call: u64, ask: Box<EtcdAsk>, held_ms: u64) {
        match self.etcd.serving {
            Serving::Yes => {}
            Serving::No { refuses: true } => return self.send_answer(host, run, call, EtcdAnswer::Error),
            Serving::No { refuses: false } | Serving::Electing { .. } => {
                if held_ms >= HOLD_BACK_MAX_MS {
                    return self.send_answer(host, run, call, EtcdAnswer::Error);
                }
                return self.later(ms(HELD_BACK_MS), What::Arrive { host, run, call, ask, held: held_ms + HELD_BACK_MS });
            }
        }
        if self.etcd.no_space && ask.writes() {
            return self.send_answer(host, run, call, EtcdAnswer::Error);
        }
        let before = self.etcd.view.revision;
        let answer = self.carry_out(host, *ask);
        if self.etcd.view.revision != before {
            self.etcd_changed();
        }
        self.send_answer(host, run, call, answer);
    }

    fn send_answer(&mut self, host: usize, run: u64, call: u64, answer: EtcdAnswer) {
        let link = self.links[host].1.clone();
        if link.cut || self.random.percent(link.loss_percent) {
            return;
        }
        let latency = self.latency(&link);
        let revision = self.etcd.view.revision;
        let what = DaemonDue::Answer { call, answer: Box::new(answer), revision };
        self.later(latency, What::Daemon { host, run, due: what });
    }

    fn carry_out(&mut self, host: usize, ask: EtcdAsk) -> EtcdAnswer {
        let now = self.now;
        match ask {
            EtcdAsk::Grant { ttl } => EtcdAnswer::Granted(self.etcd.grant(now, ttl)),
            // It renews nothing: the leader that counts knows nothing of it.
            EtcdAsk::KeepAlive { lease, .. } if self.hosts[host].old_etcd_leader.is_some_and(|(until, _)| now < until) => {
                let term = self.hosts[host].old_etcd_leader.map_or(0, |(_, term)| term);
                self.etcd.granted_ttl(lease).map_or(EtcdAnswer::NoSuchLease, |ttl| EtcdAnswer::Renewed { term, ttl })
            }
            EtcdAsk::KeepAlive { lease, sent } => match self.etcd.keep_alive(now, lease) {
                Some(ttl) => {
                    self.lock_was_renewed(host, lease, sent, ttl);
                    EtcdAnswer::Renewed { term: self.etcd.term, ttl }
                }
                None => EtcdAnswer::NoSuchLease,
            },
            EtcdAsk::Prove { lock } => EtcdAnswer::Proof { ours: self.etcd.proves(lock), term: self.etcd.term },
            EtcdAsk::Revoke { lease } => EtcdAnswer::Done(self.etcd.revoke(lease)),
            EtcdAsk::List => EtcdAnswer::View(std::sync::Arc::clone(&self.etcd.view)),
            EtcdAsk::ReadMember { member } => EtcdAnswer::MemberAt(self.etcd.member_revision(&member)),
            EtcdAsk::GrantedTtl { lease } => EtcdAnswer::GrantedTtl(self.etcd.granted_ttl(lease).map(|ttl| (ttl, self.etcd.term))),
            EtcdAsk::PutMember { member, record, lease, expected } => {
                EtcdAnswer::Put(self.etcd.put_member(&member, *record, lease, expected))
            }
            EtcdAsk::ReadLeader => EtcdAnswer::Leader(self.etcd.view.leader.clone(), self.etcd.leader_revision),
            EtcdAsk::Acquire(ask) => {
                let before = std::sync::Arc::clone(&self.etcd.view);
                let won = self.etcd.acquire(&ask);
                if before.leader.is_none() && matches!(won, super::etcd::Acquired::Ours(_)) {
                    self.checks.elected(&self.hosts[host], &before);
                }
                self.lock_was_taken(host, &won);
                EtcdAnswer::Acquired(won)
            }
            EtcdAsk::Release { epoch, as_read, record } => {
                let led = self.etcd.proves_epoch(epoch);
                let done = self.etcd.release(epoch, as_read, record.as_ref());
                if led && done {
                    self.checks.released(&self.hosts[host]);
                    let to = record.as_ref().and_then(|record| Some((record.lsn, self.host_of(record.to.as_ref()?)?)));
                    if let Some((lsn, successor)) = to {
                        self.checks.released_for(&self.hosts[host], &self.hosts[successor], lsn);
                    }
                }
                EtcdAnswer::Done(done)
            }
            EtcdAsk::Reaffirm { epoch, member } => {
                let written = self.etcd.reaffirm(epoch, &member);
                EtcdAnswer::At(written.then_some(self.etcd.view.revision))
            }
            EtcdAsk::WriteSync { epoch, lock, judged_on, record } => {
                let (written, at) = self.etcd.write_sync(epoch, lock, judged_on, record);
                if written {
                    self.checks.judge_record(&self.etcd.view, &self.hosts);
                }
                EtcdAnswer::AsOf(written, at)
            }
            EtcdAsk::WriteStatus(status) => {
                let lsn = status.lsn;
                let written = self.etcd.write_status(*status);
                if written {
                    self.checks.published(&self.hosts[host], lsn);
                }
                EtcdAnswer::Done(written)
            }
            EtcdAsk::WriteFailsafe { epoch, judged_on, record } => EtcdAnswer::At(self.etcd.write_failsafe(epoch, judged_on, record)),
            EtcdAsk::RecordPromotion { epoch, history } => EtcdAnswer::Done(self.etcd.record_promotion(epoch, history)),
            EtcdAsk::NoteSuspension { member, revision, suspends } => {
                EtcdAnswer::Done(self.etcd.note_suspension(&member, revision, suspends))
            }
            EtcdAsk::EndMaintenance { revision, leader } => EtcdAnswer::Done(self.etcd.end_maintenance(revision, leader)),
            EtcdAsk::ClaimInitialize { member, lease } => EtcdAnswer::Done(self.etcd.claim_initialize(&member, lease)),
            EtcdAsk::GiveUpInitialize { lease } => {
                self.etcd.give_up_initialize(lease);
                EtcdAnswer::Done(true)
            }
            EtcdAsk::AnswerRequest { id, mod_revision, progress } => {
                EtcdAnswer::Done(self.etcd.answer_request(&id, mod_revision, progress))
            }
            EtcdAsk::MoveToLease { member, record, lock, old, new } => {
                EtcdAnswer::Done(self.etcd.move_to_lease(&member, *record, lock, old, new))
            }
        }
    }

    /// An answer is there, or the caller's patience is over.
    pub fn answered(&mut self, host: usize, run: u64, call: u64, answer: Option<(EtcdAnswer, Revision)>) {
        let Some(daemon) = self.hosts[host].daemon_of(run) else { return };
        let Some((caller, floor)) = daemon.calls.remove(&call) else { return };
        // An answer from before what was seen is not believed, and says so (SAFETY row 43). The lease's thread looks at terms instead.
        let answer = match answer {
            Some((answer, revision)) if caller == Caller::Lease || revision >= floor => {
                daemon.witness = daemon.witness.max(revision);
                Some(answer)
            }
            Some(_) if caller == Caller::Watch => return self.watch_suspicious(host, call),
            Some(_) => Some(EtcdAnswer::Error),
            None => None,
        };
        match caller {
            Caller::Lease => self.lease_answered(host, call, answer),
            Caller::Watch => self.watch_listed(host, call, answer),
            Caller::Record(id) => self.record_answered(host, id, answer),
            Caller::Nobody => {}
        }
    }

    /// The way between a host and etcd works in both directions, and etcd serves.
    pub fn reaches_etcd(&self, host: usize) -> bool {
        let (out, back) = &self.links[host];
        self.etcd.serves() && !out.cut && !back.cut
    }

    pub fn etcd_tick(&mut self) {
        let now: Real = self.now;
        if let Serving::Electing { until } = self.etcd.serving
            && until <= now
        {
            self.etcd.elected(now);
            self.say(None, || "etcd has a leader again: leases begin anew".to_owned());
        }
        if self.etcd.bugs.revokes_early {
            self.etcd.bugs.revokes_early = false;
            self.etcd.revoke_early();
        }
        if self.etcd.tick(now) {
            self.say(None, || "leases ran out".to_owned());
            self.etcd_changed();
        }
        self.later(ms(super::etcd::EXPIRY_TICK_MS), What::EtcdTick);
    }
}

impl Sim {
    /// A call of failsafe to another member's HTTP API.
    pub fn call_peer(&mut self, host: usize, run: u64, round: u64, to: MemberName, ask: PromiseAsk) {
        let takes = self.random.between(us(100), ms(3));
        self.later(takes, What::PromiseCall { host, run, round, to, ask: Box::new(ask) });
    }

    pub fn peer_is_called(&mut self, host: usize, run: u64, round: u64, to: MemberName, ask: PromiseAsk) {
        let Some(other) = self.host_of(&to) else { return };
        let received = self.local(other);
        let this = &self.hosts[other];
        if self.cut(host, other) || !this.powered || this.stands {
            return;
        }
        let Some(daemon) = this.daemon.as_ref().filter(|daemon| !daemon.frozen) else { return };
        let theirs = daemon.run;
        self.ids += 1;
        let id = self.ids;
        self.promise_calls.insert(id, (host, run, round, to));
        let event = Event::PromiseAsked { id, ask, received };
        self.later(us(50), What::Daemon { host: other, run: theirs, due: DaemonDue::Fact(Box::new(event)) });
    }

    /// The machine's answer goes back, if the network lets it.
    pub fn promise_is_answered(&mut self, id: u64, promised: bool) {
        let Some((host, run, round, from)) = self.promise_calls.remove(&id) else { return };
        let Some(other) = self.host_of(&from) else { return };
        if self.cut(host, other) {
            return;
        }
        let takes = self.random.between(us(100), ms(3));
        self.later(takes, What::Daemon { host, run, due: DaemonDue::Promised { round, from, promised } });
    }
}
