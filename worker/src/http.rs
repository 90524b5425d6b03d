//! What a worker shows over HTTP: probes and numbers. Who may look at the numbers is the gate's to say.

use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use espalier_common::metric;
use espalier_gate::web::probes;

use crate::fleet::Membership;
use crate::session::Session;

/// `/healthz`: the loop that registers and beats turns; `/readyz`: the coordinator knows this worker; `/metrics`.
pub fn router(membership: &Arc<Membership>, session: &Arc<Session>) -> Router {
    let (alive, numbers) = (Arc::clone(membership), Arc::clone(session));
    let metrics = move || async move { ([(CONTENT_TYPE, metric::CONTENT_TYPE)], numbers.metrics().render(&numbers)) };
    probes(session.readiness().clone(), move || alive.alive()).route("/metrics", get(metrics))
}
