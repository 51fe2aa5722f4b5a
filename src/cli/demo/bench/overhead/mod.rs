//! What `quorum` costs over `async` under pgherd, beside what it costs PostgreSQL alone with the same synchronous_standby_names.
//!
//! Both clusters run all the while on the same machine, and one of them is written to at a time, in slices of a quarter of a second in
//! the order A B B A, which is a block: what else the machine does meets both. A sweep measures some blocks of every number of writers in
//! one mode and then as many in the other; of two that belong together comes one figure:
//!
//! ```text
//! cost = 1 - (quorum under pgherd / quorum alone) / (async under pgherd / async alone)
//! ```

mod load;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio_postgres::Config;

use super::super::cluster::LocalCluster;
use super::super::documents::ClusterDocument;
use super::super::drill::leader;
use super::super::ports::PortBlock;
use super::super::process::{wait_for, wait_for_every};
use super::ask::{execute, texts};
use super::bare::Bare;
use super::statistics::{Spread, spread};
use load::{Load, Slice};

/// How many writers there are at once, in turn.
const WRITERS: [i32; 3] = [1, 8, 32];
/// Blocks of one mode and number of writers in a sweep.
const BLOCKS: u16 = 3;
/// How long a change of mode may take, in milliseconds.
const MODE_BOUND_MS: u64 = 60_000;
/// Time between two looks whether it is in force, in milliseconds.
const MODE_PAUSE_MS: u64 = 100;
/// How long both clusters are left alone after it, in milliseconds: for 5 s the leader looks at its server every 20 ms.
const SETTLE_MS: u64 = 6_000;

/// For whom commits wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// For nobody.
    Async,
    /// For one of two standbys.
    Quorum,
}

impl Mode {
    /// As a document has it.
    fn word(self) -> &'static str {
        match self {
            Mode::Async => "async",
            Mode::Quorum => "quorum",
        }
    }
}

/// Which of the two is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Pgherd,
    Bare,
}

/// How fast one side was in one block.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Acknowledged commits per second.
    pub commits_per_s: f64,
    /// Half were acknowledged within so many milliseconds.
    pub median_ms: f64,
    /// 95 of 100 were.
    pub p95_ms: f64,
}

/// Both sides within a few seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Block {
    /// The sweep that it belongs to.
    pub sweep: u16,
    /// Its number among those of its mode and number of writers.
    pub number: u16,
    /// For whom commits waited.
    pub mode: Mode,
    /// How many wrote at once.
    pub writers: i32,
    /// Under pgherd.
    pub pgherd: Rate,
    /// Without it.
    pub bare: Rate,
}

/// What quorum costs more under pgherd than without, with so many writers.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// How many wrote at once.
    pub writers: i32,
    /// In percent of commits per second, over all pairs of blocks; below zero it costs less.
    pub percent: Spread,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Overhead {
    /// The names in quorum, on both sides.
    pub names: String,
    /// Every block.
    pub blocks: Vec<Block>,
    /// What comes of them.
    pub costs: Vec<Cost>,
}

/// Measures, and leaves the cluster in the mode that was measured last.
pub fn measure(cluster: &LocalCluster, document: &ClusterDocument, ports: &PortBlock, sweeps: u16, stop: &AtomicBool) -> Result<Overhead> {
    let (name, index) = leader(cluster)?;
    let standbys: Vec<String> = cluster.plan.nodes.iter().map(|node| node.declared.name.clone()).filter(|other| *other != name).collect();
    let pgherd = cluster.connection(cluster.plan.nodes[index].declared.port)?;
    println!("starting PostgreSQL without pgherd beside it");
    let bare = Bare::start(cluster, ports, &pgherd, &standbys)?;
    let sides = Sides { cluster, document, standbys: standbys.len(), pgherd, bare, stop };
    let (mut blocks, mut names) = (Vec::new(), String::new());
    for sweep in 1..=sweeps {
        for mode in modes(sweep) {
            let in_force = sides.set_mode(mode).with_context(|| format!("changing the mode to {}", mode.word()))?;
            if mode == Mode::Quorum {
                names = in_force;
            }
            for writers in WRITERS {
                let measured = sides.blocks(sweep, mode, writers).with_context(|| format!("{} with {writers} writers", mode.word()))?;
                let median = |of: fn(&Block) -> f64| spread(measured.iter().map(of).collect()).map_or(0.0, |each| each.median);
                println!(
                    "overhead {sweep:>3}/{sweeps} {:<6} writers {writers:>2}: {:>6.0} commits/s under pgherd, {:>6.0} without",
                    mode.word(),
                    median(|block| block.pgherd.commits_per_s),
                    median(|block| block.bare.commits_per_s),
                );
                blocks.extend(measured);
            }
        }
    }
    sides.bare.end()?;
    let costs = costs(&blocks);
    Ok(Overhead { names, blocks, costs })
}

