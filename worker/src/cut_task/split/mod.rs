//! Updating what stays of a feed-forward pair in turn: its up projection, then its consumer.
//!
//! The half is split at its hidden states: `min ½‖V·Z − Y‖² + (β/2)·‖Z − h(U)‖²` over the consumer V, auxiliary hidden states Z
//! and the up projection U, with `Y` what the dense half gives and `h(U)` what the producers give for the same inputs.
//!
//! Source: ALGORITHMS.md §6, step 2: our reconstruction of the alternating updates of SPAP (arXiv 2505.03373), of which only
//! the abstract and the model were available, after SparseLLM's splitting.
//! Deviation: Z is never stored. Its step in closed form is `Z − h = (Y − V·h)·V·(VᵀV + βI)⁻¹`, a token at a time; the up-step is
//! one Gauss-Newton step, preconditioned with the gram of the inputs and of the best length for each neuron; the gate
//! stays. A sweep is accepted only if the error of the half's output on held-out sequences falls, as it will be stored.

mod half;

use std::ops::Range;

use candle_core::Tensor;
use espalier_common::checkpoint::{Dtype, cast};
use espalier_common::clock::Stopwatch;

use self::half::{Half, Tokens, add_transposed_product};
use super::site::Site;
use crate::calibrate::cache::Entry;
use crate::calibrate::capture::{Lane, Mark};
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::wide::Cholesky;
use crate::linalg::{gemm, transposed};
use crate::prune::SolveError;
use crate::prune::structured::{PairSolution, Sweeps};
use crate::unit::{Phases, TaskError};

/// A pair whose producers were updated.
pub(super) struct Updated {
    /// The consumer `[out, in]`, zero in the columns of the channels that went.
    pub(super) weight: Tensor,
    /// Its bias `[out]`, if it has one.
    pub(super) bias: Option<Tensor>,
    /// The name of the up projection, and its elements `[channels, in]`.
    pub(super) up: (String, Vec<f32>),
    /// ‖error‖² / ‖target‖² of the half's output on the held-out sequences, as the solver left it.
    pub(super) before: f64,
    /// The same now.
    pub(super) after: f64,
    /// Sweeps accepted.
    pub(super) sweeps: u32,
    /// ‖error‖² / ‖target‖² of the half's output on the calibration sequences, as it will be stored: statistics that were
    /// gathered before the producers moved say nothing of it.
    pub(super) rel_error: f64,
    /// The same on the sequences that the job holds out, if it does.
    pub(super) held_out_error: Option<f64>,
}

/// Sequences of inputs with the outputs of the dense half.
struct Examples<'a> {
    inputs: Vec<&'a Entry>,
    outputs: Vec<Entry>,
    /// The first that is held out.
    held_out: usize,
}

impl Examples<'_> {
    fn load(&self, index: usize) -> Result<(Vec<f32>, Vec<f32>), TaskError> {
        let elements = |entry: &Entry| -> Result<Vec<f32>, TaskError> { Ok(entry.load()?.flatten_all()?.to_vec1()?) };
        Ok((elements(self.inputs[index])?, elements(&self.outputs[index])?))
    }
}

