//! Timelines: ids, history files, where WAL ends, and who may follow whom.

use std::path::Path;

use pgherd::facts::postgres::{DatabaseState, ProbeOutcome};
use pgherd::policy::rejoin::rewind::Rewinding;
use pgherd::policy::rejoin::{Inputs, LastRecord, OwnPromotion, Rejoin, decide, promoted_by_hand};
use pgherd::postgres::{Installation, Keep, clone_from, history_files, set_standby, wal};
use pgherd::spec::cluster::OnRewindFailure;
use pgherd::types::{Epoch, Lsn, TimelineId};

use super::harness::{LIMIT, Server, eventually_async, installations, place};

/// The decision for a stopped member, as the daemon reaches it.
async fn judge(member: &Server, leader: &Server, promoted_under: Option<Epoch>) -> Rejoin {
    let local = member.control().await;
    let wal = wal::end_of_wal(&member.installation, member.data_dir(), &local, LIMIT).await;
    let own = member.layout.promotion_file().read().unwrap();
    let asked = leader.as_leader().look(LIMIT).await.unwrap();
    let rewinding = Rewinding { wanted: false, on_failure: OnRewindFailure::Reclone, obstacle: None, failures: 0 };
    decide(Inputs {
        rewinding: &rewinding,
        local: &local,
        wal: &wal,
        own_promotion: own.as_ref(),
        promoted_under,
        led_before: promoted_under.is_some(),
        leader: &asked.lineage,
    })
}

fn note_promotion(server: &Server, timeline: u32, epoch: i64) {
    let record = OwnPromotion { timeline: TimelineId(timeline), epoch: Epoch(epoch), parent: TimelineId(1), switch_lsn: None };
    server.layout.promotion_file().write(&record).unwrap();
}

/// Two standbys that have everything of a primary that was stopped in good order.
async fn two_heirs(installation: &Installation, root: &Path) -> (Server, Server) {
    let mut origin = Server::primary(installation, root, "a").await;
    let heirs = (Server::standby_of(&origin, "b").await, Server::standby_of(&origin, "c").await);
    origin.stop();
    let shutdown = origin.control().await.checkpoint;
    for one in [&heirs.0, &heirs.1] {
        one.until("it has the shutdown checkpoint", |facts| facts.end_of_wal() > shutdown).await;
    }
    heirs
}

#[tokio::test]
async fn a_primary_stopped_in_good_order_follows_its_successor_without_a_copy() {
    for installation in installations().await {
        let root = place();
        let mut old = Server::primary(&installation, root.path(), "a").await;
        let new = Server::standby_of(&old, "b").await;
        old.stop();
        let shutdown = old.control().await.checkpoint;
        new.until("it has the shutdown checkpoint", |facts| facts.end_of_wal() > shutdown).await;
        let promoted = new.promote().await;
        assert_eq!(promoted.timeline, TimelineId(2));
        assert_eq!(judge(&old, &new, Some(Epoch(5))).await, Rejoin::Follow);
        let leader = new.as_leader().look(LIMIT).await.unwrap();
        history_files::bring(old.data_dir(), &leader.history_files).unwrap();
        old.follow(&new).await;
        let facts = old.catches_up_with(&new).await;
        assert_eq!(facts.timeline, TimelineId(2), "the probe sees the switch");
    }
}

#[tokio::test]
async fn a_primary_that_wrote_on_has_diverged_and_the_loss_is_named() {
    for installation in installations().await {
        let root = place();
        let mut old = Server::primary(&installation, root.path(), "a").await;
        let new = Server::standby_of(&old, "b").await;
        new.promote().await;
        old.run("create table public.lost as select generate_series(1, 1000) as id").await;
        let written = old.write_position().await;
        old.crash();
        let Rejoin::Clone { why, lost } = judge(&old, &new, Some(Epoch(5))).await else { panic!("it has diverged") };
        let lost = lost.unwrap();
        let switch = history_files::read(new.data_dir(), TimelineId(2)).unwrap().unwrap().0[0].at;
        assert_eq!((lost.timeline, lost.from), (TimelineId(1), switch));
        assert!(lost.to.is_some_and(|to| to > switch && to < written), "{lost:?} {written} {why}");

        let keep = Keep::Whole { why };
        clone_from(&installation, &old.layout, &old.clone_job(&new, keep).await).await.unwrap();
        old.follow(&new).await;
        assert!(old.layout.kept_dir().join("data/pg_wal").is_dir());
    }
}

