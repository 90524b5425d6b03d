//! Espalier's own method on a device; see `prune/espalier.rs`.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::search::{DeviceGram, DeviceSearch};
use crate::linalg::{matrix, on_host, values};
use crate::prune::admm::Budget;
use crate::prune::blend::{between, least_held_out};
use crate::prune::condition::{Conditioned, admit};
use crate::prune::espalier::{Group, MOST_ITERATIONS, NAME, Ramp};
use crate::prune::{GroupSolver, InputStats, Problem, RowBlock, Solution, SolveCtx, SolveError};

/// Share of the first residual that a refitted row must fall to.
const TOLERANCE: f64 = 1e-8;

/// A group on a device, beside what the host's solver has of it.
pub(in crate::prune) struct DeviceGroup {
    host: Group,
    gram: DeviceGram,
    /// `(K − G)ᵀD⁻¹`, `[n, n]`, if the target is blended.
    towards_dense: Option<Tensor>,
    held_out: Option<InputStats>,
    device: Device,
}

impl DeviceGroup {
    /// The group of a solver of the host.
    ///
    /// # Errors
    /// `Backend`.
    pub(in crate::prune) fn new(host: Group, device: &Device) -> Result<Self, SolveError> {
        let gram = DeviceGram::new(host.conditioned(), device)?;
        let n = host.conditioned().n;
        let towards_dense = host.towards_dense.clone().map(|towards| matrix(towards, n, device)).transpose()?;
        let held_out = host.held_out.as_deref().filter(|_| host.alpha() > 0.0);
        let held_out = held_out.map(|held_out| held_out.to_device(device)).transpose()?;
        Ok(Self { host, gram, towards_dense, held_out, device: device.clone() })
    }

    fn conditioned(&self) -> &Arc<Conditioned> {
        self.host.conditioned()
    }

    /// α·T of a weight, if it is not zero.
    fn shift(&self, weight: &[f32]) -> Result<Option<Tensor>, SolveError> {
        let Some(towards) = &self.towards_dense else { return Ok(None) };
        let weight = matrix(weight.to_vec(), self.conditioned().n, &self.device)?;
        Ok(Some((weight.matmul(towards)? * self.host.alpha())?))
    }

    /// What a weight's search starts from.
    fn start(&self, weight: &[f32]) -> Result<Start, SolveError> {
        let conditioned = self.conditioned();
        let anchor = matrix(conditioned.scaled_alive(weight), conditioned.n, &self.device)?;
        let shift = self.shift(weight)?;
        let Some(towards) = &shift else { return Ok(Start { free: anchor.clone(), anchor, shift, flops: 0.0 }) };
        let (inverse, flops) = self.gram.inverse(0.0, conditioned)?;
        Ok(Start { free: (towards.matmul(&inverse)? + &anchor)?, anchor, shift, flops })
    }

    /// `rows · matrix` on the device, for the host.
    fn image(&self, rows: &[f32], statistics: &Tensor) -> Result<Vec<f32>, SolveError> {
        let rows = matrix(rows.to_vec(), self.conditioned().n, &self.device)?;
        Ok(values(&rows.matmul(statistics)?)?)
    }
}

/// Where a search starts; see [`crate::prune::espalier`].
struct Start {
    /// Ŵ, `[rows, n]`.
    anchor: Tensor,
    /// T, `[rows, n]`, if it is not zero.
    shift: Option<Tensor>,
    /// V̂°, `[rows, n]`.
    free: Tensor,
    /// Spent on an inverse.
    flops: f64,
}

impl GroupSolver for DeviceGroup {
    fn device(&self) -> Option<&Device> {
        Some(&self.device)
    }

    fn deal(&self, problem: &Problem<'_>, blocks: &mut [RowBlock]) -> Result<(), SolveError> {
        self.host.deal(problem, blocks)
    }

    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        let conditioned = self.conditioned();
        let admitted = admit(NAME, problem, conditioned.n)?;
        let (rows, n) = (admitted.rows, admitted.columns);
        if zeros == 0 {
            return conditioned.solution(problem, admitted.weight, 0, 0.0);
        }
        let Start { anchor, shift, free, mut flops } = self.start(&admitted.weight)?;
        let shift = shift.as_ref();
        let mut iterations = 0;
        let mut search = DeviceSearch::new(&free, &anchor, shift, Budget { pattern: problem.pattern, zeros })?;
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
        let (refitted, spent) = self.gram.refit((&anchor, shift), &start, &keep, limits)?;
        flops += f64::from(iterations) * 2.0 * (rows * n) as f64 * n as f64 + spent;
        let kept = on_host(&keep)?.flatten_all()?.to_vec1::<u8>()?;
        let restored = |scaled: &Tensor| -> Result<Vec<f32>, SolveError> {
            Ok(conditioned.restored(&values(scaled)?, &kept, &admitted.weight))
        };
        let mut solved = restored(&refitted)?;
        let mut taken = (self.host.alpha() > 0.0).then(|| self.host.alpha());
        if let Some((taken, held_out)) = taken.as_mut().zip(self.held_out.as_ref()) {
            let (without, spent) = self.gram.refit((&anchor, None), &refitted, &keep, limits)?;
            flops += spent;
            let without = restored(&without)?;
            let image = |rows: &[f32], statistics: &Tensor| self.image(rows, statistics);
            let share = least_held_out(&admitted.weight, &without, &solved, held_out, image)?;
            solved = between(&without, &solved, share);
            *taken *= share;
        }
        Ok(Solution { alpha: taken, ..conditioned.solution(problem, solved, iterations, flops)? })
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
    fn a_device_solves_more_rows_together_unless_it_is_told() {
        for device in host::devices() {
            let weight = Tensor::zeros((2000, 64), candle_core::DType::F32, &device).unwrap();
            let pattern = espalier_common::pattern::Pattern::Unstructured { sparsity: 0.5 };
            let problem = Problem { tensor: "w", weight: &weight, pattern, imported: None };
            let usual = if device.is_cpu() { 14 } else { 2 };
            for (params, expected) in [(json!({}), usual), (json!({ "row_block": 500 }), 4)] {
                let (solver, _) = crate::prune::build(NAME, &params).unwrap();
                assert_eq!(solver.blocks(&problem).unwrap().len(), expected, "{device:?} {params}");
            }
        }
    }

    #[test]
    fn a_blended_target_leads_where_it_leads_on_the_host() {
        for device in host::devices() {
            for (seed, is_guarded) in [(0, true), (1, true), (2, false)] {
                let (problem, unseen) = fixture::random_corrected(seed, 20, 24, 160).split(40);
                let mut problem = problem.problem;
                if !is_guarded {
                    problem.stats = Arc::new(InputStats { held_out: None, ..(*problem.stats).clone() });
                }
                let params = json!({ "alpha": 0.8, "row_block": 16 });
                for pattern in fixture::patterns() {
                    let host = fixture::solution(NAME, &params, &problem, pattern);
                    let there = fixture::solution_on(NAME, &params, &problem, pattern, &device);
                    let what = format!("{device:?} {seed} {pattern}");
                    let (found, expected) = (there.alpha.unwrap(), host.alpha.unwrap());
                    assert!((found - expected).abs() < 1e-2, "{what}: {found} {expected}");
                    let found = values(&there.weight).unwrap();
                    fixture::assert_obeys(&found, problem.columns, pattern);
                    let ratio = unseen.error(&found) / unseen.error(&values(&host.weight).unwrap());
                    assert!((ratio - 1.0).abs() < 1e-2, "{what}: {ratio}");
                }
            }
        }
    }
}
