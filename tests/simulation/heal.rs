//! How faults end, each by itself or all of them at the end of a run.

use super::check::AWAKE_MS;
use super::clock::ms;
use super::etcd::Serving;
use super::network::Link;
use super::plan::Kind;
use super::world::{Sim, What, member};

impl Sim {
    pub fn fault_ends(&mut self, index: usize) {
        if self.healed {
            return;
        }
        let fault = self.plan[index].clone();
        let host = ((fault.victim / 2) % self.hosts.len() as u64) as usize;
        self.say(Some(host), || format!("!! end of {:?}", fault.kind));
        match fault.kind {
            Kind::DaemonStaysDown | Kind::StopDaemon => {
                self.hosts[host].supervised = true;
                self.start_daemon(host);
            }
            Kind::CrashLoopOfDaemon => self.clear_crashes(host),
            Kind::FreezeDaemon | Kind::FrozenAndDeposed => self.freeze_daemon(host, false),
            Kind::StarveDaemon => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.starved = false;
                }
                self.pump(host);
            }
            Kind::FreezeGuard => self.thaw_guard(host),
            Kind::FreezeGuardAndDaemon => {
                self.thaw_guard(host);
                self.freeze_daemon(host, false);
            }
            Kind::CrashLoopOfPostgres => self.hosts[host].server.ail.crashes = false,
            Kind::StartRefused => self.hosts[host].server.ail.refuses_start = false,
            Kind::PromotionRefused => self.hosts[host].server.ail.refuses_promotion = false,
            Kind::SlowPostgres => self.hosts[host].server.ail.slowness = 0,
            Kind::StuckBackend => {
                self.hosts[host].server.ail.stuck = false;
                self.hosts[host].server.orphans.retain(|orphan| !orphan.stuck);
                self.guard_turn(host);
            }
            Kind::DiskFull => self.hosts[host].server.ail.disk_full = false,
            Kind::Switchover => self.hosts.iter_mut().for_each(|host| host.server.ail.archives_for_ever = false),
            Kind::CopiesBreak => self.hosts[host].server.ail.breaks_copies = false,
            Kind::PowerOff | Kind::DataLost => self.power_on(host),
            Kind::MemberRemoved => self.edit_spec(fault.choice, None),
            Kind::DataMoved => self.data_comes_back(host),
            Kind::PutBack => self.puts_back(host),
            Kind::AllPowerOff => (0..self.hosts.len()).for_each(|host| self.power_on(host)),
            Kind::Suspend | Kind::HypervisorPause => self.goes_on(host),
            Kind::CutEtcd
            | Kind::CutAnswers
            | Kind::FlappingEtcd
            | Kind::LossyEtcd
            | Kind::SlowEtcd
            | Kind::DuplicatedRequests
            | Kind::LateRequests => {
                self.links[host] = (Link::default(), Link::default());
            }
            Kind::CutPeers => {
                let other = (host + 1 + (fault.choice % (self.hosts.len() as u64 - 1)) as usize) % self.hosts.len();
                self.peers_cut.remove(&(host.min(other), host.max(other)));
            }
            Kind::Isolate => {
                self.links[host] = (Link::default(), Link::default());
                self.peers_cut.retain(|(one, two), _| *one != host && *two != host);
            }
            Kind::LateRace => self.hosts.iter_mut().for_each(|host| host.races_late = false),
            Kind::LostRelease => self.hosts[host].loses_release = None,
            Kind::LateRecord => self.hosts[host].is_late_with_record = false,
            Kind::WatchStalls => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.watch.stalled = false;
                }
            }
            Kind::Compaction => self.compact(),
            Kind::EtcdDown => {
                let takes = self.random.between(ms(300), ms(1_800));
                self.etcd.serving = Serving::Electing { until: self.now.after(takes) };
            }
            Kind::EtcdFull => self.etcd.no_space = false,
            Kind::RenewsTheDead => self.etcd.bugs.renews_the_dead = false,
            Kind::LosesDeletions => self.etcd.bugs.loses_deletions = false,
            Kind::EtcdRestored => {
                let holder = self.early_loss();
                let now = self.now;
                if self.etcd.restore(now) {
                    self.checks.etcd_restored();
                    // It sees that etcd went back, and goes on until its deadline; whom the backup names may be back before that.
                    if let Some(holder) = holder {
                        let this = &mut self.hosts[holder];
                        this.excused_until = this.excused_until.max(this.early_loss_until);
                    }
                }
            }
            Kind::EtcdWiped => self.apply_again(),
            Kind::Maintenance => self.person_resumes(),
            Kind::Namesake => self.namesakes_end(),
            _ => {}
        }
    }

    /// Whoever runs under another's name is stopped, and started under its own.
    fn namesakes_end(&mut self) {
        for host in 0..self.hosts.len() {
            if self.hosts[host].name != member(host) {
                self.restart_as(host, member(host));
            }
        }
    }

    /// Somebody moves the data directory back, if its place is still empty.
    fn data_comes_back(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        let busy = this.daemon.as_ref().is_some_and(|daemon| daemon.job.is_some());
        if this.server.data.is_none() && this.server.is_empty() && !busy {
            this.server.data = this.moved_away.take();
        }
    }

    /// The operator applies the spec that is missing, and the one that names everybody.
    fn apply_again(&mut self) {
        let present = self.etcd.view.spec.as_ref().and_then(|spec| self.specs.get(&spec.generation)).cloned();
        let newest = present.or_else(|| self.specs.values().next_back().cloned());
        let everybody = newest.as_ref().is_some_and(|spec| spec.members.len() == self.hosts.len());
        if !everybody {
            self.edit_spec(0, None);
        } else if let (None, Some(spec)) = (&self.etcd.view.spec, newest) {
            self.apply(spec);
        }
    }

    fn clear_crashes(&mut self, host: usize) {
        if let Some(guard) = &mut self.hosts[host].guard {
            guard.state.clear_crashes();
        }
        self.start_daemon(host);
    }

    /// A machine goes on after standing still; with its clock, if that stood too.
    fn goes_on(&mut self, host: usize) {
        let now = self.now;
        let this = &mut self.hosts[host];
        if !this.stands {
            return;
        }
        this.stands = false;
        if this.clock.go_on(now) {
            // No mechanism inside a guest covers this (P1's limits).
            let until = this.clock.real(now, this.proved_until).after(ms(AWAKE_MS));
            this.excused_until = this.excused_until.max(until);
        }
        this.excused_until = this.excused_until.max(now.after(ms(AWAKE_MS)));
        let takes = self.random.between(ms(0), ms(5));
        if let Some(guard) = &self.hosts[host].guard {
            let (pid, token) = (guard.pid, guard.wake);
            self.later(takes, What::GuardWake { host, pid, token });
        }
        self.server_changed(host);
        self.unpark(host);
        self.pump(host);
        self.supervise(host);
    }

    pub fn flap(&mut self, host: usize) {
        if self.healed {
            return;
        }
        let cut = !self.links[host].0.cut;
        self.links[host].0.cut = cut;
        self.links[host].1.cut = cut;
    }

    /// Everything that is wrong is put right, as operators and hardware would.
    pub fn heal(&mut self) {
        self.say(None, || "!! everything is healed".to_owned());
        self.healed = true;
        self.armed.clear();
        self.namesakes_end();
        self.peers_cut.clear();
        self.links.fill((Link::default(), Link::default()));
        if self.etcd.serving != Serving::Yes {
            self.etcd.serving = Serving::Electing { until: self.now.after(ms(500)) };
        }
        self.etcd.no_space = false;
        self.etcd.bugs = super::etcd::Bugs::default();
        self.apply_again();
        self.person_resumes();
        for host in 0..self.hosts.len() {
            self.hosts[host].supervised = true;
            self.hosts[host].freezes_in_renewal = false;
            self.hosts[host].old_etcd_leader = None;
            self.hosts[host].server.ail = super::postgres::Ailments::default();
            self.hosts[host].server.orphans.retain(|orphan| !orphan.stuck);
            self.data_comes_back(host);
            self.power_on(host);
            self.goes_on(host);
            self.thaw_guard(host);
            if let Some(daemon) = &mut self.hosts[host].daemon {
                daemon.starved = false;
                daemon.watch.stalled = false;
            }
            self.freeze_daemon(host, false);
            if self.checks.restored {
                // What an operator does who has confirmed that etcd: stopped and started, for the guard, too, knows of leaderships that
                // it has forgotten.
                self.kill_guard(host);
                self.daemon_ends(host, None);
            }
            self.clear_crashes(host);
            self.guard_turn(host);
        }
    }
}
