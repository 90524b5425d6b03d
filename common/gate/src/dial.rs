//! Connections out: encrypted if there are certificates, and the other side is who it should be.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::{TlsConnector, TlsStream};
use tower::Service;

use crate::certificate::holder;
use crate::stream::Stream;
use crate::{Credentials, GateError, Role};

/// A server that takes longer to show its certificate and to answer is not there.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What is read of a server's first words: an HTTP/2 SETTINGS frame fits.
const FIRST_WORDS: usize = 256;

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody listens there, or nothing goes there.
    #[error("{address}: {source}")]
    Tcp {
        /// Where.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One of the two does not believe the other.
    #[error("{address}: {reason}")]
    Untrusted {
        /// Where.
        address: String,
        /// Who does not believe what.
        reason: String,
    },
    /// A name of loopback that leads elsewhere, or a URL that was never checked.
    #[error("{address} is not on loopback, and the connection is not encrypted")]
    NotLoopback {
        /// Where.
        address: String,
    },
    /// It accepted and said nothing.
    #[error("{address} said nothing for {} s", HANDSHAKE.as_secs())]
    Silent {
        /// Where.
        address: String,
    },
}

impl DialError {
    /// What one side does not believe of the other, if that is why a call failed.
    pub fn distrust(status: &tonic::Status) -> Option<String> {
        Self::distrust_in(std::error::Error::source(status)?)
    }

    /// The same for any error.
    pub fn distrust_in(error: &(dyn std::error::Error + 'static)) -> Option<String> {
        let found = std::iter::successors(Some(error), |error| error.source()).find_map(|e| e.downcast_ref::<Self>());
        found.filter(|error| matches!(error, Self::Untrusted { .. })).map(ToString::to_string)
    }
}

/// Connects to others, as this process may.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    credentials: Option<Arc<Credentials>>,
}

impl Dialer {
    /// With certificates; without, only loopback is called.
    pub fn new(credentials: Option<Arc<Credentials>>) -> Self {
        Self { credentials }
    }

    /// Whether connections are encrypted.
    pub fn has_tls(&self) -> bool {
        self.credentials.is_some()
    }

    /// How to reach the server at `url`, whose certificate must name the role `server`. Connects for each call, with the
    /// certificates as they then are.
    ///
    /// # Errors
    /// `Url`; `PlainUrl`, `PlainUrlDespiteTls`, `NoTls` for a URL that does not go with the certificates.
    pub fn connector(&self, url: &str, server: Role) -> Result<Connector, GateError> {
        let (uri, host) = parse(url)?;
        let url = || url.to_owned();
        match (uri.scheme_str(), &self.credentials) {
            (Some("https"), Some(_)) => {}
            (Some("https"), None) => return Err(GateError::NoTls { url: url() }),
            (Some("http"), Some(_)) => return Err(GateError::PlainUrlDespiteTls { url: url() }),
            (Some("http"), None) if is_loopback(&host) => {}
            (Some("http"), None) => return Err(GateError::PlainUrl { url: url() }),
            _ => return Err(scheme_of_neither_kind(url())),
        }
        Ok(Connector { credentials: self.credentials.clone(), server: Some(server) })
    }

    /// How to reach a server that is none of ours, whose certificate names a host and no role: a collector of traces. One on
    /// loopback may be called without encryption, whatever the certificates.
    ///
    /// # Errors
    /// `Url`, `PlainUrl`, `NoTls`.
    pub fn connector_to_collector(&self, url: &str) -> Result<Connector, GateError> {
        let (uri, host) = parse(url)?;
        let url = || url.to_owned();
        match (uri.scheme_str(), &self.credentials) {
            (Some("https"), Some(credentials)) => {
                Ok(Connector { credentials: Some(Arc::clone(credentials)), server: None })
            }
            (Some("https"), None) => Err(GateError::NoTls { url: url() }),
            (Some("http"), _) if is_loopback(&host) => Ok(Connector { credentials: None, server: None }),
            (Some("http"), _) => Err(GateError::PlainUrl { url: url() }),
            _ => Err(scheme_of_neither_kind(url())),
        }
    }
}

/// A URL, and its host.
fn parse(url: &str) -> Result<(Uri, String), GateError> {
    let wrong = |reason: String| GateError::Url { url: url.to_owned(), reason };
    let uri: Uri = url.parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
    let host = host(&uri).ok_or_else(|| wrong("it names no host".to_owned()))?.to_owned();
    Ok((uri, host))
}

fn scheme_of_neither_kind(url: String) -> GateError {
    GateError::Url { url, reason: "it begins with neither https:// nor http://".to_owned() }
}

