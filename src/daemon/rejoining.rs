//! How a member gets back behind the leader, as jobs: judged on what its files and the leader say, then a rewind or a copy.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::facts::cluster::HistoryEntry;
use crate::facts::lost::LostWrites;
use crate::facts::postgres::DataDirectory;
use crate::machine::action::{Old, Upstream};
use crate::policy::rejoin::rewind::{BrokenOff, Rewinding, go_on};
use crate::policy::rejoin::{self, Inputs, LeaderLineage, LostRange, Rejoin};
use crate::policy::upstream;
use crate::postgres::{
    CloneJob, Keep, LeaderFacts, RewindJob, Watch, basebackup, clone_from, data_directory, half_segment, history_files,
    recover_interrupted_swap, rewind, swap, wal,
};
use crate::spec::cluster::{Checkpoint, ClusterSpec};

use super::host::Host;
use super::jobs::{self, CHECKPOINT_LIMIT};

/// A question to the leader.
const LEADER_LIMIT: Duration = Duration::from_secs(10);
/// A copy of the leader: terabytes over a slow line are somebody's normal case.
const CLONE_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
/// A rewind copies what has changed, and all that is not a relation's.
const REWIND_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Judges the way back.
pub async fn plan(
    host: &Host,
    leader: &Upstream,
    spec: &ClusterSpec,
    history: &[HistoryEntry],
    (failures, starts_in_vain): (u32, u32),
) -> anyhow::Result<Rejoin> {
    let installation = &host.settled()?.installation;
    let rewinding = Rewinding {
        wanted: spec.postgres.use_pg_rewind,
        on_failure: spec.postgres.on_rewind_failure,
        obstacle: rewind::obstacle(installation, &host.layout),
        failures,
    };
    let server = host.leader_server(leader)?;
    let mut asked = server.look(LEADER_LIMIT).await.context("asking the leader for its history")?;
    let mut plan = judge(host, &asked.lineage, history, &rewinding).await?;
    if matches!(plan, Rejoin::Wait { .. }) && !asked.lineage.in_recovery {
        // Its first checkpoint on its timeline may be minutes away, and it is all that is waited for.
        if let Err(error) = server.checkpoint(CHECKPOINT_LIMIT).await {
            tracing::info!(%error, "the leader does not make a checkpoint for this member: its own first one is waited for");
            return Ok(plan);
        }
        asked = server.look(LEADER_LIMIT).await.context("asking the leader for its history")?;
        plan = judge(host, &asked.lineage, history, &rewinding).await?;
    }
    if starts_in_vain > 0 && plan == Rejoin::Follow {
        let halves = half_segment::look(installation, host.layout.data_dir()).await.context("looking for WAL that was received in part")?;
        plan = rejoin::unless_it_does_not_start(plan, starts_in_vain, halves.iter().find(|half| half.obstacle.is_some()));
    }
    if plan == Rejoin::Follow {
        history_files::bring(host.layout.data_dir(), &asked.history_files)?;
    }
    Ok(plan)
}

async fn judge(host: &Host, leader: &LeaderLineage, history: &[HistoryEntry], rewinding: &Rewinding) -> anyhow::Result<Rejoin> {
    let installation = &host.settled()?.installation;
    if let DataDirectory::HalfRewound(attempt) = data_directory::look(installation, &host.layout).await {
        let control = data_directory::control_file(installation, &host.layout).await;
        return Ok(go_on(BrokenOff {
            attempt: &attempt,
            leader,
            promoted_under: rejoin::promoted_under(leader.timeline, history),
            same_boot: attempt.boot_id == host.incarnation.boot_id,
            checkpoint: control.ok().map(|control| control.checkpoint),
            rewinding,
        }));
    }
    let local = jobs::control(host).await?;
    let wal = wal::end_of_wal(installation, host.layout.data_dir(), &local, wal::WAL_LIMIT).await;
    let own_promotion = host.layout.promotion_file().read()?;
    Ok(rejoin::decide(Inputs {
        local: &local,
        wal: &wal,
        own_promotion: own_promotion.as_ref(),
        promoted_under: rejoin::promoted_under(wal.timeline, history),
        led_before: rejoin::led_before(wal.timeline, history),
        leader,
        rewinding,
    }))
}

