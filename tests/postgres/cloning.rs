//! Clones: what they make, what they refuse, and what a cancelled one leaves.

use std::sync::{Arc, Mutex};

use pgherd::facts::copying::Bytes;
use pgherd::facts::postgres::{DataDirectory, DatabaseState};
use pgherd::postgres::{CloneJob, Keep, SwapError, Watch, clone_from, initdb, swap};

use super::harness::{LIMIT, Server, eventually, initdb_job, installations, left_with_the_lock, place, programs_with_the_lock};

#[tokio::test]
async fn a_clone_streams_from_its_leader_and_both_see_it() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        leader.run("create table public.t as select 1 as id").await;
        let standby = Server::standby_of(&leader, "b").await;
        let position = leader.write_position().await;
        let facts = standby.until("it has all", |facts| facts.receive_lsn >= position && facts.replay_lsn >= position).await;
        let leader_facts = leader.facts().await;
        assert!(facts.in_recovery && !facts.replay_paused);
        assert_eq!((facts.timeline, facts.system_id), (leader_facts.timeline, leader_facts.system_id));
        let receiver = facts.walreceiver.unwrap();
        assert_eq!((receiver.sender_host.as_deref(), receiver.sender_port), (Some("127.0.0.1"), Some(leader.port)));
        let seen = leader
            .until("the standby streams", |facts| facts.replicas.iter().any(|one| one.application_name == "b" && one.flush_lsn.is_some()))
            .await;
        assert_eq!(seen.replicas.len(), 1);
        assert!(seen.replicas[0].client_addr.as_deref() == Some("127.0.0.1") && seen.replicas[0].flush_lsn.is_some());
    }
}

#[tokio::test]
async fn a_cancelled_clone_leaves_the_old_directory_and_no_process() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let standby = Server::new(&installation, root.path(), "b");
        initdb(&installation, &standby.layout, &initdb_job()).await.unwrap();
        let before = standby.look().await;
        let mut job = standby.clone_job(&leader, Keep::Nothing).await;
        // Slow enough to be caught in the middle.
        job.max_rate_bytes = Some(64 * 1024);
        let (layout, installed) = (standby.layout.clone(), installation.clone());
        let running = tokio::spawn(async move { clone_from(&installed, &layout, &job).await });
        let work = standby.layout.clone_dir();
        eventually(|| work.join("base").exists()).await;
        running.abort();
        let _ = running.await;
        assert_eq!(standby.look().await, before);
        leader.until("no backup is under way", |facts| facts.replicas.is_empty()).await;

        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        let watch = Watch::new(move |bytes| telling.lock().unwrap().push(bytes));
        let job = CloneJob { watch, ..standby.clone_job(&leader, Keep::Nothing).await };
        clone_from(&installation, &standby.layout, &job).await.unwrap();
        let last: Bytes = *told.lock().unwrap().last().expect("pg_basebackup says how far it is");
        assert!(last.done >= last.total && last.total > 10 << 20, "{last:?}");
        assert!(!standby.layout.clone_dir().exists() && !standby.layout.discard_dir().exists());
        assert_eq!(standby.control().await.system_id, leader.facts().await.system_id);
    }
}

#[tokio::test]
async fn a_copy_whose_daemon_was_killed_is_ended_before_another_writes_under_the_same_names() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let standby = Server::new(&installation, root.path(), "b");
        let job = CloneJob { max_rate_bytes: Some(64 * 1024), ..standby.clone_job(&leader, Keep::Empty).await };
        let mut left = left_with_the_lock(&standby.layout);
        let work = standby.layout.clone_dir();
        // Within the branch: before another is gone on with, the copy is given up, and with it the program.
        let works = async {
            eventually(|| work.join("base").exists()).await;
            programs_with_the_lock(&standby.layout)
        };
        let working = tokio::select! {
            ended = clone_from(&installation, &standby.layout, &job) => panic!("{ended:?}"),
            working = works => working,
        };
        assert!(!working.is_empty() && working.iter().all(|program| program == "pg_basebackup"), "the next one ends them: {working:?}");
        eventually(|| left.try_wait().unwrap().is_some()).await;
        swap::empty(&standby.layout).await.unwrap();
    }
}

