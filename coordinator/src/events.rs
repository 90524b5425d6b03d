//! What a person (or a script) can follow a run by.

use std::sync::{Arc, Mutex};

use espalier_common::ids::{RunId, Unit, WorkerId};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::journal::EvaluatedModel;
use crate::report::Report;

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
    },
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
    },
    /// A lease ended badly; the unit will be tried again or the run will fail.
    Failed {
        /// What.
        unit: Unit,
        /// By whom.
        worker: WorkerId,
        /// Why.
        reason: String,
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
    /// Waiting for workers and asking one of them what the model is.
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

/// The events of one run: kept, and sent to whoever follows.
#[derive(Debug, Clone)]
pub struct EventLog {
    past: Arc<Mutex<Vec<RunEvent>>>,
    live: broadcast::Sender<RunEvent>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self { past: Arc::default(), live: broadcast::channel(FOLLOWER_BACKLOG).0 }
    }
}

impl EventLog {
    /// Notes an event. Progress is sent on but not kept.
    pub fn note(&self, event: RunEvent) {
        let mut past = self.past.lock().expect("nobody panics while holding the events");
        if !matches!(event, RunEvent::Progress { .. }) {
            past.push(event.clone());
        }
        // Nobody following is fine.
        let _ = self.live.send(event);
    }

    /// Everything so far, and a receiver of everything after it.
    pub fn follow(&self) -> (Vec<RunEvent>, broadcast::Receiver<RunEvent>) {
        let past = self.past.lock().expect("nobody panics while holding the events");
        (past.clone(), self.live.subscribe())
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
}
