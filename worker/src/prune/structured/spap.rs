//! SPAP: which feed-forward channels go is decided by a penalty on those that are on their way out.
//!
//! Source: *SPAP: Structured Pruning via Alternating Optimization and Penalty Methods* (arXiv 2505.03373), of which the
//! abstract and the model were available: the mixed-integer problem `min ½‖VX − Y‖² s.t. V·diag(s) = 0, 1ᵀs = q`, the
//! penalty on its bilinear constraint, alternating updates, feed-forward channels only.
//! Deviation: the rest is our reconstruction (ALGORITHMS.md §6). The penalty is `½·Σ_j μ·s_j²·H_jj·‖V_:j‖²` with
//! `0 ≤ s ≤ 1, 1ᵀs = q`: its scale-free form, whose V-step is one Cholesky solve and whose s-step is `s_j = min(1, τ/h_j)`
//! with `h_j = H_jj·‖V_:j‖²` and τ found by bisection. μ starts at 0.01 and doubles; rounds end when the chosen set was the
//! same three times with a μ of at least 1. If Wanda's choice has the smaller restored error, it is taken instead. The weights
//! that stay are updated in turn: the consumer in closed form, accepted only where the held-out error falls, then up projection
//! and consumer together (see [`Sweeps`]); the gate stays.

use serde::{Deserialize, Serialize};

use super::consumer::{self, Choice, Ridge, structured_solver};
use super::{PairProblem, PairSolution, Quadratic, StructuredSolver, Sweeps, fasp, quadratic};
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::wide::{Cholesky, product};
use crate::prune::{Built, Method, ParamsError, SolveCtx, SolveError, read_params};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "3",
    summary: "structured, feed-forward channels only: a growing penalty decides which go (our reconstruction)",
    build,
};

const NAME: &str = "spap";
/// Rounds without a change of the chosen set that end the choice.
const STEADY_ROUNDS: u32 = 3;

/// Its parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of the gram's mean diagonal that is added to it.
    pub damping: f64,
    /// How far targets lean towards the dense model's outputs (1) from those on the corrected inputs (0).
    pub blend: f64,
    /// The first penalty, as a share of each input's own curvature.
    pub penalty: f64,
    /// What it is multiplied by after each round.
    pub growth: f64,
    /// Rounds at most.
    pub rounds: u32,
    /// How often up projection and consumer are updated in turn, at most; 0 for the consumer alone.
    pub sweeps: u32,
    /// What holds the auxiliary hidden states of a sweep to those that the producers give, as a share of the consumer's mean
    /// curvature.
    pub tie: f64,
}

impl Default for Params {
    fn default() -> Self {
        let Ridge { damping, blend } = Ridge::default();
        Self { damping, blend, penalty: 0.01, growth: 2.0, rounds: 20, sweeps: 2, tie: 0.1 }
    }
}

impl Params {
    fn ridge(&self) -> Ridge {
        Ridge { damping: self.damping, blend: self.blend }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| {
        if !(params.penalty > 0.0 && params.growth > 1.0 && params.penalty.is_finite() && params.growth.is_finite()) {
            return Err("penalty must be above 0 and growth above 1");
        }
        if params.rounds == 0 {
            return Err("rounds must be at least 1");
        }
        if !(params.tie > 0.0 && params.tie.is_finite()) {
            return Err("tie must be above 0");
        }
        params.ridge().check()
    })?;
    Ok((Box::new(Spap(params)), filled))
}

struct Spap(Params);

structured_solver!(Spap, |_: &Spap| NAME, |solver: &Spap| solver.0.ridge().needs());

impl StructuredSolver for Spap {
    fn cuts_attention(&self) -> bool {
        false
    }

    fn sweeps(&self) -> Option<Sweeps> {
        let Params { sweeps, tie, damping, .. } = self.0;
        (sweeps > 0).then_some(Sweeps { most: sweeps, tie, damping })
    }

    fn solve(&self, problem: &PairProblem<'_>, ctx: &SolveCtx) -> Result<PairSolution, SolveError> {
        let quadratic = Quadratic::new(problem, self.0.damping, self.0.blend)?;
        let (kept, iterations) = self.choose(&quadratic, problem.remove, ctx)?;
        let by_score = consumer::keep_best(&fasp::scores(problem, &quadratic)?, problem.remove, problem.runs);
        let (mut kept, mut weight) = (kept.clone(), quadratic.restored(&kept)?);
        if by_score != kept {
            let other = quadratic.restored(&by_score)?;
            if quadratic.error(&other) < quadratic.error(&weight) {
                (kept, weight) = (by_score, other);
            }
        }
        if let Some(held_out) = &problem.stats.held_out {
            let masked = quadratic.masked(&kept);
            let error = |solution: &[f64]| quadratic::error_on(held_out, solution, &quadratic.dense, quadratic.n);
            if error(&weight)? >= error(&masked)? {
                weight = masked;
            }
        }
        let n = quadratic.n as f64;
        let flops = f64::from(iterations) * (n.powi(3) / 3.0 + 2.0 * quadratic.rows as f64 * n * n);
        consumer::solution(problem, &quadratic, Choice { kept, weight, iterations, flops })
    }
}

