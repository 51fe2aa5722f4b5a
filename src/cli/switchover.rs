//! `pgherd switchover` and `pgherd failover`: what is asked at a terminal, what is refused, and what a script has to say.
//!
//! The leader judges and chooses; here it is shown, and agreed to. Times are wall clock: they are for schedules and decide nothing else.

use std::time::Duration;

use clap::Args;
use jiff::{Timestamp, ZonedDateTime};

use crate::cli::ask::{self, Answer};
use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{DONE, FAILED, Failure, Outcome, REFUSED, WRONG};
use crate::cli::output::{self, confirm, print, tell, who};
use crate::cli::{Asking, Connection, status};
use crate::clock::rfc3339;
use crate::etcd::{Etcd, EtcdError};
use crate::facts::cluster::ClusterView;
use crate::facts::requests::{Ask, Candidate, RequestKey, RequestProgress};
use crate::policy::election;
use crate::types::MemberName;

/// What a switchover is to be.
#[derive(Debug, Args)]
pub struct Wanted {
    /// The member that is to lead; the best candidate unless said
    #[arg(long, value_name = "MEMBER")]
    to: Option<MemberName>,
    /// When: `now`, HH:MM of here, or a time with its zone such as 2026-11-22T14:30:00+01:00
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Say what stands in the way and what it would cost, and touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Take a scheduled switchover back: the only one, or the one with this id
    #[arg(long, value_name = "ID", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["to", "at", "dry_run"])]
    cancel: Option<String>,
}

/// `pgherd switchover`.
pub fn switchover(connection: &Connection, wanted: Wanted, how: Asking) -> Outcome {
    let mut at =
        wanted.at.as_deref().map(|typed| time("--at", typed, &ZonedDateTime::now())).transpose().map_err(|why| Failure::new(WRONG, why))?;
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let view = etcd.read_view().await?;
        if let Some(id) = wanted.cancel {
            return cancel(&etcd, &view, &id).await;
        }
        let leader = leads(&view, wanted.to.as_ref()).map_err(|reason| Failure::new(REFUSED, reason))?;
        if wanted.dry_run {
            return rehearse(&etcd, &leader, wanted.to, how.timeout()).await;
        }
        let to = match wanted.to {
            // A script that names whom it wants; the leader judges before it touches anything.
            Some(to) if how.yes => to,
            to => {
                if !how.yes {
                    output::somebody_is_there("--yes")?;
                }
                let told_nothing = to.is_none() && wanted.at.is_none() && !how.yes;
                let to = chosen(&etcd, to, how, told_nothing).await?;
                if told_nothing {
                    let typed = output::ask("When (now, HH:MM, or a time with its zone) [now]:")?;
                    let typed = if typed.is_empty() { "now" } else { typed.as_str() };
                    at = Some(time("--at", typed, &ZonedDateTime::now()).map_err(|why| Failure::new(WRONG, why))?);
                }
                let when = at.flatten().map_or_else(String::new, |at_s| format!(" at {}", shown(at_s)));
                confirm(&format!("Switch over from {leader} to {to}{when}?"), how.yes)?;
                to
            }
        };
        match at.flatten() {
            None => ask::done(&etcd, Ask::Switchover { to }, how.timeout()).await,
            Some(at_s) => {
                let asked = etcd.create_request(Ask::ScheduledSwitchover { to: to.clone(), at_s }, &who(), how.timeout()).await;
                let id = asked.map_err(may_be_scheduled)?;
                print(&format!("scheduled: {to} is to lead at {} (`pgherd switchover --cancel {id}` takes it back)\n", shown(at_s)))
            }
        }
    })
}

/// A schedule hangs on no lease: one that is there is carried out, whether anybody was told or not.
fn may_be_scheduled(error: EtcdError) -> Failure {
    let hint = "it would be carried out: `pgherd status` shows whether it is scheduled, `pgherd switchover --cancel ID` takes it back";
    match error {
        EtcdError::Unknown(why) => Failure::from(EtcdError::Unknown(format!("{why}; {hint}"))),
        error => error.into(),
    }
}

pub(super) fn shown(at_s: u64) -> String {
    rfc3339(Duration::from_secs(at_s))
}

