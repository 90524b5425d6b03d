//! ALPS: ADMM with a data-driven penalty finds the support, conjugate gradients the weights on it.
//!
//! Source: Meng et al., *ALPS* (arXiv 2406.07831), algorithms 1 and 2, and the schedule of the authors' code; ALGORITHMS.md §4.
//! Deviation: inverses come from Cholesky factorisations, see [`super::admm`]; the conjugate gradients take one product a step
//! and keep a row only if its error fell. Dead channels are damped and nothing else, as by the authors: see Espalier for better.

use std::sync::Arc;

use espalier_common::pattern::Pattern;
use serde::{Deserialize, Serialize};

use super::admm::{Budget, Inverses, Search};
use super::condition::{Conditioned, admit, supports_valid};
use super::{
    Built, GroupSolver, InputStats, Method, ParamsError, Problem, Solution, SolveCtx, SolveError, Solver, Statistics,
    read_params,
};
use crate::linalg::pcg::{self, Limits, Quadratic};
use crate::linalg::select;

/// This method's row in the table.
pub const METHOD: Method = Method {
    name: NAME,
    version: "1",
    summary: "ADMM finds the support, conjugate gradients the weights on it",
    build,
};

const NAME: &str = "alps";
/// Iterations between two looks at the support.
const CHECK_EVERY: u32 = 3;
const LARGEST_RHO: f32 = 1e6;

/// Parameters of ALPS.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// First penalty ρ, relative to the unit diagonal of the scaled gram.
    pub rho: f32,
    /// Most iterations of ADMM.
    pub max_iters: u32,
    /// From this iteration on, a support change below 0.03 % ends the search.
    pub switch_iter: u32,
    /// Steps of conjugate gradients on the support.
    pub cg_iters: usize,
    /// Share of the gram's mean diagonal added to it.
    pub damping: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { rho: 0.1, max_iters: 300, switch_iter: 30, cg_iters: 10, damping: 0.01 }
    }
}

fn build(params: &serde_json::Value) -> Result<Built, ParamsError> {
    let (params, filled) = read_params(NAME, params, |params: &Params| match params {
        Params { rho, .. } if !(1e-4..=1e4).contains(rho) => Err("rho must lie between 1e-4 and 1e4"),
        Params { max_iters: 0, .. } => Err("max_iters must be at least 1"),
        Params { damping, .. } if !(0.0..=10.0).contains(damping) => Err("damping must lie between 0 and 10"),
        _ => Ok(()),
    })?;
    Ok((Box::new(Alps { params }), filled))
}

struct Alps {
    params: Params,
}

impl Solver for Alps {
    fn needs(&self) -> Statistics {
        Statistics::Gram
    }

    fn supports(&self, pattern: Pattern) -> Result<(), SolveError> {
        supports_valid(NAME, pattern)
    }

    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError> {
        ctx.check_cancelled()?;
        let (conditioned, ()) = Conditioned::factored(&stats.gram, self.params.damping, |_| Ok(()))?;
        let conditioned = Arc::new(conditioned);
        let inverses = Inverses::new(Arc::clone(&conditioned));
        Ok(Box::new(Group { conditioned, inverses, params: self.params }))
    }
}

struct Group {
    conditioned: Arc<Conditioned>,
    inverses: Inverses,
    params: Params,
}

/// What to do after a look at the support.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Verdict {
    /// Go on with this penalty.
    Continue(f32),
    /// The penalty was too large from the start: begin anew with a smaller one.
    Restart(f32),
    Stop,
}

/// Source: ALPS, eq. 28, with the two safety branches of the authors' code.
#[derive(Debug, Clone, Copy, Default)]
struct Schedule {
    /// Whether the support has moved enough to show that ρ is small enough.
    started: bool,
}

impl Schedule {
    fn judge(&mut self, rho: f32, changed: usize, share: f64) -> Verdict {
        let grown = |factor: f32| Verdict::Continue((rho * factor).min(LARGEST_RHO));
        if share > 0.005 {
            self.started = true;
            return grown(if share > 0.1 { 1.3 } else { 1.2 });
        }
        match (changed, self.started) {
            (0, true) => Verdict::Stop,
            (_, true) => grown(1.1),
            (_, false) => Verdict::Restart(rho / 5.0),
        }
    }
}

