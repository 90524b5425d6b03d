//! Row operations that the tensor library has no single pass for.
//!
//! Each has a vectorised pass for the CPU, and a kernel or a composition of ordinary tensor operations for every other device;
//! tests hold them against each other. Sums run over sixteen lanes in a fixed order and nothing is contracted, so the bits depend neither
//! on the number of threads nor on the width of the machine's vectors.

use std::ops::Range;
use std::slice::ChunksExact;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, D, InplaceOp1, InplaceOp2, Layout, Result, Shape, Tensor, bail,
};
use pulp::Arch;

use crate::device::kernels::{Arg, Call, Launch};

const LANES: usize = 16;

/// x / √(mean(x²) + ε) · w along the last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.contiguous()?.apply_op2_no_bwd(weight, &RowNorm { epsilon: epsilon as f32 })
    } else {
        rms_norm_composed(x, weight, epsilon)
    }
}

fn rms_norm_composed(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + epsilon)?.sqrt()?)?.broadcast_mul(weight)
}

/// (x − mean) / √(var + ε) · w + b along the last dimension.
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.contiguous()?.apply_op3_no_bwd(weight, bias, &RowNorm { epsilon: epsilon as f32 })
    } else {
        layer_norm_composed(x, weight, bias, epsilon)
    }
}

fn layer_norm_composed(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    rms_norm_composed(&centred, weight, epsilon)?.broadcast_add(bias)
}

/// silu(gate) · up; on the CPU the storage of `gate` is overwritten.
pub(super) fn silu_times(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.device().is_cpu() {
        gate.inplace_op2(up, &SiluTimes)?;
        Ok(gate)
    } else {
        gate.silu()? * up
    }
}

/// x + y; on the CPU the storage of `x` is overwritten.
pub(super) fn add_to(x: Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && x.is_contiguous() {
        x.inplace_op2(&y.contiguous()?, &AddTo)?;
        Ok(x)
    } else {
        x + y
    }
}

/// Which keys a block of query rows sees.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Causal {
    /// Position of the first row's token.
    pub(crate) first_token: usize,
    /// Consecutive rows that belong to one token (query heads that share their keys).
    pub(crate) rows_per_token: usize,
    /// Position of the first column's key.
    pub(crate) first_key: usize,
    /// Number of keys a token sees, itself included; `None`: all up to itself.
    pub(crate) window: Option<usize>,
}

impl Causal {
    /// The columns that `row` sees, of `columns`.
    fn visible(&self, row: usize, columns: usize) -> Range<usize> {
        let end = (self.first_token + row / self.rows_per_token + 1).saturating_sub(self.first_key);
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start.min(columns)..end.min(columns)
    }
}

/// softmax(scale · scores) over the keys that each row sees, zero elsewhere; the storage of `scores` is overwritten.
pub(super) fn causal_softmax(scores: Tensor, causal: Causal, scale: f32) -> Result<Tensor> {
    scores.inplace_op1(&CausalSoftmax { causal, scale })?;
    Ok(scores)
}

/// What [`causal_softmax`] does, on rows of `columns` scores.
pub(crate) fn causal_softmax_rows(scores: &mut [f32], columns: usize, causal: Causal, scale: f32) {
    Arch::new().dispatch(|| {
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            let visible = causal.visible(row, columns);
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let scores = &mut scores[visible];
            let max = max_of(scores);
            for score in scores.iter_mut() {
                *score = exp((*score - max) * scale);
            }
            let factor = 1.0 / sum_of(scores, |x| x);
            for score in scores {
                *score *= factor;
            }
        }
    });
}

#[cfg(test)]
fn causal_softmax_composed(scores: &Tensor, causal: Causal, scale: f32) -> Result<Tensor> {
    let (rows, columns) = scores.dims2()?;
    let mut mask = vec![f32::NEG_INFINITY; rows * columns];
    for (row, mask) in mask.chunks_exact_mut(columns).enumerate() {
        mask[causal.visible(row, columns)].fill(0.0);
    }
    let mask = Tensor::from_vec(mask, (rows, columns), scores.device())?;
    candle_nn::ops::softmax_last_dim(&((scores * f64::from(scale))? + mask)?)
}

/// ln Σ exp(x), the sum in f64 over blocks that are summed in f32.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    Arch::new().dispatch(|| {
        let max = max_of(row);
        let sum: f64 = row.chunks(LANES * LANES).map(|block| f64::from(sum_of(block, |x| exp(x - max)))).sum();
        f64::from(max) + sum.ln()
    })
}

