//! Two clusters that do the same: real servers, and the simulator's. Every step is taken by both, and every look compares what pgherd
//! would see of both.

use std::process::ExitStatus;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::clock::BootTime;
use pgherd::facts::postgres::{ControlFacts, ProbeOutcome, SqlFacts};
use pgherd::policy::rejoin::rewind::Rewinding;
use pgherd::policy::rejoin::{Inputs, LeaderLineage, LocalWal, OwnPromotion, Rejoin, decide};
use pgherd::postgres::{Installation, Keep, clone_from, history_files, set_standby, wal};
use pgherd::spec::cluster::OnRewindFailure;
use pgherd::types::{Epoch, Lsn, TimelineId};

use super::super::clock::{ms, secs};
use super::super::postgres::Ended;
use super::super::wal::Data;
use super::super::world::{Sim, member};
use super::account::{AtRest, Judged, Running};
use super::harness::{LIMIT, Server, eventually, eventually_async, place};

/// Whatever a server of the model is asked for has come to pass within this.
const MODEL_S: u64 = 30;
/// Walreceivers that came and went.
const ATTEMPTS: usize = 2;

/// One cluster, twice. Servers go by their numbers.
pub struct Twins {
    pub sim: Sim,
    pub servers: Vec<Server>,
    /// Goes last.
    _root: tempfile::TempDir,
}

impl Twins {
    /// Places for `count` servers.
    pub fn new(installation: &Installation, count: usize) -> Twins {
        let root = place();
        let mut servers: Vec<_> = (0..count).map(|index| Server::new(installation, root.path(), member(index).as_str())).collect();
        for server in &mut servers {
            // A standby moves its minimum recovery end when a page is written: only at restartpoints, as the model has it.
            server.inputs.parameters.insert("bgwriter_lru_maxpages".into(), Some("0".into()));
        }
        Twins { sim: Sim::of_hosts(1, count, false), servers, _root: root }
    }

    /// A primary that takes connections, and a table.
    pub async fn primary(&mut self, host: usize) {
        self.servers[host].make_primary().await;
        self.servers[host].run("create table public.t (id int)").await;
        self.sim.system_ids += 1;
        self.sim.wal_tokens += 1;
        self.sim.hosts[host].server.data = Some(Data::made_by_initdb(pgherd::types::SystemId(self.sim.system_ids), self.sim.wal_tokens));
        self.model_starts(host, None);
        self.model_writes(host);
    }

    /// A clone, not started.
    pub async fn clone_of(&mut self, host: usize, leader: usize) {
        let job = self.servers[host].clone_job(&self.servers[leader], Keep::Empty).await;
        clone_from(&self.servers[host].installation, &self.servers[host].layout, &job).await.unwrap();
        let copy = self.model_data(leader).base_backup();
        self.sim.hosts[host].server.data = Some(copy);
        self.sim.wal_flows(leader);
    }

    /// A clone that streams.
    pub async fn standby_of(&mut self, host: usize, leader: usize) {
        self.clone_of(host, leader).await;
        self.follow(host, leader).await;
        // A copy ends with a segment, and pg_waldump waits for 5 s where the next one is missing.
        self.commit(leader).await;
        self.caught_up(host, leader).await;
    }

    /// Started as a standby of `leader`, without its history files; whether it streams is not waited for.
    pub async fn start_as_standby(&mut self, host: usize, leader: Option<usize>) {
        let conninfo = leader.map(|leader| self.servers[host].conninfo_to(&self.servers[leader]));
        self.servers[host].inputs.primary_conninfo = conninfo;
        let local = self.servers[host].control().await;
        let own = local.timeline.max(local.min_recovery_timeline);
        history_files::remove_unused_reservations(self.servers[host].data_dir(), own).unwrap();
        set_standby(self.servers[host].data_dir(), true).unwrap();
        self.servers[host].start().await;
        self.model_data(host).set_standby(true);
        self.model_starts(host, leader);
    }

