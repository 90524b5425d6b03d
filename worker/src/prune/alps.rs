//! ALPS: ADMM with a data-driven penalty finds the support, conjugate gradients the weights on it.
//!
//! Source: Meng et al., *ALPS* (arXiv 2406.07831), algorithms 1 and 2, and the schedule of the authors' code; ALGORITHMS.md §4.
//! Deviation: inverses come from Cholesky factorisations, see [`super::admm`]; the conjugate gradients take one product a step
//! and keep a row only if its error fell. Dead channels are damped and nothing else, as by the authors: see Espalier for better.

use std::sync::Arc;

use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use serde::{Deserialize, Serialize};

use super::admm::{self, Budget, Inverses, Search};
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
    version: "4",
    summary: "ADMM finds the support, conjugate gradients the weights on it",
    build,
};

const NAME: &str = "alps";
/// Iterations between two looks at the support.
const CHECK_EVERY: u32 = 3;
const LARGEST_RHO: f64 = 1e6;
const SMALLEST_RHO: f64 = 1e-6;

/// Parameters of ALPS.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// First penalty ρ, relative to the unit diagonal of the scaled gram.
    pub rho: f64,
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

    /// Most searches settle as soon as they may.
    fn effort(&self, columns: usize) -> Effort {
        let iterations = (self.params.switch_iter as usize + 3).min(self.params.max_iters as usize);
        admm::effort(columns, iterations.div_ceil(CHECK_EVERY as usize), iterations + self.params.cg_iters)
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
    Continue(f64),
    /// The penalty was too large from the start: begin anew with a smaller one.
    Restart(f64),
    Stop,
}

/// Source: ALPS, eq. 28, with the two safety branches of the authors' code.
#[derive(Debug, Clone, Copy, Default)]
struct Schedule {
    /// Whether the support has moved enough to show that ρ is small enough.
    started: bool,
}

impl Schedule {
    fn judge(&mut self, rho: f64, changed: usize, share: f64) -> Verdict {
        let grown = |factor: f64| Verdict::Continue((rho * factor).min(LARGEST_RHO));
        if share > 0.005 {
            self.started = true;
            return grown(if share > 0.1 { 1.3 } else { 1.2 });
        }
        match (changed, self.started) {
            (0, true) => Verdict::Stop,
            (_, true) => grown(1.1),
            (0, false) => Verdict::Continue(rho / 5.0),
            (_, false) => Verdict::Restart(rho / 5.0),
        }
    }
}

impl GroupSolver for Group {
    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let admitted = admit(NAME, problem, self.conditioned.n)?;
        let (rows, n) = (admitted.rows, admitted.columns);
        if zeros == 0 {
            return self.conditioned.solution(problem, admitted.weight, 0, 0.0);
        }
        let anchor = self.conditioned.scaled(&admitted.weight);
        let budget = Budget { pattern: problem.pattern, zeros };
        let begin = || Search::new(anchor.clone(), &anchor, None, n, budget);
        let mut search = begin();
        let mut schedule = Schedule::default();
        let mut rho = self.params.rho;
        let (mut inverse, mut flops) = self.inverses.at(rho as f32, [])?;
        let mut iterations = 0;
        while iterations < self.params.max_iters {
            ctx.check_cancelled()?;
            search.step(&inverse, rho as f32, 1.0);
            iterations += 1;
            if !iterations.is_multiple_of(CHECK_EVERY) {
                continue;
            }
            let (changed, share) = search.support_change();
            match schedule.judge(rho, changed, share) {
                Verdict::Stop => break,
                // A support that no penalty gets moving has nothing left to move.
                Verdict::Continue(next) | Verdict::Restart(next) if next < SMALLEST_RHO => break,
                Verdict::Continue(next) => rho = next,
                Verdict::Restart(next) => {
                    rho = next;
                    search.restart(begin());
                }
            }
            if iterations > self.params.switch_iter && share < 3e-4 {
                break;
            }
            let spent;
            (inverse, spent) = self.inverses.at(rho as f32, [])?;
            flops += spent;
        }
        let (primal, keep) = search.primal();
        let mut start = primal.to_vec();
        drop(search);
        select::zero_dropped(&mut start, &keep);
        let quadratic = Quadratic { anchor: &anchor, shift: None, gram: self.conditioned.factor() };
        // The authors' code runs all its steps; rows leave here once they are at the bottom in f32.
        let limits = Limits { steps: self.params.cg_iters, tolerance: 1e-12 };
        let refit = pcg::refit(quadratic, &start, &keep, limits);
        flops += f64::from(iterations) * 2.0 * (rows * n) as f64 * n as f64 + refit.flops;
        let values = self.conditioned.restored(&refit.values, &keep, &admitted.weight);
        self.conditioned.solution(problem, values, iterations, flops)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::wide;
    use crate::prune::fixture::{self, patterns};

