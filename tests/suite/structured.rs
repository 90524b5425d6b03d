//! Structured methods with the real programs: what they write loads, is as narrow as was asked, and computes the same.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::same_files;
use harness::process::Workplace;
use harness::{golden, tiny};
use serde_json::Value;

const METHODS: [&str; 5] = ["magnitude-columns", "wanda-columns", "fasp", "spap", "slimgpt"];
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
        (mha.clone(), vec!["--method", "wanda", "--tensor-parallel", "2"], "[output] tensor_parallel"),
        (mha.clone(), vec!["--method", "fasp", "--tensor-parallel", "3"], "num_attention_heads = 4"),
        (mha.clone(), vec!["--method", "fasp", "--attention", "channels"], "layout = \"masked\""),
        (mha.clone(), vec!["--method", "fasp", "--attention", "query-heads", "--kv-heads", "1"], "kv-heads"),
        (mha.clone(), vec!["--method", "fasp", "--layout", "nemotron-nas", "--round-to", "64"], "nearest is 256"),
        (tiny("qwen2-tiny"), vec!["--method", "fasp", "--layout", "nemotron-nas"], "LLaMA's kind"),
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

/// On one budget of channels, what decides jointly and sweeps errs no more than what scores once. Errors are those of the half's
/// output, with producers as they are stored.
#[test]
fn spap_errs_no_more_than_fasp_in_feed_forward_blocks() {
    for model in MODELS {
        let errors = |flags: &[&str]| -> f64 {
            let workplace = Workplace::new();
            let size = ["--sparsity", "0.4", "--samples", "16", "--seq-len", "128", "--calibration"];
            let text = golden().join("text/wikitext2-valid-head.txt");
            let report = prune(&workplace, &tiny(model), "out", &[flags, &size, &[utf8(&text)]].concat()).unwrap();
            let sublayers = report["sublayers"].as_array().unwrap();
            let is_consumer = |name: &str| name.contains("down_proj") || name.contains("fc2");
            let errors = sublayers.iter().filter(|sublayer| is_consumer(sublayer["name"].as_str().unwrap()));
            errors.map(|sublayer| sublayer["rel_error"].as_f64().unwrap()).sum()
        };
        let (spap, fasp) =
            (errors(&["--method", "spap"]), errors(&["--method", "fasp", "--set", "method.heads=false"]));
        assert!(spap <= fasp, "{model}: {spap} against {fasp}");
    }
}

/// Reads the artifacts of committed layers anew: the worker that takes over replays what the first one cut.
#[test]
fn tuned_and_swept_results_do_not_depend_on_the_workers() {
    for (model, flags) in [
        ("llama-tiny", &["--method", "slimgpt", "--set", "method.reconstruct=submodule"][..]),
        ("opt-tiny", &["--method", "fasp", "--set", "method.reconstruct=submodule"][..]),
        (
            "qwen2-tiny",
            &["--method", "fasp", "--attention", "query-heads", "--set", "method.reconstruct=submodule"][..],
        ),
        ("qwen2-tiny", &["--method", "spap"][..]),
        ("opt-tiny", &["--method", "spap"][..]),
    ] {
        let workplace = Workplace::new();
        let asked = ["--sparsity", "0.5", "--held-out", "0.25"];
        let text = golden().join("text/wikitext2-valid-head.txt");
        // A sweep refits the consumer, which takes several times as many tokens as it has inputs to help on others.
        let more_tokens = ["--calibration", utf8(&text), "--samples", "32", "--seq-len", "128"];
        let quick = ["--set", "method.reconstruct_epochs=2"];
        let quick = if flags.contains(&"spap") { &more_tokens[..] } else { &quick[..] };
        let reports = ["1", "2", "3"].map(|workers| {
            let more = [flags, &asked[..], quick, &["--workers", workers]].concat();
            prune(&workplace, &tiny(model), workers, &more)
                .unwrap_or_else(|error| panic!("{model}, {flags:?}: {error:#}"))
        });
        for workers in ["2", "3"] {
            let at = |name: &str| workplace.path().join(name);
            same_files(&at("1"), &at(workers)).unwrap_or_else(|error| panic!("{model}, {flags:?}: {error:#}"));
        }
        // Somewhere it helped, and nowhere it made things worse on what was held out.
        let sublayers = reports[0]["sublayers"].as_array().unwrap();
        let tuned: Vec<&Value> =
            sublayers.iter().map(|entry| &entry["reconstruction"]).filter(|tuned| tuned.is_object()).collect();
        let errors = |key: &str| tuned.iter().map(|tuned| tuned[key].as_f64().unwrap()).collect::<Vec<_>>();
        let (before, after) = (errors("error_before"), errors("error_after"));
        assert!(after.iter().zip(&before).all(|(after, before)| after <= before), "{model}, {flags:?}");
        assert!(
            after.iter().zip(&before).any(|(after, before)| after < before),
            "{model}, {flags:?}: nothing was tuned"
        );
    }
}

