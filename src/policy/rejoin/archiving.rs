//! Which WAL of a former primary belongs into the archive: what lies whole in the leader's past. Never looks at a disk.
//!
//! SAFETY row 54: a segment that diverged is never archived, and nor is the one in which the timelines part: the leader's own archiver
//! sends what is shared of it, as `.partial`. What surprises: what is marked on the leader's present timeline is not archived from here
//! either. Nobody but the leader has written on that one, and whoever was rewound has such marks from the leader's files.

use super::LeaderLineage;
use crate::types::{Lsn, TimelineId};

/// A file of pg_wal that PostgreSQL has marked as ready for the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marked {
    /// A segment, or the note of a base backup that began in it.
    Segment {
        /// Its timeline.
        timeline: TimelineId,
        /// Where the next one begins.
        ends: Lsn,
    },
    /// The history file of a timeline.
    History(TimelineId),
    /// A segment that a promotion ended, or something that is not PostgreSQL's.
    Other,
}

/// Whether it is to be archived from here. `shared` is how far the leader has what this member has; None = all of it.
pub fn belongs(marked: Marked, leader: &LeaderLineage, shared: Option<Lsn>) -> bool {
    let shared = shared.unwrap_or(Lsn(u64::MAX));
    match marked {
        Marked::Segment { timeline, ends } => leader.history.left_at(timeline).is_some_and(|left| ends <= left.min(shared)),
        Marked::History(timeline) => {
            let begun = leader.history.before(timeline).last().map_or(Lsn(0), |switch| switch.at);
            leader.history.left_at(timeline).is_some() && begun < shared
        }
        Marked::Other => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::rejoin::{Switch, TimelineHistory};
    use crate::types::SystemId;

    const SEGMENT: u64 = 16 << 20;

    /// On timeline 3, which left 2 in the middle of segment 7, which left 1 at the end of segment 4.
    fn leader() -> LeaderLineage {
        let switch = |parent, at| Switch { parent: TimelineId(parent), at: Lsn(at), reason: String::new() };
        LeaderLineage {
            system_id: SystemId(1),
            major_version: 17,
            in_recovery: false,
            timeline: TimelineId(3),
            history: TimelineHistory(vec![switch(1, 5 * SEGMENT), switch(2, 7 * SEGMENT + 100)]),
            lsn: Lsn(9 * SEGMENT),
            control_timeline: TimelineId(3),
            full_page_writes: true,
        }
    }

    fn segment(timeline: u32, number: u64) -> Marked {
        Marked::Segment { timeline: TimelineId(timeline), ends: Lsn((number + 1) * SEGMENT) }
    }

    #[test]
    fn row_54_only_what_lies_whole_in_the_leaders_past_is_archived() {
        let archived = |marked| belongs(marked, &leader(), None);
        assert!(archived(segment(1, 3)) && archived(segment(1, 4)) && archived(segment(2, 6)));
        assert!(!archived(segment(1, 5)), "past the point where timeline 1 was left");
        assert!(!archived(segment(2, 7)), "the timelines part in it");
        assert!(!archived(segment(3, 8)), "the leader's own");
        assert!(!archived(segment(4, 3)), "of a timeline that the leader's history does not know");
        assert!(archived(Marked::History(TimelineId(2))));
        assert!(!archived(Marked::History(TimelineId(3))) && !archived(Marked::History(TimelineId(4))) && !archived(Marked::Other));
    }

    #[test]
    fn row_53_what_a_member_wrote_on_another_timeline_of_the_same_number_is_not_archived() {
        let archived = |marked, shared| belongs(marked, &leader(), Some(Lsn(shared)));
        // It promoted a timeline 2 of its own, at the same point.
        assert!(archived(segment(1, 4), 5 * SEGMENT));
        assert!(!archived(segment(2, 5), 5 * SEGMENT) && !archived(Marked::History(TimelineId(2)), 5 * SEGMENT));
        assert!(archived(Marked::History(TimelineId(2)), 6 * SEGMENT));
        assert!(!archived(segment(1, 0), 0), "nothing is known to be shared");
    }
}
