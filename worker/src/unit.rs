//! What every unit of work has: a way to be cancelled, progress, phases, and ways to fail.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use espalier_common::checkpoint::CheckpointError;
use espalier_common::clock::Stopwatch;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::pattern::Pattern;
use espalier_common::report::PhaseSeconds;
use espalier_common::store::StoreError;
use espalier_gate::trace::Scope;
use tokio_util::sync::CancellationToken;

use crate::artifact::ArtifactError;
use crate::calibrate::cache::CacheError;
use crate::calibrate::gram::GramError;
use crate::mask::MaskError;
use crate::model::ModelError;
use crate::prune::verify::VerifyError;
use crate::prune::{SolveCtx, SolveError};
use crate::run::RunError;
use crate::transport::LinkError;
use crate::transport::grpc::FetchError;

/// How far a unit is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// As in `Progress.phase` on the wire.
    pub phase: &'static str,
    /// Steps done.
    pub done: u32,
    /// Steps of the phase.
    pub total: u32,
}

/// The handle of a unit that runs, or waits to.
#[derive(Debug, Default)]
pub struct UnitControl {
    cancelled: Arc<AtomicBool>,
    token: CancellationToken,
    progress: Mutex<Progress>,
    trace: Scope,
}

impl UnitControl {
    /// The handle of a unit whose spans belong there.
    pub fn traced(trace: Scope) -> Self {
        Self { trace, ..Self::default() }
    }

    /// Where spans of the unit belong.
    pub fn trace(&self) -> &Scope {
        &self.trace
    }

    /// Asks the unit to end soon and say nothing.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.token.cancel();
    }

    /// Whether it was asked to.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Called once per batch of sequences and per step of a solver.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check_cancelled(&self) -> Result<(), TaskError> {
        if self.is_cancelled() { Err(TaskError::Cancelled) } else { Ok(()) }
    }

    /// What blocking work checks.
    pub fn cancelled(&self) -> &AtomicBool {
        &self.cancelled
    }

    /// What waits select on.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// What solvers check.
    pub fn solve_ctx(&self) -> SolveCtx {
        SolveCtx::new(Arc::clone(&self.cancelled))
    }

    /// Notes how far the unit is.
    pub fn set_progress(&self, phase: &'static str, done: usize, total: usize) {
        let progress = Progress { phase, done: done as u32, total: total as u32 };
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    /// How far the unit is.
    pub fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a unit did not end well.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// See the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// See the checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// See the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// See the artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// See the cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// See the link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A sublayer or its group could not be solved.
    #[error("{tensor}")]
    Solve {
        /// The sublayer, or the first of its group.
        tensor: String,
        /// Why.
        #[source]
        source: SolveError,
    },
    /// The source names a boundary that this worker does not hold.
    #[error("boundary {boundary} is not held here")]
    NotHeld {
        /// The boundary.
        boundary: Boundary,
    },
    /// The source does not lead to the layer.
    #[error("boundary {boundary} and {replayed} committed layers do not lead to layer {layer}")]
    WrongSource {
        /// Where the source starts.
        boundary: Boundary,
        /// Committed layers that it names.
        replayed: usize,
        /// The unit's layer.
        layer: LayerIndex,
    },
    /// The inputs of a group cannot be summed up.
    #[error("inputs of {tensor}")]
    Gram {
        /// The first sublayer of the group.
        tensor: String,
        /// Why.
        #[source]
        source: GramError,
    },
    /// A solution is not what was asked.
    #[error("solution of {tensor}")]
    Verify {
        /// The sublayer.
        tensor: String,
        /// What is wrong with it.
        #[source]
        source: VerifyError,
    },
    /// A layer that the model's structure does not tell of.
    #[error("layer {layer} has no structure to cut")]
    NoStructure {
        /// The layer.
        layer: LayerIndex,
    },
    /// A plan for another model.
    #[error("a plan of {patterns} patterns is for a model of as many layers, but this one has {layers}")]
    PlanLength {
        /// Patterns there are.
        patterns: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A pattern that does not say what to cut.
    #[error("a structured method was told to prune to {0}, which names no heads and channels")]
    NoBlocks(Pattern),
    /// The model or the tokens to evaluate cannot be opened.
    #[error(transparent)]
    Open(Box<RunError>),
    /// A window that the block does not have.
    #[error("window {window} was asked for, but {name} has {windows}")]
    WindowOutOfRange {
        /// Index asked for.
        window: u32,
        /// Windows there are.
        windows: usize,
        /// The token block.
        name: String,
    },
    /// A tensor of the mask that says nothing.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
    /// The owner of a shared layer said something that may not come then.
    #[error("{what} came out of turn")]
    OutOfTurn {
        /// What it was, or should have been.
        what: &'static str,
    },
    /// A layer that cannot be shared: its job does not chain layers, or tunes them as a whole.
    #[error("layers of this job are not shared")]
    NotShared,
    /// The unit was abandoned.
    #[error("cancelled")]
    Cancelled,
}

impl From<RunError> for TaskError {
    fn from(error: RunError) -> Self {
        Self::Open(Box::new(error))
    }
}

impl From<FetchError> for TaskError {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Link(LinkError::Cancelled) => Self::Cancelled,
            FetchError::Link(error) => Self::Link(error),
            FetchError::Cache(error) => Self::Cache(error),
        }
    }
}

