//! Small files of the gate, read whole.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use zeroize::Zeroizing;

use crate::GateError;

/// No chain of certificates and no list of tokens is longer.
const LIMIT_BYTES: u64 = 1 << 20;

/// Read and write for everybody.
const OTHERS: u32 = 0o006;

/// Reads a file that is no secret.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, GateError> {
    read_from(path, open(path)?)
}

/// Reads a file that only its owner and group may read.
pub(crate) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, GateError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(|source| io(path, source))?.permissions().mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(GateError::Exposed { path: path.to_owned(), mode });
    }
    read_from(path, file)
}

fn io(path: &Path, source: std::io::Error) -> GateError {
    GateError::Io { path: path.to_owned(), source }
}

fn open(path: &Path) -> Result<File, GateError> {
    File::open(path).map_err(|source| io(path, source))
}

fn read_from(path: &Path, file: File) -> Result<Zeroizing<Vec<u8>>, GateError> {
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(LIMIT_BYTES + 1).read_to_end(&mut bytes).map_err(|source| io(path, source))?;
    if bytes.len() as u64 > LIMIT_BYTES {
        return Err(GateError::TooLarge { path: path.to_owned(), limit: LIMIT_BYTES });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    #[test]
    fn a_secret_that_everybody_can_read_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tls.key");
        fs::write(&path, "x").unwrap();
        for (mode, taken) in [(0o600, true), (0o440, true), (0o644, false), (0o602, false)] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let read = read_secret(&path);
            assert_eq!(read.is_ok(), taken, "{mode:o}");
            if let Err(error) = read {
                assert!(error.to_string().contains("tls.key can be read or written by everybody"), "{error}");
            }
        }
    }

    #[test]
    fn a_file_beyond_the_limit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.crt");
        fs::write(&path, vec![b'x'; LIMIT_BYTES as usize + 1]).unwrap();
        assert!(matches!(read(&path), Err(GateError::TooLarge { .. })));
        fs::write(&path, vec![b'x'; LIMIT_BYTES as usize]).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, LIMIT_BYTES);
    }
}
