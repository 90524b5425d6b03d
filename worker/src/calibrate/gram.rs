//! Second moments of a group's inputs, summed over calibration sequences.

use candle_core::{DType, Device, Tensor};
use espalier_common::fault::FaultClass;
use rayon::prelude::*;

use super::device_sums::DeviceSums;
use crate::device::memory::{free_bytes, is_out_of_memory};
use crate::linalg::factor::mirror_upper;
use crate::linalg::gemm::{View, gemm};
use crate::linalg::{held, matrix, slices};
use crate::prune::problem::{DenseStats, InputStats};

/// Tokens of one f32 product; longer sequences are cut. Beyond it f32 sums lose digits, so chunks are summed in f64.
pub(super) const CHUNK_TOKENS: usize = 4096;

/// Why statistics cannot be gathered.
#[derive(Debug, thiserror::Error)]
pub enum GramError {
    /// Inputs of another shape.
    #[error("inputs have shape {found:?}, but [tokens, {columns}] was expected")]
    Shape {
        /// Width expected.
        columns: usize,
        /// Shape given.
        found: Vec<usize>,
    },
    /// Dense inputs are missing, or not wanted, or of other sequences than the corrected ones.
    #[error("corrected inputs come with dense inputs of other lengths, or with none")]
    Unpaired,
    /// Sums that do not go together.
    #[error("sums over {left} and {right} input columns cannot be merged, or only one has dense inputs")]
    Mismatch {
        /// Width of the first.
        left: usize,
        /// Width of the second.
        right: usize,
    },
    /// Nothing was added.
    #[error("no tokens were added to the gram")]
    Empty,
    /// Some sequences were not added.
    #[error("sequences are missing from the gram")]
    Incomplete,
    /// More sequences than there are.
    #[error("more than {sequences} sequences were added to the gram")]
    Surplus {
        /// How many there are.
        sequences: usize,
    },
    /// An input is NaN or infinite, or so large that its square is.
    #[error("inputs of channel {channel} are not finite, or their squares are not")]
    NotFinite {
        /// The input channel.
        channel: usize,
    },
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl GramError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Shape { .. } | Self::Unpaired | Self::Mismatch { .. } | Self::Incomplete | Self::Surplus { .. } => {
                FaultClass::Bug
            }
            Self::Empty | Self::NotFinite { .. } => FaultClass::Reject,
            Self::Backend(_) => FaultClass::RetryElsewhere,
        }
    }
}

/// Sums `X̂ᵀX̂`, and `X̂ᵀX` and `XᵀX` where dense inputs are wanted too.
///
/// A sequence is one chunk (cut past 4096 tokens). Products of a chunk are f32, chunks are added in f64 in the order given:
/// the bits depend neither on the number of threads nor on how sequences are spread over calls. Symmetric sums are formed
/// on and above the diagonal only.
#[derive(Debug, Clone)]
pub struct GramAccumulator {
    columns: usize,
    with_dense: bool,
    tokens: usize,
    /// What is on the host.
    host: Option<HostSums>,
    /// What is on another device than the CPU, and not in the sums of the host.
    on_device: Option<DeviceSums>,
}

impl GramAccumulator {
    /// An empty sum over inputs `columns` wide; `with_dense` if dense inputs X come beside the corrected X̂.
    pub fn new(columns: usize, with_dense: bool) -> Self {
        Self { columns, with_dense, tokens: 0, host: None, on_device: None }
    }

    /// How many numbers [`Self::push_values`] adds.
    pub fn length(columns: usize, with_dense: bool) -> usize {
        let length = |symmetric| tiles(columns, symmetric).map(|(_, _, height, width)| height * width).sum::<usize>();
        if with_dense { 2 * length(true) + length(false) } else { length(true) }
    }

    /// How many numbers the sums are.
    pub fn numbers(&self) -> usize {
        Self::length(self.columns, self.with_dense)
    }