impl GroupSolver for Group {
    fn solve(&self, problem: &Problem<'_>, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let admitted = admit(NAME, problem, self.conditioned.n)?;
        let (rows, n) = (admitted.rows, admitted.columns);
        if problem.pattern.zeros(rows, n) == 0 {
            return self.conditioned.solution(problem, admitted.weight, 0, 0.0);
        }
        let anchor = self.conditioned.scaled(&admitted.weight);
        let budget = Budget { pattern: problem.pattern, row_block: None };
        let begin = || Search::new(anchor.clone(), &anchor, None, n, budget);
        let mut search = begin();
        let mut schedule = Schedule::default();
        let mut rho = self.params.rho;
        let (mut inverse, mut flops) = self.inverses.at(rho)?;
        let mut iterations = 0;
        while iterations < self.params.max_iters {
            ctx.check_cancelled()?;
            search.step(&inverse, rho, 1.0);
            iterations += 1;
            if !iterations.is_multiple_of(CHECK_EVERY) {
                continue;
            }
            let (changed, share) = search.support_change();
            match schedule.judge(rho, changed, share) {
                Verdict::Stop => break,
                Verdict::Continue(next) => rho = next,
                // A penalty that no restart gets moving has nothing left to move.
                Verdict::Restart(next) if next < 1e-6 => break,
                Verdict::Restart(next) => {
                    rho = next;
                    search = begin();
                }
            }
            if iterations > self.params.switch_iter && share < 3e-4 {
                break;
            }
            let spent;
            (inverse, spent) = self.inverses.at(rho)?;
            flops += spent;
        }
        let (primal, keep) = search.primal();
        let mut start = primal.to_vec();
        select::zero_dropped(&mut start, &keep);
        let quadratic = Quadratic { anchor: &anchor, shift: None, gram: &self.conditioned.gram, n };
        // The authors' code runs all its steps; rows leave here once they are at the bottom in f32.
        let limits = Limits { steps: self.params.cg_iters, tolerance: 1e-12 };
        let refit = pcg::refit(quadratic, &start, &keep, limits);
        flops += f64::from(iterations) * 2.0 * (rows * n) as f64 * n as f64 + refit.flops;
        let values = self.conditioned.restored(&refit.values, &keep, &admitted.weight);
        self.conditioned.solution(problem, values, iterations, flops)
    }

    fn row_block(&self) -> Option<usize> {
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::prune::fixture::{self, patterns};

    #[test]
    fn the_schedule_is_the_authors() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.judge(1.0, 3, 0.001), Verdict::Restart(0.2));
        assert_eq!(schedule.judge(1.0, 0, 0.0), Verdict::Restart(0.2));
        assert_eq!(schedule.judge(1.0, 300, 0.2), Verdict::Continue(1.3));
        assert_eq!(schedule.judge(1.0, 30, 0.01), Verdict::Continue(1.2));
        assert_eq!(schedule.judge(1.0, 3, 0.001), Verdict::Continue(1.1));
        assert_eq!(schedule.judge(9.9e5, 300, 0.2), Verdict::Continue(1e6));
        assert_eq!(schedule.judge(1.0, 0, 0.0), Verdict::Stop);
    }

    #[test]
    fn every_pattern_is_met_exactly() {
        for pattern in patterns() {
            fixture::assert_obeys_invariants(NAME, json!({}), pattern);
        }
    }

    #[test]
    fn agrees_with_the_authors_code_on_the_golden_problems() {
        // Unstructured, the trajectory on the real problem is chaotic: multiplying all weights by 1.1 (which changes rounding
        // and nothing else) moves 1.6 % of our own support at 50 %, and 4.2 % at 70 %, at the same error to 0.03 %.
        fixture::assert_agrees_with_reference(NAME, json!({}), "alps", |file, pattern| match pattern {
            Pattern::Unstructured { .. } if file.starts_with("smollm2") => (0.95, 1.005),
            _ => (0.99, 1.005),
        });
    }

    #[test]
    fn bad_parameters_are_refused() {
        for params in [json!({ "rho": 0.0 }), json!({ "max_iters": 0 }), json!({ "damping": "much" })] {
            assert!(build(&params).is_err(), "{params}");
        }
    }
}
