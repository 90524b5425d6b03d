//! The target blend α: 0 for the dense weight's outputs on the inputs at hand, 1 for the dense model's outputs. How much of it
//! is taken is decided on inputs that no solve has seen.
//!
//! Source: ALGORITHMS.md §0, target blend; §11, hazards 6 and 7: with few tokens, targets towards the dense model's outputs fit
//! the tokens and not the model.
//!
//! On a fixed support the least-squares weights are affine in α, and the error on held-out inputs is a parabola along them: its
//! least point is had in closed form, for the price of a second refit instead of a second search.

use std::slice::from_ref;

use candle_core::Tensor;

use super::{InputStats, SolveError};
use crate::linalg::gemm::product;
use crate::linalg::quadratic::dot;
use crate::linalg::{held, slices};

/// The α that methods which blend take where sequences are held out and nothing else is asked for.
///
/// Source: ALGORITHMS.md §9.4, defaults.
const USUAL: f64 = 0.5;

/// The α of a method that was not told one, if it blends at all.
pub(crate) fn usual_alpha(method: &str, holds_out: bool) -> Option<f64> {
    (holds_out && [super::espalier::NAME, super::refit::NAME].contains(&method)).then_some(USUAL)
}

/// How far to go from `without` (α = 0) to `with` (the α that was asked for), both `[rows, in]` on one support: the share in
/// [0, 1] with the least `‖X̂·Vᵀ − X·Wᵀ‖²` on the held-out inputs, W being `dense`. `image` multiplies rows by one of the
/// held-out statistics, where those are.
///
/// # Errors
/// What `image` says.
pub(super) fn least_held_out(
    dense: &[f32],
    without: &[f32],
    with: &[f32],
    held_out: &InputStats,
    image: impl Fn(&[f32], &Tensor) -> Result<Vec<f32>, SolveError>,
) -> Result<f64, SolveError> {
    let step: Vec<f32> = with.iter().zip(without).map(|(with, without)| with - without).collect();
    let through_gram = image(&step, &held_out.gram)?;
    let towards = match &held_out.dense {
        Some(statistics) => dot(&image(&step, &statistics.cross)?, dense),
        None => dot(&through_gram, dense),
    };
    let (curvature, descent) = (dot(&through_gram, &step), towards - dot(&through_gram, without));
    Ok(if curvature > 0.0 { (descent / curvature).clamp(0.0, 1.0) } else { 0.0 })
}

/// `rows · matrix` on the host.
///
/// # Errors
/// What the tensor backend says.
pub(super) fn image(rows: &[f32], matrix: &Tensor) -> Result<Vec<f32>, SolveError> {
    let n = matrix.dim(0)?;
    let held = held(from_ref(matrix));
    let [matrix] = slices(&held)?[..] else { unreachable!("as many slices as tensors") };
    Ok(product(rows, matrix, n, n))
}

/// What lies `share` of the way from `without` to `with`. Where they meet at zero on the support, `with` is taken: a kept weight
/// is none of the zeros.
pub(super) fn between(without: &[f32], with: &[f32], share: f64) -> Vec<f32> {
    let point = |(without, with): (&f32, &f32)| {
        let point = (f64::from(*without) + share * (f64::from(*with) - f64::from(*without))) as f32;
        if point.abs() > 0.0 { point } else { *with }
    };
    without.iter().zip(with).map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::fixture;

    #[test]
    fn the_share_is_the_least_point_of_the_error_on_held_out_inputs() {
        for seed in 0..4 {
            let (problem, unseen) = fixture::random_corrected(seed, 6, 12, 80).split(20);
            let (dense, held_out) = (&problem.problem.weight, problem.problem.stats.held_out.as_ref().unwrap());
            let without: Vec<f32> = dense.iter().map(|w| 0.9 * w).collect();
            let with = problem.unconstrained(1.0, 1e-3).iter().map(|&v| v as f32).collect::<Vec<_>>();
            let error = |share: f64| unseen.error(&between(&without, &with, share));
            let share = least_held_out(dense, &without, &with, held_out, image).unwrap();
            let least = (0..=200).map(|at| error(f64::from(at) / 200.0)).fold(f64::INFINITY, f64::min);
            assert!(error(share) <= least * (1.0 + 1e-6), "seed {seed}: {} at {share}, {least}", error(share));
        }
    }

    #[test]
    fn a_way_of_no_length_is_not_gone() {
        let (problem, _) = fixture::random_corrected(1, 3, 8, 60).split(10);
        let held_out = problem.problem.stats.held_out.as_ref().unwrap();
        let weight = &problem.problem.weight;
        assert!(least_held_out(weight, weight, weight, held_out, image).unwrap() <= 0.0);
    }

    #[test]
    fn a_kept_weight_does_not_become_zero_on_the_way() {
        assert_eq!(between(&[-1.0, 0.0, 2.0], &[1.0, 0.0, 4.0], 0.5), [1.0, 0.0, 3.0]);
    }
}
