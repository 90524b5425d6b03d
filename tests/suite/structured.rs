//! Structured methods with the real programs: what they write loads, is as narrow as was asked, and computes the same.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::same_files;
use harness::process::Workplace;
use harness::{golden, tiny};
use serde_json::Value;

const METHODS: [&str; 4] = ["wanda-columns", "fasp", "spap", "slimgpt"];
const MODELS: [&str; 3] = ["llama-tiny", "opt-tiny", "qwen2-tiny"];
/// Channels that stay are a multiple of this by default.
const ROUND_TO: u64 = 8;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

fn prune(workplace: &Workplace, model: &Path, output: &str, more: &[&str]) -> Result<Value> {
    let (run, text) = (format!("{output}.run"), golden().join("text/wikitext2-valid-head.txt"));
    let mut arguments = vec!["prune", utf8(model), "--output", output, "--run", &run, "--json"];
    if !more.contains(&"--calibration") {
        arguments.extend(["--calibration", utf8(&text), "--samples", "8", "--seq-len", "64"]);
    }
    arguments.extend(more);
    workplace.run(arguments)?.success()?.json()
}

fn losses(workplace: &Workplace, model: &str, text: &Path, length: &str) -> Result<Vec<f64>> {
    let evaluated = workplace
        .run(["eval", model, "--text", utf8(text), "--seq-len", length, "--max-windows", "8", "--json"])?
        .success()?
        .json()?;
    let losses = evaluated["window_nll"].as_array().context("eval --json has no `window_nll`")?;
    Ok(losses.iter().filter_map(Value::as_f64).collect())
}

