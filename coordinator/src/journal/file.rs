//! The journal as a file: one record a line, `crc32 json`, fsynced; a torn tail is cut when it is opened.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::line::{self, MAX_RECORD_BYTES, checked_json};
use super::{Journal, JournalError, JournalRecord, holder};

/// A journal that is being written. The file is locked while this lives.
#[derive(Debug)]
pub struct FileJournal {
    path: PathBuf,
    file: File,
    /// Records in it.
    count: usize,
    /// Whether an append failed: half of a record may be at the end, and nothing can stand behind it.
    torn: bool,
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
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(JournalError::Busy { path: path.to_owned(), holder: holder::of(&file) });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(io(source)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let (records, whole) = parse(path, &bytes)?;
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        file.sync_all().map_err(io)?;
        Ok((Self { path: path.to_owned(), file, count: records.len(), torn: false }, records))
    }
}

impl Journal for FileJournal {
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        if self.torn {
            let journal = self.path.display().to_string();
            return Err(JournalError::Unsettled { journal, index: self.count });
        }
        let line = line::encode(record);
        self.torn = true;
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        self.torn = false;
        self.count += 1;
        Ok(())
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
            return Err(JournalError::Damaged { journal: path.display().to_string(), index: records.len() });
        };
        let record = serde_json::from_slice(json).map_err(|source| JournalError::Foreign {
            journal: path.display().to_string(),
            index: records.len(),
            source,
        })?;
        records.push(record);
        whole += newline.map_or(0, |at| at + 1);
    }
    Ok((records, whole))
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
        let error = FileJournal::open(&path).unwrap_err();
        assert!(matches!(error, JournalError::Busy { .. }));
        assert!(error.to_string().contains(&std::process::id().to_string()), "it is told who holds it: {error}");
    }
}
