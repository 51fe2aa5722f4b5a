//! The segment that a timeline begins in, received in part: what PostgreSQL makes of it, and what is made of it before a start.

use std::path::PathBuf;

use pgherd::facts::postgres::{HalfSegment, ProbeOutcome};
use pgherd::postgres::{Installation, half_segment, history_files, set_standby, wal};
use pgherd::types::{Lsn, TimelineId};

use super::harness::{LIMIT, Server, eventually_async, installations, place};

/// XLOG_BLCKSZ.
const PAGE_BYTES: u64 = 8192;

/// A leader on timeline 2, and a standby of it that is stopped: it has all of timeline 1, and its control file is in the segment that timeline
/// 2 begins in.
struct Pair {
    leader: Server,
    standby: Server,
    /// Where timeline 2 begins, and the segment's files of both timelines on the standby.
    switch: Lsn,
    begins: Lsn,
    older: PathBuf,
    newer: PathBuf,
    _root: tempfile::TempDir,
}

async fn pair(installation: &Installation) -> Pair {
    let root = place();
    let mut origin = Server::primary(installation, root.path(), "a").await;
    let leader = Server::standby_of(&origin, "b").await;
    let mut standby = Server::standby_of(&origin, "c").await;
    origin.run("checkpoint").await;
    let checkpoint = origin.write_position().await;
    standby.until("it has the checkpoint", |facts| facts.replay_lsn >= checkpoint).await;
    standby.run("checkpoint").await;
    origin.run("create table public.t as select generate_series(1, 4000) as id").await;
    origin.stop();
    let shutdown = origin.control().await.checkpoint;
    for one in [&leader, &standby] {
        one.until("it has the shutdown checkpoint", |facts| facts.replay_lsn > shutdown).await;
    }
    // As it is when a host goes down: the control file stays where the last restartpoint was.
    standby.crash();
    leader.promote().await;
    leader.run("create table public.u as select generate_series(1, 1000) as id").await;
    let asked = leader.as_leader().look(LIMIT).await.unwrap();
    history_files::bring(standby.data_dir(), &asked.history_files).unwrap();
    let switch = history_files::read(standby.data_dir(), TimelineId(2)).unwrap().unwrap().0[0].at;
    let segment = |timeline: u32| {
        let of = |file: &wal::SegmentFile| {
            let (begins, ends) = file.segment.range(file.bytes);
            file.segment.timeline == TimelineId(timeline) && (begins..ends).contains(&switch)
        };
        let here = if timeline == 1 { standby.data_dir() } else { leader.data_dir() };
        let found = wal::segments_in(&here.join("pg_wal")).unwrap().into_iter().find(of).unwrap();
        (found.segment.range(found.bytes).0, standby.data_dir().join("pg_wal").join(found.name))
    };
    let ((begins, older), (_, newer)) = (segment(1), segment(2));
    assert!(standby.control().await.checkpoint > begins, "its checkpoint is in that segment");
    Pair { leader, standby, switch, begins, older, newer, _root: root }
}

impl Pair {
    /// The standby has so much of the leader's segment, and what PostgreSQL makes a segment of: zeros.
    fn receive(&self, up_to: Lsn) {
        let whole = std::fs::read(self.leader.data_dir().join("pg_wal").join(self.newer.file_name().unwrap())).unwrap();
        let kept = usize::try_from(up_to.bytes_since(self.begins)).unwrap();
        let mut half = vec![0; whole.len()];
        half[..kept].copy_from_slice(&whole[..kept]);
        std::fs::write(&self.newer, half).unwrap();
    }

    fn newer(&self) -> Vec<u8> {
        std::fs::read(&self.newer).unwrap()
    }

    fn older(&self) -> Vec<u8> {
        std::fs::read(&self.older).unwrap()
    }

    /// So many bytes of the segment are in front of the switch.
    fn shared(&self) -> usize {
        usize::try_from(self.switch.bytes_since(self.begins)).unwrap()
    }

    async fn complete(&self, installation: &Installation) -> Vec<HalfSegment> {
        half_segment::complete(installation, self.standby.data_dir()).await.unwrap()
    }

    fn middle(&self) -> Lsn {
        Lsn(self.switch.0 - 8 * PAGE_BYTES)
    }

    /// Starts it as a standby of the leader with the files as they are, and tells whether it ends by itself.
    async fn ends_by_itself(&mut self) -> bool {
        self.standby.inputs.primary_conninfo = Some(self.standby.conninfo_to(&self.leader));
        set_standby(self.standby.data_dir(), true).unwrap();
        self.standby.install().await;
        self.standby.spawn();
        let mut ended = false;
        eventually_async(async || {
            ended = self.standby.has_ended();
            let probe = self.standby.probe().await;
            let streams = matches!(probe.outcome, ProbeOutcome::Accepting(facts) if facts.streams());
            ended || streams
        })
        .await;
        ended
    }
}

