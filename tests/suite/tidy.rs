//! The rules of ARCHITECTURE.md that a compiler does not check, checked by reading the source.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use harness::repository;

const CRATES: [&str; 5] = ["proto", "common", "common/gate", "coordinator", "worker"];

/// A file is cut by responsibility long before this; its unit tests are not counted.
const MOST_LINES: usize = 600;

/// One source file: its path from the repository's root, with forward slashes, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Lines with their numbers, comments and strings left out.
    fn code(&self) -> impl Iterator<Item = (usize, String)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, without_comments_and_strings(line)))
    }

    /// Number of lines before the unit tests.
    fn product_lines(&self) -> usize {
        let lines: Vec<_> = self.text.lines().collect();
        lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with('{')).unwrap_or(lines.len())
    }
}

/// All Rust files below `folders` of the repository.
fn sources(folders: &[&str]) -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in folders {
        collect(&repository().join(folder), &mut paths);
    }
    paths.sort();
    assert!(!paths.is_empty(), "no source in {folders:?}");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("source is readable UTF-8");
        let path = path.strip_prefix(repository()).expect("it was found there").to_string_lossy().replace('\\', "/");
        Source { path, text }
    };
    paths.into_iter().map(read).collect()
}

/// The `src/` folders of all crates.
fn product() -> Vec<Source> {
    sources(&CRATES.map(|name| format!("{name}/src")).each_ref().map(String::as_str))
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("a folder that was opened can be listed").path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// Good enough for lines that rustfmt has seen: string contents and what follows `//` become nothing.
fn without_comments_and_strings(line: &str) -> String {
    let mut code = String::new();
    let mut characters = line.chars().peekable();
    let mut in_string = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' if in_string => drop(characters.next()),
            '\'' if !in_string && characters.peek() == Some(&'"') => drop(characters.next()),
            '"' => in_string = !in_string,
            '/' if !in_string && characters.peek() == Some(&'/') => break,
            _ if !in_string => code.push(character),
            _ => {}
        }
    }
    code
}

