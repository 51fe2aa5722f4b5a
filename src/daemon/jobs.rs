//! The operations that change PostgreSQL or its files. One runs at a time; each can be cancelled at any await, and run again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::facts::cluster::HistoryEntry;
use crate::facts::guard::{PostmasterFacts, StartId, Word};
use crate::facts::postgres::{ControlFacts, DataDirectory};
use crate::facts::synchrony::Names;
use crate::guard::protocol::{Request, StartOrder};
use crate::machine::action::{AfterNames, Operation, StartAs, Upstream};
use crate::machine::event::{Configured, Event, Finished};
use crate::policy::rejoin::{self, OwnPromotion};
use crate::policy::{parameters, slots};
use crate::postgres::{
    InitdbJob, Outcome, Watch, configure, data_directory, half_segment, history_files, initdb, postmaster_command,
    recover_interrupted_swap, rewind, set_standby, unarchived,
};
use crate::spec::cluster::ClusterSpec;
use crate::types::{LockIdentity, TimelineId};

use super::archiving;
use super::guard_link::{GuardLink, Sink};
use super::host::Host;
use super::rejoining;

/// A statement on the local server.
const SQL_LIMIT: Duration = Duration::from_secs(10);
/// A checkpoint of a busy server on a slow disk.
pub(super) const CHECKPOINT_LIMIT: Duration = Duration::from_secs(120);
/// A few bytes of WAL.
const ANSWERS_LIMIT: Duration = Duration::from_secs(2);
/// A statement of post_init.
const POST_INIT_LIMIT: Duration = Duration::from_secs(600);
/// Whether the leader's server takes connections.
const REACH_LIMIT: Duration = Duration::from_secs(3);

/// Runs a job to its event.
pub async fn run(host: Arc<Host>, guard: Arc<GuardLink>, sink: Sink, operation: Operation) -> Event {
    let kind = operation.kind();
    let finished = match operation {
        Operation::Look => look(&host).await,
        Operation::Start { role, spec, generation, fall_back, names, closed } => {
            start(&host, (&guard, &sink), role, &spec, generation, fall_back, (&names, closed)).await
        }
        Operation::Open { spec } => open(&host, &spec).await.map(|()| Finished::Opened(Ok(()))),
        Operation::Configure { spec, generation, upstream, anew } => {
            let result = apply_configuration(&host, &spec, upstream.as_ref(), anew).await.map_err(|error| format!("{error:#}"));
            Ok(Finished::Configured { generation, upstream, result })
        }
        Operation::Initdb { spec } => make_cluster(&host, &spec).await.map(|()| Finished::Initialized(Ok(()))),
        Operation::Clone { from, leader, spec, old } => {
            rejoining::copy(&host, (&from, &leader), &spec, old, watched(&sink)).await.map(|()| Finished::Cloned(Ok(())))
        }
        Operation::EmptyDirectory { leader } => rejoining::empty(&host, &leader).await.map(|()| Finished::Emptied(Ok(()))),
        Operation::Rewind { from, spec, why, lost, history } => {
            let kept = |writes| sink(Event::Finished(Finished::WritesLost(Box::new(writes))));
            rejoining::rewind(&host, &from, &spec, (why, lost), &history, (kept, watched(&sink))).await.map(|()| Finished::Rewound(Ok(())))
        }
        Operation::PlanRejoin { leader, spec, history, rewinds_failed, starts_in_vain, .. } => {
            rejoining::plan(&host, &leader, &spec, &history, (rewinds_failed, starts_in_vain))
                .await
                .map(|plan| Finished::RejoinPlanned(Ok(plan)))
        }
        Operation::ArchiveLeft { leader, spec, shared } => {
            archiving::left(&host, &leader, &spec, shared).await.map(|archived| Finished::LeftArchived(Ok(archived)))
        }
        Operation::Promote { lock, timeline, parent } => {
            promote(&host, &guard, lock, timeline, parent).await.map(|()| Finished::PromotionAsked(Ok(())))
        }
        Operation::SetNames { names, spec, then, .. } => set_names(&host, &names, &spec, then).await.map(|()| Finished::NamesSet(Ok(()))),

        Operation::KeepSlots(changes) => keep_slots(&host, &changes).await.map(|()| Finished::SlotsKept(Ok(()))),
        Operation::EnsureRoles { spec, post_init } => roles(&host, &spec, post_init).await.map(|()| Finished::RolesEnsured(Ok(()))),
        Operation::Checkpoint => checkpoint(&host).await.map(|()| Finished::Checkpointed(Ok(()))),
        other => Err(anyhow::anyhow!("{:?} is not a job", other.kind())),
    };
    Event::Finished(finished.unwrap_or_else(|error| Finished::failed_job(kind, format!("{error:#}"))))
}

