//! Keeps the replication slots of this member what they should be: every loop_wait, and at once when one is missing.

use std::time::Duration;

use crate::facts::postgres::SqlFacts;
use crate::machine::action::Operation;
use crate::machine::node::Context;
use crate::policy::slots::{self, Change, Inputs};
use crate::types::Lsn;

/// Slots that would be lost within this are warned of.
const WARN_WITHIN: Duration = Duration::from_secs(24 * 3600);
/// The pace of WAL is judged over no less.
const PACE_OVER_MS: u64 = 1_000;

pub(crate) fn keep(context: &mut Context<'_>) {
    let now = context.now;
    let world = &mut *context.world;
    let (Some(spec), Some(view)) = (world.spec().cloned(), world.fresh_view().cloned()) else { return };
    slots::note_absent(&mut world.slots.absent, now, &spec, &view);
    let (Some(me), Some(sql)) = (spec.member(&world.me.name), world.sql().cloned()) else { return };
    let inputs = Inputs {
        now,
        me,
        spec: &spec,
        view: &view,
        absent: &world.slots.absent,
        in_recovery: sql.in_recovery,
        own: if sql.in_recovery { sql.replay_lsn } else { sql.receive_lsn },
        major_version: sql.server_version_num / 10_000,
        slots: &sql.slots,
        kept: &world.slots.kept,
    };
    // What was asked before the last change was made does not show it.
    let seen = world.probe.as_ref().is_some_and(|probe| probe.begun >= world.slots.changed_at);
    let changes = if seen { slots::changes(&inputs) } else { Vec::new() };
    let wanted = slots::wanted_names(&spec, &world.me.name);
    world.slots.kept.extend(wanted.into_iter().filter(|name| sql.slots.iter().any(|slot| slot.name == *name)));
    let due = world.slots.looked_at.is_none_or(|at| now.since(at) >= spec.ha.loop_wait);
    if due {
        say(context, &sql);
    }
    let at_once = changes.iter().any(|change| !matches!(change, Change::Advance { .. }));
    if !changes.is_empty() && (due || at_once) {
        context.start(Operation::KeepSlots(changes));
    }
}

/// Slots hold WAL back up to max_slot_wal_keep_size; then their members have to be copied anew.
fn say(context: &mut Context<'_>, sql: &SqlFacts) {
    let now = context.now;
    let world = &mut *context.world;
    let before = world.slots.looked_at.replace(now).map(|at| (at, world.slots.written));
    let written: Lsn = sql.receive_lsn;
    world.slots.written = written;
    let pace = before.filter(|(at, _)| now.since(*at) >= Duration::from_millis(PACE_OVER_MS)).map(|(at, lsn)| {
        let millis = u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX).max(1);
        written.bytes_since(lsn).saturating_mul(1_000) / millis
    });
    let lost: Vec<String> = sql.slots.iter().filter(|slot| slot.is_lost()).map(|slot| format!("`{}`", slot.name)).collect();
    if lost.is_empty() {
        world.clear("slots_lost");
    } else {
        let message = format!(
            "the WAL that {} were to keep was removed by max_slot_wal_keep_size: they are made anew, and whoever used them has to be copied",
            lost.join(", ")
        );
        world.warn("slots_lost", message);
    }
    match pace.and_then(|pace| slots::time_to_full(&sql.slots, pace)).filter(|(_, left)| *left < WARN_WITHIN) {
        Some((name, left)) => {
            let message = format!(
                "slot `{name}` is not in use and holds WAL back: at the present pace its room (max_slot_wal_keep_size) is full in {} min",
                left.as_secs() / 60
            );
            world.warn("slot_fills", message);
        }
        None => world.clear("slot_fills"),
    }
}
