//! PostgreSQL of one host: the data directory, the postmaster, and processes that outlive it. It starts, recovers, promotes, stops and
//! dies as slowly as the run's faults want; who sends it signals is the guard's and the faults' business.

use std::time::Duration;

use pgherd::facts::synchrony::Names;
use pgherd::policy::rejoin::LeaderLineage;
use pgherd::types::{Lsn, TimelineId};

use super::clock::{Real, ms, us};
use super::gate::Gate;
use super::random::Random;
use super::synchrony::Synchronous;
use super::wal::{Data, RECORD_BYTES};

/// wal_retrieve_retry_interval as pgherd sets it.
pub const RECEIVER_RETRY_MS: u64 = 200;
/// wal_sender_timeout and wal_receiver_timeout as pgherd sets them.
pub const WAL_TIMEOUT_MS: u64 = 15_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reads its WAL; takes no connections yet.
    Starting {
        until: Real,
    },
    Accepting,
    /// Asked to promote.
    Promoting {
        until: Real,
    },
    /// SIGINT: backends are told to end, then comes the shutdown checkpoint.
    Stopping {
        backends_until: Real,
        until: Real,
    },
    /// The shutdown checkpoint is written; walsenders bring it to the standbys.
    Draining {
        until: Real,
    },
    /// SIGQUIT, or a panic.
    Quitting {
        until: Real,
        exit_status: i32,
    },
}

/// The walreceiver of a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    Waiting,
    /// From the postmaster with this pid.
    Streaming {
        from: usize,
        pid: i32,
        /// Its walsender there.
        connection: u64,
        heard: Real,
    },
}

#[derive(Debug, Clone)]
pub struct Postmaster {
    pub pid: i32,
    pub phase: Phase,
    pub recovering: bool,
    pub upstream: Option<usize>,
    /// It asks for its slot there.
    pub by_slot: bool,
    pub receiver: Receiver,
    /// Up to where since the start; zero = nothing was asked for yet.
    pub received: Lsn,
    pub checkpoint_at: Option<Real>,
    /// Its guard is its parent and reaps it.
    pub promoted_by_hand: Option<Real>,
    pub since: Real,
    /// How often it has begun anew after the crash of one of its processes.
    pub startups: u32,
    /// Until then it goes through the WAL that it found; what it found before that is not told.
    pub replays_until: Real,
    /// What its processes make of synchronous_standby_names.
    pub synchronous: Synchronous,
    pub gate: Gate,
    /// What its walreceiver is stuck in, if it is.
    pub stuck_receiver: Option<StuckReceiver>,
}

/// How a walreceiver comes to receive nothing by itself (SAFETY row 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StuckReceiver {
    /// In making its connection.
    Connecting,
    /// It is connected and gets keepalives and nothing else.
    Deaf,
    /// Also another one would be: it takes another postmaster.
    Wedged,
}

impl Postmaster {
    fn of_standby(&self) -> bool {
        self.recovering || self.promoted_by_hand.is_some()
    }
}

/// After SIGKILL, on a host that is not slow.
const DIES_WITHIN_MS: u64 = 8;

/// A process of PostgreSQL whose postmaster is dead.
#[derive(Debug, Clone)]
pub struct Orphan {
    pub writable: bool,
    /// Its server was started as a standby.
    pub of_standby: bool,
    /// When it ends by itself.
    pub until: Real,
    /// In an uninterruptible sleep: neither answers nor dies (SAFETY row 8).
    pub stuck: bool,
}

/// How a postmaster ended, for who waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub pid: i32,
    pub exit_status: Option<i32>,
    pub signal: Option<i32>,
}

/// What the world has to do about a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Accepts,
    Promoted(TimelineId),
    /// The shutdown checkpoint is written.
    ShutDown,
    Ended,
}

/// What may be wrong with the server or its disk.
#[derive(Debug, Clone, Default)]
pub struct Ailments {
    /// Starts fail.
    pub refuses_start: bool,
    /// It ends by itself so long after it takes connections as a primary.
    pub crashes: bool,
    /// Writes panic, and so do starts as a primary (SAFETY row 28).
    pub disk_full: bool,
    /// Everything takes that much longer.
    pub slowness: u32,
    /// A backend is stuck in the kernel.
    pub stuck: bool,
    /// Promotion is refused.
    pub refuses_promotion: bool,
    /// initdb and copies break off.
    pub breaks_copies: bool,
    /// archive_command does not end, and a stop in good order waits for it.
    pub archives_for_ever: bool,
}