    /// Puts the sums as they are, for a wire, behind `values`.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn push_values(&mut self, values: &mut Vec<f64>) -> Result<(), GramError> {
        self.settle()?;
        self.on_host().each().flat_map(|sum| &sum.tiles).for_each(|tile| values.extend_from_slice(&tile.sum));
        Ok(())
    }

    /// Sums over `tokens` tokens, from what [`Self::push_values`] gave.
    pub fn from_values(columns: usize, with_dense: bool, tokens: usize, mut values: &[f64]) -> Self {
        let mut sums = HostSums::new(columns, with_dense);
        for tile in sums.each_mut().flat_map(|sum| sum.tiles.iter_mut()) {
            let (here, rest) = values.split_at(tile.sum.len());
            tile.sum.copy_from_slice(here);
            values = rest;
        }
        Self { tokens, host: Some(sums), ..Self::new(columns, with_dense) }
    }

    fn on_host(&mut self) -> &mut HostSums {
        self.host.get_or_insert_with(|| HostSums::new(self.columns, self.with_dense))
    }

    /// Tokens added so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Floating-point operations so far, symmetric products counted at half.
    pub fn flops(&self) -> f64 {
        let full = 2.0 * self.tokens as f64 * (self.columns * self.columns) as f64;
        if self.with_dense { 2.0 * full } else { 0.5 * full }
    }

    /// Adds the inputs of some sequences, in calibration order: `corrected` X̂ and, if dense inputs were asked for, `dense` X,
    /// each `[tokens, in]` f32. More sequences a call feed more cores. Those on another device than the CPU are summed there,
    /// until [`Self::settle`].
    ///
    /// # Errors
    /// `Shape` or `Unpaired`; the sums are unchanged then. `Backend` if another device fails: they are unchanged by the
    /// sequence at which it did and those after it.
    pub fn add(&mut self, corrected: &[Tensor], dense: Option<&[Tensor]>) -> Result<(), GramError> {
        if corrected.iter().any(|inputs| !inputs.device().is_cpu()) {
            return self.add_on_device(corrected, dense);
        }
        let corrected = self.contiguous(corrected)?;
        let dense = dense.map(|dense| self.contiguous(dense)).transpose()?;
        let (corrected, dense) = (held(&corrected), dense.as_deref().map(held));
        let corrected = slices(&corrected)?;
        let dense = dense.as_deref().map(slices).transpose()?;
        let paired = match (&dense, self.with_dense) {
            (Some(dense), true) => dense.iter().map(|rows| rows.len()).eq(corrected.iter().map(|rows| rows.len())),
            (None, false) => true,
            _ => false,
        };
        if !paired {
            return Err(GramError::Unpaired);
        }
        let sums = self.on_host();
        sums.gram.add(&corrected, &corrected);
        if let (Some(dense), Some((cross, gram))) = (&dense, &mut sums.dense) {
            cross.add(&corrected, dense);
            gram.add(dense, dense);
        }
        self.tokens += corrected.iter().map(|rows| rows.len() / self.columns).sum::<usize>();
        Ok(())
    }

    fn add_on_device(&mut self, corrected: &[Tensor], dense: Option<&[Tensor]>) -> Result<(), GramError> {
        let lengths = |inputs: &[Tensor]| -> Result<Vec<usize>, GramError> {
            let length = |inputs: &Tensor| match inputs.dims() {
                [tokens, columns] if *columns == self.columns => Ok(*tokens),
                found => Err(GramError::Shape { columns: self.columns, found: found.to_vec() }),
            };
            inputs.iter().map(length).collect()
        };
        let tokens = lengths(corrected)?;
        let of_dense = dense.map(lengths).transpose()?;
        if of_dense.is_some() != self.with_dense || of_dense.is_some_and(|dense| dense != tokens) {
            return Err(GramError::Unpaired);
        }
        for (index, (inputs, tokens)) in corrected.iter().zip(tokens).enumerate() {
            let sums = match self.on_device.take() {
                Some(sums) => sums,
                None => DeviceSums::new(self.columns, self.with_dense, inputs.device())?,
            };
            let sums = self.on_device.insert(sums);
            sums.add(inputs, dense.map(|dense| &dense[index]))?;
            self.tokens += tokens;
        }
        Ok(())
    }

    /// Takes to the host what was summed elsewhere.
    ///
    /// # Errors
    /// `Backend`.
    pub fn settle(&mut self) -> Result<(), GramError> {
        if let Some(sums) = &self.on_device {
            // What fails leaves everything as it was: it may be done again.
            let matrices = sums.to_host()?;
            self.on_device = None;
            self.on_host().each_mut().zip(&matrices).for_each(|(sum, more)| sum.add_matrix(more));
        }
        Ok(())
    }

    /// The same, unless where it is there is room for what comes next: as much again, the products that go into it, and their mean.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn settle_if_tight(&mut self) -> Result<(), GramError> {
        /// Free bytes for a byte of these sums.
        const ROOM: u64 = 3;
        match &self.on_device {
            Some(sums) if free_bytes(sums.device()).is_some_and(|free| free < ROOM * sums.bytes()) => {
                tracing::debug!(columns = self.columns, "the device's memory is tight: sums move to the host");
                self.settle()
            }
            _ => Ok(()),
        }
    }

    /// The sum over the sequences of `first` and then those of `second`: where both are, if that is one place, else on the host.
    ///
    /// # Errors
    /// `Mismatch`; `Backend`.
    pub fn merge(mut first: Self, mut second: Self) -> Result<Self, GramError> {
        if first.columns != second.columns || first.with_dense != second.with_dense {
            return Err(GramError::Mismatch { left: first.columns, right: second.columns });
        }
        match (&first, &second) {
            (Self { host: None, on_device: Some(sums), .. }, Self { host: None, on_device: Some(more), .. }) => {
                sums.merge(more)?;
            }
            _ => {
                first.settle()?;
                second.settle()?;
                let more = second.on_host();
                first.on_host().each_mut().zip(more.each()).for_each(|(sum, more)| sum.merge(more));
            }
        }
        first.tokens += second.tokens;
        Ok(first)
    }

    /// The mean over tokens, in f32 on `device`, without held-out statistics.
    ///
    /// # Errors
    /// `Empty` if nothing was added, `NotFinite` with the first channel that overflowed; `Backend`.
    pub fn finish(mut self, device: &Device) -> Result<InputStats, GramError> {
        let (columns, tokens) = (self.columns, self.tokens);
        if tokens == 0 {
            return Err(GramError::Empty);
        }
        let there = match (&self.host, &self.on_device) {
            (None, Some(sums)) => match sums.means(tokens) {
                Err(error) if is_out_of_memory(&error) => {
                    tracing::warn!(columns, "the device has no memory left: sums move to the host");
                    None
                }
                means => Some(means?),
            },
            _ => None,
        };
        let means = match there {
            Some(means) => means,
            None => {
                self.settle()?;
                self.on_host().each().map(|sum| sum.mean(tokens)).collect()
            }
        };
        let of_row = |mean: &Vec<f32>| {
            let rows = mean.par_chunks(columns.max(1)).enumerate();
            rows.find_first(|(_, row)| row.iter().any(|value| !value.is_finite())).map(|(channel, _)| channel)
        };
        if let Some(channel) = means.iter().find_map(of_row) {
            return Err(GramError::NotFinite { channel });
        }
        let mut means = means.into_iter().map(|mean| Ok::<_, GramError>(matrix(mean, columns, device)?));
        let gram = means.next().expect("a gram is always summed")?;
        let dense = match (means.next(), means.next()) {
            (Some(cross), Some(gram)) => Some(DenseStats { cross: cross?, gram: gram? }),
            _ => None,
        };
        Ok(InputStats { gram, dense, tokens, held_out: None })
    }

    /// The same inputs, row-major f32.
    fn contiguous(&self, sequences: &[Tensor]) -> Result<Vec<Tensor>, GramError> {
        let by_row = |inputs: &Tensor| match inputs.dims() {
            [_, columns] if *columns == self.columns => Ok(inputs.to_dtype(DType::F32)?.contiguous()?),
            found => Err(GramError::Shape { columns: self.columns, found: found.to_vec() }),
        };
        sequences.iter().map(by_row).collect()
    }
}

