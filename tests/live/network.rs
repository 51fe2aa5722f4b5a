//! Members are cut from etcd or from each other, and etcd itself goes away (SAFETY rows 14-19, 35, 36).

use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use crate::rig::proxy::Network;
use crate::rig::wait::holds_throughout;
use crate::rig::world::{PATIENCE, Setup, World, without_failsafe};

/// What the health path of a member says of etcd: that it goes on without.
fn degraded(world: &World, index: usize) -> Option<bool> {
    world.json(index, "/health")["pgherd"]["degraded"].as_bool()
}

/// The primary hears nothing of etcd; it is fenced before another leads, and comes back as a replica.
#[test]
fn row_15_row_18_without_failsafe_a_primary_that_does_not_hear_etcd_in_any_way_is_fenced_before_another_leads() {
    let world = World::up(&Setup { document: without_failsafe, ..Setup::default() });
    for network in [Network::Cut, Network::Silent, Network::AnswersLost] {
        let former = world.leader();
        world.set_etcd_network(former, network);
        let leader = world.wait_another_leads(former);
        assert_ne!(world.http(former, "/primary"), Some(200), "{network:?}");
        world.settle(&format!("it says that it is degraded: {network:?}"), || degraded(&world, former) == Some(true));
        world.set_etcd_network(former, Network::Pass);
        world.wait_whole("after the network healed");
        assert_eq!(world.leader(), leader, "healing changes no leader: {network:?}");
    }
    world.finish();
}

#[test]
fn row_14_a_primary_cut_from_everything_is_fenced_and_comes_back_as_a_replica() {
    let world = World::up(&Setup { proxied: true, ..Setup::default() });
    let former = world.leader();
    world.set_whole_network(former, Network::Silent);
    let leader = world.wait_another_leads(former);
    world.set_whole_network(former, Network::Pass);
    world.wait_whole("after the network healed");
    assert_eq!(world.leader(), leader, "healing changes no leader");
    world.finish();
}

/// Between the two is a tenth of the ladder's length: the ttl is longer here, so that the prober looks and writes several times in it.
#[test]
fn row_19_primary_turns_to_503_while_a_fenced_primary_still_answers_and_then_clients_are_cut_off() {
    let world = World::up(&Setup { ttl_s: 10, document: without_failsafe, ..Setup::default() });
    let former = world.leader();
    let (tell, told) = channel();
    let connection = world.cluster.connection(world.cluster.plan.nodes[former].declared.port).unwrap();
    std::thread::spawn(move || {
        in_own_thread(async move {
            let (_client, io) = connection.connect(tokio_postgres::NoTls).await?;
            tell.send("connected")?;
            let _ = io.await;
            Ok(tell.send("cut off")?)
        })
    });
    assert_eq!(told.recv_timeout(PATIENCE), Ok("connected"));
    let cut = BootTime::now();
    world.set_etcd_network(former, Network::Silent);
    world.wait_another_leads(former);
    assert_eq!(told.recv_timeout(PATIENCE), Ok("cut off"));
    let (name, prober) = (world.name(former), world.prober());
    let acks = prober.acks();
    let last = acks.iter().filter(|ack| ack.node == name).max_by_key(|ack| ack.ended).unwrap();
    let claims: Vec<_> = prober.claims().into_iter().filter(|claim| claim.node == name && claim.begun > cut).collect();
    let before = claims.iter().any(|claim| !claim.is_primary && claim.ended < last.begun);
    assert!(before, "503 was not seen before the last row, {last:?}: {claims:?}");
    let late = claims.iter().find(|claim| claim.is_primary && claim.begun > last.ended);
    assert!(late.is_none(), "200 after the last row, {last:?}: {late:?}");
    world.set_etcd_network(former, Network::Pass);
    world.wait_whole("after the network healed");
    world.finish();
}

#[test]
fn a_slow_network_to_etcd_costs_no_failover() {
    let setup = Setup { ttl_s: 5, ..Setup::default() };
    let world = World::up(&setup);
    let (leader, timeline) = (world.leader(), world.timeline());
    // ttl/40 is the promise for the round trip.
    let round_trip = Duration::from_secs(setup.ttl_s.into()) / 40;
    (0..world.nodes()).for_each(|index| world.set_etcd_network(index, Network::Slow(round_trip / 2)));
    assert!(holds_throughout(Duration::from_secs(8), || world.http(leader, "/primary") == Some(200)), "the leader goes on");
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn row_17_a_replica_cut_from_etcd_keeps_following_says_that_it_is_degraded_and_never_leads() {
    let world = World::up(&Setup::default());
    let (leader, timeline, replica) = (world.leader(), world.timeline(), world.replica());
    assert_eq!(degraded(&world, replica), Some(false));
    world.set_etcd_network(replica, Network::Silent);
    let postmaster = world.postmaster(replica);
    let holds = holds_throughout(Duration::from_secs(8), || world.http(replica, "/primary") != Some(200));
    assert!(holds, "a member that cannot ask etcd does not lead");
    world.settle("it says that it is degraded", || degraded(&world, replica) == Some(true));
    assert_eq!(world.cluster.postmaster(replica), Some(postmaster), "its PostgreSQL goes on");
    assert_eq!(world.json(replica, "/patroni")["replication_state"], "streaming", "behind the leader that it knew last");
    assert_eq!(world.http(replica, "/replica"), Some(200), "and serves what it serves");
    world.set_etcd_network(replica, Network::Pass);
    world.wait_whole("after the network healed");
    world.settle("it is not degraded any more", || degraded(&world, replica) == Some(false));
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn row_36_without_failsafe_a_stop_of_etcd_makes_all_read_only_and_its_return_brings_a_leader_by_itself() {
    let world = World::up(&Setup { document: without_failsafe, ..Setup::default() });
    let etcd = world.cluster.household().named("e1").unwrap();
    etcd.signal(Signal::SIGKILL);
    let nobody_leads = || (0..world.nodes()).all(|index| world.http(index, "/primary") != Some(200));
    world.settle("nobody says that it is primary", nobody_leads);
    assert!(holds_throughout(Duration::from_secs(3), nobody_leads), "without etcd nobody leads");
    world.cluster.start_etcd_member(0).unwrap();
    world.wait_whole("after etcd came back");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn the_loss_of_one_etcd_member_after_the_other_costs_nothing_but_time() {
    let world = World::up(&Setup { etcd_members: 3, etcd_3_5: true, ..Setup::default() });
    let (leader, timeline) = (world.leader(), world.timeline());
    for index in 0..3 {
        let name = world.cluster.plan.etcd[index].name.clone();
        let member = world.cluster.household().named(&name).unwrap();
        member.signal(Signal::SIGKILL);
        world.settle("the member of etcd is gone", || !member.is_alive());
        world.wait_writes(leader);
        world.cluster.start_etcd().unwrap();
    }
    world.wait_whole("after all members of etcd had been away");
    // A loss of etcd's own leader may cost renewals for an election; whether it did is the machine's to say, so no more is asked.
    assert!(world.timeline() >= timeline);
    world.finish();
}
