//! The wall clock has no part in any decision (SAFETY row 23).

use std::time::Duration;

use pgherd::clock::BootTime;

use crate::rig::wait::holds_throughout;
use crate::rig::wall_clock::WallClock;
use crate::rig::world::{Setup, World};

const HOUR_S: i64 = 3600;

#[test]
fn row_23_a_wall_clock_that_steps_by_an_hour_costs_no_failover_and_no_write() {
    let mut world = World::lay_out(&Setup::default());
    world.start_etcd_and_apply();
    let clocks: Vec<WallClock> = (0..world.nodes()).map(|index| WallClock::new(&world.cluster.node_dir(index))).collect();
    for (index, clock) in clocks.iter().enumerate() {
        std::fs::set_permissions(world.cluster.node_dir(index), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = world.cluster.node_command(index);
        clock.rule(&mut command);
        world.cluster.household().spawn(world.name(index), command, &world.cluster.node_log(index), false).unwrap();
    }
    world.wait_whole("after the bootstrap");
    world.start_prober();
    let (leader, timeline) = (world.leader(), world.timeline());
    world.wait_writes(leader);
    let begun = BootTime::now();
    for step in [HOUR_S, -HOUR_S] {
        clocks[leader].step_to(step);
        clocks[world.others(leader)[0]].step_to(-step);
        let leads = || world.http(leader, "/primary") == Some(200);
        assert!(holds_throughout(Duration::from_secs(5), leads), "a step of {step} s changes nothing");
    }
    let refused = world.prober().refused_since(world.name(leader), begun);
    assert!(refused.is_empty(), "{} writes failed, the first: {:?}", refused.len(), refused.first());
    assert_eq!((world.leader(), world.timeline()), (leader, timeline));
    world.cluster.cut_power(leader);
    world.wait_another_leads(leader);
    world.finish();
}
