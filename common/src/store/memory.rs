//! A store in memory, for tests.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{BlobStore, Placed, StoreError, check_name, check_range};

/// Blobs in a map. Nothing can open it again: its URL is only a label.
#[derive(Debug, Default)]
pub struct MemoryStore {
    blobs: Mutex<BTreeMap<String, Bytes>>,
}

const URL: &str = "memory:";

impl MemoryStore {
    fn blobs(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // Every change is one call on the map: a panic elsewhere cannot have left it half done.
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobStore for MemoryStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        check_name(name)?;
        self.blobs().insert(name.to_owned(), Bytes::copy_from_slice(bytes));
        Ok(())
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Placed, StoreError> {
        check_name(name)?;
        match self.blobs().entry(name.to_owned()) {
            Entry::Occupied(_) => Ok(Placed::AlreadyThere),
            Entry::Vacant(place) => {
                place.insert(Bytes::copy_from_slice(bytes));
                Ok(Placed::Written)
            }
        }
    }

    fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        check_name(name)?;
        let missing = || StoreError::NotFound { url: URL.to_owned(), name: name.to_owned() };
        self.blobs().get(name).cloned().ok_or_else(missing)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = self.get(name)?;
        check_range(URL, name, bytes.len() as u64, &range)?;
        // The range lies within a length that is a `usize`.
        Ok(bytes.slice(range.start as usize..range.end as usize))
    }

    fn size(&self, name: &str) -> Result<u64, StoreError> {
        self.get(name).map(|bytes| bytes.len() as u64)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        if prefix.is_empty() {
            return Ok(self.blobs().keys().cloned().collect());
        }
        check_name(prefix)?;
        let inside = |name: &&String| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
        Ok(self.blobs().keys().filter(inside).cloned().collect())
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        self.blobs().remove(name);
        Ok(())
    }

    fn sweep(&self) -> Result<(), StoreError> {
        Ok(()) // it dies with its process
    }

    fn url(&self) -> &str {
        URL
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance;

    #[test]
    fn memory_store_conforms() {
        conformance::check(&MemoryStore::default());
    }
}
