//! The rules between keys of a cluster document: times, members, slots, routing.
//!
//! Each rule reads what was typed, so that it can name the place; a value that could not be taken is skipped, its problem is known.

use std::collections::BTreeMap;
use std::time::Duration;

use core::net::IpAddr;

use super::cluster::typed::{self, ReplicationMode, SlotType, WatchdogMode};
use super::cluster::{ClusterSpec, Member};
use super::problems::{Report, nearest};
use super::scalars::show_duration;
use super::walk::join;
use super::{checks, parameters};
use crate::policy::deadlines::{LeaseTimes, WATCHDOG_MIN_SECONDS, WATCHDOG_TTL_MIN_SECONDS, usable_watchdog_timeout};
use crate::policy::hba;

/// PostgreSQL's own default.
const MAX_WAL_SENDERS_DEFAULT: u64 = 10;
/// PostgreSQL's own default.
const MAX_REPLICATION_SLOTS_DEFAULT: u64 = 10;
/// pg_basebackup streams data and WAL at once.
const WAL_SENDERS_PER_CLONE: u64 = 2;

/// Holds the whole document against the rules.
pub(super) fn check(spec: &ClusterSpec, report: &mut Report) {
    let typed = spec.typed.spec.clone().unwrap_or_default();
    let members = typed.members.unwrap_or_default();
    let replication = typed.replication.unwrap_or_default();
    let bootstrap = typed.bootstrap.unwrap_or_default();
    time(spec, &typed.watchdog.unwrap_or_default(), report);
    names(&members, report);
    addresses(&members, report);
    somebody_may_lead(spec, report);
    upstreams(&members, report);
    without_streams(spec, &members, report);
    let standbys = members.len().saturating_sub(1) as u64;
    synchronous_nodes(standbys, &replication, report);
    parameters::check(&spec.postgres.parameters, "spec.postgres.parameters", true, report);
    for (member, own) in &spec.postgres.member_parameters {
        parameters::check(own, &join("spec.postgres.member_parameters", member.as_str()), false, report);
    }
    wal_senders(spec, standbys, report);
    slots(spec, standbys, &replication, report);
    methods(&replication, &bootstrap, report);
    client_rules(spec, report);
    routing(spec, report);
}

/// The inequalities of DESIGN, "Time and the lock", with the numbers put in.
fn time(spec: &ClusterSpec, watchdog: &typed::Watchdog, report: &mut Report) {
    let (ttl, safety_margin) = (spec.ha.ttl, spec.watchdog.safety_margin);
    if ttl.subsec_nanos() != 0 {
        return;
    }
    let path = if watchdog.safety_margin.is_some() { "spec.watchdog.safety_margin" } else { "spec.ha.ttl" };
    let broken = |watchdog| LeaseTimes { ttl, safety_margin, watchdog }.validate().err().unwrap_or_default();
    let without = broken(None);
    for sentence in &without {
        report.error(path, sentence.as_str());
    }
    if !without.is_empty() || usable_watchdog_timeout(ttl, safety_margin).is_some() {
        return;
    }
    let mut reasons = broken(Some(Duration::from_secs(WATCHDOG_MIN_SECONDS)));
    if ttl.as_secs() < WATCHDOG_TTL_MIN_SECONDS {
        let found = show_duration(ttl);
        let rule = format!("{WATCHDOG_MIN_SECONDS} s <= its timeout <= ttl/4, so ttl >= {WATCHDOG_TTL_MIN_SECONDS} s, but ttl = {found}");
        reasons.insert(0, format!("a watchdog needs {rule}"));
    }
    let reasons = reasons.join("; ");
    match watchdog.mode {
        Some(WatchdogMode::Required) => report.error("spec.watchdog.mode", format!("required, but no watchdog can be used: {reasons}")),
        Some(WatchdogMode::Automatic) => report.warn("spec.watchdog.mode", format!("no watchdog can be used: {reasons}")),
        Some(WatchdogMode::Off) | None => {}
    }
}

fn member_path(index: usize, key: &str) -> String {
    format!("spec.members[{index}].{key}")
}

fn slot_name(member: &str) -> String {
    member.replace('-', "_")
}

