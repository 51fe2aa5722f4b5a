//! PostgreSQL as a person would set it up without pgherd: a primary and its standbys by initdb and pg_basebackup, no daemon.
//!
//! The settings are not typed again: they are asked of the primary that pgherd runs, and afterwards both are asked for all they have.
//! What differs and is not a place, or whom a server follows, ends the measurement.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tokio_postgres::Config;

use super::super::cluster::{LocalCluster, remove_dir, run};
use super::super::ports::PortBlock;
use super::super::process::{ProcessId, wait_for, wait_for_every};
use super::ask::{execute, streaming, texts};
use crate::policy::parameters::quote;

/// How long initdb or a copy may take, in milliseconds.
const COMMAND_LIMIT_MS: u64 = 120_000;
/// How long a server may take to answer, to stream, or to end, in milliseconds.
const SERVER_LIMIT_MS: u64 = 60_000;
/// Time between two looks whether a server has ended, in milliseconds: it is in what a switchover by hand takes.
const END_POLL_MS: u64 = 1;
/// Included by postgresql.conf, as pgherd does it: whom commits wait for.
const NAMES_FILE: &str = "names.conf";
/// Settings that say where something is, whom a server follows, and for whom commits wait.
const PLACES: [&str; 10] = [
    "config_file",
    "data_directory",
    "hba_file",
    "ident_file",
    "log_directory",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "synchronous_standby_names",
    "unix_socket_directories",
];
/// What a configuration file or a command line has set.
const SET: &str = "SELECT name, current_setting(name) FROM pg_settings WHERE source IN ('configuration file', 'command line')";
/// Everything there is to compare.
const ALL: &str = "SELECT name, coalesce(setting, '') FROM pg_settings";

/// A primary and its standbys.
pub struct Bare<'a> {
    cluster: &'a LocalCluster,
    settings: BTreeMap<String, String>,
    primary: Server,
    standbys: Vec<Server>,
}

struct Server {
    /// A standby's application_name, and its slot's.
    name: String,
    port: u16,
    dir: PathBuf,
    postmaster: Option<ProcessId>,
}

impl Server {
    /// A fast stop.
    fn end(&mut self) -> Result<()> {
        let Some(postmaster) = self.postmaster.take() else { return Ok(()) };
        postmaster.signal(Signal::SIGINT);
        let (pause, limit) = (Duration::from_millis(END_POLL_MS), Duration::from_millis(SERVER_LIMIT_MS));
        ensure!(wait_for_every(pause, limit, || !postmaster.is_alive()), "the server in {} does not end", self.dir.display());
        Ok(())
    }
}

