//! synchronous_standby_names as it takes effect, and replication slots: what pgherd's rules rest on.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::facts::postgres::SqlFacts;
use pgherd::facts::synchrony::{Acks, Names};
use pgherd::policy::parameters::live::UPSTREAM_CONF;
use pgherd::policy::slots::Change;
use pgherd::postgres::configure::{Outcome, install_running, served, set_names};
use pgherd::postgres::slots::keep;
use pgherd::postgres::{Keep, clone_from};
use pgherd::types::TimelineId;

use super::harness::{LIMIT, PATIENCE, Server, installations, parameters, place};

fn any(members: &[&str]) -> Acks {
    Acks { members: members.iter().map(|name| name.parse().unwrap()).collect(), acks: 1 }
}

/// With the checkpoint that shows that backends wait.
async fn set_and_prove(server: &Server, names: &Names) {
    set(server, names).await;
    server.sql.checkpoint(LIMIT).await.unwrap();
}

async fn set(server: &Server, names: &Names) {
    set_names(&server.layout, &server.sql, (names, false), LIMIT).await.unwrap();
}

/// A commit of a client's session; None = it waited for all of the time.
async fn commits(server: &Server, within: Duration) -> Option<()> {
    let statement = "set synchronous_commit = on; create table if not exists public.t (id int); insert into public.t values (1)";
    tokio::time::timeout(within, server.sql.with(LIMIT, async |to| to.execute(statement).await)).await.ok().map(|done| done.unwrap())
}

#[tokio::test]
async fn a_walsender_shows_by_its_priority_which_form_of_the_names_it_has_read() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let _standby = Server::standby_of(&leader, "b").await;
        for (names, priority) in [
            (Names::Any(any(&["b", "c"])), 1),
            (Names::First(any(&["b", "c"])), 2),
            (Names::Any(any(&["c"])), 0),
            (Names::Any(any(&["b"])), 1),
            (Names::Block, 0),
            (Names::Nobody, 0),
        ] {
            set_and_prove(&leader, &names).await;
            let shown = |facts: &SqlFacts| {
                facts.replicas.iter().any(|replica| replica.application_name == "b" && replica.sync_priority == priority)
            };
            let facts = leader.until("its walsender has read them", shown).await;
            assert_eq!(facts.synchronous_standby_names, names.to_string());
            assert!(facts.written_by_then >= facts.receive_lsn);
        }
    }
}

#[tokio::test]
async fn commits_wait_once_the_names_are_set_and_proved_and_go_on_when_a_standby_has_them() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        assert!(commits(&leader, LIMIT).await.is_some());
        set_and_prove(&leader, &Names::Block).await;
        assert!(commits(&leader, Duration::from_millis(300)).await.is_none(), "nobody can have the placeholder's name");
        let _standby = Server::standby_of(&leader, "b").await;
        set(&leader, &Names::Any(any(&["b"]))).await;
        assert!(commits(&leader, LIMIT).await.is_some());
    }
}

/// A standby that says how far it is only when it is sent something, as all do between two of their reports: it has the commit, and has said
/// so before it counted.
#[tokio::test]
async fn commits_that_wait_go_on_when_a_standby_comes_to_count_that_has_them_and_is_made_to_answer() {
    for installation in installations().await {
        let root = place();
        let off =
            [("wal_receiver_status_interval", "0"), ("wal_sender_timeout", "0"), ("wal_receiver_timeout", "0"), ("autovacuum", "off")];
        let silent = parameters(&off);
        let mut leader = Server::new(&installation, root.path(), "a");
        leader.inputs.parameters.extend(silent.clone());
        leader.make_primary().await;
        let mut standby = Server::new(&installation, root.path(), "b");
        let job = standby.clone_job(&leader, Keep::Empty).await;
        clone_from(&installation, &standby.layout, &job).await.unwrap();
        standby.inputs.parameters.extend(silent);
        standby.follow(&leader).await;
        set_and_prove(&leader, &Names::Block).await;
        // It writes a few bytes by itself, every 15 s.
        let writer = leader.ask("select pid::text from pg_stat_activity where backend_type = 'background writer'").await;
        let writer = Pid::from_raw(writer.parse().unwrap());
        kill(writer, Signal::SIGSTOP).unwrap();
        let sql = leader.sql.clone();
        let client = tokio::spawn(async move {
            let commit = "set synchronous_commit = on; create table public.t (id int)";
            sql.with(PATIENCE, async |to| to.execute(commit).await).await
        });
        leader.until_asked("the commit waits", WAITING, "1").await;
        leader.until("the standby has said that it has it", |facts| has_all(facts, "b")).await;
        set(&leader, &Names::Any(any(&["b"]))).await;
        leader.until("its walsender counts it", |facts| facts.replicas.iter().any(|replica| replica.sync_priority == 1)).await;
        assert_eq!(leader.ask(WAITING).await, "1", "PostgreSQL lets it go by itself: nobody has to answer");
        leader.sql.have_standbys_answer(LIMIT).await.unwrap();
        client.await.unwrap().unwrap();
        kill(writer, Signal::SIGCONT).unwrap();
        assert!(standby.sql.have_standbys_answer(LIMIT).await.is_err(), "a server in recovery wrote");
    }
}

