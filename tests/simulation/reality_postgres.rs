//! The simulator's PostgreSQL held to the real one: scripts that a real cluster and the model's go through step by step, and after which
//! pgherd must see the same of both, through the edges it has for the real one.
//!
//! Positions are compared by relation. A failure says `real and model`: the model is wrong, or an edge is.

use std::pin::Pin;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Failed, Trial};
use pgherd::postgres::Installation;

#[path = "../rig/wait.rs"]
#[allow(dead_code)]
mod wait;

#[path = "../postgres/harness.rs"]
#[allow(dead_code)]
mod harness;

mod account;
mod ends;
mod senders;
mod standbys;
mod timelines;
mod twins;

use twins::Twins;

/// The word by which this binary plays one script.
pub const PLAY: &str = "twins";

/// Which installation a trial is for, as its name says.
#[derive(Debug, Clone, Copy)]
enum Version {
    Distribution,
    Seventeen,
}

impl Version {
    const ALL: [(Version, &'static str); 2] =
        [(Version::Distribution, "postgresql_of_the_distribution"), (Version::Seventeen, "postgresql_17")];

    async fn installation(self) -> Installation {
        let mut found = harness::installations().await;
        let at = match self {
            Version::Distribution => Some(0),
            Version::Seventeen => found.iter().position(|installation| installation.major == 17),
        };
        found.swap_remove(at.expect("the tests need PostgreSQL 17 too: make setup-tests"))
    }
}

type Script = fn(Twins) -> Pin<Box<dyn Future<Output = ()>>>;

/// What both have to agree on, with the number of servers it takes.
const SCRIPTS: [(&str, usize, Script); 10] = [
    ("a_primary_ends_and_recovers", 1, |twins| Box::pin(ends::primary(twins))),
    ("row_6_a_backend_outlives_its_postmaster", 1, |twins| Box::pin(ends::orphan(twins))),
    ("a_fast_stop_waits_for_the_standby", 2, |twins| Box::pin(ends::handover(twins))),
    ("a_standby_restarts_where_it_was", 2, |twins| Box::pin(standbys::restart(twins))),
    ("row_10_a_walsender_stays_with_its_slot_when_its_standby_says_nothing", 2, |twins| Box::pin(senders::half_open(twins))),
    ("a_promotion_takes_the_first_free_id", 2, |twins| Box::pin(timelines::promotion(twins))),
    ("members_behind_the_switch_point_follow", 3, |twins| Box::pin(timelines::behind(twins))),
    ("row_49_a_member_past_the_switch_point_gets_nowhere", 3, |twins| Box::pin(timelines::past(twins))),
    ("row_53_two_promotions_to_one_id_mix", 3, |twins| Box::pin(timelines::same_id(twins))),
    ("row_53_a_promotion_without_a_record_is_seen", 3, |twins| Box::pin(timelines::unrecorded(twins))),
];

pub fn trials() -> Vec<Trial> {
    let of = |(_, words): (Version, &'static str)| {
        SCRIPTS.into_iter().map(move |(name, ..)| Trial::test(format!("{words}::{name}"), move || play_apart(words, name)))
    };
    Version::ALL.into_iter().flat_map(of).collect()
}

/// In a process of its own: PostgreSQL refuses root, and how its postmaster ends is for its parent to see, while a process that has run
/// etcd has a reaper that takes every server's end.
fn play_apart(version: &str, script: &str) -> Result<(), Failed> {
    let output = Command::new(std::env::current_exe()?).args([PLAY, version, script]).stdin(Stdio::null()).output()?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned().into()) }
}

/// `PLAY version script`.
pub fn play(arguments: &[String]) -> ExitCode {
    let [version, script] = arguments else { panic!("{PLAY} takes a version and a script, not {arguments:?}") };
    let version = Version::ALL.into_iter().find(|(_, words)| words == version).expect("one of the versions").0;
    let (_, servers, script) = SCRIPTS.into_iter().find(|(name, ..)| name == script).expect("one of the scripts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { script(Twins::new(&version.installation().await, servers)).await });
    ExitCode::SUCCESS
}
