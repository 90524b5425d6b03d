//! A blob that is written piece by piece: parts go out while the next one fills, and all of it appears at the end.

use std::collections::VecDeque;

use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutMode, PutPayload};

use super::{ObjectBlobStore, PART_BYTES, PARTS_AT_ONCE, StoreError};
use crate::tasks::Pending;

/// Stores take 10 000 parts; a few fewer, should there be more bytes than were announced.
const MOST_PARTS: u64 = 9_500;

/// A blob on its way. It is there, whole, when [`Self::finish`] returns; dropped before that, it leaves nothing behind that a
/// reader would see, and asks the store to forget its parts.
pub struct Upload {
    store: ObjectBlobStore,
    name: String,
    path: Path,
    part_bytes: usize,
    /// What is not yet sent; less than a part.
    buffer: Vec<u8>,
    parts: Option<Box<dyn MultipartUpload>>,
    under_way: VecDeque<Pending<object_store::Result<()>>>,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("url", &self.store.url).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Upload {
    pub(super) fn new(store: ObjectBlobStore, name: &str, path: Path, bytes: u64) -> Self {
        let part_bytes = PART_BYTES.max(bytes.div_ceil(MOST_PARTS)) as usize;
        let (name, buffer) = (name.to_owned(), Vec::new());
        Self { store, name, path, part_bytes, buffer, parts: None, under_way: VecDeque::new() }
    }

    /// Appends bytes; waits while too many parts are under way.
    ///
    /// # Errors
    /// What the store says of this or an earlier part.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            // A full buffer goes out when more comes: the last part may be whole as well, and one part needs no upload in parts.
            if self.buffer.len() == self.part_bytes {
                self.send()?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.part_bytes - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), StoreError> {
        if self.parts.is_none() {
            let (store, path) = (self.store.store.clone(), self.path.clone());
            self.parts = Some(self.store.wait(&self.name, async move { store.put_multipart(&path).await })?);
        }
        if self.under_way.len() == PARTS_AT_ONCE {
            self.settle_one()?;
        }
        let part = std::mem::take(&mut self.buffer);
        if let Some(parts) = &mut self.parts {
            let sent = parts.put_part(PutPayload::from(part));
            self.under_way.push_back(self.store.background.start(sent));
        }
        Ok(())
    }

    fn settle_one(&mut self) -> Result<(), StoreError> {
        match self.under_way.pop_front().map(Pending::wait) {
            Some(Err(error)) => Err(self.store.failed(&self.name, error)),
            Some(Ok(())) | None => Ok(()),
        }
    }

    /// Makes the blob appear.
    ///
    /// # Errors
    /// What the store says; then there is no blob.
    pub fn finish(mut self) -> Result<(), StoreError> {
        if self.parts.is_none() {
            let put = self.store.put_whole(&self.name, &self.path, &self.buffer, PutMode::Overwrite);
            return put.map_err(|error| self.store.failed(&self.name, error));
        }
        if !self.buffer.is_empty() {
            self.send()?;
        }
        while !self.under_way.is_empty() {
            self.settle_one()?;
        }
        let Some(mut parts) = self.parts.take() else { return Ok(()) };
        let (ended, parts) = self.store.background.finish(async move {
            let ended = parts.complete().await;
            (ended, parts)
        });
        if let Err(error) = ended {
            self.parts = Some(parts);
            return Err(self.store.failed(&self.name, error));
        }
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut parts) = self.parts.take() else { return };
        // Parts that arrive after the store was asked to forget them would stay.
        for part in self.under_way.drain(..) {
            let _ = part.wait();
        }
        if let Err(error) = self.store.background.finish(async move { parts.abort().await }) {
            let error = self.store.failed(&self.name, error);
            tracing::warn!(%error, "parts of an upload that was given up stay in the store");
        }
    }
}
