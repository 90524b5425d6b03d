//! `plan`: what a job would take, before any of it is spent.

use std::collections::BTreeMap;

use espalier_common::config::Overrides;
use espalier_common::device::DeviceChoice;
use espalier_common::job::{JobSpec, Propagation};
use espalier_common::outline::ModelOutline;
use serde::Serialize;

use super::args::{LocalArgs, PlanArgs};
use super::{CliError, job, local, screen, table};
use crate::config::CoordinatorConfig;
use crate::error::exit;
use crate::fleet::Roster;
use crate::metrics::CoordinatorMetrics;
use crate::plan::cluster::{ClusterSpec, PlannedWorker};
use crate::plan::cost;
use crate::plan::predict::{self, PlanError, Prediction, WorkerPart};
use crate::plan::strategy::{self, Asked, Choice, Strategy, StrategyError};
use crate::run;

/// Plans a job. One worker on this machine reads the model's headers; nothing else is started or written.
pub(crate) async fn run(mut args: PlanArgs, json: bool) -> Result<(), CliError> {
    let cluster = ClusterSpec::read(&args.cluster).map_err(|error| CliError::rejected(&error))?;
    let workers = cluster.workers().map_err(|error| CliError::rejected(&error))?;
    if args.prune.job.is_none() {
        // Neither is read or written here.
        args.prune.output.get_or_insert_with(|| "planned".to_owned());
        args.prune.calibration.get_or_insert_with(|| "planned.txt".to_owned());
    }
    let job = job::job(&args.prune)?;
    job.validate().map_err(|error| CliError::rejected(&error))?;
    let config = CoordinatorConfig::load(None, Overrides::default()).map_err(|error| CliError::rejected(&error))?;
    let asked = args.prune.strategy.map(Asked::from).or(config.coordinator.strategy).unwrap_or_default();
    let outline = outline(&job).await?;
    let mode = job.propagation.mode;
    let (choice, plans) = strategy::choose(asked, (&outline, &job), &cluster, &workers).map_err(refused)?;
    let mut costs = BTreeMap::new();
    let mut chosen = None;
    for (strategy, plan) in plans {
        costs.insert(strategy, StrategyCost { seconds: plan.seconds, bytes_moved: plan.bytes_moved });
        chosen = chosen.or_else(|| (strategy == choice.strategy).then_some(plan));
    }
    let prediction = chosen.expect("what is chosen was predicted");
    let plan = Planned { prediction, strategy: choice, strategies: costs };
    if job.pattern.allocation.needs_survey() {
        tracing::warn!("the survey that the job's allocation needs beforehand is not part of the prediction");
    }
    if json {
        screen::out(&serde_json::to_string_pretty(&plan).expect("a prediction is plain data"));
    } else {
        screen::out(&summary(&plan, mode));
    }
    Ok(())
}

/// What is predicted, with the strategy that it is predicted for, and what each would cost.
#[derive(Debug, Serialize)]
struct Planned {
    #[serde(flatten)]
    prediction: Prediction,
    strategy: Choice,
    strategies: BTreeMap<Strategy, StrategyCost>,
}

/// What a strategy would cost.
#[derive(Debug, Serialize)]
struct StrategyCost {
    seconds: f64,
    bytes_moved: u64,
}

fn refused(error: StrategyError) -> CliError {
    match error {
        StrategyError::Plan(error) => unplanned(error),
        StrategyError::Unfit { .. } => CliError::rejected(&error),
    }
}

fn unplanned(error: PlanError) -> CliError {
    let code = if error == PlanError::Endless { exit::BUG } else { exit::REJECTED };
    CliError { code, ..CliError::rejected(&error) }
}

/// What a job's model is made of, as one worker on this machine reads it in the model's headers.
pub(super) async fn outline(job: &JobSpec) -> Result<ModelOutline, CliError> {
    let folder = tempfile::tempdir().map_err(|source| CliError::rejected(&source))?;
    let one = LocalArgs { workers: 1, threads: Some(1), device: DeviceChoice::Cpu };
    let roster = Roster::default();
    let setting = local::setting(&folder.path().to_string_lossy(), &one, roster.clone(), local::stop_on_signal())?;
    local::with_workers(&one, &folder.path().join("logs"), roster, CoordinatorMetrics::default(), async {
        run::wait_for_workers(&setting).await?;
        run::inspect(&setting, job).await
    })
    .await
}

/// How the job would go on a cluster whose layers have owners.
pub(super) fn predict(
    outline: &ModelOutline,
    job: &JobSpec,
    cluster: &ClusterSpec,
    workers: &[PlannedWorker],
) -> Result<Prediction, CliError> {
    let cost = cost::count(outline, job, cluster.solver);
    let layer_bytes: Vec<u64> = outline.layers.iter().map(|layer| layer.bytes).collect();
    let how = (job.propagation.mode, Strategy::Layers);
    predict::predict(&cost, how, &layer_bytes, cluster, workers).map_err(unplanned)
}

