//! The end of a shared layer: what is left of it is run on all sequences, and its output comes back or stays where it is.

use std::ops::Range;

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::digest::Digest;
use espalier_common::ids::Boundary;
use espalier_common::report::Artifact;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::Crew;
use super::share::Share;
use crate::boundary;
use crate::calibrate::cache::Entry;
use crate::calibrate::tree::sequences_of;
use crate::holdings::HiddenStates;
use crate::keeping::by_sequence;
use crate::model::DecoderLayer;
use crate::transport::Outgoing;
use crate::transport::parcel::numbers;
use crate::unit::{Phases, TaskError};

/// Hexadecimal digits of a digest.
pub(super) const DIGEST_DIGITS: usize = 64;

impl Crew<'_> {
    /// Lets assistants run what is left of the layer; one of the ways to finish is next.
    pub(crate) fn send_off(&mut self) {
        self.send_all(|| Outgoing::of(Matter::Finish(pb::Finish {})));
    }

    /// Runs what is left of the layer on all sequences; returns the layer's output.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub(crate) fn finish(&mut self, phases: &mut Phases) -> Result<HiddenStates, TaskError> {
        let (place, device) = (self.place, &self.place.run.device);
        let sequences = place.run.tokens.sequences();
        self.adopt(phases)?;
        let streams = self.input.streams();
        let mut output: Vec<Vec<Option<Entry>>> = vec![vec![None; sequences]; streams];
        let (watch, own) = (Stopwatch::start(), self.own_leaves());
        // An assistant that is given up on from here on leaves its share to a layer that is pruned, and so it can be run again.
        let layers: Vec<Box<dyn DecoderLayer>> =
            self.shares[0].lanes().iter().map(|lane| lane.layer().share()).collect();
        let run = |share: Share, output: &mut [Vec<Option<Entry>>], phases: &mut Phases| {
            let range = sequences_of(share.leaves(), sequences);
            for (stream, entries) in share.finish(place, phases)?.into_iter().enumerate() {
                range.clone().zip(entries).for_each(|(sequence, entry)| output[stream][sequence] = Some(entry));
            }
            Ok::<_, TaskError>(())
        };
        for share in std::mem::take(&mut self.shares) {
            run(share, &mut output, phases)?;
        }
        let seconds = watch.seconds();
        phases.add("forward", seconds, 0.0);
        let shape = (place.run.tokens.sequence_length(), place.run.model.decoder.hidden_size());
        let ranges: Vec<Range<usize>> =
            self.assistants.iter().map(|one| sequences_of(&one.leaves, sequences)).collect();
        let missing = ranges.iter().map(|range| range.len() * streams).collect();
        let mut failed = None;
        self.collect((own, seconds), (missing, true), |number, matter, body| {
            let Matter::Output(pb::Hidden { stream, sequence }) = matter else { return false };
            let (stream, sequence) = (stream as usize, sequence as usize);
            if !ranges[number].contains(&sequence) || output[stream][sequence].is_some() {
                return false;
            }
            place.received(body.len() as u64);
            let kept = Tensor::from_vec(numbers::<f32>(&body).into_owned(), shape, device)
                .map_err(TaskError::from)
                .and_then(|hidden| Ok(place.cache.put(hidden)?));
            match kept {
                Ok(entry) => output[stream][sequence] = Some(entry),
                Err(error) => failed = Some(error),
            }
            true
        })?;
        failed.map_or(Ok(()), Err)?;
        self.take_waiting().book(phases);
        for number in (0..self.assistants.len()).filter(|&number| !self.is_there(number)) {
            let leaves = self.assistants[number].leaves.clone();
            // Shares that were adopted before are there already.
            if ranges[number].clone().all(|sequence| output.iter().all(|stream| stream[sequence].is_some())) {
                continue;
            }
            let adopted = self.input.share(place, self.layer, leaves, |stream| layers[stream].share(), phases)?;
            run(adopted, &mut output, phases)?;
        }
        let whole = |stream: Vec<Option<Entry>>| {
            stream.into_iter().map(|entry| entry.expect("every share was finished by somebody")).collect()
        };
        Ok(HiddenStates { streams: output.into_iter().map(whole).collect() })
    }

    /// Runs what is left of the layer on the owner's shares, while assistants do so on theirs, and lets everyone keep what
    /// comes of it beside the layer's digest. Returns the layer's output in the run's store, if it `stores` that.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub(crate) fn keep(
        &mut self,
        artifact: &Artifact,
        stores: bool,
        phases: &mut Phases,
    ) -> Result<Option<Artifact>, TaskError> {
        let sequences = self.place.run.tokens.sequences();
        let told = pb::Keep { layer_sha256: artifact.sha256.to_string(), stores };
        self.send_all(|| Outgoing::of(Matter::Keep(told.clone())));
        let layers: Vec<Box<dyn DecoderLayer>> =
            self.shares[0].lanes().iter().map(|lane| lane.layer().share()).collect();
        let mut stored: Vec<Vec<Option<Digest>>> = vec![vec![None; sequences]; self.input.streams()];
        let (watch, own) = (Stopwatch::start(), self.own_leaves());
        for share in std::mem::take(&mut self.shares) {
            self.keep_own(share, artifact, stores.then_some(&mut stored), phases)?;
        }
        let seconds = watch.seconds();
        let ranges: Vec<Range<usize>> =
            self.assistants.iter().map(|one| sequences_of(&one.leaves, sequences)).collect();
        let missing = vec![1; self.assistants.len()];
        self.collect((own, seconds), (missing, true), |number, matter, body| {
            let Matter::Keeping(answer) = matter else { return false };
            let digests = if stores { digests_of(&body, &ranges[number], stored.len()) } else { Some(Vec::new()) };
            let Some(digests) = digests else { return false };
            for (stream, of_stream) in stored.iter_mut().zip(digests) {
                ranges[number].clone().zip(of_stream).for_each(|(sequence, digest)| stream[sequence] = Some(digest));
            }
            answer == told
        })?;
        self.take_waiting().book(phases);
        if !stores {
            // What an assistant that is gone did not keep is made again by whoever gets its share.
            return Ok(None);
        }
        for (number, range) in ranges.iter().enumerate() {
            if range.clone().any(|sequence| stored.iter().any(|stream| stream[sequence].is_none())) {
                let leaves = self.assistants[number].leaves.clone();
                let layer = |stream: usize| layers[stream].share();
                let adopted = self.input.share(self.place, self.layer, leaves, layer, phases)?;
                self.keep_own(adopted, artifact, Some(&mut stored), phases)?;
            }
        }
        let whole = |stream: Vec<Option<Digest>>| {
            stream.into_iter().map(|digest| digest.expect("every share was stored by somebody")).collect()
        };
        let streams = stored.into_iter().map(whole).collect();
        let listed = phases.time("store", || boundary::list(self.place, Boundary(self.layer.0 + 1), streams))?;
        Ok(Some(listed))
    }

    /// Finishes a share of the owner's and keeps its output; stores it too if there is somewhere to note what it is named by.
    fn keep_own(
        &self,
        share: Share,
        artifact: &Artifact,
        stored: Option<&mut Vec<Vec<Option<Digest>>>>,
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        let (place, next) = (self.place, Boundary(self.layer.0 + 1));
        let range = sequences_of(share.leaves(), place.run.tokens.sequences());
        let watch = Stopwatch::start();
        let output = share.finish(place, phases)?;
        phases.add("forward", watch.seconds(), 0.0);
        if let Some(stored) = stored {
            let streams: Vec<&[Entry]> = output.iter().map(Vec::as_slice).collect();
            let digests = phases.time("store", || boundary::put(place, next, &streams))?;
            for (stream, digests) in stored.iter_mut().zip(digests) {
                range.clone().zip(digests).for_each(|(sequence, digest)| stream[sequence] = Some(digest));
            }
        }
        place.holdings.keep(&place.run.id, next, Some(artifact.sha256), by_sequence(range, output));
        Ok(())
    }
}

/// What an assistant's stored output is named by, stream by stream; `None` if those are no digests. Their number is that of the
/// body, which was checked.
fn digests_of(body: &[u8], range: &Range<usize>, streams: usize) -> Option<Vec<Vec<Digest>>> {
    let digest = |digits: &[u8]| Digest::try_from(String::from_utf8(digits.to_vec()).ok()?).ok();
    let all: Vec<Digest> = body.chunks(DIGEST_DIGITS).map(digest).collect::<Option<_>>()?;
    let of_stream = |stream: usize| all.get(stream * range.len()..(stream + 1) * range.len()).map(<[Digest]>::to_vec);
    (0..streams).map(of_stream).collect()
}
