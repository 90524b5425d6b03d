//! The files beside the tensors that a checkpoint made from another one takes over byte for byte.

use std::fs;
use std::path::Path;

use super::CheckpointError;
use super::json::read_whole;

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

/// Reads a directory's companion files, in order of name. Folders (`original/`) are not entered.
///
/// # Errors
/// `Io`, `TooLarge`.
pub(super) fn read_companions(directory: &Path) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
    let failed = |source| CheckpointError::io(directory, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // In the hub's cache the files are links, so `is_file` must follow them.
        if let Some(name) = entry.file_name().to_str().filter(|name| is_companion(name) && entry.path().is_file()) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    names.into_iter().map(|name| Ok((name.clone(), read_whole(&directory.join(&name))?))).collect()
}
