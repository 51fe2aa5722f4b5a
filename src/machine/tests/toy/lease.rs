//! A toy lease's thread: renewals, and, while etcd cannot be asked, calls to the others. They are answered at once.

use crate::clock::BootTime;
use crate::facts::failsafe::{Armed, PromiseAsk};
use crate::facts::lease::{LeaseEvent, LeaseLoss};
use crate::machine::event::Event;
use crate::machine::tests::fixtures::{ms, times};
use crate::types::{LeaseIdentity, LockIdentity, MemberName};

use super::{STEP_MS, Toy};

#[derive(Default)]
pub(super) struct ToyLease {
    pub(super) held: Option<(LeaseIdentity, Option<LockIdentity>)>,
    pub(super) next_at: BootTime,
    pub(super) wanted: bool,
    pub(super) silent: bool,
    pub(super) armed: Option<Armed>,
    /// Send time of the last proof, or of the last promises.
    pub(super) proved: BootTime,
}

impl Toy {
    /// The lease's thread.
    pub(super) fn keep_lease(&mut self, member: &MemberName) {
        let (now, reaches) = (self.now, self.reaches_etcd(member));
        let Some(host) = self.hosts.get_mut(member) else { return };
        let Some(daemon) = &mut host.daemon else { return };
        let due = !daemon.lease.silent && now >= daemon.lease.next_at;
        let event = match daemon.lease.held {
            Some((identity, lock)) if due => {
                daemon.lease.next_at = now + times().renewal_interval();
                if !reaches {
                    let armed = daemon.lease.armed.clone().filter(|armed| lock == Some(armed.lock));
                    let in_time = now < times().deadlines(daemon.lease.proved).fast_stop_at;
                    if let Some(armed) = armed.filter(|_| in_time) {
                        return go_on_by_promises(self, member, &armed);
                    }
                    LeaseEvent::Failed { why: "etcd cannot be asked".to_owned() }
                } else if !self.etcd.keep_alive(identity.lease) {
                    daemon.lease.held = None;
                    LeaseEvent::Lost { why: LeaseLoss::LeaseNotFound }
                } else {
                    match lock {
                        None => LeaseEvent::Renewed { sent: now, until: now + times().validity() },
                        Some(lock) if !self.etcd.proves(lock) => {
                            daemon.lease.held = Some((identity, None));
                            LeaseEvent::Lost { why: LeaseLoss::LockNotOurs(lock) }
                        }
                        Some(lock) if host.server.acknowledge(lock, now, times()) => {
                            daemon.lease.proved = now;
                            LeaseEvent::Proved { lock, sent: now, until: now + times().validity() }
                        }
                        Some(_) => {
                            daemon.lease.silent = true;
                            LeaseEvent::GuardSilent
                        }
                    }
                }
            }
            None if daemon.lease.wanted && reaches => {
                let identity = self.etcd.grant();
                daemon.lease.wanted = false;
                daemon.lease.held = Some((identity, None));
                daemon.lease.next_at = now + times().renewal_interval();
                if let Some(guard) = &mut host.server.guard {
                    guard.lease = Some(identity);
                }
                LeaseEvent::Granted { identity, ttl: times().ttl, sent: now }
            }
            Some(_) | None => return,
        };
        daemon.inbox.push((now + ms(STEP_MS), Event::Lease(event)));
    }
}

/// All are called, whatever the first of them answers.
fn go_on_by_promises(toy: &mut Toy, caller: &MemberName, armed: &Armed) {
    let sent = toy.now;
    let promised = armed.peers.keys().filter(|peer| promises(toy, caller, armed, peer)).count();
    let Some(host) = toy.hosts.get_mut(caller) else { return };
    let Some(daemon) = &mut host.daemon else { return };
    let event = if promised < armed.peers.len() {
        LeaseEvent::Failed { why: "not everybody promised".to_owned() }
    } else if host.server.acknowledge(armed.lock, sent, times()) {
        daemon.lease.proved = sent;
        LeaseEvent::Sustained { lock: armed.lock, sent, until: sent + times().validity() }
    } else {
        daemon.lease.silent = true;
        LeaseEvent::GuardSilent
    };
    daemon.inbox.push((sent + ms(STEP_MS), Event::Lease(event)));
}

fn promises(toy: &mut Toy, caller: &MemberName, armed: &Armed, peer: &MemberName) -> bool {
    let runs = toy.hosts.get(peer).is_some_and(|host| host.daemon.is_some());
    if !runs || toy.cut.contains(&(caller.clone(), peer.clone())) {
        return false;
    }
    toy.tokens += 1;
    let (id, received) = (toy.tokens, toy.now);
    let ask = PromiseAsk {
        cluster: "main".parse().unwrap(),
        to: peer.clone(),
        member: caller.clone(),
        epoch: armed.lock.epoch,
        lease: armed.lock.lease.lease,
        ttl_s: times().ttl.as_secs(),
    };
    toy.deliver(peer, Event::PromiseAsked { id, ask, received });
    toy.answers.remove(&id).is_some_and(|answer| answer.is_ok())
}
