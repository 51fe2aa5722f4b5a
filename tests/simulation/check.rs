//! What must hold at every moment (SAFETY 3), judged from outside by what really is: processes, WAL, etcd's own state.
//!
//! Each violation names its invariant. The limits of P1 that are stated to users are in [`Sim::excused`]; what a restored etcd, a lost disk and a
//! promotion by hand forgive of the other invariants is where each is judged (`restored`, `data_was_lost`, `by_hand`).

use std::collections::{BTreeMap, BTreeSet};

use pgherd::clock::BootTime;
use pgherd::facts::cluster::{ClusterView, Initialize, MemberKey};
use pgherd::facts::postgres::DataDirectory;
use pgherd::facts::synchrony::SyncRecord;
use pgherd::machine::action::{Action, Operation, StartAs};
use pgherd::machine::event::Event;
use pgherd::machine::world::Lock;
use pgherd::types::{Epoch, LockIdentity, Lsn, TimelineId};

use super::clock::{Real, ms};
use super::daemon::PROBE_TIMEOUT_MS;
use super::etcd::Acquired;
use super::host::{Daemon, Host};
use super::network::Link;
use super::requests::Asked;
use super::synchrony::Acknowledged;
use super::wal::Segment;
use super::world::Sim;

/// More orders at once than any event can need.
const ACTIONS_PER_EVENT_MAX: usize = 16;
/// One probe, and the order that follows it: a promotion by hand is fenced within this (P1's limits).
const BY_HAND_MS: u64 = 1_600;
/// A machine that goes on after standing still has its guard run before this.
pub const AWAKE_MS: u64 = 60;

#[derive(Debug, Clone)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
}

/// The end of a leadership as it was published, and the WAL it was on.
#[derive(Debug, Clone)]
struct Published {
    segments: Vec<Segment>,
    lsn: Lsn,
}

#[derive(Default)]
pub struct Checks {
    pub violation: Option<Violation>,
    /// Hosts whose daemon's loop is running right now.
    pub pumping: BTreeSet<usize>,
    /// Each id has one promoter.
    promoters: BTreeMap<TimelineId, (usize, u64)>,
    last_timeline: TimelineId,
    last_epoch: Epoch,
    published: Option<Published>,
    pub commits: u64,
    /// Changes of the lock's holder: when, whose.
    pub leaders: Vec<(Real, usize)>,
    maximum_lag: u64,
    last_fenced: Epoch,
    /// etcd was restored from a backup: ids and epochs may come twice, and who leads is the operator's to see to (SAFETY row 43).
    pub restored: bool,
    /// Hosts that nobody could count on when the lock was taken last: their daemons had last seen an empty data directory, or they were
    /// neither in the spec nor had a key in etcd, since somebody had deleted it.
    out_of_sight: BTreeSet<usize>,
    /// The WAL that a promotion by hand began, and who was promoted. None once its data directory is another.
    pub by_hand: BTreeMap<u64, Option<usize>>,
    /// A standby received WAL of a promotion by hand, and follows the leadership that took the same number (a stated limit): from here on
    /// its WAL is not judged.
    pub mixed_by_hand: bool,
    /// A disk was lost, or somebody promoted by hand.
    pub data_was_lost: bool,
    /// etcd was wiped or went back.
    pub etcd_forgot: bool,
    /// A disk is gone, etcd has forgotten, somebody promoted by hand, or a host had another's name (limit o): copies that were may not be.
    pub copies_in_doubt: bool,
    /// Whose disk was put back to an older state: it may lack what it acknowledged, and nobody may be elected on its word (row 27).
    pub put_back: Option<usize>,
    /// Up to where commits were acknowledged.
    pub acknowledged: Acknowledged,
    pub acknowledgements: u64,
    /// What operators asked for, and what is excused by it.
    pub asked: Asked,
}

impl Checks {
    pub fn new() -> Self {
        Checks { maximum_lag: 1 << 20, ..Checks::default() }
    }

