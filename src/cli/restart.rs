//! `pgherd restart`, `pgherd reload` and `pgherd flush`: which members, in which order, and what a person has to agree to.
//!
//! Each member carries out its own part and answers when it is what it was before; the command asks the next one then. So a command that
//! dies restarts nothing more, and the first member that does not come back is the last that was touched.

use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::ZonedDateTime;

use crate::cli::ask::{self, Answer};
use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{DONE, FAILED, Failure, Outcome, REFUSED, TIMED_OUT, WRONG};
use crate::cli::output::{confirm, print, somebody_is_there, tell, who};
use crate::cli::{Asking, Connection, switchover};
use crate::clock::BootTime;
use crate::etcd::Etcd;
use crate::facts::cluster::{ClusterView, MemberKey};
use crate::facts::postgres::STREAMING;
use crate::facts::requests::{Ask, RequestKey, RequestProgress};
use crate::types::MemberName;

/// Between two looks at how a member is.
const LOOK_INTERVAL_MS: u64 = 200;
/// The daemon of a member that the spec does not name says this of itself, and touches nothing.
const UNDECLARED: &str = "undeclared";

/// Which members.
#[derive(Debug, Args)]
pub struct Whom {
    /// The members; all of the cluster unless named
    #[arg(value_name = "MEMBER")]
    members: Vec<MemberName>,
    /// Only those that have this role now
    #[arg(long, value_enum, default_value_t = Role::Any)]
    role: Role,
}

/// What a restart is to be.
#[derive(Debug, Args)]
pub struct Wanted {
    #[command(flatten)]
    whom: Whom,
    /// Only those with a parameter that waits for a restart
    #[arg(long)]
    pending: bool,
    /// Hand over instead of restarting the primary: the former one is started again as a standby
    #[arg(long, conflicts_with = "at")]
    switchover: bool,
    /// When: `now`, HH:MM of here, or a time with its zone such as 2026-11-22T14:30:00+01:00
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
}

/// Patroni's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    Leader,
    /// The same
    Primary,
    Replica,
    /// The same
    Standby,
    Any,
}

/// What is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Flushed {
    /// Restarts that have not begun
    Restart,
    /// The scheduled switchover
    Switchover,
}

/// One member's turn.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    member: MemberName,
    leads: bool,
    /// What waits for a restart.
    pending: Vec<String>,
    /// What a person should know before.
    note: Option<String>,
}

/// Whose turn it is when: standbys in the order of their names, the leader last. Or why nothing is begun.
fn steps(view: &ClusterView, whom: &Whom, only_pending: bool) -> Result<Vec<Step>, String> {
    ask::not_maintained(view)?;
    let Some(leader) = &view.leader else {
        return Err("nobody leads, and its members may be needed for the election: look at `pgherd status`".to_owned());
    };
    if let Some(absent) = whom.members.iter().find(|member| !view.members.contains_key(*member)) {
        return Err(ask::no_key(absent));
    }
    let leads = |member: &MemberName| leader.holder == member.as_str();
    let has_role = |member: &MemberName| match whom.role {
        Role::Leader | Role::Primary => leads(member),
        Role::Replica | Role::Standby => !leads(member),
        Role::Any => true,
    };
    let is_meant = |member: &MemberName, key: &MemberKey| match whom.members.is_empty() {
        true => key.record.machine_state != UNDECLARED,
        false => whom.members.contains(member),
    };
    let meant = view.members.iter().filter(|(member, key)| is_meant(member, key) && has_role(member));
    let mut steps: Vec<Step> = meant
        .filter(|(_, key)| !only_pending || !key.record.pending_restart.is_empty())
        .map(|(member, key)| Step {
            member: member.clone(),
            leads: leads(member),
            pending: key.record.pending_restart.clone(),
            note: commits_need(view, member),
        })
        .collect();
    steps.sort_by_key(|step| (step.leads, step.member.clone()));
    Ok(steps)
}

