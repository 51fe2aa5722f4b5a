//! The lease thread: a renewal counts only with its proof, a deadline only when the guard has it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use etcd_client::PutOptions;
use pgherd::clock::BootTime;
use pgherd::etcd::lease::Acknowledged;
use pgherd::etcd::{EtcdError, Moved};
use pgherd::facts::lease::{LeaseEvent, LeaseLoss};
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::types::{LeaseIdentity, LockIdentity};

use crate::proxy::{Network, Proxy};
use crate::support::etcd_server::{EtcdServer, PATIENCE, settings};
use crate::support::{Keeper, lease_is_gone, lease_of_a_minute, name, record};

against_both! { 1, &[];
    a_lock_is_proved_with_each_renewal_and_the_guard_knows_first,
    a_lock_made_anew_by_a_stranger_is_noticed_although_the_lease_renews,
    a_leader_key_written_by_hand_is_noticed_although_the_epoch_stays,
    row_37_a_leader_key_deleted_by_hand_costs_the_lock_and_not_the_lease,
    row_37_a_revoked_lease_is_lost,
    i2_the_deadline_counts_from_the_sending_however_late_the_answer,
    row_18_a_lock_whose_renewals_arrive_and_are_not_answered_runs_out,
    nothing_is_renewed_while_the_guard_owes_an_acknowledgement,
    a_guard_that_refuses_ends_the_renewals,
    what_the_guard_kept_is_adopted_with_a_proof,
    a_lease_that_is_gone_is_not_adopted,
    a_changed_ttl_takes_the_lock_along_under_the_same_epoch,
    a_lock_is_let_go_before_it_is_released,
    revoking_ends_the_lease_at_once,
    a_lease_is_told_as_it_was_granted_however_much_of_it_is_left,
    an_etcd_that_was_rebuilt_neither_renews_the_lease_nor_takes_it_away,
}

const TTL_S: u64 = 3;

fn lost(why: LeaseLoss) -> impl Fn(&LeaseEvent) -> bool {
    move |event| *event == LeaseEvent::Lost { why }
}

async fn a_lock_is_proved_with_each_renewal_and_the_guard_knows_first(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    for _ in 0..5 {
        keeper.proved(lock).await;
    }
    let known = keeper.acknowledged.lock().unwrap().clone();
    assert!(known.len() >= 6 && known.iter().all(|(of, _)| *of == lock));
    assert!(known.is_sorted_by_key(|(_, sent)| *sent));
    assert_eq!(server.etcd().read_view().await.unwrap().leader.unwrap().epoch, lock.epoch);
    keeper.handle.stop();
}

async fn a_lock_made_anew_by_a_stranger_is_noticed_although_the_lease_renews(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    let mut stranger = server.stranger().await;
    stranger.delete("/pgherd/main/leader", None).await.unwrap();
    // With our name and on our lease, as a stranger can: both are to be read in etcd. Only the epoch is not ours.
    let on_ours = PutOptions::new().with_lease(lock.lease.lease.0);
    stranger.put("/pgherd/main/leader", "a", Some(on_ours)).await.unwrap();
    keeper.until(lost(LeaseLoss::LockNotOurs(lock))).await;
    keeper.until(|event| matches!(event, LeaseEvent::Renewed { .. })).await;
}

async fn a_leader_key_written_by_hand_is_noticed_although_the_epoch_stays(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    server.stranger().await.put("/pgherd/main/leader", "a", None).await.unwrap();
    keeper.until(lost(LeaseLoss::LockNotOurs(lock))).await;
    let leader = server.etcd().read_view().await.unwrap().leader.unwrap();
    assert_eq!((leader.epoch, leader.lease.0), (lock.epoch, 0), "it would never have gone away by itself");
}

async fn row_37_a_leader_key_deleted_by_hand_costs_the_lock_and_not_the_lease(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    server.stranger().await.delete("/pgherd/main/leader", None).await.unwrap();
    keeper.until(lost(LeaseLoss::LockNotOurs(lock))).await;
    for _ in 0..3 {
        keeper.until(|event| matches!(event, LeaseEvent::Renewed { .. })).await;
    }
    assert!(server.etcd().read_view().await.unwrap().members.contains_key(&name("a")));
}

async fn row_37_a_revoked_lease_is_lost(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    server.etcd().revoke(lock.lease.lease).await.unwrap();
    // etcd before 3.4.38 and 3.5.23 may renew it once more; then it is the proof that fails (etcd #20616).
    keeper.until(|event| matches!(event, LeaseEvent::Lost { .. })).await;
    let next = keeper.granted().await;
    assert_ne!(next.lease, lock.lease.lease);
    assert_eq!(server.etcd().put_member(&name("a"), &record(1), lock.lease.lease).await, Err(EtcdError::LeaseNotFound));
}