    pub fn fail(&mut self, invariant: &'static str, what: String) {
        // Two promotions to one id are possible where etcd has forgotten.
        if self.restored && invariant == "I9" {
            return;
        }
        self.violation.get_or_insert(Violation { invariant, what });
    }

    pub fn before_event(daemon: &mut Daemon, event: &Event) {
        if let Event::Finished(finished) = event
            && let Some(kind) = finished.kind()
        {
            daemon.under_way.remove(&kind);
        }
    }

    /// The claims on orders: I2, I3, I9, I10, I11.
    pub fn judge_actions(&mut self, now: BootTime, daemon: &mut Daemon, actions: &[Action], record: Option<&SyncRecord>) {
        if actions.len() > ACTIONS_PER_EVENT_MAX {
            self.fail("L5", format!("{} actions at one event", actions.len()));
        }
        for action in actions {
            self.begins_maintenance(now, daemon, action);
            let Action::Do(operation) = action else { continue };
            let kind = operation.kind();
            if daemon.under_way.contains(&kind) {
                self.fail("L5", format!("{kind:?} twice at a time"));
            }
            if kind.is_job()
                && let Some(job) = daemon.under_way.iter().find(|kind| kind.is_job())
            {
                self.fail("L5", format!("{kind:?} while {job:?} is under way"));
            }
            self.judge_operation(daemon, now, operation, record);
            self.judge_maintenance(daemon, operation);
            daemon.under_way.insert(kind);
        }
    }

    /// A proof that has run out counts as none, before anything else is looked at (SAFETY 5).
    pub fn after_event(&mut self, now: BootTime, daemon: &Daemon, view: &ClusterView) {
        self.carries_out(daemon, view);
        self.restarts(daemon, view);
        if let Lock::Proved { until, .. } = daemon.machine.world().lock
            && now >= until
        {
            self.fail("I2", "a proof of the lock that has run out still counts".to_owned());
        }
    }

    /// The lock is not given up while a process of PostgreSQL is left that may write (row 8).
    pub fn released(&mut self, this: &Host) {
        let standby = this.guard.as_ref().is_none_or(|guard| !guard.state.may_write()) && this.server.of_standby();
        if !this.server.is_empty() && !standby {
            self.fail("I2", format!("{} gives the lock up while processes that may write are left", this.name));
        }
    }

    /// No deadline is later than the renewals that etcd has seen and the promises of the others allow, each from before it was sent
    /// (SAFETY 5). The ladder's margins would hide one that is.
    pub fn deadline_was_taken(&mut self, this: &Host) {
        let taken = this.guard.as_ref().and_then(|guard| guard.state.lock).map(|lock| lock.deadlines.valid_until);
        if let Some(until) = taken.filter(|until| *until > this.proved_until) {
            let what = format!("{}'s guard counts the lock until {until:?}, and it was proved until {:?}", this.name, this.proved_until);
            self.fail("I2", what);
        }
    }

