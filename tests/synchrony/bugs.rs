//! Deliberate bugs, of the rule, of what it is told, and of the daemon around it: an exploration that has not found them has proved nothing.

use crate::bits::{Code, GONE, NO_RECORD, NOBODY, as_any, count_of, epoch_of, is_acks, is_first, members_of, priority, record_of_goal};
use crate::rules::{Does, Rules};
use crate::world::{Setup, World};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The names are set before the record allows it: the rule does not look at it.
    NamesFirst,
    /// A reload is taken for effective at once: every walsender is believed to show what is in the file.
    ReloadIsEffect,
    /// What standbys have flushed is not looked at.
    FlushNotLookedAt,
    /// The position that standbys have to have is the one of when the names were set, not of when all were seen to go by them.
    PositionOfBefore,
    /// How many acknowledge grows without FIRST, and who shows a priority is believed to have read the new number.
    GrowthWithoutFirst,
    /// Any priority is taken for the sign of ANY: that a walsender has left FIRST is not waited for before the number grows again.
    FirstShownAsAny,
    /// A daemon that takes over believes that what is in the file has taken effect.
    FileBelieved,
    /// A daemon that takes over believes that nobody counts but those of the record.
    OnlyTheRecordCounts,
    /// That setting the names failed is taken for their not having been set.
    OrderForgotten,
    /// One member less than needed is enough to lead.
    OneTooFew,
    /// A member that is behind another one seen leads.
    BehindLeads,
    /// The names are emptied to make room when a standby is lost, while the record lets others lead (SAFETY row 47).
    EmptiedToMakeRoom,
    /// The former leader's record is thrown away by the new one for the goal's.
    FormerRecordThrownAway,
    /// The record is the goal's at once, not what both that and what was before allow.
    MixtureMiscounted,
    /// That backends wait is not proved after names were empty.
    WaitingNotProved,
    /// A backend that is seen to wait is taken for the proof, though the checkpointer may have read the empty names of before.
    AnyWaitIsProof,
    /// What a killed daemon wrote to etcd lands after the next one has read.
    WriteLandsLate,
    /// The walsenders are not looked at: nothing is lost, and nothing comes of any goal.
    NeverLooks,
    /// The record is strengthened as soon as the names allow it, though the next names need it weak: for ever to and fro.
    StrengthenedTooSoon,
}

impl Bug {
    /// Whether it is caught by what never comes to pass, not by a commit that is lost.
    pub fn is_of_progress(self) -> bool {
        matches!(self, Bug::NeverLooks | Bug::StrengthenedTooSoon)
    }
}

impl World {
    /// `sync_priority` as the rule is told.
    pub fn shown_priority(&self, setup: &Setup, shows: u32, index: usize) -> u32 {
        match setup.bug {
            Some(Bug::ReloadIsEffect) => priority(self.file, index),
            Some(Bug::GrowthWithoutFirst) if is_first(self.file) && shows == 1 => 2,
            Some(Bug::FirstShownAsAny) if !is_first(self.file) => shows.min(1),
            _ => shows,
        }
    }

    /// What is done instead of what the rule says.
    pub fn instead(&self, setup: &Setup, step: Does) -> Does {
        let connected = |index: &usize| members_of(self.goal) >> index & 1 == 1 && self.senders[index - 1] != GONE;
        let epoch = self.epoch(setup);
        match (setup.bug, step) {
            (Some(Bug::EmptiedToMakeRoom), _)
                if is_acks(self.goal) && (1..=setup.standbys).filter(connected).count() < count_of(self.goal) as usize =>
            {
                if self.file == NOBODY { Does::Nothing } else { Does::Sets(NOBODY) }
            }
            (Some(Bug::FormerRecordThrownAway), Does::Records(_)) if self.record != NO_RECORD && epoch_of(self.record) != epoch => {
                Does::Records(record_of_goal(self.goal, epoch))
            }
            (Some(Bug::MixtureMiscounted), Does::Records(code)) if code != NO_RECORD && epoch_of(self.record) == epoch => {
                Does::Records(record_of_goal(self.goal, epoch))
            }
            (Some(Bug::StrengthenedTooSoon), Does::Sets(_)) if self.record != NO_RECORD && self.names_imply_goal(setup) => {
                Does::Records(record_of_goal(self.goal, epoch))
            }
            _ => step,
        }
    }

    /// Whether all go by names that ask for more than the goal, which has what was written.
    fn names_imply_goal(&self, setup: &Setup) -> bool {
        let (goal, count) = (members_of(self.goal), count_of(self.goal));
        let others = (members_of(self.file) & !goal).count_ones();
        let all_read = self.senders[..setup.standbys].iter().all(|names| *names == self.file);
        let have = self.holders == 0 || (self.holders & goal).count_ones() >= count;
        all_read && have && is_acks(self.goal) && count > 0 && count_of(self.file) >= count + others
    }

    /// What a process reads.
    pub fn read(&self, setup: &Setup) -> Code {
        if setup.has(Bug::GrowthWithoutFirst) { as_any(self.file) } else { self.file }
    }

    /// What a daemon that takes over believes.
    pub fn found_at_start(&self, setup: &Setup, rules: &mut Rules) -> u32 {
        match setup.bug {
            Some(Bug::FileBelieved) => rules.since_start(self.file),
            Some(Bug::OnlyTheRecordCounts) => rules.unknown(self.record, members_of(self.record) & !1),
            _ => rules.unknown(self.record, setup.everybody() & !1),
        }
    }
}
