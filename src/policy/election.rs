//! Decides whether this member may run for the lock, and when. Never talks to etcd or PostgreSQL.
//!
//! Every member judges for itself on the same view; the transaction that takes the lock compares the revisions judged on, so a
//! wrong guess about the others costs a moment, never safety. A member whose position is not known is not a candidate: unknown lag
//! is not zero lag (P2). Positions are compared only along one lineage.

use std::time::Duration;

use crate::clock::BootTime;
use crate::facts::cluster::{ClusterView, DataDirectoryReport, HistoryEntry, Initialize, MemberKey, MemberRecord, ReleaseRecord, Vote};
use crate::mutants::{Mutant, mutant};
use crate::policy::failsafe::{self, HeldBack, Promise};
use crate::policy::switchover::replay_is_paused;
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::{Epoch, Lsn, MemberName, SystemId, TimelineId};

/// How long voters that have not published their final position are waited for.
pub const VOTERS_GRACE_MS: u64 = 1_000;
/// How much longer than the best candidate each further one waits.
pub const RANK_STEP_MS: u64 = 1_000;
/// How long the member that a release names is left alone with the lock.
pub const EXPECTED_GRACE_MS: u64 = 3_000;

/// What is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// Now.
    pub now: BootTime,
    /// Who asks.
    pub me: &'a MemberName,
    /// The spec in force.
    pub spec: &'a ClusterSpec,
    /// etcd's keys; the lock is absent in it.
    pub view: &'a ClusterView,
    /// Since when this member sees the lock absent.
    pub vacant_since: BootTime,
    /// Our own final position.
    pub own: Vote,
    /// Our database system identifier.
    pub system_id: SystemId,
    /// What the peers said when asked whether they are writable. None = not asked yet in this vacancy.
    pub peers: Option<&'a [MemberName]>,
    /// S: how long a former leader can take to be fenced.
    pub ladder: Duration,
    /// What this member has promised a leader that goes on without etcd.
    pub promise: Option<&'a Promise>,
    /// When this run of the daemon began.
    pub started: BootTime,
    /// Our data directory's own promotion, if there is one on record.
    pub promoted: Option<(TimelineId, Epoch)>,
    /// An operator wants this member to lead, and accepts that so many bytes that were published are lost, and with them what was acknowledged.
    /// It overrides how far behind this member is, who is seen to hold what, and who would be better: never whose data it is, on which
    /// lineage, what others were promised, or that somebody may still write.
    pub accept_loss: Option<u64>,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Take the lock now.
    Run {
        /// Why there is an election, for `history`.
        why: String,
        /// The system identifier to write with the lock, when etcd has none.
        initialize: Option<SystemId>,
    },
    /// Not yet.
    Wait {
        /// When to judge again at the latest.
        until: BootTime,
        /// A sentence.
        why: String,
    },
    /// Not under these facts.
    NotEligible {
        /// A sentence.
        why: String,
    },
}

fn wait(until: BootTime, why: impl Into<String>) -> Verdict {
    Verdict::Wait { until, why: why.into() }
}

