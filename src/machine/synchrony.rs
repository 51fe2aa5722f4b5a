//! What this member knows of `sync`, and of what its PostgreSQL goes by. Decides nothing: the rules do.
//!
//! What surprises: an answer that was lost leaves neither the old record nor the new one behind, but nothing that may be judged on. The
//! lock's key is written again first, which puts an end to whatever is still on its way, and then a view as new as that is waited for.

use super::action::{Operation, OperationKind};
use super::event::Failure;
use super::finished::ANSWERED_PAUSE_MS;
use super::world::World;
use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, ReleaseRecord};
use crate::facts::guard::{StartId, Word};
use crate::facts::postgres::SqlFacts;
use crate::facts::synchrony::{Names, SyncRecord};
use crate::mutants::{Mutant, mutant};
use crate::policy::synchrony::InForce;
use crate::policy::synchrony::goal::Standbys;
use crate::spec::cluster::ReplicationMode;
use crate::types::{Epoch, Lsn, MemberName, Revision};

/// `sync` and what a write of it compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// What it says; None = it is absent.
    pub record: Option<SyncRecord>,
    /// Its mod revision; 0 = absent.
    pub revision: Revision,
    /// The mod revision of the lock's key.
    pub lock: Revision,
}

/// Whether clients are let in: by pg_hba.conf, once this daemon has seen to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// They are.
    Open,
    /// They are kept out, since it was started.
    Closed(BootTime),
    /// It was found running, then: the daemon before may have kept clients out, and may not have let them in.
    Unknown(BootTime),
}

/// What a server goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfServer {
    /// Which.
    pub start: StartId,
    /// What its processes may have read.
    pub in_force: InForce,
    /// When this daemon saw the names take effect last: what was asked before that shows what was before.
    pub took_at: BootTime,
    /// Whether clients get in.
    pub gate: Gate,
    /// How far it had recovered when it was seen first.
    pub recovered: Option<Lsn>,
}

impl OfServer {
    /// One that runs, of which so much is known.
    pub fn new(start: StartId, in_force: InForce, took_at: BootTime) -> Self {
        OfServer { start, in_force, took_at, gate: Gate::Open, recovered: None }
    }
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Synchrony {
    /// As this leadership took it over, or wrote it last.
    written: Option<Known>,
    /// A view from this revision on shows all that this leadership has written.
    seen_from: Revision,
    /// What the present server goes by; None = it was found running.
    pub server: Option<OfServer>,
    /// The names that are being set, or that a server is being started with.
    asked: Option<(Option<StartId>, Names)>,
    /// It is being started with clients kept out.
    closes: bool,
    /// What the lock is being taken on, and how the last leader left.
    judged_on: Option<(Option<Known>, Option<ReleaseRecord>)>,
    /// How the last leader before this leadership left, if it did in good order.
    left: Option<(Epoch, ReleaseRecord)>,
    /// The record that is being written.
    writing: Option<SyncRecord>,
    /// Who counts, in this leadership.
    pub standbys: Option<(Epoch, Standbys)>,
    /// What was said last of how many copies a commit has.
    pub said: Option<u32>,
    /// Until then the server is asked often: commits may be waiting for what it shows.
    pub hurries_until: BootTime,
}

impl Synchrony {
    /// What the answer will have to be understood by.
    pub(super) fn note_asked(&mut self, operation: &Operation) {
        match operation {
            Operation::Start { names, closed, .. } => (self.asked, self.closes) = (Some((None, names.clone())), *closed),
            Operation::SetNames { start, names, .. } => {
                self.asked = Some((Some(*start), names.clone()));
                if let Some(server) = self.server.as_mut().filter(|server| server.start == *start) {
                    server.in_force.ordered(names);
                }
            }
            Operation::Acquire { judged_on, .. } => {
                self.judged_on = Some((in_view(judged_on, Revision(0)), judged_on.release.clone()));
            }
            Operation::WriteSync { record, .. } => self.writing.clone_from(record),
            _ => {}
        }
    }

