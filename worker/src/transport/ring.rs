//! A ring of bytes in memory that two workers of one machine have open: each writes to its half what the other reads.
//!
//! It is a file in the system's folder for shared memory. It is read and written, not mapped: whatever the other side does to it,
//! the worst that comes of it is an error. What may be overwritten is for credits to tell: none is granted for bytes not yet read.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use super::CHUNK_BYTES;

/// Bytes of each half, and the window of credits for it. A few chunks, so that what was written is in the cache when it is read.
pub const RING_BYTES: u64 = 4 * CHUNK_BYTES as u64;
/// Where systems keep memory that processes share.
const FOLDER: &str = "/dev/shm";
/// Bytes of a ring's name, which nobody guesses.
pub const NAME_BYTES: usize = 16;
/// What the names of files begin with.
const PREFIX: &str = "espalier-";
/// A name that is older is of a ring that nobody will open any more: two workers agree on one in seconds, or not at all.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// Where rings are, and who else can be there.
#[derive(Debug, Clone)]
pub struct SharedMemory {
    folder: PathBuf,
    /// Names who can open it: workers of one user on one machine.
    machine: String,
}

impl SharedMemory {
    /// This machine's, by a name for who can use it; `None` if it has none. What workers left there that were killed goes.
    pub fn here(machine: String) -> Option<Self> {
        let here = Self::at(FOLDER.into(), machine);
        here.folder.is_dir().then(|| {
            here.sweep();
            here
        })
    }

    /// Removes names of rings that are forgotten; those of other users stay.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let is_ring = entry.file_name().to_str().is_some_and(|name| {
                let digits = name.strip_prefix(PREFIX).unwrap_or_default();
                digits.len() == 2 * NAME_BYTES && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            let made = || entry.metadata().and_then(|about| about.modified()).ok();
            let is_old = || made().and_then(|made| made.elapsed().ok()).is_some_and(|age| age > FORGOTTEN);
            if is_ring && is_old() && std::fs::remove_file(entry.path()).is_ok() {
                tracing::debug!(ring = ?entry.file_name(), "removed what a worker left behind");
            }
        }
    }

    /// A folder's, for workers that give the same name.
    pub fn at(folder: PathBuf, machine: String) -> Self {
        Self { folder, machine }
    }

    /// Names who can open rings of this folder.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// A name for a new ring.
    pub fn new_name() -> [u8; NAME_BYTES] {
        rand::random()
    }

    /// A new ring of that name, whose room is there. Whoever opens it ends the name; so does the end of what is returned.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(&self, name: &[u8; NAME_BYTES]) -> io::Result<Ring> {
        let path = self.path(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let ring = Ring { file, bases: [RING_BYTES, 0], named: Some(path) };
        // A folder that is full says so now.
        let zeros = vec![0; CHUNK_BYTES];
        (0..2 * RING_BYTES).step_by(CHUNK_BYTES).try_for_each(|place| ring.file.write_all_at(&zeros, place))?;
        Ok(ring)
    }

    /// The ring of that name, which somebody made and nobody else will find.
    ///
    /// # Errors
    /// What the system says, and `InvalidData` if it is no ring.
    pub fn open(&self, name: &[u8; NAME_BYTES]) -> io::Result<Ring> {
        let path = self.path(name);
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
        let about = file.metadata()?;
        if !about.is_file() || about.len() != 2 * RING_BYTES || about.mode() & 0o077 != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no ring"));
        }
        std::fs::remove_file(&path)?;
        Ok(Ring { file, bases: [0, RING_BYTES], named: None })
    }

    fn path(&self, name: &[u8; NAME_BYTES]) -> PathBuf {
        self.folder.join(format!("{PREFIX}{:032x}", u128::from_be_bytes(*name)))
    }
}

/// One side of a ring.
#[derive(Debug)]
pub struct Ring {
    file: File,
    /// Where the halves begin that this side writes and reads.
    bases: [u64; 2],
    /// What ends with it, unless the other side was there.
    named: Option<PathBuf>,
}

