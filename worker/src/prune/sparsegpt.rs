//! SparseGPT: columns are pruned from left to right, and what they cost is spread over those still to come.
//!
//! Source: Frantar & Alistarh, *SparseGPT* (arXiv 2301.00774), algorithm 1; ALGORITHMS.md §2.
//! Deviation: the budget of each block of columns is exact, and the blocks' budgets add up to the matrix's; the reference
//! prunes everything up to a threshold. Weights of dead channels rank lowest instead of being zeroed beside the budget. The
//! gram is scaled to a unit diagonal for the factorisation, which changes rounding only. For N:M the block is a multiple
//! of M.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use espalier_common::pattern::Pattern;
use pulp::Arch;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::condition::{Conditioned, SharedFlops, admit, supports_valid};
use super::on_device::OnDevice;
use super::on_device::sparsegpt::DeviceCompensation;
use super::sweep::Span;
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, RowBlock, Solution, SolveCtx, SolveError, Solver,
    Statistics, read_params,
};
use crate::linalg::gemm::{View, gemm};
use crate::linalg::quadratic::dot;
use crate::linalg::{factor, ops, select};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "3",
    summary: "prunes columns left to right and compensates in the columns to come",
    build,
};

pub(super) const NAME: &str = "sparsegpt";
/// Rows that one thread carries through a block of columns before it updates what comes after the block.
const ROWS: usize = 96;

/// Parameters of SparseGPT.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Columns that share a budget and a lazy update.
    pub block: usize,
    /// Share of the gram's mean diagonal added to it.
    pub damping: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { block: 128, damping: 0.01 }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| match params {
        Params { block: 0, .. } => Err("block must be at least 1"),
        Params { damping, .. } if !(0.0..=10.0).contains(damping) => Err("damping must lie between 0 and 10"),
        _ => Ok(()),
    })?;
    Ok((Box::new(SparseGpt { params }), filled))
}

struct SparseGpt {
    params: Params,
}

impl Solver for SparseGpt {
    /// Those of an N:M pattern do not compete; those of an unstructured one do, in every block of columns.
    fn blocks(&self, problem: &Problem<'_>) -> Result<Vec<RowBlock>, SolveError> {
        match problem.pattern {
            Pattern::NofM { .. } => RowBlock::each(problem, 2 * ROWS),
            _ => Ok(vec![RowBlock::whole(problem)?]),
        }
    }

    fn needs(&self) -> Statistics {
        Statistics::Gram
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        Ok(Box::new(Compensation::new(&stats, self.params)?))
    }

    fn on_device(&self) -> Option<&dyn OnDevice> {
        (self.params.block <= ops::MOST_COLUMNS).then_some(self)
    }
}

impl OnDevice for SparseGpt {
    fn prepare_on(
        &self,
        stats: Arc<InputStats>,
        device: &Device,
        ctx: &SolveCtx,
    ) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        Ok(Box::new(DeviceCompensation::new(&stats, self.params, device)?))
    }
}

impl Params {
    /// Columns that share a budget and an update, and N and M if the sweep is to choose N of every M.
    pub(super) fn columns_together(&self, pattern: Pattern) -> (usize, Option<(usize, usize)>) {
        match pattern {
            Pattern::NofM { keep, of } => ((self.block / of).max(1) * of, Some((keep, of))),
            _ => (self.block, None),
        }
    }
}

/// The upper factor U of the inverse gram, `G⁻¹ = UᵀU`, and how it was come by.
pub(crate) struct Compensation {
    /// U, `[n, n]`.
    upper: Vec<f32>,
    conditioned: Conditioned,
    params: Params,
    shared: SharedFlops,
}

impl Compensation {
    pub(crate) fn new(stats: &InputStats, params: Params) -> Result<Self, SolveError> {
        let (conditioned, mut upper) = Conditioned::factored(&stats.gram, params.damping, |scaled| {
            factor::upper_of_inverse(&scaled.gram, scaled.n)
        })?;
        let n = conditioned.n;
        // (G + δI)⁻¹ = D⁻¹ÛᵀÛD⁻¹, so U = ÛD⁻¹.
        upper.par_chunks_mut(n.max(1)).for_each(|row| {
            row.iter_mut().zip(&conditioned.scale).for_each(|(value, scale)| *value /= scale);
        });
        let shared = SharedFlops::new(2.0 / 3.0 * (n as f64).powi(3));
        Ok(Self { upper, conditioned, params, shared })
    }

