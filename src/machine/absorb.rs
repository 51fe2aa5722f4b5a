//! How an event changes what is known. Decides nothing: the rules do.
//!
//! What surprises: when the postmaster changes, what was known of the server and of the data directory is forgotten, so that no rule
//! acts on what was true of another start.

use std::sync::Arc;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, MemberRole};
use crate::facts::guard::{GuardFacts, PostmasterFacts, Word};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::facts::postgres::{DataDirectory, Probe, ProbeOutcome, SqlFacts};
use crate::mutants::{Mutant, mutant};
use crate::types::{Epoch, Lsn};

use super::action::OperationKind;
use super::bookkeeping::knows_of;
use super::event::{AcquireOutcome, Event, Finished};
use super::hold::LadderDue;
use super::world::{Etcd, Lock, Vacancy, World};

impl World {
    /// Takes in an event. Returns why the lock is gone if this event took it away.
    pub fn absorb(&mut self, now: BootTime, event: Event) -> Option<String> {
        match event {
            // A promise is judged with the state, after the clock and before any rule.
            Event::Tick | Event::PromiseAsked { .. } => None,
            Event::WallClock(since_1970_s) => {
                self.requests.wall = Some((now, since_1970_s));
                None
            }
            Event::SpecRead(generation, spec) => {
                self.spec = Some((generation, spec));
                self.clear("spec_unreadable");
                None
            }
            Event::SpecUnreadable(generation, why) => {
                self.warn("spec_unreadable", format!("the spec of generation {generation} means nothing, the last good one stays: {why}"));
                None
            }
            Event::View(view, as_of) => self.absorb_view(now, view, as_of),
            Event::EtcdUnreachable(why) => {
                self.etcd = Etcd::Unreachable;
                self.vacancy = None;
                // A lease does not run out while etcd has no leader, and begins anew when it has one again.
                self.foreign = None;
                self.warn("etcd_unreachable", format!("etcd cannot be asked: {why}"));
                None
            }
            Event::EtcdSuspicious(why) => {
                self.etcd = Etcd::Suspicious;
                self.failsafe.went_back = true;
                self.vacancy = None;
                self.fail(
                    "etcd_suspicious",
                    format!("etcd answers from another cluster or an older state; nobody acquires the lock: {why}"),
                );
                None
            }
            Event::Lease(event) => self.absorb_lease(now, event),
            Event::Guard(facts) => {
                self.absorb_guard(now, facts);
                None
            }
            Event::GuardGone => {
                self.guard = None;
                self.guard_gone = true;
                self.scanned_empty = false;
                self.forget_postmaster(now);
                // A new guard knows of no lock: it has to acknowledge a new proof first.
                if let Some(identity) = self.lock.identity() {
                    self.unprove(identity);
                }
                self.holding = None;
                None
            }
            Event::Probed(probe) => {
                if probe.begun >= self.postmaster_since {
                    self.absorb_probe(now, probe);
                }
                None
            }
            Event::Finished(finished) => {
                // In a lapse nobody else could have taken the lock, or changed what it is taken on, but for the spec: so it is not what it was.
                let beaten = self.failsafe.lapsed && matches!(finished, Finished::Acquired(AcquireOutcome::Beaten));
                self.absorb_finished(now, finished);
                beaten.then(|| {
                    self.lose_lock();
                    "the lease ran out while etcd could not be asked, and the lock could not be taken anew".to_owned()
                })
            }
            Event::StopRequested => {
                self.stop_requested = true;
                None
            }
            Event::Routed(trouble) => {
                self.set_or_clear("routing", trouble);
                None
            }
        }
    }