    /// Started as a standby of `leader` as pgherd starts one that may follow, and streams.
    pub async fn follow(&mut self, host: usize, leader: usize) {
        let asked = self.servers[leader].as_leader().look(LIMIT).await.unwrap();
        history_files::bring(self.servers[host].data_dir(), &asked.history_files).unwrap();
        self.sim.bring_histories(host, leader);
        self.start_as_standby(host, Some(leader)).await;
        let streams = |facts: &SqlFacts| facts.walreceiver.as_ref().is_some_and(|receiver| receiver.status == "streaming");
        self.servers[host].until("it streams", streams).await;
        self.model_until("it streams", |sim| sim.hosts[host].server.streaming());
    }

    pub async fn start_as_primary(&mut self, host: usize) {
        set_standby(self.servers[host].data_dir(), false).unwrap();
        self.servers[host].start().await;
        self.model_data(host).set_standby(false);
        self.model_starts(host, None);
    }

    /// Started as it is, it ends before it takes connections.
    pub fn start_refused(&mut self, host: usize, upstream: Option<usize>) -> Ended {
        self.servers[host].spawn();
        let ended = self.servers[host].wait();
        let now = self.sim.now;
        self.sim.hosts[host].server.spawn(now, &mut self.sim.random, upstream);
        self.ended_alike(host, ended)
    }

    /// One transaction of a client.
    pub async fn commit(&mut self, host: usize) {
        self.servers[host].run("insert into public.t values (1)").await;
        self.model_writes(host);
    }

    pub async fn checkpoint(&mut self, host: usize) {
        self.servers[host].sql.checkpoint(LIMIT).await.unwrap();
        self.model_data(host).make_checkpoint();
        self.sim.wal_flows(host);
    }

    /// The standby has, and has replayed, all that `leader` has.
    pub async fn caught_up(&mut self, host: usize, leader: usize) {
        // Written, not inserted: after a switch of segments the next record's place is behind a page header that nobody has yet.
        let position = self.servers[leader].facts().await.receive_lsn;
        self.servers[host].until("it has all", |facts| facts.replay_lsn >= position && facts.receive_lsn >= position).await;
        self.model_until("it has all", |sim| {
            let end = |of: usize| sim.hosts[of].server.data.as_ref().map(|data| data.wal.end);
            end(host) >= end(leader)
        });
    }

    pub fn lay(&mut self, host: usize, ids: &[u32]) {
        let reserved: Vec<_> = ids.iter().map(|id| (TimelineId(*id), "another".to_owned())).collect();
        history_files::lay(self.servers[host].data_dir(), &reserved).unwrap();
        self.model_data(host).laid.extend(ids.iter().copied().map(TimelineId));
    }

    /// What is on record before a promotion under `epoch`.
    pub fn note_promotion(&mut self, host: usize, timeline: u32, epoch: i64) {
        let record = OwnPromotion { timeline: TimelineId(timeline), epoch: Epoch(epoch), parent: TimelineId(1), switch_lsn: None };
        self.servers[host].layout.promotion_file().write(&record).unwrap();
        self.sim.hosts[host].disk.promotion = Some(record);
    }

    /// Promotes, and gives the position at which it left recovery. The checkpoint that PostgreSQL then makes waits for [`Self::first_checkpoint`].
    pub async fn promote(&mut self, host: usize) -> Lsn {
        let before = self.servers[host].facts().await.replay_lsn;
        kill(self.checkpointer(host).await, Signal::SIGSTOP).unwrap();
        self.servers[host].promote().await;
        let now = self.sim.now;
        self.sim.hosts[host].server.promote(now, &mut self.sim.random, false).unwrap();
        self.sim.server_changed(host);
        self.model_until("it is out of recovery", |sim| !sim.hosts[host].server.recovering());
        before
    }

    async fn checkpointer(&self, host: usize) -> Pid {
        let pid = self.servers[host].ask("select pid::text from pg_stat_activity where backend_type = 'checkpointer'").await;
        Pid::from_raw(pid.parse().unwrap())
    }

    /// The checkpoint after a promotion.
    pub async fn first_checkpoint(&mut self, host: usize) {
        kill(self.checkpointer(host).await, Signal::SIGCONT).unwrap();
        let timeline = self.servers[host].facts().await.timeline;
        eventually_async(async || self.servers[host].control().await.timeline == timeline).await;
        self.model_until("the checkpoint is on the new timeline", |sim| {
            let data = sim.hosts[host].server.data.as_ref().unwrap();
            data.control(None).timeline == data.wal.timeline()
        });
    }

