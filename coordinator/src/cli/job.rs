//! A job file and the flags over it make one job.

use std::path::Path;

use espalier_common::job::{Allocation, JobSpec, Layout, Propagation};
use espalier_common::structure::AttentionUnit;
use serde_json::{Map, Value, json};

use super::CliError;
use super::args::PruneArgs;
use crate::error::exit;

/// The job that the arguments amount to.
pub(crate) fn job(args: &PruneArgs) -> Result<JobSpec, CliError> {
    let mut job = match &args.job {
        Some(path) => read(path)?,
        None => Map::new(),
    };
    let environment = espalier_common::config::job_environment().map_err(|error| CliError::rejected(&error))?;
    layer(&mut job, environment);
    let mut set = |section: &str, key: &str, value: Option<Value>| set_key(&mut job, section, key, value);
    set("model", "source", args.model.as_deref().map(|model| json!(absolute(model))));
    set("calibration", "source", args.calibration.as_deref().map(|source| json!(absolute(source))));
    set("calibration", "samples", args.samples.map(Value::from));
    set("calibration", "sequence_length", args.seq_len.map(Value::from));
    set("calibration", "seed", args.seed.map(Value::from));
    set("calibration", "held_out", args.held_out.map(Value::from));
    set("method", "name", args.method.clone().map(Value::from));
    set("method", "mask", args.mask.as_deref().map(|mask| json!(absolute(mask))));
    // A flag replaces the file's pattern, whichever kind that was.
    if args.sparsity.is_some() || args.pattern.is_some() {
        drop_pattern(&mut job);
    }
    let mut set = |section: &str, key: &str, value: Option<Value>| set_key(&mut job, section, key, value);
    set("pattern", "sparsity", args.sparsity.map(Value::from));
    set("pattern", "nofm", args.pattern.clone().map(Value::from));
    set("pattern", "round_to", args.round_to.map(Value::from));
    set("pattern", "kv_heads", args.kv_heads.map(Value::from));
    set("pattern", "allocation", args.allocation.map(|allocation| json!(Allocation::from(allocation))));
    set("pattern", "attention", args.attention.map(|unit| json!(AttentionUnit::from(unit))));
    set("output", "tensor_parallel", args.tensor_parallel.map(Value::from));
    set("output", "layout", args.layout.map(|layout| json!(Layout::from(layout))));
    let mode = args.propagation.map(|mode| json!(Propagation::from(mode)));
    set("propagation", "mode", mode);
    set("output", "uri", args.output.as_deref().map(|output| json!(absolute(output))));
    set("output", "shard_size", args.shard_size.clone().map(Value::from));
    set("evaluation", "source", args.eval.as_deref().map(|source| json!(absolute(source))));
    if args.eval.is_none() && !has_evaluation(args)? && (args.eval_seq_len.or(args.eval_max_windows)).is_some() {
        return Err(CliError::usage("--eval-seq-len and --eval-max-windows need --eval"));
    }
    set("evaluation", "sequence_length", args.eval_seq_len.map(Value::from));
    set("evaluation", "max_windows", args.eval_max_windows.map(Value::from));
    for assignment in &args.set {
        let (key, value) = parse_set(assignment, args.method.as_deref())?;
        set("method", &key, Some(value));
    }
    for (section, key, flag) in
        [("model", "source", "MODEL"), ("output", "uri", "--output"), ("calibration", "source", "--calibration")]
    {
        if job.get(section).and_then(|section| section.get(key)).is_none() {
            return Err(CliError::usage(format!("give {flag}, or [{section}] {key} in a job file")));
        }
    }
    let origin = args.job.as_ref().map_or_else(|| "job".to_owned(), |path| path.display().to_string());
    typed(job, &origin)
}

/// The job of a file, with the environment over it.
pub(crate) fn of_file(path: &Path) -> Result<JobSpec, CliError> {
    let mut job = read(path)?;
    layer(&mut job, espalier_common::config::job_environment().map_err(|error| CliError::rejected(&error))?);
    typed(job, &path.display().to_string())
}

fn typed(job: Map<String, Value>, origin: &str) -> Result<JobSpec, CliError> {
    let rejected = |reason: String| CliError { message: format!("{origin}: {reason}"), code: exit::REJECTED };
    if let Some(key) = not_finite(&job) {
        return Err(rejected(format!("{key} is not a finite number")));
    }
    serde_path_to_error::deserialize(Value::Object(job)).map_err(|error| {
        let key = error.path().to_string();
        let reason = espalier_common::config::suggest(&error.into_inner().to_string());
        // A missing or unknown key is told by its name alone.
        rejected(if key.contains('.') { format!("{key}: {reason}") } else { reason })
    })
}

