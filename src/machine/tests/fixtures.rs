//! Facts to build worlds from: one value each that is plausible, so that a test changes the one thing it is about.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{
    ClusterView, DataDirectoryReport, HistoryEntry, Initialize, LeaderKey, MemberKey, MemberRecord, MemberRole, SpecRecord, Versions,
};
use crate::facts::failsafe::FEATURE;
use crate::facts::guard::{GuardFacts, LockFacts, Maintenance, PostmasterFacts, StartId, Word};
use crate::facts::lost::LostWrites;
use crate::facts::postgres::{
    ControlFacts, DataDirectory, DatabaseState, HalfSegment, LostRange, Probe, ProbeOutcome, ReplicaFacts, RewindAttempt, SqlFacts,
    StandbyFloor, WalReceiverFacts,
};
use crate::machine::action::Operation;
use crate::machine::event::{AcquireOutcome, Finished, PeersAnswer, PutOutcome};
use crate::machine::world::Me;
use crate::policy::deadlines::LeaseTimes;
use crate::spec::cluster::{self, ClusterSpec};
use crate::types::{
    Epoch, EtcdClusterId, Incarnation, LeaseId, LeaseIdentity, LockIdentity, Lsn, MemberName, Revision, SystemId, TimelineId,
};

/// When tests begin: long after the boot, so that nothing saturates at zero.
pub(crate) const T0: BootTime = BootTime(1_000_000_000_000);
/// The only cluster's identity.
pub(crate) const SYSTEM: SystemId = SystemId(7_512_345_678_901_234_567);
/// The only etcd.
pub(crate) const ETCD: EtcdClusterId = EtcdClusterId(14_841_639_068_965_178_418);

pub(crate) fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

pub(crate) fn name(text: &str) -> MemberName {
    text.parse().unwrap()
}

/// A spec of members, each a line such as `a` or `b, failover_priority: 2`; ttl 10 s, loop_wait 5 s, without failsafe.
pub(crate) fn spec(members: &[&str]) -> Arc<ClusterSpec> {
    spec_with(members, "ha: { ttl: 10s, loop_wait: 5s, failsafe: false }")
}

/// The same with the given lines of `spec:`.
pub(crate) fn spec_with(members: &[&str], rest: &str) -> Arc<ClusterSpec> {
    use std::fmt::Write as _;
    let mut text = "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n".to_owned();
    for (index, member) in members.iter().enumerate() {
        writeln!(text, "    - {{ address: 10.0.0.{}, name: {member} }}", index + 1).unwrap();
    }
    writeln!(text, "  {rest}").unwrap();
    if !rest.contains("replication:") {
        text.push_str("  replication: { mode: async, use_slots: false }\n");
    }
    Arc::new(cluster::load("test", &text).unwrap_or_else(|problems| panic!("{problems}\n{text}")).spec)
}

pub(crate) fn me(member: &str) -> Me {
    Me { name: name(member), incarnation: incarnation(1), versions: Versions::default() }
}

pub(crate) fn incarnation(run: u64) -> Incarnation {
    Incarnation { boot_id: "2d1f6a3e".to_owned(), started_ns: run }
}

pub(crate) fn lease(id: i64) -> LeaseIdentity {
    LeaseIdentity { cluster: ETCD, lease: LeaseId(id) }
}

pub(crate) fn lock(lease_id: i64, epoch: i64) -> LockIdentity {
    LockIdentity { lease: lease(lease_id), epoch: Epoch(epoch) }
}

/// Ten seconds, as in [`spec`].
pub(crate) fn times() -> LeaseTimes {
    LeaseTimes::new(Duration::from_secs(10))
}

pub(crate) fn record(role: MemberRole, timeline: u32, lsn: u64) -> MemberRecord {
    MemberRecord {
        maintenance: None,
        incarnation: incarnation(1),
        role,
        state: "running".to_owned(),
        machine_state: if role == MemberRole::Primary { "primary" } else { "following" }.to_owned(),
        timeline: Some(TimelineId(timeline)),
        receive_lsn: Some(Lsn(lsn)),
        replay_lsn: Some(Lsn(lsn)),
        system_id: Some(SYSTEM),
        data_directory: DataDirectoryReport::Full,
        vote: None,
        api_url: "http://10.0.0.9:8008".to_owned(),
        host: "10.0.0.9".to_owned(),
        port: 5432,
        versions: Versions::default(),
        observed_generation: 1,
        features: vec![FEATURE.to_owned()],
        pending_restart: Vec::new(),
        tags: BTreeMap::new(),
        conditions: Vec::new(),
        lost_writes: Vec::new(),
        copying: None,
    }
}

pub(crate) fn empty_record() -> MemberRecord {
    MemberRecord {
        timeline: None,
        receive_lsn: None,
        replay_lsn: None,
        system_id: None,
        data_directory: DataDirectoryReport::Empty,
        ..record(MemberRole::Uninitialized, 1, 0)
    }
}

