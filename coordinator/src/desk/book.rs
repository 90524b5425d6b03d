//! The jobs that a coordinator was given, on disk: one file a job, so that a restarted coordinator goes on with them.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use espalier_common::ids::RunId;
use espalier_common::job::JobSpec;
use espalier_common::store::{BlobStore, LocalStore};
use serde::{Deserialize, Serialize};

use super::DeskError;
use crate::events::RunEvent;
use crate::report::Report;

/// Folder of the jobs' files below the runs' root.
const JOBS: &str = "jobs";

/// One job as it is written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// The ticket.
    pub(super) id: RunId,
    /// Names the job towards its submitter; empty if it gave none.
    pub(super) key: String,
    /// The job, whole.
    pub(super) job: JobSpec,
    /// The run's folder.
    pub(super) folder: PathBuf,
    /// How it ended, if it did.
    pub(super) end: Option<End>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum End {
    /// Well: the report is in the run's folder.
    Finished,
    /// Badly, or because somebody cancelled it.
    Ended {
        /// One line for people.
        reason: String,
        /// The exit code it amounts to.
        exit_code: u8,
    },
}

impl Entry {
    /// The last event of a job that has ended.
    pub(super) fn last_event(&self) -> Option<RunEvent> {
        match self.end.clone()? {
            End::Ended { reason, exit_code } => Some(RunEvent::Ended { reason, exit_code }),
            End::Finished => Some(match self.report() {
                Some(report) => RunEvent::Finished { report: Box::new(report) },
                None => RunEvent::Ended {
                    reason: format!("done, but its report is no longer in {}", self.folder.display()),
                    exit_code: crate::error::exit::INTERRUPTED,
                },
            }),
        }
    }

    fn report(&self) -> Option<Report> {
        serde_json::from_slice(&std::fs::read(self.folder.join("report.json")).ok()?).ok()
    }
}

/// The files. Locked while this lives: two coordinators on one root would run every job twice.
#[derive(Debug, Clone)]
pub(super) struct Book {
    store: Arc<LocalStore>,
    _lock: Arc<File>,
}

impl Book {
    /// Opens the book below `root`, and reads what is in it, oldest first.
    ///
    /// # Errors
    /// `Busy` if another coordinator has it open, `Store`, `Root`, `Unreadable`.
    pub(super) fn open(root: &Path) -> Result<(Self, Vec<Entry>), DeskError> {
        let store = LocalStore::open(root)?;
        let path = root.join("lock");
        let failed = |source| DeskError::Root { path: path.clone(), source };
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(DeskError::Busy { root: root.to_owned() }),
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let mut entries = Vec::new();
        for name in store.list(JOBS)? {
            let entry: Entry = serde_json::from_slice(&store.get(&name)?)?;
            entries.push(entry);
        }
        // Numbers have no leading zeros: the shorter name is the older one.
        entries.sort_by_key(|entry| (entry.id.0.len(), entry.id.0.clone()));
        Ok((Self { store: Arc::new(store), _lock: Arc::new(lock) }, entries))
    }

    /// Writes a job down; it is durable when this returns.
    ///
    /// # Errors
    /// `Store`.
    pub(super) fn write(&self, entry: &Entry) -> Result<(), DeskError> {
        let json = serde_json::to_vec_pretty(entry).expect("a job is plain data");
        Ok(self.store.put(&format!("{JOBS}/{}.json", entry.id), &json)?)
    }
}
