//! What `pgherd status` says: a pure function of etcd's view and the spec. Its JSON is a contract that scripts rely on.
//!
//! A position, timeline or lag that is not known is null, never zero; a declared member without a key is listed, as `unknown`. The
//! report is made from etcd alone: what a cut-off member does beyond what it last wrote is not in it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::facts::cluster::{ClusterView, Condition, Initialize, MemberKey, MemberRecord, MemberRole, Severity};
use crate::facts::copying::Copying;
use crate::facts::maintenance::{MaintenanceRecord, Phase};
use crate::facts::requests::{Ask, RequestProgress};
use crate::spec::cluster::ReplicationMode;
use crate::types::{ClusterName, Lsn, MemberName, SystemId, TimelineId};

/// State of a member whose key is not there.
pub const NO_KEY: &str = "unknown";

/// What the spec says, as far as a status needs it.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The declared members.
    pub members: Vec<Declared>,
    /// `ha.maximum_lag_on_failover`, in bytes.
    pub maximum_lag_on_failover: u64,
    /// `replication.mode`.
    pub mode: ReplicationMode,
    /// What the spec itself gives rise to, such as parts that are not built yet.
    pub conditions: Vec<Condition>,
}

/// A declared member.
#[derive(Debug, Clone)]
pub struct Declared {
    /// Its name.
    pub name: MemberName,
    /// `address:port` of its PostgreSQL.
    pub host: String,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StatusReport {
    /// The cluster.
    pub cluster: ClusterName,
    /// Counts applied specs; null when none is there.
    pub generation: Option<u64>,
    /// When etcd was asked, wall clock, RFC 3339.
    pub as_of: String,
    /// Who holds the lock.
    pub leader: Option<String>,
    /// The leader's timeline.
    pub timeline: Option<TimelineId>,
    /// Declared members and whoever else has a key, by name.
    pub members: Vec<MemberStatus>,
    /// What is wrong, or worth knowing, with the cluster as a whole.
    pub conditions: Vec<Condition>,
    /// PostgreSQL's database system identifier.
    pub system_id: Option<SystemId>,
    /// Maintenance mode is on.
    pub paused: bool,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemberStatus {
    /// Its name.
    pub name: MemberName,
    /// `address:port` of its PostgreSQL.
    pub host: String,
    /// Its part in the cluster.
    pub role: Role,
    /// Patroni's word: `running`, `streaming`, `starting` …; `unknown` when its key is not there.
    pub state: String,
    /// The timeline its PostgreSQL is on.
    pub timeline: Option<TimelineId>,
    /// Received and flushed; for the leader what it has written.
    pub receive_lsn: Option<Lsn>,
    /// How far that is behind the leader; null for the leader, and when not known.
    pub receive_lag_bytes: Option<u64>,
    /// Replayed.
    pub replay_lsn: Option<Lsn>,
    /// How far that is behind the leader; null for the leader, and when not known.
    pub replay_lag_bytes: Option<u64>,
    /// Whether parameters wait for a restart.
    pub pending_restart: bool,
    /// Which ones.
    pub pending_restart_parameters: Vec<String>,
    /// Patroni's names.
    pub tags: BTreeMap<String, serde_json::Value>,
    /// What is wrong, or worth knowing, with this member.
    pub conditions: Vec<Condition>,
    /// The leaf state of its machine: `following`, `primary` …
    pub machine_state: Option<String>,
    /// The spec generation it has taken up.
    pub observed_generation: Option<u64>,
    /// How far the copy, or the rewind, has got that is being made for it; null when none is.
    pub copying: Option<Copying>,
}

/// A member's part in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Holds the lock.
    Leader,
    /// Every commit waits for it.
    SyncStandby,
    /// Commits wait for it or for another.
    QuorumStandby,
    /// Everybody else.
    Replica,
}

impl StatusReport {
    /// Whether somebody leads and nothing is in the way of the spec. What is only worth knowing does not count.
    pub fn is_ready(&self) -> bool {
        let counts = |condition: &Condition| condition.severity > Severity::Info;
        self.leader.is_some() && !self.conditions.iter().chain(self.members.iter().flat_map(|member| &member.conditions)).any(counts)
    }
}

/// Makes the report. `wanted` is None when no spec was applied, or when the applied one cannot be read.
pub fn report(cluster: &ClusterName, view: &ClusterView, wanted: Option<&Wanted>, as_of: String) -> StatusReport {
    let leader = view.leader.as_ref().map(|key| key.holder.clone());
    let leader_key = leader.as_ref().and_then(|name| view.members.iter().find(|(member, _)| member.as_str() == name)).map(|(_, key)| key);
    let timeline = leader_key.and_then(|key| key.record.timeline).or(view.status.as_ref().map(|status| status.timeline));
    let world = World { view, wanted, as_of: as_of.clone(), leader: leader.as_deref(), timeline, leader_lsn: view.leader_position() };
    let mut names: Vec<MemberName> = wanted.iter().flat_map(|wanted| &wanted.members).map(|member| member.name.clone()).collect();
    names.extend(view.members.keys().cloned());
    names.sort();
    names.dedup();
    StatusReport {
        cluster: cluster.clone(),
        generation: view.spec.as_ref().map(|spec| spec.generation),
        as_of,
        timeline,
        members: names.iter().map(|name| world.member(name)).collect(),
        conditions: world.conditions(leader_key),
        system_id: match view.initialize {
            Some(Initialize::Done(id)) => Some(id),
            _ => None,
        },
        paused: view.maintenance.is_some(),
        leader,
    }
}

struct World<'a> {
    view: &'a ClusterView,
    as_of: String,
    wanted: Option<&'a Wanted>,
    leader: Option<&'a str>,
    timeline: Option<TimelineId>,
    leader_lsn: Option<Lsn>,
}

