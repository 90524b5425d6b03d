//! FISTAPruner: an ℓ1-regularised least squares per matrix, rounded to the pattern, with λ found by bisection.
//!
//! Source: Zhao et al., *FISTAPruner* (arXiv 2408.03728); ALGORITHMS.md §3.
//! Deviation: where the paper is silent, λ starts at 1e-3·max|C|, its bracket grows by a factor of eight until it is one, and is
//! then halved geometrically, for at most 24 rounds: 12 end before the patience does on some matrices. A λ that leaves more zeros
//! than asked for is too large, whatever the rounding's share, and its solution is not taken. The warm start is the better of
//! SparseGPT's and Wanda's unless the job names one, where the paper has one for OPT and the other for LLaMA; a weight that has
//! the zeros already starts from itself. Errors and gradients come from the gram and cross products. The paper calibrates each
//! layer on the dense model's inputs: a job has to ask for that with `propagation = "dense"`, for which inputs a layer sees is
//! no business of its method.

use std::sync::Arc;

use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use pulp::Arch;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::admm::{self, Budget};
use super::condition::{SharedFlops, admit, supports_valid};
use super::sparsegpt::{self, Compensation};
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, Solution, SolveCtx, SolveError, Solver, Statistics,
    read_params, wanda,
};
use crate::linalg::gemm::{product, row_tile};
use crate::linalg::prox::soft_threshold;
use crate::linalg::quadratic::{Correction, dot, energy};
use crate::linalg::symmetric::Symmetric;
use crate::linalg::{matrix, select, spectral, values};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "5",
    summary: "an l1 problem by FISTA, rounded; its weight by bisection on the rounding's share of the error",
    build,
};

const NAME: &str = "fista";
const MOST_ROUNDS: u32 = 24;
/// By how much λ moves while only one end of its bracket is known.
const BRACKET_GROWTH: f64 = 8.0;

/// Where the first round starts, and what the result is never worse than.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarmStart {
    /// SparseGPT's solution, as the paper does for OPT.
    SparseGpt,
    /// Wanda's solution, as the paper does for LLaMA.
    Wanda,
    /// Whichever of the two has the lower error.
    Auto,
}

/// Parameters of FISTAPruner.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The first solution.
    pub warm_start: WarmStart,
    /// K: iterations for one λ.
    pub max_iters: u32,
    /// Relative change of the iterate that ends them early.
    pub tolerance: f64,
    /// ξ: above this share of the error due to rounding, λ grows.
    pub rounding_share: f64,
    /// T: rounds without a better solution that end the search for λ.
    pub patience: u32,
    /// First λ, as a share of max|C|.
    pub lambda: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            warm_start: WarmStart::Auto,
            max_iters: 20,
            tolerance: 1e-4,
            rounding_share: 0.3,
            patience: 3,
            lambda: 1e-3,
        }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| match params {
        Params { max_iters: 0, .. } => Err("max_iters must be at least 1"),
        Params { patience: 0, .. } => Err("patience must be at least 1"),
        Params { lambda, .. } if !(1e-12..=1.0).contains(lambda) => Err("lambda must lie between 1e-12 and 1"),
        Params { rounding_share, .. } if !(0.0..=1.0).contains(rounding_share) => {
            Err("rounding_share must lie between 0 and 1")
        }
        Params { tolerance, .. } if !(0.0..1.0).contains(tolerance) => Err("tolerance must be at least 0 and below 1"),
        _ => Ok(()),
    })?;
    Ok((Box::new(Fista { params }), filled))
}

struct Fista {
    params: Params,
}

