//! Jobs on PostgreSQL: each in steps with time between them, so that a fault can fall into every gap; a cancelled one leaves what its
//! steps have done.

use pgherd::facts::guard::{GuardFacts, PostmasterFacts, Word};
use pgherd::facts::postgres::DataDirectory;
use pgherd::facts::synchrony::Names;
use pgherd::machine::action::{AfterNames, Operation, OperationKind, StartAs, Upstream};
use pgherd::machine::event::{Configured, Finished};
use pgherd::policy::rejoin::{self, OwnPromotion, Rejoin};
use pgherd::policy::slots::Change;
use pgherd::spec::cluster::ClusterSpec;
use pgherd::types::{SystemId, TimelineId};

use super::clock::ms;
use super::guard::{AskError, AskedBy, GuardAsk, ORDER_TIMEOUT_MS};
use super::host::Job;
use super::mutants::{Mutant, mutant};
use super::rewind;
use super::wal::Data;
use super::world::{DaemonDue, Sim, What};

/// How often a new session is asked what it has.
const LOOKS_MAX: u32 = 50;

/// Whether the files of a standby name its slot.
fn asks_for_slot(spec: &ClusterSpec, upstream: Option<&Upstream>) -> bool {
    upstream.is_some_and(|upstream| spec.replication.use_slots && upstream.keeps_slots)
}

impl Sim {
    pub fn begin_job(&mut self, host: usize, operation: Operation) {
        self.ids += 1;
        let id = self.ids;
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.job = Some(Job { id, operation, step: 0 });
        self.job_later(host, id, 1);
    }

