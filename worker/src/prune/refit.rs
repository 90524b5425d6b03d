//! The best weights on a support that someone else chose: the zeros of another checkpoint stay, its other weights move.
//!
//! Source: ALGORITHMS.md §9.4 stage D.
//! Each row starts from whichever is better, the imported weights or the dense ones on the support. A mask of Wanda's comes
//! with dense weights, where the two are one; SparseGPT's and ALPS' weights already make up for what went and are many steps
//! ahead of the dense ones; weights that were trained on, or pruned for other inputs, may be worse than the dense ones.

use std::sync::Arc;

use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use serde::{Deserialize, Serialize};

use super::blend::{self, between, least_held_out};
use super::condition::{Conditioned, admit};
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, RowBlock, Solution, SolveCtx, SolveError, Solver,
    Statistics, factored, read_params,
};
use crate::linalg::pcg::{self, Limits, Quadratic};
use crate::linalg::quadratic::{self, Correction};
use crate::linalg::{gemm, matrix, values};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "6",
    summary: "keeps the zeros of another checkpoint (mask) and refits its weights to the dense model",
    build,
};

pub(super) const NAME: &str = "refit";
/// A row has converged when its squared residual has fallen to this share of the first one.
const TOLERANCE: f64 = 1e-8;
/// Rows of a block: enough to multiply fast.
const ROWS: usize = 192;

/// Parameters of a refit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The checkpoint whose zeros are kept, named like a model.
    pub mask: String,
    /// Most steps of conjugate gradients.
    pub steps: usize,
    /// Target blend, as Espalier's α: above 0 it needs held-out sequences, and 0.5 is usual where a job has some.
    pub alpha: f64,
    /// Share of the gram's mean diagonal added to it, pulling towards the dense weight.
    pub damping: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { mask: String::new(), steps: 20, alpha: 0.0, damping: 0.01 }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| {
        if params.steps == 0 {
            return Err("steps must be at least 1");
        }
        if !(0.0..=1.0).contains(&params.alpha) {
            return Err("alpha must be between 0 and 1");
        }
        if !(0.0..=10.0).contains(&params.damping) {
            return Err("damping must be between 0 and 10");
        }
        Ok(())
    })?;
    Ok((Box::new(Refit(params)), filled))
}

struct Refit(Params);

impl Solver for Refit {
    /// Of the gram there are copies: as it is, conditioned, and that as a factor; and what leads towards the dense model's outputs.
    fn effort(&self, columns: usize) -> Effort {
        let copies = 3 + u64::from(self.0.alpha > 0.0);
        let square = (columns * columns * size_of::<f32>()) as u64;
        Effort { kept_bytes: copies * square, is_shared: !self.needs_held_out(), ..factored(columns) }
    }

    /// Rows have nothing in common but the inputs.
    fn blocks(&self, problem: &Problem<'_>) -> Result<Vec<RowBlock>, SolveError> {
        RowBlock::each(problem, ROWS)
    }

    fn needs(&self) -> Statistics {
        if self.0.alpha > 0.0 { Statistics::GramAndCross } else { Statistics::Gram }
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        match pattern {
            Pattern::Imported => Ok(()),
            _ => Err(SolveError::Unsupported { method: NAME, pattern, reason: "it keeps the zeros that its mask has" }),
        }
    }

    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        let (conditioned, ()) = Conditioned::factored(&stats.gram, self.0.damping, |_| Ok(()))?;
        let gram = values(&stats.gram)?;
        let towards_dense = match &stats.dense {
            Some(dense) if self.0.alpha > 0.0 => {
                let correction = Correction::new(&gram, &values(&dense.cross)?, &values(&dense.gram)?, conditioned.n);
                Some(correction.towards_dense)
            }
            _ => None,
        };
        let held_out = stats.held_out.clone();
        Ok(Box::new(Group { conditioned, gram, towards_dense, held_out, params: self.0.clone() }))
    }

    fn imports(&self) -> Option<&str> {
        Some(&self.0.mask)
    }

    fn needs_held_out(&self) -> bool {
        self.0.alpha > 0.0
    }
}

struct Group {
    conditioned: Conditioned,
    /// G as it is, `[n, n]`: what errors are measured with.
    gram: Vec<f32>,
    /// `(K − G)ᵀ`, `[n, n]`.
    towards_dense: Option<Vec<f32>>,
    /// What decides how much of the way is gone.
    held_out: Option<Arc<InputStats>>,
    params: Params,
}

