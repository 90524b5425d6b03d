//! Everything that a coordinator exports for Prometheus, by name. `deploy/observability` uses these names, and a test holds the
//! two against each other.

use std::sync::{Arc, OnceLock};

use espalier_common::clock::Stopwatch;
use espalier_common::families;
use espalier_common::fault::FaultClass;
use espalier_common::ids::Unit;
use espalier_common::memory;
use espalier_common::metric::{Family, Kind, MILLISECONDS, Metrics, SECONDS};
use espalier_common::report::PhaseSeconds;
use espalier_gate::Tracer;

use crate::events::RunEvent;
use crate::view::{State, kind};

families! {
    BUILD = Family::gauge("espalier_build_info", &["version"], "1, labelled with the version of the program.");
    UPTIME = Family::gauge("espalier_uptime_seconds", &[], "Seconds since the program started.");
    RESIDENT = Family::gauge("espalier_resident_memory_bytes", &[], "Resident memory of the coordinator now.");
    PEAK = Family::gauge("espalier_peak_memory_bytes", &[], "Highest resident memory of the coordinator so far.");
    READY = Family::gauge("espalier_ready", &[], "1 while jobs are taken, 0 otherwise; as /readyz.");
    BUSY = Family::gauge("espalier_event_loop_busy_seconds", &[], "Seconds for which the loop of a run has been at one event; 0 while it waits for the next.");
    WORKERS = Family::gauge("espalier_workers", &["state"], "Workers that are registered, by state: busy with a unit or helping, or idle.");
    WORKERS_LOST = Family::counter("espalier_workers_lost_total", &[], "Workers that were lost while a run went on.");
    RUNS = Family::gauge("espalier_runs", &["state"], "Runs that the coordinator knows, by state: queued, running, done, failed.");
    RUNS_ENDED = Family::counter("espalier_runs_ended_total", &["outcome"], "Runs that ended, by outcome: done, interrupted (exit code 75), rejected (65), failed (any other).");
    RUN_LAYERS = Family::gauge("espalier_run_layers", &["run"], "Layers of the run that is going on.");
    RUN_COMMITTED = Family::gauge("espalier_run_layers_committed", &["run"], "Layers of the run that is going on that are committed.");
    RUN_ETA = Family::gauge("espalier_run_eta_seconds", &["run"], "Seconds until the last layer of the run that is going on is expected to be pruned.");
    LAYERS = Family::counter("espalier_layers_committed_total", &[], "Layers committed.");
    IN_FLIGHT = Family::gauge("espalier_units_in_flight", &["unit"], "Units that are leased, by kind: prune, forward, evaluate.");
    STARTED = Family::counter("espalier_units_started_total", &["unit"], "Leases given, by kind of unit.");
    ENDED = Family::counter("espalier_units_ended_total", &["unit", "outcome"], "Leases whose end was reported, by kind of unit and outcome: committed, failed.");
    RETRIES = Family::counter("espalier_retries_total", &[], "Leases that came to nothing: their unit was leased again, or failed its run.");
    FAULTS = Family::counter("espalier_faults_total", &["class"], "Faults of units by class: retry_here, retry_elsewhere, reject, bug.");
    ASSISTANTS = Family::counter("espalier_assistants_lost_total", &[], "Assistants that were given up on in the middle of a layer.");
    APPENDS = Family {
        name: "espalier_journal_append_duration_seconds",
        help: "Seconds until a record of a journal was durable; its count is the number of records.",
        kind: Kind::Histogram(MILLISECONDS),
        labels: &[],
    };
    APPENDS_FAILED = Family::counter("espalier_journal_append_failures_total", &[], "Records of journals that could not be made durable; each ends its run.");
    MOVED = Family::counter("espalier_activation_received_bytes_total", &[], "Bytes of hidden states that workers received from one another.");
    PHASES = Family::counter("espalier_phase_seconds_total", &["phase"], "Seconds of work by phase, summed over workers: load, fetch, forward, gram, solve, reconstruct, verify, store, wait, transfer, evaluate, survey.");
    FLOPS = Family::counter("espalier_phase_operations_total", &["phase"], "Floating-point operations of matrix products by phase.");
    ERROR = Family::gauge("espalier_sublayer_relative_error_ratio", &["sublayer"], "Relative error of the kind of sublayer in the layer that was committed last.");
    UNIT_SECONDS = Family {
        name: "espalier_unit_work_seconds",
        help: "Seconds of work in a committed unit, by kind.",
        kind: Kind::Histogram(SECONDS),
        labels: &["unit"],
    };
    CALLS = Family {
        name: "espalier_rpc_duration_seconds",
        help: "Seconds until a call was answered, by method; for Watch, until its stream began.",
        kind: Kind::Histogram(MILLISECONDS),
        labels: &["method"],
    };
    SPANS = Family::counter("espalier_trace_spans_total", &["outcome"], "Spans of traces by outcome: sent to the collector, or lost.");
    FOLLOWERS = Family::gauge("espalier_http_followers", &[], "Browsers that follow /api/events now.");
}

