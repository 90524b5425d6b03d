//! Wanda: weights go by magnitude times the size of the input they see, row by row.
//!
//! Source: Sun et al., *A Simple and Effective Pruning Approach for Large Language Models* (arXiv 2306.11695), eq. 1;
//! ALGORITHMS.md §1.
//! Deviation: row i loses as many weights as keep the total exact (`Pattern::zeros_in_part`), where the reference rounds every
//! row down; the input's size is the root of the gram's diagonal, which orders a row as the reference's running mean does.

use std::sync::Arc;

use espalier_common::pattern::Pattern;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::condition::{admit, supports_valid};
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, Solution, SolveCtx, SolveError, Solver, Statistics,
    read_params,
};
use crate::linalg::{matrix, select, values};

/// This method's row in the table.
pub const METHOD: Method =
    Method { name: NAME, version: "2", summary: "drops the smallest |weight|·‖input‖ of each row", build };

const NAME: &str = "wanda";

/// It has none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (Params {}, filled) = read_params(NAME, params, |_| Ok(()))?;
    Ok((Box::new(Wanda), filled))
}

struct Wanda;

impl Solver for Wanda {
    fn needs(&self) -> Statistics {
        Statistics::Norms
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    fn prepare(&self, stats: Arc<InputStats>, _: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        Ok(Box::new(Group { norms: norms(&stats)? }))
    }
}

/// `sqrt(G_jj)` of each input channel.
///
/// # Errors
/// `NotFinite`.
pub(crate) fn norms(stats: &InputStats) -> Result<Vec<f32>, SolveError> {
    let n = stats.gram.dim(0)?;
    let gram = values(&stats.gram)?;
    let norms: Vec<f32> = (0..n).map(|j| gram[j * n + j].sqrt()).collect();
    if norms.iter().any(|norm| !norm.is_finite()) {
        return Err(SolveError::NotFinite { what: "gram" });
    }
    Ok(norms)
}

/// Marks what stays of `weight [rows, norms.len()]`.
pub(crate) fn keep(weight: &[f32], norms: &[f32], pattern: Pattern) -> Vec<u8> {
    let columns = norms.len();
    let mut scores = weight.to_vec();
    scores.par_chunks_mut(columns.max(1)).for_each(|row| row.iter_mut().zip(norms).for_each(|(w, norm)| *w *= norm));
    let mut keep = vec![1; weight.len()];
    match pattern {
        Pattern::NofM { keep: n, of } => select::keep_n_of_m(&scores, n, of, &mut keep),
        _ => {
            select::keep_largest_per_row(
                &scores,
                columns,
                |row| pattern.zeros_in_part(row, row + 1, columns),
                &mut keep,
            );
        }
    }
    keep
}

struct Group {
    norms: Vec<f32>,
}

impl GroupSolver for Group {
    fn solve_block(&self, problem: &Problem<'_>, _: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        ctx.check_cancelled()?;
        let admitted = admit(NAME, problem, self.norms.len())?;
        let mut weight = admitted.weight;
        let keep = keep(&weight, &self.norms, problem.pattern);
        select::zero_dropped(&mut weight, &keep);
        Ok(Solution {
            weight: matrix(weight, admitted.columns, problem.weight.device())?,
            iterations: 1,
            damping: 0.0,
            damping_raised: 0,
            dead_channels: self.norms.iter().filter(|norm| **norm <= 0.0).count() as u32,
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
    fn the_mask_equals_a_sort_of_each_row() {
        let problem = fixture::random(2, 5, 12, 30);
        let pattern = Pattern::Unstructured { sparsity: 0.5 };
        let solved = fixture::solve(NAME, serde_json::json!({}), &problem, pattern);
        for (w, v) in problem.weight.chunks(12).zip(solved.chunks(12)) {
            let score = |j: usize| w[j].abs() * problem.gram[j * 13].sqrt();
            let mut order: Vec<usize> = (0..12).collect();
            order.sort_by(|&a, &b| score(a).total_cmp(&score(b)));
            assert!(order[..6].iter().all(|&j| v[j].to_bits() == 0));
            assert!(order[6..].iter().all(|&j| v[j].to_bits() == w[j].to_bits()));
        }
    }

    #[test]
    fn the_mask_does_not_change_when_rows_are_scaled() {
        let problem = fixture::random(3, 4, 16, 30);
        let doubled: Vec<f32> =
            problem.weight.iter().enumerate().map(|(i, w)| w * [4.0, 0.5, 2.0, 8.0][i / 16]).collect();
        let norms: Vec<f32> = (0..16).map(|j| problem.gram[j * 17].sqrt()).collect();
        for pattern in patterns() {
            assert_eq!(keep(&problem.weight, &norms, pattern), keep(&doubled, &norms, pattern));
        }
    }

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, serde_json::json!({}), pattern);
        }
    }

    #[test]
    fn agrees_with_the_reference_on_the_golden_problems() {
        // The reference rounds the zeros of each row down, so at 70 % it prunes up to 0.3 % fewer weights.
        fixture::assert_agrees_with_reference(NAME, serde_json::json!({}), "wanda", |_, _| (0.99, 1.01));
    }
}
