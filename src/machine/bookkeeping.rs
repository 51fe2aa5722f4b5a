//! Operations under way, failures and back-off, orders given lately, conditions.
//!
//! What surprises: a start has succeeded only when the server takes connections, so its failures are forgotten by a probe.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{Condition, HistoryEntry, Severity};
use crate::facts::guard::{GuardFacts, PostmasterFacts, Rung, StartId};
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState};
use crate::policy::rejoin;
use crate::types::{Epoch, Revision};

use super::action::{Operation, OperationKind, StopMode};
use super::copying::Progress;
use super::event::Kept;
use super::finished::ANSWERED_PAUSE_MS;
use super::world::{Backoff, World};

/// Longest wait between two attempts of an operation that fails.
const BACKOFF_MAX_MS: u64 = 10_000;

/// Wait after the first failure; doubles with each further one.
const BACKOFF_FIRST_MS: u64 = 250;

/// Before a running server's data directory is looked at again that made no sense.
const UNUSABLE_PAUSE_MS: u64 = 5_000;

/// An order to end PostgreSQL is given again after so long if nothing was seen of it.
const STOP_AGAIN_MS: u64 = 1_000;

/// Window in which starts of the primary count as a crash loop (SAFETY row 9).
pub const CRASH_WINDOW_S: u64 = 60;
/// So many starts within the window and another member has to lead.
pub const CRASH_LIMIT: usize = 3;

/// The condition that the member key could not be written: to be seen over HTTP.
pub(crate) const MEMBER_KEY_FAILED: &str = "member_key_failed";
/// Nothing is started on what could not be read.
const UNREAD: &str = "the data directory could not be read, and PostgreSQL is not started; the log of this daemon says why";

/// How long is waited after so many failures in a row.
fn backoff_ms(failures: u32) -> u64 {
    (BACKOFF_FIRST_MS << failures.min(10).saturating_sub(1)).min(BACKOFF_MAX_MS)
}

/// What etcd was asked for, as far as its answer does not say it.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// The leadership that is being given back.
    pub releasing: Option<Epoch>,
    /// The leadership whose key is being written again.
    pub reaffirming: Option<Epoch>,
    /// The leadership whose promotion is being recorded.
    pub recording: Option<Epoch>,
    /// The member key was moved to another lease, as it was when that began: what it said since is written again.
    pub moved: bool,
    /// When the guard was asked last what it sees.
    pub guard_looked: Option<BootTime>,
    /// The revision of `maintenance` at which it is being noted in etcd that our guard may suspend.
    pub suspending: Option<Revision>,
    /// The one at which it was. The guard may be told.
    pub suspended: Option<Revision>,
    /// `history` as it is written with the lock that was asked for last.
    pub history: Vec<HistoryEntry>,
    /// That lock is a new cluster's first, and it was our claim to initialize that it was asked for on.
    pub first: bool,
}

/// Looks at the data directory while a server is there.
#[derive(Debug, Clone, Default)]
pub struct Looks {
    /// The one under way began before the postmaster ended.
    pub is_old: bool,
    /// The control file of a server that is being ended and whose shutdown checkpoint is written, and when that was seen: no session is left,
    /// and none begins.
    pub shut_down: Option<(BootTime, ControlFacts)>,
}

/// Whether what the guard says takes a start into account.
pub(super) fn knows_of(guard: &GuardFacts, start: StartId) -> bool {
    match &guard.postmaster {
        PostmasterFacts::Running { start: known, .. } | PostmasterFacts::Ending { start: known, .. } => *known >= start,
        PostmasterFacts::ProvedEmpty { last } => last.is_some_and(|last| last.start >= start),
        PostmasterFacts::Unclaimed { .. } => false,
    }
}

