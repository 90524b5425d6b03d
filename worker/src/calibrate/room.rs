//! What happens when a device has no memory left: hidden states move to the host, and the step is done again.
//!
//! A step of one sequence changes nothing but its own result, so it can be repeated. Each shortage also halves the number of
//! sequences that are under way at a time from then on. All of it is logged and counted.

use espalier_common::clock::Stopwatch;

use super::cache::ActivationCache;
use super::gram::GramError;
use crate::device::memory::is_out_of_memory;
use crate::model::{Carry, DecoderLayer, ModelError};
use crate::unit::TaskError;

/// Steps with the room they need.
pub struct Room<'a> {
    cache: &'a ActivationCache,
}

impl<'a> Room<'a> {
    /// Room that the tensors of a cache can give.
    pub fn of(cache: &'a ActivationCache) -> Self {
        Self { cache }
    }

    /// Runs a group of a layer on one sequence.
    ///
    /// # Errors
    /// What the layer says; on a device without memory, once there is nothing left to move.
    pub fn advance(&self, layer: &dyn DecoderLayer, group: usize, carry: Carry) -> Result<Carry, TaskError> {
        if self.cache.device().is_cpu() {
            // Nothing is held on to that the step could let go of.
            return Ok(layer.advance(group, carry)?);
        }
        self.make(|| Ok(layer.advance(group, carry.clone())?))
    }

    /// Does a step, again with more room each time that the device has no memory for it.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn make<T>(&self, mut step: impl FnMut() -> Result<T, TaskError>) -> Result<T, TaskError> {
        loop {
            let error = match step() {
                Err(error) if is_shortage(&error) => error,
                done => return done,
            };
            let watch = Stopwatch::start();
            let moved = self.cache.make_room()?;
            let batch = self.cache.note_shortage(watch.seconds());
            if moved == 0 {
                return Err(error);
            }
            tracing::warn!(moved_bytes = moved, batch, "the device has no memory left: hidden states move to the host");
        }
    }
}

/// Whether a step failed because the device had no memory left.
fn is_shortage(error: &TaskError) -> bool {
    match error {
        TaskError::Model(ModelError::Backend(error))
        | TaskError::Backend(error)
        | TaskError::Gram { source: GramError::Backend(error), .. } => is_out_of_memory(error),
        _ => false,
    }
}