    /// Share of the mean diagonal that was added to the gram.
    pub(crate) fn damping(&self) -> f64 {
        self.conditioned.damping
    }

    /// How often it had to be raised.
    pub(crate) fn damping_raised(&self) -> u32 {
        self.conditioned.raised
    }

    /// Prunes `weight [rows, n]` in place and returns what stays, and `Σ e²` over the pruned weights: by theory the damped
    /// error `(V − W)(G + δI)(V − W)ᵀ`.
    pub(crate) fn prune(
        &self,
        weight: &mut [f32],
        pattern: Pattern,
        ctx: &SolveCtx,
    ) -> Result<(Vec<u8>, f64), SolveError> {
        let n = self.conditioned.n;
        let rows = weight.len() / n.max(1);
        let (block, group) = self.params.columns_together(pattern);
        let mut keep = vec![1u8; weight.len()];
        let mut loss = 0.0;
        for start in (0..n).step_by(block) {
            ctx.check_cancelled()?;
            let end = (start + block).min(n);
            let costs = self.costs(start..end);
            if let Pattern::Unstructured { .. } = pattern {
                choose(weight, &mut keep, (start..end, n), &costs, pattern.zeros_in_part(start, end, rows));
            }
            let span = Span::new(&self.upper, n, start..end, costs, group);
            let later = View::new(&self.upper[(start * n + end).min(n * n)..], end - start, n - end, n);
            // Collected in order, so that the sum's order is fixed.
            let losses: Vec<f64> = weight
                .par_chunks_mut(ROWS * n)
                .zip(keep.par_chunks_mut(ROWS * n))
                .map(|(weight, keep)| {
                    let errors = span.sweep(weight, keep);
                    let errors_view = View::new(&errors, weight.len() / n, end - start, end - start);
                    if end < n {
                        gemm(&mut weight[end..], n, 1.0, errors_view, later, -1.0);
                    }
                    dot(&errors, &errors)
                })
                .collect();
            loss += losses.iter().sum::<f64>();
        }
        Ok((keep, loss))
    }

    /// What the size of a weight is divided by to give the root of what it costs to drop it: `U_jj`, or infinity in a dead
    /// channel.
    fn costs(&self, columns: Range<usize>) -> Vec<f32> {
        let n = self.conditioned.n;
        columns.map(|j| if self.conditioned.dead[j] { f32::INFINITY } else { self.upper[j * (n + 1)] }).collect()
    }
}

/// Marks what stays of a block of columns of `weight [rows, n]`, all rows together.
fn choose(weight: &[f32], keep: &mut [u8], (columns, n): (Range<usize>, usize), costs: &[f32], drop: usize) {
    let width = columns.len();
    let mut scores = vec![0.0; weight.len() / n * width];
    scores.par_chunks_mut(width).zip(weight.par_chunks(n)).for_each(|(scores, row)| {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let row = row[columns.clone()].iter().zip(costs);
                scores.iter_mut().zip(row).for_each(|(score, (w, cost))| *score = w.abs() / cost);
            },
        );
    });
    let mut chosen = vec![1; scores.len()];
    select::keep_largest(&scores, drop, &mut chosen);
    for (row, chosen) in keep.chunks_mut(n).zip(chosen.chunks(width)) {
        row[columns.clone()].copy_from_slice(chosen);
    }
}

