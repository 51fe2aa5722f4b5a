//! What each state does with each kind of event, as a table: no pair is left to chance, and a new state or kind does not compile
//! before somebody has said what it does.
//!
//! What surprises: before any event is taken in, the clock is looked at, and a proof of the lock that has run out counts as no lock.
//! So every event may end a leadership, `Tick` too; the table says what the facts of the event itself do.

use super::event::EventKind;
use super::state::StateKind;

/// What becomes of an event, from the weakest to the strongest that an event of its kind can lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reaction {
    /// It says nothing that is not known. The state looks again, as it does after every event: time went by, an order may be due again.
    NothingNew,
    /// Its facts are remembered and told to others, and this state does not depend on them: it goes on as it was.
    Noted,
    /// Its facts are taken in and the state looks again: it goes along an edge, gives an order, or leaves one ungiven.
    TakenIn,
    /// Remembered. What this state is in the middle of comes to its end first, as soon as it can; the daemon stops after that.
    Deferred,
    /// The daemon goes out, at once: what works on PostgreSQL is abandoned and PostgreSQL is ended.
    Leaves,
    /// The daemon goes out, at once, and what runs goes on as it is.
    Departs,
    /// A leadership ends in good order: checkpoint, stop, the successor has everything, release.
    HandsOver,
    /// Without a guard nothing can be started and nothing that runs is watched: PostgreSQL is ended by scan and a new guard is started.
    /// The state stays, but that a candidate is none any more.
    Scans,
    /// The same, and the leadership ends: nobody leads without a guard that would fence it.
    Demotes,
    /// It may take away what PostgreSQL writes by, as below; PostgreSQL is being ended already, and if it may write then at once.
    UnderWay,
    /// Judged before the state is asked: if it takes away what PostgreSQL writes by (the lock, the guard's word), PostgreSQL is ended
    /// whatever the state is about. Otherwise as [`Reaction::TakenIn`].
    Wins,
}

/// The table.
pub fn reaction(state: StateKind, event: EventKind) -> Reaction {
    use EventKind as E;
    use Reaction::*;
    use StateKind::*;
    match event {
        E::Tick => NothingNew,
        E::WallClock => match state {
            // What was scheduled may be due, come second, or not be possible here.
            Undeclared | AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining | Primary | HandingOver | Paused
            | Stopping => TakenIn,
            // It is not known yet what this member is.
            Starting | Promoting | Restarting | Demoting => Noted,
        },
        E::LeaseFailed => match state {
            // Of a lock that is to be taken over it is said.
            Starting => Noted,
            _ => NothingNew,
        },
        // How clients get to a member changes nothing of what it does.
        E::SpecUnreadable | E::Routed => Noted,
        E::SpecRead => match state {
            Starting | Undeclared | AwaitingLeader | Initializing | Following | Candidate | Promoting | Primary | HandingOver => TakenIn,
            // A member that waits for a leader to go on with a rewind may not be declared any more.
            Rejoining => TakenIn,
            // What is being done was begun under the spec before, and is gone through with.
            Cloning | Restarting | Demoting | Stopping => Noted,
            // Taken up when maintenance mode is over.
            Paused => Noted,
        },
        E::View => match state {
            Starting | Undeclared | Promoting | Primary | HandingOver | Restarting | Paused => Wins,
            // No server is allowed to write here: one that is has ended these states already.
            AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining => TakenIn,
            Demoting | Stopping => UnderWay,
        },
        E::EtcdTrouble => match state {
            Undeclared | AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining | Promoting | Primary
            | HandingOver | Demoting | Paused => TakenIn,
            Starting | Restarting | Stopping => Noted,
        },
        E::LeaseKept => match state {
            // A claim and a race for the lock hang on it; a standby finds that the lock in etcd hangs on it, and gives that back.
            Initializing | Following | Candidate | Paused => TakenIn,
            Starting | Undeclared | AwaitingLeader | Cloning | Rejoining | Promoting | Primary | HandingOver | Restarting | Demoting
            | Stopping => Noted,
        },
        E::LockProved | E::LockSustained => match state {
            Starting | Following | Promoting | Paused => TakenIn,
            // It may be ours and of no use here, or what is done is done under it: it holds for longer.
            Undeclared | AwaitingLeader | Cloning | Rejoining | Primary | HandingOver | Restarting | Demoting | Stopping => Noted,
            // It is of a lock that was let go.
            Initializing | Candidate => NothingNew,
        },
        E::LeaseLost => match state {
            Starting | Undeclared | Promoting | Primary | HandingOver | Restarting | Paused => Wins,
            AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining => TakenIn,
            Demoting | Stopping => UnderWay,
        },
        E::GuardSilent | E::GuardGone => match state {
            Promoting | Primary | HandingOver | Restarting => Demotes,
            // In maintenance mode when that ends.
            Starting | Undeclared | AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining | Demoting | Paused
            | Stopping => Scans,
        },
        E::Guard => match state {
            Starting | Undeclared | Primary | HandingOver | Restarting => Wins,
            // Suspended, it is left alone; and what a person promoted by hand.
            Paused => TakenIn,
            // None of these has a server that writes, or it is left or being ended the moment that one is seen.
            AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining | Promoting | Demoting | Stopping => TakenIn,
        },
        E::Probed => match state {
            Starting | Undeclared | Following | Candidate | Rejoining | Promoting | HandingOver | Restarting => Wins,
            // The guard's word for its server is that it may write, and the lock is proved.
            Primary => TakenIn,
            // What was promoted by hand holds up the end of maintenance mode.
            Paused => TakenIn,
            // There is no server here. What one says does not matter to its end either: the guard's proof does.
            AwaitingLeader | Initializing | Cloning | Demoting | Stopping => Noted,
        },
        E::Finished => TakenIn,
        // The answer goes out at once; it holds back who would run for the lock, and nobody else.
        E::PromiseAsked => match state {
            Candidate => TakenIn,
            Starting | Undeclared | AwaitingLeader | Initializing | Cloning | Following | Rejoining | Paused | Stopping => Noted,
            // Whoever leads, or did until a moment ago, promises nothing.
            Promoting | Primary | HandingOver | Restarting | Demoting => NothingNew,
        },
        E::StopRequested => match state {
            Starting | Undeclared | AwaitingLeader | Initializing | Cloning | Following | Candidate | Rejoining => Leaves,
            // Guard and PostgreSQL stay.
            Paused => Departs,
            Primary => HandsOver,
            Promoting | HandingOver | Demoting => Deferred,
            Restarting => HandsOver,
            Stopping => NothingNew,
        },
    }
}
