//! What people do: switchover, promote by hand, delete etcd's keys, change the spec (SAFETY rows 37, 66, 69, 72).

use std::time::Duration;

use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use crate::rig::wait::holds_throughout;
use crate::rig::world::{MustSucceed, Setup, World};

#[test]
fn a_switchover_makes_the_named_member_leader_and_the_former_one_follows() {
    let world = World::up(&Setup::default());
    let (former, timeline) = (world.leader(), world.timeline());
    let target = world.replica();
    let begun = BootTime::now();
    let said = world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap();
    said.must_succeed("pgherd switchover");
    println!("{}", said.out.trim_end());
    assert_eq!((world.leader(), world.timeline()), (target, timeline + 1));
    world.wait_writes(target);
    println!("outage {:.3} s", world.prober().longest_gap(begun).as_secs_f64());
    world.wait_whole("after the switchover");
    assert!(!world.cluster.data_dir(former).join("backup_label.old").exists(), "the former primary follows; it is not cloned anew");
    world.finish();
}

#[test]
fn a_switchover_there_and_back_keeps_every_row() {
    let world = World::up(&Setup::default());
    let first = world.leader();
    let second = world.replica();
    for target in [second, first] {
        world.cluster.pgherd(&["switchover", "--to", world.name(target), "--yes"]).unwrap().must_succeed("pgherd switchover");
        world.wait_whole("after a switchover");
        world.wait_writes(target);
    }
    world.finish();
}

#[test]
fn a_switchover_to_a_member_that_is_down_or_unknown_is_refused_before_anything_is_touched() {
    let world = World::up(&Setup::default());
    let (leader, timeline, replica) = (world.leader(), world.timeline(), world.replica());
    world.cluster.cut_power(replica);
    world.settle("the status shows it", || {
        world.status().member(world.name(replica)).is_none_or(|m| m.state.as_deref() != Some("streaming"))
    });
    for to in [world.name(replica), "nobody", world.name(leader)] {
        let said = world.cluster.pgherd(&["switchover", "--to", to, "--yes"]).unwrap();
        assert!([Some(2), Some(4)].contains(&said.code), "--to {to}: {said:?}");
        assert!(!said.err.trim().is_empty(), "the reason is told");
    }
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.finish();
}

#[test]
fn row_66_a_standby_promoted_by_hand_is_fenced_and_never_gains_the_lock() {
    let world = World::up(&Setup::default());
    let (leader, timeline, replica) = (world.leader(), world.timeline(), world.replica());
    let connection = world.cluster.connection(world.cluster.plan.nodes[replica].declared.port).unwrap();
    let begun = BootTime::now();
    in_own_thread(async move {
        let (client, io) = connection.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(io);
        // Does not wait: the fence may come first.
        Ok(client.batch_execute("SELECT pg_promote(false)").await?)
    })
    .unwrap();
    world.settle("the promoted standby has been fenced and streams again", || world.cluster.is_whole());
    let lasted = world
        .prober()
        .acks()
        .iter()
        .filter(|ack| ack.node == world.name(replica) && ack.begun > begun)
        .map(|ack| ack.ended.since(begun))
        .max()
        .unwrap_or_default();
    println!("the promoted standby acknowledged for {:.3} s", lasted.as_secs_f64());
    // One probe of at most 1 s, and the fence; the rest is the machine.
    assert!(lasted < Duration::from_secs(4), "it acknowledged for {lasted:?}");
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    assert!(!world.prober().claims().iter().any(|claim| claim.node == world.name(replica) && claim.is_primary), "it never said primary");
    world.wait_writes(leader);
    world.finish_after_a_promote_by_hand();
}

/// Deletes keys of the cluster past pgherd.
fn delete_keys(world: &World, prefix: &'static str) {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    in_own_thread(async move {
        let mut client = etcd_client::Client::connect(endpoints, None).await?;
        client.delete(prefix, Some(etcd_client::DeleteOptions::new().with_prefix())).await?;
        Ok(())
    })
    .unwrap();
}

