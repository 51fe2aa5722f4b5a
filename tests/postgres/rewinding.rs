//! Rewinds of stopped members that have diverged: what they keep, what they leave, and where they may break off (SAFETY rows 49, 54, 55).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::facts::lost::LostWrites;
use pgherd::facts::postgres::{DataDirectory, DatabaseState, LostRange, RewindAttempt};
use pgherd::policy::rejoin::rewind::Rewinding;
use pgherd::policy::rejoin::{Inputs, OwnPromotion, Rejoin, decide};
use pgherd::postgres::conninfo::{PassfileEntry, Target, build, write_passfile};
use pgherd::postgres::{Installation, Keep, RewindJob, Secret, Watch, clone_from, data_directory, history_files, lost, rewind, wal};
use pgherd::spec::cluster::OnRewindFailure;
use pgherd::types::{Epoch, TimelineId};

use super::harness::{LIMIT, PATIENCE, REWIND_PASSWORD, Server, eventually, installations, left_with_the_lock, parameters, place};

/// The way back of a stopped member, as the daemon judges it.
async fn judge(member: &Server, leader: &Server) -> Rejoin {
    let local = member.control().await;
    let wal = wal::end_of_wal(&member.installation, member.data_dir(), &local, LIMIT).await;
    let asked = leader.as_leader().look(LIMIT).await.unwrap();
    let rewinding = Rewinding {
        wanted: true,
        on_failure: OnRewindFailure::Reclone,
        obstacle: rewind::obstacle(&member.installation, &member.layout),
        failures: 0,
    };
    let promoted_under = Some(Epoch(5));
    decide(Inputs {
        local: &local,
        wal: &wal,
        own_promotion: None,
        promoted_under,
        led_before: true,
        leader: &asked.lineage,
        rewinding: &rewinding,
    })
}

pub async fn what_is_lost(member: &Server, leader: &Server) -> (String, LostRange) {
    match judge(member, leader).await {
        Rejoin::Rewind { why, lost } => (why, lost),
        other => panic!("expected a rewind: {other:?}"),
    }
}

pub async fn job(member: &Server, leader: &Server, (why, lost): (String, LostRange)) -> RewindJob {
    let passfile = member.layout.beside().with_extension("rewind.pgpass");
    write_passfile(&passfile, &[PassfileEntry { user: "rewinder", password: &Secret::new(REWIND_PASSWORD) }]).unwrap();
    let target = Target {
        host: "127.0.0.1",
        port: leader.port,
        user: "rewinder",
        passfile: &passfile,
        application_name: &member.name,
        dbname: Some("postgres"),
    };
    RewindJob {
        conninfo: build(target),
        leader: leader.as_leader().look(LIMIT).await.unwrap(),
        promoted_under: Some(Epoch(6)),
        why,
        lost,
        boot_id: "this boot".to_owned(),
        restore_wal: false,
        watch: Default::default(),
        limit: PATIENCE,
    }
}

/// Runs it. Gives what it told to be kept.
pub async fn run(member: &Server, job: &RewindJob) -> (anyhow::Result<()>, Option<LostWrites>) {
    let mut kept = None;
    let told = Arc::new(AtomicBool::new(false));
    let telling = Arc::clone(&told);
    let watched = RewindJob { watch: Watch::new(move |bytes| telling.store(bytes.total > 0, Ordering::SeqCst)), ..job.clone() };
    let result = rewind::rewind(&member.installation, &member.layout, &watched, |writes| kept = Some(writes)).await;
    assert!(told.load(Ordering::SeqCst) || result.is_err() || kept.is_none(), "pg_rewind says how far it is");
    (result, kept)
}

/// A primary that wrote on after a standby of it was promoted, and then ended; and the other.
async fn diverged(installation: &Installation, root: &Path, changed: &[(&str, &str)], ended: Signal) -> (Server, Server) {
    diverged_with(installation, root, changed, None, ended).await
}

async fn diverged_with(
    installation: &Installation,
    root: &Path,
    changed: &[(&str, &str)],
    archive_command: Option<String>,
    ended: Signal,
) -> (Server, Server) {
    let mut old = Server::new(installation, root, "a");
    old.inputs.archive_command = archive_command;
    let fixed = old.inputs.parameters.clone();
    old.inputs.parameters = fixed.into_iter().chain(parameters(changed)).collect();
    old.make_primary().await;
    old.run("create table public.t as select 1 as id").await;
    let new = Server::standby_of(&old, "b").await;
    new.catches_up_with(&old).await;
    new.promote().await;
    // Its first checkpoint on its timeline.
    new.run("checkpoint; insert into public.t values (2)").await;
    for id in 10..13 {
        old.run(&format!("insert into public.t values ({id})")).await;
    }
    old.end(ended);
    (old, new)
}

