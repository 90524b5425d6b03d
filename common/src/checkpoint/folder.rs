//! Where the files of a checkpoint are read: in a directory, or below a prefix in a bucket.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::CheckpointError;
use super::json::{WHOLE_FILE_LIMIT, parse_json, read_whole};
use crate::store::{BlobStore, StoreError};

/// Files beside each other.
#[derive(Debug, Clone)]
pub(super) enum Folder {
    Disk(PathBuf),
    Store(Arc<dyn BlobStore>),
}

impl Folder {
    /// For messages.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Disk(path) => path.clone(),
            Self::Store(store) => store.url().into(),
        }
    }

    /// A file's path, for messages.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Whether there is a file of that name; links count as what they lead to.
    ///
    /// # Errors
    /// `Store`.
    pub(super) fn has(&self, name: &str) -> Result<bool, CheckpointError> {
        match self {
            Self::Disk(path) => Ok(path.join(name).is_file()),
            Self::Store(store) => match store.size(name) {
                Ok(_) => Ok(true),
                Err(StoreError::NotFound { .. }) => Ok(false),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// The names of the files directly in it.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Store`.
    pub(super) fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let path = match self {
            Self::Disk(path) => path,
            Self::Store(store) => return Ok(store.list("")?.into_iter().filter(|name| !name.contains('/')).collect()),
        };
        let failed = |source| CheckpointError::io(path, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // In the hub's cache the files are links, so `is_file` must follow them.
            if let Some(name) = entry.file_name().to_str().filter(|_| entry.path().is_file()) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Reads a whole file of bounded size.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `TooLarge`, `Store`.
    pub(super) fn read_whole(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        match self {
            Self::Disk(path) => read_whole(&path.join(name)),
            Self::Store(store) => {
                let read = store.get_at_most(name, WHOLE_FILE_LIMIT);
                read.map(|bytes| bytes.to_vec()).map_err(|error| of_file(self.file(name), error))
            }
        }
    }

    /// Reads a JSON file of bounded size.
    ///
    /// # Errors
    /// Those of [`Self::read_whole`], and `InvalidJson`.
    pub(super) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        parse_json(&self.file(name), &self.read_whole(name)?)
    }

    /// Opens a file for reads of parts of it.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Store`.
    pub(super) fn open(&self, name: &str) -> Result<OpenFile, CheckpointError> {
        let path = self.file(name);
        match self {
            Self::Disk(_) => {
                let failed = |source| CheckpointError::io(&path, source);
                let file = File::open(&path).map_err(failed)?;
                let size = file.metadata().map_err(failed)?.len();
                Ok(OpenFile { size, content: Content::Disk(file), path })
            }
            Self::Store(store) => {
                let size = store.size(name).map_err(|error| of_file(path.clone(), error))?;
                let content = Content::Blob { store: Arc::clone(store), name: name.to_owned() };
                Ok(OpenFile { size, content, path })
            }
        }
    }
}

fn of_file(path: PathBuf, error: StoreError) -> CheckpointError {
    match error {
        StoreError::NotFound { .. } => CheckpointError::NotFound { path },
        StoreError::TooLarge { size, limit, .. } => {
            CheckpointError::TooLarge { path, what: "the file".to_owned(), size, limit }
        }
        error => error.into(),
    }
}

/// A file that is open for reads of parts of it.
#[derive(Debug)]
pub(super) struct OpenFile {
    path: PathBuf,
    size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Disk(File),
    Blob { store: Arc<dyn BlobStore>, name: String },
}

impl OpenFile {
    /// For messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Reads `length` bytes from `start`, which the caller has checked against the size.
    ///
    /// # Errors
    /// `Io`, `Store`.
    pub(super) fn read(&self, start: u64, length: usize) -> Result<Vec<u8>, CheckpointError> {
        match &self.content {
            Content::Disk(file) => {
                let mut bytes = vec![0; length];
                let read = file.read_exact_at(&mut bytes, start);
                read.map_err(|source| CheckpointError::Io { path: self.path.clone(), source })?;
                Ok(bytes)
            }
            Content::Blob { store, name } => Ok(store.get_range(name, start..start + length as u64)?.to_vec()),
        }
    }
}
