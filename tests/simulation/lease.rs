//! The lease's thread: the crate's own book, and a renewal that is a keepalive, its proof and the guard's acknowledgement, in this order.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use pgherd::clock::BootTime;
use pgherd::facts::failsafe::PromiseAsk;
use pgherd::facts::lease::LeaseEvent;
use pgherd::guard::protocol::Refusal;
use pgherd::machine::action::LeaseOrder;
use pgherd::machine::event::Event;
use pgherd::policy::deadlines::LeaseTimes;
use pgherd::policy::renewal::{Book, Step};
use pgherd::types::{Epoch, LeaseIdentity, LockIdentity, MemberName};

use super::clock::ms;
use super::guard::{AskError, AskedBy, GuardAsk};
use super::mutants::{Mutant, mutant};
use super::network::{Caller, EtcdAnswer, EtcdAsk, REQUEST_TIMEOUT_MS};
use super::world::{DaemonDue, Sim};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Order(LeaseOrder),
    ChangeTimes(LeaseTimes),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Only to an endpoint that was heard just before.
    HearFirst,
    KeepAlive,
    Prove {
        term: u64,
        ttl: Duration,
    },
    /// "No such lease" is not believed while the lock hangs on it.
    Confirm,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Doing {
    Nothing,
    Granting {
        call: u64,
        sent: BootTime,
    },
    Renewing {
        call: u64,
        stage: Stage,
        lease: LeaseIdentity,
        lock: Option<LockIdentity>,
        sent: BootTime,
    },
    /// Etcd could not be asked: the others are, whether they leave the lock to us.
    Calling {
        round: u64,
        lock: LockIdentity,
        sent: BootTime,
        waits_for: BTreeSet<MemberName>,
    },
    Acknowledging {
        lock: LockIdentity,
        sent: BootTime,
        by_promises: bool,
    },
}

pub struct LeaseThread {
    pub book: Book,
    pub commands: VecDeque<Command>,
    doing: Doing,
    token: u64,
}

impl LeaseThread {
    pub fn new(times: LeaseTimes) -> Self {
        LeaseThread { book: Book::new(times), commands: VecDeque::new(), doing: Doing::Nothing, token: 0 }
    }
}

impl Sim {
    fn lease_thread(&mut self, host: usize) -> Option<&mut LeaseThread> {
        self.hosts[host].daemon.as_mut()?.lease.as_mut()
    }

    pub fn lease_command(&mut self, host: usize, command: Command) {
        let Some(thread) = self.lease_thread(host) else { return };
        thread.commands.push_back(command);
        self.lease_turn(host);
    }

    fn lease_says(&mut self, host: usize, event: Option<LeaseEvent>) {
        if let Some(event) = event {
            self.fact(host, Event::Lease(event));
        }
    }

    /// One turn of the thread's loop, whenever it may have something to do.
    pub fn lease_turn(&mut self, host: usize) {
        loop {
            let now = self.local(host);
            let Some(thread) = self.lease_thread(host) else { return };
            if thread.doing != Doing::Nothing {
                return;
            }
            if let Some(command) = thread.commands.pop_front() {
                let said = obey(&mut thread.book, command, now);
                self.lease_says(host, said);
                continue;
            }
            thread.book.expire(now);
            thread.token += 1;
            let token = thread.token;
            match thread.book.next(now) {
                Step::Idle => {}
                Step::WaitUntil(at) => self.daemon_at_local(host, at, DaemonDue::LeaseWake { token }),
                Step::Renew { lease, lock, budget, hear_first } => self.begin_renewal(host, lease, lock, budget, hear_first),
                Step::Grant { ttl, budget } => {
                    let patience = budget.max(ms(REQUEST_TIMEOUT_MS));
                    let call = self.call(host, Caller::Lease, EtcdAsk::Grant { ttl }, patience);
                    if let Some(thread) = self.lease_thread(host) {
                        thread.doing = Doing::Granting { call, sent: now };
                    }
                }
            }
            return;
        }
    }

    fn begin_renewal(&mut self, host: usize, lease: LeaseIdentity, lock: Option<LockIdentity>, budget: Duration, hear_first: bool) {
        let now = self.local(host);
        let Some(thread) = self.lease_thread(host) else { return };
        thread.book.begun(now);
        let token = thread.token;
        let (stage, ask) = match lock.filter(|_| hear_first) {
            Some(lock) => (Stage::HearFirst, EtcdAsk::Prove { lock }),
            None => (Stage::KeepAlive, EtcdAsk::KeepAlive { lease: lease.lease, sent: now }),
        };
        let call = self.call(host, Caller::Lease, ask, budget * 4);
        if let Some(thread) = self.lease_thread(host) {
            thread.doing = Doing::Renewing { call, stage, lease, lock, sent: now };
        }
        self.daemon_at_local(host, now + budget, DaemonDue::LeaseBudget { token });
        if lock.is_some() {
            self.freeze_in_renewal(host, budget * 10);
        }
    }

