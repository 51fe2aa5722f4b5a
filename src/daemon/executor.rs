//! Carries out the machine's actions, in order. Decides nothing; every operation ends in exactly one event, also when it is cancelled.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::clock::BootTime;
use crate::etcd::lease::{self, Acknowledged, LeaseHandle};
use crate::etcd::{Etcd, Moved};
use crate::facts::failsafe::PromiseAsk;
use crate::facts::lease::LeaseEvent;
use crate::guard::protocol::Request;
use crate::http::peer;
use crate::http::promises::Promises;
use crate::machine::Machine;
use crate::machine::action::{Action, Decision, LeaseOrder, Operation, OperationKind};
use crate::machine::event::{AcquireOutcome, Event, Finished, PeersAnswer, PutOutcome};
use crate::policy::deadlines::LeaseTimes;
use crate::policy::renewal::Round;
use crate::spec::cluster::ClusterSpec;
use crate::types::{ClusterName, LeaseId, LeaseIdentity, LockIdentity, MemberName};

use super::archiving;
use super::guard_link::{GuardLink, Sink};
use super::host::Host;
use super::jobs;
use super::records;

/// How long a peer may take to say whether it is writable. A dead host costs this much of a failover without a release.
const PEER_TIMEOUT_MS: u64 = 700;
/// How long PostgreSQL may take to say what is under way on it.
const SURVEY_LIMIT: Duration = Duration::from_secs(5);
/// Decisions that may wait to be written; further ones are in the log only.
const EVENTS_IN_FLIGHT_MAX: u32 = 32;
/// How long a daemon that goes waits for the last of them.
const EVENTS_PATIENCE_MS: u64 = 1_000;

/// The edges, and what runs.
pub struct Executor {
    host: Arc<Host>,
    etcd: Etcd,
    guard: Arc<GuardLink>,
    sink: Sink,
    lease: Option<LeaseHandle>,
    times: Option<LeaseTimes>,
    cancel: Option<oneshot::Sender<()>>,
    events: Arc<Semaphore>,
    promises: Arc<Promises>,
}

impl Executor {
    /// Nothing runs yet.
    pub fn new(host: Arc<Host>, etcd: Etcd, guard: Arc<GuardLink>, sink: Sink, promises: Arc<Promises>) -> Self {
        let events = Arc::new(Semaphore::new(EVENTS_IN_FLIGHT_MAX as usize));
        Executor { host, etcd, guard, sink, lease: None, times: None, cancel: None, events, promises }
    }

    /// A new spec: the lease may have to have other times.
    pub fn spec_changed(&mut self, spec: &ClusterSpec) {
        let times = spec.lease_times();
        if self.times != Some(times) {
            self.times = Some(times);
            if let Some(lease) = &self.lease {
                lease.change_times(times);
            }
        }
    }

    /// Looks at an event before the machine does: a lease is noted for the next run, and a lease of another ttl gets our keys first.
    pub fn before_machine(&mut self, machine: &Machine, event: Event) -> Option<Event> {
        if let Event::Lease(LeaseEvent::Granted { identity, sent, .. }) = &event {
            let world = machine.world();
            // One that is being taken over is ours already: what is granted beside it has another ttl.
            if let Some(old) = world.lease.or(world.adopting).filter(|old| old != identity) {
                // Otherwise the new lease runs out, and another one is got.
                if let Some(record) = world.key_to_move().cloned() {
                    self.move_keys(world.lock.identity(), record, old, *identity, *sent);
                }
                return None;
            }
            self.note_lease(*identity);
        }
        if let Event::Lease(LeaseEvent::Moved { to, .. }) = &event
            && let Some(lease) = &self.lease
        {
            let lock = machine.world().lock.identity().map(|lock| LockIdentity { lease: *to, ..lock });
            lease.adopt(*to, lock);
        }
        Some(event)
    }

