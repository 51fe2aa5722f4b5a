//! The lock: taken once, on what was judged, read back when the answer is lost; every write under it fenced by its epoch.

use std::time::Duration;

use etcd_client::PutOptions;
use pgherd::etcd::{Acquisition, Beaten, Etcd, EtcdError, Fenced, Moved, PutMember, Released, Settings};
use pgherd::facts::cluster::{Initialize, ReleaseRecord};
use pgherd::types::{LockIdentity, Lsn, Revision, SystemId, TimelineId};

use crate::status;
use crate::support::etcd_server::{EtcdServer, settings};
use crate::support::lossy::{Afterwards, hold_back, lose_answer_to};
use crate::support::{NEVER, lease_of_a_minute, name, record, request, take_lock};

against_both! { 1, &[];
    i4_a_leader_write_under_a_stale_epoch_changes_nothing,
    the_lock_is_taken_once_and_only_on_what_was_judged,
    i9_the_lock_is_not_taken_over_a_history_that_cannot_be_read,
    an_acquisition_whose_answer_is_lost_is_read_back,
    an_acquisition_that_cannot_be_read_back_is_unknown_and_not_tried_again,
    a_release_says_how_and_is_the_same_said_twice,
    a_release_on_the_key_as_it_was_seen_goes_without_reading_it_again_and_is_never_mistaken,
    i1_a_release_that_comes_late_deletes_nothing_once_the_locks_key_was_written_again,
    i11_initialize_is_claimed_once_and_becomes_the_identity_with_the_first_lock,
    a_member_key_of_another_run_is_not_overwritten,
    a_record_on_a_lease_that_is_gone_is_told_apart,
    keys_move_to_another_lease_under_the_same_epoch,
}

async fn i4_a_leader_write_under_a_stale_epoch_changes_nothing(server: EtcdServer) {
    let etcd = server.etcd();
    let first = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    assert_eq!(etcd.write_status(first.epoch, &status(first.epoch)).await.unwrap(), Fenced::Written);
    assert_eq!(etcd.release(first.epoch, None, None).await.unwrap(), Released::Released);
    let second = take_lock(&etcd, "b", lease_of_a_minute(&server).await).await;
    assert!(second.epoch > first.epoch);

    let before = etcd.read_view().await.unwrap();
    assert_eq!(etcd.write_status(first.epoch, &status(first.epoch)).await.unwrap(), Fenced::NotOurs);
    assert_eq!(etcd.record_promotion(first.epoch, &[]).await.unwrap(), Fenced::NotOurs);
    assert_eq!(etcd.release(first.epoch, None, None).await.unwrap(), Released::NotOurs);
    assert_eq!(etcd.read_view().await.unwrap(), before, "not even the revision moved");
    assert_eq!(etcd.record_promotion(second.epoch, &before.history).await.unwrap(), Fenced::Written);
}

async fn the_lock_is_taken_once_and_only_on_what_was_judged(server: EtcdServer) {
    let etcd = server.etcd();
    let (ours, theirs) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    let beaten = |acquisition| match acquisition {
        Acquisition::Beaten(why) => why,
        other => panic!("{other:?}"),
    };
    let good = request(&etcd, "a", ours).await;
    assert_eq!(beaten(etcd.acquire(&good).await.unwrap()), Beaten::MemberKeyNotOurs);
    etcd.put_member(&name("a"), &record(1), theirs).await.unwrap();
    assert_eq!(beaten(etcd.acquire(&good).await.unwrap()), Beaten::MemberKeyNotOurs);
    etcd.revoke(theirs).await.unwrap();
    etcd.put_member(&name("a"), &record(1), ours).await.unwrap();
    let mut wrong = good.clone();
    wrong.vacancy = NEVER;
    assert_eq!(beaten(etcd.acquire(&wrong).await.unwrap()), Beaten::HistoryMoved);
    wrong = good.clone();
    wrong.sync_revision = NEVER;
    assert_eq!(beaten(etcd.acquire(&wrong).await.unwrap()), Beaten::SyncMoved);
    server.stranger().await.put("/pgherd/main/spec", "applied meanwhile", None).await.unwrap();
    assert_eq!(beaten(etcd.acquire(&good).await.unwrap()), Beaten::SpecMoved);
    let good = request(&etcd, "a", ours).await;

    let Acquisition::Acquired(lock) = etcd.acquire(&good).await.unwrap() else { panic!("everything holds") };
    let view = etcd.read_view().await.unwrap();
    let leader = view.leader.clone().unwrap();
    assert_eq!((leader.holder.as_str(), leader.epoch, leader.lease), ("a", lock.epoch, ours));
    assert_eq!(view.history, good.history, "the timeline is reserved in the same transaction");
    assert_eq!(view.history_revision.0, lock.epoch.0);
    assert_eq!(view.etcd_cluster, Some(lock.lease.cluster));
    assert_eq!(etcd.acquire(&good).await.unwrap(), Acquisition::Acquired(lock), "asked again, it is read back");

    let other = lease_of_a_minute(&server).await;
    etcd.put_member(&name("b"), &record(1), other).await.unwrap();
    assert_eq!(beaten(etcd.acquire(&request(&etcd, "b", other).await).await.unwrap()), Beaten::Held { by: "a".into() });
}