impl World {
    /// What will be needed when the answer comes.
    pub(super) fn note_asked(&mut self, operation: &Operation) {
        self.synchrony.note_asked(operation);
        if let Some(begun) = Progress::of(operation) {
            self.receiving.copying = Some(begun);
        }
        match operation {
            Operation::Release { epoch, .. } => {
                self.asked.releasing = Some(*epoch);
                self.sure_of = self.sure_of.filter(|sure| sure != epoch);
                self.found_writing = self.found_writing.filter(|found| found != epoch);
                // The answer to one that is under way may be older than this release.
                self.asked.reaffirming = self.asked.reaffirming.filter(|asked| asked != epoch);
            }
            Operation::Reaffirm(epoch) => self.asked.reaffirming = Some(*epoch),
            Operation::NoteSuspension { revision, suspends } => self.asked.suspending = Some(*revision).filter(|_| *suspends),
            Operation::Configure { anew: true, .. } => self.requests.files_are_written(),
            Operation::RecordPromotion { epoch, .. } => self.asked.recording = Some(*epoch),
            Operation::Acquire { history, judged_on, .. } => {
                self.asked.history.clone_from(history);
                self.asked.first = self.lease.is_some_and(|lease| judged_on.is_claimed_on(lease.lease));
            }
            _ => {}
        }
    }

    /// PostgreSQL takes writes here from now on. Starts before the window are forgotten.
    pub(super) fn note_primary_start(&mut self, now: BootTime) {
        // Whatever is left this time was not tried before.
        self.forget_failures(OperationKind::ArchiveLeft);
        self.primary_starts.push(now);
        self.primary_starts.retain(|at| now.since(*at) < Duration::from_secs(CRASH_WINDOW_S));
    }

    /// Primaries started within the crash window.
    pub fn recent_primary_starts(&self, now: BootTime) -> usize {
        self.primary_starts.iter().filter(|at| now.since(**at) < Duration::from_secs(CRASH_WINDOW_S)).count()
    }

    /// Whether a server that was started is any good is seen later: its condition stays until it takes connections.
    pub(super) fn judge_start(&mut self, now: BootTime, result: Result<StartId, String>) {
        self.ended(now, OperationKind::Start, result.is_ok());
        match result {
            Ok(start) => {
                self.started_without_what_is_left();
                self.synchrony.started(now, start);
                self.started = Some(start).filter(|start| !self.guard.as_ref().is_some_and(|guard| knows_of(guard, *start)));
            }
            Err(why) => self.warn("start_failed", why),
        }
    }

    /// Books the end of an operation, with a condition if it failed.
    pub(super) fn judge(&mut self, now: BootTime, kind: OperationKind, result: Result<impl Sized, String>, condition: &'static str) {
        match result {
            Ok(_) => {
                self.ended(now, kind, true);
                self.clear(condition);
            }
            Err(why) => {
                self.ended(now, kind, false);
                self.warn(condition, why);
            }
        }
    }

    pub(super) fn ended(&mut self, now: BootTime, kind: OperationKind, succeeded: bool) {
        self.in_flight.remove(&kind);
        if succeeded {
            // A start has succeeded only when the server takes connections.
            if kind != OperationKind::Start {
                self.backoff.remove(&kind);
            }
            return;
        }
        self.failed(now, kind);
    }

    pub(super) fn failed(&mut self, now: BootTime, kind: OperationKind) {
        let failures = self.backoff.get(&kind).map_or(0, |backoff| backoff.failures) + 1;
        self.backoff.insert(kind, Backoff { failures, not_before: now + Duration::from_millis(backoff_ms(failures)) });
    }

    /// A standby ended by itself, with an error. It may have taken connections before: recovery opens, and then meets what it cannot read.
    pub(super) fn standby_ended(&mut self, now: BootTime) {
        self.receiving.ends += 1;
        let ends = self.receiving.ends;
        self.pause(now, OperationKind::Start, backoff_ms(ends));
        if ends >= rejoin::STARTS_IN_VAIN {
            let name = &self.me.name;
            let message = format!(
                "PostgreSQL ended by itself {ends} times in a row as a standby, and is started again: its log says why; if nothing helps, `pgherd reinit {name}` copies it anew"
            );
            self.warn("standby_ends", message);
        }
    }