    /// The guard hands the lease to the next daemon; the file is for a reboot, after which no guard is left.
    fn note_lease(&self, identity: LeaseIdentity) {
        self.guard.order(Request::Lease { identity: Some(identity) });
        let host = Arc::clone(&self.host);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = host.write_lease_file(identity) {
                tracing::warn!(error = format!("{error:#}"), "the file that names our lease could not be written");
            }
        });
    }

    /// A changed ttl: member key and lock move to the new lease under the same epoch; only then it counts. The guard is told first, and
    /// from then on goes by the earlier of both deadlines: the lock may run out with either lease.
    fn move_keys(
        &self,
        lock: Option<LockIdentity>,
        record: crate::facts::cluster::MemberRecord,
        old: LeaseIdentity,
        new: LeaseIdentity,
        sent: BootTime,
    ) {
        let (etcd, name, sink) = (self.etcd.clone(), self.host.node.name.clone(), Arc::clone(&self.sink));
        let (guard, times) = (Arc::clone(&self.guard), self.times);
        self.note_lease(new);
        tokio::spawn(async move {
            if let (Some(lock), Some(times)) = (lock, times) {
                let told = move || guard.acknowledge_move(LockIdentity { lease: new, ..lock }, sent, times);
                if !tokio::task::spawn_blocking(told).await.is_ok_and(|told| told.is_ok()) {
                    tracing::warn!("the guard did not take the lease with the new ttl: the keys stay where they are for now");
                    return;
                }
            }
            let moved = etcd.move_to_lease(&name, &record, lock.map(|lock| lock.epoch), old.lease, new.lease).await;
            match moved {
                Ok(Moved::Moved) => sink(Event::Lease(LeaseEvent::Moved { from: old, to: new })),
                Ok(Moved::NotOurs) => tracing::warn!("our keys do not hang on our lease: they were not moved to the one with the new ttl"),
                Err(error) => tracing::warn!(error = %error, "our keys could not be moved to the lease with the new ttl"),
            }
        });
    }

    /// Carries out one action.
    pub fn perform(&mut self, machine: &Machine, action: Action) {
        match action {
            Action::Do(operation) => self.begin(machine, operation),
            Action::CancelJob => drop(self.cancel.take()),
            Action::Lease(order) => self.order_lease(order),
            Action::Stop(mode) => self.guard.stop(mode),
            Action::AskGuard => self.guard.order(Request::Facts),
            Action::Maintain(word) => self.guard.order(Request::Maintain(word)),
            Action::ForgetLock(epoch) => self.guard.order(Request::NoLock { epoch }),
            Action::Record(decision) => self.record(decision),
            Action::AnswerPromise { id, result } => self.promises.answer(id, result),
            // The loop leaves; see `good_bye` and `leave`.
            Action::Exit(_) | Action::Leave => {}
        }
    }

    fn order_lease(&mut self, order: LeaseOrder) {
        let Some(times) = self.times else { return };
        if self.lease.is_none() {
            match self.spawn_lease(times) {
                Ok(handle) => self.lease = Some(handle),
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "the lease's thread could not be started");
                    (self.sink)(Event::Lease(LeaseEvent::Lost { why: crate::facts::lease::LeaseLoss::LeaseNotFound }));
                    return;
                }
            }
        }
        let Some(lease) = &self.lease else { return };
        match order {
            LeaseOrder::Adopt(identity, lock) => lease.adopt(identity, lock),
            LeaseOrder::Grant => lease.grant(),
            LeaseOrder::Hold(lock) => lease.hold(lock),
            LeaseOrder::LetGo => lease.let_go(),
            LeaseOrder::Failsafe(armed) => lease.arm(armed),
        }
    }

    fn spawn_lease(&self, times: LeaseTimes) -> anyhow::Result<LeaseHandle> {
        let (guard, sink) = (Arc::clone(&self.guard), Arc::clone(&self.sink));
        let acknowledge = move |lock: LockIdentity, sent: BootTime, times: LeaseTimes| match guard.acknowledge(lock, sent, times) {
            Ok(()) => Acknowledged::Yes,
            Err(error) => Acknowledged::No(error.to_string()),
        };
        let (cluster, caller) = (self.host.node.cluster.clone(), self.host.node.name.clone());
        let call_peers = move |round| -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
            Box::pin(call_peers(cluster.clone(), caller.clone(), round))
        };
        let say = move |event| sink(Event::Lease(event));
        lease::spawn(self.host.etcd_settings()?, times, Box::new(acknowledge), Box::new(call_peers), Box::new(say))
    }

    fn record(&self, decision: Decision) {
        tracing::info!(kind = decision.kind, facts = ?decision.facts, "{}", decision.message);
        let Ok(permit) = Arc::clone(&self.events).try_acquire_owned() else { return };
        let (etcd, record) = (self.etcd.clone(), records::decision_record(&self.host.node.name, decision));
        tokio::spawn(async move {
            if let Err(error) = etcd.append_event(&record).await {
                tracing::debug!(error = %error, "a decision could not be recorded in etcd");
            }
            drop(permit);
        });
    }

    fn begin(&mut self, machine: &Machine, operation: Operation) {
        if operation.kind().is_job() {
            self.begin_job(operation);
        } else {
            self.begin_record(machine, operation);
        }
    }

    /// A job can be cancelled: its future is dropped, which ends its child processes, and its end is reported as a failure.
    fn begin_job(&mut self, operation: Operation) {
        let (cancel, cancelled) = oneshot::channel();
        self.cancel = Some(cancel);
        let kind = operation.kind();
        let job = jobs::run(Arc::clone(&self.host), Arc::clone(&self.guard), Arc::clone(&self.sink), operation);
        let (host, sink) = (Arc::clone(&self.host), Arc::clone(&self.sink));
        self.spawn(async move {
            if kind == OperationKind::Look {
                sink(Event::Finished(Finished::KeptSeen(Box::new(host.kept()))));
            }
            tokio::select! {
                event = job => event,
                _ = cancelled => Event::Finished(Finished::failed_job(kind, "cancelled: something more urgent came up".to_owned())),
            }
        });
    }

    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let sink = Arc::clone(&self.sink);
        tokio::spawn(async move { sink(work.await) });
    }

    fn begin_record(&self, machine: &Machine, operation: Operation) {
        let etcd = self.etcd.clone();
        let name = self.host.node.name.clone();
        let lease = machine.world().lease.map(|identity| identity.lease);
        match operation {
            Operation::PutMember(record) => {
                let Some(lease) = lease else { return self.end(Finished::MemberPut(PutOutcome::Failed("there is no lease".to_owned()))) };
                self.spawn(async move { records::put_member(etcd, name, *record, lease).await });
            }
            Operation::Acquire { judged_on, history, initialize } => {
                let Some(lease) = lease else { return self.end(Finished::Acquired(AcquireOutcome::Beaten)) };
                self.spawn(async move { records::acquire(etcd, name, lease, &judged_on, history, initialize).await });
            }
            Operation::Release { epoch, record } => {
                // Before the key goes, or the lease's thread would take its absence for a loss.
                if let Some(lease) = &self.lease {
                    lease.let_go();
                }
                let view = machine.world().view.as_ref();
                let seen =
                    view.and_then(|view| view.leader.as_ref()).filter(|leader| leader.epoch == epoch).map(|leader| leader.mod_revision);
                self.spawn(records::release(etcd, epoch, seen, record));
            }
            Operation::WriteStatus(status) => self.spawn(records::write_status(etcd, status)),
            Operation::Reaffirm(epoch) => self.spawn(records::reaffirm(etcd, name, epoch)),
            Operation::WriteSync { epoch, lock, judged_on, record } => {
                self.spawn(records::write_sync(etcd, epoch, lock, judged_on, record));
            }
            Operation::RecordPromotion { epoch, history } => {
                let host = Arc::clone(&self.host);
                self.spawn(async move {
                    let history = jobs::with_switch_point(&host, history);
                    records::record_promotion(etcd, epoch, history).await
                });
            }
            Operation::WriteFailsafe { epoch, judged_on, record } => {
                self.spawn(records::write_failsafe(etcd, epoch, judged_on, record));
            }
            Operation::NoteSuspension { revision, suspends } => self.spawn(records::note_suspension(etcd, name, revision, suspends)),
            Operation::EndMaintenance { revision, leader } => self.spawn(records::end_maintenance(etcd, revision, leader)),
            Operation::ClaimInitialize => {
                let Some(lease) = lease else { return self.end(Finished::InitializeClaimed(Err("there is no lease".to_owned()))) };
                self.spawn(records::claim_initialize(etcd, name, lease));
            }
            Operation::GiveUpInitialize => self.spawn(records::give_up_initialize(etcd, lease.unwrap_or(LeaseId(0)))),
            Operation::AnswerRequest { id, mod_revision, progress } => {
                self.spawn(records::answer_request(etcd, id, mod_revision, progress));
            }
            Operation::Survey => {
                let host = Arc::clone(&self.host);
                self.spawn(async move {
                    let surveyed = match host.settled() {
                        Ok(settled) => settled.sql.survey(SURVEY_LIMIT).await.map_err(|error| error.to_string()),
                        Err(error) => Err(format!("{error:#}")),
                    };
                    Event::Finished(Finished::Surveyed(surveyed))
                });
            }
            Operation::ArchiveBeside { spec } => {
                let host = Arc::clone(&self.host);
                self.spawn(async move {
                    let archived = archiving::beside(&host, &spec).await.map_err(|error| format!("{error:#}"));
                    Event::Finished(Finished::BesideArchived(archived))
                });
            }
            Operation::AskPeers { vacancy, peers } => self.spawn(ask_peers(vacancy, peers)),
            Operation::ReachLeader(leader) => self.spawn(jobs::reach_leader(Arc::clone(&self.host), leader)),
            Operation::FenceByScan => {
                let guard = Arc::clone(&self.guard);
                self.spawn(async move {
                    let result = tokio::task::spawn_blocking(move || guard.fence_by_scan()).await;
                    let result = result.map_err(|error| error.to_string()).and_then(|result| result.map_err(|error| format!("{error:#}")));
                    Event::Finished(Finished::FencedByScan(result))
                });
            }
            job => tracing::error!(kind = ?job.kind(), "a job came the way of the records"),
        }
    }

    fn end(&self, finished: Finished) {
        (self.sink)(Event::Finished(finished));
    }

    /// Passwords may have changed on disk: the passfile is written anew.
    pub fn reread_secrets(&self) {
        let host = Arc::clone(&self.host);
        tokio::task::spawn_blocking(move || match host.write_passfile() {
            Ok(()) => tracing::info!("secrets were read again; other changes of the node document need a restart (SIGUSR2, then start)"),
            Err(error) => tracing::error!(error = format!("{error:#}"), "secrets could not be read again; the old passfile stays"),
        });
    }

    /// SIGUSR2: the daemon leaves, guard and PostgreSQL stay, and the lock with them until A.
    pub async fn leave(&mut self) {
        if let Some(lease) = self.lease.take() {
            let _ = tokio::task::spawn_blocking(move || lease.stop()).await;
        }
        let guard = Arc::clone(&self.guard);
        let _ = tokio::task::spawn_blocking(move || guard.leave()).await;
        self.events_are_written().await;
    }

    /// The end: PostgreSQL has ended. The lease goes, with the member key; the guard ends.
    pub async fn good_bye(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.revoke();
            let _ = tokio::task::spawn_blocking(move || lease.stop()).await;
        }
        let guard = Arc::clone(&self.guard);
        let _ = tokio::task::spawn_blocking(move || guard.end()).await;
        self.events_are_written().await;
    }

    /// What was decided on the way out is to be found later, too.
    async fn events_are_written(&self) {
        let all = self.events.acquire_many(EVENTS_IN_FLIGHT_MAX);
        if tokio::time::timeout(Duration::from_millis(EVENTS_PATIENCE_MS), all).await.is_err() {
            tracing::warn!("what was decided last could not be recorded in etcd in time: it is in this log only");
        }
    }
}

