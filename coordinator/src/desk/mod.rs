//! The runs of a coordinator service: submitted, written down, queued, run one after another, followed.

mod book;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_common::clock::Clock;
use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::ids::RunId;
use espalier_common::job::JobSpec;
use espalier_common::store;
use espalier_gate::Tracer;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use book::{Book, End, Entry};

use crate::error::exit;
use crate::events::{EventLog, RunEvent, RunStatus, Status};
use crate::fleet::Roster;
use crate::http::{Watched, workers};
use crate::journal::JournalError;
use crate::metrics::CoordinatorMetrics;
use crate::plan::strategy::Asked;
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
    entry: Entry,
    stop: CancellationToken,
}

impl Ticket {
    fn new(entry: Entry, metrics: &CoordinatorMetrics) -> Self {
        let events = match entry.last_event() {
            // It ended in an earlier life, and was counted then.
            Some(last) => {
                let events = EventLog::default();
                events.note(last);
                events
            }
            None => EventLog::counted(metrics.clone()),
        };
        Self { id: entry.id.clone(), events, entry, stop: CancellationToken::new() }
    }
}

#[derive(Default)]
struct Inner {
    tickets: BTreeMap<String, Ticket>,
    keys: BTreeMap<String, String>,
    queue: VecDeque<String>,
    order: Vec<String>,
}

impl Inner {
    fn add(&mut self, ticket: Ticket) {
        let id = ticket.id.0.clone();
        if !ticket.entry.key.is_empty() {
            self.keys.insert(ticket.entry.key.clone(), id.clone());
        }
        if ticket.entry.end.is_none() {
            self.queue.push_back(id.clone());
        }
        if self.tickets.insert(id.clone(), ticket).is_none() {
            self.order.push(id);
        }
    }
}

/// Where jobs are submitted and run.
#[derive(Clone)]
pub struct JobDesk {
    inner: Arc<Mutex<Inner>>,
    /// Whose turn it is to submit.
    turn: Arc<Mutex<()>>,
    wake: Arc<Notify>,
    book: Book,
    roster: Roster,
    root: String,
    lost: CancellationToken,
    setup: Setup,
    metrics: CoordinatorMetrics,
}

/// What the runs of a desk have in common.
#[derive(Clone)]
pub struct Setup {
    /// Their time.
    pub clock: Arc<dyn Clock>,
    /// Workers that each waits for.
    pub workers_wanted: usize,
    /// How long it waits for them.
    pub workers_patience: Duration,
    /// Its patience.
    pub limits: Limits,
    /// How workers are to share the calibration, where a job does not say.
    pub strategy: Option<Asked>,
    /// What their spans are told to.
    pub tracer: Tracer,
}

/// Why a job is not taken, or the desk not opened.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// The job is wrong.
    #[error(transparent)]
    Job(#[from] espalier_common::job::JobError),
    /// The job cannot be read.
    #[error("job: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// Too many wait already.
    #[error("{MAX_QUEUED} jobs are waiting already")]
    Full,
    /// The coordinator was started for another job.
    #[error("this coordinator was started for one job, and takes no other")]
    OneJob,
    /// The job cannot be written down.
    #[error(transparent)]
    Store(#[from] espalier_common::store::StoreError),
    /// The root of the runs cannot be used.
    #[error("runs folder {}", path.display())]
    Root {
        /// The folder, or the file in it.
        path: std::path::PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// Another coordinator serves from this root.
    #[error("runs folder {root} is in use by another coordinator: {holder}")]
    Busy {
        /// The root.
        root: String,
        /// The process that holds it, as far as the system tells.
        holder: String,
    },
    /// The record of the jobs in an object store.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl DeskError {
    /// Whether submitting the same again may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Full | Self::Root { .. } | Self::Busy { .. } => true,
            Self::Store(error) => !matches!(error.class(), FaultClass::Reject),
            Self::Journal(error) => !matches!(error.class(), FaultClass::Reject),
            Self::Job(_) | Self::Unreadable(_) | Self::OneJob => false,
        }
    }
}

