//! Finds etcd and the cluster: by options, a node document, or the environment.
//!
//! An option wins over everything. A node document that was named wins over the environment; the one at its default place is read only
//! when the environment leaves something open. Credentials and TLS come from a node document only: never from a command line.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::cli::Connection;
use crate::cli::exit::{Failure, WRONG};
use crate::cli::read::read_document;
use crate::etcd::{Etcd, Secret, Settings, TlsFiles};
use crate::spec::Loaded;
use crate::spec::node::{self, NodeSpec};
use crate::types::ClusterName;

/// Where the node document is unless somebody says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/pgherd/node.yaml";
const DEFAULT_PREFIX: &str = "/pgherd";

/// What was typed or set, before a node document is looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Known {
    endpoints: Option<Vec<String>>,
    prefix: Option<String>,
    cluster: Option<ClusterName>,
}

impl Known {
    fn of_options(connection: &Connection) -> Self {
        let endpoints = Some(connection.endpoints.clone()).filter(|endpoints| !endpoints.is_empty());
        Self { endpoints, prefix: connection.prefix.clone(), cluster: connection.cluster.clone() }
    }

    fn of_environment(get: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let cluster = get("PGHERD_CLUSTER").map(|text| text.parse()).transpose();
        Ok(Self {
            endpoints: get("PGHERD_ENDPOINTS").map(|text| text.split(',').map(|url| url.trim().to_owned()).collect()),
            prefix: get("PGHERD_PREFIX"),
            cluster: cluster.map_err(|error| Failure::new(WRONG, format!("PGHERD_CLUSTER: {error}")))?,
        })
    }

    fn or(self, other: Known) -> Self {
        Self {
            endpoints: self.endpoints.or(other.endpoints),
            prefix: self.prefix.or(other.prefix),
            cluster: self.cluster.or(other.cluster),
        }
    }
}

/// The settings. `cluster` is used when nothing else names one (a document that is applied names its own).
pub fn settings(connection: &Connection, cluster: Option<&ClusterName>) -> Result<Settings, Failure> {
    let typed = Known::of_options(connection);
    let known = if connection.config.is_some() { typed } else { typed.or(Known::of_environment(|name| std::env::var(name).ok())?) };
    let document = match &connection.config {
        Some(path) => Some(load_node(path)?),
        None if known.endpoints.is_some() && (known.cluster.is_some() || cluster.is_some()) => None,
        None => default_document()?,
    };
    let mut settings = match document {
        Some(node) => of_document(&node.spec)?,
        None => {
            let missing = "say where etcd is: --config NODE.yaml, or --endpoints and --cluster (PGHERD_ENDPOINTS, PGHERD_CLUSTER)";
            let named = known.cluster.as_ref().or(cluster);
            let (Some(_), Some(named)) = (&known.endpoints, named) else { return Err(Failure::new(WRONG, missing)) };
            Settings::plain(Vec::new(), DEFAULT_PREFIX, named.clone())
        }
    };
    if let Some(endpoints) = known.endpoints {
        settings.endpoints = endpoints.iter().map(|url| with_scheme(url)).collect();
    }
    if let Some(prefix) = known.prefix {
        settings.prefix = check_prefix(&prefix)?;
    }
    if let Some(cluster) = known.cluster {
        settings.cluster = cluster;
    }
    Ok(settings)
}

/// A handle on the cluster's keys. Nothing is sent yet.
pub fn etcd(connection: &Connection, cluster: Option<&ClusterName>) -> Result<Etcd, Failure> {
    Etcd::new(settings(connection, cluster)?).map_err(|error| Failure { code: WRONG, error: error.into() })
}

/// Runs the asynchronous part of a command.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?.block_on(work)
}

/// Reads a node document.
pub fn load_node(path: &Path) -> Result<Loaded<NodeSpec>, Failure> {
    let (name, text) = read_document(path)?;
    Ok(node::load(&name, &text)?)
}

