//! What is done to the cluster, and how it is brought back.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use serde::Serialize;

use super::super::cluster::{LocalCluster, remove_dir};
use super::super::drill::leader;
use super::super::http;
use super::super::process::ProcessId;
use super::super::status::{Status, StatusMember};
use super::ask::streaming;
use super::clients::Client;
use super::floor::Floor;
use super::waiting;
use crate::clock::{BootTime, wall_clock};
use crate::facts::cluster::DecisionRecord;
use crate::postgres::layout::Layout;

/// The service's RestartSec (deploy/pgherd.service), in milliseconds.
const RESTART_AFTER_MS: u64 = 100;
/// pgherd takes three ends of one process within a minute for a crash loop, which is not what is measured here.
const CRASH_WINDOW_MS: u64 = 61_000;
/// How often one node may have one fault within that window: its promotion is a start too.
const FAULTS_IN_WINDOW_MAX: usize = 2;
/// Limit of one question to a member, in milliseconds.
const ASK_LIMIT_MS: u64 = 1_000;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// SIGTERM to the primary's daemon, as systemctl stop sends it
    Stop,
    /// SIGKILL to the primary's postmaster
    Postmaster,
    /// SIGKILL to the primary's daemon, which is started again after 100 ms
    Daemon,
    /// pgherd switchover --to a standby
    Switchover,
    /// SIGKILL to daemon, guard and PostgreSQL of the primary, with a ttl of 10 s
    Power,
    /// The same with a ttl of 3 s
    PowerShort,
    /// SIGTERM to the daemon of a standby
    StandbyStop,
    /// SIGKILL to daemon, guard and PostgreSQL of a standby
    StandbyKill,
    /// SIGSTOP to all of a standby: it is silent, and its connections stay open
    StandbySilent,
    /// A start of a former primary with 100 MB of WAL that nobody else has
    Rewind,
    /// Memory, CPU and requests to etcd while nothing happens
    Idle,
    /// What quorum costs over async, beside PostgreSQL without pgherd
    Overhead,
}

impl Scenario {
    /// The ttl it is measured with, in seconds.
    pub fn ttl_s(self) -> u32 {
        if matches!(self, Scenario::PowerShort | Scenario::Rewind) { 3 } else { 10 }
    }

    /// Whether it is done to a standby, and not to the primary.
    fn is_of_standby(self) -> bool {
        matches!(self, Scenario::StandbyStop | Scenario::StandbyKill | Scenario::StandbySilent)
    }

    /// For a table.
    pub fn title(self) -> &'static str {
        match self {
            Scenario::Stop => "clean stop of the primary's daemon (SIGTERM)",
            Scenario::Postmaster => "SIGKILL of the primary's postmaster",
            Scenario::Daemon => "SIGKILL of the primary's daemon, restarted after 100 ms",
            Scenario::Switchover => "`pgherd switchover --to`",
            Scenario::Power => "SIGKILL of everything on the primary, ttl 10 s",
            Scenario::PowerShort => "SIGKILL of everything on the primary, ttl 3 s",
            Scenario::StandbyStop => "clean stop of a standby's daemon (SIGTERM)",
            Scenario::StandbyKill => "SIGKILL of everything on a standby",
            Scenario::StandbySilent => "SIGSTOP of everything on a standby",
            Scenario::Rewind => "former primary with 100 MB of WAL of its own",
            Scenario::Idle => "idle",
            Scenario::Overhead => "overhead",
        }
    }
}

/// One run of one scenario.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// When, wall clock: to be found in the logs.
    pub at: String,
    /// What was done.
    pub scenario: Scenario,
    /// To which node.
    pub node: String,
    /// Who led afterwards.
    pub leader_after: String,
    /// The longest time without an acknowledged write through HAProxy, in seconds.
    pub haproxy_s: f64,
    /// The same, seen by the client that goes to the nodes, in seconds.
    pub direct_s: f64,
    /// Writes and connections through HAProxy that were not acknowledged.
    pub haproxy_failed: usize,
    /// Writes and connections to the node that led which were not acknowledged.
    pub direct_failed: usize,
    /// The first such failure, either way.
    pub first_failure: Option<String>,
    /// Of a switchover.
    pub switched: Option<Switched>,
}