/// eˣ to about one unit in the last place; beyond ±87 it saturates.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; the Taylor series of eʳ to r⁷ errs by 5e-9, and n goes into the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
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
pub(crate) fn sum_of(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
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

/// The rows of a tensor whose last dimension must be `width`.
fn rows<'a>(x: &'a CpuStorage, layout: &Layout, width: usize) -> Result<ChunksExact<'a, f32>> {
    match layout.dims().last() {
        Some(&last) if last == width && width > 0 => Ok(values(x, layout)?.chunks_exact(width)),
        _ => bail!("rows of {width} were expected, not a tensor of shape {:?}", layout.shape()),
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
        let weight = values(w, w_l)?;
        let rows = rows(x, x_l, weight.len())?;
        let mut out = Vec::with_capacity(x_l.shape().elem_count());
        Arch::new().dispatch(|| {
            for row in rows {
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
        let (weight, bias) = (values(w, w_l)?, values(b, b_l)?);
        let rows = rows(x, x_l, weight.len())?;
        let mut out = Vec::with_capacity(x_l.shape().elem_count());
        Arch::new().dispatch(|| {
            for row in rows {
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

struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add-to"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, y: &CpuStorage, y_l: &Layout) -> Result<()> {
        let (x, y) = (values_mut(x, x_l)?, values(y, y_l)?);
        if x_l.shape() != y_l.shape() {
            bail!("shapes {:?} and {:?} were to be added", x_l.shape(), y_l.shape());
        }
        Arch::new().dispatch(|| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
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
        causal_softmax_rows(values_mut(scores, layout)?, columns, self.causal, self.scale);
        Ok(())
    }

    fn cuda_fwd(&self, scores: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.call(scores, layout)?.run()
    }
}

impl CausalSoftmax {
    fn call<'a, S>(&self, scores: &'a mut S, layout: &'a Layout) -> Result<Call<'a, S>> {
        let (rows, columns) = layout.shape().dims2()?;
        let Causal { first_token, rows_per_token, first_key, window } = self.causal;
        Ok(Call {
            launch: Launch::rows("causal_softmax", rows),
            args: vec![
                Arg::Write(scores, layout),
                Arg::Count(rows),
                Arg::Count(columns),
                Arg::Count(first_token),
                Arg::Count(rows_per_token),
                Arg::Count(first_key),
                // A token sees itself at least.
                Arg::Count(window.unwrap_or(0)),
                Arg::Number(self.scale),
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::linalg::ops::host;

    fn noise(rows: usize, columns: usize) -> Tensor {
        let value = |i: usize| ((i as f32 * 12.9898).sin() * 43_758.547).fract() * 6.0 - 0.5;
        Tensor::from_vec((0..rows * columns).map(value).collect(), (rows, columns), &Device::Cpu).unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        let distance = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(distance < 5e-6, "{distance:e}");
    }

    #[test]
    fn exp_errs_by_at_most_two_units_in_the_last_place() {
        for step in -87_000..87_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) errs by {error:e}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37 && exp(1e30).is_finite());
    }

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        let row = noise(1, 1000).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let exact = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&row) - exact).abs() < 1e-6);
    }

    #[test]
    fn passes_agree_with_their_compositions() {
        let (x, up) = (noise(7, 45), noise(7, 45).affine(-1.0, 1.0).unwrap());
        let (weight, bias) = (noise(1, 45).get(0).unwrap(), noise(2, 45).get(1).unwrap());
        assert_close(&rms_norm(&x, &weight, 1e-5).unwrap(), &rms_norm_composed(&x, &weight, 1e-5).unwrap());
        assert_close(
            &layer_norm(&x, &weight, &bias, 1e-5).unwrap(),
            &layer_norm_composed(&x, &weight, &bias, 1e-5).unwrap(),
        );
        assert_close(&add_to(x.copy().unwrap(), &up).unwrap(), &(&x + &up).unwrap());
        assert_close(&silu_times(x.copy().unwrap(), &up).unwrap(), &(x.silu().unwrap() * &up).unwrap());
    }

    #[test]
    fn softmax_sees_the_past_and_the_window_only() {
        let causal = Causal { first_token: 30, rows_per_token: 3, first_key: 5, window: Some(20) };
        let scores = noise(12, 29);
        let composed = causal_softmax_composed(&scores, causal, 0.3).unwrap();
        let fused = causal_softmax(scores, causal, 0.3).unwrap();
        assert_close(&fused, &composed);
        let first = fused.get(0).unwrap().to_vec1::<f32>().unwrap();
        assert!(first[..6].iter().chain(&first[26..]).all(|&weight| weight == 0.0));
        assert!(first[6..26].iter().all(|&weight| weight > 0.0));
    }

    #[test]
    fn the_kernel_does_what_the_pass_does() {
        for causal in [
            Causal { first_token: 30, rows_per_token: 3, first_key: 5, window: Some(20) },
            Causal { first_token: 0, rows_per_token: 1, first_key: 0, window: None },
            Causal { first_token: 500, rows_per_token: 2, first_key: 100, window: None },
        ] {
            let op = CausalSoftmax { causal, scale: 0.3 };
            let layout = Layout::contiguous((12, 700));
            let scores = noise(12, 700).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut expected = CpuStorage::F32(scores.clone());
            op.cpu_fwd(&mut expected, &layout).unwrap();
            let mut found = CpuStorage::F32(scores);
            if host::run(op.call(&mut found, &layout).unwrap()) {
                let (found, expected) = (found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
                // Two exponentials and two sums, each right to a few units in the last place.
                let close = |(x, y): (&f32, &f32)| (x - y).abs() <= 8.0 * f32::EPSILON * y.abs();
                assert!(found.iter().zip(expected).all(close), "{causal:?}");
            }
        }
    }

    #[test]
    fn rows_of_another_width_are_refused() {
        let weight = Tensor::ones(44, DType::F32, &Device::Cpu).unwrap();
        assert!(rms_norm(&noise(4, 88), &weight, 1e-5).is_err());
    }
}
