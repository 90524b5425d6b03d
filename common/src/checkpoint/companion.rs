//! The files beside the tensors that a checkpoint made from another one takes over byte for byte.

use super::CheckpointError;
use super::folder::Folder;

/// Names taken over as they are.
const NAMES: [&str; 10] = [
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
/// What the names of chat templates and legal texts start with.
const PREFIXES: [&str; 4] = ["chat_template.", "LICENSE", "NOTICE", "USE_POLICY"];

/// Whether a file of this name is taken over.
pub(super) fn is_companion(name: &str) -> bool {
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Reads a folder's companion files, in order of name. Folders in it (`original/`) are not entered.
///
/// # Errors
/// `Io`, `TooLarge`, `Store`.
pub(super) fn read_companions(folder: &Folder) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
    let mut names = folder.names()?;
    names.retain(|name| is_companion(name));
    names.sort_unstable();
    names.into_iter().map(|name| Ok((name.clone(), folder.read_whole(&name)?))).collect()
}
