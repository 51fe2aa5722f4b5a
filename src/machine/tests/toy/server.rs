//! A toy host: a data directory with a WAL, a postmaster, and the guard that keeps it.
//!
//! WAL is a list of segments, each with a token for the promotion that began it: two servers that promoted to one id have histories that
//! look alike and are not (SAFETY row 53).

use crate::clock::BootTime;
use crate::facts::guard::{GuardFacts, LastEnd, LockFacts, Maintenance, PostmasterFacts, Rung, StartId, Word};
use crate::facts::postgres::{ControlFacts, DataDirectory, DatabaseState, Probe, ProbeOutcome, ReplicaFacts, SqlFacts, WalReceiverFacts};
use crate::machine::action::StopMode;
use crate::machine::tests::fixtures::{control, ms, sql};
use crate::policy::deadlines::{Deadlines, LeaseTimes};
use crate::policy::rejoin::promoted_by_hand;
use crate::types::{Epoch, LeaseIdentity, LockIdentity, Lsn, MemberName, SystemId, TimelineId};

/// From the start of a postmaster to its first connection.
const START_MS: u64 = 60;
/// A stop in good order.
const FAST_STOP_MS: u64 = 40;
/// An end by signals.
const KILL_MS: u64 = 10;
/// A shutdown checkpoint's record.
const CHECKPOINT_BYTES: u64 = 120;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) timeline: TimelineId,
    pub(crate) start: Lsn,
    pub(crate) token: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Data {
    pub(crate) system_id: SystemId,
    pub(crate) wal: Vec<Segment>,
    pub(crate) end: Lsn,
    pub(crate) checkpoint: Lsn,
    pub(crate) state: DatabaseState,
    pub(crate) standby_signal: bool,
    pub(crate) backup_label: bool,
    /// The member's own record of its last promotion.
    pub(crate) promoted: Option<(TimelineId, Epoch)>,
}

impl Data {
    pub(crate) fn timeline(&self) -> TimelineId {
        self.wal.last().map_or(TimelineId(0), |segment| segment.timeline)
    }

    /// PostgreSQL would go on with the other's WAL: it compares numbers and positions, and knows nothing of who promoted.
    pub(crate) fn seems_in_the_past_of(&self, other: &Data) -> bool {
        let anybodys =
            |data: &Data| Data { wal: data.wal.iter().map(|segment| Segment { token: 0, ..segment.clone() }).collect(), ..data.clone() };
        anybodys(self).is_in_the_past_of(&anybodys(other))
    }