#[tokio::test]
async fn a_standby_that_was_stopped_in_a_new_timelines_first_segment_starts_again_when_it_is_completed() {
    for installation in installations().await {
        let mut pair = pair(&installation).await;
        pair.receive(pair.middle());
        for _ in 0..2 {
            assert!(pair.ends_by_itself().await, "PostgreSQL prefers the half segment, and does not go back to the other one");
        }
        let found = half_segment::look(&installation, pair.standby.data_dir()).await.unwrap();
        let [half] = &found[..] else { panic!("{found:?}") };
        assert_eq!((half.timeline, half.switch, &half.obstacle), (TimelineId(2), pair.switch, &None));
        assert!(half.missing >= pair.middle() && half.missing < pair.switch, "{half:?}");
        assert!(pair.ends_by_itself().await, "a look changes nothing");

        assert_eq!(pair.complete(&installation).await, found);
        let (newer, older, shared) = (pair.newer(), pair.older(), pair.shared());
        assert_eq!(newer[..shared], older[..shared]);
        assert!(newer[shared..].iter().all(|byte| *byte == 0) && newer.len() == older.len());
        assert_eq!(pair.complete(&installation).await, [], "it is whole");
        assert!(!pair.ends_by_itself().await);
        pair.standby.catches_up_with(&pair.leader).await;
        assert_eq!(pair.standby.ask("select (select count(*) from public.t) + (select count(*) from public.u)").await, "5000");
    }
}

#[tokio::test]
async fn a_hole_in_front_of_the_switch_is_filled_and_what_is_behind_it_is_kept() {
    for installation in installations().await {
        let mut pair = pair(&installation).await;
        pair.receive(pair.leader.write_position().await);
        let received = pair.newer();
        let (shared, page) = (pair.shared(), usize::try_from(PAGE_BYTES).unwrap());
        // As a loss of power leaves it: pages that were received later are on disk, and earlier ones are not.
        let hole = (shared / page - 8) * page..(shared / page - 6) * page;
        let mut holed = received.clone();
        holed[hole].fill(0);
        std::fs::write(&pair.newer, &holed).unwrap();
        assert!(pair.ends_by_itself().await);

        assert_eq!(pair.complete(&installation).await.len(), 1);
        assert_eq!(pair.newer(), received);
        pair.leader.stop();
        pair.standby.inputs.primary_conninfo = None;
        pair.standby.start().await;
        pair.standby.until("it has replayed what is there", |facts| facts.replayed_all).await;
        assert_eq!(pair.standby.ask("select count(*)::text from public.u").await, "1000", "what it had received");
    }
}

#[tokio::test]
async fn nothing_is_written_where_another_history_may_be_or_the_older_segment_is_no_better() {
    for installation in installations().await {
        let pair = pair(&installation).await;
        assert_eq!(pair.complete(&installation).await, [], "there is no segment of the new timeline");
        pair.receive(pair.leader.write_position().await);
        assert_eq!(pair.complete(&installation).await, [], "it is whole");

        pair.receive(pair.middle());
        let (half, page) = (pair.newer(), usize::try_from(PAGE_BYTES).unwrap());
        let refused = async |newer: &[u8], older: &[u8], why: &str| {
            std::fs::write(&pair.newer, newer).unwrap();
            std::fs::write(&pair.older, older).unwrap();
            let found = pair.complete(&installation).await;
            assert!(matches!(&found[..], [half] if half.obstacle.as_ref().is_some_and(|obstacle| obstacle.contains(why))), "{found:?}");
            assert_eq!((&pair.newer()[..], &pair.older()[..]), (newer, older));
        };
        let older = pair.older();
        let mut another = half.clone();
        let last = pair.shared() - 1;
        another[last] = older[last].wrapping_add(1).max(1);
        refused(&another, &older, "something else").await;
        let mut cut_off = older.clone();
        cut_off[(pair.shared() / page - 4) * page..].fill(0);
        refused(&half, &cut_off, "cannot be read").await;

        std::fs::write(&pair.newer, &half).unwrap();
        std::fs::remove_file(&pair.older).unwrap();
        assert_eq!(pair.complete(&installation).await, [], "there is nothing to complete it with");
        assert_eq!(pair.newer(), half);
        let found = half_segment::look(&installation, pair.standby.data_dir()).await.unwrap();
        assert!(
            matches!(&found[..], [half] if half.obstacle.as_ref().is_some_and(|obstacle| obstacle.contains("is not there"))),
            "{found:?}"
        );
        pair.receive(pair.leader.write_position().await);
        assert_eq!(half_segment::look(&installation, pair.standby.data_dir()).await.unwrap(), [], "it is whole without the other");
    }
}