#[tokio::test]
async fn a_diverged_directory_is_kept_and_a_second_one_is_refused_before_the_copy() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let standby = Server::new(&installation, root.path(), "b");
        initdb(&installation, &standby.layout, &initdb_job()).await.unwrap();
        let DataDirectory::Full(old) = standby.look().await else { panic!("it is full") };
        let keep = Keep::Whole { why: "timeline 1 from 0/1 is nowhere else".into() };
        clone_from(&installation, &standby.layout, &standby.clone_job(&leader, keep.clone()).await).await.unwrap();
        let kept = standby.layout.kept_dir();
        assert!(std::fs::read_to_string(kept.join("why.json")).unwrap().contains("nowhere else"));
        let kept_server = pgherd::postgres::Layout::new(&kept.join("data"), None).unwrap();
        let DataDirectory::Full(found) = pgherd::postgres::data_directory::look(&installation, &kept_server).await else {
            panic!("kept whole")
        };
        assert_eq!(found.system_id, old.system_id);

        let refused = clone_from(&installation, &standby.layout, &standby.clone_job(&leader, keep).await).await;
        assert!(matches!(refused, Err(SwapError::KeptOccupied(place)) if place == kept));
        assert!(!standby.layout.clone_dir().exists(), "not a byte was copied");
    }
}

#[tokio::test]
async fn wal_in_a_directory_of_its_own_goes_with_its_data_directory() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let wal_dir = root.path().canonicalize().unwrap().join("wal");
        std::fs::create_dir(&wal_dir).unwrap();
        let mut standby = Server::with_wal_dir(&installation, root.path(), "b", Some(&wal_dir));
        initdb(&installation, &standby.layout, &initdb_job()).await.unwrap();
        assert_eq!(std::fs::read_link(standby.data_dir().join("pg_wal")).unwrap(), wal_dir.join("pgherd-1"));
        clone_from(&installation, &standby.layout, &standby.clone_job(&leader, Keep::Nothing).await).await.unwrap();
        assert_eq!(std::fs::read_link(standby.data_dir().join("pg_wal")).unwrap(), wal_dir.join("pgherd-2"));
        assert!(!wal_dir.join("pgherd-1").exists(), "the old directory's WAL is gone with it");
        standby.follow(&leader).await;
    }
}

#[tokio::test]
async fn a_clone_that_was_never_started_is_not_taken_for_a_primary() {
    let installation = installations().await.remove(0);
    let root = place();
    let leader = Server::primary(&installation, root.path(), "a").await;
    let standby = Server::new(&installation, root.path(), "b");
    clone_from(&installation, &standby.layout, &standby.clone_job(&leader, Keep::Empty).await).await.unwrap();
    let control = standby.control().await;
    assert!(control.backup_label && control.standby_signal, "{control:?}");
    assert_eq!(control.state, DatabaseState::InProduction, "the control file is the primary's");
    assert!(leader.as_leader().look(LIMIT).await.unwrap().database_bytes.is_some(), "the room can be asked for");
}

#[tokio::test]
async fn a_directory_that_is_given_up_is_emptied_and_takes_a_copy_like_any_empty_one() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let standby = Server::new(&installation, root.path(), "b");
        initdb(&installation, &standby.layout, &initdb_job()).await.unwrap();
        swap::empty(&standby.layout).await.unwrap();
        assert_eq!(standby.look().await, DataDirectory::Empty);
        assert!(!standby.layout.discard_dir().exists(), "its room is free");
        swap::empty(&standby.layout).await.unwrap();
        clone_from(&installation, &standby.layout, &standby.clone_job(&leader, Keep::Empty).await).await.unwrap();
        assert_eq!(standby.control().await.system_id, leader.facts().await.system_id);
    }
}
