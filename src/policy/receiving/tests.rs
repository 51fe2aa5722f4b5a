//! A standby that nothing helps, and those that only look like one, second by second.

use super::*;

const T0: BootTime = BootTime(1_000_000_000_000);
const GIVEN: Duration = Duration::from_secs(10);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn streams(reached: u64, leader: u64) -> Seen {
    Seen { reached: Lsn(reached), leader: Some(Lsn(leader)), streams: true, asks: true }
}

fn waits(reached: u64) -> Seen {
    Seen { streams: false, ..streams(reached, 1_000) }
}

/// When each step is due for a standby that nothing helps, in seconds from its standstill on.
fn steps(seconds: u64) -> Vec<(u64, Step)> {
    let mut progress = Progress::default();
    let mut steps = Vec::new();
    for second in 0..seconds {
        let now = T0 + s(second);
        progress.seen(now, waits(100));
        match progress.step(now, T0, GIVEN) {
            Step::Wait => {}
            step => {
                steps.push((second, step));
                progress.tried(now);
            }
        }
    }
    steps
}

#[test]
fn the_walreceiver_is_started_again_then_the_server_three_times_and_then_only_the_walreceiver_ever_more_seldom() {
    use Step::{RestartReceiver as Receiver, RestartServer as Server};
    let wanted =
        [(10, Receiver), (20, Server), (40, Server), (80, Server), (160, Receiver), (320, Receiver), (640, Receiver), (960, Receiver)];
    assert_eq!(steps(1_000), wanted);
}

#[test]
fn what_moves_is_never_stuck_even_if_it_does_not_stream() {
    let mut progress = Progress::default();
    for second in 0..100 {
        let now = T0 + s(second);
        progress.seen(now, waits(100 + second / 9));
        assert_eq!(progress.step(now, T0, GIVEN), Step::Wait, "after {second} s");
    }
}

#[test]
fn one_that_streams_and_has_all_is_well_and_one_that_stays_behind_a_leader_that_writes_on_is_stuck() {
    for (leader, later, wanted) in [(100, 100, Step::Wait), (101, 101, Step::Wait), (101, 102, Step::RestartReceiver)] {
        let mut progress = Progress::default();
        progress.seen(T0, streams(100, leader));
        progress.seen(T0 + s(1), streams(100, leader));
        progress.seen(T0 + s(15), streams(100, later));
        assert_eq!(progress.step(T0 + s(15), T0, GIVEN), wanted);
    }
}

#[test]
fn one_that_replays_what_it_found_or_is_paused_is_left_alone() {
    let mut progress = Progress::default();
    for second in [0, 50, 100] {
        progress.seen(T0 + s(second), Seen { asks: false, ..waits(100) });
        assert_eq!(progress.step(T0 + s(second), T0, GIVEN), Step::Wait);
    }
}

#[test]
fn the_time_counts_from_when_there_was_a_leader_to_receive_from() {
    let mut progress = Progress::default();
    progress.seen(T0, waits(100));
    progress.seen(T0 + s(60), waits(100));
    assert_eq!(progress.step(T0 + s(60), T0 + s(55), GIVEN), Step::Wait);
    assert_eq!(progress.step(T0 + s(65), T0 + s(55), GIVEN), Step::RestartReceiver);
}

#[test]
fn once_it_streams_and_moves_nothing_of_before_counts() {
    let mut progress = Progress::default();
    progress.seen(T0, waits(100));
    progress.tried(T0 + s(10));
    progress.tried(T0 + s(20));
    assert_eq!(progress.tries(), 2);
    // It moved by the archive: it still does not stream.
    progress.seen(T0 + s(21), waits(101));
    assert_eq!(progress.tries(), 2);
    progress.seen(T0 + s(22), streams(102, 1_000));
    assert_eq!(progress.tries(), 0);
}

#[test]
fn wal_receiver_timeout_is_read_as_postgresql_reads_it_and_bounded() {
    let cases = [
        (None, 15),
        (Some("60s"), 60),
        (Some("20000"), 20),
        (Some("1min"), 60),
        (Some("100ms"), 5),
        (Some("0"), 300),
        (Some("2h"), 300),
        (Some("soon"), 300),
    ];
    for (text, seconds) in cases {
        assert_eq!(given(true, text), s(seconds), "{text:?}");
    }
    assert_eq!(given(false, Some("60s")), s(CONNECTS_WITHIN_S));
}
