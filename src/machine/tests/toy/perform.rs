//! The toy executor: orders take a while, are carried out once, and end in one event each.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::archiving::Archived;
use crate::facts::guard::Word;
use crate::facts::lease::LeaseEvent;
use crate::facts::postgres::{DataDirectory, DatabaseState, Survey};
use crate::machine::action::{Action, LeaseOrder, Old, Operation, StartAs, Upstream};
use crate::machine::event::{AcquireOutcome, Configured, Event, Finished, ForeignKey, PeersAnswer, PutOutcome};
use crate::machine::tests::fixtures::{SYSTEM, failed, lease as some_lease, ms, name, times};
use crate::policy::rejoin::{LostRange, Rejoin};
use crate::types::{Epoch, Lsn, MemberName, TimelineId};

use super::Toy;
use super::server::{Data, Process, Segment};

/// How long the daemon waits for the guard's answer to an order.
const ORDER_TIMEOUT_MS: u64 = 2_000;

/// An operation under way.
pub(super) struct Pending {
    due: BootTime,
    operation: Operation,
    /// It is over, by cancellation or for want of etcd: this is what to say.
    failed: Option<String>,
}

impl Toy {
    pub(super) fn perform(&mut self, member: &MemberName, action: Action) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(member) else { return };
        let Some(daemon) = host.daemon.as_mut() else { return };
        match action {
            Action::Do(operation) => {
                if matches!(operation, Operation::Release { .. })
                    && let Some((identity, _)) = daemon.lease.held
                {
                    daemon.lease.held = Some((identity, None));
                }
                let hangs = host.hanging.contains(&operation.kind());
                let takes = if hangs { Duration::from_secs(3_600) } else { duration(&operation) };
                daemon.pending.push(Pending { due: now + takes, operation, failed: None });
            }
            Action::CancelJob => {
                for pending in daemon.pending.iter_mut().filter(|pending| pending.operation.kind().is_job()) {
                    if pending.due > now + ms(10) {
                        pending.due = now + ms(10);
                        pending.failed = Some("cancelled".to_owned());
                    }
                }
            }
            Action::Lease(LeaseOrder::Grant) => {
                daemon.lease = super::ToyLease { wanted: true, ..super::ToyLease::default() };
            }
            Action::Lease(LeaseOrder::Adopt(identity, lock)) => {
                daemon.lease = super::ToyLease { held: Some((identity, lock)), next_at: now, ..super::ToyLease::default() };
            }
            Action::Lease(LeaseOrder::Hold(lock)) => match daemon.lease.held {
                Some((identity, _)) if identity == lock.lease => {
                    daemon.lease.held = Some((identity, Some(lock)));
                    daemon.lease.next_at = now;
                }
                _ => {}
            },
            Action::Lease(LeaseOrder::Failsafe(armed)) => {
                if armed.is_none() {
                    daemon.inbox.push((now + ms(10), Event::Lease(LeaseEvent::Disarmed { at: now })));
                }
                daemon.lease.armed = armed;
            }
            Action::AnswerPromise { id, result } => {
                self.answers.insert(id, result);
            }
            Action::Lease(LeaseOrder::LetGo) => {
                if let Some((identity, _)) = daemon.lease.held {
                    daemon.lease.held = Some((identity, None));
                }
            }
            // An order that is not answered is noticed; it is not carried out later.
            Action::Stop(_) | Action::ForgetLock(_) if host.server.guard.as_ref().is_none_or(|guard| guard.frozen) => {
                daemon.inbox.push((now + ms(ORDER_TIMEOUT_MS), Event::GuardGone));
            }
            Action::Stop(mode) => host.server.order_stop(now, mode),
            Action::ForgetLock(epoch) => host.server.forget_lock(epoch),
            Action::AskGuard => host.server.sequence += 1,
            Action::Maintain(word) => host.server.maintain(word),
            // As SIGUSR2: guard and PostgreSQL stay, and the lease runs out.
            Action::Leave => {
                host.exit = Some(0);
                host.daemon = None;
            }
            Action::Record(_) => {}
            Action::Exit(code) => {
                let held = daemon.lease.held;
                host.exit = Some(code);
                host.daemon = None;
                host.server.guard = None;
                let left = host.server.process != Process::None;
                assert!(!left, "{member} left its server behind\n{}", self.story());
                if let Some((identity, _)) = held.filter(|_| self.reaches_etcd(member)) {
                    self.etcd.revoke(identity.lease);
                }
            }
        }
    }

    /// Operations that are due.
    pub(super) fn carry_out(&mut self, member: &MemberName) {
        loop {
            let now = self.now;
            let Some(daemon) = self.hosts.get_mut(member).and_then(|host| host.daemon.as_mut()) else { return };
            let Some(index) = daemon.pending.iter().position(|pending| pending.due <= now) else { return };
            let mut pending = daemon.pending.remove(index);
            if pending.failed.is_none()
                && !pending.operation.kind().is_job()
                && needs_etcd(&pending.operation)
                && !self.reaches_etcd(member)
            {
                pending.failed = Some("etcd cannot be asked".to_owned());
            }
            if self.hosts[member].failing.contains(&pending.operation.kind()) {
                pending.failed.get_or_insert_with(|| "the test makes it fail".to_owned());
            }
            let lost = self.hosts[member].lost_answers.contains(&pending.operation.kind());
            let finished = match pending.failed.take() {
                Some(why) => failed(&pending.operation, why),
                None if lost => {
                    let operation = pending.operation.clone();
                    self.end_of(member, pending.operation);
                    failed(&operation, "the answer was lost".to_owned())
                }
                None => self.end_of(member, pending.operation),
            };
            self.deliver(member, Event::Finished(finished));
        }
    }

    fn end_of(&mut self, member: &MemberName, operation: Operation) -> Finished {
        let now = self.now;
        let lease = self.hosts[member].daemon.as_ref().and_then(|daemon| daemon.lease.held).map(|(identity, _)| identity);
        match operation {
            Operation::Start { role, names, .. } => {
                self.host(member.as_str()).server.names = names.to_string();
                let (word, upstream) = match role {
                    StartAs::Primary => (Word::Writable, None),
                    StartAs::Standby(upstream) => (Word::Standby, upstream.map(|upstream| upstream.member)),
                };
                Finished::Started(self.host(member.as_str()).server.start(now, word, upstream))
            }
            Operation::Configure { generation, upstream, .. } => {
                let server = &mut self.host(member.as_str()).server;
                if server.in_recovery() {
                    server.upstream = upstream.as_ref().map(|upstream| upstream.member.clone());
                }
                Finished::Configured { generation, upstream, result: Ok(Configured::Taken) }
            }
            Operation::Look => Finished::Looked(self.hosts[member].server.look()),
            Operation::Initdb { .. } => {
                self.tokens += 1;
                let wal = vec![Segment { timeline: TimelineId(1), start: Lsn(0), token: self.tokens }];
                let state = DatabaseState::ShutDown;
                let end = Lsn(0x0100_0000);
                let made = Data {
                    system_id: SYSTEM,
                    wal,
                    end,
                    checkpoint: end,
                    state,
                    standby_signal: false,
                    backup_label: false,
                    promoted: None,
                };
                let data = &mut self.host(member.as_str()).server.data;
                assert!(data.replace(made).is_none(), "initdb over data");
                Finished::Initialized(Ok(()))
            }
            Operation::Clone { from, old, .. } => Finished::Cloned(self.clone_from(member, &from, old == Old::Empty)),
            Operation::EmptyDirectory { leader } => Finished::Emptied(self.empty(member, &leader)),
            Operation::Rewind { .. } => Finished::Rewound(Err("the toy judges to copy".to_owned())),
            Operation::PlanRejoin { leader, .. } => Finished::RejoinPlanned(self.plan(member, &leader)),
            Operation::ArchiveLeft { .. } => Finished::LeftArchived(Ok(Archived::default())),
            Operation::ArchiveBeside { .. } => Finished::BesideArchived(Ok(Archived::default())),
            Operation::Promote { lock, timeline, .. } => Finished::PromotionAsked(self.promote(member, lock.epoch, timeline)),
            Operation::EnsureRoles { post_init, .. } => {
                if post_init {
                    self.post_init.insert(member.clone());
                }
                Finished::RolesEnsured(Ok(()))
            }
            Operation::Checkpoint => Finished::Checkpointed(Ok(())),
            Operation::Survey => Finished::Surveyed(Ok(Survey::default())),
            Operation::AskPeers { vacancy, peers } => {
                let writes = |name: &MemberName| {
                    let host = &self.hosts[name];
                    let vouched = matches!(host.server.process, Process::Running { word: Word::Writable, .. });
                    host.daemon.is_some() && host.connected && (vouched || host.server.acknowledges(now))
                };
                let writable =
                    peers.into_iter().map(|(name, _)| name).filter(|name| self.hosts.contains_key(name) && writes(name)).collect();
                Finished::PeersAsked(PeersAnswer { vacancy, sent: now, writable })
            }
            Operation::ReachLeader(_) => Finished::LeaderReached(Ok(())),
            Operation::FenceByScan => {
                let server = &mut self.host(member.as_str()).server;
                server.crash(now);
                server.new_guard();
                Finished::FencedByScan(Ok(()))
            }
            Operation::PutMember(record) => {
                let outcome = lease.and_then(|lease| self.etcd.put_member(member, *record, lease.lease));
                Finished::MemberPut(match outcome {
                    Some(Ok(())) => PutOutcome::Written,
                    Some(Err(lease)) => PutOutcome::Foreign(ForeignKey { lease, ttl: times().ttl, term: 2 }),
                    None => PutOutcome::Failed("the lease is gone".to_owned()),
                })
            }
            Operation::Acquire { judged_on, history, initialize } => Finished::Acquired(match lease {
                Some(lease) => self.etcd.acquire(member, lease, &judged_on, history, initialize),
                None => AcquireOutcome::Beaten,
            }),
            Operation::Release { epoch, record } => Finished::Released(Ok(self.etcd.release(epoch, record))),
            Operation::Reaffirm(epoch) => {
                let reaffirmed = self.etcd.reaffirm(epoch);
                Finished::Reaffirmed(Ok(reaffirmed.then_some(self.etcd.keys.revision)))
            }
            Operation::Open { .. } => Finished::Opened(Ok(())),
            Operation::KeepSlots(_) => Finished::SlotsKept(Ok(())),
            Operation::SetNames { names, .. } => {
                self.host(member.as_str()).server.names = names.to_string();
                Finished::NamesSet(Ok(()))
            }
            Operation::WriteSync { epoch, judged_on, record, .. } => {
                Finished::SyncWritten(Ok((self.etcd.write_sync(epoch, judged_on, record), self.etcd.keys.revision)))
            }
            Operation::WriteStatus(status) => Finished::StatusWritten(Ok(self.etcd.write_status(status))),
            Operation::RecordPromotion { epoch, mut history } => {
                let wal = self.hosts[member].server.data.as_ref().map(|data| data.wal.clone()).unwrap_or_default();
                if let Some(entry) = history.iter_mut().rev().find(|entry| entry.epoch == Some(epoch))
                    && let [.., parent, own] = wal.as_slice()
                {
                    assert_eq!(own.timeline, entry.timeline);
                    entry.parent = Some(parent.timeline);
                    entry.switch_lsn = Some(own.start);
                }
                Finished::PromotionRecorded(Ok(self.etcd.record_promotion(epoch, history)))
            }
            Operation::WriteFailsafe { epoch, judged_on, record } => {
                Finished::FailsafeWritten(Ok(self.etcd.write_failsafe(epoch, judged_on, record)))
            }
            Operation::NoteSuspension { revision, suspends } => {
                Finished::SuspensionNoted(Ok(self.etcd.note_suspension(member, revision, suspends)))
            }
            Operation::EndMaintenance { revision, leader } => Finished::MaintenanceEnded(Ok(self.etcd.end_maintenance(revision, leader))),
            Operation::ClaimInitialize => {
                let claimed = lease.is_some_and(|lease| self.etcd.claim_initialize(member, lease.lease));
                Finished::InitializeClaimed(Ok(claimed))
            }
            Operation::GiveUpInitialize => {
                self.etcd.give_up_initialize(lease.unwrap_or(some_lease(0)).lease);
                Finished::InitializeGivenUp(Ok(()))
            }
            Operation::AnswerRequest { id, mod_revision, progress } => {
                Finished::RequestAnswered(Ok(self.etcd.answer(&id, mod_revision, progress)))
            }
        }
    }

    fn promote(&mut self, member: &MemberName, epoch: Epoch, timeline: TimelineId) -> Result<(), String> {
        self.tokens += 1;
        let (now, token) = (self.now, self.tokens);
        self.host(member.as_str()).server.promote(now, epoch, timeline, token)?;
        let earlier = self.promoted.insert(timeline, member.clone());
        assert_eq!(earlier, None, "I9: timeline {timeline} is promoted to a second time\n{}", self.story());
        Ok(())
    }

    /// `pg_ctl promote` by somebody's hand: PostgreSQL takes the next id that it knows nothing of.
    pub(crate) fn promote_by_hand(&mut self, member: &str) {
        self.tokens += 1;
        let token = self.tokens;
        let server = &mut self.host(member).server;
        let next = server.data.as_ref().unwrap().timeline().next();
        server.promoted_by_hand = true;
        server.leave_recovery(next, token);
    }

    fn leaders_data(&self, leader: &Upstream) -> Result<Data, String> {
        let host = &self.hosts[&name(leader.member.as_str())];
        let answers = host.server.accepting(self.now) && !host.server.in_recovery();
        host.server.data.clone().filter(|_| answers).ok_or_else(|| "the leader does not answer".to_owned())
    }

    fn clone_from(&mut self, member: &MemberName, from: &Upstream, found_empty: bool) -> Result<(), String> {
        let source = self.leaders_data(from)?;
        let server = &mut self.host(member.as_str()).server;
        if found_empty && server.data.is_some() {
            return Err("somebody has put data there".to_owned());
        }
        assert_eq!(server.process, Process::None, "a copy is swapped in under a live server");
        server.data = Some(Data { checkpoint: source.end, standby_signal: true, backup_label: true, promoted: None, ..source });
        Ok(())
    }

    fn empty(&mut self, member: &MemberName, leader: &Upstream) -> Result<(), String> {
        self.leaders_data(leader)?;
        let server = &mut self.host(member.as_str()).server;
        assert_eq!(server.process, Process::None, "a directory is emptied under a live server");
        server.data = None;
        Ok(())
    }

    fn plan(&self, member: &MemberName, leader: &Upstream) -> Result<Rejoin, String> {
        let source = self.leaders_data(leader)?;
        let DataDirectory::Full(_) = self.hosts[member].server.look() else { return Err("no data directory".to_owned()) };
        let own = self.hosts[member].server.data.as_ref().ok_or("no data directory")?;
        Ok(if own.is_in_the_past_of(&source) {
            Rejoin::Follow
        } else {
            let lost = LostRange { timeline: own.timeline(), from: Lsn(0), to: Some(own.end) };
            Rejoin::Clone { why: "it has WAL that the leader lacks".to_owned(), lost: Some(lost) }
        })
    }
}

fn needs_etcd(operation: &Operation) -> bool {
    !matches!(
        operation,
        Operation::Survey
            | Operation::ArchiveBeside { .. }
            | Operation::AskPeers { .. }
            | Operation::ReachLeader(_)
            | Operation::FenceByScan
    )
}

fn duration(operation: &Operation) -> Duration {
    ms(match operation {
        Operation::Clone { .. } | Operation::Initdb { .. } => 300,
        Operation::PlanRejoin { .. } | Operation::FenceByScan => 40,
        Operation::AskPeers { .. } => 30,
        Operation::Start { .. } | Operation::Configure { .. } | Operation::Promote { .. } => 15,
        _ => 5,
    })
}
