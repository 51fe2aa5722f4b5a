//! What `make sim` and `make mutants` run.
//!
//! ```text
//! storm [--seconds S] [--first SEED] [--seeds N] [--night]    many seeds, on all cores; --night fails on what was never met
//! storm --seed SEED                                           one seed, with its trace
//! mutants [--only NAME] [--first SEED] [--seeds N]            each deliberate bug has to be caught
//! ```

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::coverage::Coverage;
use super::plan::{Fault, Profile};
use super::runner::{self, Outcome};

/// Seeds that fail are shrunk for at most so many.
const SHRUNK_MAX: usize = 5;
/// Every so many seeds one is run twice (I15).
const TWICE_EVERY: u64 = 16;

fn value<T: std::str::FromStr>(arguments: &[String], name: &str) -> Option<T> {
    let at = arguments.iter().position(|argument| argument == name)?;
    let text = arguments.get(at + 1).unwrap_or_else(|| panic!("{name} needs a value"));
    Some(text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not `{text}`")))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

pub fn storm(arguments: &[String]) -> ExitCode {
    if let Some(seed) = value::<u64>(arguments, "--seed") {
        return one(seed);
    }
    let seconds: u64 = value(arguments, "--seconds").unwrap_or(60);
    let most: u64 = value(arguments, "--seeds").unwrap_or(u64::MAX);
    let first: u64 = value(arguments, "--first").unwrap_or(1);
    let night = arguments.iter().any(|argument| argument == "--night");
    println!("{}", Profile::DEFAULT.describe());
    let begun = Instant::now();
    let sum = Mutex::new(Sum::default());
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                while begun.elapsed() < Duration::from_secs(seconds) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed - first >= most {
                        return;
                    }
                    let outcome = runner::run(seed, false);
                    let again = seed.is_multiple_of(TWICE_EVERY).then(|| runner::run(seed, false).hash);
                    let differs = again.is_some_and(|again| again != outcome.hash);
                    sum.lock().unwrap().add(outcome, differs);
                }
            });
        }
    });
    let sum = sum.into_inner().unwrap();
    sum.report(begun.elapsed());
    for outcome in sum.failed.iter().take(SHRUNK_MAX) {
        report_failure(outcome);
    }
    let incomplete = night && !sum.coverage.complete();
    if incomplete {
        println!("what was never met is not tested: the night has failed");
    }
    if sum.failed.is_empty() && sum.differ == 0 && !incomplete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64) -> ExitCode {
    let outcome = runner::run(seed, true);
    outcome.trace.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {} events in {:.0} simulated s, hash {:016x}", outcome.events, outcome.simulated.as_secs_f64(), outcome.hash);
    match &outcome.violation {
        Some(violation) => {
            println!("{}: {}", violation.invariant, violation.what);
            report_failure(&outcome);
            ExitCode::FAILURE
        }
        None => {
            let after = outcome.converged_after.map_or(0.0, |after| after.as_secs_f64());
            println!("every invariant held; whole again {after:.1} s after the last fault");
            ExitCode::SUCCESS
        }
    }
}

fn report_failure(outcome: &Outcome) {
    let Some(violation) = &outcome.violation else { return };
    println!("\nseed {} violates {}: {:.600}", outcome.seed, violation.invariant, violation.what);
    let fewer = runner::shrink(outcome.seed, violation.invariant);
    println!("  it takes {} of its {} faults:", fewer.len(), outcome.faults);
    for Fault { at, kind, victim, lasts, .. } in &fewer {
        let whom = if victim % 2 == 0 { "the leader".to_owned() } else { format!("host {}", victim / 2 % 3) };
        println!("  {:>7.3} s  {kind:?} on {whom} for {:.1} s", at.0 as f64 / 1e9, lasts.as_secs_f64());
    }
    println!("  replay it with: make sim SEED={}", outcome.seed);
}

