//! From a checkpoint's bytes to f32 tensors on the device, each checked against the shape that the config asks for.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::cast::f32_from_bytes;
use espalier_common::checkpoint::{Checkpoint, CheckpointError, Dtype, TensorHeader};
use espalier_common::outline::{LayerOutline, SublayerOutline};

use super::ModelError;
use super::blocks::Linear;

/// What the config says of one linear map: `y = x·Wᵀ (+ b)`.
#[derive(Debug, Clone)]
pub(super) struct LinearSpec {
    /// Name without `.weight` and `.bias`.
    pub(super) name: String,
    /// Output rows.
    pub(super) rows: usize,
    /// Input columns.
    pub(super) columns: usize,
    /// Whether it has a bias.
    pub(super) bias: bool,
}

impl LinearSpec {
    pub(super) fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    pub(super) fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }
}

/// A name and a shape that a checkpoint must have.
pub(super) type Expected = (String, Vec<usize>);

/// A checkpoint and the device that its tensors go to.
#[derive(Clone)]
pub(super) struct Loader {
    checkpoint: Arc<dyn Checkpoint>,
    device: Device,
}

impl Loader {
    pub(super) fn new(checkpoint: Arc<dyn Checkpoint>, device: &Device) -> Self {
        Self { checkpoint, device: device.clone() }
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    fn file_of(&self, name: &str) -> String {
        self.checkpoint.file_of(name).display().to_string()
    }

    /// The header of a tensor that must have this shape.
    pub(super) fn expect(&self, name: &str, shape: &[usize]) -> Result<&TensorHeader, ModelError> {
        let Some(header) = self.checkpoint.header(name) else {
            // Reading it says why it cannot be read: it is missing, or holds no floats.
            let missing =
                || CheckpointError::MissingTensor { path: self.checkpoint.path().clone(), tensor: name.to_owned() };
            return Err(self.checkpoint.read(name).err().unwrap_or_else(missing).into());
        };
        if header.shape != shape {
            return Err(ModelError::Shape {
                path: self.file_of(name),
                tensor: name.to_owned(),
                found: header.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(header)
    }

    /// Reads one tensor as f32, refusing NaN and infinity.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let header = self.expect(name, shape)?;
        let values = self.decode(name, header.dtype, &self.checkpoint.read(name)?)?;
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    /// Reads rows `rows` of a matrix `[_, columns]` as f32.
    pub(super) fn rows(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: std::ops::Range<usize>,
    ) -> Result<Tensor, ModelError> {
        let dtype = self.expect(name, &shape)?.dtype;
        let values = self.decode(name, dtype, &self.checkpoint.read_rows(name, rows.clone())?)?;
        Ok(Tensor::from_vec(values, (rows.len(), shape[1]), &self.device)?)
    }

    /// The rows of an embedding that `tokens` name, `[tokens, width]`; every row is read once.
    pub(super) fn embedding(&self, name: &str, shape: [usize; 2], tokens: &[u32]) -> Result<Tensor, ModelError> {
        let [vocabulary, width] = shape;
        let dtype = self.expect(name, &shape)?.dtype;
        let mut rows = BTreeMap::new();
        for &token in tokens {
            let row = token as usize;
            if row >= vocabulary {
                return Err(ModelError::TokenOutOfRange { token, vocabulary });
            }
            if let Entry::Vacant(entry) = rows.entry(token) {
                entry.insert(self.decode(name, dtype, &self.checkpoint.read_rows(name, row..row + 1)?)?);
            }
        }
        let mut values = Vec::with_capacity(tokens.len() * width);
        for token in tokens {
            values.extend_from_slice(&rows[token]);
        }
        Ok(Tensor::from_vec(values, (tokens.len(), width), &self.device)?)
    }

    pub(super) fn linear(&self, spec: &LinearSpec) -> Result<Linear, ModelError> {
        let weight = self.tensor(&spec.weight_name(), &[spec.rows, spec.columns])?;
        let bias = if spec.bias { Some(self.tensor(&spec.bias_name(), &[spec.rows])?) } else { None };
        Ok(Linear::new(weight, bias)?)
    }

    /// Loads all linear maps of a layer, group by group.
    pub(super) fn linears(&self, groups: &[Vec<LinearSpec>]) -> Result<Vec<Vec<Linear>>, ModelError> {
        groups.iter().map(|group| group.iter().map(|spec| self.linear(spec)).collect()).collect()
    }

    /// Describes a layer whose linear maps are `groups` and whose other tensors are `others`, checking every header.
    pub(super) fn outline(&self, groups: &[Vec<LinearSpec>], others: &[Expected]) -> Result<LayerOutline, ModelError> {
        let mut bytes = 0;
        let mut outlines = Vec::with_capacity(groups.len());
        for group in groups {
            let mut members = Vec::with_capacity(group.len());
            for spec in group {
                let header = self.expect(&spec.weight_name(), &[spec.rows, spec.columns])?;
                bytes += header.bytes() as u64;
                members.push(SublayerOutline {
                    tensor: spec.weight_name(),
                    rows: spec.rows,
                    columns: spec.columns,
                    dtype: spelling(header.dtype).to_owned(),
                });
                if spec.bias {
                    bytes += self.expect(&spec.bias_name(), &[spec.rows])?.bytes() as u64;
                }
            }
            outlines.push(members);
        }
        for (name, shape) in others {
            bytes += self.expect(name, shape)?.bytes() as u64;
        }
        Ok(LayerOutline { groups: outlines, bytes })
    }

    fn decode(&self, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, ModelError> {
        let values = f32_from_bytes(dtype, bytes);
        // No early exit: a pass without branches is the faster one.
        if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
            Ok(values)
        } else {
            Err(ModelError::NotFinite { path: self.file_of(name), tensor: name.to_owned() })
        }
    }
}

fn spelling(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}
