//! The primary, and sometimes a standby, is killed, frozen or cut off every few seconds while several clients write and commits wait for
//! standbys: nothing that was acknowledged is missing, and nothing that failed appears (I1, I5, I8, I13). `make chaos MINUTES=n SEED=s` does it for longer;
//! with an odd seed `quorum` is on the distribution's PostgreSQL and `sync` on 17, with an even one the other way round.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand_core::{RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use crate::rig::proxy::Network;
use crate::rig::wait::{holds_throughout, holds_within};
use crate::rig::world::{PATIENCE, Setup, World};

/// How long a storm lasts when nobody says it.
const SECONDS_DEFAULT: u64 = 12;
const SEED_DEFAULT: u64 = 1;
/// Writers of each node.
const CLIENTS: usize = 4;

/// What happens to a member.
#[derive(Debug, Clone, Copy)]
enum Blow {
    KillPostmaster,
    KillEverything,
    KillDaemon,
    FreezeDaemon,
    FreezePostgres,
    CutOff,
    CutReplication,
    StopInGoodOrder,
}

const BLOWS: [Blow; 8] = [
    Blow::KillPostmaster,
    Blow::KillEverything,
    Blow::KillDaemon,
    Blow::FreezeDaemon,
    Blow::FreezePostgres,
    Blow::CutOff,
    Blow::CutReplication,
    Blow::StopInGoodOrder,
];

fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Somebody has looked at it: a daemon that was killed three times within a minute would stay down (row 5).
fn start(world: &World, index: usize) {
    let mut command = world.cluster.node_command(index);
    command.arg("--clear-crashes");
    world.cluster.household().spawn(world.name(index), command, &world.cluster.node_log(index), false).unwrap();
}

/// Somebody has saved what a diverged directory had: one is kept at a time, and the next copy waits until it is gone.
fn look_after(world: &World) {
    for index in 0..world.nodes() {
        let kept = world.cluster.node_dir(index).join("data.pgherd/kept");
        if kept.exists() {
            std::fs::remove_dir_all(kept).unwrap();
        }
    }
}

/// Strikes one member, waits for a while, and puts it right.
fn strike(world: &World, blow: Blow, index: usize, lasts: Duration) {
    println!("{blow:?} on {} for {:.1} s", world.name(index), lasts.as_secs_f64());
    match blow {
        Blow::KillPostmaster => {
            if let Some(postmaster) = world.cluster.postmaster(index) {
                postmaster.signal(Signal::SIGKILL);
            }
            pause(lasts);
        }
        Blow::KillEverything => {
            world.cluster.cut_power(index);
            pause(lasts);
            start(world, index);
        }
        Blow::KillDaemon => {
            if let Some(daemon) = world.cluster.daemon(index) {
                daemon.signal(Signal::SIGKILL);
                assert!(holds_within(PATIENCE, || !daemon.is_alive()));
            }
            // Sometimes before its guard has fenced, sometimes after.
            pause(lasts / 2);
            start(world, index);
        }
        Blow::FreezeDaemon => frozen(world.cluster.daemon(index).into_iter().collect(), lasts),
        Blow::FreezePostgres => frozen(world.cluster.postgres_processes(index), lasts),
        Blow::CutOff => {
            world.set_whole_network(index, Network::Silent);
            pause(lasts);
            world.set_whole_network(index, Network::Pass);
        }
        Blow::CutReplication => {
            world.set_replication_network(index, Network::Cut);
            pause(lasts);
            world.set_replication_network(index, Network::Pass);
        }
        Blow::StopInGoodOrder => {
            if world.cluster.daemon(index).is_some() {
                world.stop_node(index);
            }
            pause(lasts / 4);
            start(world, index);
        }
    }
}

fn frozen(processes: Vec<pgherd::cli::demo::process::ProcessId>, lasts: Duration) {
    processes.iter().for_each(|process| process.signal(Signal::SIGSTOP));
    pause(lasts);
    processes.iter().for_each(|process| process.signal(Signal::SIGCONT));
}

/// The storm's own measure of time: nothing is waited for.
fn pause(span: Duration) {
    holds_throughout(span, || true);
}

/// `setup`, of the seed: which PostgreSQL it is, too.
fn storm(setup: fn(u64) -> Setup) {
    let (seconds, seed) = (number_from("PGHERD_CHAOS_SECONDS", SECONDS_DEFAULT), number_from("PGHERD_CHAOS_SEED", SEED_DEFAULT));
    let setup = Setup { proxied: true, clients: CLIENTS, ..setup(seed) };
    println!("a storm of {seconds} s from seed {seed}, on PostgreSQL {}", if setup.postgres_17 { "17" } else { "of the distribution" });
    let world = World::up(&setup);
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut below = |bound: u64| random.next_u64() % bound;
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut blows = 0;
    while Instant::now() < until {
        let leader = world.cluster.status().ok().and_then(|status| world.cluster.index_of(&status.leader?));
        let any = usize::try_from(below(world.nodes() as u64)).unwrap();
        let index = leader.filter(|_| below(4) != 0).unwrap_or(any);
        let blow = BLOWS[usize::try_from(below(BLOWS.len() as u64)).unwrap()];
        look_after(&world);
        strike(&world, blow, index, Duration::from_millis(300 + below(5_000)));
        blows += 1;
        // Sometimes the next falls on one that has not come back.
        pause(Duration::from_millis(below(6_000)));
    }
    look_after(&world);
    world.wait_whole("after the storm");
    world.wait_writes(world.leader());
    world.wait_synchronous("after the storm");
    println!("{blows} blows, {} acknowledged rows, timeline {}", world.prober().acks().len(), world.timeline());
    world.finish();
}

#[test]
fn a_storm_with_quorum_loses_nothing_that_was_acknowledged() {
    storm(|seed| Setup { postgres_17: seed % 2 == 0, document: |document| document.mode = "quorum".into(), ..Setup::default() });
}

#[test]
fn a_storm_with_sync_loses_nothing_that_was_acknowledged() {
    storm(|seed| Setup { postgres_17: seed % 2 == 1, document: |document| document.mode = "sync".into(), ..Setup::default() });
}
