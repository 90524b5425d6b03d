//! Espalier's own method, the default: a scaled ADMM with a continuation ramp finds the support, conjugate gradients refit it.
//!
//! Source: ALGORITHMS.md §9.4, stages B to D; the iteration is ALPS' (arXiv 2406.07831).
//! Deviation from ALPS: ρ grows on a fixed ramp instead of following the support's changes, so that sublayers of a group share
//! their factorisations; the support is that of the feasible copy D; the target may blend in the dense model's outputs (α).

mod footing;
mod ramp;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::footing::{Footing, UNCONSTRAINED, is_laid};
pub use self::ramp::Profile;
pub(super) use self::ramp::Ramp;
use super::admm::{self, Budget, Inverses, Search};
use super::blend::{self, between, least_held_out};
use super::condition::{Conditioned, admit, all_finite, supports_valid};
use super::on_device::OnDevice;
use super::on_device::espalier::DeviceGroup;
use super::{
    Built, Groundwork, GroupSolver, InputStats, Method, ParamsError, Problem, RowBlock, Solution, SolveCtx, SolveError,
    Solver, Statistics, read_params,
};
use crate::linalg::gemm::product;
use crate::linalg::pcg::{self, Limits, Quadratic};
use crate::linalg::{held, select, slices, transposed};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "9",
    summary: "the default: ADMM on a continuation ramp, then a refit on its support",
    build,
};

pub(super) const NAME: &str = "espalier";
/// Steps of the ramp that a search takes at most, but for the best of profiles.
const RAMP_STEPS: usize = 16;
/// Steps of the ramp whose inverses a block makes rather than wait for another's.
const LOOK_AHEAD: usize = 3;
pub(super) const MOST_ITERATIONS: u32 = 300;
/// Rows that a processor solves together: enough for its products.
const ROWS: usize = 144;
/// Fewer than this make its products slower.
const LEAST_ROWS: usize = 96;
/// Blocks of a matrix that has the rows: whoever is through first waits for others with a part of one.
const BLOCKS: usize = 6;
/// The same of a GPU: products of fewer rows do not fill it. An H100 reaches 28 TFLOP/s with 144 rows of 4096 columns, 50 with these.
const ROWS_ON_DEVICE: usize = 1024;
/// The largest block of rows: no matrix has as many.
const MOST_ROWS: usize = 1 << 24;

/// Parameters of Espalier.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Quality against time.
    pub profile: Profile,
    /// Target blend: 0 for the dense weight's outputs on the inputs at hand, 1 for the dense model's outputs. Above 0 it needs
    /// held-out sequences: each block of rows takes as much of it as is best on them. Where a job holds some out, 0.5 is usual.
    pub alpha: f64,
    /// Share of the gram's mean diagonal added to it, pulling towards the dense weight.
    pub damping: f64,
    /// Most rows that are solved together, which is what workers share; 0 for the whole matrix, however large. Where it is not
    /// said: [`ROWS`], fewer where that would be fewer than six blocks; [`ROWS_ON_DEVICE`] for a weight that is on another device than
    /// the CPU.
    pub row_block: Option<usize>,
    /// Most steps of the refit.
    pub refit_steps: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { profile: Profile::Balanced, alpha: 0.0, damping: 0.01, row_block: None, refit_steps: 12 }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| match params {
        Params { alpha, .. } if !(0.0..=1.0).contains(alpha) => Err("alpha must lie between 0 and 1"),
        Params { damping, .. } if !(0.0..=10.0).contains(damping) => Err("damping must lie between 0 and 10"),
        Params { row_block: Some(rows), .. } if *rows > MOST_ROWS => Err("row_block must be at most 16777216"),
        _ => Ok(()),
    })?;
    Ok((Box::new(Espalier { params }), filled))
}

struct Espalier {
    params: Params,
}

impl Espalier {
    fn group(&self, stats: &InputStats) -> Result<Group, SolveError> {
        Group::new(Arc::new(Footing::new(&stats.gram, self.params)?), stats)
    }
}

