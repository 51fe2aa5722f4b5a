//! Configuration files on real servers: what is taken, what is taken back, and what comes out of a value.

use std::collections::BTreeMap;

use pgherd::policy::hba::CLOSED;
use pgherd::policy::parameters::{postgresql_conf, quote};
use pgherd::postgres::configure::{close, fall_back, install_running, install_stopped, open, served};
use pgherd::postgres::{ConfigFiles, Outcome};

use super::harness::{LIMIT, Server, installations, parameters, place};

async fn install(server: &Server, files: &ConfigFiles) -> Outcome {
    install_running(&server.installation, &server.layout, &server.sql, files, LIMIT).await.unwrap()
}

#[tokio::test]
async fn a_change_is_reloaded_once_and_an_unchanged_file_is_not_written() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        served(&server.layout).unwrap();
        assert_eq!(install(&server, &server.files()).await, Outcome::Unchanged);
        server.inputs.parameters.extend(parameters(&[("work_mem", "7MB"), ("max_connections", "120")]));
        let outcome = install(&server, &server.files()).await;
        assert_eq!(outcome, Outcome::Reloaded { pending_restart: vec!["max_connections".into()], undone: Vec::new() });
        assert_eq!(server.ask("select current_setting('work_mem')").await, "7MB");
        assert_eq!(server.facts().await.pending_restart, ["max_connections"]);
        assert_eq!(install(&server, &server.files()).await, Outcome::Unchanged);
    }
}

#[tokio::test]
async fn a_value_that_postgresql_refuses_is_put_back_with_its_words() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        served(&server.layout).unwrap();
        let good = server.files();
        for (name, value) in [("work_mem", "lots"), ("no_such_parameter", "1"), ("max_connections", "-5"), ("log_timezone", "Nowhere/Land")]
        {
            server.inputs.parameters.insert(name.into(), Some(value.into()));
            let outcome = install(&server, &server.files()).await;
            assert!(matches!(&outcome, Outcome::PutBack { why } if why.contains(name)), "{name}: {outcome:?}");
            assert!(matches!(install_stopped(&installation, &server.layout, &server.files()).await.unwrap(), Outcome::PutBack { .. }));
            server.inputs.parameters.remove(name);
            let there = std::fs::read_to_string(server.data_dir().join("postgresql.conf")).unwrap();
            assert_eq!(there, good.postgresql_conf);
        }
        assert_eq!(install(&server, &good).await, Outcome::Unchanged);
    }
}

#[tokio::test]
async fn a_line_of_pg_hba_that_cannot_be_read_is_put_back_and_none_can_shut_us_out() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        let good = server.files();
        let mut bad = good.clone();
        bad.pg_hba.push_str("host all all 10.0.0.0/99 trust\n");
        let outcome = install(&server, &bad).await;
        assert!(matches!(&outcome, Outcome::PutBack { why } if why.contains("pg_hba.conf")), "{outcome:?}");
        assert_eq!(std::fs::read_to_string(server.data_dir().join("pg_hba.conf")).unwrap(), good.pg_hba);

        let mut hostile = good.clone();
        hostile.pg_hba.push_str("local all all reject\nhost all all all reject\n");
        assert!(matches!(install(&server, &hostile).await, Outcome::Reloaded { .. }), "our own lines come first");

        // Not what pgherd writes, but what a lock-out looks like: the files that let us in come back by themselves.
        let mut shut = good.clone();
        shut.pg_hba = "local all all reject\n".into();
        let outcome = install(&server, &shut).await;
        assert!(matches!(&outcome, Outcome::PutBack { .. }), "{outcome:?}");
        assert_eq!(server.ask("select 1").await, "1");
    }
}

#[tokio::test]
async fn alter_system_is_undone_and_said() {
    for installation in installations().await {
        let root = place();
        let server = Server::primary(&installation, root.path(), "a").await;
        served(&server.layout).unwrap();
        let altered = server.sql.with(LIMIT, async |connection| connection.execute("alter system set work_mem = '9MB'").await).await;
        if installation.major >= 17 {
            assert!(altered.is_err(), "allow_alter_system is off");
            std::fs::write(server.data_dir().join("postgresql.auto.conf"), "work_mem = '9MB'\n").unwrap();
        } else {
            altered.unwrap();
        }
        server.sql.reload(LIMIT).await.unwrap();
        assert_eq!(server.ask("select current_setting('work_mem')").await, "9MB");
        let Outcome::Reloaded { undone, .. } = install(&server, &server.files()).await else { panic!("it was there to undo") };
        assert_eq!(undone, ["work_mem"]);
        assert_eq!(server.ask("select current_setting('work_mem')").await, "4MB");
        assert!(std::fs::read_to_string(server.layout.beside().join("undone.auto.conf")).unwrap().contains("9MB"));
    }
}

