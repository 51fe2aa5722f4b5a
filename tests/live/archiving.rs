//! The archive has everything up to the switch point, also what the former primary's archiver was ended over (SAFETY row 54).

use std::collections::BTreeSet;
use std::path::PathBuf;

use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::policy::timelines::TimelineHistory;
use pgherd::types::TimelineId;

use crate::rig::world::{MustSucceed, Setup, World};
use crate::switchover::on_both;

const SEGMENT_BYTES: u64 = 16 << 20;

/// Each member has an archive of its own beside its data directory: so it is seen who archived.
fn archives_slowly(document: &mut ClusterDocument) {
    document.postgres.push(r#"archive_command: "mkdir -p ../log/archive && sleep 1 && cp %p ../log/archive/%f""#.into());
}

fn archived(world: &World, index: usize) -> BTreeSet<String> {
    let archive: PathBuf = world.cluster.node_dir(index).join("log/archive");
    let whole = |entry: &std::fs::DirEntry| entry.metadata().is_ok_and(|file| file.len() == SEGMENT_BYTES);
    let files = std::fs::read_dir(archive).into_iter().flatten().flatten().filter(whole);
    files.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
fn after_a_switchover_that_cut_a_slow_archiver_short_every_segment_up_to_the_switch_point_is_archived() {
    on_both(&Setup { document: archives_slowly, ..Setup::default() }, |world| {
        let (leader, target, timeline) = (world.leader(), world.replica(), world.timeline());
        // More than the archiver gets through in the ten seconds that it is given.
        for _ in 0..18 {
            world.ask(leader, "select pg_switch_wal()").unwrap();
            world.ask(leader, "create table if not exists public.t (id int); insert into public.t values (1)").unwrap();
        }
        let ask = |how: &str| world.cluster.pgherd(&["switchover", "--to", world.name(target), how]);
        world.settle("the target has it all", || ask("--dry-run").is_ok_and(|said| said.code == Some(0)));
        ask("--yes").unwrap().must_succeed("pgherd switchover");
        let before = archived(&world, leader);
        world.wait_whole("after the switchover");
        assert!(!world.decided(leader, "wal_archived").is_empty(), "or nothing was left to do here");
        assert!(world.decided_by_anybody("rewind").is_empty() && world.decided_by_anybody("reclone").is_empty());

        let history = std::fs::read_to_string(world.cluster.data_dir(target).join(format!("pg_wal/{:08X}.history", timeline + 1))).unwrap();
        let switch = history.parse::<TimelineHistory>().unwrap().left_at(TimelineId(timeline)).unwrap();
        let segments = (1..switch.0 / SEGMENT_BYTES).map(|number| format!("{timeline:08X}{:08X}{:08X}", number >> 8, number & 0xFF));
        let segments: BTreeSet<String> = segments.collect();
        let after = archived(&world, leader);
        assert!(segments.is_subset(&after), "missing: {:?}", segments.difference(&after).collect::<Vec<_>>());
        assert!(!segments.is_subset(&before), "the archiver was through before it was stopped: nothing was tried here");
        world.wait_writes(target);
        world.finish();
    });
}
