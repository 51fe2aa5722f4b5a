//! Every key under `PREFIX/CLUSTER/`: built here and parsed back here, and nowhere else. Pure.
//!
//! A key that is not in the table of DESIGN is [`Key::Other`]: kept out of the view, never touched.

use crate::types::{ClusterName, MemberName};

/// Digits of the revision that an event's key begins with, so that keys sort as they were written.
const EVENT_REVISION_DIGITS: usize = 19;

/// One key of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// The applied spec.
    Spec,
    /// An older spec, by generation.
    SpecHistory(u64),
    /// The leader lock.
    Leader,
    /// What a member says of itself.
    Member(MemberName),
    /// How the last leader left.
    Release,
    /// The leader's last position.
    Status,
    /// Who may hold every acknowledged commit.
    Sync,
    /// Who may lead while etcd is away.
    Failsafe,
    /// Who runs initdb, or the system identifier.
    Initialize,
    /// Set by pause.
    Maintenance,
    /// A member whose guard may have suspended the deadlines of the lock.
    Suspended(MemberName),
    /// Timeline history.
    History,
    /// What an operator asked.
    Request(String),
    /// One decision.
    Event(String),
    /// Not one of ours.
    Other(String),
}

/// Builds and parses the keys of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    base: String,
}

impl Keys {
    /// Keys under `prefix/cluster/`. Slashes at the ends of the prefix make no difference, but for a leading one, which is added.
    pub fn new(prefix: &str, cluster: &ClusterName) -> Self {
        let prefix = prefix.trim_matches('/');
        let base = if prefix.is_empty() { format!("/{cluster}/") } else { format!("/{prefix}/{cluster}/") };
        Self { base }
    }

    /// What every key begins with: `/pgherd/main/`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The key as it stands in etcd.
    pub fn path(&self, key: &Key) -> String {
        format!("{}{}", self.base, relative(key))
    }

    /// The leader lock.
    pub fn leader(&self) -> String {
        self.path(&Key::Leader)
    }

    /// A key that is never written: deleting it sends a transaction through raft and changes no revision [measured].
    pub fn never(&self) -> String {
        format!("{}never", self.base)
    }

    /// A new event's key. `revision` is the highest one known, so that events sort as they were decided without asking a wall clock.
    pub fn event(&self, revision: i64, member: &MemberName, count: u64) -> String {
        let id = format!("{revision:0width$}-{member}-{count}", width = EVENT_REVISION_DIGITS);
        self.path(&Key::Event(id))
    }

    /// First key and end of a folder such as `events/`.
    pub fn folder(&self, name: &str) -> (String, String) {
        (format!("{}{name}/", self.base), format!("{}{name}0", self.base))
    }

    /// The ranges `[from, to)` that the view is made of: everything but `events/` and `spec-history/`, which may be large.
    pub fn view_ranges(&self) -> [(String, String); 3] {
        let (events, after_events) = self.folder("events");
        let (specs, after_specs) = self.folder("spec-history");
        [(self.base.clone(), events), (after_events, specs), (after_specs, range_end(&self.base))]
    }

    /// What a key found in etcd is. None when it is not under this cluster.
    pub fn parse(&self, found: &[u8]) -> Option<Key> {
        let rest = found.strip_prefix(self.base.as_bytes())?;
        let rest = String::from_utf8_lossy(rest);
        Some(parse_relative(&rest))
    }
}

/// The key without the cluster's prefix, for people: `members/node_a`.
pub fn relative(key: &Key) -> String {
    match key {
        Key::Spec => "spec".into(),
        Key::SpecHistory(generation) => format!("spec-history/{generation}"),
        Key::Leader => "leader".into(),
        Key::Member(name) => format!("members/{name}"),
        Key::Release => "release".into(),
        Key::Status => "status".into(),
        Key::Sync => "sync".into(),
        Key::Failsafe => "failsafe".into(),
        Key::Initialize => "initialize".into(),
        Key::Maintenance => "maintenance".into(),
        Key::Suspended(name) => format!("maintenance/{name}"),
        Key::History => "history".into(),
        Key::Request(id) => format!("requests/{id}"),
        Key::Event(id) => format!("events/{id}"),
        Key::Other(text) => text.clone(),
    }
}

