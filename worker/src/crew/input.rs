//! The hidden states before a shared layer: all of them at its owner, who lends shares; or each share at whoever keeps it.

use std::ops::Range;

use espalier_common::ids::LayerIndex;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::share::Share;
use crate::calibrate::tree::sequences_of;
use crate::holdings::HiddenStates;
use crate::keeping::Keeping;
use crate::model::DecoderLayer;
use crate::source::Workplace;
use crate::transport::Outgoing;
use crate::transport::parcel::Body;
use crate::unit::{Phases, TaskError};

/// Where a crew has the input of its layer from.
pub(crate) enum Input {
    /// The owner has all of it (strategy `layers`).
    Lent(HiddenStates),
    /// Everyone has a share, of so many streams, or makes it (strategy `data`, or committed layers to run through first).
    Kept(Keeping, usize),
}

impl Input {
    /// Streams of hidden states.
    pub(super) fn streams(&self) -> usize {
        match self {
            Self::Lent(states) => states.streams.len(),
            Self::Kept(_, streams) => *streams,
        }
    }

    /// Layers that whoever has no share yet must run it through first.
    pub(super) fn behind(&self) -> usize {
        match self {
            Self::Lent(_) => 0,
            Self::Kept(keeping, _) => keeping.behind(),
        }
    }

    /// What an assistant is told of a share that it has or makes.
    pub(super) fn told(&self) -> Option<pb::KeptShare> {
        match self {
            Self::Lent(_) => None,
            Self::Kept(Keeping { source, predecessor, given_back }, _) => {
                let predecessor = predecessor.clone().map(Into::into);
                Some(pb::KeptShare { source: Some(source.clone().into()), predecessor, given_back: *given_back })
            }
        }
    }

    /// The letters that lend some sequences, stream by stream.
    pub(super) fn lent(&self, sequences: Range<usize>) -> Vec<Outgoing> {
        let Self::Lent(states) = self else { return Vec::new() };
        let letter = |stream: usize, sequence: usize| Outgoing {
            matter: Matter::Hidden(pb::Hidden { stream: stream as u32, sequence: sequence as u32 }),
            body: Body::States(states.streams[stream][sequence].clone()),
        };
        let of_stream = |stream: usize| sequences.clone().map(move |sequence| letter(stream, sequence));
        (0..states.streams.len()).flat_map(of_stream).collect()
    }

    /// The sequences of some leaves before the layer, each stream with its copy of it.
    ///
    /// # Errors
    /// If shares are kept: what making one says, see [`TaskError`].
    pub(super) fn share(
        &self,
        place: &Workplace<'_>,
        layer: LayerIndex,
        leaves: Range<usize>,
        copy: impl Fn(usize) -> Box<dyn DecoderLayer>,
        phases: &mut Phases,
    ) -> Result<Share, TaskError> {
        let range = sequences_of(&leaves, place.run.tokens.sequences());
        let streams = match self {
            Self::Lent(states) => states.streams.iter().map(|entries| entries[range.clone()].to_vec()).collect(),
            Self::Kept(keeping, _) => place.kept_input(layer, keeping, range, phases)?,
        };
        let copied = streams.into_iter().enumerate().map(|(stream, entries)| (copy(stream), entries));
        Ok(Share::new(leaves, copied.collect::<Vec<_>>()))
    }
}
