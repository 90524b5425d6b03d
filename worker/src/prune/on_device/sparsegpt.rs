//! SparseGPT on a device; see `prune/sparsegpt.rs`.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_common::pattern::Pattern;

use super::refused;
use crate::linalg::ops::{self, FactorError};
use crate::linalg::{matrix, values};
use crate::prune::condition::{Conditioned, SharedFlops, admit};
use crate::prune::sparsegpt::{NAME, Params};
use crate::prune::{GroupSolver, InputStats, Problem, Solution, SolveCtx, SolveError};

/// The upper factor U of the inverse gram on a device.
pub(in crate::prune) struct DeviceCompensation {
    /// U, `[n, n]`.
    upper: Tensor,
    /// See `Compensation::costs`, `[n]`.
    costs: Tensor,
    conditioned: Conditioned,
    params: Params,
    shared: SharedFlops,
    device: Device,
}

impl DeviceCompensation {
    /// Factors the gram.
    ///
    /// # Errors
    /// `NotPositiveDefinite` once damping is exhausted; `Backend`.
    pub(in crate::prune) fn new(stats: &Arc<InputStats>, params: Params, device: &Device) -> Result<Self, SolveError> {
        let factor = |scaled: &Conditioned| {
            let factored = || ops::upper_of_inverse(&matrix(scaled.gram.clone(), scaled.n, device)?);
            match factored() {
                Err(FactorError::NotPositiveDefinite(error)) => Err(error),
                // More damping is no help.
                done => Ok(done),
            }
        };
        let (conditioned, upper) = Conditioned::factored(&stats.gram, params.damping, factor)?;
        let upper = upper.map_err(|error| refused(&conditioned, error))?;
        let n = conditioned.n;
        let scale = Tensor::from_vec(conditioned.scale.clone(), n, device)?;
        // (G + δI)⁻¹ = D⁻¹ÛᵀÛD⁻¹, so U = ÛD⁻¹.
        let upper = upper.broadcast_div(&scale)?;
        let diagonal: Vec<f32> = values(&upper)?.into_iter().step_by(n + 1).collect();
        let costs = diagonal.iter().zip(&conditioned.dead).map(|(u, dead)| if *dead { f32::INFINITY } else { *u });
        let costs = Tensor::from_vec(costs.collect::<Vec<f32>>(), n, device)?;
        let shared = SharedFlops::new(2.0 / 3.0 * (n as f64).powi(3));
        Ok(Self { upper, costs, conditioned, params, shared, device: device.clone() })
    }

    /// Prunes `weight [rows, n]`: block by block of columns, each of which the later ones make up for.
    fn prune(&self, weight: Tensor, pattern: Pattern, ctx: &SolveCtx) -> Result<Tensor, SolveError> {
        let (rows, n) = weight.dims2()?;
        let (block, group) = self.params.columns_together(pattern);
        let (mut rest, mut done) = (weight, Vec::new());
        for start in (0..n).step_by(block) {
            ctx.check_cancelled()?;
            let end = (start + block).min(n);
            let width = end - start;
            let here = rest.narrow(1, 0, width)?.contiguous()?;
            let costs = self.costs.narrow(0, start, width)?;
            let keep = match pattern {
                Pattern::Unstructured { .. } => {
                    let scores = here.abs()?.broadcast_div(&costs)?;
                    ops::keep_largest(&scores, pattern.zeros_in_part(start, end, rows))?
                }
                _ => Tensor::ones((rows, width), DType::U8, &self.device)?,
            };
            let factors = self.upper.narrow(0, start, width)?;
            let swept = ops::sweep(&here, &keep, &factors.narrow(1, start, width)?.contiguous()?, &costs, group)?;
            done.push(swept.weight);
            if end < n {
                let later = factors.narrow(1, end, n - end)?.contiguous()?;
                rest = (rest.narrow(1, width, n - end)? - swept.errors.matmul(&later)?)?;
            }
        }
        Ok(Tensor::cat(&done, 1)?)
    }
}

impl GroupSolver for DeviceCompensation {
    fn device(&self) -> Option<&Device> {
        Some(&self.device)
    }

    fn solve_block(&self, problem: &Problem<'_>, _: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let admitted = admit(NAME, problem, self.conditioned.n)?;
        let weight = matrix(admitted.weight, admitted.columns, &self.device)?;
        let pruned = self.prune(weight, problem.pattern, ctx)?;
        let flops = (admitted.rows * admitted.columns) as f64 * admitted.columns as f64 + self.shared.take();
        self.conditioned.solution(problem, values(&pruned)?, 1, flops)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::ops::host;
    use crate::prune::fixture;

    #[test]
    fn every_pattern_is_met_exactly_and_the_error_is_that_of_the_host() {
        for device in host::devices() {
            for params in [json!({}), json!({ "block": 20 }), json!({ "block": 40, "damping": 0.1 })] {
                let problem = fixture::random(4, 33, 96, 300);
                for pattern in fixture::patterns() {
                    let host = fixture::solution(NAME, &params, &problem, pattern);
                    let there = fixture::solution_on(NAME, &params, &problem, pattern, &device);
                    let found = values(&there.weight).unwrap();
                    fixture::assert_obeys(&found, problem.columns, pattern);
                    let ratio = problem.rel_error(&found) / problem.rel_error(&values(&host.weight).unwrap());
                    assert!((ratio - 1.0).abs() < 2e-3, "{device:?} {params} {pattern}: {ratio}");
                }
            }
        }
    }

    #[test]
    fn dead_channels_go_first() {
        let mut problem = fixture::random(4, 6, 24, 100);
        for at in 0..24 {
            problem.gram[5 * 24 + at] = 0.0;
            problem.gram[at * 24 + 5] = 0.0;
        }
        let problem = fixture::LayerProblem::new(problem.weight, problem.gram, 24, 100);
        for device in host::devices() {
            let there = fixture::solution_on(NAME, &json!({}), &problem, fixture::patterns()[0], &device);
            assert_eq!(there.dead_channels, 1);
            let dead: Vec<f32> = values(&there.weight).unwrap().into_iter().skip(5).step_by(24).collect();
            assert!(dead.iter().all(|w| w.to_bits() == 0), "{device:?}: {dead:?}");
        }
    }

    #[test]
    fn blocks_wider_than_the_kernel_are_solved_on_the_host() {
        let on_device = |block: usize| {
            let (solver, _) = crate::prune::build(NAME, &json!({ "block": block })).unwrap();
            solver.on_device().is_some()
        };
        assert!(on_device(ops::MOST_COLUMNS) && !on_device(ops::MOST_COLUMNS + 1));
    }
}