/// `Σ X̂ᵀX̂`, and `Σ X̂ᵀX` and `Σ XᵀX` if dense inputs come beside the corrected ones.
#[derive(Debug, Clone)]
struct HostSums {
    gram: Sum,
    dense: Option<(Sum, Sum)>,
}

impl HostSums {
    fn new(columns: usize, with_dense: bool) -> Self {
        let dense = with_dense.then(|| (Sum::new(columns, false), Sum::new(columns, true)));
        Self { gram: Sum::new(columns, true), dense }
    }

    fn each(&self) -> impl Iterator<Item = &Sum> {
        [&self.gram].into_iter().chain(self.dense.iter().flat_map(|(cross, gram)| [cross, gram]))
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Sum> {
        [&mut self.gram].into_iter().chain(self.dense.iter_mut().flat_map(|(cross, gram)| [cross, gram]))
    }
}

/// `Σ aᵀb` in f64, cut into square tiles.
#[derive(Debug, Clone)]
struct Sum {
    columns: usize,
    symmetric: bool,
    tiles: Vec<Tile>,
}

#[derive(Debug, Clone)]
struct Tile {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
    sum: Vec<f64>,
}

/// Top, left, height and width of each tile.
fn tiles(columns: usize, symmetric: bool) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    // Small tiles waste less work on the diagonal, and of narrow rows they stay in the cache.
    let side = if columns <= 2048 { 48 } else { 96 };
    let size = move |start: usize| side.min(columns - start);
    (0..columns)
        .step_by(side)
        .flat_map(move |top| (0..columns).step_by(side).map(move |left| (top, left)))
        .filter(move |(top, left)| !symmetric || left >= top)
        .map(move |(top, left)| (top, left, size(top), size(left)))
}

