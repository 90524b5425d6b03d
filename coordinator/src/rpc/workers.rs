//! What workers call.

use std::time::Duration;

use espalier_common::ids::{Boundary, WorkerId};
use espalier_common::wire;
use espalier_proto::v1 as pb;
use espalier_proto::v1::coordinator_server::Coordinator;
use tonic::{Request, Response, Status};

use crate::fleet::{FleetEvent, Offer, Roster, RosterError};

/// How often workers say that they are alive.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The service that workers register with and report to.
#[derive(Clone)]
pub struct WorkerDesk {
    roster: Roster,
}

impl WorkerDesk {
    /// A desk for `roster`.
    pub fn new(roster: Roster) -> Self {
        Self { roster }
    }
}

fn bad(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl Coordinator for WorkerDesk {
    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterResponse>, Status> {
        let message = request.into_inner();
        let offer = Offer {
            name: message.name,
            endpoint: message.endpoint,
            build: message.build,
            instruction_set: message.instruction_set,
            threads: message.threads,
            memory_bytes: message.memory_bytes,
            device: message.device,
            gflops: message.gflops,
        };
        let refused = |error: RosterError| match error {
            // Another machine may be of the right kind.
            RosterError::InstructionSet { .. } => Status::aborted(error.to_string()),
            _ => Status::failed_precondition(error.to_string()),
        };
        let worker = self.roster.register(offer).await.map_err(refused)?;
        let heartbeat_interval_ms = HEARTBEAT_INTERVAL.as_millis() as u32;
        Ok(Response::new(pb::RegisterResponse {
            worker: worker.0,
            heartbeat_interval_ms,
            coordinator: self.roster.life(),
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatResponse>, Status> {
        let message = request.into_inner();
        let worker = WorkerId(message.worker);
        let known = message.coordinator == self.roster.life()
            && self.roster.note(worker, message.peak_rss_bytes, message.bytes_received);
        if known {
            let progress = message
                .progress
                .into_iter()
                .filter_map(|progress| {
                    let (_, lease) = wire::lease_from_wire(progress.lease?).ok()?;
                    Some((lease, progress.phase, progress.done, progress.total))
                })
                .collect();
            self.roster.tell(FleetEvent::Heartbeat { worker, progress }).await;
        }
        Ok(Response::new(pb::HeartbeatResponse { known, dismissed: self.roster.is_dismissed() }))
    }

    async fn report(&self, request: Request<pb::ReportRequest>) -> Result<Response<pb::ReportResponse>, Status> {
        let message = request.into_inner();
        let lease = message.lease.ok_or_else(|| bad("message lacks lease"))?;
        let (run, lease) = wire::lease_from_wire(lease).map_err(bad)?;
        let outcome = message.outcome.ok_or_else(|| bad("message lacks outcome"))?;
        let result = Box::new(wire::outcome_from_wire(outcome).map_err(bad)?);
        let held = message.held.into_iter().map(Boundary).collect();
        self.roster.note(lease.worker, message.peak_rss_bytes, message.bytes_received);
        self.roster.tell(FleetEvent::Report { run, lease, result, held }).await;
        Ok(Response::new(pb::ReportResponse {}))
    }

    async fn leave(&self, request: Request<pb::LeaveRequest>) -> Result<Response<pb::LeaveResponse>, Status> {
        let message = request.into_inner();
        if message.coordinator == self.roster.life() {
            self.roster.remove(WorkerId(message.worker)).await;
        }
        Ok(Response::new(pb::LeaveResponse {}))
    }
}