/// The host of a URL, an IPv6 address without its brackets.
fn host(uri: &Uri) -> Option<&str> {
    let host = uri.host().filter(|host| !host.is_empty())?;
    Some(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Connects a channel, as often as it asks to.
#[derive(Debug, Clone)]
pub struct Connector {
    credentials: Option<Arc<Credentials>>,
    /// The role that the server's certificate must name, if it is one of ours.
    server: Option<Role>,
}

impl Connector {
    pub(crate) async fn connect(self, uri: Uri) -> Result<Stream, DialError> {
        let host = host(&uri).unwrap_or_default();
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let address = format!("{host}:{port}");
        let tcp = |source| DialError::Tcp { address: address.clone(), source };
        let Some(credentials) = &self.credentials else {
            let all = lookup_host((host, port)).await.map_err(tcp)?;
            let loopback: Vec<_> = all.filter(|address| address.ip().is_loopback()).collect();
            if loopback.is_empty() {
                return Err(DialError::NotLoopback { address });
            }
            let stream = TcpStream::connect(&loopback[..]).await.map_err(tcp)?;
            stream.set_nodelay(true).map_err(tcp)?;
            return Ok(Stream::Plain(stream));
        };
        let stream = TcpStream::connect((host, port)).await.map_err(tcp)?;
        stream.set_nodelay(true).map_err(tcp)?;
        let untrusted = |reason: String| DialError::Untrusted { address: address.clone(), reason };
        let failed = |error: io::Error| match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => {
                untrusted(format!("the server refuses this process' certificate: {alert:?}"))
            }
            Some(rustls) => untrusted(format!("the server's certificate is not believed: {rustls}")),
            None => tcp(error),
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|error| untrusted(error.to_string()))?;
        let config = Arc::clone(&credentials.current().await.client);
        let handshake = async {
            let mut stream = TlsConnector::from(config).connect(name, stream).await.map_err(failed)?;
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let named = certificates.first().and_then(holder);
            if let Some(wanted) = self.server
                && !named.as_ref().is_some_and(|holder| holder.roles.contains(&wanted))
            {
                let subject = named.map(|holder| holder.subject).unwrap_or_default();
                return Err(untrusted(format!("the server's certificate ({subject}) has not the role {wanted}")));
            }
            // In TLS 1.3 a server judges the client's certificate after the client has finished. An HTTP/2 server speaks
            // first, so that a refusal is seen here and not as a call that fails for no reason.
            let mut first = vec![0; FIRST_WORDS];
            let count = stream.read(&mut first).await.map_err(failed)?;
            if count == 0 {
                return Err(tcp(io::ErrorKind::UnexpectedEof.into()));
            }
            first.truncate(count);
            Ok(Stream::Tls(Box::new(TlsStream::Client(stream)), first))
        };
        tokio::time::timeout(HANDSHAKE, handshake)
            .await
            .unwrap_or_else(|_| Err(DialError::Silent { address: address.clone() }))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(uri).await.map(TokioIo::new) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_certificates_only_loopback_is_called() {
        let dialer = Dialer::default();
        for url in ["http://127.0.0.1:7433", "http://[::1]:7433", "http://localhost:7433"] {
            dialer.connector(url, Role::Coordinator).unwrap();
        }
        let refused = |url: &str| dialer.connector(url, Role::Coordinator).unwrap_err();
        for url in ["http://10.1.2.3:7433", "http://coordinator:7433", "http://127.0.0.1.example", "http://[fd00::1]:1"]
        {
            assert!(matches!(refused(url), GateError::PlainUrl { .. }), "{url}");
        }
        assert!(matches!(refused("https://coordinator:7433"), GateError::NoTls { .. }));
        for url in ["coordinator:7433", "ftp://localhost", "/path", "", "http://", "a b"] {
            assert!(matches!(refused(url), GateError::Url { .. }), "{url}");
        }
    }

    #[test]
    fn a_collector_is_called_in_plain_on_loopback_only() {
        let dialer = Dialer::default();
        dialer.connector_to_collector("http://127.0.0.1:4317").unwrap();
        let refused = |url: &str| dialer.connector_to_collector(url).unwrap_err();
        assert!(matches!(refused("http://collector:4317"), GateError::PlainUrl { .. }));
        assert!(matches!(refused("https://collector:4317"), GateError::NoTls { .. }));
        assert!(matches!(refused("collector:4317"), GateError::Url { .. }));
    }

    #[tokio::test]
    async fn a_url_is_judged_again_when_it_is_called() {
        let connector = Dialer::default().connector("http://localhost:1", Role::Worker).unwrap();
        let error = connector.connect("http://192.0.2.1:1".parse().unwrap()).await.unwrap_err();
        assert!(matches!(error, DialError::NotLoopback { .. }), "{error}");
    }
}
