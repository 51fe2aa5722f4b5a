//! What this host is: the node document, the programs, the places of the files, and what a configuration is made of.
//!
//! The rule that surprises: programs and port are settled when the first spec is known, since the spec names PostgreSQL's major
//! version; a changed port or version counts from the daemon's next start.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::etcd;
use crate::facts::postgres::StandbyFloor;
use crate::machine::action::Upstream;
use crate::machine::event::Kept;
use crate::policy::hba::{self, HbaInputs};
use crate::policy::parameters::{self, ConfigInputs, Raised};
use crate::policy::slots;
use crate::postgres::conninfo::{self, PassfileEntry, Target};
use crate::postgres::roles::{Account, Accounts};
use crate::postgres::sql::DATABASE;
use crate::postgres::{ConfigFiles, Installation, Layout, LeaderServer, Secret, Sql, files, lost, rewind, unarchived};
use crate::spec::cluster::{ClusterSpec, PermanentSlot};
use crate::spec::node::{Credential, NodeSpec};
use crate::types::{Incarnation, LeaseIdentity};

/// One request to etcd outside the lease's thread.
const ETCD_REQUEST_TIMEOUT_MS: u64 = 3_000;
const BOOT_ID_FILE: &str = "/proc/sys/kernel/random/boot_id";
const KERNEL_RELEASE_FILE: &str = "/proc/sys/kernel/osrelease";
const MACHINE_ID_FILE: &str = "/etc/machine-id";

/// This host.
pub struct Host {
    /// The node document.
    pub node: NodeSpec,
    /// Places of files.
    pub layout: Layout,
    /// The guard's program: it lies beside the daemon's.
    pub guard_binary: PathBuf,
    /// This run.
    pub incarnation: Incarnation,
    settled: OnceLock<Settled>,
    /// What was last said of parameters that had to be raised: said once for each change.
    raised: Mutex<Vec<Raised>>,
}

/// What the first spec settles.
pub struct Settled {
    /// PostgreSQL's programs.
    pub installation: Installation,
    /// The way to the local server.
    pub sql: Arc<Sql>,
}

/// The file `lease`: after a reboot no guard is left that would know the lease.
#[derive(Serialize, Deserialize)]
struct LeaseFile {
    machine_id: String,
    boot_id: String,
    lease: LeaseIdentity,
}

impl Host {
    /// Looks at the host; changes nothing but the passfile in run_dir.
    pub fn find(node: NodeSpec) -> anyhow::Result<Self> {
        ensure!(
            node.api.tls.is_none(),
            "api.tls is set, and HTTPS is not built yet: it is not served in plain text instead; remove api.tls"
        );
        let layout = Layout::new(&node.postgres.data_dir, node.postgres.wal_dir.as_deref())?;
        let own = std::env::current_exe().context("finding the daemon's own program")?;
        let guard_binary = own.with_file_name("pgherd-guard");
        ensure!(guard_binary.exists(), "the guard's program is not at {}: install both programs in one directory", guard_binary.display());
        let boot_id = std::fs::read_to_string(BOOT_ID_FILE).with_context(|| format!("reading {BOOT_ID_FILE}"))?.trim().to_owned();
        let incarnation = Incarnation { boot_id, started_ns: BootTime::now().0 };
        let host = Host { node, layout, guard_binary, incarnation, settled: OnceLock::new(), raised: Mutex::default() };
        host.write_passfile()?;
        Ok(host)
    }

    /// Settles programs and port by the first spec.
    ///
    /// # Errors
    /// When no PostgreSQL fits, or the spec does not name this member (then nothing is settled, and nothing is needed).
    pub async fn settle(&self, spec: &ClusterSpec) -> anyhow::Result<()> {
        let Some(member) = spec.member(&self.node.name) else { return Ok(()) };
        if self.settled.get().is_some() {
            return Ok(());
        }
        let on_disk = files::read_if_there(&self.layout.data_dir().join("PG_VERSION"))?.and_then(|text| text.trim().parse().ok());
        let major = spec.postgres.version.or(on_disk);
        let installation = Installation::find(self.node.postgres.bin_dir.as_deref(), major).await?;
        let sql = Sql::local(self.node.socket_dir(), member.port, &self.node.postgres.superuser.username);
        tracing::info!(bin_dir = %installation.bin_dir.display(), version = installation.version_num, "PostgreSQL");
        let _ = self.settled.set(Settled { installation, sql: Arc::new(sql) });
        Ok(())
    }

    /// What the first spec settled.
    ///
    /// # Errors
    /// Before that.
    pub fn settled(&self) -> anyhow::Result<&Settled> {
        self.settled.get().context("no spec that names this member is known yet")
    }

