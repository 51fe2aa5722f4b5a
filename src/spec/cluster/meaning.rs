//! From what was typed to what it means: defaults, and the checks of single values.

use std::collections::BTreeMap;
use std::time::Duration;

use core::net::IpAddr;

use super::typed::{self, Checkpoint, OnRewindFailure, PoolMode, ReplicationMode, SlotType, VipManager, WatchdogMode};
use super::{
    Basebackup, BootstrapSpec, ClusterSpec, DEFAULT_PRIORITY, EtcdPeer, Ha, Haproxy, Initdb, Member, PermanentSlot, Pgbouncer,
    PostgresSpec, Replication, Routing, Tags, Vip, WatchdogSpec,
};
use crate::policy::deadlines::default_safety_margin;
use crate::spec::problems::{Report, nearest};
use crate::spec::scalars::{Text, TypedDuration, show_duration};
use crate::spec::walk::join;
use crate::spec::{checks, rules};
use crate::types::MemberName;

/// Default of ha.ttl.
const TTL: Duration = Duration::from_secs(10);
/// Most members; each publishes a key, and one transaction of etcd takes 128 operations.
const MEMBERS_MAX: usize = 64;
/// With fewer members the default of replication.mode is async.
const QUORUM_MEMBERS_MIN: usize = 3;
/// Default of pg_hba.
const PG_HBA: &str = "host all all {members} scram-sha-256";

/// The whole document. None when a part is missing that nothing can stand in for; the report says which.
pub(super) fn cluster(typed: typed::Cluster, report: &mut Report) -> Option<ClusterSpec> {
    let original = Box::new(typed.clone());
    let metadata = typed.metadata.unwrap_or_default();
    let spec = typed.spec.unwrap_or_default();
    let name = metadata.name.and_then(|name| report.parse("metadata.name", &name));
    let labels = labels(metadata.labels.unwrap_or_default(), report);
    let members = members(spec.members.unwrap_or_default(), report);
    let ha = ha(spec.ha.unwrap_or_default(), report);
    let replication = replication(spec.replication.unwrap_or_default(), members.len(), report);
    let postgres = postgres(spec.postgres.unwrap_or_default(), &members, report);
    let bootstrap = bootstrap(spec.bootstrap.unwrap_or_default(), report);
    let watchdog = watchdog(spec.watchdog.unwrap_or_default(), ha.ttl);
    let routing = routing(spec.routing.unwrap_or_default(), report);
    // A wrong name must not hide what the rules find; its problem is in the report, so the spec goes nowhere.
    let name = name.or_else(|| "unnamed".parse().ok())?;
    let spec = ClusterSpec { name, labels, members, ha, replication, postgres, bootstrap, watchdog, routing, typed: original };
    rules::check(&spec, report);
    Some(spec)
}

fn duration(typed: Option<TypedDuration>, default: Duration) -> Duration {
    typed.map_or(default, |typed| typed.0)
}

fn labels(typed: BTreeMap<String, Text>, report: &mut Report) -> BTreeMap<String, String> {
    for (key, value) in &typed {
        let path = join("metadata.labels", key);
        report.check(&path, checks::one_line(key).and_then(|()| checks::one_line(&value.0)));
    }
    typed.into_iter().map(|(key, value)| (key, value.0)).collect()
}

fn members(typed: Vec<typed::Member>, report: &mut Report) -> Vec<Member> {
    if typed.is_empty() {
        report.error("spec.members", "expected at least one member");
    }
    if typed.len() > MEMBERS_MAX {
        report.error("spec.members", format!("expected at most {MEMBERS_MAX} members, found {}", typed.len()));
    }
    let members = typed.into_iter().enumerate();
    members.filter_map(|(index, member)| self::member(member, &format!("spec.members[{index}]"), report)).collect()
}

