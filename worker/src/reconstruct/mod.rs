//! Sub-module reconstruction: once the sublayers of a half of a layer are pruned one by one, what is left of their weights is
//! tuned together, so that the half puts on the residual stream what it would be in the dense model.
//!
//! Source: ALGORITHMS.md §9.4, stage F; "A Free Lunch in LLM Compression" (arXiv 2510.14444), EBFT (arXiv 2402.12419).
//! Deviation: the target holds the difference of the two residual streams, so that a half also makes up for what was lost
//! before it; norms and biases stay as they are; the epoch that is best on held-out sequences wins. Where heads and channels
//! were removed, the matrices keep their shapes, and zeros.

mod adam;
mod attention;
mod feed_forward;
#[cfg(test)]
mod gradient_tests;
mod linear;
mod module;
mod options;
mod tune;

use std::ops::Range;

use candle_core::Tensor;
use espalier_common::checkpoint::cast;
use espalier_common::clock::Stopwatch;
use espalier_common::outline::SublayerOutline;
use espalier_common::report::{Reconstruction, SublayerReport};

use self::linear::Matrix;
use self::module::{Half, SubModule};
pub use self::options::{Loss, Options, OptionsError};
use self::tune::{Example, Tuned};
use crate::apply::as_loaded;
use crate::artifact::StoredTensor;
use crate::calibrate::cache::Entry;
use crate::calibrate::capture::{Lane, Mark, capture_group};
use crate::linalg::values;
use crate::model::DecoderLayer;
use crate::prune::verify::{Verified, VerifyError};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Changes whenever the output bits of a reconstruction may change; part of a run's fingerprint.
pub const VERSION: &str = "reconstruct-2";

/// One sublayer of a half, as its solver left it.
pub struct Part<'a> {
    /// Group and member in the layer.
    pub place: (usize, usize),
    /// What it is.
    pub outline: &'a SublayerOutline,
    /// As it will be stored.
    pub stored: &'a mut StoredTensor,
    /// What is said of it, if anything is.
    pub report: Option<&'a mut SublayerReport>,
    /// Marks what became of it.
    pub check: Check<'a>,
}

/// Checks a tuned weight, given the dense one and then the tuned one, and measures it if its inputs are known.
pub type Check<'a> = Box<dyn Fn(&Tensor, &Tensor) -> Result<Option<Verified>, VerifyError> + 'a>;

/// A half whose sublayers are being pruned, and where both streams stood before it.
pub struct Draft {
    half: Half,
    /// Corrected, dense.
    before: [Mark; 2],
}

impl Draft {
    /// Notes where the lanes (corrected, dense) stand, if `group`, which they are before, is the first of a half.
    pub fn begin(group: usize, lanes: &[Lane]) -> Option<Self> {
        let (half, [corrected, dense]) = (Half::starting_at(group)?, lanes) else { return None };
        Some(Self { half, before: [corrected.mark(), dense.mark()] })
    }

    /// The half's groups.
    pub fn groups(&self) -> Range<usize> {
        self.half.groups()
    }

    /// Whether `group` is the half's last.
    pub fn ends_with(&self, group: usize) -> bool {
        self.half.groups().end == group + 1
    }

