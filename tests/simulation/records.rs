//! Operations on etcd and on peers: the reads before a transaction, the transaction, and the reading back when its answer is lost.

use pgherd::clock::BootTime;
use pgherd::etcd::AcquireRequest;
use pgherd::facts::archiving::Archived;
use pgherd::facts::cluster::{HistoryEntry, MemberRecord};
use pgherd::facts::lease::LeaseEvent;
use pgherd::facts::postgres::Survey;
use pgherd::http::health;
use pgherd::http::snapshot::Snapshot;
use pgherd::machine::action::{LeaseOrder, Operation};
use pgherd::machine::event::{AcquireOutcome, Event, Finished, ForeignKey, PeersAnswer, PutOutcome};
use pgherd::policy::rejoin::OwnPromotion;
use pgherd::types::{LeaseId, LeaseIdentity, LockIdentity, Lsn, MemberName, TimelineId};

use super::clock::{ms, us};
use super::etcd::{Acquired, Etcd, Put};
use super::guard::{AskedBy, GuardAsk};
use super::lease::Command;
use super::mutants::{Mutant, mutant};
use super::network::{Caller, EtcdAnswer, EtcdAsk, REQUEST_TIMEOUT_MS};
use super::world::{DaemonDue, Sim, What};

/// How long a peer may take to say whether it is writable.
const PEER_TIMEOUT_MS: u64 = 700;
const PUT_MEMBER_TRIES: u32 = 3;

/// How often an endpoint is known to answer.
const UNREAD_PERCENT: u64 = 70;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The transaction is on its way, without a question before it: the endpoint has just answered something else.
    Unread,
    /// What is there is read.
    Read,
    /// The transaction is on its way.
    Write,
    /// Its answer was lost.
    ReadBack,
}

/// One operation under way.
pub struct Record {
    operation: Operation,
    stage: Stage,
    lease: Option<LeaseId>,
    tries: u32,
    acquire: Option<Box<AcquireRequest>>,
    moving: Option<Moving>,
    foreign: Option<LeaseId>,
    peers: Option<Peers>,
}

#[derive(Clone)]
struct Moving {
    lock: Option<LockIdentity>,
    record: MemberRecord,
    old: LeaseIdentity,
    new: LeaseIdentity,
}

#[derive(Clone)]
struct Peers {
    sent: BootTime,
    writable: Vec<MemberName>,
}

impl Sim {
    fn record(&mut self, host: usize, id: u64) -> Option<&mut Record> {
        self.hosts[host].daemon.as_mut()?.records.get_mut(&id)
    }