fn names(members: &[typed::Member], report: &mut Report) {
    let mut seen = BTreeMap::new();
    for (index, name) in members.iter().enumerate().filter_map(|(index, member)| Some((index, member.name.as_deref()?))) {
        if let Some(first) = seen.insert(slot_name(name), name) {
            let message = match first == name {
                true => format!("another member is called `{name}`"),
                false => format!("`{name}` and `{first}` are the same slot name, {}, once dashes become underscores", slot_name(name)),
            };
            report.error(&member_path(index, "name"), message);
        }
    }
}

/// No two servers, PostgreSQL or API, on one address and port.
fn addresses(members: &[typed::Member], report: &mut Report) {
    let mut seen: BTreeMap<(String, u16), String> = BTreeMap::new();
    for (index, member) in members.iter().enumerate() {
        let Some(address) = &member.address else { continue };
        for (key, port, default) in [("port", member.port, 5432), ("api_port", member.api_port, 8008)] {
            let who = member_path(index, key);
            if port.is_none() && report.marks.contains(&who) {
                continue;
            }
            let port = port.unwrap_or(default);
            if let Some(first) = seen.insert((address.to_lowercase(), port), who.clone()) {
                report.error(&who, format!("{address}:{port} is taken already by {first}"));
            }
        }
    }
}

fn somebody_may_lead(spec: &ClusterSpec, report: &mut Report) {
    if !spec.members.is_empty() && spec.members.iter().all(Member::nofailover) {
        report.warn("spec.members", "every member has nofailover or failover_priority 0: once nobody leads, nobody will");
    }
}

/// replicatefrom names another member, and following it does not go round in a circle (SAFETY row 56).
fn upstreams(members: &[typed::Member], report: &mut Report) {
    let declared = || members.iter().filter_map(|member| member.name.as_deref());
    let upstream: BTreeMap<&str, &str> =
        members.iter().filter_map(|member| Some((member.name.as_deref()?, member.tags.as_ref()?.replicatefrom.as_deref()?))).collect();
    for (index, member) in members.iter().enumerate() {
        let Some((name, from)) = member.name.as_deref().and_then(|name| upstream.get_key_value(name)) else { continue };
        let path = member_path(index, "tags.replicatefrom");
        if !declared().any(|member| member == *from) {
            let message = format!("there is no member `{}`", from.escape_debug());
            match nearest(from, declared()) {
                Some(near) => report.error_hint(&path, message, format!("did you mean `{near}`?")),
                None => report.error(&path, message),
            }
            continue;
        }
        let mut chain = vec![*name];
        let mut next = Some(from);
        while let Some(member) = next {
            let known = chain.contains(member);
            chain.push(member);
            if known {
                report.error(&path, format!("{name} would replicate from itself: {}", chain.join(" -> ")));
                break;
            }
            next = upstream.get(member);
        }
    }
}

/// nostream: there has to be an archive to follow by, and nobody streams from a member that gets WAL late and whole segments of it only.
fn without_streams(spec: &ClusterSpec, members: &[typed::Member], report: &mut Report) {
    let nostream = |name: &str| spec.members.iter().any(|member| member.name.as_str() == name && member.tags.nostream);
    for (index, member) in members.iter().enumerate() {
        let Some(name) = member.name.as_deref() else { continue };
        let path = member_path(index, "tags.nostream");
        let upstream = member.tags.as_ref().and_then(|tags| tags.replicatefrom.as_deref());
        if nostream(name) && spec.postgres.restore_command.is_none() {
            report.error(&path, "a member that does not stream gets its WAL by spec.postgres.restore_command, which is missing");
        }
        match upstream {
            Some(from) if nostream(name) => {
                report.error(&path, format!("replicatefrom: {from} asks for the contrary; expected one of them"))
            }
            Some(from) if nostream(from) => {
                report.error(&member_path(index, "tags.replicatefrom"), format!("{from} has nostream, and streams from nobody"));
            }
            _ => {}
        }
    }
}