/// Rewinds the data directory to the leader, or goes on with it. What is kept of its WAL is told as soon as it is.
pub async fn rewind(
    host: &Host,
    from: &Upstream,
    spec: &ClusterSpec,
    (why, lost): (String, LostRange),
    history: &[HistoryEntry],
    (kept, watch): (impl FnOnce(LostWrites) + Send, Watch),
) -> anyhow::Result<()> {
    let leader: LeaderFacts = host.leader_server(from)?.look(LEADER_LIMIT).await.context("asking the leader before the rewind")?;
    let job = RewindJob {
        conninfo: host.rewind_conninfo(from),
        promoted_under: rejoin::promoted_under(leader.lineage.timeline, history),
        leader,
        why,
        lost,
        boot_id: host.incarnation.boot_id.clone(),
        restore_wal: spec.postgres.restore_command.is_some(),
        limit: REWIND_LIMIT,
        watch,
    };
    rewind::rewind(&host.settled()?.installation, &host.layout, &job, kept).await
}

/// Empties a data directory that an operator gave up, once it is known that the leader can be copied here.
pub async fn empty(host: &Host, leader: &Upstream) -> anyhow::Result<()> {
    rewind::end_orphans(&host.layout).await?;
    recover_interrupted_swap(&host.layout)?;
    let leader = host.leader_server(leader)?.look(LEADER_LIMIT).await.context("asking the leader before the directory is emptied")?;
    basebackup::refuse_impossible(&host.layout, host.settled()?.installation.major, &leader, &host.node.postgres.tablespace_map)?;
    ensure!(!leader.lineage.in_recovery, "the leader is in recovery: the directory is not emptied");
    swap::empty(&host.layout).await
}

/// Copies the leader, or a standby of it, and puts the copy in the data directory's place.
pub async fn copy(host: &Host, (from, leader): (&Upstream, &Upstream), spec: &ClusterSpec, old: Old, watch: Watch) -> anyhow::Result<()> {
    let installation = &host.settled()?.installation;
    rewind::end_orphans(&host.layout).await?;
    // What a crash broke off between two renames is whole first: it is not swapped over.
    recover_interrupted_swap(&host.layout)?;
    let keep = match (data_directory::look(installation, &host.layout).await, old) {
        (DataDirectory::Unknown, _) => bail!("what is in the data directory is not known: nothing takes its place"),
        (DataDirectory::Empty, _) => Keep::Empty,
        (DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_), Old::Empty) => {
            bail!("somebody has put data into {}: it is looked at first", host.layout.data_dir().display())
        }
        (DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_), Old::GivenUp) => Keep::Nothing,
        (DataDirectory::Full(_) | DataDirectory::Unusable(_) | DataDirectory::HalfRewound(_), Old::Kept(lost)) => {
            Keep::Whole { why: why_kept(lost) }
        }
    };
    let source = source_to_copy(host, from, leader).await?;
    let options = &spec.replication.basebackup;
    let job = CloneJob {
        conninfo: host.replication_conninfo(from),
        source,
        max_rate_bytes: options.max_rate,
        compress: options.compress.clone(),
        checkpoint_fast: options.checkpoint == Checkpoint::Fast,
        keep,
        tablespace_map: host.node.postgres.tablespace_map.clone(),
        limit: CLONE_LIMIT,
        watch,
    };
    clone_from(installation, &host.layout, &job).await?;
    Ok(())
}

fn why_kept(lost: Option<LostRange>) -> String {
    let Some(LostRange { timeline, from, to }) = lost else { return "it may hold WAL that is nowhere else".to_owned() };
    match to {
        Some(to) => format!("timeline {timeline} from {from} to {to} is nowhere else ({} bytes)", to.bytes_since(from)),
        None => format!("timeline {timeline} from {from} on is nowhere else; how far it goes could not be read"),
    }
}

/// What is copied, as it says itself; with the leader's history files, which are whole.
async fn source_to_copy(host: &Host, from: &Upstream, leader: &Upstream) -> anyhow::Result<LeaderFacts> {
    let of_leader = host.leader_server(leader)?.look(LEADER_LIMIT).await.context("asking the leader before the copy")?;
    if from == leader {
        return Ok(of_leader);
    }
    let member = &from.member;
    let of_source = host.leader_server(from)?.look(LEADER_LIMIT).await.with_context(|| format!("asking `{member}` before the copy"))?;
    upstream::may_be_copied(&of_source.lineage, &of_leader.lineage)
        .map_err(|why| anyhow::anyhow!("`{member}` (tag clonefrom) is not copied: {why}"))?;
    Ok(LeaderFacts { history_files: of_leader.history_files, ..of_source })
}