async fn has_the_leaders_rows(member: &Server, leader: &Server) {
    member.catches_up_with(leader).await;
    assert_eq!(member.ask("select string_agg(id::text, ' ' order by id) from public.t").await, "1 2");
}

#[tokio::test]
async fn row_49_a_former_primary_that_wrote_on_is_rewound_and_its_wal_is_kept_and_counted() {
    for installation in installations().await {
        let root = place();
        let (mut old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
        old.layout
            .promotion_file()
            .write(&OwnPromotion { timeline: TimelineId(1), epoch: Epoch(5), parent: TimelineId(0), switch_lsn: None })
            .unwrap();
        let own_conf = std::fs::read_to_string(old.data_dir().join("postgresql.conf")).unwrap();
        let (why, lost) = what_is_lost(&old, &new).await;
        let switch = history_files::read(new.data_dir(), TimelineId(2)).unwrap().unwrap().0[0].at;
        assert_eq!((lost.timeline, lost.from), (TimelineId(1), switch));
        let (result, kept) = run(&old, &job(&old, &new, (why, lost)).await).await;
        result.unwrap();

        let kept = kept.unwrap();
        assert_eq!((kept.timeline, kept.from, kept.transactions), (TimelineId(1), switch, Some(3)), "{kept:?}");
        assert!(kept.first_commit <= kept.last_commit && kept.first_commit.as_ref().is_some_and(|at| at.ends_with('Z')), "{kept:?}");
        assert_eq!(lost::list(&old.layout), std::slice::from_ref(&kept));
        let place = PathBuf::from(&kept.kept).join("pg_wal");
        let pieces = [lost::Piece { timeline: kept.timeline, from: kept.from, to: None }];
        assert_eq!(wal::commits(&installation, &place, &pieces, kept.to).await.unwrap().count, 3, "the copy is whole");

        let control = old.control().await;
        assert!(control.standby_signal && control.backup_label && control.promoted.is_none(), "{control:?}");
        assert_eq!(std::fs::read_to_string(old.data_dir().join("postgresql.conf")).unwrap(), own_conf, "not the leader's");
        old.follow(&new).await;
        has_the_leaders_rows(&old, &new).await;
    }
}

#[tokio::test]
async fn row_55_a_primary_that_crashed_is_recovered_without_a_client_and_without_archiving_before_it_is_rewound() {
    for installation in installations().await {
        let root = place();
        let archived = root.path().join("archived");
        std::fs::create_dir(&archived).unwrap();
        let archive = format!("test ! -e {0}/stop && cp %p {0}/%f", archived.display());
        let (mut old, new) = diverged_with(&installation, root.path(), &[], Some(archive), Signal::SIGQUIT).await;
        std::fs::write(archived.join("stop"), "").unwrap();
        let before = std::fs::read_dir(&archived).unwrap().count();
        assert_eq!(old.control().await.state, DatabaseState::InProduction);
        let lost = what_is_lost(&old, &new).await;
        std::fs::remove_file(archived.join("stop")).unwrap();
        let (result, kept) = run(&old, &job(&old, &new, lost).await).await;
        result.unwrap();
        assert_eq!(kept.unwrap().transactions, Some(3), "what had not been checkpointed is kept too");
        assert_eq!(std::fs::read_dir(&archived).unwrap().count(), before - 1, "nothing was archived on the way");
        old.follow(&new).await;
        has_the_leaders_rows(&old, &new).await;
    }
}

#[tokio::test]
async fn row_55_a_primary_that_crashed_with_a_backup_label_is_not_recovered_alone() {
    for installation in installations().await {
        let root = place();
        let (old, new) = diverged(&installation, root.path(), &[], Signal::SIGQUIT).await;
        let lost = what_is_lost(&old, &new).await;
        let job = job(&old, &new, lost).await;
        std::fs::write(old.data_dir().join("backup_label"), "").unwrap();
        let before = old.look().await;
        let (result, kept) = run(&old, &job).await;
        assert!(format!("{:#}", result.unwrap_err()).contains("backup_label") && kept.is_none());
        assert_eq!(old.look().await, before, "nothing was touched");
        assert!(matches!(judge(&old, &new).await, Rejoin::Clone { why, .. } if why.contains("backup_label")));
    }
}

#[tokio::test]
async fn row_54_a_rewound_member_archives_no_segment_of_what_it_had_written() {
    for installation in installations().await {
        let root = place();
        let (mut old, new) = diverged_with(&installation, root.path(), &[], Some("false".to_owned()), Signal::SIGINT).await;
        let ready = |server: &Server| -> Vec<String> {
            let entries = std::fs::read_dir(server.data_dir().join("pg_wal/archive_status")).unwrap().flatten();
            let names = entries.map(|entry| entry.file_name().into_string().unwrap());
            names.filter(|name| name.ends_with(".ready") && name.starts_with("00000001")).collect()
        };
        // As a shutdown that waited for the archiver in vain leaves it.
        let lost = what_is_lost(&old, &new).await;
        let segment =
            std::fs::read_dir(old.data_dir().join("pg_wal")).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        let last = segment.filter(|name| wal::segment_of(name).is_some()).max().unwrap();
        for server in [&old, &new] {
            std::fs::write(server.data_dir().join(format!("pg_wal/archive_status/{last}.ready")), "").unwrap();
        }
        assert!(!ready(&old).is_empty());
        let (result, kept) = run(&old, &job(&old, &new, lost).await).await;
        result.unwrap();
        let kept = PathBuf::from(kept.unwrap().kept).join("pg_wal");
        let kept: Vec<String> = std::fs::read_dir(kept).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
        let left: Vec<String> = ready(&old).into_iter().filter(|name| kept.contains(&name.trim_end_matches(".ready").to_owned())).collect();
        assert!(left.is_empty(), "{left:?} would be archived at a promotion; kept {kept:?}");
        old.follow(&new).await;
        has_the_leaders_rows(&old, &new).await;
    }
}

/// Everything that is copied goes through a relation of some size: pg_rewind can be met in the middle of it.
async fn make_work(server: &Server) {
    server.run("create table public.big as select i, repeat('x', 500) as text from generate_series(1, 100000) i").await;
}

fn rewinds_under_way() -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "pg_rewind")).collect()
}

