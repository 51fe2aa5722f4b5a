//! Strikes: a fault that waits for the moment just before or after one order of a machine.
//!
//! Never at random in time: what a crash between two actions breaks is found by aiming at it.

use std::time::Duration;

use pgherd::machine::action::{Action, LeaseOrder, OperationKind};

use super::clock::secs;
use super::plan::{Fault, Kind};
use super::world::{Sim, What};

/// What an order of the machine is, as far as a strike can be aimed at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Do(OperationKind),
    Hold,
    LetGo,
    Stop,
    ForgetLock,
    Other,
}

impl Hook {
    pub fn of(action: &Action) -> Hook {
        match action {
            Action::Do(operation) => Hook::Do(operation.kind()),
            Action::Lease(LeaseOrder::Hold(_)) => Hook::Hold,
            Action::Lease(LeaseOrder::LetGo) => Hook::LetGo,
            Action::Stop(_) => Hook::Stop,
            Action::ForgetLock(_) => Hook::ForgetLock,
            _ => Hook::Other,
        }
    }

    /// The orders on which everything hangs.
    const AIMS: [Hook; 20] = [
        Hook::Do(OperationKind::Acquire),
        Hook::Do(OperationKind::Promote),
        Hook::Do(OperationKind::Release),
        Hook::Do(OperationKind::RecordPromotion),
        Hook::Do(OperationKind::Start),
        Hook::Do(OperationKind::Clone),
        Hook::Do(OperationKind::PlanRejoin),
        Hook::Do(OperationKind::Checkpoint),
        Hook::Do(OperationKind::PutMember),
        Hook::Do(OperationKind::AskPeers),
        Hook::Do(OperationKind::FenceByScan),
        Hook::Do(OperationKind::WriteStatus),
        Hook::Do(OperationKind::Look),
        Hook::Hold,
        Hook::LetGo,
        Hook::Stop,
        Hook::ForgetLock,
        Hook::Do(OperationKind::Configure),
        // From here on only where commits wait for standbys.
        Hook::Do(OperationKind::SetNames),
        Hook::Do(OperationKind::WriteSync),
    ];

    /// Where nobody waits these are all.
    const AIMS_ASYNC: usize = 18;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    KillDaemon,
    FreezeDaemon,
    KillGuard,
    KillPostmaster,
    PowerOff,
    CutEtcd,
    LoseAnswers,
}

/// A strike that waits for its moment, on any host.
#[derive(Debug, Clone, Copy)]
pub struct Armed {
    hook: Hook,
    before: bool,
    effect: Effect,
    lasts: Duration,
}

impl Sim {
    pub fn arm(&mut self, fault: &Fault) {
        let effects = [
            Effect::KillDaemon,
            Effect::KillDaemon,
            Effect::FreezeDaemon,
            Effect::KillGuard,
            Effect::KillPostmaster,
            Effect::PowerOff,
            Effect::CutEtcd,
            Effect::LoseAnswers,
        ];
        let aims = if self.is_synchronous { &Hook::AIMS[..] } else { &Hook::AIMS[..Hook::AIMS_ASYNC] };
        let hook = match aims[(fault.choice % aims.len() as u64) as usize] {
            // Beside the list, so that every other seed's strikes stay what they were.
            Hook::Do(OperationKind::Configure) if (fault.choice / 4096).is_multiple_of(2) => Hook::Do(OperationKind::Reaffirm),
            Hook::Do(OperationKind::Clone) if !(fault.choice / 4096).is_multiple_of(3) => Hook::Do(OperationKind::Rewind),
            hook => hook,
        };
        let effect = effects[(fault.choice / 64 % effects.len() as u64) as usize];
        self.armed.push(Armed { hook, before: (fault.choice / 1024).is_multiple_of(2), effect, lasts: fault.lasts.min(secs(8)) });
    }

    /// True = the daemon was struck down, and what it was about to do waits or is gone.
    pub fn strike(&mut self, host: usize, hook: Hook, before: bool) -> bool {
        let Some(at) = self.armed.iter().position(|armed| armed.hook == hook && armed.before == before) else { return false };
        let armed = self.armed.remove(at);
        self.say(Some(host), || format!("!! strike {} {hook:?}: {:?}", if before { "before" } else { "after" }, armed.effect));
        self.coverage.strike(format!("{} {hook:?} {:?}", if before { "before" } else { "after" }, armed.effect));
        match armed.effect {
            Effect::KillDaemon => self.daemon_ends(host, None),
            Effect::FreezeDaemon => self.freeze_daemon_for(host, armed.lasts),
            Effect::KillGuard => {
                self.kill_guard(host);
                return false;
            }
            Effect::KillPostmaster => {
                self.kill_postmaster(host);
                return false;
            }
            Effect::PowerOff => self.power_off_for(host, armed.lasts),
            Effect::CutEtcd => {
                self.cut_etcd_for(host, armed.lasts, true);
                return false;
            }
            Effect::LoseAnswers => {
                self.cut_etcd_for(host, armed.lasts, false);
                return false;
            }
        }
        true
    }

    pub fn freeze_daemon_for(&mut self, host: usize, lasts: Duration) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.frozen = true;
        self.ends_after(host, Kind::FreezeDaemon, lasts);
    }

    fn power_off_for(&mut self, host: usize, lasts: Duration) {
        self.power_off(host);
        self.ends_after(host, Kind::PowerOff, lasts);
    }

    pub fn cut_etcd_for(&mut self, host: usize, lasts: Duration, both: bool) {
        self.links[host].0.cut |= both;
        self.links[host].1.cut = true;
        self.ends_after(host, Kind::CutEtcd, lasts);
    }

    /// A fault that a strike began ends like one of the plan.
    fn ends_after(&mut self, host: usize, kind: Kind, lasts: Duration) {
        let index = self.plan.len();
        self.plan.push(Fault { at: self.now, kind, victim: host as u64 * 2 + 1, lasts, choice: 0 });
        self.later(lasts, What::FaultEnds { index });
    }
}