impl Spap {
    /// The blocks that stay when the penalty has grown, and the rounds that took.
    fn choose(&self, quadratic: &Quadratic, remove: usize, ctx: &SolveCtx) -> Result<(Vec<usize>, u32), SolveError> {
        let Quadratic { n, block, blocks, .. } = *quadratic;
        let right = product(&quadratic.target, &quadratic.hessian, n, n);
        let mut leaving = vec![remove as f64 / blocks as f64; blocks];
        let mut penalty = self.0.penalty;
        let mut kept = Vec::new();
        let mut steady = 0;
        for round in 1..=self.0.rounds {
            ctx.check_cancelled()?;
            let mut system = quadratic.hessian.clone();
            for j in 0..blocks * block {
                system[j * n + j] *= 1.0 + penalty * leaving[j / block].powi(2);
            }
            let factor = Cholesky::new(system, n).map_err(|NotPositiveDefinite { pivot }| {
                SolveError::NotPositiveDefinite { columns: n, pivot, damping: quadratic.damping }
            })?;
            let mut weight = right.clone();
            factor.solve(&mut weight);
            let sizes = sizes(quadratic, &weight);
            leaving = leave(&sizes, remove);
            // The largest s leave: s falls as the size rises, and where several are 1 the smallest blocks leave first.
            let next = consumer::keep_best(&sizes, remove, quadratic.runs);
            // Before the penalty bites, the set is that of the dense weight and says nothing.
            steady = if next == kept && penalty >= 1.0 { steady + 1 } else { 0 };
            kept = next;
            if steady >= STEADY_ROUNDS {
                return Ok((kept, round));
            }
            penalty *= self.0.growth;
        }
        Ok((kept, self.0.rounds))
    }
}

/// `Σ H_jj·‖V_:j‖²` over the inputs of each block.
fn sizes(quadratic: &Quadratic, weight: &[f64]) -> Vec<f64> {
    let n = quadratic.n;
    let mut sums = vec![0.0; n];
    for row in weight.chunks(n) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v * v);
    }
    sums.iter_mut().enumerate().for_each(|(j, sum)| *sum *= quadratic.hessian[j * n + j]);
    sums.chunks_exact(quadratic.block).take(quadratic.blocks).map(|block| block.iter().sum()).collect()
}

/// Minimises `Σ s_j²·sizes_j` over `0 ≤ s ≤ 1, 1ᵀs = remove`: `s_j = min(1, τ/sizes_j)`.
fn leave(sizes: &[f64], remove: usize) -> Vec<f64> {
    let share = |tau: f64, size: f64| if size <= tau { 1.0 } else { tau / size };
    let (mut low, mut high) = (0.0, sizes.iter().copied().fold(0.0, f64::max));
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        let sum: f64 = sizes.iter().map(|&size| share(middle, size)).sum();
        if sum < remove as f64 { low = middle } else { high = middle }
    }
    sizes.iter().map(|&size| share(high, size)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::consumer::fixture::{self, Consumer};
    use super::*;

    #[test]
    fn obeys_the_invariants() {
        fixture::assert_obeys_invariants(NAME, false);
        fixture::assert_runs_lose_alike(NAME);
    }

    #[test]
    fn the_error_is_at_most_that_of_fasp() {
        let mut lower = 0;
        for seed in 0..20 {
            let mut consumer = Consumer::random(seed, 8, 40, 1, false);
            consumer.stats.held_out = None;
            let (ours, theirs) = (consumer.solve(NAME, &json!({}), 16), consumer.solve("fasp", &json!({}), 16));
            let (ours, theirs) = (consumer.error(&ours), consumer.error(&theirs));
            assert!(ours <= theirs * (1.0 + 1e-6), "seed {seed}: {ours} {theirs}");
            lower += usize::from(ours < theirs * 0.999);
        }
        assert!(lower >= 12, "{lower} of 20 are lower");
    }

    #[test]
    fn the_shares_that_leave_add_up_and_small_blocks_leave_first() {
        let leaving = leave(&[1.0, 4.0, 0.1, 9.0], 2);
        assert!((leaving.iter().sum::<f64>() - 2.0).abs() < 1e-9);
        assert!(leaving[2] >= leaving[0] && leaving[0] > leaving[1] && leaving[1] > leaving[3]);
        assert!(leaving.iter().all(|s| (0.0..=1.0).contains(s)));
    }

    #[test]
    fn an_update_that_does_not_generalise_is_not_accepted() {
        let mut consumer = Consumer::random(3, 5, 16, 1, false);
        // Held-out inputs that have nothing to do with the others.
        let mut foreign = consumer.stats.clone();
        foreign.held_out = None;
        let n = 16;
        let identity = (0..n * n).map(|at| f32::from(u8::from(at % n == at / n))).collect();
        foreign.gram = crate::linalg::matrix(identity, n, &candle_core::Device::Cpu).unwrap();
        consumer.stats.held_out = Some(std::sync::Arc::new(foreign));
        let solved = consumer.solve(NAME, &json!({}), 6);
        let plain = Quadratic::new(&consumer.problem(0), 0.01, 0.0).unwrap().masked(&solved.kept);
        assert!(consumer.augmented(&solved).iter().zip(plain).all(|(x, y)| (x - y).abs() < 1e-7));
    }
}
