//! The target blend α: 0 for the dense weight's outputs on the inputs at hand, 1 for the dense model's outputs. How much of it
//! is taken is decided on inputs that no solve has seen.
//!
//! Source: ALGORITHMS.md §0, target blend; §11, hazards 6 and 7: with few tokens, targets towards the dense model's outputs fit
//! the tokens and not the model.

use super::verify::rel_error;
use super::{InputStats, Problem, Solution, SolveError};
use crate::linalg::values;

/// What is tried beside the α that was asked for, as shares of it.
const LESS: [f64; 2] = [0.5, 0.0];

/// Solves with `alpha`, with half of it and with none, and keeps the solution with the least error on the held-out inputs; the
/// larger α of equals. Without held-out inputs `alpha` is taken as it is: jobs are refused that would have it so.
///
/// # Errors
/// Those of `solve`, and what the tensor backend says.
pub(super) fn least_held_out(
    alpha: f64,
    problem: &Problem<'_>,
    held_out: Option<&InputStats>,
    solve: impl Fn(f64) -> Result<Solution, SolveError>,
) -> Result<Solution, SolveError> {
    let first = solve(alpha)?;
    if alpha <= 0.0 {
        return Ok(first);
    }
    let mut best = Solution { alpha: Some(alpha), ..first };
    let Some(held_out) = held_out else { return Ok(best) };
    let dense = values(problem.weight)?;
    let error = |solution: &Solution| rel_error(&values(&solution.weight)?, &dense, held_out);
    let (mut least, mut flops) = (error(&best)?, best.flops);
    for share in LESS {
        let solution = solve(share * alpha)?;
        flops += solution.flops;
        let found = error(&solution)?;
        if found < least {
            (least, best) = (found, Solution { alpha: Some(share * alpha), ..solution });
        }
    }
    Ok(Solution { flops, ..best })
}
