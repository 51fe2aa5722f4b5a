//! One run from its seed: the cluster comes up, the plan's faults strike, everything is healed, and the cluster has to come together and
//! stay calm (L1 to L5). And what is made of a run that fails: a plan with fewer faults, and its trace.

use std::time::Duration;

use pgherd::facts::cluster::Severity;
use pgherd::spec::cluster::ReplicationMode;

use super::check::Violation;
use super::clock::{Real, secs};
use super::coverage::Coverage;
use super::documents::{Replication, cascades, spec_lines, tagged};
use super::plan::{Fault, Profile, plan};
use super::postgres::Receiver;
use super::random::Random;
use super::world::{Sim, spec_of};

/// A seed is so much simulated time.
pub const RUN_S: u64 = 120;
/// The cluster has so long to come up.
const BOOTSTRAP_S: u64 = 8;
/// When everything is healed.
const HEALED_AT_S: u64 = 64;
/// How long a healed cluster may take to come together: leases, back-offs, abstention, copies.
const CONVERGES_WITHIN_S: u64 = 44;
/// A calm cluster is watched for so long at least.
const CALM_S: u64 = 8;
/// How long a standby may try a member that gives it nothing.
const TRIES_FOR_S: u64 = 8;
/// Writes to etcd of a calm cluster: each member's position and `status` once a second at the most.
const CALM_WRITES_PER_S: u64 = 6;

/// What became of a seed.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub violation: Option<Violation>,
    pub hash: u64,
    pub events: u64,
    pub simulated: Duration,
    pub faults: usize,
    /// Changes of the lock's holder after the first.
    pub changes: usize,
    pub commits: u64,
    pub coverage: Coverage,
    pub trace: Vec<String>,
    pub converged_after: Option<Duration>,
}

/// Runs a seed with the faults of its own plan.
pub fn run(seed: u64, traced: bool) -> Outcome {
    run_with(seed, plan(seed, Profile::DEFAULT), traced)
}

/// Runs a seed with these faults.
pub fn run_with(seed: u64, faults: Vec<Fault>, traced: bool) -> Outcome {
    let mut random = Random::new(seed, 4);
    let ttl = *random.pick(&[3_u64, 4, 5, 6, 8, 10]);
    let loop_wait = *random.pick(&[1_u64, 2, 3, 5]);
    let mut sim = Sim::new(seed, 3, traced);
    sim.cascades = cascades(seed);
    let names = tagged(0..sim.hosts.len(), sim.cascades);
    let mut replication = Replication::of_seed(seed);
    // One that streams from a standby does not count.
    replication.count = if sim.cascades { 1 } else { replication.count };
    sim.is_synchronous = replication != Replication::ASYNC;
    sim.replication = replication;
    sim.apply(spec_of(&names, &spec_lines(ttl, loop_wait, random.percent(60), replication)));
    let count = faults.len();
    sim.lay_out(faults);
    sim.run_until(at(BOOTSTRAP_S));
    sim.run_until(at(HEALED_AT_S));
    let mut converged_after = None;
    if sim.checks.violation.is_none() {
        sim.heal();
        converged_after = converge(&mut sim);
        if converged_after.is_some() {
            calm(&mut sim);
        }
    }
    let changes = sim.checks.leaders.windows(2).filter(|pair| pair[0].1 != pair[1].1).count();
    if let Some(violation) = sim.checks.violation.clone() {
        sim.say(None, || format!("VIOLATION of {}: {}", violation.invariant, violation.what));
    }
    Outcome {
        seed,
        violation: sim.checks.violation.clone(),
        hash: sim.trace.hash(),
        events: sim.trace.events,
        simulated: sim.now.since(Real(0)),
        faults: count,
        changes,
        commits: sim.checks.commits,
        coverage: sim.coverage.clone(),
        trace: sim.trace.lines().to_vec(),
        converged_after,
    }
}

fn at(seconds: u64) -> Real {
    Real(seconds * 1_000_000_000)
}

/// L1 and L2: one primary that holds the lock, all others streaming from it.
fn converge(sim: &mut Sim) -> Option<Duration> {
    let healed = sim.now;
    let deadline = healed.after(secs(CONVERGES_WITHIN_S));
    while sim.checks.violation.is_none() {
        if sim.has_converged() {
            return Some(sim.now.since(healed));
        }
        if sim.now >= deadline && sim.operator_has_to_decide() {
            return None;
        }
        if sim.now >= deadline {
            let story = sim.story();
            sim.checks
                .fail("L1", format!("not one primary with all others streaming within {CONVERGES_WITHIN_S} s of the last fault: {story}"));
            break;
        }
        let next = sim.now.after(Duration::from_millis(250));
        sim.run_until(next.min(deadline));
    }
    None
}