    fn judge_operation(&mut self, daemon: &Daemon, now: BootTime, operation: &Operation, record: Option<&SyncRecord>) {
        let world = daemon.machine.world();
        let proved = |wanted: Option<LockIdentity>| match world.lock {
            Lock::Proved { identity, announce_at, .. } => now < announce_at && wanted.is_none_or(|wanted| wanted == identity),
            Lock::None | Lock::Unproved(_) => false,
        };
        match operation {
            Operation::Promote { lock, timeline, .. } => {
                if !proved(Some(*lock)) {
                    self.fail("I3", "a promotion is ordered without a proof of the lock".to_owned());
                }
                let ours = |record: &SyncRecord| record.leader == world.me.name && record.epoch == lock.epoch;
                if record.is_some_and(|record| record.epoch <= lock.epoch && !ours(record)) {
                    self.fail("I3", "a promotion is ordered while sync is the last leader's".to_owned());
                }
                if world.timeline_of(*lock) != Some(*timeline) {
                    self.fail("I9", format!("a promotion onto {timeline} is ordered, which the lock did not reserve"));
                }
            }
            Operation::Start { role: StartAs::Primary, .. } if !proved(None) => {
                self.fail("I2", "a start as a primary is ordered without a proof of the lock".to_owned());
            }
            Operation::Clone { .. } | Operation::EmptyDirectory { .. } | Operation::Rewind { .. } if world.lock != Lock::None => {
                self.fail("I10", "a copy or a rewind is ordered over the data directory of the lock's holder".to_owned());
            }
            Operation::Initdb { .. } => {
                let Some(view) = &world.view else { return self.fail("I11", "initdb without a view of etcd".to_owned()) };
                let full = view.members.values().any(MemberKey::has_data);
                let ours = world.lease.map(|lease| lease.lease);
                let claimed = matches!(&view.initialize, Some(Initialize::Claimed { lease, .. }) if Some(*lease) == ours);
                if full || !claimed {
                    self.fail("I11", "initdb is ordered although data is known, or the claim is not ours".to_owned());
                }
            }
            _ => {}
        }
    }

    /// A leader's position is in etcd: so much must survive it, less `maximum_lag_on_failover` (P2).
    pub fn etcd_changed(&mut self, view: &ClusterView) {
        if let Some(leader) = &view.leader {
            if leader.epoch < self.last_epoch && view.revision.0 > self.last_epoch.0 {
                self.fail("I4", format!("the lock's epoch goes back from {} to {}", self.last_epoch, leader.epoch));
            }
            self.last_epoch = self.last_epoch.max(leader.epoch);
        }
    }

    /// etcd went back to an older state: what was known of epochs and ids is over.
    pub fn etcd_restored(&mut self) {
        (self.last_epoch, self.last_fenced) = (Epoch(0), Epoch(0));
        self.restored = true;
        self.etcd_forgot = true;
    }

    /// I4: accepted writes of leaders never carry an epoch older than one already accepted.
    fn fenced_writes(&mut self, writes: &[Epoch]) {
        for epoch in writes {
            if *epoch < self.last_fenced {
                self.fail("I4", format!("a write under epoch {epoch} was accepted after one under {}", self.last_fenced));
            }
            self.last_fenced = *epoch;
        }
    }

    /// All keys are gone, and with them what was published.
    pub fn etcd_wiped(&mut self) {
        self.published = None;
    }

    pub fn published(&mut self, host: &Host, lsn: Lsn) {
        if let Some(data) = &host.server.data {
            self.published = Some(Published { segments: data.wal.segments.clone(), lsn });
        }
    }

    /// A primary takes connections that was started as one.
    pub fn opened(&mut self, host: usize, hosts: &[Host]) {
        let Some(data) = &hosts[host].server.data else { return };
        self.led_on(data.wal.timeline(), hosts[host].name.as_str(), hosts);
    }

    /// I9: along leaderships the timeline never goes back.
    fn led_on(&mut self, timeline: TimelineId, name: &str, hosts: &[Host]) {
        // When etcd has lost its history and the data is elsewhere too, nobody can know how far it went.
        let known =
            !self.etcd_forgot || hosts.iter().any(|host| host.server.data.as_ref().is_some_and(|data| data.wal.timeline() > timeline));
        if timeline < self.last_timeline && known && !self.restored {
            self.fail("I9", format!("{name} leads on timeline {timeline} after {} was led on", self.last_timeline));
        }
        self.last_timeline = self.last_timeline.max(timeline);
    }

