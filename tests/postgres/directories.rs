//! initdb and the look at a data directory.

use pgherd::facts::postgres::{DataDirectory, DatabaseState};
use pgherd::postgres::initdb;
use pgherd::types::{Lsn, TimelineId};

use super::harness::{Server, eventually, initdb_job, installations, place, programs_with_the_lock};

#[tokio::test]
async fn initdb_makes_a_directory_that_starts_and_says_what_it_is() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::new(&installation, root.path(), "a");
        assert_eq!(server.look().await, DataDirectory::Empty);
        std::fs::create_dir(server.data_dir()).unwrap();
        assert_eq!(server.look().await, DataDirectory::Empty, "there, with nothing in it");
        server.make_primary().await;
        let facts = server.facts().await;
        assert!(!facts.in_recovery && facts.timeline == TimelineId(1) && facts.receive_lsn > Lsn(0));
        assert_eq!(facts.server_version_num, installation.version_num);
        server.stop();
        let control = server.control().await;
        assert_eq!((control.state, control.system_id), (DatabaseState::ShutDown, facts.system_id));
        assert!(control.data_checksums && control.wal_log_hints && !control.standby_signal && !control.backup_label);
        assert_eq!((control.floor.max_connections, control.floor.max_wal_senders), (100, 10));
    }
}

#[tokio::test]
async fn initdb_never_touches_a_directory_that_holds_something() {
    for installation in installations().await {
        let root = place();
        let server = Server::new(&installation, root.path(), "a");
        std::fs::create_dir(server.data_dir()).unwrap();
        std::fs::write(server.data_dir().join("mine"), "mine").unwrap();
        assert!(initdb(&installation, &server.layout, &initdb_job()).await.is_err());
        assert_eq!(std::fs::read_to_string(server.data_dir().join("mine")).unwrap(), "mine");
        assert!(matches!(server.look().await, DataDirectory::Unusable(why) if why.contains("mine")));
    }
}

#[tokio::test]
async fn row_34_a_control_file_that_is_overwritten_or_cut_short_is_told_from_one_that_could_not_be_read() {
    for installation in installations().await {
        let root = place();
        let server = Server::new(&installation, root.path(), "a");
        initdb(&installation, &server.layout, &initdb_job()).await.unwrap();
        let file = server.data_dir().join("global/pg_control");
        let whole = std::fs::read(&file).unwrap();
        let damages = [vec![0xA5; whole.len()], vec![0; whole.len()], whole[..100].to_vec(), Vec::new()];
        for damage in damages {
            std::fs::write(&file, &damage).unwrap();
            let seen = server.look().await;
            assert!(matches!(&seen, DataDirectory::Unusable(why) if why.contains("control file")), "{} bytes: {seen:?}", damage.len());
        }
        std::fs::write(&file, &whole).unwrap();
        assert!(matches!(server.look().await, DataDirectory::Full(_)));
    }
}

#[tokio::test]
async fn a_cancelled_initdb_leaves_the_place_empty_and_the_next_one_works() {
    for installation in installations().await {
        let root = place();
        let server = Server::new(&installation, root.path(), "a");
        let (layout, job, installed) = (server.layout.clone(), initdb_job(), installation.clone());
        let running = tokio::spawn(async move { initdb(&installed, &layout, &job).await });
        let work = server.layout.initdb_dir();
        eventually(|| work.join("base").exists()).await;
        let working = programs_with_the_lock(&server.layout);
        assert!(working.contains(&"initdb".to_owned()), "one that outlives its daemon is ended by the next: {working:?}");
        running.abort();
        let _ = running.await;
        assert_eq!(server.look().await, DataDirectory::Empty);
        assert!(!server.layout.beside().join("initdb-password").exists(), "the password is gone too");
        initdb(&installation, &server.layout, &initdb_job()).await.unwrap();
        assert!(matches!(server.look().await, DataDirectory::Full(_)));
        assert!(!server.layout.initdb_dir().exists());
    }
}

#[tokio::test]
async fn a_directory_of_another_major_version_or_with_a_damaged_control_file_is_unusable() {
    for installation in installations().await {
        let root = place();
        let server = Server::new(&installation, root.path(), "a");
        initdb(&installation, &server.layout, &initdb_job()).await.unwrap();
        let version = server.data_dir().join("PG_VERSION");
        std::fs::write(&version, "12\n").unwrap();
        assert!(matches!(server.look().await, DataDirectory::Unusable(why) if why.contains("12")));
        std::fs::write(&version, format!("{}\n", installation.major)).unwrap();

        let control = server.data_dir().join("global/pg_control");
        let mut bytes = std::fs::read(&control).unwrap();
        bytes[100] ^= 0xFF;
        std::fs::write(&control, bytes).unwrap();
        assert!(matches!(server.look().await, DataDirectory::Unusable(why) if why.contains("checksum")));
        std::fs::remove_file(&control).unwrap();
        assert!(matches!(server.look().await, DataDirectory::Unusable(_)));
        assert!(server.data_dir().join("base").is_dir(), "a look changes nothing");
    }
}

#[tokio::test]
async fn an_interrupted_swap_makes_the_directory_unusable_until_it_is_finished() {
    let installation = installations().await.remove(0);
    let root = place();
    let server = Server::new(&installation, root.path(), "a");
    initdb(&installation, &server.layout, &initdb_job()).await.unwrap();
    let journal = format!(r#"{{"from":"{}","aside":null,"stage":"in"}}"#, server.layout.clone_dir().display());
    std::fs::write(server.layout.swap_journal(), journal).unwrap();
    assert!(matches!(server.look().await, DataDirectory::Unusable(why) if why.contains("interrupted")));
    assert!(pgherd::postgres::recover_interrupted_swap(&server.layout).unwrap());
    assert!(matches!(server.look().await, DataDirectory::Full(_)));
}