pub(crate) fn key(record: MemberRecord, lease_id: i64) -> MemberKey {
    MemberKey { record, lease: LeaseId(lease_id), mod_revision: Revision(lease_id) }
}

pub(crate) fn entry(timeline: u32, member: &str, lease_id: i64) -> HistoryEntry {
    HistoryEntry {
        timeline: TimelineId(timeline),
        member: name(member),
        lease: LeaseId(lease_id),
        epoch: None,
        parent: None,
        switch_lsn: None,
        why: "a test".to_owned(),
        at: String::new(),
        continued: None,
    }
}

/// An entry whose promotion was recorded.
pub(crate) fn recorded(timeline: u32, member: &str, lease_id: i64, epoch: i64, parent: u32, switch: u64) -> HistoryEntry {
    let (parent, switch_lsn) = (Some(TimelineId(parent)), Some(Lsn(switch)));
    HistoryEntry { epoch: Some(Epoch(epoch)), parent, switch_lsn, ..entry(timeline, member, lease_id) }
}

pub(crate) fn leader(member: &str, lease_id: i64, epoch: i64) -> LeaderKey {
    LeaderKey { holder: member.to_owned(), epoch: Epoch(epoch), lease: LeaseId(lease_id), mod_revision: Revision(epoch) }
}

/// An initialized cluster with a spec and no members, at a revision.
pub(crate) fn view(revision: i64) -> ClusterView {
    ClusterView {
        etcd_cluster: Some(ETCD),
        revision: Revision(revision),
        spec: Some(SpecRecord { generation: 1, document: String::new(), by: "test".to_owned(), at: String::new() }),
        initialize: Some(Initialize::Done(SYSTEM)),
        ..ClusterView::default()
    }
}

pub(crate) fn guard(sequence: u64, postmaster: PostmasterFacts) -> GuardFacts {
    GuardFacts {
        sequence,
        pid: 100,
        postmaster,
        lease: None,
        lock: None,
        daemon_crashes: 0,
        crash_loop: false,
        maintenance: Maintenance::default(),
        conditions: Vec::new(),
    }
}

pub(crate) fn running(start: u64, word: Word) -> PostmasterFacts {
    PostmasterFacts::Running { start: StartId(start), pid: 4000, word, adopted: false }
}

pub(crate) fn nothing_runs() -> PostmasterFacts {
    PostmasterFacts::ProvedEmpty { last: None }
}

pub(crate) fn lock_facts(identity: LockIdentity, sent: BootTime) -> LockFacts {
    let deadlines = times().deadlines(sent);
    LockFacts { identity, valid_until: deadlines.valid_until, announce_at: deadlines.announce_at }
}

pub(crate) fn sql(in_recovery: bool, timeline: u32, lsn: u64) -> SqlFacts {
    let streaming = WalReceiverFacts { status: "streaming".to_owned(), sender_host: None, sender_port: None, latest_end_lsn: None };
    SqlFacts {
        in_recovery,
        timeline: TimelineId(timeline),
        receive_lsn: Lsn(lsn),
        replay_lsn: Lsn(lsn),
        startup: String::new(),
        receives: false,
        replayed_all: in_recovery,
        written_by_then: Lsn(if in_recovery { 0 } else { lsn }),
        synchronous_standby_names: String::new(),
        replay_paused: false,
        walreceiver: in_recovery.then_some(streaming),
        replicas: Vec::new(),
        lowered: Vec::new(),
        no_rewind: Vec::new(),
        stopping: false,
        slots: Vec::new(),
        pending_restart: Vec::new(),
        server_version_num: 150_018,
        postmaster_start_time: "2026-01-01 00:00:00+00".to_owned(),
        system_id: SYSTEM,
    }
}

pub(crate) fn probe(begun: BootTime, facts: SqlFacts) -> Probe {
    Probe { begun, outcome: ProbeOutcome::Accepting(Box::new(facts)) }
}

pub(crate) fn control(state: DatabaseState, timeline: u32, lsn: u64) -> ControlFacts {
    ControlFacts {
        system_id: SYSTEM,
        major_version: 15,
        state,
        checkpoint: Lsn(lsn),
        timeline: TimelineId(timeline),
        min_recovery_end: Lsn(0),
        min_recovery_timeline: TimelineId(0),
        data_checksums: true,
        wal_log_hints: false,
        floor: StandbyFloor::default(),
        standby_signal: false,
        backup_label: false,
        promoted: None,
        unarchived: 0,
    }
}

/// A rewind that was begun and is not known to have ended.
pub(crate) fn half_rewound() -> RewindAttempt {
    RewindAttempt {
        why: "a test".to_owned(),
        lost: LostRange { timeline: TimelineId(1), from: Lsn(900), to: Some(Lsn(1_000)) },
        system_id: SYSTEM,
        attempts: 1,
        leader_timeline: TimelineId(2),
        promoted_under: Some(Epoch(350)),
        boot_id: "boot".to_owned(),
        checkpoint: Lsn(990),
        kept: "/lost/1".to_owned(),
        finished: false,
    }
}

