//! Everything that a worker exports for Prometheus, by name. `deploy/observability` uses these names, and a test holds the two
//! against each other.

use std::sync::Arc;

use espalier_common::clock::Stopwatch;
use espalier_common::families;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::Unit;
use espalier_common::memory;
use espalier_common::metric::{Family, Kind, MILLISECONDS, Metrics, SECONDS};
use espalier_common::report::Outcome;

use crate::session::Session;

families! {
    BUILD = Family::gauge("espalier_worker_build_info", &["version", "instruction_set"], "1, labelled with the version of the program and the instruction set that its results depend on.");
    UPTIME = Family::gauge("espalier_worker_uptime_seconds", &[], "Seconds since the program started.");
    RESIDENT = Family::gauge("espalier_worker_resident_memory_bytes", &[], "Resident memory of the worker now.");
    PEAK = Family::gauge("espalier_worker_peak_memory_bytes", &[], "Highest resident memory of the worker so far.");
    REGISTERED = Family::gauge("espalier_worker_registered", &[], "1 while the coordinator knows this worker and answers, 0 otherwise; as /readyz.");
    MISSED = Family::counter("espalier_worker_heartbeats_missed_total", &[], "Heartbeats that the coordinator did not answer.");
    UNITS = Family::gauge("espalier_worker_units", &[], "Units that run or wait.");
    ASSISTING = Family::gauge("espalier_worker_assisting", &[], "1 while the worker helps another with its layer, 0 otherwise.");
    ENDED = Family::counter("espalier_worker_units_ended_total", &["unit", "outcome"], "Units that ended, by kind (prune, forward, evaluate) and outcome (done, failed, abandoned).");
    UNIT_SECONDS = Family {
        name: "espalier_worker_unit_duration_seconds",
        help: "Seconds from a unit's start to its end, by kind.",
        kind: Kind::Histogram(SECONDS),
        labels: &["unit"],
    };
    FAULTS = Family::counter("espalier_worker_faults_total", &["class"], "Faults of units by class: retry_here, retry_elsewhere, reject, bug.");
    PHASES = Family::counter("espalier_worker_phase_seconds_total", &["phase"], "Seconds of units that were done, by phase: load, fetch, forward, gram, solve, reconstruct, verify, store, wait, transfer, evaluate.");
    OPERATIONS = Family::counter("espalier_worker_phase_operations_total", &["phase"], "Floating-point operations of matrix products of units that were done, by phase.");
    ASSISTANTS = Family::counter("espalier_worker_assistants_lost_total", &[], "Assistants that this worker gave up on in the middle of a layer.");
    ERROR = Family::gauge("espalier_worker_sublayer_relative_error_ratio", &["sublayer"], "Relative error of the kind of sublayer in the layer that this worker pruned last.");
    RECEIVED = Family::counter("espalier_worker_received_bytes_total", &[], "Bytes of hidden states received from other workers.");
    CACHE = Family::gauge("espalier_worker_cache_bytes", &["place"], "Bytes of hidden states that are kept, by place: memory, disk.");
    BUDGET = Family::gauge("espalier_worker_cache_budget_bytes", &[], "Bytes of hidden states that may be kept in memory.");
    GFLOPS = Family::gauge("espalier_worker_gemm_gflops", &[], "Speed of f32 matrix products that the worker offers, in 10^9 operations a second.");
    THREADS = Family::gauge("espalier_worker_threads", &[], "Compute threads.");
    SPANS = Family::counter("espalier_worker_trace_spans_total", &["outcome"], "Spans of traces by outcome: sent to the collector, or lost.");
    CALLS = Family {
        name: "espalier_worker_rpc_duration_seconds",
        help: "Seconds until a call was answered, by method; for streams, until they began.",
        kind: Kind::Histogram(MILLISECONDS),
        labels: &["method"],
    };
}

/// The numbers of one worker. Clones share them.
#[derive(Debug, Clone)]
pub struct WorkerMetrics {
    metrics: Arc<Metrics>,
    started: Stopwatch,
}