/// Judges whether this member runs.
pub fn judge(inputs: &Inputs<'_>) -> Verdict {
    if inputs.view.maintenance.is_some() {
        return Verdict::NotEligible { why: "maintenance mode is on, in which nobody is elected".to_owned() };
    }
    if let Some(why) = not_eligible(inputs) {
        return Verdict::NotEligible { why };
    }
    match failsafe::held_back(inputs.now, inputs.me, inputs.view, inputs.promise, inputs.started) {
        Some(HeldBack::Never(why)) => return Verdict::NotEligible { why },
        Some(HeldBack::Until(until, why)) => return wait(until, why),
        None => {}
    }
    let initialize = match identity(inputs) {
        Ok(initialize) => initialize,
        Err(verdict) => return verdict,
    };
    match not_known_to_hold_all(inputs) {
        Some(_) if inputs.accept_loss.is_some() && is_readable(inputs.view) => {}
        Some(verdict) => return verdict,
        None => {}
    }
    let since = inputs.vacant_since;
    match &inputs.view.release {
        Some(release) if release.to.as_ref() == Some(inputs.me) => {
            return Verdict::Run { why: "handed over in good order".to_owned(), initialize };
        }
        Some(release) => {
            let expected = release.to.as_ref().filter(|to| inputs.view.members.contains_key(*to));
            let left_alone_until = since + Duration::from_millis(EXPECTED_GRACE_MS);
            if let Some(to) = expected.filter(|_| inputs.now < left_alone_until) {
                return wait(left_alone_until, format!("the last leader handed over to `{to}`"));
            }
        }
        None => {
            let deferred_until = since + inputs.ladder;
            match inputs.peers {
                None => {
                    return wait(
                        inputs.now + Duration::from_millis(VOTERS_GRACE_MS),
                        "the other members are being asked whether they write",
                    );
                }
                Some(writable) if !writable.is_empty() && inputs.now < deferred_until => {
                    return wait(deferred_until, format!("`{}` may still be writable and is given time to be fenced", writable[0]));
                }
                Some(_) => {}
            }
        }
    }
    match inputs.accept_loss {
        // Whoever the rules let lead gives up less, and has had its turn by then.
        Some(_) if inputs.now < every_turn_is_over(inputs) => {
            wait(every_turn_is_over(inputs), "another may lead by the rules, and without the loss that was accepted")
        }
        Some(_) => {
            let lost = bytes_behind(inputs.view, inputs.own.lsn).unwrap_or(0);
            Verdict::Run { why: format!("an operator asked for it, accepting the loss of {lost} bytes"), initialize }
        }
        None => by_rank(inputs, initialize),
    }
}

/// So many can be better than the last one.
fn every_turn_is_over(inputs: &Inputs<'_>) -> BootTime {
    inputs.vacant_since + Duration::from_millis(VOTERS_GRACE_MS + RANK_STEP_MS * inputs.spec.members.len() as u64)
}

/// What cannot be read may be anything: its operator deletes it first.
fn is_readable(view: &ClusterView) -> bool {
    view.sync.is_some() || view.sync_revision.0 == 0
}

/// Where commits waited for standbys only a member that has every acknowledged one may lead: because the last leader stopped in good order
/// and this one has all of its WAL, or because so many are seen not to be ahead of this one that one of them must have each commit (I5).
fn not_known_to_hold_all(inputs: &Inputs<'_>) -> Option<Verdict> {
    let view = inputs.view;
    if view.sync_revision.0 == 0 || mutant(Mutant::RecordNotLooked) {
        return None;
    }
    let Some(record) = &view.sync else {
        return Some(Verdict::NotEligible { why: "the key sync is unreadable: who has every acknowledged commit is not known".to_owned() });
    };
    let all_of_it =
        |release: &ReleaseRecord| release.epoch == record.epoch && release.timeline == inputs.own.timeline && release.lsn <= inputs.own.lsn;
    if view.release.as_ref().is_some_and(all_of_it) {
        return None;
    }
    let own = (inputs.own.timeline, inputs.own.lsn);
    let whole = |(name, vote): &(&MemberName, Vote)| on_lineage(view, *vote) <= own && !was_put_back(view, name, vote.lsn);
    let seen: Vec<&MemberName> = final_votes(inputs).filter(whole).map(|(name, _)| name).collect();
    if record.holds_all(seen.iter().copied()) {
        return None;
    }
    let put_back = |name: &MemberName| final_votes(inputs).any(|(voter, vote)| voter == name && was_put_back(view, name, vote.lsn));
    let named = |name: &MemberName| if put_back(name) { format!("`{name}` (put back to an older state)") } else { format!("`{name}`") };
    let missing: Vec<String> = record.members.iter().filter(|name| !seen.contains(name)).map(named).collect();
    let why = format!(
        "each acknowledged commit is on {} of {} members: {} of them, or `{}`, have to be seen, none ahead of this one; not seen so far: {}",
        record.copies,
        record.members.len(),
        record.members.len() + 1 - record.copies as usize,
        record.leader,
        missing.join(", "),
    );
    let voters_until = inputs.vacant_since + Duration::from_millis(VOTERS_GRACE_MS);
    Some(if inputs.now < voters_until { wait(voters_until, why) } else { Verdict::NotEligible { why } })
}

