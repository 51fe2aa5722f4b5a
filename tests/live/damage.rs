//! Data directories as crashes and bad disks leave them (SAFETY rows 33 and 34).

use std::fs;

use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::postgres::{history_files, wal};
use pgherd::types::TimelineId;

use crate::rig::wait::{A_WHILE, holds_throughout};
use crate::rig::world::{Setup, World};

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

fn sync(document: &mut ClusterDocument) {
    document.mode = "sync".into();
}

/// Writes a file below a data directory as the servers' user.
fn write(world: &World, index: usize, name: &str, bytes: &[u8]) {
    let path = world.cluster.data_dir(index).join(name);
    fs::write(&path, bytes).unwrap();
    world.cluster.household().user.own(&path).unwrap();
}

/// The file of a backup of this node that ran just now, as a copy of its files that was put back has it.
fn backup_label(world: &World, index: usize) -> String {
    world.ask(index, "select pg_backup_start('crashed', true); select labelfile from pg_backup_stop(false)").unwrap().unwrap()
}

#[test]
fn row_33_a_backup_label_that_is_there_after_a_crash_is_left_to_normal_start_up() {
    let world = World::up(&Setup { document: quorum, ..Setup::default() });
    let (leader, timeline, standby) = (world.leader(), world.timeline(), world.replica());
    let label = backup_label(&world, leader);
    assert!(label.starts_with("START WAL LOCATION"), "{label}");
    world.wait_writes(leader);

    write(&world, leader, "backup_label", label.as_bytes());
    let postmaster = world.postmaster(leader);
    postmaster.signal(Signal::SIGKILL);
    world.settle("it is started again", || world.cluster.postmaster(leader).is_some_and(|now| now != postmaster));
    world.wait_writes(leader);
    assert_eq!((world.leader(), world.timeline()), (leader, timeline), "in place");

    world.cluster.cut_power(standby);
    write(&world, standby, "backup_label", label.as_bytes());
    world.cluster.start_node(standby).unwrap();
    world.settle("the standby streams", || world.json(standby, "/patroni")["replication_state"] == "streaming");
    world.wait_whole("after both had crashed");
    world.wait_synchronous("after both had crashed");
    for index in [leader, standby] {
        let dir = world.cluster.data_dir(index);
        assert!(dir.join("backup_label.old").exists() && !dir.join("backup_label").exists(), "PostgreSQL has gone by it");
    }
    assert_eq!(world.decided(standby, "reclone"), Vec::<String>::new(), "and nothing was copied");
    world.finish();
}

/// The last failover's timeline, on this node whose power is gone: of the segment that it begins in there is only what is in front of the page
/// of the switch, as when the node was stopped while it received that. Gives a sentence.
fn cut_off_the_first_segment(world: &World, index: usize) -> String {
    const PAGE_BYTES: u64 = 8192;
    let timeline = TimelineId(world.timeline());
    let switch = history_files::read(&world.cluster.data_dir(index), timeline).unwrap().unwrap().0.last().unwrap().at;
    let pg_wal = world.cluster.data_dir(index).join("pg_wal");
    let files = wal::segments_in(&pg_wal).unwrap();
    let of = |file: &&wal::SegmentFile| {
        let (begins, ends) = file.segment.range(file.bytes);
        file.segment.timeline == timeline && (begins..ends).contains(&switch)
    };
    let file = files.iter().find(of).expect("it received some of it");
    let (begins, _) = file.segment.range(file.bytes);
    let kept = usize::try_from(switch.bytes_since(begins) / PAGE_BYTES * PAGE_BYTES).unwrap();
    let path = pg_wal.join(&file.name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[kept..].fill(0);
    write(world, index, &format!("pg_wal/{}", file.name), &bytes);
    format!("{} begins at {begins}, timeline {timeline} at {switch}; its first {kept} bytes are there", file.name)
}

fn a_standby_comes_back_that_was_stopped_in_a_new_timelines_first_segment(postgres_17: bool) {
    let world = World::up(&Setup { postgres_17, document: quorum, ..Setup::default() });
    let former = world.leader();
    world.cluster.cut_power(former);
    let leader = world.wait_another_leads(former);
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after a failover");
    let standby = world.others(leader).into_iter().find(|index| *index != former).unwrap();
    world.cluster.cut_power(standby);
    let file = cut_off_the_first_segment(&world, standby);
    println!("{file}");
    world.cluster.start_node(standby).unwrap();
    world.settle("the standby streams", || world.json(standby, "/patroni")["replication_state"] == "streaming");
    world.wait_whole("after the standby came back");
    world.wait_synchronous("after the standby came back");
    assert_eq!(world.decided(standby, "wal_completed").len(), 1, "it is said");
    assert_eq!(world.decided(standby, "reclone"), Vec::<String>::new(), "and nothing was copied");
    world.finish();
}

#[test]
fn a_standby_that_was_stopped_in_a_new_timelines_first_segment_comes_back_by_itself() {
    a_standby_comes_back_that_was_stopped_in_a_new_timelines_first_segment(false);
}

#[test]
fn on_17_too_a_standby_that_was_stopped_in_a_new_timelines_first_segment_comes_back_by_itself() {
    a_standby_comes_back_that_was_stopped_in_a_new_timelines_first_segment(true);
}

/// Not started, and it says why.
#[track_caller]
fn is_given_up(world: &World, index: usize) {
    world.settle("it is said", || world.has_condition(index, "data_directory_unusable"));
    assert!(world.cluster.postgres_processes(index).is_empty());
}

#[test]
fn row_34_in_sync_on_17_a_member_with_a_damaged_control_file_never_leads_and_keeps_what_it_has() {
    let world = World::up(&Setup { postgres_17: true, document: sync, ..Setup::default() });
    let control = "global/pg_control";
    let damages: [&[u8]; 2] = [&[0xA5; 8192], &[0xA5; 100]];
    let mut damaged = Vec::new();
    for (damage, how) in damages.into_iter().zip(["overwritten", "cut short"]) {
        world.settle("commits wait for a standby that is whole", || world.with_role("sync_standby").is_some());
        let leader = world.leader();
        write(&world, leader, control, damage);
        world.postmaster(leader).signal(Signal::SIGKILL);
        world.wait_another_leads(leader);
        println!("{how}: {} leads after {}", world.name(world.leader()), world.name(leader));
        damaged.push((leader, damage));
        damaged.iter().for_each(|(index, _)| is_given_up(&world, *index));
    }
    let last = world.leader();
    // In good order: nothing else keeps anybody waiting.
    world.stop_node(last);
    let nobody_leads = || (0..world.nodes()).all(|index| world.http(index, "/primary") != Some(200));
    world.settle("nobody leads", || world.status().leader.is_none());
    assert!(holds_throughout(A_WHILE, || nobody_leads() && world.status().leader.is_none()), "a damaged member led");
    world.cluster.start_node(last).unwrap();
    world.wait_writes(last);
    for (index, damage) in &damaged {
        is_given_up(&world, *index);
        let dir = world.cluster.data_dir(*index);
        assert_eq!(fs::read(dir.join(control)).unwrap(), *damage, "nobody has touched it");
        // A person has seen it, and gives it up to a copy.
        fs::rename(&dir, dir.with_file_name("damaged")).unwrap();
    }
    world.wait_whole("once the damaged directories were moved away");
    world.wait_synchronous("again");
    world.finish();
}
