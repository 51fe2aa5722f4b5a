//! A script played by the daemon's own edge against real servers. What the edge has no call for goes through a client without any of its
//! care: keepalive and proof as the lease's thread sends them, and what somebody does with `etcdctl`.
//!
//! Nothing is asserted about how long anything takes. Each lease's shortest possible end is kept, and once the clock has passed one, what
//! the server says is not compared any more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use etcd_client::{Client, Compare, CompareOp, DeleteOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use pgherd::etcd::keys::Key;
use pgherd::etcd::{AcquireRequest, Acquisition, Etcd, EtcdError, Fenced, Moved, PutMember, Released, Settings};
use pgherd::facts::cluster::MemberRecord;
use pgherd::facts::requests::Ask;
use pgherd::types::{LeaseId, MemberName, SystemId};

use super::names::{Names, failsafe, progress, sync_by_hand};
use super::script::{Hand, Lease, Life, Lock, Said, Step, Thing};
use super::support::etcd_server::{EtcdServer, PATIENCE};
use super::support::{name, record};

/// Between two looks at a lease that runs out.
const LOOK_MS: u64 = 20;
/// What etcd adds to each lease when its leader changes: one election.
pub const ELECTION: Duration = Duration::from_secs(1);

/// When a lease was last renewed, as seen from here.
#[derive(Debug, Clone, Copy)]
struct Renewed {
    sent: Instant,
    heard: Instant,
    ttl: Duration,
    /// Of the leader that the lease has outlived.
    extended: Duration,
}

pub struct Real<'a> {
    server: &'a EtcdServer,
    cluster: String,
    etcd: Etcd,
    stranger: Client,
    names: Names,
    lives: BTreeMap<LeaseId, Renewed>,
    /// A lease may have run out that the script did not mean to.
    pub lost_the_race: bool,
    /// What the edge answered, by the names of the edge.
    pub met: BTreeSet<String>,
}

