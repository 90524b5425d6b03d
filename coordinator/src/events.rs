//! What a person (or a script) can follow a run by.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use espalier_common::clock::unix_millis;
use espalier_common::fault::FaultClass;
use espalier_common::ids::{RunId, Unit, WorkerId};
use espalier_common::report::PhaseSeconds;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};

use crate::journal::EvaluatedModel;
use crate::metrics::CoordinatorMetrics;
use crate::plan::strategy::Choice;
use crate::report::{Report, SublayerEntry};
use crate::view::{Cursor, RunView, Update};

/// Events a slow follower may be behind before it loses some.
const FOLLOWER_BACKLOG: usize = 1024;

/// One thing that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// The run was created, or taken up again.
    Opened {
        /// The run.
        run: RunId,
        /// Where its journal and artifacts are.
        url: String,
        /// Layers that were committed in an earlier life.
        committed: usize,
        /// What is computed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        about: Option<Box<About>>,
        /// Sublayers of the layers that were committed before.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        sublayers: Vec<SublayerEntry>,
        /// Where the time of what was committed before went.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        phases: Vec<PhaseSeconds>,
    },
    /// The model is known, and what its layers are to become.
    Planned {
        /// What is asked of the zeros.
        pattern: String,
    },
    /// How the workers share the calibration is settled.
    Strategy(Choice),
    /// A new part of the run began.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// A worker is ready for the run.
    WorkerJoined {
        /// Its number.
        worker: WorkerId,
        /// Its name.
        name: String,
    },
    /// A worker is gone, or was refused.
    WorkerLost {
        /// Its number.
        worker: WorkerId,
        /// Its name.
        name: String,
        /// Why, if anything is known.
        reason: String,
    },
    /// A unit was leased.
    Started {
        /// What.
        unit: Unit,
        /// To whom.
        worker: WorkerId,
    },
    /// The worker of a unit was told who may help.
    Assisted {
        /// With what.
        unit: Unit,
        /// Whom.
        worker: WorkerId,
        /// Who may.
        by: Vec<WorkerId>,
    },
    /// A unit is on its way.
    Progress {
        /// What.
        unit: Unit,
        /// Who.
        worker: WorkerId,
        /// Which part of it.
        phase: String,
        /// Steps done.
        done: u32,
        /// Steps in all.
        total: u32,
    },
    /// A unit is done for good.
    Committed {
        /// What.
        unit: Unit,
        /// By whom.
        worker: WorkerId,
        /// Mean relative error of its sublayers, if it pruned any.
        mean_error: Option<f64>,
        /// These sublayers.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        sublayers: Vec<SublayerEntry>,
        /// Where the time went.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        phases: Vec<PhaseSeconds>,
        /// Assistants that were given up on.
        #[serde(default)]
        assistants_lost: u32,
    },
    /// A lease ended badly; the unit will be tried again or the run will fail.
    Failed {
        /// What.
        unit: Unit,
        /// By whom.
        worker: WorkerId,
        /// Why.
        reason: String,
        /// What may be done about it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        class: Option<FaultClass>,
    },
    /// The run ended well.
    Finished {
        /// All of it.
        report: Box<Report>,
    },
    /// The run ended badly.
    Ended {
        /// One line: what failed, what is safe.
        reason: String,
        /// The exit code it amounts to.
        exit_code: u8,
    },
}

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "name")]
pub enum Phase {
    /// Reading and cutting the calibration text.
    Tokenise,
    /// Waiting until enough workers are there.
    AwaitWorkers {
        /// Workers that are.
        here: usize,
        /// Workers that must be.
        wanted: usize,
    },
    /// Asking a worker what the model is.
    Inspect,
    /// Looking at the dense model, layer by layer.
    Survey {
        /// Layers in all.
        layers: usize,
    },
    /// Trying plans on the calibration sequences kept apart for that.
    Try {
        /// Plans in all.
        plans: usize,
    },
    /// Pruning.
    Prune {
        /// Layers in all.
        layers: usize,
    },
    /// Writing the checkpoint.
    Assemble,
    /// Measuring perplexity of a model that belongs to no run.
    EvaluateAlone {
        /// Number of windows.
        windows: usize,
    },
    /// Measuring perplexity.
    Evaluate {
        /// Of which model.
        model: EvaluatedModel,
        /// Number of windows.
        windows: usize,
    },
}

impl Phase {
    /// What people call it, and how many steps it has if that is known.
    pub fn title(self) -> (&'static str, usize) {
        match self {
            Self::Tokenise => ("reading texts", 0),
            Self::AwaitWorkers { wanted, .. } => ("waiting for workers", wanted),
            Self::Inspect => ("reading the model", 0),
            Self::Survey { layers } => ("surveying", layers),
            Self::Try { plans } => ("trying plans", plans),
            Self::Prune { layers } => ("pruning", layers),
            Self::Assemble => ("writing", 0),
            Self::EvaluateAlone { windows } => ("evaluating", windows),
            Self::Evaluate { model: EvaluatedModel::Dense, windows } => ("evaluating dense", windows),
            Self::Evaluate { model: EvaluatedModel::Pruned, windows } => ("evaluating pruned", windows),
        }
    }

