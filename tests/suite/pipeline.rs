//! The whole path with the real programs: `prune` on one machine, its workers, and what is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::pattern::Pattern;
use espalier_coordinator::journal::{self, JournalRecord};
use espalier_coordinator::schedule::Record;
use half::{bf16, f16};
use harness::checkpoint::{Safetensors, copy_folder, is_sublayer, same_files};
use harness::process::{PATIENCE, Running, Workplace, kill, wait_for_end};
use harness::{golden, tiny};
use serde_json::Value;

const SAMPLES: &str = "8";
const SEQUENCE_LENGTH: &str = "64";
/// How long an interrupted run may take to clean up.
const GRACE: Duration = Duration::from_secs(20);

/// Prunes a tiny model into `out` of a fresh workplace. Paths are relative to it, so that runs differ in nothing else.
fn pruned(model: &str, more: &[&str]) -> Result<Workplace> {
    let workplace = Workplace::new();
    let (model, text) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"));
    let mut arguments = vec!["prune", utf8(&model), "--output", "out", "--run", "run"];
    arguments.extend(["--calibration", utf8(&text), "--samples", SAMPLES, "--seq-len", SEQUENCE_LENGTH]);
    arguments.extend(more);
    workplace.run(arguments)?.success()?;
    Ok(workplace)
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// Gives the runs with more than one worker.
fn assert_workers_do_not_matter(model: &str, flags: &[&str]) -> [Workplace; 2] {
    let run = |workers| {
        pruned(model, &[flags, &["--workers", workers]].concat())
            .unwrap_or_else(|error| panic!("{model}, {flags:?}, {workers} workers: {error:#}"))
    };
    let one = run("1");
    ["2", "3"].map(|workers| {
        let many = run(workers);
        // Where layers are independent, whoever is free takes the next one, and one may be free every time.
        if !flags.contains(&"dense") {
            all_worked(&many, workers)
                .unwrap_or_else(|error| panic!("{model}, {flags:?}, {workers} workers: {error:#}"));
        }
        same_files(&one.path().join("out"), &many.path().join("out"))
            .unwrap_or_else(|error| panic!("{model}, {flags:?}, 1 against {workers} workers: {error:#}"));
        many
    })
}

fn totals(workplace: &Workplace) -> Value {
    report(workplace)["totals"].clone()
}

fn report(workplace: &Workplace) -> Value {
    let bytes = fs::read(workplace.path().join("run/report.json")).expect("a finished run has a report");
    serde_json::from_slice(&bytes).expect("it is JSON")
}

/// Equal bytes prove nothing of workers of which one did everything. In a chain each prunes the layers that it owns.
fn all_worked(workplace: &Workplace, workers: &str) -> Result<()> {
    let report = report(workplace);
    let sublayers = report["sublayers"].as_array().context("no sublayers")?;
    let pruned_by: BTreeSet<Option<u64>> = sublayers.iter().map(|sublayer| sublayer["worker"].as_u64()).collect();
    ensure!(pruned_by.len().to_string() == workers, "layers were pruned by {pruned_by:?}");
    let totals = &report["totals"];
    ensure!(totals["bytes_moved"].as_u64() > Some(0), "no hidden states moved: {totals}");
    ensure!(totals["assistants_lost"] == 0, "{totals}");
    let speeds = totals["gflops_by_worker"].as_object().context("no speeds")?;
    let are_measured = speeds.values().all(|speed| speed.as_f64() > Some(0.0));
    ensure!(speeds.len().to_string() == workers && are_measured, "{totals}");
    Ok(())
}

fn assert_workers_do_not_matter_to_sparsegpt(model: &str, propagation: &str) {
    let [two, _] = assert_workers_do_not_matter(model, &["--method", "sparsegpt", "--propagation", propagation]);
    // In a chain, workers that would be idle help.
    let moved = totals(&two)["bytes_moved"].as_u64();
    assert!(propagation != "pruned" || moved > Some(1_000_000), "{model}: nobody helped, {moved:?} bytes moved");
}

#[test]
fn llama_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("llama-tiny", "pruned");
}

