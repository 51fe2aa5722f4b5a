//! What members and etcd say of themselves, as a person would ask for it.

use std::time::Duration;

use pgherd::cli::demo::http;

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
}
