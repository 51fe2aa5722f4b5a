//! The processes of a local cluster: who they are, starting them, ending all of them and nobody else.
//!
//! A process is named by its pid AND its start time, so that a pid that was given to somebody else is never signalled. Descendants
//! that nobody here started directly (the guard, the postmaster and its backends) are known by an environment variable they
//! inherited, or by what they run in the cluster's directory; whoever uses this makes itself a subreaper, so that no orphan gets away.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Gid, Pid, Uid, User};

/// Marks everything a local cluster started, by inheritance; its value is the cluster's directory.
pub const MARKER_VARIABLE: &str = "PGHERD_LOCAL_CLUSTER";
/// Programs that a local cluster consists of. A process known by its arguments or working directory only must be one of them: the
/// pager that someone reads a log with must not be ended.
const PROGRAMS: &[&str] =
    &["pgherd", "pgherd-guard", "postgres", "etcd", "haproxy", "initdb", "pg_basebackup", "pg_rewind", "pg_ctl", "pg_checksums"];
/// How long a clean end is waited for before SIGKILL, in milliseconds.
const END_GRACE_MS: u64 = 3_000;
/// How long all ends may take, in milliseconds.
const END_BOUND_MS: u64 = 15_000;
/// Time between two looks while waiting, in milliseconds.
const POLL_MS: u64 = 20;
/// How long a dead child of unknown origin is left to whoever started it, in milliseconds.
const FOREIGN_ZOMBIE_MS: u64 = 5_000;

/// A process, beyond doubt: a pid alone may be given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// Start time in clock ticks since boot (proc(5), field 22 of stat).
    pub started: u64,
}

/// What /proc tells of a process.
#[derive(Debug, Clone)]
pub struct Found {
    /// Which.
    pub id: ProcessId,
    /// Its name: the first 15 bytes of the program's.
    pub name: String,
    /// Dead and not yet reaped. A killed process whose first thread is dead while others are not still holds its locks.
    pub is_dead: bool,
    /// Its parent.
    pub parent: i32,
}

impl Found {
    /// Reads /proc/PID/stat; None when there is no such process.
    pub fn read(pid: i32) -> Option<Found> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold spaces and brackets: it ends at the last bracket.
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let state = fields.first()?.chars().next()?;
        Some(Found {
            id: ProcessId { pid, started: fields.get(19)?.parse().ok()? },
            name,
            is_dead: state == 'X' || state == 'Z' && threads(pid) <= 1,
            parent: fields.get(1)?.parse().ok()?,
        })
    }

    /// Every process there is.
    pub fn all() -> Vec<Found> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries.flatten().filter_map(|entry| Found::read(entry.file_name().to_str()?.parse().ok()?)).collect()
    }

    fn is_program(&self) -> bool {
        PROGRAMS.iter().any(|program| program.get(..15).unwrap_or(program) == self.name)
    }

    fn belongs_to(&self, dir: &Path) -> bool {
        let proc = PathBuf::from(format!("/proc/{}", self.id.pid));
        let holds = |file: &str, test: &dyn Fn(&str) -> bool| {
            let bytes = fs::read(proc.join(file)).unwrap_or_default();
            bytes.split(|byte| *byte == 0).any(|item| std::str::from_utf8(item).is_ok_and(test))
        };
        let marked = |item: &str| item.split_once('=').is_some_and(|(key, value)| key == MARKER_VARIABLE && Path::new(value) == dir);
        if holds("environ", &marked) {
            return true;
        }
        self.is_program()
            && (fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
                || holds("cmdline", &|item| Path::new(item.rsplit('=').next().unwrap_or(item)).starts_with(dir)))
    }
}