impl TaskError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Model(error) => error.class(),
            Self::Checkpoint(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Artifact(error) => error.class(),
            Self::Cache(error) => error.class(),
            Self::Link(error) => error.class(),
            Self::Solve { source, .. } => source.class(),
            Self::Gram { source, .. } => source.class(),
            Self::Verify { source, .. } => source.class(),
            Self::Open(error) => error.class(),
            Self::Mask(error) => error.class(),
            Self::NotHeld { .. } | Self::Backend(_) | Self::Cancelled => FaultClass::RetryElsewhere,
            Self::NoStructure { .. }
            | Self::OutOfTurn { .. }
            | Self::NotShared
            | Self::NoBlocks(_)
            | Self::PlanLength { .. }
            | Self::WrongSource { .. }
            | Self::WindowOutOfRange { .. } => FaultClass::Bug,
        }
    }

    /// The error as it crosses the process boundary.
    pub fn fault(&self) -> Fault {
        Fault::new(self.class(), self)
    }
}

/// Seconds and operations by phase, added up over a unit; and a span of its trace for each time that something is booked.
#[derive(Debug, Default)]
pub struct Phases {
    booked: BTreeMap<&'static str, (f64, f64)>,
    trace: Scope,
    group: Option<usize>,
}

impl Phases {
    /// Those of a unit.
    pub fn of(control: &UnitControl) -> Self {
        Self { trace: control.trace().clone(), ..Self::default() }
    }

    /// What is booked from now on is for this group, or for the layer as a whole.
    pub fn enter(&mut self, group: Option<usize>) {
        self.group = group;
    }

    /// Runs `work` and books its time on `phase`.
    pub fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let watch = Stopwatch::start();
        let result = work();
        self.add(phase, watch.seconds(), 0.0);
        result
    }

    /// Books seconds and floating-point operations on `phase`.
    pub fn add(&mut self, phase: &'static str, seconds: f64, flops: f64) {
        self.add_to(self.group, phase, seconds, flops);
    }

    /// The same for another group than the one that is entered.
    pub fn add_to(&mut self, group: Option<usize>, phase: &'static str, seconds: f64, flops: f64) {
        let entry = self.booked.entry(phase).or_default();
        *entry = (entry.0 + seconds, entry.1 + flops);
        // Operations that are booked alone took no time of their own.
        if seconds > 0.0 {
            tracing::debug!(phase, seconds, group, "booked");
            let group = group.map(|group| ("espalier.group", group.into()));
            self.trace.note_past(phase, seconds, group.into_iter().collect());
        }
    }

    /// The report, in order of name.
    pub fn finish(self) -> Vec<PhaseSeconds> {
        let phase = |(phase, (seconds, flops)): (&str, _)| PhaseSeconds { phase: phase.to_owned(), seconds, flops };
        self.booked.into_iter().map(phase).collect()
    }
}