/// Who leads, or why a switchover would be in vain.
fn leads(view: &ClusterView, to: Option<&MemberName>) -> Result<String, String> {
    let Some(leader) = &view.leader else {
        return Err("nobody leads, so that there is nothing to hand over: look at `pgherd status`, or `pgherd failover`".to_owned());
    };
    ask::not_maintained(view)?;
    if let Some(to) = to {
        if leader.holder == to.as_str() {
            return Err(format!("{to} leads already"));
        }
        if !view.members.contains_key(to) {
            return Err(ask::no_key(to));
        }
    }
    Ok(one_line(&leader.holder))
}

/// What the leader says of a switchover.
pub(super) async fn judged(etcd: &Etcd, to: Option<MemberName>, patience: Duration) -> Result<(Vec<Candidate>, Vec<String>), Failure> {
    match ask::carried_out(etcd, Ask::CheckSwitchover { to }, patience).await? {
        Answer::Judged(candidates, warnings) => Ok((candidates, warnings)),
        Answer::Done(message) | Answer::TakenUp(message) => {
            Err(Failure::new(FAILED, format!("the leader does not know the question: {message}")))
        }
    }
}

async fn rehearse(etcd: &Etcd, leader: &str, to: Option<MemberName>, patience: Duration) -> Outcome {
    let (candidates, warnings) = judged(etcd, to, patience).await?;
    print(&sheet(&candidates, &warnings))?;
    match candidates.first() {
        Some(best) if best.obstacles.is_empty() => {
            print(&format!("{leader} would hand over to {}. Nothing was done.\n", best.name))?;
            Ok(DONE)
        }
        _ => Err(Failure::new(REFUSED, "no switchover now: what stands in the way is above")),
    }
}

/// The candidates with what speaks against each, and what it costs whoever leads.
fn sheet(candidates: &[Candidate], warnings: &[String]) -> String {
    let mut text = String::new();
    for candidate in candidates {
        let can = if candidate.obstacles.is_empty() { "can lead" } else { "not now" };
        text += &format!("{}: {can}\n", candidate.name);
        candidate.obstacles.iter().for_each(|why| text += &format!("    {}\n", one_line(why)));
        candidate.warnings.iter().for_each(|why| text += &format!("    note: {}\n", one_line(why)));
    }
    warnings.iter().for_each(|cost| text += &format!("cost: {}\n", one_line(cost)));
    text
}

/// The member that is to lead, as the leader judges and, at a terminal, as it was agreed to.
async fn chosen(etcd: &Etcd, to: Option<MemberName>, how: Asking, ask_whom: bool) -> Result<MemberName, Failure> {
    if ask_whom {
        tell(&status::table_now(etcd).await?);
    }
    let (candidates, warnings) = judged(etcd, to, how.timeout()).await?;
    tell(sheet(&candidates, &warnings).trim_end());
    let best = candidates.iter().find(|candidate| candidate.obstacles.is_empty());
    let Some(best) = best else { return Err(Failure::new(REFUSED, "no switchover now: what stands in the way is above")) };
    if !ask_whom {
        tell(&format!("the candidate is {}", best.name));
        return Ok(best.name.clone());
    }
    let typed = output::ask(&format!("Candidate [{}]:", best.name))?;
    pick(&candidates, best, &typed).map_err(|why| Failure::new(REFUSED, why))
}

fn pick(candidates: &[Candidate], best: &Candidate, typed: &str) -> Result<MemberName, String> {
    if typed.is_empty() {
        return Ok(best.name.clone());
    }
    match candidates.iter().find(|candidate| candidate.name.as_str() == typed) {
        Some(named) if named.obstacles.is_empty() => Ok(named.name.clone()),
        Some(named) => Err(named.obstacles.join("; ")),
        None => Err(format!("`{}` is not one of the candidates", one_line(typed))),
    }
}

