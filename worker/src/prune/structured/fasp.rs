//! FASP: blocks go by the Wanda score of their columns, and the others make up for them in closed form.
//!
//! Source: Hu et al., *FASP: Fast and Accurate Structured Pruning of Large Language Models* (arXiv 2501.09412): the coupled
//! pairs, the score `Σ_i |W_ij|·‖X_j‖`, the restoration `V_Q = C_Q·(G_QQ + δI)⁻¹`; ALGORITHMS.md §7.
//! Deviation: in attention the paper removes single channels of v and o and leaves q and k, which no stock runtime can load
//! as a smaller model. That is `[pattern] attention = "channels"`, for the masked layout alone; as many go of each head,
//! and with grouped queries a channel's score is the sum over the query heads that share it. By default whole KV heads go with
//! their query heads, by the sum of their columns' scores. The bias is fitted with the weight.

use serde::{Deserialize, Serialize};

use super::consumer::{self, Choice, Ridge, structured_solver};
use super::{PairProblem, PairSolution, Quadratic, StructuredSolver};
use crate::prune::wanda::norms;
use crate::prune::{Built, Method, ParamsError, SolveCtx, SolveError, read_params};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "2",
    summary: "structured: removes heads and channels by Wanda's score, the others make up for them",
    build,
};

const NAME: &str = "fasp";

/// Its parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of the gram's mean diagonal that is added to it.
    pub damping: f64,
    /// How far targets lean towards the dense model's outputs (1) from those on the corrected inputs (0).
    pub blend: f64,
    /// Whether attention heads go too.
    pub heads: bool,
}

impl Default for Params {
    fn default() -> Self {
        let Ridge { damping, blend } = Ridge::default();
        Self { damping, blend, heads: true }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (Params { damping, blend, heads }, filled) =
        read_params(NAME, params, |params: &Params| Ridge { damping: params.damping, blend: params.blend }.check())?;
    Ok((Box::new(Fasp { ridge: Ridge { damping, blend }, heads }), filled))
}

/// `Σ |W_ij|·‖X_j‖` over the columns of each block.
pub(super) fn scores(problem: &PairProblem<'_>, quadratic: &Quadratic) -> Result<Vec<f64>, SolveError> {
    let norms = norms(problem.stats)?;
    let mut sums = vec![0.0; quadratic.n];
    for row in quadratic.dense.chunks(quadratic.n) {
        sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += w.abs());
    }
    let scores: Vec<f64> = sums.iter().zip(norms).map(|(sum, norm)| sum * f64::from(norm)).collect();
    Ok(scores.chunks_exact(quadratic.block).take(quadratic.blocks).map(|block| block.iter().sum()).collect())
}

struct Fasp {
    ridge: Ridge,
    heads: bool,
}

structured_solver!(Fasp, |_: &Fasp| NAME, |solver: &Fasp| solver.ridge.needs());

impl StructuredSolver for Fasp {
    fn cuts_attention(&self) -> bool {
        self.heads
    }

    fn solve(&self, problem: &PairProblem<'_>, ctx: &SolveCtx) -> Result<PairSolution, SolveError> {
        let quadratic = Quadratic::new(problem, self.ridge.damping, self.ridge.blend)?;
        ctx.check_cancelled()?;
        let kept = consumer::keep_best(&scores(problem, &quadratic)?, problem.remove, problem.runs);
        let weight = quadratic.restored(&kept)?;
        consumer::solution(problem, &quadratic, Choice { kept, weight, iterations: 1, flops: 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::consumer::fixture::{self, Consumer};
    use super::*;

    #[test]
    fn obeys_the_invariants() {
        fixture::assert_obeys_invariants(NAME, true);
        fixture::assert_runs_lose_alike(NAME);
    }

    #[test]
    fn the_bias_makes_up_for_the_mean_of_channels_that_went() {
        // Inputs with a mean: without fitting the bias, part of the error is a constant.
        let consumer = Consumer::random(7, 6, 16, 1, true);
        let solved = consumer.solve(NAME, &json!({}), 6);
        let fitted = consumer.error(&solved);
        let unfitted = consumer.error(&PairSolution { bias: consumer.bias.clone(), ..solved });
        assert!(fitted < unfitted, "{fitted} {unfitted}");
    }
}
