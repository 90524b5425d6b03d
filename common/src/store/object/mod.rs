//! A store in a bucket, through the `object_store` crate: blobs are objects below a prefix.
//!
//! Callers block; the requests run on a runtime of their own, see [`Background`]. Retries are the crate's: bounded in number
//! and in time (`connect.rs`). Large blobs go in parts, several at a time.

mod connect;
mod failure;
mod upload;

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig};

use super::{BlobStore, Placed, StoreError, StoreSettings, check_name, check_range};
use crate::tasks::Background;

pub(super) use connect::SCHEMES;
pub(crate) use connect::without_secrets;
pub use upload::Upload;

/// Larger blobs are read and written in parts: a request must end within the time that a request may take.
const ONE_REQUEST_BYTES: u64 = 16 << 20;
/// A part of a larger one.
const PART_BYTES: u64 = 8 << 20;
/// Parts under way at once: they cover each other's waits, and bound what is buffered.
const PARTS_AT_ONCE: usize = 4;
/// More blobs than this are no run's.
const MOST_NAMES: u64 = 1_000_000;

/// Objects below a prefix of a bucket. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ObjectBlobStore {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    url: String,
    settings: StoreSettings,
    background: &'static Background,
}

impl ObjectBlobStore {
    /// Opens the store that an `s3://`, `gs://` or `az://` URL names. Nothing is asked of the bucket yet.
    ///
    /// # Errors
    /// `UnknownScheme`; `Misconfigured` if the settings do not say how to reach it.
    pub fn open(url: &str, settings: &StoreSettings) -> Result<Self, StoreError> {
        Self::open_retrying(url, settings, connect::retry())
    }

    /// [`Self::open`] with a patience of the caller's choice.
    pub(super) fn open_retrying(url: &str, settings: &StoreSettings, retry: RetryConfig) -> Result<Self, StoreError> {
        let settings = settings
            .with_credentials_file()
            .map_err(|reason| StoreError::Misconfigured { url: connect::without_secrets(url), reason })?;
        let (store, prefix) = connect::connect(url, &settings, retry)?;
        Self::over(store, prefix, url.trim_end_matches('/').to_owned(), settings)
    }

    /// A store in memory behind the same code, for tests: nothing can open it again.
    ///
    /// # Errors
    /// `Misconfigured` if the system gives no threads.
    pub fn in_memory() -> Result<Self, StoreError> {
        let store = Arc::new(object_store::memory::InMemory::new());
        Self::over(store, "run".to_owned(), "memory:///run".to_owned(), StoreSettings::default())
    }

    fn over(
        store: Arc<dyn ObjectStore>,
        prefix: String,
        url: String,
        settings: StoreSettings,
    ) -> Result<Self, StoreError> {
        let background = Background::shared()
            .map_err(|error| StoreError::Misconfigured { url: url.clone(), reason: error.to_string() })?;
        Ok(Self { store, prefix, url, settings, background })
    }

    fn path(&self, name: &str) -> Result<Path, StoreError> {
        let full = if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Path::parse(full).map_err(|_| StoreError::BadName { name: name.to_owned() })
    }

    fn locate(&self, name: &str) -> Result<Path, StoreError> {
        check_name(name)?;
        self.path(name)
    }

    /// Waits for an operation on a blob.
    fn wait<T: Send + 'static>(
        &self,
        name: &str,
        operation: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.background.finish(operation).map_err(|error| self.failed(name, error))
    }

    fn failed(&self, name: &str, error: object_store::Error) -> StoreError {
        failure::told(&self.url, name, error, &self.settings)
    }

    /// Starts a blob that is written piece by piece and is there once it is finished; `bytes` is how many are to come.
    ///
    /// # Errors
    /// `BadName`.
    pub fn upload(&self, name: &str, bytes: u64) -> Result<Upload, StoreError> {
        Ok(Upload::new(self.clone(), name, self.locate(name)?, bytes))
    }

    fn put_whole(&self, name: &str, path: &Path, bytes: &[u8], mode: PutMode) -> object_store::Result<()> {
        tracing::trace!(url = self.url, name, bytes = bytes.len(), "put");
        let (store, path, payload) = (Arc::clone(&self.store), path.clone(), PutPayload::from(bytes.to_vec()));
        let options = PutOptions { mode, ..PutOptions::default() };
        self.background.finish(async move { store.put_opts(&path, payload, options).await.map(drop) })
    }

    /// Reads a range of a blob whose size is known to hold it; all of it of the same version.
    fn get_parts(&self, name: &str, range: Range<u64>, e_tag: Option<String>) -> Result<Bytes, StoreError> {
        let (store, path) = (Arc::clone(&self.store), self.locate(name)?);
        let length = usize::try_from(range.end - range.start).map_err(|_| StoreError::TooLarge {
            url: self.url.clone(),
            name: name.to_owned(),
            size: range.end - range.start,
            limit: usize::MAX as u64,
        })?;
        let starts = (range.start..range.end).step_by(PART_BYTES as usize);
        let part = move |start: u64| {
            let (store, path, if_match) = (Arc::clone(&store), path.clone(), e_tag.clone());
            let part = start..(start + PART_BYTES).min(range.end);
            async move {
                let options = GetOptions { range: Some(part.into()), if_match, ..GetOptions::default() };
                store.get_opts(&path, options).await?.bytes().await
            }
        };
        let parts = stream::iter(starts).map(part).buffered(PARTS_AT_ONCE);
        let whole = self.wait(name, async move {
            let mut parts = std::pin::pin!(parts);
            let mut whole = BytesMut::with_capacity(length);
            while let Some(part) = parts.try_next().await? {
                whole.extend_from_slice(&part);
            }
            Ok(whole.freeze())
        })?;
        self.check_length(name, whole, length as u64)
    }

    fn check_length(&self, name: &str, bytes: Bytes, expected: u64) -> Result<Bytes, StoreError> {
        if bytes.len() as u64 == expected {
            return Ok(bytes);
        }
        let reason = format!("{} bytes came where {expected} were asked for", bytes.len());
        Err(StoreError::Unavailable { url: self.url.clone(), name: name.to_owned(), reason, unreachable: false })
    }
}

