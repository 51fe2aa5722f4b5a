//! A world of one host for the exhaustive exploration: etcd, the network, one daemon, the guard, PostgreSQL, a watchdog, a stranger.
//!
//! The rules under test are the crate's own: [`GuardState`], [`decide`], [`may_feed`], [`LeaseTimes`]. Everything else here is as unkind
//! as it may be: a message is applied at any later time or never, its answer comes at any later time or never, and the daemon is as slow
//! as it likes between any two steps (which covers its being frozen). Only what DESIGN calls a duty is done before time goes on.
//!
//! One step of time is a second; deadlines are met at the first whole second after them.

use std::time::Duration;

use pgherd::clock::BootTime;
use pgherd::facts::guard::{Maintenance, Rung, StartId, Word};
use pgherd::guard::ladder::decide;
use pgherd::guard::protocol::StopOrder;
use pgherd::guard::state::{GuardState, Postmaster};
use pgherd::policy::deadlines::{Deadlines, FeedRefusal, LeaseTimes, WatchdogState, may_feed, usable_watchdog_timeout};
use pgherd::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, Revision};

/// A deliberate bug. Each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    DeadlineCountedFromTheAnswer,
    OldAnswerCreditedToANewerRenewal,
    ProofOmitted,
    LockAdoptedByName,
    ReleaseBeforeTheProofOfDeath,
    DeathOfThePostmasterTakenForProof,
    PromoteBeforeTheWordIsAcknowledged,
    PromoteWhateverRuns,
    EpochNotCompared,
    DaemonTrustsASilentGuard,
    FeedWithoutCheck,
    FeedRuleWithOneTimeout,
    DisarmBeforeTheStop,
    AckBeforeTheGuardFencesAgain,
    SuspendedByAnOldView,
    LockTakenBesideMaintenance,
    LateWordTakenByTheGuard,
    SuspendedInTheMiddleOfAPromotion,
}

/// Which faults there are.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub ttl: u64,
    pub watchdog: bool,
    /// Another member under our name takes the lock whenever it can, and renews our lease.
    pub stranger: bool,
    /// A message that the daemon has given up waiting for, or that outlives it, may still be handled.
    pub late_messages: bool,
    /// etcd loses leases early, answers keepalives of dead ones with yes, and a person deletes the lock.
    pub etcd_lies: bool,
    /// The daemon stops PostgreSQL in good order now and then.
    pub planned_stops: bool,
    /// The daemon is killed, again and again.
    pub daemon_dies: bool,
    /// The guard is frozen and killed, again and again.
    pub guard_fails: bool,
    /// A person sets maintenance mode and ends it, once.
    pub pauses: bool,
    pub mutant: Option<Mutant>,
}

impl Setup {
    pub fn times(&self) -> LeaseTimes {
        let mut times = LeaseTimes::new(Duration::from_secs(self.ttl));
        times.watchdog = self.watchdog.then(|| usable_watchdog_timeout(times.ttl, times.safety_margin).unwrap());
        assert_eq!(times.validate(), Ok(()));
        times
    }

    pub fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Us,
    /// Another member that calls itself by our name, and leads as soon as it has the lock.
    Stranger,
}

/// The stranger's lease.
pub const STRANGE_LEASE: i64 = 1;

#[derive(Debug, Clone, Copy)]
pub struct EtcdLock {
    pub epoch: i64,
    pub lease: i64,
    pub by: Who,
}

/// The key `maintenance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    /// Its mod revision.
    pub revision: i64,
    /// A person has ended it: it stays until this member has said that its guard fences again.
    pub ending: bool,
    /// etcd has a note that our guard may suspend: it has to be heard of before the key goes.
    pub noted: bool,
    pub acknowledged: bool,
}

/// Revisions of the key that there are at most: set, and ended.
pub const PAUSES_MAX: i64 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    /// Registers that the guard is about to suspend, if the key is still as it was seen.
    Suspend {
        revision: i64,
    },
    /// Says that the guard fences again, as of that revision of the key.
    Acknowledge {
        revision: i64,
    },
    Acquire {
        lease: i64,
        sent: u64,
    },
    Keepalive {
        lease: i64,
        sent: u64,
    },
    Proof {
        epoch: i64,
        lease: i64,
        claimed: u64,
        sent: u64,
    },
    Release {
        epoch: i64,
    },
}

#[derive(Debug, Clone, Copy)]
pub struct Message {
    pub ask: Ask,
    /// Set when etcd has handled it: 0 is no, an epoch or 1 is yes.
    pub answer: Option<i64>,
    /// The daemon still waits for it.
    pub awaited: bool,
}

#[derive(Debug, Clone, Default)]
pub struct Daemon {
    pub lock: Option<(i64, i64)>,
    /// The start that the guard has its word for.
    pub vouched: Option<StartId>,
    /// A of the last acknowledged proof: when a guard that stays silent is given up.
    pub fence_at: Option<BootTime>,
    /// The key `maintenance` as it was seen last.
    pub sees: Option<Pause>,
    /// A word to the guard that is on its way, and overtaken by none that comes after it; only a mutant's guard minds.
    pub says: Option<Maintenance>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Running,
    Frozen,
    Dead,
}