/// Whether `code` holds `word` with no letter, digit or underscore on either side.
fn mentions(code: &str, word: &str) -> bool {
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].chars().next_back().is_some_and(is_word)
            && !code[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

/// Fails with `file:line` for each line that mentions one of `words` outside the files that `allowed` accepts.
fn assert_only_in(words: &[&str], allowed: impl Fn(&str) -> bool, rule: &str) {
    let mut offences = String::new();
    for source in product().iter().filter(|source| !allowed(&source.path)) {
        for (number, code) in source.code() {
            if let Some(word) = words.iter().find(|word| mentions(&code, word)) {
                let _ = writeln!(offences, "{}:{number}: {word}", source.path);
            }
        }
    }
    assert!(offences.is_empty(), "{rule}:\n{offences}");
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[test]
fn tensors_are_the_workers_alone() {
    assert_only_in(
        &["candle_core", "candle_nn", "cudarc", "faer"],
        |path| path.starts_with("worker/"),
        "tensor libraries are used in worker/ only",
    );
}

#[test]
fn rpc_stays_at_the_edges() {
    const FILES: [&str; 3] = ["server.rs", "session.rs", "registration.rs"];
    let allowed = |path: &str| {
        path.starts_with("proto/")
            || path.starts_with("common/gate/")
            || path.contains("/src/rpc/")
            || path.contains("/src/fleet/")
            || path == "worker/src/transport/grpc.rs"
            || (path.matches('/').count() == 2 && FILES.contains(&file_name(path)))
    };
    assert_only_in(
        &["tonic", "tonic_health"],
        allowed,
        "tonic is used where RPCs are served or called, and nowhere else",
    );
}

#[test]
fn pages_stay_at_the_edges() {
    let allowed = |path: &str| {
        path.starts_with("common/gate/") || path.starts_with("coordinator/src/http/") || path == "worker/src/http.rs"
    };
    assert_only_in(&["axum", "hyper"], allowed, "pages are served by the gate, and made in http/ and http.rs");
    let counted = |path: &str| path == "common/src/metric.rs";
    assert_only_in(&["prometheus"], counted, "metrics are counted through metric.rs");
}

#[test]
fn connections_are_the_gates_alone() {
    const RULE: &str = "listeners are opened by Entrance and connections made by Dialer";
    // Unit tests of clients serve what they call.
    const TESTED: [&str; 2] = ["worker/src/transport/grpc.rs", "worker/src/fleet/client.rs"];
    let gate = |path: &str| path.starts_with("common/gate/");
    // A client of object stores chooses the same provider of ciphers; its connections are the stores' own.
    let ciphers = |path: &str| gate(path) || path == "common/src/store/object/connect.rs";
    assert_only_in(&["TcpListenerStream", "connect_lazy", "tokio_rustls"], gate, RULE);
    assert_only_in(&["rustls"], ciphers, RULE);
    assert_only_in(&["TcpIncoming"], |path| gate(path) || TESTED.contains(&path), RULE);
}

#[test]
fn environment_is_read_by_config_alone() {
    assert_only_in(
        &["env::var", "env::vars", "env::var_os", "env::vars_os"],
        |path| file_name(path) == "config.rs",
        "environment variables are read in config.rs only",
    );
}

#[test]
fn unsafe_code_stays_where_it_is_argued_for() {
    const FILES: [&str; 3] =
        ["common/src/checkpoint/reader.rs", "worker/src/linalg/gemm.rs", "worker/src/linalg/kernel.rs"];
    let allowed = |path: &str| path.starts_with("worker/src/device/") || FILES.contains(&path);
    assert_only_in(&["unsafe"], allowed, "unsafe is opened per file, where a SAFETY comment argues for it");
}

#[test]
fn features_are_asked_about_in_few_places() {
    let allowed = |path: &str| path.starts_with("worker/src/device/") || path.starts_with("worker/src/transport/");
    assert_only_in(&["feature"], allowed, "builds differ in worker/src/device/ and worker/src/transport/ only");
}

#[test]
fn anyhow_stays_in_the_binaries() {
    let allowed = |path: &str| matches!(file_name(path), "main.rs" | "cli.rs");
    assert_only_in(&["anyhow"], allowed, "anyhow is for main.rs, cli.rs and tests; modules have an error enum");
}

#[test]
fn nothing_is_left_to_do() {
    assert_only_in(&["todo!", "unimplemented!"], |_| false, "no stubs");
}

#[test]
fn files_are_named_for_what_they_hold() {
    let vague: Vec<_> = sources(&["proto", "common", "coordinator", "worker", "tests"])
        .into_iter()
        .map(|source| source.path)
        .filter(|path| matches!(file_name(path), "utils.rs" | "util.rs" | "helpers.rs" | "types.rs" | "misc.rs"))
        .collect();
    assert!(vague.is_empty(), "name a file for what it holds: {vague:?}");
}

#[test]
fn files_are_cut_by_responsibility() {
    let long: Vec<_> = product()
        .iter()
        .filter(|source| !source.path.ends_with("tests.rs") && source.product_lines() > MOST_LINES)
        .map(|source| format!("{}:{}", source.path, source.product_lines()))
        .collect();
    assert!(long.is_empty(), "more than {MOST_LINES} lines, tests aside: {long:?}");
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<_> = product()
        .iter()
        .filter(|source| !source.text.starts_with("//!"))
        .map(|source| format!("{}:1", source.path))
        .collect();
    assert!(silent.is_empty(), "a file starts with a `//!` line: {silent:?}");
}

#[test]
fn crates_depend_in_one_direction() {
    // What each crate's manifest must not name.
    let forbidden = [
        (
            "proto",
            &["espalier-common", "espalier-gate", "espalier-coordinator", "espalier-worker", "candle-core", "faer"][..],
        ),
        (
            "common",
            &["espalier-gate", "tonic", "espalier-coordinator", "espalier-worker", "candle-core", "candle-nn", "faer"],
        ),
        (
            "common/gate",
            &["espalier-proto", "espalier-coordinator", "espalier-worker", "candle-core", "candle-nn", "faer"],
        ),
        ("coordinator", &["espalier-worker", "candle-core", "candle-nn", "cudarc", "faer", "gemm"]),
        ("worker", &["espalier-coordinator"]),
    ];
    let mut offences = String::new();
    for (name, dependencies) in forbidden {
        let manifest =
            fs::read_to_string(repository().join(name).join("Cargo.toml")).expect("each crate has a manifest");
        for (index, line) in manifest.lines().enumerate() {
            let key = line.split(['.', '=', ' ']).next().unwrap_or(line);
            if dependencies.contains(&key) {
                let _ = writeln!(offences, "{name}/Cargo.toml:{}: {key}", index + 1);
            }
        }
    }
    assert!(
        offences.is_empty(),
        "proto ← common ← gate ← {{coordinator, worker}}, tensors in worker only:\n{offences}"
    );
}

#[test]
fn comments_and_strings_are_no_code() {
    assert_eq!(without_comments_and_strings(r#"let a = "tonic \" // x"; // tonic"#), "let a = ; ");
    assert_eq!(without_comments_and_strings(r#"split('"').tonic("x")"#), "split(').tonic()");
    assert!(mentions("use tonic::Status;", "tonic"));
    assert!(!mentions("tectonic_shift", "tonic"));
    assert!(mentions("std::env::var(name)", "env::var"));
    assert!(!mentions("std::env::var_os(name)", "env::var"));
}