fn summary(planned: &Planned, mode: Propagation) -> String {
    let (plan, choice) = (&planned.prediction, &planned.strategy);
    let mut workers = table::table(&[
        "worker",
        "layers",
        "busy s",
        "weights GB",
        "gram GB",
        "solver GB",
        "of GB",
        "hidden states GB",
        "peak GB",
    ]);
    for part in &plan.workers {
        let layers = match (part.layers.first(), part.layers.last()) {
            (Some(first), Some(last)) if part.layers.len() > 1 => format!("{} ({first} to {last})", part.layers.len()),
            (Some(only), _) => format!("1 ({only})"),
            _ => "none".to_owned(),
        };
        workers.add_row([
            part.worker.name.clone(),
            layers,
            format!("{:.1}", part.busy_seconds),
            gigabytes(part.memory.weights_bytes),
            gigabytes(part.memory.gram_bytes),
            gigabytes(part.memory.solver_bytes),
            gigabytes(part.worker.memory_bytes),
            gigabytes(part.memory.activation_bytes),
            gigabytes(part.peak_bytes),
        ]);
    }
    let mut phases = table::table(&["phase", "work s", "on the critical path s"]);
    for (phase, seconds) in &plan.seconds_by_phase {
        let critical = plan.critical_seconds_by_phase.get(phase).copied().unwrap_or_default();
        phases.add_row([(*phase).to_owned(), format!("{seconds:.1}"), format!("{critical:.1}")]);
    }
    let order = match mode {
        Propagation::Pruned => "each layer waits for the one before",
        Propagation::Dense => "layers are pruned side by side",
    };
    let tight = tight(&plan.workers);
    let others = planned.strategies.iter().filter(|(strategy, _)| **strategy != choice.strategy);
    let others: Vec<String> = others
        .map(|(strategy, cost)| {
            format!(
                "; {strategy} would take {:.1} s, with {} GB between workers",
                cost.seconds,
                gigabytes(cost.bytes_moved)
            )
        })
        .collect();
    format!(
        "{workers}\n{phases}\n{:.1} s in all ({order}); {} units on the critical path; {} GB between workers\nstrategy {}: {}{}{tight}",
        plan.seconds,
        plan.critical_path.len(),
        gigabytes(plan.bytes_moved),
        choice.strategy,
        choice.why,
        others.concat()
    )
}

/// Decimal gigabytes, as people are told of them.
fn gigabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}

/// What to do about workers whose memory is not enough for as many hidden states as they keep in it if they are not told otherwise;
/// those that need the same in a line of their own.
fn tight(workers: &[WorkerPart]) -> String {
    let mut alike: Vec<(String, Vec<&str>)> = Vec::new();
    for part in workers.iter().filter(|part| part.peak_bytes > part.worker.memory_bytes) {
        let WorkerPart { worker: PlannedWorker { name, memory_bytes, .. }, memory, peak_bytes, .. } = part;
        let text = format!(
            "would need {} of {} GB with a quarter of them for hidden states: memory_budget under [worker] must be {} GB at most",
            gigabytes(*peak_bytes),
            gigabytes(*memory_bytes),
            gigabytes(memory.most_hidden(*memory_bytes))
        );
        match alike.iter_mut().find(|(other, _)| *other == text) {
            Some((_, names)) => names.push(name),
            None => alike.push((text, vec![name])),
        }
    }
    let line = |(text, names): &(String, Vec<&str>)| match &names[..] {
        [name] => format!("\n{name} {text}"),
        [name, others @ ..] => format!("\n{name} and {} like it {text}", others.len()),
        [] => String::new(),
    };
    alike.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::memory::Memory;

    #[test]
    fn workers_that_are_tight_alike_share_a_line() {
        let part = |name: &str, gigabytes: u64| WorkerPart {
            worker: PlannedWorker { name: name.to_owned(), memory_bytes: gigabytes << 30, gflops: 1.0 },
            layers: Vec::new(),
            busy_seconds: 0.0,
            memory: Memory { weights_bytes: 6 << 30, ..Memory::default() },
            peak_bytes: 9 << 30,
        };
        let found = tight(&[part("a", 8), part("large", 16), part("b", 8), part("c", 8), part("d", 7)]);
        let lines: Vec<&str> = found.trim().lines().collect();
        assert!(lines[0].starts_with("a and 2 like it would need 9.66 of 8.59 GB"), "{found}");
        assert!(lines[1].starts_with("d would need 9.66 of 7.52 GB") && lines.len() == 2, "{found}");
        assert_eq!(tight(&[part("large", 16)]), "");
    }
}