fn member(typed: typed::Member, path: &str, report: &mut Report) -> Option<Member> {
    let name = typed.name.and_then(|name| report.parse(&join(path, "name"), &name));
    if let Some(address) = &typed.address {
        report.check(&join(path, "address"), checks::host(address));
    }
    let tags_path = join(path, "tags");
    let typed_tags = typed.tags.unwrap_or_default();
    if typed.failover_priority == Some(0) && typed_tags.nofailover == Some(false)
        || typed.failover_priority.is_some_and(|priority| priority > 0) && typed_tags.nofailover == Some(true)
    {
        report.warn(&join(&tags_path, "nofailover"), "this contradicts failover_priority; the member never leads");
    }
    let tags = tags(typed_tags, &tags_path, report);
    Some(Member {
        name: name?,
        address: typed.address?,
        port: typed.port.unwrap_or(5432),
        api_port: typed.api_port.unwrap_or(8008),
        failover_priority: typed.failover_priority.unwrap_or(DEFAULT_PRIORITY),
        tags,
    })
}

fn tags(typed: typed::Tags, path: &str, report: &mut Report) -> Tags {
    const KNOWN: [&str; 7] = ["nofailover", "noloadbalance", "clonefrom", "nosync", "nostream", "sync_priority", "replicatefrom"];
    for (key, value) in &typed.extra {
        let path = join(path, key);
        report.check(&path, checks::one_line(key));
        if let Some(text) = value.0.as_str() {
            report.check(&path, checks::one_line(text));
        }
        if key == "failover_priority" {
            report.error(&path, "failover_priority is a key of the member, beside tags");
        } else if let Some(near) = nearest(key, KNOWN) {
            report.warn(&path, format!("taken as a tag of your own; if `{near}` is meant, it is not set"));
        }
    }
    let replicatefrom = typed.replicatefrom.and_then(|name| report.parse(&join(path, "replicatefrom"), &name));
    Tags {
        nofailover: typed.nofailover.unwrap_or(false),
        noloadbalance: typed.noloadbalance.unwrap_or(false),
        clonefrom: typed.clonefrom.unwrap_or(false),
        nosync: typed.nosync.unwrap_or(false),
        nostream: typed.nostream.unwrap_or(false),
        sync_priority: typed.sync_priority.unwrap_or(DEFAULT_PRIORITY),
        replicatefrom,
        extra: typed.extra.into_iter().map(|(key, value)| (key, value.0)).collect(),
    }
}

fn ha(typed: typed::Ha, report: &mut Report) -> Ha {
    let ttl = duration(typed.ttl, TTL);
    if ttl.subsec_nanos() != 0 {
        let found = show_duration(ttl);
        report.error("spec.ha.ttl", format!("expected whole seconds, because etcd counts the life of a lease in them; found {found}"));
    }
    if typed.master_start_timeout.is_some() {
        let path = "spec.ha.master_start_timeout";
        if typed.primary_start_timeout.is_some() {
            report.error(path, "this is the old name of primary_start_timeout, which is set too; expected one of them");
        } else {
            report.warn(path, "this is the old name of primary_start_timeout; it is taken for that");
        }
    }
    Ha {
        ttl,
        loop_wait: duration(typed.loop_wait, Duration::from_secs(5)),
        retry_timeout: duration(typed.retry_timeout, Duration::from_secs(3)),
        maximum_lag_on_failover: typed.maximum_lag_on_failover.map_or(1 << 20, |size| size.0),
        primary_start_timeout: duration(typed.primary_start_timeout.or(typed.master_start_timeout), Duration::from_secs(300)),
        primary_stop_timeout: duration(typed.primary_stop_timeout, Duration::from_secs(30)),
        failsafe: typed.failsafe.unwrap_or(true),
    }
}

