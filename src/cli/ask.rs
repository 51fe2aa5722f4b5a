//! `pgherd bootstrap`, and what it shares with `switchover` and `failover`: asks the cluster through a request in etcd, and follows it to its end.
//!
//! The daemons decide; what is refused here is only what etcd already shows to be in vain. A request hangs on a lease as long as
//! `--timeout` until a leader takes it up, so that nothing is begun long after its requester gave up.

use std::time::Duration;

use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{FAILED, Failure, NO_ETCD, Outcome, REFUSED, TIMED_OUT};
use crate::cli::output::{confirm, print, tell, who};
use crate::cli::{Asking, Connection};
use crate::clock::BootTime;
use crate::etcd::{Etcd, EtcdError};
use crate::facts::cluster::{ClusterView, Initialize};
use crate::facts::requests::{Ask, Candidate, RequestProgress, StageTime};
use crate::types::MemberName;

/// Between two looks at the request.
const POLL_INTERVAL_MS: u64 = 100;
/// The same, of one that may take hours.
const PROGRESS_INTERVAL_MS: u64 = 500;

/// Looks at a request whose time is over: it is taken up at most once.
const LAST_LOOKS: u32 = 2;

/// `pgherd bootstrap`.
pub fn bootstrap(connection: &Connection, on: &MemberName, how: Asking) -> Outcome {
    request(connection, how, Ask::Bootstrap { on: on.clone() }, |view| check_bootstrap(view, on))
}

/// The question to confirm, or why it would be in vain.
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
        return Err(no_key(on));
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

/// Nothing is carried out in maintenance mode.
pub(crate) fn not_maintained(view: &ClusterView) -> Result<(), String> {
    if view.maintenance.is_some() {
        return Err("maintenance mode is on: end it first (`pgherd resume`)".to_owned());
    }
    Ok(())
}

/// Why nothing can be asked of this member.
pub(crate) fn no_key(member: &MemberName) -> String {
    format!("{member} has no key in etcd: its daemon is not running or cannot reach etcd")
}

fn request(connection: &Connection, how: Asking, ask: Ask, check: impl Fn(&ClusterView) -> Result<String, String>) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let question = check(&etcd.read_view().await?).map_err(|reason| Failure::new(REFUSED, reason))?;
        confirm(&question, how.yes)?;
        done(&etcd, ask, how.timeout()).await
    })
}

/// Asks for something, and prints what came of it.
pub(crate) async fn done(etcd: &Etcd, ask: Ask, patience: Duration) -> Outcome {
    match carried_out(etcd, ask, patience).await? {
        Answer::Done(message) | Answer::TakenUp(message) => print(&format!("{message}\n")),
        Answer::Judged(..) => Err(Failure::new(FAILED, "the answer is one to another question: look at `pgherd events`")),
    }
}

/// Asks for something, and waits for the answer.
pub(crate) async fn carried_out(etcd: &Etcd, ask: Ask, patience: Duration) -> Result<Answer, Failure> {
    let deadline = BootTime::now() + patience;
    let id = etcd.create_request(ask, &who(), patience).await?;
    follow(etcd, &id, deadline, &Until::Over).await
}

/// How long a request is followed, and what is told meanwhile.
pub(crate) enum Until {
    /// To its end.
    Over,
    /// To its end, telling how far the copy of this member has got.
    OverWithProgress(MemberName),
    /// Until somebody has taken it up.
    TakenUp,
}

/// How a request ended well.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It was carried out.
    Done(String),
    /// What a switchover would meet.
    Judged(Vec<Candidate>, Vec<String>),
    /// It was taken up, and no more was waited for.
    TakenUp(String),
}

/// What a look at the request means.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Nobody has taken it up.
    Waiting,
    /// It is being carried out; a line to tell.
    Working(String),
    /// It is over.
    Over(Result<Answer, (u8, String)>),
}

