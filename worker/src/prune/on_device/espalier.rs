//! Espalier's own method on a device; see `prune/espalier.rs`.

use std::sync::Arc;

use candle_core::Device;

use super::search::{DeviceGram, DeviceSearch};
use crate::linalg::{matrix, on_host, values};
use crate::prune::admm::Budget;
use crate::prune::condition::{Conditioned, admit};
use crate::prune::espalier::{Group, MOST_ITERATIONS, NAME, Ramp};
use crate::prune::{GroupSolver, Problem, RowBlock, Solution, SolveCtx, SolveError};

/// Share of the first residual that a refitted row must fall to.
const TOLERANCE: f64 = 1e-8;

/// A group on a device; the host's solver cuts it into blocks and deals out the zeros.
pub(in crate::prune) struct DeviceGroup {
    host: Group,
    gram: DeviceGram,
    device: Device,
}

impl DeviceGroup {
    /// The group of a solver of the host that blends in no other target.
    ///
    /// # Errors
    /// `Backend`.
    pub(in crate::prune) fn new(host: Group, device: &Device) -> Result<Self, SolveError> {
        let gram = DeviceGram::new(host.conditioned(), device)?;
        Ok(Self { host, gram, device: device.clone() })
    }

    fn conditioned(&self) -> &Arc<Conditioned> {
        self.host.conditioned()
    }
}

impl GroupSolver for DeviceGroup {
    fn device(&self) -> Option<&Device> {
        Some(&self.device)
    }

    fn blocks(&self, problem: &Problem<'_>) -> Result<Vec<RowBlock>, SolveError> {
        self.host.blocks(problem)
    }

    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let conditioned = self.conditioned();
        let admitted = admit(NAME, problem, conditioned.n)?;
        let (rows, n) = (admitted.rows, admitted.columns);
        if zeros == 0 {
            return conditioned.solution(problem, admitted.weight, 0, 0.0);
        }
        let anchor = matrix(conditioned.scaled_alive(&admitted.weight), n, &self.device)?;
        let mut search = DeviceSearch::new(&anchor, Budget { pattern: problem.pattern, zeros })?;
        let (mut iterations, mut flops) = (0, 0.0);
        let mut ramp: Ramp = self.host.ramp();
        while iterations < MOST_ITERATIONS {
            let (inverse, spent) = self.gram.inverse(ramp.rho(), conditioned)?;
            flops += spent;
            for _ in 0..Ramp::CHECK_EVERY {
                ctx.check_cancelled()?;
                search.step(&inverse, ramp.rho(), ramp.sigma())?;
            }
            iterations += Ramp::CHECK_EVERY;
            if search.support_change()? < Ramp::SETTLED {
                break;
            }
            ramp.advance();
        }
        let (start, keep) = search.finish()?;
        let limits = (self.host.refit_steps(), TOLERANCE);
        let (refitted, spent) = self.gram.refit(&anchor, &start, &keep, limits)?;
        flops += f64::from(iterations) * 2.0 * (rows * n) as f64 * n as f64 + spent;
        let keep = on_host(&keep)?.flatten_all()?.to_vec1::<u8>()?;
        let values = conditioned.restored(&values(&refitted)?, &keep, &admitted.weight);
        conditioned.solution(problem, values, iterations, flops)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::linalg::ops::host;
    use crate::prune::fixture;

    #[test]
    fn every_pattern_is_met_exactly_and_the_error_is_that_of_the_host() {
        for device in host::devices() {
            for (file, params) in [
                ("synthetic_64x96", json!({})),
                ("synthetic_64x96", json!({ "row_block": 16, "profile": "fast" })),
                ("smollm2_layer2_v_proj", json!({})),
            ] {
                let (problem, references) = fixture::golden(file, "alps");
                for reference in &references {
                    let pattern = reference.pattern;
                    let host = fixture::solution(NAME, &params, &problem, pattern);
                    let there = fixture::solution_on(NAME, &params, &problem, pattern, &device);
                    let found = values(&there.weight).unwrap();
                    fixture::assert_obeys(&found, problem.columns, pattern);
                    let ratio = problem.rel_error(&found) / problem.rel_error(&values(&host.weight).unwrap());
                    // What rounding makes of close choices goes both ways.
                    assert!((ratio - 1.0).abs() < 2e-3, "{device:?} {file} {params} {pattern}: {ratio}");
                    assert_eq!(there.dead_channels, host.dead_channels);
                }
            }
        }
    }

    #[test]
    fn a_blended_target_is_solved_on_the_host() {
        let (solver, _) = crate::prune::build(NAME, &json!({ "alpha": 0.5 })).unwrap();
        assert!(solver.on_device().is_none());
        let (solver, _) = crate::prune::build(NAME, &json!({})).unwrap();
        assert!(solver.on_device().is_some());
    }
}
