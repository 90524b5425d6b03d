//! Refitting what another run pruned, with the real programs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::{Safetensors, copy_folder, is_sublayer, same_files};
use harness::process::{Finished, Workplace};
use harness::{golden, tiny};
use serde_json::Value;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// `prune` of a tiny model into `output`; paths are relative, so that runs differ in nothing else.
fn run(workplace: &Workplace, model: &str, output: &str, more: &[&str]) -> Result<Finished> {
    let (model, text, run) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"), format!("{output}.run"));
    let mut arguments = vec!["prune", utf8(&model), "--output", output, "--run", &run, "--json"];
    arguments.extend(["--calibration", utf8(&text), "--samples", "8", "--seq-len", "64"]);
    arguments.extend(more);
    workplace.run(arguments)
}

fn report(workplace: &Workplace, model: &str, output: &str, more: &[&str]) -> Result<Value> {
    run(workplace, model, output, more)?.success()?.json()
}

/// Where the sublayers of a written checkpoint are zero.
fn zeros(workplace: &Workplace, output: &str) -> Result<Vec<(String, Vec<bool>)>> {
    let file = Safetensors::read(&workplace.path().join(output).join("model.safetensors"))?;
    let names: Vec<String> = file.header.keys().filter(|name| is_sublayer(name)).cloned().collect();
    let zeros = |name: String| {
        let (start, end) = file.offsets(&name)?;
        let is_zero = |two: &[u8]| two == [0, 0] || two == [0, 0x80];
        Ok((name, file.data[start..end].chunks_exact(2).map(is_zero).collect()))
    };
    names.into_iter().map(zeros).collect()
}

fn errors(report: &Value) -> Result<Vec<(&str, f64)>> {
    let sublayers = report["sublayers"].as_array().context("no sublayers")?;
    let error = |entry: &'_ Value| entry["rel_error"].as_f64().context("no error");
    sublayers.iter().map(|entry| Ok((entry["name"].as_str().context("no name")?, error(entry)?))).collect()
}

/// What `method` pruned is refitted: the zeros stay where they are, and every sublayer's error falls.
fn check(model: &str, method: &str, pattern: [&str; 2]) -> Result<()> {
    let workplace = Workplace::new();
    // Each layer sees the dense model's outputs in both runs, so that their errors compare.
    let dense = ["--propagation", "dense"];
    let before = report(&workplace, model, "mask", &[&["--method", method], &pattern[..], &dense].concat())?;
    let after = report(&workplace, model, "out", &[&["--method", "refit", "--mask", "mask"], &dense[..]].concat())?;
    ensure!(zeros(&workplace, "mask")? == zeros(&workplace, "out")?, "the zeros have moved");
    ensure!(before["totals"]["sparsity"] == after["totals"]["sparsity"], "{}", after["totals"]);
    let first_groups = |name: &str| ["q_proj", "k_proj", "v_proj"].iter().any(|part| name.contains(part));
    let (before, after) = (errors(&before)?, errors(&after)?);
    for ((name, before), (_, after)) in before.iter().zip(&after).filter(|((name, _), _)| first_groups(name)) {
        ensure!(after < before, "{name}: {before} to {after}");
    }
    let sum = |errors: &[(&str, f64)]| errors.iter().map(|(_, error)| error).sum::<f64>();
    ensure!(sum(&after) < sum(&before), "{} to {}", sum(&before), sum(&after));
    Ok(())
}

#[test]
fn errors_fall_and_zeros_stay_where_they_are() {
    for (model, method, pattern) in [
        ("llama-tiny", "wanda", ["--sparsity", "0.6"]),
        ("llama-tiny", "sparsegpt", ["--pattern", "2:4"]),
        ("opt-tiny", "magnitude", ["--sparsity", "0.5"]),
        ("qwen2-tiny", "wanda", ["--sparsity", "0.5"]),
    ] {
        check(model, method, pattern).unwrap_or_else(|error| panic!("{model}, {method}: {error:#}"));
    }
}

