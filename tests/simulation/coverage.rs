//! What a set of runs has met: edges of the machine, kinds of fault, rows of SAFETY's matrix. What the night never met is not tested.

use std::collections::BTreeMap;

use pgherd::machine::edges::EDGES;

use super::plan::Kind;

#[derive(Debug, Clone, Default)]
pub struct Coverage {
    edges: BTreeMap<u16, u64>,
    faults: BTreeMap<Kind, u64>,
    strikes: BTreeMap<String, u64>,
}

impl Coverage {
    pub fn edge(&mut self, number: u16) {
        *self.edges.entry(number).or_default() += 1;
    }

    pub fn fault(&mut self, kind: Kind) {
        *self.faults.entry(kind).or_default() += 1;
    }

    pub fn strike(&mut self, what: String) {
        *self.strikes.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Coverage) {
        for (edge, count) in &other.edges {
            *self.edges.entry(*edge).or_default() += count;
        }
        for (kind, count) in &other.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
        for (what, count) in &other.strikes {
            *self.strikes.entry(what.clone()).or_default() += count;
        }
    }

    /// Edges that cannot be met in the simulated world, with the reason.
    fn out_of_reach(number: u16) -> Option<&'static str> {
        UNREACHABLE.iter().find(|(edge, _)| *edge == number).map(|(_, why)| *why)
    }

    pub fn edges_missed(&self) -> Vec<String> {
        let missed = EDGES.iter().filter(|edge| !self.edges.contains_key(&edge.number) && Self::out_of_reach(edge.number).is_none());
        let excused_and_met = UNREACHABLE.iter().filter(|(edge, _)| self.edges.contains_key(edge));
        let missed = missed.map(|edge| format!("edge {} {} -> {}", edge.number, edge.from, edge.to));
        missed.chain(excused_and_met.map(|(edge, _)| format!("edge {edge}, which is said to be out of reach, was met"))).collect()
    }

    pub fn faults_missed(&self) -> Vec<String> {
        Kind::ALL.iter().filter(|kind| !self.faults.contains_key(kind)).map(|kind| format!("fault {kind:?}")).collect()
    }

    /// Rows none of whose faults was met.
    pub fn rows_missed(&self) -> Vec<String> {
        ROWS.iter()
            .filter(|(_, kinds)| !kinds.iter().any(|kind| self.faults.contains_key(kind)))
            .map(|(row, kinds)| format!("row {row} ({kinds:?})"))
            .collect()
    }

    pub fn report(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        let hit = EDGES.iter().filter(|edge| self.edges.contains_key(&edge.number)).count();
        let _ = writeln!(text, "edges: {hit} of {}", EDGES.len());
        let rarest = EDGES.iter().filter_map(|edge| self.edges.get(&edge.number).map(|count| (count, edge)));
        let mut rarest: Vec<_> = rarest.collect();
        rarest.sort_by_key(|(count, _)| **count);
        for (count, edge) in rarest.iter().take(6) {
            let _ = writeln!(text, "  rare: {} {} -> {}: {count}", edge.number, edge.from, edge.to);
        }
        let faults: Vec<String> = self.faults.iter().map(|(kind, count)| format!("{kind:?} {count}")).collect();
        let _ = writeln!(text, "faults: {}", faults.join(", "));
        let strikes: u64 = self.strikes.values().sum();
        let _ = writeln!(text, "strikes between two actions: {strikes} of {} kinds", self.strikes.len());
        let rows: Vec<String> = ROWS.iter().map(|(row, _)| row.to_string()).collect();
        let _ = writeln!(text, "rows of the matrix: {} minus {:?}", rows.join(" "), self.rows_missed());
        for (edge, why) in UNREACHABLE {
            let _ = writeln!(text, "  out of reach: {edge}: {why}");
        }
        let missed: Vec<String> = self.edges_missed().into_iter().chain(self.faults_missed()).chain(self.rows_missed()).collect();
        let _ = writeln!(text, "never met: {}", if missed.is_empty() { "nothing".to_owned() } else { missed.join("; ") });
        text
    }

    pub fn complete(&self) -> bool {
        self.edges_missed().is_empty() && self.faults_missed().is_empty() && self.rows_missed().is_empty()
    }
}

/// Edges that no simulated run can take, each with why. The table of reactions in the machine's unit tests takes the events that lead there.
const UNREACHABLE: &[(u16, &str)] = &[
    (340, STARTED_BY_HAND),
    (430, STARTED_BY_HAND),
    (520, STARTED_BY_HAND),
    (820, "a server in recovery was told to stop when this state was entered, and PostgreSQL is not promoted while it stops"),
    (1040, "a stop takes a primary to handing_over within the same event: its lock cannot go in between"),
    (1175, "a stop takes a primary that is being restarted to handing_over within the same event"),
];

const STARTED_BY_HAND: &str =
    "the data directory is empty here: a server that writes in it would be one that somebody made and started by hand, which no fault does";

/// Rows of SAFETY's matrix that the simulator can cause, and the faults that cause them.
const ROWS: &[(u16, &[Kind])] = &[
    (1, &[Kind::KillDaemon]),
    (2, &[Kind::DaemonStaysDown]),
    (3, &[Kind::FreezeDaemon, Kind::FreezeGuard]),
    (4, &[Kind::StarveDaemon]),
    (5, &[Kind::CrashLoopOfDaemon]),
    (6, &[Kind::KillPostmaster]),
    (8, &[Kind::StuckBackend]),
    (9, &[Kind::CrashLoopOfPostgres]),
    (10, &[Kind::CutPeers, Kind::ReceiverStuck]),
    (11, &[Kind::StopDaemon, Kind::LeaveDaemon]),
    (12, &[Kind::PowerOff]),
    (13, &[Kind::AllPowerOff]),
    (14, &[Kind::Isolate]),
    (15, &[Kind::CutEtcd]),
    (16, &[Kind::CutPeers]),
    (17, &[Kind::CutEtcd]),
    (18, &[Kind::CutAnswers]),
    (19, &[Kind::CutEtcd]),
    (20, &[Kind::SlowEtcd, Kind::LossyEtcd]),
    (21, &[Kind::FlappingEtcd]),
    (22, &[Kind::CutPeers]),
    (24, &[Kind::ClockRate]),
    (25, &[Kind::Suspend]),
    (26, &[Kind::HypervisorPause]),
    (27, &[Kind::PutBack]),
    (28, &[Kind::DiskFull]),
    (31, &[Kind::SlowPostgres]),
    (32, &[Kind::DataLost]),
    (35, &[Kind::EtcdLeaderLost]),
    (36, &[Kind::EtcdDown]),
    (37, &[Kind::LockDeleted, Kind::LeaseRevoked]),
    (38, &[Kind::RenewsTheDead]),
    (39, &[Kind::RevokesEarly]),
    (40, &[Kind::Compaction]),
    (41, &[Kind::WatchStalls, Kind::LosesDeletions]),
    (43, &[Kind::EtcdRestored]),
    (44, &[Kind::EtcdFull]),
    (49, &[Kind::PowerOff]),
    (51, &[Kind::SlowPostgres, Kind::PromotionRefused]),
    (52, &[Kind::Strike]),
    (53, &[Kind::Strike]),
    (56, &[Kind::UpstreamRefuses]),
    (64, &[Kind::Namesake]),
    (66, &[Kind::PromotedByHand]),
    (67, &[Kind::StoppedByHand]),
    (69, &[Kind::Switchover]),
    (70, &[Kind::Switchover]),
    (71, &[Kind::Switchover]),
    (72, &[Kind::EtcdWiped]),
    (73, &[Kind::MemberRemoved]),
];
