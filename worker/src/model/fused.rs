//! Row operations that the tensor library has no single pass for.
//!
//! Each has a vectorised pass for the CPU and a composition of ordinary tensor operations for every other device; tests hold
//! them against each other. Sums run over sixteen lanes in a fixed order and nothing is contracted, so the bits depend neither
//! on the number of threads nor on the width of the machine's vectors.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, InplaceOp1, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use pulp::Arch;

const LANES: usize = 16;

/// x / √(mean(x²) + ε) · w along the last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op2_no_bwd(weight, &RowNorm { epsilon: epsilon as f32 });
    }
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + epsilon)?.sqrt()?)?.broadcast_mul(weight)
}

/// (x − mean) / √(var + ε) · w + b along the last dimension.
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op3_no_bwd(weight, bias, &RowNorm { epsilon: epsilon as f32 });
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + epsilon)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// silu(gate) · up; on the CPU `gate` itself is overwritten.
pub(super) fn silu_times(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.device().is_cpu() {
        gate.inplace_op2(up, &SiluTimes)?;
        return Ok(gate);
    }
    gate.silu()? * up
}

/// Which keys a block of query rows sees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Causal {
    /// Position of the first row's token.
    pub(super) first_token: usize,
    /// Consecutive rows that belong to one token (query heads that share their keys).
    pub(super) rows_per_token: usize,
    /// Position of the first column's key.
    pub(super) first_key: usize,
    /// Number of keys a token sees, itself included; `None`: all up to itself.
    pub(super) window: Option<usize>,
}

impl Causal {
    /// The columns that `row` sees, of `columns`.
    fn visible(&self, row: usize, columns: usize) -> Range<usize> {
        let end = (self.first_token + row / self.rows_per_token + 1).saturating_sub(self.first_key);
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start.min(columns)..end.min(columns)
    }
}

/// softmax(scale · scores) over the keys that each row sees, zero elsewhere; on the CPU `scores` itself is overwritten.
pub(super) fn causal_softmax(scores: Tensor, causal: Causal, scale: f32) -> Result<Tensor> {
    if scores.device().is_cpu() {
        scores.inplace_op1(&CausalSoftmax { causal, scale })?;
        return Ok(scores);
    }
    let (rows, columns) = scores.dims2()?;
    let mut mask = vec![f32::NEG_INFINITY; rows * columns];
    for (row, mask) in mask.chunks_exact_mut(columns).enumerate() {
        mask[causal.visible(row, columns)].fill(0.0);
    }
    let masked = ((&scores * f64::from(scale))? + Tensor::from_vec(mask, (rows, columns), scores.device())?)?;
    candle_nn::ops::softmax_last_dim(&masked)
}

/// ln Σ exp(x), the sum in f64 over blocks that are summed in f32.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = Arch::new()
        .dispatch(|| row.chunks(LANES * LANES).map(|block| f64::from(sum_of(block, |x| exp(x - max)))).sum());
    f64::from(max) + sum.ln()
}

/// eˣ to about one unit in the last place; beyond ±87 it saturates.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; the Taylor series of eʳ to r⁷ errs by 5e-9, and n goes into the exponent bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves n in the low bits of the mantissa
    const LN_2_HIGH: f32 = 0.693_359_4; // its nine bits times n are exact
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    series * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Σ f(x), lane by lane.
#[inline(always)]
fn sum_of(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f(x);
    }
    lanes.iter().sum()
}

#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = lane.max(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = lane.max(x);
    }
    lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The values of a contiguous f32 tensor.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a row operation wants a contiguous tensor, not one of shape {:?}", layout.shape()),
    }
}

fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => bail!("a row operation wants a contiguous f32 tensor of shape {:?}", layout.shape()),
    }
}

/// RMS normalisation with a weight, layer normalisation with a weight and a bias.
struct RowNorm {
    epsilon: f32,
}

impl CustomOp2 for RowNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (values(x, x_l)?, values(w, w_l)?);
        let mut out = Vec::with_capacity(x.len());
        Arch::new().dispatch(|| {
            for row in x.chunks_exact(weight.len()) {
                let mean = sum_of(row, |x| x * x) / row.len() as f32;
                let factor = 1.0 / (mean + self.epsilon).sqrt();
                out.extend(row.iter().zip(weight).map(|(x, w)| x * factor * w));
            }
        });
        Ok((CpuStorage::F32(out), x_l.shape().clone()))
    }
}

impl CustomOp3 for RowNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (values(x, x_l)?, values(w, w_l)?, values(b, b_l)?);
        let mut out = Vec::with_capacity(x.len());
        Arch::new().dispatch(|| {
            for row in x.chunks_exact(weight.len()) {
                let mean = sum_of(row, |x| x) / row.len() as f32;
                let variance = sum_of(row, |x| (x - mean) * (x - mean)) / row.len() as f32;
                let factor = 1.0 / (variance + self.epsilon).sqrt();
                out.extend(row.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * factor * w + b));
            }
        });
        Ok((CpuStorage::F32(out), x_l.shape().clone()))
    }
}

struct SiluTimes;

impl InplaceOp2 for SiluTimes {
    fn name(&self) -> &'static str {
        "silu-times"
    }

    fn cpu_fwd(&self, gate: &mut CpuStorage, gate_l: &Layout, up: &CpuStorage, up_l: &Layout) -> Result<()> {
        let (gate, up) = (values_mut(gate, gate_l)?, values(up, up_l)?);
        Arch::new().dispatch(|| {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + exp(-*gate)) * up;
            }
        });
        Ok(())
    }
}

struct CausalSoftmax {
    causal: Causal,
    scale: f32,
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let columns = layout.shape().dims2()?.1;
        let scores = values_mut(scores, layout)?;
        Arch::new().dispatch(|| {
            for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
                let visible = self.causal.visible(row, columns);
                scores[..visible.start].fill(0.0);
                scores[visible.end..].fill(0.0);
                let scores = &mut scores[visible];
                let max = max_of(scores);
                for score in scores.iter_mut() {
                    *score = exp((*score - max) * self.scale);
                }
                let factor = 1.0 / sum_of(scores, |x| x);
                for score in scores {
                    *score *= factor;
                }
            }
        });
        Ok(())
    }
}