/// L3, L4 and L5: nothing changes hands without a cause, nothing is written but positions, every request has its answer, and the whole
/// of the WAL is one history.
fn calm(sim: &mut Sim) {
    let settle = sim.now.after(secs(6));
    sim.run_until(settle);
    let (changes, begun, writes) = (sim.checks.leaders.len(), sim.now, sim.etcd.writes);
    let written_by = sim.leader().and_then(|leader| sim.hosts[leader].server.data.as_ref()).map(|data| data.wal.end);
    let asked = sim.etcd.view.requests.values().filter(|key| key.record.progress.is_open()).count();
    let until = at(RUN_S).max(sim.now.after(secs(CALM_S)));
    sim.run_until(until);
    if sim.checks.violation.is_some() {
        return;
    }
    // A switchover that was asked for in the storm is a cause.
    if sim.checks.leaders.len() > changes + asked {
        return sim.checks.fail("L4", "the lock changed hands although nothing was wrong".to_owned());
    }
    if !comes_together(sim) {
        let story = sim.story();
        return sim.checks.fail("L1", format!("a healed cluster fell apart: {story}"));
    }
    let (written, seconds) = (sim.etcd.writes - writes, sim.now.since(begun).as_secs().max(1));
    if written > CALM_WRITES_PER_S * seconds {
        return sim.checks.fail("L5", format!("{written} writes to etcd in {seconds} calm seconds"));
    }
    let open = sim.etcd.view.requests.iter().find(|(_, key)| key.record.progress.is_open());
    if let Some((id, key)) = open {
        let what = format!("request {id} was never answered: {:?}", key.record.progress);
        return sim.checks.fail("L2", what);
    }
    let newest = sim.etcd.view.spec.as_ref().map_or(0, |spec| spec.generation);
    let behind = sim.hosts.iter().find(|host| {
        let taken = host.daemon.as_ref().and_then(|daemon| daemon.machine.world().in_force.as_ref()).map_or(0, |files| files.generation);
        taken != newest
    });
    if let Some(host) = behind {
        let what = format!("{} has not taken up generation {newest} of the spec", host.name);
        return sim.checks.fail("L3", what);
    }
    let has_all = |host: &super::host::Host| host.server.data.as_ref().is_some_and(|data| Some(data.wal.end) >= written_by);
    if !sim.hosts.iter().all(has_all) {
        let story = sim.story();
        return sim.checks.fail("L1", format!("a standby that streams has not got what was written up to {written_by:?}: {story}"));
    }
    sim.commits_wait_as_wanted();
    sim.one_history();
}

/// One that tries whether a member gives it something again streams from nobody meanwhile.
fn comes_together(sim: &mut Sim) -> bool {
    let tries = sim.hosts.iter().any(|host| host.refuses.is_some());
    let until = sim.now.after(if tries { secs(TRIES_FOR_S) } else { secs(0) });
    while !sim.has_converged() && sim.now < until {
        let next = sim.now.after(Duration::from_millis(250));
        sim.run_until(next);
    }
    sim.has_converged()
}

impl Sim {
    fn leader(&self) -> Option<usize> {
        let holder = self.etcd.view.leader.as_ref()?.holder.clone();
        self.hosts.iter().position(|host| host.name.as_str() == holder)
    }

    pub fn has_converged(&self) -> bool {
        let Some(leader) = self.leader() else { return false };
        self.hosts.iter().enumerate().all(|(index, host)| {
            let Some(daemon) = &host.daemon else { return false };
            let state = daemon.machine.state().name();
            if index == leader {
                state == "primary" && host.server.acknowledges(self.now) && !self.is_closed(index)
            } else {
                state == "following" && self.streams_in_the_end_from(leader, index)
            }
        })
    }

    /// However many are between: nothing goes round in a circle.
    fn streams_in_the_end_from(&self, leader: usize, standby: usize) -> bool {
        let source = |host: usize| match self.hosts[host].server.postmaster.as_ref().map(|postmaster| postmaster.receiver) {
            Some(Receiver::Streaming { from, .. }) => Some(from),
            Some(Receiver::Waiting) | None => None,
        };
        let chain = std::iter::successors(Some(standby), |host| source(*host));
        chain.take(self.hosts.len()).any(|host| host == leader)
    }

