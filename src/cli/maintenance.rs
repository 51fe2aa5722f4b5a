//! `pgherd pause` and `pgherd resume`: maintenance mode, in which nobody is elected and nothing is started, stopped or copied.
//!
//! Both only write a key; the daemons act, and what is printed is what they say of it. A command that is interrupted has done its part: the
//! key says what is wanted.

use std::time::Duration;

use clap::Args;
use jiff::ZonedDateTime;

use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{Failure, NO_ETCD, Outcome, REFUSED, TIMED_OUT, WRONG};
use crate::cli::output::{confirm, print, tell, who};
use crate::cli::{Asking, Connection, switchover};
use crate::clock::{BootTime, rfc3339, wall_clock};
use crate::etcd::Etcd;
use crate::facts::cluster::ClusterView;
use crate::facts::maintenance::{FEATURE, MaintenanceRecord, Phase};
use crate::facts::requests::RequestProgress;
use crate::policy::maintenance::{Awaited, WAITS_KIND, awaited, has_heard, is_ending};
use crate::spec::cluster;
use crate::types::{MemberName, Revision};

/// Between two looks at what the members say.
const POLL_INTERVAL_MS: u64 = 200;
/// How often the key is written against others who change it, or the lock, at the same time.
const WRITE_TRIES: u32 = 5;

/// What maintenance mode is to be.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Why, for whoever finds it set
    #[arg(long, value_name = "TEXT", default_value = "no reason was given")]
    why: String,
    /// Until when it is meant to last: HH:MM of here, or a time with its zone. Nothing ends by itself; `pgherd status` reminds
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Also if nobody leads: nobody will, until `pgherd resume`
    #[arg(long)]
    without_leader: bool,
}

/// `pgherd pause`.
pub fn pause(connection: &Connection, wanted: &Wanted, how: Asking) -> Outcome {
    let until = wanted.until.as_deref().map(|typed| switchover::time("--until", typed, &ZonedDateTime::now())).transpose();
    let until = until.map_err(|why| Failure::new(WRONG, why))?.flatten().map(|at_s| rfc3339(Duration::from_secs(at_s)));
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let question = may_pause(&etcd.read_view().await?, wanted.without_leader).map_err(|why| Failure::new(REFUSED, why))?;
        confirm(&question, how.yes)?;
        let why = wanted.why.chars().take(200).collect::<String>();
        let record = MaintenanceRecord { by: who(), why, at: wall_clock(), until, phase: Phase::On };
        let judge = |view: &ClusterView| may_pause(view, wanted.without_leader).map(|_| record.clone());
        write(&etcd, judge).await?;
        followed(&etcd, how.timeout(), on).await
    })
}

/// The question to confirm, or why not.
fn may_pause(view: &ClusterView, without_leader: bool) -> Result<String, String> {
    if view.spec.is_none() {
        return Err("no cluster document is in force: there is nothing to pause".to_owned());
    }
    if let Some(record) = view.maintenance.as_ref().filter(|record| record.phase == Phase::On) {
        return Err(format!("maintenance mode is on already, set by {}: {}", one_line(&record.by), one_line(&record.why)));
    }
    let knows = |features: &[String]| features.iter().any(|feature| feature == FEATURE);
    let older: Vec<&str> = view.members.iter().filter(|(_, key)| !knows(&key.record.features)).map(|(name, _)| name.as_str()).collect();
    if !older.is_empty() {
        return Err(format!("the daemon of {} does not know maintenance mode: bring it up to date first", older.join(", ")));
    }
    // One whose member is gone is carried on by nobody now.
    let is_at_work = |progress: &RequestProgress| matches!(progress, RequestProgress::Claimed { by, .. } if view.members.contains_key(by));
    let under_way = view.requests.values().find(|key| is_at_work(&key.record.progress));
    if let Some(key) = under_way {
        return Err(format!("what {} asked for is being carried out: wait for its end (`pgherd events`)", one_line(&key.record.by)));
    }
    if let Some((name, key)) = view.leader_member().filter(|(_, key)| !["primary", "paused"].contains(&key.record.machine_state.as_str())) {
        return Err(format!("{name} leads and is {} now: try again when it is at rest", one_line(&key.record.machine_state)));
    }
    let absent: Vec<String> =
        declared(view).into_iter().filter(|name| !view.members.contains_key(name)).map(|name| name.to_string()).collect();
    let absent = if absent.is_empty() {
        String::new()
    } else {
        format!(
            " The daemon of {} is not there: an older version that does not know maintenance mode must not be started in it.",
            absent.join(", ")
        )
    };
    match &view.leader {
        Some(leader) => Ok(format!(
            "Set maintenance mode? Until `pgherd resume` nobody is elected, and nothing is started, stopped or copied: if {} fails, nothing \
             replaces it.{absent}",
            one_line(&leader.holder)
        )),
        None if without_leader => Ok(format!("Set maintenance mode? Nobody leads, and nobody will until `pgherd resume`.{absent}")),
        None => Err("nobody leads, and in maintenance mode nobody would: add --without-leader if that is meant".to_owned()),
    }
}

