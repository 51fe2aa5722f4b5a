//! A cluster document as typed. The JSON Schema is generated from these types, and its keys, types and ranges are what documents are
//! held against.
//!
//! Every field is optional here, so that a document with a problem can still be read for its other problems. A key may be null where
//! its default is null, and a section may be left empty; nothing else may be null.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::spec::scalars::{TagValue, Text, TypedDuration, TypedSize};

/// Derives what every section has.
macro_rules! sections {
    ($($(#[$meta:meta])* pub struct $name:ident { $($body:tt)* })*) => {$(
        #[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        $(#[$meta])*
        pub struct $name { $($body)* }
    )*};
}

/// Derives what every choice of words has.
macro_rules! words {
    ($($(#[$meta:meta])* pub enum $name:ident { $($body:tt)* })*) => {$(
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
        #[serde(rename_all = "lowercase")]
        $(#[$meta])*
        pub enum $name { $($body)* }
    )*};
}

pub(in crate::spec) use {sections, words};

words! {
    /// The version of the format. Defaults belong to it.
    pub enum ApiVersion {
        /// The only one so far.
        #[serde(rename = "pgherd/v1")]
        V1,
    }
    /// The kind of document.
    pub enum Kind {
        /// A cluster.
        #[serde(rename = "Cluster")]
        Cluster,
    }
    /// When a commit is acknowledged.
    pub enum ReplicationMode {
        /// When any of the set of standbys hold it.
        Quorum,
        /// When named standbys hold it.
        Sync,
        /// When the primary holds it.
        Async,
    }
    /// What a slot is for.
    pub enum SlotType {
        /// Physical replication.
        Physical,
        /// Logical decoding.
        Logical,
    }
    /// The checkpoint that a base backup begins with.
    pub enum Checkpoint {
        /// At once.
        Fast,
        /// Spread out, gentle on the primary.
        Spread,
    }
    /// What happens when a member cannot be rewound.
    pub enum OnRewindFailure {
        /// Clone it anew.
        Reclone,
        /// Leave it for a person.
        Stop,
    }
    /// How restarts that parameters need come about.
    pub enum RestartPolicy {
        /// One member after the other, replicas first.
        Rolling,
        /// When somebody says so.
        Manual,
    }
    /// Use of the watchdog device.
    pub enum WatchdogMode {
        /// Not used.
        Off,
        /// Used where there is one.
        Automatic,
        /// No member leads without one.
        Required,
    }
    /// Who moves the virtual address.
    pub enum VipManager {
        /// Keepalived, by a rendered file.
        Keepalived,
        /// pgherd itself.
        Pgherd,
    }
    /// How PgBouncer shares connections.
    pub enum PoolMode {
        /// Until the client leaves.
        Session,
        /// Until the transaction ends.
        Transaction,
        /// Until the statement ends.
        Statement,
    }
}

sections! {
    /// A PostgreSQL cluster as it should be.
    #[schemars(title = "pgherd cluster document")]
    pub struct Cluster {
        /// The version of the format.
        #[serde(rename = "apiVersion")]
        #[schemars(required)]
        pub api_version: Option<ApiVersion>,
        /// The kind of document.
        #[schemars(required)]
        pub kind: Option<Kind>,
        /// What the cluster is called.
        #[schemars(required)]
        pub metadata: Option<Metadata>,
        /// How the cluster should be.
        #[schemars(required)]
        pub spec: Option<Spec>,
    }

    /// What the cluster is called.
    pub struct Metadata {
        /// `[a-z][a-z0-9-]{0,39}`; part of the etcd prefix, and PostgreSQL's cluster_name.
        #[schemars(required, regex(pattern = "^[a-z][a-z0-9-]{0,39}$"))]
        pub name: Option<String>,
        /// Free text, shown only.
        pub labels: Option<BTreeMap<String, Text>>,
    }

    /// How the cluster should be.
    pub struct Spec {
        /// Only these may join; order breaks ties.
        #[schemars(required, length(min = 1, max = 64))]
        pub members: Option<Vec<Member>>,
        /// Leader lock and failover.
        pub ha: Option<Ha>,
        /// How standbys follow.
        pub replication: Option<Replication>,
        /// What PostgreSQL is told.
        pub postgres: Option<Postgres>,
        /// How the first data directory comes about.
        pub bootstrap: Option<Bootstrap>,
        /// The watchdog device.
        pub watchdog: Option<Watchdog>,
        /// How clients find the primary.
        pub routing: Option<Routing>,
    }

    /// One server of the cluster.
    pub struct Member {
        /// `[a-z][a-z0-9_-]{0,62}`; application_name as it is, slot name with underscores.
        #[schemars(required, regex(pattern = "^[a-z][a-z0-9_-]{0,62}$"))]
        pub name: Option<String>,
        /// Host name or IP address that the others reach it at.
        #[schemars(required)]
        pub address: Option<String>,
        /// Port of PostgreSQL.
        #[schemars(range(min = 1, max = 65535), extend("default" = 5432))]
        pub port: Option<u16>,
        /// Port of the HTTP API.
        #[schemars(range(min = 1, max = 65535), extend("default" = 8008))]
        pub api_port: Option<u16>,
        /// 0 = never leads; higher wins between equal positions.
        #[schemars(range(min = 0, max = 1_000_000), extend("default" = 1))]
        pub failover_priority: Option<u32>,
        /// Patroni's names and meaning; further keys are the operator's own.
        pub tags: Option<Tags>,
    }

    /// Leader lock and failover.
    pub struct Ha {
        /// 3s-300s, whole seconds: life of the leader lock.
        #[schemars(extend("default" = "10s", "x-range" = ["3s", "300s"]))]
        pub ttl: Option<TypedDuration>,
        /// 1s-60s: full reconcile when nothing happens. No part in the lock.
        #[schemars(extend("default" = "5s", "x-range" = ["1s", "60s"]))]
        pub loop_wait: Option<TypedDuration>,
        /// 1s-60s: one operation on PostgreSQL or etcd outside the lock. No part in the lock.
        #[schemars(extend("default" = "3s", "x-range" = ["1s", "60s"]))]
        pub retry_timeout: Option<TypedDuration>,
        /// A member further behind does not lead.
        #[schemars(extend("default" = "1MB"))]
        pub maximum_lag_on_failover: Option<TypedSize>,
        /// How long the primary may take to start; 0 = fail over at once.
        #[schemars(extend("default" = "300s"))]
        pub primary_start_timeout: Option<TypedDuration>,
        /// Patroni's old name of primary_start_timeout.
        #[schemars(extend("default" = "300s", "deprecated" = true))]
        pub master_start_timeout: Option<TypedDuration>,
        /// Planned stops only; fencing has its ladder.
        #[schemars(extend("default" = "30s"))]
        pub primary_stop_timeout: Option<TypedDuration>,
        /// While etcd cannot be asked the leader goes on as long as every other member answers.
        #[schemars(extend("default" = true))]
        pub failsafe: Option<bool>,
    }

    /// How standbys follow.
    pub struct Replication {
        /// When a commit is acknowledged; with fewer than three members the default is async.
        #[schemars(extend("default" = "quorum"))]
        pub mode: Option<ReplicationMode>,
        /// Standbys that must hold a commit.
        #[schemars(range(min = 1, max = 1000), extend("default" = 1))]
        pub synchronous_node_count: Option<u32>,
        /// No standby, no commit.
        #[schemars(extend("default" = false))]
        pub strict: Option<bool>,
        /// A standby further behind is not synchronous; null = no limit.
        #[schemars(extend("default" = null))]
        pub maximum_lag_on_syncnode: Option<TypedSize>,
        /// Each member has a slot.
        #[schemars(extend("default" = true))]
        pub use_slots: Option<bool>,
        /// How long an absent member's slot is kept.
        #[schemars(extend("default" = "30min"))]
        pub member_slots_ttl: Option<TypedDuration>,
        /// Permanent slots by name.
        pub slots: Option<BTreeMap<String, Slot>>,
        /// Tried in order: `basebackup`, or a name under bootstrap.custom.
        #[schemars(extend("default" = ["basebackup"]))]
        pub create_replica_methods: Option<Vec<String>>,
        /// How pg_basebackup is called.
        pub basebackup: Option<Basebackup>,
    }

    /// A permanent slot.
    pub struct Slot {
        /// What it is for.
        #[serde(rename = "type")]
        #[schemars(required)]
        pub slot_type: Option<SlotType>,
        /// Logical only: the database.
        #[schemars(extend("default" = null))]
        pub database: Option<String>,
        /// Logical only: the output plugin.
        #[schemars(extend("default" = null))]
        pub plugin: Option<String>,
    }

    /// How pg_basebackup is called.
    pub struct Basebackup {
        /// Bytes per second, 32kB-1GB; null = no limit.
        #[schemars(extend("default" = null, "x-range" = ["32kB", "1GB"]))]
        pub max_rate: Option<TypedSize>,
        /// Compression on the server: `server-gzip`, `server-lz4`, `server-zstd`, with `:` and details; null = none.
        #[schemars(extend("default" = null))]
        pub compress: Option<String>,
        /// The checkpoint it begins with.
        #[schemars(extend("default" = "fast"))]
        pub checkpoint: Option<Checkpoint>,
    }

    /// What PostgreSQL is told.
    pub struct Postgres {
        /// Major version; null = that of the first member's binaries, kept from then on.
        #[schemars(range(min = 13, max = 99), extend("default" = null))]
        pub version: Option<u32>,
        /// Rewind a diverged member instead of cloning it.
        #[schemars(extend("default" = true))]
        pub use_pg_rewind: Option<bool>,
        /// What happens when a member cannot be rewound.
        #[schemars(extend("default" = "reclone"))]
        pub on_rewind_failure: Option<OnRewindFailure>,
        /// How restarts that parameters need come about.
        #[schemars(extend("default" = "rolling"))]
        pub restart_policy: Option<RestartPolicy>,
        /// Values as PostgreSQL's own text; null = PostgreSQL's default.
        pub parameters: Option<BTreeMap<String, Option<Text>>>,
        /// Parameters of single members, where PostgreSQL allows members to differ.
        pub member_parameters: Option<BTreeMap<String, BTreeMap<String, Option<Text>>>>,
        /// Lines as in pg_hba.conf, in order; {members} stands for every member's address; pgherd's own lines come before these.
        #[schemars(extend("default" = ["host all all {members} scram-sha-256"]))]
        pub pg_hba: Option<Vec<String>>,
        /// Lines as in pg_ident.conf.
        pub pg_ident: Option<Vec<String>>,
        /// Shell command that archives a WAL segment; null = none.
        #[schemars(extend("default" = null))]
        pub archive_command: Option<String>,
        /// Shell command that fetches a WAL segment; null = none.
        #[schemars(extend("default" = null))]
        pub restore_command: Option<String>,
    }

    /// How the first data directory comes about.
    pub struct Bootstrap {
        /// `initdb`, or a name under custom.
        #[schemars(extend("default" = "initdb"))]
        pub method: Option<String>,
        /// What initdb is told.
        pub initdb: Option<Initdb>,
        /// SQL, once, on the first primary.
        pub post_init: Option<Vec<String>>,
        /// Other methods, by name.
        pub custom: Option<BTreeMap<String, CustomMethod>>,
    }

    /// What initdb is told.
    pub struct Initdb {
        /// Encoding of the databases.
        #[schemars(extend("default" = "UTF8"))]
        pub encoding: Option<String>,
        /// Locale of the databases.
        #[schemars(extend("default" = "C.UTF-8"))]
        pub locale: Option<String>,
        /// Checksums on data pages.
        #[schemars(extend("default" = true))]
        pub data_checksums: Option<bool>,
        /// Authentication method of local connections in initdb's own pg_hba.conf.
        #[schemars(extend("default" = "peer"))]
        pub auth_local: Option<String>,
        /// Authentication method of network connections in initdb's own pg_hba.conf.
        #[schemars(extend("default" = "scram-sha-256"))]
        pub auth_host: Option<String>,
    }

    /// A method of the operator's own.
    pub struct CustomMethod {
        /// Program and arguments; no shell.
        #[schemars(required)]
        pub command: Option<Vec<String>>,
    }

    /// The watchdog device.
    pub struct Watchdog {
        /// Use of the device.
        #[schemars(extend("default" = "automatic"))]
        pub mode: Option<WatchdogMode>,
        /// null = ttl/20; no reset later than the lock's end minus this.
        #[schemars(extend("default" = null))]
        pub safety_margin: Option<TypedDuration>,
    }

    /// How clients find the primary.
    pub struct Routing {
        /// A virtual address.
        #[schemars(extend("default" = null))]
        pub vip: Option<Vip>,
        /// HAProxy on every host.
        #[schemars(extend("default" = null))]
        pub haproxy: Option<Haproxy>,
        /// PgBouncer on every host.
        #[schemars(extend("default" = null))]
        pub pgbouncer: Option<Pgbouncer>,
        /// For rendering etcd's own files.
        pub etcd_peers: Option<Vec<EtcdPeer>>,
    }

    /// A virtual address.
    pub struct Vip {
        /// Address and prefix length: 10.0.12.10/24.
        #[schemars(required)]
        pub address: Option<String>,
        /// VRRP's number of the address.
        #[schemars(required, range(min = 1, max = 255))]
        pub virtual_router_id: Option<u8>,
        /// Who moves it.
        #[schemars(extend("default" = "keepalived"))]
        pub manager: Option<VipManager>,
    }

    /// HAProxy on every host.
    pub struct Haproxy {
        /// Leads to the primary.
        #[schemars(range(min = 1, max = 65535), extend("default" = 5000))]
        pub write_port: Option<u16>,
        /// Leads to the replicas.
        #[schemars(range(min = 1, max = 65535), extend("default" = 5001))]
        pub read_port: Option<u16>,
        /// The statistics page.
        #[schemars(range(min = 1, max = 65535), extend("default" = 7000))]
        pub stats_port: Option<u16>,
        /// Connections in all.
        #[schemars(range(min = 1, max = 1_000_000), extend("default" = 1000))]
        pub maxconn: Option<u32>,
        /// Connections to one server.
        #[schemars(range(min = 1, max = 1_000_000), extend("default" = 100))]
        pub server_maxconn: Option<u32>,
        /// Health checks.
        pub check: Option<HaproxyCheck>,
        /// Timeouts.
        pub timeouts: Option<HaproxyTimeouts>,
    }

    /// HAProxy's health checks.
    pub struct HaproxyCheck {
        /// Between checks.
        #[schemars(extend("default" = "1s", "x-range" = ["1ms", "1h"]))]
        pub inter: Option<TypedDuration>,
        /// Between checks while the answer is changing.
        #[schemars(extend("default" = "200ms", "x-range" = ["1ms", "1h"]))]
        pub fastinter: Option<TypedDuration>,
        /// Failures until a server is down.
        #[schemars(range(min = 1, max = 100), extend("default" = 2))]
        pub fall: Option<u32>,
        /// Successes until a server is up.
        #[schemars(range(min = 1, max = 100), extend("default" = 1))]
        pub rise: Option<u32>,
    }

    /// HAProxy's timeouts.
    pub struct HaproxyTimeouts {
        /// To connect to a server.
        #[schemars(extend("default" = "4s", "x-range" = ["1ms", "24d"]))]
        pub connect: Option<TypedDuration>,
        /// A silent client.
        #[schemars(extend("default" = "60min", "x-range" = ["1ms", "24d"]))]
        pub client: Option<TypedDuration>,
        /// A silent server.
        #[schemars(extend("default" = "60min", "x-range" = ["1ms", "24d"]))]
        pub server: Option<TypedDuration>,
        /// A silent health check.
        #[schemars(extend("default" = "5s", "x-range" = ["1ms", "24d"]))]
        pub check: Option<TypedDuration>,
    }

    /// PgBouncer on every host.
    pub struct Pgbouncer {
        /// Where clients connect.
        #[schemars(range(min = 1, max = 65535), extend("default" = 6432))]
        pub port: Option<u16>,
        /// How connections are shared.
        #[schemars(extend("default" = "transaction"))]
        pub pool_mode: Option<PoolMode>,
        /// Server connections per user and database.
        #[schemars(range(min = 1, max = 1_000_000), extend("default" = 20))]
        pub default_pool_size: Option<u32>,
        /// Clients in all.
        #[schemars(range(min = 1, max = 1_000_000), extend("default" = 500))]
        pub max_client_conn: Option<u32>,
    }

    /// A member of etcd.
    pub struct EtcdPeer {
        /// Its name.
        #[schemars(required)]
        pub name: Option<String>,
        /// Host name or IP address.
        #[schemars(required)]
        pub address: Option<String>,
    }
}

/// Patroni's tags, and the operator's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct Tags {
    /// Never leads.
    #[schemars(extend("default" = false))]
    pub nofailover: Option<bool>,
    /// Not among the replicas that reads are sent to.
    #[schemars(extend("default" = false))]
    pub noloadbalance: Option<bool>,
    /// New members are copied from it instead of the leader, while it streams and is near.
    #[schemars(extend("default" = false))]
    pub clonefrom: Option<bool>,
    /// Never synchronous.
    #[schemars(extend("default" = false))]
    pub nosync: Option<bool>,
    /// Follows by the archive only (restore_command); never leads, never counts.
    #[schemars(extend("default" = false))]
    pub nostream: Option<bool>,
    /// Higher is synchronous first.
    #[schemars(range(min = 0, max = 1_000_000), extend("default" = 1))]
    pub sync_priority: Option<u32>,
    /// The member that it streams from instead of the leader, while that one is well.
    #[schemars(extend("default" = null))]
    pub replicatefrom: Option<String>,
    /// The operator's own.
    #[serde(flatten)]
    pub extra: BTreeMap<String, TagValue>,
}