async fn i9_the_lock_is_not_taken_over_a_history_that_cannot_be_read(server: EtcdServer) {
    let (etcd, lease) = (server.etcd(), lease_of_a_minute(&server).await);
    etcd.put_member(&name("a"), &record(1), lease).await.unwrap();
    server.stranger().await.put("/pgherd/main/history", "by hand", None).await.unwrap();
    let request = request(&etcd, "a", lease).await;
    assert!(request.vacancy > Revision(0), "it is there, and its revision names the vacancy");
    let refused = etcd.acquire(&request).await;
    assert!(matches!(refused, Err(EtcdError::Unreadable { .. })), "{refused:?}");
    assert_eq!(etcd.read_view().await.unwrap().leader, None);
}

async fn an_acquisition_whose_answer_is_lost_is_read_back(server: EtcdServer) {
    let (etcd, lease) = (server.etcd(), lease_of_a_minute(&server).await);
    etcd.put_member(&name("a"), &record(1), lease).await.unwrap();
    let mut request = request(&etcd, "a", lease).await;
    request.history[0].why = "lose my answer".into();

    let (url, seen) = lose_answer_to("lose my answer", server.port(0), Afterwards::Pass).await;
    let lossy = Etcd::new(settings(vec![url])).unwrap();
    let acquired = lossy.acquire(&request).await.unwrap();
    assert!(seen.load(std::sync::atomic::Ordering::SeqCst));
    let view = etcd.read_view().await.unwrap();
    let epoch = view.leader.unwrap().epoch;
    assert!(matches!(acquired, Acquisition::Acquired(lock) if lock.epoch == epoch && lock.lease.lease == lease), "{acquired:?}");
    assert_eq!(view.history_revision.0, epoch.0, "it was sent once");
}

async fn an_acquisition_that_cannot_be_read_back_is_unknown_and_not_tried_again(server: EtcdServer) {
    let (etcd, lease) = (server.etcd(), lease_of_a_minute(&server).await);
    etcd.put_member(&name("a"), &record(1), lease).await.unwrap();
    let mut request = request(&etcd, "a", lease).await;
    request.history[0].why = "lose my answer".into();

    let (url, _) = lose_answer_to("lose my answer", server.port(0), Afterwards::Cut).await;
    let acquired = Etcd::new(settings(vec![url])).unwrap().acquire(&request).await.unwrap();
    assert!(matches!(acquired, Acquisition::Unknown(_)), "{acquired:?}");
    assert!(etcd.read_view().await.unwrap().leader.is_some(), "and yet it was carried out");
}

async fn a_release_says_how_and_is_the_same_said_twice(server: EtcdServer) {
    let etcd = server.etcd();
    let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
    let left = ReleaseRecord { epoch: lock.epoch, timeline: TimelineId(2), lsn: Lsn(9), to: Some(name("b")), all_seen: true };
    assert_eq!(etcd.release(lock.epoch, None, Some(&left)).await.unwrap(), Released::Released);
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.leader, view.release), (None, Some(left.clone())));
    assert_eq!(etcd.release(lock.epoch, None, Some(&left)).await.unwrap(), Released::Released, "as after a lost answer");

    take_lock(&etcd, "b", lease_of_a_minute(&server).await).await;
    assert_eq!(etcd.read_view().await.unwrap().release, None, "whoever takes the lock takes the record away");
    assert_eq!(etcd.release(lock.epoch, None, Some(&left)).await.unwrap(), Released::NotOurs);
}