/// Every sweep has both, and begins where the last one ended.
fn modes(sweep: u16) -> [Mode; 2] {
    if sweep % 2 == 1 { [Mode::Quorum, Mode::Async] } else { [Mode::Async, Mode::Quorum] }
}

/// Neither side is always the first, nor always in the middle.
fn order(turn: u16) -> [Side; 4] {
    let (one, other) = if turn % 2 == 1 { (Side::Pgherd, Side::Bare) } else { (Side::Bare, Side::Pgherd) };
    [one, other, other, one]
}

/// The two clusters.
struct Sides<'a> {
    cluster: &'a LocalCluster,
    document: &'a ClusterDocument,
    standbys: usize,
    pgherd: Config,
    bare: Bare<'a>,
    stop: &'a AtomicBool,
}

impl Sides<'_> {
    /// Changes the mode of both, the one by a document and the other by hand, and returns the names that both have then.
    fn set_mode(&self, mode: Mode) -> Result<String> {
        let said = self.cluster.apply(&ClusterDocument { mode: mode.word().into(), ..self.document.clone() }.to_yaml())?;
        ensure!(said.code == Some(0), "pgherd apply: exit {:?}: {}{}", said.code, said.out, said.err);
        let names = self.in_force(&self.pgherd, mode).context("under pgherd")?;
        self.bare.set_names(&names)?;
        let bare = self.bare.config()?;
        let by_hand = self.in_force(&bare, mode).context("without pgherd")?;
        ensure!(names == by_hand, "the names are `{names}` under pgherd and `{by_hand}` without");
        for config in [&self.pgherd, &bare] {
            // The next one by the clock is minutes away then.
            execute(config, "CHECKPOINT")?;
        }
        let interrupted = wait_for(Duration::from_millis(SETTLE_MS), || self.stop.load(Ordering::SeqCst));
        ensure!(!interrupted, "interrupted");
        ensure!(self.in_force(&self.pgherd, mode)? == names, "the names under pgherd did not stay `{names}`");
        Ok(names)
    }

    /// Waits until every standby streams and shows that it goes by the mode; returns the names.
    fn in_force(&self, config: &Config, mode: Mode) -> Result<String> {
        let question = "SELECT current_setting('synchronous_standby_names'), sync_state FROM pg_stat_replication WHERE state = 'streaming'";
        let mut seen = Vec::new();
        let so = wait_for_every(Duration::from_millis(MODE_PAUSE_MS), Duration::from_millis(MODE_BOUND_MS), || {
            seen = texts(config, question).unwrap_or_default();
            let of_mode = |(names, state): &(String, String)| state == mode.word() && names.is_empty() == (mode == Mode::Async);
            self.stop.load(Ordering::SeqCst) || seen.len() == self.standbys && seen.iter().all(of_mode)
        });
        ensure!(!self.stop.load(Ordering::SeqCst), "interrupted");
        ensure!(so, "not in force after {} s: {seen:?}", MODE_BOUND_MS / 1000);
        Ok(seen.swap_remove(0).0)
    }

    fn blocks(&self, sweep: u16, mode: Mode, writers: i32) -> Result<Vec<Block>> {
        let (pgherd, bare) = (Load::connect(&self.pgherd, writers)?, Load::connect(&self.bare.config()?, writers)?);
        let block = |number: u16| {
            let (mut of_pgherd, mut of_bare) = (Slice::default(), Slice::default());
            for side in order(sweep + number) {
                ensure!(!self.stop.load(Ordering::SeqCst), "interrupted");
                match side {
                    Side::Pgherd => of_pgherd = of_pgherd.join(pgherd.slice()?),
                    Side::Bare => of_bare = of_bare.join(bare.slice()?),
                }
            }
            Ok(Block { sweep, number, mode, writers, pgherd: rate(of_pgherd)?, bare: rate(of_bare)? })
        };
        (1..=BLOCKS).map(block).collect()
    }
}

