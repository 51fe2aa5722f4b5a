//! What a document may ask for and this version does not do yet.
//!
//! A setting of a cluster that promises safety, or that cannot be undone, is refused by `apply` when somebody typed it: it is never accepted and
//! ignored. A default that is not built, and everything else that was typed, gives one condition each, which tells what is in force
//! instead. The surprise: a document without `watchdog.mode` is taken and runs without one, one with `mode: required` is not taken.

use super::cluster::typed::{self, ReplicationMode, RestartPolicy, WatchdogMode};
use super::cluster::{ClusterSpec, DEFAULT_PRIORITY, Tags};
use super::node::NodeSpec;
use crate::facts::cluster::{Condition, Severity};

/// [`Condition::kind`] of everything that is not in force.
pub const NOT_BUILT: &str = "not_built";

/// A setting that `apply` must refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its path: `spec.watchdog.mode`.
    pub path: String,
    /// Its value as typed.
    pub value: String,
    /// Why, and what to do: a sentence.
    pub reason: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} is refused: {}", self.path, self.value, self.reason)
    }
}

/// The typed settings that `apply` must refuse (exit 4); empty when the document may be applied.
pub fn refusals(spec: &ClusterSpec) -> Vec<Refusal> {
    let typed = spec.typed.spec.clone().unwrap_or_default();
    let mut refusals = Vec::new();
    let mut refuse = |path: &str, value: &str, reason: &str| {
        refusals.push(Refusal { path: format!("spec.{path}"), value: value.to_owned(), reason: reason.to_owned() });
    };
    if typed.watchdog.unwrap_or_default().mode == Some(WatchdogMode::Required) {
        let reason = "this version does not drive a watchdog yet, and a host whose guard and daemon both hang would not be reset; \
                      type off to accept that";
        refuse("watchdog.mode", "required", reason);
    }
    if let Some(method) = typed.bootstrap.unwrap_or_default().method.filter(|method| method != "initdb") {
        refuse("bootstrap.method", &method, "this version initializes a cluster by initdb only, and would make an empty one");
    }
    refusals
}

/// One informational condition for each default that is not in force and for each other typed setting that has no effect. A safety
/// setting that is stored all the same (another version applied it) is an error.
pub fn conditions(spec: &ClusterSpec) -> Vec<Condition> {
    let stored = refusals(spec).into_iter().map(|refusal| Condition {
        kind: NOT_BUILT.to_owned(),
        severity: Severity::Error,
        message: format!("{refusal}; another version applied it"),
    });
    let mut idle = Idle(Vec::new());
    let typed = spec.typed.spec.clone().unwrap_or_default();
    idle.replication(&typed.replication.unwrap_or_default(), spec);
    idle.postgres(&typed.postgres.unwrap_or_default());
    idle.watchdog(&typed.watchdog.unwrap_or_default());
    idle.routing(spec);
    idle.tags(spec);
    if typed.bootstrap.unwrap_or_default().custom.is_some_and(|custom| !custom.is_empty()) {
        idle.say("bootstrap.custom", "has no effect: a cluster is initialized by initdb");
    }
    stored.chain(idle.0).collect()
}

/// The settings of a node document that `run` must refuse: TLS that would not be there.
pub fn node_refusals(node: &NodeSpec) -> Vec<Refusal> {
    let reason = "this version serves its HTTP API without TLS; leave it out to accept that";
    let tls = node.api.tls.iter().map(|tls| Refusal {
        path: "spec.api.tls".to_owned(),
        value: tls.cert_file.display().to_string(),
        reason: reason.to_owned(),
    });
    tls.collect()
}

/// One informational condition for each setting of a node document that has no effect.
pub fn node_conditions(node: &NodeSpec) -> Vec<Condition> {
    let mut idle = Idle(Vec::new());
    idle.say_if(node.api.auth.is_some(), "api.auth", "has no effect: no call of the HTTP API changes anything");
    idle.say_if(node.routing.interface.is_some(), "routing.interface", "has no effect: no virtual address is moved");
    idle.say_if(!node.routing.manage.is_empty(), "routing.manage", "has no effect: no service is kept current");
    idle.0
}

/// What has no effect.
struct Idle(Vec<Condition>);

impl Idle {
    fn say(&mut self, path: &str, consequence: &str) {
        let message = format!("spec.{path} {consequence}; not built in this version");
        self.0.push(Condition { kind: NOT_BUILT.to_owned(), severity: Severity::Info, message });
    }

    fn say_if(&mut self, typed: bool, path: &str, consequence: &str) {
        if typed {
            self.say(path, consequence);
        }
    }

    fn replication(&mut self, typed: &typed::Replication, spec: &ClusterSpec) {
        if spec.replication.mode == ReplicationMode::Async {
            self.say_if(typed.synchronous_node_count.is_some(), "replication.synchronous_node_count", "has no effect in async");
            self.say_if(typed.maximum_lag_on_syncnode.is_some(), "replication.maximum_lag_on_syncnode", "has no effect in async");
            self.say_if(typed.strict == Some(true), "replication.strict", "has no effect in async");
        }
        let methods = typed.create_replica_methods.as_deref().unwrap_or_default();
        let others = methods.iter().any(|method| method != "basebackup");
        self.say_if(others, "replication.create_replica_methods", "is not followed: replicas are made by basebackup only");
    }

