//! How each fault begins. How it ends is in `heal`, and what waits for the moment before or after an order is in `strikes`.

use std::time::Duration;

use pgherd::machine::event::Event;
use pgherd::types::MemberName;

use super::check::AWAKE_MS;
use super::clock::{Real, ms, secs};
use super::documents::{TTLS, UPSTREAM};
use super::etcd::Serving;
use super::host::Loss;
use super::network::RACES_LATE_MS;
use super::plan::{Fault, Kind};
use super::world::{Sim, What, member};

/// A namesake is found out before it could have its name from etcd: from then on it is a member like any other, and failsafe relies on
/// each name being used once.
const NAMESAKE_S: u64 = 3;
/// The choice of the slowest PostgreSQL.
const SLOWEST: u64 = 39;
/// A release that gets lost is carried out within so long, and mostly before the lock's key is written again.
const REAFFIRMS_LATE_S: u64 = 8;

impl Sim {
    pub fn lay_out(&mut self, plan: Vec<Fault>) {
        self.plan = plan;
        for index in 0..self.plan.len() {
            self.at(self.plan[index].at, What::Fault { index });
        }
    }

    fn victim(&self, fault: &Fault) -> usize {
        let any = ((fault.victim / 2) % self.hosts.len() as u64) as usize;
        if fault.victim % 2 == 1 {
            return any;
        }
        let leader = self.etcd.view.leader.as_ref().and_then(|leader| leader.holder.parse().ok());
        leader.and_then(|name| self.host_of(&name)).unwrap_or(any)
    }

    pub fn kill_postmaster(&mut self, host: usize) {
        let now = self.now;
        let pid = self.hosts[host].server.postmaster.as_ref().map(|postmaster| postmaster.pid);
        let live = self.random.between(ms(0), ms(2_500));
        self.hosts[host].server.kill_postmaster(now, live);
        self.server_changed(host);
        self.receivers_notice(host, pid);
        self.guard_turn(host);
    }

    pub fn power_off(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        this.powered = false;
        this.server.power_off();
        this.guard = None;
        this.daemon = None;
        this.hello_waits = false;
    }

    pub fn power_on(&mut self, host: usize) {
        if self.hosts[host].powered {
            return;
        }
        let now = self.now;
        let booted = self.random.between(secs(5), secs(60));
        let this = &mut self.hosts[host];
        this.powered = true;
        this.stands = false;
        this.boot += 1;
        let local = pgherd::clock::BootTime(0) + booted;
        this.clock.boot(now, local);
        this.proved_until = pgherd::clock::BootTime(0);
        this.renewed_until.clear();
        self.start_daemon(host);
    }

    /// The lock goes before its time: its holder knows only when it is told.
    pub fn early_loss(&mut self) -> Option<usize> {
        let now = self.now;
        let (host, _) = self.lock_runs_until()?;
        let this = &mut self.hosts[host];
        let until = this.clock.real(now, this.proved_until).after(ms(AWAKE_MS));
        this.early_loss_until = this.early_loss_until.max(until);
        Some(host)
    }

