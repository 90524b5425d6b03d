//! The largest eigenvalue of a symmetric positive semi-definite matrix.

use super::gemm::{View, gemm};

/// Vectors that are iterated side by side: a product with several costs little more than with one.
const STARTS: usize = 4;
const MOST_STEPS: usize = 200;

/// An upper estimate of λ_max of a symmetric positive semi-definite `matrix [n, n]`: power iteration, then 1 % on top; never less
/// than the largest entry of the diagonal.
///
/// Iterates until the Rayleigh quotients, lower bounds that only grow, gain less than 1e-4 a step, at most 200 times. One vector
/// starts as the column of the largest diagonal entry; but that input may be one that the dominant mode has no part in, so the
/// others start as images of vectors without a pattern.
pub fn largest_eigenvalue(matrix: &[f32], n: usize) -> f64 {
    let diagonal = |j: usize| matrix[j * n + j];
    let Some(largest) = (0..n).max_by(|&i, &j| diagonal(i).total_cmp(&diagonal(j))) else { return 0.0 };
    let product = |vectors: &[f32], images: &mut [f32]| {
        gemm(images, n, 0.0, View::new(vectors, STARTS, n, n), View::new(matrix, n, n, n), 1.0);
    };
    let mut vectors: Vec<f32> = (0..STARTS as u64 * n as u64).map(without_pattern).collect();
    let mut images = vec![0.0; vectors.len()];
    product(&vectors, &mut images);
    std::mem::swap(&mut vectors, &mut images);
    vectors[..n].copy_from_slice(&matrix[largest * n..][..n]);
    let mut estimates = [0.0f64; STARTS];
    for _ in 0..MOST_STEPS {
        vectors.chunks_mut(n).for_each(normalise);
        product(&vectors, &mut images);
        let mut settled = true;
        for ((estimate, vector), image) in estimates.iter_mut().zip(vectors.chunks(n)).zip(images.chunks(n)) {
            let quotient = vector.iter().zip(image).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
            settled &= quotient - *estimate <= 1e-4 * quotient;
            *estimate = quotient;
        }
        std::mem::swap(&mut vectors, &mut images);
        if settled {
            break;
        }
    }
    let estimate = estimates.into_iter().fold(0.0, f64::max);
    (1.01 * estimate).max(f64::from(diagonal(largest)))
}

/// To length 1; a vector of zeros stays as it is.
fn normalise(vector: &mut [f32]) {
    let norm = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
}

/// A value in `[-0.5, 0.5)` that tells nothing of its neighbours'. Source: Steele et al., *SplitMix* (OOPSLA 2014).
fn without_pattern(index: u64) -> f32 {
    let mut bits = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ bits >> 31) >> 40) as f32 / (1 << 24) as f32 - 0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    /// λ_max in f64: the columns of a high power are multiples of the dominant eigenvector.
    fn exact(matrix: &[f64], n: usize) -> f64 {
        let mut power = matrix.to_vec();
        for _ in 0..40 {
            let size = power.iter().fold(0.0f64, |size, x| size.max(x.abs()));
            power.iter_mut().for_each(|x| *x /= size);
            power = oracle::product(&power, &power, n, n);
        }
        let norm = |row: &&[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let row = power.chunks(n).max_by(|a, b| norm(a).total_cmp(&norm(b))).unwrap();
        oracle::quadratic(row, matrix) / norm(&row)
    }

    /// At least the eigenvalue, and little more.
    fn assert_bounds(matrix: &[f32], n: usize, what: &str) {
        let (bound, exact) = (largest_eigenvalue(matrix, n), exact(&oracle::wide(matrix), n));
        assert!(bound >= exact && bound <= 1.0101 * exact, "{what}: {bound} for {exact}");
    }

    #[test]
    fn a_diagonal_matrix_gives_its_largest_entry() {
        let matrix = [2.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 3.0];
        assert!((largest_eigenvalue(&matrix, 3) / 7.07 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn the_bound_holds_and_is_tight() {
        assert_bounds(&[1.0, -0.9, -0.9, 1.0], 2, "inputs that go against each other");
        // The largest diagonal entry stands alone, and the dominant mode is elsewhere.
        let apart = [1.0, 0.0, 0.0, 0.0, 0.9, -0.8, 0.0, -0.8, 0.9];
        assert_bounds(&apart, 3, "a lone large input");
        for seed in 0..40 {
            let n = 5 + seed as usize;
            let inputs = oracle::inputs(seed, 3 * n, n);
            let gram: Vec<f32> = oracle::gram(&inputs, &inputs, n).iter().map(|&x| x as f32).collect();
            assert_bounds(&gram, n, &format!("seed {seed}"));
        }
    }

    #[test]
    fn a_zero_matrix_has_no_positive_eigenvalue() {
        assert!(largest_eigenvalue(&[0.0; 16], 4).abs() <= 0.0);
        assert!(largest_eigenvalue(&[], 0).abs() <= 0.0);
    }
}
