//! What a cluster document means: the values in force, checked, with defaults filled in.
//!
//! A default whose feature is not built is not in force: `watchdog.mode` reads off here whatever was typed. What was typed is in [`ClusterSpec::typed`]; [`super::unbuilt`] says what follows from that.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value as Json;

use super::problems::Problems;
use super::schema::CLUSTER_SHAPE;
use super::{Loaded, load as load_document};
use crate::policy::deadlines::LeaseTimes;
use crate::types::{ClusterName, MemberName};

mod meaning;
pub mod typed;

pub use typed::{Checkpoint, OnRewindFailure, PoolMode, ReplicationMode, VipManager, WatchdogMode};

/// Reads a cluster document. `source_name` only labels the problems.
///
/// # Errors
/// All problems of the document, when one of them is an error.
pub fn load(source_name: &str, text: &str) -> Result<Loaded<ClusterSpec>, Problems> {
    load_document(source_name, text, "Cluster", &CLUSTER_SHAPE, meaning::cluster)
}

/// A cluster as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterSpec {
    /// Its name.
    pub name: ClusterName,
    /// Free text, shown only.
    pub labels: BTreeMap<String, String>,
    /// Only these may join; order breaks ties. At least one.
    pub members: Vec<Member>,
    /// Leader lock and failover.
    pub ha: Ha,
    /// How standbys follow.
    pub replication: Replication,
    /// What PostgreSQL is told.
    pub postgres: PostgresSpec,
    /// How the first data directory comes about.
    pub bootstrap: BootstrapSpec,
    /// The watchdog device.
    pub watchdog: WatchdogSpec,
    /// How clients find the primary.
    pub routing: Routing,
    /// The document as typed.
    pub typed: Box<typed::Cluster>,
}

impl ClusterSpec {
    /// The times of the leader's lease.
    pub fn lease_times(&self) -> LeaseTimes {
        LeaseTimes { ttl: self.ha.ttl, safety_margin: self.watchdog.safety_margin, watchdog: None }
    }

    /// The declared member of that name.
    pub fn member(&self, name: &MemberName) -> Option<&Member> {
        self.members.iter().find(|member| member.name == *name)
    }
}

/// One server of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name, and its application_name.
    pub name: MemberName,
    /// Host name or IP address that the others reach it at.
    pub address: String,
    /// Port of PostgreSQL.
    pub port: u16,
    /// Port of the HTTP API.
    pub api_port: u16,
    /// 0 = never leads; higher wins between equal positions.
    pub failover_priority: u32,
    /// Tags.
    pub tags: Tags,
}

impl Member {
    /// Where its HTTP API is: `http://10.0.12.9:8008`, with brackets around an IPv6 address.
    pub fn api_url(&self) -> String {
        let host = if self.address.contains(':') { format!("[{}]", self.address) } else { self.address.clone() };
        format!("http://{host}:{}", self.api_port)
    }

    /// Whether the spec forbids that it leads. One that follows by the archive only has no commit that its leader did not archive.
    pub fn nofailover(&self) -> bool {
        self.failover_priority == 0 || self.tags.nofailover || self.tags.nostream
    }

    /// The tags that are set, as Patroni shows them: booleans only when true, a priority only when it is not the default.
    pub fn tags_set(&self) -> BTreeMap<String, Json> {
        let mut set = self.tags.set();
        if self.nofailover() {
            set.insert("nofailover".to_owned(), Json::Bool(true));
        } else if self.failover_priority != DEFAULT_PRIORITY {
            set.insert("failover_priority".to_owned(), self.failover_priority.into());
        }
        set
    }
}

/// Default of failover_priority and of sync_priority.
pub const DEFAULT_PRIORITY: u32 = 1;

/// Patroni's tags, and the operator's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tags {
    /// Never leads.
    pub nofailover: bool,
    /// Not among the replicas that reads are sent to.
    pub noloadbalance: bool,
    /// Copied instead of the leader, while it streams and is near.
    pub clonefrom: bool,
    /// Never synchronous.
    pub nosync: bool,
    /// Follows by the archive only; never leads and never counts.
    pub nostream: bool,
    /// Higher is synchronous first.
    pub sync_priority: u32,
    /// The member that it streams from instead of the leader, while that one is well.
    pub replicatefrom: Option<MemberName>,
    /// The operator's own: text, numbers, booleans.
    pub extra: BTreeMap<String, Json>,
}

impl Tags {
    /// The tags that are set.
    pub fn set(&self) -> BTreeMap<String, Json> {
        let flags = [
            ("nofailover", self.nofailover),
            ("noloadbalance", self.noloadbalance),
            ("clonefrom", self.clonefrom),
            ("nosync", self.nosync),
            ("nostream", self.nostream),
        ];
        let mut set = self.extra.clone();
        set.extend(flags.into_iter().filter(|(_, on)| *on).map(|(name, _)| (name.to_owned(), Json::Bool(true))));
        if self.sync_priority != DEFAULT_PRIORITY {
            set.insert("sync_priority".to_owned(), self.sync_priority.into());
        }
        if let Some(upstream) = &self.replicatefrom {
            set.insert("replicatefrom".to_owned(), upstream.as_str().into());
        }
        set
    }
}

