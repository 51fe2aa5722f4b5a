//! WAL that a primary's archiver did not get to: what is archived in its place, what is put beside, what never is (SAFETY row 54).

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use pgherd::facts::archiving::Archived;
use pgherd::policy::rejoin::LeaderLineage;
use pgherd::postgres::unarchived::{self, Archiver};
use pgherd::postgres::{Installation, rewind, wal};
use pgherd::types::{Lsn, TimelineId};

use super::harness::{LIMIT, Server, eventually, installations, left_with_the_lock, place};

const SEGMENT_BYTES: u64 = 16 << 20;

/// A former primary and the one that was promoted in its place. The archiver of the first got nowhere.
struct Pair {
    old: Server,
    new: Server,
    archive: PathBuf,
    command: String,
}

impl Pair {
    /// `diverged`: it writes on for a segment after the other was promoted.
    async fn new(installation: &Installation, root: &Path, diverged: bool, ended: Signal) -> Pair {
        let archive = root.join("archive");
        fs::create_dir(&archive).unwrap();
        fs::write(archive.join("stop"), "").unwrap();
        // Commands that archive ahead look for the mark beside the file.
        let command = format!(
            "if test -e {0}/stop; then echo 'it is full' >&2; exit 3; fi; test -e $(dirname %p)/archive_status/%f.ready && cp %p {0}/%f",
            archive.display()
        );
        let mut old = Server::new(installation, root, "a");
        old.inputs.archive_command = Some(command.clone());
        old.make_primary().await;
        let new = Server::standby_of(&old, "b").await;
        old.run("create table public.t as select 1 as id").await;
        for _ in 0..3 {
            old.run("select pg_switch_wal()").await;
            old.run("insert into public.t values (2)").await;
        }
        if !diverged {
            old.end(ended);
        }
        let written = if diverged { old.write_position().await } else { old.control().await.checkpoint };
        new.until("it has all", |facts| facts.replay_lsn >= written).await;
        new.promote().await;
        new.run("checkpoint").await;
        if diverged {
            old.run("insert into public.t values (3)").await;
            old.run("select pg_switch_wal()").await;
            old.run("insert into public.t values (4)").await;
            old.end(ended);
        }
        Pair { old, new, archive, command }
    }

    fn archive_works(&self) {
        fs::remove_file(self.archive.join("stop")).unwrap();
    }

    fn archiver(&self) -> Archiver {
        Archiver::Command(self.command.clone(), self.old.installation.major)
    }

    async fn leader(&self) -> LeaderLineage {
        self.new.as_leader().look(LIMIT).await.unwrap().lineage
    }

    async fn archive_left(&self, shared: Option<Lsn>) -> anyhow::Result<Archived> {
        let control = self.old.control().await;
        unarchived::archive_left(&self.old.layout, &control, &self.archiver(), &self.leader().await, shared).await
    }

    fn pg_wal(&self) -> PathBuf {
        self.old.data_dir().join("pg_wal")
    }

    fn marked(&self, mark: &str) -> Vec<String> {
        let status = fs::read_dir(self.pg_wal().join("archive_status")).unwrap().flatten();
        let mut names: Vec<String> =
            status.filter_map(|entry| entry.file_name().to_str().unwrap().strip_suffix(&format!(".{mark}")).map(str::to_owned)).collect();
        names.sort();
        names
    }

    /// Segments of pg_wal that lie whole before a position, and the note of the base backup that the other was made of.
    fn whole_before(&self, end: Lsn) -> BTreeMap<String, u64> {
        let before = |name: &str| {
            let segment = wal::segment_of(name.split_once(".0").map_or(name, |(segment, _)| segment));
            segment.is_some_and(|segment| segment.timeline == TimelineId(1) && segment.range(SEGMENT_BYTES).1 <= end)
        };
        content(&self.pg_wal()).into_iter().filter(|(name, _)| before(name) && !name.ends_with(".partial")).collect()
    }
}

/// What is in each file, as a number.
fn content(place: &Path) -> BTreeMap<String, u64> {
    let files = fs::read_dir(place).unwrap().flatten().filter(|entry| entry.path().is_file());
    let of = |path: PathBuf| {
        let mut hasher = DefaultHasher::new();
        fs::read(path).unwrap().hash(&mut hasher);
        hasher.finish()
    };
    files.map(|entry| (entry.file_name().into_string().unwrap(), of(entry.path()))).collect()
}

#[tokio::test]
async fn what_the_archiver_of_a_former_primary_did_not_get_to_is_in_the_archive_up_to_the_switch_point() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), false, Signal::SIGINT).await;
        pair.archive_works();
        let switch = pair.leader().await.history.left_at(TimelineId(1)).unwrap();
        let whole = pair.whole_before(switch);
        assert!(whole.len() >= 3 && pair.old.control().await.unarchived >= 3, "{:?}", pair.marked("ready"));
        let archived = pair.archive_left(None).await.unwrap();
        assert_eq!(archived, Archived { files: whole.len(), beside: None, why: None });
        assert_eq!(content(&pair.archive), whole, "all of them, and no other");
        assert_eq!((pair.marked("ready"), pair.old.control().await.unarchived), (Vec::new(), 0));
        assert!(whole.keys().all(|name| pair.marked("done").contains(name)));
        assert_eq!(pair.archive_left(None).await.unwrap(), Archived::default(), "once");
        pair.old.follow(&pair.new).await;
    }
}

