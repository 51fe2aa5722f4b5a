//! From what was typed in a node document to what it means: defaults, and the checks of single values.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::typed::{self, LogFormat, LogLevel};
use super::{ApiSpec, ClientTls, Credential, EtcdSpec, LogSpec, NodePostgres, NodeRouting, NodeSpec, NodeWatchdog, ServerTls};
use crate::spec::checks;
use crate::spec::problems::Report;
use crate::spec::walk::join;

/// A Unix socket's address has room for 107 bytes, and PostgreSQL appends `/.s.PGSQL.65535`.
const SOCKET_DIR_MAX_BYTES: usize = 107 - "/.s.PGSQL.65535".len();
/// Longest path of a Unix socket, in bytes.
const SOCKET_MAX_BYTES: usize = 107;
/// Each HAProxy is looked at by a task of its own.
const HAPROXY_SOCKETS_MAX: usize = 8;
/// Longest interface name (Linux IFNAMSIZ - 1).
const INTERFACE_MAX_BYTES: usize = 15;

/// The whole document. None when a part is missing that nothing can stand in for; the report says which.
pub(super) fn node(typed: typed::Node, report: &mut Report) -> Option<NodeSpec> {
    let spec = typed.spec.unwrap_or_default();
    let name = typed.metadata.unwrap_or_default().name.and_then(|name| report.parse("metadata.name", &name));
    let cluster = spec.cluster.and_then(|cluster| report.parse("spec.cluster", &cluster));
    let etcd = etcd(spec.etcd.unwrap_or_default(), report);
    let api = api(spec.api.unwrap_or_default(), report);
    let run_dir = path(spec.run_dir.or_else(|| Some("/run/pgherd".to_owned())), "spec.run_dir", report);
    let postgres = postgres(spec.postgres.unwrap_or_default(), report);
    let device = spec.watchdog.unwrap_or_default().device.or_else(|| Some("/dev/watchdog".to_owned()));
    let device = path(device, "spec.watchdog.device", report);
    let routing = routing(spec.routing.unwrap_or_default(), report);
    let log = spec.log.unwrap_or_default();
    let node = NodeSpec {
        name: name?,
        cluster: cluster?,
        etcd: etcd?,
        api: api?,
        postgres: postgres?,
        watchdog: NodeWatchdog { device: device? },
        routing,
        run_dir: run_dir?,
        log: LogSpec { level: log.level.unwrap_or(LogLevel::Info), format: log.format.unwrap_or(LogFormat::Human) },
    };
    directories(&node, report);
    Some(node)
}

fn path(typed: Option<String>, key: &str, report: &mut Report) -> Option<PathBuf> {
    typed.and_then(|typed| report.check(key, checks::absolute_path(&typed)))
}

/// The file of a secret. What was typed is not repeated: it may be the secret itself.
fn secret(typed: Option<String>, key: &str, report: &mut Report) -> Option<PathBuf> {
    let outcome = checks::absolute_path(&typed?).map_err(|_| "expected the absolute path of a file that holds the secret".to_owned());
    report.check(key, outcome)
}

/// A section that may be left out: None in the outer option when it is there and cannot be used.
fn section<T, S>(typed: Option<T>, read: impl FnOnce(T) -> Option<S>) -> Option<Option<S>> {
    match typed {
        None => Some(None),
        Some(typed) => read(typed).map(Some),
    }
}

fn credential(typed: typed::Credential, key: &str, report: &mut Report) -> Option<Credential> {
    if let Some(username) = &typed.username {
        report.check(&join(key, "username"), checks::identifier(username, "a user name"));
    }
    let password_file = secret(typed.password_file, &join(key, "password_file"), report);
    Some(Credential { username: typed.username?, password_file: password_file? })
}

