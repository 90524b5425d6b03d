//! The support search of `prune/admm.rs` and the refit of `linalg/pcg.rs`, as tensors of one device.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use espalier_common::pattern::Pattern;

use super::refused;
use crate::linalg::{matrix, ops};
use crate::prune::SolveError;
use crate::prune::admm::{Budget, Inverses};
use crate::prune::condition::Conditioned;

/// The conditioned gram on a device, and the inverses of it that the blocks of a group share.
pub(super) struct DeviceGram {
    /// Ĝ, `[n, n]`.
    gram: Tensor,
    identity: Tensor,
    /// 1 / the diagonal, `[n]`.
    inverse_diagonal: Tensor,
    known: Mutex<BTreeMap<u32, Tensor>>,
}

impl DeviceGram {
    pub(super) fn new(conditioned: &Conditioned, device: &Device) -> candle_core::Result<Self> {
        let n = conditioned.n;
        let inverse: Vec<f32> = (0..n).map(|j| 1.0 / conditioned.gram[j * (n + 1)]).collect();
        Ok(Self {
            gram: matrix(conditioned.gram.clone(), n, device)?,
            identity: Tensor::eye(n, DType::F32, device)?,
            inverse_diagonal: Tensor::from_vec(inverse, n, device)?,
            known: Mutex::default(),
        })
    }

    /// `(Ĝ + ρI)⁻¹` and the flops spent on it; it is remembered as far as [`Inverses::remembers`].
    pub(super) fn inverse(&self, rho: f32, conditioned: &Conditioned) -> Result<(Tensor, f64), SolveError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inverse) = known().get(&rho.to_bits()) {
            return Ok((inverse.clone(), 0.0));
        }
        let shifted = (&self.gram + (&self.identity * f64::from(rho))?)?;
        let inverse = ops::inverse(&shifted).map_err(|error| refused(conditioned, error))?;
        let mut known = known();
        if Inverses::remembers(conditioned.n, known.len() + 1) {
            known.insert(rho.to_bits(), inverse.clone());
        }
        // The factorisation, its inverse, and their product, which is not halved.
        Ok((inverse, (2.0 / 3.0 + 2.0) * (conditioned.n as f64).powi(3)))
    }

    /// Minimises the quadratic around `anchor`, shifted by T, over the values where `keep` is 1, from `start`; see
    /// [`crate::linalg::pcg`]. Returns the values, and the flops spent.
    pub(super) fn refit(
        &self,
        (anchor, shift): (&Tensor, Option<&Tensor>),
        start: &Tensor,
        keep: &Tensor,
        (steps, tolerance): (usize, f64),
    ) -> candle_core::Result<(Tensor, f64)> {
        let (rows, n) = start.dims2()?;
        let shifted = |values: Tensor| shift.map_or_else(|| Ok(values.clone()), |shift| &values + shift);
        let residual_of = |values: &Tensor| shifted((anchor - values)?.matmul(&self.gram)?);
        let error_of = |values: &Tensor, residual: &Tensor| row_dots(&(anchor - values)?, &shifted(residual.clone())?);
        let residual = residual_of(start)?;
        let before = error_of(start, &residual)?;
        let residual = (residual * keep.to_dtype(DType::F32)?)?;
        let direction = residual.broadcast_mul(&self.inverse_diagonal)?;
        let goals = &(row_dots(&residual, &direction)? * tolerance)?;
        let state = Tensor::stack(&[start, &residual, &direction], 0)?;
        let goals = ops::Goals { inverse_diagonal: &self.inverse_diagonal, goals };
        for _ in 0..steps {
            let image = state.get(2)?.matmul(&self.gram)?;
            ops::conjugate_step(&state, &image, keep, goals)?;
        }
        let values = state.get(0)?;
        let after = error_of(&values, &residual_of(&values)?)?;
        // Not so for NaN either.
        let fell = after.le(&before)?.unsqueeze(1)?.broadcast_as((rows, n))?;
        let flops = ((2 + steps) * rows) as f64 * 2.0 * (n * n) as f64;
        Ok((fell.where_cond(&values, start)?, flops))
    }
}

/// `Σ_j a_ij·b_ij` of each row, in f64.
pub(super) fn row_dots(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    (a.to_dtype(DType::F64)? * b.to_dtype(DType::F64)?)?.sum(1)
}

/// The state of a search; see [`crate::prune::admm::Search`].
pub(super) struct DeviceSearch<'a> {
    budget: Budget,
    anchor: &'a Tensor,
    /// T, if it is not zero.
    shift: Option<&'a Tensor>,
    /// A: D where `keep` is 1, U = Λ/ρ where it is 0.
    merged: Tensor,
    keep: Tensor,
    rho: f32,
    checked: Tensor,
}

impl<'a> DeviceSearch<'a> {
    /// Starts at D = P(`start`) with a dual of zero.
    pub(super) fn new(
        start: &Tensor,
        anchor: &'a Tensor,
        shift: Option<&'a Tensor>,
        budget: Budget,
    ) -> candle_core::Result<Self> {
        let keep = project(budget, start)?;
        let merged = keep.where_cond(start, &start.zeros_like()?)?;
        Ok(Self { budget, anchor, shift, merged, checked: keep.clone(), keep, rho: 1.0 })
    }

    /// One iteration with `inverse` = (Ĝ + ρI)⁻¹ and over-relaxation σ.
    pub(super) fn step(&mut self, inverse: &Tensor, rho: f32, sigma: f32) -> candle_core::Result<()> {
        let mut right = ops::right_side(&self.merged, &self.keep, self.anchor, rho, self.rho)?;
        if let Some(shift) = self.shift {
            right = (right + shift)?;
        }
        let primal = (right.matmul(inverse)? + self.anchor)?;
        ops::update(&self.merged, &primal, &self.keep, sigma, self.rho / rho)?;
        self.keep = project(self.budget, &self.merged)?;
        self.rho = rho;
        Ok(())
    }

