//! The guard's loop: waits, looks at the clock, performs the rung that is due, and only then listens to anybody.
//!
//! It decides nothing that [`super::state`] and [`super::ladder`] do not decide, waits for nothing but its one `poll`, reads and writes
//! no disk (the socket is in the run directory), and holds nothing that a frozen daemon could block.
//!
//! The rule that would surprise: wake-ups come from a timer on CLOCK_BOOTTIME, not from `poll`'s timeout, which stands still in suspend.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getuid};

use super::child::CoreLimit;
use super::connection::{Connection, Standing};
use super::ladder::{self, KILL_AGAIN_MS};
use super::log::Log;
use super::protocol::{Request, Response, StopOrder};
use super::scan;
use super::state::{GuardState, Postmaster};
use super::sys;
use crate::clock::BootTime;
use crate::facts::guard::{GuardFacts, Rung};

/// Most connections at one time.
const CONNECTIONS_MAX: usize = 32;
/// Most conditions that are told.
const CONDITIONS_MAX: usize = 16;
/// After SIGTERM: from the fast stop to the immediate one, unless a lock's ladder is earlier.
const TERM_IMMEDIATE_MS: u64 = 30_000;
/// After SIGTERM: from the fast stop to SIGKILL.
const TERM_KILL_MS: u64 = 60_000;

/// The daemon, as long as it has not said goodbye.
pub(super) struct Owner {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// The guard and all it holds.
pub struct Guard {
    pub(super) run_dir: PathBuf,
    pub(super) data_dir: PathBuf,
    pub(super) state: GuardState,
    pub(super) owner: Option<Owner>,
    pub(super) adopted: Option<OwnedFd>,
    pub(super) notes: Option<File>,
    pub(super) core: Option<CoreLimit>,
    pub(super) listener: UnixListener,
    /// Held for as long as this guard lives: there is one guard to a run directory.
    pub(super) flock: OwnedFd,
    pub(super) connections: BTreeMap<u64, Connection>,
    pub(super) sequence: u64,
    pub(super) conditions: Vec<String>,
    /// Ends once it is proved that nothing is left.
    pub(super) ending: bool,
    pub(super) log: Log,
    told: Option<GuardFacts>,
    signals: SignalFd,
    timer: TimerFd,
    next_connection: u64,
    no_children: bool,
}

/// What a descriptor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Timer,
    Listener,
    Owner,
    Adopted,
    Notes,
    Connection(u64),
}

impl Guard {
    /// A guard that holds `flock` and listens.
    ///
    /// # Errors
    /// When the kernel has no timer on CLOCK_BOOTTIME.
    pub fn new(
        (run_dir, data_dir): (PathBuf, PathBuf),
        state: GuardState,
        (listener, flock): (UnixListener, OwnedFd),
        signals: SignalFd,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        Ok(Self {
            run_dir,
            data_dir,
            state,
            owner: None,
            adopted: None,
            notes: None,
            core: None,
            listener,
            flock,
            connections: BTreeMap::new(),
            sequence: 0,
            conditions: Vec::new(),
            ending: false,
            log: Log::new(),
            told: None,
            signals,
            timer,
            next_connection: 0,
            no_children: false,
        })
    }

