//! Answers requests: who may ask what, and what is done when [`super::state`] has granted it.
//!
//! The rule that would surprise: each request asks for the time anew. A guard that was frozen between two requests in one batch must not
//! judge the second by the time of the first.

use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::AsFd;

use super::child;
use super::connection::{Connection, Standing};
use super::protocol::{ByeReason, PROTOCOL_VERSION, Refusal, Request, Response, StartOrder};
use super::scan;
use super::server::{Guard, Owner};
use super::sys;
use crate::clock::BootTime;
use crate::facts::guard::Word;

/// Refused, and the sentence for it.
type Answer = Result<(), (Refusal, String)>;

impl Guard {
    /// Answers one request. `Upgrade` never comes here but from somebody who may not ask for it.
    pub(super) fn answer(&mut self, connection: &mut Connection, request: Request) -> Response {
        if let Request::Hello { version, owner } = request {
            return match self.greet(connection, version, owner) {
                Ok(()) => Response::Hello { version: PROTOCOL_VERSION },
                Err((reason, message)) => self.refuse(reason, &message),
            };
        }
        let for_anybody = matches!(request, Request::Facts | Request::Subscribe | Request::Clear);
        let allowed = match connection.standing {
            Standing::Owner => !matches!(request, Request::Upgrade { .. }),
            Standing::Looker => for_anybody,
            Standing::Stranger | Standing::OtherVersion { .. } => false,
        };
        if !allowed {
            let message = "this connection may not ask that: it has to say hello as the daemon, in the guard's own protocol version";
            return self.refuse(Refusal::NotYours, message);
        }
        let done = match request {
            Request::Subscribe => {
                connection.subscribed = true;
                Ok(())
            }
            Request::Bye { reason } => {
                connection.standing = Standing::Looker;
                self.say_goodbye(reason);
                Ok(())
            }
            request => self.perform(request),
        };
        match done {
            Ok(()) => Response::Done { facts: Box::new(self.facts()) },
            Err((reason, message)) => self.refuse(reason, &message),
        }
    }

    /// A refusal with the facts.
    pub(super) fn refuse(&self, reason: Refusal, message: &str) -> Response {
        Response::Refused { reason, message: message.to_owned(), facts: Box::new(self.facts()) }
    }

    fn greet(&mut self, connection: &mut Connection, version: u32, owner: bool) -> Answer {
        if owner {
            self.take_owner(connection.peer.pid)?;
        }
        connection.standing = match (version == PROTOCOL_VERSION, owner) {
            (false, owner) => Standing::OtherVersion { owner },
            (true, true) => Standing::Owner,
            (true, false) => Standing::Looker,
        };
        Ok(())
    }