    /// The next step comes after a while that depends on what is done in between.
    pub fn job_later(&mut self, host: usize, id: u64, step: u32) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(job) = daemon.job.as_mut().filter(|job| job.id == id) else { return };
        job.step = step;
        let (least, most) = match (&job.operation, step) {
            (Operation::Initdb { .. }, 1) => (200, 900),
            (Operation::Clone { .. }, 1) => (100, 600),
            (Operation::Clone { .. }, 2) => (200, 3_000),
            (Operation::EmptyDirectory { .. }, _) => (10, 1_500),
            (Operation::PlanRejoin { .. }, _) => (10, 80),
            (Operation::ArchiveLeft { .. }, _) => (10, 900),
            (Operation::Rewind { .. }, rewind::COPIES) => (100, 2_500),
            (Operation::Checkpoint, _) => (10, 400),
            (Operation::Start { .. }, 1) => (3, 40),
            _ => (1, 12),
        };
        let run = daemon.run;
        let takes = self.random.between(ms(least), ms(most)) * (1 + self.hosts[host].server.ail.slowness.min(4));
        self.later(takes, What::Daemon { host, run, due: DaemonDue::Job { id, step } });
    }

    pub fn cancel_job(&mut self, host: usize) {
        let Some(job) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.job.take()) else { return };
        self.archiving_broke_off(host, &job.operation);
        self.end(host, Finished::failed_job(job.operation.kind(), "cancelled: something more urgent came up".to_owned()));
    }

    pub fn job_ends(&mut self, host: usize, finished: Finished) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.job = None;
        }
        self.end(host, finished);
    }

    pub fn job_fails(&mut self, host: usize, why: &str) {
        let Some(job) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.job.take()) else { return };
        self.archiving_broke_off(host, &job.operation);
        self.end(host, Finished::failed_job(job.operation.kind(), why.to_owned()));
    }

    pub fn job_goes_on(&mut self, host: usize, id: u64, step: u32) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(job) = daemon.job.as_ref().filter(|job| job.id == id && job.step == step) else { return };
        let operation = job.operation.clone();
        match operation {
            Operation::Look => {
                let (data, promotion) = (&self.hosts[host].server.data, self.hosts[host].disk.promotion.as_ref());
                let marker = self.hosts[host].disk.rewind.as_ref();
                let seen = match (data, marker) {
                    _ if self.hosts[host].disk.half_empty => DataDirectory::Unusable("it holds files but is no data directory".to_owned()),
                    (None, _) => DataDirectory::Empty,
                    (Some(_), Some(attempt)) => DataDirectory::HalfRewound(Box::new(attempt.clone())),
                    (Some(data), None) => DataDirectory::Full(data.control(promotion)),
                };
                self.job_ends(host, Finished::Looked(seen));
            }
            Operation::Start { role, names, closed, spec, .. } => {
                let by_slot = matches!(&role, StartAs::Standby(upstream) if asks_for_slot(&spec, upstream.as_ref()));
                let this = &mut self.hosts[host].server;
                (this.names_on_disk, this.closed_on_disk, this.slot_on_disk) = (names, closed, by_slot);
                self.start_step(host, &role);
            }
            Operation::Open { .. } => {
                if !self.hosts[host].server.accepting() || step > LOOKS_MAX {
                    return self.job_fails(host, "the server does not take connections, or not the file");
                }
                if step == 1 {
                    self.hosts[host].server.closed_on_disk = false;
                    self.reload(host);
                }
                if self.is_closed(host) {
                    return self.job_later(host, id, step + 1);
                }
                self.job_ends(host, Finished::Opened(Ok(())));
            }
            Operation::KeepSlots(changes) => {
                let names = self.hosts[host].server.data.iter().flat_map(|data| data.slots.keys());
                let active: Vec<String> = names.filter(|name| self.is_active(host, name)).cloned().collect();
                let this = &mut self.hosts[host].server;
                let Some(data) = this.data.as_mut().filter(|_| this.postmaster.is_some()) else {
                    return self.job_fails(host, "the server does not take connections");
                };
                // One that is in use cannot be dropped.
                let in_use = |change: &Change| matches!(change, Change::Drop { name } if active.contains(name));
                if changes.iter().any(in_use) {
                    return self.job_fails(host, "the slot is active");
                }
                for change in changes {
                    match change {
                        Change::CreatePhysical { name } | Change::CreateLogical { name, .. } => drop(data.slots.insert(name, data.wal.end)),
                        Change::Advance { name, to } => drop(data.slots.insert(name, to)),
                        Change::Drop { name } => drop(data.slots.remove(&name)),
                    }
                }
                self.job_ends(host, Finished::SlotsKept(Ok(())));
            }
            Operation::SetNames { names, then, .. } => self.names_step(host, id, step, names, then),
            Operation::Configure { spec, generation, upstream, .. } => {
                if !self.hosts[host].server.accepting() {
                    return self.job_fails(host, "the server does not take connections");
                }
                let from = upstream.as_ref().and_then(|upstream| self.host_of(&upstream.member));
                self.hosts[host].server.slot_on_disk = asks_for_slot(&spec, upstream.as_ref());
                self.follow(host, from);
                self.hosts[host].server.closed_on_disk = false;
                if self.is_synchronous {
                    self.reload(host);
                }
                self.job_ends(host, Finished::Configured { generation, upstream, result: Ok(Configured::Taken) });
            }
            Operation::Initdb { .. } => self.initdb(host),
            Operation::Clone { from, old, .. } => self.clone_step(host, id, step, &from, old),
            Operation::EmptyDirectory { leader } => self.empty_step(host, id, step, &leader),
            Operation::Rewind { from, why, lost, history, .. } => self.rewind_step(host, id, step, &from, (why, lost), &history),
            Operation::PlanRejoin { leader, history, rewinds_failed, .. } => match self.plan(host, &leader, &history, rewinds_failed) {
                Ok(plan) => {
                    if let Some(other) = self.host_of(&leader.member).filter(|_| plan == Rejoin::Follow) {
                        self.bring_histories(host, other);
                    }
                    self.job_ends(host, Finished::RejoinPlanned(Ok(plan)));
                }
                Err(why) => self.job_fails(host, why),
            },
            Operation::ArchiveLeft { leader, .. } => self.archive_left(host, &leader),
            Operation::Promote { lock, timeline, parent } => self.promote_step(host, id, step, lock, timeline, parent),
            Operation::EnsureRoles { .. } => {
                let writes = self.hosts[host].server.accepting() && !self.hosts[host].server.recovering();
                if !writes || self.hosts[host].server.ail.disk_full {
                    return self.job_fails(host, "the roles could not be seen to");
                }
                self.job_ends(host, Finished::RolesEnsured(Ok(())));
            }
            Operation::Checkpoint => {
                let this = &mut self.hosts[host].server;
                if !this.accepting() || this.ail.disk_full {
                    return self.job_fails(host, "no checkpoint");
                }
                if let Some(data) = &mut this.data {
                    data.make_checkpoint();
                }
                self.job_ends(host, Finished::Checkpointed(Ok(())));
            }
            other => panic!("{:?} is no job", other.kind()),
        }
    }

    /// The file, the signal, and a look in a new session.
    fn names_step(&mut self, host: usize, id: u64, step: u32, names: Names, then: AfterNames) {
        if step == 1 {
            self.hosts[host].server.names_on_disk = names;
            self.reload(host);
            return self.job_later(host, id, 2);
        }
        if !self.hosts[host].server.accepting() || step > LOOKS_MAX {
            return self.job_fails(host, "the server does not take connections, or not the names");
        }
        if !self.new_session_has(host, &names) {
            return self.job_later(host, id, step + 1);
        }
        if then == AfterNames::Checkpoint {
            self.checkpointer_reads(host);
        }
        self.job_ends(host, Finished::NamesSet(Ok(())));
    }

    fn start_step(&mut self, host: usize, role: &StartAs) {
        let this = &mut self.hosts[host];
        let server_is_there = !this.server.is_empty();
        if this.disk.rewind.is_some() {
            return self.job_fails(host, "it is half rewound");
        }
        if this.disk.half_empty {
            return self.job_fails(host, "it is no data directory");
        }
        let Some(data) = &mut this.server.data else { return self.job_fails(host, "there is no data directory") };
        if !server_is_there {
            data.set_standby(matches!(role, StartAs::Standby(_)));
            if data.standby_signal
                && let Some(timeline) = rejoin::promoted_by_hand(&data.control(this.disk.promotion.as_ref()))
            {
                this.disk.promotion = Some(OwnPromotion::by_hand(timeline));
            }
        }
        let (word, upstream) = match role {
            StartAs::Primary => (Word::Writable, None),
            StartAs::Standby(upstream) => (Word::Standby, upstream.as_ref().and_then(|upstream| self.host_of(&upstream.member))),
        };
        let Some(id) = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.job.as_ref()).map(|job| job.id) else { return };
        self.guard_ask(host, GuardAsk::Start { word, upstream }, AskedBy::Job(id), ms(ORDER_TIMEOUT_MS));
    }

    fn initdb(&mut self, host: usize) {
        if self.hosts[host].server.ail.breaks_copies {
            return self.job_fails(host, "initdb failed");
        }
        if self.hosts[host].server.data.is_some() {
            // The directory is filled from beside: what is there is never overwritten.
            return self.job_fails(host, "the data directory is not empty");
        }
        self.system_ids += 1;
        self.wal_tokens += 1;
        let (id, token) = (SystemId(self.system_ids), self.wal_tokens);
        self.checks.initdb(host, &self.hosts);
        self.hosts[host].server.data = Some(Data::made_by_initdb(id, token));
        self.job_ends(host, Finished::Initialized(Ok(())));
    }

    /// The leader's server, if it can be asked and is out of recovery or not.
    pub fn ask_leader(&self, host: usize, leader: &Upstream) -> Result<usize, &'static str> {
        let other = self.host_of(&leader.member).ok_or("there is no such host")?;
        let answers = self.hosts[other].powered && !self.hosts[other].stands && self.hosts[other].server.accepting();
        if answers && !self.cut(host, other) { Ok(other) } else { Err("the leader does not answer") }
    }

    /// What has to be on disk first, then the guard's word, then promote.
    fn promote_step(
        &mut self,
        host: usize,
        id: u64,
        step: u32,
        lock: pgherd::types::LockIdentity,
        timeline: TimelineId,
        parent: TimelineId,
    ) {
        match step {
            1 => self.guard_ask(host, GuardAsk::Facts, AskedBy::Job(id), ms(ORDER_TIMEOUT_MS)),
            2 => {
                let this = &mut self.hosts[host];
                if let Some(data) = this.server.data.as_mut().filter(|_| !mutant(Mutant::ReservedIdsNotLaid)) {
                    data.laid.extend((parent.next().0..timeline.0).map(TimelineId));
                }
                this.disk.promotion = Some(OwnPromotion { timeline, epoch: lock.epoch, parent, switch_lsn: None });
                self.job_later(host, id, 3);
            }
            3 => {
                if mutant(Mutant::PromoteUnvouched) {
                    return self.job_later(host, id, 4);
                }
                let Some(PostmasterFacts::Running { start, word, .. }) =
                    self.hosts[host].guard.as_ref().map(|guard| guard.state.facts(self.local(host)).postmaster)
                else {
                    return self.job_fails(host, "PostgreSQL does not run");
                };
                if word == Word::Writable {
                    return self.job_later(host, id, 4);
                }
                self.guard_ask(host, GuardAsk::Vouch { start }, AskedBy::Job(id), ms(ORDER_TIMEOUT_MS));
            }
            _ => {
                let now = self.now;
                let this = &mut self.hosts[host];
                let asked = this.server.promote(now, &mut self.random, false);
                self.server_changed(host);
                match asked {
                    Ok(()) => self.job_ends(host, Finished::PromotionAsked(Ok(()))),
                    Err(why) => self.job_fails(host, why),
                }
            }
        }
    }

    /// The guard's answer to a start, or to a step of a promotion.
    pub fn job_heard_guard(&mut self, host: usize, id: u64, answer: Result<GuardFacts, AskError>) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let Some(job) = daemon.job.as_ref().filter(|job| job.id == id) else { return };
        let (kind, step) = (job.operation.kind(), job.step);
        match (kind, answer) {
            (OperationKind::Promote, Ok(facts)) if matches!(facts.postmaster, PostmasterFacts::Running { .. }) => {
                self.job_later(host, id, step + 1);
            }
            (OperationKind::Start, Ok(facts)) => match facts.postmaster {
                PostmasterFacts::Running { start, .. } | PostmasterFacts::Ending { start, .. } => {
                    self.job_ends(host, Finished::Started(Ok(start)));
                }
                PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. } => self.job_fails(host, "PostgreSQL ended at once"),
            },
            (_, Ok(_)) => self.job_fails(host, "PostgreSQL does not run"),
            (_, Err(error)) => self.job_fails(host, &format!("the guard: {error:?}")),
        }
    }
}
