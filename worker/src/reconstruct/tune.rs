//! Tunes the surviving weights of a sub-module towards given outputs, until held-out sequences say that it is enough.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::Options;
use super::adam::Adam;
use super::linear::Matrix;
use super::module::SubModule;
use crate::calibrate::cache::Entry;
use crate::unit::{TaskError, UnitControl};

/// One sequence: what goes in, what should come out.
#[derive(Debug, Clone)]
pub(super) struct Example {
    /// `[tokens, in]`.
    pub(super) input: Entry,
    /// `[tokens, hidden]`.
    pub(super) target: Entry,
    /// What each token's error is multiplied by, `[tokens]`.
    pub(super) importance: Vec<f32>,
}

/// What tuning came to.
#[derive(Debug)]
pub(super) struct Tuned {
    /// The weights, as they will be stored.
    pub(super) weights: Vec<Matrix>,
    /// Σ‖error‖² / Σ‖target‖² of the start on the held-out sequences.
    pub(super) before: f64,
    /// The same of `weights`.
    pub(super) after: f64,
    /// Epochs run.
    pub(super) epochs: u32,
    /// Operations of the weight products.
    pub(super) flops: f64,
}

/// Sequences of one batch, one after the other.
struct Batch {
    input: Vec<f32>,
    target: Vec<f32>,
    importance: Vec<f32>,
}

impl Batch {
    fn load(examples: &[&Example]) -> Result<Self, TaskError> {
        let mut batch = Self { input: Vec::new(), target: Vec::new(), importance: Vec::new() };
        for example in examples {
            batch.input.extend(example.input.load()?.flatten_all()?.to_vec1::<f32>()?);
            batch.target.extend(example.target.load()?.flatten_all()?.to_vec1::<f32>()?);
            batch.importance.extend(&example.importance);
        }
        Ok(batch)
    }

    /// The weighted error of each row, in place of the output.
    fn errors(&self, output: &mut [f32]) {
        let width = self.width();
        let rows = output.chunks_exact_mut(width).zip(self.target.chunks_exact(width)).zip(&self.importance);
        for ((output, target), importance) in rows {
            output.iter_mut().zip(target).for_each(|(y, t)| *y = (*y - t) * importance);
        }
    }

    fn width(&self) -> usize {
        self.target.len() / self.importance.len().max(1)
    }
}

/// Tunes `start` on `training`; the best epoch on `held_out` wins, after `stored` brought it to the type that is stored.
/// The start comes back if no epoch was better.
///
/// Deterministic: batches are drawn by a seeded generator, and every sum has one order.
///
/// # Errors
/// `Cancelled`, `Cache`, `Backend`.
pub(super) fn tune(
    module: &SubModule<'_>,
    start: &[Matrix],
    training: &[Example],
    held_out: &[Example],
    options: &Options,
    control: &UnitControl,
    stored: impl Fn(&[Matrix]) -> Vec<Matrix>,
) -> Result<Tuned, TaskError> {
    let mut flops = 0.0;
    let mut measure = |weights: &[Matrix]| -> Result<(f64, f64), TaskError> {
        let (mut error, mut norm) = (0.0, 0.0);
        for examples in held_out.chunks(options.batch) {
            control.check_cancelled()?;
            let batch = Batch::load(&examples.iter().collect::<Vec<_>>())?;
            let mut output = module.output(weights, &batch.input);
            batch.errors(&mut output);
            error += squares(&output);
            let mut nothing = vec![0.0; output.len()];
            batch.errors(&mut nothing);
            norm += squares(&nothing);
            flops += module.flops(weights, batch.importance.len()).0;
        }
        Ok((error, norm))
    };
    let (first, norm) = measure(start)?;
    let held_rows: usize = held_out.iter().map(|example| example.importance.len()).sum();
    let mut best = (first, None);
    let mut weights = start.to_vec();
    let mut adam = Adam::new(start);
    let steps = training.len().div_ceil(options.batch) * options.epochs as usize;
    let (mut step, mut epochs) = (0, 0);
    let mut training_flops = 0.0;
    // No end before the last epoch: the step width falls along a cosine, and an error that the first wide steps raise falls
    // below the start's once they are narrow.
    while first > 0.0 && epochs < options.epochs {
        let mut order: Vec<&Example> = training.iter().collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(u64::from(epochs)));
        for examples in order.chunks(options.batch) {
            control.check_cancelled()?;
            control.set_progress("reconstruct", step, steps);
            let batch = Batch::load(examples)?;
            let rows = batch.importance.len();
            // In units of the first error, so that neither the model's scale nor the batch's size matters to Adam's ε.
            let unit = (2.0 * held_rows as f64 / (first * rows as f64)) as f32;
            let gradients = module.gradients(&weights, &batch.input, |mut output| {
                batch.errors(&mut output);
                for (row, importance) in output.chunks_exact_mut(batch.width()).zip(&batch.importance) {
                    row.iter_mut().for_each(|error| *error *= importance * unit);
                }
                output
            });
            training_flops += module.flops(&weights, rows).1;
            let done = step as f64 / steps as f64;
            let rate = options.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            adam.step(&mut weights, &gradients, start, rate);
            step += 1;
        }
        epochs += 1;
        let candidate = stored(&weights);
        let (error, _) = measure(&candidate)?;
        if error < best.0 {
            best = (error, Some(candidate));
        }
    }
    let share = |error: f64| if norm > 0.0 { error / norm } else { 0.0 };
    Ok(Tuned {
        weights: best.1.unwrap_or_else(|| start.to_vec()),
        before: share(first),
        after: share(best.0),
        epochs,
        flops: flops + training_flops,
    })
}

/// Σx², summed in f64.
fn squares(values: &[f32]) -> f64 {
    values.chunks(256).map(|chunk| f64::from(chunk.iter().map(|x| x * x).sum::<f32>())).sum()
}
