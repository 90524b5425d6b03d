//! A run as somebody sees it who looks at it: a fold over its events. Pure. The page, its frozen copy and the terminal all
//! show this.

pub mod journal;
mod lines;
mod shown;

use std::collections::BTreeMap;

use espalier_common::ids::{RunId, Unit, WorkerId};
use espalier_common::report::PhaseSeconds;

pub use self::lines::{Level, LogLine};
use self::shown::Tail;
pub use self::shown::{Cell, Cursor, Head, Lane, LayerCells, Part, PhaseSpan, Span, State, Timeline, Update};
use crate::events::{About, Phase, RunEvent, RunStatus};
use crate::report::{Report, SublayerEntry};

/// Lines of the log that are kept: more than a person reads.
const LOG_LINES: usize = 2000;
/// Bars of the timeline that are kept: a run of a thousand layers whose every unit is tried again.
const SPANS: usize = 8192;

/// A run as it looks.
#[derive(Debug, Clone, PartialEq)]
pub struct RunView {
    head: Head,
    phase: Option<Phase>,
    /// Counts how often layers were told of all over again.
    epoch: u64,
    layers: Vec<LayerCells>,
    spans: Tail<Span>,
    open: Vec<Span>,
    log: Tail<LogLine>,
    workers: BTreeMap<WorkerId, Lane>,
}

impl Default for RunView {
    fn default() -> Self {
        Self {
            head: Head::default(),
            phase: None,
            epoch: 0,
            layers: Vec::new(),
            spans: Tail::new(SPANS),
            open: Vec::new(),
            log: Tail::new(LOG_LINES),
            workers: BTreeMap::new(),
        }
    }
}

/// The kind of a sublayer: `q_proj` of `model.layers.0.self_attn.q_proj.weight`.
pub fn kind(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor).rsplit('.').next().unwrap_or(tensor)
}

fn cell(entry: &SublayerEntry) -> Cell {
    Cell {
        kind: kind(&entry.name).to_owned(),
        error: entry.rel_error,
        held_out: entry.held_out_error,
        sparsity: entry.sparsity,
        seconds: entry.seconds,
    }
}

impl RunView {
    /// The run of a report, with its timeline if one was kept.
    pub fn of_report(report: Report, timeline: Option<Timeline>) -> Self {
        let mut view = Self::default();
        let ended = timeline.as_ref().and_then(|timeline| timeline.ended);
        if let Some(timeline) = timeline {
            let Timeline { started, phases, spans, log, workers, committed, .. } = timeline;
            (view.head.started, view.head.phases) = (started, phases);
            spans.into_iter().for_each(|span| view.spans.push(span));
            log.into_iter().for_each(|line| view.log.push(line));
            view.workers = workers.into_iter().map(|lane| (lane.worker, lane)).collect();
            view.finish(ended, &report);
            for layer in &mut view.layers {
                layer.at = committed.get(&layer.layer).copied();
            }
        } else {
            view.finish(None, &report);
        }
        view
    }

    /// What the journal of this run does not tell.
    pub fn timeline(&self) -> Timeline {
        Timeline {
            started: self.head.started,
            ended: self.head.ended,
            phases: self.head.phases.clone(),
            spans: self.spans.kept.iter().chain(&self.open).cloned().collect(),
            log: self.log.kept.iter().cloned().collect(),
            workers: self.workers.values().cloned().collect(),
            committed: self.layers.iter().filter_map(|layer| Some((layer.layer, layer.at?))).collect(),
        }
    }

    /// What fits on one screen.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Committed layers, in the order in which they were.
    pub fn layers(&self) -> &[LayerCells] {
        &self.layers
    }

    /// What workers are at.
    pub fn open(&self) -> &[Span] {
        &self.open
    }

    /// Units that are leased.
    pub fn leased(&self) -> impl Iterator<Item = Unit> {
        self.open.iter().filter(|span| span.kind != "assist").map(|span| span.unit)
    }