fn proxied(server: &EtcdServer) -> (Proxy, String) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let proxy = Proxy::start(any, (Ipv4Addr::LOCALHOST, server.port(0)).into());
    let url = format!("http://{}", proxy.address());
    (proxy, url)
}

async fn i2_the_deadline_counts_from_the_sending_however_late_the_answer(server: EtcdServer) {
    const DELAY: Duration = Duration::from_millis(50);
    let (proxy, url) = proxied(&server);
    let mut keeper = Keeper::start(settings(vec![url]), 10);
    let lock = keeper.leading(&server.etcd(), "a").await;
    proxy.set(Network::Slow(DELAY));
    let slow_since = BootTime::now();
    for _ in 0..3 {
        let (heard, event) = loop {
            let next = keeper.next().await;
            if matches!(&next.1, LeaseEvent::Proved { sent, .. } if *sent > slow_since) {
                break next;
            }
        };
        let LeaseEvent::Proved { sent, until, .. } = event else { panic!("{event:?}") };
        assert_eq!(until, sent + keeper.times.validity());
        assert!(heard.since(sent) >= 4 * DELAY, "keepalive and proof went there and back, one after the other");
        assert!(keeper.acknowledged.lock().unwrap().contains(&(lock, sent)), "and the guard was told the same");
    }
}

/// SAFETY row 18: etcd would renew for ever what nobody can lead under.
async fn row_18_a_lock_whose_renewals_arrive_and_are_not_answered_runs_out(server: EtcdServer) {
    let (proxy, url) = proxied(&server);
    let mut keeper = Keeper::start(settings(vec![url]), TTL_S);
    let lock = keeper.leading(&server.etcd(), "a").await;
    proxy.set(Network::AnswersLost);
    lease_is_gone(&server, lock.lease.lease).await;
    proxy.set(Network::Pass);
    keeper.until(|event| matches!(event, LeaseEvent::Lost { .. })).await;
}

async fn nothing_is_renewed_while_the_guard_owes_an_acknowledgement(server: EtcdServer) {
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let mut keeper = Keeper::start_with(server.settings(), TTL_S, move |count| {
        if count >= 2 {
            let _ = released.lock().unwrap().recv();
        }
        Acknowledged::Yes
    });
    let etcd = server.etcd();
    let lock = keeper.leading(&etcd, "a").await;
    keeper.until(|event| *event == LeaseEvent::GuardSilent).await;
    assert_eq!(keeper.acknowledged.lock().unwrap().len(), 2, "one deadline was owed, and no other was made");
    // Nobody renews it, so etcd lets it run out.
    lease_is_gone(&server, lock.lease.lease).await;
    assert_eq!(etcd.read_view().await.unwrap().leader, None);
    drop(release);
}

async fn a_guard_that_refuses_ends_the_renewals(server: EtcdServer) {
    let mut keeper = Keeper::start_with(server.settings(), TTL_S, |count| match count {
        1..=2 => Acknowledged::Yes,
        _ => Acknowledged::No("the guard is gone".into()),
    });
    keeper.leading(&server.etcd(), "a").await;
    keeper.until(|event| *event == LeaseEvent::GuardSilent).await;
    assert_eq!(keeper.acknowledged.lock().unwrap().len(), 3);
}

async fn what_the_guard_kept_is_adopted_with_a_proof(server: EtcdServer) {
    let mut before = Keeper::start(server.settings(), TTL_S);
    let lock = before.leading(&server.etcd(), "a").await;
    before.handle.stop();
    let mut after = Keeper::start(server.settings(), TTL_S);
    after.handle.adopt(lock.lease, Some(lock));
    let first = after.until(|event| !matches!(event, LeaseEvent::Failed { .. })).await.pop();
    assert!(matches!(first, Some(LeaseEvent::Proved { lock: proved, .. }) if proved == lock), "{first:?}");
    after.proved(lock).await;
}

async fn a_lease_that_is_gone_is_not_adopted(server: EtcdServer) {
    let mut before = Keeper::start(server.settings(), TTL_S);
    let lock = before.leading(&server.etcd(), "a").await;
    before.handle.stop();
    server.etcd().revoke(lock.lease.lease).await.unwrap();
    let mut after = Keeper::start(server.settings(), TTL_S);
    after.handle.adopt(lock.lease, Some(lock));
    after.until(|event| matches!(event, LeaseEvent::Lost { .. })).await;
    assert!(after.acknowledged.lock().unwrap().is_empty(), "no deadline was made of it");
}

