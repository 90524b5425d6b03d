//! Batched least squares on a fixed support.
//!
//! Source: ALGORITHMS.md §9.4 stage D; ALPS, algorithm 2.
//! Deviation: α and β per row, one product a step, Jacobi preconditioner, row dots in f64, and a row is taken only if its
//! error fell.

use pulp::Arch;
use rayon::prelude::*;

use super::gemm::row_tile;
use super::lanes::{Lanes, in_lanes};
use super::quadratic::{dot, inlined_dot};
use super::symmetric::Symmetric;

/// The quadratic `(V − W)G(V − W)ᵀ − 2·(V − W)Tᵀ` that rows V minimise, each for itself.
#[derive(Debug, Clone, Copy)]
pub struct Quadratic<'a> {
    /// W, `[rows, n]`.
    pub anchor: &'a [f32],
    /// T = C − W·G, `[rows, n]`; `None` for zero, when the targets are W's own.
    pub shift: Option<&'a [f32]>,
    /// G, `[n, n]`, symmetric positive definite.
    pub gram: &'a Symmetric,
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most steps.
    pub steps: usize,
    /// A row leaves when its preconditioned residual norm squared has fallen to this share of the first one.
    pub tolerance: f64,
}

/// What a refit came to.
#[derive(Debug, Clone)]
pub struct Refit {
    /// `[rows, n]`, zero off the support.
    pub values: Vec<f32>,
    /// Most steps that a row took.
    pub steps: u32,
    /// Rows whose error did not fall; they are as they were.
    pub rejected: usize,
    /// Floating-point operations of the products.
    pub flops: f64,
}

/// Minimises `quadratic` over the values where `keep` is 1, starting from `start [rows, n]`, which is zero elsewhere.
pub fn refit(quadratic: Quadratic<'_>, start: &[f32], keep: &[u8], limits: Limits) -> Refit {
    let n = quadratic.gram.n();
    let inverse_diagonal: Vec<f32> = quadratic.gram.diagonal().map(|value| 1.0 / value).collect();
    let mut values = start.to_vec();
    let tile = (row_tile(start.len() / n.max(1)) * n).max(1);
    let outcomes: Vec<(u32, usize, usize)> = values
        .par_chunks_mut(tile)
        .enumerate()
        .map(|(index, values)| {
            let range = index * tile..index * tile + values.len();
            let tile = Tile {
                anchor: &quadratic.anchor[range.clone()],
                shift: quadratic.shift.map(|shift| &shift[range.clone()]),
                gram: quadratic.gram,
                keep: &keep[range],
                inverse_diagonal: &inverse_diagonal,
                n,
            };
            tile.refit(values, limits)
        })
        .collect();
    Refit {
        values,
        steps: outcomes.iter().map(|outcome| outcome.0).max().unwrap_or(0),
        rejected: outcomes.iter().map(|outcome| outcome.1).sum(),
        flops: outcomes.iter().map(|outcome| outcome.2 as f64).sum::<f64>() * 2.0 * (n * n) as f64,
    }
}

/// Some rows of the problem.
struct Tile<'a> {
    anchor: &'a [f32],
    shift: Option<&'a [f32]>,
    gram: &'a Symmetric,
    keep: &'a [u8],
    inverse_diagonal: &'a [f32],
    n: usize,
}

/// The state of a row that has not converged.
struct Active {
    row: usize,
    /// ⟨R, M⁻¹R⟩.
    energy: f64,
    goal: f64,
}

