//! etcd takes no writes (SAFETY row 44). It raises its alarm when its database is full; here somebody raises it, which comes to the same:
//! that a database which is really full does, is seen in tests/etcd.

use etcd_client::{AlarmAction, AlarmType};
use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use crate::rig::said::signal_all;
use crate::rig::wait::{A_WHILE, holds_throughout};
use crate::rig::world::{Setup, World};

/// What follows takes longer than that: the lock is renewed.
const TTL_S: u32 = 3;

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

fn alarm(world: &World, action: AlarmAction) {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    in_own_thread(async move {
        etcd_client::Client::connect(endpoints, None).await?.alarm(action, AlarmType::Nospace, None).await?;
        Ok(())
    })
    .unwrap();
}

fn names(world: &World, index: usize) -> String {
    world.ask(index, "show synchronous_standby_names").unwrap().unwrap()
}

fn epoch(world: &World, index: usize) -> Option<u64> {
    world.json(index, "/patroni")["pgherd"]["epoch"].as_u64()
}

/// What etcd refuses is said over HTTP, where it can be.
#[track_caller]
fn says_that_there_is_no_space(world: &World, index: usize, kind: &str) {
    world.settle(&format!("`{kind}` is said"), || world.says(index, kind).is_some_and(|message| message.contains("space")));
}

#[test]
fn row_44_while_etcd_takes_no_writes_the_leader_goes_on_and_lets_no_commit_through_that_its_record_does_not_allow() {
    let world = World::up(&Setup { postgres_17: true, etcd_3_5: true, ttl_s: TTL_S, document: quorum, ..Setup::default() });
    let (leader, timeline) = (world.leader(), world.timeline());
    world.settle("the leader says its epoch", || epoch(&world, leader).is_some());
    let epoch_before = epoch(&world, leader);
    let standbys = world.others(leader);

    alarm(&world, AlarmAction::Activate);
    let first = world.postgres_of(&standbys[..1]);
    signal_all(&first, Signal::SIGSTOP);
    says_that_there_is_no_space(&world, leader, "sync_failed");
    says_that_there_is_no_space(&world, leader, "member_key_failed");
    world.wait_writes(leader);
    let second = world.postgres_of(&standbys[1..]);
    signal_all(&second, Signal::SIGSTOP);
    world.settle("commits wait", || {
        let begun = BootTime::now();
        holds_throughout(A_WHILE / 2, || !world.takes_writes(leader, begun))
    });
    let begun = BootTime::now();
    let goes_on = || world.http(leader, "/primary") == Some(200) && !world.takes_writes(leader, begun);
    assert!(holds_throughout(A_WHILE, || goes_on() && names(&world, leader).starts_with("ANY 1 (")), "or the names were weakened");

    alarm(&world, AlarmAction::Deactivate);
    world.settle("the record says that only the leader has everything, and then it acknowledges alone", || {
        world.roles() == ["leader", "replica", "replica"] && world.takes_writes(leader, begun)
    });
    assert!(world.says(leader, "sync_failed").is_none());
    signal_all(&[first, second].concat(), Signal::SIGCONT);
    world.settle("commits wait for both again", || world.roles() == ["leader", "quorum_standby", "quorum_standby"]);
    assert_eq!((world.leader(), world.timeline(), epoch(&world, leader)), (leader, timeline, epoch_before), "one leadership all the while");

    alarm(&world, AlarmAction::Activate);
    world.cluster.cut_power(leader);
    standbys.iter().for_each(|index| says_that_there_is_no_space(&world, *index, "member_key_failed"));
    world.settle("the lock is gone", || world.status().leader.is_none());
    let nobody_leads = || standbys.iter().all(|index| world.http(*index, "/primary") != Some(200));
    assert!(holds_throughout(A_WHILE / 2, nobody_leads));
    alarm(&world, AlarmAction::Deactivate);
    world.wait_another_leads(leader);
    world.cluster.start_node(leader).unwrap();
    world.wait_whole("once etcd takes writes again");
    world.finish();
}
