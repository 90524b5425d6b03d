//! Which calls are let through: a layer in front of every service, and what [`crate::web`] asks before it shows a page.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use espalier_common::clock::Stopwatch;
use http::header::AUTHORIZATION;
use http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::warn;

use crate::Secret;
use crate::incoming::{Identity, Peer};
use crate::role::{self, Access, Role, Roles};
use crate::tokens::{Bearer, Tokens};

/// The scheme of the `authorization` header, in lower case.
const SCHEME: &str = "bearer ";
/// What browsers can ask a person for: the password is the token, whatever the name is.
const BROWSERS_SCHEME: &str = "basic ";

/// Why a call is not let through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a method of ours.
    #[error("there is no such method")]
    UnknownMethod,
    /// Not a page of ours.
    #[error("there is no such page")]
    UnknownPage,
    /// Nobody knows where the call comes from.
    #[error("the connection has no peer")]
    NoPeer,
    /// Neither certificate nor token.
    #[error("needs a certificate or a token")]
    NotAuthenticated,
    /// A token that nobody has.
    #[error("the token is not known")]
    UnknownToken,
    /// Somebody else may.
    #[error("is for {}, but {who} has: {}", role::list(wanted.iter()), role::list(roles))]
    WrongRole {
        /// Who calls.
        who: String,
        /// With which roles.
        roles: Roles,
        /// Who may.
        wanted: &'static [Role],
    },
}

impl Refusal {
    fn code(&self) -> Code {
        match self {
            Self::UnknownMethod | Self::UnknownPage => Code::Unimplemented,
            Self::NoPeer => Code::Internal,
            Self::NotAuthenticated | Self::UnknownToken => Code::Unauthenticated,
            Self::WrongRole { .. } => Code::PermissionDenied,
        }
    }
}

/// Whether a call to the method at `path` is let through. Pure.
///
/// # Errors
/// Why it is not.
pub fn admit(path: &str, identity: &Identity, bearer: Option<&Bearer>) -> Result<(), Refusal> {
    holds(role::callers(path).ok_or(Refusal::UnknownMethod)?, identity, bearer)
}

/// Whether the page at `path` is shown. Pure.
///
/// # Errors
/// Why it is not.
pub fn admit_to_page(path: &str, identity: &Identity, bearer: Option<&Bearer>) -> Result<(), Refusal> {
    match role::access(path).ok_or(Refusal::UnknownPage)? {
        Access::Open => Ok(()),
        Access::For(wanted) => holds(wanted, identity, bearer),
    }
}

fn holds(wanted: &'static [Role], identity: &Identity, bearer: Option<&Bearer>) -> Result<(), Refusal> {
    let mut roles = match identity {
        Identity::Local => return Ok(()),
        Identity::Certified { roles, .. } => roles.clone(),
        Identity::Stranger => Roles::new(),
    };
    let who = match (identity, bearer) {
        (_, Some(bearer)) => bearer.name.clone(),
        (Identity::Stranger, None) => return Err(Refusal::NotAuthenticated),
        (identity, None) => identity.to_string(),
    };
    roles.extend(bearer.map(|bearer| bearer.role));
    if role::may(&roles, wanted) { Ok(()) } else { Err(Refusal::WrongRole { who, roles, wanted }) }
}

/// What is told how long a call took: its path, and seconds until its answer (or, for a stream, the head of it).
pub type Observer = Arc<dyn Fn(&str, f64) + Send + Sync>;

/// Stands in front of services and lets calls through, or not.
#[derive(Clone, Default)]
pub struct Guard {
    tokens: Option<Arc<Tokens>>,
    observer: Option<Observer>,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Guard").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

impl Guard {
    /// A guard that takes certificates, and `tokens` if there are any.
    pub fn new(tokens: Option<Arc<Tokens>>) -> Self {
        Self { tokens, observer: None }
    }

    /// The same guard, which also tells how long the calls took that it let through.
    #[must_use]
    pub fn observed_by(self, observer: Observer) -> Self {
        Self { observer: Some(observer), ..self }
    }

