//! What solutions are measured by: the error of each row, wherever it is measured.

use std::ops::Range;
use std::slice::from_ref;
use std::sync::Arc;

use candle_core::{Device, Tensor};
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
    let pairs = pairs.iter().map(|(solution, dense)| ((*solution).clone(), (*dense).clone())).collect();
    let mut measuring = Measuring::new(tiles.to_vec(), pairs, Arc::new(stats.clone()));
    while measuring.go_on()? {}
    Ok(measuring.numbers)
}

/// Tiles that are measured a piece at a time, by somebody who has something more urgent to do in between.
pub struct Measuring {
    tiles: Vec<Tile>,
    pairs: Vec<(Tensor, Tensor)>,
    stats: Arc<InputStats>,
    /// Of each tile.
    numbers: Vec<Vec<f64>>,
    /// One side after the other, calibration sequences first: each needs matrices of its own.
    side: usize,
    /// Those matrices, and how many tiles were measured by them.
    yardstick: Option<(Yardstick, usize)>,
}

impl Measuring {
    /// Begins with tiles of pairs as [`measure`] takes them.
    pub fn new(tiles: Vec<Tile>, pairs: Vec<(Tensor, Tensor)>, stats: Arc<InputStats>) -> Self {
        let width = numbers_of_row(stats.held_out.is_some());
        let numbers = tiles.iter().map(|tile| vec![0.0; tile.rows.len() * width]).collect();
        Self { tiles, pairs, stats, numbers, side: 0, yardstick: None }
    }

    /// Does a piece: makes what a side needs, or measures as many tiles as there are threads. False once nothing is left.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub fn go_on(&mut self) -> candle_core::Result<bool> {
        let Some(stats) = [Some(&*self.stats), self.stats.held_out.as_deref()].into_iter().flatten().nth(self.side)
        else {
            return Ok(false);
        };
        let Some(device) = self.tiles.first().map(|tile| self.pairs[tile.member].0.device()) else { return Ok(false) };
        let Some((yardstick, done)) = &mut self.yardstick else {
            self.yardstick = Some((Yardstick::of(stats, device)?, 0));
            let device = device.clone();
            self.pairs.iter_mut().try_for_each(|(_, dense)| dense.to_device(&device).map(|there| *dense = there))?;
            return Ok(true);
        };
        let (width, side) = (numbers_of_row(self.stats.held_out.is_some()), self.side);
        let put = |numbers: &mut [f64], found: Vec<[f64; 2]>| {
            for (row, found) in numbers.chunks_mut(width).zip(found) {
                row[2 * side..2 * side + 2].copy_from_slice(&found);
            }
        };
        let end = self.tiles.len().min(*done + if device.is_cpu() { rayon::current_num_threads() } else { 1 });
        let piece = self.numbers[*done..end].par_iter_mut().zip(&self.tiles[*done..end]);
        match yardstick {
            Yardstick::OnHost(correction) => piece.try_for_each(|(numbers, tile)| {
                let (solution, dense) = &self.pairs[tile.member];
                let rows = |matrix: &Tensor| values(&matrix.narrow(0, tile.rows.start, tile.rows.len())?);
                put(numbers, rows_on_host(&rows(solution)?, &rows(dense)?, stats, correction.as_ref())?);
                Ok::<_, candle_core::Error>(())
            })?,
            Yardstick::OnDevice(yardstick) => {
                for (numbers, tile) in self.numbers[*done..end].iter_mut().zip(&self.tiles[*done..end]) {
                    let (solution, dense) = &self.pairs[tile.member];
                    put(numbers, yardstick.rows(solution, dense, tile)?);
                }
            }
        }
        *done = end;
        if end == self.tiles.len() {
            (self.side, self.yardstick) = (side + 1, None);
        }
        Ok(true)
    }

    /// The tiles, once all are measured, with the numbers of each.
    pub fn into_measured(self) -> impl Iterator<Item = (Tile, Vec<f64>)> {
        self.tiles.into_iter().zip(self.numbers)
    }
}

