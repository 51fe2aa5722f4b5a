//! The simulator: seeded runs of whole clusters around the unchanged core. `make sim`, `make mutants`; without arguments it is a test
//! binary like the others.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod archiving;
mod check;
mod clock;
mod command;
mod coverage;
mod daemon;
mod documents;
mod etcd;
mod faults;
mod gate;
mod guard;
mod heal;
mod host;
mod jobs;
mod lease;
mod maintenance;
mod mutants;
mod network;
mod plan;
mod postgres;
mod promises;
mod random;
mod reality_etcd;
mod reality_postgres;
mod records;
mod reinit;
mod replication;
mod requests;
mod rewind;
mod runner;
mod seeds;
mod strikes;
mod synchrony;
mod trace;
mod wal;
mod walsenders;
mod watch;
mod world;

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((word, rest)) if word == "storm" => command::storm(rest),
        Some((word, rest)) if word == "mutants" => command::mutants(rest),
        Some((word, rest)) if word == reality_postgres::PLAY => reality_postgres::play(rest),
        _ => promises::main(),
    }
}