impl Tile<'_> {
    /// Returns the steps taken, the rows rejected and the row products spent.
    fn refit(&self, values: &mut [f32], limits: Limits) -> (u32, usize, usize) {
        let n = self.n;
        let rows = values.len() / n;
        let start = values.to_vec();
        let mut residual = self.residual(values);
        let before = self.errors(values, &residual);
        let mut direction = vec![0.0; values.len()];
        Arch::new().dispatch(
            #[inline(always)]
            || {
                residual.iter_mut().zip(self.keep).for_each(|(r, keep)| *r *= f32::from(*keep));
                direction.chunks_mut(n).zip(residual.chunks(n)).for_each(|(p, r)| self.precondition(r, p));
            },
        );
        let mut active: Vec<Active> = (0..rows)
            .map(|row| {
                let energy = dot(&residual[row * n..][..n], &direction[row * n..][..n]);
                Active { row, energy, goal: energy * limits.tolerance }
            })
            .collect();
        let (mut image, mut preconditioned) = (vec![0.0; values.len()], vec![0.0; n]);
        let (mut steps, mut products) = (0, 2 * rows);
        for _ in 0..limits.steps {
            compact(&mut active, &mut residual, &mut direction, n);
            if active.is_empty() {
                break;
            }
            let count = active.len();
            self.gram.multiply(&mut image[..count * n], 0.0, &direction[..count * n], 1.0);
            for (slot, state) in active.iter_mut().enumerate() {
                let p = &mut direction[slot * n..][..n];
                let r = &mut residual[slot * n..][..n];
                let q = &image[slot * n..][..n];
                let keep = &self.keep[state.row * n..][..n];
                // P is zero off the support, so this is ⟨P, Q⊙S⟩.
                let curvature = dot(p, q);
                let alpha = if curvature > 0.0 { (state.energy / curvature) as f32 } else { 0.0 };
                let energy = in_lanes(RowStep {
                    values: &mut values[state.row * n..][..n],
                    residual: r,
                    direction: p,
                    image: q,
                    keep,
                    inverse_diagonal: self.inverse_diagonal,
                    preconditioned: &mut preconditioned,
                    alpha,
                    energy: state.energy,
                });
                // A row without curvature cannot move any more.
                state.energy = if alpha > 0.0 { energy } else { 0.0 };
            }
            steps += 1;
            products += count;
        }

        let after = self.errors(values, &self.residual(values));
        let mut rejected = 0;
        for row in 0..rows {
            let fell = after[row] <= before[row];
            // Not so for NaN either.
            if !fell {
                values[row * n..][..n].copy_from_slice(&start[row * n..][..n]);
                rejected += 1;
            }
        }
        (steps, rejected, products)
    }

    /// `(W − V)G + T`, unmasked.
    fn residual(&self, values: &[f32]) -> Vec<f32> {
        let delta: Vec<f32> = self.anchor.iter().zip(values).map(|(w, v)| w - v).collect();
        let mut out = self.shift.map_or_else(|| vec![0.0; values.len()], <[f32]>::to_vec);
        self.gram.multiply(&mut out, 1.0, &delta, 1.0);
        out
    }

    /// The quadratic of each row, `(W − V)·(R + T)` with the unmasked residual R.
    fn errors(&self, values: &[f32], residual: &[f32]) -> Vec<f64> {
        let n = self.n;
        (0..values.len() / n)
            .map(|row| {
                let range = row * n..(row + 1) * n;
                let delta: Vec<f32> =
                    self.anchor[range.clone()].iter().zip(&values[range.clone()]).map(|(w, v)| w - v).collect();
                dot(&delta, &residual[range.clone()]) + self.shift.map_or(0.0, |shift| dot(&delta, &shift[range]))
            })
            .collect()
    }

    /// `M⁻¹R` of a row.
    #[inline(always)]
    fn precondition(&self, residual: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(residual).zip(self.inverse_diagonal).for_each(|((z, r), d)| *z = r * d);
    }
}

/// One step of one row, once α is known. Gives ⟨R, M⁻¹R⟩.
struct RowStep<'a> {
    values: &'a mut [f32],
    residual: &'a mut [f32],
    direction: &'a mut [f32],
    image: &'a [f32],
    keep: &'a [u8],
    inverse_diagonal: &'a [f32],
    preconditioned: &'a mut [f32],
    alpha: f32,
    /// ⟨R, M⁻¹R⟩ before.
    energy: f64,
}

impl Lanes for RowStep<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let Self { values, residual, direction, preconditioned, alpha, .. } = self;
        values.iter_mut().zip(&*direction).for_each(|(v, p)| *v += alpha * p);
        for ((r, q), keep) in residual.iter_mut().zip(self.image).zip(self.keep) {
            *r = (*r - alpha * q) * f32::from(*keep);
        }
        for ((z, r), d) in preconditioned.iter_mut().zip(&*residual).zip(self.inverse_diagonal) {
            *z = r * d;
        }
        let energy = inlined_dot(residual, preconditioned);
        let beta = (energy / self.energy) as f32;
        direction.iter_mut().zip(&*preconditioned).for_each(|(p, z)| *p = z + beta * *p);
        energy
    }
}

