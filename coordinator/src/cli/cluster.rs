//! Serving a cluster, and talking to one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::clock::SystemClock;
use espalier_common::config::{self, Overrides};
use espalier_common::job::JobSpec;
use espalier_common::tasks::TaskGroup;
use espalier_gate::web::Readiness;
use espalier_gate::{Dialer, Web};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::args::{AccessArgs, CancelArgs, CoordinatorArgs, RemoteArgs};
use super::screen::Screen;
use super::{CliError, configuration, local, prune, screen, table};
use crate::config::{ClientConfig, CoordinatorConfig};
use crate::desk::{self, JobDesk, Setup};
use crate::error::exit;
use crate::events::{EventLog, RunEvent, Stamped, Status};
use crate::fleet::Roster;
use crate::http::Pages;
use crate::metrics::CoordinatorMetrics;
use crate::plan::strategy::Asked;
use crate::rpc::admin::AdminDesk;
use crate::rpc::client::{Access, AdminClient, AdminError};
use crate::rpc::service::Service;

/// The configuration that a coordinator's arguments amount to.
pub(crate) fn config(args: &CoordinatorArgs, log: Overrides) -> Result<CoordinatorConfig, CliError> {
    let overrides = configuration::overrides(log, &args.config);
    CoordinatorConfig::load(args.config.config.as_deref(), overrides).map_err(|error| CliError::rejected(&error))
}

/// Serves until a signal comes, or until the one job that it was given is done. A run that is going on when it is stopped can be
/// taken up again.
pub(crate) async fn serve(args: CoordinatorArgs, config: CoordinatorConfig, json: bool) -> Result<(), CliError> {
    let entrance = config.entrance().map_err(|error| CliError::rejected(&error))?;
    let (tracer, sending) = config.tracer().map_err(|error| CliError::rejected(&error))?;
    let limits = config.limits();
    let section = config.coordinator;
    let roster = Roster::new(Dialer::new(entrance.credentials.clone()));
    let (metrics, readiness) = (CoordinatorMetrics::default(), Readiness::not_yet("the runs are being read"));
    let stop = local::stop_on_signal();
    let tasks = TaskGroup::new();
    metrics.watch(tracer.clone());
    let pages = Pages::new(roster.clone(), metrics.clone(), readiness.clone(), tasks.token());
    let mut web = None;
    if let Some(address) = config.http.listen {
        let listener = Web::open("http.listen", address, entrance.clone()).await;
        let listener = listener.map_err(|error| CliError::rejected(&error))?;
        web = Some(listener.url());
        listener.serve(pages.router(), &tasks);
    }
    let setup = Setup {
        clock: Arc::new(SystemClock::default()),
        workers_wanted: section.workers,
        workers_patience: section.workers_patience(),
        limits,
        strategy: section.strategy,
        tracer,
    };
    let opened = match &args.job {
        Some(path) => {
            let job = super::job::of_file(path)?;
            let run_url = args.run.unwrap_or_else(|| super::job::run_beside_output(&job));
            JobDesk::of_one(roster.clone(), job, super::job::absolute(&run_url), setup, metrics.clone())
                .map(|(desk, events)| (desk, Some((events, run_url))))
        }
        None => {
            let runs = super::job::absolute(&section.runs);
            JobDesk::open(roster.clone(), runs, setup, metrics.clone()).map(|desk| (desk, None))
        }
    };
    let (desk, one) = opened.map_err(|error| {
        let code = if error.is_passing() { exit::INTERRUPTED } else { exit::REJECTED };
        CliError { code, ..CliError::rejected(&error) }
    })?;
    let admin = AdminDesk::new(desk.clone());
    let service = Service::start(section.listen, entrance, roster.clone(), Some(admin), metrics).await?;
    pages.show(Arc::new(desk.clone()));
    readiness.set(Ok(()));
    // Of one job, standard output with --json is the report's alone.
    let say = |text: String| if json && one.is_some() { info!("{text}") } else { screen::out(&text) };
    say(format!("listening on {}", service.url()));
    if let Some(url) = web {
        say(format!("pages on {url}"));
    }
    let done = match &one {
        Some((events, run_url)) => one_job(&desk, events, run_url, &roster, &stop, json).await,
        None => many_jobs(&desk, &stop, &tasks).await,
    };
    readiness.set(Err("it is leaving"));
    // Longer than a run needs to write down that it was stopped.
    tasks.shut_down(Duration::from_secs(15)).await;
    service.stop().await;
    sending.finish().await;
    if desk.lost().is_cancelled() {
        let message = format!("another coordinator has taken over the runs in {}", section.runs);
        return Err(CliError { message, code: exit::INTERRUPTED });
    }
    done
}

/// Runs what is submitted until a signal comes, or another coordinator.
async fn many_jobs(desk: &JobDesk, stop: &CancellationToken, tasks: &TaskGroup) -> Result<(), CliError> {
    let (working, token) = (desk.clone(), stop.clone());
    tasks.spawn(async move { working.work(token).await });
    let lost = desk.lost();
    tokio::select! {
        () = stop.cancelled() => {}
        () = lost.cancelled() => stop.cancel(),
    }
    Ok(())
}

/// Some heartbeats.
const FAREWELL: Duration = Duration::from_secs(5);

/// Runs one job to its end. Workers are dismissed, unless the coordinator will be started again and need them.
async fn one_job(
    desk: &JobDesk,
    events: &EventLog,
    run_url: &str,
    roster: &Roster,
    stop: &CancellationToken,
    json: bool,
) -> Result<(), CliError> {
    let last = local::shown(events, json, desk.work_on_one(stop)).await;
    let done = match last {
        RunEvent::Ended { reason, exit_code } => Err(CliError { message: reason, code: exit_code }),
        RunEvent::Finished { report } => {
            prune::print_report(&report, run_url, json);
            Ok(())
        }
        _ => Err(CliError { message: "the run ended without saying how".to_owned(), code: exit::BUG }),
    };
    if !matches!(&done, Err(error) if error.code == exit::INTERRUPTED) {
        roster.dismiss(FAREWELL).await;
    }
    done
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
    (run, strategy): (Option<&str>, Option<Asked>),
    json: bool,
) -> Result<(), CliError> {
    let mut client = connect(url, access).await?;
    let job_json = serde_json::to_string(job).expect("a job is plain data");
    let run_url = run.map(super::job::absolute).unwrap_or_default();
    // Submitting it twice follows the first.
    let key = desk::key_of(job);
    let run = client.submit(job_json, key, run_url, strategy).await.map_err(|error| failed(&error))?;
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