#[test]
fn llama_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("llama-tiny", "dense");
}

#[test]
fn opt_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("opt-tiny", "pruned");
}

#[test]
fn opt_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("opt-tiny", "dense");
}

#[test]
fn qwen2_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("qwen2-tiny", "pruned");
}

#[test]
fn qwen2_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter_to_sparsegpt("qwen2-tiny", "dense");
}

/// On the smallest model.
fn assert_workers_do_not_matter_to(method: &str, flags: &[&str]) {
    assert_workers_do_not_matter("qwen2-tiny", &[&["--method", method], flags].concat());
}

#[test]
fn magnitude_gives_the_same_bytes_from_1_2_and_3_workers() {
    assert_workers_do_not_matter_to("magnitude", &[]);
}

#[test]
fn wanda_gives_the_same_bytes_from_1_2_and_3_workers() {
    assert_workers_do_not_matter_to("wanda", &[]);
}

#[test]
fn fista_gives_the_same_bytes_from_1_2_and_3_workers() {
    assert_workers_do_not_matter_to("fista", &["--propagation", "dense"]);
}

#[test]
fn alps_gives_the_same_bytes_from_1_2_and_3_workers() {
    assert_workers_do_not_matter_to("alps", &[]);
}

#[test]
fn espalier_gives_the_same_bytes_from_1_2_and_3_workers() {
    assert_workers_do_not_matter_to("espalier", &["--pattern", "2:4", "--set", "method.row_block=48"]);
}

#[test]
fn espalier_gives_the_same_bytes_from_1_2_and_3_workers_that_share_its_blocks() {
    assert_workers_do_not_matter_to("espalier", &["--set", "method.row_block=32"]);
}

#[test]
fn sparsegpt_gives_the_same_bytes_from_1_2_and_3_workers_in_groups_of_weights() {
    assert_workers_do_not_matter_to("sparsegpt", &["--pattern", "2:4"]);
}

#[test]
fn methods_that_remove_structures_give_the_same_bytes_from_1_2_and_3_workers() {
    for method in ["slimgpt", "fasp", "spap"] {
        assert_workers_do_not_matter("llama-tiny", &["--method", method, "--sparsity", "0.3"]);
    }
}

#[test]
fn espalier_gives_the_same_bytes_from_1_2_and_3_workers_with_a_target_blend() {
    assert_workers_do_not_matter_to("espalier", &["--set", "method.alpha=0.5", "--held-out", "0.25"]);
}

#[test]
fn a_reconstruction_gives_the_same_bytes_from_1_2_and_3_workers() {
    let tuned = ["--set", "method.reconstruct=submodule", "--set", "method.reconstruct_epochs=2"];
    assert_workers_do_not_matter_to("espalier", &tuned);
}

/// Counts zeros in the written file itself, and then asks `inspect` for the same numbers.
fn check_exact(model: &str, method: &str, pattern: Pattern, flags: &[&str]) -> Result<()> {
    let workplace = pruned(model, &[&["--method", method, "--workers", "2"], flags].concat())?;
    let output = workplace.path().join("out");
    let dense = Safetensors::read(&tiny(model).join("model.safetensors"))?;
    let sparse = Safetensors::read(&output.join("model.safetensors"))?;
    let report = workplace.run(["inspect", "out", "--json"])?.success()?.json()?;
    let inspected = report["tensors"].as_array().context("inspect --json has no `tensors`")?;

    let mut names: Vec<_> = sparse.names().collect();
    let mut dense_names: Vec<_> = dense.names().collect();
    names.sort_unstable();
    dense_names.sort_unstable();
    ensure!(names == dense_names, "tensors were added or lost: {names:?}");
    for name in names {
        if !is_sublayer(name) {
            ensure!(sparse.bytes(name)? == dense.bytes(name)?, "{name} is no sublayer, but was changed");
            continue;
        }
        let [rows, columns] = sparse.shape(name)?[..] else { anyhow::bail!("{name} is no matrix") };
        let weights = sparse.bf16(name)?;
        let zeros = weights.iter().filter(|weight| is_zero(**weight)).count();
        ensure!(zeros == pattern.zeros(rows, columns), "{name} has {zeros} zeros of {}", rows * columns);
        if let Pattern::NofM { keep, of } = pattern {
            let broken =
                weights.chunks_exact(of).position(|group| group.iter().filter(|w| !is_zero(**w)).count() > keep);
            ensure!(broken.is_none(), "{name} keeps more than {keep} in group {broken:?}");
        }
        let entry =
            inspected.iter().find(|entry| entry["name"] == name).with_context(|| format!("{name} not inspected"))?;
        ensure!(entry["zeros"] == zeros && entry["elements"] == rows * columns, "inspect says of {name}: {entry}");
    }
    Ok(())
}

