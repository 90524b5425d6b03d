//! The innermost loop of products that a library would lay out anew each time: a tile of sums that stays in registers.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

/// Rows of a tile. With two vectors of columns its sums take 12 registers, which is what hides the latency of two fused operations
/// a cycle.
pub(crate) const TILE_ROWS: usize = 6;
/// Vectors of columns of a tile.
const TILE_VECTORS: usize = 2;

/// Columns of a tile on this machine.
pub(crate) fn tile_columns() -> usize {
    struct Columns;
    impl WithSimd for Columns {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            columns_of::<S>()
        }
    }
    Arch::new().dispatch(Columns)
}

/// Columns of a tile of such vectors.
pub(crate) const fn columns_of<S: Simd>() -> usize {
    TILE_VECTORS * S::F32_LANES
}

/// The sums of a tile of the product.
pub(crate) type Sums<S> = [[<S as Simd>::f32s; TILE_VECTORS]; TILE_ROWS];

/// Numbers of a line of the cache.
pub(crate) const LINE: usize = 16;

/// Numbers that begin where a line of the cache does: no vector among them lies in two lines. An allocator that is asked for such a
/// place leaves gaps; these take a line more instead.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    values: Vec<f32>,
    range: Range<usize>,
}

impl Lines {
    /// So many zeros.
    pub(crate) fn zeros(length: usize) -> Self {
        let values = vec![0.0; length + LINE];
        // Where it does not know, it says usize::MAX.
        let first = values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { values, range: first..first + length }
    }

    pub(crate) fn get(&self) -> &[f32] {
        &self.values[self.range.clone()]
    }

    pub(crate) fn get_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.range.clone()]
    }
}

/// The sums of `left`, a run of [`TILE_ROWS`] numbers for each step of the inner dimension, times `right`, a run of
/// [`tile_columns`] for each. Each is summed in the order of the steps. Meanwhile what lies `ahead`, a line for each four steps at most,
/// is brought into the second cache: it is of no account to the sums.
#[inline(always)]
pub(crate) fn tile<S: Simd>(simd: S, left: &[f32], right: &[f32], ahead: &[f32]) -> Sums<S> {
    /// Steps that are written out: what counts them would take a sixth as long as they do.
    const STEPS: usize = 4;
    let (left, _) = left.as_chunks::<TILE_ROWS>();
    let (right, _) = S::as_simd_f32s(right).0.as_chunks::<TILE_VECTORS>();
    assert_eq!(left.len(), right.len(), "as many steps on both sides");
    let ((left_runs, left), (right_runs, right)) = (left.as_chunks::<STEPS>(), right.as_chunks::<STEPS>());
    let mut sums = [[simd.splat_f32s(0.0); TILE_VECTORS]; TILE_ROWS];
    let mut ahead = ahead.chunks(LINE);
    for (left, right) in left_runs.iter().zip(right_runs) {
        if let Some(line) = ahead.next() {
            fetch(line);
        }
        left.iter().zip(right).for_each(
            #[inline(always)]
            |(left, right)| add(simd, &mut sums, left, right),
        );
    }
    for (left, right) in left.iter().zip(right) {
        add(simd, &mut sums, left, right);
    }
    sums
}

/// Has a line brought into the second cache, where the machine can be asked to, and goes on at once.
#[inline(always)]
fn fetch(line: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "asking for memory takes a pointer")]
    // SAFETY: the pointer is that of a slice; and it is a hint, which reads nothing and faults on no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Adds the outer product of a column of rows and a row of vectors.
#[inline(always)]
fn add<S: Simd>(simd: S, sums: &mut Sums<S>, left: &[f32; TILE_ROWS], right: &[S::f32s; TILE_VECTORS]) {
    for (sums, value) in sums.iter_mut().zip(left) {
        let value = simd.splat_f32s(*value);
        sums.iter_mut().zip(right).for_each(|(sum, vector)| *sum = simd.mul_add_e_f32s(value, *vector, *sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_begin_where_those_of_the_cache_do() {
        for length in [0, 1, 15, 16, 1000] {
            let lines = Lines::zeros(length);
            assert_eq!((lines.get().len(), lines.get().as_ptr().align_offset(64)), (length, 0));
        }
    }
}
