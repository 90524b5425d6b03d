//! Some of the calibration sequences on their way through a layer, at its owner or at an assistant.

use std::ops::Range;

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::outline::SublayerOutline;
use espalier_common::shares::shares;

use crate::calibrate::cache::Entry;
use crate::calibrate::capture::{Lane, capture_group, finish_layer};
use crate::calibrate::room::Room;
use crate::calibrate::tree::{Forest, Gatherer, LEAVES, Sampling};
use crate::model::DecoderLayer;
use crate::prune::Statistics;
use crate::run::Run;
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// What is summed of a group's inputs `columns` wide.
pub(crate) fn sampling(run: &Run, columns: usize) -> Sampling {
    let sequences = run.tokens.sequences();
    Sampling {
        columns,
        with_dense: run.method.solver.needs() >= Statistics::GramAndCross,
        sequences,
        calibrating: sequences - run.job.held_out_samples().min(sequences - 1),
        tokens: run.tokens.sequence_length(),
    }
}

/// Leaves of the owner and of each assistant: the faster has more, if there are sequences in each.
pub(crate) fn deal(speeds: &[f64], hands: usize, sequences: usize) -> Vec<usize> {
    let known = speeds.get(..hands).filter(|_| sequences >= LEAVES);
    known.map_or_else(|| shares(&vec![1.0; hands], LEAVES), |speeds| shares(speeds, LEAVES))
}

/// Brings the sequences of some leaves before a group and sums up its inputs; `constant` puts a 1 after each input.
pub(crate) fn gather_leaves(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    group: usize,
    members: &[SublayerOutline],
    (leaves, constant): (Range<usize>, bool),
    phases: &mut Phases,
) -> Result<Forest, TaskError> {
    let first = &members[0];
    let failed = |source| TaskError::Gram { tensor: first.tensor.clone(), source };
    let sampling = sampling(place.run, first.columns + usize::from(constant));
    let mut gatherer = Gatherer::new(sampling, leaves);
    let mut gram_seconds = 0.0;
    let watch = Stopwatch::start();
    let device = place.cache.device();
    capture_group(lanes, group, place.cache, place.control, |mut inputs| {
        // A device is asked to do things and does them later.
        device.synchronize()?;
        let watch = Stopwatch::start();
        if constant {
            inputs.iter_mut().flatten().try_for_each(append_constant)?;
        }
        let dense = inputs.get(1).filter(|_| sampling.with_dense);
        if device.is_cpu() {
            gatherer.add(&inputs[0], dense.map(Vec::as_slice)).map_err(failed)?;
        } else {
            let room = Room::of(place.cache);
            for (index, one) in inputs[0].chunks(1).enumerate() {
                room.make(|| gatherer.add(one, dense.map(|dense| &dense[index..=index])).map_err(failed))?;
            }
            device.synchronize()?;
        }
        gram_seconds += watch.seconds();
        Ok(())
    })?;
    let forward_seconds = watch.seconds() - gram_seconds;
    let watch = Stopwatch::start();
    let (forest, flops) = gatherer.finish().map_err(failed)?;
    phases.add("gram", gram_seconds + watch.seconds(), flops);
    // What ran to get here is the group before.
    phases.add("forward", forward_seconds, 0.0);
    Ok(forest)
}

/// `[tokens, in]` to `[tokens, in + 1]`, the last column being 1: its weight is a bias.
fn append_constant(inputs: &mut Tensor) -> Result<(), TaskError> {
    let ones = Tensor::ones((inputs.dim(0)?, 1), inputs.dtype(), inputs.device())?;
    *inputs = Tensor::cat(&[&*inputs, &ones], 1)?;
    Ok(())
}

/// A share: its leaves, and its sequences on their way. Lane 0 is the one that is pruned; lane 1, if the solver or a
/// reconstruction asks for it, stays dense beside it.
pub(crate) struct Share {
    leaves: Range<usize>,
    lanes: Vec<Lane>,
    /// Groups that it was brought before.
    reached: usize,
}

impl Share {
    /// The sequences of `leaves` before the layer: one copy of the layer, and the hidden states of each sequence, a stream.
    pub(crate) fn new(
        leaves: Range<usize>,
        streams: impl IntoIterator<Item = (Box<dyn DecoderLayer>, Vec<Entry>)>,
    ) -> Self {
        Self {
            leaves,
            lanes: streams.into_iter().map(|(layer, hidden)| Lane::new(layer, hidden)).collect(),
            reached: 0,
        }
    }

    pub(crate) fn leaves(&self) -> &Range<usize> {
        &self.leaves
    }

    pub(crate) fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    pub(crate) fn lanes_mut(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// The layer that is pruned, as far as it is.
    pub(crate) fn layer(&self) -> &dyn DecoderLayer {
        self.lanes[0].layer()
    }

    /// Brings the share before a group, from wherever it is, and sums up the group's inputs.
    pub(crate) fn gather(
        &mut self,
        place: &Workplace<'_>,
        group: usize,
        members: &[SublayerOutline],
        phases: &mut Phases,
    ) -> Result<Forest, TaskError> {
        if self.leaves.is_empty() {
            return Ok(Forest::default());
        }
        self.catch_up(place, group, phases)?;
        self.reached = group + 1;
        gather_leaves(place, &mut self.lanes, group, members, (self.leaves.clone(), false), phases)
    }

    /// Brings it before the group before `group`.
    fn catch_up(&mut self, place: &Workplace<'_>, group: usize, phases: &mut Phases) -> Result<(), TaskError> {
        let behind = std::mem::replace(&mut self.reached, group)..group;
        for group in behind {
            phases.time("forward", || capture_group(&mut self.lanes, group, place.cache, place.control, |_| Ok(())))?;
        }
        Ok(())
    }

    /// Puts a pruned weight into the layer.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub(crate) fn set_weight(&mut self, group: usize, member: usize, weight: Tensor) -> Result<(), TaskError> {
        Ok(self.lanes[0].layer_mut().set_weight(group, member, weight)?)
    }

    /// Runs what is left of the layer; returns its output, one stream a lane.
    pub(crate) fn finish(mut self, place: &Workplace<'_>, phases: &mut Phases) -> Result<Vec<Vec<Entry>>, TaskError> {
        let groups = self.layer().groups();
        self.catch_up(place, groups, phases)?;
        finish_layer(self.lanes, place.cache, place.control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_has_more_leaves_if_there_are_sequences_in_each() {
        assert_eq!(deal(&[300.0, 100.0], 2, 32), [6, 2]);
        assert_eq!(deal(&[300.0, 100.0], 2, 7), [4, 4]);
        // Of more speeds than hands the first count; of fewer, none.
        assert_eq!(deal(&[100.0, 300.0, 100.0], 2, 32), [2, 6]);
        assert_eq!(deal(&[100.0], 2, 32), [4, 4]);
    }
}
