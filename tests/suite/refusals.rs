//! Bad input: each case ends with exit 65 (2 for wrong usage), one line that names the file or key, and no output.
//!
//! What clap cannot parse is wrong usage. A flag whose value parses but makes no sense is refused like the same value in
//! `job.toml`: the job is wrong.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::{Safetensors, copy_folder};
use harness::process::Workplace;
use harness::{golden, tiny};
use serde_json::{Value, json};

const WRONG_USAGE: i32 = 2;
const WRONG_INPUT: i32 = 65;

const WEIGHTS: &str = "model/model.safetensors";
const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
const DOWN: &str = "model.layers.3.mlp.down_proj.weight";

/// One thing that is wrong.
struct Case {
    name: &'static str,
    /// Damages the workplace: `model/` is a copy of the tiny LLaMA, `text.txt` a calibration text.
    damage: fn(&Path) -> Result<()>,
    /// Flags on top of a sound command.
    flags: &'static [&'static str],
    code: i32,
    /// What the error line must name.
    names: &'static [&'static str],
}

const SOUND: Case = Case { name: "sound", damage: |_| Ok(()), flags: &[], code: WRONG_INPUT, names: &[] };

fn check(case: &Case) -> Result<()> {
    let workplace = Workplace::new();
    let folder = workplace.path();
    copy_folder(&tiny("llama-tiny"), &folder.join("model"))?;
    fs::copy(golden().join("text/wikitext2-test-head.txt"), folder.join("text.txt"))?;
    (case.damage)(folder)?;
    let before = entries(folder)?;

    let mut arguments = vec!["prune", "model", "--output", "out", "--run", "run", "--workers", "1"];
    for (flag, value) in [("--method", "wanda"), ("--calibration", "text.txt"), ("--samples", "4"), ("--seq-len", "64")]
    {
        if !case.flags.contains(&flag) {
            arguments.extend([flag, value]);
        }
    }
    if let Some(at) = case.flags.iter().position(|flag| *flag == "--output") {
        arguments[3] = case.flags[at + 1];
        arguments.extend(case.flags[..at].iter().chain(&case.flags[at + 2..]));
    } else {
        arguments.extend(case.flags);
    }
    let finished = workplace.run(arguments)?;

    ensure!(finished.code() == Some(case.code), "exit {:?}, not {}:\n{}", finished.code(), case.code, finished.stderr);
    let errors = finished.error_lines();
    ensure!(errors.len() == 1, "{} error lines instead of one:\n{}", errors.len(), finished.stderr);
    for name in case.names {
        ensure!(errors[0].contains(name), "`{name}` is not named: {}", errors[0]);
    }
    let after = entries(folder)?;
    ensure!(after == before, "left behind: {after:?}");
    Ok(())
}

fn check_all(cases: &[Case]) {
    let failures: Vec<_> =
        cases.iter().filter_map(|case| check(case).err().map(|error| format!("{}: {error:#}", case.name))).collect();
    assert!(failures.is_empty(), "{} of {} cases fail:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// Everything in a folder and in its folders, sorted.
fn entries(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            names.extend(entries(&entry.path())?.into_iter().map(|inner| format!("{name}/{inner}")));
        }
        names.push(name);
    }
    names.sort_unstable();
    Ok(names)
}

/// Changes one key of a tensor's entry in the safetensors header.
fn edit_header(folder: &Path, tensor: &str, key: &str, value: Value) -> Result<()> {
    let path = folder.join(WEIGHTS);
    let mut file = Safetensors::read(&path)?;
    file.header.get_mut(tensor).with_context(|| format!("no tensor {tensor}"))?[key] = value;
    file.write(&path)
}

