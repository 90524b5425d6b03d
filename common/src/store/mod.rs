//! Where a run keeps its artifacts: bytes under relative names, put atomically, read by range.

mod error;

use std::ops::Range;

use bytes::Bytes;

pub use error::StoreError;

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
    /// The URL that opens this store again, in this or another process.
    fn url(&self) -> &str;
}
