//! What the command line calls.

use std::pin::Pin;

use espalier_proto::v1 as pb;
use espalier_proto::v1::admin_server::Admin;
use futures::{Stream, StreamExt, stream};
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use crate::desk::JobDesk;
use crate::events::Stamped;
use crate::plan::strategy::{Asked, UnknownStrategy};

/// The service that takes jobs and tells of them.
#[derive(Clone)]
pub struct AdminDesk {
    desk: JobDesk,
}

impl AdminDesk {
    /// A service in front of `desk`.
    pub fn new(desk: JobDesk) -> Self {
        Self { desk }
    }
}

fn encode(event: &Stamped) -> Result<pb::RunEvent, Status> {
    serde_json::to_string(event)
        .map(|event_json| pb::RunEvent { event_json })
        .map_err(|error| Status::internal(error.to_string()))
}

#[tonic::async_trait]
impl Admin for AdminDesk {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::RunEvent, Status>> + Send>>;

    async fn submit(&self, request: Request<pb::SubmitRequest>) -> Result<Response<pb::SubmitResponse>, Status> {
        let message = request.into_inner();
        let strategy: Option<Asked> = match message.strategy.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|error: UnknownStrategy| Status::invalid_argument(error.to_string()))?),
        };
        let submitted = self.desk.submit(&message.job_json, &message.idempotency_key, &message.run_url, strategy);
        let run = submitted.map_err(|error| match error.is_passing() {
            true => Status::unavailable(error.to_string()),
            false => Status::invalid_argument(error.to_string()),
        })?;
        Ok(Response::new(pb::SubmitResponse { run: run.0 }))
    }

    async fn watch(&self, request: Request<pb::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let run = request.into_inner().run;
        let ticket = self.desk.ticket(&run).ok_or_else(|| Status::not_found(format!("no run {run}")))?;
        let (past, live) = ticket.events.follow();
        let ended = past.iter().any(Stamped::is_last);
        // A follower that is too slow loses progress, never the end: the end is the last thing sent.
        let live = BroadcastStream::new(live).filter_map(|event| async move { event.ok() });
        let live = if ended { stream::empty().left_stream() } else { live.right_stream() };
        let events = stream::iter(past).chain(live).scan(false, |over, event| {
            let item = (!*over).then_some(event);
            *over |= item.as_ref().is_some_and(Stamped::is_last);
            async move { item }
        });
        Ok(Response::new(Box::pin(events.map(|event| encode(&event)))))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        let status_json = serde_json::to_string(&self.desk.status()).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(pb::StatusResponse { status_json }))
    }

    async fn cancel(&self, request: Request<pb::CancelRequest>) -> Result<Response<pb::CancelResponse>, Status> {
        let run = request.into_inner().run;
        if self.desk.cancel(&run) {
            Ok(Response::new(pb::CancelResponse {}))
        } else {
            Err(Status::not_found(format!("no run {run}")))
        }
    }
}