/// SAFETY row 27: it has less WAL than it was known to have on disk when `sync` counted on it. What it acknowledged since is known to nobody,
/// and so it is no witness of what was acknowledged. A leader had at least what it had sent to any standby.
pub fn was_put_back(view: &ClusterView, member: &MemberName, end: Lsn) -> bool {
    let (Some(record), Some(status)) = (&view.sync, &view.status) else { return false };
    if record.epoch < status.epoch || mutant(Mutant::PutBackCounts) {
        return false;
    }
    // Whoever takes `sync` over writes nothing of positions before it is promoted: till then those of the leader before it are what is known.
    let led = *member == record.leader || view.history.iter().any(|entry| entry.is_of(status.epoch) && entry.member == *member);
    let known = if led { status.replayed.values().max() } else { status.replayed.get(member) };
    known.is_some_and(|known| end < *known)
}

/// How far a vote counts. WAL past the point where the last recorded leadership left its timeline is not ahead of anybody: who led then had
/// all that was acknowledged, and of what it acknowledged later this member has nothing.
fn on_lineage(view: &ClusterView, vote: Vote) -> (TimelineId, Lsn) {
    let recorded = last_recorded(&view.history).filter(|recorded| vote.timeline < recorded.timeline);
    let left_at = recorded.and_then(|recorded| switch_from(&view.history, recorded.timeline, vote.timeline));
    (vote.timeline, left_at.map_or(vote.lsn, |left_at| vote.lsn.min(left_at)))
}

/// Waits for the voters and for those that are better, then runs.
fn by_rank(inputs: &Inputs<'_>, initialize: Option<SystemId>) -> Verdict {
    let voters_until = inputs.vacant_since + Duration::from_millis(VOTERS_GRACE_MS);
    let silent: Vec<&str> = silent_voters(inputs).map(MemberName::as_str).collect();
    if !silent.is_empty() && inputs.now < voters_until {
        return wait(voters_until, format!("no final position yet from {}", silent.join(", ")));
    }
    let own_rank = rank(inputs, inputs.me, inputs.own);
    let better: Vec<&MemberName> = valid_votes(inputs)
        .filter(|(name, _)| *name != inputs.me && may_lead(inputs.spec, name))
        .filter(|(_, vote)| off_lineage(inputs.view, inputs.own).is_some() || off_lineage(inputs.view, *vote).is_none())
        .filter(|(name, vote)| rank(inputs, name, *vote) > own_rank)
        .map(|(name, _)| name)
        .collect();
    let turn = voters_until + Duration::from_millis(RANK_STEP_MS * better.len() as u64);
    if let Some(best) = better.first().filter(|_| inputs.now < turn) {
        return wait(turn, format!("`{best}` is the better candidate"));
    }
    let why = if inputs.view.release.is_some() { "the last leader released the lock" } else { "the lock expired or was deleted" };
    Verdict::Run { why: why.to_owned(), initialize }
}

type Rank = (bool, TimelineId, Lsn, u32, std::cmp::Reverse<usize>);

/// Who would come out of recovery comes first; then position, priority, and the order in the spec. All of it as the keys have it, also our
/// own: everybody has to come to the same order.
fn rank(inputs: &Inputs<'_>, name: &MemberName, vote: Vote) -> Rank {
    let spec = inputs.spec;
    let order = spec.members.iter().position(|member| member.name == *name).unwrap_or(usize::MAX);
    let priority = spec.member(name).map_or(0, |member| member.failover_priority);
    let timeline = if mutant(Mutant::PositionsWithoutTimeline) { TimelineId(0) } else { vote.timeline };
    (!replay_is_paused(inputs.view, name), timeline, vote.lsn, priority, std::cmp::Reverse(order))
}

