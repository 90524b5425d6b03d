//! A group's statistics as an owner sends them, in two portions: f32, symmetric matrices as their upper triangles, row by row.

use std::slice::from_ref;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::calibrate::tree::{Portion, Sampling};
use crate::linalg::factor::mirror_upper;
use crate::linalg::{held, matrix, slices};
use crate::prune::InputStats;
use crate::prune::problem::DenseStats;
use crate::transport::parcel::numbers;

/// Bytes of a portion of a group's statistics.
pub(super) fn bytes(sampling: &Sampling, portion: Portion) -> u64 {
    let (n, triangle) = (sampling.columns as u64, triangle_bytes(sampling));
    let dense = if sampling.with_dense { 4 * n * n + triangle } else { 0 };
    let held_out = if sampling.has_held_out() { triangle + dense } else { 0 };
    match portion {
        Portion::Gram => triangle,
        Portion::Rest => dense + held_out,
        Portion::All => triangle + dense + held_out,
    }
}

/// Bytes of a triangle of a symmetric matrix of the group's width.
pub(super) fn triangle_bytes(sampling: &Sampling) -> u64 {
    let n = sampling.columns as u64;
    2 * n * (n + 1)
}

/// The upper triangle of a symmetric matrix, row by row.
fn triangle(matrix: &[f32]) -> Vec<f32> {
    let n = matrix.len().isqrt();
    let mut packed = Vec::with_capacity(n * (n + 1) / 2);
    push_triangle(&mut packed, matrix);
    packed
}

/// The numbers of the gram over calibration sequences.
pub(super) fn pack_gram(gram: &Tensor) -> candle_core::Result<Vec<f32>> {
    let gram = held(from_ref(gram));
    Ok(triangle(slices(&gram)?[0]))
}

/// The numbers of all other statistics, in order: with dense inputs, and over held-out sequences.
pub(super) fn pack_rest(sampling: &Sampling, stats: &InputStats) -> candle_core::Result<Vec<f32>> {
    let mut packed = Vec::with_capacity(bytes(sampling, Portion::Rest) as usize / size_of::<f32>());
    push_dense(&mut packed, stats)?;
    if let Some(held_out) = &stats.held_out {
        push(&mut packed, &held_out.gram, true)?;
        push_dense(&mut packed, held_out)?;
    }
    Ok(packed)
}

fn push_dense(packed: &mut Vec<f32>, stats: &InputStats) -> candle_core::Result<()> {
    let Some(DenseStats { cross, gram }) = &stats.dense else { return Ok(()) };
    push(packed, cross, false)?;
    push(packed, gram, true)
}

fn push(packed: &mut Vec<f32>, matrix: &Tensor, is_symmetric: bool) -> candle_core::Result<()> {
    let matrix = held(from_ref(matrix));
    let values = slices(&matrix)?[0];
    if is_symmetric {
        push_triangle(packed, values)
    } else {
        packed.extend_from_slice(values)
    }
    Ok(())
}

fn push_triangle(packed: &mut Vec<f32>, matrix: &[f32]) {
    let n = matrix.len().isqrt();
    (0..n).for_each(|row| packed.extend_from_slice(&matrix[row * n + row..(row + 1) * n]));
}

/// The gram over calibration sequences, from a body of the right size.
pub(super) fn unpack_gram(sampling: &Sampling, body: &[u8], device: &Device) -> candle_core::Result<Tensor> {
    matrix(from_triangle(&numbers::<f32>(body), sampling.columns), sampling.columns, device)
}

/// All statistics, from the gram and a body of the right size.
pub(super) fn unpack_rest(
    sampling: &Sampling,
    gram: Tensor,
    body: &[u8],
    device: &Device,
) -> candle_core::Result<InputStats> {
    let packed = numbers::<f32>(body);
    let mut packed = Packed { sampling, rest: &packed, device };
    let dense = packed.dense()?;
    let held_out = if sampling.has_held_out() {
        let tokens = (sampling.sequences - sampling.calibrating) * sampling.tokens;
        let held_out = InputStats { gram: packed.symmetric()?, dense: packed.dense()?, tokens, held_out: None };
        Some(Arc::new(held_out))
    } else {
        None
    };
    Ok(InputStats { gram, dense, tokens: sampling.calibrating * sampling.tokens, held_out })
}

/// Matrices that follow one another.
struct Packed<'a> {
    sampling: &'a Sampling,
    rest: &'a [f32],
    device: &'a Device,
}

impl<'a> Packed<'a> {
    fn take(&mut self, count: usize) -> &'a [f32] {
        let (here, rest) = self.rest.split_at(count);
        self.rest = rest;
        here
    }

    fn symmetric(&mut self) -> candle_core::Result<Tensor> {
        let n = self.sampling.columns;
        let triangle = self.take(n * (n + 1) / 2);
        matrix(from_triangle(triangle, n), n, self.device)
    }

    fn dense(&mut self) -> candle_core::Result<Option<DenseStats>> {
        if !self.sampling.with_dense {
            return Ok(None);
        }
        let n = self.sampling.columns;
        let cross = matrix(self.take(n * n).to_vec(), n, self.device)?;
        Ok(Some(DenseStats { cross, gram: self.symmetric()? }))
    }
}

/// The symmetric matrix of an upper triangle.
fn from_triangle(triangle: &[f32], n: usize) -> Vec<f32> {
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
            let packed = |stats: &InputStats| [pack_gram(&stats.gram).unwrap(), pack_rest(&sampling, stats).unwrap()];
            let [gram, rest] = packed(&stats);
            let bodies: [&[u8]; 2] = [bytemuck::cast_slice(&gram), bytemuck::cast_slice(&rest)];
            let sizes = Portion::EACH.map(|portion| bytes(&sampling, portion));
            assert_eq!(bodies.map(|body| body.len() as u64), sizes);
            assert_eq!(bytes(&sampling, Portion::All), sizes.iter().sum::<u64>());
            let found = unpack_gram(&sampling, bodies[0], &Device::Cpu).unwrap();
            let found = unpack_rest(&sampling, found, bodies[1], &Device::Cpu).unwrap();
            assert_eq!(packed(&found), packed(&stats));
            assert_eq!(values(&found.gram).unwrap(), values(&stats.gram).unwrap());
            assert_eq!((found.tokens, found.dense.is_some()), (6 * calibrating, with_dense));
            assert_eq!(found.held_out.map(|held_out| held_out.tokens), with_held_out.then_some(6));
        }
    }
}
