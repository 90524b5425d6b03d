//! Naive f64 loops written from the papers, and small random problems: what the fast code is tested against.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `count` values in `[-0.5, 0.5)`.
pub(crate) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random::<f32>() - 0.5).collect()
}

/// The same values in f64.
pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Runs `work` in a pool of `threads` threads.
pub(crate) fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Correlated inputs `[tokens, columns]` with channels of different size: a shared component, and a channel scale.
pub(crate) fn inputs(seed: u64, tokens: usize, columns: usize) -> Vec<f32> {
    let noise = random(seed, tokens * columns);
    let shared = random(seed ^ 0x5eed, tokens * 4);
    let mixing = random(seed ^ 0x3317, 4 * columns);
    let mut x = noise;
    for (t, row) in x.chunks_mut(columns).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            for c in 0..4 {
                *value += 2.0 * shared[t * 4 + c] * mixing[c * columns + j];
            }
            *value *= 0.25 + 2.0 * (mixing[j] + 0.5);
        }
    }
    x
}

/// `xᵀy / tokens` of `[tokens, columns]` matrices.
pub(crate) fn gram(x: &[f32], y: &[f32], columns: usize) -> Vec<f64> {
    let tokens = x.len() / columns;
    let mut out = vec![0.0; columns * columns];
    for t in 0..tokens {
        for i in 0..columns {
            for j in 0..columns {
                out[i * columns + j] += f64::from(x[t * columns + i]) * f64::from(y[t * columns + j]) / tokens as f64;
            }
        }
    }
    out
}

/// A gram of correlated inputs, damped by a hundredth of its mean diagonal: positive definite.
pub(crate) fn spd(seed: u64, n: usize) -> Vec<f32> {
    let x = inputs(seed, 2 * n, n);
    let mut gram: Vec<f32> = gram(&x, &x, n).iter().map(|&v| v as f32).collect();
    let mean = (0..n).map(|j| gram[j * n + j]).sum::<f32>() / n as f32;
    (0..n).for_each(|j| gram[j * n + j] += 0.01 * mean);
    gram
}

/// Row-major `a [_, inner] · b [inner, columns]`.
pub(crate) fn product(a: &[f64], b: &[f64], inner: usize, columns: usize) -> Vec<f64> {
    let rows = a.len() / inner;
    let mut out = vec![0.0; rows * columns];
    for i in 0..rows {
        for k in 0..inner {
            for j in 0..columns {
                out[i * columns + j] += a[i * inner + k] * b[k * columns + j];
            }
        }
    }
    out
}

/// The transpose of a square matrix.
pub(crate) fn transpose(a: &[f64], n: usize) -> Vec<f64> {
    (0..n * n).map(|index| a[(index % n) * n + index / n]).collect()
}

/// The inverse by Gauss–Jordan elimination with partial pivoting.
pub(crate) fn inverse(a: &[f64], n: usize) -> Vec<f64> {
    let mut a = a.to_vec();
    let mut inv: Vec<f64> = (0..n * n).map(|index| if index % n == index / n { 1.0 } else { 0.0 }).collect();
    for p in 0..n {
        let best = (p..n).max_by(|&i, &j| a[i * n + p].abs().total_cmp(&a[j * n + p].abs())).unwrap();
        for j in 0..n {
            a.swap(p * n + j, best * n + j);
            inv.swap(p * n + j, best * n + j);
        }
        let pivot = a[p * n + p];
        for j in 0..n {
            a[p * n + j] /= pivot;
            inv[p * n + j] /= pivot;
        }
        for i in (0..n).filter(|&i| i != p) {
            let factor = a[i * n + p];
            for j in 0..n {
                a[i * n + j] -= factor * a[p * n + j];
                inv[i * n + j] -= factor * inv[p * n + j];
            }
        }
    }
    inv
}

/// `Σ_ij δ_i G_ij δ_j` of one row.
pub(crate) fn quadratic(delta: &[f64], gram: &[f64]) -> f64 {
    let n = delta.len();
    (0..n * n).map(|index| delta[index / n] * gram[index] * delta[index % n]).sum()
}

/// The row `v` with the given support that minimises `(v − w) G (v − w)ᵀ`, by the normal equations on the support.
pub(crate) fn least_squares_on_support(w: &[f64], gram: &[f64], keep: &[bool]) -> Vec<f64> {
    let n = w.len();
    let support: Vec<usize> = (0..n).filter(|&j| keep[j]).collect();
    let k = support.len();
    let sub: Vec<f64> = support.iter().flat_map(|&i| support.iter().map(move |&j| gram[i * n + j])).collect();
    let right: Vec<f64> = support.iter().map(|&i| (0..n).map(|j| gram[i * n + j] * w[j]).sum()).collect();
    let inv = inverse(&sub, k);
    let mut v = vec![0.0; n];
    for (a, &i) in support.iter().enumerate() {
        v[i] = (0..k).map(|b| inv[a * k + b] * right[b]).sum();
    }
    v
}

/// Optimal brain surgeon from left to right for a given mask: each pruned weight is removed exactly, with `H⁻¹` of the columns
/// not yet visited recomputed from scratch. Returns the weights and the summed saliencies `w² / [H⁻¹]_jj`.
pub(crate) fn sequential_obs(w: &[f64], gram: &[f64], keep: &[bool]) -> (Vec<f64>, f64) {
    let n = w.len();
    let mut v = w.to_vec();
    let mut loss = 0.0;
    for j in (0..n).filter(|&j| !keep[j]) {
        let rest = n - j;
        let sub: Vec<f64> = (0..rest * rest).map(|index| gram[(j + index / rest) * n + j + index % rest]).collect();
        let inv = inverse(&sub, rest);
        let step = v[j] / inv[0];
        loss += v[j] * step;
        for c in 0..rest {
            v[j + c] -= step * inv[c];
        }
        v[j] = 0.0;
    }
    (v, loss)
}
