//! The simulator as a test: what any checkout promises within seconds. `make sim` looks longer.

use libtest_mimic::{Arguments, Failed, Trial};

use super::plan::{Profile, plan};
use super::runner::{Outcome, run};
use super::seeds::REGRESSIONS;

/// Seeds of an ordinary test run, on top of the regressions.
const SEEDS: u64 = 40;

pub fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = vec![
        Trial::test("every_invariant_holds_in_seeds_that_nobody_chose", || clean(1_000_000..1_000_000 + SEEDS)),
        Trial::test("seeds_that_found_a_bug_once_find_none_now", || clean(REGRESSIONS.iter().map(|(seed, _)| *seed))),
        Trial::test("i15_the_same_seed_is_the_same_run", same_hash),
        Trial::test("the_default_faults_are_hard", hard),
    ];
    trials.extend(super::reality_etcd::trials());
    trials.extend(super::reality_postgres::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn clean(seeds: impl Iterator<Item = u64>) -> Result<(), Failed> {
    let failed: Vec<String> = seeds
        .map(|seed| run(seed, false))
        .filter_map(|Outcome { seed, violation, .. }| violation.map(|found| format!("seed {seed}: {}: {}", found.invariant, found.what)))
        .collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("{}\nreplay with make sim SEED=…", failed.join("\n")).into()) }
}

fn same_hash() -> Result<(), Failed> {
    for seed in [3, 77, 4_242] {
        let (once, twice) = (run(seed, false), run(seed, true));
        if (once.hash, once.events) != (twice.hash, twice.events) {
            return Err(format!("seed {seed}: {:x} and {:x}", once.hash, twice.hash).into());
        }
        if run(seed + 1, false).hash == once.hash {
            return Err(format!("seeds {seed} and {} are the same run: the hash sees nothing", seed + 1).into());
        }
    }
    Ok(())
}

/// At least one fault per 20 simulated seconds, overlapping ones included, and a change of leader in the median run.
fn hard() -> Result<(), Failed> {
    let plans: Vec<_> = (1..200).map(|seed| plan(seed, Profile::DEFAULT)).collect();
    let sparse = plans.iter().filter(|faults| faults.len() < 6).count();
    let overlapping = plans.iter().filter(|faults| faults.windows(2).any(|pair| pair[0].at.after(pair[0].lasts) > pair[1].at)).count();
    let mut changes: Vec<usize> = (1..40).map(|seed| run(seed, false).changes).collect();
    changes.sort_unstable();
    let median = changes[changes.len() / 2];
    if sparse * 20 > plans.len() || overlapping * 10 < plans.len() * 9 || median < 1 {
        return Err(format!("{sparse} sparse and {overlapping} overlapping of {} plans, {median} changes of leader", plans.len()).into());
    }
    Ok(())
}