#[derive(Debug, Default)]
pub struct Server {
    pub data: Option<Data>,
    pub postmaster: Option<Postmaster>,
    pub orphans: Vec<Orphan>,
    pub ended: Vec<Ended>,
    pub ail: Ailments,
    /// synchronous_standby_names in the file.
    pub names_on_disk: Names,
    /// primary_slot_name in the file is that of its member.
    pub slot_on_disk: bool,
    /// pg_hba.conf as it is in the file lets no client in.
    pub closed_on_disk: bool,
    /// Backends whose postmaster is dead wait for standbys.
    pub orphans_wait: bool,
    next_pid: i32,
}

impl Server {
    fn slow(&self, span: Duration) -> Duration {
        span * (1 + self.ail.slowness)
    }

    /// Spawned by the guard. True = as a standby, by standby.signal.
    pub fn spawn(&mut self, now: Real, random: &mut Random, upstream: Option<usize>) -> i32 {
        self.next_pid += 1;
        let pid = 1_000 + self.next_pid;
        let standby = self.data.as_ref().is_some_and(|data| data.standby_signal);
        let takes = self.slow(random.between(ms(30), ms(150)));
        // Beside what holds the shared memory of its predecessor it gives up before it reads anything.
        if let Some(data) = self.data.as_mut().filter(|_| self.orphans.is_empty()) {
            data.begin_recovery();
        }
        self.postmaster = Some(Postmaster {
            pid,
            phase: Phase::Starting { until: now.after(takes) },
            recovering: standby,
            upstream,
            by_slot: self.slot_on_disk,
            receiver: Receiver::Waiting,
            received: Lsn(0),
            checkpoint_at: None,
            promoted_by_hand: None,
            since: now,
            startups: 0,
            replays_until: now.after(takes),
            synchronous: Synchronous::started(self.names_on_disk.clone()),
            gate: Gate::started(self.closed_on_disk),
            stuck_receiver: None,
        });
        pid
    }

    pub fn is_empty(&self) -> bool {
        self.postmaster.is_none() && self.orphans.is_empty()
    }

    pub fn pids(&self) -> Vec<i32> {
        let orphans = (0..self.orphans.len()).map(|index| 5_000 + index as i32);
        self.postmaster.iter().map(|postmaster| postmaster.pid).chain(orphans).collect()
    }

    pub fn accepting(&self) -> bool {
        self.postmaster.as_ref().is_some_and(|postmaster| matches!(postmaster.phase, Phase::Accepting | Phase::Promoting { .. }))
    }

    pub fn recovering(&self) -> bool {
        self.postmaster.as_ref().is_some_and(|postmaster| postmaster.recovering)
    }

    /// Whatever runs was started as a standby: it is in recovery, or was when its postmaster died, or somebody promoted it by hand and it is
    /// seen with the next probe (P1's limits).
    pub fn of_standby(&self) -> bool {
        self.postmaster.as_ref().is_none_or(Postmaster::of_standby) && self.orphans.iter().all(|orphan| orphan.of_standby)
    }

    /// A process is there that can still answer COMMIT to a client.
    pub fn acknowledges(&self, now: Real) -> bool {
        let by_postmaster = self.postmaster.as_ref().is_some_and(|postmaster| {
            !postmaster.recovering
                && match postmaster.phase {
                    Phase::Accepting => true,
                    Phase::Stopping { backends_until, .. } | Phase::Quitting { until: backends_until, .. } => now < backends_until,
                    Phase::Starting { .. } | Phase::Promoting { .. } | Phase::Draining { .. } => false,
                }
        });
        by_postmaster || self.orphans.iter().any(|orphan| orphan.writable && !orphan.stuck && now < orphan.until)
    }

    /// It is out of recovery.
    pub fn acknowledges_by_itself(&self) -> bool {
        self.postmaster.as_ref().is_some_and(|postmaster| !postmaster.recovering)
    }

    /// What a running server says to a member that asks it before it rejoins.
    pub fn lineage(&self) -> Option<LeaderLineage> {
        let data = self.data.as_ref()?;
        Some(LeaderLineage {
            system_id: data.system_id,
            major_version: 15,
            in_recovery: self.recovering(),
            timeline: data.wal.timeline(),
            history: data.wal.history(),
            lsn: data.wal.end,
            control_timeline: data.wal.timeline_at(data.checkpoint),
            full_page_writes: true,
        })
    }

    pub fn streaming(&self) -> bool {
        self.postmaster.as_ref().is_some_and(|postmaster| matches!(postmaster.receiver, Receiver::Streaming { .. }))
    }

