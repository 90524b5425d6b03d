//! The worker's services: decoding, a call into the session, encoding.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::fault::Fault;
use espalier_common::ids::{Boundary, Lease, Unit};
use espalier_common::pattern::Pattern;
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::{WireError, lease_from_wire, leaves_from_wire, run_from_wire};
use espalier_gate::settings::advertised;
use espalier_gate::trace::Context;
use espalier_gate::web::Readiness;
use espalier_gate::{Entrance, GateError, Guard};
use espalier_proto::v1 as pb;
use espalier_proto::v1::activations_server::ActivationsServer;
use espalier_proto::v1::assistance_server::{Assistance, AssistanceServer};
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::worker_server::{Worker, WorkerServer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::server::{HealthReporter, health_reporter};

use crate::crew::LayerSizes;
use crate::crew::assistant::{OwnerLine, Part};
use crate::evaluation::Evaluation;
use crate::keeping::Keeping;
use crate::run::{self, Run, RunError};
use crate::session::{Session, SessionError, Work};
use crate::transport::grpc::{ActivationService, HTTP2_WINDOW_BYTES, MESSAGE_LIMIT_BYTES};
use crate::transport::{Joining, Line};

/// An owner that says nothing for so long after its call has gone.
const INACTIVITY: Duration = Duration::from_secs(30);

/// Letters from an owner that wait to be acted on, and letters to it that wait to be sent. A full queue holds its sender back.
const ORDERS: usize = 4;
const ANSWERS: usize = 8;

/// Parcels that wait for the network.
const PARCELS: usize = 4;

/// Why the services cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Nobody could call it.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The server ended by itself.
    #[error("the server failed")]
    Serve(#[source] tonic::transport::Error),
}

/// A listener that is bound, so that its address is known before anybody is told of it.
pub struct Listener {
    listener: TcpListener,
    entrance: Entrance,
    endpoint: String,
}

impl Listener {
    /// Binds an address of loopback, without TLS.
    ///
    /// # Errors
    /// `Bind`.
    pub fn bind(address: SocketAddr) -> Result<Self, ServerError> {
        Self::open(address, None, Entrance::default())
    }

    /// Binds the address; port 0 takes a free one. Others reach it as `advertise`, if it says anything.
    ///
    /// # Errors
    /// `Bind`; `Gate` if nobody could call it.
    pub fn open(address: SocketAddr, advertise: Option<&str>, entrance: Entrance) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Bind { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let endpoint = advertised(bound, advertise, entrance.credentials.is_some())?;
        Ok(Self { listener, entrance, endpoint })
    }

    /// Where others reach the services.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// Serves until the token is cancelled.
    ///
    /// # Errors
    /// `Serve`.
    pub async fn serve(
        self,
        session: Arc<Session>,
        tasks: TaskGroup,
        token: CancellationToken,
    ) -> Result<(), ServerError> {
        let connections = self.entrance.open(self.listener, &tasks);
        let (health, health_service) = health_reporter();
        report_health(health, session.readiness(), &tasks);
        let metrics = session.metrics().clone();
        let observer = move |path: &str, seconds: f64| metrics.observe_call(path, seconds);
        let activations = ActivationService::new(session.holdings().clone(), tasks.clone());
        let assistance = AssistanceService { session: Arc::clone(&session), tasks };
        Server::builder()
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .layer(Guard::new(self.entrance.tokens).observed_by(Arc::new(observer)))
            .add_service(health_service)
            .add_service(WorkerServer::new(WorkerService { session }).max_decoding_message_size(MESSAGE_LIMIT_BYTES))
            .add_service(AssistanceServer::new(assistance).max_decoding_message_size(MESSAGE_LIMIT_BYTES))
            .add_service(ActivationsServer::new(activations).max_decoding_message_size(MESSAGE_LIMIT_BYTES))
            .serve_with_incoming_shutdown(connections, token.cancelled_owned())
            .await
            .map_err(ServerError::Serve)
    }
}

/// Keeps the health service saying what `/readyz` says.
fn report_health(health: HealthReporter, readiness: &Readiness, tasks: &TaskGroup) {
    let (mut changes, token) = (readiness.changes(), tasks.token());
    tasks.spawn(async move {
        loop {
            let is_ready = changes.borrow_and_update().is_ok();
            if is_ready {
                health.set_serving::<WorkerServer<WorkerService>>().await;
            } else {
                health.set_not_serving::<WorkerServer<WorkerService>>().await;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = token.cancelled() => return,
            }
        }
    });
}

/// What the owner of a layer calls on an assistant.
struct AssistanceService {
    session: Arc<Session>,
    tasks: TaskGroup,
}

#[tonic::async_trait]
impl Assistance for AssistanceService {
    type AssistStream = Pin<Box<dyn Stream<Item = Result<pb::Parcel, Status>> + Send>>;

    async fn assist(&self, request: Request<Streaming<pb::Parcel>>) -> Result<Response<Self::AssistStream>, Status> {
        let trace = Context::of_call(request.metadata());
        let mut parcels = request.into_inner();
        let first = tokio::time::timeout(INACTIVITY, parcels.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("the owner is silent"))??;
        let Some(pb::parcel::Content::Begin(begin)) = first.and_then(|parcel| parcel.content) else {
            return Err(Status::invalid_argument("the first message must begin with a lease"));
        };
        let lease = begin.lease.ok_or(WireError::Missing("lease")).and_then(lease_from_wire);
        let (run, lease) = lease.map_err(|error| malformed(&error))?;
        let leaves = leaves_from_wire(begin.first_leaf, begin.end_leaf).map_err(|error| malformed(&error))?;
        let keeping = begin.kept.map(keeping).transpose()?;
        if leaves.is_empty() && keeping.is_none() {
            return Err(Status::invalid_argument("an assistant that is lent nothing has nothing to do"));
        }
        let part = Part { leaves, keeping };
        let session = Arc::clone(&self.session);
        let begun = blocking(move || {
            let mut answered = None;
            let control = session.assist(&run, (lease, part, trace), |sizes| {
                let (line, owner) = owner_line(lease, sizes, session.joining().cloned());
                answered = Some(line);
                owner
            })?;
            Ok::<_, SessionError>((control, answered.expect("a session that assists has asked for its line")))
        });
        let (control, line) = begun.await?.map_err(|error| Status::unavailable(error.to_string()))?;
        let (out, queue) = mpsc::channel(PARCELS);
        let token = self.tasks.token();
        self.tasks.spawn(async move {
            tokio::select! {
                () = line.answer(begin.link, parcels, out) => {}
                () = control.token().cancelled() => {}
                () = token.cancelled() => {}
            }
            control.cancel();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue).map(Ok))))
    }
}