fn may_lead(spec: &ClusterSpec, name: &MemberName) -> bool {
    spec.member(name).is_some_and(|member| !member.nofailover())
}

/// Final positions given for this very vacancy, also of members that are not declared any more.
fn final_votes<'a>(inputs: &'a Inputs<'_>) -> impl Iterator<Item = (&'a MemberName, Vote)> + 'a {
    inputs.view.members.iter().filter_map(|(name, key)| {
        let vote = if name == inputs.me { inputs.own } else { key.record.vote? };
        (vote.vacancy == inputs.view.history_revision).then_some((name, vote))
    })
}

/// Final positions given for this very vacancy, ours included.
fn valid_votes<'a>(inputs: &'a Inputs<'_>) -> impl Iterator<Item = (&'a MemberName, Vote)> + 'a {
    final_votes(inputs).filter(|(name, _)| inputs.spec.member(name).is_some())
}

/// Declared members that may lead, are there with data and have not voted. The former holder is not waited for.
fn silent_voters<'a>(inputs: &'a Inputs<'_>) -> impl Iterator<Item = &'a MemberName> + 'a {
    let former = inputs.view.history.last().map(|entry| &entry.member);
    inputs.view.members.iter().filter_map(move |(name, key)| {
        let counts = name != inputs.me && Some(name) != former && may_lead(inputs.spec, name) && key.has_data();
        let voted = key.record.vote.is_some_and(|vote| vote.vacancy == inputs.view.history_revision);
        (counts && !voted).then_some(name)
    })
}

/// Whether etcd's history says that the timeline we promoted to is another leadership's. An id that history does not have is nobody else's:
/// etcd was lost. One that we reserved and that nobody recorded is ours, if a leadership promoted us.
fn is_of_another_promotion(inputs: &Inputs<'_>) -> bool {
    let Some((own, epoch)) = inputs.promoted.filter(|(timeline, _)| *timeline == inputs.own.timeline) else { return false };
    let is_ours = |entry: &HistoryEntry| match entry.epoch {
        Some(recorded) => recorded == epoch,
        None => entry.member == *inputs.me && epoch != Epoch::BY_HAND,
    };
    let mut of_the_id = inputs.view.history.iter().filter(|entry| entry.timeline == own).peekable();
    of_the_id.peek().is_some() && !of_the_id.any(is_ours)
}

fn not_eligible(inputs: &Inputs<'_>) -> Option<String> {
    let Some(member) = inputs.spec.member(inputs.me) else {
        return Some("this member is not in spec.members".to_owned());
    };
    if member.nofailover() {
        return Some("failover_priority is 0, or the tag nofailover or nostream is set".to_owned());
    }
    if inputs.view.spec.is_none() {
        return Some("there is no spec in etcd: nobody leads until one is applied".to_owned());
    }
    if is_of_another_promotion(inputs) {
        let why = format!("timeline {} was promoted here, and not by the leadership that took its number", inputs.own.timeline);
        return Some(why);
    }
    if inputs.own.lsn == Lsn(0) {
        return Some("how far this member's WAL reaches is not known, which is not the same as not behind".to_owned());
    }
    too_far_behind(inputs).or_else(|| off_lineage(inputs.view, inputs.own).filter(|_| !nobody_is_on_the_lineage(inputs)))
}

fn too_far_behind(inputs: &Inputs<'_>) -> Option<String> {
    let limit = inputs.spec.ha.maximum_lag_on_failover;
    let leader_lsn = last_published(inputs.view).filter(|_| !mutant(Mutant::LagIgnored))?;
    let lag = leader_lsn.bytes_since(inputs.own.lsn);
    if let Some(accepted) = inputs.accept_loss {
        let more = lag > accepted && !mutant(Mutant::LossBeyondWhatWasAccepted);
        return more.then(|| format!("{lag} bytes behind the last leader's {leader_lsn}, more than the {accepted} bytes that may be lost"));
    }
    (lag > limit).then(|| format!("{lag} bytes behind the last leader's {leader_lsn}, more than maximum_lag_on_failover of {limit} bytes"))
}