    /// The way to etcd.
    pub fn etcd_settings(&self) -> anyhow::Result<etcd::Settings> {
        let node = &self.node.etcd;
        let password = match &node.password_file {
            Some(file) => Some(etcd::Secret::new(Secret::read(file)?.expose())),
            None => None,
        };
        let tls = node.tls.as_ref().map(|tls| etcd::TlsFiles {
            ca_file: Some(tls.ca_file.clone()),
            cert_file: tls.cert_file.clone(),
            key_file: tls.key_file.clone(),
        });
        Ok(etcd::Settings {
            username: node.username.clone(),
            password,
            tls,
            request_timeout: Duration::from_millis(ETCD_REQUEST_TIMEOUT_MS),
            ..etcd::Settings::plain(node.endpoints.clone(), &node.prefix, self.node.cluster.clone())
        })
    }

    fn passfile(&self) -> PathBuf {
        self.node.run_dir.join("pgpass")
    }

    /// Writes the passwords where libpq looks for them; they are in no command line and no setting.
    pub fn write_passfile(&self) -> anyhow::Result<()> {
        let accounts = self.accounts()?;
        let entry = |account: &Account| (account.username.clone(), account.password.clone());
        let mut entries = vec![entry(&accounts.superuser), entry(&accounts.replication)];
        entries.extend(accounts.rewind.as_ref().map(entry));
        let entries: Vec<PassfileEntry<'_>> = entries.iter().map(|(user, password)| PassfileEntry { user, password }).collect();
        conninfo::write_passfile(&self.passfile(), &entries)?;
        Ok(())
    }

    /// pgherd's roles.
    pub fn accounts(&self) -> anyhow::Result<Accounts> {
        let account = |credential: &Credential| -> anyhow::Result<Account> {
            Ok(Account { username: credential.username.clone(), password: Secret::read(&credential.password_file)? })
        };
        let node = &self.node.postgres;
        Ok(Accounts {
            superuser: account(&node.superuser)?,
            replication: account(&node.replication)?,
            rewind: node.rewind.as_ref().map(account).transpose()?,
        })
    }

    /// The leader's server, asked as the rewind user or the superuser.
    pub fn leader_server(&self, leader: &Upstream) -> anyhow::Result<LeaderServer> {
        let node = &self.node.postgres;
        let credential = node.rewind.as_ref().unwrap_or(&node.superuser);
        let password = Secret::read(&credential.password_file)?;
        Ok(LeaderServer { host: leader.host.clone(), port: leader.port, user: credential.username.clone(), password })
    }

    /// How this member replicates from another.
    pub fn replication_conninfo(&self, from: &Upstream) -> String {
        self.conninfo_to(from, false)
    }

    /// How it reads another's files, as the rewind user or the superuser.
    pub fn rewind_conninfo(&self, from: &Upstream) -> String {
        let node = &self.node.postgres;
        self.conninfo_as(&node.rewind.as_ref().unwrap_or(&node.superuser).username, from, true)
    }

    /// With a database, which slots are copied by.
    fn conninfo_to(&self, from: &Upstream, with_database: bool) -> String {
        self.conninfo_as(&self.node.postgres.replication.username, from, with_database)
    }

    fn conninfo_as(&self, user: &str, from: &Upstream, with_database: bool) -> String {
        conninfo::build(Target {
            host: &from.host,
            port: from.port,
            user,
            passfile: &self.passfile(),
            application_name: self.node.name.as_str(),
            dbname: with_database.then_some(DATABASE),
        })
    }

    /// Whether standbys keep copies of logical slots: there are some, and this PostgreSQL can.
    pub fn has_failover_slots(&self, spec: &ClusterSpec) -> anyhow::Result<bool> {
        let logical = spec.replication.slots.values().any(|slot| matches!(slot, PermanentSlot::Logical { .. }));
        Ok(logical && spec.replication.use_slots && self.settled()?.installation.major >= slots::FAILOVER_SLOTS_SINCE)
    }

