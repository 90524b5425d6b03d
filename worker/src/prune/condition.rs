//! Statistics made fit for a factorisation: dead channels taken out, damped, scaled to a unit diagonal.

use std::slice::from_ref;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use espalier_common::pattern::Pattern;
use pulp::Arch;
use rayon::prelude::*;

use super::{Problem, Solution, SolveError};
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::symmetric::Symmetric;
use crate::linalg::{held, matrix, slices, values};

/// How often damping is multiplied by ten before a group is given up.
const MOST_RAISES: u32 = 3;
/// A channel whose mean square is below this share of the largest one is dead: its weights do not matter.
const DEAD_SHARE: f32 = 1e-12;

/// A gram `Ĝ = D⁻¹(G + δI)D⁻¹` with unit diagonal, δ being `damping` times the mean of G's diagonal.
///
/// Source: ALGORITHMS.md §0 and §9.4 stage B.
#[derive(Debug)]
pub(crate) struct Conditioned {
    /// Width.
    pub(crate) n: usize,
    /// Ĝ, `[n, n]`; the rows and columns of dead channels are those of the identity.
    pub(crate) gram: Vec<f32>,
    /// The same, once it is multiplied by.
    factor: OnceLock<Symmetric>,
    /// The diagonal of D: `sqrt(G_jj + δ)`.
    pub(crate) scale: Vec<f32>,
    /// Channels that were never active.
    pub(crate) dead: Vec<bool>,
    /// Share of the mean diagonal that was added.
    pub(crate) damping: f64,
    /// How often it had to be raised.
    pub(crate) raised: u32,
}

impl Conditioned {
    /// Conditions `gram [n, n]` and factors it, with more damping each time the factorisation fails.
    ///
    /// # Errors
    /// `NotFinite`, or `NotPositiveDefinite` when damping was raised three times.
    pub(crate) fn factored<T>(
        gram: &Tensor,
        damping: f64,
        factor: impl Fn(&Self) -> Result<T, NotPositiveDefinite>,
    ) -> Result<(Self, T), SolveError> {
        let held = held(from_ref(gram));
        let raw = slices(&held)?[0];
        if !all_finite(raw) {
            return Err(SolveError::NotFinite { what: "gram" });
        }
        let mut damping = damping;
        let mut raised = 0;
        loop {
            let conditioned = Self::new(raw, damping, raised);
            match factor(&conditioned) {
                Ok(factored) => return Ok((conditioned, factored)),
                Err(_) if raised < MOST_RAISES => {
                    raised += 1;
                    damping = if damping > 0.0 { damping * 10.0 } else { 1e-4 };
                }
                Err(NotPositiveDefinite { pivot }) => {
                    return Err(SolveError::NotPositiveDefinite { columns: conditioned.n, pivot, damping });
                }
            }
        }
    }

