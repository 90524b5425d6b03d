//! A unit's input hidden states: embedded, held, or fetched, and then run through the layers in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_common::checkpoint::{CheckpointError, Dtype};
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::job::Propagation;
use espalier_common::outline::{LayerOutline, SublayerOutline};
use espalier_common::report::Artifact;
use espalier_common::wire::{Source, SourceFrom};
use espalier_gate::Dialer;
use tokio::runtime::Handle;

use crate::apply::{apply_layer, apply_named};
use crate::artifact;
use crate::boundary;
use crate::calibrate::cache::{ActivationCache, Entry};
use crate::calibrate::capture::{forward_layer, map_batches};
use crate::crew::Paces;
use crate::cut_task::cut_tensors;
use crate::holdings::{HiddenStates, Holdings};
use crate::model::DecoderLayer;
use crate::prune::{GroupSolver, InputStats, SolveError, Statistics};
use crate::run::Run;
use crate::transport::{Expected, Joining, Remote, fetch};
use crate::unit::{Phases, TaskError, UnitControl};

/// What a unit works with.
pub struct Workplace<'a> {
    /// The run.
    pub run: &'a Run,
    /// The unit's handle.
    pub control: &'a UnitControl,
    /// Where hidden states are kept.
    pub cache: &'a ActivationCache,
    /// Boundaries held.
    pub holdings: &'a Holdings,
    /// The runtime that fetches.
    pub runtime: &'a Handle,
    /// How other workers are called.
    pub peers: &'a Dialer,
    /// What can join this worker with another besides their stream, if anything can.
    pub joining: Option<&'a Arc<Joining>>,
    /// What an assistant may take at least before it is given up on.
    pub patience: Duration,
    /// Bytes received from peers so far.
    pub bytes_received: &'a AtomicU64,
    /// How fast assistants were.
    pub paces: &'a Paces,
    /// Whether the unit looks at the dense model before anything is pruned: on fewer sequences, and on dense inputs whatever
    /// the job's propagation.
    pub is_survey: bool,
}