    pub fn promoted(&mut self, host: usize, timeline: TimelineId, reserved: bool, by_hand: bool, excused: bool, hosts: &[Host]) {
        let Some(data) = &hosts[host].server.data else { return };
        let token = data.wal.token();
        // Where somebody promoted by hand, PostgreSQL may go past the number that the leadership reserved. Its daemon fences it then, and may
        // be cut off from etcd and unable to say that the number is used.
        let off_its_number = !reserved && !self.by_hand.is_empty();
        if by_hand || off_its_number {
            self.by_hand.insert(token, Some(host));
            (self.data_was_lost, self.copies_in_doubt) = (true, true);
            return;
        }
        let earlier = self.promoters.insert(timeline, (host, token)).filter(|_| !self.restored);
        // Where etcd was wiped and the disk is gone too, nobody can know that the id was used, and nothing is left that could be mixed up.
        let is_left = |host: &Host, token| {
            let kept = host.disk.kept.iter().chain(&host.server.data);
            kept.into_iter().any(|data| data.wal.extent_of(token).is_some())
        };
        // Nor of a directory that was put back a moment before, and that its daemon had not looked at since.
        let was_there = |index: usize| !(self.etcd_forgot && self.out_of_sight.contains(&index));
        let mut there = hosts.iter().enumerate().filter(|(index, _)| was_there(*index)).map(|(_, host)| host);
        if let Some((other, _)) = earlier.filter(|(_, token)| there.any(|host| is_left(host, *token))) {
            let what = format!("timeline {timeline} is promoted to by {} and by {}", hosts[other].name, hosts[host].name);
            self.fail("I9", what);
        }
        // A machine that stood still finishes what it had begun, before its guard runs.
        if !excused {
            self.led_on(timeline, hosts[host].name.as_str(), hosts);
            self.judge_loss(host, hosts);
            self.judge_lineage(host, hosts);
        }
    }

    /// P2 in async: at most `maximum_lag_on_failover` of what the last leader has published is left behind, unless nobody has it any more.
    fn judge_loss(&mut self, host: usize, hosts: &[Host]) {
        let (Some(published), Some(data)) = (&self.published, &hosts[host].server.data) else { return };
        let shared = data.wal.segments.iter().zip(&published.segments).take_while(|(ours, theirs)| ours == theirs).count();
        let next_of = |segments: &[Segment], end: Lsn| segments.get(shared).map_or(end, |next| next.start);
        let common =
            if shared == 0 { Lsn(0) } else { next_of(&data.wal.segments, data.wal.end).min(next_of(&published.segments, published.lsn)) };
        let lost = published.lsn.bytes_since(common);
        let token = published.segments.last().map_or(0, |segment| segment.token);
        let still_there = hosts.iter().any(|other| {
            let extent = other.server.data.as_ref().and_then(|data| data.wal.extent_of(token));
            extent.is_some_and(|extent| extent >= published.lsn)
        });
        if self.asked.accepts(host).is_some_and(|accepted| lost > accepted) && !self.restored {
            let what = format!("{} was promoted by hand {lost} bytes behind, more than was accepted", hosts[host].name);
            self.fail("P2", what);
        }
        if lost > self.maximum_lag && self.asked.accepts(host).is_none() && still_there && !self.restored {
            let what = format!("{} was promoted {lost} bytes behind what its predecessor had published", hosts[host].name);
            self.fail("P2", what);
        }
    }

    /// I8: a timeline that the last leader who published had left behind does not become the cluster's history again, while what that
    /// leader published is still there. Whoever merely lacks the end of it has left nothing.
    fn judge_lineage(&mut self, host: usize, hosts: &[Host]) {
        let (Some(published), Some(data)) = (&self.published, &hosts[host].server.data) else { return };
        let (ours, theirs) = (&data.wal.segments, &published.segments);
        let shared = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
        let (Some(stayed), Some(left)) = (ours.get(shared), theirs.get(shared)) else { return };
        let token = theirs.last().map_or(0, |segment| segment.token);
        // A directory that was put back a moment before the election, and that its daemon had not looked at since, was not there yet.
        let seen = |index: usize| !self.out_of_sight.contains(&index);
        let still_there = hosts.iter().enumerate().filter(|(index, _)| seen(*index)).any(|(_, other)| {
            let extent = other.server.data.as_ref().and_then(|data| data.wal.extent_of(token));
            extent.is_some_and(|extent| extent >= published.lsn)
        });
        if stayed.start > left.start && still_there && !self.restored {
            let what = format!(
                "{} was promoted with WAL up to {} of a timeline that its predecessor had left at {}",
                hosts[host].name, stayed.start, left.start
            );
            self.fail("I8", what);
        }
    }

