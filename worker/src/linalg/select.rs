//! Exact selection by magnitude: which weights stay.
//!
//! The smallest magnitudes are dropped; among equal ones the lower index goes first, so the number of zeros is exact and
//! independent of how the work was cut. A keep mask has one byte a weight, 1 for kept.

use pulp::Arch;
use rayon::prelude::*;

use super::lanes::{Lanes, in_lanes};

/// Elements that one thread scans at a time.
const CHUNK: usize = 1 << 16;
/// Bits of the sort key that the histogram resolves: the exponent and four bits of the mantissa.
const BINS: usize = 1 << 12;
const SHIFT: u32 = 31 - 12;

/// The magnitude of a value as an integer that sorts like it; NaN is above everything.
#[inline]
pub fn key(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// The cut between dropped and kept values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Keys below are dropped, keys above are kept.
    pub key: u32,
    /// Values with the very key are dropped up to and without this index.
    pub tie: usize,
}

impl Cut {
    /// Whether the value at `index` stays.
    #[inline]
    pub fn keeps(self, value: f32, index: usize) -> bool {
        let key = key(value);
        key > self.key || (key == self.key && index >= self.tie)
    }

    /// The cut that drops exactly `drop` of `values`: a histogram of the leading key bits, then a selection among the few
    /// values in the bin where the cut falls.
    pub fn smallest(values: &[f32], drop: usize) -> Self {
        let histogram = values.par_chunks(CHUNK).map(Histogram::of).reduce(Histogram::default, |a, b| a.merged(&b));
        if drop == 0 {
            return Self { key: 0, tie: 0 };
        }
        if drop >= values.len() {
            return Self { key: u32::MAX, tie: 0 };
        }
        let (bin, below) = histogram.bin_of(drop);
        let mut inside: Vec<u64> = values
            .par_chunks(CHUNK)
            .enumerate()
            .flat_map_iter(|(chunk, values)| {
                values
                    .iter()
                    .enumerate()
                    .filter(move |(_, value)| (key(**value) >> SHIFT) as usize == bin)
                    .map(move |(offset, value)| u64::from(key(*value)) << 32 | (chunk * CHUNK + offset) as u64)
            })
            .collect();
        // The first kept value is the one of rank `drop`, by key and then by index.
        let (_, first, _) = inside.select_nth_unstable(drop - below);
        Self::at(*first)
    }

    /// The cut whose first kept value has the key and the index packed into `ranked`.
    fn at(ranked: u64) -> Self {
        Self { key: (ranked >> 32) as u32, tie: (ranked & u64::from(u32::MAX)) as usize }
    }
}

/// A range of keys in which a cut is expected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// The first key inside.
    low: u32,
    /// The first key above.
    high: u32,
}

impl Window {
    /// Keys no further than `reach` from that of a cut; 2²³ is an octave.
    pub fn around(cut: Cut, reach: u32) -> Self {
        Self { low: cut.key.saturating_sub(reach), high: cut.key.saturating_add(reach) }
    }
}

/// What a window shows of some values: enough to find a cut inside it without a further look at the others.
#[derive(Debug, Clone, Default)]
pub struct Census {
    /// Values below the window.
    below: usize,
    /// Key and index of each value inside.
    inside: Vec<u64>,
}

impl Census {
    /// Looks at `values`, the first of which has the index `first`.
    pub fn of(values: &[f32], first: usize, window: Window) -> Self {
        in_lanes(Look { values, first, window })
    }

    /// The cut that drops exactly `drop` values, if it lies inside the window; `parts` are all there is, in any order.
    pub fn cut(parts: &[Self], drop: usize) -> Option<Cut> {
        let below: usize = parts.iter().map(|part| part.below).sum();
        let mut inside: Vec<u64> = parts.iter().flat_map(|part| &part.inside).copied().collect();
        let rank = drop.checked_sub(below).filter(|&rank| drop > 0 && rank < inside.len())?;
        let (_, first, _) = inside.select_nth_unstable(rank);
        Some(Cut::at(*first))
    }
}

/// [`Census::of`].
struct Look<'a> {
    values: &'a [f32],
    first: usize,
    window: Window,
}

impl Lanes for Look<'_> {
    type Output = Census;

    #[inline(always)]
    fn run(self) -> Census {
        /// Values that are looked at together: as many as a mask has bits.
        const GROUP: usize = 32;
        let Window { low, high } = self.window;
        let mut inside = Vec::new();
        let mut note = |key: u32, offset: usize| inside.push(u64::from(key) << 32 | (self.first + offset) as u64);
        let (groups, rest) = self.values.as_chunks::<GROUP>();
        let mut below = [0u32; GROUP];
        for (group, values) in groups.iter().enumerate() {
            let mut hits = 0u32;
            for lane in 0..GROUP {
                let key = key(values[lane]);
                below[lane] += u32::from(key < low);
                hits |= u32::from((key >= low) & (key < high)) << lane;
            }
            while hits != 0 {
                let lane = hits.trailing_zeros() as usize;
                note(key(values[lane]), group * GROUP + lane);
                hits &= hits - 1;
            }
        }
        let mut below = below.iter().map(|&count| count as usize).sum::<usize>();
        for (offset, value) in rest.iter().enumerate() {
            let key = key(*value);
            below += usize::from(key < low);
            if (low..high).contains(&key) {
                note(key, groups.len() * GROUP + offset);
            }
        }
        Census { below, inside }
    }
}