    pub fn lease_wake(&mut self, host: usize, token: u64) {
        if self.lease_thread(host).is_some_and(|thread| thread.token == token) {
            self.lease_turn(host);
        }
    }

    /// a is over: whatever has not come does not count any more.
    pub fn lease_budget(&mut self, host: usize, token: u64) {
        let Some(thread) = self.lease_thread(host) else { return };
        if thread.token == token && matches!(thread.doing, Doing::Renewing { .. }) {
            self.renewal_failed(host, "no answer within the budget");
        }
    }

    fn renewal_failed(&mut self, host: usize, why: &str) {
        if let Some(thread) = self.lease_thread(host) {
            thread.doing = Doing::Nothing;
        }
        self.lease_says(host, Some(LeaseEvent::Failed { why: why.to_owned() }));
        if !self.calls_peers(host) {
            self.lease_turn(host);
        }
    }

    /// Failsafe: every peer is called at once, within a budget. False = the lock may not go on that way.
    fn calls_peers(&mut self, host: usize) -> bool {
        let sent = self.local(host);
        self.ids += 1;
        let id = self.ids;
        let Some(thread) = self.lease_thread(host) else { return false };
        let Some(round) = thread.book.round(sent) else { return false };
        let lock = round.armed.lock;
        let mut waits_for: BTreeSet<MemberName> = round.armed.peers.keys().cloned().collect();
        if mutant(Mutant::MajorityOfPromises) && waits_for.len() > 1 {
            waits_for.pop_first();
        }
        thread.doing = Doing::Calling { round: id, lock, sent, waits_for: waits_for.clone() };
        let run = self.hosts[host].daemon.as_ref().map_or(0, |daemon| daemon.run);
        let member = self.hosts[host].name.clone();
        self.daemon_later(host, run, round.budget, DaemonDue::PromisesOver { round: id });
        for to in waits_for.clone() {
            let cluster = "main".parse().expect("a cluster's name");
            let (epoch, lease, ttl_s) = (lock.epoch, lock.lease.lease, round.ttl.as_secs());
            let ask = PromiseAsk { cluster, to: to.clone(), member: member.clone(), epoch, lease, ttl_s };
            self.call_peer(host, run, id, to, ask);
        }
        if waits_for.is_empty() {
            self.all_promised(host);
        }
        true
    }

    /// One answer to a round of calls.
    pub fn promise_heard(&mut self, host: usize, round: u64, from: &MemberName, promised: bool) {
        let Some(thread) = self.lease_thread(host) else { return };
        let Doing::Calling { round: ours, waits_for, .. } = &mut thread.doing else { return };
        if *ours != round {
            return;
        }
        if !promised {
            return self.promises_over(host, round);
        }
        waits_for.remove(from);
        if waits_for.is_empty() {
            self.all_promised(host);
        }
    }

    /// Somebody does not promise, or not in time.
    pub fn promises_over(&mut self, host: usize, round: u64) {
        let Some(thread) = self.lease_thread(host) else { return };
        if matches!(&thread.doing, Doing::Calling { round: ours, .. } if *ours == round) {
            thread.doing = Doing::Nothing;
            self.lease_says(host, Some(LeaseEvent::Failed { why: "not every member promised".to_owned() }));
            self.lease_turn(host);
        }
    }

    fn all_promised(&mut self, host: usize) {
        let now = self.local(host);
        let Some(thread) = self.lease_thread(host) else { return };
        let Doing::Calling { lock, sent, .. } = thread.doing.clone() else { return };
        let times = thread.book.held_times();
        let counted = if mutant(Mutant::PromiseFromTheAnswer) { now } else { sent };
        thread.doing = Doing::Acknowledging { lock, sent: counted, by_promises: true };
        self.promises_hold(host, sent + times.validity());
        self.guard_ask(host, GuardAsk::Lock { identity: lock, sent: counted, times }, AskedBy::Lease, times.renewal_interval());
    }

    pub fn lease_answered(&mut self, host: usize, call: u64, answer: Option<EtcdAnswer>) {
        let now = self.local(host);
        let Some(thread) = self.lease_thread(host) else { return };
        match thread.doing {
            Doing::Granting { call: ours, sent } if ours == call => {
                thread.doing = Doing::Nothing;
                let said = match answer {
                    Some(EtcdAnswer::Granted(identity)) => thread.book.granted(identity, sent),
                    _ => thread.book.grant_failed(now, "no lease".to_owned()),
                };
                self.lease_says(host, Some(said));
                self.lease_turn(host);
            }
            Doing::Renewing { call: ours, stage, lease, lock, sent } if ours == call => match answer {
                None | Some(EtcdAnswer::Error) => self.renewal_failed(host, "etcd cannot be asked"),
                Some(answer) => self.renewal_goes_on(host, (stage, lease, lock, sent), answer),
            },
            _ => {}
        }
    }

