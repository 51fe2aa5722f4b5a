//! `pgherd apply` and `pgherd get`: the cluster document in force.
//!
//! Applying is compare-and-swap: of two people who apply at once, one is told. A document that is in force already is not written
//! again. Nothing is refused by halves: a setting that promises safety and is not built, or the loss of the member that leads, stops
//! the whole document.

use std::path::Path;

use crate::cli::Connection;
use crate::cli::connect::{self, block_on};
use crate::cli::exit::{DONE, FAILED, Failure, Outcome, REFUSED};
use crate::cli::output::{print, tell, who};
use crate::cli::read::read_document;
use crate::etcd::{Applied, Etcd, EtcdError};
use crate::facts::cluster::{ClusterView, SpecRecord};
use crate::spec::Severity;
use crate::spec::cluster::{self, ClusterSpec};
use crate::spec::unbuilt::{self, Refusal};

/// `pgherd apply`.
pub fn apply(connection: &Connection, file: &Path, dry_run: bool, expected: Option<u64>) -> Outcome {
    let (name, text) = read_document(file)?;
    let loaded = cluster::load(&name, &text)?;
    for warning in &loaded.warnings {
        tell(&warning.to_string());
    }
    let refusals = unbuilt::refusals(&loaded.spec);
    if !refusals.is_empty() {
        let line = |refusal: &Refusal| {
            let message = format!("{} is refused: {}", refusal.value, refusal.reason);
            loaded.problem(Severity::Error, &refusal.path, message, None).to_string()
        };
        return Err(Failure::new(REFUSED, refusals.iter().map(line).collect::<Vec<_>>().join("\n")));
    }
    let etcd = connect::etcd(connection, Some(&loaded.spec.name))?;
    if etcd.settings().cluster != loaded.spec.name {
        let sentence = format!("{name} is of the cluster `{}`, and you asked for `{}`", loaded.spec.name, etcd.settings().cluster);
        return Err(Failure::new(REFUSED, sentence));
    }
    block_on(async {
        let view = etcd.read_view().await?;
        let plan = plan(&view, in_force(&etcd).await?, &loaded.spec, &text, expected).map_err(|reason| Failure::new(REFUSED, reason))?;
        for condition in unbuilt::conditions(&loaded.spec) {
            tell(&format!("note: {}", condition.message));
        }
        match plan {
            Plan::Unchanged(generation) => print(&format!("{name} is in force already, as generation {generation}\n")),
            Plan::Replace(from) if dry_run => print(&would(&name, from)),
            Plan::Replace(from) => write(&etcd, &text, from).await,
        }
    })
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// This very text is in force.
    Unchanged(u64),
    /// Replace this generation; `Generation(0)` = there is none.
    Replace(From),
}

/// What a new document replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// This generation; 0 = there is none.
    Generation(u64),
    /// Something that cannot be read.
    Unreadable,
}

/// The record in force. None in the middle = none; `Err` = one that cannot be read.
async fn in_force(etcd: &Etcd) -> Result<Result<Option<SpecRecord>, ()>, EtcdError> {
    match etcd.read_spec().await {
        Ok(record) => Ok(Ok(record)),
        Err(EtcdError::Unreadable { .. }) => Ok(Err(())),
        Err(error) => Err(error),
    }
}

/// Decides, or says why not.
fn plan(
    view: &ClusterView,
    in_force: Result<Option<SpecRecord>, ()>,
    spec: &ClusterSpec,
    text: &str,
    expected: Option<u64>,
) -> Result<Plan, String> {
    let from = match &in_force {
        Ok(record) => From::Generation(record.as_ref().map_or(0, |record| record.generation)),
        Err(()) => From::Unreadable,
    };
    match (expected, from) {
        (Some(expected), From::Generation(found)) if expected != found => {
            return Err(format!(
                "generation {found} is in force, and you asked for it to be {expected}: look at `pgherd get` and apply again"
            ));
        }
        (Some(_), From::Unreadable) => {
            return Err("what is in force cannot be read, so that its generation is not known: leave --generation out".to_owned());
        }
        _ => {}
    }
    if let Some(leader) = &view.leader
        && !spec.members.iter().any(|member| member.name.as_str() == leader.holder)
    {
        return Err(format!("`{}` leads and the document does not name it: switch over to another member first", leader.holder));
    }
    if let Some(name) = view.suspended.iter().find(|name| !spec.members.iter().any(|member| member.name == **name)) {
        return Err(format!(
            "PostgreSQL on `{name}` may write without a lock in maintenance mode, and the document does not name it: `pgherd resume` first"
        ));
    }
    match in_force {
        Ok(Some(record)) if record.document == text => Ok(Plan::Unchanged(record.generation)),
        _ => Ok(Plan::Replace(from)),
    }
}