fn is_zero(weight: bf16) -> bool {
    weight.to_bits() & 0x7FFF == 0
}

/// Every method that places zeros.
const METHODS: [&str; 6] = ["magnitude", "wanda", "sparsegpt", "fista", "alps", "espalier"];

fn check_unstructured(methods: &[&str]) {
    for method in methods {
        for (sparsity, flag) in [(0.5, "0.5"), (0.37, "0.37")] {
            check_exact("llama-tiny", method, Pattern::Unstructured { sparsity }, &["--sparsity", flag])
                .unwrap_or_else(|error| panic!("{method} at {flag}: {error:#}"));
        }
    }
}

#[test]
fn sparsity_is_exact_in_models_with_tied_embeddings_and_with_biases() {
    for model in ["opt-tiny", "qwen2-tiny"] {
        check_exact(model, "sparsegpt", Pattern::Unstructured { sparsity: 0.5 }, &["--sparsity", "0.5"])
            .unwrap_or_else(|error| panic!("{model}: {error:#}"));
    }
}

#[test]
fn weights_that_half_precision_could_lose_are_kept() {
    // Projections a thousandth as large: solutions have values below the least that f16 tells from 0.
    let workplace = Workplace::new();
    copy_folder(&tiny("llama-tiny"), &workplace.path().join("model")).unwrap();
    let path = workplace.path().join("model/model.safetensors");
    let mut file = Safetensors::read(&path).unwrap();
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    for name in names {
        let factor = if is_sublayer(&name) { 1e-3 } else { 1.0 };
        let (start, end) = file.offsets(&name).unwrap();
        let values = file.bf16(&name).unwrap();
        let least = f16::from_bits(1).to_f32();
        let narrow = values.iter().map(|value| {
            let scaled = value.to_f32() * factor;
            // Every dense weight is there, so that zeros are the method's.
            f16::from_f32(if scaled.abs() < least { least.copysign(scaled) } else { scaled })
        });
        let bytes: Vec<u8> = narrow.flat_map(f16::to_le_bytes).collect();
        file.data[start..end].copy_from_slice(&bytes);
        file.header[&name]["dtype"] = "F16".into();
    }
    file.write(&path).unwrap();
    let text = golden().join("text/wikitext2-valid-head.txt");
    let arguments =
        ["prune", "model", "--output", "out", "--method", "sparsegpt", "--sparsity", "0.5", "--calibration"];
    let size = [utf8(&text), "--samples", SAMPLES, "--seq-len", SEQUENCE_LENGTH];
    workplace.run([&arguments[..], &size].concat()).unwrap().success().unwrap();
    let sparse = Safetensors::read(&workplace.path().join("out/model.safetensors")).unwrap();
    for name in sparse.names().filter(|name| is_sublayer(name)) {
        let bytes = sparse.bytes(name).unwrap();
        let zeros = bytes.chunks_exact(2).filter(|pair| pair[0] == 0 && pair[1] & 0x7f == 0).count();
        assert_eq!(zeros, bytes.len() / 4, "{name}");
    }
}