#[tokio::test]
async fn row_53_two_promotions_to_one_id_are_told_apart_by_their_epochs() {
    for installation in installations().await {
        let root = place();
        let (mut first, second) = two_heirs(&installation, root.path()).await;
        note_promotion(&first, 2, 5);
        first.promote().await;
        first.stop();
        second.promote().await;
        let both = [&first, &second].map(|one| history_files::read(one.data_dir(), TimelineId(2)).unwrap().unwrap());
        assert_eq!(both[0], both[1], "the history files are the same: only the epoch tells them apart");
        assert!(matches!(judge(&first, &second, Some(Epoch(6))).await, Rejoin::Clone { .. }));
    }
}

#[tokio::test]
async fn row_53_a_standby_promoted_by_hand_and_started_again_is_known_by_its_record_and_by_nothing_else() {
    for installation in installations().await {
        let root = place();
        let (mut by_hand, leader) = two_heirs(&installation, root.path()).await;
        by_hand.promote().await;
        by_hand.crash();
        let was_primary = by_hand.control().await;
        assert_eq!((promoted_by_hand(&was_primary), was_primary.promoted), (Some(TimelineId(2)), None));
        note_promotion(&by_hand, 2, Epoch::BY_HAND.0);
        assert_eq!(promoted_by_hand(&by_hand.control().await), None, "it is on record");

        set_standby(by_hand.data_dir(), true).unwrap();
        by_hand.inputs.primary_conninfo = None;
        by_hand.install().await;
        by_hand.start().await;
        by_hand.stop();
        let was_standby = by_hand.control().await;
        assert_eq!(was_standby.promoted, Some((TimelineId(2), Epoch::BY_HAND)));
        leader.promote().await;
        assert!(matches!(judge(&by_hand, &leader, Some(Epoch(6))).await, Rejoin::Clone { .. }));

        by_hand.layout.promotion_file().remove().unwrap();
        let without = by_hand.control().await;
        assert_eq!((without.state, without.promoted), (DatabaseState::ShutDownInRecovery, None));
        assert_eq!(judge(&by_hand, &leader, Some(Epoch(6))).await, Rejoin::Follow, "nothing on disk tells the two apart");
    }
}

#[tokio::test]
async fn ids_that_others_reserved_are_skipped_and_standbys_follow_across_the_gap() {
    for installation in installations().await {
        let root = place();
        let mut old = Server::primary(&installation, root.path(), "a").await;
        let new = Server::standby_of(&old, "b").await;
        let mut third = Server::standby_of(&old, "c").await;
        history_files::lay(new.data_dir(), &[(TimelineId(2), "x".into()), (TimelineId(3), "y".into())]).unwrap();
        old.stop();
        let shutdown = old.control().await.checkpoint;
        for one in [&new, &third] {
            one.until("it has the shutdown checkpoint", |facts| facts.end_of_wal() > shutdown).await;
        }
        assert_eq!(new.promote().await.timeline, TimelineId(4));
        let history = history_files::read(new.data_dir(), TimelineId(4)).unwrap().unwrap();
        assert_eq!(history.0.len(), 1, "a reserved id is nobody's ancestor");
        assert_eq!(history.0[0].parent, TimelineId(1));

        // A running standby is pointed at the new leader by a reload, and must cross from 1 to 4.
        third.inputs.primary_conninfo = Some(third.conninfo_to(&new));
        let outcome = pgherd::postgres::configure::install_running(&installation, &third.layout, &third.sql, &third.files(), LIMIT).await;
        assert!(matches!(outcome, Ok(pgherd::postgres::Outcome::Reloaded { .. })), "{outcome:?}");
        new.run("create table public.t (id int)").await;
        let position = new.write_position().await;
        third.until("it followed across the gap", |facts| facts.timeline == TimelineId(4) && facts.replay_lsn >= position).await;

        // And a restart of it finds its way too.
        third.stop();
        assert!(history_files::remove_unused_reservations(third.data_dir(), TimelineId(4)).unwrap().is_empty());
        assert_eq!(judge(&third, &new, Some(Epoch(5))).await, Rejoin::Follow);
        third.follow(&new).await;
    }
}

#[tokio::test]
async fn a_promotion_that_did_not_happen_leaves_a_standby_that_starts() {
    for installation in installations().await {
        let root = place();
        let leader = Server::primary(&installation, root.path(), "a").await;
        let mut standby = Server::standby_of(&leader, "b").await;
        history_files::lay(standby.data_dir(), &[(TimelineId(2), "x".into())]).unwrap();
        note_promotion(&standby, 3, 5);
        standby.crash();
        let timeline = standby.control().await.timeline;
        assert_eq!(history_files::remove_unused_reservations(standby.data_dir(), timeline).unwrap(), [TimelineId(2)]);
        assert_eq!(judge(&standby, &leader, None).await, Rejoin::Follow);
        standby.follow(&leader).await;
    }
}