/// Writes the key over what was judged, again where somebody else was faster.
async fn write(etcd: &Etcd, judge: impl Fn(&ClusterView) -> Result<MaintenanceRecord, String>) -> Result<(), Failure> {
    for _ in 0..WRITE_TRIES {
        let view = etcd.read_view().await?;
        let record = judge(&view).map_err(|why| Failure::new(REFUSED, why))?;
        let leader = view.leader.as_ref().map_or(Revision(0), |leader| leader.mod_revision);
        if etcd.set_maintenance(&record, view.maintenance_revision, leader).await? {
            return Ok(());
        }
    }
    Err(Failure::new(REFUSED, "the lock, or the key maintenance, changed each time it was to be written: look at `pgherd status`"))
}

/// What a look at the members means.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Over, in these words.
    Over(String),
    /// Still waiting, for this.
    Waits(String),
    /// It cannot come to that any more.
    Refused(String),
}

async fn followed(etcd: &Etcd, patience: Duration, judge: impl Fn(&ClusterView) -> Seen) -> Outcome {
    let deadline = BootTime::now() + patience;
    let mut told = String::new();
    loop {
        let late = BootTime::now() >= deadline;
        match etcd.read_view().await.map(|view| judge(&view)) {
            Ok(Seen::Over(message)) => return print(&format!("{message}\n")),
            Ok(Seen::Refused(why)) => return Err(Failure::new(REFUSED, why)),
            Ok(Seen::Waits(line)) if late => return Err(Failure::new(TIMED_OUT, format!("still waiting: {line}"))),
            Ok(Seen::Waits(line)) => {
                if line != told {
                    tell(&line);
                    told = line;
                }
            }
            Err(error) if late => {
                let error = anyhow::Error::from(error).context("the key is written; what the members made of it is not known");
                return Err(Failure { code: NO_ETCD, error });
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
    }
}

/// Whether all who are there have heard of it, and the leader's guard ends nothing.
fn on(view: &ClusterView) -> Seen {
    if view.maintenance.as_ref().is_none_or(|record| record.phase != Phase::On) {
        return Seen::Refused("somebody has ended it meanwhile".to_owned());
    }
    let leader = view.leader_member();
    let suspends = leader.is_none_or(|(_, key)| key.record.maintenance.is_some_and(|word| word.suspends));
    // A member that is not in the document any more does not follow it.
    let present = declared(view).into_iter().filter(|name| view.members.contains_key(name));
    let silent: Vec<String> = present.filter(|name| !has_heard(view, name)).map(|name| name.to_string()).collect();
    if !silent.is_empty() {
        return Seen::Waits(format!("waits for {} to hear of maintenance mode", silent.join(", ")));
    }
    match leader {
        Some((name, _)) if !suspends => Seen::Waits(format!("the guard of {name} would still end PostgreSQL with the lock")),
        Some((name, _)) => Seen::Over(format!(
            "maintenance mode is on: nobody is elected; {name} leads, and goes on without a proof of the lock if need be (`pgherd resume` ends it)"
        )),
        None => Seen::Over("maintenance mode is on: nobody leads, and nobody is elected (`pgherd resume` ends it)".to_owned()),
    }
}

/// `pgherd resume`.
pub fn resume(connection: &Connection, insist: bool, how: Asking) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let view = etcd.read_view().await?;
        let record = view.maintenance.as_ref().ok_or_else(|| Failure::new(REFUSED, "maintenance mode is not on"))?;
        if insist {
            confirm(&insisting(&view), how.yes)?;
            return match etcd.insist_on_the_end_of_maintenance(view.maintenance_revision).await? {
                true => print("maintenance mode is over, by your word\n"),
                false => Err(Failure::new(REFUSED, "it has changed meanwhile: look at `pgherd status`")),
            };
        }
        confirm(&format!("End the maintenance mode that {} set ({})?", one_line(&record.by), one_line(&record.why)), how.yes)?;
        if !is_ending(&view) {
            let judge = |view: &ClusterView| {
                let record = view.maintenance.clone().ok_or("somebody else has ended it")?;
                Ok(MaintenanceRecord { phase: Phase::Ending, ..record })
            };
            write(&etcd, judge).await?;
        }
        followed(&etcd, how.timeout(), over).await
    })
}