    fn take_owner(&mut self, pid: i32) -> Answer {
        let is_over = |owner: &Owner| {
            let mut fds = [PollFd::new(owner.pidfd.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        };
        if self.owner.as_ref().is_some_and(is_over) {
            self.owner_ended();
        }
        if self.state.crash_loop {
            let message = "three daemons ended by a signal within 60 s: find out why, then start one with --clear-crashes";
            return Err((Refusal::CrashLoop, message.to_owned()));
        }
        match &self.owner {
            Some(owner) if owner.pid == pid => Ok(()),
            Some(owner) => Err((Refusal::Owned, format!("the daemon {} is there already", owner.pid))),
            None => {
                let pidfd = sys::pidfd_open(pid).map_err(|error| (Refusal::Failed, format!("cannot watch the daemon {pid}: {error}")))?;
                self.owner = Some(Owner { pid, pidfd });
                self.log.say(BootTime::now(), &format!("the daemon {pid} is here"));
                Ok(())
            }
        }
    }

    fn say_goodbye(&mut self, reason: ByeReason) {
        if let Some(owner) = self.owner.take() {
            self.log.say(BootTime::now(), &format!("the daemon {} leaves: {reason:?}", owner.pid));
        }
    }

    fn perform(&mut self, request: Request) -> Answer {
        let now = BootTime::now();
        match request {
            Request::Start(order) => self.start(&order),
            Request::Adopt { data_dir, pid, word } => self.adopt(&data_dir, pid, word),
            Request::Vouch { start, word } => self.state.vouch(now, start, word).map_err(explain),
            Request::Lock { identity, sent, times } => self.state.lock(now, identity, sent, times).map_err(explain),
            Request::NoLock { epoch } => {
                self.look();
                self.state.no_lock(now, epoch).map_err(explain)
            }
            Request::Maintain(maintenance) => self.state.maintain(now, maintenance).map_err(explain),
            Request::Lease { identity } => {
                self.state.lease = identity;
                Ok(())
            }
            Request::Stop(order) => {
                self.state.stop(now, order);
                Ok(())
            }
            Request::Facts => {
                self.look();
                Ok(())
            }
            Request::Clear => {
                self.state.clear_crashes();
                Ok(())
            }
            Request::Shutdown => {
                self.look();
                if !self.state.is_empty() {
                    return Err(explain(Refusal::NotEmpty));
                }
                self.ending = true;
                // From here on a daemon that looks for a guard finds none, and starts its own.
                self.withdraw();
                Ok(())
            }
            // Answered before.
            Request::Hello { .. } | Request::Subscribe | Request::Bye { .. } | Request::Upgrade { .. } => Err(explain(Refusal::Invalid)),
        }
    }

    fn check_data_dir(&self, data_dir: &Path) -> Answer {
        if data_dir == self.data_dir {
            return Ok(());
        }
        Err((Refusal::Invalid, format!("this guard keeps {}, not {}", self.data_dir.display(), data_dir.display())))
    }

    fn start(&mut self, order: &StartOrder) -> Answer {
        self.check_data_dir(&order.data_dir)?;
        if self.ending {
            return Err((Refusal::Invalid, "the guard is about to end: start another one".to_owned()));
        }
        self.look();
        let now = BootTime::now();
        self.state.may_start(now, order.word).map_err(explain)?;
        self.conditions.retain(|text| !text.starts_with(child::NOTE));
        let failed = |error| (Refusal::Failed, format!("{} cannot be started: {error}", order.program.display()));
        let spawned = child::spawn(order, self.core).map_err(failed)?;
        self.adopted = None;
        self.notes = Some(File::from(spawned.notes));
        let start = self.state.started(spawned.pid, order.word, false);
        self.log.say(now, &format!("start {}: {:?} postmaster {} for {}", start.0, order.word, spawned.pid, self.data_dir.display()));
        Ok(())
    }

    fn adopt(&mut self, data_dir: &Path, pid: i32, word: Word) -> Answer {
        self.check_data_dir(data_dir)?;
        let now = BootTime::now();
        self.state.may_adopt(now).map_err(explain)?;
        let absent = |error| (Refusal::NoSuchStart, format!("there is no process {pid}: {error}"));
        let pidfd = sys::pidfd_open(pid).map_err(absent)?;
        if !scan::is_postgres_in(pid, data_dir) {
            return Err((Refusal::NoSuchStart, format!("process {pid} is no PostgreSQL in {}", data_dir.display())));
        }
        self.adopted = Some(pidfd);
        self.state.started(pid, word, true);
        self.log.say(now, &format!("adopted the {word:?} postmaster {pid} of {}", data_dir.display()));
        Ok(())
    }
}

/// A sentence for each refusal of the pure rules.
fn explain(refusal: Refusal) -> (Refusal, String) {
    let message = match refusal {
        Refusal::NotYours => "only the daemon may ask that",
        Refusal::Owned => "another daemon is there already",
        Refusal::CrashLoop => "too many daemons ended by a signal",
        Refusal::NotEmpty => "a process of PostgreSQL is in the data directory: end it, and wait for the proof",
        Refusal::NoSuchStart => "no such start runs",
        Refusal::NoLock => "a writable PostgreSQL needs a lock that is proved, and time before it is announced lost",
        Refusal::StaleLock => "a later lock is known, or this one was given up",
        Refusal::LadderRuns => "the fast stop has begun: PostgreSQL ends, and may be started again when it is proved dead",
        Refusal::OnceWritable => "a start that was vouched for as writable stays so until its end",
        Refusal::Maintenance => "maintenance mode is on: nothing begins to write",
        Refusal::StaleMaintenance => "a later word on maintenance mode is known",
        Refusal::Invalid => "the request makes no sense",
        Refusal::Failed => "the system refused",
    };
    (refusal, message.to_owned())
}