/// What the first request for a blob gave.
enum First {
    Whole(Bytes),
    Large { size: u64, e_tag: Option<String> },
}

impl BlobStore for ObjectBlobStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.locate(name)?;
        if bytes.len() as u64 <= ONE_REQUEST_BYTES {
            return self.put_whole(name, &path, bytes, PutMode::Overwrite).map_err(|error| self.failed(name, error));
        }
        let mut upload = Upload::new(self.clone(), name, path, bytes.len() as u64);
        upload.write(bytes)?;
        upload.finish()
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Placed, StoreError> {
        let path = self.locate(name)?;
        match self.put_whole(name, &path, bytes, PutMode::Create) {
            Ok(()) => Ok(Placed::Written),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Placed::AlreadyThere),
            Err(error) => Err(self.failed(name, error)),
        }
    }

    fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        self.get_at_most(name, u64::MAX)
    }

    fn get_at_most(&self, name: &str, limit: u64) -> Result<Bytes, StoreError> {
        let (store, path) = (Arc::clone(&self.store), self.locate(name)?);
        let first = self.wait(name, async move {
            let found = store.get_opts(&path, GetOptions::default()).await?;
            let size = found.meta.size;
            if size > ONE_REQUEST_BYTES.min(limit) {
                return Ok(First::Large { size, e_tag: found.meta.e_tag });
            }
            Ok(First::Whole(found.bytes().await?))
        })?;
        match first {
            First::Whole(bytes) => Ok(bytes),
            First::Large { size, .. } if size > limit => {
                Err(StoreError::TooLarge { url: self.url.clone(), name: name.to_owned(), size, limit })
            }
            First::Large { size, e_tag } => self.get_parts(name, 0..size, e_tag),
        }
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (store, path) = (Arc::clone(&self.store), self.locate(name)?);
        let length = range.end.saturating_sub(range.start);
        if length == 0 || length > ONE_REQUEST_BYTES {
            check_range(&self.url, name, self.size(name)?, &range)?;
            return if length == 0 { Ok(Bytes::new()) } else { self.get_parts(name, range, None) };
        }
        let asked = range.clone();
        let found = self.background.finish(async move {
            let options = GetOptions { range: Some(asked.into()), ..GetOptions::default() };
            let found = store.get_opts(&path, options).await?;
            let size = found.meta.size;
            Ok((size, found.bytes().await?))
        });
        match found {
            Ok((size, bytes)) => {
                check_range(&self.url, name, size, &range)?;
                self.check_length(name, bytes, length)
            }
            Err(error @ object_store::Error::NotFound { .. }) => Err(self.failed(name, error)),
            // Stores say in many ways that a range begins behind the end.
            Err(error) => {
                check_range(&self.url, name, self.size(name)?, &range)?;
                Err(self.failed(name, error))
            }
        }
    }

    fn sweep(&self) -> Result<(), StoreError> {
        // An object is there whole or not at all; parts of an upload that was cut off go by the bucket's own rules.
        Ok(())
    }

    fn size(&self, name: &str) -> Result<u64, StoreError> {
        let (store, path) = (Arc::clone(&self.store), self.locate(name)?);
        self.wait(name, async move { Ok(store.head(&path).await?.size) })
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let folder = if prefix.is_empty() { self.path("")? } else { self.locate(prefix)? };
        let store = Arc::clone(&self.store);
        let found: Vec<String> = self.wait(prefix, async move {
            let found = store.list(Some(&folder)).take(MOST_NAMES as usize + 1);
            found.map_ok(|object| object.location.to_string()).try_collect().await
        })?;
        if found.len() as u64 > MOST_NAMES {
            let name = format!("the list of {prefix}");
            return Err(StoreError::TooLarge {
                url: self.url.clone(),
                name,
                size: found.len() as u64,
                limit: MOST_NAMES,
            });
        }
        let below = |location: &String| match self.prefix.as_str() {
            "" => Some(location.clone()),
            prefix => location.strip_prefix(prefix)?.strip_prefix('/').map(str::to_owned),
        };
        // What has a foreign name was not put by a store.
        let mut names: Vec<String> = found.iter().filter_map(below).filter(|name| check_name(name).is_ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        let (store, path) = (Arc::clone(&self.store), self.locate(name)?);
        match self.wait(name, async move { store.delete(&path).await }) {
            Err(StoreError::NotFound { .. }) => Ok(()),
            ended => ended,
        }
    }

    fn url(&self) -> &str {
        &self.url
    }
}