    /// All of this WAL is in the other's past.
    pub(crate) fn is_in_the_past_of(&self, other: &Data) -> bool {
        let known = self.wal.len();
        let same = other.wal.len() >= known && self.wal.iter().zip(&other.wal).all(|(mine, theirs)| mine == theirs);
        same && self.system_id == other.system_id && self.end <= other.wal.get(known).map_or(other.end, |next| next.start)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Process {
    None,
    Running { start: StartId, word: Word, accepting_at: BootTime, in_recovery: bool },
    Ending { start: StartId, rung: Rung, until: BootTime, clean: bool, was_recovering: bool },
}

#[derive(Debug, Clone)]
pub(crate) struct ToyGuard {
    pub(crate) pid: i32,
    pub(crate) lease: Option<LeaseIdentity>,
    pub(crate) lock: Option<(LockIdentity, Deadlines)>,
    given_up: Option<Epoch>,
    maintenance: Maintenance,
    /// Does not answer, though alive: no acknowledgement, no ladder.
    pub(crate) frozen: bool,
}

pub(crate) struct Server {
    pub(crate) data: Option<Data>,
    pub(crate) process: Process,
    pub(crate) upstream: Option<MemberName>,
    pub(crate) streaming: bool,
    pub(crate) guard: Option<ToyGuard>,
    last: Option<LastEnd>,
    pub(crate) starts: u64,
    next_pid: i32,
    pub(crate) sequence: u64,
    /// It ends by itself so long after each start as a primary.
    pub(crate) crashes: bool,
    pub(crate) promoted_by_hand: bool,
    /// synchronous_standby_names.
    pub(crate) names: String,
}

impl Server {
    pub(crate) fn new() -> Self {
        let mut server = Server {
            data: None,
            process: Process::None,
            upstream: None,
            streaming: false,
            guard: None,
            last: None,
            starts: 0,
            next_pid: 100,
            sequence: 0,
            crashes: false,
            promoted_by_hand: false,
            names: String::new(),
        };
        server.new_guard();
        server
    }

    pub(crate) fn new_guard(&mut self) {
        self.next_pid += 1;
        self.last = None;
        self.sequence += 1;
        self.guard = Some(ToyGuard {
            pid: self.next_pid,
            lease: None,
            lock: None,
            given_up: None,
            maintenance: Maintenance::default(),
            frozen: false,
        });
    }

    pub(crate) fn accepting(&self, now: BootTime) -> bool {
        matches!(self.process, Process::Running { accepting_at, .. } if now >= accepting_at)
    }

    pub(crate) fn in_recovery(&self) -> bool {
        matches!(self.process, Process::Running { in_recovery: true, .. })
    }

    /// Could acknowledge a commit now.
    pub(crate) fn acknowledges(&self, now: BootTime) -> bool {
        match self.process {
            Process::Running { in_recovery, .. } => !in_recovery && self.accepting(now),
            // Backends outlive the order to end.
            Process::Ending { was_recovering, .. } => !was_recovering,
            Process::None => false,
        }
    }

    pub(crate) fn facts(&self) -> Option<GuardFacts> {
        let guard = self.guard.as_ref().filter(|guard| !guard.frozen)?;
        let postmaster = match self.process {
            Process::None => PostmasterFacts::ProvedEmpty { last: self.last },
            Process::Running { start, word, .. } => PostmasterFacts::Running { start, pid: 4000, word, adopted: false },
            Process::Ending { start, rung, was_recovering, .. } => {
                PostmasterFacts::Ending { start, rung, word: if was_recovering { Word::Standby } else { Word::Writable } }
            }
        };
        let lock = guard.lock.map(|(identity, d)| LockFacts { identity, valid_until: d.valid_until, announce_at: d.announce_at });
        Some(GuardFacts {
            sequence: self.sequence,
            pid: guard.pid,
            postmaster,
            lease: guard.lease,
            lock,
            daemon_crashes: 0,
            crash_loop: false,
            maintenance: guard.maintenance,
            conditions: Vec::new(),
        })
    }

    /// The guard learns a new proof. False = it does not answer.
    pub(crate) fn acknowledge(&mut self, lock: LockIdentity, sent: BootTime, times: LeaseTimes) -> bool {
        let Some(guard) = self.guard.as_mut().filter(|guard| !guard.frozen) else { return false };
        guard.lock = Some((lock, times.deadlines(sent)));
        self.sequence += 1;
        true
    }

    pub(crate) fn maintain(&mut self, word: Maintenance) {
        let Some(guard) = self.guard.as_mut().filter(|guard| !guard.frozen && guard.maintenance.revision <= word.revision) else { return };
        guard.maintenance = word;
        self.sequence += 1;
    }

    pub(crate) fn suspends(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.maintenance.suspends)
    }

    pub(crate) fn forget_lock(&mut self, epoch: Epoch) {
        let may_write = matches!(self.process, Process::Running { word: Word::Writable, .. } | Process::Ending { .. });
        let Some(guard) = self.guard.as_mut().filter(|guard| !guard.frozen && !may_write) else { return };
        if guard.lock.is_some_and(|(known, _)| known.epoch == epoch) {
            guard.lock = None;
            guard.given_up = Some(epoch);
            self.sequence += 1;
        }
    }

    fn lock_allows_writing(&self, now: BootTime) -> bool {
        let held = |guard: &ToyGuard| guard.lock.is_some_and(|(_, deadlines)| now < deadlines.announce_at);
        self.guard.as_ref().is_some_and(|guard| !guard.frozen && !guard.maintenance.suspends && held(guard))
    }

    pub(crate) fn start(&mut self, now: BootTime, word: Word, upstream: Option<MemberName>) -> Result<StartId, String> {
        if self.guard.as_ref().is_none_or(|guard| guard.frozen) {
            return Err("no guard answers".to_owned());
        }
        if self.process != Process::None {
            return Err("a server is there already".to_owned());
        }
        if word == Word::Writable && !self.lock_allows_writing(now) {
            return Err("no lock allows it".to_owned());
        }
        let found = self.look();
        let Some(data) = &mut self.data else { return Err("no data directory".to_owned()) };
        let in_recovery = word == Word::Standby;
        if let DataDirectory::Full(control) = found
            && let Some(timeline) = promoted_by_hand(&control).filter(|_| in_recovery)
        {
            data.promoted = Some((timeline, Epoch::BY_HAND));
        }
        data.standby_signal = in_recovery;
        data.backup_label = false;
        data.state = if in_recovery { DatabaseState::InArchiveRecovery } else { DatabaseState::InProduction };
        self.upstream = upstream;
        self.starts += 1;
        let start = StartId(self.starts);
        self.process = Process::Running { start, word, accepting_at: now + ms(START_MS), in_recovery };
        self.sequence += 1;
        Ok(start)
    }

    /// Asks for promotion; the guard has to agree first.
    pub(crate) fn promote(&mut self, now: BootTime, epoch: Epoch, timeline: TimelineId, token: u64) -> Result<(), String> {
        let allowed = self.lock_allows_writing(now);
        let Process::Running { in_recovery: true, word, .. } = &mut self.process else { return Err("not in recovery".to_owned()) };
        if !allowed {
            return Err("the guard does not allow it".to_owned());
        }
        *word = Word::Writable;
        self.sequence += 1;
        if let Some(data) = &mut self.data {
            data.promoted = Some((timeline, epoch));
        }
        self.leave_recovery(timeline, token);
        Ok(())
    }

    pub(crate) fn leave_recovery(&mut self, timeline: TimelineId, token: u64) {
        if let (Process::Running { in_recovery, .. }, Some(data)) = (&mut self.process, &mut self.data) {
            *in_recovery = false;
            data.wal.push(Segment { timeline, start: data.end, token });
            data.state = DatabaseState::InProduction;
            data.standby_signal = false;
        }
        self.streaming = false;
    }

    pub(crate) fn order_stop(&mut self, now: BootTime, mode: StopMode) {
        if self.guard.as_ref().is_some_and(|guard| !guard.frozen) {
            match mode {
                StopMode::Fast { .. } => self.end(now, Rung::FastStop),
                StopMode::Kill => self.end(now, Rung::KillAll),
            }
        }
    }

    pub(crate) fn end(&mut self, now: BootTime, rung: Rung) {
        let (start, was_recovering) = match self.process {
            Process::None => return,
            Process::Running { start, in_recovery, .. } => (start, in_recovery),
            Process::Ending { start, was_recovering, rung: already, .. } if already < rung => (start, was_recovering),
            Process::Ending { .. } => return,
        };
        let clean = rung == Rung::FastStop;
        let takes = if clean { FAST_STOP_MS } else { KILL_MS };
        self.process = Process::Ending { start, rung, until: now + ms(takes), clean, was_recovering };
        self.sequence += 1;
    }

    /// Ends by itself, at once: a crash, or the host's power.
    pub(crate) fn crash(&mut self, now: BootTime) {
        if let Process::Running { start, .. } | Process::Ending { start, .. } = self.process {
            self.ended(now, start, None, false);
        }
    }

    /// `pg_ctl stop`: in good order, and by nobody's order whom the daemon knows.
    pub(crate) fn stopped_by_hand(&mut self, now: BootTime) {
        if let Process::Running { start, .. } = self.process {
            if let Some(data) = &mut self.data {
                data.checkpoint = data.end;
                data.state = DatabaseState::ShutDown;
            }
            self.ended(now, start, None, true);
        }
    }

    fn ended(&mut self, now: BootTime, start: StartId, rung: Option<Rung>, clean: bool) {
        self.process = Process::None;
        self.streaming = false;
        self.promoted_by_hand = false;
        self.sequence += 1;
        self.last = Some(LastEnd { start, exit_status: clean.then_some(0), signal: (!clean).then_some(9), rung, at: now });
    }

    /// The guard's ladder, and ends that are due. Returns where a clean shutdown of a primary ended its WAL.
    pub(crate) fn tick(&mut self, now: BootTime) -> Option<Lsn> {
        if let Process::Running { word: Word::Writable, accepting_at, in_recovery, .. } = self.process {
            let fast_stop_at = self.guard.as_ref().filter(|guard| !guard.frozen).map(|guard| guard.lock.map(|(_, d)| d.fast_stop_at));
            match fast_stop_at {
                Some(at) if at.is_none_or(|at| now >= at) && !self.suspends() => self.end(now, Rung::FastStop),
                _ if self.crashes && !in_recovery && now >= accepting_at + ms(200) => self.crash(now),
                _ => {}
            }
        }
        let Process::Ending { start, rung, until, clean, was_recovering } = self.process else { return None };
        if now < until {
            return None;
        }
        let mut shut_down = None;
        if let Some(data) = self.data.as_mut().filter(|_| clean) {
            data.checkpoint = data.end;
            data.state = if was_recovering { DatabaseState::ShutDownInRecovery } else { DatabaseState::ShutDown };
            if !was_recovering {
                data.end = Lsn(data.end.0 + CHECKPOINT_BYTES);
                shut_down = Some(data.end);
            }
        }
        self.ended(now, start, Some(rung), clean);
        shut_down
    }

    pub(crate) fn look(&self) -> DataDirectory {
        let Some(data) = &self.data else { return DataDirectory::Empty };
        let facts = control(data.state, data.timeline().0, data.checkpoint.0);
        let recovering = matches!(data.state, DatabaseState::ShutDownInRecovery | DatabaseState::InArchiveRecovery);
        DataDirectory::Full(ControlFacts {
            system_id: data.system_id,
            min_recovery_end: if recovering { data.end } else { Lsn(0) },
            min_recovery_timeline: if recovering { data.timeline() } else { TimelineId(0) },
            standby_signal: data.standby_signal,
            backup_label: data.backup_label,
            promoted: data.promoted,
            ..facts
        })
    }

    pub(crate) fn probe(&self, begun: BootTime, replicas: Vec<ReplicaFacts>) -> Probe {
        let outcome = match (&self.process, &self.data) {
            (Process::Running { in_recovery, .. }, Some(data)) if self.accepting(begun) => {
                let status = if self.streaming { "streaming" } else { "waiting" };
                let walreceiver =
                    WalReceiverFacts { status: status.to_owned(), sender_host: None, sender_port: None, latest_end_lsn: None };
                ProbeOutcome::Accepting(Box::new(SqlFacts {
                    system_id: data.system_id,
                    walreceiver: in_recovery.then_some(walreceiver),
                    replicas,
                    synchronous_standby_names: self.names.clone(),
                    ..sql(*in_recovery, data.timeline().0, data.end.0)
                }))
            }
            (Process::Running { .. }, _) => ProbeOutcome::NotYet("the database system is starting up".to_owned()),
            _ => ProbeOutcome::Unknown("connection refused".to_owned()),
        };
        Probe { begun, outcome }
    }
}
