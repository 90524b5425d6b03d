//! `verify`.

use espalier_common::device::DeviceChoice;
use espalier_common::{checkpoint, config};
use serde_json::json;

use super::args::{LocalArgs, VerifyArgs};
use super::{CliError, local, screen};
use crate::error::{RunError, exit};
use crate::fleet::{CallError, Roster};
use crate::metrics::CoordinatorMetrics;
use crate::run::wait_for_workers;
use crate::verify::{findings, quantised};

/// Prints what is wrong with a checkpoint; any finding is an exit code of 65.
pub(crate) async fn run(args: &VerifyArgs, json: bool) -> Result<(), CliError> {
    let Verdict { found, unchecked } = find(&args.model).await?;
    if json {
        screen::out(&json!({ "model": args.model, "findings": found, "unchecked": unchecked }).to_string());
    } else {
        unchecked.iter().for_each(|what| screen::out(&format!("not checked: {what}")));
        found.iter().for_each(|finding| screen::out(finding));
    }
    if found.is_empty() {
        if !json {
            screen::out("nothing is wrong");
        }
        return Ok(());
    }
    let message = format!("{}: {} findings, stock loaders may refuse it", args.model, found.len());
    Err(CliError { message, code: exit::REJECTED })
}

/// What was found, and what could not be looked at.
struct Verdict {
    found: Vec<String>,
    unchecked: Vec<String>,
}

async fn find(model: &str) -> Result<Verdict, CliError> {
    let opened = config::locate(model).map_err(|error| CliError::rejected(&error)).and_then(|path| {
        checkpoint::open(&path).map(|checkpoint| (path, checkpoint)).map_err(|error| CliError::rejected(&error))
    });
    // A checkpoint that cannot be opened has one finding: why.
    let (path, checkpoint) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Verdict { found: vec![error.message], unchecked: Vec::new() }),
    };
    let mut found = findings(checkpoint.as_ref());
    if let Some(method) = quantised(checkpoint.config()) {
        let what = format!("shapes and names of tensors, since the checkpoint is quantised ({method})");
        return Ok(Verdict { found, unchecked: vec![what] });
    }
    let absolute = std::path::absolute(&path).unwrap_or(path);
    found.extend(family_finding(&absolute.to_string_lossy()).await?);
    Ok(Verdict { found, unchecked: Vec::new() })
}

/// What a worker, which knows the families, has against the config and the shapes.
async fn family_finding(model: &str) -> Result<Option<String>, CliError> {
    let folder = tempfile::tempdir().map_err(|source| CliError::rejected(&source))?;
    let here = LocalArgs { workers: 1, threads: Some(1), device: DeviceChoice::Cpu };
    let roster = Roster::default();
    let setting = local::setting(&folder.path().to_string_lossy(), &here, roster.clone(), local::stop_on_signal())?;
    // The cheapest job there is: only its model is looked at.
    let job = json!({
        "model": { "source": model },
        "calibration": { "source": "none" },
        "method": { "name": "magnitude" },
        "output": { "uri": "none" },
    });
    let inspect = async {
        wait_for_workers(&setting).await?;
        let member = setting.roster.members().into_values().next().ok_or(RunError::WorkerDiedEarly)?;
        match member.client.inspect(job.to_string()).await {
            Ok(_) => Ok(None),
            Err(CallError::Fault(fault)) => Ok(Some(fault.message)),
            Err(error) => Err(RunError::Call(error)),
        }
    };
    local::with_workers(&here, &folder.path().join("logs"), roster.clone(), CoordinatorMetrics::default(), inspect)
        .await
}
