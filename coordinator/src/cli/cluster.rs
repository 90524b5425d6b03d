//! Serving a cluster, and talking to one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::clock::SystemClock;
use espalier_common::config::{self, Overrides};
use espalier_common::digest::Digest;
use espalier_common::job::JobSpec;
use espalier_common::tasks::TaskGroup;
use espalier_gate::web::Readiness;
use espalier_gate::{Dialer, Web};

use super::args::{AccessArgs, CancelArgs, CoordinatorArgs, RemoteArgs};
use super::screen::Screen;
use super::{CliError, local, prune, screen, table};
use crate::config::{ClientConfig, CoordinatorConfig};
use crate::desk::JobDesk;
use crate::error::exit;
use crate::events::{RunEvent, Stamped, Status};
use crate::fleet::Roster;
use crate::http::Pages;
use crate::metrics::CoordinatorMetrics;
use crate::rpc::admin::AdminDesk;
use crate::rpc::client::{Access, AdminClient, AdminError};
use crate::rpc::service::Service;

/// Serves until a signal comes; a run that is going on is stopped so that it can be resumed.
pub(crate) async fn serve(args: CoordinatorArgs) -> Result<(), CliError> {
    let overrides = Overrides::default()
        .set("coordinator.listen", args.listen.map(|address| address.to_string()))
        .set("coordinator.runs", args.runs)
        .set("coordinator.workers", args.workers);
    let config =
        CoordinatorConfig::load(args.config.as_deref(), overrides).map_err(|error| CliError::rejected(&error))?;
    let entrance = config.entrance().map_err(|error| CliError::rejected(&error))?;
    let limits = config.limits();
    let section = config.coordinator;
    let roster = Roster::new(Dialer::new(entrance.credentials.clone()));
    let (metrics, readiness) = (CoordinatorMetrics::default(), Readiness::not_yet("the runs are being read"));
    let stop = local::stop_on_signal();
    let tasks = TaskGroup::new();
    let pages = Pages::new(roster.clone(), metrics.clone(), readiness.clone(), tasks.token());
    let mut web = None;
    if let Some(address) = config.http.listen {
        let listener = Web::open("http.listen", address, entrance.clone()).await;
        let listener = listener.map_err(|error| CliError::rejected(&error))?;
        web = Some(listener.url());
        listener.serve(pages.router(), &tasks);
    }
    let clock = Arc::new(SystemClock::default());
    let runs = super::job::absolute(&section.runs);
    let desk =
        JobDesk::open(roster.clone(), runs, clock, section.workers, limits, metrics.clone()).map_err(|error| {
            let code = if error.is_passing() { exit::INTERRUPTED } else { exit::REJECTED };
            CliError { code, ..CliError::rejected(&error) }
        })?;
    let service = Service::start(section.listen, entrance, roster, Some(AdminDesk::new(desk.clone())), metrics).await?;
    pages.show(Arc::new(desk.clone()));
    readiness.set(Ok(()));
    screen::out(&format!("listening on {}", service.url()));
    if let Some(url) = web {
        screen::out(&format!("pages on {url}"));
    }
    let (working, token) = (desk.clone(), stop.clone());
    tasks.spawn(async move { working.work(token).await });
    let lost = desk.lost();
    tokio::select! {
        () = stop.cancelled() => {}
        () = lost.cancelled() => stop.cancel(),
    }
    readiness.set(Err("it is leaving"));
    // Longer than a run needs to write down that it was stopped.
    tasks.shut_down(Duration::from_secs(15)).await;
    service.stop().await;
    if lost.is_cancelled() {
        let message = format!("another coordinator has taken over the runs in {}", section.runs);
        return Err(CliError { message, code: exit::INTERRUPTED });
    }
    Ok(())
}

pub(super) fn failed(error: &AdminError) -> CliError {
    let code = match error {
        AdminError::BadUrl { .. } => exit::USAGE,
        AdminError::Unreachable { .. } => exit::INTERRUPTED,
        AdminError::Gate(_) | AdminError::Untrusted { .. } | AdminError::Refused(_) => exit::REJECTED,
        AdminError::Protocol { .. } => exit::BUG,
    };
    CliError { message: error.to_string(), code }
}

