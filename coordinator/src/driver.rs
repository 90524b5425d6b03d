//! The one loop: event → `schedule.step` → journal → carry out actions, in order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::clock::Clock;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::report::{Artifact, Outcome};
use espalier_common::store::{BlobStore, StoreError};
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::{Shares, Source, SourceFrom};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::{EventLog, RunEvent};
use crate::fleet::{CallError, FleetEvent, Help, Roster, UnitCall};
use crate::journal::{Journal, JournalError, JournalRecord};
use crate::plan::megaflops;
use crate::report::entry;
use crate::schedule::{Action, Event, Failure, Origin, Record, Scheduler};
use crate::trace::UnitSpans;

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
    fn call(&self, lease: Lease, source: Source, keeps_output: bool, help: Help) -> UnitCall;
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
    /// Whether its workers are equally fast, whatever they measured: those of one machine measure themselves at the same
    /// moment, and get in each other's way.
    pub alike: bool,
    /// Set when somebody wants it to stop.
    pub stop: &'a CancellationToken,
    /// Layers committed so far.
    pub committed: BTreeMap<LayerIndex, Artifact>,
    /// Boundaries that committed layers left in the store.
    pub stored: BTreeMap<Boundary, Artifact>,
    /// The run's store.
    pub store: Arc<dyn BlobStore>,
    /// The spans of its units.
    pub trace: UnitSpans,
}

/// What the loop's own tasks tell it.
enum Answer {
    Prepared(WorkerId, Result<(), CallError>),
    NotStarted(Lease, Fault),
}

impl Answer {
    fn prepared(&self) -> Option<WorkerId> {
        match self {
            Self::Prepared(worker, _) => Some(*worker),
            Self::NotStarted(..) => None,
        }
    }
}

/// The workers that are there when a schedule begins join it together: which of them answered first must not decide who gets
/// what.
struct RollCall {
    awaited: BTreeSet<WorkerId>,
    joined: BTreeMap<WorkerId, Event>,
}

impl RollCall {
    fn of(present: &[WorkerId]) -> Self {
        Self { awaited: present.iter().copied().collect(), joined: BTreeMap::new() }
    }

