//! Copies of clusters with tablespaces: where they go, what stays of the old ones, what is refused, and where a copy may break off.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::Signal;
use pgherd::facts::postgres::DataDirectory;
use pgherd::postgres::tablespaces::{self, TablespaceMap};
use pgherd::postgres::{CloneJob, Installation, Keep, Watch, clone_from, swap};

use super::harness::{LIMIT, Server, eventually, installations, place};
use super::rewinding;

/// A primary `a` with a table in a tablespace, and a place for that tablespace on another host, with what a path may hold.
struct Cluster {
    root: PathBuf,
    leader: Server,
}

impl Cluster {
    async fn new(installation: &Installation, root: &Path) -> Cluster {
        let root = root.canonicalize().unwrap();
        for member in ["a", "b", "c"] {
            fs::create_dir(directory(&root, member)).unwrap();
        }
        let leader = Server::primary(installation, &root, "a").await;
        leader.run(&format!("create tablespace far location '{}'", directory(&root, "a").display())).await;
        leader.run("create table public.t tablespace far as select 1 as id").await;
        Cluster { root, leader }
    }

    fn member(&self, name: &str) -> Server {
        Server::new(&self.leader.installation, &self.root, name)
    }

    /// A copy of `source` for a member, whose tablespaces are elsewhere.
    async fn job(&self, member: &Server, source: &Server, keep: Keep) -> CloneJob {
        let to = directory(&self.root, &member.name);
        let from = ["a", "b", "c"].into_iter().filter(|name| *name != member.name);
        let tablespace_map: TablespaceMap = from.map(|name| (directory(&self.root, name), to.clone())).collect();
        CloneJob { tablespace_map, ..member.clone_job(source, keep).await }
    }

    async fn copy(&self, member: &Server, source: &Server, keep: Keep) {
        clone_from(&member.installation, &member.layout, &self.job(member, source, keep).await).await.unwrap();
        assert!(!member.layout.tablespaces_note().exists(), "nothing is under way");
    }

    fn copys(&self, member: &str, number: u32) -> PathBuf {
        directory(&self.root, member).join(format!("pgherd-{number}"))
    }
}

fn directory(root: &Path, member: &str) -> PathBuf {
    root.join(format!("ts = {member}"))
}

/// Where the one tablespace of a data directory is.
fn link(data_dir: &Path) -> PathBuf {
    tablespaces::links(data_dir).unwrap().into_values().next().expect("it has a tablespace")
}

/// It has the table, by what is in that tablespace.
async fn follows(member: &mut Server, leader: &Server, ids: &str) {
    member.follow(leader).await;
    member.catches_up_with(leader).await;
    assert_eq!(member.ask("select string_agg(id::text, ' ' order by id) from public.t").await, ids);
}

#[tokio::test]
async fn a_copy_has_a_directory_of_its_own_in_each_tablespaces_and_the_old_one_goes_with_its_data_directory() {
    for installation in installations().await {
        let root = place();
        let cluster = Cluster::new(&installation, root.path()).await;
        let mut standby = cluster.member("b");
        cluster.copy(&standby, &cluster.leader, Keep::Empty).await;
        assert_eq!(link(standby.data_dir()), cluster.copys("b", 1));
        follows(&mut standby, &cluster.leader, "1").await;
        standby.stop();
        cluster.copy(&standby, &cluster.leader, Keep::Nothing).await;
        assert_eq!(link(standby.data_dir()), cluster.copys("b", 2));
        assert!(!cluster.copys("b", 1).exists(), "what was given up takes no room");
        cluster.leader.run("insert into public.t values (2)").await;
        follows(&mut standby, &cluster.leader, "1 2").await;

        // Of a source that is a copy itself.
        standby.promote().await;
        let mut third = cluster.member("c");
        cluster.copy(&third, &standby, Keep::Empty).await;
        assert_eq!(link(third.data_dir()), cluster.copys("c", 1));
        follows(&mut third, &standby, "1 2").await;

        // Its room is free before the next copy is made.
        third.stop();
        swap::empty(&third.layout).await.unwrap();
        assert!(!cluster.copys("c", 1).exists() && directory(&cluster.root, "c").exists());
        cluster.copy(&third, &standby, Keep::Empty).await;
        follows(&mut third, &standby, "1 2").await;
    }
}

#[tokio::test]
async fn p5_the_tablespaces_of_a_diverged_directory_are_kept_with_it_and_it_says_where() {
    for installation in installations().await {
        let root = place();
        let cluster = Cluster::new(&installation, root.path()).await;
        let mut standby = cluster.member("b");
        cluster.copy(&standby, &cluster.leader, Keep::Empty).await;
        follows(&mut standby, &cluster.leader, "1").await;
        standby.promote().await;
        standby.run("insert into public.t values (7); checkpoint").await;
        standby.stop();
        cluster.copy(&standby, &cluster.leader, Keep::Whole { why: "a test".into() }).await;
        follows(&mut standby, &cluster.leader, "1").await;
        let kept = standby.layout.kept_dir();
        assert_eq!((link(standby.data_dir()), link(&kept.join("data"))), (cluster.copys("b", 2), cluster.copys("b", 1)));
        let why = fs::read_to_string(kept.join("why.json")).unwrap();
        assert!(why.contains(&cluster.copys("b", 1).display().to_string()), "{why}");
        standby.stop();
        // As whoever looks at it would.
        fs::rename(kept.join("data"), cluster.root.join("looked_at")).unwrap();
        let mut looked_at = cluster.member("looked_at");
        fs::remove_file(looked_at.data_dir().join("standby.signal")).ok();
        looked_at.start().await;
        assert_eq!(looked_at.ask("select string_agg(id::text, ' ' order by id) from public.t").await, "1 7");
    }
}

