//! Second moments of a group's inputs, summed over calibration sequences.

use candle_core::{DType, Device, Tensor};
use espalier_common::fault::FaultClass;
use rayon::prelude::*;

use super::device_sums::DeviceSums;
use super::host_sum::{HostSum, Strips};
use crate::device::memory::{free_bytes, is_out_of_memory};
use crate::linalg::{held, matrix, slices};
use crate::prune::problem::{DenseStats, InputStats};

/// Tokens of one f32 product on the host, whose sums are added up in f64: a strip of so many and the rows that it meets stay in the
/// first two caches.
const HOST_TOKENS: usize = 512;
/// The same on a device; longer sequences are cut. Beyond it f32 sums lose digits.
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

/// Which second moments of a group's inputs there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moments {
    /// `X̂ᵀX̂`.
    Gram,
    /// `X̂ᵀX` and `XᵀX`.
    Dense,
    /// All three, in this order.
    All,
}

impl Moments {
    /// All there are, depending on whether dense inputs X come beside the corrected X̂.
    pub fn all(with_dense: bool) -> Self {
        if with_dense { Self::All } else { Self::Gram }
    }

    /// Whether each is symmetric.
    fn symmetric(self) -> &'static [bool] {
        match self {
            Self::Gram => &[true],
            Self::Dense => &[false, true],
            Self::All => &[true, false, true],
        }
    }

    /// How many numbers the sums are, `columns` wide.
    pub fn numbers(self, columns: usize) -> usize {
        self.symmetric().iter().map(|symmetric| HostSum::length(columns, *symmetric)).sum()
    }
}

/// Sums `X̂ᵀX̂`, and `X̂ᵀX` and `XᵀX` where dense inputs are wanted too.
///
/// A sequence is one chunk (cut past 512 tokens, on a device past 4096). Products of a chunk are f32, chunks are added in f64 in
/// the order given: the bits depend neither on the number of threads nor on how sequences are spread over calls. Symmetric sums are formed
/// on and above the diagonal only.
#[derive(Debug, Clone)]
pub struct GramAccumulator {
    columns: usize,
    moments: Moments,
    tokens: usize,
    /// What is on the host.
    host: Option<Vec<HostSum>>,
    /// What is on another device than the CPU, and not in the sums of the host.
    on_device: Option<DeviceSums>,
}

impl GramAccumulator {
    /// An empty sum over inputs `columns` wide; `with_dense` if dense inputs X come beside the corrected X̂.
    pub fn new(columns: usize, with_dense: bool) -> Self {
        Self { columns, moments: Moments::all(with_dense), tokens: 0, host: None, on_device: None }
    }