/// Commits that wait for a standby.
const WAITING: &str = "select count(*)::text from pg_stat_activity where wait_event = 'SyncRep'";

fn has_all(facts: &SqlFacts, standby: &str) -> bool {
    facts.replicas.iter().any(|replica| replica.application_name == standby && replica.flush_lsn >= Some(facts.written_by_then))
}

/// Why a standby counts only once it is sent WAL of its leader's own timeline: `policy::synchrony::goal`.
#[tokio::test]
async fn a_standby_that_is_ahead_of_a_new_primary_acknowledges_what_it_does_not_have_and_is_sent_nothing_of_that_timeline() {
    for installation in installations().await {
        let root = place();
        let mut before = Server::primary(&installation, root.path(), "a").await;
        let mut leader = Server::standby_of(&before, "b").await;
        let mut ahead = Server::standby_of(&before, "c").await;
        before.run("create table public.common as select 1 as id").await;
        leader.catches_up_with(&before).await;
        leader.stop();
        before.run("create table public.ahead as select repeat('x', 100) from generate_series(1, 5000)").await;
        ahead.catches_up_with(&before).await;
        before.stop();
        leader.inputs.primary_conninfo = None;
        leader.start().await;
        let left_at = leader.until("it has replayed all that there is", |facts| facts.replayed_all).await.end_of_wal();
        let began = leader.promote().await.written_by_then;
        assert!(began > left_at);

        set_and_prove(&leader, &Names::Any(any(&["c"]))).await;
        let sql = leader.sql.clone();
        let client = tokio::spawn(async move {
            let commit = "set synchronous_commit = on; create table public.t (id int)";
            sql.with(PATIENCE, async |to| to.execute(commit).await).await
        });
        leader.until_asked("the commit waits", WAITING, "1").await;
        ahead.inputs.primary_conninfo = Some(ahead.conninfo_to(&leader));
        install_running(&installation, &ahead.layout, &ahead.sql, &ahead.files(), LIMIT).await.unwrap();
        let facts = leader.until("it says how far it is", |facts| facts.replicas.iter().any(|row| row.flush_lsn > Some(left_at))).await;
        let row = facts.replicas.iter().find(|row| row.application_name == "c").unwrap();
        assert!(row.sent_lsn <= Some(left_at) && row.sent_lsn < Some(began), "{row:?}");
        client.await.unwrap().expect("PostgreSQL has learned to tell: then the rule can go");
        assert_eq!(ahead.facts().await.timeline, TimelineId(1), "it has no WAL of the new primary");
        ahead.stop();
    }
}