    fn postgres(&mut self, typed: &typed::Postgres) {
        let manual = "and manual is in force: members show what waits for a restart";
        match typed.restart_policy {
            None => self.say("postgres.restart_policy", &format!("is left out {manual}")),
            Some(RestartPolicy::Rolling) => self.say("postgres.restart_policy", &format!("is rolling {manual}")),
            Some(RestartPolicy::Manual) => {}
        }
    }

    fn watchdog(&mut self, typed: &typed::Watchdog) {
        match typed.mode {
            None => self.say("watchdog.mode", "is left out and off is in force instead of automatic"),
            Some(WatchdogMode::Automatic) => self.say("watchdog.mode", "is automatic and off is in force"),
            Some(WatchdogMode::Off | WatchdogMode::Required) => {}
        }
    }

    fn routing(&mut self, spec: &ClusterSpec) {
        let routing = &spec.routing;
        self.say_if(routing.vip.is_some(), "routing.vip", "has no effect: the address is not moved");
        self.say_if(routing.haproxy.is_some(), "routing.haproxy", "is not rendered to HAProxy's file");
        self.say_if(routing.pgbouncer.is_some(), "routing.pgbouncer", "is not rendered to PgBouncer's file");
        self.say_if(!routing.etcd_peers.is_empty(), "routing.etcd_peers", "is not rendered to etcd's file");
    }

    fn tags(&mut self, spec: &ClusterSpec) {
        if spec.replication.mode == ReplicationMode::Async {
            self.tag(spec, "nosync", |tags| tags.nosync, "has no effect in async");
            self.tag(spec, "sync_priority", |tags| tags.sync_priority != DEFAULT_PRIORITY, "has no effect in async");
        }
    }

    fn tag(&mut self, spec: &ClusterSpec, tag: &str, is_set: fn(&Tags) -> bool, consequence: &str) {
        let names: Vec<&str> = spec.members.iter().filter(|member| is_set(&member.tags)).map(|member| member.name.as_str()).collect();
        self.say_if(!names.is_empty(), &format!("members (tag {tag} of {})", names.join(", ")), consequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::cluster::load;

    const HEAD: &str = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n";
    const THREE: &str = "    - { name: a, address: h1 }\n    - { name: b, address: h2 }\n    - { name: c, address: h3 }\n";

    fn spec(rest: &str) -> ClusterSpec {
        load("test", &format!("{HEAD}{THREE}{rest}")).unwrap_or_else(|problems| panic!("{problems}")).spec
    }

    fn refused(rest: &str) -> Vec<String> {
        refusals(&spec(rest)).into_iter().map(|refusal| refusal.path).collect()
    }

    #[test]
    fn a_safety_setting_that_is_typed_is_refused() {
        assert_eq!(refused("  watchdog: { mode: required }\n"), ["spec.watchdog.mode"]);
        assert_eq!(
            refused("  bootstrap: { method: restore, custom: { restore: { command: [ /bin/restore ] } } }\n"),
            ["spec.bootstrap.method"]
        );
    }

    #[test]
    fn a_safety_setting_that_is_left_out_is_informational_and_not_in_force() {
        let spec = spec("");
        assert_eq!(refusals(&spec), []);
        assert_eq!(spec.replication.mode, ReplicationMode::Quorum, "this one is built");
        assert_eq!(spec.watchdog.mode, WatchdogMode::Off);
        assert!(spec.ha.failsafe, "this one is built");
        let conditions = conditions(&spec);
        assert_eq!(conditions.iter().filter(|condition| condition.message.starts_with("spec.watchdog.mode")).count(), 1);
        assert!(conditions.iter().all(|condition| condition.severity == Severity::Info), "{conditions:#?}");
    }

    #[test]
    fn a_document_that_asks_only_for_what_is_built_has_no_condition() {
        let spec = spec(
            "  ha: { failsafe: true }\n  replication: { mode: async, use_slots: false }\n  \
             postgres: { restart_policy: manual }\n  watchdog: { mode: off }\n",
        );
        assert_eq!(conditions(&spec), []);
    }

    #[test]
    fn a_stored_promise_that_is_not_kept_fails_the_check() {
        let conditions = conditions(&spec("  watchdog: { mode: required }\n"));
        assert!(conditions.iter().any(|condition| condition.severity == Severity::Error && condition.message.contains("required")));
    }

    #[test]
    fn two_members_default_to_async_and_nobody_is_told_otherwise() {
        let text = format!("{HEAD}    - {{ name: a, address: h1 }}\n    - {{ name: b, address: h2 }}\n");
        let spec = load("test", &text).unwrap().spec;
        assert!(!conditions(&spec).iter().any(|condition| condition.message.contains("replication.mode")));
    }
}