    /// The sums as they are, for a wire.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn into_values(mut self) -> Result<Vec<f64>, GramError> {
        self.settle()?;
        self.on_host();
        let mut sums = self.host.unwrap_or_default().into_iter().map(HostSum::into_values);
        // One alone is not copied.
        let mut values = sums.next().unwrap_or_default();
        sums.for_each(|sum| values.extend_from_slice(&sum));
        Ok(values)
    }

    /// Sums over `tokens` tokens, from what [`Self::into_values`] gave.
    pub fn from_values(columns: usize, moments: Moments, tokens: usize, mut values: &[f64]) -> Self {
        let sum = |symmetric: &bool| {
            let (here, rest) = values.split_at(HostSum::length(columns, *symmetric));
            values = rest;
            HostSum::from_values(columns, *symmetric, here.to_vec())
        };
        let host = moments.symmetric().iter().map(sum).collect();
        Self { columns, moments, tokens, host: Some(host), on_device: None }
    }

    /// Adds the sums over `tokens` more tokens, from what [`Self::into_values`] gave of the same moments.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn add_values(&mut self, tokens: usize, mut values: &[f64]) -> Result<(), GramError> {
        self.settle()?;
        for sum in self.on_host() {
            let (here, rest) = values.split_at(sum.values().len());
            sum.merge(here);
            values = rest;
        }
        self.tokens += tokens;
        Ok(())
    }

    /// The sums of corrected inputs alone and, if there are any, those with dense ones: each can be merged and averaged apart.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn split(mut self) -> Result<(Self, Option<Self>), GramError> {
        self.settle()?;
        if self.moments != Moments::All {
            return Ok((self, None));
        }
        let with_dense = self.on_host().split_off(1);
        let others = Self { moments: Moments::Dense, host: Some(with_dense), on_device: None, ..self };
        self.moments = Moments::Gram;
        Ok((self, Some(others)))
    }

    fn on_host(&mut self) -> &mut Vec<HostSum> {
        let sum = |symmetric: &bool| HostSum::new(self.columns, *symmetric);
        self.host.get_or_insert_with(|| self.moments.symmetric().iter().map(sum).collect())
    }

    /// Tokens added so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Floating-point operations so far, symmetric products counted at half.
    pub fn flops(&self) -> f64 {
        let full = 2.0 * self.tokens as f64 * (self.columns * self.columns) as f64;
        match self.moments {
            Moments::Gram => 0.5 * full,
            Moments::Dense => 1.5 * full,
            Moments::All => 2.0 * full,
        }
    }

    /// Adds the inputs of some sequences, in calibration order: `corrected` X̂ and, if dense inputs were asked for, `dense` X,
    /// each `[tokens, in]` f32. Those on another device than the CPU are summed there,
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
        let paired = match (&dense, self.moments) {
            (Some(dense), Moments::All) => {
                dense.iter().map(|rows| rows.len()).eq(corrected.iter().map(|rows| rows.len()))
            }
            (None, Moments::Gram) => true,
            _ => false,
        };
        if !paired {
            return Err(GramError::Unpaired);
        }
        let (columns, mut left, mut right) = (self.columns, Strips::default(), Strips::default());
        let sums = self.on_host();
        for (index, corrected) in corrected.iter().enumerate() {
            let mut dense = dense.as_ref().map(|dense| dense[index].chunks(HOST_TOKENS * columns));
            for corrected in corrected.chunks(HOST_TOKENS * columns) {
                left.fill(corrected, columns);
                match (&mut sums[..], dense.as_mut().and_then(Iterator::next)) {
                    ([gram, cross, dense_gram], Some(dense)) => {
                        right.fill(dense, columns);
                        gram.add(&left, &left);
                        cross.add(&left, &right);
                        dense_gram.add(&right, &right);
                    }
                    ([gram], None) => gram.add(&left, &left),
                    _ => unreachable!("as many sums as there are inputs to sum"),
                }
            }
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
        if of_dense.is_some() != (self.moments == Moments::All) || of_dense.is_some_and(|dense| dense != tokens) {
            return Err(GramError::Unpaired);
        }
        for (index, (inputs, tokens)) in corrected.iter().zip(tokens).enumerate() {
            let sums = match self.on_device.take() {
                Some(sums) => sums,
                None => DeviceSums::new(self.columns, dense.is_some(), inputs.device())?,
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
            self.on_host().iter_mut().zip(&matrices).for_each(|(sum, more)| sum.add_matrix(more));
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
        if first.columns != second.columns || first.moments != second.moments {
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
                first.on_host().iter_mut().zip(more).for_each(|(sum, more)| sum.merge(more.values()));
            }
        }
        first.tokens += second.tokens;
        Ok(first)
    }

    /// The mean over tokens, in f32 on `device`, without held-out statistics.
    ///
    /// # Errors
    /// As [`Self::means`].
    pub fn finish(self, device: &Device) -> Result<InputStats, GramError> {
        debug_assert_ne!(self.moments, Moments::Dense, "a gram is always summed");
        let tokens = self.tokens;
        let mut means = self.means(device)?.into_iter();
        let gram = means.next().expect("a gram is always summed");
        Ok(InputStats { gram, dense: dense_of(means), tokens, held_out: None })
    }

    /// The means over tokens of what [`Self::split`] has apart, if it is there.
    ///
    /// # Errors
    /// As [`Self::means`].
    pub fn finish_dense(self, device: &Device) -> Result<Option<DenseStats>, GramError> {
        Ok(dense_of(self.means(device)?.into_iter()))
    }

    /// The mean of each sum over tokens, in f32 on `device`.
    ///
    /// # Errors
    /// `Empty` if nothing was added, `NotFinite` with the first channel that overflowed; `Backend`.
    fn means(mut self, device: &Device) -> Result<Vec<Tensor>, GramError> {
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
                self.on_host().iter().map(|sum| sum.mean(tokens)).collect()
            }
        };
        let of_row = |mean: &Vec<f32>| {
            let rows = mean.par_chunks(columns.max(1)).enumerate();
            rows.find_first(|(_, row)| row.iter().any(|value| !value.is_finite())).map(|(channel, _)| channel)
        };
        if let Some(channel) = means.iter().find_map(of_row) {
            return Err(GramError::NotFinite { channel });
        }
        means.into_iter().map(|mean| Ok(matrix(mean, columns, device)?)).collect()
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

/// The statistics of dense inputs from their means, if they are there.
fn dense_of(mut means: impl Iterator<Item = Tensor>) -> Option<DenseStats> {
    means.next().zip(means.next()).map(|(cross, gram)| DenseStats { cross, gram })
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
        // The longer sequence is cut, and what it leaves in strips is not summed again; from 2049 columns on tiles are larger.
        for (columns, lengths) in
            [(1, [40, 13]), (7, [HOST_TOKENS + 5, 3]), (100, [40, 13]), (193, [40, 13]), (2100, [3, 2])]
        {
            let (corrected, dense) = (sequences(1, &lengths, columns), sequences(5, &lengths, columns));
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
