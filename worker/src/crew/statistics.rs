//! A group's statistics as an owner sends them: f32, symmetric matrices as their upper triangles, row by row.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::calibrate::tree::Sampling;
use crate::linalg::factor::mirror_upper;
use crate::linalg::{held, matrix, slices};
use crate::prune::InputStats;
use crate::prune::problem::DenseStats;
use crate::transport::parcel::numbers;

/// Bytes of [`pack`].
pub(super) fn bytes(sampling: &Sampling) -> u64 {
    let (n, triangle) = (sampling.columns as u64, triangle_bytes(sampling));
    let once = if sampling.with_dense { 2 * triangle + 4 * n * n } else { triangle };
    if sampling.has_held_out() { 2 * once } else { once }
}

/// Bytes of the upper triangle of a symmetric matrix of the group's width.
pub(super) fn triangle_bytes(sampling: &Sampling) -> u64 {
    let n = sampling.columns as u64;
    2 * n * (n + 1)
}

/// The upper triangle of a symmetric matrix, row by row.
pub(super) fn triangle(matrix: &[f32]) -> Vec<f32> {
    let mut packed = Vec::new();
    push_triangle(&mut packed, matrix);
    packed
}

/// The numbers of the statistics over calibration sequences, in order, and of those over held-out ones if there are any.
pub(super) fn pack(stats: &InputStats) -> candle_core::Result<Vec<f32>> {
    let n = stats.gram.dim(0)?;
    let triangle = n * (n + 1) / 2;
    let once = if stats.dense.is_some() { 2 * triangle + n * n } else { triangle };
    let mut packed = Vec::with_capacity(once * (1 + usize::from(stats.held_out.is_some())));
    for stats in [stats].into_iter().chain(stats.held_out.as_deref()) {
        let matrices: Vec<Tensor> = match &stats.dense {
            Some(dense) => vec![stats.gram.clone(), dense.cross.clone(), dense.gram.clone()],
            None => vec![stats.gram.clone()],
        };
        let matrices = held(&matrices);
        for (index, matrix) in slices(&matrices)?.into_iter().enumerate() {
            // The cross product alone is not symmetric.
            if index == 1 { packed.extend_from_slice(matrix) } else { push_triangle(&mut packed, matrix) }
        }
    }
    Ok(packed)
}

fn push_triangle(packed: &mut Vec<f32>, matrix: &[f32]) {
    let n = matrix.len().isqrt();
    (0..n).for_each(|row| packed.extend_from_slice(&matrix[row * n + row..(row + 1) * n]));
}

/// The statistics from a body of the right size.
pub(super) fn unpack(sampling: &Sampling, body: &[u8], device: &Device) -> candle_core::Result<InputStats> {
    let packed = numbers::<f32>(body);
    let has_held_out = sampling.has_held_out();
    let (calibrating, held_out) = packed.split_at(if has_held_out { packed.len() / 2 } else { packed.len() });
    let mut stats = unpack_one(sampling, sampling.calibrating, calibrating, device)?;
    if has_held_out {
        let sequences = sampling.sequences - sampling.calibrating;
        stats.held_out = Some(Arc::new(unpack_one(sampling, sequences, held_out, device)?));
    }
    Ok(stats)
}

fn unpack_one(
    sampling: &Sampling,
    sequences: usize,
    packed: &[f32],
    device: &Device,
) -> candle_core::Result<InputStats> {
    let n = sampling.columns;
    let (gram, rest) = packed.split_at(n * (n + 1) / 2);
    let gram = matrix(from_triangle(gram, n), n, device)?;
    let dense = if sampling.with_dense {
        let (cross, triangle) = rest.split_at(n * n);
        Some(DenseStats {
            cross: matrix(cross.to_vec(), n, device)?,
            gram: matrix(from_triangle(triangle, n), n, device)?,
        })
    } else {
        None
    };
    Ok(InputStats { gram, dense, tokens: sequences * sampling.tokens, held_out: None })
}

/// The symmetric matrix of an upper triangle.
pub(super) fn from_triangle(triangle: &[f32], n: usize) -> Vec<f32> {
    let mut matrix = vec![0.0; n * n];
    let mut rest = triangle;
    for row in 0..n {
        let (head, tail) = rest.split_at(n - row);
        matrix[row * n + row..(row + 1) * n].copy_from_slice(head);
        rest = tail;
    }
    mirror_upper(&mut matrix, n);
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{oracle, values};

    #[test]
    fn statistics_come_back_bit_for_bit() {
        let n = 13;
        let symmetric = |seed| {
            let x = oracle::random(seed, 30 * n);
            let gram: Vec<f32> = oracle::gram(&x, &x, n).iter().map(|&value| value as f32).collect();
            matrix(from_triangle(&triangle(&gram), n), n, &Device::Cpu).unwrap()
        };
        let cross = matrix(oracle::random(3, n * n), n, &Device::Cpu).unwrap();
        for (with_dense, with_held_out) in [(false, false), (true, false), (false, true), (true, true)] {
            let calibrating = if with_held_out { 4 } else { 5 };
            let sampling = Sampling { columns: n, with_dense, sequences: 5, calibrating, tokens: 6 };
            let of = |seed, tokens| {
                let dense = with_dense.then(|| DenseStats { cross: cross.clone(), gram: symmetric(seed + 1) });
                InputStats { gram: symmetric(seed), dense, tokens, held_out: None }
            };
            let held_out = with_held_out.then(|| Arc::new(of(5, 6)));
            let stats = InputStats { held_out, ..of(1, 6 * calibrating) };
            let packed = pack(&stats).unwrap();
            let body: &[u8] = bytemuck::cast_slice(&packed);
            assert_eq!(body.len() as u64, bytes(&sampling));
            let found = unpack(&sampling, body, &Device::Cpu).unwrap();
            assert_eq!(pack(&found).unwrap(), packed);
            assert_eq!(values(&found.gram).unwrap(), values(&stats.gram).unwrap());
            assert_eq!((found.tokens, found.dense.is_some()), (6 * calibrating, with_dense));
            assert_eq!(found.held_out.map(|held_out| held_out.tokens), with_held_out.then_some(6));
        }
    }
}