    fn new(raw: &[f32], damping: f64, raised: u32) -> Self {
        let n = raw.len().isqrt();
        let diagonal: Vec<f32> = (0..n).map(|j| raw[j * n + j]).collect();
        let largest = diagonal.iter().copied().fold(0.0, f32::max);
        let dead: Vec<bool> = diagonal.iter().map(|&g| g <= DEAD_SHARE * largest).collect();
        let ridge = damping * diagonal.iter().map(|&g| f64::from(g)).sum::<f64>() / n.max(1) as f64;
        let scale: Vec<f32> = diagonal
            .iter()
            .zip(&dead)
            // A dead channel without damping has no scale of its own.
            .map(|(&g, dead)| if *dead && ridge <= 0.0 { 1.0 } else { (f64::from(g) + ridge).sqrt() as f32 })
            .collect();
        // Zero for dead channels, which leaves them nothing but the diagonal.
        let inverse: Vec<f64> =
            scale.iter().zip(&dead).map(|(&s, dead)| if *dead { 0.0 } else { 1.0 / f64::from(s) }).collect();
        // Zeros are pages that nobody has touched: whoever fills them has them cleared, all threads at once.
        let mut gram = vec![0.0; n * n];
        gram.par_chunks_mut(n.max(1)).zip(raw.par_chunks(n.max(1))).enumerate().for_each(|(i, (row, raw))| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    row.iter_mut().zip(raw).zip(&inverse).for_each(|((value, raw), &factor)| {
                        *value = (f64::from(*raw) * (inverse[i] * factor)) as f32;
                    });
                },
            );
            row[i] = 1.0;
        });
        Self { n, gram, factor: OnceLock::new(), scale, dead, damping, raised }
    }

    /// Ĝ as a factor of products. Whoever asks first lays it out, by itself: others wait, so it must not wait for them.
    pub(crate) fn factor(&self) -> &Symmetric {
        self.factor.get_or_init(|| Symmetric::new(&self.gram))
    }

    /// `W·D`.
    pub(crate) fn scaled(&self, weight: &[f32]) -> Vec<f32> {
        let mut out = weight.to_vec();
        out.par_chunks_mut(self.n.max(1)).for_each(|row| {
            Arch::new().dispatch(
                #[inline(always)]
                || row.iter_mut().zip(&self.scale).for_each(|(value, scale)| *value *= scale),
            );
        });
        out
    }

    /// `W·D`, but zero in dead channels, so that they are the first to be pruned.
    pub(crate) fn scaled_alive(&self, weight: &[f32]) -> Vec<f32> {
        let mut out = self.scaled(weight);
        if self.dead.contains(&true) {
            out.par_chunks_mut(self.n).for_each(|row| {
                row.iter_mut().zip(&self.dead).filter(|(_, dead)| **dead).for_each(|(value, _)| *value = 0.0);
            });
        }
        out
    }

    /// Undoes the scaling: `+0.0` where `keep` is 0, and the dense weight where a dead channel had to keep it.
    pub(crate) fn restored(&self, scaled: &[f32], keep: &[u8], weight: &[f32]) -> Vec<f32> {
        let n = self.n;
        let mut out = vec![0.0; scaled.len()];
        out.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            let span = i * n..(i + 1) * n;
            let (keep, dense) = (&keep[span.clone()], &weight[span.clone()]);
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    let found = row.iter_mut().zip(&scaled[span]).zip(keep).zip(&self.scale);
                    found.for_each(|(((value, found), keep), scale)| {
                        *value = if *keep == 0 { 0.0 } else { found / scale };
                    });
                },
            );
            for (j, value) in row.iter_mut().enumerate().filter(|(j, _)| self.dead[*j] && keep[*j] == 1) {
                *value = dense[j];
            }
        });
        out
    }

    /// Number of dead channels.
    pub(crate) fn dead_channels(&self) -> u32 {
        self.dead.iter().filter(|dead| **dead).count() as u32
    }

    /// A solution that reports this conditioning.
    pub(crate) fn solution(
        &self,
        problem: &Problem<'_>,
        values: Vec<f32>,
        iterations: u32,
        flops: f64,
    ) -> Result<Solution, SolveError> {
        Ok(Solution {
            weight: matrix(values, self.n, problem.weight.device())?,
            iterations,
            damping: self.damping,
            damping_raised: self.raised,
            dead_channels: self.dead_channels(),
            alpha: None,
            flops,
        })
    }
}

/// Arithmetic that a group's first solve accounts for.
#[derive(Debug, Default)]
pub(crate) struct SharedFlops {
    flops: f64,
    taken: AtomicBool,
}

impl SharedFlops {
    pub(crate) fn new(flops: f64) -> Self {
        Self { flops, taken: AtomicBool::new(false) }
    }

    /// The flops for the first caller, zero for the others.
    pub(crate) fn take(&self) -> f64 {
        if self.taken.swap(true, Ordering::Relaxed) { 0.0 } else { self.flops }
    }
}

