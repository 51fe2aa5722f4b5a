//! What a primary's archiver has not got to: the standby that it becomes removes it (SAFETY row 54).

use pgherd::facts::archiving::Archived;
use pgherd::machine::action::{Operation, Upstream};
use pgherd::machine::event::Finished;

use super::check::Checks;
use super::wal::Data;
use super::world::{Sim, member};

/// So often it can be neither archived nor put beside.
const FAILS_PERCENT: u64 = 15;
/// So often it has to be tried before PostgreSQL goes on without it.
const TRIES: u32 = 2;

impl Sim {
    pub fn archive_left(&mut self, host: usize, leader: &Upstream) {
        if let Err(why) = self.ask_leader(host, leader) {
            return self.job_fails(host, why);
        }
        if self.hosts[host].server.ail.disk_full || self.timing.percent(FAILS_PERCENT) {
            return self.job_fails(host, "there is no room");
        }
        let files = self.hosts[host].server.data.as_mut().map_or(0, |data| std::mem::take(&mut data.unarchived));
        self.job_ends(host, Finished::LeftArchived(Ok(Archived { files, ..Archived::default() })));
    }

    pub fn archiving_broke_off(&mut self, host: usize, operation: &Operation) {
        if let (Operation::ArchiveLeft { .. }, Some(data)) = (operation, &mut self.hosts[host].server.data) {
            data.archive_tries += 1;
        }
    }
}

impl Checks {
    /// A standby's next restartpoint, or pg_rewind, removes what was not archived.
    pub fn takes_up_wal(&mut self, host: usize, data: &Data) {
        if data.unarchived > 0 && data.archive_tries < TRIES && data.half.is_none() {
            self.fail(
                "row 54",
                format!("{} takes up another's WAL before what it had not archived as a primary was seen to", member(host)),
            );
        }
    }
}
