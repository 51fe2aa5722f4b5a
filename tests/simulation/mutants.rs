//! The deliberate bugs are the crate's list; those of the edges that this simulator stands in for are asked for here.

pub use pgherd::mutants::{Mutant, mutant};

#[cfg(feature = "mutants")]
use super::runner::{Outcome, run};
#[cfg(feature = "mutants")]
use pgherd::mutants::activate;

/// How a hunt for one bug ended.
#[cfg(feature = "mutants")]
pub struct Hunt {
    pub mutant: Mutant,
    /// The seed that found it, by which invariant, after how many.
    pub caught: Option<(u64, &'static str, u64)>,
}

/// Looks for one bug, seed by seed.
#[cfg(feature = "mutants")]
pub fn hunt(mutant: Mutant, first: u64, seeds_max: u64) -> Hunt {
    activate(Some(mutant));
    let mut caught = None;
    for seed in first..first + seeds_max {
        if let Outcome { violation: Some(violation), .. } = run(seed, false) {
            caught = Some((seed, violation.invariant, seed - first + 1));
            break;
        }
    }
    activate(None);
    Hunt { mutant, caught }
}
