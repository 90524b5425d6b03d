//! Rotary positions.
//!
//! Source: Su et al., "RoFormer" (2021). Channel i of a head is paired with channel i + head_dim/2, as in Hugging Face
//! checkpoints.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};

use super::ModelError;
use super::config::Config;
use super::fused::values;

/// How frequencies are stretched to contexts longer than those of the training.
#[derive(Debug, Clone, PartialEq)]
enum Scaling {
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// A larger base once a sequence is longer than `positions`.
    Dynamic {
        factor: f64,
        positions: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a linear blend between them.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
}

/// The frequencies of a model, and the table of the sequence length that was asked for last.
#[derive(Debug)]
pub(super) struct Rope {
    head_dim: usize,
    theta: f64,
    scaling: Scaling,
    device: Device,
    latest: Mutex<Option<Arc<RopeTable>>>,
}

/// Cosines and sines `[tokens, head_dim / 2]`.
#[derive(Debug)]
pub(super) struct RopeTable {
    tokens: usize,
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Reads `rope_parameters`, or `rope_theta` with `rope_scaling` in configs older than that key.
    pub(super) fn from_config(
        config: &Config<'_>,
        head_dim: usize,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        if !head_dim.is_multiple_of(2) {
            return Err(config.refuse("head_dim", format!("{head_dim} is odd, but rotary positions turn pairs")));
        }
        let nested = match config.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_scaling")?,
        };
        let theta = match nested.map(|nested| nested.positive_if_any("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => config.positive_if_any("rope_theta")?.unwrap_or(10_000.0),
        };
        let scaling = nested.map_or(Ok(Scaling::Default), |nested| Scaling::from_config(config, &nested))?;
        Ok(Self { head_dim, theta, scaling, device: device.clone(), latest: Mutex::new(None) })
    }

    /// The table for a sequence of `tokens`.
    pub(super) fn table(&self, tokens: usize) -> Result<Arc<RopeTable>> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = latest.as_ref().filter(|table| table.tokens == tokens) {
            return Ok(table.clone());
        }
        let frequencies = self.frequencies(tokens);
        // Angles are formed in f32 from f32 frequencies because that is what the models were trained with.
        let angles: Vec<f32> = (0..tokens)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let shape = (tokens, frequencies.len());
        let cos = angles.iter().map(|&angle| f64::from(angle).cos() as f32).collect();
        let sin = angles.iter().map(|&angle| f64::from(angle).sin() as f32).collect();
        let table = Arc::new(RopeTable {
            tokens,
            cos: Tensor::from_vec(cos, shape, &self.device)?,
            sin: Tensor::from_vec(sin, shape, &self.device)?,
        });
        *latest = Some(table.clone());
        Ok(table)
    }

    /// Cosines and sines `[tokens, head_dim / 2]`, row-major.
    pub(super) fn angles(&self, tokens: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let table = self.table(tokens)?;
        Ok((table.cos.flatten_all()?.to_vec1()?, table.sin.flatten_all()?.to_vec1()?))
    }

    /// Radians per position of each pair of channels.
    fn frequencies(&self, tokens: usize) -> Vec<f32> {
        let dim = self.head_dim as f64;
        let theta = match self.scaling {
            Scaling::Dynamic { factor, positions } if dim > 2.0 => {
                let length = positions.max(tokens as f64);
                self.theta * (factor * length / positions - (factor - 1.0)).powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let frequency = |pair: usize| theta.powf(-2.0 * pair as f64 / dim);
        (0..self.head_dim / 2).map(|pair| self.scaling.stretch(frequency(pair)) as f32).collect()
    }
}

impl Scaling {
    fn from_config(config: &Config<'_>, nested: &Config<'_>) -> std::result::Result<Self, ModelError> {
        if nested.positive_if_any("partial_rotary_factor")?.is_some_and(|share| share < 1.0) {
            return Err(nested.refuse("partial_rotary_factor", "only heads that rotate as a whole can be run"));
        }
        let kind = match nested.text("rope_type")? {
            Some(kind) => kind,
            None => nested.text("type")?.unwrap_or("default"),
        };
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: nested.positive("factor")? }),
            "dynamic" => Ok(Self::Dynamic {
                factor: nested.positive("factor")?,
                positions: config.dimension("max_position_embeddings")? as f64,
            }),
            "llama3" => {
                let (low, high) = (nested.positive("low_freq_factor")?, nested.positive("high_freq_factor")?);
                if high <= low {
                    return Err(
                        nested.refuse("high_freq_factor", format!("{high} is not above low_freq_factor = {low}"))
                    );
                }
                let original = match nested.dimension_if_any("original_max_position_embeddings")? {
                    Some(original) => original,
                    None => config.dimension("max_position_embeddings")?,
                };
                Ok(Self::Llama3 { factor: nested.positive("factor")?, low, high, original: original as f64 })
            }
            other => Err(nested.refuse("rope_type", format!("{other} is not one of default, linear, dynamic, llama3"))),
        }
    }

    fn stretch(&self, frequency: f64) -> f64 {
        match *self {
            Self::Default | Self::Dynamic { .. } => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

/// Brings `x` `[tokens, groups · r · head_dim]` into the order of attention, `[groups, tokens · r, head_dim]`, turning every
/// head by its token's angles on the way if there is a table.
pub(super) fn by_group(x: &Tensor, groups: usize, head_dim: usize, table: Option<&RopeTable>) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let heads = width / head_dim / groups;
    let Some(table) = table else {
        let x = x.reshape((tokens, groups, heads * head_dim))?.transpose(0, 1)?;
        // One head per group needs no copy on the CPU, whose products take strides; those of a GPU do not.
        return if heads == 1 && x.device().is_cpu() {
            Ok(x)
        } else {
            x.contiguous()?.reshape((groups, tokens * heads, head_dim))
        };
    };
    if x.device().is_cpu() {
        return x.apply_op3_no_bwd(&table.cos, &table.sin, &RotateByGroup { groups, head_dim });
    }
    rotate_composed(x, groups, head_dim, table)
}

/// What [`RotateByGroup`] does, of ordinary operations.
fn rotate_composed(x: &Tensor, groups: usize, head_dim: usize, table: &RopeTable) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let (heads, half) = (width / head_dim, head_dim / 2);
    let x = x.reshape((tokens, heads, head_dim))?;
    let (left, right) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (table.cos.unsqueeze(1)?, table.sin.unsqueeze(1)?);
    let turned_left = (left.broadcast_mul(&cos)? - right.broadcast_mul(&sin)?)?;
    let turned_right = (right.broadcast_mul(&cos)? + left.broadcast_mul(&sin)?)?;
    let turned = Tensor::cat(&[turned_left, turned_right], 2)?;
    let turned = turned.reshape((tokens, groups, width / groups))?.transpose(0, 1)?.contiguous()?;
    turned.reshape((groups, tokens * heads / groups, head_dim))
}