    /// WAL may be had from here, of a standby too.
    pub fn sends(&self) -> bool {
        self.postmaster.as_ref().is_some_and(|postmaster| match postmaster.phase {
            Phase::Accepting => true,
            Phase::Stopping { .. } | Phase::Draining { .. } => !postmaster.recovering,
            Phase::Starting { .. } | Phase::Promoting { .. } | Phase::Quitting { .. } => false,
        })
    }

    /// A client's transaction. None = refused.
    pub fn commit(&mut self, now: Real) -> Option<Lsn> {
        if !self.acknowledges(now) {
            return None;
        }
        self.data.as_mut().map(|data| data.wal.append(RECORD_BYTES))
    }

    /// SIGINT to the postmaster.
    pub fn fast_stop(&mut self, now: Real, random: &mut Random) {
        let (backends, checkpoint) = (self.slow(random.between(us(500), ms(8))), self.slow(random.between(ms(5), ms(60))));
        if let Some(postmaster) = &mut self.postmaster
            && matches!(postmaster.phase, Phase::Starting { .. } | Phase::Accepting | Phase::Promoting { .. })
        {
            let backends_until = if matches!(postmaster.phase, Phase::Accepting) { now.after(backends) } else { now };
            postmaster.phase = Phase::Stopping { backends_until, until: now.after(backends + checkpoint) };
            postmaster.receiver = Receiver::Waiting;
        }
    }

    /// SIGQUIT to the postmaster, which ends with status 0 as after a stop in good order: only the control file tells them apart.
    pub fn immediate_stop(&mut self, now: Real, random: &mut Random) {
        self.quit(now, random, 0);
    }

    /// A panic from which it does not come back by itself.
    pub fn panic(&mut self, now: Real, random: &mut Random) {
        self.quit(now, random, 1);
    }

    fn quit(&mut self, now: Real, random: &mut Random, exit_status: i32) {
        let takes = random.between(us(500), ms(10));
        if let Some(postmaster) = &mut self.postmaster
            && !matches!(postmaster.phase, Phase::Quitting { .. })
        {
            postmaster.phase = Phase::Quitting { until: now.after(takes), exit_status };
        }
    }

    /// SIGKILL to the postmaster alone: busy backends go on for a while.
    pub fn kill_postmaster(&mut self, now: Real, backends_live: Duration) {
        let Some(postmaster) = self.postmaster.take() else { return };
        let was_open = matches!(postmaster.phase, Phase::Accepting | Phase::Promoting { .. } | Phase::Stopping { .. });
        self.ended.push(Ended { pid: postmaster.pid, exit_status: None, signal: Some(9) });
        let writable =
            was_open && !postmaster.recovering && !postmaster.gate.is_closed() && !matches!(postmaster.phase, Phase::Promoting { .. });
        let of_standby = postmaster.of_standby();
        self.orphans_wait = postmaster.synchronous.backends_wait();
        self.orphans.push(Orphan { writable, of_standby, until: now.after(backends_live), stuck: false });
        if self.ail.stuck {
            self.orphans.push(Orphan { writable: false, of_standby, until: Real(u64::MAX / 2), stuck: true });
        }
    }

    /// So long a process that was sent SIGKILL may take.
    pub fn dies_within(&self) -> Duration {
        self.slow(ms(DIES_WITHIN_MS))
    }

    /// SIGKILL to everything that is left. A process is not gone with the signal: its memory has to be given back first, and the lock can
    /// be given back in less.
    pub fn kill_all(&mut self, now: Real, random: &mut Random) {
        let dying = self.slow(random.between(us(100), ms(DIES_WITHIN_MS)));
        if self.postmaster.is_some() {
            self.kill_postmaster(now, dying);
        }
        for orphan in self.orphans.iter_mut().filter(|orphan| !orphan.stuck) {
            orphan.until = orphan.until.min(now.after(dying));
        }
    }

    /// The machine loses power.
    pub fn power_off(&mut self) {
        self.postmaster = None;
        self.orphans.clear();
        self.ended.clear();
        if let Some(half) = self.data.as_mut().and_then(|data| data.half.as_mut()) {
            half.torn = true;
        }
    }