    /// PostgreSQL follows, by numbers and positions, a history that is not its own.
    pub fn follows_another(&mut self, host: usize, from: usize, hosts: &[Host]) {
        // Whoever was promoted by hand has to know; who received from it cannot, and nobody tells two such promotions at one position apart.
        let of = |host: usize| hosts[host].server.data.as_ref().map(|data| data.wal.segments.as_slice()).unwrap_or_default();
        let by_another =
            |at: usize| of(at).iter().any(|segment| self.by_hand.get(&segment.token).is_some_and(|promoted| *promoted != Some(at)));
        let twins = of(host).iter().any(|own| {
            let twin = |other: &&Segment| own.token != other.token && (own.timeline, own.start) == (other.timeline, other.start);
            let by_hand = |segment: &Segment| self.by_hand.contains_key(&segment.token);
            // The other is a leadership's when etcd has not forgotten it.
            by_hand(own) && of(from).iter().find(twin).is_some_and(|other| by_hand(other) || self.etcd_forgot)
        });
        if by_another(host) || by_another(from) || twins {
            (self.mixed_by_hand, self.copies_in_doubt) = (true, true);
            return;
        }
        let what = format!("{} follows {} on a timeline of the same number that is another", hosts[host].name, hosts[from].name);
        self.fail("I9", what);
    }

    pub fn initdb(&mut self, host: usize, hosts: &[Host]) {
        let full: Vec<&str> = hosts.iter().filter(|host| host.server.data.is_some()).map(|host| host.name.as_str()).collect();
        if !full.is_empty() {
            self.fail("I11", format!("{} runs initdb beside the data of {full:?}", hosts[host].name));
        }
    }

    /// What was promoted by hand is not in it any more.
    pub fn is_another_directory(&mut self, host: usize) {
        self.by_hand.values_mut().filter(|promoted| **promoted == Some(host)).for_each(|promoted| *promoted = None);
    }

    /// A data directory is replaced by a copy: P5 and I10.
    pub fn swapped(&mut self, host: usize, hosts: &[Host], kept: bool, holder: Option<&str>) {
        let this = &hosts[host];
        self.is_another_directory(host);
        if !this.server.is_empty() {
            self.fail("I10", format!("{}'s data directory is replaced under a live server", this.name));
        }
        // A restored etcd may name a holder that knows nothing of it.
        if holder == Some(this.name.as_str()) && !self.restored {
            self.fail("I10", format!("{} replaces its data directory while it holds the lock", this.name));
        }
        let Some(old) = &this.server.data else { return };
        let elsewhere = hosts
            .iter()
            .enumerate()
            .any(|(other, there)| other != host && there.server.data.as_ref().is_some_and(|data| old.wal.is_in_the_past_of(&data.wal)));
        if !kept && !elsewhere {
            self.fail("I10", format!("{} gives away WAL that is nowhere else", this.name));
        }
    }

    /// I13: at most one member's leader paths answer 200, and its server is a primary whose lock runs.
    pub fn leader_paths(&mut self, now: Real, says: &[usize], hosts: &[Host]) {
        let bound: Vec<&usize> = says.iter().filter(|host| now >= hosts[**host].excused_until).collect();
        if bound.len() > 1 {
            let names: Vec<&str> = bound.iter().map(|host| hosts[**host].name.as_str()).collect();
            self.fail("I13", format!("leader paths answer 200 on {names:?}"));
        }
        for host in bound {
            if hosts[*host].local(now) >= hosts[*host].proved_until {
                self.fail("I13", format!("{}'s leader paths answer 200 after its lock has run out", hosts[*host].name));
            }
        }
    }
}

