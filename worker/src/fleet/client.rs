//! Calls to the coordinator, each with a deadline.

use std::time::Duration;

use espalier_common::fault::FaultClass;
use espalier_gate::{DialError, Dialer, GateError, Role};
use espalier_proto::v1 as pb;
use espalier_proto::v1::coordinator_client::CoordinatorClient as Stub;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// A call that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a call to the coordinator failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Not a URL that can be called.
    #[error("`{url}` is no coordinator's URL")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// Not a URL that may be called.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// It is there, but one of the two does not believe the other.
    #[error("the coordinator at {url}: {reason}")]
    Untrusted {
        /// The coordinator.
        url: String,
        /// Who does not believe what.
        reason: String,
    },
    /// It answered, and said no.
    #[error("the coordinator refuses: {reason}")]
    Refused {
        /// What it said.
        reason: String,
    },
    /// It answered, and this machine is not of the kind that it can use now.
    #[error("the coordinator cannot use this machine: {reason}")]
    Unfit {
        /// What it said.
        reason: String,
    },
    /// It did not answer.
    #[error("the coordinator at {url} does not answer: {reason}")]
    Unreachable {
        /// The coordinator.
        url: String,
        /// What happened to the call.
        reason: String,
    },
}

impl CallError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Url { .. } | Self::Gate(_) | Self::Untrusted { .. } | Self::Refused { .. } => FaultClass::Reject,
            Self::Unfit { .. } => FaultClass::RetryElsewhere,
            Self::Unreachable { .. } => FaultClass::RetryHere,
        }
    }

    /// Whether the next call may fare better, for a worker that was registered before: certificates may be changing.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Untrusted { .. })
    }
}

/// The coordinator, from a worker's side.
#[derive(Debug, Clone)]
pub struct CoordinatorClient {
    url: String,
    stub: Stub<Channel>,
}

