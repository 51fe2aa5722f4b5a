//! What `pgherd status -o json` says, as a script reads it: only the documented keys, and any more are ignored.

use serde::Deserialize;

/// The cluster.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Status {
    /// Counts applied specs.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Who leads.
    #[serde(default)]
    pub leader: Option<String>,
    /// The leader's timeline.
    #[serde(default)]
    pub timeline: Option<u32>,
    /// The members.
    #[serde(default)]
    pub members: Vec<StatusMember>,
    /// Conditions of the whole cluster.
    #[serde(default)]
    pub conditions: Vec<serde_json::Value>,
}

/// One member.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct StatusMember {
    /// Its name.
    pub name: String,
    /// `leader`, `sync_standby`, `quorum_standby` or `replica`.
    #[serde(default)]
    pub role: Option<String>,
    /// `running`, `streaming` …
    #[serde(default)]
    pub state: Option<String>,
    /// The timeline its PostgreSQL is on.
    #[serde(default)]
    pub timeline: Option<u32>,
    /// What is in the way of the spec on this member.
    #[serde(default)]
    pub conditions: Vec<serde_json::Value>,
}

impl StatusMember {
    /// Whether commits wait for this member, alone or among others.
    pub fn is_waited_for(&self) -> bool {
        matches!(self.role.as_deref(), Some("sync_standby" | "quorum_standby"))
    }
}

impl Status {
    /// The member of that name.
    pub fn member(&self, name: &str) -> Option<&StatusMember> {
        self.members.iter().find(|member| member.name == name)
    }

    /// Whether neither the cluster nor a member has a condition that is worse than a piece of information.
    pub fn is_calm(&self) -> bool {
        let harmless = |condition: &serde_json::Value| condition["severity"] == "info";
        self.conditions.iter().chain(self.members.iter().flat_map(|member| &member.conditions)).all(harmless)
    }

    /// Whether commits wait for standbys, and each of the `nodes` - 1 others is one that may acknowledge them.
    pub fn is_durable(&self, nodes: usize) -> bool {
        self.members.iter().filter(|member| member.is_waited_for()).count() + 1 == nodes
    }

    /// Whether one leader leads and `nodes` - 1 others stream from it on its timeline.
    pub fn is_whole(&self, nodes: usize) -> bool {
        let leads = |member: &&StatusMember| member.role.as_deref() == Some("leader");
        let Some(leader) = self.members.iter().find(leads) else { return false };
        let streams = |member: &&StatusMember| member.state.as_deref() == Some("streaming") && member.timeline == leader.timeline;
        self.leader.as_ref() == Some(&leader.name)
            && leader.state.as_deref() == Some("running")
            && self.members.iter().filter(leads).count() == 1
            && self.members.iter().filter(|member| !leads(member)).filter(streams).count() + 1 == nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_calm_until_a_condition_is_worse_than_information() {
        let status = |of_member: &str| {
            let text = format!(
                r#"{{"conditions":[{{"kind":"a","severity":"info","message":""}}],
                "members":[{{"name":"a","conditions":[{{"kind":"b","severity":"{of_member}","message":""}}]}}]}}"#
            );
            serde_json::from_str::<Status>(&text).unwrap()
        };
        assert!(status("info").is_calm() && Status::default().is_calm());
        assert!(!status("warning").is_calm() && !status("error").is_calm());
    }

    #[test]
    fn a_cluster_is_durable_when_every_standby_may_acknowledge_a_commit() {
        let status = |role: &str| {
            let text = format!(
                r#"{{"members":[{{"name":"a","role":"leader"}},{{"name":"b","role":"quorum_standby"}},{{"name":"c","role":"{role}"}}]}}"#
            );
            serde_json::from_str::<Status>(&text).unwrap()
        };
        assert!(status("quorum_standby").is_durable(3) && status("sync_standby").is_durable(3));
        assert!(!status("replica").is_durable(3), "one that was left out acknowledges nothing");
    }

    #[test]
    fn a_cluster_is_whole_with_one_leader_and_all_others_streaming_on_its_timeline() {
        let text = |timeline: u32| {
            format!(
                r#"{{"cluster":"c","leader":"a","timeline":2,"members":[
                {{"name":"a","role":"leader","state":"running","timeline":2}},
                {{"name":"b","role":"replica","state":"streaming","timeline":{timeline},"lag":null}}]}}"#
            )
        };
        let status = |timeline| serde_json::from_str::<Status>(&text(timeline)).unwrap();
        assert!(status(2).is_whole(2));
        assert!(!status(1).is_whole(2), "another timeline");
        assert!(!status(2).is_whole(3), "a member is missing");
    }
}