fn is_of(pid: i32, data_dir: &Path) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&data_dir.display().to_string()))
}

#[tokio::test]
async fn a_rewind_that_is_killed_leaves_a_directory_that_nobody_takes_for_whole_and_goes_on() {
    for installation in installations().await {
        let root = place();
        let (mut old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
        make_work(&new).await;
        let lost = what_is_lost(&old, &new).await;
        let work = job(&old, &new, lost.clone()).await;
        let data_dir = old.data_dir().to_owned();
        let (running, killer) = (run(&old, &work), async {
            let mut met = None;
            eventually(|| {
                // In the middle: it has begun to write.
                met = rewinds_under_way().into_iter().find(|pid| is_of(*pid, &data_dir));
                met.is_some() && rewind::marker(&old.layout).unwrap().is_some()
            })
            .await;
            kill(Pid::from_raw(met.unwrap()), Signal::SIGKILL).unwrap();
        });
        let ((result, kept), ()) = tokio::join!(running, killer);
        assert!(result.is_err() && kept.is_some());
        let DataDirectory::HalfRewound(attempt) = old.look().await else { panic!("{:?}", old.look().await) };
        assert_eq!((attempt.attempts, attempt.lost, attempt.finished), (1, lost.1, false));

        // A tablespace that the leader has made since would be linked to where the leader has it.
        let other = root.path().join("other");
        std::fs::create_dir(&other).unwrap();
        new.run(&format!("create tablespace other location '{}'", other.display())).await;
        let (refused, _) = run(&old, &job(&old, &new, lost.clone()).await).await;
        assert!(refused.unwrap_err().to_string().contains("`other`"));
        new.run("drop tablespace other").await;

        let (result, kept) = run(&old, &work).await;
        result.unwrap();
        assert!(kept.is_none(), "it is kept once");
        assert_eq!(lost::list(&old.layout).len(), 1);
        old.follow(&new).await;
        has_the_leaders_rows(&old, &new).await;
        assert_eq!(old.ask("select count(*) from public.big").await, "100000");
    }
}

#[tokio::test]
async fn a_rewind_whose_daemon_was_killed_is_ended_before_anybody_else_works_on_the_directory() {
    for installation in installations().await {
        let root = place();
        let (old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
        make_work(&new).await;
        let lost = what_is_lost(&old, &new).await;
        let work = job(&old, &new, lost).await;
        let mut orphan = left_with_the_lock(&old.layout);
        let (result, _) = run(&old, &work).await;
        result.unwrap();
        assert!(!orphan.wait().unwrap().success(), "it was ended");
    }
}

#[tokio::test]
async fn a_rewind_that_misses_wal_fails_and_a_clone_takes_its_place_and_keeps_the_old_directory() {
    for installation in installations().await {
        let root = place();
        let (mut old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
        let lost = what_is_lost(&old, &new).await;
        let work = job(&old, &new, lost).await;
        // The segment with the last checkpoint that both have is recycled.
        let from = wal_segment_before(&old, work.lost.from);
        std::fs::remove_file(old.data_dir().join("pg_wal").join(&from)).unwrap();
        let (result, _) = run(&old, &work).await;
        assert!(result.is_err());
        assert!(matches!(old.look().await, DataDirectory::HalfRewound(_)));
        let keep = Keep::Whole { why: "it could not be rewound".to_owned() };
        clone_from(&installation, &old.layout, &old.clone_job(&new, keep).await).await.unwrap();
        assert!(rewind::marker(&old.layout).unwrap().is_none(), "it spoke of the directory that is kept");
        old.follow(&new).await;
        has_the_leaders_rows(&old, &new).await;
    }
}

/// The segment before the one that a position is in.
fn wal_segment_before(server: &Server, at: pgherd::types::Lsn) -> String {
    let entries = std::fs::read_dir(server.data_dir().join("pg_wal")).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.retain(|name| wal::segment_of(name).is_some_and(|segment| segment.range(16 << 20).1 <= at));
    names.into_iter().max().unwrap_or_else(|| panic!("nothing is before {at}"))
}

#[tokio::test]
async fn a_member_without_checksums_and_hints_is_not_rewound() {
    for installation in installations().await {
        let root = place();
        let (old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
        let DataDirectory::Full(control) = old.look().await else { panic!("it is full") };
        assert!(control.data_checksums);
        let program = installation.program("pg_checksums");
        let done = std::process::Command::new(program).arg("--disable").arg("-D").arg(old.data_dir()).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        assert!(control.wal_log_hints, "pgherd sets it");
        assert!(matches!(judge(&old, &new).await, Rejoin::Rewind { .. }), "hints are enough");
    }
}

#[tokio::test]
async fn a_marker_of_a_rewind_that_ended_well_is_finished_and_not_begun_again() {
    let installation = installations().await.remove(0);
    let root = place();
    let (mut old, new) = diverged(&installation, root.path(), &[], Signal::SIGINT).await;
    let lost = what_is_lost(&old, &new).await;
    let work = job(&old, &new, lost).await;
    let (result, kept) = run(&old, &work).await;
    result.unwrap();
    // As if the daemon had ended before the last steps.
    let attempt = RewindAttempt {
        why: work.why.clone(),
        lost: work.lost,
        system_id: work.leader.lineage.system_id,
        attempts: 1,
        leader_timeline: TimelineId(2),
        promoted_under: None,
        boot_id: "another boot".to_owned(),
        checkpoint: pgherd::types::Lsn(1),
        kept: kept.unwrap().kept,
        finished: true,
    };
    std::fs::remove_file(old.data_dir().join("standby.signal")).unwrap();
    std::fs::write(old.layout.rewind_marker(), serde_json::to_vec(&attempt).unwrap()).unwrap();
    std::fs::create_dir_all(old.layout.rewind_dir().join("files")).unwrap();
    for name in pgherd::postgres::configure::FILES {
        let there = old.data_dir().join(name);
        if there.exists() {
            std::fs::copy(there, old.layout.rewind_dir().join("files").join(name)).unwrap();
        }
    }
    assert!(matches!(old.look().await, DataDirectory::HalfRewound(_)));
    assert!(data_directory::control_file(&installation, &old.layout).await.unwrap().backup_label);
    let (result, _) = run(&old, &work).await;
    result.unwrap();
    old.follow(&new).await;
    has_the_leaders_rows(&old, &new).await;
}
