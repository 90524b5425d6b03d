//! What a run's journal tells of it, read from outside.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use espalier_common::ids::{LayerIndex, Lease, Unit, WorkerId};
use espalier_coordinator::journal::{self, EvaluatedModel, JournalRecord};
use espalier_coordinator::schedule::Record;

/// Layers of every tiny model.
pub(crate) const LAYERS: usize = 4;

/// The records that are whole.
pub(crate) fn records(run: &Path) -> Vec<JournalRecord> {
    journal::read(&run.join("journal")).unwrap_or_default()
}

/// What it says of pruning.
pub(crate) fn schedule(run: &Path) -> Vec<Record> {
    let records = records(run).into_iter().filter_map(|record| match record {
        JournalRecord::Prune(record) => Some(record),
        _ => None,
    });
    records.collect()
}

/// Leases of layers that were committed, in order.
pub(crate) fn commits(run: &Path) -> Vec<Lease> {
    let commits = schedule(run).into_iter().filter_map(|record| match record {
        Record::Committed { lease, .. } if matches!(lease.unit, Unit::Prune(_)) => Some(lease),
        _ => None,
    });
    commits.collect()
}

/// The schedules that a run has, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Schedule {
    Survey,
    Prune,
    Evaluate(EvaluatedModel),
}

/// Checks that in every schedule each unit was committed once at most, each layer's pruning exactly once, and that none was
/// leased after it was, nor twice under one number.
pub(crate) fn each_layer_once(run: &Path) -> Result<()> {
    let mut committed = BTreeMap::new();
    let mut leased = BTreeMap::new();
    for record in records(run) {
        let (schedule, record) = match record {
            JournalRecord::Survey(record) => (Schedule::Survey, record),
            JournalRecord::Prune(record) => (Schedule::Prune, record),
            JournalRecord::Evaluate { model, record } => (Schedule::Evaluate(model), record),
            _ => continue,
        };
        match record {
            Record::Committed { lease, .. } => {
                let twice = committed.insert((schedule, lease.unit), lease).is_some();
                ensure!(!twice, "{schedule:?}: {} was committed twice", lease.unit);
            }
            Record::Leased { lease } => {
                let late = committed.contains_key(&(schedule, lease.unit));
                ensure!(!late, "{schedule:?}: {} was leased though committed", lease.unit);
                let again = leased.insert((schedule, lease.unit, lease.attempt), lease).is_some();
                ensure!(!again, "{schedule:?}: {lease} was given twice");
            }
            Record::Failed { .. } => {}
        }
    }
    for layer in 0..LAYERS as u32 {
        let unit = Unit::Prune(LayerIndex(layer));
        ensure!(committed.contains_key(&(Schedule::Prune, unit)), "layer {layer} was never committed");
    }
    Ok(())
}

/// The perplexities in a run's report.
pub(crate) fn perplexity(run: &Path) -> Result<serde_json::Value> {
    let path = run.join("report.json");
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let report: serde_json::Value = serde_json::from_slice(&bytes)?;
    Ok(report["perplexity"].clone())
}

/// Whether a worker's log says that the coordinator numbered it so.
pub(crate) fn is_registered_as(log: &str, worker: WorkerId) -> bool {
    log.lines().any(|line| line.contains("registered") && line.contains(&format!("worker={worker} ")))
}

/// Files below a folder, if it is there.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The local worker process that the coordinator numbered `worker`: its log says so, its command line has its name.
pub(crate) fn process_of(run: &Path, children: &[u32], worker: WorkerId) -> Option<u32> {
    children.iter().copied().find(|process| {
        let command = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let name = command.split('\0').find(|argument| argument.starts_with("local-")).unwrap_or_default();
        let log = fs::read_to_string(run.join(format!("logs/{name}.log"))).unwrap_or_default();
        is_registered_as(&log, worker)
    })
}

/// A lease that is neither committed nor failed; the latest.
pub(crate) fn outstanding(run: &Path) -> Option<Lease> {
    let schedule = schedule(run);
    let ended = |lease: &Lease| {
        schedule.iter().any(|record| match record {
            Record::Committed { lease: other, .. } | Record::Failed { lease: other, .. } => other == lease,
            Record::Leased { .. } => false,
        })
    };
    let leased = schedule.iter().rev().filter_map(|record| match record {
        Record::Leased { lease } => Some(*lease),
        _ => None,
    });
    leased.into_iter().find(|lease| !ended(lease))
}