impl OnDevice for Espalier {
    fn prepare_on(
        &self,
        stats: Arc<InputStats>,
        device: &Device,
        ctx: &SolveCtx,
    ) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        Ok(Box::new(DeviceGroup::new(self.group(&stats)?, device)?))
    }
}

impl Solver for Espalier {
    fn needs(&self) -> Statistics {
        if self.params.alpha > 0.0 { Statistics::GramAndCross } else { Statistics::Gram }
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    /// As many rows as there may be at most, the blocks as even as multiples of 16 allow. There is but one if the inverses of the
    /// whole ramp cannot be remembered: each block would make them anew.
    fn blocks(&self, problem: &Problem<'_>) -> Result<Vec<RowBlock>, SolveError> {
        let (rows, columns) = problem.weight.dims2()?;
        let usual = if problem.weight.device().is_cpu() { usual_rows(rows) } else { ROWS_ON_DEVICE };
        let height = match self.params.row_block.unwrap_or(usual) {
            most if most > 0 && Inverses::remembers(columns, RAMP_STEPS) => {
                rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(16)
            }
            _ => rows,
        };
        RowBlock::each(problem, height)
    }

    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        Ok(Box::new(self.group(&stats)?))
    }

    fn groundwork(&self, gram: &Tensor, ctx: &SolveCtx) -> Result<Option<Arc<dyn Groundwork>>, SolveError> {
        ctx.check_cancelled()?;
        Ok(if is_laid(gram.dim(1)?) { Some(Arc::new(Footing::new(gram, self.params)?)) } else { None })
    }

    fn on_device(&self) -> Option<&dyn OnDevice> {
        Some(self)
    }

    fn needs_held_out(&self) -> bool {
        self.params.alpha > 0.0
    }

    fn effort(&self, columns: usize) -> Effort {
        let Params { profile, alpha, row_block, refit_steps, .. } = self.params;
        let steps = profile.usual_steps();
        let is_remembered = Inverses::remembers(columns, RAMP_STEPS);
        let row_block = row_block.unwrap_or(ROWS);
        let is_cut = row_block > 0 && is_remembered;
        let inverses = steps + usize::from(alpha > 0.0);
        let parts = if is_laid(columns) { inverses - steps + profile.least_steps().min(steps) } else { 0 };
        // A look at the gradient comes before the refit, and one at the end.
        let products = steps * Ramp::CHECK_EVERY as usize + refit_steps + 2;
        // A target blend: what it is and where it would lead; a second refit, and two products with held-out inputs.
        let blended = if alpha > 0.0 { 2 + refit_steps + 2 + 2 } else { 0 };
        let effort = admm::effort(columns, inverses, products + blended);
        Effort {
            common_flops: (inverses - parts) as u64 * effort.part_flops,
            parts,
            block_rows: if is_cut { row_block } else { 0 },
            is_shared: true,
            kept_bytes: if is_remembered { effort.kept_bytes } else { admm::effort(columns, 1, 0).kept_bytes },
            ..effort
        }
    }
}

/// Rows that a processor solves together of a matrix of so many.
fn usual_rows(rows: usize) -> usize {
    (rows / BLOCKS).clamp(LEAST_ROWS, ROWS)
}

/// `(K − G)ᵀD⁻¹ [n, n]`, so that `α·W` times it is `T = (C_α − W·G)D⁻¹`; zero for dead channels.
fn towards_dense(conditioned: &Conditioned, gram: &Tensor, cross: &Tensor) -> Result<Vec<f32>, SolveError> {
    let n = conditioned.n;
    let statistics = [gram.clone(), cross.clone()];
    let statistics = held(&statistics);
    let [gram, cross] = slices(&statistics)?[..] else { unreachable!("as many slices as tensors") };
    if !all_finite(cross) {
        return Err(SolveError::NotFinite { what: "cross" });
    }
    let mut out = transposed(cross, n);
    out.par_chunks_mut(n.max(1)).zip(gram.par_chunks(n.max(1))).for_each(|(row, gram)| {
        for (j, (value, gram)) in row.iter_mut().zip(gram).enumerate() {
            let gap = f64::from(*value) - f64::from(*gram);
            *value = if conditioned.dead[j] { 0.0 } else { (gap / f64::from(conditioned.scale[j])) as f32 };
        }
    });
    Ok(out)
}

