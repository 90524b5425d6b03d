//! The journal as a file: one record a line, `crc32 json`, fsynced; a torn tail is cut when it is opened.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{Journal, JournalRecord};

/// A record longer than this is not one of ours.
const MAX_RECORD_BYTES: usize = 64 << 20;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system failed.
    #[error("journal {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// A record in the middle is damaged: what follows it cannot be trusted.
    #[error("journal {}: record {index} is damaged, and others follow it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Index of the record.
        index: usize,
    },
    /// A whole record that this version cannot read.
    #[error("journal {}: record {index} was written by another version: {source}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Index of the record.
        index: usize,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// Another process has the journal open.
    #[error("journal {} is in use by another coordinator", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// A journal that is being written. The file is locked while this lives.
#[derive(Debug)]
pub struct FileJournal {
    path: PathBuf,
    file: File,
}

impl FileJournal {
    /// Opens (or creates) a journal, cuts a torn tail, and returns the records that are whole.
    ///
    /// # Errors
    /// `Busy`, `Damaged`, `Foreign`, `Io`.
    pub fn open(path: &Path) -> Result<(Self, Vec<JournalRecord>), JournalError> {
        let io = |source| JournalError::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(JournalError::Busy { path: path.to_owned() }),
            Err(std::fs::TryLockError::Error(source)) => return Err(io(source)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let (records, whole) = parse(path, &bytes)?;
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        file.sync_all().map_err(io)?;
        Ok((Self { path: path.to_owned(), file }, records))
    }
}

impl Journal for FileJournal {
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        let io = |source| JournalError::Io { path: self.path.clone(), source };
        let json = serde_json::to_string(record).expect("records hold nothing that JSON cannot");
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        self.file.write_all(line.as_bytes()).map_err(io)?;
        self.file.sync_data().map_err(io)
    }
}

/// Reads a journal without opening it for writing; a torn tail is ignored.
///
/// # Errors
/// `Damaged`, `Foreign`, `Io`.
pub fn read(path: &Path) -> Result<Vec<JournalRecord>, JournalError> {
    let bytes = std::fs::read(path).map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
    Ok(parse(path, &bytes)?.0)
}

/// The whole records of a journal and the number of bytes they take. Only the last line may be torn.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<JournalRecord>, usize), JournalError> {
    let mut records = Vec::new();
    let mut whole = 0;
    while whole < bytes.len() {
        let rest = &bytes[whole..];
        let newline = rest.iter().take(MAX_RECORD_BYTES).position(|byte| *byte == b'\n');
        let is_last = newline.is_none_or(|at| whole + at + 1 == bytes.len());
        let json = newline.and_then(|at| checked_json(&rest[..at]));
        let Some(json) = json else {
            if is_last {
                break;
            }
            return Err(JournalError::Damaged { path: path.to_owned(), index: records.len() });
        };
        let record = serde_json::from_slice(json).map_err(|source| JournalError::Foreign {
            path: path.to_owned(),
            index: records.len(),
            source,
        })?;
        records.push(record);
        whole += newline.map_or(0, |at| at + 1);
    }
    Ok((records, whole))
}

/// The JSON of a line whose checksum is right.
fn checked_json(line: &[u8]) -> Option<&[u8]> {
    let (checksum, json) = line.split_at_checked(8)?;
    let json = json.strip_prefix(b" ")?;
    let checksum = u32::from_str_radix(std::str::from_utf8(checksum).ok()?, 16).ok()?;
    (checksum == crc32fast::hash(json)).then_some(json)
}

#[cfg(test)]
mod tests {
    use espalier_common::ids::{Attempt, LayerIndex, Lease, Unit, WorkerId};

    use super::*;
    use crate::schedule::Record;

    fn leased(attempt: u32) -> JournalRecord {
        let lease = Lease { unit: Unit::Prune(LayerIndex(0)), worker: WorkerId(1), attempt: Attempt(attempt) };
        JournalRecord::Prune(Record::Leased { lease })
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = FileJournal::open(&path).unwrap();
        journal.append(&leased(1)).unwrap();
        let one = std::fs::metadata(&path).unwrap().len();
        journal.append(&leased(2)).unwrap();
        drop(journal);
        let bytes = std::fs::read(&path).unwrap();
        for length in one as usize..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let (mut journal, records) = FileJournal::open(&path).unwrap();
            assert_eq!(records, [leased(1)], "cut at {length}");
            journal.append(&leased(3)).unwrap();
            drop(journal);
            assert_eq!(read(&path).unwrap(), [leased(1), leased(3)]);
        }
    }

    #[test]
    fn damage_in_the_middle_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = FileJournal::open(&path).unwrap();
        journal.append(&leased(1)).unwrap();
        journal.append(&leased(2)).unwrap();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[12] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(read(&path), Err(JournalError::Damaged { index: 0, .. })));
    }

    #[test]
    fn a_second_writer_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let _first = FileJournal::open(&path).unwrap();
        assert!(matches!(FileJournal::open(&path), Err(JournalError::Busy { .. })));
    }
}
