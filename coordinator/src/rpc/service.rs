//! The coordinator as a service: a listener, the workers' desk, and (for clusters) the desk where jobs are submitted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::tasks::TaskGroup;
use espalier_gate::settings::check_listener;
use espalier_gate::{Entrance, Guard};
use espalier_proto::v1::admin_server::AdminServer;
use espalier_proto::v1::coordinator_server::CoordinatorServer;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic_health::server::{HealthReporter, health_reporter};
use tracing::error;

use crate::error::RunError;
use crate::fleet::Roster;
use crate::metrics::CoordinatorMetrics;
use crate::rpc::admin::AdminDesk;
use crate::rpc::workers::WorkerDesk;

/// Reports of a layer with thousands of sublayers stay far below this.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A coordinator that listens.
pub struct Service {
    /// Its workers.
    pub roster: Roster,
    /// Where it listens.
    pub address: SocketAddr,
    has_tls: bool,
    health: HealthReporter,
    tasks: TaskGroup,
}

impl Service {
    /// Listens on `address` (port 0: any) and serves workers, and `admin` if there is one; tells `metrics` how long calls take.
    ///
    /// # Errors
    /// `Gate` for an address beyond loopback without certificates; `Listen`.
    pub async fn start(
        address: SocketAddr,
        entrance: Entrance,
        roster: Roster,
        admin: Option<AdminDesk>,
        metrics: CoordinatorMetrics,
    ) -> Result<Self, RunError> {
        let failed = |source| RunError::Listen { address: address.to_string(), source };
        let has_tls = entrance.credentials.is_some();
        check_listener("coordinator.listen", address, has_tls)?;
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let tasks = TaskGroup::new();
        let token = tasks.token();
        let workers = CoordinatorServer::new(WorkerDesk::new(roster.clone()))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (health, health_service) = health_reporter();
        health.set_serving::<CoordinatorServer<WorkerDesk>>().await;
        if admin.is_some() {
            health.set_serving::<AdminServer<AdminDesk>>().await;
        }
        let observer = move |path: &str, seconds: f64| metrics.observe_call(path, seconds);
        let server = Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .layer(Guard::new(entrance.tokens.clone()).observed_by(Arc::new(observer)))
            .add_service(health_service)
            .add_service(workers)
            .add_optional_service(admin.map(AdminServer::new));
        let connections = entrance.open(listener, &tasks);
        tasks.spawn(async move {
            let served = server.serve_with_incoming_shutdown(connections, token.cancelled_owned()).await;
            if let Err(error) = served {
                error!(%error, "the coordinator's services ended");
            }
        });
        Ok(Self { roster, address, has_tls, health, tasks })
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.has_tls { "https" } else { "http" }, self.address)
    }

    /// Stops serving; whoever asks for its health meanwhile is told.
    pub async fn stop(self) {
        self.health.set_not_serving::<CoordinatorServer<WorkerDesk>>().await;
        self.health.set_not_serving::<AdminServer<AdminDesk>>().await;
        self.tasks.shut_down(Duration::from_secs(2)).await;
    }
}
