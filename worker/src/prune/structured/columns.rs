//! The baselines: blocks go by a score of their columns, and nothing makes up for them.
//!
//! Source: ALGORITHMS.md §1 (the scores of single weights), §7 (summed over a column). `wanda-columns` sums
//! `|W_ij|·‖X_j‖`, which is what FASP chooses by; `magnitude-columns` sums `W_ij²` and looks at no input.

use serde::{Deserialize, Serialize};

use super::consumer::{self, Choice, Ridge, structured_solver};
use super::{PairProblem, PairSolution, Quadratic, StructuredSolver, fasp};
use crate::prune::{Built, Method, ParamsError, SolveCtx, SolveError, Statistics, read_params};

/// Wanda's row in the table.
pub const WANDA: Method = Method {
    name: WANDA_NAME,
    version: "1",
    summary: "structured: removes heads and channels by Wanda's score; nothing makes up for them",
    build: |params| build(WANDA_NAME, Score::Wanda, params),
};

/// Magnitude's row in the table.
pub const MAGNITUDE: Method = Method {
    name: MAGNITUDE_NAME,
    version: "2",
    summary: "structured: removes the heads and channels with the smallest weights; nothing makes up for them",
    build: |params| build(MAGNITUDE_NAME, Score::Magnitude, params),
};

const WANDA_NAME: &str = "wanda-columns";
const MAGNITUDE_NAME: &str = "magnitude-columns";

/// Their parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Whether attention heads go too.
    pub heads: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { heads: true }
    }
}

#[derive(Debug, Clone, Copy)]
enum Score {
    Magnitude,
    Wanda,
}

struct Columns {
    name: &'static str,
    score: Score,
    heads: bool,
}

fn build(name: &'static str, score: Score, params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (Params { heads }, filled) = read_params(name, params, |_| Ok(()))?;
    Ok((Box::new(Columns { name, score, heads }), filled))
}

// Norms even for magnitude: the error of what is left is measured on the inputs.
structured_solver!(Columns, |solver: &Columns| solver.name, |_: &Columns| Statistics::Norms);

impl StructuredSolver for Columns {
    fn cuts_attention(&self) -> bool {
        self.heads
    }

    fn solve(&self, problem: &PairProblem<'_>, ctx: &SolveCtx) -> Result<PairSolution, SolveError> {
        let quadratic = Quadratic::new(problem, Ridge::default().damping, 0.0)?;
        ctx.check_cancelled()?;
        let scores = match self.score {
            Score::Wanda => fasp::scores(problem, &quadratic)?,
            Score::Magnitude => squares(&quadratic),
        };
        let kept = consumer::keep_best(&scores, problem.remove, problem.runs);
        let weight = quadratic.masked(&kept);
        consumer::solution(problem, &quadratic, Choice { kept, weight, iterations: 1, flops: 0.0 })
    }
}

/// `Σ W_ij²` over the columns of each block.
fn squares(quadratic: &Quadratic) -> Vec<f64> {
    let mut sums = vec![0.0; quadratic.n];
    for row in quadratic.dense.chunks(quadratic.n) {
        sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += w * w);
    }
    sums.chunks_exact(quadratic.block).take(quadratic.blocks).map(|block| block.iter().sum()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::consumer::fixture::{self, Consumer};
    use super::*;
    use crate::linalg::values;

    #[test]
    fn obey_the_invariants() {
        for method in [WANDA_NAME, MAGNITUDE_NAME] {
            fixture::assert_obeys_invariants(method, true);
            fixture::assert_runs_lose_alike(method);
        }
    }

    #[test]
    fn the_choices_equal_a_sort_by_the_definition() {
        let consumer = Consumer::random(3, 5, 12, 3, false);
        let (weight, gram) = (values(&consumer.weight).unwrap(), values(&consumer.stats.gram).unwrap());
        let sum = |block: usize, of: &dyn Fn(usize, usize) -> f32| -> f32 {
            (block * 3..(block + 1) * 3).map(|j| (0..5).map(|i| of(i, j)).sum::<f32>()).sum()
        };
        let wanda = |i: usize, j: usize| weight[i * 12 + j].abs() * gram[j * 13].sqrt();
        let magnitude = |i: usize, j: usize| weight[i * 12 + j].powi(2);
        let best = |of: &dyn Fn(usize, usize) -> f32| {
            let mut order: Vec<usize> = (0..4).collect();
            order.sort_by(|&a, &b| sum(a, of).total_cmp(&sum(b, of)));
            let mut kept = order[2..].to_vec();
            kept.sort_unstable();
            kept
        };
        for (method, expected) in
            [("fasp", best(&wanda)), (WANDA_NAME, best(&wanda)), (MAGNITUDE_NAME, best(&magnitude))]
        {
            assert_eq!(consumer.solve(method, &json!({}), 2).kept, expected, "{method}");
        }
    }

    #[test]
    fn what_stays_is_as_it_was_and_restoring_lowers_the_error() {
        for seed in 0..6 {
            let consumer = Consumer::random(seed, 5, 20, 1, seed % 2 == 1);
            let (plain, restored) = (consumer.solve(WANDA_NAME, &json!({}), 8), consumer.solve("fasp", &json!({}), 8));
            assert_eq!(plain.kept, restored.kept);
            let (before, after) = (values(&consumer.weight).unwrap(), values(&plain.weight).unwrap());
            for (at, (w, v)) in before.iter().zip(after).enumerate() {
                assert!(v.to_bits() == if plain.kept.contains(&(at % 20)) { w.to_bits() } else { 0 });
            }
            assert!(consumer.error(&restored) < consumer.error(&plain), "seed {seed}");
        }
    }
}
