//! When maintenance mode is over: of whom something has to be heard before anybody may lead again.
//!
//! Rule that surprises: where a member holds the lock only those are waited for whose guards may have suspended its deadlines. Where nobody
//! does, every declared member is: a person may have done anything to any of them.

use crate::facts::cluster::ClusterView;
use crate::facts::maintenance::Phase;
use crate::types::MemberName;

/// The condition of a member on which something has to happen before it is over.
pub const WAITS_KIND: &str = "maintenance_waits";

/// Why a member has to be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// Its guard may have suspended the deadlines of the lock: its PostgreSQL may write as long as it likes.
    MaySuspend,
    /// It says that something has to happen there first: what a person started or promoted by hand would be ended.
    SaysSo,
    /// Nobody holds the lock, and it has not said that it has heard of the end.
    NotHeard,
}

/// Who is waited for. Empty and [`is_ending`]: the key can be deleted.
pub fn awaited<'a>(view: &'a ClusterView, declared: impl Iterator<Item = &'a MemberName>) -> Vec<(&'a MemberName, Awaited)> {
    let suspended = view.suspended.iter().map(|name| (name, Awaited::MaySuspend));
    let others = declared.filter(|name| !view.suspended.contains(*name)).filter_map(|name| {
        let silent = view.leader.is_none() && !has_heard(view, name);
        (says_so(view, name).then_some((name, Awaited::SaysSo))).or(silent.then_some((name, Awaited::NotHeard)))
    });
    suspended.chain(others).collect()
}

/// A person has ended it.
pub fn is_ending(view: &ClusterView) -> bool {
    view.maintenance.as_ref().is_some_and(|record| record.phase == Phase::Ending)
}

fn says_so(view: &ClusterView, name: &MemberName) -> bool {
    view.members.get(name).is_some_and(|key| key.record.conditions.iter().any(|condition| condition.kind == WAITS_KIND))
}

/// Its guard has a word of the key as it stands.
pub fn has_heard(view: &ClusterView, name: &MemberName) -> bool {
    let word = view.members.get(name).and_then(|key| key.record.maintenance);
    word.is_some_and(|word| word.revision >= view.maintenance_revision && !(word.suspends && is_ending(view)))
}
