//! From one layout to another, and two models side by side: what a person does with a structured result.

use std::fs;
use std::path::Path;

use harness::checkpoint::{Safetensors, copy_folder};
use harness::process::{Finished, Workplace};
use harness::{golden, tiny};
use serde_json::Value;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// A workplace with a masked checkpoint in `masked`.
fn masked(model: &str, method: &str) -> Workplace {
    let workplace = Workplace::new();
    let (model, text) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"));
    let mut arguments = vec!["prune", utf8(&model), "--output", "masked", "--calibration", utf8(&text)];
    arguments.extend(["--samples", "8", "--seq-len", "64", "--method", method, "--sparsity", "0.4"]);
    arguments.extend(["--layout", "masked"]);
    workplace.run(arguments).and_then(Finished::success).expect("the model can be pruned");
    workplace
}

fn export(workplace: &Workplace, from: &str, more: &[&str]) -> Finished {
    workplace.run([&["export", from, "--output", "out"], more].concat()).expect("the program starts and ends")
}

fn refused(workplace: &Workplace, from: &str, more: &[&str], expected: &[&str]) {
    let finished = export(workplace, from, more);
    assert_eq!(finished.code(), Some(65), "{more:?}: {}", finished.stderr);
    let errors = finished.error_lines();
    assert!(errors.len() == 1 && expected.iter().all(|what| errors[0].contains(what)), "{expected:?}: {errors:?}");
    assert!(!workplace.path().join("out").exists(), "{more:?} left an output behind");
}

#[test]
fn an_exported_checkpoint_tells_its_own_layout() {
    let workplace = masked("llama-tiny", "fasp");
    export(&workplace, "masked", &["--layout", "padded", "--tensor-parallel", "2"]).success().unwrap();
    let read = |name: &str| fs::read_to_string(workplace.path().join(name)).unwrap();
    let manifest: Value = serde_json::from_str(&read("out/espalier.json")).unwrap();
    assert_eq!(manifest["job"]["output"]["layout"], "padded");
    assert_eq!(manifest["job"]["output"]["tensor_parallel"], 2);
    let told = serde_json::to_string_pretty(&manifest["job"]).unwrap();
    assert!(read("out/README.md").contains(&told), "{}", read("out/README.md"));
    assert!(!read("out/README.md").contains("\"masked\""));
}

#[test]
fn what_devices_cannot_share_is_not_exported() {
    // Heads that went, and heads that stay: by method, and by family.
    let workplace = masked("llama-tiny", "fasp");
    refused(&workplace, "masked", &["--layout", "uniform", "--tensor-parallel", "7"], &["cannot be split over 7"]);
    for (model, method) in [("llama-tiny", "spap"), ("opt-tiny", "fasp")] {
        let workplace = masked(model, method);
        let flags = ["--layout", "padded", "--tensor-parallel", "7"];
        refused(&workplace, "masked", &flags, &["num_attention_heads", "cannot be split over 7"]);
        export(&workplace, "masked", &["--layout", "masked"]).success().unwrap();
    }
}

#[test]
fn a_checkpoint_that_is_not_the_one_recorded_is_not_exported() {
    let workplace = masked("llama-tiny", "slimgpt");
    let at = |name: &str| workplace.path().join(name);
    // Weights of the dense model under the record of what was removed: heads and channels would be lost.
    copy_folder(&at("masked"), &at("replaced")).unwrap();
    fs::copy(tiny("llama-tiny").join("model.safetensors"), at("replaced/model.safetensors")).unwrap();
    let flags = ["--layout", "padded"];
    refused(&workplace, "replaced", &flags, &["is not zero where espalier.json says"]);

    copy_folder(&at("masked"), &at("incomplete")).unwrap();
    let path = at("incomplete/model.safetensors");
    let mut tensors = Safetensors::read(&path).unwrap();
    let down = tensors.header.remove("model.layers.0.mlp.down_proj.weight").unwrap();
    tensors.header.insert("model.layers.0.mlp.gone_proj.weight".to_owned(), down);
    tensors.write(&path).unwrap();
    refused(&workplace, "incomplete", &flags, &["has no", "layers.0.mlp.down_proj.weight"]);
}

#[test]
fn two_models_are_measured_on_the_same_windows_in_turn() {
    let workplace = masked("llama-tiny", "slimgpt");
    let (dense, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-test-head.txt"));
    let asked = ["--text", utf8(&text), "--seq-len", "64", "--max-windows", "6", "--json"];
    let eval = |model: &str, more: &[&str]| {
        let finished = workplace.run([&["eval", model], &asked[..], more].concat()).unwrap();
        finished.success().unwrap().json().unwrap()
    };
    let alone = |model: &str| eval(model, &[])["window_nll"].clone();
    let (pruned, dense_alone) = (alone("masked"), alone(utf8(&dense)));
    let both = eval("masked", &["--against", utf8(&dense), "--bench"]);
    assert_eq!((&both["window_nll"], &both["against"]["window_nll"]), (&pruned, &dense_alone));
    assert_ne!(pruned, dense_alone);
    let seconds = |of: &Value| {
        let passes = of["bench"]["seconds_by_pass"].as_array().unwrap();
        assert_eq!(passes.len(), 2, "{of}");
        passes.iter().map(|pass| pass.as_f64().unwrap()).sum::<f64>()
    };
    let ratio = seconds(&both["against"]) / seconds(&both);
    assert!((both["bench"]["speed_up"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{both}");
    assert!(both["against"]["bench"]["peak_rss_bytes"].as_u64() > Some(0));
    // Other tokens of the same text: the numbers say nothing of each other.
    let other = workplace.path().join("other");
    copy_folder(&dense, &other).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(other.join("tokenizer.json")).unwrap()).unwrap();
    tokenizer["model"]["merges"] = Value::Array(Vec::new());
    fs::write(other.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let finished = workplace.run([&["eval", "masked"], &asked[..], &["--against", "other"]].concat()).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("do not make the same tokens"), "{}", finished.stderr);
}