fn replication(typed: typed::Replication, members: usize, report: &mut Report) -> Replication {
    let basebackup = typed.basebackup.unwrap_or_default();
    if let Some(compress) = &basebackup.compress {
        let (method, detail) = compress.split_once(':').unwrap_or((compress, "level=1"));
        let known = matches!(method, "server-gzip" | "server-lz4" | "server-zstd");
        if !known || detail.is_empty() || !detail.chars().all(|c| c.is_ascii_alphanumeric() || "=,".contains(c)) {
            let expected = "expected server-gzip, server-lz4 or server-zstd, with `:` and details if wanted (server-lz4:1)";
            report.error("spec.replication.basebackup.compress", format!("{expected}, found `{}`", compress.escape_debug()));
        }
    }
    Replication {
        mode: typed.mode.unwrap_or(if members < QUORUM_MEMBERS_MIN { ReplicationMode::Async } else { ReplicationMode::Quorum }),
        synchronous_node_count: typed.synchronous_node_count.unwrap_or(1),
        strict: typed.strict.unwrap_or(false),
        maximum_lag_on_syncnode: typed.maximum_lag_on_syncnode.map(|size| size.0),
        use_slots: typed.use_slots.unwrap_or(true),
        member_slots_ttl: duration(typed.member_slots_ttl, Duration::from_secs(30 * 60)),
        slots: typed.slots.unwrap_or_default().into_iter().filter_map(|(name, slot)| Some((name, permanent_slot(slot)?))).collect(),
        basebackup: Basebackup {
            max_rate: basebackup.max_rate.map(|size| size.0),
            compress: basebackup.compress,
            checkpoint: basebackup.checkpoint.unwrap_or(Checkpoint::Fast),
        },
    }
}

/// One that says too little is an error of the rules.
fn permanent_slot(slot: typed::Slot) -> Option<PermanentSlot> {
    match slot.slot_type? {
        SlotType::Physical => Some(PermanentSlot::Physical),
        SlotType::Logical => Some(PermanentSlot::Logical { database: slot.database?, plugin: slot.plugin? }),
    }
}

fn plain_parameters(typed: BTreeMap<String, Option<Text>>) -> BTreeMap<String, Option<String>> {
    typed.into_iter().map(|(name, value)| (name, value.map(|text| text.0))).collect()
}

fn postgres(typed: typed::Postgres, members: &[Member], report: &mut Report) -> PostgresSpec {
    let mut member_parameters = BTreeMap::new();
    for (name, parameters) in typed.member_parameters.unwrap_or_default() {
        let path = join("spec.postgres.member_parameters", &name);
        let Some(name) = report.parse::<MemberName>(&path, &name) else { continue };
        if !members.iter().any(|member| member.name == name) {
            let near = nearest(name.as_str(), members.iter().map(|member| member.name.as_str()));
            let message = format!("there is no member `{name}`");
            match near {
                Some(near) => report.error_hint(&path, message, format!("did you mean `{near}`?")),
                None => report.error(&path, message),
            }
        }
        member_parameters.insert(name, plain_parameters(parameters));
    }
    for (key, command) in [("archive_command", &typed.archive_command), ("restore_command", &typed.restore_command)] {
        if let Some(command) = command {
            report.check(&join("spec.postgres", key), checks::one_line(command));
        }
    }
    PostgresSpec {
        version: typed.version,
        use_pg_rewind: typed.use_pg_rewind.unwrap_or(true),
        on_rewind_failure: typed.on_rewind_failure.unwrap_or(OnRewindFailure::Reclone),
        parameters: plain_parameters(typed.parameters.unwrap_or_default()),
        member_parameters,
        pg_hba: typed.pg_hba.unwrap_or_else(|| vec![PG_HBA.to_owned()]),
        pg_ident: typed.pg_ident.unwrap_or_default(),
        archive_command: typed.archive_command,
        restore_command: typed.restore_command,
    }
}