/// Lets converged rows leave: those behind them move up, in order.
fn compact(active: &mut Vec<Active>, residual: &mut [f32], direction: &mut [f32], n: usize) {
    let mut next = 0;
    let mut slot = 0;
    active.retain(|state| {
        let stays = state.energy > state.goal && state.energy > 0.0;
        if stays {
            if next != slot {
                residual.copy_within(slot * n..(slot + 1) * n, next * n);
                direction.copy_within(slot * n..(slot + 1) * n, next * n);
            }
            next += 1;
        }
        slot += 1;
        stays
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::linalg::{oracle, select};

    const TIGHT: Limits = Limits { steps: 400, tolerance: 1e-14 };

    /// Gram with a ridge, dense rows, a mask, and the masked rows.
    fn problem(seed: u64, rows: usize, n: usize) -> (Vec<f32>, Vec<f32>, Vec<u8>, Vec<f32>) {
        let x = oracle::inputs(seed, 2 * n, n);
        let mut gram: Vec<f32> = oracle::gram(&x, &x, n).iter().map(|&v| v as f32).collect();
        let mean = (0..n).map(|j| gram[j * n + j]).sum::<f32>() / n as f32;
        (0..n).for_each(|j| gram[j * n + j] += 0.02 * mean);
        let w = oracle::random(seed + 1, rows * n);
        let mut keep = vec![0; rows * n];
        select::keep_largest(&w, rows * n / 2, &mut keep);
        let mut start = w.clone();
        select::zero_dropped(&mut start, &keep);
        (gram, w, keep, start)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn refit_equals_the_f64_least_squares_on_the_support(seed in 0u64..1000, rows in 1usize..6, n in 1usize..24) {
            let (gram, w, keep, start) = problem(seed, rows, n);
            let quadratic = Quadratic { anchor: &w, shift: None, gram: &Symmetric::new(&gram) };
            let solved = refit(quadratic, &start, &keep, TIGHT);
            let gram = oracle::wide(&gram);
            for row in 0..rows {
                let range = row * n..(row + 1) * n;
                let mask: Vec<bool> = keep[range.clone()].iter().map(|&k| k == 1).collect();
                let dense = oracle::wide(&w[range.clone()]);
                let best = oracle::least_squares_on_support(&dense, &gram, &mask);
                let error = |v: &[f64]| {
                    let delta: Vec<f64> = v.iter().zip(&dense).map(|(v, w)| v - w).collect();
                    oracle::quadratic(&delta, &gram)
                };
                let found = error(&oracle::wide(&solved.values[range.clone()]));
                prop_assert!(found <= error(&best) * (1.0 + 1e-4) + 1e-9, "{} {}", found, error(&best));
                for (value, keep) in solved.values[range].iter().zip(mask) {
                    prop_assert!(keep || value.to_bits() == 0);
                }
            }
        }
    }

    #[test]
    fn each_step_lowers_the_error() {
        let (gram, w, keep, start) = problem(4, 8, 40);
        let quadratic = Quadratic { anchor: &w, shift: None, gram: &Symmetric::new(&gram) };
        let mut last = f64::INFINITY;
        for steps in 0..8 {
            let solved = refit(quadratic, &start, &keep, Limits { steps, tolerance: 0.0 });
            let delta: Vec<f32> = solved.values.iter().zip(&w).map(|(v, w)| v - w).collect();
            let error = crate::linalg::quadratic::energy(&delta, &gram, 40);
            assert!(error <= last, "{error} after {last}");
            last = error;
        }
    }

    #[test]
    fn a_shift_moves_the_solution_as_a_changed_target_does() {
        // With everything kept, V = W + T·G⁻¹.
        let (gram, w, _, _) = problem(5, 3, 12);
        let shift: Vec<f32> = oracle::random(9, 36).iter().map(|t| 0.1 * t).collect();
        let solved =
            refit(Quadratic { anchor: &w, shift: Some(&shift), gram: &Symmetric::new(&gram) }, &w, &[1; 36], TIGHT);
        let inverse = oracle::inverse(&oracle::wide(&gram), 12);
        let step = oracle::product(&oracle::wide(&shift), &inverse, 12, 12);
        for ((v, w), step) in solved.values.iter().zip(&w).zip(step) {
            assert!((f64::from(*v) - f64::from(*w) - step).abs() < 1e-3 * (1.0 + step.abs()), "{v} {w} {step}");
        }
    }

    #[test]
    fn the_residual_is_orthogonal_to_the_support() {
        let n = 40;
        let (gram, w, keep, start) = problem(11, 6, n);
        let solved = refit(Quadratic { anchor: &w, shift: None, gram: &Symmetric::new(&gram) }, &start, &keep, TIGHT);
        let delta: Vec<f64> = solved.values.iter().zip(&w).map(|(v, w)| f64::from(*w) - f64::from(*v)).collect();
        let residual = oracle::product(&delta, &oracle::wide(&gram), n, n);
        let largest = |on: u8| {
            let part = residual.iter().zip(&keep).filter(|(_, keep)| **keep == on);
            part.fold(0.0f64, |largest, (r, _)| largest.max(r.abs()))
        };
        assert!(largest(1) <= 1e-4 * largest(0), "{} on the support, {} off it", largest(1), largest(0));
    }

    #[test]
    fn rows_with_an_empty_or_a_full_support_are_handled() {
        let (gram, w, _, _) = problem(6, 2, 10);
        let keep = [[0; 10], [1; 10]].concat();
        let start = [[0.0; 10].as_slice(), &w[10..]].concat();
        let solved = refit(Quadratic { anchor: &w, shift: None, gram: &Symmetric::new(&gram) }, &start, &keep, TIGHT);
        assert_eq!(solved.values, start);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (gram, w, keep, start) = problem(7, 300, 33);
        let limits = Limits { steps: 12, tolerance: 1e-8 };
        let solve =
            || refit(Quadratic { anchor: &w, shift: None, gram: &Symmetric::new(&gram) }, &start, &keep, limits).values;
        let results: Vec<_> = [1, 2, 3].map(|threads| oracle::with_threads(threads, solve)).into();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