impl Solver for Fista {
    fn needs(&self) -> Statistics {
        Statistics::GramAndCross
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        let n = stats.gram.dim(0)?;
        let gram = values(&stats.gram)?;
        if gram.iter().any(|value| !value.is_finite()) {
            return Err(SolveError::NotFinite { what: "gram" });
        }
        let correction = match &stats.dense {
            Some(dense) => {
                let (cross, dense) = (values(&dense.cross)?, values(&dense.gram)?);
                if cross.iter().chain(&dense).any(|value| !value.is_finite()) {
                    return Err(SolveError::NotFinite { what: "cross" });
                }
                Some(Correction::new(&gram, &cross, &dense, n))
            }
            None => None,
        };
        let lipschitz = spectral::largest_eigenvalue(&gram, n);
        let compensation = match self.params.warm_start {
            WarmStart::Wanda => None,
            WarmStart::SparseGpt | WarmStart::Auto => Some(Compensation::new(&stats, sparsegpt::Params::default())?),
        };
        let norms = wanda::norms(&stats)?;
        let shared = SharedFlops::new(if compensation.is_some() { 2.0 / 3.0 * (n as f64).powi(3) } else { 0.0 });
        let factor = Symmetric::new(&gram);
        Ok(Box::new(Group { n, gram, factor, correction, lipschitz, compensation, norms, shared, params: self.params }))
    }

    /// The search for λ takes some 400 iterations on models that it was tried on.
    fn effort(&self, columns: usize) -> Effort {
        Effort { common_flops: 2 * (columns as u64).pow(3) / 3, ..admm::effort(columns, 1, 400) }
    }
}

struct Group {
    n: usize,
    gram: Vec<f32>,
    factor: Symmetric,
    correction: Option<Correction>,
    lipschitz: f64,
    compensation: Option<Compensation>,
    norms: Vec<f32>,
    shared: SharedFlops,
    params: Params,
}

/// `½‖V·X̂ᵀ − W·Xᵀ‖² / tokens + λ·Σ|V|` without its λ.
pub(crate) struct Lasso<'a> {
    /// W, `[rows, n]`.
    pub(crate) weight: &'a [f32],
    /// C − W·G, `[rows, n]`; `None` if X̂ = X.
    pub(crate) shift: Option<&'a [f32]>,
    /// G, `[n, n]`.
    pub(crate) gram: &'a [f32],
    /// The same as a factor of products.
    pub(crate) factor: &'a Symmetric,
    /// At least λ_max(G).
    pub(crate) lipschitz: f64,
    /// Width.
    pub(crate) n: usize,
}

impl Lasso<'_> {
    /// At most `max_iters` iterations of FISTA from `start [rows, n]`; stops when the iterate's relative change is at most
    /// `tolerance`. Returns the solution and the iterations taken.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(crate) fn solve(
        &self,
        start: &[f32],
        lambda: f64,
        max_iters: u32,
        tolerance: f64,
        ctx: &SolveCtx,
    ) -> Result<(Vec<f32>, u32), SolveError> {
        let n = self.n;
        let tile = row_tile(start.len() / n) * n;
        let step = (1.0 / self.lipschitz.max(f64::MIN_POSITIVE)) as f32;
        let threshold = lambda as f32 * step;
        let mut v = start.to_vec();
        let mut z = start.to_vec();
        let mut t = 1.0f64;
        for iteration in 1..=max_iters {
            ctx.check_cancelled()?;
            let next_t = (1.0 + (1.0 + 4.0 * t * t).sqrt()) / 2.0;
            let momentum = ((t - 1.0) / next_t) as f32;
            t = next_t;
            let norms: Vec<(f64, f64)> = v
                .par_chunks_mut(tile)
                .zip(z.par_chunks_mut(tile))
                .enumerate()
                .map(|(index, (v, z))| {
                    let range = index * tile..index * tile + v.len();
                    let weight = &self.weight[range.clone()];
                    // Z − (ZG − C)/L = Z + ((W − Z)G + T)/L
                    let mut ahead: Vec<f32> = weight.iter().zip(&*z).map(|(w, z)| w - z).collect();
                    self.factor.multiply(z, 1.0, &ahead, step);
                    if let Some(shift) = self.shift {
                        z.iter_mut().zip(&shift[range]).for_each(|(z, t)| *z += step * t);
                    }
                    let moves = &mut ahead;
                    Arch::new().dispatch(
                        #[inline(always)]
                        || {
                            for ((v, z), moved) in v.iter_mut().zip(z).zip(&mut *moves) {
                                let next = soft_threshold(*z, threshold);
                                *moved = next - *v;
                                *z = next + momentum * *moved;
                                *v = next;
                            }
                        },
                    );
                    (dot(moves, moves), dot(v, v))
                })
                .collect();
            let (change, size) = norms.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
            if change.sqrt() <= tolerance * size.sqrt() {
                return Ok((v, iteration));
            }
        }
        Ok((v, max_iters))
    }

    /// ‖V·X̂ᵀ − W·Xᵀ‖² / tokens, less what does not depend on V.
    fn error(&self, v: &[f32]) -> f64 {
        let delta: Vec<f32> = v.iter().zip(self.weight).map(|(v, w)| v - w).collect();
        energy(&delta, self.gram, self.n) - 2.0 * self.shift.map_or(0.0, |shift| dot(&delta, shift))
    }

    /// max|C|: from this λ on, zero is optimal.
    fn largest_lambda(&self) -> f64 {
        let mut c = self.factor.product(self.weight);
        if let Some(shift) = self.shift {
            c.iter_mut().zip(shift).for_each(|(c, t)| *c += t);
        }
        f64::from(c.iter().fold(0.0f32, |a, c| a.max(c.abs())))
    }
}