/// Counts of magnitudes by their leading key bits.
#[derive(Debug, Clone)]
pub struct Histogram(Vec<u32>);

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; BINS])
    }
}

impl Histogram {
    /// The histogram of some values.
    pub fn of(values: &[f32]) -> Self {
        let mut histogram = Self::default();
        histogram.add(values);
        histogram
    }

    /// Counts some more values.
    pub fn add(&mut self, values: &[f32]) {
        for value in values {
            self.0[(key(*value) >> SHIFT) as usize] += 1;
        }
    }

    /// The sum of two histograms.
    #[must_use]
    pub fn merged(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a += b);
        self
    }

    /// The bin that holds the value of this rank, and how many values lie in the bins below.
    fn bin_of(&self, rank: usize) -> (usize, usize) {
        let mut below = 0;
        for (bin, &count) in self.0.iter().enumerate() {
            if below + count as usize > rank {
                return (bin, below);
            }
            below += count as usize;
        }
        (BINS - 1, below)
    }
}

/// Marks what stays when exactly `drop` of all values go.
pub fn keep_largest(values: &[f32], drop: usize, keep: &mut [u8]) {
    mark(values, Cut::smallest(values, drop), keep);
}

/// Marks what stays on which side of a cut.
pub fn mark(values: &[f32], cut: Cut, keep: &mut [u8]) {
    keep.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (keep, values))| {
        let tie = cut.tie.saturating_sub(chunk * CHUNK);
        let (before, after) = values.split_at(tie.min(values.len()));
        let (keep_before, keep_after) = keep.split_at_mut(before.len());
        Arch::new().dispatch(
            #[inline(always)]
            || {
                keep_before.iter_mut().zip(before).for_each(|(keep, value)| *keep = u8::from(key(*value) > cut.key));
                keep_after.iter_mut().zip(after).for_each(|(keep, value)| *keep = u8::from(key(*value) >= cut.key));
            },
        );
    });
}

/// Marks what stays when row `i` loses exactly `drop(i)` of its `columns` values.
pub fn keep_largest_per_row(values: &[f32], columns: usize, drop: impl Fn(usize) -> usize + Sync, keep: &mut [u8]) {
    let columns = columns.max(1);
    keep.par_chunks_mut(columns).zip(values.par_chunks(columns)).enumerate().for_each_init(
        Vec::new,
        |ranked, (row, (keep, values))| {
            keep_largest_of_row(values, drop(row), ranked, keep);
        },
    );
}

fn keep_largest_of_row(values: &[f32], drop: usize, ranked: &mut Vec<u64>, keep: &mut [u8]) {
    keep.fill(1);
    if drop == 0 {
        return;
    }
    ranked.clear();
    ranked.extend(values.iter().enumerate().map(|(index, value)| u64::from(key(*value)) << 32 | index as u64));
    if drop < ranked.len() {
        ranked.select_nth_unstable(drop);
    }
    for entry in ranked.iter().take(drop) {
        keep[(*entry & u64::from(u32::MAX)) as usize] = 0;
    }
}

/// Marks the `n` largest of every `m` consecutive values.
pub fn keep_n_of_m(values: &[f32], n: usize, m: usize, keep: &mut [u8]) {
    // Whole groups to a chunk.
    let chunk = (CHUNK / m).max(1) * m;
    keep.par_chunks_mut(chunk)
        .zip(values.par_chunks(chunk))
        .for_each(|(keep, values)| keep_n_of_groups(values, n, m, keep));
}

/// What [`keep_n_of_m`] does, on the calling thread.
pub fn keep_n_of_groups(values: &[f32], n: usize, m: usize, keep: &mut [u8]) {
    match m {
        4 => keep_groups::<4>(values, n, keep),
        8 => keep_groups::<8>(values, n, keep),
        16 => keep_groups::<16>(values, n, keep),
        _ => {
            let mut ranked = Vec::with_capacity(m);
            for (keep, values) in keep.chunks_mut(m).zip(values.chunks(m)) {
                keep_largest_of_row(values, m - n, &mut ranked, keep);
            }
        }
    }
}

/// Ranks each value of a group by counting those ahead of it: no branches, so the compiler vectorises across the group.
fn keep_groups<const M: usize>(values: &[f32], n: usize, keep: &mut [u8]) {
    Arch::new().dispatch(
        #[inline(always)]
        || inlined_keep_groups::<M>(values, n, keep),
    );
}

