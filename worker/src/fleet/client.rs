//! Calls to the coordinator, each with a deadline.

use std::time::Duration;

use espalier_common::fault::FaultClass;
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
    /// It answered, and said no.
    #[error("the coordinator refuses: {reason}")]
    Refused {
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
            Self::Url { .. } | Self::Refused { .. } => FaultClass::Reject,
            Self::Unreachable { .. } => FaultClass::RetryHere,
        }
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
    /// `Url`.
    pub fn new(url: &str) -> Result<Self, CallError> {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|source| CallError::Url { url: url.to_owned(), source })?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10));
        Ok(Self { url: url.to_owned(), stub: Stub::new(endpoint.connect_lazy()) })
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
    pub async fn leave(&self, worker: u64) -> Result<(), CallError> {
        let mut stub = self.stub.clone();
        self.within_deadline(stub.leave(request(pb::LeaveRequest { worker }))).await.map(|pb::LeaveResponse {}| ())
    }

    async fn within_deadline<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { url: self.url.clone(), reason };
        match tokio::time::timeout(DEADLINE, call).await {
            Err(_) => Err(unreachable(format!("no answer within {} s", DEADLINE.as_secs()))),
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(match status.code() {
                Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied | Code::Unimplemented => {
                    CallError::Refused { reason: status.message().to_owned() }
                }
                code => unreachable(format!("{code:?}: {}", status.message())),
            }),
        }
    }
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}
