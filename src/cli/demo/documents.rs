//! The two documents of a local cluster, as a person would type them.
//!
//! The watchdog is off and its device is a name that does not exist: a demo must never be able to reset the machine it runs on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// A member as the cluster document declares it.
#[derive(Debug, Clone)]
pub struct DeclaredMember {
    /// Its name.
    pub name: String,
    /// Where the others reach it.
    pub address: String,
    /// PostgreSQL's port.
    pub port: u16,
    /// Port of the HTTP API.
    pub api_port: u16,
    /// Tags, Patroni's names; values as they stand in YAML.
    pub tags: BTreeMap<String, String>,
}

/// What differs between the cluster documents of the demo and of the tests; the rest is left to the defaults.
#[derive(Debug, Clone)]
pub struct ClusterDocument {
    /// The cluster's name.
    pub name: String,
    /// Its members, in order.
    pub members: Vec<DeclaredMember>,
    /// Life of the leader lock, in seconds.
    pub ttl_s: u32,
    /// Time between rounds when nothing happens, in seconds.
    pub loop_wait_s: u32,
    /// Whether the leader may go on without etcd while all members answer. None = not typed: the default.
    pub failsafe: Option<bool>,
    /// Further lines under `ha`.
    pub ha: Vec<String>,
    /// `async`, `quorum` or `sync`.
    pub mode: String,
    /// Further lines under `replication`.
    pub replication: Vec<String>,
    /// PostgreSQL's major version.
    pub version: u32,
    /// Parameters, values as PostgreSQL's own text.
    pub parameters: BTreeMap<String, String>,
    /// Lines of pg_hba.conf.
    pub pg_hba: Vec<String>,
    /// Further lines under `postgres`.
    pub postgres: Vec<String>,
}

impl ClusterDocument {
    /// The YAML text.
    pub fn to_yaml(&self) -> String {
        let mut text = format!("apiVersion: pgherd/v1\nkind: Cluster\nmetadata:\n  name: {}\nspec:\n  members:\n", self.name);
        for member in &self.members {
            let DeclaredMember { name, address, port, api_port, tags } = member;
            let _ = writeln!(text, "    - {{ name: {name}, address: {address}, port: {port}, api_port: {api_port}{} }}", inline_tags(tags));
        }
        let _ = write!(
            text,
            "  ha:
    ttl: {ttl}s
    loop_wait: {loop_wait}s
    retry_timeout: 3s
{failsafe}{ha}  replication:
    mode: {mode}
{replication}  watchdog:
    mode: \"off\"
  postgres:
    version: {version}
",
            ttl = self.ttl_s,
            loop_wait = self.loop_wait_s,
            failsafe = self.failsafe.map(|on| format!("    failsafe: {on}\n")).unwrap_or_default(),
            ha = self.ha.iter().map(|line| format!("    {line}\n")).collect::<String>(),
            mode = self.mode,
            replication = self.replication.iter().map(|line| format!("    {line}\n")).collect::<String>(),
            version = self.version,
        );
        for line in &self.postgres {
            let _ = writeln!(text, "    {line}");
        }
        if !self.parameters.is_empty() {
            text.push_str("    parameters:\n");
        }
        for (name, value) in &self.parameters {
            let _ = writeln!(text, "      {name}: {}", quoted(value));
        }
        text.push_str("    pg_hba:\n");
        for line in &self.pg_hba {
            let _ = writeln!(text, "      - {}", quoted(line));
        }
        text
    }
}

fn inline_tags(tags: &BTreeMap<String, String>) -> String {
    if tags.is_empty() {
        return String::new();
    }
    let list: Vec<String> = tags.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    format!(", tags: {{ {} }}", list.join(", "))
}

/// A YAML double-quoted scalar; JSON's form is one.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What only one host knows.
#[derive(Debug, Clone)]
pub struct NodeDocument {
    /// The member's name.
    pub name: String,
    /// The cluster's name.
    pub cluster: String,
    /// etcd's client URLs.
    pub endpoints: Vec<String>,
    /// Where the HTTP API listens, `127.0.0.1:8008`.
    pub api_listen: String,
    /// listen_addresses.
    pub postgres_listen: String,
    /// The user PostgreSQL runs as.
    pub os_user: String,
    /// PostgreSQL's programs.
    pub bin_dir: PathBuf,
    /// The node's own directory: data, run and log directories are made in it.
    pub dir: PathBuf,
    /// Where the password files are.
    pub secrets: PathBuf,
    /// Runtime sockets of HAProxy that the node tells of changes of roles.
    pub haproxy_sockets: Vec<PathBuf>,
}

