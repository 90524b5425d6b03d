//! A worker's life: bind, serve, register, work, leave.

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::build::BUILD;
use espalier_common::fault::FaultClass;
use espalier_common::tasks::TaskGroup;
use espalier_gate::settings::check_listener;
use espalier_gate::trace::{Collector, Service};
use espalier_gate::{Dialer, Entrance, GateError, Role, Tracer, Web};
use espalier_proto::v1 as pb;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::calibrate::cache::ActivationCache;
use crate::config::WorkerConfig;
use crate::device::thread::build_compute_pool;
use crate::device::{self, Chosen, DeviceError, DeviceThread, memory};
use crate::fleet::{CallError, CoordinatorClient, Membership};
use crate::server::{Listener, ServerError};
use crate::session::{Peers, Session};
use crate::transport::{Joining, SharedMemory};

/// Threads that answer RPCs and move hidden states; compute has its own.
const RUNTIME_THREADS: usize = 2;

/// Ends of units that wait to be reported.
const REPORTS: usize = 16;

/// What a worker that was told to stop may take to say goodbye and to end its units.
const GRACE: Duration = Duration::from_secs(5);

/// Memory of a machine that does not tell.
const ASSUMED_MACHINE_BYTES: u64 = 4 << 30;

/// Why a worker ended without having been told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Nobody to work for.
    #[error("worker.coordinator is not set: give --coordinator URL")]
    NoCoordinator,
    /// Who may come in.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The runtime or its signals cannot be had.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// See the device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// See the server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// See the fleet.
    #[error(transparent)]
    Coordinator(#[from] CallError),
}

impl ServeError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::NoCoordinator | Self::Gate(_) | Self::Server(ServerError::Bind { .. } | ServerError::Gate(_)) => {
                FaultClass::Reject
            }
            Self::Device(error) => error.class(),
            Self::Runtime(_) | Self::Server(ServerError::Serve(_)) => FaultClass::RetryElsewhere,
            Self::Coordinator(error) => error.class(),
        }
    }
}

/// Works until a signal (or the end of standard input, if `exit_with_stdin`) says stop. Its spans go to `collector`.
///
/// # Errors
/// See [`ServeError`].
pub fn run(config: &WorkerConfig, collector: Option<Collector>, exit_with_stdin: bool) -> Result<(), ServeError> {
    let credentials = config.tls.open(Some(Role::Worker))?;
    let tokens = config.auth.open(credentials.is_some())?;
    check_listener("worker.listen", config.worker.listen, credentials.is_some())?;
    let chosen = device::open(config.worker.device, config.worker.tf32)?;
    tracing::info!(device = chosen.label, reason = chosen.reason, "computing on");
    let available = || std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = config.worker.threads.unwrap_or_else(available).max(1);
    build_compute_pool(threads)?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("runtime")
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let entrance = Entrance { credentials, tokens };
    let ended = runtime.block_on(live(config, (entrance, collector), (chosen, threads), exit_with_stdin, &runtime));
    // A unit deep in a product does not hear of cancellation at once; the process does not wait for it.
    runtime.shutdown_background();
    ended
}

