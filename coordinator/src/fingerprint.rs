//! What a run was started with: frozen at its creation, compared when it is taken up again.

use espalier_common::build::BUILD;
use espalier_common::checkpoint::{Checkpoint, CheckpointError, sampled_digest};
use espalier_common::digest::Digest;
use espalier_common::job::JobSpec;
use espalier_common::store::{BlobStore, Placed, StoreError};
use serde::{Deserialize, Serialize};

use crate::error::RunError;

/// Everything that could change an output bit, besides the code of the methods (whose versions the journal holds).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The job.
    pub job: JobSpec,
    /// Digest of the model's config and of every tensor's name, type, shape and leading bytes.
    pub model: Digest,
    /// Digest of the calibration tokens.
    pub tokens: Digest,
    /// See [`BUILD`].
    pub build: String,
}

impl Fingerprint {
    /// Takes the fingerprint of a job on a checkpoint.
    ///
    /// # Errors
    /// What the checkpoint says.
    pub fn take(job: &JobSpec, checkpoint: &dyn Checkpoint, tokens: Digest) -> Result<Self, CheckpointError> {
        let model = sampled_digest(checkpoint)?;
        Ok(Self { job: job.clone(), model, tokens, build: BUILD.to_owned() })
    }

    /// What differs in `other`, one line a difference; empty if nothing does.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let (mine, theirs) = (serde_json::to_value(self), serde_json::to_value(other));
        if let (Ok(mine), Ok(theirs)) = (mine, theirs) {
            compare("", &mine, &theirs, &mut lines);
        }
        lines
    }
}

fn compare(path: &str, mine: &serde_json::Value, theirs: &serde_json::Value, lines: &mut Vec<String>) {
    if let (Some(mine), Some(theirs)) = (mine.as_object(), theirs.as_object()) {
        let keys: std::collections::BTreeSet<&String> = mine.keys().chain(theirs.keys()).collect();
        for key in keys {
            let null = serde_json::Value::Null;
            let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            compare(&below, mine.get(key).unwrap_or(&null), theirs.get(key).unwrap_or(&null), lines);
        }
    } else if mine != theirs {
        lines.push(format!("{path}: the run has {mine}, now it is {theirs}"));
    }
}

/// Its name in a run's store.
const NAME: &str = "fingerprint.json";
/// A longer one is not one of ours.
const MAX_BYTES: u64 = 1 << 20;

/// Reads the fingerprint of the run in `store`, if there is one.
///
/// # Errors
/// What the store says; `RunFile` if it is no fingerprint.
pub fn read(store: &dyn BlobStore) -> Result<Option<Fingerprint>, RunError> {
    let bytes = match store.get_at_most(NAME, MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let unreadable = |error: serde_json::Error| RunError::RunFile {
        run: store.url().to_owned(),
        name: NAME,
        reason: error.to_string(),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(unreadable)
}

/// Freezes a fingerprint, unless there is one: then that one counts.
///
/// # Errors
/// What the store says.
pub fn freeze(store: &dyn BlobStore, fingerprint: &Fingerprint) -> Result<Placed, StoreError> {
    let json = serde_json::to_vec_pretty(fingerprint).expect("a fingerprint is plain data");
    store.put_if_absent(NAME, &json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_key() {
        let job: JobSpec = serde_json::from_value(
            serde_json::json!({"model": {"source": "m"}, "calibration": {"source": "c"}, "output": {"uri": "o"}}),
        )
        .unwrap();
        let mine = Fingerprint { job, model: Digest::of(b"m"), tokens: Digest::of(b"t"), build: "1".into() };
        let mut theirs = mine.clone();
        theirs.job.calibration.seed = 7;
        assert_eq!(mine.differences(&theirs), ["job.calibration.seed: the run has 0, now it is 7"]);
        assert!(mine.differences(&mine).is_empty());
    }
}
