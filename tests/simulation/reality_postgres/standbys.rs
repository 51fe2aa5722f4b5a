//! A standby through stops, crashes and restarts.

use std::cmp::Ordering;

use pgherd::facts::postgres::DatabaseState;
use pgherd::types::TimelineId;

use super::twins::Twins;

pub async fn restart(mut twins: Twins) {
    twins.primary(0).await;
    twins.clone_of(1, 0).await;
    let cloned = twins.at_rest(1).await;
    assert!(cloned.backup_label && cloned.standby_signal);
    twins.follow(1, 0).await;
    twins.commit(0).await;
    twins.caught_up(1, 0).await;
    twins.running(1).await;

    twins.crash(1);
    let crashed = twins.at_rest(1).await;
    assert_eq!((crashed.state, crashed.timeline), (DatabaseState::InArchiveRecovery, TimelineId(1)));
    assert_eq!(crashed.min_recovery_timeline, TimelineId(1));
    let before = twins.servers[0].write_position().await;
    // Alone: nobody gives it again what it has.
    twins.start_as_standby(1, None).await;
    let alone = twins.servers[1].until("it has replayed what it had", |facts| facts.end_of_wal() >= before).await;
    assert!(alone.walreceiver.is_none());
    assert_eq!(twins.running(1).await.received, None, "nothing was received since the start");

    assert_eq!(twins.stop(1).exit_status, Some(0));
    let stopped = twins.at_rest(1).await;
    assert_eq!(stopped.state, DatabaseState::ShutDownInRecovery);
    twins.follow(1, 0).await;
    twins.commit(0).await;
    twins.checkpoint(0).await;
    twins.commit(0).await;
    twins.caught_up(1, 0).await;
    assert_eq!(twins.running(1).await.received, Some(Ordering::Equal));
    twins.stop(1);
    let stopped = twins.at_rest(1).await;
    assert_eq!(stopped.checkpoint, Ordering::Less, "a restartpoint is at the primary's checkpoint, not at the end");
    assert!(twins.judge(1, 0, None).await.follows);
}
