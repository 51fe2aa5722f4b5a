//! The cluster documents of runs: what a seed asks for, and what is edited while it runs.

use super::plan::Fault;
use super::random::Random;
use super::world::{Sim, member, spec_of};

/// The values of ttl that specs are edited to, in seconds.
pub const TTLS: [u64; 6] = [3, 4, 5, 6, 8, 10];

/// How the spec has it replicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replication {
    pub mode: &'static str,
    pub count: u32,
    pub strict: bool,
}

impl Replication {
    pub const ASYNC: Replication = Replication { mode: "async", count: 1, strict: false };

    /// Half of the runs never wait for a standby, and are what they were before any could.
    pub fn of_seed(seed: u64) -> Replication {
        let mut random = Random::new(seed, 5);
        if random.percent(50) { Replication::ASYNC } else { Replication::waiting(random.number()) }
    }

    pub fn waiting(choice: u64) -> Replication {
        let mode = if choice.is_multiple_of(3) { "sync" } else { "quorum" };
        Replication { mode, count: if (choice / 16).is_multiple_of(4) { 2 } else { 1 }, strict: (choice / 64).is_multiple_of(4) }
    }
}

/// The lines of `spec:` that runs use.
pub fn spec_lines(ttl_s: u64, loop_wait_s: u64, failsafe: bool, replication: Replication) -> String {
    let Replication { mode, count, strict } = replication;
    let waits =
        if mode == "async" { ", use_slots: false".to_owned() } else { format!(", synchronous_node_count: {count}, strict: {strict}") };
    format!(
        "ha: {{ ttl: {ttl_s}s, loop_wait: {loop_wait_s}s, primary_start_timeout: 12s, primary_stop_timeout: 6s, failsafe: {failsafe} }}\n\
         replication: {{ mode: {mode}{waits} }}\n\
         postgres: {{ archive_command: cp %p /archive/%f }}"
    )
}

/// In some runs `c` is to stream from `b`, of which copies are made, too.
pub const UPSTREAM: (usize, usize) = (1, 2);

/// Whether it is so in the runs of a seed.
pub fn cascades(seed: u64) -> bool {
    Random::new(seed, 8).percent(25)
}

/// The members of a document, with their tags.
pub fn tagged(hosts: impl Iterator<Item = usize>, cascades: bool) -> Vec<String> {
    let hosts: Vec<usize> = hosts.collect();
    let (from, to) = UPSTREAM;
    let tags = |host: usize| match host {
        _ if !cascades => String::new(),
        _ if host == from => ", tags: { clonefrom: true }".to_owned(),
        _ if host == to && hosts.contains(&from) => format!(", tags: {{ replicatefrom: {} }}", member(from)),
        _ => String::new(),
    };
    hosts.iter().map(|host| format!("{}{}", member(*host), tags(*host))).collect()
}

impl Sim {
    /// The leader is not removed: apply refuses that (row 73).
    pub fn remove_member(&mut self, fault: &Fault, host: usize) {
        let leads = |host: usize| self.etcd.view.leader.as_ref().is_some_and(|leader| leader.holder == member(host).as_str());
        // Nor is one that is not there: what it has is not known.
        let is_there = |host: usize| self.etcd.view.members.contains_key(&member(host));
        let victim = (0..self.hosts.len()).map(|step| (host + step) % self.hosts.len()).find(|host| !leads(*host) && is_there(*host));
        if victim.is_some() {
            self.edit_spec(fault.choice, victim);
        }
    }

    pub fn edit_spec(&mut self, choice: u64, without: Option<usize>) {
        let ttl = TTLS[(choice % 6) as usize];
        let loop_wait = [1, 2, 3, 5][(choice / 8 % 4) as usize];
        let members = (0..self.hosts.len()).filter(|index| Some(*index) != without);
        let members = tagged(members, self.cascades);
        if self.is_synchronous {
            // At run time in both directions.
            let changed = self.timing.number();
            self.replication = match changed % 8 {
                0 => Replication::ASYNC,
                1..4 => Replication::waiting(changed / 8),
                _ => self.replication,
            };
        }
        // One that streams from a standby does not count.
        let count_fits = members.len() > self.replication.count as usize && !self.cascades;
        let replication = if count_fits { self.replication } else { Replication { count: 1, ..self.replication } };
        let spec = spec_of(&members, &spec_lines(ttl, loop_wait, !(choice / 64).is_multiple_of(4), replication));
        self.apply(spec);
    }
}
