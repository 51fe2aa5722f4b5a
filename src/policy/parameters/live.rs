//! Makes the two files that change while the server runs, apart from postgresql.conf, which includes them. Never asks a server.

use super::{ConfigInputs, push};
use crate::facts::synchrony::Names;
use crate::policy::slots::slot_of;

/// In the data directory, included by postgresql.conf: whom the server follows.
pub const UPSTREAM_CONF: &str = "pgherd.upstream.conf";
/// In the data directory, included by postgresql.conf: whom commits wait for.
pub const NAMES_CONF: &str = "pgherd.names.conf";

/// Whom this server follows: a file of its own, so that it is followed also when PostgreSQL does not want the rest.
pub fn upstream_conf(inputs: &ConfigInputs) -> Result<String, String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut conf = String::from("# Written by pgherd: whom this server follows.\n");
    push(&mut conf, "primary_conninfo", &text(&inputs.primary_conninfo))?;
    push(&mut conf, "primary_slot_name", &text(&inputs.primary_slot_name))?;
    Ok(conf)
}

/// Whom commits wait for: a file of its own, because it changes while the server runs and only together with `sync` in etcd.
///
/// With `failover_slots`, what subscribers of logical slots get waits for the same standbys: none is ahead of the next primary.
pub fn names_conf(names: &Names, failover_slots: bool) -> Result<String, String> {
    let mut conf = String::from("# Written by pgherd: who must hold a commit before it is acknowledged.\n");
    push(&mut conf, "synchronous_standby_names", &names.to_string())?;
    if failover_slots {
        let slots: Vec<String> = names.acks().into_iter().flat_map(|acks| &acks.members).map(slot_of).collect();
        push(&mut conf, "synchronized_standby_slots", &slots.join(", "))?;
    }
    Ok(conf)
}
