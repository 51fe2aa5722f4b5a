//! Postmasters of others: started past the guard, before it or beside it.

use std::path::Path;
use std::process::Command;

use pgherd::facts::guard::{PostmasterFacts, Rung, Word};
use pgherd::guard::protocol::{Refusal, Request};

use super::harness::{Busy, World, hasty_stop, identity, lock, start_order};
use super::refused_for;

fn foreign_postmaster(run_dir: &Path, data_dir: &Path) -> std::process::Child {
    let order = start_order(run_dir, data_dir, Word::Standby);
    let log = std::fs::File::create(run_dir.join("postgres.log")).unwrap();
    Command::new(&order.program).args(&order.arguments).envs(&order.environment).current_dir("/").stderr(log).spawn().unwrap()
}

#[test]
fn a_postmaster_of_somebody_else_is_seen_adopted_and_fenced_by_scan() {
    let mut child = None;
    let world = World::with(|run_dir, data_dir| child = Some(foreign_postmaster(run_dir, data_dir)));
    let mut child = child.unwrap();
    let pid = child.id().cast_signed();
    world.accepts(|| {});
    assert!(matches!(&world.look().postmaster, PostmasterFacts::Unclaimed { pids } if pids.contains(&pid)));
    refused_for(world.ask(&Request::Start(world.start_order(Word::Standby))), Refusal::NotEmpty);
    refused_for(world.ask(&Request::NoLock { epoch: identity().epoch }), Refusal::NotEmpty);
    refused_for(world.ask(&Request::Shutdown), Refusal::NotEmpty);
    refused_for(world.ask(&Request::Adopt { data_dir: world.data_dir.clone(), pid: 1, word: Word::Standby }), Refusal::NoSuchStart);
    let busy = Busy::start(&world);
    world.order(&lock(300));
    let adopted = world.order(&Request::Adopt { data_dir: world.data_dir.clone(), pid, word: Word::Writable });
    assert!(matches!(adopted.postmaster, PostmasterFacts::Running { adopted: true, .. }));
    busy.commits_go_on();
    world.order(&hasty_stop());
    let end = world.proved_empty();
    busy.nothing_was_acknowledged_after(end.at);
    child.wait().unwrap();
}

#[test]
fn a_writable_postmaster_without_a_lock_is_killed_as_soon_as_it_is_adopted() {
    let mut child = None;
    let world = World::with(|run_dir, data_dir| child = Some(foreign_postmaster(run_dir, data_dir)));
    let mut child = child.unwrap();
    world.accepts(|| {});
    let busy = Busy::start(&world);
    let pid = child.id().cast_signed();
    world.order(&Request::Adopt { data_dir: world.data_dir.clone(), pid, word: Word::Writable });
    let end = world.proved_empty();
    assert_eq!(end.rung, Some(Rung::KillAll));
    busy.nothing_was_acknowledged_after(end.at);
    child.wait().unwrap();
}