impl Workplace<'_> {
    /// Counts bytes that came from a peer.
    pub fn received(&self, bytes: u64) {
        self.bytes_received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether layers are calibrated on what their pruned predecessors give.
    pub fn is_chain(&self) -> bool {
        !self.is_survey && self.run.job.propagation.mode == Propagation::Pruned
    }

    /// Calibration sequences whose hidden states are carried along: the first ones.
    pub fn sequences(&self) -> usize {
        let all = self.run.tokens.sequences();
        if self.is_survey { self.run.job.survey_samples().min(all) } else { all }
    }

    /// Whether the solver compares corrected with dense inputs.
    pub fn needs_cross(&self) -> bool {
        self.run.method.solver.needs() >= Statistics::GramAndCross
    }

    /// Whether the dense stream must run beside the corrected one.
    pub fn needs_dense(&self) -> bool {
        self.needs_cross() || self.run.method.reconstruct.is_some()
    }

    /// Makes the solver ready: on the worker's device if the method can be solved there, else for the host.
    ///
    /// # Errors
    /// See [`SolveError`].
    pub fn prepare_solver(&self, stats: Arc<InputStats>) -> Result<Box<dyn GroupSolver>, SolveError> {
        let (solver, ctx) = (&self.run.method.solver, self.control.solve_ctx());
        match solver.on_device().filter(|_| !self.run.device.is_cpu()) {
            Some(there) => there.prepare_on(stats, &self.run.device, &ctx),
            None => solver.prepare(stats, &ctx),
        }
    }

    /// The phase on which solving is booked: a worker with a GPU tells what it solves on the host.
    pub fn solve_phase(&self, solves_on_device: bool) -> &'static str {
        if solves_on_device || self.run.device.is_cpu() { "solve" } else { "solve-host" }
    }

    /// Streams of a boundary: the dense one rides along only where it differs from the corrected one.
    pub fn streams(&self) -> usize {
        if self.is_chain() && self.needs_dense() { 2 } else { 1 }
    }

    /// The hidden states before `layer`, which are held from now on.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub fn input(&self, layer: LayerIndex, source: &Source, phases: &mut Phases) -> Result<HiddenStates, TaskError> {
        let start = source.boundary();
        let wrong = || TaskError::WrongSource { boundary: start, replayed: source.replay.len(), layer };
        let between = layer.0.checked_sub(start.0).ok_or_else(wrong)? as usize;
        let expected = if self.is_chain() { between } else { 0 };
        if source.replay.len() != expected {
            return Err(wrong());
        }
        let mut states = match &source.from {
            SourceFrom::Tokens => self.embed(&self.all_sequences(), phases)?,
            SourceFrom::Held(boundary) => self
                .holdings
                .get(&self.run.id, *boundary)
                .filter(|states| states.streams.len() == self.streams())
                .ok_or(TaskError::NotHeld { boundary: *boundary })?,
            SourceFrom::Peer { endpoint, boundary } => self.fetch(endpoint, *boundary, phases)?,
            SourceFrom::Stored { boundary, artifact } => {
                self.read_stored((*boundary, artifact), &self.all_sequences(), phases)?
            }
        };
        for (step, index) in (start.0..layer.0).enumerate() {
            let committed = source.replay.get(step);
            states = self.replay(LayerIndex(index), committed, states, phases)?;
        }
        self.holdings.hold(&self.run.id, Boundary(layer.0), states.clone());
        Ok(states)
    }

    /// The weights of a layer, dense.
    ///
    /// # Errors
    /// `Model`.
    pub fn load(&self, layer: LayerIndex, phases: &mut Phases) -> Result<Box<dyn DecoderLayer>, TaskError> {
        let Run { model, ahead, .. } = self.run;
        Ok(phases.time("load", || ahead.take(&*model.decoder, layer))?)
    }

    /// Begins to read the weights of the layer that comes next in a chain: whoever has a part in a layer mostly has one in that. Who
    /// has none keeps them until it loads another layer or evaluates.
    pub fn read_ahead(&self, layer: LayerIndex) {
        if self.is_chain() {
            self.run.ahead.read_after(&self.run.model.decoder, layer);
        }
    }

    fn all_sequences(&self) -> Vec<usize> {
        (0..self.sequences()).collect()
    }

    pub(crate) fn read_stored(
        &self,
        stored: (Boundary, &Artifact),
        sequences: &[usize],
        phases: &mut Phases,
    ) -> Result<HiddenStates, TaskError> {
        let states = phases.time("load", || boundary::read(self, stored, self.expected(), sequences))?;
        tracing::info!(boundary = %stored.0, sequences = sequences.len(), "hidden states read from the store");
        Ok(states)
    }

    pub(crate) fn embed(&self, sequences: &[usize], phases: &mut Phases) -> Result<HiddenStates, TaskError> {
        let tokens = &self.run.tokens;
        let embed = |sequence| {
            let hidden = self.run.model.decoder.embed(tokens.sequence(sequence))?;
            Ok(self.cache.put(hidden)?)
        };
        let stream: Vec<Entry> = phases
            .time("load", || map_batches(sequences.to_vec(), self.cache.device(), self.control, "embed", embed))?;
        // Before the first layer nothing is pruned, so the streams are the same; they share their tensors.
        Ok(HiddenStates { streams: vec![stream; self.streams()] })
    }

    /// What the hidden states of any boundary look like.
    fn expected(&self) -> Expected {
        Expected {
            streams: self.streams(),
            sequences: self.sequences(),
            tokens: self.run.tokens.sequence_length(),
            hidden: self.run.model.decoder.hidden_size(),
        }
    }

    fn fetch(&self, endpoint: &str, boundary: Boundary, phases: &mut Phases) -> Result<HiddenStates, TaskError> {
        let expected = self.expected();
        let remote = Remote { endpoint: endpoint.to_owned(), run: self.run.id.clone(), boundary };
        self.control.set_progress("fetch", 0, 1);
        let watch = Stopwatch::start();
        let fetched = self.runtime.block_on(fetch(&remote, self.peers, expected, self.cache, self.control.token()))?;
        let (seconds, bytes) = (watch.seconds(), expected.bytes());
        self.received(bytes);
        phases.add("fetch", seconds, 0.0);
        let gigabytes_per_second = bytes as f64 / 1e9 / seconds;
        tracing::debug!(%boundary, endpoint, bytes, seconds, gigabytes_per_second, "hidden states fetched");
        Ok(fetched)
    }

    /// Runs a layer that lies between the source and the unit: as committed, or dense if nothing is named.
    pub(crate) fn replay(
        &self,
        layer: LayerIndex,
        committed: Option<&Artifact>,
        states: HiddenStates,
        phases: &mut Phases,
    ) -> Result<HiddenStates, TaskError> {
        let run = self.run;
        let outline = run.model.decoder.outline(layer)?;
        let dense = self.load(layer, phases)?;
        let mut corrected = dense.share();
        if let Some(artifact) = committed {
            if let Some(structure) = &run.structure {
                let expected = cut_tensors(&*run.model.checkpoint, structure, &outline, layer)?;
                let tensors = phases.time("load", || artifact::read_layer(&*run.store, artifact, expected))?;
                apply_named(&mut *corrected, &outline, &tensors, &run.device)?;
            } else {
                let expected =
                    outline.sublayers().map(|sublayer| self.stored_as(sublayer)).collect::<Result<Vec<_>, _>>()?;
                let tensors = phases.time("load", || artifact::read_layer(&*run.store, artifact, expected))?;
                apply_layer(&mut *corrected, outline.groups.iter().map(Vec::len), &tensors, &run.device)?;
            }
        }
        let forward = |(stream, hidden): (usize, Vec<Entry>)| {
            let layer = if stream == 0 { &*corrected } else { &*dense };
            forward_layer(layer, hidden, self.cache, self.control)
        };
        let watch = Stopwatch::start();
        let streams = states.streams.into_iter().enumerate().map(forward).collect::<Result<Vec<_>, _>>()?;
        phases.add("forward", watch.seconds(), self.forward_flops(&outline) * streams.len() as f64);
        Ok(HiddenStates { streams })
    }

    /// Operations of the weight products of one stream through one layer.
    pub fn forward_flops(&self, outline: &LayerOutline) -> f64 {
        let weights: usize = outline.sublayers().map(SublayerOutline::elements).sum();
        let tokens = self.sequences() * self.run.tokens.sequence_length();
        2.0 * tokens as f64 * weights as f64
    }

    /// Name, element type and shape of a sublayer in the checkpoint.
    ///
    /// # Errors
    /// `MissingTensor`.
    pub fn stored_as(&self, sublayer: &SublayerOutline) -> Result<(String, Dtype, Vec<usize>), TaskError> {
        let checkpoint = &self.run.model.checkpoint;
        let header = checkpoint.header(&sublayer.tensor).ok_or_else(|| CheckpointError::MissingTensor {
            path: checkpoint.path().clone(),
            tensor: sublayer.tensor.clone(),
        })?;
        Ok((sublayer.tensor.clone(), header.dtype, vec![sublayer.rows, sublayer.columns]))
    }
}