/// Updates up projection and consumer in turn; `None` if no sweep helped.
///
/// # Errors
/// `Cancelled`, `Cache`, `Backend`, and `Solve` if a gram is not positive definite.
pub(super) fn update(
    site: &Site<'_>,
    lane: &Lane,
    mark: &Mark,
    sweeps: Sweeps,
    solution: &PairSolution,
    phases: &mut Phases,
) -> Result<Option<Updated>, TaskError> {
    let watch = Stopwatch::start();
    let place = site.place;
    let anatomy = lane.layer().anatomy(place.run.tokens.sequence_length())?;
    let dense = Half::of(lane.layer(), &anatomy, site.group)?;
    let start = dense.narrowed(&solution.kept, solution)?;
    let held_out = match place.run.job.held_out_samples() {
        0 => place.run.tokens.sequences().div_ceil(8),
        samples => samples,
    };
    if mark.len() <= held_out {
        return Ok(None);
    }
    let mut examples = Examples { inputs: Vec::new(), outputs: Vec::new(), held_out: mark.len() - held_out };
    let device = &place.run.device;
    for (_, input) in mark.entries() {
        place.control.check_cancelled()?;
        let x: Vec<f32> = input.load()?.flatten_all()?.to_vec1()?;
        let output = dense.output(&dense.hidden(&x));
        examples.outputs.push(place.cache.put(Tensor::from_vec(
            output,
            (x.len() / dense.width, dense.out),
            device,
        )?)?);
        examples.inputs.push(input);
    }
    let tensor = &site.pair.consumer;
    let failed = |columns: usize| {
        move |NotPositiveDefinite { pivot }| TaskError::Solve {
            tensor: tensor.clone(),
            source: SolveError::NotPositiveDefinite { columns, pivot, damping: sweeps.damping },
        }
    };
    let inputs = damped_gram(&examples, &dense, sweeps.damping)?;
    let inputs = Cholesky::new(inputs, dense.width).map_err(failed(dense.width))?;
    let up_member = site.outline.groups[site.group - 1].len() - 1;
    let name = site.outline.groups[site.group - 1][up_member].tensor.clone();
    let dtypes = [dtype_of(site, &name)?, dtype_of(site, tensor)?];
    let (all, judges) = (examples.inputs.len(), examples.held_out..examples.inputs.len());
    let (before, norm) = error(&examples, &start.stored(dtypes), judges.clone())?;
    let mut best = (before, start, 0);
    while best.2 < sweeps.most && before > 0.0 {
        place.control.check_cancelled()?;
        let mut next = best.1.clone();
        step_up(&examples, &mut next, &inputs, sweeps.tie)?.map_err(failed(next.channels))?;
        let hidden = next.channels + usize::from(next.bias.is_some());
        refit(&examples, &mut next, sweeps.damping)?.map_err(failed(hidden))?;
        let (found, _) = error(&examples, &next.stored(dtypes), judges.clone())?;
        if found >= best.0 {
            break;
        }
        best = (found, next, best.2 + 1);
    }
    phases.add("sweep", watch.seconds(), 0.0);
    let (after, half, accepted) = best;
    if accepted == 0 {
        return Ok(None);
    }
    let share = |error: f64, norm: f64| if norm > 0.0 { error / norm } else { 0.0 };
    let calibrating = all - place.run.job.held_out_samples().min(all - 1);
    let kept = half.stored(dtypes);
    let measured = |range: Range<usize>| error(&examples, &kept, range).map(|(error, norm)| share(error, norm));
    let rel_error = measured(0..calibrating)?;
    let held_out_error = (calibrating < all).then(|| measured(calibrating..all)).transpose()?;
    let (weight, up) = half.widened(&solution.kept, &dense);
    let bias = half.bias.as_ref().map(|bias| Tensor::new(&bias[..], device)).transpose()?;
    Ok(Some(Updated {
        weight: Tensor::from_vec(weight, (dense.out, dense.channels), device)?,
        bias,
        up: (name, up),
        before: share(before, norm),
        after: share(after, norm),
        sweeps: accepted,
        rel_error,
        held_out_error,
    }))
}

fn dtype_of(site: &Site<'_>, name: &str) -> Result<Dtype, TaskError> {
    Ok(super::header_of(&*site.place.run.model.checkpoint, name)?.1)
}

/// XᵀX of the training sequences, a share of its mean diagonal added.
fn damped_gram(examples: &Examples<'_>, half: &Half, damping: f64) -> Result<Vec<f64>, TaskError> {
    let n = half.width;
    let mut gram = vec![0.0; n * n];
    for index in 0..examples.held_out {
        let (x, _) = examples.load(index)?;
        add_transposed_product(&mut gram, &x, &x, n, n);
    }
    damp(&mut gram, n, damping);
    Ok(gram)
}

fn damp(gram: &mut [f64], n: usize, damping: f64) -> f64 {
    let mean = (0..n).map(|j| gram[j * n + j]).sum::<f64>() / n as f64;
    let ridge = damping * if mean > 0.0 { mean } else { 1.0 };
    (0..n).for_each(|j| gram[j * n + j] += ridge);
    ridge
}