fn parse_relative(rest: &str) -> Key {
    let other = || Key::Other(rest.to_owned());
    match rest {
        "spec" => Key::Spec,
        "leader" => Key::Leader,
        "release" => Key::Release,
        "status" => Key::Status,
        "sync" => Key::Sync,
        "failsafe" => Key::Failsafe,
        "initialize" => Key::Initialize,
        "maintenance" => Key::Maintenance,
        "history" => Key::History,
        _ => match rest.split_once('/') {
            Some(("members", name)) => name.parse().map_or_else(|_| other(), Key::Member),
            Some(("maintenance", name)) => name.parse().map_or_else(|_| other(), Key::Suspended),
            Some(("spec-history", number)) => number.parse().map_or_else(|_| other(), Key::SpecHistory),
            Some(("requests", id)) => Key::Request(id.to_owned()),
            Some(("events", id)) => Key::Event(id.to_owned()),
            _ => other(),
        },
    }
}

/// The end of the range of all keys that begin with `prefix`, which ends with an ASCII character.
fn range_end(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    match end.pop() {
        Some(last) => end.push(char::from_u32(last as u32 + 1).unwrap_or(last)),
        None => end.push('\0'),
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::new("/pgherd", &"main".parse().unwrap())
    }

    #[test]
    fn every_key_of_the_table_parses_back_to_itself() {
        let all = [
            (Key::Spec, "/pgherd/main/spec"),
            (Key::SpecHistory(7), "/pgherd/main/spec-history/7"),
            (Key::Leader, "/pgherd/main/leader"),
            (Key::Member("node_a".parse().unwrap()), "/pgherd/main/members/node_a"),
            (Key::Release, "/pgherd/main/release"),
            (Key::Status, "/pgherd/main/status"),
            (Key::Sync, "/pgherd/main/sync"),
            (Key::Failsafe, "/pgherd/main/failsafe"),
            (Key::Initialize, "/pgherd/main/initialize"),
            (Key::Maintenance, "/pgherd/main/maintenance"),
            (Key::Suspended("node_a".parse().unwrap()), "/pgherd/main/maintenance/node_a"),
            (Key::History, "/pgherd/main/history"),
            (Key::Request("1a".into()), "/pgherd/main/requests/1a"),
            (Key::Event("1-a-1".into()), "/pgherd/main/events/1-a-1"),
        ];
        for (key, text) in all {
            assert_eq!(keys().path(&key), text);
            assert_eq!(keys().parse(text.as_bytes()), Some(key));
        }
    }

    #[test]
    fn keys_of_another_cluster_and_hostile_member_names_are_not_ours() {
        assert_eq!(keys().parse(b"/pgherd/main2/leader"), None);
        assert_eq!(keys().parse(b"/pgherd/main"), None);
        assert_eq!(keys().parse(b"/pgherd/main/members/../x"), Some(Key::Other("members/../x".into())));
        assert_eq!(keys().parse(b"/pgherd/main/leader/x"), Some(Key::Other("leader/x".into())));
        assert!(matches!(keys().parse(b"/pgherd/main/\xff"), Some(Key::Other(_))));
    }

    #[test]
    fn a_prefix_is_the_same_with_and_without_slashes() {
        let main: ClusterName = "main".parse().unwrap();
        for prefix in ["/pgherd", "pgherd", "/pgherd/", "pgherd//"] {
            assert_eq!(Keys::new(prefix, &main), keys(), "{prefix}");
        }
        assert_eq!(Keys::new("/", &main).base(), "/main/");
    }

    #[test]
    fn the_view_reads_every_key_but_events_and_old_specs() {
        let ranges = keys().view_ranges();
        let inside = |key: &str| ranges.iter().filter(|(from, to)| key >= from.as_str() && key < to.as_str()).count();
        for key in [
            "failsafe",
            "history",
            "initialize",
            "leader",
            "maintenance",
            "maintenance/a",
            "members/a",
            "release",
            "requests/1",
            "spec",
            "status",
            "sync",
            "zzz",
        ] {
            assert_eq!(inside(&format!("/pgherd/main/{key}")), 1, "{key}");
        }
        for key in ["events/1", "spec-history/1"] {
            assert_eq!(inside(&format!("/pgherd/main/{key}")), 0, "{key}");
        }
        assert_eq!(inside("/pgherd/main2/spec"), 0);
    }

    #[test]
    fn events_sort_as_they_were_decided() {
        let member: MemberName = "a".parse().unwrap();
        assert!(keys().event(9, &member, 1) < keys().event(10, &member, 2));
        assert!(keys().event(i64::MAX, &member, 1) > keys().event(1, &member, 9));
    }
}
