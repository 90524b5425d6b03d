//! Sums over calibration sequences in a fixed tree: whoever has which sequences, the bits are the same.
//!
//! The sequences are cut into [`LEAVES`] leaves by their number alone. Each leaf is summed in order, and leaves are merged as a
//! binary tree. So some consecutive leaves are a few whole [`Branch`]es, however many workers there are to have them, and what
//! is merged with what never changes. Held-out sequences are summed apart, in the same tree.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::calibration::Split;

use super::gram::{GramAccumulator, GramError, Moments};
use crate::prune::InputStats;

/// Leaves of the tree. At most four partial sums are held while leaves are summed one after another.
pub use espalier_common::calibration::{Branch, LEAVES, sequences_of};

/// What is summed, and over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Width of the inputs.
    pub columns: usize,
    /// Whether dense inputs come beside the corrected ones.
    pub with_dense: bool,
    /// Calibration sequences in all.
    pub sequences: usize,
    /// How many of them, from the first, are calibrated with; the others are held out.
    pub calibrating: usize,
    /// Tokens of each.
    pub tokens: usize,
}

impl Sampling {
    fn split(&self) -> Split {
        Split { sequences: self.sequences, calibrating: self.calibrating }
    }

    /// Whether some sequences are held out.
    pub fn has_held_out(&self) -> bool {
        self.calibrating < self.sequences
    }

    /// Numbers that a portion of a branch's sums is, in [`Sums::into_values`].
    pub fn values(&self, branch: Branch, portion: Portion) -> usize {
        self.summed(branch, portion).into_iter().flatten().map(|(_, moments)| moments.numbers(self.columns)).sum()
    }

    /// Sequences of a branch that are calibrated with and those that are held out, where there are any, and which of their moments
    /// belong to a portion.
    fn summed(&self, branch: Branch, portion: Portion) -> [Option<(usize, Moments)>; 2] {
        let all = Some(Moments::all(self.with_dense));
        let moments = match portion {
            Portion::All => [all, all],
            Portion::Gram => [Some(Moments::Gram), None],
            Portion::Rest => [self.with_dense.then_some(Moments::Dense), all],
        };
        let [calibrating, held_out] = self.split().parts(branch);
        let of = |sequences, moments: Option<_>| moments.filter(|_| sequences > 0).map(|moments| (sequences, moments));
        [of(calibrating, moments[0]), of(held_out, moments[1])]
    }

    /// The numbers of a portion of a branch, by what they are the sums of.
    fn stretches<'a>(&self, (branch, portion): (Branch, Portion), mut values: &'a [f64]) -> [Option<Stretch<'a>>; 2] {
        self.summed(branch, portion).map(|summed| {
            let (sequences, moments) = summed?;
            let (here, rest) = values.split_at(moments.numbers(self.columns));
            values = rest;
            Some(Stretch { moments, tokens: sequences * self.tokens, values: here })
        })
    }
}

/// Numbers that are the sums of some moments over so many tokens.
struct Stretch<'a> {
    moments: Moments,
    tokens: usize,
    values: &'a [f64],
}

/// What of sums goes together: the gram comes first, because a solver can begin with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Portion {
    /// All of them.
    All,
    /// The gram over calibration sequences.
    Gram,
    /// All but that.
    Rest,
}

impl Portion {
    /// The two that go one after the other.
    pub const EACH: [Self; 2] = [Self::Gram, Self::Rest];

    /// Whether it is the second, as it is told.
    pub fn is_rest(self) -> bool {
        self == Self::Rest
    }

    /// The one that was told.
    pub fn told(is_rest: bool) -> Self {
        if is_rest { Self::Rest } else { Self::Gram }
    }
}

/// The sums over the sequences of a branch; `None` where it has no such sequence.
#[derive(Debug, Clone, Default)]
pub struct Sums {
    calibrating: Option<GramAccumulator>,
    held_out: Option<GramAccumulator>,
}

impl Sums {
    fn merge(self, second: Self) -> Result<Self, GramError> {
        let merge = |first: Option<GramAccumulator>, second: Option<GramAccumulator>| match (first, second) {
            (Some(first), Some(second)) => GramAccumulator::merge(first, second).map(Some),
            (first, second) => Ok(first.or(second)),
        };
        Ok(Self {
            calibrating: merge(self.calibrating, second.calibrating)?,
            held_out: merge(self.held_out, second.held_out)?,
        })
    }