fn check(model: &str, method: &str, share: f64) -> Result<()> {
    let workplace = Workplace::new();
    let report = prune(&workplace, &tiny(model), "out", &["--method", method, "--sparsity", &share.to_string()])?;
    let structured = &report["structured"];
    let asked = share * structured["parameters"].as_f64().context("no parameters")?;
    let off = (structured["removed"].as_f64().context("nothing removed")? - asked).abs();
    // One rounding unit of channels a layer, the widest channel of the three models being 2 · 160 + 1 or 3 · 192 weights.
    let layers = structured["layers"].as_array().context("no layers")?.len();
    ensure!(off <= (layers as u64 * ROUND_TO * 3 * 192 / 2) as f64, "{off} parameters off");
    let config: Value = serde_json::from_slice(&fs::read(workplace.path().join("out/config.json"))?)?;
    let width = config["intermediate_size"].as_u64().or(config["ffn_dim"].as_u64()).context("no width")?;
    ensure!(width % ROUND_TO == 0 && width == structured["layers"][0]["channels"], "{width} channels");
    let losses = losses(&workplace, "out", &golden().join("text/wikitext2-test-head.txt"), "64")?;
    ensure!(losses.len() == 8 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let verified = workplace.run(["verify", "out", "--json"])?.success()?.json()?;
    ensure!(verified["findings"] == Value::Array(Vec::new()), "{verified}");
    Ok(())
}

fn check_all(model: &str) {
    for method in METHODS {
        for share in [0.2, 0.3, 0.5] {
            check(model, method, share).unwrap_or_else(|error| panic!("{model}, {method}, {share}: {error:#}"));
        }
    }
}

#[test]
fn llama_loads_narrower_from_every_method() {
    check_all(MODELS[0]);
}

#[test]
fn opt_loads_narrower_from_every_method() {
    check_all(MODELS[1]);
}

#[test]
fn qwen2_loads_narrower_from_every_method() {
    check_all(MODELS[2]);
}

/// Sequences of token ids below 64, which every family of the golden files has.
fn ids(workplace: &Workplace) -> std::path::PathBuf {
    let path = workplace.path().join("ids.jsonl");
    let mut text = String::new();
    for line in 0..24_u32 {
        let ids: Vec<u32> = (0..16).map(|at| (line * 7 + at * at + 3 * at) % 64).collect();
        writeln!(text, "{{\"input_ids\": {ids:?}}}").expect("a string takes whatever is written to it");
    }
    fs::write(&path, text).expect("the folder is writable");
    path
}

#[test]
fn sliced_models_compute_what_masked_ones_do_in_every_family() {
    let families = golden().join("families");
    let mut models: Vec<_> = fs::read_dir(families).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.sort();
    for model in models {
        let workplace = Workplace::new();
        let ids = ids(&workplace);
        let calibration = ["--calibration", utf8(&ids), "--samples", "16", "--seq-len", "16"];
        // OPT keeps its heads, so half of its parameters would be nearly all of its channels.
        let share = if utf8(&model).contains("/opt") { "0.3" } else { "0.5" };
        let asked = ["--method", "slimgpt", "--sparsity", share, "--layout", "masked"];
        let result = prune(&workplace, &model, "masked", &[&asked[..], &calibration].concat())
            .and_then(|_| workplace.run(["export", "masked", "--layout", "padded", "--output", "sliced"])?.success())
            .and_then(|_| Ok((losses(&workplace, "masked", &ids, "16")?, losses(&workplace, "sliced", &ids, "16")?)));
        let (masked, sliced) = result.unwrap_or_else(|error| panic!("{}: {error:#}", model.display()));
        assert_eq!(masked.len(), 8);
        for (x, y) in masked.iter().zip(&sliced) {
            assert!((x / y - 1.0).abs() < 1e-6, "{}: {x} {y}", model.display());
        }
        let size = |layout: &str| fs::metadata(workplace.path().join(layout).join("model.safetensors")).unwrap().len();
        assert!(size("sliced") < size("masked"));
    }
}

#[test]
fn the_same_bytes_come_from_any_number_of_workers_and_from_export() {
    for model in MODELS {
        let workplace = Workplace::new();
        let asked = ["--method", "slimgpt", "--sparsity", "0.5", "--held-out", "0.2"];
        let with = |output, more: &[&str]| {
            prune(&workplace, &tiny(model), output, &[&asked[..], more].concat())
                .unwrap_or_else(|error| panic!("{model}: {error:#}"))
        };
        with("one", &["--workers", "1"]);
        with("two", &["--workers", "2"]);
        let at = |name: &str| workplace.path().join(name);
        same_files(&at("one"), &at("two")).unwrap_or_else(|error| panic!("{model}: {error:#}"));
        with("masked", &["--layout", "masked"]);
        let exported = workplace.run(["export", "masked", "--layout", "uniform", "--output", "exported"]);
        exported.and_then(harness::process::Finished::success).unwrap();
        for file in ["model.safetensors", "config.json"] {
            assert_eq!(
                fs::read(at("one").join(file)).unwrap(),
                fs::read(at("exported").join(file)).unwrap(),
                "{model}"
            );
        }
    }
}

#[test]
fn layers_of_different_widths_are_padded() {
    let workplace = Workplace::new();
    let asked = ["--method", "fasp", "--sparsity", "0.3", "--allocation", "log", "--layout", "padded"];
    let report = prune(&workplace, &tiny("llama-tiny"), "out", &asked).unwrap();
    let channels: Vec<_> = report["structured"]["layers"].as_array().unwrap().iter().map(|l| &l["channels"]).collect();
    assert!(channels.windows(2).any(|pair| pair[0] != pair[1]), "{channels:?}");
    let share = report["structured"]["share"].as_f64().unwrap();
    assert!((share - 0.3).abs() < 0.005, "{share}");
    assert_eq!(losses(&workplace, "out", &golden().join("text/wikitext2-test-head.txt"), "64").unwrap().len(), 8);
}

#[test]
fn what_would_not_load_is_refused_before_any_work() {
    let mha = golden().join("families/llama-mha");
    for (model, flags, expected) in [
        (mha.clone(), vec!["--method", "slimgpt", "--kv-heads", "1"], "remove 0 or 2"),
        (mha.clone(), vec!["--method", "slimgpt", "--allocation", "log"], "\"padded\""),
        (mha.clone(), vec!["--method", "wanda", "--layout", "uniform"], "[output] layout"),
        (mha.clone(), vec!["--method", "spap", "--sparsity", "0.9"], "cannot lose"),
        (mha, vec!["--method", "fasp", "--pattern", "2:4"], "whole heads and channels"),
        (tiny("opt-tiny"), vec!["--method", "fasp", "--kv-heads", "1"], "cannot be removed from this model"),
    ] {
        let workplace = Workplace::new();
        let ids = ids(&workplace);
        let mut arguments = vec!["prune", utf8(&model), "--output", "out", "--calibration", utf8(&ids)];
        arguments.extend(["--samples", "8", "--seq-len", "16"]);
        arguments.extend(&flags);
        let finished = workplace.run(arguments).unwrap();
        assert_eq!(finished.code(), Some(65), "{flags:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(expected), "{flags:?}: {}", finished.stderr);
        assert!(!workplace.path().join("out").exists() && !workplace.path().join("out.run").exists());
    }
}

#[test]
fn verify_finds_what_is_wrong() {
    let workplace = Workplace::new();
    let broken = workplace.path().join("broken");
    harness::checkpoint::copy_folder(&tiny("llama-tiny"), &broken).unwrap();
    let path = broken.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["num_attention_heads"] = 5.into();
    config["sparsity_config"] = serde_json::json!({ "format": "sparse-bitmask" });
    fs::write(&path, config.to_string()).unwrap();
    let finished = workplace.run(["verify", "broken"]).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    for expected in ["num_key_value_heads = 2 does not divide", "does not divide hidden_size = 192", "sparsity_config"]
    {
        assert!(finished.stdout.contains(expected), "{}", finished.stdout);
    }
    let fine = workplace.run(["verify", utf8(&tiny("llama-tiny"))]).unwrap();
    assert_eq!(fine.code(), Some(0), "{} {}", fine.stdout, fine.stderr);
}
