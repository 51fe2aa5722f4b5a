//! What members and etcd say of themselves, as a person would ask for it.

use std::time::Duration;

use nix::sys::signal::Signal;
use pgherd::cli::demo::http;
use pgherd::cli::demo::process::ProcessId;
use pgherd::cli::demo::runtime::in_own_thread;
use pgherd::clock::BootTime;

use super::world::{MustSucceed, World};

/// A healthy member answers at once.
const LIMIT: Duration = Duration::from_secs(5);

impl World {
    /// What OPTIONS of a path says on a node; None when nobody answers.
    pub fn http(&self, index: usize, path: &str) -> Option<u16> {
        http::ask("OPTIONS", self.cluster.plan.nodes[index].api_listen, path, LIMIT).ok().map(|(code, _)| code)
    }

    /// What GET of a path says on a node; None when nobody answers.
    pub fn get(&self, index: usize, path: &str) -> Option<(u16, String)> {
        http::ask("GET", self.cluster.plan.nodes[index].api_listen, path, LIMIT).ok()
    }

    /// The body of a path on a node, read as JSON; null when nobody answers.
    pub fn json(&self, index: usize, path: &str) -> serde_json::Value {
        self.get(index, path).and_then(|(_, body)| serde_json::from_str(&body).ok()).unwrap_or_default()
    }

    /// Why there was the last election, as its winner recorded it.
    pub fn why_elected(&self) -> String {
        let history = self.json(self.leader(), "/history");
        history.as_array().and_then(|switches| switches.last()).and_then(|last| last[2].as_str()).unwrap_or_default().to_owned()
    }

    /// What a node said on entering this state, each time, oldest first.
    pub fn entered(&self, index: usize, state: &str) -> Vec<String> {
        self.events(|event| event["member"] == *self.name(index) && event["facts"]["to"] == *state)
    }

    /// What a node decided of this kind, each time, oldest first.
    pub fn decided(&self, index: usize, kind: &str) -> Vec<String> {
        self.events(|event| event["member"] == *self.name(index) && event["kind"] == *kind)
    }

    /// What was decided of this kind, whoever did, oldest first.
    pub fn decided_by_anybody(&self, kind: &str) -> Vec<String> {
        self.events(|event| event["kind"] == *kind)
    }

    /// What such events say, oldest first.
    fn events(&self, of: impl Fn(&serde_json::Value) -> bool) -> Vec<String> {
        let said = self.cluster.pgherd(&["events", "-o", "json", "--limit", "1000"]).unwrap();
        said.must_succeed("pgherd events");
        let events: Vec<serde_json::Value> = serde_json::from_str(&said.out).unwrap();
        events.iter().filter(|event| of(event)).map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// What a member says over HTTP is in its way: etcd may take no writes.
    pub fn says(&self, index: usize, kind: &str) -> Option<String> {
        let said = self.json(index, "/patroni");
        let found = said["pgherd"]["conditions"].as_array()?.iter().find(|condition| condition["kind"] == *kind)?.clone();
        Some(found["message"].as_str().unwrap_or_default().to_owned())
    }

    /// The roles of all members, in order of the alphabet.
    pub fn roles(&self) -> Vec<String> {
        let mut roles: Vec<String> = self.status().members.into_iter().filter_map(|member| member.role).collect();
        roles.sort();
        roles
    }

    /// The member that has this role.
    pub fn with_role(&self, role: &str) -> Option<usize> {
        let members = self.status().members;
        self.cluster.index_of(&members.iter().find(|member| member.role.as_deref() == Some(role))?.name)
    }

    /// Whether a row that was sent to this node after `since` was acknowledged.
    pub fn takes_writes(&self, index: usize, since: BootTime) -> bool {
        self.prober().acknowledged_since(self.name(index), since) > 0
    }

    /// Every PostgreSQL process of these nodes.
    pub fn postgres_of(&self, members: &[usize]) -> Vec<ProcessId> {
        members.iter().flat_map(|index| self.cluster.postgres_processes(*index)).collect()
    }

    /// The process of a standby that receives WAL.
    pub fn walreceiver(&self, index: usize) -> Option<ProcessId> {
        let title = |process: &ProcessId| std::fs::read_to_string(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        self.cluster.postgres_processes(index).into_iter().find(|process| title(process).contains("walreceiver"))
    }

    /// Whether the status shows a condition for this member whose text has `word` in it.
    pub fn has_condition(&self, index: usize, word: &str) -> bool {
        let Ok(status) = self.cluster.status() else { return false };
        let own = status.member(self.name(index)).map(|member| member.conditions.clone()).unwrap_or_default();
        own.iter().chain(&status.conditions).any(|condition| condition.to_string().contains(word))
    }

    /// Runs SQL on one node and gives the first column of the last row; an error is a sentence.
    pub fn ask(&self, index: usize, sql: &str) -> Result<Option<String>, String> {
        let config = self.cluster.connection(self.port(index)).unwrap();
        ask(config, sql, LIMIT)
    }

    /// Commits wait for standbys: each acknowledged one is on two members.
    #[track_caller]
    pub fn wait_synchronous(&self, when: &str) {
        let waits = |role: Option<&str>| matches!(role, Some("sync_standby" | "quorum_standby"));
        self.settle(&format!("each commit is on two members {when}"), || {
            self.cluster.status().is_ok_and(|status| status.members.iter().any(|member| waits(member.role.as_deref())))
        });
    }
}

/// To each of them.
pub fn signal_all(processes: &[ProcessId], signal: Signal) {
    processes.iter().for_each(|process| process.signal(signal));
}

/// Runs SQL and gives the first column of the last row.
pub fn ask(config: tokio_postgres::Config, sql: &str, limit: Duration) -> Result<Option<String>, String> {
    let sql = sql.to_owned();
    in_own_thread(async move {
        let work = async {
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            let answers = client.simple_query(&sql).await?;
            let rows = answers.into_iter().filter_map(|answer| match answer {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
                _ => None,
            });
            Ok(rows.last().flatten())
        };
        tokio::time::timeout(limit, work).await?
    })
    .map_err(|error| format!("{error:#}"))
}