fn etcd(typed: typed::Etcd, report: &mut Report) -> Option<EtcdSpec> {
    let endpoints = typed.endpoints.unwrap_or_default();
    if endpoints.is_empty() {
        report.error("spec.etcd.endpoints", "expected at least one endpoint such as http://10.0.12.9:2379");
    }
    let prefix = typed.prefix.unwrap_or_else(|| "/pgherd".to_owned());
    report.check("spec.etcd.prefix", checks::etcd_prefix(&prefix));
    match (&typed.username, &typed.password_file) {
        (Some(_), None) => report.error("spec.etcd.username", "a user without password_file; expected both or neither"),
        (None, Some(_)) => report.error("spec.etcd.password_file", "a password_file without username; expected both or neither"),
        _ => {}
    }
    if let Some(username) = &typed.username {
        report.check("spec.etcd.username", checks::identifier(username, "a user name"));
    }
    let password_file = secret(typed.password_file, "spec.etcd.password_file", report);
    let tls = section(typed.tls, |tls| {
        if tls.cert_file.is_some() != tls.key_file.is_some() {
            report.error("spec.etcd.tls", "expected cert_file and key_file, or neither");
        }
        let ca_file = path(tls.ca_file, "spec.etcd.tls.ca_file", report);
        let cert_file = path(tls.cert_file, "spec.etcd.tls.cert_file", report);
        let key_file = path(tls.key_file, "spec.etcd.tls.key_file", report);
        Some(ClientTls { ca_file: ca_file?, cert_file, key_file })
    });
    self::endpoints(&endpoints, !matches!(tls, Some(None)), report);
    Some(EtcdSpec { endpoints, prefix, username: typed.username, password_file, tls: tls? })
}

fn endpoints(endpoints: &[String], tls: bool, report: &mut Report) {
    let mut in_the_clear = None;
    for (index, endpoint) in endpoints.iter().enumerate() {
        let key = format!("spec.etcd.endpoints[{index}]");
        match checks::etcd_endpoint(endpoint) {
            Err((message, Some(hint))) => report.error_hint(&key, message, hint),
            Err((message, None)) => report.error(&key, message),
            Ok(_) if endpoints[..index].contains(endpoint) => report.error(&key, format!("{endpoint} is in the list already")),
            Ok(url) if url.tls && !tls => report.error(&key, "an https endpoint needs spec.etcd.tls.ca_file"),
            Ok(url) if !url.tls && tls => report.error(&key, "an endpoint without TLS although spec.etcd.tls is set; expected https://"),
            Ok(url) if !url.tls && !url.loopback => in_the_clear = in_the_clear.or(Some(key)),
            Ok(_) => {}
        }
    }
    if let Some(key) = in_the_clear {
        report.warn(&key, "without TLS whoever can listen on this network can take the leader lock; expected https:// and spec.etcd.tls");
    }
}

fn api(typed: typed::Api, report: &mut Report) -> Option<ApiSpec> {
    if let Some(listen) = &typed.listen {
        report.check("spec.api.listen", checks::listen_address(listen));
    }
    let tls = section(typed.tls, |tls| {
        let cert_file = path(tls.cert_file, "spec.api.tls.cert_file", report);
        let key_file = path(tls.key_file, "spec.api.tls.key_file", report);
        let client_ca_file = path(tls.client_ca_file, "spec.api.tls.client_ca_file", report);
        Some(ServerTls { cert_file: cert_file?, key_file: key_file?, client_ca_file })
    });
    let auth = section(typed.auth, |auth| credential(auth, "spec.api.auth", report));
    Some(ApiSpec { listen: typed.listen, tls: tls?, auth: auth? })
}

