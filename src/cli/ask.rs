//! `pgherd switchover` and `pgherd bootstrap`: asks the cluster through a request in etcd, and follows it to its end.
//!
//! The daemons decide; what is refused here is only what etcd already shows to be in vain. A request hangs on a lease as long as
//! `--timeout`, so that nothing is carried out long after its requester gave up.

use std::time::Duration;

use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{FAILED, Failure, NO_ETCD, Outcome, REFUSED, TIMED_OUT};
use crate::cli::output::{confirm, print, tell, who};
use crate::cli::{Asking, Connection};
use crate::clock::BootTime;
use crate::etcd::{Etcd, EtcdError};
use crate::facts::cluster::{Ask, ClusterView, Initialize, RequestProgress};
use crate::types::MemberName;

/// Between two looks at the request.
const POLL_INTERVAL_MS: u64 = 200;

/// `pgherd switchover`.
pub fn switchover(connection: &Connection, to: &MemberName, how: Asking) -> Outcome {
    request(connection, how, Ask::Switchover { to: to.clone() }, |view| check_switchover(view, to))
}

/// `pgherd bootstrap`.
pub fn bootstrap(connection: &Connection, on: &MemberName, how: Asking) -> Outcome {
    request(connection, how, Ask::Bootstrap { on: on.clone() }, |view| check_bootstrap(view, on))
}

/// The question to confirm, or why it would be in vain.
fn check_switchover(view: &ClusterView, to: &MemberName) -> Result<String, String> {
    let Some(leader) = &view.leader else {
        return Err("nobody leads, so that there is nothing to hand over: look at `pgherd status`".to_owned());
    };
    if leader.holder == to.as_str() {
        return Err(format!("{to} leads already"));
    }
    if view.maintenance.is_some() {
        return Err("the key maintenance is set: whoever set it has to delete it first".to_owned());
    }
    if !view.members.contains_key(to) {
        return Err(format!("{to} has no key in etcd: its daemon is not running or cannot reach etcd"));
    }
    Ok(format!("Switch over from {} to {to}?", one_line(&leader.holder)))
}

fn check_bootstrap(view: &ClusterView, on: &MemberName) -> Result<String, String> {
    if view.spec.is_none() {
        return Err("no cluster document is in force: use `pgherd apply -f CLUSTER.yaml` first".to_owned());
    }
    match &view.initialize {
        Some(Initialize::Done(id)) => return Err(format!("the cluster is initialized already (system identifier {id})")),
        Some(Initialize::Claimed { by, .. }) => return Err(format!("{} is initializing the cluster", one_line(by))),
        Some(Initialize::Unreadable(_)) | None => {}
    }
    if !view.members.contains_key(on) {
        return Err(format!("{on} has no key in etcd: its daemon is not running or cannot reach etcd"));
    }
    let with_data: Vec<&str> = view.members.iter().filter(|(_, key)| key.has_data()).map(|(name, _)| name.as_str()).collect();
    if !with_data.is_empty() {
        let with_data = with_data.join(", ");
        return Err(format!(
            "there is data on {with_data}: a cluster with data is not initialized, it leads again once every declared \
             member has reported; apply a document without those that are lost"
        ));
    }
    Ok(format!("Initialize an EMPTY cluster on {on}, although not every member has reported an empty data directory?"))
}

fn request(connection: &Connection, how: Asking, ask: Ask, check: impl Fn(&ClusterView) -> Result<String, String>) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let question = check(&etcd.read_view().await?).map_err(|reason| Failure::new(REFUSED, reason))?;
        confirm(&question, how.yes)?;
        let deadline = BootTime::now() + how.timeout();
        let id = etcd.create_request(ask, &who(), how.timeout()).await?;
        follow(&etcd, &id, deadline).await
    })
}

/// What a look at the request means.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Nobody has taken it up.
    Waiting,
    /// It is being carried out; a line to tell.
    Working(String),
    /// It is over.
    Over(Result<String, (u8, String)>),
}