impl GroupSolver for Compensation {
    fn solve_block(&self, problem: &Problem<'_>, _: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let admitted = admit(NAME, problem, self.conditioned.n)?;
        let mut weight = admitted.weight;
        let (keep, _) = self.prune(&mut weight, problem.pattern, ctx)?;
        select::zero_dropped(&mut weight, &keep);
        let flops = (admitted.rows * admitted.columns) as f64 * admitted.columns as f64 + self.shared.take();
        self.conditioned.solution(problem, weight, 1, flops)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::oracle;
    use crate::prune::fixture::{self, patterns};

    fn compensation(problem: &fixture::LayerProblem, block: usize) -> Compensation {
        Compensation::new(&problem.stats, Params { block, ..Params::default() }).unwrap()
    }

    /// The gram with SparseGPT's damping.
    fn damped(problem: &fixture::LayerProblem) -> Vec<f64> {
        let n = problem.columns;
        let mut gram = oracle::wide(&problem.gram);
        let mean = (0..n).map(|j| gram[j * (n + 1)]).sum::<f64>() / n as f64;
        (0..n).for_each(|j| gram[j * (n + 1)] += 0.01 * mean);
        gram
    }

    #[test]
    fn the_summed_saliencies_are_the_damped_error() {
        let problem = fixture::random(1, 9, 40, 120);
        for pattern in patterns() {
            let mut weight = problem.weight.clone();
            let (_, loss) = compensation(&problem, 16).prune(&mut weight, pattern, &SolveCtx::default()).unwrap();
            let gram = damped(&problem);
            let error: f64 = weight
                .chunks(40)
                .zip(problem.weight.chunks(40))
                .map(|(v, w)| {
                    let delta: Vec<f64> = v.iter().zip(w).map(|(v, w)| f64::from(*v) - f64::from(*w)).collect();
                    oracle::quadratic(&delta, &gram)
                })
                .sum();
            assert!((loss / error - 1.0).abs() < 1e-4, "{pattern}: {loss} {error}");
        }
    }

    #[test]
    fn equals_sequential_optimal_brain_surgeon_for_its_mask() {
        let problem = fixture::random(2, 4, 24, 80);
        for pattern in patterns() {
            let mut weight = problem.weight.clone();
            let (keep, loss) = compensation(&problem, 7).prune(&mut weight, pattern, &SolveCtx::default()).unwrap();
            let gram = damped(&problem);
            let mut expected_loss = 0.0;
            for ((v, w), keep) in weight.chunks(24).zip(problem.weight.chunks(24)).zip(keep.chunks(24)) {
                let keep: Vec<bool> = keep.iter().map(|k| *k == 1).collect();
                let (expected, row_loss) = oracle::sequential_obs(&oracle::wide(w), &gram, &keep);
                expected_loss += row_loss;
                assert!(v.iter().zip(expected).all(|(v, e)| (f64::from(*v) - e).abs() < 1e-4), "{pattern}");
            }
            assert!((loss / expected_loss - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn the_block_size_does_not_matter_for_nofm() {
        let problem = fixture::random(3, 6, 48, 150);
        let pattern = Pattern::NofM { keep: 2, of: 4 };
        let solve = |block: usize| fixture::solve(NAME, json!({ "block": block }), &problem, pattern);
        let expected = solve(48);
        for block in [1, 4, 20, 128] {
            assert!(solve(block).iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4), "{block}");
        }
    }

    #[test]
    fn compensation_beats_the_mask_alone() {
        let problem = fixture::random(4, 16, 40, 200);
        for pattern in patterns() {
            let solved = fixture::solve(NAME, json!({}), &problem, pattern);
            let masked: Vec<f32> =
                problem.weight.iter().zip(&solved).map(|(w, v)| if v.to_bits() == 0 { 0.0 } else { *w }).collect();
            assert!(problem.rel_error(&solved) <= problem.rel_error(&masked), "{pattern}");
        }
    }

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, json!({}), pattern);
        }
    }

    #[test]
    fn dead_channels_are_pruned_first_and_reported() {
        let (problem, _) = fixture::golden("synthetic_64x96", "wanda");
        let solved = fixture::solution(NAME, &json!({}), &problem, Pattern::Unstructured { sparsity: 0.5 });
        assert_eq!(solved.dead_channels, 1);
        let weight = crate::linalg::values(&solved.weight).unwrap();
        assert!(weight.iter().skip(17).step_by(96).all(|v| v.to_bits() == 0));
    }

    #[test]
    fn agrees_with_the_authors_code_on_the_golden_problems() {
        fixture::assert_agrees_with_reference(NAME, json!({}), "sparsegpt", |_, _| (0.99, 1.005));
    }

    #[test]
    fn bad_parameters_are_refused() {
        for params in [json!({ "block": 0 }), json!({ "damping": -1.0 }), json!({ "blocks": 3 })] {
            assert!(build(&params).is_err(), "{params}");
        }
    }
}
