//! Pages and probes over HTTP, behind the same door as the services: TLS beyond loopback, and a role for all but the probes.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use espalier_common::tasks::TaskGroup;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::header::{AUTHORIZATION, HOST, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tower::Service as _;
use tracing::{debug, warn};

use crate::guard::{Refusal, page_token};
use crate::incoming::{Connection, Identity, Peer};
use crate::settings::check_listener;
use crate::{Entrance, GateError, Guard};

/// Connections at a time: a few browsers and scrapers, not the world. One more is closed at once.
const VISITORS: usize = 128;

/// A visitor that takes longer to say what it wants is gone.
const HEADERS: Duration = Duration::from_secs(10);

/// What answers under way may take once the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// A listener for pages that is bound, so that its address is known before anybody is told of it.
#[derive(Debug)]
pub struct Web {
    listener: TcpListener,
    entrance: Entrance,
    address: SocketAddr,
}

impl Web {
    /// Binds `address`, which the configuration names `key`; port 0 takes a free one.
    ///
    /// # Errors
    /// `OpenListener` beyond loopback without certificates; `Listen`.
    pub async fn open(key: &'static str, address: SocketAddr, entrance: Entrance) -> Result<Self, GateError> {
        check_listener(key, address, entrance.credentials.is_some())?;
        let failed = |source| GateError::Listen { key, address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, entrance, address })
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        let scheme = if self.entrance.credentials.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves `pages` until the group is cancelled. Every request is held against the table of pages first.
    pub fn serve(self, pages: Router, tasks: &TaskGroup) {
        let mut connections = self.entrance.open_pages(self.listener, tasks);
        let door = Door { guard: Guard::new(self.entrance.tokens), pages };
        let (group, token) = (tasks.clone(), tasks.token());
        tasks.spawn(async move {
            let visitors = Arc::new(Semaphore::new(VISITORS));
            loop {
                let connection = tokio::select! {
                    Some(Ok(connection)) = connections.next() => connection,
                    () = token.cancelled() => return,
                    else => return,
                };
                let Ok(permit) = Arc::clone(&visitors).try_acquire_owned() else {
                    warn!(peer = %connection.peer().address, reason = "too many connections", "visitor turned away");
                    continue;
                };
                let (door, token) = (door.clone(), token.clone());
                group.spawn(async move {
                    door.attend(connection, &token).await;
                    drop(permit);
                });
            }
        });
    }
}

/// Whether a program can do what it is there for, and if not why.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<watch::Sender<Result<(), &'static str>>>);

impl Readiness {
    /// A program that is not ready yet.
    pub fn not_yet(reason: &'static str) -> Self {
        Self(Arc::new(watch::Sender::new(Err(reason))))
    }

    /// Says how it is now.
    pub fn set(&self, state: Result<(), &'static str>) {
        let _ = self.0.send_replace(state);
    }

    /// How it is.
    ///
    /// # Errors
    /// Why it is not ready.
    pub fn get(&self) -> Result<(), &'static str> {
        *self.0.borrow()
    }

    /// Tells when it changes.
    pub fn changes(&self) -> watch::Receiver<Result<(), &'static str>> {
        self.0.subscribe()
    }
}

/// `/healthz`, which asks `alive`, and `/readyz`: 200 or 503, with a word for people.
pub fn probes<E: ToString>(
    readiness: Readiness,
    alive: impl Fn() -> Result<(), E> + Clone + Send + Sync + 'static,
) -> Router {
    let said = |state: Result<(), String>, word: &'static str| match state {
        Ok(()) => (StatusCode::OK, format!("{word}\n")),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    };
    let ready = move || async move { said(readiness.get().map_err(str::to_owned), "ready") };
    let healthy = move || async move { said(alive().map_err(|reason| reason.to_string()), "alive") };
    Router::new().route("/healthz", get(healthy)).route("/readyz", get(ready))
}

/// What a connection is served by.
#[derive(Clone)]
struct Door {
    guard: Guard,
    pages: Router,
}

