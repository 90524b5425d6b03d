//! Runs every calibration sequence through a layer, group by group, and hands each group's inputs to the gram once.

use candle_core::{Device, Tensor};

use super::cache::{ActivationCache, Entry};
use super::room::Room;
use crate::device::in_order;
use crate::model::{Carry, DecoderLayer};
use crate::unit::{TaskError, UnitControl};

/// Where one sequence of one stream is inside a layer; its tensors are in the cache.
#[derive(Clone)]
enum Position {
    /// Before the layer: its hidden states.
    Outside(Entry),
    /// Before a group.
    Before { residual: Entry, input: Entry },
}

/// One stream of all sequences on its way through one copy of a layer.
pub struct Lane {
    layer: Box<dyn DecoderLayer>,
    positions: Vec<Position>,
}

impl Lane {
    /// All sequences before the layer's first group.
    pub fn new(layer: Box<dyn DecoderLayer>, hidden: Vec<Entry>) -> Self {
        Self { layer, positions: hidden.into_iter().map(Position::Outside).collect() }
    }

    /// The layer, to read its weights.
    pub fn layer(&self) -> &dyn DecoderLayer {
        &*self.layer
    }

    /// Where the sequences are.
    pub fn mark(&self) -> Mark {
        Mark(self.positions.clone())
    }

    /// Takes the sequences back to where they were.
    pub fn rewind(&mut self, mark: Mark) {
        self.positions = mark.0;
    }

    /// The layer, to put weights in.
    pub fn layer_mut(&mut self) -> &mut dyn DecoderLayer {
        &mut *self.layer
    }
}

/// Where a lane stood before a group. It keeps what is there, so that the lane can go back.
pub struct Mark(Vec<Position>);

impl Mark {
    /// Residual stream `[tokens, hidden]` and the group's input `[tokens, in]` of each sequence.
    pub fn entries(&self) -> impl Iterator<Item = (&Entry, &Entry)> {
        self.0.iter().map(|position| match position {
            Position::Before { residual, input } => (residual, input),
            Position::Outside(hidden) => (hidden, hidden),
        })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Brings one sequence before `group`; returns where it is, and the group's input.
fn advance(
    layer: &dyn DecoderLayer,
    group: usize,
    position: Position,
    cache: &ActivationCache,
) -> Result<(Position, Tensor), TaskError> {
    let room = Room::of(cache);
    let carry = match position {
        Position::Outside(hidden) => {
            let hidden = hidden.take()?;
            room.make(|| Ok(layer.begin(&hidden)?))?
        }
        Position::Before { residual, input } => {
            let carry = Carry { residual: residual.take()?, input: input.take()? };
            room.advance(layer, group - 1, carry)?
        }
    };
    let input = carry.input.clone();
    let (residual, held) = (cache.put(carry.residual)?, cache.put(carry.input)?);
    Ok((Position::Before { residual, input: held }, input))
}

/// Brings all sequences of all lanes before `group`, a batch at a time in parallel; `sink` gets each batch in calibration
/// order: the inputs `[tokens, in]` of each lane.
///
/// # Errors
/// `Cancelled`, and whatever the layer, the cache or `sink` says.
pub fn capture_group(
    lanes: &mut [Lane],
    group: usize,
    cache: &ActivationCache,
    control: &UnitControl,
    mut sink: impl FnMut(Vec<Vec<Tensor>>) -> Result<(), TaskError>,
) -> Result<(), TaskError> {
    let mut waiting: Vec<_> = lanes.iter_mut().map(|lane| std::mem::take(&mut lane.positions).into_iter()).collect();
    let total = waiting.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    let mut start = 0;
    while start < total {
        control.check_cancelled()?;
        let batch = batch_size(cache);
        let mut inputs = Vec::with_capacity(lanes.len());
        for (lane, waiting) in lanes.iter_mut().zip(&mut waiting) {
            let positions: Vec<Position> = waiting.by_ref().take(batch).collect();
            let layer = &*lane.layer;
            let step = |position| advance(layer, group, position, cache);
            let moved = in_order(cache.device(), positions, step)?;
            let (positions, batch_inputs): (Vec<_>, Vec<_>) = moved.into_iter().unzip();
            lane.positions.extend(positions);
            inputs.push(batch_inputs);
        }
        sink(inputs)?;
        start = (start + batch).min(total);
        control.set_progress("capture", start, total);
    }
    Ok(())
}

/// Sequences that are taken a step further before their inputs are used: one a compute thread; on another device as many as
/// its memory was found to hold.
fn batch_size(cache: &ActivationCache) -> usize {
    if cache.device().is_cpu() { rayon::current_num_threads() } else { cache.micro_batch() }
}

/// Runs the last group of every lane; returns the layer's outputs, one stream a lane.
///
/// # Errors
/// `Cancelled`, and whatever the layer or the cache says.
pub fn finish_layer(
    lanes: Vec<Lane>,
    cache: &ActivationCache,
    control: &UnitControl,
) -> Result<Vec<Vec<Entry>>, TaskError> {
    let finish = |lane: Lane| {
        let (layer, last) = (&*lane.layer, lane.layer.groups() - 1);
        map_batches(lane.positions, cache.device(), control, "forward", |position| match position {
            Position::Before { residual, input } => {
                let carry = Carry { residual: residual.take()?, input: input.take()? };
                Ok(cache.put(Room::of(cache).advance(layer, last, carry)?.input)?)
            }
            Position::Outside(hidden) => through(layer, hidden, cache),
        })
    };
    lanes.into_iter().map(finish).collect()
}

/// Runs a whole layer on all sequences of one stream.
///
/// # Errors
/// `Cancelled`, and whatever the layer or the cache says.
pub fn forward_layer(
    layer: &dyn DecoderLayer,
    hidden: Vec<Entry>,
    cache: &ActivationCache,
    control: &UnitControl,
) -> Result<Vec<Entry>, TaskError> {
    map_batches(hidden, cache.device(), control, "forward", |entry: Entry| through(layer, entry, cache))
}

/// Runs a whole layer on one sequence.
fn through(layer: &dyn DecoderLayer, hidden: Entry, cache: &ActivationCache) -> Result<Entry, TaskError> {
    let hidden = hidden.take()?;
    let output = Room::of(cache).make(|| Ok(layer.forward(&hidden)?))?;
    drop(hidden);
    Ok(cache.put(output)?)
}

/// Maps items, a batch at a time, as [`in_order`] does, until cancelled.
///
/// # Errors
/// `Cancelled`, or the first error of a batch.
pub fn map_batches<I: Send, T: Send>(
    items: Vec<I>,
    device: &Device,
    control: &UnitControl,
    phase: &'static str,
    work: impl Fn(I) -> Result<T, TaskError> + Sync,
) -> Result<Vec<T>, TaskError> {
    let (total, batch) = (items.len(), rayon::current_num_threads());
    let mut items = items.into_iter();
    let mut results = Vec::with_capacity(total);
    while results.len() < total {
        control.check_cancelled()?;
        let next: Vec<I> = items.by_ref().take(batch).collect();
        results.extend(in_order(device, next, &work)?);
        control.set_progress(phase, results.len(), total);
    }
    Ok(results)
}