fn check_nofm(methods: &[&str]) {
    for method in methods {
        for (keep, of, flag) in [(2, 4, "2:4"), (3, 8, "3:8")] {
            check_exact("llama-tiny", method, Pattern::NofM { keep, of }, &["--pattern", flag])
                .unwrap_or_else(|error| panic!("{method} at {flag}: {error:#}"));
        }
    }
}

#[test]
fn every_method_that_places_zeros_is_tested() {
    let listed = espalier_worker::prune::METHODS.iter().filter(|method| {
        let (solver, _) = (method.build)(&serde_json::Value::Null).expect("defaults are sound");
        solver.structured().is_none() && solver.imports().is_none()
    });
    assert_eq!(listed.map(|method| method.name).collect::<Vec<_>>(), METHODS);
}

#[test]
fn sparsity_is_exact_to_the_weight_for_every_one_shot_method() {
    check_unstructured(&METHODS[..3]);
}

#[test]
fn sparsity_is_exact_to_the_weight_for_every_iterative_method() {
    check_unstructured(&METHODS[3..]);
}

#[test]
fn every_group_of_an_nofm_pattern_holds_it_for_every_one_shot_method() {
    check_nofm(&METHODS[..3]);
}

#[test]
fn every_group_of_an_nofm_pattern_holds_it_for_every_iterative_method() {
    check_nofm(&METHODS[3..]);
}