/// pg_basebackup reports a flush position for the WAL that it streams, whose slot is temporary: by a member's name it would count as that
/// member. What it has is in no data directory yet, and in none at all when its leader is lost meanwhile.
#[tokio::test]
async fn a_copy_in_the_making_acknowledges_no_commit() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let copy = Server::new(&installation, root.path(), "b");
        set_and_prove(&leader, &Names::Any(any(&["b"]))).await;
        let mut job = copy.clone_job(&leader, Keep::Empty).await;
        // It lasts for minutes.
        (job.max_rate_bytes, job.compress) = (Some(32 * 1024), None);
        let (installation, layout) = (copy.installation.clone(), copy.layout.clone());
        let copying = tokio::spawn(async move { clone_from(&installation, &layout, &job).await });
        leader.until("it streams", |facts| facts.replicas.iter().any(|replica| replica.state == "streaming")).await;
        let sql = leader.sql.clone();
        let commit = "set synchronous_commit = on; create table public.t (id int)";
        let client = tokio::spawn(async move { sql.with(PATIENCE, async |to| to.execute(commit).await).await });
        leader.until_asked("the commit waits", WAITING, "1").await;
        let written = leader.facts().await.receive_lsn;
        leader.run("select pg_catalog.pg_switch_wal()").await;
        leader.until("the copy has it", |facts| facts.replicas.iter().any(|replica| replica.flush_lsn >= Some(written))).await;
        assert_eq!(leader.ask(WAITING).await, "1", "a commit that only a copy has is acknowledged");
        client.abort();
        copying.abort();
    }
}

#[tokio::test]
async fn whom_a_standby_follows_takes_effect_although_the_rest_of_the_configuration_is_refused() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let mut standby = Server::standby_of(&leader, "b").await;
        standby.inputs.primary_conninfo = None;
        standby.inputs.parameters.extend(parameters(&[("work_mem", "nonsense")]));
        let outcome = install_running(&installation, &standby.layout, &standby.sql, &standby.files(), LIMIT).await.unwrap();
        assert!(matches!(outcome, Outcome::PutBack { .. }), "{outcome:?}");
        let facts = standby.until("it receives no more", |facts| facts.walreceiver.is_none()).await;
        assert!(facts.in_recovery);
        standby.until("it has replayed all that there is", |facts| facts.replayed_all).await;
    }
}

#[tokio::test]
async fn whom_a_standby_follows_takes_effect_although_the_file_was_written_by_a_run_that_was_ended_before_the_reload() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let mut standby = Server::standby_of(&leader, "b").await;
        // As after a start: the files have served.
        served(&standby.layout).unwrap();
        standby.inputs.primary_conninfo = None;
        std::fs::write(standby.data_dir().join(UPSTREAM_CONF), standby.files().upstream).unwrap();
        let outcome = install_running(&installation, &standby.layout, &standby.sql, &standby.files(), LIMIT).await.unwrap();
        assert_eq!(outcome, Outcome::Unchanged);
        standby.until("it receives no more", |facts| facts.walreceiver.is_none() && !facts.receives).await;
    }
}

/// What a probe says is settled was so before it read how far the WAL goes.
#[tokio::test]
async fn the_columns_of_a_row_are_worked_out_in_their_order() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        let of_processes = "(select max(clock_timestamp()) from pg_stat_activity)";
        let of_wal = "case when not r.rec then clock_timestamp() end";
        for (first, second) in [(of_processes, of_wal), (of_wal, of_processes)] {
            let row = format!("select {first} as a, {second} as b from r offset 0");
            let question = format!("with r as materialized (select pg_is_in_recovery() as rec) select (a <= b)::text from ({row}) t");
            assert_eq!(server.ask(&question).await, "true", "{question}");
        }
    }
}

#[tokio::test]
async fn slots_are_made_moved_on_and_dropped_on_a_primary_and_on_a_standby() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let standby = Server::standby_of(&leader, "b").await;
        for server in [&leader, &standby] {
            keep(&server.sql, &[Change::CreatePhysical { name: "c".into() }], LIMIT).await.unwrap();
            let facts = server.until("the slot is there", |facts| facts.slots.len() == 1).await;
            let slot = facts.slots[0].clone();
            assert!(slot.name == "c" && !slot.logical && !slot.active && slot.restart_lsn.is_some() && !slot.is_lost(), "{slot:?}");
        }
        leader.run("create table public.u as select generate_series(1, 10000) as id").await;
        let target = leader.facts().await.receive_lsn;
        standby.until("it has received that", |facts| facts.replay_lsn >= target).await;
        keep(&standby.sql, &[Change::Advance { name: "c".into(), to: target }], LIMIT).await.unwrap();
        standby.until("the slot has moved on", |facts| facts.slots[0].restart_lsn == Some(target)).await;
        keep(&standby.sql, &[Change::Drop { name: "c".into() }, Change::Drop { name: "nobody".into() }], LIMIT).await.unwrap();
        standby.until("it is gone", |facts| facts.slots.is_empty()).await;
    }
}
