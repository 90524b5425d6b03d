//! The support search that ALPS and Espalier share: ADMM on `min ½·V̂ĜV̂ᵀ − V̂Ĉᵀ` with a sparse copy D = V̂.
//!
//! Source: ALPS (arXiv 2406.07831), eq. 4; ALGORITHMS.md §4 and §9.4 stage C.
//! Deviation: one array holds the state. D and the scaled dual U = Λ/ρ have disjoint supports, because
//! `Λ ← Λ + ρ(B − D)` with `D = P(B + Λ/ρ)` leaves `Λ/ρ = A − P(A)` of `A = B + Λ/ρ`; so `D` is A where it is kept and `U` is A
//! where it is dropped. And as `Ĉ = ŴĜ + T`, the step `B = (Ĉ − Λ + ρD)F` with `F = (Ĝ + ρI)⁻¹` is computed as
//! `B = Ŵ + (ρ(D − Ŵ) − Λ + T)F`, which loses no digits to `Ĉ`. The inverse comes from an f32 Cholesky factorisation; the
//! authors' f64 eigendecomposition agrees with it to 1e-4 on the unit-diagonal gram.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use pulp::Arch;
use rayon::prelude::*;

use super::SolveError;
use super::condition::Conditioned;
use crate::linalg::factor::{self, NotPositiveDefinite};
use crate::linalg::gemm::row_tile;
use crate::linalg::select::{self, Census, Cut, Window};
use crate::linalg::symmetric::Symmetric;

/// Inverses are remembered for the other blocks of a group up to this many bytes; beyond it they are made anew.
const CACHE_BYTES: usize = 1 << 30;

/// What a search takes that asks for so many inverses and makes so many products of its rows with a matrix: each worker makes all
/// inverses, and solves whole sublayers.
pub(crate) fn effort(columns: usize, inverses: usize, products: usize) -> Effort {
    const F32: usize = size_of::<f32>();
    let square = columns * columns;
    let cube = (square * columns) as u64;
    Effort {
        columns,
        common_flops: inverses as u64 * cube,
        part_flops: cube,
        row_flops: 2 * (products * square) as u64,
        // Measured with SmolLM2-135M on AVX2 threads, one worker and two: 71 to 78.
        speed_percent: 75,
        // The conditioned gram, by rows and as a factor, all inverses but one, and what making that takes: the matrix, a factor and
        // its blocks.
        kept_bytes: ((4 * (1 + inverses) + 9) * square * F32 / 4) as u64,
        // The weight and its scaled copy, the search's state, what is multiplied, and two supports.
        row_bytes: (columns * (7 * F32 + 2)) as u64,
        is_shared: true,
        ..Effort::default()
    }
}

/// Where the zeros may go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// What the zeros look like.
    pub(crate) pattern: Pattern,
    /// How many they are, if they may be anywhere.
    pub(crate) zeros: usize,
}

impl Budget {
    /// P: marks the largest of `values [rows, n]` that the budget lets stay.
    pub(crate) fn project(self, values: &[f32], keep: &mut [u8]) {
        match self.pattern {
            Pattern::NofM { keep: kept, of } => select::keep_n_of_m(values, kept, of, keep),
            _ => select::keep_largest(values, self.zeros, keep),
        }
    }
}

/// `(Ĝ + ρI)⁻¹` for the values of ρ that the blocks of a group ask for: the ramp is the same for all, so the first to get
/// there does the work.
#[derive(Debug)]
pub(crate) struct Inverses {
    conditioned: Arc<Conditioned>,
    known: Mutex<BTreeMap<u32, Slot>>,
}

/// One inverse.
#[derive(Debug, Clone)]
enum Slot {
    /// Somebody is at it.
    Claimed,
    Ready(Arc<Symmetric>),
}

impl Inverses {
    pub(crate) fn new(conditioned: Arc<Conditioned>) -> Self {
        Self { conditioned, known: Mutex::default() }
    }

    /// Whether `steps` inverses of width `n` would all be remembered.
    pub(crate) fn remembers(n: usize, steps: usize) -> bool {
        n * n * steps * size_of::<f32>() <= CACHE_BYTES
    }