    #[test]
    fn the_schedule_is_the_authors() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.judge(1.0, 3, 0.001), Verdict::Restart(0.2));
        assert_eq!(schedule.judge(1.0, 0, 0.0), Verdict::Continue(0.2));
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

    /// The support that algorithm 1 finds, as printed and in f64: no merged state, no shared inverse.
    fn support_in_f64(problem: &fixture::LayerProblem, pattern: Pattern) -> Vec<bool> {
        let n = problem.columns;
        let mut gram: Vec<f64> = problem.gram.iter().map(|&g| f64::from(g) * fixture::GOLDEN_TOKENS).collect();
        let ridge = 0.01 * (0..n).map(|j| gram[j * (n + 1)]).sum::<f64>() / n as f64;
        (0..n).for_each(|j| gram[j * (n + 1)] += ridge);
        let scale: Vec<f64> = (0..n).map(|j| gram[j * (n + 1)].sqrt() + 1e-8).collect();
        gram.iter_mut().enumerate().for_each(|(index, g)| *g /= scale[index / n] * scale[index % n]);
        let anchor: Vec<f64> =
            problem.weight.iter().zip(scale.iter().cycle()).map(|(w, s)| f64::from(*w) * s).collect();
        let target = wide::product(&anchor, &gram, n, n);
        let dropped = pattern.zeros(anchor.len() / n, n);
        let project = |values: &[f64]| {
            let mut keep = vec![true; values.len()];
            let (part, drop) = match pattern {
                Pattern::NofM { keep, of } => (of, of - keep),
                _ => (values.len(), dropped),
            };
            for (keep, values) in keep.chunks_mut(part).zip(values.chunks(part)) {
                let mut order: Vec<usize> = (0..part).collect();
                order.select_nth_unstable_by(drop, |&a, &b| values[a].abs().total_cmp(&values[b].abs()));
                order[..drop].iter().for_each(|&index| keep[index] = false);
            }
            keep
        };
        let masked = |values: &[f64], keep: &[bool]| -> Vec<f64> {
            values.iter().zip(keep).map(|(value, &keep)| if keep { *value } else { 0.0 }).collect()
        };
        let first = project(&anchor);
        let (mut d, mut dual, mut checked) = (masked(&anchor, &first), vec![0.0; anchor.len()], first.clone());
        let (mut schedule, mut rho, mut iterations) = (Schedule::default(), 0.1, 0);
        loop {
            let mut shifted = gram.clone();
            (0..n).for_each(|j| shifted[j * (n + 1)] += rho);
            let inverse = wide::Cholesky::new(shifted, n).unwrap().inverse();
            for _ in 0..CHECK_EVERY {
                let right: Vec<f64> = (0..d.len()).map(|i| target[i] - dual[i] + rho * d[i]).collect();
                let b = wide::product(&right, &inverse, n, n);
                let sum: Vec<f64> = b.iter().zip(&dual).map(|(b, l)| b + l / rho).collect();
                let keep = project(&sum);
                d = masked(&sum, &keep);
                (0..d.len()).for_each(|i| dual[i] += rho * (b[i] - d[i]));
                iterations += 1;
                if iterations % CHECK_EVERY == 0 {
                    let changed = keep.iter().zip(&checked).filter(|(now, then)| now != then).count();
                    checked = keep;
                    let share = changed as f64 / (d.len() - dropped) as f64;
                    let verdict = schedule.judge(rho, changed, share);
                    if verdict == Verdict::Stop || iterations > 30 && share < 3e-4 || iterations >= 300 {
                        return project(&b);
                    }
                    match verdict {
                        Verdict::Restart(next) => {
                            (rho, d, dual) = (next, masked(&anchor, &first), vec![0.0; anchor.len()]);
                        }
                        Verdict::Continue(next) => rho = next,
                        Verdict::Stop => {}
                    }
                }
            }
        }
    }

    #[test]
    fn in_f64_the_steps_are_those_of_the_authors_code_in_f64() {
        let (problem, _) = fixture::golden("smollm2_layer2_v_proj", "alps");
        for reference in fixture::references("smollm2_layer2_v_proj_alps_f64", "alps", &problem) {
            let found = support_in_f64(&problem, reference.pattern);
            let differing = found.iter().zip(&reference.support).filter(|(a, b)| a != b).count();
            assert!(differing * 1000 <= found.len(), "{}: {differing} positions differ", reference.pattern);
        }
    }

    #[test]
    fn agrees_with_the_authors_code_on_the_golden_problems() {
        // In f32 the trajectory is chaotic on the real problem, and the golden support is one of many. The authors' own code
        // shares 98.3 % and 98.6 % of it at 50 % and 70 % when it runs in f64, and 98.4 % and 96.4 % when it runs in f32 on 1.1
        // times the weights: tests/reference/results/alps-precision.json. Ours depends on how sums are cut just as much. That the
        // steps are right is for the test above.
        fixture::assert_agrees_with_reference(NAME, json!({}), "alps", |file, pattern| match pattern {
            Pattern::Unstructured { sparsity } if file.starts_with("smollm2") => {
                (if sparsity < 0.6 { 0.98 } else { 0.95 }, 1.005)
            }
            _ => (0.99, 1.005),
        });
    }

    #[test]
    fn the_support_beats_magnitudes() {
        assert!(fixture::better_supports_than_magnitude(NAME) >= 19);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for params in [json!({ "rho": 0.0 }), json!({ "max_iters": 0 }), json!({ "damping": "much" })] {
            assert!(build(&params).is_err(), "{params}");
        }
    }
}
