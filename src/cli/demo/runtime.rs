//! Asynchronous work from synchronous code that may itself be called from within a runtime.

use anyhow::{Context, Result};

/// Runs `work` to its end in this thread, which must not be a runtime's.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")?.block_on(work)
}

/// Runs `work` to its end in a thread of its own.
pub fn in_own_thread<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    std::thread::spawn(move || block_on(work)).join().ok().context("the work panicked")?
}