    async fn check(&self, path: &str, peer: Option<&Peer>, token: Option<&Secret>) -> Result<(), Refusal> {
        let identity = &peer.ok_or(Refusal::NoPeer)?.identity;
        admit(path, identity, self.bearer(token).await?.as_ref())
    }

    /// Whether a page is shown.
    pub(crate) async fn check_page(&self, path: &str, peer: &Peer, token: Option<&Secret>) -> Result<(), Refusal> {
        if role::access(path) == Some(Access::Open) {
            return Ok(());
        }
        admit_to_page(path, &peer.identity, self.bearer(token).await?.as_ref())
    }

    async fn bearer(&self, token: Option<&Secret>) -> Result<Option<Bearer>, Refusal> {
        match (&self.tokens, token) {
            // A wrong token is never overlooked, whatever else the peer has.
            (Some(tokens), Some(token)) => Ok(Some(tokens.bearer(token).await.ok_or(Refusal::UnknownToken)?)),
            (None, Some(_)) => Err(Refusal::UnknownToken),
            (_, None) => Ok(None),
        }
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// The token that a browser, a scraper or a script shows for a page.
pub(crate) fn page_token<B>(request: &Request<B>) -> Option<Secret> {
    let header = request.headers().get(AUTHORIZATION)?.to_str().unwrap_or_default();
    match header.get(..BROWSERS_SCHEME.len()) {
        Some(scheme) if scheme.eq_ignore_ascii_case(BROWSERS_SCHEME) => {
            let pair = BASE64_STANDARD.decode(header[BROWSERS_SCHEME.len()..].trim()).unwrap_or_default();
            let pair = String::from_utf8(pair).unwrap_or_default();
            Some(Secret::new(pair.split_once(':').map_or_else(String::new, |(_, password)| password.to_owned())))
        }
        _ => token(request),
    }
}

/// A service behind a guard.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

/// The token of a call. One that is not readable is a token that nobody has.
fn token<B>(request: &Request<B>) -> Option<Secret> {
    let header = request.headers().get(AUTHORIZATION)?.to_str().unwrap_or_default();
    let token = match header.get(..SCHEME.len()) {
        Some(scheme) if scheme.eq_ignore_ascii_case(SCHEME) => &header[SCHEME.len()..],
        _ => "",
    };
    Some(Secret::new(token.to_owned()))
}

impl<S, B, R> Service<Request<B>> for Guarded<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // The one that was ready is called; its clone waits for the next call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let guard = self.guard.clone();
        Box::pin(async move {
            let (path, peer) = (request.uri().path().to_owned(), request.extensions().get::<Peer>().cloned());
            let token = token(&request);
            // No service, and no log of a service, sees it.
            request.headers_mut().remove(AUTHORIZATION);
            match guard.check(&path, peer.as_ref(), token.as_ref()).await {
                Ok(()) => {
                    let watch = Stopwatch::start();
                    let answer = inner.call(request).await;
                    if let Some(observer) = &guard.observer {
                        observer(&path, watch.seconds());
                    }
                    answer
                }
                Err(refusal) => {
                    let (address, subject) = peer.map(|peer| (peer.address, peer.identity)).unzip();
                    let (address, subject) = (address.map(|a| a.to_string()), subject.map(|s| s.to_string()));
                    warn!(peer = address, subject, method = path, reason = %refusal, "call refused");
                    let message = format!("{path} {refusal}");
                    Ok(Status::new(refusal.code(), message).into_http())
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certified(roles: &[Role]) -> Identity {
        Identity::Certified { subject: "CN=x".to_owned(), roles: roles.iter().copied().collect() }
    }

    fn bearer(role: Role) -> Bearer {
        Bearer { name: "alice".to_owned(), role }
    }

    const SUBMIT: &str = "/espalier.v1.Admin/Submit";
    const STATUS: &str = "/espalier.v1.Admin/Status";
    const REGISTER: &str = "/espalier.v1.Coordinator/Register";
    const PRUNE: &str = "/espalier.v1.Worker/PruneLayer";
    const FETCH: &str = "/espalier.v1.Activations/Fetch";

    #[test]
    fn certificates_open_what_their_roles_are_for() {
        admit(SUBMIT, &certified(&[Role::Submitter]), None).unwrap();
        admit(STATUS, &certified(&[Role::Viewer]), None).unwrap();
        admit(REGISTER, &certified(&[Role::Worker]), None).unwrap();
        admit(PRUNE, &certified(&[Role::Coordinator]), None).unwrap();
        admit(FETCH, &certified(&[Role::Worker]), None).unwrap();
        for (path, roles) in [
            (SUBMIT, &[Role::Viewer][..]),
            (SUBMIT, &[Role::Worker]),
            (PRUNE, &[Role::Worker]),
            (FETCH, &[Role::Submitter]),
            (REGISTER, &[Role::Submitter, Role::Coordinator]),
            (STATUS, &[]),
        ] {
            let refusal = admit(path, &certified(roles), None).unwrap_err();
            assert_eq!(refusal.code(), Code::PermissionDenied, "{path} {roles:?}");
        }
    }

    #[test]
    fn tokens_open_what_their_role_is_for() {
        admit(SUBMIT, &Identity::Stranger, Some(&bearer(Role::Submitter))).unwrap();
        admit(SUBMIT, &certified(&[Role::Viewer]), Some(&bearer(Role::Submitter))).unwrap();
        let refusal = admit(SUBMIT, &Identity::Stranger, Some(&bearer(Role::Viewer))).unwrap_err();
        assert_eq!(refusal.to_string(), "is for submitter, but alice has: viewer");
        assert_eq!(admit(STATUS, &Identity::Stranger, None), Err(Refusal::NotAuthenticated));
        assert!(admit(REGISTER, &Identity::Stranger, Some(&bearer(Role::Submitter))).is_err());
    }

    #[test]
    fn on_loopback_everybody_may_but_only_what_there_is() {
        admit(SUBMIT, &Identity::Local, None).unwrap();
        assert_eq!(admit("/grpc.Any/Thing", &Identity::Local, None), Err(Refusal::UnknownMethod));
        assert_eq!(admit("/grpc.Any/Thing", &certified(&Role::ALL), None), Err(Refusal::UnknownMethod));
    }

    #[test]
    fn pages_are_for_viewers_but_probes_for_everybody() {
        let stranger = &Identity::Stranger;
        admit_to_page("/healthz", stranger, None).unwrap();
        admit_to_page("/metrics", stranger, Some(&bearer(Role::Viewer))).unwrap();
        admit_to_page("/", stranger, Some(&bearer(Role::Submitter))).unwrap();
        admit_to_page("/api/state", &certified(&[Role::Viewer]), None).unwrap();
        admit_to_page("/api/state", &Identity::Local, None).unwrap();
        for page in ["/", "/metrics", "/api/state", "/api/events", "/report"] {
            assert_eq!(admit_to_page(page, stranger, None), Err(Refusal::NotAuthenticated), "{page}");
            assert!(admit_to_page(page, &certified(&[Role::Worker]), None).is_err(), "{page}");
        }
        assert_eq!(admit_to_page("/etc/passwd", &certified(&Role::ALL), None), Err(Refusal::UnknownPage));
    }

    #[test]
    fn browsers_show_the_token_as_a_password() {
        let request = |value: &str| Request::builder().header(AUTHORIZATION, value).body(()).unwrap();
        let read = |value: &str| page_token(&request(value)).unwrap().expose().to_owned();
        assert_eq!(read(&format!("Basic {}", BASE64_STANDARD.encode("anybody:to:ken"))), "to:ken");
        assert_eq!(read("Bearer token"), "token");
        assert_eq!([read("Basic ???"), read(&format!("basic {}", BASE64_STANDARD.encode("token")))], ["", ""]);
        assert!(page_token(&Request::new(())).is_none());
    }

    #[test]
    fn tokens_are_read_from_the_header() {
        let request = |value: &str| Request::builder().header(AUTHORIZATION, value).body(()).unwrap();
        let read = |value: &str| token(&request(value)).unwrap().expose().to_owned();
        assert_eq!((read("Bearer abc"), read("bearer abc"), read("Basic abc"), read("Bearer")).0, "abc");
        assert_eq!([read("bearer abc"), read("Basic abc"), read("Bear")], ["abc", "", ""]);
        assert!(token(&Request::new(())).is_none());
    }
}