/// Commits wait for this standby, and no other that has them could take its place.
fn commits_need(view: &ClusterView, member: &MemberName) -> Option<String> {
    let record = view.sync.as_ref().filter(|record| record.is_standby(member))?;
    let streams = |other: &&MemberName| view.members.get(*other).is_some_and(|key| key.record.state == STREAMING);
    let others = record.members.iter().filter(|other| *other != member && record.is_standby(other)).filter(streams).count();
    let needed = record.copies.saturating_sub(1) as usize;
    (others < needed).then(|| {
        "commits wait for it and no other standby can take its place: until it is back they wait, or fewer members have them".to_owned()
    })
}

fn said(step: &Step, switches_over: bool) -> String {
    let how = match (step.leads, switches_over) {
        (true, true) => "the primary: hands over to the best standby, and is started again as a standby",
        (true, false) => "the primary: every session on it is cut off",
        (false, _) => "a standby: sessions that read there are cut off",
    };
    let pending = if step.pending.is_empty() { String::new() } else { format!("; waits for it: {}", step.pending.join(", ")) };
    let note = step.note.as_ref().map_or_else(String::new, |note| format!("\n      note: {note}"));
    one_line(&format!("  {}: {how}{pending}", step.member)) + &note
}

fn refused(reason: String) -> Failure {
    Failure::new(REFUSED, reason)
}

/// `pgherd restart`.
pub fn restart(connection: &Connection, wanted: &Wanted, how: Asking) -> Outcome {
    let at = wanted.at.as_deref().map(|typed| switchover::time("--at", typed, &ZonedDateTime::now())).transpose();
    let at_s = at.map_err(|why| Failure::new(WRONG, why))?.flatten();
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        // What is pending at a later time is judged then.
        let steps = steps(&etcd.read_view().await?, &wanted.whom, wanted.pending && at_s.is_none()).map_err(refused)?;
        if steps.is_empty() {
            let why = if wanted.pending { "no such member has a parameter that waits for a restart" } else { "there is no such member" };
            return print(&format!("nothing to restart: {why}\n"));
        }
        agree(&etcd, &steps, wanted, at_s, how).await?;
        match at_s {
            Some(at_s) => schedule(&etcd, &steps, wanted, at_s, how).await,
            None => roll(&etcd, &steps, |step| one(&etcd, step, wanted, how.timeout())).await,
        }
    })
}

/// Everything that is going to happen, in its order, before any of it does.
async fn agree(etcd: &Etcd, steps: &[Step], wanted: &Wanted, at_s: Option<u64>, how: Asking) -> Result<(), Failure> {
    if how.yes {
        return Ok(());
    }
    somebody_is_there("--yes")?;
    let when =
        at_s.map_or_else(|| "one after the other".to_owned(), |at_s| format!("one after the other from {} on", switchover::shown(at_s)));
    tell(&format!("PostgreSQL is started again on these members, {when}:"));
    steps.iter().for_each(|step| tell(&said(step, wanted.switchover)));
    if steps.iter().any(|step| step.leads) && !wanted.switchover && at_s.is_none() {
        let costs = match ask::carried_out(etcd, Ask::CheckRestart, how.timeout()).await? {
            Answer::Judged(_, warnings) => warnings,
            Answer::Done(message) | Answer::TakenUp(message) => {
                return Err(Failure::new(FAILED, format!("the leader does not know the question: {message}")));
            }
        };
        costs.iter().for_each(|cost| tell(&format!("cost: {}", one_line(cost))));
    }
    confirm("Go on?", false)
}

async fn schedule(etcd: &Etcd, steps: &[Step], wanted: &Wanted, at_s: u64, how: Asking) -> Outcome {
    for Step { member, .. } in steps {
        let if_leader = match wanted.whom.role {
            Role::Leader | Role::Primary => Some(true),
            Role::Replica | Role::Standby => Some(false),
            Role::Any => None,
        };
        let ask = Ask::Restart { on: member.clone(), if_leader, if_pending: wanted.pending, at_s: Some(at_s) };
        etcd.create_request(ask, &who(), how.timeout()).await?;
        print(&format!("scheduled: {member} at {} (`pgherd flush restart {member}` takes it back)\n", switchover::shown(at_s)))?;
    }
    Ok(DONE)
}

