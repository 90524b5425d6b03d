//! Magnitude pruning: the smallest weights go.
//!
//! Source: ALGORITHMS.md §1.
//! Deviation: the number of zeros is exact and ties go by index; the reference prunes everything up to a threshold.

use std::sync::Arc;

use espalier_common::pattern::Pattern;
use serde::{Deserialize, Serialize};

use super::condition::{admit, supports_valid};
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, Solution, SolveCtx, SolveError, Solver, Statistics,
    read_params,
};
use crate::linalg::{matrix, select};

/// This method's row in the table.
pub const METHOD: Method =
    Method { name: NAME, version: "1", summary: "drops the smallest weights; needs no calibration", build };

const NAME: &str = "magnitude";

/// It has none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (Params {}, filled) = read_params(NAME, params, |_| Ok(()))?;
    Ok((Box::new(Magnitude), filled))
}

struct Magnitude;

impl Solver for Magnitude {
    fn needs(&self) -> Statistics {
        Statistics::Nothing
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    fn prepare(&self, _: Arc<InputStats>, _: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        Ok(Box::new(Magnitude))
    }
}

impl GroupSolver for Magnitude {
    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        ctx.check_cancelled()?;
        let admitted = admit(NAME, problem, problem.weight.dim(1)?)?;
        let mut weight = admitted.weight;
        let mut keep = vec![1; weight.len()];
        match problem.pattern {
            Pattern::NofM { keep: n, of } => select::keep_n_of_m(&weight, n, of, &mut keep),
            _ => select::keep_largest(&weight, zeros, &mut keep),
        }
        select::zero_dropped(&mut weight, &keep);
        Ok(Solution {
            weight: matrix(weight, admitted.columns, problem.weight.device())?,
            iterations: 1,
            damping: 0.0,
            damping_raised: 0,
            dead_channels: 0,
            alpha: None,
            flops: 0.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::fixture::{self, patterns};

    #[test]
    fn the_smallest_weights_go_and_the_others_stay() {
        let problem = fixture::random(1, 6, 20, 40);
        let solved = fixture::solve(NAME, serde_json::json!({}), &problem, Pattern::Unstructured { sparsity: 0.35 });
        let largest_dropped = problem.dropped(&solved).fold(0.0f32, |a, w| a.max(w.abs()));
        assert!(problem.kept(&solved).all(|(w, v)| w.to_bits() == v.to_bits() && w.abs() >= largest_dropped));
    }

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, serde_json::json!({}), pattern);
        }
    }
}
