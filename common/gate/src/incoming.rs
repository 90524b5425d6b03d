//! Connections in: accepted, and if there are certificates, encrypted and checked before a service sees them.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io, io::IoSlice};

use espalier_common::tasks::TaskGroup;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::warn;

use crate::certificate::{Holder, holder};
use crate::credentials::{HTTP1, HTTP2, Witness};
use crate::role::Roles;
use crate::stream::Stream;
use crate::{Credentials, Tokens};

/// A peer that takes longer to say who it is has nothing to say.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Handshakes at a time: more than a fleet that registers at once, few enough that their buffers are no burden.
const HANDSHAKES: usize = 256;

/// Connections that wait for the server to take them.
const READY: usize = 16;

/// How long a peer that was turned away is listened to, so that it reads why.
const FAREWELL: Duration = Duration::from_secs(1);

/// After the system had no descriptor left, or the like.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Who is on the other side of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// From where.
    pub address: SocketAddr,
    /// Who.
    pub identity: Identity,
}

/// Who somebody is.
#[derive(Debug, Clone)]
pub enum Identity {
    /// Somebody on this machine, over loopback without TLS.
    Local,
    /// The holder of a certificate that was checked.
    Certified {
        /// For people.
        subject: String,
        /// What the certificate says the holder may do.
        roles: Roles,
    },
    /// Nobody knows yet: a token must say.
    Stranger,
}

impl fmt::Display for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => formatter.write_str("this machine"),
            Self::Certified { subject, .. } => formatter.write_str(subject),
            Self::Stranger => formatter.write_str("no certificate"),
        }
    }
}

/// How connections come in.
#[derive(Debug, Clone, Default)]
pub struct Entrance {
    /// The server's certificates; without them, it is for loopback only.
    pub credentials: Option<Arc<Credentials>>,
    /// Tokens that stand in for a client's certificate.
    pub tokens: Option<Arc<Tokens>>,
}

/// What comes in by a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Traffic {
    /// Calls: a certificate is needed unless tokens may stand in for it.
    Calls,
    /// Browsers, scrapers and probes: whoever has no certificate comes in as a stranger, and sees what is open.
    Pages,
}

impl Entrance {
    /// Connections of a listener, until the group is cancelled. A peer that is slow to say who it is delays no other.
    pub fn open(&self, listener: TcpListener, tasks: &TaskGroup) -> ReceiverStream<io::Result<Connection>> {
        self.open_for(Traffic::Calls, listener, tasks)
    }

    /// The same for a listener of pages, on which HTTP/1.1 may be spoken too and a certificate is never needed to come in: what
    /// may be seen without one is decided page by page.
    pub(crate) fn open_pages(
        &self,
        listener: TcpListener,
        tasks: &TaskGroup,
    ) -> ReceiverStream<io::Result<Connection>> {
        self.open_for(Traffic::Pages, listener, tasks)
    }

    fn open_for(
        &self,
        traffic: Traffic,
        listener: TcpListener,
        tasks: &TaskGroup,
    ) -> ReceiverStream<io::Result<Connection>> {
        let (ready, connections) = mpsc::channel(READY);
        let (entrance, group, token) = (self.clone(), tasks.clone(), tasks.token());
        tasks.spawn(async move {
            tokio::select! {
                () = entrance.accept(traffic, &listener, &group, &ready) => {}
                () = token.cancelled() => {}
            }
        });
        ReceiverStream::new(connections)
    }

    async fn accept(
        &self,
        traffic: Traffic,
        listener: &TcpListener,
        tasks: &TaskGroup,
        ready: &mpsc::Sender<io::Result<Connection>>,
    ) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let permit = Arc::clone(&handshakes).acquire_owned().await.expect("nobody closes the semaphore");
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let (entrance, ready, token) = (self.clone(), ready.clone(), tasks.token());
            tasks.spawn(async move {
                let admitted = tokio::select! {
                    admitted = entrance.admit(traffic, stream, address) => admitted,
                    () = token.cancelled() => None,
                };
                drop(permit);
                if let Some(connection) = admitted {
                    // A server that is gone takes no more connections.
                    let _ = ready.send(Ok(connection)).await;
                }
            });
        }
    }

    async fn admit(&self, traffic: Traffic, stream: TcpStream, address: SocketAddr) -> Option<Connection> {
        // Small messages must not wait for one another; where that cannot be had, they are slower.
        let _ = stream.set_nodelay(true);
        let Some(credentials) = &self.credentials else {
            if !address.ip().is_loopback() {
                warn!(peer = %address, reason = "not on loopback, and there is no [tls]", "connection refused");
                return None;
            }
            return Some(Connection {
                stream: Stream::Plain(stream),
                peer: Peer { address, identity: Identity::Local },
            });
        };
        let witness = Arc::new(Witness::default());
        let (takes_strangers, protocols) = match traffic {
            Traffic::Calls => (self.tokens.is_some(), &[HTTP2][..]),
            Traffic::Pages => (true, &[HTTP2, HTTP1][..]),
        };
        let config = match credentials.current().await.server(takes_strangers, protocols, &witness) {
            Ok(config) => config,
            Err(error) => {
                warn!(peer = %address, %error, "connection refused: the server's own certificates cannot be used");
                return None;
            }
        };
        let handshake = TlsAcceptor::from(Arc::new(config)).accept(stream).into_fallible();
        match tokio::time::timeout(HANDSHAKE, handshake).await {
            Ok(Ok(stream)) => {
                let identity = identify(stream.get_ref().1.peer_certificates(), address)?;
                let stream = Stream::Tls(Box::new(TlsStream::Server(stream)), Vec::new());
                Some(Connection { stream, peer: Peer { address, identity } })
            }
            Ok(Err((error, stream))) => {
                let subject = witness.subject().unwrap_or_default();
                warn!(peer = %address, subject, reason = %error, "connection refused");
                farewell(stream).await;
                None
            }
            Err(_) => {
                let reason = format!("no handshake within {} s", HANDSHAKE.as_secs());
                warn!(peer = %address, reason, "connection refused");
                None
            }
        }
    }
}

/// Who showed these certificates, which were checked.
fn identify(certificates: Option<&[CertificateDer<'_>]>, address: SocketAddr) -> Option<Identity> {
    let Some(certificate) = certificates.and_then(<[_]>::first) else { return Some(Identity::Stranger) };
    let Some(Holder { subject, roles, unknown_roles }) = holder(certificate) else {
        warn!(peer = %address, reason = "the certificate cannot be parsed", "connection refused");
        return None;
    };
    if !unknown_roles.is_empty() {
        warn!(peer = %address, subject, unknown = ?unknown_roles, "the certificate names roles that do not exist");
    }
    Some(Identity::Certified { subject, roles })
}

/// Lets a peer read why it was turned away: closing with bytes unread would take the alert away from it.
async fn farewell(mut stream: TcpStream) {
    let listen = async {
        let _ = stream.shutdown().await;
        let mut rest = [0; 512];
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    // It reads or it does not.
    let _ = tokio::time::timeout(FAREWELL, listen).await;
}

/// A connection whose peer is known.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
}

impl Connection {
    /// Who is on the other side.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
