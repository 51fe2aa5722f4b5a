//! The faults of a run, laid out before it begins: what, when, where, for how long. The plan alone, with the seed, is the run; a shorter
//! plan that fails the same way is a better report.

use std::time::Duration;

use super::clock::{Real, ms, secs};
use super::documents::Replication;
use super::random::Random;

pgherd::enumerated! {
    /// Kinds of fault.
    Kind {
        KillDaemon,
        DaemonStaysDown,
        FreezeDaemon,
        StarveDaemon,
        CrashLoopOfDaemon,
        StopDaemon,
        LeaveDaemon,
        KillGuard,
        KillGuardAndDaemon,
        FreezeGuard,
        FreezeGuardAndDaemon,
        KillPostmaster,
        StoppedByHand,
        CrashLoopOfPostgres,
        StartRefused,
        PromotionRefused,
        SlowPostgres,
        StuckBackend,
        DiskFull,
        CopiesBreak,
        DataLost,
        PromotedByHand,
        PowerOff,
        AllPowerOff,
        Suspend,
        HypervisorPause,
        ClockRate,
        CutEtcd,
        CutAnswers,
        FlappingEtcd,
        LossyEtcd,
        SlowEtcd,
        DuplicatedRequests,
        /// Writes are carried out late, also when whoever asked has long given up.
        LateRequests,
        CutPeers,
        Isolate,
        EtcdLeaderLost,
        EtcdDown,
        EtcdFull,
        LockDeleted,
        LeaseRevoked,
        MemberKeyDeleted,
        RenewsTheDead,
        RevokesEarly,
        LosesDeletions,
        WatchStalls,
        Compaction,
        EtcdRestored,
        EtcdWiped,
        Switchover,
        SpecEdited,
        /// A member that does not lead is not in the spec for a while.
        MemberRemoved,
        /// The data directory of a living daemon is taken away, and brought back if nothing has taken its place.
        DataMoved,
        /// The leader's daemon stands still between a keepalive and its answer, and is cut off from etcd when it goes on.
        FrozenInRenewal,
        /// The leader hands over; its release gets lost on the way, its daemon is started again or its successor is away, and the release is
        /// carried out after all. Or its guard ends before the release does.
        LostRelease,
        /// A member's request for the lock is on its way while another takes it, leads, and loses it again.
        LateRace,
        /// A deposed leader of etcd goes on to answer keepalives for a moment; then etcd is out of reach.
        OldEtcdLeader,
        /// The leader is cut off from etcd for longer than its lease lasts; meanwhile a member forgets what it promised, or one comes back
        /// that was not asked to promise.
        LeadsByPromises,
        /// A daemon is started under the name of the leader, on a host that is not the leader's.
        Namesake,
        /// A person sets maintenance mode, things happen meanwhile, and it is ended.
        Maintenance,
        /// Aimed at the moment before or after an order of the machine.
        Strike,
        /// The leader's daemon stands still, and somebody deletes its lock: its PostgreSQL writes on until the guard's deadline.
        FrozenAndDeposed,
        /// A standby's PostgreSQL comes and goes.
        StandbyFlaps,
        /// A process of a standby crashes, and its PostgreSQL begins anew under the same postmaster.
        StandbyBeginsAnew,
        /// The standbys come back after a while, and what is written of it is carried out late, when they have gone again.
        LateRecord,
        /// A walreceiver gets stuck, and stays so until it, or PostgreSQL, is started again.
        ReceiverStuck,
        /// A standby that another one is to stream from gives it nothing, for good.
        UpstreamRefuses,
        /// Operators ask for restarts, and for files to be written again; often something else happens in the middle.
        Restart,
        /// An operator orders a new copy of a member, or of two.
        Reinit,
        /// A host loses power, and comes back with its disk as it was a while ago (SAFETY row 27).
        PutBack,
    }
}

impl Kind {
    /// Says something only where commits wait for standbys.
    fn is_of_synchrony(self) -> bool {
        matches!(self, Kind::FrozenAndDeposed | Kind::StandbyFlaps | Kind::StandbyBeginsAnew | Kind::LateRecord)
    }

    /// Drawn apart, so that the storms of other seeds stay what they were.
    fn is_drawn_apart(self) -> bool {
        matches!(self, Kind::ReceiverStuck | Kind::UpstreamRefuses | Kind::Maintenance | Kind::Restart | Kind::Reinit | Kind::PutBack)
    }

    /// How often one kind is drawn beside the others. What changes the leader is drawn more often.
    fn weight(self) -> u64 {
        match self {
            Kind::Strike => 14,
            Kind::FrozenAndDeposed | Kind::LateRecord | Kind::StandbyFlaps | Kind::StandbyBeginsAnew => 4,
            Kind::FrozenInRenewal | Kind::OldEtcdLeader | Kind::LeadsByPromises | Kind::LostRelease | Kind::LateRace => 4,
            Kind::KillDaemon | Kind::KillPostmaster | Kind::PowerOff | Kind::CutEtcd | Kind::FreezeDaemon | Kind::Switchover => 5,
            Kind::Isolate | Kind::CutPeers | Kind::SlowEtcd | Kind::EtcdLeaderLost | Kind::KillGuard | Kind::StopDaemon => 4,
            Kind::EtcdRestored | Kind::EtcdWiped | Kind::AllPowerOff | Kind::HypervisorPause | Kind::DataLost => 1,
            _ => 2,
        }
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub at: Real,
    pub kind: Kind,
    /// A number that the fault picks its victim with. Even: whoever leads then, if there is one.
    pub victim: u64,
    pub lasts: Duration,
    /// For what the fault has to choose besides.
    pub choice: u64,
}

/// How hard a run is.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Between the ends of two gaps, on average.
    pub mean_gap: Duration,
    /// A kind takes part in a run with this chance.
    pub kinds_percent: u64,
    /// When faults begin.
    pub from: Real,
    /// And end.
    pub until: Real,
}