impl JobDesk {
    /// Opens the desk whose runs live below `root`, unless a job says otherwise. Jobs that an earlier coordinator left
    /// unfinished are queued again; what they committed stays committed.
    ///
    /// # Errors
    /// See [`DeskError`].
    pub fn open(roster: Roster, root: String, setup: Setup, metrics: CoordinatorMetrics) -> Result<Self, DeskError> {
        let (book, entries) = Book::open(&root)?;
        for entry in entries.iter().filter(|entry| entry.end.is_none()) {
            info!(job = %entry.id, "taken up again");
        }
        Ok(Self::over(book, entries, roster, root, setup, metrics))
    }

    /// A desk for one job, whose run is at `run_url`, and the job's events. It takes no other; nothing is written but the run
    /// itself.
    ///
    /// # Errors
    /// `Job`.
    pub fn of_one(
        roster: Roster,
        job: JobSpec,
        run_url: String,
        setup: Setup,
        metrics: CoordinatorMetrics,
    ) -> Result<(Self, EventLog), DeskError> {
        job.validate()?;
        let id = RunId("job-1".to_owned());
        let entry = Entry { id: id.clone(), key: key_of(&job), job, folder: run_url, strategy: None, end: None };
        let desk = Self::over(Book::OneJob, vec![entry], roster, String::new(), setup, metrics);
        let events = desk.ticket(&id.0).map(|ticket| ticket.events).unwrap_or_default();
        Ok((desk, events))
    }

    fn over(
        book: Book,
        entries: Vec<Entry>,
        roster: Roster,
        root: String,
        setup: Setup,
        metrics: CoordinatorMetrics,
    ) -> Self {
        let mut inner = Inner::default();
        for entry in entries {
            inner.add(Ticket::new(entry, &metrics));
        }
        let inner = Arc::new(Mutex::new(inner));
        let lost = CancellationToken::new();
        Self { inner, turn: Arc::default(), wake: Arc::default(), book, roster, root, lost, setup, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding the desk")
    }

    /// Takes a job; it is written down when this returns. The same key again returns the same ticket, and queues it again if
    /// it ended badly.
    ///
    /// # Errors
    /// See [`DeskError`].
    pub fn submit(
        &self,
        job_json: &str,
        key: &str,
        run_url: &str,
        strategy: Option<Asked>,
    ) -> Result<RunId, DeskError> {
        let job: JobSpec = serde_json::from_str(job_json)?;
        job.validate()?;
        // Numbers are given in turn; meanwhile nobody else waits for what may be a slow store.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = {
            let inner = self.lock();
            let known = inner.keys.get(key).and_then(|id| inner.tickets.get(id)).map(|ticket| ticket.entry.clone());
            let entry = match known {
                Some(entry) if matches!(entry.end, Some(End::Ended { .. })) && !self.is_of_one() => {
                    Entry { end: None, strategy: strategy.or(entry.strategy), ..entry }
                }
                Some(entry) => return Ok(entry.id),
                None if self.is_of_one() => return Err(DeskError::OneJob),
                None => {
                    let id = RunId(format!("job-{}", inner.order.len() + 1));
                    let folder = if run_url.is_empty() { store::join(&self.root, &id.0) } else { run_url.to_owned() };
                    Entry { id, key: key.to_owned(), job, folder, strategy, end: None }
                }
            };
            if inner.queue.len() >= MAX_QUEUED {
                return Err(DeskError::Full);
            }
            entry
        };
        self.write(&entry)?;
        let id = entry.id.clone();
        self.lock().add(Ticket::new(entry, &self.metrics));
        self.wake.notify_one();
        Ok(id)
    }

    fn is_of_one(&self) -> bool {
        matches!(self.book, Book::OneJob)
    }

    /// Set once another coordinator has taken over the root of the runs: this one has nothing left to do.
    pub fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    fn write(&self, entry: &Entry) -> Result<(), DeskError> {
        let written = self.book.write(entry);
        if let Err(DeskError::Journal(JournalError::Fenced { .. })) = &written {
            self.lost.cancel();
        }
        written
    }

    /// A ticket by its id.
    pub fn ticket(&self, id: &str) -> Option<Ticket> {
        self.lock().tickets.get(id).cloned()
    }

    /// Stops a run; false if there is none of that id.
    pub fn cancel(&self, id: &str) -> bool {
        let Some(ticket) = self.ticket(id) else { return false };
        let was_queued = {
            let mut inner = self.lock();
            let before = inner.queue.len();
            inner.queue.retain(|queued| queued != id);
            inner.queue.len() < before
        };
        ticket.stop.cancel();
        if was_queued {
            self.close(&ticket, RunEvent::Ended { reason: "cancelled".to_owned(), exit_code: exit::INTERRUPTED });
        }
        true
    }

