//! The demo and its drill, as a person runs them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::cli::demo::cluster::run;
use pgherd::cli::demo::ports::{BLOCK_PORTS, PortBlock};

use crate::rig::wait::holds_within;

const DRILL_LIMIT: Duration = Duration::from_secs(80);

/// A free place for a demo: a directory that is not there yet, and the first of its ports.
fn place() -> (tempfile::TempDir, u16) {
    let place = tempfile::Builder::new()
        .prefix("pgherd-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir_in("/tmp")
        .unwrap();
    let ports = PortBlock::free().unwrap();
    let base = ports.write() - 1;
    assert_eq!(base % BLOCK_PORTS, 0);
    (place, base)
}

fn demo(dir: &Path, base_port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgherd"));
    command.arg("demo").arg("--dir").arg(dir).arg("--base-port").arg(base_port.to_string());
    command
}

#[test]
fn the_failover_drill_accounts_for_every_acknowledged_row_and_leaves_nothing_behind() {
    let (place, base_port) = place();
    let dir = place.path().join("demo");
    let mut command = demo(&dir, base_port);
    command.args(["--script", "failover"]);
    let said = run(command, DRILL_LIMIT).unwrap();
    println!("{}", said.out);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert!(said.out.contains("rows acknowledged") && said.out.contains("interrupted for"), "{}", said.out);
    assert!(!dir.exists());
}

#[test]
fn a_demo_that_was_killed_is_ended_by_demo_down() {
    let (place, base_port) = place();
    let dir = place.path().join("demo");
    let mut child = demo(&dir, base_port).spawn().unwrap();
    let pids = dir.join("pids");
    let up = || std::fs::read_to_string(&pids).is_ok_and(|text| text.lines().count() >= 3);
    assert!(holds_within(DRILL_LIMIT, up), "etcd is up");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    let mut down = demo(&dir, base_port);
    down.arg("--down");
    let said = run(down, DRILL_LIMIT).unwrap();
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(!dir.exists());
}