impl<'a> Real<'a> {
    pub async fn new(server: &'a EtcdServer, cluster: &str) -> Real<'a> {
        let etcd = edge(server, cluster);
        let view = etcd.read_view().await.unwrap();
        Real {
            server,
            cluster: cluster.to_owned(),
            etcd,
            stranger: server.stranger().await,
            names: Names::new(view),
            lives: BTreeMap::new(),
            lost_the_race: false,
            met: BTreeSet::new(),
        }
    }

    pub fn view(&self) -> pgherd::facts::cluster::ClusterView {
        self.names.named_view()
    }

    /// Leaves nothing behind that could write later.
    pub async fn end(&self) {
        for lease in self.names.granted() {
            self.etcd.revoke(*lease).await.unwrap();
        }
    }

    pub async fn play(&mut self, step: &Step) -> Said {
        let said = self.carry_out(step).await;
        self.look().await;
        let now = Instant::now();
        self.lost_the_race |= self.lives.values().any(|life| life.sent + life.ttl <= now);
        said
    }

    async fn look(&mut self) {
        self.names.view = self.etcd.read_view().await.unwrap();
    }

    fn meet(&mut self, what: impl Debug) {
        self.met.insert(format!("{what:?}"));
    }

    async fn carry_out(&mut self, step: &Step) -> Said {
        let lease_of = |lease: &Lease| self.names.lease(*lease);
        match step {
            Step::Grant { lease, ttl_s } => self.grant(*lease, *ttl_s).await,
            Step::KeepAlive { lease } => self.keep_alive(*lease).await,
            Step::KeepAliveLate { lease } => self.keep_alive_late(*lease).await,
            Step::GrantedTtl { lease } => Said::Ttl(self.etcd.granted_ttl(lease_of(lease)).await.unwrap().map(|(ttl, _)| ttl.as_secs())),
            Step::Revoke { lease } => {
                let id = lease_of(lease);
                self.etcd.revoke(id).await.unwrap();
                self.lives.remove(&id);
                Said::Nothing
            }
            Step::RunOut { lease } => self.run_out(*lease).await,
            Step::Halfway { lease } => {
                let life = self.lives[&lease_of(lease)];
                reached(life.heard + life.ttl / 2).await;
                Said::Nothing
            }
            Step::Put { member, lease, run } => self.put(&name(member), lease_of(lease), *run).await,
            Step::PutOver { member, lease, run } => {
                let (member, lease) = (name(member), lease_of(lease));
                if self.names.may_put_over(&member, lease) {
                    self.put_over(&member, lease, *run).await
                } else {
                    self.put(&member, lease, *run).await
                }
            }
            Step::Claim { member, lease } => Said::Did(self.etcd.claim_initialize(&name(member), lease_of(lease)).await.unwrap()),
            Step::GiveUp { lease } => {
                self.etcd.give_up_initialize(lease_of(lease)).await.unwrap();
                Said::Nothing
            }
            Step::Remember => {
                self.names.remembered = self.names.view.clone();
                Said::Nothing
            }
            Step::Acquire { member, lease, judged, initialize } => self.acquire(self.names.ask(member, *lease, *judged, *initialize)).await,
            Step::Prove { lock, on } => self.prove(*lock, *on).await,
            Step::ByHand(hand) => {
                self.by_hand(*hand).await;
                Said::Nothing
            }
            Step::LeaderMoves => self.leader_moves().await,
            Step::LeaderKilled => self.leader_is_killed().await,
            write => self.write(write).await,
        }
    }

    /// What a leader writes, and what becomes of requests.
    async fn write(&mut self, step: &Step) -> Said {
        let names = &self.names;
        match step {
            Step::Status { lock, lsn } => {
                let status = names.status(*lock, *lsn);
                Said::Did(self.etcd.write_status(status.epoch, &status).await.unwrap() == Fenced::Written)
            }
            Step::RecordPromotion { lock } => {
                let written = self.etcd.record_promotion(names.epoch(*lock), &names.promoted(*lock)).await.unwrap();
                Said::Did(written == Fenced::Written)
            }
            Step::Failsafe { lock, judged, members } => {
                let judged_on = names.judged(*judged).failsafe_revision;
                let record = failsafe(members);
                let at = self.etcd.write_failsafe(names.epoch(*lock), judged_on, record.as_ref()).await.unwrap();
                Said::At(at.map(|revision| names.counted(revision)))
            }
            Step::Release { lock, record } => {
                let left = record.then(|| names.release(*lock));
                match self.etcd.release(names.epoch(*lock), None, left.as_ref()).await {
                    Ok(released) => Said::Did(released == Released::Released),
                    // It was read back, and is there: in maintenance mode nothing is given back.
                    Err(EtcdError::Unknown(_)) => Said::Did(false),
                    Err(other) => panic!("{other}"),
                }
            }
            Step::Reaffirm { member, lock } => Said::Did(self.etcd.reaffirm(names.epoch(*lock), &name(member)).await.unwrap().is_some()),
            Step::Move { member, lock, from, to } => {
                let lock = lock.map(|lock| names.epoch(lock));
                let (from, to) = (names.lease(*from), names.lease(*to));
                match self.etcd.move_to_lease(&name(member), &record(1), lock, from, to).await {
                    Ok(moved) => Said::Did(moved == Moved::Moved),
                    // Nothing was written, and that is all the model says.
                    Err(EtcdError::LeaseNotFound) => Said::Did(false),
                    Err(e) => panic!("{e}"),
                }
            }
            Step::Ask { request, ttl_s } => {
                let (sent, ttl) = (Instant::now(), Duration::from_secs(*ttl_s));
                let id = self.etcd.create_request(Ask::Switchover { to: name("b") }, "x@h", ttl).await.unwrap();
                let lease = LeaseId(i64::from_str_radix(&id, 16).unwrap());
                self.was_granted(*request, lease, sent, ttl);
                Said::Nothing
            }
            Step::Answer { request, judged, word } => {
                let id = names.request(*request);
                let judged_on = names.judged(*judged).requests.get(&id).map_or_else(Default::default, |key| key.mod_revision);
                Said::Did(self.etcd.update_request(&id, judged_on, progress(word)).await.unwrap())
            }
            Step::ClearRequest { request } => {
                self.etcd.delete_request(&names.request(*request)).await.unwrap();
                Said::Nothing
            }
            other => panic!("{other:?} is no write"),
        }
    }

    fn was_granted(&mut self, lease: Lease, id: LeaseId, sent: Instant, ttl: Duration) {
        self.names.was_granted(lease, id);
        self.lives.insert(id, Renewed { sent, heard: Instant::now(), ttl, extended: Duration::ZERO });
    }

    async fn grant(&mut self, lease: Lease, ttl_s: u64) -> Said {
        let sent = Instant::now();
        let granted = self.stranger.lease_grant(i64::try_from(ttl_s).unwrap(), None).await.unwrap();
        let ttl = u64::try_from(granted.ttl()).unwrap();
        self.was_granted(lease, LeaseId(granted.id()), sent, Duration::from_secs(ttl));
        Said::Ttl(Some(ttl))
    }

    /// As the lease's thread does it: the answer that opens the stream counts only when it says that there is no such lease.
    async fn keep_alive(&mut self, lease: Lease) -> Said {
        let id = self.names.lease(lease);
        let sent = Instant::now();
        let asked = async {
            let (mut keeper, mut answers) = match self.stranger.lease_keep_alive(id.0).await {
                Ok(opened) => opened,
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => return None,
                Err(e) => panic!("{e}"),
            };
            keeper.keep_alive().await.unwrap();
            let answer = answers.message().await.unwrap().expect("the stream is open");
            u64::try_from(answer.ttl()).ok().filter(|ttl| *ttl > 0)
        };
        let renewed = tokio::time::timeout(PATIENCE, asked).await.expect("no answer to a keepalive");
        match renewed {
            Some(ttl) => {
                let ttl = Duration::from_secs(ttl);
                self.lives.insert(id, Renewed { sent, heard: Instant::now(), ttl, extended: Duration::ZERO });
            }
            None => {
                self.lives.remove(&id);
            }
        }
        Said::Ttl(renewed)
    }

    async fn keep_alive_late(&mut self, lease: Lease) -> Said {
        if let Some(life) = self.lives.remove(&self.names.lease(lease)) {
            reached(life.heard + life.ttl).await;
        }
        self.keep_alive(lease).await
    }

    /// Looks until the lease and all that hangs on it are gone.
    async fn run_out(&mut self, lease: Lease) -> Said {
        let id = self.names.lease(lease);
        let Some(life) = self.lives.remove(&id) else { return Said::RanOut(None) };
        let hung = self.names.hang_on(id);
        let mut least = Duration::ZERO;
        let mut again = tokio::time::interval(Duration::from_millis(LOOK_MS));
        loop {
            let looked = Instant::now();
            assert!(looked < life.heard + life.ttl + PATIENCE, "a lease of {:?} is still there", life.ttl);
            self.look().await;
            let (hangs, known) = (self.names.hang_on(id), self.etcd.granted_ttl(id).await.unwrap().is_some());
            if hangs == hung && known {
                least = looked.saturating_duration_since(life.heard);
            } else if hangs == 0 && !known {
                return Said::RanOut(Some(Life { promised: life.ttl + life.extended, least, most: life.sent.elapsed() }));
            }
            again.tick().await;
        }
    }

    async fn put(&mut self, member: &MemberName, lease: LeaseId, run: u64) -> Said {
        match self.etcd.put_member(member, &record(run), lease).await {
            Ok(PutMember::Written) => Said::Written,
            Ok(PutMember::Foreign { lease, .. }) => Said::Foreign(self.names.number(lease)),
            Err(EtcdError::LeaseNotFound) => Said::NoLease,
            Err(e) => panic!("{e}"),
        }
    }

    /// The edge's own transaction, with what it would have read a while ago.
    async fn put_over(&mut self, member: &MemberName, lease: LeaseId, run: u64) -> Said {
        let path = self.etcd.keys().path(&Key::Member(member.clone()));
        let expected = self.names.remembered_revision(member).0;
        let txn = Txn::new()
            .when([Compare::mod_revision(path.clone(), CompareOp::Equal, expected)])
            .and_then([TxnOp::put(path.clone(), serde_json::to_vec(&record(run)).unwrap(), Some(PutOptions::new().with_lease(lease.0)))])
            .or_else([TxnOp::get(path, None)]);
        let response = match self.stranger.txn(txn).await {
            Ok(response) if response.succeeded() => return Said::Written,
            Ok(response) => response,
            Err(e) if no_lease(&e) => return Said::NoLease,
            Err(e) => panic!("{e}"),
        };
        let Some(TxnOpResponse::Get(found)) = response.op_responses().pop() else { panic!("it asked for the key") };
        let said = |record: MemberRecord| record == super::support::record(run);
        match found.kvs().first() {
            Some(kv) if kv.lease() != lease.0 => Said::Foreign(self.names.number(LeaseId(kv.lease()))),
            Some(kv) if serde_json::from_slice(kv.value()).is_ok_and(said) => Said::Written,
            _ => Said::Moved,
        }
    }

    async fn acquire(&mut self, request: AcquireRequest) -> Said {
        let acquired = self.etcd.acquire(&request).await.unwrap();
        match acquired {
            Acquisition::Acquired(lock) => {
                self.met.insert("Acquired".to_owned());
                self.names.was_won(lock);
                Said::Ours(self.names.counted(pgherd::types::Revision(lock.epoch.0)))
            }
            Acquisition::Beaten(why) => {
                // Without what is inside.
                let why = format!("{why:?}");
                self.met.insert(why.split([' ', '(']).next().unwrap_or_default().to_owned());
                Said::Beaten
            }
            Acquisition::Unknown(why) => panic!("{why}"),
        }
    }

    async fn prove(&mut self, lock: Lock, on: Option<Lease>) -> Said {
        let identity = self.names.lock(lock);
        let lease = on.map_or(identity.lease.lease, |on| self.names.lease(on));
        let keys = self.etcd.keys();
        let ours = [
            Compare::create_revision(keys.leader(), CompareOp::Equal, identity.epoch.0),
            Compare::lease(keys.leader(), CompareOp::Equal, lease.0),
        ];
        let otherwise = [TxnOp::get(keys.leader(), None), TxnOp::delete(keys.never(), None)];
        let proof = self.stranger.txn(Txn::new().when(ours).or_else(otherwise)).await.unwrap().succeeded();
        self.meet(("proof", proof));
        Said::Did(proof)
    }

    async fn by_hand(&mut self, hand: Hand) {
        let keys = self.etcd.keys();
        let put = match hand {
            Hand::Delete(thing) => {
                self.stranger.delete(keys.path(&key(thing)), None).await.unwrap();
                return;
            }
            Hand::Wipe => {
                self.stranger.delete(keys.base(), Some(DeleteOptions::new().with_prefix())).await.unwrap();
                return;
            }
            Hand::PutLeader { holder, on } => {
                let options = on.map(|on| PutOptions::new().with_lease(self.names.lease(on).0));
                (Key::Leader, holder.to_owned(), options)
            }
            Hand::PutSync => (Key::Sync, serde_json::to_string(&sync_by_hand()).unwrap(), None),
            Hand::PutInitialize(id) => (Key::Initialize, SystemId(id).to_string(), None),
            Hand::Pause => (Key::Maintenance, "{\"by\":\"x\",\"why\":\"y\",\"until\":null}".to_owned(), None),
        };
        let (key, value, options) = put;
        // Onto a lease that is gone nothing is put, also not by hand.
        match self.stranger.put(keys.path(&key), value, options).await {
            Ok(_) => {}
            Err(e) if no_lease(&e) => {}
            Err(e) => panic!("{e}"),
        }
    }

    async fn term(&mut self) -> u64 {
        self.stranger.status().await.unwrap().raft_term()
    }

    /// Every lease begins anew, and an election later.
    fn led_anew(&mut self, sent: Instant) {
        let heard = Instant::now();
        for life in self.lives.values_mut() {
            (life.sent, life.heard, life.extended) = (sent, heard, ELECTION);
        }
    }

    async fn leader_moves(&mut self) -> Said {
        let before = self.term().await;
        let leader = self.server.leader().await;
        let endpoints = self.server.endpoints();
        let mut of_leader = Client::connect([&endpoints[leader]], None).await.unwrap();
        let mut of_next = Client::connect([&endpoints[(leader + 1) % endpoints.len()]], None).await.unwrap();
        let next = of_next.status().await.unwrap().header().unwrap().member_id();
        let sent = Instant::now();
        of_leader.move_leader(next).await.unwrap();
        self.after_election(sent, before).await
    }

    async fn leader_is_killed(&mut self) -> Said {
        let before = self.term().await;
        let leader = self.server.leader().await;
        let sent = Instant::now();
        self.server.kill(leader);
        self.server.start_member(leader);
        self.after_election(sent, before).await
    }

    async fn after_election(&mut self, sent: Instant, before: u64) -> Said {
        self.server.wait_ready().await;
        // Connections may lead to the one that was killed.
        (self.etcd, self.stranger) = (edge(self.server, &self.cluster), self.server.stranger().await);
        self.look().await;
        self.led_anew(sent);
        Said::TermRose(self.term().await > before)
    }
}

fn edge(server: &EtcdServer, cluster: &str) -> Etcd {
    Etcd::new(Settings { cluster: cluster.parse().unwrap(), ..server.settings() }).unwrap()
}

fn key(thing: Thing) -> Key {
    match thing {
        Thing::Leader => Key::Leader,
        Thing::Member(member) => Key::Member(name(member)),
        Thing::Release => Key::Release,
        Thing::Status => Key::Status,
        Thing::Sync => Key::Sync,
        Thing::Failsafe => Key::Failsafe,
        Thing::Initialize => Key::Initialize,
        Thing::History => Key::History,
        Thing::Maintenance => Key::Maintenance,
    }
}

/// As the edge tells it.
fn no_lease(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.code() == tonic::Code::NotFound)
}

/// Until the clock shows it: nothing in etcd says that half a ttl is over, or all of one.
async fn reached(moment: Instant) {
    let mut again = tokio::time::interval(Duration::from_millis(LOOK_MS));
    while Instant::now() < moment {
        again.tick().await;
    }
}