#[test]
fn report_holds_the_perplexities_that_eval_prints() {
    let text = golden().join("text/wikitext2-test-head.txt");
    let windows = ["--eval-seq-len", "64", "--eval-max-windows", "8"];
    let workplace =
        pruned("llama-tiny", &[&["--method", "wanda", "--workers", "2", "--eval", utf8(&text)], &windows[..]].concat())
            .unwrap();
    let report = fs::read_to_string(workplace.path().join("run/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let model = tiny("llama-tiny");
    for (of, key) in [(utf8(&model), "dense"), ("out", "pruned")] {
        let evaluated = workplace
            .run(["eval", of, "--text", utf8(&text), "--seq-len", "64", "--max-windows", "8", "--json"])
            .and_then(|finished| finished.success()?.json())
            .unwrap();
        assert_eq!(evaluated["perplexity"], report["perplexity"][key], "{key}: {evaluated}");
    }
    assert_eq!(report["perplexity"]["sequence_length"], 64);
    assert_eq!(report["perplexity"]["windows"], 8);
}

#[test]
fn the_environment_lies_between_a_job_file_and_the_flags() {
    let mut workplace = Workplace::new();
    workplace.set("ESPALIER__PATTERN__SPARSITY", "0.25");
    workplace.set("ESPALIER__METHOD__NAME", "magnitude");
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    fs::write(workplace.path().join("job.toml"), "[method]\nname = \"sparsegpt\"\n[pattern]\nnofm = \"2:4\"\n")
        .unwrap();
    let pruned = |output: &str, more: &[&str]| {
        let arguments = ["prune", utf8(&model), "--job", "job.toml", "--output", output, "--json", "--calibration"];
        let size = [utf8(&text), "--samples", "4", "--seq-len", "32"];
        workplace.run([&arguments[..], &size, more].concat()).and_then(|ended| ended.success()?.json()).unwrap()
    };
    let report = pruned("environment", &[]);
    assert_eq!((&report["method"]["name"], &report["totals"]["sparsity"]), (&"magnitude".into(), &0.25.into()));
    let report = pruned("flags", &["--method", "wanda", "--sparsity", "0.5"]);
    assert_eq!((&report["method"]["name"], &report["totals"]["sparsity"]), (&"wanda".into(), &0.5.into()));
    workplace.set("ESPALIER__PATTERN__SPARSTY", "0.25");
    let arguments = ["prune", "m", "--job", "job.toml", "--output", "out", "--calibration", "c"];
    let finished = workplace.run(arguments).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("did you mean sparsity?"), "{}", finished.stderr);
}

fn wait_for_lease(running: &mut Running, workplace: &Workplace) -> Result<()> {
    let journal = workplace.path().join("run/journal");
    let leased = |record: &JournalRecord| matches!(record, JournalRecord::Prune(Record::Leased { .. }));
    let seen = || journal::read(&journal).ok()?.iter().any(leased).then_some(());
    running.wait_until("the first lease", seen)
}

#[test]
fn a_run_that_loses_all_its_workers_ends_and_can_be_resumed() {
    let workplace = Workplace::new();
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--workers", "2"];
    let work = ["--calibration", utf8(&text), "--samples", "128", "--seq-len", "256", "--method", "sparsegpt"];
    let mut running = workplace.start(arguments.into_iter().chain(work)).unwrap();
    let workers = running.wait_for_children(2).unwrap();
    wait_for_lease(&mut running, &workplace).unwrap();
    workers.iter().copied().try_for_each(kill).unwrap();
    let finished = running.finish(GRACE).unwrap();
    assert_eq!(finished.code(), Some(75), "{}", finished.stderr);
    let errors = finished.error_lines();
    assert!(errors.len() == 1 && errors[0].contains("espalier resume run"), "{}", finished.stderr);
    assert!(!workplace.path().join("out").exists());
}

#[test]
fn what_was_pruned_is_not_lost_when_the_output_cannot_be_written() {
    let workplace = Workplace::new();
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--workers", "1"];
    let work = ["--calibration", utf8(&text), "--samples", "64", "--seq-len", "128", "--method", "sparsegpt"];
    let mut running = workplace.start(arguments.into_iter().chain(work)).unwrap();
    wait_for_lease(&mut running, &workplace).unwrap();
    // Somebody else puts something there meanwhile.
    fs::create_dir(workplace.path().join("out")).unwrap();
    fs::write(workplace.path().join("out/precious"), "kept").unwrap();
    let finished = running.finish(PATIENCE).unwrap();
    assert_eq!(finished.code(), Some(75), "{}", finished.stderr);
    assert!(finished.stderr.contains("espalier resume run"), "{}", finished.stderr);
    assert_eq!(fs::read(workplace.path().join("out/precious")).unwrap(), b"kept");
    fs::remove_dir_all(workplace.path().join("out")).unwrap();
    workplace.run(["resume", "run"]).unwrap().success().unwrap();
    assert!(workplace.path().join("out/model.safetensors").exists());
}

#[test]
fn interrupt_leaves_neither_output_nor_workers() {
    let workplace = Workplace::new();
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--workers", "2"];
    // Enough work that the interrupt comes long before the end.
    let work = ["--calibration", utf8(&text), "--samples", "128", "--seq-len", "256", "--method", "sparsegpt"];
    let mut running = workplace.start(arguments.into_iter().chain(work)).unwrap();
    let workers = running.wait_for_children(2).unwrap();
    wait_for_lease(&mut running, &workplace).unwrap();
    running.interrupt().unwrap();
    let finished = running.finish(GRACE).unwrap();

    assert_eq!(finished.code(), Some(75), "{}", finished.stderr);
    assert_eq!(finished.error_lines().len(), 1, "{}", finished.stderr);
    wait_for_end(&workers, GRACE).unwrap();
    let left: Vec<_> = fs::read_dir(workplace.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "run"), "left behind: {left:?}");
}

/// Each keeps hidden states in its part of a quarter of the machine's memory, so that together they never take more.
#[test]
fn workers_of_one_machine_share_its_memory() {
    let budgets = |workers: &str| -> Vec<u64> {
        let workplace = pruned("llama-tiny", &["--workers", workers]).unwrap();
        let logs = fs::read_dir(workplace.path().join("run/logs")).unwrap();
        let told = |log: std::io::Result<fs::DirEntry>| {
            let text = fs::read_to_string(log.unwrap().path()).unwrap();
            let (_, rest) = text.split_once("memory_bytes=").expect("a worker tells its budget");
            rest.split_whitespace().next().and_then(|number| number.parse().ok()).expect("it is a number")
        };
        logs.map(told).collect()
    };
    let (one, two) = (budgets("1"), budgets("2"));
    assert_eq!((one.len(), two), (1, vec![one[0] / 2; 2]));
}
