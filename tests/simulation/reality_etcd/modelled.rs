//! A script played by the model, with a clock that moves only where the script lets time go by.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd::facts::cluster::{ClusterView, Initialize, LeaderKey};
use pgherd::facts::maintenance::{MaintenanceRecord, Phase};
use pgherd::facts::requests::{Ask, RequestProgress, RequestRecord};
use pgherd::types::{Epoch, LeaseId, Revision, SystemId};

use super::super::clock::{Real, ms};
use super::super::etcd::{Acquired, Etcd, Put};
use super::names::{Names, failsafe, progress, sync_by_hand};
use super::real::ELECTION;
use super::script::{Hand, Lease, Life, Said, Step, Thing};
use super::support::{name, record};

/// What a step takes.
const STEP_MS: u64 = 1;
/// Between two looks at a lease that runs out.
const LOOK_MS: u64 = 10;
/// A lease that is still there after so much more than its ttl never goes.
const NEVER_GOES_AFTER: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct Renewed {
    at: Real,
    ttl: Duration,
    extended: Duration,
}

pub struct Modelled {
    etcd: Etcd,
    names: Names,
    now: Real,
    lives: BTreeMap<LeaseId, Renewed>,
}

impl Modelled {
    pub fn new() -> Self {
        let etcd = Etcd::new();
        let view = ClusterView::clone(&etcd.view);
        Modelled { etcd, names: Names::new(view), now: Real(0), lives: BTreeMap::new() }
    }

    pub fn view(&self) -> ClusterView {
        self.names.named_view()
    }

    pub fn play(&mut self, step: &Step) -> Said {
        self.passes_until(self.now.after(ms(STEP_MS)));
        let said = self.carry_out(step);
        self.names.view = ClusterView::clone(&self.etcd.view);
        said
    }

    /// Time goes by, and etcd looks at expired leases whenever it does.
    fn passes_until(&mut self, moment: Real) {
        while self.etcd.next_tick <= moment {
            self.now = self.now.max(self.etcd.next_tick);
            self.etcd.tick(self.now);
        }
        self.now = self.now.max(moment);
    }

    fn carry_out(&mut self, step: &Step) -> Said {
        let lease_of = |lease: &Lease| self.names.lease(*lease);
        match step {
            Step::Grant { lease, ttl_s } => {
                let id = self.etcd.grant(self.now, Duration::from_secs(*ttl_s)).lease;
                self.names.was_granted(*lease, id);
                self.renewed(id)
            }
            Step::KeepAlive { lease } => self.keep_alive(lease_of(lease)),
            Step::KeepAliveLate { lease } => {
                let lease = lease_of(lease);
                if let Some(life) = self.lives.remove(&lease) {
                    self.passes_until(life.at.after(life.ttl));
                }
                self.keep_alive(lease)
            }
            Step::GrantedTtl { lease } => Said::Ttl(self.etcd.granted_ttl(lease_of(lease)).map(|ttl| ttl.as_secs())),
            Step::Revoke { lease } => {
                let id = lease_of(lease);
                self.etcd.revoke(id);
                self.lives.remove(&id);
                Said::Nothing
            }
            Step::RunOut { lease } => self.run_out(lease_of(lease)),
            Step::Halfway { lease } => {
                let life = self.lives[&lease_of(lease)];
                self.passes_until(life.at.after(life.ttl / 2));
                Said::Nothing
            }
            Step::Put { member, lease, run } => {
                let expected = self.etcd.member_revision(&name(member));
                self.put(member, lease_of(lease), *run, expected)
            }
            Step::PutOver { member, lease, run } => {
                let (member_name, id) = (name(member), lease_of(lease));
                let may = self.names.may_put_over(&member_name, id);
                let read = if may { self.names.remembered_revision(&member_name) } else { self.etcd.member_revision(&member_name) };
                self.put(member, id, *run, read)
            }
            Step::Claim { member, lease } => Said::Did(self.etcd.claim_initialize(&name(member), lease_of(lease))),
            Step::GiveUp { lease } => {
                self.etcd.give_up_initialize(lease_of(lease));
                Said::Nothing
            }
            Step::Remember => {
                self.names.remembered = ClusterView::clone(&self.etcd.view);
                Said::Nothing
            }
            Step::Acquire { member, lease, judged, initialize } => {
                match self.etcd.acquire(&self.names.ask(member, *lease, *judged, *initialize)) {
                    Acquired::Ours(lock) => {
                        self.names.was_won(lock);
                        Said::Ours(self.names.counted(Revision(lock.epoch.0)))
                    }
                    Acquired::Beaten | Acquired::SpecMoved => Said::Beaten,
                }
            }
            Step::Prove { lock, on } => {
                let mut identity = self.names.lock(*lock);
                identity.lease.lease = on.map_or(identity.lease.lease, |on| self.names.lease(on));
                Said::Did(self.etcd.proves(identity))
            }
            Step::ByHand(hand) => {
                self.by_hand(*hand);
                Said::Nothing
            }
            Step::LeaderMoves | Step::LeaderKilled => {
                let before = self.etcd.term;
                self.etcd.elected(self.now);
                for life in self.lives.values_mut() {
                    (life.at, life.extended) = (self.now, ELECTION);
                }
                Said::TermRose(self.etcd.term > before)
            }
            write => self.write(write),
        }
    }