#[test]
fn the_same_bytes_come_from_1_2_and_3_workers_and_nothing_tells_where_the_mask_lay() {
    let workplace = Workplace::new();
    report(&workplace, "llama-tiny", "mask", &["--method", "wanda", "--sparsity", "0.7"]).unwrap();
    let refit = |output: &str, workers: &str| {
        let more = ["--method", "refit", "--mask", "mask", "--set", "method.alpha=0.5"];
        let more = [&more[..], &["--held-out", "0.25", "--workers", workers]].concat();
        report(&workplace, "llama-tiny", output, &more).unwrap()
    };
    let report = refit("one", "1");
    for workers in ["2", "3"] {
        refit(workers, workers);
        same_files(&workplace.path().join("one"), &workplace.path().join(workers)).unwrap();
    }
    assert_eq!(report["pattern"], "imported");
    let alphas: Vec<_> = report["sublayers"].as_array().unwrap().iter().map(|entry| entry["alpha"].as_f64()).collect();
    assert!(alphas.iter().all(|alpha| alpha.is_some_and(|alpha| (0.0..=0.5).contains(&alpha))), "{alphas:?}");
    assert!(alphas.iter().any(|alpha| *alpha > Some(0.0)), "{alphas:?}");
    let card = fs::read_to_string(workplace.path().join("one/README.md")).unwrap();
    assert!(card.contains("the zeros of another checkpoint") && !card.contains(utf8(workplace.path())), "{card}");
}

#[test]
fn a_tuned_refit_keeps_the_zeros_too_and_its_report_says_how_it_was_tuned() {
    let workplace = Workplace::new();
    report(&workplace, "llama-tiny", "mask", &["--method", "wanda", "--sparsity", "0.7"]).unwrap();
    let tuned = ["--set", "method.reconstruct=submodule", "--set", "method.reconstruct_epochs=2"];
    let more = [&["--method", "refit", "--mask", "mask"], &tuned[..]].concat();
    let report = report(&workplace, "llama-tiny", "out", &more).unwrap();
    assert_eq!(zeros(&workplace, "mask").unwrap(), zeros(&workplace, "out").unwrap());
    for entry in report["sublayers"].as_array().unwrap() {
        let tuned = &entry["reconstruction"];
        let error = |key: &str| tuned[key].as_f64().unwrap_or_else(|| panic!("{entry}"));
        assert!(tuned["epochs"].as_u64().is_some() && error("error_after") <= error("error_before"), "{entry}");
    }
}

#[test]
fn what_is_no_mask_of_the_model_is_refused() {
    let workplace = Workplace::new();
    let dense = tiny("llama-tiny");
    let other = tiny("qwen2-tiny");
    copy_folder(&dense, &workplace.path().join("half")).unwrap();
    report(&workplace, "llama-tiny", "mask", &["--method", "wanda"]).unwrap();
    for (more, named) in [
        (vec!["--mask", utf8(&dense)], "has no zeros"),
        (vec!["--mask", utf8(&other)], "model.layers.0"),
        (vec!["--mask", "nowhere"], "nowhere"),
        (vec![], "name it as mask"),
        (vec!["--mask", "mask", "--sparsity", "0.5"], "[pattern] sparsity"),
        (vec!["--mask", "mask", "--pattern", "2:4"], "[pattern] nofm"),
        (vec!["--mask", "mask", "--allocation", "log"], "[pattern] allocation"),
    ] {
        let finished = run(&workplace, "llama-tiny", "out", &[&["--method", "refit"], &more[..]].concat()).unwrap();
        assert_eq!(finished.code(), Some(65), "{more:?}: {}", finished.stderr);
        let errors = finished.error_lines();
        assert!(errors.len() == 1 && errors[0].contains(named), "{more:?}: {errors:?}");
        assert!(!workplace.path().join("out").exists());
        let _ = fs::remove_dir_all(workplace.path().join("out.run"));
    }
    // Other methods have no use for one.
    let finished = run(&workplace, "llama-tiny", "out", &["--method", "wanda", "--mask", "mask"]).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
}

#[test]
fn a_run_is_not_taken_up_with_another_mask() {
    let workplace = Workplace::new();
    report(&workplace, "llama-tiny", "mask", &["--method", "wanda"]).unwrap();
    report(&workplace, "llama-tiny", "other", &["--method", "magnitude"]).unwrap();
    report(&workplace, "llama-tiny", "out", &["--method", "refit", "--mask", "mask"]).unwrap();
    let at = |name: &str| workplace.path().join(name);
    fs::remove_dir_all(at("out")).unwrap();
    fs::rename(at("mask"), at("old")).unwrap();
    fs::rename(at("other"), at("mask")).unwrap();
    let finished = workplace.run(["resume", "out.run"]).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("refit"), "{}", finished.stderr);
}