/// The search for λ: a bracket that first grows and is then halved geometrically.
#[derive(Debug, Clone, Copy)]
struct Bracket {
    low: Option<f64>,
    high: Option<f64>,
}

impl Bracket {
    fn next(&mut self, lambda: f64, grow: bool) -> f64 {
        if grow {
            self.low = Some(lambda);
        } else {
            self.high = Some(lambda);
        }
        match (self.low, self.high) {
            (Some(low), Some(high)) => (low * high).sqrt(),
            (Some(low), None) => low * BRACKET_GROWTH,
            (None, Some(high)) => high / BRACKET_GROWTH,
            (None, None) => lambda,
        }
    }
}

impl Group {
    /// The best warm start and its error; the weight itself if it has the zeros already.
    fn warm_start(
        &self,
        lasso: &Lasso<'_>,
        budget: Budget,
        ctx: &SolveCtx,
    ) -> Result<(Vec<f32>, Vec<u8>, f64), SolveError> {
        let pattern = budget.pattern;
        let with_error = |(mut values, keep): (Vec<f32>, Vec<u8>)| {
            select::zero_dropped(&mut values, &keep);
            let error = lasso.error(&values);
            (values, keep, error)
        };
        let mut kept = vec![1; lasso.weight.len()];
        budget.project(lasso.weight, &mut kept);
        if lasso.weight.iter().zip(&kept).all(|(w, keep)| *keep == 1 || w.abs() <= 0.0) {
            return Ok(with_error((lasso.weight.to_vec(), kept)));
        }
        let compensated = || -> Result<_, SolveError> {
            let Some(compensation) = &self.compensation else { return Ok(None) };
            let mut values = lasso.weight.to_vec();
            let (keep, _) = compensation.prune(&mut values, pattern, ctx)?;
            Ok(Some(with_error((values, keep))))
        };
        let masked = || with_error((lasso.weight.to_vec(), wanda::keep(lasso.weight, &self.norms, pattern)));
        Ok(match (self.params.warm_start, compensated()?) {
            (WarmStart::Wanda, _) | (_, None) => masked(),
            (WarmStart::SparseGpt, Some(compensated)) => compensated,
            (WarmStart::Auto, Some(compensated)) => {
                let masked = masked();
                if masked.2 < compensated.2 { masked } else { compensated }
            }
        })
    }
}