/// What was typed as a time: None = now, or seconds since 1970.
pub(super) fn time(option: &str, typed: &str, now: &ZonedDateTime) -> Result<Option<u64>, String> {
    let expected =
        || format!("{option}: `{}` is no time; expected `now`, HH:MM, or 2026-11-22T14:30:00+01:00 with its zone", one_line(typed));
    if typed == "now" {
        return Ok(None);
    }
    let at = match jiff::civil::Time::strptime("%H:%M", typed) {
        Ok(of_day) => {
            let today = now.date().to_datetime(of_day).to_zoned_datetime(now.time_zone().clone()).map_err(|_| expected())?;
            let tomorrow = || now.date().tomorrow().and_then(|date| date.to_datetime(of_day).to_zoned_datetime(now.time_zone().clone()));
            if today > *now { today.timestamp() } else { tomorrow().map_err(|_| expected())?.timestamp() }
        }
        Err(_) => typed.parse::<Timestamp>().map_err(|_| expected())?,
    };
    let (at, past) = (at.as_second(), at <= now.timestamp());
    match u64::try_from(at) {
        Ok(at_s) if !past => Ok(Some(at_s)),
        _ => Err(format!("{option}: {} is past", one_line(typed))),
    }
}

fn is_scheduled(key: &RequestKey) -> bool {
    matches!((&key.record.ask, &key.record.progress), (Ask::ScheduledSwitchover { .. }, RequestProgress::Created))
}

pub(super) async fn cancel(etcd: &Etcd, view: &ClusterView, id: &str) -> Outcome {
    let scheduled: Vec<_> = view.requests.iter().filter(|(_, key)| is_scheduled(key)).collect();
    let found = match (id, scheduled.as_slice()) {
        ("", [one]) => Some(*one),
        ("", []) => return Err(Failure::new(REFUSED, "no switchover is scheduled")),
        ("", _) => {
            return Err(Failure::new(REFUSED, "more than one switchover is scheduled: name one with --cancel ID, see `pgherd status`"));
        }
        (id, all) => all.iter().copied().find(|(known, _)| known.as_str() == id),
    };
    let Some((id, key)) = found else {
        return Err(Failure::new(REFUSED, format!("no switchover with the id {} waits for its time: see `pgherd status`", one_line(id))));
    };
    match etcd.cancel_request(id, key.mod_revision).await? {
        true => print(&format!("the switchover {id} was taken back\n")),
        false => Err(Failure::new(REFUSED, format!("the switchover {id} has begun meanwhile, or is gone: see `pgherd events`"))),
    }
}

/// `pgherd failover`.
pub fn failover(connection: &Connection, to: &MemberName, how: Asking) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let view = etcd.read_view().await?;
        let (loss, question) = check_failover(&view, to).map_err(|reason| Failure::new(REFUSED, reason))?;
        if how.yes {
            tell(&question);
        } else {
            output::somebody_is_there("--accept-loss")?;
            confirm(&question, false)?;
        }
        ask::done(&etcd, Ask::Failover { to: to.clone(), accept_loss: Some(loss) }, how.timeout()).await
    })
}

