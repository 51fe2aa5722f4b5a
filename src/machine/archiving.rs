//! What a primary's archiver did not get to before PostgreSQL ended: what is remembered of it. Decides nothing: [`super::rules::archiving`]
//! does.

use crate::clock::BootTime;
use crate::facts::archiving::{Archived, Unarchived};
use crate::facts::postgres::DataDirectory;

use super::action::OperationKind;
use super::event::Failure;
use super::world::World;

/// So often it is tried before PostgreSQL goes on without it.
pub const ATTEMPTS_MAX: u32 = 2;
/// What is beside and could not be archived is tried again after so long.
const BESIDE_PAUSE_MS: u64 = 60_000;

/// What is known of it.
#[derive(Debug, Clone, Default)]
pub struct Left {
    /// Files that are marked as ready for the archive, as last seen while PostgreSQL was stopped, or was found running.
    pub ready: usize,
    /// What lies beside the data directory to be archived from there.
    pub beside: Option<Unarchived>,
    /// Why it could not be archived.
    pub why: Option<String>,
    /// What is to be told, once.
    pub untold: Vec<(&'static str, String)>,
}

impl World {
    /// The data directory was looked at, PostgreSQL stopped.
    pub(super) fn left_was_counted(&mut self, data: &DataDirectory) {
        self.left.ready = if let DataDirectory::Full(control) = data { control.unarchived } else { 0 };
        if self.left.ready == 0 {
            self.forget_failures(OperationKind::ArchiveLeft);
            self.clear("archiving_failed");
        }
    }

    /// A server that went on without it is not stopped for it; the next time that it has ended all is tried anew.
    pub(super) fn started_without_what_is_left(&mut self) {
        if self.failures(OperationKind::ArchiveLeft) >= ATTEMPTS_MAX {
            self.left.ready = 0;
            self.forget_failures(OperationKind::ArchiveLeft);
        }
    }

    pub(super) fn left_was_archived(&mut self, now: BootTime, result: Result<Archived, Failure>) {
        // What was marked is not marked any more, or not all of it.
        self.data = DataDirectory::Unknown;
        self.ended(now, OperationKind::ArchiveLeft, result.is_ok());
        match result {
            Ok(archived) => self.told_what_came_of_it(archived),
            Err(why) if self.failures(OperationKind::ArchiveLeft) >= ATTEMPTS_MAX => {
                let message = format!(
                    "WAL that this member wrote as the primary may be missing in the archive, and PostgreSQL will remove it: {why}"
                );
                self.fail("archiving_failed", message.clone());
                self.left.untold.push(("archiving_failed", message));
            }
            Err(why) => self.warn("archiving_failed", why),
        }
    }

    pub(super) fn beside_was_archived(&mut self, now: BootTime, result: Result<Archived, Failure>) {
        self.ended(now, OperationKind::ArchiveBeside, true);
        match result {
            Ok(Archived { why: None, files, beside: None }) => {
                self.told_what_came_of_it(Archived { why: None, files, beside: None });
            }
            Ok(archived) => {
                self.pause(now, OperationKind::ArchiveBeside, BESIDE_PAUSE_MS);
                (self.left.why, self.left.beside) = (archived.why, archived.beside);
            }
            Err(why) => {
                self.pause(now, OperationKind::ArchiveBeside, BESIDE_PAUSE_MS);
                self.left.why = Some(why);
            }
        }
        self.say_what_is_beside();
    }

    fn told_what_came_of_it(&mut self, archived: Archived) {
        let Archived { files, beside, why } = archived;
        if files > 0 {
            let message = format!("{files} files of WAL that the archiver had not got to while this member was the primary were archived");
            self.left.untold.push(("wal_archived", message));
        }
        (self.left.why, self.left.beside) = (why, beside);
        self.say_what_is_beside();
        if let Some(why) = self.left.beside.as_ref().and(self.conditions.get("wal_not_archived")) {
            self.left.untold.push(("wal_not_archived", why.message.clone()));
        }
    }

    pub(super) fn say_what_is_beside(&mut self) {
        let said = self.left.beside.as_ref().map(|Unarchived { files, first, last, place }| {
            let why = self.left.why.as_deref().unwrap_or("it was not tried again yet");
            format!(
                "{files} files of WAL, {first} to {last}, are in {place} and not in the archive: PostgreSQL does not archive them any more, pgherd \
                 runs archive_command for them again and again: {why}"
            )
        });
        self.set_or_clear("wal_not_archived", said);
    }
}
