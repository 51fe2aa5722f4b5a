//! How the end of an operation changes what is known. Decides nothing: the rules do.
//!
//! What surprises: an operation that failed may have been carried out all the same. What it would have changed is unknown then, and not what
//! it was.

use crate::clock::BootTime;
use crate::facts::postgres::DataDirectory;
use crate::policy::rejoin::Rejoin;

use super::action::{OperationKind, Upstream};
use super::bookkeeping::MEMBER_KEY_FAILED;
use super::event::{AcquireOutcome, Configured, Failure, Finished, PutOutcome};
use super::world::{InForce, World};

/// The same write is not tried again for so long after an answer that a newer view has to follow.
pub(super) const ANSWERED_PAUSE_MS: u64 = 250;
/// A key of another run that is in the way is looked at again after so long.
const FOREIGN_AGAIN_MS: u64 = 1_000;
/// After a scan, a new guard is given so long to say what it sees.
const NEW_GUARD_MS: u64 = 1_000;

impl World {
    pub(super) fn absorb_finished(&mut self, now: BootTime, finished: Finished) {
        use OperationKind as Kind;
        match finished {
            Finished::Looked(data) => self.looked(now, data),
            Finished::KeptSeen(kept) => self.kept_was_seen(*kept),
            Finished::WritesLost(lost) => self.kept.untold.push(*lost),
            Finished::SegmentsCompleted(halves) => {
                if halves.iter().all(|half| half.obstacle.is_none()) {
                    self.clear("wal_incomplete");
                }
                self.receiving.half_segments = halves;
            }
            Finished::Started(result) => {
                if result.is_err() {
                    self.in_force = None;
                    self.data = DataDirectory::Unknown;
                }
                self.judge_start(now, result);
            }
            Finished::StartedOnOldFiles { generation, start, why } => {
                self.in_force = self.in_force.take().map(|files| InForce { generation: 0, ..files });
                self.refused_generation = Some(generation);
                self.fail(
                    "configuration_refused",
                    format!("PostgreSQL runs on the files that served before generation {generation}: {why}"),
                );
                self.judge_start(now, Ok(start));
            }
            Finished::Configured { generation, upstream, result } => self.absorb_configured(now, generation, upstream, result),
            Finished::Initialized(result) => self.judge(now, Kind::Initdb, result, "initdb_failed"),
            Finished::GotOn(bytes) => {
                if let Some(copying) = &mut self.receiving.copying {
                    copying.got_on(now, bytes);
                }
            }
            Finished::Emptied(result) => {
                self.data = DataDirectory::Unknown;
                self.judge(now, Kind::EmptyDirectory, result, "clone_failed");
            }
            Finished::Cloned(result) => {
                self.rejoin = None;
                self.receiving.copying = None;
                self.data = DataDirectory::Unknown;
                if result.is_ok() {
                    self.forget_ends();
                    self.requests.copy_is_there(now);
                }
                self.judge(now, Kind::Clone, result, "clone_failed");
            }
            Finished::Rewound(result) => {
                self.rejoin = None;
                self.receiving.copying = None;
                self.data = DataDirectory::Unknown;
                if result.is_ok() {
                    self.forget_ends();
                }
                self.judge(now, Kind::Rewind, result, "rewind_failed");
            }
            Finished::RejoinPlanned(result) => {
                // Judged against one leader it says nothing about another.
                let present = self.present_epoch().filter(|epoch| Some(*epoch) == self.planned_for);
                if matches!(result, Ok(Rejoin::Follow)) {
                    self.judged = present.map(|epoch| (epoch, now));
                }
                // What could not be judged may not be there any more.
                if result.is_err() {
                    self.data = DataDirectory::Unknown;
                }
                self.rejoin = result.as_ref().ok().filter(|_| present.is_some()).cloned();
                self.judge(now, Kind::PlanRejoin, result, "rejoin_unclear");
            }
            Finished::LeftArchived(result) => self.left_was_archived(now, result),
            Finished::BesideArchived(result) => self.beside_was_archived(now, result),
            Finished::PromotionAsked(result) => self.judge(now, Kind::Promote, result, "promotion_failed"),
            Finished::RolesEnsured(result) => {
                if result.is_ok() {
                    self.roles_for = self.running().map(|(start, _)| start);
                }
                self.judge(now, Kind::EnsureRoles, result, "roles_failed");
            }
            Finished::Checkpointed(result) => {
                self.checkpointed = result.is_ok().then_some(now);
                self.judge(now, Kind::Checkpoint, result, "checkpoint_failed");
            }
            Finished::MemberPut(outcome) => self.absorb_put(now, outcome),
            Finished::Acquired(outcome) => {
                self.ended(now, Kind::Acquire, !matches!(outcome, AcquireOutcome::Failed(_)));
                self.clear("acquire_failed");
                match outcome {
                    AcquireOutcome::Won(identity) => self.won(identity),
                    AcquireOutcome::Beaten | AcquireOutcome::SpecMoved => {
                        self.reserved = None;
                        self.pause(now, Kind::Acquire, ANSWERED_PAUSE_MS);
                    }
                    // Unknown: it may have been applied; a lock that turns out to be ours names its timeline in `history`.
                    AcquireOutcome::Failed(why) => {
                        self.reserved = None;
                        self.warn("acquire_failed", why);
                    }
                }
            }
            Finished::Released(result) => {
                let epoch = self.asked.releasing.take();
                if result.is_ok() {
                    self.released = epoch;
                } else {
                    // The lease's thread let go of it first: it has to be told to hold again what is still ours.
                    self.holding = None;
                    // The deletion may have been carried out: no promise is relied on before etcd has proved the lock again.
                    self.failsafe.proof = None;
                }
                self.judge(now, Kind::Release, result, "release_failed");
            }
            Finished::Reaffirmed(result) => self.reaffirmed(now, result),
            Finished::Opened(result) => self.was_opened(now, result),
            Finished::SlotsKept(result) => {
                // Also after a failure: it is not known which of them were changed.
                self.slots.changed_at = now;
                self.judge(now, Kind::KeepSlots, result, "slots_failed");
            }
            Finished::NamesSet(result) => self.names_were_set(now, result),
            Finished::SyncWritten(result) => self.sync_was_written(now, &result),
            Finished::StatusWritten(result) => {
                if result.is_err() {
                    self.status_written = None;
                }
                self.ended(now, Kind::WriteStatus, result.is_ok());
            }
            Finished::PromotionRecorded(result) => {
                // A late answer is of the leadership that it was asked for.
                if matches!(result, Ok(true)) {
                    self.recorded = self.asked.recording;
                }
                self.ended(now, Kind::RecordPromotion, matches!(result, Ok(true)));
            }
            Finished::FailsafeWritten(result) => {
                let written = result.as_ref().ok().copied().flatten();
                self.failsafe.written = written;
                self.ended(now, Kind::WriteFailsafe, result.is_ok());
                if written.is_none() {
                    self.pause(now, Kind::WriteFailsafe, ANSWERED_PAUSE_MS);
                }
            }
            Finished::SuspensionNoted(result) => self.suspension_noted(now, result),
            Finished::MaintenanceEnded(result) => {
                self.ended(now, Kind::EndMaintenance, result.is_ok());
                self.pause(now, Kind::EndMaintenance, ANSWERED_PAUSE_MS);
            }
            Finished::InitializeClaimed(result) => {
                self.ended(now, Kind::ClaimInitialize, matches!(result, Ok(true)));
                self.pause(now, Kind::ClaimInitialize, ANSWERED_PAUSE_MS);
            }
            Finished::InitializeGivenUp(result) => {
                self.ended(now, Kind::GiveUpInitialize, result.is_ok());
                self.pause(now, Kind::GiveUpInitialize, ANSWERED_PAUSE_MS);
            }
            Finished::RequestAnswered(result) => {
                self.ended(now, Kind::AnswerRequest, result.is_ok());
                self.pause(now, Kind::AnswerRequest, ANSWERED_PAUSE_MS);
            }
            Finished::Surveyed(result) => {
                self.ended(now, Kind::Survey, result.is_ok());
                self.requests.survey = result.ok().map(|survey| (self.requests.survey_asked, survey));
            }
            Finished::PeersAsked(answer) => {
                self.ended(now, Kind::AskPeers, true);
                self.peers = Some(answer);
            }
            Finished::LeaderReached(result) => {
                self.ended(now, Kind::ReachLeader, result.is_ok());
                self.receiving.reached = Some((now, result));
            }
            Finished::FencedByScan(result) => {
                self.guard_gone = self.guard_gone && result.is_err();
                self.scanned_empty = result.is_ok() && self.guard.is_none();
                self.judge(now, Kind::FenceByScan, result, "fence_failed");
                self.pause(now, Kind::FenceByScan, NEW_GUARD_MS);
            }
        }
    }

