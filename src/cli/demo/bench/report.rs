//! The figures and what they are held against, as a table, as JSON, and as the section of a page.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::idle::{Idle, Member};
use super::machine::Machine;
use super::overhead::Overhead;
use super::rewinds::Rewind;
use super::scenario::{Run, Scenario, Switched};
use super::statistics::{Summary, summary};

/// Marks where the section begins that a run replaces.
const SECTION_BEGINS: &str = "<!-- measured: begin -->";
/// Marks where it ends.
const SECTION_ENDS: &str = "<!-- measured: end -->";

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// When it began, wall clock.
    pub at: String,
    /// What was run.
    pub command: String,
    /// Load averages before and after.
    pub load: [String; 2],
    /// On what.
    pub machine: Machine,
    /// Every run.
    pub runs: Vec<Run>,
    /// Distributions by scenario.
    pub outages: Vec<Outages>,
    /// Every former primary that was rewound.
    pub rewinds: Vec<Rewind>,
    /// Costs while nothing happens.
    pub idle: Option<Idle>,
    /// What quorum costs.
    pub overhead: Option<Overhead>,
    /// What was promised, and what came of it.
    pub targets: Vec<Target>,
}

/// The outages of one scenario.
#[derive(Debug, Clone, Serialize)]
pub struct Outages {
    /// Which.
    pub scenario: Scenario,
    /// Through HAProxy.
    pub haproxy: Summary,
    /// By the client that goes to the nodes.
    pub direct: Summary,
    /// Writes that were not acknowledged, over all runs, both ways.
    pub failed: usize,
}

/// One promise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Target {
    /// What.
    pub what: String,
    /// What was measured.
    pub measured: f64,
    /// What it may be at most.
    pub limit: f64,
    /// Of both.
    pub unit: &'static str,
    /// Whether it is kept.
    pub met: bool,
}

/// Distributions of the scenarios that were run, in the order of [`Scenario`].
pub fn outages(runs: &[Run]) -> Vec<Outages> {
    let mut scenarios: Vec<Scenario> = runs.iter().map(|run| run.scenario).collect();
    scenarios.sort();
    scenarios.dedup();
    let of = |scenario| {
        let runs: Vec<&Run> = runs.iter().filter(|run| run.scenario == scenario).collect();
        let times = |seconds: fn(&Run) -> f64| runs.iter().map(|run| Duration::from_secs_f64(seconds(run))).collect::<Vec<_>>();
        Some(Outages {
            scenario,
            haproxy: summary(&times(|run| run.haproxy_s))?,
            direct: summary(&times(|run| run.direct_s))?,
            failed: runs.iter().map(|run| run.haproxy_failed + run.direct_failed).sum(),
        })
    };
    scenarios.into_iter().filter_map(of).collect()
}

fn seconds(times: impl Iterator<Item = f64>) -> Option<Summary> {
    summary(&times.map(Duration::from_secs_f64).collect::<Vec<_>>())
}

fn switched(runs: &[Run]) -> impl Iterator<Item = (&Run, &Switched)> {
    runs.iter().filter_map(|run| Some((run, run.switched.as_ref()?)))
}

fn at_most(what: String, measured: f64, limit: f64, unit: &'static str) -> Target {
    Target { what, measured, limit, unit, met: measured <= limit }
}

/// The promises about switchovers: what they take beside the same by hand, and what becomes of the former primary.
fn of_switchovers(runs: &[Run]) -> Vec<Target> {
    let title = Scenario::Switchover.title();
    let median = |of: fn(&Run, &Switched) -> f64| seconds(switched(runs).map(|(run, switched)| of(run, switched))).map(|all| all.median_s);
    let (Some(direct), Some(floor)) = (median(|run, _| run.direct_s), median(|_, switched| switched.by_hand.waits_s)) else {
        return Vec::new();
    };
    let further = median(|run, _| (run.haproxy_s - run.direct_s).max(0.0)).unwrap_or_default();
    let back = switched(runs).map(|(_, switched)| switched.back_s).fold(0.0, f64::max);
    let rewound = switched(runs).filter(|(_, switched)| switched.rewound).count();
    vec![
        at_most(format!("{title}: median seen directly, beside that of the same by hand"), direct / floor, 2.0, "times"),
        at_most(format!("{title}: median of what HAProxy adds"), further, 0.2, "s"),
        at_most(format!("{title}: longest until the former primary streams"), back, 3.0, "s"),
        at_most(format!("{title}: former primaries that did not just follow"), rewound as f64, 0.0, ""),
    ]
}