impl CoordinatorClient {
    /// Prepares calls to `url`; connects with the first one, and again whenever the connection was lost.
    ///
    /// # Errors
    /// `Url`, `Gate`.
    pub fn new(url: &str, dialer: &Dialer) -> Result<Self, CallError> {
        let connector = dialer.connector(url, Role::Coordinator)?;
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|source| CallError::Url { url: url.to_owned(), source })?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10));
        Ok(Self { url: url.to_owned(), stub: Stub::new(endpoint.connect_with_connector_lazy(connector)) })
    }

    /// Where the coordinator is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Offers this worker.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn register(&self, offer: pb::RegisterRequest) -> Result<pb::RegisterResponse, CallError> {
        let mut stub = self.stub.clone();
        self.within_deadline(stub.register(request(offer))).await
    }

    /// Says that this worker lives.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn heartbeat(&self, beat: pb::HeartbeatRequest) -> Result<pb::HeartbeatResponse, CallError> {
        let mut stub = self.stub.clone();
        self.within_deadline(stub.heartbeat(request(beat))).await
    }

    /// Says how a unit ended.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn report(&self, report: pb::ReportRequest) -> Result<(), CallError> {
        let mut stub = self.stub.clone();
        self.within_deadline(stub.report(request(report))).await.map(|pb::ReportResponse {}| ())
    }

    /// Says that this worker leaves on purpose.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn leave(&self, worker: u64, coordinator: u64) -> Result<(), CallError> {
        let mut stub = self.stub.clone();
        self.within_deadline(stub.leave(request(pb::LeaveRequest { worker, coordinator })))
            .await
            .map(|pb::LeaveResponse {}| ())
    }

    async fn within_deadline<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { url: self.url.clone(), reason };
        match tokio::time::timeout(DEADLINE, call).await {
            Err(_) => Err(unreachable(format!("no answer within {} s", DEADLINE.as_secs()))),
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(match (DialError::distrust(&status), status.code()) {
                (Some(reason), _) => CallError::Untrusted { url: self.url.clone(), reason },
                (
                    None,
                    Code::InvalidArgument
                    | Code::FailedPrecondition
                    | Code::PermissionDenied
                    | Code::Unauthenticated
                    | Code::Unimplemented,
                ) => CallError::Refused { reason: status.message().to_owned() },
                (None, Code::Aborted) => CallError::Unfit { reason: status.message().to_owned() },
                (None, code) => unreachable(format!("{code:?}: {}", status.message())),
            }),
        }
    }
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use espalier_common::fault::{Fault, FaultClass};
    use espalier_common::ids::{Attempt, Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
    use espalier_common::tasks::TaskGroup;
    use espalier_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
    use tokio::sync::{Notify, mpsc};
    use tonic::Response;
    use tonic::transport::server::TcpIncoming;

    use super::super::Membership;
    use super::*;
    use crate::calibrate::cache::ActivationCache;
    use crate::device::DeviceThread;
    use crate::session::{Session, UnitReport};

    /// A coordinator that forgets its first worker, and fails the first report.
    #[derive(Default)]
    struct Forgetful {
        registered: AtomicU64,
        report_calls: AtomicU32,
        reports: Mutex<Vec<pb::ReportRequest>>,
        left: AtomicU64,
        is_over: AtomicBool,
        changed: Notify,
    }

    #[tonic::async_trait]
    impl Coordinator for Forgetful {
        async fn register(
            &self,
            request: Request<pb::RegisterRequest>,
        ) -> Result<Response<pb::RegisterResponse>, Status> {
            if request.into_inner().build != "right" {
                return Err(Status::failed_precondition("another build"));
            }
            let worker = self.registered.fetch_add(1, Ordering::SeqCst) + 1;
            self.changed.notify_one();
            Ok(Response::new(pb::RegisterResponse { worker, heartbeat_interval_ms: 20, coordinator: 7 }))
        }

        async fn heartbeat(
            &self,
            request: Request<pb::HeartbeatRequest>,
        ) -> Result<Response<pb::HeartbeatResponse>, Status> {
            let beat = request.into_inner();
            assert_eq!(beat.coordinator, 7);
            let dismissed = self.is_over.load(Ordering::SeqCst);
            self.changed.notify_one();
            Ok(Response::new(pb::HeartbeatResponse { known: beat.worker != 1, dismissed }))
        }

        async fn report(&self, request: Request<pb::ReportRequest>) -> Result<Response<pb::ReportResponse>, Status> {
            if self.report_calls.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err(Status::unavailable("not now"));
            }
            self.reports.lock().unwrap().push(request.into_inner());
            self.changed.notify_one();
            Ok(Response::new(pb::ReportResponse {}))
        }

        async fn leave(&self, request: Request<pb::LeaveRequest>) -> Result<Response<pb::LeaveResponse>, Status> {
            self.left.store(request.into_inner().worker, Ordering::SeqCst);
            Ok(Response::new(pb::LeaveResponse {}))
        }
    }

    fn serve(tasks: &TaskGroup) -> (Arc<Forgetful>, CoordinatorClient) {
        let coordinator = Arc::new(Forgetful::default());
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let client = CoordinatorClient::new(&format!("http://{}", incoming.local_addr().unwrap()), &Dialer::default());
        let client = client.unwrap();
        let (service, token) = (CoordinatorServer::from_arc(Arc::clone(&coordinator)), tasks.token());
        tasks.spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming_shutdown(incoming, token.cancelled_owned()).await.unwrap();
        });
        (coordinator, client)
    }

    fn membership(client: CoordinatorClient, build: &str) -> Membership {
        let cache = ActivationCache::new(0, std::env::temp_dir());
        let (sender, _) = mpsc::channel(1);
        let runtime = tokio::runtime::Handle::current();
        let session = Session::new(DeviceThread::start(candle_core::Device::Cpu).unwrap(), cache, sender, runtime);
        Membership::new(client, session, pb::RegisterRequest { build: build.to_owned(), ..Default::default() }, None)
    }

    async fn until(coordinator: &Forgetful, holds: impl Fn() -> bool) {
        let wait = async {
            while !holds() {
                coordinator.changed.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_forgotten_worker_registers_again_and_reports_until_it_is_heard() {
        let tasks = TaskGroup::new();
        let (coordinator, client) = serve(&tasks);
        let membership = Arc::new(membership(client, "right"));
        let (sender, reports) = mpsc::channel(1);
        let lease = Lease { unit: Unit::Prune(LayerIndex(3)), worker: WorkerId(1), attempt: Attempt(2) };
        let fault = Fault { class: FaultClass::RetryHere, message: "so it goes".to_owned() };
        let (run, held) = (RunId("r".to_owned()), vec![Boundary(3)]);
        sender.send(UnitReport { run, lease, result: Err(fault), held }).await.unwrap();
        let (member, token) = (Arc::clone(&membership), tasks.token());
        tasks.spawn(async move {
            tokio::select! {
                ended = member.run(reports) => panic!("{ended:?}"),
                () = token.cancelled() => {}
            }
        });
        until(&coordinator, || coordinator.registered.load(Ordering::SeqCst) == 2).await;
        until(&coordinator, || !coordinator.reports.lock().unwrap().is_empty()).await;
        assert_eq!(coordinator.reports.lock().unwrap()[0].held, [3]);
        // It was registered there before it knows its new number here.
        until(&coordinator, || membership.worker.load(Ordering::SeqCst) == 2).await;
        membership.leave(Duration::from_secs(5)).await;
        assert_eq!(coordinator.left.load(Ordering::SeqCst), 2);
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_worker_that_is_dismissed_ends_well() {
        let tasks = TaskGroup::new();
        let (coordinator, client) = serve(&tasks);
        coordinator.is_over.store(true, Ordering::SeqCst);
        let (_sender, reports) = mpsc::channel(1);
        let membership = membership(client, "right");
        tokio::time::timeout(Duration::from_secs(10), membership.run(reports)).await.unwrap().unwrap();
        membership.leave(Duration::from_secs(5)).await;
        assert_eq!(coordinator.left.load(Ordering::SeqCst), 1);
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refusal_is_not_repeated() {
        let tasks = TaskGroup::new();
        let (_, client) = serve(&tasks);
        let (_sender, reports) = mpsc::channel(1);
        let error = membership(client, "wrong").run(reports).await.unwrap_err();
        assert_eq!(error.class(), FaultClass::Reject);
        assert!(error.to_string().contains("another build"), "{error}");
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }
}