/// A group whose statistics are all there.
pub(super) struct Group {
    footing: Arc<Footing>,
    pub(super) towards_dense: Option<Vec<f32>>,
    /// What decides how much of the way is gone.
    pub(super) held_out: Option<Arc<InputStats>>,
}

impl Group {
    fn new(footing: Arc<Footing>, stats: &InputStats) -> Result<Self, SolveError> {
        let towards_dense = match &stats.dense {
            Some(dense) if footing.is_blended() => {
                Some(towards_dense(&footing.conditioned, &stats.gram, &dense.cross)?)
            }
            _ => None,
        };
        Ok(Self { footing, towards_dense, held_out: stats.held_out.clone() })
    }

    /// The statistics.
    pub(super) fn conditioned(&self) -> &Arc<Conditioned> {
        &self.footing.conditioned
    }

    /// What a search begins with.
    pub(super) fn ramp(&self) -> Ramp {
        self.footing.ramp()
    }

    /// The α that was asked for.
    pub(super) fn alpha(&self) -> f64 {
        self.footing.params.alpha
    }

    /// Most steps of the refit.
    pub(super) fn refit_steps(&self) -> usize {
        self.footing.params.refit_steps
    }

    /// V̂° = Ŵ + T·Ĝ⁻¹, what the weights would be without a pattern.
    fn unconstrained(&self, anchor: &[f32], shift: Option<&[f32]>) -> Result<Vec<f32>, SolveError> {
        let Some(shift) = shift else { return Ok(anchor.to_vec()) };
        // Remembered with those of the ramp: every block asks for it.
        let (inverse, _) = self.footing.inverses.at(UNCONSTRAINED, [])?;
        let mut out = inverse.product(shift);
        out.iter_mut().zip(anchor).for_each(|(v, w)| *v += w);
        Ok(out)
    }

    /// What an α makes of a weight, and where its search starts.
    fn start(&self, alpha: f64, weight: &[f32]) -> Result<Start, SolveError> {
        let n = self.conditioned().n;
        let anchor = self.conditioned().scaled_alive(weight);
        let towards_dense = self.towards_dense.as_ref().filter(|_| alpha > 0.0);
        let shift = towards_dense.map(|towards| shifted(alpha, product(weight, towards, n, n)));
        let free = self.unconstrained(&anchor, shift.as_deref())?;
        Ok(Start { anchor, shift, free })
    }