#[tokio::test]
async fn every_hostile_value_comes_out_of_the_server_as_it_went_in() {
    let hostile = ["a'b", "a''b", "\\", "a\\'b", "a\nb", "# no comment", "x = 'y'", "\t tab", "\u{e4}\u{1F418}", "\\n", "'", ""];
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        let wanted: BTreeMap<String, &str> =
            hostile.iter().enumerate().map(|(index, value)| (format!("pgherd.t{index}"), *value)).collect();
        server.inputs.parameters.extend(wanted.iter().map(|(name, value)| (name.clone(), Some((*value).to_owned()))));
        let outcome = install(&server, &server.files()).await;
        assert!(matches!(outcome, Outcome::Reloaded { .. }), "{outcome:?}");
        for (name, value) in &wanted {
            assert_eq!(server.ask(&format!("select setting from pg_file_settings where name = '{name}'")).await, *value, "{name}");
        }
        assert!(quote("\0").is_none());
    }
}

#[tokio::test]
async fn a_failed_start_falls_back_once_to_the_files_that_served() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        served(&server.layout).unwrap();
        server.stop();
        // Right by syntax and range, and yet no server starts with it.
        server.inputs.parameters.insert("shared_preload_libraries".into(), Some("no_such_library".into()));
        assert!(postgresql_conf(&server.inputs).is_ok());
        server.install().await;
        server.spawn();
        super::harness::eventually(|| server.has_ended()).await;
        // Another leads by now.
        server.inputs.primary_conninfo = Some("host=127.0.0.1 port=1".into());
        assert!(fall_back(&server.layout, &server.files()).unwrap());
        server.spawn();
        server.until("it starts with the old files", |_| true).await;
        assert_eq!(server.ask("select current_setting('primary_conninfo')").await, "host=127.0.0.1 port=1");
        assert!(!fall_back(&server.layout, &server.files()).unwrap(), "there is nothing older to fall back to");
    }
}

#[tokio::test]
async fn row_48_clients_that_were_kept_out_are_let_in_by_the_document_that_the_server_was_started_with() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        let former = server.files();
        served(&server.layout).unwrap();
        server.stop();
        // A document that no server has served yet, which takes something away.
        let present = ConfigFiles { pg_hba: former.pg_hba.replace("host all postgres", "host postgres postgres"), ..former.clone() };
        assert_ne!(former.pg_hba, present.pg_hba);
        let path = server.data_dir().join("pg_hba.conf");
        let lines = || std::fs::read_to_string(&path).unwrap();
        install_stopped(&installation, &server.layout, &present).await.unwrap();
        close(&server.layout, CLOSED).unwrap();
        assert_eq!(lines(), CLOSED);
        // Closed once more, as after another crash that came before clients were let in.
        close(&server.layout, CLOSED).unwrap();
        install_stopped(&installation, &server.layout, &present).await.unwrap();
        server.spawn();
        server.until("it takes connections of ours", |_| true).await;
        close(&server.layout, CLOSED).unwrap();
        open(&server.layout, &server.sql, "", LIMIT).await.unwrap();
        assert_eq!(lines(), present.pg_hba);
        open(&server.layout, &server.sql, "", LIMIT).await.unwrap();
        assert_eq!(lines(), present.pg_hba, "there was nothing to open");
    }
}

#[tokio::test]
async fn what_was_there_before_pgherd_is_kept_beside() {
    let installation = installations().await.remove(0);
    let root = place();
    let server = Server::primary(&installation, root.path(), "a").await;
    let before = server.layout.beside().join("before_pgherd/postgresql.conf");
    assert!(std::fs::read_to_string(before).unwrap().contains("PostgreSQL configuration file"), "initdb's own");
}