/// Changes one key of `config.json`.
fn edit_config(folder: &Path, key: &str, value: Value) -> Result<()> {
    let path = folder.join("model/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config[key] = value;
    Ok(fs::write(path, serde_json::to_vec_pretty(&config)?)?)
}

/// Cuts a file to its first `bytes` bytes.
fn truncate(path: &Path, bytes: u64) -> Result<()> {
    Ok(fs::OpenOptions::new().write(true).open(path)?.set_len(bytes)?)
}

/// Overwrites the length of the safetensors header.
fn set_header_length(folder: &Path, length: u64) -> Result<()> {
    let path = folder.join(WEIGHTS);
    let mut bytes = fs::read(&path)?;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(fs::write(path, bytes)?)
}

/// Overwrites the last element of a bf16 tensor.
fn poison(folder: &Path, tensor: &str, bits: u16) -> Result<()> {
    let path = folder.join(WEIGHTS);
    let mut file = Safetensors::read(&path)?;
    let (_, end) = file.offsets(tensor)?;
    file.data[end - 2..end].copy_from_slice(&bits.to_le_bytes());
    file.write(&path)
}

#[test]
fn what_goes_into_the_output_as_it_is_must_be_finite_floats() {
    const NAN: u16 = 0x7fc0;
    check_all(&[
        Case {
            name: "NaN in the embedding",
            damage: |folder| poison(folder, "model.embed_tokens.weight", NAN),
            names: &["model.safetensors", "model.embed_tokens.weight", "NaN"],
            ..SOUND
        },
        Case {
            name: "infinity in the last norm",
            damage: |folder| poison(folder, "model.norm.weight", 0x7f80),
            names: &["model.safetensors", "model.norm.weight"],
            ..SOUND
        },
        Case {
            name: "a tensor of integers beside the model's",
            damage: |folder| {
                let path = folder.join(WEIGHTS);
                let mut file = Safetensors::read(&path)?;
                let start = file.data.len();
                file.data.extend([0; 8]);
                let entry = json!({ "dtype": "I64", "shape": [1], "data_offsets": [start, start + 8] });
                file.header.insert("model.position_ids".to_owned(), entry);
                file.write(&path)
            },
            names: &["model.safetensors", "model.position_ids"],
            ..SOUND
        },
        Case {
            name: "a quantised model",
            damage: |folder| edit_config(folder, "quantization_config", json!({ "quant_method": "gptq" })),
            names: &["config.json", "quantization_config"],
            ..SOUND
        },
    ]);
}

#[test]
fn damaged_weight_files_are_refused() {
    check_all(&[
        Case {
            name: "no weights",
            damage: |folder| Ok(fs::remove_file(folder.join(WEIGHTS))?),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "empty file",
            damage: |folder| truncate(&folder.join(WEIGHTS), 0),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "header length cut off",
            damage: |folder| truncate(&folder.join(WEIGHTS), 4),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "header cut off",
            damage: |folder| truncate(&folder.join(WEIGHTS), 100),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "data cut off",
            damage: |folder| truncate(&folder.join(WEIGHTS), 1_000_000),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "header longer than the file",
            damage: |folder| set_header_length(folder, 1 << 30),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "header longer than memory",
            damage: |folder| set_header_length(folder, u64::MAX),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "header is no JSON",
            damage: |folder| set_header_length(folder, 16),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "overlapping tensors",
            damage: |folder| {
                let file = Safetensors::read(&folder.join(WEIGHTS))?;
                let (start, end) = file.offsets(QUERY)?;
                edit_header(folder, QUERY, "data_offsets", json!([start - 2, end - 2]))
            },
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "tensor outside the file",
            damage: |folder| {
                let file = Safetensors::read(&folder.join(WEIGHTS))?;
                let (start, end) = file.offsets(QUERY)?;
                let beyond = file.data.len();
                edit_header(folder, QUERY, "data_offsets", json!([start + beyond, end + beyond]))
            },
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "tensor that ends before it starts",
            damage: |folder| edit_header(folder, QUERY, "data_offsets", json!([64, 0])),
            names: &["model.safetensors"],
            ..SOUND
        },
        Case {
            name: "shape whose product overflows",
            damage: |folder| edit_header(folder, QUERY, "shape", json!([1_u64 << 40, 1_u64 << 40])),
            names: &["model.safetensors", QUERY],
            ..SOUND
        },
        Case {
            name: "wrong shape",
            damage: |folder| edit_header(folder, QUERY, "shape", json!([96, 384])),
            names: &[QUERY, "192"],
            ..SOUND
        },
        Case {
            name: "wrong dtype",
            damage: |folder| edit_header(folder, QUERY, "dtype", json!("I16")),
            names: &["model.safetensors", QUERY, "I16"],
            ..SOUND
        },
        Case {
            name: "tensor missing",
            damage: |folder| {
                let path = folder.join(WEIGHTS);
                let mut file = Safetensors::read(&path)?;
                let entry = file.header.remove(QUERY).context("no such tensor")?;
                file.header.insert("model.layers.1.self_attn.strange.weight".to_owned(), entry);
                file.write(&path)
            },
            names: &[QUERY],
            ..SOUND
        },
        Case { name: "NaN", damage: |folder| poison(folder, DOWN, 0x7FC0), names: &[DOWN], ..SOUND },
        Case { name: "infinity", damage: |folder| poison(folder, QUERY, 0xFF80), names: &[QUERY], ..SOUND },
    ]);
}

#[test]
fn wrong_configs_and_missing_files_are_refused() {
    check_all(&[
        Case {
            name: "no model",
            damage: |folder| Ok(fs::remove_dir_all(folder.join("model"))?),
            names: &["model"],
            ..SOUND
        },
        Case {
            name: "no config",
            damage: |folder| Ok(fs::remove_file(folder.join("model/config.json"))?),
            names: &["config.json"],
            ..SOUND
        },
        Case {
            name: "config is no JSON",
            damage: |folder| truncate(&folder.join("model/config.json"), 50),
            names: &["config.json"],
            ..SOUND
        },
        Case {
            name: "unknown architecture",
            damage: |folder| edit_config(folder, "architectures", json!(["MysteryForCausalLM"])),
            names: &["config.json", "MysteryForCausalLM"],
            ..SOUND
        },
        Case {
            name: "width is a word",
            damage: |folder| edit_config(folder, "hidden_size", json!("wide")),
            names: &["config.json", "hidden_size"],
            ..SOUND
        },
        Case {
            name: "no heads",
            damage: |folder| edit_config(folder, "num_attention_heads", json!(0)),
            names: &["config.json", "num_attention_heads"],
            ..SOUND
        },
        Case {
            name: "more layers than the file has",
            damage: |folder| edit_config(folder, "num_hidden_layers", json!(5)),
            names: &["model.layers.4."],
            ..SOUND
        },
        Case {
            name: "no tokenizer",
            damage: |folder| Ok(fs::remove_file(folder.join("model/tokenizer.json"))?),
            names: &["tokenizer.json"],
            ..SOUND
        },
    ]);
}

#[test]
fn wrong_calibration_is_refused() {
    check_all(&[
        Case {
            name: "no such text",
            damage: |folder| Ok(fs::remove_file(folder.join("text.txt"))?),
            names: &["text.txt"],
            ..SOUND
        },
        Case {
            name: "empty text",
            damage: |folder| truncate(&folder.join("text.txt"), 0),
            names: &["text.txt"],
            ..SOUND
        },
        Case {
            name: "fewer tokens than one sequence",
            damage: |folder| truncate(&folder.join("text.txt"), 100),
            names: &["text.txt", "64"],
            ..SOUND
        },
        Case {
            name: "text is no UTF-8",
            damage: |folder| Ok(fs::write(folder.join("text.txt"), [0xFF; 4096])?),
            names: &["text.txt"],
            ..SOUND
        },
        Case {
            name: "a line of a .jsonl is no JSON",
            damage: |folder| Ok(fs::write(folder.join("bad.jsonl"), "{\"text\": \"sound\"}\n{\"text\": \n")?),
            flags: &["--calibration", "bad.jsonl"],
            names: &["bad.jsonl", "2"],
            ..SOUND
        },
        Case {
            name: "a line of a .jsonl has neither key",
            damage: |folder| Ok(fs::write(folder.join("bad.jsonl"), "{\"txet\": \"misspelt\"}\n")?),
            flags: &["--calibration", "bad.jsonl"],
            names: &["bad.jsonl", "1"],
            ..SOUND
        },
        Case {
            name: "token outside the vocabulary",
            damage: |folder| {
                let line = json!({ "input_ids": vec![999_999; 64] }).to_string();
                Ok(fs::write(folder.join("bad.jsonl"), [line.as_str(); 4].join("\n"))?)
            },
            flags: &["--calibration", "bad.jsonl"],
            names: &["999999"],
            ..SOUND
        },
        Case {
            name: "fewer tokenised sequences than asked",
            damage: |folder| Ok(fs::write(folder.join("few.jsonl"), json!({ "input_ids": vec![7; 64] }).to_string())?),
            flags: &["--calibration", "few.jsonl"],
            names: &["few.jsonl", "4"],
            ..SOUND
        },
    ]);
}

#[test]
fn wrong_jobs_are_refused() {
    check_all(&[
        Case { name: "everything zero", flags: &["--sparsity", "1"], names: &["sparsity"], ..SOUND },
        Case { name: "negative sparsity", flags: &["--sparsity=-0.1"], names: &["sparsity"], ..SOUND },
        Case { name: "sparsity is NaN", flags: &["--sparsity", "NaN"], names: &["sparsity"], ..SOUND },
        Case { name: "more kept than there are", flags: &["--pattern", "5:4"], names: &["5:4"], ..SOUND },
        Case { name: "nothing kept", flags: &["--pattern", "0:4"], names: &["0:4"], ..SOUND },
        Case { name: "width not divisible", flags: &["--pattern", "2:5"], names: &["2:5", "192", "q_proj"], ..SOUND },
        Case {
            name: "sparsity of a job file is NaN",
            damage: |folder| Ok(fs::write(folder.join("job.toml"), "[pattern]\nsparsity = nan\n")?),
            flags: &["--job", "job.toml"],
            names: &["job.toml", "[pattern] sparsity"],
            ..SOUND
        },
        Case {
            name: "sparsity of a job file is no number",
            damage: |folder| Ok(fs::write(folder.join("job.toml"), "[pattern]\nsparsity = \"half\"\n")?),
            flags: &["--job", "job.toml"],
            names: &["job.toml", "pattern.sparsity"],
            ..SOUND
        },
        Case {
            name: "output on a foreign store",
            flags: &["--output", "ftp://host/out"],
            names: &["ftp://host/out"],
            ..SOUND
        },
        Case { name: "no samples", flags: &["--samples", "0"], names: &["samples"], ..SOUND },
        Case {
            name: "one sequence held out of one",
            flags: &["--samples", "1", "--held-out", "0.9"],
            names: &["held_out", "samples"],
            ..SOUND
        },
        Case {
            name: "one sequence to tune on and to judge by",
            flags: &["--samples", "1", "--set", "method.reconstruct=submodule"],
            names: &["reconstruct", "samples"],
            ..SOUND
        },
        Case {
            name: "a target blend that nothing is held out for",
            flags: &["--method", "espalier", "--set", "method.alpha=0.5", "--held-out", "0"],
            names: &["espalier", "held_out"],
            ..SOUND
        },
        Case {
            name: "a row block that overflows",
            flags: &["--method", "espalier", "--set", "method.row_block=9223372036854775808"],
            names: &["row_block"],
            ..SOUND
        },
        Case { name: "no tokens", flags: &["--seq-len", "0"], names: &["sequence_length"], ..SOUND },
        Case { name: "unknown method", flags: &["--method", "guess"], names: &["guess"], ..SOUND },
        Case {
            name: "unknown parameter",
            flags: &["--method", "sparsegpt", "--set", "sparsegpt.dmaping=0.01"],
            names: &["dmaping"],
            ..SOUND
        },
        Case {
            name: "output is not empty",
            damage: |folder| {
                fs::create_dir(folder.join("out"))?;
                Ok(fs::write(folder.join("out/precious"), "kept")?)
            },
            names: &["out"],
            ..SOUND
        },
        Case { name: "output below a file", flags: &["--output", "text.txt/out"], names: &["text.txt"], ..SOUND },
    ]);
}

#[test]
fn wrong_usage_is_told_from_wrong_input() {
    check_all(&[
        Case {
            name: "unknown flag",
            flags: &["--sprasity", "0.5"],
            code: WRONG_USAGE,
            names: &["--sprasity"],
            ..SOUND
        },
        Case { name: "no number", flags: &["--sparsity", "half"], code: WRONG_USAGE, names: &["half"], ..SOUND },
        Case {
            name: "no windows",
            flags: &["--eval", "text.txt", "--eval-max-windows", "0"],
            code: WRONG_USAGE,
            names: &["--eval-max-windows"],
            ..SOUND
        },
        Case {
            name: "two patterns",
            flags: &["--sparsity", "0.5", "--pattern", "2:4"],
            code: WRONG_USAGE,
            names: &["--pattern"],
            ..SOUND
        },
    ]);
}

#[test]
fn a_gpu_that_cannot_be_had_is_refused_in_one_line() {
    // No machine that tests run on has as many: with or without the CUDA build there is no such GPU.
    let none = &["--device", "cuda:4096"];
    check_all(&[
        Case { name: "no such GPU", flags: none, names: &["--device cuda:4096"], ..SOUND },
        Case {
            name: "no device",
            flags: &["--device", "gpu"],
            code: WRONG_USAGE,
            names: &["`gpu` is no device"],
            ..SOUND
        },
    ]);
    for (device, code, names) in
        [("cuda:4096", WRONG_INPUT, "worker.device is cuda:4096"), ("gpu", WRONG_USAGE, "`gpu` is no device")]
    {
        let workplace = Workplace::new();
        let arguments = ["serve", "--coordinator", "http://127.0.0.1:1", "--device", device];
        let worker = workplace.start_program("espalier-worker", arguments).unwrap();
        let finished = worker.finish(Duration::from_secs(30)).unwrap();
        assert_eq!(finished.code(), Some(code), "{}", finished.stderr);
        let lines = finished.error_lines();
        assert!(lines.len() == 1 && lines[0].contains(names), "{}", finished.stderr);
    }
}
