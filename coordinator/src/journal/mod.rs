//! What is remembered: append-only, checksummed records. A layer is done when its record is durable, not when a worker says so.
//!
//! In a folder the journal is a file, locked by the coordinator that writes it ([`mod@file`]); in an object store it is one object
//! a record, put only if its number is free ([`fenced`]). Either way nobody else can append.

mod error;
pub mod fenced;
#[cfg(test)]
mod fenced_tests;
pub mod file;
pub(crate) mod holder;
mod line;
mod record;

use std::path::Path;
use std::sync::Arc;

use espalier_common::clock::Stopwatch;
use espalier_common::store::BlobStore;

pub use error::JournalError;
pub use fenced::{FencedLog, TakenOver};
pub use file::{FileJournal, read};
pub use record::{EvaluatedModel, JournalRecord, RunCreated, WorkerTotals};

/// The journal's name in a run's store: a file in a folder, a folder of objects in an object store.
const NAME: &str = "journal";

/// Somewhere to append records to.
pub trait Journal: Send {
    /// Appends one record; it is durable when this returns.
    ///
    /// # Errors
    /// See [`JournalError`]; afterwards nothing can be appended.
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError>;
}

impl Journal for FencedLog {
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        FencedLog::append(self, record)
    }
}

/// A journal, and the time that appending to it took.
pub struct Timed {
    journal: Box<dyn Journal>,
    seconds: f64,
}

impl Timed {
    /// Seconds that appending took so far.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }
}

impl From<Box<dyn Journal>> for Timed {
    fn from(journal: Box<dyn Journal>) -> Self {
        Self { journal, seconds: 0.0 }
    }
}

impl Journal for Timed {
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        let watch = Stopwatch::start();
        let appended = self.journal.append(record);
        self.seconds += watch.seconds();
        appended
    }
}

/// Opens the journal of the run in `store` for writing, and returns it with what is in it.
///
/// # Errors
/// `Busy` if another process writes a local one; see [`FileJournal::open`] and [`FencedLog::open`].
pub fn open(store: &Arc<dyn BlobStore>) -> Result<(Box<dyn Journal>, Vec<JournalRecord>), JournalError> {
    match store.directory().map(Path::to_owned) {
        Some(directory) => {
            let (journal, records) = FileJournal::open(&directory.join(NAME))?;
            Ok((Box::new(journal), records))
        }
        None => {
            let (journal, records) = FencedLog::open(Arc::clone(store), NAME)?;
            Ok((Box::new(journal), records))
        }
    }
}

/// Reads the journal of the run in `store` and leaves whoever writes it alone.
///
/// # Errors
/// See [`file::read`] and [`fenced::read`].
pub fn read_run(store: &dyn BlobStore) -> Result<Vec<JournalRecord>, JournalError> {
    match store.directory() {
        Some(directory) => read(&directory.join(NAME)),
        None => fenced::read(store, NAME),
    }
}