    /// One line that says that it begins.
    pub fn told(self) -> String {
        match (self, self.title()) {
            (Self::AwaitWorkers { here, .. }, (title, wanted)) => format!("{title}: {here} of {wanted} are here"),
            (_, (title, 0)) => title.to_owned(),
            (_, (title, total)) => format!("{title} ({total})"),
        }
    }
}

/// What a run computes, for those who look at it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// As the job names it.
    pub model: String,
    /// The method.
    pub method: String,
    /// What is asked of the zeros.
    pub pattern: String,
    /// Which inputs layers are calibrated with.
    pub propagation: String,
    /// Calibration sequences.
    pub samples: usize,
    /// Tokens in each.
    pub sequence_length: usize,
    /// Where the checkpoint goes.
    pub output: String,
}

/// An event, and when it happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stamped {
    /// Milliseconds since 1970.
    pub at: u64,
    /// What.
    #[serde(flatten)]
    pub event: RunEvent,
}

impl Stamped {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self.event, RunEvent::Finished { .. } | RunEvent::Ended { .. })
    }
}

/// The events of one run: kept, counted, and sent to whoever follows.
#[derive(Debug, Clone)]
pub struct EventLog {
    inner: Arc<Mutex<Inner>>,
    live: broadcast::Sender<Stamped>,
    changed: Arc<watch::Sender<u64>>,
    metrics: Option<CoordinatorMetrics>,
    /// Since when the loop has been at one event, in milliseconds since 1970; 0 while it waits.
    busy_since: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Inner {
    past: Vec<Stamped>,
    view: RunView,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            inner: Arc::default(),
            live: broadcast::channel(FOLLOWER_BACKLOG).0,
            changed: Arc::new(watch::channel(0).0),
            metrics: None,
            busy_since: Arc::default(),
        }
    }
}

impl EventLog {
    /// A log whose events are also counted.
    pub fn counted(metrics: CoordinatorMetrics) -> Self {
        Self { metrics: Some(metrics), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding the events")
    }

    /// Notes an event. Progress is sent on but not kept.
    pub fn note(&self, event: RunEvent) {
        self.note_at(Stamped { at: unix_millis(), event });
    }

    fn note_at(&self, stamped: Stamped) {
        {
            let mut inner = self.lock();
            let before = inner.view.retries();
            inner.view.apply(stamped.at, &stamped.event);
            if let Some(metrics) = &self.metrics {
                metrics.observe(&stamped.event, inner.view.retries() - before);
            }
            if !matches!(stamped.event, RunEvent::Progress { .. }) {
                inner.past.push(stamped.clone());
            }
            // Nobody following is fine. Sent under the lock, so that who follows misses nothing and sees nothing twice.
            let _ = self.live.send(stamped);
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// Counts a record of the journal.
    pub fn note_append(&self, seconds: f64, is_durable: bool) {
        if let Some(metrics) = &self.metrics {
            metrics.observe_append(seconds, is_durable);
        }
    }

    /// Everything so far, and a receiver of everything after it.
    pub fn follow(&self) -> (Vec<Stamped>, broadcast::Receiver<Stamped>) {
        let inner = self.lock();
        (inner.past.clone(), self.live.subscribe())
    }

    /// The run as it is now.
    pub fn view(&self) -> RunView {
        self.lock().view.clone()
    }

    /// What changed since `cursor`, which is moved on.
    pub fn update(&self, cursor: &mut Cursor) -> Update {
        self.lock().view.since(cursor)
    }

    /// Looks at the run without copying it.
    pub fn look<T>(&self, at: impl FnOnce(&RunView) -> T) -> T {
        at(&self.lock().view)
    }

    /// Tells when something happened.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether the other is this one.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Says that the run's loop has something to do, until the value is dropped.
    pub fn busy(&self) -> Busy<'_> {
        self.busy_since.store(unix_millis(), Ordering::Relaxed);
        Busy(self)
    }

    /// Milliseconds for which the run's loop has been at one event; 0 while it waits for the next.
    pub fn busy_millis(&self) -> u64 {
        match self.busy_since.load(Ordering::Relaxed) {
            0 => 0,
            since => unix_millis().saturating_sub(since),
        }
    }
}

/// See [`EventLog::busy`].
#[derive(Debug)]
pub struct Busy<'a>(&'a EventLog);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy_since.store(0, Ordering::Relaxed);
    }
}

/// A coordinator at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its runs, oldest first.
    pub runs: Vec<RunStatus>,
    /// Its workers.
    pub workers: Vec<WorkerStatus>,
}

/// A run at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// The run.
    pub run: RunId,
    /// What is pruned.
    pub model: String,
    /// `queued`, `running`, `done`, or why it ended.
    pub state: String,
    /// Layers committed.
    pub committed: usize,
    /// Layers in all, once known.
    pub layers: Option<usize>,
}

/// A worker at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its number.
    pub worker: WorkerId,
    /// What it brings.
    pub offer: crate::fleet::Offer,
    /// Highest resident memory so far.
    pub peak_rss_bytes: u64,
    /// Hidden states received from other workers so far.
    #[serde(default)]
    pub bytes_received: u64,
}