fn default_document() -> Result<Option<Loaded<NodeSpec>>, Failure> {
    let path = PathBuf::from(DEFAULT_CONFIG);
    if path.exists() { load_node(&path).map(Some) } else { Ok(None) }
}

/// What a node document says about etcd, with the password read.
pub fn of_document(node: &NodeSpec) -> Result<Settings, Failure> {
    let mut settings = Settings::plain(node.etcd.endpoints.clone(), &node.etcd.prefix, node.cluster.clone());
    settings.username.clone_from(&node.etcd.username);
    if let Some(path) = &node.etcd.password_file {
        let text = fs::read_to_string(path).with_context(|| format!("reading etcd's password from {}", path.display()))?;
        settings.password = Some(Secret::new(text.trim_end_matches(['\r', '\n'])));
    }
    settings.tls = node.etcd.tls.as_ref().map(|tls| TlsFiles {
        ca_file: Some(tls.ca_file.clone()),
        cert_file: tls.cert_file.clone(),
        key_file: tls.key_file.clone(),
    });
    Ok(settings)
}

/// `10.0.12.9:2379` is what people type.
fn with_scheme(url: &str) -> String {
    if url.contains("://") { url.to_owned() } else { format!("http://{url}") }
}

/// As in a node document: begins with a slash, does not end with one.
fn check_prefix(prefix: &str) -> Result<String, Failure> {
    let fits = prefix.starts_with('/') && !prefix.ends_with('/') && !prefix.contains(char::is_whitespace);
    if fits {
        Ok(prefix.to_owned())
    } else {
        Err(Failure::new(WRONG, format!("a prefix begins with a slash and does not end with one: `{prefix}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_wins_over_the_environment() {
        let environment = |name: &str| match name {
            "PGHERD_ENDPOINTS" => Some("http://a:1, http://b:2".to_owned()),
            "PGHERD_CLUSTER" => Some("main".to_owned()),
            _ => None,
        };
        let environment = Known::of_environment(environment).unwrap();
        assert_eq!(environment.endpoints, Some(vec!["http://a:1".to_owned(), "http://b:2".to_owned()]));
        let typed = Known { cluster: Some("other".parse().unwrap()), ..Known::default() };
        let known = typed.or(environment);
        assert_eq!(known.cluster.unwrap().as_str(), "other");
        assert!(known.endpoints.is_some());
    }

    #[test]
    fn a_bad_cluster_name_in_the_environment_is_wrong_use() {
        let failure = Known::of_environment(|name| (name == "PGHERD_CLUSTER").then(|| "Main".to_owned())).unwrap_err();
        assert_eq!(failure.code, WRONG);
    }

    #[test]
    fn a_named_node_document_is_all_that_is_needed_and_options_override_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.yaml");
        let text = "apiVersion: pgherd/v1\nkind: Node\nmetadata: { name: mdw }\nspec:\n  cluster: main\n  etcd: { endpoints: [ \"http://10.0.12.9:2379\" ] }\n  postgres:\n    data_dir: /opt/data\n    superuser: { username: postgres, password_file: /etc/pgherd/secrets/superuser }\n    replication: { username: replicator, password_file: /etc/pgherd/secrets/replication }\n";
        fs::write(&path, text).unwrap();
        let mut connection = Connection { config: Some(path), ..Connection::default() };
        let found = settings(&connection, None).unwrap();
        assert_eq!((found.cluster.as_str(), found.prefix.as_str()), ("main", "/pgherd"));
        connection.endpoints = vec!["127.0.0.1:1".to_owned()];
        connection.prefix = Some("/other".to_owned());
        let found = settings(&connection, None).unwrap();
        assert_eq!((found.endpoints[0].as_str(), found.prefix.as_str()), ("http://127.0.0.1:1", "/other"));
        connection.prefix = Some("other/".to_owned());
        assert_eq!(settings(&connection, None).unwrap_err().code, WRONG);
    }
}
