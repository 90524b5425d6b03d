//! A store in a directory.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{BlobStore, Placed, StoreError, check_name, check_range};

/// Starts the names of files that are still being written; no blob may be called so.
pub(super) const UNFINISHED_PREFIX: &str = ".put-";

/// A directory whose files are the blobs.
///
/// A blob is written beside its place, synced and renamed into it, so it survives a crash whole or not at all.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    url: String,
}

impl LocalStore {
    /// The store in `root`, which need not be there: the first blob makes it.
    ///
    /// # Errors
    /// `UnknownScheme` if its absolute path is not UTF-8, and so has no URL; `Io` if there is no absolute path.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io {
            url: root.display().to_string(),
            name: "the store's directory".to_owned(),
            source,
        };
        let root = std::path::absolute(root).map_err(failed)?;
        match root.to_str() {
            Some(url) => Ok(Self { url: url.to_owned(), root }),
            None => Err(StoreError::UnknownScheme { url: root.display().to_string() }),
        }
    }

    fn locate(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name)?;
        Ok(self.root.join(name))
    }

    fn failed(&self, name: &str, source: io::Error) -> StoreError {
        let (url, name) = (self.url.clone(), name.to_owned());
        match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory => {
                StoreError::NotFound { url, name }
            }
            _ => StoreError::Io { url, name, source },
        }
    }

    /// Opens a blob and says how long it is.
    fn open_blob(&self, name: &str) -> Result<(File, u64), StoreError> {
        let path = self.locate(name)?;
        let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
        let (file, metadata) = opened.map_err(|source| self.failed(name, source))?;
        if !metadata.is_file() {
            return Err(self.failed(name, ErrorKind::IsADirectory.into()));
        }
        Ok((file, metadata.len()))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_beside(path, bytes)?.persist(path).map_err(|error| error.error)?;
        sync_directory(path.parent().unwrap_or(&self.root))
    }

    /// A durable file beside `path`, to be given that name.
    fn write_beside(&self, path: &Path, bytes: &[u8]) -> io::Result<tempfile::NamedTempFile> {
        let folder = path.parent().unwrap_or(&self.root);
        create_durably(folder)?;
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED_PREFIX)
            // As any file would be created; the umask still applies.
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        Ok(file)
    }
}

/// Creates a directory and its missing parents so that they survive a crash.
fn create_durably(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let Some(parent) = directory.parent() else { return Ok(()) };
    create_durably(parent)?;
    match fs::create_dir(directory) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_directory(parent),
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn collect_names(root: &Path, folder: &Path, names: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => match collect_names(root, &path, names) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            },
            Ok(kind) if kind.is_file() => {
                let name = path.strip_prefix(root).ok().and_then(Path::to_str);
                // What has a foreign name was not put by a store.
                names.extend(name.filter(|name| check_name(name).is_ok()).map(str::to_owned));
            }
            Ok(_) => {}
            // Deleted since the folder was read.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_unfinished(&entry.path())?;
        } else if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED_PREFIX)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl BlobStore for LocalStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.locate(name)?;
        let failed = |source| StoreError::Io { url: self.url.clone(), name: name.to_owned(), source };
        self.write(&path, bytes).map_err(failed)
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Placed, StoreError> {
        let path = self.locate(name)?;
        let failed = |source| StoreError::Io { url: self.url.clone(), name: name.to_owned(), source };
        let file = self.write_beside(&path, bytes).map_err(failed)?;
        match file.persist_noclobber(&path) {
            Ok(_) => {
                sync_directory(path.parent().unwrap_or(&self.root)).map_err(failed)?;
                Ok(Placed::Written)
            }
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(Placed::AlreadyThere),
            Err(error) => Err(failed(error.error)),
        }
    }

    fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        let (file, size) = self.open_blob(name)?;
        read_at(&file, 0, size).map_err(|source| self.failed(name, source))
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (file, size) = self.open_blob(name)?;
        check_range(&self.url, name, size, &range)?;
        read_at(&file, range.start, range.end - range.start).map_err(|source| self.failed(name, source))
    }

    fn size(&self, name: &str) -> Result<u64, StoreError> {
        self.open_blob(name).map(|(_, size)| size)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let folder = if prefix.is_empty() { self.root.clone() } else { self.locate(prefix)? };
        let mut names = Vec::new();
        match collect_names(&self.root, &folder, &mut names) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(self.failed(prefix, error));
            }
            _ => {}
        }
        names.sort_unstable();
        Ok(names)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        let path = self.locate(name)?;
        let folder = path.parent().unwrap_or(&self.root);
        match fs::remove_file(&path).and_then(|()| sync_directory(folder)).map_err(|source| self.failed(name, source)) {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn sweep(&self) -> Result<(), StoreError> {
        remove_unfinished(&self.root).map_err(|source| self.failed("the store's directory", source))
    }

    fn url(&self) -> &str {
        &self.url
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.root)
    }
}

fn read_at(file: &File, start: u64, length: u64) -> io::Result<Bytes> {
    let length = usize::try_from(length).map_err(|_| io::Error::from(ErrorKind::FileTooLarge))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{StoreSettings, conformance};

    fn open(url: &str) -> Result<std::sync::Arc<dyn BlobStore>, StoreError> {
        crate::store::open(url, &StoreSettings::default())
    }

    #[test]
    fn local_store_conforms() {
        let directory = tempfile::tempdir().unwrap();
        conformance::check(&LocalStore::open(&directory.path().join("a/run")).unwrap());
    }

    #[test]
    fn store_of_a_file_url_conforms() {
        let directory = tempfile::tempdir().unwrap();
        conformance::check(&*open(&format!("file://{}/run", directory.path().display())).unwrap());
    }

    #[test]
    fn url_opens_the_same_store_again() {
        let directory = tempfile::tempdir().unwrap();
        let first = open(&format!("file://{}", directory.path().join("a%20run").display())).unwrap();
        first.put("x/y", b"z").unwrap();
        assert!(first.url().ends_with("a run"));
        assert_eq!(open(first.url()).unwrap().get("x/y").unwrap(), "z");
    }

    #[test]
    fn unfinished_files_are_no_blobs() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::open(directory.path()).unwrap();
        fs::write(directory.path().join(".put-left-by-a-crash"), b"half").unwrap();
        store.put("whole", b"all").unwrap();
        assert_eq!(store.list("").unwrap(), ["whole"]);
        assert!(matches!(store.get(".put-left-by-a-crash"), Err(StoreError::BadName { .. })));
        store.put("folder/whole", b"all").unwrap();
        fs::write(directory.path().join("folder/.put-left-too"), b"half").unwrap();
        store.sweep().unwrap();
        let left = |folder: &str| fs::read_dir(directory.path().join(folder)).unwrap().count();
        assert_eq!((left("."), left("folder")), (2, 1));
        assert_eq!(store.list("").unwrap(), ["folder/whole", "whole"]);
    }

    #[test]
    fn foreign_urls_are_refused() {
        for url in
            ["ftp://host/x", "memory:///x", "s3:///x", "file://host/x", "file://", "", "file:///a%2", "file:///a%zz"]
        {
            assert!(matches!(open(url), Err(StoreError::UnknownScheme { .. })), "{url}");
        }
    }
}