    fn renewal_goes_on(
        &mut self,
        host: usize,
        (stage, lease, lock, sent): (Stage, LeaseIdentity, Option<LockIdentity>, BootTime),
        answer: EtcdAnswer,
    ) {
        let now = self.local(host);
        match (stage, answer) {
            (Stage::HearFirst, EtcdAnswer::Proof { ours: true, .. }) => {
                self.next_call(host, Stage::KeepAlive, lease, lock, now, EtcdAsk::KeepAlive { lease: lease.lease, sent: now });
            }
            (Stage::KeepAlive, EtcdAnswer::Renewed { term, ttl }) => match lock {
                Some(lock) if !mutant(Mutant::ProofOmitted) => {
                    self.next_call(host, Stage::Prove { term, ttl }, lease, Some(lock), sent, EtcdAsk::Prove { lock });
                }
                _ => self.renewed(host, lock, sent, ttl),
            },
            (Stage::KeepAlive, EtcdAnswer::NoSuchLease) => {
                let asked = lock.unwrap_or(LockIdentity { lease, epoch: Epoch(-1) });
                self.next_call(host, Stage::Confirm, lease, lock, sent, EtcdAsk::Prove { lock: asked });
            }
            (Stage::Prove { term, ttl }, EtcdAnswer::Proof { ours: true, term: proved_in })
                if term == proved_in || mutant(Mutant::ProofOfAnyTerm) =>
            {
                self.renewed(host, lock, sent, ttl);
            }
            (Stage::HearFirst | Stage::Prove { .. }, EtcdAnswer::Proof { ours: false, .. }) => {
                let Some(thread) = self.lease_thread(host) else { return };
                thread.doing = Doing::Nothing;
                if matches!(stage, Stage::Prove { .. }) {
                    thread.book.renewed(sent);
                }
                let said = thread.book.lock_not_ours();
                self.lease_says(host, said);
                self.lease_turn(host);
            }
            (Stage::Confirm, EtcdAnswer::Proof { ours: false, .. }) => {
                let Some(thread) = self.lease_thread(host) else { return };
                thread.doing = Doing::Nothing;
                let said = thread.book.not_found();
                self.lease_says(host, said);
                self.lease_turn(host);
            }
            _ => self.renewal_failed(host, "the answer proves nothing"),
        }
    }

    fn next_call(&mut self, host: usize, stage: Stage, lease: LeaseIdentity, lock: Option<LockIdentity>, sent: BootTime, ask: EtcdAsk) {
        let call = self.call(host, Caller::Lease, ask, ms(REQUEST_TIMEOUT_MS * 40));
        if let Some(thread) = self.lease_thread(host) {
            thread.doing = Doing::Renewing { call, stage, lease, lock, sent };
        }
    }

    fn renewed(&mut self, host: usize, lock: Option<LockIdentity>, sent: BootTime, ttl: Duration) {
        let now = self.local(host);
        let sent = if mutant(Mutant::DeadlineFromTheAnswer) { now } else { sent };
        let Some(thread) = self.lease_thread(host) else { return };
        thread.book.learn_ttl(ttl, now);
        let Some(lock) = lock else {
            thread.doing = Doing::Nothing;
            let said = thread.book.renewed(sent).map(|until| LeaseEvent::Renewed { sent, until });
            self.lease_says(host, said);
            return self.lease_turn(host);
        };
        thread.doing = Doing::Acknowledging { lock, sent, by_promises: false };
        let times = thread.book.held_times();
        let ask = GuardAsk::Lock { identity: lock, sent, times };
        self.guard_ask(host, ask, AskedBy::Lease, times.renewal_interval());
    }

    /// The guard has acknowledged the new deadline, or not.
    pub fn lease_acknowledged(&mut self, host: usize, answer: Result<(), AskError>) {
        let Some(thread) = self.lease_thread(host) else { return };
        let Doing::Acknowledging { lock, sent, by_promises } = thread.doing else { return };
        thread.doing = Doing::Nothing;
        let taken = matches!(answer, Ok(()) | Err(AskError::Refused(Refusal::LadderRuns)));
        let said = if taken && by_promises {
            thread.book.sustained(sent).map(|until| LeaseEvent::Sustained { lock, sent, until })
        } else if taken {
            thread.book.renewed(sent).map(|until| LeaseEvent::Proved { lock, sent, until })
        } else {
            Some(thread.book.guard_silent())
        };
        self.lease_says(host, said);
        self.lease_turn(host);
    }
}

fn obey(book: &mut Book, command: Command, now: BootTime) -> Option<LeaseEvent> {
    match command {
        Command::Order(LeaseOrder::Adopt(lease, lock)) => book.adopt(lease, lock, now),
        Command::Order(LeaseOrder::Grant) => return book.grant(now),
        Command::Order(LeaseOrder::Hold(lock)) => return book.hold(lock, now).err().map(|why| LeaseEvent::Failed { why }),
        Command::Order(LeaseOrder::LetGo) => book.let_go(),
        Command::Order(LeaseOrder::Failsafe(armed)) => return book.arm(armed, now),
        Command::ChangeTimes(times) => book.change_times(times, now),
    }
    None
}