impl Group {
    /// Keeps the zeros of `problem.imported`, and moves its other weights to the least-squares optimum towards the target
    /// `C_α`. A row whose error on the inputs does not fall stays as it was imported.
    fn solve_towards(&self, alpha: f64, problem: &Problem<'_>, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        ctx.check_cancelled()?;
        let conditioned = &self.conditioned;
        let n = conditioned.n;
        let unsupported = |reason| SolveError::Unsupported { method: NAME, pattern: problem.pattern, reason };
        let weight = admit(NAME, problem, n)?.weight;
        let imported = problem.imported.ok_or_else(|| unsupported("there is no mask to take zeros from"))?;
        if imported.dims() != problem.weight.dims() {
            return Err(unsupported("the mask is of another shape than the weight"));
        }
        let imported = values(imported)?;
        if imported.iter().any(|value| !value.is_finite()) {
            return Err(SolveError::NotFinite { what: "imported weight" });
        }
        let keep: Vec<u8> = imported.iter().map(|value| u8::from(value.abs() > 0.0)).collect();
        let shift = self.towards_dense.as_ref().filter(|_| alpha > 0.0).map(|towards| {
            let mut shift = gemm::product(&weight, towards, n, n);
            shift.iter_mut().for_each(|value| *value = (alpha * f64::from(*value)) as f32);
            shift
        });
        let errors = |solution: &[f32]| self.errors(solution, &weight, shift.as_deref());

        let before = errors(&imported);
        let masked: Vec<f32> = weight.iter().zip(&keep).map(|(w, keep)| w * f32::from(*keep)).collect();
        let mut start = imported.clone();
        for (row, (masked, imported)) in errors(&masked).into_iter().zip(&before).enumerate() {
            // A dense weight that is zero on the support would be one zero more than the mask has.
            let range = row * n..(row + 1) * n;
            let is_covered = covers(&weight[range.clone()], &keep[range.clone()]);
            if masked < *imported && is_covered {
                start[range.clone()].copy_from_slice(&weight[range.clone()]);
                start[range.clone()].iter_mut().zip(&keep[range]).for_each(|(v, keep)| *v *= f32::from(*keep));
            }
        }
        let scaled_shift = shift.as_deref().map(|shift| self.unscaled(shift));
        let (anchor, scaled) = (conditioned.scaled_alive(&weight), conditioned.scaled_alive(&start));
        let quadratic = Quadratic { anchor: &anchor, shift: scaled_shift.as_deref(), gram: conditioned.factor() };
        let refit = pcg::refit(quadratic, &scaled, &keep, Limits { steps: self.params.steps, tolerance: TOLERANCE });
        let mut solved = conditioned.restored(&refit.values, &keep, &start);
        for (row, (after, before)) in errors(&solved).into_iter().zip(&before).enumerate() {
            let fell = after < *before;
            // Not so for NaN either.
            if !fell {
                solved[row * n..][..n].copy_from_slice(&imported[row * n..][..n]);
            }
        }
        keep_kept(&mut solved, &imported);
        let rows = weight.len() / n.max(1);
        let flops = refit.flops + 3.0 * 2.0 * (rows * n * n) as f64;
        conditioned.solution(problem, solved, refit.steps, flops)
    }
    /// What each row of `solution [rows, n]` adds to the error, up to a constant of the row: `ΔGΔᵀ − 2Δ·T`, undamped.
    fn errors(&self, solution: &[f32], weight: &[f32], shift: Option<&[f32]>) -> Vec<f64> {
        let n = self.conditioned.n;
        let delta: Vec<f32> = solution.iter().zip(weight).map(|(v, w)| v - w).collect();
        let mut errors = quadratic::energies(&delta, &self.gram, n);
        if let Some(shift) = shift {
            let rows = delta.chunks(n).zip(shift.chunks(n));
            errors
                .iter_mut()
                .zip(rows)
                .for_each(|(error, (delta, shift))| *error -= 2.0 * quadratic::dot(delta, shift));
        }
        errors
    }

    /// T·D⁻¹, zero for dead channels.
    fn unscaled(&self, shift: &[f32]) -> Vec<f32> {
        let Conditioned { scale, dead, n, .. } = &self.conditioned;
        let mut out = shift.to_vec();
        for row in out.chunks_mut(*n) {
            for ((value, scale), dead) in row.iter_mut().zip(scale).zip(dead) {
                *value = if *dead { 0.0 } else { *value / scale };
            }
        }
        out
    }
}