/// A line to an owner: the network's end, and the session's.
fn owner_line(
    lease: Lease,
    sizes: LayerSizes,
    joining: Option<Arc<Joining>>,
) -> (Line<impl Fn(&Matter) -> Option<u64>>, OwnerLine) {
    let (answers, letters) = mpsc::channel(ANSWERS);
    let (received, orders) = mpsc::channel(ORDERS);
    let endpoint = format!("the owner of {lease}");
    let size_of = move |matter: &Matter| sizes.of_order(matter);
    let joined_by = Arc::default();
    let line = Line { endpoint, number: 0, size_of, letters, received, joining, trace: None, joined_by };
    (line, OwnerLine { orders, answers })
}

/// What the coordinator calls.
struct WorkerService {
    session: Arc<Session>,
}

fn malformed(error: &WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn started(result: Result<(), SessionError>) -> Response<pb::Started> {
    Response::new(pb::Started { fault: result.err().map(|error| error.fault().into()) })
}

/// Runs what reads files off the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}

impl WorkerService {
    fn start(
        &self,
        trace: Option<Context>,
        lease: Option<pb::Lease>,
        work: impl FnOnce(Unit) -> Result<Work, Status>,
    ) -> Result<Response<pb::Started>, Status> {
        let lease = lease.ok_or(WireError::Missing("lease")).and_then(lease_from_wire);
        let (run, lease) = lease.map_err(|error| malformed(&error))?;
        Ok(started(self.session.start_traced(&run, lease, work(lease.unit)?, trace)))
    }
}

fn source(source: Option<pb::Source>) -> Result<espalier_common::wire::Source, Status> {
    source.ok_or(WireError::Missing("source")).and_then(TryInto::try_into).map_err(|error| malformed(&error))
}

fn artifact(artifact: Option<pb::Artifact>) -> Result<espalier_common::report::Artifact, Status> {
    artifact.ok_or(WireError::Missing("tokens")).and_then(TryInto::try_into).map_err(|error| malformed(&error))
}

fn keeping(kept: pb::KeptShare) -> Result<Keeping, Status> {
    Ok(Keeping {
        source: source(kept.source)?,
        predecessor: kept.predecessor.map(|made| artifact(Some(made))).transpose()?,
        given_back: kept.given_back,
    })
}

fn wrong_kind(unit: Unit) -> Status {
    Status::invalid_argument(format!("the lease is for {unit}, which is not what this call starts"))
}

#[tonic::async_trait]
impl Worker for WorkerService {
    async fn inspect(&self, request: Request<pb::InspectRequest>) -> Result<Response<pb::InspectResponse>, Status> {
        let job = request.into_inner().job_json;
        let result = match blocking(move || run::inspect(&job)).await? {
            Ok(outline) => pb::inspect_response::Result::Outline(outline.into()),
            Err(error) => pb::inspect_response::Result::Fault(Fault::new(error.class(), &error).into()),
        };
        Ok(Response::new(pb::InspectResponse { result: Some(result) }))
    }

    async fn prepare(&self, request: Request<pb::PrepareRequest>) -> Result<Response<pb::PrepareResponse>, Status> {
        let request = request.into_inner();
        let run = run_from_wire(request.run).map_err(|error| malformed(&error))?;
        let tokens = artifact(request.tokens)?;
        let session = Arc::clone(&self.session);
        let prepared = move || session.prepare(run, request.job_json, &request.run_url, &tokens);
        let fault = blocking(prepared).await?.err().map(|error| error.fault());
        if let Some(fault) = &fault {
            tracing::warn!(%fault, "cannot take part in a run");
        }
        Ok(Response::new(pb::PrepareResponse { fault: fault.map(Into::into) }))
    }

    async fn forward_layer(&self, request: Request<pb::ForwardLayerRequest>) -> Result<Response<pb::Started>, Status> {
        let (trace, request) = (Context::of_call(request.metadata()), request.into_inner());
        let source = source(request.source)?;
        self.start(trace, request.lease, |unit| match unit {
            Unit::Forward(layer) => Ok(Work::Forward(layer, source)),
            other => Err(wrong_kind(other)),
        })
    }

    async fn prune_layer(&self, request: Request<pb::PruneLayerRequest>) -> Result<Response<pb::Started>, Status> {
        let (trace, request) = (Context::of_call(request.metadata()), request.into_inner());
        let (source, keeps_output) = (source(request.source)?, request.keep_output);
        let (assistants, gflops) = (request.assistants, request.gflops);
        let shares = request.shares.map(TryInto::try_into).transpose().map_err(|error| malformed(&error))?;
        let pattern = match Run::layer_pattern(&request.pattern_json) {
            Ok(pattern) => pattern,
            Err(error) => return Ok(started(Err(error.into()))),
        };
        self.start(trace, request.lease, |unit| match unit {
            Unit::Prune(layer) => Ok(Work::Prune { layer, source, pattern, keeps_output, assistants, gflops, shares }),
            other => Err(wrong_kind(other)),
        })
    }

    async fn survey_layer(&self, request: Request<pb::SurveyLayerRequest>) -> Result<Response<pb::Started>, Status> {
        let (trace, request) = (Context::of_call(request.metadata()), request.into_inner());
        let (source, sparsities) = (source(request.source)?, request.sparsities);
        let patterns = sparsities.iter().map(|&sparsity| Pattern::Unstructured { sparsity }.validate());
        if let Err(error) = patterns.collect::<Result<(), _>>() {
            return Ok(started(Err(RunError::from(error).into())));
        }
        self.start(trace, request.lease, |unit| match unit {
            Unit::Forward(layer) => Ok(Work::Survey(layer, source, sparsities)),
            other => Err(wrong_kind(other)),
        })
    }

    async fn r#try(&self, request: Request<pb::TryRequest>) -> Result<Response<pb::Started>, Status> {
        let (trace, request) = (Context::of_call(request.metadata()), request.into_inner());
        let patterns = match request.pattern_json.iter().map(|json| Run::layer_pattern(json)).collect() {
            Ok(patterns) => patterns,
            Err(error) => return Ok(started(Err(RunError::into(error)))),
        };
        self.start(trace, request.lease, |unit| match unit {
            Unit::Evaluate(_) => Ok(Work::Try(patterns)),
            other => Err(wrong_kind(other)),
        })
    }

    async fn evaluate(&self, request: Request<pb::EvaluateRequest>) -> Result<Response<pb::Started>, Status> {
        let (trace, request) = (Context::of_call(request.metadata()), request.into_inner());
        let (model, run_url, windows) = (request.model, request.run_url, request.windows);
        let evaluation = Evaluation { model, tokens: artifact(request.tokens)?, run_url, windows };
        self.start(trace, request.lease, |unit| match unit {
            Unit::Evaluate(_) => Ok(Work::Evaluate(evaluation)),
            other => Err(wrong_kind(other)),
        })
    }

    async fn abandon(&self, request: Request<pb::AbandonRequest>) -> Result<Response<pb::Abandoned>, Status> {
        let lease = request.into_inner().lease.ok_or(WireError::Missing("lease")).and_then(lease_from_wire);
        let (run, lease) = lease.map_err(|error| malformed(&error))?;
        self.session.abandon(&run, lease);
        Ok(Response::new(pb::Abandoned {}))
    }

    async fn release(&self, request: Request<pb::ReleaseRequest>) -> Result<Response<pb::Released>, Status> {
        let request = request.into_inner();
        let run = run_from_wire(request.run).map_err(|error| malformed(&error))?;
        let boundaries: Vec<Boundary> = request.boundaries.into_iter().map(Boundary).collect();
        self.session.release(&run, &boundaries);
        Ok(Response::new(pb::Released {}))
    }
}
