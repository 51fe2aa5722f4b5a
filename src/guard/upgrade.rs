//! Replaces the guard's program in place: same process, so the postmaster keeps its parent and the guard stays its subreaper.
//!
//! The state goes through a memory file; the socket, the flock, the connection that asked and the descriptors of daemon and adopted
//! postmaster stay open over the exec. Nothing is written to a disk.
//!
//! The rule that would surprise: a failed exec is not the end. Everything is put back as it was, and the old program goes on.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signalfd::SignalFd;
use nix::unistd::execve;
use serde::{Deserialize, Serialize};

use super::child::CoreLimit;
use super::connection::Standing;
use super::protocol::{PROTOCOL_VERSION, Refusal, Response};
use super::server::{Guard, Owner};
use super::state::GuardState;
use super::sys;

/// The argument that precedes the number of the memory file.
pub const RESUME: &str = "--resume";

/// What the next program gets. Fields are only ever added: a guard reads what an older one wrote.
#[derive(Debug, Serialize, Deserialize)]
struct Legacy {
    run_dir: PathBuf,
    data_dir: PathBuf,
    state: GuardState,
    sequence: u64,
    ending: bool,
    core: Option<CoreLimit>,
    listener: i32,
    flock: i32,
    asker: i32,
    owner: Option<(i32, i32)>,
    adopted: Option<i32>,
}

fn keep_over_exec(fd: BorrowedFd<'_>, keep: bool) -> io::Result<i32> {
    let flags = if keep { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(fd.as_raw_fd())
}

impl Guard {
    /// Does not return when it worked. Otherwise the connection that asked, and what to answer.
    pub(super) fn upgrade(&mut self, asker: UnixStream, binary: &Path) -> (UnixStream, Response) {
        let Err(error) = self.try_upgrade(&asker, binary);
        for fd in self.heirlooms(&asker) {
            let _ = keep_over_exec(fd, false);
        }
        let message = format!("{} was not executed, the guard goes on as it was: {error}", binary.display());
        (asker, self.refuse(Refusal::Failed, &message))
    }

    fn heirlooms<'a>(&'a self, asker: &'a UnixStream) -> Vec<BorrowedFd<'a>> {
        let mut fds = vec![self.listener.as_fd(), self.flock.as_fd(), asker.as_fd()];
        fds.extend(self.owner.as_ref().map(|owner| owner.pidfd.as_fd()));
        fds.extend(self.adopted.as_ref().map(|pidfd| pidfd.as_fd()));
        fds
    }

    fn try_upgrade(&self, asker: &UnixStream, binary: &Path) -> io::Result<Infallible> {
        for fd in self.heirlooms(asker) {
            keep_over_exec(fd, true)?;
        }
        let legacy = Legacy {
            run_dir: self.run_dir.clone(),
            data_dir: self.data_dir.clone(),
            state: self.state.clone(),
            sequence: self.sequence,
            ending: self.ending,
            core: self.core,
            listener: self.listener.as_raw_fd(),
            flock: self.flock.as_raw_fd(),
            asker: asker.as_raw_fd(),
            owner: self.owner.as_ref().map(|owner| (owner.pid, owner.pidfd.as_raw_fd())),
            adopted: self.adopted.as_ref().map(AsRawFd::as_raw_fd),
        };
        let mut memory = File::from(memfd_create("pgherd-guard", MFdFlags::empty())?);
        serde_json::to_writer(&mut memory, &legacy)?;
        memory.flush()?;
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let program = text(binary.as_os_str().as_bytes())?;
        let arguments = [program.clone(), text(RESUME.as_bytes())?, text(memory.as_raw_fd().to_string().as_bytes())?];
        let environment: [CString; 0] = [];
        Ok(execve(&program, &arguments, &environment)?)
    }

    /// The guard that the former program was, from the memory file it left under this number.
    ///
    /// # Errors
    /// When what was left cannot be read: there is nothing to go on with, and the end of this process ends PostgreSQL.
    pub fn resume(memory: i32, signals: SignalFd) -> io::Result<Self> {
        let mut memory = File::from(sys::inherit(memory)?);
        let mut text = Vec::new();
        memory.rewind()?;
        memory.read_to_end(&mut text)?;
        let legacy: Legacy = serde_json::from_slice(&text)?;
        let listener = UnixListener::from(sys::inherit(legacy.listener)?);
        let flock: OwnedFd = sys::inherit(legacy.flock)?;
        let mut guard = Self::new((legacy.run_dir, legacy.data_dir), legacy.state, (listener, flock), signals)?;
        guard.sequence = legacy.sequence;
        guard.ending = legacy.ending;
        guard.core = legacy.core;
        if let Some((pid, pidfd)) = legacy.owner {
            guard.owner = Some(Owner { pid, pidfd: sys::inherit(pidfd)? });
        }
        guard.adopted = legacy.adopted.map(sys::inherit).transpose()?;
        // An asker of another version than ours has to say hello again; one that is gone costs nothing.
        let _ = guard.resume_connection(UnixStream::from(sys::inherit(legacy.asker)?), Standing::Stranger);
        guard.log.say(crate::clock::BootTime::now(), &format!("upgraded in place to protocol version {PROTOCOL_VERSION}"));
        Ok(guard)
    }
}
