//! `pgherd run`: everything that must be right before the daemon has its first thread.
//!
//! The order is the point: read and refuse as root, become the user PostgreSQL runs as, and only then start threads. A document that
//! asks for what is not built and promises safety is refused here as in `apply`: TLS that was asked for is never served as plain HTTP.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::cli::Connection;
use crate::cli::connect::{DEFAULT_CONFIG, load_node};
use crate::cli::exit::{Failure, Outcome, REFUSED, WRONG};
use crate::cli::output::tell;
use crate::cli::{privileges, secret_files};
use crate::spec::node::NodeSpec;
use crate::spec::{Loaded, Problems, Severity, unbuilt};
use crate::telemetry;

/// Runs the daemon to its end.
pub fn run(connection: Connection, clear_crashes: bool) -> Outcome {
    telemetry::abort_on_panic();
    if !connection.endpoints.is_empty() || connection.prefix.is_some() || connection.cluster.is_some() {
        return Err(Failure::new(WRONG, "the daemon takes etcd, prefix and cluster from its node document only: leave those options out"));
    }
    let path = connection.config.unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG));
    let config = std::path::absolute(&path).with_context(|| format!("making {} absolute", path.display()))?;
    let node = load(&config)?;
    privileges::drop_to_os_user(&node.spec).map_err(|error| Failure { code: WRONG, error })?;
    let _telemetry = telemetry::start(node.spec.log)?;
    Ok(crate::daemon::run(node.spec, &crate::daemon::Options { clear_crashes })?)
}

/// Reads the node document for a daemon: what `validate` warns of is an error here.
pub fn load(config: &Path) -> Result<Loaded<NodeSpec>, Failure> {
    let node = load_node(config)?;
    for warning in &node.warnings {
        tell(&warning.to_string());
    }
    let problems = secret_files::problems(&node, Severity::Error);
    if !problems.is_empty() {
        return Err(Problems(problems).into());
    }
    refuse_unbuilt(&node.spec)?;
    Ok(node)
}

fn refuse_unbuilt(node: &NodeSpec) -> Result<(), Failure> {
    for condition in unbuilt::node_conditions(node) {
        tell(&format!("note: {}", condition.message));
    }
    let refusals: Vec<String> = unbuilt::node_refusals(node).iter().map(ToString::to_string).collect();
    if refusals.is_empty() { Ok(()) } else { Err(Failure::new(REFUSED, refusals.join("\n"))) }
}
