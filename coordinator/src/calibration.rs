//! From text to tokens, once: every later step of a run, on every worker, sees the same token block.

use std::path::{Path, PathBuf};

use espalier_common::calibration::TokenBlock;
use espalier_common::checkpoint::Checkpoint;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tokenizers::Tokenizer;

/// Why there are no tokens.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The text cannot be read.
    #[error("text {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// The text is not UTF-8.
    #[error("text {} is not UTF-8 at byte {at}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// First byte that is not.
        at: usize,
    },
    /// A line of a `.jsonl` is neither `{"text": …}` nor `{"input_ids": […]}`.
    #[error("{} line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing in it.
    #[error("text {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Not enough of it.
    #[error("{} has {found} tokens, but {asked} were asked for ({samples} sequences of {sequence_length})", path.display())]
    TooFewTokens {
        /// The file.
        path: PathBuf,
        /// Tokens in it.
        found: usize,
        /// Tokens asked for.
        asked: usize,
        /// Sequences asked for.
        samples: usize,
        /// Tokens in each.
        sequence_length: usize,
    },
    /// The model brings no tokenizer.
    #[error("model {} has no tokenizer.json, so text cannot be tokenised: give a .jsonl with input_ids", path.display())]
    NoTokenizer {
        /// The model.
        path: PathBuf,
    },
    /// The tokenizer cannot be read, or fails.
    #[error("tokenizer of {}: {reason}", path.display())]
    Tokenizer {
        /// The model.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },
    /// The model's own files cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] espalier_common::checkpoint::CheckpointError),
}

/// What a source holds, before it is cut.
enum Material {
    /// One text or several documents, tokenised.
    Documents(Vec<Vec<u32>>),
    /// Samples that somebody else has cut and tokenised.
    Samples(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
struct Line {
    text: Option<String>,
    input_ids: Option<Vec<u32>>,
}

/// Cuts calibration sequences out of a source.
///
/// A plain text is tokenised whole and cut into consecutive windows after a random offset, of which `samples` are drawn.
/// Documents of a `.jsonl` are shuffled and joined first. Samples with `input_ids` are taken in order, truncated to
/// `sequence_length`.
///
/// # Errors
/// See [`CalibrationError`].
pub fn sequences(
    source: &Path,
    checkpoint: &dyn Checkpoint,
    samples: usize,
    sequence_length: usize,
    seed: u64,
) -> Result<TokenBlock, CalibrationError> {
    let too_few = |found: usize| CalibrationError::TooFewTokens {
        path: source.to_owned(),
        found,
        asked: samples.saturating_mul(sequence_length),
        samples,
        sequence_length,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    match read(source, checkpoint)? {
        Material::Samples(lines) => {
            let long: Vec<&Vec<u32>> = lines.iter().filter(|line| line.len() >= sequence_length).collect();
            if long.len() < samples {
                return Err(too_few(long.len() * sequence_length));
            }
            let tokens = long[..samples].iter().flat_map(|line| line[..sequence_length].iter().copied()).collect();
            Ok(TokenBlock::new(sequence_length, tokens))
        }
        Material::Documents(mut documents) => {
            documents.shuffle(&mut rng);
            let stream = documents.concat();
            let windows = stream.len() / sequence_length;
            if windows < samples {
                return Err(too_few(stream.len()));
            }
            let offset = rand::Rng::random_range(&mut rng, 0..=stream.len() - windows * sequence_length);
            let mut chosen: Vec<usize> = (0..windows).collect();
            chosen.shuffle(&mut rng);
            let window = |index: &usize| &stream[offset + index * sequence_length..][..sequence_length];
            Ok(TokenBlock::new(sequence_length, chosen[..samples].iter().flat_map(window).copied().collect()))
        }
    }
}

/// Cuts evaluation windows: the whole text tokenised once, consecutive windows from its start, the tail dropped.
///
/// Source: the evaluation protocol of SparseGPT and Wanda.
///
/// # Errors
/// See [`CalibrationError`].
pub fn windows(
    source: &Path,
    checkpoint: &dyn Checkpoint,
    sequence_length: usize,
    max_windows: Option<usize>,
) -> Result<TokenBlock, CalibrationError> {
    let (Material::Documents(parts) | Material::Samples(parts)) = read(source, checkpoint)?;
    let mut tokens = parts.concat();
    if tokens.len() < sequence_length {
        return Err(CalibrationError::TooFewTokens {
            path: source.to_owned(),
            found: tokens.len(),
            asked: sequence_length,
            samples: 1,
            sequence_length,
        });
    }
    if let Some(max_windows) = max_windows {
        tokens.truncate(max_windows.max(1).saturating_mul(sequence_length));
    }
    Ok(TokenBlock::new(sequence_length, tokens))
}

fn read(source: &Path, checkpoint: &dyn Checkpoint) -> Result<Material, CalibrationError> {
    let bytes =
        std::fs::read(source).map_err(|error| CalibrationError::Io { path: source.to_owned(), source: error })?;
    let text = String::from_utf8(bytes)
        .map_err(|error| CalibrationError::NotUtf8 { path: source.to_owned(), at: error.utf8_error().valid_up_to() })?;
    if text.trim().is_empty() {
        return Err(CalibrationError::Empty { path: source.to_owned() });
    }
    if source.extension().is_some_and(|extension| extension == "jsonl") {
        read_lines(source, &text, checkpoint)
    } else {
        Ok(Material::Documents(vec![tokenise(&tokenizer(checkpoint)?, &text, checkpoint)?]))
    }
}

fn read_lines(source: &Path, text: &str, checkpoint: &dyn Checkpoint) -> Result<Material, CalibrationError> {
    let wrong = |line: usize, reason: String| CalibrationError::Line { path: source.to_owned(), line, reason };
    let mut documents = Vec::new();
    let mut samples = Vec::new();
    let mut reader = None;
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parsed: Line = serde_json::from_str(line).map_err(|error| wrong(index + 1, error.to_string()))?;
        match parsed {
            Line { input_ids: Some(ids), text: None } => samples.push(ids),
            Line { text: Some(document), input_ids: None } => {
                let reader = match &reader {
                    Some(reader) => reader,
                    None => reader.insert(tokenizer(checkpoint)?),
                };
                documents.push(tokenise(reader, &document, checkpoint)?);
            }
            _ => return Err(wrong(index + 1, "needs either `text` or `input_ids`".to_owned())),
        }
    }
    match (documents.is_empty(), samples.is_empty()) {
        (false, false) => Err(wrong(1, "some lines have `text` and some `input_ids`".to_owned())),
        (false, true) => Ok(Material::Documents(documents)),
        (true, _) => Ok(Material::Samples(samples)),
    }
}

fn tokenizer(checkpoint: &dyn Checkpoint) -> Result<Tokenizer, CalibrationError> {
    let files = checkpoint.companion_files()?;
    let (_, bytes) = files
        .into_iter()
        .find(|(name, _)| name == "tokenizer.json")
        .ok_or_else(|| CalibrationError::NoTokenizer { path: checkpoint.path().clone() })?;
    Tokenizer::from_bytes(bytes)
        .map_err(|error| CalibrationError::Tokenizer { path: checkpoint.path().clone(), reason: error.to_string() })
}

fn tokenise(tokenizer: &Tokenizer, text: &str, checkpoint: &dyn Checkpoint) -> Result<Vec<u32>, CalibrationError> {
    tokenizer
        .encode_fast(text, true)
        .map(|encoding| encoding.get_ids().to_vec())
        .map_err(|error| CalibrationError::Tokenizer { path: checkpoint.path().clone(), reason: error.to_string() })
}