    /// The data that was ahead is lost, or is a promotion's by hand, or etcd forgot who led; nobody leads, and every member says why it may
    /// not. Only an operator can choose what is given up (P2 in async, rows 43, 66, 69 and 72).
    fn operator_has_to_decide(&self) -> bool {
        let conditions = |host: &super::host::Host| host.daemon.as_ref().map(|daemon| daemon.machine.world().conditions.clone());
        let says = |host: &super::host::Host, kind: &str, least: Severity| {
            conditions(host).is_some_and(|conditions| conditions.get(kind).is_some_and(|one| one.severity == least))
        };
        let one_does_not_start = self.hosts.iter().any(|host| says(host, "start_failed", Severity::Warning));
        let says_why = |host: &super::host::Host| {
            let warns = |kind| says(host, kind, Severity::Warning);
            // Who waits for the one that does not start says so, and that one warns.
            let waits = one_does_not_start && says(host, "waiting_to_lead", Severity::Info);
            let has_nothing = host.server.data.is_none() && says(host, "waiting_to_initialize", Severity::Info);
            warns("waiting_to_lead") || warns("waiting_to_initialize") || warns("start_failed") || waits || has_nothing
        };
        let possible = self.checks.data_was_lost || self.checks.etcd_forgot || self.checks.put_back.is_some();
        possible && self.leader().is_none() && self.hosts.iter().all(says_why)
    }

    /// L3 and I5 at the end: commits wait for as many as the spec says, and everything that was acknowledged is there.
    fn commits_wait_as_wanted(&mut self) {
        let Some(leader) = self.leader() else { return };
        let view = self.etcd.view.clone();
        self.checks.judge_acknowledged(leader, &view, &self.hosts);
        self.checks.judge_record(&view, &self.hosts);
        let copies = view.sync.as_ref().map_or(0, |record| record.copies);
        // What etcd has, which may have gone back to an older one.
        let spec = view.spec.as_ref().and_then(|spec| self.specs.get(&spec.generation));
        let wanted = spec.map_or(0, |spec| match spec.replication.mode {
            ReplicationMode::Async => 0,
            ReplicationMode::Quorum | ReplicationMode::Sync => spec.replication.synchronous_node_count + 1,
        });
        if copies != wanted {
            let story = self.story();
            let what = format!("sync says that {copies} members have each commit, the spec says {wanted}: {:?}; {story}", view.sync);
            self.checks.fail("L3", what);
        }
    }

    /// I5, I8 and I9 at the end: what standbys have is, record for record, in the primary's past.
    fn one_history(&mut self) {
        if self.checks.mixed_by_hand {
            return;
        }
        let Some(leader) = self.leader() else { return };
        let Some(primary) = self.hosts[leader].server.data.as_ref().map(|data| data.wal.clone()) else { return };
        for host in 0..self.hosts.len() {
            let apart = self.hosts[host].server.data.as_ref().is_some_and(|data| !data.wal.is_in_the_past_of(&primary));
            if apart {
                let what = format!("{} has WAL that the primary has not", self.hosts[host].name);
                self.checks.fail("I8", what);
            }
        }
    }

    /// Where everybody is.
    pub fn story(&self) -> String {
        use std::fmt::Write as _;
        let mut story = format!("lock {:?}", self.etcd.view.leader.as_ref().map(|leader| &leader.holder));
        let view = &self.etcd.view;
        if let Some(maintenance) = &view.maintenance {
            let heard: Vec<_> = view.members.iter().map(|(name, key)| (name, key.record.maintenance)).collect();
            let _ = write!(story, "; {maintenance:?} at {}, suspended {:?}, heard {heard:?}", view.maintenance_revision, view.suspended);
        }
        for host in &self.hosts {
            let machine = host.daemon.as_ref().map(|daemon| {
                let world = daemon.machine.world();
                let conditions: Vec<_> = world.conditions.values().map(|condition| condition.message.as_str()).collect();
                (daemon.machine.state().name(), world.lock, world.in_flight.clone(), conditions)
            });
            let wal = host.server.data.as_ref().map(|data| (data.wal.timeline(), data.wal.end));
            let _ = write!(story, "; {}: {machine:?} exit {:?} {:?} {wal:?}", host.name, host.exit, host.server.postmaster);
        }
        story
    }
}

/// A plan with fewer faults that fails in the same way: halves first, then one by one.
pub fn shrink(seed: u64, invariant: &'static str) -> Vec<Fault> {
    let fails = |faults: &[Fault]| run_with(seed, faults.to_vec(), false).violation.is_some_and(|found| found.invariant == invariant);
    let mut faults = plan(seed, Profile::DEFAULT);
    let mut size = faults.len().div_ceil(2);
    while size > 0 {
        let mut from = 0;
        while from < faults.len() {
            let mut fewer = faults.clone();
            fewer.drain(from..(from + size).min(faults.len()));
            if fails(&fewer) {
                faults = fewer;
            } else {
                from += size;
            }
        }
        size /= 2;
    }
    faults
}