#[test]
fn layers_of_their_own_widths_compute_what_masked_ones_do() {
    let workplace = Workplace::new();
    let asked = ["--method", "slimgpt", "--sparsity", "0.4"];
    let report =
        prune(&workplace, &tiny("llama-tiny"), "uneven", &[&asked[..], &["--layout", "nemotron-nas"]].concat());
    let structured = &report.unwrap()["structured"];
    let channels: Vec<_> = structured["layers"].as_array().unwrap().iter().map(|l| l["channels"].as_u64()).collect();
    assert!(channels.iter().all(|width| width.unwrap() % 256 == 0) && channels.contains(&Some(256)), "{channels:?}");
    let config: Value =
        serde_json::from_slice(&fs::read(workplace.path().join("uneven/config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "nemotron-nas");
    assert_eq!(config["block_configs"][0]["attention"]["n_heads_in_group"], 3);
    assert!(config["intermediate_size"].is_null() && config["num_key_value_heads"].is_null());
    // The same blocks with zeros in their place: the widths are those that the layout asks for.
    let masked = [&asked[..], &["--layout", "masked", "--round-to", "256"]].concat();
    prune(&workplace, &tiny("llama-tiny"), "masked", &masked).unwrap();
    let exported = workplace.run(["export", "masked", "--layout", "nemotron-nas", "--output", "exported"]);
    exported.and_then(harness::process::Finished::success).unwrap();
    let text = golden().join("text/wikitext2-test-head.txt");
    let of = |model: &str| losses(&workplace, model, &text, "64").unwrap_or_else(|error| panic!("{model}: {error:#}"));
    for (x, y) in of("masked").iter().zip(of("exported")) {
        assert!((x / y - 1.0).abs() < 1e-6, "{x} {y}");
    }
    assert_eq!(of("uneven").len(), 8);
    // It is whole, but no stock loader has its class.
    let verified = workplace.run(["verify", "uneven", "--json"]).unwrap();
    assert_eq!(verified.code(), Some(65), "{}", verified.stderr);
    let findings = verified.json().unwrap()["findings"].clone();
    assert!(
        findings.as_array().unwrap().len() == 1 && findings[0].as_str().unwrap().contains("nemotron-nas"),
        "{findings}"
    );
}

#[test]
fn query_heads_and_channels_go_evenly_and_compute_the_same() {
    let workplace = Workplace::new();
    // 6 query heads on 2 KV heads: one of each group goes, and keys and values stay.
    let asked = ["--method", "fasp", "--sparsity", "0.4", "--attention", "query-heads", "--layout", "masked"];
    prune(&workplace, &tiny("llama-tiny"), "masked", &asked).unwrap();
    let exported = workplace.run(["export", "masked", "--layout", "uniform", "--output", "sliced"]);
    exported.and_then(harness::process::Finished::success).unwrap();
    let config: Value =
        serde_json::from_slice(&fs::read(workplace.path().join("sliced/config.json")).unwrap()).unwrap();
    assert_eq!((config["num_attention_heads"].as_u64(), config["num_key_value_heads"].as_u64()), (Some(4), Some(2)));
    let text = golden().join("text/wikitext2-test-head.txt");
    let of = |model: &str| losses(&workplace, model, &text, "64").unwrap_or_else(|error| panic!("{model}: {error:#}"));
    for (x, y) in of("masked").iter().zip(of("sliced")) {
        assert!((x / y - 1.0).abs() < 1e-6, "{x} {y}");
    }
    for model in MODELS {
        let asked = ["--method", "fasp", "--sparsity", "0.3", "--attention", "channels", "--layout", "masked"];
        let report = prune(&workplace, &tiny(model), &format!("channels-{model}"), &asked).unwrap();
        let layers = report["structured"]["layers"].as_array().unwrap();
        let channels: Vec<_> = layers.iter().map(|layer| layer["attention"].as_array().unwrap().len()).collect();
        assert!(channels.iter().all(|&width| width > 0 && width == channels[0]), "{model}: {channels:?}");
        let share = report["structured"]["share"].as_f64().unwrap();
        assert!((share - 0.3).abs() < 0.02, "{model}: {share}");
        let export =
            workplace.run(["export", &format!("channels-{model}"), "--layout", "uniform", "--output", "x"]).unwrap();
        assert_eq!(export.code(), Some(65), "{model}");
        assert!(export.stderr.contains("masked"), "{}", export.stderr);
    }
}