/// How far a copy or a rewind gets is a fact for the machine.
fn watched(sink: &Sink) -> Watch {
    let sink = Arc::clone(sink);
    Watch::new(move |bytes| sink(Event::Finished(Finished::GotOn(bytes))))
}

/// Whether the leader's server takes our connections, as what a standby and a rejoin need of it. Changes nothing: no job.
pub async fn reach_leader(host: Arc<Host>, leader: Upstream) -> Event {
    let reached = async { anyhow::Ok(host.leader_server(&leader)?.answers(REACH_LIMIT).await?) };
    Event::Finished(Finished::LeaderReached(reached.await.map_err(|error| format!("{error:#}"))))
}

async fn look(host: &Host) -> anyhow::Result<Finished> {
    // A copy whose swap a crash broke off is put in place, or back, first.
    recover_interrupted_swap(&host.layout)?;
    Ok(Finished::Looked(data_directory::look(&host.settled()?.installation, &host.layout).await))
}

pub(super) async fn control(host: &Host) -> anyhow::Result<ControlFacts> {
    match data_directory::look(&host.settled()?.installation, &host.layout).await {
        DataDirectory::Full(control) => Ok(control),
        DataDirectory::Unusable(why) => bail!(why),
        // Whoever ordered a start, a configuration or a promotion of it did not know.
        DataDirectory::HalfRewound(attempt) => bail!("it is half rewound, and is not started before it is whole: {}", attempt.why),
        DataDirectory::Empty | DataDirectory::Unknown => bail!("the data directory {} cannot be read", host.layout.data_dir().display()),
    }
}

async fn start(
    host: &Host,
    (guard, sink): (&Arc<GuardLink>, &Sink),
    role: StartAs,
    spec: &ClusterSpec,
    generation: u64,
    fall_back: bool,
    (names, closed): (&Names, bool),
) -> anyhow::Result<Finished> {
    configure::write_names(&host.layout, names, host.has_failover_slots(spec)?)?;
    let (upstream, control) = match &role {
        StartAs::Standby(upstream) => {
            // Nobody reads a segment for the archive any more that a standby may write over.
            rewind::end_orphans(&host.layout).await?;
            (upstream.as_ref(), Some(control(host).await?))
        }
        // What the control file says matters to standbys only, and the machine starts a primary on nothing but what it has just read.
        StartAs::Primary => {
            ensure!(rewind::marker(&host.layout)?.is_none(), "it is half rewound: it is no primary's");
            (None, None)
        }
    };
    // What must not be lower on a standby is lowered on the primary first (SAFETY row 50).
    let inputs = host.config_inputs(spec, upstream, control.as_ref().map(|control| control.floor))?;
    let old_files = prepare_files(host, spec, &inputs, fall_back).await?;
    if closed {
        configure::close(&host.layout, &host.pg_hba_closed(spec))?;
    }
    set_standby(host.layout.data_dir(), control.is_some())?;
    if let Some(control) = control {
        history_files::remove_unused_reservations(host.layout.data_dir(), control.timeline.max(control.min_recovery_timeline))?;
        // In recovery the control file does not say any more that it was a primary.
        if let Some(timeline) = rejoin::promoted_by_hand(&control) {
            host.layout.promotion_file().write(&OwnPromotion::by_hand(timeline))?;
        }
        if spec.postgres.archive_command.is_some() {
            keep_marks(host, &control);
        }
        complete_segments(host, sink).await?;
    }
    let word = if role == StartAs::Primary { Word::Writable } else { Word::Standby };
    let start = spawn_postmaster(host, guard, &parameters::command_line(&inputs), word).await?;
    Ok(match old_files {
        None => Finished::Started(Ok(start)),
        Some(why) => Finished::StartedOnOldFiles { generation, start, why },
    })
}

/// A failure is no reason not to start: most servers that become a standby have all their marks.
fn keep_marks(host: &Host, control: &ControlFacts) {
    if let Err(error) = unarchived::mark_left(&host.layout.data_dir().join("pg_wal"), control) {
        tracing::warn!(error = format!("{error:#}"), "WAL that is to be archived and is not marked so could not be looked for");
    }
}

/// A failure is no reason not to start: most standbys have nothing to complete.
async fn complete_segments(host: &Host, sink: &Sink) -> anyhow::Result<()> {
    match half_segment::complete(&host.settled()?.installation, host.layout.data_dir()).await {
        Ok(halves) => sink(Event::Finished(Finished::SegmentsCompleted(halves))),
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "whether a WAL segment was received in part could not be looked at");
        }
    }
    Ok(())
}