fn threads(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

impl ProcessId {
    /// The process with this pid, now.
    pub fn of(pid: i32) -> Option<ProcessId> {
        Found::read(pid).map(|found| found.id)
    }

    /// Whether it still runs; one that is dead but not reaped does not.
    pub fn is_alive(self) -> bool {
        Found::read(self.pid).is_some_and(|found| found.id == self && !found.is_dead)
    }

    /// Sends a signal, if it is still this process.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Asks again and again until it is so; false when `bound` passed first.
pub fn wait_for(bound: Duration, condition: impl FnMut() -> bool) -> bool {
    wait_for_every(Duration::from_millis(POLL_MS), bound, condition)
}

/// The same with `pause` between two looks, for looks that are dear.
pub fn wait_for_every(pause: Duration, bound: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + bound;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(pause);
    }
}

/// How processes that were started here ended, by pid.
static ENDED: Mutex<BTreeMap<ProcessId, WaitStatus>> = Mutex::new(BTreeMap::new());
/// Processes that were started here and are the reaper's to reap.
static STARTED: Mutex<BTreeMap<i32, ProcessId>> = Mutex::new(BTreeMap::new());

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this process the one that orphans of its descendants fall to, and reaps them in a thread from now on.
pub fn become_subreaper() -> Result<()> {
    static ONCE: Once = Once::new();
    nix::sys::prctl::set_child_subreaper(true).context("becoming the subreaper of the local cluster")?;
    ONCE.call_once(|| {
        let _ = std::thread::Builder::new().name("reaper".into()).spawn(reap_for_ever);
    });
    Ok(())
}

/// Reaps what was started here and orphaned servers at once; other children have an owner in this process that waits for them.
fn reap_for_ever() {
    let mut foreign: Option<(i32, Instant)> = None;
    loop {
        let peek = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT);
        let pid = peek.ok().and_then(|status| status.pid()).map(Pid::as_raw);
        let Some(pid) = pid else {
            std::thread::sleep(Duration::from_millis(POLL_MS));
            continue;
        };
        let started = locked(&STARTED).get(&pid).copied();
        let orphaned_server = Found::read(pid).is_some_and(|found| ["postgres", "pgherd-guard"].contains(&found.name.as_str()));
        let since = foreign.filter(|(of, _)| *of == pid).map_or_else(Instant::now, |(_, since)| since);
        if started.is_none() && !orphaned_server && since.elapsed() < Duration::from_millis(FOREIGN_ZOMBIE_MS) {
            foreign = Some((pid, since));
            std::thread::sleep(Duration::from_millis(POLL_MS));
            continue;
        }
        if let (Ok(status), Some(id)) = (waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)), started) {
            locked(&STARTED).remove(&pid);
            locked(&ENDED).insert(id, status);
        }
    }
}

/// How a process that was started here ended; None while it runs.
pub fn end_of(id: ProcessId) -> Option<WaitStatus> {
    locked(&ENDED).get(&id).copied()
}

/// The user that PostgreSQL, etcd and HAProxy run as: PostgreSQL refuses to run as root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OsUser {
    /// The name.
    pub name: String,
    /// Its id, to change to; None when this process is that user already.
    pub change_to: Option<(u32, u32)>,
}

impl OsUser {
    /// `postgres` when this process is root, else the present user.
    pub fn for_servers() -> Result<OsUser> {
        let me = Uid::effective();
        let user = if me.is_root() { User::from_name("postgres") } else { User::from_uid(me) };
        let user = user.context("looking up the user for the servers")?.context("there is no user `postgres`: install postgresql")?;
        Ok(OsUser { name: user.name, change_to: me.is_root().then_some((user.uid.as_raw(), user.gid.as_raw())) })
    }

    /// Gives `path` to this user.
    pub fn own(&self, path: &Path) -> Result<()> {
        let Some((uid, gid)) = self.change_to else { return Ok(()) };
        chown(path, Some(uid), Some(gid)).with_context(|| format!("giving {} to {}", path.display(), self.name))
    }

    /// Whether this user may reach and use `path` through the permissions that everybody has. Too strict rather than wrong.
    pub fn can_reach(&self, path: &Path) -> bool {
        use std::os::unix::fs::PermissionsExt;
        self.change_to.is_none()
            || path.ancestors().all(|part| fs::metadata(part).is_ok_and(|meta| meta.permissions().mode() & 0o005 == 0o005))
    }
}

/// All processes of one local cluster, and the file that a later `demo --down` finds them by.
#[derive(Debug)]
pub struct Household {
    dir: PathBuf,
    /// The user of the servers.
    pub user: OsUser,
    named: Mutex<BTreeMap<String, ProcessId>>,
}

impl Household {
    /// The household in `dir`, which exists; what an earlier one wrote down there is read.
    pub fn open(dir: &Path, user: OsUser) -> Result<Household> {
        let dir = dir.canonicalize().with_context(|| format!("looking for {}", dir.display()))?;
        let mut named = BTreeMap::new();
        for line in fs::read_to_string(dir.join("pids")).unwrap_or_default().lines() {
            if let [name, pid, started] = line.split_whitespace().collect::<Vec<_>>()[..]
                && let (Ok(pid), Ok(started)) = (pid.parse(), started.parse())
            {
                named.insert(name.to_owned(), ProcessId { pid, started });
            }
        }
        Ok(Household { dir, user, named: Mutex::new(named) })
    }