/// The outage of a switchover by hand, in seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ByHand {
    /// Commits wait for one of two standbys, as pgherd's do.
    pub waits_s: f64,
    /// No commit waits for a standby.
    pub alone_s: f64,
}

/// What else is seen of a switchover.
#[derive(Debug, Clone, Serialize)]
pub struct Switched {
    /// From the last row that the former primary acknowledged until it streamed from the new one, in seconds.
    pub back_s: f64,
    /// It did not just follow: it was rewound, or copied.
    pub rewound: bool,
    /// The outage of the same by hand, just after, in seconds.
    pub by_hand: ByHand,
}

impl Switched {
    /// For the line of a run.
    pub fn text(&self) -> String {
        let by = if self.rewound { ", not by following" } else { "" };
        let ByHand { waits_s, alone_s } = self.by_hand;
        format!(", former primary back {:.3} s{by}, by hand {waits_s:.3} s, without a standby's word {alone_s:.3} s", self.back_s)
    }
}

/// A cluster under two clients.
pub struct Rounds<'a> {
    /// The cluster.
    pub cluster: &'a LocalCluster,
    /// Set when somebody pressed Ctrl-C.
    pub stop: &'a AtomicBool,
    haproxy: Client,
    direct: Client,
    /// For switchovers.
    floor: Option<Floor<'a>>,
    faults: BTreeMap<(Scenario, usize), Vec<BootTime>>,
}

