//! Whether a member that has diverged can be rewound, and if not, why not. Never looks at a disk.
//!
//! pg_rewind compares timelines by number and start, and nothing else: where two of one number are different ones (SAFETY row 53) it would
//! see no divergence, or another one, and leave pages that nobody's WAL puts right. There a copy is made. What surprises: a rewind that broke
//! off is taken up again only under the very leadership that it was begun under and within one boot of the host; in any other case what it
//! left behind may look finished and is not.

use super::{LeaderLineage, LostRange, Rejoin};
use crate::facts::postgres::{ControlFacts, DatabaseState, RewindAttempt};
use crate::mutants::{Mutant, mutant};
use crate::spec::cluster::OnRewindFailure;
use crate::types::{Epoch, Lsn, TimelineId};

/// pg_rewind is started so often on one data directory; then it is cloned, or left to a person (Patroni #3685).
pub const ATTEMPTS_MAX: u32 = 3;

pub(super) const SAME_NUMBER: &str = "pg_rewind cannot tell two timelines of one number apart";
pub(super) const NO_HISTORY: &str = "its own timeline's history cannot be read";
pub(super) const ANOTHER_FORK: &str = "pg_rewind would take another point for the one where the two part";
pub(super) const UNKNOWN_END: &str = "the end of its WAL cannot be read";

/// Whether a rewind is wanted, and what is in its way on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewinding {
    /// `postgres.use_pg_rewind`.
    pub wanted: bool,
    /// `postgres.on_rewind_failure`.
    pub on_failure: OnRewindFailure,
    /// What this host lacks: the program, room to keep WAL in.
    pub obstacle: Option<String>,
    /// How often it failed in a row in this run of the daemon.
    pub failures: u32,
}

/// WAL that is not in the leader's past.
pub(super) struct Divergence {
    pub why: String,
    pub timeline: TimelineId,
    pub from: Lsn,
    /// Why pg_rewind would not see it so.
    pub blind: Option<&'static str>,
}

/// A rewind that was begun and is not known to have ended, and what is known since.
#[derive(Debug, Clone, Copy)]
pub struct BrokenOff<'a> {
    /// Its marker.
    pub attempt: &'a RewindAttempt,
    /// The leader of now.
    pub leader: &'a LeaderLineage,
    /// Who promoted the leader's timeline, by etcd's history.
    pub promoted_under: Option<Epoch>,
    /// Nothing that was written can have been lost by the end of the host.
    pub same_boot: bool,
    /// The control file's latest checkpoint as it is now; None when it cannot be read.
    pub checkpoint: Option<Lsn>,
    /// Whether it is wanted, and what is in its way.
    pub rewinding: &'a Rewinding,
}

/// The decision on a member that has diverged.
pub(super) fn or_clone(
    local: &ControlFacts,
    leader: &LeaderLineage,
    rewinding: &Rewinding,
    diverged: Divergence,
    lost: LostRange,
) -> Rejoin {
    let obstacle = diverged.blind.map(str::to_owned).or_else(|| in_the_way(local, leader)).or_else(|| not_wanted(rewinding));
    let obstacle = obstacle.or_else(|| rewinding.obstacle.clone());
    match obstacle {
        Some(obstacle) => instead(diverged.why, Some(lost), rewinding, &obstacle),
        None => not_before_its_checkpoint(leader).unwrap_or(Rejoin::Rewind { why: diverged.why, lost }),
    }
}

/// The decision on a data directory that is half rewound. It is never started.
pub fn go_on(broken_off: BrokenOff<'_>) -> Rejoin {
    let BrokenOff { attempt, leader, rewinding, .. } = broken_off;
    if leader.in_recovery {
        return leader.history_not_known();
    }
    let another = (leader.timeline, broken_off.promoted_under) != (attempt.leader_timeline, attempt.promoted_under);
    let obstacle = if attempt.finished {
        None
    } else if attempt.attempts >= ATTEMPTS_MAX {
        Some(format!("pg_rewind was started {} times in vain", attempt.attempts))
    } else if !broken_off.same_boot {
        Some("the host was started anew during a rewind, and what pg_rewind had written may not have reached the disk".to_owned())
    } else if another && !mutant(Mutant::RewindResumedUnderAnother) {
        Some("another leadership began during a rewind, and pages of the one before are in it".to_owned())
    } else if broken_off.checkpoint != Some(attempt.checkpoint) {
        Some("pg_rewind was ended while it finished, and what it had written was not synced".to_owned())
    } else {
        not_wanted(rewinding)
    };
    match obstacle {
        Some(obstacle) => instead(attempt.why.clone(), Some(attempt.lost), rewinding, &obstacle),
        None => not_before_its_checkpoint(leader).unwrap_or(Rejoin::Rewind { why: attempt.why.clone(), lost: attempt.lost }),
    }
}

/// Patroni #3367: as long as the leader's control file names the timeline before, pg_rewind goes by that.
fn not_before_its_checkpoint(leader: &LeaderLineage) -> Option<Rejoin> {
    if leader.control_timeline == leader.timeline || mutant(Mutant::RewindBeforeCheckpoint) {
        return None;
    }
    Some(Rejoin::Wait {
        why: format!(
            "the leader's control file is still of timeline {}, and it writes on timeline {}: a rewind waits for its first checkpoint there",
            leader.control_timeline, leader.timeline
        ),
    })
}

fn in_the_way(local: &ControlFacts, leader: &LeaderLineage) -> Option<String> {
    if !local.data_checksums && !local.wal_log_hints {
        return Some("it has neither data checksums nor wal_log_hints".to_owned());
    }
    if !leader.full_page_writes {
        return Some("full_page_writes is off on the leader".to_owned());
    }
    if local.backup_label {
        return Some("there is a backup_label: it is a copy that was never recovered".to_owned());
    }
    let in_good_order = matches!(local.state, DatabaseState::ShutDown | DatabaseState::ShutDownInRecovery);
    let was_standby = local.standby_signal || matches!(local.state, DatabaseState::InArchiveRecovery | DatabaseState::StartingUp);
    // A primary that was not is recovered first, by itself (SAFETY row 55).
    (!in_good_order && was_standby).then(|| "it is a standby that was not stopped in good order".to_owned())
}

fn not_wanted(rewinding: &Rewinding) -> Option<String> {
    if !rewinding.wanted {
        return Some("postgres.use_pg_rewind is false".to_owned());
    }
    (rewinding.failures >= ATTEMPTS_MAX).then(|| format!("it failed {} times in a row", rewinding.failures))
}

/// What is done with a member that cannot be rewound.
fn instead(why: String, lost: Option<LostRange>, rewinding: &Rewinding, obstacle: &str) -> Rejoin {
    match rewinding.on_failure {
        OnRewindFailure::Stop if rewinding.wanted => Rejoin::Refuse {
            why: format!(
                "{why}; it cannot be rewound: {obstacle}; postgres.on_rewind_failure is stop: look at it, then move its data directory away to have it cloned"
            ),
        },
        OnRewindFailure::Stop | OnRewindFailure::Reclone => Rejoin::Clone { why: format!("{why}; it is not rewound: {obstacle}"), lost },
    }
}
