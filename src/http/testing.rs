//! Made-up members for the tests of this module: a world, and one thing changed.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, LeaderKey, MemberRole, StatusRecord};
use crate::facts::guard::{LockFacts, PostmasterFacts, StartId, Word};
use crate::facts::postgres::{Probe, ProbeOutcome, SqlFacts, WalReceiverFacts};
use crate::http::answer::Moment;
use crate::http::snapshot::Snapshot;
use crate::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, Lsn, SystemId, TimelineId};

/// The time all tests begin at.
pub fn start() -> BootTime {
    BootTime(1_000_000_000_000)
}

/// `span` after the beginning.
pub fn at(span: Duration) -> Moment {
    Moment { boot: start() + span, unix_seconds: 1_795_351_950 + span.as_secs() }
}

/// The beginning.
pub fn moment() -> Moment {
    at(Duration::ZERO)
}

fn sql(in_recovery: bool) -> SqlFacts {
    SqlFacts {
        in_recovery,
        timeline: TimelineId(3),
        receive_lsn: Lsn(0x0300_0200),
        replay_lsn: Lsn(0x0300_0100),
        startup: String::new(),
        receives: false,
        replayed_all: false,
        written_by_then: Lsn(0x0300_0200),
        synchronous_standby_names: String::new(),
        replay_paused: false,
        walreceiver: None,
        replicas: Vec::new(),
        lowered: Vec::new(),
        no_rewind: Vec::new(),
        stopping: false,
        slots: Vec::new(),
        pending_restart: Vec::new(),
        server_version_num: 170_010,
        postmaster_start_time: "2026-11-22 12:00:00.5+00".to_owned(),
        system_id: SystemId(7_512_345_678_901_234_567),
    }
}

fn member(role: MemberRole, facts: SqlFacts) -> Snapshot {
    let now = start();
    let mut snapshot = Snapshot::unknown(now, "mdw".parse().unwrap(), "main".parse().unwrap());
    let view = ClusterView {
        leader: Some(LeaderKey { holder: "mdw".to_owned(), epoch: Epoch(40), lease: LeaseId(9), mod_revision: crate::types::Revision(40) }),
        status: Some(StatusRecord {
            epoch: Epoch(40),
            timeline: TimelineId(3),
            lsn: Lsn(0x0300_0200),
            slots: Default::default(),
            replayed: Default::default(),
            conditions: Vec::new(),
        }),
        ..ClusterView::default()
    };
    snapshot.view = Some((now, Arc::new(view)));
    snapshot.etcd_reachable = true;
    snapshot.declared = true;
    snapshot.observed_generation = 4;
    snapshot.role = role;
    snapshot.state = "running".to_owned();
    snapshot.server_version_num = Some(facts.server_version_num);
    snapshot.system_id = Some(facts.system_id);
    snapshot.probe = Some(Probe { begun: now, outcome: ProbeOutcome::Accepting(Box::new(facts)) });
    let word = if role == MemberRole::Primary { Word::Writable } else { Word::Standby };
    snapshot.postmaster = Some(PostmasterFacts::Running { start: StartId(1), pid: 100, word, adopted: false });
    snapshot
}

/// A healthy leader: A in 13 s, E in 30 s.
pub fn primary() -> Snapshot {
    let mut snapshot = member(MemberRole::Primary, sql(false));
    "primary".clone_into(&mut snapshot.machine_state);
    let lease = LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(9) };
    snapshot.lock = Some(LockFacts {
        identity: LockIdentity { lease, epoch: Epoch(40) },
        announce_at: start() + Duration::from_secs(13),
        valid_until: start() + Duration::from_secs(30),
    });
    snapshot
}

/// A healthy standby that streams, 256 bytes behind in replay.
pub fn replica() -> Snapshot {
    let mut facts = sql(true);
    let status = "streaming".to_owned();
    facts.walreceiver = Some(WalReceiverFacts { status, sender_host: None, sender_port: None, latest_end_lsn: Some(Lsn(0x0300_0200)) });
    let mut snapshot = member(MemberRole::Replica, facts);
    "following".clone_into(&mut snapshot.machine_state);
    snapshot
}

/// A member whose PostgreSQL is stopped.
pub fn stopped() -> Snapshot {
    let mut snapshot = replica();
    "stopped".clone_into(&mut snapshot.state);
    snapshot.postmaster = Some(PostmasterFacts::ProvedEmpty { last: None });
    let outcome = ProbeOutcome::Unknown("no server listens on the socket".to_owned());
    snapshot.probe = Some(Probe { begun: start(), outcome });
    snapshot
}

/// Changes what the last probe saw.
pub fn seen(snapshot: &mut Snapshot) -> &mut SqlFacts {
    match snapshot.probe.as_mut().map(|probe| &mut probe.outcome) {
        Some(ProbeOutcome::Accepting(facts)) => facts,
        _ => panic!("this member's last probe saw nothing"),
    }
}
