//! The one loop: event → `schedule.step` → journal → carry out actions, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use espalier_common::clock::Clock;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::report::{Artifact, Outcome};
use espalier_common::store::{BlobStore, StoreError};
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::{Source, SourceFrom};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::{EventLog, RunEvent};
use crate::fleet::{CallError, FleetEvent, Roster, UnitCall};
use crate::journal::{Journal, JournalError, JournalRecord};
use crate::plan::megaflops;
use crate::schedule::{Action, Event, Failure, Origin, Record, Scheduler};

/// How often time passes for the scheduler.
const TICK: Duration = Duration::from_millis(500);
/// Answers of calls that may wait for the loop: one a worker is the usual number.
const PENDING_ANSWERS: usize = 64;

/// Why a schedule was not brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The scheduler gave up.
    #[error("{}", describe(.0))]
    Failed(Failure),
    /// A worker says that nobody can do this job.
    #[error("{0}")]
    Rejected(Fault),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The journal cannot be written: nothing further would be safe.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

fn describe(failure: &Failure) -> String {
    match failure {
        Failure::Unit { lease, fault, attempts } => {
            let tries = if *attempts > 1 { format!(" after {attempts} attempts") } else { String::new() };
            format!("{} failed{tries}, last on worker {}: {}", lease.unit, lease.worker, fault.message)
        }
        Failure::NoWorkers { waited_seconds } => {
            format!("every worker is gone, and none came back in {waited_seconds} s")
        }
    }
}

/// What a schedule is driven for: how its records are journaled and its units called.
pub trait Purpose: Send + Sync {
    /// Wraps a record of the scheduler for the journal.
    fn record(&self, record: Record) -> JournalRecord;
    /// What the worker of a lease must be told.
    fn call(&self, lease: Lease, source: Source, keeps_output: bool, assistants: Vec<String>) -> UnitCall;
    /// What a worker must be told before its first unit; `None` if nothing.
    fn preparation(&self) -> Option<Preparation>;
}

/// What `Prepare` needs.
#[derive(Debug, Clone)]
pub struct Preparation {
    /// The job, as JSON.
    pub job_json: String,
    /// The run's store.
    pub run_url: String,
    /// The calibration tokens.
    pub tokens: Artifact,
}

/// Everything the loop works with.
pub struct Driver<'a> {
    /// The run.
    pub run: &'a RunId,
    /// Its workers.
    pub roster: &'a Roster,
    /// Its memory.
    pub journal: &'a mut dyn Journal,
    /// Its followers.
    pub events: &'a EventLog,
    /// Its time.
    pub clock: &'a dyn Clock,
    /// Set when somebody wants it to stop.
    pub stop: &'a CancellationToken,
    /// Layers committed so far.
    pub committed: BTreeMap<LayerIndex, Artifact>,
    /// Boundaries that committed layers left in the store.
    pub stored: BTreeMap<Boundary, Artifact>,
    /// The run's store.
    pub store: Arc<dyn BlobStore>,
}

/// What the loop's own tasks tell it.
enum Answer {
    Prepared(WorkerId, Result<(), CallError>),
    NotStarted(Lease, Fault),
}

