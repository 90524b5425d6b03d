//! Calls to one worker. Every call has a deadline; calls that start work are idempotent by their lease.

use std::time::Duration;

use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Boundary, Lease, RunId};
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::Artifact;
use espalier_common::wire::{self, Shares, Source};
use espalier_gate::trace::Context;
use espalier_gate::{Dialer, Role};
use espalier_proto::v1 as pb;
use espalier_proto::v1::worker_client::WorkerClient as Stub;
use tonic::transport::{Channel, Endpoint};

/// Calls that only acknowledge.
const SHORT: Duration = Duration::from_secs(20);
/// Calls that read a model's headers or a token block.
const LONG: Duration = Duration::from_secs(300);
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why a call did not do what it should.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// The worker could not be reached, or not in time.
    #[error("worker at {endpoint} does not answer {call}: {reason}")]
    Unreachable {
        /// Where it should be.
        endpoint: String,
        /// Which call.
        call: &'static str,
        /// What the transport said.
        reason: String,
    },
    /// The worker answered with a fault.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl CallError {
    /// Whether the same call may go well later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Fault(fault) => matches!(fault.class, FaultClass::RetryHere | FaultClass::RetryElsewhere),
        }
    }

    /// The fault it amounts to for the scheduler.
    pub fn into_fault(self) -> Fault {
        match self {
            Self::Unreachable { .. } => Fault::new(FaultClass::RetryElsewhere, &self),
            Self::Fault(fault) => fault,
        }
    }
}

/// Who may help with a unit.
#[derive(Debug, Clone, Default)]
pub struct Help {
    /// Endpoints of workers that are idle meanwhile.
    pub assistants: Vec<String>,
    /// Speeds that the lease's worker and these offered, in GFLOP/s: by these sequences are lent out.
    pub gflops: Vec<f64>,
    /// With the strategy `data`: who keeps what.
    pub shares: Option<Shares>,
}

/// What a unit needs to be started with, besides its lease.
#[derive(Debug, Clone)]
pub enum UnitCall {
    /// Run a dense layer.
    Forward {
        /// Its input.
        source: Source,
    },
    /// Prune a layer.
    Prune {
        /// Its input.
        source: Source,
        /// What its matrices must become.
        pattern: Pattern,
        /// Whether its output is also left in the run's store.
        keeps_output: bool,
        /// Who may help.
        help: Help,
    },
    /// Run a dense layer and look at it.
    Survey {
        /// Its input.
        source: Source,
        /// Where its error curves are wanted.
        sparsities: Vec<f64>,
    },
    /// Prune roughly and evaluate.
    Try {
        /// One pattern a layer.
        patterns: Vec<Pattern>,
    },
    /// Evaluate windows.
    Evaluate {
        /// The model's source.
        model: String,
        /// The windows.
        tokens: Artifact,
        /// The run's store.
        run_url: String,
        /// Which windows.
        windows: Vec<u32>,
    },
}

/// Calls to one worker.
#[async_trait::async_trait]
pub trait WorkerClient: Send + Sync {
    /// Outlines a job's model.
    async fn inspect(&self, job_json: String) -> Result<ModelOutline, CallError>;
    /// Attaches the worker to a run.
    async fn prepare(&self, run: &RunId, job_json: String, run_url: String, tokens: Artifact) -> Result<(), CallError>;
    /// Starts a unit, whose spans belong to that of its lease, if it is traced.
    async fn start(&self, run: &RunId, lease: Lease, call: UnitCall, trace: Option<Context>) -> Result<(), CallError>;
    /// Stops a unit.
    async fn abandon(&self, run: &RunId, lease: Lease) -> Result<(), CallError>;
    /// Drops hidden states, or the whole run if no boundary is named.
    async fn release(&self, run: &RunId, boundaries: &[Boundary]) -> Result<(), CallError>;
}

/// [`WorkerClient`] over gRPC; connects when first used.
#[derive(Debug, Clone)]
pub struct GrpcWorkerClient {
    endpoint: String,
    stub: Stub<Channel>,
}

impl GrpcWorkerClient {
    /// A client for the worker at `endpoint`.
    ///
    /// # Errors
    /// `Unreachable` if the endpoint is no URL, or none that may be called.
    pub fn new(endpoint: &str, dialer: &Dialer) -> Result<Self, CallError> {
        let wrong = |reason: String| CallError::Unreachable { endpoint: endpoint.to_owned(), call: "connect", reason };
        let connector = dialer.connector(endpoint, Role::Worker).map_err(|error| wrong(error.to_string()))?;
        let channel = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|error| wrong(error.to_string()))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .connect_with_connector_lazy(connector);
        let stub = Stub::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { endpoint: endpoint.to_owned(), stub })
    }

    fn request<T>(message: T, deadline: Duration) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(deadline);
        request
    }

    /// A call that starts a unit.
    fn traced<T>(message: T, trace: Option<Context>) -> tonic::Request<T> {
        let mut request = Self::request(message, SHORT);
        Context::send_along(trace, &mut request);
        request
    }

    fn answer<T>(&self, call: &'static str, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, CallError> {
        answer.map(tonic::Response::into_inner).map_err(|status| CallError::Unreachable {
            endpoint: self.endpoint.clone(),
            call,
            reason: format!("{}: {}", status.code(), status.message()),
        })
    }
}

