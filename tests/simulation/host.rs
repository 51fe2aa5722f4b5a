//! A host: its clock, its disk, its PostgreSQL, its guard and its daemon, as plain data. What happens to them is in the modules beside.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pgherd::clock::BootTime;
use pgherd::facts::cluster::ClusterView;
use pgherd::facts::guard::GuardFacts;
use pgherd::facts::postgres::RewindAttempt;
use pgherd::guard::state::GuardState;
use pgherd::machine::Machine;
use pgherd::machine::action::{Action, Operation, OperationKind};
use pgherd::machine::event::Event;
use pgherd::policy::rejoin::OwnPromotion;
use pgherd::types::{LeaseId, LeaseIdentity, MemberName, Revision};

use super::clock::{HostClock, Real};
use super::guard::Waiting;
use super::lease::LeaseThread;
use super::postgres::Server;
use super::records::Record;
use super::wal::{Data, Wal};
use super::world::DaemonDue;

/// What a crash leaves.
#[derive(Debug, Default)]
pub struct Disk {
    /// This member's own record of its last promotion.
    pub promotion: Option<OwnPromotion>,
    /// The file that names the lease, and the boot it was written in.
    pub lease: Option<(u64, LeaseIdentity)>,
    /// Diverged data directories that were kept.
    pub kept: Vec<Data>,
    /// The marker of a rewind that was begun.
    pub rewind: Option<RewindAttempt>,
    /// A data directory that was given up is being emptied: the control file is gone, and not all else is.
    pub half_empty: bool,
    /// WAL that was kept before a rewind took it away.
    pub lost: Vec<Wal>,
}

pub struct Guard {
    pub pid: i32,
    pub state: GuardState,
    /// SIGSTOP, or starved: does nothing until it goes on.
    pub frozen: bool,
    pub sequence: u64,
    pub told: Option<GuardFacts>,
    pub wake: u64,
    /// The daemon's run that it watches.
    pub owner: Option<u64>,
    /// Requests that nobody has read yet.
    pub waiting: Vec<Waiting>,
}

/// A job on PostgreSQL, between two of its steps.
pub struct Job {
    pub id: u64,
    pub operation: Operation,
    pub step: u32,
}

/// The daemon's watch of etcd.
#[derive(Default)]
pub struct Watch {
    pub token: u64,
    /// A deliberate bug: what was known, and what etcd had, when changes were missed.
    pub missed: Option<(Arc<ClusterView>, Arc<ClusterView>)>,
    /// The view as the watch has it; None = it has to list first.
    pub known: Option<Arc<ClusterView>>,
    pub as_of: BootTime,
    /// Deliveries are in order: nothing comes before this.
    pub not_before: Real,
    /// Since when no question for progress is answered.
    pub silent_since: Option<BootTime>,
    /// A bug or a fault has it deliver nothing, with no sign.
    pub stalled: bool,
    pub next_list: BootTime,
    pub listing: Option<u64>,
    /// When the list or the question was sent.
    pub asked: BootTime,
}

/// One run of the daemon.
pub struct Daemon {
    pub run: u64,
    pub machine: Machine,
    pub ends: VecDeque<Event>,
    pub facts: VecDeque<Event>,
    pub actions: VecDeque<Action>,
    pub exit: Option<u8>,
    /// SIGSTOP: every thread stands still.
    pub frozen: bool,
    /// The main loop stands still; the lease's thread does not (SAFETY row 4).
    pub starved: bool,
    pub parked: Vec<DaemonDue>,
    pub wake: u64,
    pub tick_due: bool,
    /// When the machine was told the wall clock.
    pub time_told: Real,
    pub pace: Option<Duration>,
    pub probe: u64,
    pub probing: bool,
    pub lease: Option<LeaseThread>,
    pub watch: Watch,
    /// Who waits, and the highest revision that was seen when the request was sent.
    pub calls: BTreeMap<u64, (super::network::Caller, Revision)>,
    pub records: BTreeMap<u64, Record>,
    pub job: Option<Job>,
    /// The generation of the spec read last.
    pub spec_read: Option<u64>,
    /// The highest revision of etcd seen in an answer that cannot be stale.
    pub witness: Revision,
    pub scan: Option<super::guard::Scan>,
    /// What is under way, as the outside sees it: one of a kind.
    pub under_way: BTreeSet<OperationKind>,
}