impl Driver<'_> {
    /// Brings a schedule to its end. Returns the outcome of every unit that was committed on the way.
    ///
    /// # Errors
    /// See [`DriveError`]; what was committed stays committed.
    pub async fn drive(
        &mut self,
        scheduler: Scheduler,
        purpose: Arc<dyn Purpose>,
    ) -> Result<BTreeMap<Unit, Outcome>, DriveError> {
        let mut scheduler = scheduler.starting_at(self.clock.now());
        let calls = TaskGroup::new();
        let result = self.steps(&mut scheduler, &purpose, &calls).await;
        calls.shut_down(Duration::from_secs(5)).await;
        result
    }

    async fn steps(
        &mut self,
        scheduler: &mut Scheduler,
        purpose: &Arc<dyn Purpose>,
        calls: &TaskGroup,
    ) -> Result<BTreeMap<Unit, Outcome>, DriveError> {
        let (present, mut fleet) = self.roster.listen();
        let (answer, mut answers) = mpsc::channel(PENDING_ANSWERS);
        let mut outcomes = BTreeMap::new();
        // Those that are there from the beginning are waited for, but no longer than to the next tick.
        let mut awaited = BTreeSet::new();
        for worker in present {
            awaited.insert(worker);
            self.prepare(worker, purpose, calls, &answer);
        }
        let mut ticks = tokio::time::interval(TICK);
        // The first step also ends a schedule in which nothing is left to do.
        let mut event = Some(Event::Tick { now: self.clock.now() });
        loop {
            if let Some(event) = event.take() {
                let there: Vec<WorkerId> = scheduler.workers().collect();
                let is_tick = matches!(event, Event::Tick { .. });
                let actions = scheduler.step(event);
                if is_tick {
                    self.forget_silent(&there, scheduler);
                }
                for action in actions {
                    match action {
                        Action::Finish => return Ok(outcomes),
                        Action::Fail(failure) => return Err(DriveError::Failed(failure)),
                        action => self.carry_out(action, purpose, calls, &answer, &mut outcomes)?,
                    }
                }
            }
            event = tokio::select! {
                () = self.stop.cancelled() => return Err(DriveError::Interrupted),
                _ = ticks.tick() => Some(Event::Tick { now: self.clock.now() }),
                Some(said) = fleet.recv() => self.hear(said, purpose, calls, &answer),
                Some(answered) = answers.recv() => {
                    if let Answer::Prepared(worker, _) = &answered {
                        awaited.remove(worker);
                    }
                    self.take_answer(answered, !awaited.is_empty())?
                }
            };
        }
    }

    fn name_of(&self, worker: WorkerId) -> String {
        self.roster.everyone().get(&worker).map_or_else(|| format!("worker {worker}"), |m| m.offer.name.clone())
    }

    /// Workers that the scheduler gave up on when time passed. One that only paused registers again.
    fn forget_silent(&self, there: &[WorkerId], scheduler: &Scheduler) {
        let left: BTreeSet<WorkerId> = scheduler.workers().collect();
        for &worker in there.iter().filter(|worker| !left.contains(worker)) {
            let name = self.name_of(worker);
            warn!(%worker, name, "worker is silent");
            self.roster.forget(worker);
            self.events.note(RunEvent::WorkerLost { worker, name, reason: "it is silent".to_owned() });
        }
    }

    fn hear(
        &self,
        said: FleetEvent,
        purpose: &Arc<dyn Purpose>,
        calls: &TaskGroup,
        answer: &mpsc::Sender<Answer>,
    ) -> Option<Event> {
        match said {
            FleetEvent::Joined(worker) => {
                self.prepare(worker, purpose, calls, answer);
                None
            }
            FleetEvent::Lost(worker) => {
                let name = self.name_of(worker);
                warn!(%worker, name, "worker lost");
                self.events.note(RunEvent::WorkerLost { worker, name, reason: "it is gone".to_owned() });
                Some(Event::WorkerLost { worker })
            }
            FleetEvent::Heartbeat { worker, progress } => {
                for (lease, phase, done, total) in progress {
                    self.events.note(RunEvent::Progress { unit: lease.unit, worker, phase, done, total });
                }
                Some(Event::Heartbeat { worker })
            }
            FleetEvent::Report { run, lease, result, held } if run == *self.run => Some(match *result {
                Ok(outcome) => Event::UnitDone { lease, outcome, held },
                Err(fault) => Event::UnitFailed { lease, fault },
            }),
            FleetEvent::Report { .. } => None,
        }
    }

    fn take_answer(&self, answer: Answer, more_come: bool) -> Result<Option<Event>, DriveError> {
        Ok(match answer {
            Answer::Prepared(worker, Ok(())) => {
                let name = self.name_of(worker);
                info!(%worker, name, "worker ready");
                self.events.note(RunEvent::WorkerJoined { worker, name });
                let speed = self.roster.member(worker).map_or(0, |member| megaflops(member.offer.gflops));
                Some(Event::WorkerJoined { worker, speed, more_come })
            }
            Answer::Prepared(_, Err(CallError::Fault(fault))) if fault.class == FaultClass::Reject => {
                return Err(DriveError::Rejected(fault));
            }
            Answer::Prepared(worker, Err(error)) => {
                let (name, reason) = (self.name_of(worker), error.to_string());
                warn!(%worker, name, reason, "worker cannot be used");
                if matches!(error, CallError::Unreachable { .. }) {
                    // If it lives, it registers again and is asked again.
                    self.roster.forget(worker);
                }
                self.events.note(RunEvent::WorkerLost { worker, name, reason });
                None
            }
            Answer::NotStarted(lease, fault) => Some(Event::UnitFailed { lease, fault }),
        })
    }

    fn prepare(&self, worker: WorkerId, purpose: &Arc<dyn Purpose>, calls: &TaskGroup, answer: &mpsc::Sender<Answer>) {
        let Some(member) = self.roster.member(worker) else { return };
        let (run, answer, preparation) = (self.run.clone(), answer.clone(), purpose.preparation());
        calls.spawn(async move {
            let result = match preparation {
                Some(p) => member.client.prepare(&run, p.job_json, p.run_url, p.tokens).await,
                None => Ok(()),
            };
            // The loop may have ended meanwhile.
            let _ = answer.send(Answer::Prepared(worker, result)).await;
        });
    }

    fn carry_out(
        &mut self,
        action: Action,
        purpose: &Arc<dyn Purpose>,
        calls: &TaskGroup,
        answer: &mpsc::Sender<Answer>,
        outcomes: &mut BTreeMap<Unit, Outcome>,
    ) -> Result<(), DriveError> {
        match action {
            Action::Record(record) => self.record(record, purpose.as_ref(), outcomes)?,
            Action::Start { lease, origin, keeps_output, assistants } => {
                let call = self.call(lease, origin, keeps_output, &assistants, purpose.as_ref());
                self.start(lease, call, calls, answer);
            }
            Action::Discard { boundary } => {
                let store = Arc::clone(&self.store);
                calls.spawn(async move {
                    let discarded = tokio::task::spawn_blocking(move || discard(store.as_ref(), boundary)).await;
                    if let Ok(Err(error)) = discarded {
                        // It goes with the run at the latest.
                        warn!(%boundary, %error, "stored hidden states were not deleted");
                    }
                });
            }
            Action::Release { worker, boundaries } => {
                if let Some(member) = self.roster.member(worker) {
                    let run = self.run.clone();
                    calls.spawn(async move {
                        if let Err(error) = member.client.release(&run, &boundaries).await {
                            warn!(%worker, %error, "hidden states were not released");
                        }
                    });
                }
            }
            Action::Finish | Action::Fail(_) => {}
        }
        Ok(())
    }

    fn record(
        &mut self,
        record: Record,
        purpose: &dyn Purpose,
        outcomes: &mut BTreeMap<Unit, Outcome>,
    ) -> Result<(), DriveError> {
        self.journal.append(&purpose.record(record.clone()))?;
        self.events.note(match &record {
            Record::Leased { lease } => RunEvent::Started { unit: lease.unit, worker: lease.worker },
            Record::Committed { lease, outcome } => {
                RunEvent::Committed { unit: lease.unit, worker: lease.worker, mean_error: mean_error(outcome) }
            }
            Record::Failed { lease, fault } => {
                warn!(%lease, fault = fault.message, "unit failed");
                RunEvent::Failed { unit: lease.unit, worker: lease.worker, reason: fault.message.clone() }
            }
        });
        if let Record::Committed { lease, outcome } = record {
            if let (Unit::Prune(layer), Outcome::Pruned { artifact, boundary, .. }) = (lease.unit, &outcome) {
                self.committed.insert(layer, artifact.clone());
                self.stored.extend(boundary.clone().map(|boundary| (Boundary(layer.0 + 1), boundary)));
            }
            outcomes.insert(lease.unit, outcome);
        }
        Ok(())
    }

    fn start(&self, lease: Lease, call: Option<UnitCall>, calls: &TaskGroup, answer: &mpsc::Sender<Answer>) {
        // A worker that is not there any more will be reported as lost; its leases go with it.
        let Some((member, call)) = self.roster.member(lease.worker).zip(call) else { return };
        let (run, answer) = (self.run.clone(), answer.clone());
        calls.spawn(async move {
            if let Err(error) = member.client.start(&run, lease, call).await {
                let _ = answer.send(Answer::NotStarted(lease, error.into_fault())).await;
            }
        });
    }

    /// What a unit's worker is told; `None` if the holder of its input is gone, which the roster reports.
    fn call(
        &self,
        lease: Lease,
        origin: Origin,
        keeps_output: bool,
        assistants: &[WorkerId],
        purpose: &dyn Purpose,
    ) -> Option<UnitCall> {
        let source = self.source(lease, origin)?;
        let everyone = self.roster.everyone();
        let there = assistants.iter().filter_map(|worker| everyone.get(worker));
        let endpoints = there.map(|member| member.offer.endpoint.clone()).collect();
        Some(purpose.call(lease, source, keeps_output, endpoints))
    }

    /// Turns the scheduler's origin into what a worker can use; `None` if the holder is gone, which the roster reports.
    fn source(&self, lease: Lease, origin: Origin) -> Option<Source> {
        let from = match origin {
            Origin::Tokens => SourceFrom::Tokens,
            Origin::Held { boundary, by } if by == lease.worker => SourceFrom::Held(boundary),
            Origin::Held { boundary, by } => {
                SourceFrom::Peer { endpoint: self.roster.everyone().get(&by)?.offer.endpoint.clone(), boundary }
            }
            Origin::Stored { boundary } => {
                SourceFrom::Stored { boundary, artifact: self.stored.get(&boundary)?.clone() }
            }
        };
        let replay = match lease.unit {
            Unit::Prune(layer) => self
                .committed
                .range(LayerIndex(origin.boundary().0)..layer)
                .map(|(_, artifact)| artifact.clone())
                .collect(),
            Unit::Forward(_) | Unit::Evaluate(_) => Vec::new(),
        };
        Some(Source { from, replay })
    }
}

/// Deletes what is stored of a boundary.
fn discard(store: &dyn BlobStore, boundary: Boundary) -> Result<(), StoreError> {
    for name in store.list(&format!("activations/{:05}", boundary.0))? {
        store.delete(&name)?;
    }
    Ok(())
}

fn mean_error(outcome: &Outcome) -> Option<f64> {
    match outcome {
        Outcome::Pruned { sublayers, .. } if !sublayers.is_empty() => {
            Some(sublayers.iter().map(|sublayer| sublayer.rel_error).sum::<f64>() / sublayers.len() as f64)
        }
        _ => None,
    }
}
