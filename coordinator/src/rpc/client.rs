//! The command line's calls to a coordinator.

use std::time::Duration;

use espalier_proto::v1 as pb;
use espalier_proto::v1::admin_client::AdminClient as Stub;
use tonic::transport::{Channel, Endpoint};

use crate::events::{RunEvent, Status};

const DEADLINE: Duration = Duration::from_secs(20);
/// The last event holds a whole report.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why a coordinator did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// Not a URL.
    #[error("`{url}` is no URL of a coordinator: {reason}")]
    BadUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not there, or gone.
    #[error("coordinator at {url} cannot be reached: {reason}")]
    Unreachable {
        /// Where it should be.
        url: String,
        /// What the transport said.
        reason: String,
    },
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// It speaks another language.
    #[error("answer of the coordinator at {url}: {reason}")]
    Protocol {
        /// Where it is.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

/// Calls to one coordinator.
pub struct AdminClient {
    url: String,
    stub: Stub<Channel>,
}

/// The events of a run, past ones first.
pub struct Events {
    url: String,
    stream: tonic::Streaming<pb::RunEvent>,
}

fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

fn refusal(url: &str, status: &tonic::Status) -> AdminError {
    match status.code() {
        tonic::Code::InvalidArgument | tonic::Code::NotFound => AdminError::Refused(status.message().to_owned()),
        _ => AdminError::Unreachable { url: url.to_owned(), reason: status.message().to_owned() },
    }
}

fn parse<T: serde::de::DeserializeOwned>(url: &str, json: &str) -> Result<T, AdminError> {
    serde_json::from_str(json).map_err(|error| AdminError::Protocol { url: url.to_owned(), reason: error.to_string() })
}

impl AdminClient {
    /// Connects.
    ///
    /// # Errors
    /// `BadUrl`, `Unreachable`.
    pub async fn connect(url: &str) -> Result<Self, AdminError> {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| AdminError::BadUrl { url: url.to_owned(), reason: error.to_string() })?
            .connect_timeout(DEADLINE)
            .http2_keep_alive_interval(Duration::from_secs(10));
        let channel = endpoint
            .connect()
            .await
            .map_err(|error| AdminError::Unreachable { url: url.to_owned(), reason: error.to_string() })?;
        let stub = Stub::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { url: url.to_owned(), stub })
    }

    /// Submits a job; returns the run's name here.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn submit(&mut self, job_json: String, key: String, run_url: String) -> Result<String, AdminError> {
        let message = pb::SubmitRequest { job_json, idempotency_key: key, run_url };
        let answer = self.stub.submit(request(message)).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(answer.into_inner().run)
    }

    /// Follows a run.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn watch(&mut self, run: &str) -> Result<Events, AdminError> {
        // No deadline: a run takes hours. Keepalive notices a coordinator that is gone.
        let message = pb::WatchRequest { run: run.to_owned() };
        let answer = self.stub.watch(message).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(Events { url: self.url.clone(), stream: answer.into_inner() })
    }

    /// What the coordinator is doing, and as the JSON it sent.
    ///
    /// # Errors
    /// `Unreachable`, `Protocol`.
    pub async fn status(&mut self) -> Result<(Status, String), AdminError> {
        let answer =
            self.stub.status(request(pb::StatusRequest {})).await.map_err(|status| refusal(&self.url, &status))?;
        let json = answer.into_inner().status_json;
        Ok((parse(&self.url, &json)?, json))
    }

    /// Stops a run.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn cancel(&mut self, run: String) -> Result<(), AdminError> {
        self.stub.cancel(request(pb::CancelRequest { run })).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(())
    }
}

impl Events {
    /// The next event; `None` if the coordinator ended the stream.
    ///
    /// # Errors
    /// `Unreachable`, `Protocol`.
    pub async fn next(&mut self) -> Result<Option<RunEvent>, AdminError> {
        let message = self.stream.message().await.map_err(|status| refusal(&self.url, &status))?;
        message.map(|message| parse(&self.url, &message.event_json)).transpose()
    }
}
