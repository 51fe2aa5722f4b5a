//! The few system calls that neither std nor nix has in a safe form. Nothing here decides.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Who is at the other end of a Unix socket, as the kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its pid when it connected (or listened).
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// SO_PEERCRED.
///
/// # Errors
/// When the socket has no peer.
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = getsockopt(stream, PeerCredentials)?;
    Ok(Peer { pid: credentials.pid(), uid: credentials.uid() })
}

/// A descriptor that stands for this process and no later one of the same pid; readable once it has ended.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor (close-on-exec) for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Signals the process that the descriptor stands for.
///
/// # Errors
/// ESRCH when it has ended and was reaped.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: two integers, a null siginfo (the kernel then fills in ours, as for kill(2)), and flags 0.
    let done = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as libc::c_int, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits until the descriptor is readable.
///
/// # Errors
/// `Interrupted` by a signal, or a descriptor that cannot be polled.
pub fn wait_readable(fd: &impl AsFd) -> io::Result<()> {
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    Ok(())
}

/// Forks; the child runs `child` and ends with what it returns, without running anything of ours at its exit.
///
/// For the guard only, whose process has one thread: after a fork in a process with more, the child may not even allocate.
///
/// # Errors
/// When the system has no room for another process.
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: the calling process has one thread, so no lock of the allocator can be held by a thread that the child does not have.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(child.as_raw()),
        nix::unistd::ForkResult::Child => {
            let status = child();
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Gives up every capability: ambient, inheritable, permitted, effective.
///
/// # Errors
/// When the kernel refuses.
pub fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`, linux/capability.h.
    const VERSION_3: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: constants only; PR_CAP_AMBIENT_CLEAR_ALL uses none of the pointers.
    let ambient = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    // SAFETY: a header (version, pid 0 = ourselves) and the two data structs of three u32 that version 3 asks for; both outlive the call.
    let capset = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    if ambient == 0 && capset == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How this process is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduling {
    /// As every other process.
    Ordinary,
    /// Before every ordinary process; children are ordinary (SCHED_RESET_ON_FORK).
    FirstInLine,
}

/// Sets the calling process's scheduling.
///
/// # Errors
/// EPERM without the privilege.
pub fn schedule(how: Scheduling) -> io::Result<()> {
    let (policy, sched_priority) = match how {
        Scheduling::Ordinary => (libc::SCHED_OTHER, 0),
        Scheduling::FirstInLine => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1),
    };
    let parameter = libc::sched_param { sched_priority };
    // SAFETY: pid 0 is ourselves; the parameter outlives the call.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the nice value to 0; from below that is always allowed.
///
/// # Errors
/// When it is above 0 and may not be lowered.
pub fn reset_nice() -> io::Result<()> {
    // SAFETY: three integers.
    let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets every signal to its default action: an ignored signal stays ignored over an exec.
pub fn reset_signal_actions() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is no function of ours; SIGKILL, SIGSTOP and the two that libc keeps are refused with EINVAL, as they should be.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Marks (`true`) or closes (`false`) every descriptor from 3 on: marked ones are closed by the next exec.
///
/// # Errors
/// On kernels older than 5.9 (close) or 5.11 (mark).
pub fn descriptors_from_3(mark_close_on_exec: bool) -> io::Result<()> {
    /// CLOSE_RANGE_CLOEXEC, linux/close_range.h.
    const CLOEXEC: libc::c_uint = 1 << 2;
    let flags = if mark_close_on_exec { CLOEXEC } else { 0 };
    // SAFETY: called before anything owns a descriptor (close), or without closing any (mark).
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Owns a descriptor that the guard's former program left open for us under this number.
///
/// # Errors
/// EBADF when it is not open.
pub fn inherit(raw: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD on any number is harmless; on one that is not open it fails.
    if raw < 3 || unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and this program has just begun: nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