/// The relative error of a whole matrix, and that on held-out inputs if it has them, of the numbers of its rows: ‖W'X̂ − Y‖² / ‖Y‖²,
/// 0 if ‖Y‖ is.
pub fn relative(numbers: &[f64], has_held_out: bool) -> (f64, Option<f64>) {
    let width = numbers_of_row(has_held_out);
    let of_side = |side: usize| {
        let sum = |at: usize| numbers.chunks(width).map(|row| row[2 * side + at]).sum::<f64>();
        let (error, total) = (sum(0), sum(1));
        if total > 0.0 { error.max(0.0) / total } else { 0.0 }
    };
    (of_side(0), has_held_out.then(|| of_side(1)))
}

/// Statistics of one kind of sequences, made ready for all tiles.
enum Yardstick {
    OnHost(Option<Correction>),
    OnDevice(DeviceYardstick),
}

impl Yardstick {
    fn of(stats: &InputStats, device: &Device) -> candle_core::Result<Self> {
        if !device.is_cpu() {
            return Ok(Self::OnDevice(DeviceYardstick::new(stats, device)?));
        }
        let Some(dense) = &stats.dense else { return Ok(Self::OnHost(None)) };
        let matrices = [stats.gram.clone(), dense.cross.clone(), dense.gram.clone()];
        let matrices = held(&matrices);
        let [gram, cross, dense] = slices(&matrices)?[..] else { unreachable!("as many slices as tensors") };
        let n = stats.gram.dim(0)?;
        Ok(Self::OnHost(Some(Correction::new(gram, cross, dense, n))))
    }
}

/// What each row has of the error and of the total.
fn rows_on_host(
    solved: &[f32],
    dense: &[f32],
    stats: &InputStats,
    correction: Option<&Correction>,
) -> candle_core::Result<Vec<[f64; 2]>> {
    let n = stats.gram.dim(0)?;
    let total = stats.dense.as_ref().map_or(&stats.gram, |dense| &dense.gram);
    let (gram, total) = (held(from_ref(&stats.gram)), held(from_ref(total)));
    let (gram, total) = (slices(&gram)?[0], slices(&total)?[0]);
    let errors = quadratic::errors(solved, dense, gram, correction, n);
    Ok(errors.into_iter().zip(quadratic::energies(dense, total, n)).map(|(error, total)| [error, total]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{matrix, oracle};
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
        let (error, held_out) = relative(&all.concat(), true);
        let expected = split.error(&solved) / split.error(&vec![0.0; solved.len()]);
        assert!((error / expected - 1.0).abs() < 1e-4, "{error} {expected}");
        assert!(held_out.is_some_and(|held_out| held_out > 0.0));
    }

    #[test]
    fn it_goes_on_by_pieces_no_larger_than_there_are_threads() {
        let rows = 300;
        let (split, _) = fixture::random_corrected(7, rows, 24, 90).split(60);
        let dense = split.problem.tensor();
        let solution = (&dense * 0.9).unwrap();
        let tiles: Vec<Tile> = Tile::of(0, rows).collect();
        let all = measure(&tiles, &[(&solution, &dense)], &split.problem.stats).unwrap();
        for threads in [1, 2] {
            let pairs = vec![(solution.clone(), dense.clone())];
            let mut measuring = Measuring::new(tiles.clone(), pairs, Arc::clone(&split.problem.stats));
            let mut pieces = 0;
            oracle::with_threads(threads, || {
                while measuring.go_on().unwrap() {
                    pieces += 1;
                }
            });
            // Of either side what is needed for it, and then the tiles.
            assert_eq!(pieces, 2 * (1 + tiles.len().div_ceil(threads)), "{threads} threads");
            assert_eq!(
                measuring.into_measured().collect::<Vec<_>>(),
                tiles.iter().cloned().zip(all.clone()).collect::<Vec<_>>()
            );
        }
        let mut nothing = Measuring::new(Vec::new(), Vec::new(), Arc::clone(&split.problem.stats));
        assert!(!nothing.go_on().unwrap());
    }

    #[test]
    fn nothing_is_lost_where_there_is_nothing() {
        let numbers = vec![0.0; 3 * numbers_of_row(true)];
        assert_eq!(relative(&numbers, true), (0.0, Some(0.0)));
        assert_eq!(numbers_of_row(false), 2);
    }
}
