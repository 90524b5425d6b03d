//! What this worker is doing: attached to one run at a time, with the units that it was given, each under its lease.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use candle_core::Device;
use espalier_common::clock::Stopwatch;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Boundary, LayerIndex, Lease, RunId, Unit};
use espalier_common::job::Propagation;
use espalier_common::pattern::Pattern;
use espalier_common::report::{Artifact, Outcome};
use espalier_common::wire::{Shares, Source};
use espalier_gate::trace::{Context, Open, Side};
use espalier_gate::web::Readiness;
use espalier_gate::{Dialer, Tracer};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::calibrate::cache::ActivationCache;
use crate::crew::assistant::{OwnerLine, Part, assist};
use crate::crew::owner::{Help, LEAST_PATIENCE};
use crate::crew::{LayerSizes, Paces};
use crate::device::{DeviceError, DeviceThread};
use crate::evaluation::{Evaluation, evaluate};
use crate::holdings::Holdings;
use crate::layer_task::{prune_layer, run_dense_layer};
use crate::metrics::WorkerMetrics;
use crate::run::{Run, RunError};
use crate::source::Workplace;
use crate::survey_task::survey_layer;
use crate::transport::Joining;
use crate::trial_task::try_patterns;
use crate::unit::{Progress, TaskError, UnitControl};

/// What a unit asks for.
#[derive(Debug, Clone)]
pub enum Work {
    /// Run a dense layer.
    Forward(LayerIndex, Source),
    /// Prune a layer.
    Prune {
        /// Which.
        layer: LayerIndex,
        /// Its input.
        source: Source,
        /// What its matrices must become.
        pattern: Pattern,
        /// Whether its output is also left in the store.
        keeps_output: bool,
        /// Endpoints of workers that may help.
        assistants: Vec<String>,
        /// Speeds of this worker and those, in GFLOP/s; all alike if they are not as many.
        gflops: Vec<f64>,
        /// With the strategy `data`: who keeps what of the input and output.
        shares: Option<Shares>,
    },
    /// Run a dense layer and look at it, with error curves at these sparsities.
    Survey(LayerIndex, Source, Vec<f64>),
    /// Prune roughly to these patterns, one a layer, and evaluate.
    Try(Vec<Pattern>),
    /// Evaluate windows.
    Evaluate(Evaluation),
}

impl Work {
    /// What it is called in a trace.
    fn name(&self) -> &'static str {
        match self {
            Self::Forward(..) => "forward",
            Self::Prune { .. } => "prune",
            Self::Survey(..) => "survey",
            Self::Try(_) => "try",
            Self::Evaluate(_) => "evaluate",
        }
    }
}

/// How a unit ended.
#[derive(Debug, Clone, PartialEq)]
pub struct UnitReport {
    /// Its run.
    pub run: RunId,
    /// The lease it ran under.
    pub lease: Lease,
    /// What came of it.
    pub result: Result<Outcome, Fault>,
    /// Boundaries that this worker now holds for the run.
    pub held: Vec<Boundary>,
}

/// Why something was not started.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Units of layers need `Prepare` first.
    #[error("this worker is not prepared for run {run}")]
    NotPrepared {
        /// The run.
        run: RunId,
    },
    /// The worker leaves.
    #[error("this worker is leaving")]
    Draining,
    /// See the run.
    #[error(transparent)]
    Run(Box<RunError>),
    /// See the device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It cannot be assisted with.
    #[error(transparent)]
    Assist(Box<TaskError>),
}

impl From<TaskError> for SessionError {
    fn from(error: TaskError) -> Self {
        Self::Assist(Box::new(error))
    }
}

impl From<RunError> for SessionError {
    fn from(error: RunError) -> Self {
        Self::Run(Box::new(error))
    }
}