    /// What PostgreSQL's configuration is made of.
    pub fn config_inputs(
        &self,
        spec: &ClusterSpec,
        upstream: Option<&Upstream>,
        floor: Option<StandbyFloor>,
    ) -> anyhow::Result<ConfigInputs> {
        let member = spec.member(&self.node.name).context("this member is not in spec.members")?;
        let failover_slots = self.has_failover_slots(spec)?;
        let node = &self.node.postgres;
        Ok(ConfigInputs {
            cluster: spec.name.clone(),
            major_version: self.settled()?.installation.major,
            listen: node.listen.clone().unwrap_or_else(|| member.address.clone()),
            port: member.port,
            socket_dir: self.node.socket_dir().display().to_string(),
            log_dir: node.log_dir.as_ref().map(|dir| dir.display().to_string()),
            parameters: spec.postgres.parameters.clone(),
            member_parameters: spec.postgres.member_parameters.get(&self.node.name).cloned().unwrap_or_default(),
            archive_command: spec.postgres.archive_command.clone(),
            restore_command: spec.postgres.restore_command.clone(),
            primary_conninfo: upstream.map(|upstream| self.conninfo_to(upstream, failover_slots)),
            primary_slot_name: upstream
                .filter(|upstream| spec.replication.use_slots && upstream.keeps_slots)
                .map(|_| slots::slot_of(&self.node.name)),
            data_dir: self.layout.data_dir().display().to_string(),
            failover_slots,
            floor,
            syncfs_tells_errors: std::fs::read_to_string(KERNEL_RELEASE_FILE)
                .is_ok_and(|release| parameters::syncfs_tells_errors(&release)),
        })
    }

    fn access(&self, spec: &ClusterSpec) -> HbaInputs {
        let node = &self.node.postgres;
        HbaInputs {
            members: spec.members.iter().map(|member| member.address.clone()).collect(),
            os_user: node.os_user.clone(),
            superuser: node.superuser.username.clone(),
            replication: node.replication.username.clone(),
            rewind: node.rewind.as_ref().map(|credential| credential.username.clone()),
            pg_hba: spec.postgres.pg_hba.clone(),
            pg_ident: spec.postgres.pg_ident.clone(),
        }
    }

    /// pg_hba.conf as the spec has it.
    pub fn pg_hba(&self, spec: &ClusterSpec) -> String {
        hba::pg_hba_conf(&self.access(spec))
    }

    /// pg_hba.conf that lets no client in.
    pub fn pg_hba_closed(&self, spec: &ClusterSpec) -> String {
        hba::pg_hba_closed(&self.access(spec))
    }

    /// The files.
    pub fn config_files(&self, spec: &ClusterSpec, inputs: &ConfigInputs) -> anyhow::Result<ConfigFiles> {
        let access = self.access(spec);
        let configuration = parameters::postgresql_conf(inputs).map_err(anyhow::Error::msg)?;
        let mut said = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        if *said != configuration.raised {
            for raised in &configuration.raised {
                let Raised { name, wanted, used } = raised;
                tracing::warn!(
                    "{name} is {wanted} in the spec; the control file asks for {used} on a standby, which is used until the primary has run with less"
                );
            }
            said.clone_from(&configuration.raised);
        }
        Ok(ConfigFiles {
            postgresql_conf: configuration.text,
            pg_hba: hba::pg_hba_conf(&access),
            pg_ident: hba::pg_ident_conf(&access),
            upstream: parameters::live::upstream_conf(inputs).map_err(anyhow::Error::msg)?,
        })
    }

    /// What lies beside the data directory.
    pub fn kept(&self) -> Kept {
        let directory = self.layout.kept_dir();
        Kept {
            directory: directory.exists().then(|| directory.display().to_string()),
            lost: lost::list(&self.layout),
            untold: Vec::new(),
            unarchived: unarchived::beside(&self.layout).unwrap_or_else(|error| {
                tracing::warn!(error = format!("{error:#}"), "what is to be archived from beside could not be read");
                None
            }),
            no_rewind: self.settled().ok().and_then(|settled| rewind::obstacle(&settled.installation, &self.layout)),
        }
    }

    fn machine_id() -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(MACHINE_ID_FILE).with_context(|| format!("reading {MACHINE_ID_FILE}"))?.trim().to_owned())
    }

    /// Notes the lease on disk: at each new one, never on the way of a renewal.
    pub fn write_lease_file(&self, lease: LeaseIdentity) -> anyhow::Result<()> {
        let file = LeaseFile { machine_id: Self::machine_id()?, boot_id: self.incarnation.boot_id.clone(), lease };
        self.layout.prepare()?;
        files::write_if_changed(&self.layout.lease_file(), serde_json::to_string(&file)?.as_bytes())?;
        Ok(())
    }

    /// The lease of this machine before its last boot: PostgreSQL ended with that boot, so what hangs on it may go.
    pub fn lease_before_boot(&self) -> Option<LeaseIdentity> {
        let text = files::read_if_there(&self.layout.lease_file()).ok()??;
        let file: LeaseFile = serde_json::from_str(&text).ok()?;
        let same_machine = Self::machine_id().is_ok_and(|id| !id.is_empty() && id == file.machine_id);
        (same_machine && file.boot_id != self.incarnation.boot_id).then_some(file.lease)
    }
}