async fn live(
    config: &WorkerConfig,
    (entrance, collector): (Entrance, Option<Collector>),
    (chosen, threads): (Chosen, usize),
    exit_with_stdin: bool,
    runtime: &Runtime,
) -> Result<(), ServeError> {
    let (config, http) = (&config.worker, config.http.listen);
    let web = match http {
        Some(address) => Some(Web::open("http.listen", address, entrance.clone()).await?),
        None => None,
    };
    let credentials = entrance.credentials;
    let is_encrypted = credentials.is_some();
    let url = config.coordinator.as_deref().ok_or(ServeError::NoCoordinator)?;
    let dialer = Dialer::new(credentials.clone());
    let client = CoordinatorClient::new(url, &dialer)?;
    let listener = Listener::open(config.listen, config.advertise.as_deref(), Entrance { credentials, tokens: None })?;
    let stop = stop_signal(exit_with_stdin)?;
    let machine_bytes = memory::machine_bytes().unwrap_or(ASSUMED_MACHINE_BYTES);
    let memory_bytes = config.memory_budget.unwrap_or(machine_bytes / 4 / u64::from(config.workers_here.get()));
    let scratch = config.scratch.clone().unwrap_or_else(std::env::temp_dir);
    // The other half of what is free is for weights, statistics and what layers give.
    let device_bytes = memory::free_bytes(&chosen.device).map(|free| config.device_budget.unwrap_or(free / 2));
    let cache = ActivationCache::on(chosen.device.clone(), device_bytes.unwrap_or(0), memory_bytes, scratch);
    let carrier = device::carrier(&chosen, config.nccl_reach(is_encrypted))?;
    let memory = config.shared_memory.then(|| SharedMemory::here(memory::neighbourhood())).flatten();
    let (reporter, reports) = mpsc::channel(REPORTS);
    let instruction_set = memory::instruction_set();
    let instruction_set = match &chosen.arithmetic {
        Some(arithmetic) => format!("{instruction_set}/{arithmetic}"),
        None => instruction_set,
    };
    let name = config.name.clone().unwrap_or_else(default_name);
    let service = Service { name: "espalier-worker", version: env!("CARGO_PKG_VERSION"), instance: Some(name.clone()) };
    let (tracer, sending) = Tracer::start(collector, service);
    let session = Session::with_peers(
        DeviceThread::start(chosen.device.clone())?,
        cache,
        reporter,
        runtime.handle().clone(),
        (
            Peers {
                dialer,
                joining: Joining::by(carrier, memory),
                patience: Duration::from_secs(config.assistant_patience_seconds.get().into()),
            },
            tracer,
        ),
    );
    let offer = pb::RegisterRequest {
        name,
        endpoint: listener.endpoint(),
        build: BUILD.to_owned(),
        instruction_set,
        threads: threads as u32,
        memory_bytes,
        device: chosen.label,
        gflops: config.gflops.unwrap_or_else(|| memory::measure_gflops(&chosen.device)),
    };
    tracing::info!(endpoint = %offer.endpoint, threads, memory_bytes, gflops = offer.gflops, "serving");
    session.metrics().describe(threads, offer.gflops, memory_bytes);
    let silence = config.coordinator_silence_seconds.map(|seconds| Duration::from_secs(seconds.get().into()));
    let membership = Arc::new(Membership::new(client, Arc::clone(&session), offer, silence));
    let tasks = TaskGroup::new();
    if let Some(web) = web {
        tracing::info!(url = web.url(), "pages");
        web.serve(crate::http::router(&membership, &session), &tasks);
    }
    let device = chosen.device;
    let ended = tokio::select! {
        () = stop => Ok(()),
        ended = membership.run(reports) => ended.map_err(ServeError::from),
        served = listener.serve(Arc::clone(&session), tasks.clone(), tasks.token()) => served.map_err(Into::into),
    };
    session.drain();
    session.readiness().set(Err("it is leaving"));
    if ended.is_ok() {
        let (peak_rss_bytes, peak_device_bytes) = (memory::peak_rss_bytes(), memory::peak_device_bytes(&device));
        tracing::info!(peak_rss_bytes, peak_device_bytes, "leaving");
        membership.leave(GRACE / 2).await;
    }
    if !tasks.shut_down(GRACE / 2).await {
        tracing::warn!("transfers did not end in time");
    }
    sending.finish().await;
    ended
}

/// Resolves on SIGTERM, on Ctrl-C, or at the end of standard input.
fn stop_signal(exit_with_stdin: bool) -> Result<impl Future<Output = ()>, ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Runtime)?;
    let (closed, stdin) = oneshot::channel();
    if exit_with_stdin {
        let wait = move || {
            // Whatever arrives is thrown away; an error means the same as the end.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = closed.send(());
        };
        std::thread::Builder::new().name("stdin".to_owned()).spawn(wait).map_err(ServeError::Runtime)?;
    }
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            Ok(()) = stdin => {}
        }
    })
}

/// Host and process.
fn default_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "worker" } else { host.trim() };
    format!("{host}-{}", std::process::id())
}