/// The numbers of one coordinator. Clones share them.
#[derive(Debug, Clone)]
pub struct CoordinatorMetrics {
    metrics: Arc<Metrics>,
    started: Stopwatch,
    tracer: Arc<OnceLock<Tracer>>,
}

impl Default for CoordinatorMetrics {
    /// Whatever has no labels, or labels that are known, is there from the start: an alert on what is absent would be one on
    /// what has not happened yet.
    fn default() -> Self {
        let metrics = Metrics::new(FAMILIES);
        for family in [WORKERS_LOST, LAYERS, RETRIES, ASSISTANTS, APPENDS_FAILED, MOVED] {
            metrics.add(&family, &[], 0.0);
        }
        for unit in ["prune", "forward", "evaluate"] {
            metrics.add(&STARTED, &[unit], 0.0);
            metrics.add(&ENDED, &[unit, "committed"], 0.0);
            metrics.add(&ENDED, &[unit, "failed"], 0.0);
        }
        for class in [FaultClass::RetryHere, FaultClass::RetryElsewhere, FaultClass::Reject, FaultClass::Bug] {
            metrics.add(&FAULTS, &[class_name(class)], 0.0);
        }
        for outcome in ["done", "interrupted", "rejected", "failed"] {
            metrics.add(&RUNS_ENDED, &[outcome], 0.0);
        }
        for outcome in ["sent", "lost"] {
            metrics.add(&SPANS, &[outcome], 0.0);
        }
        metrics.set(&BUILD, &[env!("CARGO_PKG_VERSION")], 1.0);
        metrics.set(&FOLLOWERS, &[], 0.0);
        Self { metrics: Arc::new(metrics), started: Stopwatch::start(), tracer: Arc::default() }
    }
}

fn class_name(class: FaultClass) -> &'static str {
    match class {
        FaultClass::RetryHere => "retry_here",
        FaultClass::RetryElsewhere => "retry_elsewhere",
        FaultClass::Reject => "reject",
        FaultClass::Bug => "bug",
    }
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Prune(_) => "prune",
        Unit::Forward(_) => "forward",
        Unit::Evaluate(_) => "evaluate",
    }
}

/// What a scrape looks at, besides what was counted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Now {
    /// Whether jobs are taken.
    pub ready: bool,
    /// Workers with something to do, and those without.
    pub workers: (usize, usize),
    /// Runs by state.
    pub runs: Vec<State>,
    /// Those that go on: name, committed, layers, seconds left.
    pub going: Vec<(String, usize, Option<usize>, Option<f64>)>,
    /// Units that are leased.
    pub units: Vec<Unit>,
    /// Hidden states that workers received.
    pub bytes_received: u64,
    /// Browsers that follow.
    pub followers: usize,
    /// Longest that a loop has been at one event.
    pub busy_seconds: f64,
}

impl CoordinatorMetrics {
    /// Tells from now on what came of a tracer's spans; of the first that it is told of.
    pub fn watch(&self, tracer: Tracer) {
        let _ = self.tracer.set(tracer);
    }