    /// The coordinator at a glance.
    pub fn status(&self) -> Status {
        let inner = self.lock();
        let runs = inner.order.iter().filter_map(|id| inner.tickets.get(id)).map(run_status).collect();
        Status { runs, workers: workers(&self.roster) }
    }

    /// Runs what is submitted, one job after another, until `stop` is set. The run that this interrupts is not ended: the
    /// next coordinator goes on with it.
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
                        last = &mut run => self.close(&ticket, last),
                        () = stop.cancelled() => {
                            stop_run.cancel();
                            match run.await {
                                last @ RunEvent::Finished { .. } => self.close(&ticket, last),
                                last => ticket.events.note(last),
                            }
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

    /// Runs what is queued first, to its last event or until `stop` is set. Whoever cancelled the job does not want it tried
    /// again: it ends as one that was refused.
    pub async fn work_on_one(&self, stop: &CancellationToken) -> RunEvent {
        let cancelled = || RunEvent::Ended { reason: "cancelled".to_owned(), exit_code: exit::REJECTED };
        let next = self.lock().queue.pop_front();
        let Some(ticket) = next.and_then(|id| self.ticket(&id)) else { return cancelled() };
        let run = self.run(&ticket);
        tokio::pin!(run);
        let last = tokio::select! {
            last = &mut run => last,
            () = stop.cancelled() => {
                ticket.stop.cancel();
                run.await
            }
        };
        let last = match last {
            RunEvent::Ended { .. } if ticket.stop.is_cancelled() && !stop.is_cancelled() => cancelled(),
            last => last,
        };
        self.close(&ticket, last.clone());
        last
    }

    /// Runs a job to its last event.
    async fn run(&self, ticket: &Ticket) -> RunEvent {
        let setting = Setting {
            run_url: ticket.entry.folder.clone(),
            roster: self.roster.clone(),
            workers_wanted: self.setup.workers_wanted,
            workers_patience: self.setup.workers_patience,
            events: ticket.events.clone(),
            clock: self.setup.clock.clone(),
            limits: self.setup.limits,
            strategy: ticket.entry.strategy.or(self.setup.strategy),
            workers_return: true,
            stop: ticket.stop.clone(),
            tracer: self.setup.tracer.clone(),
        };
        let job = ticket.entry.job.clone();
        info!(job = %ticket.id, "run begins");
        let result = match Run::open(job, setting) {
            Ok(run) => run.execute().await,
            Err(error) => Err(error),
        };
        match result {
            Ok(report) => RunEvent::Finished { report: Box::new(report) },
            Err(error) => {
                let reason = error.one_line();
                warn!(job = %ticket.id, reason, "run ended");
                RunEvent::Ended { reason, exit_code: error.exit_code() }
            }
        }
    }

    /// Writes down how a job ended, and then tells its followers.
    fn close(&self, ticket: &Ticket, last: RunEvent) {
        let end = match &last {
            RunEvent::Ended { reason, exit_code } => End::Ended { reason: reason.clone(), exit_code: *exit_code },
            _ => End::Finished,
        };
        let entry = Entry { end: Some(end), ..ticket.entry.clone() };
        if let Err(error) = self.write(&entry) {
            // It will be run again, and found finished by its own journal.
            warn!(job = %ticket.id, %error, "the end of the job was not written down");
        }
        if let Some(kept) = self.lock().tickets.get_mut(&ticket.id.0) {
            kept.entry = entry;
        }
        ticket.events.note(last);
    }
}

/// Names a job towards its submitter: the same job to the same output is the same job.
pub fn key_of(job: &JobSpec) -> String {
    Digest::of(serde_json::to_string(job).expect("a job is plain data").as_bytes()).to_string()
}

impl Watched for JobDesk {
    fn status(&self) -> Status {
        Self::status(self)
    }

    fn events(&self, run: &str) -> Option<EventLog> {
        self.ticket(run).map(|ticket| ticket.events)
    }
}

fn run_status(ticket: &Ticket) -> RunStatus {
    ticket.events.look(|view| view.status(&ticket.id.0, &ticket.entry.job.model.source))
}
