//! How a primary ends, what that leaves on disk, and what may go on after it.

use std::cmp::Ordering;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::facts::postgres::DatabaseState;
use pgherd::types::{Lsn, TimelineId};

use super::super::clock::secs;
use super::super::postgres::Phase;
use super::harness::{LIMIT, eventually, eventually_async};
use super::twins::Twins;

pub async fn primary(mut twins: Twins) {
    twins.primary(0).await;
    twins.commit(0).await;
    twins.running(0).await;
    assert_eq!(twins.stop(0).exit_status, Some(0));
    let stopped = twins.at_rest(0).await;
    assert_eq!((stopped.state, stopped.timeline), (DatabaseState::ShutDown, TimelineId(1)));
    assert_eq!(stopped.checkpoint, Ordering::Equal, "the shutdown checkpoint is the last record");

    let before = checkpoints(&twins).await;
    twins.start_as_primary(0).await;
    assert_eq!(checkpoints(&twins).await, before, "nothing was to be recovered, and nothing is written");
    twins.commit(0).await;
    twins.crash(0);
    let crashed = twins.at_rest(0).await;
    assert_eq!((crashed.state, crashed.checkpoint), (DatabaseState::InProduction, Ordering::Less));

    twins.start_as_primary(0).await;
    let after = checkpoints(&twins).await;
    assert!(after.0 > before.0 && after.1 > before.1, "recovery ends with a checkpoint: {before:?} {after:?}");
    twins.running(0).await;
    twins.checkpoint(0).await;
    twins.commit(0).await;
    twins.crash(0);
    twins.at_rest(0).await;
}

/// Where the last checkpoint is, really and in the model.
async fn checkpoints(twins: &Twins) -> (Lsn, Lsn) {
    (twins.servers[0].control().await.checkpoint, twins.model_rest(0).0.checkpoint)
}

pub async fn orphan(mut twins: Twins) {
    twins.primary(0).await;
    // Busy until a file is there, and not in any wait that a postmaster's death would end.
    let sql = twins.servers[0].sql.clone();
    let busy = "do $$ declare until timestamptz := clock_timestamp() + interval '60 s'; begin while (pg_stat_file('go_on', true)).size is null and clock_timestamp() < until loop end loop; insert into public.t values (2); end $$";
    let backend = tokio::spawn(async move { sql.with(LIMIT, async |connection| connection.execute(busy).await).await });
    let pid = "select coalesce(max(pid), 0)::text from pg_stat_activity where state = 'active' and query like 'do %'";
    eventually_async(async || twins.servers[0].ask(pid).await != "0").await;
    let pid = twins.servers[0].ask(pid).await;

    let ended = twins.servers[0].end(Signal::SIGKILL);
    let now = twins.sim.now;
    twins.sim.hosts[0].server.kill_postmaster(now, secs(5));
    assert_eq!(twins.ended_alike(0, ended).signal, Some(9));
    assert_eq!(twins.at_rest(0).await.state, DatabaseState::InProduction);

    // Nothing may be started beside it.
    assert_eq!(twins.start_refused(0, None).exit_status, Some(1));

    assert!(!backend.is_finished());
    std::fs::write(twins.servers[0].data_dir().join("go_on"), "").unwrap();
    backend.await.unwrap().unwrap();
    assert!(twins.model_writes(0), "a busy backend acknowledges after its postmaster's death");
    twins.model_goes_on(6);
    assert!(twins.sim.hosts[0].server.is_empty());
    std::fs::remove_file(twins.servers[0].data_dir().join("go_on")).unwrap();

    // Idle, it sees that it has no postmaster any more. Whoever inherits it may be slow to reap it.
    let command = format!("/proc/{pid}/cmdline");
    eventually(|| std::fs::read(&command).map_or(true, |words| words.is_empty())).await;
    twins.start_as_primary(0).await;
    assert_eq!(twins.servers[0].ask("select count(*)::text from public.t where id = 2").await, "1");
    twins.running(0).await;
    twins.stop(0);
    twins.at_rest(0).await;
}

pub async fn handover(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.commit(0).await;
    twins.caught_up(1, 0).await;
    twins.running(0).await;
    twins.running(1).await;

    let receiver = twins.servers[1].ask("select pid::text from pg_stat_wal_receiver").await;
    let receiver = Pid::from_raw(receiver.parse().unwrap());
    kill(receiver, Signal::SIGSTOP).unwrap();
    twins.sim.hosts[1].stands = true;
    kill(twins.servers[0].pid(), Signal::SIGINT).unwrap();
    let now = twins.sim.now;
    let twin = &mut twins.sim;
    twin.hosts[0].server.fast_stop(now, &mut twin.random);
    twin.server_changed(0);
    eventually_async(async || twins.servers[0].control().await.state == DatabaseState::ShutDown).await;
    twins.model_until("the shutdown checkpoint is written", |sim| {
        sim.hosts[0].server.postmaster.as_ref().is_some_and(|postmaster| matches!(postmaster.phase, Phase::Draining { .. }))
    });
    // A second is long against what is left to do.
    assert!(super::wait::holds_throughout(secs(1), || !twins.servers[0].has_ended()), "it waits for the standby");
    twins.model_goes_on(1);
    assert!(twins.sim.hosts[0].server.postmaster.is_some(), "it waits for the standby");

    kill(receiver, Signal::SIGCONT).unwrap();
    twins.sim.hosts[1].stands = false;
    twins.sim.server_changed(1);
    let ended = twins.servers[0].wait();
    assert_eq!(twins.ended_alike(0, ended).exit_status, Some(0));
    let stopped = twins.at_rest(0).await;
    assert_eq!((stopped.state, stopped.checkpoint), (DatabaseState::ShutDown, Ordering::Equal));
    // The successor's test: at once, for who streams has the checkpoint before the stop ends.
    let checkpoint = twins.servers[0].control().await.checkpoint;
    let facts = twins.servers[1].facts().await;
    assert!(facts.end_of_wal() > checkpoint, "{} {checkpoint}", facts.end_of_wal());
    let (facts, data) = (twins.model_facts(1), twins.model_data(0));
    assert!(facts.end_of_wal() > data.checkpoint, "the model: {} {}", facts.end_of_wal(), data.checkpoint);
    twins.servers[1].until("its walreceiver is gone", |facts| facts.walreceiver.is_none()).await;
    twins.running(1).await;
}