impl Sum {
    fn new(columns: usize, symmetric: bool) -> Self {
        let tile = |(top, left, height, width)| Tile { top, left, height, width, sum: vec![0.0; height * width] };
        Self { columns, symmetric, tiles: tiles(columns, symmetric).map(tile).collect() }
    }

    fn add(&mut self, a: &[&[f32]], b: &[&[f32]]) {
        let n = self.columns;
        self.tiles.par_iter_mut().for_each_init(Vec::new, |product, tile| {
            product.resize(tile.sum.len(), 0.0);
            for (a, b) in a.iter().zip(b) {
                for (a, b) in a.chunks(CHUNK_TOKENS * n).zip(b.chunks(CHUNK_TOKENS * n)) {
                    let tokens = a.len() / n;
                    let left = View::new(&a[tile.top..], tokens, tile.height, n).transposed();
                    let right = View::new(&b[tile.left..], tokens, tile.width, n);
                    gemm(product, tile.width, 0.0, left, right, 1.0);
                    tile.sum.iter_mut().zip(&*product).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
        });
    }

    /// Adds a whole matrix, row-major.
    fn add_matrix(&mut self, matrix: &[f64]) {
        let n = self.columns;
        self.tiles.par_iter_mut().for_each(|tile| {
            for (i, row) in tile.sum.chunks_mut(tile.width).enumerate() {
                let more = &matrix[(tile.top + i) * n + tile.left..][..tile.width];
                row.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
            }
        });
    }

    fn merge(&mut self, other: &Self) {
        self.tiles.par_iter_mut().zip(&other.tiles).for_each(|(tile, more)| {
            tile.sum.iter_mut().zip(&more.sum).for_each(|(sum, x)| *sum += x);
        });
    }

    fn mean(&self, tokens: usize) -> Vec<f32> {
        let n = self.columns;
        let mut out = vec![0.0; n * n];
        let side = self.tiles.first().map_or(1, |tile| tile.height);
        let bands: Vec<&[Tile]> = self.tiles.chunk_by(|one, other| one.top == other.top).collect();
        out.par_chunks_mut((side * n).max(1)).zip(bands).for_each(|(band, tiles)| {
            for tile in tiles {
                for (row, sums) in band.chunks_mut(n).zip(tile.sum.chunks(tile.width)) {
                    let means = row[tile.left..][..tile.width].iter_mut();
                    means.zip(sums).for_each(|(mean, sum)| *mean = (sum / tokens as f64) as f32);
                }
            }
        });
        if self.symmetric {
            mirror_upper(&mut out, n);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{ops, oracle, values};

    fn sequences(seed: u64, lengths: &[usize], columns: usize) -> Vec<Tensor> {
        lengths
            .iter()
            .enumerate()
            .map(|(i, &tokens)| {
                matrix(oracle::inputs(seed + i as u64, tokens, columns), columns, &Device::Cpu).unwrap()
            })
            .collect()
    }

    fn finished(accumulator: GramAccumulator) -> Vec<f32> {
        values(&accumulator.finish(&Device::Cpu).unwrap().gram).unwrap()
    }

    #[test]
    fn sums_equal_the_naive_f64_sums() {
        for columns in [1, 7, 100, 193] {
            let (corrected, dense) = (sequences(1, &[40, 13], columns), sequences(5, &[40, 13], columns));
            let mut accumulator = GramAccumulator::new(columns, true);
            accumulator.add(&corrected, Some(&dense)).unwrap();
            let stats = accumulator.finish(&Device::Cpu).unwrap();
            let rows = |tensors: &[Tensor]| tensors.iter().flat_map(|t| values(t).unwrap()).collect::<Vec<_>>();
            let (corrected, dense) = (rows(&corrected), rows(&dense));
            let found = stats.dense.unwrap();
            for (tensor, a, b) in [
                (&stats.gram, &corrected, &corrected),
                (&found.cross, &corrected, &dense),
                (&found.gram, &dense, &dense),
            ] {
                let expected = oracle::gram(a, b, columns);
                let size = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
                for (x, y) in values(tensor).unwrap().iter().zip(expected) {
                    assert!((f64::from(*x) - y).abs() <= 1e-6 * size, "{x} {y}");
                }
            }
        }
    }

    #[test]
    fn sums_of_a_device_equal_those_of_the_host() {
        for device in ops::host::devices() {
            // The last sequence is longer than a product takes.
            let lengths = [40, 13, CHUNK_TOKENS + 5];
            let (corrected, dense) = (sequences(1, &lengths, 30), sequences(5, &lengths, 30));
            let mut host = GramAccumulator::new(30, true);
            host.add(&corrected, Some(&dense)).unwrap();
            let mut there = GramAccumulator::new(30, true);
            let moved = |tensors: &[Tensor]| -> Vec<Tensor> {
                tensors.iter().map(|tensor| tensor.to_device(&device).unwrap()).collect()
            };
            there.add_on_device(&moved(&corrected[..1]), Some(&moved(&dense[..1]))).unwrap();
            there.settle().unwrap();
            there.add_on_device(&moved(&corrected[1..]), Some(&moved(&dense[1..]))).unwrap();
            assert!(matches!(there.add_on_device(&moved(&corrected), None), Err(GramError::Unpaired)));
            assert_eq!((there.tokens(), there.flops().to_bits()), (host.tokens(), host.flops().to_bits()));
            let (host, there) = (host.finish(&Device::Cpu).unwrap(), there.finish(&Device::Cpu).unwrap());
            let ([host_dense, there_dense], tokens) = ([host.dense.unwrap(), there.dense.unwrap()], host.tokens);
            for (x, y) in
                [(host.gram, there.gram), (host_dense.cross, there_dense.cross), (host_dense.gram, there_dense.gram)]
            {
                let (x, y) = (values(&x).unwrap(), values(&y).unwrap());
                let size = x.iter().fold(0.0f32, |size, x| size.max(x.abs()));
                // Each product of a chunk is f32, its rounding at most ε for each token.
                let tolerance = tokens as f32 * f32::EPSILON * size;
                assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= tolerance), "{device:?}");
            }
        }
    }

    #[test]
    fn where_sums_are_merged_and_averaged_makes_no_difference_to_the_bits() {
        for device in ops::host::devices() {
            let lengths = [9, 13, 30];
            let (corrected, dense) = (sequences(1, &lengths, 30), sequences(5, &lengths, 30));
            let sums = |at: usize, is_settled: bool| {
                let inputs = |all: &[Tensor]| vec![all[at].to_device(&device).unwrap()];
                let mut sums = GramAccumulator::new(30, true);
                sums.add_on_device(&inputs(&corrected), Some(&inputs(&dense))).unwrap();
                if is_settled {
                    sums.settle().unwrap();
                } else {
                    sums.settle_if_tight().unwrap();
                    assert!(sums.host.is_none(), "{device:?}");
                }
                sums
            };
            let bits = |settled: [bool; 3]| {
                let merged = GramAccumulator::merge(sums(0, settled[0]), sums(1, settled[1])).unwrap();
                let stats = GramAccumulator::merge(merged, sums(2, settled[2])).unwrap().finish(&Device::Cpu).unwrap();
                let dense = stats.dense.unwrap();
                [stats.gram, dense.cross, dense.gram].map(|mean| values(&mean).unwrap())
            };
            let there = bits([false; 3]);
            for settled in [[true; 3], [true, false, false], [false, false, true]] {
                assert!(bits(settled) == there, "{device:?} {settled:?}");
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_grouping() {
        let inputs = sequences(3, &[50, 7, 31, 64], 130);
        let run = |threads, group| {
            oracle::with_threads(threads, || {
                let mut accumulator = GramAccumulator::new(130, false);
                inputs.chunks(group).for_each(|group| accumulator.add(group, None).unwrap());
                finished(accumulator)
            })
        };
        let expected = run(1, 1);
        for (threads, group) in [(2, 1), (3, 2), (2, 4)] {
            assert_eq!(run(threads, group), expected);
        }
    }

    #[test]
    fn merged_halves_equal_the_whole() {
        let inputs = sequences(3, &[50, 7, 31, 64], 20);
        let sum = |inputs: &[Tensor]| {
            let mut accumulator = GramAccumulator::new(20, false);
            accumulator.add(inputs, None).unwrap();
            accumulator
        };
        let merged = GramAccumulator::merge(sum(&inputs[..2]), sum(&inputs[2..])).unwrap();
        assert_eq!(merged.tokens(), 152);
        for (x, y) in finished(merged).iter().zip(finished(sum(&inputs))) {
            assert!((x - y).abs() <= 1e-6 * y.abs());
        }
    }

    #[test]
    fn a_dead_channel_has_a_zero_diagonal() {
        let mut inputs = oracle::inputs(1, 30, 5);
        inputs.iter_mut().skip(2).step_by(5).for_each(|x| *x = 0.0);
        let mut accumulator = GramAccumulator::new(5, false);
        accumulator.add(&[matrix(inputs, 5, &Device::Cpu).unwrap()], None).unwrap();
        let gram = finished(accumulator);
        let dead: Vec<bool> = (0..5).map(|j| gram[j * 6].to_bits() == 0).collect();
        assert_eq!(dead, [false, false, true, false, false]);
    }

    #[test]
    fn bad_inputs_are_refused_by_name() {
        let mut accumulator = GramAccumulator::new(5, false);
        assert!(matches!(accumulator.add(&sequences(1, &[3], 4), None), Err(GramError::Shape { columns: 5, .. })));
        let fine = sequences(1, &[3], 5);
        assert!(matches!(accumulator.add(&fine, Some(&fine)), Err(GramError::Unpaired)));
        assert!(matches!(accumulator.clone().finish(&Device::Cpu), Err(GramError::Empty)));
        let bad = matrix(vec![0.0, f32::NAN, 0.0, 0.0, 0.0], 5, &Device::Cpu).unwrap();
        accumulator.add(&[bad], None).unwrap();
        assert!(matches!(accumulator.finish(&Device::Cpu), Err(GramError::NotFinite { .. })));
    }
}