#[tokio::test]
async fn row_54_no_segment_past_the_point_where_the_two_part_is_archived_and_none_is_marked_any_more() {
    for installation in installations().await {
        let root = place();
        let pair = Pair::new(&installation, root.path(), true, Signal::SIGQUIT).await;
        pair.archive_works();
        let switch = pair.leader().await.history.left_at(TimelineId(1)).unwrap();
        let status = pair.pg_wal().join("archive_status");
        // As an earlier promotion, and a file that is gone, leave them.
        let ended = "000000010000000000000001.partial";
        fs::write(pair.pg_wal().join(ended), "x").unwrap();
        fs::write(status.join(format!("{ended}.ready")), "").unwrap();
        fs::write(status.join("0000000100000000000000AA.ready"), "").unwrap();
        let part_in = pair.marked("ready").into_iter().find(|name| {
            wal::segment_of(name).is_some_and(|segment| {
                let (begins, ends) = segment.range(SEGMENT_BYTES);
                begins <= switch && switch < ends
            })
        });
        let part_in = part_in.expect("the segment in which they part is complete here");
        let whole = pair.whole_before(switch);
        pair.archive_left(Some(switch)).await.unwrap();
        assert_eq!(content(&pair.archive), whole);
        assert_eq!(pair.marked("ready"), Vec::<String>::new());
        let done = pair.marked("done");
        assert!(done.contains(&part_in) && done.contains(&ended.to_owned()), "no later primary archives them: {done:?}");
        assert!(!done.contains(&"0000000100000000000000AA".to_owned()));
    }
}

#[tokio::test]
async fn what_cannot_be_archived_is_put_beside_whole_and_archived_from_there_while_postgresql_writes_over_it() {
    for installation in installations().await {
        let root = place();
        let pair = Pair::new(&installation, root.path(), false, Signal::SIGINT).await;
        let whole = pair.whole_before(pair.leader().await.history.left_at(TimelineId(1)).unwrap());
        let left = pair.archive_left(None).await.unwrap();
        let beside = left.beside.clone().unwrap();
        let why = left.why.unwrap();
        assert!(why.contains("exit status: 3: it is full") && why.contains(whole.keys().next().unwrap()), "{why}");
        assert_eq!((left.files, beside.files), (0, whole.len()));
        assert_eq!((Some(&beside.first), Some(&beside.last)), (whole.keys().next(), whole.keys().last()));
        assert_eq!(content(&pair.old.layout.unarchived_dir()), whole);
        assert_eq!(pair.marked("ready"), Vec::<String>::new(), "one alone archives them");

        // As restartpoints do.
        for name in whole.keys() {
            fs::write(pair.pg_wal().join(name), "another segment").unwrap();
        }
        let again = unarchived::archive_beside(&pair.old.layout, &pair.archiver()).await.unwrap();
        assert_eq!((again.files, again.beside), (0, Some(beside)));
        assert!(again.why.is_some());
        pair.archive_works();
        let archived = unarchived::archive_beside(&pair.old.layout, &pair.archiver()).await.unwrap();
        assert_eq!(archived, Archived { files: whole.len(), beside: None, why: None });
        assert_eq!(content(&pair.archive), whole);
        assert_eq!(unarchived::beside(&pair.old.layout).unwrap(), None);
        assert_eq!(fs::read_dir(pair.old.layout.unarchived_dir()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn a_complete_segment_whose_mark_went_with_the_power_is_archived_like_the_others() {
    for installation in installations().await {
        let root = place();
        let pair = Pair::new(&installation, root.path(), false, Signal::SIGQUIT).await;
        pair.archive_works();
        // PostgreSQL makes a mark without syncing it.
        for name in pair.marked("ready").iter().filter(|name| wal::segment_of(name).is_some()) {
            fs::remove_file(pair.pg_wal().join("archive_status").join(format!("{name}.ready"))).unwrap();
        }
        let whole = pair.whole_before(pair.leader().await.history.left_at(TimelineId(1)).unwrap());
        assert!(whole.len() >= 3 && pair.old.control().await.unarchived >= 3);
        pair.archive_left(None).await.unwrap();
        assert_eq!(content(&pair.archive), whole);
        assert_eq!(pair.old.control().await.unarchived, 0);
    }
}

#[tokio::test]
async fn row_54_a_command_that_archives_ahead_what_is_marked_meets_nothing_that_diverged() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), true, Signal::SIGQUIT).await;
        pair.command = format!(
            "cd pg_wal; for mark in archive_status/*.ready; do test -e $mark || continue; name=$(basename $mark .ready); cp $name {}/$name; \
             mv $mark archive_status/$name.done; done",
            pair.archive.display()
        );
        pair.archive_works();
        let switch = pair.leader().await.history.left_at(TimelineId(1)).unwrap();
        let whole = pair.whole_before(switch);
        // Some set the marks, too.
        let archived = pair.archive_left(Some(switch)).await.unwrap();
        assert_eq!(archived, Archived { files: whole.len(), beside: None, why: None });
        assert_eq!(content(&pair.archive), whole);
    }
}

