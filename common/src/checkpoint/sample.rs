//! Tells checkpoints apart without reading 140 GB.

use super::{Checkpoint, CheckpointError};
use crate::digest::{Digest, Hasher};

/// Bytes of each tensor that are read: enough to tell two trainings, or two prunings, apart.
const SAMPLED_BYTES: usize = 4096;

/// Digest of a checkpoint's config and of every tensor's name, type, shape and leading bytes.
///
/// # Errors
/// What the checkpoint says.
pub fn sampled_digest(checkpoint: &dyn Checkpoint) -> Result<Digest, CheckpointError> {
    let mut hasher = Hasher::default();
    hasher.update(checkpoint.config().to_string().as_bytes());
    for name in checkpoint.names() {
        let Some(header) = checkpoint.header(name) else { continue };
        hasher.update(format!("\n{name} {:?} {:?}\n", header.dtype, header.shape).as_bytes());
        let row_bytes = header.shape.iter().skip(1).product::<usize>() * header.dtype.bytes();
        let rows = header.shape.first().copied().unwrap_or(1).min(SAMPLED_BYTES.div_ceil(row_bytes.max(1)));
        let sample = checkpoint.read_rows(name, 0..rows)?;
        hasher.update(&sample[..sample.len().min(SAMPLED_BYTES)]);
    }
    Ok(hasher.finish())
}
