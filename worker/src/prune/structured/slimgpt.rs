//! SlimGPT: heads and channels go by the exact rise in error after the others have made up for them.
//!
//! Source: Ling et al., *SlimGPT: Layer-wise Structured Pruning for Large Language Models* (arXiv 2412.18110): batched greedy
//! pruning of heads by grouped Cholesky factors, dynamic group size for channels; ALGORITHMS.md §5.
//! Deviation: there is no public code. A group's score is its exact cost `‖L⁻¹·W_gᵀ‖²`, where the paper sums scores of single
//! columns over a factor's diagonal. The decay of the group size from 1024 to 8 is ours, and so is the unit of attention, a
//! KV head with all its query heads: removing them unevenly would wire the survivors to the wrong KV head. The weights that
//! stay are solved for once more at the end, which only sheds the rounding of the steps.

use serde::{Deserialize, Serialize};

use super::consumer::{self, Choice, Ridge, structured_solver};
use super::group_obs::Shrinking;
use super::{PairProblem, PairSolution, Quadratic, StructuredSolver};
use crate::prune::{Built, Method, ParamsError, SolveCtx, SolveError, read_params};

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "2",
    summary: "structured: removes heads and channels by their exact cost, the others make up for them",
    build,
};

const NAME: &str = "slimgpt";

/// Its parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of the gram's mean diagonal that is added to it.
    pub damping: f64,
    /// How far targets lean towards the dense model's outputs (1) from those on the corrected inputs (0).
    pub blend: f64,
    /// Channels that go in one step at first.
    pub largest_group: usize,
    /// Channels that go in one step at last.
    pub smallest_group: usize,
    /// Whether attention heads go too.
    pub heads: bool,
}

impl Default for Params {
    fn default() -> Self {
        let Ridge { damping, blend } = Ridge::default();
        Self { damping, blend, largest_group: 1024, smallest_group: 8, heads: true }
    }
}

impl Params {
    fn ridge(&self) -> Ridge {
        Ridge { damping: self.damping, blend: self.blend }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| {
        let Params { largest_group, smallest_group, .. } = *params;
        if smallest_group == 0 || smallest_group > largest_group {
            return Err("smallest_group must be at least 1 and at most largest_group");
        }
        params.ridge().check()
    })?;
    Ok((Box::new(SlimGpt(params)), filled))
}

struct SlimGpt(Params);

structured_solver!(SlimGpt, |_: &SlimGpt| NAME, |solver: &SlimGpt| solver.0.ridge().needs());

impl StructuredSolver for SlimGpt {
    fn cuts_attention(&self) -> bool {
        self.0.heads
    }

    fn solve(&self, problem: &PairProblem<'_>, ctx: &SolveCtx) -> Result<PairSolution, SolveError> {
        let quadratic = Quadratic::new(problem, self.0.damping, self.0.blend)?;
        let mut shrinking = Shrinking::new(&quadratic);
        let mut kept: Vec<usize> = (0..quadratic.blocks).collect();
        let (mut iterations, mut flops) = (0, 0.0);
        let mut left = problem.remove;
        while left > 0 {
            ctx.check_cancelled()?;
            // Heads are few and large: they go one at a time, or one of each run.
            let step = if quadratic.block * quadratic.runs > 1 { quadratic.runs } else { self.step(left) };
            let groups: Vec<Vec<usize>> =
                kept.iter().map(|&b| (b * quadratic.block..(b + 1) * quadratic.block).collect()).collect();
            let costs = if quadratic.block > 1 {
                shrinking.costs_of_groups(&groups)?
            } else {
                shrinking.costs_of_columns(&kept)
            };
            let stay = consumer::keep_best(&costs, step, quadratic.runs);
            let gone: Vec<usize> = (0..groups.len())
                .filter(|at| stay.binary_search(at).is_err())
                .flat_map(|at| groups[at].clone())
                .collect();
            shrinking.remove(&gone)?;
            kept = stay.into_iter().map(|at| kept[at]).collect();
            flops += shrinking.flops(gone.len());
            left -= step;
            iterations += 1;
        }
        let weight = quadratic.restored(&kept)?;
        consumer::solution(problem, &quadratic, Choice { kept, weight, iterations: iterations.max(1), flops })
    }
}

impl SlimGpt {
    /// Channels that go in the next step when `left` have to go: a power of two, about a quarter of them.
    fn step(&self, left: usize) -> usize {
        let quarter = (left / 4).max(1);
        (1 << quarter.ilog2()).clamp(self.0.smallest_group, self.0.largest_group).min(left)
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
    fn groups_shrink_from_1024_to_8() {
        let solver = SlimGpt(Params::default());
        let steps: Vec<usize> = [14336, 4096, 768, 100, 31, 9, 3].map(|left| solver.step(left)).into();
        assert_eq!(steps, [1024, 1024, 128, 16, 8, 8, 3]);
    }

    #[test]
    fn the_first_head_to_go_is_the_one_whose_loss_can_best_be_made_up_for() {
        for seed in 0..6 {
            let consumer = Consumer::random(seed, 6, 24, 4, seed % 2 == 0);
            let quadratic = Quadratic::new(&consumer.problem(0), 0.01, 0.0).unwrap();
            let error = |gone: usize| {
                let kept: Vec<usize> = (0..6).filter(|&head| head != gone).collect();
                quadratic.error(&quadratic.restored(&kept).unwrap())
            };
            let best = (0..6).min_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap();
            let solved = consumer.solve(NAME, &json!({}), 1);
            assert!(!solved.kept.contains(&best), "seed {seed}: {best} stays in {:?}", solved.kept);
        }
    }

    #[test]
    fn single_steps_are_at_least_as_good_as_one_large_one_on_most_problems() {
        let better = (0..20)
            .filter(|&seed| {
                let consumer = Consumer::random(seed, 8, 40, 1, false);
                let fine = consumer.solve(NAME, &json!({ "largest_group": 1, "smallest_group": 1 }), 20);
                let coarse = consumer.solve(NAME, &json!({ "largest_group": 20, "smallest_group": 20 }), 20);
                consumer.error(&fine) <= consumer.error(&coarse) * (1.0 + 1e-9)
            })
            .count();
        assert!(better >= 17, "{better} of 20");
    }

    #[test]
    fn wrong_parameters_are_refused() {
        for wrong in [json!({ "smallest_group": 0 }), json!({ "damping": -1.0 }), json!({ "blend": 2.0 })] {
            assert!(build(&wrong).is_err(), "{wrong}");
        }
    }
}