    fn write(&mut self, step: &Step) -> Said {
        let names = &self.names;
        match step {
            Step::Status { lock, lsn } => Said::Did(self.etcd.write_status(names.status(*lock, *lsn))),
            Step::RecordPromotion { lock } => Said::Did(self.etcd.record_promotion(names.epoch(*lock), names.promoted(*lock))),
            Step::Failsafe { lock, judged, members } => {
                let judged_on = names.judged(*judged).failsafe_revision;
                let at = self.etcd.write_failsafe(names.epoch(*lock), judged_on, failsafe(members));
                Said::At(at.map(|revision| names.counted(revision)))
            }
            Step::Release { lock, record } => {
                let as_read = self.etcd.leader_revision;
                Said::Did(self.etcd.release(names.epoch(*lock), as_read, record.then(|| names.release(*lock)).as_ref()))
            }
            Step::Reaffirm { member, lock } => Said::Did(self.etcd.reaffirm(names.epoch(*lock), &name(member))),
            Step::Move { member, lock, from, to } => {
                let lock = lock.map(|lock| names.epoch(lock));
                Said::Did(self.etcd.move_to_lease(&name(member), record(1), lock, names.lease(*from), names.lease(*to)))
            }
            Step::Ask { request, ttl_s } => {
                let ask = Ask::Switchover { to: name("b") };
                let asked = RequestRecord { ask, by: "x@h".to_owned(), at: String::new(), progress: RequestProgress::Created };
                let id = self.etcd.create_request(self.now, Duration::from_secs(*ttl_s), asked);
                let lease = LeaseId(i64::from_str_radix(&id, 16).unwrap());
                self.names.was_granted(*request, lease);
                self.renewed(lease);
                Said::Nothing
            }
            Step::Answer { request, judged, word } => {
                let id = names.request(*request);
                let judged_on = names.judged(*judged).requests.get(&id).map_or_else(Default::default, |key| key.mod_revision);
                Said::Did(self.etcd.answer_request(&id, judged_on, progress(word)))
            }
            Step::ClearRequest { request } => {
                let id = names.request(*request);
                self.etcd.delete_by_hand(|keys| drop(keys.requests.remove(&id)));
                Said::Nothing
            }
            other => panic!("{other:?} is no write"),
        }
    }

    fn renewed(&mut self, lease: LeaseId) -> Said {
        let ttl = self.etcd.granted_ttl(lease).expect("it was granted just now");
        self.lives.insert(lease, Renewed { at: self.now, ttl, extended: Duration::ZERO });
        Said::Ttl(Some(ttl.as_secs()))
    }

    fn keep_alive(&mut self, lease: LeaseId) -> Said {
        match self.etcd.keep_alive(self.now, lease) {
            Some(_) => self.renewed(lease),
            None => {
                self.lives.remove(&lease);
                Said::Ttl(None)
            }
        }
    }

    fn run_out(&mut self, lease: LeaseId) -> Said {
        let Some(life) = self.lives.remove(&lease) else { return Said::RanOut(None) };
        let ends = life.at.after(life.ttl + NEVER_GOES_AFTER);
        while self.etcd.lease_until(lease).is_some() && self.now < ends {
            self.passes_until(self.now.after(ms(LOOK_MS)));
        }
        let lived = self.now.since(life.at);
        Said::RanOut(Some(Life { promised: life.ttl + life.extended, least: lived, most: lived }))
    }

    fn put(&mut self, member: &str, lease: LeaseId, run: u64, expected: Revision) -> Said {
        match self.etcd.put_member(&name(member), record(run), lease, expected) {
            Put::Written => Said::Written,
            Put::Foreign(lease) => Said::Foreign(self.names.number(lease)),
            Put::Moved => Said::Moved,
            Put::NoLease => Said::NoLease,
        }
    }

    fn by_hand(&mut self, hand: Hand) {
        match hand {
            Hand::Delete(thing) => self.etcd.delete_by_hand(|keys| delete(keys, thing)),
            Hand::Wipe => self.etcd.wipe(),
            Hand::PutLeader { holder, on } => {
                let lease = on.map_or(LeaseId(0), |on| self.names.lease(on));
                if on.is_some() && self.etcd.lease_until(lease).is_none() {
                    return;
                }
                self.etcd.by_hand(|keys, revision| {
                    let epoch = keys.leader.as_ref().map_or(Epoch(revision.0), |leader| leader.epoch);
                    keys.leader = Some(LeaderKey { holder: holder.to_owned(), epoch, lease, mod_revision: revision });
                });
            }
            Hand::PutSync => self.etcd.by_hand(|keys, revision| (keys.sync, keys.sync_revision) = (Some(sync_by_hand()), revision)),
            Hand::PutInitialize(id) => self.etcd.by_hand(|keys, _| keys.initialize = Some(Initialize::Done(SystemId(id)))),
            Hand::Pause => {
                let (by, why) = ("x".to_owned(), "y".to_owned());
                let record = MaintenanceRecord { by, why, at: String::new(), until: None, phase: Phase::On };
                self.etcd.by_hand(|keys, revision| (keys.maintenance, keys.maintenance_revision) = (Some(record), revision));
            }
        }
    }
}

fn delete(keys: &mut ClusterView, thing: Thing) {
    match thing {
        Thing::Leader => keys.leader = None,
        Thing::Member(member) => drop(keys.members.remove(&name(member))),
        Thing::Release => keys.release = None,
        Thing::Status => keys.status = None,
        Thing::Sync => (keys.sync, keys.sync_revision) = (None, Revision(0)),
        Thing::Failsafe => (keys.failsafe, keys.failsafe_revision) = (None, Revision(0)),
        Thing::Initialize => keys.initialize = None,
        Thing::History => (keys.history, keys.history_revision) = (Vec::new(), Revision(0)),
        Thing::Maintenance => (keys.maintenance, keys.maintenance_revision) = (None, Revision(0)),
    }
}