/// The dense weight's values, once the problem is found to be well posed; `None` values if nothing is to be pruned.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// Row-major `[rows, columns]`.
    pub(crate) weight: Vec<f32>,
    /// Output channels.
    pub(crate) rows: usize,
    /// Input channels.
    pub(crate) columns: usize,
}

/// Checks that the weight is finite and as wide as the statistics, and that it can have the pattern.
///
/// # Errors
/// `Unsupported`, `NotFinite`.
pub(crate) fn admit(method: &'static str, problem: &Problem<'_>, width: usize) -> Result<Admitted, SolveError> {
    let (rows, columns) = problem.weight.dims2()?;
    let unsupported = |reason| Err(SolveError::Unsupported { method, pattern: problem.pattern, reason });
    if columns != width {
        return unsupported("the statistics are of another width than the weight");
    }
    if problem.pattern.validate_for(problem.tensor, columns).is_err() {
        return unsupported("the weight's width is not a multiple of the group's, or the pattern is out of range");
    }
    let weight = values(problem.weight)?;
    if !all_finite(&weight) {
        return Err(SolveError::NotFinite { what: "weight" });
    }
    Ok(Admitted { weight, rows, columns })
}

/// Whether there is no NaN and no infinity among them.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    const CHUNK: usize = 1 << 16;
    values.par_chunks(CHUNK).all(|values| {
        Arch::new().dispatch(
            #[inline(always)]
            || values.iter().fold(true, |finite, value| finite & value.is_finite()),
        )
    })
}

/// Accepts every pattern that is in range.
///
/// # Errors
/// `Unsupported`.
pub(crate) fn supports_valid(method: &'static str, pattern: Pattern) -> Result<(), SolveError> {
    let unsupported = |reason| Err(SolveError::Unsupported { method, pattern, reason });
    match pattern {
        Pattern::Parameters { .. } | Pattern::Blocks { .. } => {
            return unsupported("it places zeros and removes no heads or channels");
        }
        Pattern::Imported => return unsupported("it chooses its zeros itself"),
        Pattern::Unstructured { .. } | Pattern::NofM { .. } => {}
    }
    pattern.validate().map_err(|_| SolveError::Unsupported { method, pattern, reason: "it is out of range" })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn gram(values: &[f32], n: usize) -> Tensor {
        matrix(values.to_vec(), n, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_diagonal_becomes_one_and_dead_channels_stand_alone() {
        let (conditioned, ()) =
            Conditioned::factored(&gram(&[4.0, 1.0, 0.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.0], 3), 0.0, |_| Ok(())).unwrap();
        assert_eq!(conditioned.dead, [false, false, true]);
        let expected = [1.0, 1.0 / 6.0, 0.0, 1.0 / 6.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert!(conditioned.gram.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-7));
    }

    #[test]
    fn damping_is_raised_three_times_and_then_it_is_an_error() {
        let fails_below = |limit: f64| {
            move |c: &Conditioned| if c.damping < limit { Err(NotPositiveDefinite { pivot: 1 }) } else { Ok(()) }
        };
        let gram = gram(&[1.0, 0.0, 0.0, 1.0], 2);
        let (conditioned, ()) = Conditioned::factored(&gram, 0.01, fails_below(0.5)).unwrap();
        assert_eq!(conditioned.raised, 2);
        assert!((conditioned.damping - 1.0).abs() < 1e-12);
        let error = Conditioned::factored(&gram, 0.01, fails_below(100.0)).unwrap_err();
        assert!(matches!(error, SolveError::NotPositiveDefinite { columns: 2, pivot: 1, .. }));
    }

    #[test]
    fn a_gram_that_is_not_finite_is_refused() {
        let result = Conditioned::factored(&gram(&[f32::NAN], 1), 0.01, |_| Ok(()));
        assert!(matches!(result, Err(SolveError::NotFinite { what: "gram" })));
    }
}
