//! Bearer tokens, for people and scripts that submit or watch without a certificate of their own.
//!
//! A token file has one token a line, `role token name`, where the token may stand as `sha256:` and the digest of its text in
//! hexadecimal, so that the coordinator need not hold it. `#` begins a comment.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use tracing::{info, warn};

use crate::{GateError, Role, Secret, file};

/// Shorter ones could be guessed.
const SHORTEST: usize = 32;
/// Longer ones are no tokens.
const LONGEST: usize = 512;
/// A token that stands as its digest.
const DIGEST_PREFIX: &str = "sha256:";

/// Who a token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bearer {
    /// A name for logs.
    pub name: String,
    /// What the bearer may do.
    pub role: Role,
}

struct Entry {
    digest: [u8; 32],
    bearer: Bearer,
}

/// The tokens of a file, read again when it changes.
pub struct Tokens {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    entries: Arc<Vec<Entry>>,
    complaint: Option<String>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tokens").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// `Io`, `TooLarge`, `Exposed`, `TokenLine`.
    pub fn open(path: PathBuf) -> Result<Arc<Self>, GateError> {
        let state = Mutex::new(State { entries: Arc::new(read(&path)?), complaint: None });
        Ok(Arc::new(Self { path, state }))
    }

    /// Whose token this is, by what the file says now. While it cannot be read, nobody's.
    pub(crate) async fn bearer(self: &Arc<Self>, token: &Secret) -> Option<Bearer> {
        let tokens = Arc::clone(self);
        let entries = tokio::task::spawn_blocking(move || tokens.refresh()).await.ok()?;
        find(&entries, token)
    }

    fn refresh(&self) -> Arc<Vec<Entry>> {
        let read = read(&self.path);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(entries) => {
                if state.complaint.take().is_some() {
                    info!(path = %self.path.display(), "tokens can be read again");
                }
                state.entries = Arc::new(entries);
            }
            Err(error) => {
                // Unlike a certificate, a token that was taken out of a file must not live on because of another line.
                state.entries = Arc::default();
                let complaint = espalier_common::fault::Fault::new(error.class(), &error).message;
                if state.complaint.as_ref() != Some(&complaint) {
                    warn!(error = complaint, "tokens cannot be read: none is taken");
                    state.complaint = Some(complaint);
                }
            }
        }
        Arc::clone(&state.entries)
    }
}

/// Compares with every entry, and in constant time, so that nothing is learnt from how long it takes.
fn find(entries: &[Entry], token: &Secret) -> Option<Bearer> {
    let digest: [u8; 32] = Sha256::digest(token.expose().as_bytes()).into();
    let mut found = None;
    for entry in entries {
        let same: Choice = entry.digest.ct_eq(&digest);
        if bool::from(same) {
            found = Some(&entry.bearer);
        }
    }
    found.cloned()
}

fn read(path: &Path) -> Result<Vec<Entry>, GateError> {
    let bytes = file::read_secret(path)?;
    let wrong = |line: usize, reason| GateError::TokenLine { path: path.to_owned(), line, reason };
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong(1, "the file is not UTF-8"))?;
    let mut entries: Vec<Entry> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split_once('#').map_or(line, |(before, _)| before).trim();
        if line.is_empty() {
            continue;
        }
        let entry = entry(line).map_err(|reason| wrong(index + 1, reason))?;
        if entries.iter().any(|other| other.digest == entry.digest) {
            return Err(wrong(index + 1, "the token stands twice"));
        }
        entries.push(entry);
    }
    if entries.is_empty() { Err(wrong(1, "no token stands in the file")) } else { Ok(entries) }
}

fn entry(line: &str) -> Result<Entry, &'static str> {
    let mut words = line.split_whitespace();
    let (Some(role), Some(token), Some(name), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err("a line is `role token name`");
    };
    let role = match role.parse() {
        Ok(role @ (Role::Submitter | Role::Viewer)) => role,
        Ok(Role::Worker | Role::Coordinator) => return Err("workers and coordinators need certificates, not tokens"),
        Err(()) => return Err("the role of a token is submitter or viewer"),
    };
    let digest = match token.strip_prefix(DIGEST_PREFIX) {
        Some(digits) => {
            let mut digest = [0; 32];
            hex::decode_to_slice(digits, &mut digest).map_err(|_| "a digest is sha256: and 64 hexadecimal digits")?;
            digest
        }
        None => Sha256::digest(checked(token)?.as_bytes()).into(),
    };
    if name.chars().any(char::is_control) {
        return Err("the name holds a control character");
    }
    Ok(Entry { digest, bearer: Bearer { name: name.to_owned(), role } })
}

