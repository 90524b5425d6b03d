//! Small files that are read whole.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::CheckpointError;

/// Largest file that is read whole: well above the index and the tokenizer of any model.
pub(super) const WHOLE_FILE_LIMIT: u64 = 256 << 20;

/// Reads a whole file of bounded size.
///
/// # Errors
/// `NotFound`, `Io`, `TooLarge`.
pub(super) fn read_whole(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let failed = |source| CheckpointError::io(path, source);
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size > WHOLE_FILE_LIMIT {
        let what = "the file".to_owned();
        return Err(CheckpointError::TooLarge { path: path.to_owned(), what, size, limit: WHOLE_FILE_LIMIT });
    }
    let mut bytes = Vec::new();
    file.take(WHOLE_FILE_LIMIT).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Reads the JSON that a file holds.
///
/// # Errors
/// `InvalidJson`.
pub(super) fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, CheckpointError> {
    serde_json::from_slice(bytes).map_err(|source| CheckpointError::InvalidJson { path: path.to_owned(), source })
}
