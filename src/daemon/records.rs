//! The etcd operations: each action becomes one call, and its end one event. Decides nothing.

use crate::clock;
use crate::etcd::{AcquireRequest, Acquisition, Beaten, Etcd, EtcdError, Fenced, PutMember, Released};
use crate::facts::cluster::{ClusterView, DecisionRecord, FailsafeRecord, HistoryEntry, MemberRecord, ReleaseRecord, StatusRecord};
use crate::facts::requests::RequestProgress;
use crate::facts::synchrony::SyncRecord;
use crate::machine::action::Decision;
use crate::machine::event::{AcquireOutcome, Event, Failure, Finished, ForeignKey, PutOutcome};
use crate::types::{Epoch, LeaseId, MemberName, Revision, SystemId};

fn failure(error: &EtcdError) -> Failure {
    error.to_string()
}

fn done(finished: Finished) -> Event {
    Event::Finished(finished)
}

fn fenced(result: Result<Fenced, EtcdError>) -> Result<bool, Failure> {
    result.map(|fenced| fenced == Fenced::Written).map_err(|error| failure(&error))
}

/// Writes the member key.
pub async fn put_member(etcd: Etcd, name: MemberName, record: MemberRecord, lease: LeaseId) -> Event {
    done(Finished::MemberPut(match etcd.put_member(&name, &record, lease).await {
        Ok(PutMember::Written) => PutOutcome::Written,
        Ok(PutMember::Foreign { lease, .. }) => foreign(&etcd, lease).await,
        Err(error) => PutOutcome::Failed(failure(&error)),
    }))
}

/// Another run's key: how long it can still be there when nobody renews it.
async fn foreign(etcd: &Etcd, lease: LeaseId) -> PutOutcome {
    match etcd.granted_ttl(lease).await {
        Ok(Some((ttl, term))) => PutOutcome::Foreign(ForeignKey { lease, ttl, term }),
        Ok(None) => PutOutcome::Failed("the key of another run went away meanwhile".to_owned()),
        Err(error) => PutOutcome::Failed(failure(&error)),
    }
}

/// Races for the lock.
pub async fn acquire(
    etcd: Etcd,
    member: MemberName,
    lease: LeaseId,
    judged_on: &ClusterView,
    mut history: Vec<HistoryEntry>,
    initialize: Option<SystemId>,
) -> Event {
    stamp(&mut history);
    let request = AcquireRequest::judged_on(judged_on, member, lease, history, initialize);
    done(Finished::Acquired(match etcd.acquire(&request).await {
        Ok(Acquisition::Acquired(lock)) => AcquireOutcome::Won(lock),
        Ok(Acquisition::Beaten(Beaten::SpecMoved)) => AcquireOutcome::SpecMoved,
        Ok(Acquisition::Beaten(_)) => AcquireOutcome::Beaten,
        Ok(Acquisition::Unknown(why)) => AcquireOutcome::Failed(why),
        Err(error) => AcquireOutcome::Failed(failure(&error)),
    }))
}

/// A new entry gets the time; one that is handed on to the next leadership keeps the time of its promotion.
fn stamp(history: &mut [HistoryEntry]) {
    if let Some(entry) = history.last_mut().filter(|entry| entry.at.is_empty()) {
        entry.at = clock::wall_clock();
    }
}

/// Lets the lock go.
pub async fn release(etcd: Etcd, epoch: Epoch, seen: Option<Revision>, record: Option<ReleaseRecord>) -> Event {
    let result = etcd.release(epoch, seen, record.as_ref()).await;
    done(Finished::Released(result.map(|released| released == Released::Released).map_err(|error| failure(&error))))
}

/// Writes `status`.
pub async fn write_status(etcd: Etcd, status: StatusRecord) -> Event {
    done(Finished::StatusWritten(fenced(etcd.write_status(status.epoch, &status).await)))
}

/// Writes the lock's key again.
pub async fn reaffirm(etcd: Etcd, member: MemberName, epoch: Epoch) -> Event {
    done(Finished::Reaffirmed(etcd.reaffirm(epoch, &member).await.map_err(|error| failure(&error))))
}

/// Writes `sync`, or deletes it.
pub async fn write_sync(etcd: Etcd, epoch: Epoch, lock: Revision, judged_on: Revision, record: Option<SyncRecord>) -> Event {
    let written = etcd.write_sync(epoch, lock, judged_on, record.as_ref()).await;
    done(Finished::SyncWritten(written.map_err(|error| failure(&error))))
}

/// Completes `history`.
pub async fn record_promotion(etcd: Etcd, epoch: Epoch, mut history: Vec<HistoryEntry>) -> Event {
    stamp(&mut history);
    done(Finished::PromotionRecorded(fenced(etcd.record_promotion(epoch, &history).await)))
}

/// Writes `failsafe`, or deletes it.
pub async fn write_failsafe(etcd: Etcd, epoch: Epoch, judged_on: Revision, record: Option<FailsafeRecord>) -> Event {
    let written = etcd.write_failsafe(epoch, judged_on, record.as_ref()).await;
    done(Finished::FailsafeWritten(written.map_err(|error| failure(&error))))
}

/// Says in etcd whether our guard may suspend the lock's deadlines.
pub async fn note_suspension(etcd: Etcd, name: MemberName, revision: Revision, suspends: bool) -> Event {
    done(Finished::SuspensionNoted(etcd.note_suspension(&name, revision, suspends).await.map_err(|error| failure(&error))))
}

/// Deletes `maintenance`.
pub async fn end_maintenance(etcd: Etcd, revision: Revision, leader: Revision) -> Event {
    done(Finished::MaintenanceEnded(etcd.end_maintenance(revision, leader).await.map_err(|error| failure(&error))))
}

/// Claims initialization.
pub async fn claim_initialize(etcd: Etcd, member: MemberName, lease: LeaseId) -> Event {
    done(Finished::InitializeClaimed(etcd.claim_initialize(&member, lease).await.map_err(|error| failure(&error))))
}

/// Gives the claim back.
pub async fn give_up_initialize(etcd: Etcd, lease: LeaseId) -> Event {
    done(Finished::InitializeGivenUp(etcd.give_up_initialize(lease).await.map_err(|error| failure(&error))))
}

/// Says how far a request got.
pub async fn answer_request(etcd: Etcd, id: String, mod_revision: Revision, progress: RequestProgress) -> Event {
    let answer = etcd.update_request(&id, mod_revision, progress).await;
    done(Finished::RequestAnswered(answer.map_err(|error| failure(&error))))
}

/// A decision as it goes into `events/`.
pub fn decision_record(member: &MemberName, decision: Decision) -> DecisionRecord {
    DecisionRecord {
        at: clock::wall_clock(),
        member: member.clone(),
        kind: decision.kind.to_owned(),
        message: decision.message,
        facts: decision.facts,
    }
}