fn last_published(view: &ClusterView) -> Option<Lsn> {
    let released = view.release.as_ref().map(|release| release.lsn);
    released.max(view.status.as_ref().map(|status| status.lsn))
}

/// How far a position is behind what the last leader has published. None = it has published nothing.
pub fn bytes_behind(view: &ClusterView, own: Lsn) -> Option<u64> {
    last_published(view).map(|last| last.bytes_since(own))
}

/// A timeline that a recorded leadership has left behind before this position is not the cluster's history any more. Nor is a later one
/// that no leadership reserved: somebody promoted by hand (SAFETY row 66).
fn off_lineage(view: &ClusterView, own: Vote) -> Option<String> {
    let recorded =
        last_recorded(&view.history).filter(|_| !mutant(Mutant::LineageNotLooked) && !mutant(Mutant::PositionsWithoutTimeline))?;
    if own.timeline == recorded.timeline {
        return None;
    }
    if own.timeline > recorded.timeline {
        let reserved = view.history.iter().any(|entry| entry.timeline == own.timeline);
        return (!reserved).then(|| format!("timeline {} was reserved by no leadership: it was promoted by hand", own.timeline));
    }
    match switch_from(&view.history, recorded.timeline, own.timeline) {
        Some(switch) if own.lsn <= switch => None,
        Some(switch) => Some(format!("timeline {} was left at {switch} and this member is at {} on it", own.timeline, own.lsn)),
        None => Some(format!("timeline {} is not an ancestor of the last leader's timeline {}", own.timeline, recorded.timeline)),
    }
}

/// Every declared member has said how far it is, and none is where the last leader was: then there is nothing better to wait for. A member
/// that the spec does not name, and that may be there, is for its operator to declare.
fn nobody_is_on_the_lineage(inputs: &Inputs<'_>) -> bool {
    let undeclared = inputs.view.members.iter().filter(|(name, _)| inputs.spec.member(name).is_none());
    let may_be_on_it = |key: &MemberKey| {
        let last = last_recorded(&inputs.view.history).map(|entry| entry.timeline);
        key.record.data_directory != DataDirectoryReport::Empty && key.record.timeline.is_none_or(|timeline| Some(timeline) >= last)
    };
    if undeclared.into_iter().any(|(_, key)| may_be_on_it(key)) {
        return false;
    }
    inputs.spec.members.iter().all(|member| {
        let Some(key) = inputs.view.members.get(&member.name) else { return false };
        if key.record.data_directory == DataDirectoryReport::Empty {
            return true;
        }
        let vote = if member.name == *inputs.me { Some(inputs.own) } else { key.record.vote };
        // One that never leads is no candidate and gives no vote; its position is in its record.
        let position = key.record.timeline.zip(key.record.receive_lsn.max(key.record.replay_lsn));
        let said = position.map(|(timeline, lsn)| Vote { vacancy: inputs.view.history_revision, timeline, lsn });
        let last_word = vote.filter(|vote| vote.vacancy == inputs.view.history_revision).or(said.filter(|_| member.nofailover()));
        last_word.is_some_and(|word| off_lineage(inputs.view, word).is_some())
    })
}

/// The last leadership that recorded its promotion.
pub fn last_recorded(history: &[HistoryEntry]) -> Option<&HistoryEntry> {
    history.iter().rev().find(|entry| entry.epoch.is_some())
}

/// Where the ancestry of `timeline` leaves `ancestor`; None when it never was on it.
pub fn switch_from(history: &[HistoryEntry], timeline: TimelineId, ancestor: TimelineId) -> Option<Lsn> {
    let mut at = timeline;
    // Each step goes to a lower id, so the walk ends.
    while at > ancestor {
        let entry = history.iter().rev().find(|entry| entry.timeline == at && entry.epoch.is_some())?;
        let parent = entry.parent.filter(|parent| *parent < at)?;
        if parent == ancestor {
            return entry.switch_lsn;
        }
        at = parent;
    }
    None
}

