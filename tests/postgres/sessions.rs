//! The probe, the roles, and quoting, against a server that answers, refuses, hangs or is gone.

use nix::sys::signal::{Signal, kill};
use pgherd::facts::postgres::ProbeOutcome;
use pgherd::postgres::roles::ensure_roles;
use pgherd::postgres::{Keep, Secret, Sql, SqlError, clone_from, quote, set_standby};
use std::time::Duration;

use super::harness::{
    LIMIT, PATIENCE, REPLICATION_PASSWORD, REPLICATION_USER, REWIND_PASSWORD, SUPERUSER_PASSWORD, Server, accounts, installations, place,
};

#[tokio::test]
async fn a_server_that_is_gone_or_frozen_is_unknown_and_one_that_came_back_is_seen_at_once() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        server.facts().await;
        kill(server.pid(), Signal::SIGSTOP).unwrap();
        // The kept connection still answers while only the postmaster is frozen; a new one cannot be made.
        let fresh = Sql::local(root.path(), server.port, "postgres").probe(Duration::from_millis(300)).await;
        assert!(matches!(fresh.outcome, ProbeOutcome::Unknown(_)), "{fresh:?}");
        kill(server.pid(), Signal::SIGCONT).unwrap();
        server.stop();
        assert!(matches!(server.probe().await.outcome, ProbeOutcome::Unknown(_)));
        server.spawn();
        let first = server.until("it is back", |_| true).await.postmaster_start_time;
        server.crash();
        server.start().await;
        assert_ne!(server.facts().await.postmaster_start_time, first, "a restart behind the kept connection is seen");
    }
}

#[tokio::test]
async fn the_question_is_planned_once_and_every_change_is_seen_by_the_next_probe() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        let before = server.facts().await;
        assert!(before.slots.is_empty() && before.lowered.is_empty(), "{before:?}");
        server.run("select pg_create_physical_replication_slot('one'); alter role postgres set synchronous_commit = off").await;
        let after = server.facts().await;
        assert_eq!(after.slots.iter().map(|slot| slot.name.as_str()).collect::<Vec<_>>(), ["one"]);
        assert_eq!(after.lowered, ["postgres in every database"]);
        let asked =
            server.ask("select string_agg(query, '; ') from pg_stat_activity where query ilike '%probe%' and pid <> pg_backend_pid()");
        assert_eq!(asked.await, "execute probe", "neither a second connection nor a plan for each probe");
    }
}

#[tokio::test]
async fn a_standby_that_is_not_consistent_yet_says_not_yet() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let mut standby = Server::new(&installation, root.path(), "b");
        clone_from(&installation, &standby.layout, &standby.clone_job(&leader, Keep::Empty).await).await.unwrap();
        // Without WAL, and with nobody to get it from, the end of the backup is never reached.
        for entry in std::fs::read_dir(standby.data_dir().join("pg_wal")).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        standby.install().await;
        standby.spawn();
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut looks = tokio::time::interval(Duration::from_millis(50));
        loop {
            looks.tick().await;
            match standby.probe().await.outcome {
                ProbeOutcome::NotYet(why) => {
                    assert!(!why.is_empty());
                    break;
                }
                other => assert!(
                    std::time::Instant::now() < deadline && !matches!(other, ProbeOutcome::Accepting(_)),
                    "{other:?}\n{}",
                    standby.log()
                ),
            }
        }
    }
}

