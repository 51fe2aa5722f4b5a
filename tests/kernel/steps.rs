//! What can happen next in a [`World`], whoever does it.

use pgherd::facts::guard::{Maintenance, Word};
use pgherd::guard::protocol::StopOrder;
use pgherd::guard::state::{GuardState, Postmaster};

use pgherd::types::Revision;

use crate::world::{Ask, Daemon, EtcdLock, Message, Mode, Mutant, PAUSES_MAX, Pause, STRANGE_LEASE, Setup, Who, World, at};

/// No lease of the tidied world has this number.
const NEW_LEASE: i64 = 99;

/// All worlds that may come next, each with what happened.
pub struct Next<'a> {
    from: &'a World,
    setup: &'a Setup,
    pub found: Vec<(What, World)>,
}

/// What happened, and to which message.
pub type What = (&'static str, Option<Ask>);

impl<'a> Next<'a> {
    pub fn of(from: &'a World, setup: &'a Setup) -> Vec<(What, World)> {
        let mut next = Self { from, setup, found: Vec::new() };
        if setup.pauses && from.is_as_if_nobody_had_paused() {
            return next.found;
        }
        next.step("a second passes", true, |w, setup| {
            w.tick(setup);
            true
        });
        next.etcd();
        next.stranger();
        for index in 0..from.net.len() {
            next.message(index);
        }
        if setup.pauses {
            next.operator();
        }
        next.postgres();
        next.faults();
        if from.daemon.is_some() {
            next.daemon();
        }
        next.found
    }

    /// Tries a step, if it is possible at all (`when`); it counts when it says true.
    fn step(&mut self, what: &'static str, when: bool, step: impl FnOnce(&mut World, &Setup) -> bool) {
        if when {
            self.step_of((what, None), step);
        }
    }

    fn step_of(&mut self, what: What, step: impl FnOnce(&mut World, &Setup) -> bool) {
        let mut world = self.from.clone();
        if step(&mut world, self.setup) {
            world.check(self.setup);
            world.tidy(self.setup);
            self.found.push((what, world));
        }
    }

    fn etcd(&mut self) {
        for (lease, expires) in self.from.leases.clone() {
            let drop_lease = move |w: &mut World| {
                w.leases.retain(|(id, _)| *id != lease);
                w.lock = w.lock.filter(|lock| lock.lease != lease);
                true
            };
            if self.from.now >= expires {
                self.step("etcd: a lease expires", true, |w, _| drop_lease(w));
            } else {
                self.step("etcd: a lease expires EARLY", self.setup.etcd_lies, |w, _| drop_lease(w));
            }
        }
        self.step("a person deletes the lock", self.setup.etcd_lies, |w, _| w.lock.take().is_some());
    }

    /// Every transaction that takes the lock compares that there is no key `maintenance`.
    fn stranger_may_lead(&self) -> bool {
        let beside = self.setup.mutant == Some(Mutant::LockTakenBesideMaintenance);
        self.setup.stranger && self.from.lock.is_none() && (self.from.pause.is_none() || beside)
    }

    fn operator(&mut self) {
        self.step("a person sets maintenance mode", self.from.pause.is_none() && self.from.paused < PAUSES_MAX, |w, _| {
            w.paused += 1;
            w.pause = Some(Pause { revision: w.paused, ending: false, noted: false, acknowledged: false });
            true
        });
        self.step("a person ends maintenance mode", self.from.pause.is_some_and(|pause| !pause.ending), |w, _| {
            w.paused += 1;
            let noted = w.pause.is_some_and(|pause| pause.noted);
            w.pause = Some(Pause { revision: w.paused, ending: true, noted, acknowledged: false });
            true
        });
        let over = |pause: Pause| pause.ending && (pause.acknowledged || !pause.noted);
        self.step("maintenance mode is over, all have said so", self.from.pause.is_some_and(over), |w, _| {
            w.pause = None;
            true
        });
    }

    fn stranger(&mut self) {
        self.step("the stranger takes the lock under our name, and leads", self.stranger_may_lead(), |w, _| {
            w.newest += 1;
            w.lock = Some(EtcdLock { epoch: w.newest, lease: STRANGE_LEASE, by: Who::Stranger });
            true
        });
        // What more it does is explored where nobody pauses.
        if self.setup.pauses {
            return;
        }
        self.step("the stranger leaves", self.setup.stranger, |w, _| w.lock.take_if(|lock| lock.by == Who::Stranger).is_some());
        self.step("the stranger renews our lease", self.setup.stranger, |w, setup| {
            let Some(lock) = w.lock.filter(|lock| lock.by == Who::Us) else { return false };
            let until = w.now + setup.ttl;
            w.leases.iter_mut().filter(|(id, expires)| *id == lock.lease && *expires < until).map(|lease| lease.1 = until).count() > 0
        });
    }

    /// A message is applied, or its answer arrives, or it is lost.
    fn message(&mut self, index: usize) {
        let message = self.from.net[index];
        let ask = Some(message.ask);
        match message.answer {
            None => {
                self.step_of(("etcd handles", ask), |w, setup| w.apply(setup, index, false));
                if self.setup.etcd_lies && matches!(message.ask, Ask::Keepalive { .. }) {
                    self.step_of(("etcd LIES about", ask), |w, setup| w.apply(setup, index, true));
                }
            }
            Some(answer) if self.from.guard == Mode::Running => {
                self.step_of((if answer > 0 { "the daemon hears YES to" } else { "the daemon hears NO to" }, ask), |w, setup| {
                    w.hear(setup, index, answer)
                });
            }
            Some(_) => {}
        }
        if message.awaited {
            self.step_of(("the daemon gives up waiting for", ask), |w, _| {
                w.net[index].awaited = false;
                true
            });
        } else {
            self.step_of(("lost is", ask), |w, _| {
                w.net.remove(index);
                true
            });
        }
    }

    fn postgres(&mut self) {
        self.step("PostgreSQL leaves recovery", self.from.pg.is_some(), |w, _| {
            let Some(pg) = w.pg.as_mut().filter(|pg| pg.promoted && pg.recovering && pg.postmaster && !pg.stopping) else { return false };
            pg.recovering = false;
            true
        });
        self.step("the last process of PostgreSQL ends", self.from.pg.is_some(), |w, setup| {
            let gone = w.pg.take_if(|pg| pg.stopping || pg.killed).is_some();
            w.guard_duties(setup);
            gone
        });
        let crashes = self.from.pg.is_some() && !self.setup.pauses;
        self.step("the postmaster is killed, a backend lives on", crashes, |w, setup| {
            let Some(pg) = w.pg.as_mut().filter(|pg| pg.postmaster) else { return false };
            pg.postmaster = false;
            w.guard_duties(setup);
            true
        });
    }

    fn faults(&mut self) {
        let (alive, guard) = (self.from.daemon.is_some(), self.from.guard);
        self.step("the daemon is killed", self.setup.daemon_dies && alive, |w, _| {
            w.net.iter_mut().for_each(|message| message.awaited = false);
            w.daemon.take().is_some()
        });
        self.step("the daemon starts", !alive && guard != Mode::Frozen, |w, setup| {
            let now = at(w.now);
            let handed = w.state.lock.filter(|lock| w.guard == Mode::Running && now < lock.deadlines.valid_until);
            let lock = handed.map(|lock| (lock.identity.epoch.0, lock.identity.lease.lease.0));
            let fence_at = handed.map(|lock| lock.deadlines.announce_at);
            w.daemon = Some(Daemon { lock, vouched: None, fence_at, sees: None, says: None });
            w.daemon_duties(setup);
            true
        });
        self.guard_faults();
    }

    fn guard_faults(&mut self) {
        let guard = self.from.guard;
        let may_fail = self.setup.guard_fails && guard == Mode::Running;
        self.step("the guard is frozen", may_fail, |w, _| {
            w.guard = Mode::Frozen;
            true
        });
        let feeds_now = self.from.fed.is_some_and(|dog| dog.fed_at == at(self.from.now));
        self.step("the guard is frozen between its check and its feed", may_fail && feeds_now, |w, _| {
            w.guard = Mode::Frozen;
            w.mid_feed = true;
            true
        });
        self.step("the delayed feed comes through, and the guard is frozen again", self.from.mid_feed, |w, _| {
            w.late_feed();
            true
        });
        self.step("the guard goes on", guard == Mode::Frozen, |w, setup| {
            w.guard = Mode::Running;
            w.late_feed();
            w.guard_duties(setup);
            true
        });
        self.step("the guard is killed", self.setup.guard_fails && guard != Mode::Dead, |w, setup| {
            let was = std::mem::replace(&mut w.guard, Mode::Dead);
            w.mid_feed = false;
            // The parent-death signal. A guard that was frozen first may be killed late, so that its signal has to do: PostgreSQL ends.
            if let Some(pg) = &mut w.pg {
                pg.stopping = true;
                pg.killed |= was == Mode::Frozen;
            }
            // The kernel pings the device once more when it is closed (SAFETY 8).
            w.fires_at = w.fed.take().map(|dog| w.now + dog.timeout.as_secs());
            w.daemon_duties(setup);
            true
        });
    }

    fn daemon(&mut self) {
        let device_is_free = self.from.fires_at.is_none();
        self.step("the daemon starts a new guard", self.from.guard == Mode::Dead && device_is_free, |w, setup| {
            (w.guard, w.state) = (Mode::Running, GuardState::default());
            w.state.looked(w.pg.iter().map(|_| 1).collect());
            w.guard_duties(setup);
            true
        });
        if self.from.guard != Mode::Running {
            return;
        }
        if self.setup.pauses {
            self.maintenance_steps();
        }
        self.lock_steps();
        self.server_steps();
    }

    fn maintenance_steps(&mut self) {
        let Some(daemon) = &self.from.daemon else { return };
        let (sees, says, known) = (daemon.sees, daemon.says, self.from.state.maintenance);
        self.step("the daemon sees the key `maintenance` as it is", true, |w, _| {
            let now = w.pause.map(|pause| Pause { noted: false, acknowledged: false, ..pause });
            w.daemon.as_mut().is_some_and(|daemon| std::mem::replace(&mut daemon.sees, now) != now)
        });
        let asked = self.from.net.iter().any(|m| m.awaited && matches!(m.ask, Ask::Suspend { .. } | Ask::Acknowledge { .. }));
        let on = sees.filter(|pause| !pause.ending && !asked && pause.revision > known.revision.0);
        if let Some(Pause { revision, .. }) = on {
            self.step("the daemon asks to suspend", true, |w, _| w.send(Ask::Suspend { revision }, true));
            let by_its_view = self.setup.mutant == Some(Mutant::SuspendedByAnOldView) && !self.from.is_being_promoted();
            self.step("the daemon suspends by what it saw", by_its_view, |w, setup| {
                w.maintain(setup, Maintenance { revision: Revision(revision), suspends: true });
                true
            });
        }
        self.step("the guard hears of it", says.is_some(), |w, setup| {
            let Some(word) = w.daemon.as_mut().and_then(|daemon| daemon.says.take()) else { return false };
            w.maintain(setup, word);
            true
        });
        let ending = sees.filter(|pause| pause.ending);
        if let Some(Pause { revision, .. }) = ending.filter(|pause| pause.revision > known.revision.0) {
            // Overtakes what was on its way.
            self.step("the daemon tells the guard to fence again", true, |w, setup| {
                w.maintain(setup, Maintenance { revision: Revision(revision), suspends: false });
                true
            });
        }
        let without = self.setup.mutant == Some(Mutant::AckBeforeTheGuardFencesAgain);
        let fences = |revision: i64| without || known.revision.0 == revision && !known.suspends;
        if let Some(Pause { revision, .. }) = ending.filter(|pause| fences(pause.revision) && !asked) {
            let state = &self.from.state;
            let proved = state.lock.is_some_and(|lock| at(self.from.now) < lock.deadlines.announce_at);
            self.step("the daemon says that its guard fences again", proved || !state.may_write(), |w, _| {
                w.send(Ask::Acknowledge { revision }, true)
            });
        }
    }

    /// One lock request at a time.
    fn lock_steps(&mut self) {
        let of_lock = |ask: &Ask| !matches!(ask, Ask::Suspend { .. } | Ask::Acknowledge { .. });
        let waiting = self.from.net.iter().any(|message| message.awaited && of_lock(&message.ask));
        let held = self.from.daemon.as_ref().and_then(|daemon| daemon.lock);
        match held {
            None if !waiting => {
                self.step("the daemon asks for the lock", true, |w, _| w.send(Ask::Acquire { lease: NEW_LEASE, sent: w.now }, true));
                let by_name = self.setup.mutant == Some(Mutant::LockAdoptedByName);
                self.step("the daemon adopts the lock that bears its name", by_name, |w, _| {
                    let (Some(lock), Some(daemon)) = (w.lock, &mut w.daemon) else { return false };
                    daemon.lock = Some((lock.epoch, lock.lease));
                    true
                });
            }
            Some((_, lease)) if !waiting => {
                self.step("the daemon renews", true, |w, _| w.send(Ask::Keepalive { lease, sent: w.now }, true));
            }
            _ => {}
        }
        if let Some((epoch, _)) = held {
            self.step("the daemon releases the lock", true, |w, setup| {
                let unsafe_release = setup.mutant == Some(Mutant::ReleaseBeforeTheProofOfDeath);
                let granted = w.state.no_lock(at(w.now), pgherd::types::Epoch(epoch)).is_ok();
                if let Some(daemon) = &mut w.daemon {
                    daemon.lock = None;
                }
                w.net.iter_mut().for_each(|message| message.awaited = false);
                (granted || unsafe_release) && w.send(Ask::Release { epoch }, false)
            });
        }
    }

    /// Orders reach the guard one after the other.
    fn says_nothing(&self) -> bool {
        self.from.daemon.as_ref().is_some_and(|daemon| daemon.says.is_none())
    }

    fn server_steps(&mut self) {
        let starts = [("the daemon starts a standby", Word::Standby), ("the daemon starts a primary", Word::Writable)];
        for (what, word) in starts {
            self.step(what, self.from.pg.is_none() && self.says_nothing(), |w, setup| {
                let granted = w.state.may_start(at(w.now), word).is_ok();
                if granted {
                    if word == Word::Writable {
                        w.learn_fence();
                        w.arm(setup);
                    }
                    w.start(word);
                    w.guard_duties(setup);
                }
                granted
            });
        }
        self.step("the guard acknowledges the word `writable`", self.from.pg.is_some() && self.says_nothing(), |w, setup| {
            let Some(start) = w.pg.as_ref().map(|pg| pg.start) else { return false };
            if w.state.vouch(at(w.now), start, Word::Writable).is_err() {
                return false;
            }
            w.learn_fence();
            w.arm(setup);
            w.daemon.as_mut().is_some_and(|daemon| daemon.vouched.replace(start) != Some(start))
        });
        self.step("the daemon promotes", self.from.pg.is_some(), |w, setup| {
            let vouched = w.daemon.as_ref().and_then(|daemon| daemon.vouched);
            let Some(pg) = w.pg.as_mut().filter(|pg| pg.recovering && !pg.promoted && !pg.stopping && !pg.killed) else { return false };
            let allowed = match setup.mutant {
                Some(Mutant::PromoteBeforeTheWordIsAcknowledged) => w.state.lock.is_some(),
                Some(Mutant::PromoteWhateverRuns) => vouched.is_some(),
                _ => vouched == Some(pg.start),
            };
            pg.promoted = true;
            if allowed && at(w.now) >= w.proved {
                w.violate("I3: a promotion reaches a server whose lock is proved no longer");
            }
            if allowed && !setup.etcd_lies && !w.lock.is_some_and(|lock| lock.by == Who::Us) {
                w.violate("I3: a promotion reaches a server that does not hold the lock");
            }
            allowed
        });
        self.step("the daemon orders a planned stop", self.setup.planned_stops, |w, setup| {
            let now = at(w.now);
            let first = matches!(&w.state.postmaster, Postmaster::Kept(kept) if kept.order == StopOrder::default());
            w.order_stop(setup, StopOrder { fast_at: Some(now), ..StopOrder::default() });
            first
        });
    }
}

impl World {
    fn send(&mut self, ask: Ask, awaited: bool) -> bool {
        self.net.push(Message { ask, answer: None, awaited });
        true
    }

    /// etcd handles a message. `lie`: it says yes to a keepalive of a lease that is gone.
    fn apply(&mut self, setup: &Setup, index: usize, lie: bool) -> bool {
        let until = self.now + setup.ttl;
        let answer = match self.net[index].ask {
            Ask::Acquire { lease, sent } => {
                // The lease was granted when this was sent: the earliest that can be.
                // In maintenance mode only who has written all the while takes it, and anew.
                let writes = self.acks();
                if self.now < sent + setup.ttl && self.lock.is_none() && (self.pause.is_none() || writes) {
                    self.newest += 1;
                    self.leases.push((lease, sent + setup.ttl));
                    self.lock = Some(EtcdLock { epoch: self.newest, lease, by: Who::Us });
                    self.newest
                } else {
                    0
                }
            }
            Ask::Keepalive { lease, .. } => {
                let alive = self.leases.iter_mut().find(|(id, _)| *id == lease).map(|found| found.1 = found.1.max(until)).is_some();
                let strange = lease == STRANGE_LEASE && self.lock.is_some_and(|lock| lock.lease == lease);
                if lie && alive {
                    return false;
                }
                i64::from(alive || strange || lie)
            }
            Ask::Proof { epoch, lease, .. } => i64::from(self.lock.is_some_and(|lock| lock.epoch == epoch && lock.lease == lease)),
            Ask::Suspend { revision } => {
                let found = self.pause.as_mut().filter(|pause| pause.revision == revision && !pause.ending);
                i64::from(found.map(|pause| pause.noted = true).is_some())
            }
            Ask::Acknowledge { revision } => {
                let found = self.pause.as_mut().filter(|pause| pause.revision == revision && pause.ending);
                i64::from(found.map(|pause| pause.acknowledged = true).is_some())
            }
            Ask::Release { epoch } => {
                // A leader's write, and the slowest one can be: nobody waits for it.
                let accepted = |lock: &EtcdLock| lock.epoch == epoch || setup.mutant == Some(Mutant::EpochNotCompared);
                if let Some(lock) = self.lock.take_if(|lock| accepted(lock)) {
                    self.leases.retain(|(id, _)| *id != lock.lease);
                    if epoch < self.newest {
                        self.violate("I4: a write of an old epoch was accepted after one of a newer epoch");
                    }
                }
                1
            }
        };
        let credited =
            matches!(self.net[index].ask, Ask::Keepalive { .. }) && setup.mutant == Some(Mutant::OldAnswerCreditedToANewerRenewal);
        self.net[index].answer = Some(answer);
        if !self.net[index].awaited && !credited {
            self.net.remove(index);
        }
        true
    }

    /// An answer arrives.
    fn hear(&mut self, setup: &Setup, index: usize, answer: i64) -> bool {
        let message = self.net.remove(index);
        let ask = if message.awaited {
            message.ask
        } else {
            // Only a mutant listens to what it has given up waiting for: it takes it for the answer to its newest renewal.
            let renews = |ask: &Ask| matches!(ask, Ask::Keepalive { .. });
            let Some(newest) = self.net.iter().position(|other| other.awaited && renews(&other.ask) && renews(&message.ask)) else {
                return false;
            };
            self.net.remove(newest).ask
        };
        let Some(held) = self.daemon.as_ref().map(|daemon| daemon.lock) else { return false };
        match (ask, held) {
            (Ask::Acquire { lease, sent }, None) if answer > 0 => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.lock = Some((answer, lease));
                }
                self.know(setup, sent);
                self.tell_lock(setup, (answer, lease), sent);
            }
            (Ask::Keepalive { lease, sent }, Some(lock)) if answer > 0 => {
                let claimed = if setup.mutant == Some(Mutant::DeadlineCountedFromTheAnswer) { self.now } else { sent };
                if setup.mutant == Some(Mutant::ProofOmitted) {
                    self.tell_lock(setup, lock, claimed);
                } else {
                    // What was really sent is what the answer was to.
                    let sent = if let Ask::Keepalive { sent, .. } = message.ask { sent } else { sent };
                    self.send(Ask::Proof { epoch: lock.0, lease, claimed, sent }, true);
                }
            }
            (Ask::Proof { claimed, sent, .. }, Some(lock)) if answer > 0 => {
                self.know(setup, sent);
                self.tell_lock(setup, lock, claimed);
            }
            (Ask::Suspend { revision }, _)
                if answer > 0 && (!self.is_being_promoted() || setup.has(Mutant::SuspendedInTheMiddleOfAPromotion)) =>
            {
                if let Some(daemon) = &mut self.daemon {
                    daemon.says = Some(Maintenance { revision: Revision(revision), suspends: true });
                }
            }
            (Ask::Keepalive { .. } | Ask::Proof { .. }, Some(_)) => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.lock = None;
                }
                if !self.state.maintenance.suspends {
                    self.order_stop(setup, StopOrder::at_once(at(self.now)));
                }
            }
            _ => {}
        }
        self.guard_duties(setup);
        true
    }
}
