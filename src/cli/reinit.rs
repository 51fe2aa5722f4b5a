//! `pgherd reinit`: has a member throw its data directory away and copy it anew. The member decides, and carries it out.

use std::time::Duration;

use clap::Args;

use crate::cli::Connection;
use crate::cli::ask::{self, Answer, Until};
use crate::cli::connect::{self, block_on};
use crate::cli::events::one_line;
use crate::cli::exit::{FAILED, Failure, Outcome, REFUSED};
use crate::cli::output::{confirm, print, who};
use crate::clock::BootTime;
use crate::facts::cluster::ClusterView;
use crate::facts::requests::Ask;
use crate::types::MemberName;

/// So long the member is given to take it up.
const TAKEN_UP_WITHIN_S: u64 = 120;
/// So long its end is waited for when nobody says otherwise: a copy may take days.
const OVER_WITHIN_S: u64 = 30 * 86_400;

/// What a reinit is to be.
#[derive(Debug, Args)]
pub struct Wanted {
    /// The member whose data directory is thrown away
    member: MemberName,
    /// Copy the leader, also where a member has the tag clonefrom
    #[arg(long)]
    from_leader: bool,
    /// Empty the data directory before the copy is made, where there is no room for both
    #[arg(long)]
    in_place: bool,
    /// Wait until the member streams again, and show how far the copy has got
    #[arg(long)]
    wait: bool,
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
    /// How long to wait, in seconds: until the member has taken it up (120 unless said), or with --wait until it streams (no end unless said)
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=2_592_000))]
    timeout: Option<u64>,
}

/// `pgherd reinit`.
pub fn reinit(connection: &Connection, wanted: Wanted) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    block_on(async {
        let question = check(&etcd.read_view().await?, &wanted).map_err(|reason| Failure::new(REFUSED, reason))?;
        confirm(&question, wanted.yes)?;
        let taken_up_within = Duration::from_secs(wanted.timeout.unwrap_or(TAKEN_UP_WITHIN_S).min(TAKEN_UP_WITHIN_S));
        let waits = Duration::from_secs(wanted.timeout.unwrap_or(if wanted.wait { OVER_WITHIN_S } else { TAKEN_UP_WITHIN_S }));
        let deadline = BootTime::now() + waits;
        let on = wanted.member.clone();
        let ask = Ask::Reinit { on: on.clone(), from_leader: wanted.from_leader, in_place: wanted.in_place };
        let id = etcd.create_request(ask, &who(), taken_up_within).await?;
        let until = if wanted.wait { Until::OverWithProgress(on.clone()) } else { Until::TakenUp };
        match ask::follow(&etcd, &id, deadline, &until).await? {
            Answer::TakenUp(_) => print(&format!("{on} has taken it up: `pgherd status` shows how far it gets\n")),
            Answer::Done(message) => print(&format!("{message}\n")),
            Answer::Judged(..) => Err(Failure::new(FAILED, "the answer is one to another question: look at `pgherd events`")),
        }
    })
}

/// The question to confirm, or why it would be in vain.
fn check(view: &ClusterView, wanted: &Wanted) -> Result<String, String> {
    ask::not_maintained(view)?;
    let member = &wanted.member;
    let Some(leader) = &view.leader else {
        return Err("nobody leads, so that there is nobody to copy from: look at `pgherd status`".to_owned());
    };
    if leader.holder == member.as_str() {
        return Err(format!("{member} leads: hand over first (`pgherd switchover`)"));
    }
    if !view.members.contains_key(member) {
        return Err(ask::no_key(member));
    }
    let from = if wanted.from_leader { format!("{}, which leads", one_line(&leader.holder)) } else { "the cluster".to_owned() };
    let how = match wanted.in_place {
        false => "It is removed once the copy is in its place, with all that is in it and nowhere else.",
        true => {
            "It is EMPTIED FIRST, with all that is in it and nowhere else: until the copy is made there is one copy fewer of everything."
        }
    };
    Ok(format!("Throw the data directory of {member} away, and copy {from} anew? {how}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::testing;

    fn wanted(member: &str, in_place: bool) -> Wanted {
        Wanted { member: member.parse().unwrap(), from_leader: false, in_place, wait: false, yes: false, timeout: None }
    }

    #[test]
    fn what_is_thrown_away_is_said_and_what_is_in_vain_is_refused() {
        let mut view = testing::view();
        assert!(check(&view, &wanted("mdw", false)).unwrap_err().contains("mdw leads: hand over first"));
        assert!(check(&view, &wanted("nobody", false)).unwrap_err().contains("no key"));
        assert!(check(&view, &wanted("standby", false)).unwrap().contains("the data directory of standby"));
        assert!(check(&view, &wanted("standby", true)).unwrap().contains("EMPTIED FIRST"));
        view.leader = None;
        assert!(check(&view, &wanted("standby", true)).unwrap_err().contains("nobody leads"));
    }
}