/// What is kept of it.
pub(crate) fn lost_writes() -> LostWrites {
    let lost = half_rewound().lost;
    LostWrites {
        at: "2026-01-01T00:00:00Z".to_owned(),
        timeline: lost.timeline,
        from: lost.from,
        to: Lsn(1_000),
        bytes: 100,
        transactions: Some(3),
        first_commit: Some("2026-01-01T00:00:00Z".to_owned()),
        last_commit: None,
        kept: "/lost/1".to_owned(),
        why: "a test".to_owned(),
    }
}

/// The end of an operation that came to nothing: unknown, never the old value.
pub(crate) fn failed(operation: &Operation, why: String) -> Finished {
    match operation {
        Operation::Look => Finished::Looked(DataDirectory::Unknown),
        Operation::Start { .. } => Finished::Started(Err(why)),
        Operation::Configure { generation, upstream, .. } => {
            Finished::Configured { generation: *generation, upstream: upstream.clone(), result: Err(why) }
        }
        Operation::Initdb { .. } => Finished::Initialized(Err(why)),
        Operation::Clone { .. } => Finished::Cloned(Err(why)),
        Operation::EmptyDirectory { .. } => Finished::Emptied(Err(why)),
        Operation::Rewind { .. } => Finished::Rewound(Err(why)),
        Operation::PlanRejoin { .. } => Finished::RejoinPlanned(Err(why)),
        Operation::ArchiveLeft { .. } => Finished::LeftArchived(Err(why)),
        Operation::ArchiveBeside { .. } => Finished::BesideArchived(Err(why)),
        Operation::Promote { .. } => Finished::PromotionAsked(Err(why)),
        Operation::Open { .. } => Finished::Opened(Err(why)),
        Operation::KeepSlots(_) => Finished::SlotsKept(Err(why)),
        Operation::SetNames { .. } => Finished::NamesSet(Err(why)),
        Operation::WriteSync { .. } => Finished::SyncWritten(Err(why)),
        Operation::EnsureRoles { .. } => Finished::RolesEnsured(Err(why)),
        Operation::Checkpoint => Finished::Checkpointed(Err(why)),
        Operation::PutMember(_) => Finished::MemberPut(PutOutcome::Failed(why)),
        Operation::Acquire { .. } => Finished::Acquired(AcquireOutcome::Failed(why)),
        Operation::Release { .. } => Finished::Released(Err(why)),
        Operation::Reaffirm(_) => Finished::Reaffirmed(Err(why)),
        Operation::WriteStatus(_) => Finished::StatusWritten(Err(why)),
        Operation::RecordPromotion { .. } => Finished::PromotionRecorded(Err(why)),
        Operation::WriteFailsafe { .. } => Finished::FailsafeWritten(Err(why)),
        Operation::NoteSuspension { .. } => Finished::SuspensionNoted(Err(why)),
        Operation::EndMaintenance { .. } => Finished::MaintenanceEnded(Err(why)),
        Operation::ClaimInitialize => Finished::InitializeClaimed(Err(why)),
        Operation::GiveUpInitialize => Finished::InitializeGivenUp(Err(why)),
        Operation::AnswerRequest { .. } => Finished::RequestAnswered(Err(why)),
        Operation::Survey => Finished::Surveyed(Err(why)),
        Operation::AskPeers { vacancy, peers } => {
            // Nobody answered: whoever may be writable is not known to be.
            let _ = peers;
            Finished::PeersAsked(PeersAnswer { vacancy: *vacancy, sent: T0, writable: Vec::new() })
        }
        Operation::ReachLeader(_) => Finished::LeaderReached(Err(why)),
        Operation::FenceByScan => Finished::FencedByScan(Err(why)),
    }
}

/// A segment that was received in part; `obstacle` is why it cannot be completed.
pub(crate) fn half_segment(obstacle: Option<&str>) -> HalfSegment {
    HalfSegment {
        file: "000000020000000000000003".to_owned(),
        timeline: TimelineId(2),
        missing: Lsn(0x300_2000),
        switch: Lsn(0x300_4000),
        older: "000000010000000000000003".to_owned(),
        obstacle: obstacle.map(str::to_owned),
    }
}

/// A standby that streams, and has flushed so much.
pub(crate) fn streaming(member: &str, flushed: u64) -> ReplicaFacts {
    ReplicaFacts {
        application_name: member.to_owned(),
        state: "streaming".to_owned(),
        client_addr: None,
        sent_lsn: Some(Lsn(u64::MAX)),
        flush_lsn: Some(Lsn(flushed)),
        replay_lsn: None,
        sync_state: String::new(),
        sync_priority: 0,
    }
}