    pub fn fault_begins(&mut self, index: usize) {
        // One that follows another may come too late.
        if self.healed {
            return;
        }
        let fault = self.plan[index].clone();
        let (host, now) = (self.victim(&fault), self.now);
        self.plan[index].victim = host as u64 * 2 + 1;
        self.coverage.fault(fault.kind);
        self.say(Some(host), || format!("!! {:?} for {:.1} s", fault.kind, fault.lasts.as_secs_f64()));
        self.later(fault.lasts, What::FaultEnds { index });
        if self.begin_on_host(&fault, host) || self.begin_on_network(&fault, host) {
            return;
        }
        match fault.kind {
            Kind::EtcdLeaderLost => {
                let takes = ms(800 + fault.choice % 1_700);
                self.etcd.serving = Serving::Electing { until: now.after(takes) };
            }
            Kind::EtcdDown => self.etcd.serving = Serving::No { refuses: fault.choice.is_multiple_of(2) },
            Kind::EtcdFull => self.etcd.no_space = true,
            Kind::LockDeleted => {
                if let Some(holder) = self.early_loss().filter(|_| fault.choice % 3 == 1) {
                    // What has to end there takes its time.
                    self.follows(ms(0), (Kind::SlowPostgres, SLOWEST), holder, secs(2));
                }
                self.etcd.delete_by_hand(|keys| keys.leader = None);
                self.etcd_changed();
            }
            Kind::LeaseRevoked | Kind::RenewsTheDead => {
                let name = self.hosts[host].name.clone();
                self.etcd.bugs.renews_the_dead |= fault.kind == Kind::RenewsTheDead;
                if let Some(lease) = self.etcd.view.members.get(&name).map(|key| key.lease) {
                    self.early_loss();
                    if self.etcd.revoke(lease) {
                        self.etcd_changed();
                    }
                }
            }
            Kind::RevokesEarly => {
                self.early_loss();
                self.etcd.bugs.revokes_early = true;
            }
            Kind::MemberKeyDeleted => {
                let name = self.hosts[host].name.clone();
                self.etcd.delete_by_hand(|keys| {
                    keys.members.remove(&name);
                });
                self.etcd_changed();
            }
            Kind::LosesDeletions => self.etcd.bugs.loses_deletions = true,
            Kind::EtcdRestored => self.etcd.back_up(),
            Kind::EtcdWiped => {
                (self.checks.etcd_forgot, self.checks.copies_in_doubt) = (true, true);
                self.early_loss();
                self.etcd.wipe();
                self.checks.etcd_wiped();
                self.etcd_changed();
            }
            Kind::Switchover => self.switch_over(&fault),
            Kind::Reinit => self.order_reinit(&fault, host),
            Kind::PutBack => self.takes_snapshot(host),
            Kind::Maintenance => self.person_pauses(&fault, host),
            Kind::Restart => self.restart(&fault, host),
            Kind::FrozenInRenewal => self.hosts[host].freezes_in_renewal = true,
            Kind::LostRelease => {
                let step = 1 + (fault.choice >> 8) as usize % (self.hosts.len() - 1);
                let successor = (host + step) % self.hosts.len();
                self.hosts[host].loses_release = Some(match (fault.choice >> 32) % 4 {
                    0 => Loss::DaemonEnds { reaffirms_late: false },
                    1 => Loss::DaemonEnds { reaffirms_late: true },
                    2 => Loss::SuccessorAway { successor },
                    _ => Loss::GuardEnds,
                });
                self.request_switchover(successor);
            }
            Kind::LateRace => {
                let leads = self.lock_runs_until().is_some_and(|(leader, _)| leader == host);
                let other = if leads { (host + 1) % self.hosts.len() } else { host };
                self.hosts[other].races_late = true;
                self.follows(ms(0), (Kind::LockDeleted, 0), host, ms(0));
            }
            Kind::FrozenAndDeposed => {
                self.freeze_daemon(host, true);
                self.follows(ms(5 + fault.choice % 200), (Kind::LockDeleted, 0), host, ms(0));
            }
            Kind::StandbyFlaps => {
                let standby = (host + 1 + (fault.choice % (self.hosts.len() as u64 - 1)) as usize) % self.hosts.len();
                let mut at = ms(0);
                for turn in 0..6 {
                    self.follows(at, (Kind::StoppedByHand, 0), standby, ms(0));
                    at += ms(300 + (fault.choice >> (8 * turn)) % 2_500);
                }
            }
            Kind::StandbyBeginsAnew => self.standbys_begin_anew(&fault),
            Kind::ReceiverStuck => {
                let standby =
                    (0..self.hosts.len()).map(|step| (host + step) % self.hosts.len()).find(|host| self.hosts[*host].server.recovering());
                if let Some(standby) = standby {
                    self.receiver_sticks(standby, fault.choice);
                }
            }
            Kind::UpstreamRefuses => {
                let (from, to) = UPSTREAM;
                self.hosts[from].refuses = Some(to);
            }
            Kind::LateRecord => {
                self.hosts[host].is_late_with_record = true;
                for other in (0..self.hosts.len()).filter(|other| *other != host) {
                    self.follows(ms(0), (Kind::PowerOff, 0), other, secs(3));
                }
            }
            Kind::OldEtcdLeader => self.etcd_leader_is_deposed(host),
            Kind::LeadsByPromises => self.leader_goes_on_by_promises(&fault, host),
            Kind::Namesake => self.start_namesake(index, &fault),
            Kind::SpecEdited => self.edit_spec(fault.choice, None),
            Kind::MemberRemoved => self.remove_member(&fault, host),
            Kind::Strike => self.arm(&fault),
            _ => {}
        }
    }

