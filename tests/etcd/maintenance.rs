//! Maintenance mode at etcd's edge: every transaction of it compares what it was judged on, and no election goes beside it.

use pgherd::etcd::{Acquisition, Beaten, EtcdError, Released};
use pgherd::facts::maintenance::{MaintenanceRecord, Phase};
use pgherd::types::Revision;

use crate::support::etcd_server::EtcdServer;
use crate::support::{lease_of_a_minute, name, record, request, take_lock};

against_both! { 1, &[];
    i1_no_lock_is_taken_or_given_back_beside_the_key,
    i1_in_maintenance_mode_the_lock_is_taken_on_the_key_as_it_was_judged_on,
    i2_a_guard_is_noted_to_suspend_only_while_the_key_is_as_it_was_seen,
    it_is_set_and_ended_over_what_was_read_and_the_lock_as_it_was_read,
    who_insists_deletes_the_key_with_all_notes,
}

const ABSENT: Revision = Revision(0);

fn mode(phase: Phase) -> MaintenanceRecord {
    MaintenanceRecord { by: "dba".into(), why: "a test".into(), at: "2026-01-01T00:00:00Z".into(), until: None, phase }
}

async fn i1_no_lock_is_taken_or_given_back_beside_the_key(server: EtcdServer) {
    let etcd = server.etcd();
    let (ours, theirs) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    etcd.put_member(&name("b"), &record(1), theirs).await.unwrap();
    let judged_before = request(&etcd, "b", theirs).await;
    assert!(etcd.set_maintenance(&mode(Phase::On), ABSENT, ABSENT).await.unwrap());
    assert_eq!(etcd.acquire(&judged_before).await.unwrap(), Acquisition::Beaten(Beaten::Maintenance));
    let revision = etcd.read_view().await.unwrap().maintenance_revision;
    assert!(etcd.end_maintenance(revision, ABSENT).await.unwrap());

    let lock = take_lock(&etcd, "a", ours).await;
    assert!(etcd.set_maintenance(&mode(Phase::On), ABSENT, Revision(lock.epoch.0)).await.unwrap());
    assert!(matches!(etcd.release(lock.epoch, None, None).await, Err(EtcdError::Unknown(why)) if why.contains("maintenance mode")));
    let view = etcd.read_view().await.unwrap();
    assert_eq!(view.leader.map(|leader| leader.epoch), Some(lock.epoch), "nobody could take it");
    assert!(etcd.end_maintenance(view.maintenance_revision, Revision(lock.epoch.0)).await.unwrap());
    assert_eq!(etcd.release(lock.epoch, None, None).await.unwrap(), Released::Released);
}

async fn i1_in_maintenance_mode_the_lock_is_taken_on_the_key_as_it_was_judged_on(server: EtcdServer) {
    let etcd = server.etcd();
    let lease = lease_of_a_minute(&server).await;
    etcd.put_member(&name("a"), &record(1), lease).await.unwrap();
    etcd.set_maintenance(&mode(Phase::On), ABSENT, ABSENT).await.unwrap();
    let judged = request(&etcd, "a", lease).await;
    let before = etcd.read_view().await.unwrap().maintenance_revision;
    assert!(etcd.set_maintenance(&mode(Phase::Ending), before, ABSENT).await.unwrap());
    assert_eq!(etcd.acquire(&judged).await.unwrap(), Acquisition::Beaten(Beaten::Maintenance), "it ends by now");
    let judged = request(&etcd, "a", lease).await;
    assert!(matches!(etcd.acquire(&judged).await.unwrap(), Acquisition::Acquired(_)));
}

async fn i2_a_guard_is_noted_to_suspend_only_while_the_key_is_as_it_was_seen(server: EtcdServer) {
    let etcd = server.etcd();
    assert!(!etcd.note_suspension(&name("a"), Revision(7), true).await.unwrap(), "there is no key");
    etcd.set_maintenance(&mode(Phase::On), ABSENT, ABSENT).await.unwrap();
    let on = etcd.read_view().await.unwrap().maintenance_revision;
    assert!(etcd.note_suspension(&name("a"), on, true).await.unwrap());
    assert!(etcd.read_view().await.unwrap().suspended.contains(&name("a")));
    etcd.set_maintenance(&mode(Phase::Ending), on, ABSENT).await.unwrap();
    assert!(!etcd.note_suspension(&name("b"), on, true).await.unwrap(), "a note that comes late");
    let ending = etcd.read_view().await.unwrap().maintenance_revision;
    assert!(etcd.note_suspension(&name("a"), ending, false).await.unwrap());
    assert!(etcd.read_view().await.unwrap().suspended.is_empty());
}

async fn it_is_set_and_ended_over_what_was_read_and_the_lock_as_it_was_read(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let as_read = Revision(lock.epoch.0);
    assert!(!etcd.set_maintenance(&mode(Phase::On), ABSENT, ABSENT).await.unwrap(), "somebody leads");
    assert!(etcd.set_maintenance(&mode(Phase::On), ABSENT, as_read).await.unwrap());
    assert!(!etcd.set_maintenance(&mode(Phase::On), ABSENT, as_read).await.unwrap(), "of two that set it one is told");
    let view = etcd.read_view().await.unwrap();
    assert_eq!(view.maintenance, Some(mode(Phase::On)));
    assert!(!etcd.end_maintenance(Revision(view.maintenance_revision.0 - 1), as_read).await.unwrap());
    assert!(!etcd.end_maintenance(view.maintenance_revision, ABSENT).await.unwrap(), "judged on an absent lock");
    assert!(etcd.end_maintenance(view.maintenance_revision, as_read).await.unwrap());
    assert_eq!(etcd.read_view().await.unwrap().maintenance, None);
}

async fn who_insists_deletes_the_key_with_all_notes(server: EtcdServer) {
    let etcd = server.etcd();
    etcd.set_maintenance(&mode(Phase::On), ABSENT, ABSENT).await.unwrap();
    let on = etcd.read_view().await.unwrap().maintenance_revision;
    etcd.note_suspension(&name("a"), on, true).await.unwrap();
    assert!(!etcd.insist_on_the_end_of_maintenance(Revision(on.0 - 1)).await.unwrap());
    assert!(etcd.insist_on_the_end_of_maintenance(on).await.unwrap());
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.maintenance, view.maintenance_revision, view.suspended.len()), (None, ABSENT, 0));
}
