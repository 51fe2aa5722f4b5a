//! How etcd is reached: endpoints, credentials, TLS, time.
//!
//! The password never shows: not in `Debug`, not in an error.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use super::error::EtcdError;
use super::keys::Keys;
use crate::types::ClusterName;

/// Least time a connection gets to come up, however small the budget of the call is.
const CONNECT_TIMEOUT_MIN_MS: u64 = 300;
/// Probes of an idle connection, so that a firewall does not forget it.
const TCP_KEEPALIVE_S: u64 = 15;
/// [`Settings::request_timeout`] when nobody says otherwise.
pub const REQUEST_TIMEOUT_DEFAULT_MS: u64 = 3_000;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// For the one place that must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Files for TLS to etcd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsFiles {
    /// The authority that signed the servers' certificates.
    pub ca_file: Option<PathBuf>,
    /// Our certificate, if etcd asks for one.
    pub cert_file: Option<PathBuf>,
    /// Its key.
    pub key_file: Option<PathBuf>,
}

/// Where etcd is and what of it is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// URLs of etcd's members; at least one.
    pub endpoints: Vec<String>,
    /// The first part of every key: `/pgherd`.
    pub prefix: String,
    /// The second.
    pub cluster: ClusterName,
    /// etcd user.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// TLS.
    pub tls: Option<TlsFiles>,
    /// Bounds each call, over all endpoints.
    pub request_timeout: Duration,
}

impl Settings {
    /// Settings without credentials or TLS, with the default timeout.
    pub fn plain(endpoints: Vec<String>, prefix: &str, cluster: ClusterName) -> Self {
        let request_timeout = Duration::from_millis(REQUEST_TIMEOUT_DEFAULT_MS);
        Self { endpoints, prefix: prefix.to_owned(), cluster, username: None, password: None, tls: None, request_timeout }
    }

    /// The keys these settings speak of.
    pub fn keys(&self) -> Keys {
        Keys::new(&self.prefix, &self.cluster)
    }

    /// Says what cannot work before anything is tried.
    pub(super) fn check(&self) -> Result<(), EtcdError> {
        let wrong = |what: &str| Err(EtcdError::Refused(what.to_owned()));
        if self.endpoints.is_empty() {
            return wrong("no etcd endpoint is given: name at least one");
        }
        if self.username.is_some() != self.password.is_some() {
            return wrong("an etcd username and its password go together: give both or neither");
        }
        if self.tls.is_none() && self.endpoints.iter().any(|url| url.starts_with("https://")) {
            return wrong("an https endpoint needs `tls.ca_file`, the authority that signed etcd's certificate");
        }
        if self.tls.is_some() && self.endpoints.iter().any(|url| url.starts_with("http://")) {
            return wrong("`tls` is given but an endpoint begins with http://: write https://");
        }
        Ok(())
    }

    /// One client for one endpoint. Without credentials nothing is sent yet: the connection is made by the first call. Files are read
    /// anew each time, so that a renewed certificate is taken up.
    pub(super) async fn connect(&self, endpoint: &str, budget: Duration) -> Result<Client, etcd_client::Error> {
        let connect_timeout = budget.max(Duration::from_millis(CONNECT_TIMEOUT_MIN_MS));
        let mut options = ConnectOptions::new()
            .with_connect_timeout(connect_timeout)
            .with_tcp_keepalive(Duration::from_secs(TCP_KEEPALIVE_S))
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let (Some(user), Some(password)) = (&self.username, &self.password) {
            options = options.with_user(user.clone(), password.reveal());
        }
        if let Some(files) = &self.tls {
            options = options.with_tls(tls_options(files).await?);
        }
        Client::connect([endpoint], Some(options)).await
    }
}

async fn tls_options(files: &TlsFiles) -> Result<TlsOptions, etcd_client::Error> {
    let mut tls = TlsOptions::new();
    if let Some(ca) = &files.ca_file {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca).await?));
    }
    if let (Some(cert), Some(key)) = (&files.cert_file, &files.key_file) {
        tls = tls.identity(Identity::from_pem(read(cert).await?, read(key).await?));
    }
    Ok(tls)
}

async fn read(path: &PathBuf) -> Result<Vec<u8>, etcd_client::Error> {
    let named = |e: std::io::Error| std::io::Error::new(e.kind(), format!("{} could not be read: {e}", path.display()));
    tokio::fs::read(path).await.map_err(|e| etcd_client::Error::IoError(named(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoint: &str) -> Settings {
        Settings::plain(vec![endpoint.to_owned()], "/pgherd", "main".parse().unwrap())
    }

    #[test]
    fn i14_a_password_never_shows_in_debug_output() {
        let mut settings = settings("http://127.0.0.1:1");
        settings.password = Some(Secret::new("canary"));
        assert!(!format!("{settings:?}").contains("canary"));
    }

    #[test]
    fn settings_that_cannot_work_are_refused_with_what_to_do() {
        assert!(settings("http://127.0.0.1:1").check().is_ok());
        assert!(settings("https://127.0.0.1:1").check().unwrap_err().to_string().contains("ca_file"));
        let mut half = settings("http://127.0.0.1:1");
        half.username = Some("pgherd".into());
        assert!(half.check().unwrap_err().to_string().contains("password"));
        let mut none = settings("x");
        none.endpoints.clear();
        assert!(none.check().is_err());
    }
}
