//! The one place where a test waits: it looks again and again until a deadline, and never for a fixed time.

use std::time::{Duration, Instant};

/// For what must not happen meanwhile.
pub const A_WHILE: Duration = Duration::from_secs(3);
/// Time between two looks, in milliseconds.
const LOOK_MS: u64 = 50;
/// Time between two looks that each cost a process, in milliseconds.
const DEAR_LOOK_MS: u64 = 250;

fn look(pause_ms: u64, bound: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + bound;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
    }
}

/// Looks until `condition` holds; false when `bound` passed first.
pub fn holds_within(bound: Duration, condition: impl FnMut() -> bool) -> bool {
    look(LOOK_MS, bound, condition)
}

/// The same for a condition that is dear to ask.
pub fn settles_within(bound: Duration, condition: impl FnMut() -> bool) -> bool {
    look(DEAR_LOOK_MS, bound, condition)
}

/// Looks for as long as `span`, and tells whether `condition` held at every look: for what must NOT happen.
pub fn holds_throughout(span: Duration, mut condition: impl FnMut() -> bool) -> bool {
    !holds_within(span, || !condition())
}