    /// The inverse, and the flops spent on it and others. Whoever finds it under way elsewhere makes those `ahead` instead of
    /// waiting: waiting for a thread whose stack this one may lie on would never end.
    ///
    /// # Errors
    /// `NotPositiveDefinite`.
    pub(crate) fn at(
        &self,
        rho: f32,
        ahead: impl IntoIterator<Item = f32>,
    ) -> Result<(Arc<Symmetric>, f64), SolveError> {
        let mut ahead = ahead.into_iter();
        let mut flops = 0.0;
        loop {
            let next = {
                let mut known = self.known();
                let next = match known.get(&rho.to_bits()) {
                    Some(Slot::Ready(inverse)) => return Ok((Arc::clone(inverse), flops)),
                    None => rho,
                    Some(Slot::Claimed) => ahead.find(|rho| !known.contains_key(&rho.to_bits())).unwrap_or(rho),
                };
                if Self::remembers(self.conditioned.n, known.len() + 1) {
                    known.entry(next.to_bits()).or_insert(Slot::Claimed);
                }
                next
            };
            let inverse =
                factor::inverse(self.shifted(next), self.conditioned.n).map_err(|error| self.refusal(error))?;
            let inverse = Arc::new(inverse);
            flops += self.flops();
            if let Some(slot) = self.known().get_mut(&next.to_bits()) {
                *slot = Slot::Ready(Arc::clone(&inverse));
            }
            if next.to_bits() == rho.to_bits() {
                return Ok((inverse, flops));
            }
        }
    }

    /// Remembers an inverse whose [`Symmetric::triangle`] another worker made, if it is one: what it makes of a vector must come back.
    pub(crate) fn take(&self, rho: f32, triangle: &[f32]) -> bool {
        /// What may be missing of a vector x, as a share of it and of twice F·x. A wrong ρ costs the difference times F·x, and steps
        /// of a ramp differ by a hundredth at least; f32 loses n·ε of F·x, which is far more than x where little holds ρ up.
        const TOLERANCE: f64 = 1e-3;
        let n = self.conditioned.n;
        if triangle.len() != n * (n + 1) / 2 || !Self::remembers(n, self.known().len() + 1) {
            return false;
        }
        let inverse = Symmetric::of_triangle(triangle, n);
        let probe: Vec<f32> = (0..n).map(|j| if j % 3 == 0 { -1.0 } else { 1.0 }).collect();
        let through = inverse.product(&probe);
        let back = self.conditioned.factor().product(&through);
        let missing = probe.iter().zip(&through).zip(back).map(|((x, y), z)| f64::from(z + rho * y - x).powi(2));
        let norm = |vector: &[f32]| vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let bound = TOLERANCE * (norm(&probe) + 2.0 * norm(&through));
        let is_inverse = bound.is_finite() && missing.sum::<f64>().sqrt() <= bound;
        if is_inverse {
            self.known().insert(rho.to_bits(), Slot::Ready(Arc::new(inverse)));
        }
        is_inverse
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shifted(&self, rho: f32) -> Vec<f32> {
        let n = self.conditioned.n;
        let mut matrix = self.conditioned.gram.clone();
        (0..n).for_each(|j| matrix[j * (n + 1)] += rho);
        matrix
    }

    /// Operations that one takes.
    pub(crate) fn flops(&self) -> f64 {
        (self.conditioned.n as f64).powi(3)
    }

    fn refusal(&self, error: NotPositiveDefinite) -> SolveError {
        let Conditioned { n, damping, .. } = *self.conditioned;
        SolveError::NotPositiveDefinite { columns: n, pivot: error.pivot, damping }
    }
}

/// The state of a search.
#[derive(Debug, Clone)]
pub(crate) struct Search<'a> {
    n: usize,
    budget: Budget,
    /// Ŵ, `[rows, n]`.
    anchor: &'a [f32],
    /// T = Ĉ − ŴĜ, `[rows, n]`, if it is not zero.
    shift: Option<&'a [f32]>,
    /// A: D where `keep` is 1, U = Λ/ρ where it is 0.
    merged: Vec<f32>,
    /// The support of D.
    keep: Vec<u8>,
    /// B.
    primal: Vec<f32>,
    /// What is multiplied to get there.
    right: Vec<f32>,
    /// Where the last cut was, if zeros may be anywhere, and where the next one is looked for first.
    cut: Cut,
    window: Window,
    /// The ρ that U is scaled by.
    rho: f32,
    checked: Vec<u8>,
}