    /// Its workers.
    pub fn workers(&self) -> impl Iterator<Item = &Lane> {
        self.workers.values()
    }

    /// Leases that came to nothing.
    pub fn retries(&self) -> u64 {
        self.head.retries
    }

    /// The phase it is in.
    pub fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// The run in a list, where it is called `name`; `model` if it has not said what it prunes yet.
    pub fn status(&self, name: &str, model: &str) -> RunStatus {
        let head = &self.head;
        let state = match (head.state, &head.reason) {
            (State::Queued, _) => "queued".to_owned(),
            (State::Running, _) => "running".to_owned(),
            (State::Done, _) => "done".to_owned(),
            (State::Failed, reason) => reason.clone().unwrap_or_default(),
        };
        RunStatus {
            run: RunId(name.to_owned()),
            model: head.about.as_ref().map_or_else(|| model.to_owned(), |about| about.model.clone()),
            state,
            committed: head.committed,
            layers: head.layers,
        }
    }

    /// What was not seen up to `cursor`, which is moved on.
    pub fn since(&self, cursor: &mut Cursor) -> Update {
        if cursor.epoch != self.epoch {
            (cursor.epoch, cursor.layers) = (self.epoch, 0);
        }
        let from = cursor.layers.min(self.layers.len());
        cursor.layers = self.layers.len();
        Update {
            head: self.head.clone(),
            layers: Part { from, items: self.layers[from..].to_vec() },
            spans: self.spans.since(&mut cursor.spans),
            open: self.open.clone(),
            log: self.log.since(&mut cursor.log),
            workers: self.workers.values().cloned().collect(),
        }
    }

    /// Takes note of a worker that nobody names: by what it is given, it is there.
    pub fn greet(&mut self, worker: WorkerId) {
        let name = format!("worker {worker}");
        self.workers.entry(worker).or_insert(Lane { worker, name, here: true, doing: None, done: 0, total: 0 });
    }

    /// Takes an event that happened at `at` (milliseconds since 1970).
    pub fn apply(&mut self, at: u64, event: &RunEvent) {
        if let Some(line) = lines::line(self, at, event) {
            self.log.push(line);
        }
        match event {
            RunEvent::Opened { run, url, committed, about, sublayers, phases } => {
                self.head.state = State::Running;
                self.head.started.get_or_insert(at);
                self.head.run = Some(run.to_string());
                self.head.url = Some(url.clone());
                self.head.about = about.as_deref().cloned();
                (self.head.committed, self.head.committed_before) = (*committed, *committed);
                for entries in sublayers.chunk_by(|one, other| one.layer == other.layer) {
                    self.add_layer(None, entries);
                }
                self.add_phases(phases);
            }
            RunEvent::Planned { pattern } => {
                if let Some(about) = &mut self.head.about {
                    about.pattern.clone_from(pattern);
                }
            }
            // What there is to say of it is in the log.
            RunEvent::Strategy(_) => {}
            RunEvent::Phase { phase } => self.begin(at, *phase),
            RunEvent::WorkerJoined { worker, name } => {
                let lane = Lane { worker: *worker, name: name.clone(), here: true, doing: None, done: 0, total: 0 };
                self.workers.insert(*worker, lane);
            }
            RunEvent::WorkerLost { worker, .. } => {
                // One that could not be prepared never was the run's.
                if let Some(lane) = self.workers.get_mut(worker).filter(|lane| lane.here) {
                    (lane.here, lane.doing) = (false, None);
                    self.head.workers_lost += 1;
                }
                self.close(at, "lost", |span| span.worker == *worker);
            }
            RunEvent::Started { unit, worker } => {
                // Its former lease was given up on.
                self.close(at, "lost", |span| span.unit == *unit);
                let span = self.span(at, *unit, *worker, None);
                self.open.push(span);
            }
            RunEvent::Assisted { unit, by, .. } => {
                for worker in by {
                    let span = self.span(at, *unit, *worker, Some("assist"));
                    self.open.push(span);
                }
            }
            RunEvent::Progress { worker, phase, done, total, .. } => {
                if let Some(lane) = self.workers.get_mut(worker) {
                    (lane.doing, lane.done, lane.total) = (Some(phase.clone()), *done, *total);
                }
            }
            RunEvent::Committed { unit, worker, sublayers, phases, assistants_lost, .. } => {
                self.close(at, "done", |span| span.unit == *unit);
                self.rest(*worker);
                self.head.assistants_lost += u64::from(*assistants_lost);
                self.add_phases(phases);
                self.head.phase_done += usize::from(self.counts(*unit));
                if matches!(unit, Unit::Prune(_)) {
                    self.head.committed += 1;
                    self.add_layer(Some(at), sublayers);
                    self.expect_end(at);
                }
            }
            RunEvent::Failed { unit, worker, .. } => {
                self.close(at, "failed", |span| span.unit == *unit && span.worker == *worker);
                self.close(at, "lost", |span| span.unit == *unit);
                self.rest(*worker);
            }
            RunEvent::Finished { report } => self.finish(Some(at), report),
            RunEvent::Ended { reason, exit_code } => {
                self.end(Some(at), State::Failed);
                (self.head.reason, self.head.exit_code) = (Some(reason.clone()), Some(*exit_code));
            }
        }
    }

