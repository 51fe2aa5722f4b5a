//! `sync`: written over what was judged on, and never late.

use std::collections::BTreeSet;

use pgherd::facts::synchrony::SyncRecord;
use pgherd::types::{Epoch, MemberName, Revision};

use crate::support::etcd_server::EtcdServer;
use crate::support::{NEVER, lease_of_a_minute, name, take_lock};

against_both! { 1, &[];
    i6_a_record_is_written_over_what_was_judged_on_and_over_nothing_else,
    a_write_that_was_judged_before_the_locks_key_was_written_again_changes_nothing,
    what_is_written_is_in_the_view_and_a_deleted_record_is_absent,
}

fn record(epoch: Epoch, copies: u32) -> SyncRecord {
    let members: BTreeSet<MemberName> = ["a", "b"].map(name).into();
    SyncRecord { leader: name("a"), epoch, members, copies }
}

async fn i6_a_record_is_written_over_what_was_judged_on_and_over_nothing_else(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let key = etcd.read_view().await.unwrap().leader.unwrap();
    let one = record(lock.epoch, 1);
    assert!(!etcd.write_sync(lock.epoch, key.mod_revision, NEVER, Some(&one)).await.unwrap().0, "another record was judged on");
    assert!(!etcd.write_sync(Epoch(lock.epoch.0 + 1), key.mod_revision, Revision(0), Some(&one)).await.unwrap().0, "another leadership");
    let (written, at) = etcd.write_sync(lock.epoch, key.mod_revision, Revision(0), Some(&one)).await.unwrap();
    assert!(written);
    let (again, seen) = etcd.write_sync(lock.epoch, key.mod_revision, Revision(0), Some(&record(lock.epoch, 2))).await.unwrap();
    assert!(!again && seen >= at, "as of a revision that shows what is there");
    assert_eq!(etcd.read_view().await.unwrap().sync, Some(one));
}

async fn a_write_that_was_judged_before_the_locks_key_was_written_again_changes_nothing(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let before = etcd.read_view().await.unwrap().leader.unwrap();
    let at = etcd.reaffirm(lock.epoch, &name("a")).await.unwrap().unwrap();
    assert!(!etcd.write_sync(lock.epoch, before.mod_revision, Revision(0), Some(&record(lock.epoch, 2))).await.unwrap().0);
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.sync, view.leader.as_ref().map(|key| key.mod_revision)), (None, Some(at)));
    assert!(etcd.write_sync(lock.epoch, at, Revision(0), Some(&record(lock.epoch, 2))).await.unwrap().0);
    assert_eq!(etcd.reaffirm(Epoch(1), &name("a")).await.unwrap(), None, "not ours");
}

async fn what_is_written_is_in_the_view_and_a_deleted_record_is_absent(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let key = etcd.read_view().await.unwrap().leader.unwrap();
    let (_, at) = etcd.write_sync(lock.epoch, key.mod_revision, Revision(0), Some(&record(lock.epoch, 2))).await.unwrap();
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.sync, view.sync_revision), (Some(record(lock.epoch, 2)), at));
    assert!(etcd.write_sync(lock.epoch, key.mod_revision, at, None).await.unwrap().0);
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.sync, view.sync_revision), (None, Revision(0)));
}