async fn a_release_on_the_key_as_it_was_seen_goes_without_reading_it_again_and_is_never_mistaken(server: EtcdServer) {
    let (etcd, lease) = (server.etcd(), lease_of_a_minute(&server).await);
    let left = |lock: LockIdentity| ReleaseRecord {
        epoch: lock.epoch,
        timeline: TimelineId(2),
        lsn: Lsn(9),
        to: Some(name("lose-my-answer")),
        all_seen: true,
    };
    let seen = async || etcd.read_view().await.unwrap().leader.map(|leader| leader.mod_revision);

    let lock = take_lock(&etcd, "a", lease).await;
    let (before, as_seen) = (etcd.read_view().await.unwrap().revision, seen().await);
    assert_eq!(etcd.release(lock.epoch, as_seen, Some(&left(lock))).await.unwrap(), Released::Released);
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.leader, view.release), (None, Some(left(lock))));
    assert_eq!(view.revision.0, before.0 + 1, "it is one write");
    assert_eq!(etcd.release(lock.epoch, as_seen, Some(&left(lock))).await.unwrap(), Released::Released, "as after a lost answer");

    let lock = take_lock(&etcd, "a", lease).await;
    let stale = seen().await;
    assert!(etcd.reaffirm(lock.epoch, &name("a")).await.unwrap().is_some());
    assert_eq!(etcd.release(lock.epoch, stale, Some(&left(lock))).await.unwrap(), Released::Released, "the key is read after all");

    let lock = take_lock(&etcd, "a", lease).await;
    let (url, lost) = lose_answer_to("lose-my-answer", server.port(0), Afterwards::Pass).await;
    let lossy = Etcd::new(settings(vec![url])).unwrap();
    assert_eq!(lossy.read_view().await.unwrap().leader.map(|leader| leader.epoch), Some(lock.epoch), "it has answered just now");
    assert_eq!(lossy.release(lock.epoch, seen().await, Some(&left(lock))).await.unwrap(), Released::Released);
    assert!(lost.load(std::sync::atomic::Ordering::SeqCst));

    let theirs = take_lock(&etcd, "b", lease_of_a_minute(&server).await).await;
    assert_eq!(etcd.release(lock.epoch, seen().await, Some(&left(lock))).await.unwrap(), Released::NotOurs);
    assert_eq!(etcd.read_view().await.unwrap().leader.map(|leader| leader.epoch), Some(theirs.epoch), "another's lock stays");
}

async fn i1_a_release_that_comes_late_deletes_nothing_once_the_locks_key_was_written_again(server: EtcdServer) {
    let etcd = server.etcd();
    for written_again in [false, true] {
        let lock = take_lock(&etcd, "a", lease_of_a_minute(&server).await).await;
        let (url, on_its_way) = hold_back("held-back", server.port(0)).await;
        let impatient = Settings { request_timeout: Duration::from_secs(1), ..settings(vec![url]) };
        let left = ReleaseRecord { epoch: lock.epoch, timeline: TimelineId(2), lsn: Lsn(9), to: Some(name("held-back")), all_seen: true };
        let released = Etcd::new(impatient).unwrap().release(lock.epoch, None, Some(&left)).await;
        assert!(matches!(released, Err(EtcdError::Unknown(_))), "{released:?}");
        if written_again {
            assert!(etcd.reaffirm(lock.epoch, &name("a")).await.unwrap().is_some());
        }
        let before = etcd.read_view().await.unwrap();
        on_its_way.let_through().await;
        let after = etcd.read_view().await.unwrap();
        if written_again {
            assert_eq!(after, before, "not even the revision moved");
            assert_eq!(after.leader.map(|leader| leader.epoch), Some(lock.epoch));
        } else {
            assert_eq!((after.leader, after.release), (None, Some(left)), "it was carried out after all");
            etcd.revoke(lock.lease.lease).await.unwrap();
        }
    }
}

