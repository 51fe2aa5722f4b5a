//! Fail-over between endpoints: of the handle, of the lease, of the watch.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use pgherd::etcd::{Etcd, EtcdError, Fenced};
use pgherd::facts::lease::LeaseEvent;

use crate::proxy::{Network, Proxy};
use crate::status;
use crate::support::etcd_server::{EtcdServer, settings};
use crate::support::{Keeper, lease_of_a_minute, take_lock};

against_both! { 3, &[];
    a_dead_endpoint_is_passed_over,
    an_endpoint_that_hangs_costs_a_part_of_the_budget_only,
    the_lease_goes_on_when_the_member_it_was_renewed_through_hangs,
    the_lease_outlives_the_leader_of_etcd,
    another_leader_of_etcd_is_another_term_of_the_same_lease,
    without_a_majority_nothing_is_written_and_everything_comes_back,
}

/// A port where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A server that takes connections and never says anything.
fn hanging(server: &EtcdServer) -> (Proxy, String) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let proxy = Proxy::start(any, (Ipv4Addr::LOCALHOST, server.port(0)).into());
    proxy.set(Network::Silent);
    let url = format!("http://{}", proxy.address());
    (proxy, url)
}

async fn a_dead_endpoint_is_passed_over(server: EtcdServer) {
    let mut endpoints = vec![nobody()];
    endpoints.extend(server.endpoints());
    let etcd = Etcd::new(settings(endpoints)).unwrap();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    assert_eq!(etcd.write_status(lock.epoch, &status(lock.epoch)).await.unwrap(), Fenced::Written);

    let alone = Etcd::new(settings(vec![nobody()])).unwrap();
    let refused = alone.write_status(lock.epoch, &status(lock.epoch)).await;
    assert!(matches!(refused, Err(EtcdError::Unreachable(_))), "a write that never left is not unknown: {refused:?}");
}

async fn an_endpoint_that_hangs_costs_a_part_of_the_budget_only(server: EtcdServer) {
    let (_proxy, url) = hanging(&server);
    let mut endpoints = vec![url.clone()];
    endpoints.extend(server.endpoints());
    let etcd = Etcd::new(settings(endpoints)).unwrap();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    for _ in 0..3 {
        assert_eq!(etcd.write_status(lock.epoch, &status(lock.epoch)).await.unwrap(), Fenced::Written);
    }
    let mut short = settings(vec![url]);
    short.request_timeout = Duration::from_millis(500);
    let unanswered = Etcd::new(short).unwrap().write_status(lock.epoch, &status(lock.epoch)).await;
    assert!(matches!(unanswered, Err(EtcdError::Unknown(_))), "it may have arrived: {unanswered:?}");
}

async fn the_lease_goes_on_when_the_member_it_was_renewed_through_hangs(server: EtcdServer) {
    let follower = (server.leader().await + 1) % 3;
    let mut endpoints = server.endpoints();
    endpoints.rotate_left(follower);
    let mut keeper = Keeper::start(settings(endpoints), 6);
    let lock = keeper.leading(&server.etcd(), "a").await;
    server.freeze(follower);
    for _ in 0..4 {
        keeper.proved(lock).await;
    }
    server.thaw(follower);
    keeper.proved(lock).await;
}

async fn the_lease_outlives_the_leader_of_etcd(server: EtcdServer) {
    let mut keeper = Keeper::start(server.settings(), 15);
    let lock = keeper.leading(&server.etcd(), "a").await;
    server.kill(server.leader().await);
    let events = keeper.until(|event| matches!(event, LeaseEvent::Proved { .. })).await;
    assert!(!events.iter().any(|event| matches!(event, LeaseEvent::Lost { .. })), "{events:?}");
    keeper.proved(lock).await;
}

/// With it the lease begins anew: whoever waits for its end has to know.
async fn another_leader_of_etcd_is_another_term_of_the_same_lease(server: EtcdServer) {
    let etcd = server.etcd();
    let lease = lease_of_a_minute(&server).await;
    let (ttl, before) = etcd.granted_ttl(lease).await.unwrap().unwrap();
    server.kill(server.leader().await);
    server.wait_ready().await;
    let (same, after) = etcd.granted_ttl(lease).await.unwrap().unwrap();
    assert_eq!(same, ttl);
    assert!(after > before, "{before} and then {after}");
}

async fn without_a_majority_nothing_is_written_and_everything_comes_back(server: EtcdServer) {
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), 15);
    let lock = keeper.leading(&etcd, "a").await;
    server.freeze(0);
    server.freeze(1);
    keeper.until(|event| matches!(event, LeaseEvent::Failed { .. })).await;
    let unanswered = etcd.write_status(lock.epoch, &status(lock.epoch)).await;
    assert!(matches!(unanswered, Err(EtcdError::Unknown(_) | EtcdError::Unreachable(_))), "{unanswered:?}");
    server.thaw(0);
    server.thaw(1);
    let events = keeper.until(|event| matches!(event, LeaseEvent::Proved { .. })).await;
    assert!(!events.iter().any(|event| matches!(event, LeaseEvent::Lost { .. })), "{events:?}");
    assert_eq!(etcd.read_view().await.unwrap().leader.unwrap().epoch, lock.epoch);
}
