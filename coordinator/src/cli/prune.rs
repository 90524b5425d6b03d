//! `prune`, `resume` and `report`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use espalier_common::config;
use espalier_common::job::JobSpec;
use espalier_common::store::{self, BlobStore, StoreError};
use espalier_common::tasks::TaskGroup;

use super::args::{LocalArgs, PruneArgs, ReportArgs, ResumeArgs, StrategyArg};
use super::{CliError, cluster, job, local, screen, table};
use crate::error::{RunError, exit};
use crate::events::EventLog;
use crate::fleet::Roster;
use crate::journal;
use crate::metrics::CoordinatorMetrics;
use crate::page;
use crate::plan::strategy::Asked;
use crate::report::{self, Report};
use crate::run::{Run, Setting, TIMELINE};
use crate::view::{RunView, Timeline};

/// The main job.
pub(crate) async fn run(args: Box<PruneArgs>, json: bool) -> Result<(), CliError> {
    let job = job::job(&args)?;
    match &args.coordinator {
        Some(url) => {
            let asked = args.strategy.map(Asked::from);
            cluster::submit(url, &args.access, &job, (args.run.as_deref(), asked), json).await
        }
        None => {
            let run_url = job::run_url(&args, &job);
            run_here((job, args.strategy), &run_url, &args.local, args.http, json).await
        }
    }
}

/// A longer job.toml is not one of ours.
const MAX_JOB_BYTES: u64 = 1 << 20;
/// Nor is a longer timeline.
const MAX_TIMELINE_BYTES: u64 = 64 << 20;

/// What a browser's last answer may take once the run has ended.
const FAREWELL: Duration = Duration::from_secs(2);

/// Takes up a run where it stopped.
pub(crate) async fn resume(args: ResumeArgs, json: bool) -> Result<(), CliError> {
    let store = open(&args.run)?;
    let job = match store.directory() {
        Some(_) if !args.run.contains("://") => config::load_document(&Path::new(&args.run).join("job.toml")),
        Some(directory) => config::load_document(&directory.join("job.toml")),
        None => {
            let text = store.get_at_most("job.toml", MAX_JOB_BYTES).map_err(RunError::from)?;
            config::parse_document(&store::join(&args.run, "job.toml"), &String::from_utf8_lossy(&text))
        }
    };
    let job: JobSpec = job.map_err(|error| CliError::rejected(&error))?;
    run_here((job, args.strategy), &args.run, &args.local, args.http, json).await
}

fn open(run_url: &str) -> Result<Arc<dyn BlobStore>, CliError> {
    Ok(config::open_store(run_url).map_err(RunError::from)?)
}

/// Where the workers' logs go. Those of a run in a folder are part of it; others stay on this machine, for people to read if
/// the run fails.
enum Logs {
    OfRun(PathBuf),
    Local(tempfile::TempDir),
}

impl Logs {
    fn of(run_url: &str, store: &dyn BlobStore) -> Result<Self, CliError> {
        match store.directory() {
            // As it was given, for the messages.
            Some(_) if !run_url.contains("://") => Ok(Self::OfRun(Path::new(run_url).join("logs"))),
            Some(directory) => Ok(Self::OfRun(directory.join("logs"))),
            None => {
                let folder = tempfile::Builder::new().prefix("espalier-logs-").tempdir();
                Ok(Self::Local(folder.map_err(|error| CliError::rejected(&error))?))
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::OfRun(path) => path,
            Self::Local(folder) => folder.path(),
        }
    }

    /// Keeps them beyond this process, if there are any, and says where.
    fn keep(self) -> Option<PathBuf> {
        let written = |path: &Path| std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        match self {
            Self::Local(folder) => written(folder.path()).then(|| folder.keep()),
            Self::OfRun(path) => Some(path),
        }
    }
}

async fn run_here(
    (job, strategy): (JobSpec, Option<StrategyArg>),
    run_url: &str,
    local: &LocalArgs,
    http: Option<SocketAddr>,
    json: bool,
) -> Result<(), CliError> {
    let stop = local::stop_on_signal();
    let roster = Roster::default();
    let metrics = CoordinatorMetrics::default();
    let events = EventLog::counted(metrics.clone());
    let (tracer, sending) = local::tracer()?;
    metrics.watch(tracer.clone());
    let setting = local::setting(run_url, local, roster.clone(), stop)?;
    let strategy = strategy.map(Asked::from).or(setting.strategy);
    let setting = Setting { events: events.clone(), tracer, strategy, ..setting };
    let pages = TaskGroup::new();
    if let Some(address) = http {
        local::serve_page(address, &setting, &metrics, &pages).await?;
    }
    let store = open(run_url)?;
    let logs = Logs::of(run_url, store.as_ref())?;
    let existed = store.directory().is_none_or(Path::exists);
    let result = local::shown(&events, json, async {
        let run = Run::open(job, setting)?;
        Box::pin(local::with_workers(local, logs.path(), roster, metrics, run.execute())).await
    })
    .await;
    pages.shut_down(FAREWELL).await;
    sending.finish().await;
    match result {
        Ok(report) => {
            print_report(&report, run_url, json);
            Ok(())
        }
        Err(mut error) => {
            explain(&mut error, run_url, store.as_ref(), logs, existed);
            Err(error)
        }
    }
}

/// Says what is safe and how to go on; a run that can never succeed leaves no folder behind.
fn explain(error: &mut CliError, run_url: &str, store: &dyn BlobStore, logs: Logs, existed: bool) {
    let is_rejected = error.code == crate::error::exit::REJECTED;
    let has_journal = match store.directory() {
        Some(folder) => folder.join("journal").exists(),
        // The store may be what failed, so it is not asked again.
        None => true,
    };
    let logs = logs.keep();
    if is_rejected {
        if let Some(folder) = store.directory().filter(|_| !existed) {
            // It was made by this very call; if it cannot be removed, it does no harm.
            let _ = std::fs::remove_dir_all(folder);
        }
    } else if has_journal {
        let logs = logs.map_or_else(String::new, |logs| format!(", logs in {}", logs.display()));
        error.message.push_str(&format!("; committed layers are safe in {run_url}{logs}: espalier resume {run_url}"));
    }
}

/// Prints the report of a run from its journal alone; as a page, with when things happened, if that was kept.
pub(crate) fn report(args: &ReportArgs, json: bool) -> Result<(), CliError> {
    let store = open(&args.run)?;
    let records = journal::read_run(store.as_ref()).map_err(RunError::from)?;
    let report = report::build(&records).map_err(|error| CliError::rejected(&error))?;
    if let Some(path) = &args.html {
        let view = RunView::of_report(report.clone(), timeline(store.as_ref())?);
        std::fs::write(path, page::frozen(&view)).map_err(|source| RunError::folder(path, source))?;
    }
    print_report(&report, &args.run, json);
    Ok(())
}

/// When things happened in a run, as far as that was kept: runs of earlier versions have none.
fn timeline(store: &dyn BlobStore) -> Result<Option<Timeline>, CliError> {
    let bytes = match store.get_at_most(TIMELINE, MAX_TIMELINE_BYTES) {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(RunError::from(error).into()),
    };
    let wrong = |error: serde_json::Error| CliError {
        message: format!("{}: {error}", store::join(store.url(), TIMELINE)),
        code: exit::REJECTED,
    };
    serde_json::from_slice(&bytes).map(Some).map_err(wrong)
}

pub(super) fn print_report(report: &Report, run_url: &str, json: bool) {
    if json {
        screen::out(&serde_json::to_string_pretty(report).expect("a report is plain data"));
    } else {
        screen::out(&table::summary(report, run_url));
    }
}