impl GroupSolver for Group {
    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let admitted = admit(NAME, problem, self.n)?;
        let (rows, n, weight) = (admitted.rows, self.n, admitted.weight);
        let dead_channels = self.norms.iter().filter(|norm| **norm <= 0.0).count() as u32;
        let finish = |values, iterations, flops| -> Result<Solution, SolveError> {
            let weight = matrix(values, n, problem.weight.device())?;
            let damping = self.compensation.as_ref().map_or(0.0, Compensation::damping);
            let damping_raised = self.compensation.as_ref().map_or(0, Compensation::damping_raised);
            Ok(Solution { weight, iterations, damping, damping_raised, dead_channels, alpha: None, flops })
        };
        if zeros == 0 {
            return finish(weight, 0, 0.0);
        }
        let shift = self.correction.as_ref().map(|correction| product(&weight, &correction.towards_dense, n, n));
        let Self { gram, factor, lipschitz, .. } = self;
        let shift = shift.as_deref();
        let lasso = Lasso { weight: &weight, shift, gram, factor, lipschitz: *lipschitz, n };
        // What of the error no V can change; it counts in the share that rounding has.
        let constant = self.correction.as_ref().map_or(0.0, |c| energy(&weight, &c.gap, n));
        let distance = |error: f64| (error + constant).max(0.0).sqrt();

        let budget = Budget { pattern: problem.pattern, zeros };
        let (mut best, mut best_keep, mut best_error) = self.warm_start(&lasso, budget, ctx)?;
        let mut lambda = self.params.lambda * lasso.largest_lambda();
        let mut bracket = Bracket { low: None, high: None };
        let (mut iterations, mut rounds, mut stale) = (0, 0, 0);
        // Without a target of its own, a weight that has the zeros is its own best solution.
        let is_solved = shift.is_none() && best_error <= 0.0;
        while !is_solved && rounds < MOST_ROUNDS && stale < self.params.patience && lambda > 0.0 {
            let (params, start) = (&self.params, &best);
            let (mut solved, taken) = lasso.solve(start, lambda, params.max_iters, params.tolerance, ctx)?;
            iterations += taken;
            rounds += 1;
            let relaxed = distance(lasso.error(&solved));
            let mut keep = vec![1; solved.len()];
            budget.project(&solved, &mut keep);
            select::zero_dropped(&mut solved, &keep);
            let error = lasso.error(&solved);
            let total = distance(error);
            // More zeros than asked for: this λ is too large, whatever the rounding's share.
            let overshot = keep.iter().zip(&solved).zip(&weight).enumerate().any(|(index, ((keep, v), w))| {
                *keep == 1 && v.to_bits() == 0 && w.abs() > 0.0 && self.norms[index % n] > 0.0
            });
            lambda = bracket.next(lambda, !overshot && total - relaxed > self.params.rounding_share * total);
            stale += 1;
            if !overshot && error < best_error {
                (best, best_keep, best_error, stale) = (solved, keep, error, 0);
            }
        }
        // A dead channel's weights have no gradient: those that were kept are the dense ones.
        for (index, value) in best.iter_mut().enumerate() {
            if best_keep[index] == 1 && self.norms[index % n] <= 0.0 {
                *value = weight[index];
            }
        }
        let products = f64::from(iterations + 2 * rounds + 3);
        finish(best, iterations, products * 2.0 * (rows * n) as f64 * n as f64 + self.shared.take())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::oracle;
    use crate::prune::fixture::{self, LayerProblem, patterns};

