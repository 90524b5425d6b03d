//! Products of activations with weights, and the products of their gradients, in tiles of rows over all threads.

use rayon::prelude::*;

use crate::linalg::gemm::{View, gemm};

/// Rows of one tile. Tiles depend on shapes alone and every element has one sum, so bits do not depend on the threads.
const TILE: usize = 128;

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
    let right = weight.view().transposed();
    let mut out = vec![0.0; x.len() / inner * width];
    out.par_chunks_mut(TILE * width).zip(x.par_chunks(TILE * inner)).for_each(|(out, x)| {
        gemm(out, width, 0.0, View::new(x, x.len() / inner, inner, inner), right, 1.0);
        if let Some(bias) = bias {
            for row in out.chunks_exact_mut(width) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    });
    out
}

/// The gradient of x, dy·W: `[rows, out]` to `[rows, in]`.
pub(super) fn input_gradient(dy: &[f32], weight: &Matrix) -> Vec<f32> {
    let (inner, width) = (weight.rows(), weight.columns);
    let mut out = vec![0.0; dy.len() / inner * width];
    out.par_chunks_mut(TILE * width).zip(dy.par_chunks(TILE * inner)).for_each(|(out, dy)| {
        gemm(out, width, 0.0, View::new(dy, dy.len() / inner, inner, inner), weight.view(), 1.0);
    });
    out
}

/// The gradient of W `[width, columns]`, dyᵀ·x, of dy `[rows, width]` and x `[rows, columns]`.
pub(super) fn weight_gradient(dy: &[f32], x: &[f32], width: usize, columns: usize) -> Vec<f32> {
    let rows = dy.len() / width;
    let right = View::new(x, rows, columns, columns);
    let mut out = vec![0.0; width * columns];
    out.par_chunks_mut(TILE * columns).enumerate().for_each(|(tile, out)| {
        let start = tile * TILE;
        let left = View::new(&dy[start..], rows, out.len() / columns, width).transposed();
        gemm(out, columns, 0.0, left, right, 1.0);
    });
    out
}