    fn is_over(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Takes a worker that is gone off the list; gives the events that are due now.
    fn strike(&mut self, worker: WorkerId) -> Vec<Event> {
        self.joined.remove(&worker);
        self.note(Some(worker), None)
    }

    /// Notes that a worker answered; gives the events that are due now.
    fn note(&mut self, answered: Option<WorkerId>, event: Option<Event>) -> Vec<Event> {
        if self.is_over() {
            return event.into_iter().collect();
        }
        let mut due = Vec::new();
        match (answered, event) {
            (Some(worker), Some(event)) => drop(self.joined.insert(worker, event)),
            (_, event) => due.extend(event),
        }
        if let Some(worker) = answered {
            self.awaited.remove(&worker);
        }
        if self.is_over() {
            let last = self.joined.last_key_value().map(|(worker, _)| *worker);
            for (worker, mut event) in std::mem::take(&mut self.joined) {
                if let Event::WorkerJoined { more_come, .. } = &mut event {
                    *more_come = Some(worker) != last;
                }
                due.push(event);
            }
        }
        due
    }
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
        if let Err(error) = &result {
            self.trace.end(&error.to_string());
        }
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
        let mut roll_call = RollCall::of(&present);
        for worker in present {
            self.prepare(worker, purpose, calls, &answer);
        }
        let mut ticks = tokio::time::interval(TICK);
        // The first step also ends a schedule in which nothing is left to do.
        let mut due = VecDeque::from([Event::Tick { now: self.clock.now() }]);
        loop {
            let busy = self.events.busy();
            while let Some(event) = due.pop_front() {
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
            drop(busy);
            tokio::select! {
                () = self.stop.cancelled() => return Err(DriveError::Interrupted),
                // Patience for workers begins once those that are there have answered; each call has a deadline of its own.
                _ = ticks.tick(), if roll_call.is_over() => due.push_back(Event::Tick { now: self.clock.now() }),
                Some(said) = fleet.recv() => {
                    if let FleetEvent::Lost(worker) = said {
                        due.extend(roll_call.strike(worker));
                    }
                    due.extend(self.hear(said, purpose, calls, &answer));
                }
                Some(answered) = answers.recv() => {
                    let who = answered.prepared();
                    let event = self.take_answer(answered)?;
                    due.extend(roll_call.note(who, event));
                }
            }
        }
    }

    fn name_of(&self, worker: WorkerId) -> String {
        name_of(self.roster, worker)
    }

    /// Workers that the scheduler gave up on when time passed. One that only paused registers again.
    fn forget_silent(&mut self, there: &[WorkerId], scheduler: &Scheduler) {
        let left: BTreeSet<WorkerId> = scheduler.workers().collect();
        for &worker in there.iter().filter(|worker| !left.contains(worker)) {
            let name = self.name_of(worker);
            warn!(%worker, name, "worker is silent");
            self.roster.forget(worker);
            self.trace.lose(worker, "it is silent");
            self.events.note(RunEvent::WorkerLost { worker, name, reason: "it is silent".to_owned() });
        }
    }

    fn hear(
        &mut self,
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
                self.trace.lose(worker, "it is gone");
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

    fn take_answer(&self, answer: Answer) -> Result<Option<Event>, DriveError> {
        Ok(match answer {
            Answer::Prepared(worker, Ok(())) => {
                let name = self.name_of(worker);
                info!(%worker, name, "worker ready");
                self.events.note(RunEvent::WorkerJoined { worker, name });
                let measured = || self.roster.member(worker).map_or(0, |member| megaflops(member.offer.gflops));
                let speed = if self.alike { 0 } else { measured() };
                // The roll call knows whether others follow.
                Some(Event::WorkerJoined { worker, speed, more_come: false })
            }
            Answer::Prepared(_, Err(CallError::Fault(fault))) if fault.class == FaultClass::Reject => {
                return Err(DriveError::Rejected(fault));
            }
            Answer::Prepared(worker, Err(error)) => {
                let (name, reason) = (self.name_of(worker), error.to_string());
                warn!(%worker, name, reason, "worker cannot be used");
                if error.is_passing() {
                    // If it lives, it registers again with its next heartbeat and is asked again.
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
            Action::Start { lease, origin, keeps_output, assistants, shares } => {
                let call = self.call(lease, origin, keeps_output, (&assistants, shares), purpose.as_ref());
                if !assistants.is_empty() {
                    self.events.note(RunEvent::Assisted { unit: lease.unit, worker: lease.worker, by: assistants });
                }
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
        let roster = self.roster;
        self.trace.note(&record, |worker| name_of(roster, worker));
        self.events.note(match &record {
            Record::Leased { lease } => RunEvent::Started { unit: lease.unit, worker: lease.worker },
            Record::Committed { lease, outcome } => committed(lease, outcome),
            Record::Failed { lease, fault } => {
                warn!(%lease, fault = fault.message, "unit failed");
                let (unit, worker, reason) = (lease.unit, lease.worker, fault.message.clone());
                RunEvent::Failed { unit, worker, reason, class: Some(fault.class) }
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
        let (run, answer, trace) = (self.run.clone(), answer.clone(), self.trace.context(&lease));
        calls.spawn(async move {
            if let Err(error) = member.client.start(&run, lease, call, trace).await {
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
        (assistants, leaves): (&[WorkerId], Option<Vec<Range<usize>>>),
        purpose: &dyn Purpose,
    ) -> Option<UnitCall> {
        let source = self.source(lease, origin)?;
        let everyone = self.roster.everyone();
        let there: Vec<usize> =
            (0..assistants.len()).filter(|&number| everyone.contains_key(&assistants[number])).collect();
        let members: Vec<_> = there.iter().map(|&number| &everyone[&assistants[number]].offer).collect();
        let owner = &everyone.get(&lease.worker)?.offer;
        // What was to be the share of one that is gone is nobody's, and so the lease's worker's.
        let shares = leaves.map(|leaves| Shares {
            leaves: there.iter().map(|&number| leaves[number].clone()).collect(),
            predecessor: self.predecessor(lease.unit),
        });
        let help = Help {
            assistants: members.iter().map(|offer| offer.endpoint.clone()).collect(),
            gflops: [owner].iter().chain(&members).map(|offer| offer.gflops).collect(),
            shares,
        };
        Some(purpose.call(lease, source, keeps_output, help))
    }

    /// What the layer before a unit's has become.
    fn predecessor(&self, unit: Unit) -> Option<Artifact> {
        let Unit::Prune(layer) = unit else { return None };
        self.committed.get(&LayerIndex(layer.0.checked_sub(1)?)).cloned()
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

fn name_of(roster: &Roster, worker: WorkerId) -> String {
    roster.everyone().get(&worker).map_or_else(|| format!("worker {worker}"), |member| member.offer.name.clone())
}

/// Deletes what is stored of a boundary.
fn discard(store: &dyn BlobStore, boundary: Boundary) -> Result<(), StoreError> {
    for name in store.list(&format!("activations/{:05}", boundary.0))? {
        store.delete(&name)?;
    }
    Ok(())
}

/// A commit, as those who follow are told of it.
pub(crate) fn committed(lease: &Lease, outcome: &Outcome) -> RunEvent {
    let (unit, worker) = (lease.unit, lease.worker);
    let (sublayers, phases, assistants_lost) = match outcome {
        Outcome::Pruned { sublayers, phases, assistants_lost, .. } => {
            let layer = if let Unit::Prune(layer) = unit { layer.0 } else { 0 };
            let sublayers = sublayers.iter().map(|sublayer| entry(layer, worker, sublayer)).collect();
            (sublayers, phases, *assistants_lost)
        }
        Outcome::Forwarded { phases } | Outcome::Surveyed { phases, .. } | Outcome::Evaluated { phases, .. } => {
            (Vec::new(), phases, 0)
        }
    };
    let mean_error = mean_error(outcome);
    RunEvent::Committed { unit, worker, mean_error, sublayers, phases: phases.clone(), assistants_lost }
}

fn mean_error(outcome: &Outcome) -> Option<f64> {
    match outcome {
        Outcome::Pruned { sublayers, .. } if !sublayers.is_empty() => {
            Some(sublayers.iter().map(|sublayer| sublayer.rel_error).sum::<f64>() / sublayers.len() as f64)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(worker: u64) -> Option<Event> {
        Some(Event::WorkerJoined { worker: WorkerId(worker), speed: 0, more_come: false })
    }

    /// With others behind it.
    fn joined_first(worker: u64) -> Event {
        Event::WorkerJoined { worker: WorkerId(worker), speed: 0, more_come: true }
    }

    #[test]
    fn workers_that_are_there_join_together_and_in_order() {
        let mut roll_call = RollCall::of(&[WorkerId(1), WorkerId(2), WorkerId(3)]);
        assert_eq!(roll_call.note(Some(WorkerId(3)), joined(3)), []);
        let other = Event::WorkerLost { worker: WorkerId(9) };
        assert_eq!(roll_call.note(None, Some(other.clone())), [other], "what is no answer does not wait");
        assert_eq!(roll_call.note(Some(WorkerId(1)), joined(1)), []);
        // Its preparation failed.
        let due = roll_call.note(Some(WorkerId(2)), None);
        assert_eq!(due, Vec::from_iter([joined_first(1)].into_iter().chain(joined(3))));
        assert_eq!(roll_call.note(Some(WorkerId(4)), joined(4)), Vec::from_iter(joined(4)), "the roll call is over");
    }

    #[test]
    fn a_worker_that_is_lost_during_the_roll_call_does_not_join() {
        let mut roll_call = RollCall::of(&[WorkerId(1), WorkerId(2)]);
        assert_eq!(roll_call.note(Some(WorkerId(1)), joined(1)), []);
        assert_eq!(roll_call.strike(WorkerId(1)), []);
        assert_eq!(roll_call.note(Some(WorkerId(2)), joined(2)), Vec::from_iter(joined(2)));
    }
}