    fn begin(&mut self, at: u64, phase: Phase) {
        self.head.state = State::Running;
        self.head.started.get_or_insert(at);
        let (title, total) = phase.title();
        // It is told anew with each worker that comes.
        let goes_on =
            matches!(phase, Phase::AwaitWorkers { .. }) && matches!(self.phase, Some(Phase::AwaitWorkers { .. }));
        if !goes_on {
            self.end_phase(at);
            self.head.phases.push(PhaseSpan { title: title.to_owned(), total, from: at, to: None });
        }
        self.head.phase_done = 0;
        if let Phase::AwaitWorkers { here, .. } = phase {
            self.head.phase_done = here;
        }
        if let Phase::Prune { layers } = phase {
            self.head.layers = Some(layers);
            self.head.phase_done = self.head.committed;
        }
        self.phase = Some(phase);
    }

    fn end_phase(&mut self, at: u64) {
        if let Some(last) = self.head.phases.last_mut() {
            last.to.get_or_insert(at);
        }
    }

    /// Whether a unit is a step of the phase: a forward pass is only a means while layers are pruned, and windows are evaluated
    /// many to a unit.
    fn counts(&self, unit: Unit) -> bool {
        match unit {
            Unit::Prune(_) => true,
            Unit::Forward(_) => matches!(self.phase, Some(Phase::Survey { .. })),
            Unit::Evaluate(_) => matches!(self.phase, Some(Phase::Try { .. })),
        }
    }

    fn span(&self, at: u64, unit: Unit, worker: WorkerId, role: Option<&str>) -> Span {
        let (own, index) = match unit {
            Unit::Prune(layer) => ("prune", layer.0),
            Unit::Forward(layer) if matches!(self.phase, Some(Phase::Survey { .. })) => ("survey", layer.0),
            Unit::Forward(layer) => ("forward", layer.0),
            Unit::Evaluate(plan) if matches!(self.phase, Some(Phase::Try { .. })) => ("try", plan),
            Unit::Evaluate(share) => ("evaluate", share & 0xffff),
        };
        Span { worker, kind: role.unwrap_or(own).to_owned(), index, from: at, to: None, end: String::new(), unit }
    }

    fn close(&mut self, at: u64, end: &str, which: impl Fn(&Span) -> bool) {
        let (over, open): (Vec<_>, Vec<_>) = std::mem::take(&mut self.open).into_iter().partition(which);
        self.open = open;
        for span in over {
            self.head.retries += u64::from(matches!(end, "failed" | "lost") && span.kind != "assist");
            if let Some(lane) = self.workers.get_mut(&span.worker).filter(|_| span.kind == "assist") {
                lane.doing = None;
            }
            self.spans.push(Span { to: Some(at), end: end.to_owned(), ..span });
        }
    }

