//! What is remembered: append-only, checksummed records. A layer is done when its record is durable, not when a worker says so.

mod file;
mod record;

pub use file::{FileJournal, JournalError, read};
pub use record::{EvaluatedModel, JournalRecord, RunCreated, WorkerTotals};

/// Somewhere to append records to.
pub trait Journal: Send {
    /// Appends one record; it is durable when this returns.
    ///
    /// # Errors
    /// What the file system says.
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError>;
}
