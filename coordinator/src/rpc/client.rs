//! The command line's calls to a coordinator.

use std::time::Duration;

use espalier_common::fault::{Fault, FaultClass};
use espalier_gate::{DialError, Dialer, GateError, Role, Secret, tokens};
use espalier_proto::v1 as pb;
use espalier_proto::v1::admin_client::AdminClient as Stub;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use crate::config::ClientConfig;
use crate::events::{Stamped, Status};
use crate::plan::strategy::Asked;

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
    /// Not as this command may call it.
    #[error("{0}")]
    Gate(String),
    /// It is there, but one of the two does not believe the other.
    #[error("coordinator at {url}: {reason}")]
    Untrusted {
        /// Where it is.
        url: String,
        /// Who does not believe what.
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

/// How this command proves who it is, and whom it believes.
#[derive(Debug, Clone, Default)]
pub struct Access {
    dialer: Dialer,
    token: Option<Secret>,
}

impl Access {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn open(config: &ClientConfig) -> Result<Self, GateError> {
        let dialer = Dialer::new(config.tls.open(None)?);
        let token = config.client.token_file.as_deref().map(tokens::client_token).transpose()?;
        if token.is_some() && !dialer.has_tls() {
            return Err(GateError::TokenWithoutTls { key: "client.token_file" });
        }
        Ok(Self { dialer, token })
    }
}

/// Calls to one coordinator.
pub struct AdminClient {
    url: String,
    token: Option<Secret>,
    stub: Stub<Channel>,
}

/// The events of a run, past ones first.
pub struct Events {
    url: String,
    stream: tonic::Streaming<pb::RunEvent>,
}

fn refusal(url: &str, status: &tonic::Status) -> AdminError {
    use tonic::Code::{InvalidArgument, NotFound, PermissionDenied, Unauthenticated};
    if let Some(reason) = DialError::distrust(status) {
        return AdminError::Untrusted { url: url.to_owned(), reason };
    }
    match status.code() {
        InvalidArgument | NotFound => AdminError::Refused(status.message().to_owned()),
        PermissionDenied | Unauthenticated => {
            AdminError::Refused(format!("the coordinator at {url} refuses: {}", status.message()))
        }
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
    /// `BadUrl`, `Gate`, `Untrusted`, `Unreachable`.
    pub async fn connect(url: &str, access: &Access) -> Result<Self, AdminError> {
        let connector = access.dialer.connector(url, Role::Coordinator).map_err(|error| match error {
            GateError::Url { url, reason } => AdminError::BadUrl { url, reason },
            other => AdminError::Gate(other.to_string()),
        })?;
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| AdminError::BadUrl { url: url.to_owned(), reason: error.to_string() })?
            .connect_timeout(DEADLINE)
            .http2_keep_alive_interval(Duration::from_secs(10));
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
            let url = url.to_owned();
            match DialError::distrust_in(&error) {
                Some(reason) => AdminError::Untrusted { url, reason },
                None => AdminError::Unreachable { url, reason: Fault::new(FaultClass::RetryHere, &error).message },
            }
        })?;
        let stub = Stub::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { url: url.to_owned(), token: access.token.clone(), stub })
    }

    /// A message with the token, if there is one.
    fn signed<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(token) = &self.token {
            let header = format!("Bearer {}", token.expose());
            let mut header = MetadataValue::try_from(header).expect("a token is visible ASCII");
            header.set_sensitive(true);
            request.metadata_mut().insert("authorization", header);
        }
        request
    }

    /// The same, with a deadline.
    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = self.signed(message);
        request.set_timeout(DEADLINE);
        request
    }

    /// Submits a job; returns the run's name here.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn submit(
        &mut self,
        job_json: String,
        key: String,
        run_url: String,
        strategy: Option<Asked>,
    ) -> Result<String, AdminError> {
        let strategy = strategy.map_or_else(String::new, |asked| asked.name().to_owned());
        let message = pb::SubmitRequest { job_json, idempotency_key: key, run_url, strategy };
        let message = self.request(message);
        let answer = self.stub.submit(message).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(answer.into_inner().run)
    }

    /// Follows a run.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn watch(&mut self, run: &str) -> Result<Events, AdminError> {
        // No deadline: a run takes hours. Keepalive notices a coordinator that is gone.
        let message = self.signed(pb::WatchRequest { run: run.to_owned() });
        let answer = self.stub.watch(message).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(Events { url: self.url.clone(), stream: answer.into_inner() })
    }

    /// What the coordinator is doing, and as the JSON it sent.
    ///
    /// # Errors
    /// `Unreachable`, `Protocol`.
    pub async fn status(&mut self) -> Result<(Status, String), AdminError> {
        let message = self.request(pb::StatusRequest {});
        let answer = self.stub.status(message).await.map_err(|status| refusal(&self.url, &status))?;
        let json = answer.into_inner().status_json;
        Ok((parse(&self.url, &json)?, json))
    }

    /// Stops a run.
    ///
    /// # Errors
    /// `Refused`, `Unreachable`.
    pub async fn cancel(&mut self, run: String) -> Result<(), AdminError> {
        let message = self.request(pb::CancelRequest { run });
        self.stub.cancel(message).await.map_err(|status| refusal(&self.url, &status))?;
        Ok(())
    }
}

impl Events {
    /// The next event; `None` if the coordinator ended the stream.
    ///
    /// # Errors
    /// `Unreachable`, `Protocol`.
    pub async fn next(&mut self) -> Result<Option<Stamped>, AdminError> {
        let message = self.stream.message().await.map_err(|status| refusal(&self.url, &status))?;
        message.map(|message| parse(&self.url, &message.event_json)).transpose()
    }
}