    /// A postmaster was started with the names that it was asked to be started with.
    pub(super) fn started(&mut self, now: BootTime, start: StartId) {
        if let Some((None, names)) = self.asked.take() {
            let gate = if self.closes { Gate::Closed(now) } else { Gate::Open };
            self.server = Some(OfServer { gate, ..OfServer::new(start, InForce::since_start(names), now) });
        }
    }

    /// The names were set and are proved to be in force, or it is not known.
    fn names_set(&mut self, now: BootTime, succeeded: bool, standby: bool) {
        let Some((Some(start), names)) = self.asked.take() else { return };
        let Some(server) = self.server.as_mut().filter(|server| server.start == start && succeeded) else { return };
        server.took_at = now;
        match standby {
            // Nothing has been acknowledged by what was before.
            true => server.in_force = InForce::since_start(names),
            false => server.in_force.took(names),
        }
    }

    /// The lock was won on a view; nothing was written under it yet.
    pub(super) fn lock_won(&mut self, epoch: Epoch) {
        let (known, left) = self.judged_on.take().unwrap_or_default();
        self.written = known.map(|known| Known { lock: Revision(epoch.0), ..known });
        self.left = left.map(|left| (epoch, left));
        self.seen_from = Revision(epoch.0);
        self.standbys = None;
        self.said = None;
    }

    /// The lock's key was written again: nothing that was sent before is carried out from here on.
    pub(super) fn reaffirmed(&mut self, at: Revision) {
        self.written = None;
        self.seen_from = self.seen_from.max(at);
    }

    /// `sync` was written at that revision, or was found not to be what it was judged on.
    pub(super) fn record_written(&mut self, result: &Result<(bool, Revision), Failure>) {
        let record = self.writing.take();
        let lock = self.written.take().map(|known| known.lock);
        let Ok((written, at)) = result else { return };
        self.seen_from = self.seen_from.max(*at);
        if let (true, Some(lock)) = (*written, lock) {
            let revision = if record.is_some() { *at } else { Revision(0) };
            self.written = Some(Known { record, revision, lock });
        }
    }

    /// Who counts, if that was looked at in this leadership.
    pub(super) fn standbys_of(&self, epoch: Epoch) -> Option<&Standbys> {
        self.standbys.as_ref().filter(|(of, _)| *of == epoch).map(|(_, standbys)| standbys)
    }

    /// `sync` as it is under this leadership: nobody else writes it.
    fn known(&self, view: Option<&ClusterView>, epoch: Epoch) -> Option<Known> {
        let leader = view.and_then(|view| view.leader.as_ref().filter(|leader| leader.epoch == epoch));
        match (view, leader) {
            (Some(view), Some(leader)) if view.revision >= self.seen_from => in_view(view, leader.mod_revision),
            _ => self.written.clone(),
        }
    }
}

/// None = it cannot be read.
fn in_view(view: &ClusterView, lock: Revision) -> Option<Known> {
    let unreadable = view.sync.is_none() && view.sync_revision.0 != 0;
    (!unreadable).then(|| Known { record: view.sync.clone(), revision: view.sync_revision, lock })
}

impl World {
    /// The names were set, or it is not known.
    pub(super) fn names_were_set(&mut self, now: BootTime, result: Result<(), Failure>) {
        let standby = matches!(self.running(), Some((_, Word::Standby)));
        self.synchrony.names_set(now, result.is_ok(), standby);
        self.judge(now, OperationKind::SetNames, result, "names_failed");
    }

    /// A change of `sync` or of the names is under way, or a leadership begins.
    pub(super) fn hurries(&self, now: BootTime) -> bool {
        self.is_synchronous() && now < self.synchrony.hurries_until
    }

    /// Clients were let in, or it is not known.
    pub(super) fn was_opened(&mut self, now: BootTime, result: Result<(), Failure>) {
        if let (Ok(()), Some(server)) = (&result, &mut self.synchrony.server) {
            server.gate = Gate::Open;
        }
        self.judge(now, OperationKind::Open, result, "open_failed");
    }