/// Some = the files that served before are used, and why.
async fn prepare_files(
    host: &Host,
    spec: &ClusterSpec,
    inputs: &parameters::ConfigInputs,
    fall_back: bool,
) -> anyhow::Result<Option<String>> {
    let files = host.config_files(spec, inputs)?;
    if fall_back && configure::fall_back(&host.layout, &files)? {
        return Ok(Some("PostgreSQL did not start with the new configuration; see its log".to_owned()));
    }
    match configure::install_stopped(&host.settled()?.installation, &host.layout, &files).await? {
        Outcome::PutBack { why } => Ok(Some(why)),
        Outcome::Unchanged | Outcome::Installed { .. } | Outcome::Reloaded { .. } => Ok(None),
    }
}

async fn spawn_postmaster(host: &Host, guard: &Arc<GuardLink>, settings: &[(String, String)], word: Word) -> anyhow::Result<StartId> {
    let command = postmaster_command(&host.settled()?.installation, &host.layout, settings);
    let text = |value: &std::ffi::OsString| value.to_string_lossy().into_owned();
    let order = StartOrder {
        program: command.program,
        arguments: command.argv.iter().skip(1).map(text).collect(),
        data_dir: host.layout.data_dir().to_owned(),
        environment: command.env.iter().map(|(name, value)| (text(name), text(value))).collect(),
        word,
        stderr: None,
    };
    let facts = ask(guard, Request::Start(order)).await.context("starting PostgreSQL")?;
    match facts.postmaster {
        PostmasterFacts::Running { start, .. } | PostmasterFacts::Ending { start, .. } => Ok(start),
        PostmasterFacts::ProvedEmpty { .. } | PostmasterFacts::Unclaimed { .. } => bail!("PostgreSQL ended at once; see its log"),
    }
}

async fn ask(guard: &Arc<GuardLink>, request: Request) -> anyhow::Result<crate::facts::guard::GuardFacts> {
    let guard = Arc::clone(guard);
    Ok(tokio::task::spawn_blocking(move || guard.ask(&request)).await.context("asking the guard")??)
}

async fn apply_configuration(host: &Host, spec: &ClusterSpec, upstream: Option<&Upstream>, anew: bool) -> anyhow::Result<Configured> {
    let settled = host.settled()?;
    if anew {
        host.write_passfile().context("reading the secrets again")?;
    }
    let control = control(host).await?;
    let in_recovery = control.standby_signal;
    let inputs = host.config_inputs(spec, upstream, in_recovery.then_some(control.floor))?;
    let files = host.config_files(spec, &inputs)?;
    let outcome = configure::install_running(&settled.installation, &host.layout, &settled.sql, &files, SQL_LIMIT).await?;
    if let (true, Outcome::Unchanged) = (anew, &outcome) {
        let major = settled.installation.major;
        let errors = settled.sql.with(SQL_LIMIT, async |connection| configure::file_errors(connection, major).await).await?;
        ensure!(errors.is_empty(), "PostgreSQL finds errors in its files: {}", errors.join("; "));
    }
    Ok(match outcome {
        Outcome::PutBack { why } => Configured::PutBack(why),
        Outcome::Unchanged | Outcome::Installed { .. } | Outcome::Reloaded { .. } => Configured::Taken,
    })
}

async fn open(host: &Host, spec: &ClusterSpec) -> anyhow::Result<()> {
    configure::open(&host.layout, &host.settled()?.sql, &host.pg_hba(spec), SQL_LIMIT).await.context("letting clients in")
}

async fn make_cluster(host: &Host, spec: &ClusterSpec) -> anyhow::Result<()> {
    let options = &spec.bootstrap.initdb;
    let accounts = host.accounts()?;
    let job = InitdbJob {
        superuser: accounts.superuser.username,
        password: accounts.superuser.password,
        encoding: Some(options.encoding.clone()),
        locale: Some(options.locale.clone()),
        data_checksums: options.data_checksums,
        auth_local: options.auth_local.clone(),
        auth_host: options.auth_host.clone(),
    };
    initdb(&host.settled()?.installation, &host.layout, &job).await
}

