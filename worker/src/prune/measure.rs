//! What solutions are measured by: the error of each row, wherever it is measured.

use std::ops::Range;
use std::slice::from_ref;

use candle_core::Tensor;
use rayon::prelude::*;

use super::InputStats;
use super::on_device::measure::DeviceYardstick;
use crate::linalg::gemm::row_tile;
use crate::linalg::quadratic::{self, Correction};
use crate::linalg::{held, slices, values};

/// Some rows of one of several matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// Which matrix.
    pub member: usize,
    /// The rows.
    pub rows: Range<usize>,
}

impl Tile {
    /// The tiles that a matrix of so many rows is measured by: each is one product, so that the bits are the same whoever has which.
    pub fn of(member: usize, rows: usize) -> impl Iterator<Item = Self> {
        let height = row_tile(rows);
        (0..rows).step_by(height).map(move |first| Self { member, rows: first..rows.min(first + height) })
    }
}

/// Numbers that measuring a row gives: with calibration sequences, and with held-out ones if there are any, what it has of
/// ‖W'X̂ − Y‖² and of ‖Y‖².
pub fn numbers_of_row(has_held_out: bool) -> usize {
    2 * (1 + usize::from(has_held_out))
}

/// Measures tiles of `pairs` of solutions and dense weights `[out, in]`, where the solutions are. For each tile, row by row its
/// [`numbers_of_row`].
///
/// # Errors
/// What the tensor backend says.
pub fn measure(tiles: &[Tile], pairs: &[(&Tensor, &Tensor)], stats: &InputStats) -> candle_core::Result<Vec<Vec<f64>>> {
    let width = numbers_of_row(stats.held_out.is_some());
    let mut measured: Vec<Vec<f64>> = tiles.iter().map(|tile| vec![0.0; tile.rows.len() * width]).collect();
    let Some(device) = tiles.first().map(|tile| pairs[tile.member].0.device()) else { return Ok(measured) };
    let put = |side: usize, measured: &mut [f64], found: Vec<[f64; 2]>| {
        for (row, found) in measured.chunks_mut(width).zip(found) {
            row[2 * side..2 * side + 2].copy_from_slice(&found);
        }
    };
    let dense_there = match device.is_cpu() {
        true => Vec::new(),
        false => pairs.iter().map(|(_, dense)| dense.to_device(device)).collect::<candle_core::Result<Vec<_>>>()?,
    };
    // One side after the other: each needs matrices of its own.
    for (side, stats) in [stats].into_iter().chain(stats.held_out.as_deref()).enumerate() {
        if device.is_cpu() {
            let yardstick = Yardstick::of(stats)?;
            measured.par_iter_mut().zip(tiles).try_for_each(|(measured, tile)| {
                let (solution, dense) = pairs[tile.member];
                let rows = |matrix: &Tensor| values(&matrix.narrow(0, tile.rows.start, tile.rows.len())?);
                put(side, measured, yardstick.rows(&rows(solution)?, &rows(dense)?, stats)?);
                Ok::<_, candle_core::Error>(())
            })?;
        } else {
            let yardstick = DeviceYardstick::new(stats, device)?;
            for (measured, tile) in measured.iter_mut().zip(tiles) {
                put(side, measured, yardstick.rows(pairs[tile.member].0, &dense_there[tile.member], tile)?);
            }
        }
    }
    Ok(measured)
}

/// The relative error of a whole matrix, and that on held-out inputs, of the numbers of its rows: ‖W'X̂ − Y‖² / ‖Y‖², 0 if ‖Y‖ is.
pub fn relative(numbers: &[f64], stats: &InputStats) -> (f64, Option<f64>) {
    let width = numbers_of_row(stats.held_out.is_some());
    let of_side = |side: usize| {
        let sum = |at: usize| numbers.chunks(width).map(|row| row[2 * side + at]).sum::<f64>();
        let (error, total) = (sum(0), sum(1));
        if total > 0.0 { error.max(0.0) / total } else { 0.0 }
    };
    (of_side(0), stats.held_out.is_some().then(|| of_side(1)))
}

/// Statistics of one kind of sequences, made ready for all tiles.
struct Yardstick {
    correction: Option<Correction>,
}

impl Yardstick {
    fn of(stats: &InputStats) -> candle_core::Result<Self> {
        let Some(dense) = &stats.dense else { return Ok(Self { correction: None }) };
        let matrices = [stats.gram.clone(), dense.cross.clone(), dense.gram.clone()];
        let matrices = held(&matrices);
        let [gram, cross, dense] = slices(&matrices)?[..] else { unreachable!("as many slices as tensors") };
        let n = stats.gram.dim(0)?;
        Ok(Self { correction: Some(Correction::new(gram, cross, dense, n)) })
    }

    /// What each row has of the error and of the total.
    fn rows(&self, solved: &[f32], dense: &[f32], stats: &InputStats) -> candle_core::Result<Vec<[f64; 2]>> {
        let n = stats.gram.dim(0)?;
        let total = stats.dense.as_ref().map_or(&stats.gram, |dense| &dense.gram);
        let (gram, total) = (held(from_ref(&stats.gram)), held(from_ref(total)));
        let (gram, total) = (slices(&gram)?[0], slices(&total)?[0]);
        let errors = quadratic::errors(solved, dense, gram, self.correction.as_ref(), n);
        Ok(errors.into_iter().zip(quadratic::energies(dense, total, n)).map(|(error, total)| [error, total]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::matrix;
    use crate::prune::fixture;

    #[test]
    fn rows_are_measured_by_the_definition_and_tiles_apart_give_the_bits_of_all() {
        let rows = 300;
        let (split, _) = fixture::random_corrected(7, rows, 24, 90).split(60);
        let problem = &split.problem;
        let solved: Vec<f32> =
            problem.weight.iter().map(|value| if value.abs() < 0.5 { 0.0 } else { *value }).collect();
        let (dense, solution) = (problem.tensor(), matrix(solved.clone(), 24, &candle_core::Device::Cpu).unwrap());
        let tiles: Vec<Tile> = Tile::of(0, rows).collect();
        assert!(tiles.len() > 2 && tiles.iter().map(|tile| tile.rows.len()).sum::<usize>() == rows);
        let pairs = [(&solution, &dense)];
        let all = measure(&tiles, &pairs, &problem.stats).unwrap();
        for (tile, all) in tiles.iter().zip(&all).rev() {
            let alone = measure(from_ref(tile), &pairs, &problem.stats).unwrap();
            assert_eq!(alone, from_ref(all));
        }
        let (error, held_out) = relative(&all.concat(), &problem.stats);
        let expected = split.error(&solved) / split.error(&vec![0.0; solved.len()]);
        assert!((error / expected - 1.0).abs() < 1e-4, "{error} {expected}");
        assert!(held_out.is_some_and(|held_out| held_out > 0.0));
    }

    #[test]
    fn nothing_is_lost_where_there_is_nothing() {
        let (problem, _) = fixture::random_corrected(7, 3, 8, 20).split(15);
        let numbers = vec![0.0; 3 * numbers_of_row(true)];
        assert_eq!(relative(&numbers, &problem.problem.stats), (0.0, Some(0.0)));
        assert_eq!(numbers_of_row(false), 2);
    }
}