    /// A lasso over a random problem, with a target of its own.
    fn with_lasso(seed: u64, test: impl FnOnce(Lasso<'_>)) {
        let problem = fixture::random(seed, 6, 16, 64);
        let shift: Vec<f32> = oracle::random(seed + 7, 96).iter().map(|t| 0.1 * t).collect();
        let lipschitz = spectral::largest_eigenvalue(&problem.gram, 16);
        let (gram, factor) = (&problem.gram, &Symmetric::new(&problem.gram));
        test(Lasso { weight: &problem.weight, shift: Some(&shift), gram, factor, lipschitz, n: 16 });
    }

    /// (VG − C) in f64.
    fn gradient(lasso: &Lasso<'_>, v: &[f32]) -> Vec<f64> {
        let delta: Vec<f64> = v.iter().zip(lasso.weight).map(|(v, w)| f64::from(*v) - f64::from(*w)).collect();
        let mut out = oracle::product(&delta, &oracle::wide(lasso.gram), lasso.n, lasso.n);
        out.iter_mut().zip(lasso.shift.unwrap()).for_each(|(g, t)| *g -= f64::from(*t));
        out
    }

    fn objective(lasso: &Lasso<'_>, v: &[f32], lambda: f64) -> f64 {
        0.5 * lasso.error(v) + lambda * v.iter().map(|v| f64::from(v.abs())).sum::<f64>()
    }

    #[test]
    fn solution_satisfies_the_kkt_conditions_of_the_lasso() {
        for seed in 0..5 {
            with_lasso(seed, |lasso| {
                let lambda = 0.05 * lasso.largest_lambda();
                let (v, _) = lasso.solve(&vec![0.0; 96], lambda, 20_000, 0.0, &SolveCtx::default()).unwrap();
                assert!(v.iter().any(|v| v.to_bits() == 0) && v.iter().any(|v| v.to_bits() != 0));
                for (v, g) in v.iter().zip(gradient(&lasso, &v)) {
                    let slack =
                        if v.to_bits() == 0 { g.abs() - lambda } else { (g + lambda * f64::from(v.signum())).abs() };
                    assert!(slack < 1e-4 * lasso.lipschitz, "v={v} gradient={g} lambda={lambda}");
                }
            });
        }
    }

    #[test]
    fn the_objective_converges_at_the_rate_of_the_theorem() {
        with_lasso(3, |lasso| {
            let lambda = 0.02 * lasso.largest_lambda();
            let solve = |iters| lasso.solve(&vec![0.0; 96], lambda, iters, 0.0, &SolveCtx::default()).unwrap().0;
            let best = solve(20_000);
            let distance: f64 = best.iter().map(|v| f64::from(*v).powi(2)).sum();
            for k in 1..60 {
                let bound = 2.0 * lasso.lipschitz * distance / f64::from(k + 1).powi(2);
                let gap = objective(&lasso, &solve(k), lambda) - objective(&lasso, &best, lambda);
                assert!(gap <= bound + 1e-6, "k={k}: {gap} {bound}");
            }
        });
    }

    #[test]
    fn a_lambda_of_max_c_leaves_zero_and_none_leaves_the_unconstrained_optimum() {
        with_lasso(4, |lasso| {
            let zero = vec![0.0; 96];
            let at = |lambda| lasso.solve(&zero, lambda, 20_000, 0.0, &SolveCtx::default()).unwrap().0;
            assert_eq!(at(lasso.largest_lambda() * 1.0001), zero);
            assert!(gradient(&lasso, &at(0.0)).iter().all(|g| g.abs() < 1e-4 * lasso.lipschitz));
        });
    }

    #[test]
    fn without_momentum_the_objective_never_grows() {
        with_lasso(6, |lasso| {
            let lambda = 0.05 * lasso.largest_lambda();
            let (mut v, mut last) = (vec![0.0; 96], f64::INFINITY);
            for step in 0..200 {
                // The first iteration of a solve has no momentum yet.
                v = lasso.solve(&v, lambda, 1, 0.0, &SolveCtx::default()).unwrap().0;
                let now = objective(&lasso, &v, lambda);
                assert!(now <= last + 1e-6, "step {step}: {last} to {now}");
                last = now;
            }
        });
    }

    #[test]
    fn defaults_are_the_papers() {
        let Params { warm_start, max_iters, tolerance, rounding_share, patience, lambda } = Params::default();
        assert_eq!((warm_start, max_iters, patience), (WarmStart::Auto, 20, 3));
        assert!((rounding_share - 0.3).abs() < 1e-12);
        assert!((tolerance - 1e-4).abs() < 1e-12 && (lambda - 1e-3).abs() < 1e-12);
    }

    #[test]
    fn targets_of_the_dense_model_bring_its_outputs_nearer_and_never_worse_than_the_warm_start() {
        for seed in 0..2 {
            let corrected = fixture::random_corrected(seed, 12, 32, 400);
            let blind = LayerProblem::new(
                corrected.problem.weight.clone(),
                corrected.problem.gram.clone(),
                corrected.problem.columns,
                400,
            );
            for pattern in [patterns()[0], patterns()[2]] {
                for start in ["wanda", "sparsegpt"] {
                    let on = |problem: &LayerProblem| {
                        corrected.error(&fixture::solve(NAME, json!({ "warm_start": start }), problem, pattern))
                    };
                    let warm = corrected.error(&fixture::solve(start, json!({}), &corrected.problem, pattern));
                    let (seeing, blind) = (on(&corrected.problem), on(&blind));
                    assert!(seeing <= warm * (1.0 + 1e-4), "seed {seed}, {start}, {pattern}: {warm} to {seeing}");
                    assert!(seeing < blind, "seed {seed}, {start}, {pattern}: {seeing} with targets, {blind} without");
                }
            }
        }
    }

    #[test]
    fn the_bracket_stays_in_order_whatever_rounding_says() {
        for seed in 0..200u64 {
            let mut bracket = Bracket { low: None, high: None };
            let mut lambda = 1.0;
            for round in 0..MOST_ROUNDS {
                lambda = bracket.next(lambda, ((seed * 0x9e37_79b9) >> round) & 1 == 1);
                if let (Some(low), Some(high)) = (bracket.low, bracket.high) {
                    assert!(low <= lambda && lambda <= high && low <= high, "seed {seed}: {low} {lambda} {high}");
                }
                assert!(lambda > 0.0 && lambda.is_finite());
            }
        }
    }

    #[test]
    fn the_bracket_grows_until_it_is_one_and_is_then_halved() {
        let mut bracket = Bracket { low: None, high: None };
        assert!((bracket.next(1.0, true) - 8.0).abs() < 1e-12);
        assert!((bracket.next(8.0, false) - 8.0f64.sqrt()).abs() < 1e-12);
        let middle = bracket.next(8.0f64.sqrt(), true);
        assert!(middle > 8.0f64.sqrt() && middle < 8.0);
    }

    #[test]
    fn the_result_is_never_worse_than_its_warm_start() {
        for pattern in patterns() {
            let problem = fixture::random(5, 20, 40, 160);
            let warm = problem.rel_error(&fixture::solve("sparsegpt", json!({}), &problem, pattern));
            let masked = problem.rel_error(&fixture::solve("wanda", json!({}), &problem, pattern));
            let from = |start: &str| {
                problem.rel_error(&fixture::solve(NAME, json!({ "warm_start": start }), &problem, pattern))
            };
            assert!(from("sparsegpt") <= warm * 1.000_01, "{pattern}");
            assert!(from("wanda") <= masked * 1.000_01, "{pattern}");
            assert!(from("auto") <= warm.min(masked) * 1.000_01, "{pattern}");
        }
    }

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, json!({}), pattern);
        }
    }

    #[test]
    fn the_error_on_the_real_problem_is_at_or_below_the_published_reading() {
        let (problem, references) = fixture::golden("smollm2_layer2_v_proj", "sparsegpt");
        for (reference, floor) in references.iter().zip([0.01953, 0.07174, 0.03809]) {
            let solved = fixture::solve(NAME, json!({ "warm_start": "sparsegpt" }), &problem, reference.pattern);
            let error = problem.rel_error(&solved);
            assert!(error <= floor * 1.01, "{}: {error}", reference.pattern);
        }
    }
}
