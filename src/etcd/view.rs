//! Key-values to [`ClusterView`], and changes applied to it. Pure: what a key means is decided here and nowhere else.
//!
//! A record that cannot be read is absent from the view and named in `unreadable`; it never keeps the value it had before. Two that
//! would surprise: a `maintenance` that cannot be read still means maintenance, and a `leader` is somebody's lock whatever is in it.

use serde::de::DeserializeOwned;

use super::keys::{Key, Keys, relative};
use crate::facts::cluster::{ClusterView, Initialize, LeaderKey, MemberKey};
use crate::facts::maintenance::{MaintenanceRecord, Phase};
use crate::facts::requests::RequestKey;
use crate::types::{Epoch, EtcdClusterId, LeaseId, Revision};

/// Most of a foreign value that is repeated in a message.
const SHOWN_MAX_CHARS: usize = 60;

/// One key as etcd holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kv {
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub create_revision: i64,
    pub mod_revision: i64,
    pub lease: i64,
}

impl From<&etcd_client::KeyValue> for Kv {
    fn from(kv: &etcd_client::KeyValue) -> Self {
        Self {
            key: kv.key().to_vec(),
            value: kv.value().to_vec(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            lease: kv.lease(),
        }
    }
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Put(Kv),
    Delete { key: Vec<u8>, mod_revision: i64 },
}

impl Change {
    pub(super) fn revision(&self) -> i64 {
        match self {
            Change::Put(kv) => kv.mod_revision,
            Change::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}

/// The view that a listing of all keys at `revision` makes.
pub(super) fn view_of(keys: &Keys, cluster: Option<EtcdClusterId>, revision: Revision, kvs: impl IntoIterator<Item = Kv>) -> ClusterView {
    let mut view = ClusterView { etcd_cluster: cluster, revision, ..ClusterView::default() };
    for kv in kvs {
        put(&mut view, keys, &kv);
    }
    view
}

/// Applies what a watch delivered. Changes that the view already contains, because a listing was newer, are passed over.
pub(super) fn apply(view: &mut ClusterView, keys: &Keys, changes: &[Change]) {
    let listed = view.revision.0;
    for change in changes.iter().filter(|change| change.revision() > listed) {
        match change {
            Change::Put(kv) => put(view, keys, kv),
            Change::Delete { key, .. } => {
                if let Some(key) = keys.parse(key) {
                    delete(view, &key);
                }
            }
        }
        view.revision = view.revision.max(Revision(change.revision()));
    }
}

fn put(view: &mut ClusterView, keys: &Keys, kv: &Kv) {
    let Some(key) = keys.parse(&kv.key) else { return };
    delete(view, &key);
    if let Err(why) = store(view, &key, kv) {
        view.unreadable.insert(relative(&key), why);
    }
}

fn store(view: &mut ClusterView, key: &Key, kv: &Kv) -> Result<(), String> {
    match key {
        Key::Spec => {
            view.spec_revision = Revision(kv.mod_revision);
            view.spec = Some(json(kv)?);
        }
        Key::Leader => {
            view.leader = Some(LeaderKey {
                holder: text(kv),
                epoch: Epoch(kv.create_revision),
                lease: LeaseId(kv.lease),
                mod_revision: Revision(kv.mod_revision),
            });
        }
        Key::Member(name) => {
            let member = MemberKey { record: json(kv)?, lease: LeaseId(kv.lease), mod_revision: Revision(kv.mod_revision) };
            view.members.insert(name.clone(), member);
        }
        Key::Release => view.release = Some(json(kv)?),
        Key::Status => view.status = Some(json(kv)?),
        Key::Sync => {
            view.sync_revision = Revision(kv.mod_revision);
            view.sync = Some(json(kv)?);
        }
        Key::Failsafe => {
            view.failsafe_revision = Revision(kv.mod_revision);
            view.failsafe = Some(json(kv)?);
        }
        Key::Initialize => view.initialize = Some(initialize(kv)),
        Key::Maintenance => {
            let record = json(kv);
            view.maintenance_revision = Revision(kv.mod_revision);
            view.maintenance = Some(record.clone().unwrap_or_else(|_| raw_maintenance(kv)));
            record?;
        }
        Key::Suspended(name) => {
            view.suspended.insert(name.clone());
        }
        Key::History => {
            view.history_revision = Revision(kv.mod_revision);
            view.history = json(kv)?;
        }
        Key::Request(id) => {
            let request = RequestKey { record: json(kv)?, mod_revision: Revision(kv.mod_revision) };
            view.requests.insert(id.clone(), request);
        }
        Key::SpecHistory(_) | Key::Event(_) | Key::Other(_) => {}
    }
    Ok(())
}

fn delete(view: &mut ClusterView, key: &Key) {
    view.unreadable.remove(&relative(key));
    match key {
        Key::Spec => {
            view.spec = None;
            view.spec_revision = Revision(0);
        }
        Key::Leader => view.leader = None,
        Key::Member(name) => {
            view.members.remove(name);
        }
        Key::Release => view.release = None,
        Key::Status => view.status = None,
        Key::Sync => {
            view.sync = None;
            view.sync_revision = Revision(0);
        }
        Key::Failsafe => {
            view.failsafe = None;
            view.failsafe_revision = Revision(0);
        }
        Key::Initialize => view.initialize = None,
        Key::Maintenance => {
            view.maintenance = None;
            view.maintenance_revision = Revision(0);
        }
        Key::Suspended(name) => {
            view.suspended.remove(name);
        }
        Key::History => {
            view.history.clear();
            view.history_revision = Revision(0);
        }
        Key::Request(id) => {
            view.requests.remove(id);
        }
        Key::SpecHistory(_) | Key::Event(_) | Key::Other(_) => {}
    }
}

/// A claim hangs on a lease; what stands without one is the system identifier for good.
pub(super) fn initialize(kv: &Kv) -> Initialize {
    let found = text(kv);
    if kv.lease != 0 {
        return Initialize::Claimed { by: found, lease: LeaseId(kv.lease) };
    }
    found.parse().map_or_else(|_| Initialize::Unreadable(shorten(&found)), Initialize::Done)
}

fn raw_maintenance(kv: &Kv) -> MaintenanceRecord {
    MaintenanceRecord { by: "unknown".into(), why: shorten(&text(kv)), at: String::new(), until: None, phase: Phase::On }
}

pub(super) fn json<T: DeserializeOwned>(kv: &Kv) -> Result<T, String> {
    serde_json::from_slice(&kv.value).map_err(|e| e.to_string())
}

pub(super) fn text(kv: &Kv) -> String {
    String::from_utf8_lossy(&kv.value).into_owned()
}

pub(super) fn shorten(text: &str) -> String {
    text.chars().take(SHOWN_MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SystemId;

    fn keys() -> Keys {
        Keys::new("/pgherd", &"main".parse().unwrap())
    }

    fn kv(key: &str, value: &str, revision: i64, lease: i64) -> Kv {
        Kv {
            key: format!("/pgherd/main/{key}").into_bytes(),
            value: value.as_bytes().to_vec(),
            create_revision: revision,
            mod_revision: revision,
            lease,
        }
    }

    fn deleted(key: &str, revision: i64) -> Change {
        Change::Delete { key: format!("/pgherd/main/{key}").into_bytes(), mod_revision: revision }
    }

    fn view(kvs: Vec<Kv>) -> ClusterView {
        view_of(&keys(), Some(EtcdClusterId(1)), Revision(10), kvs)
    }

    #[test]
    fn a_leader_with_a_name_that_no_member_can_have_is_still_a_leader() {
        let view = view(vec![kv("leader", "Not A Member", 5, 77)]);
        assert_eq!(
            view.leader,
            Some(LeaderKey { holder: "Not A Member".into(), epoch: Epoch(5), lease: LeaseId(77), mod_revision: Revision(5) })
        );
    }

    #[test]
    fn a_deleted_leader_is_absent_at_the_revision_of_its_deletion() {
        let mut view = view(vec![kv("leader", "a", 5, 77)]);
        apply(&mut view, &keys(), &[deleted("leader", 11)]);
        assert_eq!((view.leader, view.revision), (None, Revision(11)));
    }

    #[test]
    fn a_change_that_the_listing_already_contains_is_passed_over() {
        let mut view = view(vec![kv("leader", "b", 9, 78)]);
        apply(&mut view, &keys(), &[deleted("leader", 8)]);
        assert_eq!(view.leader.map(|leader| leader.epoch), Some(Epoch(9)));
    }

    #[test]
    fn all_changes_of_one_revision_are_applied() {
        let mut view =
            view(vec![kv("leader", "a", 5, 77), kv("release", "{\"epoch\":1,\"timeline\":1,\"lsn\":\"0/0\",\"to\":null}", 4, 0)]);
        apply(
            &mut view,
            &keys(),
            &[
                deleted("leader", 11),
                deleted("release", 11),
                Change::Put(kv("maintenance", "{\"by\":\"x\",\"why\":\"y\",\"until\":null}", 11, 0)),
            ],
        );
        assert_eq!((view.leader, view.release, view.maintenance.is_some()), (None, None, true));
    }

    #[test]
    fn an_unreadable_record_is_absent_named_and_forgotten_when_it_is_mended() {
        let mut view = view(vec![kv("members/a", "{}", 5, 1), kv("history", "nonsense", 6, 0)]);
        assert!(view.members.is_empty() && view.history.is_empty());
        assert_eq!(view.unreadable.keys().map(String::as_str).collect::<Vec<_>>(), ["history", "members/a"]);
        assert_eq!(view.history_revision, Revision(6), "it is there, and its revision still names the vacancy");
        apply(&mut view, &keys(), &[Change::Put(kv("history", "[]", 11, 0)), deleted("members/a", 12)]);
        assert!(view.unreadable.is_empty());
    }

    #[test]
    fn a_failsafe_key_that_cannot_be_read_is_there_all_the_same_and_named() {
        let mut view = view(vec![kv("failsafe", "{\"ttl_s\":10,\"members\":{\"a\":\"http://a:8008\"}}", 5, 0)]);
        assert_eq!(view.failsafe.as_ref().map(|record| (record.ttl_s, record.members.len())), Some((10, 1)));
        apply(&mut view, &keys(), &[Change::Put(kv("failsafe", "by hand", 11, 0))]);
        assert_eq!((view.failsafe.is_none(), view.failsafe_revision), (true, Revision(11)));
        assert!(view.unreadable.contains_key("failsafe"));
        apply(&mut view, &keys(), &[deleted("failsafe", 12)]);
        assert_eq!((view.failsafe_revision, view.unreadable.len()), (Revision(0), 0));
    }

    #[test]
    fn a_record_that_turns_unreadable_does_not_keep_its_old_value() {
        let mut view = view(vec![kv("status", "{\"epoch\":1,\"timeline\":1,\"lsn\":\"0/1\"}", 5, 0)]);
        assert!(view.status.is_some());
        apply(&mut view, &keys(), &[Change::Put(kv("status", "?", 11, 0))]);
        assert_eq!(view.status, None);
    }

    #[test]
    fn a_maintenance_key_that_cannot_be_read_is_maintenance_all_the_same() {
        let view = view(vec![kv("maintenance", "by hand", 5, 0)]);
        assert_eq!(view.maintenance.map(|m| (m.why, m.phase)), Some(("by hand".into(), Phase::On)));
        assert!(view.unreadable.contains_key("maintenance"));
    }

    #[test]
    fn a_member_whose_guard_may_have_suspended_stands_beside_the_maintenance_key_and_goes_by_itself() {
        let mut view = view(vec![
            kv("maintenance", "{\"by\":\"x\",\"why\":\"y\",\"until\":null,\"phase\":\"ending\"}", 5, 0),
            kv("maintenance/a", "5", 6, 0),
        ]);
        assert_eq!(view.maintenance.as_ref().map(|m| m.phase), Some(Phase::Ending));
        assert_eq!((view.maintenance_revision, view.suspended.len()), (Revision(5), 1));
        apply(&mut view, &keys(), &[deleted("maintenance/a", 11), deleted("maintenance", 12)]);
        assert_eq!((view.maintenance.is_none(), view.maintenance_revision, view.suspended.len()), (true, Revision(0), 0));
    }

    #[test]
    fn initialize_is_a_claim_on_a_lease_and_an_identifier_without_one() {
        assert_eq!(initialize(&kv("initialize", "a", 1, 5)), Initialize::Claimed { by: "a".into(), lease: LeaseId(5) });
        assert_eq!(initialize(&kv("initialize", "42", 1, 0)), Initialize::Done(SystemId(42)));
        assert_eq!(initialize(&kv("initialize", "a", 1, 0)), Initialize::Unreadable("a".into()));
    }

    #[test]
    fn keys_of_other_clusters_and_unknown_keys_change_nothing() {
        let view = view(vec![kv("somebody/else", "x", 5, 0), kv("events/1", "x", 5, 0)]);
        assert_eq!(view, view_of(&keys(), Some(EtcdClusterId(1)), Revision(10), []));
    }
}