    fn rest(&mut self, worker: WorkerId) {
        if let Some(lane) = self.workers.get_mut(&worker) {
            (lane.doing, lane.done, lane.total) = (None, 0, 0);
        }
    }

    fn add_layer(&mut self, at: Option<u64>, entries: &[SublayerEntry]) {
        let Some(first) = entries.first() else { return };
        for entry in entries {
            let kind = kind(&entry.name);
            if !self.head.kinds.iter().any(|known| known == kind) {
                self.head.kinds.push(kind.to_owned());
            }
            self.head.zeros += entry.zeros;
            self.head.elements += entry.elements;
        }
        let cells = entries.iter().map(cell).collect();
        self.layers.push(LayerCells { layer: first.layer, worker: first.worker, at, cells });
    }

    fn add_phases(&mut self, phases: &[PhaseSeconds]) {
        for phase in phases {
            *self.head.seconds_by_phase.entry(phase.phase.clone()).or_default() += phase.seconds;
            *self.head.flops_by_phase.entry(phase.phase.clone()).or_default() += phase.flops;
        }
    }

    /// When the last layer will be pruned: those of this life tell how long one takes.
    fn expect_end(&mut self, at: u64) {
        let pruning = self.head.phases.last().map_or(at, |phase| phase.from);
        let done = self.head.committed.saturating_sub(self.head.committed_before).max(1) as u64;
        let left = self.head.layers.unwrap_or(0).saturating_sub(self.head.committed) as u64;
        self.head.eta = (left > 0).then(|| at + (at.saturating_sub(pruning) * left) / done);
    }

    fn end(&mut self, at: Option<u64>, state: State) {
        self.head.state = state;
        self.head.ended = at;
        self.head.eta = None;
        if let Some(at) = at {
            self.end_phase(at);
            self.close(at, "stopped", |_| true);
        }
        let workers: Vec<_> = self.workers.keys().copied().collect();
        workers.into_iter().for_each(|worker| self.rest(worker));
    }

    /// A report has the last word on all that it tells.
    fn finish(&mut self, at: Option<u64>, report: &Report) {
        self.end(at, State::Done);
        self.head.run = Some(report.run.to_string());
        self.head.exit_code = Some(0);
        self.head.about = Some(About {
            model: report.model.source.clone(),
            method: report.method.name.clone(),
            pattern: report.pattern.to_string(),
            propagation: report.propagation.name().to_owned(),
            samples: report.calibration.samples,
            sequence_length: report.calibration.sequence_length,
            output: report.output.clone(),
        });
        let committed: BTreeMap<u32, u64> =
            self.layers.iter().filter_map(|layer| Some((layer.layer, layer.at?))).collect();
        (self.head.zeros, self.head.elements) = (0, 0);
        self.head.kinds.clear();
        self.layers.clear();
        self.epoch += 1;
        for entries in report.sublayers.chunk_by(|one, other| one.layer == other.layer) {
            self.add_layer(committed.get(&entries[0].layer).copied(), entries);
        }
        self.head.layers = Some(report.model.layers);
        self.head.committed = self.layers.len();
        self.head.seconds_by_phase.clone_from(&report.totals.seconds_by_phase);
        self.head.flops_by_phase.clone_from(&report.totals.flops_by_phase);
        self.head.retries = report.totals.retries;
        self.head.assistants_lost = report.totals.assistants_lost;
        self.head.bytes_moved = Some(report.totals.bytes_moved);
        self.head.seconds = Some(report.totals.seconds);
        self.head.perplexity.clone_from(&report.perplexity);
    }
}

#[cfg(test)]
#[path = "view/tests.rs"]
mod tests;
