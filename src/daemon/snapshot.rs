//! What the HTTP API is told after each round of the machine: a copy of facts, no judgement.

use crate::clock::BootTime;
use crate::http::snapshot::{Counters, Snapshot};
use crate::machine::Machine;
use crate::machine::copying::Progress;
use crate::machine::state::State;
use crate::machine::world::Etcd;
use crate::types::ClusterName;

/// Facts that outlive one round.
#[derive(Debug, Default)]
pub struct Kept {
    /// Counted since the start.
    pub counters: Counters,
}

/// Takes the snapshot.
pub fn take(now: BootTime, cluster: &ClusterName, machine: &Machine, kept: &Kept) -> Snapshot {
    let world = machine.world();
    let record = world.written.as_ref().map(|(record, _)| record);
    let mut snapshot = Snapshot::unknown(now, world.me.name.clone(), cluster.clone());
    snapshot.declared = world.declared().is_some();
    snapshot.machine_state = machine.state().name().to_owned();
    snapshot.ends_postgres = machine.ends_postgres();
    snapshot.closed = world.is_closed();
    snapshot.role = machine.role();
    snapshot.state = machine.patroni_state().to_owned();
    snapshot.lock = world.lock.proved();
    snapshot.sustained = world.failsafe.sustained;
    snapshot.postmaster = world.guard.as_ref().map(|guard| guard.postmaster.clone());
    snapshot.unguarded = world.guard_gone;
    snapshot.probe = world.probe.clone();
    snapshot.view = world.view.clone().map(|view| (world.view_as_of, view));
    snapshot.etcd_reachable = world.etcd == Etcd::Reachable;
    if let Some((generation, spec)) = &world.spec {
        snapshot.spec = Some(std::sync::Arc::clone(spec));
        snapshot.mode = spec.replication.mode;
        snapshot.ttl = spec.ha.ttl;
        snapshot.loop_wait = spec.ha.loop_wait;
        snapshot.retry_timeout = spec.ha.retry_timeout;
        snapshot.maximum_lag_on_failover = spec.ha.maximum_lag_on_failover;
        snapshot.parameters = spec.postgres.parameters.clone();
        snapshot.observed_generation = world.in_force.as_ref().map_or(0, |files| files.generation.min(*generation));
    }
    snapshot.tags = world.declared().map(|member| member.tags_set()).unwrap_or_default();
    snapshot.conditions = world.conditions.values().cloned().collect();
    snapshot.pending_restart = world.sql().map(|sql| sql.pending_restart.clone()).unwrap_or_default();
    snapshot.server_version_num = world.sql().map(|sql| sql.server_version_num).or(world.me.versions.postgres);
    snapshot.paused = *machine.state() == State::Paused;
    snapshot.suspends = world.suspends();
    snapshot.system_id = world.sql().map(|sql| sql.system_id).or(record.and_then(|record| record.system_id));
    snapshot.copying = world.receiving.copying.as_ref().map(Progress::copying);
    snapshot.counters = kept.counters.clone();
    snapshot
}
