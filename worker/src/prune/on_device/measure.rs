//! Solutions measured where they are, on a device other than the CPU; see [`crate::prune::measure`] and
//! [`crate::linalg::quadratic`].

use candle_core::{DType, Device, Result, Tensor};

use super::search::row_dots;
use crate::prune::InputStats;
use crate::prune::measure::Tile;

/// Rows of the statistics whose differences are formed in f64 at a time: the f64 copies of a wide gram take twice its memory each.
const BAND: usize = 1024;

/// Statistics of one kind of sequences on a device, made ready for all tiles.
pub(in crate::prune) struct DeviceYardstick {
    gram: Tensor,
    correction: Option<Correction>,
}

/// See [`crate::linalg::quadratic::Correction`].
struct Correction {
    towards_dense: Tensor,
    gap: Tensor,
    /// The gram of dense inputs, by which the target is measured.
    dense: Tensor,
}

impl DeviceYardstick {
    /// Takes the statistics to the device.
    pub(in crate::prune) fn new(stats: &InputStats, device: &Device) -> Result<Self> {
        let stats = stats.to_device(device)?;
        let correction =
            stats.dense.map(|dense| Correction::new(&stats.gram, &dense.cross, dense.gram, BAND)).transpose()?;
        Ok(Self { gram: stats.gram, correction })
    }

    /// What each row of a tile has of the error and of the total. A tile is whole products, so that its bits are its own.
    pub(in crate::prune) fn rows(&self, solution: &Tensor, dense: &Tensor, tile: &Tile) -> Result<Vec<[f64; 2]>> {
        let rows = |matrix: &Tensor| matrix.narrow(0, tile.rows.start, tile.rows.len());
        let (solution, dense) = (rows(solution)?, rows(dense)?);
        let delta = (solution - &dense)?;
        let form = |left: &Tensor, matrix: &Tensor, right: &Tensor| row_dots(&left.matmul(matrix)?, right);
        let own = form(&delta, &self.gram, &delta)?;
        let (error, total) = match &self.correction {
            Some(Correction { towards_dense, gap, dense: total }) => {
                let mixed = form(&dense, towards_dense, &delta)?;
                let gap = form(&dense, gap, &dense)?;
                (((own + gap)? - (mixed * 2.0)?)?, form(&dense, total, &dense)?)
            }
            None => (own, form(&dense, &self.gram, &dense)?),
        };
        Ok(error.to_vec1()?.into_iter().zip(total.to_vec1()?).map(|(error, total)| [error, total]).collect())
    }
}

impl Correction {
    fn new(gram: &Tensor, cross: &Tensor, dense: Tensor, height: usize) -> Result<Self> {
        let n = gram.dim(0)?;
        let towards_dense = (cross.t()?.contiguous()? - gram)?;
        let band = |first: usize| {
            let height = height.min(n - first);
            let wide = |matrix: &Tensor| matrix.narrow(0, first, height)?.to_dtype(DType::F64);
            let transposed = cross.narrow(1, first, height)?.t()?.contiguous()?.to_dtype(DType::F64)?;
            (((wide(gram)? - wide(cross)?)? - transposed)? + wide(&dense)?)?.to_dtype(DType::F32)
        };
        let gap = Tensor::cat(&(0..n).step_by(height).map(band).collect::<Result<Vec<_>>>()?, 0)?;
        Ok(Self { towards_dense, gap, dense })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, quadratic, values};
    use crate::prune::fixture;
    use crate::prune::measure::measure;

    #[test]
    fn rows_measure_what_they_measure_on_the_host() {
        for device in host::devices() {
            let (split, _) = fixture::random_corrected(7, 200, 24, 90).split(60);
            let problem = &split.problem;
            let solved: Vec<f32> =
                problem.weight.iter().map(|value| if value.abs() < 0.5 { 0.0 } else { *value }).collect();
            let (dense, solution) = (problem.tensor(), matrix(solved, 24, &Device::Cpu).unwrap());
            let tiles: Vec<Tile> = Tile::of(0, 200).collect();
            let without = InputStats { dense: None, held_out: None, ..(*problem.stats).clone() };
            for stats in [&without, &*problem.stats] {
                let expected = measure(&tiles, &[(&solution, &dense)], &InputStats { held_out: None, ..stats.clone() });
                let yardstick = DeviceYardstick::new(stats, &device).unwrap();
                let (there, dense) = (solution.to_device(&device).unwrap(), dense.to_device(&device).unwrap());
                for (tile, expected) in tiles.iter().zip(expected.unwrap()) {
                    let found = yardstick.rows(&there, &dense, tile).unwrap();
                    for ([error, total], expected) in found.into_iter().zip(expected.chunks(2)) {
                        let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * expected[1].max(expected[0]);
                        assert!(
                            near(error, expected[0]) && near(total, expected[1]),
                            "{device:?} {error} {expected:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn differences_are_those_of_the_host_whatever_the_height_of_a_band() {
        let (split, _) = fixture::random_corrected(3, 4, 24, 90).split(60);
        let stats = &split.problem.stats;
        let dense = stats.dense.as_ref().unwrap();
        let [gram, cross, other] = [&stats.gram, &dense.cross, &dense.gram].map(|matrix| values(matrix).unwrap());
        let expected = quadratic::Correction::new(&gram, &cross, &other, 24);
        for device in host::devices() {
            let there = stats.to_device(&device).unwrap();
            let dense = there.dense.unwrap();
            for height in [7, 24, 100] {
                let found = Correction::new(&there.gram, &dense.cross, dense.gram.clone(), height).unwrap();
                assert_eq!(values(&found.gap).unwrap(), expected.gap, "{device:?} {height}");
                assert_eq!(values(&found.towards_dense).unwrap(), expected.towards_dense, "{device:?} {height}");
            }
        }
    }
}