/// Calls every other member of the failsafe key at once. One that does not promise, for whatever reason, is enough.
async fn call_peers(cluster: ClusterName, caller: MemberName, round: Round) -> Result<(), String> {
    let Round { armed, ttl, budget } = round;
    let calls = armed.peers.into_iter().map(|(to, url)| {
        let ask = PromiseAsk {
            cluster: cluster.clone(),
            to: to.clone(),
            member: caller.clone(),
            epoch: armed.lock.epoch,
            lease: armed.lock.lease.lease,
            ttl_s: ttl.as_secs(),
        };
        async move { peer::ask_promise(&url, &ask, budget).await.map_err(|error| format!("`{to}` does not promise: {error:#}")) }
    });
    futures_util::future::try_join_all(calls).await.map(drop)
}

/// Asks all at once. No answer, or one that makes no sense, defers nobody: a dead host cannot be waited for.
async fn ask_peers(vacancy: crate::types::Revision, peers: Vec<(MemberName, String)>) -> Event {
    let sent = BootTime::now();
    let questions = peers.into_iter().map(|(name, url)| async move {
        let answer = peer::ask_writable(&url, Duration::from_millis(PEER_TIMEOUT_MS)).await;
        answer.is_ok_and(|answer| answer.writable == Some(true)).then_some(name)
    });
    let writable = futures_util::future::join_all(questions).await.into_iter().flatten().collect();
    Event::Finished(Finished::PeersAsked(PeersAnswer { vacancy, sent, writable }))
}
