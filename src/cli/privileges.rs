//! Started as root, the daemon becomes the user that PostgreSQL runs as, for good, before its first thread.
//!
//! A change of user concerns a whole process only before it has threads, and PostgreSQL refuses to run as root. Nothing is kept: no
//! group, no capability. What root is needed for is done before: directories that only root can make, and the limits under which a
//! guard without privileges may still lock its memory, run before every ordinary process and be spared by the OOM killer.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, User, chown, initgroups, setresgid, setresuid};

use crate::cli::output::tell;
use crate::spec::node::NodeSpec;

/// Mode of directories that others may look into.
const OPEN_MODE: u32 = 0o755;
/// Mode of directories with data in them.
const PRIVATE_MODE: u32 = 0o700;

/// What the guard may lock, as the unit file's LimitMEMLOCK.
const LOCKED_MEMORY_BYTES: u64 = 64 << 20;
/// What the guard asks for: first in line, and no more.
const REAL_TIME_PRIORITY: u64 = 1;
/// As the unit file's OOMScoreAdjust.
const OOM_SCORE_ADJUSTMENT: i32 = -900;
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Becomes `spec.postgres.os_user` if this is root. Anyone else must be that user already.
pub fn drop_to_os_user(node: &NodeSpec) -> anyhow::Result<()> {
    let name = &node.postgres.os_user;
    let user = User::from_name(name).with_context(|| format!("looking for the user {name}"))?;
    let user = user.with_context(|| format!("spec.postgres.os_user: there is no user `{name}` on this host"))?;
    let present = Uid::effective();
    if !present.is_root() {
        ensure!(
            present == user.uid,
            "started as uid {present}, but spec.postgres.os_user is `{name}` (uid {}): start pgherd as root or as that user",
            user.uid
        );
        return Ok(());
    }
    ensure!(!user.uid.is_root(), "spec.postgres.os_user is root, and PostgreSQL refuses to run as root: name another user");
    make_directories(node, user.uid, user.gid)?;
    for (what, done) in
        [("locked memory", allow_locked_memory()), ("scheduling", allow_scheduling()), ("the OOM killer", spare_from_oom_killer())]
    {
        // A container may withhold this from root too. The guard says what it lacks.
        if let Err(error) = done {
            tell(&format!("warning: {what}: {error:#}"));
        }
    }
    become_user(&user)
}

/// The guard locks its few megabytes.
fn allow_locked_memory() -> anyhow::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).context("reading RLIMIT_MEMLOCK")?;
    setrlimit(Resource::RLIMIT_MEMLOCK, soft.max(LOCKED_MEMORY_BYTES), hard.max(LOCKED_MEMORY_BYTES)).context("raising RLIMIT_MEMLOCK")
}

/// The guard takes the lowest real-time priority.
fn allow_scheduling() -> anyhow::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_RTPRIO).context("reading RLIMIT_RTPRIO")?;
    setrlimit(Resource::RLIMIT_RTPRIO, soft.max(REAL_TIME_PRIORITY), hard.max(REAL_TIME_PRIORITY)).context("raising RLIMIT_RTPRIO")
}

/// Inherited by the guard, which gives its children 0 again. Without root nobody can lower it.
fn spare_from_oom_killer() -> anyhow::Result<()> {
    let found = fs::read_to_string(OOM_SCORE).context("reading the OOM score adjustment")?;
    if found.trim().parse::<i32>().is_ok_and(|score| score <= OOM_SCORE_ADJUSTMENT) {
        return Ok(());
    }
    fs::write(OOM_SCORE, OOM_SCORE_ADJUSTMENT.to_string()).with_context(|| format!("writing {OOM_SCORE}"))
}

fn become_user(user: &User) -> anyhow::Result<()> {
    let name = CString::new(user.name.as_str()).context("the user's name")?;
    initgroups(&name, user.gid).with_context(|| format!("taking the groups of {}", user.name))?;
    setresgid(user.gid, user.gid, user.gid).with_context(|| format!("becoming the group of {}", user.name))?;
    setresuid(user.uid, user.uid, user.uid).with_context(|| format!("becoming {}", user.name))?;
    if nix::unistd::setuid(Uid::from_raw(0)).is_ok() {
        bail!("root could be taken back after it was given up: this must not be");
    }
    // Programs that are started from a directory their user cannot read complain (initdb, pg_basebackup).
    std::env::set_current_dir("/").context("leaving the directory that root was in")
}

/// What the daemon needs below directories of root: made here if absent, and given to the user.
fn make_directories(node: &NodeSpec, uid: Uid, gid: Gid) -> anyhow::Result<()> {
    make(&node.run_dir, OPEN_MODE, uid, gid)?;
    let meta = fs::symlink_metadata(&node.run_dir).with_context(|| format!("looking at {}", node.run_dir.display()))?;
    if meta.is_dir() && meta.uid() == 0 {
        // systemd's RuntimeDirectory= belongs to the user that the unit starts as.
        chown(&node.run_dir, Some(uid), Some(gid)).with_context(|| format!("giving {} to the user", node.run_dir.display()))?;
    }
    if let Some(log_dir) = &node.postgres.log_dir {
        make(log_dir, PRIVATE_MODE, uid, gid)?;
    }
    make(&node.postgres.data_dir, PRIVATE_MODE, uid, gid)?;
    make(&beside(&node.postgres.data_dir), PRIVATE_MODE, uid, gid)
}

/// `<data_dir>.pgherd`, the daemon's own directory beside the data.
fn beside(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.as_os_str().to_owned();
    name.push(".pgherd");
    PathBuf::from(name)
}

/// Only what is made here changes hands: a directory that is there already is somebody's decision.
fn make(path: &Path, mode: u32, uid: Uid, gid: Gid) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        fs::DirBuilder::new().recursive(true).mode(OPEN_MODE).create(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::DirBuilder::new().mode(mode).create(path).with_context(|| format!("making {}", path.display()))?;
    chown(path, Some(uid), Some(gid)).with_context(|| format!("giving {} to the user", path.display()))
}
