//! The quadratic error every method shares, with f32 products and f64 sums.
//!
//! `E(V) = ‖V·X̂ᵀ − W·Xᵀ‖² / tokens`. With `Δ = V − W`, `G = X̂ᵀX̂`, `K = X̂ᵀX` and `Y = XᵀX`, each over tokens,
//! `E = ΔGΔᵀ − 2·Δ(K − G)Wᵀ + W(G − K − Kᵀ + Y)Wᵀ`, summed over rows. The differences are formed first: the textbook form
//! `VGVᵀ − 2VKWᵀ + WYWᵀ` loses every digit where V is close to W.

use rayon::prelude::*;

use super::gemm::{View, gemm, row_tile};
use super::lanes::{Lanes, in_lanes};
use super::transposed;

/// Partial sums of a dot product: enough of them to hide the latency of an addition.
const LANES: usize = 32;

/// `Σ_j a_j·b_j` in f64, in lanes that are summed in order.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    in_lanes(Dot(a, b))
}

struct Dot<'a>(&'a [f32], &'a [f32]);

impl Lanes for Dot<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        inlined_dot(self.0, self.1)
    }
}

/// [`dot`], for code that is itself compiled for wide vectors.
#[inline(always)]
pub(super) fn inlined_dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((a_lanes, a_rest), (b_lanes, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(x[lane]) * f64::from(y[lane]);
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>()
}

/// `⟨a_i M, b_i⟩` for each row i of `a` and `b` `[rows, n]` and a matrix M `[n, n]`.
pub fn row_forms(a: &[f32], matrix: &[f32], b: &[f32], n: usize) -> Vec<f64> {
    let tile = (row_tile(a.len() / n.max(1)) * n).max(1);
    a.par_chunks(tile)
        .zip(b.par_chunks(tile))
        .flat_map_iter(|(a, b)| {
            let rows = a.len() / n;
            let mut image = vec![0.0; a.len()];
            gemm(&mut image, n, 0.0, View::new(a, rows, n, n), View::new(matrix, n, n, n), 1.0);
            image.chunks(n).zip(b.chunks(n)).map(|(x, y)| dot(x, y)).collect::<Vec<_>>()
        })
        .collect()
}

/// Columns of a panel of [`energies`]: few, so that little of the upper half is computed, but wide enough for a product.
const PANEL: usize = 128;

/// `tr(ΔGΔᵀ)` of `delta [rows, n]` and a symmetric `gram [n, n]`, see [`energies`].
pub fn energy(delta: &[f32], gram: &[f32], n: usize) -> f64 {
    energies(delta, gram, n).iter().sum()
}

/// `δGδᵀ` of each row δ of `delta [rows, n]` and a symmetric `gram [n, n]`, of which the upper half is read: for each panel of
/// columns, twice what lies below its square on the diagonal, and the square once; what lies below is read as what lies beside.
pub fn energies(delta: &[f32], gram: &[f32], n: usize) -> Vec<f64> {
    let tile = (row_tile(delta.len() / n.max(1)) * n).max(1);
    let of_tile = |delta: &[f32]| {
        let rows = delta.len() / n;
        let mut image = vec![0.0; rows * PANEL.min(n)];
        let mut forms = vec![0.0; rows];
        for first in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - first);
            let last = first + width;
            let image = &mut image[..rows * width];
            let square = View::new(&gram[first * n + first..], width, width, n);
            gemm(image, width, 0.0, View::new(&delta[first..], rows, width, n), square, 1.0);
            if last < n {
                let beside = View::new(&gram[first * n + last..], width, n - last, n);
                gemm(image, width, 1.0, View::new(&delta[last..], rows, n - last, n), beside.transposed(), 2.0);
            }
            for ((form, image), delta) in forms.iter_mut().zip(image.chunks(width)).zip(delta.chunks(n)) {
                *form += dot(image, &delta[first..last]);
            }
        }
        forms
    };
    delta.par_chunks(tile).flat_map_iter(of_tile).collect()
}

/// Differences of the dense against the corrected statistics.
#[derive(Debug, Clone)]
pub struct Correction {
    /// `(K − G)ᵀ`, `[n, n]`: `W·towards_dense = C − W·G` for the target products `C = W·Kᵀ`.
    pub towards_dense: Vec<f32>,
    /// `G − K − Kᵀ + Y = (X̂ − X)ᵀ(X̂ − X)`.
    pub gap: Vec<f32>,
}