    /// Clients are kept out of the running server.
    pub fn is_closed(&self) -> bool {
        self.names_of_server().is_some_and(|server| matches!(server.gate, Gate::Closed(_)))
    }

    /// Clients are kept out of the running server, or may be, and will be let in.
    pub(super) fn keeps_out(&self) -> bool {
        self.names_of_server().is_some_and(|server| server.gate != Gate::Open)
    }

    /// Clients are kept out of the running server, or it is not known: it was found running, and not looked at yet.
    pub(super) fn may_be_closed(&self) -> bool {
        self.names_of_server().map_or(self.is_synchronous(), |server| server.gate != Gate::Open)
    }

    /// `sync` was written, or was not what was judged on, or it is not known.
    pub(super) fn sync_was_written(&mut self, now: BootTime, result: &Result<(bool, Revision), Failure>) {
        self.synchrony.record_written(result);
        if result.is_err() && !mutant(Mutant::LostAnswerForgotten) {
            self.sure_of = None;
        }
        self.judge(now, OperationKind::WriteSync, result.as_ref().map_err(Clone::clone), "sync_failed");
        if !matches!(result, Ok((true, _))) {
            self.pause(now, OperationKind::WriteSync, ANSWERED_PAUSE_MS);
        }
    }

    /// `sync` under the lock of this epoch. None = something that was sent may still be carried out, or it cannot be read.
    pub(super) fn sync_of(&self, epoch: Epoch) -> Option<Known> {
        (self.sure_of == Some(epoch)).then(|| self.synchrony.known(self.view.as_deref(), epoch)).flatten()
    }

    /// What the running server goes by. None = it was found running.
    pub(super) fn names_of_server(&self) -> Option<&OfServer> {
        let (start, _) = self.running()?;
        self.synchrony.server.as_ref().filter(|server| server.start == start)
    }

    /// Commits wait for standbys, or are to: the spec says so, or `sync` does.
    pub(super) fn is_synchronous(&self) -> bool {
        let recorded = self.view.as_ref().is_some_and(|view| view.sync_revision.0 != 0);
        recorded || self.spec().is_some_and(|spec| spec.replication.mode != ReplicationMode::Async)
    }

    /// No member has WAL that this one has not: the leader before ended in good order, and this member has all of its WAL.
    pub(super) fn nobody_is_ahead(&self, epoch: Epoch) -> bool {
        let left = self.synchrony.left.as_ref().filter(|(of, _)| *of == epoch).map(|(_, left)| left);
        let has_all = |left: &ReleaseRecord, sql: &SqlFacts| left.timeline == sql.timeline && left.lsn < sql.end_of_wal();
        let left = left.filter(|left| left.all_seen || mutant(Mutant::CountedWhileAhead));
        left.zip(self.sql()).is_some_and(|(left, sql)| has_all(left, sql))
    }

    /// All whom `sync` names have been seen to follow this leadership.
    pub(super) fn all_are_seen(&self, epoch: Epoch) -> bool {
        let standbys = self.synchrony.standbys_of(epoch);
        let is_seen = |name: &MemberName| *name == self.me.name || standbys.is_some_and(|standbys| standbys.is_behind(name));
        self.sync_of(epoch).is_some_and(|known| known.record.is_none_or(|record| record.members.iter().all(is_seen)))
    }

    /// A primary that starts again may have commits that no standby has, and that nobody was told of (SAFETY row 48).
    pub(super) fn starts_closed(&self, epoch: Epoch) -> bool {
        let may_have = self.sync_of(epoch).is_none_or(|known| known.record.is_some_and(|record| record.copies > 1));
        may_have && !mutant(Mutant::StartsOpen)
    }

    /// The names that a server is started with, and that a standby keeps: nothing is acknowledged by a new primary before it is known by whom.
    pub(super) fn names_at_first(&self) -> Names {
        if self.is_synchronous() && !mutant(Mutant::PromotedOpen) { Names::Block } else { Names::Nobody }
    }
}