#[inline(always)]
fn inlined_keep_groups<const M: usize>(values: &[f32], n: usize, keep: &mut [u8]) {
    for (keep, values) in keep.as_chunks_mut::<M>().0.iter_mut().zip(values.as_chunks::<M>().0) {
        let keys = values.map(key);
        for i in 0..M {
            let mut ahead = 0;
            for j in 0..M {
                ahead += usize::from(if j > i { keys[j] >= keys[i] } else { keys[j] > keys[i] });
            }
            keep[i] = u8::from(ahead < n);
        }
    }
}

/// Sets what does not stay to exactly `+0.0`.
pub fn zero_dropped(values: &mut [f32], keep: &[u8]) {
    values.par_chunks_mut(CHUNK).zip(keep.par_chunks(CHUNK)).for_each(|(values, keep)| {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                values.iter_mut().zip(keep).for_each(|(value, keep)| {
                    *value = if *keep == 0 { 0.0 } else { *value };
                });
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::linalg::oracle;

    /// A full stable sort.
    fn sorted_keep(values: &[f32], drop: usize) -> Vec<u8> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
        let mut keep = vec![1; values.len()];
        order[..drop].iter().for_each(|&index| keep[index] = 0);
        keep
    }

    /// Few distinct values, so that ties are everywhere.
    fn tied() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((-4i8..=4).prop_map(|x| f32::from(x) * 0.3), 1..300)
    }

    proptest! {
        #[test]
        fn whole_selection_equals_a_stable_sort(values in tied(), share in 0.0..=1.0f64) {
            let drop = (values.len() as f64 * share) as usize;
            let mut keep = vec![7; values.len()];
            keep_largest(&values, drop, &mut keep);
            prop_assert_eq!(&keep, &sorted_keep(&values, drop));
            let cut = Cut::smallest(&values, drop);
            prop_assert!(values.iter().enumerate().all(|(i, v)| u8::from(cut.keeps(*v, i)) == keep[i]));
        }

        #[test]
        fn a_census_finds_the_cut_of_a_stable_sort_or_says_that_it_is_elsewhere(
            values in tied(), share in 0.0..=1.0f64, near in 0usize..300, reach in prop::sample::select(vec![1u32, 1 << 20, 1 << 30]),
        ) {
            let drop = (values.len() as f64 * share) as usize;
            let window = Window::around(Cut { key: key(values[near % values.len()]), tie: 0 }, reach);
            let half = values.len() / 2;
            let parts = [Census::of(&values[half..], half, window), Census::of(&values[..half], 0, window)];
            let exact = Cut::smallest(&values, drop);
            match Census::cut(&parts, drop) {
                Some(cut) => prop_assert_eq!(cut, exact),
                None => prop_assert!(
                    drop == 0 || drop == values.len() || !(window.low..window.high).contains(&exact.key)
                ),
            }
        }

        #[test]
        fn row_selection_equals_a_stable_sort_of_each_row(values in tied(), columns in 1usize..20) {
            let rows = values.len() / columns;
            let values = &values[..rows * columns];
            let drop = |row: usize| (row * 3) % (columns + 1);
            let mut keep = vec![7; values.len()];
            keep_largest_per_row(values, columns, drop, &mut keep);
            for row in 0..rows {
                let range = row * columns..(row + 1) * columns;
                prop_assert_eq!(&keep[range.clone()], &sorted_keep(&values[range], drop(row))[..]);
            }
        }

        #[test]
        fn groups_keep_exactly_n_the_largest(values in tied(), m in 1usize..18, n in 1usize..18) {
            let n = n.min(m);
            let values = &values[..values.len() / m * m];
            let mut keep = vec![7; values.len()];
            keep_n_of_m(values, n, m, &mut keep);
            for (keep, values) in keep.chunks(m).zip(values.chunks(m)) {
                prop_assert_eq!(keep, &sorted_keep(values, m - n)[..]);
            }
        }
    }

    #[test]
    fn large_selection_equals_a_stable_sort_across_chunks() {
        let mut values = oracle::random(9, 3 * CHUNK + 17);
        values.iter_mut().for_each(|value| *value = (*value * 64.0).round() / 64.0);
        for drop in [1, values.len() / 2, values.len() - 1] {
            let mut keep = vec![7; values.len()];
            keep_largest(&values, drop, &mut keep);
            assert_eq!(keep, sorted_keep(&values, drop));
        }
    }

    #[test]
    fn dropped_values_become_positive_zero() {
        let mut values = vec![-1.0, -2.0, 3.0];
        zero_dropped(&mut values, &[0, 1, 0]);
        assert_eq!(values.map_bits(), [0, (-2.0f32).to_bits(), 0]);
    }

    trait Bits {
        fn map_bits(&self) -> Vec<u32>;
    }
    impl Bits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }
}
