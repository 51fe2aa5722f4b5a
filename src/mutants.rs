//! Deliberate bugs, to prove that the simulator would find them. A simulator that has not found planted bugs has proved nothing.
//!
//! Without the cargo feature `mutants`, which no shipped program is built with, [`mutant`] is a constant `false` and nothing of it is
//! left in the code. With it one bug at a time is switched on, for the thread that asks.
//!
//! The rule that would surprise: some of these live in the simulator, where it stands in for an edge (etcd's transactions, the lease's
//! thread, jobs on PostgreSQL), and are switched on the same way.

enumerated! {
    /// One deliberate bug.
    Mutant {
        /// E counts from etcd's answer and not from before the request.
        DeadlineFromTheAnswer,
        /// A keepalive that says OK is taken for a proof of the lock (etcd #20616).
        ProofOmitted,
        /// A proof of another raft term than the keepalive's counts.
        ProofOfAnyTerm,
        /// The guard does not perform the ladder.
        LadderNotClimbed,
        /// The end of the postmaster is taken for the end of all its processes (SAFETY row 6).
        DeathOfPostmasterIsProof,
        /// After a compaction the watch goes on as if nothing had been missed, and nothing is ever listed again.
        WatchGapIgnored,
        /// What peers say of themselves before an election is not heard.
        PeersNotHeard,
        /// A diverged data directory is not kept when a copy takes its place.
        DivergedNotKept,
        /// Ids that others reserved are not laid as history files before promote.
        ReservedIdsNotLaid,
        /// PostgreSQL is promoted before the guard has acknowledged that it may write.
        PromoteUnvouched,
        /// A leader's write is accepted whatever its epoch.
        EpochNotCompared,
        /// The transaction that takes the lock does not compare what the member judged itself on.
        AcquireComparesNothing,
        /// The machine does not look whether its proof has run out.
        ProofNeverRunsOut,
        /// The lock is given back before PostgreSQL is proved dead.
        ReleasedBeforeDeath,
        /// A leader that hands over gives the lock back before its successor has the shutdown checkpoint.
        ReleasedBeforeTheCheckpointArrived,
        /// What was carried out is carried out again, as long as it stands there.
        RequestCarriedOutAgain,
        /// The guard suspends the deadlines by what its daemon saw of maintenance mode, without a note in etcd that compares it.
        SuspendsByWhatItSaw,
        /// The guard fences again at the end of maintenance mode although the lock is not proved anew.
        FencesWithAnOldProof,
        /// The note in etcd that a guard may suspend is taken back before that guard fences again.
        NoteTakenBackBeforeTheGuardFences,
        /// Maintenance mode ends before all who have to have heard of it.
        EndedBeforeAllHaveHeard,
        /// A restart that a run of the daemon before took up is begun again.
        RestartCarriedOutAgain,
        /// A restart that was asked of a standby is carried out on a primary.
        RestartOfEitherRole,
        /// Who else is being restarted does not matter.
        RestartsAtOnce,
        /// A switchover does not wait for a restart that was claimed before.
        SwitchesOverInARestart,
        /// A standby that its own restart has taken down stays down when maintenance mode is set in that moment.
        PausedInARestart,
        /// A release that is carried out late deletes the lock although its holder went on with it.
        LateReleaseObeyed,
        /// A lock is used before its key was written again, although a release of it may be on its way.
        UsedWithoutWritingAgain,
        /// A lock is used while it is being given back.
        UsedWhileGivenBack,
        /// Positions are compared by number, whatever timeline they are on.
        PositionsWithoutTimeline,
        /// A member that lost the lock takes it back from a timeline that was left behind.
        LineageNotLooked,
        /// How far behind a member is does not matter.
        LagIgnored,
        /// A failover by hand goes on although more would be lost than was accepted.
        LossBeyondWhatWasAccepted,
        /// A failover by hand needs nobody's word that the loss is accepted.
        LossNotAccepted,
        /// The next timeline id is one more than the member's own.
        TimelineFromOwnOnly,
        /// initdb although another member holds data.
        InitdbBesideData,
        /// A daemon that starts takes a leader key with its own name for its own lock.
        AdoptedByName,
        /// A promotion without a proof of the lock.
        PromoteUnproved,
        /// The lock that vanished from the view is still believed to be held.
        LostLockNotSeen,
        /// PostgreSQL out of recovery without a lock is left alone (SAFETY row 66).
        UnlawfulLeftAlone,
        /// A timeline of the leader's number is followed whoever promoted it (SAFETY row 53).
        ForeignPromotionFollowed,
        /// Divergence past the switch point is not looked at.
        DivergenceIgnored,
        /// pg_rewind is started before the leader's control file shows the timeline that it writes on (Patroni #3367).
        RewindBeforeCheckpoint,
        /// No marker tells that a rewind was begun and has not ended (Patroni #2302).
        RewindUnmarked,
        /// A rewind that broke off is taken up again whoever leads by now.
        RewindResumedUnderAnother,
        /// A member is rewound while commits are acknowledged on the strength of what it has.
        RewoundWhileCountedOn,
        /// A member throws its data directory away while commits are acknowledged on the strength of what it has.
        ReinitWhileCountedOn,
        /// A copy is made in the data directory's own place, where what is half copied is taken for whole.
        CopyMadeInPlace,
        /// What a primary's archiver did not get to is left to be removed by the standby that it becomes.
        LeftUnarchived,
        /// The WAL that only this member has is not kept before a rewind.
        RewoundWalNotKept,
        /// Failsafe: E counts from the last answer and not from before the first call.
        PromiseFromTheAnswer,
        /// Failsafe: the leader goes on although one member has not promised.
        MajorityOfPromises,
        /// Failsafe: a daemon that starts runs at once, whatever the run before it promised.
        PromiseForgotten,
        /// Failsafe: a promise is given and not booked, so that it holds nobody back.
        PromiseNotKept,
        /// Failsafe: a member that is not in the record runs.
        OutsidersRun,
        /// Synchrony: who has every acknowledged commit does not matter to who runs for the lock.
        RecordNotLooked,
        /// Synchrony: a member that was put back to an older state is believed about what it has acknowledged (SAFETY row 27).
        PutBackCounts,
        /// Synchrony: one member fewer than it takes is enough to know that every acknowledged commit has been seen.
        OneFewerSeen,
        /// Synchrony: a member says how far it is while it still receives.
        VoteWhileReceiving,
        /// Synchrony: what PostgreSQL has not replayed yet since its start is left out of how far it is.
        VoteWhileReplaying,
        /// Synchrony: a member promotes on the record of the leader before.
        RecordNotTakenOver,
        /// Synchrony: a new primary acknowledges before anybody has told it for whom to wait.
        PromotedOpen,
        /// Synchrony: the names are weakened before the record is.
        NamesBeforeRecord,
        /// Synchrony: the record is strengthened before standbys have flushed what was written by then.
        RecordBeforeFlush,
        /// Synchrony: every walsender is thought to go by new names as soon as a new session does.
        WalsendersNotSeen,
        /// Synchrony: a standby counts whatever timeline it is sent.
        CountedWhileAhead,
        /// Synchrony: what was asked before the names changed is taken for what came of it.
        StaleProbeBelieved,
        /// Synchrony: an answer that was lost is taken for nothing written.
        LostAnswerForgotten,
        /// Synchrony: a write of the record that is carried out late is not fenced.
        LateRecordObeyed,
        /// Synchrony: a primary that starts again lets clients in at once (SAFETY row 48).
        StartsOpen,
        /// Synchrony: the next daemon lets clients in at once that the one before kept out.
        FoundServerOpened,
        /// A standby that receives nothing is left alone (SAFETY row 10).
        StandstillIgnored,
        /// A standby never leaves the member that it is to follow, also if that one gives it nothing (SAFETY row 56).
        CascadeWithoutFallback,
    }
}

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether this bug is in force on this thread.
    pub fn mutant(which: Mutant) -> bool {
        ACTIVE.get() == Some(which)
    }

    /// Switches one bug on, or all off, for this thread.
    pub fn activate(which: Option<Mutant>) {
        ACTIVE.set(which);
    }
}

#[cfg(feature = "mutants")]
pub use switch::{activate, mutant};

/// Never: this program was built without deliberate bugs.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn mutant(_: Mutant) -> bool {
    false
}
