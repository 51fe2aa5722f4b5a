//! What the live tests of etcd need: servers, a network that loses answers, a lease thread that can be asked what it said, records.

pub mod etcd_server;
pub mod lossy;

use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use pgherd::clock::BootTime;
use pgherd::etcd::lease::{Acknowledged, LeaseHandle, spawn};
use pgherd::etcd::{AcquireRequest, Acquisition, Etcd, PutMember, Settings};
use pgherd::facts::cluster::{DataDirectoryReport, HistoryEntry, MemberRecord, MemberRole, Versions};
use pgherd::facts::failsafe::FEATURE;
use pgherd::facts::lease::LeaseEvent;
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::policy::renewal::Round;
use pgherd::types::{Incarnation, LeaseId, LeaseIdentity, LockIdentity, MemberName, Revision, TimelineId};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use etcd_server::{EtcdServer, PATIENCE};

pub fn name(text: &str) -> MemberName {
    text.parse().unwrap()
}

/// What a member says of itself; `started` tells its runs apart.
pub fn record(started: u64) -> MemberRecord {
    MemberRecord {
        maintenance: None,
        incarnation: Incarnation { boot_id: "boot".into(), started_ns: started },
        role: MemberRole::Replica,
        state: "streaming".into(),
        machine_state: "following".into(),
        timeline: Some(TimelineId(1)),
        receive_lsn: None,
        replay_lsn: None,
        system_id: None,
        data_directory: DataDirectoryReport::Full,
        vote: None,
        api_url: "http://127.0.0.1:8008".into(),
        host: "127.0.0.1".into(),
        port: 5432,
        versions: Versions::default(),
        observed_generation: 1,
        features: vec![FEATURE.to_owned()],
        pending_restart: Vec::new(),
        tags: Default::default(),
        conditions: Vec::new(),
        lost_writes: Vec::new(),
        copying: None,
    }
}

pub fn entry(member: &MemberName, lease: LeaseId, why: &str) -> HistoryEntry {
    HistoryEntry {
        timeline: TimelineId(2),
        member: member.clone(),
        lease,
        epoch: None,
        parent: None,
        switch_lsn: None,
        why: why.into(),
        at: "2026-01-01T00:00:00Z".into(),
        continued: None,
    }
}

/// A lease that nobody renews, for a minute.
pub async fn lease_of_a_minute(server: &EtcdServer) -> LeaseId {
    LeaseId(server.stranger().await.lease_grant(60, None).await.unwrap().id())
}

/// Waits until etcd does not know the lease any more.
pub async fn lease_is_gone(server: &EtcdServer, lease: LeaseId) {
    let mut stranger = server.stranger().await;
    let gone = async {
        let mut again = tokio::time::interval(std::time::Duration::from_millis(50));
        // 0 while it runs out, -1 once it is gone with its keys.
        while stranger.lease_time_to_live(lease.0, None).await.unwrap().ttl() >= 0 {
            again.tick().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the lease is still there");
}

/// What a member would take the lock with now.
pub async fn request(etcd: &Etcd, member: &str, lease: LeaseId) -> AcquireRequest {
    let view = etcd.read_view().await.unwrap();
    let member = name(member);
    let mut history = view.history.clone();
    history.push(entry(&member, lease, "test"));
    AcquireRequest::judged_on(&view, member, lease, history, None)
}

/// Writes the member key and takes the lock.
pub async fn take_lock(etcd: &Etcd, member: &str, lease: LeaseId) -> LockIdentity {
    assert_eq!(etcd.put_member(&name(member), &record(1), lease).await.unwrap(), PutMember::Written);
    match etcd.acquire(&request(etcd, member, lease).await).await.unwrap() {
        Acquisition::Acquired(lock) => lock,
        other => panic!("{other:?}"),
    }
}

/// A lease thread, its guard, and what it says.
pub struct Keeper {
    pub handle: LeaseHandle,
    pub times: LeaseTimes,
    events: UnboundedReceiver<(BootTime, LeaseEvent)>,
    /// What the guard was handed, in order.
    pub acknowledged: Arc<Mutex<Vec<(LockIdentity, BootTime)>>>,
}

impl Keeper {
    /// With a guard that acknowledges everything.
    pub fn start(settings: Settings, ttl_s: u64) -> Keeper {
        Keeper::start_with(settings, ttl_s, |_| Acknowledged::Yes)
    }

    /// With a guard of your own; it gets the number of the deadline, from 1.
    pub fn start_with(settings: Settings, ttl_s: u64, guard: impl Fn(usize) -> Acknowledged + Send + Sync + 'static) -> Keeper {
        Keeper::start_among(settings, ttl_s, guard, |_| Err("nobody is there".to_owned()))
    }

    /// With a guard and peers of your own.
    pub fn start_among(
        settings: Settings,
        ttl_s: u64,
        guard: impl Fn(usize) -> Acknowledged + Send + Sync + 'static,
        peers: impl Fn(Round) -> Result<(), String> + Send + Sync + 'static,
    ) -> Keeper {
        let times = LeaseTimes::new(std::time::Duration::from_secs(ttl_s));
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        let noted = acknowledged.clone();
        let acknowledge = move |lock, sent, _times| {
            let count = {
                let mut noted = noted.lock().unwrap();
                noted.push((lock, sent));
                noted.len()
            };
            guard(count)
        };
        let (said, events) = unbounded_channel();
        let sink = move |event| {
            let _ = said.send((BootTime::now(), event));
        };
        let call_peers = move |round| -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> { Box::pin(ready(peers(round))) };
        let handle = spawn(settings, times, Box::new(acknowledge), Box::new(call_peers), Box::new(sink)).unwrap();
        Keeper { handle, times, events, acknowledged }
    }

    /// The next event, and when it was said.
    pub async fn next(&mut self) -> (BootTime, LeaseEvent) {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        event.expect("the lease thread says nothing").expect("the lease thread is there")
    }

    /// Events up to the one that is wanted.
    pub async fn until(&mut self, wanted: impl Fn(&LeaseEvent) -> bool) -> Vec<LeaseEvent> {
        let mut events = Vec::new();
        loop {
            let (_, event) = self.next().await;
            events.push(event);
            if events.last().is_some_and(&wanted) {
                return events;
            }
        }
    }

    /// Gets a lease.
    pub async fn granted(&mut self) -> LeaseIdentity {
        self.handle.grant();
        match self.until(|event| matches!(event, LeaseEvent::Granted { .. })).await.pop() {
            Some(LeaseEvent::Granted { identity, .. }) => identity,
            other => panic!("{other:?}"),
        }
    }

    /// Gets a lease, takes the lock on it, and waits until it is proved.
    pub async fn leading(&mut self, etcd: &Etcd, member: &str) -> LockIdentity {
        let lease = self.granted().await;
        let lock = take_lock(etcd, member, lease.lease).await;
        self.handle.hold(lock);
        self.until(|event| matches!(event, LeaseEvent::Proved { lock: proved, .. } if *proved == lock)).await;
        lock
    }

    /// Waits for a proof that is begun from now on.
    pub async fn proved(&mut self, lock: LockIdentity) {
        let now = BootTime::now();
        self.until(|event| matches!(event, LeaseEvent::Proved { lock: proved, sent, .. } if *proved == lock && *sent >= now)).await;
    }
}

/// A revision that was never judged on.
pub const NEVER: Revision = Revision(1);