fn checked(token: &str) -> Result<&str, &'static str> {
    match token.len() {
        length if length < SHORTEST => Err("a token has at least 32 characters: openssl rand -hex 32"),
        length if length > LONGEST => Err("a token has at most 512 characters"),
        _ if !token.bytes().all(|byte| byte.is_ascii_graphic()) => Err("a token is visible ASCII without spaces"),
        _ => Ok(token),
    }
}

/// Reads the one token of a client's file.
///
/// # Errors
/// `Io`, `TooLarge`, `Exposed`, `TokenLine`.
pub fn client_token(path: &Path) -> Result<Secret, GateError> {
    let bytes = file::read_secret(path)?;
    let wrong = |reason| GateError::TokenLine { path: path.to_owned(), line: 1, reason };
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("the file is not UTF-8"))?;
    checked(text.trim()).map(|token| Secret::new(token.to_owned())).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const ALICES: &str = "0123456789abcdef0123456789abcdef-alice";
    const BOBS: &str = "0123456789abcdef0123456789abcdef-bob";

    fn write(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }

    fn secret(text: &str) -> Secret {
        Secret::new(text.to_owned())
    }

    #[tokio::test]
    async fn tokens_are_found_as_text_and_by_digest_and_follow_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let digest = hex::encode(Sha256::digest(BOBS));
        write(&path, &format!("# people\nsubmitter {ALICES} alice\n\nviewer sha256:{digest} bob # reads\n"));
        let tokens = Tokens::open(path.clone()).unwrap();
        let bearer = |name: &str, role| Some(Bearer { name: name.to_owned(), role });
        assert_eq!(tokens.bearer(&secret(ALICES)).await, bearer("alice", Role::Submitter));
        assert_eq!(tokens.bearer(&secret(BOBS)).await, bearer("bob", Role::Viewer));
        for wrong in ["", &ALICES[1..], &format!("{ALICES}x"), &digest, &format!("sha256:{digest}")] {
            assert_eq!(tokens.bearer(&secret(wrong)).await, None, "{wrong}");
        }
        write(&path, &format!("viewer {ALICES} alice\n"));
        assert_eq!(tokens.bearer(&secret(ALICES)).await, bearer("alice", Role::Viewer));
        assert_eq!(tokens.bearer(&secret(BOBS)).await, None);
        write(&path, "viewer short alice\n");
        assert_eq!(tokens.bearer(&secret(ALICES)).await, None);
        assert!(!format!("{tokens:?}").contains("0123"));
    }

    #[test]
    fn a_wrong_line_is_told_by_its_number_and_never_by_its_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let lines = [
            (format!("submitter {ALICES}"), "role token name"),
            (format!("submitter {ALICES} alice bob"), "role token name"),
            (format!("admin {ALICES} alice"), "submitter or viewer"),
            (format!("worker {ALICES} alice"), "certificates"),
            ("submitter sha256:0123 alice".to_owned(), "64 hexadecimal"),
            ("submitter 0123456789 alice".to_owned(), "at least 32"),
            (format!("submitter {} alice", "0123".repeat(200)), "at most 512"),
            (format!("submitter {ALICES}ä alice"), "ASCII"),
            (format!("viewer {BOBS} bob\nviewer {BOBS} bob"), "stands twice"),
        ];
        for (line, reason) in lines {
            write(&path, &format!("# first\n{line}\n"));
            let message = Tokens::open(path.clone()).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains("tokens:"), "{message}");
            assert!(!message.contains("0123"), "{message}");
        }
        write(&path, "# nothing\n");
        assert!(Tokens::open(path.clone()).is_err());
        write(&path, &format!("viewer {BOBS} bob"));
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Tokens::open(path), Err(GateError::Exposed { .. })));
    }

    #[test]
    fn a_clients_file_holds_one_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        write(&path, &format!("{ALICES}\n"));
        assert_eq!(client_token(&path).unwrap().expose(), ALICES);
        for wrong in ["", "short", &format!("{ALICES} {BOBS}")] {
            write(&path, wrong);
            assert!(matches!(client_token(&path), Err(GateError::TokenLine { .. })), "{wrong}");
        }
    }
}
