//! The way back behind a leader: the judgement on it, and pg_rewind, which can break off at each of its steps.

use pgherd::facts::cluster::HistoryEntry;
use pgherd::facts::postgres::{DatabaseState, LostRange, RewindAttempt};
use pgherd::machine::action::Upstream;
use pgherd::machine::event::Finished;
use pgherd::policy::rejoin::rewind::{BrokenOff, Rewinding, go_on};
use pgherd::policy::rejoin::{self, Inputs, LeaderLineage, Rejoin};
use pgherd::spec::cluster::OnRewindFailure;

use super::check::Checks;
use super::host::Host;
use super::mutants::{Mutant, mutant};
use super::wal::Data;
use super::world::Sim;

/// Copies what has changed.
pub const COPIES: u32 = 4;
/// All of it is written, and what is left to do may be done again.
const FINISHES: u32 = 5;
/// So often pg_rewind finds WAL missing that the member has thrown away, before it has touched anything.
const WAL_GONE_PERCENT: u64 = 15;
/// So often the leader makes a checkpoint when it is asked to.
const CHECKPOINT_PERCENT: u64 = 70;

impl Sim {
    pub fn plan(&mut self, host: usize, leader: &Upstream, history: &[HistoryEntry], failures: u32) -> Result<Rejoin, &'static str> {
        let other = self.ask_leader(host, leader)?;
        let rewinding = Rewinding { wanted: true, on_failure: OnRewindFailure::Reclone, obstacle: None, failures };
        let plan = self.judge_rejoin(host, other, history, &rewinding)?;
        let recovering = self.hosts[other].server.recovering();
        if matches!(plan, Rejoin::Wait { .. }) && !recovering && self.timing.percent(CHECKPOINT_PERCENT) {
            if let Some(data) = &mut self.hosts[other].server.data {
                data.make_checkpoint();
            }
            self.wal_flows(other);
            return self.judge_rejoin(host, other, history, &rewinding);
        }
        Ok(plan)
    }

    fn judge_rejoin(&self, host: usize, other: usize, history: &[HistoryEntry], rewinding: &Rewinding) -> Result<Rejoin, &'static str> {
        let this = &self.hosts[host];
        let data = this.server.data.as_ref().ok_or("there is no data directory")?;
        let leader = &self.hosts[other].server.lineage().ok_or("the leader has no data")?;
        if let Some(attempt) = &this.disk.rewind {
            return Ok(go_on(BrokenOff {
                attempt,
                leader,
                promoted_under: rejoin::promoted_under(leader.timeline, history),
                same_boot: attempt.boot_id == this.boot.to_string(),
                checkpoint: Some(data.checkpoint),
                rewinding,
            }));
        }
        let own_promotion = this.disk.promotion.as_ref();
        let (local, wal) = (data.control(own_promotion), data.local_wal());
        Ok(rejoin::decide(Inputs {
            local: &local,
            wal: &wal,
            own_promotion,
            promoted_under: rejoin::promoted_under(wal.timeline, history),
            led_before: rejoin::led_before(wal.timeline, history),
            leader,
            rewinding,
        }))
    }

    pub fn rewind_step(
        &mut self,
        host: usize,
        id: u64,
        step: u32,
        from: &Upstream,
        (why, lost): (String, LostRange),
        history: &[HistoryEntry],
    ) {
        if self.hosts[host].disk.rewind.as_ref().is_some_and(|attempt| attempt.finished) {
            return self.rewind_finishes(host);
        }
        let source = match self.ask_leader(host, from) {
            Ok(source) if !self.hosts[host].server.ail.breaks_copies => source,
            Ok(_) => return self.job_fails(host, "pg_rewind ended with an error"),
            Err(why) => return self.job_fails(host, why),
        };
        let Some(lineage) = self.hosts[source].server.lineage() else { return self.job_fails(host, "the leader has no data") };
        let shows = lineage.control_timeline == lineage.timeline || mutant(Mutant::RewindBeforeCheckpoint);
        if lineage.in_recovery || !shows {
            return self.job_fails(host, "the leader's control file is of another timeline");
        }
        let this = &mut self.hosts[host];
        let Some(data) = &mut this.server.data else { return self.job_fails(host, "there is no data directory") };
        match (step, &mut this.disk.rewind) {
            (1, Some(attempt)) => {
                attempt.attempts += 1;
                self.job_later(host, id, 3);
            }
            (1, None) => {
                if !matches!(data.state, DatabaseState::ShutDown | DatabaseState::ShutDownInRecovery) {
                    data.recover_alone();
                }
                self.job_later(host, id, 2);
            }
            (2, _) => {
                if !mutant(Mutant::RewoundWalNotKept) {
                    this.disk.lost.push(data.half.as_ref().map_or(&data.wal, |half| &half.was).clone());
                }
                let boot = this.boot.to_string();
                this.disk.rewind = Some(marker((why, lost), &lineage, history, boot, data)).filter(|_| !mutant(Mutant::RewindUnmarked));
                self.job_later(host, id, 3);
            }
            (3, _) if self.timing.percent(WAL_GONE_PERCENT) => self.job_fails(host, "pg_rewind misses WAL"),
            (3, _) => {
                let theirs = self.hosts[source].server.data.as_ref().map(|data| data.wal.clone());
                let holder = self.etcd.view.leader.as_ref().map(|leader| leader.holder.clone());
                self.checks.rewinds(host, &self.hosts, holder.as_deref());
                if let (Some(data), Some(theirs)) = (&mut self.hosts[host].server.data, theirs) {
                    data.begin_rewind(&theirs);
                }
                self.job_later(host, id, COPIES);
            }
            (COPIES, _) => self.rewind_copied(host, id, source, &lineage),
            _ => self.rewind_finishes(host),
        }
    }

    /// pg_rewind ends: its last act is the control file.
    fn rewind_copied(&mut self, host: usize, id: u64, source: usize, lineage: &LeaderLineage) {
        self.checks.rewound(host, source, &self.hosts);
        // By the old timeline in the leader's control file there is nothing to do for pg_rewind, and it ends well.
        if lineage.control_timeline == lineage.timeline {
            let Some(rewound) = self.hosts[source].server.data.as_ref().map(Data::rewound) else { return };
            self.hosts[host].server.data = Some(rewound);
        }
        // A daemon that ends before it has noted that finds a control file that is the leader's.
        if let Some(attempt) = self.hosts[host].disk.rewind.as_mut().filter(|_| self.timing.percent(80)) {
            attempt.finished = true;
        }
        self.job_later(host, id, FINISHES);
    }

    fn rewind_finishes(&mut self, host: usize) {
        let disk = &mut self.hosts[host].disk;
        (disk.promotion, disk.rewind) = (None, None);
        self.job_ends(host, Finished::Rewound(Ok(())));
    }
}

