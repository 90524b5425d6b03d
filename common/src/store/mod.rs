//! Where a run keeps its artifacts: bytes under relative names, put atomically, read by range.

pub mod conformance;
mod error;
mod local;
mod memory;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

pub use error::StoreError;
pub use local::LocalStore;
pub use memory::MemoryStore;

/// Opens the store that a URL names: a directory, as a path or as a `file://` URL. The directory is created if need be.
///
/// # Errors
/// `UnknownScheme`; `Io` if the directory cannot be created.
pub fn open(url: &str) -> Result<Arc<dyn BlobStore>, StoreError> {
    let unknown = || StoreError::UnknownScheme { url: url.to_owned() };
    let path = match url.contains("://") {
        false => PathBuf::from(url),
        true => path_of_url(url).ok_or_else(unknown)?,
    };
    if path.as_os_str().is_empty() {
        return Err(unknown());
    }
    Ok(Arc::new(LocalStore::open(&path)?))
}

/// The absolute path that a `file://` URL names; `None` for anything else.
pub fn path_of_url(url: &str) -> Option<PathBuf> {
    let rest = url.strip_prefix("file://")?;
    let path = percent_decode(rest.strip_prefix("localhost").unwrap_or(rest))?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// Undoes `%20` and the like; `None` if a `%` is not followed by two hexadecimal digits, or the result is not UTF-8.
pub(crate) fn percent_decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let mut value = [0];
            hex::decode_to_slice(rest.get(..2)?, &mut value).ok()?;
            decoded.push(value[0]);
            rest = &rest[2..];
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

/// Longest name of a blob, in bytes.
const NAME_LIMIT: usize = 1024;

fn check_name(name: &str) -> Result<(), StoreError> {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.starts_with(local::UNFINISHED_PREFIX);
    let legal = |c: char| c != '\\' && !c.is_control();
    if name.len() <= NAME_LIMIT && name.split('/').all(plain) && name.chars().all(legal) {
        return Ok(());
    }
    Err(StoreError::BadName { name: name.chars().take(NAME_LIMIT).collect() })
}

fn check_range(url: &str, name: &str, size: u64, range: &Range<u64>) -> Result<(), StoreError> {
    if range.start <= range.end && range.end <= size {
        return Ok(());
    }
    let (url, name) = (url.to_owned(), name.to_owned());
    Err(StoreError::RangeOutOfBounds { url, name, size, start: range.start, end: range.end })
}

/// A place for blobs.
///
/// Names are relative, `/`-separated, without `.` or `..`; anything else is refused with `BadName`, so that a run can never
/// read or write outside its URL.
pub trait BlobStore: Send + Sync + std::fmt::Debug {
    /// Writes a blob whole: a reader sees all of it or nothing, and it is durable when this returns. Replaces what was there.
    ///
    /// # Errors
    /// `BadName`, `Io`.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;
    /// Reads a whole blob.
    ///
    /// # Errors
    /// `NotFound`, `BadName`, `Io`.
    fn get(&self, name: &str) -> Result<Bytes, StoreError>;
    /// Reads part of a blob.
    ///
    /// # Errors
    /// `NotFound`, `BadName`, `RangeOutOfBounds`, `Io`.
    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
    /// Size of a blob in bytes.
    ///
    /// # Errors
    /// `NotFound`, `BadName`, `Io`.
    fn size(&self, name: &str) -> Result<u64, StoreError>;
    /// Names of all blobs under a prefix (a folder's name), sorted.
    ///
    /// # Errors
    /// `BadName`, `Io`.
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError>;
    /// Deletes a blob; one that is not there is no error.
    ///
    /// # Errors
    /// `BadName`, `Io`.
    fn delete(&self, name: &str) -> Result<(), StoreError>;
    /// Removes what killed processes left half written. Nobody may be writing meanwhile.
    ///
    /// # Errors
    /// `Io`.
    fn sweep(&self) -> Result<(), StoreError>;
    /// The URL that opens this store again, in this or another process.
    fn url(&self) -> &str;
}