/// The promises about what was measured.
pub fn targets(runs: &[Run], rewinds: &[Rewind], idle: Option<&Idle>, overhead: Option<&Overhead>) -> Vec<Target> {
    let mut targets = Vec::new();
    for each in &outages(runs) {
        let title = each.scenario.title();
        match each.scenario {
            Scenario::Stop | Scenario::Postmaster => {
                targets.push(at_most(format!("{title}: median through HAProxy"), each.haproxy.median_s, 1.5, "s"));
                targets.push(at_most(format!("{title}: median seen directly"), each.direct.median_s, 0.5, "s"));
            }
            Scenario::Daemon => targets.push(at_most(format!("{title}: failed writes"), each.failed as f64, 0.0, "")),
            Scenario::Power | Scenario::PowerShort => {
                let limit = f64::from(each.scenario.ttl_s()) + 2.0;
                targets.push(at_most(format!("{title}: longest through HAProxy"), each.haproxy.max_s, limit, "s"));
                targets.push(at_most(format!("{title}: longest seen directly"), each.direct.max_s, limit, "s"));
            }
            Scenario::StandbyStop | Scenario::StandbyKill | Scenario::StandbySilent => {
                let limit = if each.scenario == Scenario::StandbySilent { 3.0 } else { 1.0 };
                targets.push(at_most(format!("{title}: longest pause through HAProxy"), each.haproxy.max_s, limit, "s"));
                targets.push(at_most(format!("{title}: longest pause seen directly"), each.direct.max_s, limit, "s"));
            }
            Scenario::Switchover => targets.extend(of_switchovers(runs)),
            Scenario::Rewind | Scenario::Idle | Scenario::Overhead => {}
        }
    }
    if let Some(back) = seconds(rewinds.iter().map(|rewind| rewind.back_s)) {
        targets.push(at_most(format!("{}: longest until it streams, from its start", Scenario::Rewind.title()), back.max_s, 15.0, "s"));
    }
    for cost in overhead.into_iter().flat_map(|overhead| &overhead.costs) {
        let what = format!("cost of quorum over async beside PostgreSQL without pgherd, writers: {}: median", cost.writers);
        targets.push(at_most(what, cost.percent.median, 5.0, "%"));
    }
    let Some(idle) = idle else { return targets };
    let below =
        |what: &str, measured: f64, limit: f64, unit| Target { what: what.to_owned(), measured, limit, unit, met: measured < limit };
    targets.push(below("daemon: resident memory", idle.largest(|member: &Member| member.daemon_mb), 20.0, "MB"));
    targets.push(below("guard: resident memory", idle.largest(|member: &Member| member.guard_mb), 4.0, "MB"));
    targets.push(below("daemon, idle: share of a core", idle.largest(|member: &Member| member.daemon_core_percent), 0.5, "%"));
    targets.push(below("idle: etcd requests per second and member", idle.etcd_requests, 2.0, "/s"));
    targets
}

impl Report {
    /// Whether every promise is kept.
    pub fn passed(&self) -> bool {
        self.targets.iter().all(|target| target.met)
    }