fn marker(
    (why, lost): (String, LostRange),
    leader: &LeaderLineage,
    history: &[HistoryEntry],
    boot_id: String,
    data: &Data,
) -> RewindAttempt {
    RewindAttempt {
        why,
        lost,
        system_id: data.system_id,
        attempts: 1,
        leader_timeline: leader.timeline,
        promoted_under: rejoin::promoted_under(leader.timeline, history),
        boot_id,
        checkpoint: data.checkpoint,
        kept: String::new(),
        finished: false,
    }
}

impl Checks {
    /// No server is started on a data directory that is neither what it was nor what it is to be (Patroni #2302).
    pub fn starts(&mut self, this: &Host) {
        if this.server.data.as_ref().is_some_and(|data| data.half.is_some()) {
            self.fail("I10", format!("{} starts PostgreSQL on a data directory that is half rewound or half copied", this.name));
        }
        if this.disk.half_empty {
            self.fail("I10", format!("{} starts PostgreSQL on a data directory that is half empty", this.name));
        }
    }

    /// pg_rewind begins to write: P5 and I10.
    pub fn rewinds(&mut self, host: usize, hosts: &[Host], holder: Option<&str>) {
        let this = &hosts[host];
        if !this.server.is_empty() {
            self.fail("I10", format!("{}'s data directory is rewound under a live server", this.name));
        }
        // A restored etcd may name a holder that knows nothing of it.
        if holder == Some(this.name.as_str()) && !self.restored {
            self.fail("I10", format!("{} rewinds its data directory while it holds the lock", this.name));
        }
        let Some(data) = &this.server.data else { return };
        self.takes_up_wal(host, data);
        let was = data.half.as_ref().map_or(&data.wal, |half| &half.was);
        let others = hosts.iter().enumerate().filter(|(other, _)| *other != host).filter_map(|(_, other)| other.server.data.as_ref());
        let elsewhere = others.into_iter().any(|other| was.is_in_the_past_of(&other.wal));
        if !elsewhere && !this.disk.lost.contains(was) {
            self.fail("I10", format!("{} rewinds WAL away that is nowhere else", this.name));
        }
    }

    /// pg_rewind has ended well: what is there now is the leader's and nobody else's.
    pub fn rewound(&mut self, host: usize, source: usize, hosts: &[Host]) {
        self.is_another_directory(host);
        let (this, source) = (&hosts[host], &hosts[source]);
        let (Some(half), Some(leader)) = (this.server.data.as_ref().and_then(|data| data.half.as_ref()), &source.server.data) else {
            return;
        };
        if half.torn {
            self.fail("I8", format!("{} goes on with a rewind of which a power cut may have taken a part", this.name));
        }
        if half.pages_of.iter().any(|wal| !wal.is_in_the_past_of(&leader.wal)) {
            self.fail("I8", format!("{} is rewound to {}, over pages of another's history", this.name, source.name));
        }
        if leader.wal.timeline_at(leader.checkpoint) != leader.wal.timeline() {
            self.fail("I8", format!("{} is rewound to {} before its control file shows its timeline", this.name, source.name));
        }
    }
}