#[derive(Debug, Clone)]
pub struct Pg {
    pub start: StartId,
    pub recovering: bool,
    pub promoted: bool,
    /// The postmaster itself lives. Its backends do until `pg` is None.
    pub postmaster: bool,
    pub stopping: bool,
    /// SIGKILL was sent to all: nobody answers any more, but who is in uninterruptible sleep is still there.
    pub killed: bool,
}

#[derive(Debug, Clone)]
pub struct World {
    pub now: u64,
    pub lock: Option<EtcdLock>,
    pub leases: Vec<(i64, u64)>,
    /// The newest epoch there was.
    pub newest: i64,
    pub pause: Option<Pause>,
    /// The newest revision of the key `maintenance`.
    pub paused: i64,
    pub net: Vec<Message>,
    pub daemon: Option<Daemon>,
    pub guard: Mode,
    pub state: GuardState,
    pub fed: Option<WatchdogState>,
    /// The guard was frozen between its check and its feed.
    pub mid_feed: bool,
    pub fires_at: Option<u64>,
    pub pg: Option<Pg>,
    /// The observer's E: of the last keepalive that etcd handled, that was proved afterwards, and that the daemon got to know of. Counted
    /// from when it was really sent, whatever the daemon believes.
    pub proved: BootTime,
    pub violated: Option<String>,
}

pub fn at(second: u64) -> BootTime {
    BootTime((1_000 + second) * 1_000_000_000)
}

pub fn identity((epoch, lease): (i64, i64)) -> LockIdentity {
    LockIdentity { lease: LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(lease) }, epoch: Epoch(epoch) }
}

impl World {
    pub fn new() -> Self {
        Self {
            now: 0,
            lock: None,
            leases: Vec::new(),
            newest: 0,
            pause: None,
            paused: 0,
            net: Vec::new(),
            daemon: Some(Daemon::default()),
            guard: Mode::Running,
            state: GuardState::default(),
            fed: None,
            mid_feed: false,
            fires_at: None,
            pg: None,
            proved: BootTime(0),
            violated: None,
        }
    }

    pub fn acks(&self) -> bool {
        self.pg.as_ref().is_some_and(|pg| !pg.recovering && !pg.killed)
    }

    pub fn violate(&mut self, what: impl Into<String>) {
        self.violated.get_or_insert(what.into());
    }

    /// The pause is over and has left nothing behind: what can happen from here is explored where nobody pauses.
    pub fn is_as_if_nobody_had_paused(&self) -> bool {
        let asks = |message: &Message| matches!(message.ask, Ask::Suspend { .. } | Ask::Acknowledge { .. });
        let idle = self.daemon.as_ref().is_none_or(|daemon| daemon.says.is_none() && daemon.sees.is_none());
        self.paused == PAUSES_MAX && self.pause.is_none() && !self.state.maintenance.suspends && idle && !self.net.iter().any(asks)
    }

    /// The guard has the word for a server that is in recovery yet.
    pub fn is_being_promoted(&self) -> bool {
        self.state.may_write() && self.pg.as_ref().is_some_and(|pg| pg.recovering)
    }

    /// What must hold at every instant.
    pub fn check(&mut self, setup: &Setup) {
        let now = at(self.now);
        let suspended = self.state.maintenance.suspends && self.pause.is_some();
        if self.acks() && now >= self.proved && !suspended {
            self.violate("I2: PostgreSQL acknowledges and its lock is proved no longer");
        }
        if self.acks() && !setup.etcd_lies && self.lock.is_some_and(|lock| lock.by == Who::Stranger) {
            self.violate("I1: PostgreSQL acknowledges and another member leads");
        }
        // Also a server that was killed and is still there: the guard does not know better.
        let may_write = self.pg.as_ref().is_some_and(|pg| !pg.recovering);
        if setup.watchdog && may_write && self.guard != Mode::Dead {
            let limit = self.proved.before(setup.times().safety_margin);
            match self.fires_at {
                None => self.violate("I12: PostgreSQL can write and the watchdog is not armed"),
                Some(fires_at) if at(fires_at) > limit => self.violate("I12: the reset would come later than E - M"),
                Some(_) => {}
            }
        }
    }

    /// One second passes, and everybody who runs does what is due.
    pub fn tick(&mut self, setup: &Setup) {
        self.now += 1;
        if self.fires_at.is_some_and(|fires_at| self.now >= fires_at) {
            self.reset_machine();
        }
        self.guard_duties(setup);
        self.daemon_duties(setup);
    }

    fn reset_machine(&mut self) {
        (self.pg, self.daemon, self.guard) = (None, None, Mode::Dead);
        (self.fed, self.fires_at, self.mid_feed) = (None, None, false);
        self.net.iter_mut().for_each(|message| message.awaited = false);
    }