#[tokio::test]
async fn a_tablespace_without_a_directory_here_is_refused_by_its_name_before_anything_is_touched() {
    for installation in installations().await {
        let root = place();
        let cluster = Cluster::new(&installation, root.path()).await;
        let standby = cluster.member("b");
        fs::remove_dir(directory(&cluster.root, "b")).unwrap();
        let refused = clone_from(&installation, &standby.layout, &cluster.job(&standby, &cluster.leader, Keep::Empty).await).await;
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("`far`") && said.contains("tablespace_map"), "{said}");
        assert_eq!(standby.look().await, DataDirectory::Empty);
        assert!(!standby.layout.clone_dir().exists() && !directory(&cluster.root, "b").exists());
        assert_eq!(cluster.leader.as_leader().look(LIMIT).await.unwrap().tablespaces.len(), 1);
    }
}

#[tokio::test]
async fn a_copy_that_breaks_off_leaves_what_was_there_and_the_next_one_removes_what_it_had_made() {
    for installation in installations().await {
        let root = place();
        let cluster = Cluster::new(&installation, root.path()).await;
        cluster
            .leader
            .run("create table public.big tablespace far as select i, repeat('x', 500) as text from generate_series(1, 40000) i")
            .await;
        let mut standby = cluster.member("b");
        cluster.copy(&standby, &cluster.leader, Keep::Empty).await;
        follows(&mut standby, &cluster.leader, "1").await;
        standby.stop();
        let told = Arc::new(AtomicU64::new(0));
        let telling = Arc::clone(&told);
        let watch = Watch::new(move |bytes| telling.store(bytes.done, Ordering::SeqCst));
        let job = cluster.job(&standby, &cluster.leader, Keep::Nothing).await;
        let slow = CloneJob { max_rate_bytes: Some(1 << 20), watch, ..job };
        let made = cluster.copys("b", 2);
        tokio::select! {
            ended = clone_from(&standby.installation, &standby.layout, &slow) => panic!("{ended:?}"),
            () = eventually(|| made.exists() && told.load(Ordering::SeqCst) > 1 << 20) => {}
        }
        assert!(standby.layout.tablespaces_note().exists() && fs::read_dir(&made).unwrap().next().is_some(), "it was met in the middle");
        assert_eq!(link(standby.data_dir()), cluster.copys("b", 1));
        follows(&mut standby, &cluster.leader, "1").await;
        standby.stop();
        cluster.copy(&standby, &cluster.leader, Keep::Nothing).await;
        let left: Vec<_> = fs::read_dir(directory(&cluster.root, "b")).unwrap().flatten().map(|entry| entry.path()).collect();
        assert_eq!(left, [link(standby.data_dir())], "what it had made is gone, and so is the old one");
        follows(&mut standby, &cluster.leader, "1").await;
    }
}

#[tokio::test]
async fn a_member_whose_tablespaces_are_elsewhere_than_the_leaders_is_rewound_where_they_are() {
    for installation in installations().await {
        let root = place();
        let mut cluster = Cluster::new(&installation, root.path()).await;
        let mut standby = cluster.member("b");
        cluster.copy(&standby, &cluster.leader, Keep::Empty).await;
        follows(&mut standby, &cluster.leader, "1").await;
        standby.promote().await;
        standby.run("checkpoint; insert into public.t values (2)").await;
        cluster.leader.run("insert into public.t values (9)").await;
        cluster.leader.end(Signal::SIGINT);
        // pg_rewind would make a link to where the leader has it.
        let other = cluster.root.join("other");
        fs::create_dir(&other).unwrap();
        standby.run(&format!("create tablespace other location '{}'", other.display())).await;
        let former = &mut cluster.leader;
        let before = former.look().await;
        let lost = rewinding::what_is_lost(former, &standby).await;
        let (refused, kept) = rewinding::run(former, &rewinding::job(former, &standby, lost).await).await;
        assert!(refused.unwrap_err().to_string().contains("`other`") && kept.is_none());
        assert_eq!(former.look().await, before, "nothing was touched");
        standby.run("drop tablespace other").await;
        let lost = rewinding::what_is_lost(former, &standby).await;
        let (rewound, _) = rewinding::run(former, &rewinding::job(former, &standby, lost).await).await;
        rewound.unwrap();
        assert_eq!(link(former.data_dir()), directory(&cluster.root, "a"));
        follows(former, &standby, "1 2").await;
    }
}