    /// As a person reads it, in a terminal and in a page alike.
    pub fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "Measured {at} by `{command}` on {cores} cores ({processor}), {memory} MiB of memory, Linux {kernel}, {file_system}; load average {before} before, {after} after.\n\
            pgherd {pgherd}; PostgreSQL {postgres}, etcd {etcd}, HAProxy {haproxy}.\n\n",
            at = self.at,
            command = self.command,
            cores = machine.cores,
            processor = machine.processor,
            memory = machine.memory_mib,
            kernel = machine.kernel,
            file_system = machine.file_system,
            before = self.load[0],
            after = self.load[1],
            pgherd = machine.pgherd,
            postgres = machine.postgres,
            etcd = machine.etcd,
            haproxy = machine.haproxy,
        );
        self.write_outages(&mut text);
        self.write_former_primaries(&mut text);
        self.write_idle(&mut text);
        if let Some(overhead) = &self.overhead {
            overhead.write(&mut text);
        }
        text.push_str("| promise | measured | limit | |\n| --- | ---: | ---: | --- |\n");
        for target in &self.targets {
            let Target { what, measured, limit, unit, met } = target;
            let word = if *met { "PASS" } else { "MISS" };
            let _ = writeln!(text, "| {what} | {measured:.2} {unit} | {limit} {unit} | {word} |");
        }
        text
    }

    fn write_outages(&self, text: &mut String) {
        if self.outages.is_empty() {
            return;
        }
        text.push_str("| outage, seconds | seen | runs | min | median | p95 | max | failed writes |\n");
        text.push_str("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
        for each in &self.outages {
            for (way, of) in [("through HAProxy", each.haproxy), ("directly", each.direct)] {
                let runs = self.runs.iter().filter(|run| run.scenario == each.scenario);
                let failed: usize = runs.map(|run| if way == "directly" { run.direct_failed } else { run.haproxy_failed }).sum();
                let _ = writeln!(
                    text,
                    "| {} | {way} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {failed} |",
                    each.scenario.title(),
                    of.count,
                    of.min_s,
                    of.median_s,
                    of.p95_s,
                    of.max_s,
                );
            }
        }
        text.push('\n');
    }

    fn write_former_primaries(&self, text: &mut String) {
        let switched = || switched(&self.runs);
        let rows = [
            ("the outage of a switchover by hand, without pgherd", seconds(switched().map(|(_, switched)| switched.by_hand.waits_s))),
            ("the same, with commits that wait for no standby", seconds(switched().map(|(_, switched)| switched.by_hand.alone_s))),
            ("a former primary streams after a switchover", seconds(switched().map(|(_, switched)| switched.back_s))),
            (
                "a former primary with 100 MB of WAL of its own streams after its start",
                seconds(self.rewinds.iter().map(|each| each.back_s)),
            ),
        ];
        let rows: Vec<(&str, Summary)> = rows.into_iter().filter_map(|(what, times)| Some((what, times?))).collect();
        if rows.is_empty() {
            return;
        }
        text.push_str(
            "| switchovers and former primaries, seconds | runs | min | median | p95 | max |\n| --- | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for (what, of) in rows {
            let Summary { count, min_s, median_s, p95_s, max_s } = of;
            let _ = writeln!(text, "| {what} | {count} | {min_s:.3} | {median_s:.3} | {p95_s:.3} | {max_s:.3} |");
        }
        text.push('\n');
    }

    fn write_idle(&self, text: &mut String) {
        let Some(idle) = &self.idle else { return };
        let _ = writeln!(
            text,
            "| idle for {:.0} s | daemon MB | guard MB | daemon % of a core | guard % of a core | PostgreSQL % of a core |",
            idle.seconds
        );
        text.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
        for member in &idle.members {
            let _ = writeln!(
                text,
                "| {}{} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} |",
                member.name,
                if member.leads { ", leads" } else { "" },
                member.daemon_mb,
                member.guard_mb,
                member.daemon_core_percent,
                member.guard_core_percent,
                member.postgres_core_percent,
            );
        }
        let methods: Vec<String> = idle.by_method.iter().map(|(method, rate)| format!("{method} {rate:.2}")).collect();
        let _ = writeln!(
            text,
            "\netcd requests per second and member: {:.2} ({}); messages of watches beside that: {:.2}.\n",
            idle.etcd_requests,
            methods.join(", "),
            idle.etcd_watch_messages
        );
    }

    /// Puts the figures into the page at `path`, between its two marks.
    pub fn write_section(&self, path: &Path) -> Result<()> {
        let page = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let page = replace_section(&page, &self.markdown()).with_context(|| format!("in {}", path.display()))?;
        fs::write(path, page).with_context(|| format!("writing {}", path.display()))
    }
}

fn replace_section(page: &str, section: &str) -> Result<String> {
    let begin = page.find(SECTION_BEGINS).with_context(|| format!("expected a line {SECTION_BEGINS}"))? + SECTION_BEGINS.len();
    let end = page.find(SECTION_ENDS).with_context(|| format!("expected a line {SECTION_ENDS}"))?;
    ensure!(begin <= end, "expected {SECTION_BEGINS} before {SECTION_ENDS}");
    Ok(format!("{}\n{}\n{}", &page[..begin], section.trim_end(), &page[end..]))
}

