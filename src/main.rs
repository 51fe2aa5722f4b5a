//! The `pgherd` command: the daemon of a host, and what people type.
//!
//! Synchronous on purpose: `pgherd run` gives up root before the first thread exists.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgherd::cli::main()
}