    /// Searches with the target `C_α`, refits towards it and, where α is guarded, towards `C_0` on the same support.
    fn search(
        &self,
        problem: &Problem<'_>,
        weight: &[f32],
        zeros: usize,
        ctx: &SolveCtx,
    ) -> Result<Solution, SolveError> {
        let (alpha, n) = (self.footing.params.alpha, self.conditioned().n);
        let Start { anchor, shift, free } = self.start(alpha, weight)?;
        let shift = shift.as_deref();
        let mut search = Search::new(free, &anchor, shift, n, Budget { pattern: problem.pattern, zeros });

        let mut ramp = self.ramp();
        let (mut iterations, mut flops) = (0, 0.0);
        while iterations < MOST_ITERATIONS {
            let (inverse, spent) = self.footing.inverses.at(ramp.rho(), ramp.ahead().take(LOOK_AHEAD))?;
            flops += spent;
            for _ in 0..Ramp::CHECK_EVERY {
                ctx.check_cancelled()?;
                search.step(&inverse, ramp.rho(), ramp.sigma());
            }
            iterations += Ramp::CHECK_EVERY;
            if search.support_change().1 < Ramp::SETTLED {
                break;
            }
            ramp.advance();
        }
        flops += f64::from(iterations) * 2.0 * (weight.len() * n) as f64;

        let (start, keep) = search.finish();
        let limits = Limits { steps: self.footing.params.refit_steps, tolerance: 1e-8 };
        let gram = self.conditioned().factor();
        let refit = |shift, start: &[f32]| pcg::refit(Quadratic { anchor: &anchor, shift, gram }, start, &keep, limits);
        let restored = |scaled: &[f32]| self.conditioned().restored(scaled, &keep, weight);
        let towards = refit(shift, &start);
        flops += towards.flops;
        let mut values = restored(&towards.values);
        let mut taken = (alpha > 0.0).then_some(alpha);
        if let Some((taken, held_out)) = taken.as_mut().zip(self.held_out.as_deref()) {
            let without = refit(None, &towards.values);
            flops += without.flops;
            let without = restored(&without.values);
            let share = least_held_out(weight, &without, &values, held_out, blend::image)?;
            values = between(&without, &values, share);
            *taken *= share;
        }
        Ok(Solution { alpha: taken, ..self.conditioned().solution(problem, values, iterations, flops)? })
    }
}

/// Where a search starts.
struct Start {
    /// Ŵ, `[rows, n]`.
    anchor: Vec<f32>,
    /// T, `[rows, n]`, if it is not zero.
    shift: Option<Vec<f32>>,
    /// V̂°, `[rows, n]`.
    free: Vec<f32>,
}

/// `α·T`.
fn shifted(alpha: f64, mut shift: Vec<f32>) -> Vec<f32> {
    shift.iter_mut().for_each(|value| *value = (alpha * f64::from(*value)) as f32);
    shift
}