#[tokio::test]
async fn the_timeline_is_known_when_the_primary_is_gone_and_no_walreceiver_is_left() {
    for installation in installations().await {
        let root = place();
        let mut old = Server::primary(&installation, root.path(), "a").await;
        let mut new = Server::standby_of(&old, "b").await;
        let mut third = Server::standby_of(&old, "c").await;
        old.stop();
        let shutdown = old.control().await.checkpoint;
        for one in [&new, &third] {
            one.until("it has the shutdown checkpoint", |facts| facts.end_of_wal() > shutdown).await;
        }
        new.promote().await;
        third.stop();
        third.follow(&new).await;
        new.run("create table public.t (id int)").await;
        let position = new.write_position().await;
        third.until("it has all", |facts| facts.replay_lsn >= position).await;
        new.crash();
        let alone = third.until("its walreceiver is gone", |facts| facts.walreceiver.is_none()).await;
        // No restartpoint happened since the switch: the control file alone would say 1.
        assert_eq!(alone.timeline, TimelineId(2));
        assert!(alone.end_of_wal() >= position);
        third.crash();
        let wal = wal::end_of_wal(&installation, third.data_dir(), &third.control().await, LIMIT).await;
        assert_eq!(wal.timeline, TimelineId(2));
        assert!(matches!(wal.last_record, LastRecord::Known(start) if start < position && start > shutdown), "{wal:?}");
    }
}

#[tokio::test]
async fn the_last_record_starts_before_the_end_and_is_unknown_without_pg_waldump() {
    for installation in installations().await {
        let root = place();
        let mut server = Server::primary(&installation, root.path(), "a").await;
        server.run("select pg_switch_wal(); create table public.t as select generate_series(1, 20000) as id").await;
        let end = server.write_position().await;
        server.crash();
        let control = server.control().await;
        let wal = wal::end_of_wal(&installation, server.data_dir(), &control, LIMIT).await;
        let LastRecord::Known(start) = wal.last_record else { panic!("{wal:?}") };
        assert!(start < end && end.bytes_since(start) < 4096 && start >= control.checkpoint, "{start} {end}");

        let mut crippled = installation.clone();
        crippled.bin_dir = root.path().join("no-programs");
        let wal = wal::end_of_wal(&crippled, server.data_dir(), &control, LIMIT).await;
        assert!(matches!(wal.last_record, LastRecord::Unknown(why) if why.contains("pg_waldump")));
        let mut beyond = control.clone();
        beyond.checkpoint = Lsn(0x7F00_0000_0000);
        let wal = wal::end_of_wal(&installation, server.data_dir(), &beyond, LIMIT).await;
        assert!(matches!(wal.last_record, LastRecord::Unknown(_)), "no checkpoint record, no end: {wal:?}");
    }
}

#[tokio::test]
async fn row_50_a_standby_below_its_floor_does_not_start_and_one_raised_to_it_does() {
    for installation in installations().await {
        let root = place();
        let mut leader = Server::new(&installation, root.path(), "a");
        leader.inputs.parameters.insert("max_connections".into(), Some("150".into()));
        leader.make_primary().await;
        let mut standby = Server::new(&installation, root.path(), "b");
        clone_from(&installation, &standby.layout, &standby.clone_job(&leader, Keep::Empty).await).await.unwrap();
        standby.inputs.primary_conninfo = Some(standby.conninfo_to(&leader));
        set_standby(standby.data_dir(), true).unwrap();
        standby.install().await;
        standby.spawn();
        // It either refuses to start or stops replay as soon as it sees the record: it never accepts and goes on.
        eventually_async(async || standby_is_stuck(&mut standby).await).await;
        standby.crash();

        standby.inputs.floor = Some(standby.control().await.floor);
        assert_eq!(standby.inputs.floor.unwrap().max_connections, 150);
        standby.follow(&leader).await;
        assert_eq!(standby.ask("select current_setting('max_connections')").await, "150");
    }
}

async fn standby_is_stuck(standby: &mut Server) -> bool {
    if standby.has_ended() {
        return true;
    }
    matches!(standby.probe().await.outcome, ProbeOutcome::Accepting(facts) if facts.replay_paused)
}