impl Ring {
    /// Writes what follows `before` bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, before: u64, bytes: &[u8]) -> io::Result<()> {
        let (first, rest) = bytes.split_at(until_its_end(before, bytes.len()));
        self.file.write_all_at(first, self.bases[0] + before % RING_BYTES)?;
        self.file.write_all_at(rest, self.bases[0])
    }

    /// Reads what follows `before` bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, before: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (first, rest) = bytes.split_at_mut(until_its_end(before, bytes.len()));
        self.file.read_exact_at(first, self.bases[1] + before % RING_BYTES)?;
        self.file.read_exact_at(rest, self.bases[1])
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Some(path) = &self.named {
            // Gone already if the other side was there.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// How many of so many bytes go before the end of a half.
fn until_its_end(before: u64, bytes: usize) -> usize {
    bytes.min((RING_BYTES - before % RING_BYTES) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(folder: &tempfile::TempDir) -> SharedMemory {
        SharedMemory::at(folder.path().to_owned(), "here".to_owned())
    }

    /// Both sides of a new ring.
    fn both(folder: &tempfile::TempDir) -> (Ring, Ring) {
        let (memory, name) = (memory(folder), SharedMemory::new_name());
        (memory.create(&name).unwrap(), memory.open(&name).unwrap())
    }

    #[test]
    fn both_sides_read_what_the_other_wrote_around_the_ends() {
        let folder = tempfile::tempdir().unwrap();
        let (made, opened) = both(&folder);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "nobody else finds it");
        let mut before = 0;
        for bytes in [1, CHUNK_BYTES, 3 * CHUNK_BYTES - 2, CHUNK_BYTES, 4 * CHUNK_BYTES, 0] {
            for (number, (from, to)) in [(&made, &opened), (&opened, &made)].into_iter().enumerate() {
                let sent: Vec<u8> = (0..bytes).map(|i| (i * 7 + i / 251 + number) as u8).collect();
                from.write(before, &sent).unwrap();
                let mut read = vec![0; bytes];
                to.read(before, &mut read).unwrap();
                assert!(read == sent, "{bytes} bytes after {before}");
            }
            before += bytes as u64;
        }
    }

    #[test]
    fn names_lead_to_one_ring_and_end_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(&folder);
        let [name, other] = [(); 2].map(|()| SharedMemory::new_name());
        let ring = memory.create(&name).unwrap();
        assert_eq!(memory.create(&name).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(memory.open(&other).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(ring);
        assert_eq!(memory.open(&name).unwrap_err().kind(), io::ErrorKind::NotFound, "its maker is gone");
        std::fs::write(memory.path(&other), b"short").unwrap();
        assert_eq!(memory.open(&other).unwrap_err().kind(), io::ErrorKind::InvalidData);
        std::fs::remove_file(memory.path(&other)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", memory.path(&other)).unwrap();
        assert!(memory.open(&other).is_err(), "a link may lead anywhere");
    }

    #[test]
    fn what_was_left_behind_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(&folder);
        let left = memory.path(&SharedMemory::new_name());
        let ours = [folder.path().join("espalier-notes"), folder.path().join("something")];
        for path in ours.iter().chain([&left]) {
            let file = File::create(path).unwrap();
            file.set_modified(file.metadata().unwrap().modified().unwrap() - 2 * FORGOTTEN).unwrap();
        }
        let ring = memory.create(&SharedMemory::new_name()).unwrap();
        memory.sweep();
        assert!(!left.exists());
        assert!(ours.iter().all(|path| path.exists()) && ring.named.as_ref().unwrap().exists());
    }

    #[test]
    fn a_ring_cut_short_by_the_other_side_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (made, opened) = both(&folder);
        made.file.set_len(10).unwrap();
        assert!(opened.read(0, &mut [0; 100]).is_err());
    }
}