fn rate(slice: Slice) -> Result<Rate> {
    let Slice { seconds, latencies_s } = slice;
    let latency = spread(latencies_s).context("nothing was acknowledged")?;
    Ok(Rate { commits_per_s: latency.count as f64 / seconds, median_ms: latency.median * 1e3, p95_ms: latency.p95 * 1e3 })
}

/// One figure of each two blocks that differ only in the mode.
fn costs(blocks: &[Block]) -> Vec<Cost> {
    let relative = |block: &Block| block.pgherd.commits_per_s / block.bare.commits_per_s;
    let place = |block: &Block| (block.sweep, block.number, block.writers);
    let of_mode = |mode: Mode| blocks.iter().filter(move |block| block.mode == mode);
    let cost = |quorum: &Block| {
        let beside = of_mode(Mode::Async).find(|block| place(block) == place(quorum))?;
        Some((1.0 - relative(quorum) / relative(beside)) * 100.0)
    };
    let of = |writers: i32| {
        let percent = of_mode(Mode::Quorum).filter(|block| block.writers == writers).filter_map(cost);
        Some(Cost { writers, percent: spread(percent.collect())? })
    };
    WRITERS.into_iter().filter_map(of).collect()
}

impl Overhead {
    /// The tables of a page.
    pub fn write(&self, text: &mut String) {
        text.push_str("| commits | writers | per second, pgherd | without | median ms, pgherd | without | p95 ms, pgherd | without |\n");
        text.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
        for mode in [Mode::Async, Mode::Quorum] {
            for writers in WRITERS {
                self.write_row(text, mode, writers);
            }
        }
        text.push_str("\n| cost of quorum over async beside PostgreSQL without pgherd, % | blocks | min | median | p95 | max |\n");
        text.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
        for Cost { writers, percent } in &self.costs {
            let Spread { count, min, median, p95, max } = percent;
            let _ = writeln!(text, "| writers: {writers} | {count} | {min:.1} | {median:.1} | {p95:.1} | {max:.1} |");
        }
        let _ = writeln!(text, "\nThe names in quorum, on both sides: `{}`.\n", self.names);
    }

