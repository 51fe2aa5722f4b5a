//! Maintenance mode as this member knows it: the key, its guard's word, and what a person did by hand. Decides nothing.

use super::action::OperationKind;
use super::event::Failure;
use super::finished::ANSWERED_PAUSE_MS;
use super::world::World;
use crate::clock::BootTime;
use crate::facts::guard::{Maintenance, Word};
use crate::policy::maintenance;

impl World {
    /// The key is there as far as is known, or the guard goes on as if it were.
    pub fn is_maintained(&self) -> bool {
        self.view.as_ref().is_some_and(|view| view.maintenance.is_some()) || self.suspends()
    }

    /// A person has ended it, as far as is known.
    pub fn maintenance_ends(&self) -> bool {
        self.view.as_ref().is_some_and(|view| view.maintenance.is_none() || maintenance::is_ending(view))
    }

    /// The newest word that the guard has. None = there is no guard to ask, or it was never told.
    pub fn guard_maintained(&self) -> Option<Maintenance> {
        let guard = self.guard.as_ref().filter(|_| !self.guard_gone)?;
        Some(guard.maintenance).filter(|word| *word != Maintenance::default())
    }

    /// The guard ends no PostgreSQL whose lock is not proved any more. One that is silent goes by the last word that it acknowledged.
    pub fn suspends(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.maintenance.suspends)
    }

    /// What a person started or promoted here without this daemon: what it is, and what to do before it is over.
    pub fn by_hand(&self) -> Option<&'static str> {
        let promoted = matches!(self.running(), Some((_, Word::Standby))) && self.sql().is_some_and(|sql| !sql.in_recovery);
        if self.unclaimed() {
            Some(
                "PostgreSQL was started here by hand: stop it (pg_ctl stop -m fast), and it is started again when maintenance mode is over",
            )
        } else if promoted {
            Some(
                "the standby here was promoted by hand: stop it (pg_ctl stop -m fast); when maintenance mode is over it has to get back behind \
                 whoever leads",
            )
        } else {
            None
        }
    }

    pub(super) fn suspension_noted(&mut self, now: BootTime, result: Result<bool, Failure>) {
        let asked = self.asked.suspending.take();
        if result == Ok(true) {
            self.asked.suspended = asked;
        }
        self.ended(now, OperationKind::NoteSuspension, result.is_ok());
        self.pause(now, OperationKind::NoteSuspension, ANSWERED_PAUSE_MS);
    }
}