    fn absorb_view(&mut self, now: BootTime, view: Arc<ClusterView>, as_of: BootTime) -> Option<String> {
        self.etcd = Etcd::Reachable;
        self.failsafe.went_back = false;
        self.clear("etcd_unreachable");
        self.clear("etcd_suspicious");
        self.vacancy = match (&view.leader, self.vacancy) {
            (Some(_), _) => None,
            (None, Some(vacancy)) if vacancy.id == view.history_revision => Some(vacancy),
            (None, _) => Some(Vacancy { id: view.history_revision, seen: now }),
        };
        if view.leader.is_some() {
            self.clear("acquire_failed");
            self.peers = None;
        }
        let ours = self.lock.identity();
        let gone = ours.filter(|ours| {
            // A view older than our acquisition says nothing about it.
            view.revision.0 >= ours.epoch.0 && view.leader.as_ref().map(|leader| leader.epoch) != Some(ours.epoch)
        });
        let led = self.present_epoch();
        self.note_leader(&view);
        let absent_or_ours = view.leader.as_ref().is_none_or(|leader| self.is_taken_anew(leader)) && self.led_last(&view);
        self.view = Some(view);
        self.view_as_of = as_of;
        if self.present_epoch() != led {
            self.rejoin = None;
        }
        let writes = self.other_leader().filter(|(_, key)| key.record.role == MemberRole::Primary).is_some();
        let epoch = self.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.epoch).filter(|_| writes);
        self.leader_writes_since = match (epoch, self.leader_writes_since) {
            (Some(epoch), Some((known, since))) if epoch == known => Some((known, since)),
            (epoch, _) => epoch.map(|epoch| (epoch, now)),
        };
        gone.filter(|_| !mutant(Mutant::LostLockNotSeen))?;
        if absent_or_ours && self.lapses(now) {
            return None;
        }
        self.lose_lock();
        Some("the lock's key was deleted or replaced".to_owned())
    }

    pub(super) fn present_epoch(&self) -> Option<Epoch> {
        self.view.as_ref()?.leader.as_ref().map(|leader| leader.epoch)
    }

    fn absorb_lease(&mut self, now: BootTime, event: LeaseEvent) -> Option<String> {
        match event {
            LeaseEvent::Granted { identity, .. } => {
                self.lease = Some(identity);
                self.lease_silent = false;
                // What failed while etcd was away is to be tried on this lease at once.
                self.forget_failures(OperationKind::PutMember);
                None
            }
            LeaseEvent::Renewed { .. } => {
                self.lease = self.lease.or(self.adopting.take());
                None
            }
            LeaseEvent::Proved { lock, sent, until } => {
                self.lease = Some(lock.lease);
                self.adopting = None;
                // The epoch names the leadership; a changed ttl brings it another lease. A proof of a lock that was let go or taken
                // meanwhile comes too late, and proves nothing about now.
                if self.goes_on_until(lock, sent, until) {
                    self.proved_by_etcd(sent, self.times_of(until.since(sent)));
                }
                None
            }
            LeaseEvent::Sustained { lock, sent, until } => {
                if self.goes_on_until(lock, sent, until) {
                    self.failsafe.sustained = Some(until);
                }
                None
            }
            LeaseEvent::Disarmed { at } => {
                self.failsafe.disarming = None;
                self.failsafe.disarmed_at = at;
                None
            }
            LeaseEvent::Failed { why } => {
                self.note_unrenewed(&why);
                None
            }
            LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(_) } if mutant(Mutant::LostLockNotSeen) => None,
            // Of one that was lost before this one was taken: its last proof was on its way meanwhile.
            LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(lost) } if self.lock.identity().is_some_and(|lock| lock.epoch != lost.epoch) => {
                None
            }
            LeaseEvent::Lost { why } => {
                let had = self.lock.identity().is_some();
                if why == LeaseLoss::LeaseNotFound {
                    self.lease = None;
                    self.adopting = None;
                    // Its thread waits to be asked for another one: at once.
                    self.lease_asked = true;
                    self.lease_asked_at = BootTime::default();
                    self.written = None;
                }
                if why == LeaseLoss::LeaseNotFound && self.lapses(now) {
                    self.holding = None;
                    self.forget_failures(OperationKind::Acquire);
                    return None;
                }
                self.lose_lock();
                had.then(|| match why {
                    LeaseLoss::LockNotOurs(_) => "the lock's key is not ours any more".to_owned(),
                    _ => "the lease is gone".to_owned(),
                })
            }
            LeaseEvent::Moved { from, to } => {
                if self.lease == Some(from) {
                    self.lease = Some(to);
                }
                self.asked.moved = true;
                None
            }
            LeaseEvent::GuardSilent => {
                self.guard_gone = true;
                self.lease_silent = true;
                None
            }
        }
    }

    fn absorb_guard(&mut self, now: BootTime, facts: GuardFacts) {
        if self.guard.as_ref().is_some_and(|known| known.pid == facts.pid && known.sequence > facts.sequence) {
            return;
        }
        let was = self.start_and_phase();
        let served = self.sql().is_some();
        if let (Some(start), PostmasterFacts::ProvedEmpty { last: Some(end) }) = (was.0, &facts.postmaster)
            && end.start == start
            && end.rung.is_none()
        {
            // By itself, and not by somebody's signal: the files may be to blame.
            let by_itself = end.exit_status.is_some_and(|status| status != 0);
            if !served {
                let how =
                    end.exit_status.map_or_else(|| format!("signal {}", end.signal.unwrap_or(0)), |status| format!("status {status}"));
                self.failed(now, OperationKind::Start);
                self.files_failed = by_itself;
                self.warn("start_failed", format!("PostgreSQL ended with {how} before it took connections; see its log"));
            }
            if by_itself && matches!(self.running(), Some((_, Word::Standby))) {
                self.standby_ended(now);
            }
        }
        // As long as this daemon has no proof of its own, it goes by the guard's deadline: half way between A and E the guard has begun.
        let may_write = matches!(
            facts.postmaster,
            PostmasterFacts::Running { word: Word::Writable, .. } | PostmasterFacts::Ending { word: Word::Writable, .. }
        );
        // Suspended, it counts for nothing; and when it counts again, the guard begins with the first rung.
        let suspends = facts.maintenance.suspends || self.suspends();
        if suspends {
            self.ladder_due = None;
        } else if let (Lock::None | Lock::Unproved(_), Some(lock), true) = (self.lock, &facts.lock, may_write) {
            let half_way = lock.announce_at + lock.valid_until.since(lock.announce_at) / 2;
            let kill_at = half_way + lock.valid_until.since(half_way) / 2;
            self.ladder_due = Some(LadderDue { immediate_at: half_way, kill_at, fenced_by: lock.valid_until });
        }
        let another = self.guard.as_ref().is_none_or(|known| known.pid != facts.pid);
        // It keeps no deadline of a lock that was proved to the one before.
        if let (Some(identity), true, None) = (self.lock.identity(), another, &facts.lock) {
            self.unprove(identity);
            self.holding = None;
        }
        if another && self.guard.is_some() {
            // Another guard counts its starts anew.
            self.synchrony.server = None;
        }
        self.started = self.started.filter(|start| !another && !knows_of(&facts, *start));
        self.guard = Some(facts);
        self.guard_gone = false;
        self.scanned_empty = false;
        if self.start_and_phase() != was {
            self.forget_postmaster(now);
        }
    }

    fn forget_postmaster(&mut self, now: BootTime) {
        self.probe = None;
        self.data = DataDirectory::Unknown;
        self.looks.shut_down = None;
        self.looks.is_old = self.in_flight.contains(&OperationKind::Look);
        self.postmaster_since = now;
        (self.receiving.not_streaming_since, self.receiving.past_the_switch_since) = (None, None);
        self.replayed_by = None;
    }

    fn absorb_probe(&mut self, now: BootTime, probe: Probe) {
        if matches!(probe.outcome, ProbeOutcome::Accepting(_)) {
            self.backoff.remove(&OperationKind::Start);
            self.files_failed = false;
            self.clear("start_failed");
        }
        let streaming = match &probe.outcome {
            ProbeOutcome::Accepting(sql) => sql.streams(),
            ProbeOutcome::NotYet(_) | ProbeOutcome::Unknown(_) => false,
        };
        if streaming {
            self.standby_streams(now);
        }
        self.receiving.not_streaming_since = if streaming { None } else { self.receiving.not_streaming_since.or(Some(now)) };
        self.probe = Some(probe);
        // Before it has, it asks nobody for more.
        let all = |sql: &&SqlFacts| sql.in_recovery && (sql.replayed_all || sql.receive_lsn > Lsn(0));
        self.replayed_by = self.sql().filter(all).map(|sql| sql.startup.clone()).or(self.replayed_by.take());
    }
}
