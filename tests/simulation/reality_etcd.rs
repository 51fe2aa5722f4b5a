//! The etcd model is held against real servers (SAFETY 4, L3): the same scripts run through the daemon's own edge and through the model,
//! and each answer and each view must be the same. Where they differ, the model is wrong, or the edge is.
//!
//! Each script has keys of its own, and its server to itself. So revisions and epochs, counted from where the script began, must be equal
//! to the number, not only in their order; lease ids are renamed to the order in which they were granted.
//!
//! What would surprise: a script during which a lease may have run out because the machine stood still says nothing, and is played again.

mod generated;
mod modelled;
mod names;
mod real;
mod script;
mod scripts;

// Shared with the live tests of etcd, which use all of it.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use pgherd::facts::cluster::ClusterView;

use self::modelled::Modelled;
use self::real::Real;
use self::script::{Said, Script, Step};
use self::support::etcd_server::{EtcdServer, Version, run};

/// How far apart the lives of one lease may be, here and there: etcd looks every 500 ms and then asks raft, on a machine that does more
/// than this. That no life is shorter than the ttl has no such slack.
const LIVES_APART_MAX: Duration = Duration::from_millis(1_500);
/// Plays of one script on a machine that stands still again and again.
const PLAYS_MAX: usize = 4;

/// Scripts that are played one after the other against one etcd cluster.
pub struct Group {
    promise: &'static str,
    /// Of the real cluster.
    members: u16,
    scripts: fn() -> Vec<Script>,
    /// What real servers must have answered at least once, or the scripts test less than they say.
    met: &'static [&'static str],
}

pub fn trials() -> Vec<Trial> {
    let versions = [(Version::Distribution, "etcd_of_the_distribution"), (Version::V3_5, "etcd_3_5")];
    let of = |(version, name)| {
        let trial = move |group: &'static Group| Trial::test(format!("{name}::{}", group.promise), move || play(group, version));
        scripts::GROUPS.iter().map(trial)
    };
    versions.into_iter().flat_map(of).collect()
}

fn play(group: &'static Group, version: Version) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut differed = Ok(());
    runtime.block_on(run(version, group.members, &[], async |server| differed = play_all(&server, group).await));
    Ok(differed?)
}

async fn play_all(server: &EtcdServer, group: &Group) -> Result<(), String> {
    let mut met = BTreeSet::new();
    for (number, script) in (group.scripts)().iter().enumerate() {
        met.extend(play_script(server, &format!("s{number}"), script).await.map_err(|why| format!("`{}`, {why}", script.name))?);
    }
    let missed: Vec<_> = group.met.iter().filter(|&&what| !met.contains(what)).collect();
    if missed.is_empty() { Ok(()) } else { Err(format!("no script met {missed:?}, only {met:?}")) }
}

async fn play_script(server: &EtcdServer, cluster: &str, script: &Script) -> Result<BTreeSet<String>, String> {
    for play in 0..PLAYS_MAX {
        let mut real = Real::new(server, &format!("{cluster}-{play}")).await;
        let differed = compare(&mut real, script).await;
        let stood_still = real.lost_the_race;
        real.end().await;
        match differed {
            _ if stood_still => eprintln!("`{}`: this machine stood still; once more", script.name),
            differed => return differed.map(|()| real.met),
        }
    }
    Err(format!("the machine stood still {PLAYS_MAX} times"))
}

async fn compare(real: &mut Real<'_>, script: &Script) -> Result<(), String> {
    let mut model = Modelled::new();
    same(&real.view(), &model.view()).map_err(|why| format!("before the first step: {why}"))?;
    for (at, step) in script.steps.iter().enumerate() {
        let (theirs, ours) = (real.play(step).await, model.play(step));
        if real.lost_the_race {
            return Ok(());
        }
        let here = |why: String| {
            let steps: Vec<String> = script.steps.iter().take(at).map(|step| format!("  {step:?}\n")).collect();
            format!("step {at}, {step:?}: {why}\nafter\n{}", steps.concat())
        };
        agree(step, &theirs, &ours).map_err(here)?;
        same(&real.view(), &model.view()).map_err(here)?;
    }
    Ok(())
}

/// Whether both said the same; lives of leases are about the same, and never shorter than was promised.
fn agree(step: &Step, theirs: &Said, ours: &Said) -> Result<(), String> {
    let (Said::RanOut(Some(there)), Said::RanOut(Some(here))) = (theirs, ours) else {
        return if theirs == ours { Ok(()) } else { Err(format!("etcd says {theirs:?}, the model {ours:?}")) };
    };
    for (who, life) in [("etcd", there), ("the model", here)] {
        if life.most < life.promised {
            return Err(format!("{step:?}: with {who} the lease lived {:?}, less than the {:?} promised", life.most, life.promised));
        }
    }
    let apart = there.least.saturating_sub(here.most).max(here.least.saturating_sub(there.most));
    if apart > LIVES_APART_MAX { Err(format!("etcd let the lease live {there:?}, the model {here:?}")) } else { Ok(()) }
}

fn same(theirs: &ClusterView, ours: &ClusterView) -> Result<(), String> {
    if theirs == ours {
        return Ok(());
    }
    let (theirs, ours) = (format!("{theirs:#?}"), format!("{ours:#?}"));
    let only = |this: &str, other: &str| this.lines().filter(|line| !other.lines().any(|l| l == *line)).collect::<Vec<_>>().join("\n");
    Err(format!("etcd alone holds\n{}\nand the model alone\n{}\nwhich is\n{ours}", only(&theirs, &ours), only(&ours, &theirs)))
}
