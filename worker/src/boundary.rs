//! Hidden states at a boundary in the run's store, so that a resumed run begins there and not at the tokens.
//!
//! One blob a sequence and stream, named by content, and a manifest that lists them: memory stays bounded by a few
//! sequences, and streams that share a tensor share its blob.

use candle_core::Tensor;
use espalier_common::checkpoint::{Dtype, cast};
use espalier_common::digest::Digest;
use espalier_common::ids::Boundary;
use espalier_common::report::Artifact;
use serde::{Deserialize, Serialize};

use crate::artifact::{self, ArtifactError};
use crate::calibrate::cache::Entry;
use crate::calibrate::capture::map_batches;
use crate::holdings::HiddenStates;
use crate::source::Workplace;
use crate::transport::Expected;
use crate::unit::TaskError;

/// The blobs of a boundary, by stream and sequence.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    streams: Vec<Vec<Digest>>,
}

fn blob(boundary: Boundary, sha256: Digest) -> String {
    format!("activations/{:05}/{sha256}.f32", boundary.0)
}

/// Stores a boundary's hidden states; they are durable when this returns. The same states get the same name.
///
/// # Errors
/// What the store or the cache says; `Cancelled`.
pub fn store(place: &Workplace<'_>, boundary: Boundary, states: &HiddenStates) -> Result<Artifact, TaskError> {
    let streams: Vec<&[Entry]> = states.streams.iter().map(Vec::as_slice).collect();
    list(place, boundary, put(place, boundary, &streams)?)
}

/// Stores the hidden states of some sequences, stream by stream; returns what they are named by.
///
/// # Errors
/// As [`store`].
pub fn put(place: &Workplace<'_>, boundary: Boundary, streams: &[&[Entry]]) -> Result<Vec<Vec<Digest>>, TaskError> {
    let put = |entry: &Entry| {
        let values = entry.load()?.flatten_all()?.to_vec1::<f32>()?;
        let bytes = cast::bytes_from_f32(Dtype::F32, &values);
        let sha256 = Digest::of(&bytes);
        place.run.store.put(&blob(boundary, sha256), &bytes)?;
        Ok(sha256)
    };
    let stream =
        |entries: &&[Entry]| map_batches(entries.iter().collect(), place.cache.device(), place.control, "keep", put);
    streams.iter().map(stream).collect()
}

/// Makes a boundary of hidden states that are all stored: the digests of each stream's sequences.
///
/// # Errors
/// What the store says.
pub fn list(place: &Workplace<'_>, boundary: Boundary, streams: Vec<Vec<Digest>>) -> Result<Artifact, TaskError> {
    let manifest = Manifest { streams };
    let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
    let sha256 = Digest::of(&bytes);
    let name = format!("activations/{:05}/{sha256}.json", boundary.0);
    place.run.store.put(&name, &bytes)?;
    Ok(Artifact { name, sha256, bytes: bytes.len() as u64 })
}

/// Reads the hidden states of some sequences at a boundary back, if they are the ones that were stored.
///
/// # Errors
/// What the store or the cache says; `Artifact` if the bytes are others, or not of this run's shape; `Cancelled`.
pub fn read(
    place: &Workplace<'_>,
    (boundary, stored): (Boundary, &Artifact),
    expected: Expected,
    sequences: &[usize],
) -> Result<HiddenStates, TaskError> {
    let wrong = |name: &str, reason: String| ArtifactError::Boundary { name: name.to_owned(), reason };
    let manifest: Manifest = serde_json::from_slice(&artifact::read(&*place.run.store, stored)?)
        .map_err(|error| wrong(&stored.name, error.to_string()))?;
    let found: Vec<usize> = manifest.streams.iter().map(Vec::len).collect();
    if found != vec![expected.sequences; expected.streams] {
        let reason = format!("{found:?} sequences by stream, not {} times {}", expected.streams, expected.sequences);
        return Err(wrong(&stored.name, reason).into());
    }
    let bytes = expected.tokens as u64 * expected.hidden as u64 * size_of::<f32>() as u64;
    let get = |sha256: Digest| {
        let name = blob(boundary, sha256);
        // Looked at before anything is allocated for it.
        let size = place.run.store.size(&name)?;
        if size != bytes {
            return Err(wrong(&name, format!("{size} bytes, not {bytes}")).into());
        }
        let read = artifact::read(&*place.run.store, &Artifact { name, sha256, bytes })?;
        let tensor = Tensor::from_vec(
            cast::f32_from_bytes(Dtype::F32, &read),
            (expected.tokens, expected.hidden),
            &place.run.device,
        )?;
        Ok(place.cache.put(tensor)?)
    };
    let stream = |digests: Vec<Digest>| {
        let wanted = sequences.iter().map(|&sequence| digests[sequence]).collect();
        map_batches(wanted, place.cache.device(), place.control, "load", get)
    };
    Ok(HiddenStates { streams: manifest.streams.into_iter().map(stream).collect::<Result<_, _>>()? })
}