impl Door {
    async fn attend(self, connection: Connection, token: &CancellationToken) {
        let peer = connection.peer().clone();
        let service = hyper::service::service_fn(move |request| {
            let (door, peer) = (self.clone(), peer.clone());
            async move { Ok::<_, Infallible>(door.answer(request, &peer).await) }
        });
        let mut builder = Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(HEADERS)).max_concurrent_streams(16);
        let serving = builder.serve_connection(TokioIo::new(connection), service);
        tokio::pin!(serving);
        let served = tokio::select! {
            served = serving.as_mut() => served,
            () = token.cancelled() => {
                serving.as_mut().graceful_shutdown();
                match tokio::time::timeout(FAREWELL, serving).await {
                    Ok(served) => served,
                    Err(_) => return,
                }
            }
        };
        if let Err(error) = served {
            debug!(error, "a visitor's connection ended");
        }
    }

    async fn answer<B>(mut self, mut request: Request<B>, peer: &Peer) -> Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path().to_owned();
        let token = page_token(&request);
        // No page, and no log of a page, sees it.
        request.headers_mut().remove(AUTHORIZATION);
        let mut response = if !is_for_this_host(&request, peer) {
            let reason = "a page on loopback is asked for by address or as localhost";
            refused(peer, &path, StatusCode::MISDIRECTED_REQUEST, reason)
        } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = refused(peer, &path, StatusCode::METHOD_NOT_ALLOWED, "pages are only looked at");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        } else {
            match self.guard.check_page(&path, peer, token.as_ref()).await {
                Ok(()) => self.pages.call(request).await.unwrap_or_else(|never| match never {}),
                Err(refusal) => turned_away(peer, &path, &refusal),
            }
        };
        harden(&mut response);
        response
    }
}

/// Whether the request means this host. Without TLS whoever uses the machine may look; but another site that has its own name
/// lead to loopback must not look through a browser of somebody who uses it.
fn is_for_this_host<B>(request: &Request<B>, peer: &Peer) -> bool {
    if !matches!(peer.identity, Identity::Local) {
        return true;
    }
    let header = || request.headers().get(HOST)?.to_str().ok()?.parse::<http::uri::Authority>().ok();
    let Some(authority) = request.uri().authority().cloned().or_else(header) else { return false };
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

fn turned_away(peer: &Peer, path: &str, refusal: &Refusal) -> Response<Body> {
    let status = match refusal {
        Refusal::UnknownPage | Refusal::UnknownMethod => StatusCode::NOT_FOUND,
        Refusal::NotAuthenticated | Refusal::UnknownToken => StatusCode::UNAUTHORIZED,
        Refusal::WrongRole { .. } => StatusCode::FORBIDDEN,
        Refusal::NoPeer => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = refused(peer, path, status, &refusal.to_string());
    if status == StatusCode::UNAUTHORIZED {
        let headers = response.headers_mut();
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"espalier\""));
        // A browser asks a person: any name, the token as the password.
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"espalier\", charset=\"UTF-8\""));
    }
    response
}

fn refused(peer: &Peer, path: &str, status: StatusCode, reason: &str) -> Response<Body> {
    warn!(peer = %peer.address, subject = %peer.identity, page = path, reason, "page refused");
    let mut response = Response::new(Body::from(format!("{reason}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// What every answer says to browsers. A page with scripts or styles of its own names them itself.
fn harden(response: &mut Response<Body>) {
    let headers = response.headers_mut();
    headers
        .entry(CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(RESOURCE_POLICY, HeaderValue::from_static("same-origin"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(identity: Identity) -> Peer {
        Peer { address: "127.0.0.1:1".parse().unwrap(), identity }
    }

    fn to(host: &str) -> Request<()> {
        Request::builder().uri("/").header(HOST, host).body(()).unwrap()
    }

    #[test]
    fn another_sites_name_does_not_lead_to_loopback() {
        let local = peer(Identity::Local);
        for host in ["127.0.0.1:8080", "localhost", "LOCALHOST:80", "[::1]:9", "[::1]"] {
            assert!(is_for_this_host(&to(host), &local), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "", "a b"] {
            assert!(!is_for_this_host(&to(host), &local), "{host:?}");
        }
        assert!(!is_for_this_host(&Request::new(()), &local));
        assert!(is_for_this_host(&to("coordinator.example"), &peer(Identity::Stranger)));
    }

    #[tokio::test]
    async fn what_is_not_to_be_seen_is_refused_with_a_reason() {
        let pages = Router::new().fallback(|| async { "seen" });
        let door = Door { guard: Guard::default(), pages };
        let ask = async |request: Request<Body>, identity| door.clone().answer(request, &peer(identity)).await;
        let get = |path: &str| Request::builder().uri(path).header(HOST, "127.0.0.1").body(Body::empty()).unwrap();
        assert_eq!(ask(get("/healthz"), Identity::Stranger).await.status(), StatusCode::OK);
        assert_eq!(ask(get("/"), Identity::Local).await.status(), StatusCode::OK);
        assert_eq!(ask(get("/nowhere"), Identity::Local).await.status(), StatusCode::NOT_FOUND);
        let refused = ask(get("/metrics"), Identity::Stranger).await;
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(refused.headers().get_all(WWW_AUTHENTICATE).iter().count(), 2);
        let worker = Identity::Certified { subject: "CN=w".to_owned(), roles: [crate::Role::Worker].into() };
        assert_eq!(ask(get("/metrics"), worker).await.status(), StatusCode::FORBIDDEN);
        let mut post = get("/");
        *post.method_mut() = Method::POST;
        let response = ask(post, Identity::Local).await;
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert!(response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap().contains("default-src 'none'"));
    }
}
