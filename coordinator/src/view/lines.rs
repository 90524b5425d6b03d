//! What happened, in words: the same on the page and in the terminal.

use espalier_common::ids::{Unit, WorkerId};
use serde::{Deserialize, Serialize};

use super::RunView;
use crate::events::RunEvent;

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// All is well.
    Info,
    /// Something went wrong, and the run goes on.
    Warn,
    /// The run ended badly.
    Error,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// How much it matters.
    pub level: Level,
    /// What. Parts of it come from outside: names of workers, reasons of faults.
    pub text: String,
}

fn name(view: &RunView, worker: WorkerId) -> String {
    view.workers.get(&worker).map_or_else(|| format!("worker {worker}"), |lane| lane.name.clone())
}

/// The line of an event that `view` has not taken yet; nothing for one that people do not follow.
pub(super) fn line(view: &RunView, at: u64, event: &RunEvent) -> Option<LogLine> {
    let (level, text) = match event {
        RunEvent::Opened { run, url, committed, .. } => {
            let resumed = if *committed > 0 { format!(", {committed} layers committed before") } else { String::new() };
            (Level::Info, format!("run {run} in {url}{resumed}"))
        }
        RunEvent::Strategy(choice) => (Level::Info, choice.told()?),
        RunEvent::Phase { phase } => (Level::Info, phase.told()),
        // It is made ready for each part of a run.
        RunEvent::WorkerJoined { worker, .. } if view.workers.get(worker).is_some_and(|lane| lane.here) => return None,
        RunEvent::WorkerJoined { worker, name } => (Level::Info, format!("worker {worker} ({name}) is ready")),
        RunEvent::WorkerLost { worker, name, reason } => {
            (Level::Warn, format!("worker {worker} ({name}) is lost: {reason}"))
        }
        RunEvent::Committed { unit: Unit::Prune(layer), worker, mean_error, assistants_lost, .. } => {
            let error = mean_error.map_or_else(String::new, |error| format!(": mean error {error:.5}"));
            let count =
                view.head.layers.map_or_else(String::new, |all| format!(" ({}/{all})", view.head.committed + 1));
            let lost = match assistants_lost {
                0 => String::new(),
                lost => format!(", given up on {lost} that helped"),
            };
            (Level::Info, format!("layer {layer} pruned by {}{error}{count}{lost}", name(view, *worker)))
        }
        RunEvent::Failed { unit, worker, reason, .. } => {
            (Level::Warn, format!("{unit} failed on {}: {reason}", name(view, *worker)))
        }
        RunEvent::Finished { .. } => (Level::Info, "done".to_owned()),
        RunEvent::Ended { reason, .. } => (Level::Error, reason.clone()),
        RunEvent::Planned { .. }
        | RunEvent::Started { .. }
        | RunEvent::Assisted { .. }
        | RunEvent::Progress { .. }
        | RunEvent::Committed { .. } => return None,
    };
    Some(LogLine { at, level, text })
}