/// Σ‖Y − f(X)‖² and Σ‖Y‖² over some of the sequences.
fn error(examples: &Examples<'_>, half: &Half, range: Range<usize>) -> Result<(f64, f64), TaskError> {
    let (mut error, mut norm) = (0.0, 0.0);
    for index in range {
        let (x, y) = examples.load(index)?;
        let output = half.output(&half.hidden(&x));
        error += output.iter().zip(&y).map(|(f, y)| f64::from(f - y).powi(2)).sum::<f64>();
        norm += y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>();
    }
    Ok((error, norm))
}

/// How a step ended: whether its factorisation was possible, if nothing failed around it.
type Stepped = Result<Result<(), NotPositiveDefinite>, TaskError>;

/// One step of the up projection towards the auxiliary hidden states.
fn step_up(examples: &Examples<'_>, half: &mut Half, inputs: &Cholesky, tie: f64) -> Stepped {
    let (q, n) = (half.channels, half.width);
    // V·(VᵀV + βI)⁻¹, [out, channels].
    let mut curvature = vec![0.0; q * q];
    add_transposed_product(&mut curvature, &half.down, &half.down, q, q);
    damp(&mut curvature, q, tie);
    let mut pull: Vec<f64> = half.down.iter().map(|&v| f64::from(v)).collect();
    match Cholesky::new(curvature, q) {
        Ok(factor) => factor.solve(&mut pull),
        Err(error) => return Ok(Err(error)),
    }
    let pull: Vec<f32> = pull.into_iter().map(|v| v as f32).collect();
    // Z − h, and how h answers to the up projection.
    let residuals = |index: usize| -> Result<(Vec<f32>, Tokens, Vec<f32>), TaskError> {
        let (x, y) = examples.load(index)?;
        let tokens = half.hidden(&x);
        let mut missing = half.output(&tokens);
        missing.iter_mut().zip(&y).for_each(|(f, y)| *f = y - *f);
        let residual = gemm::product(&missing, &pull, half.out, q);
        Ok((x, tokens, residual))
    };
    let mut direction = vec![0.0; q * n];
    for index in 0..examples.held_out {
        let (x, tokens, mut residual) = residuals(index)?;
        residual.iter_mut().zip(&tokens.slope).for_each(|(r, a)| *r *= a);
        add_transposed_product(&mut direction, &residual, &x, q, n);
    }
    inputs.solve(&mut direction);
    let direction: Vec<f32> = direction.into_iter().map(|d| d as f32).collect();
    let across = transposed(&direction, n);
    let (mut along, mut length) = (vec![0.0; q], vec![0.0; q]);
    for index in 0..examples.held_out {
        let (x, tokens, residual) = residuals(index)?;
        let moved = gemm::product(&x, &across, n, q);
        for ((moved, slope), residual) in moved.chunks(q).zip(tokens.slope.chunks(q)).zip(residual.chunks(q)) {
            for (j, ((m, a), r)) in moved.iter().zip(slope).zip(residual).enumerate() {
                let step = f64::from(m * a);
                along[j] += step * f64::from(*r);
                length[j] += step * step;
            }
        }
    }
    for ((up, direction), (along, length)) in
        half.up.chunks_mut(n).zip(direction.chunks(n)).zip(along.into_iter().zip(length))
    {
        let step = if length > 0.0 { (along / length) as f32 } else { 0.0 };
        up.iter_mut().zip(direction).for_each(|(u, d)| *u += step * d);
    }
    half.refresh();
    Ok(Ok(()))
}