    fn absorb_configured(&mut self, now: BootTime, generation: u64, upstream: Option<Upstream>, result: Result<Configured, Failure>) {
        self.ended(now, OperationKind::Configure, result.is_ok());
        self.configured_at = now;
        self.requests.files_were_written(&self.me.name, &result);
        match result {
            Ok(Configured::Taken) => {
                self.in_force = Some(InForce { generation, upstream });
                self.refused_generation = None;
                self.clear("configuration_refused");
                self.clear("configuration_failed");
            }
            Ok(Configured::PutBack(why)) => {
                // Whom to follow is in a file of its own, which stays.
                let before = self.in_force.as_ref().map_or(0, |files| files.generation);
                self.in_force = Some(InForce { generation: before, upstream });
                self.refused_generation = Some(generation);
                self.fail(
                    "configuration_refused",
                    format!("PostgreSQL did not take the configuration of generation {generation}, the one before is back: {why}"),
                );
            }
            Err(why) => {
                // Whom to follow may have been written, or not.
                self.in_force = None;
                self.warn("configuration_failed", why);
            }
        }
    }

    fn absorb_put(&mut self, now: BootTime, outcome: PutOutcome) {
        let record = self.writing.take();
        self.clear(MEMBER_KEY_FAILED);
        match outcome {
            PutOutcome::Written => {
                self.foreign = None;
                self.clear("name_taken");
                // On a lease that is gone it is gone too.
                let lasts = self.lease.is_some() && self.lease == self.writing_on;
                self.written = record.filter(|_| lasts).map(|record| (record, now));
                self.ended(now, OperationKind::PutMember, true);
            }
            PutOutcome::Foreign(key) => {
                self.written = None;
                // Counted from its lease's beginning: another lease, or etcd's next leader, is another beginning.
                let since = self.foreign.filter(|(_, known)| *known == key).map_or(now, |(since, _)| since);
                self.warn(
                    "name_taken",
                    format!("the member key of `{}` belongs to another run of the daemon; waiting for it to expire", self.me.name),
                );
                self.foreign = Some((since, key));
                self.foreign_seen = now;
                self.ended(now, OperationKind::PutMember, true);
                self.pause(now, OperationKind::PutMember, FOREIGN_AGAIN_MS);
            }
            PutOutcome::Failed(why) => {
                // Unknown whether it was written: the next one decides.
                self.written = None;
                self.warn(MEMBER_KEY_FAILED, why);
                self.ended(now, OperationKind::PutMember, false);
            }
        }
    }
}