fn judge(progress: Option<&RequestProgress>) -> Seen {
    let done = |answer| Seen::Over(Ok(answer));
    match progress {
        Some(RequestProgress::Created) => Seen::Waiting,
        Some(RequestProgress::Claimed { by, stage, stages }) => {
            let over = if stages.is_empty() { String::new() } else { format!(" ({})", durations(stages)) };
            Seen::Working(format!("{by}: {} …{over}", one_line(stage)))
        }
        Some(RequestProgress::Done { message, stages }) if stages.is_empty() => done(Answer::Done(one_line(message))),
        Some(RequestProgress::Done { message, stages }) => done(Answer::Done(format!("{} ({})", one_line(message), durations(stages)))),
        Some(RequestProgress::Judged { candidates, warnings }) => done(Answer::Judged(candidates.clone(), warnings.clone())),
        Some(RequestProgress::Refused { reason }) => Seen::Over(Err((REFUSED, one_line(reason)))),
        None => Seen::Over(Err((
            FAILED,
            "the request is gone from etcd without an answer: look at `pgherd status` and `pgherd events`".to_owned(),
        ))),
    }
}

/// `checkpoint 0.04 s, stop 0.11 s`.
fn durations(stages: &[StageTime]) -> String {
    let each = stages.iter().map(|over| format!("{} {}.{:02} s", one_line(&over.stage), over.ms / 1_000, over.ms % 1_000 / 10));
    each.collect::<Vec<_>>().join(", ")
}

pub(crate) async fn follow(etcd: &Etcd, id: &str, deadline: BootTime, until: &Until) -> Result<Answer, Failure> {
    let mut told = String::new();
    let mut silent: Option<EtcdError> = None;
    while BootTime::now() < deadline {
        match etcd.read_request(id).await {
            Ok(found) => {
                silent = None;
                if found.is_none() && told.is_empty() && !matches!(until, Until::Over) {
                    return Err(Failure::new(TIMED_OUT, "the member did not take the request up in time: look at `pgherd status`"));
                }
                match judge(found.as_ref().map(|found| &found.record.progress)) {
                    Seen::Waiting => {}
                    Seen::Working(line) => {
                        if matches!(until, Until::TakenUp) {
                            return Ok(Answer::TakenUp(line));
                        }
                        let line = with_progress(etcd, until, line).await;
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
        let pause_ms = if matches!(until, Until::OverWithProgress(_)) { PROGRESS_INTERVAL_MS } else { POLL_INTERVAL_MS };
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
    if let Some(error) = silent {
        return Err(Failure { code: NO_ETCD, error: anyhow::Error::from(error).context("how the request ended is not known") });
    }
    too_late(etcd, id, told).await
}

/// The time is over. What nobody has taken up is taken back, but only as it was seen: somebody may take it up at this very moment.
async fn too_late(etcd: &Etcd, id: &str, mut told: String) -> Result<Answer, Failure> {
    let taken_back = || Failure::new(TIMED_OUT, "no member took the request up in time; it was taken back: look at `pgherd status`");
    for _ in 0..LAST_LOOKS {
        let found = etcd.read_request(id).await?;
        match (judge(found.as_ref().map(|found| &found.record.progress)), found) {
            (Seen::Waiting, Some(found)) => {
                if etcd.cancel_request(id, found.mod_revision).await? {
                    return Err(taken_back());
                }
            }
            // Its lease has run out in this very moment: the same, but that etcd did it.
            (_, None) if told.is_empty() => return Err(taken_back()),
            (Seen::Working(line), _) => {
                told = line;
                break;
            }
            (Seen::Over(end), _) => return over(etcd, id, end).await,
            (Seen::Waiting, None) => break,
        }
    }
    Err(Failure::new(TIMED_OUT, format!("still running ({told}): look at `pgherd status` and `pgherd events`")))
}

/// The line, with how far the copy has got.
async fn with_progress(etcd: &Etcd, until: &Until, line: String) -> String {
    let Until::OverWithProgress(member) = until else { return line };
    let copying = match etcd.read_view().await {
        Ok(view) => view.members.get(member).and_then(|key| key.record.copying.as_ref().map(ToString::to_string)),
        Err(_) => None,
    };
    copying.map_or(line.clone(), |copying| format!("{line} {}", one_line(&copying)))
}

async fn over(etcd: &Etcd, id: &str, end: Result<Answer, (u8, String)>) -> Result<Answer, Failure> {
    // Answered is answered: if it cannot be cleared away, its lease will.
    let _ = etcd.delete_request(id).await;
    end.map_err(|(code, reason)| Failure::new(code, reason))
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
        let done = RequestProgress::Done { message: "standby leads".to_owned(), stages: Vec::new() };
        assert_eq!(judge(Some(&done)), Seen::Over(Ok(Answer::Done("standby leads".to_owned()))));
    }
}