    /// The gram over calibration sequences, and all but that.
    ///
    /// # Errors
    /// As [`GramAccumulator::settle`].
    pub fn split(self) -> Result<(Self, Self), GramError> {
        let (gram, dense) = self.calibrating.map(GramAccumulator::split).transpose()?.unzip();
        let rest = Self { calibrating: dense.flatten(), held_out: self.held_out };
        Ok((Self { calibrating: gram, held_out: None }, rest))
    }

    /// All numbers of the sums, for a wire.
    ///
    /// # Errors
    /// As [`GramAccumulator::settle`].
    pub fn into_values(self) -> Result<Vec<f64>, GramError> {
        let mut parts = [self.calibrating, self.held_out].into_iter().flatten();
        let mut values = parts.next().map(GramAccumulator::into_values).transpose()?.unwrap_or_default();
        parts.try_for_each(|sums| sums.into_values().map(|more| values.extend_from_slice(&more)))?;
        Ok(values)
    }

    /// A portion of the sums of a branch from its numbers, as many as [`Sampling::values`] says.
    pub fn from_values(sampling: &Sampling, of: (Branch, Portion), values: &[f64]) -> Self {
        let [calibrating, held_out] = sampling.stretches(of, values).map(|stretch| {
            let Stretch { moments, tokens, values } = stretch?;
            Some(GramAccumulator::from_values(sampling.columns, moments, tokens, values))
        });
        Self { calibrating, held_out }
    }

    /// Adds a portion of the sums of another branch from its numbers.
    fn add_values(&mut self, sampling: &Sampling, of: (Branch, Portion), values: &[f64]) -> Result<(), GramError> {
        let sums = [&mut self.calibrating, &mut self.held_out];
        for (sum, stretch) in sums.into_iter().zip(sampling.stretches(of, values)) {
            let Some(Stretch { moments, tokens, values }) = stretch else { continue };
            match sum {
                Some(sum) => sum.add_values(tokens, values)?,
                None => *sum = Some(GramAccumulator::from_values(sampling.columns, moments, tokens, values)),
            }
        }
        Ok(())
    }
}

/// Branches that are there, each merged with its sibling as soon as both are.
#[derive(Debug, Default)]
pub struct Forest {
    branches: BTreeMap<usize, (Branch, Sums)>,
}

impl Forest {
    /// Adds a branch.
    ///
    /// # Errors
    /// `Mismatch`, if it is of other inputs than its sibling; `Backend`.
    pub fn insert(&mut self, mut branch: Branch, mut sums: Sums) -> Result<(), GramError> {
        while branch.leaves < LEAVES {
            let sibling = branch.sibling();
            if self.branches.get(&sibling).is_none_or(|(other, _)| other.leaves != branch.leaves) {
                break;
            }
            let (_, other) = self.branches.remove(&sibling).expect("it was just seen");
            sums = if sibling < branch.first { other.merge(sums)? } else { sums.merge(other)? };
            branch = Branch { first: branch.first.min(sibling), leaves: 2 * branch.leaves };
        }
        self.branches.insert(branch.first, (branch, sums));
        Ok(())
    }

    /// Adds a portion of a branch from its numbers, as many as [`Sampling::values`] says; where its sibling is, they are not copied.
    ///
    /// # Errors
    /// As [`Self::insert`].
    pub fn insert_values(
        &mut self,
        sampling: &Sampling,
        of: (Branch, Portion),
        values: &[f64],
    ) -> Result<(), GramError> {
        let (branch, _) = of;
        let sibling = branch.sibling();
        match self.branches.remove(&sibling) {
            Some((other, mut sums)) if other.leaves == branch.leaves && branch.leaves < LEAVES => {
                sums.add_values(sampling, of, values)?;
                self.insert(Branch { first: branch.first.min(sibling), leaves: 2 * branch.leaves }, sums)
            }
            other => {
                self.branches.extend(other.map(|other| (sibling, other)));
                self.insert(branch, Sums::from_values(sampling, of, values))
            }
        }
    }