/// One after the other, until one fails.
async fn roll<'a, F>(etcd: &Etcd, steps: &'a [Step], one: impl Fn(&'a Step) -> F) -> Outcome
where
    F: Future<Output = Result<String, Failure>>,
{
    for (at, step) in steps.iter().enumerate() {
        match one(step).await {
            Ok(message) => print(&format!("{message}\n"))?,
            Err(Failure { code, error }) => {
                let rest: Vec<&str> = steps[at + 1..].iter().map(|step| step.member.as_str()).collect();
                let rest = if rest.is_empty() { "it was the last".to_owned() } else { format!("not begun: {}", rest.join(", ")) };
                return Err(Failure { code, error: error.context(format!("stopped at {} ({rest})", step.member)) });
            }
        };
    }
    let view = etcd.read_view().await?;
    let waits = |step: &&Step| view.members.get(&step.member).is_some_and(|key| !key.record.pending_restart.is_empty());
    for step in steps.iter().filter(|step| !step.pending.is_empty()).filter(waits) {
        tell(&format!("{}: a parameter still waits for a restart; see `pgherd status -o json`", step.member));
    }
    Ok(DONE)
}

async fn one(etcd: &Etcd, step: &Step, wanted: &Wanted, patience: Duration) -> Result<String, Failure> {
    if step.leads && wanted.switchover {
        return hand_over(etcd, step, patience).await;
    }
    let ask = Ask::Restart { on: step.member.clone(), if_leader: Some(step.leads), if_pending: wanted.pending, at_s: None };
    carried_out(etcd, ask, patience).await
}

async fn carried_out(etcd: &Etcd, ask: Ask, patience: Duration) -> Result<String, Failure> {
    match ask::carried_out(etcd, ask, patience).await? {
        Answer::Done(message) | Answer::TakenUp(message) => Ok(message),
        Answer::Judged(..) => Err(Failure::new(FAILED, "the answer is one to another question: look at `pgherd events`")),
    }
}

/// The primary's part moves away, and PostgreSQL of the former primary starts again as a standby's.
async fn hand_over(etcd: &Etcd, step: &Step, patience: Duration) -> Result<String, Failure> {
    let deadline = BootTime::now() + patience;
    let (candidates, _) = switchover::judged(etcd, None, patience).await?;
    let Some(best) = candidates.iter().find(|candidate| candidate.obstacles.is_empty()) else {
        return Err(refused("no standby can lead now: `pgherd switchover --dry-run` tells why".to_owned()));
    };
    let message = carried_out(etcd, Ask::Switchover { to: best.name.clone() }, patience).await?;
    while BootTime::now() < deadline {
        if etcd.read_view().await?.members.get(&step.member).is_some_and(|key| key.record.state == STREAMING) {
            return Ok(format!("{message}; {} was started again as a standby, and streams", step.member));
        }
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
    Err(Failure::new(TIMED_OUT, format!("{message}, and {} does not stream yet: look at `pgherd status`", step.member)))
}

/// `pgherd reload`.
pub fn reload(connection: &Connection, whom: &Whom, how: Asking) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let steps = steps(&etcd.read_view().await?, whom, false).map_err(refused)?;
        if steps.is_empty() {
            return print("nothing to reload: there is no such member\n");
        }
        let names: Vec<&str> = steps.iter().map(|step| step.member.as_str()).collect();
        confirm(&format!("Have {} write and read PostgreSQL's files again, one after the other?", names.join(", ")), how.yes)?;
        roll(&etcd, &steps, |step| carried_out(&etcd, Ask::Reload { on: step.member.clone() }, how.timeout())).await
    })
}

fn not_begun<'a>(view: &'a ClusterView, members: &[MemberName]) -> Vec<(&'a String, &'a RequestKey, &'a MemberName)> {
    let of = |(id, key): (&'a String, &'a RequestKey)| match (&key.record.ask, &key.record.progress) {
        (Ask::Restart { on, .. }, RequestProgress::Created) => Some((id, key, on)),
        _ => None,
    };
    view.requests.iter().filter_map(of).filter(|(_, _, on)| members.is_empty() || members.contains(on)).collect()
}