impl<'a> Bare<'a> {
    /// Starts it beside `cluster`, with the settings of the server at `pattern`, and with standbys of these names.
    pub fn start(cluster: &'a LocalCluster, ports: &PortBlock, pattern: &Config, standbys: &[String]) -> Result<Bare<'a>> {
        let nodes = u16::try_from(cluster.plan.nodes.len()).context("counting nodes")?;
        let server = |(name, index): (&str, u16)| {
            let dir = cluster.plan.dir.join(format!("bare-{name}"));
            Server { name: name.to_owned(), port: ports.postgres(nodes + index), dir, postmaster: None }
        };
        let settings = settings(pattern, SET)?;
        let primary = server(("primary", 0));
        let standbys = standbys.iter().map(String::as_str).zip(1..).map(server).collect();
        let mut bare = Bare { cluster, settings, primary, standbys };
        bare.start_primary()?;
        for index in 0..bare.standbys.len() {
            bare.start_standby(index)?;
        }
        bare.wait_for_standbys()?;
        same(&settings_of_all(pattern)?, &settings_of_all(&bare.config()?)?)?;
        Ok(bare)
    }

    /// How to connect to the primary.
    pub fn config(&self) -> Result<Config> {
        self.cluster.connection(self.primary.port)
    }

    /// Sets synchronous_standby_names by hand. Returns before walsenders have read it.
    pub fn set_names(&self, names: &str) -> Result<()> {
        self.set_names_of(&self.primary, names)
    }

    fn set_names_of(&self, server: &Server, names: &str) -> Result<()> {
        let quoted = quote(names).context("names with a NUL byte")?;
        self.write(&server.dir.join("data").join(NAMES_FILE), &format!("synchronous_standby_names = {quoted}\n"))?;
        texts(&self.cluster.connection(server.port)?, "SELECT pg_reload_conf()::text, ''").map(|_| ())
    }

    /// How to connect to every server, the primary first.
    pub fn configs(&self) -> Result<Vec<Config>> {
        [&self.primary].into_iter().chain(&self.standbys).map(|server| self.cluster.connection(server.port)).collect()
    }

    /// What can be done before: the first standby gets a slot for each of the others, and every server the names that commits wait for once
    /// it is the primary, of which one is enough. Without `waits` for nobody.
    pub fn prepare_to_switch_over(&self, waits: bool) -> Result<()> {
        let standby = self.standbys.first().context("there is no standby")?;
        for other in &self.standbys[1..] {
            execute(&self.cluster.connection(standby.port)?, &slot_for(&other.name)).context("making a slot on a standby")?;
        }
        let servers = || [&self.primary].into_iter().chain(&self.standbys);
        for server in servers() {
            let others = servers().filter(|other| other.name != server.name).map(|other| format!("\"{}\"", other.name));
            let names = if waits { format!("ANY 1 ({})", others.collect::<Vec<_>>().join(", ")) } else { String::new() };
            self.set_names_of(server, &names)?;
        }
        Ok(())
    }

    /// Makes the first standby the primary, with nothing between a command's end and the next one: CHECKPOINT, a fast stop, which ends when
    /// the standbys have the shutdown checkpoint, pg_promote, and a reload of the others, which follow the new primary then.
    pub fn switch_over(&mut self) -> Result<()> {
        execute(&self.config()?, "CHECKPOINT")?;
        self.primary.end()?;
        let standby = self.standbys.first_mut().context("there is no standby")?;
        execute(&self.cluster.connection(standby.port)?, "SELECT pg_promote(false)")?;
        std::mem::swap(&mut self.primary, standby);
        for other in &self.standbys[1..] {
            self.configure_to_follow(other)?;
            texts(&self.cluster.connection(other.port)?, "SELECT pg_reload_conf()::text, ''")?;
        }
        Ok(())
    }

    /// Starts the former primary as a standby of the one that takes writes by now.
    pub fn follow(&mut self) -> Result<()> {
        self.begin_to_follow(0)?;
        self.wait_for_standbys()
    }

    /// Ends it, and removes all of it.
    pub fn end(mut self) -> Result<()> {
        for server in self.standbys.iter_mut().chain([&mut self.primary]) {
            server.end()?;
            remove_dir(&server.dir)?;
        }
        Ok(())
    }

    fn wait_for_standbys(&self) -> Result<()> {
        let config = self.config()?;
        let stream = || streaming(&config).is_ok_and(|names| names.len() == self.standbys.len());
        ensure!(wait_for(Duration::from_millis(SERVER_LIMIT_MS), stream), "the standbys without pgherd do not stream");
        Ok(())
    }

    fn start_primary(&mut self) -> Result<()> {
        self.make_dir(&self.primary)?;
        let passfile = self.cluster.plan.dir.join("secrets/superuser");
        let mut initdb = self.program("initdb");
        initdb.arg("--pgdata").arg(self.primary.dir.join("data")).arg("--username").arg(&self.cluster.household().user.name);
        initdb.arg("--pwfile").arg(&passfile).args(["--auth-local", "peer", "--auth-host", "scram-sha-256"]);
        initdb.args(["--encoding", "UTF8", "--locale", "C.UTF-8", "--data-checksums"]);
        succeed(initdb)?;
        self.configure(&self.primary, "")?;
        self.primary.postmaster = Some(self.spawn(&self.primary)?);
        let config = self.config()?;
        let answers = || texts(&config, "SELECT '', ''").is_ok();
        ensure!(wait_for(Duration::from_millis(SERVER_LIMIT_MS), answers), "the server in {} does not answer", self.primary.dir.display());
        Ok(())
    }

    fn start_standby(&mut self, index: usize) -> Result<()> {
        let (server, user) = (&self.standbys[index], &self.cluster.household().user.name);
        self.make_dir(server)?;
        let mut copy = self.program("pg_basebackup");
        copy.arg("--pgdata").arg(server.dir.join("data")).args(["--host", "127.0.0.1", "--port", &self.primary.port.to_string()]);
        copy.args(["--username", user, "--no-password", "--checkpoint", "fast", "--wal-method", "stream"]);
        copy.env("PGPASSFILE", self.write_passfile(server)?);
        succeed(copy)?;
        self.begin_to_follow(index)
    }

    fn begin_to_follow(&mut self, index: usize) -> Result<()> {
        let server = &self.standbys[index];
        execute(&self.config()?, &slot_for(&server.name)).context("making a slot")?;
        self.write(&server.dir.join("data/standby.signal"), "")?;
        self.configure_to_follow(server)?;
        self.standbys[index].postmaster = Some(self.spawn(server)?);
        Ok(())
    }

    fn configure_to_follow(&self, server: &Server) -> Result<()> {
        let (name, user) = (&server.name, &self.cluster.household().user.name);
        let (port, passfile) = (self.primary.port, self.write_passfile(server)?);
        let conninfo = format!("host=127.0.0.1 port={port} user={user} passfile={} application_name={name}", passfile.display());
        self.configure(server, &conninfo)
    }

    fn write_passfile(&self, server: &Server) -> Result<PathBuf> {
        let (path, user) = (server.dir.join("pgpass"), &self.cluster.household().user.name);
        self.write(&path, &format!("127.0.0.1:*:*:{user}:{}\n", self.cluster.superuser_password()?))?;
        Ok(path)
    }

    /// pgherd's settings at another place.
    fn configure(&self, server: &Server, follows: &str) -> Result<()> {
        let places = [
            ("port", server.port.to_string()),
            ("unix_socket_directories", server.dir.display().to_string()),
            ("log_directory", "log".to_owned()),
            ("primary_conninfo", follows.to_owned()),
            ("primary_slot_name", if follows.is_empty() { String::new() } else { server.name.clone() }),
            ("include_if_exists", NAMES_FILE.to_owned()),
        ];
        let mut text = String::new();
        for (name, value) in self.settings.iter().map(|(name, value)| (name.as_str(), value)).chain(places.iter().map(|(n, v)| (*n, v))) {
            let quoted = quote(value).with_context(|| format!("{name} with a NUL byte"))?;
            let _ = writeln!(text, "{name} = {quoted}");
        }
        self.write(&server.dir.join("data/postgresql.conf"), &text)
    }

    fn make_dir(&self, server: &Server) -> Result<()> {
        fs::create_dir(&server.dir).with_context(|| format!("making {}", server.dir.display()))?;
        fs::set_permissions(&server.dir, fs::Permissions::from_mode(0o700))?;
        self.cluster.household().user.own(&server.dir)
    }

    fn write(&self, path: &std::path::Path, text: &str) -> Result<()> {
        use std::io::Write;
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
        self.cluster.household().user.own(path)
    }

    /// One of PostgreSQL's programs, as the user of the servers.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.cluster.plan.programs.postgres_bin.join(name));
        command.current_dir(&self.cluster.plan.dir);
        if let Some((uid, gid)) = self.cluster.household().user.change_to {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn spawn(&self, server: &Server) -> Result<ProcessId> {
        let mut command = Command::new(self.cluster.plan.programs.postgres_bin.join("postgres"));
        command.arg("-D").arg(server.dir.join("data"));
        self.cluster.household().spawn(&format!("bare-{}", server.name), command, &server.dir.join("postgres.log"), true)
    }
}

/// A physical slot of this name, unless it is there. A name of ours has no quote in it.
fn slot_for(name: &str) -> String {
    format!(
        "SELECT pg_create_physical_replication_slot('{name}') WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{name}')"
    )
}

fn succeed(command: Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let said = run(command, Duration::from_millis(COMMAND_LIMIT_MS))?;
    ensure!(said.code == Some(0), "{program}: exit {:?}: {}{}", said.code, said.out, said.err);
    Ok(())
}

fn settings(config: &Config, question: &str) -> Result<BTreeMap<String, String>> {
    let rows = texts(config, question).context("asking for the settings")?;
    Ok(rows.into_iter().filter(|(name, _)| !PLACES.contains(&name.as_str())).collect())
}

fn settings_of_all(config: &Config) -> Result<BTreeMap<String, String>> {
    settings(config, ALL)
}

/// Two servers that are compared have the same settings.
fn same(of_pgherd: &BTreeMap<String, String>, of_bare: &BTreeMap<String, String>) -> Result<()> {
    let names: std::collections::BTreeSet<&String> = of_pgherd.keys().chain(of_bare.keys()).collect();
    let differ = names.into_iter().filter(|name| of_pgherd.get(*name) != of_bare.get(*name));
    let list: Vec<String> = differ.map(|name| format!("{name}: {:?} and {:?}", of_pgherd.get(name), of_bare.get(name))).collect();
    ensure!(list.is_empty(), "the primary under pgherd and the one without have different settings: {}", list.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_compared_only_when_all_their_settings_are_the_same() {
        let settings = |fsync: &str| BTreeMap::from([("fsync".to_owned(), fsync.to_owned())]);
        assert!(same(&settings("on"), &settings("on")).is_ok());
        assert!(same(&settings("on"), &settings("off")).unwrap_err().to_string().contains("fsync"));
        assert!(same(&settings("on"), &BTreeMap::new()).is_err(), "one that only one of them has");
    }
}