#[tokio::test]
async fn row_77_roles_are_made_once_and_their_passwords_reach_no_log() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        assert!(ensure_roles(&server.sql, &accounts(), LIMIT).await.unwrap().is_empty(), "a converged cluster is not written to");
        let inserted = "select pg_current_wal_insert_lsn()";
        let position = server.ask(inserted).await;
        ensure_roles(&server.sql, &accounts(), LIMIT).await.unwrap();
        assert_eq!(server.ask(inserted).await, position);

        for (user, password) in [("postgres", SUPERUSER_PASSWORD), ("rewinder", REWIND_PASSWORD)] {
            let sql = |password| Sql::remote("127.0.0.1", server.port, user, &Secret::new(password));
            sql(password).with(LIMIT, async |connection| connection.execute("select 1").await).await.unwrap();
            let refused = sql("wrong").with(LIMIT, async |connection| connection.execute("select 1").await).await;
            assert!(matches!(refused, Err(SqlError::Refused { code, .. }) if code == "28P01"), "a wrong password is refused");
        }
        let name = quote::literal(REPLICATION_USER).unwrap();
        assert_eq!(server.ask(&format!("select rolreplication and rolcanlogin from pg_authid where rolname = {name}")).await, "t");

        let mut changed = accounts();
        changed.replication.password = Secret::new("canary-new");
        assert_eq!(ensure_roles(&server.sql, &changed, LIMIT).await.unwrap(), [REPLICATION_USER]);
        server.run(&format!("alter role {} with nologin", quote::identifier(REPLICATION_USER).unwrap())).await;
        assert_eq!(ensure_roles(&server.sql, &changed, LIMIT).await.unwrap(), [REPLICATION_USER], "what is taken away is given back");

        let log = server.log();
        assert!(log.contains("nologin"), "the log was on: log_statement is all");
        for secret in [SUPERUSER_PASSWORD, REPLICATION_PASSWORD, REWIND_PASSWORD, "canary", "SCRAM-SHA-256$"] {
            assert!(!log.contains(secret), "{secret} is in the log");
        }
    }
}

#[tokio::test]
async fn row_76_hostile_names_and_texts_come_back_as_they_were() {
    let hostile =
        ["a\"b", "a'b", "'; drop table t; --", "\\'", "a\nb", "$1", "\u{e4}\u{1F418}", "../../etc/passwd", "A b", "E'\\x'", "\"", "\\"];
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        for text in hostile {
            assert_eq!(server.ask(&format!("select {}", quote::literal(text).unwrap())).await, text);
            server.run(&format!("create role {}; set standard_conforming_strings = off", quote::identifier(text).unwrap())).await;
            let found = server.sql.with(LIMIT, async |connection| {
                connection.execute("set standard_conforming_strings = off").await?;
                connection.row(&format!("select count(*)::text from pg_roles where rolname = {}", quote::literal(text).unwrap())).await
            });
            assert_eq!(found.await.unwrap().get(0), Some("1"), "{text:?}");
        }
    }
}

#[tokio::test]
async fn settings_of_roles_and_databases_do_not_shape_our_sessions() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        server
            .run(
                "alter role postgres set statement_timeout = '1ms'; alter role postgres set default_transaction_read_only = on; \
                 alter database postgres set search_path = nowhere",
            )
            .await;
        assert_eq!(
            server.ask("select pg_sleep(0.05)::text || current_setting('statement_timeout') || current_setting('search_path')").await,
            "0pg_catalog"
        );
        server.run("create table public.t (id int)").await;
        server.sql.checkpoint(LIMIT).await.unwrap();
        // A commit of ours must not wait for a standby that never comes.
        let names = (&pgherd::facts::synchrony::Names::Block, false);
        pgherd::postgres::configure::set_names(&server.layout, &server.sql, names, LIMIT).await.unwrap();
        server.sql.checkpoint(LIMIT).await.unwrap();
        server.run("create table public.u (id int)").await;
        server.sql.have_standbys_answer(LIMIT).await.unwrap();
    }
}

#[tokio::test]
async fn post_init_stops_at_the_first_failure_and_names_it() {
    let installation = installations().await.remove(0);
    let root = place();
    let server = Server::primary(&installation, root.path(), "a").await;
    let statements = [
        "create database app".to_owned(),
        "create table t (id int); create role app login".to_owned(),
        "nonsense".to_owned(),
        "create role late".to_owned(),
    ];
    let error = format!("{:#}", server.sql.run_post_init(&statements, LIMIT).await.unwrap_err());
    assert!(error.contains("post_init[2]"), "{error}");
    assert_eq!(server.ask("select string_agg(rolname, ',') from pg_roles where rolname in ('app', 'late')").await, "app");
    assert_eq!(server.ask("select count(*)::text from public.t").await, "0", "where PostgreSQL makes tables by default");
    set_standby(server.data_dir(), true).unwrap();
    set_standby(server.data_dir(), false).unwrap();
    assert!(!server.data_dir().join("standby.signal").exists());
}