    /// Runs until it is told to end and it is proved that no process of PostgreSQL is left.
    ///
    /// # Errors
    /// When the kernel refuses to poll or to set the timer: the guard ends, and PostgreSQL with it by its parent-death signal.
    pub fn run(&mut self) -> io::Result<()> {
        self.reap();
        self.look();
        loop {
            self.keep_promises();
            self.publish();
            if self.ending && !matches!(self.state.postmaster, Postmaster::Kept(_)) {
                return Ok(());
            }
            self.log.flush(!self.state.may_write());
            self.arm_timer()?;
            let ready = match self.wait() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                ready => ready?,
            };
            self.keep_promises();
            for (source, flags) in ready {
                self.attend(source, flags);
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut watched: Vec<(Source, BorrowedFd<'_>, PollFlags)> = vec![
            (Source::Signals, self.signals.as_fd(), PollFlags::POLLIN),
            (Source::Timer, self.timer.as_fd(), PollFlags::POLLIN),
            (Source::Listener, self.listener.as_fd(), PollFlags::POLLIN),
        ];
        watched.extend(self.owner.as_ref().map(|owner| (Source::Owner, owner.pidfd.as_fd(), PollFlags::POLLIN)));
        watched.extend(self.adopted.as_ref().map(|pidfd| (Source::Adopted, pidfd.as_fd(), PollFlags::POLLIN)));
        watched.extend(self.notes.as_ref().map(|notes| (Source::Notes, notes.as_fd(), PollFlags::POLLIN)));
        for (id, connection) in &self.connections {
            let out = if connection.has_unsent() { PollFlags::POLLOUT } else { PollFlags::empty() };
            watched.push((Source::Connection(*id), connection.as_fd(), PollFlags::POLLIN | out));
        }
        let mut fds: Vec<PollFd<'_>> = watched.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)).collect();
        poll(&mut fds, PollTimeout::NONE)?;
        let flags = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::POLLERR);
        Ok(watched.iter().zip(&fds).map(|((source, ..), fd)| (*source, flags(fd))).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    /// The clock check, the rung that is due, and the proof of death.
    pub(super) fn keep_promises(&mut self) {
        let now = BootTime::now();
        self.state.check_clock(now);
        if let Some(rung) = ladder::decide(now, &self.state).climb {
            self.climb(now, rung);
        }
        self.prove_death();
    }

    fn climb(&mut self, now: BootTime, rung: Rung) {
        let Postmaster::Kept(kept) = &self.state.postmaster else { return };
        let (alive, pid, again) = (kept.end.is_none(), kept.pid, kept.climbed >= Some(rung));
        if !again {
            self.log.say(now, &format!("{rung:?} for the PostgreSQL of {}", self.data_dir.display()));
        }
        let signal = match rung {
            Rung::Announce => return,
            Rung::FastStop => Signal::SIGINT,
            Rung::ImmediateStop => Signal::SIGQUIT,
            Rung::KillAll => Signal::SIGKILL,
        };
        if alive {
            self.signal_postmaster(pid, signal);
        }
        if rung == Rung::KillAll {
            // The postmaster first: it would start its server anew around a killed child.
            if let Err(error) = scan::kill_left(&self.data_dir) {
                self.log.say(now, &format!("the process table cannot be read: {error}"));
            }
        }
        self.state.climbed(rung);
    }

    fn signal_postmaster(&mut self, pid: i32, signal: Signal) {
        let done = match &self.adopted {
            Some(pidfd) => sys::pidfd_send_signal(pidfd.as_fd(), signal),
            // Our child, not yet reaped: the pid is still its own.
            None => nix::sys::signal::kill(Pid::from_raw(pid), signal).map_err(io::Error::from),
        };
        if let Err(error) = done {
            self.log.say(BootTime::now(), &format!("{signal} to the postmaster {pid}: {error}"));
        }
    }

    /// Once the postmaster itself has ended: reap until there is no child, or none that is PostgreSQL, and no other process of it.
    fn prove_death(&mut self) {
        self.reap();
        if self.state.is_empty() && !self.no_children {
            self.end_orphans();
        }
        if !matches!(&self.state.postmaster, Postmaster::Kept(kept) if kept.end.is_some()) {
            return;
        }
        let Ok(left) = scan::left(&self.data_dir) else { return };
        if !left.postgres.is_empty() {
            return;
        }
        let now = BootTime::now();
        self.state.proved_empty(now);
        scan::end_others(&left.other_children);
        self.log.say(now, &format!("no process of PostgreSQL is left in {}", self.data_dir.display()));
    }

    /// What archive_command and its like left behind cannot acknowledge anything: ended, not waited for. Their own children come to the
    /// guard when they end, and are met here again.
    fn end_orphans(&self) {
        if let Ok(left) = scan::left(&self.data_dir) {
            scan::end_others(&left.other_children);
        }
    }

    fn reap(&mut self) {
        self.no_children = false;
        loop {
            let (pid, exit_status, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid, Some(status), None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, None, Some(signal as i32)),
                Err(Errno::ECHILD) => {
                    self.no_children = true;
                    return;
                }
                Err(Errno::EINTR) => continue,
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let is_postmaster = matches!(&self.state.postmaster,
                Postmaster::Kept(kept) if kept.pid == pid.as_raw() && kept.end.is_none() && !kept.adopted);
            if is_postmaster {
                let now = BootTime::now();
                self.log.say(now, &format!("the postmaster {pid} ended: status {exit_status:?}, signal {signal:?}"));
                self.state.postmaster_ended(now, exit_status, signal);
            }
        }
    }

    /// Looks at the process table while no postmaster is kept.
    pub(super) fn look(&mut self) {
        if matches!(self.state.postmaster, Postmaster::Kept(_)) {
            return;
        }
        match scan::postgres_processes(&self.data_dir) {
            Ok(found) => self.state.looked(found),
            Err(error) => self.condition(format!("the process table cannot be read: {error}")),
        }
    }

    /// Tells subscribers what has changed since they were last told.
    fn publish(&mut self) {
        let facts = self.facts();
        if self.told.as_ref() == Some(&facts) {
            return;
        }
        self.sequence += 1;
        self.told = Some(self.facts());
        let changed = Response::Changed { facts: Box::new(self.facts()) };
        self.connections.retain(|_, connection| !connection.subscribed || connection.say(&changed).is_ok());
    }

    /// The state as it is told.
    pub(super) fn facts(&self) -> GuardFacts {
        let mut facts = self.state.facts(BootTime::now());
        facts.sequence = self.sequence;
        facts.pid = std::process::id().cast_signed();
        facts.conditions.clone_from(&self.conditions);
        facts
    }

    /// Something is less than it should be.
    pub(super) fn condition(&mut self, text: String) {
        if !self.conditions.contains(&text) && self.conditions.len() < CONDITIONS_MAX {
            self.log.say(BootTime::now(), &text);
            self.conditions.push(text);
        }
    }

    fn arm_timer(&self) -> io::Result<()> {
        let now = BootTime::now();
        let mut wake_at = ladder::decide(now, &self.state).wake_at;
        if matches!(&self.state.postmaster, Postmaster::Kept(kept) if kept.end.is_some()) {
            let soon = now + Duration::from_millis(KILL_AGAIN_MS);
            wake_at = Some(wake_at.map_or(soon, |at| at.min(soon)));
        }
        match wake_at {
            // Zero would disarm the timer.
            Some(at) => {
                let at = TimeSpec::from_duration(Duration::from_nanos(at.0.max(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            }
            None => self.timer.unset()?,
        }
        Ok(())
    }

    fn attend(&mut self, source: Source, flags: PollFlags) {
        match source {
            // Its expiry was the wake-up; the promises were kept after it. The next arming clears it.
            Source::Timer => {}
            Source::Signals => self.take_signals(),
            Source::Listener => self.accept(),
            Source::Owner => self.owner_ended(),
            Source::Adopted => {
                let now = BootTime::now();
                self.state.postmaster_ended(now, None, None);
                // It would stay readable, and the loop would never rest.
                self.adopted = None;
            }
            Source::Notes => self.take_notes(),
            Source::Connection(id) => self.serve(id, flags),
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if i32::try_from(signal.ssi_signo) == Ok(Signal::SIGTERM as i32) {
                let now = BootTime::now();
                self.log.say(now, "SIGTERM: PostgreSQL is stopped, then the guard ends");
                let after = |ms: u64| now + Duration::from_millis(ms);
                self.state.stop(now, StopOrder::planned(now, after(TERM_IMMEDIATE_MS), after(TERM_KILL_MS)));
                self.ending = true;
            }
        }
    }

    /// The daemon's process has ended, and it had not said goodbye.
    pub(super) fn owner_ended(&mut self) {
        if let Some(owner) = self.owner.take() {
            let now = BootTime::now();
            self.state.daemon_crashed(now);
            let loop_seen =
                if self.state.crash_loop { "; that is too often: none is accepted until `pgherd run --clear-crashes`" } else { "" };
            self.log.say(now, &format!("the daemon {} ended without a word{loop_seen}", owner.pid));
        }
    }

    fn take_notes(&mut self) {
        let Some(mut notes) = self.notes.take() else { return };
        let mut text = [0; 4096];
        // A write of the child's is shorter than PIPE_BUF: lines arrive whole.
        match notes.read(&mut text) {
            Ok(0) => {}
            Ok(count) => {
                String::from_utf8_lossy(&text[..count]).lines().for_each(|line| self.condition(line.to_owned()));
                self.notes = Some(notes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.notes = Some(notes),
            Err(_) => {}
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() < CONNECTIONS_MAX
                && let Ok(connection) = Connection::new(stream, getuid().as_raw())
            {
                self.next_connection += 1;
                self.connections.insert(self.next_connection, connection);
            }
        }
    }

    fn serve(&mut self, id: u64, flags: PollFlags) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        let hung_up = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        if hung_up || connection.flush().is_err() || !matches!(connection.receive(), Ok(true)) {
            return;
        }
        while let Some(line) = connection.next_line() {
            let answer = match serde_json::from_slice::<Request>(&line) {
                Ok(Request::Upgrade { binary })
                    if matches!(connection.standing, Standing::Owner | Standing::OtherVersion { owner: true }) =>
                {
                    let (stream, failed) = self.upgrade(connection.into_stream(), &binary);
                    let Ok(again) = Connection::new(stream, getuid().as_raw()) else { return };
                    connection = again;
                    failed
                }
                Ok(request) => self.answer(&mut connection, request),
                Err(error) => self.refuse(super::protocol::Refusal::Invalid, &format!("this is no request: {error}")),
            };
            if connection.say(&answer).is_err() {
                return;
            }
            // Each request may have moved a deadline or made one due.
            self.keep_promises();
        }
        self.connections.insert(id, connection);
    }

    /// Takes up an answered upgrade request: the stream of the connection that asked.
    pub(super) fn resume_connection(&mut self, stream: UnixStream, standing: Standing) -> io::Result<()> {
        let mut connection = Connection::new(stream, getuid().as_raw())?;
        connection.standing = standing;
        connection.say(&Response::Hello { version: super::protocol::PROTOCOL_VERSION })?;
        self.next_connection += 1;
        self.connections.insert(self.next_connection, connection);
        Ok(())
    }

    /// Takes the socket away: a daemon that finds none starts a new guard.
    pub fn withdraw(&self) {
        let _ = fs::remove_file(self.run_dir.join(super::protocol::SOCKET_NAME));
    }
}
