//! The guard process: `pgherd-guard RUN_DIR DATA_DIR`, started by the daemon, never by a person.
//!
//! Sets the process up (its own session, subreaper, locked memory) and hands over to [`pgherd::guard`]. What the system refuses is told
//! as a condition; only what the promises hang on is a reason not to start.

use std::process::ExitCode;

fn main() -> ExitCode {
    match pgherd::guard::start::main(std::env::args_os().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgherd-guard: {error:#}");
            ExitCode::FAILURE
        }
    }
}