fn judge(progress: Option<&RequestProgress>) -> Seen {
    match progress {
        Some(RequestProgress::Created) => Seen::Waiting,
        Some(RequestProgress::Claimed { by, stage }) => Seen::Working(format!("{by}: {}", one_line(stage))),
        Some(RequestProgress::Done { message }) => Seen::Over(Ok(one_line(message))),
        Some(RequestProgress::Refused { reason }) => Seen::Over(Err((REFUSED, one_line(reason)))),
        None => Seen::Over(Err((
            FAILED,
            "the request is gone from etcd without an answer: look at `pgherd status` and `pgherd events`".to_owned(),
        ))),
    }
}

async fn follow(etcd: &Etcd, id: &str, deadline: BootTime) -> Outcome {
    let mut told = String::new();
    let mut silent: Option<EtcdError> = None;
    let mut waiting = true;
    while BootTime::now() < deadline {
        match etcd.read_request(id).await {
            Ok(found) => {
                silent = None;
                match judge(found.as_ref().map(|found| &found.record.progress)) {
                    Seen::Waiting => waiting = true,
                    Seen::Working(line) => {
                        waiting = false;
                        if line != told {
                            tell(&line);
                            told = line;
                        }
                    }
                    Seen::Over(end) => return over(etcd, id, end).await,
                }
            }
            // A switchover may well come along with an etcd that is slow: only the deadline ends the wait.
            Err(error) => silent = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
    }
    if let Some(error) = silent {
        return Err(Failure { code: NO_ETCD, error: anyhow::Error::from(error).context("how the request ended is not known") });
    }
    if waiting {
        etcd.delete_request(id).await?;
        return Err(Failure::new(TIMED_OUT, "no member took the request up in time; it was taken back: look at `pgherd status`"));
    }
    Err(Failure::new(TIMED_OUT, format!("still running ({told}): look at `pgherd status` and `pgherd events`")))
}

async fn over(etcd: &Etcd, id: &str, end: Result<String, (u8, String)>) -> Outcome {
    // Answered is answered: if it cannot be cleared away, its lease will.
    let _ = etcd.delete_request(id).await;
    match end {
        Ok(message) => print(&format!("{message}\n")),
        Err((code, reason)) => Err(Failure::new(code, reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing;
    use crate::facts::cluster::DataDirectoryReport;
    use crate::types::SystemId;

    fn name(text: &str) -> MemberName {
        text.parse().unwrap()
    }

    #[test]
    fn a_switchover_that_is_in_vain_is_refused_before_it_is_asked_for() {
        let view = testing::view();
        assert!(check_switchover(&view, &name("standby")).unwrap().contains("from mdw to standby"));
        assert!(check_switchover(&view, &name("mdw")).unwrap_err().contains("leads already"));
        assert!(check_switchover(&view, &name("nobody")).unwrap_err().contains("no key"));
        let mut vacant = testing::view();
        vacant.leader = None;
        assert!(check_switchover(&vacant, &name("standby")).unwrap_err().contains("nobody leads"));
    }

    #[test]
    fn a_cluster_is_initialized_once() {
        let mut view = testing::view();
        view.initialize = Some(Initialize::Done(SystemId(7)));
        assert!(check_bootstrap(&view, &name("mdw")).unwrap_err().contains("initialized already"));
        view.initialize = None;
        let holds = |view: &mut ClusterView, member: &str, what| view.members.get_mut(&name(member)).unwrap().record.data_directory = what;
        view.members.values_mut().for_each(|key| key.record.data_directory = DataDirectoryReport::Empty);
        assert!(check_bootstrap(&view, &name("mdw")).unwrap().contains("EMPTY"));
        holds(&mut view, "mdw", DataDirectoryReport::Full);
        for on in ["mdw", "standby"] {
            let refused = check_bootstrap(&view, &name(on)).unwrap_err();
            assert!(refused.contains("there is data on mdw") && refused.contains("apply a document without"), "{refused}");
        }
        view.spec = None;
        assert!(check_bootstrap(&view, &name("mdw")).is_err());
    }

    #[test]
    fn only_done_is_success() {
        let refused = RequestProgress::Refused { reason: "standby is 3 GB behind".to_owned() };
        assert_eq!(judge(Some(&refused)), Seen::Over(Err((REFUSED, "standby is 3 GB behind".to_owned()))));
        assert!(matches!(judge(None), Seen::Over(Err((FAILED, _)))));
        let done = RequestProgress::Done { message: "standby leads".to_owned() };
        assert_eq!(judge(Some(&done)), Seen::Over(Ok("standby leads".to_owned())));
    }
}
