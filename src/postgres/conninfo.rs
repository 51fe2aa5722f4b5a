//! Connection strings for libpq, and the passfile they point to.
//!
//! A password is never in a connection string, an argv or an environment variable: libpq reads it from the passfile, mode 0600, in the
//! run directory (SAFETY row 77). PostgreSQL manual, "Connection Strings" and "The Password File".

use std::path::Path;

use anyhow::{Result, ensure};

use super::files;
use super::sql::Secret;

/// How long a connection may take to be made.
pub const CONNECT_TIMEOUT_S: u32 = 3;
/// Idle seconds before a keepalive is sent.
pub const KEEPALIVES_IDLE_S: u32 = 5;
/// Seconds between keepalives.
pub const KEEPALIVES_INTERVAL_S: u32 = 2;
/// Keepalives lost until the connection counts as dead.
pub const KEEPALIVES_COUNT: u32 = 3;

/// A server and how it is connected to.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Host name or address.
    pub host: &'a str,
    /// Port.
    pub port: u16,
    /// Role.
    pub user: &'a str,
    /// The passfile.
    pub passfile: &'a Path,
    /// What the server's pg_stat_replication shows: the member's name.
    pub application_name: &'a str,
    /// Database, needed by slot synchronization since PostgreSQL 17; None leaves it out.
    pub dbname: Option<&'a str>,
}

/// `primary_conninfo`, also for `pg_basebackup --dbname`.
pub fn build(target: Target<'_>) -> String {
    let mut pairs = vec![
        ("host", target.host.to_owned()),
        ("port", target.port.to_string()),
        ("user", target.user.to_owned()),
        ("passfile", target.passfile.display().to_string()),
        ("application_name", target.application_name.to_owned()),
        ("connect_timeout", CONNECT_TIMEOUT_S.to_string()),
        ("keepalives", "1".to_owned()),
        ("keepalives_idle", KEEPALIVES_IDLE_S.to_string()),
        ("keepalives_interval", KEEPALIVES_INTERVAL_S.to_string()),
        ("keepalives_count", KEEPALIVES_COUNT.to_string()),
        // A Kerberos library that looks for a realm can cost seconds on each connect.
        ("gssencmode", "disable".to_owned()),
    ];
    pairs.extend(target.dbname.map(|name| ("dbname", name.to_owned())));
    pairs.iter().map(|(key, value)| format!("{key}={}", quote(value))).collect::<Vec<_>>().join(" ")
}

/// A value of a connection string: single quotes around it, `\` before a quote or a backslash.
pub fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// One user's password, for any server and database.
#[derive(Debug, Clone)]
pub struct PassfileEntry<'a> {
    /// Role.
    pub user: &'a str,
    /// Its password.
    pub password: &'a Secret,
}

/// Writes the passfile if it does not say just this already. Says whether it wrote.
pub fn write_passfile(path: &Path, entries: &[PassfileEntry<'_>]) -> Result<bool> {
    let mut text = String::new();
    for entry in entries {
        let password = entry.password.expose();
        ensure!(
            !password.contains(['\n', '\r', '\0']) && !entry.user.contains(['\n', '\r', '\0']),
            "the password of {} holds a line break, which a passfile cannot hold",
            entry.user
        );
        text.push_str(&format!("*:*:*:{}:{}\n", escape(entry.user), escape(password)));
    }
    files::write_if_changed(path, text.as_bytes())
}

fn escape(field: &str) -> String {
    field.replace('\\', "\\\\").replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// libpq's conninfo_parse, as the manual describes it.
    fn parse(text: &str) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        let mut rest = text.chars().peekable();
        loop {
            while rest.next_if(|c| c.is_whitespace()).is_some() {}
            let key: String = std::iter::from_fn(|| rest.next_if(|c| *c != '=')).collect();
            if key.is_empty() {
                return pairs;
            }
            assert_eq!((rest.next(), rest.next()), (Some('='), Some('\'')));
            let mut value = String::new();
            loop {
                match rest.next().expect("the quote must end") {
                    '\'' => break,
                    '\\' => value.extend(rest.next()),
                    other => value.push(other),
                }
            }
            pairs.push((key, value));
        }
    }

    proptest! {
        #[test]
        fn every_value_comes_out_as_it_went_in(host in "[^\0]{0,20}", user in "[^\0]{0,20}", name in "[^\0]{0,20}") {
            let text = build(Target { host: &host, port: 5432, user: &user, passfile: Path::new("/run/p"), application_name: &name, dbname: Some("postgres") });
            let pairs = parse(&text);
            let get = |key: &str| pairs.iter().find(|(found, _)| found == key).map(|(_, value)| value.clone());
            prop_assert_eq!(get("host"), Some(host));
            prop_assert_eq!(get("user"), Some(user));
            prop_assert_eq!(get("application_name"), Some(name));
            prop_assert_eq!(pairs.len(), 12);
        }
    }

    #[test]
    fn colons_and_backslashes_in_a_password_are_escaped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pgpass");
        let password = Secret::new(r"a:b\c");
        assert!(write_passfile(&path, &[PassfileEntry { user: "repl:1", password: &password }]).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "*:*:*:repl\\:1:a\\:b\\\\c\n");
        assert!(!write_passfile(&path, &[PassfileEntry { user: "repl:1", password: &password }]).unwrap());
        let broken = Secret::new("a\nb");
        let error = write_passfile(&path, &[PassfileEntry { user: "repl", password: &broken }]).unwrap_err().to_string();
        assert!(!error.contains("a\nb"), "the password is not in the error");
    }
}