fn set_key(job: &mut Map<String, Value>, section: &str, key: &str, value: Option<Value>) {
    if let Some(value) = value {
        let section = job.entry(section).or_insert_with(|| json!({}));
        if let Some(section) = section.as_object_mut() {
            section.insert(key.to_owned(), value);
        }
    }
}

fn drop_pattern(job: &mut Map<String, Value>) {
    if let Some(pattern) = job.get_mut("pattern").and_then(Value::as_object_mut) {
        pattern.remove("sparsity");
        pattern.remove("nofm");
    }
}

/// The first key whose value is NaN or infinite. JSON has neither, and makes them null, which nothing else does.
fn not_finite(job: &Map<String, Value>) -> Option<String> {
    let is_lost = |value: &Value| match value {
        Value::Array(values) => values.iter().any(Value::is_null),
        value => value.is_null(),
    };
    job.iter().find_map(|(section, keys)| {
        let (key, _) = keys.as_object()?.iter().find(|(_, value)| is_lost(value))?;
        Some(format!("[{section}] {key}"))
    })
}

/// Puts the environment's keys over those of the job file. A pattern replaces the file's, whichever kind that was.
fn layer(job: &mut Map<String, Value>, environment: Map<String, Value>) {
    for (name, keys) in environment {
        let section = job.entry(name.clone()).or_insert_with(|| json!({}));
        let (Some(section), Some(keys)) = (section.as_object_mut(), keys.as_object()) else { continue };
        if name == "pattern" && (keys.contains_key("sparsity") || keys.contains_key("nofm")) {
            section.remove("sparsity");
            section.remove("nofm");
        }
        section.extend(keys.clone());
    }
}

fn has_evaluation(args: &PruneArgs) -> Result<bool, CliError> {
    args.job.as_deref().map_or(Ok(false), |path| Ok(read(path)?.contains_key("evaluation")))
}

/// The run's folder or URL: as given, or beside the output.
pub(crate) fn run_url(args: &PruneArgs, job: &JobSpec) -> String {
    args.run.clone().unwrap_or_else(|| run_beside_output(job))
}

/// Where a run is unless somebody says otherwise.
pub(crate) fn run_beside_output(job: &JobSpec) -> String {
    format!("{}.run", job.output.uri.trim_end_matches('/'))
}

fn read(path: &Path) -> Result<Map<String, Value>, CliError> {
    espalier_common::config::load_document(path).map_err(|error| CliError::rejected(&error))
}

/// Makes a local path independent of the working directory, since workers may have another; URLs stay as they are.
pub(super) fn absolute(source: &str) -> String {
    if source.contains("://") {
        return source.to_owned();
    }
    std::path::absolute(source).map_or_else(|_| source.to_owned(), |path| path.to_string_lossy().into_owned())
}

/// Reads `method.key=value`, where the method's own name may stand for `method`. The value is a number or a boolean if it
/// looks like one, text otherwise.
fn parse_set(assignment: &str, method: Option<&str>) -> Result<(String, Value), CliError> {
    let wrong = || CliError::usage(format!("--set {assignment}: must be method.KEY=VALUE"));
    let (key, value) = assignment.split_once('=').ok_or_else(wrong)?;
    let (section, key) = key.split_once('.').ok_or_else(wrong)?;
    if (section != "method" && Some(section) != method) || key.is_empty() || key == "name" {
        return Err(wrong());
    }
    let value = serde_json::from_str::<Value>(value)
        .ok()
        .filter(|parsed| parsed.is_number() || parsed.is_boolean())
        .unwrap_or_else(|| Value::from(value));
    Ok((key.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_lies_over_the_file() {
        let object = |value: Value| value.as_object().cloned().unwrap_or_default();
        let mut job =
            object(json!({ "model": { "source": "m" }, "pattern": { "nofm": "2:4", "allocation": "uniform" } }));
        layer(&mut job, object(json!({ "pattern": { "sparsity": 0.7 }, "method": { "name": "wanda" } })));
        let expected = json!({
            "model": { "source": "m" },
            "pattern": { "allocation": "uniform", "sparsity": 0.7 },
            "method": { "name": "wanda" },
        });
        assert_eq!(Value::Object(job), expected);
    }

    #[test]
    fn assignments_are_typed_by_their_look() {
        assert_eq!(parse_set("method.damping=0.02", None).unwrap(), ("damping".to_owned(), json!(0.02)));
        assert_eq!(parse_set("alps.profile=best", Some("alps")).unwrap(), ("profile".to_owned(), json!("best")));
        for wrong in ["damping=1", "method.=1", "method.name=x", "method.damping", "wanda.x=1"] {
            assert_eq!(parse_set(wrong, Some("alps")).unwrap_err().code, crate::error::exit::USAGE, "{wrong}");
        }
    }
}
