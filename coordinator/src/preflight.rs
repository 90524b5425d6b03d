//! What is refused before any work is done: places that would get into each other's way, models that could not be written again.

use std::collections::BTreeSet;
use std::path::Path;

use espalier_common::checkpoint::cast::f32_from_bytes;
use espalier_common::checkpoint::{Checkpoint, CheckpointError, Target};
use espalier_common::outline::ModelOutline;
use espalier_common::store::BlobStore;

use crate::error::RunError;

/// Read at a time when a tensor is looked through.
const CHUNK_BYTES: usize = 16 << 20;

/// What a config says of quantised weights, and would go on saying of pruned ones.
const QUANTISATION: &str = "quantization_config";

/// Checks where the output and the run are to be: the output is new or empty and no link, and holds no run.
///
/// # Errors
/// `RunInOutput`, or what [`Target::check`] says.
pub(crate) fn check_places(output: &Target, run: &dyn BlobStore) -> Result<(), RunError> {
    let (output_url, run_url) = match (output, run.directory()) {
        (Target::Folder(folder), Some(run)) => {
            let absolute = |path: &Path| std::path::absolute(path).map_err(|error| RunError::folder(path, error));
            // A whole folder is put in its place in one step, which would replace the link and not what it points to.
            if folder.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
                return Err(CheckpointError::OutputExists { path: folder.clone() }.into());
            }
            (absolute(folder)?, absolute(run)?)
        }
        (Target::Bucket(bucket), None) => (bucket.url().into(), run.url().into()),
        _ => return Ok(output.check()?),
    };
    if run_url.starts_with(&output_url) {
        return Err(RunError::RunInOutput { run: run_url, output: output_url });
    }
    Ok(output.check()?)
}

/// Checks that a checkpoint made from this one would hold all of it, as plain floats.
///
/// # Errors
/// `UnsupportedDtype` for a tensor of integers, `InvalidKey` for a quantised model.
pub(crate) fn check_source(dense: &dyn Checkpoint) -> Result<(), CheckpointError> {
    // Reading it says what it holds instead of floats.
    dense.other_names().first().map_or(Ok(()), |name| dense.read(name).map(drop))?;
    if dense.config().get(QUANTISATION).is_some_and(|value| !value.is_null()) {
        return Err(CheckpointError::InvalidKey {
            path: dense.path().join("config.json"),
            key: QUANTISATION.to_owned(),
            problem: "says that the model is quantised: pruning takes it in floats",
        });
    }
    Ok(())
}

/// Checks that what goes into the output as it is (embeddings, norms, head, biases) holds no NaN and no infinity. Workers
/// check the weights that they prune.
///
/// # Errors
/// `InvalidTensor`, or what the file system says.
pub(crate) fn check_untouched(dense: &dyn Checkpoint, outline: &ModelOutline) -> Result<(), CheckpointError> {
    let sublayers: BTreeSet<&str> =
        outline.layers.iter().flat_map(|layer| layer.sublayers()).map(|sublayer| sublayer.tensor.as_str()).collect();
    dense.names().into_iter().filter(|name| !sublayers.contains(name)).try_for_each(|name| check_finite(dense, name))
}

fn check_finite(dense: &dyn Checkpoint, name: &str) -> Result<(), CheckpointError> {
    let Some(header) = dense.header(name) else { return Ok(()) };
    let check = |bytes: Vec<u8>| {
        // No early exit: a pass without branches is the faster one.
        let finite = f32_from_bytes(header.dtype, &bytes).iter().fold(true, |finite, value| finite & value.is_finite());
        if finite {
            return Ok(());
        }
        Err(CheckpointError::InvalidTensor {
            path: dense.file_of(name).to_owned(),
            tensor: name.to_owned(),
            problem: "holds NaN or infinity",
        })
    };
    match header.shape.split_first() {
        Some((&rows, inner)) if rows > 0 && !inner.is_empty() => {
            let row_bytes = (header.bytes() / rows).max(1);
            let step = (CHUNK_BYTES / row_bytes).max(1);
            (0..rows).step_by(step).try_for_each(|first| check(dense.read_rows(name, first..(first + step).min(rows))?))
        }
        _ => check(dense.read(name)?),
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::store::LocalStore;

    use super::*;

    #[test]
    fn a_run_inside_its_output_and_an_output_that_is_a_link_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let output = Target::Folder(folder.path().join("out"));
        let check =
            |output: &Target, run: &str| check_places(output, &LocalStore::open(&folder.path().join(run)).unwrap());
        check(&output, "out.run").unwrap();
        for run in ["out", "out/run"] {
            let error = check(&output, run).unwrap_err();
            assert!(matches!(error, RunError::RunInOutput { .. }), "{run}: {error}");
        }
        let target = folder.path().join("empty");
        std::fs::create_dir(&target).unwrap();
        check(&Target::Folder(target.clone()), "run").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let error = check(&Target::Folder(link), "run").unwrap_err();
        assert!(matches!(error, RunError::Checkpoint(CheckpointError::OutputExists { .. })), "{error}");
    }
}