/// Who is in the document; where that cannot be read, who has a key.
fn declared(view: &ClusterView) -> Vec<MemberName> {
    let document = view.spec.as_ref().and_then(|spec| cluster::load("spec in etcd", &spec.document).ok());
    let named = |spec: &cluster::ClusterSpec| spec.members.iter().map(|member| member.name.clone()).collect();
    document.map_or_else(|| view.members.keys().cloned().collect(), |loaded| named(&loaded.spec))
}

/// Who is waited for, and why.
fn waits_for(view: &ClusterView) -> Vec<(MemberName, String)> {
    let declared = declared(view);
    let said = |name: &MemberName| {
        let conditions = view.members.get(name).map(|key| key.record.conditions.as_slice()).unwrap_or_default();
        conditions.iter().find(|condition| condition.kind == WAITS_KIND).map(|condition| one_line(&condition.message))
    };
    let why = |name: &MemberName, why: Awaited| match (why, said(name), view.members.contains_key(name)) {
        (_, Some(said), _) => said,
        (Awaited::MaySuspend, None, false) => "its daemon is not there, and its guard may let PostgreSQL write without the lock".to_owned(),
        (Awaited::SaysSo | Awaited::NotHeard, None, false) => "its daemon is not there, and nobody holds the lock".to_owned(),
        (_, None, true) => "has not said yet that it has heard of it".to_owned(),
    };
    awaited(view, declared.iter()).into_iter().map(|(name, what)| (name.clone(), why(name, what))).collect()
}

fn over(view: &ClusterView) -> Seen {
    match &view.maintenance {
        None => Seen::Over("maintenance mode is over".to_owned()),
        Some(record) if record.phase == Phase::On => Seen::Refused(format!("{} has set it again", one_line(&record.by))),
        Some(_) => {
            let waits: Vec<String> = waits_for(view).iter().map(|(name, why)| format!("{name}: {why}")).collect();
            Seen::Waits(if waits.is_empty() { "all have heard of it".to_owned() } else { waits.join("; ") })
        }
    }
}