struct RotateByGroup {
    groups: usize,
    head_dim: usize,
}

impl CustomOp3 for RotateByGroup {
    fn name(&self) -> &'static str {
        "rotate-by-group"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        cos: &CpuStorage,
        cos_l: &Layout,
        sin: &CpuStorage,
        sin_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = x_l.shape().dims2()?;
        let (x, cos, sin) = (values(x, x_l)?, values(cos, cos_l)?, values(sin, sin_l)?);
        let half = self.head_dim / 2;
        let mut out = Vec::with_capacity(x.len());
        for group in 0..self.groups {
            for token in 0..tokens {
                let start = token * width + group * (width / self.groups);
                let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                for head in x[start..start + width / self.groups].chunks_exact(self.head_dim) {
                    let (left, right) = head.split_at(half);
                    let pairs = left.iter().zip(right).zip(cos.iter().zip(sin));
                    out.extend(pairs.clone().map(|((l, r), (c, s))| l * c - r * s));
                    out.extend(pairs.map(|((l, r), (c, s))| r * c + l * s));
                }
            }
        }
        let rows = tokens * (width / self.groups / self.head_dim);
        Ok((CpuStorage::F32(out), (self.groups, rows, self.head_dim).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pass_agrees_with_its_composition() {
        let values = serde_json::json!({ "rope_theta": 100.0 });
        let rope = Rope::from_config(&Config::new("config", &values), 6, &Device::Cpu).unwrap();
        let table = rope.table(5).unwrap();
        let x = Tensor::arange(0f32, 120.0, &Device::Cpu).unwrap().reshape((5, 24)).unwrap();
        let fused = by_group(&x, 2, 6, Some(&table)).unwrap();
        let composed = rotate_composed(&x, 2, 6, &table).unwrap();
        assert_eq!(fused.dims(), [2, 10, 6]);
        assert_eq!(fused.dims(), composed.dims());
        let distance = (fused - composed).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(distance < 2e-5);
    }

    #[test]
    fn both_spellings_of_a_config_give_the_same_frequencies() {
        let older = serde_json::json!({ "rope_theta": 500.0, "rope_scaling": { "type": "linear", "factor": 2.0 } });
        let newer =
            serde_json::json!({ "rope_parameters": { "rope_theta": 500.0, "rope_type": "linear", "factor": 2.0 } });
        let frequencies =
            |values| Rope::from_config(&Config::new("config", values), 8, &Device::Cpu).unwrap().frequencies(10);
        assert_eq!(frequencies(&older), frequencies(&newer));
        assert_eq!(frequencies(&older)[0].to_bits(), 0.5f32.to_bits());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_key() {
        for (values, key) in [
            (serde_json::json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } }), "rope_type"),
            (serde_json::json!({ "rope_scaling": { "rope_type": "linear" } }), "factor"),
            (serde_json::json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }), "partial_rotary_factor"),
            (serde_json::json!({ "rope_parameters": [1] }), "rope_parameters"),
            (serde_json::json!({ "rope_theta": 0 }), "rope_theta"),
        ] {
            let refusal = Rope::from_config(&Config::new("config", &values), 8, &Device::Cpu).unwrap_err();
            assert!(refusal.to_string().contains(key), "{refusal}");
        }
    }
}