fn fault_or_ok(fault: Option<pb::Fault>) -> Result<(), CallError> {
    fault.map_or(Ok(()), |fault| Err(CallError::Fault(fault.into())))
}

fn protocol_fault(call: &str, error: impl std::fmt::Display) -> CallError {
    CallError::Fault(Fault { class: FaultClass::Bug, message: format!("answer to {call}: {error}") })
}

#[async_trait::async_trait]
impl WorkerClient for GrpcWorkerClient {
    async fn inspect(&self, job_json: String) -> Result<ModelOutline, CallError> {
        let request = Self::request(pb::InspectRequest { job_json }, LONG);
        match self.answer("Inspect", self.stub.clone().inspect(request).await)?.result {
            Some(pb::inspect_response::Result::Outline(outline)) => {
                outline.try_into().map_err(|error| protocol_fault("Inspect", error))
            }
            Some(pb::inspect_response::Result::Fault(fault)) => Err(CallError::Fault(fault.into())),
            None => Err(protocol_fault("Inspect", "neither outline nor fault")),
        }
    }

    async fn prepare(&self, run: &RunId, job_json: String, run_url: String, tokens: Artifact) -> Result<(), CallError> {
        let message = pb::PrepareRequest { run: run.0.clone(), job_json, run_url, tokens: Some(tokens.into()) };
        fault_or_ok(self.answer("Prepare", self.stub.clone().prepare(Self::request(message, LONG)).await)?.fault)
    }

    async fn start(&self, run: &RunId, lease: Lease, call: UnitCall, trace: Option<Context>) -> Result<(), CallError> {
        let wire_lease = Some(wire::lease_to_wire(run, lease));
        let mut stub = self.stub.clone();
        let started = match call {
            UnitCall::Forward { source } => {
                let message = pb::ForwardLayerRequest { lease: wire_lease, source: Some(source.into()) };
                self.answer("ForwardLayer", stub.forward_layer(Self::traced(message, trace)).await)?
            }
            UnitCall::Prune { source, pattern, keeps_output, help } => {
                let message = pb::PruneLayerRequest {
                    lease: wire_lease,
                    source: Some(source.into()),
                    pattern_json: serde_json::to_string(&pattern).expect("a pattern is plain data"),
                    keep_output: keeps_output,
                    assistants: help.assistants,
                    shares: help.shares.map(Into::into),
                    gflops: help.gflops,
                };
                self.answer("PruneLayer", stub.prune_layer(Self::traced(message, trace)).await)?
            }
            UnitCall::Survey { source, sparsities } => {
                let message = pb::SurveyLayerRequest { lease: wire_lease, source: Some(source.into()), sparsities };
                self.answer("SurveyLayer", stub.survey_layer(Self::traced(message, trace)).await)?
            }
            UnitCall::Try { patterns } => {
                let json = |pattern| serde_json::to_string(pattern).expect("a pattern is plain data");
                let message = pb::TryRequest { lease: wire_lease, pattern_json: patterns.iter().map(json).collect() };
                self.answer("Try", stub.r#try(Self::traced(message, trace)).await)?
            }
            UnitCall::Evaluate { model, tokens, run_url, windows } => {
                let message =
                    pb::EvaluateRequest { lease: wire_lease, model, tokens: Some(tokens.into()), run_url, windows };
                self.answer("Evaluate", stub.evaluate(Self::traced(message, trace)).await)?
            }
        };
        fault_or_ok(started.fault)
    }

    async fn abandon(&self, run: &RunId, lease: Lease) -> Result<(), CallError> {
        let message = pb::AbandonRequest { lease: Some(wire::lease_to_wire(run, lease)) };
        self.answer("Abandon", self.stub.clone().abandon(Self::request(message, SHORT)).await).map(drop)
    }

    async fn release(&self, run: &RunId, boundaries: &[Boundary]) -> Result<(), CallError> {
        let boundaries = boundaries.iter().map(|boundary| boundary.0).collect();
        let message = pb::ReleaseRequest { run: run.0.clone(), boundaries };
        self.answer("Release", self.stub.clone().release(Self::request(message, SHORT)).await).map(drop)
    }
}
