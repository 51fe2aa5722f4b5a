//! WAL that a primary's archiver did not get to: on the way back it is archived before anything can take it away.
//!
//! A standby with `archive_mode = on` archives nothing, and removes such segments like any other; a rewind removes them at once. The new
//! primary got them as a standby and takes them for archived. So no leader is followed, and nothing is rewound or copied, before they are in
//! the archive or beside the data directory. What surprises: that has two tries and no more. The archive may be gone for days, and the
//! cluster needs its standby; what then goes missing is said.

use crate::machine::action::{Action, Decision, Operation, OperationKind, Upstream};
use crate::machine::archiving::ATTEMPTS_MAX;
use crate::machine::node::Context;
use crate::machine::state::State;
use crate::machine::world::World;
use crate::mutants::{Mutant, mutant};
use crate::policy::rejoin::Rejoin;

/// There is WAL to be archived, and it has not been tried in vain.
pub(crate) fn is_owed(world: &World) -> bool {
    let given_up = world.failures(OperationKind::ArchiveLeft) >= ATTEMPTS_MAX;
    world.left.ready > 0 && archives(world) && !given_up && !mutant(Mutant::LeftUnarchived)
}

fn archives(world: &World) -> bool {
    world.spec().is_some_and(|spec| spec.postgres.archive_command.is_some())
}

/// Once the way back is judged, and before it is gone. True as long as it has to wait for this.
pub(crate) fn goes_first(context: &mut Context<'_>, leader: &Upstream) -> bool {
    let shared = match &context.world.rejoin {
        Some(Rejoin::Follow) => None,
        Some(Rejoin::Rewind { lost, .. }) => Some(lost.from),
        // The leader has all of it, and it is copied because it does not start.
        Some(Rejoin::Clone { lost, .. }) => lost.map(|lost| lost.from),
        Some(Rejoin::Wait { .. } | Rejoin::Refuse { .. }) | None => return false,
    };
    let Some(spec) = context.world.spec().cloned().filter(|_| is_owed(context.world)) else { return false };
    let ready = context.world.left.ready;
    if context.start(Operation::ArchiveLeft { leader: leader.clone(), spec, shared }) {
        let message = format!("{ready} files of WAL are marked as ready for the archive: they are seen to before PostgreSQL is a standby");
        context.decide("archives_what_is_left", message);
        // It takes a while: the way back is judged again afterwards.
        context.world.rejoin = None;
    }
    true
}

/// In every state: what came of it is told, and what was put beside is archived from there.
pub(crate) fn settle(context: &mut Context<'_>, state: &State) {
    for (kind, message) in std::mem::take(&mut context.world.left.untold) {
        context.actions.push(Action::Record(Decision { kind, message, facts: context.world.decision_facts() }));
    }
    let busy = context.world.in_flight.contains(&OperationKind::ArchiveLeft) || context.world.is_maintained();
    let leaves = context.world.stop_requested || matches!(state, State::Starting | State::Stopping | State::Undeclared);
    if context.world.left.beside.is_none() || busy || leaves || !archives(context.world) {
        return;
    }
    if let Some(spec) = context.world.spec().cloned() {
        context.start(Operation::ArchiveBeside { spec });
    }
}