    /// It does for a while.
    pub(super) fn standby_streams(&mut self, now: BootTime) {
        if self.receiving.ends > 0 && now.since(self.postmaster_since) >= Duration::from_secs(CRASH_WINDOW_S) {
            self.forget_ends();
        }
    }

    /// Other files, or a server that is well.
    pub(super) fn forget_ends(&mut self) {
        self.receiving.ends = 0;
        self.clear("standby_ends");
        self.clear("wal_incomplete");
    }

    /// Whether an operation may be started: not under way, not before its back-off is over, and no other job if it is one.
    pub fn may_start(&self, now: BootTime, kind: OperationKind) -> bool {
        !self.in_flight.contains(&kind)
            && self.backoff.get(&kind).is_none_or(|backoff| now >= backoff.not_before)
            && !(kind.is_job() && self.job().is_some())
    }

    /// Whether an operation failed, and is not to be tried again yet.
    pub fn backs_off(&self, now: BootTime, kind: OperationKind) -> bool {
        self.backoff.get(&kind).is_some_and(|backoff| now < backoff.not_before)
    }

    /// Puts off the next attempt of an operation, at least for so long.
    pub fn pause(&mut self, now: BootTime, kind: OperationKind, span_ms: u64) {
        let not_before = now + Duration::from_millis(span_ms);
        let backoff = self.backoff.entry(kind).or_insert(Backoff { failures: 0, not_before });
        backoff.not_before = backoff.not_before.max(not_before);
    }