    fn write_row(&self, text: &mut String, mode: Mode, writers: i32) {
        let blocks = || self.blocks.iter().filter(|block| block.mode == mode && block.writers == writers);
        let of = |figure: fn(&Block) -> f64| spread(blocks().map(figure).collect());
        let rate = |figure: fn(&Block) -> f64| {
            of(figure).map_or_else(|| "-".to_owned(), |each| format!("{:.0} ({:.0} to {:.0})", each.median, each.min, each.max))
        };
        let ms = |figure: fn(&Block) -> f64| of(figure).map_or_else(|| "-".to_owned(), |each| format!("{:.2}", each.median));
        let _ = writeln!(
            text,
            "| {} | {writers} | {} | {} | {} | {} | {} | {} |",
            mode.word(),
            rate(|block| block.pgherd.commits_per_s),
            rate(|block| block.bare.commits_per_s),
            ms(|block| block.pgherd.median_ms),
            ms(|block| block.bare.median_ms),
            ms(|block| block.pgherd.p95_ms),
            ms(|block| block.bare.p95_ms),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(sweep: u16, mode: Mode, writers: i32, pgherd: f64, bare: f64) -> Block {
        let rate = |commits_per_s| Rate { commits_per_s, median_ms: 1.0, p95_ms: 2.0 };
        Block { sweep, number: 1, mode, writers, pgherd: rate(pgherd), bare: rate(bare) }
    }

    #[test]
    fn what_costs_both_modes_the_same_is_no_cost_of_quorum() {
        let blocks = [block(1, Mode::Async, 8, 900.0, 1000.0), block(1, Mode::Quorum, 8, 450.0, 500.0)];
        assert!(costs(&blocks)[0].percent.median.abs() < 1e-9);
    }

    #[test]
    fn the_cost_is_what_quorum_loses_more_under_pgherd_than_without() {
        let async_ = |sweep| block(sweep, Mode::Async, 8, 1000.0, 1000.0);
        let blocks = [async_(1), block(1, Mode::Quorum, 8, 450.0, 500.0), async_(2), block(2, Mode::Quorum, 8, 520.0, 500.0)];
        let cost = &costs(&blocks)[0];
        assert_eq!((cost.writers, cost.percent.count), (8, 2));
        assert!((cost.percent.max - 10.0).abs() < 1e-9 && (cost.percent.min + 4.0).abs() < 1e-9, "{cost:?}");
    }

    #[test]
    fn blocks_are_compared_with_the_one_of_the_same_number_in_the_same_sweep() {
        let second = |block: Block| Block { number: 2, ..block };
        let one = [block(1, Mode::Async, 8, 1000.0, 1000.0), block(1, Mode::Quorum, 8, 500.0, 500.0)];
        let other = [second(block(1, Mode::Async, 8, 500.0, 1000.0)), second(block(1, Mode::Quorum, 8, 250.0, 500.0))];
        let cost = costs(&[one, other].concat());
        assert_eq!((cost[0].percent.count, cost[0].percent.min, cost[0].percent.max), (2, 0.0, 0.0));
    }

    #[test]
    fn a_sweep_that_was_cut_off_gives_no_figure() {
        let blocks = [block(1, Mode::Quorum, 1, 450.0, 500.0), block(2, Mode::Async, 8, 450.0, 500.0)];
        assert!(costs(&blocks).is_empty());
    }

    #[test]
    fn each_side_and_each_mode_is_as_often_first_as_the_other() {
        let firsts = |sweeps: std::ops::RangeInclusive<u16>| sweeps.map(|sweep| order(sweep)[0]).filter(|side| *side == Side::Bare).count();
        assert_eq!(firsts(1..=10), 5);
        assert!((1..=10).all(|sweep| order(sweep).iter().filter(|side| **side == Side::Bare).count() == 2));
        assert!((1..=9).all(|sweep| modes(sweep)[1] == modes(sweep + 1)[0]), "the mode is changed once a sweep");
    }

    #[test]
    fn a_rate_counts_commits_per_second_of_both_slices() {
        let slice = |latencies_s: &[f64]| Slice { seconds: 0.25, latencies_s: latencies_s.to_vec() };
        let rate = rate(slice(&[0.001, 0.002]).join(slice(&[0.003]))).unwrap();
        assert_eq!((rate.commits_per_s, rate.median_ms, rate.p95_ms), (6.0, 2.0, 3.0));
        assert!(super::rate(slice(&[])).is_err(), "nothing acknowledged is no rate of zero");
    }

    #[test]
    fn the_table_has_a_row_for_each_mode_and_number_of_writers() {
        let of = |mode, pgherd| WRITERS.map(|writers| block(1, mode, writers, pgherd, 500.0));
        let blocks = [of(Mode::Async, 500.0), of(Mode::Quorum, 480.0)].concat();
        let mut text = String::new();
        Overhead { names: "ANY 1 (n2, n3)".into(), costs: costs(&blocks), blocks }.write(&mut text);
        assert!(text.contains("| quorum | 32 | 480 (480 to 480) | 500 (500 to 500) | 1.00 | 1.00 | 2.00 | 2.00 |"), "{text}");
        assert!(text.contains("| writers: 1 | 1 | 4.0 | 4.0 | 4.0 | 4.0 |"), "{text}");
    }
}