    /// The checkpoint after a promotion is never made: SIGQUIT, and the checkpointer, which stands, is killed as the postmaster would do
    /// after 5 s.
    pub async fn crash_before_first_checkpoint(&mut self, host: usize) {
        let checkpointer = self.checkpointer(host).await;
        kill(self.servers[host].pid(), Signal::SIGQUIT).unwrap();
        eventually(|| self.servers[host].log().contains("received immediate shutdown request")).await;
        kill(checkpointer, Signal::SIGKILL).unwrap();
        let ended = self.servers[host].wait();
        let now = self.sim.now;
        self.sim.hosts[host].server.immediate_stop(now, &mut self.sim.random);
        self.ended_alike(host, ended);
    }

    /// SIGINT. Gives the exit status, which is the same for both.
    pub fn stop(&mut self, host: usize) -> Ended {
        let ended = self.servers[host].stop();
        let now = self.sim.now;
        self.sim.hosts[host].server.fast_stop(now, &mut self.sim.random);
        self.ended_alike(host, ended)
    }

    /// SIGQUIT.
    pub fn crash(&mut self, host: usize) -> Ended {
        let ended = self.servers[host].crash();
        let now = self.sim.now;
        self.sim.hosts[host].server.immediate_stop(now, &mut self.sim.random);
        self.ended_alike(host, ended)
    }

    /// After both were told to end.
    pub fn ended_alike(&mut self, host: usize, real: Option<ExitStatus>) -> Ended {
        use std::os::unix::process::ExitStatusExt as _;
        let real = real.expect("it ran");
        self.sim.server_changed(host);
        self.model_until("the postmaster has ended", |sim| sim.hosts[host].server.postmaster.is_none());
        let model = self.sim.hosts[host].server.ended.pop().expect("it ran");
        assert_eq!(
            (real.code(), real.signal()),
            (model.exit_status, model.signal),
            "how the postmaster of {} ended: real and model",
            self.name(host)
        );
        model
    }

    /// What the data directory of a stopped server says, which is the same for both.
    pub async fn at_rest(&self, host: usize) -> AtRest {
        let (control, wal) = self.real_rest(host).await;
        let real = AtRest::of(&control, &wal);
        let (control, wal) = self.model_rest(host);
        let model = AtRest::of(&control, &wal);
        assert_eq!(real, model, "the data directory of {} at rest: real and model", self.name(host));
        model
    }

    async fn real_rest(&self, host: usize) -> (ControlFacts, LocalWal) {
        let server = &self.servers[host];
        let control = server.control().await;
        let wal = wal::end_of_wal(&server.installation, server.data_dir(), &control, LIMIT).await;
        (control, wal)
    }

    pub fn model_rest(&self, host: usize) -> (ControlFacts, LocalWal) {
        let this = &self.sim.hosts[host];
        let data = this.server.data.as_ref().unwrap();
        (data.control(this.disk.promotion.as_ref()), data.local_wal())
    }

    /// What a probe says of a running server, which is the same for both.
    pub async fn running(&self, host: usize) -> Running {
        let (real, model) = (Running::of(&self.servers[host].facts().await), Running::of(&self.model_facts(host)));
        assert_eq!(real, model, "what a probe sees of {}: real and model", self.name(host));
        model
    }

    pub fn model_facts(&self, host: usize) -> SqlFacts {
        match self.sim.ask_server(host, BootTime(0)).outcome {
            ProbeOutcome::Accepting(facts) => *facts,
            other => panic!("the model's {} does not take connections: {other:?}", self.name(host)),
        }
    }