#[test]
fn row_37_a_leader_key_deleted_by_hand_ends_the_leadership_at_once_and_an_election_follows() {
    // Its deadline is far away, and so is the next renewal, whose proof would fail: what ends the leadership is the watch.
    let world = World::up(&Setup { ttl_s: 30, ..Setup::default() });
    let (former, timeline) = (world.leader(), world.timeline());
    let postmaster = world.postmaster(former);
    delete_keys(&world, "/pgherd/live/leader");
    world.settle("a later timeline", || world.status().timeline.is_some_and(|now| now > timeline));
    world.wait_whole("after the election");
    assert_eq!(world.timeline(), timeline + 1, "one election");
    assert!(!postmaster.is_alive(), "the primary of before was ended");
    assert_eq!(world.entered(former, "demoting"), ["the lock or the server is gone: the lock's key was deleted or replaced"]);
    assert_eq!(world.why_elected(), "the lock expired or was deleted", "not after a release in good order");
    world.wait_writes(world.leader());
    world.finish();
}

#[test]
fn row_72_deleting_all_keys_stops_writes_runs_no_initdb_and_an_apply_brings_the_cluster_back() {
    let world = World::up(&Setup::default());
    let identity = |index| std::fs::read(world.cluster.data_dir(index).join("global/pg_control")).unwrap()[..8].to_vec();
    let before: Vec<_> = (0..world.nodes()).map(identity).collect();
    delete_keys(&world, "/pgherd/live/");
    let nobody_leads = || (0..world.nodes()).all(|index| world.http(index, "/primary") != Some(200));
    world.settle("nobody says that it is primary", nobody_leads);
    assert!(holds_throughout(Duration::from_secs(5), nobody_leads), "nobody leads until a spec is applied");
    assert_eq!((0..world.nodes()).map(identity).collect::<Vec<_>>(), before, "no initdb");
    world.apply().must_succeed("pgherd apply");
    world.wait_whole("after the spec was applied again");
    world.wait_writes(world.leader());
    assert_eq!((0..world.nodes()).map(identity).collect::<Vec<_>>(), before, "no initdb");
    world.finish();
}

/// What a server says a parameter is.
fn setting(world: &World, index: usize, name: &'static str) -> Option<String> {
    let connection = world.cluster.connection(world.cluster.plan.nodes[index].declared.port).ok()?;
    in_own_thread(async move {
        let (client, io) = connection.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(io);
        Ok(client.query_one("SELECT current_setting($1)", &[&name]).await?.get(0))
    })
    .ok()
}

#[test]
fn a_changed_parameter_reaches_every_member_without_a_restart() {
    let mut world = World::up(&Setup::default());
    let before: Vec<_> = (0..world.nodes()).map(|index| world.postmaster(index)).collect();
    world.document.parameters.insert("work_mem".into(), "7MB".into());
    world.apply().must_succeed("pgherd apply");
    world.settle("every member has it", || (0..world.nodes()).all(|index| setting(&world, index, "work_mem").as_deref() == Some("7MB")));
    assert_eq!((0..world.nodes()).map(|index| world.postmaster(index)).collect::<Vec<_>>(), before, "no restart");
    assert_eq!(world.status().generation, Some(2));
    world.finish();
}

#[test]
fn a_member_that_may_not_lead_does_not() {
    let no_failover = |document: &mut pgherd::cli::demo::documents::ClusterDocument| {
        document.members[1].tags.insert("nofailover".into(), "true".into());
    };
    let world = World::up(&Setup { document: no_failover, ..Setup::default() });
    let former = world.leader();
    assert_ne!(former, 1);
    world.cluster.cut_power(former);
    let leader = world.wait_another_leads(former);
    assert_ne!(leader, 1, "n2 has nofailover");
    world.cluster.start_node(former).unwrap();
    world.wait_whole("after the former primary came back");
    world.finish();
}