/// How many bytes would be lost and the question to confirm, or why it is refused.
fn check_failover(view: &ClusterView, to: &MemberName) -> Result<(u64, String), String> {
    ask::not_maintained(view)?;
    if let Some(leader) = &view.leader {
        return Err(format!("{} leads: `pgherd switchover --to {to}` loses nothing", one_line(&leader.holder)));
    }
    let Some(key) = view.members.get(to) else {
        return Err(ask::no_key(to));
    };
    let Some(own) = key.record.receive_lsn.max(key.record.replay_lsn) else {
        return Err(format!("how far the WAL of {to} reaches is not known: its PostgreSQL does not answer"));
    };
    let (loss, by_status) = match election::bytes_behind(view, own) {
        Some(bytes) => (bytes, format!("at least {bytes} bytes of WAL that the last leader had published are not on {to}, and are lost")),
        None => (0, format!("the last leader published no position: how much {to} lacks is not known")),
    };
    let acknowledged = if view.sync_revision.0 == 0 {
        "; what it wrote after its last word is lost as well"
    } else {
        "; commits that were acknowledged as safe on another member may be among them"
    };
    Ok((loss, format!("Have {to} lead, at {own}? {by_status}{acknowledged}.")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing;
    use crate::facts::cluster::StatusRecord;
    use crate::types::{Epoch, Lsn, TimelineId};

    fn name(text: &str) -> MemberName {
        text.parse().unwrap()
    }

    #[test]
    fn a_schedule_that_may_be_there_is_said_to_be_looked_for_and_how_it_is_taken_back() {
        let said = may_be_scheduled(EtcdError::Unknown("no answer; if it did, the request has the id 7f".to_owned()));
        let text = said.error.to_string();
        assert_eq!(said.code, FAILED);
        assert!(text.contains("the id 7f") && text.contains("pgherd status") && text.contains("--cancel ID"), "{text}");
        assert!(!may_be_scheduled(EtcdError::Refused("no".to_owned())).error.to_string().contains("--cancel"), "it is not there");
    }

    #[test]
    fn a_switchover_that_is_in_vain_is_refused_before_it_is_asked_for() {
        let view = testing::view();
        assert_eq!(leads(&view, Some(&name("standby"))), Ok("mdw".to_owned()));
        assert!(leads(&view, Some(&name("mdw"))).unwrap_err().contains("leads already"));
        assert!(leads(&view, Some(&name("nobody"))).unwrap_err().contains("no key"));
        let mut vacant = testing::view();
        vacant.leader = None;
        assert!(leads(&vacant, None).unwrap_err().contains("nobody leads"));
    }

    #[test]
    fn a_time_is_now_of_the_day_or_whole_and_never_past() {
        let now: ZonedDateTime = "2026-11-22T14:30:00+01:00[+01:00]".parse().unwrap();
        let seconds = |text: &str| Ok(Some(u64::try_from(text.parse::<Timestamp>().unwrap().as_second()).unwrap()));
        assert_eq!(time("--at", "now", &now), Ok(None));
        assert_eq!(time("--at", "14:31", &now), seconds("2026-11-22T13:31:00Z"));
        assert_eq!(time("--at", "14:30", &now), seconds("2026-11-23T13:30:00Z"), "tomorrow");
        assert_eq!(time("--at", "2026-11-22T15:00:00+01:00", &now), seconds("2026-11-22T14:00:00Z"));
        assert!(time("--at", "2026-11-22T14:00:00+01:00", &now).unwrap_err().contains("is past"));
        for wrong in ["", "25:00", "2026-11-22 15:00", "2026-11-22T15:00:00", "noon\n"] {
            assert!(time("--at", wrong, &now).unwrap_err().contains("expected `now`, HH:MM"), "{wrong}");
        }
    }

    #[test]
    fn a_candidate_is_the_best_unless_another_that_can_lead_is_typed() {
        let candidate = |member: &str, obstacles: &[&str]| Candidate {
            name: name(member),
            obstacles: obstacles.iter().map(|why| (*why).to_owned()).collect(),
            warnings: Vec::new(),
        };
        let all = [candidate("n2", &[]), candidate("n3", &[]), candidate("n4", &["`n4` is 3 GB behind"])];
        assert_eq!(pick(&all, &all[0], ""), Ok(name("n2")));
        assert_eq!(pick(&all, &all[0], "n3"), Ok(name("n3")));
        assert_eq!(pick(&all, &all[0], "n4"), Err("`n4` is 3 GB behind".to_owned()));
        assert!(pick(&all, &all[0], "x").is_err());
        assert!(
            sheet(&all, &["a transaction would be cut".to_owned()]).contains("n4: not now\n    `n4` is 3 GB behind\ncost: a transaction")
        );
    }

    #[test]
    fn a_failover_names_what_is_lost_in_bytes_and_is_refused_where_somebody_leads() {
        let mut view = testing::view();
        assert!(check_failover(&view, &name("standby")).unwrap_err().contains("mdw leads: `pgherd switchover --to standby`"));
        view.leader = None;
        assert!(check_failover(&view, &name("nobody")).unwrap_err().contains("no key"));
        let own = view.members[&name("standby")].record.receive_lsn.unwrap();
        let lsn = Lsn(own.0 + 4_096);
        view.status = Some(StatusRecord {
            epoch: Epoch(1),
            timeline: TimelineId(1),
            lsn,
            slots: Default::default(),
            replayed: Default::default(),
            conditions: Vec::new(),
        });
        let (loss, question) = check_failover(&view, &name("standby")).unwrap();
        assert_eq!(loss, 4_096);
        assert!(question.contains("4096 bytes of WAL"), "{question}");
    }
}
