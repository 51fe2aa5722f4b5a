//! A wall clock per node that a test can step, for programs that are started under it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgherd::cli::demo::cluster::run;

const COMPILE_LIMIT: Duration = Duration::from_secs(30);

/// One node's wall clock.
#[derive(Debug)]
pub struct WallClock {
    library: PathBuf,
    file: PathBuf,
}

impl WallClock {
    /// A clock that is right so far, kept in `dir`, which the servers' user can reach.
    pub fn new(dir: &Path) -> WallClock {
        let clock = WallClock { library: dir.join("wall_clock.so"), file: dir.join("wall_clock.shift") };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rig/wall_clock.c");
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&clock.library).arg(source);
        let said = run(compile, COMPILE_LIMIT).unwrap();
        assert_eq!(said.code, Some(0), "{said:?}");
        clock.step_to(0);
        clock
    }

    /// Steps the clock, also for programs that run, to this many seconds beside the right time.
    pub fn step_to(&self, seconds: i64) {
        use std::io::Write;
        // In place: the programs have this file mapped.
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&self.file).unwrap();
        file.write_all(&seconds.to_ne_bytes()).unwrap();
    }

    /// Puts a program, and what it starts, under this clock.
    pub fn rule(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("WALL_CLOCK_SHIFT_FILE", &self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_under_a_stepped_clock_sees_another_time() {
        let dir = tempfile::tempdir().unwrap();
        let clock = WallClock::new(dir.path());
        let year = |seconds| {
            clock.step_to(seconds);
            let mut date = Command::new("date");
            date.arg("+%s");
            clock.rule(&mut date);
            run(date, COMPILE_LIMIT).unwrap().out.trim().parse::<i64>().unwrap()
        };
        let (right, later) = (year(0), year(86_400));
        assert!((86_300..86_500).contains(&(later - right)), "{right} {later}");
    }
}