#[tokio::test]
async fn what_a_command_makes_is_as_private_as_what_postgresqls_own_archiver_makes() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), false, Signal::SIGINT).await;
        pair.command = format!("cat < %p > {}/%f", pair.archive.display());
        for (of_the_data_directory, of_a_file) in [(0o750, 0o640), (0o700, 0o600)] {
            fs::set_permissions(pair.old.data_dir(), Permissions::from_mode(of_the_data_directory)).unwrap();
            pair.archive_left(None).await.unwrap();
            let archived = pair.archive.join(first(&pair));
            assert_eq!(fs::metadata(&archived).unwrap().permissions().mode() & 0o777, of_a_file);
            fs::remove_file(&archived).unwrap();
            let status = pair.pg_wal().join("archive_status");
            fs::rename(status.join(format!("{}.done", first(&pair))), status.join(format!("{}.ready", first(&pair)))).unwrap();
        }
    }
}

#[tokio::test]
async fn one_that_was_put_beside_and_not_marked_before_the_power_went_is_archived_once() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), false, Signal::SIGINT).await;
        pair.archive_left(None).await.unwrap();
        let status = pair.pg_wal().join("archive_status");
        fs::rename(status.join(format!("{}.done", first(&pair))), status.join(format!("{}.ready", first(&pair)))).unwrap();
        pair.archive_works();
        pair.command = format!("test ! -e {0}/%f && cp %p {0}/%f", pair.archive.display());
        let whole = pair.whole_before(pair.leader().await.history.left_at(TimelineId(1)).unwrap());
        pair.archive_left(None).await.unwrap();
        let archived = unarchived::archive_beside(&pair.old.layout, &pair.archiver()).await.unwrap();
        assert_eq!((archived.beside, archived.why), (None, None));
        assert_eq!((content(&pair.archive), pair.marked("ready")), (whole, Vec::new()));
    }
}

#[tokio::test]
async fn a_command_leaves_nobody_that_reads_segments_once_a_standby_may_write_over_them() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), false, Signal::SIGINT).await;
        pair.archive_works();
        // As one that pushes in the background: a session of its own, and nothing of ours open.
        let pid = root.path().join("pid");
        pair.command = format!(
            "setsid sh -c 'echo $$ > {0}; exec sleep 600' </dev/null >/dev/null 2>&1 & until test -s {0}; do :; done",
            pid.display()
        );
        pair.archive_left(None).await.unwrap();
        let stat = PathBuf::from(format!("/proc/{}/stat", fs::read_to_string(&pid).unwrap().trim()));
        let lives = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
        assert!(lives(), "it outlives the command");
        // As before each start of a standby.
        rewind::end_orphans(&pair.old.layout).await.unwrap();
        assert!(!lives());
    }
}

#[tokio::test]
async fn one_that_is_broken_off_begins_again_and_a_command_that_outlived_its_daemon_is_ended_first() {
    for installation in installations().await {
        let root = place();
        let mut pair = Pair::new(&installation, root.path(), false, Signal::SIGQUIT).await;
        pair.archive_works();
        let works = pair.command.clone();
        let begun = pair.archive.join("begun");
        pair.command =
            format!("cp %p {0}/%f && test %f = {1} || {{ touch {2}; sleep 600; }}", pair.archive.display(), first(&pair), begun.display());
        tokio::select! {
            ended = pair.archive_left(None) => panic!("{ended:?}"),
            () = eventually(|| begun.exists()) => {}
        }
        fs::remove_file(&begun).unwrap();
        assert!(!pair.marked("ready").contains(&first(&pair)), "what was through is through");

        let mut outlived = left_with_the_lock(&pair.old.layout);
        pair.command = works;
        let whole = pair.whole_before(pair.leader().await.history.left_at(TimelineId(1)).unwrap());
        let archived = pair.archive_left(None).await.unwrap();
        assert_eq!((archived.beside, archived.why), (None, None));
        // Ended, or not at all.
        eventually(|| outlived.try_wait().unwrap().is_some()).await;
        assert_eq!(content(&pair.archive), whole);
    }
}

/// The first in the order in which they are archived.
fn first(pair: &Pair) -> String {
    let mut names: Vec<String> = wal::segments_in(&pair.pg_wal()).unwrap().into_iter().map(|file| file.name).collect();
    names.sort();
    names.remove(0)
}
