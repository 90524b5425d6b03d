//! Where a checkpoint is written, and how it becomes visible there.
//!
//! In a folder everything goes to a hidden folder beside it, which then takes its name. In an object store nothing can be
//! renamed: files get their own names as they are finished, each whole or not there. Tensors come first and `espalier.json`
//! last, so a checkpoint with that file is complete; and before it come the config and, of several shards, the index, without
//! which no reader opens one. Until then an object says whose checkpoint is being written.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::partial::Partial;
use super::writer::{WrittenFile, check_target, parent_and_name, sync_directory};
use crate::digest::{Digest, Hasher};
use crate::store::{self, BlobStore, LocalStore, ObjectBlobStore, Placed, StoreError, StoreSettings, Upload};

/// The object that is there while a checkpoint is written.
const UNFINISHED: &str = "espalier.unfinished";
/// It holds a digest.
const UNFINISHED_LIMIT: u64 = 1 << 10;

/// A place for a checkpoint, as a job's `[output] uri` names it.
#[derive(Debug, Clone)]
pub enum Target {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A prefix in a bucket.
    Bucket(ObjectBlobStore),
}

impl Target {
    /// Reads a path, or a URL of a folder or an object store.
    ///
    /// # Errors
    /// `Store` if it is neither, or the settings do not say how to reach the object store.
    pub fn parse(uri: &str, settings: &StoreSettings) -> Result<Self, CheckpointError> {
        if store::is_object_url(uri) {
            return Ok(Self::Bucket(ObjectBlobStore::open(uri, settings)?));
        }
        Ok(Self::Folder(store::local_path(uri)?))
    }

    /// Its files, as a store.
    ///
    /// # Errors
    /// See [`LocalStore::open`].
    pub fn store(&self) -> Result<Box<dyn BlobStore>, StoreError> {
        Ok(match self {
            Self::Folder(folder) => Box::new(LocalStore::open(folder)?),
            Self::Bucket(store) => Box::new(store.clone()),
        })
    }

    /// Checks that a checkpoint can be written there, see [`check_target`]: nothing is below the prefix.
    ///
    /// # Errors
    /// `OutputExists`, `Store`, and those of [`check_target`].
    pub fn check(&self) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(folder) => check_target(folder),
            Self::Bucket(store) if store.list("")?.is_empty() => Ok(()),
            Self::Bucket(store) => Err(CheckpointError::OutputExists { path: store.url().into() }),
        }
    }

    /// Takes away what says that the checkpoint is being written; it is complete.
    ///
    /// # Errors
    /// `Store`.
    pub fn settle(&self) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(_) => Ok(()),
            Self::Bucket(store) => Ok(store.delete(UNFINISHED)?),
        }
    }

    /// For messages.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.clone(),
            Self::Bucket(store) => store.url().into(),
        }
    }
}

/// A place where a checkpoint is being written.
#[derive(Debug)]
pub(super) enum Destination {
    Folder { target: PathBuf, partial: Partial },
    Bucket(ObjectBlobStore),
}

impl Destination {
    /// Begins. `owner` names the checkpoint by what it is made of: what an earlier life left of the same one in a bucket is
    /// replaced by the same bytes.
    ///
    /// # Errors
    /// Those of [`Target::check`].
    pub(super) fn begin(target: &Target, owner: Digest) -> Result<Self, CheckpointError> {
        match target {
            Target::Folder(folder) => Self::begin_folder(folder),
            Target::Bucket(store) => {
                let owner = owner.to_string();
                if !store.list("")?.iter().any(|name| name == UNFINISHED) {
                    target.check()?;
                }
                let is_ours = match store.put_if_absent(UNFINISHED, owner.as_bytes())? {
                    Placed::Written => true,
                    Placed::AlreadyThere => store.get_at_most(UNFINISHED, UNFINISHED_LIMIT)? == owner,
                };
                if is_ours {
                    Ok(Self::Bucket(store.clone()))
                } else {
                    Err(CheckpointError::OutputExists { path: target.path() })
                }
            }
        }
    }

    fn begin_folder(target: &Path) -> Result<Self, CheckpointError> {
        check_target(target)?;
        let failed = |source| CheckpointError::Io { path: target.to_owned(), source };
        let (parent, name) = parent_and_name(target)?;
        fs::create_dir_all(&parent).map_err(failed)?;
        let partial = Partial::create(&parent, &name).map_err(failed)?;
        Ok(Self::Folder { target: target.to_owned(), partial })
    }