pub(super) async fn connect(url: &str, args: &AccessArgs) -> Result<AdminClient, CliError> {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
    let overrides = Overrides::default()
        .set("tls.folder", path(&args.tls_folder))
        .set("tls.ca", path(&args.tls_ca))
        .set("tls.certificate", path(&args.tls_certificate))
        .set("tls.key", path(&args.tls_key))
        .set("client.token_file", path(&args.token_file));
    let config: ClientConfig =
        config::load(None, config::ENV_PREFIX, overrides).map_err(|error| CliError::rejected(&error))?;
    let access = Access::open(&config).map_err(|error| CliError::rejected(&error))?;
    AdminClient::connect(url, &access).await.map_err(|error| failed(&error))
}

/// Submits a job and follows it to its end. Interrupting this leaves the run going on.
pub(crate) async fn submit(
    url: &str,
    access: &AccessArgs,
    job: &JobSpec,
    run: Option<&str>,
    json: bool,
) -> Result<(), CliError> {
    let mut client = connect(url, access).await?;
    let job_json = serde_json::to_string(job).expect("a job is plain data");
    let run_url = run.map(super::job::absolute).unwrap_or_default();
    // The same job to the same output is the same job: submitting it twice follows the first.
    let key = Digest::of(job_json.as_bytes()).to_string();
    let run = client.submit(job_json, key, run_url).await.map_err(|error| failed(&error))?;
    let mut events = client.watch(&run).await.map_err(|error| failed(&error))?;
    let mut screen = Screen::new(json);
    let mut folder = String::new();
    let stop = local::stop_on_signal();
    loop {
        let event = tokio::select! {
            event = events.next() => event.map_err(|error| failed(&error))?,
            () = stop.cancelled() => None,
        };
        let Some(Stamped { event, .. }) = event else {
            let message = format!("no longer following {run}, which goes on: espalier status --coordinator {url}");
            return Err(CliError { message, code: exit::INTERRUPTED });
        };
        screen.show(&event);
        match event {
            RunEvent::Opened { url, .. } => folder = url,
            RunEvent::Finished { report } => {
                screen.clear();
                prune::print_report(&report, &folder, json);
                return Ok(());
            }
            RunEvent::Ended { reason, exit_code } => {
                screen.clear();
                return Err(CliError { message: reason, code: exit_code });
            }
            _ => {}
        }
    }
}

/// Shows a coordinator's runs and workers.
pub(crate) async fn status(args: RemoteArgs, json: bool) -> Result<(), CliError> {
    let mut client = connect(&args.coordinator, &args.access).await?;
    let (status, document) = client.status().await.map_err(|error| failed(&error))?;
    if json {
        screen::out(&document);
    } else {
        screen::out(&tables(&status));
    }
    Ok(())
}

/// Runs and workers.
pub(super) fn tables(status: &Status) -> String {
    let mut runs = table::table(&["run", "model", "layers", "state"]);
    for run in &status.runs {
        let layers = run.layers.map_or_else(String::new, |layers| format!("{}/{layers}", run.committed));
        runs.add_row([run.run.to_string(), run.model.clone(), layers, run.state.clone()]);
    }
    let mut workers = table::table(&["worker", "name", "device", "threads", "GFLOP/s", "peak MB"]);
    for worker in &status.workers {
        workers.add_row([
            worker.worker.to_string(),
            worker.offer.name.clone(),
            worker.offer.device.clone(),
            worker.offer.threads.to_string(),
            format!("{:.0}", worker.offer.gflops),
            format!("{:.0}", worker.peak_rss_bytes as f64 / 1e6),
        ]);
    }
    format!("{runs}\n{workers}")
}

/// Stops a run.
pub(crate) async fn cancel(args: CancelArgs) -> Result<(), CliError> {
    let mut client = connect(&args.remote.coordinator, &args.remote.access).await?;
    client.cancel(args.run).await.map_err(|error| failed(&error))
}
