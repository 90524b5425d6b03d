//! A coordinator of this process' own, with workers of its own, for one run.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::clock::SystemClock;
use espalier_common::config::Overrides;
use espalier_common::tasks::TaskGroup;
use espalier_gate::trace::Sending;
use espalier_gate::web::Readiness;
use espalier_gate::{Entrance, Tracer, Web};
use tokio_util::sync::CancellationToken;

use super::CliError;
use super::args::LocalArgs;
use super::screen::{self, Screen};
use crate::config::CoordinatorConfig;
use crate::error::RunError;
use crate::events::{EventLog, RunEvent};
use crate::fleet::Roster;
use crate::http::{OnlyRun, Pages};
use crate::local::{Launch, LocalWorkers};
use crate::metrics::CoordinatorMetrics;
use crate::rpc::service::Service;
use crate::run::Setting;
use crate::schedule::Limits;

/// Workers of this machine that ended do not come back: there is no point in waiting long. One that was too busy to be heard,
/// or is asked a second time, does.
const WITHOUT_WORKERS: Duration = Duration::from_secs(10);

/// The setting of a run on this machine, untraced.
pub(crate) fn setting(
    run_url: &str,
    local: &LocalArgs,
    roster: Roster,
    stop: CancellationToken,
) -> Result<Setting, CliError> {
    let config = CoordinatorConfig::load(None, Overrides::default()).map_err(|error| CliError::rejected(&error))?;
    Ok(Setting {
        run_url: run_url.to_owned(),
        roster,
        workers_wanted: local.workers,
        workers_patience: config.coordinator.workers_patience(),
        events: EventLog::default(),
        clock: Arc::new(SystemClock::default()),
        strategy: config.coordinator.strategy,
        limits: Limits { without_workers: WITHOUT_WORKERS, ..config.limits() },
        workers_return: false,
        stop,
        tracer: Tracer::default(),
    })
}

/// What spans of a run on this machine are told to, and what sends them.
pub(crate) fn tracer() -> Result<(Tracer, Sending), CliError> {
    let config = CoordinatorConfig::load(None, Overrides::default()).map_err(|error| CliError::rejected(&error))?;
    config.tracer().map_err(|error| CliError::rejected(&error))
}

/// A token that Ctrl-C (or SIGTERM) sets. A second one ends the process at once.
pub(crate) fn stop_on_signal() -> CancellationToken {
    let stop = CancellationToken::new();
    let token = stop.clone();
    // It lives as long as the process, by design: there is no parent that could join it before the process ends.
    #[allow(clippy::disallowed_methods, reason = "the signal watcher has the process as its parent")]
    tokio::spawn(async move {
        signal().await;
        token.cancel();
        signal().await;
        std::process::exit(i32::from(crate::error::exit::INTERRUPTED));
    });
    stop
}

async fn signal() {
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut terminate) => drop(terminate.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => if interrupted.is_err() { std::future::pending::<()>().await },
        () = terminate => {}
    }
}

/// Starts a service and workers, does `work` with them, and ends them whatever came of it.
pub(crate) async fn with_workers<T>(
    local: &LocalArgs,
    logs: &Path,
    roster: Roster,
    metrics: CoordinatorMetrics,
    work: impl Future<Output = Result<T, RunError>>,
) -> Result<T, CliError> {
    let config = CoordinatorConfig::load(None, Overrides::default()).map_err(|error| CliError::rejected(&error))?;
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let service = Service::start(address, Entrance::default(), roster.clone(), None, metrics).await?;
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = local.threads.unwrap_or(available);
    let launch = Launch {
        program: config.coordinator.worker_program,
        device: local.device,
        workers: local.workers,
        threads,
        logs: logs.to_owned(),
        coordinator: service.address,
    };
    let workers = LocalWorkers::start(&launch, &roster).await?;
    workers.told().into_iter().for_each(screen::note);
    let result = work.await;
    workers.stop().await;
    service.stop().await;
    Ok(result?)
}

/// Serves the page of the one run of this process on `address`, on loopback only, until the group is cancelled.
pub(crate) async fn serve_page(
    address: SocketAddr,
    setting: &Setting,
    metrics: &CoordinatorMetrics,
    tasks: &TaskGroup,
) -> Result<(), CliError> {
    let web = Web::open("--http", address, Entrance::default()).await.map_err(|error| CliError::rejected(&error))?;
    let pages =
        Pages::new(setting.roster.clone(), metrics.clone(), Readiness::not_yet("it takes no jobs"), tasks.token());
    pages.show(Arc::new(OnlyRun { events: setting.events.clone(), roster: setting.roster.clone() }));
    screen::note(&format!("page on {}", web.url()));
    web.serve(pages.router(), tasks);
    Ok(())
}

/// Shows events while `work` runs.
pub(crate) async fn shown<T>(events: &EventLog, silent: bool, work: impl Future<Output = T>) -> T {
    let mut screen = Screen::new(silent);
    let (past, mut live) = events.follow();
    past.iter().for_each(|stamped| screen.show(&stamped.event));
    tokio::pin!(work);
    let result = loop {
        tokio::select! {
            result = &mut work => break result,
            Ok(stamped) = live.recv() => screen.show(&stamped.event),
        }
    };
    while let Ok(stamped) = live.try_recv() {
        if !matches!(stamped.event, RunEvent::Progress { .. }) {
            screen.show(&stamped.event);
        }
    }
    screen.clear();
    result
}