impl GroupSolver for Group {
    /// A block gets as many as it has among the smallest values of the whole Ŵ, its weights by the length of their inputs.
    ///
    /// Deviation: the search begins with V̂°. Dealing by that would take two products more with the whole matrix, and let other workers
    /// wait.
    fn deal(&self, problem: &Problem<'_>, blocks: &mut [RowBlock]) -> Result<(), SolveError> {
        if blocks.len() <= 1 || matches!(problem.pattern, Pattern::NofM { .. }) {
            return Ok(());
        }
        let (rows, n) = problem.weight.dims2()?;
        let scaled = self.conditioned().scaled_alive(&admit(NAME, problem, self.conditioned().n)?.weight);
        let mut keep = vec![1; scaled.len()];
        select::keep_largest(&scaled, problem.pattern.zeros(rows, n), &mut keep);
        for block in blocks {
            let keep = &keep[block.first * n..(block.first + block.rows) * n];
            block.zeros = keep.iter().filter(|keep| **keep == 0).count();
        }
        Ok(())
    }

    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let weight = admit(NAME, problem, self.conditioned().n)?.weight;
        if zeros == 0 {
            return self.conditioned().solution(problem, weight, 0, 0.0);
        }
        self.search(problem, &weight, zeros, ctx)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::values;
    use crate::prune::fixture::{self, LayerProblem, patterns};

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, json!({}), pattern);
        }
        fixture::assert_obeys_invariants(NAME, json!({ "row_block": 3, "profile": "fast" }), patterns()[1]);
    }

    #[test]
    fn the_error_is_at_or_below_the_authors_alps() {
        for file in ["synthetic_64x96", "smollm2_layer2_v_proj"] {
            let (problem, references) = fixture::golden(file, "alps");
            for (profile, most) in [("fast", 1.03), ("balanced", 1.002), ("best", 0.998)] {
                for reference in &references {
                    let solved = fixture::solve(NAME, json!({ "profile": profile }), &problem, reference.pattern);
                    fixture::assert_obeys(&solved, problem.columns, reference.pattern);
                    let ratio = problem.rel_error(&solved) / reference.error;
                    assert!(ratio <= most, "{file} {profile} {}: {ratio:.4} of ALPS' error", reference.pattern);
                }
            }
        }
    }

    #[test]
    fn matrices_are_cut_into_six_blocks_unless_these_were_too_small_or_too_large() {
        assert_eq!([192, 576, 768, 1536, 4096].map(usual_rows), [96, 96, 128, 144, 144]);
    }

    #[test]
    fn zeros_are_dealt_out_to_the_last_and_blocks_are_even() {
        let (problem, _) = fixture::golden("smollm2_layer2_v_proj", "alps");
        let pattern = Pattern::Unstructured { sparsity: 0.5 };
        let (solver, _) = build(&json!({ "row_block": 50 })).unwrap();
        let group = solver.prepare(Arc::clone(&problem.stats), &SolveCtx::default()).unwrap();
        let weight = problem.tensor();
        let problem_of_it = Problem { tensor: "w", weight: &weight, pattern, imported: None };
        let mut blocks = solver.blocks(&problem_of_it).unwrap();
        group.deal(&problem_of_it, &mut blocks).unwrap();
        let rows = problem.weight.len() / problem.columns;
        assert_eq!(blocks.iter().map(|block| block.rows).collect::<Vec<_>>(), [48; 4]);
        assert_eq!(blocks.iter().map(|block| block.zeros).sum::<usize>(), pattern.zeros(rows, problem.columns));
        // By rank over the whole matrix, in loops: rows that lie among the smallest lose more.
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let scaled = conditioned.scaled_alive(&problem.weight);
        let mut order: Vec<usize> = (0..scaled.len()).collect();
        order.sort_by(|&a, &b| scaled[a].abs().total_cmp(&scaled[b].abs()));
        let mut dealt = [0; 4];
        order[..pattern.zeros(rows, problem.columns)].iter().for_each(|i| dealt[i / problem.columns / 48] += 1);
        assert_eq!(blocks.iter().map(|block| block.zeros).collect::<Vec<_>>(), dealt);
        assert!(dealt.iter().any(|zeros| *zeros != dealt[0]), "a real layer's rows are not alike");
    }

    #[test]
    fn a_target_blend_is_chosen_by_blocks_too() {
        let corrected = fixture::random_corrected(2, 48, 32, 200);
        let weight = corrected.problem.tensor();
        for alpha in [0.0, 0.5] {
            let (solver, _) = build(&json!({ "row_block": 16, "alpha": alpha })).unwrap();
            let problem = Problem { tensor: "w", weight: &weight, pattern: patterns()[0], imported: None };
            assert_eq!(solver.blocks(&problem).unwrap().len(), 3, "{alpha}");
        }
    }

    #[test]
    fn the_support_beats_magnitudes() {
        assert!(fixture::better_supports_than_magnitude(NAME) >= 19);
    }

    #[test]
    fn a_target_towards_the_dense_outputs_brings_them_nearer() {
        for seed in 0..4 {
            let corrected = fixture::random_corrected(seed, 12, 32, 400);
            for pattern in [patterns()[0], patterns()[2]] {
                let error = |alpha: f64| {
                    let params = json!({ "alpha": alpha, "damping": 1e-4 });
                    corrected.error(&fixture::solve(NAME, params, &corrected.problem, pattern))
                };
                let (none, half, all) = (error(0.0), error(0.5), error(1.0));
                assert!(all < half && half < none, "seed {seed}, {pattern}: {none} {half} {all}");
            }
        }
    }

    #[test]
    fn without_a_pattern_the_weights_are_the_f64_least_squares_towards_the_blend() {
        let (rows, n, damping) = (5, 20, 0.01);
        let corrected = fixture::random_corrected(3, rows, n, 200);
        let problem = &corrected.problem;
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, damping, |_| Ok(())).unwrap();
        let dense = problem.stats.dense.as_ref().unwrap();
        let towards_dense = Some(towards_dense(&conditioned, &problem.stats.gram, &dense.cross).unwrap());
        let footing = Footing::new(&problem.stats.gram, Params::default()).unwrap();
        let group = Group { footing: Arc::new(footing), towards_dense, held_out: None };
        for alpha in [0.5, 1.0] {
            let expected = corrected.unconstrained(alpha, damping);
            let found = group.start(alpha, &problem.weight).unwrap().free;
            // The condition of the scaled gram is at most n/δ.
            let size = expected.iter().fold(0.0f64, |size, v| size.max(v.abs()));
            let tolerance = 4.0 * n as f64 / damping * f64::from(f32::EPSILON) * size;
            for (at, (v, expected)) in found.iter().zip(&expected).enumerate() {
                let v = f64::from(v / conditioned.scale[at % n]);
                assert!((v - expected).abs() <= tolerance, "alpha {alpha}: {v} {expected}");
            }
        }
    }

    #[test]
    fn alpha_is_what_is_best_on_held_out_inputs() {
        let mut taken = Vec::new();
        for seed in 0..6 {
            // Few tokens for many inputs: targets of other outputs are fitted to them.
            let split = || fixture::random_corrected(seed, 10, 32, 24 + 40 * seed as usize).split(12);
            let ((problem, unseen), (mut unguarded, _)) = (split(), split());
            unguarded.problem.stats = Arc::new(InputStats { held_out: None, ..(*problem.problem.stats).clone() });
            let solved = |problem: &LayerProblem| {
                let params = json!({ "alpha": 1.0, "damping": 1e-3 });
                let solution = fixture::solution(NAME, &params, problem, patterns()[0]);
                (unseen.error(&values(&solution.weight).unwrap()), solution.alpha.unwrap())
            };
            let ((guarded, alpha), (all, asked)) = (solved(&problem.problem), solved(&unguarded.problem));
            assert!((asked - 1.0).abs() < 1e-12 && (0.0..=1.0).contains(&alpha), "seed {seed}: {asked} {alpha}");
            assert!(guarded <= all * (1.0 + 1e-6), "seed {seed}: {guarded} with alpha {alpha}, {all} with all of it");
            taken.push(alpha);
        }
        assert!(taken.iter().any(|alpha| *alpha < 0.9) && taken.iter().any(|alpha| *alpha >= 1.0), "{taken:?}");
    }

    #[test]
    fn a_block_takes_its_own_alpha_and_the_report_the_mean() {
        let (problem, _) = fixture::random_corrected(3, 32, 32, 160).split(24);
        let pattern = Pattern::NofM { keep: 2, of: 4 };
        let solved = |problem: &LayerProblem| {
            fixture::solution(NAME, &json!({ "alpha": 1.0, "row_block": 16 }), problem, pattern)
        };
        let whole = solved(&problem.problem);
        let blocks = problem.problem.weight.chunks(16 * 32).map(|rows| {
            let (mut part, _) = fixture::random_corrected(3, 16, 32, 160).split(24);
            part.problem.weight = rows.to_vec();
            solved(&part.problem)
        });
        let blocks: Vec<_> = blocks.collect();
        let rows: Vec<f32> = blocks.iter().flat_map(|block| values(&block.weight).unwrap()).collect();
        assert_eq!(values(&whole.weight).unwrap(), rows);
        let alphas: Vec<f64> = blocks.iter().map(|block| block.alpha.unwrap()).collect();
        assert!((alphas[0] - alphas[1]).abs() > 1e-9, "{alphas:?}");
        assert!((whole.alpha.unwrap() - alphas.iter().sum::<f64>() / 2.0).abs() < 1e-12, "{alphas:?}");
    }

    #[test]
    fn bad_parameters_are_refused() {
        for params in [
            json!({ "profile": "slow" }),
            json!({ "alpha": 1.5 }),
            json!({ "damping": -1 }),
            json!({ "row_block": 1u64 << 63 }),
        ] {
            assert!(build(&params).is_err(), "{params}");
        }
    }
}