/// What is risked by not waiting.
fn insisting(view: &ClusterView) -> String {
    let suspended: Vec<&str> = view.suspended.iter().map(MemberName::as_str).collect();
    let others: Vec<String> =
        waits_for(view).into_iter().filter(|(name, _)| !view.suspended.contains(name)).map(|(name, _)| name.to_string()).collect();
    let mut text = "End maintenance mode without waiting for all?".to_owned();
    if !suspended.is_empty() {
        text += &format!(
            " PostgreSQL on {} may write although it has no lock, and nothing ends it before its daemon hears of this: make sure that none \
             runs there, or two primaries take writes.",
            suspended.join(", ")
        );
    }
    if !others.is_empty() {
        text += &format!(" What was done on {} meanwhile is not known to the others.", others.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing::{self, name, record};
    use crate::facts::guard::Maintenance;
    use crate::facts::requests::{Ask, RequestKey, RequestRecord};

    fn knowing() -> ClusterView {
        let mut view = testing::view();
        view.members.values_mut().for_each(|key| key.record.features = vec![FEATURE.to_owned()]);
        view
    }

    fn maintained(phase: Phase) -> ClusterView {
        let mut view = knowing();
        let (by, why) = ("dba@mdw".to_owned(), "kernel".to_owned());
        view.maintenance = Some(MaintenanceRecord { by, why, at: String::new(), until: None, phase });
        view.maintenance_revision = Revision(50);
        view.suspended.insert(name("mdw"));
        view
    }

    fn heard(view: &mut ClusterView, who: &str, suspends: bool) {
        record(view, who).maintenance = Some(Maintenance { revision: Revision(50), suspends });
    }

    #[test]
    fn it_is_refused_where_it_would_be_in_vain_or_cut_something_in_two() {
        assert!(may_pause(&knowing(), false).unwrap().contains("if mdw fails, nothing replaces it"));
        assert!(may_pause(&testing::view(), false).unwrap_err().contains("does not know maintenance mode"));
        assert!(may_pause(&maintained(Phase::On), false).unwrap_err().contains("already, set by dba@mdw: kernel"));
        assert!(may_pause(&maintained(Phase::Ending), false).is_ok(), "one that ends can be set again");
        let mut vacant = knowing();
        vacant.leader = None;
        assert!(may_pause(&vacant, false).unwrap_err().contains("--without-leader"));
        assert!(may_pause(&vacant, true).is_ok());
        let mut busy = knowing();
        let progress = RequestProgress::Claimed { by: name("mdw"), stage: "stop".to_owned(), stages: Vec::new() };
        let ask = Ask::Switchover { to: name("standby") };
        let request = RequestRecord { ask, by: "x@y".to_owned(), at: String::new(), progress };
        busy.requests.insert("1".to_owned(), RequestKey { record: request, mod_revision: Revision(1) });
        assert!(may_pause(&busy, false).unwrap_err().contains("x@y"));
    }

    #[test]
    fn it_is_on_when_all_have_heard_of_it_and_the_leaders_guard_suspends() {
        let mut view = maintained(Phase::On);
        assert_eq!(on(&view), Seen::Waits("waits for mdw, standby, standby1 to hear of maintenance mode".to_owned()));
        ["mdw", "standby", "standby1"].iter().for_each(|who| heard(&mut view, who, false));
        assert!(matches!(on(&view), Seen::Waits(line) if line.contains("the guard of mdw")));
        heard(&mut view, "mdw", true);
        assert!(matches!(on(&view), Seen::Over(_)));
        assert!(matches!(on(&maintained(Phase::Ending)), Seen::Refused(_)));
    }

    #[test]
    fn who_is_waited_for_at_the_end_is_named_with_what_it_says_itself() {
        let mut view = maintained(Phase::Ending);
        heard(&mut view, "mdw", true);
        assert!(matches!(over(&view), Seen::Waits(line) if line == "mdw: has not said yet that it has heard of it"));
        view.members.remove(&name("mdw"));
        assert!(matches!(over(&view), Seen::Waits(line) if line.contains("its daemon is not there, and its guard may")));
        view.suspended.clear();
        view.leader = None;
        heard(&mut view, "standby", false);
        let waits = match over(&view) {
            Seen::Waits(line) => line,
            other => panic!("{other:?}"),
        };
        assert!(waits.contains("standby1") && !waits.contains("standby:"), "{waits}");
        view.maintenance = None;
        assert!(matches!(over(&view), Seen::Over(_)));
    }

    #[test]
    fn insisting_names_whose_postgresql_may_write_without_a_lock() {
        let question = insisting(&maintained(Phase::Ending));
        assert!(question.contains("PostgreSQL on mdw may write although it has no lock"), "{question}");
    }
}
