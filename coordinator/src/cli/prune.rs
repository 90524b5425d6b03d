//! `prune`, `resume` and `report`.

use std::path::Path;

use espalier_common::job::JobSpec;

use super::args::{LocalArgs, PruneArgs, ReportArgs, ResumeArgs};
use super::{CliError, cluster, job, local, screen, table};
use crate::fleet::Roster;
use crate::journal;
use crate::report::{self, Report};
use crate::run::Run;

/// The main job.
pub(crate) async fn run(args: Box<PruneArgs>, json: bool) -> Result<(), CliError> {
    let job = job::job(&args)?;
    match &args.coordinator {
        Some(url) => cluster::submit(url, &job, args.run.as_deref(), json).await,
        None => {
            let folder = job::run_folder(&args, &job);
            run_here(job, &folder, &args.local, json).await
        }
    }
}

/// Takes up a run where it stopped.
pub(crate) async fn resume(args: ResumeArgs, json: bool) -> Result<(), CliError> {
    let path = args.run.join("job.toml");
    let job: JobSpec = espalier_common::config::load_document(&path).map_err(|error| CliError::rejected(&error))?;
    run_here(job, &args.run, &args.local, json).await
}

async fn run_here(job: JobSpec, folder: &Path, local: &LocalArgs, json: bool) -> Result<(), CliError> {
    let stop = local::stop_on_signal();
    let roster = Roster::default();
    let setting = local::setting(folder, local, roster.clone(), stop)?;
    let events = setting.events.clone();
    let existed = folder.exists();
    let result = local::shown(&events, json, async {
        let run = Run::open(job, setting)?;
        let logs = folder.join("logs");
        Box::pin(local::with_workers(local, &logs, roster, run.execute())).await
    })
    .await;
    match result {
        Ok(report) => {
            print_report(&report, folder, json);
            Ok(())
        }
        Err(mut error) => {
            explain(&mut error, folder, existed);
            Err(error)
        }
    }
}

/// Says what is safe and how to go on; a run that can never succeed leaves nothing behind.
fn explain(error: &mut CliError, folder: &Path, existed: bool) {
    if error.code == crate::error::exit::REJECTED {
        if !existed {
            // It was made by this very call; if it cannot be removed, it does no harm.
            let _ = std::fs::remove_dir_all(folder);
        }
    } else if folder.join("journal").exists() {
        let folder = folder.display();
        error.message.push_str(&format!(
            "; committed layers are safe in {folder}, logs in {folder}/logs: espalier resume {folder}"
        ));
    }
}

/// Prints the report of a run from its journal alone.
pub(crate) fn report(args: &ReportArgs, json: bool) -> Result<(), CliError> {
    let records = journal::read(&args.run.join("journal")).map_err(|error| CliError::rejected(&error))?;
    let report = report::build(&records).map_err(|error| CliError::rejected(&error))?;
    print_report(&report, &args.run, json);
    Ok(())
}

pub(super) fn print_report(report: &Report, folder: &Path, json: bool) {
    if json {
        screen::out(&serde_json::to_string_pretty(report).expect("a report is plain data"));
    } else {
        screen::out(&table::summary(report, &folder.to_string_lossy()));
    }
}
