//! Checks of single values that both documents share. Each returns what is wrong as a sentence; none changes what was typed.

use core::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::problems::Report;

/// Longest host name (RFC 1035).
const HOST_MAX_BYTES: usize = 253;
/// PostgreSQL's NAMEDATALEN - 1.
pub(super) const IDENTIFIER_MAX_BYTES: usize = 63;
/// Longest path that is taken; Linux's PATH_MAX is 4096.
const PATH_MAX_BYTES: usize = 1024;

/// What is typed may not hold what ends a line or a string somewhere further down.
pub(super) fn one_line(text: &str) -> Result<(), String> {
    match text.chars().find(|c| c.is_control() && *c != '\t') {
        Some(c) => Err(format!("`{}` may not be in here; expected one line without control characters", c.escape_debug())),
        None => Ok(()),
    }
}

/// A host name or an IP address that others connect to.
pub(super) fn host(text: &str) -> Result<(), String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("`{text}` is not an address that anybody can connect to"));
        }
        return Ok(());
    }
    let digits_only = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let label = |label: &str| {
        let ends = label.starts_with(|c: char| c.is_ascii_alphanumeric()) && label.ends_with(|c: char| c.is_ascii_alphanumeric());
        ends && label.len() <= 63 && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if text.len() <= HOST_MAX_BYTES && !digits_only && text.split('.').all(label) {
        return Ok(());
    }
    Err(format!("expected a host name or an IP address without a port, found `{}`", text.escape_debug()))
}

/// `0.0.0.0:8008`, `[::]:8008`.
pub(super) fn listen_address(text: &str) -> Result<(), String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(()),
        _ => Err(format!("expected an IP address and a port such as 10.0.12.9:8008 or [::]:8008, found `{}`", text.escape_debug())),
    }
}

/// An absolute path that means the same everywhere.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    one_line(text)?;
    let parts = text.strip_prefix('/').unwrap_or_default();
    if parts.is_empty() || text.len() > PATH_MAX_BYTES || parts.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("expected an absolute path without `.`, `..`, `//` or a slash at the end, found `{text}`"));
    }
    Ok(PathBuf::from(text))
}

/// A role or database, in a safe part of what PostgreSQL takes.
pub(super) fn identifier(text: &str, what: &str) -> Result<(), String> {
    let fits = !text.is_empty()
        && text.len() <= IDENTIFIER_MAX_BYTES
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.@$".contains(c));
    if fits {
        return Ok(());
    }
    Err(format!(
        "{what} is a letter or underscore followed by letters, digits or any of `_-.@$`, at most {IDENTIFIER_MAX_BYTES} bytes in all; found `{}`",
        text.escape_debug()
    ))
}

/// A word that goes to a program as an argument: an encoding, a locale, an authentication method.
pub(super) fn word(text: &str, what: &str) -> Result<(), String> {
    let fits = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.len() <= IDENTIFIER_MAX_BYTES;
    if fits && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.@".contains(c)) {
        return Ok(());
    }
    Err(format!("expected {what}, found `{}`", text.escape_debug()))
}

/// The user that PostgreSQL runs as.
pub(super) fn os_user(text: &str) -> Result<(), String> {
    /// useradd's limit.
    const OS_USER_MAX_BYTES: usize = 32;
    if text == "root" {
        return Err("PostgreSQL refuses to run as root; expected an ordinary user such as postgres".to_owned());
    }
    let fits = text.len() <= OS_USER_MAX_BYTES && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if fits && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)) {
        return Ok(());
    }
    Err(format!("expected the name of a user such as postgres, found `{}`", text.escape_debug()))
}

/// A value of listen_addresses: `*`, or hosts with commas between them.
pub(super) fn listen_addresses(text: &str) -> Result<(), String> {
    let one = |part: &str| matches!(part, "*" | "0.0.0.0" | "::") || host(part).is_ok();
    if text.split(',').map(str::trim).all(one) {
        return Ok(());
    }
    Err(format!("expected `*` or addresses with commas between them, without ports, found `{}`", text.escape_debug()))
}

/// What comes before every etcd key.
pub(super) fn etcd_prefix(text: &str) -> Result<(), String> {
    /// Long enough for a path, short enough for a key.
    const PREFIX_MAX_BYTES: usize = 200;
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if text.len() <= PREFIX_MAX_BYTES && text.strip_prefix('/').is_some_and(|parts| parts.split('/').all(part)) {
        return Ok(());
    }
    let found = text.escape_debug();
    Err(format!(
        "expected a prefix such as /pgherd: a slash first, none at the end, of letters, digits, `_`, `-`, `.` and `/`; found `{found}`"
    ))
}

/// What matters of an etcd endpoint.
pub(super) struct Endpoint {
    pub(super) tls: bool,
    pub(super) loopback: bool,
}

/// An etcd endpoint; the error may come with a hint.
pub(super) fn etcd_endpoint(text: &str) -> Result<Endpoint, (String, Option<String>)> {
    let complaint = |hint: Option<String>| {
        (format!("expected a URL such as http://10.0.12.9:2379 or https://etcd1:2379, found `{}`", text.escape_debug()), hint)
    };
    if text.contains('@') {
        // What stands before the @ may be a password: it is not repeated.
        let message = "expected a URL without a user such as http://10.0.12.9:2379".to_owned();
        return Err((message, Some("users and passwords go to spec.etcd.username and password_file".to_owned())));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        let scheme = if text.starts_with("https") { "https" } else { "http" };
        let address = text.trim_start_matches(scheme).trim_start_matches([':', '/']);
        return Err(complaint(authority(address).then(|| format!("did you mean `{scheme}://{address}`?"))));
    };
    let bare = rest.trim_end_matches('/');
    match scheme {
        "http" | "https" if authority(rest) => Ok(Endpoint { tls: scheme == "https", loopback: is_loopback(rest) }),
        "http" | "https" if authority(bare) => Err(complaint(Some(format!("did you mean `{scheme}://{bare}`?")))),
        _ => Err(complaint(None)),
    }
}

fn is_loopback(authority: &str) -> bool {
    match authority.parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => authority.starts_with("localhost:"),
    }
}

/// `host:port`, with brackets around an IPv6 address.
fn authority(text: &str) -> bool {
    let Some((name, port)) = text.rsplit_once(':') else { return false };
    let port_fits = !port.starts_with('+') && port.parse::<u16>().is_ok_and(|port| port != 0);
    let name_fits = match name.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|address| address.parse::<core::net::Ipv6Addr>().is_ok()),
        None => !name.contains(':') && host(name).is_ok(),
    };
    port_fits && name_fits
}

impl Report {
    /// Reports what is wrong, if something is.
    pub(super) fn check<T>(&mut self, path: &str, outcome: Result<T, String>) -> Option<T> {
        outcome.map_err(|message| self.error(path, message)).ok()
    }

    /// Reads a newtype of [`crate::types`].
    pub(super) fn parse<T: FromStr<Err: std::fmt::Display>>(&mut self, path: &str, text: &str) -> Option<T> {
        self.check(path, text.parse().map_err(|error| format!("{error}; found `{}`", text.escape_debug())))
    }
}