    /// A new file there; `bytes` is how many are to come.
    pub(super) fn create(&self, name: &str, bytes: u64) -> Result<HashedFile, CheckpointError> {
        let sink = match self {
            Self::Folder { partial, .. } => {
                let path = partial.folder.path().join(name);
                let file =
                    File::create_new(&path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
                Sink::Disk { path, file: BufWriter::new(file) }
            }
            Self::Bucket(store) => Sink::Object(store.upload(name, bytes)?),
        };
        Ok(HashedFile { name: name.to_owned(), sink, hasher: Hasher::default(), bytes: 0 })
    }

    /// Makes the checkpoint visible under its name, or complete there.
    pub(super) fn reveal(self) -> Result<(), CheckpointError> {
        let (target, partial) = match self {
            Self::Folder { target, partial } => (target, partial),
            Self::Bucket(store) => return Target::Bucket(store).settle(),
        };
        let (parent, _) = parent_and_name(&target)?;
        sync_directory(partial.folder.path())?;
        // Replaces an empty directory and nothing else.
        fs::rename(partial.folder.path(), &target).map_err(|source| match source.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                CheckpointError::OutputExists { path: target.clone() }
            }
            _ => CheckpointError::Io { path: target.clone(), source },
        })?;
        let _ = partial.folder.keep();
        sync_directory(&parent)
    }
}

#[derive(Debug)]
enum Sink {
    Disk { path: PathBuf, file: BufWriter<File> },
    Object(Upload),
}

/// A new file whose contents are hashed on their way.
pub(super) struct HashedFile {
    name: String,
    sink: Sink,
    hasher: Hasher,
    bytes: u64,
}

impl std::fmt::Debug for HashedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HashedFile").field("sink", &self.sink).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl HashedFile {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        match &mut self.sink {
            Sink::Disk { path, file } => {
                file.write_all(bytes).map_err(|source| CheckpointError::Io { path: path.clone(), source })
            }
            Sink::Object(upload) => Ok(upload.write(bytes)?),
        }
    }

    /// Makes the file durable.
    pub(super) fn finish(self) -> Result<WrittenFile, CheckpointError> {
        let Self { name, sink, hasher, bytes } = self;
        match sink {
            Sink::Disk { path, file } => {
                let synced = file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
                synced.map_err(|source| CheckpointError::Io { path, source })?;
            }
            Sink::Object(upload) => upload.finish()?,
        }
        Ok(WrittenFile { name, sha256: hasher.finish(), bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CheckpointWriter, Dtype, TensorHeader};
    use super::*;

    fn plan() -> Vec<(String, TensorHeader)> {
        let header = TensorHeader { dtype: Dtype::F32, shape: vec![4] };
        ["a", "b"].map(|name| (name.to_owned(), header.clone())).to_vec()
    }

    fn write(target: &Target, owner: &[u8]) -> Result<(), CheckpointError> {
        let mut writer = CheckpointWriter::begin(target, Digest::of(owner), 16, plan())?;
        writer.write("a", &[1; 16])?;
        writer.write("b", &[2; 16])?;
        writer.add_file("config.json", b"{}")?;
        writer.close_tensors()?;
        writer.add_file("espalier.json", b"{}")?;
        writer.finish().map(drop)
    }

    #[test]
    fn a_bucket_gets_the_files_of_a_folder() {
        let (directory, bucket) = (tempfile::tempdir().unwrap(), ObjectBlobStore::in_memory().unwrap());
        let folder = directory.path().join("out");
        write(&Target::Folder(folder.clone()), b"job").unwrap();
        write(&Target::Bucket(bucket.clone()), b"job").unwrap();
        let local = LocalStore::open(&folder).unwrap();
        let names = local.list("").unwrap();
        assert_eq!(bucket.list("").unwrap(), names);
        for name in names {
            assert_eq!(bucket.get(&name).unwrap(), local.get(&name).unwrap(), "{name}");
        }
    }

    #[test]
    fn in_a_bucket_nothing_opens_before_all_is_there_and_the_same_job_may_begin_again() {
        let bucket = ObjectBlobStore::in_memory().unwrap();
        let target = Target::Bucket(bucket.clone());
        let mut writer = CheckpointWriter::begin(&target, Digest::of(b"job"), 16, plan()).unwrap();
        writer.write("a", &[1; 16]).unwrap();
        assert_eq!(bucket.list("").unwrap(), [UNFINISHED, "model-00001-of-00002.safetensors"]);
        writer.write("b", &[2; 16]).unwrap();
        drop(writer);
        assert!(matches!(write(&target, b"another job"), Err(CheckpointError::OutputExists { .. })));
        assert!(matches!(target.check(), Err(CheckpointError::OutputExists { .. })));
        write(&target, b"job").unwrap();
        assert!(!bucket.list("").unwrap().iter().any(|name| name == UNFINISHED));
        assert!(matches!(write(&target, b"job"), Err(CheckpointError::OutputExists { .. })), "a complete one is kept");
    }
}