impl World<'_> {
    fn member(&self, name: &MemberName) -> MemberStatus {
        let declared = self.wanted.and_then(|wanted| wanted.members.iter().find(|member| member.name == *name));
        let role = self.role(name);
        let Some(key) = self.view.members.get(name) else {
            return self.without_key(name, declared.map(|declared| declared.host.clone()).unwrap_or_default(), role);
        };
        let record = &key.record;
        let behind = |lsn| lag(self.leader_lsn.filter(|_| role != Role::Leader), lsn);
        let mut conditions = record.conditions.clone();
        conditions.extend(self.member_conditions(key, role, declared.is_some()));
        MemberStatus {
            name: name.clone(),
            host: format!("{}:{}", record.host, record.port),
            role,
            state: record.state.clone(),
            timeline: record.timeline,
            receive_lsn: record.receive_lsn,
            receive_lag_bytes: behind(record.receive_lsn),
            replay_lsn: record.replay_lsn,
            replay_lag_bytes: behind(record.replay_lsn),
            pending_restart: !record.pending_restart.is_empty(),
            pending_restart_parameters: record.pending_restart.clone(),
            tags: record.tags.clone(),
            conditions,
            machine_state: Some(record.machine_state.clone()),
            observed_generation: Some(record.observed_generation),
            copying: record.copying.clone(),
        }
    }

    fn role(&self, name: &MemberName) -> Role {
        let is_sync = self.wanted.is_some_and(|wanted| wanted.mode == ReplicationMode::Sync);
        match (self.leader == Some(name.as_str()), self.view.sync.as_ref().is_some_and(|record| record.is_standby(name))) {
            (true, _) => Role::Leader,
            (false, true) if is_sync => Role::SyncStandby,
            (false, true) => Role::QuorumStandby,
            (false, false) => Role::Replica,
        }
    }

    fn without_key(&self, name: &MemberName, host: String, role: Role) -> MemberStatus {
        let message =
            "has no key in etcd: its daemon is not running or cannot reach etcd; look at the daemon's log on that host".to_owned();
        MemberStatus {
            name: name.clone(),
            host,
            role,
            state: NO_KEY.to_owned(),
            timeline: None,
            receive_lsn: None,
            receive_lag_bytes: None,
            replay_lsn: None,
            replay_lag_bytes: None,
            pending_restart: false,
            pending_restart_parameters: Vec::new(),
            tags: BTreeMap::new(),
            conditions: vec![condition("member_absent", Severity::Warning, message)],
            machine_state: None,
            observed_generation: None,
            copying: None,
        }
    }

    /// What the member itself does not say, because it takes the others to see it.
    fn member_conditions(&self, key: &MemberKey, role: Role, declared: bool) -> Vec<Condition> {
        let record = &key.record;
        let mut found = Vec::new();
        let mut warn = |kind: &str, message: String| found.push(condition(kind, Severity::Warning, message));
        if self.wanted.is_some() && !declared {
            found.push(condition("undeclared", Severity::Info, "the spec does not name this member: it takes no part".to_owned()));
            return found;
        }
        match role {
            Role::Leader if record.role != MemberRole::Primary => {
                warn(
                    "leader_not_primary",
                    format!("holds the lock, but its PostgreSQL does not take writes yet (state: {})", record.state),
                );
            }
            Role::Leader => {}
            Role::SyncStandby | Role::QuorumStandby | Role::Replica if record.state != expected_state(record) => {
                warn("not_streaming", format!("does not stream (state: {})", record.state));
            }
            Role::SyncStandby | Role::QuorumStandby | Role::Replica => {
                if let (Some(ours), Some(leaders)) = (record.timeline, self.timeline)
                    && ours != leaders
                {
                    warn("other_timeline", format!("is on timeline {ours}, the leader on {leaders}"));
                }
                let limit = self.wanted.map_or(u64::MAX, |wanted| wanted.maximum_lag_on_failover);
                if let Some(lag) = lag(self.leader_lsn, record.receive_lsn).filter(|lag| *lag > limit) {
                    warn("lagging", format!("is {lag} bytes behind: more than maximum_lag_on_failover ({limit}), so it may not lead"));
                }
            }
        }
        if let Some(spec) = self.view.spec.as_ref().filter(|spec| spec.generation > record.observed_generation) {
            let seen = record.observed_generation;
            warn("spec_not_taken_up", format!("has taken up generation {seen} of the spec; {} is applied", spec.generation));
        }
        found
    }

    /// What maintenance mode means now.
    fn maintained(&self, record: &MaintenanceRecord) -> String {
        let ends = |at: &String| if *at < self.as_of { format!(", was to be over at {at}") } else { format!(", until {at}") };
        let until = record.until.as_ref().map_or_else(String::new, ends);
        let what = match record.phase {
            Phase::On => "nobody is elected, and nothing is started, stopped or copied: `pgherd resume` ends it",
            Phase::Ending => "it ends when those have heard of it who have to: `pgherd resume` names them",
        };
        let without_lock: Vec<&str> = self.view.suspended.iter().map(MemberName::as_str).collect();
        let suspended = if without_lock.is_empty() {
            String::new()
        } else {
            format!("; PostgreSQL on {} is not ended if its lock cannot be proved", without_lock.join(", "))
        };
        format!("maintenance mode, set by {}: {}{until}; {what}{suspended}", record.by, record.why)
    }

    fn conditions(&self, leader_key: Option<&MemberKey>) -> Vec<Condition> {
        let mut found: Vec<Condition> = self.view.status.iter().flat_map(|status| status.conditions.clone()).collect();
        let mut add = |kind: &str, severity, message: String| found.push(condition(kind, severity, message));
        match (&self.view.spec, self.wanted) {
            (None, _) => add("no_spec", Severity::Error, "no spec is applied: use `pgherd apply -f CLUSTER.yaml`".to_owned()),
            (Some(_), None) => {
                add("spec_unreadable", Severity::Error, "the applied spec cannot be read by this version of pgherd".to_owned())
            }
            (Some(_), Some(_)) => {}
        }
        match (&self.view.initialize, self.leader) {
            (Some(Initialize::Unreadable(text)), _) => {
                add("initialize_unreadable", Severity::Error, format!("`initialize` in etcd makes no sense ({text:?}): nobody leads"));
            }
            (Some(Initialize::Claimed { by, .. }), None) => add("initializing", Severity::Warning, format!("{by} is running initdb")),
            (None, None) => {
                let why = match self.view.members.iter().find(|(_, key)| key.has_data()) {
                    Some((name, _)) => format!(
                        "etcd does not know the cluster's identity, and {name} has data: nobody leads until a document is in force and every \
                         declared member has reported"
                    ),
                    None => "the cluster has no data yet: nobody leads".to_owned(),
                };
                add("not_initialized", Severity::Warning, why);
            }
            (_, None) => add("no_leader", Severity::Error, "nobody holds the leader lock: there is no primary".to_owned()),
            (_, Some(leader)) if leader_key.is_none() => {
                add("leader_without_key", Severity::Error, format!("the lock is held by `{leader}`, which has no member key"));
            }
            _ => {}
        }
        if let Some(record) = &self.view.maintenance {
            add("maintenance", Severity::Warning, self.maintained(record));
        }
        for (id, request) in &self.view.requests {
            if let (Ask::ScheduledSwitchover { to, at_s }, RequestProgress::Created) = (&request.record.ask, &request.record.progress) {
                let at = crate::clock::rfc3339(std::time::Duration::from_secs(*at_s));
                let message = format!(
                    "a switchover to `{to}` is scheduled for {at} by {} ({id}): `pgherd switchover --cancel {id}` takes it back",
                    request.record.by
                );
                add("scheduled_switchover", Severity::Info, message);
            }
            if let (Ask::Restart { on, at_s: Some(at_s), .. }, RequestProgress::Created) = (&request.record.ask, &request.record.progress) {
                let at = crate::clock::rfc3339(std::time::Duration::from_secs(*at_s));
                let by = &request.record.by;
                let message =
                    format!("a restart of `{on}` is scheduled for {at} by {by} ({id}): `pgherd flush restart {on}` takes it back");
                add("scheduled_restart", Severity::Info, message);
            }
            if let RequestProgress::Claimed { by, stage, .. } = &request.record.progress {
                add("request", Severity::Info, format!("{by} is carrying out a request of {}: {stage}", request.record.by));
            }
        }
        found.extend(self.wanted.iter().flat_map(|wanted| wanted.conditions.clone()));
        found
    }
}

