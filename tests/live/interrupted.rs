//! The next leader dies between taking the lock and being one (SAFETY row 52): whoever comes after it goes on.

use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use etcd_client::{Event, EventType};
use nix::sys::signal::Signal;
use pgherd::cli::demo::documents::ClusterDocument;
use pgherd::cli::demo::process::ProcessId;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::types::TimelineId;

use crate::rig::said::signal_all;
use crate::rig::world::{PATIENCE, Setup, World};

fn quorum(document: &mut ClusterDocument) {
    document.mode = "quorum".into();
}

/// A won lock: by whom, and the timeline that was reserved with it.
type Won = (String, TimelineId);

/// Who takes the lock next, told at once.
fn next_won(world: &World) -> Receiver<Won> {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    let (tell, told) = channel();
    let (watches, is_watched) = channel();
    std::thread::spawn(move || {
        in_own_thread(async move {
            let below = etcd_client::WatchOptions::new().with_prefix();
            let mut watch = etcd_client::Client::connect(endpoints, None).await?.watch("/pgherd/live/", Some(below)).await?;
            watches.send(())?;
            while let Some(response) = watch.message().await? {
                // Both keys are written in one transaction.
                let puts: Vec<_> =
                    response.events().iter().filter(|event| event.event_type() == EventType::Put).filter_map(Event::kv).collect();
                let value = |key: &str| puts.iter().find(|kv| kv.key() == format!("/pgherd/live/{key}").as_bytes()).map(|kv| kv.value());
                if let (Some(holder), Some(history)) = (value("leader"), value("history")) {
                    let history: serde_json::Value = serde_json::from_slice(history)?;
                    let reserved = history.as_array().and_then(|entries| entries.last()?["timeline"].as_u64()).unwrap();
                    tell.send((String::from_utf8(holder.to_owned())?, TimelineId(u32::try_from(reserved)?)))?;
                    break;
                }
            }
            Ok(())
        })
    });
    is_watched.recv_timeout(PATIENCE).unwrap();
    told
}

/// Two are enough on a machine that is not too busy to kill in time.
const ROUNDS_MAX: usize = 4;

/// When the next leader dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It has taken the lock.
    Taken,
    /// PostgreSQL begins the new timeline; etcd's history does not say so yet.
    Promoted,
}

/// Daemon, guard and PostgreSQL of a node, looked up before it matters.
fn all_processes(world: &World, index: usize) -> Vec<ProcessId> {
    [world.daemon(index), world.guard(index)].into_iter().chain(world.postgres_of(&[index])).collect()
}

#[test]
fn row_52_in_quorum_on_17_a_next_leader_that_dies_before_or_while_it_promotes_is_followed_by_another_with_every_row() {
    let world = World::up(&Setup { postgres_17: true, document: quorum, ..Setup::default() });
    let mut missed = vec![Moment::Promoted, Moment::Taken];
    for _ in 0..ROUNDS_MAX {
        let Some(moment) = missed.last().copied() else { break };
        let died = next_leader_dies(&world, moment);
        missed.retain(|moment| *moment != died);
    }
    assert!(missed.is_empty(), "in {ROUNDS_MAX} rounds none died when it had: {missed:?}");
    world.finish();
}

/// The leader hands over, and who takes the lock dies, at about that moment; tells at which it did.
fn next_leader_dies(world: &World, moment: Moment) -> Moment {
    let former = world.leader();
    let processes: Vec<_> = (0..world.nodes()).map(|index| all_processes(world, index)).collect();
    let won = next_won(world);
    let daemon = world.daemon(former);
    daemon.signal(Signal::SIGTERM);
    let (name, reserved) = won.recv_timeout(PATIENCE).unwrap();
    let fallen = world.cluster.index_of(&name).unwrap();
    let begun = world.cluster.data_dir(fallen).join("pg_wal").join(reserved.history_file_name());
    // The next look of a test that waits would come too late.
    let deadline = Instant::now() + PATIENCE;
    while moment == Moment::Promoted && !begun.exists() && Instant::now() < deadline {
        std::hint::spin_loop();
    }
    signal_all(&processes[fallen], Signal::SIGKILL);
    world.cluster.cut_power(fallen);
    let died = if begun.exists() { Moment::Promoted } else { Moment::Taken };
    println!("{died:?}: {name} has died; etcd's history says that timeline {reserved} was promoted: {}", is_recorded(world, reserved));

    world.settle("the former leader has stopped", || !daemon.is_alive() && world.cluster.guard(former).is_none());
    world.cluster.start_node(former).unwrap();
    world.wait_another_leads(fallen);
    world.cluster.start_node(fallen).unwrap();
    world.wait_whole("after it came back");
    world.wait_synchronous("after it came back");
    assert!(world.timeline() > reserved.0, "a timeline's number is used once");
    died
}

/// Whether etcd's history says under which leadership this timeline was promoted.
fn is_recorded(world: &World, timeline: TimelineId) -> bool {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    let history = in_own_thread(async move {
        let found = etcd_client::Client::connect(endpoints, None).await?.get("/pgherd/live/history", None).await?;
        Ok(serde_json::from_slice::<serde_json::Value>(found.kvs()[0].value())?)
    });
    let entries = history.unwrap();
    entries.as_array().unwrap().iter().any(|entry| entry["timeline"] == timeline.0 && !entry["epoch"].is_null())
}
