//! What stays, by magnitude: over all values, or of every M.
//!
//! A GPU sorts no rows wider than its blocks' memory, and needs not: the rank of a value is 63 bits, magnitude and index, and the
//! rank of the first kept one is found digit by digit, with a histogram of the ranks that share the digits found so far. The host
//! only launches: it never waits for a digit.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{Place, PlaceMut, values};
use crate::device::kernels::{self, Arg, Call, Launch};
use crate::linalg::select;

/// Bits of a rank.
const RANK_BITS: usize = 63;
/// Bits of a digit: as the kernel has it.
const DIGIT_BITS: usize = 12;
/// Words that say where a selection is: two for the digits found so far, and how many ranks lie below them.
const POSITION: usize = 3;

/// A u8 tensor that is 0 for the `drop` smallest magnitudes and 1 elsewhere; of equal ones the lower index goes first.
///
/// # Errors
/// If there are more values than an index has room for, or what the backend says.
pub fn keep_largest(values: &Tensor, drop: usize) -> Result<Tensor> {
    if u32::try_from(values.elem_count()).is_err() {
        bail!("{} values are too many to choose among", values.elem_count());
    }
    values.apply_op1_no_bwd(&Largest { drop })
}

/// A u8 tensor that is 1 for the `n` largest magnitudes of every `m` consecutive values.
///
/// # Errors
/// If `m` does not divide the last dimension, or what the backend says.
pub fn keep_n_of_m(values: &Tensor, n: usize, m: usize) -> Result<Tensor> {
    match values.dims().last() {
        Some(columns) if m > 0 && columns.is_multiple_of(m) => values.apply_op1_no_bwd(&NofM { n, m }),
        _ => bail!("rows of {:?} cannot be cut into groups of {m}", values.dims()),
    }
}

struct Largest {
    drop: usize,
}

impl Largest {
    /// Shift and width of each digit of a rank, the highest first.
    fn digits() -> impl Iterator<Item = (usize, usize)> {
        (0..RANK_BITS.div_ceil(DIGIT_BITS)).map(|digit| {
            let left = RANK_BITS - digit * DIGIT_BITS;
            let bits = DIGIT_BITS.min(left);
            (left - bits, bits)
        })
    }

    /// Whether the rank of the first value that stays has to be found.
    fn cuts(&self, elements: usize) -> bool {
        self.drop > 0 && self.drop < elements
    }

    fn counting<'a, S>(
        counts: PlaceMut<'a, S>,
        values: Place<'a, S>,
        position: Place<'a, S>,
        (shift, bits): (usize, usize),
    ) -> Call<'a, S> {
        let elements = values.1.shape().elem_count();
        Call {
            launch: Launch::over("count_digits", elements),
            args: vec![
                Arg::Write(counts.0, counts.1),
                Arg::Read(values.0, values.1),
                Arg::Read(position.0, position.1),
                Arg::Count(elements),
                Arg::Count(shift),
                Arg::Count(bits),
            ],
        }
    }

    fn finding<'a, S>(&self, position: PlaceMut<'a, S>, counts: PlaceMut<'a, S>, bits: usize) -> Call<'a, S> {
        Call {
            launch: Launch::over("find_digit", 1),
            args: vec![
                Arg::Write(position.0, position.1),
                Arg::Write(counts.0, counts.1),
                Arg::Count(self.drop),
                Arg::Count(bits),
            ],
        }
    }

    fn keeping<'a, S>(&self, keep: PlaceMut<'a, S>, values: Place<'a, S>, position: Place<'a, S>) -> Call<'a, S> {
        let elements = values.1.shape().elem_count();
        let least = if self.drop < elements { 0 } else { usize::MAX };
        Call {
            launch: Launch::over("keep_from", elements),
            args: vec![
                Arg::Write(keep.0, keep.1),
                Arg::Read(values.0, values.1),
                Arg::Read(position.0, position.1),
                Arg::Count(elements),
                Arg::Count(least),
            ],
        }
    }
}