#[derive(Default)]
struct Sum {
    seeds: u64,
    simulated: Duration,
    events: u64,
    faults: usize,
    commits: u64,
    changes: Vec<usize>,
    converged: Vec<Duration>,
    coverage: Coverage,
    failed: Vec<Outcome>,
    differ: u64,
}

impl Sum {
    fn add(&mut self, outcome: Outcome, differs: bool) {
        self.seeds += 1;
        self.simulated += outcome.simulated;
        self.events += outcome.events;
        self.faults += outcome.faults;
        self.commits += outcome.commits;
        self.changes.push(outcome.changes);
        self.converged.extend(outcome.converged_after);
        self.coverage.add(&outcome.coverage);
        if differs {
            println!("I15: seed {} does not give the same run twice", outcome.seed);
            self.differ += 1;
        }
        if outcome.violation.is_some() {
            self.failed.push(outcome);
        }
    }

    fn report(&self, took: Duration) {
        let mut changes = self.changes.clone();
        changes.sort_unstable();
        let mut converged = self.converged.clone();
        converged.sort_unstable();
        let at = |percent: usize| converged.get(converged.len() * percent / 100).map_or(0.0, Duration::as_secs_f64);
        let simulated = self.simulated.as_secs_f64();
        let per_core = simulated / took.as_secs_f64() / cores() as f64;
        println!(
            "{} seeds, {simulated:.0} simulated s in {:.0} s: {per_core:.0} per second of each of {} cores",
            self.seeds,
            took.as_secs_f64(),
            cores()
        );
        println!(
            "{} faults (one each {:.1} simulated s), {} events, {} commits, {} changes of leader in the median run",
            self.faults,
            simulated / self.faults.max(1) as f64,
            self.events,
            self.commits,
            changes.get(changes.len() / 2).copied().unwrap_or(0)
        );
        println!("whole again after the last fault: median {:.1} s, 99 % {:.1} s, longest {:.1} s", at(50), at(99), at(100).max(at(99)));
        print!("{}", self.coverage.report());
        println!("{} seeds failed{}", self.failed.len(), if self.failed.is_empty() { "" } else { ":" });
        for outcome in &self.failed {
            if let Some(violation) = &outcome.violation {
                println!("  seed {}: {}: {:.160}", outcome.seed, violation.invariant, violation.what);
            }
        }
    }
}

#[cfg(not(feature = "mutants"))]
pub fn mutants(_: &[String]) -> ExitCode {
    println!("this program has no deliberate bugs: build it with --features mutants, as make mutants does");
    ExitCode::from(2)
}

#[cfg(feature = "mutants")]
pub fn mutants(arguments: &[String]) -> ExitCode {
    use std::sync::atomic::AtomicBool;

    use super::mutants::{Hunt, Mutant, hunt};
    let most: u64 = value(arguments, "--seeds").unwrap_or(2_000);
    let only: Option<String> = value(arguments, "--only");
    let first: u64 = value(arguments, "--first").unwrap_or(1);
    let wanted: Vec<Mutant> =
        Mutant::ALL.iter().copied().filter(|mutant| only.as_ref().is_none_or(|only| *only == format!("{mutant:?}"))).collect();
    let (next, survived) = (AtomicU64::new(0), AtomicBool::new(false));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                while let Some(mutant) = wanted.get(usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX)) {
                    let Hunt { mutant, caught } = hunt(*mutant, first, most);
                    match caught {
                        Some((seed, by, after)) => println!("{mutant:?}: caught by {by} after {after} seeds (seed {seed})"),
                        None => {
                            survived.store(true, Ordering::Relaxed);
                            println!("{mutant:?}: SURVIVED {most} seeds: the simulator lacks a fault");
                        }
                    }
                }
            });
        }
    });
    println!("{} deliberate bugs in {:.0} s", wanted.len(), begun.elapsed().as_secs_f64());
    if survived.load(Ordering::Relaxed) || wanted.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