fn synchronous_nodes(standbys: u64, typed: &typed::Replication, report: &mut Report) {
    let count = typed.synchronous_node_count.unwrap_or(1);
    let asked = match typed.mode {
        Some(ReplicationMode::Async) => false,
        Some(ReplicationMode::Quorum | ReplicationMode::Sync) => true,
        None => standbys > 1 || typed.synchronous_node_count.is_some(),
    };
    if asked && u64::from(count) > standbys {
        let path = "spec.replication.synchronous_node_count";
        report.error(path, format!("{count} standbys must hold each commit, but {} members leave {standbys}", standbys + 1));
    }
    // A standby that reconnects has two walsenders for a while, unless its slot lets only one stream: both would count.
    if asked && count > 1 && typed.use_slots == Some(false) {
        let path = "spec.replication.use_slots";
        report.error(path, format!("with synchronous_node_count of {count} each member needs its slot: leave use_slots out, or type true"));
    }
}

/// A parameter that must be a whole number here; None when it is left out or PostgreSQL's default.
fn number(spec: &ClusterSpec, name: &str, report: &mut Report) -> Option<u64> {
    let value = spec.postgres.parameters.get(name)?.as_deref()?;
    let path = join("spec.postgres.parameters", name);
    report.check(&path, value.parse().map_err(|_| format!("expected a whole number, found `{}`", value.escape_debug())))
}

fn wal_senders(spec: &ClusterSpec, standbys: u64, report: &mut Report) {
    let needed = standbys + WAL_SENDERS_PER_CLONE;
    let given = number(spec, "max_wal_senders", report).unwrap_or(MAX_WAL_SENDERS_DEFAULT);
    if standbys > 0 && given < needed {
        let path = "spec.postgres.parameters.max_wal_senders";
        report.error(path, format!("{given} is too few: {standbys} standbys and {WAL_SENDERS_PER_CLONE} for a clone need {needed}"));
    }
}

fn slots(spec: &ClusterSpec, standbys: u64, typed: &typed::Replication, report: &mut Report) {
    let permanent = typed.slots.clone().unwrap_or_default();
    let logical_level = spec.postgres.parameters.get("wal_level").and_then(Option::as_deref) == Some("logical");
    for (name, slot) in &permanent {
        let path = join("spec.replication.slots", name);
        if name.is_empty()
            || name.len() > checks::IDENTIFIER_MAX_BYTES
            || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        {
            report.error(&path, format!("expected lower-case letters, digits and `_`, at most {} bytes", checks::IDENTIFIER_MAX_BYTES));
        }
        if let Some(member) = spec.members.iter().find(|member| slot_name(member.name.as_str()) == *name) {
            report.error(&path, format!("this is the name of member {}'s own slot", member.name));
        }
        match slot.slot_type {
            Some(SlotType::Logical) if slot.database.is_none() || slot.plugin.is_none() => {
                report.error(&path, "a logical slot needs database and plugin");
            }
            Some(SlotType::Logical) if !logical_level => {
                report.error(&path, "a logical slot needs wal_level: logical in spec.postgres.parameters");
            }
            Some(SlotType::Physical) if slot.database.is_some() || slot.plugin.is_some() => {
                report.error(&path, "a physical slot has neither database nor plugin");
            }
            _ => {}
        }
        for (key, value) in [("database", &slot.database), ("plugin", &slot.plugin)] {
            if let Some(value) = value {
                report.check(&join(&path, key), checks::identifier(value, &format!("a {key} name")));
            }
        }
    }
    let of_members = if typed.use_slots == Some(false) { 0 } else { standbys };
    let needed = of_members + permanent.len() as u64;
    let given = number(spec, "max_replication_slots", report).unwrap_or(MAX_REPLICATION_SLOTS_DEFAULT);
    if given < needed {
        let path = "spec.postgres.parameters.max_replication_slots";
        report.error(path, format!("{given} is too few: {of_members} slots of members and {} of spec.replication.slots", permanent.len()));
    }
}