    /// The share of the kept positions that entered or left the support since this was last asked. It waits for the device.
    pub(super) fn support_change(&mut self) -> candle_core::Result<f64> {
        let changed = self.keep.ne(&self.checked)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
        let kept = self.keep.elem_count().saturating_sub(self.budget.zeros);
        self.checked = self.keep.clone();
        Ok(f64::from(changed) / kept.max(1) as f64)
    }

    /// D and its support.
    pub(super) fn finish(self) -> candle_core::Result<(Tensor, Tensor)> {
        let zeros = self.merged.zeros_like()?;
        Ok((self.keep.where_cond(&self.merged, &zeros)?, self.keep))
    }
}

/// P: what the budget lets stay.
fn project(budget: Budget, values: &Tensor) -> candle_core::Result<Tensor> {
    match budget.pattern {
        Pattern::NofM { keep, of } => ops::keep_n_of_m(values, keep, of),
        _ => ops::keep_largest(values, budget.zeros),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::pcg::{self, Limits, Quadratic};
    use crate::linalg::{oracle, values};
    use crate::prune::fixture;

    const TOLERANCE: f64 = 1e-4;

    #[test]
    fn a_search_follows_that_of_the_host() {
        let (rows, n) = (10, 24);
        let problem = fixture::random(1, rows, n, 90);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let conditioned = std::sync::Arc::new(conditioned);
        let anchor = conditioned.scaled(&problem.weight);
        let inverses = Inverses::new(std::sync::Arc::clone(&conditioned));
        for device in host::devices() {
            let gram = DeviceGram::new(&conditioned, &device).unwrap();
            let there = matrix(anchor.clone(), n, &device).unwrap();
            for pattern in fixture::patterns() {
                let budget = Budget { pattern, zeros: pattern.zeros(rows, n) };
                let mut host = crate::prune::admm::Search::new(anchor.clone(), &anchor, None, n, budget);
                let mut search = DeviceSearch::new(&there, &there, None, budget).unwrap();
                for (rho, sigma) in [(0.1f32, 1.0f32), (0.1, 1.5), (0.2, 1.0), (0.4, 1.0)] {
                    host.step(&inverses.at(rho, []).unwrap().0, rho, sigma);
                    search.step(&gram.inverse(rho, &conditioned).unwrap().0, rho, sigma).unwrap();
                    let (changed, found) = (host.support_change().1, search.support_change().unwrap());
                    assert!((changed - found).abs() < 1e-12, "{device:?}, {pattern}: {changed} {found}");
                }
                let ((d, keep), (found, stays)) = (host.finish(), search.finish().unwrap());
                assert_eq!(stays.flatten_all().unwrap().to_vec1::<u8>().unwrap(), keep, "{device:?}, {pattern}");
                let found = values(&found).unwrap();
                assert!(found.iter().zip(&d).all(|(x, y)| f64::from(x - y).abs() < TOLERANCE), "{device:?}, {pattern}");
            }
        }
    }

    #[test]
    fn a_refit_is_that_of_the_host() {
        let (rows, n) = (7, 40);
        let problem = fixture::random(3, rows, n, 150);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let anchor = conditioned.scaled(&problem.weight);
        let keep: Vec<u8> = (0..rows * n).map(|at| u8::from(at % 3 != 0)).collect();
        let start: Vec<f32> = anchor.iter().zip(&keep).map(|(w, keep)| w * f32::from(*keep)).collect();
        let quadratic = Quadratic { anchor: &anchor, shift: None, gram: conditioned.factor() };
        let host = pcg::refit(quadratic, &start, &keep, Limits { steps: 12, tolerance: 1e-8 }).values;
        let error = |values: &[f32]| {
            let delta: Vec<f64> = values.iter().zip(&anchor).map(|(v, w)| f64::from(v - w)).collect();
            delta.chunks(n).map(|row| oracle::quadratic(row, &oracle::wide(&conditioned.gram))).sum::<f64>()
        };
        for device in host::devices() {
            let gram = DeviceGram::new(&conditioned, &device).unwrap();
            let tensor = |values: &[f32]| matrix(values.to_vec(), n, &device).unwrap();
            let stays = Tensor::from_vec(keep.clone(), (rows, n), &device).unwrap();
            let (found, _) = gram.refit((&tensor(&anchor), None), &tensor(&start), &stays, (12, 1e-8)).unwrap();
            let found = values(&found).unwrap();
            assert!(found.iter().zip(&keep).all(|(v, keep)| *keep == 1 || v.to_bits() == 0), "{device:?}");
            assert!(found.iter().zip(&host).all(|(x, y)| f64::from(x - y).abs() < TOLERANCE), "{device:?}");
            assert!(error(&found) <= error(&host) * (1.0 + TOLERANCE) && error(&host) < 0.9 * error(&start));
        }
    }

    #[test]
    fn a_row_whose_error_would_not_fall_stays_as_it_is() {
        let problem = fixture::random(3, 2, 12, 60);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let anchor = conditioned.scaled(&problem.weight);
        for device in host::devices() {
            let gram = DeviceGram::new(&conditioned, &device).unwrap();
            let there = matrix(anchor.clone(), 12, &device).unwrap();
            // The dense weights themselves: nothing is better.
            let keep = Tensor::ones((2, 12), DType::U8, &device).unwrap();
            let (found, _) = gram.refit((&there, None), &there, &keep, (5, 1e-8)).unwrap();
            assert_eq!(values(&found).unwrap(), anchor, "{device:?}");
        }
    }
}
