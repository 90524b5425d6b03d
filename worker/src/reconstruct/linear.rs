//! Products of activations with weights, and the products of their gradients, over all threads.

use rayon::prelude::*;

use crate::linalg::gemm::{View, gemm_parallel};

/// A row-major matrix `[values.len() / columns, columns]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    /// The elements.
    pub(super) values: Vec<f32>,
    /// Elements of a row.
    pub(super) columns: usize,
}

impl Matrix {
    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.values.len() / self.columns.max(1)
    }

    fn view(&self) -> View<'_> {
        View::new(&self.values, self.rows(), self.columns, self.columns)
    }
}

/// x·Wᵀ + b, `[rows, in]` to `[rows, out]`.
pub(super) fn forward(x: &[f32], weight: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let (inner, width) = (weight.columns, weight.rows());
    let rows = x.len() / inner;
    let mut out = vec![0.0; rows * width];
    gemm_parallel(&mut out, width, 0.0, View::new(x, rows, inner, inner), weight.view().transposed(), 1.0);
    if let Some(bias) = bias {
        out.par_chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    }
    out
}

/// The gradient of x, dy·W: `[rows, out]` to `[rows, in]`.
pub(super) fn input_gradient(dy: &[f32], weight: &Matrix) -> Vec<f32> {
    let (inner, width) = (weight.rows(), weight.columns);
    let rows = dy.len() / inner;
    let mut out = vec![0.0; rows * width];
    gemm_parallel(&mut out, width, 0.0, View::new(dy, rows, inner, inner), weight.view(), 1.0);
    out
}

/// The gradient of W `[width, columns]`, dyᵀ·x, of dy `[rows, width]` and x `[rows, columns]`.
pub(super) fn weight_gradient(dy: &[f32], x: &[f32], width: usize, columns: usize) -> Vec<f32> {
    let rows = dy.len() / width;
    let (left, right) = (View::new(dy, rows, width, width), View::new(x, rows, columns, columns));
    let mut out = vec![0.0; width * columns];
    gemm_parallel(&mut out, columns, 0.0, left.transposed(), right, 1.0);
    out
}
