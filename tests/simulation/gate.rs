//! The gate of a primary that is started again (SAFETY row 48): pg_hba.conf lets no client in before as many standbys as `sync` says have what
//! it recovered. And what clients would see behind it: everything that was recovered, acknowledged or not.

use pgherd::types::Lsn;

use super::clock::{Real, ms, secs};
use super::world::Sim;

/// So long after its start a primary lets clients in whatever standbys have, less what its clock may be fast.
const OPENS_ANYWAY_MS: u64 = 29_800;
/// Longest that a primary whose daemon is well keeps clients out: the bound, and what a probe and an order take.
const CLOSED_MAX_S: u64 = 34;

/// What a postmaster makes of pg_hba.conf.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gate {
    closed: bool,
    /// What it recovered as a primary, and when it was started; None = clients have seen it, or it was promoted.
    unseen: Option<(Lsn, Real)>,
    /// Since when clients were turned away by one that is well.
    turns_away_since: Option<Real>,
}

impl Gate {
    pub fn started(closed: bool) -> Gate {
        Gate { closed, ..Gate::default() }
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    pub fn recovered(&mut self, end: Lsn, started: Real) {
        self.unseen = Some((end, started));
    }

    /// The postmaster reads the file.
    pub fn reads(&mut self, closed: bool) {
        self.closed = closed;
    }
}

impl Sim {
    pub fn is_closed(&self, host: usize) -> bool {
        self.hosts[host].server.postmaster.as_ref().is_some_and(|postmaster| postmaster.gate.closed)
    }

    /// A client connects to a primary. Where it gets in it sees what was recovered; where it does not, that has an end.
    pub fn lets_client_in(&mut self, host: usize) -> bool {
        let now = self.now;
        let is_well = self.hosts[host].daemon_works()
            && self.hosts[host].server.ail.slowness == 0
            && self.hosts[host].daemon.as_ref().is_some_and(|daemon| daemon.machine.state().name() == "primary");
        let Some(gate) = self.hosts[host].server.postmaster.as_mut().map(|postmaster| &mut postmaster.gate) else { return true };
        if gate.closed {
            let since = *gate.turns_away_since.get_or_insert(now);
            if !is_well {
                gate.turns_away_since = None;
            } else if now.since(since) > secs(CLOSED_MAX_S) {
                let what = format!("{} keeps clients out for longer than {CLOSED_MAX_S} s", self.hosts[host].name);
                self.checks.fail("L2", what);
            }
            return false;
        }
        gate.turns_away_since = None;
        if let Some((recovered, started)) = gate.unseen.take()
            && now.since(started) < ms(OPENS_ANYWAY_MS)
        {
            self.see(host, recovered);
        }
        true
    }

    /// I6: no client sees a commit that was never acknowledged and is on fewer members than `sync` says.
    fn see(&mut self, host: usize, recovered: Lsn) {
        let Some(token) = self.hosts[host].server.data.as_ref().map(|data| data.wal.token()) else { return };
        let Some(record) = self.etcd.view.sync.as_ref().filter(|record| record.leader == self.hosts[host].name) else { return };
        let has_it = |other: &&super::host::Host| {
            other.server.data.as_ref().is_some_and(|data| data.wal.extent_of(token).is_some_and(|extent| extent >= recovered))
        };
        let there = self.hosts.iter().filter(|other| record.members.contains(&other.name)).filter(has_it).count();
        if there < record.copies as usize && !self.checks.acknowledged.reaches(token, recovered) && !self.checks.copies_do_not_count() {
            let what = format!(
                "clients of {} see what it recovered up to {recovered}, which nobody was told of and {there} of {} members have",
                self.hosts[host].name, record.copies
            );
            self.checks.fail("I6", what);
        }
    }
}
