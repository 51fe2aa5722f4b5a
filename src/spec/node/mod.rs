//! What a node document means: what only one host knows, checked, with defaults filled in.
//!
//! Secrets are named here, never held: [`NodeSpec::secret_files`] lists the files for a caller that may open them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::problems::Problems;
use super::schema::NODE_SHAPE;
use super::{Loaded, load as load_document};
use crate::types::{ClusterName, MemberName};

mod meaning;
pub mod typed;

pub use typed::{LogFormat, LogLevel, ManagedService};

/// Reads a node document. `source_name` only labels the problems.
///
/// # Errors
/// All problems of the document, when one of them is an error.
pub fn load(source_name: &str, text: &str) -> Result<Loaded<NodeSpec>, Problems> {
    load_document(source_name, text, "Node", &NODE_SHAPE, meaning::node)
}

/// What only one host knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpec {
    /// Which member this is.
    pub name: MemberName,
    /// Of which cluster.
    pub cluster: ClusterName,
    /// How etcd is reached.
    pub etcd: EtcdSpec,
    /// The HTTP API.
    pub api: ApiSpec,
    /// This host's PostgreSQL.
    pub postgres: NodePostgres,
    /// The watchdog device.
    pub watchdog: NodeWatchdog,
    /// What this host does for routing.
    pub routing: NodeRouting,
    /// The guard's socket, the passfile, the lock file.
    pub run_dir: PathBuf,
    /// The daemon's own log.
    pub log: LogSpec,
}

impl NodeSpec {
    /// Every file that holds a secret, with the path of its key in the document.
    pub fn secret_files(&self) -> Vec<SecretFile> {
        let password = |key: &str, file: &Option<PathBuf>| file.iter().map(|file| (key.to_owned(), file.clone())).collect::<Vec<_>>();
        let credential = |key: &str, credential: Option<&Credential>| {
            credential.map(|credential| (format!("{key}.password_file"), credential.password_file.clone()))
        };
        let mut files = password("spec.etcd.password_file", &self.etcd.password_file);
        if let Some(tls) = &self.etcd.tls {
            files.extend(password("spec.etcd.tls.key_file", &tls.key_file));
        }
        files.extend(self.api.tls.as_ref().map(|tls| ("spec.api.tls.key_file".to_owned(), tls.key_file.clone())));
        files.extend(credential("spec.api.auth", self.api.auth.as_ref()));
        files.extend(credential("spec.postgres.superuser", Some(&self.postgres.superuser)));
        files.extend(credential("spec.postgres.replication", Some(&self.postgres.replication)));
        files.extend(credential("spec.postgres.rewind", self.postgres.rewind.as_ref()));
        files.into_iter().map(|(key, file)| SecretFile { key, file }).collect()
    }

    /// Directory of PostgreSQL's Unix socket.
    pub fn socket_dir(&self) -> &PathBuf {
        self.postgres.socket_dir.as_ref().unwrap_or(&self.run_dir)
    }
}

/// A file that must be there and be private: mode 0600 or 0400.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    /// Path of the key that names it: `spec.postgres.superuser.password_file`.
    pub key: String,
    /// The file.
    pub file: PathBuf,
}

/// How etcd is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSpec {
    /// `http://host:port` or `https://host:port` each; at least one.
    pub endpoints: Vec<String>,
    /// What comes before every key: begins with a slash, does not end with one.
    pub prefix: String,
    /// User; None = no authentication.
    pub username: Option<String>,
    /// File with the password. Present exactly when `username` is.
    pub password_file: Option<PathBuf>,
    /// TLS.
    pub tls: Option<ClientTls>,
}

/// TLS as a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// Certificates that the server's must lead to.
    pub ca_file: PathBuf,
    /// Our certificate.
    pub cert_file: Option<PathBuf>,
    /// Its key. Present exactly when `cert_file` is.
    pub key_file: Option<PathBuf>,
}

/// TLS as a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// Our certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// Certificates that a client's must lead to.
    pub client_ca_file: Option<PathBuf>,
}

/// The HTTP API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiSpec {
    /// `address:port`; None = 0.0.0.0 and the member's api_port.
    pub listen: Option<String>,
    /// TLS.
    pub tls: Option<ServerTls>,
    /// Who may change something; None = nobody.
    pub auth: Option<Credential>,
}

/// A user, and the file with the password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// The user.
    pub username: String,
    /// The file.
    pub password_file: PathBuf,
}

/// This host's PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePostgres {
    /// The user that PostgreSQL runs as.
    pub os_user: String,
    /// Where the binaries are; None = PATH, then the usual places.
    pub bin_dir: Option<PathBuf>,
    /// The data directory.
    pub data_dir: PathBuf,
    /// pg_wal elsewhere.
    pub wal_dir: Option<PathBuf>,
    /// Tablespace directories of the leader, and where they are here.
    pub tablespace_map: BTreeMap<PathBuf, PathBuf>,
    /// listen_addresses; None = the member's address. Loopback is always added.
    pub listen: Option<String>,
    /// Directory of the Unix socket; None = run_dir. See [`NodeSpec::socket_dir`].
    pub socket_dir: Option<PathBuf>,
    /// Directory of PostgreSQL's log; None = the postmaster's standard error.
    pub log_dir: Option<PathBuf>,
    /// The superuser that pgherd works as.
    pub superuser: Credential,
    /// The role that standbys replicate as.
    pub replication: Credential,
    /// The role that pg_rewind works as; None = the superuser.
    pub rewind: Option<Credential>,
}

/// The watchdog device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeWatchdog {
    /// The device.
    pub device: PathBuf,
}

/// What this host does for routing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeRouting {
    /// Interface of the virtual address; None = that of the member's address.
    pub interface: Option<String>,
    /// HAProxy runtime sockets.
    pub haproxy_sockets: Vec<PathBuf>,
    /// Which services this host keeps current.
    pub manage: Vec<ManagedService>,
}

/// The daemon's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSpec {
    /// How much.
    pub level: LogLevel,
    /// What a line looks like.
    pub format: LogFormat,
}
