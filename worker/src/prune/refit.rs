//! The best weights on a support that someone else chose.
//!
//! Source: ALGORITHMS.md §9.4 stage D.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::condition::Conditioned;
use super::{InputStats, Solution, SolveError};
use crate::linalg::factor;
use crate::linalg::pcg::{self, Limits, Quadratic};
use crate::linalg::quadratic::Correction;
use crate::linalg::{gemm, values};

/// Parameters of a refit.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Most steps of conjugate gradients.
    pub steps: usize,
    /// Target blend, as Espalier's α.
    pub alpha: f64,
    /// Share of the gram's mean diagonal added to it, pulling towards the dense weight.
    pub damping: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { steps: 20, alpha: 0.0, damping: 0.01 }
    }
}

/// Keeps the zeros of `pruned [out, in]`, a matrix of any origin, and moves its other weights to the least-squares optimum towards
/// the dense weight `dense [out, in]`. A row whose error does not fall stays as it is.
///
/// # Errors
/// `NotFinite`, `NotPositiveDefinite`, or what the tensor backend says.
pub fn refit(dense: &Tensor, pruned: &Tensor, stats: &InputStats, params: Params) -> Result<Solution, SolveError> {
    let n = stats.gram.dim(0)?;
    let (weight, start) = (values(dense)?, values(pruned)?);
    for (what, values) in [("weight", &weight), ("imported weight", &start)] {
        if values.iter().any(|value| !value.is_finite()) {
            return Err(SolveError::NotFinite { what });
        }
    }
    if dense.dims() != pruned.dims() || dense.dim(1)? != n {
        return Err(candle_core::Error::ShapeMismatchBinaryOp {
            lhs: dense.shape().clone(),
            rhs: pruned.shape().clone(),
            op: "refit",
        }
        .into());
    }
    let (conditioned, _) =
        Conditioned::factored(&stats.gram, params.damping, |c| factor::upper_of_inverse(&c.gram, n))?;
    let shift = match &stats.dense {
        Some(statistics) if params.alpha > 0.0 => {
            let gram = values(&stats.gram)?;
            let correction = Correction::new(&gram, &values(&statistics.cross)?, &values(&statistics.gram)?, n);
            let mut shift = gemm::product(&weight, &correction.towards_dense, n, n);
            for row in shift.chunks_mut(n) {
                for ((value, scale), dead) in row.iter_mut().zip(&conditioned.scale).zip(&conditioned.dead) {
                    *value = if *dead { 0.0 } else { (params.alpha * f64::from(*value) / f64::from(*scale)) as f32 };
                }
            }
            Some(shift)
        }
        _ => None,
    };
    let keep: Vec<u8> = start.iter().map(|v| u8::from(v.abs() > 0.0)).collect();
    let (anchor, scaled) = (conditioned.scaled_alive(&weight), conditioned.scaled_alive(&start));
    let quadratic = Quadratic { anchor: &anchor, shift: shift.as_deref(), gram: &conditioned.gram, n };
    let refit = pcg::refit(quadratic, &scaled, &keep, Limits { steps: params.steps, tolerance: 1e-8 });
    let restored = conditioned.restored(&refit.values, &keep, &start);
    let weight = crate::linalg::matrix(restored, n, dense.device())?;
    let (damping, damping_raised) = (conditioned.damping, conditioned.raised);
    let flops = refit.flops + 2.0 / 3.0 * (n as f64).powi(3);
    Ok(Solution {
        weight,
        iterations: refit.steps,
        damping,
        damping_raised,
        dead_channels: conditioned.dead_channels(),
        flops,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;
    use crate::linalg::matrix;
    use crate::prune::fixture;

    #[test]
    fn a_refit_keeps_the_support_and_reaches_the_published_error() {
        let (problem, references) = fixture::golden("smollm2_layer2_v_proj", "sparsegpt");
        for (reference, published) in references.iter().zip([0.01811, 0.06690, 0.03559]) {
            let pruned = fixture::solve("sparsegpt", json!({}), &problem, reference.pattern);
            let imported = matrix(pruned.clone(), problem.columns, &Device::Cpu).unwrap();
            let solved = refit(&problem.tensor(), &imported, &problem.stats, Params::default()).unwrap();
            let solved = values(&solved.weight).unwrap();
            assert!(solved.iter().zip(&pruned).all(|(a, b)| (a.to_bits() == 0) == (b.to_bits() == 0)));
            let error = problem.rel_error(&solved);
            assert!(error <= published * 1.01, "{}: {error}", reference.pattern);
        }
    }

    #[test]
    fn nothing_pruned_is_nothing_changed() {
        let problem = fixture::random(1, 4, 12, 40);
        let solved = refit(&problem.tensor(), &problem.tensor(), &problem.stats, Params::default()).unwrap();
        for (v, w) in values(&solved.weight).unwrap().iter().zip(&problem.weight) {
            assert!((v - w).abs() <= 1e-6 * w.abs());
        }
    }
}
