//! Decides whether a member may throw its data directory away and copy it anew, as an operator ordered by name. Never touches one.
//!
//! What surprises: while commits are acknowledged on the strength of what this member has, there must be as many others that could take its
//! place in `sync`. A leader that does not take writes is nobody to copy from, whatever its key says of its data.

use crate::facts::cluster::{ClusterView, Initialize, MemberKey, MemberRole};
use crate::facts::requests::{Ask, RequestProgress};
use crate::policy::switchover::Obstacle;
use crate::policy::upstream;
use crate::spec::cluster::{ClusterSpec, Member};
use crate::types::MemberName;

/// What is judged on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The member that is to be copied anew, which judges.
    pub me: &'a MemberName,
    /// It holds a lock, whatever the view says.
    pub leads: bool,
    /// The spec in force.
    pub spec: &'a ClusterSpec,
    /// etcd's keys.
    pub view: &'a ClusterView,
    /// The request. It is nobody else's.
    pub request: &'a str,
}

/// What stands in the way, if anything does.
pub fn obstacle(inputs: &Inputs<'_>) -> Option<Obstacle> {
    let Inputs { me, view, .. } = inputs;
    let lasting = |why: String| Some(Obstacle::Lasting(why));
    let passing = |why: String| Some(Obstacle::Passing(why));
    if inputs.leads || view.leader.as_ref().is_some_and(|leader| leader.holder == me.as_str()) {
        return lasting(format!("`{me}` leads: hand over first (`pgherd switchover`)"));
    }
    let Some(leader) = &view.leader else {
        let others_have_data = view.members.iter().any(|(name, key)| name != *me && key.has_data());
        return passing(match others_have_data {
            true => "nobody leads, so that there is nobody to copy from: look at `pgherd status`".to_owned(),
            false => format!("nobody leads, and nobody but `{me}` has data: it may be the only copy"),
        });
    };
    let Some((name, key)) = view.leader_member().filter(|(_, key)| writes(key) && key.lease == leader.lease) else {
        return passing(format!("the leader `{}` does not take writes now, so that there is nobody to copy from", leader.holder));
    };
    if key.record.machine_state == "handing_over" {
        return passing(format!("`{name}` hands the lock over just now"));
    }
    if !matches!(&view.initialize, Some(Initialize::Done(id)) if key.record.system_id == Some(*id)) {
        return passing(format!("the leader `{name}` has not said that its data is the cluster's"));
    }
    if let Some(by) = another(inputs) {
        return lasting(format!("a new copy of `{me}` is being made already, asked for by {by}"));
    }
    counted_on(inputs).map(Obstacle::Lasting)
}

fn writes(key: &MemberKey) -> bool {
    key.record.role == MemberRole::Primary && key.has_data()
}

/// Who ordered the same before, if it is being done.
fn another<'a>(inputs: &'a Inputs<'_>) -> Option<&'a str> {
    let open = |progress: &RequestProgress| matches!(progress, RequestProgress::Claimed { .. });
    let same = inputs.view.requests.iter().filter(|(id, _)| id.as_str() != inputs.request);
    let mut same =
        same.filter(|(_, key)| matches!(&key.record.ask, Ask::Reinit { on, .. } if on == inputs.me) && open(&key.record.progress));
    same.next().map(|(_, key)| key.record.by.as_str())
}

/// Commits wait for this member, and too few others could take its place.
fn counted_on(inputs: &Inputs<'_>) -> Option<String> {
    let Inputs { me, view, spec, .. } = inputs;
    if view.sync_revision.0 == 0 {
        return None;
    }
    let Some(record) = &view.sync else {
        return Some("the key sync cannot be read: who has every acknowledged commit is not known".to_owned());
    };
    let asked = record.copies.saturating_sub(1);
    if asked == 0 || !record.members.contains(*me) {
        return None;
    }
    let could = spec.members.iter().filter(|member| could_count(member) && member.name != **me && member.name != record.leader);
    let could = could.filter(|member| upstream::is_well(view, &member.name) && !is_copied_anew(view, &member.name)).count();
    (could < asked as usize).then(|| {
        format!(
            "commits are acknowledged on the strength of what `{me}` has, and of the other standbys {could} could take its place, where {asked} \
             have to: have another one stream first, or have fewer asked for (replication.synchronous_node_count, replication.mode)"
        )
    })
}

fn could_count(member: &Member) -> bool {
    !member.tags.nosync && !member.tags.nostream && !member.nofailover()
}

fn is_copied_anew(view: &ClusterView, member: &MemberName) -> bool {
    view.requests.values().any(|key| {
        let of_it = matches!(&key.record.ask, Ask::Reinit { on, .. } if on == member);
        of_it && matches!(key.record.progress, RequestProgress::Claimed { .. })
    })
}

#[cfg(test)]
mod tests;