    /// Counts an event, and the leases that came to nothing with it.
    pub fn observe(&self, event: &RunEvent, retries: u64) {
        let metrics = &self.metrics;
        metrics.add(&RETRIES, &[], retries as f64);
        match event {
            RunEvent::Started { unit, .. } => metrics.add(&STARTED, &[unit_name(*unit)], 1.0),
            RunEvent::Committed { unit, sublayers, phases, assistants_lost, .. } => {
                metrics.add(&ENDED, &[unit_name(*unit), "committed"], 1.0);
                metrics.add(&ASSISTANTS, &[], f64::from(*assistants_lost));
                self.observe_phases(phases);
                let seconds = phases.iter().map(|phase| phase.seconds).sum();
                metrics.observe(&UNIT_SECONDS, &[unit_name(*unit)], seconds);
                if matches!(unit, Unit::Prune(_)) {
                    metrics.add(&LAYERS, &[], 1.0);
                }
                for sublayer in sublayers {
                    metrics.set(&ERROR, &[kind(&sublayer.name)], sublayer.rel_error);
                }
            }
            RunEvent::Failed { unit, class, .. } => {
                metrics.add(&ENDED, &[unit_name(*unit), "failed"], 1.0);
                if let Some(class) = class {
                    metrics.add(&FAULTS, &[class_name(*class)], 1.0);
                }
            }
            RunEvent::WorkerLost { .. } => metrics.add(&WORKERS_LOST, &[], 1.0),
            RunEvent::Finished { .. } => metrics.add(&RUNS_ENDED, &["done"], 1.0),
            RunEvent::Ended { exit_code, .. } => {
                let outcome = match *exit_code {
                    crate::error::exit::INTERRUPTED => "interrupted",
                    crate::error::exit::REJECTED => "rejected",
                    _ => "failed",
                };
                metrics.add(&RUNS_ENDED, &[outcome], 1.0);
            }
            RunEvent::Opened { .. }
            | RunEvent::Planned { .. }
            | RunEvent::Strategy(_)
            | RunEvent::Phase { .. }
            | RunEvent::WorkerJoined { .. }
            | RunEvent::Assisted { .. }
            | RunEvent::Progress { .. } => {}
        }
    }

    fn observe_phases(&self, phases: &[PhaseSeconds]) {
        for phase in phases {
            self.metrics.add(&PHASES, &[&phase.phase], phase.seconds);
            self.metrics.add(&FLOPS, &[&phase.phase], phase.flops);
        }
    }

    /// Counts a record of a journal.
    pub fn observe_append(&self, seconds: f64, is_durable: bool) {
        self.metrics.observe(&APPENDS, &[], seconds);
        if !is_durable {
            self.metrics.add(&APPENDS_FAILED, &[], 1.0);
        }
    }

    /// Counts a call by its path: `/espalier.v1.Admin/Status`.
    pub fn observe_call(&self, path: &str, seconds: f64) {
        self.metrics.observe(&CALLS, &[path.rsplit('/').next().unwrap_or(path)], seconds);
    }

    /// Everything, as Prometheus reads it.
    pub fn render(&self, now: &Now) -> String {
        let metrics = &self.metrics;
        metrics.set(&UPTIME, &[], self.started.seconds());
        metrics.set(&RESIDENT, &[], memory::resident_bytes() as f64);
        metrics.set(&PEAK, &[], memory::peak_rss_bytes() as f64);
        metrics.set(&READY, &[], f64::from(u8::from(now.ready)));
        metrics.set(&BUSY, &[], now.busy_seconds);
        metrics.set(&WORKERS, &["busy"], now.workers.0 as f64);
        metrics.set(&WORKERS, &["idle"], now.workers.1 as f64);
        let states =
            [("queued", State::Queued), ("running", State::Running), ("done", State::Done), ("failed", State::Failed)];
        for (name, state) in states {
            let count = now.runs.iter().filter(|run| **run == state).count();
            metrics.set(&RUNS, &[name], count as f64);
        }
        for unit in ["prune", "forward", "evaluate"] {
            let count = now.units.iter().filter(|found| unit_name(**found) == unit).count();
            metrics.set(&IN_FLIGHT, &[unit], count as f64);
        }
        for family in [RUN_LAYERS, RUN_COMMITTED, RUN_ETA] {
            metrics.clear(&family);
        }
        for (run, committed, layers, left) in &now.going {
            metrics.set(&RUN_COMMITTED, &[run], *committed as f64);
            if let Some(layers) = layers {
                metrics.set(&RUN_LAYERS, &[run], *layers as f64);
            }
            if let Some(left) = left {
                metrics.set(&RUN_ETA, &[run], *left);
            }
        }
        metrics.raise(&MOVED, &[], now.bytes_received as f64);
        metrics.set(&FOLLOWERS, &[], now.followers as f64);
        let (sent, lost) = self.tracer.get().map(Tracer::counts).unwrap_or_default();
        metrics.raise(&SPANS, &["sent"], sent as f64);
        metrics.raise(&SPANS, &["lost"], lost as f64);
        metrics.render()
    }
}
