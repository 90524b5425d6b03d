//! The largest eigenvalue of a symmetric positive semi-definite matrix.

use super::gemm::{View, gemm};

/// An upper estimate of λ_max of a symmetric positive semi-definite `matrix [n, n]`: power iteration, then 1 % on top.
///
/// Iterates until the Rayleigh quotient, a lower bound that only grows, gains less than 1e-4 a step, at most 200 times; the
/// start vector is the column sums of |matrix|, positive and therefore not orthogonal to a dominant non-negative mode.
pub fn largest_eigenvalue(matrix: &[f32], n: usize) -> f64 {
    let mut vector: Vec<f32> = matrix.chunks(n.max(1)).map(|row| row.iter().map(|x| x.abs()).sum()).collect();
    let mut image = vec![0.0; n];
    let mut estimate = 0.0f64;
    for _ in 0..200 {
        let norm = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        if norm <= 0.0 {
            return 0.0;
        }
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        gemm(&mut image, n, 0.0, View::new(&vector, 1, n, n), View::new(matrix, n, n, n), 1.0);
        let quotient = vector.iter().zip(&image).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let settled = quotient - estimate <= 1e-4 * quotient;
        estimate = quotient;
        std::mem::swap(&mut vector, &mut image);
        if settled {
            break;
        }
    }
    1.01 * estimate
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn a_diagonal_matrix_gives_its_largest_entry() {
        let matrix = [2.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 3.0];
        assert!((largest_eigenvalue(&matrix, 3) / 7.07 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn the_estimate_bounds_the_rayleigh_quotient_of_any_vector() {
        let n = 24;
        let gram = oracle::gram(&oracle::inputs(1, 80, n), &oracle::inputs(1, 80, n), n);
        let narrow: Vec<f32> = gram.iter().map(|&x| x as f32).collect();
        let bound = largest_eigenvalue(&narrow, n);
        for seed in 0..200 {
            let v = oracle::wide(&oracle::random(seed, n));
            let norm: f64 = v.iter().map(|x| x * x).sum();
            assert!(oracle::quadratic(&v, &gram) <= bound * norm);
        }
    }

    #[test]
    fn a_zero_matrix_has_no_positive_eigenvalue() {
        assert!(largest_eigenvalue(&[0.0; 16], 4).abs() <= 0.0);
    }
}