    /// pg_promote. The promotion itself is seen later.
    pub fn promote(&mut self, now: Real, random: &mut Random, by_hand: bool) -> Result<(), &'static str> {
        let takes = self.slow(random.between(ms(20), ms(250)));
        if self.ail.refuses_promotion {
            return Err("promotion is refused");
        }
        let Some(postmaster) = &mut self.postmaster else { return Err("the server is not there") };
        match postmaster.phase {
            Phase::Accepting if postmaster.recovering => {
                postmaster.phase = Phase::Promoting { until: now.after(takes) };
                postmaster.receiver = Receiver::Waiting;
                postmaster.promoted_by_hand = by_hand.then_some(now);
                Ok(())
            }
            Phase::Promoting { .. } => Ok(()),
            _ => Err("the server does not take connections in recovery"),
        }
    }

    /// The next time at which something happens by itself.
    pub fn next_due(&self) -> Option<Real> {
        let by_phase = self.postmaster.as_ref().and_then(|postmaster| match postmaster.phase {
            Phase::Accepting => postmaster.checkpoint_at,
            Phase::Starting { until }
            | Phase::Promoting { until }
            | Phase::Stopping { until, .. }
            | Phase::Draining { until }
            | Phase::Quitting { until, .. } => Some(until),
        });
        let by_orphans = self.orphans.iter().map(|orphan| orphan.until).min();
        [by_phase, by_orphans].into_iter().flatten().min()
    }

    /// What has become due. `drained`: every standby that streams has the shutdown checkpoint.
    pub fn advance(&mut self, now: Real, random: &mut Random, token: &mut u64, drained: impl Fn(&Self) -> bool) -> Option<Change> {
        self.orphans.retain(|orphan| orphan.until > now);
        let slow_checkpoint = self.slow(random.between(ms(50), ms(900)));
        let postmaster = self.postmaster.as_mut()?;
        match postmaster.phase {
            Phase::Starting { until } if until <= now => {
                let primary = !postmaster.recovering;
                if self.ail.refuses_start
                    || (primary && self.ail.disk_full)
                    || !self.orphans.is_empty()
                    || !self.data.as_ref().is_some_and(Data::recovers)
                {
                    return self.end(Some(1));
                }
                postmaster.phase = Phase::Accepting;
                if let Some(data) = self.data.as_mut().filter(|_| primary) {
                    postmaster.gate.recovered(data.wal.end, postmaster.since);
                    data.open();
                    (data.unarchived, data.archive_tries) = (1, 0);
                }
                if primary && self.ail.crashes {
                    postmaster.checkpoint_at = Some(now.after(ms(200)));
                }
                Some(Change::Accepts)
            }
            Phase::Accepting if postmaster.checkpoint_at.is_some_and(|at| at <= now) => {
                postmaster.checkpoint_at = None;
                if self.ail.crashes && !postmaster.recovering {
                    return self.end(None);
                }
                if let Some(data) = &mut self.data {
                    data.make_checkpoint();
                }
                None
            }
            Phase::Promoting { until } if until <= now => {
                *token += 1;
                postmaster.recovering = false;
                postmaster.phase = Phase::Accepting;
                postmaster.checkpoint_at = Some(now.after(slow_checkpoint));
                let data = self.data.as_mut()?;
                if let Some(at) = &mut postmaster.promoted_by_hand {
                    *at = now;
                }
                let timeline = data.next_timeline();
                data.promote(timeline, *token);
                Some(Change::Promoted(timeline))
            }
            Phase::Stopping { until, .. } if until <= now => {
                if self.ail.stuck {
                    // A backend that cannot die holds up the stop for as long as it is there.
                    postmaster.phase = Phase::Stopping { backends_until: now, until: now.after(ms(100)) };
                    return None;
                }
                let data = self.data.as_mut()?;
                data.shut_down();
                if postmaster.recovering {
                    return self.end(Some(0));
                }
                postmaster.phase = Phase::Draining { until: now.after(ms(1)) };
                postmaster.since = now;
                Some(Change::ShutDown)
            }
            Phase::Draining { until } if until <= now => {
                let since = postmaster.since;
                let sent = drained(self) || now.since(since) >= ms(WAL_TIMEOUT_MS);
                if sent && !self.ail.archives_for_ever {
                    return self.end(Some(0));
                }
                if let Some(postmaster) = &mut self.postmaster {
                    postmaster.phase = Phase::Draining { until: now.after(ms(20)) };
                }
                None
            }
            Phase::Quitting { until, exit_status } if until <= now => {
                if self.ail.stuck {
                    // The postmaster waits 5 s and then kills; what is stuck stays.
                    self.kill_postmaster(now, us(100));
                    return Some(Change::Ended);
                }
                self.end(Some(exit_status))
            }
            _ => None,
        }
    }

    fn end(&mut self, exit_status: Option<i32>) -> Option<Change> {
        let postmaster = self.postmaster.take()?;
        let signal = exit_status.is_none().then_some(6);
        self.ended.push(Ended { pid: postmaster.pid, exit_status, signal });
        Some(Change::Ended)
    }
}