impl Sim {
    pub fn lock_was_taken(&mut self, host: usize, outcome: &Acquired) {
        if let Acquired::Ours(_) = outcome {
            self.checks.leaders.push((self.now, host));
            let is_empty = |host: &Host| host.daemon.as_ref().is_some_and(|daemon| daemon.machine.world().data == DataDirectory::Empty);
            let spec = self.etcd.view.spec.as_ref().and_then(|spec| self.specs.get(&spec.generation));
            let declared = |host: &Host| spec.is_none_or(|spec| spec.member(&host.name).is_some());
            let is_known = |host: &Host| declared(host) || self.etcd.view.members.contains_key(&host.name);
            let out_of_sight = |host: &Host| is_empty(host) || !is_known(host);
            self.checks.out_of_sight = (0..self.hosts.len()).filter(|index| out_of_sight(&self.hosts[*index])).collect();
            self.lock_hangs_on_a_lease(host);
            let name = self.hosts[host].name.clone();
            self.say(Some(host), || format!("etcd: {name} takes the lock"));
        }
    }

    /// I1 and I2, after everything that happens.
    pub fn check(&mut self) {
        let now = self.now;
        let mut writer: Option<usize> = None;
        for host in 0..self.hosts.len() {
            // Also of one that does not acknowledge now: what is ended late for such a reason may do so while it ends.
            let excused = self.excused(host);
            if excused || !self.hosts[host].server.acknowledges(now) || self.hosts[host].stands {
                continue;
            }
            let local = self.hosts[host].local(now);
            if local >= self.hosts[host].proved_until && !self.is_suspended(host) {
                let what = format!("{} can acknowledge commits although its lock has run out", self.hosts[host].name);
                self.checks.fail("I2", what);
            }
            if let Some(other) = writer.replace(host) {
                let what = format!("{} and {} can both acknowledge commits", self.hosts[other].name, self.hosts[host].name);
                self.checks.fail("I1", what);
            }
        }
        let writes = std::mem::take(&mut self.etcd.fenced_writes);
        self.checks.fenced_writes(&writes);
    }

    /// The limits of P1 that are stated to the user.
    pub fn excused(&mut self, host: usize) -> bool {
        let now = self.now;
        let (guard, daemon) = (self.hosts[host].guard_works(), self.hosts[host].daemon_works());
        let left = self.is_left_to_a_person(host);
        let late = |link: &Link| link.delay.is_some() || link.loss_percent > 0;
        let reaches = self.reaches_etcd(host) && !late(&self.links[host].0) && !late(&self.links[host].1);
        let this = &mut self.hosts[host];
        // Guard and daemon both cannot do their work, and there is no watchdog.
        let frozen = this.guard.as_ref().is_some_and(|guard| guard.frozen) || this.daemon.as_ref().is_some_and(|daemon| daemon.frozen);
        if !guard && !daemon && frozen {
            let until = now.after(ms(AWAKE_MS) + this.server.dies_within());
            this.excused_until = this.excused_until.max(until);
        }
        // pg_promote by hand: fenced within one probe while its daemon runs and its server answers.
        if let Some(at) = this.server.postmaster.as_ref().and_then(|postmaster| postmaster.promoted_by_hand) {
            let blind = !daemon || !guard || left || this.server.ail.slowness > 0 || this.server.ail.stuck;
            let from = if blind { now } else { at };
            // Who asked it while it did not answer waits for that first.
            let asked = if this.server.ail.slowness > 0 { PROBE_TIMEOUT_MS } else { 0 };
            this.excused_until = this.excused_until.max(from.after(ms(BY_HAND_MS + asked)));
        }
        // etcd took the lock away before its time, and its holder cannot be told.
        if now < this.early_loss_until {
            let deaf =
                !daemon || !reaches || this.daemon.as_ref().is_some_and(|daemon| daemon.watch.stalled || daemon.watch.known.is_none());
            if deaf {
                this.excused_until = this.excused_until.max(this.early_loss_until);
            }
        }
        now < this.excused_until
    }
}