impl Correction {
    /// From the grams of corrected and dense inputs and their cross product.
    pub fn new(gram: &[f32], cross: &[f32], dense: &[f32], n: usize) -> Self {
        let mut towards_dense = transposed(cross, n);
        let mut gap = vec![0.0; n * n];
        let statistics = gram.par_chunks(n.max(1)).zip(cross.par_chunks(n.max(1))).zip(dense.par_chunks(n.max(1)));
        let differences = gap.par_chunks_mut(n.max(1)).zip(towards_dense.par_chunks_mut(n.max(1)));
        differences.zip(statistics).for_each(|((gap, towards), ((gram, cross), dense))| {
            for (j, (gap, towards)) in gap.iter_mut().zip(towards).enumerate() {
                let [g, k, k_t, y] = [gram[j], cross[j], *towards, dense[j]].map(f64::from);
                *gap = (g - k - k_t + y) as f32;
                *towards -= gram[j];
            }
        });
        Self { towards_dense, gap }
    }
}

/// What each row has of `E(V)`, with X̂ = X if there is no correction.
pub fn errors(solution: &[f32], weight: &[f32], gram: &[f32], correction: Option<&Correction>, n: usize) -> Vec<f64> {
    let delta: Vec<f32> = solution.iter().zip(weight).map(|(v, w)| v - w).collect();
    let mut own = energies(&delta, gram, n);
    if let Some(correction) = correction {
        let mixed = row_forms(weight, &correction.towards_dense, &delta, n);
        let gap = energies(weight, &correction.gap, n);
        own.iter_mut().zip(mixed.iter().zip(gap)).for_each(|(own, (mixed, gap))| *own += gap - 2.0 * mixed);
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn error_in_gram_form_equals_the_error_on_explicit_activations() {
        let (rows, n, tokens) = (5, 19, 60);
        let x = oracle::inputs(1, tokens, n);
        let noise = oracle::random(2, tokens * n);
        let corrected: Vec<f32> = x.iter().zip(&noise).map(|(x, e)| x + 0.1 * e).collect();
        let (w, v) = (oracle::random(3, rows * n), oracle::random(4, rows * n));
        let narrow = |values: Vec<f64>| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let gram = narrow(oracle::gram(&corrected, &corrected, n));
        let cross = narrow(oracle::gram(&corrected, &x, n));
        let dense = narrow(oracle::gram(&x, &x, n));
        let mut expected = 0.0;
        for t in 0..tokens {
            for i in 0..rows {
                let at = |weight: &[f32], inputs: &[f32]| -> f64 {
                    (0..n).map(|j| f64::from(weight[i * n + j]) * f64::from(inputs[t * n + j])).sum()
                };
                expected += (at(&v, &corrected) - at(&w, &x)).powi(2) / tokens as f64;
            }
        }
        let correction = Correction::new(&gram, &cross, &dense, n);
        let found: f64 = errors(&v, &w, &gram, Some(&correction), n).iter().sum();
        assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    }

    #[test]
    fn half_of_a_gram_gives_the_energy_of_the_whole_at_awkward_shapes() {
        for (rows, n) in [(1, 1), (3, 127), (100, 128), (5, 129), (97, 300), (401, 40)] {
            let (delta, x) = (oracle::random(5, rows * n), oracle::inputs(6, n + 9, n));
            let gram = oracle::gram(&x, &x, n);
            let mut expected = 0.0;
            for row in delta.chunks(n) {
                for i in 0..n {
                    expected += f64::from(row[i]) * (0..n).map(|j| gram[i * n + j] * f64::from(row[j])).sum::<f64>();
                }
            }
            let narrow: Vec<f32> = gram.iter().map(|&value| value as f32).collect();
            let found = energy(&delta, &narrow, n);
            let tolerance = 4.0 * n as f64 * f64::from(f32::EPSILON);
            assert!((found / expected - 1.0).abs() <= tolerance, "{rows} x {n}: {found} {expected}");
        }
    }

    #[test]
    fn the_error_of_the_dense_weight_on_its_own_inputs_is_zero() {
        let w = oracle::random(1, 6 * 8);
        let gram = oracle::random(2, 64);
        assert!(errors(&w, &w, &gram, None, 8).iter().all(|error| error.abs() <= 0.0));
    }
}