impl GroupSolver for Group {
    fn solve_block(&self, problem: &Problem<'_>, _: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let alpha = self.params.alpha;
        let solved = self.solve_towards(alpha, problem, ctx)?;
        if alpha <= 0.0 {
            return Ok(solved);
        }
        let Some(held_out) = self.held_out.as_deref() else { return Ok(Solution { alpha: Some(alpha), ..solved }) };
        let without = self.solve_towards(0.0, problem, ctx)?;
        let (from, to) = (values(&without.weight)?, values(&solved.weight)?);
        let share = least_held_out(&values(problem.weight)?, &from, &to, held_out, blend::image)?;
        let weight = matrix(between(&from, &to, share), self.conditioned.n, problem.weight.device())?;
        let flops = solved.flops + without.flops;
        Ok(Solution { weight, alpha: Some(share * alpha), flops, ..solved })
    }
}

/// Whether a dense row has a weight wherever the mask keeps one.
fn covers(weight: &[f32], keep: &[u8]) -> bool {
    weight.iter().zip(keep).all(|(w, keep)| *keep == 0 || w.abs() > 0.0)
}

/// Where a step of the refit ended at exactly zero, the imported weight comes back: the zeros are the mask's.
fn keep_kept(solved: &mut [f32], imported: &[f32]) {
    for (value, imported) in solved.iter_mut().zip(imported) {
        if value.to_bits() & 0x7fff_ffff == 0 && imported.abs() > 0.0 {
            *value = *imported;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;
    use crate::prune::fixture::{self, LayerProblem};

    fn refit(problem: &LayerProblem, imported: &[f32], params: serde_json::Value) -> Vec<f32> {
        let ctx = SolveCtx::default();
        let (solver, _) = build(&params).unwrap();
        let imported = matrix(imported.to_vec(), problem.columns, &Device::Cpu).unwrap();
        let group = solver.prepare(Arc::clone(&problem.stats), &ctx).unwrap();
        let (weight, pattern) = (problem.tensor(), Pattern::Imported);
        let asked = Problem { tensor: "a.weight", weight: &weight, pattern, imported: Some(&imported) };
        values(&group.solve(&asked, solver.blocks(&asked).unwrap(), &ctx).unwrap().weight).unwrap()
    }

    fn row_error(problem: &LayerProblem, solved: &[f32], row: usize) -> f64 {
        let (n, gram) = (problem.columns, values(&problem.stats.gram).unwrap());
        let delta: Vec<f64> =
            (0..n).map(|j| f64::from(solved[row * n + j]) - f64::from(problem.weight[row * n + j])).collect();
        (0..n * n).map(|at| delta[at / n] * f64::from(gram[at]) * delta[at % n]).sum()
    }

    #[test]
    fn a_refit_keeps_the_support_and_reaches_the_published_error() {
        let (problem, references) = fixture::golden("smollm2_layer2_v_proj", "sparsegpt");
        for (reference, published) in references.iter().zip([0.01811, 0.06690, 0.03559]) {
            let pruned = fixture::solve("sparsegpt", json!({}), &problem, reference.pattern);
            let solved = refit(&problem, &pruned, json!({}));
            assert!(solved.iter().zip(&pruned).all(|(a, b)| (a.to_bits() == 0) == (b.to_bits() == 0)));
            let error = problem.rel_error(&solved);
            assert!(error <= published * 1.01, "{}: {error}", reference.pattern);
        }
    }

    #[test]
    fn no_row_gets_worse_than_it_was_imported() {
        let problem = fixture::random(5, 9, 24, 96);
        for method in ["magnitude", "wanda", "sparsegpt"] {
            let pruned = fixture::solve(method, json!({}), &problem, Pattern::Unstructured { sparsity: 0.6 });
            // One row is spoilt: there the dense weights are the better start.
            let mut pruned = pruned;
            pruned[..24].iter_mut().for_each(|value| *value *= -30.0);
            let solved = refit(&problem, &pruned, json!({}));
            for row in 0..9 {
                let (before, after) = (row_error(&problem, &pruned, row), row_error(&problem, &solved, row));
                assert!(after <= before * (1.0 + 1e-5), "{method}, row {row}: {before} to {after}");
            }
            assert!(problem.rel_error(&solved) < problem.rel_error(&pruned));
        }
    }

    #[test]
    fn rows_apart_give_the_same_bits() {
        let problem = fixture::random(8, 130, 40, 160);
        let pruned = fixture::solve("wanda", json!({}), &problem, Pattern::Unstructured { sparsity: 0.5 });
        let (n, whole) = (problem.columns, refit(&problem, &pruned, json!({})));
        for rows in [1, 7, 64] {
            for first in (0..130).step_by(rows) {
                let range = first * n..(first + rows).min(130) * n;
                let weight = problem.weight[range.clone()].to_vec();
                let part = LayerProblem::new(weight, problem.gram.clone(), n, 160);
                assert_eq!(refit(&part, &pruned[range.clone()], json!({})), whole[range], "{rows} rows from {first}");
            }
        }
    }

    #[test]
    fn a_target_towards_the_dense_outputs_brings_them_nearer() {
        let corrected = fixture::random_corrected(2, 12, 32, 400);
        let pruned = fixture::solve("wanda", json!({}), &corrected.problem, Pattern::Unstructured { sparsity: 0.5 });
        let error = |alpha: f64| {
            let params = json!({ "alpha": alpha, "damping": 1e-4, "steps": 60 });
            corrected.error(&refit(&corrected.problem, &pruned, params))
        };
        let (none, half, all) = (error(0.0), error(0.5), error(1.0));
        assert!(all < half && half < none, "{none} {half} {all}");
    }

    #[test]
    fn without_zeros_the_weights_are_the_f64_least_squares_towards_the_blend() {
        let (rows, n, damping) = (5, 20, 0.01);
        let corrected = fixture::random_corrected(4, rows, n, 200);
        for alpha in [0.5, 1.0] {
            let params = json!({ "alpha": alpha, "damping": damping, "steps": 400 });
            let found = refit(&corrected.problem, &corrected.problem.weight, params);
            let expected = corrected.unconstrained(alpha, damping);
            let size = expected.iter().fold(0.0f64, |size, v| size.max(v.abs()));
            // Rows leave at a residual of 1e-4 of the first one; the condition of the scaled gram is at most n/δ.
            let tolerance = 1e-4 * (n as f64 / damping).sqrt() * size;
            for (v, expected) in found.iter().zip(&expected) {
                assert!((f64::from(*v) - expected).abs() <= tolerance, "alpha {alpha}: {v} {expected}");
            }
        }
    }

    #[test]
    fn alpha_is_what_is_best_on_held_out_inputs() {
        for seed in 0..4 {
            let (corrected, unseen) = fixture::random_corrected(seed, 10, 32, 44).split(12);
            let pattern = Pattern::Unstructured { sparsity: 0.5 };
            let pruned = fixture::solve("wanda", json!({}), &corrected.problem, pattern);
            let error = |alpha: f64| {
                let params = json!({ "alpha": alpha, "damping": 1e-3, "steps": 60 });
                unseen.error(&refit(&corrected.problem, &pruned, params))
            };
            let (none, guarded) = (error(0.0), error(1.0));
            assert!(guarded <= none * (1.0 + 1e-4), "seed {seed}: {guarded} guarded, {none} without");
        }
    }

    #[test]
    fn damping_without_bounds_is_refused() {
        for damping in [json!(-0.1), json!(1e300), json!(10.5)] {
            assert!(build(&json!({ "damping": damping })).is_err(), "{damping}");
        }
        assert!(build(&json!({ "damping": 10.0 })).is_ok());
    }

    #[test]
    fn nothing_pruned_is_nothing_changed() {
        let problem = fixture::random(1, 4, 12, 40);
        for (v, w) in refit(&problem, &problem.weight, json!({})).iter().zip(&problem.weight) {
            assert!((v - w).abs() <= 1e-6 * w.abs());
        }
    }

    #[test]
    fn without_a_mask_or_with_another_shape_nothing_is_solved() {
        let problem = fixture::random(2, 4, 12, 40);
        let ctx = SolveCtx::default();
        let (solver, _) = build(&json!({})).unwrap();
        let group = solver.prepare(Arc::clone(&problem.stats), &ctx).unwrap();
        let (weight, narrow) = (problem.tensor(), matrix(vec![1.0; 24], 6, &Device::Cpu).unwrap());
        for imported in [None, Some(&narrow)] {
            let asked = Problem { tensor: "a.weight", weight: &weight, pattern: Pattern::Imported, imported };
            assert!(matches!(
                group.solve(&asked, solver.blocks(&asked).unwrap(), &ctx),
                Err(SolveError::Unsupported { .. })
            ));
        }
        assert!(solver.supports(Pattern::Unstructured { sparsity: 0.5 }).is_err());
    }
}