impl SessionError {
    /// The error as it crosses the process boundary.
    pub fn fault(&self) -> Fault {
        let class = match self {
            Self::NotPrepared { .. } => FaultClass::RetryHere,
            Self::Draining => FaultClass::RetryElsewhere,
            Self::Run(error) => error.class(),
            Self::Assist(error) => error.class(),
            Self::Device(error) => error.class(),
        };
        Fault::new(class, self)
    }
}

/// What the worker is attached to.
enum Attachment {
    Nothing,
    Prepared(Arc<Run>),
    Draining,
}

/// A unit that this worker was given.
struct Given {
    lease: Lease,
    control: Arc<UnitControl>,
    ended: bool,
}

struct State {
    attachment: Attachment,
    /// The layer of another worker that this one helps with, or did last.
    assistance: Option<Arc<UnitControl>>,
    /// Newest lease of each unit. Ended ones stay until their run goes: starting them again must change nothing.
    units: BTreeMap<(RunId, Unit), Given>,
}

/// How a session meets other workers.
pub struct Peers {
    /// How they are called.
    pub dialer: Dialer,
    /// What joins them where that is agreed on.
    pub joining: Option<Arc<Joining>>,
    /// What an assistant may take at least before it is given up on.
    pub patience: Duration,
}

impl Default for Peers {
    /// On loopback.
    fn default() -> Self {
        Self { dialer: Dialer::default(), joining: None, patience: LEAST_PATIENCE }
    }
}

