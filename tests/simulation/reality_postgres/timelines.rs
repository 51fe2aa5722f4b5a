//! Promotions, and who may follow whom after them.

use std::cmp::Ordering;

use pgherd::facts::postgres::DatabaseState;
use pgherd::postgres::history_files;
use pgherd::types::TimelineId;

use super::twins::Twins;

/// Stops the primary in good order; the standbys have all of it.
async fn end_in_good_order(twins: &mut Twins, primary: usize, standbys: &[usize]) {
    twins.stop(primary);
    let shutdown = twins.servers[primary].control().await.checkpoint;
    for standby in standbys {
        twins.servers[*standby].until("it has the shutdown checkpoint", |facts| facts.replay_lsn > shutdown).await;
        twins.servers[*standby].until("its walreceiver is gone", |facts| facts.walreceiver.is_none()).await;
    }
}

pub async fn promotion(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.lay(1, &[2, 3]);
    end_in_good_order(&mut twins, 0, &[1]).await;
    let end = twins.promote(1).await;
    assert_eq!(twins.running(1).await.timeline, TimelineId(4), "the first id that has no file");
    let history = history_files::read(twins.servers[1].data_dir(), TimelineId(4)).unwrap().unwrap();
    assert_eq!(history.0.iter().map(|switch| (switch.parent, switch.at)).collect::<Vec<_>>(), [(TimelineId(1), end)]);

    twins.crash_before_first_checkpoint(1).await;
    let early = twins.at_rest(1).await;
    assert_eq!((early.state, early.timeline, early.min_recovery_timeline), (DatabaseState::InProduction, TimelineId(1), TimelineId(4)));
    twins.start_as_primary(1).await;
    assert_eq!(twins.running(1).await.timeline, TimelineId(4), "a restart goes on on the new timeline");
    twins.commit(1).await;
    twins.crash(1);
    let later = twins.at_rest(1).await;
    assert_eq!((later.timeline, later.min_recovery_timeline), (TimelineId(4), TimelineId(0)));
}

pub async fn behind(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.standby_of(2, 0).await;
    twins.stop(2);
    twins.commit(0).await;
    twins.caught_up(1, 0).await;
    end_in_good_order(&mut twins, 0, &[1]).await;
    twins.promote(1).await;
    twins.first_checkpoint(1).await;
    twins.commit(1).await;
    // The old primary ended at the switch point, the other standby before it.
    for host in [0, 2] {
        let rest = twins.at_rest(host).await;
        assert_eq!((rest.timeline, rest.wal_timeline), (TimelineId(1), TimelineId(1)));
        assert!(twins.judge(host, 1, Some(5)).await.follows);
        assert_eq!(twins.in_the_past_of(host, 1), (true, true));
        twins.follow(host, 1).await;
        twins.caught_up(host, 1).await;
        assert_eq!(twins.running(host).await.timeline, TimelineId(2));
        twins.crash(host);
        let crashed = twins.at_rest(host).await;
        assert_eq!((crashed.timeline, crashed.wal_timeline), (TimelineId(1), TimelineId(2)));
        twins.follow(host, 1).await;
    }
    twins.stop(1);
    let ended = twins.at_rest(1).await;
    assert_eq!((ended.checkpoint, ended.timeline), (Ordering::Equal, TimelineId(2)));
}

pub async fn past(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.promote(1).await;
    twins.first_checkpoint(1).await;
    twins.commit(0).await;
    twins.crash(0);
    let judged = twins.judge(0, 1, Some(5)).await;
    assert!(!judged.follows);
    assert_eq!(judged.lost, Some((TimelineId(1), true)), "what was written past the switch");
    assert_eq!(twins.in_the_past_of(0, 1), (false, false));

    // Started all the same it never gets what the leader writes.
    twins.start_as_standby(0, Some(1)).await;
    twins.commit(1).await;
    twins.gets_nowhere(0, 1, "before current recovery point").await;
    // Nor does it start again: it has the leader's history by now, and has replayed what is not in it.
    twins.crash(0);
    let crashed = twins.at_rest(0).await;
    assert!(crashed.must_recover_all && crashed.timeline == TimelineId(1), "{crashed:?}");
    assert_eq!(twins.judge(0, 1, Some(5)).await.lost, judged.lost);
    assert_eq!(twins.start_refused(0, Some(1)).exit_status, Some(1));
    twins.at_rest(0).await;
}

pub async fn same_id(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.standby_of(2, 0).await;
    end_in_good_order(&mut twins, 0, &[1, 2]).await;
    for (host, epoch) in [(1, 5), (2, 6)] {
        twins.note_promotion(host, 2, epoch);
        twins.promote(host).await;
        twins.first_checkpoint(host).await;
        // As long as the other's, and not the same.
        let rows = if host == 1 { "11" } else { "22" };
        twins.servers[host].run(&format!("insert into public.t values ({rows})")).await;
        twins.model_writes(host);
        if host == 1 {
            twins.crash(1);
        }
    }
    twins.commit(2).await;
    let [first, second] = [1, 2].map(|host| history_files::read(twins.servers[host].data_dir(), TimelineId(2)).unwrap().unwrap());
    assert_eq!(first, second, "the history files are the same");
    twins.at_rest(1).await;
    assert_eq!(twins.in_the_past_of(1, 2), (true, false));
    let judged = twins.judge(1, 2, Some(6)).await;
    assert!(!judged.follows && judged.why.contains("under epoch 5"), "{judged:?}");

    // PostgreSQL has no epochs: it follows, and what it then has is neither's.
    twins.follow(1, 2).await;
    twins.caught_up(1, 2).await;
    twins.running(1).await;
    let rows = "select max(id)::text from public.t where id > 1";
    assert_eq!((twins.servers[1].ask(rows).await.as_str(), twins.servers[2].ask(rows).await.as_str()), ("11", "22"));
}

pub async fn unrecorded(mut twins: Twins) {
    twins.primary(0).await;
    twins.standby_of(1, 0).await;
    twins.standby_of(2, 0).await;
    end_in_good_order(&mut twins, 0, &[1, 2]).await;
    // By hand: nothing of it is on record but what the control file says.
    twins.promote(1).await;
    twins.crash_before_first_checkpoint(1).await;
    twins.promote(2).await;
    twins.first_checkpoint(2).await;
    twins.commit(2).await;
    let early = twins.at_rest(1).await;
    assert_eq!((early.timeline, early.min_recovery_timeline), (TimelineId(1), TimelineId(2)));
    let judged = twins.judge(1, 2, Some(6)).await;
    assert!(!judged.follows && judged.why.contains("without a record"), "{judged:?}");
}
