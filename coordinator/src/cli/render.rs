//! `render`: what a job is on a cluster's own scheduler, as manifests.

use std::collections::BTreeMap;

use espalier_common::job::{JobSpec, parse_size};
use espalier_common::outline::ModelOutline;

use super::args::{FormArg, K8sArgs};
use super::{CliError, job, plan, screen};
use crate::manifest::{Deployment, Form, Sizes, Storage, credentials_variable, yaml};
use crate::plan::cluster::{ClusterSpec, Solver};
use crate::plan::cost;
use crate::plan::memory::{Memory, Part};

/// A program, its buffers, and what the allocator keeps.
const PROCESS_BYTES: u64 = 1 << 30;
/// Room for hidden states on disk when nothing was planned.
const UNPLANNED_SCRATCH_GIB: u64 = 100;
/// Room for a model of the hub when nothing was planned.
const UNPLANNED_CACHE_GIB: u64 = 32;
/// Embeddings, head and norms, which the outline does not count, beside the layers: a bound for any real model.
const BESIDE_LAYERS: u64 = 2;

/// Prints the manifests of a job.
pub(crate) async fn kubernetes(args: K8sArgs, json: bool) -> Result<(), CliError> {
    let job = job::of_file(&args.job)?;
    job.validate().map_err(|error| CliError::rejected(&error))?;
    let cluster =
        args.cluster.as_deref().map(ClusterSpec::read).transpose().map_err(|error| CliError::rejected(&error))?;
    let (workers, sizes) = match &args.worker_memory {
        Some(memory) => (args.workers.unwrap_or(1), asked(memory, args.worker_cpus)?),
        None => planned(&job, &args, cluster.as_ref()).await?,
    };
    let storage = args.claim.clone().map_or(Storage::Bucket, Storage::Claim);
    let environment = environment(&job, &args)?;
    let image = |given: &Option<String>, role: &str, build: &str| {
        given.clone().unwrap_or_else(|| format!("espalier-{role}:{}{build}", env!("CARGO_PKG_VERSION")))
    };
    let deployment = Deployment {
        coordinator_image: image(&args.coordinator_image, "coordinator", ""),
        worker_image: image(&args.worker_image, "worker", if args.gpu { "-cuda" } else { "" }),
        name: args.name,
        namespace: args.namespace,
        form: match args.form {
            FormArg::Jobset => Form::JobSet,
            FormArg::Jobs => Form::Jobs,
        },
        workers,
        sizes,
        gpu: args.gpu,
        job,
        run: args.run,
        storage,
        environment,
        queue: args.queue,
        monitoring: args.monitoring,
        cert_manager: args.cert_manager,
    };
    let documents = deployment.documents().map_err(|error| CliError::rejected(&error))?;
    if json {
        // What kubectl makes of several documents.
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": yaml::values(&documents) });
        screen::out(&list.to_string());
    } else {
        screen::out(yaml::stream(&documents).trim_end());
    }
    Ok(())
}

fn environment(job: &JobSpec, args: &K8sArgs) -> Result<BTreeMap<String, String>, CliError> {
    let mut environment = BTreeMap::new();
    if !args.own_identity {
        let places = [&job.model.source, &job.calibration.source, &job.output.uri];
        environment.extend(places.into_iter().filter_map(|place| credentials_variable(place)));
    }
    for assignment in &args.environment {
        let (name, value) = assignment
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| CliError::usage(format!("--environment {assignment}: must be NAME=VALUE")))?;
        environment.insert(name.to_owned(), value.to_owned());
    }
    Ok(environment)
}

fn gib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 30)
}

/// Sizes as they were asked for: a quarter of the memory for hidden states, as a worker does by itself.
fn asked(memory: &str, cpus: u32) -> Result<Sizes, CliError> {
    let bytes = parse_size(memory).filter(|bytes| *bytes >= PROCESS_BYTES).ok_or_else(|| {
        CliError::usage(format!("--worker-memory {memory}: must be a size of 1GiB at least, e.g. 64GiB"))
    })?;
    Ok(Sizes {
        cpus,
        memory_gib: gib(bytes),
        memory_budget_bytes: bytes / 4,
        scratch_gib: UNPLANNED_SCRATCH_GIB,
        cache_gib: UNPLANNED_CACHE_GIB,
    })
}

