//! A node document as typed. As in the cluster document, every field is optional here and the JSON Schema says which are not.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::spec::cluster::typed::{ApiVersion, sections, words};

words! {
    /// The kind of document.
    pub enum Kind {
        /// A node.
        #[serde(rename = "Node")]
        Node,
    }
    /// How much is logged.
    pub enum LogLevel {
        /// Only what failed.
        Error,
        /// And what should be looked at.
        Warn,
        /// And every decision.
        Info,
        /// And what led to it.
        Debug,
        /// Everything.
        Trace,
    }
    /// What a log line looks like.
    pub enum LogFormat {
        /// For people.
        Human,
        /// One JSON object per line.
        Json,
    }
    /// What this host can keep current.
    pub enum ManagedService {
        /// HAProxy.
        Haproxy,
        /// Keepalived.
        Keepalived,
        /// PgBouncer.
        Pgbouncer,
    }
}

sections! {
    /// What only one host knows.
    #[schemars(title = "pgherd node document")]
    pub struct Node {
        /// The version of the format.
        #[serde(rename = "apiVersion")]
        #[schemars(required)]
        pub api_version: Option<ApiVersion>,
        /// The kind of document.
        #[schemars(required)]
        pub kind: Option<Kind>,
        /// Which member this is.
        #[schemars(required)]
        pub metadata: Option<Metadata>,
        /// What only this host knows.
        #[schemars(required)]
        pub spec: Option<Spec>,
    }

    /// Which member this is.
    pub struct Metadata {
        /// One of the cluster's members.
        #[schemars(required, regex(pattern = "^[a-z][a-z0-9_-]{0,62}$"))]
        pub name: Option<String>,
    }

    /// What only this host knows.
    pub struct Spec {
        /// The cluster's name.
        #[schemars(required, regex(pattern = "^[a-z][a-z0-9-]{0,39}$"))]
        pub cluster: Option<String>,
        /// How etcd is reached.
        #[schemars(required)]
        pub etcd: Option<Etcd>,
        /// The HTTP API.
        pub api: Option<Api>,
        /// This host's PostgreSQL.
        #[schemars(required)]
        pub postgres: Option<Postgres>,
        /// The watchdog device.
        pub watchdog: Option<Watchdog>,
        /// What this host does for routing.
        pub routing: Option<Routing>,
        /// The guard's socket, the passfile, the lock file.
        #[schemars(extend("default" = "/run/pgherd"))]
        pub run_dir: Option<String>,
        /// The daemon's own log.
        pub log: Option<Log>,
    }

    /// How etcd is reached.
    pub struct Etcd {
        /// `http://host:port` or `https://host:port` each.
        #[schemars(required)]
        pub endpoints: Option<Vec<String>>,
        /// What comes before every key.
        #[schemars(extend("default" = "/pgherd"))]
        pub prefix: Option<String>,
        /// User of etcd; null = none.
        #[schemars(extend("default" = null))]
        pub username: Option<String>,
        /// File with that user's password.
        #[schemars(extend("default" = null))]
        pub password_file: Option<String>,
        /// TLS towards etcd; null = none.
        #[schemars(extend("default" = null))]
        pub tls: Option<ClientTls>,
    }

    /// TLS as a client.
    pub struct ClientTls {
        /// Certificates that the server's must lead to.
        #[schemars(required)]
        pub ca_file: Option<String>,
        /// Our certificate; null = none.
        #[schemars(extend("default" = null))]
        pub cert_file: Option<String>,
        /// Its key.
        #[schemars(extend("default" = null))]
        pub key_file: Option<String>,
    }

    /// TLS as a server.
    pub struct ServerTls {
        /// Our certificate.
        #[schemars(required)]
        pub cert_file: Option<String>,
        /// Its key.
        #[schemars(required)]
        pub key_file: Option<String>,
        /// Certificates that a client's must lead to; null = clients need none.
        #[schemars(extend("default" = null))]
        pub client_ca_file: Option<String>,
    }

    /// The HTTP API.
    pub struct Api {
        /// Address and port; null = 0.0.0.0 and the member's api_port.
        #[schemars(extend("default" = null))]
        pub listen: Option<String>,
        /// TLS; null = none.
        #[schemars(extend("default" = null))]
        pub tls: Option<ServerTls>,
        /// Who may change something; null = nobody.
        #[schemars(extend("default" = null))]
        pub auth: Option<Credential>,
    }

    /// A user, and the file with the password.
    pub struct Credential {
        /// The user.
        #[schemars(required)]
        pub username: Option<String>,
        /// The file, mode 0600 or 0400.
        #[schemars(required)]
        pub password_file: Option<String>,
    }

    /// This host's PostgreSQL.
    pub struct Postgres {
        /// The user that PostgreSQL runs as; the daemon drops to it when started as root.
        #[schemars(extend("default" = "postgres"))]
        pub os_user: Option<String>,
        /// Where the binaries are; null = PATH, then the usual places, newest that fits spec.postgres.version.
        #[schemars(extend("default" = null))]
        pub bin_dir: Option<String>,
        /// The data directory.
        #[schemars(required)]
        pub data_dir: Option<String>,
        /// pg_wal elsewhere; null = in the data directory.
        #[schemars(extend("default" = null))]
        pub wal_dir: Option<String>,
        /// Tablespace directories of the leader, and where they are here.
        pub tablespace_map: Option<BTreeMap<String, String>>,
        /// listen_addresses; loopback is always added; null = the member's address.
        #[schemars(extend("default" = null))]
        pub listen: Option<String>,
        /// Directory of the Unix socket; null = run_dir.
        #[schemars(extend("default" = null))]
        pub socket_dir: Option<String>,
        /// Directory of PostgreSQL's log; null = the postmaster's standard error.
        #[schemars(extend("default" = null))]
        pub log_dir: Option<String>,
        /// The superuser that pgherd works as.
        #[schemars(required)]
        pub superuser: Option<Credential>,
        /// The role that standbys replicate as.
        #[schemars(required)]
        pub replication: Option<Credential>,
        /// The role that pg_rewind works as; null = the superuser.
        #[schemars(extend("default" = null))]
        pub rewind: Option<Credential>,
    }

    /// The watchdog device.
    pub struct Watchdog {
        /// The device.
        #[schemars(extend("default" = "/dev/watchdog"))]
        pub device: Option<String>,
    }

    /// What this host does for routing.
    pub struct Routing {
        /// Interface of the virtual address; null = that of the member's address.
        #[schemars(extend("default" = null))]
        pub interface: Option<String>,
        /// HAProxy runtime sockets that are told at once of a role change.
        pub haproxy_sockets: Option<Vec<String>>,
        /// Which services this host keeps current.
        pub manage: Option<Vec<ManagedService>>,
    }

    /// The daemon's own log.
    pub struct Log {
        /// How much.
        #[schemars(extend("default" = "info"))]
        pub level: Option<LogLevel>,
        /// What a line looks like.
        #[schemars(extend("default" = "human"))]
        pub format: Option<LogFormat>,
    }
}