impl NodeDocument {
    /// The YAML text.
    pub fn to_yaml(&self) -> String {
        let endpoints: Vec<String> = self.endpoints.iter().map(|url| quoted(url)).collect();
        let path = |path: &Path| quoted(&path.to_string_lossy());
        let sockets: Vec<String> = self.haproxy_sockets.iter().map(|socket| path(socket)).collect();
        format!(
            "apiVersion: pgherd/v1
kind: Node
metadata: {{ name: {name} }}
spec:
  cluster: {cluster}
  etcd: {{ endpoints: [ {endpoints} ] }}
  api: {{ listen: {api_listen} }}
  postgres:
    os_user: {os_user}
    bin_dir: {bin_dir}
    data_dir: {data_dir}
    listen: {postgres_listen}
    socket_dir: {run_dir}
    log_dir: {log_dir}
    superuser: {{ username: {os_user}, password_file: {superuser} }}
    replication: {{ username: replicator, password_file: {replication} }}
  watchdog: {{ device: {watchdog} }}
  routing: {{ haproxy_sockets: [ {sockets} ] }}
  run_dir: {run_dir}
",
            name = self.name,
            cluster = self.cluster,
            endpoints = endpoints.join(", "),
            api_listen = quoted(&self.api_listen),
            os_user = quoted(&self.os_user),
            bin_dir = path(&self.bin_dir),
            data_dir = path(&self.dir.join("data")),
            postgres_listen = quoted(&self.postgres_listen),
            run_dir = path(&self.dir.join("run")),
            log_dir = path(&self.dir.join("log")),
            superuser = path(&self.secrets.join("superuser")),
            replication = path(&self.secrets.join("replication")),
            sockets = sockets.join(", "),
            watchdog = path(&self.dir.join("no-watchdog")),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster_document() -> ClusterDocument {
        let member = |name: &str, port| DeclaredMember {
            name: name.into(),
            address: "127.0.0.1".into(),
            port,
            api_port: port + 1,
            tags: [("nofailover".to_owned(), "true".to_owned())].into(),
        };
        ClusterDocument {
            name: "demo".into(),
            members: vec![member("n1", 1025), member("n2", 1027)],
            ttl_s: 5,
            loop_wait_s: 1,
            failsafe: None,
            ha: vec!["primary_start_timeout: 9s".to_owned()],
            replication: Vec::new(),
            mode: "async".into(),
            version: 15,
            postgres: vec![r#"archive_command: "cp %p /a/%f""#.to_owned()],
            parameters: [("log_line_prefix".to_owned(), r#"test "a\b" = 'c'"#.to_owned())].into(),
            pg_hba: vec!["host all all 127.0.0.0/8 scram-sha-256".into()],
        }
    }

    fn load(document: &ClusterDocument) -> crate::spec::cluster::ClusterSpec {
        crate::spec::cluster::load("cluster.yaml", &document.to_yaml()).unwrap().spec
    }

    #[test]
    fn the_cluster_document_is_one_that_apply_takes() {
        assert_eq!(crate::spec::unbuilt::refusals(&load(&cluster_document())), Vec::new());
    }

    #[test]
    fn failsafe_is_the_products_default_unless_it_is_typed() {
        let document = cluster_document();
        assert!(!document.to_yaml().contains("failsafe"));
        assert!(load(&document).ha.failsafe, "what is measured and shown is what a document gets that does not name it");
        for typed in [true, false] {
            assert_eq!(load(&ClusterDocument { failsafe: Some(typed), ..document.clone() }).ha.failsafe, typed);
        }
    }

    #[test]
    fn the_node_document_is_valid_and_names_no_real_watchdog() {
        let document = NodeDocument {
            name: "n1".into(),
            cluster: "demo".into(),
            endpoints: vec!["http://127.0.0.1:2379".into()],
            api_listen: "127.0.0.1:8008".into(),
            postgres_listen: "127.0.0.1".into(),
            os_user: "postgres".into(),
            bin_dir: "/usr/lib/postgresql/15/bin".into(),
            dir: "/tmp/demo/n1".into(),
            secrets: "/tmp/demo/secrets".into(),
            haproxy_sockets: vec!["/tmp/demo/haproxy/haproxy.sock".into()],
        };
        let text = document.to_yaml();
        let read = crate::spec::node::load("node.yaml", &text).unwrap().spec;
        assert_eq!(read.routing.haproxy_sockets, document.haproxy_sockets);
        assert!(text.contains("no-watchdog"));
    }
}