/// Whether `path` is a page that [`Report::write_section`] can write: better known before an hour of measuring than after.
pub fn check_page(path: &Path) -> Result<()> {
    let page = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    replace_section(&page, "").with_context(|| format!("in {}", path.display())).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::super::scenario::ByHand;
    use super::*;

    fn run(scenario: Scenario, haproxy_s: f64, direct_s: f64, failed: usize) -> Run {
        Run {
            at: String::new(),
            scenario,
            node: "n1".into(),
            leader_after: "n2".into(),
            haproxy_s,
            direct_s,
            haproxy_failed: failed,
            direct_failed: 0,
            first_failure: None,
            switched: None,
        }
    }

    fn missed(runs: &[Run]) -> Vec<String> {
        targets(runs, &[], None, None).into_iter().filter(|target| !target.met).map(|target| target.what).collect()
    }

    #[test]
    fn a_median_above_its_limit_is_a_miss_and_a_single_long_outage_is_not() {
        let runs = |long: f64| [run(Scenario::Stop, 1.0, 0.3, 4), run(Scenario::Stop, long, 0.4, 4), run(Scenario::Stop, 1.4, 0.2, 4)];
        assert_eq!(missed(&runs(60.0)), Vec::<String>::new());
        assert_eq!(missed(&[run(Scenario::Stop, 1.6, 0.6, 0)]).len(), 2);
    }

    #[test]
    fn what_is_promised_within_a_bound_is_missed_by_one_run_beyond_it() {
        assert_eq!(missed(&[run(Scenario::Power, 11.0, 10.0, 9), run(Scenario::Power, 12.1, 10.0, 9)]).len(), 1);
        assert_eq!(missed(&[run(Scenario::PowerShort, 4.9, 4.9, 9)]), Vec::<String>::new());
    }

    #[test]
    fn one_pause_beyond_the_limit_is_a_miss_when_a_standby_goes_and_three_seconds_are_left_to_one_that_goes_silent() {
        for scenario in [Scenario::StandbyStop, Scenario::StandbyKill] {
            assert_eq!(missed(&[run(scenario, 0.9, 1.0, 0)]), Vec::<String>::new());
            assert_eq!(missed(&[run(scenario, 0.1, 0.1, 0), run(scenario, 1.1, 1.2, 0)]).len(), 2);
        }
        assert_eq!(missed(&[run(Scenario::StandbySilent, 2.9, 3.0, 0)]), Vec::<String>::new());
        assert_eq!(missed(&[run(Scenario::StandbySilent, 0.1, 3.1, 0)]).len(), 1);
    }

    fn switchover(haproxy_s: f64, direct_s: f64, switched: Switched) -> Run {
        Run { switched: Some(switched), ..run(Scenario::Switchover, haproxy_s, direct_s, 9) }
    }

    #[test]
    fn a_switchover_is_held_against_the_same_by_hand_and_against_itself_directly() {
        let by_hand = |waits_s: f64| Switched { back_s: 1.0, rewound: false, by_hand: ByHand { waits_s, alone_s: 0.01 } };
        assert_eq!(missed(&[switchover(0.31, 0.3, by_hand(0.16))]), Vec::<String>::new());
        assert_eq!(missed(&[switchover(0.31, 0.3, by_hand(0.14))]).len(), 1, "more than twice as long");
        assert_eq!(missed(&[switchover(0.51, 0.3, by_hand(0.16))]).len(), 1, "longer through HAProxy by more than 0.2 s");
        let one_long = [switchover(0.9, 0.9, by_hand(0.16)), switchover(0.3, 0.3, by_hand(0.9)), switchover(0.3, 0.3, by_hand(0.16))];
        assert_eq!(missed(&one_long), Vec::<String>::new(), "medians are compared");
    }

    #[test]
    fn a_former_primary_that_is_back_late_or_not_by_following_is_one_too_many() {
        let after = |back_s: f64, rewound: bool| {
            let by_hand = ByHand { waits_s: 0.2, alone_s: 0.2 };
            switchover(0.2, 0.2, Switched { back_s, rewound, by_hand })
        };
        assert_eq!(missed(&[after(2.9, false), after(0.1, false)]), Vec::<String>::new());
        assert_eq!(missed(&[after(3.1, false), after(0.1, false)]).len(), 1);
        assert_eq!(missed(&[after(0.1, true), after(0.1, false)]).len(), 1);
    }

    #[test]
    fn one_rewind_that_takes_longer_than_its_limit_is_a_miss() {
        let rewind = |back_s: f64| Rewind { at: String::new(), node: "n1".into(), lost_bytes: 1 << 27, back_s };
        let met = |times: &[f64]| {
            targets(&[], &times.iter().copied().map(rewind).collect::<Vec<_>>(), None, None).iter().all(|target| target.met)
        };
        assert!(met(&[14.0, 14.9]) && !met(&[1.0, 15.1]));
    }

    #[test]
    fn one_failed_write_is_one_too_many_when_only_the_daemon_was_killed() {
        assert_eq!(missed(&[run(Scenario::Daemon, 0.02, 0.02, 0)]), Vec::<String>::new());
        assert_eq!(missed(&[run(Scenario::Daemon, 0.02, 0.02, 0), run(Scenario::Daemon, 0.02, 0.02, 1)]).len(), 1);
    }

    #[test]
    fn a_section_is_replaced_and_the_page_around_it_stays() {
        let page = format!("before\n{SECTION_BEGINS}\nold\n{SECTION_ENDS}\nafter\n");
        let once = replace_section(&page, "new\n\n").unwrap();
        assert_eq!(once, format!("before\n{SECTION_BEGINS}\nnew\n{SECTION_ENDS}\nafter\n"));
        assert_eq!(replace_section(&once, "new").unwrap(), once);
        assert!(replace_section("no marks", "new").is_err());
    }
}