impl<'a> Rounds<'a> {
    /// Starts the clients. Switchovers need a floor.
    pub fn begin(cluster: &'a LocalCluster, floor: Option<Floor<'a>>, stop: &'a AtomicBool) -> Result<Rounds<'a>> {
        let write_port = cluster.plan.frontends.context("the measurement needs HAProxy")?.write;
        let nodes: Result<Vec<_>> = cluster.plan.nodes.iter().map(|node| cluster.connection(node.declared.port)).collect();
        let (haproxy, direct) = (Client::through_haproxy(cluster.connection(write_port)?)?, Client::direct(nodes?)?);
        Ok(Rounds { cluster, stop, haproxy, direct, floor, faults: BTreeMap::new() })
    }

    /// Ends the clients.
    pub fn end(self) -> Result<()> {
        self.haproxy.end()?;
        self.direct.end()?;
        self.floor.map_or(Ok(()), Floor::end)
    }

    /// Does one scenario to a cluster that has settled, and waits until it has again.
    pub fn run(&mut self, scenario: Scenario) -> Result<Run> {
        let (_, primary) = leader(self.cluster)?;
        let index = if scenario.is_of_standby() { self.a_standby_of(primary, scenario)? } else { primary };
        let node = self.cluster.name(index).to_owned();
        self.not_a_crash_loop(scenario, index)?;
        let (at, fault) = (wall_clock(), BootTime::now());
        self.faults.entry((scenario, index)).or_default().push(fault);
        self.inflict(scenario, index).with_context(|| format!("{scenario:?} on {node}"))?;
        let back_s = if scenario == Scenario::Switchover { Some(self.back_after(primary)?) } else { None };
        self.settle().with_context(|| format!("after {scenario:?} on {node}"))?;
        let mut run = self.judge(scenario, (at, node), primary, fault)?;
        if let Some(back_s) = back_s {
            let (rewound, by_hand) = (self.was_rewound(primary, &run.at)?, self.by_hand()?);
            run.switched = Some(Switched { back_s, rewound, by_hand });
        }
        Ok(run)
    }

    /// To whom a switchover goes.
    fn successor_of(&self, index: usize) -> usize {
        (index + 1) % self.cluster.plan.nodes.len()
    }

    /// Waits until the former primary streams. The seconds since it acknowledged its last row.
    fn back_after(&self, former: usize) -> Result<f64> {
        let new = self.cluster.connection(self.cluster.plan.nodes[self.successor_of(former)].declared.port)?;
        let streams = || streaming(&new).is_ok_and(|names| names.iter().any(|name| name == self.cluster.name(former)));
        waiting::until(self.stop, "the former primary does not stream", streams)?;
        let back = BootTime::now();
        let of_former = |tried: &super::clients::Tried| tried.failure.is_none() && tried.node == Some(former);
        let last = self.direct.tried().into_iter().filter(of_former).map(|tried| tried.ended).max();
        Ok(back.since(last.context("the former primary acknowledged no row")?).as_secs_f64())
    }

    /// A member was brought back by more than following, since then.
    fn was_rewound(&self, index: usize, since: &str) -> Result<bool> {
        let said = self.cluster.pgherd(&["events", "-o", "json", "--limit", "1000"])?;
        ensure!(said.code == Some(0), "pgherd events: exit {:?}: {}", said.code, said.err.trim());
        let events: Vec<DecisionRecord> = serde_json::from_str(&said.out).context("reading what pgherd events said")?;
        let of_it = |event: &DecisionRecord| event.member.as_str() == self.cluster.name(index) && event.at.as_str() >= since;
        Ok(events.iter().any(|event| of_it(event) && ["rewind", "reclone"].contains(&event.kind.as_str())))
    }

    /// The same as a switchover by hand, while nothing is written to the cluster.
    fn by_hand(&mut self) -> Result<ByHand> {
        let floor = self.floor.as_mut().context("there are no servers to switch over by hand")?;
        [&self.haproxy, &self.direct].iter().for_each(|client| client.pause(true));
        let waits_s = floor.measure(true, self.stop)?.as_secs_f64();
        let alone_s = floor.measure(false, self.stop)?.as_secs_f64();
        [&self.haproxy, &self.direct].iter().for_each(|client| client.pause(false));
        self.rows_flow(BootTime::now())?;
        Ok(ByHand { waits_s, alone_s })
    }

    /// The one that has met this scenario least often.
    fn a_standby_of(&self, primary: usize, scenario: Scenario) -> Result<usize> {
        let met = |index: &usize| self.faults.get(&(scenario, *index)).map_or(0, Vec::len);
        let standbys = (0..self.cluster.plan.nodes.len()).filter(|index| *index != primary);
        standbys.min_by_key(met).context("there is no standby")
    }

    fn inflict(&self, scenario: Scenario, index: usize) -> Result<()> {
        let daemon = self.cluster.daemon(index).context("its daemon does not run")?;
        match scenario {
            Scenario::Stop => {
                daemon.signal(Signal::SIGTERM);
                self.gone(daemon)?;
                self.rows_flow(BootTime::now())?;
                self.cluster.start_node(index)?;
            }
            Scenario::Postmaster => {
                let postmaster = self.cluster.postmaster(index).context("its postmaster does not run")?;
                postmaster.signal(Signal::SIGKILL);
                self.gone(postmaster)?;
                self.rows_flow(BootTime::now())?;
            }
            Scenario::Daemon => {
                daemon.signal(Signal::SIGKILL);
                self.gone(daemon)?;
                std::thread::sleep(Duration::from_millis(RESTART_AFTER_MS));
                self.cluster.start_node(index)?;
                let api = self.cluster.plan.nodes[index].api_listen;
                let leads = || http::ask("GET", api, "/primary", Duration::from_millis(ASK_LIMIT_MS)).is_ok_and(|(code, _)| code == 200);
                self.wait("the restarted daemon does not say that it leads", leads)?;
                self.rows_flow(BootTime::now())?;
            }
            Scenario::Switchover => {
                let target = self.cluster.name(self.successor_of(index));
                let said = self.cluster.pgherd(&["switchover", "--to", target, "--yes"])?;
                ensure!(said.code == Some(0), "pgherd switchover: exit {:?}: {}", said.code, said.err.trim());
            }
            Scenario::Power | Scenario::PowerShort => {
                self.cluster.cut_power(index);
                self.rows_flow(BootTime::now())?;
                self.cluster.start_node(index)?;
            }
            Scenario::StandbyStop => {
                daemon.signal(Signal::SIGTERM);
                self.gone(daemon)?;
                self.rows_flow_without(index)?;
                self.cluster.start_node(index)?;
            }
            Scenario::StandbyKill => {
                self.cluster.cut_power(index);
                self.rows_flow_without(index)?;
                self.cluster.start_node(index)?;
            }
            Scenario::StandbySilent => {
                // Once more: a postmaster may have had a child on the way.
                for _ in 0..2 {
                    self.cluster.processes(index).iter().for_each(|id| id.signal(Signal::SIGSTOP));
                }
                let flow = self.rows_flow_without(index);
                self.cluster.processes(index).iter().for_each(|id| id.signal(Signal::SIGCONT));
                flow?;
            }
            Scenario::Rewind | Scenario::Idle | Scenario::Overhead => {}
        }
        Ok(())
    }

    /// Waits until commits wait for this standby no more, which is a change of the names of its own, and for rows after that.
    fn rows_flow_without(&self, index: usize) -> Result<()> {
        let not_named = |status: &Status| !status.member(self.cluster.name(index)).is_some_and(StatusMember::is_waited_for);
        waiting::until_status(self.cluster, self.stop, "commits still wait for it", not_named)?;
        self.rows_flow(BootTime::now())
    }

    fn judge(&self, scenario: Scenario, (at, node): (String, String), primary: usize, fault: BootTime) -> Result<Run> {
        let failures = |client: &Client| -> Vec<String> {
            let of_leader = |tried: &super::clients::Tried| tried.node.is_none_or(|node| node == primary);
            client.tried().into_iter().filter(|tried| tried.ended > fault && of_leader(tried)).filter_map(|tried| tried.failure).collect()
        };
        let (haproxy_failed, direct_failed) = (failures(&self.haproxy), failures(&self.direct));
        let run = Run {
            at,
            scenario,
            node,
            leader_after: leader(self.cluster)?.0,
            haproxy_s: self.haproxy.outage_after(fault)?.as_secs_f64(),
            direct_s: self.direct.outage_after(fault)?.as_secs_f64(),
            haproxy_failed: haproxy_failed.len(),
            direct_failed: direct_failed.len(),
            first_failure: direct_failed.first().or(haproxy_failed.first()).cloned(),
            switched: None,
        };
        let now = BootTime::now();
        self.haproxy.forget_before(now);
        self.direct.forget_before(now);
        Ok(run)
    }

    fn rows_flow(&self, since: BootTime) -> Result<()> {
        waiting::until_rows_flow(self.stop, &[&self.haproxy, &self.direct], since)
    }

    fn gone(&self, id: ProcessId) -> Result<()> {
        self.wait("a process does not end", || !id.is_alive())
    }

    fn not_a_crash_loop(&mut self, scenario: Scenario, index: usize) -> Result<()> {
        let before = match scenario {
            Scenario::Postmaster | Scenario::Daemon => self.faults.get(&(scenario, index)).cloned().unwrap_or_default(),
            Scenario::Stop
            | Scenario::Switchover
            | Scenario::Power
            | Scenario::PowerShort
            | Scenario::StandbyStop
            | Scenario::StandbyKill
            | Scenario::StandbySilent
            | Scenario::Rewind
            | Scenario::Idle
            | Scenario::Overhead => return Ok(()),
        };
        let lately = || {
            before.iter().filter(|at| BootTime::now().since(**at) < Duration::from_millis(CRASH_WINDOW_MS)).count() < FAULTS_IN_WINDOW_MAX
        };
        self.wait("time does not pass", lately)
    }

    /// Waits until the cluster is ready, and for rows after that.
    pub fn settle(&self) -> Result<()> {
        self.wait_until_ready()?;
        self.rows_flow(BootTime::now())
    }

    /// Waits until one leads, all others stream and may acknowledge commits, and nobody has a condition worse than a piece of information.
    fn wait_until_ready(&self) -> Result<()> {
        let nodes = self.cluster.plan.nodes.len();
        let ready = |status: &Status| status.is_whole(nodes) && status.is_durable(nodes) && status.is_calm();
        waiting::until_status(self.cluster, self.stop, "the cluster is not ready again", ready)?;
        self.remove_kept()
    }

    /// What a person would do between two failovers: a member keeps one diverged data directory, and a second waits until that is gone.
    fn remove_kept(&self) -> Result<()> {
        for index in 0..self.cluster.plan.nodes.len() {
            let kept = Layout::new(&self.cluster.data_dir(index), None)?.kept_dir();
            if kept.exists() {
                remove_dir(&kept)?;
            }
        }
        Ok(())
    }

    fn wait(&self, what: &str, condition: impl FnMut() -> bool) -> Result<()> {
        waiting::until(self.stop, what, condition)
    }
}