    /// Faults of one machine and what runs on it.
    fn begin_on_host(&mut self, fault: &Fault, host: usize) -> bool {
        let now = self.now;
        match fault.kind {
            Kind::KillDaemon => self.daemon_ends(host, None),
            Kind::DaemonStaysDown => {
                self.hosts[host].supervised = false;
                self.daemon_ends(host, None);
            }
            Kind::FreezeDaemon => self.freeze_daemon(host, true),
            Kind::StarveDaemon => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.starved = true;
                }
            }
            Kind::CrashLoopOfDaemon => {
                for delay in [0, 400, 800, 1_200] {
                    self.later(ms(delay), What::KillDaemon { host });
                }
            }
            Kind::StopDaemon => {
                self.hosts[host].supervised = false;
                self.fact(host, Event::StopRequested);
            }
            Kind::LeaveDaemon => self.leaves_as_it_is(host),
            Kind::KillGuard => self.kill_guard(host),
            Kind::KillGuardAndDaemon => {
                self.kill_guard(host);
                self.daemon_ends(host, None);
            }
            Kind::FreezeGuard => self.freeze_guard(host),
            Kind::FreezeGuardAndDaemon => {
                self.freeze_guard(host);
                self.freeze_daemon(host, true);
            }
            Kind::KillPostmaster => self.kill_postmaster(host),
            Kind::StoppedByHand => {
                self.hosts[host].server.fast_stop(now, &mut self.random);
                self.server_changed(host);
            }
            Kind::CrashLoopOfPostgres => {
                self.hosts[host].server.ail.crashes = true;
                self.kill_postmaster(host);
            }
            Kind::StartRefused => self.hosts[host].server.ail.refuses_start = true,
            Kind::PromotionRefused => self.hosts[host].server.ail.refuses_promotion = true,
            Kind::SlowPostgres => self.hosts[host].server.ail.slowness = 1 + (fault.choice % (SLOWEST + 1)) as u32,
            Kind::StuckBackend => self.hosts[host].server.ail.stuck = true,
            Kind::DiskFull => self.hosts[host].server.ail.disk_full = true,
            Kind::CopiesBreak => self.hosts[host].server.ail.breaks_copies = true,
            Kind::DataLost => {
                self.power_off(host);
                (self.checks.data_was_lost, self.checks.copies_in_doubt) = (true, true);
                self.hosts[host].server.data = None;
                self.hosts[host].disk = super::host::Disk::default();
            }
            Kind::PromotedByHand => {
                let standby = (0..self.hosts.len()).find(|other| *other != host && self.hosts[*other].server.recovering());
                if let Some(standby) = standby {
                    self.promote_by_hand(standby);
                }
            }
            Kind::DataMoved => {
                self.kill_postmaster(host);
                self.hosts[host].server.orphans.clear();
                let data = self.hosts[host].server.data.take();
                (self.checks.data_was_lost, self.checks.copies_in_doubt) = (true, true);
                self.hosts[host].moved_away = data.or(self.hosts[host].moved_away.take());
                self.guard_turn(host);
            }
            Kind::PowerOff => self.power_off(host),
            Kind::AllPowerOff => (0..self.hosts.len()).for_each(|host| self.power_off(host)),
            Kind::Suspend => self.hosts[host].stands = true,
            Kind::HypervisorPause => {
                self.hosts[host].stands = true;
                self.hosts[host].clock.stand_still(now);
            }
            Kind::ClockRate => {
                // What the margin is for: at most 0.5 % between this clock and etcd's.
                let ppm = (fault.choice % 9_000) as i64 - 4_500;
                self.hosts[host].clock.set_rate(now, ppm);
            }
            _ => return false,
        }
        true
    }

    pub fn freeze_daemon(&mut self, host: usize, frozen: bool) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.frozen = frozen;
        }
        if !frozen {
            self.unpark(host);
            self.pump(host);
        }
    }

    fn begin_on_network(&mut self, fault: &Fault, host: usize) -> bool {
        match fault.kind {
            Kind::CutEtcd => {
                self.links[host].0.cut = true;
                self.links[host].1.cut = true;
            }
            Kind::CutAnswers => self.links[host].1.cut = true,
            Kind::FlappingEtcd => {
                let mut at = ms(0);
                while at < fault.lasts {
                    self.later(at, What::Flap { host });
                    at += ms(700 + fault.choice % 2_000);
                }
            }
            Kind::LossyEtcd => {
                let (out, back) = &mut self.links[host];
                [out, back].into_iter().for_each(|link| link.loss_percent = 5 + fault.choice % 40);
            }
            Kind::SlowEtcd => {
                let most = ms(20 + fault.choice % 2_500);
                let (out, back) = &mut self.links[host];
                [out, back].into_iter().for_each(|link| link.delay = Some((ms(5), most)));
            }
            Kind::DuplicatedRequests => self.links[host].0.duplicates_percent = 40,
            Kind::LateRequests => self.links[host].0.late_percent = 40,
            Kind::CutPeers => {
                let other = (host + 1 + (fault.choice % (self.hosts.len() as u64 - 1)) as usize) % self.hosts.len();
                self.peers_cut.insert((host.min(other), host.max(other)), true);
            }
            Kind::Isolate => {
                self.links[host].0.cut = true;
                self.links[host].1.cut = true;
                for other in (0..self.hosts.len()).filter(|other| *other != host) {
                    self.peers_cut.insert((host.min(other), host.max(other)), true);
                }
            }
            // The others' watches hang on a member of etcd that lags; what they have not seen is compacted away when this ends.
            Kind::Compaction => {
                let others = self.hosts.iter_mut().enumerate().filter(|(other, _)| *other != host);
                others.filter_map(|(_, other)| other.daemon.as_mut()).for_each(|daemon| daemon.watch.stalled = true);
            }
            Kind::WatchStalls => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.watch.stalled = true;
                }
            }
            _ => return false,
        }
        true
    }

    /// The old one does not know yet, and answers whoever talks to it, for as long as it takes to miss its majority.
    fn etcd_leader_is_deposed(&mut self, host: usize) {
        let (now, old) = (self.now, self.etcd.term);
        let until = now.after(self.random.between(ms(900), ms(1_900)));
        self.etcd.elected(now);
        self.hosts[host].old_etcd_leader = Some((until, old));
        self.later(until.since(now), What::CutEtcd { host });
    }

    /// Freezes the daemon with a keepalive under way, for less time than its guard takes to begin the ladder.
    pub fn freeze_in_renewal(&mut self, host: usize, ttl: Duration) {
        if !std::mem::take(&mut self.hosts[host].freezes_in_renewal) {
            return;
        }
        let lasts = self.random.between(ttl / 5, ttl * 11 / 25);
        self.say(Some(host), || "!! stands still between a keepalive and its answer".to_owned());
        self.freeze_daemon_for(host, lasts);
        self.later(lasts + ms(8), What::CutEtcd { host });
    }

    pub fn cut_off_from_etcd(&mut self, host: usize) {
        if !self.healed {
            self.cut_etcd_for(host, secs(14), true);
        }
    }

    /// Its lease runs out while everybody answers it. What then is to hold others back: a promise whose daemon was started again, or the
    /// record, of which a member that is back in the spec is not.
    fn leader_goes_on_by_promises(&mut self, fault: &Fault, host: usize) {
        let other = (host + 1 + (fault.choice % (self.hosts.len() as u64 - 1)) as usize) % self.hosts.len();
        if (fault.choice / 1_024).is_multiple_of(2) {
            let ttl = self.specs.values().next_back().map_or(secs(3), |spec| spec.ha.ttl);
            let asked_last = ttl + ms(1_000) + self.random.between(ms(0), ttl / 2);
            self.cut_etcd_for(host, ttl * 2 + secs(4), true);
            self.follows(asked_last, (Kind::Isolate, 0), host, ttl);
            self.follows(asked_last, (Kind::KillDaemon, 0), other, ms(0));
        } else {
            let ttl = secs(TTLS[(fault.choice % 6) as usize]);
            let rewritten = ttl / 2 + secs(2);
            self.follows(ms(0), (Kind::MemberRemoved, fault.choice), host, rewritten + ms(500));
            self.follows(rewritten, (Kind::CutEtcd, 0), host, ttl * 2 + secs(4));
        }
    }

    /// Whether this release gets lost on the way: then its daemon ends at once, or goes on with the lock since its successor is away.
    pub fn loses_release(&mut self, host: usize) -> bool {
        let Some(loss) = self.hosts[host].loses_release.take_if(|loss| *loss != Loss::GuardEnds).filter(|_| !self.healed) else {
            return false;
        };
        let late = self.now.after(secs(REAFFIRMS_LATE_S));
        match loss {
            Loss::DaemonEnds { reaffirms_late } => {
                self.follows(ms(1), (Kind::KillDaemon, 0), host, ms(0));
                self.hosts[host].reaffirms_late_until = if reaffirms_late { late } else { Real(0) };
            }
            Loss::SuccessorAway { successor } => {
                self.follows(ms(1), (Kind::PowerOff, 0), successor, secs(6));
                self.follows(ms(2), (Kind::MemberKeyDeleted, 0), successor, ms(0));
                self.hosts[host].reaffirms_late_until = late;
            }
            Loss::GuardEnds => {}
        }
        true
    }

    /// A release begins by reading the lock's key. Its guard ends meanwhile, and another is there before etcd has answered.
    pub fn release_begins(&mut self, host: usize) {
        if self.hosts[host].loses_release.take_if(|loss| *loss == Loss::GuardEnds).is_some() && !self.healed {
            self.hosts[host].reads_late = Some(self.random.between(ms(1_200), ms(2_600)));
            self.follows(ms(1), (Kind::KillGuard, 0), host, ms(0));
        }
    }

    /// Whether this request for the lock is overtaken: by another's, and by the end of that leadership.
    pub fn races_late(&mut self, host: usize) -> bool {
        let late = std::mem::take(&mut self.hosts[host].races_late) && !self.healed;
        if late {
            self.follows(ms(RACES_LATE_MS - 200), (Kind::LockDeleted, 0), host, ms(0));
        }
        late
    }

    /// Whether this write of `sync`, which says that more have each commit, is the one that comes late: etcd is out of reach for a while
    /// then, and the standbys are away when it is back.
    pub fn is_late_with_record(&mut self, host: usize, copies: u32) -> bool {
        let more = copies > self.etcd.view.sync.as_ref().map_or(0, |record| record.copies);
        if !more || copies < 2 || !self.hosts[host].is_late_with_record || self.healed {
            return false;
        }
        self.hosts[host].is_late_with_record = false;
        self.follows(ms(1), (Kind::CutEtcd, 0), host, ms(1_700));
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.follows(ms(2), (Kind::PowerOff, 0), other, secs(9));
        }
        true
    }

    /// A fault that another one brings with it.
    pub fn follows(&mut self, after: Duration, (kind, choice): (Kind, u64), host: usize, lasts: Duration) {
        self.plan.push(Fault { at: self.now.after(after), kind, victim: host as u64 * 2 + 1, lasts, choice });
        self.later(after, What::Fault { index: self.plan.len() - 1 });
    }

    fn start_namesake(&mut self, index: usize, fault: &Fault) {
        let Some((leader, _)) = self.lock_runs_until() else { return };
        // It would answer for a guard that is not its own (limit r).
        if self.etcd.view.suspended.contains(&member(leader)) {
            return;
        }
        let other = (leader + 1 + (fault.choice % (self.hosts.len() as u64 - 1)) as usize) % self.hosts.len();
        self.checks.copies_in_doubt = true;
        self.restart_as(other, member(leader));
        self.later(secs(NAMESAKE_S), What::FaultEnds { index });
    }

    /// A machine that was set up wrongly boots: nothing is left of what ran under the name before.
    pub fn restart_as(&mut self, host: usize, name: MemberName) {
        self.power_off(host);
        self.say(Some(host), || format!("!! is `{name}` from here on"));
        self.hosts[host].name = name;
        self.power_on(host);
    }
}