    /// The branches, in order.
    pub fn into_branches(self) -> impl Iterator<Item = (Branch, Sums)> {
        self.branches.into_values()
    }

    /// The sums over all sequences, once every leaf is there.
    ///
    /// # Errors
    /// `Incomplete`.
    pub fn into_sum(mut self) -> Result<Sums, GramError> {
        let whole = self.branches.remove(&0).filter(|(branch, _)| branch.leaves == LEAVES);
        whole.map(|(_, sums)| sums).ok_or(GramError::Incomplete)
    }

    /// The branches in two forests, see [`Sums::split`].
    ///
    /// # Errors
    /// As [`GramAccumulator::settle`].
    pub fn split(self) -> Result<(Self, Self), GramError> {
        let (mut grams, mut rests) = (Self::default(), Self::default());
        for (branch, sums) in self.into_branches() {
            let (gram, rest) = sums.split()?;
            grams.insert(branch, gram)?;
            rests.insert(branch, rest)?;
        }
        Ok((grams, rests))
    }

    /// The means over all sequences, in f32 on `device`, once every leaf is there.
    ///
    /// # Errors
    /// `Incomplete`, and those of [`GramAccumulator::finish`].
    pub fn finish(self, device: &Device) -> Result<InputStats, GramError> {
        let Sums { calibrating, held_out } = self.into_sum()?;
        let mut stats = calibrating.ok_or(GramError::Empty)?.finish(device)?;
        stats.held_out = held_out.map(|held_out| held_out.finish(device)).transpose()?.map(Arc::new);
        Ok(stats)
    }

    /// The same of what [`Self::split`] puts second, where `first` are the means of what it puts first.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn complete(self, first: InputStats, device: &Device) -> Result<InputStats, GramError> {
        let Sums { calibrating, held_out } = self.into_sum()?;
        let dense = calibrating.map(|dense| dense.finish_dense(device)).transpose()?.flatten();
        let held_out = held_out.map(|held_out| held_out.finish(device)).transpose()?.map(Arc::new);
        Ok(InputStats { dense, held_out, ..first })
    }
}

/// Sums up the sequences of consecutive leaves as they come, in order.
#[derive(Debug)]
pub struct Gatherer {
    sampling: Sampling,
    leaves: Range<usize>,
    /// The next sequence.
    next: usize,
    leaf: Sums,
    forest: Forest,
    flops: f64,
}

impl Gatherer {
    /// Begins before the first sequence of `leaves`.
    pub fn new(sampling: Sampling, leaves: Range<usize>) -> Self {
        let next = sequences_of(&leaves, sampling.sequences).start;
        Self { sampling, leaves, next, leaf: Sums::default(), forest: Forest::default(), flops: 0.0 }
    }

    /// Adds the inputs of the next sequences, see [`GramAccumulator::add`].
    ///
    /// # Errors
    /// `Shape`, `Unpaired`.
    pub fn add(&mut self, corrected: &[Tensor], dense: Option<&[Tensor]>) -> Result<(), GramError> {
        let Sampling { columns, with_dense, sequences, calibrating, .. } = self.sampling;
        let mut done = 0;
        while done < corrected.len() {
            if self.leaves.is_empty() {
                return Err(GramError::Surplus { sequences: self.next });
            }
            let leaf = sequences_of(&(self.leaves.start..self.leaves.start + 1), sequences);
            if self.next >= leaf.end {
                self.close_leaf()?;
                continue;
            }
            let is_calibrating = self.next < calibrating;
            let end = if is_calibrating { leaf.end.min(calibrating) } else { leaf.end };
            let here = done..(done + end - self.next).min(corrected.len());
            let part = if is_calibrating { &mut self.leaf.calibrating } else { &mut self.leaf.held_out };
            let sum = part.get_or_insert_with(|| GramAccumulator::new(columns, with_dense));
            let before = sum.flops();
            sum.add(&corrected[here.clone()], dense.map(|dense| &dense[here.clone()]))?;
            self.flops += sum.flops() - before;
            self.next += here.len();
            done = here.end;
        }
        Ok(())
    }