async fn a_changed_ttl_takes_the_lock_along_under_the_same_epoch(server: EtcdServer) {
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&etcd, "a").await;
    keeper.handle.change_times(LeaseTimes::new(Duration::from_secs(6)));
    let granted = keeper.until(|event| matches!(event, LeaseEvent::Granted { .. })).await.pop();
    let Some(LeaseEvent::Granted { identity, ttl, .. }) = granted else { panic!("{granted:?}") };
    assert_eq!(ttl, Duration::from_secs(6));
    keeper.proved(lock).await;

    let moved = etcd.move_to_lease(&name("a"), &record(1), Some(lock.epoch), lock.lease.lease, identity.lease).await.unwrap();
    assert_eq!(moved, Moved::Moved);
    let moved = LockIdentity { lease: identity, ..lock };
    keeper.handle.adopt(identity, Some(moved));
    let proof = keeper.until(|event| matches!(event, LeaseEvent::Proved { lock, .. } if *lock == moved)).await.pop();
    let Some(LeaseEvent::Proved { sent, until, .. }) = proof else { panic!("{proof:?}") };
    assert_eq!(until.since(sent), LeaseTimes::new(Duration::from_secs(6)).validity());
}

async fn a_lock_is_let_go_before_it_is_released(server: EtcdServer) {
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), TTL_S);
    let lock = keeper.leading(&etcd, "a").await;
    keeper.handle.let_go();
    let renewed = |event: &LeaseEvent| matches!(event, LeaseEvent::Renewed { .. });
    keeper.until(renewed).await;
    etcd.release(lock.epoch, None, None).await.unwrap();
    for _ in 0..2 {
        let events = keeper.until(renewed).await;
        assert!(!events.iter().any(|event| matches!(event, LeaseEvent::Lost { .. })), "{events:?}");
    }
}

async fn revoking_ends_the_lease_at_once(server: EtcdServer) {
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), 60);
    let LeaseIdentity { lease, .. } = keeper.leading(&etcd, "a").await.lease;
    keeper.handle.revoke();
    lease_is_gone(&server, lease).await;
    assert_eq!(etcd.read_view().await.unwrap().leader, None);
}

/// A member key of a former run is waited for by this.
async fn a_lease_is_told_as_it_was_granted_however_much_of_it_is_left(server: EtcdServer) {
    let etcd = server.etcd();
    let mut stranger = server.stranger().await;
    let term = stranger.status().await.unwrap().raft_term();
    assert!(term > 0);
    let as_granted = Some((Duration::from_secs(60), term));
    let lease = lease_of_a_minute(&server).await;
    assert_eq!(etcd.granted_ttl(lease).await, Ok(as_granted));
    let less = async {
        let mut again = tokio::time::interval(Duration::from_millis(100));
        while stranger.lease_time_to_live(lease.0, None).await.unwrap().ttl() > 58 {
            again.tick().await;
        }
    };
    tokio::time::timeout(PATIENCE, less).await.expect("nothing of the lease is used up");
    assert_eq!(etcd.granted_ttl(lease).await, Ok(as_granted));
    let (mut renewal, mut answers) = stranger.lease_keep_alive(lease.0).await.unwrap();
    renewal.keep_alive().await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 60);
    assert_eq!(etcd.granted_ttl(lease).await, Ok(as_granted));
    etcd.revoke(lease).await.unwrap();
    assert_eq!(etcd.granted_ttl(lease).await, Ok(None), "it is gone");
}

async fn an_etcd_that_was_rebuilt_neither_renews_the_lease_nor_takes_it_away(mut server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), 6);
    let lock = keeper.leading(&server.etcd(), "a").await;
    let mut without_a_lock = Keeper::start(server.settings(), 6);
    let lease = without_a_lock.granted().await;
    server.rebuild().await;
    let mut stranger = server.stranger().await;
    for id in [lock.lease.lease, lease.lease] {
        let same = etcd_client::LeaseGrantOptions::new().with_id(id.0);
        stranger.lease_grant(60, Some(same)).await.unwrap();
    }
    let theirs = |event: &LeaseEvent| matches!(event, LeaseEvent::Failed { why } if why.contains("belongs to etcd cluster"));
    without_a_lock.until(theirs).await;
    let renewed = without_a_lock.until(theirs).await;
    assert!(!renewed.iter().any(|event| matches!(event, LeaseEvent::Renewed { .. })), "{renewed:?}");
    let mut events = keeper.until(theirs).await;
    stranger.lease_revoke(lock.lease.lease.0).await.unwrap();
    events.extend(keeper.until(theirs).await);
    events.extend(keeper.until(theirs).await);
    assert!(events.iter().all(|event| matches!(event, LeaseEvent::Failed { .. } | LeaseEvent::Proved { .. })), "{events:?}");
    let last = keeper.acknowledged.lock().unwrap().last().copied();
    keeper.until(theirs).await;
    assert_eq!(keeper.acknowledged.lock().unwrap().last().copied(), last, "no deadline comes of it");
}
