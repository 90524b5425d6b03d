//! The hidden states that this worker holds: what units leave behind, and what other workers may fetch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use espalier_common::digest::Digest;
use espalier_common::ids::{Boundary, RunId};

use crate::calibrate::cache::Entry;

/// Hidden states `[tokens, hidden]` of every calibration sequence at one boundary.
#[derive(Debug, Clone)]
pub struct HiddenStates {
    /// Stream 0: corrected inputs (or the dense ones, in `dense` propagation); stream 1, if there is one: dense inputs.
    /// Each has one entry a sequence, in calibration order.
    pub streams: Vec<Vec<Entry>>,
}

/// Hidden states of some sequences at one boundary, by sequence: an entry a stream.
pub type ShareStates = BTreeMap<usize, Vec<Entry>>;

/// A share of a boundary, and the digest of the layer that it came of; of none at the boundary of the tokens.
type KeptShare = (Option<Digest>, ShareStates);

/// Boundaries held, by run: whole ones, and this worker's shares of some.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    held: Arc<Mutex<BTreeMap<(RunId, Boundary), HiddenStates>>>,
    shares: Arc<Mutex<BTreeMap<(RunId, Boundary), KeptShare>>>,
}

impl Holdings {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(RunId, Boundary), HiddenStates>> {
        // Every change is one call into the map, so there is no half-made one to fear.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shares(&self) -> MutexGuard<'_, BTreeMap<(RunId, Boundary), KeptShare>> {
        // As above: what is replaced is replaced whole.
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a share of a boundary that came of the layer `of`, beside what is kept of it already; what came of another attempt
    /// at that layer goes.
    pub fn keep(&self, run: &RunId, boundary: Boundary, of: Option<Digest>, states: ShareStates) {
        let mut shares = self.shares();
        let (came_of, kept) = shares.entry((run.clone(), boundary)).or_insert_with(|| (of, ShareStates::new()));
        if *came_of != of {
            (*came_of, *kept) = (of, ShareStates::new());
        }
        kept.extend(states);
    }

    /// What is kept of one sequence at a boundary, if it came of the layer `of`.
    pub fn kept(&self, run: &RunId, boundary: Boundary, of: Option<Digest>, sequence: usize) -> Option<Vec<Entry>> {
        let shares = self.shares();
        let (came_of, kept) = shares.get(&(run.clone(), boundary))?;
        (*came_of == of).then(|| kept.get(&sequence).cloned()).flatten()
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

    /// Drops the boundaries of `run` that `unwanted` names, and shares of them.
    pub fn release(&self, run: &RunId, unwanted: impl Fn(Boundary) -> bool) {
        let stays = |(held, boundary): &(RunId, Boundary)| held != run || !unwanted(*boundary);
        self.lock().retain(|key, _| stays(key));
        self.shares().retain(|key, _| stays(key));
    }

    /// Drops everything that is not of `run`.
    pub fn keep_only(&self, run: &RunId) {
        self.lock().retain(|(held, _), _| held == run);
        self.shares().retain(|(held, _), _| held == run);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::calibrate::cache::ActivationCache;

    #[test]
    fn a_share_is_kept_of_one_layer_and_given_for_no_other() {
        let cache = ActivationCache::new(1 << 10, std::env::temp_dir());
        let states = |sequences: &[usize]| -> ShareStates {
            let entry = || cache.put(Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap()).unwrap();
            sequences.iter().map(|&sequence| (sequence, vec![entry()])).collect()
        };
        let (holdings, run) = (Holdings::default(), RunId("r".to_owned()));
        let (first, second) = (Some(Digest::of(b"first")), Some(Digest::of(b"second")));
        let kept = |of| -> Vec<usize> {
            (0..4).filter(|&sequence| holdings.kept(&run, Boundary(1), of, sequence).is_some()).collect()
        };
        holdings.keep(&run, Boundary(1), first, states(&[0, 1]));
        holdings.keep(&run, Boundary(1), first, states(&[3]));
        assert_eq!((kept(first), kept(second), kept(None)), (vec![0, 1, 3], vec![], vec![]));
        holdings.keep(&run, Boundary(1), second, states(&[2]));
        assert_eq!((kept(first), kept(second)), (vec![], vec![2]));
        holdings.release(&run, |boundary| boundary == Boundary(1));
        assert_eq!((kept(second), cache.held_bytes()), (vec![], (0, 0)));
    }
}