fn would(name: &str, from: From) -> String {
    match from {
        From::Generation(0) => {
            format!("{name} would be put in force as generation 1, or the next one that was never used; nothing was written\n")
        }
        From::Generation(found) => format!("{name} would replace generation {found}; nothing was written\n"),
        From::Unreadable => format!("{name} would replace a document that cannot be read; nothing was written\n"),
    }
}

async fn write(etcd: &Etcd, text: &str, from: From) -> Outcome {
    let expected = match from {
        From::Generation(found) => Some(found),
        From::Unreadable => None,
    };
    match etcd.apply_spec(text, &who(), expected).await? {
        Applied::Applied { generation } => print(&format!("generation {generation} is in force\n")),
        Applied::Conflict { found } => {
            let found = found.map_or_else(|| "none".to_owned(), |found| format!("generation {found}"));
            Err(Failure::new(
                FAILED,
                format!("somebody else applied meanwhile ({found} is in force): look at `pgherd get` and apply again"),
            ))
        }
    }
}

/// `pgherd get`.
pub fn get(connection: &Connection, generation: Option<u64>) -> Outcome {
    let etcd = connect::etcd(connection, None)?;
    let record = block_on(async {
        match generation {
            Some(generation) => Ok(etcd.read_old_spec(generation).await?),
            None => Ok(etcd.read_spec().await?),
        }
    })?;
    match (record, generation) {
        (Some(record), _) => print(&record.document).map(|_| DONE),
        (None, Some(generation)) => {
            Err(Failure::new(FAILED, format!("there is no generation {generation}: only the last 20 that were applied are kept")))
        }
        (None, None) => Err(Failure::new(FAILED, "no cluster document is in force: use `pgherd apply -f CLUSTER.yaml`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::cluster::LeaderKey;
    use crate::types::{Epoch, LeaseId};

    const DOCUMENT: &str =
        "apiVersion: pgherd/v1\nkind: Cluster\nmetadata: { name: main }\nspec:\n  members:\n    - { name: mdw, address: 10.0.12.9 }\n";

    fn decide(leader: Option<&str>, in_force: Result<Option<(u64, &str)>, ()>, expected: Option<u64>) -> Result<Plan, String> {
        let leader = leader.map(|holder| LeaderKey {
            holder: holder.to_owned(),
            epoch: Epoch(1),
            lease: LeaseId(1),
            mod_revision: crate::types::Revision(1),
        });
        let view = ClusterView { leader, ..ClusterView::default() };
        let record = |(generation, document): (u64, &str)| SpecRecord {
            generation,
            document: document.to_owned(),
            by: "dba@mdw".to_owned(),
            at: "2026-11-22T12:00:00Z".to_owned(),
        };
        let spec = cluster::load("cluster.yaml", DOCUMENT).unwrap().spec;
        plan(&view, in_force.map(|found| found.map(record)), &spec, DOCUMENT, expected)
    }

    #[test]
    fn the_same_document_is_not_written_again() {
        assert_eq!(decide(Some("mdw"), Ok(Some((3, DOCUMENT))), None), Ok(Plan::Unchanged(3)));
        assert_eq!(decide(Some("mdw"), Ok(Some((3, "other"))), Some(3)), Ok(Plan::Replace(From::Generation(3))));
    }

    #[test]
    fn another_generation_than_the_expected_one_is_refused() {
        assert!(decide(None, Ok(Some((3, "other"))), Some(2)).unwrap_err().contains("generation 3 is in force"));
        assert_eq!(decide(None, Ok(None), Some(0)), Ok(Plan::Replace(From::Generation(0))));
    }

    #[test]
    fn a_document_without_the_member_that_leads_is_refused() {
        assert!(decide(Some("standby"), Ok(Some((3, "other"))), None).unwrap_err().contains("switch over"));
    }

    #[test]
    fn what_cannot_be_read_is_replaced_unless_a_generation_was_asked_for() {
        assert_eq!(decide(None, Err(()), None), Ok(Plan::Replace(From::Unreadable)));
        assert!(decide(None, Err(()), Some(1)).is_err());
    }
}
