//! What the HTTP API knows: the machine's last state as plain data, published by the daemon's shell through a `watch` channel.
//!
//! A snapshot may be old when it is read. Nothing in here is an answer: whether a fact still counts is decided against the clock at
//! the moment of each request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, Condition, MemberRole};
use crate::facts::copying::Copying;
use crate::facts::guard::{LockFacts, PostmasterFacts};
use crate::facts::postgres::{Probe, ProbeOutcome, SqlFacts};
use crate::spec::cluster::{ClusterSpec, ReplicationMode};
use crate::types::{ClusterName, MemberName, SystemId};

/// Everything that answers are made of.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// When the shell made this: every answer carries its age.
    pub taken: BootTime,
    /// When the daemon's loop last began a round: `/liveness`.
    pub loop_heartbeat: BootTime,
    /// This member.
    pub member: MemberName,
    /// The cluster.
    pub cluster: ClusterName,
    /// Whether `spec.members` names this member.
    pub declared: bool,
    /// The leaf state of the machine: `following`, `primary` …
    pub machine_state: String,
    /// The machine has ordered PostgreSQL's end, or is about to: leader paths say so before the first session notices.
    pub ends_postgres: bool,
    /// Clients are kept out of PostgreSQL for now.
    pub closed: bool,
    /// What this member's PostgreSQL is, as in the member record.
    pub role: MemberRole,
    /// Patroni's word for the state, as in the member record.
    pub state: String,
    /// OUR lock, as the guard has it; None when it is not ours.
    pub lock: Option<LockFacts>,
    /// E, when our lock goes on by the promises of all others because etcd cannot be asked.
    pub sustained: Option<BootTime>,
    /// What the guard says of the postmaster; None when the guard cannot be asked.
    pub postmaster: Option<PostmasterFacts>,
    /// The guard is gone, and nobody has proved yet that no PostgreSQL is left.
    pub unguarded: bool,
    /// The last probe, whatever it saw.
    pub probe: Option<Probe>,
    /// The last view of etcd, and as of when it was known to be current.
    pub view: Option<(BootTime, Arc<ClusterView>)>,
    /// Whether etcd answers.
    pub etcd_reachable: bool,
    /// The spec in force.
    pub spec: Option<Arc<ClusterSpec>>,
    /// `replication.mode`.
    pub mode: ReplicationMode,
    /// `ha.ttl`.
    pub ttl: Duration,
    /// `ha.loop_wait`: also the greatest age of a probe that health rules accept.
    pub loop_wait: Duration,
    /// `ha.retry_timeout`.
    pub retry_timeout: Duration,
    /// `ha.maximum_lag_on_failover`, in bytes.
    pub maximum_lag_on_failover: u64,
    /// `postgres.parameters` of the spec in force, for `/config`.
    pub parameters: BTreeMap<String, Option<String>>,
    /// This member's tags: what is set, Patroni's names.
    pub tags: BTreeMap<String, serde_json::Value>,
    /// What is in the way of the spec on this member.
    pub conditions: Vec<Condition>,
    /// Names of parameters that wait for a restart.
    pub pending_restart: Vec<String>,
    /// Maintenance mode is on, for this member.
    pub paused: bool,
    /// Maintenance mode: the guard ends no PostgreSQL whose lock is not proved.
    pub suspends: bool,
    /// The spec generation taken up; 0 = none.
    pub observed_generation: u64,
    /// PostgreSQL's `server_version_num`, of the running server or of the binaries.
    pub server_version_num: Option<u32>,
    /// From the control file.
    pub system_id: Option<SystemId>,
    /// The copy, or the rewind, that is being made for this member.
    pub copying: Option<Copying>,
    /// Counted since the daemon's start.
    pub counters: Counters,
}

/// What the daemon counts, for `/metrics`. Counted from its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times this member became primary.
    pub promotions: u64,
    /// Times it left being primary, by reason (the edge's stable word, never free text: each is a time series).
    pub demotions: BTreeMap<String, u64>,
    /// Renewals of the lease that were proved.
    pub renewals: u64,
    /// Renewals that failed or came without a proof in time.
    pub renewal_failures: u64,
}

impl Snapshot {
    /// A snapshot of a member about which nothing is known yet: every health path answers 503.
    pub fn unknown(now: BootTime, member: MemberName, cluster: ClusterName) -> Self {
        Self {
            taken: now,
            loop_heartbeat: now,
            member,
            cluster,
            declared: false,
            machine_state: "starting".to_owned(),
            ends_postgres: false,
            closed: false,
            role: MemberRole::Uninitialized,
            state: "starting".to_owned(),
            lock: None,
            sustained: None,
            postmaster: None,
            unguarded: false,
            probe: None,
            view: None,
            etcd_reachable: false,
            spec: None,
            mode: ReplicationMode::Async,
            ttl: Duration::from_secs(10),
            loop_wait: Duration::from_secs(5),
            retry_timeout: Duration::from_secs(3),
            maximum_lag_on_failover: 1024 * 1024,
            parameters: BTreeMap::new(),
            tags: BTreeMap::new(),
            conditions: Vec::new(),
            pending_restart: Vec::new(),
            paused: false,
            copying: None,
            suspends: false,
            observed_generation: 0,
            server_version_num: None,
            system_id: None,
            counters: Counters::default(),
        }
    }

    /// What the last probe saw, if it saw PostgreSQL accept connections and is not older than `loop_wait`. A later probe that failed
    /// leaves nothing: the value before it is not the truth any more.
    pub fn fresh_sql(&self, now: BootTime) -> Option<&SqlFacts> {
        let probe = self.probe.as_ref()?;
        match &probe.outcome {
            ProbeOutcome::Accepting(sql) if now.since(probe.begun) <= self.loop_wait => Some(sql),
            _ => None,
        }
    }

    /// Whether this member leads by the promises of the others.
    pub fn leads_without_etcd(&self, now: BootTime) -> bool {
        self.lock.is_some() && self.sustained.is_some_and(|until| now < until)
    }

    /// The word for a member that commits wait for, as `sync` has it: `sync_standby` or `quorum_standby`. None = it is none.
    pub fn synchronous_role(&self, view: &ClusterView, name: &MemberName) -> Option<&'static str> {
        let word = if self.mode == ReplicationMode::Sync { "sync_standby" } else { "quorum_standby" };
        view.sync.as_ref().is_some_and(|record| record.is_standby(name)).then_some(word)
    }

    /// etcd's view, while etcd answers.
    pub fn current_view(&self) -> Option<&ClusterView> {
        self.view.as_ref().filter(|_| self.etcd_reachable).map(|(_, view)| view.as_ref())
    }

    /// A tag that is on: Patroni's tags are booleans, yet people write `"true"`.
    pub fn tag_is_on(&self, name: &str) -> bool {
        match self.tags.get(name) {
            Some(serde_json::Value::Bool(on)) => *on,
            Some(serde_json::Value::String(text)) => matches!(text.to_ascii_lowercase().as_str(), "true" | "yes" | "on" | "1"),
            _ => false,
        }
    }
}
