//! Failsafe at etcd's edge: the key that says who has to promise, and a lock that goes on by promises while etcd does not answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use pgherd::clock::BootTime;
use pgherd::etcd::lease::Acknowledged;
use pgherd::etcd::{Acquisition, Beaten};
use pgherd::facts::cluster::FailsafeRecord;
use pgherd::facts::failsafe::Armed;
use pgherd::facts::lease::{LeaseEvent, LeaseLoss};
use pgherd::policy::renewal::Round;
use pgherd::types::{Epoch, LockIdentity, Revision};

use crate::proxy::{Network, Proxy};
use crate::support::etcd_server::{EtcdServer, settings};
use crate::support::{Keeper, lease_is_gone, lease_of_a_minute, name, record, request, take_lock};

against_both! { 1, &[];
    i4_the_key_is_written_under_the_epoch_and_over_what_was_judged_on,
    i1_the_lock_is_not_taken_when_who_may_take_it_has_changed,
    a_lock_goes_on_by_promises_while_etcd_is_cut_off,
    a_lock_goes_on_by_promises_while_etcd_is_silent,
    one_member_that_does_not_promise_is_enough,
    an_order_to_rely_on_nobody_is_answered_and_ends_the_calls,
    an_etcd_that_was_rebuilt_is_no_reason_to_call,
}

const TTL_S: u64 = 3;

fn naming(members: &[&str]) -> FailsafeRecord {
    FailsafeRecord { ttl_s: 10, members: members.iter().map(|member| (name(member), format!("http://{member}:8008"))).collect() }
}

async fn i4_the_key_is_written_under_the_epoch_and_over_what_was_judged_on(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let absent = Revision(0);
    assert_eq!(etcd.write_failsafe(Epoch(lock.epoch.0 + 1), absent, Some(&naming(&["a"]))).await.unwrap(), None, "not our epoch");
    let first = etcd.write_failsafe(lock.epoch, absent, Some(&naming(&["a"]))).await.unwrap().unwrap();
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.failsafe, view.failsafe_revision), (Some(naming(&["a"])), first));

    assert_eq!(etcd.write_failsafe(lock.epoch, absent, Some(&naming(&["b"]))).await.unwrap(), None, "as a write that comes late");
    let second = etcd.write_failsafe(lock.epoch, first, Some(&naming(&["a"]))).await.unwrap().unwrap();
    assert!(second > first, "the same once more: what was judged on the first is dead from now on");
    assert_eq!(etcd.write_failsafe(lock.epoch, first, None).await.unwrap(), None);
    assert!(etcd.write_failsafe(lock.epoch, second, None).await.unwrap().is_some());
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.failsafe, view.failsafe_revision), (None, absent));
}

async fn i1_the_lock_is_not_taken_when_who_may_take_it_has_changed(server: EtcdServer) {
    let etcd = server.etcd();
    let (ours, theirs) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    let former = take_lock(&etcd, "a", ours).await;
    etcd.put_member(&name("b"), &record(1), theirs).await.unwrap();
    let judged_before = request(&etcd, "b", theirs).await;
    etcd.write_failsafe(former.epoch, Revision(0), Some(&naming(&["a"]))).await.unwrap();
    etcd.release(former.epoch, None, None).await.unwrap();
    assert_eq!(etcd.acquire(&judged_before).await.unwrap(), Acquisition::Beaten(Beaten::FailsafeMoved));
    let judged_now = request(&etcd, "b", theirs).await;
    assert!(matches!(etcd.acquire(&judged_now).await.unwrap(), Acquisition::Acquired(_)));
}

/// A leader behind a network that can break, with peers that say what they are told to; and the calls, with the time of each.
struct Leader {
    keeper: Keeper,
    proxy: Proxy,
    lock: LockIdentity,
    calls: Arc<Mutex<Vec<(BootTime, Round)>>>,
}

impl Leader {
    async fn start(server: &EtcdServer, ttl_s: u64, peers: impl Fn(usize) -> Result<(), String> + Send + Sync + 'static) -> Leader {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let proxy = Proxy::start(any, (Ipv4Addr::LOCALHOST, server.port(0)).into());
        let calls: Arc<Mutex<Vec<(BootTime, Round)>>> = Arc::default();
        let noted = Arc::clone(&calls);
        let peers = move |round: Round| {
            let mut noted = noted.lock().unwrap();
            noted.push((BootTime::now(), round));
            peers(noted.len())
        };
        let through = settings(vec![format!("http://{}", proxy.address())]);
        let mut keeper = Keeper::start_among(through, ttl_s, |_| Acknowledged::Yes, peers);
        let lock = keeper.leading(&server.etcd(), "a").await;
        keeper.handle.arm(Some(Armed { lock, peers: naming(&["b", "c"]).members }));
        Leader { keeper, proxy, lock, calls }
    }