/// This worker's work.
pub struct Session {
    device: DeviceThread,
    cache: ActivationCache,
    holdings: Holdings,
    reports: mpsc::Sender<UnitReport>,
    runtime: Handle,
    peers: Peers,
    tracer: Tracer,
    bytes_received: AtomicU64,
    paces: Paces,
    metrics: WorkerMetrics,
    /// Whether the coordinator knows this worker, as far as it is known here.
    readiness: Readiness,
    state: Mutex<State>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Session {
    /// A session that is attached to nothing, with peers on loopback.
    pub fn new(
        device: DeviceThread,
        cache: ActivationCache,
        reports: mpsc::Sender<UnitReport>,
        runtime: Handle,
    ) -> Arc<Self> {
        Self::with_peers(device, cache, reports, runtime, (Peers::default(), Tracer::default()))
    }

    /// A session that is attached to nothing. Ends of units go to `reports`; `runtime` fetches from peers, which are called
    /// through the dialer, and joined where that is agreed on; spans of units are told to the tracer.
    pub fn with_peers(
        device: DeviceThread,
        cache: ActivationCache,
        reports: mpsc::Sender<UnitReport>,
        runtime: Handle,
        (peers, tracer): (Peers, Tracer),
    ) -> Arc<Self> {
        let state = State { attachment: Attachment::Nothing, assistance: None, units: BTreeMap::new() };
        Arc::new(Self {
            device,
            cache,
            holdings: Holdings::default(),
            reports,
            runtime,
            peers,
            tracer,
            bytes_received: AtomicU64::new(0),
            paces: Paces::default(),
            metrics: WorkerMetrics::default(),
            readiness: Readiness::not_yet("it is not registered yet"),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The boundaries that other workers may fetch.
    pub fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    /// Bytes received from peers so far.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received.load(Ordering::Relaxed)
    }

    /// How fast others were that helped with this worker's layers.
    pub fn paces(&self) -> &Paces {
        &self.paces
    }

    /// Bytes of hidden states that are kept, in memory and on disk.
    pub fn cached_bytes(&self) -> (u64, u64) {
        self.cache.held_bytes()
    }

    /// What can join this worker with another besides their stream.
    pub fn joining(&self) -> Option<&Arc<Joining>> {
        self.peers.joining.as_ref()
    }

    /// Whether the coordinator knows this worker.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// What spans of its units are told to.
    pub fn tracer(&self) -> &Tracer {
        &self.tracer
    }

    /// Its numbers.
    pub fn metrics(&self) -> &WorkerMetrics {
        &self.metrics
    }

    /// Units that run or wait, and whether it helps another worker.
    pub fn at_work(&self) -> (usize, bool) {
        let state = self.state();
        let units = state.units.values().filter(|given| !given.ended && !given.control.is_cancelled()).count();
        (units, state.assistance.as_ref().is_some_and(|assistance| !assistance.is_cancelled()))
    }

    /// Attaches to a run, and lets go of any other. Blocking: reads the job's model headers and tokens.
    ///
    /// # Errors
    /// `Run`, `Draining`.
    pub fn prepare(&self, run: RunId, job_json: String, run_url: &str, tokens: &Artifact) -> Result<(), SessionError> {
        match &self.state().attachment {
            Attachment::Prepared(prepared) if prepared.id == run && prepared.job_json == job_json => return Ok(()),
            Attachment::Draining => return Err(SessionError::Draining),
            _ => {}
        }
        let opened = Arc::new(Run::open(run.clone(), job_json, run_url, tokens, self.device.device())?);
        let mut state = self.state();
        if matches!(state.attachment, Attachment::Draining) {
            return Err(SessionError::Draining);
        }
        state.units.retain(|(other, _), given| {
            let stays = *other == run;
            if !stays {
                given.control.cancel();
            }
            stays
        });
        if let Some(assistance) = state.assistance.take() {
            assistance.cancel();
        }
        self.holdings.keep_only(&run);
        state.attachment = Attachment::Prepared(opened);
        tracing::info!(%run, "attached");
        Ok(())
    }

    /// Starts a unit that is not traced, as [`Self::start_traced`] does.
    ///
    /// # Errors
    /// As there.
    pub fn start(self: &Arc<Self>, run: &RunId, lease: Lease, work: Work) -> Result<(), SessionError> {
        self.start_traced(run, lease, work, None)
    }

    /// Starts a unit, and returns. Under a lease that was started before, nothing changes; a newer lease for a unit puts an
    /// end to the older one first. Its spans belong to that of whoever asked for it.
    ///
    /// # Errors
    /// `NotPrepared`, `Draining`, `Device`.
    pub fn start_traced(
        self: &Arc<Self>,
        run: &RunId,
        lease: Lease,
        work: Work,
        trace: Option<Context>,
    ) -> Result<(), SessionError> {
        let mut state = self.state();
        let attached = match &state.attachment {
            Attachment::Draining => return Err(SessionError::Draining),
            Attachment::Prepared(attached) if attached.id == *run => Some(Arc::clone(attached)),
            _ => None,
        };
        if attached.is_none() && !matches!(work, Work::Evaluate(_)) {
            return Err(SessionError::NotPrepared { run: run.clone() });
        }
        let key = (run.clone(), lease.unit);
        if let Some(given) = state.units.get(&key) {
            // Attempts at a unit are counted over all lives of a run, whatever number this worker had in each.
            if given.lease.attempt >= lease.attempt {
                return Ok(());
            }
            given.control.cancel();
        }
        let span = self.tracer.below(trace).open(work.name()).on(Side::Called);
        let span = span.with("espalier.unit", lease.unit.to_string()).with("espalier.attempt", lease.attempt.0);
        let control = Arc::new(UnitControl::traced(span.scope()));
        let (session, unit_run, unit_control) = (Arc::clone(self), run.clone(), Arc::clone(&control));
        let job = move |device: &Device| {
            session.carry_out((unit_run, lease), attached, &work, (&unit_control, span), device);
        };
        self.device.submit(Box::new(job))?;
        // Whoever gives this worker a unit has no further use for its help.
        if let Some(assistance) = state.assistance.take() {
            assistance.cancel();
        }
        state.units.insert(key, Given { lease, control, ended: false });
        tracing::info!(%run, %lease, "started");
        Ok(())
    }

    /// Runs on the device thread: does the unit and reports its end, unless nobody wants it any more.
    fn carry_out(
        &self,
        (run, lease): (RunId, Lease),
        attached: Option<Arc<Run>>,
        work: &Work,
        (control, mut span): (&UnitControl, Open),
        device: &Device,
    ) {
        let done = || self.execute(attached.as_deref(), lease, work, control, device);
        let watch = Stopwatch::start();
        let result = if control.is_cancelled() {
            Err(TaskError::Cancelled.fault())
        } else {
            match catch_unwind(AssertUnwindSafe(done)) {
                Ok(result) => result.map_err(|error| error.fault()),
                // The panic's own message went to stderr with its place.
                Err(_) => Err(Fault { class: FaultClass::Bug, message: format!("{} panicked", lease.unit) }),
            }
        };
        if let Some(given) = self.state().units.get_mut(&(run.clone(), lease.unit)).filter(|g| g.lease == lease) {
            given.ended = true;
        }
        self.metrics.observe_unit(lease.unit, &result, control.is_cancelled(), watch.seconds());
        if control.is_cancelled() {
            span.fail("abandoned");
            tracing::info!(%run, %lease, "abandoned");
            return;
        }
        span.close(result.as_ref().map(drop));
        match &result {
            Ok(_) => tracing::info!(%run, %lease, "done"),
            Err(fault) => tracing::warn!(%run, %lease, class = ?fault.class, %fault, "failed"),
        }
        let held = self.holdings.boundaries(&run);
        if self.reports.blocking_send(UnitReport { run, lease, result, held }).is_err() {
            tracing::warn!(%lease, "nobody is left to report to");
        }
    }

    fn execute(
        &self,
        run: Option<&Run>,
        lease: Lease,
        work: &Work,
        control: &UnitControl,
        device: &Device,
    ) -> Result<Outcome, TaskError> {
        let is_survey = matches!(work, Work::Survey(..) | Work::Try(_));
        let place = run.map(|run| self.place(run, control, is_survey)).ok_or(TaskError::Cancelled);
        match work {
            Work::Evaluate(evaluation) => {
                // The last owner's neighbours may have one layer too many.
                run.inspect(|run| run.ahead.forget());
                evaluate(evaluation, device, control)
            }
            Work::Forward(layer, source) => run_dense_layer(&place?, *layer, source),
            Work::Survey(layer, source, sparsities) => survey_layer(&place?, *layer, source, sparsities),
            Work::Try(patterns) => try_patterns(&place?, patterns),
            Work::Prune { layer, source, pattern, keeps_output, assistants, gflops, shares } => {
                let speeds = self.paces.speeds(assistants).unwrap_or_else(|| gflops.clone());
                let help = Help { lease, assistants: assistants.clone(), speeds, leaves: None };
                prune_layer(&place?, *layer, (source, shares.as_ref()), *pattern, *keeps_output, help)
            }
        }
    }

    fn place<'a>(&'a self, run: &'a Run, control: &'a UnitControl, is_survey: bool) -> Workplace<'a> {
        Workplace {
            run,
            control,
            cache: &self.cache,
            holdings: &self.holdings,
            runtime: &self.runtime,
            peers: &self.peers.dialer,
            joining: self.peers.joining.as_ref(),
            patience: self.peers.patience,
            bytes_received: &self.bytes_received,
            paces: &self.paces,
            is_survey,
        }
    }

    /// Assists the owner of a lease with its layer, until it hangs up, or this worker gets work of its own. Returns what is
    /// cancelled when the owner is gone. Blocking: reads headers.
    ///
    /// # Errors
    /// `NotPrepared`, `Draining`, `NotShared`, `Device`.
    pub fn assist(
        self: &Arc<Self>,
        run: &RunId,
        (lease, part, trace): (Lease, Part, Option<Context>),
        line: impl FnOnce(LayerSizes) -> OwnerLine,
    ) -> Result<Arc<UnitControl>, SessionError> {
        let attached = match &self.state().attachment {
            Attachment::Draining => return Err(SessionError::Draining),
            Attachment::Prepared(attached) if attached.id == *run => Arc::clone(attached),
            _ => return Err(SessionError::NotPrepared { run: run.clone() }),
        };
        let is_chain = attached.job.propagation.mode == Propagation::Pruned;
        let (Unit::Prune(layer), true) = (lease.unit, is_chain && attached.method.reconstruct.is_none()) else {
            return Err(TaskError::NotShared.into());
        };
        let line = line(LayerSizes::new(&attached, layer, part.leaves.clone())?);
        let mut span = self.tracer.below(trace).open("assist").on(Side::Called).with("espalier.layer", layer.0);
        let control = Arc::new(UnitControl::traced(span.scope()));
        let (session, unit_control) = (Arc::clone(self), Arc::clone(&control));
        let job = move |_: &Device| {
            let place = session.place(&attached, &unit_control, false);
            match catch_unwind(AssertUnwindSafe(|| assist(&place, layer, part, line))) {
                Ok(ended) => span.close(ended),
                Err(_) => {
                    span.fail("panicked");
                    tracing::error!(%lease, "assistance panicked");
                }
            }
        };
        let mut state = self.state();
        if state.units.values().any(|given| !given.ended && !given.control.is_cancelled()) {
            return Err(DeviceError::Busy.into());
        }
        self.device.submit(Box::new(job))?;
        if let Some(former) = state.assistance.replace(Arc::clone(&control)) {
            former.cancel();
        }
        tracing::info!(%run, %lease, "assisting");
        Ok(control)
    }

    /// Reads layers ahead although they are near.
    #[cfg(test)]
    pub(crate) fn read_ahead(&self) {
        if let Attachment::Prepared(attached) = &mut self.state().attachment {
            Arc::get_mut(attached).unwrap().ahead = crate::ahead::Ahead::new(true);
        }
    }

    /// The run that it works for.
    #[cfg(test)]
    pub(crate) fn attached(&self) -> Option<Arc<Run>> {
        match &self.state().attachment {
            Attachment::Prepared(attached) => Some(Arc::clone(attached)),
            _ => None,
        }
    }

    /// Stops a unit, if it still runs under that lease. Its end is not reported.
    pub fn abandon(&self, run: &RunId, lease: Lease) {
        if let Some(given) = self.state().units.get(&(run.clone(), lease.unit)).filter(|given| given.lease == lease) {
            given.control.cancel();
        }
    }

    /// Stops all units: the coordinator has given up on their leases.
    pub fn abandon_all(&self) {
        let mut state = self.state();
        let assistance = state.assistance.take();
        let units = state.units.values().map(|given| &given.control);
        units.chain(&assistance).for_each(|control| control.cancel());
    }

    /// Drops hidden states; with no boundary named, everything of the run.
    pub fn release(&self, run: &RunId, boundaries: &[Boundary]) {
        if !boundaries.is_empty() {
            self.holdings.release(run, |boundary| boundaries.contains(&boundary));
            return;
        }
        let mut state = self.state();
        state.units.retain(|(other, _), given| {
            let stays = other != run;
            if !stays {
                given.control.cancel();
            }
            stays
        });
        if matches!(&state.attachment, Attachment::Prepared(prepared) if prepared.id == *run) {
            state.attachment = Attachment::Nothing;
            if let Some(assistance) = state.assistance.take() {
                assistance.cancel();
            }
        }
        self.holdings.release(run, |_| true);
    }

    /// Takes no more work and stops what runs.
    pub fn drain(&self) {
        self.state().attachment = Attachment::Draining;
        self.abandon_all();
    }

    /// How far the units are that run or wait.
    pub fn progress(&self) -> Vec<(RunId, Lease, Progress)> {
        let state = self.state();
        let running = state.units.iter().filter(|(_, given)| !given.ended && !given.control.is_cancelled());
        running.map(|((run, _), given)| (run.clone(), given.lease, given.control.progress())).collect()
    }
}
