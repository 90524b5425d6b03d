//! The jobs that a coordinator was given, written down so that a restarted coordinator goes on with them: in a folder one file
//! a job, in an object store a record of what became of each.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use espalier_common::config;
use espalier_common::ids::RunId;
use espalier_common::job::JobSpec;
use espalier_common::store::BlobStore;
use serde::{Deserialize, Serialize};

use super::DeskError;
use crate::events::RunEvent;
use crate::journal::fenced::{Appended, FencedLog, TakenOver};
use crate::journal::holder;
use crate::plan::strategy::Asked;
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
    /// The run's folder or URL.
    pub(super) folder: String,
    /// How its workers are to share the calibration, if its submitter said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) strategy: Option<Asked>,
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
                    reason: format!("done, but its report is no longer in {}", self.folder),
                    exit_code: crate::error::exit::INTERRUPTED,
                },
            }),
        }
    }

    fn report(&self) -> Option<Report> {
        let store = config::open_store(&self.folder).ok()?;
        serde_json::from_slice(&store.get("report.json").ok()?).ok()
    }
}

/// The jobs. Nobody else writes them: in a folder they are locked while this lives, in an object store whoever wrote them
/// before is fenced; for two coordinators on one root would run every job twice.
#[derive(Debug, Clone)]
pub(super) enum Book {
    /// One file a job, and the file that is locked.
    Files { store: Arc<dyn BlobStore>, _lock: Arc<File> },
    /// The latest record of a job counts.
    Records(Arc<Mutex<FencedLog>>),
    /// One job, which is given anew with each start: its run's own journal remembers all there is.
    OneJob,
}

/// What is appended in an object store.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BookRecord {
    TakenOver(TakenOver),
    Job(Box<Entry>),
}

impl Appended for BookRecord {
    fn taking_over(taken: TakenOver) -> Self {
        Self::TakenOver(taken)
    }

    fn as_taken_over(&self) -> Option<&TakenOver> {
        match self {
            Self::TakenOver(taken) => Some(taken),
            Self::Job(_) => None,
        }
    }
}

impl Book {
    /// Opens the book at `root`, and reads what is in it, oldest first.
    ///
    /// # Errors
    /// `Busy` if another coordinator has it open, `Store`, `Root`, `Unreadable`, `Journal`.
    pub(super) fn open(root: &str) -> Result<(Self, Vec<Entry>), DeskError> {
        let store = config::open_store(root)?;
        let (book, mut entries) = match store.directory().map(Path::to_owned) {
            Some(directory) => Self::open_files(store, &directory)?,
            None => Self::open_records(store)?,
        };
        // Numbers have no leading zeros: the shorter name is the older one.
        entries.sort_by_key(|entry| (entry.id.0.len(), entry.id.0.clone()));
        Ok((book, entries))
    }

    fn open_files(store: Arc<dyn BlobStore>, root: &Path) -> Result<(Self, Vec<Entry>), DeskError> {
        let path = root.join("lock");
        let failed = |source| DeskError::Root { path: path.clone(), source };
        std::fs::create_dir_all(root).map_err(failed)?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(DeskError::Busy { root: root.display().to_string(), holder: holder::of(&lock) });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let mut entries = Vec::new();
        for name in store.list(JOBS)? {
            entries.push(serde_json::from_slice(&store.get(&name)?)?);
        }
        Ok((Self::Files { store, _lock: Arc::new(lock) }, entries))
    }

    fn open_records(store: Arc<dyn BlobStore>) -> Result<(Self, Vec<Entry>), DeskError> {
        let (log, records) = FencedLog::open(store, JOBS)?;
        let mut latest = BTreeMap::new();
        for record in records {
            if let BookRecord::Job(entry) = record {
                latest.insert(entry.id.0.clone(), *entry);
            }
        }
        Ok((Self::Records(Arc::new(Mutex::new(log))), latest.into_values().collect()))
    }

    /// Writes a job down; it is durable when this returns.
    ///
    /// # Errors
    /// `Store`; `Journal` if another coordinator has taken over.
    pub(super) fn write(&self, entry: &Entry) -> Result<(), DeskError> {
        match self {
            Self::Files { store, .. } => {
                let json = serde_json::to_vec_pretty(entry).expect("a job is plain data");
                Ok(store.put(&format!("{JOBS}/{}.json", entry.id), &json)?)
            }
            Self::Records(log) => {
                // A writer that panicked has left the log at a record's end, or ended.
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(log.append(&BookRecord::Job(Box::new(entry.clone())))?)
            }
            Self::OneJob => Ok(()),
        }
    }
}
