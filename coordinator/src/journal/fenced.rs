//! Records as numbered objects of a store, appended by one writer at a time.
//!
//! Record 42 is the object `journal/00000042`, put only if it is absent: of two writers one gets the number, and the other
//! knows that it is no longer alone. A writer begins by appending that it has taken over. Whoever wrote before it has not
//! seen that number, so its next append fails, and it can never append again. No clock and no lease is involved: a new writer
//! need not wait for the old one, and the old one needs no warning.
//!
//! An object is whole or not there, but its bytes may rot. A damaged last record is passed over, and the writer that takes
//! over says so in the record behind it; it is never deleted, or its writer could put another one in its place and go on. A
//! damaged record with anything else behind it is an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use espalier_common::clock::unix_seconds;
use espalier_common::fault::FaultClass;
use espalier_common::store::{self, BlobStore, Placed, StoreError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::JournalError;
use super::line::{self, MAX_RECORD_BYTES};

/// Digits of a number: names sort as numbers do.
const DIGITS: usize = 8;
/// How often an append is tried whose outcome is not known; each try has the store's own retries within.
const TRIES: usize = 3;
/// Records that others may append while this process takes over; one that is alive is fenced long before.
const MOST_LOST: usize = 10_000;
/// Objects that are read at once: a journal is read whole when it is opened.
const READ_AT_ONCE: usize = 8;

/// A writer says that the records are its to append from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// Names the writer, no two alike.
    pub writer: String,
    /// When, in seconds since 1970.
    pub at: u64,
    /// Number of the record before this one, if it is damaged and counts for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub void: Option<usize>,
}

/// What can be appended to a [`FencedLog`].
pub trait Appended: Serialize + DeserializeOwned + Send {
    /// Wraps the record with which a writer begins.
    fn taking_over(taken: TakenOver) -> Self;
    /// The record with which a writer begins, if it is that.
    fn as_taken_over(&self) -> Option<&TakenOver>;
}

/// Numbered records in a folder of a store, being written by this process.
#[derive(Debug)]
pub struct FencedLog {
    store: Arc<dyn BlobStore>,
    folder: &'static str,
    next: usize,
    /// Why nothing more can be appended, if nothing can.
    end: Option<End>,
}

#[derive(Debug, Clone)]
enum End {
    Fenced { index: usize, by: String },
    Unsettled { index: usize },
}

impl FencedLog {
    /// Takes the records in `folder` over, and returns them; from then on, nobody who wrote before can append.
    ///
    /// # Errors
    /// `Store`, `Damaged`, `Missing`, `Foreign`, `Unsettled`.
    pub fn open<T: Appended>(store: Arc<dyn BlobStore>, folder: &'static str) -> Result<(Self, Vec<T>), JournalError> {
        let journal = store::join(store.url(), folder);
        let mut slots = read_slots(store.as_ref(), folder)?;
        // Nobody is fenced for the sake of records that are of no use.
        check(&journal, &slots)?;
        let mut log = Self { store, folder, next: slots.len(), end: None };
        let writer = writer();
        for _ in 0..MOST_LOST {
            let void = matches!(slots.last(), Some(Slot::Damaged)).then(|| slots.len() - 1);
            let taken = T::taking_over(TakenOver { writer: writer.clone(), at: unix_seconds(), void });
            let line = line::encode(&taken);
            match log.put(&line)? {
                None => {
                    slots.push(Slot::Record(taken));
                    log.next += 1;
                    check(&journal, &slots)?;
                    return Ok((log, records(slots)));
                }
                // Somebody was faster: it belongs to what is taken over.
                Some(bytes) => {
                    slots.push(slot(&journal, log.next, &bytes)?);
                    log.next += 1;
                }
            }
        }
        Err(JournalError::Unsettled { journal, index: log.next })
    }

    /// Appends one record; it is durable when this returns.
    ///
    /// # Errors
    /// `Fenced` if another writer has taken over, `Unsettled` and `Store` if it is not known whether it was written. After any
    /// of these, nothing can be appended.
    pub fn append<T: Appended>(&mut self, record: &T) -> Result<(), JournalError> {
        if let Some(end) = self.end.clone() {
            return Err(self.ended(end));
        }
        match self.put(&line::encode(record)) {
            Ok(None) => {
                self.next += 1;
                Ok(())
            }
            Ok(Some(theirs)) => {
                let taken = line::decode::<T>(&theirs).and_then(Result::ok);
                let by = taken.as_ref().and_then(Appended::as_taken_over).map(|taken| taken.writer.clone());
                let end = End::Fenced { index: self.next, by: by.unwrap_or_else(|| "an unknown writer".to_owned()) };
                self.end = Some(end.clone());
                Err(self.ended(end))
            }
            Err(error) => {
                self.end = Some(End::Unsettled { index: self.next });
                Err(error)
            }
        }
    }

    fn ended(&self, end: End) -> JournalError {
        let journal = store::join(self.store.url(), self.folder);
        match end {
            End::Fenced { index, by } => JournalError::Fenced { journal, index, by },
            End::Unsettled { index } => JournalError::Unsettled { journal, index },
        }
    }

