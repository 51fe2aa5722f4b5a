//! TLS with certificates on both sides (SAFETY row 74).

use std::path::{Path, PathBuf};
use std::process::Command;

use pgherd::etcd::{Etcd, EtcdError, Settings, TlsFiles};

use crate::support::Keeper;
use crate::support::etcd_server::{EtcdServer, Version};

/// An authority, and what it signed: `NAME.crt` with `NAME.key`.
struct Authority {
    dir: tempfile::TempDir,
}

impl Authority {
    fn new() -> Authority {
        let authority = Authority { dir: tempfile::tempdir().unwrap() };
        authority.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=tests -keyout ca.key -out ca.crt",
        );
        std::fs::write(authority.file("extensions"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n").unwrap();
        authority
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn sign(&self, name: &str) {
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.crt"
        ));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self, name: &str) -> TlsFiles {
        let pair = Some((self.file(&format!("{name}.crt")), self.file(&format!("{name}.key"))));
        let (cert_file, key_file) = pair.unzip();
        TlsFiles { ca_file: Some(self.file("ca.crt")), cert_file, key_file }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_wanted_and_shown_on_both_sides_with_the_distributions_etcd() {
    certificates_are_wanted_and_shown_on_both_sides(Version::Distribution).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_wanted_and_shown_on_both_sides_with_etcd_3_5() {
    certificates_are_wanted_and_shown_on_both_sides(Version::V3_5).await;
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

async fn certificates_are_wanted_and_shown_on_both_sides(version: Version) {
    let ours = Authority::new();
    ours.sign("server");
    ours.sign("client");
    let (cert, key, ca) = (ours.file("server.crt"), ours.file("server.key"), ours.file("ca.crt"));
    let server = EtcdServer::start_tls(
        version,
        &["--cert-file", text(&cert), "--key-file", text(&key), "--trusted-ca-file", text(&ca), "--client-cert-auth"],
        ours.client("client"),
    )
    .await;
    let etcd = server.etcd();
    let mut keeper = Keeper::start(server.settings(), 6);
    let lock = keeper.leading(&etcd, "a").await;
    keeper.proved(lock).await;

    let strangers = Authority::new();
    strangers.sign("client");
    for wrong in [
        TlsFiles { ca_file: Some(ca.clone()), ..TlsFiles::default() },
        TlsFiles { ca_file: Some(ca), ..strangers.client("client") },
        TlsFiles { ca_file: Some(strangers.file("ca.crt")), ..ours.client("client") },
        TlsFiles { ca_file: Some(ours.file("missing.crt")), ..ours.client("client") },
    ] {
        let refused = Etcd::new(Settings { tls: Some(wrong.clone()), ..server.settings() }).unwrap().read_view().await;
        assert!(matches!(refused, Err(EtcdError::Unreachable(_))), "{wrong:?}: {refused:?}");
    }
}