/// `pgherd flush`.
pub fn flush(connection: &Connection, what: Flushed, members: &[MemberName], yes: bool) -> Outcome {
    if what == Flushed::Switchover && !members.is_empty() {
        return Err(Failure::new(WRONG, "a switchover is the cluster's: `pgherd flush switchover` takes no member"));
    }
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let view = etcd.read_view().await?;
        if what == Flushed::Switchover {
            confirm("Take the scheduled switchover back?", yes)?;
            return switchover::cancel(&etcd, &view, "").await;
        }
        let found = not_begun(&view, members);
        if found.is_empty() {
            return Err(refused("no restart waits to be begun".to_owned()));
        }
        let names: Vec<&str> = found.iter().map(|(_, _, on)| on.as_str()).collect();
        confirm(&format!("Take back the restart of {}?", names.join(", ")), yes)?;
        let mut begun = Vec::new();
        for (id, key, on) in found {
            match etcd.cancel_request(id, key.mod_revision).await? {
                true => drop(print(&format!("the restart of {on} was taken back\n"))?),
                false => begun.push(on.as_str()),
            }
        }
        match begun.is_empty() {
            true => Ok(DONE),
            false => Err(refused(format!("the restart of {} has begun meanwhile, or is gone: see `pgherd events`", begun.join(", ")))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing;
    use crate::facts::synchrony::SyncRecord;
    use crate::types::Epoch;

    fn name(text: &str) -> MemberName {
        text.parse().unwrap()
    }

    fn whom(members: &[&str], role: Role) -> Whom {
        Whom { members: members.iter().map(|member| name(member)).collect(), role }
    }

    fn order(steps: &[Step]) -> Vec<&str> {
        steps.iter().map(|step| step.member.as_str()).collect()
    }

    #[test]
    fn standbys_come_first_and_the_primary_last() {
        let mut view = testing::view();
        let standby = view.members[&name("standby")].clone();
        view.members.retain(|member, _| *member != name("standby1"));
        view.members.insert(name("another"), standby);
        assert_eq!(order(&steps(&view, &whom(&[], Role::Any), false).unwrap()), ["another", "standby", "mdw"]);
        assert_eq!(order(&steps(&view, &whom(&[], Role::Primary), false).unwrap()), ["mdw"]);
        assert_eq!(order(&steps(&view, &whom(&[], Role::Standby), false).unwrap()), ["another", "standby"]);
        assert_eq!(order(&steps(&view, &whom(&["mdw", "standby"], Role::Any), false).unwrap()), ["standby", "mdw"]);
        view.members.get_mut(&name("mdw")).unwrap().record.pending_restart = vec!["max_connections".to_owned()];
        let pending = steps(&view, &whom(&[], Role::Any), true).unwrap();
        assert_eq!(order(&pending), ["mdw"]);
        assert!(said(&pending[0], false).contains("every session on it is cut off; waits for it: max_connections"));
        view.members.get_mut(&name("another")).unwrap().record.machine_state = UNDECLARED.to_owned();
        assert_eq!(order(&steps(&view, &whom(&[], Role::Any), false).unwrap()), ["standby", "mdw"]);
    }

    #[test]
    fn nothing_is_begun_without_a_leader_or_for_a_member_that_is_not_there() {
        let mut view = testing::view();
        assert!(steps(&view, &whom(&["nobody"], Role::Any), false).unwrap_err().contains("no key"));
        view.leader = None;
        assert!(steps(&view, &whom(&[], Role::Any), false).unwrap_err().contains("nobody leads"));
    }

    #[test]
    fn a_standby_that_commits_cannot_do_without_is_named() {
        let mut view = testing::view();
        let members = [name("mdw"), name("standby")].into();
        view.sync = Some(SyncRecord { leader: name("mdw"), epoch: Epoch(1), members, copies: 2 });
        assert!(commits_need(&view, &name("standby")).unwrap().contains("fewer members have them"));
        assert_eq!(commits_need(&view, &name("mdw")), None);
        let another = MemberKey { ..view.members[&name("standby")].clone() };
        view.members.insert(name("another"), another);
        view.sync.as_mut().unwrap().members.insert(name("another"));
        assert_eq!(commits_need(&view, &name("standby")), None);
    }
}