    /// How a stopped member comes back under `leader`, which is the same for both.
    pub async fn judge(&self, host: usize, leader: usize, promoted_under: Option<i64>) -> Judged {
        let promoted_under = promoted_under.map(Epoch);
        let (control, wal) = self.real_rest(host).await;
        let own = self.servers[host].layout.promotion_file().read().unwrap();
        let asked = self.servers[leader].as_leader().look(LIMIT).await.unwrap();
        let real = judged(&control, &wal, own.as_ref(), promoted_under, &asked.lineage);
        let (control, wal) = self.model_rest(host);
        let own = self.sim.hosts[host].disk.promotion.clone();
        let lineage = self.sim.hosts[leader].server.lineage().unwrap();
        let model = judged(&control, &wal, own.as_ref(), promoted_under, &lineage);
        assert_eq!(real, model, "how {} comes back under {}: real and model", self.name(host), self.name(leader));
        model
    }

    /// Whether what a member has looks like, and truly is, in the other's past.
    pub fn in_the_past_of(&self, host: usize, leader: usize) -> (bool, bool) {
        let wal = |of: usize| &self.sim.hosts[of].server.data.as_ref().unwrap().wal;
        (wal(host).looks_like_the_past_of(wal(leader)), wal(host).is_in_the_past_of(wal(leader)))
    }

    fn name(&self, host: usize) -> &str {
        &self.servers[host].name
    }

    pub fn model_data(&mut self, host: usize) -> &mut Data {
        self.sim.hosts[host].server.data.as_mut().expect("it has data")
    }

    pub fn model_starts(&mut self, host: usize, upstream: Option<usize>) {
        let now = self.sim.now;
        self.sim.hosts[host].server.spawn(now, &mut self.sim.random, upstream);
        self.sim.server_changed(host);
        self.model_until("it takes connections", |sim| sim.hosts[host].server.accepting());
    }

    /// True = it was acknowledged.
    pub fn model_writes(&mut self, host: usize) -> bool {
        let now = self.sim.now;
        let done = self.sim.hosts[host].server.commit(now).is_some();
        self.sim.wal_flows(host);
        done
    }

    pub fn model_until(&mut self, what: &str, wanted: impl Fn(&Sim) -> bool) {
        let until = self.sim.now.after(secs(MODEL_S));
        while !wanted(&self.sim) {
            let next = self.sim.now.after(ms(1));
            while self.sim.step(next) {}
            assert!(self.sim.now < until, "not seen of the model that {what}: {}", self.sim.story());
        }
    }

    /// A while of the model's time in which nobody asks for anything.
    pub fn model_goes_on(&mut self, seconds: u64) {
        let until = self.sim.now.after(secs(seconds));
        while self.sim.step(until) {}
    }

    /// Started as a standby of `leader`, it never has what the leader writes: each attempt ends with these words in its log.
    pub async fn gets_nowhere(&mut self, host: usize, leader: usize, why: &str) {
        let (wanted, server) = (self.servers[leader].facts().await, &self.servers[host]);
        eventually(|| server.log().matches(why).count() >= ATTEMPTS).await;
        let facts = server.facts().await;
        assert!(facts.in_recovery && facts.timeline < wanted.timeline, "{facts:?}");
        let before = self.model_facts(host);
        self.model_goes_on(MODEL_S);
        // It may stream in that very moment, what it has and no more.
        let facts = self.model_facts(host);
        let (is_behind, moves) = (facts.timeline < wanted.timeline, facts.end_of_wal() != before.end_of_wal());
        assert!(facts.in_recovery && is_behind && !moves, "the model: {facts:?}");
    }
}

fn judged(
    control: &ControlFacts,
    wal: &LocalWal,
    own: Option<&OwnPromotion>,
    promoted_under: Option<Epoch>,
    leader: &LeaderLineage,
) -> Judged {
    // Both majors are the leader's: what is compared is the WAL.
    let control = ControlFacts { major_version: leader.major_version, ..control.clone() };
    // What is compared is what is seen to be lost, whatever is done about it.
    let rewinding = Rewinding { wanted: false, on_failure: OnRewindFailure::Reclone, obstacle: None, failures: 0 };
    let decided: Rejoin = decide(Inputs {
        local: &control,
        wal,
        own_promotion: own,
        promoted_under,
        led_before: promoted_under.is_some(),
        leader,
        rewinding: &rewinding,
    });
    Judged::of(&decided, wal, leader)
}