/// The identity rules: the system id in etcd is ours; without one, all declared members have to have reported, and all that have
/// data must have the same.
fn identity(inputs: &Inputs<'_>) -> Result<Option<SystemId>, Verdict> {
    match &inputs.view.initialize {
        Some(Initialize::Done(id)) if *id == inputs.system_id => Ok(None),
        Some(Initialize::Done(id)) => {
            Err(Verdict::NotEligible { why: format!("this member's system identifier is {}, the cluster's is {id}", inputs.system_id) })
        }
        // What initdb made here before this member was stopped, or taken out of the spec for a while: it goes on from there.
        Some(Initialize::Claimed { lease, .. }) if inputs.view.members.get(inputs.me).is_some_and(|key| key.lease == *lease) => {
            all_have_reported_one_identity(inputs).map(Some)
        }
        Some(Initialize::Claimed { by, .. }) => Err(Verdict::NotEligible { why: format!("`{by}` is initializing the cluster") }),
        Some(Initialize::Unreadable(value)) => Err(Verdict::NotEligible { why: format!("the key initialize is unreadable: `{value}`") }),
        None => all_have_reported_one_identity(inputs).map(Some),
    }
}

fn all_have_reported_one_identity(inputs: &Inputs<'_>) -> Result<SystemId, Verdict> {
    let again = inputs.now + Duration::from_millis(VOTERS_GRACE_MS);
    for member in &inputs.spec.members {
        let Some(key) = inputs.view.members.get(&member.name) else {
            let silent = &member.name;
            let way_out = "start its daemon, or apply a document without it";
            return Err(wait(again, format!("etcd has no system identifier and `{silent}` has not reported: {way_out}")));
        };
        match (key.record.data_directory, key.record.system_id) {
            (DataDirectoryReport::Empty, _) => {}
            (DataDirectoryReport::Full, Some(id)) if id == inputs.system_id => {
                // Nothing else tells what the last leader wrote and which timeline ids were used: nobody with data is passed over.
                if !has_said_how_far(inputs, member, &key.record) {
                    return Err(wait(again, format!("how far the WAL of `{}` reaches is not known", member.name)));
                }
            }
            (DataDirectoryReport::Full, Some(id)) => {
                let why =
                    format!("`{}` holds system identifier {id}, this member {}: an operator has to decide", member.name, inputs.system_id);
                return Err(Verdict::NotEligible { why });
            }
            (DataDirectoryReport::Full, None) | (DataDirectoryReport::Unknown, _) => {
                return Err(wait(again, format!("what is in the data directory of `{}` is not known", member.name)));
            }
        }
    }
    Ok(inputs.system_id)
}

fn has_said_how_far(inputs: &Inputs<'_>, member: &Member, record: &MemberRecord) -> bool {
    let voted = record.vote.is_some_and(|vote| vote.vacancy == inputs.view.history_revision);
    member.name == *inputs.me || voted || (member.nofailover() && record.receive_lsn.is_some())
}

/// The next timeline id that nobody has used or reserved: ids are used once, ever (I9).
pub fn next_timeline(view: &ClusterView, own: TimelineId) -> TimelineId {
    if mutant(Mutant::TimelineFromOwnOnly) {
        return own.next();
    }
    let reserved = view.history.iter().map(|entry| entry.timeline);
    let reported = view.members.values().filter_map(|key| key.record.timeline);
    let voted = view.members.values().filter_map(|key| Some(key.record.vote?.timeline));
    let written = [view.release.as_ref().map(|r| r.timeline), view.status.as_ref().map(|s| s.timeline)].into_iter().flatten();
    reserved.chain(reported).chain(voted).chain(written).fold(own, TimelineId::max).next()
}

#[cfg(test)]
mod tests;