/// What happens to a leader whose release gets lost, or is slow, on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its daemon ends at once, and is back before the lock is fenced.
    DaemonEnds { reaffirms_late: bool },
    /// It lives on, and its successor is away for a while: it goes on with the lock.
    SuccessorAway { successor: usize },
    /// Nothing is lost: the key is read late, and meanwhile its guard ends.
    GuardEnds,
}

pub struct Host {
    pub name: MemberName,
    pub clock: HostClock,
    pub boot: u64,
    pub powered: bool,
    /// The whole machine stands still: suspended, or its hypervisor pauses it.
    pub stands: bool,
    pub disk: Disk,
    pub server: Server,
    /// The next renewal is the one in which its daemon stands still.
    pub freezes_in_renewal: bool,
    /// Its next release is carried out late, and this happens besides.
    pub loses_release: Option<Loss>,
    /// Until then its lock's key is written again late.
    pub reaffirms_late_until: Real,
    /// Its next look at the lock's key takes so long.
    pub reads_late: Option<Duration>,
    /// Its next request for the lock is carried out late.
    pub races_late: bool,
    /// Its next write of `sync` that says that more have each commit is carried out late.
    pub is_late_with_record: bool,
    /// As a standby it sends nothing to this one.
    pub refuses: Option<usize>,
    /// Until then a deposed leader of etcd answers its keepalives, in this raft term.
    pub old_etcd_leader: Option<(Real, u64)>,
    /// A data directory that somebody took away.
    pub moved_away: Option<Data>,
    /// Its disk as somebody has it from a while ago: the data directory, and its record of the promotion.
    pub snapshot: Option<(Data, Option<OwnPromotion>)>,
    pub guard: Option<Guard>,
    pub daemon: Option<Daemon>,
    /// The code that the daemon left with last.
    pub exit: Option<u8>,
    pub runs: u64,
    /// The service manager starts the daemon again.
    pub supervised: bool,
    pub next_pid: i32,
    /// A server event is in the queue for then.
    pub server_due: Option<Real>,
    /// WAL is on its way here.
    pub stream_due: bool,
    /// The daemon's start waits for a guard that does not answer.
    pub hello_waits: bool,
    /// By true requests and answers: until when this host's lock is proved (I2).
    pub proved_until: BootTime,
    /// The same of each lease that it has renewed, whether the lock hangs on it or not.
    pub renewed_until: BTreeMap<LeaseId, BootTime>,
    /// Until then this host is inside a stated limit of P1.
    pub excused_until: Real,
    /// The lock was taken away before its time; until then its holder may not know.
    pub early_loss_until: Real,
}

impl Host {
    pub fn new(name: MemberName, local: BootTime) -> Self {
        Host {
            name,
            clock: HostClock::new(local),
            boot: 1,
            powered: true,
            stands: false,
            disk: Disk::default(),
            server: Server::default(),
            freezes_in_renewal: false,
            loses_release: None,
            reaffirms_late_until: Real(0),
            reads_late: None,
            races_late: false,
            is_late_with_record: false,
            refuses: None,
            old_etcd_leader: None,
            moved_away: None,
            snapshot: None,
            guard: None,
            daemon: None,
            exit: None,
            runs: 0,
            supervised: true,
            next_pid: 100,
            server_due: None,
            stream_due: false,
            hello_waits: false,
            proved_until: BootTime(0),
            renewed_until: BTreeMap::new(),
            excused_until: Real(0),
            early_loss_until: Real(0),
        }
    }

    pub fn local(&self, now: Real) -> BootTime {
        self.clock.local(now)
    }

    /// The daemon of this run, if it still is.
    pub fn daemon_of(&mut self, run: u64) -> Option<&mut Daemon> {
        self.daemon.as_mut().filter(|daemon| daemon.run == run)
    }

    pub fn guard_works(&self) -> bool {
        self.powered && !self.stands && self.guard.as_ref().is_some_and(|guard| !guard.frozen)
    }

    pub fn daemon_works(&self) -> bool {
        self.powered && !self.stands && self.daemon.as_ref().is_some_and(|daemon| !daemon.frozen && !daemon.starved)
    }
}