/// The guard's acknowledgement first; then what has to be on disk before PostgreSQL may choose its timeline; then promote.
async fn promote(host: &Host, guard: &Arc<GuardLink>, lock: LockIdentity, timeline: TimelineId, parent: TimelineId) -> anyhow::Result<()> {
    // Writes stand still meanwhile: the connection is made beside the rest.
    let sql = host.settled()?.sql.clone();
    let session = tokio::spawn(async move { sql.session(SQL_LIMIT).await });
    let facts = ask(guard, Request::Facts).await?;
    let PostmasterFacts::Running { start, word, .. } = facts.postmaster else { bail!("PostgreSQL does not run") };
    let data_dir = host.layout.data_dir();
    let others: Vec<(TimelineId, String)> =
        (parent.next().0..timeline.0).map(|id| (TimelineId(id), "another leadership".to_owned())).collect();
    history_files::lay(data_dir, &others)?;
    host.layout.promotion_file().write(&OwnPromotion { timeline, epoch: lock.epoch, parent, switch_lsn: None })?;
    let session = session.await.context("connecting to PostgreSQL")?.context("connecting to PostgreSQL, to promote it")?;
    if word != Word::Writable {
        // Last before the promotion: the guard refuses it from A on.
        ask(guard, Request::Vouch { start, word: Word::Writable }).await.context("having the guard acknowledge the promotion")?;
    }
    session.promote(SQL_LIMIT).await.context("promoting PostgreSQL")
}

async fn set_names(host: &Host, names: &Names, spec: &ClusterSpec, then: AfterNames) -> anyhow::Result<()> {
    let names = (names, host.has_failover_slots(spec)?);
    let sql = &host.settled()?.sql;
    configure::set_names(&host.layout, sql, names, SQL_LIMIT).await.context("setting synchronous_standby_names")?;
    match then {
        AfterNames::Nothing => {}
        // By the checkpointer's word backends wait.
        AfterNames::Checkpoint => sql.checkpoint(CHECKPOINT_LIMIT).await.context("having synchronous_standby_names read")?,
        AfterNames::Answers => {
            // They are in force all the same, and standbys answer by themselves, if later.
            if let Err(error) = sql.have_standbys_answer(ANSWERS_LIMIT).await {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "commits that wait may go on later: nothing could be written for standbys to answer"
                );
            }
        }
    }
    Ok(())
}

async fn keep_slots(host: &Host, changes: &[slots::Change]) -> anyhow::Result<()> {
    crate::postgres::slots::keep(&host.settled()?.sql, changes, SQL_LIMIT).await.context("seeing to replication slots")
}

async fn roles(host: &Host, spec: &ClusterSpec, post_init: bool) -> anyhow::Result<()> {
    let sql = &host.settled()?.sql;
    crate::postgres::roles::ensure_roles(sql, &host.accounts()?, SQL_LIMIT).await.context("seeing to pgherd's roles")?;
    if post_init {
        sql.run_post_init(&spec.bootstrap.post_init, POST_INIT_LIMIT).await?;
    }
    Ok(())
}

async fn checkpoint(host: &Host) -> anyhow::Result<()> {
    host.settled()?.sql.checkpoint(CHECKPOINT_LIMIT).await.context("making a checkpoint before the stop")
}

/// `history` with the parent and the switch point of our promotion, as the history file tells: the files decide.
pub fn with_switch_point(host: &Host, mut history: Vec<HistoryEntry>) -> Vec<HistoryEntry> {
    let ours = history.iter_mut().rev().find(|entry| entry.epoch.is_some() && entry.parent.is_none() && entry.timeline > TimelineId(1));
    let Some(entry) = ours else { return history };
    match history_files::read(host.layout.data_dir(), entry.timeline) {
        Ok(Some(ancestors)) => {
            if let (Some(switch), Some(epoch)) = (ancestors.0.last(), entry.epoch) {
                entry.parent = Some(switch.parent);
                entry.switch_lsn = Some(switch.at);
                let own = OwnPromotion { timeline: entry.timeline, epoch, parent: switch.parent, switch_lsn: Some(switch.at) };
                if let Err(error) = host.layout.promotion_file().write(&own) {
                    tracing::warn!(error = format!("{error:#}"), "our own record of the promotion could not be completed");
                }
            }
        }
        Ok(None) => tracing::warn!(timeline = %entry.timeline, "PostgreSQL left no history file for the timeline it is on"),
        Err(error) => tracing::warn!(error = format!("{error:#}"), "the history file of our timeline cannot be read"),
    }
    history
}

/// The files in place have served: a later start that fails can fall back to them.
pub fn note_served(host: &Arc<Host>) {
    let host = Arc::clone(host);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = configure::served(&host.layout) {
            tracing::warn!(error = format!("{error:#}"), "the configuration files that serve could not be kept beside");
        }
    });
}