    /// Tunes the half; if that helps, `parts` and the corrected lane have the new weights afterwards, and the lane stands
    /// where it stood, before the half's last group.
    ///
    /// # Errors
    /// `Cancelled`, `Verify`, and whatever the layer or the cache says.
    pub fn finish(
        self,
        place: &Workplace<'_>,
        options: &Options,
        lanes: &mut [Lane],
        parts: &mut [Part<'_>],
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        let watch = Stopwatch::start();
        let held_out = match place.run.job.held_out_samples() {
            0 => place.run.tokens.sequences().div_ceil(8),
            samples => samples,
        };
        let training = self.before[0].len().saturating_sub(held_out);
        assert!(training > 0, "a job that reconstructs was refused unless a sequence is left to tune on");
        let tokens = place.run.tokens.sequence_length();
        let anatomy = lanes[0].layer().anatomy(tokens)?;
        let module = SubModule { half: self.half, anatomy: &anatomy, tokens };
        let start = matrices(lanes[0].layer(), parts)?;
        let dense = matrices(lanes[1].layer(), parts)?;
        // A cut layer has other biases than the dense one.
        let dense_anatomy = lanes[1].layer().anatomy(tokens)?;
        let teacher = SubModule { anatomy: &dense_anatomy, ..module };
        let examples = self.examples(place, &teacher, &dense, training, options)?;
        let stored = |weights: &[Matrix]| -> Vec<Matrix> {
            let kept = weights.iter().zip(&start).zip(&*parts);
            kept.map(|((weight, start), part)| narrowed(weight, start, part.stored)).collect()
        };
        let (training, held_out) = examples.split_at(training);
        let tuned = tune::tune(&module, &start, training, held_out, options, place.control, stored)?;
        let flops = tuned.flops;
        if tuned.after < tuned.before {
            self.apply(place, lanes, parts, &tuned)?;
        }
        for part in parts {
            let Tuned { before, after, epochs, .. } = tuned;
            if let Some(report) = part.report.as_deref_mut() {
                report.reconstruction = Some(Reconstruction { error_before: before, error_after: after, epochs });
            }
        }
        phases.add("reconstruct", watch.seconds(), flops);
        Ok(())
    }

    /// What goes into the half and what should come out, sequence by sequence: the dense stream after the half, less the
    /// corrected one before it. The first `training` targets make up for only a share of what was lost before the half.
    fn examples(
        &self,
        place: &Workplace<'_>,
        half: &SubModule<'_>,
        dense: &[Matrix],
        training: usize,
        options: &Options,
    ) -> Result<Vec<Example>, TaskError> {
        let [corrected, teacher] = &self.before;
        let mut examples = Vec::with_capacity(corrected.len());
        let pairs = corrected.entries().zip(teacher.entries()).enumerate();
        for (index, ((residual, input), (dense_residual, dense_input))) in pairs {
            place.control.check_cancelled()?;
            let (tokens, width) = residual.shape();
            let mut target = half.output(dense, &elements(dense_input)?);
            target.iter_mut().zip(elements(dense_residual)?).for_each(|(target, dense)| *target += dense);
            let importance = match options.loss {
                Loss::Absolute => vec![1.0; tokens],
                Loss::Relative => target.chunks_exact(width).map(inverse_norm).collect(),
            };
            target.iter_mut().zip(elements(residual)?).for_each(|(target, residual)| *target -= residual);
            if index < training && options.stream < 1.0 {
                let share = options.stream as f32;
                let local = half.output(dense, &elements(input)?);
                target.iter_mut().zip(local).for_each(|(target, local)| *target = local + share * (*target - local));
            }
            let target = place.cache.put(Tensor::from_vec(target, (tokens, width), &place.run.device)?)?;
            examples.push(Example { input: input.clone(), target, importance });
        }
        Ok(examples)
    }

    /// Puts tuned weights in place, checked like any solution.
    fn apply(
        self,
        place: &Workplace<'_>,
        lanes: &mut [Lane],
        parts: &mut [Part<'_>],
        tuned: &Tuned,
    ) -> Result<(), TaskError> {
        for (part, weight) in parts.iter_mut().zip(&tuned.weights) {
            let (group, member) = part.place;
            part.stored.bytes = cast::bytes_from_f32(part.stored.dtype, &weight.values);
            let weight = as_loaded(part.stored, &place.run.device)?;
            let verified = (part.check)(lanes[1].layer().weight(group, member), &weight)
                .map_err(|source| TaskError::Verify { tensor: part.outline.tensor.clone(), source })?;
            if let Some((report, verified)) = part.report.as_deref_mut().zip(verified) {
                report.rel_error = verified.rel_error;
                report.held_out_error = verified.held_out_error;
                report.zeros = verified.zeros;
            }
            lanes[0].layer_mut().set_weight(group, member, weight)?;
        }
        let [corrected, _] = self.before;
        lanes[0].rewind(corrected);
        capture_group(&mut lanes[..1], self.half.groups().end - 1, place.cache, place.control, |_| Ok(()))
    }
}

/// The weights of the parts that a layer has at the moment.
fn matrices(layer: &dyn DecoderLayer, parts: &[Part<'_>]) -> Result<Vec<Matrix>, TaskError> {
    let matrix = |part: &Part<'_>| {
        let (group, member) = part.place;
        let values = values(layer.weight(group, member))?;
        Ok(Matrix { values, columns: part.outline.columns })
    };
    parts.iter().map(matrix).collect()
}

fn elements(entry: &Entry) -> Result<Vec<f32>, TaskError> {
    Ok(entry.load()?.flatten_all()?.to_vec1()?)
}

/// 1 / ‖row‖; 0 for a row of zeros.
fn inverse_norm(row: &[f32]) -> f32 {
    let norm = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 }
}

/// `weight` as its stored type can hold it. Where that is zero or not finite, a weight that was kept goes back to `start`,
/// so that exactly the pruned ones are zero.
fn narrowed(weight: &Matrix, start: &Matrix, stored: &StoredTensor) -> Matrix {
    let mut values = cast::f32_from_bytes(stored.dtype, &cast::bytes_from_f32(stored.dtype, &weight.values));
    for (value, start) in values.iter_mut().zip(&start.values) {
        if *value == 0.0 || !value.is_finite() {
            *value = *start;
        }
    }
    Matrix { values, columns: weight.columns }
}