async fn i11_initialize_is_claimed_once_and_becomes_the_identity_with_the_first_lock(server: EtcdServer) {
    let etcd = server.etcd();
    let (a, b) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    assert!(!etcd.claim_initialize(&name("a"), a).await.unwrap(), "without a member key");
    etcd.put_member(&name("a"), &record(1), a).await.unwrap();
    etcd.put_member(&name("b"), &record(1), b).await.unwrap();
    let (by_a, by_b) = (name("a"), name("b"));
    let (one, other) = tokio::join!(etcd.claim_initialize(&by_a, a), etcd.claim_initialize(&by_b, b));
    let (won, lost) = if one.unwrap() { (a, b) } else { (b, a) };
    assert_eq!(won == b, other.unwrap(), "exactly one");
    etcd.give_up_initialize(lost).await.unwrap();
    assert!(matches!(etcd.read_view().await.unwrap().initialize, Some(Initialize::Claimed { lease, .. }) if lease == won));
    etcd.give_up_initialize(won).await.unwrap();
    assert_eq!(etcd.read_view().await.unwrap().initialize, None);

    assert!(etcd.claim_initialize(&by_b, b).await.unwrap());
    assert!(etcd.claim_initialize(&by_b, b).await.unwrap(), "ours already");
    let mut first = request(&etcd, "a", a).await;
    first.initialize = Some(SystemId(42));
    assert!(matches!(etcd.acquire(&first).await.unwrap(), Acquisition::Beaten(Beaten::InitializeTaken(_))), "b is at it");
    let mut first = request(&etcd, "b", b).await;
    first.initialize = Some(SystemId(42));
    assert!(matches!(etcd.acquire(&first).await.unwrap(), Acquisition::Acquired(_)));
    etcd.revoke(b).await.unwrap();
    let view = etcd.read_view().await.unwrap();
    assert_eq!((view.leader, view.initialize), (None, Some(Initialize::Done(SystemId(42)))), "the identity outlives the lease");
    etcd.give_up_initialize(b).await.unwrap();
    assert!(!etcd.claim_initialize(&by_a, a).await.unwrap(), "for good");
}

async fn a_member_key_of_another_run_is_not_overwritten(server: EtcdServer) {
    let etcd = server.etcd();
    let (old, new) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    assert_eq!(etcd.put_member(&name("a"), &record(1), old).await.unwrap(), PutMember::Written);
    assert_eq!(etcd.put_member(&name("a"), &record(1), old).await.unwrap(), PutMember::Written);
    let foreign = etcd.put_member(&name("a"), &record(2), new).await.unwrap();
    assert!(
        matches!(&foreign, PutMember::Foreign { lease, incarnation: Some(run), .. } if *lease == old && run.started_ns == 1),
        "{foreign:?}"
    );
    server.stranger().await.put("/pgherd/main/members/b", "by hand", None).await.unwrap();
    assert!(matches!(etcd.put_member(&name("b"), &record(1), new).await.unwrap(), PutMember::Foreign { incarnation: None, .. }));
    etcd.revoke(old).await.unwrap();
    assert_eq!(etcd.put_member(&name("a"), &record(2), new).await.unwrap(), PutMember::Written);
}

async fn a_record_on_a_lease_that_is_gone_is_told_apart(server: EtcdServer) {
    let (etcd, lease) = (server.etcd(), lease_of_a_minute(&server).await);
    etcd.revoke(lease).await.unwrap();
    assert_eq!(etcd.put_member(&name("a"), &record(1), lease).await, Err(EtcdError::LeaseNotFound));
    assert_eq!(etcd.revoke(lease).await, Ok(()), "revoked twice is revoked");
}

async fn keys_move_to_another_lease_under_the_same_epoch(server: EtcdServer) {
    let etcd = server.etcd();
    let (old, new) = (lease_of_a_minute(&server).await, lease_of_a_minute(&server).await);
    let lock = take_lock(&etcd, "a", old).await;
    for _ in 0..2 {
        let moved = etcd.move_to_lease(&name("a"), &record(1), Some(lock.epoch), old, new).await.unwrap();
        assert_eq!(moved, Moved::Moved, "the second time as after a lost answer");
    }
    etcd.revoke(old).await.unwrap();
    let view = etcd.read_view().await.unwrap();
    assert_eq!(view.leader.map(|leader| (leader.epoch, leader.lease)), Some((lock.epoch, new)));
    assert_eq!(view.members[&name("a")].lease, new);

    let by_hand = Some(PutOptions::new());
    server.stranger().await.put("/pgherd/main/leader", "a", by_hand).await.unwrap();
    let again = lease_of_a_minute(&server).await;
    let moved = etcd.move_to_lease(&name("a"), &record(1), Some(lock.epoch), new, again).await.unwrap();
    assert_eq!(moved, Moved::NotOurs, "the lock does not hang on our lease any more");
    assert_eq!(etcd.read_view().await.unwrap().members[&name("a")].lease, new, "nothing was written");
}