impl Profile {
    pub const DEFAULT: Profile = Profile { mean_gap: ms(3_500), kinds_percent: 55, from: Real(8_000_000_000), until: Real(62_000_000_000) };

    pub fn describe(&self) -> String {
        format!(
            "a fault every {:.1} s on average from {} s to {} s of each run, each of {} kinds in it with a chance of {} %, half of them aimed at the leader, overlapping as they fall",
            self.mean_gap.as_secs_f64(),
            self.from.0 / 1_000_000_000,
            self.until.0 / 1_000_000_000,
            Kind::ALL.len(),
            self.kinds_percent
        )
    }
}

pub fn plan(seed: u64, profile: Profile) -> Vec<Fault> {
    let mut random = Random::new(seed, 3);
    let waits = Replication::of_seed(seed) != Replication::ASYNC;
    let takes_part = |kind: &Kind| (waits || !kind.is_of_synchrony()) && !kind.is_drawn_apart();
    let kinds: Vec<Kind> = Kind::ALL.iter().copied().filter(takes_part).filter(|_| random.percent(profile.kinds_percent)).collect();
    let total: u64 = kinds.iter().map(|kind| kind.weight()).sum();
    let mut faults = Vec::new();
    // Some runs begin while the cluster is still coming up.
    let mut at = if random.percent(25) { Real(100_000_000) } else { profile.from };
    if total == 0 {
        return with_maintenance(seed, profile, with_restarts(seed, profile, with_receiving(seed, profile, faults)));
    }
    loop {
        at = at.after(random.between(ms(150), profile.mean_gap * 2 - ms(150)));
        if at >= profile.until {
            break;
        }
        let mut drawn = random.below(total);
        let kind = *kinds
            .iter()
            .find(|kind| {
                let here = drawn < kind.weight();
                drawn = drawn.saturating_sub(kind.weight());
                here
            })
            .unwrap_or(&Kind::KillDaemon);
        let lasts = if random.percent(50) { random.between(ms(300), secs(5)) } else { random.between(secs(3), secs(22)) };
        // A watch that is silent for longer lists anew by itself, and has missed nothing.
        let lasts = if kind == Kind::Compaction { lasts.min(secs(3)) } else { lasts };
        faults.push(Fault { at, kind, victim: random.number(), lasts, choice: random.number() });
    }
    with_maintenance(seed, profile, with_restarts(seed, profile, with_receiving(seed, profile, faults)))
}

/// In some runs standbys come to receive nothing, wherever they receive from.
fn with_receiving(seed: u64, profile: Profile, mut faults: Vec<Fault>) -> Vec<Fault> {
    with_copies(seed, profile, &mut faults);
    let mut random = Random::new(seed, 7);
    if !random.percent(25) {
        return faults;
    }
    for _ in 0..=random.below(3) {
        let kind = if random.percent(70) { Kind::ReceiverStuck } else { Kind::UpstreamRefuses };
        let at = profile.from.after(random.between(ms(0), profile.until.since(profile.from)));
        faults.push(Fault { at, kind, victim: random.number(), lasts: ms(0), choice: random.number() });
    }
    faults
}

/// In some runs a person works on the cluster once or twice.
fn with_maintenance(seed: u64, profile: Profile, mut faults: Vec<Fault>) -> Vec<Fault> {
    let mut random = Random::new(seed, 8);
    if !random.percent(30) {
        return faults;
    }
    for _ in 0..=random.below(2) {
        let at = profile.from.after(random.between(ms(0), profile.until.since(profile.from)));
        let lasts = random.between(secs(1), secs(25));
        faults.push(Fault { at, kind: Kind::Maintenance, victim: random.number(), lasts, choice: random.number() });
    }
    faults
}

/// In some runs operators ask for restarts.
fn with_restarts(seed: u64, profile: Profile, mut faults: Vec<Fault>) -> Vec<Fault> {
    let mut random = Random::new(seed, 9);
    if !random.percent(40) {
        return faults;
    }
    for _ in 0..=random.below(4) {
        let at = profile.from.after(random.between(ms(0), profile.until.since(profile.from)));
        faults.push(Fault { at, kind: Kind::Restart, victim: random.number(), lasts: ms(0), choice: random.number() });
    }
    faults
}

/// In some runs members are copied anew, or put back in time.
fn with_copies(seed: u64, profile: Profile, faults: &mut Vec<Fault>) {
    let mut random = Random::new(seed, 10);
    if !random.percent(30) {
        return;
    }
    for _ in 0..=random.below(3) {
        let at = profile.from.after(random.between(ms(0), profile.until.since(profile.from)));
        let (kind, lasts) = if random.percent(65) { (Kind::Reinit, ms(0)) } else { (Kind::PutBack, random.between(secs(2), secs(16))) };
        faults.push(Fault { at, kind, victim: random.number(), lasts, choice: random.number() });
    }
}
