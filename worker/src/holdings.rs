//! The hidden states that this worker holds: what units leave behind, and what other workers may fetch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use espalier_common::ids::{Boundary, RunId};

use crate::calibrate::cache::Entry;

/// Hidden states `[tokens, hidden]` of every calibration sequence at one boundary.
#[derive(Debug, Clone)]
pub struct HiddenStates {
    /// Stream 0: corrected inputs (or the dense ones, in `dense` propagation); stream 1, if there is one: dense inputs.
    /// Each has one entry a sequence, in calibration order.
    pub streams: Vec<Vec<Entry>>,
}

/// Boundaries held, by run.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    held: Arc<Mutex<BTreeMap<(RunId, Boundary), HiddenStates>>>,
}

impl Holdings {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(RunId, Boundary), HiddenStates>> {
        // Every change is one call into the map, so there is no half-made one to fear.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a boundary until it is released.
    pub fn hold(&self, run: &RunId, boundary: Boundary, states: HiddenStates) {
        self.lock().insert((run.clone(), boundary), states);
    }

    /// A boundary's hidden states, if they are held. They share their space with what is held.
    pub fn get(&self, run: &RunId, boundary: Boundary) -> Option<HiddenStates> {
        self.lock().get(&(run.clone(), boundary)).cloned()
    }

    /// Boundaries held for a run, ascending.
    pub fn boundaries(&self, run: &RunId) -> Vec<Boundary> {
        self.lock().keys().filter(|(held, _)| held == run).map(|&(_, boundary)| boundary).collect()
    }

    /// Drops the boundaries of `run` that `unwanted` names.
    pub fn release(&self, run: &RunId, unwanted: impl Fn(Boundary) -> bool) {
        self.lock().retain(|(held, boundary), _| held != run || !unwanted(*boundary));
    }

    /// Drops everything that is not of `run`.
    pub fn keep_only(&self, run: &RunId) {
        self.lock().retain(|(held, _), _| held == run);
    }
}