    /// Puts the next record; returns what is there instead if another writer was faster.
    ///
    /// The bytes tell whose it is. Up to the first record of another writer, all are ours; and that first one says that it
    /// takes over, with a name that is not ours. So bytes like ours at our next number are ours: an earlier try was answered
    /// by nobody, and yet arrived.
    fn put(&self, line: &str) -> Result<Option<Bytes>, JournalError> {
        let name = name(self.folder, self.next);
        for tries_left in (0..TRIES).rev() {
            match self.store.put_if_absent(&name, line.as_bytes()) {
                Ok(Placed::Written) => return Ok(None),
                Ok(Placed::AlreadyThere) => match self.store.get_at_most(&name, MAX_RECORD_BYTES as u64) {
                    Ok(found) if found == line.as_bytes() => return Ok(None),
                    Ok(found) => return Ok(Some(found)),
                    Err(StoreError::TooLarge { .. }) => return Ok(Some(Bytes::new())),
                    // The store is still deciding between two writers.
                    Err(StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                },
                Err(error) if tries_left > 0 && is_passing(&error) => {
                    warn!(record = name, %error, "record is appended again");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(self.ended(End::Unsettled { index: self.next }))
    }
}

fn is_passing(error: &StoreError) -> bool {
    matches!(error.class(), FaultClass::RetryHere | FaultClass::RetryElsewhere)
}

/// Reads the records in `folder` without taking them over; a damaged last one is passed over.
///
/// # Errors
/// `Store`, `Damaged`, `Missing`, `Foreign`.
pub fn read<T: Appended>(store: &dyn BlobStore, folder: &str) -> Result<Vec<T>, JournalError> {
    let slots = read_slots(store, folder)?;
    check(&store::join(store.url(), folder), &slots)?;
    Ok(records(slots))
}

/// A name that no other writer has: for people its machine and process, for certainty a random number.
fn writer() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "unknown" } else { host.trim() };
    format!("{host}:{}:{:016x}", std::process::id(), rand::random::<u64>())
}

fn name(folder: &str, number: usize) -> String {
    format!("{folder}/{number:0DIGITS$}")
}

/// One numbered object.
enum Slot<T> {
    Record(T),
    Damaged,
}

fn slot<T: Appended>(journal: &str, index: usize, bytes: &[u8]) -> Result<Slot<T>, JournalError> {
    match line::decode(bytes) {
        None => Ok(Slot::Damaged),
        Some(Ok(record)) => Ok(Slot::Record(record)),
        Some(Err(source)) => Err(JournalError::Foreign { journal: journal.to_owned(), index, source }),
    }
}

fn read_slots<T: Appended>(store: &dyn BlobStore, folder: &str) -> Result<Vec<Slot<T>>, JournalError> {
    let journal = store::join(store.url(), folder);
    let number = |name: &String| {
        let digits = name.strip_prefix(folder)?.strip_prefix('/')?;
        let plain = digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_digit());
        plain.then(|| digits.parse::<usize>().ok())?
    };
    // Sorted, since the names are.
    let numbers: Vec<usize> = store.list(folder)?.iter().filter_map(number).collect();
    if let Some(index) = (0..numbers.len()).find(|&index| numbers[index] != index) {
        return Err(JournalError::Missing { journal, index });
    }
    let contents = read_all(store, folder, numbers.len())?;
    contents.iter().enumerate().map(|(index, bytes)| slot(&journal, index, bytes)).collect()
}

/// The bytes of the first `count` objects; none for one that is too large to be a record.
fn read_all(store: &dyn BlobStore, folder: &str, count: usize) -> Result<Vec<Bytes>, StoreError> {
    let due = AtomicUsize::new(0);
    let work = || {
        let mut read = Vec::new();
        loop {
            let index = due.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return read;
            }
            let bytes = match store.get_at_most(&name(folder, index), MAX_RECORD_BYTES as u64) {
                Err(StoreError::TooLarge { .. }) => Ok(Bytes::new()),
                read => read,
            };
            read.push((index, bytes));
        }
    };
    let mut contents = vec![Bytes::new(); count];
    let parts = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READ_AT_ONCE.min(count)).map(|_| scope.spawn(work)).collect();
        let joined = readers.into_iter().map(|reader| reader.join().expect("a reader does not panic"));
        joined.collect::<Vec<_>>()
    });
    for (index, bytes) in parts.into_iter().flatten() {
        contents[index] = bytes?;
    }
    Ok(contents)
}

/// Checks that a damaged slot is the last one, or that the one behind it says that it counts for nothing.
fn check<T: Appended>(journal: &str, slots: &[Slot<T>]) -> Result<(), JournalError> {
    let voids = |slot: &Slot<T>, index| match slot {
        Slot::Record(record) => record.as_taken_over().is_some_and(|taken| taken.void == Some(index)),
        Slot::Damaged => false,
    };
    let damaged = |pair: &[Slot<T>], index| matches!(pair[0], Slot::Damaged) && !voids(&pair[1], index);
    match slots.windows(2).enumerate().find(|(index, pair)| damaged(pair, *index)) {
        Some((index, _)) => Err(JournalError::Damaged { journal: journal.to_owned(), index }),
        None => Ok(()),
    }
}

fn records<T>(slots: Vec<Slot<T>>) -> Vec<T> {
    let record = |slot| match slot {
        Slot::Record(record) => Some(record),
        Slot::Damaged => None,
    };
    slots.into_iter().filter_map(record).collect()
}
