//! A worker's own share of the hidden states before a layer: kept since the layer before it, which is the strategy `data`, or made
//! again, which `layers` too has done by all where committed layers lie between.
//!
//! A share is kept with the digest of the layer that it came of, and used only where that is what the run has committed. So what
//! an attempt left behind whose layer was never committed is no input of anything, whoever died meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;

use espalier_common::digest::Digest;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::report::Artifact;
use espalier_common::wire::{Source, SourceFrom};

use crate::calibrate::cache::Entry;
use crate::holdings::{HiddenStates, ShareStates};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Where the shares of a layer's input come from, whoever needs one.
#[derive(Debug, Clone)]
pub struct Keeping {
    /// What a share is made from that was not kept: the tokens or the run's store, and committed layers.
    pub source: Source,
    /// What the layer before became, if there is one.
    pub predecessor: Option<Artifact>,
    /// Whether what comes of a share goes back to the layer's owner and nothing is kept: shares are made by whoever helps only
    /// because committed layers lie between the layer and what there is (strategy `layers`).
    pub given_back: bool,
}

impl Keeping {
    /// Committed layers that a share which was not kept has to be run through.
    pub fn behind(&self) -> usize {
        self.source.replay.len()
    }

    /// What a share of the input of `layer` has come of.
    pub fn origin(&self) -> Option<Digest> {
        self.predecessor.as_ref().map(|artifact| artifact.sha256)
    }

    /// What a share of a boundary between the source and `layer` must have come of; `None` where that is not known.
    fn origin_at(&self, boundary: u32, layer: LayerIndex) -> Option<Option<Digest>> {
        if boundary == layer.0 {
            return Some(self.origin());
        }
        let made_by = boundary.checked_sub(self.source.boundary().0 + 1)?;
        self.source.replay.get(made_by as usize).map(|artifact| Some(artifact.sha256))
    }
}

/// Sequence by sequence what is there stream by stream.
pub(crate) fn by_sequence(sequences: impl IntoIterator<Item = usize>, streams: Vec<Vec<Entry>>) -> ShareStates {
    let mut streams: Vec<_> = streams.into_iter().map(Vec::into_iter).collect();
    let states = |sequence| (sequence, streams.iter_mut().filter_map(Iterator::next).collect());
    sequences.into_iter().map(states).collect()
}

/// Stream by stream what is there sequence by sequence.
fn by_stream(states: ShareStates, streams: usize) -> Vec<Vec<Entry>> {
    let mut by_stream = vec![Vec::with_capacity(states.len()); streams];
    for entries in states.into_values() {
        by_stream.iter_mut().zip(entries).for_each(|(stream, entry)| stream.push(entry));
    }
    by_stream
}

impl Workplace<'_> {
    /// Lets go of the boundaries before a layer whose share is there: the layers up to it are committed, and nobody begins
    /// earlier again.
    pub(crate) fn let_go_before(&self, layer: LayerIndex) {
        self.holdings.release(&self.run.id, |boundary| boundary.0 < layer.0);
    }

    /// The hidden states of some sequences before `layer`, stream by stream. Each sequence begins at the last boundary at which
    /// it was kept, or where the source does, and is kept before `layer` from now on unless it is to be given back.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub(crate) fn kept_input(
        &self,
        layer: LayerIndex,
        keeping: &Keeping,
        sequences: Range<usize>,
        phases: &mut Phases,
    ) -> Result<Vec<Vec<Entry>>, TaskError> {
        let (source, start) = (&keeping.source, keeping.source.boundary());
        let wrong = || TaskError::WrongSource { boundary: start, replayed: source.replay.len(), layer };
        if layer.0.checked_sub(start.0) != u32::try_from(source.replay.len()).ok() {
            return Err(wrong());
        }
        let (mut kept, mut missing): (BTreeMap<u32, ShareStates>, Vec<usize>) = (BTreeMap::new(), Vec::new());
        for sequence in sequences {
            let found = (start.0..=layer.0).rev().find_map(|boundary| {
                let of = keeping.origin_at(boundary, layer)?;
                Some((boundary, self.holdings.kept(&self.run.id, Boundary(boundary), of, sequence)?))
            });
            match found {
                Some((boundary, states)) => drop(kept.entry(boundary).or_default().insert(sequence, states)),
                None => missing.push(sequence),
            }
        }
        let mut states = ShareStates::new();
        if !missing.is_empty() {
            let began = match &source.from {
                SourceFrom::Tokens => self.embed(&missing, phases)?,
                SourceFrom::Stored { boundary, artifact } => {
                    self.read_stored((*boundary, artifact), &missing, phases)?
                }
                SourceFrom::Held(_) | SourceFrom::Peer { .. } => return Err(wrong()),
            };
            tracing::info!(%layer, boundary = %start, sequences = missing.len(), "a share that is not kept is made");
            states = by_sequence(missing, began.streams);
        }
        for (step, index) in (start.0..layer.0).enumerate() {
            states.extend(kept.remove(&index).unwrap_or_default());
            if states.is_empty() {
                continue;
            }
            let sequences: Vec<usize> = states.keys().copied().collect();
            let before = HiddenStates { streams: by_stream(states, self.streams()) };
            let after = self.replay(LayerIndex(index), source.replay.get(step), before, phases)?;
            states = by_sequence(sequences, after.streams);
        }
        states.extend(kept.remove(&layer.0).unwrap_or_default());
        if !keeping.given_back {
            self.holdings.keep(&self.run.id, Boundary(layer.0), keeping.origin(), states.clone());
        }
        Ok(by_stream(states, self.streams()))
    }
}