    pub fn begin_record(&mut self, host: usize, operation: Operation) {
        self.ids += 1;
        let id = self.ids;
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let lease = daemon.machine.world().lease.map(|lease| lease.lease);
        let lock_seen = daemon.machine.world().view.as_ref().and_then(|view| view.leader.clone());
        let record = Record {
            operation: operation.clone(),
            stage: Stage::Write,
            lease,
            tries: 0,
            acquire: None,
            moving: None,
            foreign: None,
            peers: None,
        };
        daemon.records.insert(id, record);
        let name = self.hosts[host].name.clone();
        match operation {
            Operation::PutMember(_) | Operation::Acquire { .. } | Operation::ClaimInitialize if lease.is_none() => {
                self.finish_record(host, id, None);
            }
            Operation::PutMember(_) => self.record_asks(host, id, Stage::Read, EtcdAsk::ReadMember { member: name }),
            Operation::Acquire { judged_on, history, initialize } => {
                let lease = lease.unwrap_or(LeaseId(0));
                let ask = AcquireRequest::judged_on(&judged_on, name, lease, history, initialize);
                let unread = ask.initialize.is_none() && self.timing.percent(UNREAD_PERCENT);
                if let Some(record) = self.record(host, id) {
                    record.acquire = Some(Box::new(ask.clone()));
                }
                match unread {
                    true => self.record_asks(host, id, Stage::Write, EtcdAsk::Acquire(Box::new(ask))),
                    false => self.record_asks(host, id, Stage::Read, EtcdAsk::ReadLeader),
                }
            }
            Operation::Release { epoch, record } => {
                let seen = lock_seen.filter(|leader| leader.epoch == epoch).map(|leader| leader.mod_revision);
                // Before the key goes, or the lease's thread would take its absence for a loss.
                self.lease_command(host, Command::Order(LeaseOrder::LetGo));
                self.release_begins(host);
                match seen.filter(|_| self.timing.percent(UNREAD_PERCENT)) {
                    Some(as_read) => self.record_asks(host, id, Stage::Unread, EtcdAsk::Release { epoch, as_read, record }),
                    None => self.record_asks(host, id, Stage::Read, EtcdAsk::ReadLeader),
                }
            }
            Operation::Reaffirm(epoch) => self.record_asks(host, id, Stage::Write, EtcdAsk::Reaffirm { epoch, member: name }),
            Operation::WriteSync { epoch, lock, judged_on, record } => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::WriteSync { epoch, lock, judged_on, record });
            }
            Operation::WriteStatus(status) => self.record_asks(host, id, Stage::Write, EtcdAsk::WriteStatus(Box::new(status))),
            Operation::WriteFailsafe { epoch, judged_on, record } => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::WriteFailsafe { epoch, judged_on, record });
            }
            Operation::RecordPromotion { epoch, history } => {
                let history = self.with_switch_point(host, history);
                self.record_asks(host, id, Stage::Write, EtcdAsk::RecordPromotion { epoch, history });
            }
            Operation::NoteSuspension { revision, suspends } => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::NoteSuspension { member: name, revision, suspends });
            }
            Operation::EndMaintenance { revision, leader } => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::EndMaintenance { revision, leader });
            }
            Operation::ClaimInitialize => {
                let lease = lease.unwrap_or(LeaseId(0));
                self.record_asks(host, id, Stage::Write, EtcdAsk::ClaimInitialize { member: name, lease });
            }
            Operation::GiveUpInitialize => {
                let lease = lease.unwrap_or(LeaseId(0));
                self.record_asks(host, id, Stage::Write, EtcdAsk::GiveUpInitialize { lease });
            }
            Operation::AnswerRequest { id: request, mod_revision, progress } => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::AnswerRequest { id: request, mod_revision, progress });
            }
            Operation::Survey => {
                self.forget_record(host, id);
                self.end(host, Finished::Surveyed(Ok(Survey::default())));
            }
            Operation::ArchiveBeside { .. } => {
                self.forget_record(host, id);
                self.end(host, Finished::BesideArchived(Ok(Archived::default())));
            }
            Operation::AskPeers { peers, .. } => self.ask_peers(host, id, peers),
            Operation::ReachLeader(_) => {
                let run = self.hosts[host].daemon.as_ref().map_or(0, |daemon| daemon.run);
                let takes = self.timing.between(us(500), ms(20));
                self.later(takes, What::Daemon { host, run, due: DaemonDue::Peers { id } });
            }
            Operation::FenceByScan => {
                self.forget_record(host, id);
                self.begin_scan(host);
            }
            job => panic!("{:?} is a job", job.kind()),
        }
    }

    fn record_asks(&mut self, host: usize, id: u64, stage: Stage, ask: EtcdAsk) {
        if let Some(record) = self.record(host, id) {
            record.stage = stage;
        }
        self.call(host, Caller::Record(id), ask, ms(REQUEST_TIMEOUT_MS));
    }

    fn forget_record(&mut self, host: usize, id: u64) -> Option<Record> {
        self.hosts[host].daemon.as_mut()?.records.remove(&id)
    }

    /// An answer to one of its calls, or None: the patience is over.
    pub fn record_answered(&mut self, host: usize, id: u64, answer: Option<EtcdAnswer>) {
        let Some(record) = self.record(host, id) else { return };
        let (stage, lease) = (record.stage, record.lease.unwrap_or(LeaseId(0)));
        if record.moving.is_some() {
            return self.moved(host, id, answer);
        }
        let operation = record.operation.clone();
        match (operation, stage, answer) {
            (Operation::PutMember(put), Stage::Read, Some(EtcdAnswer::MemberAt(expected))) => {
                let member = self.hosts[host].name.clone();
                self.record_asks(host, id, Stage::Write, EtcdAsk::PutMember { member, record: put, lease, expected });
            }
            (Operation::PutMember(_), Stage::Write, Some(EtcdAnswer::Put(Put::Moved))) => {
                let Some(record) = self.record(host, id) else { return };
                record.tries += 1;
                if record.tries >= PUT_MEMBER_TRIES {
                    return self.finish_record(host, id, None);
                }
                let member = self.hosts[host].name.clone();
                self.record_asks(host, id, Stage::Read, EtcdAsk::ReadMember { member });
            }
            (Operation::PutMember(_), Stage::Write, Some(EtcdAnswer::Put(Put::Foreign(lease)))) => {
                let Some(record) = self.record(host, id) else { return };
                record.foreign = Some(lease);
                self.record_asks(host, id, Stage::ReadBack, EtcdAsk::GrantedTtl { lease });
            }
            (Operation::PutMember(_), Stage::ReadBack, Some(answer @ EtcdAnswer::GrantedTtl(_))) => {
                self.finish_record(host, id, Some(answer));
            }
            (Operation::Acquire { .. }, Stage::Read, Some(EtcdAnswer::Leader(leader, _))) => {
                let Some(ask) = self.record(host, id).and_then(|record| record.acquire.clone()) else { return };
                match leader {
                    Some(leader) => self.finish_record(host, id, Some(EtcdAnswer::Acquired(Etcd::read_back(&leader, &ask)))),
                    None => self.record_asks(host, id, Stage::Write, EtcdAsk::Acquire(ask)),
                }
            }
            (Operation::Acquire { .. }, Stage::Write, None) => self.record_asks(host, id, Stage::ReadBack, EtcdAsk::ReadLeader),
            (Operation::Acquire { .. }, Stage::ReadBack, Some(EtcdAnswer::Leader(Some(leader), _))) => {
                let Some(ask) = self.record(host, id).and_then(|record| record.acquire.clone()) else { return };
                self.finish_record(host, id, Some(EtcdAnswer::Acquired(Etcd::read_back(&leader, &ask))));
            }
            (Operation::Release { .. }, Stage::Unread, None | Some(EtcdAnswer::Done(false))) => {
                self.record_asks(host, id, Stage::Read, EtcdAsk::ReadLeader);
            }
            (Operation::Release { epoch, record }, Stage::Read, Some(EtcdAnswer::Leader(_, as_read))) => {
                self.record_asks(host, id, Stage::Write, EtcdAsk::Release { epoch, as_read, record });
            }
            (Operation::Release { .. }, Stage::Write, None | Some(EtcdAnswer::Done(false))) => {
                self.record_asks(host, id, Stage::ReadBack, EtcdAsk::ReadLeader)
            }
            (Operation::Release { epoch, .. }, Stage::ReadBack, Some(EtcdAnswer::Leader(leader, _))) => {
                let still = leader.is_some_and(|leader| leader.epoch == epoch);
                let answer = (!still).then(|| EtcdAnswer::Done(true));
                self.finish_record(host, id, answer);
            }
            (_, Stage::Read | Stage::ReadBack, _) => self.finish_record(host, id, None),
            (_, Stage::Write | Stage::Unread, answer) => self.finish_record(host, id, answer),
        }
    }

    /// Its end, as the machine is told. None = not known what became of it.
    fn finish_record(&mut self, host: usize, id: u64, answer: Option<EtcdAnswer>) {
        let Some(record) = self.forget_record(host, id) else { return };
        let unknown = || "etcd did not answer".to_owned();
        let done = || match answer {
            Some(EtcdAnswer::Done(done)) => Ok(done),
            _ => Err(unknown()),
        };
        let finished = match record.operation {
            Operation::WriteFailsafe { .. } => Finished::FailsafeWritten(match answer {
                Some(EtcdAnswer::At(revision)) => Ok(revision),
                _ => Err(unknown()),
            }),
            Operation::PutMember(_) => Finished::MemberPut(match answer {
                Some(EtcdAnswer::Put(Put::Written)) => PutOutcome::Written,
                Some(EtcdAnswer::GrantedTtl(Some((ttl, term)))) => {
                    PutOutcome::Foreign(ForeignKey { lease: record.foreign.unwrap_or(LeaseId(0)), ttl, term })
                }
                _ => PutOutcome::Failed(unknown()),
            }),
            Operation::Acquire { .. } => Finished::Acquired(match answer {
                Some(EtcdAnswer::Acquired(Acquired::Ours(lock))) => AcquireOutcome::Won(lock),
                Some(EtcdAnswer::Acquired(Acquired::Beaten)) => AcquireOutcome::Beaten,
                Some(EtcdAnswer::Acquired(Acquired::SpecMoved)) => AcquireOutcome::SpecMoved,
                None if record.lease.is_none() => AcquireOutcome::Beaten,
                _ => AcquireOutcome::Failed(unknown()),
            }),
            Operation::Release { .. } => Finished::Released(done()),
            Operation::Reaffirm(_) => Finished::Reaffirmed(match answer {
                Some(EtcdAnswer::At(revision)) => Ok(revision),
                _ => Err(unknown()),
            }),
            Operation::WriteSync { .. } => Finished::SyncWritten(match answer {
                Some(EtcdAnswer::AsOf(written, revision)) => Ok((written, revision)),
                _ => Err(unknown()),
            }),
            Operation::WriteStatus(_) => Finished::StatusWritten(done()),
            Operation::RecordPromotion { .. } => Finished::PromotionRecorded(done()),
            Operation::NoteSuspension { .. } => Finished::SuspensionNoted(done()),
            Operation::EndMaintenance { .. } => Finished::MaintenanceEnded(done()),
            Operation::ClaimInitialize => Finished::InitializeClaimed(done()),
            Operation::GiveUpInitialize => Finished::InitializeGivenUp(done().map(|_| ())),
            Operation::AnswerRequest { .. } => Finished::RequestAnswered(done()),
            other => panic!("{:?} is not asked of etcd", other.kind()),
        };
        self.end(host, finished);
    }

    /// The files decide: parent and switch point of our promotion come from the history file.
    fn with_switch_point(&mut self, host: usize, mut history: Vec<HistoryEntry>) -> Vec<HistoryEntry> {
        let Some(data) = &self.hosts[host].server.data else { return history };
        let segments = data.wal.segments.clone();
        let ours = history.iter_mut().rev().find(|entry| entry.epoch.is_some() && entry.parent.is_none() && entry.timeline > TimelineId(1));
        if let Some(entry) = ours
            && let Some(at) = segments.iter().position(|segment| segment.timeline == entry.timeline).filter(|at| *at > 0)
            && let Some(epoch) = entry.epoch
        {
            let (parent, switch): (TimelineId, Lsn) = (segments[at - 1].timeline, segments[at].start);
            entry.parent = Some(parent);
            entry.switch_lsn = Some(switch);
            self.hosts[host].disk.promotion = Some(OwnPromotion { timeline: entry.timeline, epoch, parent, switch_lsn: Some(switch) });
        }
        history
    }

    /// A changed ttl: the guard is told first, then the keys move.
    pub fn move_keys(
        &mut self,
        host: usize,
        lock: Option<LockIdentity>,
        record: MemberRecord,
        old: LeaseIdentity,
        new: LeaseIdentity,
        sent: BootTime,
    ) {
        self.ids += 1;
        let id = self.ids;
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(spec) = daemon.machine.world().spec().cloned() else { return };
        let moving = Moving { lock, record, old, new };
        let operation = Operation::Look;
        daemon.records.insert(
            id,
            Record {
                operation,
                stage: Stage::Write,
                lease: None,
                tries: 0,
                acquire: None,
                moving: Some(moving.clone()),
                foreign: None,
                peers: None,
            },
        );
        match lock {
            Some(lock) => {
                let times = spec.lease_times();
                let identity = LockIdentity { lease: new, ..lock };
                self.guard_ask(host, GuardAsk::Lock { identity, sent, times }, AskedBy::Move(id), times.renewal_interval());
            }
            None => self.move_heard_guard(host, id, true),
        }
    }

    pub fn move_heard_guard(&mut self, host: usize, id: u64, taken: bool) {
        let Some(moving) = self.record(host, id).and_then(|record| record.moving.clone()) else { return };
        if !taken {
            self.forget_record(host, id);
            return;
        }
        let member = self.hosts[host].name.clone();
        let ask = EtcdAsk::MoveToLease {
            member,
            record: Box::new(moving.record),
            lock: moving.lock.map(|lock| lock.epoch),
            old: moving.old.lease,
            new: moving.new.lease,
        };
        self.record_asks(host, id, Stage::Write, ask);
    }

    fn moved(&mut self, host: usize, id: u64, answer: Option<EtcdAnswer>) {
        let moving = self.forget_record(host, id).and_then(|record| record.moving);
        if let (Some(moving), Some(EtcdAnswer::Done(true))) = (moving, answer) {
            self.fact(host, Event::Lease(LeaseEvent::Moved { from: moving.old, to: moving.new }));
        }
    }

    /// Asks all at once over HTTP. No answer defers nobody.
    fn ask_peers(&mut self, host: usize, id: u64, peers: Vec<(MemberName, String)>) {
        let sent = self.local(host);
        let mut slowest = ms(2);
        let mut writable = Vec::new();
        for (name, _) in peers {
            let Some(other) = self.host_of(&name) else { continue };
            match self.says_writable(host, other) {
                Some(true) => writable.push(name),
                Some(false) => {}
                None => slowest = ms(PEER_TIMEOUT_MS),
            }
        }
        if mutant(Mutant::PeersNotHeard) {
            writable.clear();
        }
        let takes = slowest.min(ms(PEER_TIMEOUT_MS)) + self.random.between(us(100), ms(3));
        let Some(record) = self.record(host, id) else { return };
        record.peers = Some(Peers { sent, writable });
        let run = self.hosts[host].daemon.as_ref().map_or(0, |daemon| daemon.run);
        self.later(takes, What::Daemon { host, run, due: DaemonDue::Peers { id } });
    }

    pub fn peers_answer(&mut self, host: usize, id: u64) {
        let Some(record) = self.forget_record(host, id) else { return };
        if let Operation::ReachLeader(leader) = &record.operation {
            let reached = self.ask_leader(host, leader).map(drop).map_err(str::to_owned);
            return self.end(host, Finished::LeaderReached(reached));
        }
        if let (Operation::AskPeers { vacancy, .. }, Some(Peers { sent, writable })) = (record.operation, record.peers) {
            self.end(host, Finished::PeersAsked(PeersAnswer { vacancy, sent, writable }));
        }
    }

    /// What the other's HTTP thread, which a starved main loop does not stop, answers. None = nothing comes.
    fn says_writable(&self, asker: usize, other: usize) -> Option<bool> {
        let this = &self.hosts[other];
        let daemon = this.daemon.as_ref().filter(|daemon| !daemon.frozen && this.powered && !this.stands)?;
        if self.cut(asker, other) {
            return None;
        }
        let snapshot = snapshot(daemon);
        Some(health::writable(&snapshot, self.local(other)).writable == Some(true))
    }

    /// Whether the member's leader paths answer 200.
    pub fn says_primary(&self, host: usize) -> bool {
        let this = &self.hosts[host];
        let Some(daemon) = this.daemon.as_ref().filter(|daemon| !daemon.frozen && this.powered && !this.stands) else { return false };
        // What the HTTP thread has is from the end of the last turn; the lock in it is judged by the clock.
        health::is_primary(&snapshot(daemon), self.local(host))
    }
}

/// As the daemon's shell takes it.
fn snapshot(daemon: &super::host::Daemon) -> Snapshot {
    let world = daemon.machine.world();
    let mut snapshot = Snapshot::unknown(BootTime(0), world.me.name.clone(), "main".parse().expect("a cluster's name"));
    snapshot.taken = world.probe.as_ref().map_or(BootTime(0), |probe| probe.begun);
    snapshot.unguarded = world.guard_gone;
    snapshot.ends_postgres = daemon.machine.ends_postgres();
    snapshot.role = daemon.machine.role();
    snapshot.lock = world.lock.proved();
    snapshot.postmaster = world.guard.as_ref().map(|guard| guard.postmaster.clone());
    snapshot.probe.clone_from(&world.probe);
    if let Some(spec) = world.spec() {
        snapshot.loop_wait = spec.ha.loop_wait;
    }
    snapshot
}
