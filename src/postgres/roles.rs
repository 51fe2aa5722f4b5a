//! The roles that replication and rejoin need, made and kept by the leader.
//!
//! A password is turned into a SCRAM verifier here; the server never sees it, and the session logs nothing (SAFETY row 77). A verifier
//! that already fits the password is left alone, so that a converged cluster writes nothing. PostgreSQL manual, "pg_rewind", names the
//! functions a rewind user must be granted.

use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use sha2::Sha256;

use super::quote;
use super::sql::{Connection, Secret, Sql, SqlError};

/// A role and its password.
#[derive(Debug, Clone)]
pub struct Account {
    /// Role name.
    pub username: String,
    /// Its password.
    pub password: Secret,
}

/// The roles pgherd keeps.
#[derive(Debug, Clone)]
pub struct Accounts {
    /// The bootstrap superuser; only its password is kept.
    pub superuser: Account,
    /// LOGIN REPLICATION.
    pub replication: Account,
    /// LOGIN with the grants of pg_rewind; None = the superuser does it.
    pub rewind: Option<Account>,
}

/// What pg_rewind needs of a role that is no superuser, by the manual, and what a rejoining member asks besides.
const REWIND_FUNCTIONS: [&str; 5] = [
    "pg_catalog.pg_ls_dir(text)",
    "pg_catalog.pg_ls_dir(text, boolean, boolean)",
    "pg_catalog.pg_stat_file(text, boolean)",
    "pg_catalog.pg_read_binary_file(text)",
    "pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)",
];
/// By it a role may have a checkpoint made, since PostgreSQL 15: a rewind waits for the leader's first one.
const CHECKPOINT_ROLE: &str = "pg_checkpoint";
/// Set before anything that could end in a log: by a superuser, for this session alone.
const LOG_NOTHING: &str = "set log_statement = none; set log_min_duration_statement = -1; set log_min_duration_sample = -1; set log_duration = off; \
    set log_min_error_statement = panic; set log_min_messages = fatal; set password_encryption = 'scram-sha-256'";

/// Makes the roles as they should be, on the leader. Gives the names of those that were changed.
pub async fn ensure_roles(sql: &Sql, accounts: &Accounts, limit: Duration) -> Result<Vec<String>, SqlError> {
    sql.with(limit, async |connection| {
        connection.execute(LOG_NOTHING).await?;
        let mut changed = Vec::new();
        for (account, replication) in [(&accounts.superuser, false), (&accounts.replication, true)] {
            if ensure_role(connection, account, replication).await? {
                changed.push(account.username.clone());
            }
        }
        if let Some(rewind) = &accounts.rewind {
            let role = ensure_role(connection, rewind, false).await?;
            if ensure_grants(connection, &rewind.username).await? || role {
                changed.push(rewind.username.clone());
            }
        }
        Ok(changed)
    })
    .await
}

async fn ensure_role(connection: &Connection, account: &Account, replication: bool) -> Result<bool, SqlError> {
    let question = "select rolcanlogin::text, rolreplication::text, rolsuper::text, rolpassword from pg_authid where rolname = $1::text";
    let found = connection.query(question, &[&account.username]).await?;
    let name = quote::identifier(&account.username).map_err(|error| SqlError::Nonsense(error.to_string()))?;
    let (verb, fits) = match found.first().map(Vec::as_slice) {
        None => ("create", false),
        Some([login, may_replicate, superuser, password]) => {
            let is = |value: &Option<String>| value.as_deref() == Some("true");
            let attributes = is(login) && (!replication || is(may_replicate) || is(superuser));
            ("alter", attributes && password.as_deref().is_some_and(|verifier| fits(verifier, &account.password).unwrap_or(false)))
        }
        Some(_) => return Err(SqlError::Nonsense("pg_authid has other columns than expected".to_owned())),
    };
    if fits {
        return Ok(false);
    }
    let verifier = postgres_protocol::password::scram_sha_256(account.password.expose().as_bytes());
    let verifier = quote::literal(&verifier).map_err(|error| SqlError::Nonsense(error.to_string()))?;
    let attributes = if replication { "login replication" } else { "login" };
    connection.execute(&format!("{verb} role {name} with {attributes} password {verifier}")).await?;
    Ok(true)
}

async fn ensure_grants(connection: &Connection, username: &str) -> Result<bool, SqlError> {
    let name = quote::identifier(username).map_err(|error| SqlError::Nonsense(error.to_string()))?;
    let mut changed = false;
    for function in REWIND_FUNCTIONS {
        let has = connection.query("select has_function_privilege($1::text, $2::text, 'execute')::text", &[username, function]).await?;
        if has.first().and_then(|row| row.first()).and_then(Option::as_deref) != Some("true") {
            connection.execute(&format!("grant execute on function {function} to {name}")).await?;
            changed = true;
        }
    }
    let question = "select pg_has_role($1::text, oid, 'member')::text from pg_roles where rolname = $2::text";
    let member = connection.query(question, &[username, CHECKPOINT_ROLE]).await?;
    if member.first().and_then(|row| row.first()).and_then(Option::as_deref) == Some("false") {
        connection.execute(&format!("grant {CHECKPOINT_ROLE} to {name}")).await?;
        changed = true;
    }
    Ok(changed)
}

/// Whether a stored verifier (`SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`) is of this password. Plays the server's part of the
/// exchange of RFC 5802: the client half, which holds the password, then checks the server's signature.
fn fits(verifier: &str, password: &Secret) -> Result<bool> {
    let bad = "expected a SCRAM verifier";
    let (iterations_salt, keys) = verifier.strip_prefix("SCRAM-SHA-256$").and_then(|rest| rest.split_once('$')).context(bad)?;
    let (iterations, salt) = iterations_salt.split_once(':').context(bad)?;
    let server_key = STANDARD.decode(keys.split_once(':').context(bad)?.1)?;

    let mut client = ScramSha256::new(password.expose().as_bytes(), ChannelBinding::unsupported());
    let text = |message: &[u8]| String::from_utf8(message.to_vec()).context(bad);
    let first = text(client.message())?;
    let first_bare = first.splitn(3, ',').nth(2).context(bad)?.to_owned();
    let nonce = first_bare.split_once("r=").context(bad)?.1;
    let server_first = format!("r={nonce}pgherd,s={salt},i={iterations}");
    client.update(server_first.as_bytes())?;
    let last = text(client.message())?;
    let without_proof = last.rsplit_once(",p=").context(bad)?.0;

    let mut signature = Hmac::<Sha256>::new_from_slice(&server_key).ok().context(bad)?;
    signature.update(format!("{first_bare},{server_first},{without_proof}").as_bytes());
    let server_last = format!("v={}", STANDARD.encode(signature.finalize().into_bytes()));
    Ok(client.finish(server_last.as_bytes()).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_fits_its_own_password_and_no_other() {
        for password in ["secret", "p\u{e4}ss w\u{f6}rd", "a'b\\c:d,e=f"] {
            let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
            assert!(fits(&verifier, &Secret::new(password)).unwrap(), "{password}");
            assert!(!fits(&verifier, &Secret::new("other")).unwrap());
        }
        for other in ["", "md5d41d8cd98f00b204e9800998ecf8427e", "SCRAM-SHA-256$4096:x"] {
            assert!(fits(other, &Secret::new("secret")).is_err());
        }
    }
}
