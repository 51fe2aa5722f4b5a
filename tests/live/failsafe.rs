//! etcd goes away, for all or for the primary, while the members are well (SAFETY rows 15 and 36).

use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::wait::holds_throughout;
use crate::rig::world::{Setup, World};

/// So many ttls etcd is away: any lease is over long before.
const AWAY_TTLS: u32 = 4;
/// The longest time between two acknowledged rows that is no outage: the machine may be busy, PostgreSQL was not stopped.
const NO_GAP: Duration = Duration::from_secs(1);

fn setup() -> Setup {
    Setup { ttl_s: 5, proxied: true, ..Setup::default() }
}

fn ttl() -> Duration {
    Duration::from_secs(setup().ttl_s.into())
}

/// A whole cluster whose leader relies on the others: the key is there, and has been for a while.
fn up(setup: &Setup) -> (World, Before) {
    let world = World::up(setup);
    let leader = world.leader();
    world.settle("failsafe is in force", || world.get(leader, "/failsafe").is_some_and(|(code, _)| code == 200));
    let timeline = world.timeline();
    world.settle("the leader says its epoch", || epoch(&world, leader).is_some());
    world.wait_writes(leader);
    let epoch = epoch(&world, leader);
    (world, Before { leader, timeline, epoch, since: BootTime::now() })
}

/// How things were before the fault.
struct Before {
    leader: usize,
    timeline: u32,
    epoch: Option<u64>,
    since: BootTime,
}

fn epoch(world: &World, index: usize) -> Option<u64> {
    world.json(index, "/patroni")["pgherd"]["epoch"].as_u64()
}

/// For several ttls: the primary calls itself one all the while, says that it is in failsafe, and its writers see nothing of it.
#[track_caller]
fn goes_on(world: &World, before: &Before) {
    let leads = || world.http(before.leader, "/primary") == Some(200);
    assert!(holds_throughout(AWAY_TTLS * ttl(), leads), "{} does not go on", world.name(before.leader));
    assert_eq!(world.json(before.leader, "/patroni")["failsafe_mode_is_active"], true);
    assert_eq!(world.json(before.leader, "/health")["pgherd"]["degraded"], true, "and says that it is not as it should be");
    let metrics = world.get(before.leader, "/metrics").unwrap().1;
    assert!(metrics.lines().any(|line| line.starts_with("patroni_failsafe_mode_is_active{") && line.ends_with(" 1")), "{metrics}");
}

/// etcd is there again: nobody was elected, and no row that was sent to the primary failed or had to wait.
#[track_caller]
fn nothing_happened(world: &World, before: &Before) {
    world.wait_whole("after etcd was back");
    world.settle("the leader is proved by etcd", || world.json(before.leader, "/patroni")["failsafe_mode_is_active"].is_null());
    assert_eq!((world.leader(), world.timeline()), (before.leader, before.timeline), "no failover");
    world.wait_writes(before.leader);
    let prober = world.prober();
    let refused = prober.refused_since(world.name(before.leader), before.since);
    assert!(refused.is_empty(), "writes failed: {refused:?}");
    let gap = prober.longest_gap(before.since);
    println!("etcd was away for {} s; the longest time between two rows was {gap:?}", (AWAY_TTLS * ttl()).as_secs());
    assert!(gap < NO_GAP, "{gap:?} without a row");
}

#[test]
fn row_36_etcds_majority_is_lost_for_several_ttls_and_no_write_fails() {
    let (world, before) = up(&Setup { etcd_members: 3, ..setup() });
    for index in 0..2 {
        let name = world.cluster.plan.etcd[index].name.clone();
        world.cluster.household().named(&name).unwrap().signal(Signal::SIGKILL);
    }
    goes_on(&world, &before);
    for index in 0..2 {
        world.cluster.start_etcd_member(index).unwrap();
    }
    nothing_happened(&world, &before);
    assert_eq!(epoch(&world, before.leader), before.epoch, "the same lock");
    world.finish();
}

/// The others see etcd, and see the lock go; they have promised.
fn primary_alone_cut_from_etcd(network: Network) {
    let (world, before) = up(&setup());
    world.set_etcd_network(before.leader, network);
    goes_on(&world, &before);
    assert_eq!(world.status().leader, None, "its lease is over, and nobody took the lock");
    world.set_etcd_network(before.leader, Network::Pass);
    nothing_happened(&world, &before);
    assert!(epoch(&world, before.leader) > before.epoch, "taken anew");
    // And it can happen again.
    world.settle("the others are relied on again", || world.get(before.leader, "/failsafe").is_some_and(|(code, _)| code == 200));
    world.finish();
}

#[test]
fn row_15_a_primary_alone_cut_from_etcd_goes_on_and_takes_the_lock_anew_on_the_same_timeline() {
    primary_alone_cut_from_etcd(Network::Cut);
}

#[test]
fn row_15_a_primary_that_etcd_alone_is_silent_to_goes_on_and_takes_the_lock_anew_on_the_same_timeline() {
    primary_alone_cut_from_etcd(Network::Silent);
}

#[test]
fn row_15_a_primary_cut_from_etcd_and_from_one_member_is_stopped_by_f_and_another_leads_once_promises_are_over() {
    let (world, before) = up(&setup());
    let silent = world.others(before.leader)[1];
    world.set_api_network(silent, Network::Silent);
    world.set_etcd_network(before.leader, Network::Cut);
    let cut = BootTime::now();
    let leader = world.wait_another_leads(before.leader);
    let acks = world.prober().acks();
    let of = |index: usize| {
        let node = world.name(index);
        acks.iter().filter(move |ack| ack.node == node && ack.ended > cut)
    };
    let last = of(before.leader).map(|ack| ack.ended).max().unwrap_or(cut);
    let first = of(leader).map(|ack| ack.begun).min().unwrap();
    println!("the last row of the former primary {:?} after the cut, the first of the next {:?}", last.since(cut), first.since(cut));
    assert!(last < cut + ttl(), "F comes before the lease can be over");
    world.set_etcd_network(before.leader, Network::Pass);
    world.set_api_network(silent, Network::Pass);
    world.wait_whole("after the network healed");
    assert_eq!(world.leader(), leader, "healing changes no leader");
    world.finish();
}
