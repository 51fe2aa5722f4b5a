//! What members and etcd say of themselves, as a person would ask for it.

use std::time::Duration;

use pgherd::cli::demo::http;
use pgherd::cli::demo::runtime::in_own_thread;

use super::world::World;

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
        let said = self.cluster.pgherd(&["events", "-o", "json", "--limit", "500"]).unwrap();
        let events: Vec<serde_json::Value> = serde_json::from_str(&said.out).unwrap();
        let of = |event: &&serde_json::Value| event["member"] == *self.name(index) && event["facts"]["to"] == *state;
        events.iter().filter(of).map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect()
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
