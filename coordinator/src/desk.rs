//! The runs of a coordinator service: submitted, queued, run one after another, followed.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use espalier_common::clock::Clock;
use espalier_common::ids::RunId;
use espalier_common::job::JobSpec;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::{EventLog, Phase, RunEvent, RunStatus, Status, WorkerStatus};
use crate::fleet::Roster;
use crate::run::{Run, Setting};
use crate::schedule::Limits;

/// Jobs that may wait; more are refused.
const MAX_QUEUED: usize = 256;

/// One submitted job.
#[derive(Clone)]
pub struct Ticket {
    /// Names it towards its submitter; the run's own id is in its events.
    pub id: RunId,
    /// What happened so far.
    pub events: EventLog,
    job: JobSpec,
    folder: PathBuf,
    stop: CancellationToken,
}

#[derive(Default)]
struct Inner {
    tickets: BTreeMap<String, Ticket>,
    keys: BTreeMap<String, String>,
    queue: VecDeque<String>,
    order: Vec<String>,
}

/// Where jobs are submitted and run.
#[derive(Clone)]
pub struct JobDesk {
    inner: Arc<Mutex<Inner>>,
    wake: Arc<Notify>,
    roster: Roster,
    root: PathBuf,
    clock: Arc<dyn Clock>,
    workers_wanted: usize,
}

/// Why a job is not taken.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// It is wrong.
    #[error(transparent)]
    Job(#[from] espalier_common::job::JobError),
    /// It cannot be read.
    #[error("job: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// Too many wait already.
    #[error("{MAX_QUEUED} jobs are waiting already")]
    Full,
}

impl JobDesk {
    /// A desk whose runs live below `root`, unless a job says otherwise.
    pub fn new(roster: Roster, root: PathBuf, clock: Arc<dyn Clock>, workers_wanted: usize) -> Self {
        Self { inner: Arc::default(), wake: Arc::default(), roster, root, clock, workers_wanted }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding the desk")
    }

    /// Takes a job. The same key again returns the same ticket.
    ///
    /// # Errors
    /// See [`DeskError`].
    pub fn submit(&self, job_json: &str, key: &str, run_url: &str) -> Result<RunId, DeskError> {
        let job: JobSpec = serde_json::from_str(job_json)?;
        job.validate()?;
        let mut inner = self.lock();
        if let Some(id) = inner.keys.get(key).filter(|_| !key.is_empty()) {
            return Ok(RunId(id.clone()));
        }
        if inner.queue.len() >= MAX_QUEUED {
            return Err(DeskError::Full);
        }
        let id = format!("job-{}", inner.order.len() + 1);
        let folder = if run_url.is_empty() { self.root.join(&id) } else { PathBuf::from(run_url) };
        let ticket =
            Ticket { id: RunId(id.clone()), events: EventLog::default(), job, folder, stop: CancellationToken::new() };
        inner.keys.insert(key.to_owned(), id.clone());
        inner.tickets.insert(id.clone(), ticket);
        inner.queue.push_back(id.clone());
        inner.order.push(id.clone());
        self.wake.notify_one();
        Ok(RunId(id))
    }

    /// A ticket by its id.
    pub fn ticket(&self, id: &str) -> Option<Ticket> {
        self.lock().tickets.get(id).cloned()
    }

    /// Stops a run; false if there is none of that id.
    pub fn cancel(&self, id: &str) -> bool {
        let mut inner = self.lock();
        inner.queue.retain(|queued| queued != id);
        let Some(ticket) = inner.tickets.get(id) else { return false };
        ticket.stop.cancel();
        true
    }

    /// The coordinator at a glance.
    pub fn status(&self) -> Status {
        let inner = self.lock();
        let runs = inner.order.iter().filter_map(|id| inner.tickets.get(id)).map(run_status).collect();
        let workers = self.roster.members().into_iter().map(|(worker, member)| WorkerStatus {
            worker,
            offer: member.offer,
            peak_rss_bytes: member.peak_rss_bytes,
        });
        Status { runs, workers: workers.collect() }
    }

    /// Runs what is submitted, one job after another, until `stop` is set.
    pub async fn work(&self, stop: CancellationToken) {
        loop {
            let next = {
                let id = self.lock().queue.pop_front();
                id.and_then(|id| self.ticket(&id))
            };
            match next {
                Some(ticket) => {
                    let stop_run = ticket.stop.clone();
                    let run = self.run(&ticket);
                    tokio::pin!(run);
                    tokio::select! {
                        () = &mut run => {}
                        () = stop.cancelled() => {
                            stop_run.cancel();
                            run.await;
                            return;
                        }
                    }
                }
                None => tokio::select! {
                    () = self.wake.notified() => {}
                    () = stop.cancelled() => return,
                },
            }
        }
    }

    async fn run(&self, ticket: &Ticket) {
        let setting = Setting {
            folder: ticket.folder.clone(),
            roster: self.roster.clone(),
            workers_wanted: self.workers_wanted,
            events: ticket.events.clone(),
            clock: self.clock.clone(),
            limits: Limits::default(),
            stop: ticket.stop.clone(),
        };
        let job = ticket.job.clone();
        info!(job = %ticket.id, "run begins");
        let result = match Run::open(job, setting) {
            Ok(run) => run.execute().await,
            Err(error) => Err(error),
        };
        ticket.events.note(match result {
            Ok(report) => RunEvent::Finished { report: Box::new(report) },
            Err(error) => {
                let reason = error.one_line();
                warn!(job = %ticket.id, reason, "run ended");
                RunEvent::Ended { reason, exit_code: error.exit_code() }
            }
        });
    }
}

fn run_status(ticket: &Ticket) -> RunStatus {
    let mut status = RunStatus {
        run: ticket.id.clone(),
        model: ticket.job.model.source.clone(),
        state: "queued".to_owned(),
        committed: 0,
        layers: None,
    };
    for event in ticket.events.follow().0 {
        match event {
            RunEvent::Opened { committed, .. } => {
                status.state = "running".to_owned();
                status.committed = committed;
            }
            RunEvent::Phase { phase: Phase::Prune { layers } } => status.layers = Some(layers),
            RunEvent::Committed { unit: espalier_common::ids::Unit::Prune(_), .. } => status.committed += 1,
            RunEvent::Finished { .. } => status.state = "done".to_owned(),
            RunEvent::Ended { reason, .. } => status.state = reason,
            _ => {}
        }
    }
    status
}