impl Default for WorkerMetrics {
    /// Whatever has no labels, or labels that are known, is there from the start.
    fn default() -> Self {
        let metrics = Metrics::new(FAMILIES);
        for family in [MISSED, ASSISTANTS, RECEIVED] {
            metrics.add(&family, &[], 0.0);
        }
        for outcome in ["sent", "lost"] {
            metrics.add(&SPANS, &[outcome], 0.0);
        }
        for unit in ["prune", "forward", "evaluate"] {
            for outcome in ["done", "failed", "abandoned"] {
                metrics.add(&ENDED, &[unit, outcome], 0.0);
            }
        }
        for class in [FaultClass::RetryHere, FaultClass::RetryElsewhere, FaultClass::Reject, FaultClass::Bug] {
            metrics.add(&FAULTS, &[class_name(class)], 0.0);
        }
        Self { metrics: Arc::new(metrics), started: Stopwatch::start() }
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

/// The kind of a sublayer: `q_proj` of `model.layers.0.self_attn.q_proj.weight`.
fn kind(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor).rsplit('.').next().unwrap_or(tensor)
}

impl WorkerMetrics {
    /// Says what the worker offers.
    pub fn describe(&self, threads: usize, gflops: f64, budget_bytes: u64) {
        let instruction_set = crate::device::memory::instruction_set();
        self.metrics.set(&BUILD, &[env!("CARGO_PKG_VERSION"), &instruction_set], 1.0);
        self.metrics.set(&THREADS, &[], threads as f64);
        self.metrics.set(&GFLOPS, &[], gflops);
        self.metrics.set(&BUDGET, &[], budget_bytes as f64);
    }

    /// Counts a heartbeat that was not answered.
    pub fn observe_missed_heartbeat(&self) {
        self.metrics.add(&MISSED, &[], 1.0);
    }

    /// Counts a call by its path: `/espalier.v1.Worker/PruneLayer`.
    pub fn observe_call(&self, path: &str, seconds: f64) {
        self.metrics.observe(&CALLS, &[path.rsplit('/').next().unwrap_or(path)], seconds);
    }

    /// Counts a unit that ended after `seconds`.
    pub fn observe_unit(&self, unit: Unit, result: &Result<Outcome, Fault>, is_abandoned: bool, seconds: f64) {
        let metrics = &self.metrics;
        let unit = match unit {
            Unit::Prune(_) => "prune",
            Unit::Forward(_) => "forward",
            Unit::Evaluate(_) => "evaluate",
        };
        let outcome = match result {
            _ if is_abandoned => "abandoned",
            Ok(_) => "done",
            Err(_) => "failed",
        };
        metrics.add(&ENDED, &[unit, outcome], 1.0);
        metrics.observe(&UNIT_SECONDS, &[unit], seconds);
        let outcome = match result {
            _ if is_abandoned => return,
            Err(fault) => return metrics.add(&FAULTS, &[class_name(fault.class)], 1.0),
            Ok(outcome) => outcome,
        };
        let (Outcome::Pruned { phases, .. }
        | Outcome::Forwarded { phases }
        | Outcome::Surveyed { phases, .. }
        | Outcome::Evaluated { phases, .. }) = outcome;
        for phase in phases {
            metrics.add(&PHASES, &[&phase.phase], phase.seconds);
            metrics.add(&OPERATIONS, &[&phase.phase], phase.flops);
        }
        if let Outcome::Pruned { sublayers, assistants_lost, .. } = outcome {
            metrics.add(&ASSISTANTS, &[], f64::from(*assistants_lost));
            for sublayer in sublayers {
                metrics.set(&ERROR, &[kind(&sublayer.tensor)], sublayer.rel_error);
            }
        }
    }

    /// Everything, as Prometheus reads it.
    pub fn render(&self, session: &Session) -> String {
        let metrics = &self.metrics;
        let (units, is_assisting) = session.at_work();
        let (in_memory, on_disk) = session.cached_bytes();
        metrics.set(&UPTIME, &[], self.started.seconds());
        metrics.set(&RESIDENT, &[], memory::resident_bytes() as f64);
        metrics.set(&PEAK, &[], memory::peak_rss_bytes() as f64);
        metrics.set(&REGISTERED, &[], f64::from(u8::from(session.readiness().get().is_ok())));
        metrics.set(&UNITS, &[], units as f64);
        metrics.set(&ASSISTING, &[], f64::from(u8::from(is_assisting)));
        metrics.raise(&RECEIVED, &[], session.bytes_received() as f64);
        let (sent, lost) = session.tracer().counts();
        metrics.raise(&SPANS, &["sent"], sent as f64);
        metrics.raise(&SPANS, &["lost"], lost as f64);
        metrics.set(&CACHE, &["memory"], in_memory as f64);
        metrics.set(&CACHE, &["disk"], on_disk as f64);
        metrics.render()
    }
}