/// Patroni's word for the state of a standby that is well: one that replays from the archive only never streams.
fn expected_state(record: &MemberRecord) -> &'static str {
    let by_archive_only = record.tags.get("nostream").is_some_and(|tag| tag == true);
    if by_archive_only { "running" } else { "streaming" }
}

/// Bytes between two positions, of which either may be unknown.
fn lag(leader: Option<Lsn>, ours: Option<Lsn>) -> Option<u64> {
    Some(leader?.bytes_since(ours?))
}

fn condition(kind: &str, severity: Severity, message: String) -> Condition {
    Condition { kind: kind.to_owned(), severity, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing::{name, record, report_of, view, wanted};

    fn kinds(report: &StatusReport) -> Vec<String> {
        report.conditions.iter().chain(report.members.iter().flat_map(|m| &m.conditions)).map(|c| c.kind.clone()).collect()
    }

    fn member<'a>(report: &'a StatusReport, who: &str) -> &'a MemberStatus {
        report.members.iter().find(|member| member.name == name(who)).unwrap()
    }

    #[test]
    fn a_whole_cluster_is_ready_and_has_nothing_to_say() {
        let report = report_of(&view());
        assert!(report.is_ready());
        assert_eq!(kinds(&report), [""; 0]);
        assert_eq!(report.leader.as_deref(), Some("mdw"));
        assert_eq!(report.timeline, Some(TimelineId(3)));
    }

    #[test]
    fn the_keys_of_the_json_are_the_contract() {
        let json = serde_json::to_value(report_of(&view())).unwrap();
        for key in ["cluster", "generation", "as_of", "leader", "timeline", "members", "conditions"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        let replica = &json["members"][1];
        for key in ["name", "host", "state", "timeline", "receive_lsn", "receive_lag_bytes", "replay_lsn", "replay_lag_bytes"] {
            assert!(replica.get(key).is_some_and(|value| !value.is_null()), "{key}");
        }
        for key in ["pending_restart", "tags", "conditions"] {
            assert!(replica.get(key).is_some(), "{key}");
        }
        assert_eq!(json["members"][0]["role"], "leader");
        assert_eq!(replica["role"], "replica");
        assert_eq!(replica["receive_lsn"], "0/5000000");
    }

    #[test]
    fn lag_is_bytes_behind_the_farthest_known_position_of_the_leader() {
        let mut view = view();
        view.status.as_mut().unwrap().lsn = Lsn(0x0500_0100);
        record(&mut view, "mdw").receive_lsn = Some(Lsn(0x0500_0200));
        record(&mut view, "standby").replay_lsn = None;
        let report = report_of(&view);
        let standby = member(&report, "standby");
        assert_eq!((standby.receive_lag_bytes, standby.replay_lag_bytes), (Some(0x200), None));
        assert_eq!(member(&report, "mdw").receive_lag_bytes, None, "a leader is behind nobody");
        view.leader = None;
        view.status = None;
        assert_eq!(member(&report_of(&view), "standby").receive_lag_bytes, None, "unknown, not zero");
    }

    #[test]
    fn a_declared_member_without_a_key_is_listed_as_unknown() {
        let mut view = view();
        view.members.remove(&name("standby1"));
        let report = report_of(&view);
        let absent = member(&report, "standby1");
        assert_eq!((absent.state.as_str(), absent.host.as_str()), ("unknown", "10.0.16.11:5432"));
        assert!(!report.is_ready());
        assert_eq!(kinds(&report), ["member_absent"]);
    }

    #[test]
    fn what_is_only_worth_knowing_does_not_make_a_cluster_unready() {
        let mut view = view();
        let extra = view.members[&name("standby")].clone();
        view.members.insert(name("guest"), extra);
        let report = report_of(&view);
        assert_eq!(kinds(&report), ["undeclared"]);
        assert!(report.is_ready());
    }

    #[test]
    fn whatever_is_in_the_way_makes_a_cluster_unready() {
        type Change = fn(&mut ClusterView);
        let cases: [(&str, Change); 9] = [
            ("no_leader", |view| view.leader = None),
            ("not_initialized", |view| (view.leader, view.initialize) = (None, None)),
            ("no_spec", |view| view.spec = None),
            ("leader_not_primary", |view| record(view, "mdw").role = MemberRole::Replica),
            ("not_streaming", |view| record(view, "standby").state = "starting".to_owned()),
            ("other_timeline", |view| record(view, "standby").timeline = Some(TimelineId(2))),
            ("lagging", |view| record(view, "standby").receive_lsn = Some(Lsn(0x0400_0000))),
            ("spec_not_taken_up", |view| record(view, "standby").observed_generation = 3),
            ("maintenance", |view| {
                let (by, why) = ("dba".to_owned(), "kernel".to_owned());
                view.maintenance = Some(MaintenanceRecord { by, why, at: String::new(), until: None, phase: Phase::On });
            }),
        ];
        for (kind, change) in cases {
            let mut view = view();
            change(&mut view);
            let report = report_of(&view);
            assert!(kinds(&report).contains(&kind.to_owned()), "{kind}: {:?}", kinds(&report));
            assert!(!report.is_ready(), "{kind}");
        }
    }

    #[test]
    fn a_lock_of_somebody_without_a_key_is_said() {
        let mut view = view();
        view.leader.as_mut().unwrap().holder = "Stranger".to_owned();
        let report = report_of(&view);
        assert_eq!(report.leader.as_deref(), Some("Stranger"));
        assert!(kinds(&report).contains(&"leader_without_key".to_owned()));
        assert!(report.members.iter().all(|member| member.role == Role::Replica));
    }

    #[test]
    fn an_applied_document_that_cannot_be_read_is_an_error() {
        let report = report(&"main".parse().unwrap(), &view(), None, String::new());
        assert_eq!(kinds(&report), ["spec_unreadable"]);
        assert_eq!(report.members.len(), wanted().members.len(), "whoever has a key is shown all the same");
    }
}