    fn calls(&self) -> Vec<(BootTime, Round)> {
        self.calls.lock().unwrap().clone()
    }
}

/// For several ttls, so that the lease is long gone; each deadline counts from before its calls, and the guard has it.
async fn goes_on(server: EtcdServer, network: Network) {
    let mut leader = Leader::start(&server, TTL_S, |_| Ok(())).await;
    leader.proxy.set(network);
    let broken = BootTime::now();
    let (mut last, mut rounds) = (None, 0);
    while last.is_none_or(|until: BootTime| until.since(broken) < 4 * leader.keeper.times.ttl) {
        let (heard, event) = leader.keeper.next().await;
        match event {
            LeaseEvent::Sustained { lock, sent, until } => {
                assert_eq!((lock, until), (leader.lock, sent + leader.keeper.times.validity()));
                assert!(last.is_none_or(|before: BootTime| heard < before && before < until), "without a gap");
                let (called, round) = leader.calls()[rounds].clone();
                assert!(sent <= called, "I2: from before the call");
                assert_eq!((round.armed.peers.len(), round.ttl), (2, leader.keeper.times.ttl));
                assert!(leader.keeper.acknowledged.lock().unwrap().contains(&(lock, sent)));
                (last, rounds) = (Some(until), rounds + 1);
            }
            LeaseEvent::Failed { .. } | LeaseEvent::Proved { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    lease_is_gone(&server, leader.lock.lease.lease).await;
    leader.proxy.set(Network::Pass);
    leader.keeper.until(|event| *event == LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound }).await;
    let calls = leader.calls().len();
    leader.keeper.granted().await;
    leader.keeper.until(|event| matches!(event, LeaseEvent::Renewed { .. })).await;
    assert_eq!(leader.calls().len(), calls, "a lease without a lock goes on by nobody's promise");
}

async fn a_lock_goes_on_by_promises_while_etcd_is_cut_off(server: EtcdServer) {
    goes_on(server, Network::Cut).await;
}

async fn a_lock_goes_on_by_promises_while_etcd_is_silent(server: EtcdServer) {
    goes_on(server, Network::Silent).await;
}

async fn one_member_that_does_not_promise_is_enough(server: EtcdServer) {
    let refuses_from_the_third_on = |call| if call < 3 { Ok(()) } else { Err("`c` does not promise".to_owned()) };
    let mut leader = Leader::start(&server, TTL_S, refuses_from_the_third_on).await;
    leader.proxy.set(Network::Cut);
    let refused = |event: &LeaseEvent| matches!(event, LeaseEvent::Failed { why } if why.contains("`c` does not promise"));
    let events = leader.keeper.until(refused).await;
    let sustained: Vec<_> =
        events.iter().filter_map(|event| if let LeaseEvent::Sustained { sent, .. } = event { Some(*sent) } else { None }).collect();
    assert_eq!(sustained.len(), 2, "{events:?}");
    let last = sustained[1];
    let known = leader.keeper.acknowledged.lock().unwrap().last().copied();
    assert_eq!(known, Some((leader.lock, last)), "no deadline comes of a refusal");
    // It asks on until the fast stop is due, and not longer.
    let fast_stop_at = leader.keeper.times.deadlines(last).fast_stop_at;
    while leader.keeper.next().await.0 < fast_stop_at + leader.keeper.times.ttl {}
    assert!(leader.calls().iter().all(|(called, _)| *called < fast_stop_at + leader.keeper.times.renewal_budget()));
    assert_eq!(leader.keeper.acknowledged.lock().unwrap().last().copied(), known);
}

async fn an_order_to_rely_on_nobody_is_answered_and_ends_the_calls(server: EtcdServer) {
    let mut leader = Leader::start(&server, TTL_S, |_| Ok(())).await;
    let told = BootTime::now();
    leader.keeper.handle.arm(None);
    leader.keeper.until(|event| matches!(event, LeaseEvent::Disarmed { at } if *at >= told)).await;
    leader.proxy.set(Network::Cut);
    for _ in 0..3 {
        leader.keeper.until(|event| matches!(event, LeaseEvent::Failed { .. })).await;
    }
    assert_eq!(leader.calls(), []);
}

async fn an_etcd_that_was_rebuilt_is_no_reason_to_call(mut server: EtcdServer) {
    let mut leader = Leader::start(&server, 6, |_| Ok(())).await;
    server.rebuild().await;
    let theirs = |event: &LeaseEvent| matches!(event, LeaseEvent::Failed { why } if why.contains("belongs to etcd cluster"));
    leader.keeper.until(theirs).await;
    let (calls, known) = (leader.calls().len(), leader.keeper.acknowledged.lock().unwrap().len());
    // A call for the first of these would be known by the second.
    leader.keeper.until(theirs).await;
    leader.keeper.until(theirs).await;
    assert_eq!((leader.calls().len(), leader.keeper.acknowledged.lock().unwrap().len()), (calls, known));
}