    /// What is in the data directory.
    pub fn looked(&mut self, now: BootTime, data: DataDirectory) {
        self.ended(now, OperationKind::Look, data != DataDirectory::Unknown);
        if std::mem::take(&mut self.looks.is_old) {
            return;
        }
        if let (Some(_), DataDirectory::Full(control)) = (self.ending(), &data) {
            let seen = self.looks.shut_down.as_ref().map_or(now, |(seen, _)| *seen);
            self.looks.shut_down = Some((seen, control.clone())).filter(|_| control.state == DatabaseState::ShutDown);
        }
        // Of a server that was found running nothing was looked at before.
        if self.running().is_some() && self.promoted.is_none() {
            self.looked_at_running(now, &data);
        }
        // A postmaster that started meanwhile has made this look old.
        if self.proved_empty() {
            self.clear("running_unread");
            match data {
                DataDirectory::Unknown => self.warn("data_directory_unread", UNREAD.to_owned()),
                _ => self.clear("data_directory_unread"),
            }
            let before = self.promoted;
            self.promoted = match &data {
                // What the record does not say yet, the start that follows writes into it.
                DataDirectory::Full(control) => {
                    let by_hand = rejoin::promoted_by_hand(control).map(|timeline| (timeline, Epoch::BY_HAND));
                    Some(by_hand.or(control.promoted))
                }
                DataDirectory::Empty => Some(None),
                DataDirectory::Unknown | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_) => None,
            };
            self.left_was_counted(&data);
            // Other files than those that were judged.
            self.judged = self.judged.filter(|_| self.promoted == before);
            self.data = data;
            self.looked_at = now;
        } else {
            self.pause(now, OperationKind::Look, ANSWERED_PAUSE_MS);
        }
    }

    /// The files of a server that this daemon found running.
    fn looked_at_running(&mut self, now: BootTime, data: &DataDirectory) {
        match data {
            DataDirectory::Full(control) => {
                self.promoted = Some(control.promoted);
                self.left.ready = control.unarchived;
                self.clear("running_unread");
            }
            DataDirectory::Unusable(why) => {
                self.fail("running_unread", format!("{why}; the server that runs there is left as it is and not configured"));
                self.pause(now, OperationKind::Look, UNUSABLE_PAUSE_MS);
            }
            // A server that runs was started before, and by somebody else.
            DataDirectory::HalfRewound(_) => {
                let why = "a rewind of it was begun and has not ended, and a server runs there: stop it, it is not what the leader has";
                self.fail("running_unread", why.to_owned());
                self.pause(now, OperationKind::Look, UNUSABLE_PAUSE_MS);
            }
            DataDirectory::Empty | DataDirectory::Unknown => {}
        }
    }

    /// What lies beside the data directory.
    pub(super) fn kept_was_seen(&mut self, kept: Kept) {
        match &kept.directory {
            Some(path) => self.set_info(
                "diverged_kept",
                format!(
                    "a data directory that had diverged is kept at {path}: look at its why.json, save what is wanted, then remove it by name"
                ),
            ),
            None => self.clear("diverged_kept"),
        }
        match kept.lost.last() {
            Some(last) => self.set_info(
                "lost_writes",
                format!(
                    "WAL that only this member had is kept ({} times, the last at {}): see `pgherd get lost-writes`, save what is wanted, then remove it by name",
                    kept.lost.len(),
                    last.kept
                ),
            ),
            None => self.clear("lost_writes"),
        }
        self.left.beside.clone_from(&kept.unarchived);
        self.say_what_is_beside();
        self.kept = Kept { untold: std::mem::take(&mut self.kept.untold), ..kept };
    }

    /// A new attempt at something begins: what failed before does not count against it.
    pub fn forget_failures(&mut self, kind: OperationKind) {
        self.backoff.remove(&kind);
    }

    /// Puts off the next attempt of an operation as if it had failed.
    pub fn retry_later(&mut self, now: BootTime, kind: OperationKind) {
        self.failed(now, kind);
    }

    /// Whether PostgreSQL's end may be ordered (again): a weaker order than the present one is not given.
    pub fn may_ask_stop(&mut self, now: BootTime, mode: StopMode) -> bool {
        let (start, running) = self.start_and_phase();
        let Some(start) = start.filter(|_| running || mode == StopMode::Kill && self.ending() != Some(Rung::KillAll)) else { return false };
        let asked_lately =
            self.stop_asked.is_some_and(|(of, how, at)| of == start && how == mode && now.since(at) < Duration::from_millis(STOP_AGAIN_MS));
        if !asked_lately {
            self.stop_asked = Some((start, mode, now));
        }
        !asked_lately
    }

    /// Sets a piece of information that never makes a check fail.
    pub fn set_info(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Info, message);
    }

    /// Earliest end of a back-off that is still ahead.
    pub fn next_retry(&self, now: BootTime) -> Option<BootTime> {
        self.backoff.values().map(|backoff| backoff.not_before).filter(|at| *at > now).min()
    }

    /// How often an operation failed since it last succeeded.
    pub fn failures(&self, kind: OperationKind) -> u32 {
        self.backoff.get(&kind).map_or(0, |backoff| backoff.failures)
    }

    /// The job under way.
    pub fn job(&self) -> Option<OperationKind> {
        self.in_flight.iter().copied().find(|kind| kind.is_job())
    }

    /// Sets a warning.
    pub fn warn(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Warning, message);
    }

    /// A warning as long as there is something to warn of.
    pub fn set_or_clear(&mut self, kind: &'static str, trouble: Option<String>) {
        match trouble {
            Some(trouble) => self.warn(kind, trouble),
            None => self.clear(kind),
        }
    }

    /// Sets an error.
    pub fn fail(&mut self, kind: &'static str, message: String) {
        self.set(kind, Severity::Error, message);
    }

    fn set(&mut self, kind: &'static str, severity: Severity, message: String) {
        self.conditions.insert(kind, Condition { kind: kind.to_owned(), severity, message });
    }

    /// Takes a condition back.
    pub fn clear(&mut self, kind: &'static str) {
        self.conditions.remove(kind);
    }
}
