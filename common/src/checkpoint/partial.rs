//! Directories of checkpoints that are being written: each is locked by its writer, so that what a killed one left behind is
//! told from what another is at work on.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

/// A directory that goes when this is dropped, unless it was kept.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) folder: TempDir,
    /// Locked for as long as this lives, or its process.
    _lock: File,
}

impl Partial {
    /// Makes a hidden directory in `parent` for the checkpoint `name`, and removes those whose writers are dead.
    pub(super) fn create(parent: &Path, name: &str) -> io::Result<Self> {
        let prefix = format!(".{name}.partial-");
        remove_abandoned(parent, &prefix)?;
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            // As any directory would be created; the umask still applies.
            .permissions(fs::Permissions::from_mode(0o777))
            .tempdir_in(parent)?;
        let lock = File::open(folder.path())?;
        lock.lock()?;
        Ok(Self { folder, _lock: lock })
    }
}

fn remove_abandoned(parent: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let is_partial = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        // One that cannot be opened or locked is somebody's.
        if is_partial && File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_writer_left_goes_and_what_a_living_one_is_at_stays() {
        let parent = tempfile::tempdir().unwrap();
        let left = parent.path().join(".out.partial-dead");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("model.safetensors"), b"half").unwrap();
        let other = parent.path().join(".other.partial-dead");
        fs::create_dir(&other).unwrap();
        let first = Partial::create(parent.path(), "out").unwrap();
        assert!(!left.exists() && other.exists());
        let second = Partial::create(parent.path(), "out").unwrap();
        assert!(first.folder.path().exists() && second.folder.path().exists());
        let path = first.folder.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }
}