fn methods(replication: &typed::Replication, bootstrap: &typed::Bootstrap, report: &mut Report) {
    let custom = bootstrap.custom.clone().unwrap_or_default();
    for (name, method) in &custom {
        let path = join("spec.bootstrap.custom", name);
        if matches!(name.as_str(), "initdb" | "basebackup") {
            report.error(&path, "this is the name of a built-in method; expected another");
        }
        report.check(&path, checks::word(name, "the name of a method, of letters, digits, `_`, `-` and `.`"));
        let argv = method.command.as_deref().unwrap_or_default();
        if argv.first().is_none_or(|program| program.trim().is_empty()) || argv.iter().any(|word| word.contains('\0')) {
            report.error(&join(&path, "command"), "expected a program and its arguments, as a list");
        }
    }
    let mut known = |path: &str, name: &str, built_in: &str| {
        if name != built_in && !custom.contains_key(name) {
            let list = custom.keys().map(String::as_str).chain([built_in]);
            let message = format!("expected {built_in} or a name under spec.bootstrap.custom, found `{}`", name.escape_debug());
            match nearest(name, list) {
                Some(near) => report.error_hint(path, message, format!("did you mean `{near}`?")),
                None => report.error(path, message),
            }
        }
    };
    if let Some(method) = &bootstrap.method {
        known("spec.bootstrap.method", method, "initdb");
    }
    for (index, method) in replication.create_replica_methods.iter().flatten().enumerate() {
        known(&format!("spec.replication.create_replica_methods[{index}]"), method, "basebackup");
    }
    if replication.create_replica_methods.as_ref().is_some_and(Vec::is_empty) {
        report.error("spec.replication.create_replica_methods", "expected at least one method, such as basebackup");
    }
}

/// Lines of pg_hba.conf and pg_ident.conf: one that PostgreSQL cannot read keeps a running server on its old rules.
fn client_rules(spec: &ClusterSpec, report: &mut Report) {
    for (index, line) in spec.postgres.pg_hba.iter().enumerate() {
        let path = format!("spec.postgres.pg_hba[{index}]");
        match checks::one_line(line).and_then(|()| hba::parse_line(line)) {
            Err(message) if line.contains('{') && !line.contains(hba::MEMBERS) => {
                report.error_hint(&path, message, format!("did you mean `{}`?", hba::MEMBERS));
            }
            outcome => drop(report.check(&path, outcome)),
        }
    }
    for (index, line) in spec.postgres.pg_ident.iter().enumerate() {
        let outcome = checks::one_line(line).and_then(|()| hba::parse_ident_line(line));
        report.check(&format!("spec.postgres.pg_ident[{index}]"), outcome);
    }
}

fn routing(spec: &ClusterSpec, report: &mut Report) {
    let routing = &spec.routing;
    let mut ports = Vec::new();
    if let Some(haproxy) = &routing.haproxy {
        ports.push(("spec.routing.haproxy.write_port", haproxy.write_port));
        ports.push(("spec.routing.haproxy.read_port", haproxy.read_port));
        ports.push(("spec.routing.haproxy.stats_port", haproxy.stats_port));
    }
    ports.extend(routing.pgbouncer.iter().map(|pgbouncer| ("spec.routing.pgbouncer.port", pgbouncer.port)));
    for (index, (path, port)) in ports.iter().enumerate() {
        if let Some((first, _)) = ports[..index].iter().find(|(_, other)| other == port) {
            report.error(path, format!("port {port} is taken already by {first}"));
        }
    }
    let Some((vip, prefix)) = routing.vip.as_ref().and_then(|vip| network(&vip.address)) else { return };
    let path = "spec.routing.vip.address";
    for member in &spec.members {
        let Ok(address) = member.address.parse::<IpAddr>() else { continue };
        if address == vip {
            report.error(path, format!("this is the address of member {}; expected one that no host has", member.name));
        } else if !same_network(address, vip, prefix) {
            let name = &member.name;
            report.warn(path, format!("{name} ({address}) is not in the network of {vip}/{prefix}: the address cannot move to it"));
        }
    }
}

fn network(cidr: &str) -> Option<(IpAddr, u32)> {
    let (address, prefix) = cidr.split_once('/')?;
    Some((address.parse().ok()?, prefix.parse().ok()?))
}

fn same_network(one: IpAddr, other: IpAddr, prefix: u32) -> bool {
    let shifted = |bits: u128, width: u32| bits.checked_shr(width.saturating_sub(prefix)).unwrap_or(0);
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => shifted(one.to_bits().into(), 32) == shifted(other.to_bits().into(), 32),
        (IpAddr::V6(one), IpAddr::V6(other)) => shifted(one.to_bits(), 128) == shifted(other.to_bits(), 128),
        _ => false,
    }
}