    /// The guard's loop: clock check, ladder, proof of death, watchdog.
    pub fn guard_duties(&mut self, setup: &Setup) {
        if self.guard != Mode::Running {
            return;
        }
        let now = at(self.now);
        self.state.check_clock(now);
        self.learn_of_ends(setup);
        while let Some(rung) = decide(now, &self.state).climb {
            if let Some(pg) = &mut self.pg {
                pg.stopping = true;
                pg.killed |= rung == Rung::KillAll;
            }
            self.state.climbed(rung);
            if rung == Rung::KillAll {
                break;
            }
        }
        self.feed(setup);
        let disarm_early =
            setup.has(Mutant::DisarmBeforeTheStop) && matches!(&self.state.postmaster, Postmaster::Kept(kept) if kept.climbed.is_some());
        if self.state.is_empty() || disarm_early {
            (self.fed, self.fires_at) = (None, None);
        }
    }

    fn learn_of_ends(&mut self, setup: &Setup) {
        let now = at(self.now);
        match &self.pg {
            None => {
                self.state.postmaster_ended(now, Some(0), None);
                self.state.proved_empty(now);
            }
            Some(pg) if !pg.postmaster => {
                self.state.postmaster_ended(now, None, Some(9));
                if setup.has(Mutant::DeathOfThePostmasterTakenForProof) {
                    self.state.proved_empty(now);
                }
            }
            Some(_) => {}
        }
    }

    fn feed(&mut self, setup: &Setup) {
        let Some(dog) = self.fed else { return };
        let times = setup.times();
        let deadlines: Option<Deadlines> = self.state.lock.map(|lock| lock.deadlines);
        let lock = deadlines.as_ref().map(|deadlines| (deadlines, &times));
        let mut allowed = may_feed(at(self.now), &dog, lock, !self.state.may_write());
        let once = deadlines.is_some_and(|d| dog.fed_at + dog.timeout <= d.valid_until.before(times.safety_margin));
        if setup.has(Mutant::FeedRuleWithOneTimeout) && once && allowed == Err(FeedRefusal::PastTheLock) {
            allowed = Ok(());
        }
        if allowed.is_ok() || setup.has(Mutant::FeedWithoutCheck) {
            self.fed = Some(WatchdogState { fed_at: at(self.now), ..dog });
            self.fires_at = Some(self.now + dog.timeout.as_secs());
        } else if allowed == Err(FeedRefusal::Late)
            && let Some(pg) = &mut self.pg
        {
            pg.killed = true;
        }
    }

    /// A feed that was checked before a freeze reaches the device after it.
    pub fn late_feed(&mut self) {
        if std::mem::take(&mut self.mid_feed) {
            self.fires_at = self.fed.map(|dog| self.now + dog.timeout.as_secs());
        }
    }

    pub fn arm(&mut self, setup: &Setup) {
        if let (Some(timeout), None) = (setup.times().watchdog, self.fed) {
            self.fed = Some(WatchdogState { timeout, fed_at: at(self.now) });
            self.fires_at = Some(self.now + timeout.as_secs());
        }
    }

    /// A guard that is dead, or silent until A: the daemon fences by scan itself, and holds nothing any more.
    pub fn daemon_duties(&mut self, setup: &Setup) {
        let Some(daemon) = &mut self.daemon else { return };
        let silent = self.guard == Mode::Frozen && daemon.fence_at.is_some_and(|at_a| at(self.now) >= at_a);
        if (self.guard == Mode::Dead || silent) && !setup.has(Mutant::DaemonTrustsASilentGuard) {
            *daemon = Daemon::default();
            if let Some(pg) = &mut self.pg {
                pg.killed = true;
            }
            self.net.iter_mut().for_each(|message| message.awaited = false);
        }
    }

    /// The daemon knows of a proof.
    pub fn know(&mut self, setup: &Setup, sent: u64) {
        self.proved = self.proved.max(setup.times().deadlines(at(sent)).valid_until);
    }

    /// The guard hears of it.
    pub fn tell_lock(&mut self, setup: &Setup, lock: (i64, i64), sent: u64) {
        let times = setup.times();
        let acknowledged = self.state.lock(at(self.now), identity(lock), at(sent), times).is_ok();
        if acknowledged {
            self.learn_fence();
        }
    }

    /// Every `done` of the guard carries its facts: A is among them.
    pub fn learn_fence(&mut self) {
        if let (Some(daemon), Some(lock)) = (&mut self.daemon, &self.state.lock) {
            daemon.fence_at = Some(lock.deadlines.announce_at);
        }
    }

    /// The guard hears a word on maintenance mode.
    pub fn maintain(&mut self, setup: &Setup, word: Maintenance) {
        if setup.has(Mutant::LateWordTakenByTheGuard) {
            self.state.maintenance.revision = Revision(0);
        }
        // A stale one is refused.
        let _ = self.state.maintain(at(self.now), word);
        self.guard_duties(setup);
    }

    pub fn start(&mut self, word: Word) {
        let start = self.state.started(1, word, false);
        let recovering = word == Word::Standby;
        self.pg = Some(Pg { start, recovering, promoted: false, postmaster: true, stopping: false, killed: false });
    }

    pub fn order_stop(&mut self, setup: &Setup, order: StopOrder) {
        self.state.stop(at(self.now), order);
        self.guard_duties(setup);
    }
}