/// Sizes that the plan says: from the model's headers, for as many workers and as much memory as the cluster has.
async fn planned(job: &JobSpec, args: &K8sArgs, cluster: Option<&ClusterSpec>) -> Result<(u32, Sizes), CliError> {
    let outline = plan::outline(job).await?;
    let workers = cluster.map(ClusterSpec::workers).transpose().map_err(|error| CliError::rejected(&error))?;
    let count = args.workers.unwrap_or_else(|| workers.as_ref().map_or(1, |workers| workers.len() as u32));
    let memory = match (cluster, workers) {
        (Some(cluster), Some(workers)) => {
            let least = workers.iter().map(|worker| worker.memory_bytes).min();
            // What does not fit is refused here, by layer and worker.
            plan::predict(&outline, job, cluster, &workers)?;
            least
        }
        _ => None,
    };
    let source = job.model.source.as_str();
    let cached = if source.starts_with("hf://") { gib(model_bytes(&outline)) } else { 1 };
    let most = cost::count(&outline, job, cluster.map_or_else(Solver::default, |cluster| cluster.solver));
    let largest =
        most.layers.iter().fold(Memory::default(), |largest, layer| largest.larger(layer.memory(&Part::ALONE)));
    sizes(largest, memory, args.worker_cpus, cached).map(|sizes| (count, sizes))
}

fn model_bytes(outline: &ModelOutline) -> u64 {
    outline.layers.iter().map(|layer| layer.bytes).sum::<u64>().saturating_mul(BESIDE_LAYERS)
}

/// Sizes of a worker whose largest layer needs `largest`, with so much memory, or with as much as holds everything.
fn sizes(largest: Memory, memory_bytes: Option<u64>, cpus: u32, cache_gib: u64) -> Result<Sizes, CliError> {
    let resident = largest.resident_bytes().saturating_add(PROCESS_BYTES);
    // A layer's inputs and its outputs.
    let hidden = largest.activation_bytes.saturating_mul(2);
    let memory_gib = match memory_bytes {
        // Rounded down: the machine has no more.
        Some(bytes) => bytes >> 30,
        None => gib(resident.saturating_add(hidden)),
    };
    let budget = (memory_gib << 30).saturating_sub(resident).min(hidden);
    if budget == 0 {
        let message =
            format!("a worker needs more than {} GiB of memory, but the cluster's have {memory_gib}", gib(resident));
        return Err(CliError { message, code: crate::error::exit::REJECTED });
    }
    Ok(Sizes { cpus, memory_gib, memory_budget_bytes: budget, scratch_gib: gib(hidden).max(1), cache_gib })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn memory(resident_gib: u64, activation_gib: u64) -> Memory {
        Memory { weights_bytes: resident_gib * GIB, activation_bytes: activation_gib * GIB, ..Memory::default() }
    }

    #[test]
    fn a_worker_gets_what_its_largest_layer_and_two_boundaries_need() {
        let sizes = sizes(memory(6, 4), None, 8, 1).unwrap();
        assert_eq!((sizes.memory_gib, sizes.memory_budget_bytes, sizes.scratch_gib), (6 + 1 + 8, 8 * GIB, 8));
    }

    #[test]
    fn where_memory_is_given_hidden_states_get_what_is_left_of_it() {
        let sizes = sizes(memory(6, 4), Some(10 * GIB), 8, 1).unwrap();
        assert_eq!((sizes.memory_gib, sizes.memory_budget_bytes, sizes.scratch_gib), (10, 3 * GIB, 8));
        let error = super::sizes(memory(6, 4), Some(7 * GIB), 8, 1).unwrap_err();
        assert!(error.message.contains("more than 7 GiB"), "{}", error.message);
    }
}