    /// Its directory, canonical.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts `command` as the process `name`, its output appended to `log`. As root unless `as_server`.
    pub fn spawn(&self, name: &str, mut command: Command, log: &Path, as_server: bool) -> Result<ProcessId> {
        let out = OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("opening {}", log.display()))?;
        self.user.own(log)?;
        command.env(MARKER_VARIABLE, &self.dir).current_dir(&self.dir).process_group(0);
        command.stdin(Stdio::null()).stdout(out.try_clone().context("duplicating a log")?).stderr(out);
        if let (true, Some((uid, gid))) = (as_server, self.user.change_to) {
            ensure!(Gid::effective().as_raw() != gid, "the servers' group must not be root's");
            command.uid(uid).gid(gid);
        }
        // Held over the start, so that the reaper cannot meet the child before it is known.
        let mut started = locked(&STARTED);
        let child = command.spawn().with_context(|| format!("starting {name} ({})", command.get_program().display()))?;
        let pid = i32::try_from(child.id()).context("a pid")?;
        let id = ProcessId::of(pid).with_context(|| format!("{name} was gone at once, see {}", log.display()))?;
        started.insert(pid, id);
        drop(started);
        let mut named = locked(&self.named);
        named.insert(name.to_owned(), id);
        let text: String = named.iter().map(|(name, id)| format!("{name} {} {}\n", id.pid, id.started)).collect();
        fs::write(self.dir.join("pids"), text).context("writing down the pids")?;
        Ok(id)
    }

    /// The process last started under this name.
    pub fn named(&self, name: &str) -> Option<ProcessId> {
        locked(&self.named).get(name).copied()
    }

    /// Every living process of this household, also those that it did not start itself.
    pub fn living(&self) -> Vec<Found> {
        let named: Vec<ProcessId> = locked(&self.named).values().copied().collect();
        let me = std::process::id().cast_signed();
        Found::all()
            .into_iter()
            .filter(|found| !found.is_dead && found.id.pid != me)
            .filter(|found| named.contains(&found.id) || found.belongs_to(&self.dir))
            .collect()
    }

    /// Ends every process, and proves that none is left. PostgreSQL is asked first (SIGQUIT), since one that is killed leaves shared
    /// memory behind; nothing else has anything to put in order.
    pub fn end_all(&self) -> Result<()> {
        let segments = self.shared_memory();
        let begun = Instant::now();
        let gone = wait_for(Duration::from_millis(END_BOUND_MS), || {
            let living = self.living();
            let kill_all = begun.elapsed() > Duration::from_millis(END_GRACE_MS);
            for found in &living {
                if found.name == "postgres" && !kill_all {
                    found.id.signal(Signal::SIGQUIT);
                    found.id.signal(Signal::SIGCONT);
                } else {
                    found.id.signal(Signal::SIGKILL);
                }
            }
            living.is_empty()
        });
        remove_shared_memory(&segments);
        if gone {
            return Ok(());
        }
        let left: Vec<String> = self.living().iter().map(|found| format!("{} ({})", found.id.pid, found.name)).collect();
        bail!("these processes could not be ended: {}", left.join(", "))
    }

    /// Keys and ids of the shared memory segments that postmasters of this household noted (line 7 of postmaster.pid).
    fn shared_memory(&self) -> Vec<(i64, i64)> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let files = entries.flatten().map(|entry| entry.path().join("data/postmaster.pid"));
        let line = |path: PathBuf| fs::read_to_string(path).ok()?.lines().nth(6).map(str::to_owned);
        let pair = |line: String| {
            let mut numbers = line.split_whitespace().map(str::parse::<i64>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        };
        files.filter_map(line).filter_map(pair).collect()
    }
}

/// Removes those segments that are still there and that nobody is attached to (sysvipc(5): key, id, …, attached).
fn remove_shared_memory(segments: &[(i64, i64)]) {
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    for line in table.lines().skip(1) {
        let numbers: Vec<i64> = line.split_whitespace().map(|field| field.parse().unwrap_or(-1)).collect();
        let &[key, id, _, _, _, _, attached, ..] = numbers.as_slice() else { continue };
        if attached == 0 && segments.contains(&(key & 0xFFFF_FFFF, id)) {
            let _ = Command::new("ipcrm").args(["-m", &id.to_string()]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn household() -> (tempfile::TempDir, Household) {
        let dir = tempfile::tempdir().unwrap();
        let user = OsUser { name: "nobody in particular".into(), change_to: None };
        let household = Household::open(dir.path(), user).unwrap();
        (dir, household)
    }

    fn sleeper() -> Command {
        let mut command = Command::new("sleep");
        command.arg("300");
        command
    }

    #[test]
    fn a_household_ends_its_processes_and_their_orphans_and_nobody_else() {
        become_subreaper().unwrap();
        let (dir, household) = household();
        let mut stranger = sleeper().spawn().unwrap();
        let log = dir.path().join("log");
        household.spawn("direct", sleeper(), &log, true).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 300 & sleep 300"]);
        let parent = household.spawn("parent", shell, &log, true).unwrap();
        assert!(wait_for(Duration::from_secs(10), || household.living().len() == 4), "{:?}", household.living());
        parent.signal(Signal::SIGKILL);
        assert!(wait_for(Duration::from_secs(10), || household.living().len() == 3), "the shell's children live on");
        assert!(wait_for(Duration::from_secs(10), || end_of(parent).is_some()), "and the shell is reaped");

        let later = Household::open(dir.path(), household.user.clone()).unwrap();
        later.end_all().unwrap();
        assert!(household.living().is_empty());
        assert!(stranger.try_wait().unwrap().is_none(), "a process of another's is left alone");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_not_signalled() {
        let mut stranger = sleeper().spawn().unwrap();
        let id = ProcessId::of(stranger.id().cast_signed()).unwrap();
        let earlier = ProcessId { started: id.started - 1, ..id };
        assert!(id.is_alive() && !earlier.is_alive());
        earlier.signal(Signal::SIGKILL);
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