fn postgres(typed: typed::Postgres, report: &mut Report) -> Option<NodePostgres> {
    let os_user = typed.os_user.unwrap_or_else(|| "postgres".to_owned());
    report.check("spec.postgres.os_user", checks::os_user(&os_user));
    if let Some(listen) = &typed.listen {
        report.check("spec.postgres.listen", checks::listen_addresses(listen));
    }
    let mut tablespace_map = BTreeMap::new();
    for (from, to) in typed.tablespace_map.unwrap_or_default() {
        let key = join("spec.postgres.tablespace_map", &from);
        let ends = (report.check(&key, checks::absolute_path(&from)), report.check(&key, checks::absolute_path(&to)));
        if let (Some(from), Some(to)) = ends {
            tablespace_map.insert(from, to);
        }
    }
    let bin_dir = path(typed.bin_dir, "spec.postgres.bin_dir", report);
    let data_dir = path(typed.data_dir, "spec.postgres.data_dir", report);
    let wal_dir = path(typed.wal_dir, "spec.postgres.wal_dir", report);
    let socket_dir = path(typed.socket_dir, "spec.postgres.socket_dir", report);
    let log_dir = path(typed.log_dir, "spec.postgres.log_dir", report);
    let superuser = typed.superuser.and_then(|user| credential(user, "spec.postgres.superuser", report));
    let replication = typed.replication.and_then(|user| credential(user, "spec.postgres.replication", report));
    let rewind = section(typed.rewind, |user| credential(user, "spec.postgres.rewind", report));
    Some(NodePostgres {
        os_user,
        bin_dir,
        data_dir: data_dir?,
        wal_dir,
        tablespace_map,
        listen: typed.listen,
        socket_dir,
        log_dir,
        superuser: superuser?,
        replication: replication?,
        rewind: rewind?,
    })
}

fn routing(typed: typed::Routing, report: &mut Report) -> NodeRouting {
    if let Some(interface) = &typed.interface {
        let fits = (1..=INTERFACE_MAX_BYTES).contains(&interface.len())
            && interface.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:@".contains(&b));
        if !fits {
            report.error(
                "spec.routing.interface",
                format!("expected the name of an interface such as eth0, found `{}`", interface.escape_debug()),
            );
        }
    }
    let haproxy_sockets = haproxy_sockets(typed.haproxy_sockets.unwrap_or_default(), report);
    NodeRouting { interface: typed.interface, haproxy_sockets, manage: typed.manage.unwrap_or_default() }
}

fn haproxy_sockets(typed: Vec<String>, report: &mut Report) -> Vec<PathBuf> {
    if typed.len() > HAPROXY_SOCKETS_MAX {
        report.error("spec.routing.haproxy_sockets", format!("expected at most {HAPROXY_SOCKETS_MAX}, found {}", typed.len()));
    }
    let mut sockets: Vec<PathBuf> = Vec::new();
    for (index, typed) in typed.into_iter().enumerate() {
        let key = format!("spec.routing.haproxy_sockets[{index}]");
        let Some(socket) = path(Some(typed), &key, report) else { continue };
        if socket.as_os_str().len() > SOCKET_MAX_BYTES {
            report.error(&key, format!("expected at most {SOCKET_MAX_BYTES} bytes, as many as the path of a Unix socket may have"));
        }
        if sockets.contains(&socket) {
            report.error(&key, format!("{} is in the list already", socket.display()));
        }
        sockets.push(socket);
    }
    sockets
}

/// Directories that would be in each other's way. PostgreSQL and base backups own everything below the data directory.
fn directories(node: &NodeSpec, report: &mut Report) {
    let data_dir = &node.postgres.data_dir;
    let others = [
        ("spec.postgres.wal_dir", node.postgres.wal_dir.as_ref()),
        ("spec.postgres.log_dir", node.postgres.log_dir.as_ref()),
        ("spec.postgres.socket_dir", node.postgres.socket_dir.as_ref()),
        ("spec.run_dir", Some(&node.run_dir)),
    ];
    for (key, directory) in others {
        if directory.is_some_and(|directory| directory.starts_with(data_dir)) {
            report.error(
                key,
                format!("this is within the data directory {}, which is replaced when the member is cloned", data_dir.display()),
            );
        }
        if key != "spec.postgres.log_dir" && directory.is_some_and(|directory| data_dir.starts_with(directory)) {
            report.error(key, format!("the data directory {} is within this directory", data_dir.display()));
        }
    }
    let (key, socket_dir) = match &node.postgres.socket_dir {
        Some(socket_dir) => ("spec.postgres.socket_dir", socket_dir),
        None => ("spec.run_dir", &node.run_dir),
    };
    if socket_dir.as_os_str().len() > SOCKET_DIR_MAX_BYTES {
        report.error(key, format!("expected at most {SOCKET_DIR_MAX_BYTES} bytes: the path of a Unix socket must fit in 107"));
    }
}