/// The consumer, and its bias, that give the outputs best from what the producers give now; a ridge holds them where they are.
fn refit(examples: &Examples<'_>, half: &mut Half, damping: f64) -> Stepped {
    let (q, out) = (half.channels, half.out);
    let n = q + usize::from(half.bias.is_some());
    let (mut gram, mut target) = (vec![0.0; n * n], vec![0.0; out * n]);
    for index in 0..examples.held_out {
        let (x, y) = examples.load(index)?;
        let mut hidden = half.hidden(&x).hidden;
        if n > q {
            hidden = hidden.chunks(q).flat_map(|row| row.iter().copied().chain([1.0])).collect();
        }
        add_transposed_product(&mut gram, &hidden, &hidden, n, n);
        add_transposed_product(&mut target, &y, &hidden, out, n);
    }
    let ridge = damp(&mut gram, n, damping);
    for (row, target) in target.chunks_mut(n).enumerate() {
        let weight = half.down[row * q..(row + 1) * q].iter().chain(half.bias.as_ref().map(|bias| &bias[row]));
        target.iter_mut().zip(weight).for_each(|(target, &v)| *target += ridge * f64::from(v));
    }
    match Cholesky::new(gram, n) {
        Ok(factor) => factor.solve(&mut target),
        Err(error) => return Ok(Err(error)),
    }
    half.down = target.chunks(n).flat_map(|row| row[..q].iter().map(|&v| v as f32)).collect();
    if let Some(bias) = &mut half.bias {
        bias.iter_mut().zip(target.chunks(n)).for_each(|(bias, row)| *bias = row[q] as f32);
    }
    half.refresh();
    Ok(Ok(()))
}

impl Half {
    /// As a checkpoint will hold it: up projection and consumer, of these types.
    fn stored(&self, [up, down]: [Dtype; 2]) -> Self {
        let narrow = |dtype, values: &[f32]| cast::f32_from_bytes(dtype, &cast::bytes_from_f32(dtype, values));
        let mut half = self.clone();
        (half.up, half.down) = (narrow(up, &self.up), narrow(down, &self.down));
        half.bias = self.bias.as_ref().map(|bias| narrow(down, bias));
        half.refresh();
        half
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::half::fixture::half;
    use super::*;
    use crate::calibrate::cache::ActivationCache;
    use crate::linalg::oracle;
    use crate::model::Activation;

    const TOKENS: usize = 60;

    fn entries(cache: &ActivationCache, half: &Half) -> (Vec<Entry>, Vec<Entry>) {
        let both = |seed: u64| {
            let x = oracle::inputs(seed, TOKENS, half.width);
            let y = half.output(&half.hidden(&x));
            let put = |values: Vec<f32>, width: usize| {
                cache.put(Tensor::from_vec(values, (TOKENS, width), &Device::Cpu).unwrap()).unwrap()
            };
            (put(x, half.width), put(y, half.out))
        };
        (0..6).map(both).unzip()
    }

    /// A step of the up projection with the consumer refitted lowers the error on the sequences it is made from, for every
    /// kind of half; and where nothing is missing it changes nothing.
    #[test]
    fn sweeps_lower_the_error_they_minimise() {
        for (activation, bias) in [
            (Activation::GatedSilu, false),
            (Activation::GatedSilu, true),
            (Activation::Relu, true),
            (Activation::Gelu, true),
        ] {
            let cache = ActivationCache::new(1 << 30, std::env::temp_dir());
            let dense = half(7, activation, bias);
            let (inputs, outputs) = entries(&cache, &dense);
            let examples = Examples { inputs: inputs.iter().collect(), outputs, held_out: 6 };
            let gram = damped_gram(&examples, &dense, 1e-3).unwrap();
            let factor = Cholesky::new(gram, dense.width).unwrap();
            let kept: Vec<usize> = (0..dense.channels).filter(|c| c % 3 != 1).collect();
            let mut cut = dense.narrowed_as_is(&kept);
            refit(&examples, &mut cut, 1e-3).unwrap().unwrap();
            let measure = |half: &Half| {
                let (found, norm) = error(&examples, half, 0..6).unwrap();
                found / norm
            };
            let mut last = measure(&cut);
            assert!(last > 1e-4, "{activation:?}: nothing is missing");
            for _ in 0..3 {
                step_up(&examples, &mut cut, &factor, 0.1).unwrap().unwrap();
                refit(&examples, &mut cut, 1e-3).unwrap().unwrap();
                let next = measure(&cut);
                assert!(next < last, "{activation:?}: {next} after {last}");
                last = next;
            }
            let mut whole = dense.clone();
            step_up(&examples, &mut whole, &factor, 0.1).unwrap().unwrap();
            assert!(whole.up.iter().zip(&dense.up).all(|(u, w)| (u - w).abs() < 1e-4), "{activation:?}");
        }
    }
}