impl CustomOp1 for Largest {
    fn name(&self) -> &'static str {
        "keep-largest"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values::<f32>((x, x_l))?;
        let mut keep = vec![1; x.len()];
        select::keep_largest(x, self.drop, &mut keep);
        Ok((CpuStorage::U8(keep), x_l.shape().clone()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, x_l: &Layout) -> Result<(CudaStorage, Shape)> {
        let elements = x_l.shape().elem_count();
        let (at, bins) = (Layout::contiguous(POSITION), Layout::contiguous(1 << DIGIT_BITS));
        let mut position = kernels::counts_like(x, POSITION)?;
        if self.cuts(elements) {
            let mut counts = kernels::counts_like(x, 1 << DIGIT_BITS)?;
            for digit in Self::digits() {
                Self::counting((&mut counts, &bins), (x, x_l), (&position, &at), digit).run()?;
                self.finding((&mut position, &at), (&mut counts, &bins), digit.1).run()?;
            }
        }
        let mut keep = kernels::u8_like(x, elements)?;
        self.keeping((&mut keep, &Layout::contiguous(x_l.shape())), (x, x_l), (&position, &at)).run()?;
        Ok((keep, x_l.shape().clone()))
    }
}

struct NofM {
    n: usize,
    m: usize,
}

impl NofM {
    fn call<'a, S>(&self, keep: PlaceMut<'a, S>, values: Place<'a, S>) -> Call<'a, S> {
        let groups = values.1.shape().elem_count() / self.m;
        Call {
            launch: Launch::over("keep_n_of_m", groups),
            args: vec![
                Arg::Write(keep.0, keep.1),
                Arg::Read(values.0, values.1),
                Arg::Count(groups),
                Arg::Count(self.n),
                Arg::Count(self.m),
            ],
        }
    }
}

impl CustomOp1 for NofM {
    fn name(&self) -> &'static str {
        "keep-n-of-m"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values::<f32>((x, x_l))?;
        let mut keep = vec![1; x.len()];
        select::keep_n_of_m(x, self.n, self.m, &mut keep);
        Ok((CpuStorage::U8(keep), x_l.shape().clone()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, x_l: &Layout) -> Result<(CudaStorage, Shape)> {
        let mut keep = kernels::u8_like(x, x_l.shape().elem_count())?;
        self.call((&mut keep, &Layout::contiguous(x_l.shape())), (x, x_l)).run()?;
        Ok((keep, x_l.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::oracle;

    /// Random magnitudes, many of which are alike.
    fn tied(seed: u64, length: usize) -> Vec<f32> {
        oracle::random(seed, length).into_iter().map(|value| (value * 16.0).round() / 16.0).collect()
    }

    /// A full stable sort.
    fn sorted(values: &[f32], drop: usize) -> Vec<u8> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
        let mut keep = vec![1; values.len()];
        order[..drop].iter().for_each(|&at| keep[at] = 0);
        keep
    }

    #[test]
    fn selections_equal_a_stable_sort() {
        for device in host::devices() {
            for (length, drop) in [(1, 0), (1, 1), (960, 0), (960, 1), (960, 480), (960, 959), (960, 960), (9000, 4000)]
            {
                let values = tied(3, length);
                let tensor = Tensor::from_vec(values.clone(), length, &device).unwrap();
                let keep: Vec<u8> = keep_largest(&tensor, drop).unwrap().to_vec1().unwrap();
                assert_eq!(keep, sorted(&values, drop), "{device:?}, {drop} of {length}");
            }
            for (n, m) in [(2, 4), (4, 8), (1, 3), (5, 5), (0, 4), (7, 12)] {
                let values = tied(5, 240);
                let tensor = Tensor::from_vec(values.clone(), (2, 120), &device).unwrap();
                let keep: Vec<u8> = keep_n_of_m(&tensor, n, m).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                for (keep, values) in keep.chunks(m).zip(values.chunks(m)) {
                    assert_eq!(keep, sorted(values, m - n), "{device:?}, {n}:{m}");
                }
            }
        }
    }

    #[test]
    fn the_kernels_do_what_the_passes_do() {
        for (length, drop) in [(960, 0), (960, 1), (960, 480), (960, 959), (960, 960), (5_000, 2_501)] {
            let values = tied(length as u64, length);
            let (layout, x) = (Layout::contiguous(length), CpuStorage::F32(values.clone()));
            let (at, bins) = (Layout::contiguous(POSITION), Layout::contiguous(1 << DIGIT_BITS));
            let mut position = CpuStorage::U32(vec![0; POSITION]);
            let mut counts = CpuStorage::U32(vec![0; 1 << DIGIT_BITS]);
            let (largest, mut there) = (Largest { drop }, true);
            for digit in Largest::digits().take_while(|_| largest.cuts(length)) {
                there &= host::run(Largest::counting((&mut counts, &bins), (&x, &layout), (&position, &at), digit));
                there &= host::run(largest.finding((&mut position, &at), (&mut counts, &bins), digit.1));
            }
            let mut keep = CpuStorage::U8(vec![7; length]);
            if there && host::run(largest.keeping((&mut keep, &layout), (&x, &layout), (&position, &at))) {
                assert_eq!(keep.as_slice::<u8>().unwrap(), sorted(&values, drop), "{drop} of {length}");
            }
        }
        for (n, m) in [(2, 4), (4, 8), (1, 3)] {
            let (layout, x) = (Layout::contiguous(240), CpuStorage::F32(tied(5, 240)));
            let (expected, _) = NofM { n, m }.cpu_fwd(&x, &layout).unwrap();
            let mut keep = CpuStorage::U8(vec![7; 240]);
            if host::run(NofM { n, m }.call((&mut keep, &layout), (&x, &layout))) {
                assert_eq!(keep.as_slice::<u8>().unwrap(), expected.as_slice::<u8>().unwrap(), "{n}:{m}");
            }
        }
    }

    #[test]
    fn rows_that_groups_do_not_divide_are_refused() {
        let x = Tensor::zeros((2, 10), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(keep_n_of_m(&x, 2, 4).is_err() && keep_n_of_m(&x, 0, 0).is_err());
    }
}
