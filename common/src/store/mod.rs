//! Where a run keeps its artifacts: bytes under relative names, put atomically, read by range.

pub mod conformance;
mod error;
mod local;
mod memory;
mod object;
#[cfg(test)]
mod object_tests;
mod settings;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use error::StoreError;
pub use local::LocalStore;
pub use memory::MemoryStore;
pub(crate) use object::without_secrets;
pub use object::{ObjectBlobStore, Upload};
pub use settings::StoreSettings;

/// Opens the store that a URL names: a directory, as a path or as a `file://` URL, or a bucket (`s3://`, `gs://`, `az://`)
/// with a prefix in it. Nothing is created or asked for yet.
///
/// # Errors
/// `UnknownScheme`; `Misconfigured` if the environment does not say how to reach an object store.
pub fn open(url: &str, settings: &StoreSettings) -> Result<Arc<dyn BlobStore>, StoreError> {
    if is_object_url(url) {
        return Ok(Arc::new(ObjectBlobStore::open(url, settings)?));
    }
    Ok(Arc::new(LocalStore::open(&local_path(url)?)?))
}

/// Read at a time when an object is copied.
const COPIED_BYTES: u64 = 16 << 20;

/// Copies the object that a URL names into `folder`, under its own name, so much at a time that memory does not matter; returns
/// where it is.
///
/// # Errors
/// As [`open`] and [`BlobStore::get_range`]; `Io` if the copy cannot be written.
pub fn copy_here(url: &str, settings: &StoreSettings, folder: &Path) -> Result<PathBuf, StoreError> {
    use std::io::Write as _;
    let unknown = || StoreError::UnknownScheme { url: object::without_secrets(url) };
    let (parent, name) = url.rsplit_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(unknown)?;
    let name = percent_decode(name).ok_or_else(unknown)?;
    check_name(&name)?;
    if name.contains('/') {
        return Err(unknown());
    }
    let store = open(parent, settings)?;
    let size = store.size(&name)?;
    let path = folder.join(&name);
    let failed = |source| StoreError::Io { url: folder.display().to_string(), name: name.clone(), source };
    let mut file = std::fs::File::create(&path).map_err(failed)?;
    let mut at = 0;
    while at < size {
        let end = size.min(at + COPIED_BYTES);
        file.write_all(&store.get_range(&name, at..end)?).map_err(failed)?;
        at = end;
    }
    Ok(path)
}

/// The folder that a path or a `file://` URL names.
///
/// # Errors
/// `UnknownScheme` for anything else.
pub fn local_path(url: &str) -> Result<PathBuf, StoreError> {
    let unknown = || StoreError::UnknownScheme { url: object::without_secrets(url) };
    let path = match url.split_once("://") {
        None => url.to_owned(),
        Some(("file", rest)) => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            percent_decode(path).filter(|path| path.starts_with('/')).ok_or_else(unknown)?
        }
        Some(_) => return Err(unknown()),
    };
    if path.is_empty() { Err(unknown()) } else { Ok(path.into()) }
}

/// Whether a URL names an object store, and not a place on this machine.
pub fn is_object_url(url: &str) -> bool {
    url.split_once("://").is_some_and(|(scheme, _)| object::SCHEMES.contains(&scheme))
}

/// The URL of something below another one.
pub fn join(url: &str, name: &str) -> String {
    format!("{}/{name}", url.trim_end_matches('/'))
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

/// What became of [`BlobStore::put_if_absent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// The blob is there, durable, and it is ours.
    Written,
    /// There was one of that name already; it is as it was.
    AlreadyThere,
}

/// A place for blobs.
///
/// Names are relative, `/`-separated, without `.` or `..`; anything else is refused with `BadName`, so that a run can never
/// read or write outside its URL.
pub trait BlobStore: Send + Sync + std::fmt::Debug {
    /// Writes a blob whole: a reader sees all of it or nothing, and it is durable when this returns. Replaces what was there.
    ///
    /// # Errors
    /// `BadName`, `Io`; of an object store, `Unavailable`, `Denied`, `Refused`, as everywhere.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;
    /// Writes a blob as [`Self::put`] does, unless there is one of that name: of any number of writers, one succeeds.
    ///
    /// After an error nobody knows whether the blob was written; and where the network swallowed an answer, the retry that
    /// follows finds what the first try wrote and says `AlreadyThere`. Whoever needs to know puts something of its own into
    /// the bytes and reads them back.
    ///
    /// # Errors
    /// As [`Self::put`]; `Unsupported` if the store cannot promise this.
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Placed, StoreError>;
    /// Reads a whole blob.
    ///
    /// # Errors
    /// `NotFound`, `BadName`, `Io`.
    fn get(&self, name: &str) -> Result<Bytes, StoreError>;
    /// Reads a whole blob of bounded size; nothing is allocated for a larger one.
    ///
    /// # Errors
    /// As [`Self::get`]; `TooLarge`.
    fn get_at_most(&self, name: &str, limit: u64) -> Result<Bytes, StoreError> {
        let size = self.size(name)?;
        if size > limit {
            return Err(StoreError::TooLarge { url: self.url().to_owned(), name: name.to_owned(), size, limit });
        }
        self.get(name)
    }
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
    /// The directory that the store is, if it is one on this machine.
    fn directory(&self) -> Option<&Path> {
        None
    }
}
