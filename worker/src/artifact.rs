//! A layer's pruned tensors as one blob of the run's store: a safetensors file, named by layer and content.

use espalier_common::checkpoint::Dtype;
use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::ids::LayerIndex;
use espalier_common::report::Artifact;
use espalier_common::store::{BlobStore, StoreError};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// Why an artifact cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// See the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The bytes are not the ones that were committed.
    #[error("{name} has digest {found}, but {expected} was committed")]
    Digest {
        /// The blob.
        name: String,
        /// Digest of its bytes.
        found: Digest,
        /// Digest it must have.
        expected: Digest,
    },
    /// Not safetensors, or not of a layer.
    #[error("{name}")]
    Format {
        /// The blob.
        name: String,
        /// What is wrong with it.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor is not as the layer has it.
    #[error("{name}: {tensor} is {found}, but must be {expected}")]
    Tensor {
        /// The blob.
        name: String,
        /// The tensor.
        tensor: String,
        /// Type and shape found.
        found: String,
        /// Type and shape expected.
        expected: String,
    },
    /// Hidden states that are not of this run's shape.
    #[error("{name}: {reason}")]
    Boundary {
        /// The blob.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ArtifactError {
    /// What may be done about it. Bytes that changed under their name are for another worker's eyes, then for people's.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Store(error) => error.class(),
            Self::Digest { .. } | Self::Boundary { .. } => FaultClass::RetryElsewhere,
            Self::Format { .. } | Self::Tensor { .. } => FaultClass::Bug,
        }
    }
}

/// One pruned tensor as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// The checkpoint's tensor name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// `[out, in]`, or `[out]` for a bias.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub bytes: Vec<u8>,
}

/// Writes the pruned tensors of a layer; they are durable when this returns. The same tensors get the same name.
///
/// # Errors
/// `Store`, `Format`.
pub fn write_layer<'a>(
    store: &dyn BlobStore,
    layer: LayerIndex,
    tensors: impl IntoIterator<Item = &'a StoredTensor>,
) -> Result<Artifact, ArtifactError> {
    let format = |source| ArtifactError::Format { name: format!("layers/{:05}", layer.0), source };
    let views = tensors
        .into_iter()
        .map(|tensor| {
            let view = TensorView::new(spelled(tensor.dtype), tensor.shape.clone(), &tensor.bytes)?;
            Ok((tensor.name.as_str(), view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(format)?;
    let bytes = safetensors::serialize(views, None).map_err(format)?;
    let sha256 = Digest::of(&bytes);
    let name = format!("layers/{:05}-{sha256}.safetensors", layer.0);
    store.put(&name, &bytes)?;
    Ok(Artifact { name, sha256, bytes: bytes.len() as u64 })
}

/// Reads an artifact's bytes, and believes them only if they are the ones that were committed.
///
/// # Errors
/// `Store`, `Digest`.
pub fn read(store: &dyn BlobStore, artifact: &Artifact) -> Result<bytes::Bytes, ArtifactError> {
    let bytes = store.get(&artifact.name)?;
    let found = Digest::of(&bytes);
    if found != artifact.sha256 {
        return Err(ArtifactError::Digest { name: artifact.name.clone(), found, expected: artifact.sha256 });
    }
    Ok(bytes)
}

/// Reads the tensors `expected` (name, type, shape) of a layer, in that order.
///
/// # Errors
/// `Store`, `Digest`, `Format`, `Tensor`.
pub fn read_layer(
    store: &dyn BlobStore,
    artifact: &Artifact,
    expected: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
) -> Result<Vec<StoredTensor>, ArtifactError> {
    let bytes = read(store, artifact)?;
    let format = |source| ArtifactError::Format { name: artifact.name.clone(), source };
    let file = SafeTensors::deserialize(&bytes).map_err(format)?;
    let tensor = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
        let view = file.tensor(&name).map_err(format)?;
        if view.dtype() != spelled(dtype) || view.shape() != shape {
            return Err(ArtifactError::Tensor {
                name: artifact.name.clone(),
                found: format!("{} {:?}", view.dtype(), view.shape()),
                expected: format!("{} {shape:?}", spelled(dtype)),
                tensor: name,
            });
        }
        Ok(StoredTensor { bytes: view.data().to_vec(), name, dtype, shape })
    };
    expected.into_iter().map(tensor).collect()
}

fn spelled(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::store::MemoryStore;

    use super::*;

    fn tensors() -> Vec<StoredTensor> {
        let tensor = |name: &str, dtype: Dtype| {
            let bytes = (0..6 * dtype.bytes()).map(|byte| byte as u8).collect();
            StoredTensor { name: name.to_owned(), dtype, shape: vec![2, 3], bytes }
        };
        vec![tensor("layer.q", Dtype::Bf16), tensor("layer.k", Dtype::F32)]
    }

    fn expected() -> Vec<(String, Dtype, Vec<usize>)> {
        tensors().into_iter().map(|tensor| (tensor.name, tensor.dtype, tensor.shape)).collect()
    }

    #[test]
    fn tensors_come_back_and_the_name_tells_the_content() {
        let store = MemoryStore::default();
        let artifact = write_layer(&store, LayerIndex(3), &tensors()).unwrap();
        assert_eq!(artifact.name, format!("layers/00003-{}.safetensors", artifact.sha256));
        assert_eq!(write_layer(&store, LayerIndex(3), &tensors()).unwrap(), artifact);
        assert_eq!(read_layer(&store, &artifact, expected()).unwrap(), tensors());
    }

    #[test]
    fn changed_bytes_and_other_tensors_are_refused() {
        let store = MemoryStore::default();
        let artifact = write_layer(&store, LayerIndex(0), &tensors()).unwrap();
        let mut other = expected();
        other[0].2 = vec![3, 2];
        assert!(matches!(read_layer(&store, &artifact, other), Err(ArtifactError::Tensor { .. })));
        let mut bytes = store.get(&artifact.name).unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        store.put(&artifact.name, &bytes).unwrap();
        assert!(matches!(read_layer(&store, &artifact, expected()), Err(ArtifactError::Digest { .. })));
    }
}