    fn close_leaf(&mut self) -> Result<(), GramError> {
        for sums in [&mut self.leaf.calibrating, &mut self.leaf.held_out].into_iter().flatten() {
            sums.settle_if_tight()?;
        }
        match self.leaves.next() {
            Some(first) => self.forest.insert(Branch { first, leaves: 1 }, std::mem::take(&mut self.leaf)),
            None => Ok(()),
        }
    }

    /// The sums, and the floating-point operations they took.
    ///
    /// # Errors
    /// `Incomplete` if sequences are missing.
    pub fn finish(mut self) -> Result<(Forest, f64), GramError> {
        if self.next < sequences_of(&self.leaves, self.sampling.sequences).end {
            return Err(GramError::Incomplete);
        }
        while !self.leaves.is_empty() {
            self.close_leaf()?;
        }
        Ok((self.forest, self.flops))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{matrix, oracle, values};

    const COLUMNS: usize = 20;
    const TOKENS: usize = 9;

    fn sampling(sequences: usize, calibrating: usize) -> Sampling {
        Sampling { columns: COLUMNS, with_dense: true, sequences, calibrating, tokens: TOKENS }
    }

    fn inputs(seed: u64, sequences: usize) -> Vec<Tensor> {
        let sequence = |at: usize| oracle::inputs(seed + at as u64, TOKENS, COLUMNS);
        (0..sequences).map(|at| matrix(sequence(at), COLUMNS, &Device::Cpu).unwrap()).collect()
    }

    /// Sums up `leaves` from inputs that come `batch` at a time.
    fn gathered(sampling: Sampling, leaves: Range<usize>, batch: usize) -> Forest {
        let (corrected, dense) = (inputs(1, sampling.sequences), inputs(100, sampling.sequences));
        let all = sequences_of(&leaves, sampling.sequences);
        let mut gatherer = Gatherer::new(sampling, leaves);
        for (corrected, dense) in corrected[all.clone()].chunks(batch).zip(dense[all].chunks(batch)) {
            gatherer.add(corrected, Some(dense)).unwrap();
        }
        gatherer.finish().unwrap().0
    }

    fn bits(stats: &InputStats) -> Vec<Vec<f32>> {
        let of = |stats: &InputStats| {
            let dense = stats.dense.as_ref().unwrap();
            [&stats.gram, &dense.cross, &dense.gram].map(|tensor| values(tensor).unwrap())
        };
        of(stats).into_iter().chain(stats.held_out.iter().flat_map(|held_out| of(held_out))).collect()
    }

    #[test]
    fn any_split_and_any_batches_give_the_same_bits() {
        for (sequences, calibrating) in [(32, 26), (13, 13), (8, 7), (5, 4), (1, 1)] {
            let sampling = sampling(sequences, calibrating);
            let whole = bits(&gathered(sampling, 0..LEAVES, 1).finish(&Device::Cpu).unwrap());
            for cuts in [vec![0, 8], vec![0, 4, 8], vec![0, 3, 6, 8], vec![0, 1, 2, 3, 4, 5, 6, 7, 8], vec![0, 5, 8]] {
                let mut forest = Forest::default();
                // The last part is there first, and each goes over a wire.
                for part in cuts.windows(2).rev() {
                    for (branch, sums) in gathered(sampling, part[0]..part[1], 3).into_branches() {
                        let values = sent(&sampling, branch, Portion::All, sums);
                        forest.insert_values(&sampling, (branch, Portion::All), &values).unwrap();
                    }
                }
                let stats = forest.finish(&Device::Cpu).unwrap();
                assert_eq!(stats.tokens, calibrating * TOKENS);
                assert_eq!(bits(&stats), whole, "{sequences} sequences cut at {cuts:?}");
            }
        }
    }

    /// What comes of sums that go over a wire.
    fn sent(sampling: &Sampling, branch: Branch, portion: Portion, sums: Sums) -> Vec<f64> {
        let values = sums.into_values().unwrap();
        assert_eq!(values.len(), sampling.values(branch, portion));
        values
    }

    #[test]
    fn sums_that_come_in_two_portions_give_the_same_bits() {
        for (sequences, calibrating, with_dense) in [(32, 26, true), (13, 13, true), (8, 7, false), (5, 5, false)] {
            let sampling = Sampling { with_dense, ..sampling(sequences, calibrating) };
            let gathered = |leaves: Range<usize>| {
                let (corrected, dense) = (inputs(1, sequences), inputs(100, sequences));
                let here = sequences_of(&leaves, sequences);
                let mut gatherer = Gatherer::new(sampling, leaves);
                gatherer.add(&corrected[here.clone()], with_dense.then_some(&dense[here])).unwrap();
                gatherer.finish().unwrap().0
            };
            let bits = |stats: &InputStats| -> Vec<Vec<f32>> {
                let sides = [stats].into_iter().chain(stats.held_out.as_deref());
                let of = |side: &InputStats| -> Vec<Vec<f32>> {
                    let dense = side.dense.iter().flat_map(|dense| [&dense.cross, &dense.gram]);
                    [&side.gram].into_iter().chain(dense).map(|tensor| values(tensor).unwrap()).collect()
                };
                sides.flat_map(of).collect()
            };
            let whole = bits(&gathered(0..LEAVES).finish(&Device::Cpu).unwrap());
            let (mut grams, mut rests) = gathered(3..LEAVES).split().unwrap();
            let (lent_grams, lent_rests) = gathered(0..3).split().unwrap();
            for (branch, sums) in lent_grams.into_branches() {
                let values = sent(&sampling, branch, Portion::Gram, sums);
                grams.insert_values(&sampling, (branch, Portion::Gram), &values).unwrap();
            }
            let first = grams.finish(&Device::Cpu).unwrap();
            assert!(first.dense.is_none() && first.held_out.is_none());
            for (branch, sums) in lent_rests.into_branches() {
                let values = sent(&sampling, branch, Portion::Rest, sums);
                rests.insert_values(&sampling, (branch, Portion::Rest), &values).unwrap();
            }
            assert_eq!(bits(&rests.complete(first, &Device::Cpu).unwrap()), whole, "{sequences} {with_dense}");
        }
    }

    #[test]
    fn the_sums_are_those_of_naive_f64_loops() {
        let sampling = sampling(11, 9);
        let stats = gathered(sampling, 0..LEAVES, 2).finish(&Device::Cpu).unwrap();
        let held_out = stats.held_out.clone().unwrap();
        let rows = |range: Range<usize>| -> Vec<f32> {
            inputs(1, 11)[range].iter().flat_map(|sequence| values(sequence).unwrap()).collect()
        };
        for (found, rows) in [(&stats.gram, rows(0..9)), (&held_out.gram, rows(9..11))] {
            let expected = oracle::gram(&rows, &rows, COLUMNS);
            let size = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            let found = values(found).unwrap();
            assert!(found.iter().zip(&expected).all(|(x, y)| (f64::from(*x) - y).abs() <= 1e-6 * size));
        }
    }

    #[test]
    fn leaves_are_whole_branches() {
        let branches = |leaves: Range<usize>| -> Vec<(usize, usize)> {
            Branch::of(&leaves).into_iter().map(|branch| (branch.first, branch.leaves)).collect()
        };
        assert_eq!(branches(0..8), [(0, 8)]);
        assert_eq!(branches(3..6), [(3, 1), (4, 2)]);
        assert_eq!(branches(1..8), [(1, 1), (2, 2), (4, 4)]);
        for (first, end) in (0..=LEAVES).flat_map(|first| (first..=LEAVES).map(move |end| (first, end))) {
            let forest = gathered(sampling(8, 6), first..end, 1);
            let found: Vec<Branch> = forest.into_branches().map(|(branch, _)| branch).collect();
            assert_eq!(found, Branch::of(&(first..end)));
        }
    }

    #[test]
    fn too_little_and_too_much_are_told() {
        let sampling = sampling(8, 8);
        let mut gatherer = Gatherer::new(sampling, 2..4);
        let inputs = inputs(1, 3);
        gatherer.add(&inputs[..1], Some(&inputs[..1])).unwrap();
        assert!(matches!(gatherer.finish(), Err(GramError::Incomplete)));
        let mut gatherer = Gatherer::new(sampling, 2..4);
        assert!(matches!(gatherer.add(&inputs, Some(&inputs)), Err(GramError::Surplus { sequences: 4 })));
        assert!(matches!(gathered(sampling, 0..4, 1).finish(&Device::Cpu), Err(GramError::Incomplete)));
    }
}