impl<'a> Search<'a> {
    /// Starts at D = P(`start`) with a dual of zero.
    pub(crate) fn new(start: Vec<f32>, anchor: &'a [f32], shift: Option<&'a [f32]>, n: usize, budget: Budget) -> Self {
        let mut keep = vec![1; start.len()];
        budget.project(&start, &mut keep);
        let mut merged = start;
        select::zero_dropped(&mut merged, &keep);
        let right = vec![0.0; merged.len()];
        let (primal, checked) = (merged.clone(), keep.clone());
        // No cut is known yet: nothing lies in an empty window.
        let (cut, window) = (Cut { key: 0, tie: 0 }, Window::default());
        Self { n, budget, anchor, shift, merged, keep, primal, right, cut, window, rho: 1.0, checked }
    }

    /// One iteration with `inverse` = (Ĝ + ρI)⁻¹ and over-relaxation σ.
    pub(crate) fn step(&mut self, inverse: &Symmetric, rho: f32, sigma: f32) {
        let n = self.n;
        let rows = self.merged.len() / n;
        let tile = row_tile(rows) * n;
        let (before, dual_ratio) = (self.rho, self.rho / rho);
        let (pattern, window, anchor, shift) = (self.budget.pattern, self.window, self.anchor, self.shift);
        let censuses: Vec<Census> = self
            .merged
            .par_chunks_mut(tile)
            .zip(self.keep.par_chunks_mut(tile))
            .zip(self.primal.par_chunks_mut(tile))
            .zip(self.right.par_chunks_mut(tile))
            .enumerate()
            .map(|(index, (((merged, keep), primal), right))| {
                let first = index * tile;
                let anchor = &anchor[first..first + merged.len()];
                let shift = shift.map(|shift| &shift[first..first + merged.len()]);
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        // Copies: what is borrowed might be written through a slice, and the loop would not be one of vectors.
                        let (of_kept, of_dropped) = (rho, -before);
                        for (((r, a), keep), w) in right.iter_mut().zip(&*merged).zip(&*keep).zip(anchor) {
                            *r = a * if *keep == 1 { of_kept } else { of_dropped } - of_kept * w;
                        }
                        if let Some(shift) = shift {
                            right.iter_mut().zip(shift).for_each(|(r, t)| *r += t);
                        }
                    },
                );
                inverse.multiply(primal, 0.0, right, 1.0);
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        let (relaxed, of_kept, of_dropped) = (sigma, 1.0 - sigma, dual_ratio);
                        for (((a, keep), b), w) in merged.iter_mut().zip(&*keep).zip(&mut *primal).zip(anchor) {
                            *b += w;
                            *a = relaxed * *b + *a * if *keep == 1 { of_kept } else { of_dropped };
                        }
                    },
                );
                match pattern {
                    Pattern::NofM { keep: kept, of } => {
                        select::keep_n_of_m(merged, kept, of, keep);
                        Census::default()
                    }
                    _ => Census::of(merged, first, window),
                }
            })
            .collect();
        self.rho = rho;
        if !matches!(pattern, Pattern::NofM { .. }) {
            self.cut_at(&censuses, self.budget.zeros);
        }
    }

    /// Marks what stays when `drop` values go, given what the window showed of them.
    fn cut_at(&mut self, censuses: &[Census], drop: usize) {
        /// A 256th of an octave: the cut drifts by less from one iteration to the next once the search is under way.
        const LEAST_REACH: u32 = 1 << 15;
        let cut = Census::cut(censuses, drop).unwrap_or_else(|| Cut::smallest(&self.merged, drop));
        select::mark(&self.merged, cut, &mut self.keep);
        let reach = cut.key.abs_diff(self.cut.key).saturating_mul(2).clamp(LEAST_REACH, 1 << 20);
        (self.cut, self.window) = (cut, Window::around(cut, reach));
    }

    /// Begins anew, but goes on comparing with the support that was last looked at.
    pub(crate) fn restart(&mut self, start: Self) {
        let checked = std::mem::take(&mut self.checked);
        *self = Self { checked, ..start };
    }

    /// How many positions entered or left the support since this was last asked, and as a share of the kept ones.
    pub(crate) fn support_change(&mut self) -> (usize, f64) {
        let (now, then) = (&self.keep, &self.checked);
        let (changed, kept) = Arch::new().dispatch(
            #[inline(always)]
            || {
                let counts = now.chunks(1 << 16).zip(then.chunks(1 << 16)).map(|(now, then)| {
                    let changed: u32 = now.iter().zip(then).map(|(now, then)| u32::from(now != then)).sum();
                    (changed as usize, now.iter().map(|&keep| u32::from(keep)).sum::<u32>() as usize)
                });
                counts.fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
            },
        );
        self.checked.copy_from_slice(&self.keep);
        (changed, changed as f64 / kept.max(1) as f64)
    }

    /// B of the last iteration, and the support it would have.
    pub(crate) fn primal(&self) -> (&[f32], Vec<u8>) {
        let mut keep = vec![1; self.primal.len()];
        self.budget.project(&self.primal, &mut keep);
        (&self.primal, keep)
    }

    /// D and its support.
    pub(crate) fn finish(mut self) -> (Vec<f32>, Vec<u8>) {
        select::zero_dropped(&mut self.merged, &self.keep);
        (self.merged, self.keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;
    use crate::prune::fixture;

    /// One iteration as ALGORITHMS.md §4 prints it, in f64, with B over-relaxed by σ where D and Λ follow it: returns (B, D, Λ).
    fn naive_step(
        c: &[f64],
        (d, dual): (&[f64], &[f64]),
        inverse: &[f64],
        (rho, sigma): (f64, f64),
        n: usize,
        budget: Budget,
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let right: Vec<f64> = (0..c.len()).map(|i| c[i] - dual[i] + rho * d[i]).collect();
        let b = oracle::product(&right, inverse, n, n);
        let relaxed: Vec<f64> = b.iter().zip(d).map(|(b, d)| sigma * b + (1.0 - sigma) * d).collect();
        let sum: Vec<f64> = relaxed.iter().zip(dual).map(|(b, l)| b + l / rho).collect();
        let mut keep = vec![1; sum.len()];
        budget.project(&sum.iter().map(|&x| x as f32).collect::<Vec<_>>(), &mut keep);
        let d: Vec<f64> = sum.iter().zip(keep).map(|(x, keep)| x * f64::from(keep)).collect();
        let dual = (0..c.len()).map(|i| dual[i] + rho * (relaxed[i] - d[i])).collect();
        (b, d, dual)
    }

    #[test]
    fn the_merged_state_follows_the_printed_iteration() {
        let n = 24;
        let problem = fixture::random(1, 10, n, 90);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let gram = oracle::wide(&conditioned.gram);
        let anchor = conditioned.scaled(&problem.weight);
        let shift: Vec<f32> = oracle::random(8, anchor.len()).iter().map(|t| 0.05 * t).collect();
        let mut c = oracle::product(&oracle::wide(&anchor), &gram, n, n);
        c.iter_mut().zip(&shift).for_each(|(c, t)| *c += f64::from(*t));
        let inverses = Inverses::new(Arc::new(conditioned));
        let cases = fixture::patterns().into_iter().flat_map(|pattern| [1.0, 1.5].map(|sigma| (pattern, sigma)));
        for (pattern, sigma) in cases {
            let budget = Budget { pattern, zeros: pattern.zeros(10, n) };
            let mut search = Search::new(anchor.clone(), &anchor, Some(&shift), n, budget);
            let mut d = oracle::wide(&search.merged);
            let mut dual = vec![0.0; c.len()];
            for rho in [0.1f32, 0.1, 0.15, 0.3, 0.3, 0.6] {
                let mut shifted = gram.clone();
                (0..n).for_each(|j| shifted[j * (n + 1)] += f64::from(rho));
                let exact = oracle::inverse(&shifted, n);
                let b;
                (b, d, dual) = naive_step(&c, (&d, &dual), &exact, (f64::from(rho), sigma), n, budget);
                search.step(&inverses.at(rho, []).unwrap().0, rho, sigma as f32);
                let (primal, _) = search.primal();
                assert!(primal.iter().zip(&b).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-4), "{pattern}, {sigma}");
                fixture::assert_obeys(&search.clone().finish().0, n, pattern);
            }
            let (found, _) = search.finish();
            assert!(found.iter().zip(&d).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-4), "{pattern}, {sigma}");
        }
    }

    #[test]
    fn the_refreshed_inverse_agrees_with_the_exact_one() {
        let (problem, _) = fixture::golden("synthetic_64x96", "alps");
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let (n, gram) = (conditioned.n, oracle::wide(&conditioned.gram));
        let inverses = Inverses::new(Arc::new(conditioned));
        for rho in [0.02f32, 0.1, 3.0] {
            let mut shifted = gram.clone();
            (0..n).for_each(|j| shifted[j * (n + 1)] += f64::from(rho));
            let exact = oracle::inverse(&shifted, n);
            let size = exact.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            let identity: Vec<f32> = (0..n * n).map(|at| f32::from(u8::from(at / n == at % n))).collect();
            let found = inverses.at(rho, []).unwrap().0.product(&identity);
            assert!(found.iter().zip(&exact).all(|(x, y)| (f64::from(*x) - y).abs() <= 1e-4 * size), "{rho}");
        }
    }

    #[test]
    fn an_inverse_is_made_once_for_the_group() {
        let problem = fixture::random(1, 2, 8, 30);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let inverses = Inverses::new(Arc::new(conditioned));
        assert!(inverses.at(0.1, []).unwrap().1 > 0.0);
        assert!(inverses.at(0.1, []).unwrap().1 <= 0.0);
    }

    #[test]
    fn an_inverse_from_elsewhere_is_taken_if_it_is_one() {
        let problem = fixture::random(1, 2, 40, 90);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let conditioned = Arc::new(conditioned);
        let [here, there] = [(); 2].map(|()| Inverses::new(Arc::clone(&conditioned)));
        let made = there.at(0.1, []).unwrap().0;
        let triangle = made.triangle();
        assert!(!here.take(0.125, &triangle), "the inverse of another step");
        for (index, value) in [(7, f32::NAN), (2, 2.0 * triangle[2]), (2, f32::INFINITY)] {
            let mut wrong = triangle.clone();
            wrong[index] = value;
            assert!(!here.take(0.1, &wrong));
        }
        assert!(!here.take(0.1, &triangle[1..]));
        assert!(here.take(0.1, &triangle));
        let (found, flops) = here.at(0.1, []).unwrap();
        assert_eq!(found, made);
        assert!(flops <= 0.0, "it was made again");
    }

    #[test]
    fn an_inverse_that_nothing_holds_up_but_damping_is_taken_and_one_of_the_next_step_is_not() {
        // Inputs that are all but alike, as those of a first layer: the largest eigenvalue is near n, the least is the damping.
        let (n, tokens) = (600, 40);
        let (common, own) = (oracle::random(1, tokens), oracle::random(2, tokens * n));
        let inputs: Vec<f32> = own.iter().enumerate().map(|(at, own)| common[at / n] + 0.01 * own).collect();
        let gram: Vec<f32> = oracle::gram(&inputs, &inputs, n).iter().map(|&value| value as f32).collect();
        let gram = crate::linalg::matrix(gram, n, &candle_core::Device::Cpu).unwrap();
        let (conditioned, ()) = Conditioned::factored(&gram, 1e-4, |_| Ok(())).unwrap();
        let conditioned = Arc::new(conditioned);
        let [here, there] = [(); 2].map(|()| Inverses::new(Arc::clone(&conditioned)));
        let [free, next] = [0.0, 0.1].map(|rho| there.at(rho, []).unwrap().0.triangle());
        assert!(!here.take(0.0, &next) && !here.take(0.1, &free));
        assert!(here.take(0.0, &free) && here.take(0.1, &next));
    }

    #[test]
    fn threads_that_meet_at_an_inverse_make_those_ahead_and_get_the_same_bits() {
        let problem = fixture::random(1, 2, 40, 90);
        let (conditioned, ()) = Conditioned::factored(&problem.stats.gram, 0.01, |_| Ok(())).unwrap();
        let conditioned = Arc::new(conditioned);
        let ramp = [0.1f32, 0.2, 0.3, 0.4, 0.5];
        let walk = |inverses: &Inverses| -> Vec<Arc<Symmetric>> {
            let step = |step: usize| inverses.at(ramp[step], ramp[step + 1..].iter().copied()).unwrap().0;
            (0..ramp.len()).map(step).collect()
        };
        let alone = walk(&Inverses::new(Arc::clone(&conditioned)));
        let shared = Inverses::new(conditioned);
        let together = oracle::with_threads(3, || (0..8).into_par_iter().map(|_| walk(&shared)).collect::<Vec<_>>());
        assert!(together.iter().all(|found| *found == alone));
    }
}