/// Leader lock and failover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ha {
    /// Life of the leader lock: whole seconds, 3 s to 300 s.
    pub ttl: Duration,
    /// Full reconcile when nothing happens: 1 s to 60 s.
    pub loop_wait: Duration,
    /// One operation on PostgreSQL or etcd outside the lock: 1 s to 60 s.
    pub retry_timeout: Duration,
    /// Bytes; a member further behind does not lead.
    pub maximum_lag_on_failover: u64,
    /// How long the primary may take to start; zero = fail over at once.
    pub primary_start_timeout: Duration,
    /// How long a planned stop may take.
    pub primary_stop_timeout: Duration,
    /// While etcd cannot be asked, the leader goes on as long as every other member that may lead answers.
    pub failsafe: bool,
}

/// How standbys follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replication {
    /// When a commit is acknowledged.
    pub mode: ReplicationMode,
    /// Standbys that must hold a commit before it is acknowledged.
    pub synchronous_node_count: u32,
    /// No standby, no commit.
    pub strict: bool,
    /// Bytes; a standby further behind is not synchronous. None = no limit.
    pub maximum_lag_on_syncnode: Option<u64>,
    /// Each member has a slot.
    pub use_slots: bool,
    /// How long an absent member's slot is kept.
    pub member_slots_ttl: Duration,
    /// Permanent slots by name.
    pub slots: BTreeMap<String, PermanentSlot>,
    /// How pg_basebackup is called.
    pub basebackup: Basebackup,
}

/// A slot that is always there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PermanentSlot {
    /// Keeps WAL.
    Physical,
    /// Keeps changes for a subscriber.
    Logical {
        /// Of this database.
        database: String,
        /// By this output plugin.
        plugin: String,
    },
}

/// How pg_basebackup is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Basebackup {
    /// Bytes per second, 32 kB to 1 GB.
    pub max_rate: Option<u64>,
    /// `--compress`, on the server: `server-lz4:1`.
    pub compress: Option<String>,
    /// The checkpoint it begins with.
    pub checkpoint: Checkpoint,
}

/// What PostgreSQL is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresSpec {
    /// Major version; None = that of the first member's binaries.
    pub version: Option<u32>,
    /// Rewind a diverged member instead of cloning it.
    pub use_pg_rewind: bool,
    /// What happens to one that cannot be rewound.
    pub on_rewind_failure: OnRewindFailure,
    /// Values as PostgreSQL's own text; None = PostgreSQL's default.
    pub parameters: BTreeMap<String, Option<String>>,
    /// The same for single members.
    pub member_parameters: BTreeMap<MemberName, BTreeMap<String, Option<String>>>,
    /// Lines of pg_hba.conf behind pgherd's own; `{members}` stands for every member's address.
    pub pg_hba: Vec<String>,
    /// Lines of pg_ident.conf.
    pub pg_ident: Vec<String>,
    /// Shell command.
    pub archive_command: Option<String>,
    /// Shell command.
    pub restore_command: Option<String>,
}

impl PostgresSpec {
    /// The parameters of one member: the cluster's, and the member's own over them.
    pub fn parameters_of(&self, member: &MemberName) -> BTreeMap<String, Option<String>> {
        let mut parameters = self.parameters.clone();
        parameters.extend(self.member_parameters.get(member).cloned().unwrap_or_default());
        parameters
    }
}

/// How the first data directory comes about: by initdb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapSpec {
    /// What initdb is told.
    pub initdb: Initdb,
    /// SQL, once, on the first primary.
    pub post_init: Vec<String>,
}

/// What initdb is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initdb {
    /// `--encoding`.
    pub encoding: String,
    /// `--locale`.
    pub locale: String,
    /// `--data-checksums`.
    pub data_checksums: bool,
    /// `--auth-local`.
    pub auth_local: String,
    /// `--auth-host`.
    pub auth_host: String,
}

/// The watchdog device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchdogSpec {
    /// Only off is built.
    pub mode: WatchdogMode,
    /// M: no reset, and no PostgreSQL, later than the lock's end minus this. In force with and without a watchdog.
    pub safety_margin: Duration,
}

/// How clients find the primary. Rendering is not built.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Routing {
    /// A virtual address.
    pub vip: Option<Vip>,
    /// HAProxy.
    pub haproxy: Option<Haproxy>,
    /// PgBouncer.
    pub pgbouncer: Option<Pgbouncer>,
    /// Members of etcd.
    pub etcd_peers: Vec<EtcdPeer>,
}

/// A virtual address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    /// Address and prefix length: `10.0.12.10/24`.
    pub address: String,
    /// VRRP's number, 1 to 255.
    pub virtual_router_id: u8,
    /// Who moves it.
    pub manager: VipManager,
}

/// HAProxy on every host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Haproxy {
    /// Leads to the primary.
    pub write_port: u16,
    /// Leads to the replicas.
    pub read_port: u16,
    /// The statistics page.
    pub stats_port: u16,
    /// Connections in all.
    pub maxconn: u32,
    /// Connections to one server.
    pub server_maxconn: u32,
    /// Between checks.
    pub inter: Duration,
    /// Between checks while the answer is changing.
    pub fastinter: Duration,
    /// Failures until a server is down.
    pub fall: u32,
    /// Successes until a server is up.
    pub rise: u32,
    /// To connect to a server.
    pub connect_timeout: Duration,
    /// A silent client.
    pub client_timeout: Duration,
    /// A silent server.
    pub server_timeout: Duration,
    /// A silent health check.
    pub check_timeout: Duration,
}

/// PgBouncer on every host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pgbouncer {
    /// Where clients connect.
    pub port: u16,
    /// How connections are shared.
    pub pool_mode: PoolMode,
    /// Server connections per user and database.
    pub default_pool_size: u32,
    /// Clients in all.
    pub max_client_conn: u32,
}

/// A member of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdPeer {
    /// Its name.
    pub name: String,
    /// Host name or IP address.
    pub address: String,
}