fn bootstrap(typed: typed::Bootstrap, report: &mut Report) -> BootstrapSpec {
    let initdb = typed.initdb.unwrap_or_default();
    let mut word = |key: &str, value: Option<String>, default: &str, what: &str| {
        let value = value.unwrap_or_else(|| default.to_owned());
        report.check(&join("spec.bootstrap.initdb", key), checks::word(&value, what));
        value
    };
    let initdb = Initdb {
        encoding: word("encoding", initdb.encoding, "UTF8", "the name of an encoding such as UTF8"),
        locale: word("locale", initdb.locale, "C.UTF-8", "the name of a locale such as C.UTF-8"),
        data_checksums: initdb.data_checksums.unwrap_or(true),
        auth_local: word("auth_local", initdb.auth_local, "peer", "an authentication method such as peer"),
        auth_host: word("auth_host", initdb.auth_host, "scram-sha-256", "an authentication method such as scram-sha-256"),
    };
    let post_init = typed.post_init.unwrap_or_default();
    for (index, sql) in post_init.iter().enumerate() {
        if sql.trim().is_empty() || sql.contains('\0') {
            report.error(&format!("spec.bootstrap.post_init[{index}]"), "expected an SQL command");
        }
    }
    BootstrapSpec { initdb, post_init }
}

fn watchdog(typed: typed::Watchdog, ttl: Duration) -> WatchdogSpec {
    WatchdogSpec { mode: WatchdogMode::Off, safety_margin: duration(typed.safety_margin, default_safety_margin(ttl)) }
}

fn routing(typed: typed::Routing, report: &mut Report) -> Routing {
    let vip = typed.vip.and_then(|vip| {
        let address = vip.address?;
        let fits = address.split_once('/').is_some_and(|(host, bits)| match (host.parse(), bits.parse::<u8>()) {
            (Ok(IpAddr::V4(_)), Ok(bits)) => bits <= 32,
            (Ok(IpAddr::V6(_)), Ok(bits)) => bits <= 128,
            _ => false,
        });
        if !fits {
            let message = format!("expected an IP address and a prefix length such as 10.0.12.10/24, found `{}`", address.escape_debug());
            report.error("spec.routing.vip.address", message);
        }
        Some(Vip { address, virtual_router_id: vip.virtual_router_id?, manager: vip.manager.unwrap_or(VipManager::Keepalived) })
    });
    let pgbouncer = typed.pgbouncer.map(|pgbouncer| Pgbouncer {
        port: pgbouncer.port.unwrap_or(6432),
        pool_mode: pgbouncer.pool_mode.unwrap_or(PoolMode::Transaction),
        default_pool_size: pgbouncer.default_pool_size.unwrap_or(20),
        max_client_conn: pgbouncer.max_client_conn.unwrap_or(500),
    });
    let peers = typed.etcd_peers.unwrap_or_default().into_iter().enumerate().filter_map(|(index, peer)| {
        let path = format!("spec.routing.etcd_peers[{index}]");
        let (name, address) = (peer.name?, peer.address?);
        report.check(&join(&path, "name"), checks::word(&name, "the name of a member of etcd"));
        report.check(&join(&path, "address"), checks::host(&address));
        Some(EtcdPeer { name, address })
    });
    let etcd_peers = peers.collect();
    Routing { vip, haproxy: typed.haproxy.map(haproxy), pgbouncer, etcd_peers }
}

fn haproxy(typed: typed::Haproxy) -> Haproxy {
    let check = typed.check.unwrap_or_default();
    let timeouts = typed.timeouts.unwrap_or_default();
    Haproxy {
        write_port: typed.write_port.unwrap_or(5000),
        read_port: typed.read_port.unwrap_or(5001),
        stats_port: typed.stats_port.unwrap_or(7000),
        maxconn: typed.maxconn.unwrap_or(1000),
        server_maxconn: typed.server_maxconn.unwrap_or(100),
        inter: duration(check.inter, Duration::from_secs(1)),
        fastinter: duration(check.fastinter, Duration::from_millis(200)),
        fall: check.fall.unwrap_or(2),
        rise: check.rise.unwrap_or(1),
        connect_timeout: duration(timeouts.connect, Duration::from_secs(4)),
        client_timeout: duration(timeouts.client, Duration::from_secs(3600)),
        server_timeout: duration(timeouts.server, Duration::from_secs(3600)),
        check_timeout: duration(timeouts.check, Duration::from_secs(5)),
    }
}
